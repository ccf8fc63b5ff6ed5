"""``h + scale * (dropout(x) @ down.T) @ up.T`` in the fewest passes over the large tensors.

Training runs one autograd function that keeps ``x`` as it is, of dropout one bit per element, and the middle, of size
rank x tokens, where all is of one dtype. Second derivatives need it as a function of tensors that autograd knows:
there it is computed again. A few tokens take plain torch instead, whose backward does not enter Python.

Where the factors have a wider dtype than a bfloat16 ``x`` (fp32 adapters on a bf16 model), many tokens are multiplied
in bfloat16 with fp32 accumulation, as autocast does, and added to ``h`` with a single rounding; few tokens are
widened instead, which on a CPU is then cheaper than narrowing the factors. The factors' gradients are computed in
their own dtype there, from copies of ``x`` and ``h``'s gradient that live as long as the call; elsewhere from ``x``
and the gradient as they are, with sums and results in the factors' dtype: copies cost more there than products do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F

from inlay.ops import dropout as drop

_PLAIN = frozenset({torch.Tensor, nn.Parameter, type(None)})
_FEW = 1 << 17  # numbers of h, up to which entering Python in backward costs more than copying them
_SLICE = 128  # tokens widened at once: their copies stay in a core's cache


def steps_aside(*tensors: Tensor | None) -> bool:
    """True where only the readable formula works: functorch, forward-mode AD, tracing, tensor subclasses."""
    if is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return not _PLAIN.issuperset(map(type, tensors))


def reference(
    x_BI: Tensor,
    h_BO: Tensor,
    down_RI: Tensor,
    up_OR: Tensor,
    scale: float | Tensor,
    dropout: float = 0.0,
    bias_O: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    h_is_fresh: bool = False,
) -> Tensor:
    """The formula of `low_rank` in plain torch, traceable and transformable; without a mask, torch draws its own."""
    x = x_BI.to(down_RI.dtype)
    if dropout:
        x = F.dropout(x, dropout) if mask is None else drop.reference(x, mask, dropout)
    delta_BO = F.linear(F.linear(x, down_RI), up_OR, bias_O)
    return h_BO + (delta_BO * scale).to(h_BO.dtype)


def low_rank(
    x_BI: Tensor,
    h_BO: Tensor,
    down_RI: Tensor,
    up_OR: Tensor,
    scale: float | Tensor,
    dropout: float = 0.0,
    bias_O: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    h_is_fresh: bool = False,
) -> Tensor:
    """Adds a low-rank product to a layer's output.

    Args:
        x_BI (`Tensor`): The layer's input, any number of leading dimensions (none too). Never modified.
        h_BO (`Tensor`): The layer's output, same leading dimensions.
        down_RI (`Tensor`): First factor.
        up_OR (`Tensor`): Second factor.
        scale (`float` or 0-dim `Tensor`): Multiplies the product; a tensor stays one, and gets no gradient.
        dropout (`float`, *optional*, defaults to 0.0): Probability of dropping an element of ``x``; 0 in eval.
        bias_O (`Tensor`, *optional*): Bias of the second factor, scaled like the product.
        mask (`Tensor`, *optional*): ``draw_mask(x.shape, dropout)`` where the caller needs to know it.
        h_is_fresh (`bool`, *optional*, defaults to False): Nobody else holds ``h``: it may be written to.

    Returns:
        `Tensor`: Shape and dtype of ``h``.

    Example:
        >>> x, h = torch.ones(2, 3), torch.zeros(2, 4)
        >>> low_rank(x, h, torch.ones(1, 3), torch.ones(4, 1), 2.0)[0]
        tensor([6., 6., 6., 6.])
    """
    if steps_aside(x_BI, h_BO, down_RI, up_OR):
        return reference(x_BI, h_BO, down_RI, up_OR, scale, dropout, bias_O, mask=mask)
    if dropout and mask is None:
        mask = drop.draw_mask(x_BI.shape, dropout, x_BI.device)
    if isinstance(scale, Tensor):
        scale = scale.detach()
    if h_is_fresh and torch._C._len_torch_dispatch_stack():  # selective checkpointing, which may hold it
        h_is_fresh = False
    recorded = torch.is_grad_enabled() and (
        down_RI.requires_grad
        or up_OR.requires_grad
        or x_BI.requires_grad
        or h_BO.requires_grad
        or (bias_O is not None and bias_O.requires_grad)
    )
    if dropout and mask is not None and not recorded:
        x_BI = drop.apply_mask(x_BI, mask, dropout)
    if x_BI.dtype is down_RI.dtype is h_BO.dtype and bias_O is None and not torch._C._is_any_autocast_enabled():
        if not recorded:
            return _add_product(x_BI, h_BO, down_RI, up_OR, scale, h_is_fresh)
        if not dropout and h_BO.numel() <= _FEW:
            return _add_product(x_BI, h_BO, down_RI, up_OR, scale, False)
    if not recorded:
        return _infer(x_BI, h_BO, down_RI, up_OR, scale, bias_O, h_is_fresh)
    dtype = compute_dtype(x_BI, down_RI)
    in_place = h_is_fresh and h_BO.dtype == dtype and h_BO.is_contiguous() and not h_BO._is_view()
    packed, keep = (mask, drop.keep_scale(dropout)) if dropout else (None, 1.0)
    out: Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
        x_BI, h_BO, down_RI, up_OR, bias_O, packed, scale, keep, dtype, in_place
    )
    return out


def _on_cpu(t: Tensor) -> bool:
    """Whether copies are cheap beside launches; what is counted on the meta device is counted as a CPU's."""
    return t.is_cpu or t.is_meta


