"""Adapters of the parity tests for F2C and F2C2V: {family: function of a Case to its outputs}.

Weights are written as a released checkpoint and read by the function behind `--init`. Random
choices are dealt out to the functions that draw them, in the order in which the release drew them.
Constants that a case tells in words alone are read from its words.
"""

import functools
import math
import re
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from parity_tools import own_names, parameters_of, runs, watch
from torch.nn.utils.rnn import pad_sequence

import common
import f2c_oops
from f2c_oops import FPS, PAD


class Dealt:
    """A random generator that deals out a case's choices, each within what may be drawn."""

    def __init__(self, numbers, choices=None, offsets=(), permutations=()):
        self.numbers, self.offsets = list(numbers), list(offsets)
        self.choices = self.numbers if choices is None else list(choices)
        self.permutations, self.offered = list(permutations), []

    def integers(self, low, high=None, size=None):
        low, high = (0, low) if high is None else (low, high)
        x = self.numbers.pop(0) if size is None else self.offsets.pop(0)
        assert np.size(x) == (size or 1) and low <= np.min(x) and np.max(x) < high, (x, low, high)
        return x if size is None else np.array(x)

    def choice(self, of):
        x = self.choices.pop(0)
        self.offered.append(list(range(of) if isinstance(of, int) else of))
        assert x in self.offered[-1], (x, of)
        return x

    def permutation(self, n):
        x = self.permutations.pop(0)
        assert sorted(x) == list(range(n)), (x, n)
        return np.array(x)

    def used_up(self):
        return not (self.numbers or self.choices or self.offsets or self.permutations)


def check_drawn(case, draw):
    """The case's words, "drawn uniformly from a..b", against what draw(rng) draws last."""
    limits = []

    def highest(low, high=None):
        limits[:] = (0, low - 1) if high is None else (low, high - 1)
        return limits[1]
    draw(mock.Mock(integers=highest))
    assert limits == case.told(r"drawn uniformly from (\d+)\.\.(\d+)")


def pad(rows):
    """One tensor of the rows, the shorter ones followed by -1, as in the release."""
    return pad_sequence([torch.as_tensor(x) for x in rows], batch_first=True, padding_value=PAD)


# ---- weights -----------------------------------------------------------------------------------

def config_of(case):
    """Its config, and that of the case whose model it has."""
    return {**case.sibling(case.config.get("same_model_as", case.id)).config, **case.config}


def network(kind, case, state=None, **options):
    """F2C or F2C2V of the case's sizes and weights, in evaluation mode."""
    c = config_of(case)
    (window,) = set(c["attention_window"])
    model = kind(c["embed_dim"], c["num_classes"], c["mlp_dim"], layers=c["num_hidden_layers"],
                 heads=c["num_attention_heads"], window=window, ff=c["intermediate_size"],
                 positions=c["max_positions_embedding"], **options)
    return case.load(model, [f2c_oops.RELEASED], state=state).eval()


def check_size(case, model, rules=f2c_oops.RELEASED):
    """The original's number of parameters: ours and those that we have no place for."""
    c, ours = case.config, sum(p.numel() for p in model.parameters())
    names = own_names(case, [rules], model.state_dict())
    spare = sum(math.prod(shape) for k, shape in parameters_of(case.entries()).items()
                if k not in names)
    for n, key in ((ours + spare, "n_parameters"), (ours, "n_parameters_without_lin_projector")):
        assert n == c.get(key, n), f"{n} parameters, {key} {c[key]}"


# ---- encoder -----------------------------------------------------------------------------------

def frame_level(case):
    """(F2C of the case, lengths): a case that says `pure_nr_frames` is as released."""
    c = config_of(case)
    as_released = c.get("pure_nr_frames") is not None
    lengths = c["pure_nr_frames"] if as_released else c.get("lengths")
    model = network(f2c_oops.F2C, case, as_released=as_released)
    return model, None if lengths is None else torch.tensor(lengths)


def vtn(case):
    """The rows of all tokens come by attention in blocks, the others by the whole."""
    model, lengths = frame_level(case)
    check_size(case, model)
    x, whole = case.input(), f2c_oops.local_attention
    with torch.no_grad():
        found = {"features": model.frame_encoder(x, lengths), "logits": model(x, lengths)}
        model.frame_encoder.all_rows = True
        with mock.patch.object(f2c_oops, "local_attention", lambda *a: whole(*a, chunk=7)):
            tokens = model.frame_encoder(x, lengths)
    hidden = int(model.frame_encoder.as_released)             # of the frames
    seen = None if lengths is None else lengths - hidden
    return {**found, "tokens": tokens if seen is None else torch.cat(
        [rows[:1 + n] for rows, n in zip(tokens, seen.tolist())])}


