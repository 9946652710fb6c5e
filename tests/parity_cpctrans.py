"""Adapters of the parity tests for CPCTrans: {family: function of a Case to its outputs}.

Weights are written as a checkpoint of the release and loaded by the functions behind --init. Frames
go through the functions that make samples, with the case's draws as random numbers. The release has
parts that it never calls: where an output counts them, the case's tensors are added to ours.
"""

import itertools
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from parity_tools import Tensorised, own_names, parameters_of, watch
from PIL import Image
from torch import nn

import common
import cpctrans
from cpctrans import BRIGHTNESS, CONTRAST, HUE, SATURATION

OPERATIONS = {"b": BRIGHTNESS, "c": CONTRAST, "s": SATURATION, "h": HUE}
STD = torch.tensor(common.IMAGENET[1], dtype=torch.float64)


def draws(**queues):
    """A random generator that returns these draws, again and again, per method."""
    return mock.Mock(**{f"{k}.side_effect": itertools.cycle(v) for k, v in queues.items()})


# ---- weights and networks ------------------------------------------------------------------------

# Of a part of the network on its own: the transformer, and the GRU under its two names.
PARTS = [[(r"^(transEncoder|cell_list\.0|ConvGRUCell_00)\.", "")]]


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
    path = case.checkpoint()
    args, last = arguments(case, path), case.entries().get("final_fc.1.weight")
    model = cpctrans.Classifier(args, last[0]) if last else cpctrans.CPC(args)
    common.load_weights(model, path, cpctrans.LAYOUTS)
    return args, model


def settings(case, within=""):
    """What the names and shapes of a checkpoint with this state say of the network."""
    return cpctrans.read_settings(case.checkpoint({
        within + k: torch.zeros(()).expand(shape) for k, shape in case.entries().items()}))


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


def usual(case, has):
    """The case of a whole network of the release's kind with this tensor and most classes."""
    fitting = [c for c in case.others() if {has, "backbone.conv1.weight"} <= set(c.entries())
               and all(settings(c)[k] == cpctrans.NETWORK[k] for k in ("net", "layers"))]
    return max(fitting, key=lambda c: c.entries().get("final_fc.1.weight", [0])[0])


# ---- parts of the network ------------------------------------------------------------------------

