"""One batch, many adapters: every row of the batch gets its own low-rank product, in one batched call."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.errors import RowsError
from inlay.ops.low_rank import compute_dtype


def reference(
    x_BTI: Tensor,
    h_BTO: Tensor,
    down_KRI: Tensor,
    up_KOR: Tensor,
    ids_B: Tensor | None = None,
    *,
    h_is_fresh: bool = False,
) -> Tensor:
    """`rows`, one row at a time."""
    ids = range(x_BTI.shape[0]) if ids_B is None else ids_B.tolist()
    out = []
    for x, h, k in zip(x_BTI, h_BTO, ids, strict=True):
        if 0 <= k < down_KRI.shape[0]:
            h = h + (x.to(down_KRI.dtype) @ down_KRI[k].T @ up_KOR[k].T).to(h.dtype)
        out.append(h)
    return torch.stack(out)


def rows(
    x_BTI: Tensor,
    h_BTO: Tensor,
    down_KRI: Tensor,
    up_KOR: Tensor,
    ids_B: Tensor | None = None,
    *,
    h_is_fresh: bool = False,
) -> Tensor:
    """Adds to each row of ``h`` the product of its own adapter.

    Args:
        x_BTI (`Tensor`): The layer's input; rows first, then any number of dimensions (none too).
        h_BTO (`Tensor`): The layer's output, same leading dimensions.
        down_KRI (`Tensor`): First factors of K adapters, padded with zeros to one rank. For one token, stacks that
            are transposed views of contiguous (K, in, rank) and (K, rank, out) are a quarter faster.
        up_KOR (`Tensor`): Second factors, each already times its adapter's scale.
        ids_B (`Tensor`, *optional*): Each row's adapter, int32 or int64; one outside 0..K-1 (-1, K) means none.
            Without it row i has adapter i.
        h_is_fresh (`bool`, *optional*, defaults to False): ``h`` may be written to.

    Returns:
        `Tensor`: Shape and dtype of ``h``.

    Raises:
        RowsError: The number of ids (or adapters) is not the number of rows.

    Example:
        >>> x, h = torch.ones(2, 3), torch.zeros(2, 1)
        >>> rows(x, h, torch.ones(1, 1, 3), torch.ones(1, 1, 1), torch.tensor([0, -1]))
        tensor([[3.],
                [0.]])
    """
    if ids_B is None and x_BTI.dim() == 3 and _plain(x_BTI, h_BTO, down_KRI):
        mid_BTR = torch.bmm(x_BTI, down_KRI.mT)
        return h_BTO.baddbmm_(mid_BTR, up_KOR.mT) if h_is_fresh else torch.baddbmm(h_BTO, mid_BTR, up_KOR.mT)
    B, K = x_BTI.shape[0], down_KRI.shape[0]
    found = K if ids_B is None else ids_B.shape[0]
    if found != B:
        what = "adapters" if ids_B is None else "ids"
        raise RowsError(f"found {found} {what} for {B} rows: give one for each row of the first dimension")
    serves_B = None
    if ids_B is not None and K == 0:
        return h_BTO
    if ids_B is not None:
        safe_B = ids_B.clamp(0, K - 1)
        serves_B = safe_B == ids_B
        down_KRI, up_KOR = down_KRI.index_select(0, safe_B), up_KOR.index_select(0, safe_B)
    dtype = compute_dtype(x_BTI, down_KRI)
    if not (x_BTI.dtype == down_KRI.dtype == up_KOR.dtype == dtype):
        x_BTI, down_KRI, up_KOR = x_BTI.to(dtype), down_KRI.to(dtype), up_KOR.to(dtype)
    mid_BTR = torch.bmm(x_BTI.reshape(B, -1, x_BTI.shape[-1]), down_KRI.transpose(1, 2))
    if serves_B is not None:
        mid_BTR = torch.where(serves_B.view(B, 1, 1), mid_BTR, 0.0)
    return _add(h_BTO, mid_BTR, up_KOR.transpose(1, 2), h_is_fresh)


def _plain(x_BTI: Tensor, h_BTO: Tensor, down_KRI: Tensor) -> bool:
    """One dtype, one adapter a row, nothing to trace: the two products are all there is to do."""
    same = x_BTI.dtype == h_BTO.dtype == down_KRI.dtype and len(x_BTI) == len(down_KRI)
    return same and not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled()


def _add(h_BTO: Tensor, mid_BTR: Tensor, up_BRO: Tensor, h_is_fresh: bool) -> Tensor:
    h_flat = h_BTO.reshape(h_BTO.shape[0], -1, h_BTO.shape[-1])
    if h_BTO.dtype != mid_BTR.dtype:
        return torch.add(h_flat, torch.bmm(mid_BTR, up_BRO).to(h_BTO.dtype)).view(h_BTO.shape)
    if h_is_fresh and h_BTO.is_contiguous() and not torch.is_grad_enabled():
        h_flat.baddbmm_(mid_BTR, up_BRO)
        return h_BTO
    return torch.baddbmm(h_flat, mid_BTR, up_BRO).view(h_BTO.shape)
