"""Laying a model out over devices, memory and the disk, by accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import check_device_map, extract_submodules_state_dict, get_balanced_memory, offload_state_dict
from torch import nn

from inlay.errors import ConfigError
from inlay.storage import placement

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def check(model: nn.Module, device_map: Any, offload_folder: str | Path | None, offload_index: Any) -> None:
    """Raises `ConfigError` for a layout that `lay_out` could not bring about."""
    try:
        if isinstance(device_map, dict):
            check_device_map(model, device_map)
        elif device_map not in (None, *_STRATEGIES):
            torch.device(device_map)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"device_map {device_map!r} is no layout of this model: {error}.") from error
    disk = isinstance(device_map, dict) and "disk" in device_map.values()
    if disk and offload_folder is None and offload_index is None:
        raise ConfigError("device_map puts modules on the disk: say where, as offload_folder.")


def lay_out(
    model: nn.Module, device_map: Any, max_memory: Any, offload_folder: str | Path | None, offload_index: Any
) -> None:
    """Has accelerate dispatch ``model``, with its adapters, anew.

    Args:
        model (`nn.Module`): A model, dispatched already or not.
        device_map (`dict`, `str`, `int` or `torch.device`): Device by module; one device; or how to choose them.
        max_memory (`dict`, *optional*): Memory by device, where they are to be chosen.
        offload_folder (`str` or `Path`, *optional*): Where what is on the disk goes.
        offload_index (`dict`, *optional*): What lies on the disk already.
    """
    if offload_index is None:
        placement.bring_back(model, torch.device("cpu"))
    remove_hook_from_submodules(model)
    whole = getattr(model, "_no_split_modules", None)
    if device_map in (None, *_STRATEGIES):
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=whole, low_zero=low)
        device_map = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole)
    elif not isinstance(device_map, dict):
        device_map = {"": device_map}
    disk = [name for name, device in device_map.items() if device == "disk"]
    if disk and offload_index is None and offload_folder is not None:
        # accelerate takes a folder that it has filled before for complete, and then it lacks the adapter.
        offload_state_dict(offload_folder, extract_submodules_state_dict(model.state_dict(), disk))
    dispatch_model(model, device_map, offload_dir=offload_folder, offload_index=offload_index)
