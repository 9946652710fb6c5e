"""cpctrans.py: loss, network, clips, lists, stages, protocol, checkpoints and flags."""

import collections
import json
import math
import re
import shutil
import zipfile

import numpy as np
import pytest
import running
import torch
import torch.distributed as dist
import world
from PIL import Image
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import cpctrans
from common import UserError

CLASSES = {"Archery": 3, "HandstandPushups": 37, "HammerThrow": 36, "YoYo": 101}
LENGTHS = {1: 29, 2: 40, 8: 29, 9: 33, 15: 16, 16: 31, 24: 30, 25: 29}        # frames, by group
MINI = ("--tiny --net resnet10 --img_dim 32 --crop 60 --batch_size 4 --epochs 2 --workers 0 "
        "--log_every 1").split()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(*flags):
    return cpctrans.parse_args([*MINI, *map(str, flags)])


def run(out, *flags):
    """A stage in this process; the text of the error if it ends with one."""
    try:
        common.launch(cpctrans.main, cpctrans.parse_args([*map(str, flags), "--workers", "0",
                                                          "--out", str(out)]))
    except SystemExit as e:
        return str(e)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


# ---- a small world -------------------------------------------------------------------------------

def name_of(c, group):
    return f"{c}/v_{c.replace('Handstand', 'HandStand')}_g{group:02d}_c01"


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    """32 videos whose frames show their numbers. Those of group 15 are too short for a clip."""
    root = tmp_path_factory.mktemp("ucf") / "ucf101"
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    rows = "".join(f"{n} {c}\r\n" for c, n in sorted(CLASSES.items(), key=lambda x: x[1]))
    (lists / "classInd.txt").write_bytes(rows.encode())
    for k in (1, 2, 3):                                       # test groups 1-7, 8-14, 15-21
        rows = {"train": "", "test": ""}
        for c, group in ((c, g) for c in CLASSES for g in LENGTHS):
            tested = 7 * k - 6 <= group <= 7 * k
            rows["test" if tested else "train"] += f"{name_of(c, group)}.avi" + (
                "\r\n" if tested else f" {CLASSES[c]}\r\n")
        for split, text in rows.items():
            (lists / f"{split}list0{k}.txt").write_bytes(text.encode())
    for n, c in enumerate(CLASSES):
        for group, length in LENGTHS.items():
            world.write_video(root / "UCF-101" / f"{name_of(c, group)}.avi",
                              (world.paint(k, 96, 64, n) for k in range(length)), 25, "mpeg4",
                              world.MPEG4, gop=12 + 7 * n)
    return root


def read_videos(args, split):
    common.init_distributed()
    try:
        return cpctrans.read_videos(args, split)
    finally:
        dist.destroy_process_group()


def numbers(frames):
    """The numbers that frames show.    (T, 3, H, W)"""
    return [world.number_of(f) for f in frames.permute(0, 2, 3, 1).numpy()]


@pytest.fixture
def seen(monkeypatch):
    """The numbers of the frames that each call of `read_frames` has returned."""
    found, read = [], cpctrans.read_frames

    def spy(*args):
        frames = read(*args)
        found.append(numbers(frames))
        return frames
    monkeypatch.setattr(cpctrans, "read_frames", spy)
    return found


# ---- loss ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("b, p, m, d", [(1, 1, 1, 4), (1, 3, 4, 5), (3, 2, 4, 6), (4, 3, 1, 2)])
def test_the_loss_is_the_equation(b, p, m, d):
    z_hat, z = random(b, p, m, d), random(b, p, m, d, seed=1)
    cells = [(i, j, k) for i in range(b) for j in range(p) for k in range(m)]
    total, tops = 0.0, collections.Counter()
    for i in cells:
        s = {j: float((z_hat[i].double() * z[j].double()).sum()) for j in cells}
        total -= math.log(math.exp(s[i]) / sum(math.exp(v) for v in s.values()))
        place = sorted(s.values(), reverse=True).index(s[i])
        tops.update({k: place < k for k in (1, 3, 5)})
    terms = cpctrans.info_nce(z_hat, z)
    assert terms["loss"].item() == pytest.approx(total / len(cells), rel=1e-5)
    for k in (1, 3, 5):
        assert terms[f"top{k}"].item() == pytest.approx(100 * tops[k] / len(cells))
    rows = cpctrans.metrics_per_video(z_hat, z)
    assert rows["loss"].shape == (b,)
    assert rows["loss"].mean().item() == pytest.approx(total / len(cells), rel=1e-5)
    kinds = sum(rows[f"wrong_{k}"] for k in ("video", "cell", "time"))
    assert torch.allclose(kinds, 100 - rows["top1"])


