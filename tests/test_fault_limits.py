"""Disks that are full, and numbers that are none: piece by piece."""

import argparse
import errno
import importlib
import json
import math
import os
from functools import partial

import fault_limits
import numpy as np
import pytest
import running
import torch
import toy

import common
from common import UserError, VideoError

SCRIPTS = ("replai", "f2c_oops", "cpctrans", "ssdet_coarsefine")


def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    def full(f, kind):
        f.write(b"half")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise e if kind is OSError else kind("unexpected pos 704 vs 598") from None
    (tmp_path / "a.pt").write_text("before")
    for kind in (OSError, RuntimeError):                      # the latter: torch.save
        with pytest.raises(UserError, match=r"a\.pt: could not be written \(No space left on dev"):
            common.write(tmp_path / "a.pt", partial(full, kind=kind))
        assert [f.name for f in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").read_text() == "before"

    def wrong(f):
        raise RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        common.write(tmp_path / "b.pt", wrong)


def small(tmp_path):
    """(arguments, model, optimizer, Log) of a run of four steps."""
    args = argparse.Namespace(out=tmp_path, stage="s", batch_size=2, log_every=1)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return args, model, optimizer, common.Log(args, 0, 4, 2)


def test_the_guard_names_the_part_or_the_gradient(tmp_path):
    args, model, optimizer, log = small(tmp_path)
    model(torch.ones(1, 3)).sum().backward()
    norm = log.guard(0, optimizer, a=torch.tensor(1.0), b=torch.tensor(2.0))
    assert float(norm) == pytest.approx(math.sqrt(8))         # six weights and two biases of 1
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=f"^step 3: b is {bad};"):
            log.guard(3, optimizer, a=torch.tensor(1.0), b=torch.tensor(bad))
        model.bias.grad[1] = bad
        with pytest.raises(UserError, match="^step 5: gradient is (nan|inf);"):
            log.guard(5, optimizer, a=torch.tensor(1.0))
        model.bias.grad[1] = 1


@pytest.mark.parametrize("where", ["model.weight", "optimizer.state.0.momentum_buffer"])
def test_a_state_with_nan_is_never_saved(where, tmp_path):
    args, model, optimizer, log = small(tmp_path)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    common.save(tmp_path / "last.pt", 1, args, model=model, optimizer=optimizer)
    before = (tmp_path / "last.pt").read_bytes()
    state = model.weight.data if where == "model.weight" else optimizer.state[model.weight][
        "momentum_buffer"]
    state[1, 2] = math.nan
    with pytest.raises(UserError, match=f"^step 1: {where} is nan or inf after the update"):
        common.save(tmp_path / "last.pt", 2, args, model=model, optimizer=optimizer)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_the_log_stays_json_where_a_metric_is_not_defined(tmp_path):
    log = small(tmp_path)[-1]
    log(0, loss=torch.tensor(1.5), wAP=math.nan)
    row = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["loss"] == 1.5 and row["wAP"] is None


def test_outputs_that_are_not_finite_are_not_scored():
    args = argparse.Namespace(workers=0, precision="fp32")
    data = [torch.tensor([float(k)]) for k in range(20)]
    with pytest.raises(UserError, match="^val: the network's output is not finite"):
        common.predict(args, torch.device("cpu"), data, lambda _, x: [1 / (x - 13)], "val")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sound_of_nan_is_a_fault_of_its_file(bad, tmp_path):
    sound = np.zeros((1, 32000), np.float32)
    sound[0, 20000] = bad
    path = tmp_path / "a.mov"
    toy.write_video(path, (fault_limits.picture(0, t) for t in range(20)), 10, sound, 16000,
                    audio_codec="pcm_f32le")
    with pytest.raises(VideoError, match=r"a\.mov: its sound holds NaN or Inf"):
        common.read_audio(path)
    assert common.read_audio(path, 0, 1)[0].shape == (1, 16000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has bf16")
@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_on_the_cpu_is_refused_with_the_reason(script, capsys):
    with pytest.raises(SystemExit) as e:
        importlib.import_module(script).parse_args(["--precision", "bf16"])
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 1 and "uninitialised gradients" in lines[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; not yet run")
@pytest.mark.parametrize("name", ["replai_pretrain", "cpctrans_pretrain", "f2c_f2c",
                                  "ssdet_pretrain"])
def test_bf16_stays_near_fp32_over_fifty_steps(name, folder, tmp_path):
    """Mean losses of the last ten of 50 steps differ by less than 5 % of the larger: bfloat16 keeps
    8 bits, so one rounding is up to 0.4 %; the losses themselves are in float32.
    """
    root, losses = fault_limits.trained(folder), {}
    for precision in ("fp32", "bf16"):
        case = fault_limits.case(root, name, tmp_path / precision)
        flags = [*case["flags"], "--epochs", 50, "--precision", precision]
        r = running.command(*flags, script=case["script"], timeout=600)
        assert r.code == 0, r
        rows = (tmp_path / precision / "log.jsonl").read_text().splitlines()
        assert len(rows) >= 50
        losses[precision] = np.mean([json.loads(row)["loss"] for row in rows[40:50]])
    assert abs(losses["bf16"] - losses["fp32"]) < 0.05 * max(map(abs, losses.values()))
