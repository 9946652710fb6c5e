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
import running
import test_media
import torch
import torch.nn.functional as F
import toy
from running import SMALL, command, quick
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import replai
from common import UserError, VideoError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PRETRAIN = [*SMALL, "--limit", 6]                             # 3 steps an epoch, 6 in all
LINEAR = [*SMALL, "--stage", "linear", "--dataset", "epic", "--init", "none"]


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
    (1, 1, 3, 0, 0.07), (4, 4, 8, 0, 0.07), (3, 9, 5, 3, 0.2), (2, 8, 16, 6, 1.0),
    (5, 5, 128, 0, 0.07)])
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
            v |= {f"{p}.spt_conv1.weight": (o, c, 1, 3, 3),
                  f"{p}.spt_conv2.weight": (o, o, 1, 3, 3),
                  f"{p}.tmp_conv1.weight": (o, o, 3, 1, 1),
                  f"{p}.tmp_conv2.weight": (o, o, 3, 1, 1)}
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

@pytest.mark.parametrize("old, new", [
    (44100, 16000), (48000, 16000), (8000, 16000), (22050, 44100)])
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
    for world in (2, 4):
        assert one == batches(monkeypatch, world, 23, 4, 7, 0, 15)
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


def slope(clip):
    """Change of the first colour per pixel, to the right and downwards."""
    x = clip[0, 0].float()
    return (x[:, -1] - x[:, 0]).mean() / (x.shape[1] - 1), (x[-1] - x[0]).mean() / (x.shape[0] - 1)


@pytest.mark.parametrize("flags, swap", [([], False), (["--legacy_aspect"], True),
                                         (["--compat", "released"], True)])
def test_the_aspect_is_kept_or_squeezed_as_released(flags, swap):
    """A ramp of one grey level per pixel, to the right or downwards, in pictures of 240 x 120."""
    args, got = replai.parse_args(["--tiny", *flags]), []
    for axis in (1, 0):
        ramp = np.broadcast_to(np.expand_dims(np.arange((120, 240)[axis]), 1 - axis), (120, 240))
        frames = np.stack([ramp.astype(np.uint8)] * 3, -1)[None]
        clip = replai.augment(frames, np.random.default_rng(3), 56, args.legacy_aspect)
        got.append(abs(slope(clip)[1 - axis]))
    wide, high = got                                          # grey levels per pixel after resizing
    assert wide / high == pytest.approx(4 if swap else 1, rel=0.1)


def test_evaluation_is_resized_by_nearest_neighbour_or_bilinearly(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (1, 120, 160, 3), np.uint8)
    monkeypatch.setattr(replai.ActionClips, "read", lambda self, i, starts: [frames])
    actions, located = replai.Actions(*[np.zeros(1, int)] * 7), ([0], [b"x"], [(0.0, 2.0)])
    seen = set(frames.reshape(-1, 3)[:, 0].tolist())
    for how in ("nearest", "bilinear"):
        args = replai.parse_args(
            f"--stage linear --dataset epic --tiny --eval_resize {how}".split())
        clip = replai.TestClips(args, actions, located)[0][0]
        assert clip.shape == (3, 1, 56, 56)
        assert torch.equal(clip, replai.centre(frames, 56, how))
        columns = [int((np.arange(64) + 0.5)[y] * 120 / 64) for y in range(4, 60)]
        rows = [int((np.arange(85) + 0.5)[x] * 160 / 85) for x in range(14, 70)]
        picked = torch.from_numpy(frames[0][np.ix_(columns, rows)]).permute(2, 0, 1)
        assert torch.equal(clip[:, 0], picked) == (how == "nearest")
    assert len(seen) > 250


def test_features_are_normalised_over_themselves_or_to_signs():
    probe = replai.LinearProbe(2, 10, {"verb_class": 3, "noun_class": 4})
    x = torch.tensor([[3.0, -4.0] + [0.0] * 14, [0.1] * 16])
    for how, want in (("off", x), ("sign", x.sign()), ("l2", x / x.norm(dim=1, keepdim=True))):
        got = probe.classify(x, how)
        for k, layer in probe.fc.items():
            torch.testing.assert_close(got[k], layer(want))


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
        m = 1 + (k % 4 == 0)
        nouns, classes = [f"noun:{n}", "big 'red' cup"][:m], [n, 13][:m]
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
    for name, column, values in (
            ("tail_verbs", "verb", TAIL_VERBS), ("tail_nouns", "noun", TAIL_NOUNS),
            ("unseen_participant_ids_validation", "participant_id", ("P18", "P32"))):
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
        ["P01_01_0"], ["P01"], ["P01_01"], [["00:00:01.10", "00:00:02.36"]], [[1.1, 2.36]], [1],
        [13]]


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


@pytest.mark.parametrize("content", [
    b"", b"verb\nx\n", b"noun\n1\n", b"verb\n\xff\n", b"verb\n\0\n"])
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
    best = [sorted(range(len(s)), key=lambda c, s=s: -s[c])[:k] for s in scores]
    return 100 * sum(y in b for b, y in zip(best, labels)) / len(labels)


