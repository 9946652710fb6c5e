"""Parity with the original code: every case of every fixture is a test `<file stem>/<case id>`.

The fixtures, `parity/*.json`, hold what the original code computed from weights and inputs that
`recipe.py` rebuilds from names. `PARITY_DIR=folder` runs the same adapters on other files of that
form. parity_<script>.py holds the adapters of a script. The longest family that the case's id
begins with chooses one; everything else, sizes, temperatures, rates and draws, comes from the case.
"""

import importlib
import json
import math
import re
import warnings
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from parity_tools import FOLDER, NUMBER, Case, Tensorised, Twice, recipe

SCRIPTS = ["cpctrans", "f2c_oops", "replai", "ssdet_coarsefine"]
DIGEST = {"shape", "first", "mean", "std", "norm"}            # and a `probe`, in some files
SUMMED = 1e-13                       # statistics are sums of doubles, in whatever order
BOUND = rf"(?:rtol {NUMBER})?(?:, )?(?:atol {NUMBER})?"

# Outputs that are deliberately not reproduced: {file stem: {family: {output: reason}}}.
NOT_REPRODUCED = {"replai": {"audio_window": {
    "first_last_length": "a fault of the released decoder, which drops the partial first codec "
                         "frame and then as many samples again; replai.audio_window is exact to "
                         "the sample, which `recommended_first_last_length` checks"}},
    "f2c_oops": {
        "clip_frames": {"frames_read_by_original": "a fault of the release, which rounds times "
                        "down to frames, now and then one frame early, and fails at 16, 32, ... "
                        "frames a second; `frames_intended` are read"},
        "anticipation_labels": {"original": "the release fails at 16, 32, ... frames a second; "
                                "`expected` holds the labels of every video"}},
    "ssdet_coarsefine": {"charades_sampling": {
        "label_sum_fine_train": "the case does not tell the video's actions; labels are compared "
                                "in frame_labels"}}}


# ---- tolerances ----------------------------------------------------------------------------------

def parse_tolerance(text):
    """([(subjects or None for all, rtol, atol)], rtol of the norm of gradients or None).

    ValueError for words it does not know.
    """
    norm = re.search(rf"\(gradients: compare norm with rtol {NUMBER}\)", text)
    rest = text.replace(norm[0], "") if norm else text
    for remark in re.findall(r"\([^)]*\)", rest):
        if re.search(r"tol|equal|exact|compare|except|only", remark):
            raise ValueError(f"tolerance {text!r}: cannot read {remark}")
        rest = rest.replace(remark, "")
    clauses = []
    for clause in (c.strip() for c in rest.split(";")):
        if re.fullmatch(rf"(rtol|atol) {NUMBER} on \w+(, {NUMBER} on \w+)*", clause):
            clauses += [({subject}, *((float(x), 0.0) if clause[0] == "r" else (0.0, float(x))))
                        for x, subject in re.findall(rf"{NUMBER} on (\w+)", clause)]
            continue
        if re.fullmatch(NUMBER, clause):
            clauses.append((None, 0.0, float(clause)))
            continue
        m = re.fullmatch(r"(.*?) ?\b(exact|equal|(?:rtol|atol) [\d.e, rtola-]+)", clause)
        bound = m and (m[2] in ("exact", "equal") or re.fullmatch(BOUND, m[2]))
        if not bound or not re.fullmatch(r"[\w/, -]*", m[1]):
            raise ValueError(f"tolerance {text!r}: cannot read {clause!r}")
        rtol, atol = (0.0, 0.0) if bound is True else (float(b or 0) for b in bound.groups())
        clauses.append((set(re.split(r"/| and |, ", m[1])) if m[1] else None, rtol, atol))
    return clauses, float(norm[1]) if norm else None


def names(subject, output, state):
    """Whether a word of a tolerance means this output."""
    if subject == "weights":
        return output in state
    letters = re.sub(r"[^a-z]", "", subject.lower()).removesuffix("es").removesuffix("s")
    return letters in re.sub(r"[^a-z]", "", output.lower())


class Bound(NamedTuple):
    """How far one output may be off.

    norm_rtol: of a digest's norm, None: what rtol and atol of the values imply. atol_std, where
    not None: the fixture spells out each statistic's bound (its "conventions"). tensor: the bound
    on an image transform made of tensor operations, in words.
    """
    rtol: float = 0.0
    atol: float = 0.0
    norm_rtol: float | None = None
    atol_std: float | None = None
    tensor: str = ""


