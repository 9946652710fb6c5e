"""The ground floor of four scripts: what two of them need and a reader of a paper would skip.

    command line     Parser, parse, launch             one line per error, exit status 0, 1 or 2
    processes        init_distributed, gather, settle  the same code on one process or on many
    annotations      read_table, read_json, Fields     a fault names the file, the line or the key
    evaluation       predict                           every item once, by all processes
    data             Packed, StepSampler, SkipBroken     long lists that workers share
    runs             Log, save, resume, load_weights, write
    video and sound  read_clip, read_frames, read_audio  exact to the frame and to the sample
    pictures         draw_curve, draw_panel, font      Pillow alone
    backbones        R2Plus1D, X3D, SlowFast, ...      plain nn.Modules, no dataset, no method
    a command        prepare                           videos re-encoded for training

Times are seconds in float, counted from the first picture of a file. Video in memory is uint8
(T, H, W, 3) as read and (B, C, T, H, W) in a network; sound is float32 (channels, samples).
"""

import argparse
import array
import collections.abc
import contextlib
import csv
import ctypes
import errno
import gc
import inspect
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections import deque
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler


class UserError(Exception):
    """What the user can mend. `launch` shows it as one line and leaves with exit status 1."""


class VideoError(UserError):
    """A media file that cannot be read; the text begins with its path."""


class Stopped(Exception):
    """SIGTERM has ended a training run, its checkpoint is written; process 0 has said so."""


# ---- command line ----------------------------------------------------------------------------

DEFAULT = " (default: "                                       # at the end of help texts


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstring as it stands, default behind every help text that has one.

    A text may end in "(default: VALUE, SOURCE)": for VALUE stands the default, where there is one.
    """

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action):
        value, (text, _, rest) = action.default, action.help.partition(DEFAULT)
        if value is None or value is False or value == argparse.SUPPRESS:
            return text if rest.startswith("%") else action.help
        values = value if isinstance(value, list) else [value]
        words = " ".join(f"{x:g}" if isinstance(x, float) else f"{x}" for x in values) or "none"
        _, comma, source = rest.partition(",")
        return text + DEFAULT + words.replace("%", "%%") + (comma + source or ")")


class OneLine(argparse.ArgumentParser):
    """argparse whose errors are one line, printed by the first process only (exit status 2)."""

    def error(self, message: str):
        take_turn()
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")


class Parser(OneLine):
    """argparse with the flags that mean the same in every script: the groups `data` and `run`.

    The first stage and the first dataset are the defaults. A script's own groups, between these
    two: clips, method, what only it has, optimization, evaluation, faults of the release.
    """

    def __init__(self, description: str, stages: Sequence[str], datasets: Sequence[str]):
        super().__init__(description=description, formatter_class=HelpFormatter,
                         allow_abbrev=False)
        self.data = g = self.add_argument_group("data")
        g.add_argument("--stage", choices=stages, default=stages[0], metavar="STAGE",
                       help=f"what to do: {', '.join(stages)}")
        g.add_argument("--dataset", choices=datasets, default=datasets[0], help="which videos; "
                       "the published recipe of stage and dataset becomes the defaults below")
        g.add_argument("--data", type=Path, metavar="DIR",
                       help="folder of the dataset, in the official layout (README)")
        g.add_argument("--limit", type=int, metavar="N",
                       help="use only N samples of each split (default: all)")
        g.add_argument("--workers", type=int, default=8, metavar="N",
                       help="decoding processes per GPU (default: %(default)s, ours)")

    def add_run_flags(self):
        g = self.add_argument_group("run")
        g.add_argument("--out", type=Path, metavar="DIR",
                       help="run folder, continued if used before")
        g.add_argument("--tiny", action="store_true", help="CPU size: small frames, narrow "
                       "network, short recipe, one thread; not the paper's")
        g.add_argument("--seed", type=int, default=0, metavar="N",
                       help="all randomness follows from it (default: %(default)s, ours)")
        g.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                       help="of the networks; auto: bf16 on CUDA, else fp32; losses are fp32 "
                       "(default: %(default)s, ours)")
        g.add_argument("--compile", action="store_true", help="torch.compile the networks")
        g.add_argument("--save_every", type=int, default=500, metavar="N", help="steps between "
                       "checkpoints; one more ends each epoch (default: %(default)s, ours)")
        g.add_argument("--log_every", type=int, default=20, metavar="N",
                       help="steps between log lines (default: %(default)s, ours)")

    def mark_tiny(self, values: dict, published: dict):
        """Say in the help texts which of the recipe's values are but --tiny's."""
        for a in self._actions:
            if values.get(a.dest, a.default) != published.get(a.dest, a.default):
                a.help = a.help.partition(DEFAULT)[0] + f"{DEFAULT}%(default)s, ours for --tiny)"


def parse(parser: Parser, recipe: Callable[[argparse.Namespace], dict],
          argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse twice: what `--stage`, `--dataset` and `--tiny` say chooses the defaults of the rest.

    recipe: from the first pass's namespace to a dictionary of defaults; flags still win.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")              # Greek letters on ASCII terminals
    argv = sys.argv[1:] if argv is None else list(argv)
    parser.add_run_flags()
    chosen, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    values = recipe(chosen)
    stage, dataset = (values.get(k, getattr(chosen, k)) for k in ("stage", "dataset"))
    if chosen.tiny and {"-h", "--help"} & {*argv}:
        chosen.tiny = False
        parser.mark_tiny(values, recipe(chosen))
    values.setdefault("out", Path("runs") / f"{Path(parser.prog).stem}_{dataset}_{stage}")
    parser.set_defaults(**values)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "workers", "warmup") or isinstance(value, float) else 1
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not least <= value < 2 ** 32:           # NaN fails both
            parser.error(f"--{name} {value}: must be at least {least}, and below 2^32")
    if args.batch_size and args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        parser.error(f"--batch_size {args.batch_size} is the number of samples per step over all "
                     f"processes: {os.environ['WORLD_SIZE']} processes cannot share it evenly")
    if args.precision == "bf16" and not torch.cuda.is_available():
        parser.error("--precision bf16 needs CUDA: PyTorch's bf16 3-D convolutions on the CPU "
                     "return uninitialised gradients for short clips; use fp32")
    if args.precision == "auto":
        args.precision = "bf16" if torch.cuda.is_available() else "fp32"
    return args


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `main(args)` and leave: status 0, or 1 with one line `error: ...` on stderr.

    Where every process fails alike, process 0 speaks first and the others are ended by torchrun
    while they wait; one that only lost another waits, too, and says no more than that. `os._exit`
    at the end: gloo may abort while an interpreter takes itself down.

    SIGTERM, from a user, a cluster or torchrun, which passes it on: training stops after a step,
    the same on every process, with its checkpoint written, and leaves with status 143, see
    `Log.steps`; all else ends at once (143 in a shell, too), every file whole or absent.
    """
    with contextlib.suppress(OSError, ValueError):            # of a stderr that is full or closed
        status = _status(main, args)
        for f in filter(None, (sys.stdout, sys.stderr)):
            f.flush()
        os._exit(status)
    os._exit(1)


def _status(main, args):
    """The exit status of `main(args)`, once it has been told why."""
    try:
        main(args)
        return 0
    except Stopped:
        return 143
    except KeyboardInterrupt:
        say("stopped; the same command continues from the last checkpoint, if there is one")
        return 130
    except Exception as e:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)         # of torchrun, while others speak
        lost = not isinstance(e, (UserError, OSError)) and bool(
            re.search(LOST, f"{type(e).__name__} {e}"))
        if _asked and not isinstance(e, UserError):           # what worked for this process has
            say("stopped by SIGTERM; the same command continues from the last checkpoint, if "
                "there is one")                               # got the signal, too
            return 143
        take_turn(lost)
        print(_in_words(e, lost), file=sys.stderr)
        return 1


# What collectives raise where another process of the group has ended.
LOST = r"(?i)^Dist\w*Error|gloo|nccl|connection (closed|reset)"


def take_turn(lost: bool = False) -> None:
    """Process 0 speaks first, the others seconds later: where all fail alike, torchrun has ended
    them by then. lost: nor does one speak, on its machine, that has but lost the one that failed.
    """
    time.sleep(3 * lost + (min(10, 2 + rank()) if rank() else 0))


def _in_words(e: Exception, lost: bool) -> str:
    """One line for what a user can mend, else the traceback."""
    if lost:
        return (f"error: process {rank()} cannot go on without the others, one of which tells "
                f"why: {' '.join(str(e).split())}")
    if isinstance(e, torch.OutOfMemoryError):
        return "error: the GPU's memory is full: lower --batch_size"
    if not isinstance(e, (UserError, OSError, dist.DistError)):
        import traceback
        return traceback.format_exc()
    lines = str(e).strip().splitlines() or [type(e).__name__]
    text = lines[-1] if lines[0].startswith("Caught ") else " ".join(lines)       # of a worker
    text = re.sub(r"^[\w.]*(Error|Exception): ", "", text)
    if isinstance(e, OSError) and e.filename:
        text = f"{e.filename}: {e.strerror}"
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text)         # of a file's: not for a terminal
    return f"error: {text:.2000}"


# ---- processes -------------------------------------------------------------------------------

def init_distributed(gpu: bool = True) -> torch.device:
    """Join torchrun's process group, or make one of a single process; returns this one's device.

    With a group in any case, DDP and `gather` need no branch for one process. Processes may wait
    a day for one another (cutting is uneven); torchrun ends all when one has failed.
    """
    cuda = gpu and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"process {local} of this machine has no GPU: it has "
                        f"{torch.cuda.device_count()}, start as many processes")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    backend = "nccl" if cuda else "gloo"
    group = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if "RANK" in os.environ:
        store, r, n = next(dist.rendezvous("env://"))
        if n == int(os.environ.get("LOCAL_WORLD_SIZE", 0)):   # one agent keeps its store when it
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")     # starts all anew, with
            store = dist.PrefixStore(f"start {again}", store)             # the old addresses
        group = {"store": store, "rank": r, "world_size": n}
    dist.init_process_group(backend, device_id=device if cuda else None, timeout=timedelta(days=1),
                            **group)
    return device


def rank() -> int:
    """This process's number in the group; without one, what torchrun says, else 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Number of processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def say(*words: Any) -> None:
    """Print on process 0."""
    if rank() == 0:
        with blame("standard output"):
            print(*words, flush=True)


def gather(rows: dict[int, Any], expect: int) -> dict[int, Any]:
    """Union over the processes of {index: result}, in index order, on every process.

    Raises RuntimeError unless each of the indices 0 .. expect-1 came exactly once.
    """
    parts = [rows]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, rows)
    keys = sorted(itertools.chain.from_iterable(parts))
    if keys != list(range(expect)):
        raise RuntimeError(f"{len(keys)} results ({len(set(keys))} different) for {expect} items")
    merged = {k: v for part in parts for k, v in part.items()}
    return {k: merged[k] for k in keys}


def all_rows(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`x` of every process, one behind the other along `dim`, in process order; no gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def settle(model: nn.Module, *inputs: torch.Tensor) -> None:
    """One throw-away step, so that DDP has regrouped its buckets before the first real one.

    With more than two processes the order of summation follows the buckets, and these change
    after the first backward; a resumed run would else round differently from one that never
    stopped. The model's state comes out as it went in.
    """
    if world_size() <= 2:
        return
    state = {k: v.clone() for k, v in model.state_dict().items()}
    out = model(*inputs)
    out = out.values() if isinstance(out, dict) else out
    every = (0 * p.sum() for p in model.parameters() if p.requires_grad)      # also unused ones
    sum(itertools.chain((x.float().sum() for x in out), every)).backward()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)


def share_buffers(model: nn.Module) -> None:
    """Give every process the batch-norm statistics of process 0."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


# Of DDP, for models whose processes keep statistics of their own; newer PyTorch renamed it.
OWN_BUFFERS = {next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in
                    inspect.signature(nn.parallel.DistributedDataParallel).parameters): False}


def seed_step(seed: int, step: int, part: int) -> None:
    """Make dropout a function of (seed, step, part of the batch)."""
    torch.manual_seed(int(np.random.default_rng((seed, step, part)).integers(2 ** 63)))


def autocast(device: torch.device, precision: str):
    """The context for a forward pass: bfloat16 where `precision` says so, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def exact(x: torch.Tensor):
    """The context of what must not be rounded to bfloat16, for tensors where `x` is."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


# ---- long lists, data order and broken files -------------------------------------------------

_sent: dict[int, torch.Tensor] = {}                          # by id of an array that is alive


