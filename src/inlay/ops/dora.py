"""DoRA: the low-rank sum with every output row rescaled to a learnt length (https://arxiv.org/abs/2402.09353).

``W' = magnitude / ||W + s B A|| * (W + s B A)``, the norm by rows and without gradient. ``B A`` is never built:
``||w + s b A||^2 = ||w||^2 + 2 s (w A^T) . b + s^2 b (A A^T) b^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.ops import dropout as drop
from inlay.ops.low_rank import low_rank, no_autocast, steps_aside

_SLICE = 1 << 17  # numbers of a slice: a few copies of it stay in a core's cache


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def square_norm(W_OI: Tensor) -> Tensor:
    """Row sums of squares of a frozen weight, fp32 (fp64 of fp64): what `weight_norm` takes as ``base_sq_O``."""
    norm_O: Tensor = torch.linalg.vector_norm(W_OI.detach(), dim=1, dtype=_wide(W_OI.dtype))
    return norm_O.square_()


@torch.no_grad()
def reference_norm(
    W_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float | Tensor, base_sq_O: Tensor | None = None
) -> Tensor:
    """`weight_norm` by building ``W + s B A``."""
    dtype = _wide(W_OI.dtype)
    with no_autocast(W_OI):
        delta_OI = (up_OR.to(dtype) @ down_RI.to(dtype)) * scale
        norm_O: Tensor = torch.linalg.vector_norm(W_OI.to(dtype) + delta_OI, dim=1)
    return norm_O


@torch.no_grad()
def weight_norm(
    W_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float | Tensor, base_sq_O: Tensor | None = None
) -> Tensor:
    """Row norms of ``W + scale * up @ down`` in O(out x in x rank), nothing of size out x in but a cast of W.

    Args:
        W_OI (`Tensor`): The frozen weight.
        down_RI (`Tensor`): First factor.
        up_OR (`Tensor`): Second factor.
        scale (`float` or 0-dim `Tensor`): Multiplies the product.
        base_sq_O (`Tensor`, *optional*): ``square_norm(W)``, which a frozen weight needs once.

    Returns:
        `Tensor`: (out,), fp32, or fp64 where ``W`` is; no gradient.

    Example:
        >>> weight_norm(torch.eye(2), torch.ones(1, 2), torch.tensor([[1.0], [0.0]]), 1.0)
        tensor([2.2361, 1.0000])
    """
    dtype = _wide(W_OI.dtype)
    with no_autocast(W_OI):
        return _factored_norm(W_OI.to(dtype), down_RI.to(dtype), up_OR.to(dtype), scale, base_sq_O)


def _factored_norm(
    W_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float | Tensor, base_sq_O: Tensor | None
) -> Tensor:
    scaled_OR = up_OR * scale
    # (2 W A^T + s B A A^T) . s B, row by row
    inner_OR = torch.addmm(torch.mm(scaled_OR, torch.mm(down_RI, down_RI.t())), W_OI, down_RI.t(), alpha=2.0)
    cross_O = (inner_OR * scaled_OR).sum(1)
    base_O = square_norm(W_OI) if base_sq_O is None else base_sq_O
    # Rounding can push a row that the product cancels below zero.
    return cross_O.add_(base_O).clamp_(min=0.0).sqrt_()


@torch.no_grad()
def grouped_norm(
    W_OI: Tensor, down_RC: Tensor, up_OR: Tensor, scale: float | Tensor, groups: int, base_sq_O: Tensor | None = None
) -> Tensor:
    """`weight_norm` where outputs see their group's I inputs through W, and all ``C = groups I`` through ``down``.

    Args:
        W_OI (`Tensor`): The frozen weight of a grouped convolution.
        down_RC (`Tensor`): First factor, over all inputs; each group's outputs have ``R / groups`` rows of it.
        up_OR (`Tensor`): Second factor, ``R / groups`` wide.
        scale (`float` or 0-dim `Tensor`): Multiplies the product.
        groups (`int`): How many.
        base_sq_O (`Tensor`, *optional*): ``square_norm(W)``.

    Returns:
        `Tensor`: (out,), as `weight_norm` of the weight over all inputs, which is zero beyond an output's group.
    """
    dtype = _wide(W_OI.dtype)
    with no_autocast(W_OI):
        W_GOI, up_GOR = (t.to(dtype).reshape(groups, -1, t.shape[1]) for t in (W_OI, up_OR * scale))
        down_GRC = down_RC.to(dtype).reshape(groups, -1, down_RC.shape[1])
        own_GRI = down_GRC.reshape(*down_GRC.shape[:2], groups, -1).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        inner_GOR = 2.0 * W_GOI @ own_GRI.mT + up_GOR @ (down_GRC @ down_GRC.mT)
        base_O = square_norm(W_OI) if base_sq_O is None else base_sq_O
        return (base_O + (inner_GOR * up_GOR).sum(2).flatten()).clamp_(min=0.0).sqrt_()


def reference(
    x_BI: Tensor,
    h_BO: Tensor,
    down_RI: Tensor,
    up_OR: Tensor,
    scale: float | Tensor,
    magnitude_O: Tensor,
    norm_O: Tensor,
    bias_O: Tensor | None = None,
    dropout: float = 0.0,
    *,
    mask: Tensor | None = None,
    h_dropped_BO: Tensor | None = None,
    h_is_fresh: bool = False,
) -> Tensor:
    """The formula of `dora` in plain torch, traceable and transformable."""
    x = x_BI.to(down_RI.dtype)
    if dropout and mask is not None:
        x = drop.reference(x, mask, dropout)
    base_BO = h_BO if h_dropped_BO is None else h_dropped_BO
    base_BO = base_BO if bias_O is None else base_BO - bias_O
    factor_O = magnitude_O / norm_O.detach()
    delta_BO = F.linear(F.linear(x, down_RI), up_OR) * scale
    return h_BO + ((factor_O - 1) * base_BO + factor_O * delta_BO).to(h_BO.dtype)


def dora(
    x_BI: Tensor,
    h_BO: Tensor,
    down_RI: Tensor,
    up_OR: Tensor,
    scale: float | Tensor,
    magnitude_O: Tensor,
    norm_O: Tensor,
    bias_O: Tensor | None = None,
    dropout: float = 0.0,
    *,
    mask: Tensor | None = None,
    h_dropped_BO: Tensor | None = None,
    h_is_fresh: bool = False,
    W_OI: Tensor | None = None,
) -> Tensor:
    """``h + (f - 1) (h' - b) + f scale (x' @ down.T) @ up.T`` with ``f = magnitude / norm``.

    Without dropout ``x' = x`` and ``h' = h``, and this is ``f (h - b + scale B A x) + b``. With dropout ``x'`` is the
    dropped input, ``h'`` the frozen layer's output for it, and ``h`` its output for ``x``, undropped. The caller draws
    the mask, because it makes both:

        mask = draw_mask(x.shape, p, x.device)
        dora(x, base(x), ..., dropout=p, mask=mask, h_dropped_BO=base(apply_mask(x, mask, p)))

    Saved for backward: ``x``, the packed mask, and ``h' - b + scale B A x'``.

    Args:
        x_BI (`Tensor`): The layer's input, not dropped.
        h_BO (`Tensor`): The frozen layer's output for ``x``, its bias included.
        down_RI (`Tensor`): First factor.
        up_OR (`Tensor`): Second factor.
        scale (`float` or 0-dim `Tensor`): Multiplies the product.
        magnitude_O (`Tensor`): The learnt lengths.
        norm_O (`Tensor`): `weight_norm`; a constant here.
        bias_O (`Tensor`, *optional*): The frozen layer's bias.
        dropout (`float`, *optional*, defaults to 0.0): Probability of dropping; 0 in eval.
        mask (`Tensor`, *optional*): `draw_mask` of ``x``; needed with dropout.
        h_dropped_BO (`Tensor`, *optional*): The frozen layer's output for the dropped ``x``; needed with dropout. It
            may come without, where ``x`` is dropped already.
        h_is_fresh (`bool`, *optional*, defaults to False): ``h`` and ``h_dropped`` may be written to.
        W_OI (`Tensor`, *optional*): As in `low_rank`; not with dropout.

    Returns:
        `Tensor`: Shape and dtype of ``h``.

    Raises:
        ValueError: Dropout without ``mask`` and ``h_dropped_BO``.

    Example:
        >>> x, W = torch.ones(1, 2), torch.eye(2)
        >>> down, up = torch.zeros(1, 2), torch.zeros(2, 1)
        >>> dora(x, x @ W.T, down, up, 1.0, torch.tensor([2.0, 3.0]), weight_norm(W, down, up, 1.0))
        tensor([[2., 3.]])
    """
    if dropout and (mask is None or h_dropped_BO is None):
        raise ValueError(f"dropout={dropout} needs mask= and h_dropped_BO=, the layer's output for the dropped input")
    if steps_aside(x_BI, h_BO, down_RI, up_OR, magnitude_O):
        return reference(
            x_BI, h_BO, down_RI, up_OR, scale, magnitude_O, norm_O, bias_O, dropout,
            mask=mask, h_dropped_BO=h_dropped_BO,
        )  # fmt: skip
    undropped_BO = None
    base_BO = h_BO
    if h_dropped_BO is not None:
        undropped_BO, base_BO = h_BO - h_dropped_BO, h_dropped_BO
    if bias_O is not None:
        base_BO, h_is_fresh = (base_BO - bias_O).to(h_BO.dtype), True
    sum_BO = low_rank(x_BI, base_BO, down_RI, up_OR, scale, dropout, mask=mask, h_is_fresh=h_is_fresh, W_OI=W_OI)
    out_BO: Tensor = _Stretch.apply(sum_BO, magnitude_O / norm_O.detach())  # type: ignore[no-untyped-call]
    if bias_O is not None:
        out_BO = out_BO.add_(bias_O)
    return out_BO if undropped_BO is None else out_BO.add_(undropped_BO)


def _times(c_BO: Tensor, factor_O: Tensor, out: Tensor | None = None) -> Tensor:
    """``c * factor`` in the dtype of ``c``, rounded once.

    A factor rounded to the narrow dtype would be wrong in the same direction for a whole row, and so would one split
    in a coarse and a fine part, since the fine one is lost in the second sum. Kernels that mix dtypes are slow on CPU.
    """
    if factor_O.dtype == c_BO.dtype:
        return torch.mul(c_BO, factor_O, out=out)
    wide_BO = c_BO.to(factor_O.dtype).mul_(factor_O)
    return wide_BO.to(c_BO.dtype) if out is None else out.copy_(wide_BO)


class _Stretch(torch.autograd.Function):
    """Rows times a factor. Saves its input, which autograd knows, so second derivatives are right."""

    @staticmethod
    def forward(ctx, c_BO, factor_O):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(c_BO, factor_O)
        return _times(c_BO, factor_O)

    @staticmethod
    def backward(ctx, g_BO):  # type: ignore[no-untyped-def]
        c_BO, factor_O = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return _times(g_BO, factor_O), None
        if torch.is_grad_enabled():
            g_factor_O = (g_BO * c_BO).reshape(-1, len(factor_O)).sum(0, dtype=factor_O.dtype)
            return _times(g_BO, factor_O), g_factor_O
        return _stretch_gradients(g_BO, c_BO, factor_O)


def _stretch_gradients(g_BO: Tensor, c_BO: Tensor, factor_O: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and factor, a slice of the rows at a time, which then is in the cache for the second."""
    outs = len(factor_O)
    g_TO = g_BO.reshape(-1, outs)
    g_c_TO = torch.empty_like(g_TO, memory_format=torch.contiguous_format)
    g_factor_O = torch.zeros_like(factor_O)
    size = max(1, _SLICE // outs) if g_TO.is_cpu else len(g_TO)  # elsewhere every slice is a launch
    slices = (torch.split(t, size) for t in (g_TO, c_BO.reshape(-1, outs), g_c_TO))
    for g, c, out in zip(*slices, strict=True):
        g_factor_O += torch.mul(g, c, out=out).sum(0, dtype=factor_O.dtype)
        _times(g, factor_O, out=out)
    return g_c_TO.view(g_BO.shape), g_factor_O
