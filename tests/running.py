"""Starts the scripts for tests: as a user does, or in forks of one process that has imported them.

`command` is `python SCRIPT.py` or torchrun: 6 seconds before the first step. `quick` calls the same
`parse_args`, `launch` and `main` in forked processes, and can break something in them first.
"""

import contextlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
sys.path[:0] = [str(REPO), str(REPO / "tests")]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}                         # in all tests but one

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import common  # noqa: E402

SCRIPTS = "replai", "cpctrans", "f2c_oops", "ssdet_coarsefine"
MODULES = [importlib.import_module(script) for script in SCRIPTS]
Result = namedtuple("Result", "code out err")
torch.set_num_threads(1)                                      # sums in the same order everywhere
torch.optim.SGD([torch.zeros(1)], lr=0.1).step()              # imports a second's worth of modules


def command(script, *flags, n=1, gpus=False, cwd=None, timeout=150):
    """`python SCRIPT.py FLAGS`, or `torchrun --nproc_per_node N SCRIPT.py FLAGS`."""
    run = f"-m torch.distributed.run --standalone --nproc_per_node {n}".split() if n > 1 else []
    p = subprocess.run([sys.executable, *run, str(REPO / f"{script}.py"), *map(str, flags)],
                       env=os.environ if gpus else {**os.environ, **NO_GPU}, check=False,
                       capture_output=True, text=True, cwd=cwd, timeout=timeout)
    return Result(p.returncode, p.stdout, p.stderr)


# ---- forked processes ----------------------------------------------------------------------------

