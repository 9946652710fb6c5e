"""`common.py prepare`: the copies hold the same pictures at the same times, and the same sound.

Painted numbers tell which picture came out, see test_media.py, whose files are prepared here.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import test_media
import torch.distributed as dist
from running import REPO, command
from test_media import FILES, SOUNDS, X264, on_show, seen, smooth, truth, write_video

import common
from common import VideoError, probe, read_audio, read_clip, reencode

media, sounding = test_media.media, test_media.sounding       # fixtures
LOST = {"mp4 cut in a gop", "ts cut in a gop"}                # their first pictures are not there
UNEVEN = {"avi dropped pictures"}                             # its header counts them, too


# ---- one file --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [n for n in FILES if n not in (
    "mp4 closed gop", "mp4 no b", "mp4 faststart", "mp4 30", "mp4 50", "mpg mpeg1", "grey",
    "mp4 59.94", "mp4 b-pyramid", "mp4 b-frames, one gop", "avi packed, one b", "rotated 180",
    "seven pictures", "yuv444", "mkv 29.97", "rotated 270", "odd size avi",
    "avi 29.97", "mp4 open gop")])
def test_every_picture_comes_out_once_at_its_time_upright_and_no_larger(tmp_path, media, name):
    path, made = media(name), tmp_path / media(name).name
    starts, numbers, rate, _ = truth(path)
    reencode(path, made, 48, 20)
    times, fps = common.clock(made)
    assert np.allclose(times, starts, rtol=0, atol=1e-9) and (fps == float(rate) or name in UNEVEN)
    assert name == "mp4 vfr" or np.allclose(common.clock(path)[0], times, rtol=0, atol=1e-9)
    clip, = read_clip(made, [list(starts)])
    assert seen(clip) == list(numbers)
    some = list(np.random.default_rng(0).uniform(0, starts[-1], 3))
    for t in some:
        assert seen(read_clip(made, [[t]])[0]) == [numbers[k] for k in on_show(starts, [t])]
    old, = read_clip(path, [list(starts)], 48)
    h, w = np.subtract(old.shape[1:3], clip.shape[1:3])
    assert 0 <= h <= 1 and 0 <= w <= 1 and clip.shape[1] % 2 == clip.shape[2] % 2 == 0
    assert abs(clip.astype(float) - old[:, :clip.shape[1], :clip.shape[2]]).mean() < 5
    assert name in LOST or common.count_frames(made) == common.count_frames(path) == len(starts)
    assert seen(common.read_frames(made, [0, len(starts) - 1])) == [numbers[0], numbers[-1]]
    for file in (path, made) if name not in LOST else (made,):
        flow = np.concatenate([t for t, _ in common.stream(file)])
        assert flow.shape == starts.shape and np.allclose(flow, starts, rtol=0, atol=1e-9)
    with av.open(str(made)) as c:
        f = next(c.decode(video=0))
        assert f.format.name in ("yuv420p", "yuvj420p") and f.rotation == 0


@pytest.mark.parametrize("name", [n for n in SOUNDS if n not in (
    "aac mono 16000", "aac stereo 22050", "pcm mkv 44100", "mp3 avi 16000", "aac ts", "mp3 mp4",
    "pcm avi", "aac late mkv", "opus mkv", "aac late ts", "mp2 mpg", "ac3 ts")])
def test_the_sound_is_the_same_at_the_same_times(tmp_path, sounding, name):
    path, made, exact = sounding(name), tmp_path / "made", SOUNDS[name][2]
    reencode(path, made, 48, 20)
    for start, stop in ((0.0, 9.0), (1.1, 1.6), (3.2, 9.0)):
        if start and "vorbis" in name:                        # nor does it in the source
            continue
        (x, rate), (y, rate_) = read_audio(path, start, stop), read_audio(made, start, stop)
        assert rate == rate_ and x.shape == y.shape and x.shape[1] > rate // 4
        dither = 4e-5 if "mp2" in name or "opus" in name else 0
        assert not (exact or start == 0) or np.allclose(x, y, rtol=0, atol=dither), (start, stop)
    assert probe(made)[4:] == probe(path)[4:]


@pytest.mark.parametrize("space, full, pix_fmt", [
    (5, 1, "yuv420p"), (1, 2, "yuv420p"), (1, 1, "yuv444p"), (1, 1, "yuv420p10le")], ids=str)
def test_colours_and_their_tags_stay(tmp_path, space, full, pix_fmt):
    path = write_video(tmp_path / "a.mp4", n=3, size=(320, 240), options={**X264, "crf": "10"},
                       image=smooth, pix_fmt=pix_fmt,
                       colours={"colorspace": space, "color_range": full,
                                "sample_aspect_ratio": Fraction(4, 3)})
    reencode(path, tmp_path / "b.mp4", 120, 15)
    with av.open(str(tmp_path / "b.mp4")) as c:
        f = next(c.decode(video=0))
        assert (int(f.colorspace), int(f.color_range), f.width, f.height) == (space, full, 160, 120)
        assert c.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
    (old,), (new,) = (read_clip(tmp_path / n, [[0.0]], 120) for n in ("a.mp4", "b.mp4"))
    assert abs(old.astype(float) - new).mean() < 2.5


def test_a_file_that_breaks_off_is_refused_and_leaves_nothing(tmp_path, media):
    for name in "mp4 b-frames, one gop", "mp4 faststart", "mkv", "avi mpeg4":
        data = media(name).read_bytes()
        path = tmp_path / f"cut{media(name).suffix}"
        path.write_bytes(data[:len(data) // 2])
        with pytest.raises(VideoError) as e:
            reencode(path, tmp_path / "made", 48, 20)
        assert str(e.value).startswith(str(path)) and [*tmp_path.iterdir()] == [path]
        path.unlink()


def test_a_fault_of_the_target_is_not_blamed_on_the_source(tmp_path, media, monkeypatch):
    def fault(kind, target):
        with pytest.raises(kind) as e:
            reencode(media("one picture"), target, 48, 20)
        assert type(e.value) is kind and str(e.value).startswith(f"{target}: could not be written")
        assert not [*tmp_path.iterdir()]

    def refuse(code):
        def replace(*_):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(os, "replace", replace)

    fault(common.UserError, tmp_path / "gone" / "x.mp4")
    refuse(errno.EIO)
    fault(common.UserError, tmp_path / "x.mp4")
    refuse(errno.ENAMETOOLONG)                                # the others may be written
    fault(VideoError, tmp_path / "x.mp4")


# ---- a folder --------------------------------------------------------------------------------

def run(*args, **how):
    return command("prepare", *args, script="common", **how)


def args(src, dst, *more):
    return common.parse_command(["prepare", str(src), str(dst), *map(str, more)])


def run_here(*a):
    """As `run` with one process, without its start."""
    try:
        common.prepare(args(*a))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def contents(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def source(tmp_path_factory, media, sounding):
    """A dataset's folder: videos, annotations, a loop of links, and what is not to be copied."""
    root = tmp_path_factory.mktemp("source")
    for name, file in {"A/v_A_g01.avi": media("avi packed b-frames"),
                       "A/v_A_g02.avi": sounding("pcm u8 avi"), "B/b é.mp4": media("mp4 29.97"),
                       "c.MP4": sounding("aac stereo 44100"), "d.mkv": media("mkv")}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(file.read_bytes())
    for name, text in {"lists/train.txt": "a 1\n", "all.CSV": "x\n1\n", "B/n.json": "{}",
                       ".hidden/x.txt": "", "features/about.json": "{}", "features/x.npz": "",
                       "features/n.txt": "", "frames/image_00001.jpg": "", "readme.md": ""}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / "B" / "again").symlink_to(root / "A")
    (root / "A" / "up").symlink_to(root)
    return root


