"""The packed mask: its probability, its bits in every item size, its gradient."""

from __future__ import annotations

import pytest
import torch

from inlay.ops import dropout
from inlay.ops.dropout import apply_mask, draw_mask, keep_scale, keep_steps, reference


def drawn_elsewhere(shape, p):
    """What `draw_mask` does on a device that is no CPU."""
    return dropout._compared(-(-torch.Size(shape).numel() // 64), keep_steps(p), "cpu")


@pytest.mark.parametrize("draw", [draw_mask, drawn_elsewhere])
@pytest.mark.parametrize("p", [0.5, 0.25, 0.1, 1 / 3, 0.9, 0.999, 1 / 65536])
@pytest.mark.parametrize("shape", [(1024, 512), (200, 300)])
def test_the_share_that_is_kept(p, shape, draw):
    kept = reference(torch.ones(shape), draw(shape, p), p) != 0
    keep = keep_steps(p) / 65536
    n = shape[0] * shape[1]
    assert abs(kept.double().mean().item() - keep) < 5 * (keep * (1 - keep) / n) ** 0.5 + 1e-12


@pytest.mark.parametrize("draw", [draw_mask, drawn_elsewhere])
def test_neighbours_and_distant_elements_are_independent(draw):
    kept = reference(torch.ones(2**21), draw((2**21,), 0.1), 0.1).ne(0).double() - 0.9
    for lag in (1, 2, 16, 32, 64, 2**16, 2**17, 2**20):
        assert abs((kept[:-lag] * kept[lag:]).mean().item()) < 5 * 0.09 / (2**21 - lag) ** 0.5


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_ends(p, kept):
    x = torch.randn(5, 7)
    assert torch.equal(apply_mask(x, draw_mask(x.shape, p), p), x * kept)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_no_probability(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        draw_mask((3,), p)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (63,), (64,), (3, 5, 7), (129, 513)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_equals_the_reference_in_every_item_size(dtype, shape):
    x = torch.randn(shape).to(dtype)
    for packed in (draw_mask(shape, 0.3), drawn_elsewhere(shape, 0.3)):
        assert packed.dtype == torch.uint8
        assert packed.untyped_storage().nbytes() == -(-x.numel() // 64) * 8
    torch.testing.assert_close(apply_mask(x, packed, 0.3), reference(x, packed, 0.3))


def test_strided_input():
    x = torch.randn(6, 10).t()
    packed = draw_mask(x.shape, 0.5)
    torch.testing.assert_close(apply_mask(x, packed, 0.5), reference(x, packed, 0.5))


def test_derivatives():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    packed = draw_mask(x.shape, 0.4)
    assert torch.autograd.gradcheck(lambda x: apply_mask(x, packed, 0.4).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: apply_mask(x, packed, 0.4).square(), x)


def test_the_seed_decides():
    torch.manual_seed(1)
    first, second = draw_mask((300, 300), 0.1), draw_mask((300, 300), 0.1)
    torch.manual_seed(1)
    assert torch.equal(draw_mask((300, 300), 0.1), first)
    assert not torch.equal(first, second)


def test_the_mean_is_unchanged():
    assert keep_scale(0.1) * keep_steps(0.1) / 65536 == pytest.approx(1.0)
    assert keep_scale(1.0) == 0.0


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (63, 7), (64, 3), (200, 5), (129, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pieces_are_the_whole(monkeypatch, shape, dtype):
    monkeypatch.setattr(dropout, "_PIECE", {dtype.itemsize: 1})  # the smallest pieces, of 64 rows
    x, mask = torch.randn(shape).to(dtype), draw_mask(shape, 0.3)
    kept, rows = torch.empty_like(x), 0
    for at, piece in dropout.pieces(mask, x):
        assert at.start == rows
        assert at.stop - at.start <= 64
        rows = at.stop
        kept[at] = piece.taken_by(x[at])
    assert rows == shape[0]
    assert torch.equal(kept, dropout.Mask(mask, x).zero(x))
