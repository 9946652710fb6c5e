"""Ego4D's tasks in replai.py, from annotations to submissions; conversion of checkpoints."""

import functools
import itertools
import json
import math
import os
import random as dice
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import test_media
import parity_tools
import test_parity
import torch
import toy
from running import quick
from test_replai import PROBES, contents, linked, one_error, random, slow_top_k, state_of

import common
import replai
from common import UserError

VERBS, NOUNS = 7, 9                                           # classes of the small world
LENGTH = 252                                                  # pictures of each of its videos
STAGES = ("statechange", "recognition", "anticipation")
MINI = ("--tiny --crop 32 --width 8 --batch_size 4 --epochs 2 --workers 0 --log_every 1 "
        "--save_every 2 --num_frames 4 --limit 12").split()


# ---- a small world -----------------------------------------------------------------------------

def lta_entry(clip, i, start, stop, verb=0, noun=0):
    return {"video_uid": clip.replace("clip", "video"), "clip_uid": clip, "clip_id": 7,
            **toy.span("clip_parent", 10, 18.4), **toy.span("interval", 10, 18.4),
            **toy.span("action_clip", start, stop), "action_idx": i, "verb": "wash",
            "noun": "cup_(cup,_mug)", "verb_label": verb, "noun_label": noun}


def oscc_entry(video, k, start, stop, pnr=None, clip=None):
    """pnr, start, stop: frames of the video."""
    entry = {"clip_uid": clip, "clip_id": str(k), "unique_id": f"id-{video}-{k}",
             "video_uid": video, **toy.span("parent", start / 30, stop / 30)}
    if pnr is None:
        return entry | {"state_change": False, "pnr_frame": None}
    return entry | {"state_change": True, "parent_pnr_frame": pnr}


def write_clips(root, name, clips, wrap=True):
    path = root / "annotations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "v1", "split": "?", "clips": clips} if wrap else clips))
    return path


def read_clips(root, name):
    return json.loads((root / "annotations" / f"{name}.json").read_text())["clips"]


def without(entry, *keys):
    return {k: v for k, v in entry.items() if k not in keys}


@pytest.fixture(scope="module")
def ego(tmp_path_factory):
    """A dataset of 8.4 s videos whose pictures carry their numbers; one of each split is absent."""
    root, rng = tmp_path_factory.mktemp("ego") / "data", np.random.default_rng(0)
    toy.write_video(root / "clips" / "clip-t0.mp4",
                    (test_media.paint(k, 96, 64) for k in range(LENGTH)), 30)
    (root / "videos").mkdir()
    for name in ("videos/video-t0", "clips/clip-t1", "videos/video-t1", "clip-v0",
                 "videos/video-v0", "clips/clip-v1", "videos/video-v1", "clips/clip-x0",
                 "videos/video-x0"):
        os.link(root / "clips" / "clip-t0.mp4", root / f"{name}.mp4")
    for split, names in {"train": {"t0": 28, "t1": 28, "t2": 28}, "val": {"v0": 30, "v1": 28},
                         "test_unannotated": {"x0": 28, "x1": 28}}.items():
        lta = [lta_entry(f"clip-{name}", i, 0.17 * i, 0.17 * i + (3, 3.5, 1.2)[i % 3],
                         int(rng.integers(VERBS)), int(rng.integers(NOUNS)))
               for name, n in names.items() for i in range(n)]
        oscc = []
        for k, name in itertools.product(range(7), names):
            start, length = 2 * k, 215 if k == 3 else 238
            pnr = start + int(rng.integers(5, length - 5)) if k % 2 else None
            oscc.append(oscc_entry(f"video-{name}", k, start, start + length, pnr, f"clip-{name}"))
        if split == "test_unannotated":
            lta = [without(e, "verb", "noun", "verb_label", "noun_label") for e in lta]
            oscc = [without(e, "state_change", "pnr_frame", "parent_pnr_frame", "clip_uid")
                    for e in oscc]
        dice.Random(1).shuffle(lta)
        write_clips(root, f"fho_lta_{split}", lta)
        write_clips(root, f"fho_oscc-pnr_{split}", oscc)
    (root / "annotations" / "fho_lta_taxonomy.json").write_text(json.dumps(
        {"verbs": [f"v{i}" for i in range(VERBS)], "nouns": [f"n{i}" for i in range(NOUNS)]}))
    return root


def arguments(data, *more):
    return replai.parse_args([*MINI, "--data", str(data), *map(str, more)])


def only_videos(ego, tmp_path):
    """The small world without its annotations."""
    shutil.copytree(ego, tmp_path / "data", copy_function=os.link,
                    ignore=shutil.ignore_patterns("annotations"))
    return tmp_path / "data"


# ---- annotations -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["fho_lta_train", "train"])
@pytest.mark.parametrize("wrap", [True, False])
def test_actions_are_read_from_either_form_and_sorted_by_action_idx(name, wrap, tmp_path):
    rows = [lta_entry("clip-b", 2, 4, 6, 6, 8), lta_entry("clip-a", 1, 2, 5, 1, 2),
            lta_entry("clip-b", 0, 1, 3, 0, 0), without(lta_entry("clip-a", 0, 0, 2), "clip_id")]
    rows[3] = without(rows[3], "action_clip_start_sec", "action_clip_end_sec", "verb_label")
    rows[0]["noun_label"] = None
    write_clips(tmp_path, name, rows, wrap)
    path, a = replai.read_fho_actions(tmp_path, "train", (7, 9))
    assert path.stem == name
    assert a.clip.tolist() == ["clip-b", "clip-b", "clip-a", "clip-a"]    # clips as in the file
    assert a.index.tolist() == [0, 2, 0, 1]
    assert a.seconds.tolist() == [[1, 3], [4, 6], [0, 2], [2, 5]]
    assert a.verb.tolist() == [0, 6, -1, 1] and a.noun.tolist() == [0, -1, 0, 2]


@pytest.mark.parametrize("sizes", [(115, 478), (117, 521)])
def test_the_numbers_of_classes_come_from_the_taxonomy(sizes, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "fho_lta_taxonomy.json").write_text(json.dumps(
        dict(zip(("verbs", "nouns"), (["x"] * n for n in sizes)))))
    assert replai.read_taxonomy(tmp_path) == sizes
    with torch.device("meta"):
        model = replai.Recognition(num_classes=replai.read_taxonomy(tmp_path))
    assert [p.weight.shape[0] for p in model.head.projections] == list(sizes)


@pytest.mark.parametrize("name", ["fho_oscc-pnr_train", "train"])
@pytest.mark.parametrize("wrap", [True, False])
def test_state_changes_of_every_official_kind_are_read(name, wrap, ego, tmp_path, capsys):
    root = only_videos(ego, tmp_path)
    null = {**oscc_entry("video-t0", 3, 0, 240), "state_change": None}
    rows = [oscc_entry("video-t0", 0, 0, 240, 100), oscc_entry("video-t0", 1, 5, 245), null,
            without(oscc_entry("video-t0", 4, 0, 240, 9), "parent_pnr_frame"),
            oscc_entry("video-t0", 5, 10, 250, 251), without(oscc_entry("video-t0", 6, 0, 240),
                                                             "state_change", "clip_uid"),
            oscc_entry("video-gone", 8, 0, 240), oscc_entry("video-gone", 9, 0, 240),
            oscc_entry("video-lost", 10, 302, 540, 400),
            without(oscc_entry("video-t0", 11, 3, 240), "parent_start_frame", "parent_end_frame"),
            without(oscc_entry("video-t0", 12, 3, 240), "parent_start_sec", "parent_end_sec"),
            oscc_entry("video-t0", 0, 7, 240)]                # there twice: the first counts
    path = write_clips(root, name, rows, wrap)
    c = replai.read_changes(arguments(root, "--stage", "statechange"), "train")
    text = capsys.readouterr().out
    assert c.id.tolist() == [f"id-video-t0-{k}" for k in (0, 1, 3, 4, 5, 11, 12)]
    assert c.state.tolist() == [1, 0, 0, 1, 1, 0, 0]
    assert c.pnr.tolist() == [100, -1, -1, -1, -1, -1, -1]
    assert c.frames.tolist()[-2:] == [[3, 240], [3, 240]] and c.frames[0, 0] == 0
    np.testing.assert_allclose(c.seconds[-2:], [[0.1, 8.0]] * 2)
    assert (f"{name}.json: 8 of 12 clips; 1 are there twice; videos absent: 2 (video-gone, "
            "video-lost)\n") in text
    assert f"warning: {path}: 2 changes have no key frame in their clip" in text
    assert f"warning: {path}: 1 without labels are not used" in text
    c = replai.read_changes(arguments(root, "--stage", "statechange", "--compat", "released"),
                            "train")
    assert c.state.tolist() == [1, 0, 1, 1, 1, 0, 0]          # null counts as a change


