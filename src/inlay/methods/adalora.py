"""AdaLoRA: low rank with a budget that moves to where it matters (https://arxiv.org/abs/2303.10512).

    W' = W + alpha / (ranknum + 1e-5) B (A * E),  A: R x I,  B: O x R,  E: R x 1,  ranknum = init_r

E stands for singular values: zero at first, or of a part of the weight (`inlay.inits`). Training keeps A and B nearly
orthogonal and masks entries of E by a schedule (`_budget`); files then hold the rest, and ``rank_pattern`` says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from inlay import inits
from inlay.config import RANKS, within
from inlay.errors import ConfigError, PeftWarning, UnsupportedLayerError
from inlay.layers import LayerKind
from inlay.methods._abstract import Layer, Params, bare_slots
from inlay.methods._low_rank import AbstractLowRank
from inlay.methods.lora import LoraConfig


@dataclass
class AdaLoraConfig(LoraConfig):
    """Config of AdaLoRA.

    Args:
        init_r (`int`, *optional*, defaults to 12): Rank of every layer at the start.
        target_r (`int`, *optional*, defaults to 8): Mean rank of a layer in the end.
        tinit (`int`, *optional*, defaults to 0): Steps before ranks begin to fall.
        tfinal (`int`, *optional*, defaults to 0): Steps at the end with the final ranks.
        deltaT (`int`, *optional*, defaults to 1): Steps from one choice of ranks to the next.
        beta1 (`float`, *optional*, defaults to 0.85): How slowly the importance follows the gradients.
        beta2 (`float`, *optional*, defaults to 0.85): The same of its uncertainty.
        orth_reg_weight (`float`, *optional*, defaults to 0.5): Weight of the orthogonality of A and B in the loss.
        total_step (`int`, *optional*): Steps of the optimiser in all; a Trainer with the callback fills it in.
        rank_pattern (`dict[str, list[bool]]`, *optional*): Which rows were kept, by layer; training writes it.

    The remaining fields are `LoraConfig`'s; ``r`` is not used, and ``use_dora``, ``use_rslora`` and ``lora_bias``
    raise `UnsupportedFieldError`.

    Example:
        >>> AdaLoraConfig(init_r=6, target_r=4, total_step=1000).init_r
        6
    """

    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]  # PEFT's own has another meaning here
    lora_alpha: float = field(default=8, metadata=within("(0, 2147483647]"))
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=within("(0, 2147483647]"))
    target_r: int = field(default=8, metadata=within("[0, 2147483647]"))
    init_r: int = field(default=12, metadata=within(RANKS))
    tinit: int = field(default=0, metadata=within("[0, inf)"))
    tfinal: int = field(default=0, metadata=within("[0, inf)"))
    deltaT: int = field(default=1, metadata=within("[1, inf)"))
    beta1: float = field(default=0.85, metadata=within("(0, 1)"))
    beta2: float = field(default=0.85, metadata=within("(0, 1)"))
    orth_reg_weight: float = field(default=0.5, metadata=within("[0, inf)"))
    total_step: int | None = field(default=None, metadata=within("[1, inf)"))

    method: ClassVar[str] = "ADALORA"
    example: ClassVar[dict[str, Any]] = {"total_step": 1000}
    patterned: ClassVar[dict[str, str]] = {"lora_alpha": "alpha_pattern"}
    meaningless = frozenset({"use_dora", "use_rslora", "lora_bias", "alora_invocation_tokens"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_schedule()
        if self.r != 8:
            warnings.warn("`r` is not used in AdaLora: init_r and target_r are its ranks.", PeftWarning, stacklevel=3)
        if self.target_r > self.init_r:
            warnings.warn(f"target_r={self.target_r} is above init_r: ranks will not fall.", PeftWarning, stacklevel=3)
        for key, kept in (self.rank_pattern or {}).items():
            if len(kept) != self.init_r:
                raise ConfigError(f"rank_pattern[{key!r}] must have init_r={self.init_r} entries, got {len(kept)}.")

    def check_schedule(self) -> None:
        """Raises `ConfigError` where the steps leave no time for ranks to fall."""
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            found = f"tinit={self.tinit} and tfinal={self.tfinal} leave none of total_step={self.total_step}"
            raise ConfigError(f"There is no time for a budgeting phase: {found}.")

    def layer_values(self, path: str, model_type: str | None) -> dict[str, Any]:
        kept = (self.rank_pattern or {}).get(f"{path}.lora_E")
        return {} if kept is None else {"pattern": kept}

    def as_loaded(self) -> Self:
        # A file that was converted says True, and where PEFT wrote a name, it had no effect.
        named = inits.name_of(self.init_lora_weights) in ("pissa", "olora")
        return replace(self, init_lora_weights=True) if named else self

    def as_saved(self) -> Self:
        # The triplets and those that are taken out; alpha / (ranknum + 1e-5) stays what it was.
        pattern = {path: kept + [True] * self.init_r for path, kept in (self.rank_pattern or {}).items()}
        more = (2 * self.init_r + 1e-5) / (self.init_r + 1e-5)
        return self.rescaled(more, init_r=2 * self.init_r, rank_pattern=pattern or None)


class AdaLoraAdapter(AbstractLowRank):
    """AdaLoRA on one layer; see the module's text for the mathematics."""

    rank_dims: ClassVar[dict[str, int]] = {"A": 0, "E": 0, "B": 1}
    dropout_name = "lora_dropout"
    numbers = ("r", "lora_alpha", "scaling", "ranknum")

    def __init__(self, config: AdaLoraConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        self.pattern: list[bool] | None = values.get("pattern")  # of init_r rows, where a file had fewer
        self.r = config.init_r if self.pattern is None else sum(self.pattern)
        self.ranknum = self.start_rank = config.init_r
        self.lora_alpha: float = values.get("lora_alpha", config.lora_alpha)
        self.scaling = self.natural_scaling()
        self.dropout = config.lora_dropout
        self.init = config.init_lora_weights
        out, inner = kind.shape(base)
        self.slots = bare_slots("lora_", {"A": (self.r, inner), "B": (out, self.r), "E": (self.r, 1)})
        self.prepare_start(config, kind, base, values)
        if "A0" in self.slots and self.pattern is not None:
            raise UnsupportedLayerError(f"rank_pattern cuts it, so it cannot start by {self.init!r}: leave one out.")

    def natural_scaling(self) -> float:
        return self.lora_alpha

    def draw(self, p: Params, layer: Layer) -> None:
        std = 1.0 if self.init is False else 0.02
        for key in "ABE":
            p[key].normal_(std=std) if key != "E" or self.init is False else p[key].zero_()
        if inits.name_of(self.init) == "orthogonal" and self.pattern is None:
            inits.draw_(p["A"], p["B"], self.init, self.r)
            self.begin(p, p["A"].clone(), p["B"].clone())

    def begin(self, p: Params, down_RI: Tensor, up_OR: Tensor) -> None:
        down_RI, up_OR = down_RI[: self.r], up_OR[:, : self.r]  # a file with fewer rows brings its own
        # E has the lengths of A's rows and B's columns. What has none is not to be zero twice, or it stays so.
        a_R1, b_1R = down_RI.norm(dim=1, keepdim=True), up_OR.norm(dim=0, keepdim=True)
        p["E"].copy_(a_R1 * b_1R.t() * (self.ranknum + 1e-5))
        p["A"].copy_(torch.where(a_R1 > 0, down_RI / a_R1, 0.02 * torch.randn_like(down_RI)))
        p["B"].copy_(torch.where(b_1R > 0, up_OR / b_1R, 0.02 * torch.randn_like(up_OR)))

    def pair(self, p: Params) -> tuple[Tensor, Tensor]:
        return p["A"] * (p["E"] / (self.ranknum + 1e-5)), p["B"]

    def change(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        return super().change(p, x, layer) if self.r else x.new_zeros(())

    def restored(self, saved: Params, p: Params) -> Params:
        return super().restored(saved, {**p, "E": torch.zeros_like(p["E"])})  # what was cut does nothing