def _share(x: np.ndarray) -> tuple:
    """How workers that are not forked get a large array: they share one copy, as of a tensor."""
    if x.nbytes < 2 ** 16 or x.dtype.hasobject:
        return x.__reduce__()
    if id(x) not in _sent:
        _sent[id(x)] = torch.tensor(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        weakref.finalize(x, _sent.pop, id(x))
    return _shared, (_sent[id(x)], x.dtype, x.shape)


def _shared(data: torch.Tensor, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    x = data.numpy().view(dtype).reshape(shape)
    x.flags.writeable = False                                 # it would change for all of them
    return x


ForkingPickler.register(np.ndarray, _share)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """While a long list is made, also as a decorator: Python's garbage collector would go through
    all of it whenever it has grown by a quarter, which takes longer than to make it.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Packed(collections.abc.Sequence):
    """A read-only list of any objects, pickled in one array and made anew when asked for.

    Workers share its memory. Of a list each gets a copy, also where they are forked: to read an
    object writes its count of references, and a page that is written is copied. Nothing is
    unpickled here that came from a file.
    """

    def __init__(self, items: Iterable):
        data, ends = bytearray(), array.array("q", [0])
        for item in items:
            data += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            ends.append(len(data))
        self.data, self.ends = np.frombuffer(data, np.uint8), np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int | slice) -> Any:
        i = range(len(self))[i]
        if isinstance(i, range):
            return [self[k] for k in i]
        first, last = self.ends[i:i + 2]
        return pickle.loads(self.data[first:last])

    def __iter__(self) -> Iterator:
        data = memoryview(self.data)
        return (pickle.loads(data[a:b]) for a, b in itertools.pairwise(self.ends.tolist()))


class StepSampler(Sampler):
    """Batches of (epoch, index) keys for the steps start .. steps-1 of this process.

    Each epoch is a permutation of n items fixed by (seed, epoch), its last partial batch dropped;
    step k's global batch is the same on any number of processes, which take equal slices of it.
    """

    def __init__(self, n: int, batch_size: int, seed: int, start: int, steps: int):
        if n < batch_size:
            raise UserError(f"{n} training samples do not fill one batch: lower --batch_size "
                            f"{batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.start, self.steps = start, steps

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share, shuffled = self.batch_size // world_size(), None
        for step in range(self.start, self.steps):
            epoch, k = divmod(step, self.n // self.batch_size)
            if shuffled != epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
                shuffled = epoch
            first = k * self.batch_size + rank() * share
            yield [(epoch, int(i)) for i in order[first:first + share]]


class SkipBroken(Dataset):
    """Training's view of a dataset: a sample whose file cannot be read is replaced, not fatal.

    The substitute is drawn by (seed, epoch, index), hence the same on any rank or restart. The
    item's key `broken` holds what went wrong ("" if nothing did); `Log` counts and prints it.
    Raises VideoError when `tries` samples in a row fail. Never wrap an evaluation in this.
    """

    def __init__(self, dataset: Dataset, seed: int, tries: int = 20):
        self.dataset, self.seed, self.tries = dataset, seed, tries

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        *when, i = key                                        # epoch, and what the sampler adds
        rng = np.random.default_rng((self.seed, *when, i, 1))
        faults = []
        for _ in range(self.tries):
            try:
                return {**self.dataset[(*when, i)], "broken": "\n".join(faults)}
            except VideoError as e:
                faults.append(str(e))
                i = int(rng.integers(len(self.dataset)))
        raise VideoError(f"{faults[-1]} ({self.tries} samples in a row could not be read)")


# ---- annotation files --------------------------------------------------------------------------

def find(root: Path, name: str) -> Path | None:
    """The first file of that name, or pattern, in a folder or up to two below it."""
    return next((f for depth in ("", "*/", "*/*/") for f in sorted(root.glob(depth + name))), None)


@no_collector()
def read_table(path: Path, columns: Sequence[str]) -> list[dict]:
    """Rows of an official CSV as dictionaries of these columns and `_line`, for few of them."""
    return [dict(zip(("_line", *columns), row)) for row in table_rows(path, columns)]


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple]:
    """Rows (line, value of each column) of an official CSV; UserError names file and line."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it comes with the official annotations") from None
    except UnicodeDecodeError as e:
        line = data[:e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not in UTF-8") from e
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        raise UserError(f"{path}:{line}: holds a NUL byte")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        lacking = [c for c in columns if c not in names]
        if lacking:
            raise UserError(f"{path}:1: column {lacking[0]} is missing")
        if len(set(names)) < len(names):
            twice = next(n for k, n in enumerate(names) if n in names[:k])
            raise UserError(f"{path}:1: column {twice!r:.60} stands there twice")
        at, width = [names.index(c) for c in columns], len(names)
        for row in filter(None, reader):                      # not the empty lines
            if len(row) != width:
                raise UserError(f"{path}:{reader.line_num}: has another number of fields than "
                                f"the {width} columns")
            yield (reader.line_num, *[row[k] for k in at])
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: not in CSV form ({e})") from e


@no_collector()
def read_json(path: Path) -> Any:
    """The value of a JSON file; UserError names file and line, or the key that is there twice."""
    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(k for n, (k, _) in enumerate(pairs) if k in dict(pairs[:n]))
            raise UserError(f"{path}: key {twice!r:.60} stands there twice in one object")
        return found

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it comes with the official annotations") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not in JSON form ({e.msg})") from None
    except (ValueError, RecursionError) as e:                 # not UTF-8, endless numbers, too deep
        raise UserError(f"{path}: not in JSON form ({type(e).__name__})") from None


IDENTIFIER = re.compile(r"[\w-]{1,100}", re.ASCII).fullmatch


class Fields:
    """Checked access to one entry of an annotation file: a fault names the file, entry and key.

    where: the file and the entry in it, as a message shall begin.
    """

    def __init__(self, where: str, entry: dict):
        self.where, self.entry = where, entry

    def fault(self, key: str, why: str) -> UserError:
        return UserError(f"{self.where}.{key}: {self.entry.get(key)!r:.300} {why}")

    def name(self, key: str, needed: bool = True) -> str:
        """An identifier that will become a file name; "" for null or no key, unless `needed`."""
        value = self.entry.get(key)
        if value is None and not needed:
            return ""
        if not isinstance(value, str) or not IDENTIFIER(value):
            raise self.fault(key, "is no identifier of letters, digits and hyphens")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; `default` for null or no key, if it is not None."""
        value = self.entry.get(key)
        if value is None and default is not None:
            return default
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not abs(value) < 1e9:                  # NaN fails
            raise self.fault(key, "is no number")
        return value

    def label(self, key: str, n: int) -> int:
        """A class number below n; -1 for null or no key."""
        value = self.number(key, -1)
        if value not in range(n) and self.entry.get(key) is not None:
            raise self.fault(key, f"is no class number below {n}")
        return int(value)


# ---- evaluation ------------------------------------------------------------------------------

@torch.inference_mode()
def predict(args: argparse.Namespace, device: torch.device, dataset: Dataset,
            network: Callable[[list[int], Any], Sequence[torch.Tensor]], what: str,
            group: int = 8, collate: Callable[[list], Any] | None = None) -> list:
    """[outputs of every item, stacked], in the dataset's order, each item computed once.

    network: ([item], their stacked tensors on the device) -> a list of (B, ...) tensors. Items go
    through it in fixed groups of 8, dealt out among the processes, so that the numbers do not
    depend on how many there are. An item that cannot be read raises: nothing is left out.
    With `collate` the network gets what that makes of the items, and results may differ in shape
    from item to item: they come as lists.
    """
    rows = {}
    mine = [list(range(i, min(i + group, len(dataset))))
            for i in range(rank() * group, len(dataset), world_size() * group)]
    loader = DataLoader(dataset, batch_sampler=mine, num_workers=args.workers, collate_fn=collate,
                        generator=torch.Generator())
    began = shown = time.perf_counter()
    for n, (items, batch) in enumerate(zip(mine, loader), 1):
        with autocast(device, args.precision):
            out = network(items, batch if collate else batch.to(device))
        rows |= {i: [x[k].float().cpu().numpy() for x in out] for k, i in enumerate(items)}
        if not all(np.isfinite(x).all() for i in items for x in rows[i]):
            raise UserError(f"{what}: the network's output is not finite; nothing was scored. "
                            "Lower --lr, or train longer")
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            left = (shown - began) / n * (len(mine) - n)
            say(f"{what} {n}/{len(mine)} groups of this process, ETA {left:.0f} s")
    rows = gather(rows, expect=len(dataset))
    return [list(column) if collate else np.stack(column) for column in zip(*rows.values())]


# ---- what a run leaves behind ----------------------------------------------------------------

@contextlib.contextmanager
def blame(target: Path | str) -> Iterator[None]:
    """What the system refuses in here, as on a full disk, is a UserError that names the target."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        why = next((x for x in (e, e.__context__) if isinstance(x, OSError)), None)
        if why is None:                                       # torch.save: the error behind it
            raise
        raise UserError(f"{target}: could not be written ({why.strerror or why})") from e


def write(path: Path, content: str | bytes | Callable[[io.BufferedWriter], None]) -> None:
    """Write a file at once or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with blame(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                if callable(content):
                    content(f)
                else:
                    f.write(content.encode() if isinstance(content, str) else content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):                # the name itself may be too long
                temporary.unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError):                        # some file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove_stale(folder: Path, name: str = "*", age: float = 0) -> None:
    """Remove what a process that was killed inside `write` has left in a folder, of any name or of
    this one. age: seconds it must have lain there, where other runs may be writing just now.
    """
    kinds = r".+\.(csv|json|jsonl|npz|pt|png|txt|zip|mp4|MP4)\.tmp\d+"
    for f in folder.glob(f"{name}.tmp*"):
        with contextlib.suppress(FileNotFoundError):
            if re.fullmatch(kinds, f.name) and f.is_file() and (
                    time.time() - f.stat().st_mtime >= age):
                f.unlink()


def write_json(path: Path, value: Any) -> None:
    """`write` as indented JSON; NaN and Inf are refused, since other readers refuse them."""
    write(path, json.dumps(value, indent=1, default=str, allow_nan=False) + "\n")


def claim(folder: Path, net: nn.Module, about: dict, strange: str = "") -> None:
    """Keep what different networks make out of one folder: its about.json tells which one did.

    about: what else decides its files. strange: a pattern of files that must not be there without
    an about.json. UserError, on every process, if the folder belongs to others.
    """
    import zlib
    check = 0
    for x in net.state_dict().values():
        check = zlib.crc32(x.cpu().numpy().tobytes(), check)
    about, path, fault = {**about, "crc32": f"{check:08x}"}, folder / "about.json", [None]
    if rank() == 0:
        remove_stale(folder, path.name, age=3600)
        before = read_json(path) if path.exists() else about
        known = {k: before.get(k) for k in about} if isinstance(before, dict) else before
        if known != about:
            fault = [f"{path}: its features are of {known}, not of {about}; choose another "
                     "--features"]
        elif not path.exists() and strange and any(folder.glob(strange)):
            fault = [f"{folder}: holds features of an unknown network (no about.json); delete "
                     "them, or choose another --features"]
        elif not path.exists():
            write_json(path, about)
    dist.broadcast_object_list(fault)
    if fault[0]:
        raise UserError(fault[0])


# Flags that change neither the network nor its training: free to differ when a run goes on.
# Scripts add their own.
FREE_FLAGS = {"out", "data", "workers", "save_every", "log_every"}


def recipe_of(args: argparse.Namespace) -> dict:
    """The flags that decide a run's bits, as plain values."""
    plain = (bool, int, float, str, type(None))
    return {k: v if isinstance(v, plain) else str(v)
            for k, v in sorted(vars(args).items()) if k not in FREE_FLAGS}


@lru_cache
def versions() -> dict[str, str]:
    """Of Python and the packages, with this repository's git commit ("" outside of git)."""
    commit = ""
    with contextlib.suppress(OSError):                        # no git on this machine
        here = str(Path(__file__).resolve().parent)
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True,
                                text=True, check=False).stdout.strip()
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "av": av.__version__, "numpy": np.__version__, "commit": commit}


def keep_memory() -> None:
    """Let glibc keep what tensors leave free: new pages, zeroed by the system at every step, cost
    up to a fourth of the time of training on the CPU, and a half of a detector's on a long video.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):             # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                        # M_MMAP_MAX: no block by itself
        mallopt(-1, 2 ** 31 - 1)                              # M_TRIM_THRESHOLD: give nothing back
        mallopt(-2, 2 ** 26)                                  # M_TOP_PAD: grow by 64 MB


def start_run(args: argparse.Namespace, gpu: bool = True) -> torch.device:
    """Join the processes and write `args.json` (flags, versions, commit); returns the device."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: --out must be a folder, this is a file")
    device = init_distributed(gpu)
    if device.type == "cpu":
        keep_memory()
    if args.tiny and device.type == "cpu":                    # not slower at this size, and the
        torch.set_num_threads(1)                              # same bits on any number of cores
    if rank() == 0:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"{args.out}: cannot be made ({e.strerror})") from e
        remove_stale(args.out)
        if not (args.out / "last.pt").exists():               # a run that goes on keeps its own
            write_json(args.out / "args.json", {**vars(args), "processes": world_size(),
                                                "device": device, "versions": versions()})
    barrier()
    return device


def _plain(x: Any) -> Any:
    """A copy fit for `weights_only=True`, whose bytes depend on its values alone."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().clone()
    if isinstance(x, dict):
        return {sys.intern(k) if isinstance(k, str) else k: _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if x is None or isinstance(x, (bool, int, float)):
        return x
    if isinstance(x, str):
        return sys.intern(x)
    raise TypeError(f"a checkpoint holds tensors, numbers and strings, not {type(x)}")


def _tensors(x: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that a state holds, `model.head.bias` for one."""
    if isinstance(x, torch.Tensor):
        yield name, x
    elif isinstance(x, (dict, list)):
        for k, v in x.items() if isinstance(x, dict) else enumerate(x):
            yield from _tensors(v, f"{name}.{k}" if name else str(k))


def save(path: Path, step: int, args: argparse.Namespace, **parts: Any) -> None:
    """Checkpoint after `step` steps, by process 0: each part's `state_dict()`, or a plain value.

    A run that was interrupted and one that was not end in the same bytes. UserError, and the file
    stays as it was, where a tensor holds NaN or Inf.
    """
    if rank() == 0:
        state = {k: _plain(v.state_dict() if hasattr(v, "state_dict") else v)
                 for k, v in parts.items()}
        for name, x in _tensors(state):
            if x.is_floating_point() and not torch.isfinite(x).all():
                raise UserError(f"step {step - 1}: {name} is nan or inf after the update; {path} "
                                "was not written, what it holds is from before")
        state |= {"step": step, "args": _plain(recipe_of(args)), "versions": _plain(versions())}
        write(path, lambda f: torch.save(state, f))


# A number of NumPy, as released checkpoints hold (their best accuracy): its maker, which NumPy 1
# names differently from NumPy 2, and the types it may have. None of them can run code.
_scalar = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS = [(_scalar, "numpy.core.multiarray.scalar"),
                 (_scalar, "numpy._core.multiarray.scalar"), np.dtype,
                 *(type(np.dtype(t)) for t in ("f2", "f4", "f8", "i4", "i8", "?"))]


