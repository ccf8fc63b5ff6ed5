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
    """``x W^T + s (drop(x) A^T) B^T`` as three calls and a sum in the dtype of ``x``, with gradients to A and B."""

    dropout = 0.0

    def __init__(self, path: str, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        down_RI, up_OR = _factors(path, base, "default")
        self.down = nn.Parameter(down_RI)
        self.up = nn.Parameter(up_OR)

    def forward(self, x: Tensor) -> Tensor:
        z = F.dropout(x, self.dropout) if self.dropout else x
        middle = F.linear(z, self.down.to(x.dtype))
        return F.linear(x, self.weight) + SCALE * F.linear(middle, self.up.to(x.dtype))


class DropoutFloor(LoraFloor):
    """The same, with torch's own dropout."""

    dropout = 0.1


class DoraFloor(LoraFloor):
    """The same, with every output row rescaled: the norm of ``W + s B A`` by building it."""

    def __init__(self, path: str, base: nn.Linear) -> None:
        super().__init__(path, base)
        self.magnitude = nn.Parameter(self.weight.norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm_O = torch.addmm(self.weight, self.up, self.down, alpha=SCALE).norm(dim=1)
        return self.magnitude / norm_O * super().forward(x)


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
