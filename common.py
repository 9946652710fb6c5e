"""What the four scripts share. A reader of one paper can skip it.

    backbones     R2Plus1D, SpectrogramCNN, PredictiveResNet, X3D, SlowFast     plain nn.Modules
    video         read_clip, read_frames, stream_frames, clock, probe           exact to the frame
    samples       Samples, batches                            which samples a training step sees
    annotations   read_table, read_json, read_lines, find     an error names the file and the row
    processes     init_distributed, gather, say, compute      the same code on one or many
    evaluation    predict                                     each item once, by all processes
    weights       load_weights, fetch, init_path              networks to start from
    runs          start_run, save, resume, Log, finish        checkpoints, log, metrics
    figures       plot, draw_curve                            with Pillow
    command line  Parser, parse, launch                       an error of the user is one line

Times are seconds from the first frame of a file. Frames as read are uint8 (T, H, W, 3). To add a
backbone, write a module here and let a script build it. FFmpeg decodes every codec; `find_frames`,
`read_packets` and `decode` treat special cases. To add a flag for all scripts, see `parse`.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.grad import conv2d_weight
from torch.utils.data import DataLoader, Dataset, Subset


class UserError(Exception):
    """An error that the user can fix: a bad path, flag or file. `launch` prints it as one line."""


class VideoError(UserError):
    """A media file that cannot be read. The message begins with its path."""


# ---- backbones -----------------------------------------------------------------------------------

class TemporalConv(nn.Conv3d):
    """Conv3d with kernel (k, 1, 1) as a 2-D convolution over (T, H·W): faster on a CPU."""

    def forward(self, x):                                     # (B, C, T, H, W)
        y = F.conv2d(x.flatten(3), self.weight[..., 0], self.bias, (self.stride[0], 1),
                     (self.padding[0], 0), groups=self.groups)
        return y.unflatten(3, x.shape[3:])


class R2Plus1DBlock(nn.Module):
    """Two (2+1)D convolutions and a shortcut; `out_bn` normalizes their sum."""

    def __init__(self, cin: int, cout: int, stride: tuple[int, int, int]):
        super().__init__()
        t, *s = stride
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
        return F.relu(self.out_bn(y + (self.res_conv(x) if hasattr(self, "res_conv") else x)))


class R2Plus1D(nn.Module):
    """R(2+1)D of depth 18 or 10 with a full 3-D stem (AVID, arXiv 2004.12943); names as released.

    x: (B, 3, T, H, W) -> (B, 8·width, T/8, H/32, W/32), sizes rounded up; width 64 gives 512
    channels. With a temporal_stride of 1, which fits the same weights, T stays T.
    """

    def __init__(self, width: int = 64, depth: int = 18, temporal_stride: int = 2):
        super().__init__()
        w, self.out_dim = [width, width, 2 * width, 4 * width, 8 * width], 8 * width
        self.conv1 = nn.Sequential(
            nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(width),
            nn.ReLU(inplace=True), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
        for n in range(4):
            first = R2Plus1DBlock(w[n], w[n + 1], (temporal_stride, 2, 2) if n else (1, 1, 1))
            rest = [R2Plus1DBlock(w[n + 1], w[n + 1], (1, 1, 1))] if depth == 18 else []
            setattr(self, f"conv{n + 2}x", nn.Sequential(first, *rest))

    def forward(self, x):
        return self.conv5x(self.conv4x(self.conv3x(self.conv2x(self.conv1(x)))))


class SpectrogramCNN(nn.Sequential):
    """Nine 2-D convolutions over (time, mel) (AVID, arXiv 2004.12943); names as released.

    x: (B, 1, time, mel) -> (B, 8·width, time/16, mel/16), rounded up; width 64: 512 channels.
    """

    def __init__(self, width: int = 64):
        def block(cin, cout, stride):
            return nn.Sequential(OrderedDict(
                conv1=nn.Conv2d(cin, cout, 3, stride, 1, bias=False), bn1=nn.BatchNorm2d(cout),
                relu1=nn.ReLU(), conv2=nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
                bn2=nn.BatchNorm2d(cout), relu2=nn.ReLU()))

        super().__init__(OrderedDict(
            conv1=nn.Sequential(nn.Conv2d(1, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width),
                                nn.ReLU()),
            block1=block(width, width, 2), block2=block(width, 2 * width, 2),
            block3=block(2 * width, 4 * width, 2), block4=block(4 * width, 8 * width, 1)))
        self.out_dim = 8 * width


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (arXiv 1512.03385); `last`: without the final ReLU."""

    def __init__(self, cin: int, cout: int, stride: int, last: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample, self.last = nn.Identity(), last
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False),
                                            nn.BatchNorm2d(cout))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.downsample(x)
        return y if self.last else F.relu(y)


class PredictiveResNet(nn.Module):
    """ResNet of predictive coding: 256 channels at the end, no last ReLU, no pooling, no classes.

    x: single frames (B, 3, H, W) -> (B, 4·width, H/32, W/32), sizes rounded up; width 64 gives 256
    channels. net: resnet10, resnet18 or resnet34. Names as released, without `fc`.
    """

    def __init__(self, net: str = "resnet18", width: int = 64):
        super().__init__()
        depth = {"resnet10": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}[net]
        w, self.out_dim = [width, width, 2 * width, 4 * width, 4 * width], 4 * width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for n, count in enumerate(depth):
            setattr(self, f"layer{n + 1}", nn.Sequential(*(
                ResidualBlock(w[n + 1 if k else n], w[n + 1], 2 if n and k == 0 else 1,
                              last=n == 3 and k == count - 1)
                for k in range(count))))
        init_kaiming(self)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))                 # H/4
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))      # H/32


