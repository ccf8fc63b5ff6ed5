"""LoRA: low-rank adaptation (https://arxiv.org/abs/2106.09685), with rsLoRA and DoRA.

    W' = W + s B A,  A: R x I,  B: O x R,  s = alpha / r  (alpha / sqrt(r): rsLoRA, https://arxiv.org/abs/2312.03732)
    DoRA (https://arxiv.org/abs/2402.09353): W' = m / |W + s B A|_row * (W + s B A), the norm outside the gradient

A is drawn and B is zero, so a fresh adapter changes nothing; on an embedding, whose matrix is the transposed table,
the other way round. Or both are a part of the weight (`inlay.inits`). On a convolution A has the layer's own kernel,
and B mixes channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from torch import nn

from inlay import inits
from inlay.activation import check_invocation
from inlay.config import ALPHAS, LATER, RANKS, RUNTIME_ONLY, AdapterConfig, within
from inlay.errors import ConfigError
from inlay.layers import LayerKind
from inlay.methods._abstract import Slot
from inlay.methods._low_rank import AbstractLowRank, LoraRuntimeConfig


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
            check_invocation(self.alora_invocation_tokens, self.task_type)
        self.loftq_config = inits.checked(self.init_lora_weights, self.loftq_config)
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias and use_dora cannot both be set: DoRA has no place for the bias.")

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
    dropout_name = "lora_dropout"
    slots_elsewhere = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    numbers = ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias")

    def __init__(self, config: LoraConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        self.r: int = values.get("r", config.r)
        self.lora_alpha: float = values.get("lora_alpha", config.lora_alpha)
        self.use_rslora, self.use_dora, self.lora_bias = config.use_rslora, config.use_dora, config.lora_bias
        self.gain = values.get("gain", 1.0)
        self.init = config.init_lora_weights
        self.dropout = config.lora_dropout
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
        self.prepare_start(config, kind, base, values)

    def natural_scaling(self) -> float:
        return self.gain * self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