def test_absent_videos_and_unlabelled_rows_are_counted_once(ego, tmp_path, capsys):
    d = replai.action_data(arguments(ego, "--stage", "recognition", "--limit", 99), "train")
    text = capsys.readouterr().out
    assert len(d) == 56 and text == (
        "fho_lta_train.json: 56 of 84 samples; videos absent: 1 (clip-t2)\n")
    root = only_videos(ego, tmp_path)
    shutil.copytree(ego / "annotations", root / "annotations")
    rows = read_clips(ego, "fho_lta_val")
    for e in rows[:3]:
        del e["verb_label"], e["noun_label"]
    rows.append({**rows[5], "verb_label": VERBS - 1})         # there twice
    write_clips(root, "fho_lta_val", rows)
    d = replai.action_data(arguments(root, "--stage", "recognition", "--limit", 99), "val")
    text = capsys.readouterr().out
    assert len(d) == 55 and "fho_lta_val.json: 3 without labels are not used" in text
    assert "fho_lta_val.json: 1 actions are there twice" in text
    at = d.ids().index(f"{rows[5]['clip_uid']}_{rows[5]['action_idx']}")
    assert d.verb[at] == rows[5]["verb_label"]
    rows = read_clips(ego, "fho_oscc-pnr_val")
    del rows[0]["state_change"], rows[5]["state_change"]
    write_clips(root, "fho_oscc-pnr_val", rows)
    d = replai.statechange_data(arguments(root, "--stage", "statechange", "--limit", 11), "val")
    assert len(d) == 11 and "pnr_val.json: 2 without labels are not" in capsys.readouterr().out
    for split, name, stage in itertools.product(
            ("train", "val"), ("fho_lta", "fho_oscc-pnr"), STAGES):
        rows = [without(e, "verb_label", "noun_label", "state_change")
                for e in read_clips(ego, f"{name}_{split}")]
        path = write_clips(root, f"{name}_{split}", rows)
        if (stage == "statechange") == ("oscc" in name):
            with pytest.raises(UserError, match=f"{path}: no .*label"):
                replai.TASKS[stage].data(arguments(root, "--stage", stage), split)


@pytest.mark.parametrize("stage", STAGES)
def test_test_videos_that_are_absent_cost_the_submission_and_no_more(stage, ego, tmp_path, capsys):
    root = only_videos(ego, tmp_path)
    shutil.copytree(ego / "annotations", root / "annotations")
    for f in (*root.rglob("*-x0.mp4"), *root.rglob("*-v?.mp4")):
        f.unlink()
    args = arguments(root, "--stage", stage)
    assert replai.TASKS[stage].data(args, replai.TEST) is None
    assert " 0 of " in capsys.readouterr().out
    with pytest.raises(UserError, match="_val.json: none of its videos is there"):
        replai.TASKS[stage].data(args, "val")


def put(key, value):
    """Change of the second entry."""
    def change(clips):
        clips[1][key] = value
        return clips
    return change


def drop(*keys):
    def change(clips):
        clips[1] = without(clips[1], *keys)
        return clips
    return change


def text(content):
    return lambda clips: content


LTA_FAULTS = {  # what is wrong: (change of the list of clips, what the message names)
    **{f"uid {name}": (put("clip_uid", uid), "clips[1].clip_uid: ") for name, uid in {
        "path": "../../x", "absolute": "/etc/passwd", "NUL": "clip\0", "long": "x" * 300,
        "emoji": "clip-\U0001f600", "number": 5, "null": None, "empty": "", "list": ["clip"],
        "line": "clip\nx", "dot": "."}.items()},
    "uid missing": (drop("clip_uid"), "clips[1].clip_uid: None"),
    **{f"index {v!r}": (put("action_idx", v), "clips[1].action_idx: ")
       for v in (None, math.nan, True, "3", [], 1e300)},
    **{f"verb {v!r}": (put("verb_label", v), "clips[1].verb_label: ")
       for v in (-1, VERBS, True, 1.5, "1", math.nan, {})},
    "noun too large": (put("noun_label", NOUNS), f"clips[1].noun_label: {NOUNS} "),
    **{f"end {v!r}": (put("action_clip_end_sec", v), "clips[1].action_clip_end_sec: ")
       for v in (math.nan, math.inf, "8", False, 0.1, -5)},
    "no times": (drop("action_clip_start_sec", "action_clip_start_frame"),
                 "clips[1].action_clip_start_frame: None"),
    "entry no object": (lambda c: [c[0], 5], "clips[1] is no object"),
    "entry null": (lambda c: [None], "clips[0] is no object"),
    "no entries": (lambda c: [], "no clips"),
    "a number": (text("5"), "list"), "clips null": (text('{"clips": null}'), "list"),
    "clips an object": (text('{"clips": {"a": 1}}'), "list"), "no clips": (text("{}"), "list"),
    "not JSON": (text("clip_uid,action_idx\n1,2\n"), ":1: not in JSON form"),
    "truncated": (text('{"version": "v1",\n"clips": [{"clip_uid": "a'), ":2: not in JSON form"),
    "empty file": (text(""), ":1: not in JSON form"),
    "not UTF-8": (text(b'{"clips": ["\xff\xfe'), "not in JSON form"),
    "deep": (text("[" * 200_000), "not in JSON form"),
    "long number": (text("[" + "9" * 5000 + "]"), "not in JSON form"),
}
OSCC_FAULTS = {
    "id missing": (drop("unique_id"), "clips[1].unique_id: None"),
    "id number": (put("unique_id", 5), "clips[1].unique_id: 5"),
    "video path": (put("video_uid", "../../x"), "clips[1].video_uid: "),
    "video null": (put("video_uid", None), "clips[1].video_uid: "),
    **{f"state {v!r}": (put("state_change", v), "clips[1].state_change: ")
       for v in ("true", 2, [], {}, math.nan)},
    **{f"key frame {v!r}": (put("parent_pnr_frame", v), "clips[1].parent_pnr_frame: ")
       for v in ("3", math.nan, True, [3])},
    "end before start": (put("parent_end_sec", 0.001), "clips[1].parent_end_sec: "),
    "no frames": (put("parent_end_frame", 3), "clips[1].parent_end_frame: 3"),
    "no seconds": (put("parent_start_sec", "0"), "clips[1].parent_start_sec: "),
    "no entries": (lambda c: [], "no clips"),
    "not a list": (text('"clips"'), "list"),
}
TAXONOMY_FAULTS = {
    "absent": (None, "no such file"), "no nouns": ('{"verbs": ["a"]}', "`nouns`"),
    "empty": ('{"verbs": [], "nouns": ["a"]}', "`verbs`"), "a list": ("[]", "`verbs`"),
    "an object": ('{"verbs": {"0": "a"}, "nouns": ["a"]}', "`verbs`"), "cut": ("{", "JSON")}


def faulty(ego, root, kind, name):
    """(path, words) of an annotation file with one fault among the good entries of the world."""
    if kind == "taxonomy":
        content, words = TAXONOMY_FAULTS[name]
        path = root / "annotations" / "fho_lta_taxonomy.json"
    else:
        change, words = {"lta": LTA_FAULTS, "oscc": OSCC_FAULTS}[kind][name]
        path = root / "annotations" / f"fho_{'lta' if kind == 'lta' else 'oscc-pnr'}_train.json"
        clips = {"lta": [lta_entry("clip-t0", i, i + 1, i + 4) for i in range(3)],
                 "oscc": [oscc_entry("video-t0", k, 2 + k, 240, 50 + k) for k in range(3)]}[kind]
        content = change(clips)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode() if
                         isinstance(content, str) else json.dumps({"clips": content}).encode())
    return path, words


ALL_FAULTS = [(kind, name) for kind, table in (
    ("lta", LTA_FAULTS), ("oscc", OSCC_FAULTS), ("taxonomy", TAXONOMY_FAULTS)) for name in table]


