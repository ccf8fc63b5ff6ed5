"""LoHa: a Hadamard product of two low-rank matrices (FedPara, https://arxiv.org/abs/2108.06098).

    W' = W + s (w1_a w1_b) * (w2_a w2_b),  w*_a: O x R,  w*_b: R x I,  s = alpha / R

which reaches rank R^2 with twice LoRA's parameters. Entry by entry it is a low-rank product again, of factors whose
rows and columns are products of one from each: up[:, (i, j)] = w1_a[:, i] * w2_a[:, j], down[(i, j)] = w1_b[i] *
w2_b[j]. So forward, rows and merging build no O x I matrix where R^2 is small against the layer. On a convolution
with `use_effective_conv2d`, w*_a is R x O, w*_b R x channels, and a core t* (R x R x kernel) stands between them.
w2_b starts at zero, the rest as torch draws a linear layer's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor

from inlay.methods._abstract import Layer, Params, bare_slots, kaiming_
from inlay.methods._low_rank import AbstractLowRank
from inlay.methods._lycoris import Lycoris, LycorisConfig, spread_core


@dataclass
class LoHaConfig(LycorisConfig):
    """Config of LoHa; the other fields are `LycorisConfig`'s and `inlay.config.AdapterConfig`'s.

    Args:
        init_weights (`bool`, *optional*, defaults to `True`): ``True`` starts as the identity, ``False`` at random.

    Example:
        >>> LoHaConfig(r=4, target_modules=["q_proj"]).r
        4
    """

    init_weights: bool = True

    method: ClassVar[str] = "LOHA"
    bias_only: ClassVar[str] = "loha_only"


class LoHaAdapter(Lycoris, AbstractLowRank):
    """LoHa on one layer; see the module's text for the mathematics."""

    rank_dropout_scale = True

    def _lay_out(self, config: LoHaConfig, outs: int, ins: int, kernel: tuple[int, ...]) -> None:
        self.init = config.init_weights
        width = ins * prod(kernel)
        self.dense = self.r**2 * (outs + width) > outs * width
        a, b = ((self.r, outs), (self.r, ins)) if self.effective else ((outs, self.r), (self.r, width))
        shapes = {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}
        self.slots = bare_slots("hada_", {**shapes, **({"t1": self.core, "t2": self.core} if self.effective else {})})

    def draw(self, p: Params, layer: Layer) -> None:
        for t in p.values():
            kaiming_(t)
        if self.init:
            p["w2_b"].zero_()

    def _half(self, p: Params, at: str) -> tuple[Tensor, Tensor]:
        """One of the two low-rank matrices: O x R and R x I."""
        a, b = p[f"w{at}_a"], p[f"w{at}_b"]
        return (a.t(), spread_core(p[f"t{at}"], b)) if self.effective else (a, b)

    def pair(self, p: Params) -> tuple[Tensor, Tensor]:
        (a1_OR, b1_RI), (a2_OR, b2_RI) = self._half(p, "1"), self._half(p, "2")
        return (b1_RI[:, None] * b2_RI).flatten(0, 1), (a1_OR[:, :, None] * a2_OR[:, None]).flatten(1)

    def delta(self, p: Params) -> Tensor:
        (a1_OR, b1_RI), (a2_OR, b2_RI) = self._half(p, "1"), self._half(p, "2")
        return (a1_OR @ b1_RI) * (a2_OR @ b2_RI)
