"""Room for the second copy of a merged model's weights, in one piece.

A copy of a model's weights costs more for the kernel handing out fresh memory, 4 KiB at a time, than for the copying
itself. One mapping with huge pages, where the system has them, makes merging three times as fast, and one that is
still there from the last time costs nothing.
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
    """Hands out pieces of one mapping, which stays for the next round.

    When the last piece is gone, the memory is the system's to take: it does so when it runs short, and until then it
    is here without a page to be cleared.

    Example:
        >>> room = Arena().room(1 << 26)
        >>> room(torch.arange(3.0)).shape
        torch.Size([3])
    """

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._pieces: Callable[[], object] = lambda: None  # something, as long as any is left

    # A copy of a model has its own.
    def __reduce__(self) -> tuple[type[Arena], tuple[()]]:
        return Arena, ()

    def room(self, size: int) -> Callable[[Tensor], Tensor]:
        """What makes empty tensors like others, of ``size`` bytes (`bytes_of`) in all."""
        if size < _WORTHWHILE or sys.platform != "linux":
            return torch.empty_like
        if self._mapping is None or len(self._mapping) < size or self._pieces() is not None:
            self._mapping = _mapping(size)
        pages = memoryview(self._mapping)  # held by the storages of the pieces alone
        self._pieces = weakref.ref(pages)
        weakref.finalize(pages, _give_back, self._mapping).atexit = False
        return _Room(pages).like


class _Room:
    def __init__(self, pages: memoryview) -> None:
        self._pages, self._next = pages, 0

    def like(self, W: Tensor) -> Tensor:
        """A tensor like ``W`` with a storage of its own; in the mapping where it is dense and there is room."""
        start = self._next
        if W.device.type != "cpu" or not W.is_contiguous() or start + W.nbytes > len(self._pages) or not W.numel():
            return torch.empty_like(W)
        self._next += bytes_of(W)
        return torch.frombuffer(self._pages, dtype=W.dtype, count=W.numel(), offset=start).view(W.shape)


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
