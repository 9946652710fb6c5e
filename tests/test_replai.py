"""replai.py against what its paper's equations, the datasets' facts and the design demand."""

import csv
import json
import math
import os
import pickle
import re
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import running
from running import SMALL, command, quick

import common
import replai
import test_media
import toy
from common import UserError, VideoError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- loss --------------------------------------------------------------------------------------

def unit(v):
    n = max(math.sqrt(sum(x * x for x in v)), 1e-12)
    return [x / n for x in v]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def nll(query, keys, own, tau):
    e = [math.exp(dot(query, k) / tau) for k in keys]
    return -math.log(e[own] / sum(e))


def slow_avc(z, y, z_all, y_all, own, tau):
    """z: two lists of B vectors, as in Sec. 1 of the method's description."""
    z, z_all = ([[unit(v) for v in side] for side in x.tolist()] for x in (z, z_all))
    y, y_all = ([unit(v) for v in x.tolist()] for x in (y, y_all))
    b = len(y)
    va = sum(nll(z[s][i], y_all, own + i, tau) for s in (0, 1) for i in range(b)) / (2 * b)
    av = sum(nll(y[i], z_all[s], own + i, tau) for s in (0, 1) for i in range(b)) / (2 * b)
    return (va + av) / 2


def slow_astc(forth, back, q, kappa):
    def sigma(x):
        return 1 / (1 + math.exp(-x))
    total = 0.0
    for f, b, a in zip(*(x.tolist() for x in (forth, back, q))):
        p_fwd, p_bwd = (dot(unit(g), unit(a)) / kappa for g in (f, b))
        total += -math.log(sigma(p_fwd)) - math.log(1 - sigma(p_bwd))
    return total / 2 / len(q)


@pytest.mark.parametrize("b, n, d, own, tau", [
    (1, 1, 3, 0, 0.07), (4, 4, 8, 0, 0.07), (3, 9, 5, 3, 0.2), (2, 8, 16, 6, 1.0), (5, 5, 128, 0, 0.07)])
