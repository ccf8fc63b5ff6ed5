"""SSF: scaling and shifting features (https://arxiv.org/abs/2210.08823), as a method that lives outside the package.

y = scale * (W x + b) + shift,  one scale and one shift for each output channel
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.config import AdapterConfig
from inlay.errors import NotMergeableError
from inlay.layers import LayerKind
from inlay.methods import AbstractAdapter, Layer, Params, Slot, as_dtype, register_peft_method


@dataclass
class SsfConfig(AdapterConfig):
    """Config of SSF; where it goes is in the fields that every method shares.

    Args:
        init_weights (`bool`, *optional*, defaults to `True`): Start as the identity; at random otherwise.
    """

    init_weights: bool = True

    method: ClassVar[str] = "SSF"
    bias_only: ClassVar[str] = "ssf_only"


class SsfAdapter(AbstractAdapter):
    """SSF on one layer."""

    def __init__(self, config: SsfConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        outs, _ = kind.shape(base)
        self.random = not config.init_weights
        self.slots = {"scale": Slot((outs,), "ssf_scale"), "shift": Slot((outs,), "ssf_shift")}

    def initialise(self, p: Params, layer: Layer) -> None:
        spread = 0.02 if self.random else 0.0
        with torch.no_grad():
            p["scale"].normal_(1.0, spread)
            p["shift"].normal_(0.0, spread)

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        scale, shift = layer.kind.channels(p["scale"]), layer.kind.channels(p["shift"])
        return as_dtype(h * scale + shift, h)

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W_OI * p["scale"][:, None], None if b_O is None else b_O * p["scale"] + p["shift"]

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        if base._parameters.get(kind.bias_name) is None:
            raise NotMergeableError("SSF needs a layer with a bias to merge its shift into: leave it unmerged.")


register_peft_method(
    name="ssf",
    config_cls=SsfConfig,
    model_cls=SsfAdapter,
    kinds=["Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d"],
)
