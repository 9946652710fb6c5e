"""SSDet and Coarse-Fine, part by part, against slow versions of the equations and official code."""

import itertools
import json
import math
import re
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import running
import torch
import torch.nn.functional as F
import world
from torch import nn

import common
import ssdet_coarsefine as sc
from common import SplitBatchNorm, UserError

close = partial(torch.testing.assert_close, rtol=0)


# ---- volume augmentations ------------------------------------------------------------------------

def clips(B, T, W, seed, M=1):
    """Clips with labels and weights that change from frame to frame."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(B, 3, T, 3, W, generator=g)
    label = torch.randint(1, 90, (M, B, T), generator=g)
    weight, present = torch.rand(M, B, T, generator=g), torch.ones(M, B, T)
    present[:, 0, T // 2] = 0
    return sc.Mixture(x, label, weight, present)


def draw(B, T, seed):
    """(start, length, partner) for MixUp and growing CutMix, also very short windows and ties."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, T + 1, (2, B))
    start = rng.integers(0, T - length + 1)
    if seed % 3 == 0:
        start[1], length[1, ::2] = start[0].clip(0, T - length.max(0)), length[0, ::2]
        start = start.clip(0, T - length)
    return [torch.from_numpy(x) for x in (start, length, rng.permutation(B))]


def slow_intervals(T, start, length, extend):
    """[start, end) of two clips: lists of two."""
    s, e = list(start), [a + n for a, n in zip(start, length)]
    if extend:
        early = 1 if s[1] < s[0] else 0
        e[early], s[early] = e[early] - s[early], 0           # moved to the beginning
        e[1 if e[1] > e[0] else 0] = T                        # goes on to the end
    return s, e


def slow_fade(t, s, e, total=1):
    """Weights of the own clip and of its partner in frame t, and which are present."""
    total = np.float32(total)
    present = [s[i] <= t < e[i] for i in (0, 1)]
    if not all(present):
        return [total * k for k in present], present
    k, n = t + 1 - max(s), min(e) - max(s)                    # the k-th of n shared frames
    rise = np.float32(k) * (np.float32(1) / np.float32(n + 1)) * total
    dip = np.float32(abs(k - n / 2)) * 2 / np.float32(n + 1) * total
    later, ends_later = s[0] >= s[1], e[0] >= e[1]
    own = {(True, True): rise, (False, False): total - rise,
           (False, True): dip, (True, False): total - dip}[later, ends_later]
    return [own, total - own], present


def slow_mixture(mix, x, partner, weights, present):
    """Mixture of the frames x; weights, present: of (own, partner) by clip and frame."""
    M, B, T = mix.label.shape
    label, weight, there = (torch.zeros(2 * M, B, T, dtype=d)
                            for d in (torch.long, torch.float, torch.float))
    for m, b, t in itertools.product(range(M), range(B), range(T)):
        for k, source in ((0, b), (1, int(partner[b]))):
            label[k * M + m, b, t] = mix.label[m, source, t]
            weight[k * M + m, b, t] = mix.weight[m, source, t] * float(weights[b][t][k])
            there[k * M + m, b, t] = mix.present[m, source, t] * float(present[b][t][k])
    return sc.Mixture(x, label, weight, there)


def same_mixture(got, want):
    assert torch.equal(got.label, want.label)
    close(got.present.float(), want.present, atol=0)
    close(got.x, want.x, atol=2e-6)
    close(got.weight, want.weight, atol=2e-6)


@pytest.mark.parametrize("B, T, M", [(3, 8, 1), (4, 13, 2), (5, 2, 2), (2, 1, 1)])
def test_freezing_holds_a_frame_and_shifts_the_rest(B, T, M):
    for seed in range(3):
        mix, rng = clips(B, T, 4, seed, M), np.random.default_rng(seed)
        length = rng.integers(1, T + 1, B)
        start = rng.integers(0, T - length + 1)
        got = sc.volume_freeze(mix, torch.from_numpy(start), torch.from_numpy(length))
        for b, (s, n) in enumerate(zip(start, length)):
            order = [*range(s), *[s] * n, *range(s + 1, T)][:T]           # of frames
            assert torch.equal(got.x[b], mix.x[b][:, order])
            want = mix.label[:, b, order]
            want[:, s:s + n] = 0
            assert torch.equal(got.label[:, b], want)
        assert torch.equal(got.weight, mix.weight) and torch.equal(got.present, mix.present)


def test_fading_in_numbers():
    """Of three shared frames the later clip has 1/4, 2/4, 3/4; an inner one leaves the rest."""
    start, end = (torch.tensor(x)[:, None] for x in ([0, 3], [6, 9]))
    w, _ = sc.cross_fade(9, start, end)
    close(w[1, 0], torch.tensor([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]), atol=1e-6)
    start, end = (torch.tensor(x)[:, None] for x in ([0, 2], [8, 6]))
    w, _ = sc.cross_fade(8, start, end)
    close(w[0, 0], torch.tensor([1, 1, 0.4, 0, 0.4, 0.8, 1, 1]), atol=1e-6)
    close(w[1, 0], 1 - w[0, 0], atol=1e-6)


@pytest.mark.parametrize("B, T, M", [(2, 8, 1), (5, 9, 2), (3, 16, 2), (4, 2, 1)])
@pytest.mark.parametrize("extend", [True, False])
def test_mixup_is_the_weighted_sum_of_both_frames(B, T, M, extend):
    for seed in range(4):
        mix, (start, length, partner) = clips(B, T, 5, seed, M), draw(B, T, seed)
        before = start.clone()
        got = sc.volume_mixup(mix, start, length, partner, extend)
        assert torch.equal(start, before)                     # the choices stay as drawn
        x, weights, present = torch.zeros_like(mix.x), {}, {}
        for b in range(B):
            s, e = slow_intervals(T, start[:, b].tolist(), length[:, b].tolist(), extend)
            weights[b], present[b] = zip(*(slow_fade(t, s, e) for t in range(T)))
            for t, (own, other) in enumerate(weights[b]):
                x[b, :, t] = float(own) * mix.x[b, :, t] + float(other) * mix.x[partner[b], :, t]
        same_mixture(got, slow_mixture(mix, x, partner, weights, present))


