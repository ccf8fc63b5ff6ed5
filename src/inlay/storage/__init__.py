"""The K axis: how a frozen weight is read and written. One file per packing; this literal says which there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from inlay.storage._abstract import Rounding, Storage
from inlay.storage.bnb import Bnb4, Bnb8
from inlay.storage.plain import Plain

STORAGES: tuple[Storage, ...] = (Bnb4(), Bnb8(), Plain())


def storage_of(layer: nn.Module, parameter: str = "weight") -> Storage:
    """The row of `STORAGES` that owns a layer's parameter."""
    for storage in STORAGES[:-1]:
        if storage.owns(layer, parameter):
            return storage
    return STORAGES[-1]


def packing_of(base_layer: nn.Module, get_apply_tensor_subclass: Any = None) -> Storage | None:
    """How a layer's weight is packed; None where it is an ordinary one.

    Args:
        base_layer (`nn.Module`): The frozen layer.
        get_apply_tensor_subclass (`object`, *optional*): Accepted for PEFT's sake.
    """
    storage = storage_of(base_layer)
    return None if storage.in_place else storage


def facts(layer: nn.Module, parameter: str) -> tuple[torch.dtype, torch.device]:
    """dtype and device of what a method should compute in beside this parameter."""
    return storage_of(layer, parameter).facts(layer, parameter)


def stored_parameters(model: nn.Module) -> Iterator[tuple[Any, Storage]]:
    """Each parameter of a model once, as stored, with the row of `STORAGES` that owns it."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                storage = storage_of(module, name)
                yield parameter if storage.in_place else storage.stored(module, name), storage


__all__ = ["STORAGES", "Rounding", "Storage", "facts", "packing_of", "storage_of", "stored_parameters"]