WANTED = sorted([
    "A/v_A_g01.avi", "A/v_A_g02.avi", "B/again/v_A_g01.avi", "B/again/v_A_g02.avi", "B/b é.mp4",
    "B/n.json", "all.CSV", "c.MP4", "d.mkv", "lists/train.txt", "prepare.json"])


def test_a_folder_is_prepared_once_by_any_number_of_processes(tmp_path, source, capsys,
                                                                  monkeypatch):
    dst = tmp_path / "one"
    one = run(source, dst, "--short_side", 48)
    assert (one.code, one.err) == (0, ""), one.err
    assert contents(dst) == WANTED
    assert "7 of 7 videos" in one.out and "PSNR" in one.out and one.out.count("\n") < 10
    monkeypatch.setenv("MALLOC_PERTURB_", "85")               # memory that nobody wrote looks other
    two = run(source, tmp_path / "two", "--short_side", 48, n=2)
    assert two.code == 0 and contents(tmp_path / "two") == WANTED
    data = {n: (dst / n).read_bytes() for n in WANTED}
    assert data == {n: (tmp_path / "two" / n).read_bytes() for n in WANTED}
    before = {n: (dst / n).stat().st_mtime_ns for n in WANTED}
    (dst / "A" / "v_A_g01.avi").unlink()
    for name, age in (("dead", 4000), ("busy", 3000)):        # a younger one is of a run at work
        (dst / "A" / f".prepare-{name}-1.part").write_text("half")
        os.utime(dst / "A" / f".prepare-{name}-1.part", (time.time() - age,) * 2)
    os.utime(dst / "c.MP4", (1, 1))
    before["c.MP4"] = 10 ** 9
    run_here(source, dst, "--short_side", 48)
    told = capsys.readouterr().out
    assert "6 of them done before" in told and "1 of the copies are older than" in told
    (dst / "A" / ".prepare-busy-1.part").unlink()
    assert data == {n: (dst / n).read_bytes() for n in WANTED} and contents(dst) == WANTED
    after = {n: (dst / n).stat().st_mtime_ns for n in WANTED}
    assert [n for n in WANTED if after[n] != before[n]] == ["A/v_A_g01.avi"]