def autocasts(t: Tensor) -> bool:
    """True where autocast is on for the tensor's device."""
    device = t.device.type
    return torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device)


def no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given; costs nothing where autocast is off."""
    return torch.autocast(t.device.type, enabled=False) if autocasts(t) else nullcontext()


def compute_dtype(x_BI: Tensor, down_RI: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's, else the factors', else bfloat16 where narrowing them is cheaper."""
    given = x_BI.dtype
    if autocasts(x_BI):
        return down_RI.dtype if down_RI.dtype == torch.float64 else torch.get_autocast_dtype(x_BI.device.type)
    if given == torch.bfloat16 and down_RI.dtype == torch.float32:
        return given if x_BI.numel() > down_RI.numel() or not _on_cpu(x_BI) else down_RI.dtype
    return down_RI.dtype


def _infer(
    x_BI: Tensor,
    h_BO: Tensor,
    down_RI: Tensor,
    up_OR: Tensor,
    scale: float | Tensor,
    bias_O: Tensor | None,
    fresh: bool,
) -> Tensor:
    """Brings everything to one dtype for `_add_product`. Nothing is recorded."""
    dtype = compute_dtype(x_BI, down_RI)
    x_BI, down_RI, up_OR = x_BI.to(dtype), down_RI.to(dtype), up_OR.to(dtype)
    if bias_O is not None:
        h_BO, fresh = torch.add(h_BO, (bias_O * scale).to(h_BO.dtype)), True
    if h_BO.dtype == dtype:
        return _add_product(x_BI, h_BO, down_RI, up_OR, scale, fresh)
    delta_BO = F.linear(F.linear(x_BI, down_RI).mul_(scale), up_OR).to(h_BO.dtype)
    return h_BO.add_(delta_BO) if fresh and h_BO.is_contiguous() else h_BO + delta_BO


