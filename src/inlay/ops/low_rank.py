"""``h + scale * (dropout(x) @ down.T) @ up.T`` in the fewest passes over the large tensors.

Training runs one autograd function that keeps ``x`` as it is, of dropout one bit per element, and the middle, of size
rank x tokens. Second derivatives need that as a function of tensors that autograd knows: there it is computed again.
A few tokens take plain torch instead, whose backward does not enter Python.

Where the factors have a wider dtype than a bfloat16 ``x`` (fp32 adapters on a bf16 model), many tokens are multiplied
in bfloat16 with fp32 accumulation, as autocast does, and added to ``h`` with a single rounding; few tokens are
widened instead, which on a CPU is then cheaper than narrowing the factors. The factors' gradients come from the same
narrow products, summed over the tokens in the factors' dtype: widened copies would cost more than all else here, and
the rounding is that of ``x`` and of ``h``'s gradient.
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
_PIECE, _PIECES = 256, 16  # tokens whose products are summed in a narrow dtype; more, where those are more pieces


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
    W_OI: Tensor | None = None,
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
        W_OI (`Tensor`, *optional*): The frozen weight, where `takes_in` said yes and ``h = x @ W.T + constant`` was
            not recorded: the gradient of ``x`` goes through ``h`` too then.

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
        if not dropout and h_BO.numel() <= _FEW and W_OI is None:
            return _add_product(x_BI, h_BO, down_RI, up_OR, scale, False)
    if not recorded:
        return _infer(x_BI, h_BO, down_RI, up_OR, scale, bias_O, h_is_fresh)
    dtype = compute_dtype(x_BI, down_RI)
    in_place = h_is_fresh and h_BO.dtype == dtype and h_BO.is_contiguous() and not h_BO._is_view()
    packed, keep = (mask, drop.keep_scale(dropout)) if dropout else (None, 1.0)
    out: Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
        x_BI, h_BO, down_RI, up_OR, bias_O, packed, W_OI, scale, keep, dtype, in_place
    )
    return out


def takes_in(x_BI: Tensor, W_OI: Tensor, b_O: Tensor | None, *factors: Tensor) -> bool:
    """Whether `low_rank` of a recorded ``x`` can do the backward pass of a frozen ``x @ W.T + b``, and gains by it.

    Two gradients of ``x`` are a pass over the largest tensors and the memory of one more of them; one sum of products
    is neither.
    """
    return (
        not steps_aside(x_BI, W_OI, *factors)
        and not (W_OI.requires_grad or (b_O is not None and b_O.requires_grad))
        and x_BI.dtype is W_OI.dtype
        and x_BI.shape[:-1].numel() * W_OI.shape[0] > _FEW
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._len_torch_dispatch_stack()
    )


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
    """Saves x, the factors, narrow copies of them where those are used, the packed mask and the middle.

    T is the number of tokens. A narrow ``up`` has the factor in it, a middle in the factors' own dtype has it too.
    """

    @staticmethod
    def forward(ctx, x_BI, h_BO, down_RI, up_OR, bias_O, packed, W_OI, scale, keep, dtype, in_place):  # type: ignore[no-untyped-def]
        ctx.scale, ctx.factor, ctx.dtype = scale, scale if packed is None else scale * keep, dtype
        ctx.set_materialize_grads(False)
        x_TI = x_BI.reshape(-1, x_BI.shape[-1])
        down, up = down_RI.to(dtype), up_OR
        if dtype != up_OR.dtype:  # cast and scaled in one pass
            up = torch.mul(up_OR, ctx.factor, out=up_OR.new_empty(up_OR.shape, dtype=dtype))
        mid_TR = _middle(x_TI, down, packed)
        if dtype == up_OR.dtype:
            mid_TR = mid_TR * ctx.factor  # not in place: selective checkpointing may hold the product
        narrow = (None, None) if dtype == up_OR.dtype else (down, up)
        ctx.save_for_backward(x_BI, down_RI, up_OR, bias_O, packed, W_OI, mid_TR, *narrow)
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
            return (None,) * 11
        with no_autocast(g_BO):
            again = torch.is_grad_enabled() or steps_aside(g_BO) or torch._C._functorch.is_legacy_batchedtensor(g_BO)
            return (*(_readable_gradients if again else _gradients)(ctx, g_BO), None, None, None, None, None, None)


def _middle(x_TI: Tensor, down_RI: Tensor, packed: Tensor | None) -> Tensor:
    """``drop(x) @ down.T``, not rescaled, in the dtype of ``down``."""
    if packed is None:
        return torch.mm(x_TI.to(down_RI.dtype), down_RI.t())
    mid_TR, down_IR = down_RI.new_empty(len(x_TI), len(down_RI)), down_RI.t()
    for at, mask in drop.pieces(packed, x_TI):
        torch.mm(mask.taken_by(x_TI[at]).to(down_RI.dtype), down_IR, out=mid_TR[at])
    return mid_TR


def _readable_gradients(ctx, g_BO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """Gradients of x, h, down, up, bias as functions of saved inputs, in the factors' dtype: to be derived again."""
    x_BI, down_RI, up_OR, bias_O, packed, W_OI, *_ = ctx.saved_tensors
    x_TI, g_TO = x_BI.reshape(-1, x_BI.shape[-1]), g_BO.reshape(-1, g_BO.shape[-1])
    mask = None if packed is None else drop.Mask(packed, x_TI)
    kept_TI = (x_TI if mask is None else mask.zero(x_TI)).to(down_RI.dtype)
    wide_TO = g_TO.to(up_OR.dtype)
    mid_TR, dmid_TR = torch.mm(kept_TI, down_RI.t()) * ctx.factor, torch.mm(wide_TO, up_OR) * ctx.factor
    dx_TI = torch.mm(dmid_TR, down_RI).to(x_BI.dtype)
    dx_TI = dx_TI if mask is None else mask.zero(dx_TI)
    if W_OI is not None:
        dx_TI = dx_TI + torch.mm(g_TO, W_OI)
    dbias_O = None if bias_O is None else (wide_TO.sum(0) * ctx.scale).to(bias_O.dtype)
    return dx_TI.view(x_BI.shape), g_BO, torch.mm(dmid_TR.t(), kept_TI), torch.mm(mid_TR.t(), wide_TO).t(), dbias_O


