"""f2c_oops.py against its equations, the benchmark's definitions and the release's file formats."""

import csv
import itertools
import json
import math
import re
import shutil
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import running
import torch
import torch.distributed as dist
import world
from running import quick
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import f2c_oops as f
from common import UserError, VideoError

CLIP, VIDEO = f.CLIP_TRANSFORMS, f.VIDEO_TRANSFORMS


def rng(*seed):
    return np.random.default_rng(seed)


# ---- transformations, by the numbers of the frames -----------------------------------------------

@pytest.mark.parametrize("T", [21, 30, 39, 40, 60, 79, 80, 160, 161, 300, 4000])
def test_transformed_clips_are_what_their_names_say(T):
    for seed in range(40):
        (speed, fast), *rest = f.transform_clips(rng(seed), T, CLIP)
        made = dict(rest)
        assert [*made] == ["normal", "shuffle", "flip", "point", "warp"]
        for frames in (fast, *made.values()):
            assert len(frames) == 20 and 0 <= frames.min() <= frames.max() < T
        assert {*np.diff(fast)} == {2 ** f.SPEEDS.index(speed)}
        assert {*np.diff(made["normal"])} == {1}
        assert {*np.diff(np.sort(made["shuffle"]))} == {1} != {*np.diff(made["shuffle"])}
        steps = np.diff(made["flip"])
        turn = int((steps != 1).argmax())
        assert steps[turn] in (0, -1) and (steps[turn + 1:] == -1).all() and (steps != 1).any()
        k = int((made["point"] == made["normal"][-1]).argmax()) + 1       # frames at normal speed
        assert 5 <= k <= 15 and [*made["point"]] == [*made["normal"][20 - k:], *fast[:20 - k]]
        steps = np.diff(made["warp"])
        assert 0 < steps.min() and steps.max() <= max(T - 20, 8) and (T < 40 or len({*steps}) > 1)


def test_crops_start_in_the_first_half_of_the_possible_starts():
    assert {f.crop_frames(rng(s), 31, 20)[0] for s in range(300)} == {*range(6)}


@pytest.mark.parametrize("names", [[n for n in CLIP if n != out] for out in CLIP]
                         + [CLIP[:4], CLIP[4:], ["normal", "x8"]])
def test_transformations_can_be_left_out(names):
    made = [f.transform_clips(rng(s), 200, names) for s in range(60)]
    assert {name for clips in made for name, _ in clips} == {*names}
    assert f.transform_clips(rng(0), 20, names) == []


