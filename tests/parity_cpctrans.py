"""Adapters of the parity tests for CPCTrans: {family: function of a Case to its outputs}.

Weights are written as a checkpoint of the release and loaded by the functions behind --init.
Frames go through the functions that make samples, with the case's draws as random numbers. The
release registers parts that it never calls, and ours has no such parts. Where an output counts
them, the tensors of the case that our network has no place for are added to ours.
"""

import itertools
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from parity_tools import Tensorised, own_names, parameters_of, watch
from torch import nn

import common
import cpctrans
from cpctrans import BRIGHTNESS, CONTRAST, HUE, SATURATION

CPU = torch.device("cpu")
OPERATIONS = {"b": BRIGHTNESS, "c": CONTRAST, "s": SATURATION, "h": HUE}
STD = torch.tensor(common.IMAGENET[1], dtype=torch.float64)


class Draws:
    """A random generator that returns given draws, again and again, per method."""

    def __init__(self, **queues):
        self.queues = {k: itertools.cycle(v) for k, v in queues.items()}

    def __getattr__(self, method):
        def draw(*args, **kwargs):
            x = next(self.queues[method])
            return x(*args, **kwargs) if callable(x) else x
        return draw


# ---- weights and networks ------------------------------------------------------------------------

def released(case, within="", blank=False):
    """Path of the case's state as a checkpoint of the release, its names put behind `within`.

    blank: names and shapes alone.
    """
    state = {k: torch.zeros(()).expand(shape) for k, shape in case.entries().items()}
    state = {within + k: v for k, v in (state if blank else case.state()).items()}
    parallel = "final_fc.1.weight" in state                   # test.py saves a DataParallel
    state = {"module." * parallel + k: v for k, v in state.items()}
    path = case.folder / "model_best_epoch7.pth.tar"
    torch.save({"epoch": 8, "net": "resnet18", "state_dict": state, "best_acc": np.float64(0.25),
                "optimizer": {"state": {}, "param_groups": []}, "iteration": 99}, path)
    return path


def load_part(case, module, within):
    """Load a bare submodule that is called `within...` in the release."""
    holder, own = module, within.replace("transEnc.transEncoder", "transEnc")
    for name in reversed(own.replace("transEnc.", "encoder.").rstrip(".").split(".")):
        holder = nn.ModuleDict({name: holder})
    common.load_weights(holder, released(case, within), cpctrans.LAYOUTS)
    return module.eval()


def arguments(case, path="none", *flags):
    """The flags of a command that starts from that checkpoint, with those of the case."""
    c = case.config
    stage = "finetune" if "final_fc.1.weight" in case.entries() else "pretrain"
    given = {k: c[k] for k in ("heads", "num_seq", "pred_step", "ds", "img_dim") if k in c}
    argv = ["--stage", stage, "--init", str(path), "--out", str(case.folder / "run")]
    argv += [str(x) for k, v in given.items() for x in (f"--{k}", v)]
    return cpctrans.parse_args([*argv, *flags])


def whole(case):
    """(args, network): pre-training's, or the classifier where the state has a last layer."""
    path = released(case)
    args, last = arguments(case, path), case.entries().get("final_fc.1.weight")
    model = cpctrans.Classifier(args, last[0]) if last else cpctrans.CPC(args)
    common.load_weights(model, path, cpctrans.LAYOUTS)
    net, layers = case.config.get("net"), case.config.get("transformer_layers")
    assert net in (None, args.net) and layers in (None, args.layers), "another network was loaded"
    return args, model


def unused(case, model):
    """{name: shape} of what the file's state holds and our network has no place for."""
    loaded = own_names(case, cpctrans.LAYOUTS, model.state_dict())
    return {k: shape for k, shape in case.entries().items() if k not in loaded}


def as_named(case, model):
    """State and gradients under the original's names."""
    state, params = model.state_dict(), dict(model.named_parameters())
    named = own_names(case, cpctrans.LAYOUTS, state)
    return {**{old: state[new] for old, new in named.items()},
            **{f"grad:{old}": params[new].grad for old, new in named.items() if new in params}}


def without_dropout(model):
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def siblings(case, has):
    """The cases of the file whose state is a whole network with the tensor `has`, as Cases."""
    return [c for c in case.others() if {has, "backbone.conv1.weight"} <= set(c.entries())]


