"""Parity with the original code: every case of every fixture is a test `<file stem>/<case id>`.

The fixtures, `parity/*.json`, hold what the original code computed from weights and inputs that
`recipe.py` rebuilds from names. `PARITY_DIR=folder` runs the same adapters on other files of that
form. parity_<script>.py holds the adapters of a script. That with the longest name that the case's
id begins with is taken; all else, sizes, temperatures, rates and draws, comes from the case.
"""

import importlib
import json
import math
import re
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from parity_tools import FOLDER, NUMBER, Case, Tensorised, recipe

SCRIPTS = ["cpctrans", "f2c_oops", "replai", "ssdet_coarsefine"]
DIGEST = {"shape", "first", "mean", "std", "norm"}            # and a `probe`, in some files
SUMMED = 1e-13                       # statistics are sums of doubles, in whatever order
BOUND = rf"(?:rtol {NUMBER})?(?:, )?(?:atol {NUMBER})?"
TABLE = {"rtol", "atol", "atol_std", "norm_rtol", "grads", "exact", "tensor_implementation", "note"}

# Outputs that are deliberately not reproduced: {(script, family): output}.
NOT_REPRODUCED = {
    # The released decoder drops the partial first codec frame and then as many samples again. Ours
    # is exact to the sample, as `recommended_first_last_length` checks.
    ("replai", "audio_window"): "first_last_length",
    # The release rounds times down to frames, and fails at 16, 32, ... frames a second.
    ("f2c_oops", "clip_frames"): "frames_read_by_original",
    ("f2c_oops", "anticipation_labels"): "original",
    # The case does not tell the video's actions; labels are compared in frame_labels.
    ("ssdet_coarsefine", "charades_sampling"): "label_sum_fine_train"}


# ---- tolerances ----------------------------------------------------------------------------------

class Bound(NamedTuple):
    """How far one output may be off."""
    rtol: float = 0.0
    atol: float = 0.0
    norm_rtol: float | None = None   # of a digest's norm; None: what rtol and atol imply
    atol_std: float | None = None    # if given, the fixture spells out the bound of each statistic
    tensor: str = ""                 # the bound on an image transform of tensors, in words


def parse_tolerance(text):
    """([(subjects or None for all, rtol, atol)], rtol of the norm of gradients or None).

    ValueError for words it does not know.
    """
    norm = re.search(rf" ?\(gradients: compare norm with rtol {NUMBER}\)", text)
    rest = text.replace(norm[0], "") if norm else text
    for remark in re.findall(r" ?\([^)]*\)", rest):           # "(float32)", not "(atol 5 for ...)"
        if not re.search(r"tol|equal|exact|compare|except|only", remark):
            rest = rest.replace(remark, "")
    clauses = []
    for clause in rest.split("; "):
        if re.fullmatch(rf"(rtol|atol) {NUMBER} on \w+(, {NUMBER} on \w+)*", clause):
            clauses += [({subject}, *((float(x), 0.0) if clause[0] == "r" else (0.0, float(x))))
                        for x, subject in re.findall(rf"{NUMBER} on (\w+)", clause)]
            continue
        clause = f"atol {clause}" if re.fullmatch(NUMBER, clause) else clause
        m = re.fullmatch(rf"(?:([\w/, -]+?) )??(?:exact|equal|{BOUND})", clause)
        if not m or not clause or "tol" in (m[1] or ""):
            raise ValueError(f"tolerance {text!r}: cannot read {clause!r}")
        subjects = set(re.split(r"/| and |, ", m[1])) if m[1] else None
        clauses.append((subjects, float(m[2] or 0), float(m[3] or 0)))
    return clauses, float(norm[1]) if norm else None


def names(subject, output, state):
    """Whether a word of a tolerance means this output."""
    if subject == "weights":
        return output in state
    letters = re.sub(r"[^a-z]", "", subject.lower()).removesuffix("es").removesuffix("s")
    return letters in re.sub(r"[^a-z]", "", output.lower())


