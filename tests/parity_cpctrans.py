"""Adapters of the parity tests for CPCTrans: {family: function of a Case to its outputs}.

Weights reach the networks as a user's would: written as a released checkpoint, described and
loaded by the functions behind `--init`. Frames reach them through `TrainClips` and `TestClips`,
whose random numbers are replaced by the case's draws. Parts that the original registers and never
calls are missing in ours; where an output counts them, ours are counted together with what the
file's state holds that our loader leaves unused.
"""

import itertools
import re
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from parity_tools import Tensorised, watch
from torch import nn

import common
import cpctrans
from cpctrans import BRIGHTNESS, CONTRAST, HUE, SATURATION

OPERATIONS = {"b": BRIGHTNESS, "c": CONTRAST, "s": SATURATION, "h": HUE}
CELLS = cpctrans.LAYOUTS[1:]                                  # how the release names its tensors


class Draws:
    """A random generator that deals out given draws, again and again, per method."""

    def __init__(self, **queues):
        self.queues = {k: itertools.cycle(v) for k, v in queues.items()}

    def __getattr__(self, method):
        def draw(*args, **kwargs):
            x = next(self.queues[method])
            return x(*args, **kwargs) if callable(x) else x
        return draw


# ---- weights and networks ----------------------------------------------------------------------

def released(case, within="", blank=False):
    """The case's state as a checkpoint of the release, its names put behind `within`.

    blank: names and shapes alone.
    """
    state = {k: torch.zeros(()).expand(shape) for k, shape in case.entries().items()}
    state = {within + k: v for k, v in (state if blank else case.state()).items()}
    parallel = "final_fc.1.weight" in state or any(v.dim() == 5 for v in state.values())
    state = {"module." * parallel + k: v for k, v in state.items()}
    path = case.folder / "model_best_epoch7.pth.tar"
    torch.save({"epoch": 8, "net": "resnet18", "state_dict": state, "best_acc": np.float64(0.25),
                "optimizer": {"state": {}, "param_groups": []}, "iteration": 99}, path)
    return path


def part(case, module, within, own):
    """Load a bare sub-module, called `within...` in the release and `own...` in our network."""
    holder = module
    for name in reversed(own.rstrip(".").split(".")):
        holder = nn.ModuleDict({name: holder})
    common.load_weights(holder, released(case, within), cpctrans.LAYOUTS, "", cpctrans.SPARE)
    return module.eval()


def arguments(case, path=None, *flags):
    """Flags as of a command that starts from that checkpoint, those of the case included."""
    c = case.config
    stage = "finetune" if "final_fc.1.weight" in case.entries() else "pretrain"
    given = {"heads": c.get("heads"), "num_seq": c.get("num_seq"), "seq_len": c.get("seq_len"),
             "pred_step": c.get("pred_step"), "ds": c.get("ds"), "img_dim": c.get("img_dim")}
    argv = ["--stage", stage, "--init", str(path or "none"), "--out", str(case.folder / "run")]
    argv += [str(x) for k, v in given.items() if v is not None for x in (f"--{k}", v)]
    args = cpctrans.parse_args([*argv, *flags])
    cpctrans.fill_from(args, path)
    return args


def whole(case):
    """(args, network): pre-training's, or the classifier where the state has a last layer."""
    path, entries = released(case), case.entries()
    untracked = not any(k.endswith("running_mean") for k in entries)
    args = arguments(case, path, *("--compat", "released") * untracked)
    last = entries.get("final_fc.1.weight")
    model = cpctrans.Classifier(args, last[0]) if last else cpctrans.CPC(args)
    cpctrans.initialise(model, path, everything=True)
    net, layers = case.config.get("net"), case.config.get("transformer_layers")
    assert net in (None, args.net) and layers in (None, args.layers), "another network was loaded"
    return args, model


def own_names(case, own):
    """{name in the file: ours} of the tensors that have a place in our network."""
    found = {}
    for layout, k in itertools.product(CELLS, case.entries()):
        for a, b in layout.items():
            if k.startswith(a) and b + k.removeprefix(a) in own:
                found[k] = b + k.removeprefix(a)
    return found


def unused(case, model):
    """{name: shape} of what the file's state holds and our network has no place for."""
    loaded = own_names(case, model.state_dict())
    return {k: shape for k, shape in case.entries().items() if k not in loaded}


