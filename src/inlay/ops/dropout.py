"""Dropout that keeps one bit per element for backward.

The generator is the cost of dropout on a CPU, so no element gets a number of its own there. The mask is built 64
elements at a time by comparing random bit planes with the threshold, from the lowest bit up (``u < keep`` is
``~u_k | m`` where bit k of ``keep`` is set and ``~u_k & m`` where it is not), and comes out packed. The probability of
keeping is ``round((1 - p) * 65536) / 65536`` exactly. In large masks the eight lowest planes are shared by 16 elements
far apart: they decide one element in 256, so two such elements are dependent with probability 2**-16. Other devices
draw a number for each element.

The packed mask is stored, not the generator's state: drawing again in backward would cost the draw a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

STEPS = 65536  # probabilities are multiples of 1 / STEPS
_FINE_BITS = 8
_SHARE = 16  # elements that share one set of fine bits
_SHARE_FROM = 1024  # words of 64 elements; below this nothing is shared
_LOWEST = -(2**63)
_PIECE = {2: 1 << 19, 4: 1 << 17, 8: 1 << 16}  # numbers by item size; products of few narrow ones cost as many do


def keep_steps(p: float) -> int:
    """The probability of keeping an element, in 1/65536.

    Raises:
        ValueError: ``p`` is not in [0, 1].

    Example:
        >>> keep_steps(0.5)
        32768
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be between 0 and 1, found {p}")
    return round((1.0 - p) * STEPS)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by, so that the mean is unchanged (0.0 where nothing is kept)."""
    keep = keep_steps(p)
    return STEPS / keep if keep else 0.0


def draw_mask(shape: Sequence[int], p: float, device: torch.device | str | None = None) -> Tensor:
    """Draws which elements of a tensor of ``shape`` survive dropout.

    Args:
        shape (`Sequence[int]`): Shape of the tensor to drop.
        p (`float`): Probability of dropping an element.
        device (`torch.device`, *optional*): Where the mask lives and whose default generator is used.

    Returns:
        `Tensor`: uint8, ``ceil(numel / 64) * 8`` bytes, one bit per element.
    """
    numel = 1
    for size in shape:
        numel *= size
    words = -(-numel // 64)
    keep = keep_steps(p)
    if keep in (0, STEPS):
        return torch.full((words * 8,), 255 if keep else 0, dtype=torch.uint8, device=device)
    if device is not None and torch.device(device).type not in ("cpu", "meta"):
        return _compared(words, keep, device)
    share = _SHARE if words >= _SHARE_FROM else 1
    fine_words = -(-words // share)
    mask = _fold(None, keep & (2**_FINE_BITS - 1), (fine_words,), device)
    mask = _fold(mask, keep >> _FINE_BITS, (share, fine_words), device)
    assert mask is not None  # one of the sixteen bits is set
    # The copy lets go of the planes, which are eight times as large.
    return mask.view(-1)[:words].clone().view(torch.uint8)


def _compared(words: int, keep: int, device: torch.device | str) -> Tensor:
    """A number for each element, compared and packed: few launches, where drawing costs next to nothing."""
    kept = torch.randint(STEPS, (words * 2, 32), dtype=torch.int32, device=device) < keep
    bits = 1 << torch.arange(32, dtype=torch.int32, device=device)
    return (kept * bits).sum(1, dtype=torch.int32).view(torch.uint8)


def _fold(mask: Tensor | None, bits: int, shape: tuple[int, ...], device: torch.device | str | None) -> Tensor | None:
    """Compares a fresh random plane per bit with ``bits``, lowest first; ``mask`` is the result of the lower bits."""
    low = 0 if mask is not None else (bits & -bits).bit_length() - 1  # an all-zero tail compares as "not less"
    if low < 0:
        return None
    planes = _random_words((_FINE_BITS - low, *shape), device)
    for bit, plane in enumerate(planes.unbind(), start=low):
        if mask is None:
            mask = plane  # the lowest set bit, and nothing below
        elif bits >> bit & 1:
            mask = plane.bitwise_or_(mask)
        else:
            mask = plane.bitwise_and_(mask)
    return mask


def _random_words(shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    """64 random bits each."""
    if torch.compiler.is_compiling():  # random_ over the full range cannot be traced
        high = torch.randint(0, 2**32, shape, dtype=torch.int64, device=device)
        return (high << 32) | torch.randint(0, 2**32, shape, dtype=torch.int64, device=device)
    return torch.empty(shape, dtype=torch.int64, device=device).random_(_LOWEST, None)


def unpack(packed: Tensor, itemsize: int, room: Tensor | None = None) -> Tensor:
    """Zeros and ones as integers of ``itemsize`` bytes (2, 4 or 8), one per element, flat, padded to 64.

    In the memory of ``room`` (int32, one per element or per two of 2 bytes) where that is given.

    Bits 0, 16, 1, 17, ... of each 32-bit word belong to consecutive elements: the two of a pair then sit where
    one 32-bit lane of two 16-bit numbers wants them (16-bit shifts are not vectorised on CPU, 32-bit ones are).
    """
    words = packed.view(torch.int32).unsqueeze(1)
    shifts = torch.arange(32 if itemsize > 2 else 16, dtype=torch.int32, device=packed.device)
    if itemsize > 2:
        shifts = shifts.view(2, 16).t().reshape(32)
    room = None if room is None else room[: len(words) * len(shifts)].view(-1, len(shifts))
    lanes = torch.bitwise_right_shift(words, shifts, out=room)
    if itemsize == 2:
        return lanes.bitwise_and_(0x00010001).view(torch.int16).view(-1)
    lanes = lanes.bitwise_and_(1).view(-1)
    return lanes if itemsize == 4 else lanes.to(torch.int64)


class Mask:
    """A packed mask unpacked for tensors of one shape and item size, to be applied several times.

    Zero times a number's bits, taken for an integer, is zero, whatever the number is.
    """

    __slots__ = ("bits",)

    def __init__(self, packed: Tensor, like: Tensor, room: Tensor | None = None) -> None:
        self.bits = unpack(packed, like.element_size(), room)[: like.numel()].view(like.shape)

    def zero(self, x: Tensor) -> Tensor:
        """``x`` with the dropped elements zero, not rescaled; differentiable where gradients are recorded."""
        if x.requires_grad and torch.is_grad_enabled():
            return x * self.bits.to(x.dtype)
        return (x.view(self.bits.dtype) * self.bits).view(x.dtype)

    def taken_by(self, x: Tensor) -> Tensor:
        """`zero` where nothing is recorded, in this mask's own memory: its last use."""
        return self.bits.mul_(x.view(self.bits.dtype)).view(x.dtype)

    def zero_(self, x: Tensor) -> Tensor:
        """`zero` in place where nothing is recorded; ``x`` must be the caller's own."""
        if x.requires_grad and torch.is_grad_enabled():
            return self.zero(x)
        x.view(self.bits.dtype).mul_(self.bits)
        return x


