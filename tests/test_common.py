"""What common.py promises, apart from reading videos: order of samples, checkpoints, weights,
annotation files, evaluation and processes.
"""

import argparse
import json
import os
import re
from functools import partial

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
    return {"index": i, "item": items[i], "random": rng.random(), "extra": sum(extra)}


def drawn(args, items, start, steps, **how):
    """[[index of a sample]] of the batches of some steps."""
    dataset = common.Samples(args, items, number)
    return [batch["index"].tolist() for batch in common.batches(
        args, dataset, torch.device("cpu"), start, steps, **how)]


def test_an_epoch_is_a_permutation_without_its_last_partial_batch():
    epochs = np.array(drawn(flags(), range(11), 0, 6)).reshape(3, 8)
    assert all(len({*epoch}) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn(flags(seed=1), range(11), 0, 1) != drawn(flags(), range(11), 0, 1)
    assert drawn(flags(), range(11), 3, 6) == drawn(flags(), range(11), 0, 6)[3:]
    with pytest.raises(UserError, match="3 training samples do not fill a batch of 4"):
        drawn(flags(), range(3), 0, 1)


def test_a_plan_of_batch_sizes_goes_through_all_samples_without_a_gap():
    plan = [(4, 1), (2, 5), (6, 0), (4, 2), (4, 3)]
    batches = drawn(flags(), range(10), 0, 5, plan=plan)
    assert [len(b) for b in batches] == [4, 2, 6, 4, 4]
    first, second = np.split(np.concatenate(batches), 2)
    assert {*first} == {*second} == {*range(10)}
    assert drawn(flags(), range(10), 2, 5, plan=plan) == batches[2:]
    dataset = common.Samples(flags(), range(10), number)
    batch = next(iter(common.batches(flags(), dataset, torch.device("cpu"), 1, 5, plan=plan)))
    assert batch["extra"].tolist() == [5, 5]


def share_of_rank(rank):
    return drawn(flags(), range(11), 0, 4)


def test_processes_take_the_parts_of_the_same_batches(tmp_path):
    parts = running.processes(share_of_rank, 2, tmp_path)
    assert [a + b for a, b in zip(*parts)] == drawn(flags(), range(11), 0, 4)


def test_a_sample_depends_on_seed_epoch_and_number_alone():
    dataset = common.Samples(flags(), range(9), number)
    assert dataset[3, 5] == dataset[3, 5] and dataset[3, 5]["random"] != dataset[4, 5]["random"]
    assert dataset[5] == dataset[5] and "broken" not in dataset[5]
    assert dataset[3, 5]["random"] != common.Samples(flags(seed=1), range(9), number)[3, 5]["random"]


def test_a_broken_sample_is_replaced_in_training_alone():
    def make(args, items, i, rng):
        if i % 2:
            raise VideoError(f"{i}.mp4: broken")
        return {"index": i}

    dataset = common.Samples(flags(), range(6), make)
    sample = dataset[0, 3]
    assert sample == dataset[0, 3] and sample["index"] % 2 == 0
    assert sample["broken"].startswith("3.mp4: broken")
    with pytest.raises(VideoError, match=r"^3\.mp4: broken$"):
        dataset[3]
    with pytest.raises(VideoError, match="20 samples in a row"):
        common.Samples(flags(), [1, 3], lambda a, items, i, rng: make(a, items, 1, rng))[0, 0]


def test_a_limit_is_spread_evenly():
    assert common.spread(range(10), None) == common.spread(range(10), 12) == [*range(10)]
    assert common.spread("abcdefgh", 4) == ["a", "c", "e", "g"]
    assert len({*common.spread(range(101), 7)}) == 7


# ---- annotation files ----------------------------------------------------------------------------

def test_rows_are_parsed_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\ufeffname,size\nx,1\n\"y,\nz\",2\n")
    assert common.read_table(path, lambda r: (r["name"], int(r["size"]))) == [("x", 1), ("y,\nz", 2)]
    path.write_text("name,size\nx,1\ny,two\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:3: .*'two'"):
        common.read_table(path, lambda r: int(r["size"]))
    with pytest.raises(UserError, match=r"a\.csv:2: 'length' is missing"):
        common.read_table(path, lambda r: r["length"])
    path.write_text("")
    with pytest.raises(UserError, match=r"a\.csv"):
        common.read_table(path, str)
    with pytest.raises(UserError, match=r"b\.csv: no such file"):
        common.read_table(tmp_path / "b.csv", str)


def test_json_entries_are_parsed_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"clips": [{"n": 1}, {"n": 2}], "videos": {"a": {"n": 3}}}))
    assert common.read_json(path)["clips"][1] == {"n": 2}
    assert common.read_json(path, lambda e: e["n"], "clips") == [1, 2]
    assert common.read_json(path, lambda name, e: (name, e["n"]), "videos") == [("a", 3)]
    for parse, key, message in ((lambda e: e["m"], "clips", r"a\.json:0: 'm' is missing"),
                                (lambda name, e: int(name), "videos", r"a\.json:a: "),
                                (str, "films", r"a\.json: 'films' is missing")):
        with pytest.raises(UserError, match=message):
            common.read_json(path, parse, key)
    for content in (b"", b"{", b'{"a": "\xff"}'):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json: "):
            common.read_json(path)