def bounds(tolerance, output, state=()):
    """The Bound of an output, from words, where an output that no clause names takes the first, or
    from a table. It may have `atol_<output>`; rtol and atol hold for statistics that it leaves out.
    """
    gradient = output.startswith("grad:")
    if isinstance(tolerance, str):
        clauses, of_gradients = parse_tolerance(tolerance)
        named = [c for c in clauses if c[0] is None or any(names(s, output, state) for s in c[0])]
        return Bound(*(named or clauses)[0][1:], of_gradients if gradient else None)
    table = {{"abs": "atol", "rel": "rtol"}.get(k, k): v for k, v in tolerance.items()}
    own = {k: v for k, v in table.items() if k.startswith("atol_") and k not in TABLE}
    if unknown := set(table) - set(own) - TABLE:
        raise ValueError(f"tolerance: cannot read {unknown}")
    if f"atol_{output}" in own:
        table["atol"] = own[f"atol_{output}"]
    if not {"atol_std", "norm_rtol", "grads"} & set(table):
        table["norm_rtol"] = table.get("rtol", 0)
    values = table.get("grads", table) if gradient else table
    return Bound(*(float(values.get(k, 0)) for k in ("rtol", "atol", "norm_rtol", "atol_std")),
                 table.get("tensor_implementation", ""))


# ---- comparison ----------------------------------------------------------------------------------

def is_digest(x):
    return isinstance(x, dict) and set(x) - {"probe"} == DIGEST


def digest(x):
    return x if is_digest(x) else recipe.digest(
        x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x)


def rms(want):
    """Root mean square of the values behind a digest."""
    return want["norm"] / math.sqrt(max(1, math.prod(want["shape"])))


def off(got, want, slack, at):
    """[what is wrong, in words] with a number."""
    return [] if abs(got - want) <= slack else [
        f"{at}: {got!r}, the original {want!r}, allowed {slack:.3g}"]


def compare(got, want, bound, name, others=()):
    """`faults`. others: the output for inputs and weights moved by up to a millionth.

    Batch norm over two values is almost a sign, gradients of ReLU and max-pooling jump: rounding
    moves the original as far as ours. So a value may be off by three times the furthest that one of
    the array moves, a statistic by three times what these moves do to it. A warning names it.
    """
    if isinstance(got, Tensorised):
        return tensor_faults(got, want, bound, name)
    bad = faults(got, want, bound, name)
    if not (bad and others and is_digest(want)):
        return bad
    x, *moved = (torch.as_tensor(v).detach().double() for v in (got, *others))
    moved = 3 * (torch.stack(moved) - x).abs().amax(0)
    warnings.warn(f"{name}: held to three times what rounding may do, {moved.max():.2g}",
                  stacklevel=1)
    return digest_faults(got, want, bound, name, moved)


def tensor_faults(got, want, bound, name):
    """As `faults`, for the bound on tensor implementations of Pillow's transforms: on the mean
    absolute difference of the digest's values and statistics, a share of the range of grey levels.
    """
    if not bound.tensor:
        return faults(got.value, want, bound, name)
    words = re.fullmatch(r"mean absolute difference below (\d+)/(\d+) \((\d+)/(\d+) after hue\)",
                         bound.tensor)
    part, of = map(int, words.groups()[2:] if got.hue else words.groups()[:2])
    unit, ours = torch.as_tensor(got.unit, dtype=torch.float64), digest(got.value)
    if ours["shape"] != want["shape"]:
        return [f"{name}.shape: {ours['shape']}, the original {want['shape']}"]
    allowed = unit.expand(ours["shape"]) * part / of
    far = np.abs(np.subtract(ours["first"], want["first"])) / allowed.flatten()[:32].numpy()
    bad = [] if far.mean() < 1 else [f"{name}.first: {far.mean():.3g} times the mean bound off"]
    slack, _ = slack_of(want, Bound(atol=allowed.mean().item()))
    return bad + [f for k, s in slack.items() for f in off(ours[k], want[k], s, f"{name}.{k}")]


def slack_of(want, bound):
    """{statistic: how far that of a digest may be off}, and the bound on single values: as spelled
    out, else errors of at most atol + rtol·|x_i| move mean and std by at most atol + rtol·rms(x),
    the norm by √n times it.
    """
    rtol, atol, norm_rtol, atol_std, _ = bound
    typical = atol + rtol * rms(want)
    if atol_std is not None:
        each = Bound(rtol, atol + atol_std * want["std"])
        return {"mean": each.atol + max(rtol * abs(want["mean"]), SUMMED * rms(want)), **{
            k: atol + max(norm_rtol, SUMMED) * abs(want[k]) for k in ("std", "norm")}}, each
    norm = norm_rtol * want["norm"] if norm_rtol else (
        math.sqrt(max(1, math.prod(want["shape"]))) * typical)
    return {"mean": typical, "std": typical, "norm": norm}, Bound(rtol, atol)


