"""`make bench`: how fast and how large, beside the alternatives, as ratios from one run.

    python tests/bench.py [--only decode,audio,augment,data,step,memory,scale,choices] [--out DIR]

One row per measurement: ours, a reference that ran in turn with it, their ratio (median of at
least five pairs), the ratio that must be reached, and whether it is. On the CPU one thread computes
and CPU seconds count. The table is Markdown; `bench.json` in --out has the figures of the parts
that have ended, with the least and the largest ratio. Readers that happen to be installed
(torchcodec, decord, OpenCV) are measured too. About 20 minutes on two cores, a few of them to make
the videos, which stay in --out. The exit status is 1 if a target is missed without an excuse, which
only limits of speed and memory can have, or if a measurement failed.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                           # before PyTorch is loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_cuda
import bench_media
import bench_runs
import bench_steps
import measure
import torch

import common

PARTS = {
    "decode": [bench_media.decode_rows, bench_media.prepare_rows],
    "audio": [bench_media.audio_rows],
    "augment": [bench_media.augment_rows],
    "data": [bench_runs.data_rows, bench_runs.wait_rows],
    "step": [bench_steps.step_rows, bench_steps.backbone_rows, bench_steps.attention_rows,
             bench_cuda.gpu_rows],
    "memory": [bench_media.open_rows, bench_steps.memory_rows],
    "scale": [bench_steps.frame_rows, bench_steps.batch_rows, bench_runs.rank_rows,
              bench_runs.list_rows, bench_runs.equality_rows],
    "choices": [bench_steps.choice_rows],
}
COLUMNS = ("what", "against", "ours", "reference", "ratio", "target", "met", "note")


def cells(row):
    """A row as texts, one per column."""
    def number(x):
        return "" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
    met = {None: "", True: "yes", False: "NO"}[row.met]
    return (row.what, row.against, f"{number(row.ours)} {row.unit}".strip(),
            f"{number(row.reference)} {row.unit}".strip() if row.reference is not None else "",
            number(row.ratio), "" if row.target is None else f"≤ {row.target:g}", met,
            "; ".join(filter(None, (row.note, row.excuse if row.met is False else ""))))


def survived(part, function, *arguments):
    """The rows of a function; an exception becomes the last one."""
    try:
        yield from function(*arguments)
    except (Exception, SystemExit) as e:
        yield measure.failed(part, f"{function.__name__} broke off", e)


def measured(part, args, took):
    """The rows of a part, printed as they come; took: gets the seconds of each function."""
    rows, functions = [], [*PARTS[part]]
    if part == "choices" and args.compile:
        functions.append(bench_steps.compile_rows)
    print(f"\n| {part}: " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|",
          flush=True)
    for function in functions:
        began = time.time()
        for row in survived(part, function, args.out.resolve(), args.repeats):
            rows.append(row)
            print("| " + " | ".join(c.replace("|", "/") for c in cells(row)) + " |", flush=True)
        took[function.__name__] = round(time.time() - began)
    return rows


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, prog="bench.py",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default=",".join(list(PARTS)[:-1]), metavar="PARTS",
                   help=f"some of {','.join(PARTS)} (all but choices: what the scripts do against "
                        "what they might, for networks of the paper's size)")
    p.add_argument("--repeats", type=int, default=measure.REPEATS,
                   help=f"pairs per comparison, at least {measure.REPEATS} ({measure.REPEATS})")
    p.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR",
                   help="for bench.json and the videos (runs/bench)")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile among the choices, some ten minutes more")
    args = p.parse_args(argv)
    if unknown := set(args.only.split(",")) - set(PARTS):
        p.exit(2, f"bench.py: --only {unknown.pop()}: is none of {','.join(PARTS)}\n")
    if args.repeats < measure.REPEATS:
        p.exit(2, f"bench.py: --repeats {args.repeats}: must be at least {measure.REPEATS}\n")
    return args


def main(argv=None):
    """The exit status."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    print(measure.machine())
    began, rows, done, took = time.time(), [], [], {}
    common.init_distributed()
    common.keep_memory()                                      # as every run on the CPU does
    for part in args.only.split(","):
        rows += measured(part, args, took)
        done.append(part)
        minutes = (time.time() - began) / 60
        common.write_json(args.out / "bench.json", {
            "machine": measure.machine(), "minutes": round(minutes, 1), "repeats": args.repeats,
            "parts": done, "seconds": took, "rows": [row.as_json() for row in rows]})
    print(f"\n{len(rows)} rows, {sum(row.met is not None for row in rows)} with a target, "
          f"{sum(row.met is False for row in rows)} missed; {minutes:.1f} minutes; "
          f"{args.out}/bench.json\nseconds: {', '.join(f'{k} {v}' for k, v in took.items())}")
    unexplained = [f"{row.what} {row.against}".strip() for row in rows if row.unexplained]
    print("missed without an excuse:", "; ".join(unexplained) or "none", flush=True)
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
