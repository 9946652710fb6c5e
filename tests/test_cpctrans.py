"""cpctrans.py: loss, network, clips, lists, stages, protocol, checkpoints and flags."""

import collections
import json
import math
import re
import shutil

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

CLASSES = {"Archery": 3, "HandstandPushups": 37, "HammerThrow": 36, "YoYo": 101}
LENGTHS = {1: 29, 2: 40, 8: 29, 9: 33, 15: 16, 16: 31, 24: 30, 25: 29}        # frames, by group
MINI = ("--tiny --net resnet10 --img_dim 32 --crop 60 --batch_size 4 --epochs 2 --workers 0 "
        "--log_every 1").split()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(*flags):
    return cpctrans.parse_args([*MINI, *map(str, flags)])


def run(out, *flags):
    """The metrics of a stage, or the error that ends it."""
    r = running.quick("cpctrans", *flags, "--workers", 0, "--out", out)
    return json.loads((out / "metrics.json").read_text()) if r.code == 0 else r.err


@pytest.fixture(scope="module", autouse=True)
def one_process():
    if not dist.is_initialized():
        common.init_distributed()
    yield
    dist.destroy_process_group()


# ---- a small world -------------------------------------------------------------------------------

def name_of(c, group):
    return f"{c}/v_{c.replace('Handstand', 'HandStand')}_g{group:02d}_c01"


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    """32 videos whose frames show their numbers. Those of group 15 are too short for a clip."""
    root = tmp_path_factory.mktemp("ucf") / "ucf101"
    numbered = sorted((number, c) for c, number in CLASSES.items())
    world.text(root / "ucfTrainTestlist/classInd.txt", *(f"{number} {c}" for number, c in numbered))
    for k in (1, 2, 3):
        tested = range(7 * k - 6, 7 * k + 1)                  # groups 1-7, 8-14, 15-21
        rows = [(f"{name_of(c, g)}.avi", g, CLASSES[c]) for c in CLASSES for g in LENGTHS]
        world.text(root / f"ucfTrainTestlist/trainlist0{k}.txt",
                   *(f"{name} {number}" for name, g, number in rows if g not in tested))
        world.text(root / f"ucfTrainTestlist/testlist0{k}.txt",
                   *(name for name, g, _ in rows if g in tested))
    for n, c in enumerate(CLASSES):
        for group, length in LENGTHS.items():
            world.write_video(root / "UCF-101" / f"{name_of(c, group)}.avi",
                              (world.paint(k, 96, 64, n) for k in range(length)), 25, "mpeg4",
                              world.MPEG4, gop=12 + 7 * n)
    return root


@pytest.fixture
def seen(monkeypatch):
    """The numbers of the frames that each call of `read_frames` has returned."""
    found, read = [], cpctrans.read_frames

    def spy(*args):
        frames = read(*args)                                  # (T, 3, H, W)
        found.append([world.number_of(f) for f in frames.permute(0, 2, 3, 1).numpy()])
        return frames
    monkeypatch.setattr(cpctrans, "read_frames", spy)
    return found


# ---- loss and network ----------------------------------------------------------------------------

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
    rows = cpctrans.metrics_per_video(z_hat, z)
    for terms in (cpctrans.info_nce(z_hat, z), {k: x.mean() for k, x in rows.items()}):
        assert terms["loss"].item() == pytest.approx(total / len(cells), rel=1e-5)
        for k in (1, 3, 5):
            assert terms[f"top{k}"].item() == pytest.approx(100 * tops[k] / len(cells))
    kinds = sum(rows[f"wrong_{k}"] for k in ("video", "cell", "time"))
    assert torch.allclose(kinds, 100 - rows["top1"]) and kinds.shape == (b,)


def step(clip):
    """{name: value of a term, or gradient of a parameter} after a training step."""
    torch.manual_seed(0)
    model = cpctrans.CPC(arguments("--num_frames", 3, "--pred_step", 2)).eval()
    network = DDP(model)                                      # must live until the gradients
    terms = cpctrans.info_nce(*network(clip))
    terms["loss"].backward()
    return {**terms, **{k: p.grad for k, p in model.named_parameters()}}


def half_a_step(rank):
    return {k: x.detach() for k, x in step(random(4, 3, 3, 32, 32)[2 * rank:][:2]).items()}


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    first, second = running.processes(half_a_step, 2, tmp_path)
    for k, x in step(random(4, 3, 3, 32, 32)).items():
        halves = [first[k], second[k]] if "." in k else [(first[k] + second[k]) / 2]
        assert all(torch.allclose(y, x, rtol=1e-3, atol=1e-6) for y in halves), k


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


