"""What stands in a model: which adapters, on which layers, active, merged, trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from inlay.adapted import Adapted
from inlay.errors import UnsupportedLayerError
from inlay.state import root_of
from inlay.storage import stored_parameters
from inlay.trained import ModulesToSaveWrapper
from inlay.walk import wrappers

T = TypeVar("T")
Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer.

    Args:
        name (`str`): The layer's name in the user's model.
        module_type (`str`): Method and kind of layer, as in ``lora.Linear``.
        enabled (`bool`): Whether adapters run by default.
        active_adapters, merged_adapters, available_adapters (`list[str]`): Adapters by state.
        requires_grad (`dict[str, bool or "irregular"]`): By adapter, whether its tensors are trained.
        devices (`dict[str, list[str]]`): By adapter, where its tensors are.
        quantization_backend (`str`, *optional*): How the frozen weight is packed.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """A whole model; a field is ``"irregular"`` where its layers differ.

    Args:
        base_model_type, adapter_model_type (`str`): Classes, for a handle. For a model with adapters inside
            ``"None"``, and ``"other"`` where it is not one of transformers'.
        peft_types (`dict[str, str]`): Method by adapter.
        trainable_params, total_params (`int`): Numbers of parameters.
        num_adapter_layers (`int`): How many layers have adapters.
        enabled (`bool` or `"irregular"`): Whether adapters run by default.
        active_adapters, merged_adapters (`list[str]` or `"irregular"`): Adapters by state.
        requires_grad (`dict[str, bool or "irregular"]`): By adapter.
        available_adapters (`list[str]`): All adapters.
        devices (`dict[str, list[str]]`): By adapter.
        quantization_backend (`str`, *optional*): How frozen weights are packed.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


def _same(values: Iterable[T]) -> T | Irregular:
    found = list(values)
    return found[0] if found and all(value == found[0] for value in found) else "irregular"


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted layer.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside.

    Raises:
        UnsupportedLayerError: No layer is adapted, as by a prompt.
    """
    root, prefix = root_of(model)
    out = [_layer(f"{'model.' if prefix else ''}{path}", w) for path, w in wrappers(root)]
    if not any(isinstance(w, Adapted) for _, w in wrappers(root)):
        raise UnsupportedLayerError(
            "No adapter layers found in the model (a prompt adapts none), so there is no status: add an adapter first."
        )
    return out


def _layer(name: str, wrapper: Adapted | ModulesToSaveWrapper) -> TunerLayerStatus:
    tensors: dict[str, list[torch.Tensor]]
    if isinstance(wrapper, Adapted):
        merged, storage = wrapper.merged_adapters, wrapper.storage.name
        tensors = {
            n: [t for key, t in wrapper.params(n).items() if method.slots[key].trainable]
            for n, method in wrapper.methods.items()
        }
    else:
        merged, storage = [], "plain"
        tensors = {n: list(copy.parameters()) for n, copy in wrapper.modules_to_save.items()}
    return TunerLayerStatus(
        name=name,
        module_type=wrapper._get_name(),
        enabled=not wrapper.disable_adapters,
        active_adapters=wrapper.active_adapters,
        merged_adapters=merged,
        requires_grad={n: _same(t.requires_grad for t in ts) for n, ts in tensors.items()},
        available_adapters=sorted(tensors),
        devices={n: sorted({t.device.type for t in ts}) for n, ts in tensors.items()},
        quantization_backend=None if storage == "plain" else storage,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a model as a whole.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside.

    Raises:
        UnsupportedLayerError: No layer is adapted, as by a prompt.
    """
    layers = get_layer_status(model)
    root, prefix = root_of(model)
    names = sorted({n for layer in layers for n in layer.available_adapters})
    configs: dict[str, Any] = getattr(model, "peft_config", {}) if prefix else {}
    sizes = [(storage.numel(p), p.requires_grad) for p, storage in stored_parameters(root)]
    named = prefix or "PreTrainedModel" in [base.__name__ for base in type(root).__mro__]
    return TunerModelStatus(
        base_model_type=type(root).__name__ if named else "other",
        adapter_model_type=next((type(c).__name__.replace("Config", "Model") for c in configs.values()), "None"),
        peft_types={n: str(getattr(c.peft_type, "value", c.peft_type)) for n, c in configs.items()},
        trainable_params=sum(n for n, trained in sizes if trained),
        total_params=sum(n for n, _ in sizes),
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        active_adapters=_same(layer.active_adapters for layer in layers),
        merged_adapters=_same(layer.merged_adapters for layer in layers),
        requires_grad={
            n: _same(layer.requires_grad[n] for layer in layers if n in layer.requires_grad) for n in names
        },
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, ())}) for n in names},
        quantization_backend=_same(layer.quantization_backend for layer in layers),
    )
