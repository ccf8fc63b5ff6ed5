"""A weight kept as an ordinary parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from inlay.storage._abstract import Storage


class Plain(Storage):
    """An ordinary `torch.nn.Parameter`."""

    name = "plain"
    in_place = True

    def owns(self, layer: nn.Module) -> bool:
        return True

    @contextmanager
    def reading(self, layer: nn.Module, parameter: str = "weight") -> Iterator[Tensor]:
        yield layer.get_parameter(parameter)

    def write(self, layer: nn.Module, W: Tensor, parameter: str = "weight") -> None:
        with torch.no_grad():
            layer.get_parameter(parameter).copy_(W)

    def keep(self, layer: nn.Module, parameter: str, copy: Callable[[Tensor], Tensor]) -> Tensor:
        return copy(layer.get_parameter(parameter))

    def restore(self, layer: nn.Module, kept: Tensor, parameter: str = "weight") -> None:
        self.write(layer, kept, parameter)

    def facts(self, layer: nn.Module, parameter: str = "weight") -> tuple[torch.dtype, torch.device]:
        W: Tensor = getattr(layer, parameter)
        return (W.dtype if W.is_floating_point() else torch.get_default_dtype()), W.device
