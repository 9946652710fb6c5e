"""Runs that are killed, told to stop or robbed of a process: see fault_runs.py."""

import os
import signal
import time

import fault_runs
import pytest
import torch

import common


@pytest.fixture(scope="module")
def root(ucf101, oops, kinetics400, charades, tmp_path_factory):
    """Where the parts work, the toy datasets of all tests in it."""
    root = tmp_path_factory.mktemp("faults")
    (root / "data").mkdir()
    for folder in (ucf101, oops, kinetics400, charades):
        (root / "data" / folder.name).symlink_to(folder)
    return root


def rows_of(part, root, seed):
    (root / part).mkdir()
    rows = list(fault_runs.PARTS[part](root / part, seed, False))
    for row in rows:
        print(row.promise, row.figures)
        assert not row.failed, "\n".join(row.failed)
    return rows


def test_runs_killed_at_any_moment_end_in_the_same_bytes(root):
    rows = rows_of("kill", root, int(time.time()))            # other moments in every test run
    assert len(rows) == 4
    for row in rows:
        assert row.figures["kills"] >= 20 and row.figures["in_preparation"] >= 3, row
    assert sum(row.figures["in_checkpoints"] for row in rows) >= 4


def test_sigterm_stops_all_processes_at_one_step_with_its_checkpoint(root):
    rows = rows_of("sigterm", root, 1)
    assert len(rows) == 4 and all(row.figures["stopped"] >= 2 for row in rows), rows


def test_torchrun_of_two_agents_a_killed_worker_and_one_that_fails(root):
    rows = rows_of("torchrun", root, 0)
    assert [list(row.figures) for row in rows] == [
        ["seconds"], ["cases", "worst_s"], ["killed", "worst_recovery_s"]]
    assert 0 < rows[1].figures["worst_s"] < 60 and rows[1].figures["cases"] == 2


# ---- the parts of it -----------------------------------------------------------------------------

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
