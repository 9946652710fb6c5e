"""Draw small copies of the eight datasets: official folders, names, codecs and annotation files.

    python tests/toy.py --out data/toy                all of them, a minute on two cores
    python tests/toy.py --out data/toy epic ego4d     two of them

Four worlds, in which a single frame tells nothing: place, size, angle, colours, ground are random
and alike for all classes. What tells the class is how something moves, changes and sounds.

strikes   EPIC-KITCHENS-100, Ego4D. A hand strikes an object, which changes, with a sound. The verb
          is what changes (it moves up or down, grows, shrinks, shakes, spins) and the pitch. The
          noun is the course of the change and the timbre. Other objects may slide in, silently.
          In some videos of Ego4D, routines, two verbs take turns, so four actions tell the next
          twenty; others are quiet, for the change of state. Neither has sound or pre-trains.
actions   UCF101, HMDB51. Classes are pairs, each the other one played backwards. Three objects have
          a height, a size, a distance from their middle and a length. One of the four runs through
          its range in about a second; then three other objects begin anew.
mishaps   Oops!. An object rolls, walks or carries another one. From a known moment on kicks throw
          it about. Every frame is distributed alike before and after; a second of motion tells.
deeds     Kinetics-400, Charades, MultiTHUMOS. Objects appear, rest, do one of eight things, rest
          and fade. In Kinetics one object does the same again and again; in the long videos two
          objects act at a time, and nothing tells which action comes next.

Only videos of a group of UCF101 or a film of HMDB51 share objects and ground; all routines are in
one room. All random numbers come from (seed, dataset, number of the video): the same seed makes the
same files with any number of processes.
"""

import argparse
import csv
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
import uuid
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import av
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.signal import lfilter

RATES = [Fraction(25), Fraction(30000, 1001), Fraction(30)]       # frames per second


# ---- writing a video ---------------------------------------------------------------------------

def write_video(path, frames, fps, audio=None, rate=44100, codec="libx264", options=None, gop=None,
                tag=None):
    """Write frames, an iterable of (H, W, 3) uint8, and audio, float32 (channels, n) or None.

    gop: frames from one key frame to the next. One thread: more would write other bytes elsewhere.
    """
    fps, frames = Fraction(fps), iter(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(frames)
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=fps, options=dict(options or {}))
        video.height, video.width = first.shape[:2]
        video.pix_fmt, video.codec_context.thread_count = "yuv420p", 1
        video.gop_size = gop or round(fps)
        if tag:
            video.codec_context.codec_tag = tag
        if audio is not None:
            layout = ("mono", "stereo")[len(audio) - 1]
            fast = {"aac_coder": "fast", "aac_tns": "0", "aac_is": "0", "aac_pns": "0"}
            sound = container.add_stream("aac", rate=rate, layout=layout, options=fast)
            sound.bit_rate = 40000
        for i, pixels in enumerate(itertools.chain([first], frames)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, 1 / fps
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:                            # the container sorts the packets by time
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio), "fltp", layout)
            frame.pts, frame.sample_rate, frame.time_base = 0, rate, Fraction(1, rate)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([columns, *rows])


def write_lines(path, lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


# ---- drawing: one engine for the four worlds ---------------------------------------------------

SHAPES = {  # inside of a shape in the unit circle, at (u, v) = r (cos a, sin a)
    "disc": lambda u, v, r, a: r < 0.9,
    "box": lambda u, v, r, a: np.maximum(abs(u), abs(v)) < 0.72,
    "triangle": lambda u, v, r, a: np.maximum(v, abs(u) * 0.87 - v / 2) < 0.5,
    "cross": lambda u, v, r, a: (np.minimum(abs(u), abs(v)) < 0.32) & (r < 0.98),
    "star": lambda u, v, r, a: r < 0.68 + 0.28 * np.cos(5 * a),
    "ring": lambda u, v, r, a: (r < 0.95) & (r > 0.4),
    "hand": lambda u, v, r, a: np.hypot(np.maximum(abs(u) - 0.72, 0), v) < 0.26}
OBJECT, HAND, GROUND = (215, 236), (60, 120), 55                  # grey levels
CAMERA = {  # world: pixels the camera strays from the middle, does the light change
    "strikes": (16, True), "actions": (6, False), "mishaps": (4, False), "deeds": (2, False)}
ANGLES = 48                                      # that are drawn, and radii by thirds of a pixel


class Thing(NamedTuple):
    """An object from frame `first` on: arrays over its frames, in pixels and radians."""
    sprite: np.ndarray                                        # (64 * 64, 4)
    first: int
    y: np.ndarray
    x: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    length: np.ndarray | float = 1.0                          # over its breadth; the area stays
    solid: np.ndarray | float = 1.0                           # 0 to 1, while it appears or fades


def plan(name, k, seed, world, size, fps, seconds, coding, **details):
    """Video number k of a dataset. What happens in it is in `details`, other ones in each world.

    key: seed of its random numbers; size: (height, width); coding: keywords of `write_video`;
    cut: seconds that the file leaves out at the beginning; paths: all names of the file.
    """
    fps = Fraction(fps)
    return {"key": (seed, crc32(name.encode()), k), "world": world, "size": size, "fps": fps,
            "seconds": float(round(seconds * fps) / fps), "coding": coding, "cut": 0.0,
            "paths": [], **details}


def random_of(seed, name, *numbers):
    """Random numbers of a dataset, a split or a video."""
    return np.random.default_rng((seed, crc32(name.encode()), *numbers, 9))     # 0 would be cut off


def even_quality(k, gop):
    """Coding with the same quality for all frames, because blur would tell speeds."""
    order = {"bf": "2"} if k % 6 == 0 else {}            # B-frames: not in the order of time
    return {"options": {"preset": "ultrafast", "qp": "22", **order}, "gop": gop}


def deal(rng, things):
    """The things in random order, again and again: all equally often."""
    while True:
        yield from reversed([things[i] for i in rng.permutation(len(things))])


def frame_times(video):
    return np.arange(round(video["seconds"] * video["fps"])) / float(video["fps"])


def draw(video):
    """The frames of a video, one (H, W, 3) uint8 array after the other."""
    rng = np.random.default_rng((*video["key"], 1))
    room = np.random.default_rng(video["room"]) if video.get("room") else rng
    (h, w), (stray, flickers) = video["size"], CAMERA[video["world"]]
    times = frame_times(video)
    noise = gaussian_filter(room.normal(size=(h + 2 * stray, w + 2 * stray)), 4)
    ground = GROUND * (1 + room.uniform(0.05, 0.3) * noise / noise.std()).clip(0.4, 1.6)
    ground = ground.astype(np.float32)[..., None]
    phase = rng.random(3) + flickers * times[:, None] / rng.uniform(3, 8, 3)
    light = (0.8 + 0.2 * np.sin(2 * np.pi * phase)).astype(np.float32)     # else colours would tell
    pan = np.stack([wander(rng, times, stray - 1) for _ in range(2)])      # the video
    tops, lefts = (pan + stray).round().astype(int).tolist()
    things, drawn = list(WORLDS[video["world"]](rng, room, video, times, pan)), {}
    for i in range(len(times)):
        frame = ground[tops[i]:tops[i] + h, lefts[i]:lefts[i] + w].repeat(3, 2)
        for thing in things:
            if 0 <= i - thing.first < len(thing.y):
                paste(frame, thing, i - thing.first, drawn)
        yield (frame * light[i]).astype(np.uint8)


def paste(frame, thing, j, drawn):
    """Draw a thing into its j-th frame. Looks that cannot be told apart are drawn once."""
    length, solid = (v if isinstance(v, float) else v[j] for v in (thing.length, thing.solid))
    look = (id(thing.sprite), round(3 * thing.radius[j]),
            round(ANGLES * thing.angle[j] / (2 * np.pi)) % ANGLES, round(8 * length))
    if look not in drawn:
        patch = turned(thing.sprite, look[1] / 3, look[2] * 2 * np.pi / ANGLES, look[3] / 8)
        drawn[look] = patch[..., :3].copy(), patch[..., 3:].repeat(3, 2)
    colour, free = drawn[look]
    top, left = round(thing.y[j]) - len(free) // 2, round(thing.x[j]) - free.shape[1] // 2
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + len(free), len(frame)), min(left + free.shape[1], frame.shape[1])
    if y0 < y1 and x0 < x1:
        part = np.s_[y0 - top:y1 - top, x0 - left:x1 - left]
        colour, free = colour[part], free[part]
        if solid < 1:
            colour, free = solid * colour, 1 - solid * (1 - free)
        frame[y0:y1, x0:x1] = frame[y0:y1, x0:x1] * free + colour


