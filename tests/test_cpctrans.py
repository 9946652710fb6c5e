"""cpctrans.py: lists, frames, loss, network, stages, protocol and checkpoints."""

import collections
import functools
import json
import math
import os
import re
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


@pytest.mark.parametrize("attn", ["full", "causal", "frame"])
def test_what_the_context_and_the_targets_have_seen(attn):
    torch.manual_seed(0)
    model, clip = cpctrans.CPC(arguments("--attn", attn)).eval(), random(2, 5, 3, 64, 64)
    (context, target), late, early = model(clip), clip.clone(), clip.clone()
    late[:, -1], early[:, 0] = 0, 0
    assert torch.equal(context, model(late)[0]) == (attn != "full")           # the future
    assert torch.equal(target, model(early)[1]) == (attn == "frame")          # the past
    assert not torch.equal(context, model(early)[0])
    assert not torch.equal(target[:, -1], model(late)[1][:, -1])


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
        all_ = cpctrans.TestClips(args, videos)[i]
        middle = cpctrans.TestClips(args, videos, middle=True)[i]
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


def test_numbers_of_several_folders_stay_and_a_changed_file_is_counted_again(ucf, tmp_path):
    other = shutil.copytree(ucf, tmp_path / "other", symlinks=False)
    (_, a), (_, b) = dataset(ucf, tmp_path), dataset(other, tmp_path)
    cache = tmp_path / "runs" / "cpctrans_ucf101_frames.json"
    kept = json.loads(cache.read_text())
    assert len(kept) == 2 and a.frames.tolist() == b.frames.tolist()
    long, short = (Path(os.fsdecode(b.name[np.flatnonzero(b.frames == n)[0]]))
                   for n in (b.frames.max(), b.frames.min()))
    shutil.copyfile(short, long)
    os.utime(long, (1, 1))
    _, c = dataset(other, tmp_path)
    assert sorted(b.frames.tolist()) != sorted(c.frames.tolist())
    assert (c.frames != b.frames).sum() == 1 and c.frames.min() == b.frames.min()
    now = json.loads(cache.read_text())
    assert now[next(iter(kept))] == kept[next(iter(kept))]
    cpctrans.counted.cache_clear()
    assert dataset(other, tmp_path)[1].frames.tolist() == c.frames.tolist()


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


@pytest.mark.parametrize("root", ["his/frame", "D:\\data\\frame"])
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
                picture = Image.fromarray(test_media.paint(k, 48, 34))
                picture.save(folder / f"image_{k + 1:05d}.jpg")
        (lists / f"{part}_split01.csv").write_text("".join(rows))
    args = arguments("--data", ucf, "--frames", frames, "--lists", lists, "--num_seq", 3,
                     "--out", tmp_path / "out")
    videos, classes, _ = cpctrans.read_videos(args, "val")
    assert classes == sorted(c.lower() for c in CLASSES) and set(videos.frames) == {20}
    assert len(videos.name) == 8 and cpctrans.TestClips(args, videos)[0].shape[0] == 2
    shutil.copy(ucf / "ucfTrainTestlist" / "classInd.txt", lists)
    _, classes, _ = cpctrans.read_videos(args, "val")
    assert classes[36] == "handstandpushups" and len(classes) == 101


