"""Training steps of `make bench`: against plain ones, and by choices, memory and growth.

"Plain" is tests/plain.py: the same parameters, the same loss and gradient (tests/test_bench.py).
On the CPU sizes are such that a step takes a second or two; on CUDA batches are the papers'.
"""

import contextlib
import copy
import io
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plain
from measure import CUDA, Row, compare, fresh, growth, paired

import common
import cpctrans
import f2c_oops
import replai
import ssdet_coarsefine as ssdet

DEVICE = torch.device("cuda" if CUDA else "cpu")
PRECISION = "bf16" if CUDA else "fp32"
ROW = partial(Row, "step")


def on_cpu(target: float) -> float | None:
    """A target that was set for CPUs."""
    return None if CUDA else target


# ---- what is trained ---------------------------------------------------------------------------

class Case(NamedTuple):
    """A stage's network and batch. loss, plain_loss: (network, *inputs) -> scalar."""
    model: nn.Module
    inputs: tuple
    loss: Callable
    plain_loss: Callable
    optimizer: Callable                                       # of parameters, and flags
    cut: float | None = None                                  # norm that gradients are cut to


def parsed(script: Any, flags: str, tiny: bool):
    return script.parse_args([*flags.split(), *["--tiny"] * tiny])


def pretrain_replai(tiny: bool, B: int) -> Case:
    args = parsed(replai, "--stage pretrain", tiny)
    clips = (torch.randn(B, 3, args.num_frames, args.crop, args.crop) for _ in range(2))

    def loss(net, *inputs):
        avc, astc = replai.losses(net(*inputs), args.tau)
        return args.clr_coeff * avc + args.aot_coeff * astc

    def plain_loss(net, *inputs):
        return plain.replai_loss(net(*inputs), args.tau, replai.KAPPA)

    sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.9, weight_decay=args.weight_decay)
    return Case(replai.RepLAI(args.width, args.depth), (*clips, torch.randn(B, 1, 125, 80)), loss,
                plain_loss, sgd)


def pretrain_cpctrans(tiny: bool, B: int) -> Case:
    args = parsed(cpctrans, "--stage pretrain", tiny)
    cpctrans.fill_from(args, None)
    clip = torch.randn(B, args.num_seq, 3, args.img_dim, args.img_dim)
    adam = partial(torch.optim.Adam, lr=1e-4, weight_decay=args.weight_decay)
    model = cpctrans.CPC(args).to(memory_format=torch.channels_last)          # as `train` does
    return Case(model, (clip,),
                lambda net, *x: cpctrans.contrast(args, *net(*x))["loss"],
                lambda net, *x: plain.cpctrans_loss(*net(*x))["loss"], adam)


def train_f2c(stage: str, tiny: bool, B: int) -> Case:
    """f2c: six clips of each of B videos; f2c2v: videos of eight clips, a label each; classify:
    the same with a label per clip.
    """
    args = parsed(f2c_oops, f"--stage {stage} --init none", tiny)
    f2c_oops.prepare(args, None)
    D = 128 if tiny else 768
    classes, labels, clips = {"f2c": (8, 6 * B, 6 * B), "f2c2v": (6, B, 8 * B)}.get(
        stage, (3, 8 * B, 8 * B))
    model = f2c_oops.build(args, D, classes, "clip" if stage == "f2c" else "video", classes == 3)
    x = torch.randn(clips, args.clip_len if stage == "f2c" else 16, D)
    x = (x,) if stage == "f2c" else (x, torch.arange(8 * B).view(B, 8))
    label = torch.arange(labels) % classes

    def loss(net, *x):
        logits = net(*x).flatten(0, -2)
        total, n = f2c_oops.cross_entropy(logits, label.to(logits.device))
        return total / n

    adamw = partial(torch.optim.AdamW, lr=1e-4, weight_decay=args.weight_decay)
    return Case(model, x, loss, loss, adamw, 1.0)             # plain is the network alone


