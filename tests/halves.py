"""Every test, in two pytest processes side by side; what each prints comes when it has ended.

    python tests/halves.py [flags of pytest]
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = {"test_faults": 350, "test_replai": 150, "test_ego4d": 150, "test_parity": 140,
           "test_f2c_oops": 130, "test_readme": 130, "test_ssdet_coarsefine": 110, "test_toy": 110,
           "test_cpctrans": 90, "test_prepare": 60, "test_ssdet_method": 60, "test_media": 55,
           "test_study": 30, "test_fault_files": 20, "test_lists": 20, "test_bench": 15,
           "test_fault_limits": 10, "test_fault_runs": 5, "test_help": 5,
           "test_pictures": 5}                                # about, of one core; for the balance


def halves():
    """Two lists of test files of about the same duration."""
    lists, loads = ([], []), [0, 0]
    files = sorted(HERE.glob("test_*.py"), key=lambda f: (-SECONDS.get(f.stem, 60), f.name))
    for file in files:
        lighter = loads.index(min(loads))
        lists[lighter].append(str(file))
        loads[lighter] += SECONDS.get(file.stem, 60)
    return lists


def main(flags):
    began, running = time.time(), []
    for files in halves():
        out = tempfile.TemporaryFile("w+")                    # a pipe would fill and block
        running.append((files, out, subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, *files],
            stdout=out, stderr=subprocess.STDOUT, cwd=HERE.parent)))
    codes = []
    for files, out, process in running:
        codes.append(process.wait())
        out.seek(0)
        print(" ".join(Path(f).stem for f in files), out.read(), sep="\n", flush=True)
    print(f"two halves ended with {codes} after {time.time() - began:.0f} s")
    return max(map(abs, codes))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
