"""replai.py: its losses, what it reads from videos, sound and annotations, its metrics and files.

Whole runs of every stage are in test_runs.py, numbers of the original code in test_parity.py.
"""

import itertools
import json
import math
import zipfile
from functools import partial

import av
import numpy as np
import pytest
import running
import torch
import world

import common
import replai
from common import UserError, VideoError


@pytest.fixture(autouse=True)
def one_process(tmp_path, monkeypatch):
    """A process group of one, and a working folder, which gets the cache of moments."""
    if not torch.distributed.is_initialized():
        common.init_distributed()
    monkeypatch.chdir(tmp_path)
    yield
    torch.distributed.destroy_process_group()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(*flags):
    return replai.parse_args(["--tiny", "--workers", "0", *map(str, flags)])


def numbers(clip):
    """What the bar codes of a clip (3, T, H, W) say."""
    return [world.number_of(np.asarray(frame)) for frame in clip.permute(1, 2, 3, 0)]


@pytest.fixture
def unchanged(monkeypatch):
    """Frames come as they were read, so that the bar codes in them can be read."""
    monkeypatch.setattr(replai, "resize_crop_flip",
                        lambda frames, *_: torch.from_numpy(frames).permute(3, 0, 1, 2))


# ---- losses --------------------------------------------------------------------------------------

def slow_avc(z, y, z_all, y_all, first, tau):
    """Equation (4), term by term; own clips and sounds are first, first + 1, ... of all."""
    def nll(query, keys, target):
        e = [(torch.cosine_similarity(query, k, 0) / tau).exp() for k in keys]
        return -(e[target] / sum(e)).log()
    pairs = [*itertools.product((0, 1), range(len(y)))]
    clip = sum(nll(z[s, i], y_all, first + i) for s, i in pairs) / len(pairs)
    sound = sum(nll(y[i], z_all[s], first + i) for s, i in pairs) / len(pairs)
    return (clip + sound) / 2


def slow_astc(g_fwd, g_bwd, q, kappa):
    """Equations (5) and (6), term by term."""
    total = 0.0
    for f, b, a in zip(g_fwd, g_bwd, q):
        p_fwd, p_bwd = (torch.cosine_similarity(g, a, 0) / kappa for g in (f, b))
        total += -p_fwd.sigmoid().log() - (1 - p_bwd.sigmoid()).log()
    return total / 2 / len(q)


@pytest.mark.parametrize("b, d, t", [(1, 3, 0.07), (4, 8, 0.2), (3, 5, 0.07), (7, 128, 1.0)])
def test_the_losses_are_the_sums_in_the_paper(b, d, t):
    z, y = random(2, b, d), random(b, d, seed=1)
    z64, y64 = z.double(), y.double()
    avc, astc = slow_avc(z64, y64, z64, y64, 0, t).item(), slow_astc(*z64, y64, t).item()
    assert replai.avc_loss(z, y, t).item() == pytest.approx(avc, rel=2e-5, abs=1e-6)
    assert replai.astc_loss(*z, y, t).item() == pytest.approx(astc, rel=2e-5)


def embedded(rank, b=3):
    """Clips and sounds of a process, (2, b, 5) and (b, 5), of a batch of 2b."""
    share = slice(rank * b, (rank + 1) * b)
    return random(2, 6, 5)[:, share].requires_grad_(), random(6, 5, seed=1)[share].requires_grad_()


def loss_of_a_rank(rank):
    z, y = embedded(rank)
    loss = replai.avc_loss(z, y, 0.07)
    return loss.item(), *torch.autograd.grad(loss, (z, y))


def test_two_processes_compare_with_both_and_take_what_they_gather_as_constant(tmp_path):
    for rank, (loss, *gradients) in enumerate(running.processes(loss_of_a_rank, 2, tmp_path)):
        z, y = embedded(rank)
        want = slow_avc(z, y, random(2, 6, 5), random(6, 5, seed=1), 3 * rank, 0.07)
        assert loss == pytest.approx(want.item(), rel=1e-5)
        for found, right in zip(gradients, torch.autograd.grad(want, (z, y)), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


# ---- networks and checkpoints --------------------------------------------------------------------

def test_the_networks_have_their_official_sizes_and_shapes():
    with torch.device("meta"):
        model, recognition, lta = replai.RepLAI(), replai.Recognition(), replai.Anticipation()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (
        model.backbone["video"], model.backbone["audio"], model, recognition)]
    assert sizes == [15_379_136, 4_725_696, 21_549_824, 15_683_345]
    assert round(sum(p.numel() for p in lta.parameters()) / 1e4) == 19185
    assert len(model.state_dict()) == 275
    small = replai.Anticipation(2, 10, (115, 478), features=8, layers=1)
    assert [x.shape for x in small(random(1, 4, 3, 8, 32, 32))] == [(1, 20, 115), (1, 20, 478)]
    change = replai.StateChange(2, 10)(random(2, 3, 16, 225, 225))        # 16 frames stay 16
    assert [x.shape for x in change] == [(2, 16), (2, 2)]