def test_the_first_loss_is_chance_level_for_a_network_that_knows_nothing():
    zeros = torch.zeros(2, 3, 4, 8)
    assert cpctrans.info_nce(zeros, zeros)["loss"].item() == pytest.approx(math.log(2 * 3 * 4))


def share(rank):
    """(terms, gradients) of two clips beside another process's two, and of all four alone."""
    torch.manual_seed(0)
    model = cpctrans.CPC(arguments("--num_frames", 3, "--pred_step", 2)).eval()
    clip, found = random(4, 3, 3, 32, 32), []
    for network, x in ((DDP(model), clip[2 * rank:][:2]), (model, clip)):
        model.zero_grad()
        if network is model:                                  # as if there were no other process
            common.world_size, common.rank = lambda: 1, lambda: 0
        terms = cpctrans.info_nce(*network(x))
        terms["loss"].backward()
        terms = {k: v.detach().clone() for k, v in terms.items()}
        found.append((terms, {k: p.grad.clone() for k, p in model.named_parameters()}))
    return found


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    (half, alone), (other, _) = running.processes(share, 2, tmp_path)
    for k, v in alone[0].items():
        assert (half[0][k] + other[0][k]).item() / 2 == pytest.approx(v.item(), rel=1e-5)
    for gradients in (half[1], other[1]):
        for k, g in alone[1].items():
            assert torch.allclose(gradients[k], g, rtol=1e-3, atol=1e-6), k


# ---- network -------------------------------------------------------------------------------------

@pytest.mark.parametrize("b, n, p, side", [(1, 5, 3, 64), (3, 4, 1, 40), (2, 8, 3, 32)])
def test_every_box_has_its_shape_and_every_parameter_a_gradient(b, n, p, side):
    args = arguments("--num_frames", n, "--pred_step", p)
    model, clip, s = cpctrans.CPC(args), random(b, n, 3, side, side), math.ceil(side / 32)
    assert model.encode(clip, relu=False).shape == (b, n, 64, s, s)
    z_hat, z = model(clip)
    assert z_hat.shape == z.shape == (b, p, s * s, 64)
    cpctrans.info_nce(z_hat, z)["loss"].backward()
    assert all(x.grad is not None for x in model.parameters())
    classifier = cpctrans.Classifier(args, 7).eval()
    assert classifier.features(clip).shape == (b, 64)
    classifier(clip).logsumexp(1).sum().backward()
    assert all(x.grad is not None for x in classifier.parameters())


@pytest.mark.parametrize("attn", ["full", "causal", "frame"])
def test_attention_sees_all_frames_no_later_ones_or_its_own(attn):
    torch.manual_seed(0)
    model, clip = cpctrans.CPC(arguments("--attn", attn)).eval(), random(2, 5, 3, 64, 64)
    (z_hat, z), late, early = model(clip), clip.clone(), clip.clone()
    late[:, -1], early[:, 0] = 0, 0
    assert torch.equal(z_hat, model(late)[0]) == (attn != "full")             # the future
    assert torch.equal(z, model(early)[1]) == (attn == "frame")               # the past
    assert not torch.equal(z_hat, model(early)[0])
    assert not torch.equal(z[:, -1], model(late)[1][:, -1])


