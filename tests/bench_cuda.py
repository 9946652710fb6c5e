"""Rows of `make bench` that need a GPU: clips per second, memory, and how much of the GPU is used.

Two limits are measured first: large bf16 matrix products, and copies of tensors that fit no cache.
A step's floating-point operations, and the bytes that its operators have to move in eager mode,
then tell how near it comes to either.
"""

import statistics

import torch
from bench_steps import DEFAULTS, DEVICE, ROW, made, step
from measure import CUDA, growth, paired
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Traffic(TorchDispatchMode):
    """A lower estimate of the bytes that operators move: each tensor that one takes or gives, once,
    changed in place or not, and no more of it than its memory holds. Of a table that is indexed
    only the rows found count; views and new empty tensors move nothing.
    """

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if torch.is_tensor(t)] for x in (
            (args, kwargs), out))
        name, places = func._schema.name, {t.untyped_storage().data_ptr() for t in given}
        views = not func._schema.is_mutable and all(
            t.untyped_storage().data_ptr() in places for t in made)
        if views or "empty" in name:
            return out
        if "index" in name or "embedding" in name or "gather" in name:
            given = []
        each = {(t.data_ptr(), t.numel(), t.dtype): t for t in given + made}
        self.bytes += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
                          for t in each.values())
        return out


def rates(size=8192):
    """(matrix products in FLOP/s, copies in bytes/s, read and written) of this device."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(16 * size * size, device=DEVICE, dtype=torch.uint8)
    y = torch.empty_like(x)
    table = paired(lambda: a @ b, lambda: y.copy_(x), repeats=10)
    product, copy = (statistics.median(column) for column in zip(*table))
    return 2 * size ** 3 / product, 2 * x.numel() / copy


def gpu_rows(folder, repeats):
    """The scripts' default stages, at the papers' sizes."""
    if not CUDA:
        return
    yield from used(*rates(), repeats)


def used(flops, bandwidth, repeats):
    """Rows of every default stage, given what the device can do."""
    for stage in DEFAULTS:
        case = made(stage, False)
        job = step(case)
        with FlopCounterMode(display=False) as work, Traffic() as traffic:
            job()
        seconds = statistics.median(t for t, in paired(job, repeats=repeats))
        done, moved = work.get_total_flops() / seconds, traffic.bytes / seconds
        clips = len(case.inputs[0]) / seconds
        yield ROW(f"{stage.name}: clips", "", clips, None, "per s")
        yield ROW(f"{stage.name}: memory of a step", "", growth(step(case)), None, "MB")
        yield ROW(f"{stage.name}: arithmetic", "bf16 matrix products", done / 1e12, flops / 1e12,
                  "TFLOP/s", done / flops)
        yield ROW(f"{stage.name}: memory traffic, at least", "copies", moved / 1e12,
                  bandwidth / 1e12, "TB/s", moved / bandwidth,
                  note="each operator's tensors once; some are still in the cache")