def bounds(tolerance, output, state=()):
    """The Bound of an output, from words or from a table.

    In words, an output that no clause names takes the first. A table may have an output's own
    atol, `atol_<output>`; where it tells nothing of statistics, rtol and atol hold for each of
    them as for a value.
    """
    gradient = output.startswith("grad:")
    if isinstance(tolerance, dict):
        words = {"abs": "atol", "rel": "rtol"}
        tolerance = {words.get(k, k): v for k, v in tolerance.items()}
        known = {"rtol", "atol", "atol_std", "norm_rtol", "tensor_implementation", "note"}
        own = {k for k in tolerance if k.startswith("atol_")} - known
        unknown = set(tolerance) - known - own - {"grads", "exact"}
        exact = tolerance.get("exact", False)
        if unknown or exact not in (True, False) or exact and {"rtol", "atol"} & set(tolerance):
            raise ValueError(f"tolerance: cannot read {unknown or tolerance}")
        if f"atol_{output}" in own:
            tolerance = {**tolerance, "atol": tolerance[f"atol_{output}"]}
        if not {"atol_std", "norm_rtol", "grads"} & set(tolerance):
            tolerance = {**tolerance, "norm_rtol": tolerance.get("rtol", 0)}
        table = tolerance.get("grads", tolerance) if gradient else tolerance
        numbers = [float(table.get(k, 0)) for k in ("rtol", "atol", "norm_rtol", "atol_std")]
        return Bound(*numbers, tolerance.get("tensor_implementation", ""))
    clauses, of_gradients = parse_tolerance(tolerance)
    named = [c for c in clauses if c[0] is None or any(names(s, output, state) for s in c[0])]
    return Bound(*(named or clauses)[0][1:], of_gradients if gradient else None)


# ---- comparison ----------------------------------------------------------------------------------

def is_digest(x):
    return isinstance(x, dict) and set(x) - {"probe"} == DIGEST


def digest(x):
    return x if is_digest(x) else recipe.digest(
        x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x)


def probe_faults(got, want, slack, at):
    """Of the sum of the array's values times fixed random numbers: what the statistics do not see,
    as values in another order. Off as the values may be, it is off by about `slack`, the norm's.
    """
    x = torch.as_tensor(got).detach().cpu().double().flatten().numpy()
    probe = float((x * recipe.values("probe", [x.size])).sum())
    return [] if abs(probe - want) <= 4 * slack else [
        f"{at}.probe: {probe!r}, the original {want!r}, allowed {4 * slack:.3g}"]


def compare(got, want, bound, name):
    """`faults`; a part of a digest that float32 rounding decides is not held to the bound.

    Batch norm over two values is almost a sign, and the gradient of ReLU and max-pooling jumps:
    there float64 moves our own result by as much as the fixture allows (a quarter of it counts),
    the original's float32 is as far from float64 as ours, and no other implementation can meet it.
    Such values are held to three times the furthest that float64 moves one of the array instead,
    such statistics to 5 %, and a warning names them.
    """
    if isinstance(got, Tensorised):
        return tensor_faults(got, want, bound, name)
    if not isinstance(got, Twice):
        return faults(got, want, bound, name)
    bad = faults(got.single, want, bound, name)
    if not bad or not is_digest(want):
        return bad
    quarter = Bound(*(x and x / 4 for x in bound[:4]))
    ours = faults(got.double, digest(got.single), quarter, name)
    loose = {p for p in ("first", "mean", "std", "norm")
             if any(f.startswith(f"{name}.{p}") for f in ours)}
    if loose:
        warnings.warn(f"{name}: float32 rounding alone moves {', '.join(sorted(loose))} by as "
                      "much as the fixture allows; compared as loosely as that takes", stacklevel=1)
    kept = [f for f in bad if not any(f.startswith(f"{name}.{p}") for p in loose)]
    if "first" in loose:
        single, double = (torch.as_tensor(x).detach().double() for x in got)
        furthest = (single - double).abs().max().item()
        kept += faults(digest(got.single)["first"], want["first"],
                       Bound(bound.rtol, bound.atol + 3 * furthest), f"{name}.first")
    rms = want["norm"] / math.sqrt(max(1, math.prod(want["shape"])))
    scale, ours = {"mean": rms, "std": rms, "norm": want["norm"]}, digest(got.single)
    return kept + [f"{name}.{p}: {ours[p]!r}, the original {want[p]!r}, not even 5 % near"
                   for p in loose & set(scale) if not abs(ours[p] - want[p]) <= 0.05 * scale[p]]