def load_file(path: Path) -> Any:
    """`torch.load(weights_only=True)` on the CPU, numbers of NumPy allowed; UserError for what is
    no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_NUMBERS):
            warnings.simplefilter("ignore")                   # of pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                                    # pickle, zip and torch errors alike
        refused = re.search(r"(?i)unsupported (global|operand|class)([^\n.]|\.\w)*", str(e))
        why = f"holds more than tensors: {refused[0]}" if refused else "damaged or no checkpoint"
        raise UserError(f"{path}: {why}; nothing was loaded") from e


def resume(path: Path, args: argparse.Namespace, **parts: Any) -> dict:
    """Continue from `path` if it exists: loads each part, returns the file's other entries.

    Returns {"step": 0} if there is nothing yet. UserError if the file was made with other flags
    or does not fit; nothing is overwritten then.
    """
    if not path.exists():
        return {"step": 0}
    state = load_file(path)
    if (not isinstance(state, dict) or not {"step", "args", *parts} <= state.keys()
            or not isinstance(state["args"], dict) or type(state["step"]) is not int):
        raise UserError(f"{path}: not a checkpoint of this stage; choose another --out")
    now = recipe_of(args)
    for k in sorted(now.keys() | state["args"].keys()):
        if state["args"].get(k) != now.get(k):
            raise UserError(f"{path}: was made with --{k} {state['args'].get(k)}, now it is "
                            f"{now.get(k)}; use the same flags to continue, or another --out")
    for k, part in parts.items():
        try:
            part.load_state_dict(state.pop(k))
        except (RuntimeError, ValueError, KeyError) as e:
            raise UserError(f"{path}: {k} does not fit this network; choose another --out") from e
    say(f"continuing {path} after step {state['step']}")
    return state


def same_samples(saved: dict, samples: int | str, out: Path) -> None:
    """Refuse to continue with another number of training samples: steps would mean others."""
    if saved.get("samples", samples) != samples:
        raise UserError(f"{out}: was begun with {saved['samples']} training samples, now there "
                        f"are {samples}; restore the data, or choose another --out")


def fetch(url: str, instead: str) -> Path:
    """Path of a published file of weights, downloaded once per machine, its SHA-256 printed.

    instead: what else the user can do, for the line that says where to put the file by hand.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    why, reasons = None, [None] * world_size()
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not path.exists():
            say(f"fetching {url}")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
            import hashlib
            say(f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    except OSError as e:
        why = f"{url} could not be fetched ({e}); put the file at {path}, or {instead}"
    dist.all_gather_object(reasons, why)
    if any(reasons):
        raise UserError(next(filter(None, reasons)))
    return path


def find_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of any checkpoint: under `model`, `state_dict` or the like, or bare, without the
    `module.` of DDP and DataParallel, however often it stands there. Of a file with several
    networks, each `..._state_dict` stands before its tensors' names.
    """
    found = load_file(path)
    for key in ("model", "model_av", "state_dict", "vtn_state_dict", "model_state",
                "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    else:
        if isinstance(found, dict):
            found |= {f"{k}." + re.sub(r"^(module\.)+", "", str(name)): v
                      for k, state in list(found.items())
                      if str(k).endswith("_state_dict") and isinstance(state, dict)
                      for name, v in state.items()}
    tensors = {re.sub(r"^(module\.)+", "", str(k)): v for k, v in found.items()
               if isinstance(v, torch.Tensor)} if isinstance(found, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no named weights")
    return tensors


def load_weights(module: nn.Module, path: Path, layouts: Sequence[dict[str, str]],
                 required: str | tuple[str, ...] = "", spare: Sequence[str] | None = None,
                 adapt: Callable[[dict, dict], dict] | None = None) -> set[str]:
    """Fill `module` from a checkpoint and print what was loaded, left over and left fresh.

    layouts: known naming schemes, each {prefix in the file: prefix in the module}; the one that
    matches most tensors is taken. Every entry of the module below the prefixes `required` must
    come; a missing one, another shape or no match at all is a UserError, and nothing is changed.
    spare: beginnings of names of which the file may hold more than the module takes; None: of all.
    adapt: from (the file's tensors, the module's entries) to tensors named and shaped as needed.
    Returns the names of the module's entries that were filled.
    """
    tensors, own = find_weights(path), module.state_dict()
    tensors = adapt(tensors, own) if adapt else tensors

    def matches(layout):
        renamed = {b + k[len(a):]: k for a, b in layout.items() for k in tensors if k.startswith(a)}
        return {new: old for new, old in renamed.items() if new in own}

    found = max((matches(layout) for layout in layouts), key=len)
    if not found:
        raise UserError(f"{path}: none of its {len(tensors)} tensors fits this network "
                        f"(its first is {next(iter(tensors), 'none')}, ours {next(iter(own))})")
    missing = [k for k in own if k.startswith(required) and k not in found]
    if missing:
        raise UserError(f"{path}: {len(missing)} of the network's tensors are missing, "
                        f"the first is {missing[0]}")
    for new, old in found.items():
        if tensors[old].shape != own[new].shape:
            raise UserError(f"{path}: {old} is {tuple(tensors[old].shape)}, "
                            f"the network needs {tuple(own[new].shape)}")
        x = tensors[old]
        if x.layout != torch.strided or x.is_floating_point() and not torch.isfinite(x).all():
            raise UserError(f"{path}: {old} is not finite, or sparse; nothing was loaded")
    unused, fresh = set(tensors) - set(found.values()), set(own) - set(found)
    strange = sorted(k for k in unused if spare is not None and not k.startswith(tuple(spare)))
    if strange:
        raise UserError(f"{path}: {len(strange)} of its tensors have no place in this network, "
                        f"the first is {strange[0]}")
    module.load_state_dict({new: tensors[old] for new, old in found.items()}, strict=False)
    say(f"init {path}: {len(found)} tensors loaded, {len(unused)} of the file not used"
        f"{_heads(unused)}, {len(fresh)} of the network left fresh{_heads(fresh)}")
    return set(found)


def _heads(keys: Iterable[str]) -> str:
    """Groups of keys by their first two parts, for a report: ` (fc.noun_class, fc.verb_class)`."""
    groups = sorted({".".join(k.split(".")[:2]) for k in keys})
    return f" ({', '.join(groups[:6])}{', ...' if len(groups) > 6 else ''})" if groups else ""


def mean(values: dict[str, Any]) -> dict[str, float]:
    """Means of numbers over the processes."""
    numbers = [float(v.detach() if torch.is_tensor(v) else v) for v in values.values()]
    x = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        x = x.cuda() if dist.get_backend() == "nccl" else x
        dist.all_reduce(x)
        x = x.cpu() / world_size()
    return dict(zip(values, x.tolist()))


_asked = 0.0                              # when SIGTERM came, while training


def _ask(*_: Any) -> None:
    """Of SIGTERM: ask to stop. A second one ends at once, if it is no copy of the first: a cluster
    tells every process, and so does torchrun, moments later.
    """
    global _asked
    if _asked and time.monotonic() > _asked + 5:
        os._exit(143)
    _asked = _asked or time.monotonic()


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes started here never hear SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


class Log:
    """Console line and `log.jsonl` object per log step; guard against NaN; count of broken files.

    for step, batch in log.steps(loader): ... loss.backward(); log.guard(step, optimizer, part=loss)
        optimizer.step() ... log(step, loss=loss)
    """

    def __init__(self, args: argparse.Namespace, start: int, steps: int, steps_per_epoch: int):
        self.args, self.first, self.end, self.per_epoch = args, start, steps, steps_per_epoch
        self.path, self.broken, self.named = args.out / "log.jsonl", 0, set()
        self.waited, self.since, self.last = 0.0, time.perf_counter(), start - 1
        self.stopping = False                                 # after this step, by SIGTERM
        if rank() == 0:                                       # drop lines of steps to be redone
            old = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
            kept = [line for line in old.splitlines() if 0 <= _step_of(line) < start]
            write(self.path, "".join(line + "\n" for line in kept))

    def steps(self, loader: Iterable[dict]) -> Iterator[tuple[int, dict]]:
        """Enumerate batches from the first step on, measuring how long each was waited for.

        After SIGTERM `stopping` says, on every process in the same step, that this one is the
        last: the loop saves its checkpoint, and Stopped is raised.
        """
        before = signal.signal(signal.SIGTERM, _ask)
        try:
            with deaf():                                      # its workers: a cluster tells all
                batches = iter(loader)
            for step in range(self.first, self.end):
                t = time.perf_counter()
                batch = next(batches)
                self.waited += time.perf_counter() - t
                faults = [b.split("\n") for b in batch.pop("broken", []) if b]
                self.broken += len(faults)
                for fault in dict.fromkeys(itertools.chain.from_iterable(faults)):
                    if fault not in self.named:
                        self.named.add(fault)
                        print(f"warning: {fault}; sample replaced", file=sys.stderr, flush=True)
                yield step, batch
                if self.stopping:
                    say(f"stopped by SIGTERM after step {step + 1} of {self.end}, checkpoint "
                        "written; the same command continues from it")
                    barrier()                                 # torchrun ends all with the first
                    raise Stopped
        finally:
            signal.signal(signal.SIGTERM, before)

    def guard(self, step: int, optimizer: torch.optim.Optimizer,
              **parts: torch.Tensor) -> torch.Tensor:
        """Between backward and update: UserError, on every process, if a part of the loss of any
        of them is NaN or Inf, or the gradient. Returns the gradient's norm; sets `stopping`.

        The device is waited for once, whatever the number of parts.
        """
        norm = nn.utils.get_total_norm([p.grad for group in optimizer.param_groups
                                        for p in group["params"] if p.grad is not None])
        parts["gradient"] = norm
        sums = torch.stack([*(v.detach().float() for v in parts.values()),
                            torch.full_like(norm, _asked > 0, dtype=torch.float32)])
        if world_size() > 1:
            dist.all_reduce(sums)
        *values, asked = sums.tolist()
        self.stopping = asked > 0
        for name, value in zip(parts, values):
            if not math.isfinite(value):
                raise UserError(f"step {step}: {name} is {value}; stopped before the update, the "
                                f"last checkpoint in {self.args.out} is from before")
        return norm

    def __call__(self, step: int, now: bool = False, **values: Any) -> None:
        """A row every `--log_every` steps, at the last, and `now`: before a checkpoint, so that a
        resumed run misses none. Values are means over the processes, of this step alone.
        """
        if not now and (step + 1) % self.args.log_every and step + 1 != self.end:
            return
        means = mean({**values, "broken": self.broken})
        clock = time.perf_counter()
        seconds, done = max(1e-9, clock - self.since), step - self.last
        row = {"stage": self.args.stage, "epoch": step // self.per_epoch, "step": step,
               **{k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in means.items()},
               "broken": round(means["broken"] * world_size()),
               "clips_per_s": round(done * self.args.batch_size / seconds, 2),
               "data_wait": round(self.waited / seconds, 4),
               "eta_s": round((self.end - step - 1) * seconds / done)}
        self.waited, self.since, self.last, self.broken = 0.0, clock, step, 0
        if rank() == 0:
            with blame(self.path), open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
            left = time.strftime("%H:%M:%S", time.gmtime(row["eta_s"] % 86400))
            say(f"{row['stage']} {step + 1}/{self.end}  "
                + "  ".join(f"{k} {means[k]:.4g}" for k in values)
                + f"  {row['clips_per_s']:.1f} clips/s  data wait {100 * row['data_wait']:.0f}%"
                + "  ETA " + f"{row['eta_s'] // 86400} d " * (row["eta_s"] >= 86400) + left)

    def total(self, key: str) -> float:
        """Sum of a key over all rows of the log, those before a restart included."""
        return sum(json.loads(line)[key] for line in self.path.read_text().splitlines())


def _step_of(line: str) -> int:
    """The step of a log line, -1 for one that is not whole, as a killed process may leave it."""
    try:
        row = {k: v + 0.0 for k, v in json.loads(line).items() if k != "stage"}   # numbers alone
        return int(row["step"]) if "broken" in row else -1
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return -1


# ---- video -----------------------------------------------------------------------------------

JPG = "image_{:05d}.jpg"        # names of extracted pictures, from 1
PICTURES = ("JPEG", "PNG", "BMP", "WEBP")                     # EPS would start a program


class Window(NamedTuple):
    """`num_frames` pictures spread evenly over those that start in [start, start + span).

    Of these pictures int(span * frame rate) count, repeated from the first if the file has fewer.
    """
    start: float
    span: float
    num_frames: int


class Media(NamedTuple):
    """What `probe` tells: seconds, pictures per second, coded size, sound (0 and 0 if none)."""
    duration: float
    fps: float
    width: int
    height: int
    sample_rate: int
    channels: int


def subsample(have: int, want: int) -> np.ndarray:
    """`want` indices spread evenly over 0 .. have-1, rounded down: trunc(linspace(0, have-1))."""
    return torch.linspace(0, have - 1, want).clamp(0, have - 1).long().numpy()


def pad(have: int, want: int) -> np.ndarray:
    """Indices of the first `want` of `have` pictures, begun anew where they do not suffice."""
    return np.arange(want) % have


@contextlib.contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer]:
    """An open container; whatever goes wrong while it is open becomes a VideoError."""
    try:                              # latin-1 tags would else raise; `file:` keeps colons literal
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            yield container
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, AssertionError, MemoryError,
            IndexError) as e:                                 # of a stream that begins late
        why = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise VideoError(f"{path}: cannot be read ({why})") from e


def probe(path: Path) -> Media:
    """Duration, rate, size and sound of a file with pictures, from its header. VideoError."""
    with _open(path) as c:
        v, a = _video_stream(c, path), next((a for a in c.streams.audio if a.codec_context), None)
        if v.duration:
            duration = float(v.duration * v.time_base)
        elif c.duration:
            duration = c.duration / av.time_base
        else:
            ticks = [p.pts for p in c.demux(v) if p.pts is not None]
            duration = float((max(ticks, default=0) - _origin(v)) * v.time_base)
        size = v.codec_context.width, v.codec_context.height
        sound = (a.rate or 0, a.channels or 0) if a else (0, 0)
        return Media(duration, float(_rate(v)), *size, *sound)


def _video_stream(c, path):
    if not c.streams.video or c.streams.video[0].codec_context is None:
        raise VideoError(f"{path}: has no pictures" + " of a known codec" * bool(c.streams.video))
    return c.streams.video[0]


def _origin(v) -> int:
    """Tick of the first picture; all times are counted from it."""
    return v.start_time or 0


def _rate(v) -> Fraction:
    rate = v.average_rate or v.guessed_rate or Fraction(25)
    if rate > 10000:
        raise ValueError(f"it claims {float(rate):.6g} pictures per second")
    return rate


def read_clip(path: Path, windows: Sequence[Window | Sequence[float]],
              short_side: int | None = None, sound: tuple[float, float] | None = None):
    """Pictures of several windows of one file: one open, one seek, scaled while decoding.

    windows     each a `Window`, or ascending times: the picture on show at each (the last that
                starts at or before it). Windows past the end are moved back to the end.
    short_side  pixels; larger pictures are scaled down to it, smaller ones stay as they are.
    sound       seconds (start, stop): also return the sound between them, as `read_audio` does.

    Returns a list of uint8 arrays (T, H, W, 3), upright as players show them; with `sound` a pair
    of that list and (samples, rate). Frame-exact in every container that FFmpeg reads. Raises
    VideoError for what cannot be decoded, and for a file that ends before its header says and
    before the wanted time.
    """
    with _open(path) as c:
        v = _video_stream(c, path)
        v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
        heard = None if sound is None else _read_sound(c, path, *sound)
        clips = [None] * len(windows)
        for group in _groups(windows, apart=c.format.name != "avi"):
            pictures = _read_group(c, v, path, [windows[i] for i in group], short_side)
            for i, clip in zip(group, pictures):
                clips[i] = clip
        return clips if sound is None else (clips, heard)


def stream(path: Path, size: Callable[[int, int], tuple[int, int]] | None = None,
           chunk: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every picture of a file in order, in bounded memory: (times (n,), uint8 (n, H, W, 3)).

    At most `chunk` pictures at once; times in seconds since the first picture, those of `clock`.
    size: from a picture's (width, height) to those wanted. VideoError for what cannot be decoded,
    and for a file whose pictures end more than 0.5 s before its header says.
    """
    with _open(path) as c:
        v, times, pictures, number, last = _video_stream(c, path), [], [], -1, 0.0
        cc, starts = v.codec_context, clock(path)[0] if c.format.name == "avi" else None
        cc.thread_type, cc.thread_count = "NONE", 1
        for k, p in enumerate(c.demux(v)):
            frames = []
            with contextlib.suppress(av.InvalidDataError, av.EOFError):   # as the ffmpeg program
                frames = p.decode()
            for f in frames:
                if starts is not None:                        # counted, as in `_pictures`
                    number = max(number + 1, k - cc.has_b_frames if cc.name == "mpeg4" else 0)
                    last = float(starts[min(number, len(starts) - 1)])
                else:
                    number += 1
                    last = float(number / _rate(v) if f.pts is None
                                 else (f.pts - _origin(v)) * v.time_base)
                times.append(last)
                pictures.append(_to_rgb(f, *(size or _same)(f.width, f.height)))
                if len(pictures) == chunk:
                    yield np.array(times), np.stack(pictures)
                    times, pictures = [], []
        _check_end(c, v, path, last, _promise(c, v) - 1.5 / float(_rate(v)))
    if number < 0:
        raise VideoError(f"{path}: no picture can be decoded")
    if pictures:
        yield np.array(times), np.stack(pictures)


def _same(width, height):
    return width, height


def clock(path: Path) -> tuple[np.ndarray, float]:
    """(seconds of every picture since the first, pictures per second), without decoding them."""
    with _open(path) as c:
        v = _video_stream(c, path)
        counted = c.format.name == "avi"                      # pictures may have been left out
        ticks = sorted(p.dts if counted or p.pts is None else p.pts for p in c.demux(v)
                       if p.size and not p.is_discard and (p.pts, p.dts) != (None, None))
        return (np.array(ticks) - _origin(v)) * float(v.time_base), float(_rate(v))


def count_frames(path: Path, pattern: str = JPG) -> int:
    """How many pictures really decode, whatever the header says; of a folder, how many there are.

    A folder holds pictures named by `pattern`, from 1. VideoError if one of these is missing.
    """
    if path.is_dir():
        form = re.compile(re.sub(r"\\\{:\d*d\\\}", r"\\d+", re.escape(pattern)))
        names = [f.name for f in os.scandir(path) if form.fullmatch(f.name)]
        lost = {pattern.format(i + 1) for i in range(len(names))} - set(names)
        if lost or not names:
            raise VideoError(f"{path}: {min(lost, default=pattern.format(1))} is missing")
        return len(names)
    with _open(path) as c:
        v, number = _video_stream(c, path), 0
        v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
        for p in c.demux(v):
            with contextlib.suppress(av.InvalidDataError, av.EOFError):   # as the ffmpeg program
                number += len(p.decode())
        return number


def read_frames(path: Path, numbers: Sequence[int], pattern: str = JPG,
                short_side: int | None = None) -> np.ndarray:
    """Pictures by number, from 0 in the order they are shown: uint8 (T, H, W, 3).

    numbers: ascending; short_side: larger pictures are scaled down to it. Of a video file, or of a
    folder as `count_frames` describes it. Raises VideoError.
    """
    if not path.is_dir():
        with _open(path) as c:
            v = _video_stream(c, path)
            v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
            if c.format.name == "avi" and len(v.index_entries) == v.frames:
                ticks = np.array([e.timestamp for e in v.index_entries if e.size])
            else:
                ticks = np.array(sorted(t for p in c.demux(v) if p.size and not p.is_discard and (
                    t := p.dts if c.format.name == "avi" else p.pts) is not None))
            if not 0 <= numbers[0] <= numbers[-1] < len(ticks):
                raise VideoError(f"{path}: has {len(ticks)} pictures, no number {numbers[-1]}")
            times = (ticks[numbers] - _origin(v)) * float(v.time_base)
            return _read_group(c, v, path, [times], short_side)[0]
    from PIL import Image
    pictures = []
    for n in numbers:
        name = path / pattern.format(n + 1)
        try:
            picture = Image.open(name, formats=PICTURES).convert("RGB")
            size = _scaled(picture, short_side)
            if size != picture.size:
                picture = picture.resize(size, Image.Resampling.BILINEAR)
            pictures.append(np.asarray(picture))
        except Exception as e:                                # Pillow's own, struct's, zlib's
            raise VideoError(f"{name}: cannot be read ({type(e).__name__})") from e
    if len({p.shape for p in pictures}) > 1:
        raise VideoError(f"{path}: its pictures differ in size")
    return np.stack(pictures)


def _span(window) -> tuple[float, float]:
    """First and last second of interest of a window."""
    if isinstance(window, Window):
        return max(0.0, window.start), max(0.0, window.start) + window.span
    return max(0.0, window[0]), max(0.0, window[-1])


def _groups(windows, apart: bool, gap: float = 2.0) -> list[list[int]]:
    """Windows to decode in one pass: those less than `gap` seconds from the one before."""
    groups, end = [], -math.inf
    for i in sorted(range(len(windows)), key=lambda i: _span(windows[i])):
        start, stop = _span(windows[i])
        if not groups or (apart and start > end + gap):
            groups.append([])
        groups[-1].append(i)
        end = max(end, stop)
    return groups


def _read_group(c, v, path, windows, short_side):
    """Decode the pictures of neighbouring windows in one pass."""
    origin, tick, rate = _origin(v), float(v.time_base), float(_rate(v))
    counted = c.format.name == "avi"      # packed B-frames have useless time stamps: count pictures
    low = min(_span(w)[0] for w in windows)
    high = origin + int((max(_span(w)[1] for w in windows) + 1.5 / rate) / tick)
    packets, ticks, ended = _packets(c, v, origin + int(low / tick + 1e-3), high, counted)
    if not len(ticks):
        raise VideoError(f"{path}: no pictures at {low:.2f} s")
    last = (ticks[-1] - origin) * tick
    if ended:
        _check_end(c, v, path, last, min((high - origin) * tick, _promise(c, v)) - 1.5 / rate)
    over = [w for w in windows if isinstance(w, Window) and last < _span(w)[1] + 0.5 / rate]
    for back in (2, math.inf):            # windows that overrun the end move back: begin earlier
        if low > 0 and len(ticks) < max((_count(w, rate) for w in over), default=0):
            low = max(0.0, last - back * max(w.span for w in over))
            packets, ticks, _ = _packets(c, v, origin + int(low / tick), high, counted)
    picks = [_choose(w, (ticks - origin) * tick, rate, tick) for w in windows]
    wanted = sorted({int(ticks[i]) for pick in picks for i in pick})
    images = _decode(v, path, packets, wanted, short_side,
                     [p.dts or 0 for p in packets] if counted else None)
    return [np.stack([images[int(ticks[i])] for i in pick]) for pick in picks]


def _count(window, rate) -> int:
    """Number of pictures that a Window is about."""
    return max(1, int(window.span * rate + 1e-6))


def _promise(c, v) -> float:
    """Seconds that the header promises, 0 if it does not say."""
    if c.format.name == "avi":                                # FFmpeg cuts its duration
        return float(v.frames / _rate(v))
    return float(v.duration * v.time_base) if v.duration else (c.duration or 0) / av.time_base


def _check_end(c, v, path, last, wanted):
    """Raise if the file breaks off: pictures end at `last`, more than 0.5 s before `wanted`."""
    if wanted > last + 0.5 and not v.duration:                # mkv: sound may be what lasts longer
        c.seek(int(last * av.time_base) + (c.start_time or 0))
        ends = [(p.pts + (p.duration or 0)) * p.time_base for p in c.demux() if p.pts is not None]
        last = float(max(ends, default=last) - _origin(v) * v.time_base)
    if wanted > last + 0.5:
        raise VideoError(f"{path}: ends at {last:.2f} s, its header promises "
                         f"{_promise(c, v):.2f} s")


def _choose(window, starts, rate, tick) -> np.ndarray:
    """Indices into `starts` (ascending seconds) of the pictures that a window asks for."""
    slack = 1e-3 * tick                                       # times that are ticks, in floats
    if not isinstance(window, Window):
        times = np.asarray(window, dtype=np.float64) + slack
        return np.maximum(0, np.searchsorted(starts, times, "right") - 1)
    (start, stop), count = _span(window), _count(window, rate)
    start -= 0.999 * tick if tick <= 1e-3 else 1e-6           # a begun tick counts
    first, stop = np.searchsorted(starts, (start, stop + 0.5 / rate))
    if stop == len(starts):
        first = min(first, max(0, stop - count))
    return first + pad(max(1, stop - first), count)[subsample(count, window.num_frames)]


def _seek(c, stream, tick) -> bool:
    """Go to the key frame at or before a stream's tick, None: to the start; could it be done?"""
    start = c.start_time or 0                                 # a cut mp4 has no key frame there
    early = [start] if c.format.name == "avi" else [start - 10 * av.time_base, start]
    for goal in early if tick is None else [tick]:
        with contextlib.suppress(av.FFmpegError):
            c.seek(goal, stream=None if tick is None else stream)
            return True
    return tick is None                                       # not seekable: read on from here


def _packets(c, v, low, high, counted):
    """(packets, ticks of their pictures, was it the end?): from the key frame at or before tick
    `low`, or from the first where pictures are `counted`, until past `high`.

    Some containers seek to a later key frame than asked for: then ask for an earlier one.
    """
    stamp = "dts" if counted else "pts"
    # B-frames shown before a key frame; and the first ones after it lack a time to refer to.
    spare = 8 * (counted and v.codec_context.has_b_frames)
    start = counted and (v.codec.name != "mpeg4" or len(v.index_entries) != v.frames
                         or low - spare <= _origin(v))
    for back in (None,) if start else (0, 2, 10, None):
        if not _seek(c, v, None if back is None else low - spare - int(back / v.time_base)):
            continue
        packets, ended, key = [], True, back is not None
        for p in c.demux(v):
            if p.size == 0:
                break
            packets.append(p)
            key = key or p.is_keyframe                        # a cut file may begin without one
            if key and p.dts is not None and p.dts > high:    # pts >= dts: nothing later is wanted
                ended = False
                break
        stamps = [getattr(p, stamp) for p in packets]
        keys = [k for k, (p, t) in enumerate(zip(packets, stamps))
                if back is not None and p.is_keyframe and t is not None and t <= low - spare
                and k + spare < len(packets)]
        if keys:
            packets, stamps = packets[keys[-1]:], stamps[keys[-1]:]
            break
    begin = stamps[0] + spare if keys else -math.inf          # an open GOP has earlier ones
    return packets, np.array(sorted(t for p, t in zip(packets, stamps) if t is not None
                                    and t >= begin and not p.is_discard)), ended


def _decode(v, path, packets, wanted, short_side, counted):
    """{tick: picture} for the `wanted` ticks, as `_pictures` finds them, scaled."""
    got, size = {}, None
    for tick, frame in _pictures(v, path, packets, wanted, counted):
        size = size or _scaled(frame, short_side)
        got[tick] = _to_rgb(frame, *size)
    return got


def _pictures(v, path, packets, wanted, counted):
    """(tick, frame) for each of the ascending `wanted` ticks; B-frames that nobody wants are not
    reconstructed.

    counted: None, or the ticks of the pictures in their order, where time stamps are of no use.
    A picture lost to damage is replaced by the one before it, before the first picture by that
    one, at most a second away. VideoError, at the end, if there is none.
    """
    cc, need, wanted_set = v.codec_context, deque(wanted), set(wanted)
    number, before, second = -1, None, 1 / v.time_base
    for k, p in enumerate(itertools.chain(packets, [None])):
        plain = counted is not None or p is None or p.pts in wanted_set
        cc.skip_frame = "DEFAULT" if plain else "NONREF"
        try:
            frames = p.decode() if p is not None else cc.decode(None)
        except (av.InvalidDataError, av.EOFError):            # drop the packet and go on
            continue
        for f in frames:
            if counted is not None:       # mpeg4 holds one picture back at most: damage loses count
                number = max(number + 1, k - cc.has_b_frames if cc.name == "mpeg4" else 0)
            now = f.pts if counted is None else counted[min(number, len(counted) - 1)]
            if now is None:
                continue
            while need and need[0] < now and abs(need[0] - (before or (now,))[0]) <= second:
                yield need.popleft(), before[1] if before else f
            if need and need[0] == now:
                yield need.popleft(), f
            before = (now, f)
        if not need:
            break
    while need and before and 0 <= need[0] - before[0] <= second:
        yield need.popleft(), before[1]
    if need:
        raise VideoError(f"{path}: {len(need)} of {len(wanted)} wanted pictures are damaged")


def _scaled(frame, short_side) -> tuple[int, int]:
    """Width and height after scaling the short side down to `short_side`."""
    w, h = frame.width, frame.height
    if not short_side or min(w, h) <= short_side:
        return w, h
    return max(1, round(w * short_side / min(w, h))), max(1, round(h * short_side / min(w, h)))


_scale, _colour = VideoReformatter(), VideoReformatter()      # kept: each holds one scaler


def _to_rgb(frame, w: int, h: int) -> np.ndarray:
    """(h, w, 3) uint8, scaled in YUV, then converted: closer to a float resize, and faster.

    A view into the frame's padded rows; `np.stack` makes the copy.
    """
    turns = (frame.rotation // 90) % 4
    if (frame.width, frame.height) != (w, h):
        frame = _scale.reformat(frame, w, h, "yuv422p", interpolation="BILINEAR", threads=1)
    frame = _colour.reformat(frame, w, h, "rgb24", threads=1)
    plane = frame.planes[0]                                   # rows are padded to line_size
    image = np.frombuffer(plane, np.uint8).reshape(h, plane.line_size)[:, :3 * w].reshape(h, w, 3)
    return np.rot90(image, turns)


# ---- sound -----------------------------------------------------------------------------------

def audio_window(start: float, stop: float, rate: int, total: int | None = None):
    """(first, last + 1) samples between two times: floor(start·rate) .. floor(stop·rate) - 1,
    clamped to a stream of `total` samples.
    """
    first, last = max(0, math.floor(start * rate)), math.floor(stop * rate)
    return first, max(first, last if total is None else min(last, total))


def read_audio(path: Path, start: float = 0.0, stop: float = math.inf):
    """Sound between two times: (float32 (channels, samples) in [-1, 1], samples per second).

    Sample k of the result is heard (floor(start·rate) + k) / rate seconds after the first picture.
    The result is shorter where the file begins or ends inside the window, silent where the stream
    has a gap. Raises VideoError, also for a file without sound.
    """
    with _open(path) as c:
        return _read_sound(c, path, start, stop)


def _read_sound(c, path, start, stop):
    if not c.streams.audio or c.streams.audio[0].codec_context is None:
        raise VideoError(f"{path}: has no sound" + " of a known codec" * bool(c.streams.audio))
    a, rate = c.streams.audio[0], c.streams.audio[0].rate
    if not rate:
        raise VideoError(f"{path}: its sound has no sample rate")
    clock = c.streams.video[0] if c.streams.video else a
    origin = _origin(clock) * clock.time_base                 # exact: Fraction seconds
    first, last = audio_window(start, min(stop, 1e7), rate)
    begin = round(((a.start_time or 0) * a.time_base - origin) * rate)
    fresh = True                                              # just opened, not yet read from
    for back in (0.3, 2.0, None):                             # codecs need a little run-up
        seek = start - back if back and start > back else None
        if seek is not None:
            there = _seek(c, a, int((origin + Fraction(seek)) / a.time_base))
        else:                                                 # after a seek, Opus lacks its first
            there = fresh or _seek(c, a, None)
        fresh = False
        pieces = _sound_pieces(c, a, origin, rate, begin, first, last) if there else []
        if seek is None or (pieces and pieces[0][0] <= max(first, begin)):
            break
    end = min(last, max((b + x.shape[1] for b, x in pieces), default=first))
    if end - first > sum(x.shape[1] for _, x in pieces) + 3600 * rate:
        raise VideoError(f"{path}: damaged, its sound has a gap of hours")
    channels = pieces[0][1].shape[0] if pieces else a.channels or 1
    out = np.zeros((channels, max(0, end - first)), np.float32)
    for b, x in pieces:
        low, high = max(b, first), min(b + x.shape[1], end)
        if high > low:
            out[:, low - first:high - first] = x[:, low - b:high - b]
    if not np.isfinite(out).all():
        raise VideoError(f"{path}: its sound holds NaN or Inf")
    return out, rate


def _sound_pieces(c, a, origin, rate, begin, first, last):
    """Decoded frames as (first sample, (channels, n)) from here on, until past `last`."""
    pieces, at, slack = [], None, max(1, math.ceil(rate * a.time_base))
    for p in c.demux(a):
        try:
            frames = p.decode()
        except (av.InvalidDataError, av.EOFError):
            continue
        for f in frames:
            if f.pts is not None:
                b = round((f.pts * f.time_base - origin) * rate)
                n = f.samples if a.codec.name[:3] == "pcm" else a.codec_context.frame_size or rate
                even = begin + round((b - begin) / n) * n     # stamps of a millisecond
                b = even if f.samples == n and abs(b - even) <= slack else b
                at = b if at is None or abs(b - at) > slack else at   # coarse stamps: keep the flow
            x, at = _samples(f), at or 0
            if at + x.shape[1] > first - rate // 10:
                pieces.append((at, x))
            if at >= last:                                    # kept: silence reaches up to it
                return pieces
            at += x.shape[1]
    return pieces


def _samples(frame) -> np.ndarray:
    """(channels, samples) float32 in [-1, 1] of any sample format."""
    kind, planar = frame.format.name.rstrip("p"), frame.format.is_planar
    n = frame.layout.nb_channels
    kind = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}[kind]
    # PyAV's own array takes what lies behind the eighth plane for more of them, and ends in SIGSEGV
    x = np.stack([np.frombuffer(p, kind, frame.samples * (1 if planar else n))
                  for p in frame.planes[:n if planar else 1]])
    x = x if planar else x.reshape(-1, n).T
    if x.dtype == np.uint8:
        return (x.astype(np.float32) - 128) / 128
    full = -float(np.iinfo(x.dtype).min) if x.dtype.kind == "i" else 1.0
    return (x / full).astype(np.float32)


# ---- pictures --------------------------------------------------------------------------------

def font(size: int = 13):
    """Pillow's own typeface."""
    from PIL import ImageFont
    return ImageFont.load_default(size)


def round_numbers(low: float, high: float, most: int = 6) -> np.ndarray:
    """Ticks: at most so many multiples of 1, 2, 2.5 or 5 times a power of ten in [low, high]."""
    step = (high - low) / max(1, most - 1)
    unit = 10.0 ** math.floor(math.log10(step))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= step * (1 - 1e-9))
    return step * np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)


