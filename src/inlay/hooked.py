"""Hooks on the module that holds one tensor of an adapter, as on ``layer.lora_A.default``.

Fused paths never call such a module. One that has hooks gives its tensor as one of `Hooked`: a class that fused paths
do not know, so they step aside for the readable formula, and there the layer operation that takes the tensor for its
weight is run by calling the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CALLS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_SAME_WEIGHT = {Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.to}
_CONTAINERS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether any runs when ``module`` is called."""
    return any(module.__dict__.get(name) for name in _CONTAINERS)


class Hooked(Tensor):
    """A weight that is not multiplied with but by calling its module, with ``run`` for what is to be done."""

    of: Tensor
    module: nn.Module

    @classmethod
    def make(cls, of: Tensor, module: nn.Module) -> Hooked:
        """``of`` as the weight of ``module``, whose forward takes ``run``."""
        t: Hooked = torch.Tensor._make_subclass(cls, of.detach(), of.requires_grad)
        t.of, t.module = of, module
        return t

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {k: _plain(v) for k, v in (kwargs or {}).items()}
        plain = [_plain(v) for v in args]
        if func in _CALLS and isinstance(args[1], Hooked):
            return args[1].module(plain[0], run=lambda x: func(x, *plain[1:], **kwargs))
        out = func(*plain, **kwargs)
        return cls.make(out, args[0].module) if func in _SAME_WEIGHT and isinstance(args[0], Hooked) else out


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.of if isinstance(value, Hooked) else value