def vtn_gradients(case):
    model, lengths = frame_level(case)
    return gradients(case, model, case.input(), lengths)


def gradients(case, model, *x):
    """Of the loss, under the original's names; None where there is none or no such parameter.

    zero_or_none: the names of those without, or with zeros alone.
    """
    total, number = f2c_oops.cross_entropy(model(*x), torch.tensor(case.config["labels"]))
    loss = total / number
    loss.backward()
    names = own_names(case, [f2c_oops.RELEASED], model.state_dict())
    ours = dict(model.named_parameters())
    found = {k: ours[names[k]].grad if k in names else None for k in parameters_of(case.entries())}
    return {"loss": loss, **{f"grad:{k}": g for k, g in found.items()}, "zero_or_none": [
        k for k, g in found.items() if g is None or not g.any()]}


def vtn_receptive_field(case):
    model, lengths = frame_level(case)
    x, least = case.input(), case.told(r"more than (\d[\d.e-]*)", float)
    seen = watch({"first": model.frame_encoder.layers[0]})["first"]
    model.frame_encoder.all_rows = True
    with torch.no_grad():
        before = model.frame_encoder(x, lengths)
        x[:, -1] *= -1
        after = model.frame_encoder(x, lengths)

    def changed(a, b):
        return ((a - b)[0].abs().amax(1) > least).nonzero().flatten()
    return {"rows_changed_after_layer_1": changed(*seen), "rows_changed_at_end":
            changed(before, after)}


# ---- two levels --------------------------------------------------------------------------------

def order_of(counts):
    """(B, N): the rows of a pool that each video consists of, one video after another, then PAD."""
    return pad(torch.arange(sum(counts)).split(counts))


def pool_of(case):
    """(all clips one after another, which of them each video consists of)"""
    counts = case.config["clips_per_video"]
    return torch.cat([clips[:n] for clips, n in zip(case.input(), counts)]), order_of(counts)


def two_level(case):
    (clips, order), as_released = pool_of(case), "as_released" in case.id
    video, each = (network(f2c_oops.F2C2V, case, as_released=as_released, per_clip=per_clip)
                   for per_clip in (False, True))
    prefix = "local_model."
    local = network(f2c_oops.F2C, case, as_released=as_released, state={
        k.removeprefix(prefix): x for k, x in case.state().items() if k.startswith(prefix)})
    with torch.no_grad():
        z = video.frame_encoder(clips)
        return {"clip_features": z, "clip_logits_single_scale": local(clips),
                "stacked": f2c_oops.gather_clips(z, order), "video_logits": video(clips, order),
                "per_clip_logits": each(clips, order)[order != PAD]}


def stage2_loss(case):
    clips, order = pool_of(case)
    model = network(f2c_oops.F2C2V, case, as_released=True)
    found = gradients(case, model, clips, order)
    return {**found, "local_model_params_with_grad": [
        k for k in parameters_of(case.entries()) if k.startswith("local_model.")
        and found[f"grad:{k}"] is not None]}


def stage3_weighted_ce(case):
    (clips, order), c = pool_of(case), case.config
    model = network(f2c_oops.F2C2V, case, as_released=True, per_clip=True)
    with torch.no_grad():
        q = model(clips, order)
    weighted, plain = (f2c_oops.cross_entropy(q, pad(c["labels"]), weights)
                       for weights in (torch.tensor(c["class_weights"]), None))
    return {"logits": q[order != PAD], "loss_weighted": weighted[0] / weighted[1],
            "loss_unweighted": plain[0] / plain[1]}


def crf(case):
    """Emissions past a video's length are left as drawn: they must not matter."""
    n, y = torch.tensor(case.config["lengths"]), pad(case.config["tags"])
    q = case.input()[:, :max(n)]
    model = case.load(f2c_oops.CRF(q.shape[2]))
    nll, marginals = model.nll(q, y, n), model.marginals(q, n)
    return {"nll_per_video": nll, "nll_sum": nll.sum(), "nll_mean": nll.mean(),
            "viterbi": [row[:k].tolist() for row, k in zip(model.viterbi(q, n), n)],
            "marginals": torch.cat([p[:k] for p, k in zip(marginals, n.tolist())])}


