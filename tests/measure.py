"""How `make bench` measures: jobs in turn within one process, memory in fresh ones, one row each.

On the CPU one thread computes and CPU seconds count, so that other programs disturb little; on
CUDA seconds of the clock, after all kernels have ended. Ratios, not seconds, carry over to other
machines, hence every row has a reference that ran in turn with ours.
"""

import contextlib
import gc
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import threading
import time
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
    note    why a target is missed, or what the row needs to be understood
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

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return (self.ours if self.ratio is None else self.ratio) <= self.target


def now() -> float:
    """Seconds that count: of this process's CPU time, or of the clock once the GPU has ended."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def paired(*jobs: Callable[[], Any], repeats: int = REPEATS, least: float = 0.03,
           warm: int = 1) -> list[list[float]]:
    """Seconds per call: one list per repeat with one figure per job; the jobs take turns.

    Every figure is the mean of as many calls as last `least` seconds (0: of one call); `warm` calls
    of each job come first and do not count. The order of the jobs changes from repeat to repeat.
    """
    calls = [1] * len(jobs)
    for k, job in enumerate(jobs):
        for _ in range(warm):
            job()
        if least:
            began = now()
            job()
            calls[k] = max(1, int(least / max(now() - began, 1e-7)))
    table = []
    for r in range(repeats):
        row = [0.0] * len(jobs)
        for k in sorted(range(len(jobs)), key=lambda k: (k + r) % len(jobs)):
            gc.collect()
            began = now()
            for _ in range(calls[k]):
                jobs[k]()
            row[k] = (now() - began) / calls[k]
        table.append(row)
    return table


def compare(part: str, what: str, table: Sequence[Sequence[float]], against: str, k: int = 1,
            target: float | None = None, note: str = "", scale: float = 1e3, unit: str = "ms",
            ours: int = 0) -> Row:
    """The row of job `ours` against job k of a table of `paired`."""
    ratios = [row[ours] / row[k] for row in table]
    return Row(part, what, against, scale * statistics.median(row[ours] for row in table),
               scale * statistics.median(row[k] for row in table), unit,
               statistics.median(ratios), min(ratios), max(ratios), target, note)


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
    """function(*arguments) in a process of its own, on one thread; both must be picklable."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=one_thread) as pool:
        return pool.apply(function, arguments)


def one_thread() -> None:
    torch.set_num_threads(1)


# ---- the machine -----------------------------------------------------------------------------

def machine() -> str:
    """Processor, cores, GPU and versions, in one line."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as f:
        name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    gpu = torch.cuda.get_device_name() if CUDA else "no GPU"
    versions = " ".join(f"{k} {v}" for k, v in common.versions().items())
    return f"{name}, {os.cpu_count()} cores, {gpu}; {versions}"
