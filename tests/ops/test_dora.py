"""DoRA: the factored norm, and the stretched sum against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from inlay.ops import dora as module
from inlay.ops import low_rank
from inlay.ops.dora import dora, grouped_norm, reference, reference_norm, square_norm, weight_norm
from inlay.ops.dropout import apply_mask, draw_mask

INS, OUTS, R = 12, 10, 3


@pytest.fixture(autouse=True)
def _function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors as small as theirs take the same way as large ones, in several slices."""
    monkeypatch.setattr(low_rank, "_FEW", 0)
    monkeypatch.setattr(module, "_SLICE", 5 * OUTS)


def far(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def operands(dtype: torch.dtype = torch.float32, tokens: int = 6) -> list[Tensor]:
    """x, h, down, up, magnitude, bias"""
    shapes = [(2, tokens, INS), (2, tokens, OUTS), (R, INS), (OUTS, R), (OUTS,), (OUTS,)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("scale", [2.0, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=str
)
def test_the_norm_without_building_the_product(dtype, close, scale, cached):
    W, down, up = torch.randn(OUTS, INS).to(dtype), torch.randn(R, INS), torch.randn(OUTS, R, requires_grad=True)
    found = weight_norm(W, down, up, scale, square_norm(W) if cached else None)
    assert far(found, reference_norm(W, down, up, scale)) < close
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.requires_grad


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-6)], ids=str)
def test_the_norm_of_groups_is_that_of_each_over_all_inputs(dtype, near, cached):
    groups, ranks = 2, 3
    W, down = torch.randn(OUTS, INS // groups).to(dtype), torch.randn(groups * ranks, INS)
    up = torch.randn(OUTS, ranks, requires_grad=True)
    found = grouped_norm(W, down, up, 0.5, groups, square_norm(W) if cached else None)
    parts = []
    for g, (w, d, u) in enumerate(zip(*(t.chunk(groups) for t in (W, down, up)), strict=True)):
        parts.append(reference_norm(F.pad(w, (g * INS // groups, (groups - 1 - g) * INS // groups)), d, u, 0.5))
    assert far(found, torch.cat(parts)) < near
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.requires_grad


def test_the_norm_of_a_row_that_is_cancelled_is_no_nan():
    down, up = torch.randn(R, INS), torch.randn(OUTS, R)
    found = weight_norm(-(up @ down), down, up, 1.0)
    assert found.isfinite().all()
    assert found.max() < 1e-2


def test_the_norm_ignores_autocast():
    W, down, up = torch.randn(OUTS, INS), torch.randn(R, INS), torch.randn(OUTS, R)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight_norm(W, down, up, 1.0), weight_norm(W, down, up, 1.0).float())
        assert far(weight_norm(W, down, up, 1.0), reference_norm(W, down, up, 1.0)) < 1e-6


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_equals_the_formula(with_bias, dropout, fresh):
    tensors, norm = operands(), torch.rand(OUTS) + 0.5
    mask = draw_mask(tensors[0].shape, dropout)
    frozen = torch.randn(OUTS, INS)

    def run(function):  # type: ignore[no-untyped-def]
        x, h, down, up, magnitude, bias = tensors
        h = h + bias  # as a layer's output depends on its bias
        own = bias if with_bias else None
        dropped = F.linear(apply_mask(x, mask, dropout), frozen, own) if dropout else None
        return function(
            x, h, down, up, 2.0, magnitude, norm, own, dropout, mask=mask, h_dropped_BO=dropped, h_is_fresh=fresh
        )

    expected, found = run(reference), run(dora)
    assert far(found, expected) < 1e-6
    with torch.no_grad():
        assert far(run(dora), expected) < 1e-6
    weights = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, tensors, weights, materialize_grads=True)
    given = torch.autograd.grad(found, tensors, weights, materialize_grads=True)
    assert max(far(g, w) for g, w in zip(given, wanted, strict=True)) < 2e-6


def test_it_is_the_weight_stretched_to_its_magnitude():
    x, _, down, up, magnitude, bias = operands(torch.float64)
    W = torch.randn(OUTS, INS, dtype=torch.float64)
    whole = W + 2.0 * up @ down
    expected = F.linear(x, magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True), bias)
    norm = weight_norm(W, down, up, 2.0)
    assert far(dora(x, F.linear(x, W, bias), down, up, 2.0, magnitude, norm, bias), expected) < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_first_and_second_derivatives(dropout):
    tensors, norm = operands(torch.float64, tokens=2), torch.rand(OUTS, dtype=torch.float64) + 0.5
    mask = draw_mask(tensors[0].shape, dropout)
    frozen = torch.randn(OUTS, INS, dtype=torch.float64)

    def run(x, h, down, up, magnitude, bias):  # type: ignore[no-untyped-def]
        dropped = F.linear(apply_mask(x, mask, dropout), frozen) if dropout else None
        return dora(x, h, down, up, 1.7, magnitude, norm, bias, dropout, mask=mask, h_dropped_BO=dropped)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_the_norm_gets_no_gradient():
    x, h, down, up, magnitude, _ = operands()
    norm = torch.ones(OUTS, requires_grad=True)
    dora(x, h, down, up, 1.0, magnitude, norm).sum().backward()
    assert norm.grad is None
    assert magnitude.grad is not None


def test_bfloat16_stretches_without_leaning():
    torch.manual_seed(0)
    x, h, down, up, magnitude, _ = operands(torch.float64, tokens=500)
    norm = torch.rand(OUTS) + 0.5
    down, up = down * 0, up * 0  # their products are narrow on purpose
    tensors = [x.detach().bfloat16(), h.detach().bfloat16(), down.float(), up.float(), magnitude.float()]
    found = dora(*tensors[:4], 0.1, tensors[4], norm)
    expected = dora(*(t.double() for t in tensors[:4]), 0.1, tensors[4].double(), norm.double())
    assert found.dtype == torch.bfloat16
    ratio = (found.double() * expected).sum((0, 1)) / expected.square().sum((0, 1))
    assert (ratio - 1).abs().max() < 5e-4  # one rounding of a row's factor would be up to 2e-3


def test_saved_for_backward_is_x_the_sum_and_the_middle():
    x, h, down, up, magnitude, _ = (t.detach() for t in operands(tokens=64))
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dora(x, h, down, up.requires_grad_(), 1.0, magnitude.requires_grad_(), torch.ones(OUTS))
    large = sorted(n for n in saved.values() if n > 1000)
    middle = 2 * 64 * R * 4
    assert large == [middle, h.untyped_storage().nbytes(), x.untyped_storage().nbytes()]


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    x, h, down, up, magnitude, _ = operands(tokens=40)
    narrow = h.detach().bfloat16().requires_grad_()
    leaves, results = [x, narrow, down, up, magnitude], []
    for function in (reference, dora):
        for t in leaves:
            t.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = function(x, narrow, down, up, 0.5, magnitude, torch.ones(OUTS))
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        results.append([out, *(t.grad for t in leaves)])
    assert [t.dtype for t in results[1]] == [t.dtype for t in results[0]]
    assert max(far(f, e) for f, e in zip(results[1], results[0], strict=True)) < 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_equals_stored(reentrant):
    x, h, down, up, magnitude, _ = operands()
    frozen = torch.randn(OUTS, INS)

    def layer(x: Tensor, h: Tensor) -> Tensor:
        mask = draw_mask(x.shape, 0.5)
        dropped = F.linear(apply_mask(x, mask, 0.5), frozen)
        return dora(x, h, down, up, 1.0, magnitude, torch.ones(OUTS), dropout=0.5, mask=mask, h_dropped_BO=dropped)

    torch.manual_seed(7)
    stored = torch.autograd.grad(layer(x, h).square().sum(), [x, down, up, magnitude])
    torch.manual_seed(7)
    checkpoint(layer, x, h, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(stored, [x, down, up, magnitude], strict=True))


def test_dropout_needs_what_the_caller_dropped():
    x, h, down, up, magnitude, _ = operands()
    with pytest.raises(ValueError, match="h_dropped_BO"):
        dora(x, h, down, up, 1.0, magnitude, torch.ones(OUTS), dropout=0.1)


def test_functorch_and_forward_mode():
    x, h, down, up, magnitude, _ = (t.detach() for t in operands())

    def loss(m: Tensor) -> Tensor:
        return dora(x, h, down, up, 1.0, m, torch.ones(OUTS)).square().sum()

    leaf = magnitude.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert far(torch.func.grad(loss)(magnitude), expected) < 1e-6
    assert far(torch.func.jvp(loss, (magnitude,), (magnitude,))[1], (expected * magnitude).sum()) < 1e-5


def test_compiled_whole_equals_eager():
    torch._dynamo.reset()
    x, h, down, up, magnitude, bias = operands()
    W = torch.randn(OUTS, INS)

    def layer(x: Tensor, h: Tensor) -> Tensor:
        return dora(x, h, down, up, 2.0, magnitude, weight_norm(W, down, up, 2.0), bias)

    assert far(torch.compile(layer, fullgraph=True, backend="eager")(x, h), layer(x, h)) < 1e-6
