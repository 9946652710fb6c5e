"""A reference of `make bench` that computed something else would prove nothing; nor would a run
that overlooks what is wrong.
"""

import json

import bench as runner
import bench_media
import bench_steps
import measure
import numpy as np
import plain
import pytest
import torch

import common
import f2c_oops
import ssdet_coarsefine as ssdet


def quiet(model):
    """Without dropout, of whatever kind; in float64."""
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout) or hasattr(m, "reach"):
            m.p = 0.0
    return model.double()


def doubled(x):
    if not torch.is_tensor(x):
        return tuple(map(doubled, x))
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("stage", bench_steps.STAGES, ids=lambda s: s.name.replace(" ", "-"))
def test_a_plain_step_has_our_loss_and_our_gradient(stage, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)          # of the losses
    common.init_distributed(gpu=False)
    case = bench_steps.made(stage, True, 2)
    ours = quiet(case.model)
    if stage.name.startswith("replai"):
        ours.eval()                                           # else norms see other parts
    theirs, found = plain.plain(ours), []
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert any(type(a) is not type(b) for a, b in zip(ours.modules(), theirs.modules()))
    for model, loss in ((ours, case.loss), (theirs, case.plain_loss)):
        value = loss(model, *doubled(case.inputs))
        learned = [p for p in model.parameters() if p.requires_grad]
        found.append((value, *torch.autograd.grad(value, learned, allow_unused=True)))
    for a, b in zip(*found):
        a, b = (torch.zeros(()) if x is None else x.detach() for x in (a, b))
        assert (a - b).abs().max() <= 1e-6 * b.abs().max() + 1e-12


def test_attention_over_all_pairs_is_that_over_the_window():
    q, k, v = torch.randn(3, 2, 2, 70, 4, generator=torch.Generator().manual_seed(0)).unbind()
    seen = torch.arange(70) < torch.tensor([[70], [50]])
    assert torch.allclose(plain.attention(q, k, v, seen, 5),
                          f2c_oops.whole_attention(q, k, v, seen, 5), atol=1e-6)


@pytest.mark.parametrize("alone, pool", [(False, False), (True, False), (True, True)])
def test_a_filter_with_every_product_is_ours(alone, pool):
    torch.manual_seed(0)
    ours = ssdet.FusionFilter(3, 5, pool, alone, dropout=0.0).double()
    x, G, valid = torch.randn(2, 3, 6, 7, 7).double(), torch.rand(2, 6, 4).double(), torch.ones(
        2, 6).double()
    want = ours(x, G, valid)
    ours.__class__ = plain.Products
    for a, b in zip(ours(x, G, valid), want):
        assert torch.allclose(a, b)


# ---- the runner ------------------------------------------------------------------------------

TINY = bench_media.Kind("tiny, mp4 224x128", (224, 128), 25, 4, bench_media.H264)


def bench(monkeypatch, out, *functions):
    """(exit status, rows of bench.json) of a run whose part `data` consists of these functions."""
    monkeypatch.setitem(runner.PARTS, "data", functions)
    status = runner.main(["--only", "data", "--out", str(out)])

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")
    return status, json.loads((out / "bench.json").read_text(), parse_constant=refuse)["rows"]


def row(ours=2.0, ratio=None, **rest):
    return measure.Row("data", "what", "against", ours, None, "ms", ratio, target=1.0, **rest)


def test_all_targets_met(monkeypatch, tmp_path, capsys):
    status, rows = bench(monkeypatch, tmp_path, lambda *_: iter([row(0.5), row(2.0, 1.0)]))
    assert status == 0 and [r["met"] for r in rows] == [True, True]
    assert "missed without an excuse: none" in capsys.readouterr().out


@pytest.mark.parametrize("missed", [row(note="but a note"), row(float("nan")), row(1.0, 1.01),
                                    row(1.0, float("inf"))])
def test_a_missed_target_without_an_excuse_fails(missed, monkeypatch, tmp_path):
    status, rows = bench(monkeypatch, tmp_path, lambda *_: iter([missed, row(0.5)]))
    assert status == 1 and [r["met"] for r in rows] == [False, True]


