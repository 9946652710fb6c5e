"""Make small toy copies of the datasets: official folders, file names, codecs and annotations.

    python tests/toy.py --out data/toy                    every dataset
    python tests/toy.py --out data/toy epic --segments    one of them, with the 10 s pieces

A first-person-like video: a wandering camera looks at a random texture, a hand comes in, strikes
an object and the object changes its state, with a sound. Then seconds of silence, in which other
objects may slide in. What tells the classes apart is only how the state changes and how it sounds:

    verb     the change                    the ring after the click
    up       moves up                      rising glide
    down     moves down                    falling glide
    grow     1.8 times as large            low, swelling
    shrink   1.8 times as small            high, fading
    shake    swings sideways, comes back   tremolo
    spin     turns, either way             vibrato

    noun     course of the change          the ring after the click
    rigid    ever faster, over 0.5 s       short and pure
    viscous  steadily, over 0.8 s          noisy
    elastic  overshoots and swings, 0.8 s  beats 5 times a second, dying down
    brittle  three steps, 0.25 s apart     three clicks and three short rings

Look, place, size, background, light and camera are random and the same for all classes: objects
rest low and high, small and large in every class, and the hand leaves as it came. So a single frame
of an unknown moment hardly says what happens; a test measures that. (Who knows that it is from just
before a strike can rule out four verbs of six: an object that will move up is low.) Objects are
brighter than the ground everywhere, so that small networks see motion after minutes of training.

Most videos take verbs and nouns at random, so what comes next cannot be known. Ego4D's long-term
anticipation has routines besides: two verbs that belong together take turns, the noun stays or two
take turns with them. Who recognises four actions in a row knows the twenty after them; who does not
look is right as often as by chance, since all 24 pairs of verb and noun are equally frequent.
Routines are soundless and outside the pre-training pool, and all of them are in the same room: the
ground and what floats before it would else tell which routine it is. The change of state needs many
rooms to be learned from nothing: short quiet videos, soundless and outside the pool, too.

UCF101 and HMDB51 ask for the order of the pictures instead: their classes are pairs of which each
is the other played backwards. Three objects have a height, a size, a distance from their middle and
a length, and one of the four runs through its whole range in a second or so. Then three others take
their place and it begins anew:

    UCF101            HMDB51        the change                  the same played backwards
    JumpingJack       climb         rise over the picture       JumpRope          climb_stairs
    BabyCrawling                    approach: 2.8 times as big  Bowling
    HammerThrow       kick          scatter from one place      Hammering         kick_ball
    HandstandPushups  brush_hair    unfold: round, then long    BodyWeightSquats  push

What does not change stands anywhere in its range, drawn anew every time. So every picture has the
same distribution in all classes and tells nothing at all; two pictures do, if one knows which is
the earlier. Nothing depends on left and right, on colours or on brightness. A group (or a film of
HMDB51) is a room and five objects, of which three are seen; each group occurs in all classes.

Oops! asks when a purpose is lost. One object rolls, walks or carries another, steadily, and turns
round at the borders; from a known moment on it is thrown about by kicks, ten times as fast, and
stops and starts again. Height, breadth and angles are numbers on a circle that start anywhere, and
whatever moves such a number leaves it anywhere: so every picture has the same distribution before
and after, and one second of motion tells which it is.

Kinetics-400, Charades and MultiTHUMOS show what one object does, eight things in all:

    Kinetics-400                       Charades  MultiTHUMOS  the change
    climbing a rope                    c000      PickUp       rise, steadily
    abseiling                          c001      Fall         sink
    inflating balloons                 c002      StandUp      grow: 1.85 times as large
    folding paper                      c003      Squat        shrink
    skiing (not slalom or cross...)    c004      Run          drift sideways, either way
    swinging legs                      c005      Walk         sway: sideways, there and back
    spinning poi                       c006      BodyRoll     spin, either way
    massaging person's back            c007      Jump         pulse: grow, shrink, and so on

Height, distance from the middle and size run evenly through a range where they change and stand
anywhere in it where they do not: so a picture of an action tells nothing. Nothing depends on left
and right, on which way something turns, on colours or on the ground. A clip of Kinetics is one
action that begins anew every two seconds, elsewhere; in a third of them a second object rests. In
the long videos two places are taken by one object after the other: it appears, rests, acts, rests
and fades, whatever the other does. Which action comes next cannot be known. (Who knows that an
object has not begun yet can rule out one or two: what will rise is low.)

Every video has its own random numbers, made from (seed, dataset, number of the video); the same
seed makes the same files whatever the number of workers.
"""
import argparse
import csv
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
import uuid
from contextlib import nullcontext
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import av
import numpy as np
from scipy.ndimage import gaussian_filter, zoom
from scipy.signal import lfilter, resample_poly

# ---- the classes: what to tune ----

TRAVEL = 0.36        # up, down: distance in picture heights
GROWTH = 1.8         # grow, shrink: factor on the radius
SWING = 0.16         # shake: amplitude in picture heights
TURN = 0.5           # spin: turns
SIZE = (0.2, 0.27)   # radius of an object in picture heights, before GROWTH
OBJECT, HAND, BLOB, GROUND = (215, 236), (60, 120), (20, 110), 55     # grey levels; see `draw`
WANDER = 16          # pixels that the camera strays from the middle
REACH = 0.7          # seconds the hand needs to come, and to go
SLIDE = 0.4          # seconds an object needs to slide in or out
CHANGE = 0.9         # seconds after which every change is over
SMALL = (72, 96)     # pictures of videos that are there for one task only
KEEP = 0.5           # how often a fitting object is struck again
TURNS = [("up", "down"), ("grow", "shrink"), ("shake", "spin")]                # in a routine

VERBS = {  # change: (EPIC class, its words), (Ego4D class, its word), start state (low, large)
    "up": ((0, ["lift", "raise"]), (41, "lift_(lift,_raise)"), (1, 0)),
    "down": ((1, ["lower", "let-down"]), (43, "lower_(lower,_let_down)"), (-1, 0)),
    "grow": ((4, ["inflate", "stretch"]), (17, "inflate_(inflate,_stretch)"), (0, -1)),
    "shrink": ((9, ["squeeze", "compress"]), (82, "squeeze_(squeeze,_compress)"), (0, 1)),
    "shake": ((13, ["shake", "jiggle"]), (74, "shake_(shake,_jiggle)"), (0, 0)),
    "spin": ((21, ["turn", "spin-round"]), (105, "turn_(turn,_spin)"), (0, 0)),
}
NOUNS = {  # course of the change: (EPIC class, its words), (Ego4D class, its word), s in contact
    "rigid": ((3, ["lid", "steel lid"]), (12, "lid_(lid,_cover)"), 0.5),
    "viscous": ((15, ["dough", "bread dough"]), (150, "dough_(dough,_paste)"), 0.8),
    "elastic": ((21, ["sponge", "rubber sponge"]), (301, "sponge_(sponge,_rubber)"), 0.8),
    "brittle": ((103, ["cracker", "rice cracker"]), (467, "cracker_(cracker,_crisp)"), 0.5),
}
PITCH = {  # verb: pitch and loudness, s = share of the ring that has passed, t = seconds
    "up": (lambda s, t: 0.6 * 3**s, lambda s, t: 1),
    "down": (lambda s, t: 1.8 * 3**-s, lambda s, t: 1),
    "grow": (lambda s, t: 0.4, lambda s, t: 0.2 + 0.8 * s),
    "shrink": (lambda s, t: 2.5, lambda s, t: 1 - 0.8 * s),
    "shake": (lambda s, t: 1, lambda s, t: 0.5 + 0.5 * np.cos(2 * np.pi * 8 * t)),
    "spin": (lambda s, t: 1 + 0.35 * np.sin(2 * np.pi * 7 * t), lambda s, t: 1),
}
TIMBRE = {  # noun: seconds, overtones, share of noise, envelope
    "rigid": (0.22, (1,), 0.0, lambda t: np.exp(-t / 0.1)),
    "viscous": (0.60, (1, 0.3), 0.9, lambda t: np.exp(-t / 0.6)),
    "elastic": (0.60, (1, 0.5, 0.3), 0.0, lambda t: np.exp(-(t % 0.2) / 0.06 - t / 0.4)),
    "brittle": (0.75, (1, 0, 0.6, 0, 0.4), 0.0, lambda t: np.exp(-(t % 0.25) / 0.05)),
}
BASE_PITCH, DETUNE, MAINS = 700, (0.96, 1.04), 100          # Hz, factor, Hz
RING, CLICK, HUM = 0.2, 0.6, 0.003                           # amplitudes
GAP = {  # kind of video: seconds from the i-th strike to the next
    "normal": lambda rng, i: 2.2 + 4 * rng.beta(1, 3.2),
    "dense": lambda rng, i: rng.uniform(1.95, 2.3),
    "calm": lambda rng, i: rng.uniform(9.8, 11) if i % 3 == 1 else rng.uniform(4.4, 6.5),
    "routine": lambda rng, i: rng.uniform(1.6, 1.9),
    "quiet": lambda rng, i: rng.uniform(9.8, 10.6),
}
RANGES = {  # of the actions: what a number between 0 and 1 stands for, in picture heights
    "height": lambda s: 0.15 + 0.7 * s,          # of the middle of the three objects
    "size": lambda s: 0.095 * 2.8**s,            # their radius
    "spread": lambda s: 0.03 + 0.35 * s,         # their distance from the middle
    "length": lambda s: 4.5**s,                  # length over breadth, the area stays
}
MOTIONS = {  # action: (what changes, does it grow)
    "rise": ("height", False), "sink": ("height", True),
    "approach": ("size", True), "leave": ("size", False),
    "scatter": ("spread", True), "gather": ("spread", False),
    "unfold": ("length", True), "fold": ("length", False),
}
ROUND = (1.0, 1.4)                               # seconds after which an action begins anew
DRIFT = 6                                        # pixels that the camera of an action strays
STEADY, KICKED = (0.3, 0.7), (1.5, 3.5)          # picture heights per second, before and after
KICKS = (0.07, 0.3)                              # seconds from one kick to the next
PAUSE = 0.5                                      # how often every second kick stops it instead
LOOKS = 32                                       # angles that are drawn; see `draw_mishap`
SWAY = 4                                         # pixels that the camera of a mishap strays
DEEDS = {  # what an object does: (what changes, its direction, 0: there and back)
    "rise": ("height", -1), "sink": ("height", 1), "grow": ("size", 1), "shrink": ("size", -1),
    "drift": ("side", 1), "sway": ("side", 0), "spin": ("angle", 1), "pulse": ("size", 0),
}
PATH = 0.48                                      # rise, sink: of the height; sideways: of a side
SCALING = 1.85                                   # grow, shrink, pulse: factor on the radius
GIRTH = (0.175, 0.205)                           # of the shorter side: radius, in the middle
SLENDER = (1.5, 2.0)                             # length over breadth: turning can be seen
PERIOD, REVOLUTION = (1.6, 2.4), (3.0, 4.2)      # s: sway and pulse; spin
PACE = 1.3                                       # how much faster these are in Kinetics
FADE = {"clip": 0.12, "scene": 0.2}              # s: of an object that appears or leaves
ANEW = (1.6, 2.4)                                # s after which an action of Kinetics begins anew
ACT = (2, 5)                                     # s: an action in the long videos, mostly short
REST, AFTER, EMPTY = (0.4, 2.0), (0.3, 1.2), (0.2, 2.1)      # s: before, behind, between objects
LEISURE = (0.5, 1.7)                             # factor on these three, another in each video
TREMBLE = 2                                      # pixels that the camera of a scene strays
ANGLES = 48                                      # that are drawn, and radii by thirds of a pixel


