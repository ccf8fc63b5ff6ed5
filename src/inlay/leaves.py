"""The modules in which an adapter's tensors stand where files and other libraries expect them.

``layer.lora_A`` is a `Group`, ``layer.lora_A.default`` a `Leaf`, ``layer.lora_dropout.default`` a `Rate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.methods._abstract import AbstractAdapter


class _Late:
    """A container of nn.Module's own (for hooks, mostly) that is made when it is first asked for."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name, self.make = name, make

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        # In one step, so that threads which ask at once are given the same one.
        return self if module is None else module.__dict__.setdefault(self.name, self.make())


class Light(nn.Module):
    """A module without nn.Module's dozen empty containers: a model with adapters has thousands of modules of ours."""

    def __init__(self, training: bool = True) -> None:
        self.__dict__.update(_SET_AT_ONCE, training=training, _parameters={}, _buffers={}, _modules={})


_SET_AT_ONCE: dict[str, Any] = {}
for _name, _value in vars(nn.Module()).items():
    if not isinstance(_value, dict | set):
        _SET_AT_ONCE[_name] = _value
    elif _name not in ("_parameters", "_buffers", "_modules"):
        setattr(Light, _name, _Late(_name, type(_value)))


class Leaf(Light):
    """One adapter's tensors of one slot: ``layer.lora_A.default``, with ``weight`` and perhaps ``bias``."""

    def forward(self, x: Tensor | str, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        W: Tensor = getattr(self, x if isinstance(x, str) else "weight")
        if isinstance(x, str):
            return W
        return F.linear(x, W, self._parameters.get("bias")) if run is None else run(x)

    def __getattr__(self, name: str) -> Any:
        # What kernels and scripts ask of a linear layer in this place.
        if name == "bias" and "bias" not in self._parameters:
            return None
        W = self._parameters.get("weight") if name in ("in_features", "out_features") else None
        return super().__getattr__(name) if W is None or W.dim() != 2 else W.shape[name == "in_features"]

    def extra_repr(self) -> str:
        return ", ".join(f"{k}: {tuple(v.shape)}" for k, v in self._parameters.items() if v is not None)


class Rate(Light, nn.Dropout):
    """One adapter's dropout as a module, ``layer.lora_dropout.default``: what sets ``p`` of it sets the adapter's."""

    method: AbstractAdapter
    inplace = False

    def __init__(self, method: AbstractAdapter, training: bool = True) -> None:
        super().__init__(training)
        self.__dict__["method"] = method

    @property
    def p(self) -> float:
        """The share that is dropped."""
        return self.method.dropout

    @p.setter
    def p(self, value: float) -> None:
        self.method.dropout = value


BARE = len(Leaf().__dict__)  # of one that nobody has called or hung hooks on


class Group(Light):
    """One slot of all adapters: ``layer.lora_A``. Reads like a dict from adapter name to leaf or tensor."""

    def _all(self) -> dict[str, Any]:
        return {**self._parameters, **self._modules}

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters)

    def keys(self) -> Iterable[str]:
        """Names of the adapters that have this slot."""
        return self._all().keys()

    def values(self) -> Iterable[Any]:
        """Their leaves or tensors."""
        return self._all().values()

    def items(self) -> Iterable[tuple[str, Any]]:
        """Pairs of both."""
        return self._all().items()

    def forward(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor

    def train(self, mode: bool = True) -> Group:
        # Nothing below reads the flag, and there may be thousands of leaves; of rates people may ask it.
        self.training = mode
        if isinstance(next(iter(self._modules.values()), None), Rate):
            for rate in self._modules.values():
                rate.__dict__["training"] = mode
        return self


class Numbers(dict[str, Any]):
    """``layer.scaling``: one number of every adapter on a layer as it is now; what is set reaches the adapter."""

    def __init__(self, methods: Mapping[str, AbstractAdapter], field: str, changed: Callable[[], None]) -> None:
        self._holders = {name: m for name, m in methods.items() if field in m.numbers}
        super().__init__({name: getattr(m, field) for name, m in self._holders.items()})
        self._field, self._changed = field, changed

    def __setitem__(self, name: str, value: Any) -> None:
        holder = self._holders[name]
        holder.put(self._field, value)
        super().__setitem__(name, getattr(holder, self._field))
        self._changed()

    def update(self, *others: Any, **values: Any) -> None:
        """Sets several."""
        for name, value in dict(*others, **values).items():
            self[name] = value

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy is only numbers

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{self._field} belongs to the adapter {name!r}: delete the adapter instead.")