def parameters_of(entries):
    """Without the buffers: statistics of batch norm and the table of positions."""
    return {k: v for k, v in entries.items()
            if k.rsplit(".", 1)[-1] in ("weight", "bias", "a_2", "b_2")}


def as_named(case, model):
    """State and gradients under the original's names."""
    state, params = model.state_dict(), dict(model.named_parameters())
    named = own_names(case, state)
    return {**{old: state[new] for old, new in named.items()},
            **{f"grad:{old}": params[new].grad for old, new in named.items() if new in params}}


def without_dropout(model):
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def siblings(case, has):
    """The cases of the file whose state is a whole network with the tensor `has`, as Cases."""
    cases = [type(case)(case.stem, case.file, c, case.folder) for c in case.file["cases"]]
    return [c for c in cases if {has, "backbone.conv1.weight"} <= set(c.entries())]


def usual(cases):
    """Of these, the first whose network is the release's by default, with the most classes."""
    def fits(case):
        known = cpctrans.describe(released(case, blank=True))
        return all(known.get(k) == cpctrans.SHAPE[k] for k in ("method", "net", "layers"))
    fitting = [c for c in cases if fits(c)]
    assert fitting, "no other case of the file has the default network"
    return max(fitting, key=lambda c: c.entries().get("final_fc.1.weight", [0])[0])


def clip_of(x):
    """DPC's (B, N, 3, L, H, W) as our (B, N·L, 3, H, W)."""
    return x.transpose(2, 3).flatten(1, 2) if x.dim() == 6 else x


# ---- parts of the network ----------------------------------------------------------------------