def test_avc_loss_is_the_sum_in_the_paper(b, n, d, own, tau):
    z_all, y_all = random(2, n, d), random(n, d, seed=1)
    z, y = z_all[:, own:own + b], y_all[own:own + b]
    loss = replai.avc_loss(z, y, z_all, y_all, own, tau)
    assert loss.item() == pytest.approx(slow_avc(z, y, z_all, y_all, own, tau), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("b, d, kappa", [(1, 3, 0.2), (4, 8, 0.2), (7, 128, 0.2), (3, 5, 1.0)])
def test_astc_loss_is_the_sum_in_the_paper(b, d, kappa):
    forth, back, q = (random(b, d, seed=s) for s in range(3))
    loss = replai.astc_loss(forth, back, q, kappa)
    assert loss.item() == pytest.approx(slow_astc(forth, back, q, kappa), rel=2e-5)


def test_astc_prefers_the_true_order():
    """Where g of the true change points along the sound, reversing time raises the loss."""
    q = random(4, 8)
    assert replai.astc_loss(q, -q, q, 0.2) < 0.01 < 4 < replai.astc_loss(-q, q, q, 0.2)


def test_on_one_process_the_candidates_carry_gradient():
    x = random(3, 4).requires_grad_()
    assert replai.candidates(x) is x


B, D_IN, D = 3, 6, 5


class Embed(nn.Module):
    """One linear layer per modality: its gradient can be written down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.video, self.audio = nn.Linear(D_IN, D, bias=False), nn.Linear(D_IN, D, bias=False)

    def forward(self, v, a):
        z, y = self.video(v), self.audio(a)
        return {"z": z, "y": y, "forth": z[1] - z[0], "back": z[0] - z[1], "q": y}


def gathered_loss(rank):
    torch.set_num_threads(1)
    v, a = random(2, 2 * B, D_IN), random(2 * B, D_IN, seed=1)
    mine = slice(rank * B, (rank + 1) * B)
    model = DDP(Embed())
    avc, astc = replai.losses(model(v[:, mine], a[mine]), 0.07)
    avc.backward()
    result = {"avc": avc.item(), "astc": astc.item(),
              "grad": {k: p.grad.clone() for k, p in model.module.named_parameters()}}

    torch.manual_seed(0)
    model = DDP(replai.RepLAI(4, 10, 8))
    clip, sound = random(4, 3, 8, 32, 32, seed=rank), random(2, 1, 125, 80, seed=2 + rank)
    for name, clr, aot in (("no_avc", 0.0, 0.5), ("no_astc", 0.5, 0.0)):
        model.zero_grad(set_to_none=True)
        avc, astc = replai.losses(model(*clip.chunk(2), sound), 0.07)
        (clr * avc + aot * astc).backward()
        result[name] = {k: None if p.grad is None else p.grad.abs().max().item()
                        for k, p in model.module.named_parameters()}
    return result


def normalised(x):
    """Rows of unit length, and the map from gradients of these to gradients of x (numpy)."""
    n = np.linalg.norm(x, axis=-1, keepdims=True)
    u = x / n
    return u, lambda g: (g - (g * u).sum(-1, keepdims=True) * u) / n


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return running.processes(gathered_loss, 2, tmp_path_factory.mktemp("gathered"))


def test_two_processes_see_the_candidates_of_both(two_processes):
    v, a, m = random(2, 2 * B, D_IN), random(2 * B, D_IN, seed=1), Embed()
    with torch.no_grad():
        out = m(v, a)
    for rank, r in enumerate(two_processes):
        mine = slice(rank * B, (rank + 1) * B)
        assert r["avc"] == pytest.approx(slow_avc(
            out["z"][:, mine], out["y"][mine], out["z"], out["y"], rank * B, 0.07), rel=2e-5)
    whole = slow_avc(out["z"], out["y"], out["z"], out["y"], 0, 0.07)
    assert sum(r["avc"] for r in two_processes) / 2 == pytest.approx(whole, rel=2e-5)
    astc = slow_astc(out["forth"], out["back"], out["q"], replai.KAPPA)
    assert sum(r["astc"] for r in two_processes) / 2 == pytest.approx(astc, rel=2e-5)


def test_the_averaged_gradient_treats_the_candidates_as_constants(two_processes):
    v, a = random(2, 2 * B, D_IN).double().numpy(), random(2 * B, D_IN, seed=1).double().numpy()
    m, tau, eye = Embed().double(), 0.07, np.eye(2 * B)
    wz, wy = m.video.weight.detach().numpy(), m.audio.weight.detach().numpy()
    (z, to_z), (y, to_y) = normalised(v @ wz.T), normalised(a @ wy.T)
    g_va = (softmax(z @ y.T / tau) - eye) / (4 * B)           # of the mean over 2 · 2B rows
    g_av = (softmax(y @ z.transpose(0, 2, 1) / tau) - eye) / (4 * B)
    g_z = to_z(g_va @ y / tau / 2)                            # Z_m and Y_m are constants
    g_y = to_y((g_av @ z).sum(0) / tau / 2)
    want = {"video.weight": np.einsum("sbd,sbi->di", g_z, v), "audio.weight": g_y.T @ a}
    for r in two_processes:
        for k, g in want.items():
            np.testing.assert_allclose(r["grad"][k].numpy(), g, rtol=1e-4, atol=1e-6, err_msg=k)


def test_a_coefficient_of_zero_stills_its_heads_but_every_parameter_has_a_gradient(two_processes):
    avc_heads, astc_heads = ("video_clr", "audio_clr"), ("video_aot", "audio_aot", "aot_diff")
    for r in two_processes:
        for name, still in (("no_avc", avc_heads), ("no_astc", astc_heads)):
            for k, g in r[name].items():
                assert g is not None, f"{name}: {k} has no gradient, DDP would wait for it"
                if k.startswith("mlp."):
                    assert (g == 0) == (k.split(".")[1] in still), f"{name}: {k} {g}"


# ---- model -------------------------------------------------------------------------------------

def released_keys():
    """{key: shape} of the released checkpoints, without `module.`, from their description."""
    def norm(name, c):
        return {f"{name}.{k}": (c,) for k in ("weight", "bias", "running_mean", "running_var")} | {
            f"{name}.num_batches_tracked": ()}
    v = {"conv1.0.weight": (64, 3, 3, 7, 7), **norm("conv1.1", 64)}
    widths = {"conv2x": (64, 64), "conv3x": (64, 128), "conv4x": (128, 256), "conv5x": (256, 512)}
    for s, (i, o) in widths.items():
        for b in (0, 1):
            p, c = f"{s}.{b}", o if b else i
            v |= {f"{p}.spt_conv1.weight": (o, c, 1, 3, 3), f"{p}.tmp_conv1.weight": (o, o, 3, 1, 1),
                  f"{p}.spt_conv2.weight": (o, o, 1, 3, 3), f"{p}.tmp_conv2.weight": (o, o, 3, 1, 1)}
            for n in ("spt_bn1", "tmp_bn1", "spt_bn2", "out_bn"):
                v |= norm(f"{p}.{n}", o)
        if s != "conv2x":
            v[f"{s}.0.res_conv.weight"] = (o, i, 1, 1, 1)
    a = {"conv1.0.weight": (64, 1, 7, 7), **norm("conv1.1", 64)}
    for n, (i, o) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
        a |= {f"block{n}.conv1.weight": (o, i, 3, 3), **norm(f"block{n}.bn1", o),
              f"block{n}.conv2.weight": (o, o, 3, 3), **norm(f"block{n}.bn2", o)}
    heads = {}
    for n in ("video_clr", "audio_clr", "video_aot", "audio_aot", "aot_diff"):
        i = 128 if n == "aot_diff" else 512
        heads |= {f"mlp.{n}.0.weight": (512, i), f"mlp.{n}.0.bias": (512,),
                  f"mlp.{n}.2.weight": (128, 512), f"mlp.{n}.2.bias": (128,)}
    return v, a, heads


def test_names_shapes_and_numbers_of_parameters_are_the_released_ones():
    v, a, heads = released_keys()
    model = replai.RepLAI()
    own = {k: tuple(x.shape) for k, x in model.state_dict().items()}
    want = {**{f"backbone.video.{k}": s for k, s in v.items()},
            **{f"backbone.audio.{k}": s for k, s in a.items()}, **heads}
    extra = {k for k in own if k not in want}
    assert {k for k in want if own.get(k) != want[k]} == set()
    # The norm without use in each block of the video network is in the count of 201 entries.
    assert extra == {k for k in own if ".tmp_bn2." in k}
    video, audio = (model.backbone[k] for k in ("video", "audio"))
    assert sum(p.numel() for p in video.parameters()) == 15_379_136
    assert sum(p.numel() for p in audio.parameters()) == 4_725_696
    assert sum(p.numel() for p in model.parameters()) == 21_549_824
    assert [len(m.state_dict()) for m in (video, audio, model)] == [201, 54, 275]


def test_names_of_the_linear_probe_are_the_released_ones():
    own = {k: tuple(x.shape) for k, x in replai.LinearProbe().state_dict().items()}
    fc = {k: s for k, s in own.items() if k.startswith("fc.")}
    assert fc == {"fc.verb_class.weight": (97, 512), "fc.verb_class.bias": (97,),
                  "fc.noun_class.weight": (300, 512), "fc.noun_class.bias": (300,)}
    assert {k.removeprefix("backbone.") for k in own if k not in fc} == set(
        common.R2Plus1D().state_dict())


def test_every_stage_has_its_shape():
    video, audio = common.R2Plus1D(), common.SpectrogramCNN()
    with torch.inference_mode():
        maps = video.eval()(random(1, 3, 8, 112, 112), return_embs=True)
        assert {k: tuple(x.shape[1:]) for k, x in maps.items()} == {
            "conv1": (64, 8, 28, 28), "conv2x": (64, 8, 28, 28), "conv3x": (128, 4, 14, 14),
            "conv4x": (256, 2, 7, 7), "conv5x": (512, 1, 4, 4), "pool": (512, 1, 1, 1)}
        maps = audio.eval()(random(1, 1, 125, 80), return_embs=True)
        assert tuple(maps["conv5x"].shape) == (1, 512, 8, 5)
        model = replai.RepLAI(8, 10)
        clip = random(2, 3, 8, 32, 32)
        v, a = model.encode(clip, clip, random(2, 1, 125, 80))
        assert (v.shape, a.shape) == ((4, 64), (2, 64))
        out = model(clip, clip, random(2, 1, 125, 80))
        assert {k: tuple(x.shape) for k, x in out.items()} == {
            "z": (2, 2, 128), "y": (2, 128), "forth": (2, 128), "back": (2, 128), "q": (2, 128)}


@pytest.mark.parametrize("stride, pad, bias", [(1, 1, False), (2, 1, False), (1, 0, True)])
def test_temporal_convolution_is_the_3d_one(stride, pad, bias):
    torch.manual_seed(0)
    conv = common.TemporalConv(4, 6, (3, 1, 1), (stride, 1, 1), (pad, 0, 0), bias=bias).double()
    x = random(2, 4, 8, 5, 7).double()
    want = F.conv3d(x, conv.weight, conv.bias, (stride, 1, 1), (pad, 0, 0))
    torch.testing.assert_close(conv(x), want, rtol=1e-12, atol=1e-12)


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = replai.RepLAI(8, 10)
    clips, sound = random(8, 3, 8, 32, 32), random(4, 1, 125, 80, seed=1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    values = []
    for _ in range(25):
        avc, astc = replai.losses(model(*clips.chunk(2), sound), 0.07)
        values.append((avc.item(), astc.item()))
        sgd.zero_grad()
        ((avc + astc) / 2).backward()
        sgd.step()
    (avc0, astc0), (avc1, astc1) = values[0], values[-1]
    assert avc1 < avc0 / 2 and astc1 < astc0 / 2, values


# ---- sound and moments -------------------------------------------------------------------------

@pytest.mark.parametrize("old, new", [(44100, 16000), (48000, 16000), (8000, 16000), (22050, 44100)])
@pytest.mark.parametrize("share", [0.0125, 0.125, 0.5])
def test_resampling_keeps_a_sine_in_the_lower_half_of_the_band(old, new, share):
    n, hz = 12347, share * min(old, new) / 2
    x = torch.sin(2 * math.pi * hz * torch.arange(n, dtype=torch.float64) / old)
    y = replai.resample(x.float(), old, new)
    assert len(y) == math.ceil(n * new / old)
    want = torch.sin(2 * math.pi * hz * torch.arange(len(y), dtype=torch.float64) / new)
    inside = slice(200, -200)
    assert (y[inside] - want[inside]).abs().max() < 4e-3


def test_resampling_removes_what_the_new_rate_cannot_hold():
    x = torch.sin(2 * math.pi * 11000 * torch.arange(44100) / 44100)
    assert replai.resample(x, 44100, 16000)[200:-200].abs().max() < 0.01


@pytest.mark.parametrize("n", [1, 3, 300, 1409, 5001, 88199, 88200])
@pytest.mark.parametrize("channels, rate", [(1, 44100), (2, 48000)])
def test_log_mel_has_its_shape_for_any_length(n, channels, rate):
    x = replai.log_mel(0.1 * random(channels, n).numpy(), rate)
    assert x.shape == (1, 125, 80) and torch.isfinite(x).all()


def clicks(times, seconds=10.0, rate=44100, seed=0):
    rng = np.random.default_rng(seed)
    x = 0.002 * rng.normal(size=round(seconds * rate))
    for t in times:
        k = round(t * rate)
        x[k:k + 300] += 0.6 * rng.uniform(-1, 1, 300) * np.exp(-np.arange(300) / 100)
    return x[None].astype(np.float32)


@pytest.mark.parametrize("rate", [44100, 48000])
def test_moments_are_found_where_clicks_are(rate):
    times = [0.8, 2.345, 2.6, 5.0, 7.77, 9.2]
    found = replai.find_moments(clicks(times, rate=rate), rate, 1.0)
    assert np.abs(found.times[found.peaks] - times).max() < 0.01
    assert (found.prominences >= 1.0).all() and len(found.curve) == len(found.times)


def test_silence_noise_and_snippets_have_no_moments():
    for x in (clicks([]), np.zeros((1, 44100), np.float32), np.zeros((2, 255), np.float32)):
        assert len(replai.find_moments(x, 44100, 1.0).peaks) == 0


def test_two_clicks_within_distance_count_as_one():
    x = clicks([3.0, 3.03])
    assert len(replai.find_moments(x, 44100, 1.0).peaks) == 1
    assert len(replai.find_moments(clicks([3.0, 3.1]), 44100, 1.0).peaks) == 2


def test_moments_near_the_border_are_not_admissible():
    times = np.array([0.0, 0.59, 0.6, 5.0, 9.4, 9.41, 10.0])
    assert replai.admissible(times, 10.0, 0.1).tolist() == [False, False, True, True, True, False,
                                                            False]
    assert replai.admissible(times, 10.0, 0.5).tolist() == [False, False, False, True, False, False,
                                                            False]


@pytest.mark.parametrize("duration, want", [
    (30.0, [(0, 10), (10, 20), (20, 30)]), (25.5, [(0, 10), (10, 20), (20, 25.5)]),
    (20.5, [(0, 10), (10, 20)]), (21.3, [(0, 10), (10, 20), (20, 21.3)]), (0.3, [(0, 0.3)]),
    (10.0, [(0, 10)])])
def test_segments_are_ten_seconds_and_a_short_rest_is_dropped(duration, want):
    assert replai.cut_times(duration) == pytest.approx([pytest.approx(w) for w in want])


# ---- data --------------------------------------------------------------------------------------

def arguments(*args):
    return replai.parse_args([*SMALL, *map(str, args)])


@pytest.fixture(scope="module")
def cache(ego4d, tmp_path_factory):
    """The toy's moments, detected once for all tests of this file."""
    folder = tmp_path_factory.mktemp("moments")
    replai.scan(arguments("--data", ego4d, "--moments", folder))
    return folder


@pytest.fixture
def index(ego4d, cache):
    args = arguments("--data", ego4d, "--moments", cache)
    return replai.SegmentIndex(args, replai.scan(args))


def batches(monkeypatch, world, *args):
    """Batches of all `world` processes, joined step by step."""
    shares = []
    for r in range(world):
        monkeypatch.setattr(common, "rank", lambda r=r: r)
        monkeypatch.setattr(common, "world_size", lambda: world)
        shares.append(list(common.StepSampler(*args)))
    return [sum(step, []) for step in zip(*shares)]


def test_every_number_of_processes_sees_the_same_batches(monkeypatch):
    one = batches(monkeypatch, 1, 23, 4, 7, 0, 15)
    assert len(one) == 15 and all(len(b) == 4 for b in one)
    assert one == batches(monkeypatch, 2, 23, 4, 7, 0, 15) == batches(monkeypatch, 4, 23, 4, 7, 0, 15)
    for epoch in range(3):                                    # 5 steps each, three samples dropped
        keys = sum(one[5 * epoch:5 * epoch + 5], [])
        assert {e for e, _ in keys} == {epoch} and len({i for _, i in keys}) == 20
    assert [i for _, i in sum(one[:5], [])] != [i for _, i in sum(one[5:10], [])]
    assert one != batches(monkeypatch, 1, 23, 4, 8, 0, 15)


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13, 14, 15])
def test_the_sampler_resumes_at_any_step(monkeypatch, start):
    whole = batches(monkeypatch, 2, 23, 4, 7, 0, 15)
    assert batches(monkeypatch, 2, 23, 4, 7, start, 15) == whole[start:]


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(UserError, match="3 training samples do not fill one batch"):
        common.StepSampler(3, 4, 0, 0, 1)


