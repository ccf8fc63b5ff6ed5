"""Layer replication: a deeper model from ranges of its own layers; copies share weights and differ in adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from inlay.errors import UnsupportedLayerError

# What model libraries call the list of their layers.
_LISTS = ("layers", "layer", "h", "blocks")


@contextmanager
def replicated(model: nn.Module, ranges: Sequence[tuple[int, int]] | None) -> Iterator[None]:
    """Stacks the layers ``[start, end)`` of each range anew; an exception inside the ``with`` undoes it.

    Args:
        model (`nn.Module`): The model; its list of layers and ``config.num_hidden_layers`` are changed.
        ranges (`Sequence[tuple[int, int]]`, *optional*): Such as ``[(0, 16), (8, 24)]``; nothing happens without.

    Raises:
        UnsupportedLayerError: The model has no list of layers, or a range is not in it.
    """
    if not ranges:
        yield
        return
    parent, name, layers = _find(model)
    for start, end in ranges:
        if not 0 <= start < end <= len(layers):
            raise UnsupportedLayerError(f"layer_replication has the range ({start}, {end}), of {len(layers)} layers.")
    config: Any = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    new = [_shared(layers[i]) for start, end in ranges for i in range(start, end)]
    for index, layer in enumerate(new):
        for module in layer.modules():
            if "layer_idx" in module.__dict__:
                module.layer_idx = index  # type: ignore[assignment]

    def put(stack: nn.ModuleList, count: int | None) -> None:
        setattr(parent, name, stack)
        if depth is not None:
            config.num_hidden_layers = count

    put(nn.ModuleList(new), len(new))
    try:
        yield
    except BaseException:
        put(layers, depth)
        raise


def replicate_layers(model: nn.Module, layer_map: Sequence[tuple[int, int]]) -> None:
    """Stacks the layers of a model anew, as ``layer_replication`` of a config does.

    Args:
        model (`nn.Module`): The model; it is changed in place.
        layer_map (`Sequence[tuple[int, int]]`): Ranges ``[start, end)`` of its layers; copies share weights.

    Raises:
        UnsupportedLayerError: The model has no list of layers, or a range is not in it.

    Example:
        >>> net = nn.Sequential()
        >>> net.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        >>> replicate_layers(net, [(0, 2), (1, 3)])
        >>> len(net.layers), net.layers[1].weight is net.layers[2].weight
        (4, True)
    """
    with replicated(model, layer_map):
        pass


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module.

    Args:
        module (`nn.Module`): The module.
        share_weights (`bool`, *optional*, defaults to `False`): With the very same parameters and buffers.
    """
    return _shared(module) if share_weights else copy.deepcopy(module)


def _find(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if name in _LISTS and isinstance(child, nn.ModuleList) and len(child):
                return parent, name, child
    raise UnsupportedLayerError(f"layer_replication needs a model with a list of layers named one of {_LISTS}.")


def _shared(layer: nn.Module) -> nn.Module:
    """A copy of the modules with the same parameters and buffers."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(t): t for t in tensors})
