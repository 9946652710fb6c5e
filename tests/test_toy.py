"""The toy world: deterministic, in the official form, and no single frame gives the verb away."""

import ast
import collections
import csv
import itertools
import json
import math
import re

import av
import numpy as np
import pytest
import running  # noqa: F401 (paths, one thread)
import toy

import common
import replai


def table(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f, strict=True))


# ---- what can be seen ----

def frames_at(video, wanted):
    """Small pictures (16 x 12, colour) of a planned video at some times, one pass of drawing."""
    numbers = {round(t * float(video["fps"])) for t in wanted}
    got = {}
    for i, frame in enumerate(toy.draw(video)):
        if i in numbers:
            f = frame.astype(np.float32)
            rows = np.array_split(np.arange(f.shape[0]), 12)
            columns = np.array_split(np.arange(f.shape[1]), 16)
            got[i] = np.stack([[f[r][:, c].mean((0, 1)) for c in columns] for r in rows]) / 255
    return [got[round(t * float(video["fps"]))] for t in wanted]


MOMENTS = [-0.35, -0.05, 0.15, 0.35, 0.55, 0.75]              # seconds from the strike


@pytest.fixture(scope="module")
def strikes():
    """Small pictures around strikes, [split][strike][moment], their verbs: 12 and 8 videos."""
    verbs = list(toy.VERBS)
    rng, out = np.random.default_rng(0), []
    for first, n in ((0, 12), (100, 8)):
        videos = [toy.plan_video(11, "test", first + k, "dense", 0, 8)[0] for k in range(n)]
        toy.deal(videos, rng)
        x, y = [], []
        for v in videos:
            found = frames_at(v, [t + m for t, *_ in v["strikes"] for m in MOMENTS])
            x += [found[i:i + len(MOMENTS)] for i in range(0, len(found), len(MOMENTS))]
            y += [verbs.index(verb) for _, verb, _ in v["strikes"]]
        out.append((np.array(x), np.array(y)))
    return out


def accuracy(train, test, strength):
    """Of ridge regression onto one-hot classes."""
    (x, y), (u, z) = ((a.reshape(len(a), -1), b) for a, b in (train, test))
    mean, n = x.mean(0), y.max() + 1
    x, u = x - mean, u - mean
    gram = x @ x.T + strength * np.eye(len(x))
    w = x.T @ np.linalg.solve(gram, np.eye(n)[y] - 1 / n)
    return ((u @ w).argmax(1) == z).mean()


def test_a_frame_of_unknown_moment_hardly_tells_the_verb(strikes):
    """As a classifier of still pictures meets them: from before, while and after it changes."""
    train, test = [(x.reshape(-1, *x.shape[2:]), np.repeat(y, len(MOMENTS))) for x, y in strikes]
    assert len(train[1]) > 1800 and len(test[1]) > 1000
    for strength in (10.0, 100.0, 1000.0):
        share = accuracy(train, test, strength)
        assert share < 0.30, f"ridge {strength}: {share:.2f} of 6 verbs"


def test_a_frame_before_the_strike_tells_no_more_than_the_start_state(strikes):
    """Up starts low, down high, grow small, shrink large, the rest anyhow: who knows place, size
    and that nothing has changed yet is right once in three times, and nobody more often."""
    (x, y), (u, z) = strikes
    error = math.sqrt(1 / 3 * 2 / 3 / len(z))
    for strength in (1.0, 10.0, 100.0):
        share = accuracy((x[:, 0], y), (u[:, 0], z), strength)
        assert share < 1 / 3 + 3 * error, f"ridge {strength}: {share:.2f} of 6 verbs"


def test_the_change_between_two_frames_does_tell_it(strikes):
    """What gives the test above its power: the same classifier on the same pictures, subtracted."""
    (x, y), (u, z) = strikes
    best = max(accuracy((x[:, -1] - x[:, 0], y), (u[:, -1] - u[:, 0], z), s)
               for s in (1.0, 10.0, 100.0))
    assert best > 0.40, best


def test_every_verb_and_noun_is_as_frequent_as_any_other(strikes):
    counts = np.bincount(strikes[0][1], minlength=6)
    assert counts.max() - counts.min() <= 4


def struck_videos(kinds, seconds):
    """Planned videos with sound, and when something is struck in each."""
    videos = [toy.plan_video(21, "test", k, kind, seconds, 30)[0] for k, kind in enumerate(kinds)]
    toy.deal(videos, np.random.default_rng(0))
    return [(v, np.array([t for t, *_ in v["strikes"]])) for v in videos]


def near(times, strikes, before, after):
    """(times, strikes): is it so near?"""
    return (times[:, None] >= strikes - before) & (times[:, None] <= strikes + after)


def test_the_sound_tells_every_moment_and_random_ones_mostly_miss():
    """What makes moments of interaction worth detecting: long silent stretches."""
    rng = np.random.default_rng(0)
    for video, strikes in struck_videos(["normal", "calm"] * 3, 60):
        found = replai.find_moments(toy.hear(video), video["rate"], 1.0)
        peaks = found.times[found.peaks]
        assert near(peaks, strikes, 0.05, 0.05).any(0).all()          # none is missed
        assert near(peaks, strikes, 0.05, 0.85).any(1).all()          # none is of something else
        anywhere = rng.uniform(0.6, video["seconds"] - 0.6, 2000)
        share = near(anywhere, strikes, 0.3, 0.3).any(1).mean()
        assert share < {"normal": 0.25, "calm": 0.12}[video["kind"]], (video["kind"], share)


def test_the_pictures_alone_do_not_tell_the_moments():
    """The stretches of most motion are as often of something that slides in as of a strike."""
    hits = total = 0
    for video, strikes in struck_videos(["calm", "normal"] * 2, 18):
        grey = [f[::2, ::2].mean(2, dtype="f4") for f in toy.draw(video)]
        motion = np.array([np.abs(b - a).mean() for a, b in itertools.pairwise(grey)])
        motion = np.convolve(motion, np.ones(8) / 8, "same")
        times, picked = (np.arange(len(motion)) + 0.5) / 30, []
        for _ in strikes:                                # as many as there are strikes
            picked.append(times[motion.argmax()])
            motion[np.abs(times - picked[-1]) < 0.8] = 0
        hits += near(np.array(picked), strikes, 0.3, 0.5).any(1).sum()
        total += len(strikes)
    assert total >= 12 and hits <= 0.6 * total, (hits, total)


@pytest.fixture(scope="module")
def actions():
    """Small pictures (15 x 11) of planned actions, one every 0.2 s, [split][video][moment], their
    rounds and their classes, the toy UCF101's: groups 10 .. 29, and 0 .. 9 to test."""
    names, out = list(toy.UCF_MOTIONS.values()), []
    for groups in (range(10, 30), range(10)):
        x, turns = [], []
        for c, g in itertools.product(range(8), groups):
            video, _ = toy.plan_action(7, "test", 100 * c + g, names[c], g, 25, (68, 92))
            frames = list(toy.draw_action(video | {"seconds": 26 / 25}))[::5]
            x.append([f[1:67, 1:91].reshape(11, 6, 15, 6, 3).mean((1, 3)) / 255 for f in frames])
            rng = np.random.default_rng((*video["key"], 1))
            turns.append(toy.states(rng, names[c], np.arange(26) / 25)[1][::5])
        out.append((np.array(x), np.array(turns), np.repeat(np.arange(8), len(groups))))
    return out


def test_a_picture_of_an_action_does_not_tell_its_class(actions):
    train, test = [(x.reshape(-1, *x.shape[2:]), np.repeat(y, x.shape[1])) for x, _, y in actions]
    for strength in (10.0, 100.0, 1000.0):
        share = accuracy(train, test, strength)
        assert share < 0.20, f"ridge {strength}: {share:.2f} of 8 classes"


def test_two_pictures_of_a_round_tell_it_if_one_knows_which_is_the_earlier(actions):
    """What gives the test above its power: differences over 0.4 s, the same classifier."""
    pairs = []
    for x, turns, y in actions:
        inside = turns[:, 2:] == turns[:, :-2]               # no round ends between the two
        pairs.append(((x[:, 2:] - x[:, :-2])[inside], y[np.nonzero(inside)[0]]))
    train, (u, z) = pairs
    best = max((3.0, 10.0, 30.0), key=lambda s: accuracy(train, (u, z), s))
    assert accuracy(train, (u, z), best) > 0.40
    # Backwards each class is its partner: what finds the class forwards finds that.
    motions = [toy.MOTIONS[m] for m in toy.UCF_MOTIONS.values()]
    partner = np.array([motions.index((what, not grows)) for what, grows in motions])
    assert accuracy(train, (-u, partner[z]), best) > 0.40 > 0.20 > accuracy(train, (-u, z), best)