def test_scores_that_are_ranked_are_float32_under_autocast():
    small = replai.Anticipation(2, 10, (7, 9), features=8, layers=1)
    clip = random(1, 4, 3, 8, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [*replai.LinearProbe(2, 10)(clip[0]), *replai.Recognition(2, 10)(clip[0]),
                   *replai.StateChange(2, 10, 32)(clip[0]), *small(clip)]
    assert {x.dtype for x in outputs} == {torch.float32}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(3)
    state = replai.RepLAI(8, 10).state_dict()
    return {k: x.normal_() if k.endswith("running_mean") else x for k, x in state.items()}


def renamed(state, table):
    return {new + k[len(old):]: v for k, v in state.items()
            for old, new in table.items() if k.startswith(old)}


LAYOUTS = {        # name: from RepLAI's state to the content of a file
    "ours": lambda s: {"model": s, "step": 7, "args": {"lr": 0.1}},
    "RepLAI": lambda s: {"model": renamed(s, {"": "module."}), "sampler": {"epoch": 3}},
    "AVID": lambda s: {"epoch": 5, "optimizer": {}, "train_criterion": {}, "model": {
        **renamed(s, {"backbone.video.": "module.video_model.",
                      "backbone.audio.": "module.audio_model."}),
        "module.video_proj.projection.0.weight": torch.zeros(4, 4)}},
    "bare": lambda s: s,
    "model_av": lambda s: {"model_av": renamed(s, {"": "module."})},
    "linear probe": lambda s: {"model": {**renamed(s, {"backbone.video.": "module.backbone."}),
                                         "module.fc.verb_class.weight": torch.ones(97, 64)}},
    "model.backbone": lambda s: {"state_dict": renamed(s, {"backbone.video.": "model.backbone."})},
    "f_V alone": lambda s: {"state_dict": renamed(s, {"backbone.video.": ""})}}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("make", [replai.RepLAI, replai.LinearProbe, replai.Recognition])
def test_every_layout_of_a_file_fills_every_network(make, name, weights, tmp_path):
    torch.save(LAYOUTS[name](weights), tmp_path / "c.pt")
    args, model = arguments("--init", tmp_path / "c.pt"), make(8, 10)
    if make is not replai.RepLAI:
        replai.load_init(args, model, replai.video_layouts(model.prefix), f"{model.prefix}conv")
        for k in common.R2Plus1D(8, 10).state_dict():
            assert torch.equal(model.state_dict()[model.prefix + k], weights[f"backbone.video.{k}"])
    elif name in ("ours", "RepLAI", "AVID", "bare", "model_av"):          # with f_A
        replai.load_init(args, model, replai.PRETRAIN_LAYOUTS, "backbone.")
        for k, x in model.state_dict().items():
            assert torch.equal(x, weights[k]) or name == "AVID" and k.startswith("mlp."), k


def test_convert_writes_f_v_even_into_the_folder_of_its_run(weights, tmp_path):
    torch.save({"model": weights, "args": {"width": 8, "depth": 10}}, tmp_path / "last.pt")
    replai.convert(replai.parse_args(["--stage", "convert", "--init", str(tmp_path / "last.pt"),
                                      "--out", str(tmp_path)]), torch.device("cpu"))
    content = torch.load(tmp_path / "checkpoint_latest-ego.pth", weights_only=True)
    assert content.keys() == {"state_dict"}
    assert content["state_dict"].keys() == common.R2Plus1D(8, 10).state_dict().keys()
    assert all(torch.equal(x, weights[f"backbone.video.{k}"])
               for k, x in content["state_dict"].items())


@pytest.mark.parametrize("as_released", [False, True])
def test_a_frozen_network_stays_and_as_released_its_batch_norm_moves(as_released):
    torch.manual_seed(0)
    for model, clip in ((replai.LinearProbe(8, 10, as_released), random(2, 3, 8, 32, 32)),
                        (replai.Anticipation(8, 10, (7, 9), features=32, layers=1, heads=4,
                                             as_released=as_released),
                         random(2, 4, 3, 8, 32, 32))):
        before = {k: x.clone() for k, x in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        sum(x.square().mean() for x in model.train()(clip)).backward()
        optimizer.step()
        for k, x in model.state_dict().items():
            still = k.startswith("backbone.") and ".head." not in k
            moving = as_released and ("running" in k or "num_batches" in k) and "tmp_bn2" not in k
            assert torch.equal(x, before[k]) == (still and not moving), k
        assert not any(m.training for m in model.eval().modules())


# ---- sound ---------------------------------------------------------------------------------------

def clicks(times, seconds):
    """("aac", rate, "mono", samples) of quiet noise with clicks at these seconds."""
    rng, rate = np.random.default_rng(0), 44100
    x = 0.002 * rng.normal(size=(1, round(seconds * rate)))
    for t in times:
        x[:, round(t * rate):][:, :300] += (
            0.6 * rng.uniform(-1, 1, 300) * np.exp(-np.arange(300) / 100))
    return "aac", rate, "mono", x.astype(np.float32)


def tones(rate, channels, seconds=6.0):
    t = np.arange(round(rate * seconds)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * (220 + 90 * np.sin(t + c)) * t) for c in range(
        channels)]).astype(np.float32)


SOUNDS = [         # ending, codec, samples per second, layout
    ".mp4 aac 44100 stereo", ".mp4 aac 16000 mono", ".mp4 aac 48000 5.1", ".mov aac 48000 stereo",
    ".mkv aac 44100 stereo", ".avi aac 44100 mono", ".mp4 libmp3lame 44100 stereo",
    ".avi libmp3lame 44100 stereo", ".mkv libmp3lame 44100 mono", ".mkv libopus 48000 mono",
    ".webm libopus 48000 stereo", ".mp4 libopus 48000 stereo", ".mp4 ac3 48000 stereo",
    ".mkv flac 44100 stereo", ".avi pcm_s16le 44100 mono", ".mov pcm_s16le 48000 stereo",
    ".avi pcm_u8 22050 mono", ".mkv vorbis 44100 stereo"]
