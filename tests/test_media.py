"""Reading videos, against a plain decode of the whole file. (Of sound: test_replai.py.)

Every frame shows its number as a bar code. `KINDS` lists the kinds of video files, each is written
here with PyAV. A reader must return the frames of a sequential decode, pixel by pixel, or raise
VideoError.
"""

import contextlib
import functools
import itertools
import shutil
import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from world import MPEG4, X264, number_of, paint, write_video

from common import VideoError, clock, count_frames, probe, read_clip, read_frames, stream_frames
from replai import read_audio

av.logging.set_level(av.logging.PANIC)
NOT_CODED = b"\0\0\1\xb6\x50\x10\x80"                        # an MPEG-4 frame without content


# ---- edits: what other programs do to the packets of a stream ------------------------------------

def packet_like(packet, data, key=False):
    made = av.Packet(data)
    made.stream, made.time_base, made.is_keyframe = packet.stream, packet.time_base, key
    return made


def numbered(packets):
    """Time stamps that count packets: all that an avi has, and what VLC's stream output writes."""
    for k, p in enumerate(packets):
        p.pts = p.dts = round(k / 25 / p.time_base)
    return packets


def gaps(packets):
    """A slow capture program has left out every tenth frame."""
    for k, p in enumerate(packets):
        p.pts = p.dts = k + k // 9
    return packets


def with_empty(*places, data=b"\x7f"):
    """Packets without a frame at these places, as DivX writes them, the first as a key frame."""
    def edit(packets):
        for at in places:
            packets.insert(at, packet_like(packets[0], data, at == 1))
        return numbered(packets)
    return edit


def cut(packets):
    """What `ffmpeg -c copy` leaves of a stream that is cut within a group of frames."""
    return packets[10:]


def later(seconds):
    """Time stamps begin at this time. If it is negative, an edit list hides what is before 0."""
    def edit(packets):
        for p in packets:
            shift = round(seconds / p.time_base)
            p.pts, p.dts = p.pts + shift, p.dts + shift
        return packets
    return edit


def packed(packets):
    """Packed B-frames, as old DivX writes them: a packet holds a frame and the B-frame before it.

    A frame of type N, "not coded", follows where the B-frame would have stood.
    """
    def kind(data):
        return "IPBS"[data[data.index(b"\0\0\1\xb6") + 4] >> 6]

    frames, out = [(bytes(p), p.is_keyframe) for p in packets], []
    first, at = frames[0][0], frames[0][0].find(b"\0\0\1\xb6")
    frames[0] = first[:at] + b"\0\0\1\xb2DivX503b1393p" + first[at:], True
    while frames:
        data, key = frames.pop(0)
        if frames and kind(frames[0][0]) == "B":
            data += frames.pop(0)[0]
            more = list(itertools.takewhile(lambda frame: kind(frame[0]) == "B", frames))
            frames = frames[len(more):]
            out += [(data, key), *more, (NOT_CODED, False)]
        else:
            out.append((data, key))
    return numbered([packet_like(packets[0], data, key) for data, key in out])


# ---- kinds of video files ------------------------------------------------------------------------

UNEVEN = [0.0, *np.random.default_rng(5).integers(20, 200, 99).cumsum() / 1000]      # seconds
FAST_THEN_SLOW = [*(np.arange(30) / 30).round(3), *(1 + np.arange(40) / 10).round(3)]
NTSC = Fraction(30000, 1001)
B = {"bf": 2}
OPEN = {**X264, "x264-params": "open-gop=1:keyint=25:min-keyint=25:scenecut=0:bframes=3"}
PYRAMID = {**X264, "x264-params": "b-pyramid=normal:bframes=7:keyint=50:b-adapt=0:ref=4"}
SHORT = {"n": 60, "bf": 3}
HEVC = {"codec": "libx265", **SHORT, "options": {
    "preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1:keyint=25"}}
AV1 = {"codec": "libsvtav1", "n": 40, "options": {"preset": "10", "crf": "35"}}
VPX = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "1M"}
HIDDEN = {**VPX, "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"}
DIVX = {"codec": "mpeg4", "options": MPEG4, "gop": 12}
MPEG2 = {"codec": "mpeg2video", "options": MPEG4, "gop": 12, "bf": 2}