def turned(sprite, radius, angle, length):
    """The sprite at this size, angle and length, (n, m, 4)."""
    longer, c, s = math.sqrt(length), math.cos(angle), math.sin(angle)
    y, x = (np.arange(-n, n + 1) / (1.05 * radius) for n in (
        int(radius * math.hypot(s * longer, c / longer)) + 1,
        int(radius * math.hypot(c * longer, s / longer)) + 1))
    u = (x * c / longer + (y * s / longer)[:, None]) * 32 + 32
    v = (y[:, None] * c - x * s) * longer * 32 + 32
    return sprite[64 * v.astype(int).clip(0, 63) + u.astype(int).clip(0, 63)]


def make_sprite(rng, kind=None):
    """A shape with a two-coloured texture.   -> (64 * 64, 4): colour times alpha, 1 - alpha"""
    v, u = np.mgrid[-1.05:1.05:64j, -1.05:1.05:64j]
    if kind == "hand":
        colours = rng.uniform(*HAND) + np.zeros((2, 3))
    else:                                                # two tones, so that turning can be seen
        kind = rng.choice([*SHAPES][:-1])
        colours = (rng.uniform(*OBJECT) - np.array([[0], [75]])) * rng.uniform(0.75, 1, 3)
    field = gaussian_filter(rng.normal(size=(64, 64)), rng.uniform(3, 7))
    field += field.std() * rng.uniform(0.5, 1.5) * np.where(u * rng.normal() + v > 0, 1, -1)
    mix = 1 / (1 + np.exp(-4 * field / field.std()))[..., None]
    inside = SHAPES[kind](u, v, np.hypot(u, v), np.arctan2(v, u))
    alpha = gaussian_filter(inside.astype(float), 0.8)[..., None]
    colour = np.clip(colours[0] * mix + colours[1] * (1 - mix), 16, 236)
    return np.concatenate([colour * alpha, 1 - alpha], -1).astype(np.float32).reshape(4096, 4)


def wander(rng, times, reach):
    """A slow smooth path of up to `reach` pixels from 0."""
    waves = times[:, None] / rng.uniform(5, 18, 3) + rng.random(3)
    return np.sin(2 * np.pi * waves) @ np.array([0.5, 0.3, 0.2]) * reach


# ---- strikes: what EPIC-KITCHENS-100 and Ego4D show --------------------------------------------

TRAVEL, GROWTH = 0.36, 1.8           # up, down: part of the height; grow, shrink: of the radius
SWING, TURN = 0.16, 0.5              # shake: part of the height; spin: turns
SIZE = (0.2, 0.27)                   # radius of an object, part of the height, before GROWTH
REACH, SLIDE = 0.7, 0.4              # seconds a hand needs to come or go, an object to slide
CHANGE = 0.9                         # seconds after which every change is over
KEEP = 0.5                           # how often a fitting object is struck again

VERBS = {  # change: (EPIC class, its words), (Ego4D class, its word), start state (low, large)
    "up": ((0, ["lift", "raise"]), (41, "lift_(lift,_raise)"), (1, 0)),
    "down": ((1, ["lower", "let-down"]), (43, "lower_(lower,_let_down)"), (-1, 0)),
    "grow": ((4, ["inflate", "stretch"]), (17, "inflate_(inflate,_stretch)"), (0, -1)),
    "shrink": ((9, ["squeeze", "compress"]), (82, "squeeze_(squeeze,_compress)"), (0, 1)),
    "shake": ((13, ["shake", "jiggle"]), (74, "shake_(shake,_jiggle)"), (0, 0)),
    "spin": ((21, ["turn", "spin-round"]), (105, "turn_(turn,_spin)"), (0, 0))}
NOUNS = {  # course of the change: (EPIC class, its words), (Ego4D class, its word), s in contact
    "rigid": ((3, ["lid", "steel lid"]), (12, "lid_(lid,_cover)"), 0.5),
    "viscous": ((15, ["dough", "bread dough"]), (150, "dough_(dough,_paste)"), 0.8),
    "elastic": ((21, ["sponge", "rubber sponge"]), (301, "sponge_(sponge,_rubber)"), 0.8),
    "brittle": ((103, ["cracker", "rice cracker"]), (467, "cracker_(cracker,_crisp)"), 0.5)}
PITCH = {  # verb: pitch and loudness; s: share of the ring that has passed, t: seconds
    "up": (lambda s, t: 0.6 * 3**s, lambda s, t: 1),
    "down": (lambda s, t: 1.8 * 3**-s, lambda s, t: 1),
    "grow": (lambda s, t: 0.4, lambda s, t: 0.2 + 0.8 * s),
    "shrink": (lambda s, t: 2.5, lambda s, t: 1 - 0.8 * s),
    "shake": (lambda s, t: 1, lambda s, t: 0.5 + 0.5 * np.cos(2 * np.pi * 8 * t)),
    "spin": (lambda s, t: 1 + 0.35 * np.sin(2 * np.pi * 7 * t), lambda s, t: 1)}
TIMBRE = {  # noun: seconds, overtones, share of noise, envelope
    "rigid": (0.22, (1,), 0.0, lambda t: np.exp(-t / 0.1)),
    "viscous": (0.60, (1, 0.3), 0.9, lambda t: np.exp(-t / 0.6)),
    "elastic": (0.60, (1, 0.5, 0.3), 0.0, lambda t: np.exp(-(t % 0.2) / 0.06 - t / 0.4)),
    "brittle": (0.75, (1, 0, 0.6, 0, 0.4), 0.0, lambda t: np.exp(-(t % 0.25) / 0.05))}
BASE_PITCH, RING, CLICK, HUM = 700, 0.2, 0.6, 0.003               # Hz, three amplitudes
COURSE = {  # noun: how far a change is u seconds after the strike, 0 before it, 1 in the end
    "rigid": lambda u: np.clip(u / 0.5, 0, 1) ** 3,
    "viscous": lambda u: np.clip(u / 0.8, 0, 1),
    "elastic": lambda u: np.where(u > 0.85, 1.0, 1 - (        # overshoots, swings into place
        np.exp(-np.maximum(u, 0) / 0.3) * np.cos(2 * np.pi * 2.5 * np.maximum(u, 0)))),
    "brittle": lambda u: np.clip(np.floor(u / 0.25 + 1e-6) + 1, 0, 3) / 3}
GAPS = {  # kind of video: seconds from the i-th strike to the next
    "normal": lambda rng, i: 2.2 + 4 * rng.beta(1, 3.2),
    "dense": lambda rng, i: rng.uniform(1.95, 2.3),
    "calm": lambda rng, i: rng.uniform(9.8, 11) if i % 3 == 1 else rng.uniform(4.4, 6.5),
    "routine": lambda rng, i: rng.uniform(1.6, 1.9),
    "quiet": lambda rng, i: rng.uniform(9.8, 10.6)}


def swing(noun, u):
    """Sideways displacement of a shaken object, in the rhythm of COURSE."""
    length = {"rigid": 0.25, "viscous": 0.75, "elastic": 0.8, "brittle": 0.75}[noun]
    how = {"elastic": np.exp(-np.maximum(u, 0) / 0.3), "brittle": u % 0.25 < 0.15}.get(noun, 1)
    return (u >= 0) * (u < length) * how * np.sin(2 * np.pi * 4 * u)