def dashed(draw, points: Sequence[tuple[float, float]], on: float, off: float,
           colour: str, width: int = 2) -> None:
    """A line through points, of dashes of `on` pixels with gaps of `off`, measured along it."""
    at = 0.0                                                  # pixels since the last dash began
    for (x, y), (x1, y1) in zip(points, points[1:]):
        length, done = math.hypot(x1 - x, y1 - y), 0.0
        while done < length:
            part = min(length - done, (on if at < on else on + off) - at)
            if at < on:
                a, b = done / length, (done + part) / length
                draw.line([(x + a * (x1 - x), y + a * (y1 - y)),
                           (x + b * (x1 - x), y + b * (y1 - y))], fill=colour, width=width)
            done, at = done + part, at + part
            if at >= on + off - 1e-9:
                at = 0.0


STROKES = (("#1f4e9c", 9, 0), ("#c65a11", 9, 4), ("#2c7d3f", 2, 3), ("#7a3f98", 14, 3),
           ("#555555", 5, 5))                                 # colour, dash, gap


def draw_panel(draw, box: tuple[int, int, int, int], x: np.ndarray, lines: dict[str, np.ndarray],
               xlabel: str, marks: Sequence[float] = (),
               limits: tuple[float, float] | None = None) -> None:
    """Curves over x inside `box` (left, top, right, bottom in pixels): frame, round ticks, and a
    legend above, 18 pixels high. Curves differ by dash as well as by colour; `marks` are vertical
    lines at x values; limits: of y, else the curves' own.
    """
    left, top, right, bottom = box
    values = np.concatenate([y[np.isfinite(y)] for y in lines.values()])
    low, high = limits or ((values.min(), values.max()) if len(values) else (0.0, 1.0))
    high = high if high > low else low + max(1, abs(low) * 1e-3)
    x0, x1 = (float(x[0]), float(x[-1])) if len(x) and x[-1] > x[0] else (0.0, 1.0)

    def place(a, b):
        return (left + (a - x0) / (x1 - x0) * (right - left),
                bottom - (b - low) / (high - low) * (bottom - top))

    for b in round_numbers(low, high, 5):
        y = place(x0, b)[1]
        draw.line([(left, y), (right, y)], fill="#e4e4e4")
        draw.text((left - 5, y), f"{b:.4g}", "#333333", font(), anchor="rm")
    for a in round_numbers(x0, x1, 9):
        draw.line([(place(a, low)[0], bottom), (place(a, low)[0], bottom + 4)], fill="#888888")
        draw.text((place(a, low)[0], bottom + 5), f"{a:.6g}", "#333333", font(), anchor="ma")
    draw.rectangle(box, outline="#888888")
    draw.text(((left + right) / 2, bottom + 20), xlabel, "#333333", font(), anchor="ma")
    for t in marks:
        draw.line([place(t, low), place(t, high)], fill="#bb2222", width=2)
    at = left
    for n, (name, y) in enumerate(lines.items()):
        colour, on, off = STROKES[n % len(STROKES)]
        dashed(draw, [place(a, b) for a, b in zip(x, y) if np.isfinite(b)], on, off, colour)
        dashed(draw, [(at, top - 10), (at + 28, top - 10)], on, off, colour)
        draw.text((at + 34, top - 10), name, "#333333", font(), anchor="lm")
        at += 54 + draw.textlength(name, font())