VIDEO = {".avi": {"codec": "mpeg4", "options": world.MPEG4},
         ".webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}}


@pytest.mark.parametrize("form", SOUNDS)
def test_any_window_of_sound_equals_its_part_of_a_sequential_decode(form, tmp_path):
    ending, codec, rate, layout = form.split()
    x = tones(int(rate), av.AudioLayout(layout).nb_channels)
    path = world.write_video(tmp_path / f"a{ending}", [world.paint(k) for k in range(60)], 10,
                             sound=(codec, int(rate), layout, x), **VIDEO.get(ending, {}))
    with av.open(str(path)) as c:                             # the reference: one by one
        a, floats = c.streams.audio[0], av.AudioResampler("fltp")
        rate, frames = a.rate, [*c.decode(a)]
        late = round(frames[0].pts * a.time_base * rate)      # negative: it begins before time 0
        pieces = [x.to_ndarray() for frame in frames for x in floats.resample(frame)]
    whole, sample_rate = replai.read_audio(path)
    right = np.pad(np.concatenate(pieces, 1), ((0, 0), (max(0, late), 0)))[:, max(0, -late):]
    assert sample_rate == rate and whole.dtype == np.float32 and 0.3 < abs(whole).max() <= 1.01
    assert whole.shape == right.shape and np.array_equal(whole, right)
    rng, end = np.random.default_rng(4), whole.shape[1] / rate
    windows = [(s, s + d) for s, d in zip(rng.uniform(0, end, 12), rng.uniform(0.01, 1.5, 12))]
    for start, stop in [*windows, (0, 0.5), (end - 0.3, end + 2), (end + 1, end + 2), (-1, 0.4)]:
        x, _ = replai.read_audio(path, start, stop)
        want = whole[:, max(0, math.floor(start * rate)):max(0, math.floor(stop * rate))]
        assert x.shape == want.shape and np.array_equal(x, want), (start, stop)
    spans = [(a, a + 0.7) for a in (0.0, 0.7, 2.5, 4.0)]
    for span, (x, _) in zip(spans, replai.read_sounds(path, spans)):
        assert np.array_equal(x, whole[:, math.floor(span[0] * rate):math.floor(span[1] * rate)])


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_late_sound_and_gaps_are_silent_and_the_rest_is_in_its_place(ending, tmp_path):
    def late_with_a_gap(packets):
        sound = [p for p in packets if p.stream.type == "audio"]
        kept = [p for p in sound if not 2 < p.pts * p.time_base < 3]
        for p in sound:
            shift = round(1 / p.time_base)
            p.pts, p.dts = p.pts + shift, p.dts + shift
        return [p for p in packets if p.stream.type == "video"] + kept

    (plain, rate), (whole, _) = (replai.read_audio(world.write_video(
        tmp_path / f"a{ending}", [world.paint(k) for k in range(70)], 10, edit=edit,
        sound=("aac", 16000, "mono", tones(16000, 1)))) for edit in (None, late_with_a_gap))
    assert np.array_equal(whole[:, rate:int(2.8 * rate)], plain[:, :int(1.8 * rate)])
    loud = [abs(whole[:, int(t * rate):int((t + 0.2) * rate)]).max() > 0.2
            for t in (0.3, 0.7, 1.2, 2.5, 3.3, 3.6, 4.3, 6)]
    assert loud == [False, False, True, True, False, False, True, True]
    late, _ = replai.read_audio(tmp_path / f"a{ending}", 4.5, 5.0)
    assert np.array_equal(late, whole[:, int(4.5 * rate):5 * rate])


# ---- moments and training samples ----------------------------------------------------------------

@pytest.fixture
def painted(tmp_path):
    """A folder with a 10.4 s video whose frames show their numbers, with a click at 3.21 s."""
    world.write_video(tmp_path / "videos/one.mp4", [world.paint(k, 128, 96) for k in range(250)],
                      24, sound=clicks([3.21], 10.4))
    return tmp_path / "videos"


def test_clips_lie_before_and_after_the_click_and_the_sound_around_it(painted, unchanged,
                                                                      monkeypatch):
    heard = []
    monkeypatch.setattr(replai, "log_mel", lambda *x: heard.append(x) or torch.zeros(1, 125, 80))
    for delta in (0.1, 0.5):
        args = arguments("--data", painted, "--delta_non_overlap", delta, "--crop", 112)
        (segment,) = replai.find_segments(args)               # the rest of 0.4 s holds no clip
        (t,) = segment.moments
        assert abs(t - 3.21) < 0.01
        sample = common.Samples(args, [segment], replai.make_moment)[0, 0]
        for side, start in (("before", t - delta - 0.5), ("after", t + delta)):
            first = math.ceil(start * 24)                     # 12 frames lie in half a second
            assert numbers(sample[side]) == [first + k for k in replai.subsample(12, 8)], side
        (x, rate), *_ = heard[-1:]
        assert x.shape[1] == pytest.approx(2 * rate, abs=1)
        assert abs(np.abs(x[0]).argmax() / rate - 1) < 0.02   # the click is in the middle


def test_moments_are_detected_once_and_again_where_a_file_or_a_flag_changed(painted, tmp_path,
                                                                            monkeypatch):
    seen, detect = [], replai.detect_moments

    def counted(args, files, i, rng):
        seen.append(files[i].name)
        return detect(args, files, i, rng)

    monkeypatch.setattr(replai, "detect_moments", counted)
    (painted / "torn.mp4").write_bytes(b"no video")
    args = arguments("--data", painted)
    first = replai.find_segments(args)
    again = replai.find_segments(args)
    assert [s[:3] for s in first] == [s[:3] for s in again]
    assert seen == ["one.mp4", "torn.mp4", "torn.mp4"]        # a broken file is tried again
    world.write_video(painted / "two.mp4", [world.paint(k) for k in range(50)], 25,
                      sound=clicks([1.0], 2.0))
    assert len(replai.find_segments(args)) == 2 and seen[3:] == ["torn.mp4", "two.mp4"]
    replai.find_segments(arguments("--data", painted, "--prominence", 2))
    assert seen[5:] == ["one.mp4", "torn.mp4", "two.mp4"]
    assert len(json.loads((tmp_path / "runs" / "replai_moments.json").read_text())) == 4


def test_a_killed_detection_keeps_what_was_written(painted, monkeypatch, tmp_path):
    def compute(args, items, make, what):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(items))
        return [[[0.0, 10.0, [5.0]]] for _ in items]

    calls, files = [], [painted / f"{k}.mp4" for k in range(600)]
    for f in files:
        f.write_bytes(b"")
    monkeypatch.setattr(common, "compute", compute)
    with pytest.raises(KeyboardInterrupt):
        replai.read_moments(arguments("--data", painted), files)
    assert calls == [256, 256]
    assert len(json.loads((tmp_path / "runs" / "replai_moments.json").read_text())) == 512