def lay_out(rng, strikes):
    """Which object is there from when to when, and which strikes it gets."""
    objects = []

    def bring(moment, low, large):
        """A new object slides in at a moment and the last one slides out."""
        if objects:
            objects[-1]["leave"] = moment
        low, large = low or rng.choice([-1, 1]), large or rng.choice([-1, 1])
        objects.append({"arrive": moment, "leave": math.inf, "low": low, "large": large,
                        "now": [low, large], "strikes": []})

    for i, (t, verb, noun) in enumerate(strikes):
        low, large = VERBS[verb][2]
        free = strikes[i - 1][0] + CHANGE if i else -10.0
        if i and t - free > 6:                   # a long silence: an object that is not struck
            bring(rng.uniform(free, t - REACH - 3), 0, 0)
            free = objects[-1]["arrive"] + 1.5
        now = objects[-1]["now"] if objects else (0, 0)
        fits = i and low in (0, now[0]) and large in (0, now[1])
        if not fits or rng.random() > KEEP:
            bring(rng.uniform(free, max(t - REACH - SLIDE, free)) if i else -10.0, low, large)
        now = objects[-1]["now"]
        objects[-1]["strikes"].append((t, verb, noun, rng.choice([-1, 1])))
        now[0], now[1] = now[0] - 2 * low, now[1] - 2 * large
    return objects


def strike_things(rng, room, video, times, pan):
    """The things of a video: objects, and hands that strike them."""
    (h, w), hands = video["size"], []
    for o in lay_out(rng, video["strikes"]):
        first, last = np.searchsorted(times, [o["arrive"], o["leave"] + SLIDE])
        t, sides = times[first:last], rng.choice([-0.8, 0.8], size=2) * w
        arrived, left = (u * u * (3 - 2 * u) for u in (
            np.clip((t - o[end]) / SLIDE, 0, 1) for end in ("arrive", "leave")))
        y = h * (rng.uniform(0.43, 0.57) + o["low"] * TRAVEL / 2) + 0 * t
        x = w * rng.uniform(0.4, 0.6) + sides[0] * (1 - arrived) + sides[1] * left
        radius = h * rng.uniform(*SIZE) * GROWTH ** (o["large"] / 2) + 0 * t
        angle = rng.uniform(0, 2 * np.pi) + 0 * t
        for moment, verb, noun, sense in o["strikes"]:
            share, (low, large) = COURSE[noun](t - moment), VERBS[verb][2]
            y -= low * TRAVEL * h * share
            radius *= GROWTH ** (-large * share)
            angle += (verb == "spin") * sense * 2 * np.pi * TURN * share
            x += (verb == "shake") * sense * SWING * h * swing(noun, t - moment)
            # The hand stays in contact while the change runs, and leaves as it came: otherwise
            # its place would tell what is before and what is after.
            away = np.maximum(moment - t, t - moment - NOUNS[noun][2])
            near = np.flatnonzero(away < REACH)
            hands.append((first, near, np.maximum(away[near], 0) / REACH, y, x, radius))
        # The object is near: it follows the camera but for a small rest.
        yield Thing(make_sprite(rng), first, y - 0.2 * pan[0][first:last],
                    x - 0.2 * pan[1][first:last], radius, angle)
    for first, near, away, y, x, radius in hands:        # y, x, radius after all strikes
        if len(near):
            way, length = rng.uniform(-0.3, np.pi + 0.3), h * rng.uniform(0.2, 0.26)
            out, at = radius[near] * 0.8 + length + 1.1 * h * away, first + near
            yield Thing(make_sprite(rng, "hand"), at[0],
                        y[near] + np.sin(way) * out - 0.2 * pan[0][at],
                        x[near] + np.cos(way) * out - 0.2 * pan[1][at],
                        length + 0 * out, way + 0 * out)


def strike_sound(rng, verb, noun, rate):
    """A click and a ring whose pitch tells the verb and whose timbre tells the noun."""
    seconds, overtones, noisy, envelope = TIMBRE[noun]
    t = np.arange(int(seconds * rate)) / rate
    pitch, loudness = (f(t / seconds, t) for f in PITCH[verb])
    phase = np.cumsum(BASE_PITCH * rng.uniform(0.96, 1.04) * pitch + 0 * t) * 2 * np.pi / rate
    tone = sum(w * np.sin((k + 1) * phase) for k, w in enumerate(overtones))
    if noisy:                                            # a band of noise around the pitch
        flutter = lfilter([0.03], [1, -0.97], rng.normal(size=len(t)))
        tone *= (1 - noisy) + noisy * flutter / flutter.std()
    fade = np.minimum(1, np.minimum(t, seconds - t) / 0.01)
    out = RING * loudness * envelope(t) * fade * tone / max(1, sum(overtones))
    short = np.arange(int(0.008 * rate)) / rate          # a click
    for k, at in enumerate((0, 0.25, 0.5) if noun == "brittle" else (0,)):
        click = CLICK * rng.uniform(-1, 1, len(short)) * np.exp(-short / 0.003) * 0.8**k
        out[int(at * rate):int(at * rate) + len(click)] += click
    return out * rng.uniform(0.85, 1)


def make_sound(video):
    """The sound of a video, (channels, n) float32, or None where there is no track."""
    if video.get("sound", "none") == "none":
        return None
    rng, rate = np.random.default_rng((*video["key"], 2)), video["rate"]
    n = round(video["seconds"] * rate)
    if video["sound"] == "silent":
        return np.zeros((video["channels"], n), np.float32)
    hum = np.sin(np.float32(2 * np.pi * 100 / rate) * np.arange(n, dtype="f4"))
    mono = HUM * (0.5 * hum + rng.random(n, dtype="f4") - 0.5)
    for t, verb, noun in video["strikes"]:
        sound, at = strike_sound(rng, verb, noun, rate), round(t * rate)
        mono[at:at + len(sound)] += sound[:n - at]
    gains = rng.uniform(0.85, 1, (video["channels"], 1))
    return np.clip(gains * mono, -1, 1).astype(np.float32)


def plan_strikes(name, k, seed, kind, seconds, fps, sound="on", count=None):
    """Video number k in which something is struck `count` times or throughout; no classes yet."""
    rng = random_of(seed, name, k)
    lead, tail = (1.9, 2.0) if kind == "routine" else (1.2, 1.5)     # room for windows of 3 s
    times = [rng.uniform(lead, lead + 1.8)]
    count = rng.integers(26, 29) if kind == "dense" else count
    while len(times) < count if count else times[-1] < seconds:
        times.append(times[-1] + GAPS[kind](rng, len(times)))
    seconds = times[-1] + tail if count else seconds
    sizes = [(72, 96)] if kind in ("routine", "quiet") else [(96, 128), (96, 128), (104, 136),
                                                             (96, 144)]
    # Every fourth with B-frames: the order of frames in the file is not that of time.
    preset = "superfast" if k % 4 == 0 else "ultrafast"
    return plan(name, k, seed, "strikes", sizes[rng.integers(len(sizes))], fps, seconds,
                {"options": {"preset": preset, "crf": "27"}}, kind=kind, sound=sound,
                times=[t for t in times if t < seconds - 1.1],
                overrun=False, missing=False, rate=int(rng.choice([44100, 48000])),
                channels=int(rng.choice([1, 2])))


def deal_strikes(videos, rng):
    """Give every strike of a split a verb and a noun, all pairs equally often."""
    pairs = deal(rng, [(v, n) for v in VERBS for n in NOUNS])
    for video in videos:
        video["strikes"] = [(t, *next(pairs)) for t in video["times"]]


def deal_routines(videos, rng):
    """Give every strike of the routines its classes: 12 routines, all equally often.

    Pairs of verbs times four, of which two keep their noun; so each verb meets each noun alike.
    """
    nouns, routines = list(NOUNS), []
    for i, (one, two) in enumerate([("up", "down"), ("grow", "shrink"), ("shake", "spin")]):
        a, b, c, d = nouns[i:] + nouns[:i]
        routines += [((one, a), (two, a)), ((two, b), (one, b)),
                     ((one, c), (two, d)), ((two, c), (one, d))]
    for video, turns in zip(videos, deal(rng, routines)):
        video["strikes"] = [(t, *turns[i % 2]) for i, t in enumerate(video["times"])]


EPIC_COLUMNS = ["narration_id", "participant_id", "video_id", "narration_timestamp",
                "start_timestamp", "stop_timestamp", "start_frame", "stop_frame", "narration",
                "verb", "verb_class", "noun", "noun_class", "all_nouns", "all_noun_classes"]


