"""AdaLoRA: low rank with a budget that moves to where it matters (https://arxiv.org/abs/2303.10512).

    W' = W + alpha / (ranknum + 1e-5) B (A * E),  A: R x I,  B: O x R,  E: R x 1,  ranknum = init_r

E stands for singular values. A and B are drawn small and E is zero, so a fresh adapter changes nothing. Training
keeps A and B nearly orthogonal and masks entries of E by a schedule (`_budget.py`); files then hold the rows that are
left, and ``rank_pattern`` says which these were.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.config import RANKS, within
from inlay.errors import ConfigError, PeftWarning
from inlay.layers import LayerKind
from inlay.methods._abstract import AbstractLowRank, Layer, Params, Slot, as_dtype
from inlay.methods.lora import LoraConfig
from inlay.ops.low_rank import low_rank


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

    The remaining fields are `LoraConfig`'s; ``r`` is not used. Those that name another kind of update
    (``use_dora``, ``use_rslora``, ``lora_bias``, starting values by name, ...) raise `UnsupportedFieldError`.

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

    def __post_init__(self) -> None:
        for name in ("use_dora", "use_rslora", "lora_bias", "loftq_config", "alora_invocation_tokens"):
            if getattr(self, name):
                raise self.unsupported(name, "has no meaning for AdaLoRA")
        super().__post_init__()
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise self.unsupported("init_lora_weights", "is LoRA's: AdaLoRA starts by True or False")
        if self.r != 8:
            warnings.warn("AdaLoRA does not use r: init_r is the rank at the start.", PeftWarning, stacklevel=3)
        self.check_schedule()
        if self.target_r > self.init_r:
            warnings.warn(
                f"target_r={self.target_r} is above init_r={self.init_r}: ranks will not fall.",
                PeftWarning,
                stacklevel=4,
            )
        for key, kept in (self.rank_pattern or {}).items():
            if len(kept) != self.init_r:
                raise ConfigError(f"rank_pattern[{key!r}] must have init_r={self.init_r} entries, got {len(kept)}.")

    def check_schedule(self) -> None:
        """Raises `ConfigError` where the steps leave no time for ranks to fall."""
        if self.total_step is None:
            return
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} for the "
                "ranks to fall: make them smaller, or train longer."
            )

    def layer_values(self, path: str, model_type: str | None) -> dict[str, Any]:
        kept = (self.rank_pattern or {}).get(f"{path}.lora_E")
        return {} if kept is None else {"pattern": kept}


class AdaLoraAdapter(AbstractLowRank):
    """AdaLoRA on one layer; see the module's text for the mathematics."""

    numbers = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")

    # Which rows training has decided to keep, of those in memory.
    kept: list[bool] | None = None

    def __init__(self, config: AdaLoraConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        # Which of the first init_r rows are in memory, where a file had fewer.
        self.pattern: list[bool] | None = values.get("pattern")
        self.r = config.init_r if self.pattern is None else sum(self.pattern)
        self.ranknum = config.init_r
        self.lora_alpha: float = values.get("lora_alpha", config.lora_alpha)
        self.scaling: float | Tensor = self.natural_scaling()
        self.lora_dropout = self.dropout = config.lora_dropout
        self.init = config.init_lora_weights
        self.check_input_dropout(kind)
        out, inner = kind.shape(base)
        self.slots = {
            "A": Slot((self.r, inner), "lora_A"),
            "B": Slot((out, self.r), "lora_B"),
            "E": Slot((self.r, 1), "lora_E"),
        }

    def natural_scaling(self) -> float:
        return self.lora_alpha

    def initialise(self, p: Params, layer: Layer) -> None:
        std = 1.0 if self.init is False else 0.02
        with torch.no_grad():
            p["A"].normal_(std=std)
            p["B"].normal_(std=std)
            p["E"].normal_() if self.init is False else p["E"].zero_()

    def pair(self, p: Params) -> tuple[Tensor, Tensor]:
        return p["A"] * (p["E"] / (self.ranknum + 1e-5)), p["B"]

    def drops(self) -> bool:
        return self.dropout > 0

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        if not self.r:
            return h
        dropout = self.dropout if layer.training and not layer.kind.indexed else 0.0
        if layer.kind.matrix:
            fresh = fresh and not h.requires_grad
            return low_rank(x, h, *self.pair(p), self.scaling, dropout, h_is_fresh=fresh)
        return h + as_dtype(self.change(p, F.dropout(x, dropout) if dropout else x, layer) * self.scaling, h)

    def tied(self, p: Params) -> Params:
        # The tied layer's matrix is the transpose: (B E A)^T = A^T E B^T.
        return {"A": p["B"].t(), "B": p["A"].t(), "E": p["E"]}

    # ------------------------------------------------------------------ files

    def saved_pattern(self) -> list[bool] | None:
        """Which of the first ``init_r`` rows a file has; None where it has all of them."""
        if self.kept is None or self.pattern is None:
            return self.kept or self.pattern
        kept = iter(self.kept)
        return [stays and next(kept) for stays in self.pattern]

    def saved(self, p: Params) -> Params:
        if self.kept is None:
            return p
        kept = torch.tensor(self.kept, dtype=torch.bool)
        return {key: t[:, kept.to(t.device)] if key == "B" else t[kept.to(t.device)] for key, t in p.items()}

    def restored(self, saved: Params, p: Params) -> Params:
        if self.kept is None or not saved.keys() >= p.keys() or saved["E"].shape == p["E"].shape:
            return saved
        kept = torch.tensor(self.kept, dtype=torch.bool, device=saved["E"].device)
        if int(kept.sum()) != saved["E"].shape[0]:
            return saved  # another choice of rows, which the comparison of shapes will name
        out = {key: t.detach().to(saved[key], copy=True) for key, t in p.items()}
        out["E"].zero_()
        out["A"][kept], out["B"][:, kept], out["E"][kept] = saved["A"], saved["B"], saved["E"]
        return out
