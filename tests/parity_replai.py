"""Adapters of the parity tests for RepLAI: {family: function of a Case to its outputs}.

Weights reach the networks as a user's would: written as a released checkpoint and read back by
the function behind `--init`.
"""

import argparse
import functools
import math
import re
from unittest import mock

import numpy as np
import torch
from parity_tools import NUMBER, gradients, only, watch
from scipy.signal import peak_prominences
from torch import nn

import common
import replai


def backbone(case, network):
    """Map of each stage, global maximum, and the state, whose statistics training moves."""
    network, x = case.load(network).train(case.training()), case.input("x")
    for m in network.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = case.config.get("bn_momentum", m.momentum)
    stages = ("conv1", "conv2x", "conv3x", "conv4x", "conv5x")
    seen = watch(dict(zip(stages, network.children(), strict=True)))
    with torch.no_grad():
        last = network(x)
    return {**{k: maps[0] for k, maps in seen.items()}, "forward": last,
            "pool": last.amax(tuple(range(2, last.dim())), keepdim=True), **network.state_dict()}


def backbone_video(case):
    width = case.entries()["conv1.0.weight"][0]
    return backbone(case, common.R2Plus1D(width, case.config["depth"]))


def backbone_audio(case):
    return backbone(case, common.SpectrogramCNN(case.entries()["conv1.0.weight"][0]))


def replai_model(case):
    """The model of a criterion's state, filled as pre-training's `--init` fills it."""
    s = case.entries()
    deep = any(k.startswith("backbone.video.conv2x.1.") for k in s)
    depth, out_dim = case.config.get("depth", 18 if deep else 10), s["mlp.video_clr.2.weight"][0]
    model = replai.RepLAI(s["backbone.video.conv1.0.weight"][0], depth, out_dim)
    return case.load(model, replai.PRETRAIN_LAYOUTS, ("backbone.",))


def objective(case, model):
    """(total, AVC, AStC) losses of the case's clips and sounds; tau: the case's, or our default."""
    c = case.config
    tau = c["temperature"] if "temperature" in c else replai.parse_args([]).tau
    out = model(*case.input("video_l", "video_r", "audio"))
    avc = replai.avc_loss(out["z"], out["y"], tau)
    astc = replai.astc_loss(out["g_fwd"], out["g_bwd"], out["q"], replai.KAPPA)
    return c["clr_coeff"] * avc + c["aot_coeff"] * astc, avc, astc


def criterion(case):
    model = replai_model(case).train(case.training())
    maps = watch(model.backbone)
    total, avc, astc = objective(case, model)
    total.backward()
    return {"total_loss": total, "clr_loss": avc, "aot_loss": astc,
            "video_feature": maps["video"][0].amax((2, 3, 4), keepdim=True),
            "audio_map": maps["audio"][0], **gradients(model), **model.state_dict()}


def criterion_two_sgd_steps(case):
    """The optimiser's settings that the config lacks stand in the case's `what`."""
    c, words = case.config, "zero one two three four five six seven eight nine ten".split()
    decay = (c["weight_decay"] if "weight_decay" in c else
             case.told(rf"weight decay {NUMBER}", float))
    steps = c.get("steps") or case.told(r"(\w+) optimi[sz]er steps?", words.index)
    values, model = [], replai_model(case).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=c["lr_used"], momentum=c["momentum_used"],
                                weight_decay=decay)
    for _ in range(steps):
        total = objective(case, model)[0]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        values.append(total.item())
    return {"losses": np.array(values), **model.state_dict()}


def avc_gradients(inputs, tau):
    """loss, {grad:name of an input: its gradient}"""
    x = {k: v.requires_grad_() for k, v in inputs.items()}
    video_l, video_r, audio = only(x, "video_l", "video_r", "audio")
    loss = replai.avc_loss(torch.stack([video_l, video_r]), audio, tau)
    loss.backward()
    return loss.detach(), {f"grad:{k}": v.grad for k, v in x.items()}


def avc_process(shares, tau, rank):
    return avc_gradients(shares[rank], tau)