def usual(cases):
    """Of these, the one with the network of the release and the most classes."""
    def fits(case):
        made = cpctrans.read_settings(released(case, blank=True))
        return all(made[k] == cpctrans.NETWORK[k] for k in ("net", "layers"))
    fitting = [c for c in cases if fits(c)]
    assert fitting, "no other case of the file has the default network"
    return max(fitting, key=lambda c: c.entries().get("final_fc.1.weight", [0])[0])


# ---- parts of the network ------------------------------------------------------------------------

def backbone(case):
    made = cpctrans.read_settings(released(case, "backbone."))
    assert case.config.get("net", made["net"]) == made["net"]
    network = common.PredictiveResNet(made["net"], made["width"])
    load_part(case, network, "backbone.").train(case.training())
    names = ("bn1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    maps = watch({k: getattr(network, k) for k in names})
    with torch.no_grad():
        features = network(case.input("x"))
    return {"features": features, **{f"{k}_out": v[0] for k, v in maps.items()},
            **network.state_dict()}


def layernorm(case):
    eps = {"eps": case.config["eps"]} if "eps" in case.config else {}
    norm = cpctrans.LayerNorm(case.entries()["a_2"][0], **eps)
    load_part(case, norm, "transEnc.transEncoder.norm.")
    return {"y": norm(case.input("x"))}


def attention(case):
    x = case.input("x")
    module = cpctrans.Attention(x.shape[-1], case.config["h"])
    load_part(case, module, "transEnc.transEncoder.layers.0.self_attn.")
    weights = watch({"weights": module.dropout})["weights"]
    return {"y": module(x), "attention": weights[0]}


def feedforward(case):
    hidden, d = case.entries()["w_1.weight"]
    module = with_hidden(cpctrans.EncoderLayer(d, 1), d, hidden).feed_forward
    load_part(case, module, "transEnc.transEncoder.layers.0.feed_forward.")
    return {"y": module(case.input("x"))}


def with_hidden(layer, d, hidden):
    """A layer of the transformer whose hidden layer has a case's size."""
    if layer.feed_forward.w_1.out_features != hidden:
        layer.feed_forward.w_1, layer.feed_forward.w_2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
    return layer


def encoder(case):
    c, x = case.config, case.input("x")
    module = cpctrans.Encoder(x.shape[-1], c["h"], c["N"])
    for layer in module.layers:
        with_hidden(layer, x.shape[-1], c["d_ff"])
    load_part(case, module, "transEnc.")

    def tokens(x):                                            # each a frame of one cell
        return module(x[..., None, None])[..., 0, 0]
    with torch.no_grad():
        return {"y": tokens(x), "y_of_reversed_tokens_reversed_back": tokens(x.flip(1)).flip(1)}


def positional_table(case):
    table = cpctrans.sinusoids(case.config["d_model"], case.config["max_len"])
    return {"pe": table[None], **{f"row_{n}": row for n, row in enumerate(table)}}


def convgru(case):
    c, made = case.config, case.inputs()
    assert (c["kernel_size"], c["num_layers"]) == (1, 1), "only one layer of 1x1 gates exists"
    x = case.input("x")                                       # (B, T, D, S, S)
    h = case.input("h")[0] if any(k.endswith(".h") for k in made) else None
    module = load_part(case, cpctrans.ConvGRU(x.shape[2]), "agg.")
    if h is None:
        states = watch({"gru": module})["gru"]
        assert torch.equal(module.last_state(x), states[-1])
    else:
        states = [h := module(frame, h) for frame in x.unbind(1)]
    states = torch.stack(states, 1)
    return {"outputs": states, "last_states": states[:, -1:]}


def prediction_loop(case):
    """The original's last state is one step of the GRU past the last prediction."""
    h = case.input("hidden")
    model = nn.Module()
    d, model.pred_step = h.shape[1], case.config["pred_step"]
    model.agg = cpctrans.ConvGRU(d)
    model.network_pred = nn.Sequential(nn.Conv2d(d, d, 1), nn.ReLU(), nn.Conv2d(d, d, 1))
    common.load_weights(model, released(case), cpctrans.LAYOUTS)
    states = watch({"agg": model.agg})["agg"]
    pred = cpctrans.CPC.predict(model.eval(), h)
    state = states[-1] if states else h
    return {"pred": pred, "final_hidden": model.agg(F.relu(pred[:, -1]), state)}


# ---- whole networks and losses -------------------------------------------------------------------

def kinds_of(B, P, M):
    """The original's category of each pair, (B, P, M, B, P, M), and the positive column per row."""
    cells = torch.arange(B * P * M)
    wrong = cpctrans.wrong_kinds(cells, cells[:, None], (B, P, M))
    kinds = torch.ones(len(cells), len(cells), dtype=torch.int64)
    for kind, code in (("wrong_time", -1), ("wrong_cell", -3), ("wrong_video", 0)):
        kinds[wrong[kind]] = code
    positive = kinds == 1
    assert (positive.sum(1) == 1).all()
    return kinds.view(B, P, M, B, P, M), positive.int().argmax(1)


def mask(case):
    c = case.config
    kinds, target = kinds_of(c["batch"], c["pred_step"], c["last_size"] ** 2)
    for k, n in c.get("category_counts", {}).items():
        assert (kinds == int(k)).sum() == n, f"{n} pairs of category {k} in the original"
    numbered = kinds.double() * torch.arange(kinds.numel()).view(kinds.shape)
    return {"mask": kinds, "mask_sum_345": kinds.sum((3, 4, 5)), "target": target,
            "mask_weighted": numbered.sum((0, 3))}


def fractions(terms):
    return [float(terms[f"top{k}"].mean()) / 100 for k in (1, 3, 5)]


def loss_topk(case):
    score = case.input("score").flatten(3).flatten(0, 2)
    score = score + case.config["added_identity"] * torch.eye(len(score))
    rows = cpctrans.loss_and_topk(score, torch.arange(len(score)))
    return {"loss": rows["loss"].mean(), "per_row_loss": rows["loss"], "top1_3_5": fractions(rows)}


def pretrain_full(case):
    args, model = whole(case)
    without_dropout(model).train(case.training())
    z_hat, z = model(case.input("x"))                         # (B, P, M, D) each
    kinds, target = kinds_of(*z.shape[:3])
    score = cpctrans.similarity(z_hat, z).view(kinds.shape)
    terms = cpctrans.info_nce(z_hat, z)
    terms["loss"].backward()
    untouched = [k for k, p in model.named_parameters() if p.grad is None]
    return {"score": score, "score_sum_over_prediction_dims_012": score.sum((0, 1, 2)),
            "score_sum_over_target_dims_345": score.sum((3, 4, 5)), "mask": kinds,
            "target_argmax": target, "loss": terms["loss"], "top1_3_5": fractions(terms),
            **as_named(case, model),
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
    """What passes between the parts in one forward pass: a second would move the statistics."""
    _, model = whole(case)
    without_dropout(model).train(case.training())
    into = {}
    model.final_bn.register_forward_hook(lambda _, x, y: into.update(pooled=x[0], normal=y))
    seen = watch({"agg": model.agg, "encoder": model.encoder})
    logits = model(case.input("x"))
    states = torch.stack(seen["agg"], 1)
    tokens = seen["encoder"][0].permute(0, 1, 3, 4, 2).flatten(1, 3)          # (B, N·S·S, D)
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
    loss.backward()
    return {"logits": logits[:, None], "pooled_context_before_bn_BxCx1": into["pooled"][..., None],
            "gru_outputs_BxNxCxSxS": states, "forward_embedding_BxCxSxS": states[:, -1],
            "encoder_tokens_BxTxC": tokens, "context_after_bn": into["normal"][:, None],
            "loss_target_arange": loss, **as_named(case, model)}


def steps(case):
    """Steps as `train` takes them. One clip per step, or the same in each."""
    c, (args, model) = case.config, whole(case)
    adam = c["Adam"]
    args.lr, args.weight_decay = adam["lr"], adam["weight_decay"]
    args.train_what = "ft" if "slow_lr" in adam else "all"
    optimizer = cpctrans.make_optimizer(args, model)
    for group in optimizer.param_groups:
        group["lr"] = adam["lr"] * group["scale"]
        group["betas"] = tuple(adam.get("betas", group["betas"]))
        group["eps"] = adam.get("eps", group["eps"])
    if "slow_lr" in adam:
        rates = sorted(g["lr"] for g in optimizer.param_groups)
        assert np.allclose(rates, [adam["slow_lr"], adam["lr"]], rtol=1e-9), rates
    clips = [torch.from_numpy(x) for x in case.in_order()]
    without_dropout(model).train()
    losses, top1 = [], []
    for step in range(c["steps"]):
        out = model(clips[step % len(clips)])
        if args.stage == "finetune":
            label = torch.arange(len(out)) % out.shape[1]
            terms = {k: v.mean() for k, v in cpctrans.loss_and_topk(out, label).items()}
        else:
            terms = cpctrans.info_nce(*out)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
        top1.append(terms["top1"].item() / 100)
    return {"losses": losses, "top1": top1}


def weights_transfer(case):
    """Counts of names: of both files, and of those that go from one to the other.

    Ours go by `load_init`; of the names that our network lacks, those that both files have.
    """
    c = case.config
    first, second = (usual(siblings(case, k)) for k in ("network_pred.0.weight",
                                                        "final_fc.1.weight"))
    pretrained, (args, model) = whole(first)[1], whole(second)
    args.init, load, filled = released(first), common.load_weights, set()
    with mock.patch.object(common, "load_weights", lambda *a, **k: filled.update(load(*a, **k))):
        cpctrans.load_init(args, model)
    def size(source, network):
        return len(own_names(source, cpctrans.LAYOUTS, network.state_dict())) + len(
            unused(source, network))

    ours = own_names(first, cpctrans.LAYOUTS, model.state_dict())
    shared = {k for k, own in ours.items() if own in filled}
    both = set(unused(first, pretrained)) & set(unused(second, model))
    left, random = set(first.entries()) - shared - both, set(model.state_dict()) - filled
    assert left == set(c["pretrain_keys_unused"]), left
    assert random == set(c["classifier_keys_left_at_init"]), random
    return {"counts_pretrain_classifier_shared": [
        size(first, pretrained), size(second, model), len(shared) + len(both)]}


# ---- evaluation, schedules, lists ----------------------------------------------------------------

def video_aggregation(case):
    times = int(re.search(r"\((\d+)\*v\) mod num_class", case.what)[1])
    clips = [torch.from_numpy(x).flatten(0, -2) for x in case.in_order()]
    assert [len(x) for x in clips] == case.config["clips_per_video"]
    prob, logits = (torch.stack(x) for x in zip(*map(cpctrans.aggregate, clips)))
    label = times * torch.arange(len(clips)) % case.config["num_class"]
    metrics, confusion = cpctrans.video_metrics(prob, logits, label)
    agree = prob.argmax(1) == logits.argmax(1)
    return {"mean_softmax": prob, "top1_top5": [metrics["top1"] / 100, metrics["top5"] / 100],
            "loss_avg": metrics["loss"], "confusion_rows_pred_cols_target": confusion,
            "argmax_of_mean_logits": logits.argmax(1),
            "videos_where_both_argmax_agree": agree.sum()}


def video(length):
    return cpctrans.Video("Class/video", 0, length)


def reading(frames):
    """In this block, the product's reader of frames is `frames`."""
    return mock.patch.object(cpctrans, "read_frames", frames)


def clip_indices(case):
    """The frames of a training clip are their numbers here."""
    out, bare = {}, arguments(case)
    for row in case.config["cases"]:
        args = SimpleNamespace(**{**vars(bare), "num_frames": row["num_seq"], "stride": row["ds"]})
        length, n, ds = row["vlen"], row["num_seq"], row["ds"]
        with reading(lambda _, numbers, crop: numbers):
            first, last = (cpctrans.read_random_clip(args, video(length), Draws(integers=[draw]))
                           for draw in (lambda high: 0, lambda high: high - 1))
        key = f"vlen{length}_n{n}_ds{ds}"
        out |= {f"{key}_kept": int(length > cpctrans.frames_needed(args)),
                f"{key}_test_frame_numbers_1based": cpctrans.consecutive_clips(args, length) + 1,
                f"{key}_train_first_and_last_possible_start": [first[0].item(), last[0].item()],
                f"{key}_train_frame_numbers_of_last_start_1based": last + 1}
    return out


def lr_schedules(case):
    """The release counts epochs of pre-training from 1."""
    c, args, out = case.config, arguments(case), {}
    counted = re.search(r"epochs (\d+)\.\.(\d+).*finetuning (\d+)\.\.(\d+)", case.what)
    first, last, *_ = map(int, counted.groups())

    def rates(stage, epochs):
        args.stage, args.lr, args.train_what = stage, c[stage]["lr"], "ft"
        with mock.patch.dict(cpctrans.SCHEDULE, {stage: c[stage]["StepLR"]}):
            return np.array([cpctrans.learning_rate(args, e, 1) for e in epochs])

    source = usual(siblings(case, "final_fc.1.weight"))
    tuning, model = whole(source)
    groups = cpctrans.make_optimizer(tuning, model).param_groups
    fast, slow = sorted((g["scale"] for g in groups), reverse=True)
    ours = {g["scale"]: sum(p.numel() for p in g["params"]) for g in groups}
    starts = tuple(c["finetune"].get("slow_prefixes", ("backbone", "transEnc")))
    dead = {k: int(np.prod(s)) for k, s in parameters_of(unused(source, model)).items()}
    dead_slow = sum(n for k, n in dead.items() if k.startswith(starts))
    for key in case.case["outputs"]:
        at = re.fullmatch(r"(pretrain|finetune)_(?:(slow|fast)_)?lr(?:_at_(?:epochs_)?([\d_]+))?",
                          key)
        if at:
            offset = first if at[1] == "pretrain" else 0
            epochs = map(int, at[3].split("_")) if at[3] else range(first, last + 1)
            scale = slow if at[2] == "slow" else fast
            out[key] = scale * rates(at[1], [e - offset for e in epochs])
    return {**out, "slow_params_total_params": [
        ours[slow] + dead_slow, sum(ours.values()) + sum(dead.values())]}


def meter(case):
    """Each batch's value as that of as many videos: what is chosen is a mean over these."""
    values, counts = case.config["values"], case.config["n"]
    batches = [torch.full((n,), v, dtype=torch.float64) for v, n in zip(values, counts)]
    return {"avg": cpctrans.mean_of_videos(batches, False),
            "local_avg": cpctrans.mean_of_videos(batches, True)}


def read_list(case, dataset, split, fold=1):
    return cpctrans.read_list(SimpleNamespace(dataset=dataset, data=case.folder), split, fold)


def parse_ucf101(case):
    c, out = case.config, {}
    (case.folder / "classInd.txt").write_bytes(c["classInd"].encode())
    for split in ("train", "test"):
        text = c[f"{split}list"]
        (case.folder / f"{split}list01.txt").write_bytes(text.encode())
        videos, _ = read_list(case, "ucf101", split)
        names = [v.name for v in videos]
        assert [n + ".avi" for n in names] == [row.split()[0] for row in text.split("\n") if row]
        heldout = [group in (24, 25) for group in c[f"expected_groups_{split}"]]
        assert cpctrans.is_validation("ucf101", names) == heldout
        out[f"{split}_labels"] = [v.label for v in videos]
    return out


def parse_hmdb51(case):
    """The code of a row is told by the list that it comes into."""
    c, rows, code = case.config, [], {}
    for name in (k for k in c if k.endswith(".txt")):
        (case.folder / name).write_bytes(c[name].encode())
        group, fold = name[:-len("_test_split1.txt")], int(name[-5])
        rows += [f"{group}/{row.split('.avi')[0]}" for row in c[name].split("\n") if row.strip()]
    for split, number in (("train", 1), ("test", 2)):
        videos, classes = read_list(case, "hmdb51", split, fold)
        assert {row.split("/")[0] for row in rows} == set(classes)
        assert [v.name.split("/", 1)[1] for v in videos] == c["expected"][split]
        code |= {v.name: number for v in videos}
    assert c["expected"].get("class") in {None, *classes}
    return {"codes": [code.get(row, 0) for row in rows]}


def parse_frame_csv(case):
    c = case.config
    (case.folder / "train_split01.csv").write_bytes(c["csv"].encode())
    videos, _ = read_list(case, "ucf101", "train")
    names = [f"{a}/{b}" for a, b in zip(c["expected_class"], c["expected_video"])]
    assert [v.name for v in videos] == names
    return {"frame_counts": [v.length for v in videos]}


# ---- frames --------------------------------------------------------------------------------------

def image_outputs(x, tensor=False, hue=False):
    """The outputs of an image transform.    x: (n, 3, h, w), 0 .. 255"""
    x = np.asarray(x, dtype=np.float64).transpose(0, 2, 3, 1)
    found = {"image_values": x, "column_means": x.mean((0, 1, 3)), "row_means": x.mean((0, 2, 3))}
    return {k: Tensorised(v, 255.0, hue) for k, v in found.items()} if tensor else found


def clip_outputs(x, tensor=False, hue=False):
    """The outputs of a whole pipeline.    x: (N, 3, H, W), normalised

    Contiguous: means in float32 follow the order of summation.
    """
    x = x.contiguous()
    found = {"clip_NxCxHxW": x, "per_frame_channel_means": x.mean((2, 3)),
             "row_means": x.mean((0, 1, 3))}
    units = {"clip_NxCxHxW": (1 / STD)[:, None, None], "per_frame_channel_means": 1 / STD,
             "row_means": (1 / STD).mean()}
    return {k: Tensorised(v, units[k], hue) for k, v in found.items()} if tensor else found


def frames_of(case):
    """The case's frames, (n, 3, h, w) uint8."""
    (frames,) = case.inputs().values()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def scale(case):
    """To a size (w, h), or the short side to an integer; nearest unless the case says otherwise."""
    c, x = case.config, frames_of(case)
    if not c.get("interpolation", "NEAREST").startswith("NEAREST"):
        size = c["size_wh"][::-1] if "size_wh" in c else [c["size"]]
        return image_outputs(cpctrans.TF.resize(x, size), tensor=True)
    width, height = c["size_wh"]
    rows, columns = (cpctrans.resize_nearest(torch.arange(n).expand(1, 1, n, n), want)[0, 0, 0]
                     for n, want in ((x.shape[2], height), (x.shape[3], width)))
    return image_outputs(x[..., rows[:, None], columns])


def short_side(case):
    """By the reader of frames, whose crop is 14/15 of the side."""
    c, frames = case.config, frames_of(case).permute(0, 2, 3, 1).numpy()
    side = int(re.search(r"shorter side to (\d+)", case.what)[1])
    with mock.patch.object(common, "read_frames", lambda *_: frames):
        out = cpctrans.read_frames(video(len(frames)), np.arange(len(frames)), -(-side * 14 // 15))
    assert out.shape[:1:-1] == tuple(c["out_wh"]), out.shape
    return image_outputs(out)


def center_crop(case):
    x, size = frames_of(case), case.config["size"]
    places = torch.stack(torch.meshgrid(*map(torch.arange, x.shape[2:]), indexing="ij"))
    top, left = cpctrans.TF.center_crop(places[None], [size])[0, :, 0, 0].tolist()
    assert [left, top] == case.config.get("expected_xy", [left, top])
    return image_outputs(cpctrans.TF.center_crop(x, [size]))


def random_sized_crop(case):
    """Where ten tries find no box: ten of four times the area."""
    c = case.config
    size = c.get("size") or int(re.search(r"resize to (\d+)", case.what)[1])
    draws = Draws(uniform=[4.0, 1.0], random=[1.0])
    if "area_fraction" in c:
        draws = Draws(uniform=[c["area_fraction"], c["aspect"]],
                      random=[0.0 if c["swap_wh"] else 1.0], integers=[c["x"], c["y"]])
    with mock.patch.object(cpctrans.TF, "resized_crop", wraps=cpctrans.TF.resized_crop) as spy:
        out = cpctrans.random_sized_crop(frames_of(case), draws, size)
    if spy.call_args:
        height, width = spy.call_args.args[3:5]
        assert [width, height] == c.get("crop_wh", [width, height])
    return image_outputs(out, tensor=True)


def pretrain_clip(args, frames, draws):
    """A pre-training sample of these frames as the network gets it: (N, 3, S, S)."""
    args.num_frames = len(frames)
    with reading(lambda *_: frames):
        sample = cpctrans.make_pretrain_clip(args, [video(len(frames))], 0, draws)
    batch = {k: torch.as_tensor(v)[None] for k, v in sample.items()}
    return cpctrans.jitter_batch(batch, CPU)[0]


def tiled(case, flip=1.0, grey=(1.0, 0)):
    """Flip and grey channels by pre-training's own code, without jitter.

    That code cuts squares, so a frame goes through it in overlapping ones.
    """
    frames = frames_of(case)
    n, _, h, w = frames.shape
    side, out = min(h, w), np.zeros(frames.shape)
    args = arguments(case, "none", "--img_dim", str(side), "--crop", str(side))
    for y, x in itertools.product(*(sorted({*range(0, size - side, side), size - side})
                                    for size in (h, w))):
        draws = Draws(random=[flip, np.full(n, 1.0) * grey[0]],
                      integers=[0, x, y, np.full(n, 0) + grey[1]],
                      uniform=[np.zeros((n, 4))], permutation=[-np.ones(4, int)])
        with mock.patch.object(cpctrans.TF, "normalize", lambda x, *_: x):
            tile = pretrain_clip(args, frames, draws)
        out[..., y:y + side, x:x + side] = (tile * 255).double().round()
    return image_outputs(out)


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
    c, x = case.config, frames_of(case) / 255
    n = len(x)
    if "factor" in c:
        word = re.match(r"(brightness|contrast|saturation|hue) factor", case.what)
        what = OPERATIONS[word[1][0] if word else case.id[-1]]
        factors, order = torch.ones(n, 4), -torch.ones(n, 4, dtype=torch.long)
        factors[:, what], order[:, 0] = c["factor"], what
    else:
        each = [c.get(f"frame{i}", c) for i in range(n)]
        factors = torch.tensor([e["factors"] for e in each])
        order = torch.tensor([[OPERATIONS[word[0]] for word in e["order"]] for e in each])
    x = cpctrans.jitter(x, factors, order)
    return image_outputs(x * 255, tensor=True, hue=bool((order == HUE).any()))


def size_of(case):
    """Side of the network's frames, and of the crop that they are scaled from."""
    to = re.search(r"resize to (\d+)", case.what) or re.search(r"_(\d+)(?:_|$)", case.id)
    crop = re.search(r"crop (\d+)", case.what)
    return ["--img_dim", str(case.config.get("img_dim") or to[1]), "--crop", crop[1]]


def pipeline_pretrain(case):
    c, frames = case.config, frames_of(case)
    channels = [re.search(r"\d", x)[0] if x else None for x in c["gray"]]
    order = [np.array([OPERATIONS[word[0]] for word in words]) for words in c["jitter_order"]]
    draws = Draws(
        random=[0.0 if c["flip"] else 1.0, np.array([1.0 if x is None else 0.0 for x in channels])],
        integers=[0, *c["crop_xy"], np.array([int(x or 0) for x in channels])],
        uniform=[np.array(c["jitter_bcsh"]) - (1, 1, 1, 0)], permutation=order)
    args = arguments(case, "none", *size_of(case))
    return clip_outputs(pretrain_clip(args, frames, draws), tensor=True, hue=True)


def pipeline_test(case):
    frames, args = frames_of(case), arguments(case, "none", *size_of(case))
    args.num_frames, args.stride = len(frames), 1
    with reading(lambda *_: frames):
        clip = cpctrans.make_middle_clip(args, [video(len(frames))], 0)["clip"]
    return clip_outputs(cpctrans.normalize(clip))


def end_to_end_test_video(case):
    """From a folder of frames, stored without loss under the names of the release."""
    from PIL import Image
    args, model = whole(case)
    folder = case.folder / "Class" / "v_Class_g01_c01"
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames_of(case).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(frame).save(folder / f"image_{i + 1:05d}.jpg", "PNG")
    video = cpctrans.Video("Class/v_Class_g01_c01", 0, path=folder)
    length, error = cpctrans.count_frames(args, [video], 0, None)
    assert (length, error) == (case.config["frames"], "")
    sample = cpctrans.make_test_clips(args, [video._replace(length=length)], 0)
    clips = cpctrans.normalize(sample["clips"])
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
    "end_to_end_test_video": end_to_end_test_video}
ADAPTERS |= {f"upstream_#l#h_{family}": adapter for family, adapter in ADAPTERS.items()}