FAULTS = {  # name: (file, its line or None for all, new content, line of the fault, words)
    "no class": ("trainlist01.txt", 2, "Fencing/v_Fencing_g08_c01.avi 3", 2, "classInd"),
    "other number": ("trainlist01.txt", 3, "Archery/v_Archery_g15_c01.avi 4", 3, "classInd"),
    "no folder": ("trainlist01.txt", 1, "v_Archery_g08_c01.avi 3", 1, "<Class>/<video>.avi"),
    "path": ("trainlist01.txt", 1, "Archery/../../etc/passwd.avi 3", 1, "is not `<Class>"),
    "two dots": ("trainlist01.txt", 4, "Archery/...avi 3", 4, "is not `<Class>"),
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
        box = cpctrans.sized_crop_box(rng, 320, 240)
        if box:                                               # else ten tries did not fit
            x, y, w, h = box
            assert 0 <= x <= 320 - w and 0 <= y <= 240 - h
            shapes.append((w * h / 76800, w / h))
    assert len(shapes) > 380
    area, aspect = np.array(shapes).T
    assert 0.49 < area.min() < 0.55 and area.max() > 0.9
    assert 0.74 < aspect.min() and aspect.max() < 1.35
    assert kinds[-1] == pytest.approx(1000, abs=100)          # of 2000 pictures, half stay coloured
    assert all(kinds[c] == pytest.approx(333, abs=80) for c in range(3))
    assert kinds["jittered"] == pytest.approx(120, abs=40)
    assert kinds["mirrored"] == pytest.approx(200, abs=50)


# ---- stages --------------------------------------------------------------------------------------

def run(out, *flags, n=1, **how):
    r = quick(out.parent / "q", *flags, "--out", out, n=n, **how)
    assert r.code == 0, r
    return r


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def pre(ucf, tmp_path_factory):
    out = tmp_path_factory.mktemp("pre") / "out"
    run(out, *MINI, "--data", ucf)
    return out


@pytest.fixture(scope="module")
def tuned(ucf, pre):
    """{split: run folder}; that of split 1 began with the pre-trained network."""
    for k in (1, 2, 3):
        flags = ["--pretrain", pre / "best.pt"] if k == 1 else ["--pretrain", "random"]
        run(pre.parent / f"tuned{k}", *(MINI if k > 1 else SHORT), *flags, "--data", ucf,
            "--split", k, "--epochs", 1, "--train_what", "all")
    return {k: pre.parent / f"tuned{k}" for k in (1, 2, 3)}


SHORT = "--tiny --batch_size 4 --epochs 2 --workers 0 --log_every 1 --save_every 2".split()


def test_pretraining_leaves_what_is_promised(pre):
    assert set(contents(pre)) == {"args.json", "log.jsonl", "last.pt", "best.pt", "metrics.json",
                                  "curve.png"}
    m = metrics_of(pre)
    assert m["protocol"] == ("pre-trained on train list 1 of ucf101, epoch chosen on groups 24 and "
                             "25 of it")
    assert 0 <= m["val_top1"] <= m["val_top3"] <= m["val_top5"] <= 1
    wrong = sum(m[f"val_wrong_{k}"] for k in ("time", "cell", "video"))
    assert wrong == pytest.approx(1 - m["val_top1"], abs=1e-6)
    assert torch.load(pre / "last.pt", weights_only=True)["step"] == 8        # 4 steps an epoch


def test_the_test_reports_each_split_their_mean_and_the_protocol(ucf, tuned, tmp_path):
    r = run(tmp_path / "out", "--data", ucf, "--workers", 0, "--test",
            *(f / "best.pt" for f in tuned.values()))
    m = metrics_of(tmp_path / "out")
    assert set(m["splits"]) == {"1", "2", "3"}
    for key in ("top1", "top5", "loss", "retrieval_top1"):
        assert m[key] == pytest.approx(sum(x[key] for x in m["splits"].values()) / 3)
    assert "pre-trained on train list 1" in m["protocol"] and "not pre-trained" in m["protocol"]
    assert "of which none of 8 was seen in training" in m["protocol"] and m["protocol"] in r.out
    for k in (1, 2, 3):
        rows = json.loads((tmp_path / "out" / f"predictions_split{k}.json").read_text())
        held = [f"_g{g:02d}_" for g in LENGTHS if 7 * k - 6 <= g <= 7 * k]
        assert len(rows) == 8 and all(any(h in r["video"] for h in held) for r in rows)
        right = sum(r["class"] == r["predicted"] for r in rows) / 8
        assert m["splits"][str(k)]["top1"] == pytest.approx(100 * right)
        table = json.loads((tmp_path / "out" / f"confusion_split{k}.json").read_text())
        assert np.sum(table["counts"]) == 8 and len(table["classes"]) == 101
        assert np.array(table["counts"]).sum(0)[36] == 2      # columns are true classes
    assert Image.open(tmp_path / "out" / "retrieval.png").size[0] > 500


def test_the_test_does_not_depend_on_the_number_of_processes(ucf, tuned, tmp_path):
    for n in (1, 2, 3):
        run(tmp_path / str(n), "--data", ucf, "--workers", 0, "--test", tuned[1] / "best.pt", n=n)
    one, *rest = (contents(tmp_path / str(n)) for n in (1, 2, 3))
    for other in rest:
        assert all(other[k] == one[k] for k in one if k != "args.json")


def test_probabilities_are_means_over_all_clips_of_a_video(ucf, tuned, tmp_path):
    """A slow evaluation, from the checkpoint and the reader alone, finds the same predictions."""
    run(tmp_path / "out", "--data", ucf, "--workers", 0, "--test", tuned[1] / "best.pt")
    args = cpctrans.parse_args(["--data", str(ucf), "--test", "x", "--out", str(tmp_path / "out")])
    cpctrans.fill_from(args, tuned[1] / "best.pt")
    model = cpctrans.Classifier(args, 101).eval()
    cpctrans.initialise(model, tuned[1] / "best.pt", everything=True)
    rows = json.loads((tmp_path / "out" / "predictions_split1.json").read_text())
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (cpctrans.MEAN, cpctrans.STD))
    for row in rows:
        path = ucf / "UCF-101" / f"{row['video']}.avi"
        total = common.count_frames(path)
        frames, probs = list(range(0, total, 3)), []
        for k in range(len(frames) // 7):
            clip = cpctrans.pictures(str(path).encode(), frames[7 * k:7 * k + 7], total, 32)
            clip = clip[:, 1:33, 10:42].transpose(0, 3, 1, 2) / 255
            clip = (clip - mean) / std
            with torch.no_grad():
                probs.append(model(torch.from_numpy(clip).float()[None]).softmax(-1)[0])
        prob = torch.stack(probs).mean(0)
        assert prob.max().item() == pytest.approx(row["probability"], abs=1e-4)


def test_fine_tuning_does_not_need_the_test_videos_nor_their_list(ucf, pre, tmp_path):
    data = tmp_path / "ucf101"
    shutil.copytree(ucf, data)
    for g in (1, 2):
        for f in (data / "UCF-101").rglob(f"*_g{g:02d}_*"):
            f.unlink()
    (data / "ucfTrainTestlist" / "testlist01.txt").unlink()
    for root, name in ((ucf, "with"), (data, "without")):
        run(tmp_path / name, *TUNE, "--data", root, "--epochs", 1)
    a, b = (contents(tmp_path / name) for name in ("with", "without"))
    assert a["best.pt"] == b["best.pt"] and a["metrics.json"] == b["metrics.json"]


def test_the_released_protocol_chooses_on_test_videos_and_says_so(ucf, tmp_path):
    out = tmp_path / "out"
    r = run(out / "pre", *MINI, "--data", ucf, "--compat", "released", "--num_seq", 3,
            "--pred_step", 1, "--epochs", 1)
    words = metrics_of(out / "pre")["protocol"]
    assert "of list 3" in r.out and "chosen on TEST videos" in words
    flags = [*SHORT, "--data", ucf, "--pretrain", out / "pre" / "best.pt", "--epochs", 1]
    r = quick(tmp_path / "q", *flags, "--split", 1, "--out", out / "no")
    assert "list 3 of ucf101, which holds test videos of split 1" in one_error(r)
    run(out / "tuned", *flags, "--split", 1, "--compat", "released", "--train_what", "last")
    assert json.loads((out / "tuned" / "args.json").read_text())["train_what"] == "all"
    r = run(out / "test", "--data", ucf, "--workers", 0, "--compat", "released", "--test",
            out / "tuned" / "best.pt")
    assert "8 of 8 TEST VIDEOS WERE SEEN" in metrics_of(out / "test")["protocol"]


def test_the_linear_probe_leaves_the_trunk_as_it_was(ucf, pre, tmp_path):
    run(tmp_path / "out", *SHORT, "--data", ucf, "--pretrain", pre / "best.pt", "--train_what",
        "last", "--lr", 0.1)
    before, after = (torch.load(f, weights_only=True)["model"]
                     for f in (pre / "best.pt", tmp_path / "out" / "last.pt"))
    trunk = [k for k in after if k.startswith(("backbone.", "encoder.", "agg."))]
    assert len(trunk) > 80 and all(torch.equal(before[k], after[k]) for k in trunk)
    assert after["final_bn.running_mean"].abs().max() > 0
    args = arguments(path=pre / "best.pt")
    model = cpctrans.Classifier(args, 101)
    cpctrans.freeze_trunk(model)
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        "final_bn.weight", "final_bn.bias", "final_fc.1.weight", "final_fc.1.bias"}


