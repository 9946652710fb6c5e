"""cpctrans.py: lists, frames, loss, network, stages, protocol and checkpoints."""

import collections
import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import running
import test_media
import torch
import torch.distributed as dist
import toy
from PIL import Image
from test_replai import contents, one_error, random
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import cpctrans
from common import UserError, VideoError

quick = functools.partial(running.quick, script="cpctrans")
command = functools.partial(running.command, script="cpctrans")
CLASSES = {"Archery": 3, "HandstandPushups": 37, "HammerThrow": 36, "YoYo": 101}
MINI = ("--tiny --net resnet10 --width 8 --heads 2 --img_dim 32 --crop 32 --batch_size 4 "
        "--epochs 2 --workers 0 --log_every 1 --save_every 2").split()
TUNE = [*MINI, "--stage", "finetune", "--init", "none"]


# ---- a small world -----------------------------------------------------------------------------

def write_lists(root, videos, classes=CLASSES):
    """ucfTrainTestlist of {(class, group, clip): ...}: test groups 1-7, 8-14, 15-21."""
    folder = root / "ucfTrainTestlist"
    folder.mkdir(parents=True)
    (folder / "classInd.txt").write_bytes("".join(
        f"{n} {c}\r\n" for c, n in sorted(classes.items(), key=lambda x: x[1])).encode())
    for k in (1, 2, 3):
        rows = {"train": [], "test": []}
        for c, g, i in videos:
            inside = 7 * k - 6 <= g <= 7 * k
            rows["test" if inside else "train"].append(
                f"{c}/{file_name(c, g, i)}.avi" + "" if inside else
                f"{c}/{file_name(c, g, i)}.avi {classes[c]}")
        for part, lines in rows.items():
            (folder / f"{part}list0{k}.txt").write_bytes("".join(
                f"{r}\r\n" for r in lines).encode())


def file_name(c, group, clip):
    return f"v_{c.replace('Handstand', 'HandStand')}_g{group:02d}_c{clip:02d}"


LENGTHS = {1: 29, 2: 40, 8: 29, 9: 33, 15: 16, 16: 31, 24: 30, 25: 29}        # of the groups


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    """32 videos whose pictures carry their numbers; those of group 15 are too short for a clip."""
    root = tmp_path_factory.mktemp("ucf") / "ucf101"
    write_lists(root, [(c, g, 1) for c in CLASSES for g in LENGTHS])
    for n, c in enumerate(CLASSES):
        for g, length in LENGTHS.items():
            toy.write_video(root / "UCF-101" / c / f"{file_name(c, g, 1)}.avi",
                            (test_media.paint(k, 96, 64) for k in range(length)), 25,
                            codec="mpeg4", options={"qmin": "2", "qmax": "4"}, gop=12 + 7 * n)
    return root


def arguments(*flags, path=None):
    args = cpctrans.parse_args([*MINI, *map(str, flags)])
    cpctrans.fill_from(args, path)
    return args


def numbers(clip):
    """Of painted pictures, (T, H, W, 3)."""
    return [test_media.number_of(f) for f in np.asarray(clip)]


# ---- loss --------------------------------------------------------------------------------------

@pytest.mark.parametrize("b, p, m, d", [(1, 1, 1, 4), (1, 3, 4, 5), (3, 2, 4, 6), (4, 3, 1, 2)])
def test_the_loss_is_the_sum_in_the_paper(b, p, m, d):
    z_hat, z = random(b, p, m, d), random(b, p, m, d, seed=1)
    rows = [(i, j, k) for i in range(b) for j in range(p) for k in range(m)]
    total, tops = 0.0, collections.Counter()
    for row in rows:
        s = {col: float((z_hat[row].double() * z[col].double()).sum()) for col in rows}
        total -= math.log(math.exp(s[row]) / sum(math.exp(v) for v in s.values()))
        place = sorted(s.values(), reverse=True).index(s[row])
        tops.update({k: place < k for k in (1, 3, 5)})
    out = cpctrans.contrast(SimpleNamespace(negatives="all"), z_hat, z)
    assert out["loss"].item() == pytest.approx(total / len(rows), rel=1e-5)
    for k in (1, 3, 5):
        assert out[f"top{k}"].item() == pytest.approx(tops[k] / len(rows))


