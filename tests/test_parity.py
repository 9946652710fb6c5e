"""Parity with the original code: every case of every fixture is a test `<file stem>/<case id>`.

The fixtures, `parity/*.json`, hold what the original code computed from weights and inputs that
`recipe.py` rebuilds from names. `PARITY_DIR=folder` runs the same adapters on other files of that
form. The adapter is chosen by the longest prefix of the case's id that is a family; everything
else, sizes, temperatures, rates and draws, comes from the case. Weights are written as a released
checkpoint and read back by the function behind `--init`. RepLAI's adapters stand here, those of
CPCTrans in parity_cpctrans.py, those of F2C and F2C2V in parity_f2c_oops.py, those of SSDet and
Coarse-Fine in parity_ssdet_coarsefine.py.
"""

import copy
import importlib.util
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import parity_cpctrans
import parity_f2c_oops
import parity_ssdet_coarsefine
import pytest
import torch
import torch.distributed as dist
from parity_cpctrans import Tensorised
from torch import nn

import common
import cpctrans
import replai

HERE = Path(__file__).resolve().parent / "parity"
FOLDER = Path(os.environ.get("PARITY_DIR", HERE))
DIGEST = {"shape", "first", "mean", "std", "norm"}            # and a `probe`, in some files
SUMMED = 1e-13                       # statistics are sums of doubles, in whatever order

# Families that are not there yet, with the reason; their cases are skipped: {file stem: {...}}.
COMING = {}

