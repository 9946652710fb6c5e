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
@pytest.mark.parametrize("hz", [100, 1000, 2500])           # the filter passes up to 0.6 Nyquist
def test_resampling_keeps_a_sine(old, new, hz):
    n = 12347
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