def pretrain_ssdet(tiny: bool, B: int) -> Case:
    """SSDet's detection; on a CPU the paper's network at 8 x 112 x 112."""
    args = parsed(ssdet, "--groups 1", tiny)
    T, S = (args.num_frames, args.crop) if CUDA or tiny else (8, 112)
    rng, names = np.random.default_rng(0), args.augment.split(",")
    choices = ssdet.draw_volume_choices(rng, T, np.arange(B)[None], names, 1.0)
    label = torch.arange(1, 1 + B)[:, None].repeat(1, T)
    mix = ssdet.augment(ssdet.single(torch.randn(B, 3, T, S, S), label), choices)
    model = ssdet.build(args, "cpu", ssdet.Kind("x3d", args.version, 401, "", "none"))

    def loss(net, x, *rest):
        here = ssdet.Mixture(x, *rest)
        return ssdet.pretraining_loss(net(ssdet.quick(x)), here, ssdet.pretraining_counts(here))[0]

    def plain_loss(net, x, *rest):
        return plain.pretraining_loss(net(x), ssdet.Mixture(x, *rest))

    sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.9, weight_decay=args.weight_decay)
    return Case(model, tuple(mix), loss, plain_loss, sgd)


def train_coarse(tiny: bool, B: int) -> Case:
    """Coarse-Fine on stored features; on a CPU the paper's network sees 8 frames, not 64."""
    args = parsed(ssdet, "--stage finetune --stream coarse --groups 1", tiny)
    T, steps = args.num_frames if CUDA or tiny else 8, args.feature_cap
    kind = ssdet.Kind("coarse", args.version, 157, args.pool, args.fusion)
    model = ssdet.build(args, "cpu", kind)
    x = torch.randn(B, 3, T, args.crop, args.crop)
    features = [torch.rand(B, C, steps, ssdet.GRID, ssdet.GRID) for C in model.widths]
    label = (torch.rand(B, 157, T * args.stride) < 0.05).float()
    inputs = (x, *features, torch.ones(B, steps), torch.zeros(B, dtype=torch.long), label)

    def logits(net, x, *rest):
        *features, valid, start, label = rest
        return net(x, dict(zip(ssdet.LEVELS, features)), valid, start), label

    def loss(net, x, *rest):
        found, label = logits(net, ssdet.quick(x), *rest)
        found, mask = ssdet.to_labels(found, label.shape[2], False), torch.ones_like(label[:, 0])
        return ssdet.detection_loss(found, label, mask, ssdet.detection_counts(label, mask))[0]

    sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.9, weight_decay=args.weight_decay)
    return Case(model, inputs, loss, lambda net, *x: plain.detection_loss(*logits(net, *x)), sgd)


class Stage(NamedTuple):
    """A row's name, who makes its Case, and batches: of the paper's size on a CPU and on CUDA, and
    tiny.
    """
    name: str
    case: Callable
    batch: int
    cuda: int
    tiny: int


STAGES = [
    Stage("replai pretrain", pretrain_replai, 2, 64, 8),
    Stage("cpctrans pretrain", pretrain_cpctrans, 1, 16, 8),
    Stage("f2c_oops f2c", partial(train_f2c, "f2c"), 2, 128, 16),
    Stage("f2c_oops f2c2v", partial(train_f2c, "f2c2v"), 4, 16, 8),
    Stage("f2c_oops classify video", partial(train_f2c, "classify --level video"), 4, 8, 8),
    Stage("ssdet pretrain", pretrain_ssdet, 2, 16, 8),
    Stage("ssdet coarse", train_coarse, 1, 3, 4)]
DEFAULTS = [s for s in STAGES if s.name.endswith("pretrain") or s.name == "f2c_oops f2c"]


def on(x):
    return x.to(DEVICE) if torch.is_tensor(x) else tuple(map(on, x))