def test_learning_rates_follow_the_recipe_and_its_groups():
    pre, tune, last = (cpctrans.parse_args(["--stage", *f.split()]) for f in (
        "pretrain", "finetune --init none", "finetune --init none --train_what last"))
    assert [cpctrans.learning_rate(pre, e) for e in (0, 99, 100, 299)] == [1e-3, 1e-3, 5e-4, 2.5e-4]
    assert cpctrans.learning_rate(tune, 100) == pytest.approx(1e-4)
    assert [cpctrans.learning_rate(last, e) for e in (59, 60, 80)] == pytest.approx(
        [1e-3, 1e-4, 1e-5])
    assert (pre.epochs, tune.epochs, last.epochs) == (300, 300, 100)
    model = cpctrans.Classifier(arguments(), 5)
    for what, slow in (("ft", {"backbone", "encoder"}), ("all", set())):
        names = {id(p): k.split(".")[0] for k, p in model.named_parameters()}
        groups = cpctrans.parameter_groups(model, what)
        assert {names[id(p)] for ps, f in groups if f == 0.1 for p in ps} == slow
        assert sum(len(ps) for ps, _ in groups) == len(names)


@pytest.mark.parametrize("flags", [["--attn", "frame", "--pos", "sin"], ["--negatives", "local"],
                                   ["--resize", "bilinear", "--crop", 40],
                                   ["--method", "dpc", "--seq_len", 2, "--num_seq", 3,
                                    "--pred_step", 1], ["--batch_size", 1, "--limit", 3]])