def test_files_without_sound_are_counted_and_segments_without_a_moment_replaced(painted, capsys):
    mute = world.write_video(painted / "mute.mp4", [world.paint(k) for k in range(50)], 25)
    world.write_video(painted / "quiet.mp4", [world.paint(k) for k in range(50)], 25,
                      sound=("aac", 44100, "mono", np.zeros((1, 88200), np.float32)))
    with pytest.raises(VideoError, match=r"mute\.mp4: has no sound"):
        replai.read_audio(mute)
    args = arguments("--data", painted)
    segments = replai.find_segments(args)
    assert "2 segments of 3 files; 1 files have no sound, 0 cannot be read; 1 segments have no " \
        "moment" in capsys.readouterr().out
    empty = next(k for k, s in enumerate(segments) if not len(s.moments))
    data = common.Samples(args, segments, replai.make_moment)
    for k in ("before", "after", "sound"):                    # the only moment there is
        assert data[4, empty][k].shape == data[4, 1 - empty][k].shape
    with pytest.raises(UserError, match="no moment of interaction found"):
        replai.find_segments(arguments("--data", painted, "--prominence", 1000))


def test_random_moments_leave_room_for_both_clips_and_limit_counts_segments(painted, capsys):
    world.write_video(painted / "two.mp4", [world.paint(k) for k in range(50)], 25,
                      sound=clicks([], 2.0))
    flags = "--data", painted, "--moi", "random"
    segments = replai.find_segments(arguments(*flags))
    assert "0 segments have no moment" in capsys.readouterr().out
    for s in segments:
        assert len(s.moments) > 20 and (s.start + 0.6 <= s.moments).all()
        assert (s.moments <= s.stop - 0.6).all()
    assert len(replai.find_segments(arguments(*flags, "--limit", 1))) == 1


def test_epic_trains_on_the_videos_of_its_list_whole_or_in_pieces(painted, tmp_path, capsys):
    epic, pieces = tmp_path / "epic", ["P01_01_000000_000010", "P01_01_000010_000020"]
    world.text(epic / "annotations/EPIC_100_train.csv", "narration_id,video_id", "P01_01_0,P01_01",
               "P02_103_0,P02_103")
    world.link(epic, "one", "videos/P01/P01_01.MP4", "videos/P02/P02_103.MP4",
               "videos/P03/P03_01.MP4")
    args = arguments("--dataset", "epic", "--data", epic)
    assert [f.name for f in replai.training_files(args)] == ["P01_01.MP4", "P02_103.MP4"]
    world.link(epic, "one", *(f"segments/{x}.MP4" for x in (*pieces, "P03_01_000000_000010")))
    assert [f.stem for f in replai.training_files(args)] == pieces
    assert "1 of 2 training videos found" in capsys.readouterr().out


# ---- EPIC-KITCHENS-100 ---------------------------------------------------------------------------

def epic_row(video, k, start, stop, verb=0, noun=0):
    start, stop = (f"00:{int(t // 60):02}:{t % 60:05.2f}" for t in (start, stop))
    return {"narration_id": f"{video}_{k}", "participant_id": video[:3], "video_id": video,
            "start_timestamp": start, "stop_timestamp": stop, "verb_class": verb,
            "noun_class": noun}


def write_epic(root, **splits):
    files = {"tail_verbs": ["verb", *range(11, 97)], "tail_nouns": ["noun", *range(72, 300)],
             "unseen_participant_ids_validation": ["participant_id", "P18", "P32"]}
    for split, rows in splits.items():
        columns = [*rows[0]][:5 if split == "test_timestamps" else None]  # it has no labels
        files[split] = [",".join(str(row[k]) for k in columns)
                        for row in ({k: k for k in columns}, *rows)]
    for name, lines in files.items():
        world.text(root / f"annotations/EPIC_100_{name}.csv", *lines)


