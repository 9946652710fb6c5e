"""`make bench`: how fast and how large, beside the alternatives, as ratios from one run.

    python tests/bench.py [--only decode,audio,augment,data,step,memory,scale] [--out runs/bench]

One row per measurement: ours, a reference that ran in turn with it, their ratio (median of at
least five pairs), the ratio that must be reached, and whether it is. On the CPU one thread computes
and CPU seconds count. The table is Markdown; `bench.json` in --out has the figures, with the least
and the largest ratio. Readers that happen to be installed (torchcodec, decord, OpenCV) are measured
too. About 15 minutes on two cores, a few of them to make the videos, which stay in --out.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                           # before PyTorch is loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
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
             bench_steps.choice_rows, bench_cuda.gpu_rows],
    "memory": [bench_media.open_rows, bench_steps.memory_rows],
    "scale": [bench_steps.frame_rows, bench_steps.batch_rows, bench_runs.rank_rows,
              bench_runs.equality_rows, bench_runs.list_rows],
}
COLUMNS = ("what", "against", "ours", "reference", "ratio", "target", "met", "note")


def cells(row):
    """A row as texts, one per column."""
    def number(x):
        return "" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
    met = {None: "", True: "yes", False: "NO"}[row.met]
    return (row.what, row.against, f"{number(row.ours)} {row.unit}".strip(),
            f"{number(row.reference)} {row.unit}".strip() if row.reference is not None else "",
            number(row.ratio), "" if row.target is None else f"≤ {row.target:g}", met, row.note)


def measured(parts, args):
    """The rows of the parts, printed as they come."""
    rows, folder = [], args.out.resolve()
    for part in parts:
        print(f"\n| {part}: " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|",
              flush=True)
        for row in itertools.chain(*(f(folder, args.repeats) for f in PARTS[part])):
            rows.append(row)
            print("| " + " | ".join(cells(row)) + " |", flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, prog="bench.py",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default=",".join(PARTS), metavar="PARTS",
                   help=f"some of {','.join(PARTS)} (all)")
    p.add_argument("--repeats", type=int, default=measure.REPEATS,
                   help=f"pairs per comparison, at least {measure.REPEATS} ({measure.REPEATS})")
    p.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR",
                   help="for bench.json and the videos (runs/bench)")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile among the choices, some ten minutes more")
    args = p.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        p.error(f"--only {unknown.pop()}: is none of {','.join(PARTS)}")
    if args.repeats < measure.REPEATS:
        p.error(f"--repeats {args.repeats}: must be at least {measure.REPEATS}")
    torch.set_num_threads(1)
    av.logging.set_level(av.logging.PANIC)                    # of broken files, opened on purpose
    args.out.mkdir(parents=True, exist_ok=True)
    print(measure.machine())
    began = time.time()
    if args.compile:
        PARTS["step"].append(bench_steps.compile_rows)
    common.init_distributed()
    rows = measured(parts, args)
    minutes = (time.time() - began) / 60
    missed = [row for row in rows if row.met is False]
    common.write_json(args.out / "bench.json", {
        "machine": measure.machine(), "minutes": round(minutes, 1), "repeats": args.repeats,
        "rows": [{**row._asdict(), "met": row.met} for row in rows]})
    print(f"\n{len(rows)} rows, {sum(row.met is not None for row in rows)} with a target, "
          f"{len(missed)} missed; {minutes:.1f} minutes; {args.out}/bench.json")
    if unexplained := [row for row in missed if not row.note]:
        sys.exit("missed without a reason: " + "; ".join(row.what for row in unexplained))


if __name__ == "__main__":
    main()
