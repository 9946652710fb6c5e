"""Faults on purpose: what is promised for killed runs, bad files, full disks and many machines.

    make faults                                  everything; meant for half an hour on two cores
    python tests/faults.py --only kill,media     some parts; --help lists them

One line per promise while it runs, then a table; all figures go to faults.json. Exit
status 1 if a promise was broken: the line says how, and its --seed breaks it again.
"""

import argparse
import importlib
import importlib.util
import json
import shutil
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


def guarded(part, folder, seed):
    """The rows of a part; one that ends with an exception is a promise broken."""
    try:
        yield from PARTS[part](folder, seed, True)
    except Exception as e:
        yield Row(f"{part}: the harness itself", {}, [f"{type(e).__name__}: {e}",
                                                      traceback.format_exc()])


def figures(row):
    return ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.3g}"
                     for k, v in row.figures.items())


def table(rows):
    """The README's table: promise, figures, whether it held."""
    yield "| part | promise | figures | held |"
    yield "| --- | --- | --- | --- |"
    for part, row in rows:
        yield f"| {part} | {row.promise} | {figures(row)} | {'no' if row.failed else 'yes'} |"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", metavar="PART,...", default=",".join(PARTS),
                   help=f"of {', '.join(PARTS)}")
    p.add_argument("--seed", type=int, default=None, help="of all random choices; else the clock")
    p.add_argument("--out", type=Path, default=None, metavar="DIR",
                   help="work there and leave it all; else runs/faults.json stays")
    args = p.parse_args(argv)
    parts = [x for x in args.only.split(",") if x]
    strange = sorted(set(parts) - set(PARTS))
    if strange or not parts:
        p.error(f"--only {args.only}: choose of {', '.join(PARTS)}")
    seed = int(time.time()) if args.seed is None else args.seed
    work = Path(tempfile.mkdtemp(prefix="faults")) if args.out is None else args.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, in {work}", flush=True)

    rows, began = [], time.monotonic()
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
    minutes = (time.monotonic() - began) / 60
    broken = sum(bool(row.failed) for _, row in rows)
    print(*table(rows), f"{len(rows)} promises, {broken} broken, {minutes:.1f} minutes", sep="\n")
    results = (args.out or Path("runs")) / "faults.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps({
        "seed": seed, "minutes": round(minutes, 1),
        "rows": [{"part": part, **row._asdict()} for part, row in rows]}, indent=1) + "\n")
    if args.out is None and not broken:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if broken or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