def save_picture(image, path: Path) -> None:
    """PNG, atomically."""
    write(path, lambda f: image.save(f, "PNG"))


def draw_curve(folder: Path, title: str, keys: Sequence[str]) -> None:
    """`curve.png` from a run's `log.jsonl`: one panel per key over steps."""
    from PIL import Image, ImageDraw
    rows = [json.loads(r) for r in (folder / "log.jsonl").read_text().splitlines()]
    keys = [k for k in keys if any(k in r for r in rows)]
    image = Image.new("RGB", (760, 30 + 220 * max(1, len(keys))), "white")
    draw = ImageDraw.Draw(image)
    draw.text((70, 8), title, "black", font(15))
    for n, key in enumerate(keys):
        points = [(r["step"] + 1, r[key]) for r in rows if key in r]
        x, y = np.array(points, dtype=float).T
        draw_panel(draw, (70, 50 + 220 * n, 740, 208 + 220 * n), x, {key: y}, "step")
    save_picture(image, folder / "curve.png")


# ---- backbones -------------------------------------------------------------------------------

class TemporalConv(nn.Conv3d):
    """Conv3d with kernel (k, 1, 1), computed as a 2-D convolution over (T, H·W).

    The same parameters and results; 0.7 x the time of a training step on the CPU.
    """

    def forward(self, x):                                     # (B, C, T, H, W)
        y = F.conv2d(x.flatten(3), self.weight[..., 0], self.bias, (self.stride[0], 1),
                     (self.padding[0], 0), groups=self.groups)            # (B, C', T', H·W)
        return y.unflatten(3, x.shape[3:])                    # (B, C', T', H, W)


class PointwiseConv(nn.Conv3d):
    """Conv3d with kernel 1; on the CPU, of a tensor in channels-last memory, a matrix product.

    The same parameters and results; PyTorch's own leaves that order of memory for small batches,
    and the depthwise convolutions that follow then take twice as long.
    """

    def forward(self, x):                                     # (B, C, T, H, W)
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        x = x[..., ::self.stride[1], ::self.stride[2]].permute(0, 2, 3, 4, 1)
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class R2Plus1DBlock(nn.Module):
    """Two factored convolutions, a shortcut without norm, ONE norm on the sum."""

    def __init__(self, cin: int, cout: int, stride: tuple[int, int, int]):
        super().__init__()
        t, s = stride[0], stride[1:]
        self.spt_conv1 = nn.Conv3d(cin, cout, (1, 3, 3), (1, *s), (0, 1, 1), bias=False)
        self.spt_bn1 = nn.BatchNorm3d(cout)
        self.tmp_conv1 = TemporalConv(cout, cout, (3, 1, 1), (t, 1, 1), (1, 0, 0), bias=False)
        self.tmp_bn1 = nn.BatchNorm3d(cout)
        self.spt_conv2 = nn.Conv3d(cout, cout, (1, 3, 3), 1, (0, 1, 1), bias=False)
        self.spt_bn2 = nn.BatchNorm3d(cout)
        self.tmp_conv2 = TemporalConv(cout, cout, (3, 1, 1), 1, (1, 0, 0), bias=False)
        if cin != cout or stride != (1, 1, 1):
            self.res_conv = nn.Conv3d(cin, cout, 1, stride, bias=False)
        self.out_bn = nn.BatchNorm3d(cout)

    def forward(self, x):
        y = F.relu(self.spt_bn1(self.spt_conv1(x)))
        y = F.relu(self.tmp_bn1(self.tmp_conv1(y)))
        y = self.tmp_conv2(F.relu(self.spt_bn2(self.spt_conv2(y))))
        shortcut = self.res_conv(x) if hasattr(self, "res_conv") else x
        return F.relu(self.out_bn(y + shortcut))