class Fragile(torch.utils.data.Dataset):
    def __init__(self, n, broken):
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        if key[1] in self.broken:
            raise VideoError(f"file{key[1]}.mp4: torn")
        return {"key": key}


def test_a_broken_sample_has_the_same_substitute_each_time():
    data = common.SkipBroken(Fragile(20, {3, 4, 5}), seed=0)
    assert data[1, 2] == {"key": (1, 2), "broken": ""}
    got = [data[1, 3] for _ in range(3)]
    assert got[0] == got[1] == got[2] and got[0]["key"][0] == 1
    assert got[0]["key"][1] not in {3, 4, 5} and got[0]["broken"].startswith("file3.mp4: torn")
    assert len({data[e, 3]["key"][1] for e in range(20)}) > 3


def test_too_many_broken_samples_in_a_row_raise():
    data = common.SkipBroken(Fragile(5, set(range(5))), seed=0, tries=7)
    with pytest.raises(VideoError, match=r"torn \(7 samples in a row could not be read\)"):
        data[0, 1]


def test_a_segment_without_a_moment_is_replaced_by_the_same_one_each_time(ego4d, cache, index):
    data = replai.AudibleClips(arguments("--data", ego4d, "--moments", cache), index)
    mute = np.flatnonzero(index.count == 0)
    assert len(mute) >= 6 and not index.sound[mute].all()     # no sound, and silence
    for i in mute[:3]:
        first, again = data[4, i], data[4, i]
        assert index.count[first["segment"]] > 0
        assert first["segment"] == again["segment"] and first["t"] == again["t"]
        assert all(torch.equal(first[k], again[k]) for k in ("before", "after", "sound"))
    others = {data.moment(np.random.default_rng((0, e, mute[0])), mute[0])[0] for e in range(50)}
    assert others <= set(index.usable.tolist()) and len(others) > 3