def loss_avc(case):
    """Of one process, or of each of several."""
    import running
    inputs, tau, world = case.inputs(), case.config["temperature"], case.config.get("world_size", 1)
    if world == 1:
        loss, grads = avc_gradients(inputs, tau)
        return {"loss": loss, **grads}
    shares = [{k: v for k, v in inputs.items() if f".rank{r}." in k} for r in range(world)]
    process, found = functools.partial(avc_process, shares, tau), {}
    for r, (loss, grads) in enumerate(running.processes(process, world, case.folder)):
        found |= {f"loss_rank{r}": loss, **grads}
    return found


def loss_astc(case):
    """g alone with the state's weights, then our `RepLAI.change` and AStC."""
    hidden, out_dim = case.entries()["mlp.aot_diff.0.weight"]
    model = nn.Module()
    model.mlp = nn.ModuleDict({"aot_diff": replai.head(out_dim, hidden, out_dim)})
    case.load(model)
    x = {k: v.requires_grad_() for k, v in case.inputs().items()}
    s_l, s_r, q = only(x, "video_l", "video_r", "audio")
    loss = replai.astc_loss(*replai.RepLAI.change(model, s_l, s_r), q, case.config["temperature"])
    loss.backward()
    return {"loss": loss, **{f"grad:{k}": v.grad for k, v in x.items()}, **gradients(model)}


def moi(case):
    c = case.config
    times, curve, bins = replai.find_moments(case.input().numpy(), c["sample_rate"],
                                             c["prominence"], c["distance_bins"])
    peaks = times[bins]
    kept = replai.admissible(peaks, c["segment_seconds"], c["delta_non_overlap"], c["clip_seconds"])
    return {"zscore_mean_over_frequency": curve, "number_of_bins": len(curve),
            "first_bin_seconds": times[0], "bin_step_seconds": times[1] - times[0],
            "all_peak_bins": bins, "all_peak_prominences": peak_prominences(curve, bins)[0],
            "kept_peak_seconds": peaks[kept]}


def spectrogram(case):
    """The script has one window, hop, number of bands and rate; the case's stand in for them."""
    c, x = case.config, torch.atleast_2d(case.input())                  # (channels, n)
    new, mono = c["audio_rate"], x.mean(0)
    resampled = replai.resample(mono, c["raw_sample_rate"], new)
    mel_power = functools.partial(replai.mel_power, n_fft=round(c["window_ms"] * new / 1000),
                                  hop=round(c["hop_ms"] * new / 1000), n_mels=c["n_mels"],
                                  sample_rate=new)
    power = mel_power(resampled)
    log = power.clamp(min=c["log_floor"]).log()
    picked = replai.subsample(log.shape[1], c["num_temporal_frames"])
    with (mock.patch.object(replai, "mel_power", mel_power),
          mock.patch.object(replai, "SOUND_RATE", new)):
        normalised = replai.log_mel(x, c["raw_sample_rate"], c["num_temporal_frames"], c["mean"],
                                    c["std"], c["log_floor"])
    return {"mono": mono[None], "resampled": resampled[None], "mel_power": power[None],
            "log": log[None], "permuted": log.T[None], "subsampled": log.T[None, picked],
            "normalised": normalised}


def mel_filterbank(case):
    c = case.config
    assert (c["scale"], c["norm"]) == ("htk", None), "only the HTK scale without area norm exists"
    bins = c.get("bins") or case.told(r"\[(\d+) bins")
    fbank = replai.mel_filterbank(bins, c["n_mels"], c["f_min"], c["f_max"])
    return {"fbank": fbank, "column_sums": fbank.sum(0),
            **{f"row_{i}": row for i, row in enumerate(fbank)}}


def subsample(case):
    return {"indices": replai.subsample(case.config["in"], case.config["out"])}


def pad_video(case):
    return {"indices": replai.sample_frames(0, case.config["have"], case.config["want"])}


def video_transform(case):
    """Crop and number of frames are our defaults where the case does not name them."""
    c, frames, args = case.config, case.input().numpy(), replai.parse_args([])
    named = re.search(r"centre crop (\d+)", case.what)
    crop = c.get("crop") or (int(named[1]) if named else args.crop)
    if "short_side_draw" in c:                                # training, with the case's draws
        sizes = [replai.short_side_to(c["width"], c["height"], c["short_side_draw"], swap)
                 for swap in (False, True)]
        size = tuple(c["size_after_scale_w_h"])
        assert size in sizes, f"scaled to {sizes[0]}, or {sizes[1]} as released, not to {size}"
        clip = replai.resize_crop_flip(frames, size, c["crop_x"], c["crop_y"], crop, c["flip"])
    else:
        clip = replai.center_crop(frames, crop, "nearest" if "NEAREST" in case.what else "bilinear")
    picked = replai.subsample(len(frames), c.get("num_frames") or args.num_frames)
    return {"clip": common.normalize(clip[None, :, picked], *common.IMAGENET)[0]}