def test_every_switch_trains(flags, ucf, tmp_path):
    flags = ["--epochs", 1, "--limit", 8, *flags]
    run(tmp_path / "pre", *MINI, "--data", ucf, *flags)
    run(tmp_path / "ft", *SHORT, "--data", ucf, "--pretrain", tmp_path / "pre" / "best.pt",
        *flags[:4],
        *(["--batch_size", 1, "--limit", 3] if "--batch_size" in flags else []))
    run(tmp_path / "test", "--data", ucf, "--workers", 0, "--limit", 3, "--test",
        tmp_path / "ft" / "best.pt")
    assert 0 <= metrics_of(tmp_path / "test")["top1"] <= 100


def test_hmdb51_starts_from_ucf101(hmdb51, pre, tmp_path):
    flags = [*SHORT, "--dataset", "hmdb51", "--data", hmdb51, "--batch_size", 2, "--epochs", 1]
    run(tmp_path / "ft", *flags, "--init", pre / "best.pt", "--stage", "finetune")
    r = run(tmp_path / "test", "--dataset", "hmdb51", "--data", hmdb51, "--workers", 0, "--test",
            tmp_path / "ft" / "best.pt")
    assert "fine-tuned on train list 1 of hmdb51, epoch chosen on held-out sources" in r.out
    r = quick(tmp_path / "q", "--data", hmdb51, "--workers", 0, "--test",
              tmp_path / "ft" / "best.pt", "--out", tmp_path / "x")
    assert "was trained on hmdb51" in one_error(r)


# ---- commands of the original README -------------------------------------------------------------

