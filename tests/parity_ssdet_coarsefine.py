"""Adapters of the parity tests for SSDet and Coarse-Fine: {family: function of a Case to outputs}.

Weights are written as a released checkpoint and read by `load_network`, the function behind
`--init`, or for parts of a network by `load_weights`. Random choices are the case's.
Numbers that a case tells in words alone, its own or another case's, are read from the words.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import re
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from parity_tools import gradients, recipe, runs, watch

import common
import ssdet_coarsefine as sc

FAIR_RATE = 2        # SlowFast's multigrid recipes read every second frame; no case tells it
WRITTEN = 1e-10      # rates and times are written rounded


# ---- reading a case ----------------------------------------------------------------------------

def values(name, shape):
    """Numbers of that name."""
    return torch.from_numpy(recipe.values(name, shape))


def above(case, text, x):
    """Labels by "... (value > 0.8) ..."."""
    return (x > case.told(r"value.*? > (-?[\d.]*\d)", float, text)).float()


def valid_mask(B, N, row, valid):
    """(B, N) of ones, but for the end of one row."""
    mask = torch.ones(B, N)
    mask[row, valid:] = 0
    return mask


def told_mask(case, text, B):
    """(B, N) by "ones except last sample valid for 13 of 20"."""
    valid, N = case.told(r"ones except last sample valid for (\d+) of (\d+)", text=text)
    return valid_mask(B, N, -1, valid)


def as_written(ours, theirs):
    """Our numbers, those of theirs that they round to."""
    if isinstance(theirs, list) and len(ours) == len(theirs):
        return [as_written(a, b) for a, b in zip(ours, theirs)]
    return theirs if isinstance(theirs, float) and abs(ours - theirs) <= WRITTEN else ours


# ---- weights -----------------------------------------------------------------------------------

def filled(case, model):
    """A whole network with the case's weights, for evaluation unless the case trains.

    Where the state is a hash of names and shapes, those of the model must fit it.
    """
    entries = case.entries()
    if not entries:
        entries = {k: list(x.shape) for k, x in model.state_dict().items()}
        lines = "\n".join(sorted(f"{k} {shape}" for k, shape in entries.items()))
        known = case.case["state"]["sha1_of_sorted_lines"]
        assert hashlib.sha1(lines.encode()).hexdigest() == known, "other tensors than the original"
    sc.load_network(model, case.checkpoint(case.state(entries)), strict=True)
    count = sum(p.numel() for p in model.parameters())
    assert count == case.config.get("parameters", count), f"{count} parameters"
    return model.train(not case.config.get("eval", True))


def part(case, model):
    """A part of a network with the case's weights."""
    return case.load(model, adapt=sc.convert_names).eval()


# ---- X3D and SlowFast --------------------------------------------------------------------------

def x3d_network(case):
    """Of the config, else as the words and the state say."""
    c, entries = case.config, case.entries()
    version = c.get("version") or case.told(r"X3D-(\w+)", str)
    heads = [v[0] for k, v in entries.items() if k in ("fc2.bias", "head.projection.bias")]
    task = c.get("task", "class" if "class task" in case.what else "loc")
    norm = functools.partial(common.SplitBatchNorm, splits=c.get("base_bn_splits", 1))
    return filled(case, common.X3D(version, c.get("n_classes") or heads[0], task == "loc", norm,
                                   dropout=c.get("dropout", 0.5)))


def x3d(case):
    model = x3d_network(case)
    seen = watch({k: model.get_submodule(k) for k in case.case["outputs"] if k != "logits"})
    with torch.no_grad():
        return {"logits": model(case.input()), **{k: v[0] for k, v in seen.items()}}


def fine_features(case):
    with torch.no_grad():
        return sc.fine_features(x3d_network(case), case.input())


def x3d_m_pooled_features(case):
    model, given = x3d_network(case), []
    model.fc1.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(case.input())
    return {"features": given[0]}