def restack(case):
    order = order_of(case.config["clips_per_video"])
    return {"stacked": f2c_oops.gather_clips(case.input(), order),
            "lengths": (order != PAD).sum(1)}


# ---- transformations ---------------------------------------------------------------------------

def t1_speed(case):
    size, rows, speeds = case.told(r"crop (\d+)"), [], []
    highest = mock.Mock(integers=lambda high: high - 1)
    for c in case.config["cases"]:
        left = len(range(0, c["T"], c["skip"]))
        last = max(0, left - size) // case.told(r"floor\(\(n-\d+\)/(\d+)\)")
        assert f2c_oops.crop_frames(highest, max(left, size), size)[0] == last
        starts = [c["start"]] if left > size else []
        rows.append(f2c_oops.speed_up(Dealt(starts), c["T"], c["label"], size))
        speeds.append(f2c_oops.max_speed(c["T"], size))
    return {"frames": rows, "max_speed": speeds}


def t1_shuffle(case):
    return {"frames": [f2c_oops.shuffle(Dealt([c["start"]], permutations=[c["perm"]]), c["T"],
                                        len(c["perm"]) + 1, as_released=True)
                       for c in case.config["cases"]]}


def t1_double_flip(case):
    size = case.told(r"Crop (\d+)")
    longest = max(c["T"] for c in case.config["cases"])
    check_drawn(case, lambda rng: f2c_oops.double_flip(rng, longest, size))
    return {"frames": [f2c_oops.double_flip(Dealt([c["start"], c["offset"]]), c["T"], size)
                       for c in case.config["cases"]]}


def t1_random_point(case):
    """The places of both clips stand in words: "normal crop = entries 0..19, ..."."""
    normal, fast = (np.arange(int(a), int(b) + 1)
                    for a, b in re.findall(r"entries (\d+)\.\.(\d+)", case.what))
    check_drawn(case, lambda rng: f2c_oops.random_speed_point(rng, normal, fast))
    return {"frames": [f2c_oops.random_speed_point(Dealt([offset]), normal, fast)
                       for offset in case.config["offsets"]]}


def t1_warp(case):
    size, rows = case.told(r"first (\d+) entries"), []
    for c in case.config["cases"]:
        assert f2c_oops.max_speed(c["T"], size) == c["max_speed"]
        rng = Dealt([c["start"]], offsets=[c["offsets"]], permutations=[c["perm"]])
        rows.append(f2c_oops.warp(rng, c["T"], size, as_released=True))
    return {"frames": rows}


def t1_collate(case):
    """The release draws one more number for each video, first, and both kinds of warp."""
    c, names = case.config, f2c_oops.CLIP_TRANSFORMS
    size = case.told(r"length <= (\d+) are skipped")
    rng = Dealt(c["integers"], None, c["warp_offsets"], c["permutations"])
    labels, rows = [], []
    for x in case.in_order():
        if len(x) > size:
            rng.numbers.pop(0)
            made = f2c_oops.transform_clips(rng, len(x), names, size, as_released=True)
            unused = rng.permutations if f2c_oops.max_speed(len(x), size) > 1 else rng.offsets
            unused.pop(0)                                     # it warps by steps or by an order
            for name, frames in made:
                labels.append(names.index(name))
                rows.append(x[frames])
    assert rng.used_up()
    return {"labels": labels, "pure_nr_frames": [len(x) for x in rows], "features": pad(rows)}