ORIGINAL = [
    "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --epochs 300 --num_seq 5 "
    "--pred_step 3",
    "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --pretrain {pre} --train_what "
    "ft --epochs 300 --num_seq 7 --pred_step 3",
    "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --test {tuned}",
    "--gpu 0,1 --net resnet18 --dataset ucf101 --batch_size 16 --img_dim 128 --epochs 300"]


@pytest.mark.parametrize("line", ORIGINAL)
def test_the_original_flags_mean_what_they_meant(line):
    """Also beside --tiny, whose sizes they replace; test_readme.py runs them."""
    for tiny in ("", " --tiny"):
        args = cpctrans.parse_args((line.format(pre="a.pt", tuned="b.pt") + tiny).split())
        for flag, value in re.findall(r"--(\w+) ([^ {]+)", line):
            assert flag == "gpu" or str(getattr(args, flag)) == value
        assert args.stage == ("finetune" if "--pretrain" in line else "test" if "--test" in line
                              else "pretrain")
        assert str(args.init or args.test) == {
            "finetune": "a.pt", "test": str([Path("b.pt")]), "pretrain": "None"}[args.stage]


# ---- checkpoints ---------------------------------------------------------------------------------

def released(model, folder, prefix="", numpy_1=False, gru=("cell_list.0", "ConvGRUCell_00")):
    """A file as the release writes it: its names, dead tensors, a best accuracy of NumPy."""
    state = {}
    for k, v in model.state_dict().items():
        v, part = torch.randn_like(v.float()).to(v.dtype), k.split(".", 1)
        if part[0] == "encoder":
            state[f"transEnc.transEncoder.{part[1]}"] = v
        elif part[0] == "agg":
            state |= {f"agg.{spelling}.{part[1]}": v for spelling in gru}
        else:
            state[k] = v
    d = model.backbone.out_dim
    state |= {"backbone.fc.weight": torch.zeros(2 * d, 2 * d),
              "transEnc.ff.w_1.bias": torch.ones(d), "transEnc.attn.linears.0.bias": torch.ones(d),
              "transEnc.position.pe": torch.zeros(1, 500, d)}
    path = folder / "epoch9.pth.tar"
    torch.save({"epoch": 10, "net": "resnet18", "best_acc": np.float64(0.4), "iteration": 3,
                "state_dict": {prefix + k: v for k, v in state.items()}}, path)
    if numpy_1:                                               # as a NumPy before 2 names its scalar
        import zipfile
        with zipfile.ZipFile(path) as z:
            parts = {n: z.read(n) for n in z.namelist()}
        assert any(b"numpy._core.multiarray" in v for v in parts.values())
        with zipfile.ZipFile(path, "w") as z:
            for n, v in parts.items():
                z.writestr(n, v.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return path, state


@pytest.mark.parametrize("prefix, numpy_1, gru", [
    ("", False, ("cell_list.0", "ConvGRUCell_00")), ("module.", True, ("cell_list.0",)),
    ("module.module.", False, ("ConvGRUCell_00",))])
@pytest.mark.parametrize("kind", ["pretrain", "classifier"])
def test_released_checkpoints_load(kind, prefix, numpy_1, gru, tmp_path, capsys):
    args = arguments("--layers", 1)
    model = cpctrans.CPC(args) if kind == "pretrain" else cpctrans.Classifier(args, 9)
    path, state = released(model, tmp_path, prefix, numpy_1, gru)
    args = cpctrans.parse_args(["--stage", "finetune", "--init", str(path)])
    cpctrans.fill_from(args, path)
    assert (args.net, args.width, args.layers, args.heads) == ("resnet10", 8, 1, 2)
    fresh = cpctrans.Classifier(args, 9)
    cpctrans.initialise(fresh, path, everything=kind == "classifier")
    for k, v in fresh.state_dict().items():
        part = k.split(".", 1)
        name = {"encoder": "transEnc.transEncoder", "agg": f"agg.{gru[0]}"}.get(part[0], part[0])
        if f"{name}.{part[1]}" in state:
            assert torch.equal(v, state[f"{name}.{part[1]}"]), k
    assert "fresh" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["nothing fits", "resnet34", "lacks a tensor", "more layers",
                                  "code"])