def x3d_m_train_step(case):
    model, (x, t) = x3d_network(case).train(), case.input("x", "t")
    (label,) = (above(case, v["built"], t) for v in case.case["inputs"].values() if "built" in v)
    logits = model(x)
    loss = F.binary_cross_entropy_with_logits(logits, label)
    loss.backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    common.merge_splits(model)
    with torch.no_grad():
        after = model.eval()(x)
    norms = [m for m in model.modules() if isinstance(m, common.SplitBatchNorm)]
    return {"logits": logits, "loss": loss, **gradients(model), **state,
            "aggregated_modules": len(norms),
            **{f"aggregated:{k}": v for k, v in model.state_dict().items()},
            "logits_eval_after_aggregate": after}


def sub_batch_norm(case):
    c, x = case.config, case.input()
    norm = part(case, common.SplitBatchNorm(c["num_features"], c["num_splits"]))
    for bn in (norm.bn, norm.split_bn):
        bn.eps, bn.momentum = c["eps"], c["momentum"]
    before = norm.bn.running_mean.clone()
    with torch.no_grad():
        y = norm.train()(x)
        common.merge_splits(norm)
        return {"y_train": y, "split_running_mean": norm.split_bn.running_mean,
                "split_running_var": norm.split_bn.running_var, "bn_running_mean_before": before,
                "bn_running_mean_after": norm.bn.running_mean,
                "bn_running_var_after": norm.bn.running_var, "y_eval": norm.eval()(x),
                "num_batches_tracked": [n.num_batches_tracked for n in (norm.bn, norm.split_bn)]}


def slowfast(case):
    """s2_fuse_slow: what the next stage is given; s5_slow: what a stage's last block makes."""
    c, entries, pathways = case.config, case.entries(), ("slow", "fast")
    depth = [len({k.split(".")[1] for k in entries if k.startswith(f"s{n}.pathway0_")})
             for n in range(2, 6)]
    width = entries["s1.pathway0_stem.conv.weight"][0]
    model = filled(case, common.SlowFast(c["n_classes"], False, width, depth, c["alpha"],
                                         c["beta_inv"]))
    found = {}
    for key in case.case["outputs"]:
        if at := re.fullmatch(r"s(\d)(_fuse)?_(slow|fast)", key):
            stage, block = (int(at[1]) + 1, 0) if at[2] else (int(at[1]), depth[int(at[1]) - 2] - 1)
            model.get_submodule(
                f"s{stage}.pathway{pathways.index(at[3])}_res{block}").register_forward_hook(
                lambda _, x, y, k=key, fused=at[2]: found.update({k: x[0] if fused else y}))
    slow, fast = case.input(*pathways)
    with torch.no_grad():
        logits = model(fast, slow)[..., 0]
    return {**found, "softmax": logits.softmax(1), "head_logits": logits[:, None, None, None]}


def fair_x3d(case):
    model = x3d_network(case)
    stages = [k for k in case.case["outputs"] if re.fullmatch(r"s\d", k)]
    seen = watch({k: model.get_submodule(f"layer{int(k[1]) - 1}") for k in stages})
    with torch.no_grad():
        logits = model(case.input())[..., 0]
    return {**{k: v[0] for k, v in seen.items()}, "logits": logits, "softmax": logits.softmax(1)}


# ---- Coarse-Fine -------------------------------------------------------------------------------

def coarse(case):
    """As released. Biases and scales of the fusion at the size that the original has them at."""
    c, want = case.config, case.case["outputs"]
    model = filled(case, sc.Coarse(c["version"], c["n_classes"], c["t_pool"],
                                   "mixed" if c["isMixing"] else "own", coarse_stride=1))
    named = {k: k.split("_")[0] for k in want if re.match(r"(layer|rw|mix)\d", k)}
    seen, given = watch({v: getattr(model, v) for v in named.values()}), []
    model.rw6.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    pooled = watch({"pool_1": model.pool_1})["pool_1"] if c["t_pool"] == "grid" else []
    features = dict(zip(sc.LEVELS, case.input(*sc.LEVELS)))
    (clip,) = (x for k, x in case.inputs().items() if "_feat_" not in k)
    valid = told_mask(case, case.what, len(clip))
    meta = torch.tensor(case.told(r"meta rows .*?: (\[\[.*?\]\])", json.loads))
    with torch.set_grad_enabled(bool(c["target"])):
        logits = model(clip, features, valid, meta[:, 0])
    found = {"logits": logits, "gaussians": given[0], "cdf": model.grid_times}
    if pooled:
        found["pooled"] = pooled[0][0]
    for key, name in named.items():
        found[key] = seen[name][0]
        if key != name:                                       # ... rw2_bias, rw2_scale
            found[key] = found[key][key.endswith("scale")]
            found[key] = sc.resize_maps(found[key], want[key]["shape"][-1])
    if "rw6_scale" in found and not model.rw6.sigmoid_scale:    # its sigmoid is in Coarse
        found["rw6_scale"] = found["rw6_scale"].sigmoid()
    if not c["target"]:
        return found
    mask = told_mask(case, c["target"], len(clip))
    frames = sc.resize_logits(logits, mask.shape[1], align_corners=False)
    drawn = values(case.told(r"values\(\"(\w+)\"", str, c["target"]), frames.shape)
    label = above(case, c["target"], drawn) * mask[:, None]
    loss, cls, loc = sc.detection_loss(frames, label, mask)
    loss.backward()
    return {**found, "per_frame_logits": frames, "loss": loss, "cls_loss": cls, "loc_loss": loc,
            **gradients(model)}