def course(noun, u):
    """How far a change is u seconds after the strike: 0 before it, 1 in the end."""
    if noun == "brittle":
        return np.clip(np.floor(u / 0.25 + 1e-6) + 1, 0, 3) / 3
    if noun == "viscous":
        return np.clip(u / 0.8, 0, 1)
    if noun == "rigid":
        return np.clip(u / 0.5, 0, 1) ** 3
    v = np.maximum(u, 0)                         # elastic: overshoots and swings into place
    return np.where(u > 0.85, 1.0, 1 - np.exp(-v / 0.3) * np.cos(2 * np.pi * 2.5 * v))


def swing(noun, u):
    """Sideways displacement of a shaken object; the same four rhythms as `course`."""
    length = {"rigid": 0.25, "viscous": 0.75, "elastic": 0.8, "brittle": 0.75}[noun]
    inside = (u >= 0) & (u < length)
    if noun == "brittle":                        # three jolts to the same side
        return inside * np.sin(np.pi * np.clip(u % 0.25 / 0.15, 0, 1))
    if noun == "elastic":
        return inside * np.sin(2 * np.pi * 5 * u) * np.exp(-np.maximum(u, 0) / 0.3)
    return inside * np.sin(2 * np.pi * 4 * u)


# ---- writing a video file ----


def write_video(path, frames, fps, audio=None, rate=44100, codec="libx264", options=None,
                audio_codec="aac", container_format=None, gop=None, pix_fmt="yuv420p", tag=None):
    """Write frames, an iterable of (H, W, 3) uint8, and audio, float32 (channels, n) or None.

    The file appears under its name only when it is complete. One thread: more would change the
    bytes from machine to machine, and the workers fill the cores already.
    """
    path, fps, tick = Path(path), Fraction(fps), 1 / Fraction(fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    if options is None and codec == "libx264":
        options = {"preset": "ultrafast", "crf": "27"}
    with av.open(str(part), "w", format=container_format) as container:
        video, sound, at, n = None, None, 0, 0
        for i, picture in enumerate(frames):
            if video is None:
                video = container.add_stream(codec, rate=fps, options=dict(options or {}))
                video.height, video.width = picture.shape[:2]
                video.pix_fmt, video.codec_context.thread_count = pix_fmt, 1
                video.gop_size = gop or round(fps)
                if tag:
                    video.codec_context.codec_tag = tag
                if audio is not None:
                    layout = {1: "mono", 2: "stereo"}[len(audio)]
                    quick = {"aac_coder": "fast", "aac_tns": "0", "aac_is": "0", "aac_pns": "0"}
                    sound = container.add_stream(audio_codec, rate=rate, layout=layout,
                                                 options=quick if audio_codec == "aac" else {})
                    sound.bit_rate = 40000
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, tick
            container.mux(video.encode(frame))
            if sound:                                    # up to the end of this picture
                n = math.ceil((i + 1) * rate / fps)
            while sound and at < min(n, audio.shape[1]):
                at = _add_sound(container, sound, audio, at, n, rate)
        while sound and at < audio.shape[1]:             # sound may outlast the pictures
            at = _add_sound(container, sound, audio, at, audio.shape[1], rate)
        for stream in filter(None, (video, sound)):
            container.mux(stream.encode(None))
    os.replace(part, path)


def _add_sound(container, stream, audio, at, n, rate):
    block = np.ascontiguousarray(audio[:, at:min(n, at + 4096)], dtype=np.float32)
    frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=stream.layout.name)
    frame.pts, frame.sample_rate, frame.time_base = at, rate, Fraction(1, rate)
    container.mux(stream.encode(frame))
    return at + block.shape[1]


# ---- textures and sprites ----


def noise_texture(rng, height, width, contrast=1.0):
    """Smooth dark noise of several octaves.   -> (height, width, 3) float32"""
    field = np.zeros((height, width), np.float32)
    for cell, weight in ((48, 1.0), (24, 0.6), (12, 0.4), (6, 0.25)):
        grid = rng.normal(size=(height // cell + 3, width // cell + 3)).astype(np.float32)
        field += weight * zoom(grid, cell, order=1)[:height, :width]
    weight = 1 / (1 + np.exp(-2 * field))[..., None]
    return (GROUND + contrast * GROUND * (weight - 0.5)).repeat(3, 2)


def shape_mask(kind, u, v):
    """Inside of a shape that fits into the unit circle."""
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    if kind == "box":
        return np.maximum(abs(u), abs(v)) < 0.72
    if kind == "triangle":
        return np.maximum(v, abs(u) * 0.87 - v / 2) < 0.5
    if kind == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.32) & (distance < 0.98)
    if kind == "star":
        return distance < 0.68 + 0.28 * np.cos(5 * angle)
    if kind == "ring":
        return (distance < 0.95) & (distance > 0.4)
    if kind == "finger":                                 # the hand or tool, its tip at u = -1
        return np.hypot(np.maximum(abs(u) - 0.72, 0), v) < 0.26
    return distance < 0.9                                # disc


def make_sprite(rng, kind):
    """A shape with a two-coloured texture.   -> (64, 64, 4): colour times alpha, 1 - alpha"""
    v, u = np.mgrid[-1.05:1.05:64j, -1.05:1.05:64j]
    low, high = {"finger": HAND, "blob": BLOB}.get(kind, OBJECT)
    colours = rng.uniform(low, high) + np.zeros((2, 3))
    if kind not in ("finger", "blob"):                   # two tones, so that turning can be seen
        colours[1] -= 75
    field = gaussian_filter(rng.normal(size=(64, 64)), rng.uniform(3, 7))
    field += field.std() * rng.uniform(0.5, 1.5) * np.where(u * rng.normal() + v > 0, 1, -1)
    mix = 1 / (1 + np.exp(-4 * field / field.std()))[..., None]
    alpha = gaussian_filter(shape_mask(kind, u, v).astype(float), 0.8)[..., None]
    colour = np.clip(colours[0] * mix + colours[1] * (1 - mix), 16, 236)
    return np.concatenate([colour * alpha, 1 - alpha], -1).astype(np.float32)


def turned(sprite, radius, angle):
    """The sprite at a size and an angle, (n, n, 4)."""
    n = int(radius) + 1
    x = np.arange(-n, n + 1) / (1.05 * radius)
    c, s = math.cos(angle) * 32, math.sin(angle) * 32
    u = (x[None] * c + x[:, None] * s + 32).astype(int).clip(0, 63)
    v = (x[:, None] * c - x[None] * s + 32).astype(int).clip(0, 63)
    return sprite[v, u]


def stretched(sprites, radius, angle, length):
    """As `turned`, for (4096, k) numbers of sprites that get longer at the same area, (n, m, k)."""
    longer = math.sqrt(length)
    c, s = math.cos(angle), math.sin(angle)
    y, x = (np.arange(-n, n + 1) / (1.05 * radius) for n in (
        int(radius * math.hypot(s * longer, c / longer)) + 1,
        int(radius * math.hypot(c * longer, s / longer)) + 1))
    u = (x * (32 * c / longer) + (y * (32 * s / longer) + 32)[:, None]).astype(np.intp)
    v = (x * (-32 * s * longer) + (y * (32 * c * longer) + 32)[:, None]).astype(np.intp)
    for place in (u, v):
        np.minimum(np.maximum(place, 0, out=place), 63, out=place)
    return sprites[64 * v + u]


def overlap(frame, patch, y, x):
    """Where they meet if the patch is centred at (y, x).   -> slices of frame, slices of patch"""
    top, left = round(y) - len(patch) // 2, round(x) - patch.shape[1] // 2
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + len(patch), frame.shape[0]), min(left + patch.shape[1], frame.shape[1])
    y1, x1 = max(y0, y1), max(x0, x1)
    return np.s_[y0:y1, x0:x1], np.s_[y0 - top:y1 - top, x0 - left:x1 - left]


def blend(frame, patch, y, x):
    """Draw a turned sprite centred at (y, x); what lies outside the frame is cut off."""
    place, part = overlap(frame, patch, y, x)
    patch, place = patch[part], frame[place]
    place[...] = place * patch[..., 3:] + patch[..., :3]


# ---- the pictures of a video ----


def smooth_path(rng, times, reach):
    """A slow wander of up to `reach` pixels."""
    periods, phases = rng.uniform(5, 18, 3), rng.uniform(0, 2 * np.pi, 3)
    waves = np.sin(2 * np.pi * times[:, None] / periods + phases)
    return waves @ np.array([0.5, 0.3, 0.2]) * reach