def epic_args(root, *flags):
    return arguments("--stage", "linear", "--dataset", "epic", "--data", root, *flags)


@pytest.fixture
def kitchen(painted, tmp_path):
    """Two whole videos of 10.4 s; another one that is missing."""
    world.link(tmp_path / "epic", "one", "videos/P01/P01_01.MP4", "videos/P18/P18_101.MP4")
    return tmp_path / "epic"


def test_rows_without_video_or_after_its_end_are_counted_named_and_left_out(kitchen, capsys):
    rows = [epic_row("P01_01", 0, 1, 3, 4, 5), epic_row("P99_01", 1, 1, 3),
            epic_row("P18_101", 2, 9, 15, 96, 299), epic_row("P01_01", 7, 327.28, 331.97),
            epic_row("P01_01", 8, 400, 401)]
    write_epic(kitchen, validation=rows)
    actions, left_out = replai.read_split(epic_args(kitchen), replai.LinearProbe(2, 10),
                                          "validation")
    assert [(a.id, a.verb, a.noun) for a in actions] == [("P01_01_0", 4, 5), ("P18_101_2", 96, 299)]
    assert actions[0].spans == [(1, 3)] and actions[1].spans == [(9, pytest.approx(10.4, abs=0.1))]
    assert left_out == ["P99_01_1", "P01_01_7", "P01_01_8"]
    text = capsys.readouterr().out
    assert "EPIC_100_validation.csv: 2 of 5 samples" in text
    assert "1 have no video here and are not used, the first is P99_01_1" in text
    assert "2 begin after the end of their video and are not used, the first is P01_01_7" in text


def test_cut_files_are_used_first_and_test_rows_that_lie_only_there_are_submitted(
        kitchen, tmp_path):
    cut = kitchen / "action_segments"
    write_epic(kitchen, validation=[epic_row("P01_01", 0, 1, 3)],
               test_timestamps=[epic_row("P36_102", k, 674.86 + k, 680.24 + k) for k in range(2)])
    world.link(kitchen, "one", "action_segments/P01_01_00000100_00000300.MP4",
               "action_segments/P36_102_00111486_00112024.MP4")
    args, task = epic_args(kitchen, "--out", tmp_path / "out"), replai.LinearProbe(2, 10)
    (val,), _ = replai.read_split(args, task, "validation")
    assert val.path.parent == cut and val.spans == [(0.0, 2.0)]
    test, left_out = replai.read_split(args, task, "test_timestamps")
    assert [a.id for a in test] == ["P36_102_0"] and left_out == ["P36_102_1"]
    replai.evaluate(args, task, torch.device("cpu"), test, left_out, "test", submit=True)
    with zipfile.ZipFile(tmp_path / "out" / "test_submission.zip") as z:
        content = json.loads(z.read("test.json"))
    assert content.keys() == {"version", "challenge", "sls_pt", "sls_tl", "sls_td", "results"}
    assert {k: {c: len(x) for c, x in v.items()} for k, v in content["results"].items()} == {
        "P36_102_0": {"verb": 97, "noun": 300}}


@pytest.mark.parametrize("column, value, why", [
    ("start_timestamp", "00:00:0x.00", "could not convert"), ("verb_class", 97, "not possible"),
    ("stop_timestamp", "00:00:00.50", "not possible"), ("noun_class", "cup", "invalid literal")])
def test_a_fault_in_a_row_names_the_file_and_its_line(kitchen, column, value, why):
    rows = [epic_row("P01_01", k, 1, 3) for k in range(2)]
    rows[1][column] = value
    write_epic(kitchen, validation=rows)
    with pytest.raises(UserError, match=f"EPIC_100_validation.csv:3: .*{why}"):
        replai.read_split(epic_args(kitchen), replai.LinearProbe(2, 10), "validation")


def test_training_clips_lie_anywhere_in_their_action_and_test_clips_evenly(kitchen, unchanged):
    args = epic_args(kitchen, "--crop", 112, "--clips", 3)
    path = kitchen / "videos" / "P01" / "P01_01.MP4"
    action = replai.Action("P01_01_0", path, [(1.0, 5.0)], 4, 5)
    train = common.Samples(args, [action], replai.make_action)
    firsts = []
    for epoch in range(20):
        got = numbers(train[epoch, 0]["clip"])
        assert got == [got[0] + k for k in replai.subsample(12, 8)]
        firsts.append(got[0] / 24)
    assert 1 <= min(firsts) < 2 < 3.5 < max(firsts) <= 4.55
    test = common.Samples(args, [action], replai.make_test_action)[0]["clip"]
    for k, clip in enumerate(test):
        first = math.ceil(24 * (1 + 3.5 * (k + 0.5) / 3))
        assert numbers(clip) == [first + j for j in replai.subsample(12, 8)]


def test_clips_of_an_action_are_averaged_after_the_softmax_and_training_flips_half():
    task, verb, noun = replai.LinearProbe(2, 10), random(6, 97), random(6, 300)
    task.forward = lambda _: (verb, noun)
    got = task.predict(None, {"clip": torch.zeros(2, 3, 3, 1, 1, 1)})
    torch.testing.assert_close(got["verb"], verb.view(2, 3, 97).softmax(2).mean(1).log())
    ramp = np.arange(48, dtype=np.uint8)[None, None, :, None].repeat(40, 1).repeat(3, 3)
    clips = (replai.augment(ramp, np.random.default_rng(k), 32, 40)[0, 0, 0] for k in range(20))
    assert {bool(row[0] < row[-1]) for row in clips} == {True, False}


