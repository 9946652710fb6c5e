"""Our networks and losses as one would write them down at first, without what makes ours fast:
what `make bench` measures them against. A test compares their losses and gradients.

    plain(model)    a copy with the same parameters, its parts as below
    *_loss          the equations of the scripts' docstrings, term by term
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import cpctrans
import f2c_oops
import replai
import ssdet_coarsefine as ssdet


def plain(model):
    """A copy of a network, or of its parts, in which every part that has a plain form has it."""
    model = in_order(model)
    for part in model.modules():
        part.__class__ = PLAIN.get(type(part), type(part))    # the parameters are its own
    return model


def in_order(model):
    """A copy with its weights in the usual order of memory, hence its maps as well."""
    return ordered(model, {})


def ordered(model, formats):
    """A copy whose weights of so many dimensions are in that order of memory, others in the usual.

    A clone, as kernels of 1 x 1 are contiguous in either order, and their strides tell PyTorch
    which one their outputs get.
    """
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = p.data.clone(memory_format=formats.get(p.dim(), torch.contiguous_format))
    return model


# ---- RepLAI ------------------------------------------------------------------------------------

class RepLAI(replai.RepLAI):
    """Either clip through the network by itself; so batch norm sees them apart in training."""

    def forward(self, v_l, v_r, a):
        f, h = self.backbone, self.mlp
        v_l, v_r = (f["video"](v).amax((2, 3, 4)) for v in (v_l, v_r))    # (B, D)
        a = f["audio"](a).amax((2, 3))
        s_l, s_r = h["video_aot"](v_l), h["video_aot"](v_r)
        return {"z": (h["video_clr"](v_l), h["video_clr"](v_r)), "y": h["audio_clr"](a),
                "forth": h["aot_diff"](s_r - s_l), "back": h["aot_diff"](s_l - s_r),
                "q": h["audio_aot"](a)}


def replai_loss(out, tau, kappa):
    """½ L_AVC + ½ L_AStC"""
    y = F.normalize(out["y"].float(), dim=1)
    own, avc = torch.arange(len(y), device=y.device), 0
    for z in out["z"]:
        logits = F.normalize(z.float(), dim=1) @ y.T / tau    # (B, B)
        avc = avc + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 4
    forth, back, q = (out[k].float() for k in ("forth", "back", "q"))
    p_fwd, p_bwd = (F.cosine_similarity(x, q, dim=1) / kappa for x in (forth, back))
    bce = F.binary_cross_entropy_with_logits
    astc = (bce(p_fwd, torch.ones_like(p_fwd)) + bce(p_bwd, torch.zeros_like(p_bwd))) / 2
    return (avc + astc) / 2


# ---- CPCTrans ----------------------------------------------------------------------------------

class CPC(cpctrans.CPC):
    """Maps (B, P, D, S, S) as the figure has them; nothing is flattened."""

    def forward(self, clip):
        z, h, z_hat = self.cells(clip), None, []              # (B, N, D, S, S)
        for n in range(z.shape[1] - self.pred_step):
            h = self.agg(F.relu(z[:, n]), h)
        for _ in range(self.pred_step):
            z_hat.append(self.network_pred(h))
            h = self.agg(F.relu(z_hat[-1]), h)
        return torch.stack(z_hat, 1), z[:, -self.pred_step:]


def cpctrans_loss(z_hat, z):
    """Loss and accuracies of the score <ẑ_bps, z_b'p's'>, not flattened at first."""
    score = torch.einsum("bpdhw,cqdij->bphwcqij", z_hat.float(), z.float())
    score = score.reshape(-1, score[0, 0, 0, 0].numel())      # (B·P·S·S, B·P·S·S)
    target = torch.arange(len(score), device=score.device)
    right = score.topk(min(5, len(score))).indices == target[:, None]
    top = {f"top{k}": right[:, :k].any(1).float().mean() for k in (1, 3, 5)}
    return {"loss": F.cross_entropy(score, target), **top}


# ---- F2C ---------------------------------------------------------------------------------------

def attention(q, k, v, seen, reach):
    """Softmax over all pairs of tokens, of which the far ones are masked: (B, H, n, d)."""
    i = torch.arange(q.shape[2], device=q.device)
    near = (((i[:, None] - i).abs() <= reach) | (i == 0)) & seen[:, None, None]
    score = q @ k.mT / q.shape[3] ** 0.5                      # (B, H, n, n)
    return score.masked_fill(~near, float("-inf")).softmax(3) @ v