def slow_action_top_k(verb, noun, verbs, nouns, k):
    hits = 0
    for v, n, y, z in zip(verb, noun, verbs, nouns):
        ev, en = ([math.exp(x) for x in s] for s in (v, n))
        pairs = {(i, j): a / sum(ev) * b / sum(en)
                 for i, a in enumerate(ev) for j, b in enumerate(en)}
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
        want |= {f"{name} {kind}@{k}": slow(kind, rows, k)
                 for kind in ("verb", "noun") for k in (1, 5)}
    want |= {f"{kind}@{k}": slow(kind, list(r), k) for kind in ("verb", "noun") for k in (1, 5)}
    assert m == pytest.approx(want)


def test_an_empty_subset_has_no_accuracy():
    verb, noun, y, z = scores_of(3)
    m = replai.epic_metrics(verb, noun, y, z, np.array(["P01"] * 3), set(), set(), {"P18"})
    assert m["tail_verb_accuracy_at_1"] is None and m["unseen noun@5"] is None
    json.dumps(m, allow_nan=False)


# ---- command line ------------------------------------------------------------------------------

def test_every_flag_is_explained(monkeypatch):
    plain, seen = common.parse, []

    def parse(parser, *rest):
        args = plain(parser, *rest)
        seen.extend(parser._actions)
        return args
    monkeypatch.setattr(common, "parse", parse)
    replai.parse_args([])
    assert len(seen) > 35
    for action in seen:
        assert action.help and len(action.help.split()) >= 2, action.dest


def test_help_answers_with_the_method_and_all_flags():
    began = time.monotonic()
    r = command("--help")
    assert r.code == 0 and r.err == "" and time.monotonic() - began < 60
    for words in ("L_AVC", "L_AStC", "arXiv:2209.13583", "torchrun", "--delta_non_overlap",
                  "(default: 512, commands/*.sh", "--normalize_feats"):
        assert words in r.out
    assert all(len(line) <= 100 for line in r.out.splitlines())


@pytest.mark.parametrize("flags, want", [
    ("", {"dataset": "ego4d", "stage": "pretrain", "epochs": 100, "batch_size": 512, "lr": 0.05,
          "weight_decay": 1e-4, "init": "avid", "crop": 112, "num_frames": 8, "width": 64,
          "depth": 18, "tau": 0.07, "clr_coeff": 0.5, "aot_coeff": 0.5, "delta_non_overlap": 0.1,
          "prominence": 1.0, "data": Path("data/ego4d"), "moi": "peaks", "workers": 8,
          "out": Path("runs/replai_ego4d_pretrain")}),
    ("--dataset epic", {"epochs": 100, "batch_size": 128, "lr": 0.005, "weight_decay": 1e-4,
                        "data": Path("data/epic"), "init": "avid",
                        "out": Path("runs/replai_epic_pretrain")}),
    ("--dataset epic --stage linear", {
        "epochs": 30, "batch_size": 128, "lr": 0.005, "weight_decay": 0.0, "clips": 1,
        "init": "runs/replai_epic_pretrain/last.pt", "eval_resize": "nearest",
        "normalize_feats": "off", "legacy_aspect": False, "legacy_bn": False}),
    ("--dataset epic --stage linear --compat released", {"legacy_aspect": True, "legacy_bn": True}),
    ("--dataset epic --lr 0.7 --batch_size 6", {"lr": 0.7, "batch_size": 6, "epochs": 100}),
    ("--tiny", {"crop": 56, "width": 16, "depth": 10, "init": "none", "workers": 2}),
    ("--tiny --crop 40 --init x.pt", {"crop": 40, "init": "x.pt", "width": 16})])
def test_defaults_are_those_of_the_published_recipe(flags, want, monkeypatch):
    monkeypatch.setattr("sys.argv", ["replai.py"])
    args = vars(replai.parse_args(flags.split()))
    assert {k: args[k] for k in want} == want


@pytest.mark.parametrize("flags, words", [
    ("--epoch 3", "--epoch 3"), ("--stage train", "--stage"), ("--dataset kinetics", "--dataset"),
    ("--epochs 0", "--epochs 0"), ("--epochs x", "--epochs"), ("--batch_size 7", "--batch_size 7"),
    ("--stage linear --dataset ego4d", "--dataset epic"), ("--moi loud", "--moi")])
