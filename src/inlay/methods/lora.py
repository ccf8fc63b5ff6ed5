"""LoRA: low-rank adaptation (https://arxiv.org/abs/2106.09685), with rsLoRA and DoRA.

    W' = W + s B A,  A: R x I,  B: O x R,  s = alpha / r  (alpha / sqrt(r): rsLoRA, https://arxiv.org/abs/2312.03732)
    DoRA (https://arxiv.org/abs/2402.09353): W' = m / |W + s B A|_row * (W + s B A), the norm outside the gradient

A is drawn and B is zero, so a fresh adapter changes nothing; on an embedding, whose matrix is the transposed table,
the other way round. Or both are a part of the weight (`inlay.inits`). On a convolution A has the layer's own kernel,
and B mixes channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from inlay import inits
from inlay.config import ALPHAS, LATER, RANKS, RUNTIME_ONLY, AdapterConfig, TaskType, within
from inlay.errors import ConfigError, NotMergeableError, PeftWarning, UnsupportedLayerError
from inlay.layers import LayerKind
from inlay.methods._abstract import Layer, Params, Slot
from inlay.methods._low_rank import AbstractLowRank


@dataclass
class LoraRuntimeConfig:
    """Settings of one run, never saved.

    Args:
        ephemeral_gpu_offload (`bool`, *optional*, defaults to `False`): Accepted; DoRA's norm needs no offload here.
    """

    ephemeral_gpu_offload: bool = False


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
    megatron_config: dict[str, Any] | None = field(default=None, metadata=LATER)
    megatron_core: str | None = "megatron.core"
    loftq_config: inits.LoftQConfig | dict[str, Any] | None = field(default_factory=dict)
    eva_config: Any = field(default=None, metadata=LATER)
    corda_config: Any = field(default=None, metadata=LATER)
    lora_ga_config: Any = field(default=None, metadata=LATER)
    use_dora: bool = False
    velora_config: Any = field(default=None, metadata=LATER)
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = field(default=False, metadata=LATER)
    qalora_group_size: int = 16
    monteclora_config: Any = field(default=None, metadata=LATER)
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig, metadata=RUNTIME_ONLY)
    lora_bias: bool = False
    use_bdlora: Any = field(default=None, metadata=LATER)
    arrow_config: Any = field(default=None, metadata=LATER)
    kasa_config: Any = field(default=None, metadata=LATER)

    method: ClassVar[str] = "LORA"
    patterned: ClassVar[dict[str, str]] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    bias_only: ClassVar[str] = "lora_only"
    always_written: ClassVar[frozenset[str]] = frozenset(f.name for f in fields(AdapterConfig))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alora_invocation_tokens is not None:
            self._check_invocation(self.alora_invocation_tokens)
        self.loftq_config = inits.checked(self.init_lora_weights, self.loftq_config)
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
        twice = {path: 2 * r for path, r in self.rank_pattern.items()}
        return self.rescaled(2**0.5 if self.use_rslora else 2, r=2 * self.r, rank_pattern=twice)

    def rescaled(self, factor: float, **fields: Any) -> Self:
        """The config of a file whose offset is in its factors."""
        fields["alpha_pattern"] = {path: factor * alpha for path, alpha in self.alpha_pattern.items()}
        fields.update(init_lora_weights=True, loftq_config=None, lora_alpha=factor * self.lora_alpha)
        return replace(self, **fields)


class LoraAdapter(AbstractLowRank):
    """LoRA on one layer; see the module's text for the mathematics."""

    stacks = True
    rank_dims: ClassVar[dict[str, int]] = {"down": 0, "up": 1}
    numbers = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")

    def __init__(self, config: LoraConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        self.r: int = values.get("r", config.r)
        self.lora_alpha: float = values.get("lora_alpha", config.lora_alpha)
        self.use_rslora, self.use_dora, self.lora_bias = config.use_rslora, config.use_dora, config.lora_bias
        self.gain: float = values.get("gain", 1.0)  # of the product, not of B's bias
        self.init = config.init_lora_weights
        self.lora_dropout = self.dropout = config.lora_dropout
        self.experts = kind.experts(base)
        self.scaling = self.natural_scaling()
        self.from_base = self.use_dora
        leaf = "" if kind.bare else "weight"
        self.slots = {
            "down": Slot(kind.down_shape(base, self.r), f"lora_{kind.infix}A", leaf),
            "up": Slot(kind.up_shape(base, self.r), f"lora_{kind.infix}B", leaf),
        }
        if self.lora_bias:
            self.slots["bias"] = Slot((kind.shape(base)[0],), "lora_B", "bias")
        if self.use_dora:
            self.slots["magnitude"] = Slot(kind.channel_shape(base), "lora_magnitude_vector", "weight", saved_leaf="")
        if self.lora_bias and kind.indexed:
            raise UnsupportedLayerError("lora_bias=True is not supported for Embedding.")
        if self.lora_bias and not kind.by_weight and getattr(base, kind.bias_name, None) is None:
            told = f"`lora_bias=True` was passed but the targeted layer of type {type(base).__name__} has no bias"
            warnings.warn(f"{told} to merge it into.", PeftWarning, stacklevel=2)
        self.prepare_start(config, kind, base, values)

    def natural_scaling(self) -> float:
        return self.gain * self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def initialise(self, p: Params, layer: Layer) -> None:
        super().initialise(p, layer)
        if self.lora_bias:
            nn.init.zeros_(p["bias"])

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        W_OI, b_O = super().weight(p, W_OI, b_O)
        return W_OI, b_O if b_O is None or not self.lora_bias else b_O + self.scaling / self.gain * p["bias"]

    def tied(self, p: Params) -> Params:
        # The tied layer's matrix is the transpose: (B A)^T = A^T B^T.
        return {"down": p["up"].t(), "up": p["down"].t()}

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        super().check_mergeable(kind, base)
        if self.lora_bias and getattr(base, kind.bias_name, None) is None:
            told = "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias"
            raise NotMergeableError(f"{told} to merge into: leave it unmerged.")