def backbone(case):
    path, x = released(case, "backbone."), case.input("x")
    known, entries = cpctrans.describe(path), case.entries()
    track = any(k.endswith("running_mean") for k in entries)
    assert case.config.get("net", known["net"]) == known["net"]
    network = common.PredictiveResNet(known["net"], known["width"], known["method"] == "dpc", track)
    part(case, network, "backbone.", "backbone.").train(case.training())
    names = ("bn1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    maps = watch({k: getattr(network, k) for k in names})
    with torch.no_grad():
        features = network(x)
    return {"features": features, **{f"{k}_out": v[0] for k, v in maps.items()},
            **network.state_dict()}


def layernorm(case):
    eps = {"eps": case.config["eps"]} if "eps" in case.config else {}
    norm = cpctrans.LayerNorm(case.entries()["a_2"][0], **eps)
    return {"y": part(case, norm, "transEnc.transEncoder.norm.", "encoder.norm.")(case.input("x"))}


def attention(case):
    x, inside = case.input("x"), "layers.0.self_attn."
    module = cpctrans.Attention(x.shape[-1], case.config["h"])
    module = part(case, module, "transEnc.transEncoder." + inside, "encoder." + inside)
    return {"y": module(x), "attention": module.weights(x)}


def feedforward(case):
    inside, (hidden, d) = "layers.0.feed_forward.", case.entries()["w_1.weight"]
    module = part(case, cpctrans.FeedForward(d, hidden), "transEnc.transEncoder." + inside,
                  "encoder." + inside)
    return {"y": module(case.input("x"))}


def encoder(case):
    c, x = case.config, case.input("x")
    module = cpctrans.Encoder(x.shape[-1], c["h"], c["N"])
    if c["d_ff"] != module.layers[0].feed_forward.w_1.out_features:
        for layer in module.layers:
            layer.feed_forward = cpctrans.FeedForward(x.shape[-1], c["d_ff"])
    part(case, module, "transEnc.", "encoder.")
    with torch.no_grad():
        return {"y": module.tokens(x),
                "y_of_reversed_tokens_reversed_back": module.tokens(x.flip(1)).flip(1)}


def positional_table(case):
    table = cpctrans.sinusoids(case.config["d_model"], case.config["max_len"])
    return {"pe": table[None], **{f"row_{n}": row for n, row in enumerate(table)}}


def convgru(case):
    c, made = case.config, case.inputs()
    assert (c["kernel_size"], c["num_layers"]) == (1, 1), "only one layer of 1x1 gates exists"
    x = case.input("x")                                       # (B, T, D, S, S)
    h = case.input("h") if any(k.endswith(".h") for k in made) else [None]
    module = part(case, cpctrans.ConvGRU(x.shape[2]), "agg.", "agg.")
    states = module.over(x, h[0])
    return {"outputs": states, "last_states": states[:, -1:]}


def prediction_loop(case):
    """The original's last state is one step of the GRU past the last prediction."""
    h = case.input("hidden")
    model = nn.Module()
    d, model.pred_step = h.shape[1], case.config["pred_step"]
    model.agg = cpctrans.ConvGRU(d)
    model.network_pred = nn.Sequential(nn.Conv2d(d, d, 1), nn.ReLU(), nn.Conv2d(d, d, 1))
    common.load_weights(model, released(case), cpctrans.LAYOUTS, "", cpctrans.SPARE)
    pred, state = cpctrans.CPC.ahead(model.eval(), h)
    return {"pred": pred, "final_hidden": model.agg(F.relu(pred[:, -1]), state)}


# ---- whole networks and losses -----------------------------------------------------------------

def kinds_of(B, P, M):
    kinds = cpctrans.pair_categories(B, P, M)
    positive = (kinds == cpctrans.POSITIVE).flatten(3).flatten(0, 2)
    assert (positive.sum(1) == 1).all()
    return kinds, positive.int().argmax(1)


def mask(case):
    c = case.config
    kinds, target = kinds_of(c["batch"], c["pred_step"], c["last_size"] ** 2)
    for k, n in c.get("category_counts", {}).items():
        assert (kinds == int(k)).sum() == n, f"{n} pairs of category {k} in the original"
    numbered = kinds.double() * torch.arange(kinds.numel()).view(kinds.shape)
    return {"mask": kinds, "mask_sum_345": kinds.sum((3, 4, 5)), "target": target,
            "mask_weighted": numbered.sum((0, 3))}


def loss_topk(case):
    score = case.input("score").flatten(3).flatten(0, 2)
    score = score + case.config["added_identity"] * torch.eye(len(score))
    target = torch.arange(len(score))
    rows = cpctrans.info_nce(score, target)
    return {"loss": rows.mean(), "per_row_loss": rows, "top1_3_5": [
        cpctrans.in_top(score, target, k).mean().item() for k in (1, 3, 5)]}


def pretrain_full(case):
    args, model = whole(case)
    without_dropout(model).train(case.training())
    z_hat, z = model(clip_of(case.input("x")))                # (B, P, M, D) each
    kinds, target = kinds_of(*z.shape[:3])
    score = cpctrans.scores(z_hat, z).view(kinds.shape)
    terms = cpctrans.contrast(args, z_hat, z)
    terms["loss"].backward()
    untouched = [k for k, p in model.named_parameters() if p.grad is None]
    return {"score": score, "score_sum_over_prediction_dims_012": score.sum((0, 1, 2)),
            "score_sum_over_target_dims_345": score.sum((3, 4, 5)), "mask": kinds,
            "target_argmax": target, "loss": terms["loss"],
            "top1_3_5": [terms[f"top{k}"].item() for k in (1, 3, 5)], **as_named(case, model),
            "grad_is_none": len(untouched) + len(parameters_of(unused(case, model)))}


def future_is_visible(case):
    _, model = whole(case)
    x, side = case.input("x"), case.config["sample_size"]
    blind = x.clone()
    blind[:, -1] = 0
    with torch.no_grad():
        first, other = (model.eval()(clip)[0][:, 0].mT for clip in (x, blind))    # (B, D, M)
    s = -(-side // 32)
    return {"first_prediction": first.unflatten(2, (s, s)), "change_norm": (first - other).norm(),
            "first_prediction_last_frame_zeroed": other.unflatten(2, (s, s))}


def classifier(case):
    """One forward pass in the steps of `Classifier.forward`: a second would move the statistics."""
    _, model = whole(case)
    without_dropout(model).train(case.training())
    parts = {"agg": model.agg, "final_bn": model.final_bn}
    parts |= {"encoder": model.encoder} if model.encoder is not None else {}
    seen, x = watch(parts), clip_of(case.input("x"))
    pooled = model.pooled(x)
    logits = model.classify(pooled)
    states = torch.stack(seen["agg"], 1)
    tokens = {}
    if model.encoder is not None:
        z = seen["encoder"][0].permute(0, 1, 3, 4, 2)         # (B, N, S, S, D)
        tokens["encoder_tokens_BxTxC"] = z.flatten(1, 3)
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
    loss.backward()
    with torch.no_grad():
        embedding = states[:, -1] if model.training else model.embed(x)
    return {"logits": logits[:, None], "pooled_context_before_bn_BxCx1": pooled[..., None],
            "gru_outputs_BxNxCxSxS": states, "forward_embedding_BxCxSxS": embedding, **tokens,
            "context_after_bn": seen["final_bn"][0][:, None], "loss_target_arange": loss,
            **as_named(case, model)}


def steps(case):
    """Steps as `cpctrans.train` takes them. One clip per step, or the same in each."""
    c, (args, model) = case.config, whole(case)
    tuning = isinstance(model, cpctrans.Classifier)
    adam = c["Adam"]
    args.lr, args.weight_decay = adam["lr"], adam["weight_decay"]
    slow = "ft" if "slow_lr" in adam else "all"
    optimizer = cpctrans.optimizer_of(args, model, slow)
    for group in optimizer.param_groups:
        group["lr"] = adam["lr"] * group["factor"]
        group["betas"] = tuple(adam.get("betas", group["betas"]))
        group["eps"] = adam.get("eps", group["eps"])
    if slow == "ft":
        rates = sorted(g["lr"] for g in optimizer.param_groups)
        assert np.allclose(rates, [adam["slow_lr"], adam["lr"]], rtol=1e-9), rates
    clips = [torch.from_numpy(x) for _, x in sorted(case.inputs().items(), key=lambda i: int(
        re.search(r"\d*$", i[0])[0] or 0))]
    without_dropout(model).train()
    losses, top1 = [], []
    for step in range(c["steps"]):
        out = model(clip_of(clips[step % len(clips)]))
        if tuning:
            label = torch.arange(len(out)) % out.shape[1]
            terms = {"loss": F.cross_entropy(out, label),
                     "top1": cpctrans.in_top(out, label, 1).mean()}
        else:
            terms = cpctrans.contrast(args, *out)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
        top1.append(terms["top1"].item())
    return {"losses": losses, "top1": top1}


def weights_transfer(case):
    """Counts of names: of both files, and of those that go from one to the other.

    Ours go by `load_weights`; of the names that our network lacks, those that both files have.
    """
    c = case.config
    first, second = (usual(siblings(case, k)) for k in ("network_pred.0.weight",
                                                        "final_fc.1.weight"))
    pretrained, model = whole(first)[1], whole(second)[1]
    filled = common.load_weights(model, released(first), cpctrans.LAYOUTS, (), cpctrans.SPARE)
    shared = {k for k, own in own_names(first, model.state_dict()).items() if own in filled}
    both = set(unused(first, pretrained)) & set(unused(second, model))
    left, fresh = set(first.entries()) - shared - both, set(model.state_dict()) - filled
    assert left == set(c["pretrain_keys_unused"]), left
    assert fresh == set(c["classifier_keys_left_at_init"]), fresh
    return {"counts_pretrain_classifier_shared": [
        len(own_names(first, pretrained.state_dict())) + len(unused(first, pretrained)),
        len(own_names(second, model.state_dict())) + len(unused(second, model)),
        len(shared) + len(both)]}


# ---- evaluation, schedules, lists --------------------------------------------------------------

def video_aggregation(case):
    times = int(re.search(r"\((\d+)\*v\) mod num_class", case.what)[1])
    clips = [torch.from_numpy(x).flatten(0, -2) for _, x in sorted(
        case.inputs().items(), key=lambda i: int(re.search(r"\d+$", i[0])[0]))]
    assert [len(x) for x in clips] == case.config["clips_per_video"]
    prob, logits = (torch.stack(x) for x in zip(*map(cpctrans.aggregate, clips)))
    label = times * torch.arange(len(clips)) % case.config["num_class"]
    metrics, confusion = cpctrans.video_metrics(prob, logits, label)
    agree = prob.argmax(1) == logits.argmax(1)
    return {"mean_softmax": prob, "top1_top5": [metrics["top1"] / 100, metrics["top5"] / 100],
            "loss_avg": metrics["loss"], "confusion_rows_pred_cols_target": confusion,
            "argmax_of_mean_logits": logits.argmax(1),
            "videos_where_both_argmax_agree": agree.sum()}


def train_clip(args, length, frames, draws, distort):
    """An item of `TrainClips` with those random numbers; `frames`: what `pictures` reads."""
    videos = cpctrans.Videos(np.array([b"video"]), np.zeros(1, int), np.array([length]))
    with (mock.patch.object(cpctrans, "pictures", frames),
          mock.patch.object(np.random, "default_rng", lambda _: draws)):
        return cpctrans.TrainClips(args, videos, distort)[0, 0]


def clip_indices(case):
    """Training's frames are those of an item of `TrainClips` whose pictures are their numbers."""
    def frames(path, numbers, *_):
        return np.reshape(numbers, (-1, 1, 1, 1))

    out, bare = {}, arguments(case)
    for row in case.config["cases"]:
        args = type(bare)(**{**vars(bare), **row, "seq_len": row.get("seq_len", 1)})
        length, n, ds = row["vlen"], row["num_seq"], row["ds"]
        first, last = (train_clip(args, length, frames, Draws(integers=[draw]),
                                  lambda clip, *_: (clip, {}))["clip"].flatten()
                       for draw in (lambda high: 0, lambda high: high - 1))
        key = f"vlen{length}_n{n}_ds{ds}"
        out |= {f"{key}_kept": int(cpctrans.last_start(length, cpctrans.clip_span(args)) >= 0),
                f"{key}_test_frame_numbers_1based": cpctrans.test_clips(length, n, ds) + 1,
                f"{key}_train_first_and_last_possible_start": [first[0].item(), last[0].item()],
                f"{key}_train_frame_numbers_of_last_start_1based": last + 1}
    return out


def dpc_test_clips(case):
    hmdb = case.id.endswith("_hmdb") or "HMDB" in case.case.get("source", "")
    args, out = arguments(case, None, "--method", "dpc"), {}
    args.dataset = "hmdb51" if hmdb else "ucf101"
    for row in case.config["cases"]:
        args.num_seq, length, ds, seq_len = (row[k] for k in ("num_seq", "vlen", "ds", "seq_len"))
        clips = cpctrans.test_clips(length, args.num_seq, ds, seq_len, cpctrans.hop_of(args))
        out[f"vlen{length}_n{args.num_seq}_len{seq_len}_ds{ds}"] = clips + 1
    return out


def lr_schedules(case):
    """`learning_rate`, or the rule behind it where the case has other numbers than the release.

    The release counts epochs of pre-training from 1.
    """
    c, args, out = case.config, arguments(case), {}
    counted = re.search(r"epochs (\d+)\.\.(\d+).*finetuning (\d+)\.\.(\d+)", case.what)
    first, last, *_ = map(int, counted.groups())

    def rates(stage, epochs):
        args.stage, args.lr, own = stage, c[stage]["lr"], cpctrans.step_lr
        every, gamma = c[stage]["StepLR"]
        with mock.patch.object(cpctrans, "step_lr", side_effect=own) as spy:
            found = [cpctrans.learning_rate(args, e) for e in epochs]
        if any(call.args[2:] != (every, gamma) for call in spy.call_args_list):
            found = [own(args.lr, e, every, gamma) for e in epochs]
        return np.array(found)

    source = usual(siblings(case, "final_fc.1.weight"))
    _, model = whole(source)
    groups = {factor: p for p, factor in cpctrans.parameter_groups(model, "ft")}
    slow, fast = min(groups), max(groups)
    starts = tuple(c["finetune"].get("slow_prefixes", ("backbone", "transEnc")))
    dead = {k: int(np.prod(s)) for k, s in parameters_of(unused(source, model)).items()}
    dead_slow = sum(n for k, n in dead.items() if k.startswith(starts))
    ours = {k: sum(p.numel() for p in group) for k, group in groups.items()}
    for key in case.case["outputs"]:
        at = re.fullmatch(r"(pretrain|finetune)_(?:(slow|fast)_)?lr(?:_at_(?:epochs_)?([\d_]+))?",
                          key)
        if at:
            offset = first if at[1] == "pretrain" else 0
            epochs = map(int, at[3].split("_")) if at[3] else range(first, last + 1)
            factor = slow if at[2] == "slow" else fast
            out[key] = factor * rates(at[1], [e - offset for e in epochs])
    return {**out, "slow_params_total_params": [
        ours[slow] + dead_slow, sum(ours.values()) + sum(dead.values())]}


def dpc_lr_multiplier(case):
    c = case.config
    return {"multiplier": [cpctrans.restart_multiplier(e, c["gamma"], c["step"], c["repeat"])
                           for e in c["epochs"]]}


def meter(case):
    values, counts = case.config["values"], case.config["n"]
    return {"avg": cpctrans.selection(values, counts, False),
            "local_avg": cpctrans.selection(values, counts, True)}


def parse_ucf101(case):
    c, out = case.config, {}
    (case.folder / "classInd.txt").write_bytes(c["classInd"].encode())
    for part_of in ("train", "test"):
        text = c[f"{part_of}list"]
        (case.folder / f"{part_of}list01.txt").write_bytes(text.encode())
        names, labels, _ = cpctrans.read_ucf101(case.folder, part_of, 1)
        assert [n + ".avi" for n in names] == [row.split()[0] for row in text.split("\n") if row]
        held = [group in cpctrans.HELD_OUT for group in c[f"expected_groups_{part_of}"]]
        assert cpctrans.hold_out("ucf101", names).tolist() == held
        out[f"{part_of}_labels"] = labels
    return out


def parse_hmdb51(case):
    c, codes, classes = case.config, [], set()
    for name in (k for k in c if k.endswith(".txt")):
        (case.folder / name).write_bytes(c[name].encode())
        codes += [code for _, _, code in cpctrans.read_hmdb51_file(case.folder / name)]
        classes.add(re.sub(r"_test_split\d\.txt$", "", name))
        split = int(name[-5])
    for part_of in ("train", "test"):
        names, labels, known = cpctrans.read_hmdb51(case.folder, part_of, split)
        assert set(known) == classes and all(n.startswith(tuple(classes)) for n in names)
        assert [n.split("/", 1)[1] for n in names] == c["expected"][part_of]
    assert c["expected"].get("class") in {None, *classes}
    return {"codes": codes}


def parse_frame_csv(case):
    c, path = case.config, case.folder / "train_split01.csv"
    path.write_bytes(c["csv"].encode())
    _, classes, videos, counts = zip(*cpctrans.read_frame_csv(path))
    assert list(classes) == c["expected_class"] and list(videos) == c["expected_video"]
    assert cpctrans.read_csv_list(case.folder, "train", 1)[3] == list(counts)
    return {"frame_counts": list(counts)}


# ---- pictures ----------------------------------------------------------------------------------

def picture_outputs(x, tensor=False, hue=False):
    """The outputs of an image transform.    x: (n, h, w, 3), 0 .. 255"""
    x = np.asarray(x, dtype=np.float64)
    found = {"image_values": x, "column_means": x.mean((0, 1, 3)), "row_means": x.mean((0, 2, 3))}
    return {k: Tensorised(v, 255.0, hue) for k, v in found.items()} if tensor else found


def clip_outputs(x, tensor=False, hue=False):
    """The outputs of a whole pipeline.    x: (N, 3, H, W), normalised

    Contiguous: means in float32 follow the order of summation.
    """
    x = x.contiguous()
    found = {"clip_NxCxHxW": x, "per_frame_channel_means": x.mean((2, 3)),
             "row_means": x.mean((0, 1, 3))}
    unit = 1 / torch.tensor(cpctrans.STD, dtype=torch.float64)
    units = {"clip_NxCxHxW": unit[:, None, None], "per_frame_channel_means": unit,
             "row_means": unit.mean()}
    return {k: Tensorised(v, units[k], hue) for k, v in found.items()} if tensor else found


def only_frames(case):
    (frames,) = case.inputs().values()
    return frames


def scale(case):
    """To a size (w, h), or the short side to an integer; nearest unless the case says otherwise."""
    c, frames = case.config, only_frames(case)
    nearest = c.get("interpolation", "NEAREST").startswith("NEAREST")
    h, w = frames.shape[1:3]
    width, height = c.get("size_wh") or cpctrans.short_side_size(h, w, c["size"])[::-1]
    if not nearest:
        return picture_outputs(cpctrans.bilinear(frames, height, width), tensor=True)
    if h == w and height == width:
        return picture_outputs(cpctrans.crop_resize(frames, 0, 0, h, height))
    rows, columns = cpctrans.nearest_index(h, height), cpctrans.nearest_index(w, width)
    return picture_outputs(frames[:, rows[:, None], columns])


def short_side(case):
    c, frames = case.config, only_frames(case)
    side = int(re.search(r"shorter side to (\d+)", case.what)[1])
    out = cpctrans.short_side_to(frames, side)
    assert out.shape[2:0:-1] == tuple(c["out_wh"]), out.shape
    return picture_outputs(out)


def center_crop(case):
    frames, size = only_frames(case), case.config["size"]
    x, y = cpctrans.centre(frames, size)
    assert [x, y] == case.config.get("expected_xy", [x, y])
    return picture_outputs(cpctrans.crop_resize(frames, x, y, size, size))


def random_sized_crop(case):
    c, frames = case.config, only_frames(case)
    h, w = frames.shape[1:3]
    size = c.get("size") or int(re.search(r"resize to (\d+)", case.what)[1])
    box = None
    if "area_fraction" in c:
        box = cpctrans.sized_crop_box(Draws(
            uniform=[c["area_fraction"], c["aspect"]], random=[0.0 if c["swap_wh"] else 1.0],
            integers=[c["x"], c["y"]]), w, h)
        assert [*box[2:]] == c.get("crop_wh", [*box[2:]]), box
    return picture_outputs(cpctrans.sized_crop(frames, box, size), tensor=True)


def painted(args, frames, draws):
    """What pre-training makes of those frames: (N, 3, S, S) of `paint`, not yet normalised."""
    item = train_clip(args, len(frames), lambda *_: frames, draws, cpctrans.distort_pretrain)
    batch = {k: torch.as_tensor(v)[None] for k, v in item.items()}
    with mock.patch.object(cpctrans, "normalize", lambda x: x):
        return cpctrans.paint(batch, torch.device("cpu"))[0]


def tiled(case, flip=1.0, grey=(1.0, 0)):
    """Mirroring and grey channels by pre-training's own code, without jitter.

    That code cuts squares, so a picture goes through it in overlapping ones.
    """
    frames = only_frames(case)
    n, h, w = frames.shape[:3]
    side, out = min(h, w), np.zeros(frames.shape)
    args = arguments(case, None, "--img_dim", str(side), "--crop", str(side))
    args.num_seq = n
    for y, x in itertools.product(*(sorted({*range(0, size - side, side), size - side})
                                    for size in (h, w))):
        draws = Draws(random=[flip, np.full(n, 1.0) * grey[0]],
                      integers=[0, x, y, np.full(n, 0) + grey[1]],
                      uniform=[np.zeros((n, 4))], permutation=[-np.ones(4, int)])
        tile = painted(args, frames, draws)
        out[:, y:y + side, x:x + side] = (tile * 255).double().round().permute(0, 2, 3, 1)
    return picture_outputs(out)


def flip(case):
    return tiled(case, flip=float(re.search(r"draw ([\d.]+)", case.what)[1]))


def random_gray(case):
    """The channels stand in words, frame by frame; where there is none, any would do."""
    words = re.findall(r"frame (\d+) (?:replaced )?by (?:its )?channel (\d)", case.what)
    channels = {int(frame): int(channel) for frame, channel in words}
    draws = np.array(case.config["draws"])
    for i, draw in enumerate(draws):
        assert (draw < case.config["p"]) == (i in channels), "the words and the draws disagree"
    return tiled(case, grey=(draws, np.array([channels.get(i, 0) for i in range(len(draws))])))


def color_jitter(case):
    """One operation for all frames, or every frame's own factors and order."""
    c, frames = case.config, only_frames(case)
    n = len(frames)
    if "factor" in c:
        word = re.match(r"(brightness|contrast|saturation|hue) factor", case.what)
        what = OPERATIONS[word[1][0] if word else case.id[-1]]
        factors, order = torch.ones(n, 4), -torch.ones(n, 4, dtype=torch.long)
        factors[:, what], order[:, 0] = c["factor"], what
    else:
        each = [c.get(f"frame{i}", c) for i in range(n)]
        factors = torch.tensor([e["factors"] for e in each])
        order = torch.tensor([[OPERATIONS[word[0]] for word in e["order"]] for e in each])
    x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    x = cpctrans.jitter(x, factors, order).permute(0, 2, 3, 1)
    return picture_outputs(x * 255, tensor=True, hue=bool((order == HUE).any()))


def size_of(case):
    """Side of the network's pictures, and of the crop that they are scaled from."""
    to = re.search(r"resize to (\d+)", case.what) or re.search(r"_(\d+)(?:_|$)", case.id)
    crop = re.search(r"crop (\d+)", case.what)
    return ["--img_dim", str(case.config.get("img_dim") or to[1]), "--crop", crop[1]]


def pipeline_pretrain(case):
    c, frames = case.config, only_frames(case)
    n, args = len(frames), arguments(case, None, *size_of(case))
    args.num_seq = n
    channels = [re.search(r"\d", x)[0] if x else None for x in c["gray"]]
    factors, order = np.array(c["jitter_bcsh"]), [
        np.array([OPERATIONS[word[0]] for word in words]) for words in c["jitter_order"]]
    item = train_clip(args, n, lambda *_: frames, Draws(
        random=[0.0 if c["flip"] else 1.0, np.array([1.0 if x is None else 0.0 for x in channels])],
        integers=[0, *c["crop_xy"], np.array([int(x or 0) for x in channels])],
        uniform=[factors - (1, 1, 1, 0)], permutation=order), cpctrans.distort_pretrain)
    batch = {k: torch.as_tensor(v)[None] for k, v in item.items()}
    return clip_outputs(cpctrans.paint(batch, torch.device("cpu"))[0], tensor=True, hue=True)


def pipeline_test(case):
    frames, args = only_frames(case), arguments(case, None, *size_of(case))
    args.num_seq, args.ds = len(frames), 1
    videos = cpctrans.Videos(np.array([b"video"]), np.zeros(1, int), np.array([len(frames)]))
    with mock.patch.object(cpctrans, "pictures", lambda *_: frames):
        clip = cpctrans.TestClips(args, videos, middle=True)[0]
    return clip_outputs(cpctrans.normalize(clip / 255))


def end_to_end_test_video(case):
    """From a folder of pictures: stored without loss, under the names of the release."""
    from PIL import Image
    args, model = whole(case)
    frames, video = only_frames(case), case.folder / "Class" / "v_Class_g01_c01"
    video.mkdir(parents=True)
    for i, picture in enumerate(frames):
        Image.fromarray(picture).save(video / f"image_{i + 1:05d}.jpg", "PNG")
    assert common.count_frames(video) == case.config["frames"]
    videos = cpctrans.Videos(np.array([str(video).encode()]), np.zeros(1, int),
                             np.array([common.count_frames(video)]))
    clips = cpctrans.normalize(cpctrans.TestClips(args, videos)[0] / 255)
    assert len(clips) == case.config["clips"]
    with torch.no_grad():
        logits = model.eval()(clips)
    prob, _ = cpctrans.aggregate(logits)
    return {"clips": clips, "logits": logits[:, None], "mean_softmax": prob[None],
            "argmax": prob.argmax()}


ADAPTERS = {
    "backbone": backbone, "layernorm": layernorm, "attention": attention,
    "feedforward": feedforward, "encoder": encoder, "positional_table": positional_table,
    "convgru": convgru, "prediction_loop": prediction_loop, "mask": mask, "loss_topk": loss_topk,
    "pretrain_full": pretrain_full, "future_is_visible": future_is_visible,
    "classifier_eval": classifier, "classifier_train": classifier, "train#_pretrain": steps,
    "train#_finetune": steps, "weights_transfer": weights_transfer,
    "video_aggregation": video_aggregation, "clip_indices": clip_indices,
    "lr_schedules": lr_schedules, "meter": meter, "parse_ucf101": parse_ucf101,
    "parse_hmdb51": parse_hmdb51, "parse_frame_csv": parse_frame_csv, "scale_nearest": scale,
    "scale_bilinear": scale, "scale_int_short_side": scale, "short_side": short_side,
    "center_crop": center_crop, "random_sized_crop": random_sized_crop, "flip": flip,
    "random_gray": random_gray, "color_jitter": color_jitter,
    "pipeline_pretrain": pipeline_pretrain, "pipeline_test": pipeline_test,
    "end_to_end_test_video": end_to_end_test_video, "dpc_backbone": backbone,
    "dpc_pretrain": pretrain_full, "dpc_classifier": classifier, "dpc_test_clips": dpc_test_clips,
    "dpc_lr_multiplier": dpc_lr_multiplier}
ADAPTERS |= {f"upstream_#l#h_{family}": adapter for family, adapter in ADAPTERS.items()}
