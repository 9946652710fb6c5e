"""`make demo`: the four papers at toy size, from drawing the videos to a table and pictures.

    python tests/demo.py                      once, six minutes on two cores
    python tests/demo.py --seeds 0 1 2        three times, other videos each time: mean ± error

Each paper is a list of command lines, run one after the other; papers and seeds run side by side,
one per core. Both sides of a comparison have the same labelled videos, number of steps and learning
rate; these were chosen on toys of other seeds. Measured is the last epoch, as so few validation
videos choose one by luck, but for Ego4D the best, as in the paper. What a step prints is in
OUT/SEED/NAME.log. The same command continues; after a change of the code remove OUT.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
STATE = "--stage statechange --dataset ego4d --data TOY/ego4d --epochs 8"
CHARADES = "--dataset charades --data TOY/charades"
FINE = f"--stage finetune {CHARADES} --stream fine --epochs 16"
MAPS = f"{CHARADES} --features OUT/ssdet_features"
OOPS = "--data TOY/oops --features OUT/f2c_features"
VIDEO = f"--stage classify {OOPS} --level video"
STEPS = {  # script: (toy datasets, name and flags of each step); longest first
    "replai": ("ego4d epic", f"""
replai_pretrain --dataset ego4d --data TOY/ego4d --epochs 30
replai_verbs --stage linear --dataset epic --data TOY/epic --init OUT/replai_pretrain/last.pt
replai_verbs_scratch --stage linear --dataset epic --data TOY/epic --init none
replai_state {STATE} --init OUT/replai_pretrain/last.pt
replai_state_scratch {STATE} --init none"""),
    "ssdet_coarsefine": ("kinetics400 charades", f"""
ssdet --data TOY/kinetics400 --iters 320
ssdet_fine {FINE} --init OUT/ssdet/last.pt
ssdet_fine_scratch {FINE} --init none
ssdet_extract --stage extract {MAPS} --init OUT/ssdet_fine/last.pt
ssdet_coarse --stage finetune {MAPS} --stream coarse --epochs 16 --init OUT/ssdet/last.pt
ssdet_test --stage evaluate {MAPS} --init OUT/ssdet_coarse/last.pt"""),
    "cpctrans": ("ucf101", """
cpc --data TOY/ucf101 --attn frame --epochs 60
cpc_tuned --data TOY/ucf101 --limit 64 --epochs 100 --pretrain OUT/cpc/best.pt
cpc_scratch --data TOY/ucf101 --limit 64 --epochs 100 --attn frame --pretrain random
cpc_test --data TOY/ucf101 --test OUT/cpc_tuned/last.pt
cpc_test_scratch --data TOY/ucf101 --test OUT/cpc_scratch/last.pt"""),
    "f2c_oops": ("oops", f"""
f2c_extract {OOPS} --stage features
f2c {OOPS} --epochs 30
f2c2v {OOPS} --stage f2c2v --epochs 12 --init OUT/f2c/last.pt
f2c_video {VIDEO} --init OUT/f2c2v/last.pt
f2c_video_scratch {VIDEO} --init none --finetune_frames
f2c_test {OOPS} --stage evaluate --init OUT/f2c_video/last.pt
f2c_test_scratch {OOPS} --stage evaluate --init OUT/f2c_video_scratch/last.pt""")}
FIGURES = [  # paper, what is measured, key of metrics.json, pre-trained, scratch, chance
    ("CPCTrans", "UCF101, top-1, %", "top1", "cpc_test", "cpc_test_scratch", 12.5),
    ("F2C2V", "Oops!, clips of 1 s, accuracy, %", "top1_1s", "f2c_test", "f2c_test_scratch", None),
    ("F2C2V", "Oops!, transition found within 1 s, %", "within_1s", "f2c_test", "f2c_test_scratch",
     "chance_within_1s"),
    ("SSDet", "Charades, fine stream, mAP at 25 times, %", "val_mAP_25", "ssdet_fine",
     "ssdet_fine_scratch", None),
    ("Coarse-Fine", "Charades, mAP at 25 times, %", "mAP_25", "ssdet_test", None, None),
    ("RepLAI", "EPIC, verbs from a frozen network, %", "verb@1", "replai_verbs",
     "replai_verbs_scratch", 100 / 6),
    ("RepLAI", "EPIC, nouns from a frozen network, %", "noun@1", "replai_verbs",
     "replai_verbs_scratch", 25.0),
    ("RepLAI", "Ego4D, change of state, accuracy, %", "StCC acc", "replai_state",
     "replai_state_scratch", 50.0),
    ("RepLAI", "Ego4D, error of the key frame, s", "PNR err (s)", "replai_state",
     "replai_state_scratch", None)]
PICTURES = {  # name in the README: (file, pixels from the top)
    "replai": ("replai_pretrain/moments.png", 700), "f2c": ("f2c_test/timeline.png", 540),
    "ssdet": ("ssdet_test/timeline.png", 480), "cpctrans": ("cpc_test/retrieval.png", 500)}


def steps(script, out, seed):
    """[(name, words of the command line)] of a paper; OUT is the seed's folder."""
    toys, lines = STEPS[script]
    found = [(f"toy_{script}", "tests/toy.py", f"{toys} --workers 1 --out TOY".split())]
    for name, *flags in map(str.split, lines.strip().splitlines()):
        found.append((name, f"{script}.py", [*flags, "--tiny", "--out", f"OUT/{name}"]))
    folders = {"TOY": str(out / "toy"), "OUT": str(out)}
    return [(name, [str(REPO / file), *(folders.get(word[:3], word[:3]) + word[3:]
                                        for word in flags), "--seed", str(seed)])
            for name, file, flags in found]