def test_a_segment_with_moments_is_itself_and_all_its_moments_come(ego4d, cache, index):
    data = replai.AudibleClips(arguments("--data", ego4d, "--moments", cache), index)
    i = int(index.count.argmax())
    own = set(index.peaks[index.offset[i]:index.offset[i + 1]].tolist())
    drawn = [data.moment(np.random.default_rng((0, e, i)), i) for e in range(200)]
    assert {d[0] for d in drawn} == {i} and {d[1] for d in drawn} == own


def test_random_moments_leave_room_for_both_clips(ego4d, cache):
    args = arguments("--data", ego4d, "--moments", cache, "--moi", "random")
    index = replai.SegmentIndex(args, replai.scan(args))
    data, drawn = replai.AudibleClips(args, index), []
    for e in range(20):
        for i in range(len(index)):
            i, t = data.moment(np.random.default_rng((0, e, i)), i)
            assert index.start[i] + 0.6 <= t <= index.stop[i] - 0.6 and index.sound[i]
            drawn.append(t - index.start[i])
    assert min(drawn) < 1 < 8.5 < max(drawn)
    peaks = set(index.peaks.tolist())
    assert not any(t in peaks for t in drawn)


@pytest.fixture
def painted(tmp_path):
    """A folder with a video whose pictures carry their numbers, and a click at 3.21 s."""
    sound = clicks([3.21], seconds=6.4)
    frames = (test_media.paint(k, 128, 96) for k in range(160))
    toy.write_video(tmp_path / "data" / "one.mp4", frames, 25, sound)
    return arguments("--data", tmp_path / "data", "--moments", tmp_path / "m", "--crop", "112")


