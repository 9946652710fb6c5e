"""What common.py promises, apart from reading videos: order of samples, checkpoints, weights,
annotation files, evaluation and processes.
"""

import argparse
import json
import re

import numpy as np
import pytest
import running
import torch
from torch import nn

import common
from common import UserError, VideoError


def flags(**values):
    return argparse.Namespace(**{"seed": 0, "workers": 0, "batch_size": 4, "precision": "fp32",
                                 "log_every": 1, "save_every": 1, "stage": "x", **values})


@pytest.fixture
def alone():
    """A process group of one, as start_run makes it."""
    common.init_distributed()
    yield
    torch.distributed.destroy_process_group()


# ---- samples -------------------------------------------------------------------------------------

def number(args, items, i, rng, *extra):
    if items[i] == "broken":
        raise VideoError(f"{i}.mp4: broken")
    return {"index": i, "random": rng.random(), "extra": sum(extra)}


def samples(items, **how):
    return common.Samples(flags(**how), items, number)


def drawn(items, start, steps, plan=None, **how):
    """[[index of a sample]] of the batches of some steps."""
    return [batch["index"].tolist() for batch in common.batches(
        flags(**how), samples(items, **how), torch.device("cpu"), start, steps, plan=plan)]


def test_an_epoch_is_a_permutation_without_its_last_partial_batch():
    epochs = np.array(drawn(range(11), 0, 6)).reshape(3, 8)
    assert all(len({*epoch}) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn(range(11), 0, 1, seed=1) != drawn(range(11), 0, 1)
    assert drawn(range(11), 3, 6) == drawn(range(11), 0, 6)[3:]


def test_a_plan_of_batch_sizes_goes_through_all_samples_without_a_gap():
    plan = [(4, 1), (2, 5), (6, 0), (4, 2), (4, 3)]
    batches = drawn(range(10), 0, 5, plan)
    assert [len(b) for b in batches] == [4, 2, 6, 4, 4]
    first, second = np.split(np.concatenate(batches), 2)
    assert {*first} == {*second} == {*range(10)}
    assert drawn(range(10), 2, 5, plan) == batches[2:]
    batch = next(iter(common.batches(flags(), samples(range(10)), torch.device("cpu"), 1, 5,
                                     plan=plan)))
    assert batch["extra"].tolist() == [5, 5]


def test_a_sample_depends_on_seed_epoch_and_number_alone():
    data = samples(range(9))
    assert data[3, 5] == data[3, 5] and data[5] == data[5] and "broken" not in data[5]
    others = data[3, 5], data[4, 5], data[3, 6], samples(range(9), seed=1)[3, 5]
    assert len({sample["random"] for sample in others}) == 4


def test_a_broken_sample_is_replaced_in_training_alone():
    data = samples(["whole", "broken"] * 3)
    sample = data[0, 3]
    assert sample == data[0, 3] and sample["index"] % 2 == 0
    assert sample["broken"].startswith("3.mp4: broken")
    with pytest.raises(VideoError, match=r"^3\.mp4: broken$"):
        data[3]
    with pytest.raises(VideoError, match="20 samples in a row"):
        samples(["broken"] * 2)[0, 0]


def test_a_limit_is_spread_evenly():
    assert common.spread(range(10), None) == common.spread(range(10), 12) == [*range(10)]
    assert common.spread("abcdefgh", 4) == ["a", "c", "e", "g"]
    assert len({*common.spread(range(101), 7)}) == 7


# ---- annotation files ----------------------------------------------------------------------------

LISTS = {
    "table": lambda path: common.read_table(path, lambda row: (row["name"], int(row["size"]))),
    "clips": lambda path: common.read_json(path, lambda clip: int(clip["size"]), "clips"),
    "named": lambda path: common.read_json(path, lambda k, v: (k, int(v["size"])), "clips"),
    "lines": lambda path: common.read_lines(path, lambda line: int(line.split()[1]))}


@pytest.mark.parametrize("kind, content, result", [
    ("table", b'\xef\xbb\xbfname,size\nx,1\n"y,\nz",2\n', [("x", 1), ("y,\nz", 2)]),
    ("clips", b'{"clips": [{"size": 1}, {"size": 2}]}', [1, 2]),
    ("named", b'{"clips": {"a": {"size": 3}}}', [("a", 3)]),
    ("lines", b"one 1\r\n\n  two 2", [1, 2]),
    ("table", b"name,size\nx,1\ny,two\n", ":3: .*'two'"),
    ("table", b"name\nx\n", ":2: 'size' is missing"),
    ("table", b"", ": "),
    ("clips", b'{"clips": [{"size": 1}, {"length": 2}]}', ":1: 'size' is missing"),
    ("named", b'{"clips": {"a": {"size": "two"}}}', ":a: .*'two'"),
    ("clips", b'{"films": []}', ": 'clips' is missing"),
    *(("clips", content, ": ") for content in (b"", b"{", b'{"clips": "\xff"}')),
    ("lines", b"one 1\n\ntwo b", ":3: .*'b'"),
    *((kind, None, ": no such file") for kind in LISTS)])
def test_lists_are_parsed_and_a_bad_row_is_named(kind, content, result, tmp_path):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    if isinstance(result, list):
        assert LISTS[kind](path) == result
    else:
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}{result}"):
            LISTS[kind](path)