def digest_faults(got, want, bound, at, moved=0.0):
    """As `faults`, of an array and a digest. moved: what values may be off beside the bound. The
    probe, a sum of the values times fixed random numbers, sees values in another order. Off as they
    may be, it is off by about as much as the norm.
    """
    ours, (slack, each), moved = digest(got), slack_of(want, bound), torch.as_tensor(moved)
    each = each._replace(atol=each.atol + float(moved.max()))
    more = {"mean": rms(digest(moved)), "std": rms(digest(moved)), "norm": digest(moved)["norm"]}
    slack = {k: s + more[k] for k, s in slack.items()}
    bad = faults(ours["shape"], want["shape"], Bound(), f"{at}.shape")
    bad += faults(ours["first"], want["first"], each, f"{at}.first")
    if "probe" in want and not bad:
        x = torch.as_tensor(got).detach().cpu().double().flatten().numpy()
        probe = float((x * recipe.values("probe", [x.size])).sum())
        spread = math.sqrt(x.size) * (each.atol + each.rtol * rms(want))
        bad += off(probe, want["probe"], 4 * spread, f"{at}.probe")
    return bad + [f for k, s in slack.items() for f in off(ours[k], want[k], s, f"{at}.{k}")]


def faults(got, want, bound, at=""):
    """Every place where `got` is not `want`, in words."""
    if is_digest(want):
        return digest_faults(got, want, bound, at)
    if isinstance(want, dict):
        missing = [f"{at}.{k}: missing" for k in want if k not in got]
        return missing + [f for k in want if k in got
                          for f in faults(got[k], want[k], bound, f"{at}.{k}")]
    if isinstance(got, (np.ndarray, torch.Tensor)):
        got = got.tolist()
    if isinstance(want, list):
        size = len(got) if isinstance(got, (list, tuple)) else "no list"
        if size != len(want):
            return [f"{at}: {size} entries, the original {len(want)}"]
        return [f for i, (a, b) in enumerate(zip(got, want))
                for f in faults(a, b, bound, f"{at}[{i}]")]
    if isinstance(want, (str, bool, type(None))) or got is None:
        return [] if got == want else [f"{at}: {got!r}, the original {want!r}"]
    return off(got, want, bound.atol + bound.rtol * abs(want), at)


# ---- tests ---------------------------------------------------------------------------------------

def family_of(id, families):
    """The longest family that the id begins with, ending at a dot, an underscore or its end.

    # in a family's name stands for any number, _ for a dot too.
    """
    fitting = [f for f in families if re.match(
        f.replace("#", r"\d+").replace("_", "[._]") + r"(?=[._]|$)", id)]
    return max(fitting, key=len, default=None)


