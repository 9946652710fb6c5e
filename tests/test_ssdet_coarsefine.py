"""SSDet and Coarse-Fine, part by part, against slow versions of the equations and official code."""

import contextlib
import itertools
import json
import math
import re
from functools import partial

import av
import numpy as np
import pytest
import running
import torch
import torch.nn.functional as F
import world
from PIL import Image
from torch import nn

import common
import ssdet_coarsefine as sc
from common import SplitBatchNorm, UserError

close = partial(torch.testing.assert_close, rtol=0)
FINETUNE = "--stage finetune --stream"


# ---- volume augmentations ------------------------------------------------------------------------

def test_clips_are_faded_or_cut_in_the_frames_that_they_share():
    """Frames 3, 4, 5 of 9, after the earlier window has moved to 0 and the later one to the end."""
    start = torch.tensor([[1, 3, 0, 3], [3, 1, 3, 0]])
    length = torch.tensor([[6, 5, 8, 3], [5, 6, 3, 8]])
    own = torch.tensor([[1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0],              # it ends earlier
                        [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1],              # later
                        [1, 1, 1, 0.25, 0.25, 0.75, 1, 1, 1],             # around its partner
                        [0, 0, 0, 0.75, 0.75, 0.25, 0, 0, 0]])            # inside
    x, label, partner = torch.rand(4, 3, 9, 2, 32), torch.randint(1, 9, (4, 9)), [2, 3, 1, 0]
    draws = start.clone(), length.clone(), torch.tensor(partner)
    faded, cut = (f(sc.unmixed(x, label), *draws) for f in (
        sc.volume_mixup, sc.volume_cutmix_growing))
    assert torch.equal(draws[0], start) and torch.equal(draws[1], length)
    for got in (faded, cut):                                  # visible area = weight of the fade
        close(got.weight, torch.stack([own, 1 - own]), atol=1e-6)
        assert torch.equal(got.label, torch.stack([label, label[partner]]))
        assert torch.equal(got.present, (got.weight > 1e-6).float())
    w = own[:, None, :, None, None]
    close(faded.x, x * w + x[partner] * (1 - w), atol=1e-6)
    for t, left, right in ((3, 22, 26), (5, 6, 10)):          # 3/4 and 1/4 of 32 columns, +- 2
        assert torch.equal(cut.x[0, :, t, :, :left], x[0, :, t, :, :left])
        assert torch.equal(cut.x[0, :, t, :, right:], x[2, :, t, :, right:])


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


def test_switches_are_of_all_processes_and_choices_of_each(monkeypatch):
    """To NumPy the seeds (a, b) and (a, b, 0) are one: rank 0 must not draw with its switches'."""
    args, lengths = sc.parse_args("--aug_prob 0.3 --augment freeze cutmix".split()), ([], [])
    for step in range(1000):
        found = []
        for rank in (0, 1):
            monkeypatch.setattr(common, "rank", lambda r=rank: r)
            found.append(sc.draw_augmentations(args, step, 16, 2, "cpu"))
            if "freeze" in found[rank]:
                lengths[rank].append(int(found[rank]["freeze"]["length"][1]))
        assert found[0].keys() == found[1].keys() <= {"freeze", "cutmix"}
    assert abs(len(lengths[0]) - 300) <= 4 * (1000 * 0.3 * 0.7) ** 0.5 and lengths[0] != lengths[1]
    assert min(drawn.count(n) for drawn in lengths for n in range(1, 8)) > 20     # about 43 each


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
    for m, b, t in itertools.product(range(M), range(B), range(T)):
        z, y, weight = logits[b, :, t].tolist(), int(mix.label[m, b, t]), float(mix.weight[m, b, t])
        ce = math.log(sum(map(math.exp, z))) - z[y]
        want += weight * ce / float(mix.present[m].sum())
        right += weight * (z.index(max(z)) == y)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert accuracy.item() == pytest.approx(right / (B * T), rel=1e-5)
    gone = mix._replace(weight=0 * mix.weight, present=0 * mix.present)
    assert sc.pretraining_loss(logits, gone)[0] == 0          # a mixture that is nowhere: no 0/0
    one = sc.pretraining_loss(logits[..., :1], sc.unmixed(mix.x, mix.label[0, :, :1]))
    close(one[0], F.cross_entropy(logits[..., 0], mix.label[0, :, 0]), atol=1e-6)     # classify


def ragged(B, K, N, seed):
    g = torch.Generator().manual_seed(seed)
    logits, mask = 2 * torch.randn(B, K, N, generator=g), torch.ones(B, N)
    for b in range(1, B):
        mask[b, int(torch.randint(1, N, (), generator=g)):] = 0
    return logits, (torch.rand(B, K, N, generator=g) < 0.3).float() * mask[:, None], mask


