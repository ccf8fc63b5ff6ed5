"""OFT: orthogonal fine-tuning (https://arxiv.org/abs/2306.07280), as in OFTv2 (https://arxiv.org/abs/2506.19847).

    W' = W R^T,  R = blockdiag(R_1 ... R_n) orthogonal, each from a skew-symmetric Q:
    Cayley R = (I - Q)(I + Q)^-1,  or the Neumann series of its inverse,  R = I + 2 Q + 2 Q^2 + ... + Q^k

Each block rotates so many channels of the layer's input, or elements of a patch: see `_rotation`. Q starts at zero,
so a fresh adapter changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.config import RANKS, WHEN_SET, AdapterConfig, within
from inlay.errors import ConfigError, NotMergeableError, PeftWarning, UnsupportedLayerError
from inlay.layers import LayerKind
from inlay.methods._abstract import Layer, Params, Slot, as_dtype
from inlay.methods._rotation import AbstractRotation
from inlay.ops.rotation import rotate, rotation


@dataclass
class OFTConfig(AdapterConfig):
    """Config of OFT.

    Args:
        r (`int`, *optional*, defaults to 0): Number of blocks. One of ``r`` and ``oft_block_size`` is 0.
        oft_block_size (`int`, *optional*, defaults to 32): Width of a block. What does not divide the layer's width
            becomes the nearest divisor, with a warning.
        module_dropout (`float`, *optional*, defaults to 0.0): Share of blocks that training leaves unrotated, below 1.
        init_weights (`bool`, *optional*, defaults to `True`): ``True`` starts as the identity, ``False`` at random.
        coft (`bool`, *optional*, defaults to `False`): Keep each Q within ``eps`` of zero, by projection.
        eps (`float`, *optional*, defaults to 6e-5): That distance, for all blocks of a layer together.
        block_share (`bool`, *optional*, defaults to `False`): One rotation for all blocks of a layer.
        use_cayley_neumann (`bool`, *optional*, defaults to `True`): The series, instead of solving a linear system.
        num_cayley_neumann_terms (`int`, *optional*, defaults to 5): Its terms, 2 to 100; 3 is the same as 4.
        rank_pattern (`dict[str, int]`, *optional*): ``r`` by layer: suffix or regex of a name -> number of blocks.
        block_size_pattern (`dict[str, int]`, *optional*): ``oft_block_size`` by layer.

    The remaining fields are `inlay.config.AdapterConfig`'s.

    Example:
        >>> OFTConfig(target_modules=["q_proj"]).oft_block_size
        32
    """

    r: int = field(default=0, metadata=within("[0, 2147483647]"))
    oft_block_size: int = field(default=32, metadata=within("[0, 2147483647]"))
    module_dropout: float = field(default=0.0, metadata=within("[0, 1)"))
    init_weights: bool = True
    coft: bool = False
    eps: float = field(default=6e-5, metadata=within("[0, inf)"))
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = field(default=5, metadata=within("[2, 100]"))
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=WHEN_SET | within(RANKS))
    block_size_pattern: dict[str, int] = field(default_factory=dict, metadata=WHEN_SET | within(RANKS))

    method: ClassVar[str] = "OFT"
    patterned: ClassVar[dict[str, str]] = {"r": "rank_pattern", "oft_block_size": "block_size_pattern"}
    bias_only: ClassVar[str] = "oft_only"
    changed: ClassVar[dict[str, str]] = {"use_cayley_neumann": "0.18.0"}
    always_written = frozenset({"fan_in_fan_out", "bias", "layers_to_transform", "layers_pattern"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            given = f"got r={self.r} and oft_block_size={self.oft_block_size}"
            old = "(A file that has r alone is of before PEFT 0.14, whose OFT was another one: train it anew.)"
            raise ConfigError(f"one of r and oft_block_size must be positive and the other 0, {given}. {old}")


class OFTAdapter(AbstractRotation):
    """OFT on one layer; see the module's text for the mathematics."""

    numbers = ("r", "oft_block_size")

    def __init__(self, config: OFTConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        width = self.lay_out(kind, base)
        self.oft_block_size = b = self._block_of(config, values, width)
        self.r = width // b * (self.groups if self.through_weight else 1)
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.module_dropout, self.init = config.module_dropout, config.init_weights
        stored = 1 if config.block_share else self.r
        # Q's Frobenius norm is sqrt(2) times that of its triangle.
        self.radius = config.eps / (2 * stored) ** 0.5 if config.coft else None
        self.slots = {"packed": Slot((stored, b * (b - 1) // 2), f"oft_{kind.infix}R", "weight")}

    @staticmethod
    def _block_of(config: OFTConfig, values: Mapping[str, Any], width: int) -> int:
        if "r" in values and "oft_block_size" in values:
            raise UnsupportedLayerError("rank_pattern and block_size_pattern both name it: leave one out.")
        r = values.get("r", 0 if "oft_block_size" in values else config.r)
        name, wanted = ("r", r) if r else ("oft_block_size", values.get("oft_block_size", config.oft_block_size))
        divisors = [d for d in range(1, width + 1) if width % d == 0]
        found = min(divisors, key=lambda d: abs(d - wanted))  # of two as near the smaller, as PEFT has it
        block = width // found if r else found
        text = f"Invalid `{name}` ({wanted})! Adjusted `{name}` to ({found}):"
        told = [f"{text} {wanted} does not divide a layer's width {width}."] * (found != wanted)
        told += ["A block of one channel rotates nothing: that layer is not adapted."] * (block == 1)
        if told:
            warnings.warn(" ".join(told), PeftWarning, stacklevel=5)
        return block

    def initialise(self, p: Params, layer: Layer) -> None:
        with torch.no_grad():
            p["packed"].zero_() if self.init else p["packed"].normal_(std=0.1)

    def _blocks(self, p: Params) -> Tensor:
        """R, N x b x b, or 1 x b x b where it is shared."""
        packed = p["packed"]
        if self.radius is not None:
            # As a change that gradients do not see: they are those at the projected value, and the parameter stays.
            fixed = packed.detach()
            norm = fixed.norm(dim=1, keepdim=True).clamp(min=torch.finfo(fixed.dtype).tiny)
            packed = packed + ((self.radius / norm).clamp(max=1.0) - 1.0) * fixed
        return rotation(packed, self.oft_block_size, self.terms)

    def turn(self, p: Params, x: Tensor, layer: Layer | None = None, back: bool = False) -> Tensor:
        if layer is None:
            R = self._blocks(p)
            x = as_dtype(x, R)
        elif layer.training:
            R = as_dtype(self._blocks(p), x)
            R = self._dropped(R) if self.module_dropout else R
        else:
            R = layer.remember(("R", x.dtype), (p["packed"],), lambda: as_dtype(self._blocks(p), x))
        return rotate(x, R.mT if back else R)

    def _dropped(self, R: Tensor) -> Tensor:
        kept_N11 = torch.rand(self.r, 1, 1, device=R.device) >= self.module_dropout
        return torch.where(kept_N11, R, torch.eye(self.oft_block_size, dtype=R.dtype, device=R.device))

    def tied(self, p: Params) -> Params:
        # The tied layer's matrix is the transpose, and R(-Q) is the transpose of R(Q).
        return {"packed": -p["packed"]}

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        if self.inner % self.oft_block_size and self.changes_input:
            raise NotMergeableError(
                f"a block of {self.oft_block_size} channels lies across the groups of this convolution, {self.inner} "
                "channels each, which no grouped weight can do: leave it unmerged."
            )