def start(target, n, *args):
    """n forks of a process that has imported all this; each calls target(rank, n, *args)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["running"])
    forks = [context.Process(target=target, args=(rank, n, *args)) for rank in range(n)]
    for p in forks:
        p.start()
    return forks


def quick(script, *flags, n=1, before=None, cwd=None):
    """SCRIPT.py FLAGS in n forks. before(rank) runs first in each. If one fails, all are ended.

    They run in the folder `cwd`, by default the one that holds --out, and write out0.txt ... there.
    """
    flags = [str(f) for f in flags]
    cwd = Path(cwd or Path(flags[flags.index("--out") + 1]).parent)
    cwd.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    forks = start(run_script, n, script, flags, port, before, cwd)
    until = time.monotonic() + 100
    while None in (codes := [p.exitcode for p in forks]) and not any(codes):
        assert time.monotonic() < until, f"{script} {' '.join(flags)} took too long"
        time.sleep(0.01)
    for p in forks:                                           # like torchrun: one has failed, all
        p.join(None if not any(codes) else 1)                 # are ended
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
        p.join()
    text = {s: "".join((cwd / f"{s}{r}.txt").read_text() for r in range(n)) for s in ("out", "err")}
    return Result(next((c for c in codes if c), 0), text["out"], text["err"])


def right_mode(module, inputs):
    """Training is in training mode and evaluation, which is in inference mode, is not."""
    if torch.is_inference_mode_enabled():
        assert not module.training, type(module)
    elif isinstance(module, nn.parallel.DistributedDataParallel):
        assert module.module.training


def run_script(rank, n, script, flags, port, before, cwd):
    nn.modules.module.register_module_forward_pre_hook(right_mode)
    MODULES[3].TINY["val_every"] = 1                          # SSDet validates between, too
    os.setsid()
    os.chdir(cwd)
    os.environ |= NO_GPU
    multiprocessing.set_start_method("fork", force=True)      # for loaders
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    if n > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if before:
        before(rank)
    sys.argv = [f"{script}.py", *flags]
    module = importlib.import_module(script)
    common.launch(module.main, module.parse_args())


def processes(function, n, folder):
    """[function(rank)] of n gloo processes."""
    for p in start(run_function, n, function, folder):
        p.join(100)
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(n)]


def run_function(rank, n, function, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n)
    torch.save(function(rank), folder / f"result{rank}.pt")
    dist.barrier()
    os._exit(0)


# ---- what `before` can do ------------------------------------------------------------------------

def told(rank):
    """Optimizers print their groups at each step. Rates that fall late fall after each epoch."""
    MODULES[1].SCHEDULE |= {"pretrain": (1, 0.5), "finetune": (1, 0.1)}
    MODULES[3].TINY["backbone_lr"] = 0.1
    for kind in (torch.optim.SGD, torch.optim.Adam):          # AdamW is an Adam
        def step(self, *args, step=kind.step):
            print("groups", json.dumps([[g["lr"], g["weight_decay"], g.get("momentum", 0)]
                                        for g in self.param_groups]))
            return step(self, *args)
        kind.step = step


def counted(k, function):
    """A function that calls `function` at its k-th call, counted from 1."""
    calls = itertools.count(1)
    return lambda *args, **kw: function(*args) if next(calls) == k else None


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_step(k, rank):
    """SIGKILL to process 0 when k steps are logged and the last one is not yet saved."""
    log, now = common.Log.__call__, counted(k, kill)

    def logged(self, *args, **values):
        log(self, *args, **values)
        now()
    if rank == 0:
        common.Log.__call__ = logged


def kill_while_writing(name, k, rank):
    """SIGKILL to process 0 when half of the k-th file of this name is written."""
    write, now = common.write, counted(k, bool)

    def torn(path, content):
        def half(f):
            f.write(b"half of a file")
            f.flush()
            kill()
        write(path, half if path.name.endswith(name) and now(True) else content)
    if rank == 0:
        common.write = torn


def nan_in_step(k, bad, rank):
    """On process `bad` the gradients of the k-th step are NaN."""
    backward, now = torch.Tensor.backward, counted(k, bool)
    if rank == bad:
        torch.Tensor.backward = lambda loss, *args, **kw: backward(
            loss * (math.nan if now(True) else 1), *args, **kw)


def leave(steps):
    """End this process as one that is done."""
    print(f"done, {steps} training steps", flush=True)
    os._exit(0)


def bf16_on_the_cpu(k, rank):
    """Networks run under bfloat16 autocast, which the scripts have on CUDA alone, for k steps.

    Weights stay as they are: gradients of a CPU's bfloat16 convolutions may be NaN.
    """
    common.autocast = lambda *_: torch.autocast("cpu", torch.bfloat16)
    common.check_finite = lambda *_: None
    common.DepthwiseConv.forward = nn.Conv3d.forward          # ours is for float32
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        optimizer.step = lambda *_: None
    common.Log.__call__ = counted(k, lambda *_: leave(k))


def fake_cuda(k, rank):
    """Networks and losses run forward on a GPU that does not exist, for k steps.

    Tensors have a shape, a type and a device there, no values. So an operation on tensors of two
    devices is an error, and so is a training step that waits for a value or a copy. All begins with
    the first move there. k = 0: a stage without training ends when its network has run.
    """
    start_run, item = common.start_run, torch.Tensor.item
    device, steps = torch.device("cuda"), []
    begin = counted(1, fake_tensor.FakeTensorMode(allow_non_fake_inputs=True).__enter__)

    def begins(move):
        def to(x, *args, **kw):
            if device in args:
                begin()
                assert torch.Tensor.item is not item or "non_blocking" in kw, "a copy that waits"
            if "cpu" in args and getattr(x, "is_cuda", False) and k == 0:
                leave(0)                                      # a result: the network has run
            return move(x, *args, **kw)
        return to

    def predict(args, device, dataset, network, what, batch_size=8, collate=None):
        """The first batch alone. Here a network may wait for values."""
        batch = next(iter(DataLoader(dataset, batch_size=batch_size, collate_fn=collate)))
        with common.autocast(device, args.precision), torch.no_grad(), contextlib.suppress(
                fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
            network(common.to_device(batch, device))
        leave(len(steps))

    warnings.simplefilter("ignore")                           # CUDA is not available
    common.start_run = lambda *args, **kw: (start_run(*args, **kw), device)[1]
    common.compute, common.load_checkpoint = real(common.compute), real(common.load_checkpoint)
    common.gather = lambda rows, expect: dict(sorted(rows.items()))
    common.load_weights = lambda module, *_, **__: {*module.state_dict()}
    common.check_finite = common.save = common.share_buffers = lambda *_, **__: None
    common.Log.__call__, common.predict = counted(k, lambda *_: leave(len(steps))), predict
    load = real(DataLoader.__iter__)
    DataLoader.__iter__ = lambda loader: iter(real(partial(next, load(loader), None)), None)
    nn.Module._apply = convert
    nn.Module.to, torch.Tensor.to = begins(nn.Module.to), begins(torch.Tensor.to)
    torch.Tensor.cpu = lambda x: x.to("cpu")
    torch.Tensor.backward = lambda loss: steps.append(loss)
    torch.autograd.grad = lambda y, x, **_: (torch.zeros_like(x),)
    torch.optim.swa_utils.update_bn = lambda *_: None         # waits, before an evaluation
    torch.Tensor.item = lambda x: 0.0                         # may wait before the first step
    common.seed_step = lambda *_: setattr(torch.Tensor, "item", item)
    for script in MODULES:
        script.DDP = lambda model, **_: model


def real(function):
    """The function on tensors that have values."""
    def outside(*args, **kw):
        with fake_tensor.unset_fake_temporarily():
            return function(*args, **kw)
    return outside


def convert(module, function, recurse=True):
    """In place of nn.Module._apply, which swaps tensors: fake ones cannot be swapped."""
    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                part._parameters[name] = nn.Parameter(function(x.detach()), x.requires_grad)
        part._buffers |= {k: function(x) for k, x in part._buffers.items() if x is not None}
    return module
