"""The same adapters on a bare parameter: fused projections and the stacked weights of experts.

Such a weight is used inside its module's own forward, so the adapter acts on the weight and the module runs with the
result in its place. The module itself is never changed: a shallow replica of it runs, so that threads do not meet.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from inlay.adapted import Adapted, replica
from inlay.errors import UnsupportedLayerError
from inlay.layers import LayerKind, Resolve, innermost


class ParameterKind(LayerKind):
    """The kind of one named parameter of a module: W_OI, or W_EOI with one matrix for each of E experts.

    Experts may be stored as W_EIO, which transformers' modules tell by ``is_transposed``.

    Args:
        parameter (`str`): The parameter's name in its module.
    """

    name = "Parameter"
    printed = "ParamWrapper"
    by_weight = True

    def __init__(self, parameter: str) -> None:
        self.weight_name = parameter
        self.bias_name = ""

    def owns(self, layer: nn.Module) -> bool:
        return self.weight_name in innermost(layer)._parameters

    def _weight(self, layer: nn.Module) -> Tensor:
        return innermost(layer).get_parameter(self.weight_name)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        W = self._weight(layer)
        if W.dim() not in (2, 3):
            raise UnsupportedLayerError(
                f"target_parameters reached {self.weight_name!r} of shape {tuple(W.shape)}: it must have 2 "
                "dimensions, or 3 with the experts first."
            )
        W_OI = self.to_matrix(layer, W)
        return W_OI.shape[-2], W_OI.shape[-1]

    def to_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        return W.mT if W.dim() == 3 and getattr(innermost(layer), "is_transposed", False) else W

    from_matrix = to_matrix

    def experts(self, layer: nn.Module) -> int:
        W = self._weight(layer)
        return W.shape[0] if W.dim() == 3 else 1

    def down_shape(self, layer: nn.Module, r: int) -> tuple[int, ...]:
        return (r * self.experts(layer), self.shape(layer)[1])

    def up_shape(self, layer: nn.Module, r: int) -> tuple[int, ...]:
        return (self.shape(layer)[0], r * self.experts(layer))

    def call(self, layer: nn.Module, W: Tensor, b: Tensor | None, resolve: Resolve, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            path = "base_layer." * _depth(layer) + self.weight_name
            return torch.func.functional_call(layer, {path: W}, args, kwargs)
        return _with(layer, self.weight_name, W)(*args, **kwargs)


def _depth(layer: nn.Module) -> int:
    return 1 + _depth(layer.base_layer) if isinstance(layer, Adapted) else 0


def _with(layer: nn.Module, parameter: str, W: Tensor) -> nn.Module:
    """A replica of ``layer`` that shares everything with it but one parameter."""
    if not isinstance(layer, Adapted):
        return replica(layer, {parameter: W})
    other = copy.copy(layer)
    other.__dict__["_modules"] = {**layer._modules, "base_layer": _with(layer.base_layer, parameter, W)}
    return other