def test_clips_lie_before_and_after_the_click(painted, monkeypatch):
    index = replai.SegmentIndex(painted, replai.scan(painted))
    assert len(index.peaks) == 1 and abs(index.peaks[0] - 3.21) < 0.01
    monkeypatch.setattr(replai, "augment", lambda frames, *_: frames)
    heard = {}

    def log_mel(x, rate):
        heard.update(x=x, rate=rate)
        return torch.zeros(1, 125, 80)
    monkeypatch.setattr(replai, "log_mel", log_mel)
    item = replai.AudibleClips(painted, index)[0, 0]
    t = item["t"]
    for side, start in (("before", t - 0.6), ("after", t + 0.1)):
        numbers = [test_media.number_of(f) for f in item[side]]
        first = math.ceil(start * 25 - 1e-9)                  # of the 12 pictures in half a second
        assert numbers == [first + k for k in common.subsample(12, 8)], side
        assert start <= numbers[0] / 25 and numbers[-1] / 25 < start + 0.5, side
    x, rate = heard["x"], heard["rate"]
    assert x.shape[1] == pytest.approx(2 * rate, abs=1)
    assert abs(np.abs(x[0]).argmax() / rate - 1.0) < 0.02     # the click is in the middle


def test_the_gap_between_the_clips_follows_its_flag(painted, monkeypatch):
    painted.delta_non_overlap = 0.5
    index = replai.SegmentIndex(painted, replai.scan(painted))
    monkeypatch.setattr(replai, "augment", lambda frames, *_: frames)
    item = replai.AudibleClips(painted, index)[0, 0]
    last, first = (test_media.number_of(item[k][j]) / 25 for k, j in (("before", -1), ("after", 0)))
    assert last < item["t"] - 0.5 < item["t"] + 0.5 <= first < item["t"] + 0.54


