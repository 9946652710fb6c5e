"""What the parity tests and the adapters of all scripts share: cases, special outputs, hooks.

A case is one entry of a fixture in `parity/`. It names its weights and inputs, and `recipe.py`
rebuilds them from these names. `PARITY_DIR=folder` takes the fixtures from another folder.
"""

import itertools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common

HERE = Path(__file__).resolve().parent / "parity"
FOLDER = Path(os.environ.get("PARITY_DIR", HERE)).resolve()
sys.path += [str(FOLDER), str(HERE)]
import recipe  # noqa: E402

NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"                       # in the words of a case
GREY = r"uint8\(clip\(rint\(v\), ?(\d+), ?(\d+)\)\)"              # in the words of an input
PIXELS = r"(?:frame i: )?np\.clip\(values\(.*\) \* (\d+) \+ (\d+), (\d+), (\d+)\)\.astype\(uint8\)"
LABELS = r"integers: np\.floor\(np\.abs\(values\(.*\)\) \* float32\((\d+)\)\)\.astype\(int64\) % C"


# ---- reading a case ------------------------------------------------------------------------------

class Case:
    """One case of a fixture, its state and inputs rebuilt when asked for.

    shaken: a generator that moves each of their numbers by up to a millionth of it.
    """

    def __init__(self, file, case, folder=None, shaken=None):
        self.file, self.case, self.folder, self.shaken = file, case, folder, shaken
        self.id, self.what, self.config = case["id"], case.get("what", ""), case["config"]

    def others(self):
        """All cases of the file."""
        return [Case(self.file, case, self.folder, self.shaken) for case in self.file["cases"]]

    def sibling(self, id):
        return next(c for c in self.others() if c.id == id)

    def told(self, pattern, of=int, text=None):
        """What stands at this place of the case's words, else of another case's, made by `of`.

        A list, if the pattern has several groups. text: other words.
        """
        texts = [self.what, *(c.what for c in self.others())] if text is None else [text]
        found = next(filter(None, (re.search(pattern, x) for x in texts)), None)
        assert found, f"{self.id}: {texts[0]!r} does not match {pattern!r}"
        values = [of(x) for x in found.groups()]
        return values if len(values) > 1 else values[0]

    def training(self):
        """Whether the original ran in training mode; the case says so in words."""
        return self.told(r"\b(eval|train)\b", str, self.config.get("mode", self.what)) == "train"

    def entries(self):
        """{name: shape} of the state; references to other states are followed."""
        entries = self.case.get("state") or {}
        while isinstance(entries, str):
            shared = self.file.get("states", {}).get(entries.removeprefix("@"))
            entries = shared or self.sibling(entries.removeprefix("as ")).case["state"]
        return {} if "n_keys" in entries else entries         # told by a hash alone

    def state(self, entries=None):
        """{name: tensor} that the recipe fills in."""
        return {k: torch.from_numpy(np.asarray(self.parameter(k, shape)))
                for k, shape in (entries or self.entries()).items()}

    def parameter(self, name, shape):
        """By the recipe, or the case's `state_override`. `state_overrides` are factors."""
        for alias, name_of in self.case.get("aliases", {}).items():
            if name.startswith(alias):                        # the same tensor
                name = name_of + name.removeprefix(alias)
        override = self.case.get("state_override", {}).get(name)
        x = recipe.values(name, shape, **override) if override else recipe.parameter(name, shape)
        factor = self.case.get("state_overrides", {}).get(name)
        return self.shake(x if factor is None else x * np.float32(factor))

    def shake(self, x):
        if self.shaken is None or not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return x
        return x * (1 + self.shaken.uniform(-1e-6, 1e-6, x.shape)).astype(x.dtype)

    def checkpoint(self, state=None):
        """Path of the state, or another one, as a checkpoint of other people's code."""
        path = self.folder / "released.pth.tar"
        torch.save({"epoch": 7, "state_dict": {
            f"module.{k}": v for k, v in (state or self.state()).items()}}, path)
        return path

    def load(self, module, *how, state=None, **options):
        """Fill `module` by the function behind --init; how, options: its arguments."""
        path = self.checkpoint(state)
        common.load_weights(module, path, *how, **options)
        path.unlink()
        return module

    def inputs(self):
        """{name: value}, made as each entry's `how` says; a tensor, if of numbers."""
        made = {k: self.shake(self.construct(k, v)) for k, v in self.case["inputs"].items()}
        for k, v in self.case["inputs"].items():
            if isinstance(v, dict) and " added at " in v.get("how", ""):
                add_at_labels(made, k, v["how"])
        return {k: torch.from_numpy(x) if isinstance(x, np.ndarray) and x.dtype.kind in "fiu" else x
                for k, x in made.items()}

    def input(self, *ends):
        """The one input, that whose name ends so, or a list with one for each end."""
        return only(self.inputs(), *ends)

    def in_order(self):
        """The inputs by the numbers that their names end in."""
        return [x for _, x in sorted(self.inputs().items(), key=lambda item: int(
            re.search(r"\d*$", item[0])[0] or 0))]

    def construct(self, name, entry):
        """The value of an input, as `then` or `how` says."""
        if not isinstance(entry, dict):
            return entry
        how, x = entry.get("then", entry.get("how", "values")), None
        if "shape" in entry:
            x = recipe.values(name, entry["shape"], entry.get("scale", 1), entry.get("shift", 0))
        elif "h" in entry:                                    # each frame has its own name
            x = np.stack([recipe.values(f"{name}.{i}", (entry["h"], entry["w"], 3))
                          for i in range(entry["n"])])
        if re.match(r"values(, then|$)", how):
            return x
        if limits := re.match(GREY, how):
            return np.clip(np.rint(x), *map(int, limits.groups())).astype(np.uint8)
        if numbers := re.match(PIXELS, how):
            gain, shift, *limits = map(int, numbers.groups())
            return np.clip(x * gain + shift, *limits).astype(np.uint8)
        if factor := re.match(LABELS, how):
            x = np.floor(np.abs(x) * np.float32(factor[1])).astype(np.int64) % entry["C"]
            names = re.search(r"([\d,]+) stand for ([\w, ]+)", how)
            table = dict(zip(names[1].split(","), names[2].split(", "))) if names else {}
            return np.array([table[str(i)] for i in x]) if names else x
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