def step(case: Case, model=None, loss=None, precision=PRECISION, compiled=False,
         **flags) -> Callable:
    """A training step as the scripts' loops have it, of the case's network or of another one."""
    model = copy.deepcopy(model or case.model).to(DEVICE).train()
    if compiled:
        model.compile()                                       # copies of it would not be
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, inputs = case.optimizer(learned, **flags), on(case.inputs)

    def net(*x):
        with common.autocast(DEVICE, precision):
            return model(*x)

    def job():
        optimizer.zero_grad(set_to_none=True)
        (loss or case.loss)(net, *inputs).backward()
        if case.cut:
            nn.utils.clip_grad_norm_(learned, case.cut)
        optimizer.step()
    return job


def made(stage: Stage, tiny: bool, batch: int = 0) -> Case:
    torch.manual_seed(0)
    return stage.case(tiny, batch or (stage.tiny if tiny else stage.cuda if CUDA else stage.batch))


# ---- steps -------------------------------------------------------------------------------------

def step_rows(folder, repeats):
    """Every stage's step against the plain one, at the paper's size and at --tiny."""
    for stage in STAGES:
        for tiny in (False, True):
            case = made(stage, tiny)
            table = paired(step(case), step(case, plain.plain(case.model), case.plain_loss),
                           repeats=repeats)
            yield compare("step", f"{stage.name}{', --tiny' * tiny}, batch {batch_of(case)}",
                          table, "plain transcription", target=on_cpu(1.0))


def batch_of(case):
    return "x".join(map(str, case.inputs[0].shape))


def squared(net, *x):
    return net(*x).float().square().mean()


def backbone_rows(folder, repeats):
    """R(2+1)D-18, torchvision's and AVID's, with temporal convolutions as 2-D ones and without."""
    from torchvision.models.video import r2plus1d_18
    x = (torch.randn(16 if CUDA else 2, 3, 8, 112, 112),)     # of one clip the figures scatter
    sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    theirs = common.headless(r2plus1d_18(weights=None))
    quick = copy.deepcopy(theirs)
    for m in temporal(quick):
        m.__class__ = common.TemporalConv
    alone = paired(convolve(quick, *x), convolve(theirs, *x), repeats=repeats)
    table = paired(*(step(Case(m, x, squared, squared, sgd)) for m in (quick, theirs)),
                   repeats=repeats)
    share = alone[0][1] / table[0][1]
    yield compare("step", "torchvision's r2plus1d_18 with TemporalConv, 8 x 112 x 112", table,
                  "as it stands", target=on_cpu(0.85), note="the same state dict; its temporal "
                  f"convolutions are {share:.2f} of the step as it stands")
    yield compare("step", "its temporal convolutions alone", alone, "as they stand")
    avid = common.R2Plus1D()
    table = paired(*(step(Case(m, x, squared, squared, sgd)) for m in (avid, plain.plain(avid))),
                   repeats=repeats)
    yield compare("step", "AVID's R(2+1)D-18, 8 x 112 x 112", table, "the same with nn.Conv3d",
                  note="a 3-D stem and small maps: less to gain")


def temporal(model):
    """The convolutions over time that TemporalConv can do."""
    return [m for m in model.modules() if isinstance(m, nn.Conv3d)
            and m.kernel_size[1:] == (1, 1) and m.stride[1:] == (1, 1)]


def convolve(model, x):
    """Forward and backward of these convolutions, on what they see when the network sees x."""
    model, seen = copy.deepcopy(model).to(DEVICE), []

    def keep(m, inputs, y):
        seen.append((m, inputs[0].detach().requires_grad_(), torch.ones_like(y)))
    hooks = [m.register_forward_hook(keep) for m in temporal(model)]
    model(x.to(DEVICE))
    for hook in hooks:
        hook.remove()
    return lambda: [torch.autograd.grad(m(x), (x, m.weight), y) for m, x, y in seen]


