"""The toys pose each paper's problem: single frames tell nothing, the intended cue tells all."""

import collections
import itertools
import json
import re

import av
import numpy as np
import pytest
import torch
import toy
from torch.nn.functional import adaptive_avg_pool2d


def shrunk(frame):
    """A frame of any size as means, (3, 12, 16), from 0 to 1."""
    return adaptive_avg_pool2d(torch.from_numpy(frame).movedim(2, 0) / 255, (12, 16)).numpy()


def frames_at(video, numbers):
    """The shrunk frames of a planned video with these numbers."""
    frames = list(toy.draw(video))
    return [shrunk(frames[i]) for i in numbers]


def accuracy(train, test):
    """Of the best of four ridge regressions onto one-hot classes; train, test: values, classes."""
    (x, y), (u, z) = ((np.reshape(a, (len(a), -1)), np.array(b)) for a, b in (train, test))
    mean, n = x.mean(0), y.max() + 1
    x, u = x - mean, u - mean
    return max(((u @ (x.T @ np.linalg.solve(
        x @ x.T + strength * np.eye(len(x)), np.eye(n)[y] - 1 / n))).argmax(1) == z).mean()
        for strength in (1.0, 10.0, 100.0, 1000.0))


def stills(clips):
    """Every frame of every clip, with the class of its clip.    [(N, T, ...), (N,)] -> the same"""
    return [(x.reshape(-1, *x.shape[2:]), np.repeat(y, x.shape[1])) for x, y in clips]


# ---- strikes -----------------------------------------------------------------------------------

def test_a_frame_of_a_strike_hardly_tells_the_verb_and_the_change_does():
    rng, struck = np.random.default_rng(0), []
    for numbers in (range(12), range(100, 108)):              # [(N, before .. after, ...), (N,)]
        videos = [toy.plan_strikes("test", k, 11, "dense", 0, 8) for k in numbers]
        toy.deal_strikes(videos, rng)
        frames = [frames_at(video, [round(8 * (t + after)) for after in (
            -0.35, -0.05, 0.15, 0.35, 0.55, 0.75)]) for video in videos
            for t, *_ in video["strikes"]]
        verbs = [[*toy.VERBS].index(verb) for video in videos for _, verb, _ in video["strikes"]]
        struck.append((np.array(frames), np.array(verbs)))
    assert len(struck[0][1]) > 300 and max(np.bincount(struck[0][1])) < len(struck[0][1]) / 5
    assert accuracy(*stills(struck)) < 0.30                   # of 6 verbs
    # Who knows that a frame is from before can rule out some: what moves up is low.
    assert accuracy(*((x[:, 0], y) for x, y in struck)) < 0.33 + 0.11
    assert accuracy(*((x[:, -1] - x[:, 0], y) for x, y in struck)) > 0.40


def test_the_sound_tells_the_moments_of_strikes_and_motion_alone_does_not():
    def near(times, before, after):
        return (times[:, None] >= strikes - before) & (times[:, None] <= strikes + after)

    hits = []
    for k, kind in enumerate(["normal", "calm"] * 2):
        video = toy.plan_strikes("test", k, 21, kind, 18, 30)
        toy.deal_strikes([video], np.random.default_rng(0))
        strikes = np.array([t for t, *_ in video["strikes"]])
        loud = np.flatnonzero(abs(toy.make_sound(video)[0]) > 0.15) / video["rate"]
        assert near(loud, 0.001, 0.01).any(0).all()           # none is missed
        assert near(loud, 0.001, 0.85).any(1).all()           # nothing else is loud
        grey = np.stack([f[::2, ::2].mean(2, dtype="f4") for f in toy.draw(video)])
        motion = abs(np.diff(grey, axis=0)).mean((1, 2))
        struck = near((np.arange(len(motion)) + 0.5) / 30, 0.3, 0.5).any(1)
        most = motion > np.quantile(motion, 1 - struck.mean())            # as many frames
        hits.append(struck[most].mean())
    assert max(hits) < 0.5


@pytest.fixture(scope="module")
def ego4d(tmp_path_factory):
    """A whole toy Ego4D, not drawn.   -> {list: entries}, {video_uid: video}"""
    root = tmp_path_factory.mktemp("ego4d")
    videos = {v["video_uid"]: v for v in toy.make_ego4d(root, 0)}
    lists = {path.stem[4:]: json.loads(path.read_text()) for path in root.glob("*/fho_*.json")}
    return {name: content.get("clips") for name, content in lists.items()}, videos


def test_four_actions_of_a_routine_tell_the_next_twenty_and_nothing_else_does(ego4d):
    lists, videos = ego4d
    futures = {}
    for split in ("train", "val"):
        clips = collections.defaultdict(list)
        for e in lists[f"lta_{split}"]:
            if e["video_uid"] in videos and videos[e["video_uid"]]["kind"] == "routine":
                clips[e["clip_uid"]].append((e["verb"], e["noun"]))
        for done in clips.values():
            for i in range(len(done) - 24 + 1):
                future = futures.setdefault(tuple(done[i:i + 4]), tuple(done[i + 4:i + 24]))
                assert future == tuple(done[i + 4:i + 24])
        counts = collections.Counter(itertools.chain(*clips.values()))
        assert len(counts) == 24 and len({*counts.values()}) == 1         # chance stays chance
    assert len(futures) == len({*futures.values()}) == 24