def init_kaiming(net: nn.Module) -> None:
    """Random weights of every convolution by He's rule, fan out (arXiv 1502.01852)."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


class SplitBatchNorm(nn.Module):
    """Batch norm that treats a process's batch as `splits` smaller ones (arXiv 1912.00998).

    x: (B, C, T, H, W). Sample i is in part i mod splits. Names as released: `split_bn` holds the
    running statistics of each part, `bn` those for evaluation, which `merge_splits` fills.
    """

    def __init__(self, channels: int, splits: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.bn = nn.BatchNorm3d(channels, affine=False)
        self.set_splits(splits)

    def set_splits(self, splits: int) -> None:
        """Change the number of parts; their statistics begin anew."""
        self.splits = splits
        self.split_bn = nn.BatchNorm3d(splits * len(self.weight), affine=False,
                                       device=self.weight.device)

    def _load_from_state_dict(self, state, prefix, *args):
        """Take the number of parts from the checkpoint: multigrid's long cycles change it."""
        saved = state.get(f"{prefix}split_bn.running_mean")
        if saved is not None and len(saved) != self.split_bn.num_features:
            self.set_splits(max(1, len(saved) // len(self.weight)))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x):
        n, bn = (self.splits, self.split_bn) if self.training else (1, self.bn)
        if self.training:
            bn.num_batches_tracked += 1
        B, C = x.shape[:2]
        if n > 1 and x.device.type == "cpu" and not x.is_contiguous():    # keeps channels last
            x = x.permute(0, 2, 3, 4, 1)
            parts = x.reshape(B // n, n, -1).unbind(1)
            y = [F.batch_norm(part.reshape(-1, C), mean, var, self.weight, self.bias, self.training,
                              bn.momentum, bn.eps).view(B // n, -1)
                 for part, mean, var in zip(parts, bn.running_mean.view(n, C),
                                            bn.running_var.view(n, C))]
            return torch.stack(y, 1).view(x.shape).permute(0, 4, 1, 2, 3)
        parts = x.reshape(B // n, n * C, *x.shape[2:])        # (B/n, n·C, T, H, W)
        y = F.batch_norm(parts, bn.running_mean, bn.running_var, self.weight.repeat(n),
                         self.bias.repeat(n), self.training, bn.momentum, bn.eps)
        return y.view(x.shape)


def set_splits(net: nn.Module, splits: int) -> None:
    """Set the number of parts in every SplitBatchNorm that has another one."""
    for m in net.modules():
        if isinstance(m, SplitBatchNorm) and m.splits != splits:
            m.set_splits(splits)


@torch.no_grad()
def merge_splits(net: nn.Module) -> None:
    """Fill `bn` from the parts' statistics, those of rank 0, before evaluation and checkpoints.

    mean = mean of the parts' means; var = mean of their variances + variance of their means.
    """
    share_buffers(net)
    for m in net.modules():
        if isinstance(m, SplitBatchNorm):
            mean, var = (x.view(m.splits, -1) for x in (m.split_bn.running_mean,
                                                        m.split_bn.running_var))
            m.bn.running_mean.copy_(mean.mean(0))
            m.bn.running_var.copy_(var.mean(0) + mean.var(0, unbiased=False))


class PointwiseConv(nn.Conv3d):
    """Conv3d with kernel 1. On a CPU, a tensor in channels-last memory goes through a matrix
    product and keeps that order of memory, which makes a step of X3D 1.3 times as fast there.
    """

    def forward(self, x):                                     # (B, C, T, H, W)
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        x = x[..., ::self.stride[1], ::self.stride[2]].permute(0, 2, 3, 4, 1)
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class Depthwise(torch.autograd.Function):
    """3x3x3 convolution with one filter per channel, padding 1. Its backward pass is written here,
    as convolutions: a step of X3D on a CPU then takes 0.65 to 0.85 of the time.
    """

    @staticmethod
    def forward(ctx, x, weight, stride):                      # (B, C, T, H, W), (C, 1, 3, 3, 3)
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv3d(x, weight, None, (1, stride, stride), 1, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        (x, weight), s, C = ctx.saved_tensors, ctx.stride, grad.shape[1]
        full = grad
        if s > 1:
            full = torch.zeros_like(x)
            full[..., ::s, ::s] = grad
        of_x = F.conv3d(full, weight.flip(2, 3, 4), padding=1, groups=C)
        # For each of the weight's 3 time steps: the gradient of a 2-D convolution of all clips'
        # frames. Zero frames around each clip keep it apart from the next one.
        x, grad = (F.pad(y, (0, 0, 0, 0, 1, 1)).transpose(1, 2).flatten(0, 1) for y in (x, grad))
        of_weight = [conv2d_weight(x[k:len(x) - 2 + k], (C, 1, 3, 3), grad[1:-1], s, 1, groups=C)
                     for k in range(3)]
        return of_x, torch.stack(of_weight, 2), None


class DepthwiseConv(nn.Conv3d):
    """Conv3d with kernel 3 and a filter per channel, on a CPU with the gradients of `Depthwise`."""

    def __init__(self, channels: int, stride: int):
        super().__init__(channels, channels, 3, (1, stride, stride), 1, groups=channels, bias=False)

    def forward(self, x):                                     # (B, C, T, H, W)
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        return Depthwise.apply(x, self.weight, self.stride[1])


class X3DBlock(nn.Module):
    """Widen, 3x3x3 depthwise, (squeeze and excite,) swish, narrow; names as released."""

    def __init__(self, cin: int, inner: int, cout: int, stride: int, excite: bool, norm):
        super().__init__()
        conv = partial(PointwiseConv, kernel_size=1, bias=False)
        self.conv1, self.bn1 = conv(cin, inner), norm(inner)
        self.conv2, self.bn2 = DepthwiseConv(inner, stride), norm(inner)
        self.conv3, self.bn3 = conv(inner, cout), norm(cout)
        if excite:                        # about a 16th of the width, a multiple of 8
            hidden = max(8, int(inner / 16 + 4) // 8 * 8)
            hidden += 8 * (hidden < 0.9 * inner / 16)
            self.fc1, self.fc2 = PointwiseConv(inner, hidden, 1), PointwiseConv(hidden, inner, 1)
        self.downsample = nn.Identity()
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(conv(cin, cout, stride=(1, stride, stride)), norm(cout))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "fc1"):
            y = y * self.fc2(F.relu(self.fc1(y.mean((2, 3, 4), keepdim=True)))).sigmoid()
        return F.relu(self.bn3(self.conv3(F.silu(y))) + self.downsample(x))


class X3D(nn.Module):
    """X3D (arXiv 2004.04730), without strides in time; names as in SSDet's release.

    x: (B, 3, T, H, W) -> logits (B, classes, T), or with per_frame=False (B, classes, 1).
    version: XS, S and M have the same widths and depth; `tiny` is for a CPU.
    """
    WIDTHS = 24, (54, 108, 216, 432), (24, 48, 96, 192), 2048
    VERSIONS = {**dict.fromkeys(("XS", "S", "M"), ((3, 5, 11, 7), *WIDTHS)),
                "L": ((5, 10, 25, 15), *WIDTHS),
                "XL": ((5, 10, 25, 15), 32, (72, 162, 306, 630), (32, 72, 136, 280), 2048),
                "tiny": ((1, 2, 2, 1), 12, (24, 36, 60, 96), (12, 16, 28, 48), 128)}

    def __init__(self, version: str = "M", classes: int = 400, per_frame: bool = True,
                 norm: Callable[[int], nn.Module] = SplitBatchNorm, dropout: float = 0.5):
        super().__init__()
        blocks, stem, inner, outer, hidden = self.VERSIONS[version]
        self.widths, self.per_frame = (*outer, inner[-1]), per_frame      # channels of `maps`
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
        self.drop, self.fc2 = nn.Dropout(dropout), LinearFP32(hidden, classes)
        init_kaiming(self)

    def stem(self, x):
        """(B, 3, T, H, W) -> (B, stem, T, H/2, W/2); on a CPU in channels-last memory: faster."""
        x = x if x.is_cuda else x.contiguous(memory_format=torch.channels_last_3d)
        return F.relu(self.bn1(self.conv1_t(self.conv1_s(x))))

    def maps(self, x):
        """{name: map}: layer n (B, C, T, H/2^(n+1), W/2^(n+1)) for n = 1 to 4, conv5 as layer4."""
        found, x = {}, self.stem(x)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            found[name] = x = getattr(self, name)(x)
        return {**found, "conv5": self.last(x)}

    def last(self, x):
        """The head's input: (B, C, T, h, w) -> (B, C', T, h, w)"""
        return F.relu(self.bn5(self.conv5(x)))

    def head(self, x):
        """Logits from conv5's map: (B, C, T, h, w) -> (B, classes, T or 1)"""
        x = x.mean((3, 4) if self.per_frame else (2, 3, 4), keepdim=True)
        return self.fc2(self.drop(F.relu(self.fc1(x)).flatten(2)).mT).mT

    def forward(self, x):
        return self.head(self.maps(x)["conv5"])


class LinearFP32(nn.Linear):
    """A linear layer in float32 under autocast, too: scores that are ranked must not be rounded."""

    def forward(self, x):                                     # (..., C) -> (..., classes)
        with no_autocast(x):
            return super().forward(x.to(self.weight.dtype))


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
        nn.init.zeros_(self.branch2["c_bn"].weight)           # a block begins as its shortcut

    def forward(self, x):
        b = self.branch2
        y = F.relu(b["a_bn"](b["a"](x)))
        y = b["c_bn"](b["c"](F.relu(b["b_bn"](b["b"](y)))))
        return F.relu(y + (self.branch1_bn(self.branch1(x)) if hasattr(self, "branch1") else x))


class SlowFast(nn.Module):
    """SlowFast-R50 (arXiv 1812.03982). The slow pathway sees every `alpha`-th frame of x, or the
    frames `slow`. The fast one sees all frames of x, with 1/`beta` of the channels.

    x: (B, 3, T, H, W) -> logits (B, classes, T), the slow pathway stretched to the fast one's
    times, or with per_frame=False (B, classes, 1). Names of SlowFast's zoo.
    """

    def __init__(self, classes: int = 400, per_frame: bool = True, width: int = 64,
                 depth: Sequence[int] = (3, 4, 6, 3), alpha: int = 4, beta: int = 8,
                 norm: Callable[[int], nn.Module] = SplitBatchNorm, dropout: float = 0.5):
        super().__init__()
        self.alpha, self.per_frame, self.drop = alpha, per_frame, nn.Dropout(dropout)
        conv, widths = partial(nn.Conv3d, bias=False), (width, width // beta)
        self.s1 = nn.ModuleDict({f"pathway{p}_stem": nn.ModuleDict({
            "conv": conv(3, w, (k, 7, 7), (1, 2, 2), (k // 2, 3, 3)), "bn": norm(w)})
            for p, (w, k) in enumerate(zip(widths, (1, 5)))})
        slow = [width, *(4 * width * 2 ** n for n in range(4))]     # channels before, after a stage
        for n, count in enumerate(depth):
            fast = slow[n] // beta
            setattr(self, f"s{n + 1}_fuse", nn.ModuleDict({
                "conv_f2s": conv(fast, 2 * fast, (7, 1, 1), (alpha, 1, 1), (3, 0, 0)),
                "bn": norm(2 * fast)}))
            stage = {}
            for p, (w, cin) in enumerate(zip(widths, (slow[n] + 2 * fast, fast))):
                for i in range(count):
                    stage[f"pathway{p}_res{i}"] = SlowFastBlock(
                        cin if i == 0 else 4 * w * 2 ** n, w * 2 ** n, 4 * w * 2 ** n,
                        2 if n and i == 0 else 1, 3 if p == 1 or n > 1 else 1, norm)
            setattr(self, f"s{n + 2}", nn.ModuleDict(stage))
        self.head = nn.ModuleDict({"projection": LinearFP32(slow[-1] + slow[-1] // beta, classes)})
        init_kaiming(self)
        nn.init.normal_(self.head["projection"].weight, std=0.01)

    def forward(self, x, slow=None):
        paths = [x[:, :, ::self.alpha] if slow is None else slow, x]
        for p, stem in enumerate(self.s1.values()):
            x = F.relu(stem["bn"](stem["conv"](paths[p])))
            paths[p] = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        for n in range(1, 5):
            fuse = getattr(self, f"s{n}_fuse")
            side = F.relu(fuse["bn"](fuse["conv_f2s"](paths[1])))
            paths[0] = torch.cat([paths[0], side], 1)
            for name, block in getattr(self, f"s{n + 1}").items():
                paths[int(name[7])] = block(paths[int(name[7])])          # of pathway0_res2: 0
        axes = (3, 4) if self.per_frame else (2, 3, 4)
        slow, fast = (x.mean(axes, keepdim=True).flatten(2) for x in paths)      # (B, C, T or 1)
        slow = F.interpolate(slow, fast.shape[2], mode="linear", align_corners=False)
        return self.head["projection"](self.drop(torch.cat([slow, fast], 1)).mT).mT


# X3D_NAMES: from SlowFast's zoo to ours. SLOWFAST_NAMES: from pytorchvideo to SlowFast's zoo, whose
# stage numbers are one higher: "blocks.2" becomes "s2+1" first and then "s3".
X3D_NAMES = [
    (r"^s1\.pathway0_stem\.conv_xy\.", "conv1_s."), (r"^s1\.pathway0_stem\.conv\.", "conv1_t."),
    (r"^s1\.pathway0_stem\.bn\.", "bn1."), (r"\.branch2\.se\.fc", ".fc"),
    (r"^s(\d)\.pathway0_res", lambda m: f"layer{int(m[1]) - 1}."),
    (r"\.branch2\.([abc])\.", lambda m: f".conv{'abc'.index(m[1]) + 1}."),
    (r"\.branch2\.([abc])_bn\.", lambda m: f".bn{'abc'.index(m[1]) + 1}."),
    (r"\.branch1\.", ".downsample.0."), (r"\.branch1_bn\.", ".downsample.1."),
    (r"^head\.conv_5\.", "conv5."), (r"^head\.conv_5_bn\.", "bn5."),
    (r"^head\.lin_5\.", "fc1."), (r"^head\.projection\.", "fc2.")]
SLOWFAST_NAMES = [
    (r"^blocks\.0\.multipathway_blocks\.(\d)\.", r"s1.pathway\1_stem."),
    (r"^blocks\.(\d)\.multipathway_blocks\.(\d)\.res_blocks\.(\d+)\.", r"s\1+1.pathway\2_res\3."),
    (r"^blocks\.(\d)\.multipathway_fusion\.", r"s\1+1_fuse."), (r"\.norm\.", ".bn."),
    (r"^s(\d)\+1", lambda m: f"s{int(m[1]) + 1}"), (r"\.conv_fast_to_slow\.", ".conv_f2s."),
    (r"\.branch1_conv\.", ".branch1."), (r"\.branch1_norm\.", ".branch1_bn."),
    (r"\.branch2\.conv_([abc])\.", r".branch2.\1."), (r"^blocks\.6\.proj\.", "head.projection."),
    (r"\.branch2\.norm_([abc])\.", r".branch2.\1_bn.")]


def zoo_tensors(tensors: dict, own: dict) -> dict:
    """A published checkpoint's tensors under our names.

    own: the network's state_dict. Each part of a SplitBatchNorm gets a plain norm's statistics.
    """
    names = SLOWFAST_NAMES if any(".pathway1_" in name for name in own) else X3D_NAMES
    ours = {}
    for name, x in tensors.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        ours[name] = x[:, :, None, None, None] if name == "fc1.weight" and x.dim() == 2 else x
    statistics = "running_mean", "running_var", "num_batches_tracked"
    for name, x in own.items():
        norm, _, statistic = re.sub(r"\.(split_)?bn\.(?=running|num)", ".", name).rpartition(".")
        plain = ours.get(f"{norm}.{statistic}", ours.get(f"{norm}.bn.{statistic}"))
        if statistic in statistics and plain is not None and (
                name not in ours or ours[name].shape != x.shape):
            ours[name] = plain.repeat(x.numel() // plain.numel()) if x.dim() else plain
    return {k: v for k, v in ours.items() if k in own or not k.endswith(statistics)}


# ---- video ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """(open file, its video). Any fault of the file while it is open is a VideoError."""
    try:                                  # file: for colons in a path; replace: tags not in UTF-8
        with av.open(f"file:{path}", metadata_errors="replace") as c:
            if not c.streams.video or not {"mov", "matroska", "avi"} & {*c.format.name.split(",")}:
                raise ValueError(f"{c.format.long_name}, no mp4, mkv, webm or avi with frames")
            v = c.streams.video[0]
            v.codec_context.thread_type = "NONE"              # the loader has processes instead
            v.codec_context.thread_count = 1
            yield c, v
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, LookupError, TypeError,
            AttributeError, AssertionError, MemoryError) as e:            # by damaged headers
        raise VideoError(f"{path}: cannot be read ({str(e) or type(e).__name__})") from e


class Media(NamedTuple):
    """What `probe` finds. seconds: duration; sound: has the file a sound track?"""
    seconds: float
    fps: float
    sound: bool


def probe(path: Path) -> Media:
    """Duration, frames per second and presence of sound. mkv and webm tell no duration: it is that
    of their frames.
    """
    with opened(path) as (c, v):
        fps = float(v.average_rate)
        seconds = float((v.duration or 0) * v.time_base) or clock(path)[0][-1] + 1 / fps
        return Media(seconds, fps, bool(c.streams.audio))


def clock(path: Path) -> tuple[np.ndarray, float]:
    """(seconds of every frame, frames per second). Nothing is decoded."""
    with opened(path) as (c, v):
        _, ticks, _ = find_frames(c, v)
        return (ticks - (v.start_time or 0)) * float(v.time_base), float(v.average_rate)


JPG = "image_{:05d}.jpg"        # names of extracted frames, from 1


def count_frames(path: Path, pattern: str = JPG) -> int:
    """Number of frames that `read_frames` can read from a file, or from a folder of images."""
    if not path.is_dir():
        return len(clock(path)[0])
    form = re.compile(re.sub(r"\\\{:\d*d\\\}", r"\\d+", re.escape(pattern)))     # {:05d} -> \d+
    names = {f.name for f in os.scandir(path) if form.fullmatch(f.name)}
    missing = {pattern.format(k + 1) for k in range(len(names))} - names
    if missing or not names:
        raise VideoError(f"{path}: {min(missing, default=pattern.format(1))} is missing")
    return len(names)


def read_clip(path: Path, clips: Sequence[Sequence[float]] | Callable[[float], Sequence],
              short_side: int | None = None) -> list[np.ndarray]:
    """The frames that a player shows at the times of each clip: [(T, H, W, 3) uint8], upright.

    clips: for each clip its times in seconds, or a function from the file's frames per second to
    them. short_side: larger frames are scaled down to it. One pass decodes all clips, from the key
    frame before the first one on: call again for a clip far away. Past the end the last frame is
    shown. A frame that does not decode is a VideoError.
    """
    with opened(path) as (c, v):
        start, tick, fps = v.start_time or 0, float(v.time_base), float(v.average_rate)
        clips = [np.maximum(x, 0) / tick + start + 1e-6       # in ticks; 1e-6 against rounding
                 for x in (clips(fps) if callable(clips) else clips)]
        low, high = min(x.min() for x in clips), max(x.max() for x in clips)
        packets, ticks, counted = find_frames(c, v, low, high + 1.5 / fps / tick)
        picks = [ticks[np.searchsorted(ticks, x, "right").clip(1) - 1] for x in clips]
        return decode_picks(v, packets, ticks if counted else None, picks, short_side)


def read_frames(path: Path, numbers: Sequence[int], pattern: str = JPG,
                short_side: int | None = None) -> np.ndarray:
    """Frames by number, from 0, in any order: (T, H, W, 3) uint8. See `count_frames`.

    Frame k of a file is frame k of a decode of the whole file. In a folder of images it is the
    file that `pattern` names with k + 1. short_side: larger frames are scaled down to it.
    """
    if path.is_dir():
        return read_images([path / pattern.format(k + 1) for k in numbers], short_side)
    with opened(path) as (c, v):
        packets, ticks, counted = find_frames(c, v)
        if not 0 <= min(numbers) <= max(numbers) < len(ticks):
            raise ValueError(f"it has {len(ticks)} frames, not a frame {max(numbers)}")
        pick, first = ticks[list(numbers)], 0
        if not counted:                                       # from the key frame before
            first = max(k for k, p in enumerate(packets) if p.is_keyframe and p.pts <= pick.min())
        return decode_picks(v, packets[first:], ticks if counted else None, [pick], short_side)[0]


def read_images(paths: Sequence[Path], short_side: int | None = None) -> np.ndarray:
    """Image files of equal size as frames: (T, H, W, 3) uint8."""
    frames = []
    for path in paths:
        with reading(path, error=VideoError), Image.open(path, formats=("JPEG", "PNG")) as image:
            image, ratio = image.convert("RGB"), (short_side or math.inf) / min(image.size)
            if ratio < 1:
                image = image.resize([round(x * ratio) for x in image.size],
                                     Image.Resampling.BILINEAR)
            frames.append(np.asarray(image))
    if len({x.shape for x in frames}) > 1:
        raise VideoError(f"{paths[0].parent}: its images differ in size")
    return np.stack(frames)


def stream_frames(path: Path, short_side: int | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """(second, frame) of a whole file, one by one, in the order of display."""
    with opened(path) as (c, v):
        t = start = v.start_time or 0
        packets, ticks, counted = find_frames(c, v, high=start + 1 / float(v.time_base))
        packets = itertools.chain(packets, (p for p in c.demux(v) if p.size))     # and the rest
        for t, frame in decode(v, packets, ticks if counted else None):
            yield float((t - start) * v.time_base), to_rgb(frame, short_side)
        check_end(c, v, t)


def find_frames(c, v, low: float = -math.inf, high: float = math.inf) -> tuple:
    """(packets, ticks, counted): what to decode for the frames on show from tick `low` to `high`.

    packets: from a key frame at or before `low` until past `high`. ticks: when their frames are
    shown, ascending. counted: are the file's time stamps wrong? Then packets holds the whole file,
    and frame k out of the decoder is shown at ticks[k].
    """
    cc, avi, packets = v.codec_context, c.format.name == "avi", []
    # An avi numbers packets in decoding order: B-frames and one-byte packets shift the numbers.
    # FFmpeg adds one to those of H.264, with or without B-frames.
    counted = avi and (cc.has_b_frames or cc.name == "h264"
                       or any(e.size == 1 for e in v.index_entries))
    if low > (v.start_time or 0) and not counted:
        with contextlib.suppress(av.FFmpegError):
            c.seek(int(low), stream=v)
        packets, ordered = read_packets(c, v, high)
        if not (packets and packets[0].is_keyframe and packets[0].pts <= low and ordered):
            packets = []
            c.seek(0 if avi else -10**9, stream=v)            # then from the start
    if not packets:
        packets, ordered = read_packets(c, v, math.inf if counted else high)
        counted = counted or not ordered
        # Decoders skip frames before the first key frame, but those of MPEG-4 and of old codecs in
        # an avi (DivX 3, FLV) return grey ones.
        if (avi or cc.name == "mpeg4") and not packets[0].is_keyframe:
            raise ValueError("it does not begin with a key frame")
        packets = packets[next((k for k, p in enumerate(packets) if p.is_keyframe), 0):]
    ticks = np.arange(len(packets))
    if not (avi and counted):
        ticks = np.sort([p.pts for p in packets if not p.is_discard])      # hidden by an edit list
        ticks = ticks[ticks >= packets[0].pts]                # no B-frames before the key frame
    if ticks[-1] < high:
        check_end(c, v, ticks[-1])
    return packets, ticks, counted


def check_end(c, v, tick: int) -> None:
    """ValueError if by the header the file goes on for half a second or more after this tick."""
    second, start = float(1 / v.time_base), v.start_time or 0
    entries = v.index_entries if "mov" in c.format.name else ()           # v.frames counts hidden
    end = next((e.timestamp for e in reversed(entries) if not e.is_discard),
               start + float((v.frames - 2) / v.average_rate) * second)
    if tick + second / 2 < end:
        raise ValueError(f"it ends at {(tick - start) / second:.2f} s, before its header says")


def read_packets(c, v, high: float) -> tuple[list[av.Packet], bool]:
    """(packets until past tick `high`, is their `pts` the time of display?)

    With B-frames it is, if the `pts` of some packet is less than that of the packet before.
    """
    cc, found, key, latest = v.codec_context, [], False, -math.inf
    # Packets up to this size hold no frame: DivX and x264 put one byte into an avi, and MPEG-4 has
    # frames that are "not coded". (With B-frames these do count: their frame is in the packet
    # before.)
    empty = 8 if cc.name == "mpeg4" and not cc.has_b_frames else int(c.format.name == "avi")
    ordered = not cc.has_b_frames
    for p in c.demux(v):                                      # dts ascends, and pts >= dts
        key = key or p.is_keyframe
        if p.size > empty:
            found.append(p)
            if not ordered:
                ordered, latest = p.pts < latest, p.pts
        if key and ordered and p.dts is not None and p.dts > high:
            break
    return found, ordered


def decode(v, packets: Iterable[av.Packet], ticks: np.ndarray | None = None,
           wanted: frozenset | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, frame) in the order of display.

    ticks: those of all frames if frames are counted, else None. wanted: ticks; H.264's B-frames at
    other ticks are not decoded. (AV1's decoder reads `skip_frame` only once: frames would be lost.)
    """
    cc, last, times = v.codec_context, -math.inf, (None if ticks is None else iter(ticks.tolist()))
    for p in itertools.chain(packets, [None]):
        if cc.name == "h264" and wanted is not None and times is None:
            cc.skip_frame = "DEFAULT" if p is None or p.pts in wanted else "NONREF"
        for frame in cc.decode(p):
            t = next(times, last) if times else frame.pts
            if t <= last:
                raise ValueError("its time stamps do not ascend")
            last = t
            yield t, frame


def decode_picks(v, packets: list[av.Packet], ticks: np.ndarray | None,
                 picks: Sequence[np.ndarray], short_side: int | None) -> list[np.ndarray]:
    """The frames at the ticks of each pick: [(T, H, W, 3) uint8]. ticks: see `decode`."""
    wanted, images = frozenset(np.concatenate(picks).tolist()), {}
    for t, frame in decode(v, packets, ticks, wanted):
        if ticks is None and t == packets[0].pts and not frame.key_frame:
            raise ValueError("its key frames are not marked")             # so frames would be grey
        if t in wanted:
            images[t] = to_rgb(frame, short_side)
        if len(images) == len(wanted):
            return [np.stack([images[t] for t in pick.tolist()]) for pick in picks]
    raise ValueError(f"{len(wanted) - len(images)} of {len(wanted)} frames do not decode")


SCALE, COLOUR = VideoReformatter(), VideoReformatter()        # each builds its tables once


def to_rgb(frame: av.VideoFrame, short_side: int | None) -> np.ndarray:
    """(H, W, 3) uint8, upright, the short side scaled down to `short_side`.

    Scaled in YUV, then converted: closer to a float resize than both at once, and faster.
    """
    turns, w, h = frame.rotation // 90 % 4, frame.width, frame.height
    if short_side and min(w, h) > short_side:
        w, h = (round(x * short_side / min(w, h)) for x in (w, h))
        frame = SCALE.reformat(frame, w, h, "yuv422p", interpolation="BILINEAR", threads=1)
    return np.rot90(COLOUR.reformat(frame, w, h, "rgb24", threads=1).to_ndarray(), turns)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # mean and standard deviation


def normalize(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (..., 3, T, H, W) to float: (x / 255 - mean) / std, on the device of x."""
    mean, std = torch.tensor((mean, std)).view(2, 3, 1, 1, 1).to(x.device, non_blocking=True)
    return (x / 255 - mean) / std


# ---- samples of a training step ------------------------------------------------------------------

class Samples(Dataset):
    """Sample i is make(args, items, i, rng, *extra), in training a dictionary; rng is NumPy's.

    Its key is i in evaluation and (epoch, *extra, i) in training. rng is fixed by --seed, the epoch
    and i alone, so a sample is the same in any worker, on any rank and after a restart. In training
    a sample that cannot be read is replaced by a random one; its entry `broken` holds the errors.
    """

    def __init__(self, args: argparse.Namespace, items: Sequence, make: Callable):
        self.args, self.items, self.make = args, items, make

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple) -> dict:
        if not isinstance(key, tuple):
            rng = np.random.default_rng((self.args.seed, key))
            return self.make(self.args, self.items, key, rng)
        (epoch, *extra, i), errors = key, []
        while len(errors) < 20:
            rng = np.random.default_rng((self.args.seed, epoch, i))
            try:
                sample = self.make(self.args, self.items, i, rng, *extra)
                return {**sample, "broken": "\n".join(errors)}
            except VideoError as e:
                errors.append(str(e))
                rng = np.random.default_rng((self.args.seed, epoch, i, len(errors)))
                i = int(rng.integers(len(self)))
        raise VideoError(f"{errors[-1]} (20 samples in a row could not be read)")


def step_keys(n: int, length: int, plan: Sequence[tuple], seed: int,
              start: int) -> Iterator[list[tuple]]:
    """Keys (epoch, *extra, i) of this process's batches, for the steps from `start` on.

    plan: (batch size over all processes, *extra) for each step. An epoch takes the first `length`
    entries of a permutation of n samples fixed by (seed, epoch). Processes take equal slices.
    """
    first, shuffled = sum(batch for batch, *_ in plan[:start]), None
    for batch, *extra in plan[start:]:
        share, keys = batch // world_size(), []
        for k in range(first + rank() * share, first + (rank() + 1) * share):
            epoch, place = divmod(k, length)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng((seed, epoch)).permutation(n), epoch
            keys.append((epoch, *extra, int(order[place])))
        first += batch
        yield keys


def batches(args: argparse.Namespace, dataset: Dataset, device: torch.device, start: int,
            steps: int, collate: Callable | None = None,
            plan: Sequence[tuple] | None = None) -> DataLoader:
    """The training batches of the steps start .. steps-1.

    Every epoch is a new permutation, without its last partial batch. With a plan of all steps, see
    `step_keys`, batch sizes vary, and one epoch follows the other without a gap.
    """
    n, most = len(dataset), max((batch for batch, *_ in plan or ()), default=args.batch_size)
    if n < most:
        raise UserError(f"{n} training samples do not fill a batch of {most}: lower --batch_size")
    length = n if plan else n - n % args.batch_size
    keys = step_keys(n, length, plan or [(args.batch_size,)] * steps, args.seed, start)
    return DataLoader(dataset, batch_sampler=keys, num_workers=args.workers,
                      collate_fn=collate, pin_memory=device.type == "cuda",
                      generator=torch.Generator())            # leaves the global one alone


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a batch on the device; other entries are left out."""
    return {k: x.to(device, non_blocking=True) for k, x in batch.items() if torch.is_tensor(x)}


def spread(items: Sequence, n: int | None) -> list:
    """--limit: a random item from each of n equal parts of a list, always the same; None: all.

    Random, because items at equal distances could all be of one kind.
    """
    if n is None or n >= len(items):
        return list(items)
    rng, ends = np.random.default_rng(0), [k * len(items) // n for k in range(n + 1)]
    return [items[rng.integers(*part)] for part in itertools.pairwise(ends)]


# ---- annotations ---------------------------------------------------------------------------------

@contextlib.contextmanager
def reading(path: Path, row: Any = "", error: type = UserError) -> Iterator[None]:
    """Turn any error in this block into one line with the file and the row."""
    try:
        yield
    except (UserError, NameError):                            # NameError: a fault of this code
        raise
    except FileNotFoundError as e:
        raise error(f"{path}: no such file") from e
    except Exception as e:                                    # also SyntaxError of Pillow, zlib's
        why = f"{e} is missing" if isinstance(e, KeyError) else str(e) or type(e).__name__
        why = " ".join(why.split())[:200]
        raise error(f"{path}{f':{row}' if row != '' else ''}: {why}") from e


def read_table(path: Path, parse: Callable[[dict], Any]) -> list:
    """[parse(row)] of a CSV file with a header; a row is {column: value}."""
    with reading(path), open(path, encoding="utf-8-sig", newline="") as f:
        rows, found = csv.DictReader(f, strict=True), []
        if not rows.fieldnames:
            raise ValueError("is empty")
        for row in rows:
            with reading(path, rows.line_num):
                found.append(parse(row))
        return found


def read_json(path: Path, parse: Callable | None = None, key: str | None = None) -> Any:
    """The value of a JSON file, or of its `key`, unless the file is a list. With parse: the list
    [parse(name, entry)] of the entries of that value; in a list the name is the index.
    """
    with reading(path):
        value = json.loads(path.read_bytes())
        value = value if key is None or isinstance(value, list) else value[key]
        if parse is None:
            return value
        found = []
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            with reading(path, name):
                found.append(parse(name, entry))
        return found


def read_lines(path: Path, parse: Callable[[str], Any] = str) -> list:
    """[parse(line)] of the lines of a text file that are not blank."""
    with reading(path):
        lines, found = path.read_text(encoding="utf-8-sig").split("\n"), []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with reading(path, number):
                found.append(parse(line.strip()))
    return found


def find(root: Path, *names: str, required: bool = True) -> Path | None:
    """The first of these files, names or patterns, in a folder or up to two folders below it."""
    paths = (path for name in names for depth in ("", "*/", "*/*/")
             for path in sorted(root.glob(depth + name)))
    path = next(paths, None)
    if path is None and required:
        raise UserError(f"{root}: no {' or '.join(names)} in it; README shows the official files")
    return path


def find_videos(root: Path, *folders: str, frames: bool = False) -> dict[str, Path]:
    """{name without ending: path} of the videos in these folders below root; the first one wins.

    folders: names or patterns, "" is root itself. With `frames` also folders of extracted frames,
    which win over files beside them.
    """
    found = {}
    for folder in (f for p in folders for f in (sorted(root.glob(p)) if p else [root])):
        videos = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm", ".avi"):
                videos.setdefault(path.stem, path)
            elif frames and path.is_dir():
                videos[path.name] = path
        found = {**videos, **found}
    return found


# ---- processes -----------------------------------------------------------------------------------

def init_distributed() -> torch.device:
    """Join torchrun's processes, or make a group of one; returns this process's device.

    With a group in any case, DDP and `gather` need no branch for one process.
    """
    # A warning about the channels-last memory of X3D on a CPU, which is faster nevertheless.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"process {device.index} has no GPU: start as many as there are GPUs")
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {
        "store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timedelta(days=1),
                            device_id=None if device.type == "cpu" else device, **alone)
    return device


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def say(*words: Any) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(*words, flush=True)


def sum_processes(x: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, without gradient."""
    x = x.detach().to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True).contiguous()
    dist.all_reduce(x)
    return x


def gather(rows: dict[int, Any], expect: int) -> dict[int, Any]:
    """All processes' {index: result}, sorted; an index that is missing or comes twice raises."""
    parts = [None] * world_size()
    dist.all_gather_object(parts, rows)
    merged = {k: v for part in parts for k, v in part.items()}
    if len(merged) != expect or sum(map(len, parts)) != expect:
        raise RuntimeError(f"{sum(map(len, parts))} results for {expect} items")
    return dict(sorted(merged.items()))


def gather_rows(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The rows of all processes along `dim`, in rank order, with their gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank()] = x                                         # the others are constants
    rows = torch.cat(parts, dim)
    if rows.requires_grad:
        rows.register_hook(sum_processes)                     # gradients of all losses
    return rows


def share_buffers(model: nn.Module) -> None:
    """Copy the buffers, batch norm's running statistics, from rank 0 to all processes."""
    for buffer in model.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, 0)


def seed_step(seed: int, step: int) -> None:
    """Seed dropout by (seed, step, rank), so that a continued run repeats it."""
    torch.manual_seed(int(np.random.default_rng((seed, step, rank())).integers(2 ** 63)))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass: bfloat16 on CUDA for bf16, and for auto if the GPU has it."""
    on = device.type == "cuda" and (precision == "bf16" or precision == "auto"
                                    and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """The context of what must stay in float32, on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def read_items(args: argparse.Namespace, dataset: Dataset, what: str,
               batch_size: int | None = None, collate: Callable | None = None) -> Iterator:
    """The items of a dataset in order, one by one or in batches, read by --workers.

    Prints their number and the time left every ten seconds.
    """
    loader = DataLoader(dataset, batch_size, num_workers=args.workers, collate_fn=collate,
                        generator=torch.Generator())          # leaves the global one alone
    start = last = time.perf_counter()
    for n, items in enumerate(loader, 1):
        yield items
        now = time.perf_counter()
        if now > last + 10:
            last = now
            say(f"{what} {n}/{len(loader)}, ETA {(now - start) / n * (len(loader) - n):.0f} s")


def compute(args: argparse.Namespace, items: Sequence, make: Callable, what: str) -> list:
    """[make(args, items, i, rng) for every i]: one process computes each, all get the list."""
    mine = range(len(items))[rank()::world_size()]
    results = read_items(args, Subset(Samples(args, items, make), mine), what)
    return [*gather(dict(zip(mine, results)), len(items)).values()]


# ---- evaluation ----------------------------------------------------------------------------------

@torch.inference_mode()
def predict(args: argparse.Namespace, device: torch.device, dataset: Dataset,
            network: Callable[[dict], dict], what: str, batch_size: int = 8,
            collate: Callable | None = None) -> dict[str, torch.Tensor | list]:
    """{name: results of all items, in the dataset's order}; each item is computed exactly once.

    network: a batch on the device -> {name: (B, ...)}. Rank r computes the items r, r + world_size
    and so on. A result is a tensor (N, ...) in float32, or a list if the items' shapes differ. An
    item that cannot be read raises: none is left out.
    """
    mine, rows = range(len(dataset))[rank()::world_size()], []
    for batch in read_items(args, Subset(dataset, mine), what, batch_size, collate):
        with autocast(device, args.precision):
            out = network(to_device(batch, device))
        out = {k: [y.float().cpu() for y in x] for k, x in out.items()}
        if not all(y.isfinite().all() for y in itertools.chain(*out.values())):
            raise UserError(f"{what}: the network's output is not finite; nothing was scored")
        rows += [dict(zip(out, item)) for item in zip(*out.values(), strict=True)]
    rows = [*gather(dict(zip(mine, rows, strict=True)), len(dataset)).values()]
    columns = {k: [row[k] for row in rows] for k in (rows[0] if rows else ())}
    return {k: torch.stack(x) if len({y.shape for y in x}) == 1 else x for k, x in columns.items()}


# ---- weights -------------------------------------------------------------------------------------

def load_checkpoint(path: Path) -> Any:
    """The contents of a checkpoint: tensors, numbers and strings only, no code is run.

    Released files also hold NumPy's numbers; the function that makes them has two names.
    """
    make = np.float64(0).__reduce__()[0]
    numbers = [(make, "numpy.core.multiarray.scalar"), (make, "numpy._core.multiarray.scalar"),
               np.dtype, *(type(np.dtype(t)) for t in ("f2", "f4", "f8", "i4", "i8", "?"))]
    try:
        with torch.serialization.safe_globals(numbers):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as e:                                    # pickle, zip and torch errors alike
        raise UserError(f"{path}: no checkpoint, damaged, or it holds more than tensors and "
                        "numbers; nothing was loaded") from e


def fetch(url: str, instead: str) -> Path:
    """Path of a published file of weights, downloaded once per machine; prints its SHA-256.

    instead: the flag to use without a network, for the error.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as e:
            raise UserError(f"{url}: {e}; put this file at {path}, or use {instead}") from e
        with open(path, "rb") as f:
            say(f"{url}: SHA-256 {hashlib.file_digest(f, 'sha256').hexdigest()}")
    barrier()
    return path


def init_path(args: argparse.Namespace, init: str,
              published: dict[str, str] | None = None) -> Path | None:
    """Path of the weights of --init; None if the run starts from random ones or continues.

    published: {value of --init: address of the file}.
    """
    if (args.out / "last.pt").exists():
        return None
    if init == "none":
        say("init none: random weights")
        return None
    url = (published or {}).get(init)
    return fetch(url, "--init none") if url else Path(init)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of any checkpoint, bare or one dictionary deep, without the `module.` of DDP.

    In a file with several networks a key like `model_g_state_dict` stays before its names.
    """
    content, tensors = load_checkpoint(path), {}
    for key, value in content.items() if isinstance(content, dict) else ():
        below = value if isinstance(value, dict) else {"": value}
        tensors |= {f"{key}.{k}" if k != "" else f"{key}": x for k, x in below.items()
                    if torch.is_tensor(x)}
    wrapper = r"^((model|model_av|state_dict|vtn_state_dict|model_state|model_state_dict)\.)?"
    tensors = {re.sub(r"(^|(?<=_state_dict\.))(module\.)+", "", re.sub(wrapper, "", k)): x
               for k, x in tensors.items()}
    if not tensors:
        raise UserError(f"{path}: holds no named weights")
    return tensors


def load_weights(module: nn.Module, path: Path, layouts: Sequence[Sequence[tuple]] = ((),),
                 required: Sequence[str] = ("",), skip: Sequence[str] = (),
                 adapt: Callable[[dict, dict], dict] | None = None) -> set[str]:
    """Fill a network from a checkpoint; print what was loaded, unused and left random.

    layouts: naming schemes, each [(pattern, replacement), ...] from the file's names to ours; the
    one that matches most tensors is taken. required: every tensor whose name begins so must be in
    the file. skip: such tensors keep their values. adapt: (the file's tensors, the network's
    entries) -> tensors in the network's shapes. Returns the names that were filled.
    """
    own, tensors = module.state_dict(), read_weights(path)
    tensors = adapt(tensors, own) if adapt else tensors

    def match(layout):                                        # {our name: name in the file}
        found = {}
        for old in tensors:
            new = old
            for pattern, replacement in layout:
                new = re.sub(pattern, replacement, new)
            if new in own and not new.startswith(tuple(skip)):
                found[new] = old
        return found

    found = max(map(match, layouts), key=len)
    unused, random = sorted(tensors.keys() - found.values()), sorted(own.keys() - found.keys())
    needed = [k for k in random if k.startswith(tuple(required)) and not k.startswith(tuple(skip))]
    for what, names in {
            "are missing": needed if found else [*own],
            "have another shape": [k for k in found if own[k].shape != tensors[found[k]].shape],
            "are not finite": [k for k, old in found.items() if not tensors[old].isfinite().all()],
            }.items():
        if names:
            raise UserError(f"{path}: {len(names)} tensors {what}, such as {names[0]}")
    module.load_state_dict({new: tensors[old] for new, old in found.items()}, strict=False)
    shown = [sorted({".".join(k.split(".")[:2]) for k in names})[:6] for names in (unused, random)]
    say(f"init {path}: {len(found)} tensors loaded, {len(unused)} of the file not used {shown[0]}, "
        f"{len(random)} of the network left random {shown[1]}")
    return set(found)


def adopt(args: argparse.Namespace, path: Path, names: Iterable[str]) -> dict:
    """Set these flags to their values in a checkpoint of ours, and print each one that changes.
    Returns all of its flags; {} for other people's files.
    """
    content = load_checkpoint(path)
    saved = content.get("args") if isinstance(content, dict) else None
    saved = saved if isinstance(saved, dict) else {}
    for name in names:
        if name in saved and saved[name] != getattr(args, name):
            say(f"--{name} {saved[name]}, as the checkpoint was trained")
            setattr(args, name, saved[name])
    return saved


# ---- runs ----------------------------------------------------------------------------------------

def write(path: Path, content: str | bytes | Callable) -> None:
    """Write a file completely or not at all. content: text, bytes, or a function of the file."""
    part = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:                      # torch.save hides the OSError
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path}: cannot be written ({e.__context__ or e})") from e


def write_json(path: Path, value: Any) -> None:
    """`write` as indented JSON."""
    write(path, json.dumps(value, indent=1, default=str) + "\n")


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    """`write` as CSV, the first row is the header."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write(path, text.getvalue())


def start_run(args: argparse.Namespace, needs_data: bool = True) -> torch.device:
    """Check --data, join the processes, write `args.json`; returns the device."""
    if needs_data and not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder; --data is the {args.dataset} folder, as "
                        "README shows it (`make toy` writes a small one to data/toy)")
    device = init_distributed()
    if device.type == "cpu" and args.precision == "bf16":
        raise UserError("--precision bf16 needs a GPU: on a CPU it is slower than fp32")
    if device.type == "cpu" and args.tiny:
        torch.set_num_threads(1)                              # faster for networks this small
    # A run that continues keeps its own.
    if rank() == 0 and not all((args.out / name).exists() for name in ("last.pt", "args.json")):
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent,
                             capture_output=True, text=True, check=False)
        write_json(args.out / "args.json", {
            **vars(args), "processes": world_size(), "commit": git.stdout.strip(),
            **{m.__name__: m.__version__ for m in (torch, np, av)}})
    barrier()
    if not (args.out / "args.json").exists():
        raise UserError(f"{args.out}: not the same folder on all nodes; use a shared disk")
    return device


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags as numbers, strings and lists."""
    return json.loads(json.dumps(vars(args), default=str))


def save(path: Path, step: int, args: argparse.Namespace, **parts: Any) -> None:
    """Write a checkpoint after `step` steps, on rank 0: state_dicts and plain values by name."""
    if rank() == 0:
        state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in parts.items()}
        for name, x in state.get("model", {}).items():
            if x.is_floating_point() and not x.isfinite().all():
                raise UserError(f"step {step}: {name} is not finite; no checkpoint was written")
        write(path, partial(torch.save, {**state, "step": step, "args": plain_flags(args)}))


def resume(path: Path, args: argparse.Namespace, samples: int, free: Sequence[str] = (),
           **parts: Any) -> dict:
    """Load each part from a checkpoint; returns its other values, {"step": 0} if there is none.

    The number of samples and the flags must be those of the checkpoint, except out, data, workers,
    save_every, log_every and the flags named in `free`.
    """
    if not path.exists():
        return {"step": 0}
    state = load_checkpoint(path)
    try:
        now = {**plain_flags(args), "samples": samples}
        then = {**state["args"], "samples": state.pop("samples")}
        for k in now.keys() - {"out", "data", "workers", "save_every", "log_every", *free}:
            if then.get(k) != now[k]:
                raise UserError(f"{path}: was made with {k} {then.get(k)}, now it is {now[k]}; "
                                "use the same to continue, or another --out")
        for k, part in parts.items():
            part.load_state_dict(state.pop(k))
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as e:
        raise UserError(f"{path}: is of another network or stage; choose another --out") from e
    say(f"continuing {path} after step {state['step']}")
    return state


def claim(folder: Path, info: dict) -> None:
    """Note in about.json what a folder's files are made with; UserError if it says otherwise."""
    path, info = folder / "about.json", json.loads(json.dumps(info, default=str))
    if rank() == 0 and not path.exists():
        write_json(path, info)
    barrier()
    saved = read_json(path)
    if saved != info:
        names = [k for k in info if not isinstance(saved, dict) or saved.get(k) != info[k]]
        raise UserError(f"{path}: the files here were made with other settings "
                        f"({', '.join(names)}); choose another folder")


def check_finite(step: int, model: nn.Module, loss: torch.Tensor) -> None:
    """Stop at NaN or Inf before the update, on all processes alike: DDP averages gradients."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not norm.isfinite():
        raise UserError(f"step {step}: loss {loss.item():.4g}, gradient {norm.item():.4g}; the run "
                        "stops, its last checkpoint is older")


class Log:
    """A line on the console and in log.jsonl every --log_every steps; the count of broken samples.

        for step, batch in log.steps(loader): ... log(step, loss=loss, lr=lr)
    """

    def __init__(self, args: argparse.Namespace, start: int, steps: int):
        self.args, self.range, self.path = args, range(start, steps), args.out / "log.jsonl"
        self.broken, self.samples, self.waited = 0, 0, 0.0
        self.since, self.last = time.perf_counter(), start - 1
        if rank() == 0:                                       # drop steps that will be repeated
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            write(self.path, "".join(f"{line}\n" for line in lines
                                     if line[-1:] == "}" and json.loads(line)["step"] < start))

    def steps(self, loader: Iterable[dict]) -> Iterator[tuple[int, dict]]:
        """(step, batch) from the first step on."""
        loader = iter(loader)
        for step in self.range:
            start = time.perf_counter()
            batch = next(loader)
            self.waited += time.perf_counter() - start
            errors = batch.pop("broken")
            self.samples += len(errors) * world_size()
            for error in filter(None, errors):
                self.broken += error.count("\n") + 1
                print(f"warning: {error}; sample replaced", file=sys.stderr, flush=True)
            yield step, batch

    def due(self, step: int) -> bool:
        """Is this step logged?"""
        return (step + 1) % self.args.log_every == 0 or step + 1 == self.range.stop

    def __call__(self, step: int, now: bool = False, **values: Any) -> None:
        """Log this step's values, means over the processes, if it is due or `now` is True."""
        if not (now or self.due(step)):
            return
        numbers = torch.stack([torch.as_tensor(v).detach().double().cpu()
                               for v in (*values.values(), self.broken * world_size())])
        means = dict(zip((*values, "broken"), (sum_processes(numbers) / world_size()).tolist()))
        seconds, steps = time.perf_counter() - self.since, step - self.last
        means |= {"clips_per_s": self.samples / seconds, "data_wait": self.waited / seconds}
        row = {"step": step, **{k: float(f"{v:.6g}") for k, v in means.items()}}
        self.broken, self.samples, self.waited = 0, 0, 0.0
        self.since, self.last = time.perf_counter(), step
        if rank() == 0:
            with reading(self.path), open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        eta = timedelta(seconds=int(seconds / steps * (self.range.stop - step - 1)))
        say(f"{self.args.stage} {step + 1}/{self.range.stop}  "
            + "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step") + f"  ETA {eta}")

    def total(self, key: str) -> float:
        """Sum of a key over all rows of log.jsonl, those before a restart included."""
        barrier()                                             # rank 0 has written
        return sum(json.loads(line)[key] for line in self.path.read_text().splitlines())


def finish(args: argparse.Namespace, metrics: dict) -> None:
    """Write metrics.json, NaN as null, and print its numbers."""
    if rank() == 0:
        write_json(args.out / "metrics.json",
                   json.loads(json.dumps(metrics), parse_constant=lambda _: None))
    say("  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float))))


# ---- figures -------------------------------------------------------------------------------------

COLOURS = ("#1f4e9c", "#c65a11", "#2c7d3f", "#7a3f98", "#555555")


def plot(draw, box: tuple[int, int, int, int], x: np.ndarray, curves: dict[str, np.ndarray],
         marks: Sequence[float] = (), span: tuple[float, float] | None = None) -> None:
    """Curves over x in a box (left, top, right, bottom) of a Pillow ImageDraw.

    marks: x of vertical lines. span: lowest and highest value shown, default: the curves'.
    """
    left, top, right, bottom = box
    values = np.concatenate([*curves.values()])
    low, high = span or (float(np.nanmin(values)), float(np.nanmax(values)))

    def place(a, b):
        return (left + (a - x[0]) / max(x[-1] - x[0], 1e-9) * (right - left),
                bottom - (b - low) / max(high - low, 1e-9) * (bottom - top))

    draw.rectangle(box, outline="#888888")
    for value, y in ((high, top), (low, bottom)):
        draw.text((left - 5, y), f"{value:.4g}", "#333333", anchor="rm")
    for value, at in ((x[0], left), (x[-1], right)):
        draw.text((at, bottom + 4), f"{value:.6g}", "#333333", anchor="ma")
    for t in marks:
        draw.line([place(t, low), place(t, high)], fill="#bb2222", width=2)
    for n, (name, y) in enumerate(curves.items()):
        draw.line([place(*point) for point in zip(x, y) if np.isfinite(point[1])],
                  fill=COLOURS[n % len(COLOURS)], width=2)
        draw.text((left + 110 * n, top - 15), name, COLOURS[n % len(COLOURS)])


def draw_curve(args: argparse.Namespace, keys: Sequence[str]) -> None:
    """`curve.png` from log.jsonl, on rank 0: a panel per key over the steps."""
    if rank() > 0:
        return
    rows = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    keys = [k for k in keys if any(k in row for row in rows)]
    image = Image.new("RGB", (760, 20 + 200 * len(keys)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((70, 5), f"{args.stage} on {args.dataset}", "black")
    for n, key in enumerate(keys):
        x, y = np.array([(row["step"] + 1, row[key]) for row in rows if key in row], float).T
        plot(draw, (70, 200 * n + 40, 740, 200 * n + 190), x, {key: y})
    write(args.out / "curve.png", lambda f: image.save(f, "PNG"))


# ---- command line --------------------------------------------------------------------------------

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action):
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def number(kind: type, least: float, text: str) -> float:
    """The value of a flag, int or float. NaN, Inf and what is too small are errors."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        what = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} of at least {least}, not {text}")
    return value


class Parser(argparse.ArgumentParser):
    """argparse with the group "data" of the shared flags; `parse` adds the group "run"."""

    def __init__(self, doc: str, stages: Sequence[str], datasets: Sequence[str]):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
        self.group("data")
        self.flag("stage", stages[0], "what to do", stages)
        self.flag("dataset", datasets[0], "which videos; the published recipe of stage and "
                  "dataset sets the defaults below", datasets)
        self.flag("data", Path, "folder of the dataset in its official layout")
        self.flag("limit", int, "use only N samples of each split, evenly spread")

    def group(self, title: str, about: str | None = None) -> None:
        """Start a group of flags."""
        self.current = self.add_argument_group(title, about)

    def flag(self, name: str, default: Any, help: str, choices: Sequence[str] | None = None,
             also: Sequence[str] = (), least: float | None = None, **more: Any) -> None:
        """Add a flag to the last group. default: its value, or its type if it has none.

        least: the smallest number that is allowed; usually 1 for integers, 0 for others.
        """
        kind = default if isinstance(default, type) else type(default)
        if kind in (int, float):
            more["type"] = partial(number, kind, int(kind is int) if least is None else least)
        more = {"action": "store_true"} if kind is bool else {
            "type": kind, "choices": choices, "default": None if kind is default else default,
            "metavar": None if choices else kind.__name__[:5].upper(), **more}
        names = [f"--{name}", *(f"--{alias}" for alias in also)]
        self.current.add_argument(*names, dest=name, help=help, **more)

    def error(self, message: str):
        """One line, by rank 0; torchrun ends the other processes while they wait."""
        time.sleep(3 * (rank() > 0))
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")


def parse(parser: Parser, recipe: Callable[[argparse.Namespace], dict],
          argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse twice: recipe(flags of the first pass) is the dictionary of defaults of the second.

    So --stage, --dataset and --tiny choose the defaults of all other flags; given flags win.
    """
    parser.group("run")
    parser.flag("out", Path, "run folder; a run that finds its checkpoint there continues it")
    parser.flag("tiny", False, "a small, short run: minutes on a CPU, not the paper's setting")
    parser.flag("seed", 0, "seed of all randomness", least=0)
    parser.flag("workers", 8, "decoding workers per process", least=0)
    parser.flag("precision", "auto", "of the networks: auto is bf16 on CUDA and fp32 on CPU; "
                "losses are fp32", ["auto", "bf16", "fp32"])
    parser.flag("compile", False, "torch.compile the network")
    parser.flag("save_every", 500, "steps between checkpoints")
    parser.flag("log_every", 20, "steps between log lines")

    argv = sys.argv[1:] if argv is None else list(argv)
    chosen, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    values = recipe(chosen)
    stage, dataset = (values.get(k, getattr(chosen, k)) for k in ("stage", "dataset"))
    parser.set_defaults(**{
        "data": Path("data") / dataset,
        "out": Path("runs") / f"{Path(parser.prog).stem}_{dataset}_{stage}", **values})
    args = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if (args.batch_size or 0) % processes:                    # None: nothing is trained
        parser.error(f"--batch_size {args.batch_size} is of all {processes} processes together, "
                     "which cannot share it evenly")
    return args


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run main(args). A UserError becomes one line on stderr and exit status 1.

    Other ranks wait before they fail: torchrun ends them first, so that one line is printed.
    """
    try:
        main(args)
    except (UserError, OSError) as e:
        time.sleep(5 * (rank() > 0))
        line = (str(e).strip() or type(e).__name__).splitlines()[-1]      # last of a traceback
        sys.exit("error: " + re.sub(r"^common\.\w+: ", "", line))
    except Exception:
        time.sleep(5 * (world_size() > 1))                    # perhaps another rank failed first
        raise
    several = world_size() > 1
    if dist.is_initialized():
        dist.destroy_process_group()
    if several:                           # without Python's clean-up, in which gloo may abort
        sys.stdout.flush()
        os._exit(0)
