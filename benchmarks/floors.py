"""Hand-written floors: the same arithmetic in plain torch, without a wrapper, a handle or a choice.

Nothing that adapts a model from outside can be much quicker than these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import RANK, SCALE, factor, linears


class LoraFloor(nn.Module):
    """``x W^T + s (x A^T) B^T`` as three calls and a sum, with gradients to A and B."""

    def __init__(self, path: str, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        down_RI, up_OR = _factors(path, base, "default")
        self.down = nn.Parameter(down_RI)
        self.up = nn.Parameter(up_OR)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + SCALE * F.linear(F.linear(x, self.down), self.up)


class StackedFloor(nn.Module):
    """One base call for all rows, and two batched products over every row's own factors, stacked beforehand."""

    def __init__(self, path: str, base: nn.Linear, adapters: Sequence[str]) -> None:
        super().__init__()
        self.weight = base.weight
        pairs = [_factors(path, base, adapter) for adapter in adapters]
        self.down_BIR = torch.stack([down_RI.T for down_RI, _ in pairs]).contiguous()
        self.up_BRO = torch.stack([up_OR.T for _, up_OR in pairs]).contiguous()

    def forward(self, x_BTI: Tensor) -> Tensor:
        middle_BTR = torch.bmm(x_BTI, self.down_BIR)
        return torch.baddbmm(F.linear(x_BTI, self.weight), middle_BTR, self.up_BRO, alpha=SCALE)


def _factors(path: str, base: nn.Linear, adapter: str) -> tuple[Tensor, Tensor]:
    """down_RI and up_OR of one linear."""
    down_RI = factor(path, "lora_A", adapter, (RANK, base.in_features))
    up_OR = factor(path, "lora_B", adapter, (base.out_features, RANK))
    return down_RI, up_OR


def swap(model: nn.Module, replace: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    """`model` with every linear exchanged for what `replace` makes of its path and itself."""
    for path, layer in list(linears(model)):
        model.set_submodule(path, replace(path, layer))
    return model
