"""The table of methods. To add one: a file beside this one, and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from inlay.config import AdapterConfig
from inlay.methods._abstract import AbstractAdapter
from inlay.methods._targets import DEFAULT_TARGETS
from inlay.methods.lora import LoraAdapter, LoraConfig


@dataclass(frozen=True)
class Method:
    """One method: its config, its mathematics, and where it may go.

    Args:
        config (`type[AdapterConfig]`): The config's class.
        adapter (`type[AbstractAdapter]`): The mathematics.
        prefix (`str`): What the names of its slots begin with.
        kinds (`frozenset[str]`): The layer kinds it adapts.
        default_targets (`Mapping`): Targets by model type, where a config names none.
    """

    config: type[AdapterConfig]
    adapter: type[AbstractAdapter]
    prefix: str
    kinds: frozenset[str]
    default_targets: Mapping[str, list[str] | str] = field(default_factory=lambda: DEFAULT_TARGETS)


_ALL_KINDS = frozenset({"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention"})

METHODS: dict[str, Method] = {
    "LORA": Method(LoraConfig, LoraAdapter, "lora_", _ALL_KINDS),
}

__all__ = ["METHODS", "Method"]
