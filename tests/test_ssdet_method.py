"""SSDet and Coarse-Fine: augmentations, losses, networks, schedules and metrics, by slow versions.
"""

import ctypes
import itertools
import math
import re
import resource
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import running
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import common
import ssdet_coarsefine as sc
from common import SplitBatchNorm, UserError

close = partial(torch.testing.assert_close, rtol=0)


@pytest.fixture(autouse=True, scope="module")
def alone():
    """A process group of this process, over which the losses sum."""
    ours = not dist.is_initialized()
    common.init_distributed(gpu=False)
    yield
    if ours:
        dist.destroy_process_group()


# ---- volume augmentations ----------------------------------------------------------------------

def clips(B, T, W, seed, M=1):
    """Clips with labels and weights that change from frame to frame."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(B, 3, T, 3, W, generator=g)
    label = torch.randint(1, 90, (M, B, T), generator=g)
    weight, present = torch.rand(M, B, T, generator=g), torch.ones(M, B, T)
    present[:, 0, T // 2] = 0
    return sc.Mixture(x, label, weight, present)


def drawn(B, T, seed, least=None):
    """(start, length, partner) for MixUp and growing CutMix, also very short windows."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1 if least is None else least, T + 1, (2, B))
    start = rng.integers(0, T - length + 1)
    if seed % 3 == 0:
        start[1], length[1, ::2] = start[0].clip(0, T - length.max(0)), length[0, ::2]
        start = start.clip(0, T - length)                     # ties
    return *map(torch.from_numpy, (start, length)), torch.from_numpy(rng.permutation(B))


def slow_interval(T, s, e, extend):
    """Of two clips [s, e): lists of two."""
    s, e = list(s), list(e)
    if extend:
        early = 1 if s[1] < s[0] else 0
        e[early], s[early] = e[early] - s[early], 0           # moved to the beginning
        late = 1 if e[1] > e[0] else 0
        e[late] = T                                           # goes on to the end
    return s, e


def slow_fade(t, s, e, whole=1):
    """Weights of the own clip and of the other in a frame, rounded as ours; which are there."""
    whole = np.float32(whole)
    there = [s[i] <= t < e[i] for i in (0, 1)]
    if not all(there):
        return [whole * k for k in there], there
    k, n = t + 1 - max(s), min(e) - max(s)                    # the k-th of n shared frames
    if s[0] >= s[1] and e[0] >= e[1]:
        own, how = True, "rises"
    elif s[0] < s[1] and e[0] < e[1]:
        own, how = False, "rises"
    else:                                                     # the own one is inside, or outside
        own, how = not (s[0] >= s[1]), "dips"
    w = (np.float32(k) * (np.float32(1) / np.float32(n + 1)) * whole if how == "rises" else
         np.float32(abs(k - n / 2)) * 2 / np.float32(n + 1) * whole)
    return [w, whole - w] if own else [whole - w, w], there


def slow_twice(mix, x, partner, weights, present):
    """Mixture of clips `x` by frame: weights, present: (B, T) lists of (own, other)."""
    M, B, T = mix.label.shape
    label, weight, there = (torch.zeros(2 * M, B, T, dtype=d) for d in (
        torch.long, torch.float, torch.float))
    for m, b, t in itertools.product(range(M), range(B), range(T)):
        for k, source in ((0, b), (1, int(partner[b]))):
            label[k * M + m, b, t] = mix.label[m, source, t]
            weight[k * M + m, b, t] = mix.weight[m, source, t] * float(weights[b][t][k])
            there[k * M + m, b, t] = mix.present[m, source, t] * float(present[b][t][k])
    return sc.Mixture(x, label, weight, there)


def same_mixture(got, want, atol=2e-6):
    assert torch.equal(got.label, want.label)
    close(got.present.float(), want.present, atol=0)
    close(got.x, want.x, atol=atol)
    close(got.weight, want.weight, atol=atol)