def stamp(seconds, digits):
    minutes, rest = divmod(round(seconds, digits), 60)
    return f"{minutes // 60:02.0f}:{minutes % 60:02.0f}:{rest:0{3 + digits}.{digits}f}"


def epic_rows(video, rng):
    """One annotation per strike, which is about in the middle of its time span."""
    rows, name, end = [], video["id"], video["seconds"]
    for i, (t, verb, noun) in enumerate(video["strikes"]):
        start, stop = t - rng.uniform(0.25, 0.45), t + rng.uniform(0.6, 0.95)
        stop += 1.8 * (rng.random() < 0.06)              # a few overlap the next one
        start, stop = round(max(start, 0), 2), round(min(stop, end), 2)
        if video["overrun"] and t == video["strikes"][-1][0]:
            stop = round(end + 3.3, 2)                   # as in the real files
        (verb_class, verbs), (noun_class, nouns) = VERBS[verb][0], NOUNS[noun][0]
        verb, noun = str(rng.choice(verbs)), str(rng.choice(nouns))
        rows.append([
            f"{name}_{i}", name[:3], name, stamp(start, 3), stamp(start, 2), stamp(stop, 2),
            int(start * video["fps"]), int(stop * video["fps"]), f"{verb}, gently, {noun}",
            verb, verb_class, noun, noun_class, [noun], [noun_class]])
    return rows


def make_epic(root, seed):
    """Write the annotations of the toy EPIC-KITCHENS-100.   -> the videos to draw"""
    rng, videos, folder = random_of(seed, "epic"), [], root / "annotations"
    folder.mkdir(parents=True)
    people = {"train": [f"P{i:02d}" for i in range(1, 7)],
              "validation": ["P01", "P18", "P02", "P32", "P03", "P04", "P05", "P06"],
              "test_timestamps": ["P04", "P27"]}
    for s, (split, names) in enumerate(people.items()):
        mine, count = [], (14, 8, 2)[s]
        for k in range(count + (s == 0)):
            fps = {3: Fraction(50), 5: Fraction(60000, 1001)}.get(k, RATES[1])
            video = plan_strikes("epic", 1000 * s + k, seed, "normal", rng.uniform(39, 48), fps,
                                 "none" if (s, k) == (0, 2) else "on")
            person, number = names[k % len(names)], 10 * s + k // len(names) + 1 + 100 * (k % 2)
            name = f"{person}_{number:02d}"
            # The last training video is listed, but its file is missing.
            paths = [root / "videos" / person / f"{name}.MP4"] * (k < count)
            mine.append(video | {"id": name, "overrun": (s, k) == (0, 1), "paths": paths})
        deal_strikes(mine, rng)
        columns = EPIC_COLUMNS[:8 if s == 2 else 15]
        write_csv(folder / f"EPIC_100_{split}.csv", columns,
                  [row[:len(columns)] for video in mine for row in epic_rows(video, rng)])
        videos += mine
    for word, number, tail in (("verb", 97, 86), ("noun", 300, 228)):         # the last ones
        write_csv(folder / f"EPIC_100_tail_{word}s.csv", [word],
                  [[i] for i in range(number - tail, number)])
    write_csv(folder / "EPIC_100_unseen_participant_ids_validation.csv", ["participant_id"],
              [["P18"], ["P32"]])
    return [video for video in videos if video["paths"]]


EGO4D = {  # split: kinds of its videos
    "train": ["dense", "calm", "normal", "calm", "calm", "normal", "dense", "normal",
              "calm", "normal", "calm", "dense", "normal", "calm", "normal", "normal"],
    "val": ["dense", "calm", "normal", "calm", "dense", "calm"],
    "test_unannotated": ["dense", "calm"]}


def make_uuid(rng):
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def span(name, start, stop):
    """The four keys of a span of time at Ego4D's 30 frames per second."""
    return {f"{name}_start_sec": round(start, 3), f"{name}_end_sec": round(stop, 3),
            f"{name}_start_frame": round(start * 30), f"{name}_end_frame": round(stop * 30)}


def action_entries(video, k, rng, labels):
    """fho_lta: the actions of a clip, windows around the strikes, short ones and some of 8 s.

    In a routine the middle 2.13 s hold the whole change and no other strike.
    """
    entries, end = [], video["seconds"] - video["cut"]
    struck = [(t - video["cut"], *c) for t, *c in video["strikes"] if t > video["cut"] + 1]
    for i, (t, verb, noun) in enumerate(struck):
        if video["kind"] == "routine":
            length = rng.uniform(2.4, 3.0)
            start = t - length / 2 - rng.uniform(-0.35, 0.15)
        else:
            length = 8.0 if rng.random() < 0.15 else rng.uniform(2.4, 4.0)
            start = max(0.0, t - length * rng.uniform(0.4, 0.6))
        stop = min(end, start + length)
        if video["overrun"] and i + 1 == len(struck):
            stop = end + 2.5                             # as in the real files
        (verb_label, verb), (noun_label, noun) = VERBS[verb][1], NOUNS[noun][1]
        answer = {"verb": verb, "noun": noun, "verb_label": verb_label, "noun_label": noun_label}
        entries.append({
            "video_uid": video["video_uid"], "clip_uid": video["clip_uid"], "clip_id": k,
            **span("clip_parent", video["cut"], video["seconds"]), "action_idx": i,
            **span("action_clip", round(start, 2), round(stop, 2)), **(answer if labels else {})})
    return entries


def state_entries(video, rng, labels):
    """fho_oscc-pnr: [(change?, entry)] of windows of up to 8 s with exactly one strike or none."""
    entries, times = [], [-CHANGE, *(t for t, *_ in video["strikes"]), video["seconds"] + REACH]
    pairs = 3 * [(i, i + 1) for i in range(len(times) - 1)]
    for i, j in pairs + 2 * [(i, i + 2) for i in range(len(times) - 2)]:
        first, last, change = times[i] + CHANGE, times[j] - REACH, j == i + 2
        # Both kinds are shortened alike, or the length would tell them apart.
        length = min(8.0, last - first, rng.uniform(4, 8) if rng.random() < 0.4 else 8.0)
        length = math.floor(length * 10) / 10
        low, high = first, last - length
        if change:
            low, high = max(low, times[i + 1] - length + 0.6), min(high, times[i + 1] - 0.6)
        start = math.ceil(rng.uniform(low, max(low, high)) * 10) / 10
        if length < 4 or start + length > last:
            continue
        stop, known = round(start + length, 1), start >= video["cut"] and rng.random() < 0.8
        entry = {"video_uid": video["video_uid"], **span("parent", start, stop),
                 "unique_id": f"{make_uuid(rng)}-{start:g}-{stop:g}".replace(".", "_")}
        if change or not labels:
            entry["clip_uid"] = video["clip_uid"] if known else None
        if labels:
            entry |= {"state_change": change, "pnr_frame": None}
        if labels and change:
            pnr, cut = round(times[i + 1] * 30), video["cut"] if known else 0
            entry |= {**span("clip", start - cut, stop - cut), "parent_pnr_frame": pnr,
                      "clip_pnr_frame": pnr - round(30 * cut)}
        entries.append((change, entry))
    return entries


