"""The table of methods. To add one: a file beside this one, and a row here; or, outside, `register_peft_method`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from inlay.config import AdapterConfig, PeftType
from inlay.errors import ConfigError, DuplicateAdapterError, UnsupportedLayerError
from inlay.hooks import TrainingHooks
from inlay.layers import LayerKind
from inlay.methods._abstract import AbstractAdapter, AbstractDelta, Layer, Params, Slot, as_dtype, kaiming_
from inlay.methods._budget import RankBudget
from inlay.methods._low_rank import AbstractLowRank
from inlay.methods._targets import ADALORA_TARGETS, DEFAULT_TARGETS, IA3_TARGETS
from inlay.methods.adalora import AdaLoraAdapter, AdaLoraConfig
from inlay.methods.adaption_prompt import TARGETS, AdaptionPromptAdapter, AdaptionPromptConfig
from inlay.methods.ia3 import IA3Adapter, IA3Config
from inlay.methods.loha import LoHaAdapter, LoHaConfig
from inlay.methods.lokr import LoKrAdapter, LoKrConfig
from inlay.methods.lora import LoraAdapter, LoraConfig
from inlay.methods.oft import OFTAdapter, OFTConfig


@dataclass(frozen=True)
class Method:
    """One method: its config, its mathematics, and where it may go.

    Args:
        config (`type[AdapterConfig]`): The config's class.
        adapter (`type[AbstractAdapter]`): The mathematics.
        prefix (`str`): What the names of its slots begin with.
        kinds (`frozenset[str]`): The layer kinds it adapts.
        default_targets (`Mapping`): Targets by model type, where a config names none.
        hooks (`type[TrainingHooks]`, *optional*): What it asks of training, made from the config.
    """

    config: type[AdapterConfig]
    adapter: type[AbstractAdapter]
    prefix: str
    kinds: frozenset[str]
    default_targets: Mapping[str, list[str] | str] = field(default_factory=lambda: DEFAULT_TARGETS)
    hooks: type[TrainingHooks] | None = None

    def on(
        self, config: AdapterConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]
    ) -> AbstractAdapter:
        """The adapter of one layer.

        Raises:
            UnsupportedLayerError: The method, configured so, is not defined on it.
            ConfigError: The method names a tensor as something else is, or may be, named.
        """
        if not self.adapter.stacks and (experts := kind.experts(base)) > 1:
            raise UnsupportedLayerError(
                f"its weight stacks {experts} matrices, and {config.method} is defined on one."
            )
        adapter = self.adapter(config, kind, base, values)
        adapter.method = config.method
        for slot in adapter.slots.values():
            if not (slot.name.startswith(self.prefix) and slot.name.isidentifier()):
                raise ConfigError(f"A slot of {config.method} must be named {self.prefix}..., got {slot.name!r}.")
        adapter.check(kind, base)
        return adapter


# Every kind that has a weight.
ALL_KINDS = frozenset(
    {"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "Parameter"}
)

METHODS: dict[str, Method] = {
    "LORA": Method(LoraConfig, LoraAdapter, "lora_", ALL_KINDS),
    "ADALORA": Method(AdaLoraConfig, AdaLoraAdapter, "lora_", ALL_KINDS, ADALORA_TARGETS, RankBudget),
    "IA3": Method(IA3Config, IA3Adapter, "ia3_", ALL_KINDS, IA3_TARGETS),
    "OFT": Method(OFTConfig, OFTAdapter, "oft_", ALL_KINDS),
    "LOHA": Method(LoHaConfig, LoHaAdapter, "hada_", ALL_KINDS),
    "LOKR": Method(LoKrConfig, LoKrAdapter, "lokr_", ALL_KINDS),
    "ADAPTION_PROMPT": Method(
        AdaptionPromptConfig, AdaptionPromptAdapter, "adaption_", frozenset({"Attention"}), TARGETS
    ),
}


def adapter_alone(config: AdapterConfig, kind: LayerKind, base: nn.Module, path: str) -> AbstractAdapter:
    """The adapter of a layer that is adapted by itself, past a model's plan.

    Raises:
        UnsupportedLayerError: The method is not defined on it, or the adapter would have parts elsewhere.
    """
    row = METHODS[config.method]
    if kind.composite or kind.by_weight or kind.name not in row.kinds:
        raise UnsupportedLayerError(f"{path}: a {kind.name} alone cannot be adapted by {config.method}.")
    return row.on(config, kind, base, config.layer_values(path, None))


def register_peft_method(
    *,
    name: str,
    config_cls: type[AdapterConfig],
    model_cls: type[AbstractAdapter],
    prefix: str | None = None,
    is_mixed_compatible: bool = True,
    kinds: Iterable[str] = ALL_KINDS,
    default_targets: Mapping[str, list[str] | str] = DEFAULT_TARGETS,
    hooks: type[TrainingHooks] | None = None,
) -> None:
    """Adds a method that lives outside this package to the table, for the whole process.

    Args:
        name (`str`): Its name in lower case; files have it in upper case, as ``peft_type``.
        config_cls (`type[AdapterConfig]`): Its config, whose ``method`` is that upper-case name.
        model_cls (`type[AbstractAdapter]`): Its mathematics.
        prefix (`str`, *optional*): What the names of its slots begin with; ``name + "_"`` if not given.
        is_mixed_compatible (`bool`, *optional*, defaults to `True`): Accepted; every layer method can be mixed.
        kinds (`Iterable[str]`, *optional*): Names of the layer kinds it adapts; all if not given.
        default_targets (`Mapping`, *optional*): Targets by model type, where a config names none.
        hooks (`type[TrainingHooks]`, *optional*): What it asks of training.

    Raises:
        ConfigError: The name is not lower case, ends with an underscore, or is not the config's ``method``; a class
            is not of the kind that is asked for; there is no such kind of layer.
        DuplicateAdapterError: A method of this name, or of this prefix, is in the table.
    """
    if not name.isidentifier() or name != name.lower() or name.endswith("_"):
        raise ConfigError(f"A method's name must be a lower-case identifier without '_' at its end, got {name!r}.")
    _check_class("config_cls", config_cls, AdapterConfig)
    _check_class("model_cls", model_cls, AbstractAdapter)
    if hooks is not None:
        _check_class("hooks", hooks, TrainingHooks)
    chosen = frozenset([kinds] if isinstance(kinds, str) else kinds)
    known = ALL_KINDS | {"Attention"}
    if strange := sorted(chosen - known):
        raise ConfigError(f"kinds must be names of layer kinds, {sorted(known)}, got {strange}.")
    key, prefix = name.upper(), prefix or f"{name}_"
    if config_cls.method != key:
        raise ConfigError(f"{config_cls.__name__}.method must be {key!r}, got {config_cls.method!r}.")
    if key in METHODS:
        raise DuplicateAdapterError(f"A method {name!r} is registered already: choose another name.")
    if same := [other for other, row in METHODS.items() if row.prefix == prefix]:
        raise DuplicateAdapterError(f"The prefix {prefix!r} is {same[0]}'s: choose another one.")
    PeftType.open(key)
    METHODS[key] = Method(config_cls, model_cls, prefix, chosen, default_targets, hooks)


def _check_class(what: str, given: Any, wanted: type) -> None:
    if not (isinstance(given, type) and issubclass(given, wanted)):
        raise ConfigError(f"{what} must be a subclass of {wanted.__name__}, got {given!r}.")
    if missing := sorted(getattr(given, "__abstractmethods__", ())):
        raise ConfigError(f"{what} {given.__name__} must define {', '.join(missing)}.")


__all__ = [
    "ALL_KINDS",
    "METHODS",
    "AbstractAdapter",
    "AbstractDelta",
    "AbstractLowRank",
    "Layer",
    "Method",
    "Params",
    "Slot",
    "as_dtype",
    "kaiming_",
    "register_peft_method",
]
