"""What a model says of itself beside its adapters: names, ties, devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from inlay.adapted import Adapted
from inlay.layers import embeddings_of
from inlay.state import root_of
from inlay.walk import survey


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The name of a module in a model; empty where it is not in it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> find_parameter_name_by_module(net, net[0])
        '0'
    """
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The name of the module that a model's ``get_input_embeddings`` gives; ``default`` where it gives none."""
    found = embeddings_of(model)
    return default if found is None else find_parameter_name_by_module(model, found) or default


def get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Names, in the base model, of the layers that share the weight of its input embeddings.

    Args:
        model (`nn.Module`): A handle, or any model.
    """
    found = survey(root_of(model)[0])
    embedding = embeddings_of(found.model)
    layer = embedding.get_base_layer() if isinstance(embedding, Adapted) else embedding
    W = None if layer is None else layer._parameters.get("weight")
    return [name for name in found.owners.get(id(W), ()) if W is not None and found.modules[name] is not embedding]


def get_no_split_modules(model: nn.Module) -> set[str]:
    """Names of the classes that the model, or one inside it, wants to keep on one device."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """How transformers has packed a model, where it is by this method (``"gptq"``); else None."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if getattr(found, "quant_method", None) == method else None


# ---------------------------------------------------------------------- devices


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Where the parts of a model were put; for one in one piece ``{"": device}``."""
    placed = getattr(model, "hf_device_map", None)
    first = next(model.parameters(), torch.empty(0))
    return {"": first.device} if placed is None else dict(placed)


def get_layer_device_map(model: nn.Module) -> dict[int, Any] | None:
    """The device that each layer of a distributed model runs on, by its number; None for one in one piece.

    A layer that is kept in memory or on the disk runs on the first accelerator that has a part.
    """
    placed: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    running = next((device for device in placed.values() if device not in ("cpu", "disk")), "cpu")
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in placed}
    found = {n: placed[name] if placed[name] not in ("cpu", "disk") else running for name, n in numbers.items()}
    return {n: device for n, device in found.items() if n is not None} or None


def map_cache_to_layer_device_map(model: nn.Module, cache: Any) -> None:
    """Moves the keys and values of each layer to where it runs.

    Args:
        model (`nn.Module`): The model.
        cache (`transformers.Cache`): Its cache; it is changed in place.
    """
    for number, device in (get_layer_device_map(model) or {}).items():
        layer = cache.layers[number]
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