def tensor_faults(got, want, bound, name):
    """As `faults`, for the fixture's bound on tensor implementations of Pillow's transforms.

    It is on the mean absolute difference, a share of the range of grey levels: here of the values
    that the digest keeps, and of its statistics.
    """
    words = re.fullmatch(r"mean absolute difference below (\d+)/(\d+) \((\d+)/(\d+) after hue\)",
                         bound.tensor)
    assert words or not bound.tensor, f"cannot read {bound.tensor!r}"
    if not words:
        return faults(got.value, want, bound, name)
    part, of = map(int, words.groups()[2:] if got.hue else words.groups()[:2])
    value = torch.as_tensor(got.value)
    allowed = torch.as_tensor(got.unit, dtype=torch.float64).expand(value.shape) * part / of
    ours, n, typical = digest(value), value.numel(), allowed.mean().item()
    if ours["shape"] != want["shape"]:
        return [f"{name}.shape: {ours['shape']}, the original {want['shape']}"]
    off = np.abs(np.subtract(ours["first"], want["first"])) / allowed.flatten()[:32].numpy()
    bad = [] if off.mean() < 1 else [f"{name}.first: {off.mean():.3g} times the mean bound off"]
    slack = {"mean": typical, "std": typical, "norm": math.sqrt(n) * typical}
    return bad + [f"{name}.{k}: {ours[k]!r}, the original {want[k]!r}, allowed {s:.3g}"
                  for k, s in slack.items() if not abs(ours[k] - want[k]) < s]


def slack_of(want, bound):
    """{statistic: how far that of a digest may be off}, and the bound on single values.

    What the fixture spells out, else what the bound on each value implies: errors of at most
    atol + rtol·|x_i| move mean and std by at most atol + rtol·rms(x), the norm by √n times it.
    """
    rtol, atol, norm_rtol, atol_std, _ = bound
    n = max(1, math.prod(want["shape"]))
    rms = want["norm"] / math.sqrt(n)
    if atol_std is not None:
        each = Bound(rtol, atol + atol_std * want["std"])
        return {"mean": each.atol + max(rtol * abs(want["mean"]), SUMMED * rms), **{
            k: atol + max(norm_rtol, SUMMED) * abs(want[k]) for k in ("std", "norm")}}, each
    norm = norm_rtol * want["norm"] if norm_rtol else math.sqrt(n) * (atol + rtol * rms)
    return {"mean": atol + rtol * rms, "std": atol + rtol * rms, "norm": norm}, Bound(rtol, atol)


def faults(got, want, bound, at=""):
    """Every place where `got` is not `want`, in words."""
    if is_digest(want):
        array, got, (slack, each) = got, digest(got), slack_of(want, bound)
        bad = faults(got["shape"], want["shape"], Bound(), f"{at}.shape")
        bad += faults(got["first"], want["first"], each, f"{at}.first")
        if "probe" in want and not bad:
            rms = want["norm"] / math.sqrt(max(1, math.prod(want["shape"])))
            spread = math.sqrt(math.prod(want["shape"])) * (each.atol + each.rtol * rms)
            bad += probe_faults(array, want["probe"], spread, at)
        return bad + [f"{at}.{k}: {got[k]!r}, the original {want[k]!r}, allowed {s:.3g}"
                      for k, s in slack.items() if not abs(got[k] - want[k]) <= s]
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
    slack = bound.atol + bound.rtol * abs(want)
    return [] if abs(got - want) <= slack else [
        f"{at}: {got!r}, the original {want!r}, allowed {slack:.3g}"]


# ---- tests ---------------------------------------------------------------------------------------

def family_of(id, families):
    """The longest family that the id begins with, ending at a dot, an underscore or its end.

    # in a family's name stands for any number.
    """
    fitting = [f for f in families
               if re.match(r"\d+".join(map(re.escape, f.split("#"))) + r"(?=[._]|$)", id)]
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
    left_out = NOT_REPRODUCED.get(script, {}).get(family, {})
    want = {k: v["exact"] if isinstance(v, dict) and set(v) == {"exact"} else v
            for k, v in case["outputs"].items() if k not in left_out}
    assert want, f"{stem}/{case['id']}: names no output that could be compared"
    c = Case(stem, file, case, tmp_path)
    torch.manual_seed(0)
    got = adapters[family](c)
    bad = []
    for k, value in want.items():
        bound = bounds(case["tolerance"], k, c.entries())
        bad += compare(got[k], value, bound, k) if k in got else [
            f"{k}: the adapter does not produce it"]
    text = "\n".join([f"{len(bad)} differences, tolerance {case['tolerance']!r}:", *bad[:20]])
    assert not bad, text