def test_layer_norm_adds_epsilon_to_the_deviation_itself():
    x = 1e-6 * random(3, 16)
    want = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    assert torch.allclose(cpctrans.LayerNorm(16)(x), want, rtol=1e-5)


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model, clip = cpctrans.CPC(arguments()), random(4, 5, 3, 32, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        terms = cpctrans.info_nce(*model(clip))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss"] < 0.8 and terms["top3"] > 90


# ---- clips: which frames -------------------------------------------------------------------------

def test_training_clips_start_anywhere_and_are_a_stride_apart(ucf, seen):
    args = arguments("--data", ucf, "--num_frames", 4)
    videos, _ = read_videos(args, "train")
    clips = common.Samples(args, videos, cpctrans.make_pretrain_clip)
    for epoch in range(120):
        clips[epoch, 2]
    starts = {frames[0] for frames in seen}
    assert all(np.array_equal(np.diff(frames), [3, 3, 3]) for frames in seen)
    assert starts == set(range(videos[2].length - 12)), "0 .. length - N·stride - 1, all of them"


def test_test_clips_follow_one_another_and_cover_the_video(ucf, seen):
    args = arguments("--data", ucf, "--num_frames", 3, "--stride", 2, "--pred_step", 1)
    videos, _ = read_videos(args, "val")
    for i, video in enumerate(videos):
        frames = list(range(0, video.length, 2))
        want = [frames[k:k + 3] for k in range(0, len(frames) - 2, 3)]
        clips = cpctrans.make_test_clips(args, videos, i)["clips"]
        middle = cpctrans.make_middle_clip(args, videos, i)["clip"]
        assert seen[-2] == sum(want, []) and seen[-1] == want[len(want) // 2]
        assert clips.shape == (len(want), 3, 3, 32, 32) and middle.shape == (3, 3, 32, 32)
        assert torch.equal(middle, clips[len(want) // 2])


def test_short_videos_repeat_their_last_frame_or_are_left_out(ucf, seen, capsys):
    args = arguments("--data", ucf, "--num_frames", 6)
    videos, _ = read_videos(args, "train")
    assert "4 too short (their last frame is repeated)" in capsys.readouterr().out
    i = [v.length for v in videos].index(16)
    assert cpctrans.make_test_clips(args, videos, i)["clips"].shape[0] == 1
    assert seen[-1] == [0, 3, 6, 9, 12, 15]
    cpctrans.read_frames(videos[i], np.arange(9, 24, 3), 60)
    assert seen[-1] == [9, 12, 15, 15, 15]
    args.as_released = True                                   # trains on groups 24 and 25, too
    assert [v.name for v in read_videos(args, "train")[0]] == [
        name_of(c, g) for c in CLASSES for g in LENGTHS if g not in (1, 2, 15)]
    assert "4 too short (left out)" in capsys.readouterr().out


@pytest.mark.parametrize("root", ["/his/frame/", "D:\\data\\frame\\"])
def test_the_authors_csv_and_folders_of_frames_are_read(root, ucf, seen, tmp_path):
    """His folders do not matter. A class without test videos does not move the other labels."""
    for split in ("train", "test"):
        rows = ""
        for row in (ucf / f"ucfTrainTestlist/{split}list01.txt").read_text().splitlines():
            name, folder = row.split(".avi")[0], tmp_path / "jpg" / row.split(".avi")[0]
            if split == "test" and name.startswith("Archery"):
                continue
            rows += root + name.replace("/", root[-1]) + f"{root[-1]},20\n"
            folder.mkdir(parents=True)
            for k in range(20):
                Image.fromarray(world.paint(k, 96, 64)).save(folder / f"image_{k + 1:05d}.jpg")
        (tmp_path / f"{split}_split01.csv").write_text(rows)
    args = arguments("--data", tmp_path, "--num_frames", 4)
    for split, n in (("val", 8), ("test", 6)):
        videos, classes = read_videos(args, split)
        assert classes == sorted(CLASSES, key=str.lower) and len(videos) == n
        assert all(classes[v.label] == v.name.split("/")[0] and v.length == 20 for v in videos)
        cpctrans.make_middle_clip(args, videos, 0)
        assert seen[-1] == [0, 3, 6, 9]


# ---- clips: what they look like ------------------------------------------------------------------

def test_flip_and_crop_are_of_a_clip_and_colours_of_a_frame_or_a_clip(monkeypatch):
    image = torch.from_numpy(world.paint(5, 96, 64)).permute(2, 0, 1)
    monkeypatch.setattr(cpctrans, "read_frames", lambda *_: image.repeat(4, 1, 1, 1))
    args, video = arguments("--crop", 48, "--num_frames", 4), cpctrans.Video("a/b", 2, 20)
    for seed in range(4):
        sample = cpctrans.make_pretrain_clip(args, [video], 0, np.random.default_rng(seed))
        coloured = [f for f in sample["clip"] if (f[0] != f[1]).any()]
        assert sample["clip"].shape == (4, 3, 32, 32) and len({f.tobytes() for f in coloured}) < 2
        assert len({tuple(f) for f in sample["factors"]}) == 4 and "label" not in sample
        sample = cpctrans.make_finetune_clip(args, [video], 0, np.random.default_rng(seed))
        assert (sample["clip"] == sample["clip"][0]).all() and sample["label"] == 2
        assert len({tuple(f) for f in sample["factors"]}) == 1


def test_draws_have_the_published_ranges(monkeypatch):
    frames = torch.tensor([50, 100, 150], dtype=torch.uint8).view(3, 1, 1).repeat(5, 1, 64, 96)
    frames[..., :48] += 5                                     # every crop sees the border
    monkeypatch.setattr(cpctrans, "read_frames", lambda *_: frames)
    rng, args, seen = np.random.default_rng(0), arguments("--crop", 64), collections.Counter()
    for _ in range(400):
        sample = cpctrans.make_pretrain_clip(args, [cpctrans.Video("a/b", 0, 20)], 0, rng)
        assert (abs(sample["factors"] - (1, 1, 1, 0)) <= (0.5, 0.5, 0.5, 0.25)).all()
        assert (np.sort(sample["order"], 1) == np.arange(4)).all()
        seen.update("colour" if a != c else int(a) for a, _, c in sample["clip"].max((2, 3)))
        seen["flip"] += int(sample["clip"][0, 0, 0, 0] < sample["clip"][0, 0, 0, -1])
        sample = cpctrans.make_finetune_clip(args, [cpctrans.Video("a/b", 0, 20)], 0, rng)
        seen["jitter"] += int(sample["order"][0, 0] >= 0)
    assert seen["flip"] == pytest.approx(200, abs=50)         # of 400
    assert seen["jitter"] == pytest.approx(120, abs=40)
    assert seen["colour"] == pytest.approx(1000, abs=100)     # of 2000 frames
    assert all(seen[c] == pytest.approx(333, abs=80) for c in (55, 105, 155))


# ---- lists of videos -----------------------------------------------------------------------------

def test_no_source_is_both_trained_on_and_in_the_validation_set():
    names = [f"{c}/Film_[HD]_(a)#{g}_{c}_f_cm_np1_ba_med_{i}"
             for g in range(30) for c in ("climb", "climb_stairs") for i in (1, 2)]
    flags = cpctrans.is_validation("hmdb51", names)
    sides = [{n.split("#")[1].split("_")[0] for n, f in zip(names, flags) if f == side}
             for side in (True, False)]
    assert np.mean(flags) == 0.1 and not sides[0] & sides[1]


FAULTS = {  # what is wrong: (file, line, its new text or None: the file is gone, words)
    "no class": ("trainlist01.txt", 2, "Fencing/v_Fencing_g08_c01.avi 3", "Fencing"),
    "no folder": ("trainlist01.txt", 1, "v_Archery_g08_c01.avi 3", ":1: 'v_Archery"),
    "path": ("trainlist01.txt", 3, "Archery/../../etc/passwd.avi 3", ":3: "),
    "no number": ("classInd.txt", 2, "x HammerThrow", "classInd.txt:2: 'x HammerThrow' is not"),
    "no list": ("trainlist01.txt", 0, None, "no trainlist01.txt or train_split01.csv"),
    "no classes": ("classInd.txt", 0, None, "classInd.txt: no such file")}


@pytest.mark.parametrize("what", FAULTS)
def test_an_error_in_a_list_names_file_and_line(what, ucf, tmp_path):
    name, line, text, words = FAULTS[what]
    path = shutil.copytree(ucf / "ucfTrainTestlist", tmp_path / "lists") / name
    rows = path.read_text().splitlines()
    rows[line - 1] = text
    path.unlink() if text is None else path.write_text("\n".join(rows))
    with pytest.raises(UserError, match=re.escape(words)) as e:
        cpctrans.read_list(arguments("--data", tmp_path), "train", 1)
    assert str(tmp_path) in str(e.value)


def test_part_of_a_dataset_is_found_and_what_is_missing_is_counted(ucf, tmp_path, capsys):
    shutil.copytree(ucf / "ucfTrainTestlist", tmp_path / "lists")
    shutil.copytree(ucf / "UCF-101" / "YoYo", tmp_path / "videos" / "YoYo")
    (tmp_path / "videos" / "YoYo" / "v_YoYo_g08_c01.avi").unlink()
    (tmp_path / "a.avi").touch()
    for split, want in (("train", [9, 15, 16]), ("val", [24, 25]), ("test", [1, 2])):
        videos, _ = read_videos(arguments("--data", tmp_path), split)
        assert [v.name for v in videos] == [name_of("YoYo", g) for g in want]
    assert "train: 3 of 16 videos; 13 missing" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "videos")
    with pytest.raises(UserError, match="none of the 16 train videos can be used, such as Archery"):
        read_videos(arguments("--data", tmp_path), "train")


def test_a_broken_video_is_replaced_in_training_and_named_in_evaluation(ucf, tmp_path):
    args = arguments("--data", shutil.copytree(ucf, tmp_path / "data"))
    for group, split in ((8, "train"), (24, "val"), (1, "test")):
        path = tmp_path / "data" / "UCF-101" / f"{name_of('YoYo', group)}.avi"
        path.write_bytes(b"RIFF no video")
        if split == "train":
            videos, _ = read_videos(args, split)
            sample = common.Samples(args, videos, cpctrans.make_pretrain_clip)[
                0, [v.length for v in videos].index(0)]
            assert str(path) in sample["broken"] and sample["clip"].shape == (5, 3, 32, 32)
        else:
            with pytest.raises(UserError, match=re.escape(str(path))):
                read_videos(args, split)


# ---- stages --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pre(ucf, tmp_path_factory):
    out = tmp_path_factory.mktemp("pre") / "out"
    assert not run(out, *MINI, "--data", ucf)
    return out


@pytest.fixture(scope="module")
def tuned(ucf, pre):
    out = pre.parent / "tuned"
    assert not run(out, "--tiny", "--data", ucf, "--pretrain", pre / "best.pt", "--epochs", 2,
                   "--batch_size", 4)
    return out


ONE = "pre-trained on train list 1 of ucf101, epoch chosen on groups 24 and 25 of it"


def test_pretraining_chooses_the_best_epoch_of_the_validation_set(pre):
    rows = [json.loads(line) for line in (pre / "log.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if "val_top1" in row]
    best = max(epochs, key=lambda row: row["val_top1"])
    m = metrics_of(pre)
    assert (len(rows), len(epochs), m["protocol"]) == (8, 2, ONE)
    assert m["val_top1"] == pytest.approx(best["val_top1"], rel=1e-5)
    state = torch.load(pre / "best.pt", weights_only=True)
    assert state["step"] == best["step"] + 1 and state["history"] == [ONE]
    wrong = sum(m[f"val_wrong_{k}"] for k in ("time", "cell", "video"))
    assert wrong == pytest.approx(100 - m["val_top1"], abs=1e-3)


def test_the_test_is_the_mean_over_all_clips_and_retrieval_by_cosine(ucf, tuned, tmp_path):
    """A slow evaluation, from the checkpoint and the reader alone, finds the same numbers."""
    assert not run(tmp_path / "out", "--data", ucf, "--test", tuned / "best.pt")
    args = arguments("--data", ucf, "--test", tuned / "best.pt")
    model = cpctrans.Classifier(args, 101).eval()
    model.load_state_dict(torch.load(tuned / "best.pt", weights_only=True)["model"])
    (videos, classes), (gallery, _) = read_videos(args, "test"), read_videos(args, "train")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    confusion, right = np.zeros((101, 101), int), collections.Counter()

    def feature(v, i):
        clip = cpctrans.normalize(cpctrans.make_middle_clip(args, v, i)["clip"])[None]
        return model.features(clip)[0].double()
    with torch.no_grad():
        for i, (video, row) in enumerate(zip(videos, rows)):
            clips = cpctrans.normalize(cpctrans.make_test_clips(args, videos, i)["clips"])
            logits = torch.stack([model(c[None])[0] for c in clips])
            prob = logits.softmax(1).mean(0)
            assert row["video"] == video.name and row["predicted"] == classes[prob.argmax()]
            assert row["probability"] == pytest.approx(prob.max().item(), abs=1e-5)
            confusion[logits.mean(0).argmax(), video.label] += 1
            right["top1"] += int(prob.argmax() == video.label)
            right["top5"] += int(video.label in prob.topk(5).indices)
            near = max(range(len(gallery)), key=lambda k: torch.cosine_similarity(
                feature(gallery, k), feature(videos, i), 0))
            right["retrieval_top1"] += int(gallery[near].label == video.label)
    m = metrics_of(tmp_path / "out")
    assert all(m[k] == pytest.approx(100 * n / 8) for k, n in right.items()) and len(rows) == 8
    table = json.loads((tmp_path / "out" / "confusion.json").read_text())
    assert np.array_equal(table["counts[predicted][true]"], confusion)
    assert m["protocol"] == "; ".join([ONE, ONE.replace("pre-trained", "fine-tuned"),
                                       "tested on 8 of the 8 videos of test list 1 of ucf101"])
    assert Image.open(tmp_path / "out" / "retrieval.png").size[0] > 500


def test_a_pretrained_checkpoint_gives_retrieval_alone(ucf, pre, tmp_path):
    assert not run(tmp_path / "out", "--data", ucf, "--stage", "test", "--init", pre / "best.pt",
                   "--limit", 3)
    m = metrics_of(tmp_path / "out")
    assert "top1" not in m and 0 <= m["retrieval_top1"] <= m["retrieval_top20"] <= 100
    assert "tested on 3 of the 8 videos" in m["protocol"]


def test_the_linear_probe_leaves_the_network_as_it_was(ucf, pre, tmp_path):
    assert not run(tmp_path / "out", "--tiny", "--data", ucf, "--pretrain", pre / "best.pt",
                   "--train_what", "last", "--lr", 0.1, "--epochs", 1, "--batch_size", 4)
    before, after = (torch.load(f, weights_only=True)["model"]
                     for f in (pre / "best.pt", tmp_path / "out" / "last.pt"))
    frozen = [k for k in after if k.startswith(cpctrans.PRETRAINED)]
    assert len(frozen) > 80 and all(torch.equal(before[k], after[k]) for k in frozen)
    assert after["final_bn.running_mean"].abs().max() > 0
    args = cpctrans.parse_args(["--tiny", "--pretrain", "none", "--train_what", "last"])
    groups = cpctrans.make_optimizer(args, model := cpctrans.Classifier(args, 5)).param_groups
    names = {id(p): k for k, p in model.named_parameters()}
    assert {names[id(p)] for g in groups for p in g["params"]} == {
        "final_bn.weight", "final_bn.bias", "final_fc.1.weight", "final_fc.1.bias"}
    dropout = [m for m in model.train().modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.training for m in dropout] == [False] * (len(dropout) - 1) + [True]


def test_rates_and_weight_decay_follow_the_recipe():
    for flags, want in (("", {0: 1, 99: 1, 100: 0.5, 200: 0.25, 299: 0.25}),
                        ("--pretrain none", {0: 1, 99: 1, 100: 0.1, 299: 0.01}),
                        ("--pretrain none --train_what last", {59: 1, 60: 0.1, 80: 0.01})):
        args = cpctrans.parse_args(flags.split())
        for epoch, factor in want.items():
            rates = [cpctrans.learning_rate(args, 7 * epoch + k, 7) for k in (0, 6)]
            assert rates == pytest.approx([1e-3 * factor] * 2, rel=1e-12)
    model = cpctrans.Classifier(arguments("--stage", "finetune"), 5)
    names = {id(p): k.split(".")[0] for k, p in model.named_parameters()}
    for what, slow in (("ft", {"backbone", "encoder"}), ("all", set())):
        args = cpctrans.parse_args(["--pretrain", "none", "--train_what", what])
        groups = cpctrans.make_optimizer(args, model).param_groups
        assert {names[id(p)] for g in groups if g["scale"] == 0.1 for p in g["params"]} == slow
        assert sum(len(g["params"]) for g in groups) == len(names)
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(linear.weight)
    linear.weight.grad = torch.zeros_like(linear.weight)
    cpctrans.make_optimizer(arguments("--lr", 0.01, "--weight_decay", 0.1), linear).step()
    assert linear.weight.item() == pytest.approx(0.99)        # AdamW would leave 0.999


# ---- protocol ------------------------------------------------------------------------------------

def test_a_checkpoint_that_has_seen_the_test_videos_is_refused(ucf, tuned, tmp_path):
    test = ["--data", ucf, "--limit", 2, "--test", tuned / "best.pt", "--split", 2]
    assert "that list holds test videos of split 2" in run(tmp_path / "a", *test)
    assert not run(tmp_path / "b", *test, "--as_released")
    assert metrics_of(tmp_path / "b")["protocol"].startswith(ONE)


def test_the_released_protocol_is_followed_and_told(ucf, tmp_path):
    short = ["--data", ucf, "--limit", 8, "--epochs", 1, "--batch_size", 4]
    assert not run(tmp_path / "pre", *MINI, *short, "--as_released")
    released = ONE.replace("1", "3", 1).replace("groups 24 and 25 of it", "TEST videos, as released")
    assert metrics_of(tmp_path / "pre")["protocol"] == released
    flags = ["--tiny", *short, "--pretrain", tmp_path / "pre" / "best.pt"]
    assert "test videos of split 1" in run(tmp_path / "no", *flags, "--split", 1)
    assert not run(tmp_path / "tuned", *flags, "--as_released")
    assert metrics_of(tmp_path / "tuned")["protocol"] == "; ".join(
        [released, released.replace("pre-trained", "fine-tuned").replace("3", "1")])


def test_hmdb51_starts_from_ucf101(data, pre, tmp_path):
    flags = ["--dataset", "hmdb51", "--data", data / "hmdb51"]
    assert not run(tmp_path / "ft", "--tiny", *flags, "--pretrain", pre / "best.pt", "--epochs", 1,
                   "--batch_size", 4, "--limit", 8)
    assert not run(tmp_path / "test", *flags, "--test", tmp_path / "ft" / "best.pt", "--limit", 3)
    assert metrics_of(tmp_path / "test")["protocol"].split("; ")[:2] == [
        ONE, "fine-tuned on train list 1 of hmdb51, epoch chosen on every tenth source of it"]
    assert "its classes (brush_hair, ...) are not those of" in run(tmp_path / "x", "--data", data / "ucf101", "--test",
                                  tmp_path / "ft" / "best.pt")


# ---- checkpoints ---------------------------------------------------------------------------------

def released(model, folder, prefix="", numpy_1=False, gru=("cell_list.0", "ConvGRUCell_00")):
    """(path, state) of a file as the release writes it: its names, unused tensors, NumPy's number."""
    state = {}
    for k, v in model.state_dict().items():
        v, (part, *rest) = torch.randn_like(v.float()).to(v.dtype), k.split(".", 1)
        old = {"encoder": ["transEnc.transEncoder"], "agg": [f"agg.{g}" for g in gru]}
        state |= {".".join([name, *rest]): v for name in old.get(part, [part])}
    d = model.backbone.out_dim
    state |= {"backbone.fc.weight": torch.zeros(2 * d, 2 * d),
              "transEnc.ff.w_1.bias": torch.ones(d), "transEnc.attn.linears.0.bias": torch.ones(d),
              "transEnc.position.pe": torch.zeros(1, 500, d)}
    path = folder / "epoch9.pth.tar"
    torch.save({"epoch": 10, "net": "resnet18", "best_acc": np.float64(0.4), "iteration": 3,
                "state_dict": {prefix + k: v for k, v in state.items()}}, path)
    if numpy_1:                                               # as NumPy 1 names its number
        with zipfile.ZipFile(path) as z:
            parts = {n: z.read(n) for n in z.namelist()}
        with zipfile.ZipFile(path, "w") as z:
            for n, v in parts.items():
                z.writestr(n, v.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return path, state


@pytest.mark.parametrize("prefix, numpy_1, gru", [
    ("", False, ("cell_list.0", "ConvGRUCell_00")), ("module.", True, ("cell_list.0",)),
    ("module.module.", False, ("ConvGRUCell_00",))])
@pytest.mark.parametrize("kind", ["pretrain", "classifier"])
def test_released_checkpoints_load(kind, prefix, numpy_1, gru, tmp_path):
    args = arguments("--layers", 1)
    model = cpctrans.CPC(args) if kind == "pretrain" else cpctrans.Classifier(args, 9)
    path, state = released(model, tmp_path, prefix, numpy_1, gru)
    args = cpctrans.parse_args(["--pretrain", str(path), "--out", str(tmp_path / "out")])
    assert (args.net, args.width, args.layers, args.heads) == ("resnet10", 16, 1, 2)
    network = cpctrans.Classifier(args, 9)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    cpctrans.load_init(args, network)
    for k, v in network.state_dict().items():
        part, rest = k.split(".", 1)
        old = {"encoder": "transEnc.transEncoder", "agg": f"agg.{gru[0]}"}.get(part, part)
        assert torch.equal(v, before[k] if k.startswith("final") else state[f"{old}.{rest}"]), k


@pytest.mark.parametrize("what", ["other names", "resnet34", "lacks a tensor"])
def test_a_checkpoint_that_does_not_fit_is_one_line(what, ucf, tmp_path):
    path, state = released(cpctrans.CPC(arguments()), tmp_path)
    words, flags = {"other names": ("no backbone.conv1.weight", []),
                    "resnet34": ("missing, such as backbone.layer1.1", ["--net", "resnet34"]),
                    "lacks a tensor": ("such as backbone.layer3.0.conv1", [])}[what]
    if what == "other names":
        state = {"stem.weight": torch.zeros(3)}
    state.pop("backbone.layer3.0.conv1.weight" if what == "lacks a tensor" else "", None)
    torch.save({"state_dict": state}, path)
    message = run(tmp_path / "out", "--tiny", "--data", ucf, "--pretrain", path, *flags)
    assert message.startswith("error: ") and "epoch9.pth.tar" in message and words in message


# ---- arguments -----------------------------------------------------------------------------------

ORIGINAL = [  # the commands of the official README
    "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --epochs 300 --num_seq 5 "
    "--pred_step 3",
    "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --pretrain a.pt --train_what "
    "ft --epochs 300 --num_seq 7 --pred_step 3",
    "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --test b.pt",
    "--gpu 0,1 --net resnet34 --dataset hmdb51 --batch_size 8 --img_dim 128 --ds 2 --wd 0.5"]


@pytest.mark.parametrize("line", ORIGINAL)
@pytest.mark.parametrize("tiny", ["", " --tiny"])
def test_the_original_commands_mean_what_they_meant(line, tiny):
    args = cpctrans.parse_args((line + tiny).split())
    ours = {"num_seq": "num_frames", "ds": "stride", "wd": "weight_decay", "pretrain": "init",
            "test": "init"}
    given = {ours.get(k, k): v for k, v in re.findall(r"--(\w+) (\S+)", line) if k != "gpu"}
    assert {k: str(getattr(args, k)) for k in given} == given
    assert args.stage == ("finetune" if "pretrain" in line else
                          "test" if "test" in line else "pretrain")


@pytest.mark.parametrize("flags, want", [
    ("", {"stage": "pretrain", "num_frames": 5, "img_dim": 224, "crop": 224, "batch_size": 16,
          "lr": 1e-3, "weight_decay": 1e-5, "stride": 3, "pred_step": 3, "net": "resnet18",
          "width": 64, "layers": 2, "heads": 4, "split": 1, "epochs": 300, "init": "none"}),
    ("--pretrain random", {"stage": "finetune", "num_frames": 7, "weight_decay": 1e-3,
                           "epochs": 300, "train_what": "ft", "dropout": 0.5, "init": "none"}),
    ("--stage finetune --init random --train_what last", {"init": "none", "epochs": 100}),
    ("--stage finetune --dataset hmdb51", {"init": "runs/cpctrans_ucf101_pretrain/best.pt"}),
    ("--stage test --dataset hmdb51", {"init": "runs/cpctrans_hmdb51_finetune/best.pt"}),
    ("--tiny", {"img_dim": 48, "crop": 64, "width": 16, "net": "resnet10", "epochs": 60}),
    ("--as_released", {"split": 3}), ("--as_released --split 2", {"split": 2}),
    ("--as_released --pretrain none --train_what last", {"split": 1, "train_what": "last"})])
def test_defaults_are_those_of_the_published_recipe(flags, want):
    args = cpctrans.parse_args(flags.split())
    assert {k: getattr(args, k) for k in want} == want


def test_a_checkpoint_sets_the_defaults_and_flags_win(tuned):
    test = ["--test", str(tuned / "best.pt")]
    for flags, want in (
            (test, {"net": "resnet10", "width": 16, "img_dim": 32, "crop": 60, "num_frames": 7}),
            ([*test, "--img_dim", "48", "--num_seq", "5"], {"img_dim": 48, "num_frames": 5}),
            (["--pretrain", test[1], "--tiny"], {"img_dim": 32, "num_frames": 7, "epochs": 30})):
        args = cpctrans.parse_args(flags)
        assert {k: getattr(args, k) for k in want} == want


@pytest.mark.parametrize("flags", ["--heads 3", "--pred_step 5", "--stage pretrain --test a.pt",
                                   "--stage test --pretrain a.pt", "--seq_len 5"])
def test_flags_that_contradict_one_another_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as e:
        cpctrans.parse_args(flags.split())
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: ")