def own_names(case, layouts, own):
    """{name in the file: ours} of the tensors that have a place in our network."""
    found = {}
    for layout, old in itertools.product(layouts, case.entries()):
        new = old
        for pattern, replacement in layout:
            new = re.sub(pattern, replacement, new)
        if new in own:
            found[old] = new
    return found


def parameters_of(entries):
    """Without the buffers: statistics of batch norm, positions and their table."""
    buffers = {"running_mean", "running_var", "num_batches_tracked", "position_ids", "pe"}
    return {k: x for k, x in entries.items() if k.rsplit(".", 1)[-1] not in buffers}


def only(entries, *ends):
    """The one value, that whose name ends so, or a list with one for each end."""
    found = []
    for end in ends or [".*"]:
        (value,) = (v for k, v in entries.items() if re.search(rf"(^|[._]){end}$", k))
        found.append(value)
    return found if len(ends) > 1 else found[0]


def add_at_labels(made, name, how):
    """In place: "3 added at [i, label_i] for every third row i = 0, 3, 6, ..."."""
    amount, label, start, second = re.search(
        r"([\d.]+) added at \[i, (\w+)_i\] for .*?i = (\d+), (\d+)", how).groups()
    labels = only(made, f"{label}s?")
    rows = np.arange(int(start), len(made[name]), int(second) - int(start))
    made[name][rows, labels[rows]] += np.float32(amount)


# ---- outputs that are compared in their own way --------------------------------------------------

class Tensorised(NamedTuple):
    """What tensor operations make of an image; `unit` (broadcastable) is its range of values."""
    value: object
    unit: object
    hue: bool


# ---- networks and labels -------------------------------------------------------------------------

def watch(modules):
    """{name: [what the module returned, call by call]}, filled as the network runs."""
    seen = {k: [] for k in modules}
    for k, m in modules.items():
        m.register_forward_hook(lambda _, __, y, k=k: seen[k].append(y))
    return seen


def runs(values):
    """[[value, how often in a row]]"""
    return [[k, len(list(g))] for k, g in itertools.groupby(values)]


def gradients(model):
    return {f"grad:{k}": p.grad for k, p in model.named_parameters()}