def test_an_augmented_clip_is_one_place_in_all_its_pictures():
    """A still picture stays still, is scaled within the range, mirrored half of the time."""
    ramp = np.arange(320, dtype=np.float32)[None, :, None] / 320 * 255
    frames = np.broadcast_to(ramp, (4, 180, 320, 3)).astype(np.uint8)
    mirrored, spreads = 0, []
    for seed in range(60):
        clip = replai.augment(frames, np.random.default_rng(seed), 112, False)
        assert clip.shape == (3, 4, 112, 112) and clip.dtype == torch.uint8
        assert (clip == clip[:, :1]).all()
        spread = clip[0, 0, 50].float()
        mirrored += bool(spread[0] > spread[-1])
        spreads.append(abs(float(spread[-1] - spread[0])) / 255 * 320 / 111)   # pixels per pixel
    assert 15 < mirrored < 45
    # short side 180 -> 128 .. 180: one new pixel spans 180/180 .. 180/128 old ones
    assert 0.98 < min(spreads) < 1.1 and 1.25 < max(spreads) < 1.44


# ---- EPIC-KITCHENS-100's annotations ----------------------------------------------------------

TAIL_VERBS, TAIL_NOUNS = range(11, 97), range(72, 300)        # 86 and 228 classes, as official


def official_rows():
    """9,668 rows whose subsets have the sizes of the official validation split."""
    rng = np.random.default_rng(0)
    kinds = rng.permutation([(1, 1)] * 555 + [(1, 0)] * 1205 + [(0, 1)] * 1345 + [(0, 0)] * 6563)
    people = rng.permutation(["P18"] * 739 + ["P32"] * 326 + ["P01"] * 5000 + ["P22"] * 3603)
    rows, count = [], {}
    for (tail_v, tail_n), person in zip(kinds.tolist(), people.tolist()):
        v = int(rng.integers(11, 97) if tail_v else rng.integers(0, 11))
        n = int(rng.integers(72, 300) if tail_n else rng.integers(0, 72))
        video = f"{person}_{101 + len(rows) % 3}"
        k = count[video] = count.get(video, -1) + 1
        start = 1.9 * k
        nouns, classes = ([f"noun:{n}"], [n]) if k % 4 else ([f"noun:{n}", "big 'red' cup"], [n, 13])
        words = f'put, gently, "it" {n}' if k % 5 == 0 else "pick up knife"
        rows.append([f"{video}_{k}", person, video, toy.stamp(start, 3), toy.stamp(start, 2),
                     toy.stamp(start + 1.5, 2), int(start * 60), int(start * 60 + 90), words,
                     "pick-up", v, f"noun:{n}", n, nouns, classes])
    return rows


def write_annotations(root, rows, split="validation"):
    folder = root / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"EPIC_100_{split}.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(toy.EPIC_COLUMNS)
        writer.writerows(rows)
    for name, column, values in (("tail_verbs", "verb", TAIL_VERBS), ("tail_nouns", "noun", TAIL_NOUNS),
                                 ("unseen_participant_ids_validation", "participant_id",
                                  ("P18", "P32"))):
        (folder / f"EPIC_100_{name}.csv").write_text("\n".join([column, *map(str, values)]) + "\n")
    return folder / f"EPIC_100_{split}.csv"


def test_the_official_validation_split_is_read_and_divided_as_published(tmp_path):
    write_annotations(tmp_path, official_rows())
    a, tails = replai.read_actions(tmp_path, "validation"), replai.read_subsets(tmp_path)
    assert len(a.id) == 9668 and len(set(a.id)) == 9668
    assert (len(tails[0]), len(tails[1]), tails[2]) == (86, 228, {"P18", "P32"})
    assert a.seconds[1].tolist() == pytest.approx([0.0, 1.5])
    of_v, of_n = np.isin(a.verb, list(tails[0])), np.isin(a.noun, list(tails[1]))
    new = np.isin(a.participant, list(tails[2]))
    assert [of_v.sum(), of_n.sum(), (of_v | of_n).sum(), (of_v & of_n).sum(), new.sum()] == [
        1760, 1900, 3105, 555, 1065]
    # All wrong but one row of the tails that is unseen and one of neither: the subsets' sizes.
    verb, noun = np.zeros((9668, 97), np.float32), np.zeros((9668, 300), np.float32)
    right = [np.flatnonzero(of_v & of_n & new)[0], np.flatnonzero(~of_v & ~of_n & ~new)[0]]
    every = np.arange(9668)
    wrong = ~np.isin(every, right)
    verb[every, (a.verb + wrong) % 97] = 1
    noun[every, (a.noun + wrong) % 300] = 1
    m = replai.epic_metrics(verb, noun, a.verb, a.noun, a.participant, *tails)
    for key, rows, hits in (
            ("verb@1", 9668, 2), ("all_action_accuracy_at_1", 9668, 2),
            ("tail_verb_accuracy_at_1", 1760, 1), ("tail_noun_accuracy_at_1", 1900, 1),
            ("tail_action_accuracy_at_1", 3105, 1), ("unseen_verb_accuracy_at_1", 1065, 1),
            ("unseen_noun_accuracy_at_1", 1065, 1), ("unseen_action_accuracy_at_1", 1065, 1),
            ("tail verb@1", 3105, 1), ("tail noun@1", 3105, 1), ("head verb@1", 6563, 1),
            ("head noun@1", 6563, 1), ("unseen verb@1", 1065, 1)):
        assert m[key] == pytest.approx(100 * hits / rows, rel=1e-9), key