class R2Plus1D(nn.Module):
    """R(2+1)D of depth 18 or 10 with a full 3-D stem (AVID, arXiv 2004.12943); names as released.

    x: (B, 3, T, H, W) -> (B, 8·width, T/8, H/32, W/32); width 64 gives 512 channels. With a
    temporal_stride of 1, which fits the same weights, T stays T.
    """

    def __init__(self, width: int = 64, depth: int = 18, temporal_stride: int = 2):
        super().__init__()
        blocks = {10: 1, 18: 2}[depth]
        w = [width, width, 2 * width, 4 * width, 8 * width]
        self.out_dim = w[-1]
        self.conv1 = nn.Sequential(
            nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(width),
            nn.ReLU(inplace=True), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
        for n, stage in enumerate(("conv2x", "conv3x", "conv4x", "conv5x")):
            first = R2Plus1DBlock(w[n], w[n + 1], (1, 1, 1) if n == 0 else (temporal_stride, 2, 2))
            rest = [R2Plus1DBlock(w[n + 1], w[n + 1], (1, 1, 1)) for _ in range(blocks - 1)]
            setattr(self, stage, nn.Sequential(first, *rest))

    def forward(self, x, return_embs=False):
        """The last map; with `return_embs` {name: map of each stage, "pool": global maximum}."""
        maps = {}
        for stage in ("conv1", "conv2x", "conv3x", "conv4x", "conv5x"):
            maps[stage] = x = getattr(self, stage)(x)
        return {**maps, "pool": F.adaptive_max_pool3d(x, 1)} if return_embs else x


class SpectrogramBlock(nn.Module):
    """Two 3x3 convolutions with norm and ReLU, no shortcut."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class SpectrogramCNN(nn.Module):
    """Nine 2-D convolutions over (time, mel) (AVID, arXiv 2004.12943); names as released.

    x: (B, 1, time, mel) -> (B, 8·width, time/16, mel/16); width 64 gives 512 channels.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.out_dim = 8 * width
        self.conv1 = nn.Sequential(nn.Conv2d(1, width, 7, 2, 3, bias=False),
                                   nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.block1 = SpectrogramBlock(width, width, 2)
        self.block2 = SpectrogramBlock(width, 2 * width, 2)
        self.block3 = SpectrogramBlock(2 * width, 4 * width, 2)
        self.block4 = SpectrogramBlock(4 * width, 8 * width, 1)

    def forward(self, x, return_embs=False):
        """The last map; with `return_embs` {name: map of each stage, "pool": global maximum}."""
        maps = {}
        for name, stage in {"conv1": "conv1", "conv2x": "block1", "conv3x": "block2",
                            "conv4x": "block3", "conv5x": "block4"}.items():
            maps[name] = x = getattr(self, stage)(x)
        return {**maps, "pool": F.adaptive_max_pool2d(x, 1)} if return_embs else x


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (arXiv 1512.03385); `last`: without the final ReLU."""

    def __init__(self, conv, norm, cin: int, cout: int, stride: int, last: bool):
        super().__init__()
        self.conv1, self.bn1 = conv(cin, cout, 3, stride), norm(cout)
        self.conv2, self.bn2 = conv(cout, cout, 3, 1), norm(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(conv(cin, cout, 1, stride), norm(cout))
        self.last = last

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = y + (x if self.downsample is None else self.downsample(x))
        return y if self.last else F.relu(y)


class PredictiveResNet(nn.Module):
    """ResNet of predictive coding: 256 channels at the end, no last ReLU, no pooling, no classes.

    2-D, of single pictures: (B, 3, H, W) -> (B, 4·width, H/32, W/32), sizes rounded up. `blocks`,
    the 2D3D-ResNet of DPC (arXiv 1909.04656): (B, 3, T, H, W) -> (B, 4·width, T/4, H/32, W/32),
    its last two stages with kernels and strides in time. Names as released, without `fc`.
    """

    def __init__(self, net: str = "resnet18", width: int = 64, blocks: bool = False,
                 track_running_stats: bool = True):
        super().__init__()

        def conv(temporal):
            def make(cin, cout, k, stride):
                if not blocks:
                    return nn.Conv2d(cin, cout, k, stride, k // 2, bias=False)
                t, s = (k, stride) if temporal else (1, 1)
                return nn.Conv3d(cin, cout, (t, k, k), (s, stride, stride),
                                 (t // 2, k // 2, k // 2), bias=False)
            return make

        norm = partial(nn.BatchNorm3d if blocks else nn.BatchNorm2d,
                       track_running_stats=track_running_stats)
        depth = {"resnet10": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}[net]
        w = [width, width, 2 * width, 4 * width, 4 * width]
        self.out_dim = w[-1]
        self.conv1, self.bn1 = conv(False)(3, width, 7, 2), norm(width)
        self.maxpool = (nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)) if blocks
                        else nn.MaxPool2d(3, 2, 1))
        for n, count in enumerate(depth):
            make = partial(ResidualBlock, conv(n > 1), norm)
            stage = [make(w[n] if k == 0 else w[n + 1], w[n + 1], 2 if n and k == 0 else 1,
                          n == 3 and k == count - 1) for k in range(count)]
            setattr(self, f"layer{n + 1}", nn.Sequential(*stage))
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))                 # H/4
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))      # H/32


class Pooled(nn.Module):
    """A network's mean over space, and over time if it has any: (B, C, ...) -> (B, C).

    Channels are shifted and scaled by two buffers, which leave them alone until someone sets them.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.out_dim = net, net.out_dim
        self.register_buffer("shift", torch.zeros(net.out_dim))
        self.register_buffer("scale", torch.ones(net.out_dim))

    def forward(self, x):
        return (self.net(x).flatten(2).mean(2) - self.shift) * self.scale


def headless(net: nn.Module) -> nn.Module:
    """A network of torchvision's without its classifier; `.out_dim` is the width before that."""
    name = "heads" if hasattr(net, "heads") else "fc"
    last = getattr(net, name)
    net.out_dim = (last if name == "fc" else last[-1]).in_features
    setattr(net, name, nn.Identity())
    return net


def bottleneck_r2plus1d(layers: Sequence[int], classes: int = 359) -> nn.Module:
    """R(2+1)D of bottleneck blocks (IG-65M, arXiv 1905.00561): [3, 8, 36, 3] has 152 layers.

    The width between its factored kernels follows from the block's own width, not, as in
    torchvision's, from that of the block before.
    """
    from torchvision.models.video import resnet

    class Factored(resnet.Conv2Plus1D):
        def __init__(self, cin, cout, between, stride=1, padding=1):
            super().__init__(cin, cout, 27 * cin * cout // (9 * cin + 3 * cout), stride, padding)

    def stem():
        return nn.Sequential(*resnet.R2Plus1dStem(),
                             nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))

    net = resnet.VideoResNet(resnet.Bottleneck, [Factored] * 4, layers, stem, classes)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.eps = 1e-3
    return net


def feature_network(name: str, small: bool = False) -> nn.Module:
    """A network that makes one vector of a picture or of a clip, `.out_dim` wide, without classes.

    vit_b16 (768), resnet18 (512), resnet50 (2048): (B, 3, H, W); r2plus1d_18, r3d_18 (512),
    r2plus1d_152 (2048): (B, 3, T, H, W). small: narrow, shallow ones for a CPU (128).
    """
    from torchvision import models
    clips = name.startswith(("r2", "r3"))
    if small:
        return Pooled(R2Plus1D(16, 10) if clips else PredictiveResNet("resnet10", 32)).eval()
    if name == "r2plus1d_152":
        return headless(bottleneck_r2plus1d([3, 8, 36, 3])).eval()
    where = models.video if clips else models
    return headless(getattr(where, {"vit_b16": "vit_b_16"}.get(name, name))(weights=None)).eval()


class SplitBatchNorm(nn.Module):
    """Batch norm that treats a batch as `splits` smaller ones, one behind the other.

    (sub-batch norm, arXiv 1912.00998.) The parts are of the batch of all processes, of which each
    holds splits / world_size of them, so the result does not depend on the number of processes.
    Statistics are kept for each part (`split_bn`, names as released) and used, once merged, for
    evaluation (`bn`): see `merge_splits`. In the release sample i is of part i mod splits.
    x: (B, C, T, H, W), all parts of this process, or the one whose turn it is: `set_turn`.
    """

    def __init__(self, channels: int, splits: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.bn = nn.BatchNorm3d(channels, affine=False)
        self.turn = None
        self.set_splits(splits)

    def set_splits(self, splits: int) -> None:
        """Another number of parts, their statistics begun anew."""
        self.splits = splits
        self.split_bn = nn.BatchNorm3d(splits * len(self.weight), affine=False,
                                       device=self.weight.device)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes the number of parts from the file: a run with long cycles changes it."""
        there = state_dict.get(f"{prefix}split_bn.running_mean")
        if there is not None and there.numel() != self.split_bn.num_features:
            self.set_splits(max(1, there.numel() // len(self.weight)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def rows(self, name: str) -> torch.Tensor:
        """A statistic of this process's parts, a view: (splits / world_size, C)."""
        n = self.splits // world_size()
        return getattr(self.split_bn, name).view(self.splits, -1)[rank() * n:(rank() + 1) * n]

    def forward(self, x):
        def norm(x, mean, var):
            return F.batch_norm(x, mean, var, self.weight, self.bias, self.training,
                                self.bn.momentum, self.bn.eps)

        if not self.training:
            return norm(x, self.bn.running_mean, self.bn.running_var)
        means, variances = self.rows("running_mean"), self.rows("running_var")
        if self.turn is not None:
            means, variances = (v[self.turn:self.turn + 1] for v in (means, variances))
        if x.numel() == x.shape[1] * len(means):
            raise UserError("batch norm has one value per channel: larger --crop or --num_frames, "
                            "or fewer --groups")
        if not len(means) or len(x) % len(means):
            raise UserError(f"batch norm in {self.splits} parts: {len(x)} samples and "
                            f"{world_size()} processes do not fit")
        self.split_bn.num_batches_tracked += not self.turn     # of a step, however many parts
        parts = [norm(*part) for part in zip(x.chunk(len(means)), means, variances)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def split_norms(model: nn.Module) -> list[SplitBatchNorm]:
    return [m for m in model.modules() if isinstance(m, SplitBatchNorm)]


def set_splits(model: nn.Module, splits: int) -> None:
    """Another number of parts in every SplitBatchNorm, if it is another."""
    for m in split_norms(model):
        if m.splits != splits:
            m.set_splits(splits)


def set_turn(model: nn.Module, turn: int | None) -> None:
    """Tell every SplitBatchNorm which of this process's parts comes next, None: all at once."""
    for m in split_norms(model):
        m.turn = turn


@torch.no_grad()
def merge_splits(model: nn.Module) -> None:
    """Bring the parts' statistics together: of all processes in `split_bn`, merged in `bn`.

    mean = mean of the means; var = mean of the variances + variance of the means. Before every
    evaluation and every checkpoint.
    """
    for m in split_norms(model) if world_size() > 1 else []:
        for name in ("running_mean", "running_var"):
            mine, every = m.rows(name).clone(), getattr(m.split_bn, name)
            every.zero_()
            m.rows(name).copy_(mine)
            dist.all_reduce(every)                            # exact: all but one are zero
    for m in split_norms(model):
        mean = m.split_bn.running_mean.view(m.splits, -1)
        m.bn.running_mean.copy_(mean.mean(0))
        m.bn.running_var.copy_(m.split_bn.running_var.view(m.splits, -1).mean(0)
                               + mean.var(0, unbiased=False))


def se_width(channels: int) -> int:
    """Width of a squeeze-and-excitation: a 16th, rounded to a multiple of 8 that is near it."""
    wanted = channels / 16
    width = max(8, int(wanted + 4) // 8 * 8)
    return width + 8 if width < 0.9 * wanted else width


class X3DBlock(nn.Module):
    """Widen, 3x3x3 depthwise, (squeeze and excite,) swish, narrow; names as released."""

    def __init__(self, cin: int, inner: int, cout: int, stride: int, excite: bool, norm):
        super().__init__()
        self.conv1, self.bn1 = PointwiseConv(cin, inner, 1, bias=False), norm(inner)
        self.conv2 = nn.Conv3d(inner, inner, 3, (1, stride, stride), 1, groups=inner, bias=False)
        self.bn2 = norm(inner)
        self.conv3, self.bn3 = PointwiseConv(inner, cout, 1, bias=False), norm(cout)
        if excite:
            self.fc1 = PointwiseConv(inner, se_width(inner), 1)
            self.fc2 = PointwiseConv(se_width(inner), inner, 1)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(
                PointwiseConv(cin, cout, 1, (1, stride, stride), bias=False), norm(cout))

    def forward(self, x):
        y = self.wide(x) if self.training else self.wide_in_pieces(x)
        if hasattr(self, "fc1"):
            y = y * self.fc2(F.relu(self.fc1(y.mean((2, 3, 4), keepdim=True)))).sigmoid()
        y = self.bn3(self.conv3(F.silu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    def wide(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def wide_in_pieces(self, x, size: int = 32):
        """The same for a long video, `size` frames at a time: the widest maps are never whole.

        One frame more on either side, for the kernel; zeros beyond the ends.
        """
        T = x.shape[2]
        if T <= size:
            return self.wide(x)
        pieces = []
        for a in range(0, T, size):
            first, last = max(0, a - 1), min(T, a + size + 1)
            y = self.wide(x[:, :, first:last])
            pieces.append(y[:, :, a - first:a - first + min(size, T - a)])
        return torch.cat(pieces, 2)


class X3D(nn.Module):
    """X3D (arXiv 2004.04730), without strides in time; names as released by its SSDet users.

    x: (B, 3, T, H, W) -> logits (B, classes, T), or with per_frame=False (B, classes, 1).
    version: XS, S, M and L have the same widths, L and XL the same depth; `tiny` is for a CPU.
    norm: SplitBatchNorm, or nn.BatchNorm3d. dropout: before the classifier.
    """
    BLOCKS = {"L": (5, 10, 25, 15), "XL": (5, 10, 25, 15), "tiny": (1, 2, 2, 1)}
    WIDTHS = {"XL": (32, (72, 162, 306, 630), (32, 72, 136, 280), 2048),
              "tiny": (12, (24, 36, 60, 96), (12, 16, 28, 48), 128)}

    def __init__(self, version: str = "M", classes: int = 400, per_frame: bool = True,
                 norm: Callable[[int], nn.Module] = SplitBatchNorm, dropout: float = 0.5):
        super().__init__()
        blocks = self.BLOCKS.get(version, (3, 5, 11, 7))
        stem, inner, outer, hidden = self.WIDTHS.get(
            version, (24, (54, 108, 216, 432), (24, 48, 96, 192), 2048))
        self.widths, self.norm = (*outer, inner[-1]), norm    # of the maps
        self.per_frame, self.dropout = per_frame, dropout
        self.conv1_s = nn.Conv3d(3, stem, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
        self.conv1_t = TemporalConv(stem, stem, (5, 1, 1), 1, (2, 0, 0), groups=stem, bias=False)
        self.bn1 = norm(stem)
        for n, (count, wide, cout) in enumerate(zip(blocks, inner, outer)):
            cin = (stem, *outer)[n]
            setattr(self, f"layer{n + 1}", nn.Sequential(*(
                X3DBlock(cin if i == 0 else cout, wide, cout, 2 if i == 0 else 1, i % 2 == 0, norm)
                for i in range(count))))
        self.conv5, self.bn5 = PointwiseConv(outer[-1], inner[-1], 1, bias=False), norm(inner[-1])
        self.fc1 = PointwiseConv(inner[-1], hidden, 1, bias=False)
        self.fc2 = nn.Linear(hidden, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x):
        """(B, 3, T, H, W) -> (B, stem, T, H/2, W/2)"""
        return F.relu(self.bn1(self.conv1_t(self.conv1_s(x))))

    def last(self, x):
        """What the head reads: (B, C, T, h, w) -> (B, C', T, h, w)"""
        return F.relu(self.bn5(self.conv5(x)))

    def maps(self, x):
        """{name: map} of the four stages and of conv5, each (B, C, T, H/2^n, W/2^n)."""
        found, x = {}, self.stem(x)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            found[name] = x = getattr(self, name)(x)
        return {**found, "conv5": self.last(x)}

    def head(self, x):
        """Logits from conv5's map: (B, C, T, h, w) -> (B, classes, T or 1)"""
        x = x.mean((3, 4), keepdim=True) if self.per_frame else x.mean((2, 3, 4), keepdim=True)
        x = F.relu(self.fc1(x)).flatten(2)                    # (B, hidden, T)
        return _classify(self.fc2, F.dropout(x, self.dropout, self.training))

    def forward(self, x):
        x = self.stem(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.head(self.last(x))


def _classify(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """(B, C, T) -> (B, classes, T) in float32: scores that are ranked must not be rounded."""
    with exact(x):
        return linear(x.to(linear.weight).transpose(1, 2)).transpose(1, 2)


def _rename(tensors: dict, rules: Sequence[tuple[str, str]]) -> dict:
    """Apply every rule (pattern, replacement) in turn to every name."""
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


# Names of the X3D zoos of SlowFast (first) and pytorchvideo in ours.
_X3D_NAMES = [
    (r"^s1\.pathway0_stem\.conv_xy\.", "conv1_s."), (r"^s1\.pathway0_stem\.conv\.", "conv1_t."),
    (r"^s1\.pathway0_stem\.bn\.", "bn1."),
    (r"^s([2-5])\.pathway0_res(\d+)\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}."),
    (r"^head\.conv_5\.", "conv5."), (r"^head\.conv_5_bn\.", "bn5."), (r"^head\.lin_5\.", "fc1."),
    (r"^head\.projection\.", "fc2."), (r"\.branch1_bn\.", ".downsample.1."),
    (r"\.branch1\.", ".downsample.0."), (r"\.branch2\.se\.fc", ".fc"),
    (r"\.branch2\.([abc])(_bn)?\.", lambda m: f".{'bn' if m[2] else 'conv'}{'_abc'.index(m[1])}."),
    (r"^blocks\.0\.conv\.conv_t\.", "conv1_s."), (r"^blocks\.0\.conv\.conv_xy\.", "conv1_t."),
    (r"^blocks\.0\.norm\.", "bn1."), (r"^blocks\.([1-4])\.res_blocks\.(\d+)\.", r"layer\1.\2."),
    (r"\.branch1_conv\.", ".downsample.0."), (r"\.branch1_norm\.", ".downsample.1."),
    (r"\.branch2\.norm_b\.0\.", ".bn2."), (r"\.branch2\.norm_b\.1\.block\.0\.", ".fc1."),
    (r"\.branch2\.norm_b\.1\.block\.2\.", ".fc2."),
    (r"\.branch2\.(conv|norm)_([abc])\.",
     lambda m: f".{'bn' if m[1] == 'norm' else 'conv'}{'_abc'.index(m[2])}."),
    (r"^blocks\.5\.pool\.pre_conv\.", "conv5."), (r"^blocks\.5\.pool\.pre_norm\.", "bn5."),
    (r"^blocks\.5\.pool\.post_conv\.", "fc1."), (r"^blocks\.5\.proj\.", "fc2.")]


def x3d_tensors(tensors: dict, own: dict) -> dict:
    """The tensors of any X3D checkpoint under the names of X3D, fit for its kind of batch norm.

    From SlowFast's zoo, from pytorchvideo's, or as released; statistics of plain or synchronised
    batch norm become those of every part, and the other way round. own: the network's entries.
    """
    ours = _rename(tensors, _X3D_NAMES)
    if any(k.startswith("blocks.") for k in tensors) and "layer1.0.downsample.0.weight" in ours:
        like = ours["layer1.0.downsample.0.weight"].new_ones(len(ours["conv1_s.weight"]))
        for name, value in (("weight", (1 + 1e-5) ** 0.5), ("bias", 0), ("running_mean", 0),
                            ("running_var", 1)):              # pytorchvideo has no norm there
            ours.setdefault(f"layer1.0.downsample.1.{name}", like * value)
        ours.setdefault("layer1.0.downsample.1.num_batches_tracked", torch.tensor(0))
    if "fc1.weight" in ours and ours["fc1.weight"].dim() == 2:
        ours["fc1.weight"] = ours["fc1.weight"][:, :, None, None, None]
    return fit_norms(ours, own)


def fit_norms(tensors: dict, own: dict) -> dict:
    """Batch norms of a checkpoint in the form that a network has: split, or plain (and sync)."""
    fitted = dict(tensors)
    for base in [k.removesuffix(".running_mean") for k in own if k.endswith(".running_mean")]:
        norm = re.sub(r"\.(split_)?bn$", "", base)
        norm = norm if f"{norm}.split_bn.running_mean" in own else base   # else it is a plain one
        plain = next((b for b in (f"{norm}.bn", norm) if f"{b}.running_mean" in tensors), None)
        if plain is None or base == plain:
            continue
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            there, wanted = tensors.get(f"{base}.{name}"), own[f"{base}.{name}"]
            merged = tensors.get(f"{plain}.{name}", torch.zeros((), dtype=torch.long))
            if there is None or there.shape != wanted.shape:
                fits = merged.dim() and wanted.numel() % merged.numel() == 0
                fitted[f"{base}.{name}"] = (merged.repeat(wanted.numel() // merged.numel())
                                            if fits else merged)
            if base == norm:                                  # a plain norm has no parts
                fitted.pop(f"{norm}.split_bn.{name}", None)
    return {k: v for k, v in fitted.items() if k in own or not re.search(
        r"\.(running_(mean|var)|num_batches_tracked)$", k)}


class SlowFastBlock(nn.Module):
    """Bottleneck with a temporal kernel in its first convolution; names of SlowFast's zoo."""

    def __init__(self, cin: int, inner: int, cout: int, stride: int, kernel: int, norm):
        super().__init__()
        conv = partial(nn.Conv3d, bias=False)
        if stride != 1 or cin != cout:
            self.branch1 = conv(cin, cout, 1, (1, stride, stride))
            self.branch1_bn = norm(cout)
        self.branch2 = nn.ModuleDict({
            "a": conv(cin, inner, (kernel, 1, 1), 1, (kernel // 2, 0, 0)), "a_bn": norm(inner),
            "b": conv(inner, inner, (1, 3, 3), (1, stride, stride), (0, 1, 1)),
            "b_bn": norm(inner), "c": conv(inner, cout, 1), "c_bn": norm(cout)})
        nn.init.zeros_(self.branch2["c_bn"].weight)

    def forward(self, x):
        b = self.branch2
        y = F.relu(b["a_bn"](b["a"](x)))
        y = b["c_bn"](b["c"](F.relu(b["b_bn"](b["b"](y)))))
        return F.relu(y + (self.branch1_bn(self.branch1(x)) if hasattr(self, "branch1") else x))


class SlowFast(nn.Module):
    """SlowFast-R50 (arXiv 1812.03982): every `alpha`-th frame wide, all frames narrow.

    x: (B, 3, T, H, W) -> logits (B, classes, T), the slow pathway stretched to the fast one's
    times, or with per_frame=False (B, classes, 1). Names of SlowFast's zoo.
    """

    def __init__(self, classes: int = 400, per_frame: bool = True, width: int = 64,
                 depth: Sequence[int] = (3, 4, 6, 3), alpha: int = 4, beta: int = 8,
                 norm: Callable[[int], nn.Module] = SplitBatchNorm, dropout: float = 0.5):
        super().__init__()
        self.alpha, self.per_frame, self.dropout = alpha, per_frame, dropout
        self.norm, widths = norm, (width, width // beta)
        stems, slow = [], [width, *(4 * width << n for n in range(4))]
        for w, k in zip(widths, (1, 5)):
            stems.append(nn.ModuleDict({
                "conv": nn.Conv3d(3, w, (k, 7, 7), (1, 2, 2), (k // 2, 3, 3), bias=False),
                "bn": norm(w)}))
        self.s1 = nn.ModuleDict({f"pathway{p}_stem": stem for p, stem in enumerate(stems)})
        for n, count in enumerate(depth):
            fuse = slow[n] // beta                            # of the fast pathway, before
            setattr(self, f"s{n + 1}_fuse", nn.ModuleDict({
                "conv_f2s": nn.Conv3d(fuse, 2 * fuse, (7, 1, 1), (alpha, 1, 1), (3, 0, 0),
                                      bias=False), "bn": norm(2 * fuse)}))
            stage = {}
            for p, w in enumerate(widths):
                before = slow[n] + 2 * fuse if p == 0 else fuse
                kernel = 3 if p == 1 or n > 1 else 1
                for i in range(count):
                    stage[f"pathway{p}_res{i}"] = SlowFastBlock(
                        before if i == 0 else 4 * w << n, w << n, 4 * w << n,
                        2 if n and i == 0 else 1, kernel, norm)
            setattr(self, f"s{n + 2}", nn.ModuleDict(stage))
        last = slow[-1] + slow[-1] // beta
        self.head = nn.ModuleDict({"projection": nn.Linear(last, classes)})
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head["projection"].weight, std=0.01)

    def pathways(self, slow, fast):
        """Both pathways' last maps: (B, 32·width, T/alpha, h, w) and (B, 4·width, T, h, w)."""
        x = [slow, fast]
        for p in (0, 1):
            stem = self.s1[f"pathway{p}_stem"]
            x[p] = F.max_pool3d(F.relu(stem["bn"](stem["conv"](x[p]))), (1, 3, 3), (1, 2, 2),
                                (0, 1, 1))
        for n in range(1, 5):
            fuse, stage = getattr(self, f"s{n}_fuse"), getattr(self, f"s{n + 1}")
            x[0] = torch.cat([x[0], F.relu(fuse["bn"](fuse["conv_f2s"](x[1])))], 1)
            for name, block in stage.items():
                p = int(name[7])
                x[p] = block(x[p])
        return x

    def forward(self, x, slow=None):
        slow, fast = self.pathways(x[:, :, ::self.alpha] if slow is None else slow, x)
        if self.per_frame:
            slow, fast = slow.mean((3, 4)), fast.mean((3, 4))             # (B, C, T)
            slow = F.interpolate(slow, fast.shape[2], mode="linear", align_corners=False)
        else:
            slow, fast = slow.mean((2, 3, 4))[..., None], fast.mean((2, 3, 4))[..., None]
        x = F.dropout(torch.cat([slow, fast], 1), self.dropout, self.training)
        return _classify(self.head["projection"], x)


def slowfast_tensors(tensors: dict, own: dict) -> dict:
    """The tensors of a SlowFast checkpoint, also pytorchvideo's, under the names of SlowFast."""
    rules = [
        (r"^blocks\.0\.multipathway_blocks\.(\d)\.conv\.", r"s1.pathway\1_stem.conv."),
        (r"^blocks\.0\.multipathway_blocks\.(\d)\.norm\.", r"s1.pathway\1_stem.bn."),
        (r"^blocks\.(\d)\.multipathway_fusion\.conv_fast_to_slow\.",
         lambda m: f"s{int(m[1]) + 1}_fuse.conv_f2s."),
        (r"^blocks\.(\d)\.multipathway_fusion\.norm\.", lambda m: f"s{int(m[1]) + 1}_fuse.bn."),
        (r"^blocks\.(\d)\.multipathway_blocks\.(\d)\.res_blocks\.(\d+)\.",
         lambda m: f"s{int(m[1]) + 1}.pathway{m[2]}_res{m[3]}."),
        (r"\.branch1_conv\.", ".branch1."), (r"\.branch1_norm\.", ".branch1_bn."),
        (r"\.branch2\.conv_([abc])\.", r".branch2.\1."),
        (r"\.branch2\.norm_([abc])\.", r".branch2.\1_bn."),
        (r"^blocks\.6\.proj\.", "head.projection.")]
    return fit_norms(_rename(tensors, rules), own)


# ---- prepare: videos re-encoded for training -------------------------------------------------

PREPARE = """Re-encode a folder of videos, so that training clips are cheaper to read.

    python common.py prepare SRC DST                     then train with --data DST
    torchrun --nproc_per_node 8 common.py prepare SRC DST --short_side 256

H.264 with a key frame every 32 pictures, B-frames that need not be decoded and no deblocking or
CABAC, the short side scaled down to --short_side. Every picture keeps its time, and the sound is
copied as it is, at the same times. DST holds the videos under the same names (what they hold is
told by their content: an .avi may hold an MP4) and the annotations (.csv, .json, .txt); folders
of pictures, features (about.json) and runs (args.json) stay behind, and so do hidden files.
Files that exist are kept, so this can be killed, repeated and started on several machines at once
(SRC has the same path there). Each process encodes on one thread: start as many as there are
cores, the files do not depend on it. One that cannot be decoded to its end is named and left out,
the others go on (exit status 1).
"""
VIDEOS = {".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts",
          ".webm", ".wmv"}
ANNOTATIONS = {".csv", ".json", ".txt"}
# Its AVX-512 code reads memory that nobody wrote: no two files alike. As fast without.
SAME_BYTES = {"x264-params": "asm=SSE4.2"} if platform.machine() in ("x86_64", "AMD64") else {}
X264 = {"preset": "veryfast", "tune": "fastdecode", "x264-params": ":".join([
    "keyint=32:min-keyint=32:scenecut=0:bframes=2:b-pyramid=none", *SAME_BYTES.values()])}


class Timetable(NamedTuple):
    """When the pictures of a file are shown: ascending ticks of so many seconds each."""
    ticks: list[int]
    second: Fraction


def timetable(path: Path) -> Timetable:
    """Of all pictures, without decoding them. VideoError, also for a file that breaks off."""
    with _open(path) as c:
        v = _video_stream(c, path)
        stamps = (p.dts if c.format.name == "avi" else p.pts for p in c.demux(v)
                  if p.size and not p.is_discard)
        ticks = sorted(t for t in stamps if t is not None)
        if not ticks:
            raise VideoError(f"{path}: has no pictures")
        last = float((ticks[-1] - _origin(v)) * v.time_base)
        _check_end(c, v, path, last, _promise(c, v) - 1.5 / float(_rate(v)))
        return Timetable(ticks, v.time_base)


def first_picture(path: Path, ticks: Sequence[int]) -> av.VideoFrame:
    """What is on show at the first of a file's ticks, as decoded. VideoError."""
    with _open(path) as c:
        v = _video_stream(c, path)
        v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
        counted = ticks if c.format.name == "avi" else None
        packets = (p for p in c.demux(v) if p.size)
        return next(_pictures(v, path, packets, ticks[:1], counted))[1]


def _even(frame, short_side) -> tuple[int, int]:
    """Width and height after scaling down, before turning, as even numbers."""
    w, h = _scaled(frame, short_side)
    if (w, h) == (frame.width, frame.height):
        return max(2, w // 2 * 2), max(2, h // 2 * 2)
    return max(2, 2 * round(w / 2)), max(2, 2 * round(h / 2))


def _upright(frame, w: int, h: int) -> av.VideoFrame:
    """A frame as 8-bit yuv420p of an even size, then turned as players show it.

    Scaled as in `_to_rgb`; colour matrix and range stay what they were, RGB becomes BT.601.
    """
    rgb, full = frame.format.is_rgb, int(frame.color_range) == 2
    tags = {"src_color_range": 2 if full or rgb else 1, "dst_color_range": 2 if full else 1}
    small = _scale.reformat(frame, w, h, "yuv420p", interpolation="BILINEAR", threads=1,
                            dst_colorspace="ITU601" if rgb else None, **tags)
    turns = (frame.rotation // 90) % 4
    if turns:
        planes = np.split(small.to_ndarray().ravel(), [w * h, w * h * 5 // 4])
        planes = [np.rot90(x.reshape(h // k, w // k), turns)
                  for x, k in zip(planes, (1, 2, 2))]
        flat = np.concatenate([x.ravel() for x in planes])
        w, h = planes[0].shape[::-1]
        small = av.VideoFrame.from_ndarray(flat.reshape(h * 3 // 2, w), "yuv420p")
    return small


def _sound_of(c):
    """The sound that `read_audio` reads, None where there is none of a known codec."""
    a = c.streams.audio[0] if c.streams.audio else None
    return a if a and a.codec_context and a.rate else None


def _container(c, a) -> str:
    """What to write: MP4; QuickTime or Matroska where MP4 cannot hold the sound as it is.

    A file whose time stamps are milliseconds (Matroska, WebM, FLV, ASF) becomes Matroska, whose
    are, too: anything finer would give its sound small gaps.
    """
    v = c.streams.video[0]
    coarse = v.time_base >= Fraction(1, 1000) and c.format.name != "avi"
    pcm = a is not None and a.codec.name.startswith("pcm")
    for name in () if coarse and "mov" not in c.format.name else ("mp4", "mov")[pcm:]:
        if a is None:
            return name
        with contextlib.suppress(av.FFmpegError, ValueError):
            with av.open(io.BytesIO(), "w", format=name) as test:
                test.add_stream_from_template(a)
                test.start_encoding()
                return name
    return "matroska"


def _encoder(out, v, first, w, h, rate, crf):
    """The H.264 stream of an output container, for frames like `first`, scaled to (w, h).

    One thread: x264's bytes depend on their number.
    """
    e = out.add_stream("libx264", rate=rate, options={**X264, "crf": f"{crf:g}"})
    cc, turned = e.codec_context, (first.rotation // 90) % 2
    e.width, e.height, e.pix_fmt = (h, w, "yuv420p") if turned else (w, h, "yuv420p")
    cc.time_base, cc.thread_count = v.time_base, 1
    if v.sample_aspect_ratio:                                 # only players heed it
        cc.sample_aspect_ratio = v.sample_aspect_ratio ** (-1 if turned else 1)
    cc.color_range = int(first.color_range)
    if not first.format.is_rgb and int(first.colorspace):     # 0 would be RGB
        cc.colorspace = int(first.colorspace)
        cc.color_primaries, cc.color_trc = int(first.color_primaries), int(first.color_trc)
    return e


def _sound_packet(p, a, copy, origin) -> av.Packet:
    """A packet of the source's sound, timed from the first picture, for the stream `copy`."""
    t = p.pts if p.pts is not None else p.dts
    if t is None:
        raise ValueError("its sound has packets without a time")
    p.pts = p.dts = round((t * a.time_base - origin) * a.rate)
    p.duration = round((p.duration or 0) * a.time_base * a.rate)
    p.time_base, p.stream = Fraction(1, a.rate), copy
    return p


@contextlib.contextmanager
def _blame(target):
    """`blame`, but where the file system cannot have such a name, a VideoError: the other files
    survive it.
    """
    try:
        with blame(target):
            yield
    except UserError as e:
        if getattr(e.__cause__, "errno", None) in (errno.ENAMETOOLONG, errno.EILSEQ):
            raise VideoError(str(e)) from e
        raise


@contextlib.contextmanager
def _placing(target):
    """A path to write to, which becomes `target` at the end, at once or not at all.

    Its name is this process's own, and short: one that begins with the target's might be too long.
    """
    part = target.with_name(f".prepare-{platform.node()}-{os.getpid()}.part")
    with _blame(target):
        try:
            yield part
            with open(part, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(part, target, form, v, a):
    """An open container to write, `part`; faults name the `target` that it is to become.

    The ticks of an MP4's header divide those of both its streams, so that neither is shifted.
    """
    options, ticks = {"fflags": "+bitexact"}, v.time_base.denominator     # no random identifiers
    if form != "matroska":
        while ticks < 10000:                                  # as the muxer does
            ticks *= 2
        both = math.lcm(ticks, a.rate if a else 1)
        options |= {"movflags": "faststart",
                    "movie_timescale": str(both if both < 2 ** 31 else ticks)}
    with _blame(target):
        out = av.open(f"file:{part}", "w", format=form, container_options=options)
    try:
        yield out
    except BaseException:
        with contextlib.suppress(Exception):                  # the first fault is the one to tell
            out.close()
        raise
    with _blame(target):
        out.close()


def _compare(source, target, table, sound):
    """VideoError unless a re-encoded file has the times of its source.

    sound: (seconds since the first picture, bytes) of each packet of sound. What is heard before
    the first picture may be gone.
    """
    try:
        made = timetable(target)
    except VideoError as e:
        raise VideoError(f"{source}: its copy cannot be read ({e})") from e
    old, new = ([float((t - x.ticks[0]) * x.second) for t in x.ticks] for x in (table, made))
    slack = float(max(table.second, made.second))
    if len(new) != len(old) or np.abs(np.subtract(new, old)).max() > slack:
        raise VideoError(f"{source}: its {len(old)} pictures came out as {len(new)}, or with other "
                         "times")
    if not sound:
        return
    with _open(target) as c:
        a, origin = c.streams.audio[0], float(made.ticks[0] * made.second)
        got = [(float(p.pts * a.time_base) - origin, p.size) for p in c.demux(a) if p.size]
        slack = 1.5 * float(max(a.time_base, Fraction(1, a.rate)))
        if a.codec.name.startswith("pcm"):                    # may be cut into other packets
            same = sum(n for _, n in got) == sum(n for _, n in sound)
            sound, got = sound[:1], got[:1]
        else:
            lost = len(sound) - len(got)
            same = 0 <= lost < len(sound) and (not lost or got[0][0] <= 0)
            sound = sound[lost:]
        if not same or any(abs(x - y) > slack for (x, _), (y, _) in zip(sound, got)):
            raise VideoError(f"{source}: its sound came out with other times")


def _anew(c, source, table, e, copy, size):
    """The packets to be written: pictures of `size`, encoded by the stream `e`, and the sound.

    Of an MP4 the last picture lasts so long that the copy's mean frame rate is the source's, which
    `Window` counts with. An avi's rate counts the pictures that were left out, its copy's does not.
    """
    v, a = c.streams.video[0], copy and c.streams.audio[0]
    sound, origin = [], table.ticks[0] * table.second         # packets since the last picture

    def pictures():
        for p in c.demux(*filter(None, (v, a))):
            if p.size and p.stream.index == v.index:
                yield p
            elif p.size:
                sound.append(_sound_packet(p, a, copy, origin))

    packets, stamps = pictures(), []
    counted = table.ticks if c.format.name == "avi" else None
    for tick, frame in _pictures(v, source, packets, table.ticks, counted):
        frame = _upright(frame, *size)
        frame.pts, frame.time_base, frame.pict_type = tick - table.ticks[0], table.second, 0
        made = e.encode(frame)
        stamps += [p.dts for p in made]
        yield from (*sound, *made)
        sound.clear()
    made = e.encode(None)
    stamps += [p.dts for p in made]
    if "mov" in c.format.name and v.average_rate and made:
        lasts = round(len(stamps) / v.average_rate / table.second) - (stamps[-1] - stamps[0])
        if 0 < lasts * table.second < 1:
            made[-1].duration = lasts
    yield from (*sound, *made)
    sound.clear()
    deque(packets, 0)                                         # sound after the last picture
    yield from sound


def reencode(source: Path, target: Path, short_side: int, crf: float,
             report: Callable[[float], None] = lambda share: None) -> None:
    """Write `source` anew as `PREPARE` says; `report` is told how much of it is done.

    target: of any name, replaced at once or not at all. The decoder has one thread, since with more
    it would conceal damage differently from `read_clip`. What that shows in place of a lost picture
    is written here. VideoError if the source cannot be decoded to its end, or if the result would
    have other times; UserError if the target cannot be written.
    """
    if source.exists() and not source.is_file():
        raise VideoError(f"{source}: is not a regular file")  # a pipe would be waited for
    table, sound, done = timetable(source), [], 0             # (seconds, bytes) of packets of sound
    first = first_picture(source, table.ticks)
    size = _even(first, short_side)
    with _placing(target) as part:
        with _open(source) as c:
            v, a = _video_stream(c, source), _sound_of(c)
            v.codec_context.thread_type, v.codec_context.thread_count = "NONE", 1
            with _writing(part, target, _container(c, a), v, a) as out:
                e = _encoder(out, v, first, *size, _rate(v), crf)
                copy = out.add_stream_from_template(a) if a else None
                for p in _anew(c, source, table, e, copy, size):
                    if p.stream is copy:
                        sound.append((float(p.pts * p.time_base), p.size))
                    else:
                        report(done / len(table.ticks))
                        done += 1
                    with _blame(target):
                        out.mux(p)
        _compare(source, part, table, sound)


def list_sources(root: Path, dst: Path | None = None) -> list[tuple[str, int, float]]:
    """(path relative to `root`, bytes, time of change) of the videos and annotations below a
    folder, sorted; of a video that is no regular file or a broken link (name, 0, 0).

    Links are followed, but not into a folder that holds them, nor into `dst`. UserError for a
    folder of pieces that are still being cut.
    """
    found, folders = [], [(root, {root.resolve(), (dst or root).resolve()})]
    while folders:
        folder, above = folders.pop()
        with os.scandir(folder) as entries:                   # tells folders without a stat
            entries = [(f.name, f.is_symlink(), f.is_dir(follow_symlinks=False)) for f in entries]
        names = {name for name, _, _ in entries}
        if ".cutting" in names:
            raise UserError(f"{folder}: is still being cut; prepare it when that is done")
        if folder != root and {"about.json", "args.json"} & names:
            continue
        for name, linked, is_folder in entries:
            path, ending = folder / name, os.path.splitext(name)[1].lower()
            if name.startswith(".") or path == root / "prepare.json":
                continue
            if is_folder or linked and path.is_dir():
                if path.resolve() not in above:
                    folders.append((path, above | {path.resolve()}))
            elif ending in VIDEOS or ending in ANNOTATIONS and path.is_file():
                stat = path.stat() if path.is_file() else None
                found.append((str(path.relative_to(root)), *(
                    (stat.st_size, stat.st_mtime) if stat else (0, 0.0))))
    return sorted(found)


def keep_settings(args: argparse.Namespace) -> None:
    """Check SRC and DST against one another and against what DST was made with. UserError."""
    src, dst, path = args.src.resolve(), args.dst.resolve(), args.dst / "prepare.json"
    if not args.src.is_dir():
        raise UserError(f"{args.src}: no such folder")
    if src == dst or src in dst.parents or dst in src.parents:
        raise UserError(f"{args.dst}: SRC and DST must be two folders, neither inside the other")
    if args.dst.exists() and not args.dst.is_dir():
        raise UserError(f"{args.dst}: must be a folder, this is a file")
    settings = {"short_side": args.short_side, "crf": args.crf}
    if path.exists():
        before = read_json(path)
        before, same = before if isinstance(before, dict) else {}, False
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(f"{path}: was made with --{name} {before.get(name)}, now it is "
                                f"{value}; use the same flags to continue, or another DST")
        with contextlib.suppress(ValueError):                 # NUL: no path at all
            same = Path(str(before.get("source"))).resolve() == src
        if not same:
            raise UserError(f"{path}: was made from {before.get('source')}, now SRC is {src}; "
                            "choose another DST, or, if SRC has only moved, write its path there")
    elif args.dst.exists() and any(not f.startswith("prepare.json") for f in os.listdir(args.dst)):
        raise UserError(f"{args.dst}: is not empty and holds no prepare.json; choose another DST")
    else:
        write_json(path, {**settings, "source": src, "versions": versions()})


def remove_parts(folder: Path) -> None:
    """Remove the half files of runs that were ended; what is younger may be of one at work."""
    for f in folder.glob(".prepare-*.part"):
        with contextlib.suppress(FileNotFoundError):          # another run may remove it, too
            if time.time() - f.stat().st_mtime > 3600:
                f.unlink()


def open_target(args: argparse.Namespace) -> tuple[list[tuple], list[tuple]]:
    """Make DST with its folders and annotations; returns the videos of SRC, as `list_sources`
    does, and those that are still to be done. UserError.
    """
    files = list_sources(args.src, args.dst) if args.src.is_dir() else []
    videos = [f for f in files if Path(f[0]).suffix.lower() in VIDEOS]
    if not videos and args.src.is_dir():
        raise UserError(f"{args.src}: holds no videos ({', '.join(sorted(VIDEOS))})")
    keep_settings(args)
    for folder in sorted({args.dst / Path(name).parent for name, _, _ in files} | {args.dst}):
        folder.mkdir(parents=True, exist_ok=True)
        remove_parts(folder)
    notes = sorted({name for name, _, _ in files} - {name for name, _, _ in videos})
    for name in notes:
        data = (args.src / name).read_bytes()
        if not (args.dst / name).exists() or (args.dst / name).read_bytes() != data:
            with _placing(args.dst / name) as part:
                part.write_bytes(data)
    todo = [f for f in videos if not (args.dst / f[0]).exists()]
    done = sorted({*videos} - {*todo})
    old = sum((args.dst / name).stat().st_mtime < changed for name, _, changed in done)
    say(f"prepare: {len(videos)} videos of {amount(size for _, size, _ in videos)} in {args.src}, "
        f"{len(done)} of them done before; {len(notes)} annotation files")
    if old:
        say(f"warning: {old} of the copies are older than their sources; they are kept: delete "
            "them to have them made anew")
    return videos, todo


def amount(sizes: Iterable[int]) -> str:
    """Sum of bytes, as people read it."""
    n = sum(sizes)
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def deal(sizes: Sequence[int], n: int) -> list[list[int]]:
    """Indices for each of n processes: the largest first, always to the one with the least."""
    shares, loads = [[] for _ in range(n)], [0] * n
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        k = loads.index(min(loads))
        shares[k].append(i)
        loads[k] += sizes[i] + 1
    return shares


def progress(sizes: Sequence[int], every: float = 10) -> Callable[[int, float], None]:
    """A function to tell that file n is done by so much; now and then it prints a line.

    sizes: bytes of this process's files, in the order in which they are worked off.
    """
    before, total = np.cumsum([0, *sizes]), max(1, sum(sizes))
    began = shown = time.perf_counter()

    def report(n, share):
        nonlocal shown
        now = time.perf_counter()
        if now - shown > every:
            shown, done = now, before[n] + share * (before[n + 1] - before[n])
            left = (now - began) * (total - done) / max(1, done)
            say(f"prepare {n}/{len(sizes)} files of this process, {amount([done])} of "
                f"{amount([total])}, {done / 1e6 / (now - began):.2f} MB/s, "
                f"ETA {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}")
    return report


def gain(pairs: Sequence[tuple[Path, Path]], side: int) -> tuple[float, float, float]:
    """Of clips of 16 pictures, one second of the middle: (CPU seconds to read from the first file
    of each pair, from the second, PSNR in dB between the two), each the mean over the pairs.
    """
    rows = []
    for pair in pairs:
        spent, clips = [], []
        times = max(0.0, probe(pair[0]).duration / 2 - 0.5) + np.arange(16) / 16
        for path in pair:
            read_clip(path, [times], side)                    # once to warm up
            begin = time.process_time()
            clips.append(read_clip(path, [times], side)[0].astype(float))
            spent.append(time.process_time() - begin)
        h, w = np.min([x.shape[1:3] for x in clips], 0)       # even sizes: a row or column less
        error = np.mean((clips[0][:, :h, :w] - clips[1][:, :h, :w]) ** 2)
        rows.append((*spent, 10 * math.log10(255 ** 2 / max(error, 1e-3))))
    return tuple(np.mean(rows, 0).tolist())


def prepare(args: argparse.Namespace) -> None:
    """What `PREPARE` says, the videos dealt out among the processes.

    Each works its share off in an order of its own, so that another launch on the same folders
    does other files, and seldom one at the same time.
    """
    init_distributed(gpu=False)
    plan, videos = ["", [], 0], []
    if rank() == 0:                       # one list for all: other launches may be at work
        try:
            videos, todo = open_target(args)
            plan = ["", todo, len(videos)]
        except UserError as e:
            plan[0] = str(e)
    dist.broadcast_object_list(plan)
    fault, todo, total = plan
    if fault:
        raise UserError(fault)
    mine = deal([size for _, size, _ in todo], world_size())[rank()]
    mine, faults = np.random.default_rng().permutation(mine).astype(int).tolist(), {}
    report = progress([todo[i][1] for i in mine])
    for n, i in enumerate(mine):
        name, faults[i] = todo[i][0], ""
        try:
            if not (args.dst / name).exists():                # made by another launch
                reencode(args.src / name, args.dst / name, args.short_side, args.crf,
                         partial(report, n))
        except VideoError as e:
            faults[i] = str(e)
            print(f"warning: {e}; not prepared", file=sys.stderr, flush=True)
    faults = [f for f in gather(faults, expect=len(todo)).values() if f]
    if rank() == 0:
        summary(args, videos)
    barrier()
    if faults:
        raise UserError(f"{len(faults)} of {total} videos were not prepared: "
                        f"{'; '.join(faults[:3])}{'; ...' * (len(faults) > 3)}")


def summary(args: argparse.Namespace, videos: Sequence[tuple[str, int, float]]) -> None:
    """One line on what DST holds and on what that gains, from up to eight of its files."""
    done = [(name, size) for name, size, _ in videos if (args.dst / name).exists()]
    line = (f"done: {len(done)} of {len(videos)} videos in {args.dst}, "
            f"{amount(size for _, size in done)} became "
            f"{amount((args.dst / name).stat().st_size for name, _ in done)}")
    if done:
        some = [done[k][0] for k in np.unique(np.linspace(0, len(done) - 1, 8).astype(int))]
        side = min(128, args.short_side)
        old, new, psnr = gain([(args.src / name, args.dst / name) for name in some], side)
        line += (f"; 16 pictures at {side} cost {1000 * old:.1f} ms of CPU before, "
                 f"{1000 * new:.1f} ms now (mean of {len(some)} files, PSNR {psnr:.1f} dB)")
    say(line)


def parse_command(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of this file: one command, `prepare`."""
    for f in (sys.stdout, sys.stderr):
        if hasattr(f, "reconfigure"):
            f.reconfigure(errors="replace")
    parser = OneLine(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND",
                                dest="command")
    p = commands.add_parser("prepare", description=PREPARE, formatter_class=HelpFormatter,
                            allow_abbrev=False, help="re-encode a folder of videos for training")
    p.add_argument("src", type=Path, metavar="SRC", help="folder of videos; it is only read")
    p.add_argument("dst", type=Path, metavar="DST", help="new folder, or one to be continued")
    p.add_argument("--short_side", type=int, default=256, metavar="N", help="pixels, even; larger "
                   "videos are scaled down to it, smaller ones stay; 256 holds the scripts' crops "
                   "of 224, README lists the stages that read more (default: %(default)s, ours)")
    p.add_argument("--crf", type=float, default=20, metavar="Q", help="x264's quality: less is "
                   "better and larger, 6 less about twice as large; README has the PSNR of 20 "
                   "(default: %(default)s, ours)")
    args = parser.parse_args(argv)
    if args.short_side < 16 or args.short_side % 2:
        p.error(f"--short_side {args.short_side}: must be an even number, at least 16")
    if not 1 <= args.crf <= 51:
        p.error(f"--crf {args.crf:g}: must be from 1 to 51")
    return args


if __name__ == "__main__":
    launch(prepare, parse_command())