@pytest.mark.parametrize("B, K, N", [(1, 3, 6), (3, 4, 9), (4, 2, 5)])
def test_the_detection_loss_is_that_of_the_loop(B, K, N):
    def bce(p, y):
        return -math.log(p if y else 1 - p)
    x, label, mask = ragged(B, K, N, N)
    rows = [[(1 / (1 + math.exp(-x[b, k, t])), label[b, k, t]) for t in range(N) if mask[b, t]]
            for b in range(B) for k in range(K)]
    got = sc.detection_loss(x.requires_grad_(), label, mask)
    cls = sum(bce(*map(max, zip(*row))) for row in rows) / (B * K)
    loc = sum(bce(p, y) for row in rows for p, y in row) / sum(map(len, rows))
    assert [v.item() for v in got] == pytest.approx([(cls + loc) / 2, cls, loc], rel=1e-5)
    got[0].backward()
    assert torch.equal(x.grad.abs().amax(1) > 0, mask > 0)    # padding has no gradient


def gradients_of(rank, net=None):
    """Of both losses of a process's half of a batch, for weights that change the logits."""
    torch.manual_seed(0)
    net = net or nn.parallel.DistributedDataParallel(nn.Conv1d(4, 4, 1))
    at, found = slice(3 * rank, 3 * rank + 3), []
    (z, mix), (video, label, mask) = some_mixture(6, 5, 4, 2, 0), ragged(6, 4, 7, 1)
    mix = sc.Mixture(mix.x[at], *(v[:, at] for v in mix[1:]))
    for loss in (lambda: sc.pretraining_loss(net(z[at]), mix)[0],
                 lambda: sc.detection_loss(net(video[at]), label[at], mask[at])[0]):
        net.zero_grad()
        loss().backward()
        found.append(next(net.parameters()).grad.clone())
    return torch.stack(found)


def test_two_processes_average_the_losses_of_their_halves(tmp_path):
    torch.manual_seed(0)
    net = nn.Conv1d(4, 4, 1)
    want = (gradients_of(0, net) + gradients_of(1, net)) / 2
    for found in running.processes(gradients_of, 2, tmp_path):
        close(found, want, atol=1e-6)


# ---- batch norm and weights ----------------------------------------------------------------------

def shake(model, seed=0):
    """Statistics, scales and shifts as after a training."""
    torch.manual_seed(seed)
    for v in model.state_dict().values():
        if v.dim() == 1:
            v.uniform_(0.3, 1)
    common.merge_splits(model)
    return model


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_a_split_norm_is_a_norm_of_each_part(memory):
    """Sample i is in part i mod 3. The order of memory stays."""
    norm, x = SplitBatchNorm(5, 3), torch.randn(6, 5, 4, 3, 2).contiguous(memory_format=memory)
    y = norm(x)
    assert y.is_contiguous(memory_format=memory)
    for k in range(3):
        plain = nn.BatchNorm3d(5, affine=False)
        close(y[k::3], plain(x[k::3]), atol=1e-6)
        close(norm.split_bn.running_var.view(3, 5)[k], plain.running_var, atol=1e-6)