def test_files_and_videos_are_found_below_a_folder(tmp_path):
    for name in ("b/list.txt", "a/list.txt", "v/x.MP4", "v/y.avi", "v/notes.txt", "w/x.mkv",
                 "v/z/frame.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert common.find(tmp_path, "no.txt", "list.txt") == tmp_path / "a/list.txt"
    assert common.find(tmp_path, "no.txt", required=False) is None
    with pytest.raises(UserError, match=r"no no\.txt or \*\.csv"):
        common.find(tmp_path, "no.txt", "*.csv")
    found = common.find_videos(tmp_path, "v", "w")
    assert found == {"x": tmp_path / "v/x.MP4", "y": tmp_path / "v/y.avi"}
    assert common.find_videos(tmp_path, "v", frames=True)["z"] == tmp_path / "v/z"
    assert common.find_videos(tmp_path, "nowhere") == {}


# ---- checkpoints ---------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def torn(f):
        f.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "folder" / "a.json"
    common.write_json(path, {"x": 1.5})
    with pytest.raises(Exception, match="disk full"):
        common.write(path, torn)
    assert json.loads(path.read_text()) == {"x": 1.5}
    common.write(path, b"new")
    assert path.read_text() == "new"


def test_a_run_continues_only_as_it_began(tmp_path, alone):
    args, model = flags(out=tmp_path, lr=0.1, data=tmp_path / "data"), nn.Linear(2, 3)
    path, other = tmp_path / "last.pt", nn.Linear(2, 3)
    assert common.resume(path, args, 9, model=model) == {"step": 0}
    common.save(path, 7, args, samples=9, model=model, best=1.5)
    args.workers, args.data = 3, tmp_path                     # these may change
    saved = common.resume(path, args, 9, model=other)
    assert saved["step"] == 7 and saved["best"] == 1.5 and torch.equal(other.weight, model.weight)
    with pytest.raises(UserError, match="samples 9, now it is 8"):
        common.resume(path, args, 8, model=other)
    with pytest.raises(UserError, match="another network"):
        common.resume(path, args, 9, model=nn.Linear(2, 4))
    args.lr = 0.2
    with pytest.raises(UserError, match=r"was made with lr 0\.1, now it is 0\.2"):
        common.resume(path, args, 9, model=other)
    common.resume(path, args, 9, free=["lr"], model=other)
    model.weight.data[0] = torch.nan
    with pytest.raises(UserError, match=r"weight is not finite"):
        common.save(path, 8, args, model=model)
    assert common.load_checkpoint(path)["step"] == 7


def network():
    return nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 4)})


@pytest.mark.parametrize("wrapped", [
    lambda x: x, lambda x: {"model": x, "epoch": 3}, lambda x: {"model_state": x, "cfg": "text"},
    lambda x: {"state_dict": {f"module.{k}": v for k, v in x.items()}}])
