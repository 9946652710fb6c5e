"""f2c_oops.py against its equations, the benchmark's definitions and the release's file formats."""

import csv
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import running
import torch
import torch.distributed as dist
import world
from running import quick

import common
import f2c_oops as f
from common import UserError, VideoError

CLIP, VIDEO = f.CLIP_TRANSFORMS, f.VIDEO_TRANSFORMS


def rng(*seed):
    return np.random.default_rng(seed)


# ---- transformations, clips and their labels, by the numbers of the frames -----------------------

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


@pytest.mark.parametrize("T", [16, 31, 100, 192, 193, 250, 1000])
def test_versions_of_a_video_stay_inside_it_and_depend_on_its_length(T):
    whole = np.arange(T // 16 * 16)
    for seed in range(20):
        versions = dict(f.transform_video(rng(seed), T, VIDEO))
        assert [*versions] == [n for n in VIDEO if T > 192 or n not in ("speed", "point")]
        for name, clips in versions.items():
            assert clips.shape[1:] == (16,) and {*clips.flat} <= {*whole}
            if name in ("normal", "shuffle", "warp"):
                assert [*np.sort(clips, None)] == [*whole]
        assert T <= 192 or len(versions["speed"]) >= 4
    assert f.transform_video(rng(0), 15, VIDEO) == []


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


@pytest.mark.parametrize("spacing", [0.25, 1])
def test_a_transition_between_two_clips_is_the_nearer_one(spacing):
    r = rng(1)
    for T in r.integers(20, 300, 200):
        _, spans = f.cut_clips(T, 30, np.arange(T) / 30, spacing)
        t = r.uniform(0, T / 30)
        far = [max(start - t, t - end, 0) for start, end in spans]        # 0: they contain t
        labels = [1 if x == 0 else 2 if start > t else 0 for x, (start, _) in zip(far, spans)]
        if 2 in labels and 1 not in labels:
            labels[far.index(min(far))] = 1
        assert [*f.video_labels(spans, t)] == labels
    args = SimpleNamespace(anticipate=30.0, as_released=False)            # longer than the video
    assert [len(x) for x in f.labels_of(args, spans, t, spacing, "oops")] == [0, 0]


# ---- networks, losses, metrics -------------------------------------------------------------------

SIZE = {"layers": 2, "heads": 2, "window": 6, "ff": 12, "positions": 11, "dropout": 0.0}


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


def test_ties_and_classes_without_clips_are_counted_as_defined():
    spans = np.array([[0, 1], [1, 2], [2, 3]])
    assert [f.predicted_time(np.array(p), spans) for p in ([0, 0.5, 0.5], [0, 0, 0])] == [1.5, 0]
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
    path = tmp_path / "annotations/transition_times.json"
    world.text(path, json.dumps({odd[0]: ENTRY}))
    assert f.read_annotations(tmp_path) == {odd[0]: ((-1, 2, 2.3), 5, (-0.2, 0.4, 0.46))}
    for broken in ({**ENTRY, "t": [1, 2]}, {**ENTRY, "len": 0}, {**ENTRY, "t": [1, 2, "x"]}, 3,
                   {"t": [1, 2, 3]}):
        path.write_text(json.dumps({"fine": ENTRY, "not fine": broken}))
        with pytest.raises(UserError, match="transition_times.json:not fine: "):
            f.read_annotations(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_of_a_feature_file_are_read_without_the_others(dtype, tmp_path):
    x, rows = rng(0).normal(size=(300, 5)).astype(dtype), rng(1).integers(0, 300, 12)
    for array, save in itertools.product((x, np.asfortranarray(x)),
                                         (np.savez_compressed, np.savez)):
        save(tmp_path / "a.npz", arr_0=array, fps=30.0)
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
    content = path.read_bytes()
    if fault in ("text", "cut", "packed"):                    # compressed data damaged
        path.write_bytes({"text": b"hello", "cut": content[:200]}.get(
            fault, content[:60] + b"\xff" * 9 + content[69:]))
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
    """p(label) of the clips of a video 0.25 s apart, one clip and one sequence at a time. By
    regression: the time relative to the length, from clips 1 s apart.
    """
    state = torch.load(chain / name / "best.pt", weights_only=True)
    args = SimpleNamespace(**state["args"])
    x = torch.from_numpy(np.load(video.features)["arr_0"])
    model = f.make_model(args, x.shape[1], len(state["model"]["head.4.weight"])).eval()
    model.load_state_dict(state["model"])
    apart, p = 4 if args.level == "video" else 1, np.zeros((len(video.rows), 3))
    for first in range(apart):                                # as in training: 1 s
        z = torch.cat([model.frame_encoder(x[rows][None]) for rows in video.rows[first::apart]])
        if name == "regression":
            return model.head(model.clip_encoder(z[None])).sigmoid().item()
        q = model.head(z if apart == 1 else model.clip_encoder(z[None])[0, 1:])
        crf = args.loss == "crf"
        q = model.crf.marginals(q[None], torch.tensor([len(q)]))[0] if crf else q.softmax(1)
        p[first::apart] = q.detach()
    return p


def test_without_the_fourth_annotator_the_rest_is_measured(tmp_path):
    annotation = f.Annotation((1.0, 2.0, 3.5), 10.0, ())
    video = SimpleNamespace(path=tmp_path / "a.mp4", annotation=annotation)
    args = SimpleNamespace(data=tmp_path, out=tmp_path)
    found = f.localize(args, [video], [0.9])
    assert found["within_0.25s"] == 100 and math.isnan(found["human_within_1s"])
    assert found["chance_within_1s"] == 20 and found["middle_within_1s"] == 0
    assert found["mean_relative_error"] == pytest.approx(1)
    world.text(tmp_path / "heldout_transition_times.json", '{"a.mp4": {"t": [3.4]}}')
    assert f.localize(args, [video], [0.9])["human_within_0.25s"] == 100


@pytest.mark.parametrize("name, n", [("clip", 1), ("crf", 2), ("ce", 1), ("regression", 2),
                                     ("ahead", 1)])
def test_evaluation_scores_each_clip_as_the_definition_says(name, n, chain, feats, tmp_path):
    out = tmp_path / "out"
    run(out, "--workers", 0, *feats, "--stage", "evaluate", "--init", chain / name / "best.pt", n=n)
    found = metrics(out)
    assert found["videos"] == 13
    assert ("within_1s" in found) == (out / "localization.csv").exists() == (name != "ahead")
    if name == "ahead":
        assert found["clips_oops_0.25s"] == found["clips_paper_0.25s"] - 2 * 13
        return
    args = f.parse_args([*map(str, feats)])
    videos = f.read_videos(args, "val", 1, f.read_annotations(args.data))
    video = f.label_videos(args, videos, 0.25)[3]
    slow, regression = slow_scores(chain, name, video), name == "regression"
    table = "localization.csv" if regression else "predictions.csv"
    with open(out / table, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["filename"] == video.path.name]
    if regression:
        slow *= video.annotation.length
        assert float(rows[0]["predicted_s"]) == pytest.approx(slow, abs=1e-3)
        return
    got = [[float(r[label]) for label in f.LABELS] for r in rows]
    assert np.allclose(got, slow, atol=1e-4)
    assert [int(r["label"]) for r in rows] == [*video.labels]
    assert found["clips_1s"] == 13 * 8 and found["clips_0.25s"] == 13 * len(rows)
    if name != "crf":                                         # Viterbi's labels
        assert [*np.argmax(got, 1)] == [int(r["predicted"]) for r in rows]


@pytest.mark.parametrize("name, head", [("clip", []), ("ce", ["--level", "video", "--loss", "ce"])])
def test_a_checkpoint_of_the_release_needs_its_flags_alone(name, head, chain, feats, tmp_path):
    """Ours, laid out as one of the release, which holds no flags and tensors that are not used."""
    ours = torch.load(chain / name / "best.pt", weights_only=True)["model"]
    state = {f"module.{k}": x for k, x in ours.items()}
    state |= {"module.lin_projector.weight": torch.zeros(8, 4)}
    path, flags = tmp_path / "epoch7.pth.tar", ["--tiny", "--workers", 0, *feats, *head, "--stage"]
    torch.save({"epoch": 7, "state_dict": state, "optimizer": {}}, path)
    r = run(tmp_path / "out", *flags, "evaluate", "--init", path)
    assert f"{len(ours)} tensors loaded" in r.out and "lin_projector" in r.out
    train = [*flags[:-1], "--level", "video", "--epochs", 1, "--batch_size", 13]
    r = run(tmp_path / "train", *train, "--stage", "classify", "--init", path)
    encoders = [k for k in ours if "encoder" in k]            # the head, Enc_clip of F2C are new
    assert f"{len(encoders)} tensors loaded" in r.out
    del state["module.frame_encoder.layers.1.fc2.bias"]
    torch.save({"state_dict": state}, path)
    for stage in ("evaluate", "classify"):
        r = run(tmp_path / stage, *flags, stage, "--init", path, code=1)
        assert "1 tensors are missing, such as frame_encoder.layers.1.fc2.bias" in r.err


@pytest.mark.parametrize("flags, epochs, batch, level, loss, spacing, init", [
    ("f2c", 100, 128, "clip", "ce", 0.25, None), ("f2c2v", 100, 16, "video", "ce", 1, "f2c"),
    ("classify", 50, 256, "clip", "ce", 0.25, "f2c"),
    ("classify --level video", 50, 8, "video", "crf", 1, "f2c2v"),
    ("classify --loss regression", 50, 8, "video", "regression", 1, "f2c2v"),
    ("classify --anticipate 1.5", 50, 256, "clip", "ce", 0.25, "f2c"),
    ("classify --backbone r3d_18", 50, 256, "clip", "ce", 0.25, None),
    ("localize", None, None, "clip", "ce", 0.25, "classify"),
    ("evaluate --level video", None, None, "video", "crf", 1, "classify"),
    ("features", None, None, "clip", "ce", 0.25, None)])
def test_defaults_are_the_published_recipe(flags, epochs, batch, level, loss, spacing, init,
                                           monkeypatch):
    monkeypatch.setattr("sys.argv", ["f2c_oops.py"])
    args = f.parse_args(["--stage", *flags.split()])
    assert (args.epochs, args.batch_size, args.lr) == (epochs, batch, 1e-4)
    assert (args.level, args.loss, args.spacing) == (level, loss, spacing)
    assert args.init == (f"runs/f2c_oops_oops_{init}/best.pt" if init else "none")
    assert str(args.out) == f"runs/f2c_oops_oops_{args.stage}"
    assert args.transforms == [*(VIDEO if "f2c2v" in flags else CLIP)]
    assert (args.layers, args.window, args.weights) == (
        3, 32, "timm" if args.backbone == "vit_b16" else "torchvision")


@pytest.mark.parametrize("flags", [
    "--transforms x2,x4", "--as_released", "--stage f2c2v --transforms normal,warp",
    "--stage f2c2v --finetune_frames", "--stage f2c2v --as_released",
    "--stage classify --level video --freeze --as_released", "--stage classify --level video "
    "--finetune_frames --window 4", "--stage classify --loss regression",
    "--stage classify --level video --anticipate 2 --spacing 0.5 --layers 1"])
def test_every_switch_trains(flags, feats, tmp_path):
    run(tmp_path / "out", *SHORT, *feats, "--init", "none", *flags.split())


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
    np.savez(nan, **{**np.load(nan), "arr_0": np.ones((126, 64), np.float32)})
    r = run(tmp_path / "evaluate", *evaluate, code=1)
    assert re.match(rf"error: {folder}/val/val .*npz: not 64 wide, as is {nan.name}\n", r.err)
    nan.unlink()
    r = run(tmp_path / "out", *flags)
    assert metrics(tmp_path / "out")["broken_training_samples"] >= 1
    assert f"warning: {folder}/train/" in r.out
    assert "train: 11 of 13 videos, 1 are without features" in r.out
    r = run(tmp_path / "some", *evaluate)                     # of what is there
    assert metrics(tmp_path / "some")["videos"] == 11 and "11 of 13 videos, 2 are with" in r.out


@pytest.mark.parametrize("flags, word", [
    ("--stage f2c2v --freeze", "--freeze"), ("--level video", "--level"),
    ("--stage classify --level clip --loss crf", "--level video"),
    ("--transforms normal,x3", "--transforms"), ("--transforms x2,x2", "--transforms"),
    ("--stage classify --spacing 0.3", "--spacing"), ("--backbone r3d_18", "--backbone"),
    ("--stage classify --loss regression --anticipate 1", "--loss regression")])
def test_flags_that_do_not_fit_are_named_in_one_line(flags, word, capsys):
    with pytest.raises(SystemExit):
        f.parse_args(flags.split())
    error = capsys.readouterr().err
    assert error.startswith("error: ") and word in error and error.count("\n") == 1
