"""A reference of `make bench` that computed something else would prove nothing."""

import bench_steps
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
