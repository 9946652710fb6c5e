"""Every command that README prints is run, in its order, on tiny videos; flags that it names exist.

The commands run as printed, on data under the folders that they name by default, with flags behind
them that make everything small: see SMALLER. A name in capitals stands for a file or a number: see
STANDS_FOR. So a flag that has gone, a default that does not find the run before it, or a file that
is called otherwise, fails here.
"""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import running
import world as small

import common

TEXT = (running.REPO / "README.md").read_text()
SCRIPTS = ("replai", "cpctrans", "f2c_oops", "ssdet_coarsefine")
FEW = "--tiny --workers 0 --log_every 1 --epochs 1"
SMALLER = {
    "replai": f"{FEW} --crop 32 --width 8 --groups 2 --batch_size 6 --limit 12",
    "cpctrans": f"{FEW} --batch_size 4 --limit 4",
    "f2c_oops": f"{FEW} --batch_size 4",
    "ssdet_coarsefine": f"{FEW} --crop 32 --num_frames 8 --groups 2 --batch_size 4 --limit 8"}
STANDS_FOR = {
    "S": "0", "CKPT": "runs/replai_ego4d_pretrain/last.pt", "DIR": "runs/DIR", "SRC": "data/videos",
    "DST": "data/prepared", "runs/ROW/last.pt": "runs/replai_ego4d_pretrain/last.pt",
    "runs/ROW_STAGE": "runs/row_statechange",
    "SPLIT1/best.pt": "runs/cpctrans_ucf101_finetune/best.pt", "SPLIT2/best.pt": "",
    "SPLIT3/best.pt": "",                                     # one of each split is asked for
    **dict.fromkeys(("BG.pt", "MU.pt", "CM.pt"),
                    "runs/ssdet_coarsefine_charades_finetune_coarse/best.pt"),
    "fine_charades_039000_SAVE.pt": "runs/ssdet_coarsefine_charades_finetune_fine/best.pt",
    "localization.txt": "runs/ssdet_coarsefine_charades_evaluate_coarse/localization.txt"}
LEFT_OUT = {"--model", "--prefix", "--print_freq", "--reset_lr", "--resume", "--start_epoch"}


def commands():
    """[(script, flags)], those in sentences and tables first, none twice; `... FLAGS` adds to the
    command before it.
    """
    text, found, before = re.sub(r"\\\n\s*", " ", TEXT), {}, None
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S))
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```", "", text, flags=re.M | re.S))
    for line in [*inline, *blocks.splitlines()]:
        line = re.split(r"\s+#|, then ", line)[0].strip()
        m = re.match(r"((?:\S*/)?python |(?:srun .*)?torchrun |)(?:.* )?(tests/)?(\w+)\.py(.*)",
                     line)
        if m and (m[1] or m[4]) and (running.REPO / f"{m[2] or ''}{m[3]}.py").exists():
            before = (m[2] or "") + m[3], " ".join(m[4].split())
            found[before] = True
        elif line.startswith("... --") and before:
            found[before[0], f"{before[1]} {line[4:]}".strip()] = True
    return [c for c in found if c not in (("common", "prepare"),)]


COMMANDS = commands()


def of(script):
    return [flags for s, flags in COMMANDS if s == script]


def stages(script):
    """The choices of --stage, the default first."""
    found = []
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit):
        m.setattr(common.Parser, "print_help", lambda p: found.extend(
            next(a.choices for a in p._actions if a.dest == "stage")))
        importlib.import_module(script).parse_args(["--help"])
    return found


def test_the_commands_are_found():
    """As many as README has, about; and every stage of every script is among them."""
    assert {s: len(of(s)) for s in ("common", *SCRIPTS)} == pytest.approx(
        {"common": 1, "replai": 29, "cpctrans": 13, "f2c_oops": 25, "ssdet_coarsefine": 24},
        rel=0.3)
    for script in SCRIPTS:
        said = " ".join(of(script))
        for stage in stages(script)[1:]:
            assert f"--stage {stage}" in said or stage in ("finetune", "test") and (
                "--pretrain" in said and "--test" in said), (script, stage)


@pytest.fixture(scope="module")
def place(tmp_path_factory, multithumos):
    """A folder with data/NAME and data/toy/NAME, as after `make toy`."""
    root = tmp_path_factory.mktemp("readme")
    world = small.make(root / "world")
    (root / "data" / "toy").mkdir(parents=True)
    for name in ("epic", "ego4d", "ucf101", "oops", "kinetics400", "charades", "videos"):
        (root / "data" / name).symlink_to(world / name)
        (root / "data" / "toy" / name).symlink_to(world / name)
    for where in ("data", "data/toy"):
        (root / where / "multithumos").symlink_to(multithumos)
    for k in range(small.ITEMS):                       # to pre-train on
        (world / "ego4d" / f"v{k}.mp4").hardlink_to(world / "videos" / f"v{k}.mp4")
    return root


def filled(flags):
    """The flags with what the names in capitals stand for."""
    return [w for w in (STANDS_FOR.get(w, w) for w in flags.split()) if w]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_runs(script, place, monkeypatch):
    module, failed = importlib.import_module(script), []
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])        # of which --out is made
    for flags in of(script):
        words = filled(f"{flags} statechange" if flags.endswith("--stage") else flags)
        if "--help" in words:
            continue
        args = module.parse_args([*words, *SMALLER[script].split()])
        shutil.rmtree(place / args.out, ignore_errors=True)   # of a command with other flags
        r = running.quick(script, *words, *SMALLER[script].split(), cwd=place)
        if r.code or not (place / args.out).is_dir():
            failed.append(f"{script}.py {' '.join(words)}\n    {r.err.strip()[-600:]}")
    assert not failed, "\n".join(failed)


def test_the_tools_understand_their_commands(place):
    for script, flags in COMMANDS:
        if script == "common":
            r = running.command(*filled(flags), cwd=place, script="common")
            assert r.code == 0 and (place / "data/prepared/v0.mp4").exists(), r
        elif script.startswith("tests/") and script != "tests/toy":
            importlib.import_module(script[6:]).parse_args(flags.split())
    targets = re.findall(r"^(\w+):", Path(running.REPO / "Makefile").read_text(), re.M)
    named = set(re.findall(r"^make (\w+)|`make (\w+)", TEXT, re.M))
    assert len(named) > 4 and {a or b for a, b in named} <= {*targets}


def test_every_flag_that_readme_names_exists():
    """Of a script, torchrun, SLURM, or a tool; those of an original that are left out do not."""
    known = set()
    for script in SCRIPTS:
        with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit):
            m.setattr(common.Parser, "print_help", lambda p: known.update(
                flag for a in p._actions for flag in a.option_strings))
            importlib.import_module(script).parse_args(["--help"])
    assert not known & LEFT_OUT
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id",
              "--max_restarts", "--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node",
              "--cpus-per-task", "--time", "--requeue", "--open-mode", "--signal", "--shm-size",
              "--only", "--seeds", "--list", "--short_side", "--pictures"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - LEFT_OUT
    assert len(named) > 60 and named <= known | others, named - known - others


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_the_docstrings_are_understood(script):
    module = importlib.import_module(script)
    text = re.sub(r"\n {13,}(?=--)", " ", module.__doc__).replace(", then", "\n")
    lines = re.findall(rf"{script}\.py((?: +\S+)*?)(?:  |\n|$)", text)
    assert len(lines) >= 3
    for line in lines:
        module.parse_args(line.split())