def slow_hits(p, labels, k, rows):
    """Percent of these rows whose label is among the k likeliest.    p: [{label: probability}]"""
    right = [label in sorted(x, key=x.get, reverse=True)[:k]
             for x, label in itertools.compress(zip(p, labels), rows)]
    return 100 * sum(right) / len(right)


def test_epic_metrics_equal_slow_ones_on_hand_made_subsets():
    rng = np.random.default_rng(2)
    verb, noun = rng.normal(size=(40, 12)), rng.normal(size=(40, 20))
    y, z = rng.integers(0, 12, 40), rng.integers(0, 20, 40)
    verb[range(40), y] += 2 * rng.random(40)
    noun[range(40), z] += 3 * rng.random(40)
    who = np.array(["P18", "P01", "P32", "P02"])[np.arange(40) % 4]
    tails = set(range(7, 12)), set(range(14, 20))
    tail = {"verb": np.isin(y, [*tails[0]]), "noun": np.isin(z, [*tails[1]])}
    tail["action"], new = tail["verb"] | tail["noun"], np.isin(who, ["P18", "P32"])
    p = [[dict(enumerate(np.exp(row) / np.exp(row).sum())) for row in x] for x in (verb, noun)]
    pairs = [{(i, j): v[i] * n[j] for i in v for j in n} for v, n in zip(*p)]
    kinds, want = {"verb": (p[0], y), "noun": (p[1], z), "action": (pairs, [*zip(y, z)])}, {}
    for kind, k in itertools.product(kinds, (1, 5)):
        slow, every = partial(slow_hits, *kinds[kind], k), np.ones(40)
        want |= {f"{kind}@{k}": slow(every), f"all_{kind}_accuracy_at_{k}": slow(every),
                 f"tail_{kind}_accuracy_at_{k}": slow(tail[kind]),
                 f"unseen_{kind}_accuracy_at_{k}": slow(new),
                 f"head {kind}@{k}": slow(~tail["action"]),
                 f"tail {kind}@{k}": slow(tail["action"]), f"unseen {kind}@{k}": slow(new)}
    assert min(t.sum() for t in (*tail.values(), ~tail["action"], new)) > 3
    assert replai.epic_metrics(verb, noun, y, z, who, *tails, {"P18", "P32"}) == pytest.approx(want)
    empty = replai.epic_metrics(verb, noun, y, z, who, *tails, set())
    assert math.isnan(empty["unseen verb@1"])


# ---- Ego4D: recognition and anticipation ---------------------------------------------------------

def lta_entry(clip, i, start, stop, verb=0, noun=0):
    return {"video_uid": "v", "clip_uid": clip, "action_idx": i, "action_clip_start_sec": start,
            "action_clip_end_sec": stop, "verb_label": verb, "noun_label": noun}


def write_ego4d(root, name, clips, bare=False):
    clips = clips if bare else {"version": "v1", "clips": clips}
    words = {"verbs": ["v"] * 7, "nouns": ["n"] * 9}
    world.text(root / f"annotations/{name}.json", json.dumps(clips))
    world.text(root / "annotations/fho_lta_taxonomy.json", json.dumps(words))


@pytest.fixture
def ego(painted):
    """Ego4D's folders with one clip of 10.4 s at 24 fps and its video, a and b."""
    world.link(painted, "one", "clips/a.mp4", "clips/b.mp4", "videos/a.mp4")
    return painted


@pytest.mark.parametrize("bare", [False, True])
def test_actions_are_ordered_by_action_idx_and_labels_checked(bare, ego):
    rows = [lta_entry("b", 2, 4, 6, 6, 8), lta_entry("a", 1, 2, 5, 1, 2), lta_entry("b", 0, 1, 3),
            lta_entry("gone", 0, 0, 2), lta_entry("a", 5, 99, 107)]
    write_ego4d(ego, "fho_lta_val", rows, bare)
    args = arguments("--stage", "recognition", "--data", ego)
    actions, left_out = replai.read_split(args, replai.Recognition(2, 10), "val")
    assert [(a.id, a.verb, a.noun) for a in actions] == [("b_0", 0, 0), ("b_2", 6, 8),
                                                         ("a_1", 1, 2)]
    assert left_out == ["gone_0", "a_5"]
    write_ego4d(ego, "fho_lta_val", [*rows, lta_entry("a", 3, 1, 2, verb=7)])
    with pytest.raises(UserError, match="fho_lta_val.json:5: verb 7 or noun 0 is not in the tax"):
        replai.read_split(args, replai.Recognition(2, 10), "val")
    del rows[2]["action_clip_end_sec"]
    write_ego4d(ego, "fho_lta_val", rows)
    with pytest.raises(UserError, match="fho_lta_val.json:2: 'action_clip_end_sec' is missing"):
        replai.read_split(args, replai.Recognition(2, 10), "val")


def test_anticipation_reads_four_actions_in_order_and_the_labels_of_twenty(ego, unchanged):
    entries = [lta_entry("a", i, 0.2 * i, 0.2 * i + 4, i % 7, i % 9) for i in range(27)]
    write_ego4d(ego, "fho_lta_val", entries[::-1])
    args = arguments("--stage", "anticipation", "--data", ego, "--crop", 224, "--num_frames", 32)
    windows, _ = replai.read_split(args, replai.Anticipation(
        2, 10, (7, 9), features=8, layers=1), "val")
    assert [w.id for w in windows] == ["a_3", "a_4", "a_5"]   # 27 - 24; one more would fit
    assert windows[1].verb == [i % 7 for i in range(5, 25)] and windows[1].noun[0] == 5
    sample = common.Samples(args, windows, replai.make_test_action)[1]
    for clip, i in zip(sample["clip"], range(1, 5)):
        first = math.ceil(24 * (0.2 * i + (4 - replai.ACTION_SECONDS) / 2) - 1e-3)
        assert numbers(clip) == [first + k for k in replai.subsample(51, 32)]