def balanced(entries, rng):
    """As many windows with a change as without, of every length in seconds; shuffled."""
    keep = []
    for length in range(4, 9):
        some = [[e for change, e in entries if change == c and length == (
            e["parent_end_frame"] - e["parent_start_frame"]) // 30] for c in (True, False)]
        keep += [e[i] for e in some for i in rng.permutation(len(e))[:min(map(len, some))]]
    return [keep[i] for i in rng.permutation(len(keep))]


def plan_ego4d(seed, s, kinds, rng):
    """The videos of split s: general ones, quiet ones, routines."""
    found = []
    for k in range(len(kinds) + (s == 0)):               # the last one's file is missing
        kind = kinds[k] if k < len(kinds) else "normal"
        sound = {2: "none", 3: "silent", 5: "none"}.get(k, "on") if s == 0 else "none"
        seconds = rng.uniform(52, 60) if kind == "calm" else rng.uniform(30, 38)
        video = plan_strikes("ego4d", 1000 * s + k, seed, kind, seconds, 30, sound)
        # One clip is a part of its video, which starts 8 s earlier.
        found.append(video | {"cut": 8.0 * (k == 1), "overrun": (s, k) == (0, 2),
                              "missing": k == len(kinds)})
    deal_strikes(found, rng)
    quiet = [plan_strikes("quiet", 1000 * s + k, seed, "quiet", 20, 30, "none")
             for k in range((24, 8, 1)[s])]
    deal_strikes(quiet, rng)
    # Clips with 10, 4 and 4 windows of 24 actions, all in one room: the ground would else tell
    # which routine it is.
    routines = [plan_strikes("routine", 1000 * s + k, seed, "routine", 0, 30, "none",
                             (34, 28, 28)[s]) for k in range((12, 12, 2)[s])]
    deal_routines(routines, rng)
    routines = [video | {"room": (seed, crc32(b"room"))} for video in routines]
    return found + quiet + routines


def make_ego4d(root, seed):
    """Write the annotations of the toy Ego4D.   -> the videos to draw"""
    rng, videos, folder = random_of(seed, "ego4d"), [], root / "annotations"
    folder.mkdir(parents=True)
    for s, (split, kinds) in enumerate(EGO4D.items()):
        actions, windows, labels = [], [], split != "test_unannotated"
        for k, video in enumerate(plan_ego4d(seed, s, kinds, rng)):
            video |= {"clip_uid": make_uuid(rng), "video_uid": make_uuid(rng)}
            if video["kind"] != "quiet":
                actions += action_entries(video, 100 * s + k, rng, labels)
            if video["missing"]:
                continue
            if video["kind"] not in ("dense", "routine"):
                windows += state_entries(video, rng, labels)
            clip = [root / "clips" / f"{video['clip_uid']}.mp4"]
            whole = [root / "videos" / f"{video['video_uid']}.mp4"]
            if s == 0 and video["kind"] not in ("routine", "quiet"):
                clip.append(root / clip[0].name)         # to pre-train on
            if video["cut"]:
                videos += [video | {"paths": clip}, video | {"paths": whole, "cut": 0.0}]
            else:
                videos.append(video | {"paths": clip + whole})
        for name, entries in (("lta", actions), ("oscc-pnr", balanced(windows, rng))):
            (folder / f"fho_{name}_{split}.json").write_text(json.dumps({
                "version": "v1", "date": "220101", "description": "toy copy of Ego4D FHO",
                "manifest": "toy", "split": split, "clips": entries}))
    words = {"verbs": [f"verb_{i}" for i in range(115)], "nouns": [f"noun_{i}" for i in range(478)]}
    for word, table in (("verbs", VERBS), ("nouns", NOUNS)):
        for row in table.values():
            words[word][row[1][0]] = row[1][1]
    (folder / "fho_lta_taxonomy.json").write_text(json.dumps(words))
    return videos


# ---- actions: what UCF101 and HMDB51 show ------------------------------------------------------

RANGES = {  # what a number between 0 and 1 stands for, in parts of the height
    "height": lambda s: 0.15 + 0.7 * s,          # of the middle of the three objects
    "size": lambda s: 0.095 * 2.8**s,            # their radius
    "spread": lambda s: 0.03 + 0.35 * s,         # their distance from the middle
    "length": lambda s: 4.5**s,                  # length over breadth, the area stays
}
MOTIONS = {  # action: (what changes, does it grow)
    "rise": ("height", False), "sink": ("height", True),
    "approach": ("size", True), "leave": ("size", False),
    "scatter": ("spread", True), "gather": ("spread", False),
    "unfold": ("length", True), "fold": ("length", False)}
ROUND = (1.0, 1.4)                               # seconds after which an action begins anew


def states(rng, motion, times):
    """The four numbers of RANGES at all times, and the number of the round.   -> dict, ints"""
    clock = rng.random() + times / rng.uniform(*ROUND)
    turn = clock.astype(int)
    drawn = rng.random((turn[-1] + 1, len(RANGES)))
    at = dict(zip(RANGES, drawn[turn].T))
    what, grows = MOTIONS[motion]
    at[what] = clock - turn if grows else 1 - (clock - turn)
    return {k: RANGES[k](v) for k, v in at.items()}, turn


def action_things(rng, room, video, times, pan):
    """The things of a video: in each round three of the room's five objects."""
    (h, w), five = video["size"], [make_sprite(room) for _ in range(5)]
    at, turn = states(np.random.default_rng((*video["key"], 4)), video["motion"], times)
    for number in range(turn[-1] + 1):
        i = np.flatnonzero(turn == number)
        middle, radius, spread, length = (at[k][i] for k in RANGES)
        x, tilt, way = w * rng.uniform(0.35, 0.65), rng.uniform(1, 2.1), rng.random()
        for k, s in enumerate(rng.permutation(5)[:3]):
            side = 2 * np.pi * (way + k / 3)
            yield Thing(five[s], i[0], h * (middle + spread * np.sin(side)),
                        x + h * spread * np.cos(side), h * radius, tilt + 0 * radius, length)


def plan_action(name, k, seed, motion, place, fps, size, frames, path):
    """Video number k of one action; `place` is its group or film."""
    rng = random_of(seed, name, k, 3)
    options = {"qmin": (quantiser := str(rng.integers(5, 11))), "qmax": quantiser}
    if rng.random() < 0.15:                              # B-frames: not in the order of time
        options["bf"] = "2"
    coding = {"codec": "mpeg4", "tag": "XVID", "gop": int(rng.integers(12, 51)),
              "options": options}
    return plan(name, k, seed, "actions", size, fps, Fraction(int(frames), fps), coding,
                motion=motion, room=(seed, crc32(f"{name} room".encode()), place), paths=[path])


UCF_MOTIONS = {  # official number and name of the class: action
    (4, "BabyCrawling"): "approach", (15, "BodyWeightSquats"): "fold", (16, "Bowling"): "leave",
    (35, "Hammering"): "gather", (36, "HammerThrow"): "scatter", (37, "HandstandPushups"): "unfold",
    (47, "JumpingJack"): "rise", (48, "JumpRope"): "sink"}
HMDB_MOTIONS = {"brush_hair": "unfold", "climb": "rise", "climb_stairs": "sink",
                "kick": "scatter", "kick_ball": "gather", "push": "fold"}
FILMS = ["Harbour_Lights", "(Night)_Train_No_7!", "Two_Rivers_[Part_1]_2", "#4_Dinner_At_Eight",
         "Salt_&_Pepper;_a_day", "Old_Garden_3", "me@the_lake_1999", "Snow~Trip+Sauna",
         "The_Long_Stairs", "20070412_park", "Kite_Weather_II"]


def make_ucf101(root, seed):
    """Write the lists of the toy UCF101.   -> the videos to draw"""
    rng, folder, videos, rows = random_of(seed, "ucf101"), root / "ucfTrainTestlist", [], []
    for ((c, name), motion), group in itertools.product(UCF_MOTIONS.items(), range(1, 26)):
        word = name.replace("Handst", "HandSt")          # its files are so called
        for clip in range(1, 3 - group % 2):
            path = f"{name}/v_{word}_g{group:02d}_c{clip:02d}.avi"
            frames = rng.integers(30, 51) if videos else 29                # one is short
            videos.append(plan_action("ucf101", 100000 * c + 1000 * group + clip, seed, motion,
                                      group, 25, (68, 92), frames, root / "UCF-101" / path))
            rows.append((group, path, c))
    names = {c: f"Class{c}" for c in range(1, 102)} | dict(UCF_MOTIONS.keys())
    write_lines(folder / "classInd.txt", [f"{c} {name}" for c, name in names.items()], "\r\n")
    for i in (1, 2, 3):                                  # groups 1-7, 8-14 and 15-21 are tested
        test = range(7 * i - 6, 7 * i + 1)
        write_lines(folder / f"trainlist{i:02d}.txt",
                    [f"{path} {c}" for group, path, c in rows if group not in test], "\r\n")
        write_lines(folder / f"testlist{i:02d}.txt",
                    [path for group, path, _ in rows if group in test], "\r\n")
    return videos


def make_hmdb51(root, seed):
    """Write the splits of the toy HMDB51.   -> the videos to draw"""
    rng, videos = random_of(seed, "hmdb51"), []
    sizes = [(68, int(w)) for w in rng.choice(range(88, 122, 2), len(FILMS))]
    for c, (name, motion) in enumerate(HMDB_MOTIONS.items()):
        rows = []
        for film, clip in itertools.product(range(len(FILMS)), range(3)):
            short = rng.random() < 0.04 or (c, film, clip) == (0, 0, 0)
            frames = rng.integers(17, 25) if short else 40 + int(40 * rng.beta(1, 4))
            tags = [rng.choice(x.split()) for x in (
                "h u f l", "cm nm", "np1 np2", "fr ba le ri", "bad med goo")]
            file = "_".join([FILMS[film], name, *tags, f"{clip}.avi"])
            videos.append(plan_action("hmdb51", 100000 * c + 1000 * film + clip, seed, motion, film,
                                      30, sizes[film], frames, root / "hmdb51_org" / name / file))
            rows.append((file, film))
        for i in range(3):
            test, unused = range(3 * i, 3 * i + 3), (10, 9, 10)[i]                 # films
            path = root / "testTrainMulti_7030_splits" / f"{name}_test_split{i + 1}.txt"
            write_lines(path, [f"{file} {2 if film in test else 0 if film == unused else 1} "
                               for file, film in sorted(rows)])
    return videos


# ---- mishaps: what Oops! shows -----------------------------------------------------------------

STEADY, KICKED = (0.3, 0.7), (1.5, 3.5)          # heights per second, before and after
KICKS = (0.07, 0.3)                              # seconds from one kick to the next
PAUSE = 0.5                                      # how often every second kick stops it instead


def folded(phase):
    """A triangle wave with round corners, 0 at even numbers and 1 at odd ones."""
    return 0.5 - np.arcsin(0.9 * np.cos(np.pi * phase)) / (2 * np.arcsin(0.9))


def kicks(rng, times, truth):
    """How far kicks have carried the object, 0 until `truth`.   -> y, x in heights, two angles"""
    number = math.ceil(times[-1] / KICKS[0]) + 1
    way = rng.uniform(0, 2 * np.pi, number)
    speed = rng.uniform(*KICKED, number)
    speed[1::2] *= rng.random(number // 2) > PAUSE
    spin, whirl = rng.uniform(-12, 12, (2, number))      # radians per second
    rates = np.stack([speed * np.sin(way), speed * np.cos(way), spin, whirl])
    which = np.cumsum(rng.uniform(*KICKS, number)).searchsorted(times - truth)
    return np.cumsum(rates[:, which] * (times > truth), axis=1) * (times[1] - times[0])


def mishap(video):
    """Where the object is in every frame.   -> y, x (pixels), its angle, that of its load

    A steady course until video["truth"], then kicks. All four begin anywhere on a circle and what
    moves them does not know where they are, so they are anywhere on it in every frame.
    """
    rng, times = np.random.default_rng((*video["key"], 4)), frame_times(video)
    (height, width), truth, radius = video["size"], video["truth"], video["radius"]
    begin, turn, load = rng.uniform(0, 2, 2), *rng.uniform(0, 2 * np.pi, 2)
    way, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*STEADY)
    free = np.array([[height], [width]]) - 2 * radius    # where its centre can be
    *carried, spin, whirl = kicks(rng, times, truth)
    steady = np.minimum(times, truth)
    moved = speed * steady * np.array([[np.sin(way)], [np.cos(way)]]) + carried
    step = 2 * np.pi * rng.uniform(1.5, 2.5) * steady    # two of them a second or so
    if video["gait"] == "walk":
        moved[0] += 0.03 * np.sin(step)
        turn = turn + 0.3 * np.sin(step / 2)
    y, x = radius + free * folded(begin[:, None] + moved * height / free)
    if video["gait"] == "roll":
        turn = turn + x / radius
    return y, x, turn + spin, load + whirl


def mishap_things(rng, room, video, times, pan):
    """The things of a video: an object, perhaps with a load."""
    y, x, turn, load = mishap(video)
    radius = video["radius"] + 0 * y
    yield Thing(make_sprite(rng), 0, y, x, radius, turn)
    if video["gait"] == "carry":
        yield Thing(make_sprite(rng), 0, y + radius * np.sin(load), x + radius * np.cos(load),
                    radius / 2, 0 * y)


def plan_mishap(k, seed, kind):
    """Video number k of Oops!."""
    rng = random_of(seed, "oops", k, 3)
    size = [(48, 52), (48, 48), (48, 54), (50, 52), (52, 50), (54, 48)][rng.integers(6)]
    # The end of a "late" one is a multiple of 1/8 s: its annotated length is its own.
    fps = RATES[0] if kind == "late" else RATES[rng.integers(3)]
    seconds = {"late": 6.0, "short": 3.1, "tiny": 2.7}.get(kind, rng.uniform(5, 9))
    seconds = float(round(seconds * fps) / fps)
    truth = seconds * rng.uniform(0.12, 0.88)
    truth = {"never": math.inf, "early": 0.02, "late": seconds - 0.02}.get(kind, truth)
    return plan("oops", k, seed, "mishaps", size, fps, seconds, even_quality(k, 60), kind=kind,
                truth=truth, gait=str(rng.choice(["roll", "walk", "carry"])),
                radius=rng.uniform(0.12, 0.15) * math.sqrt(size[0] * size[1]))


# A running number follows directly. What a script must survive: commas, quotes, %, emoji, a year.
TITLES = ["Some Fails (March 2099) _ Channel", "Some Fails, Part 2 (May 2099) _ Channel",
          'The "Easy" Jump, and More _ Channel', "Don't Try This! - Mishaps of the Week _ Clips",
          "Cats & Dogs; Slips & Trips _ Channel", "#1 Kitchen Fails You Missed #26 (June 2099)",
          "110% Effort, 0% Luck _ Channel", "Fête d'été à Málaga – Größte Stürze _ Café",
          "Winter Fails! \u2744\ufe0f\U0001f602 (January 2099) _ Channel", "Other Fails 2099",
          "Ladders [Extended] + Ice = ~Ouch~ @ Home  (April 2099) _ Channel", "Party On... Go!"]


def oops_kinds(rng, n, annotated):
    """What is special about each of n videos, of which some are annotated.   -> list of words"""
    few, rare = max(1, annotated // 25), max(1, annotated // 50)
    kinds = ["never"] * few + ["two"] * few + ["one"] * max(1, annotated // 8)
    kinds += ["early", "late"] * rare + ["short"] + ["tiny"] * (rare - 1)
    kinds += ["normal"] * (annotated - len(kinds)) + ["unlabelled"] * (n - annotated)
    return [kinds[i] for i in rng.permutation(n)]


def oops_entry(video, rng):
    """What three annotators say of a video, -1 where one saw nothing: transition_times.json."""
    length = math.ceil(8 * round(video["seconds"] * video["fps"]) / video["fps"]) / 8
    missing = {"never": 3, "two": 2, "one": 1}.get(video["kind"], 0)
    spread = 0.01 if video["kind"] in ("early", "late") else 0.08
    t = video["truth"] + rng.normal(0, spread, 3) if missing < 3 else np.zeros(3)
    t = t.clip(0, video["seconds"]).round(6)
    t[:missing] = -1
    t.sort()
    rel = t / length
    return {"t": t.tolist(), "len": length, "rel_t": rel.tolist(),
            "stdev": float(t.std(ddof=1)), "rel_stdev": float(rel.std(ddof=1)),
            "n_notfound": missing}


def make_oops(root, seed):
    """Write the annotations of the toy Oops!.   -> the videos to draw"""
    rng, folder, videos = random_of(seed, "oops"), root / "annotations", []
    counts = {"train": 160, "val": 80}
    numbers = rng.permutation(2 * sum(counts.values())).tolist()
    times, heldout = {}, {}
    for split, n in counts.items():
        names = []
        for kind in oops_kinds(rng, n, round(n * {"train": 0.69, "val": 0.8}[split])):
            video = plan_mishap(len(videos), seed, kind)
            names.append(f"{TITLES[len(videos) % len(TITLES)]}{numbers.pop()}")
            path = root / "oops_video" / split / f"{names[-1]}.mp4"
            videos.append(video | {"paths": [path]})
            if kind != "unlabelled":
                times[names[-1]] = oops_entry(video, rng)
                if split == "val":                       # a fourth annotator, less exactly
                    t, found = -1.0, kind != "never" and rng.random() > 0.06
                    if found:
                        t = max(0.0, min(video["seconds"], video["truth"] + rng.normal(0, 0.15)))
                    heldout[names[-1]] = {"t": [round(t, 6)], "stdev": 0, "rel_stdev": 0,
                                          "n_notfound": int(not found)}
        write_lines(folder / f"{split}.txt", names)
        (folder / "splits").mkdir(exist_ok=True)
        write_csv(folder / "splits" / f"{split}_all_org.csv", ["filename"], zip(names))
    for name, table in (("transition_times", times), ("heldout_transition_times", heldout)):
        text = json.dumps(table, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return videos


# ---- deeds: what Kinetics-400, Charades and MultiTHUMOS show -----------------------------------

DEEDS = {  # what an object does: (what changes, its direction, 0: there and back)
    "rise": ("height", -1), "sink": ("height", 1), "grow": ("size", 1), "shrink": ("size", -1),
    "drift": ("side", 1), "sway": ("side", 0), "spin": ("angle", 1), "pulse": ("size", 0)}
PATH, SCALING = 0.48, 1.85                       # part of the height or side; of the radius
GIRTH = (0.175, 0.205)                           # of the shorter side: radius, in the middle
SLENDER = (1.5, 2.0)                             # length over breadth: turning can be seen
PERIOD, REVOLUTION = (1.6, 2.4), (3.0, 4.2)      # s: sway and pulse; spin
PACE = 1.3                                       # how much faster these are in Kinetics
FADE = {"clip": 0.12, "scene": 0.2}              # s: of an object that appears or leaves
ANEW = (1.6, 2.4)                                # s after which an action of Kinetics begins anew
ACT = (2, 5)                                     # s: an action in the long videos, mostly short
REST, AFTER, EMPTY = (0.4, 2.0), (0.3, 1.2), (0.2, 2.1)      # s: before, behind, between objects
LEISURE = (0.5, 1.7)                             # factor on these three, another in each video
SCENES = [(72, 96), (72, 96), (72, 104), (76, 100), (96, 72)]                  # sizes of frames


def actor_of(look, place, appear, leave, begin, end, kind, deed=None):
    """An object that is there from `appear` to `leave` and acts from `begin` to `end`."""
    return {"look": look, "place": place, "appear": appear, "leave": leave, "begin": begin,
            "end": end, "deed": deed, "fade": FADE[kind], "pace": PACE if kind == "clip" else 1}


def follow(rng, actor, times, size):
    """An object at some times.   -> y, x, radius (pixels), angle in turns, how solid it is"""
    height, width = size
    at, way = dict(zip(("height", "side", "size"), rng.random(3))), rng.choice([-1, 1])
    at["angle"] = rng.random() + 0 * times
    tall, wide, girth = rng.uniform(-0.05, 0.05, 2).tolist() + [rng.uniform(*GIRTH)]
    what, direction = DEEDS.get(actor["deed"], ("height", None))
    moved = np.clip(times, actor["begin"], actor["end"]) - actor["begin"]
    if what == "angle":
        at[what] += way * moved / rng.uniform(*REVOLUTION) * actor["pace"]
    elif direction == 0:                                 # a triangle wave: as often everywhere
        phase = rng.uniform(0, 2) + 2 * moved / rng.uniform(*PERIOD) * actor["pace"]
        at[what] = 1 - abs(phase % 2 - 1)
    elif direction:
        share = moved / (actor["end"] - actor["begin"])
        at[what] = share if direction * (way if what == "side" else 1) > 0 else 1 - share
    y = height * (0.5 + tall + PATH * (at["height"] - 0.5)) + 0 * times
    x = width * (0.5 + actor["place"]) + min(size) * (wide + PATH * (at["side"] - 0.5)) + 0 * times
    radius = min(size) * girth * SCALING ** (at["size"] - 0.5) + 0 * times
    solid = np.minimum(times - actor["appear"], actor["leave"] - times) / actor["fade"]
    return y, x, radius, at["angle"], solid.clip(0, 1)


def deed_things(rng, room, video, times, pan):
    """The things of a video: objects that appear, act and leave."""
    looks = {}
    for actor in sorted(video["actors"], key=lambda a: a["appear"]):
        first, last = np.searchsorted(times, [actor["appear"], actor["leave"]]).tolist()
        y, x, radius, angle, solid = follow(rng, actor, times[first:last], video["size"])
        if actor["look"] not in looks:
            looks[actor["look"]] = make_sprite(rng), rng.uniform(*SLENDER)
        sprite, length = looks[actor["look"]]
        yield Thing(sprite, first, y, x, radius, 2 * np.pi * angle, length, solid)


def plan_scene(name, k, seed, fps, seconds):
    """Video number k without its objects, about `seconds` long."""
    rng = random_of(seed, name, k, 3)
    return plan(name, k, seed, "deeds", SCENES[rng.integers(len(SCENES))], fps, seconds,
                even_quality(k, int(rng.integers(60, 121))), actors=[])


def plan_clip(k, seed, deed, short):
    """Clip number k of Kinetics: one object does the same again and again."""
    rng = random_of(seed, "clip", k)
    seconds = rng.uniform(*((2.2, 2.6) if short else (3.8, 4.2)))
    video = plan_scene("kinetics400", k, seed, RATES[k % 3], seconds)
    t = -rng.random() * ANEW[0]
    while t < video["seconds"]:
        end = t + rng.uniform(*ANEW)
        video["actors"].append(actor_of(0, 0, t, end, t, end, "clip", deed))
        t = end
    if rng.random() < 1 / 3:                             # a second object rests
        place = rng.choice([-0.25, 0.25])
        video["actors"].append(actor_of(1, place, -1.0, video["seconds"] + 1, 0.0, 1.0, "clip"))
    return video


def plan_untrimmed(name, k, seed, fps, seconds, idle):
    """Video number k of the long ones; nothing happens in an idle one. No classes yet."""
    video, rng = plan_scene(name, k, seed, fps, seconds), random_of(seed, name, k, 5)
    rest, after, empty = rng.uniform(*LEISURE) * np.array([REST, AFTER, EMPTY])
    actors, seconds = [], video["seconds"]
    while not actors:
        for place in (-0.14, 0.14):
            t = -rng.uniform(0, 6)
            while t < seconds:
                begin = t + FADE["scene"] + rng.uniform(*rest)
                end = begin + ACT[0] + (ACT[1] - ACT[0]) * rng.beta(1.2, 2)
                leave = end + rng.uniform(*after) + FADE["scene"]
                if min(end, seconds) - max(begin, 0) > 0.8:          # long enough to be seen
                    actor = actor_of(len(actors), place, t, leave, begin, end, "scene")
                    actors.append(actor | {"busy": not idle})
                t = leave + rng.uniform(*empty)
    return video | {"actors": actors}


def deal_deeds(videos, rng):
    """Give every object of a split something to do, all deeds equally often."""
    deeds = deal(rng, list(DEEDS))
    for actor in (a for video in videos for a in video["actors"] if a["busy"]):
        actor["deed"] = next(deeds)


def intervals(video, names, digits):
    """What happens in a video: [[class from 0, start, end], ...] in seconds."""
    classes, end = {deed: i for i, deed in enumerate(names.values())}, video["seconds"]
    return [[classes[a["deed"]], round(max(a["begin"], 0.0), digits),
             round(min(a["end"], end), digits)] for a in video["actors"] if a["busy"]]


KINETICS = {"abseiling": "sink", "climbing a rope": "rise", "folding paper": "shrink",
            "inflating balloons": "grow", "massaging person's back": "pulse",
            "skiing (not slalom or crosscountry)": "drift", "spinning poi": "spin",
            "swinging legs": "sway"}
CHARADES = {"Holding some clothes": "rise", "Putting clothes somewhere": "sink",
            "Taking some clothes from somewhere": "grow", "Throwing clothes somewhere": "shrink",
            "Tidying some clothes": "drift", "Washing some clothes": "sway",
            "Closing a door": "spin", "Fixing a door": "pulse"}
THUMOS = {"BodyRoll": "spin", "Fall": "sink", "Jump": "pulse", "PickUp": "rise", "Run": "drift",
          "Squat": "shrink", "StandUp": "grow", "Walk": "sway"}
SCRIPTS = ["A person walks in, looks around and leaves.", 'A person says "hello", and waits.']
CHARADES_COLUMNS = ["id", "subject", "scene", "quality", "relevance", "verified", "script",
                    "objects", "descriptions", "actions", "length"]
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def random_names(rng, n, letters, length):
    return ["".join(rng.choice(list(letters), length)) for _ in range(n)]


def make_kinetics400(root, seed):
    """Write the lists of the toy Kinetics-400.   -> the videos to draw"""
    rng, videos = random_of(seed, "kinetics400"), []
    counts = {"train": 36, "val": 8}
    names = random_names(rng, len(KINETICS) * (sum(counts.values()) + 4),
                         ALPHABET + ALPHABET[:26].lower() + "-_", 11)
    names = ["-" + x[1:] if i % 7 == 0 else x for i, x in enumerate(names)]
    write_lines(root / "labels.txt", KINETICS)
    for s, (split, n) in enumerate(counts.items()):
        rows, subset = [], {"train": "train", "val": "validate"}[split]
        # Besides n of each class a clip that is too short, and some that are missing.
        extra = [list(KINETICS)[i] for i in rng.permutation(len(KINETICS))[:3 - s]]
        for i, label in enumerate([x for x in KINETICS for _ in range(n)] + extra):
            name, start = names.pop(), int(rng.integers(0, 300))
            path = root / split / label.replace(" ", "_") / f"{name}_{start:06}_{start + 10:06}.mp4"
            rows.append([label, name, start, start + 10, subset])
            if i <= n * len(KINETICS):
                video = plan_clip(10000 * s + i, seed, KINETICS[label], i == n * len(KINETICS))
                videos.append(video | {"paths": [path]})
        write_csv(root / f"{split}.csv",
                  ["label", "youtube_id", "time_start", "time_end", "split"], sorted(rows))
    return videos


def make_charades(root, seed):
    """Write the annotations of the toy Charades.   -> the videos to draw"""
    rng, folder, drawn = random_of(seed, "charades"), root / "Charades", []
    write_lines(folder / "Charades_v1_classes.txt",
                [f"c{i:03} {words}" for i, words in enumerate(CHARADES)])
    counts = {"train": 66, "test": 32}
    names = random_names(rng, sum(counts.values()), ALPHABET, 5)
    for s, (split, n) in enumerate(counts.items()):
        kinds, videos, rows = ["idle", "short", *["short"] * s], [], []
        kinds += ["normal"] * (n - len(kinds))
        for k, kind in enumerate(kinds[i] for i in rng.permutation(n)):
            seconds = rng.uniform(4, 6) if kind == "short" else 12 + 8 * rng.beta(1.2, 2)
            videos.append(plan_untrimmed("charades", 1000 * s + k, seed, 24, seconds,
                                         kind == "idle"))
        deal_deeds(videos, rng)
        for k, video in enumerate(videos):
            name, mine = names.pop(), intervals(video, CHARADES, 2)
            if k % 20 == 0 and mine:                     # as in the real file: behind the end
                mine[-1][2] = round(video["seconds"] + rng.uniform(0.2, 1), 2)
            actions = ";".join(f"c{c:03} {a:.2f} {b:.2f}" for c, a, b in mine)
            rows.append([
                name, "A1B2", "Other (Porch, cellar)", 6, 7, "Yes", rng.choice(SCRIPTS), "bag;door",
                ";".join(SCRIPTS), actions, f"{video['seconds']:.2f}"])
            drawn.append(video | {"paths": [root / "Charades_v1" / f"{name}.mp4"]})
        write_csv(folder / f"Charades_v1_{split}.csv", CHARADES_COLUMNS, rows)
    return drawn


def make_multithumos(root, seed):
    """Write the annotations of the toy MultiTHUMOS.   -> the videos to draw"""
    rng, drawn, found = random_of(seed, "multithumos"), [], []
    for s, (split, n) in enumerate((("validation", 24), ("test", 14))):
        numbers = sorted(rng.choice(1000 + 50 * n, n, replace=False) + 1)
        videos = [plan_untrimmed("multithumos", 1000 * s + k, seed, RATES[(1, 2, 1, 0)[k % 4]],
                                 rng.uniform(14, 23), False) for k in range(n)]
        deal_deeds(videos, rng)
        for number, video in zip(numbers, videos):
            name = f"video_{split}_{number:07}"
            found += [(name, *interval) for interval in intervals(video, THUMOS, 1)]
            drawn.append(video | {"paths": [root / "videos" / f"{name}.mp4"]})
    write_lines(root / "class_list.txt", [f"{c} {x}" for c, x in enumerate(THUMOS, 1)])
    for c, word in enumerate(THUMOS):
        write_lines(root / "annotations" / f"{word}.txt",
                    [f"{name} {a:.1f} {b:.1f}" for name, i, a, b in found if i == c])
    return drawn


# ---- making datasets ---------------------------------------------------------------------------

WORLDS = {"strikes": strike_things, "actions": action_things, "mishaps": mishap_things,
          "deeds": deed_things}
MAKERS = {"epic": make_epic, "ego4d": make_ego4d, "ucf101": make_ucf101, "hmdb51": make_hmdb51,
          "oops": make_oops, "kinetics400": make_kinetics400, "charades": make_charades,
          "multithumos": make_multithumos}


def build(video):
    """Draw a video and write its file, under all its names."""
    sound, rate, (path, *links) = make_sound(video), video.get("rate", 44100), video["paths"]
    frames = itertools.islice(draw(video), round(video["cut"] * video["fps"]), None)
    audio = None if sound is None else sound[:, round(video["cut"] * rate):]
    write_video(path, frames, video["fps"], audio, rate, **video["coding"])
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, link)


def make(names, out, seed=0, workers=1):
    """Make OUT/name for these datasets; those made before, with the same settings, are kept.

    A dataset is drawn in OUT/.name and renamed at the end, so it is complete or not there.
    """
    out, began, videos = Path(out), time.time(), {}
    settings = json.dumps([seed, crc32(Path(__file__).read_bytes())])
    for name in names:
        marker = out / name / ".toy.json"
        if marker.exists() and marker.read_text() == settings:
            print(f"{name}: {out / name} is there")
            continue
        if (out / name).exists() and not marker.exists():
            raise FileExistsError(f"{out / name} is not a toy dataset, move it away")
        shutil.rmtree(out / f".{name}", ignore_errors=True)
        videos[name] = MAKERS[name](out / f".{name}", seed)
    longest = sorted((v for some in videos.values() for v in some),
                     key=lambda v: -v["seconds"] * v["fps"] * math.prod(v["size"]))
    if workers > 1 and longest:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map(build, longest, chunksize=1)
    else:
        for video in longest:
            build(video)
    for name, some in videos.items():
        (out / f".{name}" / ".toy.json").write_text(settings)
        shutil.rmtree(out / name, ignore_errors=True)
        (out / f".{name}").rename(out / name)
        size = sum(f.stat().st_size for f in (out / name).rglob("*.*"))
        print(f"{name}: {out / name}, {len(some)} videos of {sum(v['seconds'] for v in some):.0f} "
              f"s, {size / 1e6:.1f} MB")
    if videos:
        print(f"made in {time.time() - began:.0f} s")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dataset", nargs="*", metavar="DATASET", default=list(MAKERS),
                   help=f"which ones: {', '.join(MAKERS)} (default: all)")
    p.add_argument("--out", default="data/toy", metavar="DIR",
                   help="each becomes DIR/DATASET (default: data/toy)")
    p.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    p.add_argument("--workers", type=int, default=os.cpu_count(),
                   help="processes (default: one per core)")
    args = p.parse_args()
    if unknown := set(args.dataset) - set(MAKERS):
        p.error(f"no toy of {', '.join(unknown)}; there are: {', '.join(MAKERS)}")
    if args.seed < 0 or args.workers < 1:
        p.error("--seed must be at least 0, --workers at least 1")
    try:
        make(args.dataset, args.out, args.seed, args.workers)
    except OSError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
