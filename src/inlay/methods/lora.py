"""LoRA: low-rank adaptation (https://arxiv.org/abs/2106.09685), with rsLoRA and DoRA.

    W' = W + s B A,  A: R x I,  B: O x R,  s = alpha / r  (alpha / sqrt(r): rsLoRA, https://arxiv.org/abs/2312.03732)
    DoRA (https://arxiv.org/abs/2402.09353): W' = m / |W + s B A|_row * (W + s B A), the norm outside the gradient

A is drawn and B is zero, so a fresh adapter changes nothing; on an embedding, whose matrix is the transposed table,
the other way round. Starting values that are a part of the weight (`inlay.inits`) bring a frozen offset,
W' = W - s B0 A0 + s B A, or a dense one, and the frozen layer is taken with it. On a convolution A has the layer's own
kernel and B mixes channels. `lora_bias` gives B a bias.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay import inits
from inlay.config import ALPHAS, RANKS, AdapterConfig, TaskType, runtime_only, within
from inlay.errors import ConfigError, NotMergeableError, PeftWarning, UnsupportedLayerError
from inlay.layers import LayerKind
from inlay.methods._abstract import Layer, Params, Slot, as_dtype, product
from inlay.methods._started import StartedLowRank
from inlay.ops.dora import dora, weight_norm
from inlay.ops.dropout import apply_mask, draw_mask
from inlay.ops.low_rank import low_rank


@dataclass
class LoraRuntimeConfig:
    """Settings of one run, never saved.

    Args:
        ephemeral_gpu_offload (`bool`, *optional*, defaults to `False`): Accepted; DoRA's norm needs no offload here.
    """

    ephemeral_gpu_offload: bool = False


# Fields of PEFT's config that wait for an issue of their own, with the value that asks for nothing.
_LATER: dict[str, Any] = {
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "arrow_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "megatron_config": None,
}


@dataclass
class LoraConfig(AdapterConfig):
    """Config of LoRA, rsLoRA and DoRA.

    Args:
        r (`int`, *optional*, defaults to 8): Rank of the update.
        lora_alpha (`float`, *optional*, defaults to 8): The update is scaled by ``lora_alpha / r``.
        lora_dropout (`float`, *optional*, defaults to 0.0): Share of the input dropped on the way into A, below 1.
        use_rslora (`bool`, *optional*, defaults to `False`): Scale by ``lora_alpha / sqrt(r)``.
        use_dora (`bool`, *optional*, defaults to `False`): Learn the magnitude of each output channel apart.
        lora_bias (`bool`, *optional*, defaults to `False`): Give B a bias.
        init_lora_weights (`bool` or `str`, *optional*, defaults to `True`): ``True`` starts as the identity, ``False``
            at random, ``"gaussian"`` draws A from N(0, 1/r); ``"pissa"``, ``"pissa_niter_[n]"``, ``"olora"``,
            ``"loftq"``, ``"orthogonal"``: see `inlay.inits`.
        alora_invocation_tokens (`list[int]`, *optional*): Act from the last occurrence of these tokens on: activated
            LoRA, for causal language models.
        loftq_config (`LoftQConfig` or `dict`, *optional*): Bits and rounds of ``"loftq"``.
        rank_pattern (`dict[str, int]`, *optional*): Rank by layer: suffix or regex of a name -> rank.
        alpha_pattern (`dict[str, float]`, *optional*): Alpha by layer.

    The remaining fields are `inlay.config.AdapterConfig`'s, or PEFT's that wait for their own methods: these raise
    `UnsupportedFieldError` when set.

    Example:
        >>> LoraConfig(r=16, target_modules=["q_proj"]).r
        16
    """

    r: int = field(default=8, metadata=within(RANKS))
    lora_alpha: float = field(default=8, metadata=within(ALPHAS))
    lora_dropout: float = field(default=0.0, metadata=within("[0, 1)"))
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=within(RANKS))
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=within(ALPHAS))
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: inits.LoftQConfig | dict[str, Any] | None = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig, metadata=runtime_only())
    lora_bias: bool = False
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None

    method: ClassVar[str] = "LORA"
    patterned: ClassVar[dict[str, str]] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    bias_only: ClassVar[str] = "lora_only"
    always_written: ClassVar[frozenset[str]] = frozenset(f.name for f in fields(AdapterConfig))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, unset in _LATER.items():
            if getattr(self, name) not in (unset, None):
                raise self.unsupported(name)
        if self.alora_invocation_tokens is not None:
            self._check_invocation(self.alora_invocation_tokens)
        self.loftq_config = inits.checked(self.init_lora_weights, self.loftq_config)
        if inits.computed(self.init_lora_weights, self.loftq_config) and 0 in (
            self.lora_alpha,
            *self.alpha_pattern.values(),
        ):
            raise ConfigError("lora_alpha must not be 0: starting values of the weight are divided by the scale.")
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias and use_dora cannot both be set: DoRA has no place for the bias.")

    def _check_invocation(self, tokens: list[int]) -> None:
        if not tokens or min(tokens) < 0:
            raise ConfigError(f"alora_invocation_tokens must be one or more tokens, got {tokens}.")
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ConfigError(f"alora_invocation_tokens is for task_type='CAUSAL_LM', got {self.task_type!r}.")

    @property
    def invocation(self) -> list[int] | None:
        return self.alora_invocation_tokens

    def as_saved(self) -> Self:
        # The factors stand twice in the file, [A; A0] and [B, -B0], and the scale stays what it was.
        more = 2**0.5 if self.use_rslora else 2
        return replace(
            self,
            init_lora_weights=True,
            r=2 * self.r,
            lora_alpha=more * self.lora_alpha,
            rank_pattern={k: 2 * r for k, r in self.rank_pattern.items()},
            alpha_pattern={k: more * alpha for k, alpha in self.alpha_pattern.items()},
        )


class LoraAdapter(StartedLowRank):
    """LoRA on one layer; see the module's text for the mathematics."""

    stacks = True
    rank_dims: ClassVar[Mapping[str, int]] = {"down": 0, "up": 1}

    numbers = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")

    def __init__(self, config: LoraConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        self.r: int = values.get("r", config.r)
        self.lora_alpha: float = values.get("lora_alpha", config.lora_alpha)
        self.use_rslora, self.use_dora, self.lora_bias = config.use_rslora, config.use_dora, config.lora_bias
        self.gain: float = values.get("gain", 1.0)  # of the product, not of B's bias
        self.init: bool | str = config.init_lora_weights
        self.lora_dropout = self.dropout = config.lora_dropout
        self.experts = kind.experts(base)
        self.scaling: float | Tensor = self.natural_scaling()
        self.from_base = self.use_dora
        self._check(kind, base)
        leaf = "" if kind.bare else "weight"
        self.slots = {
            "down": Slot(kind.down_shape(base, self.r), f"lora_{kind.infix}A", leaf),
            "up": Slot(kind.up_shape(base, self.r), f"lora_{kind.infix}B", leaf),
        }
        if self.lora_bias:
            self.slots["bias"] = Slot((kind.shape(base)[0],), "lora_B", "bias")
        if self.use_dora:
            self.slots["magnitude"] = Slot(kind.channel_shape(base), "lora_magnitude_vector", "weight", saved_leaf="")

        self.prepare_start(kind, base, config.loftq_config, "tied" in values)  # type: ignore[arg-type]

    def natural_scaling(self) -> float:
        """The scale that rank and alpha give."""
        return self.gain * self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def _check(self, kind: LayerKind, base: nn.Module) -> None:
        if self.r % kind.groups(base):
            raise UnsupportedLayerError(
                f"r={self.r} must be a multiple of the convolution's {kind.groups(base)} groups."
            )
        if self.use_dora and kind.groups(base) > 1:
            raise UnsupportedLayerError(
                "use_dora is not defined on a grouped convolution: its B A is no weight of it."
            )
        if kind.by_weight and (self.use_dora or (self.dropout and not kind.ignores_dropout)):
            raise UnsupportedLayerError(
                f"{kind.name} is adapted through its weight: lora_dropout and use_dora must be off for it."
            )
        if kind.by_weight and self.lora_bias and getattr(base, kind.bias_name, None) is None:
            raise UnsupportedLayerError(
                f"{kind.name} is adapted through its weight and bias, and this one has no bias: lora_bias must be off."
            )
        if kind.by_weight and self.dropout:
            warnings.warn(
                f"{kind.name} is adapted through its weight: lora_dropout has no effect there.",
                PeftWarning,
                stacklevel=2,
            )
        if kind.indexed and self.lora_bias:
            raise UnsupportedLayerError("lora_bias is not defined on an embedding.")

    def initialise(self, p: Params, layer: Layer) -> None:
        super().initialise(p, layer)
        with torch.no_grad():
            if self.lora_bias:
                p["bias"].zero_()
            if self.use_dora:
                p["magnitude"].copy_(self._norm(p, layer).reshape(p["magnitude"].shape))

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        dropout = self.dropout if layer.training and not layer.kind.indexed else 0.0
        if self.offset:
            h = self.shifted(p, x, h, layer, fresh)
        if self.use_dora:
            return self._dora(p, x, h, layer, dropout, fresh)
        if layer.kind.matrix:
            return low_rank(
                x,
                h,
                p["down"],
                p["up"],
                self.scaling,
                dropout,
                p.get("bias"),
                h_is_fresh=fresh and not h.requires_grad,
            )
        return h + as_dtype(self.change(p, F.dropout(x, dropout) if dropout else x, layer) * self.scaling, h)

    def change(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        change = super().change(p, x, layer)
        return change + layer.kind.channels(p["bias"]) if self.lora_bias else change

    def drops(self) -> bool:
        return self.dropout > 0

    def _norm(self, p: Params, layer: Layer) -> Tensor:
        down, up = (t.flatten(1) for t in self.whole(p))
        squares = None if "W0" in p else layer.row_squares()
        return weight_norm(self.base(p, layer.matrix()), down, up, self.scaling, squares)

    def _dora(self, p: Params, x: Tensor, h: Tensor, layer: Layer, dropout: float, fresh: bool) -> Tensor:
        bias, kind = layer.offset(), layer.kind
        if layer.training:
            norm_O = self._norm(p, layer)
        else:
            owners = (p["down"], p["up"], *(p[key] for key in self.offset))
            if isinstance(self.scaling, Tensor):
                owners = (*owners, self.scaling)
            norm_O = layer.remember(("norm", self.scaling), owners, lambda: self._norm(p, layer))
        mask = dropped = None
        if dropout:
            # Only the update sees dropout: (gain - 1) W drop(x) stands beside the frozen layer's W x.
            mask = draw_mask(x.shape, dropout, x.device)
            seen = apply_mask(x, mask, dropout)
            dropped = layer.operate(seen, as_dtype(layer.matrix(), x))
            dropped = self.shifted(p, seen, dropped, layer) if self.offset else dropped
        if kind.matrix:
            dropped = dropped if dropped is None or bias is None else dropped + bias
            return dora(
                x, h, p["down"], p["up"], self.scaling, p["magnitude"], norm_O, bias, dropout,
                mask=mask, h_dropped_BO=dropped, h_is_fresh=fresh and not h.requires_grad,
            )  # fmt: skip
        gain = kind.channels(p["magnitude"].flatten() / norm_O)
        frozen = dropped if dropped is not None else h if bias is None else h - kind.channels(bias)
        x = x if mask is None else apply_mask(x, mask, dropout)
        return h + as_dtype((gain - 1) * frozen + gain * self.scaling * self.change(p, x, layer), h)

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up = (t.flatten(1) for t in self.whole(p))
        W = self.base(p, W_OI) + self.scaling * product(up, down, self.experts)
        if self.use_dora:
            W = W * (p["magnitude"].flatten() / W.detach().norm(dim=1))[:, None]
        if b_O is not None and self.lora_bias:
            b_O = b_O + self.scaling / self.gain * p["bias"]
        return W, b_O

    def tied(self, p: Params) -> Params:
        # The tied layer's matrix is the transpose: (B A)^T = A^T B^T.
        return {"down": p["up"].t(), "up": p["down"].t()}

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        if kind.groups(base) > 1:
            raise NotMergeableError(
                "LoRA on a grouped convolution sees all input channels, which a grouped weight cannot: leave it "
                "unmerged."
            )
        if self.lora_bias and getattr(base, kind.bias_name, None) is None:
            raise NotMergeableError("lora_bias needs a layer with a bias to merge into: leave it unmerged.")

    def factors(self, p: Params) -> tuple[Tensor, Tensor, float | Tensor] | None:
        plain = not self.use_dora and not self.lora_bias and self.experts == 1 and "W0" not in p
        return (*self.whole(p), self.scaling) if plain else None