def test_pairs_have_the_categories_of_their_definition():
    kinds = cpctrans.pair_categories(2, 3, 4)
    for (b, p, s, c, q, t), kind in np.ndenumerate(kinds.numpy()):
        want = 0 if b != c else -3 if s != t else 1 if p == q else -1
        assert kind == want


def test_a_network_that_knows_nothing_is_at_the_chance_level():
    zeros = torch.zeros(2, 3, 4, 8)
    out = cpctrans.contrast(SimpleNamespace(negatives="all"), zeros, zeros)
    assert out["loss"].item() == pytest.approx(math.log(2 * 3 * 4))


def share(rank):
    """Loss and gradients of one of two processes that share a batch of 4, and of all 4 alone."""
    args = arguments("--num_seq", 3, "--pred_step", 2)
    torch.manual_seed(0)
    model = cpctrans.CPC(args).eval()                         # no batch norm, no dropout
    clip, found = random(4, 3, 3, 32, 32), {}
    for name, negatives, mine in (("alone", "local", clip), ("all", "all", clip[2 * rank:][:2]),
                                  ("local", "local", clip[2 * rank:][:2])):
        args.negatives, ddp = negatives, model if name == "alone" else DDP(model)
        model.zero_grad()
        terms = cpctrans.contrast(args, *ddp(mine))
        terms["loss"].backward()
        means = {k: v.detach().clone() for k, v in terms.items()}
        for v in means.values():
            dist.all_reduce(v)
        found[name] = {k: v / 2 for k, v in means.items()}, {
            k: p.grad.clone() for k, p in model.named_parameters()}
    return found


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    for found in running.processes(share, 2, tmp_path):
        for k, v in found["alone"][0].items():
            assert found["all"][0][k].item() == pytest.approx(v.item(), rel=1e-5)
        assert found["local"][0]["loss"] < found["all"][0]["loss"]            # fewer negatives
        for k, g in found["alone"][1].items():
            assert torch.allclose(found["all"][1][k], g, rtol=1e-3, atol=1e-6), k


# ---- network -----------------------------------------------------------------------------------

def count(module):
    return sum(p.numel() for p in module.parameters())


def test_numbers_of_parameters_are_those_of_the_release_without_its_dead_ones():
    args = cpctrans.parse_args([])
    cpctrans.fill_from(args, None)
    model = cpctrans.CPC(args)
    assert [count(m) for m in (model.backbone, model.encoder, model.agg, model.network_pred)] == [
        5_210_176, 2_630_656, 393_984, 131_584]
    assert count(model) == 8_366_400
    for classes, head in ((101, 25_957), (51, 13_107)):
        assert count(cpctrans.Classifier(args, classes).final_fc) == head
    assert count(common.PredictiveResNet("resnet34")) == 12_041_024 - 262_656


@pytest.mark.parametrize("b, n, p, side", [(1, 5, 3, 64), (3, 4, 1, 40), (2, 8, 3, 32)])
def test_every_box_has_its_shape_and_every_parameter_a_gradient(b, n, p, side):
    args = arguments("--num_seq", n, "--pred_step", p)
    model, s = cpctrans.CPC(args), math.ceil(side / 32)
    z_hat, z = model(random(b, n, 3, side, side))
    assert z_hat.shape == z.shape == (b, p, s * s, 32)
    cpctrans.contrast(args, z_hat, z)["loss"].backward()
    dead = [k for k, v in model.named_parameters() if v.grad is None]
    assert not dead
    classifier = cpctrans.Classifier(args, 7).train()
    classifier(random(b, n, 3, side, side)).logsumexp(1).sum().backward()
    assert all(v.grad is not None for v in classifier.parameters())
    assert classifier.embed(random(b, n, 3, side, side)).shape == (b, 32, s, s)


def test_the_context_sees_the_future_unless_attention_is_causal():
    for attn in ("full", "causal"):
        torch.manual_seed(0)
        model = cpctrans.CPC(arguments("--attn", attn)).eval()
        clip = random(2, 5, 3, 64, 64)
        before = model(clip)
        clip[:, -1] = 0
        after = model(clip)
        assert (before[0] - after[0]).abs().max() > 1e-4 if attn == "full" else (
            torch.equal(before[0], after[0]))
        assert not torch.equal(before[1][:, -1], after[1][:, -1])