@pytest.mark.parametrize("stride, frames", [(1, 3), (2, 3), (2, 1)])
def test_gradients_of_a_depthwise_convolution(stride, frames):
    x = torch.randn(2, 3, frames, 5, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(common.Depthwise.apply, (x, weight, stride))


def test_a_split_norm_takes_the_number_of_parts_of_its_checkpoint():
    norm = SplitBatchNorm(5, 2)
    norm.load_state_dict(SplitBatchNorm(5, 3).state_dict())
    assert norm.splits == 3


def pytorchvideo_name(name):
    """A name of SlowFast in pytorchvideo's zoo."""
    name = re.sub(r"^s(\d)", lambda m: f"blocks.{int(m[1]) - 1}", name)
    for ours, theirs in {
            r"pathway(\d)_stem\.conv": r"multipathway_blocks.\1.conv",
            r"pathway(\d)_stem\.bn": r"multipathway_blocks.\1.norm",
            r"pathway(\d)_res(\d+)": r"multipathway_blocks.\1.res_blocks.\2",
            r"_fuse\.conv_f2s": ".multipathway_fusion.conv_fast_to_slow",
            r"_fuse\.bn": ".multipathway_fusion.norm", r"branch1\.": "branch1_conv.",
            "branch1_bn": "branch1_norm", r"branch2\.([abc])_bn": r"branch2.norm_\1",
            r"branch2\.([abc])\.": r"branch2.conv_\1.", "head.projection": "blocks.6.proj"}.items():
        name = re.sub(ours, theirs, name)
    return name


def network(kind, norm, classes=5):
    torch.manual_seed(3)
    if kind == "slowfast":
        return common.SlowFast(classes, True, 16, (2, 1, 1, 1), norm=norm, dropout=0.0)
    return (sc.Coarse if kind == "coarse" else common.X3D)("tiny", classes, norm=norm, dropout=0.0)


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
    if layout == "pytorchvideo":
        state = {pytorchvideo_name(k): v for k, v in state.items()}
    torch.save({"flat": state, "released": {"model_state_dict": state, "optimizer_state_dict": {}},
                "two": {"model_l_state_dict": {f"module.{k}": v for k, v in state.items()},
                        "model_g_state_dict": {"module.conv1_s.weight": torch.zeros(1)}},
                "zoo": {"epoch": 3, "model_state": state, "cfg": ""},
                "pytorchvideo": {"model_state": state}}[layout], tmp_path / "w.pyth")
    sc.load_network(got, tmp_path / "w.pyth", strict=True)
    inputs = [torch.randn(2, 3, 8, 32, 32)]
    if kind == "coarse":
        inputs += [{k: torch.rand(2, c, 9, 7, 7) for k, c in zip(sc.LEVELS, net.widths)},
                   torch.ones(2, 9), torch.tensor([0, 1])]
    with torch.no_grad():
        want = net.eval()(*inputs)
        close(got.eval()(*inputs), want, atol=2e-6 * want.abs().max().item())


def test_backbones_must_be_complete_and_in_evaluation_all_layers(tmp_path):
    path, other = tmp_path / "x3d.pt", shake(network("x3d", SplitBatchNorm, 9), 1).state_dict()
    torch.save(other, path)
    coarse, x3d = network("coarse", SplitBatchNorm), network("x3d", SplitBatchNorm)
    before = {k: v.clone() for k, v in coarse.state_dict().items()}
    sc.load_network(coarse, path)                             # its own layers and classifiers stay
    for k, v in coarse.state_dict().items():
        assert torch.equal(v, before[k] if k.startswith((*sc.HEADS, *sc.FUSION)) else other[k]), k
    for model in (coarse, x3d):                               # as evaluation loads: no X3D either
        with pytest.raises(UserError, match=f"{path}: .* tensors are missing"):
            sc.load_network(model, path, strict=True)
    torch.save({k: v for k, v in other.items() if k != "layer3.0.conv2.weight"}, path)
    with pytest.raises(UserError, match="layer3.0.conv2.weight"):
        sc.load_network(x3d, path)


def test_evaluation_takes_the_flags_of_a_checkpoint_unless_they_contradict(tmp_path):
    path, args = tmp_path / "w.pt", sc.parse_args("--stage evaluate --init x".split())
    own = {"stage": "finetune", "stream": "fine", "version": "S"}
    torch.save({"model": {}, "args": own}, path)
    found = sc.with_flags_of(args, path)
    assert (found.stream, found.version, args.stream) == ("fine", "S", None)
    for stream, saved, words in (
            ("coarse", {"args": own}, "was trained with --stream fine, not coarse"),
            (None, {"args": {"stage": "pretrain"}}, "trained by --stage pretrain"),
            (None, {}, "--stream must name its network")):
        args.stream = stream
        torch.save({"model": {}, **saved}, path)
        with pytest.raises(UserError, match=f"^{path}: .*{words}"):
            sc.with_flags_of(args, path)


# ---- Coarse-Fine and schedules -------------------------------------------------------------------

def test_fine_features_are_4_steps_apart_and_mixed_as_if_maps_were_resized_first():
    G = sc.gaussian(torch.tensor([0, 2]), torch.tensor([9, 6]), 9, L=2)
    assert G.argmax(1).tolist() == [[0, 4], [2, 6]]           # without Grid Pool
    mixing, maps = sc.Mixing(10, 4), torch.randn(2, 2, 5, 2, 7, 7)
    both = [torch.cat([*x], 1) for x in (maps, maps.flip(0))]
    for size in (14, 10):                                     # repeated, or the largest of parts
        want = [F.adaptive_max_pool3d(x, (2, size, size)).flatten(2) for x in both]
        bias, scale = mixing([*maps], [*maps.flip(0)], size)
        close(bias.flatten(2), mixing.conv_at(want[0]), atol=1e-5)
        close(scale.flatten(2), mixing.conv_at2(want[1]).sigmoid(), atol=1e-5)


def test_the_coarse_stream_also_pools_by_the_maximum_and_goes_without_fusion():
    with torch.no_grad():
        z = sc.Coarse("tiny", 4, "max", "none").eval()(torch.randn(1, 3, 8, 64, 64))
    assert z.shape == (1, 4, 2)


def plan_of(multigrid, steps):
    return sc.step_shapes(sc.parse_args(
        f"--task classify --multigrid {multigrid} --iters {steps}".split()), n=40_000)


def test_a_plan_of_three_long_cycles_is_that_of_the_table():
    plan, states = plan_of("x3d", 2000), []
    for a, b in itertools.pairwise((0, 800, 1300, 1700)):
        states += [4 * k // (b - a) for k in range(b - a)]
    table = {0: (8, 2, (111, 158)), 1: (4, 4, (111, 158)), 2: (2, 4, (112, 158, 224)),
             3: (1, 8, (112, 158, 224))}                      # batch factor, frames, crops
    for k, (shape, state) in enumerate(zip(plan, states + [3] * 300, strict=True)):
        scale, frames, crops = table[state]
        place = k % len(crops)
        factor = 2 ** (len(crops) - 1 - place)
        assert shape == (128 * scale * factor, frames, crops[place], scale, 4 * scale)
    assert set(plan_of("off", 2000)) == {(128, 8, 224, 1.0, 4)}


def test_a_plan_of_the_authors_schedule_trains_1_5_times_the_epochs_in_fewer_steps():
    plan = plan_of("fair", 20_000)
    assert sum(s.batch for s in plan) == pytest.approx(1.5 * 20_000 * 128, rel=0.05)
    assert len(plan) < 20_000 and all(s.batch % s.splits == 0 for s in plan)
    assert {s.crop for s in plan[-3:]} == {112, 158, 224} and plan[-1].frames == 8
    base = [round(math.log10(s.lr / (s.splits / 4)), 6) for s in plan]    # without the long batch
    assert base == sorted(base, reverse=True) and set(base) == {0, -1, -2, -3}


def test_rates_fall_at_milestones_or_on_a_plateau():
    args = sc.parse_args("--stage finetune --lr 1".split())
    assert [round(sc.learning_rate(args, k, 10), 6) for k in (0, 2, 3, 4, 5, 9)] == [
        1, 1, 0.1, 0.01, 0.001, 0.001]                        # x0.1 at 30, 40 and 50 %
    args.schedule, args.milestones = "plateau", []
    assert sc.learning_rate(args, 5, 10, [1.0] * 12) == pytest.approx(0.1)


@pytest.mark.parametrize("losses", [
    np.random.default_rng(1).normal(1, 0.1, 90).round(2) - np.arange(90) / 400,
    1 - np.arange(90) * 1e-6], ids=["noise and ties", "gains too small to count"])
def test_the_plateau_rule_is_that_of_torch(losses):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e200)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=10)
    for k, loss in enumerate(losses.tolist(), 1):
        rule.step(loss)
        count = round(200 - math.log10(optimizer.param_groups[0]["lr"]))
        assert sc.plateau_drops(losses[:k].tolist()) == count
    assert count > 0