def run(script, out, seed):
    """Run the steps of a paper; the name of the one that failed, or None."""
    for name, words in steps(script, out, seed):
        log, done, began = out / f"{name}.log", out / f"{name}.done", time.time()
        if done.exists():
            continue
        with open(log, "w") as f:
            code = subprocess.run([sys.executable, *words], stdout=f, stderr=subprocess.STDOUT,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        took = f"{script}, seed {seed}: {name} {'FAILED after' if code else 'took'}"
        print(f"{took} {time.time() - began:.0f} s" + f", see {log}" * bool(code), flush=True)
        if code:
            return name
        done.touch()
    return None


def values(out, seeds, name, key):
    """This metric of each seed's run, of those that have it."""
    paths = [out / str(seed) / name / "metrics.json" for seed in seeds]
    found = [json.loads(path.read_text()).get(key) for path in paths if path.exists()]
    return [x for x in found if x is not None]


def number(x):
    """The mean ± standard error of several values, a value, or "" of none."""
    if not x:
        return ""
    form = ".2f" if statistics.fmean(x) < 5 else ".1f"
    error = f" ± {statistics.stdev(x) / math.sqrt(len(x)):{form}}" if len(x) > 1 else ""
    return f"{statistics.fmean(x):{form}}{error}"


def table(out, seeds):
    """FIGURES with their numbers, as Markdown."""
    lines = ["| Paper | Measured on the toy version of | Pre-trained | From scratch | Chance |",
             "| --- " * 5 + "|"]
    for paper, what, key, trained, scratch, chance in FIGURES:
        cells = [values(out, seeds, name, key) if name else [] for name in (trained, scratch)]
        cells.append(values(out, seeds, trained, chance) if isinstance(chance, str) else
                     [chance] if chance else [])
        lines.append("| " + " | ".join((paper, what, *map(number, cells))) + " |")
    return "\n".join(lines)


def copy_pictures(out, folder):
    """The top of each picture, in few colours, for the README."""
    from PIL import Image
    for name, (path, height) in PICTURES.items():
        image = Image.open(out / path).convert("RGB")
        image = image.crop((0, 0, image.width, min(height, image.height)))
        image.quantize(64).save(folder / f"{name}.png", optimize=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of everything each")
    p.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="SCRIPT")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    p.add_argument("--list", action="store_true", help="print the command lines, run nothing")
    p.add_argument("--pictures", type=Path, metavar="DIR", help="copy the README's pictures to DIR")
    args = p.parse_args(argv)
    todo = [(script, args.out.resolve() / str(s), s) for s in args.seeds for script in args.only]
    if args.list:
        print("\n".join(" ".join(words) for t in todo for _, words in steps(*t)))
        return 0
    for _, out, _ in todo:
        out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [name for name in pool.map(lambda t: run(*t), todo) if name]
    print(f"\n{table(args.out, args.seeds)}\n\n{(time.time() - began) / 60:.1f} minutes; pictures:")
    print("\n".join(str(args.out / str(args.seeds[0]) / path) for path, _ in PICTURES.values()))
    if args.pictures:
        copy_pictures(args.out / str(args.seeds[0]), args.pictures)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
