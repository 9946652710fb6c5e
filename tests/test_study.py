"""The runner behind `make demo` and `make claims`: order, once only, choice of rates, failures."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import running
import study

STEP = """
import argparse, json, pathlib, sys, time
p = argparse.ArgumentParser()
p.add_argument("--out", type=pathlib.Path)
p.add_argument("--lr", type=float, default=0)
p.add_argument("--fail", action="store_true")
p.add_argument("--after", type=pathlib.Path)
p.add_argument("--test", type=pathlib.Path)
p.add_argument("--world")
p.add_argument("--seed")
a = p.parse_args()
if a.after and not (a.after / "metrics.json").exists():
    sys.exit(f"{a.after} has not ended")
if a.fail:
    print("one line"); sys.exit("error: as asked for")
a.out.mkdir(parents=True, exist_ok=True)
runs = a.out / "runs"
runs.write_text((runs.read_text() if runs.exists() else "") + "x")
found = {"score": -(a.lr - 0.2) ** 2, "lr": a.lr}
if a.test:
    found = {"tested": json.loads((a.test / "metrics.json").read_text())["score"]}
(a.out / "metrics.json").write_text(json.dumps(found | {"world": a.world}))
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan with an `add` for a script that notes how often it ran."""
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setattr(study, "REPO", tmp_path)
    monkeypatch.setattr(study, "CODE", ("step.py",))
    p = study.Plan(tmp_path / "out")
    p.step = lambda name, flags="", seconds=1: p.add(name, "step", name, flags, seconds)
    return p


def ran(plan, name):
    path = plan.out / name / "runs"
    return len(path.read_text()) if path.exists() else 0


def test_steps_run_after_those_they_name_and_only_once(plan, capsys):
    plan.step("a")
    plan.step("x/b", "--after {a}")
    plan.step("c", "--after {x/b}")
    assert study.Runner(plan, 3)() == []
    assert [ran(plan, n) for n in ("a", "x/b", "c")] == [1, 1, 1]
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"\[(\d)/3\] .*(a|x/b|c): took", line).groups() for line in lines] == [
        ("1", "a"), ("2", "x/b"), ("3", "c")]
    assert all(re.search(r", \d+:\d\d left$", line) for line in lines[:-1])
    assert study.Runner(plan, 1)() == []
    assert capsys.readouterr().out.count("done before") == 3
    assert [ran(plan, n) for n in ("a", "x/b", "c")] == [1, 1, 1]


def test_what_other_code_or_flags_made_is_made_anew(plan, tmp_path):
    plan.step("a")
    study.Runner(plan, 1)()
    plan.step("a", "--lr 1")
    study.Runner(plan, 1)()
    assert ran(plan, "a") == 1 and plan.metrics("a")["lr"] == 1          # in an empty folder
    (tmp_path / "step.py").write_text(STEP.replace('"x"', '"xx"'))
    study.Runner(plan, 1)()
    assert ran(plan, "a") == 2


def test_what_was_made_of_something_else_is_made_anew(plan, capsys):
    plan.step("a", "--lr 1")
    plan.step("b", "--test {a}")
    plan.step("c", "--after {b}")
    plan.step("d")
    study.Runner(plan, 1)()
    assert plan.metrics("b")["tested"] == pytest.approx(-0.64)
    plan.step("a", "--lr 2")                                  # the words of b and c are the same
    capsys.readouterr()
    study.Runner(plan, 1)()
    assert plan.metrics("b")["tested"] == pytest.approx(-3.24)
    assert re.findall(r"(\w): done before", capsys.readouterr().out) == ["d"]


def test_figures_of_an_earlier_run_are_not_those_of_a_step_that_failed(plan):
    plan.step("a")
    plan.step("b", "--after {a}")
    assert study.Runner(plan, 1)() == [] and plan.metrics("b")
    plan.step("a", "--fail")
    assert study.Runner(plan, 1)() == ["a", "b"]
    assert plan.metrics("a") == plan.metrics("b") == {}


def test_a_rate_without_a_score_is_not_chosen(plan):
    for name, score in (("a", None), ("b", -3.0), ("c", -4.0)):
        (plan.out / name).mkdir(parents=True)
        (plan.out / name / "metrics.json").write_text(json.dumps({"score": score}))
    plan.rates["p"] = {rate: (["score"], rate) for rate in "abc"}
    plan.rates["q"] = {"a": (["score"], "a"), "none": (["score"], "none")}
    assert plan.chosen("p") == "b" and plan.scores("p") == {"b": -3.0, "c": -4.0}
    assert plan.chosen("q") == "a" and plan.scores("q") == {}


def test_a_folder_of_somebody_else_is_never_removed(plan):
    (plan.out / "a").mkdir(parents=True)
    (plan.out / "a" / "thesis.txt").write_text("x")
    plan.step("a")
    study.Runner(plan, 1)()
    assert (plan.out / "a" / "thesis.txt").exists()


def test_a_step_that_was_stopped_continues_in_its_folder(plan):
    plan.step("a")
    study.Runner(plan, 1)()
    note = plan.out / "a.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items()
                                if k != "seconds"}))
    study.Runner(plan, 1)()
    assert ran(plan, "a") == 2


WAITS = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
def note(number, _):
    (out / signal.Signals(number).name).touch()
    sys.exit(1)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
(out / "ready").touch()
time.sleep(60)
"""
RUNS = """
import pathlib, sys
sys.path[:0] = sys.argv[2:]
import study
study.REPO, study.CODE = pathlib.Path(sys.argv[1]), ("step.py",)
plan = study.Plan(study.REPO / "out")
plan.add("a", "step", "waits", "", 1)
study.Runner(plan, 1)()
"""