@pytest.mark.parametrize("flags, scales", [
    ("", {"fc1": 1, "fc2": 1, "layer1": 0.1}), ("--tiny", {"fc1": 1, "layer1": 1}),
    ("--stage finetune --stream coarse", {"rw2": 10, "mix5": 10, "fc2": 1, "pool_1": 1})])
def test_each_group_of_parameters_has_its_rate(flags, scales):
    args = sc.parse_args(flags.split())
    with torch.device("meta"):
        model = sc.make_model(args, 5)
    names = {id(p): name.split(".")[0] for name, p in model.named_parameters()}
    groups = sc.make_optimizer(args, model).param_groups
    assert scales.items() <= {names[id(p)]: g["scale"] for g in groups for p in g["params"]}.items()
    assert sum(len(g["params"]) for g in groups) == len(names)


# ---- metrics -------------------------------------------------------------------------------------

def test_the_official_metric_leaves_out_classes_without_positives():
    rng, want = np.random.default_rng(0), []
    labels, scores = rng.integers(0, 5, (4, 25, 9), np.uint8) // 4, rng.random((4, 25, 9)).round(1)
    labels[:, :, 5], scores[rng.random((4, 25)) < 0.2] = 0, -np.inf
    scores[2] = -np.inf                                       # a video that was not submitted
    for y, s in zip(labels.reshape(100, 9).T, scores.reshape(100, 9).T):
        hits = total = 0
        for n, i in enumerate(sorted(range(100), key=lambda i: -s[i]), 1):    # ties keep order
            hits += int(y[i])
            total += hits / n if y[i] else 0
        want.append(total / hits if hits else math.nan)
    ap, mean, weighted = sc.charades_localize([*labels], [*scores])
    assert ap.tolist() == pytest.approx(want, abs=1e-12, nan_ok=True)
    assert mean == pytest.approx(np.nanmean(want), abs=1e-12)
    assert weighted == pytest.approx(np.nansum(want * labels.sum((0, 1))) / labels.sum(), abs=1e-12)


def test_the_25_frames_are_the_nearest_and_actions_include_their_ends():
    rng = np.random.default_rng(0)
    for seconds, fps in ((25.0, 24.0), *zip(rng.uniform(0.04, 90, 20), rng.uniform(7, 30, 20))):
        n = max(1, round(seconds * fps))
        for j, frame in enumerate(sc.charades_frames(n, seconds, fps)):
            far = np.abs(np.arange(n) / fps - j / 25 * seconds)
            assert far[frame] <= far.min() + 1e-9
    labels = sc.localization_labels([(0, 4.0, 8.0), (2, 8.0, 8.0), (1, 7.5, 7.9)], 25.0, 3)
    assert np.argwhere(labels.T).tolist() == [*([0, j] for j in range(4, 9)), [2, 8]]


def test_an_ensemble_is_the_mean_of_all_networks_and_chunks_keep_their_place(monkeypatch):
    starts, batch = [], sc.collate([{
        "clip": torch.zeros(3, 9, 4, 4), "fine": torch.zeros(3, 5, 4, 4), "start": -2,
        "label": torch.zeros(2, 90), "video_frames": 90, "label_frames": 90, "seconds": 3.0}])

    def model(x, fine, valid, start, k=1):
        starts.append(int(start))
        return k * torch.ones(1, 2, x.shape[2])
    monkeypatch.setattr(sc, "chunks", lambda T: [(0, 4), (4, T)])
    monkeypatch.setattr(common, "predict", lambda a, d, s, network, *_, **__: network(batch))
    got = sc.detect(sc.parse_args(f"{FINETUNE} two".split()), "cpu", [model, partial(model, k=3)],
                    [], ["a", "b"], "")
    assert (got["logits"] == 2).all() and starts == [-2, -2, 2, 2]


