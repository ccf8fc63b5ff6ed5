"""The K axis: how a frozen weight is read and written. One file per packing; this literal says which there are."""

from __future__ import annotations

from torch import nn

from inlay.storage._abstract import Storage
from inlay.storage.plain import Plain

STORAGES: tuple[Storage, ...] = (Plain(),)


def storage_of(layer: nn.Module) -> Storage:
    """The row of `STORAGES` that owns the layer's weight."""
    for storage in STORAGES[:-1]:
        if storage.owns(layer):
            return storage
    return STORAGES[-1]


__all__ = ["STORAGES", "Storage", "storage_of"]