def _add_product(
    x_BI: Tensor, h_BO: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float | Tensor, fresh: bool
) -> Tensor:
    """``h + scale * x @ down.T @ up.T`` in two launches, three with a tensor for a scale; the rest are views."""
    outs, ins = up_OR.shape[0], down_RI.shape[1]
    if x_BI.numel() == ins:
        mid_R = torch.mv(down_RI, x_BI.reshape(ins))
        if isinstance(scale, Tensor):
            mid_R, scale = mid_R * scale, 1.0
        if fresh and h_BO.is_contiguous():
            h_BO.view(outs).addmv_(up_OR, mid_R, alpha=scale)
            return h_BO
        return torch.addmv(h_BO.reshape(outs), up_OR, mid_R, alpha=scale).view(h_BO.shape)
    flat = x_BI.dim() == 2  # views of what is flat already would be nodes of autograd all the same
    mid_TR = torch.mm(x_BI if flat else x_BI.reshape(-1, ins), down_RI.t())
    if isinstance(scale, Tensor):
        mid_TR, scale = mid_TR * scale, 1.0
    h_TO = h_BO if flat else h_BO.reshape(-1, outs)
    if fresh and h_BO.is_contiguous():
        h_TO.addmm_(mid_TR, up_OR.t(), alpha=scale)
        return h_BO
    h_TO = torch.addmm(h_TO, mid_TR, up_OR.t(), alpha=scale)
    return h_TO if flat else h_TO.view(h_BO.shape)


class _LowRank(torch.autograd.Function):
    """Saves x, the factors, the packed mask and, where it is exact, the middle; T is the number of tokens.

    Where casting the factors again is dearer than their memory, narrow copies too, of ``up`` with the factor in it.
    """

    @staticmethod
    def forward(ctx, x_BI, h_BO, down_RI, up_OR, bias_O, packed, scale, keep, dtype, in_place):  # type: ignore[no-untyped-def]
        ctx.scale, ctx.factor, ctx.dtype = scale, scale if packed is None else scale * keep, dtype
        ctx.autocast = autocasts(x_BI)
        ctx.set_materialize_grads(False)
        x_TI = x_BI.reshape(-1, x_BI.shape[-1])
        if packed is not None:
            x_TI = drop.Mask(packed, x_TI).taken_by(x_TI)
        mid_TR = torch.mm(x_TI.to(dtype), (down := down_RI.to(dtype)).t())
        exact = x_BI.dtype == dtype == down_RI.dtype
        if exact:
            mid_TR, up = mid_TR * ctx.factor, up_OR
        else:  # cast and scaled in one pass
            up = torch.mul(up_OR, ctx.factor, out=up_OR.new_empty(up_OR.shape, dtype=dtype))
        narrow = (down, up) if not exact and dtype != down_RI.dtype and not _on_cpu(x_BI) else (None, None)
        ctx.save_for_backward(x_BI, down_RI, up_OR, bias_O, packed, mid_TR if exact else None, *narrow)
        h_TO, up_RO = h_BO.reshape(-1, h_BO.shape[-1]), up.t()
        if in_place:
            ctx.mark_dirty(h_BO)
            h_TO.addmm_(mid_TR, up_RO)
            out = h_BO
        elif h_BO.dtype == dtype:
            out = torch.addmm(h_TO, mid_TR, up_RO).view(h_BO.shape)
        else:
            out = torch.add(h_TO, torch.mm(mid_TR, up_RO).to(h_BO.dtype)).view(h_BO.shape)
        if bias_O is not None:
            scaled_O = (bias_O * scale).to(out.dtype)
            out = out.add_(scaled_O) if in_place else out + scaled_O
        return out

    @staticmethod
    def backward(ctx, g_BO):  # type: ignore[no-untyped-def]
        if g_BO is None:
            return (None,) * 10
        with no_autocast(g_BO):
            return (*_gradients(ctx, g_BO), None, None, None, None, None)