@pytest.mark.parametrize("kind, name", ALL_FAULTS)
def test_a_fault_in_an_annotation_names_file_and_key(kind, name, ego, tmp_path):
    root = only_videos(ego, tmp_path)
    path, words = faulty(ego, root, kind, name)
    read = {"lta": lambda: replai.read_fho_actions(root, "train", (VERBS, NOUNS)),
            "oscc": lambda: replai.read_changes(arguments(root, "--stage", "statechange"), "train"),
            "taxonomy": lambda: replai.read_taxonomy(root)}[kind]
    with pytest.raises(UserError) as e:
        read()
    message = str(e.value)
    assert message.startswith(str(path)) and words in message, message
    assert "\n" not in message and len(message) < 600 + len(str(path))


@pytest.mark.parametrize("stage, kind, name", [
    ("anticipation", "lta", "uid path"), ("recognition", "taxonomy", "absent"),
    ("statechange", "oscc", "state 'true'")])
def test_the_command_line_shows_a_fault_in_one_line(stage, kind, name, ego, tmp_path):
    root = only_videos(ego, tmp_path)
    shutil.copytree(ego / "annotations", root / "annotations")
    path, words = faulty(ego, root, kind, name)
    message = one_error(quick(tmp_path / "q", *MINI, "--stage", stage, "--data", root,
                              "--out", tmp_path / "out"))
    assert message.startswith(str(path)) and words in message


# ---- windows -----------------------------------------------------------------------------------

def slow_windows(clips, inputs, future, extra):
    rows = []
    for _, group in itertools.groupby(range(len(clips)), lambda i: clips[i]):
        own = list(group)
        for i in range(len(own) - inputs - future + extra):
            rows.append(own[i:i + inputs + future])
    return rows


@pytest.mark.parametrize("lengths", [[], [3], [24], [25], [24, 30, 25, 1, 26], [60]])
@pytest.mark.parametrize("extra", [False, True])
def test_windows_slide_over_the_actions_of_each_clip(lengths, extra):
    clips = np.array([f"c{n}" for n, k in enumerate(lengths) for _ in range(k)])
    got = replai.action_windows(clips, 4, 20, extra)
    want = slow_windows(clips.tolist(), 4, 20, extra)
    assert got.shape == (len(want), 24) and got.tolist() == want
    assert replai.action_windows(clips, 2, 3, extra).tolist() == slow_windows(
        clips.tolist(), 2, 3, extra)


def test_the_extra_window_is_one_per_clip_and_for_training_alone(ego):
    for split, plain, more in (("train", 8, 10), ("val", 10, 10), ("test_unannotated", 4, 4)):
        for flags, n in (([], plain), (["--extra_window"], more)):
            d = replai.action_data(arguments(ego, "--stage", "anticipation", *flags), split)
            assert len(d) == n, (split, flags)
    assert d.ids() == [f"clip-x0_{k}" for k in range(3, 7)]


# ---- the data path -----------------------------------------------------------------------------

@pytest.fixture
def unchanged(monkeypatch):
    """Pictures come as read, so that the numbers painted into them can be read."""
    monkeypatch.setattr(replai, "resize_crop_flip", lambda frames, *_: torch.from_numpy(frames))


def numbers(frames):
    return [test_media.number_of(f) for f in np.asarray(frames)]


def test_a_training_clip_lies_anywhere_inside_its_action(ego, unchanged):
    args = arguments(ego, "--stage", "recognition", "--crop", 112, "--num_frames", 32)
    d, shares = replai.action_data(args, "train"), []
    for epoch, i in itertools.product(range(6), (0, 1, 2, 4, 9, 11)):
        item = d[epoch, i]
        start, stop = d.actions.seconds[d.rows[i, 0]]
        got = numbers(item["clip"])
        assert start <= got[0] / 30 and np.diff(got).min() >= 1, got
        assert got == [got[0] + k for k in common.subsample(64, 32)]
        if stop - start > replai.ACTION_SECONDS:
            assert got[-1] / 30 < stop
            shares.append((got[0] / 30 - start) / (stop - start - replai.ACTION_SECONDS))
        else:                                                 # a short action: from its start on
            assert got[0] == math.ceil(30 * start - 1e-9)
        assert torch.equal(d[epoch, i]["clip"], item["clip"])
        r = d.rows[i, 0]
        assert (item["verb"], item["noun"]) == (d.actions.verb[r], d.actions.noun[r])
    assert min(shares) < 0.3 and max(shares) > 0.7 and len(set(shares)) > 10


@pytest.mark.parametrize("clips", [1, 3])
def test_evaluation_takes_the_centre_or_evenly_spaced_clips(clips, ego, unchanged):
    args = arguments(ego, "--stage", "recognition", "--crop", 112, "--num_frames", 32,
                     "--clips", clips)
    d = replai.TASKS["recognition"].for_test(args, replai.action_data(args, "val"))
    for i in (0, 1, 2, 7):
        start, stop = d.actions.seconds[d.rows[i, 0]]
        room = max(0, stop - start - replai.ACTION_SECONDS)
        assert len(d[i]) == clips
        for k, clip in enumerate(d[i]):
            first = math.ceil(30 * (start + room * (k + 0.5) / clips) - 1e-6)
            assert numbers(clip) == [first + j for j in common.subsample(64, 32)]
    args.clip = "random"
    assert torch.equal(d[0], d[0]) and d[0].shape[0] == clips


def test_an_action_that_overruns_the_file_ends_with_it(ego, unchanged):
    args = arguments(ego, "--stage", "recognition", "--crop", 112, "--num_frames", 32)
    d = replai.action_data(args, "val")
    d.actions.seconds[:] = [[7.5, 12.0]]
    views = replai.TASKS["recognition"].for_test(args, d)
    for clip in (d[0, 0]["clip"], d[1, 0]["clip"], views[0][0]):
        got = numbers(clip)
        assert got[-1] == LENGTH - 1 and min(got) >= LENGTH - 65 and -1 not in got


def test_the_clips_of_anticipation_come_from_its_four_actions_in_order(ego, unchanged):
    args = arguments(ego, "--stage", "anticipation", "--crop", 112, "--num_frames", 32)
    d = replai.action_data(args, "val")
    views = replai.TASKS["anticipation"].for_test(args, d)
    for i in (0, 4, 9):
        spans = d.actions.seconds[d.rows[i]]
        for clips, centred in ((d[0, i]["clip"], False), (views[i], True)):
            assert len(clips) == 4
            for clip, (start, stop) in zip(clips, spans):
                got = numbers(clip)
                assert start <= got[0] / 30 and (
                    got[-1] / 30 < stop or stop - start < replai.ACTION_SECONDS)
                room = max(0, stop - start - replai.ACTION_SECONDS)
                if centred:
                    assert got[0] == math.ceil(30 * (start + room / 2) - 1e-6)
        assert np.array_equal(d.verb[i], d.actions.verb[d.rows[i, -1] + 1:][:20])
        assert d.actions.index[d.rows[i]].tolist() == list(range(d.actions.index[d.rows[i, 0]],
                                                                 d.actions.index[d.rows[i, 0]] + 4))


def test_the_clips_of_a_sample_share_scale_crop_and_mirroring(ego, monkeypatch):
    ramp = (np.arange(96)[None, :, None] * 2 + np.arange(64)[:, None, None]).astype(np.uint8)
    still = np.broadcast_to(ramp, (4, 64, 96, 3)).copy()
    monkeypatch.setattr(common, "read_clip", lambda path, windows, side: [still] * len(windows))
    args = arguments(ego, "--stage", "anticipation")
    d, seen, mirrored = replai.action_data(args, "train"), set(), 0
    for epoch in range(40):
        clip = d[epoch, 0]["clip"]
        assert clip.shape == (4, 3, 4, 32, 32) and clip.dtype == torch.uint8
        assert (clip == clip[:1]).all()
        seen.add(clip[0].numpy().tobytes())
        mirrored += bool(clip[0, 0, 0, 0, 0] > clip[0, 0, 0, 0, -1])
    assert len(seen) > 35 and 10 < mirrored < 30
    d = replai.TASKS["anticipation"].for_test(args, d)
    assert d[0].shape == (4, 3, 4, 32, 32) and (d[0] == d[1]).all()