def weighted_sum(case, y):
    """The sum of y*w with the w that the words name."""
    return (y * values(case.told(r"w ?= ?values\(\"(\w+)\"", str), y.shape)).sum()


def grid_pool(case):
    pool, x = part(case, sc.GridPool(case.config["depth"], common.SplitBatchNorm)), case.input()
    y, c = pool(x.requires_grad_())
    weighted_sum(case, y).backward()
    return {"y": y, "cdf": c, "grad_x": x.grad, **gradients(pool)}


def times(q):
    """c by "[0, cumsum(softmax(...))]"."""
    return F.pad(q.softmax(1).cumsum(1), (1, 0))


def grid_unpool(case):
    q, x = case.input("q", "x")
    c, x = times(q).requires_grad_(), x.requires_grad_()
    y = sc.grid_unpool(x, c)
    weighted_sum(case, y).backward()
    return {"unpooled": sc.to_uniform_times(x, c), "upsampled": y, "grad_logits": x.grad,
            "grad_cdf": c.grad}


def interp1d(case):
    x, y, at = case.input("x", "y", "n")
    return {"y_new": sc.interpolate(x.sort(1).values, y, at)}


def gaussian(case):
    """Without Grid Pool as released, where coarse steps are as far apart as fine ones."""
    c, start = case.config, torch.tensor(case.config["meta"])[:, 0]
    valid = valid_mask(len(start), c["fine_steps"], 0, c["valid_of_first_sample"]).sum(1)
    at = times(case.input()) if c["grid"] else None
    return {"weights": sc.gaussian(start, valid, c["fine_steps"], at, c["T"], c["L"],
                                   coarse_stride=1)}


def fusion_filter(case):
    c, (x, g) = case.config, case.input("x", "g")
    level = part(case, sc.FusionFilter(c["d"], c["ch"], c["pool"], sigmoid_scale=not c["mixing"]))
    with torch.no_grad():
        found = level(x, torch.exp(-g ** 2), valid_mask(c["b"], c["tf"], 0, c["valid"]))
    return dict(zip(("bias", "scale"), found if c["pool"] else
                    (sc.resize_maps(m, c["h"]) for m in found)))


def fusion_mixing(case):
    out, channels, _ = case.entries()["conv_at.weight"]
    biases, scales = ([x for k, x in sorted(case.inputs().items()) if re.search(rf"_{kind}\d$", k)]
                      for kind in "bs")
    with torch.no_grad():
        bias, scale = part(case, sc.Mixing(channels, out))(biases, scales, case.config["h"])
    return {"bias": bias, "scale": scale}


# ---- volume augmentations ----------------------------------------------------------------------

def clips_of(case, x):
    """A Mixture of clips with the labels (sample index+1)*7."""
    plus, factor = case.told(r"\(sample index\+(\d+)\)\*(\d+)")
    label = (torch.arange(len(x)) + plus) * factor
    return sc.unmixed(x, label[:, None].expand(-1, x.shape[2]))