def test_three_clips_vote_and_background_is_no_answer(monkeypatch):
    z = torch.tensor([[9.0, 2, 1], [9, 0, 4], [9, 0, 4]])[..., None].expand(-1, -1, 2)
    batch = {"clip": torch.zeros(1, 3, 3, 2, 4, 4), "label": torch.tensor([1])}
    monkeypatch.setattr(common, "predict", lambda a, d, s, network, *_, **__: network(batch))
    found = sc.evaluate_kinetics(sc.parse_args(["--tiny"]), "cpu", lambda x: z, [])
    assert found == {"val_top1": 100, "val_frames": pytest.approx(200 / 3)}


def test_features_of_another_form_or_network_are_named(tmp_path):
    args, x = sc.parse_args(f"{FINETUNE} coarse --features {tmp_path}".split()), torch.zeros(1, 12)
    for level in sc.LEVELS:
        world.text(tmp_path / level / "a", "")
        torch.save(x.view(1, 12, 1, 1, 1), tmp_path / level / "a")
    assert sc.read_features(args, "a")["conv5"].shape == (12, 1, 1, 1)
    for wrong in (x.view(2, 6, 1, 1, 1), x.view(12, 1, 1, 1), {"a": x}, None):
        torch.save(wrong, tmp_path / "layer3/a")
        with pytest.raises(UserError, match=f"^{tmp_path}/layer3/a: "):
            sc.read_features(args, "a")
    world.text(tmp_path / "about.json", '{"stride": 10, "version": "tiny"}')
    with pytest.raises(UserError, match="about.json: these features are of --version tiny"):
        sc.check_features(args)


def test_a_submission_lacks_rows_and_has_some_twice(tmp_path, capsys):
    path, videos = tmp_path / "s.txt", [sc.Video(name, None, 5.0, []) for name in "AB"]
    path.write_text("A 1 0.1 0.2\nA 25 0.3 0.4\nX 1 9 9\nA 1 0.5 0.6\n")
    a, b = sc.read_submission(path, videos, 2)
    assert a[0].tolist() == [0.5, 0.6] and a[24].tolist() == [0.3, 0.4]
    assert np.isinf(a[1:24]).all() and np.isinf(b).all() and "48 of 50" in capsys.readouterr().out
    path.write_text("A 0 0.1 0.2\nA 24 0.3 0.4\n")            # frames from 0
    assert sc.read_submission(path, videos, 2)[0][24].tolist() == [0.3, 0.4]
    path.write_text("A 1 0.1 0.2\nA 1 0.1\n")
    with pytest.raises(UserError, match=f"^{path}:2: "):
        sc.read_submission(path, videos, 2)


# ---- which frames --------------------------------------------------------------------------------

