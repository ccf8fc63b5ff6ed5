"""A forward that passes on what it is given shows those who inspect it what that may be.

transformers' Trainer finds the columns that a model takes in the signature of its forward, and the names of its labels
in that of the class. The handle's own would tell it nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial, update_wrapper
from inspect import Parameter
from types import FunctionType, MethodType
from typing import Any

import torch


class PassesOn:
    """``function`` as a method of a handle, with the parameters of the model inside in place of ``*args, **kwargs``.

    The class shows its ``labels``. What is called stays an ordinary method or function, for copies, pickles, replicas
    and compilers.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function: Any = function
        self.__doc__ = function.__doc__

    def __get__(self, handle: Any, owner: Any) -> Any:
        if handle is None:
            return _showing(self.function, owner.labels)
        if torch.compiler.is_compiling():
            return partial(self.function, handle)  # which compilers know, as they do not know methods made by hand
        inside: Any = type(handle._modules["base_model"]._modules["model"])
        return MethodType(_showing(self.function, inside), handle)


@lru_cache(maxsize=256)
def _showing(function: FunctionType, receiver: type | tuple[str, ...]) -> FunctionType:
    """A copy of ``function`` that shows the keywords, or the parameters of the forward, which it hands on."""
    own = inspect.signature(function)
    this, *mine = own.parameters.values()
    if isinstance(receiver, tuple):
        theirs = [*mine, *(Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in receiver)]
    else:
        try:
            theirs = list(inspect.signature(receiver.forward).parameters.values())[1:]  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            return function
    shown = [this.replace(kind=this.POSITIONAL_ONLY), *(p for p in mine if p.kind is p.KEYWORD_ONLY), *theirs]
    copy = FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    update_wrapper(copy, function)
    copy.__kwdefaults__ = function.__kwdefaults__
    ordered = sorted({p.name: p for p in shown}.values(), key=lambda p: p.kind)
    copy.__signature__ = own.replace(parameters=ordered)  # type: ignore[attr-defined]
    return copy