def test_an_excuse_is_printed_where_a_target_is_missed(monkeypatch, tmp_path, capsys):
    rows = [row(0.5, excuse="unseen"), row(excuse="a | small machine")]
    status, rows = bench(monkeypatch, tmp_path, lambda *_: iter(rows))
    out = capsys.readouterr().out
    assert status == 0 and [r["met"] for r in rows] == [True, False]
    assert "NO | a / small machine |" in out and "unseen" not in out


@pytest.mark.parametrize("error", [ValueError("of two\nlines"), SystemExit(2)])
def test_an_exception_is_a_missed_row_and_loses_no_other(error, monkeypatch, tmp_path):
    def breaks(folder, repeats):
        yield row(0.5)
        raise error
    status, rows = bench(monkeypatch, tmp_path, breaks, lambda *_: iter([row(0.25)]))
    assert status == 1 and [r["met"] for r in rows] == [True, False, True]
    assert rows[1]["what"] == "breaks broke off" and rows[1]["unit"] == ""
    assert rows[1]["note"] == f"{type(error).__name__}: {' '.join(str(error).split())}"


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_a_wrong_picture_fails(late, monkeypatch, tmp_path):
    def broken(path, times):
        raise OSError("unreadable")
    plain = bench_media.ours
    monkeypatch.setattr(measure.gc, "collect", lambda: None)                  # for speed
    monkeypatch.setattr(bench_media, "ours", lambda path, times: plain(path, times + late))
    monkeypatch.setattr(bench_media, "alternatives", lambda: {"other": broken})
    for name, value in (("KINDS", (TINY,)), ("OOPS", TINY), ("EPIC", TINY)):
        monkeypatch.setattr(bench_media, name, value)
    status, rows = bench(monkeypatch, tmp_path, bench_media.decode_rows)
    wrong, = (r for r in rows if r["what"].startswith("wrong pictures"))
    assert (wrong["ours"] > 0) is (late > 0) and wrong["met"] is (late == 0)
    assert status == 1 or not late                            # speed is not looked at here
    assert [r["note"] for r in rows if r["against"] == "other"] == ["cannot read it: unreadable"]
    assert all("broke off" not in r["what"] for r in rows)


@pytest.mark.parametrize("kind", bench_media.KINDS, ids=lambda k: k.file)
def test_bar_codes_survive_scaling(kind):
    w, h = kind.size
    grain = np.zeros((h, w, 1), np.int8)
    for k in (0, 255, 256, 1023, 3599):
        image = torch.from_numpy(bench_media.picture(kind, k, np.full((h, w + 600, 3), 128), grain))
        small = bench_media.smaller(image[None], (round(w * 128 / h), 128))
        assert bench_media.count_wrong(kind._replace(seconds=9999), np.array([k / kind.fps]),
                                       small) == 0


def test_files_follow_their_settings(tmp_path):
    kind = TINY._replace(seconds=1)
    assert kind.file != kind._replace(fps=24).file
    (tmp_path / f"{kind.file}.part").write_bytes(b"of a killed run")
    path = bench_media.make_file(kind, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [kind.file]
    assert bench_media.count_wrong(kind, np.array([0.1, 0.9]),
                                   bench_media.ours(path, np.array([0.1, 0.9]))) == 0


@pytest.mark.parametrize("flags", [["--only", "nosuch"], ["--repeats", "1"]])
def test_a_wrong_flag_is_refused_in_one_line(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        runner.main([*flags, "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert e.value.code == 2 and not said.out and not any(tmp_path.iterdir())
    assert len(said.err.splitlines()) == 1 and " ".join(flags) in said.err


def test_jobs_take_turns():
    seen = []
    jobs = [lambda k=k: seen.append(k) for k in range(3)]
    measure.paired(*jobs, repeats=2, least=0, warm=0, first=1)
    assert seen == [1, 2, 0, 2, 0, 1]


def test_plain_weights_and_their_maps_are_in_the_usual_order():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1))
    model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5)
    assert not model(x).is_contiguous() and plain.in_order(model)(x).is_contiguous()
    assert torch.equal(plain.in_order(model)[0].weight, model[0].weight)
