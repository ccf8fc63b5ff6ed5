"""Block-diagonal rotations from packed skew-symmetric matrices (https://arxiv.org/abs/2306.07280, 2506.19847).

A block's b(b-1)/2 numbers are the strict upper triangle of Q, row by row. Shapes: N blocks, P packed numbers, B = b.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from inlay.ops.low_rank import no_autocast, steps_aside

# Places of larger blocks are computed at every call: they take less time than the products, and much memory.
_KEPT = 128


def reference(packed_NP: Tensor, block: int, terms: int | None = None) -> Tensor:
    """`rotation`, by assigning the triangles, inverting, and adding powers up."""
    packed_NP = packed_NP if packed_NP.dtype == torch.float64 else packed_NP.float()
    i, j = torch.triu_indices(block, block, 1)
    Q = packed_NP.new_zeros(packed_NP.shape[0], block, block)
    Q[:, i, j] = packed_NP
    Q = Q - Q.mT
    one = torch.eye(block, dtype=Q.dtype)
    if terms is None:
        exact: Tensor = (one - Q) @ torch.linalg.inv(one + Q)
        return exact
    last = max(terms, 4) - 1 if terms > 2 else terms
    R, power = one + 2 * Q, Q
    for k in range(2, last + 1 if terms > 2 else 2):
        power = power @ Q
        R = R + (2 if k < last else 1) * power
    return R


def rotation(packed_NP: Tensor, block: int, terms: int | None = None) -> Tensor:
    """The orthogonal blocks that packed skew-symmetric matrices stand for.

    Args:
        packed_NP (`Tensor`): Strict upper triangles, row by row.
        block (`int`): Rows of a block.
        terms (`int`, *optional*): ``None`` is Cayley's ``(I - Q)(I + Q)^-1``. A number asks for as many terms of the
            Neumann series of its inverse, ``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)``, whose last coefficient is 1; two
            terms are ``I + 2 Q``, and three are the same as four.

    Returns:
        `Tensor`: N x B x B, fp32, or fp64 where ``packed_NP`` is.

    Example:
        >>> rotation(torch.tensor([[1.0]]), 2)
        tensor([[[ 0., -1.],
                 [ 1.,  0.]]])
    """
    if packed_NP.dtype != torch.float64:
        packed_NP = packed_NP.float()
    with no_autocast(packed_NP):
        Q_NBB = skew(packed_NP, block)
        one_BB = torch.eye(block, dtype=Q_NBB.dtype, device=Q_NBB.device)
        if terms is None:  # both factors are functions of Q, so they commute
            exact: Tensor = torch.linalg.solve(one_BB + Q_NBB, one_BB - Q_NBB)
            return exact
        if terms == 2:
            return one_BB + 2 * Q_NBB
        two_NBB = (2 * one_BB).expand_as(Q_NBB)
        R_NBB = Q_NBB + two_NBB
        for _ in range(max(terms, 4) - 3):
            R_NBB = torch.baddbmm(two_NBB, Q_NBB, R_NBB)
        return torch.baddbmm(one_BB.expand_as(Q_NBB), Q_NBB, R_NBB)


def skew(packed_NP: Tensor, block: int) -> Tensor:
    """The skew-symmetric matrices N x B x B of packed triangles: one gather, instead of an assignment and a sum."""
    N = packed_NP.shape[0]
    if block == 1:
        return packed_NP.new_zeros(N, 1, 1)
    kept = block <= _KEPT and not steps_aside(packed_NP)
    at_C, sign_BB = (_places if kept else _places.__wrapped__)(block, packed_NP.device, packed_NP.dtype)
    return packed_NP.gather(1, at_C.expand(N, -1)).view(N, block, block) * sign_BB


@cache
def _places(block: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each entry of a block where its number is packed, and its sign: 0 on the diagonal."""
    with torch.inference_mode(False), torch.no_grad():  # what is kept must serve later calls with gradients too
        i_B1, j_1B = torch.arange(block, device=device)[:, None], torch.arange(block, device=device)
        low, high = torch.minimum(i_B1, j_1B), torch.maximum(i_B1, j_1B)
        at = low * (2 * block - low - 1) // 2 + (high - low - 1)
        # The diagonal's sign is 0: it may point at any number that is there.
        return at.clamp(0, block * (block - 1) // 2 - 1).flatten(), torch.sign(j_1B - i_B1).to(dtype)


def rotate(x: Tensor, R_NBB: Tensor) -> Tensor:
    """``x`` times the block-diagonal matrix of ``R``, on its last dimension; a single block serves all of it.

    Example:
        >>> rotate(torch.arange(4.0), torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]))
        tensor([-1.,  0., -3.,  2.])
    """
    N, B = R_NBB.shape[:2]
    if N == 1:
        return (x.reshape(-1, B) @ R_NBB[0]).view(x.shape)
    x_NTB = x.reshape(-1, N, B).transpose(0, 1)
    return torch.bmm(x_NTB, R_NBB).transpose(0, 1).reshape(x.shape)


def reference_rotate(x: Tensor, R_NBB: Tensor) -> Tensor:
    """`rotate` with the whole matrix."""
    blocks = list(R_NBB) * (x.shape[-1] // (R_NBB.shape[0] * R_NBB.shape[1]))
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return x @ whole
