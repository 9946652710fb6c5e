"""Broken, odd and hostile files: each fault that the harness has found, and that it can fail."""

import csv
import io
import json
import os
import re
import shutil
import types
from fractions import Fraction
from pathlib import Path

import av
import fault_files
import numpy as np
import pytest
import test_media
import torch
from running import quick
from test_replai import LINEAR, linked, one_error

import common
import cpctrans
import f2c_oops
import replai
import ssdet_coarsefine as ssdet
from common import UserError, VideoError

# ---- the harness itself: it must be able to fail ------------------------------------------------

def hang(jobs, answers):
    """A decoder that hangs in the second file, and dies in the third."""
    with open(answers, "a") as f:
        for k, path, _ in jobs:
            f.write(json.dumps([k, "probe"]) + "\n")
            f.flush()
            if "slow" in path:
                import time
                time.sleep(1000)
            if "dead" in path:
                os.kill(os.getpid(), 11)
            f.write(json.dumps([k, {"probe": "read"}, 0.0]) + "\n")
            f.flush()


def test_a_hang_and_a_crash_of_the_decoder_are_failures_of_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fault_files, "LIMIT", 1)
    jobs = [(tmp_path / n, False) for n in ("a", "slow", "b", "dead", "c")]
    found = fault_files.watched(tmp_path, jobs, hang)
    assert [list(x.values()) for x, _ in found] == [
        ["read"], ["ended by signal 9"], ["read"], ["ended by signal 11"], ["read"]]
    assert len(fault_files.faults_of(jobs, found)) == 2


def test_the_judge_sees_what_is_lost_changed_or_told_badly(tmp_path):
    path = tmp_path / "a.txt"
    form = fault_files.Form("a", path, ["x 1", "y 2", "z 3"], fault_files.as_lines, None, "lines")
    good = fault_files.Seen([("x", 1), ("y", 2), ("z", 3)], 0, "3 rows", "")

    def wrong(value=None, status=0, out="3 rows", err="", **how):
        how = {"touched": {1}, "left": 3, **how}
        return fault_files.judge(form, fault_files.Mutation("m", b"", **how), good,
                                 fault_files.Seen(value, status, out, err))[1]

    assert not wrong([("x", 1), ("y", 7), ("z", 3)], most=3)
    assert not wrong([("x", 1), ("z", 3)], out="2 rows")
    assert not wrong(status=1, err=f"error: {path}:2: is wrong\n")
    assert "not a word" in wrong([("x", 1), ("z", 3)])
    assert "other rows" in wrong([("x", 5), ("y", 2), ("z", 3)])
    assert "twice" in wrong([("x", 1), ("y", 2), ("y", 2), ("z", 3)], most=4)
    assert "new rows" in wrong([*good.value, ("w", 4)], most=3)
    assert wrong([("x", 1), ("y", float("nan")), ("z", 3)], most=3)
    assert wrong([("x", 1), ("../y", 2), ("z", 3)], most=3)
    assert wrong([("x", 1), ("y", 7), ("z", 3)], most=3, same=True)
    assert wrong(status=1, err="Traceback (most recent call last):\n ...")
    assert wrong(status=1, err=f"error: {path}:2: is\nwrong\n")
    assert wrong(status=1, err="error: something\n") and wrong(status=2, err=f"error: {path}: x\n")
    assert wrong(status=1, err=f"error: {path}:2: is wrong\n", must=True)


def test_the_watched_readers_say_what_is_wrong(tmp_path):
    path = tmp_path / "a.mp4"

    def raises(e):
        def read(_):
            raise e
        return read

    assert fault_files.outcome(lambda p: 1, path) == "read"
    assert fault_files.outcome(raises(VideoError(f"{path}: damaged")), path) == "refused"
    for e in (VideoError("damaged"), VideoError(f"{path}"), VideoError(f"{path}: a\nb"),
              UserError(f"{path}: x"), IndexError("3"), MemoryError(), AssertionError("shape")):
        assert fault_files.outcome(raises(e), path) not in ("read", "refused")