def read_cases():
    params = []
    for path in sorted(FOLDER.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(file["cases"], dict):                   # {id: case}
            file["cases"] = [{"id": k, **c} for k, c in file["cases"].items()]
        params += [pytest.param(path.stem, file, c, id=f"{path.stem}/{c['id']}")
                   for c in file["cases"]]
    return params


@pytest.mark.parametrize("stem, file, case", read_cases())
def test_matches_the_original(stem, file, case, tmp_path):
    script = family_of(stem, SCRIPTS)
    assert script, f"{stem}.json: no script of that name among {SCRIPTS}"
    adapters = importlib.import_module(f"parity_{script}").ADAPTERS    # fails these cases alone
    family = family_of(case["id"], adapters)
    assert family, f"{stem}/{case['id']}: no adapter for this family"
    want = {k: v["exact"] if isinstance(v, dict) and set(v) == {"exact"} else v
            for k, v in case["outputs"].items() if k != NOT_REPRODUCED.get((script, family))}
    assert want, f"{stem}/{case['id']}: names no output that could be compared"

    def run(shaken=None):
        torch.manual_seed(0)
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        return adapters[family](Case(file, case, folder, shaken))

    def differences(*others):
        bad = [f"{k}: the adapter does not produce it" for k in want if k not in got]
        for k in want.keys() & got.keys():
            bound = bounds(case["tolerance"], k, Case(file, case).entries())
            bad += compare(got[k], want[k], bound, k, [other[k] for other in others])
        return bad

    got = run()
    bad = differences() and differences(*(run(np.random.default_rng(k)) for k in range(4)))
    text = "\n".join([f"{len(bad)} differences, tolerance {case['tolerance']!r}:", *bad[:20]])
    assert not bad, text


def test_there_are_cases():
    assert read_cases(), f"no *.json in {FOLDER}"


@pytest.mark.parametrize("text, output, expected", [
    ("exact", "x", (0, 0)), ("equal", "x", (0, 0)), ("1e-6", "x", (0, 1e-6)),
    ("rtol 1e-4, atol 1e-5 (float32)", "x", (1e-4, 1e-5)), ("rtol 1e-9", "x", (1e-9, 0)),
    ("atol 0.02 (one grey level is 0.0175)", "x", (0, 0.02)),
    ("rtol 5e-3 on losses, 1e-3 on weights", "losses", (5e-3, 0)),
    ("rtol 5e-3 on losses, 1e-3 on weights", "bn.running_mean", (1e-3, 0)),
    ("bins equal; prominences and z-score rtol 1e-3", "all_peak_bins", (0, 0)),
    ("bins equal; prominences and z-score rtol 1e-3", "zscore_mean_over_frequency", (1e-3, 0)),
    ("resampled/log/normalised atol 2e-4; mel_power rtol 1e-3", "mel_power", (1e-3, 0)),
    ("resampled/log/normalised atol 2e-4; mel_power rtol 1e-3", "normalised", (0, 2e-4)),
    *((text, "x", None) for text in ("", "close", "rtol about 1e-3", "within 2 %",
                                     "rtol 1e-3 or so", "rtol 1e-3 atol 1e-5",
                                     "rtol 1e-3 (atol 5 for the last)"))])
def test_tolerances_are_read_from_their_words_and_unknown_ones_refused(text, output, expected):
    with pytest.raises(ValueError, match="cannot read") if not expected else nullcontext():
        assert bounds(text, output, {"bn.running_mean": 0})[:2] == expected


def test_a_table_of_tolerances_is_held_to_what_it_says():
    table = {"rtol": 0.1, "atol": 1, "atol_std": 0.5, "norm_rtol": 0.2, "grads": {"rtol": 0.3}}
    assert bounds(table, "score") == (0.1, 1, 0.2, 0.5, "")
    assert bounds(table, "grad:a") == (0.3, 0, 0, 0, "")
    want = {"shape": [2], "first": [10.0, 20.0], "mean": 15.0, "std": 5.0, "norm": 22.4}
    slack, each = slack_of(want, bounds(table, "score"))
    assert slack == {"mean": 3.5 + 1.5, "std": 1 + 1, "norm": pytest.approx(1 + 4.48)}
    assert each == (0.1, 3.5, None, None, "")
    assert bounds({"rel": 0.1, "abs": 1}, "score") == (0.1, 1, 0.1, 0, "")
    table = {"exact": True, "atol_times": 1e-9}
    assert [bounds(table, k)[:2] for k in ("frames", "times")] == [(0, 0), (0, 1e-9)]
    with pytest.raises(ValueError, match="cannot read"):
        bounds({"rtol": 0.1, "about": 1}, "score")


def test_a_probe_sees_two_values_that_changed_places():
    x, bound = np.arange(100) / 100, Bound(1e-6, 1e-6, 1e-6, 0.0)
    want = {**digest(x), "probe": float((x * recipe.values("probe", [x.size])).sum())}
    assert not compare(torch.from_numpy(x), want, bound, "x")
    x[[60, 90]] = x[[90, 60]]
    assert [f[:8] for f in compare(x, want, bound, "x")] == ["x.probe:"]


def test_three_times_what_rounding_may_do_is_allowed_beside_the_bound():
    x, bound = torch.tensor([1.0, 2.0]), Bound(atol=0.1)
    want = digest(x + 0.5)
    with warnings.catch_warnings(action="ignore"):
        assert compare(x, want, bound, "x") and compare(x, want, bound, "x", [x, x - 0.1])
        assert not compare(x, want, bound, "x", [x, x - 0.2])