def test_lines_are_parsed_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one 1\r\n\n  two 2")
    assert common.read_lines(path) == ["one 1", "two 2"]
    with pytest.raises(UserError, match=r"a\.txt:3: .*'two'"):
        common.read_lines(path, lambda line: int(line.replace("one ", "").split()[0]))


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
    path = tmp_path / "folder" / "a.txt"
    common.write(path, "old")

    def torn(f):
        f.write(b"half")
        raise OSError("disk full")
    with pytest.raises(Exception, match="disk full"):
        common.write(path, torn)
    assert path.read_text() == "old"
    common.write(path, b"new")
    common.write_json(tmp_path / "b.json", {"x": 1.5})
    assert path.read_text() == "new" and json.loads((tmp_path / "b.json").read_text()) == {"x": 1.5}


def test_a_run_continues_only_as_it_began(tmp_path, alone):
    args, model = flags(out=tmp_path, lr=0.1, data=tmp_path / "data"), nn.Linear(2, 3)
    path, optimizer = tmp_path / "last.pt", torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    assert common.resume(path, args, 9, model=model) == {"step": 0}
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    common.save(path, 7, args, samples=9, model=model, optimizer=optimizer, best=1.5)
    other = nn.Linear(2, 3)
    again = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    saved = common.resume(path, args, 9, model=other, optimizer=again)
    assert saved["step"] == 7 and saved["best"] == 1.5 and torch.equal(other.weight, model.weight)
    assert again.state_dict()["state"][0]["momentum_buffer"].equal(
        optimizer.state_dict()["state"][0]["momentum_buffer"])
    args.workers, args.data = 3, tmp_path
    common.resume(path, args, 9, model=other)                 # these may change
    for change, words in (({"lr": 0.2}, r"was made with lr 0\.1, now it is 0\.2"),
                          ({}, "samples 9, now it is 8")):
        with pytest.raises(UserError, match=words):
            common.resume(path, flags(**{**vars(args), **change}), 9 if change else 8, model=other)
    common.resume(path, flags(**{**vars(args), "lr": 0.2}), 9, free=["lr"], model=other)
    with pytest.raises(UserError, match="another network"):
        common.resume(path, args, 9, model=nn.Linear(2, 4))
    model.weight.data[0] = torch.nan
    with pytest.raises(UserError, match=r"weight is not finite"):
        common.save(path, 8, args, model=model)
    assert common.load_checkpoint(path)["step"] == 7


def network():
    return nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 4)})


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x, "epoch": 3},
                                  lambda x: {"state_dict": {f"module.{k}": v for k, v in x.items()}},
                                  lambda x: {"model_state": x, "cfg": "text"}])
def test_weights_are_found_in_any_wrapper(tmp_path, wrap, capsys):
    source, target, path = network(), network(), tmp_path / "a.pt"
    torch.save(wrap(source.state_dict()), path)
    assert common.load_weights(target, path) == {*source.state_dict()}
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())
    assert "4 tensors loaded, 0 of the file not used" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_refused(tmp_path, capsys):
    path, state = tmp_path / "a.pt", network().state_dict()
    renamed = {k.replace("body", "backbone.0").replace("head", "fc"): v for k, v in state.items()}
    torch.save(renamed, path)
    with pytest.raises(UserError, match=r"a\.pt: 4 tensors are missing"):
        common.load_weights(network(), path)
    layouts = (), ((r"^backbone\.0\.", "body."),)
    with pytest.raises(UserError, match=r"2 tensors are missing, such as head\."):
        common.load_weights(network(), path, layouts)
    target = network()
    assert common.load_weights(target, path, layouts, required=["body."]) == {
        "body.weight", "body.bias"}
    assert torch.equal(target["body"].weight, state["body.weight"])
    said = capsys.readouterr().out
    assert "2 of the file not used ['fc" in said and "2 of the network left random ['head" in said
    torch.save({**state, "head.weight": torch.zeros(5, 3)}, path)
    with pytest.raises(UserError, match="1 tensors have another shape, such as head.weight"):
        common.load_weights(network(), path)
    common.load_weights(target, path, skip=["head."])
    torch.save({**state, "body.bias": torch.full((3,), torch.inf)}, path)
    with pytest.raises(UserError, match="1 tensors are not finite, such as body.bias"):
        common.load_weights(network(), path)
    for content in (b"", b"no checkpoint", b"PK\3\4 damaged"):
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
        log, total = common.Log(flags(out=tmp_path, log_every=2), start, stop), 0
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

def predicted(rank):
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
            "sum": common.sum_processes(torch.tensor([rank + 1.]))}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_item_is_predicted_once_and_all_processes_get_all(tmp_path, n):
    parts = running.processes(predicted, n, tmp_path)
    assert sum(p["seen"] for p in parts) == 7 and all(p["seen"] for p in parts)
    for r, p in enumerate(parts):
        assert p["twice"].flatten().tolist() == [0, 2, 4, 6, 8, 10, 12]
        assert [len(x) for x in p["rows"]] == [1, 2, 3, 1, 2, 3, 1]
        assert p["sum"].item() == n * (n + 1) / 2
        right = torch.cat([torch.arange(6.).view(3, 2) + 10 * k for k in range(n)], 1)
        assert torch.equal(p["y"], right)
        assert torch.equal(p["grad"], torch.full((3, 2), n * (n + 1) / 2))


def test_gather_refuses_a_missing_result(alone):
    assert [*common.gather({1: "b", 0: "a"}, 2).items()] == [(0, "a"), (1, "b")]
    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        common.gather({0: "a"}, 2)
