"""Linear layers packed by bitsandbytes: 4 bits (nf4, fp4, with packed statistics or without), and 8 bits by row.

bitsandbytes is never imported from here: a layer of its making has imported it.
"""

from __future__ import annotations

import copy as copying
import sys
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from inlay.errors import ConfigError
from inlay.storage._abstract import Packed


def _is_a(layer: nn.Module, name: str) -> bool:
    modules = sys.modules.get("bitsandbytes.nn.modules")
    return modules is not None and isinstance(layer, getattr(modules, name, ()))


def _bnb() -> Any:
    return sys.modules["bitsandbytes"]


def get_bnb_param_type(param: Tensor) -> Literal[False, "4bit", "8bit"]:
    """``"4bit"`` or ``"8bit"`` for a parameter of bitsandbytes' making, else ``False``.

    Example:
        >>> get_bnb_param_type(nn.Parameter(torch.zeros(2)))
        False
    """
    found = sys.modules.get("bitsandbytes.nn.modules")
    if found is None:
        return False
    return "4bit" if isinstance(param, found.Params4bit) else "8bit" if isinstance(param, found.Int8Params) else False


def dequantize_bnb_weight(weight: Tensor, state: Any = None) -> Tensor:
    """A weight of bitsandbytes' making, dense; `inlay.helpers.dequantize_module_weight` asks a layer instead.

    Args:
        weight (`Tensor`): The layer's parameter.
        state (`object`, *optional*): The layer's ``state``, which has the statistics of 8 bits after a forward.

    Raises:
        ConfigError: It is packed in 8 bits, and the statistics are in no place; or it is not of that making.
    """
    kind, W = get_bnb_param_type(weight), cast(Any, weight)
    if kind == "4bit":
        dense: Tensor = _bnb().functional.dequantize_4bit(*_ordinary(W))
        return dense
    SCB = getattr(weight, "SCB", None)
    SCB = getattr(state, "SCB", None) if SCB is None else SCB
    if kind is False or SCB is None:
        raise ConfigError(
            "No `state` was passed, and the 8-bit weight has no statistics of its own: give "
            f"layer.state with layer.weight. Given was a {type(weight).__name__}."
        )
    dense = _bnb().functional.int8_vectorwise_dequant(weight.data, SCB)
    return dense


def _ordinary(W: Any) -> tuple[Tensor, Any]:
    """Data and state of a weight in 4 bits; a forward on some processors has repacked these for itself."""
    if not getattr(W.quant_state, "packing_format_for_cpu", False):
        return W.data, W.quant_state
    found: tuple[Tensor, Any] = _bnb().functional._convert_weight_packed_for_cpu_inverse(
        W.data, copying.copy(W.quant_state)
    )
    return found


class Bnb4(Packed):
    """`bitsandbytes.nn.Linear4bit`: a `Params4bit` with its ``quant_state``.

    A layer that has not been moved to a device yet is not packed either, and an ordinary one so far.
    """

    name = "bnb4"

    def owns(self, layer: nn.Module, parameter: str = "weight") -> bool:
        packed = parameter == "weight" and _is_a(layer, "Linear4bit")
        return packed and getattr(layer.weight, "quant_state", None) is not None

    def stored(self, layer: nn.Module, parameter: str = "weight") -> Tensor:
        W: Any = layer.weight
        if not getattr(W.quant_state, "packing_format_for_cpu", False):
            return W  # type: ignore[no-any-return]
        return self._made(W, *_ordinary(W))

    def _made(self, like: Any, data: Tensor, state: Any) -> Tensor:
        W: Any = copying.copy(like)
        W.data, W.quant_state, W.module = data, state, None
        return W  # type: ignore[no-any-return]

    def dense(self, layer: nn.Module, stored: Any) -> Tensor:
        state = copying.copy(stored.quant_state)
        state.dtype = self.facts(layer)[0]
        W: Tensor = _bnb().functional.dequantize_4bit(stored.data.view(-1, 1), state)
        return W

    def parts(self, stored: Any) -> tuple[Tensor, ...]:
        state = stored.quant_state
        nested = (state.state2.absmax, state.state2.code) if state.nested else ()
        return (stored, state.absmax, state.code, *nested)

    def pack(self, layer: Any, W: Tensor) -> Tensor:
        old: Any = self.stored(layer)
        how = {key: getattr(old, key) for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
        data, state = _bnb().functional.quantize_4bit(W, **how)
        state.dtype = old.quant_state.dtype
        return self._made(old, data, state)

    def put(self, layer: Any, packed: Any) -> None:
        W = layer.weight
        with torch.no_grad():
            if W.shape == packed.shape:
                W.copy_(packed.data)
            else:
                W.data = packed.data
        W.quant_state = packed.quant_state
        self.settle(layer)

    def settle(self, layer: Any) -> None:
        layer.quant_state = layer.weight.quant_state

    def facts(self, layer: Any, parameter: str = "weight") -> tuple[torch.dtype, torch.device]:
        return layer.compute_dtype or layer.weight.quant_state.dtype, layer.weight.device

    def numel(self, parameter: Any) -> int:
        return int(parameter.quant_state.shape.numel())


class Bnb8(Packed):
    """`bitsandbytes.nn.Linear8bitLt`: an `Int8Params` and its row statistics SCB.

    The layer's first forward moves both off the parameter into ``layer.state``; here SCB stands on the parameter too.
    """

    name = "bnb8"

    def owns(self, layer: Any, parameter: str = "weight") -> bool:
        packed = parameter == "weight" and _is_a(layer, "Linear8bitLt")
        return packed and (bool(layer.state.has_fp16_weights) or layer.weight.dtype == torch.int8)

    def unreadable(self, layer: Any, parameter: str) -> str | None:
        why = "it packs its weight anew in each call: make it with has_fp16_weights=False"
        return why if layer.state.has_fp16_weights else None

    def stored(self, layer: Any, parameter: str = "weight") -> Tensor:
        W: Any = layer.weight
        if getattr(W, "SCB", None) is None:
            W.SCB = layer.state.SCB
        return W  # type: ignore[no-any-return]

    def _made(self, CB: Tensor, SCB: Tensor) -> Tensor:
        W: Tensor = _bnb().nn.Int8Params(CB, requires_grad=False, has_fp16_weights=False, SCB=SCB)
        return W

    def dense(self, layer: nn.Module, stored: Any) -> Tensor:
        W: Tensor = _bnb().functional.int8_vectorwise_dequant(stored.data, stored.SCB)
        return W

    def parts(self, stored: Any) -> tuple[Tensor, ...]:
        return stored, stored.SCB

    def pack(self, layer: Any, W: Tensor) -> Tensor:
        return self._made(*_bnb().functional.int8_vectorwise_quant(W.half())[:2])

    def put(self, layer: Any, packed: Any) -> None:
        with torch.no_grad():
            layer.weight.copy_(packed.data)
        layer.weight.SCB = packed.SCB
        self.settle(layer)

    def moved(self, kept: Any, fn: Callable[[Tensor], Tensor]) -> Tensor:
        W = fn(kept)
        return self._made(W.data, kept.SCB.to(W.device))

    def settle(self, layer: Any) -> None:
        W = layer.weight
        if getattr(W, "SCB", None) is None:  # all is in the state
            return
        W.CB, W.SCB = None, W.SCB.to(W.device)
        # A state of its own: a replica of the layer shares the old one.
        layer.state = copying.copy(layer.state)
        layer.state.CB, layer.state.SCB = W.data, W.SCB

    def facts(self, layer: Any, parameter: str = "weight") -> tuple[torch.dtype, torch.device]:
        return torch.float32, layer.weight.device
