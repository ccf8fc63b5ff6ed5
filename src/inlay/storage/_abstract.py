"""What a storage backend is: reading and writing one frozen weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn


class Storage(ABC):
    """How the weight of a layer is kept. Stateless: a row of `STORAGES`."""

    name: ClassVar[str]
    # The stored parameter is the dense weight itself: products may be added into it.
    in_place: ClassVar[bool] = False

    @abstractmethod
    def owns(self, layer: nn.Module) -> bool:
        """Whether the layer's weight is kept in this way."""

    @abstractmethod
    def reading(self, layer: nn.Module, parameter: str = "weight") -> AbstractContextManager[Tensor]:
        """The weight in the layer's own layout, dense and on its device, valid inside the ``with``."""

    @abstractmethod
    def write(self, layer: nn.Module, W: Tensor, parameter: str = "weight") -> None:
        """Replaces the weight's values in place: pointers and ties stay."""

    @abstractmethod
    def keep(self, layer: nn.Module, parameter: str, copy: Callable[[Tensor], Tensor]) -> Tensor:
        """A ``copy`` of the weight as it is stored, from which `restore` gives back the same bits."""

    @abstractmethod
    def restore(self, layer: nn.Module, kept: Tensor, parameter: str = "weight") -> None:
        """Undoes every write since `keep`, to the bit."""

    @abstractmethod
    def facts(self, layer: nn.Module, parameter: str = "weight") -> tuple[torch.dtype, torch.device]:
        """dtype and device of what a method should compute in, without reading the weight."""