def lay_out(rng, strikes):
    """Which object is there from when to when, and which strikes it gets."""
    objects = []

    def bring(moment, low, large):
        """A new object slides in at a moment and the last one slides out."""
        if objects:
            objects[-1]["leave"] = moment
        low, large = low or rng.choice([-1, 1]), large or rng.choice([-1, 1])
        state = {"arrive": moment, "leave": math.inf, "low": low, "large": large}
        objects.append(state | {"now": [low, large], "strikes": []})

    for i, (t, verb, noun) in enumerate(strikes):
        low, large = VERBS[verb][2]
        before = strikes[i - 1][0] + CHANGE if i else -10.0
        if i and t - before > 6:                         # in a long silence: one that is only seen
            bring(rng.uniform(before, t - REACH - 3), 0, 0)
            before = objects[-1]["arrive"] + 1.5
        now = objects[-1]["now"] if objects else (0, 0)
        fits = i and low in (0, now[0]) and large in (0, now[1])
        if not fits or rng.random() > KEEP:
            bring(rng.uniform(before, max(t - REACH - SLIDE, before)) if i else -10.0, low, large)
        now = objects[-1]["now"]
        objects[-1]["strikes"].append((t, verb, noun, rng.choice([-1, 1])))
        now[0], now[1] = now[0] - 2 * low, now[1] - 2 * large
    return objects


def trace(rng, objects, times, height, width):
    """Place, size and angle of objects and hands in every picture: list of (sprite, first, last,
    y, x, radius, angle), the last four arrays over the pictures first .. last - 1."""
    def smooth(u):
        return np.clip(u, 0, 1) ** 2 * (3 - 2 * np.clip(u, 0, 1))

    tracks, hands = [], []
    kinds = ["disc", "box", "triangle", "cross", "star", "ring"]
    for o in objects:
        first, last = np.searchsorted(times, [o["arrive"], o["leave"] + SLIDE])
        t = times[first:last]
        y = height * (rng.uniform(0.43, 0.57) + o["low"] * TRAVEL / 2) + 0 * t
        x = width * rng.uniform(0.4, 0.6) + 0 * t
        radius = height * rng.uniform(*SIZE) * GROWTH ** (o["large"] / 2) + 0 * t
        angle = rng.uniform(0, 2 * np.pi) + 0 * t
        sides = rng.choice([-0.8, 0.8], size=2) * width
        x += sides[0] * (1 - smooth((t - o["arrive"]) / SLIDE))
        x += sides[1] * smooth((t - o["leave"]) / SLIDE)
        for moment, verb, noun, sense in o["strikes"]:
            p = course(noun, t - moment)
            low, large = VERBS[verb][2]
            y -= low * TRAVEL * height * p
            radius *= GROWTH ** (-large * p)
            if verb == "spin":
                angle += sense * 2 * np.pi * TURN * p
            if verb == "shake":
                x += sense * SWING * height * swing(noun, t - moment)
            # The hand stays in contact only while the change runs, follows the object and leaves
            # as it came: otherwise its place would tell what is before and what is after.
            away = np.maximum(moment - t, t - moment - NOUNS[noun][2])
            here = np.flatnonzero(away < REACH)
            hands.append((first + here, moment, away[here], (y, x, radius), here))
        tracks.append((make_sprite(rng, rng.choice(kinds)), first, last, y, x, radius, angle))
    for at, _, away, (y, x, radius), here in hands:
        if len(here):
            way = rng.uniform(-0.3, np.pi + 0.3)         # from below or from a side
            length = height * rng.uniform(0.2, 0.26)
            out = radius[here] * 0.8 + length + 1.1 * height * np.maximum(away, 0) / REACH
            hy, hx = y[here] + np.sin(way) * out, x[here] + np.cos(way) * out
            tracks.append((make_sprite(rng, "finger"), at[0], at[-1] + 1, hy, hx,
                           length + 0 * hy, way + 0 * hy))
    return tracks


def draw(video, start=0.0):
    """The pictures of a video from a time on, one (H, W, 3) uint8 array after the other."""
    rng = np.random.default_rng((*video["key"], 1))
    height, width = video["size"]
    fps, margin = video["fps"], WANDER
    times = np.arange(round(video["seconds"] * fps)) / float(fps)
    room = np.random.default_rng(video["room"]) if "room" in video else rng
    ground = noise_texture(room, height + 2 * margin, width + 2 * margin, room.uniform(0.15, 0.5))
    ground = ground.clip(16, 110).astype(np.uint8)
    pan = [smooth_path(rng, times, margin - 1) for _ in range(2)]              # y, x
    tracks = trace(rng, lay_out(rng, video["strikes"]), times, height, width)
    blobs = [(turned(make_sprite(room, "blob"), room.uniform(0.04, 0.1) * height, 0),
              room.uniform(0, height) + smooth_path(room, times, 0.4 * height),
              room.uniform(0, width) + smooth_path(room, times, 0.4 * width))
             for _ in range(room.integers(0, 3))]
    # Colours stay within 16 .. 236, so that adding the noise never wraps around.
    grain = rng.normal(0, 1.2, (8, height, width, 3)).round().clip(-8, 8).astype(np.int8)
    grain, order = grain.view(np.uint8), rng.integers(8, size=len(times))
    cache, begin = {}, round(start * fps)
    # The light changes its colour all the time: else colours would tell which video it is.
    waves = 2 * np.pi * times[:, None] / rng.uniform(3, 8, 3) + rng.uniform(0, 2 * np.pi, 3)
    light = np.round(15.5 + 15.5 * np.sin(waves)).astype(int)                  # (pictures, 3)
    shades = np.linspace(141, 256, 32).astype(np.uint16)                       # of 256
    for i in range(begin, len(times)):
        top, left = round(margin + pan[0][i]), round(margin + pan[1][i])
        frame = ground[top:top + height, left:left + width].copy()
        for patch, y, x in blobs:
            blend(frame, patch, y[i] - pan[0][i], x[i] - pan[1][i])
        for k, (sprite, first, last, y, x, radius, angle) in enumerate(tracks):
            if first <= i < last:
                j = i - first
                look = (radius[j], angle[j])
                if cache.get(k, (None,))[0] != look:
                    cache[k] = look, turned(sprite, *look)
                # The object is near: it follows the camera but for a small rest.
                blend(frame, cache[k][1], y[j] - 0.2 * pan[0][i], x[j] - 0.2 * pan[1][i])
        frame += grain[order[i]]
        yield (frame * shades[light[i]] >> 8).astype(np.uint8)


# ---- the pictures of an action ----


@lru_cache(maxsize=64)
def room_of(key, height, width):
    """Ground and five sprites of a group: all its videos are made of them."""
    rng = np.random.default_rng(key)
    ground = noise_texture(rng, height + 2 * DRIFT, width + 2 * DRIFT, rng.uniform(0.15, 0.5))
    kinds = rng.choice(["disc", "box", "triangle", "cross", "star", "ring"], 5)
    return ground.clip(16, 110).astype(np.uint8), np.stack([make_sprite(rng, k) for k in kinds], 2)


def states(rng, motion, times):
    """The four numbers of RANGES at all times, and the number of the round.   -> dict, ints"""
    clock = rng.random() + times / rng.uniform(*ROUND)
    turn = clock.astype(int)
    drawn = rng.random((turn[-1] + 1, len(RANGES)))
    at = dict(zip(RANGES, drawn[turn].T))
    what, grows = MOTIONS[motion]
    at[what] = clock - turn if grows else 1 - (clock - turn)
    return {k: RANGES[k](v) for k, v in at.items()}, turn


def draw_action(video):
    """The pictures of a video of one action, like `draw`."""
    rng = np.random.default_rng((*video["key"], 1))
    height, width = video["size"]
    times = np.arange(round(video["seconds"] * video["fps"])) / float(video["fps"])
    at, turn = states(rng, video["motion"], times)
    # The light is another one in each video: else colours would tell which group it is.
    light = np.append(rng.uniform(0.7, 1, 3), 1)
    ground, sprites = room_of(video["room"], height, width)
    ground = (ground * light[:3]).astype(np.uint8)
    sprites = (sprites * light).astype(np.float32)
    pan = np.stack([smooth_path(rng, times, DRIFT - 1) for _ in range(2)], 1) + DRIFT
    pan = pan.round().astype(int)                                              # y, x
    grain = rng.normal(0, 1, (height + 8, width + 8, 3)).round().clip(-8, 8).astype(np.int8)
    grain, moves = grain.view(np.uint8), rng.integers(9, size=(len(times), 2))
    last = shape = None
    for i in range(len(times)):
        if turn[i] != last:                              # three others, at another place
            last, shape, x = turn[i], None, width * rng.uniform(0.35, 0.65)
            three = sprites[:, :, rng.permutation(5)[:3]].reshape(4096, 12)
            tilt, way = rng.uniform(1, 2.1), rng.random() + np.arange(3) / 3
            cosines, sines = np.cos(2 * np.pi * way), np.sin(2 * np.pi * way)
        frame = ground[pan[i, 0]:pan[i, 0] + height, pan[i, 1]:pan[i, 1] + width].copy()
        middle, radius, spread, length = (at[k][i] for k in RANGES)
        if shape != (radius, length):
            shape, patch = (radius, length), stretched(three, height * radius, tilt, length)
        for k in range(3):
            blend(frame, patch[:, :, 4 * k:4 * k + 4], height * (middle + spread * sines[k]),
                  x + height * spread * cosines[k])
        y0, x0 = moves[i]
        frame += grain[y0:y0 + height, x0:x0 + width]
        yield frame


# ---- the pictures of a mishap ----


def soft_ground(rng, height, width, light):
    """Faint smooth noise, quicker than `noise_texture`.   -> (height, width, 3) uint8"""
    ground = gaussian_filter(rng.normal(size=(height, width)), 4)
    ground = GROUND * (1 + rng.uniform(0.05, 0.15) * ground / ground.std()).clip(0.5, 1.5)
    return (ground[..., None] * light[:3]).astype(np.uint8)


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
    """Where the object is in every picture.   -> y, x (pixels), its angle, that of its load

    A steady course until video["truth"], then kicks. All four begin anywhere on a circle and what
    moves them knows nothing of where they are, so they are anywhere on it in every picture.
    """
    rng = np.random.default_rng((*video["key"], 4))
    height, width = video["size"]
    times = np.arange(round(video["seconds"] * video["fps"])) / float(video["fps"])
    truth, radius, gait = video["truth"], video["radius"], video["gait"]
    begin, turn, load = rng.uniform(0, 2, 2), *rng.uniform(0, 2 * np.pi, 2)
    way, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*STEADY)
    free = np.array([[height], [width]]) - 2 * radius    # where the middle can be
    *carried, spin, whirl = kicks(rng, times, truth)
    held = np.minimum(times, truth)
    moved = speed * held * np.array([[np.sin(way)], [np.cos(way)]]) + carried
    step = 2 * np.pi * rng.uniform(1.5, 2.5) * held      # two of them a second or so
    if gait == "walk":
        moved[0] += 0.03 * np.sin(step)
        turn = turn + 0.3 * np.sin(step / 2)
    y, x = radius + free * folded(begin[:, None] + moved * height / free)
    if gait == "roll":
        turn = turn + x / radius
    return y, x, turn + spin, load + whirl