def attention_rows(folder, repeats):
    """Window attention, forward and backward, against softmax over all pairs of tokens."""
    for n, target in ((512, 0.8), (1024, 0.5)):
        q, k, v = (torch.randn(2, 12, n, 64, device=DEVICE, requires_grad=True) for _ in range(3))
        seen = torch.ones(2, n, dtype=torch.bool, device=DEVICE)

        def job(attend, q=q, k=k, v=v, seen=seen):
            return lambda: torch.autograd.grad(attend(q, k, v, seen, 32).square().sum(), (q, k, v))

        ways = [(job(f2c_oops.whole_attention), "one mask"),
                (job(f2c_oops.block_attention), "blocks")]
        ways = ways if n <= f2c_oops.DENSE else ways[::-1]    # as trained is the first
        table = paired(*(way for way, _ in ways), job(plain.attention), repeats=repeats)
        for k, (_, name) in enumerate(ways):
            yield compare("step", f"window attention, {n} tokens, {name}{' (not used)' * k}", table,
                          "softmax over all pairs", k=2, ours=k,
                          target=None if k else on_cpu(target))


# ---- choices -----------------------------------------------------------------------------------

def compile_rows(folder, repeats):
    """--compile on, against off; to compile takes a minute or two for each of eight networks."""
    yield from choice_rows(folder, repeats, lambda case: [
        ("torch.compile", partial(step, case, compiled=True))])


def choice_rows(folder, repeats, choices=None):
    """Each choice on, against the same off, in the scripts' default stages; one at a time, since
    every one has a network and an optimizer of its own.
    """
    for stage in DEFAULTS:
        case = made(stage, False)
        base = step(case)
        for name, make in (choices or all_choices)(case):
            yield compare("step", f"{stage.name}: {name}",
                          paired(make(), base, repeats=repeats), "as trained")


def all_choices(case):
    """(name, what makes the step) of what may be chosen; the scripts' steps have none of it."""
    yield "fused optimizer", partial(step, case, fused=True)
    if any(p.dim() > 3 for p in case.model.parameters()):
        if all(p.is_contiguous() for p in case.model.parameters()):
            yield "weights in channels-last memory", lambda: step(case, channels_last(case.model))
        else:
            yield "weights in contiguous memory", lambda: step(case, plain.in_order(case.model))
    if isinstance(case.model, common.X3D) and not CUDA:
        yield "clips in contiguous memory", lambda: step(case, loss=contiguous(case.loss))
    if CUDA:
        yield "fp32", partial(step, case, precision="fp32")


def channels_last(model):
    """A copy whose convolutions, and so their maps, are in that order of memory."""
    return plain.ordered(model, {4: torch.channels_last, 5: torch.channels_last_3d})


def contiguous(loss):
    return lambda net, *inputs: loss(lambda x, *rest: net(x.contiguous(), *rest), *inputs)


# ---- memory ------------------------------------------------------------------------------------

def f2c_memory(padded: bool) -> float:
    """MB of the first step of F2C, gradients and the optimizer's state included."""
    case = train_f2c("f2c", False, 8)
    return growth(step(case, plain.plain(case.model) if padded else None))


def fusion_memory(kind: str) -> float:
    """MB of Multi-stage Fusion alone, forward and backward, T = 64, T' = 128, 224 pixels."""
    T, L, steps = 64, 17, 128
    m = ssdet.Coarse(classes=20, norm=nn.BatchNorm3d, dropout=0.0).to(DEVICE)
    m = m if kind == "ours" else plain.plain(m)
    features = {level: torch.randn(1, C, steps, 7, 7, device=DEVICE)
                for level, C in zip(ssdet.LEVELS, m.widths)}
    valid, c = torch.ones(1, steps, device=DEVICE), torch.linspace(0, 1, L, device=DEVICE)[None]
    for name, part in m.named_children():
        if kind == "products" and name.startswith("rw"):
            part.__class__ = plain.Products

    def job():
        given = features if kind == "ours" else plain.at_stages(features, 224)
        G = ssdet.gaussian(torch.zeros(1, device=DEVICE), valid.sum(1), steps, c, T)
        fused = [getattr(m, f"rw{n}")(given[level], G, valid)
                 for n, level in enumerate(ssdet.LEVELS[:4], 2)]
        bias, scale = m.rw6(given["conv5"], G, valid)
        loss = (bias * scale).square().mean()
        for n, size in enumerate((56, 28, 14, 7), 2):
            x = torch.randn(1, m.widths[n - 2], L, size, size, device=DEVICE, requires_grad=True)
            bias, scale = getattr(m, f"mix{n}")(*zip(*fused), size)
            loss = loss + (x * scale + bias).square().mean()
        loss.backward()
    return growth(job)