def test_losses_of_actions_are_means_or_sums_over_the_steps():
    verb, noun, y, z = random(3, 20, 7), random(3, 20, 9), *(torch.arange(60) % n for n in (7, 9))
    sums = [-x.flatten(0, 1).log_softmax(1)[range(60), label].sum().item()
            for x, label in ((verb, y), (noun, z))]
    batch = {"verb": y.view(3, 20), "noun": z.view(3, 20)}
    lta = replai.Anticipation(2, 10, (7, 9), features=8, layers=1).losses((verb, noun), batch)
    assert [x.item() for x in lta.values()] == pytest.approx([s / 3 for s in sums], rel=1e-5)
    for make, weight in ((replai.Recognition, 1.0), (replai.LinearProbe, 0.5)):
        got = make(2, 10).losses((verb.flatten(0, 1), noun.flatten(0, 1)), {"verb": y, "noun": z})
        assert [x.item() for x in got.values()] == pytest.approx(
            [weight * s / 60 for s in sums], rel=1e-5)


def test_an_action_needs_verb_and_noun_of_the_same_future_and_the_submission_every_window():
    label = list(range(20))
    task = replai.Anticipation(2, 10, (200, 200), features=8, layers=1)
    actions = [replai.Action("a_3", None, [], label, label)]
    shifted = [x + 100 for x in label]                        # future 0 has the verbs, 1 the nouns
    verb, noun = (torch.tensor([pair], dtype=torch.float32).mT for pair in (
        [label, shifted], [shifted, label]))
    m = task.metrics(None, actions, verb, noun)
    assert (m["verb ED@20"], m["noun ED@20"], m["action ED@20"], m["action AUED"]) == (0, 0, 1, 1)
    content = json.loads(task.submission(actions, ["b_5"], verb, noun)["outputs.json"])
    assert content["a_3"] == content["b_5"] == {"verb": [label, shifted], "noun": [shifted, label]}


def test_futures_are_drawn_from_the_softmax_by_seed_and_item():
    logits, items = random(3, 20, 6) * 2, torch.tensor([4, 5, 6])
    assert torch.equal(replai.draw_futures(logits, 1, (0, 0), items), logits.argmax(-1, True))
    five = replai.draw_futures(logits, 5, (0, 0), items)
    assert five.shape == (3, 20, 5)
    alone = replai.draw_futures(logits[1:2], 5, (0, 0), torch.tensor([5]))
    assert torch.equal(alone[0], five[1])                     # whatever batch an item is in
    for seed in ((1, 0), (0, 1)):
        assert not torch.equal(replai.draw_futures(logits, 5, seed, items), five)
    drawn = replai.draw_futures(logits[:1, :3], 4000, (0, 0), torch.tensor([0]))[0]
    for row, p in zip(drawn, logits[0].softmax(-1)):
        counts = torch.bincount(row, minlength=6)
        assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 25         # chi-square: 1 in 7000


# ---- Ego4D: state change -------------------------------------------------------------------------

def oscc_entry(k, start, stop, video="a", **more):
    """start, stop: frames at 30 fps."""
    return {"clip_uid": None, "clip_id": str(k), "unique_id": f"id-{k}", "video_uid": video,
            "parent_start_sec": start / 30, "parent_end_sec": stop / 30,
            "parent_start_frame": start, "parent_end_frame": stop, **more}


def test_state_changes_of_every_official_kind_are_read(ego, capsys):
    rows = [oscc_entry(0, 0, 240, state_change=True, parent_pnr_frame=99),
            oscc_entry(1, 10, 250, state_change=False, pnr_frame=None),
            oscc_entry(2, 10, 250, state_change=None),
            oscc_entry(3, 0, 240, state_change=True, parent_pnr_frame=999),
            oscc_entry(4, 44910, 45150, state_change=True, parent_pnr_frame=45000),
            oscc_entry(5, 0, 240, "gone", state_change=False, pnr_frame=None)]
    write_ego4d(ego, "fho_oscc-pnr_val", rows)
    for flags, null in (((), 0), (("--as_released",), 1)):
        args = arguments("--stage", "statechange", "--data", ego, *flags)
        changes, left_out = replai.read_split(args, replai.StateChange(2, 10, 56), "val")
        assert [(c.id, c.state, c.pnr) for c in changes] == [
            ("id-0", 1, 99), ("id-1", 0, -1), ("id-2", null, -1), ("id-3", 1, -1)]
        assert left_out == ["id-5", "id-4"]                   # no video; at 1497 s of 10.4 s
    text = capsys.readouterr().out
    assert "1 begin after the end of their video and are not used, the first is id-4" in text