@pytest.mark.parametrize("split", ["train", "val"])
def test_windows_of_state_change_hold_one_strike_or_none(ego4d, split):
    (lists, videos), lengths = ego4d, {True: [], False: []}
    for e in lists[f"oscc-pnr_{split}"]:
        start, stop = e["parent_start_sec"], e["parent_end_sec"]
        times = [t for t, *_ in videos[e["video_uid"]]["strikes"]]
        inside = [t for t in times if start - toy.CHANGE < t < stop + toy.REACH]
        assert len(inside) == e["state_change"]
        assert not inside or abs(e["parent_pnr_frame"] / 30 - inside[0]) < 1 / 30
        lengths[e["state_change"]].append(stop - start)
    assert len(lengths[True]) == len(lengths[False]) >= 25
    assert abs(np.mean(lengths[True]) - np.mean(lengths[False])) < 0.4


# ---- actions, mishaps and deeds ------------------------------------------------------------------

def test_a_frame_of_an_action_does_not_tell_it_and_the_order_of_two_does():
    names, clips, changes = list(toy.UCF_MOTIONS.values()), [], []
    for groups in (range(10, 30), range(10)):
        x, inside = [], []
        for c, g in itertools.product(range(8), groups):
            video = toy.plan_action("test", 100 * c + g, 7, names[c], g, 25, (68, 92), 26, "")
            x.append(frames_at(video, range(0, 26, 5)))
            rng = np.random.default_rng((*video["key"], 4))
            turn = toy.states(rng, names[c], np.arange(26) / 25)[1][::5]
            inside.append(turn[2:] == turn[:-2])              # no round ends between the two
        x, y, inside = np.array(x), np.repeat(np.arange(8), len(groups)), np.array(inside)
        clips.append((x, y))
        changes.append(((x[:, 2:] - x[:, :-2])[inside], y[np.nonzero(inside)[0]]))
    assert accuracy(*stills(clips)) < 0.20                    # of 8 classes
    train, (u, z) = changes
    motions = [toy.MOTIONS[name] for name in names]
    partner = np.array([motions.index((what, not grows)) for what, grows in motions])
    assert accuracy(train, (u, z)) > 0.40
    assert accuracy(train, (-u, partner[z])) > 0.40           # backwards it is its partner


def jerks(video):
    """[(mean acceleration of the object in a second, is it from after?)], every half second."""
    place, times = np.stack(toy.mishap(video)[:2]) / video["size"][0], toy.frame_times(video)
    found = []
    for start in np.arange(0, video["seconds"] - 1, 0.5):
        if not start <= video["truth"] <= start + 1:
            inside = place[:, (times >= start) & (times < start + 1)]
            jerk = np.hypot(*np.diff(inside, 2)).mean() * float(video["fps"]) ** 2
            found.append((jerk, start > video["truth"]))
    return found


def test_a_frame_of_a_mishap_does_not_tell_before_from_after_and_a_second_does(tmp_path):
    frames, motion = {"train": ([], []), "val": ([], [])}, {"train": [], "val": []}
    for video in (v for v in toy.make_oops(tmp_path, 0) if v["truth"] < np.inf):
        rng, split = np.random.default_rng(video["key"]), video["paths"][0].parent.name
        after = toy.frame_times(video) > video["truth"]
        few = min(4, after.sum(), (~after).sum())
        for side in (False, True):
            picked = rng.choice(np.flatnonzero(after == side), few, False)
            frames[split][0].extend(frames_at(video, picked))
            frames[split][1].extend([int(side)] * few)
        motion[split] += jerks(video)
    assert len(frames["train"][1]) > 1000 and accuracy(*frames.values()) < 0.55   # of two sides
    (value, after), (tested, truth) = (map(np.array, zip(*m)) for m in motion.values())
    best = max(value, key=lambda v: ((value > v) == after).mean())
    assert ((tested > best) == truth).mean() > 0.95


def statistics(frames):
    """What moves in some frames: rates of its place, size and angle, and how often they turn."""
    x = np.stack(frames).astype(np.float32).mean(-1)
    x = np.maximum(x - np.median(x, 0) - 25, 0)               # what rests is gone
    mass, (rows, columns) = x.sum((1, 2), keepdims=True) + 1, np.indices(x.shape[1:])

    def mean(values):
        return (x * values).sum((1, 2), keepdims=True) / mass
    dy, dx = rows - mean(rows), columns - mean(columns)
    angle = np.unwrap(np.arctan2(2 * mean(dy * dx), mean(dx**2 - dy**2)), axis=0)
    rates = np.diff([mean(rows), mean(columns), np.log(mass), angle], axis=1)[..., 0, 0]
    turns = (rates[:, 1:] * rates[:, :-1] < 0).mean(1)
    return np.concatenate([np.median(rates, 1), np.median(abs(rates), 1), turns])