# ---- clips ---------------------------------------------------------------------------------------

def test_training_clips_start_anywhere_and_are_a_stride_apart(ucf, seen):
    args = arguments("--data", ucf, "--num_frames", 4)
    videos, _ = cpctrans.read_videos(args, "train")
    clips = common.Samples(args, videos, cpctrans.make_pretrain_clip)
    for epoch in range(120):
        clips[epoch, 2]
    assert all(np.array_equal(np.diff(frames), [3, 3, 3]) for frames in seen)
    assert {frames[0] for frames in seen} == {*range(videos[2].length - 4 * 3)}


def test_test_clips_follow_one_another_and_cover_the_video(ucf, seen):
    args = arguments("--data", ucf, "--num_frames", 3, "--stride", 2, "--pred_step", 1)
    videos, _ = cpctrans.read_videos(args, "val")
    for i, video in enumerate(videos):
        clips = cpctrans.make_test_clips(args, videos, i)["clips"]            # (clips, 3, ...)
        assert seen[-1] == [*range(0, video.length, 2)][:3 * len(clips)]
        assert len(clips) == (video.length + 1) // 2 // 3
        middle = cpctrans.make_middle_clip(args, videos, i)["clip"]
        assert torch.equal(middle, clips[len(clips) // 2])


def test_short_videos_repeat_their_last_frame_or_are_left_out(ucf, seen, capsys):
    args = arguments("--data", ucf, "--num_frames", 7)
    videos, _ = cpctrans.read_videos(args, "train")
    assert "4 too short (their last frame is repeated)" in capsys.readouterr().out
    short = [v.length for v in videos].index(16)
    assert cpctrans.make_test_clips(args, videos, short)["clips"].shape[0] == 1
    assert seen[-1] == [0, 3, 6, 9, 12, 15, 15]
    args.as_released = True                                   # trains on groups 24 and 25, too
    assert [v.name for v in cpctrans.read_videos(args, "train")[0]] == [
        name_of(c, g) for c in CLASSES for g in LENGTHS if g not in (1, 2, 15)]
    assert "4 too short (left out)" in capsys.readouterr().out


def test_the_authors_csv_and_folders_of_frames_are_read(seen, tmp_path):
    """His folders do not matter. A class without test videos does not move the other labels."""
    (tmp_path / "jpg/YoYo/v_YoYo_g24_c01").mkdir(parents=True)
    for k in range(20):
        path = tmp_path / f"jpg/YoYo/v_YoYo_g24_c01/image_{k + 1:05d}.jpg"
        Image.fromarray(world.paint(k, 96, 64)).save(path)
    (tmp_path / "train_split01.csv").write_text(
        "/his/frame/Archery/v_Archery_g08_c01/,9\n/his/frame/YoYo/v_YoYo_g24_c01/,20\n")
    (tmp_path / "test_split01.csv").write_text("D:\\data\\YoYo\\v_YoYo_g24_c01\\,20\n")
    args = arguments("--data", tmp_path, "--num_frames", 4)
    for split in ("val", "test"):
        videos, classes = cpctrans.read_videos(args, split)
        assert [v[:3] for v in videos] == [("YoYo/v_YoYo_g24_c01", 1, 20)]
        assert classes == ["Archery", "YoYo"]
        cpctrans.make_middle_clip(args, videos, 0)
        assert seen[-1] == [0, 3, 6, 9]


def test_flip_and_crop_are_of_a_clip_colours_of_a_frame_or_a_clip_in_published_ranges(monkeypatch):
    frames = torch.tensor([50, 100, 150], dtype=torch.uint8).view(3, 1, 1).repeat(5, 1, 80, 96)
    frames[..., :48] += 5                                     # every crop sees these borders
    frames[..., :40, :] += 10
    monkeypatch.setattr(cpctrans, "read_frames", lambda *_: frames)
    args, video = arguments("--crop", 64), cpctrans.Video("a/b", 2, 20)
    rng, seen = np.random.default_rng(0), collections.Counter()
    for _ in range(400):
        sample = cpctrans.make_pretrain_clip(args, [video], 0, rng)
        clip, highest = sample["clip"], sample["clip"].max((2, 3))            # (5, 3, 32, 32)
        below = highest[..., None, None] - clip
        assert (below == below[0, 0]).all() and len({tuple(f) for f in sample["factors"]}) == 5
        assert (abs(sample["factors"] - (1, 1, 1, 0)) <= (0.5, 0.5, 0.5, 0.25)).all()
        assert (np.sort(sample["order"], 1) == np.arange(4)).all()
        seen.update("colour" if a != c else int(a) for a, _, c in highest)
        seen["flip"] += int(clip[0, 0, 0, 0] < clip[0, 0, 0, -1])
        sample = cpctrans.make_finetune_clip(args, [video], 0, rng)
        assert (sample["clip"] == sample["clip"][0]).all() and sample["label"] == 2
        seen["flip2"] += int(sample["clip"][0, 0, 0, 0] < sample["clip"][0, 0, 0, -1])
        assert len({tuple(f) for f in sample["factors"]}) == 1
        seen["jitter"] += int(sample["order"][0, 0] >= 0)
    assert seen["flip"] == pytest.approx(200, abs=50) and 150 < seen["flip2"] < 250       # of 400
    assert seen["jitter"] == pytest.approx(120, abs=40)
    assert seen["colour"] == pytest.approx(1000, abs=100)     # of 2000 frames
    assert all(seen[c] == pytest.approx(333, abs=80) for c in (65, 115, 165))


# ---- lists of videos -----------------------------------------------------------------------------

def test_the_validation_set_of_hmdb51_is_every_tenth_source_with_all_its_clips():
    names = [f"{c}/Film_[HD]_(a)#{source:02d}_{c}_f_cm_np1_ba_med_{i}"
             for source in range(30) for c in ("climb", "climb_stairs") for i in (1, 2)]
    assert cpctrans.is_validation("hmdb51", names) == [k // 4 % 10 == 0 for k in range(120)]


@pytest.mark.parametrize("file, row, words", [
    ("trainlist01.txt", "Fencing/v_Fencing_g08_c01.avi 3", ": class Fencing is not in"),
    ("trainlist01.txt", "v_Archery_g08_c01.avi 3", ":2: 'v_Archery_g08_c01.avi 3' is not"),
    ("trainlist01.txt", "Archery/../../etc/passwd.avi 3", ":2: 'Archery/.."),
    ("classInd.txt", "x HammerThrow", ":2: 'x HammerThrow' is not"),
    ("classInd.txt", None, ": no such file")])
def test_an_error_in_a_list_names_file_and_line(file, row, words, ucf, tmp_path):
    path = shutil.copytree(ucf / "ucfTrainTestlist", tmp_path / "lists") / file
    rows = path.read_text().splitlines()
    path.unlink()
    if row:
        world.text(path, rows[0], row, *rows[2:])
    with pytest.raises(common.UserError, match=re.escape(f"{path}{words}")):
        cpctrans.read_list(arguments("--data", tmp_path), "train", 1)


def test_part_of_a_dataset_is_found_and_what_is_missing_is_counted(ucf, tmp_path, capsys):
    shutil.copytree(ucf / "ucfTrainTestlist", tmp_path / "lists")
    shutil.copytree(ucf / "UCF-101" / "YoYo", tmp_path / "videos" / "YoYo")
    (tmp_path / "videos" / "YoYo" / "v_YoYo_g08_c01.avi").unlink()
    for split, want in (("train", [9, 15, 16]), ("val", [24, 25]), ("test", [1, 2])):
        videos, _ = cpctrans.read_videos(arguments("--data", tmp_path), split)
        assert [v.name for v in videos] == [name_of("YoYo", g) for g in want]
    assert "train: 3 of 16 videos; 13 missing" in capsys.readouterr().out
    path = tmp_path / "lists/testlist01.txt"
    path.write_text("YoYo/v_YoYo_g09_c01.avi\n" * 2)
    assert len(cpctrans.read_videos(arguments("--data", tmp_path), "test")[0]) == 1
    path.write_text("YoYo/v_YoYo_g09_c01.avi\nArchery/v_YoYo_g09_c01.avi")
    with pytest.raises(common.UserError, match="have the same file name"):
        cpctrans.read_videos(arguments("--data", tmp_path), "test")
    shutil.rmtree(tmp_path / "videos")
    with pytest.raises(common.UserError, match="none of the 16 train videos can be used"):
        cpctrans.read_videos(arguments("--data", tmp_path), "train")


# ---- stages and protocol -------------------------------------------------------------------------

BRIEF = "--tiny", "--epochs", 1, "--batch_size", 4
ONE = "pre-trained on train list 1 of ucf101, epoch chosen on groups 24 and 25 of it"


@pytest.fixture(scope="module")
def made(ucf, tmp_path_factory):
    """A folder with a pre-training, pre/, and a fine-tuning, tuned/."""
    root = tmp_path_factory.mktemp("made")
    assert run(root / "pre", *MINI, "--data", ucf)["protocol"] == ONE
    m = run(root / "tuned", *BRIEF, "--data", ucf, "--pretrain", root / "pre/best.pt")
    assert m["protocol"] == f"{ONE}; {ONE.replace('pre-trained', 'fine-tuned')}"
    return root


def test_the_test_is_the_mean_over_all_clips_and_retrieval_by_cosine(ucf, made, tmp_path):
    """A slow evaluation, from the checkpoint and the reader alone, finds the same numbers."""
    flags = ["--data", ucf, "--test", made / "tuned/best.pt"]
    m = run(tmp_path / "out", *flags)
    args, right = arguments(*flags), collections.Counter()
    model = cpctrans.Classifier(args, 101).eval().requires_grad_(False)
    model.load_state_dict(torch.load(made / "tuned/best.pt", weights_only=True)["model"])
    (videos, classes), (gallery, _) = (cpctrans.read_videos(args, x) for x in ("test", "train"))

    def feature(videos, i):
        clip = cpctrans.make_middle_clip(args, videos, i)["clip"]
        return model.features(cpctrans.normalize(clip)[None])[0].double()
    known = [feature(gallery, k) for k in range(len(gallery))]
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    for i, (video, row) in enumerate(zip(videos, rows, strict=True)):
        clips = cpctrans.normalize(cpctrans.make_test_clips(args, videos, i)["clips"])
        prob = torch.stack([model(c[None])[0] for c in clips]).softmax(1).mean(0)
        assert row == {"video": video.name, "class": classes[video.label],
                       "predicted": classes[prob.argmax()],
                       "probability": pytest.approx(prob.max().item(), abs=1e-5)}
        right["top1"] += int(prob.argmax() == video.label)
        cosines = [torch.cosine_similarity(x, feature(videos, i), 0) for x in known]
        right["retrieval_top1"] += int(gallery[np.argmax(cosines)].label == video.label)
    assert all(m[k] == pytest.approx(100 * n / 8) for k, n in right.items())
    assert m["protocol"].endswith("; tested on 8 of the 8 videos of test list 1 of ucf101")


def test_a_pretrained_checkpoint_gives_retrieval_alone(ucf, made, tmp_path):
    m = run(tmp_path / "out", "--data", ucf, "--test", made / "pre/best.pt", "--limit", 3)
    assert "top1" not in m and 0 <= m["retrieval_top1"] <= m["retrieval_top20"] <= 100
    assert m["protocol"] == f"{ONE}; tested on 3 of the 8 videos of test list 1 of ucf101"


def test_the_linear_probe_leaves_the_network_as_it_was(ucf, made, tmp_path):
    assert "val_top1" in run(tmp_path / "out", *BRIEF, "--data", ucf, "--pretrain",
                             made / "pre/best.pt", "--train_what", "last", "--lr", 0.1)
    before, after = (torch.load(f, weights_only=True)["model"]
                     for f in (made / "pre/best.pt", tmp_path / "out/last.pt"))
    frozen = [k for k in after if k.startswith(cpctrans.PRETRAINED)]
    assert len(frozen) > 80 and all(torch.equal(before[k], after[k]) for k in frozen)
    assert (after["final_bn.weight"] != 1).all() and (after["final_fc.1.bias"] != 0).any()


def test_a_checkpoint_that_has_seen_the_test_videos_is_refused(ucf, made, tmp_path):
    test = ["--data", ucf, "--limit", 2, "--test", made / "tuned/best.pt", "--split", 2]
    assert "that list holds test videos of split 2" in run(tmp_path / "a", *test)
    assert run(tmp_path / "b", *test, "--as_released")["protocol"].startswith(ONE)


def test_the_released_protocol_is_followed_and_told(ucf, tmp_path):
    short = [*BRIEF, "--data", ucf, "--limit", 8]
    released = "{} on train list {} of ucf101, epoch chosen on TEST videos, as released".format
    m = run(tmp_path / "pre", *MINI, *short, "--as_released")
    assert m["protocol"] == released("pre-trained", 3)
    short += ["--pretrain", tmp_path / "pre/best.pt"]
    assert "test videos of split 1" in run(tmp_path / "no", *short, "--split", 1)
    m = run(tmp_path / "tuned", *short, "--as_released")
    assert m["protocol"] == f"{released('pre-trained', 3)}; {released('fine-tuned', 1)}"


def test_hmdb51_starts_from_ucf101(data, made, tmp_path):
    m = run(tmp_path / "ft", *BRIEF, "--dataset", "hmdb51", "--data", data / "hmdb51",
            "--pretrain", made / "pre/best.pt", "--limit", 8)
    assert m["protocol"].endswith("list 1 of hmdb51, epoch chosen on every tenth source of it")
    error = run(tmp_path / "x", "--data", data / "ucf101", "--test", tmp_path / "ft/best.pt")
    assert "its classes (brush_hair, ...) are not those of" in error


# ---- checkpoints and flags -----------------------------------------------------------------------

@pytest.mark.parametrize("network, prefix, gru, old", [
    (cpctrans.CPC, "", "cell_list.0", False),
    (cpctrans.CPC, "module.", "ConvGRUCell_00", True),
    (lambda args: cpctrans.Classifier(args, 9), "module.module.", "cell_list.0", True)])
def test_released_checkpoints_load(network, prefix, gru, old, tmp_path):
    """Under all names of the release, old: as PyTorch 1.5 and NumPy 1 have written them."""
    path, state = tmp_path / "epoch9.pth.tar", network(arguments("--layers", 1)).state_dict()
    for x in state.values():
        x.copy_(torch.randn_like(x.float()))
    names = {"encoder": "transEnc.transEncoder", "agg": f"agg.{gru}"}
    torch.save({"epoch": 10, "best_acc": np.float64(0.4), "state_dict": {
        prefix + re.sub(r"^\w+", lambda part: names.get(part[0], part[0]), k): x
        for k, x in state.items()}}, path, _use_new_zipfile_serialization=not old)
    if old:
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multi", b"cnumpy.core.multi"))
    args = cpctrans.parse_args(["--pretrain", str(path), "--out", str(tmp_path / "out")])
    assert (args.net, args.width, args.layers, args.heads) == ("resnet10", 16, 1, 2)
    model = cpctrans.Classifier(args, 9)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    cpctrans.load_init(args, model)
    for k, x in model.state_dict().items():
        assert torch.equal(x, before[k] if k.startswith("final") else state[k]), k


@pytest.mark.parametrize("stage, line", [                     # commands of the official README
    ("pretrain", "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --epochs 300 "
                 "--num_seq 5 --pred_step 3"),
    ("finetune", "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --pretrain a.pt "
                 "--train_what ft --epochs 300 --num_seq 7 --pred_step 3"),
    ("test", "--net resnet18 --dataset ucf101 --batch_size 16 --img_dim 224 --test b.pt"),
    ("pretrain", "--net resnet34 --dataset hmdb51 --batch_size 8 --img_dim 128 --ds 2 --wd 0.5")])
def test_the_original_commands_mean_what_they_meant(stage, line):
    ours = {"num_seq": "num_frames", "ds": "stride", "wd": "weight_decay", "pretrain": "init",
            "test": "init"}
    given = {ours.get(k, k): v for k, v in re.findall(r"--(\w+) (\S+)", line)}
    args = cpctrans.parse_args(f"{line} --gpu 0,1 --tiny".split())
    assert {k: str(getattr(args, k)) for k in given} == given and args.stage == stage


@pytest.mark.parametrize("flags, want", [
    ("", "stage=pretrain num_frames=5 img_dim=224 crop=224 batch_size=16 lr=0.001 stride=3 split=1 "
     "weight_decay=1e-05 pred_step=3 net=resnet18 width=64 layers=2 heads=4 epochs=300 init=none"),
    ("--pretrain random", "stage=finetune num_frames=7 weight_decay=0.001 epochs=300 train_what=ft "
     "dropout=0.5 init=none"),
    ("--stage finetune --dataset hmdb51", "init=runs/cpctrans_ucf101_pretrain/best.pt"),
    ("--stage test --dataset hmdb51", "init=runs/cpctrans_hmdb51_finetune/best.pt"),
    ("--tiny", "img_dim=48 crop=64 width=16 net=resnet10 epochs=60"),
    ("--as_released", "split=3"), ("--as_released --split 2", "split=2"),
    ("--as_released --stage finetune --init random --train_what last", "split=1 epochs=100"),
    ("--test TUNED", "net=resnet10 width=16 img_dim=32 crop=60 num_frames=7"),
    ("--test TUNED --img_dim 48 --num_seq 5", "img_dim=48 num_frames=5"),
    ("--pretrain TUNED --tiny", "img_dim=32 num_frames=7 epochs=30")])
def test_defaults_are_published_or_of_the_checkpoint_and_flags_win(flags, want, made):
    args = cpctrans.parse_args(flags.replace("TUNED", f"{made}/tuned/best.pt").split())
    assert [f"{k}={getattr(args, k)}" for k in re.findall(r"(\w+)=", want)] == want.split()


@pytest.mark.parametrize("flags", ["--heads 3", "--pred_step 5", "--stage pretrain --test a.pt",
                                   "--stage test --pretrain a.pt"])
def test_flags_that_contradict_one_another_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as e:
        cpctrans.parse_args(flags.split())
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: ")