def test_ctrl_c_lets_a_step_write_its_checkpoint(tmp_path):
    """The terminal sends SIGINT to all; steps get SIGTERM instead, after which training saves."""
    (tmp_path / "step.py").write_text(WAITS)
    process = subprocess.Popen([sys.executable, "-c", RUNS, tmp_path, running.REPO / "tests",
                                running.REPO], process_group=0, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    folder, began = tmp_path / "out" / "a", time.time()
    while not (folder / "ready").exists():
        assert process.poll() is None and time.time() - began < 60
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) != 0
    assert (folder / "SIGTERM").exists() and not (folder / "SIGINT").exists()


def test_a_failure_is_told_and_stops_only_what_needs_it(plan, capsys):
    plan.step("bad", "--fail")
    plan.step("after", "--after {bad}")
    plan.step("later", "--after {after}")
    plan.step("good")
    assert sorted(study.Runner(plan, 2)()) == ["after", "bad", "later"]
    out = capsys.readouterr().out
    assert "FAILED: error: as asked for" in out and str(plan.out / "bad.log") in out
    assert out.count("not run, an earlier step failed") == 2 and ran(plan, "good") == 1
    assert study.Runner(plan, 2)()                            # and again, not taken for done
    assert ran(plan, "good") == 1


def test_an_unknown_step_is_an_error_before_anything_runs(plan):
    with pytest.raises(KeyError, match="a waits for {'b'}"):
        plan.step("a", "--after {b} --out {a}")


def test_the_longest_chain_comes_first(plan, capsys):
    plan.step("short", seconds=5)
    plan.step("first", seconds=1)
    plan.step("second", "--after {first}", seconds=7)
    assert plan.lengths() == {"short": 5, "first": 8, "second": 7}
    study.Runner(plan, 1)()
    assert re.findall(r"(\w+): took", capsys.readouterr().out) == ["first", "second", "short"]


@pytest.mark.parametrize("key, test", [("score", ""), ("tested", "--test {JOB} --world WORLD")])
def test_the_rate_with_the_best_score_is_chosen_for_each_seed(plan, key, test):
    plan.step("a")
    study.sides(plan, "step", "p", "--world WORLD", [4, 5], ("0.1", "0.3", "0.25"),
                {"one": "", "two": "--after {a}"}, [key], 1, test)
    plan.step("best", "--after {best:p/one}")
    assert study.Runner(plan, 2)() == []
    assert plan.words("best")[2] == str(plan.out / "p/one_rate_0.25")
    for side in ("p/one", "p/two"):
        assert plan.chosen(side) == "0.25"
        assert {r: round(x, 4) for r, x in plan.scores(side).items()} == {
            "0.1": -0.01, "0.3": -0.01, "0.25": -0.0025}
        assert [plan.metrics(f"{side}_{s}")["lr"] for s in (4, 5)] == [0.25, 0.25]
        assert not {f"{side}_4", f"{side}_5"} & plan.before(f"{side}_rate_0.1")
        for end in ("", "_test") if test else ("",):
            assert [plan.metrics(f"{side}_{x}{end}")["world"] for x in ("rate_0.1", 4)] == [
                "other", "toy"]


def test_the_rate_is_never_chosen_on_what_the_table_shows():
    plan, found = study.claims("out", [3, 4])
    shown = {f"{side}_{s}{'_test' * c.tested}" for c in found for side in (c.better, c.other)
             for s in plan.seeds[side]}
    assert shown <= plan.jobs.keys()
    for side, rates in plan.rates.items():
        assert len(rates) >= 3
        for _, job in rates.values():
            flags = plan.jobs[job].flags
            assert job not in shown and "{other/" in flags and "{toy/" not in flags
        assert rates.keys() == next(r.keys() for s, r in plan.rates.items()
                                    if s.rpartition("/")[0] == side.rpartition("/")[0])
    for side in {s for c in found for s in (c.better, c.other)}:
        twice = side in ("ssdet/fine/ssdet", "ssdet/fine/classify")
        assert plan.seeds[side] == ([3, 4, 5, 6] if twice else [3, 4])
        for s in plan.seeds[side]:
            assert f"--seed {s}" in plan.jobs[f"{side}_{s}"].flags
            assert f"{{rate:{side}}}" in plan.jobs[f"{side}_{s}"].flags