def _gradients(ctx, g_BO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """The same from the products' own dtype and the middle, of those that are needed."""
    x_BI, down_RI, up_OR, bias_O, packed, W_OI, mid_TR, down, up = ctx.saved_tensors
    need_x, need_h, need_down, need_up, need_bias = ctx.needs_input_grad[:5]
    dtype, given_TO = ctx.dtype, g_BO.reshape(-1, g_BO.shape[-1])
    g_TO, narrow = given_TO.to(dtype), down is not None
    if not narrow:
        down, up = down_RI.to(dtype), up_OR
    dmid_TR = torch.mm(g_TO, up)
    dmid_TR = dmid_TR if narrow else dmid_TR.mul_(ctx.factor)
    dx = ddown = dup = None
    if need_up:  # while the gradient is in the cache
        dup = _over_tokens(mid_TR, g_TO, up_OR.dtype).t()
        dup = dup.mul_(ctx.factor) if narrow else dup
    if need_x or need_down:
        # New memory that no view shares: autograd adds what other layers give for the same x in place.
        dx = torch.empty_like(x_BI, memory_format=torch.contiguous_format) if need_x else None
        ddown = _input_gradients(x_BI, dmid_TR, down, packed, dx, down_RI.dtype if need_down else None)
        if dx is not None and W_OI is not None:
            dx.view(-1, x_BI.shape[-1]).addmm_(given_TO, W_OI)
    dbias_O = (g_TO.sum(0, dtype=bias_O.dtype) * ctx.scale).to(bias_O.dtype) if need_bias else None
    return dx, g_BO if need_h else None, ddown, dup, dbias_O


def _input_gradients(
    x_BI: Tensor, dmid_TR: Tensor, down_RI: Tensor, packed: Tensor | None, dx: Tensor | None, wide: torch.dtype | None
) -> Tensor | None:
    """Fills ``dx``, where there is one, and returns the gradient of ``down`` in the dtype ``wide``, where that is one.

    With dropout in pieces: each part of the mask is unpacked once, for both.
    """
    x_TI, ddown = x_BI.reshape(-1, x_BI.shape[-1]), None
    for at, mask in ((slice(None), None),) if packed is None else drop.pieces(packed, x_TI):
        dmid, x = dmid_TR[at], x_TI[at]
        if dx is not None:
            out = dx.view(x_TI.shape)[at]
            if out.dtype == dmid.dtype:
                torch.mm(dmid, down_RI, out=out)
            else:
                out.copy_(torch.mm(dmid, down_RI))
            if mask is not None:
                mask.zero_(out)
        if wide is not None:
            part = _over_tokens(dmid, (x if mask is None else mask.taken_by(x)).to(dmid.dtype), wide)
            ddown = part if ddown is None else ddown.add_(part)
    return ddown


def _over_tokens(a_TR: Tensor, b_TO: Tensor, dtype: torch.dtype) -> Tensor:
    """``a.T @ b`` in a dtype that may be wider than theirs.

    Devices give the sums of a narrow product as they are. A CPU rounds what it gives: there the products of some
    tokens each are summed in the wide dtype.
    """
    if dtype == a_TR.dtype:
        return torch.mm(a_TR.t(), b_TO)
    if a_TR.is_cuda and dtype == torch.float32:
        wide: Tensor = torch.mm(a_TR.t(), b_TO, out_dtype=dtype)
        return wide
    pieces = min(max(1, len(a_TR) // _PIECE), _PIECES)
    body = len(a_TR) - len(a_TR) % pieces
    a_PTR, b_PTO = (t[:body].view(pieces, -1, t.shape[1]) for t in (a_TR, b_TO))
    total_RO = torch.bmm(a_PTR.mT.contiguous(), b_PTO).sum(0, dtype=dtype)
    return total_RO if body == len(a_TR) else total_RO.add_(torch.mm(a_TR[body:].t(), b_TO[body:]))