def test_state_pictures_are_exactly_the_frames_that_were_sampled(ego, unchanged):
    args = arguments(ego, "--stage", "statechange", "--crop", 225, "--num_frames", 16,
                     "--limit", 99)
    d = replai.statechange_data(args, "train")
    views = replai.TASKS["statechange"].for_test(args, d)
    assert {os.fsdecode(f) for f in d.changes.file} == {f"videos/video-t{k}.mp4" for k in (0, 1)}
    for i in range(7):
        want = replai.sample_frames(*d.changes.frames[i], 16)
        assert numbers(views[i]) == want.tolist()
        for epoch in (0, 1):
            part = d.part(np.random.default_rng((args.seed, epoch, i)), i)
            frames, item = replai.sample_frames(*part, 16), d[epoch, i]
            assert numbers(item["clip"]) == frames.tolist()
            assert item["state"] == (d.changes.pnr[i] >= 0) == item["has_keyframe"]
            if item["has_keyframe"]:
                gaps = [abs(f - d.changes.pnr[i]) for f in frames]
                assert item["keyframe"] == gaps.index(min(gaps))
            again = d[epoch, i]
            assert all(np.array_equal(again[k], item[k]) for k in item)


def test_a_random_part_keeps_the_key_frame_and_stays_inside(ego):
    args = arguments(ego, "--stage", "statechange", "--num_frames", 16)
    rng, lengths, starts = np.random.default_rng(3), [], []
    for seed in range(400):
        first = int(rng.integers(0, 5000))
        n = int(rng.choice([240, 239, 215, 120, 40, 17, 3]))
        pnr = int(rng.integers(first, first + n + 1)) if seed % 4 else -1
        changes = SimpleNamespace(frames=np.array([[first, first + n]]), pnr=np.array([pnr]),
                                  seconds=np.array([[first, first + n]]) / 30)
        d = replai.StateClips(args, changes)
        start, stop = d.part(np.random.default_rng((0, seed, 0)), 0)
        assert first <= start + 1 and start < stop <= first + n, (seed, first, n)
        assert pnr < 0 or start <= pnr <= stop
        assert (start, stop) == d.part(np.random.default_rng((0, seed, 0)), 0)
        frames = replai.sample_frames(start, stop, 16)
        assert len(frames) == 16 and (start <= frames).all() and (frames < stop).all()
        if n == 240 and pnr < 0:
            lengths.append(stop - start)
            starts.append(start - first)
    assert 149 <= min(lengths) < 170 and 220 < max(lengths) <= 241 and max(starts) > 20


@pytest.mark.parametrize("start, stop", [(0, 240), (17, 257), (305, 520), (7, 22), (100, 116),
                                         (31, 62), (0, 250)])
def test_sampled_frames_are_multiples_of_a_step(start, stop):
    n, want = stop - start, None
    for step in (math.ceil(n / 16), max(1, n // 16)):
        fit = [f for f in range(start, stop) if f % step == 0]
        if want is None and len(fit) >= 16:
            want = fit[:16]
    got = replai.sample_frames(start, stop, 16).tolist()
    assert got == (want or (fit * 16)[:16])


# ---- losses ------------------------------------------------------------------------------------

def cross_entropy(logits, label):
    e = [math.exp(x) for x in logits]
    return -math.log(e[label] / sum(e))


def labels(*shape, n, seed=0):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


def test_recognition_adds_the_cross_entropies_of_verb_and_noun():
    verb, noun, y, z = random(5, 7), random(5, 9, seed=1), labels(5, n=7), labels(5, n=9)
    got = replai.recognition_losses((verb, noun), {"verb": y, "noun": z})
    for kind, x, t in (("verb", verb, y), ("noun", noun, z)):
        want = sum(cross_entropy(a, b) for a, b in zip(x.tolist(), t.tolist())) / 5
        assert got[kind].item() == pytest.approx(want, rel=1e-5)


def test_anticipation_sums_over_the_actions_to_come_and_averages_over_the_batch():
    verb, noun = random(3, 20, 7), random(3, 20, 9, seed=1)
    y, z = labels(3, 20, n=7), labels(3, 20, n=9, seed=1)
    got = replai.anticipation_losses((verb, noun), {"verb": y, "noun": z})
    want = sum(cross_entropy(verb[b, s].tolist(), int(y[b, s])) + cross_entropy(
        noun[b, s].tolist(), int(z[b, s])) for b in range(3) for s in range(20)) / 3
    assert sum(got.values()).item() == pytest.approx(want, rel=1e-5)
    assert want > 40                                          # 40 terms of about ln 8


@pytest.mark.parametrize("state, has", [
    ([1, 0, 1, 0], [1, 0, 1, 0]), ([1, 1, 1, 0], [1, 0, 1, 1]), ([0, 0, 0, 0], [0, 0, 0, 0])])
def test_the_key_frame_counts_for_changes_and_is_averaged_over_all_clips(state, has):
    keyframe, logits, at = random(4, 1, 16), random(4, 2, 1, seed=1), labels(4, n=16)
    batch = {"state": torch.tensor(state), "keyframe": at, "has_keyframe": torch.tensor(has) > 0}
    got = replai.statechange_losses((keyframe, logits), batch)
    want = sum(s * k * cross_entropy(x[0].tolist(), int(a))
               for s, k, x, a in zip(state, has, keyframe, at)) / 4
    assert got["keyframe"].item() == pytest.approx(want, rel=1e-5)
    want = sum(cross_entropy(x[:, 0].tolist(), s) for s, x in zip(state, logits)) / 4
    assert got["state"].item() == pytest.approx(want, rel=1e-5)


# ---- metrics -----------------------------------------------------------------------------------

def levenshtein(a, b):
    @functools.lru_cache(None)
    def d(i, j):
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))
    return d(len(a), len(b))


def slow_ed(pred, label, z):
    """pred: (N, Z, K)    mean over N of the least distance of the first z, / z"""
    return np.mean([min(levenshtein(p[:z, k].tolist(), y[:z].tolist()) for k in range(p.shape[1]))
                    for p, y in zip(pred, label)]) / z


@pytest.mark.parametrize("n, length, k, classes", [(1, 1, 1, 2), (3, 5, 1, 2), (4, 20, 5, 4),
                                                   (2, 20, 3, 100)])
def test_edit_metrics_equal_slow_ones(n, length, k, classes):
    rng = np.random.default_rng(n)
    label = rng.integers(classes, size=(n, length))
    pred = np.where(rng.random((n, length, k)) < 0.5, np.roll(label, 1, 1)[..., None],
                    rng.integers(classes, size=(n, length, k)))
    got = replai.edit_distances(pred, label)
    assert got.shape == (n, length, k)
    for i, z, j in itertools.product(range(n), range(length), range(k)):
        assert got[i, z, j] == levenshtein(pred[i, :z + 1, j].tolist(), label[i, :z + 1].tolist())
    ed, area = replai.edit_metrics(pred, label)
    want = [slow_ed(pred, label, z) for z in range(1, length + 1)]
    np.testing.assert_allclose(ed, want, rtol=1e-12)
    assert area == pytest.approx(np.trapezoid(want, dx=1) / max(1, length - 1))


def test_a_swap_costs_two_and_an_action_needs_both_words():
    label = np.arange(20)[None]
    swapped = label.copy()
    swapped[0, [0, 1]] = 1, 0
    assert replai.edit_distances(swapped[..., None], label)[0, :3, 0].tolist() == [1, 2, 2]
    both = SimpleNamespace(verb=label, noun=label)
    verb = np.stack([label, label + 100], 2)                  # future 0 has the verbs, 1 the nouns
    noun = np.stack([label + 100, label], 2)
    m = replai.anticipation_metrics(both, both, verb.astype(np.float32), noun.astype(np.float32))
    assert (m["verb ED@20"], m["noun ED@20"], m["action ED@20"]) == (0, 0, 1)
    assert (m["verb AUED"], m["action AUED"]) == (0, 1)
    rng = np.random.default_rng(0)                            # all pairs of classes stay apart
    both = SimpleNamespace(verb=rng.integers(115, size=(99, 20)),
                           noun=rng.integers(478, size=(99, 20)))
    m = replai.anticipation_metrics(both, both, *(
        x[..., None].astype(np.float32) for x in (both.verb, both.noun)))
    assert (m["action ED@20"], m["action AUED"]) == (0, 0)


def test_recognition_metrics_equal_slow_ones():
    rng = np.random.default_rng(0)
    verb, noun = rng.normal(size=(30, 7)), rng.normal(size=(30, 9))
    val = SimpleNamespace(verb=rng.integers(3, size=30), noun=rng.integers(3, size=30))
    train = SimpleNamespace(verb=np.array([0, 2, 2]), noun=np.array([1, 1, 0]))
    m = replai.recognition_metrics(train, val, verb, noun)
    for kind, x, y in (("verb", verb, val.verb), ("noun", noun, val.noun)):
        for k in (1, 5):
            assert m[f"{kind}@{k}"] == pytest.approx(slow_top_k(x.tolist(), y.tolist(), k))
    assert m["verb@1 of prior"] == pytest.approx(100 * sum(y == 2 for y in val.verb) / 30)
    assert m["noun@1 of prior"] == pytest.approx(100 * sum(y == 1 for y in val.noun) / 30)
    pairs = (verb.argmax(1) == val.verb) & (noun.argmax(1) == val.noun)
    assert m["action@1"] == pytest.approx(100 * pairs.mean())