def memory_row(what, against, ours, reference, target=None, note=""):
    return Row("memory", what, against, ours, reference, "MB", ours / reference, target=target,
               note=note)


def memory_rows(folder, repeats):
    ours, padded = (fresh(f2c_memory, p) for p in (False, True))
    yield memory_row("f2c_oops f2c, first step of 48 clips", "padded, all projections", ours,
                     padded, on_cpu(1.0))
    ours, stages, products = (fresh(fusion_memory, k) for k in ("ours", "stages", "products"))
    what = "ssdet fusion alone, T 64, T' 128"
    yield memory_row(what, "features at the stages' sizes", ours, stages, on_cpu(0.5))
    yield memory_row(what, "the same, every product of the equation", ours, products, on_cpu(0.2))


# ---- growth ------------------------------------------------------------------------------------

FRAMES = (64, 256, 1024, 4096)


def encoder_job(n: int) -> Callable:
    """All rows of F2C's encoder over one video of n frames."""
    torch.manual_seed(0)
    encoder = f2c_oops.Encoder(768, dropout=0.0).to(DEVICE).eval()
    x = torch.randn(1, n, 768, device=DEVICE)
    return torch.inference_mode()(lambda: encoder(x, every=True))


def video_job(n: int) -> Callable:
    """A detector (X3D, tiny, 64 pixels) over a whole video, as the stage evaluate reads it."""
    torch.manual_seed(0)
    args = parsed(ssdet, "--stage evaluate --init x --crop 64 --workers 0", True)
    args.stream = "fine"
    model = ssdet.build(args, DEVICE, ssdet.Kind("x3d", "tiny", 157, "", "none")).eval()
    clip = torch.randint(256, (3, n, 64, 64), dtype=torch.uint8)
    item = {"clip": clip, "label": torch.zeros(1, n), "start": 0, "about": (n, n, 1.0)}

    def job():
        with contextlib.redirect_stdout(io.StringIO()):       # what it says on its way
            return ssdet.detect(args, DEVICE, model, [item], "bench")
    return job


def peak(make: Callable, n: int) -> float:
    common.init_distributed()
    return growth(make(n))


def frame_rows(folder, repeats):
    """Milliseconds and MB per frame of long videos."""
    for make, what in ((encoder_job, "f2c_oops encoder"),
                       (video_job, "ssdet detector, tiny, 64 px")):
        table = paired(*map(make, FRAMES), repeats=repeats, least=1.0)     # as long as the longest
        table = [[t / n for t, n in zip(row, FRAMES)] for row in table]
        last = compare("scale", f"{what}, 4096 frames, per frame", table, "1024 frames", k=2,
                       ours=3, target=on_cpu(1.1))
        few = (f"from 1024 to 4096 frames it is {last.ratio:.2f}, so it grows in proportion; what "
               "64 frames take stays in the processor's cache" if last.met else "")
        for k, n in enumerate(FRAMES[1:], 1):
            yield compare("scale", f"{what}, {n} frames, per frame", table, "64 frames", k=0,
                          ours=k, target=on_cpu(1.1) if n == FRAMES[-1] else None, excuse=few)
        yield last
        few, many = (fresh(peak, make, n) for n in FRAMES[2:])
        yield Row("scale", f"{what}, memory of 4096 frames", "1024 frames", many, few, "MB",
                  many / few, note="in proportion to the frames: 4")


def batch_rows(folder, repeats):
    """Time per sample of the scripts' default stages at --tiny, against the batch."""
    for stage in DEFAULTS:
        sizes = (2, 4, 8, 16)
        table = paired(*(step(made(stage, True, B)) for B in sizes), repeats=repeats)
        table = [[t / B for t, B in zip(row, sizes)] for row in table]
        yield compare("scale", f"{stage.name}, --tiny, batch 16, per sample", table, "batch 2",
                      k=0, ours=3, target=on_cpu(1.1))