def audio_window(case):
    rows = []
    for rate, total, _, start, stop in case.input("rows"):
        first, end = replai.audio_window(start, stop, rate, total)
        rows.append([first, end - 1, end - first])
    return {"recommended_first_last_length": rows}


def schedule_onecycle(case):
    lr, momentum = zip(*replai.one_cycle(case.config["max_lr"], case.config["total_steps"]))
    by_epoch = [{str(i): x for i, x in enumerate(values)} for values in (lr, momentum)]
    return {"lr": lr, "momentum": momentum,
            "lr_epochs": by_epoch[0], "momentum_epochs": by_epoch[1]}


def rates(stage, lr, epochs, **how):
    args = argparse.Namespace(stage=stage, lr=lr, epochs=epochs)
    return {"lr": [replai.learning_rate(args, i, 1, **how) for i in range(epochs)]}


def schedule(case):
    c = case.config
    if "warmup_steps" in c:
        return rates("recognition", c["base_lr"], c["total_steps"], warmup=c["warmup_steps"],
                     most=1)
    if c["cos"]:
        return rates("statechange", c["lr"], c["epochs"])
    return rates("linear", c["lr"], c["epochs"], milestones=[
        (m + 0.5) / c["epochs"] for m in c["milestones"]])


def linear_classifier(case):
    """The features stand in for f_V's map; with `normalize` the original makes signs of them."""
    features, classes = case.input().flatten(1), case.config["num_classes"]       # (N, D)
    probe = replai.LinearProbe(features.shape[1] // 8, verbs=classes["verb_class"],
                               nouns=classes["noun_class"])
    case.load(probe, replai.video_layouts("backbone."), ("fc.",))
    probe.backbone = nn.Unflatten(1, (features.shape[1], 1, 1, 1))
    if case.config["normalize"]:
        features = nn.functional.normalize(features[..., None], dim=-1)[..., 0]
    return dict(zip(("verb_class", "noun_class"), probe(features)))


def metric_topk(case):
    scores, labels = case.input("scores"), case.input("labels").numpy()
    return {f"top{k}": float(np.float32(replai.hits(scores, labels, k).sum())
                             * np.float32(100.0 / len(labels)))
            for k in range(1, scores.shape[1] + 1)}


def number_set(x):
    """{48, ..., 96} from "48..96", or from a list."""
    if isinstance(x, str):
        first, last = map(int, x.split(".."))
        return set(range(first, last + 1))
    return set(x)


def metric_epic_official(case):
    c = case.config
    scores = (x.numpy() for x in case.input("verb", "noun", "verb_class", "noun_class"))
    return replai.epic_metrics(*scores, case.input("participant"), number_set(c["tail_verbs"]),
                               number_set(c["tail_nouns"]), set(c["unseen_participants"]))


def recognition(case):
    """Logits, or probabilities where the original's switch TEST.NO_ACT is off."""
    c = case.config
    model = replai.Recognition(c["width"], c["depth"], c["num_classes"])
    out = case.load(model, replai.video_layouts("")).train(case.training())(case.input("x"))
    assert c["test_no_act"] or c["head_act"] == "softmax"
    return dict(zip(("verb", "noun"), out if c["test_no_act"] else [x.softmax(-1) for x in out]))


def lta_model(case):
    c, kind = case.config, case.config["aggregator"].removesuffix("Aggregator").lower()
    model = replai.Anticipation(
        c["width"], c["depth"], c["num_classes"], kind, c["multi_input_features"],
        c["encoder_layers"], c["encoder_heads"], c["input_clips"], c["Z"])
    case.load(model, replai.video_layouts("backbone.")).train(case.training())
    x = case.input("x")
    features = model.encode(x)
    verb, noun = model(x)
    return {"clip_features": features, "aggregated": model.clip_aggregator(features),
            "verb": verb, "noun": noun, "trainable_when_frozen": sorted(
                f"backbone.{k}" for k, p in model.backbone.named_parameters() if p.requires_grad)}