# ---- faults that were found: media --------------------------------------------------------------

def test_eight_channels_of_sound_are_eight(tmp_path):
    path, x = fault_files.eight_channels(tmp_path / "a.mp4")
    y, _ = common.read_audio(path, 0.5, 1.5)
    assert y.shape == (8, 48000)
    assert np.corrcoef(y[7], x[7, 24000:72000])[0, 1] > 0.95


@pytest.mark.parametrize("kind", ["u8", "u8p", "s16", "s16p", "s32", "s32p", "flt", "fltp", "dbl",
                                  "dblp"])
def test_samples_of_every_format_are_floats(kind):
    dtype = {"u8": "u1", "s16": "i2", "s32": "i4", "flt": "f4", "dbl": "f8"}[kind.rstrip("p")]
    x = np.linspace(-0.9, 0.9, 300).reshape(3, 100)
    full = {"u1": 128, "i2": 2 ** 15, "i4": 2 ** 31}.get(dtype, 1)
    raw = (x * full + 128 * (dtype == "u1")).astype(dtype)
    flat = raw if kind.endswith("p") else np.ascontiguousarray(raw.T.reshape(1, -1))
    frame = av.AudioFrame.from_ndarray(flat, format=kind, layout="2.1")
    assert np.allclose(common._samples(frame), x, atol=0.01)


def test_an_absurd_rate_is_refused():
    for rate in (Fraction(268435481), Fraction(10001)):
        with pytest.raises(ValueError, match="pictures per second"):
            common._rate(types.SimpleNamespace(average_rate=rate, guessed_rate=None))
    assert common._rate(types.SimpleNamespace(average_rate=None, guessed_rate=None)) == 25


def test_other_errors_of_an_open_file_name_it(tmp_path):
    path = test_media.write_video(tmp_path / "a.mp4", n=3, options=test_media.X264)
    for kind in (IndexError, MemoryError):
        with pytest.raises(VideoError, match=f"^{path}: "), common._open(path):
            raise kind("list index out of range")


def test_a_picture_that_claims_to_be_huge_or_is_a_program_is_refused(tmp_path):
    from PIL import Image
    Image.new("RGB", (64, 48)).save(tmp_path / "image_00001.jpg")
    data = bytearray((tmp_path / "image_00001.jpg").read_bytes())
    at = data.index(b"\xff\xc0")
    data[at + 5:at + 9] = b"\xff\xfa\xff\xfa"
    for content in (bytes(data), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"):
        (tmp_path / "image_00002.jpg").write_bytes(content)
        with pytest.raises(VideoError, match=f"^{tmp_path}/image_00002.jpg: cannot be read"):
            common.read_frames(tmp_path, [0, 1])


# ---- faults that were found: lists and caches ---------------------------------------------------

def refused(read, *words):
    with pytest.raises(UserError) as e:
        read()
    assert all(str(w) in str(e.value) for w in words) and "\n" not in str(e.value), str(e.value)


def test_a_key_or_a_column_that_stands_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"x": {"len": 1, "t": 2, "len": 3}}')
    refused(lambda: common.read_json(path), path, "'len' stands there twice")
    path.write_text('{"a": 1, "a": 1}')
    refused(lambda: common.read_json(path), path, "'a' stands there twice")
    path.write_text("verb,noun,verb\n1,2,3\n")
    refused(lambda: common.read_table(path, ["verb"]), f"{path}:1: column 'verb'")


def test_an_error_is_one_short_line_without_control_characters():
    def read():
        raise UserError("a.json: 'x\0\x1b[2Jy\n z' " + "9" * 5000)

    seen = fault_files.shown(read)
    assert seen.status == 1 and seen.err.startswith("error: a.json: 'x??[2Jy  z' 999")
    assert seen.err.count("\n") == 1 and len(seen.err) < 2100 and seen.err.isprintable() is False
    assert seen.err.removesuffix("\n").isprintable()