def test_what_another_launch_has_made_in_the_meantime_is_left_alone(tmp_path, source, monkeypatch):
    root, dst, made = tmp_path / "src", tmp_path / "dst", []
    root.mkdir()
    for k in range(4):
        (root / f"{k}.mp4").symlink_to(source / "c.MP4")

    def other_launch(path, target, *rest):
        made.append(target)
        for k in range(4):
            (dst / f"{k}.mp4").write_bytes(path.read_bytes())

    monkeypatch.setattr(common, "reencode", other_launch)
    run_here(root, dst)
    assert len(made) == 1 and len(contents(dst)) == 5


def test_pipes_pictures_and_the_target_are_not_walked_into(tmp_path, source, monkeypatch):
    root, dst, asked = tmp_path / "src", tmp_path / "dst", []
    (root / "frames").mkdir(parents=True)
    (dst / "sub").mkdir(parents=True)
    (dst / "sub" / "a.mp4").touch()
    (root / "again").symlink_to(dst)
    (root / "loop").symlink_to(root / "loop")
    for k in range(9):
        (root / "frames" / f"{k}.jpg").touch()
    for name in "pipe.mp4", "pipe.json":
        os.mkfifo(root / name)
    (root / "b.mkv").symlink_to(source / "d.mkv")
    for name in "is_dir", "is_file", "stat":
        real = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda path, real=real, **how:
                            asked.append(path.suffix) or real(path, **how))
    found = common.list_sources(root, dst)
    assert [name for name, _, _ in found] == ["b.mkv", "pipe.mp4"] and ".jpg" not in asked
    assert found[0][1] == os.stat(source / "d.mkv").st_size and found[1][1] == 0
    with pytest.raises(VideoError, match="not a regular file"):
        reencode(root / "pipe.mp4", tmp_path / "x.mp4", 48, 20)


