"""The README's commands run, in its order, on tiny videos; what it names exists.

A command runs as printed, in a folder where data/NAME and data/toy/NAME are the small world, with
flags behind it that make everything small (SMALL). Names in capitals and of released files stand
for files that commands before it have left (STANDS_FOR).
"""

import importlib
import re
import shutil
import sys

import demo
import pytest
import running

import common

TEXT = (running.REPO / "README.md").read_text()
SCRIPTS = ("replai", "cpctrans", "f2c_oops", "ssdet_coarsefine")
FEW = "--tiny --workers 0 --log_every 1"
SMALL = {  # script: flags of every command, flags of those that train
    "replai": (f"{FEW} --crop 32", "--epochs 1 --batch_size 4 --limit 4"),
    "cpctrans": (FEW, "--epochs 1 --batch_size 4 --limit 8"),
    "f2c_oops": (FEW, "--epochs 1 --batch_size 4 --limit 4"),
    "ssdet_coarsefine": (f"{FEW} --crop 32 --num_frames 8 --limit 4",
                         "--epochs 1 --batch_size 4 --bn_splits 1")}
PREPARING = ("moments", "convert", "features", "extract", "localize", "evaluate", "test")
STANDS_FOR = dict.fromkeys(("BG.pt", "MU.pt", "CM.pt"),
                           "runs/ssdet_coarsefine_charades_finetune_coarse/best.pt")


def commands(script):
    """The flags of each command of a script, in the README's order, none twice."""
    text = re.sub(r"\\\n\s*", " ", TEXT)
    quoted = [x for pair in re.findall(r"^```\n(.*?)^```|`([^`\n]+)`", text, re.M | re.S)
              for x in pair]
    lines = [line for x in quoted for line in x.splitlines()]
    form = rf"(python |(?:srun .*)?torchrun .*?)?{script}\.py((?: +[^\s#]+)*)"
    found = [re.fullmatch(form + r"(?:\s+#.*)?", line.strip()) for line in lines]
    return list(dict.fromkeys(" ".join(m[2].split()) for m in found if m and (m[1] or m[2])))


@pytest.fixture(scope="module")
def place(data, tmp_path_factory):
    """A folder with data/NAME and data/toy/NAME, as after `make toy`."""
    root = tmp_path_factory.mktemp("readme")
    (root / "data" / "toy").mkdir(parents=True)
    for folder in (d for d in data.iterdir() if d.is_dir()):
        shutil.copytree(folder, root / "data" / folder.name, symlinks=True, copy_function=linked)
        (root / "data" / "toy" / folder.name).symlink_to(root / "data" / folder.name)
    return root


def linked(source, target):
    target = running.Path(target)
    target.hardlink_to(source)
    return target


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_runs(script, place, monkeypatch):
    module, stages, failed = importlib.import_module(script), set(), []
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])        # of which --out is made
    for flags in commands(script):
        pretrained = {"cpctrans": "runs/cpctrans_ucf101_pretrain/best.pt"}.get(
            script, f"runs/{script}_ego4d_pretrain/last.pt")
        words = [STANDS_FOR.get(w, w).replace("FILE", pretrained) for w in flags.split()]
        every, training = SMALL[script]
        args = module.parse_args([*words, "--tiny"])
        words += every.split() + (training.split() if args.stage not in PREPARING else [])
        stages.add(args.stage)
        shutil.rmtree(place / args.out, ignore_errors=True)   # of a command with other flags
        result = running.quick(script, *words, cwd=place)
        if result.code or not (place / args.out).is_dir():
            failed.append(f"{script}.py {flags}\n    {result.err.strip()[-500:]}")
        for path in (place / args.out).glob("localization.txt"):          # for --submission
            shutil.copy(path, place)
    assert not failed, "\n".join(failed)
    assert stages == set(module.STAGES)


def test_the_original_commands_of_cpctrans_are_understood(monkeypatch):
    module = importlib.import_module("cpctrans")
    monkeypatch.setattr(sys, "argv", ["cpctrans.py"])
    first, *others = re.findall(r"`python (?:main|test)\.py( [^`]+)`", TEXT)
    assert module.parse_args(first.split()) == module.parse_args([])
    for flags in others:
        module.parse_args(re.sub(r"\.\.\.|\{model\}", "", flags.replace("{model}", "none")).split())


def flags_of(script, *words):
    """{flag: help text} of a script."""
    found = {}
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit):
        m.setattr(common.Parser, "print_help", lambda p, *_: found.update(
            (flag, a.help) for a in p._actions for flag in a.option_strings))
        importlib.import_module(script).parse_args([*words, "--help"])
    return found


def test_every_flag_that_the_readme_names_exists():
    known = {flag for script in SCRIPTS for flag in flags_of(script)}
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint",
              "--max_restarts", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time",
              "--cpus-per-task", "--requeue", "--kill-on-bad-exit", "--shm-size", "--seeds"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT))
    assert len(named) > 40 and named <= known | others, named - known - others


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text_and_docstrings_hold_commands(script, monkeypatch):
    texts, module = flags_of(script), importlib.import_module(script)
    assert 25 < len({*texts.values()}) <= 35 and all(texts.values())      # 34 and --help
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    lines = re.findall(rf"{script}\.py((?: +[^\s,]+)*?)(?: {{2,}}|,|\n|$)", module.__doc__)
    assert len(lines) >= 4
    for line in lines:
        module.parse_args(line.split())


def test_the_commands_of_the_demo_are_understood(tmp_path):
    for script in demo.STEPS:
        for name, (_, *flags) in demo.steps(script, tmp_path, 0):
            if not name.startswith("toy_"):
                args = importlib.import_module(script).parse_args(flags)
                assert args.tiny and args.out == tmp_path / name


def test_files_sections_and_targets_that_the_readme_names_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (running.REPO / link).exists(), link
    titles = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-")
              for t in re.findall(r"^#+ (.+)", TEXT, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= titles
    makefile = (running.REPO / "Makefile").read_text()
    assert set(re.findall(r"make (toy|demo|test|bench|install)\b", TEXT)) <= set(
        re.findall(r"^(\w+):", makefile, re.M))
    assert len(TEXT.splitlines()) <= 441
