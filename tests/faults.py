"""Faults on purpose: what is promised for killed runs, bad files, full disks and many machines.

    make faults                                  everything; some twenty minutes on two cores
    python tests/faults.py --only kill,media     some parts; --help lists them

One line per promise while it runs, then a table; all figures go to faults.json. Two lanes of parts
run side by side. Exit status 1 if a promise was broken: the line says how, and its --seed breaks it
again.
"""

import argparse
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from fault_rows import Row

PARTS = {}
for module in ("fault_runs", "fault_files", "fault_limits"):
    if importlib.util.find_spec(module):
        PARTS |= importlib.import_module(module).PARTS
LANES = (("kill", "sigterm", "torchrun"),                     # what these have done undisturbed,
         ("media", "annotations", "hostile", "disk", "numbers", "equality"))  # they share


def guarded(part, folder, seed):
    """The rows of a part; one that ends with an exception is a promise broken."""
    try:
        yield from PARTS[part](folder, seed, True)
    except Exception as e:
        yield Row(f"{part}: the harness itself", {}, [f"{type(e).__name__}: {e}",
                                                      traceback.format_exc()])


def run(parts, work, seed):
    """[(part, row)] of parts, one after the other, each told when it is known."""
    rows = []
    for part in parts:
        folder = work / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        last = time.monotonic()
        for row in guarded(part, folder, seed):
            rows.append((part, row))
            print(f"{'BROKEN' if row.failed else 'held'}  {part}: {row.promise}  ({figures(row)}; "
                  f"{time.monotonic() - last:.0f} s)", *row.failed, sep="\n    ", flush=True)
            last = time.monotonic()
    return rows


def side_by_side(lanes, work, seed):
    """As `run`, each lane in a process of its own."""
    rows, started = [], []
    for k, parts in enumerate(lanes):
        (work / f"lane{k}" / "faults.json").unlink(missing_ok=True)           # of an earlier run
        started.append(subprocess.Popen([
            sys.executable, __file__, "--only", ",".join(parts), "--seed", str(seed), "--out",
            str(work / f"lane{k}"), "--lane"]))
    for k, (parts, process) in enumerate(zip(lanes, started)):
        code, file = process.wait(), work / f"lane{k}" / "faults.json"
        if not file.exists():
            rows.append((parts[0], Row("the harness itself", {}, [f"{parts}: ended with {code}"])))
            continue
        rows += [(row.pop("part"), Row(**row)) for row in json.loads(file.read_text())["rows"]]
    return rows


def figures(row):
    return ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.3g}"
                     for k, v in row.figures.items())


def table(rows):
    """The README's table: promise, figures, whether it held."""
    yield "| part | promise | figures | held |"
    yield "| --- | --- | --- | --- |"
    for part, row in rows:
        yield f"| {part} | {row.promise} | {figures(row)} | {'no' if row.failed else 'yes'} |"


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", metavar="PART,...", default=",".join(PARTS),
                   help=f"of {', '.join(PARTS)}")
    p.add_argument("--seed", type=int, default=None, help="of all random choices; else the clock")
    p.add_argument("--out", type=Path, default=None, metavar="DIR",
                   help="work there and leave it all; else runs/faults.json stays")
    p.add_argument("--lane", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    args.parts = [x for x in args.only.split(",") if x]
    if not args.parts or not set(args.parts) <= set(PARTS):
        p.error(f"--only {args.only}: choose of {', '.join(PARTS)}")
    return args


def main(argv=None):
    """The exit status."""
    args = parse_args(argv)
    parts = args.parts
    seed = int(time.time()) if args.seed is None else args.seed
    work = Path(tempfile.mkdtemp(prefix="faults")) if args.out is None else args.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    lanes, began = [[x for x in lane if x in parts] for lane in LANES], time.monotonic()
    if not args.lane:
        print(f"seed {seed}, in {work}", flush=True)
    if all(lanes):
        rows = side_by_side(lanes, work, seed)
    else:
        rows = run(parts, work, seed)
    minutes = (time.monotonic() - began) / 60
    broken = sum(bool(row.failed) for _, row in rows)
    if not args.lane:
        print(*table(rows), f"{len(rows)} promises, {broken} broken, {minutes:.1f} minutes",
              sep="\n")
    results = (args.out or Path("runs")) / "faults.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({
        "seed": seed, "minutes": round(minutes, 1),
        "rows": [{"part": part, **row._asdict()} for part, row in rows]}, indent=1) + "\n")
    if args.out is None and not broken:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if broken or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