def test_without_positions_the_transformer_does_not_know_the_order():
    for pos in ("none", "sin"):
        model = cpctrans.CPC(arguments("--pos", pos)).eval()
        f = random(2, 4, 32, 2, 2)
        there, back = model.encoder(f), model.encoder(f.flip(1)).flip(1)
        assert torch.allclose(there, back, atol=1e-5) == (pos == "none")


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    args = arguments()
    model, clip = cpctrans.CPC(args), random(4, 5, 3, 32, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        terms = cpctrans.contrast(args, *model(clip))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss"] < 0.8 and terms["top3"] > 0.9


# ---- which frames ------------------------------------------------------------------------------

def test_pictures_are_read_by_number_from_videos_and_from_folders(ucf, tmp_path):
    path, folder = next((ucf / "UCF-101").rglob("*HammerThrow_g09*")), tmp_path / "jpg"
    assert common.count_frames(path) == LENGTHS[9]
    folder.mkdir()
    for k in range(12):
        Image.fromarray(test_media.paint(k, 96, 64)).save(folder / f"image_{k + 1:05d}.jpg")
    assert common.count_frames(folder) == 12
    for source, last in ((path, LENGTHS[9]), (folder, 12)):
        for wanted in ([0], [3, 4, 5], list(range(0, last, 3)), [last - 1]):
            assert numbers(common.read_frames(source, wanted)) == wanted
    (folder / "image_00004.jpg").unlink()
    with pytest.raises(VideoError, match="image_00004.jpg is missing"):
        common.count_frames(folder)
    (folder / "image_00005.jpg").write_bytes(b"no picture")
    with pytest.raises(VideoError, match="image_00005.jpg: cannot be read"):
        common.read_frames(folder, [4])


@pytest.mark.parametrize("name", [n for n in test_media.FILES if n.startswith("avi")])
def test_numbers_count_decoded_pictures_in_every_kind_of_avi(name, tmp_path):
    suffix, how = test_media.FILES[name]
    path = tmp_path / f"video{suffix}"
    test_media.write_video(path, **how)
    import av
    with av.open(str(path)) as c:
        truth = [f.to_ndarray(format="rgb24") for f in c.decode(video=0)]
    assert common.count_frames(path) == len(truth)
    rng = np.random.default_rng(0)
    for start in rng.integers(len(truth) - 15, size=20):
        wanted = list(range(start, start + 15, 3))
        got = common.read_frames(path, wanted)
        assert all(np.array_equal(a, truth[k]) for a, k in zip(got, wanted)), wanted


def dataset(ucf, tmp_path, *flags, part="train"):
    args = arguments("--data", ucf, "--out", tmp_path / "runs" / "x", *flags)
    videos, _, _ = cpctrans.read_videos(args, part)
    return args, videos


def test_training_clips_begin_anywhere_and_are_ds_frames_apart(ucf, tmp_path, monkeypatch):
    args, videos = dataset(ucf, tmp_path, "--num_seq", 4, "--ds", 3)
    seen = []
    monkeypatch.setattr(cpctrans, "short_side_to", lambda frames, side: (
        seen.append(numbers(frames)), frames)[1])
    clips = cpctrans.TrainClips(args, videos, lambda f, rng, a: (f[:, :32, :32], {}))
    starts = collections.defaultdict(set)
    for epoch in range(120):
        clips[epoch, 2]
        assert np.array_equal(np.diff(seen[-1]), [3, 3, 3])
        starts[2].add(seen[-1][0])
    length = videos.frames[2]
    assert starts[2] == set(range(length - 12)), "starts 0 .. length - N·ds - 1, all of them"
    clips[7, 2], clips[7, 2]
    assert seen[-1] == seen[-2]                               # the same clip on any rank


def test_test_clips_follow_one_another_and_cover_the_video(ucf, tmp_path, monkeypatch):
    args, videos = dataset(ucf, tmp_path, "--num_seq", 3, "--ds", 2, part="val")
    seen = []
    monkeypatch.setattr(cpctrans, "short_side_to", lambda frames, side: (
        seen.append(numbers(frames)), frames)[1])
    for i, length in enumerate(videos.frames):
        frames = list(range(0, length, 2))
        want = [frames[k:k + 3] for k in range(0, len(frames) - 2, 3)]
        all_, middle = cpctrans.TestClips(args, videos)[i], cpctrans.TestClips(args, videos, True)[i]
        assert seen[-2] == sum(want, []) and seen[-1] == want[len(want) // 2]
        assert all_.shape == (len(want), 3, 3, 32, 32) and middle.shape == (3, 3, 32, 32)


def test_short_videos_repeat_their_last_picture_or_are_left_out(ucf, tmp_path, capsys):
    args, videos = dataset(ucf, tmp_path, "--num_seq", 6)
    assert "4 too short (their last picture repeated)" in capsys.readouterr().out
    i = list(videos.frames).index(LENGTHS[15])
    assert numbers(cpctrans.pictures(videos.name[i], np.arange(0, 18, 3), 16, 32)) == [
        0, 3, 6, 9, 12, 15]
    assert numbers(cpctrans.pictures(videos.name[i], np.arange(9, 24, 3), 16, 32)) == [
        9, 12, 15, 15, 15]
    _, fewer = dataset(ucf, tmp_path, "--num_seq", 6, "--short", "drop")
    assert len(fewer.name) == len(videos.name) - 4
    assert "4 too short (left out)" in capsys.readouterr().out


def test_pictures_are_counted_once(ucf, tmp_path, monkeypatch):
    dataset(ucf, tmp_path)
    monkeypatch.setattr(common, "count_frames", None)         # would raise if it were called
    _, videos = dataset(ucf, tmp_path)
    assert set(videos.frames) == {LENGTHS[g] for g in (8, 9, 15, 16)}


@pytest.mark.parametrize("crops", [1, 5, 10])
def test_crops_are_the_centre_the_corners_and_mirrored(ucf, tmp_path, crops):
    args, videos = dataset(ucf, tmp_path, "--num_seq", 3, "--crops", crops, part="val")
    x = cpctrans.TestClips(args, videos)[0]
    frames = cpctrans.pictures(videos.name[0], np.arange(3) * 3, 30, 32)      # (3, 34, 51, 3)
    views = [frames] + [frames[:, :, ::-1]] * (crops == 10)
    places = [(10, 1), (0, 0), (19, 0), (0, 2), (19, 2)][:1 if crops == 1 else 5]
    clips = len(x) // crops
    for k, (view, (left, top)) in enumerate((v, p) for v in views for p in places):
        want = view[:, top:top + 32, left:left + 32].transpose(0, 3, 1, 2)
        assert np.array_equal(x[k * clips].numpy(), want)


# ---- lists -------------------------------------------------------------------------------------

def official(tmp_path, dataset):
    """Lists of the official size and form, without videos; {split: (train, test)}."""
    if dataset == "ucf101":
        classes = {f"Class{n}" if n not in (36, 37) else {
            36: "HammerThrow", 37: "HandstandPushups"}[n]: n for n in range(1, 102)}
        total = {1: 9537, 2: 9586, 3: 9624}
        sizes = {k: 13320 - n for k, n in total.items()}      # of the test groups 1-7, 8-14, 15-21
        videos = []
        for k, n in sizes.items():
            videos += [(list(classes)[i % 101], 7 * k - 6 + i // 101 % 7, 1 + i // 707)
                       for i in range(n)]
        rest = 13320 - len(videos)
        videos += [(list(classes)[i % 101], 22 + i // 101 % 4, 1 + i // 404) for i in range(rest)]
        write_lists(tmp_path, videos, classes)
        return {k: (total[k], sizes[k]) for k in (1, 2, 3)}
    folder = tmp_path / "testTrainMulti_7030_splits"
    folder.mkdir(parents=True)
    names = [f"class_{n:02d}" for n in range(47)] + ["climb", "climb_stairs", "kick", "kick_ball"]
    for c in names:
        for k in (1, 2, 3):
            codes = [1] * 70 + [2] * 30 + [0] * (6766 // 51 - 100)
            (folder / f"{c}_test_split{k}.txt").write_text("".join(
                f"Film_[HD]_(a)#{i // 4}_{c}_f_cm_np1_ba_med_{i}.avi {codes[i - 30 * k]} \n"
                for i in range(len(codes))))
    return {k: (3570, 1530) for k in (1, 2, 3)}


@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
def test_lists_of_the_official_form_are_read_whole(dataset, tmp_path):
    sizes = official(tmp_path, dataset)
    args = SimpleNamespace(dataset=dataset, data=tmp_path, lists=None)
    for k, (train, test) in sizes.items():
        found = {part: cpctrans.read_list(args, part, k) for part in ("train", "test")}
        assert (len(found["train"][0]), len(found["test"][0])) == (train, test)
        assert not set(found["train"][0]) & set(found["test"][0])
        for names, labels, classes, _ in found.values():
            assert len(classes) == {"ucf101": 101, "hmdb51": 51}[dataset]
            assert set(labels) == set(range(len(classes)))
            assert all(n.split("/")[0].lower() == classes[y] for n, y in zip(names, labels))
        held = cpctrans.hold_out(dataset, found["train"][0])
        assert 0.05 < held.mean() < 0.2
    if dataset == "hmdb51":
        assert classes[-4:] == ["climb", "climb_stairs", "kick", "kick_ball"]


@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
def test_no_source_is_both_trained_on_and_held_out(dataset, tmp_path):
    official(tmp_path, dataset)
    names = cpctrans.read_list(SimpleNamespace(dataset=dataset, data=tmp_path, lists=None),
                               "train", 1)[0]
    held = cpctrans.hold_out(dataset, names)

    def source(name):
        folder, video = name.split("/")
        return name.rsplit("_c", 1)[0] if dataset == "ucf101" else video.split(f"_{folder}_")[0]
    sides = [{source(n) for n, h in zip(names, held) if h == side} for side in (True, False)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize("root", ["/any/root/frame", "D:\\data\\frame"])
def test_the_authors_csv_and_folders_of_pictures_are_read(root, ucf, tmp_path):
    """By class and video: the folders that his rows begin with are on his machine."""
    frames, lists = tmp_path / "jpg", tmp_path / "lists"
    lists.mkdir()
    slash = "\\" if "\\" in root else "/"
    for part in ("train", "test"):
        rows = []
        for row in (ucf / "ucfTrainTestlist" / f"{part}list01.txt").read_text().split("\n")[:-1]:
            name = row.split(".avi")[0].replace("/", slash)
            rows.append(f"{root}{slash}{name}{slash},20\n")
            folder = frames / name.replace("\\", "/")
            folder.mkdir(parents=True)
            for k in range(20):
                Image.fromarray(test_media.paint(k, 48, 34)).save(folder / f"image_{k + 1:05d}.jpg")
        (lists / f"{part}_split01.csv").write_text("".join(rows))
    args = arguments("--data", ucf, "--frames", frames, "--lists", lists, "--num_seq", 3,
                     "--out", tmp_path / "out")
    videos, classes, _ = cpctrans.read_videos(args, "val")
    assert classes == sorted(c.lower() for c in CLASSES) and set(videos.frames) == {20}
    assert len(videos.name) == 8 and cpctrans.TestClips(args, videos)[0].shape[0] == 2
    shutil.copy(ucf / "ucfTrainTestlist" / "classInd.txt", lists)
    _, classes, _ = cpctrans.read_videos(args, "val")
    assert classes[36] == "handstandpushups" and len(classes) == 101


FAULTS = {  # name: (file, its line or None for the whole, the new content, line of the fault, words)
    "no class": ("trainlist01.txt", 2, "Fencing/v_Fencing_g08_c01.avi 3", 2, "classInd"),
    "other number": ("trainlist01.txt", 3, "Archery/v_Archery_g15_c01.avi 4", 3, "classInd"),
    "no folder": ("trainlist01.txt", 1, "v_Archery_g08_c01.avi 3", 1, "<Class>/<video>.avi"),
    "path": ("trainlist01.txt", 1, "Archery/../../etc/passwd.avi 3", 1, "no file name"),
    "two dots": ("trainlist01.txt", 4, "Archery/...avi 3", 4, "no file name"),
    "class number": ("classInd.txt", 2, "x HammerThrow", 2, "<number> <Class>"),
    "class twice": ("classInd.txt", 2, "36 Archery", 2, "twice"),
    "binary": ("trainlist01.txt", 2, b"\xff\xfe\x00", None, "UTF-8"),
    "empty": ("trainlist01.txt", None, "", None, "empty"),
    "twice": ("trainlist01.txt", 2, "Archery/v_Archery_g08_c01.avi 3", None, "twice"),
    "no list": ("trainlist01.txt", None, None, None, "no split lists"),
    "no classes": ("classInd.txt", None, None, None, "classInd.txt"),
}


def break_list(folder, name, line, content):
    path = folder / name
    if content is None:
        return path.unlink()
    content = content if isinstance(content, bytes) else content.encode()
    rows = path.read_bytes().split(b"\r\n")
    if line:
        rows[line - 1] = content
    path.write_bytes(b"\r\n".join(rows) if line else content)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_list_names_file_and_line(name, ucf, tmp_path):
    shutil.copytree(ucf / "ucfTrainTestlist", tmp_path / "lists")
    file, line, content, at, words = FAULTS[name]
    break_list(tmp_path / "lists", file, line, content)
    args = SimpleNamespace(dataset="ucf101", data=ucf, lists=tmp_path / "lists")
    with pytest.raises(UserError, match=words) as e:
        cpctrans.read_list(args, "train", 1)
    assert str(tmp_path / "lists") in str(e.value) and (not at or f"{file}:{at}:" in str(e.value))


@pytest.mark.parametrize("row", ["x.avi 3 ", "x.avi", "x 1", "a/b.avi 1 ", "\x01.avi 1"])
def test_a_fault_in_an_hmdb_list_names_file_and_line(row, tmp_path):
    path = tmp_path / "kick_test_split1.txt"
    path.write_text(f"fine_kick_1.avi 1 \n{row}\n")
    with pytest.raises(UserError, match=r"kick_test_split1.txt:2: "):
        cpctrans.read_hmdb51_file(path)


# ---- what a clip looks like ----------------------------------------------------------------------

def test_a_clip_is_cut_and_mirrored_as_one_and_its_colours_drawn_per_picture():
    frames = np.stack([test_media.paint(5, 96, 64)] * 4)
    args = arguments("--crop", 48, "--img_dim", 32)
    for seed in range(4):
        clip, colour = cpctrans.distort_pretrain(frames, np.random.default_rng(seed), args)
        assert clip.shape == (4, 32, 32, 3) and all(np.array_equal(f, clip[0]) for f in clip)
        assert len({tuple(f) for f in colour["factors"]}) == 4
        clip, colour = cpctrans.distort_finetune(frames, np.random.default_rng(seed), args)
        assert clip.shape == (4, 32, 32, 3) and all(np.array_equal(f, clip[0]) for f in clip)
        assert len({tuple(f) for f in colour["factors"]}) == 1


def test_draws_have_the_published_ranges():
    rng, args, shapes = np.random.default_rng(0), arguments(), []
    frames = np.zeros((5, 34, 51, 3), np.uint8)
    frames[:, :, :25] = 1                                     # left and right can be told apart
    kinds = collections.Counter()
    for _ in range(400):
        _, colour = cpctrans.distort_pretrain(frames, rng, args)
        kinds.update(colour["grey"].tolist())
        f = colour["factors"]
        assert (abs(f - (1, 1, 1, 0)) <= (0.5, 0.5, 0.5, 0.25)).all()
        assert (np.sort(colour["order"], 1) == np.arange(4)).all()
        clip, colour = cpctrans.distort_finetune(frames, rng, args)
        kinds["jittered"] += int(colour["order"][0, 0] >= 0)
        kinds["mirrored"] += int(clip[0, 0, 0, 0] < clip[0, 0, -1, 0])
        x, y, w, h = cpctrans.sized_crop_box(rng, 320, 240)
        assert 0 <= x <= 320 - w and 0 <= y <= 240 - h
        shapes.append((w * h / 76800, w / h))
    area, aspect = np.array(shapes).T
    assert 0.49 < area.min() < 0.55 and area.max() > 0.9
    assert 0.74 < aspect.min() and aspect.max() < 1.35
    assert kinds[-1] == pytest.approx(1000, abs=100)          # of 2000 pictures, half stay coloured
    assert all(kinds[c] == pytest.approx(333, abs=80) for c in range(3))
    assert kinds["jittered"] == pytest.approx(120, abs=40)
    assert kinds["mirrored"] == pytest.approx(200, abs=50)
