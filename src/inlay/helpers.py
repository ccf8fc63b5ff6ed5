"""Small things that scripts ask of a handle."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from inlay.errors import ConfigError, MissingMethodError
from inlay.model import PeftModel


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
        raise ConfigError(f"method must be 'forward', 'generate' or 'all', got {method!r}.")
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