def t2_transforms(case):
    c, size = case.config, case.told(r"clips of (\d+)")
    rng = Dealt([], [c["double_flip_split"], c["warp_split"]], (), [c["shuffle_perm"]])
    made = dict(f2c_oops.transform_video(rng, c["T"], f2c_oops.VIDEO_TRANSFORMS, size))
    assert rng.offered == [c["split_choices"]] * 2
    theirs = {"point": "random_point", "flip": "double_flip"}
    return {**{theirs.get(k, k): clips[:, 0] for k, clips in made.items()},
            "double_flip_split_clip": made["flip"][c["double_flip_split"] // size],
            "warp_all_first": made["warp"][0]}


def t2_collate(case):
    """The release draws two numbers for a video that it does not speed up, and one for others."""
    c, names = case.config, f2c_oops.VIDEO_TRANSFORMS
    rng = Dealt(c["integers"], c["splits_double_flip_then_warp_per_video"], (), c["permutations"])
    labels, rows = [], []
    for x in case.in_order():
        left = len(rng.numbers)
        made = f2c_oops.transform_video(rng, len(x), names, as_released=True)
        left -= 1 if "speed" in dict(made) else 2
        del rng.numbers[:len(rng.numbers) - left]
        labels += [names.index(name) for name, _ in made]
        rows += [x[clips] for _, clips in made]
    assert rng.used_up()
    return {"labels": labels, "clips": [len(x) for x in rows], "features": pad(rows)}


# ---- clips, labels -----------------------------------------------------------------------------

def cut(video, step):
    """(frames, spans) of a video's clips."""
    stamps = [float(i * video["pts_step"] * Fraction(video["time_base"]))
              for i in range(video["n_frames"])]
    return f2c_oops.cut_clips(video["n_frames"], Fraction(video["fps"]), stamps, step / FPS)


def note(video):
    return f2c_oops.Annotation(sorted(video["t"]), video["len"], sorted(video["rel_t"]))


def labels_of(video, step, part, level):
    """As released; none for a video that has no labels."""
    if not f2c_oops.has_labels(note(video), part, level):
        return np.zeros(0, dtype=np.int64)
    return f2c_oops.video_labels(cut(video, step)[1], note(video).t[1], as_released=True)


def clip_labels(case):
    found = {}
    for key in case.case["outputs"]:
        part, step = re.fullmatch(r"(train|val)_step(\d+)", key).groups()
        found[key] = {}
        for v in case.config["videos"]:
            y = labels_of(v, int(step), part, "video")
            found[key][v["name"]] = {"n_clips": len(y), "labels_run_length": runs(y)}
    return found


def clip_frames(case):
    """Times are the release's, which has none where the rate is a multiple of the grid's."""
    step = case.told(r"\(step (\d+)\)")
    videos = {v["name"]: v for v in case.config["videos"]}
    clips = {k: cut(v, step) for k, v in videos.items()}
    rows = [(r["video"], r["clip"]) for r in case.config["rows"]]
    crash = {k for k, v in videos.items() if Fraction(v["fps"]) % FPS == 0}
    return {"frames_intended": [clips[k][0][i].tolist() for k, i in rows], "times": [
        [None, None] if k in crash else clips[k][1][i].tolist() for k, i in rows]}


def anticipation_labels(case):
    step, found = case.told(r"step (\d+)"), {}
    usable = [v for v in case.config["videos"] if f2c_oops.has_labels(note(v), "train", "video")]
    for ahead in case.case["outputs"]["expected"]["exact"]:
        found[ahead] = {}
        for v in usable:
            spans = cut(v, step)[1]
            args = SimpleNamespace(anticipate=float(ahead), as_released=True)
            shown, labels = f2c_oops.labels_of(args, spans, note(v).t[1], step / FPS)
            assert shown.tolist() == list(range(len(spans)))
            found[ahead][v["name"]] = labels.tolist()
    return {"expected": found}


def anticipation_official(case):
    """The case tells the labels, not the times that they come from."""
    c, y = case.config, np.array(case.config["labels"])
    with mock.patch.object(f2c_oops, "video_labels", lambda *_: y):
        args = SimpleNamespace(anticipate=c["A"], as_released=True)
        shown, labels = f2c_oops.labels_of(args, np.zeros((len(y), 2)), 0.0, c["step_seconds"],
                                           "oops")
    return {"pairs": [[int(i), int(k)] for i, k in zip(shown, labels, strict=True)]}


def balanced(case):
    step, found = case.told(r"\(step (\d+)\)"), {}
    for v in case.config["videos"]:
        labels = labels_of(v, step, "train", "clip")
        picked = f2c_oops.balance_labels(labels, np.random.default_rng(0)) if len(labels) else []
        assert set(picked) == set(range(len(labels))), "a clip was left out"
        found[v["name"]] = runs(labels[picked]) if len(labels) else []
    return {"labels_run_length": found}


# ---- metrics, schedule -------------------------------------------------------------------------

def localization(case):
    data = case.sibling(case.config.get("same_data_as", case.id))
    c, prob = data.config, data.input().softmax(1)[:, 1].numpy()
    spans, video = np.stack([c["start_times"], c["end_times"]], 1), np.array(c["video_index"])
    times = [f2c_oops.predicted_time(prob[video == i], spans[video == i])
             for i in range(len(c["t"]))]
    counted = [f2c_oops.has_labels(f2c_oops.Annotation(sorted(t), math.inf, sorted(rel_t)),
                                   "train", "video")          # the lengths are not told
               for t, rel_t in zip(c["t"], c["rel_t"])]
    errors = [f2c_oops.time_error(x, t) for x, t, n in zip(times, c["t"], counted) if n]
    within = {k: float(k.removeprefix("accuracy_")) for k in case.case["outputs"]
              if k.startswith("accuracy_")}
    found = f2c_oops.localization_metrics(errors, [*within.values()])
    return {"predicted_times": times, "videos_counted": len(errors),
            **{k: found[f"within_{t:g}s"] / 100 for k, t in within.items()},
            "mean_abs_error": found["mean_error_s"], "median_abs_error": found["median_error_s"],
            "std": found["std_error_s"]}


def classification_accuracy(case):
    logits = case.input()
    scores = torch.cat([logits.softmax(1), logits.argmax(1, keepdim=True)], 1)
    found = f2c_oops.classification_metrics([case.config["labels"]], [scores], f2c_oops.LABELS)
    return {"top1": found["top1"] / 100, "per_class": [found[n] / 100 for n in f2c_oops.LABELS]}


def regression(case):
    assert case.told(r"<= ([\d.]+) s", float) == 1.5
    relative, length = (torch.tensor(case.config[k]) for k in ("rel_t", "len"))
    label = torch.stack([relative * length, length], 1)
    with mock.patch.object(common, "sum_processes", lambda x: x):         # there is one
        found = f2c_oops.regression_terms(case.input()[:, None], label)
    return {"loss": found["loss"], "accuracy": found["top1"] / 100}


def lr_schedule(case):
    """Where the original shows some epochs, without their numbers: those with the nearest rates."""
    c, want = case.config, case.case["outputs"]["lr"]["exact"]
    rates = np.array([f2c_oops.learning_rate(c["base"], e, c["epochs"], c["end"])
                      for e in range(c["epochs"])])
    if len(want) < len(rates):
        epochs = [int(np.abs(rates - x).argmin()) for x in want]
        assert epochs[0] == 0 and (np.diff(epochs) > 0).all(), f"epochs {epochs}"
        rates = rates[epochs]
    return {"lr": rates}


# ---- frames, backbones -------------------------------------------------------------------------

def clip_transform(case):
    frames, (crop,) = case.input().clamp(0, 255).byte(), set(case.config["crop"])
    return {"clip": f2c_oops.resize_clip(frames, case.config["resize"], crop).transpose(0, 1)}


def frame_normalise(case):
    return {"frames": f2c_oops.normalize(case.input().clamp(0, 255).byte(), *f2c_oops.HALF)}


def features(case, model, rules=()):
    setattr(model, "heads" if hasattr(model, "heads") else "fc", torch.nn.Identity())
    case.load(model, [rules])
    check_size(case, model, rules)
    with torch.no_grad():
        return {"features": model.eval()(case.input())}


def backbone(name, case):
    return features(case, f2c_oops.make_feature_network(name))


def vit(case):
    """Of the sizes that the case tells, else ViT-B/16."""
    from torchvision.models import VisionTransformer
    c = case.config
    if "embed_dim" in c:
        ff, dim = case.entries()["blocks.0.mlp.fc1.weight"]
        sizes = c["img_size"], c["patch_size"], c["depth"], c["num_heads"]
        model = VisionTransformer(*sizes, dim, ff)
    else:
        model = f2c_oops.make_feature_network("vit_b16")
    return features(case, model, f2c_oops.TIMM_NAMES)


def r2plus1d_bottleneck(case):
    return features(case, f2c_oops.bottleneck_r2plus1d(case.config["layers"]))


ADAPTERS = {f.__name__: f for f in (
    vtn, vtn_gradients, vtn_receptive_field, two_level, stage2_loss, stage3_weighted_ce, crf,
    restack, t1_speed, t1_shuffle, t1_double_flip, t1_random_point, t1_warp, t1_collate,
    t2_transforms, t2_collate, clip_labels, clip_frames, anticipation_labels, anticipation_official,
    balanced, localization, classification_accuracy, regression, lr_schedule, clip_transform,
    frame_normalise, vit, r2plus1d_bottleneck)}
ADAPTERS |= {name: functools.partial(backbone, name)
             for name in ("resnet18", "resnet50", "r2plus1d_18", "r3d_18")}
