"""How `make bench` measures: jobs in turn within one process, memory in fresh ones, one row each.

On the CPU one thread computes and CPU seconds count, so that other programs disturb little; for
steps on CUDA seconds of the clock, after all kernels have ended. Ratios, not seconds, carry over to
other machines, hence most rows have a reference that ran in turn with ours.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

CUDA = torch.cuda.is_available()
REPEATS = 5                                                   # of every comparison, at least


class Row(NamedTuple):
    """One line of the table. ratio = ours / reference, the median over paired repeats.

    target  the ratio that must be reached, at most; None: for information
    low, high  least and largest ratio of the repeats
    note    what the row needs to be understood
    excuse  why the target is where it is and may be missed; rows of correctness never have one
    """
    part: str
    what: str
    against: str
    ours: float
    reference: float | None
    unit: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    target: float | None = None
    note: str = ""
    excuse: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return (self.ours if self.ratio is None else self.ratio) <= self.target

    @property
    def unexplained(self) -> bool:
        """A target is missed, NaN included, without an excuse: the run fails."""
        return self.met is False and not self.excuse

    def as_json(self) -> dict:
        """What `write_json` takes: NaN and Inf as texts."""
        values = {**self._asdict(), "met": self.met}
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in values.items()}


def failed(part: str, what: str, error: BaseException) -> Row:
    """The row of what an exception ended: a target that is missed."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return Row(part, what, "", math.nan, None, "", target=0,
               note=words if len(words) < 300 else f"{words[:140]} ... {words[-140:]}")


def now() -> float:
    """Seconds that count: of this process's CPU time, or of the clock once the GPU has ended."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def paired(*jobs: Callable[[], Any], repeats: int = REPEATS, least: float = 0.03,
           warm: int = 1, first: int = 0, clock: Callable[[], float] = now) -> list[list[float]]:
    """Seconds per call: one list per repeat with one figure per job; the jobs take turns.

    Every figure is the mean of as many calls as last `least` seconds (0: of one call); `warm` calls
    of each job come first and do not count. The order of the jobs changes from repeat to repeat,
    beginning with number `first` of them. clock: what tells the seconds.
    """
    def seconds(job, n):
        began = clock()
        for _ in range(n):
            job()
        return (clock() - began) / n

    calls = [1] * len(jobs)
    for k, job in enumerate(jobs):
        took = sum(seconds(job, 1) for _ in range(warm))
        if least and took < 10 * least:                       # a first call is a slow one
            calls[k] = max(1, int(least / max(seconds(job, 1), 1e-7)))
    table = []
    for r in range(first, first + repeats):
        row = [0.0] * len(jobs)
        for k in sorted(range(len(jobs)), key=lambda k: (k - r) % len(jobs)):
            gc.collect()
            row[k] = seconds(jobs[k], calls[k])
        table.append(row)
    return table


cpu_paired = partial(paired, clock=time.process_time)         # of what never runs on a GPU


def compare(part: str, what: str, table: Sequence[Sequence[float]], against: str, k: int = 1,
            target: float | None = None, note: str = "", excuse: str = "", ours: int = 0) -> Row:
    """The row of job `ours` against job k of a table of `paired`."""
    ratios = [row[ours] / row[k] for row in table]
    return Row(part, what, against, 1e3 * statistics.median(row[ours] for row in table),
               1e3 * statistics.median(row[k] for row in table), "ms",
               statistics.median(ratios), min(ratios), max(ratios), target, note, excuse)


# ---- memory ----------------------------------------------------------------------------------

def resident(kind: str = "VmRSS") -> float:
    """MB of this process now, or VmHWM: at most since `forget_peak`. Not Linux: at most ever."""
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(kind)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin"
                                                                 else 1024)


def forget_peak() -> None:
    """Let VmHWM begin anew, where Linux allows it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def growth(job: Callable[[], Any]) -> float:
    """MB by which the process grows at most while a job runs (CUDA: memory of tensors)."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    forget_peak()
    before = resident()
    job()
    return resident("VmHWM") - before


def left_open() -> tuple[int, int]:
    """(file descriptors, threads) of this process."""
    try:
        files = len(os.listdir("/proc/self/fd"))
    except OSError:
        files = 0
    return files, threading.active_count()


def fresh(function: Callable, *arguments: Any) -> Any:
    """function(*arguments) in a process of its own, on one thread; both must be picklable. Raises
    if the process dies.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), one_thread) as pool:
        return pool.submit(function, *arguments).result()


def one_thread() -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def without_gpu():
    """Processes that are started within see no GPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


# ---- the machine -----------------------------------------------------------------------------

def busy(cores: int) -> str:
    """The excuse of a row that needs so many cores to itself, if others keep them busy."""
    with contextlib.suppress(OSError):
        others = max(0.0, os.getloadavg()[0] - 1)             # one is this process
        if os.cpu_count() - others < cores - 0.5:
            return (f"needs {cores} idle cores; of {os.cpu_count()} others kept {others:.1f} busy "
                    "before it")
    return ""


def machine() -> str:
    """Processor, cores, GPU and versions, in one line."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as f:
        name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    gpu = torch.cuda.get_device_name() if CUDA else "no GPU"
    versions = " ".join(f"{k} {v}" for k, v in common.versions().items())
    return f"{name}, {os.cpu_count()} cores, {gpu}; {versions}"
