"""Room for the pristine weights of a merged model, in one piece.

Copying a model's weights aside costs more for the kernel handing out fresh memory, 4 KiB at a time, than for the copy
itself. One mapping with huge pages, where the system has them, makes merging three times as fast.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

_ALIGN = 64
_WORTHWHILE = 1 << 22


class Arena:
    """Copies tensors into one mapping; whatever does not fit, or is not on the CPU, is cloned.

    The memory goes back when the last copy does.

    Args:
        size (`int`): Bytes to make room for.

    Example:
        >>> arena = Arena(1 << 23)
        >>> arena.copy(torch.arange(3.0))
        tensor([0., 1., 2.])
    """

    def __init__(self, size: int) -> None:
        self._next = 0
        self._room: Tensor | None = None
        if size >= _WORTHWHILE:
            self._room = torch.frombuffer(_mapping(size), dtype=torch.uint8)

    def copy(self, W: Tensor) -> Tensor:
        """A copy of ``W``, with its shape and strides where it is dense."""
        size = W.numel() * W.element_size()
        start, self._next = self._next, self._next + -(-size // _ALIGN) * _ALIGN
        if self._room is None or W.device.type != "cpu" or not W.is_contiguous() or start + size > len(self._room):
            return W.detach().clone()
        return self._room[start : start + size].view(W.dtype).view(W.shape).copy_(W.detach())


def _mapping(size: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(-1, size)
    # A shared mapping, Python's default, gets no huge pages.
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def bytes_of(W: Tensor) -> int:
    """What one tensor takes in an `Arena`."""
    return -(-W.numel() * W.element_size() // _ALIGN) * _ALIGN