def changes_of(rows):
    """rows: (start, stop, state, pnr)"""
    start, stop, state, pnr = map(np.array, zip(*rows))
    frames = np.stack([start, stop], 1)
    return SimpleNamespace(changes=SimpleNamespace(
        id=np.arange(len(rows)).astype(str), frames=frames, seconds=frames / 30 + [0.0, 0.01],
        state=state, pnr=pnr))


def slow_state_metrics(c, keyframe, state):
    hits, errors = [], []
    for i in range(len(c.id)):
        hits.append(int(state[i][1] > state[i][0]) == c.state[i])
        if c.state[i] == 1 and c.pnr[i] >= 0:
            best = max(range(len(keyframe[i])), key=lambda k: (keyframe[i][k], -k))
            (start, stop), (begin, end) = c.frames[i], c.seconds[i]
            fps = (stop - start + 1) / (end - begin)
            errors.append(abs(best * (stop - start) / len(keyframe[i]) - (c.pnr[i] - start)) / fps)
    return 100 * sum(hits) / len(hits), sum(errors) / len(errors) if errors else None


def test_state_metrics_equal_slow_ones_and_the_first_of_a_tie_counts():
    rng = np.random.default_rng(0)
    rows = [(s, s + 200 + int(rng.integers(41)), i % 2,
             s + int(rng.integers(200)) if i % 2 and i > 2 else -1)
            for i, s in enumerate(rng.integers(0, 900, 21).tolist())]
    d = changes_of(rows)
    keyframe, state = rng.integers(0, 3, (21, 16)).astype(float), rng.integers(0, 2, (21, 2))
    m = replai.statechange_metrics(d, d, keyframe, state)
    accuracy, error = slow_state_metrics(d.changes, keyframe, state)
    assert m["StCC acc"] == pytest.approx(accuracy) and m["PNR err (s)"] == pytest.approx(error)
    assert m["StCC acc of prior"] == pytest.approx(100 * 11 / 21)
    best = min(slow_state_metrics(d.changes, np.tile(np.eye(16)[k], (21, 1)), state)[1]
               for k in range(16))
    assert m["PNR err (s) of prior"] == pytest.approx(best)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("train, val", [(0, 1), (1, 0), (0, 0)])
def test_without_changes_there_is_no_key_frame_error_and_no_crash(train, val):
    def data(change):
        return changes_of([(0, 240, change, 99 if change else -1), (0, 240, 0, -1)])
    m = replai.statechange_metrics(data(train), data(val), np.ones((2, 16)), np.ones((2, 2)))
    assert (m["PNR err (s)"] is None) == (not val)
    json.dumps(m, allow_nan=False)


def test_futures_are_drawn_from_the_softmax_by_seed_and_item():
    logits = random(3, 20, 6) * 2
    assert torch.equal(replai.draw_futures(logits, 1, (0, 0), [4, 5, 6]), logits.argmax(-1, True))
    assert replai.draw_futures(torch.zeros(1, 2, 3), 1, (0, 0), [0]).tolist() == [[[0], [0]]]
    five = replai.draw_futures(logits, 5, (0, 0), [4, 5, 6])
    assert five.shape == (3, 20, 5)
    for items in ([5], [9, 5], [5, 4]):                       # whatever group an item is in
        own = items.index(5)
        x = torch.stack([logits[1]] * len(items))
        assert torch.equal(replai.draw_futures(x, 5, (0, 0), items)[own], five[1])
    assert not torch.equal(replai.draw_futures(logits, 5, (1, 0), [4, 5, 6]), five)
    assert not torch.equal(replai.draw_futures(logits, 5, (0, 1), [4, 5, 6]), five)
    n = 4000
    drawn = replai.draw_futures(logits[:1, :3], n, (0, 0), [0])[0]
    for counts, p in zip([torch.bincount(r, minlength=6) for r in drawn], logits[0].softmax(-1)):
        assert ((counts - n * p) ** 2 / (n * p)).sum() < 25   # chi-square, 5 degrees: 1 in 7000


# ---- model -------------------------------------------------------------------------------------

def meta(*shape):
    return torch.empty(shape, device="meta")


def size_of(model, trained=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def test_recognition_has_the_names_and_the_size_of_the_forecasting_tools():
    with torch.device("meta"):
        model = replai.Recognition()
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    trunk = {k: tuple(v.shape) for k, v in common.R2Plus1D().state_dict().items()}
    assert size_of(model) == 15_683_345
    assert {k: s for k, s in own.items() if k not in trunk} == {
        "head.projections.0.weight": (115, 512), "head.projections.0.bias": (115,),
        "head.projections.1.weight": (478, 512), "head.projections.1.bias": (478,)}
    assert [tuple(x.shape) for x in model(meta(2, 3, 32, 224, 224))] == [(2, 115), (2, 478)]


@pytest.mark.parametrize("kind, features", [("transformer", 2048), ("concat", 8192),
                                            ("mean", 2048)])
def test_anticipation_has_the_names_and_the_size_of_the_forecasting_tools(kind, features):
    with torch.device("meta"):
        model = replai.Anticipation(aggregator=kind).eval()
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    trunk = common.R2Plus1D().state_dict()
    assert {f"backbone.{k}" for k in trunk} <= set(own)
    assert own["backbone.head.projection.weight"] == (2048, 512)
    heads = [k for k in own if k.startswith("decoder.")]
    assert set(heads) == {f"decoder.head.projections.{k}.{w}" for k in range(20)
                          for w in ("weight", "bias")}
    assert own["decoder.head.projections.19.weight"] == (593, features)
    rest = {k for k in own if k.startswith("clip_aggregator.")}
    assert len(own) == len(trunk) + 2 + 40 + len(rest)
    if kind == "transformer":
        assert round(size_of(model) / 1e4) == 19185 and round(size_of(model, True) / 1e4) == 17647
        assert own["clip_aggregator.pos_encoder.pe"] == (1000, 1, 2048)
        assert {k.split(".")[3] for k in rest if ".layers." in k} == set("012345")
        assert own["clip_aggregator.encoder.norm.weight"] == (2048,)
        assert own["clip_aggregator.encoder.layers.0.linear1.weight"] == (2048, 2048)
    else:
        assert not rest
    out = model(meta(2, 4, 3, 32, 224, 224))
    assert [tuple(x.shape) for x in out] == [(2, 20, 115), (2, 20, 478)]
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"backbone.{k}" for k, _ in common.R2Plus1D().named_parameters()}


def test_state_change_keeps_sixteen_pictures_sixteen():
    with torch.device("meta"):
        model = replai.StateChange()
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert {k: s for k, s in own.items() if not k.startswith("backbone.")} == {
        "Keyframe_localisation_head.projection.weight": (1, 2048),
        "Keyframe_localisation_head.projection.bias": (1,),
        "State_detection_head.projection.weight": (2, 2048),
        "State_detection_head.projection.bias": (2,)}
    x = meta(2, 3, 16, 225, 225)
    assert tuple(model.backbone(x).shape) == (2, 512, 16, 8, 8)
    assert [tuple(y.shape) for y in model(x)] == [(2, 1, 16), (2, 2, 1)]
    assert set(own) - {k for k in own if "_head." in k} == {
        f"backbone.{k}" for k in common.R2Plus1D().state_dict()}


def small_anticipation(**how):
    torch.manual_seed(0)
    return replai.Anticipation(8, 10, (VERBS, NOUNS), features=32, layers=1, heads=4, **how)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_frozen_trunk_stays_and_legacy_batch_norm_moves(legacy):
    model = small_anticipation(legacy_bn=legacy).train()
    before = state_of(model)
    assert model.backbone.head.training and model.clip_aggregator.training
    optimizer = replai.optimizer_of(replai.parse_args(["--stage", "anticipation"]), model)
    assert isinstance(optimizer, torch.optim.Adam)
    for step in range(3):
        out = model(random(2, 4, 3, 4, 32, 32, seed=step))
        sum(replai.anticipation_losses(out, {"verb": labels(2, 20, n=7),
                                             "noun": labels(2, 20, n=9)}).values()).backward()
        optimizer.step()
    for k, v in model.state_dict().items():
        still = k.startswith("backbone.") and ".head." not in k or k.endswith(".pe")
        moving = legacy and k.split(".")[-1] in (
            "running_mean", "running_var", "num_batches_tracked") and "tmp_bn2" not in k
        assert torch.equal(v, before[k]) == (still and not moving), k
    model.eval()
    assert not any(m.training for m in model.modules())