GOOD = ["P01_01_0", "P01", "P01_01", "00:00:01.100", "00:00:01.10", "00:00:02.36", "66", "141",
        "put, gently, cup", "put", "1", "cup", "13", "['cup', 'shelf']", "[13, 61]"]


def with_field(column, value, row=GOOD, name="P01_01_1"):
    new = [name, *row[1:]]
    new[toy.EPIC_COLUMNS.index(column)] = value
    return new


FAULTS = {  # what is wrong: (rows after the good one, or bytes in their place), line, words
    "timestamp": ([with_field("start_timestamp", "00:61:01.10")], 3, "start_timestamp"),
    "timestamp empty": ([with_field("stop_timestamp", "")], 3, "stop_timestamp"),
    "timestamp word": ([with_field("stop_timestamp", "nan")], 3, "stop_timestamp"),
    "stop before start": ([with_field("stop_timestamp", "00:00:01.09")], 3, "not after the start"),
    "stop at start": ([with_field("stop_timestamp", "00:00:01.10")], 3, "not after the start"),
    "verb out of range": ([with_field("verb_class", "97")], 3, "verb_class '97'"),
    "noun out of range": ([with_field("noun_class", "300")], 3, "noun_class '300'"),
    "noun negative": ([with_field("noun_class", "-1")], 3, "noun_class '-1'"),
    "verb no number": ([with_field("verb_class", "١")], 3, "verb_class"),
    "path for a video": ([with_field("video_id", "../../x")], 3, "video_id '../../x'"),
    "path in a video": ([with_field("video_id", "P01_01/../x")], 3, "video_id"),
    "narration twice": ([GOOD], 3, "narration_id 'P01_01_0'"),
    "narration empty": ([with_field("narration_id", "", name="")], 3, "narration_id"),
    "too few fields": ([GOOD[:-1]], 3, "number of fields"),
    "too many fields": ([with_field("verb", "x") + ["more"]], 3, "number of fields"),
    "after a narration of two lines": (
        [with_field("narration", "two\nlines"), with_field("verb_class", "x", name="P01_01_2")], 5,
        "verb_class"),
    "not UTF-8": (b"P01_01_1,P01,caf\xe9\n", 3, "UTF-8"),
    "NUL": (b"P01_01_1,P01,P01\0_01\n", 3, "NUL"),
    "open quote": (b'P01_01_1,P01,"P01_01\n', 3, ""),
}


def faulty(tmp_path, name):
    rows, line, words = FAULTS[name]
    path = write_annotations(tmp_path, [GOOD, *(rows if isinstance(rows, list) else [])], "train")
    if isinstance(rows, bytes):
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n") + rows)
    return path, line, words


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_an_annotation_names_file_and_line(tmp_path, name):
    path, line, words = faulty(tmp_path, name)
    with pytest.raises(UserError) as e:
        replai.read_actions(tmp_path, "train")
    text = str(e.value)
    assert text.startswith(f"{path}:{line}: ") and words in text and "\n" not in text


def test_a_good_row_is_read_whole(tmp_path):
    write_annotations(tmp_path, [GOOD], "train")
    a = replai.read_actions(tmp_path, "train")
    assert [x.tolist() for x in a] == [
        ["P01_01_0"], ["P01"], ["P01_01"], [["00:00:01.10", "00:00:02.36"]], [[1.1, 2.36]], [1], [13]]


def test_a_missing_column_and_an_empty_file_are_named(tmp_path):
    path = write_annotations(tmp_path, [], "train")
    with pytest.raises(UserError, match=f"{path}: has no rows"):
        replai.read_actions(tmp_path, "train")
    path.write_text(path.read_text().replace("stop_timestamp,", ""))
    with pytest.raises(UserError, match=f"{path}:1: column stop_timestamp is missing"):
        replai.read_actions(tmp_path, "train")
    path.write_text("")
    with pytest.raises(UserError, match=f"{path}:1: column narration_id is missing"):
        replai.read_actions(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: no such file"):
        replai.read_actions(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"verb\nx\n", b"noun\n1\n", b"verb\n\xff\n", b"verb\n\0\n"])