def choice(case):
    """{choice: tensor} of one augmentation, from a config."""
    keys = {"start": ("st", "starts"), "length": ("len", "lengths"), "partner": ("perm",)}
    return {k: torch.tensor(case.config[a]) for k, at in keys.items() for a in at
            if a in case.config}


def mixture(mix):
    return {"video": mix.x, "labels": mix.label, "gammas": mix.weight.expand(mix.label.shape),
            "masks": mix.present.expand(mix.label.shape)}


def fixed_choices(T, B):
    """With which the release augments its validation; ours does not augment."""
    i, length = torch.arange(B), torch.full((2, B), 3 * T // 4)
    start = torch.stack([torch.zeros_like(i), torch.full_like(i, T // 4)])
    return {"freeze": {"start": torch.where(i % 2 == 0, T // 8, 5 * T // 8),
                       "length": torch.full((B,), T // 4)},
            "mixup": {"start": start, "length": length, "partner": (i + B // 2 + 1) % B,
                      "extend": False},
            "sliding": {"partner": (i + B // 2 + 2) % B}}


def volume(case):
    """The drawn choices, or validation's fixed ones."""
    mix, name = clips_of(case, case.input()), case.id.split("_")[1]
    name = "sliding" if "sliding" in case.id else name
    c = choice(case) if case.config else fixed_choices(mix.x.shape[2], len(mix.x))[name]
    c |= {"extend": False} if "NOT extended" in case.what else {}
    found = mixture(sc.augment(mix, {name: c}))
    return {**found, "labels": found["labels"][0]} if name == "freeze" else found


def volume_aug_combo(case):
    """The choices are those of other cases."""
    x, logits = case.input("x", "logits")
    number, permutation = case.told(r"mixup case (\d+); cutmix permutation (\[.*?\])", json.loads)
    limit = case.told(r"<= ([\d.]*\d)", float)
    choices = {"freeze": choice(case.sibling("volume_freeze_train")),
               "mixup": choice(case.sibling(f"volume_mixup_train_{number}")),
               "sliding": {"partner": torch.tensor(permutation)}}
    on = [name for name, u in zip(choices, case.config["switches"]) if u <= limit]
    mix = sc.augment(clips_of(case, x), {name: choices[name] for name in on})
    loss, accuracy = sc.pretraining_loss(logits, mix)
    return {**mixture(mix), "loss": loss, "soft_correct": accuracy * mix.label[0].numel()}


# ---- losses and metrics ------------------------------------------------------------------------

def detection_loss(case):
    logits, t = case.input("logits", "t")
    (text,) = (v["built"] for v in case.case["inputs"].values() if "built" in v)
    mask = told_mask(case, text, len(logits))
    label = above(case, text, t) * mask[:, None]
    counted = torch.ones_like(mask) if "no mask" in case.what else mask
    total, cls, loc = sc.detection_loss(logits.requires_grad_(), label, counted)
    total.backward()
    return {"total": total, "cls": cls, "loc": loc, "grad_logits": logits.grad}


def ensemble_average(case):
    models = case.inputs().values()
    frames = sc.resize_logits(sum(models) / len(models), case.config["label_length"], False)
    return {"per_frame_logits": frames, "probs": frames.sigmoid()}


def label_rate_interpolation(case):
    x, n = case.input(), case.config["length"]
    return {"fine": sc.resize_logits(x, n, True), "coarse": sc.resize_logits(x, n, False)}


def apmeter(case):
    """The last class loses its positives where the words say that it has none."""
    scores, drawn = case.input("s", "t")
    target = drawn > case.told(r"target = value > (-?[\d.]*\d)", float)
    if any("last class has no positives" in c.what for c in case.others()):
        target[:, -1] = False
    weights = None
    if any(k.endswith("_w") for k in case.inputs()):
        weights = case.input("w")[:, 0].abs() + case.told(r"\|value\|\+([\d.]*\d)", float)
    ap = [sc.average_precision(s, y, weights) for s, y in zip(scores.T, target.T)]
    return {"ap": np.array(ap), "map": float(np.mean(ap))}


def apmeter_ties(case):
    lists = case.told(r"scores (\[.*?\]) targets (\[.*?\])", json.loads)
    return {"ap": [sc.average_precision(*map(torch.tensor, lists))]}


def charades_v1_localize(case):
    """Scores that a submission lacks are -inf."""
    count, submitted = case.config["frames_per_video"], case.config["submitted"]
    name, classes, digits, missing = case.told(
        r"values\(\"(\w+?)<v>_<j>\", \[(\d+)\]\).*?, (\d+)\), .*?missing rows (\[\[.*?\]\])", str)
    classes, missing = int(classes), json.loads(missing.replace("'", '"'))
    truth, scores = [], []
    for row in csv.DictReader(io.StringIO(case.input("ground_truth_csv"))):
        actions = [a.split() for a in row["actions"].split(";") if a]
        actions = [(int(c[1:]), float(a), float(b)) for c, a, b in actions]
        truth.append(sc.localization_labels(actions, float(row["length"]), classes, count))
        video = row["id"]
        scores.append(np.stack([
            np.full(classes, -np.inf) if video not in submitted or [video, j] in missing else
            np.round(values(f"{name}{video}_{j}", [classes]).double().sigmoid().numpy(),
                     int(digits)) for j in range(count)]))
    ap, mean, weighted = sc.charades_localize(truth, scores)
    present = np.flatnonzero(~np.isnan(ap))
    return {"present_classes": present, "ap_present": ap[present], "map_over_present": mean,
            "wap": weighted, "positives": int(np.sum(truth))}


def frames25_selection(case):
    n, want = case.config["valid"], case.case["outputs"]["official_indices"]
    return {"indices": sc.charades_frames(n, None, None, as_released=True),
            "official_indices": as_written(sc.localization_times(n).tolist(), want)}


# ---- schedules ---------------------------------------------------------------------------------

def late_state(step, bounds):
    """In the release a long cycle ends a step late, as a counter must exceed the bound."""
    return 3 if step in bounds[1:-1] else sc.long_state(step, bounds)


def cycle_batch_sampler(case):
    """The place in the short cycle counts from the iterator's start, that in the long cycle not."""
    c, base = case.config, case.told(r"base batch (\d+)")
    short = "short cycles not used" not in case.what
    batches = []
    for k in range(c["batches"]):
        state = late_state(c["start_iteration"] + k, c["schedule"])
        factor = sc.clip_shape(state, sc.short_state(k, state), 1, 1)[2]
        batches.append((state, base * sc.LONG_BATCH[state] * (factor if short else 1)))
    shown = max(len(r["first_batch_sizes"]) for r in case.case["outputs"]["runs"])
    found = [(state, [b for _, b in g]) for state, g in groupby(batches, lambda x: x[0])]
    return {"runs": [{"long_index": state, "batches": len(sizes),
                      "first_batch_sizes": sizes[:shown]} for state, sizes in found]}


def multigrid_clip_shapes(case):
    c, rows = case.config, []
    for state in (*range(len(sc.LONG_FRAMES)), -1):
        for place in sorted({sc.short_state(k, state) for k in range(12)}):
            shape = sc.clip_shape(state, place, c["sample_duration"], c["crop_size"])
            rows.append([state, place, *shape[:2]])
    return {"table": rows}


def lr(case):
    """[[rate, how many steps]], of two groups where the words name both."""
    c, want, found = case.config, case.case["outputs"]["lrs"], []
    for k in range(sum(n for _, n in want)):                  # steps 0 and 1 are not warmed up,
        x = sc.warmup_and_steps(k, c["lr"], c["milestones"], c["warmup"] if k > 1 else 0)
        if "schedule" in c:
            x *= sc.LONG_BATCH[late_state(k, c["schedule"])]
        both = [x, x * (1 if k > 1 else 0.1)]                 # then both groups have one rate
        found.append(float(f"{x:.12g}") if "schedule" in c else [float(f"{v:.12g}") for v in both])
    return {"lrs": as_written(runs(found), want)}


def fair_multigrid(case):
    """Splits stay as they were while batch norm is not split."""
    c, changes, splits = case.config, [], 1
    plan = sc.fair_schedule(c["steps"], c["max_epoch"], c["frames"], c["crop"], c["short_cycle"],
                            c["epoch_factor"])
    steps, lrs = sc.fair_rates(plan, c["gamma"])
    for start, (_, factor, frames, crop, _) in zip(steps, plan):
        batch = factor * c["batch"]
        parts = batch / c["num_gpus"] / 8                     # 8 samples share their statistics
        norm = "sub_batchnorm" if parts > 1 else "sync_batchnorm" if parts < 1 else "batchnorm"
        splits = int(parts) if parts > 1 else splits
        row = [batch, frames, crop, norm, splits, FAIR_RATE * (c["frames"] // frames)]
        if not changes or row != changes[-1][1:]:
            changes.append([start, *row])
    return {"schedule": [[falls, shape, end] for falls, *shape, end in plan],
            "steps": steps, "lrs": lrs, "max_epoch": plan[-1][-1], "changes": changes}


# ---- frames ------------------------------------------------------------------------------------

def spatial(case):
    """The picture is made as the words say."""
    c = case.config
    h, w, d, a, b, e, m, levels = case.told(
        r"image of (\d+)x(\d+) \(h x w\): pixel\[i,j,c\] = \(i\*i//(\d+) \+ (\d+)j \+ "
        r"(\d+)\*c\*i \+ (\d+)\*c\*\(j%(\d+)\)\) % (\d+)")
    i, j, channel = np.ogrid[:h, :w, :3]
    picture = (i * i // d + a * j + b * channel * i + e * channel * (j % m)) % levels
    if "scale" in c:
        box = sc.crop_box(w, h, c["scale"], c["tl_x"], c["tl_y"])
        flip = c["p"] < case.told(r"flip when p<([\d.]*\d)", float)
    else:
        box, flip = sc.center_box(w, h), False
    norms = {"kinetics": sc.KINETICS_NORM, "charades": sc.CHARADES_NORM}
    x = sc.cut(picture[None].astype(np.uint8), box, c["size"], flip)
    return {"pixels": x[:, 0].permute(1, 2, 0).float(),
            "tensor": common.normalize(x[None], *norms[c["norm"]])[0, :, 0]}


def temporal_crop(case):
    c = case.config
    frames = sc.kinetics_frames(c["n"], c["begin"], c["size"], c["gamma"], c["tstride"], c["span"])
    return {"frames": frames + 1, "begin_max": sc.max_start(c["n"], c["size"], 1)}


def kinetics_val_crops(case):
    c = case.config
    clips = sc.kinetics_crops(c["n"], c["size"], c["gamma"], c["crops"]) + 1
    return {"crops": [[x[0], x[-1], len(x)] for x in clips.tolist()],
            "step": (clips[1, 0] - clips[0, 0]) // c["gamma"]}


def ends(numbers):
    """[first, last, how many] of frames, from 1."""
    return [int(numbers[0]) + 1, int(numbers[-1]) + 1, len(numbers)]


def starts_from_one(n, span, stride):
    return [1, sc.max_start(n, span, stride) + 1]


def spans(case):
    """(longest coarse clip, fine clip in training, fine clip at test, step), in frames."""
    coarse, train, stride, test, _ = case.told(
        r"coarse clip up to (\d+) frames, fine clip up to (\d+)\*(\d+) .*?(\d+)\*(\d+)")
    return coarse, train * stride, test * stride, stride


def charades_sampling(case):
    """The length of SSDet's clips is told as that of their labels alone."""
    n, start = case.config["nf"], case.config["start"] - 1
    span, _, _, stride = spans(case)
    short = case.case["outputs"]["ssdet_train_label_len"]
    fine, whole = sc.video_frames(n, stride), sc.video_frames(n, stride, whole=True)
    return {"fine_train": ends(sc.clip_frames(n, start, min(n, span), stride)),
            "fine_train_label_len": min(n, start + min(n, span)) - start,
            "fine_draw": [starts_from_one(n, span, stride)],
            "fine_test": ends(fine[0]), "fine_test_label_len": fine[1],
            "ssdet_train": ends(sc.clip_frames(n, start, short, stride)),
            "ssdet_train_label_len": min(n, start + short) - start,
            "ssdet_draw": [starts_from_one(n, short + 1, 1)],
            "ssdet_test": ends(whole[0]), "ssdet_test_label_len": whole[1]}


def two_stream_sampling(case):
    c, n = case.config, case.config["nf"]
    span, fine_span, _, stride = spans(case)
    starts = [c["start"] - 1, c["start_g"] - 1]
    fine, offset = sc.fine_frames(n, starts[0], fine_span, stride, starts[1])
    test_fine, test_offset = sc.fine_frames(n, 0, fine_span, stride)
    draws = [starts_from_one(n, s, stride) for s in (span, fine_span)]
    draws[1][1] = min(c["start"], draws[1][1])
    return {"train_coarse": ends(sc.clip_frames(n, starts[0], min(n, span), stride)),
            "train_fine": ends(fine),
            "train_meta": [offset, min(n, span) // stride, n // stride, 1],
            "train_label_lens": [min(n, a + min(n, s)) - a
                                 for a, s in zip(starts, (span, fine_span))],
            "draws": draws, "test_coarse": ends(sc.video_frames(n, stride, whole=True)[0]),
            "test_fine": ends(test_fine), "test_meta": [test_offset, *[n // stride] * 2, 1]}


def frame_labels(case):
    c = case.config
    entry, n = case.told(r"labels from (\{.*\}) with (\d+) frames", json.loads)
    actions = [(k - c["index_base"], a, b) for k, a, b in entry["actions"]]
    labels = sc.frame_labels(actions, n, entry["duration"], c["num_classes"])
    at = {k: np.flatnonzero(row) for k, row in enumerate(labels) if row.any()}
    return {"rows": {str(k): [x[0], x[-1], len(x)] for k, x in at.items()},
            "total": labels.sum()}


def inference_chunks(case):
    """The release's last piece, where it is empty, is none of ours."""
    T, limit = case.config["sampled_frames"], case.config["limit"]
    pieces = sc.chunks(T, limit)
    empty = len(pieces) > 1 and T % limit == 0
    return {"chunks": [[a, b, a] for a, b in [*pieces, *[(T, T)] * empty]],
            "last_chunk_empty": empty}


def collate_coarse(case):
    """Clip i is filled with i + 1, as the sum of the clips tells; the words do not."""
    rows = re.findall(r"\((\d+), (\d+), (\d+)\)", case.what)
    colours, _, *shape = case.case["outputs"]["clips"][2:]
    classes = case.case["outputs"]["labels"][1]
    args = argparse.Namespace(features=case.folder, feature_cap=case.config["cap"])
    items = []
    for i, (frames, labels, steps) in enumerate(tuple(map(int, row)) for row in rows):
        for level, channels in zip(sc.LEVELS, common.X3D().widths):
            (case.folder / level).mkdir(exist_ok=True)
            torch.save(torch.ones(1, channels, steps, sc.GRID, sc.GRID),
                       case.folder / level / f"clip{i}")
        items.append({"clip": torch.full((colours, frames, *shape), i + 1), "start": 0,
                      "label": torch.ones(classes, labels, dtype=torch.uint8),
                      **sc.read_features(args, f"clip{i}")})
    batch = sc.collate(items)
    (level,) = (k.removeprefix("feat_") for k in case.case["outputs"] if k.startswith("feat_layer"))
    return {"clips": [len(rows), 1, *batch["clip"].shape[1:]],
            "labels": list(batch["label"].shape),
            "label_mask_sums": batch["label_mask"].sum(1).tolist(),
            f"feat_{level}": list(batch[level].shape),
            "feat_mask_sums": batch["conv5_mask"].sum(1).tolist(),
            "clip_sum": float(batch["clip"].sum())}


ADAPTERS = {f.__name__: f for f in (
    x3d, x3d_m_pooled_features, x3d_m_train_step, fine_features, sub_batch_norm, slowfast, fair_x3d,
    coarse, grid_pool, grid_unpool, interp1d, gaussian, fusion_filter, fusion_mixing, volume,
    volume_aug_combo, detection_loss, ensemble_average, label_rate_interpolation, apmeter,
    apmeter_ties, charades_v1_localize, frames25_selection, cycle_batch_sampler,
    multigrid_clip_shapes, lr, fair_multigrid, spatial, temporal_crop, kinetics_val_crops,
    charades_sampling, two_stream_sampling, frame_labels, inference_chunks, collate_coarse)}