def draw_mishap(video, wanted=None):
    """The pictures of a video of Oops!, like `draw`; all of them or those numbered `wanted`."""
    rng = np.random.default_rng((*video["key"], 1))
    height, width = video["size"]
    y, x, turn, load = mishap(video)
    times = np.arange(len(y)) / float(video["fps"])
    light = np.append(rng.uniform(0.7, 1, 3), 1).astype(np.float32)
    ground = soft_ground(rng, height + 2 * SWAY, width + 2 * SWAY, light)
    pan = np.stack([smooth_path(rng, times, SWAY - 1) for _ in range(2)]) + SWAY
    tops, lefts = pan.round().astype(int).tolist()
    kind, other = rng.choice(["disc", "box", "triangle", "cross", "star", "ring"], 2)
    radius, sprite = video["radius"], make_sprite(rng, kind) * light
    # As many looks as can be told apart at this size: turning anew in each picture takes longer.
    looks = [turned(sprite, radius, 2 * np.pi * k / LOOKS) for k in range(LOOKS)]
    turn = (turn * LOOKS / (2 * np.pi)).round().astype(int) % LOOKS
    if video["gait"] == "carry":
        small = turned(make_sprite(rng, other) * light, radius / 2, 0)
        sides = np.stack([y + radius * np.sin(load), x + radius * np.cos(load)]).tolist()
    y, x, turn = y.tolist(), x.tolist(), turn.tolist()
    for i in range(len(y)) if wanted is None else wanted:
        frame = ground[tops[i]:tops[i] + height, lefts[i]:lefts[i] + width].copy()
        blend(frame, looks[turn[i]], y[i], x[i])
        if video["gait"] == "carry":
            blend(frame, small, sides[0][i], sides[1][i])
        yield frame


# ---- the pictures of what one or two objects do ----


def follow(rng, actor, times, size):
    """An object at some times.   -> y, x, radius (pixels), angle, how solid it is"""
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


def draw_scene(video):
    """The pictures of a video of Kinetics-400, Charades or MultiTHUMOS, like `draw`."""
    rng = np.random.default_rng((*video["key"], 1))
    height, width = video["size"]
    times = np.arange(round(video["seconds"] * video["fps"])) / float(video["fps"])
    ground = soft_ground(rng, height + 2 * TREMBLE, width + 2 * TREMBLE, rng.uniform(0.6, 1.1, 3))
    pan = np.stack([smooth_path(rng, times, TREMBLE) for _ in range(2)]) + TREMBLE
    tops, lefts = pan.round().astype(int).tolist()
    looks, tracks = {}, []
    for actor in sorted(video["actors"], key=lambda a: a["appear"]):
        first, last = np.searchsorted(times, [actor["appear"], actor["leave"]]).tolist()
        y, x, radius, angle, solid = follow(rng, actor, times[first:last], video["size"])
        if actor["look"] not in looks:
            kind = rng.choice(["disc", "box", "triangle", "cross", "star", "ring"])
            tint = np.append(rng.uniform(0.75, 1, 3), 1)
            sprite = (make_sprite(rng, kind) * tint).astype(np.float32).reshape(4096, 4)
            looks[actor["look"]] = sprite, rng.uniform(*SLENDER), {}
        shapes = np.stack([(3 * radius).round(), (ANGLES * angle).round() % ANGLES], 1).astype(int)
        tracks.append((first, last, y.tolist(), x.tolist(), [tuple(s) for s in shapes.tolist()],
                       solid.tolist(), looks[actor["look"]]))
    for i in range(len(times)):
        frame = ground[tops[i]:tops[i] + height, lefts[i]:lefts[i] + width].copy()
        for first, last, y, x, shapes, solid, (sprite, length, drawn) in tracks:
            if first <= i < last:
                shape, j = shapes[i - first], i - first
                if shape not in drawn:
                    turn = 2 * np.pi * shape[1] / ANGLES
                    patch = stretched(sprite, shape[0] / 3, turn, length)
                    drawn[shape] = patch[..., :3].copy(), patch[..., 3:].repeat(3, 2)
                colour, free = drawn[shape]              # as `blend`, in less time
                place, part = overlap(frame, colour, y[j], x[j])
                colour, free = colour[part], free[part]
                if solid[j] < 1:
                    colour, free = colour * solid[j], 1 - solid[j] * (1 - free)
                frame[place] = frame[place] * free + colour
        yield frame


# ---- the sound of a video ----


def click(rng, rate):
    t = np.arange(int(0.008 * rate)) / rate
    return CLICK * rng.uniform(-1, 1, len(t)) * np.exp(-t / 0.003)


def strike_sound(rng, verb, noun, rate):
    """A click and a ring whose pitch tells the verb and whose timbre tells the noun."""
    seconds, overtones, noisy, envelope = TIMBRE[noun]
    t = np.arange(int(seconds * rate)) / rate
    pitch, loudness = (f(t / seconds, t) for f in PITCH[verb])
    phase = np.cumsum(BASE_PITCH * rng.uniform(*DETUNE) * pitch + 0 * t) * 2 * np.pi / rate
    tone = sum(w * np.sin((k + 1) * phase) for k, w in enumerate(overtones))
    if noisy:                                            # a band of noise around the pitch
        flutter = lfilter([0.03], [1, -0.97], rng.normal(size=len(t)))
        tone *= (1 - noisy) + noisy * flutter / flutter.std()
    fade = np.minimum(1, np.minimum(t, seconds - t) / 0.01)
    out = RING * loudness * envelope(t) * fade * tone / max(1, sum(overtones))
    for k, at in enumerate((0, 0.25, 0.5) if noun == "brittle" else (0,)):
        c = click(rng, rate) * 0.8**k
        out[int(at * rate):int(at * rate) + len(c)] += c
    return out * rng.uniform(0.85, 1)


def hear(video):
    """The sound of a video, (channels, n) float32, or None where there is no track."""
    rng = np.random.default_rng((*video["key"], 2))
    rate, n = video["rate"], round(video["seconds"] * video["rate"])
    if video["sound"] == "none":
        return None
    if video["sound"] == "silent":
        return np.zeros((video["channels"], n), np.float32)
    hum = np.sin(np.float32(2 * np.pi * MAINS / rate) * np.arange(n, dtype="f4"))
    mono = HUM * (0.5 * hum + rng.random(n, dtype="f4") - 0.5)
    for t, verb, noun in video["strikes"]:
        sound, at = strike_sound(rng, verb, noun, rate), round(t * rate)
        mono[at:at + len(sound)] += sound[:n - at]
    gains = rng.uniform(0.85, 1, (video["channels"], 1))
    return np.clip(gains * mono, -1, 1).astype(np.float32)


# ---- planning the videos of a dataset ----


def plan_video(seed, name, k, kind, seconds, fps, sound="on", count=None):
    """When something is struck in video number k, `count` times or throughout; no classes yet."""
    key = (seed, crc32(name.encode()), k)
    rng = np.random.default_rng(key)
    lead, tail = (1.9, 2.0) if kind == "routine" else (1.2, 1.5)     # room for windows of 3 s
    times = [rng.uniform(lead, lead + 1.8)]
    count = rng.integers(26, 29) if kind == "dense" else count
    while len(times) < count if count else times[-1] < seconds:
        times.append(times[-1] + GAP[kind](rng, len(times)))
    if count:                                            # as long as so many strikes take
        seconds = times[-1] + tail
    times = [t for t in times if t < seconds - 1.1]
    size = [(96, 128), (96, 128), (104, 136), (96, 144)][rng.integers(4)]
    return {"key": key, "size": size, "fps": Fraction(fps), "sound": sound, "times": times,
            "seconds": round(float(round(seconds * fps) / Fraction(fps)), 6), "kind": kind,
            "rate": int(rng.choice([44100, 48000])), "channels": int(rng.choice([1, 2]))}, rng


def deal(videos, rng):
    """Give every strike of a split a verb and a noun, all pairs equally often."""
    pairs, deck = [(v, n) for v in VERBS for n in NOUNS], []
    for video in videos:
        video["strikes"] = []
        for t in video["times"]:
            deck = deck or [pairs[i] for i in rng.permutation(len(pairs))]
            video["strikes"].append((t, *deck.pop()))


def deal_routines(videos, rng):
    """Give every strike of the routines its classes: 12 routines, all equally often.

    Pairs of verbs times four, of which two keep their noun; so each verb meets each noun alike.
    """
    nouns, routines, deck = list(NOUNS), [], []
    for i, (one, two) in enumerate(TURNS):
        a, b, c, d = nouns[i:] + nouns[:i]
        routines += [((one, a), (two, a)), ((two, b), (one, b)),
                     ((one, c), (two, d)), ((two, c), (one, d))]
    for video in videos:
        deck = deck or [routines[i] for i in rng.permutation(len(routines))]
        turns = deck.pop()
        video["strikes"] = [(t, *turns[i % 2]) for i, t in enumerate(video["times"])]


def counted(n, scale, least):
    return max(least, round(n * scale))


# ---- EPIC-KITCHENS-100 ----

EPIC_COLUMNS = ["narration_id", "participant_id", "video_id", "narration_timestamp",
                "start_timestamp", "stop_timestamp", "start_frame", "stop_frame", "narration",
                "verb", "verb_class", "noun", "noun_class", "all_nouns", "all_noun_classes"]


