"""A weight kept as an ordinary parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
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

    def keep(self, layer: nn.Module, parameter: str, room: Callable[[Tensor], Tensor]) -> Tensor:
        stored = self.stored(layer, parameter)
        held = placement.held(layer, parameter) if stored.is_meta else None
        W = (stored if held is None else held).detach()
        return room(W).copy_(W)

    def exchange(self, layer: nn.Module, parameter: str, make: Callable[[Tensor], Tensor]) -> Tensor | None:
        W = self.stored(layer, parameter)
        if not _alone(W):
            return None
        W.data, before = make(W.data), W.data
        increment_version(W)  # as a write in place would: backward of an earlier forward finds that it changed
        return before

    def restore(self, layer: nn.Module, kept: Tensor, parameter: str = "weight") -> None:
        W = self.stored(layer, parameter)
        alike = (W.device, W.dtype, W.shape, W.stride()) == (kept.device, kept.dtype, kept.shape, kept.stride())
        if not alike or self.exchange(layer, parameter, lambda _: kept) is None:
            self.write(layer, kept, parameter)

    def facts(self, layer: nn.Module, parameter: str = "weight") -> tuple[torch.dtype, torch.device]:
        W: Tensor = getattr(layer, parameter)
        device = placement.runs_on(layer) if W.is_meta else None
        return (W.dtype if W.is_floating_point() else torch.get_default_dtype()), device or W.device


def _alone(W: Tensor) -> bool:
    """Whether no view, state dict, graph or other process sees the memory of a parameter on the CPU.

    On a GPU the pointer itself is seen, by captured graphs.
    """
    if type(W) is not nn.Parameter or W.device.type != "cpu" or W.is_inference():
        return False
    storage = W.untyped_storage()
    # The parameter's own, and the one asked here.
    return not storage.is_shared() and torch._C._storage_Use_Count(storage._cdata) == 2
