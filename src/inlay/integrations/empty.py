"""Models without memory: modules are made on the meta device, to be given their tensors by a loader."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

P = ParamSpec("P")
R = TypeVar("R")
# Of the calling thread and task: torch's hooks are the process's.
_empty: ContextVar[bool] = ContextVar("empty", default=False)


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside the ``with`` parameters of modules that are made are on the meta device, in the calling thread.

    Args:
        include_buffers (`bool`, *optional*, defaults to `False`): Buffers too.

    Example:
        >>> with init_empty_weights():
        ...     layer = nn.Linear(1000, 1000)
        >>> layer.weight.device.type
        'meta'
    """

    def parameter(module: nn.Module, name: str, p: nn.Parameter) -> Any:
        return nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) if _empty.get() else None

    def buffer(module: nn.Module, name: str, t: Tensor) -> Any:
        return t.to("meta") if _empty.get() and t is not None else None

    hooks: list[Any] = [register_module_parameter_registration_hook(parameter)]
    if include_buffers:
        hooks.append(register_module_buffer_registration_hook(buffer))
    token = _empty.set(True)
    try:
        yield
    finally:
        _empty.reset(token)
        for hook in hooks:
            hook.remove()


def skip_init_on_device(func: Callable[P, R]) -> Callable[P, R]:
    """A function whose modules keep their tensors though it is called inside `init_empty_weights`.

    Args:
        func (`Callable`): The function.
    """

    @functools.wraps(func)
    def kept(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _empty.set(False)
        try:
            return func(*args, **kwargs)
        finally:
            _empty.reset(token)

    return kept
