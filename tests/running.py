"""Starts a script for the tests: as a user does, or in forked copies of one warm process.

`command` is the real thing, `python SCRIPT.py` or torchrun, and costs 4 to 12 seconds before the
first step. `quick` runs the same `parse_args` and `launch` in processes forked from one that has
imported everything, with torchrun's environment variables; it can also end them at a chosen
instruction with SIGKILL, which is what a test of restarts needs.
"""

import functools
import importlib
import io
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests")])
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import common  # noqa: E402
import cpctrans  # noqa: E402, F401
import f2c_oops  # noqa: E402, F401
import replai  # noqa: E402, F401
import ssdet_coarsefine  # noqa: E402, F401

torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)], lr=0.1).step()              # imports a second's worth of modules

SMALL = ("--tiny --crop 32 --width 8 --batch_size 2 --epochs 2 --workers 0 --log_every 1 "
         "--save_every 2").split()


class Result(NamedTuple):
    code: int
    out: str
    err: str


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(*args, n=1, cwd=None, timeout=150, python=(), script="replai"):
    """`python SCRIPT.py ARGS`, under torchrun with n > 1, as a user types it."""
    start = [sys.executable, *python]
    if n > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(n),
                  "--master_port", str(free_port())]
    p = subprocess.run([*start, str(REPO / f"{script}.py"), *map(str, args)], capture_output=True,
                       cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL, check=False)
    return Result(p.returncode, p.stdout.decode(), p.stderr.decode())


# ---- forked ----------------------------------------------------------------------------------

def context():
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["running"])
    return ctx


def quick(folder, *args, n=1, die=None, kill=None, timeout=100, script="replai"):
    """As `command`, from forked processes; what they print goes to files in `folder`.

    die   (event, k): process 0 ends itself by SIGKILL at the k-th such event, see `arm`; with
          (event, k, rank) another process does
    kill  (file, lines, seconds): all are ended by SIGKILL, from outside, so long after the file
          has so many lines; (file, lines, seconds, signal): all get another signal, once
    With n > 1 the first process to fail ends the others, as under torchrun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, ctx = free_port(), context()
    running = [ctx.Process(target=_main, args=(script, r, n, port, list(map(str, args)), die,
                                               str(folder))) for r in range(n)]
    for p in running:
        p.start()
    began = time.monotonic()
    codes, until, due, how = [None] * n, began + timeout, math.inf, ()
    while None in codes:
        time.sleep(0.01)
        codes = [p.exitcode for p in running]
        if kill and kill[0].exists() and kill[0].read_bytes().count(b"\n") >= kill[1]:
            due, kill, how = time.monotonic() + kill[2], None, kill[3:]
        if time.monotonic() > due:
            due, until = math.inf, until if how else 0
            for p in running if how else ():
                if p.is_alive():
                    os.kill(p.pid, *how)
        late = time.monotonic() > until
        if late or any(codes):
            if not late and any(codes) and None in codes and codes[0] is None:
                time.sleep(0.5)                               # process 0 tells what went wrong
            for p in running:
                try:
                    os.killpg(p.pid, signal.SIGKILL)          # its decoding processes too
                except ProcessLookupError:
                    pass
            for p in running:
                p.join()
            codes = [p.exitcode for p in running]
            assert time.monotonic() < began + timeout, "took too long"
    text = {s: "".join((folder / f"{s}{r}.txt").read_text() for r in range(n) if
                       (folder / f"{s}{r}.txt").exists()) for s in ("out", "err")}
    return Result(codes[0] if codes[0] else max(codes, key=abs), text["out"], text["err"])


def _main(script, rank, n, port, argv, die, folder):
    os.setsid()
    for fd, name in ((1, "out"), (2, "err")):
        f = os.open(f"{folder}/{name}{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(f, fd)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)    # for the loaders
    if n > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if die and rank == (*die, 0)[2]:
        arm(*die[:2])
    sys.argv = [f"{script}.py", *argv]
    module = importlib.import_module(script)
    common.launch(module.main, module.parse_args())


def suicide():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(event, k):
    """End this process by SIGKILL at the k-th (from 1) of these events:

    step     a step is done and logged, its checkpoint not yet written
    line     half of a log line is written
    term     a step is done and logged, and SIGTERM comes, not SIGKILL
    torn     half of a new last.pt (of `torn:NAME`, of NAME) is in the temporary file
    renamed  last.pt has just got its name
    """
    event, _, wanted = event.partition(":")
    seen = 0
    if event in ("step", "line", "term"):
        plain = common.Log.__call__

        def call(self, step, *now, **values):
            nonlocal seen
            seen += 1
            if event == "line" and seen == k:
                with open(self.path, "a") as f:
                    f.write(json.dumps({"stage": "pretrain", "step": step})[:20])
                suicide()
            plain(self, step, *now, **values)
            if seen == k:
                os.kill(os.getpid(), signal.SIGTERM if event == "term" else signal.SIGKILL)
        common.Log.__call__ = call
    else:
        write = common.write

        def torn(path, content):
            nonlocal seen
            mine = path.name.endswith(wanted or "last.pt")
            seen += mine
            if not mine or seen != k:
                return write(path, content)
            if event == "renamed":
                write(path, content)
                suicide()
            whole = content
            if callable(content):
                buffer = io.BytesIO()
                content(buffer)
                whole = buffer.getvalue()
            whole = whole.encode() if isinstance(whole, str) else whole

            def half(f):
                f.write(whole[:len(whole) // 2])
                f.flush()
                suicide()
            write(path, half)
        common.write = torn


# ---- several processes for one function --------------------------------------------------------

def processes(function, n, folder):
    """function(rank) in n gloo processes; a list of what each returned, by way of files."""
    ctx = context()
    running = [ctx.Process(target=_call, args=(function, r, n, str(folder))) for r in range(n)]
    for p in running:
        p.start()
    for p in running:
        p.join(100)
    return [torch.load(Path(folder) / f"result{r}.pt") for r in range(n)]


def _call(function, rank, n, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n)
    result = function(rank)
    common.write(Path(folder) / f"result{rank}.pt", functools.partial(torch.save, result))
    dist.barrier()
    os._exit(0)
