"""Starting values that are a part of the weight: PiSSA, its largest singular values; OLoRA, the first columns of its
QR decomposition (https://arxiv.org/abs/2404.02948, https://arxiv.org/abs/2406.01775).

    W0 = (W0 - s B0 A0) + s B0 A0      the bracket stays frozen, B A starts at B0 A0 and is trained
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from inlay.inits.draw import kaiming_


class Start(NamedTuple):
    """Where a low-rank update begins.

    Args:
        down_RI (`Tensor`), up_OR (`Tensor`): The factors, in fp32, or fp64 where the weight is.
        offset_OI (`Tensor`, *optional*): What is added to the frozen weight; `None` where it is
            ``-scale * up_OR @ down_RI``, so that the layer begins as the identity.
    """

    down_RI: Tensor
    up_OR: Tensor
    offset_OI: Tensor | None = None


def pissa(W_OI: Tensor, r: int, scale: float, rounds: int | None = None) -> Start:
    """The ``r`` largest singular values, split evenly between the factors.

    Args:
        W_OI (`Tensor`): The weight.
        r (`int`): The rank.
        scale (`float`): What the update is multiplied by; not 0.
        rounds (`int`, *optional*): Iterations of the randomised decomposition; the exact one if not given.

    Example:
        >>> start = pissa(torch.diag(torch.tensor([9.0, 4.0])), 1, scale=1.0)
        >>> start.down_RI.abs(), start.up_OR.abs()
        (tensor([[3., 0.]]), tensor([[3.],
                [0.]]))
    """
    return _filled(*largest(wide(W_OI), r, scale, rounds), r)


def olora(W_OI: Tensor, r: int, scale: float) -> Start:
    """``up`` has orthonormal columns, whatever the ``scale`` of the update."""
    Q_OK, R_KI = torch.linalg.qr(wide(W_OI))
    return _filled(R_KI[:r], Q_OK[:, :r], r)


def wide(W: Tensor) -> Tensor:
    """In the dtype of decompositions: fp32, or fp64 where it is."""
    return W if W.dtype == torch.float64 else W.float()


def largest(W_OI: Tensor, r: int, scale: float, rounds: int | None = None) -> tuple[Tensor, Tensor]:
    """(down, up) with ``scale * up @ down`` the best approximation of rank ``r``, or less where ``W`` has less."""
    if rounds is None:
        U_OK, S_K, V_KI = torch.linalg.svd(W_OI, full_matrices=False)
    else:
        U_OK, S_K, V_IK = torch.svd_lowrank(W_OI, q=min(r, *W_OI.shape), niter=rounds)
        V_KI = V_IK.t()
    root_R = (S_K[:r] / abs(scale)).sqrt()
    return root_R[:, None] * V_KI[:r], U_OK[:, :r] * (root_R if scale > 0 else -root_R)


def _filled(down_KI: Tensor, up_OK: Tensor, r: int) -> Start:
    """Of rank ``r``: what the weight has no more of starts as it does in LoRA."""
    if (missing := r - down_KI.shape[0]) <= 0:
        return Start(down_KI, up_OK)
    kaiming_(more := down_KI.new_empty(missing, down_KI.shape[1]))
    return Start(torch.cat([down_KI, more]), torch.cat([up_OK, up_OK.new_zeros(up_OK.shape[0], missing)], 1))
