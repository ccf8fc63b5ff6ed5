"""Small things that scripts ask of a handle."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from inlay.adapted import Adapted
from inlay.config import PeftConfig
from inlay.errors import ConfigError, FieldTypeError, FileError, MissingMethodError, PlanError
from inlay.model import PeftModel
from inlay.storage import storage_of
from inlay.walk import adapted_layers


def update_forward_signature(model: PeftModel) -> None:
    """Gives the handle's ``forward`` the signature and the documentation of its model's, for what reads them.

    Args:
        model (`PeftModel`): The handle; what its forward does stays the same.

    Example:
        >>> import inspect, torch, inlay
        >>> model = inlay.get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 3)), inlay.LoraConfig(target_modules=["0"])
        ... )
        >>> update_forward_signature(model)
        >>> list(inspect.signature(model.forward).parameters)
        ['input']
    """
    _sign(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """The same for ``generate``.

    Args:
        model (`PeftModel`): The handle.

    Raises:
        MissingMethodError: Its model cannot generate.
    """
    _sign(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """The same for ``"forward"``, ``"generate"`` or ``"all"`` of both.

    Args:
        model (`PeftModel`): The handle.
        method (`str`, *optional*, defaults to ``"all"``): Which.

    Raises:
        ConfigError: ``method`` is none of these.
        MissingMethodError: The model cannot generate.
    """
    if method not in ("forward", "generate", "all"):
        raise ConfigError(f"method {method} is not supported: it must be 'forward', 'generate' or 'all'.")
    for name in ("forward", "generate") if method == "all" else (method,):
        _sign(model, name)


def _sign(model: PeftModel, name: str) -> None:
    base = type(model.get_base_model())
    own, signed = getattr(type(model), name), getattr(base, name, None)
    if signed is None:
        raise MissingMethodError(f"{base.__name__} has no {name}().")

    @functools.wraps(signed)
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    setattr(model, name, MethodType(method, model))


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the context every adapter that has a scale acts with a multiple of it.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside.
        multiplier (`float`): The factor.

    Raises:
        FieldTypeError: ``multiplier`` is no number.
        PlanError: No adapter of the model has a scale.

    Example:
        >>> import torch, inlay
        >>> model = inlay.get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 3)), inlay.LoraConfig(target_modules=["0"])
        ... )
        >>> with rescale_adapter_scale(model, 0.5):
        ...     model.get_base_model()[0].scaling
        {'default': 0.5}
    """
    if not isinstance(multiplier, int | float):
        raise FieldTypeError(f"multiplier should be of type float, got {type(multiplier)}.")
    scales = [w.scaling for _, w in adapted_layers(model) if "scaling" in w.other_param_names]
    if not scales:
        raise PlanError("scaling is only supported for models with adapters that have a scale, such as LoRA's.")
    before = [dict(scale) for scale in scales]
    try:
        for scale in scales:
            scale.update({name: value * multiplier for name, value in scale.items()})
        yield
    finally:
        for scale, values in zip(scales, before, strict=True):
            scale.update(values)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """For code that was written for PEFT: adapters of inlay never cast a layer's input to the dtype of its weight.

    Args:
        model (`nn.Module`): Any.
        active (`bool`, *optional*, defaults to `True`): Accepted.
    """
    yield


class DoraCaching:
    """For code that was written for PEFT: DoRA's norms are kept while the weights that they depend on stay the same.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): Accepted.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> DoraCaching:
        return DoraCaching(enabled)

    def __enter__(self) -> DoraCaching:
        return self

    def __exit__(self, *args: object) -> None:
        return None


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether an adapter's config can be read at a path or on the hub.

    Args:
        model_name_or_path (`str`): A folder, or an id.

    Example:
        >>> check_if_peft_model("/nowhere")
        False
    """
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (FileError, ConfigError, OSError):
        return False
    return True


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight with its outputs first.

    Args:
        weight (`Tensor`): The weight as a layer has it; a `Parameter` stays one.
        fan_in_fan_out (`bool`): Whether its inputs come first.
    """
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight of a layer: the parameter itself, or its values where it is packed.

    Args:
        module (`nn.Module`): The layer, or one with adapters, whose frozen weight is meant.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> dequantize_module_weight(layer) is layer.weight
        True
    """
    layer = module.get_base_layer() if isinstance(module, Adapted) else module
    storage = storage_of(layer)
    return storage.dense(layer, storage.stored(layer, "weight"))


def get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """How many rows a call has.

    Raises:
        ConfigError: Neither is given.
    """
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ConfigError("Neither input_ids nor inputs_embeds is given: one of them tells how many rows there are.")
    return given.shape[0]


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """(device, address, bytes) of what a tensor is stored in: the same for all views of one.

    Example:
        >>> t = torch.zeros(3, 4)
        >>> id_tensor_storage(t) == id_tensor_storage(t[1:])
        True
    """
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns what is frozen into ``dtype`` and what is trained into fp32, as training in mixed precision wants it.

    Args:
        model (`nn.Module`): The model; it is changed in place.
        dtype (`torch.dtype`): A 16-bit float.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