@pytest.mark.parametrize("what", ["demo", "claims"])
def test_every_command_line_is_understood(what, capsys):
    """By the script's own parser; and no two steps share a folder."""
    study.main([what, "--list", *(["--seeds", "5", "6"] if what == "claims" else [])])
    lines = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    outs = [line[line.index("--out") + 1] + line[1] * line[0].endswith("toy.py") for line in lines]
    assert len(lines) > 25 and len(set(outs)) == len(outs)
    for script, *flags in lines:
        if not script.endswith("toy.py"):
            module = getattr(running, script.removesuffix(".py"))
            module.parse_args([w.replace("RATE", "0.1") for w in flags])


def test_the_claims_are_those_that_the_papers_make():
    _, found = study.claims("out", [0])
    assert sum(c.main for c in found) == 4
    pairs = {(c.better.split("/")[-1], c.other.split("/")[-1]) for c in found}
    assert pairs >= {("cpc", "scratch"), ("replai", "scratch"), ("replai", "no_moi"),
                     ("replai", "no_astc"), ("f2c", "scratch"), ("f2c2v", "f2c"),
                     ("ssdet", "classify"), ("ssdet", "scratch")}
    assert {c.key for c in found if c.paper == "RepLAI"} == {"verb@1", "noun@1"}


def test_mean_and_standard_error():
    rng = np.random.default_rng(0)
    for n in (2, 3, 7):
        x = rng.normal(size=n)
        mean, error = study.spread(list(x))
        assert math.isclose(mean, x.sum() / n)
        assert math.isclose(error, math.sqrt(((x - x.sum() / n) ** 2).sum() / (n - 1) / n))
    assert math.isnan(study.spread([1.0])[1])
    assert study.verdict([3.0, 3.2, 3.1], [1.0, 1.2, 1.1])[2] == "holds"
    assert study.verdict([1.0, 1.2, 1.1], [3.0, 3.2, 3.1])[2] == "does not hold"
    assert study.verdict([1.0, 3.0], [1.0, 2.0])[2] == "not clear"
    assert study.verdict([1.0], [0.0])[2] == "not clear"
    gain, error, _ = study.verdict([1.0, 3.0], [0.0, 1.0])
    assert gain == 1.5 and math.isclose(error, math.sqrt(1 + 0.25))


def test_the_tables_say_what_is_missing(plan):
    plan.step("a", "--lr 0.5")
    plan.step("a_0", "--lr 0.5")
    study.Runner(plan, 1)()
    figures = [study.Figure("P", "s", "m", "lr", "a", "b", "score"),
               study.Figure("P", "s", "m", "lr", "b", None, 3.0)]
    text, rows = study.demo_table(plan, figures)
    assert [r["trained"] for r in rows] == [0.5, None] and text.count("failed") == 2
    assert rows[0]["blind"] == pytest.approx(-0.09) and rows[1]["blind"] == 3.0
    plan.seeds |= {"a": [0], "b": [0, 1]}
    text, rows = study.claims_table(plan, [study.Claim("P", "w", "lr", "a", "b", "1 | 0")])
    assert "failed" in text and "verdict" not in rows[0]
    assert rows[0]["values"] == [[0.5], [None, None]] and rows[0]["seeds"] == [[0], [0, 1]]


def test_a_run_ends_with_its_table_its_rates_and_results(plan, monkeypatch, capsys):
    def claims(out, seeds, only):
        study.sides(plan, "step", "p", "", seeds, ("0.1", "0.25"), {"one": "", "two": ""},
                    ["score"], 1)
        return plan, [study.Claim("P", "one vs two", "lr", "p/one", "p/two", "3 vs 2", main=True)]
    monkeypatch.setattr(study, "claims", claims)
    words = ["claims", "--seeds", "4", "5", "--out", str(plan.out)]
    assert study.main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| P +\| one vs two \* \| 3 vs 2 +\|", out)
    assert "rate of p/one: 0.25 (of 0.1: -0.01, 0.25: -0.0025)" in out
    found = json.loads((plan.out / "results.json").read_text())
    assert found["seeds"] == [4, 5] and found["steps"] == found["steps_run_now"] == 8
    assert found["rows"][0]["values"] == [[0.25, 0.25]] * 2 and found["failed"] == []
    assert found["rates"]["p/two"]["chosen"] == "0.25"
    assert study.main(words) == 0 and "8 steps" in capsys.readouterr().out
    assert json.loads((plan.out / "results.json").read_text())["steps_run_now"] == 0


@pytest.mark.parametrize("flags", ["claims --seeds 1 1", "demo --lanes 0", "nothing",
                                   "claims --only tests/toy", "demo --seed -1", "demo --seeds 1 2",
                                   "demo --only replai", "claims --seed 1",
                                   "claims --pictures x"])
def test_wrong_flags(flags):
    with pytest.raises(SystemExit) as e:
        study.main(flags.split())
    assert e.value.code == 2