# Outputs that are deliberately not reproduced: {file stem: {family: {output: reason}}}.
NOT_REPRODUCED = {"replai": {"audio_window": {
    "first_last_length": "a fault of the released decoder, which drops the partial first codec "
                         "frame and then as many samples again; common.audio_window is exact to "
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


def load_recipe():
    path = next(p for p in (FOLDER / "recipe.py", HERE / "recipe.py") if p.exists())
    spec = importlib.util.spec_from_file_location("parity_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


# ---- reading a case ----------------------------------------------------------------------------

class Case:
    """One case of a fixture, its state and inputs rebuilt when asked for."""

    def __init__(self, stem, file, case, folder=None):
        self.stem, self.file, self.case, self.folder = stem, file, case, folder
        self.id, self.what, self.config = case["id"], case.get("what", ""), case["config"]

    def entries(self):
        """{name: shape} of the state; references to other states are followed."""
        entries = self.case.get("state") or {}
        while isinstance(entries, str):
            if entries.removeprefix("@") in self.file.get("states", {}):
                entries = self.file["states"][entries.removeprefix("@")]
            else:
                other = entries.removeprefix("as ")
                entries = next(c["state"] for c in self.file["cases"] if c["id"] == other)
        return {} if "n_keys" in entries else entries         # told by a hash alone

    def state(self):
        """{name: tensor} that the recipe fills in."""
        return {k: torch.from_numpy(np.asarray(self.parameter(k, shape)))
                for k, shape in self.entries().items()}

    def parameter(self, name, shape):
        """An alias has the value of the name it stands for; an override replaces the recipe's, or
        of `state_overrides` is a factor.
        """
        for alias, name_of in self.case.get("aliases", {}).items():
            if name.startswith(alias):
                name = name_of + name.removeprefix(alias)
        override = self.case.get("state_override", {}).get(name)
        x = recipe.values(name, shape, **override) if override else recipe.parameter(name, shape)
        factor = self.case.get("state_overrides", {}).get(name)
        return x if factor is None else x * np.float32(factor)

    def inputs(self):
        """{name: array}, made as each entry's `how` says."""
        made = {k: self.construct(k, v) for k, v in self.case["inputs"].items()}
        for k, v in self.case["inputs"].items():              # "..., then 3 added at [i, label_i]"
            if isinstance(v, dict) and " added at " in v.get("how", ""):
                add_at_labels(made, k, v["how"])
        return made

    def input(self, last):
        """The input whose name ends in `last`, as a tensor or an array."""
        return only(self.inputs(), last)

    def construct(self, name, entry):
        if not isinstance(entry, dict):
            return entry
        how = entry.get("how", "values")
        if re.match(r"values(, then|$)", how):
            x = recipe.values(name, entry["shape"], entry.get("scale", 1.0),
                              entry.get("shift", 0.0))
            if "then" not in entry:
                return x
            grey = re.match(r"uint8\(clip\(rint\(v\), ?(\d+), ?(\d+)\)\)(, one RGB PIL image|$)",
                            entry["then"])
            if grey:
                return np.clip(np.rint(x), int(grey[1]), int(grey[2])).astype(np.uint8)
            how = entry["then"]
        factor = re.match(r"integers: np\.floor\(np\.abs\(values\(name, shape\)\) \* "
                          r"float32\((\d+)\)\)\.astype\(int64\) % C", how)
        if factor:
            x = np.floor(np.abs(recipe.values(name, entry["shape"])) * np.float32(factor[1]))
            x = x.astype(np.int64) % entry["C"]
            names = re.search(r"([\d, ]+) stand for ([\w, ]+)", how)
            if names:
                table = dict(zip(*(re.split(r", ?", s.strip()) for s in names.groups())))
                x = np.array([table[str(i)] for i in x.ravel()]).reshape(x.shape)
            return x
        pixels = re.match(r"frame i: np\.clip\(values\(name \+ \"\.\" \+ i, \(h, w, 3\)\) \* (\d+) "
                          r"\+ (\d+), (\d+), (\d+)\)\.astype\(uint8\)", how)
        plain = re.fullmatch(r"np\.clip\(values\(name, shape\) \* (\d+) \+ (\d+), (\d+), (\d+)\)"
                             r"\.astype\(uint8\)", how)
        if plain:
            gain, shift, low, high = map(int, plain.groups())
            x = recipe.values(name, entry["shape"]) * gain + shift
            return np.clip(x, low, high).astype(np.uint8)
        if pixels:
            gain, shift, low, high = map(int, pixels.groups())
            frames = [recipe.values(f"{name}.{i}", (entry["h"], entry["w"], 3))
                      for i in range(entry["n"])]
            return np.stack([np.clip(f * gain + shift, low, high).astype(np.uint8) for f in frames])
        if how.startswith("values(name, (channels, n), noise); then for each burst i at second t0"):
            return self.bursts(name, entry)
        raise NotImplementedError(f"{name}: no construction known for how = {how!r}")

    def bursts(self, name, e):
        """A waveform (channels, n) of noise with decaying bursts, float32."""
        rate = self.config["sample_rate"]
        w = recipe.values(name, (e["channels"], e["n"]), e["noise"])
        for i, t0 in enumerate(e["bursts_seconds"]):
            start = round(t0 * rate)
            n = min(int(e["blen"] * rate), e["n"] - start)
            envelope = e["amp"] * np.exp(-np.arange(n) / (e["decay"] * rate))
            burst = recipe.values(f"{name}.burst{i}", (n,))
            w[:, start:start + n] += (envelope * burst).astype(np.float32)
        return ((w + np.float32(e["dc"])) * np.float32(e["gain"])).astype(np.float32)

    def load(self, module, layouts, required):
        """Fill `module` from a checkpoint like the released ones, through --init's code."""
        path = self.folder / "released.pth.tar"
        torch.save({"model": {f"module.{k}": v for k, v in self.state().items()}}, path)
        common.load_weights(module, path, layouts, required)
        path.unlink()
        return module

    def training(self):
        """Whether the original ran in training mode; the case says so in words."""
        mode = re.search(r"\b(eval|train)( mode|\b)", self.config.get("mode", self.what))
        assert mode, f"{self.id}: `what` names neither eval mode nor train mode"
        return mode[1] == "train"


def only(entries, last):
    """The one value whose dotted name ends in `last`."""
    found = [v for k, v in entries.items() if k.split(".")[-1] == last]
    assert len(found) == 1, f"{len(found)} entries end in .{last}: {list(entries)}"
    return torch.from_numpy(found[0]) if isinstance(found[0], np.ndarray) and (
        found[0].dtype.kind in "fiu") else found[0]


def add_at_labels(made, name, how):
    """In place: "3 added at [i, label_i] for every third row i = 0, 3, 6, ..."."""
    m = re.search(r"([\d.]+) added at \[i, (\w+)_i\] for .*?i = (\d+), (\d+)", how)
    assert m, f"{name}: cannot read how = {how!r}"
    labels = next(v for k, v in made.items() if k.split(".")[-1] in (m[2], m[2] + "s"))
    rows = np.arange(int(m[3]), len(made[name]), int(m[4]) - int(m[3]))
    made[name][rows, labels[rows]] += np.float32(m[1])


# ---- tolerances and comparison -----------------------------------------------------------------

NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
BOUND = rf"(?:rtol {NUMBER})?(?:, )?(?:atol {NUMBER})?"


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
            kind = clause[:4]
            for number, subject in re.findall(rf"{NUMBER} on (\w+)", clause):
                clauses.append(({subject}, *((float(number), 0.0) if kind == "rtol"
                                             else (0.0, float(number)))))
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


class Twice(NamedTuple):
    """One output as float32 and as float64 arithmetic gives it."""
    single: object
    double: object


def is_digest(x):
    return isinstance(x, dict) and set(x) - {"probe"} == DIGEST


def digest(x):
    if is_digest(x):
        return x
    return recipe.digest(x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x)


def probe_faults(got, want, slack, at):
    """Of the sum of the array's values times fixed random numbers: what the statistics do not see,
    as values in another order. Off as the values may be, it is off by about `slack`, the norm's.
    """
    x = got.detach().cpu().double().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    probe = float((x.ravel() * recipe.values("probe", [x.size])).sum())
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
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            size = len(got) if isinstance(got, (list, tuple)) else "no list"
            return [f"{at}: {size} entries, the original {len(want)}"]
        return [f for i, (a, b) in enumerate(zip(got, want))
                for f in faults(a, b, bound, f"{at}[{i}]")]
    if isinstance(want, (str, bool, type(None))) or got is None:
        return [] if got == want else [f"{at}: {got!r}, the original {want!r}"]
    slack = bound.atol + bound.rtol * abs(want)
    return [] if abs(got - want) <= slack else [
        f"{at}: {got!r}, the original {want!r}, allowed {slack:.3g}"]


# ---- adapters: RepLAI --------------------------------------------------------------------------

def width_of(state, prefix=""):
    return state[prefix + "conv1.0.weight"][0]


def shapes(case):
    return {k: tuple(v.shape) for k, v in case.state().items()}


def twice(outputs, model):
    """{name: Twice}: what `outputs` makes of the model, and of the model in float64."""
    double = outputs(copy.deepcopy(model).double())
    return {k: Twice(v, double[k]) for k, v in outputs(model).items()}


def backbone(case, network, x):
    """Every named map, the plain forward, and the state, whose statistics training moves."""
    network = case.load(network, [{"": ""}], "").train(case.training())
    for m in network.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = case.config.get("bn_momentum", m.momentum)

    @torch.no_grad()
    def outputs(network):
        typed = x.to(next(network.parameters()).dtype)
        plain = copy.deepcopy(network)(typed)                 # a copy: training changes the state
        return {**network(typed, return_embs=True), "forward": plain, **network.state_dict()}
    return twice(outputs, network) if network.training else outputs(network)


def video_backbone(case):
    network = common.R2Plus1D(width_of(shapes(case)), case.config["depth"])
    return backbone(case, network, case.input("x"))


def audio_backbone(case):
    return backbone(case, common.SpectrogramCNN(width_of(shapes(case))), case.input("x"))


def replai_model(case):
    """The model of a criterion's state, filled as pre-training's `--init` fills it."""
    s = shapes(case)
    deep = any(k.startswith("backbone.video.conv2x.1.") for k in s)
    depth, out_dim = case.config.get("depth", 18 if deep else 10), s["mlp.video_clr.2.weight"][0]
    model = replai.RepLAI(width_of(s, "backbone.video."), depth, out_dim)
    case.load(model, replai.PRETRAIN_LAYOUTS, "backbone.")
    return model


def objective(case, model):
    """(total, AVC, AStC) losses of the case's clips and sounds; tau: the case's, or our default."""
    c = case.config
    tau = c["temperature"] if "temperature" in c else replai.parse_args([]).tau
    made, dtype = case.inputs(), next(model.parameters()).dtype
    out = model(*(only(made, k).to(dtype) for k in ("video_l", "video_r", "audio")))
    avc, astc = replai.losses(out, tau)
    return c["clr_coeff"] * avc + c["aot_coeff"] * astc, avc, astc


def criterion(case):
    def outputs(model):
        maps = {}
        for k, network in model.backbone.items():
            network.register_forward_hook(lambda _, __, y, k=k: maps.update({k: y}))
        total, avc, astc = objective(case, model)
        total.backward()
        return {"total_loss": total, "clr_loss": avc, "aot_loss": astc, "audio_map": maps["audio"],
                "video_feature": maps["video"].amax((2, 3, 4), keepdim=True), **model.state_dict(),
                **{f"grad:{k}": p.grad for k, p in model.named_parameters()}}
    return twice(outputs, replai_model(case).train(case.training()))


def criterion_sgd_steps(case):
    """The optimiser's settings that the config lacks stand in the case's `what`."""
    c, number = case.config, re.compile(rf"weight decay {NUMBER}")
    decay = c["weight_decay"] if "weight_decay" in c else float(number.search(case.what)[1])
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    steps = c.get("steps") or words.index(re.search(r"(\w+) optimi[sz]er steps?", case.what)[1])

    def outputs(model):
        values, optimizer = [], torch.optim.SGD(model.parameters(), lr=c["lr_used"],
                                                momentum=c["momentum_used"], weight_decay=decay)
        for _ in range(steps):
            total = objective(case, model)[0]
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            values.append(total.item())
        return {"losses": np.array(values), **model.state_dict()}
    return twice(outputs, replai_model(case).train())


def own_avc(video_l, video_r, audio, tau):
    """AVC of this process's rows against the candidates of all, as in `replai.losses`."""
    z = torch.stack([video_l, video_r])
    own = common.rank() * len(audio)
    return replai.avc_loss(z, audio, replai.candidates(z), replai.candidates(audio), own, tau)


def avc(case):
    if case.config.get("world_size", 1) > 1:
        return avc_processes(case)
    x, tau = case.inputs(), case.config["temperature"]
    x = {k: torch.from_numpy(v).requires_grad_() for k, v in x.items()}
    loss = own_avc(*(only(x, k) for k in ("video_l", "video_r", "audio")), tau)
    loss.backward()
    return {"loss": loss, **{f"grad:{k}": v.grad for k, v in x.items()}}


def avc_process(rank, world_size, folder, tau):
    """What one of several processes does; its result is the file it leaves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                            world_size=world_size)
    x = torch.load(Path(folder) / f"in{rank}.pt")
    x = {k: v.requires_grad_() for k, v in x.items()}
    loss = own_avc(*(only(x, k) for k in ("video_l", "video_r", "audio")), tau)
    loss.backward()
    result = {f"loss_rank{rank}": loss.detach(), **{f"grad:{k}": v.grad for k, v in x.items()}}
    common.write(Path(folder) / f"out{rank}.pt", lambda f: torch.save(result, f))
    dist.barrier()


def avc_processes(case):
    """One gloo process per rank; judged by the files, since gloo may abort at exit, work done."""
    inputs, world = case.inputs(), case.config["world_size"]
    for r in range(world):
        mine = {k: torch.from_numpy(v) for k, v in inputs.items() if f".rank{r}." in k}
        assert len(next(iter(mine.values()))) == case.config["per_rank_batch"]
        torch.save(mine, case.folder / f"in{r}.pt")
    spawn = torch.multiprocessing.get_context("spawn")
    running = [spawn.Process(target=avc_process, daemon=True, args=(
        r, world, str(case.folder), case.config["temperature"])) for r in range(world)]
    for p in running:
        p.start()
    for p in running:
        p.join(120)
    files = [case.folder / f"out{r}.pt" for r in range(world)]
    assert all(f.exists() for f in files), f"no result, exits {[p.exitcode for p in running]}"
    return {k: v for f in files for k, v in torch.load(f).items()}


def astc(case):
    """g alone with the state's weights, then our `RepLAI.change` and AStC."""
    s, made = shapes(case), case.inputs()
    hidden, out_dim = s["mlp.aot_diff.0.weight"]
    model = nn.Module()
    model.mlp = nn.ModuleDict({"aot_diff": replai.head(out_dim, hidden, out_dim)})
    case.load(model, [{"": ""}], "")
    x = {k: torch.from_numpy(v).requires_grad_() for k, v in made.items()}
    s_l, s_r, q = (only(x, k) for k in ("video_l", "video_r", "audio"))
    loss = replai.astc_loss(*replai.RepLAI.change(model, s_l, s_r), q, case.config["temperature"])
    loss.backward()
    return {"loss": loss, **{f"grad:{k}": v.grad for k, v in x.items()},
            **{f"grad:{k}": p.grad for k, p in model.named_parameters()}}


def moi(case):
    c, (x,) = case.config, case.inputs().values()
    found = replai.find_moments(x, c["sample_rate"], c["prominence"], c["distance_bins"])
    times, peaks = found.times, found.times[found.peaks]
    kept = replai.admissible(peaks, c["segment_seconds"], c["delta_non_overlap"], c["clip_seconds"])
    return {"zscore_mean_over_frequency": found.curve, "number_of_bins": len(found.curve),
            "first_bin_seconds": times[0], "bin_step_seconds": times[1] - times[0],
            "all_peak_bins": found.peaks, "all_peak_prominences": found.prominences,
            "kept_peak_seconds": peaks[kept]}


def spectrogram(case):
    c, (x,) = case.config, case.inputs().values()
    x = torch.from_numpy(np.atleast_2d(x))                              # (channels, n)
    rate = c["audio_rate"]
    mel = {"n_fft": round(c["window_ms"] * rate / 1000), "hop": round(c["hop_ms"] * rate / 1000),
           "n_mels": c["n_mels"]}
    mono = x.mean(0)
    resampled = replai.resample(mono, c["raw_sample_rate"], rate)
    power = replai.mel_power(resampled, rate=rate, **mel)
    log = power.clamp(min=c["log_floor"]).log()
    picked = common.subsample(log.shape[1], c["num_temporal_frames"])
    normalised = replai.log_mel(x, c["raw_sample_rate"], c["num_temporal_frames"], c["mean"],
                                c["std"], c["log_floor"], rate, **mel)
    return {"mono": mono[None], "resampled": resampled[None], "mel_power": power[None],
            "log": log[None], "permuted": log.T[None], "subsampled": log.T[None, picked],
            "normalised": normalised}


def mel_filterbank(case):
    c, bins = case.config, re.search(r"\[(\d+) bins", case.what)
    assert (c["scale"], c["norm"]) == ("htk", None), "only the HTK scale without area norm exists"
    bins = c.get("bins") or int(bins[1])
    fbank = replai.mel_filterbank(bins, c["n_mels"], c["f_min"], c["f_max"])
    return {"fbank": fbank, "column_sums": fbank.sum(0),
            **{f"row_{i}": row for i, row in enumerate(fbank)}}


def video_transform(case):
    """Crop and number of pictures are our defaults where the case does not name them."""
    c, (frames,), args = case.config, case.inputs().values(), replai.parse_args([])
    named = re.search(r"centre crop (\d+)", case.what)
    crop = c.get("crop") or (int(named[1]) if named else args.crop)
    if "short_side_draw" in c:                                # training, with the case's draws
        sizes = [replai.short_side_to(c["width"], c["height"], c["short_side_draw"], swap)
                 for swap in (False, True)]
        size = tuple(c["size_after_scale_w_h"])
        assert size in sizes, f"scaled to {sizes[0]}, or {sizes[1]} as released, not to {size}"
        clip = replai.resize_crop_flip(frames, size, c["crop_x"], c["crop_y"], crop, c["flip"])
    else:
        clip = replai.centre(frames, crop, "nearest" if "NEAREST" in case.what else "bilinear")
    picked = common.subsample(len(frames), c.get("num_frames") or args.num_frames)
    return {"clip": replai.normalize(clip[None, :, picked])[0]}


def audio_window(case):
    rows = []
    for rate, total, _, start, stop in case.input("rows"):
        first, end = common.audio_window(start, stop, rate, total)
        rows.append([first, end - 1, end - first])
    return {"recommended_first_last_length": rows}


def one_cycle(case):
    lr, momentum = zip(*replai.one_cycle(case.config["max_lr"], case.config["total_steps"]))
    return {"lr": lr, "momentum": momentum, **{
        f"{k}_epochs": {str(i): x for i, x in enumerate(v)}
        for k, v in (("lr", lr), ("momentum", momentum))}}


def per_epoch(case):
    c = case.config
    if c["cos"]:
        return {"lr": [replai.cosine(c["lr"], i, c["epochs"]) for i in range(c["epochs"])]}
    return {"lr": [replai.step_lr(c["lr"], i, c["milestones"]) for i in range(c["epochs"])]}


def warmup_cosine(case):
    c = case.config
    return {"lr": [replai.warmup_cosine(c["base_lr"], i, c["warmup_steps"], c["total_steps"])
                   for i in range(c["total_steps"])]}


def linear_classifier(case):
    (features,), of = case.inputs().values(), {True: "sign", False: "off"}
    features = torch.from_numpy(features).flatten(1)                    # (N, D)
    probe = replai.LinearProbe(features.shape[1] // 8, num_classes=case.config["num_classes"])
    case.load(probe, replai.PROBE_LAYOUTS, "fc.")
    return probe.classify(features, of[case.config["normalize"]])


def topk(case):
    """The original multiplies the hits by 100 / rows in float32; our percentage is told as that."""
    scores, labels = case.input("scores"), case.input("labels").numpy()
    n, percent = len(labels), {}
    for k in range(1, scores.shape[1] + 1):
        hits = replai.top_k(scores, labels, k) * n / 100
        assert abs(hits - round(hits)) < 1e-6, f"top{k} is no share of {n} rows"
        percent[f"top{k}"] = float(np.float32(round(hits)) * np.float32(100.0 / n))
    return percent


def number_set(x):
    """{48, ..., 96} from "48..96", or from a list."""
    if isinstance(x, str):
        first, last = map(int, x.split(".."))
        return set(range(first, last + 1))
    return set(x)


def epic_official(case):
    c, made = case.config, case.inputs()
    verb, noun, verb_class, noun_class = (
        only(made, k).numpy() for k in ("verb", "noun", "verb_class", "noun_class"))
    return replai.epic_metrics(verb, noun, verb_class, noun_class, only(made, "participant"),
                               number_set(c["tail_verbs"]), number_set(c["tail_nouns"]),
                               set(c["unseen_participants"]))


def recognition(case):
    """Logits, or probabilities where the original's switch TEST.NO_ACT is off."""
    c = case.config
    model = replai.Recognition(c["width"], c["depth"], c["num_classes"])
    out = case.load(model, replai.BARE_LAYOUTS, "").train(case.training())(case.input("x"))
    assert c["test_no_act"] or c["head_act"] == "softmax"
    return dict(zip(("verb", "noun"), out if c["test_no_act"] else [x.softmax(-1) for x in out]))


def anticipation(case):
    """The state lacks the sinusoid: it is ours, and is not loaded."""
    c, kind = case.config, case.config["aggregator"].removesuffix("Aggregator").lower()
    model = replai.Anticipation(
        c["width"], c["depth"], c["num_classes"], kind, c["multi_input_features"],
        c["encoder_layers"], c["encoder_heads"], c["input_clips"], c["Z"])
    pe = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(".pe")}
    case.load(model, replai.PROBE_LAYOUTS, "")
    model.load_state_dict(pe, strict=False)
    model.train(case.training())
    x = case.input("x")
    features = model.encode(x)
    verb, noun = model(x)
    return {"clip_features": features, "aggregated": model.clip_aggregator(features),
            "verb": verb, "noun": noun, "trainable_when_frozen": sorted(
                f"backbone.{k}" for k, p in model.backbone.named_parameters() if p.requires_grad)}


def lta_windows(case):
    c, (key,) = case.config, case.case["outputs"]
    clips = np.array([k for k, n in c["actions_per_clip"].items() for _ in range(n)])
    index = np.concatenate([np.arange(n) for n in c["actions_per_clip"].values()])
    rows = replai.action_windows(clips, c["inputs"], c["future"])
    extra = replai.action_windows(clips, c["inputs"], c["future"], extra=True)
    if "window_counts_with_the_later_plus_one" in c:
        counts = {k: int((clips[extra[:, 0]] == k).sum()) for k in c["actions_per_clip"]}
        assert counts == c["window_counts_with_the_later_plus_one"]
    inputs, future = index[rows[:, :c["inputs"]]], index[rows[:, c["inputs"]:]]
    return {key: [[str(clips[r[0]]), i.tolist(), f[0], f[-1]]
                  for r, i, f in zip(rows, inputs, future.tolist())]}


def frame_sampling(case):
    frames = [replai.sample_frames(*row[:3]) for row in case.input("rows")]
    return {"frames": [f.tolist() for f in frames], "keyframe_index": [
        None if row[3] is None else replai.keyframe_index(f, row[3])
        for f, row in zip(frames, case.input("rows"))]}


def keyframe_metrics(case):
    rows, fps = case.input("rows"), re.search(r"\(end - start\) / (\d+)", case.config["fps"])
    start, stop, pnr = (np.array([np.nan if x is None else x for x in c]) for c in zip(*rows))
    errors = replai.keyframe_errors(case.input("keyframe").flatten(1).numpy(), start, stop,
                                    (stop - start) / int(fps[1]), pnr)
    guess, changed = case.input("state").flatten(1).argmax(1).numpy(), ~np.isnan(pnr)
    return {"accuracy": float((guess == changed).mean()),
            "keyframe_error_seconds_each": [None if math.isnan(e) else e for e in errors.tolist()],
            "keyframe_error_seconds": float(errors[changed].mean())}


def state_heads(case):
    c = case.config
    heads = replai.StateHeads(c["channels"], c["map"], c["pool"], dropout=0.0)
    keyframe, state = case.load(heads, [{"": ""}], "")(case.input("map"))
    losses = replai.statechange_losses((keyframe, state), {
        "state": torch.tensor(c["state_labels"]), "keyframe": torch.tensor(c["keyframe_index"]),
        "has_keyframe": torch.tensor(c["state_labels"]) > 0})
    probs = replai.probabilities(keyframe, state)
    return {"keyframe_logits": keyframe, "state_logits": state, "keyframe_probs": probs[0][:, None],
            "state_probs": probs[1][:, :, None], "keyframe_loss": losses["keyframe"],
            "state_loss": losses["state"], "loss": sum(losses.values())}


def square(case):
    image, (height, width) = case.input("img").numpy(), case.config["to"]
    out = replai.resize_crop_flip(image[None], (width, height), 0, 0, max(height, width), False,
                                  "tensor")
    return {"resized": out[:, 0].permute(1, 2, 0).float()}


def aued(case):
    pred, label = case.input("preds").numpy(), case.input("labels").numpy()[..., 0]
    ed, area = replai.edit_metrics(pred, label)
    return {"ED": ed, "AUED": area}


def transpositions(case):
    pairs = [(np.array(a), np.array(b)) for a, b in case.input("pairs")]
    return {"distance_over_Z": [replai.edit_metrics(a[None, :, None], b[None])[0][-1]
                                for a, b in pairs]}


ADAPTERS = {"cpctrans": parity_cpctrans.ADAPTERS, "f2c_oops": parity_f2c_oops.ADAPTERS,
            "ssdet_coarsefine": parity_ssdet_coarsefine.ADAPTERS, "replai": {
    "backbone.video": video_backbone, "backbone.audio": audio_backbone,
    "criterion": criterion, "criterion.two_sgd_steps": criterion_sgd_steps,
    "loss.avc": avc, "loss.avc_two_processes": avc_processes, "loss.astc": astc,
    "moi": moi, "spectrogram": spectrogram, "mel_filterbank": mel_filterbank,
    "subsample": lambda case: {"indices": common.subsample(case.config["in"], case.config["out"])},
    "pad_video": lambda case: {"indices": common.pad(case.config["have"], case.config["want"])},
    "video_transform": video_transform, "audio_window": audio_window,
    "schedule.onecycle_per_epoch": one_cycle, "schedule.linear_eval_steps": per_epoch,
    "schedule.cosine": per_epoch, "schedule.warmup_cosine_per_step": warmup_cosine,
    "recognition": recognition, "lta.model": anticipation, "lta.windows_as_released": lta_windows,
    "pnr.frame_sampling": frame_sampling, "pnr.metrics": keyframe_metrics,
    "pnr.heads_and_losses": state_heads, "pnr.resize": square,
    "metric.aued": aued, "metric.transpositions": transpositions,
    "linear.classifier": linear_classifier, "metric.topk": topk,
    "metric.epic_official": epic_official}}


# ---- tests -------------------------------------------------------------------------------------

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
    script = family_of(stem, ADAPTERS)
    adapters, coming = ADAPTERS.get(script, {}), COMING.get(script, {})
    family = family_of(case["id"], [*adapters, *coming])
    if family in coming:
        pytest.skip(coming[family])
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


@pytest.mark.parametrize("text, output, expected", [
    ("exact", "x", (0, 0)), ("equal", "x", (0, 0)), ("1e-6", "x", (0, 1e-6)),
    ("rtol 1e-4, atol 1e-5 (float32)", "x", (1e-4, 1e-5)), ("rtol 1e-9", "x", (1e-9, 0)),
    ("atol 0.02 (one grey level is 0.0175)", "x", (0, 0.02)),
    ("rtol 5e-3 on losses, 1e-3 on weights", "losses", (5e-3, 0)),
    ("rtol 5e-3 on losses, 1e-3 on weights", "bn.running_mean", (1e-3, 0)),
    ("bins equal; prominences and z-score rtol 1e-3", "all_peak_bins", (0, 0)),
    ("bins equal; prominences and z-score rtol 1e-3", "zscore_mean_over_frequency", (1e-3, 0)),
    ("resampled/log/normalised atol 2e-4; mel_power rtol 1e-3", "mel_power", (1e-3, 0)),
    ("resampled/log/normalised atol 2e-4; mel_power rtol 1e-3", "normalised", (0, 2e-4))])
def test_tolerances_are_read_from_their_words(text, output, expected):
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


@pytest.mark.parametrize("stage, gamma", [("pretrain", 0.5), ("finetune", 0.1)])
def test_cpctrans_lowers_the_rate_as_published(stage, gamma):
    """Stands here because the adapter of the schedules must also follow other numbers."""
    args = cpctrans.parse_args(["--stage", stage])
    args.method = "cpctrans"
    rates = [cpctrans.learning_rate(args, e) for e in (0, 99, 100, 199, 200, 299)]
    assert rates == pytest.approx([1e-3 * gamma ** n for n in (0, 0, 1, 1, 2, 2)], rel=1e-12)


def test_cpctrans_adds_epsilon_to_the_deviation_itself():
    """The fixture's inputs vary too much to tell it from the usual one, under the root."""
    x = 1e-6 * torch.from_numpy(recipe.values("flat", (3, 16)))
    want = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    assert torch.allclose(cpctrans.LayerNorm(16)(x), want, rtol=1e-5)


def test_cpctrans_adds_weight_decay_to_the_gradient():
    """Not as AdamW does: three steps of the fixture are too few to tell."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.encoder = None
    torch.nn.init.ones_(model.weight)
    args = cpctrans.parse_args(["--lr", "0.01", "--weight_decay", "0.1"])
    optimizer = cpctrans.optimizer_of(args, model, "all")
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert model.weight.item() == pytest.approx(0.99)


@pytest.mark.parametrize("text", ["", "close", "rtol about 1e-3", "within 2 %", "rtol 1e-3 or so",
                                  "rtol 1e-3 (atol 5 for the last)"])
def test_a_tolerance_in_unknown_words_is_refused(text):
    with pytest.raises(ValueError, match="cannot read"):
        parse_tolerance(text)