@pytest.mark.parametrize("source", ["a\0b", "\ud800", "x" * 5000, None, 5, ["a"], {}])
def test_a_strange_source_of_prepared_videos_is_another_one(source, tmp_path):
    (tmp_path / "src").mkdir()
    args = common.parse_command(["prepare", str(tmp_path / "src"), str(tmp_path / "dst")])
    common.keep_settings(args)
    path = tmp_path / "dst" / "prepare.json"
    about = json.loads(path.read_text())
    (tmp_path / "link").symlink_to(tmp_path / "src")
    path.write_text(json.dumps({**about, "source": str(tmp_path / "link")}))
    common.keep_settings(args)                                # the same folder by another name
    path.write_text(json.dumps({**about, "source": source}))
    with pytest.raises(UserError, match=f"^{path}: was made from "):
        common.keep_settings(args)


def test_a_damaged_log_is_taken_for_what_is_left_of_it(tmp_path):
    good = {"stage": "a", "epoch": 0, "step": 1, "loss": 1.5, "broken": 2}
    lines = [json.dumps(good), '{"stage": "a", "step": 2}', "[" * 100000, '{"step": "x"}', "[1]",
             json.dumps({**good, "loss": [1]}), json.dumps({**good, "step": float("inf")}),
             json.dumps({**good, "broken": "1"}), json.dumps({**good, "step": 3})]
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\n" + "\n".join(lines).encode() + b"\n\xe9")
    args = types.SimpleNamespace(out=tmp_path, stage="a", batch_size=2, log_every=1)
    assert common.Log(args, 9, 12, 3).total("broken") == 4
    kept = (tmp_path / "log.jsonl").read_text().splitlines()
    assert kept == [lines[0], lines[-1]]


def test_a_checkpoint_whose_flags_are_no_flags_is_refused(tmp_path):
    args, model = types.SimpleNamespace(seed=0), torch.nn.Linear(1, 1)
    for change in ({"args": [1]}, {"args": None}, {"step": "2"}, {"step": None}, {"step": 1.5}):
        path = tmp_path / "last.pt"
        torch.save({"step": 1, "args": {"seed": 0}, "model": model.state_dict(), **change}, path)
        refused(lambda p=path: common.resume(p, args, model=model), path, "not a checkpoint")
    for change in ({"args": [1]}, {"history": {}}, {"history": ["a"]}, {"history": None}):
        torch.save({"args": {}, "history": [{}], **change}, path)
        refused(lambda: cpctrans.describe(path), path, "not of our form")


def test_hours_of_a_thousand_digits_are_no_time(tmp_path):
    import toy
    path = tmp_path / "annotations" / "EPIC_100_test_timestamps.csv"
    path.parent.mkdir()
    toy.write_csv(path, toy.EPIC_COLUMNS[:8], [dict(zip(toy.EPIC_COLUMNS, [
        "P01_01_0", "P01", "P01_01", "00:00:01.100", "9" * 5000 + ":00:01.10", "00:00:02", 1, 2]))])
    refused(lambda: replai.read_actions(tmp_path, "test"), f"{path}:2: start_timestamp")


@pytest.mark.parametrize("name, text, words", [
    ("tail_verbs", "verb\n97\n", ":2: verb '97' is no class number"),
    ("tail_nouns", "noun\n1_0\n", ":2: noun '1_0' is no class number"),
    ("tail_nouns", "noun\n", ": has no rows"),
    ("unseen_participant_ids_validation", "participant_id\nP01/x\n", ":2: participant_id")])
