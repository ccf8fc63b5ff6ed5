"""What LoHa and LoKr share (LyCORIS, https://arxiv.org/abs/2309.14859): rank, alpha, dropout, convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.config import ALPHAS, RANKS, AdapterConfig, within
from inlay.layers import LayerKind
from inlay.methods._abstract import AbstractDelta, Params


@dataclass
class LycorisConfig(AdapterConfig):
    """The shared fields of LoHa and LoKr.

    Args:
        r (`int`, *optional*, defaults to 8): Rank of the factors.
        alpha (`float`, *optional*, defaults to 8): The update is scaled by ``alpha / r``.
        rank_dropout (`float`, *optional*, defaults to 0.0): Share of output channels that a training forward leaves
            out of the update.
        module_dropout (`float`, *optional*, defaults to 0.0): How often a training forward leaves out it all.
        use_effective_conv2d (`bool`, *optional*, defaults to `False`): On a convolution with a kernel larger than 1,
            factorize over the kernel too.
        rank_pattern (`dict[str, int]`, *optional*): Rank by layer: suffix or regex of a name -> rank.
        alpha_pattern (`dict[str, float]`, *optional*): Alpha by layer.
    """

    r: int = field(default=8, metadata=within(RANKS))
    alpha: float = field(default=8, metadata=within(ALPHAS))
    rank_dropout: float = field(default=0.0, metadata=within("[0, 1]"))
    module_dropout: float = field(default=0.0, metadata=within("[0, 1]"))
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata=within(RANKS))
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata=within(ALPHAS))

    patterned: ClassVar[dict[str, str]] = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    always_written: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    def __post_init__(self) -> None:
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        super().__post_init__()


class Lycoris(AbstractDelta):
    """The shared numbers, and the shapes that the factors have to fit."""

    numbers = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")

    def __init__(self, config: LycorisConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        self.r: int = values.get("r", config.r)
        self.alpha: float = values.get("alpha", config.alpha)
        self.scaling: float | Tensor = self.natural_scaling()
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        outs, ins = kind.shape(base)
        kernel = kind.down_shape(base, 1)[2:]
        # Files give a kernel's core two dimensions at least.
        self.core = (self.r, self.r, *kernel, *(1,) * (2 - len(kernel)))
        self.effective = config.use_effective_conv2d and prod(kernel) > 1
        self._lay_out(config, outs, ins // prod(kernel), kernel)

    def _lay_out(self, config: Any, outs: int, ins: int, kernel: tuple[int, ...]) -> None:
        """Fills `slots` for ``outs`` output channels that each see ``ins`` input channels through ``kernel``."""
        raise NotImplementedError

    def natural_scaling(self) -> float:
        """The scale that rank and alpha give."""
        return self.alpha / self.r

    def tied(self, p: Params) -> Params:
        # The tied layer's matrix is the transpose: what stood left stands right.
        return {key.translate(str.maketrans("ab", "ba")): t.t() for key, t in p.items()}


def spread_core(core_RRK: Tensor, b_RI: Tensor) -> Tensor:
    """The core of a convolution with its input side multiplied in: R x (I kernel)."""
    return torch.einsum("rsk,si->rik", core_RRK.flatten(2), b_RI).flatten(1)