def test_broken_files_are_named_and_the_others_done(tmp_path, source):
    root = tmp_path / "src"
    root.mkdir()
    data = (source / "B" / "b é.mp4").read_bytes()
    good = f"{'good' * 62}.mp4"                               # as long as a name can be, but three
    (root / good).write_bytes(data)
    (root / "cut.mp4").write_bytes(data[:len(data) // 2])
    (root / "page.avi").write_text("<html>" * 100)
    (root / "gone.mkv").symlink_to(tmp_path / "nowhere")
    r = run(root, tmp_path / "dst")
    assert r.code == 1 and contents(tmp_path / "dst") == [good, "prepare.json"]
    last = r.err.splitlines()[-1]
    assert last.startswith("error: 3 of 4 videos were not prepared: ") and "Traceback" not in r.err
    assert all(f"{root / n}: " in last for n in ("cut.mp4", "page.avi", "gone.mkv"))
    assert "1 of 4 videos" in r.out


def test_what_cannot_be_meant_is_refused(tmp_path, source, capsys):
    def fault(*a):
        with pytest.raises(common.UserError) as e:
            common.keep_settings(args(*a))
            common.list_sources(a[0])
        return str(e.value)

    assert "neither inside" in fault(source, source)
    assert "neither inside" in fault(source, source / "A" / "new")
    assert "neither inside" in fault(source / "A", source)
    (tmp_path / "link").symlink_to(source)
    assert "neither inside" in fault(tmp_path / "link", source / "new")
    assert "no such folder" in fault(tmp_path / "none", tmp_path / "x")
    assert "holds no prepare.json" in fault(source / "A", tmp_path)
    common.keep_settings(args(source, tmp_path / "dst"))
    common.keep_settings(args(tmp_path / "link", tmp_path / "dst"))
    line = fault(source / "A", tmp_path / "dst")
    assert f"was made from {source.resolve()}, now SRC is {source.resolve() / 'A'}" in line
    line = fault(source, tmp_path / "dst", "--short_side", 128)
    assert line.startswith(f"{tmp_path / 'dst' / 'prepare.json'}: was made with --short_side 256")
    assert "--crf 20" in fault(source, tmp_path / "dst", "--crf", 23)
    (tmp_path / "half" / "segments").mkdir(parents=True)
    (tmp_path / "half" / "segments" / ".cutting").touch()
    assert "still being cut" in fault(tmp_path / "half", tmp_path / "y")
    for flags in (["--short_side", "47"], ["--short_side", "2"], ["--crf", "nan"], ["--what"]):
        with pytest.raises(SystemExit) as e:
            args("a", "b", *flags)
        assert e.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_the_largest_files_are_dealt_out_first():
    assert common.deal([1, 9, 5, 5, 0, 3], 2) == [[1, 5, 4], [2, 3, 0]]
    assert common.deal([], 2) == [[], []]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_half_file_and_can_go_on(tmp_path, source, how, capsys):
    root, dst = tmp_path / "src", tmp_path / "dst"
    root.mkdir()
    for k in range(20):
        (root / f"{k}.mp4").symlink_to(source / "c.MP4")
    p = subprocess.Popen([sys.executable, str(REPO / "common.py"), "prepare", str(root), str(dst)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    until = time.monotonic() + 60                             # a job in the background ignores it
    while time.monotonic() < until and len([*dst.glob("*.mp4")]) < 2:
        time.sleep(0.005)
    while time.monotonic() < until and not [*dst.glob(".*.part")]:
        pass
    os.kill(p.pid, how)
    _, err = p.communicate(timeout=60)
    assert p.returncode != 0 and b"Traceback" not in err
    done = [*dst.glob("*.mp4")]
    assert 2 <= len(done) < 20
    for f in done:
        assert common.count_frames(f) == 100
    if how == signal.SIGKILL:
        stamps = {f: f.stat().st_mtime_ns for f in done}
        for f in dst.glob(".*.part"):
            os.utime(f, (1, 1))                               # as an hour later
        run_here(root, dst)
        assert f"{len(done)} of them done before" in capsys.readouterr().out
        assert contents(dst) == sorted([*(f"{k}.mp4" for k in range(20)), "prepare.json"])
        assert stamps == {f: f.stat().st_mtime_ns for f in done}


def test_a_full_disk_stops_the_run_with_one_line(tmp_path, source):
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); "
            f"sys.argv = ['common.py', 'prepare', {str(source)!r}, {str(tmp_path / 'dst')!r}]; "
            "import common; common.launch(common.prepare, common.parse_command())")
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                       cwd=REPO, timeout=100)
    assert p.returncode == 1 and "Traceback" not in p.stderr
    assert p.stderr.startswith("error: ") and "could not be written" in p.stderr
    assert p.stderr.count("\n") == 1 and not [*tmp_path.rglob(".*.part")]


# ---- the scripts read what was prepared ------------------------------------------------------

def prepared(root, folder):
    dst = folder / "prepared" / root.name
    options = args(root, dst)
    for name, _, _ in common.open_target(options)[1]:
        reencode(root / name, dst / name, 256, 20)
    return dst


def near(a, b):
    a, b = (np.asarray(x, dtype=float) for x in (a, b))
    return a.shape == b.shape and abs(a - b).mean() < 4


def test_cpctrans_reads_prepared_videos_like_their_sources(tmp_path, ucf101):
    import cpctrans
    dst = prepared(ucf101, tmp_path)
    assert json.loads((dst / "prepare.json").read_text())["short_side"] == 256
    rows = []
    for data in (ucf101, dst):
        a = cpctrans.parse_args(["--stage", "test", "--data", str(data), "--tiny", "--out",
                                 str(tmp_path / data.parent.name / "run"), "--init", "none"])
        names, labels, classes, _ = cpctrans.read_list(a, "test", 1)
        folder, ending = cpctrans.locate(a, names)
        files = [folder / (n + ending) for n in names]
        counts = [common.count_frames(f) for f in files]
        rows.append((names, labels, classes, counts,
                     np.stack([common.read_frames(f, [0, 7, 19]) for f in files])))
    assert rows[0][:4] == rows[1][:4] and near(rows[0][4], rows[1][4])


def test_ssdet_reads_prepared_videos_like_their_sources(tmp_path, charades):
    import ssdet_coarsefine as ssdet
    dst = prepared(charades, tmp_path)
    rows = []
    for data in (charades, dst):
        a = ssdet.parse_args(["--stage", "finetune", "--dataset", "charades", "--data", str(data),
                              "--tiny", "--out", str(tmp_path / "run"), "--init", "none"])
        videos = ssdet.read_videos(a, "train", ssdet.class_names(a))
        films = [ssdet.Film(v.path, "{id}-{:06d}.jpg", rate) for v in videos for rate in (None, 24)]
        rows.append(([(v.name, *v[2:]) for v in videos], [(f.n, f.fps) for f in films],
                     [f.read(np.array([0, 5, f.n - 1]), 64) for f in films]))
    assert rows[0][:2] == rows[1][:2]
    assert all(near(x, y) for x, y in zip(rows[0][2], rows[1][2]))