def test_the_lists_of_epic_subsets_hold_what_there_is(name, text, words, tmp_path):
    (tmp_path / "annotations").mkdir()
    for other, good in (("tail_verbs", "verb\n3\n3\n"), ("tail_nouns", "noun\n299\n"),
                        ("unseen_participant_ids_validation", "participant_id\nP18\n")):
        (tmp_path / "annotations" / f"EPIC_100_{other}.csv").write_text(good)
    assert replai.read_subsets(tmp_path) == ({3}, {299}, {"P18"})
    path = tmp_path / "annotations" / f"EPIC_100_{name}.csv"
    path.write_text(text)
    refused(lambda: replai.read_subsets(tmp_path), f"{path}{words}")


def test_an_id_that_numpy_would_cut_off_is_refused():
    fields = common.Fields("a.json", {"unique_id": "x\0", "parent_start_sec": 0,
                                      "parent_end_sec": 8})
    refused(lambda: replai.read_change(fields, False), "a.json.unique_id: 'x\\x00'")


def test_half_an_action_is_none(tmp_path):
    import test_ego4d
    entries = [test_ego4d.lta_entry("clip-t0", k, k, k + 2) for k in range(3)]
    for n, value in ((3, 1.0), (None, 1.5)):
        entries[1]["action_idx"] = value
        path = test_ego4d.write_clips(tmp_path, "fho_lta_train", entries)
        if n:
            assert len(replai.read_fho_actions(tmp_path, "train", (9, 9))[1].clip) == n
        else:
            refused(lambda: replai.read_fho_actions(tmp_path, "train", (9, 9)),
                    f"{path}: clips[1].action_idx: 1.5")


def test_moments_of_another_form_are_refused_with_what_to_do(tmp_path):
    args = replai.parse_args(["--data", str(tmp_path), "--moments", str(tmp_path), "--tiny"])
    good = {"file": "a.mp4", "bytes": 1, "prominence": 0.1, "segments": [[0.0, 10.0, [4.5, 5.0]]]}
    assert replai.SegmentIndex(args, [good]).peaks.tolist() == [4.5, 5.0]
    for segments in (None, 5, [5], [[0.0, 10.0]], [[0.0, 10.0, 5]], [["a", 10.0, [1.0]]],
                     [[0.0, 10.0, ["a"]]], [[0.0, float("nan"), [5.0]]], [[0.0, 10.0, [{}]]],
                     [[0.0, 10.0, [10 ** 400]]], [[0.0, float("inf"), [5.0]]]):
        refused(lambda s=segments: replai.SegmentIndex(args, [{**good, "segments": s}]),
                tmp_path / "moments.jsonl", "delete the file")
    (tmp_path / "moments.jsonl").write_text("[" * 200000 + "\n" + json.dumps(good) + "\n")
    assert list(replai.read_records(args).values()) == [good]


def test_lists_of_cpctrans_may_begin_with_a_byte_order_mark_and_are_not_empty(tmp_path):
    path = tmp_path / "clap_test_split1.txt"
    path.write_bytes(b"\xef\xbb\xbfFilm_clap_1.avi 1 \r\n\r\n")
    assert cpctrans.read_hmdb51_file(path) == [(1, "Film_clap_1", 1)]
    for text in (b"", b"\n \n"):
        path.write_bytes(text)
        refused(lambda: cpctrans.read_hmdb51_file(path), path, "is empty")
    path.write_bytes(b"1 Archery\n2 ../x\n")
    refused(lambda: cpctrans.read_classes(path), f"{path}:2: ")
    path.write_bytes(b"1 Archery\n2 Y\xe9\n")
    refused(lambda: cpctrans.read_classes(path), f"{path}:2: is not in UTF-8")


@pytest.mark.parametrize("files, stamps, frames", [
    ("a", "1 2", x) for x in ('"5"', "0", "-3", "1.5", "true", "[1]", "3000000000", "5, 6", "")] + [
    ("a", 5, "7"), (5, "1 2", "7")])
