"""Making a base model ready for training adapters on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from inlay.storage import stored_parameters

# What loaders leave on a packed model, in ways too that no storage here reads.
_TOLD = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freezes a model, keeps what is not packed in fp32, and switches a packed one's gradient checkpointing on.

    Args:
        model (`nn.Module`): A transformers model, quantised or not; it is changed in place.
        use_gradient_checkpointing (`bool`, *optional*, defaults to `True`): Recompute activations in backward, if
            weights are packed. An ordinary model has ``gradient_checkpointing_enable()`` for that.
        gradient_checkpointing_kwargs (`dict`, *optional*): For `torch.utils.checkpoint.checkpoint`, such as
            ``{"use_reentrant": False}``.
        auto_clear_cache (`bool`, *optional*, defaults to `True`): Give memory that casting freed back to the device.

    Returns:
        `nn.Module`: ``model``.

    Example:
        >>> import torch
        >>> layer = prepare_model_for_kbit_training(torch.nn.Linear(2, 2).half(), use_gradient_checkpointing=False)
        >>> layer.weight.dtype, layer.weight.requires_grad
        (torch.float32, False)
    """
    packed = any(getattr(model, told, False) for told in _TOLD)
    for parameter, storage in stored_parameters(model):
        parameter.requires_grad_(False)
        packed = packed or not storage.in_place
        if storage.in_place and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing and packed:
        _checkpoint(model, gradient_checkpointing_kwargs)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def _checkpoint(model: nn.Module, kwargs: dict[str, Any] | None) -> None:
    reentrant = kwargs is None or bool(kwargs.get("use_reentrant", True))
    if reentrant:
        # Reentrant checkpoints pass gradients on only where an input wants one, and everything before is frozen.
        enable: Any = getattr(model, "enable_input_require_grads", None)
        if enable is not None:
            enable()
        else:
            embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
            embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    # transformers 5.23 has given the method and its keyword a new name, and warns of the old one.
    start: Any = getattr(model, "activation_checkpointing_enable", None)
    if start is not None:
        start(kwargs)
    else:
        start = model.gradient_checkpointing_enable
        start(**({} if kwargs is None else {"gradient_checkpointing_kwargs": kwargs}))