def stamp(seconds, digits):
    minutes, rest = divmod(round(seconds, digits), 60)
    return f"{minutes // 60:02.0f}:{minutes % 60:02.0f}:{rest:0{3 + digits}.{digits}f}"


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def epic_rows(video, rng):
    """One annotation per strike, which is about in the middle of its time span."""
    rows, name = [], video["id"]
    for i, (t, verb, noun) in enumerate(video["strikes"]):
        start, stop = t - rng.uniform(0.25, 0.45), t + rng.uniform(0.6, 0.95)
        if rng.random() < 0.06:                          # a few overlap the next one
            stop += 1.8
        start, stop = round(max(start, 0), 2), round(min(stop, video["seconds"]), 2)
        if video.get("overrun") and i + 1 == len(video["strikes"]):
            stop = round(video["seconds"] + 3.3, 2)
        (verb_class, verbs), (noun_class, nouns) = VERBS[verb][0], NOUNS[noun][0]
        verb, noun = rng.choice(verbs), rng.choice(nouns)
        way = rng.choice([f"{verb} {noun}", f"{verb}, gently, {noun}"], p=[0.85, 0.15])
        also = [["cup", 13]] if rng.random() < 0.1 else []
        rows.append(dict(zip(EPIC_COLUMNS, [
            f"{name}_{i}", name[:3], name, stamp(max(0, start - rng.uniform(-0.3, 0.3)), 3),
            stamp(start, 2), stamp(stop, 2), int(start * video["fps"]), int(stop * video["fps"]),
            str(way).replace("-", " "), str(verb), verb_class, str(noun), noun_class,
            [str(noun)] + [a[0] for a in also], [noun_class] + [a[1] for a in also]])))
    return rows


def make_epic(root, seed, scale, segments):
    """Annotations of the toy EPIC-KITCHENS-100.   -> the videos to draw"""
    rng = np.random.default_rng((seed, crc32(b"epic")))
    people = {"train": [f"P{i:02d}" for i in range(1, 7)],
              "validation": ["P01", "P18", "P02", "P32", "P03", "P04", "P05", "P06"],
              "test_timestamps": ["P04", "P27"]}
    counts = {"train": counted(14, scale, 3), "validation": counted(8, scale, 2),
              "test_timestamps": counted(2, scale, 1)}
    folder, tasks, infos = root / "annotations", [], []
    folder.mkdir(parents=True)
    for s, (split, names) in enumerate(people.items()):
        videos = []
        for k in range(counts[split] + (split == "train")):
            absent = k == counts["train"]                # listed, but its file could not be had
            fps = {3: Fraction(50), 5: Fraction(60000, 1001)}.get(k, Fraction(30000, 1001))
            video, own = plan_video(seed, "epic", 1000 * s + k, "normal",
                                    12 if absent else rng.uniform(39, 48), fps,
                                    "none" if (s, k) == (0, 2) else "on")
            number = 10 * s + k // len(names) + 1
            video["id"] = f"{names[k % len(names)]}_{number + 100 * (k % 2):0{2 + k % 2}d}"
            video |= {"channels": 2, "own": own, "absent": absent, "overrun": (s, k) == (0, 1)}
            videos.append(video)
        deal(videos, rng)
        rows = []
        for video in videos:
            rows += epic_rows(video, video.pop("own"))
            resolution = "{1}x{0}".format(*video["size"])
            infos.append({"video_id": video["id"], "duration": video["seconds"],
                          "fps": float(video["fps"]), "resolution": resolution})
            if not video["absent"]:
                path = root / "videos" / video["id"][:3] / f"{video['id']}.MP4"
                video["files"] = [(path, 0.0, [])]
                video["segments"] = root / "segments" if segments else None
                tasks.append(video)
        write_csv(folder / f"EPIC_100_{split}.csv", EPIC_COLUMNS[:8 if s == 2 else 15], rows)
    write_csv(folder / "EPIC_100_video_info.csv", list(infos[0]), infos)
    # Official counts: 97 verbs of which 86 in the tail, 300 nouns of which 228. In the toy the
    # tail is the end of the list; two of its verbs and one of its nouns do occur.
    for word, table, number, tail in (("verb", VERBS, 97, 86), ("noun", NOUNS, 300, 228)):
        used = {row[0][0]: row[0][1] for row in table.values()}
        used = {13: ["cup"]} | used if word == "noun" else used
        classes = [(i, used.get(i, [f"{word}-{i}"])) for i in range(number)]
        columns = ["id", "key", "instances", "category"]
        write_csv(folder / f"EPIC_100_{word}_classes.csv", columns,
                  [dict(zip(columns, (i, w[0], w, "toy"))) for i, w in classes])
        write_csv(folder / f"EPIC_100_tail_{word}s.csv", [word],
                  [{word: i} for i in range(number - tail, number)])
    for split, unseen in (("validation", ["P18", "P32"]), ("test", ["P27"])):
        write_csv(folder / f"EPIC_100_unseen_participant_ids_{split}.csv", ["participant_id"],
                  [{"participant_id": p} for p in unseen])
    return tasks


# ---- Ego4D ----


def write_json(path, split, clips):
    head = {"version": "v1", "date": "220101", "description": "toy copy of Ego4D FHO",
            "manifest": "toy", "split": split}
    path.write_text(json.dumps(head | {"clips": clips}))


def span(name, start, stop):
    """The four keys of a span of time at Ego4D's 30 frames per second."""
    return {f"{name}_start_sec": round(start, 3), f"{name}_end_sec": round(stop, 3),
            f"{name}_start_frame": round(start * 30), f"{name}_end_frame": round(stop * 30)}


def lta_entries(video, k, rng, labels):
    """The actions of a clip: windows around the strikes, short ones and some of 8 s.

    In a routine the middle 2.13 s hold the whole change and no other strike.
    """
    entries, end = [], video["seconds"] - video["cut"]
    strikes = [(t - video["cut"], *c) for t, *c in video["strikes"] if t > video["cut"] + 1]
    for i, (t, verb, noun) in enumerate(strikes):
        if video["kind"] == "routine":
            length = rng.uniform(2.4, 3.0)
            start = round(t - length / 2 - rng.uniform(-0.35, 0.15), 2)
        else:
            length = 8.0 if rng.random() < 0.15 else rng.uniform(2.4, 4.0)
            start = max(0.0, round(t - length * rng.uniform(0.4, 0.6), 2))
        stop = round(min(end, start + length), 2)
        if video["overrun"] and i + 1 == len(strikes):
            stop = round(end + 2.5, 2)
        (verb_label, verb), (noun_label, noun) = VERBS[verb][1], NOUNS[noun][1]
        words = {"verb": verb, "noun": noun}
        numbers = {"verb_label": verb_label, "noun_label": noun_label}
        entries.append({
            "video_uid": video["video_uid"], "clip_uid": video["clip_uid"], "clip_id": k,
            **span("clip_parent", video["cut"], video["seconds"]),
            **span("interval", video["cut"], video["seconds"]), **(words if labels else {}),
            **span("action_clip", start, stop), "action_idx": i, **(numbers if labels else {})})
    return entries


def oscc_entries(video, k, rng, labels):
    """8 s windows, where the pauses allow it, with exactly one strike or with none."""
    entries, times = [], [-CHANGE, *(t for t, *_ in video["strikes"]), video["seconds"] + REACH]
    free = [(i, i + 1) for i in range(len(times) - 1)]
    for i, j in 3 * free + 2 * [(i, i + 2) for i in range(len(times) - 2)]:
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
        name, stop = f"{k}{len(entries):03d}", round(start + length, 1)
        place = f"{start:g}-{stop:g}".replace(".", "_")
        unique = f"{uuid_from(rng)}-{place}" if labels else f"{name}-{place}-{name}"
        known = start >= video["cut"] and rng.random() < 0.8
        entry = {"clip_id": name, "unique_id": unique, "video_uid": video["video_uid"],
                 **span("parent", start, stop)}
        if labels and not change:
            entry |= {"state_change": False, "pnr_frame": None}
        else:
            entry = {"clip_uid": video["clip_uid"] if known else None} | entry
        if labels and change:
            pnr, cut = round(times[i + 1] * 30), video["cut"] if known else 0
            entry |= {**span("clip", start - cut, stop - cut), "state_change": True,
                      "clip_pnr_frame": pnr - round(30 * cut), "parent_pnr_frame": pnr}
        entries.append((change, entry))
    return entries


def uuid_from(rng):
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def plan_routines(seed, s, scale):
    """The routines of split number s: 12, 12 and 2 clips with 10, 4 and 4 windows of 24 actions."""
    videos, count = [], 26 + 2 * round(min(scale, 1) * (4, 1, 1)[s])
    for k in range(counted((12, 12, 2)[s], scale, 1)):
        video, own = plan_video(seed, "routine", 1000 * s + k, "routine", 0, 30, "none", count)
        videos.append(video | {"own": own, "size": SMALL, "room": (seed, crc32(b"room"))})
    deal_routines(videos, np.random.default_rng((seed, crc32(b"routines"), s)))
    return videos


def plan_quiet(seed, s, scale):
    """Short videos of split number s with one strike in ten seconds, for the change of state."""
    videos = []
    for k in range(counted((24, 8, 1)[s], scale, 1)):
        video, own = plan_video(seed, "quiet", 1000 * s + k, "quiet", 20, 30, "none")
        videos.append(video | {"own": own, "size": SMALL})
    deal(videos, np.random.default_rng((seed, crc32(b"quiet"), s)))
    return videos


