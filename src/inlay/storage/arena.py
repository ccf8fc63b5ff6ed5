"""Room for the pristine weights of a merged model, in one piece.

Copying a model's weights aside costs more for the kernel handing out fresh memory, 4 KiB at a time, than for the copy
itself. One mapping with huge pages, where the system has them, makes merging three times as fast, and one that is
still there from the last time costs nothing but the copy.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

_ALIGN = 64
_WORTHWHILE = 1 << 25  # up to here malloc hands out what was given back to it


class Arena:
    """Copies tensors into one mapping, which stays for the next round of copies.

    When the last copy is gone, the memory is the system's to take: it does so when it runs short, and until then it
    is here without a page to be cleared.

    Example:
        >>> copy = Arena().copier(1 << 26)
        >>> copy(torch.arange(3.0))
        tensor([0., 1., 2.])
    """

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._copies: Callable[[], object] = lambda: None  # something, as long as any is left

    # A copy of a model has its own.
    def __reduce__(self) -> tuple[type[Arena], tuple[()]]:
        return Arena, ()

    def copier(self, size: int) -> Callable[[Tensor], Tensor]:
        """What copies tensors of ``size`` bytes (`bytes_of`) in all; what has no place in a mapping is cloned."""
        if size < _WORTHWHILE or sys.platform != "linux":
            return torch.clone
        if self._mapping is None or len(self._mapping) < size or self._copies() is not None:
            self._mapping = _mapping(size)
        pages = memoryview(self._mapping)  # held by the storage of the copies alone
        self._copies = weakref.ref(pages)
        weakref.finalize(pages, _give_back, self._mapping).atexit = False
        return _Room(torch.frombuffer(pages, dtype=torch.uint8)).copy


class _Room:
    def __init__(self, room: Tensor) -> None:
        self._room, self._next = room, 0

    def copy(self, W: Tensor) -> Tensor:
        """A copy of ``W``, with its shape and strides where it is dense."""
        start, end = self._next, self._next + W.numel() * W.element_size()
        if W.device.type != "cpu" or not W.is_contiguous() or end > len(self._room):
            return W.detach().clone()
        self._next += bytes_of(W)
        return self._room[start:end].view(W.dtype).view(W.shape).copy_(W.detach())


def _mapping(size: int) -> mmap.mmap:
    # A shared mapping, Python's default, gets no huge pages.
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _give_back(mapping: mmap.mmap) -> None:
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_FREE)


def bytes_of(W: Tensor) -> int:
    """What one tensor takes in an `Arena`."""
    return -(-W.numel() * W.element_size() // _ALIGN) * _ALIGN