def backbone(case):
    made = settings(case, "backbone.")
    network = case.load(common.PredictiveResNet(made["net"], made["width"])).train(case.training())
    names = ("bn1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    maps = watch({k: getattr(network, k) for k in names})
    with torch.no_grad():
        features = network(case.input("x"))
    return {"features": features, **{f"{k}_out": v[0] for k, v in maps.items()},
            **network.state_dict()}


def layernorm(case):
    eps = {"eps": case.config["eps"]} if "eps" in case.config else {}
    return {"y": case.load(cpctrans.LayerNorm(case.entries()["a_2"][0], **eps))(case.input("x"))}


def attention(case):
    x = case.input("x")
    module = case.load(cpctrans.Attention(x.shape[-1], case.config["h"])).eval()
    weights = watch({"weights": module.dropout})["weights"]
    return {"y": module(x), "attention": weights[0]}


def feedforward(case):
    hidden, d = case.entries()["w_1.weight"]
    layer = with_hidden(cpctrans.EncoderLayer(d, 1), d, hidden)
    return {"y": case.load(layer.feed_forward).eval()(case.input("x"))}


def with_hidden(layer, d, hidden):
    """A layer of the transformer whose hidden layer has a case's size."""
    layer.feed_forward.w_1, layer.feed_forward.w_2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
    return layer


def encoder(case):
    c, x = case.config, case.input("x")
    module = cpctrans.Encoder(x.shape[-1], c["h"], c["N"])
    for layer in module.layers:
        with_hidden(layer, x.shape[-1], c["d_ff"])
    case.load(module, PARTS).eval()

    def tokens(x):                                            # each a frame of one cell
        return module(x[..., None, None])[..., 0, 0]
    with torch.no_grad():
        return {"y": tokens(x), "y_of_reversed_tokens_reversed_back": tokens(x.flip(1)).flip(1)}


def positional_table(case):
    table = cpctrans.sinusoids(case.config["d_model"], case.config["max_len"])
    return {"pe": table[None], **{f"row_{n}": row for n, row in enumerate(table)}}


def convgru(case):
    x, given = case.input("x"), len(case.inputs()) > 1        # x: (B, T, D, S, S)
    module = case.load(cpctrans.ConvGRU(x.shape[2]), PARTS).eval()
    h = case.input("h")[0] if given else torch.zeros_like(x[:, 0])
    states = [h := module(frame, h) for frame in x.unbind(1)]
    assert given or torch.equal(module.last_state(x), h)
    return {"outputs": torch.stack(states, 1), "last_states": h[:, None]}


def prediction_loop(case):
    """The original's last state is one step of the GRU past the last prediction."""
    h, model = case.input("hidden"), nn.Module()
    d, model.pred_step = h.shape[1], case.config["pred_step"]
    model.agg = cpctrans.ConvGRU(d)
    model.network_pred = nn.Sequential(nn.Conv2d(d, d, 1), nn.ReLU(), nn.Conv2d(d, d, 1))
    states = watch({"agg": case.load(model, cpctrans.LAYOUTS).eval().agg})["agg"]
    pred = cpctrans.CPC.predict(model, h)
    return {"pred": pred, "final_hidden": model.agg(F.relu(pred[:, -1]), [h, *states][-1])}


# ---- whole networks and losses -------------------------------------------------------------------

def kinds_of(B, P, M):
    """The original's category of each pair, (B, P, M, B, P, M), and the positive column per row."""
    cells = torch.arange(B * P * M)
    wrong = cpctrans.wrong_kinds(cells, cells[:, None], (B, P, M))
    kinds = torch.ones(len(cells), len(cells), dtype=torch.int64)
    for kind, code in (("wrong_time", -1), ("wrong_cell", -3), ("wrong_video", 0)):
        kinds[wrong[kind]] = code
    return kinds.view(B, P, M, B, P, M), (kinds == 1).int().argmax(1)


def mask(case):
    c = case.config
    kinds, target = kinds_of(c["batch"], c["pred_step"], c["last_size"] ** 2)
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
    c, (args, model), adam = case.config, whole(case), case.config["Adam"]
    args.lr, args.weight_decay = adam["lr"], adam["weight_decay"]
    args.train_what = "ft" if "slow_lr" in adam else "all"
    optimizer = cpctrans.make_optimizer(args, model)
    for group in optimizer.param_groups:
        group["lr"] = adam["lr"] * group["scale"]
        group.update({k: adam[k] for k in ("betas", "eps") if k in adam})
    rates = [g["lr"] for g in optimizer.param_groups]
    assert np.isclose(min(rates), adam.get("slow_lr", adam["lr"]), rtol=1e-9), rates
    clips, losses, top1 = case.in_order(), [], []
    without_dropout(model).train()
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
    """How many names both files have, and how many go from one to the other.

    Ours go by `load_init`; of the names that our network lacks, those that both files have.
    """
    first, second = (usual(case, k) for k in ("network_pred.0.weight", "final_fc.1.weight"))
    pretrained, (args, model) = whole(first)[1], whole(second)
    args.init, load, filled = first.checkpoint(), common.load_weights, set()
    with mock.patch.object(common, "load_weights", lambda *a, **k: filled.update(load(*a, **k))):
        cpctrans.load_init(args, model)
    ours = own_names(first, cpctrans.LAYOUTS, model.state_dict())
    shared = {k for k, own in ours.items() if own in filled}
    shared |= set(unused(first, pretrained)) & set(unused(second, model))
    assert set(first.entries()) - shared == set(case.config["pretrain_keys_unused"])
    random = set(model.state_dict()) - filled
    assert random == set(case.config["classifier_keys_left_at_init"])
    return {"counts_pretrain_classifier_shared": [
        len(first.entries()), len(second.entries()), len(shared)]}


# ---- evaluation, schedules, lists ----------------------------------------------------------------

def video_aggregation(case):
    clips = [cpctrans.aggregate(x.flatten(0, -2)) for x in case.in_order()]
    prob, logits = (torch.stack(x) for x in zip(*clips))
    times = case.told(r"\((\d+)\*v\) mod num_class")
    label = times * torch.arange(len(clips)) % case.config["num_class"]
    metrics, confusion = cpctrans.video_metrics(prob, logits, label)
    agree = prob.argmax(1) == logits.argmax(1)
    return {"mean_softmax": prob, "top1_top5": [metrics["top1"] / 100, metrics["top5"] / 100],
            "loss_avg": metrics["loss"], "confusion_rows_pred_cols_target": confusion,
            "argmax_of_mean_logits": logits.argmax(1),
            "videos_where_both_argmax_agree": agree.sum()}


def video(length):
    return cpctrans.Video("Class/video", 0, length)


def clip_indices(case):
    """The frames of a training clip are their numbers here."""
    out, args = {}, arguments(case)
    for row in case.config["cases"]:
        length, args.num_frames, args.stride = row["vlen"], row["num_seq"], row["ds"]
        with mock.patch.object(cpctrans, "read_frames", lambda _, numbers, crop: numbers):
            first, last = (
                cpctrans.read_random_clip(args, video(length), mock.Mock(integers=draw))
                for draw in (lambda high: 0, lambda high: high - 1))
        key = f"vlen{length}_n{args.num_frames}_ds{args.stride}"
        out |= {f"{key}_kept": int(length > cpctrans.frames_needed(args)),
                f"{key}_test_frame_numbers_1based": cpctrans.consecutive_clips(args, length) + 1,
                f"{key}_train_first_and_last_possible_start": [first[0].item(), last[0].item()],
                f"{key}_train_frame_numbers_of_last_start_1based": last + 1}
    return out


def lr_schedules(case):
    """The release counts epochs of pre-training from 1."""
    c, args, out = case.config, arguments(case), {}
    first, last = case.told(r"epochs (\d+)\.\.(\d+).*finetuning")
    source = usual(case, "final_fc.1.weight")
    tuning, model = whole(source)
    ours = {g["scale"]: sum(p.numel() for p in g["params"])
            for g in cpctrans.make_optimizer(tuning, model).param_groups}
    for key in case.case["outputs"]:
        at = re.fullmatch(r"(pretrain|finetune)_(?:(slow|fast)_)?lr(?:_at_(?:epochs_)?([\d_]+))?",
                          key)
        if at:
            args.stage, args.lr = at[1], c[at[1]]["lr"]
            epochs = np.array(at[3].split("_") if at[3] else range(first, last + 1), int)
            epochs -= first if args.stage == "pretrain" else 0
            with mock.patch.dict(cpctrans.SCHEDULE, {args.stage: c[args.stage]["StepLR"]}):
                rates = np.array([cpctrans.learning_rate(args, e, 1) for e in epochs])
            out[key] = rates * (min(ours) if at[2] == "slow" else max(ours))
    dead = {k: int(np.prod(s)) for k, s in parameters_of(unused(source, model)).items()}
    starts = tuple(c["finetune"].get("slow_prefixes", ("backbone", "transEnc")))
    slow = ours[min(ours)] + sum(n for k, n in dead.items() if k.startswith(starts))
    return {**out, "slow_params_total_params": [slow, sum(ours.values()) + sum(dead.values())]}


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


def clip_outputs(x, tensor=False):
    """The outputs of a whole pipeline.    x: (N, 3, H, W), normalised

    Contiguous: means in float32 follow the order of summation.
    """
    x = x.contiguous()
    found = {"clip_NxCxHxW": x, "per_frame_channel_means": x.mean((2, 3)),
             "row_means": x.mean((0, 1, 3))}
    units = {"clip_NxCxHxW": (1 / STD)[:, None, None], "per_frame_channel_means": 1 / STD,
             "row_means": (1 / STD).mean()}
    return {k: Tensorised(v, units[k], hue=True) for k, v in found.items()} if tensor else found


def frames_of(case):
    """The case's frames, (n, 3, h, w) uint8."""
    return case.input().permute(0, 3, 1, 2)


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
    frames, side = case.input().numpy(), case.told(r"shorter side to (\d+)")
    with mock.patch.object(common, "read_frames", lambda *_: frames):
        return image_outputs(cpctrans.read_frames(
            video(len(frames)), np.arange(len(frames)), -(-side * 14 // 15)))


def center_crop(case):
    return image_outputs(cpctrans.TF.center_crop(frames_of(case), [case.config["size"]]))


def random_sized_crop(case):
    """Where ten tries find no box: ten of four times the area."""
    c = case.config
    size = c.get("size") or case.told(r"resize to (\d+)")
    rng = draws(uniform=[4.0, 1.0], random=[1.0])
    if "area_fraction" in c:
        rng = draws(uniform=[c["area_fraction"], c["aspect"]],
                    random=[0.0 if c["swap_wh"] else 1.0], integers=[c["x"], c["y"]])
    return image_outputs(cpctrans.random_sized_crop(frames_of(case), rng, size), tensor=True)


def pretrain_clip(args, frames, rng):
    """A pre-training sample of these frames as the network gets it: (N, 3, S, S)."""
    args.num_frames = len(frames)
    with mock.patch.object(cpctrans, "read_frames", lambda *_: frames):
        sample = cpctrans.make_pretrain_clip(args, [video(len(frames))], 0, rng)
    batch = {k: torch.as_tensor(v)[None] for k, v in sample.items()}
    return cpctrans.jitter_batch(batch, torch.device("cpu"))[0]


def flip_and_grey(case, flip=1.0, grey=(1.0, 0)):
    """By pre-training's own code, without jitter. It cuts squares: frames are extended to them."""
    frames = frames_of(case)
    n, _, h, w = frames.shape
    side = max(h, w)
    args = arguments(case, "none", "--img_dim", str(side), "--crop", str(side))
    rng = draws(random=[flip, np.full(n, 1.0) * grey[0]], uniform=[np.zeros((n, 4))],
                integers=[0, 0, 0, np.full(n, 0) + grey[1]], permutation=[-np.ones(4, int)])
    with mock.patch.object(cpctrans.TF, "normalize", lambda x, *_: x):
        out = pretrain_clip(args, F.pad(frames, (0, side - w, 0, side - h)), rng)
    left = side - w if flip < 0.5 else 0
    return image_outputs((out * 255).double().round()[..., :h, left:left + w])


def flip(case):
    return flip_and_grey(case, flip=case.told(r"draw ([\d.]+)", float))


def random_gray(case):
    """The channels stand in words, frame by frame; where there is none, any would do."""
    words = dict(re.findall(r"frame (\d+) (?:replaced )?by (?:its )?channel (\d)", case.what))
    draws = np.array(case.config["draws"])
    channels = np.array([int(words.get(str(i), 0)) for i in range(len(draws))])
    return flip_and_grey(case, grey=(draws, channels))


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
    c = case.config
    channels = [re.search(r"\d", x)[0] if x else None for x in c["gray"]]
    order = [np.array([OPERATIONS[word[0]] for word in words]) for words in c["jitter_order"]]
    rng = draws(
        random=[0.0 if c["flip"] else 1.0, np.array([1.0 if x is None else 0.0 for x in channels])],
        integers=[0, *c["crop_xy"], np.array([int(x or 0) for x in channels])],
        uniform=[np.array(c["jitter_bcsh"]) - (1, 1, 1, 0)], permutation=order)
    args = arguments(case, "none", *size_of(case))
    return clip_outputs(pretrain_clip(args, frames_of(case), rng), tensor=True)


def pipeline_test(case):
    frames, args = frames_of(case), arguments(case, "none", *size_of(case))
    args.num_frames, args.stride = len(frames), 1
    with mock.patch.object(cpctrans, "read_frames", lambda *_: frames):
        clip = cpctrans.make_middle_clip(args, [video(len(frames))], 0)["clip"]
    return clip_outputs(cpctrans.normalize(clip))


def end_to_end_test_video(case):
    """From a folder of frames, stored without loss under the names of the release."""
    args, model = whole(case)
    folder = case.folder / "Class" / "v_Class_g01_c01"
    folder.mkdir(parents=True)
    for i, frame in enumerate(case.input().numpy()):
        Image.fromarray(frame).save(folder / f"image_{i + 1:05d}.jpg", "PNG")
    video = cpctrans.Video("Class/v_Class_g01_c01", 0, path=folder)
    length, _ = cpctrans.count_frames(args, [video], 0, None)
    sample = cpctrans.make_test_clips(args, [video._replace(length=length)], 0)
    clips = cpctrans.normalize(sample["clips"])
    with torch.no_grad():
        logits = model.eval()(clips)
    prob, _ = cpctrans.aggregate(logits)
    return {"clips": clips, "logits": logits[:, None], "mean_softmax": prob[None],
            "argmax": prob.argmax()}


ADAPTERS = {f.__name__: f for f in (
    backbone, layernorm, attention, feedforward, encoder, positional_table, convgru,
    prediction_loop, mask, loss_topk, pretrain_full, future_is_visible, classifier,
    weights_transfer, video_aggregation, clip_indices, lr_schedules, meter, parse_ucf101,
    parse_hmdb51, parse_frame_csv, scale, short_side, center_crop, random_sized_crop, flip,
    random_gray, color_jitter, pipeline_pretrain, pipeline_test, end_to_end_test_video)}
ADAPTERS |= {"train#_pretrain": steps, "train#_finetune": steps}
ADAPTERS |= {f"upstream_#l#h_{family}": adapter for family, adapter in ADAPTERS.items()}