def test_state_frames_are_those_sampled_and_a_part_keeps_the_key_frame(ego, unchanged):
    args = arguments("--stage", "statechange", "--data", ego, "--crop", 225, "--num_frames", 16)
    change = replai.Change("id", ego / "videos" / "a.mp4", [(0.5, 8.5)], 8.0, (15, 255), 1, 130)
    got = numbers(common.Samples(args, [change], replai.make_test_state)[0]["clip"])
    assert got == [int((f + 0.5) / 30 * 24) for f in replai.sample_frames(15, 255, 16)]
    for epoch in range(5):
        rng = np.random.default_rng((args.seed, epoch, 0))
        start, stop = replai.random_part(change, rng, 16)
        frames = replai.sample_frames(start, stop, 16)
        sample = common.Samples(args, [change], replai.make_state)[epoch, 0]
        assert 15 <= start <= 130 <= stop <= 255
        assert numbers(sample["clip"]) == [int((f + 0.5) / 30 * 24) for f in frames]
        assert sample["keyframe"] == min(range(16), key=lambda k: abs(frames[k] - 130))


def test_a_random_part_stays_inside_and_has_enough_frames():
    rng, lengths = np.random.default_rng(3), []
    for seed in range(300):
        first, n = int(rng.integers(0, 5000)), int(rng.choice([240, 215, 120, 40, 17, 3]))
        pnr = int(rng.integers(first, first + n + 1)) if seed % 4 else -1
        change = replai.Change("id", None, [(first / 30, 0)], 8.0, (first, first + n), 1, pnr)
        start, stop = replai.random_part(change, np.random.default_rng(seed), 16)
        assert first <= start + 1 and start < stop <= first + n
        assert pnr < 0 or start <= pnr <= stop
        assert len(replai.sample_frames(start, stop, 16)) == 16
        lengths += [stop - start] * (n == 240 and pnr < 0)
    assert 149 <= min(lengths) < 180 and 220 < max(lengths) <= 241


def test_state_metrics_and_submissions_follow_from_the_scores():
    rng, task = np.random.default_rng(0), replai.StateChange(2, 10, 56)
    changes = [replai.Change(f"id-{k}", None, [], 8.0 + 0.01 * k, (30 * k, 30 * k + 200 + k), k % 2,
                             30 * k + 9 * k if k % 2 and k > 2 else -1) for k in range(21)]
    keyframe, state = (torch.from_numpy(rng.integers(0, 3, s).astype(np.float32)) for s in (
        (21, 16), (21, 2)))
    right, errors, frames = 0, [], []
    for c, x, s in zip(changes, keyframe.tolist(), state.tolist()):
        right += int(s[1] > s[0]) == c.state
        (start, stop), best = c.frames, x.index(max(x))       # the first of a tie
        frames.append(start + best * (stop - start) / 16)
        if c.pnr >= 0:
            errors.append(abs(frames[-1] - c.pnr) / ((stop - start + 1) / c.seconds))
    m = task.metrics(None, changes, keyframe, state)
    assert m["StCC acc"] == pytest.approx(100 * right / 21)
    assert m["PNR err (s)"] == pytest.approx(np.mean(errors), rel=1e-6)
    none = [c._replace(state=0, pnr=-1) for c in changes]
    assert math.isnan(task.metrics(None, none, keyframe, state)["PNR err (s)"])
    files = {k: json.loads(v) for k, v in task.submission(changes, [], keyframe, state).items()}
    assert [x["pnr_frame"] for x in files["pnr.json"]] == pytest.approx(frames)
    assert files["oscc.json"][1] == {"unique_id": "id-1",
                                     "state_change": bool(state[1, 1] > state[1, 0])}


# ---- recipes -------------------------------------------------------------------------------------

EGO4D = "runs/replai_ego4d_pretrain/last.pt"


@pytest.mark.parametrize("stage, dataset, want", [
    ("pretrain", "ego4d", (100, 512, 0.05, 1e-4, 8, 112, "avid")),
    ("pretrain", "epic", (100, 128, 0.005, 1e-4, 8, 112, "avid")),
    ("linear", "epic", (30, 128, 0.005, 0.0, 8, 112, "runs/replai_epic_pretrain/last.pt")),
    ("recognition", "ego4d", (30, 32, 0.01, 1e-4, 32, 224, EGO4D)),
    ("anticipation", "ego4d", (50, 32, 0.01, 1e-4, 32, 224, EGO4D)),
    ("statechange", "ego4d", (100, 256, 1e-4, 1e-4, 16, 225, EGO4D))])
def test_defaults_are_those_of_the_published_recipe(stage, dataset, want, capsys):
    args = replai.parse_args(["--stage", stage, "--dataset", dataset])
    assert tuple(getattr(args, k) for k in (*replai.RECIPE, "init")) == want
    shared = args.clr_coeff, args.aot_coeff, args.tau, args.delta_non_overlap, args.prominence
    assert shared == (0.5, 0.5, 0.07, 0.1, 1.0) and args.moi == "peaks"
    if stage != "pretrain":
        with pytest.raises(SystemExit):
            other = {"epic": "ego4d", "ego4d": "epic"}[dataset]
            replai.parse_args(["--stage", stage, "--dataset", other])
        assert f"--stage {stage} needs --dataset {dataset}" in capsys.readouterr().err


def test_parameters_named_bn_do_not_decay_and_the_stem_does():
    with torch.device("meta"):
        model = replai.Recognition()
    args = replai.parse_args(["--stage", "recognition"])
    decayed, free = replai.make_optimizer(args, model).param_groups
    name = {id(p): k for k, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0) and decayed["nesterov"]
    assert {name[id(p)] for p in free["params"]} == {k for k in name.values() if "bn" in k}
    assert "conv1.1.weight" in {name[id(p)] for p in decayed["params"]}