def make_ego4d(root, seed, scale, segments):
    """Annotations of the toy Ego4D.   -> the videos to draw"""
    rng = np.random.default_rng((seed, crc32(b"ego4d")))
    kinds = {"train": ["dense", "calm", "normal", "calm", "calm", "normal", "dense", "normal",
                       "calm", "normal", "calm", "dense", "normal", "calm", "normal", "normal"],
             "val": ["dense", "calm", "normal", "calm", "dense", "calm"],
             "test_unannotated": ["dense", "calm"]}
    folder, tasks = root / "annotations", []
    folder.mkdir(parents=True)
    for s, (split, pattern) in enumerate(kinds.items()):
        videos, lta, oscc = [], [], []
        n = counted(len(pattern), scale, (4, 2, 2)[s])
        for k in range(n + (split == "train")):
            kind = pattern[k % len(pattern)] if k < n else "normal"
            sound = {2: "none", 3: "silent", 5: "none"}.get(k, "on") if s == 0 else "none"
            seconds = rng.uniform(52, 60) if kind == "calm" else rng.uniform(30, 38)
            video, own = plan_video(seed, "ego4d", 1000 * s + k, kind, seconds, 30, sound)
            # Where the clip is a part of its video, the video starts 8 s earlier.
            video |= {"cut": 8.0 if k == 1 else 0.0, "own": own, "absent": k == n,
                      "overrun": (s, k) == (0, 2)}
            videos.append(video)
        deal(videos, rng)
        for video in plan_quiet(seed, s, scale) + plan_routines(seed, s, scale):
            videos.append(video | {"cut": 0.0, "absent": False, "overrun": False})
        for k, video in enumerate(videos):
            own, labels = video.pop("own"), split != "test_unannotated"
            video |= {"clip_uid": uuid_from(own), "video_uid": uuid_from(own)}
            if video["kind"] != "quiet":
                lta += lta_entries(video, 100 * s + k, own, labels)
            if video["absent"]:                          # listed, but its file could not be had
                continue
            if video["kind"] not in ("dense", "routine"):
                oscc += oscc_entries(video, 100 * s + k, own, labels)
            clip = root / "clips" / f"{video['clip_uid']}.mp4"
            whole = root / "videos" / f"{video['video_uid']}.mp4"
            pretrain = split == "train" and video["kind"] not in ("routine", "quiet")
            pool = [root / f"{video['clip_uid']}.mp4"] if pretrain else []
            same = [(clip, 0.0, [whole, *pool])]
            parts = [(whole, 0.0, []), (clip, video["cut"], pool)]
            video["files"] = parts if video["cut"] else same
            video["segments"] = None
            tasks.append(video)
        # As many positives as negatives of every length, in seconds.
        keep = []
        for length in range(4, 9):
            some = [[e for change, e in oscc if change == c and length == (
                e["parent_end_frame"] - e["parent_start_frame"]) // 30] for c in (True, False)]
            fewest = min(map(len, some))
            keep += [e[i] for e in some for i in rng.permutation(len(e))[:fewest]]
        keep = [keep[i] for i in rng.permutation(len(keep))]
        write_json(folder / f"fho_lta_{split}.json", split, lta)
        write_json(folder / f"fho_oscc-pnr_{split}.json", split, keep)
    taxonomy = {"verbs": [f"verb_{i}" for i in range(115)],
                "nouns": [f"noun_{i}" for i in range(478)]}
    for word, table in (("verbs", VERBS), ("nouns", NOUNS)):
        for row in table.values():
            taxonomy[word][row[1][0]] = row[1][1]
    (folder / "fho_lta_taxonomy.json").write_text(json.dumps(taxonomy))
    return tasks


# ---- UCF101 and HMDB51 ----

UCF101 = """
ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball
BasketballDunk BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling
BoxingPunchingBag BoxingSpeedBag BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling
CricketShot CuttingInKitchen Diving Drumming Fencing FieldHockeyPenalty FloorGymnastics
FrisbeeCatch FrontCrawl GolfSwing Haircut Hammering HammerThrow HandstandPushups HandstandWalking
HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing JavelinThrow JugglingBalls
JumpingJack JumpRope Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks
ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar
PlayingPiano PlayingSitar PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps
Rafting RockClimbingIndoor RopeClimbing Rowing SalsaSpin ShavingBeard Shotput SkateBoarding Skiing
Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings SumoWrestling Surfing Swing
TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars
VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo
""".split()
UCF_MOTIONS = {"BabyCrawling": "approach", "BodyWeightSquats": "fold", "Bowling": "leave",
               "Hammering": "gather", "HammerThrow": "scatter", "HandstandPushups": "unfold",
               "JumpingJack": "rise", "JumpRope": "sink"}
HMDB_MOTIONS = {"brush_hair": "unfold", "climb": "rise", "climb_stairs": "sink",
                "kick": "scatter", "kick_ball": "gather", "push": "fold"}
FILMS = ["Harbour_Lights", "(Night)_Train_No_7!", "Two_Rivers_[Part_1]_2", "#4_Dinner_At_Eight",
         "Salt_&_Pepper;_a_day", "Old_Garden_3", "me@the_lake_1999", "Snow~Trip+Sauna",
         "The_Long_Stairs", "20070412_park", "Kite_Weather_II"]


def plan_action(seed, name, k, motion, place, fps, size):
    """Video number k of one action; `place` is the number of its group or film."""
    key = (seed, crc32(name.encode()), k)
    rng = np.random.default_rng((*key, 3))
    quantiser = str(rng.integers(5, 11))
    options = {"qmin": quantiser, "qmax": quantiser}
    if rng.random() < 0.15:                              # B-frames: not in the order of time
        options["bf"] = "2"
    coding = {"codec": "mpeg4", "tag": "XVID", "gop": int(rng.integers(12, 51)),
              "options": options}
    return {"key": key, "motion": motion, "room": (seed, crc32(f"{name} room".encode()), place),
            "size": size, "fps": Fraction(fps), "sound": "none",
            "rate": 44100, "coding": coding, "segments": None}, rng


def write_lines(path, lines, end):
    path.write_bytes("".join(line + end for line in lines).encode())


def make_ucf101(root, seed, scale, segments):
    """Lists of the toy UCF101.   -> the videos to draw"""
    folder, tasks, rows = root / "ucfTrainTestlist", [], []
    folder.mkdir(parents=True)
    order = [1, 8, 15, 22, 24, 25]                       # one of each list, and some of training
    order += [g for g in range(25, 0, -1) if g not in order]
    groups = sorted(order[:counted(25, min(scale, 1), 6)])
    for c, name in enumerate(UCF101, 1):
        word = name.replace("Handst", "HandSt")          # its files are so called
        for group in groups if name in UCF_MOTIONS else ():
            for clip in range(1, counted(2 - group % 2, scale, 1) + 1):
                k = 100000 * c + 1000 * group + clip
                video, own = plan_action(seed, "ucf101", k, UCF_MOTIONS[name], group, 25,
                                         (68, 92))
                frames = int(own.integers(30, 51)) if tasks else 29
                path = f"{name}/v_{word}_g{group:02d}_c{clip:02d}.avi"
                tasks.append(video | {"seconds": frames / 25,
                                      "files": [(root / "UCF-101" / path, 0.0, [])]})
                rows.append((group, path, c))
    write_lines(folder / "classInd.txt", [f"{c} {x}" for c, x in enumerate(UCF101, 1)], "\r\n")
    for i in (1, 2, 3):                                  # groups 1-7, 8-14 and 15-21 are tested
        test = range(7 * i - 6, 7 * i + 1)
        write_lines(folder / f"trainlist{i:02d}.txt",
                    [f"{path} {c}" for group, path, c in rows if group not in test], "\r\n")
        write_lines(folder / f"testlist{i:02d}.txt",
                    [path for group, path, _ in rows if group in test], "\r\n")
    return tasks


def make_hmdb51(root, seed, scale, segments):
    """Splits of the toy HMDB51.   -> the videos to draw"""
    folder, tasks = root / "testTrainMulti_7030_splits", []
    folder.mkdir(parents=True)
    rng = np.random.default_rng((seed, crc32(b"hmdb51")))
    films, clips = counted(len(FILMS), min(scale, 1), 4), counted(3, scale, 1)
    shapes = [(68, int(w)) for w in rng.choice(range(88, 122, 2), films)]
    tested = max(1, 3 * (films - 1) // 10)               # in each split; one film is unused
    for c, name in enumerate(HMDB_MOTIONS):
        rows = []
        for film in range(films):
            for clip in range(clips):
                k = 100000 * c + 1000 * film + clip
                video, own = plan_action(seed, "hmdb51", k, HMDB_MOTIONS[name], film, 30,
                                         shapes[film])
                short = own.random() < 0.04 or (c, film, clip) == (0, 0, 0)
                frames = int(own.integers(17, 25)) if short else 40 + int(40 * own.beta(1, 4))
                tags = [own.choice(x.split()) for x in (
                    "h u f l", "cm nm", "np1 np2", "fr ba le ri", "bad med goo")]
                file = "_".join([FILMS[film], name, *tags, f"{clip}.avi"])
                video |= {"seconds": frames / 30,
                          "files": [(root / "hmdb51_org" / name / file, 0.0, [])]}
                tasks.append(video)
                rows.append((file, film))
        for i in range(3):
            test = range(tested * i, tested * (i + 1))
            idle = films - 1 - i % (films - 3 * tested)
            write_lines(folder / f"{name}_test_split{i + 1}.txt", [
                f"{file} {2 if film in test else 0 if film == idle else 1} "
                for file, film in sorted(rows)], "\n")
    return tasks


# ---- Oops! ----

# A running number follows directly. What a script must survive: commas, quotes, %, emoji, a year.
TITLES = ["Some Fails (March 2099) _ Channel", "Some Fails, Part 2 (May 2099) _ Channel",
          'The "Easy" Jump, and More _ Channel', "Don't Try This! - Mishaps of the Week _ Clips",
          "Cats & Dogs; Slips & Trips _ Channel", "#1 Kitchen Fails You Missed #26 (June 2099)",
          "110% Effort, 0% Luck _ Channel", "Fête d'été à Málaga – Größte Stürze _ Café",
          "Winter Fails! \u2744\ufe0f\U0001f602 (January 2099) _ Channel", "Other Fails 2099",
          "Ladders [Extended] + Ice = ~Ouch~ @ Home  (April 2099) _ Channel", "Party On... Go!"]
OOPS_RATES = [Fraction(25), Fraction(30000, 1001), Fraction(30)]
OOPS_SIZES = [(48, 52), (48, 48), (48, 54), (50, 52), (52, 50), (54, 48)]


def oops_kinds(rng, n, annotated):
    """What is special about each of n videos, of which some are annotated.   -> list of words"""
    few, rare = max(1, annotated // 25), max(1, annotated // 50)
    kinds = ["never"] * few + ["two"] * few + ["one"] * max(1, annotated // 8)
    kinds += ["early", "late"] * rare + ["short"] + ["tiny"] * (rare - 1)
    kinds += ["normal"] * (annotated - len(kinds)) + ["unlabelled"] * (n - annotated)
    return [kinds[i] for i in rng.permutation(n)]


def plan_mishap(seed, k, kind, seconds):
    """Video number k of Oops!, `seconds` long at least and at most."""
    key = (seed, crc32(b"oops"), k)
    rng = np.random.default_rng((*key, 3))
    size = OOPS_SIZES[rng.integers(len(OOPS_SIZES))]
    # The end of a "late" one is a multiple of 1/8 s: its annotated length is its own.
    fps = OOPS_RATES[0] if kind == "late" else OOPS_RATES[rng.integers(3)]
    seconds = {"late": 6.0, "short": 3.1, "tiny": 2.7}.get(kind, rng.uniform(*seconds))
    seconds = round(seconds * fps) / fps
    truth = float(seconds) * rng.uniform(0.12, 0.88)
    truth = {"never": math.inf, "early": 0.02, "late": float(seconds) - 0.02}.get(kind, truth)
    options = {"preset": "ultrafast", "qp": "22"}        # the same for all: blur would tell speeds
    if k % 6 == 0:
        options["bf"] = "2"                              # B-frames: not in the order of time
    return {"key": key, "size": size, "fps": fps, "seconds": float(seconds), "kind": kind,
            "truth": truth, "radius": rng.uniform(0.12, 0.15) * math.sqrt(size[0] * size[1]),
            "gait": str(rng.choice(["roll", "walk", "carry"])), "sound": "none", "rate": 44100,
            "coding": {"options": options, "gop": 60}, "segments": None}, rng


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


def heldout_entry(video, rng):
    """What a fourth annotator says, less exactly."""
    found = video["kind"] != "never" and rng.random() > 0.06
    t = np.clip(video["truth"] + rng.normal(0, 0.15), 0, video["seconds"]) if found else -1
    return {"t": [round(float(t), 6)], "stdev": 0, "rel_stdev": 0, "n_notfound": int(not found)}


def oops_row(name, entry):
    """A row of train.csv or val.csv: means over the annotators who saw something."""
    seen = [(t, rel) for t, rel in zip(entry["t"], entry["rel_t"]) if t >= 0]
    t, rel = np.mean(seen, 0).tolist() if seen else (-1, -1)
    return {"filename": f"{name}.mp4", "t": t, "t_rel": rel, "len": entry["len"]}


def write_oops_tables(folder, split, names, entries, lost):
    """The list and the four tables of a split; names in `lost` are in the list alone."""
    write_lines(folder / f"{split}.txt", names, "\n")
    names = [x for x in names if x not in lost]
    free = [{"filename": x} for x in names if x not in entries]
    rows = [oops_row(x, entries[x]) for x in names if x in entries]
    columns, splits = ["filename", "t", "t_rel", "len"], folder / "splits"
    write_csv(splits / f"{split}_all_org.csv", columns[:1], [{"filename": x} for x in names])
    write_csv(splits / f"{split}_unlabeled.csv", columns[:1], free)
    write_csv(splits / f"{split}.csv", columns, rows)
    write_csv(splits / f"{split}_0.csv", columns, [r for r in rows if r["t"] != -1])


def make_oops(root, seed, scale, segments, seconds=(5, 9)):
    """Annotations of the toy Oops!.   -> the videos to draw"""
    rng = np.random.default_rng((seed, crc32(b"oops")))
    counts = {"train": counted(160, scale, 24), "val": counted(80, scale, 12)}
    numbers = rng.permutation(2 * sum(counts.values())).tolist()
    folder, tasks, times, heldout = root / "annotations", [], {}, {}
    (folder / "splits").mkdir(parents=True)
    for split, n in counts.items():
        videos, entries = {}, {}
        for kind in oops_kinds(rng, n, round(n * {"train": 0.69, "val": 0.8}[split])):
            video, own = plan_mishap(seed, len(tasks), kind, seconds)
            name = f"{TITLES[len(tasks) % len(TITLES)]}{numbers.pop()}"
            tasks.append(video | {"files": [(root / "oops_video" / split / f"{name}.mp4", 0., [])]})
            videos[name] = video
            if kind != "unlabelled":
                entries[name] = oops_entry(video, own)
                if split == "val":
                    heldout[name] = heldout_entry(video, own)
        names = [list(videos)[i] for i in rng.permutation(n)]
        # The official tables lack a few names of the list of training, one of them annotated.
        lost = [next(x for x in names if videos[x]["kind"] == kind)
                for kind in ("normal", "unlabelled") if split == "train"]
        write_oops_tables(folder, split, names, entries, lost)
        times |= entries
    for name, table in (("transition_times", times), ("heldout_transition_times", heldout)):
        text = json.dumps(table, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return tasks


# ---- Kinetics-400, Charades and MultiTHUMOS ----

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
SCENES = [(72, 96), (72, 96), (72, 104), (76, 100), (96, 72)]                  # sizes of pictures
SCRIPTS = ["A person walks in, looks around and leaves.", "Someone tidies the room.",
           'A person says "hello", sits down, and waits.', "A person stands at the window",
           'They laugh at the sign "Do not touch".', "A person eats; then, slowly, goes to sleep."]
CHARADES_COLUMNS = ["id", "subject", "scene", "quality", "relevance", "verified", "script",
                    "objects", "descriptions", "actions", "length"]


def actor_of(look, place, appear, leave, begin, end, kind, deed=None):
    """An object that is there from `appear` to `leave` and acts from `begin` to `end`."""
    return {"look": look, "place": place, "appear": appear, "leave": leave, "begin": begin,
            "end": end, "deed": deed, "fade": FADE[kind], "pace": PACE if kind == "clip" else 1}


def plan_scene(seed, name, k, fps, seconds):
    """Video number k without its objects, about `seconds` long."""
    key = (seed, crc32(name.encode()), k)
    rng = np.random.default_rng((*key, 3))
    options = {"preset": "ultrafast", "qp": "22"}        # the same for all: blur would tell speeds
    if k % 6 == 0:
        options["bf"] = "2"                              # B-frames: not in the order of time
    return {"key": key, "size": SCENES[rng.integers(len(SCENES))], "fps": fps, "sound": "none",
            "seconds": float(round(seconds * fps) / fps), "rate": 44100, "segments": None,
            "coding": {"options": options, "gop": int(rng.integers(60, 121))}}, rng


def plan_clip(seed, k, deed, short):
    """Clip number k of Kinetics: one object does the same again and again."""
    fps = OOPS_RATES[k % 3]
    own = np.random.default_rng((seed, crc32(b"length"), k))
    seconds = own.uniform(2.2, 2.6) if short else own.uniform(3.8, 4.2)
    video, rng = plan_scene(seed, "kinetics400", k, fps, seconds)
    actors, t = [], -rng.random() * ANEW[0]
    while t < video["seconds"]:
        end = t + rng.uniform(*ANEW)
        actors.append(actor_of(0, 0, t, end, t, end, "clip", deed))
        t = end
    if rng.random() < 1 / 3:                             # another one is there all the time
        place = rng.choice([-0.25, 0.25])
        actors.append(actor_of(1, place, -1.0, video["seconds"] + 1, 0.0, 1.0, "clip"))
    return video | {"actors": actors}, rng


def plan_untrimmed(seed, name, k, fps, seconds, idle):
    """Video number k of the long ones; nothing happens in an idle one. No classes yet."""
    video, rng = plan_scene(seed, name, k, fps, seconds)
    actors, seconds = [], video["seconds"]
    rest, after, empty = rng.uniform(*LEISURE) * np.array([REST, AFTER, EMPTY])
    while not any(a["busy"] for a in actors):
        actors = []
        for place in (-0.14, 0.14):
            t = -rng.uniform(0, 6)
            while t < seconds:
                begin = t + FADE["scene"] + rng.uniform(*rest)
                end = begin + ACT[0] + (ACT[1] - ACT[0]) * rng.beta(1.2, 2)
                leave = end + rng.uniform(*after) + FADE["scene"]
                actor = actor_of(len(actors), place, t, leave, begin, end, "scene")
                if min(end, seconds) - max(begin, 0) > 0.8:          # else only one that is seen
                    actors.append(actor | {"busy": True})
                t = leave + rng.uniform(*empty)
    for actor in actors:
        actor["busy"] = not idle
    return video | {"actors": actors}, rng


def deal_deeds(videos, rng):
    """Give every object of a split something to do, all deeds equally often."""
    deck = []
    for video in videos:
        for actor in video["actors"]:
            if actor["busy"]:
                deck = deck or [list(DEEDS)[i] for i in rng.permutation(len(DEEDS))]
                actor["deed"] = deck.pop()


def intervals(video, names, digits):
    """What happens in a video: [[class from 0, start, end], ...] in seconds."""
    classes, end = {deed: i for i, deed in enumerate(names.values())}, video["seconds"]
    return [[classes[a["deed"]], round(max(a["begin"], 0.0), digits),
             round(min(a["end"], end), digits)] for a in video["actors"] if a["busy"]]


def unique_names(rng, n, letters, length):
    """n different words."""
    names = {}
    while len(names) < n:
        names["".join(letters[i] for i in rng.integers(len(letters), size=length))] = None
    return list(names)


ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def make_kinetics400(root, seed, scale, segments):
    """Annotations of the toy Kinetics-400.   -> the videos to draw"""
    rng = np.random.default_rng((seed, crc32(b"kinetics400")))
    counts = {"train": counted(36, scale, 2), "val": counted(8, scale, 1)}
    total = len(KINETICS) * (sum(counts.values()) + 4)
    names = unique_names(rng, total, ALPHABET + ALPHABET[:26].lower() + "-_", 11)
    names = ["-" + x[1:] if i % 7 == 0 else x for i, x in enumerate(names)]
    tasks, columns = [], ["label", "youtube_id", "time_start", "time_end", "split"]
    for s, (split, n) in enumerate(counts.items()):
        rows, subset = [], {"train": "train", "val": "validate"}[split]
        # Besides n of each class a clip that is too short, and some that could not be had.
        extra = [list(KINETICS)[i] for i in rng.permutation(len(KINETICS))[:3 - s]]
        for i, label in enumerate([x for x in KINETICS for _ in range(n)] + extra):
            name, start = names.pop(), int(rng.integers(0, 300))
            path = root / split / label.replace(" ", "_") / f"{name}_{start:06}_{start + 10:06}.mp4"
            rows.append(dict(zip(columns, (label, name, start, start + 10, subset))))
            if i <= n * len(KINETICS):
                video, _ = plan_clip(seed, 10000 * s + i, KINETICS[label], i == n * len(KINETICS))
                tasks.append(video | {"files": [(path, 0.0, [])]})
        rows.sort(key=lambda r: (r["label"], r["youtube_id"]))
        write_csv(root / f"{split}.csv", columns, rows)
        (root / f"{subset}.json").write_text(json.dumps({r["youtube_id"]: {
            "subset": subset, "duration": 10.0,
            "annotations": {"label": r["label"],
                            "segment": [float(r["time_start"]), float(r["time_end"])]},
            "url": f"https://www.youtube.com/watch?v={r['youtube_id']}"} for r in rows}))
    write_lines(root / "labels.txt", KINETICS, "\n")
    return tasks


def charades_row(name, video, actions, rng):
    """A row of Charades_v1_train.csv or Charades_v1_test.csv."""
    def some(words, most):
        return ";".join(rng.choice(words.split(), rng.integers(0, most), replace=False))

    text = [str(SCRIPTS[i]) for i in rng.permutation(len(SCRIPTS))[:3]]
    return dict(zip(CHARADES_COLUMNS, (
        name, "".join(rng.choice(list(ALPHABET), 4)), rng.choice(["Bedroom", "Living room",
        "Other (Porch, cellar)"]), rng.integers(1, 8), rng.integers(1, 8),
        rng.choice(["Yes", "No"], p=[0.9, 0.1]), text[0], some("bag blanket door food shoe", 5),
        ";".join(text[1:]), ";".join(f"c{c:03} {a:.2f} {b:.2f}" for c, a, b in actions),
        f"{video['seconds']:.2f}")))


def charades_quirks(videos, actions, rng):
    """As in the real annotations: ends behind the end of the video, and one before its start."""
    ends = [v["seconds"] - max((b for *_, b in a), default=-9) for v, a in zip(videos, actions)]
    for i in np.argsort(ends)[:max(1, len(videos) // 20)]:
        last = max(actions[i], key=lambda a: a[2])
        last[2] = round(videos[i]["seconds"] + rng.uniform(0.2, 1), 2)
    longest = max(actions, key=len)
    at = round(rng.uniform(2, 4), 2)
    longest.append([int(rng.integers(len(CHARADES))), at, round(at - rng.uniform(0, 0.5), 2)])


def make_charades(root, seed, scale, segments):
    """Annotations of the toy Charades.   -> the videos to draw"""
    rng = np.random.default_rng((seed, crc32(b"charades")))
    folder, tasks, table = root / "Charades", [], {}
    folder.mkdir(parents=True)
    counts = {"train": counted(66, scale, 6), "test": counted(32, scale, 5)}
    names = unique_names(rng, sum(counts.values()), ALPHABET, 5)
    for s, (split, n) in enumerate(counts.items()):
        kinds = ["idle", "short", *["short"] * s]
        kinds += ["normal"] * (n - len(kinds))
        videos, rows = [], []
        for k, kind in enumerate(kinds[i] for i in rng.permutation(n)):
            seconds = rng.uniform(4, 6) if kind == "short" else 12 + 8 * rng.beta(1.2, 2)
            video, _ = plan_untrimmed(seed, "charades", 1000 * s + k, Fraction(24), seconds,
                                      kind == "idle")
            videos.append(video)
        deal_deeds(videos, rng)
        actions = [intervals(v, CHARADES, 2) for v in videos]
        charades_quirks(videos, actions, rng)
        for video, mine in zip(videos, actions):
            name = names.pop()
            rows.append(charades_row(name, video, mine, rng))
            table[name] = {"subset": f"{split}ing",
                           "duration": round(video["seconds"], 2), "actions": mine}
            tasks.append(video | {"files": [(root / "Charades_v1" / f"{name}.mp4", 0.0, [])]})
        write_csv(folder / f"Charades_v1_{split}.csv", CHARADES_COLUMNS, rows)
    (folder / "charades.json").write_text(json.dumps(table))
    write_lines(folder / "Charades_v1_classes.txt",
                [f"c{i:03} {words}" for i, words in enumerate(CHARADES)], "\n")
    return tasks


def make_multithumos(root, seed, scale, segments):
    """Annotations of the toy MultiTHUMOS.   -> the videos to draw"""
    rng = np.random.default_rng((seed, crc32(b"multithumos")))
    tasks, table, rates = [], {}, [OOPS_RATES[i] for i in (1, 2, 1, 0)]
    (root / "annotations").mkdir(parents=True)
    for s, (split, most) in enumerate((("validation", 24), ("test", 14))):
        n = counted(most, scale, 4 - s)
        numbers, videos = sorted(rng.choice(1000 + 50 * n, n, replace=False) + 1), []
        for k in range(n):
            videos.append(plan_untrimmed(seed, "multithumos", 1000 * s + k, rates[k % 4],
                                         rng.uniform(14, 23), False)[0])
        deal_deeds(videos, rng)
        for k, (number, video) in enumerate(zip(numbers, videos)):
            name, length = f"video_{split}_{number:07}", video["seconds"]
            actions = [[c + 1, a, b] for c, a, b in intervals(video, THUMOS, 1)]
            if k == 1:                                   # one that starts behind the end
                actions.append([int(rng.integers(8)) + 1, round(length + 0.6, 1),
                                round(length + 2.3, 1)])
            table[name] = {"subset": ("training", "testing")[s], "duration": round(length, 2),
                           "actions": actions}
            tasks.append(video | {"files": [(root / "videos" / f"{name}.mp4", 0.0, [])]})
    (root / "multithumos.json").write_text(json.dumps(table))
    write_lines(root / "class_list.txt", [f"{c} {x}" for c, x in enumerate(THUMOS, 1)], "\n")
    for c, word in enumerate(THUMOS, 1):
        write_lines(root / "annotations" / f"{word}.txt", [
            f"{name} {a:.1f} {b:.1f}" for name, entry in table.items()
            for i, a, b in entry["actions"] if i == c], "\n")
    return tasks


def as_frames(path, folder, name="frame_{:05d}.jpg"):
    """The pictures of a video as JPEG files, numbered from 1.   -> how many"""
    folder, i = Path(folder), 0
    folder.mkdir(parents=True, exist_ok=True)
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0), 1):
            frame.to_image().save(folder / name.format(i), quality=90)
    return i


# ---- making a dataset ----


def build(video):
    """Draw one video and write its files.   -> (files, seconds)"""
    sound, made = hear(video), 0
    # Quick to write; every fourth with B-frames, whose order in the file is not that of time.
    preset = "superfast" if video["key"][2] % 4 == 0 else "ultrafast"
    coding = video.get("coding", {"options": {"preset": preset, "crf": "27"}})
    for path, start, links in video["files"]:
        begin = round(start * video["rate"])
        pictures = (draw_action(video) if "motion" in video else
                    draw_scene(video) if "actors" in video else
                    draw_mishap(video) if "truth" in video else draw(video, start))
        write_video(path, pictures, video["fps"],
                    None if sound is None else sound[:, begin:], video["rate"], **coding)
        made += 1 + len(links)
        for link in links:                               # the same recording under another name
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, link)
            except OSError:                              # no hard links on this file system
                shutil.copyfile(path, link)
    if video["segments"]:
        made += cut_pieces(video, sound)
    return made, video["seconds"] * len(video["files"])


def cut_pieces(video, sound):
    """The pieces of 10 s that RepLAI trains on: 16 pictures per second, sound at 44.1 kHz."""
    frames = list(draw(video))
    if sound is not None and video["rate"] == 48000:
        sound = resample_poly(sound, 147, 160, axis=1).astype(np.float32)
    starts = [s for s in range(0, math.ceil(video["seconds"]), 10) if video["seconds"] - s >= 1]
    for start in starts:
        stop = min(start + 10, video["seconds"])
        name = f"{video['id']}_{start:06d}_{math.ceil(stop):06d}.MP4"
        picks = [int((start + i / 16) * video["fps"]) for i in range(int((stop - start) * 16))]
        piece = None if sound is None else sound[:, start * 44100:round(stop * 44100)]
        write_video(video["segments"] / name, (frames[i] for i in picks), 16, piece, gop=16)
    return len(starts)


MAKERS = {"epic": make_epic, "ego4d": make_ego4d, "ucf101": make_ucf101,
          "hmdb51": make_hmdb51, "oops": make_oops,
          "kinetics400": make_kinetics400, "charades": make_charades,
          "multithumos": make_multithumos}


def pool_of(workers):
    """Processes that draw, or None for a single one."""
    return multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext()


def make(name, out, seed=0, scale=1.0, workers=2, segments=False, pool=None):
    """Make OUT/name, unless it is there already with the same settings and this file's version.

    pool: of `pool_of`, else one is made. Prints one line. A folder that is not a toy is never
    touched.
    """
    began, root = time.time(), Path(out) / name
    marker = root / ".toy.json"
    settings = {"seed": seed, "scale": scale, "segments": bool(segments and name == "epic"),
                "version": crc32(Path(__file__).read_bytes())}
    if root.exists() and any(root.iterdir()):
        try:
            old = json.loads(marker.read_text())
        except (OSError, ValueError):
            raise FileExistsError(f"{root} is not a toy dataset, move it away") from None
        if old["complete"] and old["settings"] == settings and old["files"] == census(root)[0]:
            print(f"{name}: {root} is there, {old['files']} files")
            return
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"complete": False}))
    tasks = MAKERS[name](root, seed, scale, segments)
    tasks.sort(key=lambda video: -video["seconds"] * video["fps"])             # longest first
    with nullcontext(pool) if pool else pool_of(min(workers, len(tasks))) as pool:
        done = pool.map(build, tasks, chunksize=1) if pool else [build(task) for task in tasks]
    files, size = census(root)
    text = json.dumps({"complete": True, "settings": settings, "files": files})
    part = root / ".toy.part"
    part.write_text(text)
    os.replace(part, marker)
    print(f"{name}: {files} files, {sum(s for _, s in done):.0f} s of video, "
          f"{size / 1e6:.1f} MB, made in {time.time() - began:.0f} s in {root}")


def census(root):
    """Number of files and their bytes; hidden files do not count, links count once."""
    files = [p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return len(files), sum({p.stat().st_ino: p.stat().st_size for p in files}.values())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dataset", nargs="*", help=f"which ones: {', '.join(MAKERS)} (default: all)")
    p.add_argument("--out", default="data/toy", metavar="DIR",
                   help="each becomes DIR/<dataset> (default: data/toy)")
    p.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
    p.add_argument("--scale", type=float, default=1.0, help="times as many videos (default: 1)")
    p.add_argument("--workers", type=int, default=os.cpu_count(),
                   help="processes (default: one per core)")
    p.add_argument("--segments", action="store_true", help="epic: cut the pieces of 10 s, too")
    args = p.parse_args(argv)
    for name in args.dataset:
        if name not in MAKERS:
            p.error(f"no toy of {name!r}, there are: {', '.join(MAKERS)}")
    if args.seed < 0 or args.workers < 1 or not 0 < args.scale <= 100:
        p.error("--seed must be at least 0, --workers at least 1, --scale above 0, up to 100")
    try:
        with pool_of(args.workers) as pool:
            for name in args.dataset or MAKERS:
                make(name, args.out, args.seed, args.scale, args.workers, args.segments, pool)
    except OSError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
