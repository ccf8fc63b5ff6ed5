"""Linear layers packed by bitsandbytes: 4 bits (nf4, fp4, with packed statistics or without), and 8 bits by row.

bitsandbytes is never imported from here: a layer of its making has imported it.
"""

from __future__ import annotations

import copy as copying
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.storage._abstract import Storage


def _is_a(layer: nn.Module, name: str) -> bool:
    modules = sys.modules.get("bitsandbytes.nn.modules")
    return modules is not None and isinstance(layer, getattr(modules, name, ()))


def _bnb() -> Any:
    return sys.modules["bitsandbytes"]


class Bnb4(Storage):
    """`bitsandbytes.nn.Linear4bit`: a `Params4bit` with its ``quant_state``.

    A layer that has not been moved to a device yet is not packed either, and an ordinary one so far.
    """

    name = "bnb4"

    def owns(self, layer: nn.Module, parameter: str = "weight") -> bool:
        return (
            parameter == "weight"
            and _is_a(layer, "Linear4bit")
            and getattr(layer.weight, "quant_state", None) is not None
        )

    def stored(self, layer: nn.Module, parameter: str) -> Tensor:
        W: Any = layer.weight
        if not getattr(W.quant_state, "packing_format_for_cpu", False):
            return W  # type: ignore[no-any-return]
        # A forward on some processors repacks the layer for itself: what is read is the ordinary form, made anew.
        inverse = _bnb().functional._convert_weight_packed_for_cpu_inverse
        return self._packed(W, *inverse(W.data, copying.copy(W.quant_state)))

    def _packed(self, like: Any, data: Tensor, state: Any) -> Tensor:
        W: Tensor = _bnb().nn.Params4bit(
            data,
            requires_grad=False,
            quant_state=state,
            blocksize=like.blocksize,
            compress_statistics=like.compress_statistics,
            quant_type=like.quant_type,
            quant_storage=like.quant_storage,
            bnb_quantized=True,
        )
        return W

    def dense(self, layer: nn.Module, stored: Any) -> Tensor:
        state = copying.copy(stored.quant_state)
        state.dtype = self.facts(layer)[0]
        W: Tensor = _bnb().functional.dequantize_4bit(stored.data.view(-1, 1), state)
        return W

    def parts(self, stored: Any) -> tuple[Tensor, ...]:
        state = stored.quant_state
        nested = (state.state2.absmax, state.state2.code) if state.nested else ()
        return (stored, state.absmax, state.code, *nested)

    def write(self, layer: nn.Module, W: Tensor, parameter: str = "weight") -> None:
        old: Any = self.stored(layer, parameter)
        data, state = _bnb().functional.quantize_4bit(
            W.detach().contiguous(),
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        state.dtype = old.quant_state.dtype
        self._put(layer, data, state)

    def _put(self, layer: Any, data: Tensor, state: Any) -> None:
        W = layer.weight
        with torch.no_grad():
            if W.shape == data.shape:
                W.copy_(data)
            else:
                W.data = data
        W.quant_state = layer.quant_state = state

    def keep(self, layer: nn.Module, parameter: str, copy: Callable[[Tensor], Tensor]) -> Tensor:
        W: Any = self.stored(layer, parameter)
        return self._packed(W, copy(W.data), copying.deepcopy(W.quant_state))

    def restore(self, layer: nn.Module, kept: Any, parameter: str = "weight") -> None:
        self._put(layer, kept.data, kept.quant_state)

    def settle(self, layer: Any) -> None:
        layer.quant_state = layer.weight.quant_state

    def facts(self, layer: Any, parameter: str = "weight") -> tuple[torch.dtype, torch.device]:
        return layer.compute_dtype or layer.weight.quant_state.dtype, layer.weight.device

    def numel(self, parameter: Any) -> int:
        return int(parameter.quant_state.shape.numel())


class Bnb8(Storage):
    """`bitsandbytes.nn.Linear8bitLt`: an `Int8Params` and its row statistics SCB.

    The layer's first forward moves both off the parameter into ``layer.state``; here SCB stands on the parameter too.
    """

    name = "bnb8"

    def owns(self, layer: nn.Module, parameter: str = "weight") -> bool:
        if parameter != "weight" or not _is_a(layer, "Linear8bitLt"):
            return False
        state: Any = layer.state
        return bool(state.has_fp16_weights) or layer.weight.dtype == torch.int8

    def unreadable(self, layer: nn.Module, parameter: str) -> str | None:
        state: Any = layer.state
        if not state.has_fp16_weights:
            return None
        return "it packs its weight anew in each call: make it with has_fp16_weights=False"

    def stored(self, layer: nn.Module, parameter: str) -> Tensor:
        W: Any = layer.weight
        if getattr(W, "SCB", None) is None:
            state: Any = layer.state
            W.SCB = state.SCB
        return W  # type: ignore[no-any-return]

    def dense(self, layer: nn.Module, stored: Any) -> Tensor:
        W: Tensor = _bnb().functional.int8_vectorwise_dequant(stored.data, stored.SCB)
        return W

    def parts(self, stored: Any) -> tuple[Tensor, ...]:
        return stored, stored.SCB

    def write(self, layer: nn.Module, W: Tensor, parameter: str = "weight") -> None:
        CB, SCB, _ = _bnb().functional.int8_vectorwise_quant(W.detach().contiguous().half())
        self._put(layer, CB, SCB)

    def _put(self, layer: Any, CB: Tensor, SCB: Tensor) -> None:
        with torch.no_grad():
            layer.weight.copy_(CB)
        layer.weight.SCB = SCB
        self.settle(layer)

    def keep(self, layer: nn.Module, parameter: str, copy: Callable[[Tensor], Tensor]) -> Tensor:
        W: Any = self.stored(layer, parameter)
        return self._packed(copy(W.data), W.SCB.clone())

    def _packed(self, CB: Tensor, SCB: Tensor) -> Tensor:
        W: Tensor = _bnb().nn.Int8Params(CB, requires_grad=False, has_fp16_weights=False, SCB=SCB)
        return W

    def restore(self, layer: nn.Module, kept: Any, parameter: str = "weight") -> None:
        self._put(layer, kept.data, kept.SCB)

    def moved(self, kept: Any, fn: Callable[[Tensor], Tensor]) -> Tensor:
        W = fn(kept)
        return self._packed(W.data, kept.SCB.to(W.device))

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