def test_a_faulty_tail_list_is_named(tmp_path, content):
    write_annotations(tmp_path, [GOOD])
    path = tmp_path / "annotations" / "EPIC_100_tail_verbs.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}:[12]: "):
        replai.read_subsets(tmp_path)


def one_error(result, code=1):
    """The message of a run that must have ended with one line on stderr."""
    lines = result.err.splitlines()
    assert result.code == code, result
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("name", ["timestamp", "not UTF-8", "path for a video"])
def test_the_command_line_shows_a_fault_in_one_line(tmp_path, name):
    path, line, words = faulty(tmp_path, name)
    text = one_error(command("--stage", "linear", "--dataset", "epic", "--data", tmp_path,
                             "--out", tmp_path / "run", "--init", "none", *SMALL))
    assert text.startswith(f"{path}:{line}: ") and words in text


# ---- metrics -----------------------------------------------------------------------------------

def slow_top_k(scores, labels, k):
    hits = sum(sorted(range(len(s)), key=lambda c: -s[c])[:k].count(y) for s, y in zip(scores, labels))
    return 100 * hits / len(labels)


def slow_action_top_k(verb, noun, verbs, nouns, k):
    hits = 0
    for v, n, y, z in zip(verb, noun, verbs, nouns):
        ev, en = ([math.exp(x) for x in s] for s in (v, n))
        pairs = {(i, j): a / sum(ev) * b / sum(en) for i, a in enumerate(ev) for j, b in enumerate(en)}
        hits += (y, z) in sorted(pairs, key=pairs.get, reverse=True)[:k]
    return 100 * hits / len(verbs)


def scores_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    verb, noun = rng.normal(size=(rows, 12)), rng.normal(size=(rows, 20))
    y, z = rng.integers(0, 12, rows), rng.integers(0, 20, rows)
    verb[np.arange(rows), y] += 2 * rng.random(rows)
    noun[np.arange(rows), z] += 3 * rng.random(rows)
    return verb, noun, y, z


@pytest.mark.parametrize("k", [1, 2, 5, 11, 12, 200])
def test_top_k_counts_as_a_slow_one(k):
    verb, _, y, _ = scores_of(60)
    assert replai.top_k(verb, y, k) == pytest.approx(slow_top_k(verb.tolist(), y.tolist(), k))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_action_top_k_counts_as_a_slow_one_over_all_pairs(k):
    x = scores_of(25, seed=1)
    want = slow_action_top_k(*(v.tolist() for v in x), k)
    assert 0 < want < 100
    assert replai.action_top_k(*x, k) == pytest.approx(want)


def test_epic_metrics_equal_slow_ones_on_hand_made_subsets():
    verb, noun, y, z = scores_of(40, seed=2)
    who = np.array(["P18", "P01", "P32", "P02"])[np.arange(40) % 4]
    tails = set(range(7, 12)), set(range(14, 20))
    m = replai.epic_metrics(verb, noun, y, z, who, *tails, {"P18", "P32"})
    r = range(40)
    tv, tn = [i for i in r if y[i] in tails[0]], [i for i in r if z[i] in tails[1]]
    either, new = sorted({*tv, *tn}), [i for i in r if who[i] in ("P18", "P32")]
    rest = [i for i in r if i not in either]
    assert min(map(len, (tv, tn, rest, new))) > 3 and tv != tn

    def slow(kind, rows, k):
        part = [x[rows].tolist() for x in (verb, noun, y, z)]
        if kind == "action":
            return slow_action_top_k(*part, k)
        return slow_top_k(part[kind == "noun"], part[2 + (kind == "noun")], k)
    want = {f"all_{kind}_accuracy_at_{k}": slow(kind, list(r), k)
            for kind in ("verb", "noun", "action") for k in (1, 5)}
    for kind, rows in (("verb", tv), ("noun", tn), ("action", either)):
        want[f"tail_{kind}_accuracy_at_1"] = slow(kind, rows, 1)
        want[f"unseen_{kind}_accuracy_at_1"] = slow(kind, new, 1)
    for name, rows in (("head", rest), ("tail", either), ("unseen", new)):
        want |= {f"{name} {kind}@{k}": slow(kind, rows, k) for kind in ("verb", "noun") for k in (1, 5)}
    want |= {f"{kind}@{k}": slow(kind, list(r), k) for kind in ("verb", "noun") for k in (1, 5)}
    assert m == pytest.approx(want)


def test_an_empty_subset_has_no_accuracy():
    verb, noun, y, z = scores_of(3)
    m = replai.epic_metrics(verb, noun, y, z, np.array(["P01"] * 3), set(), set(), {"P18"})
    assert m["tail_verb_accuracy_at_1"] is None and m["unseen noun@5"] is None
    json.dumps(m, allow_nan=False)