class Layer(f2c_oops.Layer):
    """All seven projections of every token, every row of the attention (masked, not explicit)."""

    def forward(self, h, seen=None, only_class=False):
        q, k, v, q0, k0, v0 = (p(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (
            self.query, self.key, self.value, self.query_global, self.key_global,
            self.value_global))
        i = torch.arange(h.shape[1], device=h.device)
        near = (((i[:, None] - i).abs() <= self.reach) | (i == 0)) & seen[:, None, None]
        p = self.p if self.training else 0.0
        rows = F.scaled_dot_product_attention(q, k, v, near, p)
        first = F.scaled_dot_product_attention(q0[:, :, :1], k0, v0, seen[:, None, None], p)
        rows = torch.cat([first, rows[:, :, 1:]], 2).transpose(1, 2).flatten(2)
        h = self.norm1(self.drop(self.out(rows)) + h)
        return self.norm2(self.drop(self.fc2(F.gelu(self.fc1(h)))) + h)


class Encoder(f2c_oops.Encoder):
    """Tokens up to a multiple of twice the window, as the release has them."""

    def forward(self, x, lengths=None, every=False):
        n, width = x.shape[1], 4 * self.layers[0].reach
        lengths = torch.full((len(x),), n, device=x.device) if lengths is None else lengths
        h = super().forward(F.pad(x, (0, 0, 0, -(1 + n) % width)), lengths, every=True)
        return h[:, :1 + n] if every else h[:, 0]


# ---- SSDet and Coarse-Fine ---------------------------------------------------------------------

class BatchNorm(common.SplitBatchNorm):
    """Batch norm of the clips as they come, its statistics in one piece."""

    def forward(self, x):
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.weight, self.bias,
                            self.training, self.bn.momentum, self.bn.eps)


class Mixing(ssdet.Mixing):
    """Maps enlarged to the stage's size, then mixed."""

    def forward(self, biases, scales, size):
        def mix(maps, conv):
            x = torch.cat([ssdet.enlarge(m, size) for m in maps], 1)
            return conv(x.flatten(2)).unflatten(2, x.shape[2:])
        return mix(biases, self.conv_at), mix(scales, self.conv_at2).sigmoid()


class Coarse(ssdet.Coarse):
    """Features enlarged to the stages' sizes before they are filtered."""

    def forward(self, x, features, valid, start):
        return super().forward(x, at_stages(features, x.shape[-1]), valid, start)


def at_stages(features, crop):
    """{level: (B, C, T', 7, 7)} -> the same at the stages' sizes, of pictures of `crop` pixels.

    Where a stage is no multiple of 7 wide, only the filtered features are resized, as released.
    """
    sizes = [-(-crop // 2 ** n) for n in (2, 3, 4, 5, 5)]
    return {level: ssdet.enlarge(features[level], size if size % ssdet.GRID == 0 else ssdet.GRID)
            for level, size in zip(ssdet.LEVELS, sizes)}


class Products(ssdet.FusionFilter):
    """A filter with every product of its equation at once: B, C, T', L, h, w."""

    def forward(self, x, G, valid):
        a = self.at2(F.relu(self.at1(x.flatten(2)))).sigmoid().unflatten(2, (-1, 1, *x.shape[3:]))
        weight = a * (G * valid[..., None])[:, None, :, :, None, None]
        A = (x[:, :, :, None] * weight).sum(2) / (weight.sum(2) + 1e-6)   # (B, C, L, h, w)
        A = A.mean((3, 4), keepdim=True) if self.pool else A
        bias, scale = (second(F.relu(first(A.flatten(2)))).unflatten(2, A.shape[2:])
                       for first, second in ((self.fc1, self.fc2), (self.fc3, self.fc4)))
        return bias, scale.sigmoid() if self.alone else scale


def pretraining_loss(logits, mix):
    """Σ_m [Σ_bt γ_m CE(z_t, y_m)] / Σ_bt k_m"""
    loss = 0
    for y, weight, present in zip(mix.label, mix.weight, mix.present):
        ce = F.cross_entropy(logits.float(), y, reduction="none")
        loss = loss + (weight * ce).sum() / present.sum()
    return loss


def detection_loss(logits, label):
    """½ BCE(max_t P, max_t Y) + ½ BCE(P, Y), logits stretched to the labels."""
    logits = F.interpolate(logits.float(), label.shape[2], mode="linear", align_corners=False)
    bce = F.binary_cross_entropy_with_logits
    return (bce(logits.amax(2), label.amax(2)) + bce(logits, label)) / 2


PLAIN = {common.TemporalConv: nn.Conv3d, common.PointwiseConv: nn.Conv3d, replai.RepLAI: RepLAI,
         cpctrans.CPC: CPC, f2c_oops.Layer: Layer, f2c_oops.Encoder: Encoder,
         common.SplitBatchNorm: BatchNorm, ssdet.Mixing: Mixing, ssdet.Coarse: Coarse}