@pytest.mark.parametrize("B, T, M", [(3, 8, 1), (4, 13, 2), (2, 16, 1), (5, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_freezing_holds_a_frame_and_shifts_the_rest(B, T, M, seed):
    mix, rng = clips(B, T, 4, seed, M), np.random.default_rng(seed)
    length = rng.integers(1, T + 1, B)
    start = rng.integers(0, T - length + 1)
    got = sc.volume_freeze(mix, torch.from_numpy(start), torch.from_numpy(length))
    for b in range(B):
        s, n = start[b], length[b]
        order = [*range(s), *[s] * n, *range(s + 1, T)][:T]   # of frames
        for t, source in enumerate(order):
            assert torch.equal(got.x[b, :, t], mix.x[b, :, source])
            for m in range(M):
                frozen = s <= t < s + n
                assert got.label[m, b, t] == (0 if frozen else mix.label[m, b, source])
    assert torch.equal(got.weight, mix.weight) and torch.equal(got.present, mix.present)


@pytest.mark.parametrize("T", [2, 5, 8, 15, 16])
@pytest.mark.parametrize("extend", [True, False])
def test_intervals_and_their_fading_are_those_of_the_loop(T, extend):
    for seed in range(12):
        start, length, _ = drawn(7, T, seed)
        before = start.clone()
        s, e = sc.intervals(T, start, length, extend)
        assert torch.equal(start, before)                     # the choices stay as drawn
        weights, present = sc.cross_fade(T, s, e)
        for b in range(7):
            want = slow_interval(T, start[:, b].tolist(), (start + length)[:, b].tolist(), extend)
            assert (s[:, b].tolist(), e[:, b].tolist()) == want
            for t in range(T):
                w, there = slow_fade(t, *want)
                assert present[:, b, t].tolist() == there
                assert weights[:, b, t].tolist() == pytest.approx(w, abs=1e-6)
                if any(there):
                    assert weights[:, b, t].sum().item() == pytest.approx(1, abs=1e-6)


def test_fading_in_numbers():
    """Of three shared frames the later clip has 1/4, 2/4, 3/4; an inner one leaves the rest."""
    at = [torch.tensor(x)[:, None] for x in ([0, 3], [6, 9])]
    w, _ = sc.cross_fade(9, *at)
    close(w[1, 0], torch.tensor([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]), atol=1e-6)
    at = [torch.tensor(x)[:, None] for x in ([0, 2], [8, 6])]
    w, _ = sc.cross_fade(8, *at)
    close(w[0, 0], torch.tensor([1, 1, 0.4, 0, 0.4, 0.8, 1, 1]), atol=1e-6)
    close(w[1, 0], 1 - w[0, 0], atol=1e-6)


@pytest.mark.parametrize("B, T, M", [(2, 8, 1), (5, 9, 2), (3, 16, 2), (4, 2, 1)])
@pytest.mark.parametrize("extend", [True, False])
def test_mixup_is_the_sum_of_both_frames(B, T, M, extend):
    for seed in range(4):
        mix, (start, length, partner) = clips(B, T, 5, seed, M), drawn(B, T, seed)
        got = sc.volume_mixup(mix, start, length, partner, extend)
        x, weights, present = torch.zeros_like(mix.x), {}, {}
        for b in range(B):
            span = slow_interval(T, start[:, b].tolist(), (start + length)[:, b].tolist(), extend)
            fades = [slow_fade(t, *span) for t in range(T)]
            weights[b], present[b] = zip(*fades)
            for t, ((own, other), _) in enumerate(fades):
                x[b, :, t] = float(own) * mix.x[b, :, t] + float(other) * mix.x[partner[b], :, t]
        same_mixture(got, slow_twice(mix, x, partner, weights, present))


@pytest.mark.parametrize("B, T, W, M", [(2, 8, 16, 1), (3, 9, 33, 2), (4, 5, 20, 1), (2, 16, 48, 1),
                                        (3, 4, 9, 2)])
@pytest.mark.parametrize("extend", [True, False])
def test_growing_windows_are_those_of_the_loop_over_columns(B, T, W, M, extend):
    for seed in range(3):
        mix, (start, length, partner) = clips(B, T, W, seed, M), drawn(B, T, seed)
        got = sc.volume_cutmix_growing(mix, start, length, partner, extend)
        x, weights, present = torch.zeros_like(mix.x), {}, {}
        for b in range(B):
            span = slow_interval(T, start[:, b].tolist(), (start + length)[:, b].tolist(), extend)
            weights[b], present[b] = [], []
            for t in range(T):
                width, there = slow_fade(t, *span, W)
                if all(there):
                    width = [w + np.float32(W // 16) for w in width]
                width = [min(max(w, 0), np.float32(W)) for w in width]
                first = np.float32(W) - width[1]              # of the partner's window
                shared = [c for c in range(W) if first <= c < width[0]]
                parts = []
                for c in range(W):
                    if c in shared:
                        other = (c - first + 1) / (len(shared) + 1)
                        own = 1 - other
                    else:
                        own, other = float(c < width[0]), float(c >= first)
                    x[b, :, t, :, c] = (float(own) * mix.x[b, :, t, :, c]
                                        + float(other) * mix.x[partner[b], :, t, :, c])
                    parts.append((own, other))
                weights[b].append(np.mean(parts, 0))
                present[b].append((np.sum(parts, 0) > 0).tolist())
        same_mixture(got, slow_twice(mix, x, partner, weights, present))


@pytest.mark.parametrize("B, T, W, M", [(2, 8, 16, 1), (3, 9, 33, 2), (4, 5, 20, 1), (2, 16, 48, 1),
                                        (3, 4, 10, 1)])
def test_sliding_windows_are_those_of_the_loop_over_columns(B, T, W, M):
    mix, partner = clips(B, T, W, 4, M), torch.from_numpy(np.random.default_rng(W).permutation(B))
    got = sc.volume_cutmix_sliding(mix, partner)
    window, x = 9 * W // 16, torch.zeros_like(mix.x)
    shared, half = list(range(W - window, window)), None
    for t in range(T):
        shift, parts = int(t * (7 * W // 16) / T), []
        for c in range(W):
            other = ((shared.index(c) + 1) / (len(shared) + 1) if c in shared
                     else float(c >= window))
            parts.append((1 - other, other))
            for b in range(B):
                x[b, :, t, :, c] = ((1 - other) * mix.x[b, :, t, :, (c + shift) % W]
                                    + other * mix.x[partner[b], :, t, :, (c - shift) % W])
        half = np.mean(parts, 0)
    want = slow_twice(mix, x, partner, [[half] * T] * B, [[(1, 1)] * T] * B)
    same_mixture(got, want)
    if W % 16 == 0:
        close(got.weight[:M], mix.weight / 2, atol=1e-7)


@pytest.mark.parametrize("T", [4, 8, 16, 5, 9])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_drawn_choices_leave_no_frame_black(T, name):
    rng, parts = np.random.default_rng(0), np.arange(8).reshape(2, 4)
    ones = sc.single(torch.ones(8, 3, T, 1, 32), torch.ones(8, T, dtype=torch.long))
    for _ in range(60):
        choices = sc.draw_volume_choices(rng, T, parts, [name], 1.0)
        mix = sc.augment(ones, choices)
        close(mix.x, ones.x, atol=1e-5)
        close((mix.weight * mix.present).sum(0), torch.ones(8, T), atol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_choices_are_in_range_and_partners_of_the_same_part(T, groups):
    rng, parts = np.random.default_rng(T), np.arange(16).reshape(groups, -1)
    names, lengths, starts = ["freeze", "mixup", "cutmix"], set(), set()
    for _ in range(50):
        found = sc.draw_volume_choices(rng, T, parts, names, 1.0)
        assert list(found) == names
        for name, c in found.items():
            size, least, most = (((16,), 1, max(1, T // 2 - 1)) if name == "freeze" else
                                 ((2, 16), T // 2, T))
            assert c["start"].shape == c["length"].shape == size
            assert least <= c["length"].min() and c["length"].max() <= most
            assert 0 <= c["start"].min() and (c["start"] + c["length"]).max() <= T
            if name != "freeze":
                partner = c["partner"].numpy()
                assert sorted(partner) == list(range(16))
                assert (partner * groups // 16 == np.arange(16) * groups // 16).all()
            else:
                lengths |= set(c["length"].tolist())
                starts |= set(c["start"].tolist())
    assert lengths == set(range(1, max(2, T // 2))) and starts == set(range(T))
    slid = sc.draw_volume_choices(rng, T, parts, names, 1.0, "sliding")["cutmix"]
    assert list(slid) == ["partner"]


@pytest.mark.parametrize("prob", [0.0, 0.2, 0.5, 1.0])
def test_each_augmentation_is_switched_on_as_often_as_asked(prob):
    rng, parts, n = np.random.default_rng(1), np.arange(2)[None], 2000
    count = {"freeze": 0, "mixup": 0, "cutmix": 0}
    both = 0
    for _ in range(n):
        found = sc.draw_volume_choices(rng, 4, parts, list(count), prob)
        both += {"mixup", "cutmix"} <= found.keys()
        for name in found:
            count[name] += 1
    for k in count.values():
        assert abs(k - prob * n) <= 4 * (n * prob * (1 - prob)) ** 0.5
    assert abs(both / n - prob ** 2) < 0.04                   # one does not depend on the other
    only = sc.draw_volume_choices(rng, 4, parts, ["mixup"], 1.0)
    assert list(only) == ["mixup"] and not sc.draw_volume_choices(rng, 4, parts, ["none"], 1.0)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("cutmix", ["growing", "sliding"])
def test_shares_of_processes_are_slices_of_the_whole(world, cutmix):
    names, parts = ["freeze", "mixup", "cutmix"], np.arange(8).reshape(4, 2)
    for seed in range(4):
        mix = clips(8, 8, 16, seed)
        mix = sc.single(mix.x, mix.label[0])
        whole = sc.draw_volume_choices(np.random.default_rng(seed), 8, parts, names, 1.0, cutmix)
        shares = [sc.share_of(whole, r, world) for r in range(world)]
        for name, c in whole.items():
            for key, value in c.items():
                more = 8 // world * (key == "partner")
                joined = torch.cat([s[name][key] + r * more for r, s in enumerate(shares)], -1)
                assert torch.equal(joined, value), (name, key)
        every = sc.augment(mix, whole)
        for r, choices in enumerate(shares):
            at = slice(r * 8 // world, (r + 1) * 8 // world)
            got = sc.augment(sc.single(mix.x[at], mix.label[0, at]), choices)
            for mine, all_of in zip(got, (every.x[at], every.label[:, at], every.weight[:, at],
                                          every.present[:, at])):
                assert torch.equal(mine, all_of)


def test_augmentations_follow_one_another():
    mix, parts = clips(4, 8, 16, 0), np.arange(4)[None]
    c = sc.draw_volume_choices(np.random.default_rng(3), 8, parts, ["freeze", "mixup", "cutmix"], 1)
    one = sc.volume_mixup(sc.volume_freeze(mix, **c["freeze"]), **c["mixup"])
    for extend in (True, False):
        want = sc.volume_cutmix_growing(one, **c["cutmix"], extend=extend)
        got = sc.augment(mix, dict(reversed(c.items())), extend)
        assert all(map(torch.equal, got, want)) and len(got.label) == 4
    assert sc.augment(mix, {}) is mix


# ---- losses ------------------------------------------------------------------------------------

def some_mixture(B, T, K, M, seed):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, K, (M, B, T), generator=g)       # 0: background
    weight = torch.rand(M, B, T, generator=g)
    present = (torch.rand(M, B, T, generator=g) < 0.7).float()
    present[:, 0] = 1
    logits = 3 * torch.randn(B, K, T, generator=g)
    return logits, sc.Mixture(torch.zeros(B, 3, T, 1, 1), label, weight * present, present)


def pretraining_loss(logits, mix):
    return sc.pretraining_loss(logits, mix, sc.pretraining_counts(mix))


def detection_loss(logits, label, mask):
    mask = torch.ones_like(label[:, 0]) if mask is None else mask
    return sc.detection_loss(logits, label, mask, sc.detection_counts(label, mask))


@pytest.mark.parametrize("B, T, K, M", [(3, 5, 4, 1), (2, 8, 7, 2), (4, 3, 3, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_pretraining_loss_is_the_sum_of_the_equation(B, T, K, M, seed):
    logits, mix = some_mixture(B, T, K, M, seed)
    loss, hits = pretraining_loss(logits, mix)
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
    assert hits.item() == pytest.approx(right / (B * T), rel=1e-5)


def ragged(B, K, N, seed):
    g = torch.Generator().manual_seed(seed)
    logits, mask = 2 * torch.randn(B, K, N, generator=g), torch.ones(B, N)
    for b in range(1, B):
        mask[b, int(torch.randint(1, N, (), generator=g)):] = 0
    label = (torch.rand(B, K, N, generator=g) < 0.3).float() * mask[:, None]
    return logits, label, mask


@pytest.mark.parametrize("B, K, N", [(1, 3, 6), (3, 4, 9), (4, 2, 5)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_detection_loss_is_that_of_the_loop(B, K, N, masked, seed):
    logits, label, mask = ragged(B, K, N, seed)
    got = detection_loss(logits, label, mask if masked else None)
    cls = loc = count = 0.0
    for b, k in itertools.product(range(B), range(K)):
        row = []
        for t in range(N):
            if masked and not mask[b, t]:
                continue
            p, y = 1 / (1 + math.exp(-logits[b, k, t].item())), label[b, k, t].item()
            loc -= y * math.log(p) + (1 - y) * math.log(1 - p)
            count += 1
            row.append((p, y))
        p, y = (max(x) for x in zip(*row))
        cls -= y * math.log(p) + (1 - y) * math.log(1 - p)
    cls, loc = cls / (B * K), loc / count
    assert [x.item() for x in got] == pytest.approx([(cls + loc) / 2, cls, loc], rel=1e-5)


def test_padding_has_no_gradient_under_a_mask_and_has_one_without():
    logits, label, mask = ragged(4, 3, 8, 5)
    for m, there in ((mask, False), (None, True)):
        x = logits.clone().requires_grad_()
        detection_loss(x, label, m)[0].backward()
        outside = x.grad.transpose(1, 2)[mask == 0]
        assert bool(outside.abs().min() > 0) == bool(outside.abs().max() > 0) == there
        assert x.grad.transpose(1, 2)[mask == 1].abs().min() > 0


def shared_losses(rank):
    """Losses and gradients of each process's samples of two batches."""
    found = {}
    logits, mix = some_mixture(6, 5, 4, 2, 0)
    at = slice(0, 4) if rank == 0 else slice(4, 6)
    x = logits[at].requires_grad_()
    mine = sc.Mixture(mix.x[at], *(v[:, at] for v in mix[1:]))
    loss, found["hits"] = pretraining_loss(x, mine)
    found["pretraining"], found["grad_pretraining"] = loss.detach(), *torch.autograd.grad(loss, x)
    logits, label, mask = ragged(6, 3, 7, 1)
    x = logits[at].requires_grad_()
    for name, m in (("masked", mask[at]), ("plain", None)):
        loss = detection_loss(x, label[at], m)[0]
        found[name], found[f"grad_{name}"] = loss.detach(), *torch.autograd.grad(loss, x)
    return found


@pytest.mark.parametrize("n", [2, 3, 6])
def test_parts_of_a_batch_add_up_to_its_loss_and_gradient(n):
    logits, mix = some_mixture(6, 5, 4, 2, 3)
    label, mask = ragged(6, 4, 5, 2)[1:]
    for of_frames in (True, False):
        found = []
        for parts in (1, n):
            x, pieces = logits.clone().requires_grad_(), []
            counts = (sc.detection_counts(label, mask) if of_frames
                      else sc.pretraining_counts(mix))
            for part, z, y, m in zip(mix.chunk(parts), x.chunk(parts), label.chunk(parts),
                                     mask.chunk(parts)):
                pieces.append(sc.detection_loss(z, y, m, counts)[0] if of_frames
                              else sc.pretraining_loss(z, part, counts)[0])
            sum(pieces).backward()
            found.append((sum(pieces).detach(), x.grad))
        close(found[0][0], found[1][0], atol=1e-6)
        close(found[0][1], found[1][1], atol=1e-7)


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    a, b = running.processes(shared_losses, 2, tmp_path)
    logits, mix = some_mixture(6, 5, 4, 2, 0)
    x = logits.requires_grad_()
    loss, hits = pretraining_loss(x, mix)
    want = {"pretraining": loss, "hits": hits, "grad_pretraining": torch.autograd.grad(loss, x)[0]}
    logits, label, mask = ragged(6, 3, 7, 1)
    x = logits.requires_grad_()
    for name, m in (("masked", mask), ("plain", None)):
        loss = detection_loss(x, label, m)[0]
        want |= {name: loss, f"grad_{name}": torch.autograd.grad(loss, x)[0]}
    for name, value in want.items():
        got = torch.cat([a[name], b[name]]) / 2 if "grad" in name else (a[name] + b[name]) / 2
        close(got, value.detach(), atol=1e-6)                 # DDP takes the mean


# ---- split batch norm --------------------------------------------------------------------------

def shaken(model, seed=0):
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
def test_a_split_norm_is_a_batch_norm_for_each_part(parts, B):
    torch.manual_seed(parts)
    norm, plain = SplitBatchNorm(5, parts), [nn.BatchNorm3d(5) for _ in range(parts)]
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    for m in plain:
        m.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    for _ in range(3):
        x = torch.randn(B, 5, 2, 3, 4) * 2 + 1
        n = B // parts
        want = torch.cat([m(x[i * n:(i + 1) * n]) for i, m in enumerate(plain)])
        close(norm(x), want, atol=1e-6)
    means, variances = (torch.stack([getattr(m, name) for m in plain]) for name in (
        "running_mean", "running_var"))
    close(norm.split_bn.running_mean, means.flatten(), atol=1e-6)
    close(norm.split_bn.running_var, variances.flatten(), atol=1e-6)
    assert norm.split_bn.num_batches_tracked == 3
    assert torch.equal(norm.bn.running_mean, torch.zeros(5))  # not yet
    common.merge_splits(norm)
    for c in range(5):
        mean = sum(means[:, c].tolist()) / parts
        spread = sum((m - mean) ** 2 for m in means[:, c].tolist()) / parts
        assert norm.bn.running_mean[c].item() == pytest.approx(mean, abs=1e-6)
        assert norm.bn.running_var[c].item() == pytest.approx(
            sum(variances[:, c].tolist()) / parts + spread, rel=1e-5)
    shape, x = (1, 5, 1, 1, 1), torch.randn(1, 5, 2, 3, 4)    # one sample does, in evaluation
    want = ((x - norm.bn.running_mean.view(shape)) / (norm.bn.running_var.view(shape) + 1e-5).sqrt()
            * norm.weight.view(shape) + norm.bias.view(shape))
    close(norm.eval()(x), want, atol=1e-5)


def test_samples_that_do_not_fill_the_parts_are_refused():
    with pytest.raises(UserError, match="3 parts: 4 samples"):
        SplitBatchNorm(2, 3)(torch.zeros(4, 2, 1, 1, 1))


def test_another_number_of_parts_begins_statistics_anew_and_the_same_keeps_them():
    net = shaken(nn.Sequential(SplitBatchNorm(3, 2), nn.ReLU(), SplitBatchNorm(4, 2)))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    common.set_splits(net, 2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    common.set_splits(net, 4)
    for m, C in zip(common.split_norms(net), (3, 4)):
        assert m.splits == 4 and torch.equal(m.split_bn.running_mean, torch.zeros(4 * C))
        assert torch.equal(m.split_bn.running_var, torch.ones(4 * C))
    assert torch.equal(net[0].bn.running_mean, before["0.bn.running_mean"])
    assert torch.equal(net[2].weight, before["2.weight"])


@pytest.mark.parametrize("there, here", [(4, 2), (1, 4), (2, 2)])
def test_a_checkpoint_brings_its_number_of_parts(there, here):
    a, b = shaken(SplitBatchNorm(3, there)), SplitBatchNorm(3, here)
    b.load_state_dict(a.state_dict())
    assert b.splits == there
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    x = torch.randn(4, 3, 1, 2, 2)
    assert torch.equal(a(x), b(x)) and torch.equal(a.rows("running_var"), b.rows("running_var"))


def norm_net(splits):
    torch.manual_seed(0)
    norm = partial(SplitBatchNorm, splits=splits)
    return nn.Sequential(nn.Conv3d(3, 4, 1), norm(4), nn.ReLU(), nn.Conv3d(4, 5, 3, 1, 1), norm(5))


def split_step(rank, world=2):
    """Two forward passes, a gradient, and merged statistics of this process's half of a batch."""
    net, g = norm_net(4), torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 8, 3, 2, 4, 4, generator=g), torch.randn(8, 5, 2, 4, 4, generator=g)
    at = slice(rank * 8 // world, (rank + 1) * 8 // world)
    net(x[0, at])
    y = net(x[1, at])
    (y * w[at]).sum().backward()
    common.merge_splits(net)
    return {"y": y.detach(), "grads": [p.grad for p in net.parameters()],
            "state": dict(net.state_dict())}


def test_two_processes_of_two_parts_are_one_of_four(tmp_path):
    one, two = split_step(0, 1), running.processes(split_step, 2, tmp_path)
    close(torch.cat([r["y"] for r in two]), one["y"], atol=1e-6)
    for want, *mine in zip(one["grads"], *(r["grads"] for r in two)):
        close(sum(mine), want, atol=1e-4 * want.abs().max().clamp(min=1).item())
    for r in two:
        assert r["state"].keys() == one["state"].keys()
        for k, v in one["state"].items():
            close(r["state"][k], v, atol=1e-6)


def tiny(classes=5, norm=SplitBatchNorm, **kwargs):
    torch.manual_seed(3)
    return common.X3D("tiny", classes, norm=norm, dropout=0.0, **kwargs)


def same_outputs(a, b, T=5, size=32, atol=1e-5):
    x = torch.randn(2, 3, T, size, size, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        want = a.eval()(x)
        assert want.std() > 1e-3
        close(b.eval()(x), want, atol=atol)


@pytest.mark.parametrize("source, target", [
    (partial(SplitBatchNorm, splits=4), nn.BatchNorm3d), (SplitBatchNorm, nn.BatchNorm3d),
    (nn.BatchNorm3d, partial(SplitBatchNorm, splits=4)), (nn.BatchNorm3d, SplitBatchNorm),
    (nn.BatchNorm3d, nn.BatchNorm3d),
    (partial(SplitBatchNorm, splits=4), partial(SplitBatchNorm, splits=2))])
def test_checkpoints_fit_split_and_plain_norms(source, target, tmp_path):
    a, b = shaken(tiny(norm=source)), tiny(norm=target)
    torch.save({"model": a.state_dict()}, tmp_path / "a.pt")
    sc.load(b, tmp_path / "a.pt", whole=True)
    same_outputs(a, b, atol=1e-6)
    for m in common.split_norms(b):                           # each part goes on from there
        if source is nn.BatchNorm3d:
            common.merge_splits(m)
            rows = m.rows("running_var")
            assert torch.equal(rows, rows[:1].expand_as(rows)) and rows.shape[0] == m.splits
            close(rows[0], m.bn.running_var, atol=1e-6)
    torch.save({"model": b.state_dict()}, tmp_path / "b.pt")
    c = tiny(norm=source)
    sc.load(c, tmp_path / "b.pt", whole=True)
    same_outputs(a, c, atol=1e-6)
    fitted = common.fit_norms(a.state_dict(), b.state_dict())
    assert set(fitted) == set(b.state_dict())


# ---- X3D ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("version, size, inner, hidden", [
    ("S", 160, 432, 2048), ("M", 224, 432, 2048), ("L", 312, 432, 2048),
    ("XL", 312, 630, 2048), ("tiny", 48, 96, 128)])
def test_maps_have_the_published_shapes(version, size, inner, hidden):
    with torch.device("meta"):
        model, x = common.X3D(version, 7).eval(), torch.empty(2, 3, 13, size, size)
        maps = model.maps(x)
        assert model.head(maps["conv5"]).shape == (2, 7, 13)
        model.per_frame = False
        assert model.head(maps["conv5"]).shape == (2, 7, 1)
    sides = [-(-size // 2 ** k) for k in (2, 3, 4, 5, 5)]
    assert list(maps) == list(sc.LEVELS)
    for (_, m), width, side in zip(maps.items(), model.widths, sides):
        assert m.shape == (2, width, 13, side, side)
    assert model.widths[-1] == inner and model.fc1.out_channels == hidden


@pytest.mark.parametrize("version, classes, count", [
    ("M", 400, 3_794_322), ("M", 157, 3_296_415), ("XS", 157, 3_296_415),
    ("XL", 400, 11_095_904), ("L", 400, 6_153_432)])
def test_networks_have_the_published_number_of_parameters(version, classes, count):
    with torch.device("meta"):
        model = common.X3D(version, classes)
    assert sum(p.numel() for p in model.parameters()) == count


def test_excitations_have_the_published_widths():
    widths = {54: 8, 108: 8, 216: 16, 432: 32, 72: 8, 162: 16, 306: 24, 630: 40}
    assert {c: common.se_width(c) for c in widths} == widths
    blocks = tiny().layer2
    assert [hasattr(b, "fc1") for b in blocks] == [True, False]
    assert [b.downsample is None for b in blocks] == [False, True]


@pytest.mark.parametrize("T", [32, 33, 63, 64, 65, 97])
@pytest.mark.parametrize("stride", [1, 2])
def test_pieces_of_a_long_video_equal_the_whole(T, stride):
    torch.manual_seed(T)
    block = shaken(common.X3DBlock(4, 10, 6, stride, True, SplitBatchNorm)).eval()
    x = torch.randn(1, 4, T, 6, 6)
    with torch.no_grad():
        close(block.wide_in_pieces(x), block.wide(x), atol=1e-5)
        assert T <= 32 or (block.wide_in_pieces(x, 5) - block.wide(x)).abs().max() < 1e-5
        pieces = []
        block.conv2.register_forward_pre_hook(lambda _, args: pieces.append(args[0].shape[2]))
        block(x)
    assert len(pieces) == -(-T // 32) and max(pieces) <= 34


def fair_name(name):
    """A name of X3D in SlowFast's zoo."""
    for ours, theirs in (("conv1_s.", "s1.pathway0_stem.conv_xy."), ("bn5.", "head.conv_5_bn."),
                         ("conv1_t.", "s1.pathway0_stem.conv."), ("bn1.", "s1.pathway0_stem.bn."),
                         ("conv5.", "head.conv_5."), ("fc1.", "head.lin_5."),
                         ("fc2.", "head.projection.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    layer, block, kind, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)\.(.*)", name).groups()
    start = f"s{int(layer) + 1}.pathway0_res{block}."
    if kind == "downsample":
        number, rest = rest.split(".")
        return f"{start}branch1{'_bn' * int(number)}.{rest}"
    if kind.startswith("fc"):
        return f"{start}branch2.se.{kind}.{rest}"
    return f"{start}branch2.{' abc'[int(kind[-1])]}{'_bn' * (kind[:2] == 'bn')}.{rest}"


def pytorchvideo_name(name):
    """In pytorchvideo's, where the stem's convolutions have one another's names."""
    for ours, theirs in (("conv1_s.", "0.conv.conv_t."), ("conv1_t.", "0.conv.conv_xy."),
                         ("bn1.", "0.norm."), ("conv5.", "5.pool.pre_conv."),
                         ("bn5.", "5.pool.pre_norm."), ("fc1.", "5.pool.post_conv."),
                         ("fc2.", "5.proj.")):
        if name.startswith(ours):
            return f"blocks.{theirs}{name.removeprefix(ours)}"
    layer, block, kind, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)\.(.*)", name).groups()
    start = f"blocks.{layer}.res_blocks.{block}."
    if kind == "downsample":
        number, rest = rest.split(".")
        return f"{start}branch1_{('conv', 'norm')[int(number)]}.{rest}"
    which = {"bn1": "norm_a", "bn2": "norm_b.0", "bn3": "norm_c", "fc1": "norm_b.1.block.0",
             "fc2": "norm_b.1.block.2", "conv1": "conv_a", "conv2": "conv_b", "conv3": "conv_c"}
    return f"{start}branch2.{which[kind]}.{rest}"


@pytest.mark.parametrize("layout, norm", [
    (layout, norm)
    for norm in (SplitBatchNorm, partial(SplitBatchNorm, splits=3), nn.BatchNorm3d)
    for layout in ("fair", "pytorchvideo", "released", "flat")])
def test_every_known_layout_loads(layout, norm, tmp_path):
    net, got = shaken(tiny(norm=nn.BatchNorm3d)), tiny(norm=norm)
    state = dict(net.state_dict())
    if layout == "fair":
        state = {"epoch": 3, "model_state": {fair_name(k): v for k, v in state.items()}, "cfg": ""}
    elif layout == "pytorchvideo":
        lost = "layer1.0.downsample.1."
        state = {"model_state": {pytorchvideo_name(k): v for k, v in state.items()
                                 if not k.startswith(lost)}}
        net.layer1[0].downsample[1] = nn.Identity()
    elif layout == "flat":                                    # a linear layer
        state["fc1.weight"] = state["fc1.weight"][:, :, 0, 0, 0]
    else:
        state = {"model_state_dict": state, "optimizer_state_dict": {}}
    torch.save(state, tmp_path / "w.pyth")
    sc.load(got, tmp_path / "w.pyth", whole=True)
    same_outputs(net, got, atol=2e-6)


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "inf", "norm"])
def test_a_faulty_checkpoint_is_refused_in_one_line(fault, tmp_path):
    model, path = tiny(), tmp_path / "x3d_odd.pt"
    state = {k: v.clone() for k, v in shaken(tiny(classes=9)).state_dict().items()}
    key = {"norm": "layer2.1.bn2.weight"}.get(fault, "layer3.0.conv2.weight")
    if fault in ("missing", "norm"):
        del state[key]
    elif fault == "shape":
        state[key] = state[key][:, :, :, 1:]
    else:
        state[key].view(-1)[5] = float(fault)
    torch.save(state, path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as e:
        sc.load(model, path)
    text = str(e.value)
    assert text.startswith(f"{path}: ") and key in text and "\n" not in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_heads_of_other_classes_stay_fresh(tmp_path):
    model, other = tiny(5), shaken(tiny(9), 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(other.state_dict(), tmp_path / "w.pt")
    sc.load(model, tmp_path / "w.pt")
    for k, v in model.state_dict().items():
        want = before[k] if k.startswith("fc2.") else other.state_dict()[k]
        assert torch.equal(v, want), k
    with pytest.raises(UserError, match="fc2.weight"):
        sc.load(tiny(5), tmp_path / "w.pt", whole=True)


# ---- SlowFast ----------------------------------------------------------------------------------

def test_slowfast_has_the_published_size():
    with torch.device("meta"):
        model, x = common.SlowFast().eval(), torch.empty(1, 3, 32, 224, 224)
        slow, fast = model.pathways(x[:, :, ::4], x)
        assert model(x).shape == (1, 400, 32)
    assert slow.shape == (1, 2048, 8, 7, 7) and fast.shape == (1, 256, 32, 7, 7)
    assert sum(p.numel() for p in model.parameters()) == 34_566_488


def small_slowfast(norm=nn.BatchNorm3d, per_frame=True):
    torch.manual_seed(1)
    return common.SlowFast(6, per_frame, 16, (2, 1, 1, 1), norm=norm, dropout=0.0)


@pytest.mark.parametrize("T", [4, 5, 6, 7, 16, 19])
def test_slowfast_has_logits_of_every_frame(T):
    model = shaken(small_slowfast()).eval()
    x = torch.randn(2, 3, T, 32, 32)
    with torch.no_grad():
        y = model(x)
        slow, fast = (m.mean((3, 4)) for m in model.pathways(x[:, :, ::4], x))
        assert y.shape == (2, 6, T) and slow.shape[2] == -(-T // 4)
        n, W, b = slow.shape[2], *model.head["projection"].parameters()
        for t in range(T):                                    # half-pixel centres
            at = min(max((t + 0.5) * n / T - 0.5, 0), n - 1)
            i = min(int(at), n - 1)
            j = min(i + 1, n - 1)
            here = slow[:, :, i] + (at - i) * (slow[:, :, j] - slow[:, :, i])
            close(y[:, :, t], torch.cat([here, fast[:, :, t]], 1) @ W.T + b, atol=1e-4)
        model.per_frame = False
        close(model(x)[..., 0], torch.cat([slow.mean(2), fast.mean(2)], 1) @ W.T + b, atol=1e-4)


def slowfast_name(name):
    """A name of SlowFast in pytorchvideo's zoo."""
    stem = re.fullmatch(r"s1\.pathway(\d)_stem\.(conv|bn)\.(.*)", name)
    if stem:
        kind = "norm" if stem[2] == "bn" else "conv"
        return f"blocks.0.multipathway_blocks.{stem[1]}.{kind}.{stem[3]}"
    fuse = re.fullmatch(r"s(\d)_fuse\.(conv_f2s|bn)\.(.*)", name)
    if fuse:
        kind = "norm" if fuse[2] == "bn" else "conv_fast_to_slow"
        return f"blocks.{int(fuse[1]) - 1}.multipathway_fusion.{kind}.{fuse[3]}"
    if name.startswith("head."):
        return f"blocks.6.proj.{name.split('.')[-1]}"
    s, p, i, rest = re.fullmatch(r"s(\d)\.pathway(\d)_res(\d+)\.(.*)", name).groups()
    rest = re.sub(r"^branch1_bn\.", "branch1_norm.", re.sub(r"^branch1\.", "branch1_conv.", rest))
    rest = re.sub(r"branch2\.([abc])_bn\.", r"branch2.norm_\1.", rest)
    rest = re.sub(r"branch2\.([abc])\.", r"branch2.conv_\1.", rest)
    return f"blocks.{int(s) - 1}.multipathway_blocks.{p}.res_blocks.{i}.{rest}"


@pytest.mark.parametrize("norm", [SplitBatchNorm, nn.BatchNorm3d])
@pytest.mark.parametrize("names", ["slowfast", "pytorchvideo"])
def test_slowfast_loads_both_zoos(names, norm, tmp_path):
    net, got = shaken(small_slowfast()), small_slowfast(norm)
    state = dict(net.state_dict())
    if names == "pytorchvideo":
        state = {slowfast_name(k): v for k, v in state.items()}
    torch.save({"model_state": state}, tmp_path / "w.pyth")
    sc.load(got, tmp_path / "w.pyth", whole=True)
    same_outputs(net, got, 9)


# ---- Coarse-Fine -------------------------------------------------------------------------------

@pytest.mark.parametrize("N, P, L", [(8, 1, 3), (5, 3, 9), (2, 4, 4), (17, 2, 5)])
def test_sampling_is_that_of_grid_sample_with_its_gradients(N, P, L):
    g = torch.Generator().manual_seed(N)
    x = torch.randn(3, 2, N, P, generator=g, dtype=torch.double).requires_grad_()
    at = (torch.rand(3, L, generator=g, dtype=torch.double) * (N + 1) - 1).requires_grad_()
    places = torch.linspace(-1, 1, P, dtype=torch.double) if P > 1 else torch.zeros(1).double()
    rows = (2 * at / (N - 1) - 1)[..., None].expand(3, L, P)
    grid = torch.stack([places.expand(3, L, P), rows], -1)
    want = F.grid_sample(x, grid, "bilinear", "zeros", align_corners=True)
    got = sc.sample(x, at)
    close(got, want, atol=1e-12)
    w = torch.randn(got.shape, generator=g, dtype=torch.double)
    for a, b in zip(*(torch.autograd.grad((y * w).sum(), (x, at)) for y in (got, want))):
        close(a, b, atol=1e-12)


def test_sampling_between_beyond_and_on_the_steps():
    x = torch.tensor([[[2.0, 4.0, 10.0]]])
    at = torch.tensor([[0, 0.25, 2, 2.5, -0.5, 3, -1, 1]])
    close(sc.sample(x, at)[0, 0], torch.tensor([2, 2.5, 10, 5, 1, 0, 0, 4]), atol=0)
    deep = torch.randn(1, 2, 3, 4, 5)
    close(sc.sample(deep, at)[:, :, 1], 0.75 * deep[:, :, 0] + 0.25 * deep[:, :, 1], atol=1e-6)


@pytest.mark.parametrize("N, Q", [(2, 5), (6, 9), (17, 30)])
@pytest.mark.parametrize("shared", [True, False])
def test_interpolation_is_that_of_the_loop(N, Q, shared):
    g = torch.Generator().manual_seed(N)
    x = (torch.rand(3, N, generator=g, dtype=torch.double) + 0.05).cumsum(1)
    y = torch.randn(3, N, generator=g, dtype=torch.double)
    at = torch.rand(1 if shared else 3, Q, generator=g, dtype=torch.double) * (x.max() + 2) - 1
    got = sc.interpolate(x, y, at)
    for r, q in itertools.product(range(3), range(Q)):
        a = at[0 if shared else r, q].item()
        i = max([k for k in range(N - 1) if x[r, k] < a], default=0)
        slope = (y[r, i + 1] - y[r, i]) / (x[r, i + 1] - x[r, i])
        assert got[r, q].item() == pytest.approx((y[r, i] + slope * (a - x[r, i])).item(), abs=1e-9)


@pytest.mark.parametrize("T", [4, 8, 13, 16, 64])
@pytest.mark.parametrize("norm", [SplitBatchNorm, nn.BatchNorm3d])
def test_grid_pool_steps_least_where_it_is_most_confident(T, norm):
    torch.manual_seed(T)
    pool = shaken(sc.GridPool(6, norm)).eval()
    pool.conv3.weight.data.mul_(10)
    x, given = torch.randn(2, 6, T, 8, 8), []
    pool.conv3.register_forward_hook(lambda _, __, y: given.append(y))
    with torch.no_grad():
        y, c = pool(x)
    z = given[0].mean((1, 3, 4)).tolist()
    L = math.ceil(math.ceil(T / 2) / 2) + 1
    assert y.shape == (2, 6, L, 8, 8) and c.shape == (2, L)
    assert len(z[0]) == L - 1 and (T % 4 or L == T // 4 + 1)
    for b in range(2):
        step = [1 - 1 / (1 + math.exp(-0.5 * v)) for v in z[b]]
        times = [sum(step[:i]) / sum(step) for i in range(L)]
        assert c[b].tolist() == pytest.approx(times, abs=1e-6)
        assert c[b, 0] == 0 and c[b, -1].item() == pytest.approx(1, abs=1e-6)
        for i, t in enumerate(c[b].tolist()):
            k = min(int(t * (T - 1)), T - 2)
            part = t * (T - 1) - k
            if abs(t - 1) > 1e-5:                             # else perhaps just beyond the end
                close(y[b, :, i], (1 - part) * x[b, :, k] + part * x[b, :, k + 1], atol=1e-4)


@pytest.mark.parametrize("L", [2, 3, 5, 17])
def test_unpooling_undoes_the_times(L):
    g = torch.Generator().manual_seed(L)
    c = F.pad((torch.rand(3, L - 1, generator=g, dtype=torch.double) + 0.1).cumsum(1), (1, 0))
    c, x = c / c[:, -1:], torch.randn(3, 4, L, generator=g, dtype=torch.double)
    even, wide = np.linspace(0, 1, L), np.linspace(0, L - 1, 4 * (L - 1))
    got, long = sc.undo_times(x, c), sc.grid_unpool(x, c)
    assert long.shape == (3, 4, 4 * (L - 1))
    for b, k in itertools.product(range(3), range(4)):
        at = np.interp(even, c[b].numpy(), even)              # where c reaches the even times
        row = np.interp(at * (L - 1), range(L), x[b, k].numpy())
        assert got[b, k].tolist() == pytest.approx(row.tolist(), abs=1e-6)
        assert long[b, k].tolist() == pytest.approx(np.interp(wide, range(L), row).tolist(),
                                                    abs=1e-6)


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("steps, L", [(12, 3), (5, 7), (30, 9)])
def test_gaussians_are_those_of_the_equation(grid, steps, L):
    g = torch.Generator().manual_seed(L)
    start, valid = torch.tensor([0, 3, -2]), torch.tensor([steps, 4, 2])
    c, T = torch.rand(3, L, generator=g).sort(1).values, 16
    for apart in (4, 1):
        got = sc.gaussian(start, valid, steps, c if grid else None, T, L, apart)
        assert got.shape == (3, steps, L)
        for b, i in itertools.product(range(3), range(L)):
            mu = start[b].item() + (c[b, i].item() * T if grid else apart * i)
            row = [math.exp(-(t - mu) ** 2 / 2 / (valid[b].item() / 8) ** 2) for t in range(steps)]
            if max(row) > 1e-30:                              # else beyond float32
                assert got[b, :, i].tolist() == pytest.approx([v / max(row) for v in row],
                                                              rel=1e-3, abs=1e-5)
            assert torch.isfinite(got[b, :, i]).all()


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("B, C, T, L, out", [(2, 5, 7, 3, 4), (1, 3, 4, 6, 8)])
def test_the_filter_is_the_mean_of_the_equation(B, C, T, L, out, pool, alone):
    torch.manual_seed(T)
    m = sc.FusionFilter(C, out, pool, alone).eval()
    for p in m.parameters():
        p.data.mul_(2)
    x, G, valid = torch.randn(B, C, T, 2, 3), torch.rand(B, T, L), torch.ones(B, T)
    valid[0, T // 2:] = 0
    dense = lambda conv, v: conv.weight[:, :, 0] @ v + conv.bias                    # noqa: E731
    A = torch.zeros(B, C, L, 2, 3)
    with torch.no_grad():
        for b, i, h, w in itertools.product(range(B), range(L), range(2), range(3)):
            above, below = torch.zeros(C), 0.0
            for t in range(T):
                v = x[b, :, t, h, w]
                a = dense(m.at2, F.relu(dense(m.at1, v))).sigmoid() * valid[b, t] * G[b, t, i]
                above, below = above + a * v, below + a
            A[b, :, i, h, w] = above / (below + 1e-6)
        got = m(x, G, valid)
        assert all(y.shape == (B, out, L, *((1, 1) if pool else (2, 3))) for y in got)
        for b, i, h, w in itertools.product(range(B), range(L), range(2), range(3)):
            v = A[b, :, i].mean((1, 2)) if pool else A[b, :, i, h, w]
            bias = dense(m.fc2, F.relu(dense(m.fc1, v)))
            scale = dense(m.fc4, F.relu(dense(m.fc3, v)))
            at = (0, 0) if pool else (h, w)
            close(got[0][b, :, i, at[0], at[1]], bias, atol=1e-5)
            close(got[1][b, :, i, at[0], at[1]], scale.sigmoid() if alone else scale, atol=1e-5)
        x[0, :, T // 2:] = 1e3                                # nothing of what is not valid
        assert torch.equal(m(x, G, valid)[0], got[0])


@pytest.mark.parametrize("have, size", [(7, 14), (7, 7), (7, 56), (7, 10), (7, 4), (2, 5)])
def test_enlarging_repeats_or_takes_the_largest(have, size):
    x = torch.randn(2, 3, 4, have, have)
    got = sc.enlarge(x, size)
    assert got.shape == (2, 3, 4, size, size)
    for r, c in itertools.product(range(size), repeat=2):
        rows, columns = (slice(k * have // size, -(-(k + 1) * have // size)) for k in (r, c))
        assert torch.equal(got[..., r, c], x[..., rows, columns].amax((3, 4)))
    if size % have == 0:
        n = size // have
        assert torch.equal(got, x.repeat_interleave(n, 3).repeat_interleave(n, 4))


def mixed_at_stage(self, biases, scales, size):
    """`Mixing` of maps that are enlarged first, as the release has it."""
    def mix(maps, conv):
        x = torch.cat([sc.enlarge(m, size) for m in maps], 1)
        return conv(x.flatten(2)).unflatten(2, x.shape[2:])
    return mix(biases, self.conv_at), mix(scales, self.conv_at2).sigmoid()


@pytest.mark.parametrize("size", [7, 14, 28, 10, 3])
def test_mixing_is_of_maps_at_the_stage(size):
    torch.manual_seed(size)
    m, widths = sc.Mixing(9, 6), (2, 3, 4)
    biases, scales = ([torch.randn(2, c, 3, 7, 7) for c in widths] for _ in range(2))
    for got, want in zip(m(biases, scales, size), mixed_at_stage(m, biases, scales, size)):
        assert got.shape == (2, 6, 3, size, size)
        close(got, want, atol=1e-6)
    given = []
    m.conv_at.register_forward_pre_hook(lambda _, args: given.append(args[0].shape[2]))
    m(biases, scales, size)
    assert given == [3 * (49 if size % 7 == 0 else size * size)]


def filtered_at_stage(sizes, self, x, G, valid):
    """`FusionFilter` with every product of the equation, of maps that are enlarged first."""
    x = sc.enlarge(x, sizes[x.shape[1]])
    B, _, T, h, w = x.shape
    a = self.at2(F.relu(self.at1(x.flatten(2)))).sigmoid().view(B, 1, T, 1, h, w)
    weight = a * (G * valid[..., None])[:, None, :, :, None, None]        # B, 1, T', L, h, w
    A = (x[:, :, :, None] * weight).sum(2) / (weight.sum(2) + 1e-6)
    A = A.mean((3, 4), keepdim=True) if self.pool else A
    found = [second(F.relu(first(A.flatten(2)))).unflatten(2, A.shape[2:])
             for first, second in ((self.fc1, self.fc2), (self.fc3, self.fc4))]
    return found[0], found[1].sigmoid() if self.alone else found[1]


def at_stages(patch, sizes):
    patch.setattr(sc.FusionFilter, "forward", lambda *args: filtered_at_stage(sizes, *args))
    patch.setattr(sc.Mixing, "forward", mixed_at_stage)


@pytest.mark.parametrize("fusion, pool", [
    ("mixed", "grid"), ("mixed", "avg"), ("mixed", "max"), ("mixed", "stride"), ("own", "grid"),
    ("own", "avg"), ("none", "grid"), ("none", "stride")])
def test_the_coarse_stream_equals_one_that_fuses_at_its_stages(fusion, pool, monkeypatch):
    torch.manual_seed(0)
    m = shaken(sc.Coarse("tiny", 4, pool, fusion, norm=nn.BatchNorm3d, dropout=0.0)).eval()
    T, steps = 8, 9
    x, valid = torch.randn(1, 3, T, 224, 224), torch.ones(1, steps)
    valid[0, 6:] = 0
    features = {k: torch.rand(1, c, steps, 7, 7) for k, c in zip(sc.LEVELS, m.widths)}
    start = torch.tensor([2])
    with torch.no_grad():
        got = m(x, features, valid, start) if fusion != "none" else m(x)
        assert got.shape == (1, 4, 8 if pool == "grid" else 2) and got.std() > 1e-3
        assert (m.sampled is not None) == (pool == "grid")
        if fusion == "none":
            return
        at_stages(monkeypatch, dict(zip(m.widths, (56, 28, 14, 7, 7))))
        want = m(x, features, valid, start)
        close(got, want, atol=1e-6 * want.abs().max().item())
        late = m(x, features, valid, start + 4)
    assert (late - got).abs().max() > 1e-4                    # the start counts


def fusion_memory(stages, _rank):
    """Outputs of X3D-M's fusion, and MB by which the process has grown in forward and backward;
    every block of 64 KB goes back to the system when it is freed, so that growth is what is in use.
    """
    if sys.platform == "linux":
        assert ctypes.CDLL(None).mallopt(-3, 65536)           # M_MMAP_THRESHOLD
    torch.set_num_threads(1)
    torch.manual_seed(0)
    m, T, steps, L = sc.Coarse(classes=20, norm=nn.BatchNorm3d, dropout=0.0), 64, 64, 17
    if stages:
        at_stages(pytest.MonkeyPatch(), dict(zip(m.widths, (56, 28, 14, 7, 7))))
    features = {k: torch.randn(1, c, steps, 7, 7) for k, c in zip(sc.LEVELS, m.widths)}
    maps = [torch.randn(1, c, L, z, z, requires_grad=True)
            for c, z in zip(m.widths, (56, 28, 14, 7))]
    valid, c = torch.ones(1, steps), torch.linspace(0, 1, L)[None]

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    G = sc.gaussian(torch.tensor([3]), valid.sum(1), steps, c, T)
    fused = [getattr(m, f"rw{n}")(features[level], G, valid)
             for n, level in enumerate(sc.LEVELS[:4], 2)]
    bias, scale = m.rw6(features["conv5"], G, valid)
    loss = (bias * scale).square().mean()
    for n, x in enumerate(maps, 2):
        bias, scale = getattr(m, f"mix{n}")(*zip(*fused), x.shape[-1])
        loss = loss + (x * scale + bias).square().mean()
    loss.backward()
    return {"loss": loss.item(), "MB": peak() - before}


def test_fusing_takes_a_fifth_of_the_memory_of_fusing_at_the_stages(tmp_path):
    found = []
    for stages in (False, True):
        (tmp_path / str(stages)).mkdir()
        found += running.processes(partial(fusion_memory, stages), 1, tmp_path / str(stages))
    ours, theirs = found
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert 20 < ours["MB"] < theirs["MB"] / 5, found


# ---- schedules ---------------------------------------------------------------------------------

def slow_states(bounds):
    """The state of the long cycle at each step, by counting."""
    states = []
    for a, b in zip(bounds[:3], bounds[1:4]):
        states += [4 * k // (b - a) for k in range(b - a)]
    return states + [-1] * (bounds[4] - bounds[3])


@pytest.mark.parametrize("iters", [20, 100, 1001, 4000])
def test_three_long_cycles_are_followed_by_the_full_shape(iters):
    bounds = sc.cycle_bounds(iters)
    assert bounds == [0, *(round(iters * k) for k in (0.4, 0.65, 0.85)), iters]
    states = [sc.long_state(k, bounds) for k in range(iters)]
    assert states == slow_states(bounds)
    assert [k for k, _ in itertools.groupby(states)] == [0, 1, 2, 3] * 3 + [-1]
    late = [sc.long_state(k, bounds, released=True) for k in range(iters)]
    assert [late[b] for b in bounds[1:4]] == [3, 3, 3] and late[bounds[3] + 1] == -1


@pytest.mark.parametrize("span, crop", [(80, 224), (80, 160), (64, 112)])
def test_shapes_of_the_cycles_are_those_of_the_table(span, crop):
    small, tiny_ = int(crop / 2 ** 0.5), int(int(crop / 2 ** 0.5) / 2 ** 0.5)
    table = {0: (span // 4, [(tiny_, 2), (small, 1)]), 1: (span // 2, [(tiny_, 2), (small, 1)]),
             2: (span // 2, [(crop // 2, 4), (small, 2), (crop, 1)]),
             3: (span, [(crop // 2, 4), (small, 2), (crop, 1)])}
    table[-1] = table[3]
    for state, (frames, places) in table.items():
        for step in range(12):
            place = sc.short_state(step, state)
            assert place == step % len(places)
            assert sc.clip_shape(state, place, span, crop) == (frames, *places[place])


@pytest.mark.parametrize("iters, warmup", [(100, 0), (1000, 50), (37, 10)])
def test_the_multigrid_rate_scales_with_the_long_batch(iters, warmup):
    bounds, milestones = sc.cycle_bounds(iters), [iters // 2, iters - 5]
    for k, state in enumerate(slow_states(bounds)):
        want = 0.2 * {0: 8, 1: 4, 2: 2, 3: 1, -1: 1}[state]
        for m in milestones:
            want *= 0.1 if k >= m else 1
        rise = min(1, (k + 1) / warmup) if warmup else 1
        assert sc.multigrid_lr(k, 0.2, bounds, milestones, warmup) == pytest.approx(want * rise)
        if k < 2:
            assert sc.multigrid_lr(k, 0.2, bounds, milestones, warmup, True) == pytest.approx(want)


def test_the_pretraining_rate_falls_at_milestones_and_warms_up():
    for k in range(100):
        want = 0.05 * (0.1 if k >= 40 else 1) * (0.1 if k >= 80 else 1) * min(1, (k + 1) / 10)
        head, backbone = sc.ssdet_lr(k, 0.05, [40, 80], 10, 0.3)
        assert (head, backbone) == pytest.approx((want, 0.3 * want))
        head, backbone = sc.ssdet_lr(k, 0.05, [40, 80], 10, 0.3, released=True)
        assert head == pytest.approx(0.05 if k < 2 else want)
        assert backbone == pytest.approx(0.3 * head if k < 2 else head)


def run_of(multigrid, iters=2000, n=40_000, falls=(4, 6, 9)):
    """Shapes of all steps of a classification run, whose rate falls at tenths of it."""
    args = SimpleNamespace(stage="pretrain", multigrid=multigrid, iters=iters, batch_size=128,
                           groups=16, num_frames=8, stride=10, crop=224, compat="fixed", epochs=7,
                           milestones=[iters * k // 10 for k in falls])
    steps, shape = sc.shapes(args, n)
    return args, steps, [shape(k) for k in range(steps)]


@pytest.mark.parametrize("multigrid", ["off", "x3d", "fair"])
def test_every_batch_of_a_run_has_equal_parts(multigrid):
    args, steps, found = run_of(multigrid)
    assert steps == args.iters or multigrid == "fair"
    for s in found:
        assert s.batch % s.groups == 0 and s.batch >= args.batch_size
        assert s.groups % args.groups == 0 and 1 <= s.frames <= args.num_frames
        assert 32 <= s.crop <= args.crop
        if multigrid == "off":
            assert s == (128, 8, 224, 1.0, 16)
    assert found[-1].frames == 8 and {s.crop for s in found[-3:]} == (
        {224} if multigrid == "off" else {112, 158, 224})


def test_a_run_of_three_cycles_has_rates_and_parts_of_its_batches():
    args, _, found = run_of("x3d")
    states = slow_states(sc.cycle_bounds(args.iters))
    for k, (s, state) in enumerate(zip(found, states)):
        scale = {0: 8, 1: 4, 2: 2, 3: 1, -1: 1}[state]
        factors = [2, 1] if state in (0, 1) else [4, 2, 1]
        assert s.lr == scale and s.groups == 16 * scale
        assert s.batch == 128 * scale * factors[k % len(factors)]
        assert s.frames == {0: 2, 1: 4, 2: 4, 3: 8, -1: 8}[state]
    runs = [(lr, sum(1 for _ in g)) for lr, g in itertools.groupby(s.lr for s in found)]
    assert [lr for lr, _ in runs] == [8, 4, 2, 1] * 3
    assert runs[-1][1] == 100 + 300                           # the last state, then the full shape


def test_a_schedule_of_the_authors_without_falls_stays_at_its_rate():
    _, _, found = run_of("fair", falls=())
    assert {s.lr for s in found} == {1.0} and {s.frames for s in found} == {8}


def test_the_authors_schedule_ends_and_its_rate_falls():
    args, steps, found = run_of("fair", iters=20_000)
    epochs = args.iters * args.batch_size / 40_000
    seen = sum(s.batch for s in found) / 40_000
    assert seen == pytest.approx(1.5 * epochs, rel=0.05)
    assert steps < args.iters                                 # that is what it is for
    stretches = [k for k, _ in itertools.groupby((s.frames, s.groups, round(s.lr, 9))
                                                 for s in found)]
    batches = [16, 8, 4, 2, 1]
    groups = [g for _, g, _ in stretches]
    assert set(groups) <= {16 * b for b in batches} and groups[-1] == 16
    for a, b in itertools.pairwise(stretches):                # of one rate, larger shapes
        assert b[1] < a[1] or b[1] >= 2 * a[1] or b[2] < a[2]
    base = [round(math.log10(lr / (g / 16)), 6) for _, g, lr in stretches]
    assert base == sorted(base, reverse=True) and base[0] == 0 and base[-1] == -3
    assert {s.frames for s in found} == {2, 4, 8}
    falls = [round(epochs * m / args.iters) for m in args.milestones]
    *_, before, last = sc.fair_schedule([0, *falls], epochs, args.num_frames, args.crop)
    lowest = sum(s.batch for s in found if s.lr < 2e-3) / 40_000          # half of the last one
    assert lowest == pytest.approx((last.end - before.end) / 2, rel=0.1)


@pytest.mark.parametrize("steps, epochs", [
    ([0, 40, 60, 90], 100), ([0, 10], 20), ([0, 1, 2], 9),
    ([0], 5)])
@pytest.mark.parametrize("short", [True, False])
def test_the_authors_schedule_shares_epochs_by_batch(steps, epochs, short):
    T, S = 8, 224
    plan = sc.fair_schedule(steps, epochs, T, S, short)
    shapes = [(2, 158), (4, 158), (4, 224), (8, 224)]
    mean, last = [], []
    for t, s in shapes:
        sides = [S * 0.5, S * 0.5 ** 0.5, s] if short else [s]
        batch = [round(T * S * S / (t * k * k)) for k in sides]
        mean.append(sum(batch) / len(batch))
        last.append(batch[-1])
    raw, rows = [], []
    for k in range(len(steps) - 1):
        for shape, m, b in zip(shapes, mean, last):
            raw.append((steps[k + 1] - steps[k]) * m / sum(mean))
            rows.append((k, b, *shape))
    if len(steps) > 1:                                        # as many iterations are saved
        saving = steps[-1] / sum(x / m for x, m in zip(raw, mean * len(steps)))
        raw.append((epochs - steps[-1]) / saving * mean[-1])
    else:
        raw.append(1)
    rows.append((len(steps) - 1, last[-1], *shapes[-1]))
    ends = [round(sum(raw[:i + 1]) * 1.5 * epochs / sum(raw)) for i in range(len(raw))]
    assert [tuple(c[:4]) for c in plan] == rows
    assert [c.end for c in plan] == pytest.approx(ends, abs=1)
    assert plan[-1].end == round(1.5 * epochs)


def batches_of(monkeypatch, world, start, steps, n=50, seed=3):
    """[[batches of each process]] of steps whose sizes change."""
    def shape(k):
        return sc.Shape((4, 8, 12, 20)[k % 4], k % 3 + 1, 32 + k, 1.0, 4)
    found = []
    for rank in range(world):
        monkeypatch.setattr(common, "rank", lambda r=rank: r)
        monkeypatch.setattr(common, "world_size", lambda: world)
        sampler = sc.CycleSampler(n, shape, seed, start, steps)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1]) == max(0, steps - start)
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_batch_that_one_has(world, monkeypatch):
    (whole,) = batches_of(monkeypatch, 1, 0, 40)
    for start in (0, 1, 17, 40):
        shares = batches_of(monkeypatch, world, start, 40)
        assert [sum(b, []) for b in zip(*shares)] == whole[start:]
        assert all(len(b) == len(shares[0][k]) for s in shares for k, b in enumerate(s))
    assert [(b[0][1], b[0][2], len(b)) for b in whole[:5]] == [
        (1, 32, 4), (2, 33, 8), (3, 34, 12), (1, 35, 20), (2, 36, 4)]


def test_epochs_are_permutations_one_behind_the_other(monkeypatch):
    (whole,) = batches_of(monkeypatch, 1, 0, 41)
    keys = sum(whole, [])
    orders = []
    for epoch in range(len(keys) // 50):
        part = keys[50 * epoch:50 * epoch + 50]
        assert {k[0] for k in part} == {epoch}
        orders.append([k[3] for k in part])
        assert sorted(orders[-1]) == list(range(50))
    assert len(orders) == 8 and len({tuple(o) for o in orders}) == 8
    (other,) = batches_of(monkeypatch, 1, 0, 41, seed=4)
    assert other != whole
    with pytest.raises(UserError, match="19 .* batch of 20"):
        batches_of(monkeypatch, 1, 0, 41, n=19)


@pytest.mark.parametrize("seed", range(12))
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
        assert sc.plateau_falls(losses[:k + 1].tolist()) == count
    assert count > 0 and sc.plateau_falls([]) == 0


# ---- metrics -----------------------------------------------------------------------------------

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
    for seed in range(15):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, 4, N) / 4 if ties else rng.normal(size=N)
        targets = (rng.random(N) < rng.choice([0, 0.2, 0.8])).astype(float)
        weights = rng.random(N) + 0.1 if weighted else None
        got = sc.average_precision(torch.from_numpy(scores), torch.from_numpy(targets),
                                   None if weights is None else torch.from_numpy(weights))
        assert got == pytest.approx(slow_precision(scores, targets, weights), abs=1e-12)


def test_average_precision_in_numbers():
    ap = lambda s, y: sc.average_precision(torch.tensor(s), torch.tensor(y))        # noqa: E731
    assert ap([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)
    assert ap([0.5, 0.5], [0, 1]) == 0.5 and ap([0.5, 0.5], [1, 0]) == 1 and ap([1.0], [0]) == 0


def slow_localize(truth, scores):
    """Charades_v1_localize.m, line by line."""
    truth, scores = np.concatenate(truth), np.concatenate(scores)
    ap, counts = [], []
    for c in range(truth.shape[1]):
        order = sorted(range(len(scores)), key=lambda i: -scores[i, c])
        tp = fp = 0
        precisions = []
        for i in order:
            tp, fp = tp + int(truth[i, c]), fp + 1 - int(truth[i, c])
            if truth[i, c]:
                precisions.append(tp / (tp + fp))
        counts.append(tp)
        ap.append(sum(precisions) / tp if tp else math.nan)
    there = [c for c, n in enumerate(counts) if n]
    return (ap, sum(ap[c] for c in there) / len(there),
            sum(ap[c] * counts[c] for c in there) / sum(counts))


@pytest.mark.parametrize("seed", range(5))
def test_the_official_metric_is_that_of_the_matlab_file(seed):
    rng = np.random.default_rng(seed)
    truth = [(rng.random((25, 9)) < 0.2).astype(np.uint8) for _ in range(4)]
    scores = [np.round(rng.random((25, 9)), 1) for _ in range(4)]         # with ties
    for v in range(4):
        truth[v][:, 5] = 0
        scores[v][rng.random(25) < 0.2] = -np.inf
    scores[2][:] = -np.inf                                    # a video that was not submitted
    ap, mean, weighted = sc.charades_localize(truth, scores)
    want, want_mean, want_weighted = slow_localize(truth, scores)
    assert np.isnan(ap[5]) and ap.tolist() == pytest.approx(want, abs=1e-12, nan_ok=True)
    assert (mean, weighted) == pytest.approx((want_mean, want_weighted), abs=1e-12)
    empty = [np.zeros((25, 2), np.uint8)]
    ap, *rest = sc.charades_localize(empty, [np.zeros((25, 2))])
    assert np.isnan(ap).all() and np.isnan(rest).all()


def test_the_truth_of_25_times_includes_both_ends():
    actions = [(0, 4.0, 8.0), (1, 0.0, 0.0), (1, 9.5, 9.7), (2, 24.0, 99.0), (2, 3.0, 2.0),
               (3, 24.5, 30.0), (4, 3.9, 4.1), (4, 8.0, 8.0)]
    truth = sc.localization_truth(actions, 25.0, 6)
    times = [j / 25 * 25.0 for j in range(25)]
    assert sc.localization_times(25.0).tolist() == times
    for j, c in itertools.product(range(25), range(6)):
        assert truth[j, c] == any(k == c and s <= times[j] <= e for k, s, e in actions)
    assert truth.sum(0).tolist() == [5, 1, 1, 0, 2, 0]
    rng = np.random.default_rng(0)
    for length in rng.uniform(2, 90, 20):
        rows = [(int(c), *np.sort(rng.uniform(0, length, 2))) for c in rng.integers(0, 4, 5)]
        got = sc.localization_truth(rows, length, 4)
        for j, c in itertools.product(range(25), range(4)):
            assert got[j, c] == any(k == c and s <= j / 25 * length <= e for k, s, e in rows)


@pytest.mark.parametrize("n", [1, 2, 10, 24, 25, 26, 100, 719, 3000])
def test_25_frames_are_the_nearest_or_the_releases(n):
    for fps in (24.0, 29.97, 7.5):
        for seconds in (n / fps, n / fps * 1.01):
            got = sc.frames_of_25(n, seconds, fps)
            assert len(got) == 25
            for j, frame in enumerate(got):
                time = j / 25 * seconds
                best = min(abs(k / fps - time) for k in range(n))
                assert 0 <= frame < n and abs(frame / fps - time) <= best + 1e-9
    assert sc.frames_of_25(n, None, None, True).tolist() == [
        min(n - 1, 1 + j * (n // 25)) for j in range(25)]


@pytest.mark.parametrize("limit", [1000, 8, 20])
def test_long_videos_are_cut_at_the_limit_and_nowhere_empty(limit):
    for T in [*range(1, limit + 12), *(k * limit + d for k in (2, 3, 7) for d in (-1, 0, 1, 5))]:
        pieces = sc.chunks(T, limit)
        assert [t for a, b in pieces for t in range(a, b)] == list(range(T))
        sizes = [b - a for a, b in pieces]
        assert min(sizes) > 0
        assert sizes == [T] if T < limit + 5 else (
            set(sizes[:-1]) == {limit} and sizes[-1] <= limit)
    assert sc.chunks(2 * limit, limit) == [(0, limit), (limit, 2 * limit)]


@pytest.mark.parametrize("n, duration", [(1, 0.5), (16, 2.0), (40, 10.0), (37, 3.21), (240, 9.97)])
def test_frames_have_the_labels_of_actions_strictly_around_them(n, duration):
    rng = np.random.default_rng(n)
    actions = [(int(c), *np.sort(rng.uniform(-1, duration + 1, 2))) for c in rng.integers(0, 5, 9)]
    actions += [(5, 0.0, 0.5), (5, 1.0, 1.25), (6, 2.0, 1.0)]
    got, fps = sc.frame_labels(actions, n, duration, 8), n / duration
    for c, t in itertools.product(range(8), range(n)):
        assert got[c, t] == any(k == c and s < t / fps < e for k, s, e in actions)
    if n == 16:                                               # 8 per second: 0 and 0.5 are out
        assert np.flatnonzero(got[5]).tolist() == [1, 2, 3, 9]


# ---- which frames ------------------------------------------------------------------------------

LENGTHS = [1, 2, 5, 9, 10, 11, 79, 80, 81, 159, 160, 161, 250, 300, 641, 1000]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size, stride", [(80, 5), (80, 10), (64, 1)])
def test_training_clips_of_kinetics_lie_in_the_video(n, size, stride):
    last = sc.last_begin(n, size)
    assert last == (n - size - 1 if n > size else 0)
    for begin, faster in itertools.product({0, last // 2, last}, (1, 2, 4)):
        for span in (None, size // 2, size // faster):
            got = sc.kinetics_numbers(n, begin, size, stride, faster, span).tolist()
            there = []
            for k in range(begin, begin + size):
                if (k - begin) % (stride * faster) == 0 and k < n:
                    there.append(k)
            wanted = (span or size) // stride
            assert got == [there[k % len(there)] for k in range(wanted)]
            assert len(got) == wanted and 0 <= min(got) and max(got) < n


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size, stride", [(80, 5), (80, 10), (16, 2)])
def test_validation_crops_are_evenly_spread_and_lie_in_the_video(n, size, stride):
    got, T = sc.kinetics_crops(n, size, stride), size // stride
    frames = [k for k in range(n) if k % stride == 0]
    assert got.shape == (3, T)
    step = max(0, (len(frames) - 1 - T) // 2) if len(frames) - 1 >= T else 0
    for c, row in enumerate(got.tolist()):
        mine = frames[c * step:c * step + T]
        assert row == [mine[k % len(mine)] for k in range(T)] and max(row) < n
    if len(frames) > T + 2:
        assert got[0, 0] < got[1, 0] < got[2, 0] and (np.diff(got, axis=1) == stride).all()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("T, stride", [(64, 10), (16, 5), (8, 1)])
def test_clips_of_long_videos_are_full_and_lie_in_the_video(n, T, stride):
    span = T * stride
    first, last = sc.start_range(n, span, stride)
    assert (first, last) == (0, max(0, n - span))
    for start in {first, (first + last) // 2, last}:
        got = sc.clip_numbers(n, start, span, stride).tolist()
        assert got == [k for k in range(n) if start <= k < start + span
                       and (k - start) % stride == 0]
        assert len(got) == min(T, -(-n // stride)) and got[-1] < n
    assert sc.clip_numbers(n, last, span, stride)[-1] + stride >= n       # the end can be seen
    released = sc.start_range(n, span, stride, released=True)
    assert released == (0, min(n, max(stride, n - span)) - 1)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("stride", [1, 5, 10])
def test_whole_videos_leave_out_a_begun_stride_or_nothing(n, stride):
    numbers, length = sc.test_numbers(n, stride)
    full = [k for k in range(0, n, stride) if k + stride <= n] or [0]
    assert numbers.tolist() == full and length == min(n, len(full) * stride)
    numbers, length = sc.test_numbers(n, stride, whole=True)
    assert numbers.tolist() == list(range(0, n, stride)) and length == n


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("stride, T", [(10, 24), (5, 16)])
def test_both_streams_see_frames_of_the_video(n, stride, T):
    span, rng = T * stride, np.random.default_rng(n)
    for _ in range(10):
        start = int(rng.integers(0, max(0, n - span) + 1))
        fine_start = int(rng.integers(0, start + 1))
        coarse, fine, meta = sc.two_stream_clips(n, start, fine_start, span, span, stride, True)
        for got, s in ((coarse, start), (fine, fine_start)):
            assert got.tolist() == [k for k in range(s, min(n, s + span), stride)] != []
        assert meta == ((start - fine_start) // stride, min(n, span) // stride, n // stride, 1)
        assert meta[0] >= 0
    coarse, fine, meta = sc.two_stream_clips(n, 7, 7, span, span, stride, False)
    assert coarse.tolist() == list(range(0, n, stride))       # all, whatever the starts
    first = max(0, (n - 2 * span) // 2 - 1)
    assert fine.tolist() == list(range(first, min(n, first + 2 * span), stride))
    assert meta == (-first // stride, n // stride, n // stride, 1)