def pieces(packed: Tensor, x_TI: Tensor) -> Iterator[tuple[slice, Mask]]:
    """Rows of ``x``, at least one piece of them, and their masks, each in the memory of the last: a core's cache.

    Elsewhere than on a CPU all rows are one piece.
    """
    rows, inner = x_TI.shape
    step = max(_PIECE[x_TI.element_size()] // max(inner, 1) // 64, 1) * 64 if x_TI.is_cpu else max(rows, 1)
    room = packed.new_empty(-(-min(step, rows) * inner // 64) * 64, dtype=torch.int32) if step < rows else None
    for start in range(0, max(rows, 1), step):
        at = slice(start, min(start + step, rows))
        yield at, Mask(packed[start * inner // 8 : -(-at.stop * inner // 64) * 8], x_TI[at], room)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, factor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(packed)
        ctx.factor = factor
        return Mask(packed, x).taken_by(x).mul_(factor)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (packed,) = ctx.saved_tensors
        return _Apply.apply(g, packed, ctx.factor), None, None  # type: ignore[no-untyped-call]


def apply_mask(x: Tensor, packed: Tensor, p: float) -> Tensor:
    """Dropout of ``x`` by a drawn mask; saves the packed mask and nothing else for backward.

    Args:
        x (`Tensor`): Any shape, a floating dtype of 2, 4 or 8 bytes.
        packed (`Tensor`): ``draw_mask(x.shape, p, x.device)``.
        p (`float`): The probability given to `draw_mask`.
    """
    dropped: Tensor = _Apply.apply(x, packed, keep_scale(p))  # type: ignore[no-untyped-call]
    return dropped


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Dropout of ``x``, and the mask that it was done by; None where ``x`` is of a class that has ways of its own."""
    if type(x) not in (Tensor, torch.nn.Parameter):
        return torch.nn.functional.dropout(x, p), None
    mask = draw_mask(x.shape, p, x.device)
    return apply_mask(x, mask, p), mask


def reference(x: Tensor, packed: Tensor, p: float) -> Tensor:
    """`apply_mask`, one bit at a time in plain torch."""
    words = packed.view(torch.int32).unsqueeze(1)
    bits = torch.arange(32, device=packed.device).view(2, 16).t().reshape(32)
    kept = (words >> bits & 1).view(-1)[: x.numel()].view(x.shape)
    return x * kept.to(x.dtype) * keep_scale(p)