def film(path, n, fps, folder=None):
    """Write a video of numbered frames, and a folder of them if `folder` is its pattern."""
    frames = np.zeros((n, 48, 64, 3), np.uint8)               # sixteens above, a ramp, ones below
    for k, x in enumerate(frames):
        x[:24], x[24:] = 20 + 13 * (k // 16), 20 + 13 * (k % 16)
        x[22:26] = np.linspace(10, 250, 64).astype(np.uint8)[:, None]
    world.write_video(path, frames, fps, options={"qp": "1", "preset": "ultrafast"})
    if folder:
        path = path.with_suffix("")
        path.mkdir()
        for k, x in enumerate(frames, 1):
            Image.fromarray(x).save(path / folder.format(k), quality=95)
    return path


def numbers_of(clip):
    """([number of each frame], flipped?) of a clip (3, T, S, S)."""
    x = torch.as_tensor(clip).float().mean(0)                 # (T, S, S)
    digits = (torch.stack([x[:, 0].mean(1), x[:, -1].mean(1)]) - 20) / 13
    assert (digits - digits.round()).abs().max() < 0.3
    flipped = x[:, 14:18, 0].mean() > x[:, 14:18, -1].mean()
    return (16 * digits[0].round() + digits[1].round()).int().tolist(), bool(flipped)


@pytest.mark.parametrize("fps", [24, 30, 25, "30000/1001", 60, 15])
def test_files_of_charades_give_the_frames_of_ffmpegs_fps_filter(fps, tmp_path):
    path, found = film(tmp_path / "x.mp4", 90, fps), []
    with av.open(str(path)) as c:
        graph = av.filter.Graph()
        graph.link_nodes(graph.add_buffer(template=c.streams.video[0]), graph.add("fps", "24"),
                         graph.add("buffersink")).configure()
        for frame in itertools.chain(c.decode(video=0), [None]):
            graph.push(frame)
            with contextlib.suppress(av.BlockingIOError, av.EOFError):
                while True:
                    found.append(graph.pull().to_ndarray(format="rgb24"))
    ours = sc.Film(path, "", 24.0)
    n = min(ours.length, len(found))
    assert max(ours.length, len(found)) <= n + 1
    got, want = ours.read(np.arange(n)), np.stack(found[:n])
    assert numbers_of(got.transpose(3, 0, 1, 2)) == numbers_of(want.transpose(3, 0, 1, 2))


ACTIONS = [(0, 0.5, 3.0), (2, 2.0, 4.25), (2, 5.0, 99.0), (1, 3.0, 2.0)]


def labels_by_hand(frames, n, seconds):
    return [[int(any(c == k and a < f / (n / seconds) < b for k, a, b in ACTIONS)) for f in frames]
            for c in range(3)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """{name: (path, numbers of the frames at 24 fps)}"""
    root, found = tmp_path_factory.mktemp("films"), {}
    for name, n, fps in (("long", 205, 24), ("short", 57, 24), ("other", 255, 30)):
        found[name] = film(root / f"{name}.mp4", n, fps), [
            int((k + 0.5) * fps / 24) for k in range(n * 24 // fps)]
    found["folder"] = film(root / "FRAMS.mp4", 205, 24, "FRAMS-{:06d}.jpg"), [*range(205)]
    return found


@pytest.mark.parametrize("stream", ["fine", "x3d", "two"])
@pytest.mark.parametrize("name", ["long", "short", "other", "folder"])
def test_clips_and_whole_videos_have_their_frames_and_labels(name, stream, films):
    path, shown = films[name]
    n, seconds, drawn = len(shown), len(shown) / 24 + 0.05, set()
    latest = max(0, n - 82) if stream == "x3d" else max(9, n - 80)         # as released
    args = sc.parse_args(f"{FINETUNE} {stream} --tiny --crop 32 --num_frames 8".split())
    clips, wholes = (common.Samples(args, [sc.Video(name, path, seconds, ACTIONS)], partial(
        sc.make_clip, classes=3, whole=whole)) for whole in (False, True))
    for epoch in range(12):
        sample = clips[epoch, 0]
        got, flipped = numbers_of(sample["clip"])
        possible = [s for s in range(n) if got == shown[s:s + 80:10] and sample["label"].tolist()
                    == labels_by_hand(range(s, min(s + 80, n)), n, seconds)]
        assert possible and possible[0] <= latest
        offsets = [s // 10 for s in possible]
        if stream == "two":
            fine, side = numbers_of(sample["fine"])
            assert side == flipped                            # the same crop for both streams
            offsets = [(b - a) // 10 for b in possible for a in range(b + 1)
                       if fine == shown[a:a + 80:10]]
        assert sample["start"] in offsets
        drawn.add((possible[0], flipped))
    assert {side for _, side in drawn} == {True, False}
    assert len({s for s, _ in drawn}) > min(5, latest)

    whole, end = wholes[0], n // 10 * 10 if stream == "fine" else n       # fine: in whole strides
    assert numbers_of(whole["clip"]) == (shown[:end:10], False)
    assert whole["label"].tolist() == labels_by_hand(range(end), n, seconds)
    assert [whole[k] for k in ("video_frames", "label_frames", "seconds")] == [n, end, seconds]
    if stream == "two":                                       # the middle 160 frames, nearly
        begin = max(0, (n - min(n, 160)) // 2 - 1)
        assert numbers_of(whole["fine"])[0] == shown[begin:begin + 160:10]
        assert whole["start"] == -begin // 10


def test_videos_of_multithumos_keep_their_rate(tmp_path):
    path = film(tmp_path / "video_test_0000001.mp4", 131, 30, "video_test_0000001-{:06d}.jpg")
    args = sc.parse_args("--stage finetune --dataset multithumos --tiny --crop 32".split())
    videos = [sc.Video("x", p, 0.0, ACTIONS) for p in (path.with_suffix(".mp4"), path)]
    samples = common.Samples(args, videos, partial(sc.make_clip, classes=3, whole=True))
    assert numbers_of(samples[0]["clip"])[0] == list(range(0, 130, 10))
    assert samples[0]["label"].tolist() == labels_by_hand(range(130), 131, 131 / 30)
    with pytest.raises(UserError, match=f"^{path}: "):        # a folder has no rate
        samples[1]


@pytest.mark.parametrize("n, fps, hop", [(120, 30, 7), (23, 25, 0), (41, 25, 0)])
def test_clips_of_kinetics_are_frames_in_a_row(n, fps, hop, tmp_path):
    args = sc.parse_args("--tiny --crop 32 --num_frames 8 --stride 5".split())
    folder = film(tmp_path / "x.mp4", n, fps, "frame_{:05d}.jpg")
    for path in (folder, folder.with_suffix(".mp4")):
        clips, crops = (common.Samples(args, [(path, 3)], make) for make in (
            sc.make_kinetics_clip, sc.make_kinetics_crops))
        drawn = set()
        for epoch, T in itertools.product(range(8), (8, 4)):
            got, _ = numbers_of(clips[epoch, T, 32, 0]["clip"])
            drawn.add(next((b, speed) for b in range(max(1, n - 40)) for speed in (1, 8 // T)
                           if got == np.resize(range(b, min(b + 40, n), 5 * speed), T).tolist()))
        assert clips[0, 8, 32, 0]["label"] == crops[0]["label"] == 3
        assert n < 100 or (len({b for b, _ in drawn}) > 6 and {m for _, m in drawn} == {1, 2})
        assert [numbers_of(c)[0] for c in crops[0]["clip"]] == [
            np.resize(range(0, n, 5)[c * hop:c * hop + 8], 8).tolist() for c in range(3)]


# ---- annotations ---------------------------------------------------------------------------------

EVALUATE = "--stage evaluate --init x --dataset {} --data {}"
OFFICIAL = {"charades": (157, {"train": (7985, 49809), "test": (1863, 16691)}),
            "multithumos": (65, {"train": (200, 18482), "test": (213, 20208)})}


@pytest.mark.parametrize("dataset, form", [("charades", "csv"), ("charades", "json"),
                                           ("multithumos", "json"), ("multithumos", "files")])
def test_annotations_of_the_official_size_are_read(dataset, form, tmp_path, capsys):
    args = sc.parse_args(EVALUATE.format(dataset, tmp_path).split())
    (K, sizes), every, entries, lines = OFFICIAL[dataset], {}, {}, {}
    for split, (videos, actions) in sizes.items():
        prefix = {"train": "video_validation", "test": "video_test"}[split]
        rows = every[split] = {f"{prefix}_{n:07d}": [] for n in range(videos)}
        for k, name in zip(range(actions), itertools.cycle(rows)):
            rows[name].append((k % K, k % 7 + 0.25, k % 7 + 3.5))
            lines.setdefault(k % K, []).append(f"{name} {k % 7 + 0.25} {k % 7 + 3.5}")
        entries |= {name: {"subset": f"{split}ing", "duration": 31.5, "actions": [
            (c + (dataset == "multithumos"), s, e) for c, s, e in rows[name]]} for name in rows}
        if form == "csv":
            world.text(tmp_path / f"Charades_v1_{split}.csv", "id,script,actions,length", *(
                f'{name},"He said ""no"", and left.",'
                f'{";".join(f"c{c:03d} {s} {e}" for c, s, e in rows[name])},31.5' for name in rows))
    if form == "json":
        world.text(tmp_path / f"{dataset}.json", json.dumps(entries))
    if form == "files":
        world.text(tmp_path / "class_list.txt", *(f"{c + 1} Class{c}" for c in range(K)))
        for c in lines:
            world.text(tmp_path / f"annotations/Class{c}.txt", *lines[c])
    names = sc.read_class_names(args)
    assert names == [f"Class{c}" if form == "files" else str(c) for c in range(K)]
    for split, (videos, actions) in sizes.items():
        found = sc.read_videos(args, split, names, need_files=False)
        assert {v.name: sorted(v.actions) for v in found} == {
            name: sorted(rows) for name, rows in every[split].items()}
        assert {v.seconds for v in found} == {0.0 if form == "files" else 31.5}
        assert f"{videos} videos, {actions} actions of {K} classes" in capsys.readouterr().out


def test_a_stray_file_hides_no_video_and_missing_ones_are_left_out_in_training(tmp_path, capsys):
    for split in ("train", "test"):
        world.text(tmp_path / f"Charades/Charades_v1_{split}.csv", "id,actions,length",
                   *(f"{split}{k},,9" for k in (0, 1, 2, 0)))             # one is there twice
        for k in range(3):
            world.text(tmp_path / f"Charades_v1/{split}{k}.mp4", "")
    world.text(tmp_path / "test0.mp4", "")                    # the stray file
    world.text(tmp_path / "Charades_v1_features_rgb/test0/test0-000001.txt", "")
    args, names = sc.parse_args(EVALUATE.format("charades", tmp_path).split()), ["Hold"]
    assert [v.path.is_file() for v in sc.read_videos(args, "test", names)] == [True] * 3
    (tmp_path / "Charades_v1/train2.mp4").unlink()
    assert [v.name for v in sc.read_videos(args, "train", names)] == ["train0", "train1"]
    assert "1 of them are missing, such as train2" in capsys.readouterr().out
    (tmp_path / "Charades_v1/test1.mp4").unlink()
    with pytest.raises(UserError, match="videos of the test split, 1 of them are missing"):
        sc.read_videos(args, "test", names)


@pytest.mark.parametrize("folder", ["climbing_a_rope", "climbing a rope"])
def test_clips_of_kinetics_are_found_by_a_json(folder, tmp_path):
    files = [tmp_path / f"train/{name}.mp4" for name in (
        "abseiling/--a_000000_000010", f"{folder}/--b_000007_000017")]
    for path in files:
        world.text(path, "")
    world.text(tmp_path / "kinetics_train.json", json.dumps({
        "--a": {"annotations": {"label": "abseiling", "segment": [0.0, 10.0]}},
        "--b": {"annotations": {"label": "climbing a rope", "segment": [7.0, 17.0]}}}))
    args = sc.parse_args(["--data", str(tmp_path)])
    assert sc.read_kinetics(args, "train") == (
        [(files[0], 0), (files[1], 1)], ["abseiling", "climbing a rope"])
    with pytest.raises(UserError, match=f"^{tmp_path}: there must be a folder val"):
        sc.read_kinetics(args, "val")


ENTRY = {"subset": "testing", "duration": 9.0, "actions": [[1, 0.5, 2.0]]}


@pytest.mark.parametrize("content, words", [
    ({"version": "x", "database": {}}, ":version: expected is "), ([ENTRY], ":0: expected is "),
    ({"A": ENTRY, "B": {**ENTRY, "subset": "val"}}, ":B: expected is "),
    *(({"A": {**ENTRY, **bad}}, ": A: no duration, or a class is none of the 157")
      for bad in ({"duration": math.nan}, {"duration": -1}, {"actions": [[157, 1, 2]]}))])
def test_a_json_of_another_form_is_one_line_with_its_place(content, words, tmp_path):
    world.text(tmp_path / "charades.json", json.dumps(content))
    args = sc.parse_args(EVALUATE.format("charades", tmp_path).split())
    with pytest.raises(UserError, match=f"^{tmp_path}/charades.json{words}"):
        sc.read_videos(args, "test", sc.read_class_names(args), need_files=False)


# ---- arguments -----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, want", [
    ("", "task=detect batch_size=64 lr=0.05 backbone_lr=0.1 warmup=8000 iters=100000 num_frames=16 "
     "stride=5 weight_decay=5e-05 bn_splits=1 crop=224 init=fair multigrid=off aug_prob=0.5 "
     "milestones= augment=freeze,mixup,cutmix out=RUNS_kinetics400_pretrain"),
    ("--task classify", "batch_size=128 lr=0.2 backbone_lr=1.0 iters=206160 num_frames=8 stride=10 "
     "bn_splits=4 milestones=0.4,0.65,0.925 multigrid=x3d init=none augment= "
     "out=RUNS_kinetics400_pretrain_classify"),
    ("--epochs 5", "epochs=5 iters=None"), ("--version L", "crop=312"),
    (f"{FINETUNE} fine", "dataset=charades batch_size=8 lr=0.01 num_frames=64 stride=10 epochs=200 "
     "weight_decay=1e-05 milestones=0.3,0.4,0.5 val_every=4 bn_splits=1 "
     "init=RUNS_kinetics400_pretrain/last.pt out=RUNS_charades_finetune_fine"),
    (f"{FINETUNE} coarse", "batch_size=6 lr=0.02 num_frames=64 stride=10 milestones=0.15,0.25,0.35 "
     "val_every=2 pool=grid fusion=mixed feature_cap=128 features=data/charades/features "
     "init=RUNS_kinetics400_pretrain/last.pt"),
    (f"{FINETUNE} two", "batch_size=16 lr=0.02 milestones=0.3,0.45,0.55 "
     "init=RUNS_charades_finetune_coarse/best.pt,RUNS_charades_finetune_fine/best.pt"),
    (f"{FINETUNE} x3d", "batch_size=16 lr=0.02 num_frames=16 stride=10 epochs=100 bn_splits=2 "
     "schedule=plateau"),
    (f"{FINETUNE} slowfast", "batch_size=8 lr=0.01 init=pytorchvideo"),
    ("--stage finetune --dataset multithumos", "stream=fine feature_cap=1024 data=data/multithumos "
     "init=RUNS_kinetics400_pretrain/last.pt out=RUNS_multithumos_finetune_fine"),
    ("--stage extract", "stream=fine init=RUNS_charades_finetune_fine/best.pt "
     "out=RUNS_charades_extract"),
    ("--stage evaluate", "stream=coarse init=RUNS_charades_finetune_coarse/best.pt "
     "out=RUNS_charades_evaluate_coarse"),
    ("--stage evaluate --init a b", "stream=None out=RUNS_charades_evaluate"),
    ("--tiny", "version=tiny crop=48 iters=600 batch_size=16 init=none")])
def test_defaults_are_those_of_the_published_recipes(flags, want):
    found = vars(sc.parse_args(flags.split()))
    for k, v in (x.split("=") for x in want.replace("RUNS", "runs/ssdet_coarsefine").split()):
        items = found[k] if isinstance(found[k], list) else [found[k]]
        assert ",".join(map(str, items)) == v, k


@pytest.mark.parametrize("flags, words", [
    ("--dataset charades", "--stage pretrain goes with"),
    ("--stage evaluate --dataset kinetics400", "the other stages do not"),
    (f"{FINETUNE} fine --fusion none", "--pool and --fusion"),
    (f"{FINETUNE} two --fusion none", "--stream two needs --fusion"),
    (f"{FINETUNE} fine --init a b", "--init has more files"), ("--bn_splits 3", "multiple of 3"),
    *((f"--{name} 0", f"--{name}: must be an integer of at least 1, not 0") for name in (
        "num_frames", "stride", "crop", "iters")), ("--bn_splits -1", "of at least 0, not -1"),
    ("--lr nan", "--lr: must be a number of at least 0"), ("--iters 1.5", "must be an integer"),
    ("--stream fine", "takes no --stream"), ("--task classify --augment mixup", "no --augment"),
    (f"{FINETUNE} fine --task classify", "are for --stage pretrain"),
    ("--stage evaluate --dataset multithumos --submission x", "--submission goes with")])
def test_flags_that_contradict_each_other_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as e:
        sc.parse_args(flags.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1
