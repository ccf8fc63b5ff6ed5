"""What a storage backend is: reading and writing one frozen weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Rounding(NamedTuple):
    """What packing has made of a weight, relative to what it was to be.

    Args:
        mean (`float`): Mean difference over the mean size of the weight's numbers.
        largest (`float`): Largest difference over the largest number.
    """

    mean: float
    largest: float

    @classmethod
    def of(cls, wanted: Tensor, stands: Tensor) -> Rounding:
        """The difference of two dense weights."""
        size, off = wanted.abs().float(), (stands.float() - wanted.float()).abs()
        tiny = torch.finfo(torch.float32).tiny
        return cls(float(off.mean() / size.mean().clamp(min=tiny)), float(off.max() / size.max().clamp(min=tiny)))


class Storage(ABC):
    """How the weight of a layer is kept. Stateless: a row of `STORAGES`.

    A weight *as stored* is the parameter, with all that is needed to read it as attributes of its own.
    """

    name: ClassVar[str]
    # The stored parameter is the dense weight itself: products may be added into it, and it can be trained.
    in_place: ClassVar[bool] = False

    @abstractmethod
    def owns(self, layer: nn.Module, parameter: str = "weight") -> bool:
        """Whether this parameter of the layer is kept in this way."""

    def unreadable(self, layer: nn.Module, parameter: str) -> str | None:
        """Why this one weight can be neither read nor written, or None."""
        return None

    @abstractmethod
    def stored(self, layer: nn.Module, parameter: str) -> Tensor:
        """The weight as stored, as it stands in the layer."""

    @abstractmethod
    def dense(self, layer: nn.Module, stored: Tensor) -> Tensor:
        """A weight as stored, in the layer's own layout and the dtype of `facts`."""

    def parts(self, stored: Tensor) -> tuple[Tensor, ...]:
        """The tensors that a weight as stored consists of: it has changed where one of them has."""
        return (stored,)

    @contextmanager
    def reading(self, layer: nn.Module, parameter: str = "weight") -> Iterator[Tensor]:
        """The weight in the layer's own layout, dense and on its device, valid inside the ``with``."""
        yield self.dense(layer, self.stored(layer, parameter))

    @abstractmethod
    def write(self, layer: nn.Module, W: Tensor, parameter: str = "weight") -> None:
        """Replaces the weight's values in place: pointers and ties stay."""

    @abstractmethod
    def keep(self, layer: nn.Module, parameter: str, room: Callable[[Tensor], Tensor]) -> Tensor:
        """A copy, in ``room``, of the weight as stored, from which `restore` gives back the same bits."""

    def exchange(self, layer: nn.Module, parameter: str, make: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Has the parameter keep its numbers in what ``make`` makes of them, and returns where they were kept.

        None, and nothing done, where the numbers have to stay where they are: somebody else sees that memory too.
        """
        return None

    @abstractmethod
    def restore(self, layer: nn.Module, kept: Tensor, parameter: str = "weight") -> None:
        """Undoes every write since `keep`, to the bit."""

    def moved(self, kept: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """What `nn.Module._apply` makes of a weight that was kept."""
        return fn(kept)

    def settle(self, layer: nn.Module) -> None:
        """Has all else that the layer holds follow its parameter, where that was replaced, moved or is new to us."""

    @abstractmethod
    def facts(self, layer: nn.Module, parameter: str = "weight") -> tuple[torch.dtype, torch.device]:
        """dtype and device of what a method should compute in, without reading the weight."""

    def numel(self, parameter: Any) -> int:
        """How many numbers a parameter stands for."""
        return int(parameter.numel())

    def nbytes(self, stored: Tensor) -> int:
        """Bytes of a weight as stored, and of all that belongs to it."""
        return sum(t.nbytes for t in self.parts(stored))


class Packed(Storage):
    """A weight packed into numbers and statistics: a row says how both are made and put in place."""

    @abstractmethod
    def pack(self, layer: Any, W: Tensor) -> Tensor:
        """``W`` as the layer would store it."""

    @abstractmethod
    def put(self, layer: Any, packed: Any) -> None:
        """Gives the layer the values of a weight as stored, in place."""

    def write(self, layer: nn.Module, W: Tensor, parameter: str = "weight") -> None:
        self.put(layer, self.pack(layer, W.detach().contiguous()))

    def keep(self, layer: nn.Module, parameter: str, room: Callable[[Tensor], Tensor]) -> Tensor:
        return deepcopy(self.stored(layer, parameter))

    def restore(self, layer: nn.Module, kept: Tensor, parameter: str = "weight") -> None:
        self.put(layer, kept)
