"""LoKr: a Kronecker product (LyCORIS, https://arxiv.org/abs/2309.14859; KronA, https://arxiv.org/abs/2212.10650).

    W' = W + s kron(w1, w2),  w1: A x C,  w2: B x D,  A B = O,  C D = I,  s = alpha / R

A and C divide O and I: `decompose_factor` where it does, else the largest divisor up to it and to the root. w2 is
w2_a w2_b of rank R where R is below half of its longer side, w1 too with `decompose_both`. On a convolution w2 has
the kernel; with `use_effective_conv2d` a low-rank w2 has a core t2 (R x R x kernel) between w2_a (R x B) and w2_b
(R x D). The layer runs with w2 and w1 one after the other and builds no O x I matrix, but where it is grouped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt, prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.config import within
from inlay.errors import ConfigError
from inlay.methods._abstract import Layer, Params, as_dtype, bare_slots, kaiming_
from inlay.methods._lycoris import Lycoris, LycorisConfig, spread_core


@dataclass
class LoKrConfig(LycorisConfig):
    """Config of LoKr; the other fields are `LycorisConfig`'s and `inlay.config.AdapterConfig`'s.

    Args:
        decompose_both (`bool`, *optional*, defaults to `False`): Give w1 a low rank too, where that is smaller.
        decompose_factor (`int`, *optional*, defaults to -1): Rows and columns of w1, where they divide the layer's;
            -1 comes as near to the square root as possible.
        rank_dropout_scale (`bool`, *optional*, defaults to `False`): Divide by the share of channels that
            `rank_dropout` has kept.
        init_weights (`bool` or `str`, *optional*, defaults to `True`): ``True`` starts as the identity with w1 zero,
            ``"lycoris"`` with w2 zero, ``False`` at random.

    Example:
        >>> LoKrConfig(decompose_factor=8, target_modules=["q_proj"]).decompose_factor
        8
    """

    decompose_both: bool = False
    decompose_factor: int = field(default=-1, metadata=within("[-1, inf)"))
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    method: ClassVar[str] = "LOKR"
    bias_only: ClassVar[str] = "lokr_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor == 0:
            raise ConfigError("decompose_factor must be -1, or at least 1, got 0.")


class LoKrAdapter(Lycoris):
    """LoKr on one layer; see the module's text for the mathematics."""

    def _lay_out(self, config: LoKrConfig, outs: int, ins: int, kernel: tuple[int, ...]) -> None:
        self.init, self.rank_dropout_scale = config.init_weights, config.rank_dropout_scale
        A, B = split(outs, config.decompose_factor)
        C, D = split(ins, config.decompose_factor)
        r = self.r
        shapes: dict[str, tuple[int, ...]] = {"w1": (A, C)}
        if config.decompose_both and r < max(A, C) / 2:
            shapes = {"w1_a": (A, r), "w1_b": (r, C)}
        self.effective = self.effective and r < max(B, D) / 2
        if r >= max(B, D) / 2:
            shapes["w2"] = (B, D, *kernel)
        elif self.effective:
            shapes.update({"w2_a": (r, B), "w2_b": (r, D), "t2": self.core})
        else:
            shapes.update({"w2_a": (B, r), "w2_b": (r, D * prod(kernel))})
        # On a 1-d convolution with a full w2 PEFT's product stands the other way round: files are trained that way.
        self.swapped = "w2" in shapes and len(kernel) == 1
        self.slots = bare_slots("lokr_", shapes)

    def initialise(self, p: Params, layer: Layer) -> None:
        zeroed = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), False: ()}[self.init]
        for key, t in p.items():
            nn.init.zeros_(t) if key in zeroed else kaiming_(t)

    def _factors(self, p: Params) -> tuple[Tensor, Tensor, Tensor | None]:
        """w1 (A x C), and w2 (B x D) as its right factor and its left one, if it has two."""
        w1_AC = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
        if "w2" in p:
            return w1_AC, p["w2"].flatten(1), None
        if self.effective:
            return w1_AC, spread_core(p["t2"], p["w2_b"]), p["w2_a"].t()
        return w1_AC, p["w2_b"], p["w2_a"]

    def delta(self, p: Params) -> Tensor:
        w1_AC, right_RD, left_BR = self._factors(p)
        if self.swapped:
            return torch.kron(p["w2"], w1_AC[..., None]).flatten(1)
        return torch.kron(w1_AC, right_RD if left_BR is None else left_BR @ right_RD)

    def change(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        if self.swapped:
            return super().change(p, x, layer)
        factors = self._factors(p)
        return layer.kind.apply_kron(layer.base_layer, as_dtype(x, factors[0]), *factors)


def make_kron(w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """The Kronecker product times ``scale``; ``w1`` has no more than ones along what ``w2`` has beside O and I.

    Example:
        >>> make_kron(torch.eye(2), torch.ones(3, 4, 1, 1), 2.0).shape
        torch.Size([6, 8, 1, 1])
    """
    return scale * torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.dim() - w1.dim())), w2)


def split(dimension: int, factor: int = -1) -> tuple[int, int]:
    """``dimension`` as a product: ``factor`` where it divides, else the largest divisor up to it and to the root.

    Example:
        >>> split(768), split(768, 8), split(768, 7)
        ((24, 32), (8, 96), (6, 128))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = isqrt(dimension) if factor == -1 else min(factor, isqrt(dimension))
    small = next((m for m in range(limit, 0, -1) if dimension % m == 0), 1)
    return small, dimension // small