def lta_windows(case):
    """The later one more window is not ours; its count follows from ours."""
    c, (key,) = case.config, case.case["outputs"]
    rows = [[clip, seen, coming[0], coming[-1]] for clip, n in c["actions_per_clip"].items()
            for seen, coming in replai.action_windows(list(range(n)), c["inputs"], c["future"])]
    for clip, n in c.get("window_counts_with_the_later_plus_one", {}).items():
        assert n == 1 + sum(r[0] == clip for r in rows)
    return {key: rows}


def pnr_frame_sampling(case):
    """Numbers of frames, and the key frame as a training sample has it."""
    rows, keyframes = case.input("rows"), []
    for start, stop, n, pnr in rows:
        change = replai.Change("", None, [], 0.0, (start, stop), 1, -1 if pnr is None else pnr)
        with (mock.patch.object(replai, "random_part", lambda change, *_: change.frames),
              mock.patch.object(replai, "read_state", lambda *_: None)):
            made = replai.make_state(argparse.Namespace(num_frames=n), [change], 0, None)
        keyframes.append(int(made["keyframe"]) if made["has_keyframe"] else None)
    return {"frames": [replai.sample_frames(*row[:3]).tolist() for row in rows],
            "keyframe_index": keyframes}


def pnr_metrics(case):
    fps = case.told(r"\(end - start\) / (\d+)", text=case.config["fps"])
    keyframe, state = (x.flatten(1) for x in case.input("keyframe", "state"))
    changes = [replai.Change("", None, [], (stop - start) / fps, (start, stop),
                             int(pnr is not None), -1 if pnr is None else pnr)
               for start, stop, pnr in case.input("rows")]

    def metrics(rows):
        return replai.StateChange(1, 10).metrics(None, changes[rows], keyframe[rows], state[rows])
    whole = metrics(slice(None))
    errors = [metrics(slice(i, i + 1))["PNR err (s)"] for i in range(len(changes))]
    return {"accuracy": whole["StCC acc"] / 100, "keyframe_error_seconds": whole["PNR err (s)"],
            "keyframe_error_seconds_each": [None if math.isnan(e) else e for e in errors]}


def pnr_heads_and_losses(case):
    """The map comes in place of the frames."""
    c = case.config
    with mock.patch.object(common, "R2Plus1D", lambda *_, **__: nn.Identity()):
        model = replai.StateChange(c["channels"] // 8, crop=32 * c["map"])
    keyframe, state = case.load(model).eval()(case.input("map"))
    losses = model.losses((keyframe, state), {
        "state": torch.tensor(c["state_labels"]), "keyframe": torch.tensor(c["keyframe_index"]),
        "has_keyframe": torch.tensor(c["state_labels"]) > 0})
    return {"keyframe_logits": keyframe[:, None], "state_logits": state[:, :, None],
            "keyframe_probs": keyframe.softmax(1)[:, None],
            "state_probs": state.softmax(1)[:, :, None], "keyframe_loss": losses["keyframe"],
            "state_loss": losses["state"], "loss": sum(losses.values())}


def pnr_resize(case):
    image, (height, width) = case.input("img").numpy(), case.config["to"]
    out = replai.resize_crop_flip(image[None], (width, height), 0, 0, max(height, width), False,
                                  "tensor")
    return {"resized": out[:, 0].permute(1, 2, 0).float()}


def metric_aued(case):
    pred, label = case.input("preds").numpy(), case.input("labels").numpy()[..., 0]
    ed, area = replai.edit_metrics(pred, label)
    return {"ED": ed, "AUED": area}


def metric_transpositions(case):
    pairs = [(np.array(a), np.array(b)) for a, b in case.input("pairs")]
    return {"distance_over_Z": [replai.edit_metrics(a[None, :, None], b[None])[0][-1]
                                for a, b in pairs]}


ADAPTERS = {f.__name__: f for f in (
    backbone_video, backbone_audio, criterion, criterion_two_sgd_steps, loss_avc, loss_astc, moi,
    spectrogram, mel_filterbank, subsample, pad_video, video_transform, audio_window, schedule,
    schedule_onecycle, linear_classifier, metric_topk, metric_epic_official, recognition, lta_model,
    lta_windows, metric_aued, metric_transpositions, pnr_frame_sampling, pnr_metrics,
    pnr_heads_and_losses, pnr_resize)}