def test_pixels_are_normalised_as_each_task_expects():
    clip = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 4, 8, 8)
    got = replai.pixels(replai.parse_args(["--stage", "recognition"]), clip)
    np.testing.assert_allclose(got, (clip.double() / 255 - 0.45) / 0.225, atol=1e-5)
    got = replai.pixels(replai.parse_args(["--stage", "anticipation"]), clip[None])
    np.testing.assert_allclose(got[0], (clip.double() / 255 - 0.45) / 0.225, atol=1e-5)
    got = replai.pixels(replai.parse_args(["--stage", "statechange"]), clip)
    for c, (mean, std) in enumerate(((.485, .229), (.456, .224), (.406, .225))):
        np.testing.assert_allclose(got[:, c], (clip[:, c].double() / 255 - mean) / std, atol=1e-5)
    for flag in (["--raw_pixels"], ["--compat", "released"]):
        got = replai.pixels(replai.parse_args(["--stage", "statechange", *flag]), clip)
        assert torch.equal(got, clip.float())


@pytest.mark.parametrize("stage", ["recognition", "statechange"])
def test_parameters_named_bn_do_not_decay_and_the_stem_does(stage):
    args = replai.parse_args(["--stage", stage])
    with torch.device("meta"):
        model = (replai.Recognition if stage == "recognition" else replai.StateChange)()
    optimizer = replai.optimizer_of(args, model)
    name = {id(p): k for k, p in model.named_parameters()}
    decayed, free = ({name[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0]
    assert all(g["nesterov"] and g["momentum"] == 0.9 for g in optimizer.param_groups)
    assert decayed | free == set(name.values()) and free == {k for k in name.values() if "bn" in k}
    assert {k.removeprefix("backbone.") for k in decayed} >= {"conv1.1.weight", "conv1.1.bias"}


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    assert [replai.cosine(2.0, s, 10) for s in (0, 5, 10)] == pytest.approx([2, 1, 0])
    rates = [replai.warmup_cosine(0.01, s, 1000, 5000) for s in range(5001)]
    assert rates[0] == 0 and rates[500] == pytest.approx(0.005) and rates[1000] == 0.01
    assert rates[3000] == pytest.approx(0.005) and rates[5000] == pytest.approx(0)
    steps = np.diff(rates)
    assert (steps[:1000] > 0).all() and (steps[1000:] < 0).all()


@pytest.mark.parametrize("flags, want", [
    ("recognition", {"epochs": 30, "batch_size": 32, "lr": 0.01, "weight_decay": 1e-4,
                     "num_frames": 32, "crop": 224}),
    ("anticipation", {"epochs": 50, "batch_size": 32, "lr": 0.01, "samples": 5,
                      "aggregator": "transformer", "extra_window": False, "num_frames": 32}),
    ("statechange", {"epochs": 100, "batch_size": 256, "lr": 1e-4, "weight_decay": 1e-4,
                     "num_frames": 16, "crop": 225, "pnr_frame": "absolute", "groups": 8})])
def test_defaults_are_those_of_the_published_recipe(flags, want, monkeypatch, capsys):
    args = vars(replai.parse_args(["--stage", flags]))
    assert {k: args[k] for k in want} == want
    assert args["init"] == "runs/replai_ego4d_pretrain/last.pt"
    with pytest.raises(SystemExit) as e:
        replai.parse_args(["--stage", flags, "--dataset", "epic"])
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 1 and "--dataset ego4d" in lines[0]


# ---- whole runs --------------------------------------------------------------------------------

OUTPUTS = {"statechange": {"oscc", "pnr"}, "recognition": {"outputs"}, "anticipation": {"outputs"}}


def flags_of(stage, data, *more):
    return [*MINI, "--stage", stage, "--data", data, *more]


@pytest.fixture(scope="module")
def done(ego, tmp_path_factory):
    """done(stage, n) -> folder of a run to the end on n processes, made once for all tests."""
    @functools.lru_cache(None)
    def run(stage, n=1):
        folder = tmp_path_factory.mktemp(f"{stage}{n}")
        r = quick(folder, *flags_of(stage, ego), "--out", folder / "out", n=n)
        assert r.code == 0 and r.err == "", r
        return folder / "out"
    return run


def model_of(path):
    return torch.load(path, weights_only=True)["model"]


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_what_is_promised(stage, done):
    out, task = done(stage), replai.TASKS[stage]
    files = {f"{name}{end}.json" for name in OUTPUTS[stage] for end in ("", "_val")}
    assert set(contents(out)) == files | {"args.json", "log.jsonl", "last.pt", "best.pt",
                                          "metrics.json", "curve.png"}
    rows = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    per_epoch = 2 if stage == "anticipation" else 3
    assert [(r["epoch"], r["step"]) for r in rows] == [
        (k // per_epoch, k) for k in range(2 * per_epoch)]
    args = vars(arguments(out, "--stage", stage))
    for r in rows:
        assert set(r) - {task.best} == {"stage", "epoch", "step", "loss", *task.terms, "lr",
                                        "broken", "clips_per_s", "data_wait", "eta_s"}
        assert r["loss"] == pytest.approx(sum(r[k] for k in task.terms), rel=1e-4)
        assert r["lr"] == pytest.approx(replai.cosine(args["lr"], r["step"], len(rows)), rel=1e-4)
        assert (task.best in r) == ((r["step"] + 1) % per_epoch == 0)
    best = [r[task.best] for r in rows if task.best in r]
    kept = torch.load(out / "best.pt", weights_only=True)
    chosen = max(range(2), key=lambda k: (task.sign * best[k], -k))
    assert kept["step"] == per_epoch * (chosen + 1) and set(kept) == {
        "model", "step", "args", "versions"}
    assert metrics_of(out)[task.best] == pytest.approx(best[chosen], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_same_bits_as_one(stage, done):
    one, two = (contents(done(stage, n)) for n in (1, 2))
    for name in one:
        if name.endswith(".json") and name != "args.json":
            assert one[name] == two[name], name
    for name in ("best.pt", "last.pt"):
        a, b = (model_of(done(stage, n) / name) for n in (1, 2))
        for k in a:
            assert torch.equal(a[k], b[k]) or k.endswith("num_batches_tracked"), (name, k)
    logs = [[json.loads(x) for x in f["log.jsonl"].decode().splitlines()] for f in (one, two)]
    assert [r["loss"] for r in logs[0]] == pytest.approx([r["loss"] for r in logs[1]], rel=1e-5)


KILLS = {("statechange", 1): [("step", 2), ("torn:best.pt", 1), ("torn:pnr_val.json", 1)],
         ("statechange", 2): [("renamed", 4), "outside"],
         ("recognition", 1): [("torn", 2), ("line", 2), ("torn:metrics.json", 1)],
         ("recognition", 2): [("step", 2), ("torn", 2)],
         ("anticipation", 1): [("torn:best.pt", 1), ("step", 1), "outside"],
         ("anticipation", 2): [("torn", 3), ("torn:outputs.json", 1)]}


@pytest.mark.parametrize("stage, n", KILLS)
def test_a_killed_run_ends_in_the_same_bytes(stage, n, done, ego, tmp_path):
    whole, out, killed = contents(done(stage, n)), tmp_path / "out", 0
    flags = [*flags_of(stage, ego), "--out", out, "--save_every", 1]
    flags += ["--workers", 2] if (stage, n) == ("anticipation", 1) else []
    for kill in KILLS[stage, n]:
        how = {"die": kill}
        if kill == "outside":                                 # other moments in every test run
            how = {"kill": (out / "log.jsonl", 2, np.random.default_rng().uniform(0, 0.1))}
        r = quick(tmp_path / "q", *flags, n=n, **how)
        assert r.code == -9 or kill == "outside", (kill, r)
        killed += r.code == -9
    r = quick(tmp_path / "q", *flags, n=n)
    assert r.code == 0 and "continuing" in r.out and killed >= len(KILLS[stage, n]) - 1, r
    own = contents(out)
    assert set(own) == set(whole)
    for name in set(whole) - {"args.json", "log.jsonl", "curve.png"}:
        assert own[name] == whole[name], f"{name} differs"
    a, b = ([json.loads(x) for x in f["log.jsonl"].decode().splitlines()] for f in (whole, own))
    assert [(r["step"], r["loss"], r["lr"]) for r in a] == [
        (r["step"], r["loss"], r["lr"]) for r in b]
    if (stage, n) == ("recognition", 1):                      # finished, and started once more
        r = quick(tmp_path / "q", *flags)
        again = contents(out)
        assert r.code == 0 and all(again[k] == own[k] for k in own if k != "curve.png")


@pytest.fixture(scope="module")
def untested(ego, tmp_path_factory):
    """The small world without its test split."""
    root = only_videos(ego, tmp_path_factory.mktemp("untested"))
    shutil.copytree(ego / "annotations", root / "annotations",
                    ignore=shutil.ignore_patterns("*test*"))
    return root


SWITCHES = ["statechange --compat released --pnr_frame relative",
            "statechange --raw_pixels --groups 4",
            "recognition --compat released --clips 2 --groups 4 --crop 40",
            "recognition --clip random --depth 18",
            "anticipation --legacy_bn --extra_window --aggregator mean",
            "anticipation --samples 1 --aggregator concat --clip random"]


@pytest.mark.parametrize("flags", SWITCHES)
def test_every_switch_runs_and_without_a_test_file_nothing_is_submitted(flags, untested, tmp_path):
    stage, *more = flags.split()
    out = tmp_path / "out"
    r = quick(tmp_path, *flags_of(stage, untested, *more), "--epochs", 1, "--out", out)
    assert r.code == 0 and r.err == "", r
    assert {p.name for p in out.glob("*.json")} == {
        "args.json", "metrics.json", *(f"{name}_val.json" for name in OUTPUTS[stage])}
    sent = json.loads((out / f"{max(OUTPUTS[stage])}_val.json").read_text())
    if "--samples 1" in flags:
        assert {len(s[k]) for s in sent.values() for k in s} == {1}
    if "relative" in flags:
        assert all(0 <= s["pnr_frame"] < 238 for s in sent)
    if "--legacy_bn" in flags:                                # the trunk's statistics have moved
        torch.manual_seed(0)
        fresh = replai.TASKS[stage].model(arguments(untested, "--stage", stage, *more))
        for k, v in model_of(out / "last.pt").items():
            if k.startswith("backbone.c") and "tmp_bn2" not in k:
                assert torch.equal(v, fresh.state_dict()[k]) == (
                    k.endswith(("weight", "bias"))), k


def test_the_frozen_trunk_of_a_run_is_what_it_began_with(done, ego):
    torch.manual_seed(0)
    fresh = replai.TASKS["anticipation"].model(arguments(ego, "--stage", "anticipation"))
    for k, v in model_of(done("anticipation") / "last.pt").items():
        frozen = k.startswith("backbone.c") or k.endswith(".pe")
        assert torch.equal(v, fresh.state_dict()[k]) == frozen, k


def windows_of(ego, split, inputs=4, future=20):
    """{name of a window: the future entries}, in the challenge's order, from the raw file."""
    clips = {}
    for e in read_clips(ego, f"fho_lta_{split}"):
        clips.setdefault(e["clip_uid"], []).append(e)
    found = {}
    for uid, entries in clips.items():
        entries.sort(key=lambda e: e["action_idx"])
        for i in range(len(entries) - inputs - future):
            last = entries[i + inputs - 1]["action_idx"]
            found[f"{uid}_{last}"] = entries[i + inputs:i + inputs + future]
    return found


def test_the_anticipation_submission_has_the_official_form(done, ego):
    for name, split in (("outputs", "test_unannotated"), ("outputs_val", "val")):
        sent = json.loads((done("anticipation") / f"{name}.json").read_text())
        assert set(sent) == set(windows_of(ego, split))       # those of absent clips, too
        for s in sent.values():
            assert set(s) == {"verb", "noun"}
            for kind, n in (("verb", VERBS), ("noun", NOUNS)):
                assert [len(x) for x in s[kind]] == [20] * 5
                assert all(type(x) is int and 0 <= x < n for row in s[kind] for x in row)
    sent = json.loads((done("anticipation") / "outputs.json").read_text())
    filled = [s for name, s in sent.items() if name.startswith("clip-x1_")]
    assert len(filled) == 4 and all(s == filled[0] for s in filled)
    assert len({json.dumps(s) for s in sent.values()}) == 5


def test_the_anticipation_metrics_follow_from_the_submitted_futures(done, ego):
    sent = json.loads((done("anticipation") / "outputs_val.json").read_text())
    truth, m = windows_of(ego, "val"), metrics_of(done("anticipation"))
    kinds = {"verb": lambda s: [s["verb"]], "noun": lambda s: [s["noun"]],
             "action": lambda s: [s["verb"], s["noun"]]}
    for kind, parts in kinds.items():
        keys = {"verb": ["verb"], "noun": ["noun"], "action": ["verb", "noun"]}[kind]
        ed = []
        for z in range(1, 21):
            each = []
            for name, s in sent.items():
                future = [tuple(e[f"{k}_label"] for k in keys) for e in truth[name]][:z]
                each.append(min(levenshtein(list(zip(*(row[:z] for row in rows))), future)
                                for rows in zip(*parts(s))) / z)
            ed.append(np.mean(each))
        assert m[f"{kind} ED@20"] == pytest.approx(ed[-1], abs=1e-12)
        assert m[f"{kind} AUED"] == pytest.approx(np.trapezoid(ed) / 19, abs=1e-12)
        assert 0 < m[f"{kind} ED@20 of prior"] <= 1


def test_the_recognition_metrics_follow_from_the_submitted_classes(done, ego):
    for name, split in (("outputs", "test_unannotated"), ("outputs_val", "val")):
        sent = json.loads((done("recognition") / f"{name}.json").read_text())
        truth = {f"{e['clip_uid']}_{e['action_idx']}": e
                 for e in read_clips(ego, f"fho_lta_{split}")}
        assert len(sent) == 12 and set(sent) <= set(truth)
        for s in sent.values():
            for kind, n in (("verb", VERBS), ("noun", NOUNS)):
                assert len(set(s[kind])) == 5 and set(s[kind]) <= set(range(n))
    m = metrics_of(done("recognition"))
    hits = {(kind, k): np.mean([truth[i][f"{kind}_label"] in s[kind][:k] for i, s in sent.items()])
            for kind in ("verb", "noun") for k in (1, 5)}
    assert {f"{kind}@{k}": m[f"{kind}@{k}"] for kind, k in hits} == pytest.approx(
        {f"{kind}@{k}": 100 * v for (kind, k), v in hits.items()})
    assert m["action@1"] == pytest.approx(100 * np.mean(
        [truth[i]["verb_label"] == s["verb"][0] and truth[i]["noun_label"] == s["noun"][0]
         for i, s in sent.items()]))


def test_the_state_metrics_follow_from_the_submissions_of_the_official_form(done, ego):
    out, m = done("statechange"), metrics_of(done("statechange"))
    for end, split in (("", "test_unannotated"), ("_val", "val")):
        oscc, pnr = (json.loads((out / f"{k}{end}.json").read_text()) for k in ("oscc", "pnr"))
        rows = [e for e in read_clips(ego, f"fho_oscc-pnr_{split}") if "x1" not in e["video_uid"]]
        names = [e["unique_id"] for e in rows][:12]
        assert [s["unique_id"] for s in oscc] == [s["unique_id"] for s in pnr] == names
        assert all(set(s) == {"unique_id", "state_change"} and type(s["state_change"]) is bool
                   for s in oscc)
        assert all(set(s) == {"unique_id", "pnr_frame"} and type(s["pnr_frame"]) is float
                   for s in pnr)
        for e, s in zip(rows, pnr):                           # absolute: the start is in it
            share = (s["pnr_frame"] - e["parent_start_frame"]) / (
                e["parent_end_frame"] - e["parent_start_frame"])
            assert 4 * share == pytest.approx(round(4 * share)) and 0 <= share < 1
    hits, errors = [], []
    for e, s, p in zip(rows, oscc, pnr):
        hits.append(s["state_change"] == e["state_change"])
        if e["state_change"]:
            fps = (e["parent_end_frame"] - e["parent_start_frame"] + 1) / (
                e["parent_end_sec"] - e["parent_start_sec"])
            errors.append(abs(p["pnr_frame"] - e["parent_pnr_frame"]) / fps)
    assert m["StCC acc"] == pytest.approx(100 * np.mean(hits))
    assert m["PNR err (s)"] == pytest.approx(np.mean(errors)) and len(errors) > 3


def broken(path):
    size = path.stat().st_size
    path.unlink()                                             # the link, not the world's
    path.write_bytes(bytes(size))


@pytest.mark.parametrize("stage, name", [("recognition", "clip-v0.mp4"),
                                         ("statechange", "videos/video-v1.mp4")])
def test_a_broken_validation_video_stops_the_evaluation(stage, name, untested, tmp_path):
    data = linked(untested, tmp_path / "data")
    broken(data / name)
    r = quick(tmp_path, *flags_of(stage, data), "--epochs", 1, "--out", tmp_path / "out",
              "--workers", int(stage == "recognition"))
    assert one_error(r).startswith(f"{data / name}: ")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_broken_training_video_is_replaced_and_counted(untested, tmp_path):
    data = linked(untested, tmp_path / "data")
    broken(data / "clips" / "clip-t1.mp4")
    r = quick(tmp_path, *flags_of("anticipation", data), "--out", tmp_path / "out")
    assert r.code == 0 and len(r.err.splitlines()) == 1, r
    assert r.err.startswith(f"warning: {data / 'clips' / 'clip-t1.mp4'}: ")
    assert r.err.endswith("; sample replaced\n")
    rows = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum(r["broken"] for r in rows) == 8                # 4 of the 8 windows, in two epochs


# ---- conversion --------------------------------------------------------------------------------

WRITTEN = {"checkpoint_latest-ego.pth", "replai.pt", "avid.pth.tar", "replai.pth.tar"}


def convert(source, out):
    args = replai.parse_args(["--stage", "convert", "--init", str(source), "--out", str(out)])
    replai.convert(args, torch.device("cpu"))
    return {p.name for p in out.iterdir()}


SOURCES = {**PROBES, "a run": lambda s: None}


@pytest.mark.parametrize("name", SOURCES)
def test_every_layout_is_converted_there_and_back(name, weights, tmp_path):
    source = tmp_path / "c.pt"
    if name == "a run":
        state = SimpleNamespace(state_dict=lambda: weights)
        common.save(source, 7, arguments(tmp_path), model=state, samples=9)
    else:
        torch.save(SOURCES[name](weights), source)
    kinds = {"linear probe": ["video"], "model.backbone": ["video"], "video alone": ["video"],
             "AVID": ["video", "audio"]}.get(name, ["video", "audio", "heads"])
    files = WRITTEN - ({"replai.pth.tar"} if "heads" not in kinds else set()) - (
        {"avid.pth.tar"} if "audio" not in kinds else set())
    assert convert(source, tmp_path / "one") == files
    kept = tuple({"video": "backbone.video.", "audio": "backbone.audio.", "heads": "mlp."}[k]
                 for k in kinds)
    want = {k: v for k, v in weights.items() if k.startswith(kept)}
    for file in files:
        convert(tmp_path / "one" / file, tmp_path / file)     # back, from each of them
        got = torch.load(tmp_path / file / "replai.pt", weights_only=True)["model"]
        share = {"checkpoint_latest-ego.pth": "backbone.video.", "avid.pth.tar": "backbone."}
        part = {k: v for k, v in want.items() if k.startswith(share.get(file, ""))}
        assert set(got) == set(part) and all(torch.equal(got[k], v) for k, v in part.items())
        if file != "replai.pt":
            a, b = (torch.load(tmp_path / x / file, weights_only=True) for x in ("one", file))
            assert a.keys() == b.keys()
            for k in ("model", "state_dict"):
                assert list(a.get(k, ())) == list(b.get(k, ()))


@pytest.mark.parametrize("file", sorted(WRITTEN))
def test_every_written_file_fills_every_network(file, weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "c.pt")
    convert(tmp_path / "c.pt", tmp_path / "out")
    small = (8, 10, (VERBS, NOUNS))
    models = {"linear": (replai.LinearProbe(8, 10), replai.PROBE_LAYOUTS, "backbone.", "backbone."),
              "recognition": (replai.Recognition(*small), *replai.TASKS["recognition"].layouts, ""),
              "anticipation": (replai.Anticipation(*small, features=32, layers=1, heads=4),
                               *replai.TASKS["anticipation"].layouts, "backbone."),
              "statechange": (replai.StateChange(8, 10, 32), *replai.TASKS["statechange"].layouts,
                              "backbone.")}
    trunk = {k.removeprefix("backbone.video."): v for k, v in weights.items() if "video." in k
             and k.startswith("backbone.")}
    for name, (model, layouts, required, prefix) in models.items():
        common.load_weights(model, tmp_path / "out" / file, layouts, required)
        own = model.state_dict()
        for k, v in trunk.items():
            assert torch.equal(own[prefix + k], v), (name, k)
    model = replai.RepLAI(8, 10)
    if file == "checkpoint_latest-ego.pth":                   # holds the video network alone
        with pytest.raises(UserError):
            common.load_weights(model, tmp_path / "out" / file, replai.PRETRAIN_LAYOUTS,
                                "backbone.")
        return
    common.load_weights(model, tmp_path / "out" / file, replai.PRETRAIN_LAYOUTS, "backbone.")
    for k, v in model.state_dict().items():
        if k.startswith("backbone.") or file != "avid.pth.tar":
            assert torch.equal(v, weights[k]), k


@pytest.mark.parametrize("case", ["missing tensor", "missing audio tensor", "no video network",
                                  "no file", "none", "other network"])
def test_what_cannot_be_converted_is_one_line_and_nothing_is_written(case, weights, tmp_path):
    path = tmp_path / "c.pt"
    lost = {"missing tensor": "backbone.video.conv4x.0.out_bn.weight",
            "missing audio tensor": "backbone.audio.block2.bn1.bias"}.get(case)
    tensors = {k: v for k, v in weights.items() if k != lost}
    if case == "no video network":
        tensors = {k: v for k, v in tensors.items() if "video" not in k}
    if case == "other network":
        tensors = {"layer1.0.weight": torch.zeros(3)}
    if case not in ("no file", "none"):
        torch.save({"model": tensors}, path)
    init = "none" if case == "none" else path
    words = {"none": "--init FILE", "no file": "no such checkpoint"}.get(
        case, f"the first is {lost}" if lost else "no video network")
    if case == "missing tensor":                              # as a user sees it
        message = one_error(quick(tmp_path / "q", "--stage", "convert", "--init", init,
                                  "--out", tmp_path / "out"))
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"args.json"}
    else:
        with pytest.raises(UserError) as e:
            convert(init, tmp_path / "out")
        message = str(e.value)
        assert not (tmp_path / "out").exists()
    assert words in message and (case == "none" or message.startswith(f"{path}: "))


def test_a_released_checkpoint_keeps_its_function_through_the_conversion(tmp_path):
    file = json.loads((parity_tools.HERE / "replai.json").read_text())
    case = next(c for c in file["cases"] if c["id"] == "backbone.video_small")
    make = parity_tools.recipe.parameter
    state = {k: make(k, shape) for k, shape in file["states"]["criterion"].items()}
    for kind in ("video", "audio"):
        state |= {f"backbone.{kind}.{k}": make(k, shape)
                  for k, shape in file["states"][f"{kind}_backbone"].items()}
    state = {f"module.{k}": torch.from_numpy(np.asarray(v)) for k, v in state.items()}
    torch.save({"model": state, "optimizer": {}, "sampler": {}, "epoch": 1}, tmp_path / "c.pth.tar")
    convert(tmp_path / "c.pth.tar", tmp_path / "out")
    back = torch.load(tmp_path / "out" / "replai.pth.tar", weights_only=True)["model"]
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
    model = replai.Recognition().eval()
    common.load_weights(model, tmp_path / "out" / "checkpoint_latest-ego.pth",
                        *replai.TASKS["recognition"].layouts)
    x = parity_tools.Case("replai", file, case).input("x")
    with torch.inference_mode():
        maps = common.R2Plus1D.forward(model, x, return_embs=True)
    for name, want in case["outputs"].items():
        if name in maps:
            bound = test_parity.bounds(case["tolerance"], name, {})
            assert test_parity.faults(maps[name], want, bound, name) == []
    assert {"conv1", "conv5x", "pool"} <= set(case["outputs"])