def test_the_numbers_of_an_action_have_the_same_distribution_in_all_classes():
    """At any moment: the one that runs and the ones that stand, forwards and backwards."""
    times = np.array([0, 0.33, 1.0])
    for what in toy.RANGES:
        edges = toy.RANGES[what](np.linspace(0, 1, 6)[1:-1])
        for motion in toy.MOTIONS:
            got = np.array([toy.states(np.random.default_rng((5, k)), motion, times)[0][what]
                            for k in range(500)])
            for moment in got.T:
                shares = np.bincount(np.digitize(moment, edges), minlength=5) / 500
                assert abs(shares - 0.2).max() < 0.07, (what, motion, shares)


# ---- what can be seen of a mishap ----

def shrunk(frame):
    """A picture of any size as 16 x 12 means, from 0 to 1."""
    rows, columns = (np.arange(k) * n // k for n, k in zip(frame.shape, (12, 16)))
    sums = np.add.reduceat(np.add.reduceat(frame.astype(np.float32), rows, 0), columns, 1)
    areas = np.outer(*(np.diff(np.append(a, n)) for a, n in zip((rows, columns), frame.shape)))
    return sums / areas[..., None] / 255


def beside_the_slip(video, most):
    """Numbers of as many pictures from before as from after the slip, up to `most` of each."""
    rng = np.random.default_rng(video["key"])
    times = np.arange(round(video["seconds"] * video["fps"])) / float(video["fps"])
    sides = np.flatnonzero(times < video["truth"]), np.flatnonzero(times > video["truth"])
    k = min(most, *map(len, sides))
    return [int(i) for side in sides for i in rng.choice(side, k, replace=False)]


def jerks(video, y, x):
    """Mean absolute second difference over 16 pictures at 16 fps, every half a second, and whether
    they are from before (0) or after (1); none that holds the slip itself."""
    fps, out = float(video["fps"]), []
    grid = (np.arange(int(len(y) * 16 / fps)) * fps / 16).astype(int)
    for first in range(0, len(grid) - 15, 8):
        here = grid[first:first + 16]
        if here[-1] / fps < video["truth"] or here[0] / fps > video["truth"]:
            jerk = np.hypot(np.diff(y[here], 2), np.diff(x[here], 2)).mean()
            out.append((jerk / video["size"][0], here[0] / fps > video["truth"]))
    return out


def told_apart(train, test):
    """Accuracy in the test part, mean of both sides, with the best threshold of the training part:
    the middle between two of its values."""
    (a, y), (b, z) = (np.array(x).T for x in (train, test))
    values = np.sort(a)
    best = max((values[1:] + values[:-1]) / 2, key=lambda x: ((a > x) == y).mean())
    return np.mean([((b > best) == z)[z == side].mean() for side in (0, 1)])


@pytest.fixture(scope="module")
def mishaps(tmp_path_factory):
    """The planned videos of the whole toy Oops! that do slip: (train, val)."""
    tasks = toy.make_oops(tmp_path_factory.mktemp("mishaps"), 0, 1.0, False)
    tasks = [v for v in tasks if math.isfinite(v["truth"])]
    return [[v for v in tasks if v["files"][0][0].parent.name == s] for s in ("train", "val")]


def test_a_picture_of_a_mishap_does_not_tell_before_from_after(mishaps):
    data = []
    for videos in mishaps:
        picks = [beside_the_slip(v, 6) for v in videos]
        x = [shrunk(f) for v, p in zip(videos, picks) for f in toy.draw_mishap(v, p)]
        data.append((np.array(x), np.concatenate([np.repeat([0, 1], len(p) // 2) for p in picks])))
    assert len(data[0][1]) > 1600 and len(data[1][1]) > 800
    for strength in (1.0, 10.0, 100.0, 1000.0):
        share = accuracy(*data, strength)
        assert share < 0.55, f"ridge {strength}: {share:.2f} of two sides"


def test_a_second_of_a_mishap_tells_before_from_after(mishaps):
    train, test = ([row for v in videos for row in jerks(v, *toy.mishap(v)[:2])]
                   for videos in mishaps)
    assert min(len(train), len(test)) > 700 and told_apart(train, test) > 0.95


def test_places_and_angles_are_distributed_alike_before_and_after():
    """Anywhere in the picture, whatever happens; quintiles of what the borders leave free."""
    at = {False: [], True: []}
    for k in range(1500):
        video, rng = toy.plan_mishap(5, k, "normal", (5, 9))
        y, x, *angles = toy.mishap(video)
        r, sides = video["radius"], video["size"]
        free = [(a - r) / (n - 2 * r) for a, n in zip((y, x), sides)]
        assert all(-1e-6 <= a.min() and a.max() <= 1 + 1e-6 for a in free)
        slip = video["truth"] * float(video["fps"])
        for late in at:                                       # a random picture of each side
            i = int(rng.uniform(*((slip + 1, len(y)) if late else (0, slip))))
            at[late].append([a[i] for a in free] + [a[i] / (2 * np.pi) % 1 for a in angles])
    a, b = (np.array(at[late]).T for late in (False, True))
    for before, after in zip(a, b):
        edges = np.quantile(np.concatenate([before, after]), [0.2, 0.4, 0.6, 0.8])
        shares = [np.bincount(np.digitize(z, edges), minlength=5) / 1500 for z in (before, after)]
        assert abs(shares[0] - shares[1]).max() < 0.06, shares


def place(frames):
    """Where the bright object is in each picture: the middle of what exceeds the ground."""
    grey = np.stack(frames).astype(np.float32).mean(-1)
    weight = np.maximum(grey - np.median(grey, (1, 2), keepdims=True) - 40, 0)
    total = weight.sum((1, 2)) + 1e-6
    return [(weight.sum(2 - k) * np.arange(grey.shape[1 + k])).sum(1) / total for k in (0, 1)]


@pytest.fixture(scope="module")
def seen_mishaps(oops, tmp_path_factory):
    """The planned videos of the fixture and the pictures that its files hold."""
    folder = tmp_path_factory.mktemp("plan")
    out = []
    for video in toy.make_oops(folder, 0, 0.01, False, seconds=(4.5, 8)):
        path = oops / video["files"][0][0].relative_to(folder)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert len(container.streams) == 1 and stream.codec_context.name == "h264"
            assert stream.average_rate == video["fps"]
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
            out.append((video, path, frames, stream.codec_context.has_b_frames))
    return out


def test_files_of_mishaps_hold_the_pictures_as_drawn_in_their_order(oops, seen_mishaps):
    assert {p for _, p, *_ in seen_mishaps} == set(oops.glob("oops_video/*/*.mp4"))
    for video, path, frames, _ in seen_mishaps:
        assert len(frames) == round(video["seconds"] * video["fps"])
        assert frames[0].shape == (*video["size"], 3) and not any(n % 2 for n in video["size"])
        picks = [0, len(frames) // 2, len(frames) - 1]
        for k, wanted in zip(picks, toy.draw_mishap(video, picks)):
            assert abs(frames[k].astype(float) - wanted).mean() < 6, (path, k)
        assert common.probe(path).duration == pytest.approx(video["seconds"], abs=0.01)
    assert 0 < sum(b for *_, b in seen_mishaps) < len(seen_mishaps) / 2
    assert {v["fps"] for v, *_ in seen_mishaps} == set(toy.OOPS_RATES)
    longer = sum(len(frames) > 192 for _, _, frames, _ in seen_mishaps)
    assert 0.2 < longer / len(seen_mishaps) < 0.7
    assert sum(p.stat().st_size for _, p, *_ in seen_mishaps) < 1e6


def test_a_mishap_in_the_files_is_told_by_motion_and_not_by_a_picture(seen_mishaps):
    """What the codec leaves in fast pictures does not give them away either."""
    stills, moves = {"train": ([], []), "val": ([], [])}, {"train": [], "val": []}
    for video, path, frames, _ in seen_mishaps:
        if math.isfinite(video["truth"]):
            x, y = stills[path.parent.name]
            picks = beside_the_slip(video, 20)
            x += [shrunk(frames[i]) for i in picks]
            y += [0] * (len(picks) // 2) + [1] * (len(picks) // 2)
            moves[path.parent.name] += jerks(video, *place(frames))
    data = [tuple(map(np.array, stills[s])) for s in ("train", "val")]
    shares = [accuracy(*data, strength) for strength in (10.0, 100.0, 1000.0)]
    assert max(shares) < 0.62, shares                         # 11 videos: the error is larger
    assert told_apart(moves["train"], moves["val"]) > 0.9


# ---- what can be seen of the deeds of Kinetics-400, Charades and MultiTHUMOS ----

def statistics(frames):
    """What moves in every fifth picture: rates of the place, size and shape of what changes."""
    x = np.stack(frames[::5]).astype(np.float32).mean(-1)
    x = np.maximum(x - np.median(x, 0) - 25, 0)               # what rests is gone
    mass = x.sum((1, 2)) + 1
    rows, columns = np.arange(x.shape[1]), np.arange(x.shape[2])
    y, z = (x.sum(2) @ rows) / mass, (x.sum(1) @ columns) / mass
    dy, dz = rows[:, None] - y[:, None, None], columns - z[:, None, None]
    yy, zz, yz = ((x * m).sum((1, 2)) / mass for m in (dy**2, dz**2, dy * dz))
    turn = np.diff(np.unwrap(np.arctan2(2 * yz, zz - yy)))
    size, y, z = np.diff(np.log(mass)), np.diff(y), np.diff(z)
    back = [np.mean(d[1:] * d[:-1] < 0) for d in (size, z)]
    return [np.median(y), np.median(size), *(np.median(abs(d)) for d in (y, z, size, turn)), *back]


@pytest.fixture(scope="module")
def deeds(tmp_path_factory):
    """Planned clips of Kinetics, 12 and 8 of each class: [(12 x 16 pictures, motion, classes)]"""
    root, out = tmp_path_factory.mktemp("deeds"), []
    tasks = toy.make_kinetics400(root, 0, 1.0, False)
    for split, n in (("train", 12), ("val", 8)):
        x, moves, y = [], [], []
        for c, label in enumerate(toy.KINETICS):
            folder = root / split / label.replace(" ", "_")
            for video in [v for v in tasks if v["files"][0][0].parent == folder][:n]:
                frames = list(toy.draw_scene(video))
                x.append([shrunk(f) for f in frames[5:55:10]])
                moves.append(statistics(frames))
                y.append(c)
        out.append((np.array(x), np.array(moves), np.array(y)))
    return out


def test_a_picture_of_a_deed_does_not_tell_which_and_motion_does(deeds):
    stills = [(x.reshape(-1, *x.shape[2:]), np.repeat(y, x.shape[1])) for x, _, y in deeds]
    shares = [accuracy(*stills, strength) for strength in (1.0, 10.0, 100.0, 1000.0)]
    assert max(shares) < 0.22, f"{shares} of 8 classes"
    (_, a, y), (_, b, z) = deeds
    mean, std = a.mean(0), a.std(0)
    share = accuracy(((a - mean) / std, y), ((b - mean) / std, z), 1.0)
    assert share > 0.9, share


def test_a_deed_is_anywhere_in_its_range_whichever_it_is():
    """Places and sizes of pictures of the long videos: quintiles; and each does what it should."""
    got, times = {deed: [] for deed in toy.DEEDS}, np.linspace(1, 4, 301)
    for deed in toy.DEEDS:
        for k in range(500):
            actor = toy.actor_of(0, 0, 0, 5, 1, 4, "scene", deed)
            y, x, radius, angle, solid = toy.follow(
                np.random.default_rng((7, k)), actor, times, (72, 96))
            pick = np.random.default_rng((8, k)).integers(301)
            got[deed].append([y[pick], x[pick], np.log(radius[pick]), angle[pick] % 1])
            change = {"y": np.ptp(y) / 72, "x": np.ptp(x) / 72, "angle": np.ptp(angle),
                      "radius": radius.max() / radius.min() - 1}
            what = {"height": "y", "side": "x", "size": "radius", "angle": "angle"}
            most = change.pop(what[toy.DEEDS[deed][0]])
            assert most > 0.45 and max(change.values()) < 1e-6 and (solid == 1).all()
    everything = np.concatenate(list(got.values()))
    for i in range(4):
        edges = np.quantile(everything[:, i], [0.2, 0.4, 0.6, 0.8])
        for deed, values in got.items():
            shares = np.bincount(np.digitize(np.array(values)[:, i], edges), minlength=5) / 500
            assert abs(shares - 0.2).max() < 0.075, (deed, i, shares)


def test_directions_of_deeds_and_their_rates():
    """Opposites differ in the sign alone; nothing is too fast for 2.4 pictures a second."""
    times = np.arange(0, 3, 0.01)
    for k in range(40):
        y, x, r, a = {}, {}, {}, {}
        for deed in toy.DEEDS:
            actor = toy.actor_of(0, 0, -1, 4, 0, 3, "scene", deed)
            y[deed], x[deed], r[deed], a[deed], _ = toy.follow(
                np.random.default_rng((9, k)), actor, times, (72, 96))
        assert (np.diff(y["rise"]) < 0).all() and (np.diff(y["sink"]) > 0).all()
        assert (np.diff(r["grow"]) > 0).all() and (np.diff(r["shrink"]) < 0).all()
        assert len(set(np.sign(np.diff(x["drift"])))) == 1
        assert abs(np.diff(a["spin"])).max() * 100 / 2.4 < 0.15
        for values in (x["sway"], r["pulse"]):
            turns = np.flatnonzero(np.diff(np.sign(np.diff(values))))
            assert 1 <= len(turns) and (np.diff(turns) >= 78).all()


@pytest.mark.parametrize("name", ["charades", "multithumos"])
def test_deeds_are_equally_frequent_and_none_one_or_two_at_a_time(name, tmp_path):
    tasks, active = toy.MAKERS[name](tmp_path, 0, 1.0, False), []
    for split in (0, 1):
        counts = collections.Counter(a["deed"] for v in tasks for a in v["actors"]
                                     if a["busy"] and v["key"][2] // 1000 == split)
        assert set(counts) == set(toy.DEEDS)
        assert max(counts.values()) - min(counts.values()) <= 1
    for video in tasks:
        t, busy = np.arange(0, video["seconds"], 0.05), [a for a in video["actors"] if a["busy"]]
        active.append(np.sum([(t >= a["begin"]) & (t < a["end"]) for a in busy], axis=0, dtype=int)
                      + np.zeros(len(t), int))
    shares = np.bincount(np.concatenate(active)) / sum(map(len, active))
    assert len(shares) == 3
    for share, low, high in zip(shares, (0.24, 0.4, 0.2), (0.36, 0.51, 0.31)):
        assert low < share < high, shares


# ---- the same bytes ----

@pytest.mark.parametrize("name", ["epic", "ego4d", "ucf101", "hmdb51", "oops", "kinetics400",
                                  "charades", "multithumos"])
def test_the_same_seed_makes_the_same_files_with_any_number_of_workers(name, tmp_path, monkeypatch):
    plain = toy.MAKERS[name]

    def two(*a):                                              # the two shortest are enough
        tasks = sorted(plain(*a), key=lambda v: v["seconds"] * len(v["files"]))[:2]
        return [{**v, "seconds": min(v["seconds"], 8.0),
                 "strikes": [s for s in v.get("strikes", ()) if s[0] < 6.5]} for v in tasks]
    monkeypatch.setitem(toy.MAKERS, name, two)
    for folder, seed, workers in (("one", 3, 1), ("two", 3, 2), ("other", 4, 2)):
        toy.make(name, tmp_path / folder, seed=seed, scale=0.01, workers=workers)

    def files(folder):
        root = tmp_path / folder / name
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()
                and not p.name.startswith(".")}
    one = files("one")
    assert len(one) > 5 and one == files("two")
    other = files("other")
    assert all(one[k] != other[k] for k in set(one) & set(other)
               if k.endswith(("train.csv", "train.json", ".avi")))
    # Elsewhere the names are random.
    assert set(one) != set(other) or name in ("epic", "ucf101")


def test_a_finished_toy_is_kept_and_a_strange_folder_is_not_touched(epic, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in epic.rglob("*")}
    toy.make("epic", epic.parent, scale=0.01, workers=2)
    assert "is there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in epic.rglob("*")} == before
    (tmp_path / "epic").mkdir()
    (tmp_path / "epic" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not a toy dataset"):
        toy.make("epic", tmp_path)
    assert (tmp_path / "epic" / "mine.txt").read_text() == "x"


# ---- EPIC-KITCHENS-100's form ----

def test_epic_annotations_have_the_official_form(epic):
    folder = epic / "annotations"
    assert {p.name for p in folder.iterdir()} == {
        "EPIC_100_train.csv", "EPIC_100_validation.csv", "EPIC_100_test_timestamps.csv",
        "EPIC_100_video_info.csv", "EPIC_100_verb_classes.csv", "EPIC_100_noun_classes.csv",
        "EPIC_100_tail_verbs.csv", "EPIC_100_tail_nouns.csv",
        "EPIC_100_unseen_participant_ids_validation.csv",
        "EPIC_100_unseen_participant_ids_test.csv"}
    columns = ("narration_id,participant_id,video_id,narration_timestamp,start_timestamp,"
               "stop_timestamp,start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,"
               "all_nouns,all_noun_classes").split(",")
    info = {r["video_id"]: r for r in table(folder / "EPIC_100_video_info.csv")}
    for split in ("train", "validation", "test_timestamps"):
        path = folder / f"EPIC_100_{split}.csv"
        assert path.read_text().splitlines()[0].split(",") == columns[:8 if "test" in split else 15]
        for r in table(path):
            assert re.fullmatch(rf"{r['video_id']}_\d+", r["narration_id"])
            assert r["video_id"].startswith(r["participant_id"] + "_") and r["video_id"] in info
            for c, digits in (("narration", 3), ("start", 2), ("stop", 2)):
                assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{%d}" % digits, r[f"{c}_timestamp"])
            assert int(r["start_frame"]) < int(r["stop_frame"])
            if "test" not in split:
                assert 0 <= int(r["verb_class"]) < 97 and 0 <= int(r["noun_class"]) < 300
                nouns, classes = (ast.literal_eval(r[f"all_noun{c}"]) for c in ("s", "_classes"))
                assert nouns[0] == r["noun"] and classes[0] == int(r["noun_class"])
                assert len(nouns) == len(classes)
    sizes = {"verb_classes": 97, "noun_classes": 300, "tail_verbs": 86, "tail_nouns": 228}
    for name, n in sizes.items():
        assert len(table(folder / f"EPIC_100_{name}.csv")) == n
    unseen = table(folder / "EPIC_100_unseen_participant_ids_validation.csv")
    assert [r["participant_id"] for r in unseen] == ["P18", "P32"]


def test_epic_has_its_quirks(epic):
    rows = table(epic / "annotations" / "EPIC_100_train.csv")
    text = (epic / "annotations" / "EPIC_100_train.csv").read_text()
    assert re.search(r',"\w[\w ]*, gently, ', text), "no quoted narration"
    info = {r["video_id"]: r for r in table(epic / "annotations" / "EPIC_100_video_info.csv")}
    files = {p.stem: p for p in epic.glob("videos/*/*.MP4")}
    named = {r["video_id"] for r in rows}
    assert len(named - set(files)) == 1, "one training video is absent"
    media = {k: common.probe(p) for k, p in files.items()}
    assert [m.channels for k, m in media.items() if k in named].count(0) == 1, "one has no sound"

    def seconds(stamp):
        h, m, s = stamp.split(":")
        return 3600 * int(h) + 60 * int(m) + float(s)
    over = [r for r in rows
            if seconds(r["stop_timestamp"]) > float(info[r["video_id"]]["duration"]) + 1]
    assert len(over) == 1, "one annotation overruns its video"
    for k, m in media.items():
        assert m.duration == pytest.approx(float(info[k]["duration"]), abs=0.05)
        assert info[k]["resolution"] == f"{m.width}x{m.height}"
        assert float(info[k]["fps"]) == pytest.approx(m.fps, rel=1e-3)


# ---- Ego4D's form ----

HEAD = {"version", "date", "description", "manifest", "split", "clips"}


def spans(*names):
    return {f"{n}_{side}_{unit}" for n in names for side in ("start", "end")
            for unit in ("sec", "frame")}


def test_ego4d_annotations_have_the_official_keys(tmp_path):
    tasks = toy.make_ego4d(tmp_path, 0, 1.0, False)           # annotations alone, whole size
    folder = tmp_path / "annotations"
    labels = {"verb", "noun", "verb_label", "noun_label"}
    lta = {"video_uid", "clip_uid", "clip_id", "action_idx"} | spans(
        "clip_parent", "interval", "action_clip")
    oscc = {"clip_id", "unique_id", "video_uid"} | spans("parent")
    uids = set()
    for split in ("train", "val", "test_unannotated"):
        file = json.loads((folder / f"fho_lta_{split}.json").read_text())
        assert set(file) == HEAD and file["split"] == split
        for e in file["clips"]:
            assert set(e) == lta | (labels if split != "test_unannotated" else set())
        uids |= {e["video_uid"] for e in file["clips"]}
        file = json.loads((folder / f"fho_oscc-pnr_{split}.json").read_text())
        assert set(file) == HEAD and file["split"] == split and len(file["clips"]) > 3
        for e in file["clips"]:
            if split == "test_unannotated":
                assert set(e) == oscc | {"clip_uid"}
            elif e["state_change"]:
                assert set(e) == oscc | spans("clip") | {
                    "clip_uid", "state_change", "clip_pnr_frame", "parent_pnr_frame"}
                assert e["parent_start_frame"] < e["parent_pnr_frame"] < e["parent_end_frame"]
            else:
                assert set(e) == oscc | {"state_change", "pnr_frame"} and e["pnr_frame"] is None
        if split != "test_unannotated":
            changes = [e["state_change"] for e in file["clips"]]
            assert sum(changes) == len(changes) / 2
    made = {p.stem for t in tasks for path, _, links in t["files"] for p in [path, *links]}
    assert len(uids - made) == 1, "one video is absent"


def test_ego4d_has_its_quirks(tmp_path, ego4d):
    toy.make_ego4d(tmp_path, 0, 1.0, False)
    folder = tmp_path / "annotations"
    oscc = json.loads((folder / "fho_oscc-pnr_train.json").read_text())["clips"]
    assert any("clip_uid" in e and e["clip_uid"] is None for e in oscc), "no null clip_uid"
    assert any("pnr_frame" in e and e["pnr_frame"] is None for e in oscc), "no null pnr_frame"
    lta = json.loads((folder / "fho_lta_train.json").read_text())["clips"]
    over = [e for e in lta if e["action_clip_end_sec"] >
            e["clip_parent_end_sec"] - e["clip_parent_start_sec"] + 1]
    assert len(over) == 1, "one annotation overruns its clip"
    sound = {p: common.probe(p).channels for p in ego4d.glob("*.mp4")}
    assert sorted(sound.values())[0] == 0 and sum(c > 0 for c in sound.values()) == 3
    levels = [np.abs(common.read_audio(p)[0]).max() for p, c in sound.items() if c]
    assert min(levels) < 1e-3 < 0.1 < max(levels), "one has a silent track"


# ---- Ego4D's long-term anticipation ----

CENTRE = 64 / 30                     # seconds that a clip of an action holds, from its middle
OBSERVED, FUTURE = 4, 20             # actions


def ego4d_plan(root, seed=0, scale=1.0):
    """Annotations alone: {video_uid: video to draw}, {split: {clip_uid: sorted LTA entries}}."""
    tasks = {v["video_uid"]: v for v in toy.make_ego4d(root, seed, scale, False)}
    clips = {}
    for split in ("train", "val", "test_unannotated"):
        clips[split] = collections.defaultdict(list)
        path = root / "annotations" / f"fho_lta_{split}.json"
        for e in json.loads(path.read_text())["clips"]:
            clips[split][e["clip_uid"]].append(e)
        for entries in clips[split].values():
            entries.sort(key=lambda e: e["action_idx"])
            assert [e["action_idx"] for e in entries] == list(range(len(entries)))
    return tasks, clips


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return ego4d_plan(tmp_path_factory.mktemp("plan"))


def routines(planned, split):
    """(video, [(verb, noun) of each action, None where unannotated], entries) of each routine."""
    tasks, clips = planned
    for entries in clips[split].values():
        video = tasks.get(entries[0]["video_uid"], {"kind": "absent"})
        if video["kind"] == "routine":
            yield video, [(e.get("verb"), e.get("noun")) for e in entries], entries


def windows(actions):
    """All (observed actions, future actions) of a clip."""
    for i in range(len(actions) - OBSERVED - FUTURE):
        yield tuple(actions[i:i + OBSERVED]), tuple(actions[i + OBSERVED:][:FUTURE])


def test_routines_have_as_many_windows_as_promised(planned):
    for split, n, each in (("train", 12, 10), ("val", 12, 4), ("test_unannotated", 2, 4)):
        counts = [len(list(windows(actions))) for _, actions, _ in routines(planned, split)]
        assert counts == [each] * n, (split, counts)


def test_the_smallest_toy_has_one_routine_of_two_windows_in_every_split(tmp_path):
    small = ego4d_plan(tmp_path, scale=0.01)
    for split in small[1]:
        assert [len(list(windows(a))) for _, a, _ in routines(small, split)] == [2], split


def test_all_pairs_of_verb_and_noun_are_as_frequent_in_the_routines(planned):
    """So neither tells about the other, and a guess without looking is right by chance alone: of
    the actions as such and of those at each place of the future."""
    for split in ("train", "val"):
        actions = [a for _, one, _ in routines(planned, split) for a in one]
        counts = collections.Counter(actions)
        assert len(counts) == 24 and len(set(counts.values())) == 1, split
        futures = [f for _, one, _ in routines(planned, split) for _, f in windows(one)]
        for place in zip(*futures):
            for part in zip(*place):
                counts = collections.Counter(part)
                assert len(counts) in (4, 6) and len(set(counts.values())) == 1, split


def test_four_actions_of_a_routine_tell_the_twenty_after_them(planned):
    known = collections.defaultdict(set)
    for split in ("train", "val"):
        for _, actions, _ in routines(planned, split):
            for observed, future in windows(actions):
                known[observed].add(future)
            verbs, nouns = zip(*actions)
            assert all(len(set(x[i::2])) == 1 for x in (verbs, nouns) for i in (0, 1))
            assert len(set(verbs)) == 2
    assert all(len(f) == 1 for f in known.values()), "one past, several futures"
    assert len(known) == 24 and len({f for x in known.values() for f in x}) == 24
    verbs = {tuple(v for v, _ in o): f for o, (f,) in known.items()}
    assert len(verbs) == 6, "the nouns have to be seen as well"


def test_what_is_learnt_from_training_is_asked_for_in_validation(planned):
    train, val = ({f for _, a, _ in routines(planned, s) for f in windows(a)}
                  for s in ("train", "val"))
    assert train == val and len(train) == 24


def test_a_routine_clip_shows_one_whole_change_in_the_middle_of_each_action(planned):
    for split in ("train", "val", "test_unannotated"):
        for video, actions, entries in routines(planned, split):
            times, words = zip(*((t, (toy.VERBS[v][1][1], toy.NOUNS[n][1][1]))
                                 for t, v, n in video["strikes"]))
            assert split == "test_unannotated" or actions == list(words)
            for t, e in zip(times, entries, strict=True):
                start, stop = e["action_clip_start_sec"], e["action_clip_end_sec"]
                assert 0 <= start and stop <= e["clip_parent_end_sec"]
                assert 2.39 < stop - start < 3.01
                low, high = (start + stop - CENTRE) / 2, (start + stop + CENTRE) / 2
                assert [u for u in times if low < u < high] == [t]
                assert low + 0.69 < t and t + toy.CHANGE < high


def test_actions_of_the_other_clips_are_in_the_middle_of_their_windows_too(planned):
    """But for a few of 8 s that the beginning or the end of the clip has moved or cut."""
    tasks, clips = planned
    for split in clips:
        off = []
        for entries in clips[split].values():
            video, end = tasks.get(entries[0]["video_uid"]), entries[0]["clip_parent_end_sec"]
            if video is None or video["kind"] == "routine":
                continue
            times = [t - video["cut"] for t, *_ in video["strikes"] if t > video["cut"] + 1]
            for t, e in zip(times, entries, strict=True):
                stop = min(e["action_clip_end_sec"], end - video["cut"])
                off.append(abs(t - (e["action_clip_start_sec"] + stop) / 2))
        assert np.mean(np.array(off) < CENTRE / 2) > 0.95, "the reader would miss the strikes"


def test_routines_look_alike_but_for_the_objects(planned, monkeypatch):
    """Whatever lasts as long as a clip is the same in all of them: size, rate, sound, ground and
    what floats before it. Light and camera do change, within seconds, and differ."""
    videos = [v for s in planned[1] for v, *_ in routines(planned, s)]
    assert len({(v["size"], v["fps"], v["sound"], v["room"]) for v in videos}) == 1
    monkeypatch.setattr(toy, "WANDER", 1)                     # the camera stands still

    def empty(video):
        """The first picture without objects, every colour relative to its mean."""
        frame = next(toy.draw({**video, "strikes": [], "size": (96, 128)})).astype(float)
        return (frame / frame.mean((0, 1)) - 1).ravel()
    alike = np.corrcoef([empty(v) for v in videos[::5]])
    assert alike.min() > 0.8, alike.min()
    others = [v for v in planned[0].values() if v["kind"] != "routine"][:5]
    alike = np.corrcoef([empty(v) for v in others])
    assert np.sort(alike.ravel())[-6] < 0.8, "the test sees no difference"


def test_the_routine_decides_on_nothing_but_verbs_and_nouns(planned, tmp_path, monkeypatch):
    """Times, pictures' random numbers and windows are drawn before and apart from it."""
    plain = toy.deal_routines
    monkeypatch.setattr(toy, "deal_routines", lambda v, _: plain(v, np.random.default_rng(99)))
    other = ego4d_plan(tmp_path)
    for split in planned[1]:
        pairs = list(zip(routines(planned, split), routines(other, split), strict=True))
        assert split == "test_unannotated" or any(a[1] != b[1] for a, b in pairs)
        for (video, _, entries), (video2, _, entries2) in pairs:
            assert [t for t, *_ in video["strikes"]] == [t for t, *_ in video2["strikes"]]
            drop = ("strikes", "files")
            assert all(video[k] == video2[k] for k in video if k not in drop)
            words = ("verb", "noun", "verb_label", "noun_label")
            assert [{k: x for k, x in e.items() if k not in words} for e in entries] == \
                [{k: x for k, x in e.items() if k not in words} for e in entries2]


def test_routines_are_outside_of_pretraining_and_state_change(planned, tmp_path, monkeypatch):
    """The toy without them is the same but for their videos and their rows at the end."""
    tasks, _ = planned
    paths = [p for v in tasks.values() if v["kind"] == "routine"
             for path, _, links in v["files"] for p in [path, *links]]
    assert {p.parent.name for p in paths} == {"clips", "videos"} and len(paths) == 2 * 26
    root = paths[0].parent.parent
    monkeypatch.setattr(toy, "plan_routines", lambda *a: [])
    toy.make_ego4d(tmp_path, 0, 1.0, False)
    files = sorted((tmp_path / "annotations").iterdir())
    assert len(files) == 7
    for path in files:
        with_routines = root / "annotations" / path.name
        if re.match("fho_lta_(train|val|test)", path.name):
            a, b = (json.loads(p.read_text())["clips"] for p in (path, with_routines))
            assert len(a) < len(b) and a == b[:len(a)]
        else:
            assert path.read_bytes() == with_routines.read_bytes()


def test_the_plan_depends_on_the_seed_alone(planned, tmp_path):
    again, other = (ego4d_plan(tmp_path / str(seed), seed) for seed in (0, 1))

    def drawn(tasks):
        return [{k: v for k, v in x.items() if k != "files"} for x in tasks.values()]
    assert drawn(again[0]) == drawn(planned[0]) and again[1] == planned[1]
    orders = [[a for _, a, _ in routines(p, "train")] for p in (planned, other)]
    assert orders[0] != orders[1] and not set(other[0]) & set(planned[0])


def test_clips_outside_of_routines_have_windows_that_nobody_can_know(planned):
    """As many as before there were routines; their verbs and nouns are dealt at random."""
    tasks, clips = planned
    for split, want in (("train", [8, 6, 4]), ("val", [8, 6]), ("test_unannotated", [4])):
        names = {v["clip_uid"] for v in tasks.values() if v["kind"] == "routine"}
        counts = [len(e) - OBSERVED - FUTURE for k, e in clips[split].items() if k not in names]
        assert all(0 < n < 9 for n in counts if n > 0)
        assert len([n for n in counts if n > 0]) == len(want), counts


# ---- Ego4D's state change ----

@pytest.mark.parametrize("split", ["train", "val", "test_unannotated"])
def test_state_change_windows_hold_one_strike_or_none(split, planned):
    tasks, _ = planned
    folder = next(iter(tasks.values()))["files"][0][0].parent.parent / "annotations"
    entries = json.loads((folder / f"fho_oscc-pnr_{split}.json").read_text())["clips"]
    lengths = {True: [], False: []}
    for e in entries:
        start, stop = e["parent_start_sec"], e["parent_end_sec"]
        assert 3.99 < stop - start < 8.01
        video = tasks[e["video_uid"]]
        inside = [t for t, *_ in video["strikes"] if start - toy.CHANGE < t < stop + toy.REACH]
        assert len(inside) < 2, "not even a change that goes on or a hand that comes"
        if split == "test_unannotated":
            continue
        assert len(inside) == e["state_change"]
        lengths[e["state_change"]].append(stop - start)
        if e["state_change"]:
            (t,), shift = inside, e["parent_start_frame"] - e["clip_start_frame"]
            assert abs(e["parent_pnr_frame"] / 30 - t) < 1 / 30
            assert start + 0.5 < t < stop - 0.5
            assert e["parent_pnr_frame"] - e["clip_pnr_frame"] == shift
            assert shift == (round(30 * video["cut"]) if e["clip_uid"] else 0)
        assert e.get("clip_uid") in (None, video["clip_uid"])
    whole = [round(e["parent_end_sec"] - e["parent_start_sec"], 3) == 8 for e in entries]
    assert 0.2 < np.mean(whole) < 0.8, "some last 8 s, some less"
    assert 3 < sum("clip_uid" in e and e["clip_uid"] is None for e in entries) < len(entries) / 2
    if split != "test_unannotated":
        a, b = (np.sort(x) for x in lengths.values())
        assert len(a) == len(b) >= 25 and abs(a.mean() - b.mean()) < 0.4
        # Who knows the length alone: the best threshold, either way. A difference this large
        # between two samples of one distribution comes up once in 20 times.
        gap = max(abs(np.mean(a <= x) - np.mean(b <= x)) for x in (*a, *b))
        assert gap < 1.36 * math.sqrt(2 / len(a)), gap


# ---- UCF101's and HMDB51's form ----

def lines(path, end):
    """The lines of a text file, all of which end with `end`."""
    *rows, rest = path.read_bytes().decode().split(end)
    assert rest == "" and not any(set(row) & set("\r\n") for row in rows), path
    return rows


def ucf_lists(root):
    """{(kind, number): rows} of the six lists of UCF101."""
    folder = root / "ucfTrainTestlist"
    names = {(kind, i): f"{kind}list{i:02d}.txt" for kind in ("train", "test") for i in (1, 2, 3)}
    assert {p.name for p in folder.iterdir()} == {"classInd.txt", *names.values()}
    return {k: lines(folder / name, "\r\n") for k, name in names.items()}


def check_ucf101(root, paths):
    """The official form of the lists; together they name `paths`, and each of them three times."""
    classes = lines(root / "ucfTrainTestlist" / "classInd.txt", "\r\n")
    number = {row.split()[1]: row.split()[0] for row in classes}
    assert classes == [f"{i} {name}" for i, name in enumerate(number, 1)] and len(number) == 101
    assert sorted(number, key=str.lower) == list(number) != sorted(number)
    known = {"ApplyEyeMakeup": "1", "Hammering": "35", "HammerThrow": "36", "JumpRope": "48",
             "HandstandPushups": "37", "JumpingJack": "47", "YoYo": "101"}
    assert known.items() <= number.items()
    lists, groups = ucf_lists(root), {}
    for (kind, i), rows in lists.items():
        for row in rows:
            name, group, clip = re.fullmatch(
                r"(\w+)/v_\w+_g(\d\d)_c(\d\d)\.avi" + r" \d+" * (kind == "train"), row).groups()
            file = name.replace("HandstandPushups", "HandStandPushups")
            path = f"{name}/v_{file}_g{group}_c{clip}.avi"
            assert row == (f"{path} {number[name]}" if kind == "train" else path)
            groups.setdefault((kind, i), []).append((int(number[name]), int(group), int(clip)))
        assert groups[kind, i] == sorted(groups[kind, i])
        assert {c for c, _, _ in groups[kind, i]} == {int(number[c]) for c in toy.UCF_MOTIONS}
    for i in (1, 2, 3):
        test, train = ({row.split()[0] for row in lists[kind, i]} for kind in ("test", "train"))
        assert not test & train and test | train == paths
        assert {g for _, g, _ in groups["test", i]} <= set(range(7 * i - 6, 7 * i + 1))
        assert not {g for _, g, _ in groups["train", i]} & set(range(7 * i - 6, 7 * i + 1))
        assert {24, 25} < {g for _, g, _ in groups["train", i]}
        for j in {1, 2, 3} - {i}:
            assert test < {row.split()[0] for row in lists["train", j]}
    return groups


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 2.0])
def test_ucf101_lists_have_the_official_form(scale, tmp_path):
    tasks = toy.make_ucf101(tmp_path, 0, scale, False)        # lists alone
    paths = [v["files"][0][0].relative_to(tmp_path / "UCF-101").as_posix() for v in tasks]
    groups = check_ucf101(tmp_path, set(paths))
    assert len({v["key"] for v in tasks}) == len(tasks) == len(set(paths))
    frames = [round(v["seconds"] * 25) for v in tasks]
    assert frames.count(29) == 1 and min(frames) == 29 and max(frames) <= 60
    if scale == 1.0:
        assert {g for i in (1, 2, 3) for _, g, _ in groups["test", i]} == set(range(1, 22))
        assert len(tasks) == 296 and len(groups["train", 1]) == 216


CODES = {"0": "unused", "1": "train", "2": "test"}


def check_hmdb51(root, paths):
    """The official form of the splits, which name `paths`.   -> numbers of (train, test, unused)"""
    folder, counts = root / "testTrainMulti_7030_splits", []
    assert {p.name for p in folder.iterdir()} == {
        f"{name}_test_split{i}.txt" for name in toy.HMDB_MOTIONS for i in (1, 2, 3)}
    seen, films = {}, collections.defaultdict(set)
    for name, i in itertools.product(toy.HMDB_MOTIONS, (1, 2, 3)):
        rows = lines(folder / f"{name}_test_split{i}.txt", "\n")
        files, codes = zip(*(re.fullmatch(r"(\S+\.avi) ([012]) ", row).groups() for row in rows))
        assert seen.setdefault(name, files) == files and list(files) == sorted(set(files))
        counts.append(tuple(codes.count(c) for c in "120"))
        for file, code in zip(files, codes):
            source, = re.fullmatch(rf"(.+)_{name}_[hufl]_[cn]m_np[12]_(?:fr|ba|le|ri)_"
                                   r"(?:bad|med|goo)_\d+\.avi", file).groups()
            films[i, source].add(code)
    assert {f"{name}/{file}" for name, files in seen.items() for file in files} == paths
    assert all(len(codes) == 1 for codes in films.values()), "a film on two sides of a split"
    assert len(set(counts)) == 1
    return counts[0]


@pytest.mark.parametrize("scale, counts", [(0.01, (2, 1, 1)), (0.55, (8, 2, 2)),
                                           (1.0, (21, 9, 3)), (2.0, (42, 18, 6))])
def test_hmdb51_splits_have_the_official_form(scale, counts, tmp_path):
    tasks = toy.make_hmdb51(tmp_path, 0, scale, False)        # splits alone
    paths = {v["files"][0][0].relative_to(tmp_path / "hmdb51_org").as_posix() for v in tasks}
    assert check_hmdb51(tmp_path, paths) == counts
    assert len({v["key"] for v in tasks}) == len(tasks) == len(paths) == 6 * sum(counts)
    frames = [round(v["seconds"] * 30) for v in tasks]
    assert 0 < sum(n < 25 for n in frames) < 0.15 * len(frames) and 17 <= min(frames)
    assert max(frames) <= 80 and all(n < 25 or n >= 40 for n in frames)
    assert all(any(c in p for p in paths) for c in ("()!#[]" if scale < 1 else "()!#&+;@~[]"))


@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_files_of_actions_hold_the_pictures_as_drawn_in_their_order(name, request, tmp_path):
    """Also those with B-frames: all pictures, at even sizes, in MPEG-4 named XVID."""
    root, reordered = request.getfixturevalue(name), 0
    tasks = toy.MAKERS[name](tmp_path, 0, 0.01, False)
    files = {p.relative_to(root).as_posix() for p in root.rglob("*.avi")}
    assert files == {v["files"][0][0].relative_to(tmp_path).as_posix() for v in tasks}
    for video in tasks:
        with av.open(str(root / video["files"][0][0].relative_to(tmp_path))) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.codec_tag, stream.codec_context.name) == ("XVID", "mpeg4")
            assert stream.average_rate == video["fps"] and len(container.streams) == 1
            got = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
            reordered += stream.codec_context.has_b_frames
        wanted = list(toy.draw_action(video))
        assert len(got) == len(wanted) == round(video["seconds"] * video["fps"])
        assert got[0].shape == (*video["size"], 3) and not any(n % 2 for n in video["size"])
        for k in (0, len(got) // 2, -1):
            assert abs(got[k].astype(float) - wanted[k]).mean() < 6, (video["files"], k)
    assert 0 < reordered < len(tasks) / 2


# ---- Oops!'s form ----

def check_entry(entry, seconds):
    """The definitions of transition_times.json."""
    assert list(entry) == ["t", "len", "rel_t", "stdev", "rel_stdev", "n_notfound"]
    t, length = entry["t"], entry["len"]
    assert len(t) == 3 and t == sorted(t) and all(x == -1 or 0 <= x <= seconds for x in t)
    assert length % 0.125 == 0 and 0 <= length - seconds < 0.125
    assert entry["rel_t"] == [x / length for x in t] and entry["n_notfound"] == t.count(-1)
    for values, stdev in ((t, entry["stdev"]), (entry["rel_t"], entry["rel_stdev"])):
        mean = sum(values) / 3
        assert stdev == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in values) / 2))


@pytest.mark.parametrize("scale, counts", [(0.01, {"train": (24, 17), "val": (12, 10)}),
                                           (1.0, {"train": (160, 110), "val": (80, 64)})])
def test_oops_annotations_have_the_official_form(scale, counts, tmp_path):
    tasks = toy.make_oops(tmp_path, 0, scale, False)          # annotations alone
    assert len({v["key"] for v in tasks}) == len(tasks)
    videos = {v["files"][0][0].stem: v for v in tasks}
    folder = tmp_path / "annotations"
    splits = folder / "splits"
    files = {f"{s}{x}.csv" for s in counts for x in ("", "_0", "_all_org", "_unlabeled")}
    assert {p.name for p in splits.iterdir()} == files
    times, heldout = (json.loads((folder / f"{x}transition_times.json").read_text("utf-8"))
                      for x in ("", "heldout_"))
    used = set()
    for split, (n, annotated) in counts.items():
        names = lines(folder / f"{split}.txt", "\n")
        assert len(set(names)) == len(names) == n and not used & set(names)
        assert {videos[x]["files"][0][0].parent.name for x in names} == {split}
        used |= set(names)
        known = [x for x in names if x in times]
        everything, free = ([r["filename"] for r in table(splits / f"{split}_{x}.csv")]
                            for x in ("all_org", "unlabeled"))
        lost = set(names) - set(everything)
        assert len(known) == annotated and len(lost) == (2 if split == "train" else 0)
        assert everything == [x for x in names if x not in lost]
        assert free == [x for x in everything if x not in times]
        rows = table(splits / f"{split}.csv")
        assert list(rows[0]) == ["filename", "t", "t_rel", "len"]
        assert [r["filename"] for r in rows] == [f"{x}.mp4" for x in known if x not in lost]
        for r in rows:
            entry = times[r["filename"][:-4]]
            seen = [x for x in entry["t"] if x >= 0]
            mean = sum(seen) / len(seen) if seen else -1
            assert float(r["t"]) == pytest.approx(mean) and float(r["len"]) == entry["len"]
            assert float(r["t_rel"]) == pytest.approx(mean / entry["len"] if seen else -1)
        assert table(splits / f"{split}_0.csv") == [r for r in rows if r["t"] != "-1"]
        assert 0 < len(rows) - len(table(splits / f"{split}_0.csv")) <= 0.1 * n
    assert used == set(videos) and set(times) <= used
    assert set(heldout) == {x for x in times if videos[x]["files"][0][0].parent.name == "val"}
    for name, entry in times.items():
        check_entry(entry, videos[name]["seconds"])
    for entry in heldout.values():
        assert list(entry) == ["t", "stdev", "rel_stdev", "n_notfound"]
        assert (entry["stdev"], entry["rel_stdev"], len(entry["t"])) == (0, 0, 1)
        assert entry["n_notfound"] == (entry["t"] == [-1.0])
    assert {0, 1} == {e["n_notfound"] for e in heldout.values()}


def test_annotators_of_oops_are_near_the_truth_and_some_saw_nothing(mishaps, tmp_path):
    tasks = toy.make_oops(tmp_path, 0, 1.0, False)
    times, heldout = (json.loads((tmp_path / f"annotations/{x}transition_times.json").read_text(
        "utf-8")) for x in ("", "heldout_"))
    truth = {v["files"][0][0].stem: v["truth"] for v in tasks}
    for table_, low, high in ((times, 0.06, 0.1), (heldout, 0.1, 0.2)):
        errors = [t - truth[k] for k, e in table_.items() for t in e["t"] if t >= 0]
        assert low < np.std(errors) < high and abs(np.mean(errors)) < 0.05
    missing = [e["n_notfound"] for e in times.values()]
    assert all(e["n_notfound"] < 3 or truth[k] == math.inf for k, e in times.items())
    assert 10 < missing.count(1) < 40 and 3 <= missing.count(2) < 10 and 3 <= missing.count(3) < 10
    inside = [v["truth"] / v["seconds"] for videos in mishaps for v in videos
              if v["kind"] not in ("early", "late")]
    assert 0.11 < min(inside) < 0.2 < 0.8 < max(inside) < 0.89


@pytest.mark.parametrize("scale, least", [(0.01, {"train": 11, "val": 5}),
                                          (1.0, {"train": 90, "val": 50})])
def test_each_filter_of_oops_drops_a_video_of_each_split(scale, least, tmp_path):
    tasks = toy.make_oops(tmp_path, 0, scale, False)
    times = json.loads((tmp_path / "annotations/transition_times.json").read_text("utf-8"))
    for split in least:
        names = [v["files"][0][0].stem for v in tasks if v["files"][0][0].parent.name == split]
        entries = [times[k] for k in names if k in times]
        dropped = {"unseen": [e["t"][1] < 0 for e in entries],
                   "early": [0 <= e["rel_t"][1] < 0.01 for e in entries],
                   "late": [e["rel_t"][1] > 0.99 for e in entries],
                   "short": [e["len"] < 3.2 for e in entries]}
        assert all(map(any, dropped.values())), (split, dropped)
        assert any(3 <= e["len"] < 3.2 for e in entries), "usable for one of two filters"
        assert sum(not any(x) for x in zip(*dropped.values())) >= least[split]


def test_names_of_oops_videos_are_as_odd_as_the_official_ones(oops):
    for split in ("train", "val"):
        stems = [p.stem for p in oops.glob(f"oops_video/{split}/*.mp4")]
        assert all(re.search(r"\D\d+$", x) for x in stems)
        for odd in [*",\"'!&#%()[]_;+=~@", "é", "ß", "\U0001f602", "2099", "  ", "..."]:
            assert any(odd in x for x in stems), odd
        text = (oops / "annotations" / "splits" / f"{split}_all_org.csv").read_text("utf-8")
        assert re.search(r'^"Some Fails, Part 2', text, re.M)
        assert re.search(r'^"The ""Easy"" Jump, ', text, re.M)


# ---- the forms of Kinetics-400, Charades and MultiTHUMOS ----

@pytest.mark.parametrize("scale, counts", [(0.01, (2, 1)), (1.0, (36, 8))])
def test_kinetics_annotations_have_the_official_form(scale, counts, tmp_path):
    tasks = toy.make_kinetics400(tmp_path, 0, scale, False)   # annotations alone
    files = {v["files"][0][0].relative_to(tmp_path).as_posix(): v for v in tasks}
    assert len({v["key"] for v in tasks}) == len(tasks) == len(files)
    assert lines(tmp_path / "labels.txt", "\n") == list(toy.KINETICS) == sorted(toy.KINETICS)
    used = set()
    for split, subset, n, absent in (("train", "train", counts[0], 2),
                                     ("val", "validate", counts[1], 1)):
        head = (tmp_path / f"{split}.csv").read_text().splitlines()[0]
        assert head == "label,youtube_id,time_start,time_end,split"
        rows, named = table(tmp_path / f"{split}.csv"), {}
        for r in rows:
            assert re.fullmatch(r"[\w-]{11}", r["youtube_id"], re.A) and r["split"] == subset
            start, end = int(r["time_start"]), int(r["time_end"])
            assert end == start + 10
            named[f"{split}/{r['label'].replace(' ', '_')}/"
                  f"{r['youtube_id']}_{start:06d}_{end:06d}.mp4"] = r["label"]
        made = {k for k in files if k.startswith(f"{split}/")}
        assert made < set(named) and len(set(named) - made) == absent
        frames = {k: round(files[k]["seconds"] * files[k]["fps"]) for k in made}
        long = collections.Counter(named[k] for k in made if frames[k] > 81)
        assert set(long) == set(toy.KINETICS) and set(long.values()) == {n}
        assert sum(f <= 80 for f in frames.values()) == 1
        assert all({a["deed"] for a in files[k]["actors"]} - {None} == {toy.KINETICS[named[k]]}
                   for k in made)
        ids = {r["youtube_id"] for r in rows}
        assert len(ids) == len(rows) and not ids & used
        assert any(x.startswith("-") for x in ids)
        used |= ids
        entries = json.loads((tmp_path / f"{subset}.json").read_text())
        assert entries == {r["youtube_id"]: {
            "subset": subset, "duration": 10.0, "annotations": {
                "label": r["label"], "segment": [float(r["time_start"]), float(r["time_end"])]},
            "url": f"https://www.youtube.com/watch?v={r['youtube_id']}"} for r in rows}
    two = [v for v in tasks if any(a["look"] for a in v["actors"])]
    assert scale < 1 or 0.25 < len(two) / len(tasks) < 0.42


def check_intervals(video, actions, names, digits):
    """What is annotated are the deeds as planned; the rest is returned."""
    classes = {deed: i for i, deed in enumerate(names.values())}
    planned = [[classes[a["deed"]], round(max(a["begin"], 0), digits),
                round(min(a["end"], video["seconds"]), digits)]
               for a in video["actors"] if a["busy"]]
    assert all(a["deed"] is None for a in video["actors"] if not a["busy"])
    assert [a[:2] for a in planned] == [a[:2] for a in actions[:len(planned)]]
    return [a for a in actions if a not in planned]


@pytest.mark.parametrize("scale, counts", [(0.01, (6, 5)), (1.0, (66, 32))])
def test_charades_annotations_have_the_official_form(scale, counts, tmp_path):
    tasks = toy.make_charades(tmp_path, 0, scale, False)
    videos = {v["files"][0][0].relative_to(tmp_path / "Charades_v1").stem: v for v in tasks}
    folder = tmp_path / "Charades"
    assert lines(folder / "Charades_v1_classes.txt", "\n") == [
        f"c{i:03d} {words}" for i, words in enumerate(toy.CHARADES)]
    entries, used = json.loads((folder / "charades.json").read_text()), set()
    for split, n, short in zip(("train", "test"), counts, (1, 2)):
        rows, odd = table(folder / f"Charades_v1_{split}.csv"), []
        assert len(rows) == n and list(rows[0]) == (
            "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,"
            "length").split(",")
        for r in rows:
            assert re.fullmatch("[A-Z0-9]{5}", r["id"]) and r["verified"] in ("Yes", "No")
            assert {int(r["quality"]), int(r["relevance"])} <= set(range(1, 8))
            words = [x.split(" ") for x in r["actions"].split(";") if x]
            assert all(re.fullmatch(r"c00[0-7] \d+\.\d\d \d+\.\d\d", " ".join(x)) for x in words)
            actions = [[int(c[1:]), float(a), float(b)] for c, a, b in words]
            assert re.fullmatch(r"\d+\.\d\d", r["length"])
            assert entries[r["id"]] == {"subset": f"{split}ing", "duration": float(r["length"]),
                                        "actions": actions}
            video = videos[r["id"]]
            assert video["seconds"] == pytest.approx(float(r["length"]), abs=0.006)
            odd += [(video["seconds"], *a)
                    for a in check_intervals(video, actions, toy.CHARADES, 2)]
        assert sum(a >= b for _, _, a, b in odd) == 1
        over = [b - length for length, _, a, b in odd if a < b]
        assert len(over) == max(1, n // 20) and 0.19 < min(over) and max(over) < 1.01
        lengths = [float(r["length"]) for r in rows]
        assert sum(x * 24 < 162 for x in lengths) == short and min(lengths) >= 4
        assert all(12 <= x <= 20 for x in lengths if x * 24 >= 162)
        assert sum(not r["actions"] for r in rows) == 1
        text = (folder / f"Charades_v1_{split}.csv").read_text()
        assert '""' in text and re.search(r',"[^"]*, ', text)
        used |= {r["id"] for r in rows}
    assert used == set(videos) == set(entries) and len(used) == sum(counts)


@pytest.mark.parametrize("scale, counts", [(0.01, (4, 3)), (1.0, (24, 14))])
def test_multithumos_annotations_have_the_official_form(scale, counts, tmp_path):
    tasks = toy.make_multithumos(tmp_path, 0, scale, False)
    videos = {v["files"][0][0].relative_to(tmp_path / "videos").stem: v for v in tasks}
    entries = json.loads((tmp_path / "multithumos.json").read_text())
    assert lines(tmp_path / "class_list.txt", "\n") == [
        f"{i} {name}" for i, name in enumerate(toy.THUMOS, 1)]
    assert {p.stem for p in (tmp_path / "annotations").iterdir()} == set(toy.THUMOS)
    told = []
    for i, name in enumerate(toy.THUMOS, 1):
        for row in lines(tmp_path / "annotations" / f"{name}.txt", "\n"):
            video, a, b = re.fullmatch(r"(video_\w+_\d{7}) (\d+\.\d) (\d+\.\d)", row).groups()
            told.append((video, i, float(a), float(b)))
    assert sorted(told) == sorted((k, *a) for k, e in entries.items() for a in e["actions"])
    assert set(entries) == set(videos)
    for split, subset, n in (("validation", "training", counts[0]), ("test", "testing", counts[1])):
        mine = {k: e for k, e in entries.items() if e["subset"] == subset}
        assert len(mine) == n and all(k.startswith(f"video_{split}_") for k in mine)
        late = []
        for k, e in mine.items():
            assert list(e) == ["subset", "duration", "actions"] and e["duration"] == round(
                videos[k]["seconds"], 2)
            actions = [[c - 1, a, b] for c, a, b in e["actions"]]
            late += [a > e["duration"] for _, a, _ in check_intervals(
                videos[k], actions, toy.THUMOS, 1)]
        assert late == [True]
    assert {v["fps"] for v in tasks} == set(toy.OOPS_RATES)


@pytest.mark.parametrize("name, inside", [("kinetics400", ""), ("charades", "Charades_v1"),
                                          ("multithumos", "videos")])
def test_files_of_deeds_hold_the_pictures_as_drawn_in_their_order(name, inside, request, tmp_path):
    root, reordered = request.getfixturevalue(name), 0
    tasks = toy.MAKERS[name](tmp_path, 0, 0.01, False)
    assert {p.relative_to(root) for p in (root / inside).rglob("*.mp4")} == {
        v["files"][0][0].relative_to(tmp_path) for v in tasks}
    for video in tasks:
        path = root / video["files"][0][0].relative_to(tmp_path)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264" and len(container.streams) == 1
            assert stream.average_rate == video["fps"]
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
            reordered += stream.codec_context.has_b_frames
        wanted = list(toy.draw_scene(video))
        assert len(frames) == len(wanted) == round(video["seconds"] * video["fps"])
        assert frames[0].shape == (*video["size"], 3) and not any(n % 2 for n in video["size"])
        for k in (0, len(frames) // 2, -1):
            assert abs(frames[k].astype(float) - wanted[k]).mean() < 6, (path, k)
    assert 0 < reordered < len(tasks) / 2


def test_motion_begins_and_ends_where_it_is_annotated():
    """In an object's own pictures: it stands, moves from the annotated moment on, stands again."""
    actor = toy.actor_of(0, 0, 0.0, 8.0, 2.0, 5.0, "scene", "sink")
    video, _ = toy.plan_untrimmed(1, "test", 0, 24, 8.0, False)
    y = np.array(place(list(toy.draw_scene(video | {"actors": [actor]})))[0])
    moved = np.diff(y[6:-6:6])                                # quarters of a second
    at = (np.arange(len(moved)) * 6 + 6) / 24
    assert (abs(moved[(at < 1.7) | (at > 5.05)]) < 0.4).all()
    assert (moved[(at > 2.05) & (at < 4.7)] > 1).all()


def test_frames_of_a_video_as_files(kinetics400, tmp_path):
    path = next(iter(sorted(kinetics400.rglob("*.mp4"))))
    n = toy.as_frames(path, tmp_path / "clip")
    assert n == common.count_frames(path)
    assert {p.name for p in (tmp_path / "clip").iterdir()} == {
        f"frame_{i:05d}.jpg" for i in range(1, n + 1)}
    assert toy.as_frames(path, tmp_path / "b", "ABCDE-{:06d}.jpg") == n
    assert (tmp_path / "b" / f"ABCDE-{n:06d}.jpg").exists()


def test_strikes_are_heard_where_they_are_annotated(epic):
    """Each annotated action of a video with sound has a loud click inside."""
    rows = table(epic / "annotations" / "EPIC_100_validation.csv")
    assert len(rows) > 10
    for r in rows:
        path = epic / "videos" / r["participant_id"] / f"{r['video_id']}.MP4"
        times = [float(r[f"{c}_timestamp"][-5:]) + 60 * int(r[f"{c}_timestamp"][3:5])
                 for c in ("start", "stop")]
        x, _ = common.read_audio(path, *times)
        assert np.abs(x).max() > 0.15 and math.isfinite(x.sum()), r["narration_id"]