def _gradients(ctx, g_BO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """Gradients of x, h, down, up, bias; differentiable operations on saved inputs only, where that is asked for."""
    x_BI, down_RI, up_OR, bias_O, packed, mid_TR, down, up = ctx.saved_tensors
    need_x, need_h, need_down, need_up, need_bias = ctx.needs_input_grad[:5]
    x_TI, g_TO = x_BI.reshape(-1, x_BI.shape[-1]), g_BO.reshape(-1, g_BO.shape[-1])
    mask = None if packed is None else drop.Mask(packed, x_TI)
    if torch.is_grad_enabled():
        mid_TR = down = None
    trains = need_down or need_up
    # In the factors' dtype, although the products were narrow: they are what is trained.
    wide = down_RI.dtype if trains and not ctx.autocast else ctx.dtype
    dx = ddown = dup = None
    if trains and mid_TR is None:
        kept_TI = x_TI if mask is None else mask.zero(x_TI)
        if down is not None:
            x, g = kept_TI.to(ctx.dtype), g_TO.to(ctx.dtype)
            ddown, dup, dmid_TR = _narrow_gradients(x, g, down, up, ctx.factor, down_RI.dtype)
        else:
            ddown, dup, dmid_TR = _factor_gradients(kept_TI, g_TO, down_RI.to(wide), up_OR.to(wide), ctx.factor)
    else:
        g_TO = g_TO.to(wide)
        dmid_TR = torch.mm(g_TO, up_OR.to(wide)) * ctx.factor
    if need_x:
        dx = torch.mm(dmid_TR.to(ctx.dtype), down_RI.to(ctx.dtype) if down is None else down).to(x_BI.dtype)
        dx = (dx if mask is None else mask.zero_(dx)).view(x_BI.shape)
    if ddown is None and trains:
        kept_TI = x_TI if mask is None else mask.taken_by(x_TI)
        ddown, dup = torch.mm(dmid_TR.t(), kept_TI), torch.mm(mid_TR.t(), g_TO).t()
    return (
        dx,
        g_BO if need_h else None,
        ddown.to(down_RI.dtype) if ddown is not None and need_down else None,
        dup.to(up_OR.dtype) if dup is not None and need_up else None,
        (g_TO.sum(0) * ctx.scale).to(bias_O.dtype) if need_bias else None,
    )


def _factor_gradients(
    x_TI: Tensor, g_TO: Tensor, down_RI: Tensor, up_OR: Tensor, factor: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of down, up and the middle in the factors' dtype, to which x and g are widened a slice at a time."""
    dtype, tokens = down_RI.dtype, x_TI.shape[0]
    down_IR, up_OR = (down_RI.t() * factor).contiguous(), up_OR * factor
    if torch.is_grad_enabled() or tokens <= _SLICE or x_TI.dtype == g_TO.dtype == dtype or not _on_cpu(x_TI):
        x_TI, g_TO = x_TI.to(dtype), g_TO.to(dtype)
        mid_TR, dmid_TR = torch.mm(x_TI, down_IR), torch.mm(g_TO, up_OR)
        return torch.mm(dmid_TR.t(), x_TI), torch.mm(mid_TR.t(), g_TO).t(), dmid_TR
    ddown_RI, dup_RO = torch.zeros_like(down_RI), g_TO.new_zeros(len(down_RI), g_TO.shape[1], dtype=dtype)
    dmid_TR = g_TO.new_empty(tokens, len(down_RI), dtype=dtype)
    x_room, g_room = (t.new_empty(_SLICE, t.shape[1], dtype=dtype) for t in (x_TI, g_TO))
    for x, g, dmid in zip(*(torch.split(t, _SLICE) for t in (x_TI, g_TO, dmid_TR)), strict=True):
        x, g = x_room[: len(x)].copy_(x), g_room[: len(g)].copy_(g)
        torch.mm(g, up_OR, out=dmid)
        ddown_RI.addmm_(dmid.t(), x)
        dup_RO.addmm_(torch.mm(x, down_IR).t(), g)
    return ddown_RI, dup_RO.t(), dmid_TR


def _narrow_gradients(
    x_TI: Tensor, g_TO: Tensor, down_RI: Tensor, up_OR: Tensor, factor: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from narrow products, ``up`` with the factor in it; sums over the tokens come in ``dtype``."""
    mid_TR, dmid_TR = torch.mm(x_TI, down_RI.t()), torch.mm(g_TO, up_OR)
    return _widely(dmid_TR.t(), x_TI, dtype), _widely(g_TO.t(), mid_TR, dtype).mul_(factor), dmid_TR


def _widely(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of narrow matrices in a wider dtype: that of its sums, where the device gives them as they are."""
    if a.is_cuda and dtype == torch.float32:
        wide: Tensor = torch.mm(a, b, out_dtype=dtype)
        return wide
    return torch.mm(a.to(dtype), b.to(dtype))
