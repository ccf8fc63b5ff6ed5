"""Where an invocation is found, and what a mask over tokens lets through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import same_bits
from torch import Tensor

from inlay.activation import NEVER, Tokens, last_occurrence
from inlay.errors import RowsError

# ---------------------------------------------------------------- the search


def oracle(ids: Sequence[int], tokens: Sequence[int], mask: Sequence[int]) -> int:
    n = len(tokens)
    at = [i for i in range(len(ids) - n + 1) if [*ids[i : i + n]] == [*tokens] and all(mask[i : i + n])]
    return max(at, default=NEVER)


@st.composite
def searches(draw: st.DrawFn) -> tuple[Tensor, list[int], Tensor]:
    """Few different tokens, so that occurrences are many and overlap."""
    B, L = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    token = st.integers(0, 2)
    rows = draw(st.lists(st.lists(token, min_size=L, max_size=L), min_size=B, max_size=B))
    mask = draw(st.lists(st.lists(st.integers(0, 1), min_size=L, max_size=L), min_size=B, max_size=B))
    tokens = draw(st.lists(token, min_size=1, max_size=4))
    return torch.tensor(rows).reshape(B, L).long(), tokens, torch.tensor(mask).reshape(B, L)


@given(searches())
def test_last_occurrence_is_that_of_a_search_in_python(case: tuple[Tensor, list[int], Tensor]) -> None:
    ids_BL, tokens, mask_BL = case
    for mask in (mask_BL, mask_BL.bool(), None):
        kept = (torch.ones_like(ids_BL) if mask is None else mask).tolist()
        wanted = [oracle(row, tokens, keep) for row, keep in zip(ids_BL.tolist(), kept, strict=True)]
        assert last_occurrence(ids_BL, tokens, mask).tolist() == wanted
    assert last_occurrence(ids_BL.int(), tokens).tolist() == last_occurrence(ids_BL, tokens).tolist()


def test_last_occurrence_by_hand() -> None:
    ids_BL = torch.tensor([[7, 7, 7, 7, 1], [1, 7, 7, 8, 7], [8, 7, 1, 2, 3]])
    assert last_occurrence(ids_BL, [7, 7]).tolist() == [2, 1, NEVER]
    assert last_occurrence(ids_BL, [7]).tolist() == [3, 4, 1]
    assert last_occurrence(ids_BL, [7, 7], torch.tensor([[1, 1, 1, 0, 1]] * 3)).tolist() == [1, 1, NEVER]
    assert last_occurrence(ids_BL, [7, 7, 7, 7, 1, 1]).tolist() == [NEVER] * 3


# ---------------------------------------------------------------- the mask


def applied(tokens: Tokens, old: Tensor, name: str = "a") -> Tensor:
    """Where the new values have come through: the layer's output is all zeros, the adapter's all ones."""
    out = tokens.applied(name, torch.ones_like(old), old, "layer")
    assert out.shape == old.shape
    assert torch.equal(out, out[..., :1].expand_as(out))  # all channels of a token alike
    return out.reshape(*old.shape[:2], -1)[..., 0].int()


def of(*starts: int, past: int = 0, rows: int | None = None, length: int = 4, kept: Any = None) -> Tokens:
    tokens = Tokens({"a": torch.tensor(starts)})
    tokens.step(past, len(starts) if rows is None else rows, length, kept)
    return tokens


def test_tokens_from_each_rows_start_on() -> None:
    assert applied(of(0, 2, 4, NEVER), torch.zeros(4, 4, 3)).tolist() == [
        [1, 1, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_tokens_behind_a_cache() -> None:
    tokens = of(0, 5, 6, NEVER, past=4, length=2)
    assert applied(tokens, torch.zeros(4, 2, 3)).tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]
    tokens.step(6, 4, 1)  # the next forward of the same call
    assert applied(tokens, torch.zeros(4, 1, 3)).tolist() == [[1], [1], [1], [0]]
    tokens.step(4, 4, 2)  # and one behind a cache that was cut back
    assert applied(tokens, torch.zeros(4, 2, 3)).tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]


def test_further_dimensions_and_beams() -> None:
    assert applied(of(1, 3), torch.zeros(2, 4, 5, 3)).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    beams = of(1, 3, rows=6)
    assert applied(beams, torch.zeros(6, 4, 3)).tolist() == [[0, 1, 1, 1]] * 3 + [[0, 0, 0, 1]] * 3


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        (1, [[1], [0]]),
        (2, [[1, 1], [0, 0]]),
        (0, [[0, 1, 1, 1], [0, 0, 0, 0]]),
        (torch.tensor([0, 2]), [[0, 1], [0, 0]]),
        (torch.tensor([True, True, False, False]), [[0, 1], [0, 0]]),
    ],
)
def test_a_head_that_sees_some_of_the_tokens(kept: Any, wanted: list[list[int]]) -> None:
    tokens = of(11, 14, past=10, kept=kept)
    assert applied(tokens, torch.zeros(2, len(wanted[0]), 3)).tolist() == wanted
    assert applied(tokens, torch.zeros(2, 4, 3)).tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]  # the layers before it


def test_an_adapter_without_a_start_acts_everywhere() -> None:
    assert applied(of(3), torch.zeros(1, 4, 3), "another").tolist() == [[1, 1, 1, 1]]
    assert applied(of(3), torch.zeros(5, 3), "another").tolist()  # it asks for nothing, of any shape


def test_old_bits_pass_whatever_is_beside_them() -> None:
    old, new = torch.randn(2, 4, 3), torch.full((2, 4, 3), torch.nan)
    old[0, 0, 0] = -0.0
    out = of(4, NEVER).applied("a", new, old, "layer")
    same_bits(out, old)
    assert torch.equal(torch.signbit(out), torch.signbit(old))


def test_gradients_go_where_values_came_from() -> None:
    old, new = torch.randn(1, 4, 2, requires_grad=True), torch.randn(1, 4, 2, requires_grad=True)
    of(3).applied("a", new, old, "layer").sum().backward()
    assert new.grad is not None
    assert old.grad is not None
    assert new.grad[0, :, 0].tolist() == [0, 0, 0, 1]
    assert old.grad[0, :, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    "shape",
    [(8,), (8, 3), (8, 4), (4, 4), (2, 3, 3), (2, 1, 3), (2, 5, 3), (4, 4, 3), (3, 4, 3), (1, 4, 3)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_an_output_of_other_rows_or_tokens_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(RowsError, match=r"decoder\.fc1 .* rows and tokens"):
        of(1, 3).applied("a", torch.ones(shape), torch.zeros(shape), "decoder.fc1")


def test_rows_that_are_no_multiple_of_the_calls() -> None:
    with pytest.raises(RowsError, match=r"2 rows"):
        of(1, 3, rows=3).applied("a", torch.ones(3, 4, 2), torch.zeros(3, 4, 2), "layer")
