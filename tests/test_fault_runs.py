"""SIGTERM, what a killed process leaves, and who tells of a failure: piece by piece."""

import os
import signal
import time

import faults
import pytest
import torch

import common


def log_of(tmp_path, steps):
    args = common.Parser("", ["a"], ["b"])
    args.add_run_flags()
    return common.Log(args.parse_args(["--out", str(tmp_path)]), 0, steps, steps)


def test_the_step_in_which_sigterm_comes_is_the_last(tmp_path, capsys):
    log, seen, before = log_of(tmp_path, 9), [], signal.getsignal(signal.SIGTERM)
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad, optimizer = torch.ones(1), torch.optim.SGD([weight])
    with pytest.MonkeyPatch.context() as m, pytest.raises(common.Stopped):
        m.setattr(common, "_asked", 0.0)
        for step, _ in log.steps([{}] * 9):
            os.kill(os.getpid(), signal.SIGTERM if step == 3 else 0)
            log.guard(step, optimizer, loss=torch.ones(()))
            seen.append(log.stopping)
    assert seen == [False] * 3 + [True]
    assert capsys.readouterr().out == ("stopped by SIGTERM after step 4 of 9, checkpoint written; "
                                       "the same command continues from it\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_sigterm_ends_at_once_unless_it_is_a_copy(monkeypatch):
    ended, clock = [], iter((100.0, 104.0, 106.0))
    monkeypatch.setattr(common, "_asked", 0.0)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    common._ask()
    assert common._asked == 100.0 and not ended
    common._ask()                                             # torchrun's, of the same SIGTERM
    assert not ended
    common._ask()
    assert ended == [143]


def test_litter_of_others_stays_while_it_is_young(tmp_path):
    names = {f"{n}.tmp7" for n in ("a.csv", "b.txt", "c.json", "d.jsonl", "e.pt")}
    for name in {*names, "f.doc.tmp7", "g.csv.tmpx"}:
        (tmp_path / name).touch()
    common.remove_stale(tmp_path, age=3600)
    assert names <= {f.name for f in tmp_path.iterdir()}
    os.utime(tmp_path / "c.json.tmp7", (1, 1))
    common.remove_stale(tmp_path, "c.json", age=3600)
    assert names - {f.name for f in tmp_path.iterdir()} == {"c.json.tmp7"}
    common.remove_stale(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"f.doc.tmp7", "g.csv.tmpx"}


def test_a_process_that_only_lost_another_says_so_in_one_line():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed\n by peer")
    assert common._in_words(lost, True) == (
        "error: process 0 cannot go on without the others, one of which tells why: "
        "[gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    assert common._in_words(common.UserError("a.mp4: broken"), False) == "error: a.mp4: broken"
    assert common._in_words(OSError(2, "No such file", "x"), False) == "error: x: No such file"


def test_a_lane_that_ends_without_figures_is_a_promise_broken(tmp_path, capfd):
    stale = tmp_path / "lane0" / "faults.json"                # of an earlier run in this folder
    stale.parent.mkdir()
    stale.write_text('{"rows": [{"part": "x", "promise": "y", "figures": {}, "failed": []}]}')
    (part, row), = faults.side_by_side([["no such part"]], tmp_path, 0)
    assert part == "no such part" and "ended with 2" in row.failed[0]
    assert "choose of" in capfd.readouterr().err