def test_weights_are_found_in_any_wrapper(wrapped, tmp_path, capsys):
    state, target = network().state_dict(), network()
    torch.save(wrapped(state), tmp_path / "a.pt")
    assert common.load_weights(target, tmp_path / "a.pt") == {*state}
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in state.items())
    assert "4 tensors loaded, 0 of the file not used" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_refused(tmp_path, capsys):
    path, state, target = tmp_path / "a.pt", network().state_dict(), network()
    layouts = (), ((r"^backbone\.0\.", "body."),)
    renamed = {k.replace("body", "backbone.0").replace("head", "fc"): v for k, v in state.items()}
    for tensors, layout, message in (
            (renamed, [()], r"a\.pt: 4 tensors are missing"),
            (renamed, layouts, r"2 tensors are missing, such as head\."),
            ({**state, "body.bias": torch.full((3,), torch.inf)}, [()],
             "1 tensors are not finite, such as body.bias"),
            ({**state, "head.weight": torch.zeros(5, 3)}, [()],
             "1 tensors have another shape, such as head.weight")):
        torch.save(tensors, path)
        with pytest.raises(UserError, match=message):
            common.load_weights(network(), path, layout)
    common.load_weights(target, path, skip=["head."])
    capsys.readouterr()
    torch.save(renamed, path)
    assert common.load_weights(target, path, layouts, ["body."]) == {"body.weight", "body.bias"}
    assert torch.equal(target["body"].weight, state["body.weight"])
    said = capsys.readouterr().out
    assert "2 of the file not used ['fc" in said and "2 of the network left random ['head" in said
    for content in (b"", b"PK\3\4 damaged"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pt: no checkpoint, damaged, or"):
            common.load_weights(network(), path)


def test_a_folder_keeps_to_what_it_was_made_with(tmp_path):
    common.claim(tmp_path, {"net": "a", "size": 3})
    common.claim(tmp_path, {"net": "a", "size": 3})
    with pytest.raises(UserError, match=r"about\.json: .*other settings \(size\)"):
        common.claim(tmp_path, {"net": "a", "size": 4})


def test_the_log_counts_and_forgets_steps_that_are_done_again(tmp_path, capsys, alone):
    def steps(start, stop):
        log = common.Log(flags(out=tmp_path, log_every=2), start, stop)
        batches = ({"x": torch.zeros(2), "broken": ["", "a.mp4: bad"]} for _ in range(stop))
        for step, batch in log.steps(batches):
            assert "broken" not in batch
            log(step, step == 0, loss=torch.tensor(float(step)))
        return log.total("broken")
    assert steps(0, 5) == 5 and "warning: a.mp4: bad; sample replaced" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"], r["broken"]) for r in rows] == [
        (0, 0, 1), (1, 1, 1), (3, 3, 2), (4, 4, 1)]
    assert steps(3, 5) == 4


# ---- processes -----------------------------------------------------------------------------------

def results(rank):
    """What one process predicts, gathers and draws."""
    dataset = common.Samples(flags(), range(7), lambda args, items, i, rng: {
        "x": torch.tensor([float(i)]), "n": i % 3 + 1, "name": f"item {i}"})
    seen = []

    def network(batch):
        seen.append(len(batch["x"]))
        return {"twice": 2 * batch["x"], "rows": [torch.ones(int(n)) for n in batch["n"]]}
    out = common.predict(flags(), torch.device("cpu"), dataset, network, "test", 2)
    x = torch.arange(6.).view(3, 2).add(10 * rank).requires_grad_()
    y = common.gather_rows(x, dim=1)
    (y * (rank + 1)).sum().backward()
    return {**out, "seen": sum(seen), "y": y.detach(), "grad": x.grad,
            "sum": common.sum_processes(torch.tensor([rank + 1.])).item(),
            "drawn": drawn(range(11), 0, 3, batch_size=6)}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_processes_share_the_items_and_all_get_all_results(n, tmp_path):
    parts = running.processes(results, n, tmp_path)
    assert sum(p["seen"] for p in parts) == 7 and all(p["seen"] for p in parts)
    for p in parts:
        assert p["twice"].flatten().tolist() == [0, 2, 4, 6, 8, 10, 12]
        assert [len(x) for x in p["rows"]] == [1, 2, 3, 1, 2, 3, 1]
        assert p["sum"] == n * (n + 1) / 2
        assert torch.equal(p["y"], torch.cat(
            [torch.arange(6.).view(3, 2) + 10 * k for k in range(n)], 1))
        assert torch.equal(p["grad"], torch.full((3, 2), n * (n + 1) / 2))
    batches = [sum(shares, []) for shares in zip(*(p["drawn"] for p in parts))]
    assert batches == drawn(range(11), 0, 3, batch_size=6)


def test_gather_refuses_a_missing_result(alone):
    assert [*common.gather({1: "b", 0: "a"}, 2).items()] == [(0, "a"), (1, "b")]
    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        common.gather({0: "a"}, 2)
