"""rotation and rotate against the dense formulas."""

from __future__ import annotations

import pytest
import torch

from inlay.ops.rotation import reference, reference_rotate, rotate, rotation


@pytest.mark.parametrize("terms", [None, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("block", [1, 2, 5, 130])
def test_it_equals_the_reference(block: int, terms: int | None) -> None:
    packed = (torch.randn(3, block * (block - 1) // 2) * 0.1).double()
    torch.testing.assert_close(rotation(packed, block, terms), reference(packed, block, terms))


def test_cayley_is_orthogonal() -> None:
    R = rotation(torch.randn(4, 10).double(), 5)
    torch.testing.assert_close(R @ R.mT, torch.eye(5).double().expand(4, 5, 5))


@pytest.mark.parametrize("blocks", [1, 3])
def test_rotate_equals_the_whole_matrix(blocks: int) -> None:
    x, R = torch.randn(2, 5, 12), torch.randn(blocks, 4, 4)
    torch.testing.assert_close(rotate(x, R), reference_rotate(x, R))


def test_what_is_kept_in_inference_serves_training() -> None:
    packed = torch.randn(2, 21, requires_grad=True)
    with torch.inference_mode():
        rotation(packed, 7)
    rotation(packed, 7).sum().backward()
    assert packed.grad is not None