@pytest.mark.parametrize("T", [16, 31, 100, 192, 193, 250, 1000])
def test_versions_of_a_video_are_what_their_names_say(T):
    whole = np.arange(T // 16 * 16).reshape(-1, 16)
    for seed in range(20):
        versions = dict(f.transform_video(rng(seed), T, VIDEO))
        assert [*versions] == [n for n in VIDEO if T > 192 or n not in ("speed", "point")]
        assert (versions["normal"] == whole).all()
        assert sorted(map(tuple, versions["shuffle"])) == sorted(map(tuple, whole))
        flat = versions["flip"].ravel()
        turn = next((k for k in range(len(flat)) if flat[k] != k), len(flat))
        assert [*flat[turn:]] == [*range(len(flat) - 1, turn - 1, -1)]
        flat = versions["warp"].ravel()
        assert [*np.roll(flat, flat[0])] == [*range(len(flat))]
        assert flat[0] in range(len(flat) // 4, 3 * len(flat) // 4, 16)
        if T > 192:
            assert {*np.diff(versions["speed"].ravel())} == {3} and len(versions["speed"]) >= 4
            flat, cut = versions["point"].ravel(), len(whole) // 2 * 16
            assert [*flat[:cut]] == [*range(cut)] and {*np.diff(flat[cut:])} == {3}
    assert f.transform_video(rng(0), 15, VIDEO) == []


# ---- clips and their labels ----------------------------------------------------------------------

@pytest.mark.parametrize("fps", ["15", "16", "24", "25", "30000/1001", "30", "32", "60"])
@pytest.mark.parametrize("T", [15, 47, 90, 301])
def test_clips_lie_on_a_grid_of_sixteen_frames_per_second(fps, T):
    top, bottom = ([*map(int, fps.split("/"))] + [1])[:2]
    times = np.arange(T) * bottom / top
    for spacing in (0.25, 1, 0.75):
        frames, spans = f.cut_clips(T, top / bottom, times, spacing)
        step = round(16 * spacing)
        for j, row in enumerate(frames):
            for k, frame in enumerate(row):                   # ⌊position · fps / 16⌋
                exact = (step * j + k) * top
                assert abs(frame - exact // (16 * bottom)) <= (exact % (16 * bottom) == 0)
            assert (*spans[j],) == (times[row[0]], times[row[-1]])
        positions = -(-T // (top // 16)) if bottom == 1 and top % 16 == 0 else math.floor(
            T * 16 * bottom / top + 1e-9)
        assert len(frames) == max(0, (positions - 16) // step + 1)


def slow_labels(spans, t, as_released):
    """In the benchmark's words: 0 until the first clip with t, 1 while they have it, then 2."""
    has = [start <= t <= end for start, end in spans]
    if not any(has):
        later = [i for i, (start, _) in enumerate(spans) if start > t]
        if as_released or not later:
            return [0] * len(spans)
        i = later[0]
        near = i if i == 0 or spans[i][0] - t < t - spans[i - 1][1] else i - 1
        return [0] * near + [1] + [2] * (len(spans) - near - 1)
    first = has.index(True)
    return [0 if i < first else 1 if has[i] else 2 for i in range(len(spans))]


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("spacing", [0.25, 1])
def test_labels_run_from_intentional_to_unintentional(spacing, as_released):
    r = rng(1)
    for T in r.integers(20, 300, 200):
        _, spans = f.cut_clips(T, 30, np.arange(T) / 30, spacing)
        t = r.uniform(0, T / 30)
        assert [*f.video_labels(spans, t, as_released)] == slow_labels(spans.tolist(), t,
                                                                       as_released)


def test_anticipation_labels_the_later_time_or_shows_the_earlier_clip():
    _, spans = f.cut_clips(180, 30, np.arange(180) / 30, 0.25)
    args, t = SimpleNamespace(anticipate=1.5, as_released=False), 3.1
    clips, labels = f.labels_of(args, spans, t, 0.25)
    assert [*clips] == [*range(len(spans))]
    assert [*labels] == [1 if a <= t - 1.5 <= b else 2 if a > t - 1.5 else 0 for a, b in spans]
    for seconds in (0.5, 1.5, 4.9, 30.0):
        args.anticipate = seconds
        clips, labels = f.labels_of(args, spans, t, 0.25, "oops")
        shift = round(4 * seconds)
        assert [*clips] == [*range(max(0, len(spans) - shift))]
        assert [*labels] == [*f.video_labels(spans, t)[shift:]]


def test_balancing_copies_the_rarer_labels_of_each_video():
    r = rng(0)
    for _ in range(50):
        labels = np.repeat([0, 1, 2], r.integers(0, 30, 3))
        counts = np.bincount(labels, minlength=3)
        indices = f.balance_labels(labels, rng(3))
        assert [*indices[:len(labels)]] == [*range(len(labels))]
        for c, ratio in enumerate((1, 0.93, 1 / 0.93)):
            copies = np.bincount(indices[len(labels):], minlength=len(labels))[labels == c]
            wanted = round(counts.max() * ratio) if c != counts.argmax() else counts.max()
            if counts[c]:
                assert counts[c] + copies.sum() == max(counts[c], wanted)
                assert copies.max() - copies.min() <= 1       # each in turn


def test_which_videos_have_labels():
    ok = f.Annotation((2.0, 2.1, 2.3), 5.0, (0.4, 0.42, 0.46))
    pairs = [*itertools.product(("train", "val"), ("clip", "video"))]
    for change, expected in (({}, "++++"), ({"t": (-1, -1, 2)}, "----"),
                             ({"t": (-1, 2, 3)}, "++++"), ({"rel_t": (0.001, 0.009, 0.5)}, "----"),
                             ({"rel_t": (0.4, 0.991, 0.995)}, "----"), ({"length": 2.9}, "----"),
                             ({"length": 3.1}, "-+--"), ({"length": 30.1}, "-+--")):
        assert "".join("-+"[f.has_labels(ok._replace(**change), *x)] for x in pairs) == expected


# ---- encoder and networks ------------------------------------------------------------------------

SIZE = {"layers": 2, "heads": 2, "window": 6, "ff": 12, "positions": 11, "dropout": 0.0}


@pytest.mark.parametrize("n, half, chunk", [(30, 4, 8), (200, 16, 64), (65, 100, 16), (129, 2, 50)])
def test_attention_in_chunks_equals_attention_with_one_mask(n, half, chunk):
    torch.manual_seed(n)
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for _ in range(3))
    i = torch.arange(n)
    for valid in (None, i < torch.tensor([[n], [max(1, n // 3)]])):
        there = torch.ones(2, n, dtype=torch.bool) if valid is None else valid
        mask = (((i[:, None] - i).abs() <= half) | (i == 0)) & there[:, None, None]
        outs = [x.transpose(1, 2)[there] for x in (
            F.scaled_dot_product_attention(q, k, v, mask),
            f.local_attention(q, k, v, valid, half, chunk=chunk))]
        assert torch.allclose(*outs, atol=1e-6)
        grads = [torch.autograd.grad(x.pow(2).sum(), (q, k, v)) for x in outs]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads))


def test_the_work_of_the_encoder_grows_with_the_frames_not_with_their_square():
    e, work = f.Encoder(8, **SIZE, all_rows=True).eval(), []
    for n in (875, 7000):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            e(torch.zeros(1, n, 8))
        work.append(counter.get_total_flops() / n)
    assert work[1] < 1.1 * work[0]


def test_what_is_trained_gets_a_gradient_and_a_frozen_encoder_has_no_dropout():
    clip_index = torch.tensor([[0, 1, 2], [3, 4, f.PAD]])
    for per_clip, finetune, as_released in itertools.product((False, True), repeat=3):
        model = f.F2C2V(8, 3, 4, per_clip=per_clip, finetune_frames=finetune,
                        as_released=as_released, **SIZE)
        model.train()(torch.randn(5, 16, 8), clip_index).pow(2).sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name
        assert any(p.requires_grad for p in model.frame_encoder.parameters()) == finetune
        assert model.frame_encoder.training == (finetune or as_released)


# ---- losses --------------------------------------------------------------------------------------

def test_the_crf_is_the_sum_over_all_sequences():
    torch.manual_seed(0)
    crf, n = f.CRF(3), torch.tensor([5, 1, 2])
    for p in crf.parameters():
        p.data.normal_()
    q, y = 2 * torch.randn(3, 5, 3), torch.randint(3, (3, 5))
    y[torch.arange(5) >= n[:, None]] = f.PAD
    nll, best, p = crf.nll(q, y, n), crf.viterbi(q, n), crf.marginals(q, n)
    a, b, A = (p.detach() for p in (crf.start_transitions, crf.end_transitions, crf.transitions))
    for i, k in enumerate(n.tolist()):
        scores = {s: float(a[s[0]] + b[s[-1]] + sum(q[i, j, s[j]] for j in range(k))
                           + sum(A[s[j - 1], s[j]] for j in range(1, k)))
                  for s in itertools.product(range(3), repeat=k)}
        total = math.log(sum(map(math.exp, scores.values())))
        assert nll[i].item() == pytest.approx(total - scores[(*y[i, :k].tolist(),)], abs=1e-4)
        assert (*best[i, :k].tolist(),) == max(scores, key=scores.get)
        for j, c in itertools.product(range(k), range(3)):
            share = sum(math.exp(score - total) for s, score in scores.items() if s[j] == c)
            assert p[i, j, c].item() == pytest.approx(share, abs=1e-5)


def test_the_weighted_mean_is_that_of_the_equation():
    torch.manual_seed(0)
    logits, weights = torch.randn(9, 3), torch.tensor([1.1, 4.7, 1.0])
    label = torch.tensor([0, 1, 2, 2, f.PAD, 1, 0, f.PAD, 1])
    total = count = 0.0
    for row, y in zip(logits.tolist(), label.tolist()):
        if y != f.PAD:
            total -= weights[y].item() * (row[y] - math.log(sum(map(math.exp, row))))
            count += weights[y].item()
    a, b = f.cross_entropy(logits, label, weights)
    assert (a.item(), b.item()) == pytest.approx((total, count), rel=1e-5)
    assert f.cross_entropy(logits, label)[1] == 7


def losses(rank):
    """{loss: (loss, gradient, top1)} of this process's uneven share of a batch, mean over all."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.crf, w = f.CRF(3), torch.randn(4, 3, requires_grad=True)
    x, label = torch.randn(5, 6, 4), torch.randint(3, (5, 6))
    label[1, 2:] = label[3, 4:] = f.PAD
    times = torch.tensor([[2.0, 5.0], [1.0, 4.0], [6.0, 7.0], [3.0, 9.0], [8.0, 9.0]])
    mine = slice(0, 5) if dist.get_world_size() == 1 else (slice(0, 4), slice(4, 5))[rank]
    found = {}
    for kind in ("ce", "crf", "regression"):
        out = x[mine] @ w if kind != "regression" else x[mine, 0] @ w[:, :1]
        terms = f.loss_of(SimpleNamespace(loss=kind), model, out,
                          times[mine] if kind == "regression" else label[mine],
                          torch.tensor([1.0, 5.0, 2.0]) if kind == "ce" else None)
        gradient, = torch.autograd.grad(terms["loss"], w)
        found[kind] = [common.sum_processes(v) / dist.get_world_size()
                       for v in (terms["loss"], gradient, terms["top1"])]
    return found


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    for n in "12":
        (tmp_path / n).mkdir()
    (one,), two = (running.processes(losses, n, tmp_path / str(n)) for n in (1, 2))
    for found, kind in itertools.product(two, one):
        for a, b in zip(one[kind], found[kind], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), kind


# ---- metrics -------------------------------------------------------------------------------------

def test_localization_is_counted_as_the_benchmark_does():
    r, errors = rng(0), []
    for _ in range(40):
        spans = np.sort(r.uniform(0, 9, (int(r.integers(3, 12)), 2)))
        p, t = r.integers(0, 4, len(spans)) / 4, r.uniform(0, 9, 3)
        best = max(range(len(spans)), key=lambda j: (p[j], -j))
        t_hat = sum(spans[best]) / 2 if p[best] > 0 else 0
        assert f.predicted_time(p, spans) == pytest.approx(t_hat)
        errors.append(f.time_error(t_hat, t))
        assert errors[-1] == pytest.approx(min(abs(t_hat - x) for x in t))
    assert f.localization_metrics(errors) == pytest.approx({
        **{f"within_{k:g}s": 100 * sum(e <= k for e in errors) / 40 for k in (0.25, 1)},
        "mean_error_s": statistics.mean(errors), "median_error_s": statistics.median(errors),
        "std_error_s": statistics.stdev(errors)})


def test_accuracy_is_counted_per_true_class():
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.1, 0.8, 0.1], [0.9, 0.1, 0.0]])
    scores = np.concatenate([p, p.argmax(1)[:, None]], 1)
    got = f.classification_metrics([[0, 0, 1], [1]], [scores[:3], scores[3:]], "abc", "val_")
    assert got == pytest.approx({"val_top1": 50, "val_a": 50, "val_b": 50, "val_loss": -np.mean(
        np.log([0.7, 0.3, 0.8, 0.1]))})                       # c has no clips


# ---- annotations, features, frames ---------------------------------------------------------------

ENTRY = {"t": [2.3, 2.0, -1.0], "len": 5.0, "rel_t": [0.46, 0.4, -0.2], "n_notfound": 1}


def test_names_and_annotations_are_read_as_they_are(tmp_path):
    odd = ['a, "b" & c 12', "é 🙂 # 1", "x.mp4 y", "a\u2028b"]
    for text in ("{0}\n{1}\n{2}\n{3}", "\ufeff{0}\r\n{1}\r\n{2}\r\n\n{3}\r\n"):
        (tmp_path / "train.txt").write_bytes(text.format(*odd).encode())
        assert f.read_names(tmp_path / "train.txt") == odd
    (tmp_path / "x.csv").write_text('filename,t\n"a, ""b"".mp4",3\nc.mp4,4\nc.mp4,4')
    assert f.read_names(tmp_path / "x.csv") == ['a, "b"', "c"]
    path = tmp_path / "annotations" / "transition_times.json"
    path.parent.mkdir()
    path.write_text(json.dumps({odd[0]: ENTRY}))
    assert f.read_annotations(tmp_path) == {odd[0]: ((-1, 2, 2.3), 5, (-0.2, 0.4, 0.46))}
    for broken in ({**ENTRY, "t": [1, 2]}, {**ENTRY, "len": 0}, {**ENTRY, "t": [1, 2, "x"]}, 3,
                   {"t": [1, 2, 3]}):
        path.write_text(json.dumps({"fine": ENTRY, "not fine": broken}))
        with pytest.raises(UserError, match="transition_times.json:not fine: "):
            f.read_annotations(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_of_a_feature_file_are_read_without_the_others(dtype, tmp_path):
    x, rows = rng(0).normal(size=(300, 5)).astype(dtype), rng(1).integers(0, 300, 12)
    for array in (x, np.asfortranarray(x)):
        np.savez(tmp_path / "a.npz", arr_0=array, fps=30.0)
        got = f.read_features(tmp_path / "a.npz", rows)
        assert got.dtype == torch.float32 and np.array_equal(got, x[rows].astype(np.float32))
    sequences = [np.arange(32).reshape(2, 16), np.arange(16, 48).reshape(2, 16)]
    clips, index = f.read_distinct_clips(tmp_path / "a.npz", sequences)
    assert clips.shape == (3, 16, 5)
    for frames, i in zip(sequences, index, strict=True):
        assert np.array_equal(clips[i], x[frames].astype(np.float32))


@pytest.mark.parametrize("fault", ["nan", "text", "cut", "objects", "flat", "packed", "clock"])
def test_a_broken_feature_file_is_one_line_with_its_name(fault, tmp_path):
    path, x = tmp_path / "a.npz", np.ones((40, 4), np.float32)
    arrays = {"nan": x * np.nan, "objects": np.array([[{}]]), "flat": x[0]}
    (np.savez_compressed if fault == "packed" else np.savez)(
        path, arr_0=arrays.get(fault, x), times=np.arange(7 if fault == "clock" else 40), fps=30)
    if fault in ("text", "cut"):
        path.write_bytes(b"hello" if fault == "text" else path.read_bytes()[:200])
    with pytest.raises(VideoError) as e:
        f.read_video(tmp_path / "a.mp4", path, f.Annotation((1,) * 3, 4.0, (0.25,) * 3))
        f.read_features(path, np.arange(40))
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("size, side", [((64, 64), 32), ((64, 64), 224), ((320, 320), 224)])
def test_features_are_of_every_frame_in_order(size, side, tmp_path):
    images = [world.paint(k, *size) for k in range(70)]
    world.write_video(tmp_path / "a.mp4", images, 25, bf=2)
    args = SimpleNamespace(backbone="vit_b16", tiny=side == 32)
    video = f.make_frames(args, [tmp_path / "a.mp4"], 0, None)
    assert video["frames"].shape == (70, side, side, 3) and video["fps"] == 25
    assert [world.number_of(x) for x in video["frames"].numpy()] == [*range(70)]
    assert np.allclose(video["times"], np.arange(70) / 25)
    wide = torch.arange(96).expand(48, 96)[..., None]         # and the centre is kept
    assert f.crop_square(wide, 48)[0, :, 0].tolist() == [*range(24, 72)]


@pytest.mark.parametrize("fps, n", [(25, 70), (30, 61), (16, 40), (32, 75), (30, 20)])
def test_features_of_clips_are_of_the_frames_of_labelled_clips(fps, n, tmp_path, monkeypatch):
    (tmp_path / "oops_video/val").mkdir(parents=True)
    images = [np.full((48, 64, 3), 20 + 2 * k, np.uint8) for k in range(n)]       # grey: number
    world.write_video(tmp_path / "oops_video/val/a.mp4", images, fps)
    net = torch.nn.Flatten()                                  # φ: the pixels
    monkeypatch.setattr(f, "load_feature_network", lambda args: (net, f.KINETICS))
    args = f.parse_args(["--stage", "features", "--backbone", "r3d_18", "--workers", "0", "--data",
                         str(tmp_path), "--out", str(tmp_path / "out")])
    monkeypatch.setattr(common, "barrier", lambda: None)
    f.extract(args, torch.device("cpu"))
    with np.load(args.features / "val" / "a.npz") as z:
        rows, spans = f.cut_clips(n, fps, np.arange(n) / fps, 0.25)
        assert np.allclose(z["times"], spans) and z["arr_0"].shape == (len(rows), 3 * 16 * 112 ** 2)
        x = z["arr_0"].reshape(len(rows), 3, 16, 112 ** 2).mean(3).transpose(0, 2, 1)
    mean, std = map(np.array, f.KINETICS)
    assert np.allclose((x * std + mean).mean(2) * 255, 20 + 2 * rows, atol=1.5)


@pytest.mark.parametrize("name", ["resnet18", "r2plus1d_18"])
def test_published_backbones_fill_from_a_file(name, tmp_path):
    torch.manual_seed(1)
    net = f.make_feature_network(name)
    torch.save({k: v + 1 for k, v in net.state_dict().items()}, tmp_path / "w.pth")
    args = SimpleNamespace(backbone=name, weights=str(tmp_path / "w.pth"), tiny=False, seed=0)
    filled, norm = f.load_feature_network(args)
    assert norm == (f.KINETICS if "2plus" in name else common.IMAGENET)
    assert all(torch.equal(filled.state_dict()[k], v + 1) for k, v in net.state_dict().items())


# ---- stages --------------------------------------------------------------------------------------

SHORT = "--tiny --workers 0 --log_every 1 --epochs 1 --batch_size 4".split()


def run(out, *flags, n=1, code=0):
    r = quick("f2c_oops", *flags, "--out", out, n=n)
    assert r.code == code, r
    return r


def metrics(folder):
    return json.loads((folder / "metrics.json").read_bytes())


@pytest.fixture(scope="module")
def feats(data, tmp_path_factory):
    """Flags of the small world with its features."""
    root = tmp_path_factory.mktemp("oops")
    flags = ["--data", data / "oops", "--features", root / "features"]
    run(root / "out", "--stage", "features", "--tiny", "--workers", 0, *flags)
    return flags


@pytest.fixture(scope="module")
def chain(feats, tmp_path_factory):
    """Run folders of the stages that start from one another."""
    root, classify = tmp_path_factory.mktemp("chain"), ["--stage", "classify"]
    for name, before, *flags in (
            ("f2c", ""), ("f2c2v", "f2c", "--stage", "f2c2v"),
            ("clip", "f2c", *classify, "--batch_size", 64),
            ("crf", "f2c2v", *classify, "--level", "video"),
            ("ce", "f2c", *classify, "--level", "video", "--loss", "ce"),
            ("regression", "f2c2v", *classify, "--loss", "regression"),
            ("ahead", "f2c", *classify, "--batch_size", 64, "--anticipate", 0.5)):
        init = ["--init", root / before / "best.pt"] if before else []
        run(root / name, *SHORT, *feats, *flags, *init)
    return root


def test_each_stage_trains_its_part(chain):
    states = {path.parent.name: torch.load(path, weights_only=True)
              for path in chain.glob("*/best.pt")}
    classes = {"f2c": 8, "f2c2v": 6, "regression": 1}
    for name, state in states.items():
        assert len(state["model"]["head.4.weight"]) == classes.get(name, 3)
        assert 0 <= metrics(chain / name)["val_top1"] <= 100
        for key, x in states["f2c"]["model"].items():         # Enc_frame is trained at clip level
            if key.startswith("frame_encoder.layers.0"):
                assert torch.equal(state["model"][key], x) == (name not in ("clip", "ahead"))
    assert states["crf"]["args"]["loss"] == "crf"             # the default at video level


def slow_scores(chain, name, video):
    """p(label) of the clips of a video 0.25 s apart, one clip and one sequence at a time."""
    state = torch.load(chain / name / "best.pt", weights_only=True)
    args = SimpleNamespace(**state["args"])
    x = torch.from_numpy(np.load(video.features)["arr_0"])
    model = f.make_model(args, x.shape[1], 3).eval()
    model.load_state_dict(state["model"])
    apart, p = 4 if args.level == "video" else 1, {}          # as in training: 1 s
    for first in range(apart):
        z = torch.cat([model.frame_encoder(x[rows][None]) for rows in video.rows[first::apart]])
        q = model.head(z if apart == 1 else model.clip_encoder(z[None])[0, 1:])
        crf = args.loss == "crf"
        q = model.crf.marginals(q[None], torch.tensor([len(q)]))[0] if crf else q.softmax(1)
        p |= {first + apart * j: row.tolist() for j, row in enumerate(q)}
    return [p[j] for j in range(len(p))]


@pytest.mark.parametrize("name", ["clip", "crf", "ce", "regression", "ahead"])
def test_evaluation_scores_each_clip_as_the_definition_says(name, chain, feats, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    (one / "other.csv").write_text("of another run")
    for n, out, stage in ((1, one, "evaluate"), (2, two, "localize")):
        run(out, "--workers", 0, *feats, "--stage", stage, "--init", chain / name / "best.pt", n=n)
    assert (one / "other.csv").read_text() == "of another run"
    assert {*metrics(one)} == {*metrics(two)} and metrics(one)["videos"] == 13
    for k, v in metrics(one).items():
        assert v == metrics(two)[k] or v == pytest.approx(metrics(two)[k], abs=1e-3), k
    assert ("within_1s" in metrics(one)) == (one / "localization.csv").exists() == (name != "ahead")
    if name in ("clip", "crf", "ce"):
        args = f.parse_args([*map(str, feats)])
        videos = f.read_videos(args, "val", 1, f.read_annotations(args.data))
        video = f.label_videos(args, videos, 0.25)[3]
        with open(one / "predictions.csv", newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["filename"] == video.path.name]
        got = [[float(r[label]) for label in f.LABELS] for r in rows]
        assert np.allclose(got, slow_scores(chain, name, video), atol=1e-4)
        assert [int(r["label"]) for r in rows] == [*video.labels]
        assert metrics(one)["clips_1s"] == 13 * 8 and metrics(one)["clips_0.25s"] == 13 * len(rows)
        if name != "crf":                                     # Viterbi's labels
            assert [*np.argmax(got, 1)] == [int(r["predicted"]) for r in rows]
    if name == "ahead":
        assert metrics(one)["clips_oops_0.25s"] == metrics(one)["clips_paper_0.25s"] - 2 * 13


def released(model, path):
    """Save weights under the release's names, with what it has besides.   -> path"""
    two, state = hasattr(model, "clip_encoder"), {}
    local, top = ("local_model.", "global_model.") if two else ("", "")
    layer, tables = "temporal_encoder.encoder.layer", "temporal_encoder.embeddings"
    for name, x in model.state_dict().items():
        for ours, theirs in (
                (r"^head", f"{top}mlp_head"), (r"\.layers", f".{layer}"),
                (r"\.(query|key|value)", r".attention.self.\1"), (r"\.fc1", ".intermediate.dense"),
                (r"\.out", ".attention.output.dense"), (r"\.norm1", ".attention.output.LayerNorm"),
                (r"\.fc2", ".output.dense"), (r"\.norm2", ".output.LayerNorm"),
                (r"r\.norm", f"r.{tables}.LayerNorm"),
                (r"r\.position", f"r.{tables}.position_embeddings"),
                (r"r\.token_type", f"r.{tables}.token_type_embeddings"),
                (r"^frame_encoder\.", local), (r"^clip_encoder\.", top)):
            name = re.sub(ours, theirs, name)
        state[f"module.{name}"] = x
    state |= {f"module.{local}lin_projector.weight": torch.zeros(8, 4),
              f"module.{local}{tables}.position_ids": torch.zeros(1, 9)}
    state |= {"module.local_model.mlp_head.0.weight": torch.zeros(128)} if two else {}
    torch.save({"epoch": 7, "state_dict": state, "optimizer": {}}, path)
    return path


@pytest.mark.parametrize("two", [False, True])
def test_both_released_layouts_load_strictly(two, feats, tmp_path):
    torch.manual_seed(0)
    size = {**f.TINY_SIZES, "layers": 2, "as_released": True}
    model = f.F2C2V(128, 3, per_clip=True, **size) if two else f.F2C(128, 3, **size)
    path = released(model, tmp_path / "epoch7.pth.tar")
    flags = ["--tiny", "--workers", 0, *feats, "--as_released", "--stage"]
    level = ["--level", "video", "--loss", "ce"] if two else []
    r = run(tmp_path / "out", *flags, "evaluate", "--init", path, *level)
    assert f"{len(model.state_dict())} tensors loaded" in r.out and "lin_projector" in r.out
    train = [*flags, "classify", "--level", "video", "--epochs", 1, "--batch_size", 13]
    r = run(tmp_path / "train", *train, "--init", path)       # new head and CRF; F2C: new Enc_clip
    encoders = [k for k in model.state_dict() if "encoder" in k]
    assert f"{len(encoders)} tensors loaded" in r.out
    state = torch.load(path, weights_only=True)
    names = state["state_dict"]
    del names[next(k for k in names if k.endswith("layer.1.output.dense.bias"))]
    torch.save(state, path)
    for stage in ("evaluate", "classify"):
        r = run(tmp_path / stage, *flags, stage, "--init", path, *level, code=1)
        assert "1 tensors are missing, such as frame_encoder.layers.1.fc2.bias" in r.err


@pytest.mark.parametrize("flags, epochs, batch, level, loss, spacing, init, out", [
    ("f2c", 100, 128, "clip", "ce", 0.25, None, "f2c"),
    ("f2c2v", 100, 16, "video", "ce", 1, "f2c", "f2c2v"),
    ("classify", 50, 256, "clip", "ce", 0.25, "f2c", "classify"),
    ("classify --level video", 50, 8, "video", "crf", 1, "f2c2v", "classify_video"),
    ("classify --loss regression", 50, 8, "video", "regression", 1, "f2c2v",
     "classify_video_regression"),
    ("classify --anticipate 1.5", 50, 256, "clip", "ce", 0.25, "f2c", "classify_anticipate1.5"),
    ("classify --backbone r3d_18", 50, 256, "clip", "ce", 0.25, None, "classify_r3d_18"),
    ("localize", None, None, "clip", "ce", 0.25, "classify", "localize"),
    ("evaluate --level video", None, None, "video", "crf", 1, "classify_video", "evaluate"),
    ("features", None, None, "clip", "ce", 0.25, None, "features")])
def test_defaults_are_the_published_recipe(flags, epochs, batch, level, loss, spacing, init, out,
                                           monkeypatch):
    monkeypatch.setattr("sys.argv", ["f2c_oops.py"])
    args = f.parse_args(["--stage", *flags.split()])
    assert (args.epochs, args.batch_size, args.lr) == (epochs, batch, 1e-4)
    assert (args.level, args.loss, args.spacing) == (level, loss, spacing)
    assert args.init == (f"runs/f2c_oops_oops_{init}/best.pt" if init else "none")
    assert str(args.out) == f"runs/f2c_oops_oops_{out}"
    assert args.transforms == ",".join(VIDEO if "f2c2v" in flags else CLIP)
    assert (args.layers, args.window, args.weights) == (
        3, 32, "timm" if args.backbone == "vit_b16" else "torchvision")
    assert len(vars(args)) <= 34


def test_the_learning_rate_is_half_a_cosine():
    rates = [f.learning_rate(1e-4, epoch, 50) for epoch in (0, 25, 50)]
    assert rates == pytest.approx([1e-4, 5.05e-5, 1e-6])


@pytest.mark.parametrize("flags", [
    "--transforms x2,x4", "--as_released", "--stage f2c2v --transforms normal,warp",
    "--stage f2c2v --finetune_frames", "--stage f2c2v --as_released",
    "--stage classify --level video --freeze --as_released", "--stage classify --level video "
    "--finetune_frames --window 4", "--stage classify --loss regression --select last",
    "--stage classify --level video --anticipate 2 --spacing 0.5 --layers 1"])
def test_every_switch_trains(flags, feats, tmp_path):
    run(tmp_path / "out", *SHORT, *feats, *(["--init", "none"]), *flags.split())


def test_features_of_clips_and_their_classifier(data, tmp_path):
    flags = ["--tiny", "--workers", 0, "--data", data / "oops", "--backbone", "r2plus1d_18",
             "--features", tmp_path / "features"]
    run(tmp_path / "made", "--stage", "features", *flags)
    run(tmp_path / "clip", "--stage", "classify", *flags, "--epochs", 1, "--batch_size", 16)
    run(tmp_path / "out", "--stage", "evaluate", *flags, "--init", tmp_path / "clip" / "best.pt")
    assert metrics(tmp_path / "out")["clips_1s"] == 13 * 8


def test_training_replaces_broken_features_and_evaluation_names_them(chain, feats, data, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(feats[3], folder)
    flags = [*SHORT, "--data", data / "oops", "--features", folder]
    for split in ("train", "val"):
        nan, text, gone = sorted((folder / split).glob("*.npz"))[:3]
        np.savez(nan, **{**np.load(nan), "arr_0": np.full((126, 128), np.nan, np.float32)})
        text.write_bytes(b"PK") if split == "train" else None
        gone.rename(folder / gone.name)
    evaluate = [*flags, "--stage", "evaluate", "--init", chain / "clip" / "best.pt"]
    r = run(tmp_path / "evaluate", *evaluate, code=1)
    assert r.err.startswith(f"error: {nan}: ") and r.err.count("\n") == 1
    nan.unlink()
    r = run(tmp_path / "out", *flags)
    assert metrics(tmp_path / "out")["broken_training_samples"] >= 1
    assert f"warning: {folder}/train/" in r.out
    assert "train: 11 of 13 videos, 1 are without features" in r.out
    r = run(tmp_path / "some", *evaluate)                     # of what is there
    assert metrics(tmp_path / "some")["videos"] == 11 and "11 of 13 videos, 2 are with" in r.out


@pytest.mark.parametrize("flags, words, code", [
    ("--features OUT", "--stage features", 1), ("--stage f2c2v --init OUT/x.pt", "x.pt", 1),
    ("--stage evaluate --init F2C", "tensors", 1),
    ("--stage f2c2v --init none --freeze", "--freeze", 2), ("--level video", "--level", 2),
    ("--stage classify --level clip --loss crf", "--level video", 2),
    ("--transforms normal,x3", "--transforms", 2), ("--transforms x2,x2", "--transforms", 2),
    ("--stage classify --spacing 0.3", "--spacing", 2),
    ("--stage classify --loss regression --anticipate 1", "--loss regression", 2),
    ("--backbone r3d_18", "--backbone", 2)])
def test_a_mistake_is_one_line(flags, words, code, chain, feats, tmp_path):
    flags = [x.replace("OUT", str(tmp_path)).replace("F2C", str(chain / "f2c/best.pt"))
             for x in flags.split()]
    r = run(tmp_path / "out", "--tiny", "--workers", 0, *feats, *flags, code=code)
    assert r.err.startswith("error: ") and r.err.count("\n") == 1 and words in r.err