@pytest.mark.parametrize("T", [1, 2, 7, 16])
def test_drawn_choices_are_in_range_and_leave_no_frame_black(T):
    rng, lengths = np.random.default_rng(T), set()
    ones = sc.unmixed(torch.ones(16, 3, T, 1, 32), torch.ones(16, T, dtype=torch.long))
    for name, _ in itertools.product(sc.AUGMENTATIONS, range(40)):
        c = sc.draw_choices(rng, name, T, 16)
        if name != "sliding":
            assert 0 <= c["start"].min() and (c["start"] + c["length"]).max() <= T
        if name == "freeze":
            lengths |= set(c["length"].tolist())
            continue
        assert sorted(c["partner"].tolist()) == list(range(16))
        mix = sc.augment(ones, {name: c})
        close(mix.x, ones.x, atol=1e-5)
        close((mix.weight * mix.present).sum(0), torch.ones(16, T), atol=1e-5)
    assert lengths == set(range(1, max(2, T // 2)))


def test_switches_are_of_all_processes_and_partners_of_each(monkeypatch):
    args, count = SimpleNamespace(seed=5, aug_prob=0.3, augment=["mixup", "cutmix"]), 0
    for step in range(600):
        found = []
        for rank in (0, 1):
            monkeypatch.setattr(common, "rank", lambda r=rank: r)
            found.append(sc.draw_augmentations(args, step, 8, 6, "cpu"))
        assert found[0].keys() == found[1].keys() <= {"mixup", "cutmix"}
        assert not found[0] or any(not torch.equal(found[0][k]["start"], found[1][k]["start"])
                                   for k in found[0])
        count += len(found[0])
    assert abs(count - 360) <= 4 * (1200 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("rank", [0, 1])
def test_lengths_do_not_depend_on_the_switches(rank, monkeypatch):
    """Seeds (a, b) and (a, b, 0) are the same to NumPy: of rank 0 lengths 5..7 were never drawn."""
    monkeypatch.setattr(common, "rank", lambda: rank)
    args, lengths = SimpleNamespace(seed=0, aug_prob=0.5, augment=["freeze"]), []
    for step in range(800):
        found = sc.draw_augmentations(args, step, 16, 1, "cpu")
        lengths += found["freeze"]["length"].tolist() if found else []
    counts = np.bincount(lengths, minlength=8)[1:]
    assert len(counts) == 7 and counts.min() > 30             # about 57 each


# ---- losses --------------------------------------------------------------------------------------

def some_mixture(B, T, K, M, seed):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, K, (M, B, T), generator=g)       # 0: background
    present = (torch.rand(M, B, T, generator=g) < 0.7).float()
    present[:, 0] = 1
    weight = torch.rand(M, B, T, generator=g) * present
    return 3 * torch.randn(B, K, T, generator=g), sc.Mixture(torch.zeros(B), label, weight, present)


@pytest.mark.parametrize("B, T, K, M", [(3, 5, 4, 1), (2, 8, 7, 2), (4, 3, 3, 4)])
def test_the_pretraining_loss_is_the_sum_of_the_equation(B, T, K, M):
    logits, mix = some_mixture(B, T, K, M, B)
    loss, accuracy = sc.pretraining_loss(logits, mix)
    want = right = 0.0
    for m in range(M):
        total = count = 0.0
        for b, t in itertools.product(range(B), range(T)):
            z, y, weight = logits[b, :, t].tolist(), int(mix.label[m, b, t]), mix.weight[m, b, t]
            total += float(weight) * (math.log(sum(map(math.exp, z))) - z[y])
            right += float(weight) * (z.index(max(z)) == y)
            count += float(mix.present[m, b, t])
        want += total / count
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert accuracy.item() == pytest.approx(right / (B * T), rel=1e-5)
    gone = mix._replace(weight=0 * mix.weight, present=0 * mix.present)
    assert sc.pretraining_loss(logits, gone)[0] == 0          # a mixture that is nowhere: no 0/0


def test_classification_is_the_same_loss_with_one_label():
    logits, label = torch.randn(6, 9, 1), torch.randint(0, 9, (6, 1))
    loss, accuracy = sc.pretraining_loss(logits, sc.unmixed(torch.zeros(6), label))
    close(loss, F.cross_entropy(logits[..., 0], label[:, 0]), atol=1e-6)
    assert accuracy == (logits[..., 0].argmax(1) == label[:, 0]).float().mean()


def ragged(B, K, N, seed):
    g = torch.Generator().manual_seed(seed)
    logits, mask = 2 * torch.randn(B, K, N, generator=g), torch.ones(B, N)
    for b in range(1, B):
        mask[b, int(torch.randint(1, N, (), generator=g)):] = 0
    return logits, (torch.rand(B, K, N, generator=g) < 0.3).float() * mask[:, None], mask


@pytest.mark.parametrize("B, K, N", [(1, 3, 6), (3, 4, 9), (4, 2, 5)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_detection_loss_is_that_of_the_loop(B, K, N, masked):
    logits, label, mask = ragged(B, K, N, N)
    mask = mask if masked else torch.ones_like(mask)
    x = logits.clone().requires_grad_()
    got = sc.detection_loss(x, label, mask)
    cls = loc = count = 0.0
    for b, k in itertools.product(range(B), range(K)):
        row = [(1 / (1 + math.exp(-logits[b, k, t].item())), label[b, k, t].item())
               for t in range(N) if mask[b, t]]
        loc -= sum(y * math.log(p) + (1 - y) * math.log(1 - p) for p, y in row)
        count += len(row)
        p, y = (max(values) for values in zip(*row))
        cls -= y * math.log(p) + (1 - y) * math.log(1 - p)
    cls, loc = cls / (B * K), loc / count
    assert [v.item() for v in got] == pytest.approx([(cls + loc) / 2, cls, loc], rel=1e-5)
    got[0].backward()
    assert torch.equal(x.grad.abs().amax(1) > 0, mask > 0)    # padding has no gradient


def losses_of(rank):
    """Both losses of a process's half of a batch, and the gradients that DDP averages."""
    net = nn.parallel.DistributedDataParallel(nn.Conv1d(4, 4, 1, bias=False))
    with torch.no_grad():
        net.module.weight.copy_(torch.eye(4)[..., None])
    at, found = slice(3 * rank, 3 * rank + 3), {}
    logits, mix = some_mixture(6, 5, 4, 2, 0)
    mix = sc.Mixture(mix.x[at], *(v[:, at] for v in mix[1:]))
    video, label, mask = ragged(6, 4, 7, 1)
    for name, loss in (
            ("pretraining", lambda: sc.pretraining_loss(net(logits[at]), mix)[0]),
            ("detection", lambda: sc.detection_loss(net(video[at]), label[at], mask[at])[0])):
        net.zero_grad()
        loss().backward()
        found[name] = net.module.weight.grad.clone()
    return found


def test_two_processes_average_the_losses_of_their_halves(tmp_path):
    two = running.processes(losses_of, 2, tmp_path)
    logits, mix = some_mixture(6, 5, 4, 2, 0)
    video, label, mask = ragged(6, 4, 7, 1)
    w = torch.eye(4)[..., None].requires_grad_()
    halves = [slice(0, 3), slice(3, 6)]
    want = {"pretraining": sum(sc.pretraining_loss(F.conv1d(logits[h], w), sc.Mixture(
                mix.x[h], *(v[:, h] for v in mix[1:])))[0] for h in halves) / 2,
            "detection": sum(sc.detection_loss(F.conv1d(video[h], w), label[h], mask[h])[0]
                             for h in halves) / 2}
    for name, loss in want.items():
        (grad,) = torch.autograd.grad(loss, w)
        for found in two:
            close(found[name], grad, atol=1e-6)


# ---- split batch norm ----------------------------------------------------------------------------

def shake(model, seed=0):
    """Statistics, scales and shifts of the batch norms as after a training."""
    g = torch.Generator().manual_seed(seed)
    for name, v in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var") or v.dim() == 1 and name.endswith("weight"):
            v.data.copy_(0.5 + torch.rand(v.shape, generator=g))
        elif name.endswith(("running_mean", "bias")):
            v.data.copy_(0.3 * torch.randn(v.shape, generator=g))
    common.merge_splits(model)
    return model


@pytest.mark.parametrize("parts, B", [(1, 3), (2, 4), (3, 9), (4, 4)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_a_split_norm_is_a_batch_norm_for_each_part(parts, B, memory):
    torch.manual_seed(parts)
    norm, plain = SplitBatchNorm(5, parts), [nn.BatchNorm3d(5) for _ in range(parts)]
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    for m in plain:
        m.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    for _ in range(3):
        x = torch.randn(B, 5, 2, 3, 4) * 2 + 1
        want = torch.stack([m(x[k::parts]) for k, m in enumerate(plain)], 1).flatten(0, 1)
        y = norm(x.contiguous(memory_format=memory))
        close(y, want, atol=1e-6)                             # sample i is of part i mod parts
        assert y.is_contiguous(memory_format=memory)
    means, variances = (torch.stack([getattr(m, f"running_{k}") for m in plain])
                        for k in ("mean", "var"))
    close(norm.split_bn.running_mean, means.flatten(), atol=1e-6)
    close(norm.split_bn.running_var, variances.flatten(), atol=1e-6)
    common.merge_splits(norm)
    close(norm.bn.running_mean, means.mean(0), atol=1e-6)
    close(norm.bn.running_var, variances.mean(0) + means.var(0, unbiased=False), atol=1e-6)
    x = torch.randn(1, 5, 2, 3, 4).contiguous(memory_format=memory)       # one sample does
    close(norm.eval()(x), F.batch_norm(x, norm.bn.running_mean, norm.bn.running_var, norm.weight,
                                       norm.bias), atol=1e-5)
    other = SplitBatchNorm(5, 2)
    other.load_state_dict(norm.state_dict())                  # brings its number of parts
    assert other.splits == parts and torch.equal(other.eval()(x), norm(x))


# ---- weights -------------------------------------------------------------------------------------

def pytorchvideo_name(name):
    """A name of SlowFast in pytorchvideo's zoo."""
    if stem := re.fullmatch(r"s1\.pathway(\d)_stem\.(conv|bn)\.(.*)", name):
        return (f"blocks.0.multipathway_blocks.{stem[1]}."
                f"{'norm' if stem[2] == 'bn' else 'conv'}.{stem[3]}")
    if fuse := re.fullmatch(r"s(\d)_fuse\.(conv_f2s|bn)\.(.*)", name):
        kind = "norm" if fuse[2] == "bn" else "conv_fast_to_slow"
        return f"blocks.{int(fuse[1]) - 1}.multipathway_fusion.{kind}.{fuse[3]}"
    if name.startswith("head."):
        return f"blocks.6.proj.{name.split('.')[-1]}"
    s, p, i, rest = re.fullmatch(r"s(\d)\.pathway(\d)_res(\d+)\.(.*)", name).groups()
    rest = re.sub(r"^branch1_bn\.", "branch1_norm.", re.sub(r"^branch1\.", "branch1_conv.", rest))
    rest = re.sub(r"branch2\.([abc])_bn\.", r"branch2.norm_\1.", rest)
    rest = re.sub(r"branch2\.([abc])\.", r"branch2.conv_\1.", rest)
    return f"blocks.{int(s) - 1}.multipathway_blocks.{p}.res_blocks.{i}.{rest}"


def network(kind, norm, classes=5):
    torch.manual_seed(3)
    if kind == "slowfast":
        return common.SlowFast(classes, True, 16, (2, 1, 1, 1), norm=norm, dropout=0.0)
    if kind == "coarse":
        return sc.Coarse("tiny", classes, norm=norm, dropout=0.0)
    return common.X3D("tiny", classes, norm=norm, dropout=0.0)


def outputs(kind, model):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 32, 32, generator=g)
    features = {k: torch.rand(2, c, 9, 7, 7, generator=g)
                for k, c in zip(sc.LEVELS, getattr(model, "widths", ()))}
    rest = (features, torch.ones(2, 9), torch.tensor([0, 1])) if kind == "coarse" else ()
    with torch.no_grad():
        return model.eval()(x, *rest)


@pytest.mark.parametrize("kind, layout", [
    ("x3d", "released"), ("x3d", "flat"), ("coarse", "released"),
    ("coarse", "two"), ("slowfast", "zoo"), ("slowfast", "pytorchvideo")])
@pytest.mark.parametrize("norm", [SplitBatchNorm, partial(SplitBatchNorm, splits=3),
                                  nn.BatchNorm3d])
def test_every_known_layout_loads_and_gives_the_same_outputs(kind, layout, norm, tmp_path):
    net, got = shake(network(kind, nn.BatchNorm3d)), network(kind, norm)
    state = dict(net.state_dict())
    if layout == "flat":                                      # fc1 as a linear layer
        state["fc1.weight"] = state["fc1.weight"][:, :, 0, 0, 0]
    file = {"flat": state, "released": {"model_state_dict": state, "optimizer_state_dict": {}},
            "two": {"model_l_state_dict": {f"module.{k}": v for k, v in state.items()},
                    "model_g_state_dict": {"module.conv1_s.weight": torch.zeros(1)}},
            "zoo": {"epoch": 3, "model_state": state, "cfg": ""},
            "pytorchvideo": lambda: {"model_state": {pytorchvideo_name(k): v
                                                     for k, v in state.items()}}}[layout]
    torch.save(file() if callable(file) else file, tmp_path / "w.pyth")
    sc.load_network(got, tmp_path / "w.pyth", strict=True)
    close(outputs(kind, got), outputs(kind, net), atol=2e-6)


def test_what_may_be_missing_and_what_may_not(tmp_path):
    path, other = tmp_path / "x3d.pt", shake(network("x3d", SplitBatchNorm, 9), 1)
    torch.save(other.state_dict(), path)
    coarse, x3d = network("coarse", SplitBatchNorm), network("x3d", SplitBatchNorm)
    before = {k: v.clone() for k, v in coarse.state_dict().items()}
    sc.load_network(coarse, path)                             # its own layers and classifiers stay
    for k, v in coarse.state_dict().items():
        kept = k.startswith((*sc.HEADS, *sc.FUSION))
        assert torch.equal(v, before[k] if kept else other.state_dict()[k]), k
    for model in (coarse, x3d):                               # as evaluation loads: no X3D either
        with pytest.raises(UserError, match=f"{path}: .* tensors are missing"):
            sc.load_network(model, path, strict=True)
    state = other.state_dict()
    for bad in ({k: v for k, v in state.items() if k != "layer3.0.conv2.weight"},
                state | {"layer3.0.conv2.weight": state["layer3.0.conv2.weight"] * math.nan},
                state | {"layer3.0.conv2.weight": state["layer3.0.conv2.weight"][1:]}):
        torch.save(bad, path)
        with pytest.raises(UserError, match="layer3.0.conv2.weight"):
            sc.load_network(x3d, path)


def test_a_checkpoint_of_another_stream_is_an_error(tmp_path):
    args = sc.parse_args("--stage evaluate --stream coarse --init x".split())
    own = {"model": {}, "step": 3, "args": {"stage": "finetune", "stream": "fine", "version": "S"}}
    for content, flags, words in (
            (own, {}, "was trained with --stream fine, not coarse"),
            (own | {"args": {"stage": "pretrain"}}, {}, "trained by --stage pretrain"),
            ({"model_state_dict": {}}, {"stream": None}, "--stream must name its network")):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(UserError, match=f"^{tmp_path}/w.pt: .*{words}"):
            sc.with_flags_of(SimpleNamespace(**{**vars(args), **flags}), tmp_path / "w.pt")
    torch.save(own, tmp_path / "w.pt")
    args.stream = None
    found = sc.with_flags_of(args, tmp_path / "w.pt")
    assert (found.stream, found.version, args.stream) == ("fine", "S", None)


# ---- Coarse-Fine ---------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [4, 8, 13, 64])
def test_grid_pool_steps_least_where_it_is_most_confident(T):
    torch.manual_seed(T)
    pool = shake(sc.GridPool(6, SplitBatchNorm)).eval()
    pool.conv3.weight.data.mul_(10)
    x, given = torch.randn(2, 6, T, 8, 8), []
    pool.conv3.register_forward_hook(lambda _, __, y: given.append(y))
    with torch.no_grad():
        y, c = pool(x)
    z = given[0].mean((1, 3, 4)).tolist()
    L = math.ceil(math.ceil(T / 2) / 2) + 1
    assert y.shape == (2, 6, L, 8, 8) and c.shape == (2, L)
    for b in range(2):
        step = [1 - 1 / (1 + math.exp(-0.5 * v)) for v in z[b]]
        times = [sum(step[:i]) / sum(step) for i in range(L)]
        assert c[b].tolist() == pytest.approx(times, abs=1e-6)
        for i, t in enumerate(c[b].tolist()):
            k = min(int(t * (T - 1)), T - 2)
            part = t * (T - 1) - k
            close(y[b, :, i], (1 - part) * x[b, :, k] + part * x[b, :, k + 1], atol=1e-4)


def mix_at_stage(self, biases, scales, size):
    """`Mixing` of maps that are resized first, as the release has it."""
    def mix(maps, conv):
        x = torch.cat([sc.resize_maps(m, size) for m in maps], 1)
        return conv(x.flatten(2)).unflatten(2, x.shape[2:])
    return mix(biases, self.conv_at), mix(scales, self.conv_at2).sigmoid()


def filter_at_stage(sizes, self, x, G, valid):
    """`FusionFilter` with every product of the equation, of maps that are resized first."""
    x = sc.resize_maps(x, sizes[x.shape[1]])
    B, _, T, h, w = x.shape
    a = self.at2(F.relu(self.at1(x.flatten(2)))).sigmoid().view(B, 1, T, 1, h, w)
    weight = a * (G * valid[..., None])[:, None, :, :, None, None]        # B, 1, T', L, h, w
    A = (x[:, :, :, None] * weight).sum(2) / (weight.sum(2) + 1e-6)
    A = A.mean((3, 4), keepdim=True) if self.spatial_mean else A
    bias, scale = (second(F.relu(first(A.flatten(2)))).unflatten(2, A.shape[2:])
                   for first, second in ((self.fc1, self.fc2), (self.fc3, self.fc4)))
    return bias, scale.sigmoid() if self.sigmoid_scale else scale


def fuse_at_stages(patch, sizes):
    patch.setattr(sc.FusionFilter, "forward", lambda *args: filter_at_stage(sizes, *args))
    patch.setattr(sc.Mixing, "forward", mix_at_stage)


@pytest.mark.parametrize("fusion, pool", [("mixed", "grid"), ("mixed", "avg"), ("own", "max"),
                                          ("own", "grid"), ("none", "stride")])
def test_the_coarse_stream_equals_one_that_fuses_at_its_stages(fusion, pool, monkeypatch):
    torch.manual_seed(0)
    m = shake(sc.Coarse("tiny", 4, pool, fusion, norm=nn.BatchNorm3d, dropout=0.0)).eval()
    x, valid, start = torch.randn(1, 3, 8, 224, 224), torch.ones(1, 9), torch.tensor([2])
    valid[0, 6:] = 0
    features = {k: torch.rand(1, c, 9, 7, 7) for k, c in zip(sc.LEVELS, m.widths)}
    positions = []
    if fusion == "mixed":
        m.mix2.conv_at.register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[2]))
    with torch.no_grad():
        got = m(x, features, valid, start) if fusion != "none" else m(x)
        assert positions in ([], [49 * (3 if pool == "grid" else 2)])     # 7x7, 1/64 of 56x56
        assert got.shape == (1, 4, 8 if pool == "grid" else 2) and got.std() > 1e-3
        assert (m.grid_times is not None) == (pool == "grid")
        if fusion != "none":
            later = m(x, features, valid, start + 4)
            assert (later - got).abs().max() > 1e-4           # the start counts
            fuse_at_stages(monkeypatch, dict(zip(m.widths, (56, 28, 14, 7, 7))))
            want = m(x, features, valid, start)
            close(got, want, atol=1e-6 * want.abs().max().item())


# ---- schedules -----------------------------------------------------------------------------------

def plan_of(multigrid, steps=2000, n=40_000, **flags):
    args = sc.parse_args(f"--task classify --multigrid {multigrid} --iters {steps}".split())
    return args, sc.step_shapes(SimpleNamespace(**{**vars(args), **flags}), n)


def test_a_plan_of_three_long_cycles_is_that_of_the_table():
    args, plan = plan_of("x3d")
    states = []
    for a, b in itertools.pairwise((0, 800, 1300, 1700)):
        states += [4 * k // (b - a) for k in range(b - a)]
    states += [3] * 300
    table = {0: (8, 2, (111, 158)), 1: (4, 4, (111, 158)), 2: (2, 4, (112, 158, 224)),
             3: (1, 8, (112, 158, 224))}                      # batch factor, frames, crops
    assert len(plan) == len(states) == args.iters
    for k, (shape, state) in enumerate(zip(plan, states)):
        scale, frames, crops = table[state]
        place = k % len(crops)
        factor = 2 ** (len(crops) - 1 - place)
        assert shape == (128 * scale * factor, frames, crops[place], scale, 4 * scale)
    assert set(plan_of("off")[1]) == {(128, 8, 224, 1.0, 4)}


def test_a_plan_of_the_authors_schedule_trains_1_5_times_the_epochs_in_fewer_steps():
    args, plan = plan_of("fair", 20_000)
    epochs = args.iters * args.batch_size / 40_000
    assert sum(s.batch for s in plan) / 40_000 == pytest.approx(1.5 * epochs, rel=0.05)
    assert len(plan) < args.iters
    assert all(s.batch % s.splits == 0 and s.batch >= 128 for s in plan)
    assert {s.crop for s in plan[-3:]} == {112, 158, 224} and plan[-1].frames == 8
    base = [round(math.log10(s.lr / (s.splits / 4)), 6) for s in plan]    # without the long batch
    assert base == sorted(base, reverse=True) and set(base) == {0, -1, -2, -3}
    _, flat = plan_of("fair", milestones=[])
    assert {(s.lr, s.frames) for s in flat} == {(1.0, 8)}


def test_steps_of_a_plan_have_clips_of_its_shapes(tmp_path):
    def make(args, items, i, rng, frames, crop):
        return {"x": torch.zeros(frames, crop), "i": i}
    _, plan = plan_of("x3d", 40, batch_size=4, bn_splits=1, crop=32)
    args = SimpleNamespace(seed=0, batch_size=4, workers=0)
    loader = common.batches(args, common.Samples(args, range(100), make), torch.device("cpu"), 0,
                            40, plan=[shape[:3] for shape in plan])
    seen = []
    for shape, batch in zip(plan, loader, strict=True):
        assert batch["x"].shape == (shape.batch, shape.frames, shape.crop)
        seen += batch["i"].tolist()
    assert sorted(seen[:100]) == list(range(100))             # epochs follow without a gap


def test_rates_warm_up_and_fall():
    for k in range(100):
        want = 0.05 * (0.1 if k >= 40 else 1) * (0.1 if k >= 80 else 1) * min(1, (k + 1) / 10)
        assert sc.warmup_and_steps(k, 0.05, [40, 80], 10) == pytest.approx(want)
    args = sc.parse_args("--stage finetune --lr 1".split())
    assert [round(sc.learning_rate(args, k, 10), 6) for k in (0, 2, 3, 4, 5, 9)] == [
        1, 1, 0.1, 0.01, 0.001, 0.001]                        # x0.1 at 30, 40 and 50 %
    args.schedule, args.milestones = "cosine", []
    assert sc.learning_rate(args, 5, 10) == pytest.approx(0.5)
    args.schedule = "plateau"
    assert sc.learning_rate(args, 5, 10, [1.0] * 12) == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(6))
def test_the_plateau_rule_is_that_of_torch(seed):
    rng = np.random.default_rng(seed)
    losses = np.round(1 + rng.normal(0, 0.1, 90) - seed % 3 * np.arange(90) / 400, seed % 4 + 2)
    if seed % 4 == 0:                                         # gains that are too small to count
        losses = 1 - np.arange(90) * 1e-6 * (seed + 1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e200)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=10)
    for k in range(90):
        rule.step(float(losses[k]))
        count = round(200 - math.log10(optimizer.param_groups[0]["lr"]))
        assert sc.plateau_drops(losses[:k + 1].tolist()) == count
    assert count > 0


@pytest.mark.parametrize("flags, scales", [
    ("", {"fc1": 1, "fc2": 1, "layer1": 0.1}), ("--tiny", {"fc1": 1, "layer1": 1}),
    ("--stage finetune --stream coarse", {"rw2": 10, "mix5": 10, "fc2": 1, "pool_1": 1}),
    ("--stage finetune --stream coarse --fusion none", {"fc2": 1, "pool_1": 1})])
def test_each_group_of_parameters_has_its_rate(flags, scales):
    args = sc.parse_args(flags.split())
    with torch.device("meta"):
        model = sc.make_model(args, 5)
    names = {id(p): name.split(".")[0] for name, p in model.named_parameters()}
    groups = sc.make_optimizer(args, model).param_groups
    found = {names[id(p)]: g["scale"] for g in groups for p in g["params"]}
    assert scales.items() <= found.items()
    assert sum(len(g["params"]) for g in groups) == len(names)


# ---- metrics -------------------------------------------------------------------------------------

def slow_precision(scores, targets, weights=None):
    """As in the official APMeter, frame by frame."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])          # keeps ties in order
    hits = seen = total = 0.0
    for i in order:
        w = 1 if weights is None else weights[i]
        hits, seen = hits + w * targets[i], seen + w
        total += hits / seen if targets[i] else 0
    return total / max(1, sum(targets))


@pytest.mark.parametrize("N", [1, 2, 7, 50])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_average_precision_is_that_of_the_loop(N, ties, weighted):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, 4, N) / 4 if ties else rng.normal(size=N)
        targets = (rng.random(N) < rng.choice([0, 0.2, 0.8])).astype(float)
        weights = rng.random(N) + 0.1 if weighted else None
        got = sc.average_precision(*(x if x is None else torch.from_numpy(x)
                                     for x in (scores, targets, weights)))
        assert got == pytest.approx(slow_precision(scores, targets, weights), abs=1e-12)


def slow_localize(labels, scores):
    """Charades_v1_localize.m, line by line."""
    labels, scores = np.concatenate(labels), np.concatenate(scores)
    ap, counts = [], []
    for c in range(labels.shape[1]):
        tp, precisions = 0, []
        for n, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i, c]), 1):
            tp += int(labels[i, c])
            precisions += [tp / n] if labels[i, c] else []
        counts.append(tp)
        ap.append(sum(precisions) / tp if tp else math.nan)
    there = [c for c, n in enumerate(counts) if n]
    return (ap, sum(ap[c] for c in there) / len(there),
            sum(ap[c] * counts[c] for c in there) / sum(counts))


@pytest.mark.parametrize("seed", range(4))
def test_the_official_metric_is_that_of_the_matlab_file(seed):
    rng = np.random.default_rng(seed)
    labels = [(rng.random((25, 9)) < 0.2).astype(np.uint8) for _ in range(4)]
    scores = [np.round(rng.random((25, 9)), 1) for _ in range(4)]         # with ties
    for v in range(4):
        labels[v][:, 5] = 0
        scores[v][rng.random(25) < 0.2] = -np.inf
    scores[2][:] = -np.inf                                    # a video that was not submitted
    ap, *means = sc.charades_localize(labels, scores)
    want, *want_means = slow_localize(labels, scores)
    assert ap.tolist() == pytest.approx(want, abs=1e-12, nan_ok=True)
    assert means == pytest.approx(want_means, abs=1e-12)


def test_the_25_times_and_their_labels_and_frames():
    rng = np.random.default_rng(0)
    for seconds, fps in ((25.0, 24.0), *zip(rng.uniform(0.04, 90, 20), rng.uniform(7, 30, 20))):
        times, n = [j / 25 * seconds for j in range(25)], max(1, round(seconds * fps))
        assert sc.localization_times(seconds).tolist() == pytest.approx(times)
        rows = [(int(c), *np.sort(rng.uniform(0, seconds, 2))) for c in rng.integers(0, 4, 5)]
        rows += [(4, 4.0, 8.0), (5, 8.0, 8.0)]                # both ends are included
        got = sc.localization_labels(rows, seconds, 6)
        for j, c in itertools.product(range(25), range(6)):
            assert got[j, c] == any(k == c and s <= times[j] <= e for k, s, e in rows)
        for time, frame in zip(times, sc.charades_frames(n, seconds, fps)):
            best = min(abs(k / fps - time) for k in range(n))
            assert abs(frame / fps - time) <= best + 1e-9
    assert sc.charades_frames(719, None, None, True).tolist() == [1 + j * 28 for j in range(25)]


def test_a_submission_lacks_rows_and_has_some_twice(tmp_path, capsys):
    path, videos = tmp_path / "s.txt", [sc.Video("A", None, 5.0, []), sc.Video("B", None, 5.0, [])]
    path.write_text("A 1 0.1 0.2\nA 25 0.3 0.4\nX 1 9 9\nA 1 0.5 0.6\n")
    a, b = sc.read_submission(path, videos, 2)
    assert a[0].tolist() == [0.5, 0.6] and a[24].tolist() == [0.3, 0.4]
    assert np.isinf(a[1:24]).all() and np.isinf(b).all() and "48 of 50" in capsys.readouterr().out
    path.write_text("A 0 0.1 0.2\nA 24 0.3 0.4\n")            # frames from 0
    assert sc.read_submission(path, videos, 2)[0][24].tolist() == [0.3, 0.4]
    for bad in ("A 1 0.1\n", "A x 0.1 0.2\n", "A\n"):
        path.write_text(f"A 1 0.1 0.2\n{bad}")
        with pytest.raises(UserError, match=f"^{path}:2: "):
            sc.read_submission(path, videos, 2)


# ---- which frames --------------------------------------------------------------------------------

def painted(n, size=(48, 64)):
    """Frames that show their number: its sixteens above, the rest below; a ramp tells the side."""
    for k in range(n):
        x = np.full((*size, 3), 20 + 13 * (k % 16), np.uint8)
        x[:size[0] // 2] = 20 + 13 * (k // 16)
        x[22:26] = np.linspace(10, 250, size[1]).astype(np.uint8)[:, None]
        yield x


def film(path, n, fps, folder=None):
    """Write a numbered video, and a folder of its frames if `folder` is their pattern."""
    world.write_video(path, painted(n), fps, options={"qp": "1", "preset": "ultrafast"})
    if folder:
        path = path.with_suffix("")
        path.mkdir()
        from PIL import Image
        for k, x in enumerate(painted(n), 1):
            Image.fromarray(x).save(path / folder.format(k), quality=95)
    return path


def numbers_of(clip):
    """([number of each frame], flipped?) of a clip (3, T, S, S)."""
    x = clip.float().mean(0)                                  # (T, S, S)
    digits = (torch.stack([x[:, 0].mean(1), x[:, -1].mean(1)]) - 20) / 13
    assert (digits - digits.round()).abs().max() < 0.3
    flipped = x[:, 14:18, 0].mean() > x[:, 14:18, -1].mean()
    return (16 * digits[0].round() + digits[1].round()).int().tolist(), bool(flipped)


@pytest.mark.parametrize("fps", [24, 30, 25, Fraction(30000, 1001), 60, 15])
def test_files_of_charades_give_the_frames_of_ffmpegs_fps_filter(fps, tmp_path):
    path, found = film(tmp_path / "x.mp4", 90, fps), []
    with av.open(str(path)) as c:
        graph = av.filter.Graph()
        graph.link_nodes(graph.add_buffer(template=c.streams.video[0]), graph.add("fps", "24"),
                         graph.add("buffersink")).configure()
        for frame in itertools.chain(c.decode(video=0), [None]):
            graph.push(frame)
            while True:
                try:
                    found.append(graph.pull().to_ndarray(format="rgb24"))
                except (av.BlockingIOError, av.EOFError):
                    break
    ours = sc.Film(path, "", 24.0)
    assert abs(ours.length - len(found)) <= 1
    n = min(ours.length, len(found))
    want, _ = numbers_of(torch.from_numpy(np.stack(found[:n])).permute(3, 0, 1, 2))
    got, _ = numbers_of(torch.from_numpy(ours.read(np.arange(n))).permute(3, 0, 1, 2))
    assert got == want


ACTIONS = [(0, 0.5, 3.0), (2, 2.0, 4.25), (2, 5.0, 99.0), (1, 3.0, 2.0)]


def labels_by_hand(frames, n, seconds):
    return [[int(any(c == k and a < f / (n / seconds) < b for k, a, b in ACTIONS)) for f in frames]
            for c in range(3)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """{name: (path, length at 24 fps, {number at 24 fps: frame of the file})}"""
    root, found = tmp_path_factory.mktemp("films"), {}
    for name, n, fps in (("long", 205, 24), ("short", 57, 24), ("other", 255, 30)):
        length = n * 24 // fps
        found[name] = film(root / f"{name}.mp4", n, fps), length, [
            int((k + 0.5) * fps / 24) for k in range(length)]
    found["folder"] = film(root / "FRAMS.mp4", 205, 24, "FRAMS-{:06d}.jpg"), 205, range(205)
    return found


@pytest.mark.parametrize("stream", ["fine", "x3d", "two"])
@pytest.mark.parametrize("name", ["long", "short", "other", "folder"])
def test_clips_are_the_frames_and_labels_of_their_start(name, stream, films):
    path, n, shown = films[name]
    args = sc.parse_args(f"--stage finetune --tiny --crop 32 --num_frames 8 --stream {stream}"
                         .split())
    seconds = n / 24 + 0.05
    dataset = common.Samples(args, [sc.Video(name, path, seconds, ACTIONS)], partial(
        sc.make_clip, classes=3))
    starts, sides = set(), set()
    for epoch in range(12):
        sample = dataset[epoch, 0]
        got, flipped = numbers_of(sample["clip"])
        possible = [s for s in range(n) if got == [shown[k] for k in range(s, min(s + 80, n), 10)]
                    and sample["label"].tolist() == labels_by_hand(range(s, min(s + 80, n)), n,
                                                                   seconds)]
        assert possible and possible[0] <= max(9, n - 80)
        if stream == "two":
            fine, side = numbers_of(sample["fine"])
            begins = [s for s in range(possible[-1] + 1) if fine == [
                shown[k] for k in range(s, min(s + 80, n), 10)]]
            assert side == flipped
            assert any((b - a) // 10 == sample["start"] for a in begins for b in possible)
        else:
            assert sample["start"] in [s // 10 for s in possible]
        starts.add(possible[0])
        sides.add(flipped)
        assert torch.equal(sample["clip"], dataset[epoch, 0]["clip"])
    assert sides == {True, False} and len(starts) > 5


@pytest.mark.parametrize("name", ["long", "short", "other", "folder"])
def test_whole_videos_are_read_as_the_release_reads_them(name, films):
    path, n, shown = films[name]
    for stream in ("fine", "x3d", "two"):
        args = sc.parse_args(f"--stage finetune --tiny --crop 32 --num_frames 8 --stream {stream}"
                             .split())
        seconds, whole = n / 24 + 0.05, stream in ("x3d", "two")
        sample = common.Samples(args, [sc.Video(name, path, seconds, ACTIONS)], partial(
            sc.make_clip, classes=3, whole=True))[0]
        got, flipped = numbers_of(sample["clip"])
        end = n if whole else n // 10 * 10                    # without an incomplete last stride
        assert got == [shown[k] for k in range(0, end, 10)] and not flipped
        assert sample["label"].tolist() == labels_by_hand(range(end), n, seconds)
        assert (sample["video_frames"], sample["label_frames"], sample["seconds"]) == (
            n, end, seconds)
        if stream == "two":                                   # the middle 160 frames, nearly
            begin = max(0, (n - min(n, 160)) // 2 - 1)
            fine, _ = numbers_of(sample["fine"])
            assert fine == [shown[k] for k in range(begin, min(begin + 160, n), 10)]
            assert sample["start"] == -begin // 10


def test_videos_of_multithumos_keep_their_rate(tmp_path):
    path = film(tmp_path / "video_test_0000001.mp4", 131, 30, "video_test_0000001-{:06d}.jpg")
    args = sc.parse_args("--stage finetune --dataset multithumos --tiny --crop 32".split())
    make = partial(sc.make_clip, classes=3, whole=True)
    for seconds in (4.5, 0.0):                                # the files of classes have none
        video = sc.Video("x", path.with_suffix(".mp4"), seconds, ACTIONS)
        sample = common.Samples(args, [video], make)[0]
        assert numbers_of(sample["clip"])[0] == list(range(0, 130, 10))
        assert sample["label"].tolist() == labels_by_hand(range(130), 131, seconds or 131 / 30)
    with pytest.raises(UserError, match=f"^{path}: "):        # a folder has no rate
        common.Samples(args, [sc.Video("x", path, 0.0, ACTIONS)], make)[0]


def test_clips_of_kinetics_are_frames_in_a_row(tmp_path):
    args, paths = sc.parse_args("--tiny --crop 32 --num_frames 8 --stride 5".split()), []
    for name, n, fps in (("long", 120, 30), ("short", 23, 25), ("edge", 41, 25)):
        paths.append((film(tmp_path / f"{name}.mp4", n, fps, "frame_{:05d}.jpg"), n))
        paths.append((tmp_path / f"{name}.mp4", n))
    items = [(path, i + 3) for i, (path, _) in enumerate(paths)]
    clips = common.Samples(args, items, sc.make_kinetics_clip)
    crops = common.Samples(args, items, sc.make_kinetics_crops)
    for i, (_, n) in enumerate(paths):
        starts, speeds = set(), set()
        for epoch, T in itertools.product(range(8), (8, 4)):
            sample = clips[epoch, T, 32, i]
            got, _ = numbers_of(sample["clip"])
            assert sample["label"] == i + 3 and len(got) == T
            possible = [(b, m) for b in range(max(1, n - 40)) for m in range(1, 8 // T + 1)
                        if got == list(itertools.islice(itertools.cycle(
                            range(b, min(b + 40, n), 5 * m)), T))]
            assert possible
            starts.add(possible[0][0])
            speeds.add(possible[0][1])
        assert n < 100 or (len(starts) > 6 and speeds == {1, 2})
        every = list(range(0, n, 5))
        hop = max(0, (len(every) - 9) // 2)
        assert [numbers_of(c)[0] for c in crops[i]["clip"]] == [
            list(itertools.islice(itertools.cycle(every[c * hop:c * hop + 8]), 8))
            for c in range(3)]


# ---- annotations ---------------------------------------------------------------------------------

def arguments(root, dataset):
    return sc.parse_args(["--stage", "evaluate", "--init", "x", "--dataset", dataset, "--data",
                          str(root)])


OFFICIAL = {"charades": (157, 7985, 49809, 1863, 16691),      # classes; videos, actions twice
            "multithumos": (65, 200, 18482, 213, 20208)}


def write_official(root, dataset, form):
    """Annotations of the official size in one of their forms.   -> {split: {video: actions}}"""
    K, *counts = OFFICIAL[dataset]
    every, first = {"train": {}, "test": {}}, int(dataset == "multithumos")
    for split, videos, actions in (("train", *counts[:2]), ("test", *counts[2:])):
        prefix = {"train": "video_validation", "test": "video_test"}[split]
        rows = every[split] = {f"{prefix}_{n:07d}": [] for n in range(videos)}
        for k, name in zip(range(actions), itertools.cycle(rows)):
            rows[name].append((k % K, k % 7 + 0.25, k % 7 + 3.5))
        if form == "csv":
            lines = [f'{name},AB12,"He said ""no"", and left.",'
                     f'{";".join(f"c{c:03d} {s} {e}" for c, s, e in actions)},31.5'
                     for name, actions in rows.items()]
            world.text(root / f"Charades/Charades_v1_{split}.csv",
                       "id,subject,script,actions,length", *lines)
    if form == "json":
        world.text(root / f"{dataset}.json", json.dumps({
            name: {"subset": f"{split}ing", "duration": 31.5,
                   "actions": [(c + first, s, e) for c, s, e in actions]}
            for split, rows in every.items() for name, actions in rows.items()}))
    if form == "files":
        world.text(root / "class_list.txt", *(f"{c + 1} Class{c}" for c in range(K)))
        for c in range(K):
            world.text(root / f"annotations/Class{c}.txt", *(
                f"{name} {s} {e}" for rows in every.values() for name, actions in rows.items()
                for k, s, e in actions if k == c))
    return every


@pytest.mark.parametrize("dataset, form", [("charades", "csv"), ("charades", "json"),
                                           ("multithumos", "json"), ("multithumos", "files")])
def test_annotations_of_the_official_size_are_read(dataset, form, tmp_path, capsys):
    args, every = arguments(tmp_path, dataset), write_official(tmp_path, dataset, form)
    K, *counts = OFFICIAL[dataset]
    names = sc.read_class_names(args)
    assert names == [f"Class{c}" if form == "files" else str(c) for c in range(K)]
    for split, (videos, actions) in zip(every, (counts[:2], counts[2:])):
        found = sc.read_videos(args, split, names, need_files=False)
        assert {v.name: sorted(v.actions) for v in found} == {
            name: sorted(rows) for name, rows in every[split].items()}
        assert {v.seconds for v in found} == {0.0 if form == "files" else 31.5}
        assert f"{videos} videos, {actions} actions of {K} classes" in capsys.readouterr().out


def test_the_world_is_found_also_beside_a_stray_file(data, tmp_path, capsys):
    root = tmp_path / "charades"
    for part in ("Charades", "Charades_v1"):
        (root / part).mkdir(parents=True)
        for path in (data / "charades" / part).iterdir():
            (root / part / path.name).hardlink_to(path)
    (root / "TE000.mp4").hardlink_to(root / "Charades_v1/TE000.mp4")
    args = arguments(root, "charades")
    names = sc.read_class_names(args)
    assert names == ["Hold", "Take", "Throw"]
    assert all(v.path.is_file() for v in sc.read_videos(args, "test", names))
    (root / "Charades_v1/TR003.mp4").unlink()
    assert len(sc.read_videos(args, "train", names)) == world.ITEMS - 1
    assert "1 of them are missing, such as TR003" in capsys.readouterr().out
    (root / "Charades_v1/TE001.mp4").unlink()
    with pytest.raises(UserError, match="videos of the test split, 1 of them are missing"):
        sc.read_videos(args, "test", names)


def test_kinetics_is_read_from_csv_and_json(data, tmp_path):
    root = tmp_path / "kinetics400"
    (root / "validate").parent.mkdir(parents=True)
    (root / "train").symlink_to(data / "kinetics400/train")
    (root / "validate").symlink_to(data / "kinetics400/val")
    lines = (data / "kinetics400/train.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    world.text(root / "kinetics_train.json", json.dumps({
        name: {"annotations": {"label": label, "segment": [float(a), float(b)]}, "subset": "train"}
        for label, name, a, b, _ in rows}))
    ours, names = sc.read_kinetics(sc.parse_args(["--data", str(root)]), "train")
    csv, csv_names = sc.read_kinetics(sc.parse_args(["--data", str(data / "kinetics400")]), "train")
    assert names == csv_names == ["abseiling", "climbing a rope"]
    assert [(p.name, c) for p, c in ours] == [(p.name, c) for p, c in csv]
    assert [c for _, c in ours] == [k % 2 for k in range(world.ITEMS)]
    limited = sc.parse_args(["--data", str(root), "--limit", "3"])
    assert sc.read_kinetics(limited, "train")[0] == common.spread(ours, 3)
    with pytest.raises(UserError, match=f"^{root}: there must be a folder val"):
        sc.read_kinetics(limited, "val")


ENTRY = {"subset": "testing", "duration": 9.0, "actions": [[1, 0.5, 2.0]]}


@pytest.mark.parametrize("name, content, words", [
    ("Charades_v1_test.csv", "id,actions,length\nA,c001 0 x,9\n", ":2: .*'x'"),
    ("Charades_v1_test.csv", "id,actions,length\nA,c001 0 1,9\nB,c001 0,9\n", ":3: not enough"),
    ("Charades_v1_test.csv", "id,length\nA,9\n", ":2: 'actions' is missing"),
    ("Charades_v1_test.csv", "id,actions,length\nA,c157 0 1,9\n", ": A: a class is none of .* 157"),
    ("charades.json", json.dumps({"version": "x"}), ":version: string indices must be integers"),
    ("charades.json", json.dumps({"database": {}}), ":database: 'subset' is missing"),
    ("charades.json", json.dumps([ENTRY]), ":0: .*missing .* 'value'"),
    ("charades.json", json.dumps({"A": ENTRY, "B": {**ENTRY, "subset": "val"}}), ":B: the subset 'val'"),
    ("charades.json", json.dumps({"A": {**ENTRY, "actions": [[1, 2]]}}), ":A: not enough values"),
    ("charades.json", json.dumps({"A": {**ENTRY, "duration": None}}), ":A: .*NoneType"),
    ("charades.json", "{", ": .*"), ("none", "", ": .*Charades_v1_test.csv or ")])
def test_a_fault_of_annotations_is_one_line_with_its_place(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    args = arguments(tmp_path, "charades")
    with pytest.raises(UserError) as e:
        sc.read_videos(args, "test", sc.read_class_names(args), need_files=False)
    where = tmp_path / name if name != "none" else tmp_path
    assert re.match(f"{re.escape(str(where))}{words}", str(e.value)) and "\n" not in str(e.value)


# ---- arguments -----------------------------------------------------------------------------------

RUNS = "runs/ssdet_coarsefine_"
BEFORE = f"{RUNS}kinetics400_pretrain/last.pt"
FINETUNE = "--stage finetune --stream"


@pytest.mark.parametrize("flags, want", [
    ("", {"task": "detect", "batch_size": 64, "lr": 0.05, "backbone_lr": 0.1, "warmup": 8000,
          "iters": 100_000, "num_frames": 16, "stride": 5, "weight_decay": 5e-5, "bn_splits": 1,
          "crop": 224, "init": ["fair"], "multigrid": "off", "aug_prob": 0.5, "dropout": 0.5,
          "augment": ["freeze", "mixup", "cutmix"], "milestones": [], "epochs": None,
          "out": Path(f"{RUNS}kinetics400_pretrain")}),
    ("--task classify", {"batch_size": 128, "lr": 0.2, "num_frames": 8, "stride": 10,
                         "iters": 206_160, "milestones": [0.4, 0.65, 0.925], "backbone_lr": 1.0,
                         "bn_splits": 4, "multigrid": "x3d", "init": ["none"], "augment": [],
                         "out": Path(f"{RUNS}kinetics400_pretrain_classify")}),
    ("--epochs 5", {"epochs": 5, "iters": None}),
    (f"{FINETUNE} fine", {
        "dataset": "charades", "batch_size": 8, "lr": 0.01, "num_frames": 64, "stride": 10,
        "weight_decay": 1e-5, "milestones": [0.3, 0.4, 0.5], "epochs": 200, "val_every": 4,
        "bn_splits": 1, "init": [BEFORE], "warmup": 0, "data": Path("data/charades"),
        "out": Path(f"{RUNS}charades_finetune_fine")}),
    (f"{FINETUNE} coarse", {
        "batch_size": 6, "lr": 0.02, "milestones": [0.15, 0.25, 0.35], "num_frames": 64,
        "stride": 10, "feature_cap": 128, "weight_decay": 1e-5, "init": [BEFORE], "pool": "grid",
        "fusion": "mixed", "val_every": 2, "features": Path("data/charades/features")}),
    (f"{FINETUNE} two", {"batch_size": 16, "lr": 0.02, "milestones": [0.3, 0.45, 0.55],
                         "init": [f"{RUNS}charades_finetune_{s}/best.pt" for s in
                                  ("coarse", "fine")]}),
    (f"{FINETUNE} x3d", {"batch_size": 16, "lr": 0.02, "epochs": 100, "schedule": "plateau",
                         "num_frames": 16, "stride": 10, "bn_splits": 2}),
    (f"{FINETUNE} slowfast", {"batch_size": 8, "lr": 0.01, "init": ["pytorchvideo"]}),
    ("--stage finetune --dataset multithumos", {
        "stream": "fine", "feature_cap": 1024, "data": Path("data/multithumos"), "init": [BEFORE],
        "out": Path(f"{RUNS}multithumos_finetune_fine")}),
    ("--version L", {"crop": 312}), (f"{FINETUNE} fine --version S", {"crop": 160}),
    ("--stage extract", {"init": [f"{RUNS}charades_finetune_fine/best.pt"], "stream": "fine",
                         "out": Path(f"{RUNS}charades_extract")}),
    ("--stage evaluate", {"init": [f"{RUNS}charades_finetune_coarse/best.pt"], "stream": "coarse",
                          "out": Path(f"{RUNS}charades_evaluate_coarse")}),
    ("--stage evaluate --init a b", {"stream": None, "out": Path(f"{RUNS}charades_evaluate")}),
    ("--tiny", {"version": "tiny", "crop": 48, "iters": 600, "batch_size": 16, "init": ["none"]}),
    (f"{FINETUNE} coarse --tiny --lr 1", {"lr": 1.0, "num_frames": 24, "epochs": 40})])
def test_defaults_are_those_of_the_published_recipes(flags, want):
    args = sc.parse_args(flags.split())
    assert {k: getattr(args, k) for k in want} == want


@pytest.mark.parametrize("flags, words", [
    ("--dataset charades", "--stage pretrain goes with"),
    ("--stage evaluate --dataset kinetics400", "the other stages do not"),
    (f"{FINETUNE} fine --fusion none", "--pool and --fusion"),
    (f"{FINETUNE} two --fusion none", "--stream two needs --fusion"),
    (f"{FINETUNE} fine --init a b", "--init has more files"), ("--bn_splits 3", "multiple of 3"),
    *((f"--{name} 0", f"--{name} must be at least 1") for name in (
        "num_frames", "stride", "crop", "iters")), ("--bn_splits -1", "must be at least 0"),
    ("--stage evaluate --dataset multithumos --submission x", "--submission goes with")])
def test_flags_that_contradict_each_other_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as e:
        sc.parse_args(flags.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1