def test_numbers_of_pictures_that_are_none_are_refused(files, stamps, frames, tmp_path):
    path = tmp_path / "cpctrans_ucf101_frames.json"
    path.write_text(f'{{"x": {{"files": [{json.dumps(files)}], "stamps": [{json.dumps(stamps)}], '
                    f'"frames": [{frames}]}}}}')
    refused(lambda: cpctrans.counted.__wrapped__(path, 0), path, "delete it")


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"x": 5}', '{"x": {"files": []}}', "[" * 999])
def test_a_cache_of_numbers_that_is_of_another_form_is_refused(text, tmp_path):
    path = tmp_path / "cpctrans_ucf101_frames.json"
    path.write_text(text)
    refused(lambda: cpctrans.counted.__wrapped__(path, 0), path, "delete it")


def test_the_class_list_of_multithumos_is_in_order_and_holds_each_once(tmp_path):
    path = tmp_path / "class_list.txt"
    args = ssdet.parse_args(["--stage", "finetune", "--dataset", "multithumos", "--tiny", "--init",
                             "none", "--stream", "fine", "--data", str(tmp_path)])
    for text in ("1 Run\n2 Jump\n", "Run\nJump\n"):
        path.write_text(text)
        assert ssdet.class_names(args) == ["Run", "Jump"]
    for text in ("1 Run\n3 Jump\n", "1 Run\n2 Run\n", "Run\nRun\n", "1 Run\n 2 x Jump\n"):
        path.write_text(text)
        refused(lambda: ssdet.class_names(args), f"{path}:2: ")
    path.write_bytes(b"Run\nJu\0mp\n")
    refused(lambda: ssdet.class_names(args), f"{path}:2: holds a NUL byte")


def test_a_clip_of_kinetics_counts_once(tmp_path):
    clip = tmp_path / "train" / "yoga" / "abcdefghijk_000000_000010.mp4"
    clip.parent.mkdir(parents=True)
    clip.touch()
    args = ssdet.parse_args(["--data", str(tmp_path), "--tiny"])
    head, row = "label,youtube_id,time_start,time_end\n", "yoga,abcdefghijk,0,10\n"
    (tmp_path / "train.csv").write_text(head + row)
    assert ssdet.read_kinetics(args, "train")[1] == [f"yoga/{clip.name}"]
    (tmp_path / "train.csv").write_text(head + row + row)
    refused(lambda: ssdet.read_kinetics(args, "train"), tmp_path / "train.csv", "2 times")
    (tmp_path / "train.csv").write_text(head + row)
    (tmp_path / "kinetics_labels.txt").write_text("yoga\nyoga\n")
    refused(lambda: ssdet.read_kinetics(args, "train"), "kinetics_labels.txt", "2 times")


def test_unreadable_videos_of_features_are_a_list(tmp_path):
    for level in ssdet.LEVELS:
        (tmp_path / level).mkdir()
    (tmp_path / "about.json").write_text('{"unreadable": "AB"}')
    args = types.SimpleNamespace(features=tmp_path, stride=4)
    refused(lambda: ssdet.check_features(args, [ssdet.Video("A", "", 1.0, ())], ()),
            tmp_path / "about.json", "unreadable: is no list")


# ---- stages on folders in which files are broken ------------------------------------------------

def spoil(path):
    """As long and as old as it was, but nothing of a video: caches do not see it."""
    stat = path.stat()
    path.unlink()                                             # the link, not the world's
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return path


def test_the_linear_evaluation_trains_on_without_a_broken_video(epic, tmp_path):
    data = linked(epic, tmp_path / "data")
    train = set(replai.read_actions(epic, "train").video)
    path = spoil(next(p for p in sorted(data.glob("videos/*/*.MP4")) if p.stem in train))
    r = quick(tmp_path, *LINEAR, "--data", data, "--epochs", 1, "--out", tmp_path / "out")
    assert r.code == 0 and len(r.err.splitlines()) == 1, r
    assert re.match(rf"warning: {path}: .*; sample replaced", r.err)
    rows = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum(r["broken"] for r in rows) > 0


