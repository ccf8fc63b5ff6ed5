"""rows against one row at a time."""

from __future__ import annotations

import pytest
import torch

from inlay.errors import RowsError
from inlay.ops.rows import reference, rows

K, INS, OUTS, R = 4, 6, 5, 2
IDS = [[0, 1, 2, 3, 1], [-1, 0, K, 3, 3], [-1, -1, -1, -1, -1]]


def operands(leading, dtype=torch.float32):  # type: ignore[no-untyped-def]
    shapes = [(*leading, INS), (*leading, OUTS), (K, R, INS), (K, OUTS, R)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("ids", IDS, ids=str)
@pytest.mark.parametrize("leading", [(5,), (5, 3), (5, 2, 3)], ids=str)
def test_it_equals_one_row_at_a_time(leading, ids, fresh):
    tensors, index = operands(leading), torch.tensor(ids)
    expected, found = reference(*tensors, index), rows(*tensors, index, h_is_fresh=fresh)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.square().sum(), tensors, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), tensors, materialize_grads=True), wanted)
    with torch.no_grad():
        torch.testing.assert_close(
            rows(tensors[0], tensors[1].clone(), *tensors[2:], index, h_is_fresh=fresh), expected
        )


def test_rows_in_the_order_of_the_stack():
    x, h, down, up = operands((K, 3))
    torch.testing.assert_close(rows(x, h, down, up), reference(x, h, down, up, torch.arange(K)))


def test_a_row_without_adapter_keeps_its_bits():
    x, h, down, up = operands((2, 3))
    x = x.detach().fill_(float("inf"))
    assert torch.equal(rows(x, h, down, up, torch.tensor([-1, K])), h)


def test_derivatives():
    tensors = operands((3, 2), torch.float64)
    index = torch.tensor([2, -1, 0])
    assert torch.autograd.gradcheck(lambda *t: rows(*t, index), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: rows(*t, index), tensors)


@pytest.mark.parametrize("tokens", [1, 40])
def test_narrow_activations(tokens):
    x, h, down, up = operands((3, tokens))
    index = torch.tensor([0, 3, -1])
    found = rows(x.bfloat16(), h.bfloat16(), down, up, index)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), reference(x, h, down, up, index), rtol=3e-2, atol=1e-1)


def test_autocast():
    x, h, down, up = operands((3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        found = rows(x, h.bfloat16(), down, up, torch.tensor([0, 3, -1]))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1])], ids=["adapters", "ids"])
def test_a_wrong_number_is_a_named_error(ids):
    with pytest.raises(RowsError, match="for 3 rows"):
        rows(*operands((3,)), ids)


def test_compiled_whole_equals_eager_for_any_ids():
    torch._dynamo.reset()
    tensors = operands((5, 3))
    compiled = torch.compile(rows, fullgraph=True, backend="eager")
    for ids in IDS:
        torch.testing.assert_close(compiled(*tensors, torch.tensor(ids)), rows(*tensors, torch.tensor(ids)))