def test_a_checkpoint_that_does_not_fit_is_one_line(case, ucf, tmp_path):
    path, more = tmp_path / "x.pt", []
    model = cpctrans.CPC(arguments())
    path, state = released(model, tmp_path)
    words = "epoch9.pth.tar"
    if case == "nothing fits":
        torch.save({"state_dict": {"stem.weight": torch.zeros(3)}}, path)
    elif case == "resnet34":
        more, words = ["--net", "resnet34"], "--net resnet10, now it is resnet34"
    elif case == "lacks a tensor":
        state.pop("backbone.layer3.0.conv1.weight")
        torch.save({"state_dict": state}, path)
        words = "layer3.0.conv1"
    elif case == "more layers":
        state["backbone.layer2.1.conv1.weight"] = torch.zeros(3)
        torch.save({"state_dict": state}, path)
        words = "no place in this network, the first is backbone.layer2.1.conv1.weight"
    else:
        torch.save({"state_dict": state, "x": Evil(tmp_path / "ran")}, path)
        words = "holds more than tensors"
    r = quick(tmp_path / "q", *SHORT, "--data", ucf, "--pretrain", path, *more, "--out",
              tmp_path / "out")
    assert words in one_error(r) and not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("flags, words", [
    (["--split", 2], "test videos of split 2"), (["--num_seq", 5], "--num_seq 7"),
    (["--ds", 2], "--ds 3"), (["--img_dim", 64], "--img_dim 32"), (["--width", 16], "--width 8")])
def test_a_test_that_differs_from_the_training_is_refused(flags, words, ucf, tuned, tmp_path):
    base = ["--data", ucf, "--workers", 0, "--limit", 2, "--test", tuned[1] / "best.pt"]
    r = quick(tmp_path / "q", *base, *flags, "--out", tmp_path / "out")
    assert words in one_error(r)
    if "--width" not in flags:
        run(tmp_path / "forced", *base, *flags, "--force")


def test_other_classes_are_refused(ucf, tuned, tmp_path):
    shutil.copytree(ucf, tmp_path / "data")
    path = tmp_path / "data" / "ucfTrainTestlist" / "classInd.txt"
    path.write_text(path.read_text().replace("101 YoYo", "100 YoYo"))
    for f in path.parent.glob("trainlist*"):
        f.write_text(f.read_text().replace(" 101", " 100"))
    r = quick(tmp_path / "q", "--data", tmp_path / "data", "--workers", 0, "--test",
              tuned[1] / "best.pt", "--out", tmp_path / "out")
    assert "its classes are not those" in one_error(r)


# ---- what the user can mend ----------------------------------------------------------------------

def test_absent_and_broken_videos_are_counted_in_training_and_stop_a_test(ucf, tuned, tmp_path):
    shutil.copytree(ucf, tmp_path / "data")
    videos = tmp_path / "data" / "UCF-101"
    (videos / "Archery" / "v_Archery_g08_c01.avi").unlink()
    (videos / "YoYo" / "v_YoYo_g09_c01.avi").unlink()
    (videos / "YoYo" / "v_YoYo_g08_c01.avi").write_bytes(b"RIFF no video")
    r = run(tmp_path / "out", *MINI, "--data", tmp_path / "data", "--epochs", 1)
    assert "train: 13 videos of list 1; 2 absent, 1 unreadable" in r.out
    assert "v_YoYo_g08_c01.avi" in r.out
    broken = next(videos.rglob("*HammerThrow_g02*"))
    broken.write_bytes(b"RIFF no video")
    test = ["--data", tmp_path / "data", "--workers", 0, "--test", tuned[1] / "best.pt", "--out"]
    assert str(broken) in one_error(quick(tmp_path / "q", *test, tmp_path / "out2"))
    broken.unlink()
    assert "no such file" in one_error(quick(tmp_path / "q", *test, tmp_path / "out3"))
    assert not (tmp_path / "out3" / "metrics.json").exists()


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], "nowhere: no such folder"), (["--heads", 3], "--heads 3"),
    (["--pred_step", 5], "leaves none"),
    (["--batch_size", 64], "do not fill one batch"), (["--test", "no.pt"], "no.pt: no such"),
    (["--frames", "nowhere"], "nowhere"), (["--stage", "finetune", "--init", "no.pt"], "no.pt")])