KINDS = {          # name: (suffix, arguments of write_video; n frames)
    "h264": (".mp4", {"gop": 100}), "h264 b-frames": (".mp4", {"bf": 3, "gop": 250}),
    "h264 closed gop": (".mp4", {**B, "options": {**X264, "x264-params": "open-gop=0"}}),
    "h264 open gop": (".mp4", {"options": OPEN, "bf": 3}),
    "h264 open gop mkv": (".mkv", {"options": OPEN, "bf": 3}),
    "h264 b-pyramid": (".mp4", {"options": PYRAMID, "bf": 7}),
    "h264 starts at 1.5 s": (".mp4", {**B, "edit": later(1.5)}),
    "h264 hidden start": (".mp4", {**B, "edit": later(-0.4), "mux": {
        "avoid_negative_ts": "disabled"}}),
    "h264 hidden second": (".mp4", {**B, "edit": later(-1.2), "mux": {
        "avoid_negative_ts": "disabled"}}),
    "h264 fragmented": (".mp4", {**B, "mux": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264 faststart": (".mp4", {**B, "mux": {"movflags": "faststart"}}),
    "h264 29.97": (".mp4", {**B, "fps": NTSC}),
    "h264 59.94": (".mp4", {**B, "fps": 2 * NTSC, "n": 150}),
    "h264 uneven": (".mp4", {**B, "times": UNEVEN}),
    "h264 fast then slow": (".mp4", {"n": 70, "times": FAST_THEN_SLOW}),
    "h264 mov": (".mov", B), "h264 mkv": (".mkv", B),
    "h264 mkv 29.97": (".mkv", {**B, "fps": NTSC}),
    "h264 mkv uneven": (".mkv", {**B, "times": UNEVEN}),
    "h264 cut": (".mp4", {**B, "edit": cut}),
    "h264 open gop cut": (".mp4", {"options": OPEN, "bf": 3, "edit": cut}),
    "h264 pts = dts": (".mp4", {**B, "edit": numbered}),
    "h264 pts = dts mkv": (".mkv", {**B, "edit": numbered}),
    "h264 avi": (".avi", {}), "h264 avi b-frames": (".avi", B),
    "h264 odd size": (".mp4", {**B, "size": (95, 63), "pix_fmt": "yuv444p"}),
    "h264 grey": (".mp4", {"pix_fmt": "gray"}),
    "h264 10 bit": (".mp4", {**B, "pix_fmt": "yuv420p10le"}),
    "h264 full range": (".mp4", {**B, "pix_fmt": "yuvj420p"}),
    "h264 turned 90": (".mp4", {**B, "turn": 90}),
    "h264 turned 180": (".mp4", {**B, "turn": 180}),
    "h264 turned 270": (".mp4", {**B, "turn": 270}),
    "h264 one frame": (".mp4", {"n": 1}), "h264 one frame mkv": (".mkv", {"n": 1}),
    "h264 seven frames": (".mp4", {**B, "n": 7}),
    "hevc": (".mp4", HEVC), "hevc mkv": (".mkv", HEVC),
    "hevc cut": (".mp4", {**HEVC, "edit": cut}),
    "hevc pts = dts": (".mp4", {**HEVC, "edit": numbered}),
    "av1": (".mkv", {**AV1, "gop": 20}), "av1 cut": (".mp4", {**AV1, "edit": cut}),
    "vp8": (".webm", {"codec": "libvpx", "options": VPX}),
    "vp8 hidden frames": (".webm", {"codec": "libvpx", "options": HIDDEN}),
    "vp9": (".webm", {"codec": "libvpx-vp9", "options": VPX}),
    "vp9 hidden frames": (".webm", {"codec": "libvpx-vp9", "options": HIDDEN}),
    "vp9 mp4": (".mp4", {"codec": "libvpx-vp9", "options": VPX}),
    "vp9 cut": (".webm", {"codec": "libvpx-vp9", "options": VPX, "edit": cut}),
    "mpeg2 mkv": (".mkv", MPEG2), "mpeg2 mkv cut": (".mkv", {**MPEG2, "edit": cut}),
    "mpeg4": (".avi", DIVX), "mpeg4 29.97": (".avi", {**DIVX, "fps": NTSC}),
    "mpeg4 odd size": (".avi", {**DIVX, "size": (95, 63)}),
    "mpeg4 one frame": (".avi", {**DIVX, "n": 1}), "mpeg4 b-frames": (".avi", {**DIVX, **B}),
    "mpeg4 packed": (".avi", {**DIVX, **B, "edit": packed}),
    "mpeg4 packed, one b": (".avi", {**DIVX, "bf": 1, "edit": packed}),
    "mpeg4 no index": (".avi", {**DIVX, **B}),
    "mpeg4 empty packet": (".avi", {**DIVX, "edit": with_empty(1)}),
    "mpeg4 empty packets": (".avi", {**DIVX, "edit": with_empty(1, 30, 31, 80)}),
    "mpeg4 b-frames, empty packet": (".avi", {**DIVX, **B, "edit": with_empty(1)}),
    "mpeg4 not coded": (".avi", {**DIVX, "edit": with_empty(5, 40, data=NOT_CODED)}),
    "mpeg4 gaps": (".avi", {**DIVX, "edit": gaps}),
    "mpeg4 mp4 b-frames": (".mp4", {**DIVX, **B}),
    "mjpeg": (".avi", {"codec": "mjpeg", "options": MPEG4, "pix_fmt": "yuvj420p", "n": 50}),
    "ffv1": (".mkv", {"codec": "ffv1", "options": {}, "pix_fmt": "bgr0", "n": 40}),
}
REFUSED = {        # no dataset has them
    "ts": (".ts", B), "mpg": (".mpg", MPEG2),
    "mpeg4 cut": (".avi", {**DIVX, "gop": 25, "edit": cut}),
    "mpeg4 mp4 b-frames cut": (".mp4", {**DIVX, **B, "gop": 25, "edit": cut}),
}
NOISE = np.random.default_rng(3).uniform(-0.5, 0.5, (2, 4 * 48000)).astype(np.float32)
SOUNDS = {f"sound {suffix}": (suffix, {**how, "sound": (codec, 48000, "stereo", NOISE)})
          for suffix, codec, how in (
              (".mp4", "aac", B), (".mkv", "aac", B), (".avi", "libmp3lame", DIVX),
              (".webm", "libopus", KINDS["vp9"][1]))}


def turn_in_header(path, degrees):
    """Write a rotation into the display matrix of an mp4's track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [a, b, 0, -b, a, 0, 0, 0, 0x4000]                # clockwise, as players turn it
    data[at:at + 36] = struct.pack(">9i", *(x << 16 for x in matrix))
    path.write_bytes(data)


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A function from the name of a kind to its file, which is written at the first call."""
    folder = tmp_path_factory.mktemp("media")

    @functools.cache
    def get(name):
        suffix, how = {**KINDS, **REFUSED, **SOUNDS}[name]
        how = {"n": 100, "size": (96, 64), "turn": 0, **how}
        n, size, turn = (how.pop(k) for k in ("n", "size", "turn"))
        images = [np.rot90(paint(k, *size, 1), turn // 90) for k in range(n)]
        path = write_video(folder / f"{name}{suffix}", images, **how)
        if turn:
            turn_in_header(path, turn)
        if name == "mpeg4 no index":
            path.write_bytes(path.read_bytes().rpartition(b"idx1")[0])
        return path
    return get


def upright(frame):
    """(H, W, 3) uint8 of a frame in full size, as players show it."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)


@functools.cache
def sequential(path):
    """A plain decode of the whole file: (seconds of each frame, frames)."""
    with av.open(f"file:{path}") as c:
        v, frames = c.streams.video[0], []
        v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
        start, fps = v.start_time or 0, float(v.average_rate)
        for p in c.demux(v):
            with contextlib.suppress(av.InvalidDataError):    # packets before the first key frame
                frames += p.decode()                          # and packets without a frame
        times = np.array([float((f.pts - start) * v.time_base) for f in frames])
        # The stamps of B-frames in an avi, and of B-frames with pts = dts, do not tell the order.
        if "= dts" in path.name or path.suffix == ".avi" and (
                v.codec_context.has_b_frames or "empty packet" in path.name or "h264" in path.name):
            times = np.arange(len(frames)) / fps
        return times, np.stack([upright(f) for f in frames])


def shown(times, asked):
    """Index of the frame on show at each of the times asked for."""
    return np.searchsorted(times, np.asarray(asked) + 1e-6, "right").clip(1) - 1


# ---- frames --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", KINDS)
def test_a_decode_gives_the_frames_that_were_written(media, name):
    """So that the comparisons below mean something."""
    times, frames = sequential(media(name))
    how = KINDS[name][1]
    numbers = list(range(how.get("n", 100)))
    if "cut" in name:                                         # the next key frame is the first
        numbers = numbers[number_of(frames[0]):]
        assert numbers[0] > 0
    if "hidden start" in name or "hidden second" in name:     # 0.4 or 1.2 s of 25 frames each
        numbers = numbers[10 if "start" in name else 30:]
    assert [number_of(frame) for frame in frames] == numbers
    if "edit" not in how or "starts" in name:
        right = how.get("times", np.array(numbers) / float(how.get("fps", 25)))
        assert np.allclose(times, right, atol=1.1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_frames_by_number_are_those_of_a_sequential_decode(media, name):
    path, (_, frames), rng = media(name), sequential(media(name)), np.random.default_rng(0)
    n = len(frames)
    picks = [*([k] for k in sorted({*rng.integers(0, n, 8), 0, n - 1})), range(n), range(0, n, 7),
             rng.integers(0, n, 6), range(n // 3, min(n, n // 3 + 9))]
    for pick in picks:
        assert np.array_equal(read_frames(path, list(pick)), frames[list(pick)]), pick
    with pytest.raises(VideoError, match="frames"):
        read_frames(path, [0, n])


@pytest.mark.parametrize("name", KINDS)
def test_frames_on_show_at_any_times_are_those_of_a_sequential_decode(media, name):
    path, (times, frames), rng = media(name), sequential(media(name)), np.random.default_rng(1)
    end = times[-1]
    asked = [[t] for t in rng.uniform(0, end + 0.01, 8)]
    asked += [sorted(rng.uniform(-0.2, end + 0.3, 6)) for _ in range(3)]
    asked += [a + np.arange(8) / 16 for a in rng.uniform(0, end + 0.01, 4)]
    asked += [times, times[::7], [0.0], [end], [end + 5], [-3.0]]
    for seconds in asked:
        (clip,) = read_clip(path, [seconds])
        assert np.array_equal(clip, frames[shown(times, seconds)]), seconds
    several = [asked[k] for k in rng.permutation(len(asked))]
    for seconds, clip in zip(several, read_clip(path, lambda fps: several), strict=True):
        assert np.array_equal(clip, frames[shown(times, seconds)]), seconds


@pytest.mark.parametrize("name", KINDS)
def test_clock_count_and_stream_are_the_sequential_decode(media, name):
    times, frames = sequential(media(name))
    found, fps = clock(media(name))
    assert np.allclose(found, times, rtol=0, atol=1e-6) and (np.diff(found) > 0).all()
    assert count_frames(media(name)) == len(frames) and fps == probe(media(name)).fps
    seconds, streamed = zip(*stream_frames(media(name)))
    assert np.allclose(seconds, times, rtol=0, atol=1e-6)
    assert np.array_equal(np.stack(streamed), frames)


def test_an_edit_list_may_hide_the_end(media, tmp_path):
    data = bytearray(media("h264 b-frames").read_bytes())
    struct.pack_into(">I", data, data.index(b"elst") + 12, 1000)          # milliseconds on show
    (tmp_path / "short.mp4").write_bytes(data)
    times, frames = sequential(tmp_path / "short.mp4")
    assert len(frames) == 25
    assert np.allclose(clock(tmp_path / "short.mp4")[0], times)
    assert np.array_equal(read_frames(tmp_path / "short.mp4", range(25)), frames)


@pytest.mark.parametrize("name", REFUSED)
def test_other_containers_and_grey_beginnings_are_refused(media, name):
    for read in (clock, lambda path: read_clip(path, [[0.1]]), lambda path: [*stream_frames(path)]):
        with pytest.raises(VideoError) as e:
            read(media(name))
        assert str(e.value).startswith(f"{media(name)}: cannot be read (")


# ---- size and colour -----------------------------------------------------------------------------

def smooth(number, width, height):
    """Large soft patches of strong colour: scaling leaves them as they are."""
    x, y = np.arange(width) / width, np.arange(height)[:, None] / height
    parts = [np.sin(7 * x + number) * np.cos(5 * y), np.cos(6 * x * y + 3), np.sin(9 * y - 4 * x)]
    return (128 + 110 * np.stack(np.broadcast_arrays(*parts), -1)).astype(np.uint8)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le", "yuvj420p"])
def test_scaled_colours_are_those_of_an_antialiased_float_resize(tmp_path, pix_fmt):
    path = write_video(tmp_path / "a.mp4", [smooth(k, 320, 240) for k in range(3)],
                       options={**X264, "crf": "10"}, pix_fmt=pix_fmt)
    big = sequential(path)[1][0]
    assert abs(big.astype(float) - smooth(0, 320, 240)).mean() < 3
    small = read_frames(path, [0], short_side=100)[0]
    assert small.shape == (100, 133, 3) and small.dtype == np.uint8
    right = F.interpolate(torch.from_numpy(big.copy()).permute(2, 0, 1)[None].float(), (100, 133),
                          mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert abs(small - right).mean() < 2.5


@pytest.mark.parametrize("name", ["h264", "h264 odd size", "h264 turned 90", "h264 turned 180",
                                  "mpeg4"])
def test_frames_keep_their_shape_and_are_never_enlarged(media, name):
    (whole,) = read_clip(media(name), [[0.5]])
    (large,) = read_clip(media(name), [[0.5]], 4000)
    assert np.array_equal(whole, large)
    (small,) = read_clip(media(name), [[0.5]], 48)
    h, w = small.shape[1:3]
    assert min(h, w) == 48 and abs(w / h - whole.shape[2] / whole.shape[1]) < 0.03
    assert number_of(small[0]) == number_of(whole[0]) == 12
    _, frame = next(stream_frames(media(name), 48))
    assert frame.shape == small.shape[1:]


def test_a_folder_of_images_is_read_like_a_video(tmp_path):
    for k in range(12):
        Image.fromarray(paint(k)).save(tmp_path / f"image_{k + 1:05d}.jpg", quality=95)
    (tmp_path / "notes.txt").write_text("no frame")
    assert count_frames(tmp_path) == 12
    frames = read_frames(tmp_path, [3, 0, 11, 11])
    assert [number_of(frame) for frame in frames] == [3, 0, 11, 11]
    assert read_frames(tmp_path, [2], short_side=24).shape == (1, 24, 32, 3)
    for name in ("image_00005.jpg", "image_00001.jpg"):
        (tmp_path / name).unlink()
        with pytest.raises(VideoError, match=f"{name}.* (missing|no such)"):
            count_frames(tmp_path)
    with pytest.raises(VideoError, match=r"image_00005\.jpg"):
        read_frames(tmp_path, [4])
    Image.fromarray(paint(0, 32, 24)).save(tmp_path / "image_00005.jpg")
    with pytest.raises(VideoError, match="size"):
        read_frames(tmp_path, [3, 4])


# ---- broken files --------------------------------------------------------------------------------

READERS = {"clip": lambda path: read_clip(path, [[0.3, 0.9], 2.0 + np.arange(4) / 8, [3.9]]),
           "frames": lambda path: read_frames(path, [3, 50]), "clock": clock, "probe": probe,
           "stream": lambda path: [*stream_frames(path)], "sound": read_audio}


def attempt(reader, path):
    """What a reader returns, or None if it raises a VideoError; nothing else may be raised."""
    try:
        return READERS[reader](path)
    except VideoError as e:
        assert str(e).startswith(str(path)) and "\n" not in str(e)
        return None


def test_files_that_are_no_videos_are_refused_with_their_path(tmp_path, media):
    whole = media("h264").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"<html>not found</html>\n" * 200)
    (tmp_path / "half.mp4").write_bytes(whole[:len(whole) // 2])          # the index is at the end
    (tmp_path / "noise.avi").write_bytes(np.random.default_rng(0).bytes(50000))
    (tmp_path / "folder.mp4").mkdir()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as f:
        f.setparams((1, 2, 8000, 0, "NONE", ""))
        f.writeframes(bytes(16000))
    for path in [*tmp_path.iterdir(), tmp_path / "nowhere.mp4"]:
        for reader in READERS:
            assert attempt(reader, path) is None, (reader, path)


@pytest.mark.parametrize("name", ["h264 faststart", "h264 fragmented", "h264 mkv", "vp9", "mpeg4",
                                  "mpeg4 packed", "mpeg4 no index"])
def test_a_truncated_file_gives_the_right_frames_or_an_error(tmp_path, media, name):
    """Or the last frame that is there, where the header promises no length."""
    times, data = sequential(media(name))[0], media(name).read_bytes()
    promises = name in ("h264 faststart", "mpeg4", "mpeg4 packed")
    for percent in (10, 50, 90):
        path = tmp_path / f"{percent}{media(name).suffix}"
        path.write_bytes(data[:len(data) * percent // 100])
        errors = 0
        for t in np.arange(0.02, 4, 0.24):
            right = shown(times, t)
            try:
                (clip,) = read_clip(path, [[t]])
            except VideoError:
                errors += 1
                continue
            early = right - number_of(clip[0])
            assert early == 0 or early > 0 and (not promises or early <= 14), (percent, t)
        assert errors or not promises or percent == 90
        if promises and percent < 90:
            assert attempt("clock", path) is attempt("frames", path) is None


@pytest.mark.parametrize("name", ["h264 faststart", "h264 mkv", "mpeg4 b-frames", "vp9", "hevc"])
def test_flipped_bits_raise_nothing_but_video_errors(tmp_path, media, name):
    rng, suffix = np.random.default_rng(7), media(name).suffix
    for trial in range(12):
        data = bytearray(media(f"sound {suffix}" if trial % 2 else name).read_bytes())
        end = len(data) if trial % 4 < 2 else min(len(data), 3000)
        for at in rng.integers(0, end, rng.integers(1, 30)):
            data[at] ^= 1 << rng.integers(8)
        path = tmp_path / f"{trial}{suffix}"
        path.write_bytes(data)
        for reader in READERS:
            attempt(reader, path)


@pytest.mark.parametrize("name", ["mpeg4", "h264 faststart"])
def test_a_damaged_frame_does_not_move_the_others(tmp_path, media, name):
    """Frames of other groups are as they were; those of its own group, too, or an error."""
    times, frames = sequential(media(name))
    with av.open(str(media(name))) as c:
        packet = next(p for k, p in enumerate(c.demux(video=0)) if k == 30)
    data = bytearray(media(name).read_bytes())
    data[packet.pos:packet.pos + 16] = bytes(16)              # the start of the frame is lost
    path = tmp_path / f"a{media(name).suffix}"
    path.write_bytes(data)
    for k in (3, 20, 60, 99):
        assert np.array_equal(read_frames(path, [k])[0], frames[k]), k
        assert np.array_equal(read_clip(path, [[times[k]]])[0][0], frames[k]), k
    assert attempt("stream", path) is None


def test_names_of_any_kind_are_read(tmp_path, media, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "http:x.mp4", "it's \"q\".mp4", "\U0001f600 é.mp4", "-y.mp4",
                 "%03d.mp4", "new\nline.mp4", "a#b?c&d.mp4", "[x]*{y}.mp4"):
        shutil.copy(media("h264"), name)
        for path in (tmp_path / name, Path(name)):
            assert number_of(read_clip(path, [[1.0]])[0][0]) == 25, name