def test_there_are_cases():
    assert read_cases(), f"no *.json in {FOLDER}"


BINS = "bins equal; prominences and z-score rtol 1e-3"
STEPS = "rtol 5e-3 on losses, 1e-3 on weights"
SOUND = "resampled/log/normalised atol 2e-4; mel_power rtol 1e-3"


@pytest.mark.parametrize("text, output, expected", [
    ("exact", "x", (0, 0)), ("equal", "x", (0, 0)), ("1e-6", "x", (0, 1e-6)),
    ("rtol 1e-4, atol 1e-5 (float32)", "x", (1e-4, 1e-5)), ("rtol 1e-9", "x", (1e-9, 0)),
    ("atol 0.02 (one grey level is 0.0175)", "x", (0, 0.02)),
    (STEPS, "losses", (5e-3, 0)), (STEPS, "bn.running_mean", (1e-3, 0)),
    (BINS, "all_peak_bins", (0, 0)), (BINS, "zscore_mean_over_frequency", (1e-3, 0)),
    (SOUND, "mel_power", (1e-3, 0)), (SOUND, "normalised", (0, 2e-4)),
    *((text, "x", None) for text in ("", "close", "rtol about 1e-3", "within 2 %",
                                     "rtol 1e-3 or so", "rtol 1e-3 (atol 5 for the last)"))])
def test_tolerances_are_read_from_their_words_and_unknown_ones_refused(text, output, expected):
    with pytest.raises(ValueError, match="cannot read") if not expected else nullcontext():
        assert bounds(text, output, {"bn.running_mean": 0})[:2] == expected


def test_a_table_of_tolerances_is_held_to_what_it_says():
    table = {"rtol": 0.1, "atol": 1, "atol_std": 0.5, "norm_rtol": 0.2, "note": "",
             "grads": {"rtol": 0.3}}
    assert bounds(table, "score") == (0.1, 1, 0.2, 0.5, "")
    assert bounds(table, "grad:a") == (0.3, 0, 0, 0, "")
    want = {"shape": [2], "first": [10.0, 20.0], "mean": 15.0, "std": 5.0, "norm": 22.4}
    slack, each = slack_of(want, bounds(table, "score"))
    assert slack == {"mean": 3.5 + 1.5, "std": 1 + 1, "norm": pytest.approx(1 + 4.48)}
    assert each == (0.1, 3.5, None, None, "")
    with pytest.raises(ValueError, match="cannot read"):
        bounds({**table, "about": 1}, "score")
    assert bounds({"rtol": 0.1, "atol": 1}, "score") == (0.1, 1, 0.1, 0, "")
    assert bounds({"rel": 0.1, "abs": 1}, "score") == (0.1, 1, 0.1, 0, "")
    table = {"exact": True, "atol_times": 1e-9}
    assert [bounds(table, k)[:2] for k in ("frames", "times")] == [(0, 0), (0, 1e-9)]
    with pytest.raises(ValueError, match="cannot read"):
        bounds({"exact": True, "rtol": 1}, "score")


def test_a_probe_sees_two_values_that_changed_places():
    x, bound = np.arange(100) / 100, Bound(1e-6, 1e-6, 1e-6, 0.0)
    probe = float((x * recipe.values("probe", [x.size])).sum())
    want = {**digest(x), "probe": probe}
    assert not compare(x, want, bound, "x")
    assert not compare(torch.from_numpy(x), want, bound, "x")
    x[[60, 90]] = x[[90, 60]]
    assert [f[:8] for f in compare(x, want, bound, "x")] == ["x.probe:"]


@pytest.mark.parametrize("off, hue, faulty", [(1.9, False, False), (2.1, False, True),
                                              (3.9, True, False), (4.1, True, True)])
def test_a_tensor_implementation_may_be_off_by_the_stated_grey_levels(off, hue, faulty):
    image = np.random.default_rng(0).uniform(50, 200, (1, 8, 8, 3))
    bound = Bound(tensor="mean absolute difference below 2/255 (4/255 after hue)")
    got = Tensorised(image + off, 255.0, hue)
    assert bool(compare(got, digest(image), bound, "x")) == faulty
    exact = Bound(0.0, 0.0, 0.0, 0.0)
    assert compare(got, digest(image), exact, "x")
    assert not compare(Tensorised(image, 255.0, hue), digest(image), exact, "x")