def test_a_wrong_flag_is_one_line_and_status_2(flags, words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as e:
        replai.parse_args(flags.split())
    text = capsys.readouterr().err
    assert e.value.code == 2
    assert text.count("\n") == 1 and text.startswith("error: ") and words in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has bf16")
def test_bf16_on_the_cpu_is_refused_with_the_reason():
    assert "uninitialised" in one_error(command("--precision", "bf16"), code=2)


class Trap:
    """Its pickle makes a folder when it is loaded as code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("case", ["absent folder", "empty folder", "absent file", "other network",
                                  "damaged", "empty file", "code", "out is a file",
                                  "out below a file", "few segments"])
def test_what_the_user_can_mend_is_one_line_and_status_1(case, tmp_path, ego4d, cache, weights):
    data, init, out, more = ego4d, tmp_path / "init.pt", tmp_path / "run", []
    words = str(init)
    if case == "absent folder":
        data = words = tmp_path / "nowhere"
    elif case == "empty folder":
        data = words = tmp_path / "empty"
        data.mkdir()
        more = ["--init", "none"]
    elif case == "other network":
        torch.save({"state_dict": {"layer1.0.weight": torch.zeros(3)}}, init)
    elif case == "damaged":
        torch.save({"model": weights}, init)
        init.write_bytes(init.read_bytes()[:-5000])
    elif case == "empty file":
        init.touch()
    elif case == "code":
        init.write_bytes(pickle.dumps({"model": Trap(tmp_path / "trapped")}))
    elif case == "out is a file":
        out = words = tmp_path / "file"
        out.touch()
    elif case == "out below a file":
        (tmp_path / "file").touch()
        out = words = tmp_path / "file" / "run"
    elif case == "few segments":
        more, words = ["--limit", 3, "--batch_size", 4, "--init", "none"], "3 training samples"
    text = one_error(quick(tmp_path / "q", *SMALL, "--data", data, "--moments", cache,
                           "--init", init, "--out", out, *more))
    assert str(words) in text
    assert not (tmp_path / "trapped").exists()
    assert not list(tmp_path.rglob("last.pt"))


def test_code_in_a_zip_checkpoint_is_not_run_either(tmp_path):
    torch.save({"model": Trap(tmp_path / "trapped")}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="more than tensors"):
        common.load_file(tmp_path / "c.pt")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, ego4d, cache):
    tmp_path.chmod(0o500)
    text = one_error(quick(tmp_path / "q", *SMALL, "--data", ego4d, "--out", tmp_path / "run"))
    assert str(tmp_path / "run") in text


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("change", [["--lr", "0.5"], ["--width", "4"], ["--seed", "1"]])
def test_a_run_made_with_other_flags_is_left_as_it_was(change, runs, ego4d, cache, tmp_path):
    before = contents(runs[1])
    r = quick(tmp_path, *PRETRAIN, *change, "--data", ego4d, "--moments", cache, "--out", runs[1])
    assert change[0] in one_error(r) and str(runs[1]) in r.err
    assert contents(runs[1]) == before


def test_a_damaged_checkpoint_in_the_run_folder_stops_and_stays(runs, ego4d, cache, tmp_path):
    shutil.copytree(runs[1], tmp_path / "run")
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    before = contents(tmp_path / "run")
    r = quick(tmp_path, *PRETRAIN, "--data", ego4d, "--moments", cache, "--out", tmp_path / "run")
    assert "damaged" in one_error(r) and contents(tmp_path / "run") == before


# ---- checkpoints of others ---------------------------------------------------------------------

def renamed(state, table):
    return {new + k[len(old):]: v for k, v in state.items()
            for old, new in table.items() if k.startswith(old)}


LAYOUTS = {  # the file's content, from RepLAI's own state
    "ours": lambda s: {"model": s, "step": 7, "args": {"lr": 0.1}},
    "RepLAI": lambda s: {"model": renamed(s, {"": "module."}), "optimizer": {"state": {}},
                         "sampler": {"num_batches_seen": 9, "epoch": 3}, "epoch": 3},
    "AVID": lambda s: {"epoch": 5, "optimizer": {}, "train_criterion": {}, "model": {
        **renamed(s, {"backbone.video.": "module.video_model.",
                      "backbone.audio.": "module.audio_model."}),
        "module.video_proj.projection.0.weight": torch.zeros(4, 4),
        "module.audio_proj.projection.4.bias": torch.zeros(4)}},
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s},
    "model_av": lambda s: {"model_av": renamed(s, {"": "module."})},
    "model_state": lambda s: {"model_state": s},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_fills_replai(name, weights, tmp_path, capsys):
    torch.save(LAYOUTS[name](weights), tmp_path / "c.pt")
    model = replai.RepLAI(8, 10)
    fresh = state_of(model)
    common.load_weights(model, tmp_path / "c.pt", replai.PRETRAIN_LAYOUTS, "backbone.")
    for k, v in model.state_dict().items():
        heads_stay = name == "AVID" and k.startswith("mlp.")
        assert torch.equal(v, (fresh if heads_stay else weights)[k]), k
    n = len([k for k in weights if name != "AVID" or k.startswith("backbone.")])
    text = capsys.readouterr().out
    assert f"{n} tensors loaded, {2 * (name == 'AVID')} of the file not used" in text
    assert ("video_proj.projection" in text) == (name == "AVID")


PROBES = {
    **LAYOUTS,
    "linear probe": lambda s: {"model": {**renamed(s, {"backbone.video.": "module.backbone."}),
                                         "module.fc.verb_class.weight": torch.ones(97, 64),
                                         "module.fc.verb_class.bias": torch.ones(97),
                                         "module.fc.noun_class.weight": torch.ones(300, 64),
                                         "module.fc.noun_class.bias": torch.ones(300)}},
    "model.backbone": lambda s: {"state_dict": renamed(s, {"backbone.video.": "model.backbone."})},
    "video alone": lambda s: {"state_dict": renamed(s, {"backbone.video.": ""})},
}


@pytest.mark.parametrize("name", PROBES)
def test_every_layout_fills_the_linear_probe(name, weights, tmp_path):
    torch.save(PROBES[name](weights), tmp_path / "c.pt")
    probe = replai.LinearProbe(8, 10)
    common.load_weights(probe, tmp_path / "c.pt", replai.PROBE_LAYOUTS, "backbone.")
    for k, v in probe.backbone.state_dict().items():
        assert torch.equal(v, weights[f"backbone.video.{k}"]), k
    assert (probe.fc["verb_class"].bias == (name == "linear probe")).all()


@pytest.mark.parametrize("lost", ["backbone.video.conv3x.0.out_bn.running_var",
                                  "backbone.audio.block4.conv2.weight"])
def test_a_missing_backbone_tensor_is_an_error_and_changes_nothing(lost, weights, tmp_path):
    torch.save({"model": {k: v for k, v in weights.items() if k != lost}}, tmp_path / "c.pt")
    model = replai.RepLAI(8, 10)
    before = state_of(model)
    with pytest.raises(UserError, match=f"1 of the network's tensors are missing.*{lost}"):
        common.load_weights(model, tmp_path / "c.pt", replai.PRETRAIN_LAYOUTS, "backbone.")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_width_is_an_error_that_names_both_shapes(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"conv1.0.weight is \(8, .*needs \(4, "):
        common.load_weights(replai.RepLAI(4, 10), tmp_path / "c.pt", replai.PRETRAIN_LAYOUTS)


def test_tensors_that_are_not_used_are_reported(weights, tmp_path, capsys):
    torch.save({"model": {**weights, "module.queue.keys": torch.zeros(2)}}, tmp_path / "c.pt")
    common.load_weights(replai.RepLAI(8, 10), tmp_path / "c.pt", replai.PRETRAIN_LAYOUTS)
    text = capsys.readouterr().out
    assert "1 of the file not used (queue.keys), 0 of the network left fresh" in text


# ---- pre-training, end to end ------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(ego4d, cache, tmp_path_factory):
    """{processes: run folder}: by `python replai.py`, and by torchrun with two."""
    folders = {}
    for n in (1, 2):
        folders[n] = tmp_path_factory.mktemp(f"run{n}") / "out"
        r = command(*PRETRAIN, "--data", ego4d, "--moments", cache, "--out", folders[n], n=n)
        assert (folders[n] / "moments.png").exists(), r       # gloo may abort at exit, work done
    return folders


@pytest.mark.parametrize("n", [1, 2])
def test_pretraining_leaves_what_is_promised(runs, n):
    out = runs[n]
    assert set(contents(out)) == {"args.json", "log.jsonl", "last.pt", "best.pt", "metrics.json",
                                  "curve.png", "moments.png"}
    args = json.loads((out / "args.json").read_text())
    assert args["processes"] == n and args["batch_size"] == 2 and args["versions"]["torch"]
    rows = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"]) for r in rows] == [(k // 3, k) for k in range(6)]
    for r in rows:
        assert set(r) == {"stage", "epoch", "step", "loss", "avc", "astc", "lr", "clips_per_s",
                          "data_wait", "eta_s", "broken"}
        assert r["stage"] == "pretrain" and 0 <= r["data_wait"] <= 1 and r["clips_per_s"] > 0
        assert r["loss"] == pytest.approx((r["avc"] + r["astc"]) / 2, rel=1e-4)
    last, best = (torch.load(out / f, weights_only=True) for f in ("last.pt", "best.pt"))
    assert last["step"] == 6 and set(best) == {"model", "step", "args", "versions"}
    assert set(last["model"]) == set(replai.RepLAI(8, 10).state_dict())
    m = json.loads((out / "metrics.json").read_text())
    assert (m["steps"], m["segments"], m["samples_broken"]) == (6, 6, 0) and m["moments"] > 5
    epoch = {k: sum(r[k] for r in rows[3:]) / 3 for k in ("loss", "avc", "astc")}
    assert {k: m[k] for k in epoch} == pytest.approx(epoch, rel=1e-4), "mean over all processes"
    for name in ("curve.png", "moments.png"):
        from PIL import Image
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 300 and np.asarray(image).std() > 10


def test_a_finished_run_starts_again_without_changing_its_weights(runs, ego4d, cache, tmp_path):
    before = contents(runs[1])
    r = quick(tmp_path, *PRETRAIN, "--data", ego4d, "--moments", cache, "--out", runs[1])
    after = contents(runs[1])
    assert r.code == 0 and "after step 6" in r.out
    for name in ("last.pt", "best.pt", "log.jsonl"):
        assert after[name] == before[name], name


def test_a_pretrained_network_starts_a_run_and_a_linear_probe(runs, epic, ego4d, cache, tmp_path):
    init = runs[1] / "best.pt"
    r = quick(tmp_path, *PRETRAIN, "--data", ego4d, "--moments", cache, "--init", init, "--out",
              tmp_path / "a", "--epochs", 1)
    assert r.code == 0 and "left fresh" in r.out and ", 0 of the file not used" in r.out
    r = quick(tmp_path, *LINEAR, "--data", epic, "--init", init, "--out", tmp_path / "b",
              "--limit", 4)
    assert r.code == 0, r
    own = torch.load(tmp_path / "b" / "last.pt", weights_only=True)["model"]
    for k, v in torch.load(init, weights_only=True)["model"].items():
        if k.startswith("backbone.video."):
            assert torch.equal(own[k.replace(".video", "")], v), k


@pytest.mark.parametrize("flags", ["--moi random", "--clr_coeff 0", "--aot_coeff 0", "--depth 18",
                                   "--legacy_aspect", "--delta_non_overlap 0.3"])
def test_every_switch_trains(flags, ego4d, cache, tmp_path):
    r = quick(tmp_path, *SMALL, "--limit", 2, "--epochs", 1, "--data", ego4d, "--moments", cache,
              "--out", tmp_path / "out", *flags.split())
    assert r.code == 0 and (tmp_path / "out" / "last.pt").exists(), r


def linked(source, target):
    shutil.copytree(source, target, copy_function=os.link)
    return target


def test_a_broken_file_is_named_and_counted_and_training_goes_on(ego4d, tmp_path):
    data = linked(ego4d, tmp_path / "data")
    whole = sorted(data.glob("*.mp4"))[0].read_bytes()
    (data / "torn.mp4").write_bytes(whole[:len(whole) // 3])
    (data / "empty.mp4").touch()
    r = quick(tmp_path, *SMALL, "--data", data, "--moments", tmp_path / "m", "--out",
              tmp_path / "out", "--epochs", 1, "--limit", 8)
    assert r.code == 0 and "warning: 2 files cannot be read" in r.out
    assert f"{data}/torn.mp4" in r.out and f"{data}/empty.mp4" in r.out


def test_a_file_that_breaks_after_the_scan_is_replaced_and_counted(painted, tmp_path):
    data = painted.data
    shutil.copy(data / "one.mp4", data / "two.mp4")
    flags = [*SMALL, "--data", data, "--moments", tmp_path / "m"]
    assert quick(tmp_path, *flags, "--stage", "moments", "--out", tmp_path / "moments").code == 0
    size = (data / "two.mp4").stat().st_size
    (data / "two.mp4").write_bytes(bytes(size))               # as long as before: the cache holds
    r = quick(tmp_path, *flags, "--out", tmp_path / "out", "--epochs", 3)
    assert r.code == 0, r
    assert len(r.err.splitlines()) == 1
    assert re.match(rf"warning: {data}/two.mp4: .*; sample replaced", r.err)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["samples_broken"] == 3


def test_files_without_sound_are_counted(ego4d, cache, tmp_path):
    r = quick(tmp_path, *SMALL, "--stage", "moments", "--data", ego4d, "--moments", cache,
              "--out", tmp_path / "out")
    m = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert r.code == 0 and m["files"] == 4
    assert 0 < m["segments_without_sound"] <= m["segments_without_moment"] < m["segments"]
    assert f"({m['segments_without_sound']} of them no sound)" in r.out
    assert (tmp_path / "out" / "moments.png").exists()


# ---- kill and resume: more than one process, and what test_faults.py does not kill ------------

KILLS = [("step", 1), ("torn", 1), ("line", 1), ("renamed", 1), ("torn", 2)]


def run_and_kill(tmp_path, flags, n, kills, plain):
    """Run to the end in two folders, one of them with kills; compare every byte that counts."""
    assert quick(tmp_path / "q", *flags, "--out", tmp_path / "whole", *plain, n=n).code == 0
    out, killed = tmp_path / "killed", 0
    for kill in kills:
        r = quick(tmp_path / "q", *flags, "--out", out, n=n, die=kill)
        killed += r.code == -9
    r = quick(tmp_path / "q", *flags, "--out", out, n=n)
    assert r.code == 0 and "continuing" in r.out, r
    assert killed >= 4, "too few runs were killed for this to be a test"
    whole, own = contents(tmp_path / "whole"), contents(out)
    names = {"last.pt", "best.pt", "metrics.json", "validation.zip"} & set(whole)
    for name in names:
        assert own[name] == whole[name], f"{name} differs"
    rows = [[json.loads(x) for x in f["log.jsonl"].decode().splitlines()] for f in (whole, own)]
    assert [r["step"] for r in rows[1]] == [r["step"] for r in rows[0]] == list(range(len(rows[0])))
    for a, b in zip(*rows):
        assert all(a[k] == b[k] for k in ("loss", "lr", "epoch"))
    assert "last.pt" in names
    return own


@pytest.mark.parametrize("n, workers", [(1, 2), (2, 0), (3, 0)])
def test_a_killed_pretraining_ends_in_the_same_bytes(n, workers, ego4d, cache, tmp_path):
    flags = [*PRETRAIN, "--data", ego4d, "--moments", cache, "--epochs", 3, "--workers", workers]
    flags += ["--batch_size", 3, "--width", 16] if n == 3 else []         # 3: buckets, see `settle`
    run_and_kill(tmp_path, flags, n, KILLS, ["--workers", "0"])


def test_a_killed_linear_evaluation_ends_in_the_same_bytes(epic, tmp_path):
    flags = [*LINEAR, "--data", epic, "--limit", 6, "--batch_size", 2]
    run_and_kill(tmp_path, flags, 2, KILLS[:4] + [("torn:metrics.json", 1)], [])


def test_torn_checkpoints_leave_no_litter_that_counts(ego4d, cache, tmp_path):
    flags = [*PRETRAIN, "--data", ego4d, "--moments", cache, "--out", tmp_path / "out"]
    assert quick(tmp_path, *flags, die=("torn", 2)).code == -9
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert any(name.startswith("last.pt.tmp") for name in left) and "last.pt" in left
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 2


# ---- linear evaluation -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def linears(epic, tmp_path_factory):
    """{processes: folder} of a linear evaluation, by `python replai.py` and by torchrun."""
    folders = {}
    for n in (1, 2):
        folders[n] = tmp_path_factory.mktemp(f"linear{n}") / "out"
        r = command(*LINEAR, "--epochs", 1, "--batch_size", 4, "--data", epic, "--out", folders[n],
                    n=n)
        assert (folders[n] / "metrics.json").exists(), r
    return folders


def test_linear_evaluation_does_not_depend_on_the_number_of_processes(linears):
    one, two = (contents(f) for f in linears.values())
    assert set(one) == {"args.json", "log.jsonl", "last.pt", "metrics.json", "validation.zip",
                        "submission.zip", "curve.png"}
    for name in ("metrics.json", "validation.zip", "submission.zip"):
        assert one[name] == two[name], name


def test_the_submission_has_the_official_form_and_each_row_once(linears, epic):
    for name, split in (("validation", "validation"), ("submission", "test")):
        with zipfile.ZipFile(linears[1] / f"{name}.zip") as z:
            assert z.namelist() == ["test.json"]
            sent = json.loads(z.read("test.json"))
        assert {k: v for k, v in sent.items() if k != "results"} == {
            "version": "0.2", "challenge": "action_recognition", "sls_pt": 4, "sls_tl": 3,
            "sls_td": 3}
        rows = replai.read_actions(epic, split)
        assert list(sent["results"]) == rows.id.tolist()
        for r in sent["results"].values():
            assert set(r) == {"verb", "noun"}
            assert list(r["verb"]) == [str(i) for i in range(97)]
            assert list(r["noun"]) == [str(i) for i in range(300)]
            assert all(isinstance(s, float) for k in r for s in r[k].values())


def test_the_metrics_follow_from_the_submitted_scores(linears, epic):
    with zipfile.ZipFile(linears[1] / "validation.zip") as z:
        results = list(json.loads(z.read("test.json"))["results"].values())
    verb, noun = (np.array([list(r[k].values()) for r in results]) for k in ("verb", "noun"))
    a = replai.read_actions(epic, "validation")
    m = json.loads((linears[1] / "metrics.json").read_text())
    assert m["rows"] == len(a.id) and m["rows_absent"] == 0
    assert m["verb@1"] == pytest.approx(slow_top_k(verb.tolist(), a.verb.tolist(), 1))
    assert m["noun@5"] == pytest.approx(slow_top_k(noun.tolist(), a.noun.tolist(), 5))
    for scores in (verb, noun):                               # logs of mean probabilities
        np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-3)
    np.testing.assert_allclose(m["all_action_accuracy_at_5"], replai.action_top_k(
        verb, noun, a.verb, a.noun, 5))


@pytest.mark.parametrize("flags", ["--clips 2", "--clip random", "--legacy_bn", "--compat released",
                                   "--normalize_feats l2", "--normalize_feats sign",
                                   "--eval_resize bilinear"])
def test_every_switch_of_the_linear_evaluation_runs(flags, epic, tmp_path):
    r = quick(tmp_path, *LINEAR, "--data", epic, "--limit", 4, "--epochs", 1, "--out",
              tmp_path / "out", *flags.split())
    assert r.code == 0 and r.err == "", r
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"] == 4


def test_the_frozen_network_stays_and_legacy_batch_norm_moves(epic, tmp_path):
    for flags in ([], ["--legacy_bn"]):
        out = tmp_path / f"out{len(flags)}"
        for name, epochs in (("a", 1), ("b", 2)):
            r = quick(tmp_path, *LINEAR, "--data", epic, "--limit", 4, "--epochs", epochs, "--out",
                      out / name, *flags)
            assert r.code == 0, r
        a, b = (torch.load(out / x / "last.pt", weights_only=True)["model"] for x in "ab")
        for k in a:
            still = k.startswith("backbone.") and not (
                flags and k.endswith(("running_mean", "running_var", "num_batches_tracked")))
            assert torch.equal(a[k], b[k]) == (still or ".tmp_bn2." in k), k


def test_a_broken_validation_video_stops_the_evaluation(epic, tmp_path):
    data = linked(epic, tmp_path / "data")
    path = next(p for p in data.glob("videos/*/*.MP4")
                if p.stem in set(replai.read_actions(epic, "validation").video))
    whole = path.read_bytes()
    path.unlink()                                             # the link, not the toy
    path.write_bytes(whole[:len(whole) // 2])
    r = quick(tmp_path, *LINEAR, "--data", data, "--epochs", 1, "--out", tmp_path / "out")
    assert one_error(r).startswith(str(path))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_absent_videos_are_counted(epic, tmp_path):
    data = linked(epic, tmp_path / "data")
    a = replai.read_actions(epic, "validation")
    gone = a.video[0]
    next(data.glob(f"videos/*/{gone}.MP4")).unlink()
    r = quick(tmp_path, *LINEAR, "--data", data, "--epochs", 1, "--batch_size", 8, "--out",
              tmp_path / "out")
    n = int((a.video != gone).sum())
    m = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (m["rows"], m["rows_absent"]) == (n, len(a.id) - n)
    assert f"validation: {n} of {len(a.id)} rows; 1 videos are absent ({gone})" in r.out


# ---- segments and moments ----------------------------------------------------------------------

@pytest.fixture
def one_epic_video(epic, tmp_path):
    """A toy EPIC with one training video, which has sound."""
    data = tmp_path / "data"
    rows = replai.read_actions(epic, "train")
    name = rows.video[0]
    shutil.copytree(epic / "annotations", data / "annotations")
    (data / "videos").mkdir()
    shutil.copy(next(epic.glob(f"videos/*/{name}.MP4")), data / "videos" / f"{name}.MP4")
    return data, data / "videos" / f"{name}.MP4"


def segments_of(data, tmp_path, **how):
    return quick(tmp_path / "q", *SMALL, "--stage", "segments", "--dataset", "epic", "--data", data,
                 "--moments", tmp_path / "m", "--out", tmp_path / "cut", **how)


def test_segments_are_cut_as_the_official_ones_and_used(one_epic_video, tmp_path):
    data, video = one_epic_video
    r = segments_of(data, tmp_path)
    assert r.code == 0, r
    whole, pieces = common.probe(video), sorted((data / "segments").iterdir())
    times = replai.cut_times(whole.duration)
    assert [p.name for p in pieces] == [
        f"{video.stem}_{int(a):06d}_{math.ceil(b):06d}.MP4" for a, b in times]
    for piece, (start, stop) in zip(pieces, times):
        made = common.probe(piece)
        assert made.fps == 16 and made.sample_rate == 44100 and made.channels == whole.channels
        assert abs(made.duration - (stop - start)) <= 1 / 16 + 1e-6
        assert abs(made.width - whole.width) <= 1 and abs(made.height - whole.height) <= 1
        at = np.arange(0, stop - start - 0.1, 1.25)           # multiples of 1/16
        new = common.read_clip(piece, [at])[0].astype(float)
        old = common.read_clip(video, [start + at])[0].astype(float)
        old = old[:, :new.shape[1], :new.shape[2]]
        assert np.abs(new - old).mean((1, 2, 3)).max() < 4, piece.name
        x, rate = common.read_audio(piece)
        y, old_rate = common.read_audio(video, start, stop)
        y = replai.resample(torch.from_numpy(y).mean(0), old_rate, rate).numpy()
        n = min(len(y), x.shape[1])
        assert abs(n - rate * (stop - start)) < 0.06 * rate
        assert np.corrcoef(x.mean(0)[:n], y[:n])[0, 1] > 0.9, piece.name
    m = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert m == {"videos": 1, "pieces_written": len(times), "pieces_kept": 0,
                 "videos_unreadable": 0}

    before = contents(data / "segments")
    assert segments_of(data, tmp_path).code == 0              # again: nothing is left to do
    assert contents(data / "segments") == before
    m = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert (m["pieces_written"], m["pieces_kept"]) == (0, len(times))
    r = quick(tmp_path / "q", *SMALL, "--dataset", "epic", "--data", data, "--moments",
              tmp_path / "m", "--out", tmp_path / "out", "--epochs", 1)
    assert r.code == 0 and f"{len(times)} segments of {len(times)} files" in r.out, r


def test_cutting_that_was_killed_goes_on_and_is_not_trained_on(one_epic_video, tmp_path):
    data, _ = one_epic_video
    assert segments_of(data, tmp_path, die=("torn:.MP4", 3)).code == -9
    assert (data / "segments" / ".cutting").exists()
    done = {p.name: p.read_bytes() for p in (data / "segments").glob("*.MP4")}
    assert len(done) == 2
    r = quick(tmp_path / "q", *SMALL, "--dataset", "epic", "--data", data, "--moments",
              tmp_path / "m", "--out", tmp_path / "out")
    assert "not all videos are cut yet" in one_error(r)
    r = segments_of(data, tmp_path)
    m = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert r.code == 0 and m["pieces_kept"] == 2 and m["pieces_written"] >= 2, r
    assert not (data / "segments" / ".cutting").exists()
    assert all((data / "segments" / k).read_bytes() == v for k, v in done.items())


def moments_of(data, tmp_path, cache, n=1):
    return quick(tmp_path / "q", *SMALL, "--stage", "moments", "--data", data, "--moments", cache,
                 "--out", tmp_path / "out", n=n)


def test_moments_are_detected_once_and_again_only_where_a_file_changed(painted, tmp_path):
    data, m = painted.data, tmp_path / "cache"
    shutil.copy(data / "one.mp4", data / "two.mp4")
    assert moments_of(data, tmp_path, m).code == 0
    path = m / "moments.jsonl"
    assert [p.name for p in m.iterdir()] == ["moments.jsonl"]
    first, stat = path.read_text(), path.stat()
    records = [json.loads(line) for line in first.splitlines()]
    assert [r["file"] for r in records] == ["one.mp4", "two.mp4"]
    assert all(set(r) == {"file", "bytes", "prominence", "segments"} for r in records)
    ((start, stop, peaks),) = records[0]["segments"]
    assert (start, stop) == (0, 6.4) and len(peaks) == 1 and abs(peaks[0] - 3.21) < 0.01
    assert moments_of(data, tmp_path, m).code == 0
    assert (path.stat().st_mtime_ns, path.read_text()) == (stat.st_mtime_ns, first)

    frames = (test_media.paint(k, 128, 96) for k in range(160))
    toy.write_video(data / "two.mp4", frames, 25, clicks([1.5, 4.5], seconds=6.4, seed=1))
    assert moments_of(data, tmp_path, m).code == 0
    lines = path.read_text().splitlines()
    assert lines[0] == first.splitlines()[0]                  # not detected anew
    size = (data / "two.mp4").stat().st_size
    new = next(r for r in map(json.loads, lines) if (r["file"], r["bytes"]) == ("two.mp4", size))
    assert new["segments"][0][2] == pytest.approx([1.5, 4.5], abs=0.01)
    args = arguments("--data", data, "--moments", m)
    assert len(replai.SegmentIndex(args, replai.scan(args)).peaks) == 3


def test_a_cut_off_line_of_the_cache_is_done_again(painted, tmp_path):
    data, m = painted.data, tmp_path / "cache"
    shutil.copy(data / "one.mp4", data / "two.mp4")
    assert moments_of(data, tmp_path, m).code == 0
    whole = (m / "moments.jsonl").read_text()
    (m / "moments.jsonl").unlink()                            # as a killed process leaves it
    part = m / "moments.part-elsewhere-1-0.jsonl"
    part.write_text(whole[:-20])
    os.utime(part, (time.time() - 7200,) * 2)                 # long dead
    assert moments_of(data, tmp_path, m).code == 0
    assert (m / "moments.jsonl").read_text() == whole
    assert [p.name for p in m.iterdir()] == ["moments.jsonl"]


def test_a_file_that_could_not_be_read_is_tried_again(painted, tmp_path):
    data, m = painted.data, tmp_path / "cache"
    whole = (data / "one.mp4").read_bytes()
    shutil.copy(data / "one.mp4", data / "two.mp4")
    (data / "two.mp4").write_bytes(bytes(len(whole)))
    assert "1 files cannot be read" in moments_of(data, tmp_path, m).out
    (data / "two.mp4").write_bytes(whole)
    r = moments_of(data, tmp_path, m)
    assert r.code == 0 and "cannot be read" not in r.out
    assert len((m / "moments.jsonl").read_text().splitlines()) == 2


def test_files_of_the_user_in_the_run_folder_are_left_alone(painted, tmp_path):
    out = tmp_path / "moments"
    (out / "a.tmpd").mkdir(parents=True)
    for name in ("thesis.tmp.txt", "last.pt.tmp1", "notes.tmp77"):
        (out / name).write_text("mine")
    r = quick(tmp_path / "q", *SMALL, "--stage", "moments", "--data", painted.data, "--moments",
              tmp_path / "cache", "--out", out)
    assert r.code == 0, r
    left = {p.name for p in out.iterdir()}
    assert {"thesis.tmp.txt", "notes.tmp77", "a.tmpd"} <= left and "last.pt.tmp1" not in left


def test_two_processes_write_the_same_cache_as_one(ego4d, cache, tmp_path):
    assert moments_of(ego4d, tmp_path, tmp_path / "cache", n=2).code == 0
    assert contents(tmp_path / "cache") == contents(cache)