def test_a_frame_of_a_deed_does_not_tell_it_and_its_motion_does(tmp_path):
    videos, clips, moves = toy.make_kinetics400(tmp_path, 0), [], []
    for split, n in (("train", 12), ("val", 8)):
        folders = [tmp_path / split / label.replace(" ", "_") for label in toy.KINETICS]
        drawn = [[*toy.draw(v)][::5] for folder in folders
                 for v in [v for v in videos if v["paths"][0].parent == folder][:n]]
        y = np.repeat(np.arange(8), n)
        clips.append((np.array([[shrunk(f) for f in frames[1:11:2]] for frames in drawn]), y))
        moves.append((np.array([statistics(frames) for frames in drawn]), y))
    assert accuracy(*stills(clips)) < 0.22                    # of 8 classes
    std = moves[0][0].std(0)
    assert accuracy(*((x / std, y) for x, y in moves)) > 0.85


def test_motion_begins_and_ends_where_it_is_annotated():
    actor = toy.actor_of(0, 0, 0.0, 8.0, 2.0, 5.0, "scene", "sink")
    t = np.arange(0, 8, 0.25)
    y = toy.follow(np.random.default_rng(0), actor, t, (72, 96))[0]
    assert np.array_equal(np.diff(y) > 0, (t[1:] > 2) & (t[:-1] < 5))


# ---- files -------------------------------------------------------------------------------------

FORMS = {  # dataset: form of the files' names
    "epic": r"videos/(P\d\d)/\1_\d\d+\.MP4",
    "ego4d": r"((clips|videos)/)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.mp4",
    "ucf101": r"UCF-101/(\w+)/v_(?i:\1)_g\d\d_c\d\d\.avi",
    "hmdb51": r"hmdb51_org/(\w+)/.+_\1_[hufl]_[cn]m_np[12]_(fr|ba|le|ri)_(bad|med|goo)_\d\.avi",
    "oops": r"oops_video/(train|val)/.+\D\d+\.mp4",
    "kinetics400": r"(train|val)/[^/ ]+/[\w-]{11}_\d{6}_\d{6}\.mp4",
    "charades": r"Charades_v1/[A-Z0-9]{5}\.mp4",
    "multithumos": r"videos/video_(validation|test)_\d{7}\.mp4"}


@pytest.mark.parametrize("name", toy.MAKERS)
def test_files_have_the_official_names_and_no_video_is_made_twice(name, tmp_path):
    videos = toy.MAKERS[name](tmp_path, 0)
    assert len({(v["key"], v["cut"]) for v in videos}) == len(videos)
    paths = [p.relative_to(tmp_path).as_posix() for v in videos for p in v["paths"]]
    assert len(set(paths)) == len(paths)
    assert [path for path in paths if not re.fullmatch(FORMS[name], path)] == []
    assert sum(v["seconds"] * np.prod(v["size"]) for v in videos) < 3500 * 96 * 128   # stays small


def test_train_and_test_share_no_group_and_no_film(tmp_path):
    toy.make_ucf101(tmp_path, 0)
    toy.make_hmdb51(tmp_path, 0)
    for split in (1, 2, 3):
        train, test = ({*re.findall(r"_g(\d\d)_", path.read_text())} for path in (
            tmp_path / f"ucfTrainTestlist/{part}list0{split}.txt" for part in ("train", "test")))
        assert len(train) == 18 and len(test) == 7 and not train & test
        codes = {(row.split(f"_{path.name.split('_test_')[0]}_")[0], row.split()[1])
                 for path in tmp_path.glob(f"testTrainMulti_7030_splits/*_test_split{split}.txt")
                 for row in path.read_text().splitlines()}    # (film, code)
        assert len(codes) == len({film for film, _ in codes}) == 11


@pytest.mark.parametrize("name", toy.MAKERS)
def test_the_same_seed_makes_the_same_files_which_hold_the_frames_as_drawn(
        name, tmp_path, monkeypatch):
    plain = toy.MAKERS[name]

    def shortest(*args):                                      # two videos are enough
        videos = sorted(plain(*args), key=lambda v: v["seconds"])[:2]
        return [v | {"seconds": min(v["seconds"], 5.0), "strikes": v.get("strikes", [])[:1]}
                for v in videos]
    monkeypatch.setitem(toy.MAKERS, name, shortest)
    made = []
    for folder, seed, workers in (("one", 3, 1), ("two", 3, 2), ("other", 4, 1)):
        toy.make([name], tmp_path / folder, seed, workers)
        made.append({path.relative_to(tmp_path / folder): path.read_bytes()
                     for path in (tmp_path / folder).rglob("*.*") if path.is_file()})
    assert len(made[0]) > 4 and made[0] == made[1] and made[0] != made[2]
    for video in shortest(tmp_path / "plan", 3):
        path = tmp_path / "one" / name / video["paths"][0].relative_to(tmp_path / "plan")
        with av.open(str(path)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        off = abs(np.stack(frames).astype(float) - np.stack([*toy.draw(video)]))
        assert off.mean((1, 2, 3)).max() < 6
