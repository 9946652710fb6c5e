"""F2C and F2C2V: transformations, labels, encoder, CRF, feature files, every stage, restarts."""

import csv
import itertools
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import running
import torch
import toy
from running import command
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import f2c_oops as f
from common import UserError, VideoError


def quick(*args, **kwargs):
    return running.quick(*args, **kwargs, script="f2c_oops")


def run(folder, *flags, n=1, **kwargs):
    r = quick(folder / "q", *flags, "--out", folder, n=n, **kwargs)
    assert r.code == 0, r.err
    return r


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def metrics(folder):
    return json.loads((folder / "metrics.json").read_bytes())


# ---- transformations of clips --------------------------------------------------------------------

ALL = list(f.CLIP_TRANSFORMS)


def clips_of(T, seed, released=False, names=ALL, reach="half"):
    c = f.draw_clip_choices(np.random.default_rng(seed), T, names, 20, reach, released)
    return f.transform_clips(T, c, names)


@pytest.mark.parametrize("T", [21, 22, 38, 39, 40, 41, 79, 80, 159, 160, 161, 300, 4000])
def test_every_transformed_clip_has_twenty_frames_of_the_video(T):
    for seed in range(60):
        made = clips_of(T, seed)
        assert [n for n, _ in made][1:] == ["normal", "shuffle", "flip", "point", "warp"]
        for name, frames in made:
            assert len(frames) == 20 and 0 <= frames.min() <= frames.max() < T, (name, frames)


@pytest.mark.parametrize("T", [30, 60, 170, 500])
def test_clips_are_what_their_names_say(T):
    for seed in range(40):
        (speed, fast), *rest = clips_of(T, seed)
        made = dict(rest)
        assert set(np.diff(fast)) == {2 ** f.SPEEDS.index(speed)}
        assert set(np.diff(made["normal"])) == {1}
        ordered = np.sort(made["shuffle"])
        assert set(np.diff(ordered)) == {1} and (made["shuffle"] != ordered).any()
        steps = np.diff(made["flip"])
        turn = int((steps == 0).argmax()) if (steps == 0).any() else 19
        assert (steps[:turn] == 1).all() and (steps[turn + 1:] == -1).all() and turn < 19
        k = int((made["point"] == made["normal"][-1]).argmax()) + 1
        assert 5 <= k <= 15 and list(made["point"]) == [*made["normal"][20 - k:], *fast[:20 - k]]
        assert (np.diff(made["warp"]) > 0).all() and len(set(np.diff(made["warp"]))) > 1


def test_the_released_clips_betray_two_classes_by_their_length():
    lengths = {n: len(x) for n, x in clips_of(30, 0, released=True)}
    assert lengths == {"normal": 20, "shuffle": 19, "flip": 20, "point": 20, "warp": 19}
    for T, seed in itertools.product((25, 39, 60, 90, 170, 400), range(40)):
        assert all(0 <= x.min() <= x.max() < T for _, x in clips_of(T, seed, released=True))


def test_crops_begin_in_the_first_half_of_the_places_or_anywhere():
    rng = np.random.default_rng(0)
    half = {f.random_start(rng, 31, 20) for _ in range(500)}
    full = {f.random_start(rng, 31, 20, "full") for _ in range(500)}
    assert half == set(range(6)) and full == set(range(12))


@pytest.mark.parametrize("left_out", [[n] for n in ALL] + [ALL[:4], ALL[4:], ["normal", "x8"]])
def test_transformations_can_be_left_out(left_out):
    names = [n for n in ALL if n not in left_out]
    seen = set()
    for seed in range(80):
        for name, frames in clips_of(200, seed, names=names):
            assert name in names and len(frames) == 20
            seen.add(name)
    assert seen == set(names)
    assert [f.label_of(n, names) for n in names] == list(range(len(names)))


# ---- transformations of videos -------------------------------------------------------------------

VIDEO = list(f.VIDEO_TRANSFORMS)