def test_videos_that_break_after_they_were_counted(ucf101, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(ucf101, data)
    flags = ("--tiny --net resnet10 --width 8 --heads 2 --img_dim 32 --crop 32 --batch_size 2 "
             "--epochs 1 --workers 0 --log_every 1 --limit 8").split()
    flags += ["--dataset", "ucf101", "--data", data, "--stage", "finetune", "--init", "none"]
    assert quick(tmp_path / "q", *flags, "--out", tmp_path / "one", script="cpctrans").code == 0
    args = cpctrans.parse_args([*map(str, flags), "--out", str(tmp_path / "one")])
    cpctrans.fill_from(args, None)
    train, val = (cpctrans.read_videos(args, part)[0] for part in ("train", "val"))
    path = spoil(Path(os.fsdecode(train.name[0])))
    r = quick(tmp_path / "q", *flags, "--out", tmp_path / "two", script="cpctrans")
    assert r.code == 0 and r.err.startswith(f"warning: {path}: ") and r.err.count("\n") == 1, r
    m = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert m["training_samples_broken"] >= 1
    path = spoil(Path(os.fsdecode(val.name[0])))
    r = quick(tmp_path / "q", *flags, "--out", tmp_path / "three", script="cpctrans")
    assert str(path) in one_error(types.SimpleNamespace(code=r.code, out=r.out, err="".join(
        x for x in r.err.splitlines(True) if not x.startswith("warning: "))))
    assert not (tmp_path / "three" / "metrics.json").exists()


def features_of(oops, folder):
    """Features of the toy Oops!, of noise: nothing is learnt from them here."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        for path in sorted((oops / "oops_video" / part).glob("*.mp4")):
            times, fps = common.clock(path)
            np.savez(folder / part / f"{path.stem}.npz", times=times, fps=fps,
                     arr_0=rng.standard_normal((len(times), 8)).astype(np.float32))
    return folder


def test_a_classifier_trains_on_without_broken_features_and_is_not_scored_without(oops, tmp_path):
    folder = features_of(oops, tmp_path / "features")
    flags = ("--tiny --workers 0 --log_every 1 --epochs 1 --stage classify --init none "
             "--batch_size 16").split() + ["--data", oops, "--features", folder]
    args = f2c_oops.parse_args(list(map(str, flags)))
    notes = f2c_oops.annotations(args)
    train, val = (f2c_oops.scan(args, part, notes) for part in ("train", "val"))
    z = dict(np.load(train[0].path))
    np.savez(train[0].path, **{**z, "arr_0": np.full_like(z["arr_0"], np.inf)})
    Path(train[1].path).write_bytes(b"PK\3\4")
    r = quick(tmp_path / "q", *flags, "--out", tmp_path / "one", script="f2c_oops")
    assert r.code == 0 and f"train: {len(train) - 1} of {len(train)} videos" in r.out, r
    assert r.err.startswith(f"warning: {train[0].path}: holds NaN or Inf; sample replaced")
    for spoilt in (z["arr_0"][:5].tobytes(), None):
        z = dict(np.load(val[0].path))
        if spoilt:
            Path(val[0].path).write_bytes(spoilt)
        else:
            np.savez(val[0].path, **{**z, "arr_0": np.full_like(z["arr_0"], np.nan)})
        r = quick(tmp_path / "q", *flags[:-4], "--batch_size", 16, "--data", oops, "--features",
                  folder, "--stage", "evaluate", "--init", tmp_path / "one" / "best.pt", "--out",
                  tmp_path / "two", script="f2c_oops")
        assert one_error(r).startswith(f"{val[0].path}: ")
        assert not (tmp_path / "two" / "metrics.json").exists()
        np.savez(val[0].path, **z)


def test_many_files_are_still_csv(tmp_path):
    names = ["a,b", 'say "x"', "é", " x "]
    f2c_oops.write_csv(tmp_path / "a.csv", [("filename",), *((n,) for n in names)])
    text = (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert [r[0] for r in csv.reader(io.StringIO(text, newline=""))] == ["filename", *names]
