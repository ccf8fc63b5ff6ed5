"""What the library can do, read off its own tables: a row for each method, found by asking its code."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from inlay.errors import NotMergeableError, PlanError
from inlay.layers import KINDS, LayerKind
from inlay.methods import METHODS, Method
from inlay.methods._abstract import AbstractAdapter
from inlay.parametrized import ParameterKind
from inlay.prompts import PROMPTS, Host, PromptMethod


@dataclass(frozen=True)
class Capability:
    """What a method, configured as it is by default, does on one kind of layer.

    Args:
        kind (`str`): The kind of layer.
        why_not (`str`, *optional*): Why it cannot be there; `None` where it can.
        merges (`bool`): Whether it can be written into the weight.
        rows (`str`): How rows of a batch get adapters of their own: ``"stacked"`` (one product for all), ``"sliced"``
            (one for each adapter), or ``"no"``.
    """

    kind: str
    why_not: str | None = None
    merges: bool = False
    rows: str = "no"


@dataclass(frozen=True)
class MethodRow:
    """One method.

    Args:
        name (`str`): As in ``peft_type``.
        config (`str`): Its config's class.
        paper (`str`): Address of its paper.
        trained (`int`): Trained parameters of the default config on one linear layer, ``outs`` x ``ins``, or on one
            attention that has such ones.
        acts_on (`str`): ``"input"``, ``"output"`` or ``"weight"``: where it meets that layer.
        kinds (`tuple[Capability, ...]`): What it does on every kind of layer.
    """

    name: str
    config: str
    paper: str
    trained: int
    acts_on: str
    kinds: tuple[Capability, ...]


@dataclass(frozen=True)
class PromptRow:
    """One way to learn a prompt.

    Args:
        name (`str`): As in ``peft_type``.
        config (`str`): Its config's class.
        paper (`str`): Address of its paper.
        tokens (`int`): How many virtual tokens the example has.
        trained (`int`): Trained parameters of the example before a model ``width`` wide with ``layers`` layers.
        comes_in (`str`): ``"embeddings"`` in front of the input's, or ``"cache"``: keys and values of every layer.
    """

    name: str
    config: str
    paper: str
    tokens: int
    trained: int
    comes_in: str


def prompts(width: int = 1024, layers: int = 24) -> list[PromptRow]:
    """The table of prompt methods, one row each, from their code.

    Args:
        width (`int`, *optional*, defaults to 1024), layers (`int`, *optional*, defaults to 24): Size of the model that
            trained parameters are counted on.

    Example:
        >>> row = prompts(16, 2)[0]
        >>> row.name, row.tokens, row.trained, row.comes_in
        ('PROMPT_TUNING', 8, 128, 'embeddings')
    """
    host = Host(_Sample(width, layers))
    return [_prompt_row(name, method, host) for name, method in PROMPTS.items()]


class _Sample(nn.Module):
    """What a prompt asks of a model, and nothing more."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(64, width, device="meta")
        values = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 1}
        self.config = SimpleNamespace(**values, model_type="sample", to_dict=lambda: values)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> None:
        """Takes a cache, as a model that a prompt can stand before does."""


def _prompt_row(name: str, method: PromptMethod, host: Host) -> PromptRow:
    config = method.config(**{"task_type": "CAUSAL_LM", **method.config.example}).fitted(host)
    with torch.device("meta"):
        prompt = method.encoder(config, host)
    trained = sum(p.numel() for key, p in prompt.named_parameters() if key not in prompt.frozen)
    met = "cache" if config.in_cache else "embeddings"
    return PromptRow(
        name, method.config.__name__, _paper(method.encoder), config.num_virtual_tokens or 0, trained, met
    )


def methods(outs: int = 1024, ins: int = 1024) -> list[MethodRow]:
    """The table of methods, one row each, from the code of the methods themselves.

    Args:
        outs (`int`, *optional*, defaults to 1024), ins (`int`, *optional*, defaults to 1024): Size of the linear layer
            that trained parameters are counted on.

    Example:
        >>> row = methods(16, 32)[0]
        >>> row.name, row.trained, [k.kind for k in row.kinds if k.why_not is None][:2]
        ('LORA', 384, ['Linear', 'Embedding'])
    """
    return [_row(name, method, outs, ins) for name, method in METHODS.items()]


def _row(name: str, method: Method, outs: int, ins: int) -> MethodRow:
    adapter = _adapter(method, *next(pair for pair in _samples(outs, ins) if pair[0].name in method.kinds))
    met = "weight" if adapter.through_weight else "input" if adapter.changes_input else "output"
    trained = sum(math.prod(slot.shape) for slot in adapter.slots.values() if slot.trainable)
    kinds = tuple(_capability(method, kind, layer) for kind, layer in _samples())
    return MethodRow(name, method.config.__name__, _paper(method.adapter), trained, met, kinds)


def _paper(cls: type) -> str:
    text = sys.modules[cls.__module__].__doc__ or ""
    return next((w.strip("(),.;:") for w in text.split() if "arxiv.org" in w), "")


def _adapter(method: Method, kind: LayerKind, layer: nn.Module) -> AbstractAdapter:
    config = method.config(**method.config.example)
    return method.on(config, kind, layer, config.layer_values("layer", None))


def _samples(outs: int = 64, ins: int = 64) -> list[tuple[LayerKind, nn.Module]]:
    """A layer of every kind; GPT-2's is a linear one turned round, so that transformers is not needed."""
    linear = nn.Linear(ins, outs, device="meta")
    made: dict[str, nn.Module] = {
        "Linear": linear,
        "Embedding": nn.Embedding(64, 64, device="meta"),
        "Conv1D": nn.Linear(64, 64, device="meta"),
        "Conv1d": nn.Conv1d(64, 64, 3, device="meta"),
        "Conv2d": nn.Conv2d(64, 64, 3, device="meta"),
        "Conv3d": nn.Conv3d(64, 64, 3, device="meta"),
        "MultiheadAttention": nn.MultiheadAttention(64, 4, device="meta"),
        "Attention": nn.ModuleDict({"q_proj": linear}),
    }
    return [*((kind, made[kind.name]) for kind in KINDS), (ParameterKind("weight"), made["Linear"])]


def _capability(method: Method, kind: LayerKind, layer: nn.Module) -> Capability:
    if kind.name not in method.kinds:
        return Capability(kind.name, f"{method.config.method} is not defined there")
    try:
        adapter = _adapter(method, kind, layer)
    except PlanError as error:
        return Capability(kind.name, str(error))
    try:
        adapter.check_mergeable(kind, layer)
        merges = True
    except NotMergeableError:
        merges = False
    return Capability(kind.name, None, merges, _rows(adapter, kind))


def _rows(adapter: AbstractAdapter, kind: LayerKind) -> str:
    if kind.by_weight:
        return "no"
    p = {key: torch.empty(slot.shape, device="meta") for key, slot in adapter.slots.items()}
    return "stacked" if kind.matrix and adapter.factors(p) is not None else "sliced"