@pytest.mark.parametrize("T", [16, 31, 32, 100, 192, 193, 250, 1000])
def test_versions_of_a_video_are_what_their_names_say(T):
    whole = np.arange(T // 16 * 16).reshape(-1, 16)
    for seed in range(20):
        c = f.draw_video_choices(np.random.default_rng(seed), T)
        made = dict(f.transform_video(T, c, VIDEO))
        assert set(made) == set(VIDEO if T > 192 else ["normal", "flip", "shuffle", "warp"])
        assert (made["normal"] == whole).all()
        assert sorted(map(tuple, made["shuffle"])) == sorted(map(tuple, whole))
        flat = made["flip"].ravel()
        turn = c["flip"]
        assert list(flat) == [*range(turn), *range(len(flat) - 1, turn - 1, -1)]
        assert 0.25 * len(flat) - 16 < turn < 0.75 * len(flat)
        assert list(np.roll(made["warp"].ravel(), c["warp"])) == list(range(whole.size))
        if T > 192:
            assert set(np.diff(made["speed"].ravel())) == {3} and len(made["speed"]) >= 4
            flat, cut = made["point"].ravel(), len(whole) // 2 * 16
            assert list(flat[:cut]) == list(range(cut)) and set(np.diff(flat[cut:])) == {3}


@pytest.mark.parametrize("video", [False, True])
def test_a_video_is_used_if_something_can_be_made_of_it(video):
    every = f.VIDEO_TRANSFORMS if video else f.CLIP_TRANSFORMS
    groups = [c for k in (1, 2) for c in itertools.combinations(every, k)] + [every]
    for T, chosen, released in itertools.product((5, 16, 20, 21, 39, 40, 80, 192, 193), groups,
                                                 (False, True)):
        made = []
        if T >= (16 if video else 21):
            for seed in range(20):
                rng = np.random.default_rng(seed)
                made.append(f.transform_video(T, f.draw_video_choices(
                    rng, T, released=released), chosen) if video else f.transform_clips(
                    T, f.draw_clip_choices(rng, T, chosen, released=released), chosen))
        assert f.possible(T, chosen, video, 20, released) == (all(made) and bool(made))


def test_labels_of_versions_and_the_releases_collision():
    assert [f.label_of(n, VIDEO) for n in VIDEO] == list(range(6))
    assert [f.label_of(n, VIDEO, released=True) for n in VIDEO] == [0, 1, 3, 3, 4, 5]


# ---- clips of labelled videos --------------------------------------------------------------------

@pytest.mark.parametrize("fps", ["15", "16", "24", "25", "30000/1001", "30", "32", "48", "60"])
@pytest.mark.parametrize("T", [15, 47, 90, 301])
def test_clips_lie_on_a_grid_of_sixteen_frames_a_second(fps, T):
    top, bottom = ([*map(int, fps.split("/"))] + [1])[:2]
    times = np.arange(T) * bottom / top
    for step in (4, 16, 3):
        frames, spans = f.cut_clips(T, top / bottom, times, step)
        for j, (row, (start, stop)) in enumerate(zip(frames, spans)):
            for k, frame in enumerate(row):                   # ⌊(16 parts of a second)·fps⌋
                assert abs(frame - math.floor((step * j + k) * top / (16 * bottom) + 1e-9)) <= (
                    (step * j + k) * top % (16 * bottom) == 0)
            assert (start, stop) == (times[row[0]], times[row[-1]])
        positions = -(-T // (top // 16)) if bottom == 1 and top % 16 == 0 else math.floor(
            T * 16 * bottom / top + 1e-9)
        assert len(frames) == max(0, (positions - 16) // step + 1)


def slow_labels(spans, t, released):
    """In the benchmark's words: 0 until the first clip with t, 1 while they have it, then 2."""
    holds = [a <= t <= b for a, b in spans]
    if not any(holds):
        between = [i for i, (a, _) in enumerate(spans) if a > t]
        if released or not between:
            return [0] * len(spans)
        i = between[0]
        near = i if i == 0 or spans[i][0] - t < t - spans[i - 1][1] else i - 1
        return [0] * near + [1] + [2] * (len(spans) - near - 1)
    first = holds.index(True)
    return [0 if i < first else 1 if holds[i] else 2 for i in range(len(spans))]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("step", [4, 16])
def test_labels_run_from_intentional_to_unintentional(step, released):
    rng = np.random.default_rng(1)
    for _ in range(300):
        T = int(rng.integers(20, 300))
        _, spans = f.cut_clips(T, 30, np.arange(T) / 30, step)
        t = rng.uniform(0, T / 30)
        assert list(f.run_labels(spans, t, released)) == slow_labels(spans.tolist(), t, released)


def test_anticipation_shows_the_clip_before_or_labels_what_follows():
    _, spans = f.cut_clips(180, 30, np.arange(180) / 30, 4)
    t = 3.1
    which, labels = f.anticipation(spans, t, 1.5, "paper", 4)
    assert list(which) == list(range(len(spans)))
    assert [*labels] == [1 if a <= t - 1.5 <= b else 2 if a > t - 1.5 else 0 for a, b in spans]
    which, labels = f.anticipation(spans, t, 1.5, "oops", 4)
    whole = f.run_labels(spans, t)
    assert list(which) == list(range(len(spans) - 6)) and list(labels) == list(whole[6:])
    for ahead in (0.5, 1.0, 2.0, 30.0):
        which, labels = f.anticipation(spans, t, ahead, "oops", 4)
        assert len(which) == len(labels) == max(0, len(spans) - round(4 * ahead))


def test_balancing_copies_the_rarer_labels_of_each_video():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = np.repeat([0, 1, 2], rng.integers(0, 30, 3))
        if not len(labels):
            continue
        picked = f.balanced(labels, np.random.default_rng(3))
        assert list(picked[:len(labels)]) == list(range(len(labels)))
        counts = np.bincount(labels, minlength=3)
        got, most = np.bincount(labels[picked], minlength=3), counts.max()
        for c, ratio in enumerate((1, 0.93, 1 / 0.93)):
            if counts[c] and c != counts.argmax():
                assert got[c] == max(counts[c], round(most * ratio)), (c, counts, got)
                copies = np.bincount(picked[len(labels):], minlength=len(labels))[labels == c]
                assert copies.max() - copies.min() <= 1       # all of them in turn
        assert got[counts.argmax()] == most


# ---- encoder -------------------------------------------------------------------------------------

SIZE = {"layers": 2, "heads": 2, "window": 6, "ff": 12, "positions": 11, "dropout": 0.0}


def slow_encoder(e, x, seen):
    """One sequence (n, E) of which `seen` tokens, the class token among them, exist: token by
    token and head by head, from the definition.
    """
    E, P = x.shape[1], e.position.num_embeddings
    norm = lambda v, m: (v - v.mean()) / (v.var(unbiased=False) + m.eps).sqrt() * m.weight + m.bias  # noqa: E731
    h = [norm(e.cls_token[0, 0] + e.position.weight[P - 2] + e.kind.weight[1], e.norm)]
    for j, row in enumerate(x):
        h.append(norm(row + e.position.weight[j % (P - 2)] + e.kind.weight[0], e.norm))
    h = h[:seen]
    for layer in e.layers:
        d, rows = E // layer.heads, []
        for i in range(len(h)):
            q, k, v = ((layer.query_global, layer.key_global, layer.value_global) if i == 0 else
                       (layer.query, layer.key, layer.value))
            near = [j for j in range(len(h)) if i == 0 or j == 0 or abs(i - j) <= layer.reach]
            parts = []
            for a in range(layer.heads):
                s = slice(a * d, a * d + d)
                w = torch.stack([(q(h[i])[s] * k(h[j])[s]).sum() / d ** 0.5 for j in near])
                w = w.exp() / w.exp().sum()
                parts.append(sum(p * v(h[j])[s] for p, j in zip(w, near)))
            rows.append(torch.cat(parts))
        h = [norm(layer.out(r) + a, layer.norm1) for r, a in zip(rows, h)]
        h = [norm(layer.fc2(F.gelu(layer.fc1(a))) + a, layer.norm2) for a in h]
    return torch.stack(h)


@pytest.mark.parametrize("dense", [400, 2])
def test_the_encoder_is_the_longformer_of_the_definition(dense, monkeypatch):
    monkeypatch.setattr(f, "DENSE", dense)                    # 2: blocks
    torch.manual_seed(0)
    e = f.Encoder(8, **SIZE, init_std=0.5).eval()
    x = torch.randn(3, 17, 8)
    lengths = torch.tensor([17, 9, 1])
    got = e(x, lengths, every=True)
    for i, n in enumerate(lengths.tolist()):
        assert torch.allclose(got[i, :1 + n], slow_encoder(e, x[i], 1 + n), atol=1e-5)
    assert torch.allclose(e(x, lengths), got[:, 0], atol=1e-6)
    assert torch.allclose(e(x[1:2, :9]), got[1:2, 0], atol=1e-6)    # nothing past the length counts


@pytest.mark.parametrize("n, reach", [(30, 4), (200, 16), (65, 100), (129, 2), (64, 3), (128, 64)])
def test_blocks_of_attention_equal_the_whole(n, reach):
    g = torch.Generator().manual_seed(n)
    q, k, v = torch.randn(3, 2, 3, n, 8, generator=g, requires_grad=True).unbind(0)
    for seen in (None, torch.arange(n) < torch.tensor([[n], [max(1, n // 3)]])):
        rows = torch.ones(2, n, dtype=torch.bool) if seen is None else seen
        outs = [a(q, k, v, seen, reach).transpose(1, 2)[rows] for a in (
            f.whole_attention, f.block_attention)]
        assert torch.allclose(*outs, atol=1e-6)
        grads = [torch.autograd.grad(o.pow(2).sum(), (q, k, v), retain_graph=True) for o in outs]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads))


def padded(e, x, multiple=64):
    """The class token's row as the release computes it: tokens up to a multiple of 64, and all
    seven projections of each of them in each layer.
    """
    B, n, E = x.shape
    total, last = -(-(1 + n) // multiple) * multiple, e.position.num_embeddings - 2
    place = torch.cat([torch.tensor([last]), torch.arange(n) % last,
                       torch.full((total - n - 1,), last + 1)])
    h = torch.cat([e.cls_token.expand(B, -1, -1), x, -torch.ones(B, total - n - 1, E)], 1)
    h = e.drop(e.norm(h + e.position(place) + e.kind((place == last).long())))
    i, seen = torch.arange(total), torch.arange(total) <= n
    for layer in e.layers:
        q, k, v, q0, k0, v0 = (p(h).unflatten(2, (layer.heads, -1)).transpose(1, 2) for p in (
            layer.query, layer.key, layer.value, layer.query_global, layer.key_global,
            layer.value_global))
        near = (((i[:, None] - i).abs() <= layer.reach) | (i == 0)) & seen
        p = layer.p if e.training else 0.0
        rows = F.scaled_dot_product_attention(q, k, v, near, p)
        first = F.scaled_dot_product_attention(q0[:, :, :1], k0, v0, seen[None], p)
        rows = torch.cat([first, rows[:, :, 1:]], 2).transpose(1, 2).flatten(2)
        h = layer.norm1(layer.drop(layer.out(rows)) + h)
        h = layer.norm2(layer.drop(layer.fc2(F.gelu(layer.fc1(h)))) + h)
    return h[:, 0]


def test_a_step_at_the_published_size_takes_a_third_of_the_padded_work():
    """Of the products; how long they take, `make bench` measures: here the machine may be busy."""
    torch.manual_seed(0)
    model = f.F2C(768, 8, **{k: v for k, v in f.SHAPE.items() if k != "mlp"}).eval()
    x, label = torch.randn(24, 20, 768), torch.arange(24) % 8
    assert torch.allclose(model.embed(x[:2]), padded(model.frames, x[:2]), atol=1e-5)
    work, seconds = {}, {True: [], False: []}
    model.train()
    for ours in (True, False) * 2:
        began = time.process_time()
        with FlopCounterMode(display=False) as counter:
            logits = model(x) if ours else model.head(padded(model.frames, x))
            F.cross_entropy(logits, label).backward()
        seconds[ours].append(time.process_time() - began)
        work[ours] = counter.get_total_flops()
    assert work[False] > 3 * work[True], work
    assert min(seconds[False]) > 2 * min(seconds[True]), seconds


def test_as_released_the_last_frame_and_the_last_clip_are_never_seen():
    torch.manual_seed(0)
    for released in (False, True):
        one = f.F2C(8, 3, 4, released, **SIZE).eval()
        x = torch.randn(2, 10, 8)
        other = x.clone()
        other[:, -1] = 5
        assert torch.equal(one(x), one(other)) == released
        two = f.F2C2V(8, 3, 4, released, per_clip=True, **SIZE).eval()
        x, order = torch.randn(5, 16, 8), torch.tensor([[0, 1, 2], [3, 4, -1]])
        other = x.clone()
        other[2] = other[4] = 5
        a, b = two(x, order), two(other, order)
        assert a.shape == (2, 3, 3)
        assert torch.equal(a[0], b[0]) == torch.equal(a[1, :2], b[1, :2]) == released


def test_only_what_is_read_learns_and_all_of_that_does():
    torch.manual_seed(0)
    order = torch.tensor([[0, 1, 2], [3, 4, -1]])
    for per_clip, tune in itertools.product((False, True), (False, True)):
        model = f.F2C2V(8, 3, 4, per_clip=per_clip, tune=tune, **SIZE)
        model(torch.randn(5, 16, 8), order).pow(2).sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name
        assert any(p.requires_grad for p in model.frames.parameters()) == tune
        assert model.train().frames.training == tune


def test_the_frozen_frame_encoder_has_dropout_in_the_release_alone():
    for released in (False, True):
        model = f.F2C2V(8, 3, 4, released, **{**SIZE, "dropout": 0.5}).train()
        assert model.frames.training == released and model.clips.training


def test_numbers_of_parameters_are_those_of_the_release_without_its_dead_ones():
    size = {**f.SHAPE, "mlp": None}
    size.pop("mlp")
    model = f.F2C(768, 8, **size)
    assert sum(p.numel() for p in model.parameters()) == 32_909_576


# ---- CRF and losses ------------------------------------------------------------------------------

def every_sequence(q, crf):
    """{labels: score} of one video's logits (n, K)."""
    a, b, A = (p.detach() for p in crf())
    return {y: float(a[y[0]] + b[y[-1]] + sum(q[j, y[j]] for j in range(len(y)))
                     + sum(A[y[j - 1], y[j]] for j in range(1, len(y))))
            for y in itertools.product(range(3), repeat=len(q))}


def test_the_crf_is_the_sum_over_all_sequences():
    torch.manual_seed(0)
    crf, n = f.CRF(3), torch.tensor([5, 1, 2])
    for p in crf.parameters():
        p.data.normal_()
    q = 2 * torch.randn(3, 5, 3)
    y = torch.full((3, 5), f.PAD)
    for i, k in enumerate(n.tolist()):
        y[i, :k] = torch.randint(3, (k,))
    nll, best, p = f.crf_nll(q, y, n, crf), f.crf_viterbi(q, n, crf), f.crf_marginals(q, n, crf)
    for i, k in enumerate(n.tolist()):
        scores = every_sequence(q[i, :k], crf)
        total = math.log(sum(map(math.exp, scores.values())))
        assert nll[i].item() == pytest.approx(total - scores[tuple(y[i, :k].tolist())], abs=1e-4)
        assert tuple(best[i].tolist()) == max(scores, key=scores.get)
        for j, c in itertools.product(range(k), range(3)):
            share = sum(math.exp(s - total) for labels, s in scores.items() if labels[j] == c)
            assert p[i, j, c].item() == pytest.approx(share, abs=1e-5)


def test_the_weighted_mean_is_that_of_the_equation():
    g = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(9, 3, generator=g), torch.tensor([1.1, 4.7, 1.0])
    label = torch.tensor([0, 1, 2, 2, f.PAD, 1, 0, f.PAD, 1])
    total = count = 0.0
    for row, y in zip(logits.tolist(), label.tolist()):
        if y >= 0:
            total -= weights[y].item() * (row[y] - math.log(sum(map(math.exp, row))))
            count += weights[y].item()
    a, b = f.cross_entropy(logits, label, weights)
    assert (a / b).item() == pytest.approx(total / count, rel=1e-5)
    a, b = f.cross_entropy(logits, label)
    assert b.item() == 7


def share(rank):
    """Loss and gradient of one of two processes that share a batch unevenly, and of all alone."""
    torch.manual_seed(0)
    w = torch.randn(4, 3, requires_grad=True)
    x, label = torch.randn(7, 4), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    weights = torch.tensor([1.0, 5.0, 2.0])
    whole = F.cross_entropy(x @ w, label, weights)
    expected = torch.autograd.grad(whole, w)[0]
    mine = slice(0, 5) if rank == 0 else slice(5, 7)
    loss = f.over_all(*f.cross_entropy(x[mine] @ w, label[mine], weights))
    got = torch.autograd.grad(loss, w)[0]
    torch.distributed.all_reduce(got)
    mean = common.mean({"loss": loss})["loss"]
    return {"gradient": float((got / 2 - expected).abs().max()), "loss": mean - float(whole)}


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    for found in running.processes(share, 2, tmp_path):
        assert abs(found["gradient"]) < 1e-6 and abs(found["loss"]) < 1e-6


def test_the_learning_rate_is_half_a_cosine_by_epoch():
    for e in range(50):
        want = 1e-6 + (1e-4 - 1e-6) * (math.cos(math.pi * e / 50) + 1) / 2
        assert f.learning_rate(1e-4, e, 50) == pytest.approx(want)


# ---- metrics -------------------------------------------------------------------------------------

def test_localization_is_counted_as_the_benchmark_does():
    rng = np.random.default_rng(0)
    hits, errors, lengths = [], [], []
    for _ in range(40):
        n = int(rng.integers(3, 12))
        spans = np.sort(rng.uniform(0, 9, (n, 2)))
        prob, t = rng.integers(0, 4, n) / 4, np.sort(rng.uniform(-1, 9, 3))
        t[t < 0] = -1
        best = max(range(n), key=lambda j: (prob[j], -j))
        t_hat = (spans[best][0] + spans[best][1]) / 2 if prob[best] > 0 else 0
        assert f.predicted_time(prob, spans) == pytest.approx(t_hat)
        errors.append(f.distance(t_hat, t))
        assert errors[-1] == pytest.approx(min(abs(t_hat - x) for x in t))
        lengths.append(rng.uniform(3, 9))
        hits.append(float(errors[-1] <= 0.25))
    got = f.localization(errors, lengths)
    assert got["within_0.25s"] == pytest.approx(100 * statistics.mean(hits))
    assert got["mean_error_s"] == pytest.approx(statistics.mean(errors))
    assert got["median_error_s"] == pytest.approx(statistics.median(errors))
    assert got["std_error_s"] == pytest.approx(statistics.stdev(errors))
    assert got["median_relative_error"] == pytest.approx(
        statistics.median(e / n for e, n in zip(errors, lengths)))


def test_chance_is_what_random_times_reach():
    rng = np.random.default_rng(0)
    for length, t in ((8.0, 3.0), (4.0, 0.1), (5.0, 4.9)):
        for k in (0.25, 1.0):
            drawn = abs(rng.uniform(0, length, 200_000) - t) <= k
            assert f.chance(length, t, k) == pytest.approx(drawn.mean(), abs=0.004)


def test_accuracy_is_counted_per_true_class():
    overall, each = f.accuracy(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]))
    assert overall == 0.5 and each == [0.5, 1.0, 0.0]
    assert math.isnan(f.accuracy(np.array([0]), np.array([0]))[1][2])


# ---- annotations ---------------------------------------------------------------------------------

def test_names_are_read_as_they_are(oops):
    root, names = oops / "annotations", {}
    for part in ("train", "val"):
        names[part] = f.read_names(root / f"{part}.txt")
        files = {p.name.removesuffix(".mp4") for p in (oops / "oops_video" / part).iterdir()}
        assert set(names[part]) == files
        assert set(f.read_names(root / "splits" / f"{part}_all_org.csv")) <= files
    every = names["train"] + names["val"]
    for odd in ',"\'&%#!':
        assert any(odd in n for n in every), odd
    assert any(ord(c) > 0xFFFF for n in every for c in n)     # emoji
    notes = f.read_notes(root / "transition_times.json")
    assert set(notes) <= set(every)
    fourth = f.read_notes(root / "heldout_transition_times.json", heldout=True)
    assert set(fourth) == set(notes) & set(names["val"])


def test_which_videos_have_labels():
    ok = f.Annotation((2.0, 2.1, 2.3), 5.0, (0.4, 0.42, 0.46))
    assert all(f.usable(ok, *x) for x in itertools.product(("train", "val"), ("clip", "video")))
    assert not f.usable(ok._replace(t=(-1, -1, 2.0)), "train", "clip")
    assert f.usable(ok._replace(t=(-1, 2.0, 2.1)), "train", "clip")
    for rel in ((0.001, 0.009, 0.5), (0.4, 0.991, 0.995)):
        assert not f.usable(ok._replace(rel_t=rel), "val", "video")
    for length, expected in ((2.9, "----"), (3.1, "-+--"), (3.2, "++++"), (30.0, "++++"),
                             (30.1, "-+--")):
        pairs = itertools.product(("train", "val"), ("clip", "video"))
        got = "".join("-+"[f.usable(ok._replace(len=length), *x)] for x in pairs)
        assert got == expected, length


NOTE = {"t": [2.0, 2.1, 2.3], "len": 5.0, "rel_t": [0.4, 0.42, 0.46], "stdev": 0.1,
        "rel_stdev": 0.1, "n_notfound": 0}
FAULTS = {
    "list": "[]", "number": '{"a": 3}', "no t": json.dumps({"a": {**NOTE, "t": None}}),
    "two times": json.dumps({"a": {**NOTE, "t": [1, 2]}}),
    "a word": json.dumps({"a": {**NOTE, "t": [1, 2, "x"]}}),
    "true": json.dumps({"a": {**NOTE, "t": [1, 2, True]}}),
    "nan": json.dumps({"a": {**NOTE, "t": [1, 2, math.nan]}}),
    "huge": json.dumps({"a": {**NOTE, "t": [1, 2, 1e30]}}),
    "object": json.dumps({"a": {**NOTE, "rel_t": {"x": 1}}}),
    "no rel_t": json.dumps({"a": {k: v for k, v in NOTE.items() if k != "rel_t"}}),
    "length": json.dumps({"a": {**NOTE, "len": 0}}),
    "length word": json.dumps({"a": {**NOTE, "len": "5"}}),
    "path": json.dumps({"../a": NOTE}), "absolute": json.dumps({"/etc/passwd": NOTE}),
    "dots": json.dumps({"..": NOTE}), "nul": json.dumps({"a\0b": NOTE}),
    "one time": json.dumps({"a": {"t": [3.0]}}), "surrogate": '{"\\ud800": {}}',
    "long": json.dumps({"é" * 200: NOTE}), "empty": json.dumps({"": NOTE}),
    "cut": json.dumps({"a": NOTE})[:-9], "nothing": "", "deep": "[" * 100_000}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_in_the_transition_times_names_file_and_entry(case, tmp_path):
    path = tmp_path / "transition_times.json"
    path.write_text(FAULTS[case])
    with pytest.raises(UserError) as e:
        f.read_notes(path)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize("data", [b"", b"\n\n", b"ok\n../x\n", b"ok\na/b\n", b"\xff\xfe\n",
                                  b"ok\nx\0y\n", b"n" * 300, b"..\n"])
def test_a_fault_in_a_list_of_names_is_one_line(data, tmp_path):
    (tmp_path / "train.txt").write_bytes(data)
    with pytest.raises(UserError, match="train.txt"):
        f.read_names(tmp_path / "train.txt")


def test_lists_may_end_anyhow(tmp_path):
    for text in ("a\nb\u2028c", "a\r\nb\u2028c\r\n", "\ufeffa\nb\u2028c\n\n"):
        (tmp_path / "x.txt").write_bytes(text.encode())
        assert f.read_names(tmp_path / "x.txt") == ["a", "b\u2028c"]
    (tmp_path / "x.csv").write_text('filename,t\n"a, ""b"".mp4",3\nc.mp4,4')
    assert f.read_names(tmp_path / "x.csv") == ['a, "b"', "c"]


def test_the_self_check_counts_the_clips_of_the_annotations(capsys):
    rng, notes, names = np.random.default_rng(0), {}, {"train": [], "val": []}
    for i in range(200):
        part, length = ("train", "val")[i % 2], float(rng.integers(20, 90)) / 8
        t = np.sort(rng.uniform(0, length, 3))
        notes[str(i)] = f.Annotation(tuple(t), length, tuple(t / length))
        names[part].append(str(i))
    found = f.official_counts(notes, names)
    counts = {step: np.zeros(3, int) for step in (4, 16)}
    for n in names["train"]:
        for step, least, most in ((16, 3.0, 1e9), (4, 3.2, 30)):
            v = notes[n]
            if not (least <= v.len <= most and 0.01 <= v.rel_t[1] <= 0.99):
                continue
            begins = [k / 16 for k in range(0, int(v.len * 16) - 15, step)]
            labels = slow_labels([(b, b + 15 / 16) for b in begins], v.t[1], True)
            counts[step] += np.bincount(labels, minlength=3)
    got = [ours for what, (_, ours) in found.items() if "clips" in what]
    assert got == [*counts[16], *counts[4]]
    f.self_check(notes, names)                                # not the official 10,961
    assert not capsys.readouterr().out
    f.self_check({**notes, **{f"x{i}": f.Annotation((-1.0,) * 3, 5.0, (-0.2,) * 3)
                              for i in range(10961 - 200)}}, names)
    assert capsys.readouterr().out.count("self-check DIFFERS") >= 6


# ---- feature files -------------------------------------------------------------------------------

def saved(path, **arrays):
    with open(path, "wb") as file:
        arrays.pop("compressed", None) or np.savez(file, **arrays)
    return path


def test_rows_are_read_alone_and_are_those_of_the_file(tmp_path):
    rng = np.random.default_rng(0)
    for n, dtype in itertools.product((1, 7, 300), (np.float16, np.float32, np.float64)):
        x = rng.normal(size=(n, 5)).astype(dtype)
        rows = rng.integers(0, n, 12)
        plain = saved(tmp_path / "a.npz", arr_0=x, fps=30.0, times=np.arange(n) / 30)
        np.savez_compressed(tmp_path / "b.npz", arr_0=x)
        np.savez(tmp_path / "c.npz", arr_0=np.asfortranarray(x))
        for path in (plain, tmp_path / "b.npz", tmp_path / "c.npz"):
            got = f.read_rows(f.look(path, None, "x"), rows)
            assert got.dtype == torch.float32 and np.array_equal(got, x[rows].astype(np.float32))


@pytest.mark.parametrize("case", ["nan", "empty", "text", "cut", "objects", "other name", "flat",
                                  "integers", "times", "nothing", "fps", "fps nan", "fps list",
                                  "words", "spans", "one time", "no time", "reversed", "ms",
                                  "still", "complex", "encrypted", "header", "short"])
def test_a_broken_feature_file_is_one_line_with_its_name(case, tmp_path):
    path, x = tmp_path / "a.npz", np.ones((40, 4), np.float32)
    arrays = {"arr_0": x, "times": np.arange(40) / 30, "fps": 30.0}
    arrays |= {"nan": {"arr_0": np.where(x * np.arange(4) == 3, np.nan, x)},
               "objects": {"arr_0": np.array([{}], dtype=object)}, "flat": {"arr_0": x[0]},
               "integers": {"arr_0": x.astype(int)}, "times": {"times": np.arange(3)},
               "nothing": {"arr_0": x[:0]}, "fps": {"fps": 0}, "fps nan": {"fps": math.nan},
               "fps list": {"fps": np.ones(3)}, "words": {"times": np.array(["a"] * 40)},
               "spans": {"spans": np.ones(40)}, "one time": {"times": np.float32(3)},
               "no time": {"times": np.full(40, np.inf)}, "reversed": {
                   "times": np.arange(40)[::-1] / 30}, "ms": {"times": np.arange(40) * 33.3},
               "still": {"times": np.zeros(40)}, "complex": {"times": np.arange(40) * 1j},
               "short": {"arr_0": x[:9], "times": np.arange(9) / 30}}.get(case, {})
    if case == "other name":
        arrays["x"] = arrays.pop("arr_0")
    np.savez(path, **arrays)
    if case in ("empty", "text", "cut"):
        data = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "cut": data[:len(data) // 2]}[case])
    if case in ("encrypted", "header"):
        data = bytearray(path.read_bytes())
        where = data.index(b"PK\1\2") + 8 if case == "encrypted" else data.index(b"(40, 4)") + 6
        data[where] = 1 if case == "encrypted" else ord("\n")
        path.write_bytes(data)
    note = f.Annotation((1.0, 1.0, 1.0), 4.0, (0.25,) * 3)
    with pytest.raises(VideoError) as e:
        f.read_rows(f.look(path, tmp_path / "a.mp4", "a", note), np.arange(40))
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)


def numbered(path, n, fps=30, size=(48, 64), options=None, b_frames=0):
    """A video whose k-th picture is of the grey level 20 + 2·(k mod 100)."""
    pictures = (np.full((*size, 3), 20 + 2 * (k % 100), np.uint8) for k in range(n))
    options = {"qp": "1", "preset": "ultrafast", **({"bf": str(b_frames)} if b_frames else {})}
    toy.write_video(path, pictures, fps, options=options)


@pytest.mark.parametrize("n, b_frames", [(5, 0), (64, 2), (65, 0), (150, 2)])
def test_features_are_of_every_frame_in_its_order_and_know_its_time(n, b_frames, tmp_path):
    numbered(tmp_path / "a.mp4", n, 25, b_frames=b_frames)
    times, level = [], []
    for i, fps, seen, x, _ in f.Pictures([str(tmp_path / "a.mp4")], False, 32):
        assert i == 0 and fps == 25 and x.shape[1:] == (32, 32, 3) and len(x) <= 64
        times += list(seen)
        level += x.float().mean((1, 2, 3)).tolist()
    assert np.allclose(times, np.arange(n) / 25)
    assert np.allclose(level, 20 + 2 * (np.arange(n) % 100), atol=1.5)
    by_clock, fps = common.clock(tmp_path / "a.mp4")
    assert np.allclose(by_clock, times) and fps == 25


@pytest.mark.parametrize("fps, n", [(25, 70), (30, 61), (16, 40), (32, 75), (30, 31)])
def test_features_of_clips_are_of_the_frames_that_labelled_clips_have(fps, n, tmp_path):
    numbered(tmp_path / "a.mp4", n, fps)
    frames, spans = f.cut_clips(n, fps, np.arange(n) / fps, 4)
    mean, std = (np.array(v)[:, None] for v in f.KINETICS)
    got = [p for p in f.Pictures([str(tmp_path / "a.mp4")], True, 32) if len(p) == 5]
    assert [p[4] for p in got] == [False] * (len(got) - 1) + [True] * bool(got)
    seen = [row for p in got for row in p[2]]
    clips = [x for p in got for x in p[3]]
    assert len(seen) == len(clips) == len(frames) and all(len(p[3]) <= 8 for p in got)
    for span, x, row, want in zip(seen, clips, frames, spans):
        assert np.allclose(span, want)
        level = (x.mean((2, 3)).numpy() * std + mean) * 255                   # (3, 16)
        assert np.allclose(level, 20 + 2 * (row % 100), atol=1.5)


# ---- the stages ----------------------------------------------------------------------------------

MINI = "--tiny --workers 0 --log_every 1 --save_every 3 --epochs 2 --batch_size 4".split()


@pytest.fixture(scope="module")
def feats(oops, tmp_path_factory):
    """The toy dataset with its features."""
    folder = tmp_path_factory.mktemp("features")
    run(folder / "f", "--stage", "features", "--tiny", "--workers", 0, "--data", oops,
        "--features", folder / "features")
    assert len(list((folder / "features" / "train").iterdir())) == 24
    return ["--data", oops, "--features", folder / "features"]


@pytest.fixture(scope="module")
def chain(feats, tmp_path_factory):
    """Run folders of the stages that start from one another."""
    root = tmp_path_factory.mktemp("chain")
    run(root / "f2c", *MINI, *feats)
    run(root / "f2c2v", *MINI, *feats, "--stage", "f2c2v", "--init", root / "f2c" / "best.pt")
    for name, before, *flags in (
            ("clip", "f2c", "--batch_size", 64), ("video", "f2c2v", "--level", "video"),
            ("crf", "f2c2v", "--level", "video", "--loss", "crf"),
            ("ahead", "f2c", "--batch_size", 64, "--anticipate", 0.5)):
        run(root / name, *MINI, *feats, "--stage", "classify", "--init",
            root / before / "best.pt", *flags)
    return root


def test_features_are_split_by_rank_and_resumed(oops, feats, tmp_path):
    ours = tmp_path / "features"
    flags = ["--stage", "features", "--tiny", "--workers", 0, "--data", oops, "--features", ours]
    r = quick(tmp_path / "q", *flags, "--out", tmp_path / "o", die=("torn:.npz", 4))
    assert r.code == -9
    half = {p: p.stat().st_mtime_ns for p in ours.rglob("*.npz")}
    assert len(half) == 3
    run(tmp_path / "o", *flags, n=2)
    whole = sorted(p.relative_to(feats[3]) for p in feats[3].rglob("*.npz"))
    assert sorted(p.relative_to(ours) for p in ours.rglob("*.npz")) == whole
    assert not list(ours.rglob("*.tmp*")) and all(p.stat().st_mtime_ns == t
                                                  for p, t in half.items())
    for name in whole:
        a, b = np.load(ours / name), np.load(feats[3] / name)
        assert set(a) == {"arr_0", "fps", "times"} and all(np.array_equal(a[k], b[k]) for k in a)
    r = quick(tmp_path / "q", *flags, "--backbone", "resnet50", "--out", tmp_path / "p")
    assert r.code == 1 and "about.json" in r.err


def test_unreadable_videos_are_named_and_left_out(oops, tmp_path):
    data = tmp_path / "data"
    for part in ("train", "val"):
        (data / "oops_video" / part).mkdir(parents=True)
        numbered(data / "oops_video" / part / "fine.mp4", 40)
    broken = data / "oops_video" / "train" / "bad, \"one\".mp4"
    broken.write_bytes(b"nothing of a video")
    whole = (data / "oops_video" / "train" / "fine.mp4").read_bytes()
    (data / "oops_video" / "train" / "empty.mp4").write_bytes(b"")
    (data / "oops_video" / "train" / "half.mp4").write_bytes(whole[:len(whole) // 2])
    flags = ["--stage", "features", "--tiny", "--workers", 1, "--data", data]
    r = run(tmp_path / "o", *flags, "--naming", "mp4", "--float16")
    assert str(broken) in r.out and metrics(tmp_path / "o")["train_made"] == 1
    assert len(metrics(tmp_path / "o")["unreadable"]) == 3
    made = data / "features" / "vit_b16" / "train" / "fine.mp4.npz"
    assert np.load(made)["arr_0"].dtype == np.float16
    run(tmp_path / "o", *flags)                               # the other naming: found as well
    assert [p.name for p in made.parent.iterdir()] == [made.name]


@pytest.mark.parametrize("name, dim", [("resnet18", 512), ("r2plus1d_18", 512)])
def test_published_backbones_fill_from_a_file(name, dim, tmp_path):
    torch.manual_seed(1)
    from torchvision import models
    net = (models.resnet18 if name == "resnet18" else models.video.r2plus1d_18)(weights=None)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    for part in ("train", "val"):
        (tmp_path / "oops_video" / part).mkdir(parents=True)
        numbered(tmp_path / "oops_video" / part / "a.mp4", 17, 16)
    run(tmp_path / "o", "--stage", "features", "--data", tmp_path, "--backbone", name, "--weights",
        tmp_path / "w.pth", "--workers", 0, "--features", tmp_path / "f")
    x = np.load(tmp_path / "f" / "val" / "a.npz")
    assert x["arr_0"].shape == ((17 if name == "resnet18" else 1), dim)
    net = common.headless(net).eval()
    with torch.no_grad():
        if name == "resnet18":
            _, _, _, picture, _ = next(iter(f.Pictures([str(
                tmp_path / "oops_video" / "val" / "a.mp4")], False, 224)))
            want = net(f.normalise(picture[:4], *f.IMAGENET))
        else:
            _, _, _, clip, _ = next(iter(f.Pictures([str(
                tmp_path / "oops_video" / "val" / "a.mp4")], True, 112)))
            assert clip.shape == (1, 3, 16, 112, 112)
            want = net(clip)
    assert np.allclose(x["arr_0"][:len(want)], want, atol=1e-4)


def test_every_stage_leaves_what_is_promised(chain):
    for name, classes in (("f2c", 8), ("f2c2v", 6), ("clip", 3), ("video", 3), ("crf", 3)):
        there = contents(chain / name)
        assert {"args.json", "log.jsonl", "last.pt", "best.pt", "metrics.json",
                "curve.png"} <= set(there)
        state = torch.load(chain / name / "best.pt", weights_only=True)
        assert state["model"]["head.4.weight"].shape[0] == classes
        assert 0 <= metrics(chain / name)["val_top1"] <= 1
    frozen = [torch.load(chain / n / "best.pt", weights_only=True)["model"]
              for n in ("f2c", "f2c2v", "video")]
    for key in (k for k in frozen[0] if k.startswith("frames.")):
        assert torch.equal(frozen[0][key], frozen[1][key]), key
        assert torch.equal(frozen[0][key], frozen[2][key]), key


def slow_probabilities(chain, name, video, step):
    """p of each clip, from the definition: all its frames read with NumPy, one clip at a time."""
    state = torch.load(chain / name / "best.pt", weights_only=True)
    args = SimpleNamespace(**{**state["args"], "finetune_frames": False})
    model = f.build(args, 128, 3, args.level, per_clip=True, crf=args.loss == "crf").eval()
    model.load_state_dict(state["model"])
    x = torch.from_numpy(np.load(video.path)["arr_0"])
    frames, spans = f.cut_clips(video.frames, video.fps, video.times, step)
    with torch.no_grad():
        z = torch.stack([model.frames(x[row][None])[0] for row in frames])
        if args.level == "clip":
            return model.head(z).softmax(1).numpy(), spans
        out = torch.zeros(len(z), 3)
        every = round(args.step * 16) // step
        for first in range(min(every, len(z))):
            part = z[first::every]
            q = model.head(model.clips(part[None], every=True)[0, 1:])
            if args.loss == "crf":
                scores = every_sequence(q, model.crf)
                total = np.logaddexp.reduce(list(scores.values()))
                p = torch.zeros(len(q), 3)
                for y, s in scores.items():
                    p[range(len(q)), y] += math.exp(s - total)
                out[first::every] = p
            else:
                out[first::every] = q.softmax(1)
        return out.numpy(), spans


@pytest.mark.parametrize("name", ["clip", "video", "crf"])
def test_evaluation_is_what_one_computes_by_hand(name, chain, feats, tmp_path):
    run(tmp_path / "e", *MINI[:3], *feats, "--stage", "evaluate", "--init",
        chain / name / "best.pt")
    got = metrics(tmp_path / "e")
    args = SimpleNamespace(data=feats[1], features=feats[3], level="video", limit=None,
                           allow_missing=False, list=None, val_list=None)
    notes = f.read_notes(common.find(feats[1], "transition_times.json"))
    common.init_distributed()
    videos = f.scan(args, "val", notes)
    assert len(videos) >= 4
    for step in (16, 4):
        labels, tags = [], []
        errors = []
        for v in videos:
            p, spans = slow_probabilities(chain, name, v, step)
            labels += list(f.run_labels(spans, v.note.t[1]))
            tags += list(p.argmax(1))
            best = p[:, 1].argmax()
            errors.append(min(abs(spans[best].mean() - t) for t in v.note.t))
        key = f"step_{step / 16:g}s"
        if name != "crf":                                     # Viterbi's labels are tested above
            assert got[f"{key}_accuracy"] == pytest.approx(
                100 * np.mean(np.array(labels) == tags), abs=1e-9)
        assert got[f"{key}_clips"] == len(labels)
    assert got["within_1s"] == pytest.approx(100 * np.mean(np.array(errors) <= 1))
    assert got["mean_error_s"] == pytest.approx(np.mean(errors), abs=1e-6)
    middle = [min(abs(v.note.len / 2 - t) for t in v.note.t) <= 1 for v in videos]
    assert got["middle_within_1s"] == pytest.approx(100 * np.mean(middle))
    with open(tmp_path / "e" / "predictions_step_1s.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == got["step_1s_clips"]
    assert {r["filename"] for r in rows} == {f"{v.name}.mp4" for v in videos}
    from PIL import Image
    assert Image.open(tmp_path / "e" / "timeline.png").width == 900


@pytest.mark.parametrize("stage, name", [("evaluate", "video"), ("evaluate", "crf"),
                                         ("evaluate", "ahead"), ("localize", "clip")])
def test_evaluation_does_not_depend_on_the_number_of_processes(stage, name, chain, feats,
                                                               tmp_path):
    flags = [*MINI[:3], *feats, "--stage", stage, "--init", chain / name / "best.pt"]
    run(tmp_path / "1", *flags)
    run(tmp_path / "2", *flags, n=2)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert set(one) == set(two) and len(one) >= 3
    for file in set(one) - {"args.json"}:
        assert one[file] == two[file], file


def test_anticipation_is_evaluated_by_both_protocols(chain, feats, tmp_path):
    run(tmp_path / "e", *MINI[:3], *feats, "--stage", "evaluate", "--init",
        chain / "ahead" / "best.pt")
    got = metrics(tmp_path / "e")
    assert got["anticipate_s"] == 0.5 and "within_1s" not in got
    assert got["oops_step_0.25s_clips"] < got["paper_step_0.25s_clips"]
    assert metrics(chain / "ahead")["val_top1"] * 100 <= got["paper_step_0.25s_accuracy"] + 1e-6


@pytest.mark.parametrize("stage, flags", [
    ("f2c", []), ("f2c2v", []), ("classify", ["--batch_size", 64]),
    ("classify", ["--level", "video"]), ("classify", ["--level", "video", "--loss", "crf"])])
def test_two_processes_train_as_one_does(stage, flags, chain, feats, tmp_path):
    before = {"f2c": [], "f2c2v": ["--init", chain / "f2c" / "best.pt"],
              "classify": ["--init", chain / ("f2c2v" if "video" in flags else "f2c") / "best.pt"]}
    flags = [*MINI, *feats, "--stage", stage, *before[stage], *flags, "--epochs", 1]
    for n in (1, 2):
        run(tmp_path / str(n), *flags, n=n)
    logs = [[json.loads(x) for x in contents(tmp_path / n)["log.jsonl"].splitlines()]
            for n in "12"]
    assert len(logs[0]) == len(logs[1]) >= 2
    for a, b in zip(*logs):
        for key in ("loss", "gradient", "val_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4), (key, a["step"])
    one, two = (metrics(tmp_path / n) for n in "12")
    assert one["val_top1"] == pytest.approx(two["val_top1"], abs=1e-6)


@pytest.mark.parametrize("name, n", [("f2c", 2), ("f2c2v", 1), ("crf", 2)])
def test_a_killed_run_ends_in_the_same_bytes(name, n, chain, feats, tmp_path):
    flags = {"f2c": [], "f2c2v": ["--stage", "f2c2v", "--init", chain / "f2c" / "best.pt"],
             "crf": ["--stage", "classify", "--level", "video", "--loss", "crf", "--init",
                     chain / "f2c2v" / "best.pt", "--save_every", 1]}[name]
    flags = [*MINI, *feats, *flags, "--dropout", 0.1]
    run(tmp_path / "whole", *flags, n=n)
    for kill in (("step", 2), ("torn:last.pt", 2), ("line", 1), ("torn:metrics.json", 1)):
        r = quick(tmp_path / "q", *flags, "--out", tmp_path / "killed", n=n, die=kill)
        assert r.code == -9, (kill, r)
    run(tmp_path / "killed", *flags, n=n)
    whole, own = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    for file in ("last.pt", "best.pt", "metrics.json"):
        assert own[file] == whole[file], file


# ---- checkpoints and wrong input -----------------------------------------------------------------

def released(model, two, path):
    """A checkpoint as the release would write it: its names, DataParallel's prefix, dead layers."""
    names = {}
    for theirs, ours in (("local_model.", "frames."), ("global_model.", "clips.")) if two else (
            ("", "frames."),):
        names |= f.released_names(theirs, ours, 2)
    names |= {("global_model." if two else "") + "mlp_head.": "head."}
    state = {}
    for k, v in model.state_dict().items():
        theirs, ours = next(((a, b) for a, b in names.items() if k.startswith(b)), (k, k))
        state[f"module.{theirs}{k[len(ours):]}"] = v
    dead = "module.local_model." if two else "module."
    state |= {f"{dead}lin_projector.weight": torch.zeros(8, 4), f"{dead}mlp_head.9.bias":
              torch.zeros(3), f"{dead}temporal_encoder.embeddings.position_ids": torch.zeros(1, 9)}
    torch.save({"epoch": 7, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
               path)


@pytest.mark.parametrize("two", [False, True])
def test_released_checkpoints_are_evaluated(two, feats, tmp_path):
    torch.manual_seed(0)
    size = {"layers": 2, "heads": 4, "window": 32, "ff": 24, "positions": 600}
    model = f.F2C2V(128, 3, 16, True, per_clip=True, **size) if two else f.F2C(
        128, 3, 16, True, **size)
    released(model, two, tmp_path / "x.pth.tar")
    flags = [*MINI[:3], *feats, "--stage", "evaluate", "--init", tmp_path / "x.pth.tar", "--heads",
             4, "--compat", "released"]
    r = run(tmp_path / "e", *flags)
    assert f"{len(model.state_dict())} tensors loaded" in r.out and "lin_projector" in r.out
    assert 0 <= metrics(tmp_path / "e")["step_1s_accuracy"] <= 100


def test_labels_that_are_lost_are_counted_and_contradictions_named(chain, feats, tmp_path):
    data = tmp_path / "oops"
    shutil.copytree(feats[1] / "annotations", data / "annotations")
    path = data / "annotations" / "transition_times.json"
    table = json.loads(path.read_text())
    val = set(f.read_names(data / "annotations" / "val.txt"))
    notes = f.read_notes(path)
    good = [n for n in sorted(val & set(table)) if f.usable(notes[n], "val", "clip")]
    del table[good[0]]
    table[good[1]]["t"] = [-1, -1, 2.0]
    table[good[2]]["len"] += 3
    path.write_text(json.dumps(table))
    r = run(tmp_path / "o", *MINI[:3], "--data", data, *feats[2:], "--stage", "localize", "--init",
            chain / "clip" / "best.pt")
    assert f"{len(val & set(table))} annotated, {len(good) - 2} usable" in r.out
    assert "2 videos contradict each other" in r.out and "not as long as annotated" in r.out
    assert not (tmp_path / "o" / "predictions_step_1s.csv").exists()


def test_f2c_fills_the_frames_and_f2c2v_both(chain, feats, tmp_path):
    one = run(tmp_path / "a", *MINI, *feats, "--stage", "classify", "--level", "video", "--init",
              chain / "f2c" / "best.pt", "--epochs", 1)
    assert "left fresh (clips" in one.out.replace("head.0, head.1, head.4, ", "")
    both = torch.load(chain / "f2c2v" / "best.pt", weights_only=True)["model"]
    two = run(tmp_path / "b", *MINI, *feats, "--stage", "classify", "--level", "video", "--init",
              chain / "f2c2v" / "best.pt", "--epochs", 1)
    loaded = sum(k.startswith(("frames.", "clips.")) for k in both)
    assert f"{loaded} tensors loaded" in two.out and "left fresh (head" in two.out


@pytest.mark.parametrize("flags, words", [
    (["--transforms", "normal,x3"], "--transforms"), (["--transforms", "normal"], "--transforms"),
    (["--clip_len", 4], "--clip_len"), (["--step", 0.3], "--step"), (["--anticipate", 0], "--ant"),
    (["--step", 0.0], "--step"), (["--positions", 2], "--positions"),
    (["--tolerance", "nan", -1], "--tolerance"), (["--transforms", "normal,normal"], "--transf"),
    (["--stage", "classify", "--anticipate", 0.4, "--anticipate_protocol", "oops"], "multiple"),
    (["--stage", "localize", "--anticipate", 1], "--anticipate"),
    (["--stage", "classify", "--finetune_frames"], "--finetune_frames"),
    (["--stage", "classify", "--loss", "crf", "--class_weights", "computed"], "--class_weights"),
    (["--stage", "classify", "--level", "video", "--unbalanced"], "--unbalanced"),
    (["--freeze", "--finetune_frames"], "--freeze"),
    (["--stage", "localize", "--init", "none"], "--init"),
    (["--stage", "classify", "--loss", "regression", "--anticipate", 1], "regression"),
    (["--dropout", 1.0], "--dropout"), (["--lr", "nan"], "--lr"), (["--nonsense"], "--nonsense")])
def test_a_wrong_flag_is_one_line(flags, words, oops, capsys):
    with pytest.raises(SystemExit) as e:
        f.parse_args(["--data", str(oops), *map(str, flags)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1


def test_what_the_user_can_mend_is_one_line(chain, feats, oops, tmp_path):
    video = feats[3] / "val"
    part = tmp_path / "features"
    shutil.copytree(feats[3], part)
    notes = f.read_notes(oops / "annotations" / "transition_times.json")
    lost = next(n for n in f.read_names(oops / "annotations" / "val.txt")
                if n in notes and f.usable(notes[n], "val", "clip"))
    (part / "val" / f"{lost}.npz").unlink()
    wide = tmp_path / "wide"
    shutil.copytree(feats[3], wide)
    for p in wide.rglob("*.npz"):
        z = dict(np.load(p))
        np.savez(p, **{**z, "arr_0": z["arr_0"][:, :100]})
    assert video.is_dir()
    clip, data = ["--init", chain / "clip" / "best.pt"], ["--data", oops]
    state = torch.load(chain / "clip" / "best.pt", weights_only=True)
    torch.save({**state, "args": {**state["args"], "heads": 0}}, tmp_path / "odd.pt")
    state["model"]["head.4.bias"][1] = math.inf
    torch.save(state, tmp_path / "nan.pt")
    cases = [
        (["--data", tmp_path / "no"], "no such folder"),
        ([*data, "--features", tmp_path], "--stage features"),
        ([*feats, "--stage", "f2c2v", "--init", tmp_path / "x.pt"], "x.pt"),
        ([*feats, "--stage", "f2c2v", "--init", chain / "f2c" / "best.pt", "--layers", 3],
         "--layers"),
        ([*feats, "--stage", "localize", *clip, "--compat", "released"], "--compat"),
        ([*feats, "--stage", "localize", *clip, "--level", "video"], "--level"),
        ([*feats, "--stage", "localize", "--init", chain / "ahead" / "best.pt"], "foresees"),
        ([*feats, "--stage", "classify", "--init", chain / "f2c" / "best.pt", "--anticipate", 50,
          "--anticipate_protocol", "oops"], "no training video"),
        (["--data", tmp_path, "--stage", "features"], "holds no .mp4"),
        ([*data, "--features", part, "--stage", "localize", *clip], lost),
        ([*data, "--features", wide, "--stage", "localize", *clip], "100"),
        ([*feats, "--stage", "localize", "--init", tmp_path / "nan.pt"], "not finite"),
        ([*feats, "--stage", "localize", "--init", tmp_path / "odd.pt"], "--heads 0"),
        ([*feats, "--heads", 3], "--heads 3"),
        ([*feats, "--batch_size", 400], "--batch_size"),
        ([*feats, "--stage", "features", "--weights", tmp_path / "w.pth"], "--weights none")]
    for flags, words in cases:
        r = quick(tmp_path / "q", "--tiny", "--workers", 0, *flags, "--out", tmp_path / "out")
        assert r.code == 1, (flags, r)
        assert words in r.err and r.err.startswith("error: ") and r.err.count("\n") == 1, r.err
    r = quick(tmp_path / "q", *MINI[:3], *feats, "--stage", "evaluate", *clip, "--out",
              chain / "clip")
    assert r.code == 1 and "training run" in r.err
    run(tmp_path / "ok", "--tiny", "--workers", 0, *data, "--features", part, "--stage",
        "localize", *clip, "--allow_missing")


def test_training_replaces_a_broken_file_and_counts_it(feats, oops, tmp_path):
    part = tmp_path / "features"
    shutil.copytree(feats[3], part)
    names = f.read_names(oops / "annotations" / "splits" / "train_all_org.csv")
    first, second = (part / "train" / f"{n}.npz" for n in names[:2])
    z = dict(np.load(first))
    np.savez(first, **{**z, "arr_0": np.full_like(z["arr_0"], np.nan)})
    second.write_bytes(b"PK")
    r = run(tmp_path / "o", *MINI, "--data", oops, "--features", part)
    assert f"train: {len(names) - 1} of {len(names)} videos" in r.out and str(second) in r.out
    assert metrics(tmp_path / "o")["training_samples_broken"] >= 1 and str(first) in r.err


@pytest.mark.parametrize("flags", [
    ["--transforms", "x2,x4,x8"], ["--compat", "released"], ["--crops", "full"],
    ["--stage", "f2c2v", "--init", "none", "--heads", 4, "--transforms", "speed,point",
     "--batch_size", 2],
    ["--stage", "f2c2v", "--init", "none", "--heads", 4, "--finetune_frames"],
    ["--stage", "f2c2v", "--init", "none", "--heads", 4, "--compat", "released"],
    ["--stage", "classify", "--init", "none", "--loss", "crf"],
    ["--stage", "classify", "--init", "none", "--loss", "crf", "--compat", "released"],
    ["--stage", "classify", "--init", "none", "--level", "video", "--freeze", "--compat",
     "released"],
    ["--stage", "classify", "--init", "none", "--loss", "regression", "--select", "last"],
    ["--stage", "classify", "--init", "none", "--level", "video", "--anticipate", 2,
     "--anticipate_protocol", "oops"]])
def test_every_switch_trains(flags, feats, tmp_path):
    run(tmp_path / "o", *MINI, *feats, "--epochs", 1, *flags)


def test_features_of_clips_train_the_baseline(oops, tmp_path):
    flags = ["--tiny", "--workers", 0, "--data", oops, "--backbone", "r2plus1d_18", "--features",
             tmp_path / "f", "--limit", 8]
    run(tmp_path / "x", "--stage", "features", *flags)
    assert all("spans" in np.load(p) for p in (tmp_path / "f").rglob("*.npz"))
    everything = [*flags[:-2], "--allow_missing"]
    run(tmp_path / "c", *MINI, *everything, "--stage", "classify", "--batch_size", 16)
    run(tmp_path / "e", *MINI[:3], *everything, "--stage", "evaluate", "--init",
        tmp_path / "c" / "best.pt")
    assert "step_1s_accuracy" in metrics(tmp_path / "e")


def test_help_answers_with_the_method_and_all_flags():
    r = command("--help", timeout=60, script="f2c_oops")
    assert r.code == 0 and "L_F2C2V" in r.out
    for flag in ("--transforms", "--level", "--anticipate", "--weights", "--compat"):
        assert flag in r.out


@pytest.mark.parametrize("flags, want", [
    ("", {"stage": "f2c", "epochs": 100, "batch_size": 128, "lr": 1e-4, "weight_decay": 1e-4,
          "clip_len": 20, "dropout": 0.1, "weights": "timm"}),
    ("--stage f2c2v", {"batch_size": 16, "init": "runs/f2c_oops_oops_f2c/best.pt"}),
    ("--stage classify", {"batch_size": 256, "epochs": 50, "step": 0.25, "class_weights": "none"}),
    ("--stage classify --level video", {"batch_size": 8, "step": 1.0, "class_weights": "computed",
                                        "init": "runs/f2c_oops_oops_f2c2v/best.pt"}),
    ("--stage classify --level video --compat released", {"class_weights": "published"}),
    ("--stage features --backbone resnet50", {"weights": "torchvision"}),
    ("--stage classify --level video --loss crf --anticipate 1",
     {"out": Path("runs/f2c_oops_oops_classify_video_crf_anticipate1")}),
    ("--stage evaluate --level video --loss crf",
     {"init": "runs/f2c_oops_oops_classify_video_crf/best.pt"})])
def test_defaults_are_those_of_the_published_recipe(flags, want):
    args = f.parse_args(flags.split())
    assert {k: getattr(args, k) for k in want} == want
    if args.stage == "f2c":
        f.prepare(args, None)
        assert (args.layers, args.heads, args.window, args.ff, args.mlp, args.positions) == (
            3, 16, 32, 3072, 1024, 7200)


def test_bf16_stays_near_fp32():
    torch.manual_seed(0)
    for model, x in ((f.F2C(32, 3, 16, **{**SIZE, "layers": 3}), (torch.randn(4, 20, 32),)),
                     (f.F2C2V(32, 3, 16, per_clip=True, crf=True, **SIZE),
                      (torch.randn(5, 16, 32), torch.tensor([[0, 1, 2], [3, 4, -1]])))):
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            low = model(*x)
        assert torch.allclose(low.float(), model(*x), atol=0.05)
