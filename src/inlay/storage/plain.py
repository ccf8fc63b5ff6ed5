"""A weight kept as an ordinary parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from inlay.storage import placement
from inlay.storage._abstract import Storage


class Plain(Storage):
    """An ordinary `torch.nn.Parameter`."""

    name = "plain"
    in_place = True

    def owns(self, layer: nn.Module, parameter: str = "weight") -> bool:
        return True

    def unreadable(self, layer: nn.Module, parameter: str) -> str | None:
        W = layer._parameters.get(parameter)
        if W is not None and is_lazy(W):
            return "its weight has no shape before the first forward; run one, then adapt it"
        if W is not None and type(W).__module__.startswith("torchao."):
            return f"its weight is packed as a {type(W).__name__}, which no storage backend of this library reads yet"
        if W is not None and not W.is_floating_point():
            return f"its weight is packed as {W.dtype}, which no storage backend of this library reads yet"
        return None

    def stored(self, layer: nn.Module, parameter: str) -> Tensor:
        W: Tensor = getattr(layer, parameter)  # a plain tensor while functional_call has put one there
        return W

    def dense(self, layer: nn.Module, stored: Tensor) -> Tensor:
        return stored

    def write(self, layer: nn.Module, W: Tensor, parameter: str = "weight") -> None:
        stored = self.stored(layer, parameter)
        if stored.is_meta:
            placement.replace(layer, parameter, W)
            return
        with torch.no_grad():
            stored.copy_(W)

    def keep(self, layer: nn.Module, parameter: str, copy: Callable[[Tensor], Tensor]) -> Tensor:
        stored = self.stored(layer, parameter)
        kept = placement.held(layer, parameter) if stored.is_meta else None
        return copy((stored if kept is None else kept).detach())

    def restore(self, layer: nn.Module, kept: Tensor, parameter: str = "weight") -> None:
        self.write(layer, kept, parameter)

    def facts(self, layer: nn.Module, parameter: str = "weight") -> tuple[torch.dtype, torch.device]:
        W: Tensor = getattr(layer, parameter)
        device = placement.runs_on(layer) if W.is_meta else None
        return (W.dtype if W.is_floating_point() else torch.get_default_dtype()), device or W.device