def test_what_the_user_can_mend_is_one_line(flags, words, ucf, tmp_path):
    data = [] if "--data" in flags else ["--data", ucf]
    r = quick(tmp_path / "q", *MINI, *data, *flags, "--out", tmp_path / "out")
    assert words in one_error(r)


# ---- kill and resume: two processes; one at any moment, see test_faults.py -----------------------

@pytest.mark.parametrize("stage, n", [("pretrain", 2), ("finetune", 2)])
def test_a_killed_run_ends_in_the_same_bytes(stage, n, ucf, tmp_path):
    flags = [*(MINI if stage == "pretrain" else TUNE), "--data", ucf]
    run(tmp_path / "whole", *flags, n=n)
    for kill in (("step", 1), ("torn", 1), ("line", 2), ("torn:last.pt", 2), ("renamed", 1),
                 ("torn:metrics.json", 1)):
        r = quick(tmp_path / "q", *flags, "--out", tmp_path / "killed", n=n, die=kill)
        assert r.code == -9, (kill, r)
    r = run(tmp_path / "killed", *flags, n=n)
    assert "continuing" in r.out
    whole, own = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    for name in ("last.pt", "best.pt", "metrics.json"):
        assert own[name] == whole[name], name
    rows = [[json.loads(x) for x in f["log.jsonl"].splitlines()] for f in (whole, own)]
    assert len(rows[0]) == len(rows[1]) == 8
    assert all(a[k] == b[k] for a, b in zip(*rows) for k in ("step", "loss", "top1", "lr"))


def test_counting_that_was_killed_goes_on(ucf, tmp_path):
    flags = [*MINI, "--data", ucf, "--epochs", 1]
    r = quick(tmp_path / "q", *flags, "--out", tmp_path / "a", die=("torn:_frames.json", 1))
    assert r.code == -9 and not list(tmp_path.glob("*_frames.json"))
    run(tmp_path / "a", *flags)
    kept, = json.loads((tmp_path / "cpctrans_ucf101_frames.json").read_text()).values()
    assert {len(column) for column in kept.values()} == {24}


# ---- command line --------------------------------------------------------------------------------

def test_help_answers_with_the_method_and_all_flags():
    r = command("--help", timeout=60)
    assert r.code == 0 and "tell the true cell" in r.out
    for flag in ("--num_seq", "--pred_step", "--train_what", "--pretrain", "--test", "--compat"):
        assert flag in r.out


@pytest.mark.parametrize("flags, want", [
    ("", {"stage": "pretrain", "num_seq": 5, "img_dim": 224, "batch_size": 16, "lr": 1e-3,
          "weight_decay": 1e-5, "ds": 3, "pred_step": 3, "layers": 2, "heads": 4, "split": 1}),
    ("--pretrain random", {"stage": "finetune", "num_seq": 7, "weight_decay": 1e-3}),
    ("--stage finetune --dataset hmdb51",
     {"init": "runs/cpctrans_ucf101_pretrain/best.pt", "data": Path("data/hmdb51")}),
    ("--method dpc", {"seq_len": 5, "num_seq": 8, "img_dim": 128, "batch_size": 128}),
    ("--wd 0.5 --gpu 0,1", {"weight_decay": 0.5}), ("--tiny", {"img_dim": 48, "width": 16})])
def test_defaults_are_those_of_the_published_recipe(flags, want):
    args = cpctrans.parse_args(flags.split())
    cpctrans.fill_from(args, None)
    assert {k: getattr(args, k) for k in want} == want
