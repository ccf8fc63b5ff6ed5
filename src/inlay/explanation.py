"""What a config would do to a model, told before anything is touched: `explain`.

The plan and every shape come from `inlay.works.prepare`, which `get_peft_model` applies, so what is told is what is
done. Activations are measured: a copy of the model on the meta device, which holds no numbers, is adapted and called,
and what autograd keeps for backward is counted by storage.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from inlay import inject, walk, works
from inlay.config import AdapterConfig
from inlay.errors import ConfigError, PeftError, PlanError, nearest
from inlay.layers import LayerKind, kind_of
from inlay.match import Skip, why
from inlay.model import PeftModel, handle_class
from inlay.prompts import PROMPTS, AnyConfig, Host, PromptLearningConfig
from inlay.prompts._abstract import EMBEDDINGS
from inlay.prompts.attach import Prompts
from inlay.replicate import clone_module, replicated
from inlay.state import EMBEDDING_NAMES, embedding_weights
from inlay.storage import storage_of, stored_parameters

T = TypeVar("T")
_Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a model is called with
# Bytes that a forward keeps for backward, those that are there for the adapter, and notes.
_Kept = tuple[int | None, int | None, tuple[str, ...]]

_SHOWN = 5


# Optimisers as transformers' Trainer has them, and how many numbers each keeps for a parameter; see `_states`.
OPTIMIZERS = {
    "adamw": 2,
    "adam": 2,
    "sgd": 0,
    "sgd_momentum": 1,
    "adafactor": 1,
    "adamw_8bit": 2,
    "lion": 1,
    "lion_8bit": 1,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is trained."""

    name: str  # the module (or parameter) in the model as it is now
    role: Literal["adapter", "saved", "tokens", "bias", "prompt"]
    kind: str
    shape: tuple[int, ...]  # the adapted weight's (out, in), with experts first; the tensor's own for a bias
    reason: str  # why it is here
    pattern: str = ""  # the entry of the config that named it; "" where none did
    # What the config gives it after patterns: ``{"r": 16, "lora_alpha": 32}``.
    values: Mapping[str, Any] = field(default_factory=dict)
    parameters: int = 0  # trainable parameters
    gradient_bytes: int = 0  # bytes of their gradients
    optimizer_bytes: int = 0  # bytes of what the optimiser keeps for them
    added: int = 0  # parameters that it adds to the model, trainable or not
    nbytes: int = 0  # bytes that it adds to the model
    file_bytes: int = 0  # bytes of its tensors in ``adapter_model.safetensors``


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the model; bytes unless said otherwise."""

    trainable: int = 0  # trainable parameters, as `PeftModel.get_nb_trainable_parameters` will count them
    parameters: int = 0  # all parameters, likewise
    frozen_bytes: int = 0  # the model as it is, buffers included
    adapter_bytes: int = 0  # what is added to it: adapters, copies of modules, rows of tokens
    gradient_bytes: int = 0  # gradients of what is trained
    optimizer_bytes: int = 0  # the optimiser's states
    file_bytes: int = 0  # tensors in ``adapter_model.safetensors``; the file's header comes on top
    activation_bytes: int | None = None  # what one forward keeps for backward, the loss not included
    # What the adapted model keeps above the frozen one where gradients pass through both, which in training is
    # everywhere behind the first adapted layer.
    added_activation_bytes: int | None = None

    @property
    def training_bytes(self) -> int:
        """All memory of a training step that is known: everything but the file."""
        known = (self.frozen_bytes, self.adapter_bytes, self.gradient_bytes, self.optimizer_bytes)
        return sum(known) + (self.activation_bytes or 0)


@dataclass(frozen=True)
class Explanation:
    """A plan, readable with ``print``."""

    title: str  # method and model
    error: PeftError | None = None  # what `get_peft_model` would raise; then nothing else is known
    rows: tuple[Row, ...] = ()  # everything that is trained, in the order of the model
    modules: int = 0  # how many modules the model has
    # How many modules or parameters each entry of the config names, before any is left out.
    patterns: Mapping[str, int] = field(default_factory=dict)
    # Entries that name nothing, each with a hint such as ``"; closest: q_proj"``.
    unmatched: tuple[tuple[str, str], ...] = ()
    skipped: tuple[Skip, ...] = ()  # what an entry names and the plan leaves alone: ``name`` and ``reason``
    warnings: tuple[str, ...] = ()  # what looks like a mistake
    totals: Totals = Totals()
    optimizer: str = "adamw"  # whose states `totals` counts
    activations_method: str | None = None  # ``"traced"`` (counted in a forward on the meta device) or `None`
    notes: tuple[str, ...] = ()  # how the activations were come by, or why they are not known

    def to_dict(self) -> dict[str, Any]:
        """Everything as values that JSON can hold; the error as its name and message."""
        error = None if self.error is None else {"type": type(self.error).__name__, "message": str(self.error)}
        return {**dataclasses.asdict(dataclasses.replace(self, error=None)), "error": error}

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.title}: not possible\n  {type(self.error).__name__}: {self.error}"
        lines = [f"{self.title}: {self.modules:,} modules", *_rows_as_text(self.rows)]
        lines += _bulleted("warning", self.warnings)
        lines += _bulleted("left out", _skips_as_text(self.skipped))
        lines += _totals_as_text(self.totals, self.optimizer)
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


# ---------------------------------------------------------------------- as text


def _rows_as_text(rows: Iterable[Row]) -> list[str]:
    """One line for all rows that differ in nothing but where they stand."""
    groups = _grouped(rows, lambda r: (r.role, _leaf(r.name), r.kind, r.shape, r.reason, tuple(r.values.items())))
    cells = []
    for group in groups:
        row = group[0]
        values = (f"{key.removeprefix('lora_')}={value}" for key, value in row.values.items())
        layer = " ".join((row.kind, "x".join(map(str, row.shape)), *values))
        name = row.name if len(group) == 1 else _leaf(row.name)
        cells.append((f"{len(group):,} x", name, layer, f"{sum(r.parameters for r in group):,}", row.reason))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"  {count:>{widths[0]}}  {name:<{widths[1]}}  {layer:<{widths[2]}}  {parameters:>{widths[3]}}  {reason}"
        for count, name, layer, parameters, reason in cells
    ]


def _skips_as_text(skipped: Iterable[Skip]) -> list[str]:
    groups = _grouped(skipped, lambda skip: (_leaf(skip.name), skip.reason))
    return [f"{g[0].name if len(g) == 1 else f'{len(g):,} x {_leaf(g[0].name)}'}: {g[0].reason}" for g in groups]


def _grouped(items: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _leaf(name: str) -> str:
    """The end of a name from its last part that is no number: "q_proj", "mlp.2"."""
    parts = name.split(".")
    start = max((i for i, part in enumerate(parts) if not part.isdecimal()), default=0)
    return ".".join(parts[start:])


def _bulleted(head: str, texts: Sequence[str]) -> list[str]:
    more = [f"  {head}: {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return [f"  {head}: {text}" for text in texts[:_SHOWN]] + more


def _totals_as_text(t: Totals, optimizer: str) -> list[str]:
    rows = {
        "frozen model": t.frozen_bytes,
        "adapter": t.adapter_bytes,
        "gradients": t.gradient_bytes,
        f"optimiser ({optimizer})": t.optimizer_bytes,
    }
    if t.activation_bytes is not None and t.added_activation_bytes is not None:
        rows["activations, frozen model"] = max(0, t.activation_bytes - t.added_activation_bytes)
        rows["activations, adapter"] = min(t.activation_bytes, t.added_activation_bytes)
    rows |= {"in training": t.training_bytes, "file": t.file_bytes}
    share = 100 * t.trainable / max(1, t.parameters)
    head = f"  trainable: {t.trainable:,} of {t.parameters:,} parameters ({share:.4g} %)"
    return [head, *(f"  {label:<{max(map(len, rows))}}  {size(n):>8}" for label, n in rows.items())]


def size(n: float) -> str:
    """Bytes with three digits and a decimal unit: "512 B", "16.8 MB"."""
    if n < 1000:
        return f"{n} B"
    for unit in ("kB", "MB", "GB"):
        n /= 1000
        if n < 999.5:
            return f"{n:#.3g} {unit}".replace(". ", " ")
    return f"{n / 1000:.3g} TB"


# ---------------------------------------------------------------------- explain


def explain(
    model: nn.Module,
    config: AnyConfig,
    *,
    batch: int | None = None,
    tokens: int | None = None,
    optimizer: str = "adamw",
    example: Any = None,
    device: torch.device | str | None = None,
    autocast_adapter_dtype: bool = True,
) -> Explanation:
    """Tells what ``get_peft_model(model, config)`` would do, and changes nothing.

    Args:
        model (`nn.Module`): The model, on any device; on the meta device it needs no memory.
        config (`AdapterConfig` or `PromptLearningConfig`): What to put into it, or before it.
        batch (`int`, *optional*): Rows of a training batch: with it, activations are told too.
        tokens (`int`, *optional*): Length of each row, for models that read sequences.
        optimizer (`str`, *optional*, defaults to `"adamw"`): Whose states are counted: ``"adamw"``, ``"adam"``,
            ``"sgd"``, ``"sgd_momentum"``, ``"adafactor"``, ``"adamw_8bit"``, ``"lion"`` or ``"lion_8bit"``.
        example (`Any`, *optional*): An input instead of ``batch`` and ``tokens``, where these do not tell what the
            model reads: a tensor, a tuple of positional arguments, a dict of keywords, or ``(tuple, dict)``. Only
            shapes and dtypes count. With labels in it, the loss is counted too.
        device (`torch.device` or `str`, *optional*): Where it will be trained: what attention keeps differs. The
            model's own if not given; a model on the meta device is then told as one on a GPU.
        autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): As for `get_peft_model`.

    Returns:
        `Explanation`: ``print`` it. What `get_peft_model` would raise about the plan is its ``error``.

    Raises:
        ConfigError: An argument is of the wrong type or out of range, or ``batch`` does not tell what the model reads.

    Example:
        >>> from inlay import LoraConfig
        >>> with torch.device("meta"):
        ...     mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> told = explain(mlp, LoraConfig(target_modules=["0", "2"]), batch=32)
        >>> told.totals.trainable, told.totals.added_activation_bytes
        (1616, 10240)
    """
    _check(model, config, batch, tokens, optimizer)
    cpu = _device(model, device) == "cpu"
    call = _call(model, batch, tokens, example)
    title = f"{getattr(config.peft_type, 'value', config.peft_type)} on {type(model).__name__}"
    config = dataclasses.replace(config)
    try:
        prepared, rows = _planned(model, config, autocast_adapter_dtype, optimizer)
    except (PlanError, ConfigError) as error:
        return Explanation(title, error.with_traceback(None), optimizer=optimizer)
    kept, added, notes = _activations(prepared, config, call, autocast_adapter_dtype, cpu)
    return Explanation(
        title=title,
        rows=rows,
        modules=len(prepared.survey.facts),
        patterns=prepared.plan.matched,
        unmatched=prepared.plan.unmatched,
        skipped=prepared.plan.skipped,
        warnings=prepared.plan.warnings,
        totals=_sums(prepared, rows, optimizer, kept, added),
        optimizer=optimizer,
        activations_method=None if kept is None else "traced",
        notes=notes,
    )


def _check(model: Any, config: Any, batch: Any, tokens: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(config, AnyConfig):
        raise ConfigError(f"config must be a method's config, such as LoraConfig, got {type(config).__name__}.")
    for name, value in (("batch", batch), ("tokens", tokens)):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} must be a positive int, got {value!r}.")
    if tokens is not None and batch is None:
        raise ConfigError(f"tokens={tokens} is the length of each row and needs batch=, the number of rows.")
    if optimizer not in OPTIMIZERS:
        hint = nearest(str(optimizer), OPTIMIZERS)
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}{hint}.")


def _planned(
    model: nn.Module, config: AnyConfig, autocast: bool, optimizer: str
) -> tuple[works.Prepared, tuple[Row, ...]]:
    if isinstance(model, PeftModel):
        raise PlanError("The model is a PeftModel already: explain what its get_base_model() gives.")
    if config.layer_replication:
        model = clone_module(model, share_weights=True)
    # The handle of a task trains fresh heads beside the adapter: the same rule, on a copy of the config.
    listed = list(config.modules_to_save or ())
    if new := [n for n in handle_class(config).heads if n in model._modules and n not in listed]:
        config.modules_to_save = listed + new
    with replicated(model, config.layer_replication), works.collector_paused():
        prepared = _prepared(model, config)
        first = [_prompt_row(model, config, optimizer)] if isinstance(config, PromptLearningConfig) else []
        return prepared, (*first, *_rows(prepared, autocast, optimizer))


def _prepared(model: nn.Module, config: AnyConfig) -> works.Prepared:
    if isinstance(config, PromptLearningConfig):
        return works.prepare_saved(model, config.modules_to_save or ())
    return works.prepare(model, dataclasses.replace(config))


def _device(model: nn.Module, device: Any) -> str:
    """The kind of device that activations are told for."""
    if device is None:
        return next((p.device.type for p in model.parameters()), "meta")
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be a torch.device or its name, as 'cpu', got {device!r}.") from error


# ---------------------------------------------------------------------- rows and sums


def _rows(prepared: works.Prepared, autocast: bool, optimizer: str) -> Iterator[Row]:
    found, trained = prepared.survey, not prepared.config.inference_mode
    embeddings = {id(W) for _, W in embedding_weights(found.model)} if not prepared.tokens else set()
    for work in (*prepared.works, *prepared.tokens):
        tensors = _slots(work, autocast, trained)
        filed = 0 if isinstance(work, works.TokenWork) and work.source is not None else _nbytes(tensors)
        W = work.layer._parameters.get("weight")
        if W is not None and id(W) in embeddings and work.path.rpartition(".")[2] in EMBEDDING_NAMES:
            filed += W.nbytes  # files hold an adapted embedding's own weight too
        row = _work_row(work, prepared.config)
        yield _sized(row, optimizer, tensors if work.source is None else [], filed)
    patterns, names = dict(prepared.plan.saved), {fact.name: fact.names for fact in found.facts if fact.also}
    for path, source in prepared.saved.items():
        module = walk.unwrapped(found.modules[path])
        own = [p for name, p in module.named_parameters() if source is None or name != "weight"]
        tensors = [_empty(p.shape, p.dtype, trained and p.is_floating_point()) for p in own]
        filed = _nbytes(t for t in module.state_dict().values() if isinstance(t, Tensor))
        row = _saved_row(names.get(path, (path,)), module, patterns.get(path, ""), source)
        yield _sized(row, optimizer, tensors, filed, module.buffers())
    for name, bias in _biases(prepared):
        row = Row(name, "bias", "Parameter", tuple(bias.shape), f"bias={prepared.config.bias!r}")
        yield _sized(row, optimizer, [_empty(bias.shape, bias.dtype, trained)], bias.nbytes)


def _prompt_row(model: nn.Module, config: PromptLearningConfig, optimizer: str) -> Row:
    host = Host(model)
    fitted = config.fitted(host)
    with torch.device("meta"):
        prompt = PROMPTS[config.method].encoder(fitted, host)
    trained = not config.inference_mode
    tensors = [_empty(p.shape, p.dtype, trained and key not in prompt.frozen) for key, p in prompt.named_parameters()]
    shapes = prompt.filed_shapes()
    filed = sum(4 * math.prod(shape) for shape in shapes.values())
    reason = f"{prompt.length} virtual tokens {'in the cache' if config.in_cache else 'in front of the input'}"
    row = Row("prompt_encoder", "prompt", type(prompt).__name__, shapes[EMBEDDINGS], reason)
    return _sized(row, optimizer, tensors, filed, prompt.buffers())


def _sized(row: Row, optimizer: str, tensors: list[Tensor], filed: int, buffers: Iterable[Tensor] = ()) -> Row:
    new = [] if row.role == "bias" else tensors
    trained = [t for t in tensors if t.requires_grad]
    table = row.role == "saved" and row.kind == "Embedding"
    return dataclasses.replace(
        row,
        parameters=_numel(trained),
        gradient_bytes=_nbytes(trained),
        optimizer_bytes=sum(_states(optimizer, t, table) for t in trained),
        added=_numel(new),
        nbytes=_nbytes(new) + _nbytes(buffers),
        file_bytes=filed,
    )


def _states(optimizer: str, t: Tensor, table: bool = False) -> int:
    """Bytes that an optimiser keeps for one parameter, as the Trainer makes them; single numbers are not counted.

    Adafactor keeps a row and a column of each matrix. Lion and those of 8 bits are bitsandbytes': in fp32, or in bytes
    with a scale for every 256 of them, where there are 4,096 or more; the ``table`` of an embedding stays in fp32.
    """
    states, n = OPTIMIZERS[optimizer], t.numel()
    if optimizer == "adafactor":
        return 4 * (n if t.dim() < 2 else n // t.shape[-1] + n // t.shape[-2])
    if optimizer.endswith("_8bit") and n >= 4096 and not table:
        return states * (n + 4 * math.ceil(n / 256))
    return states * (t.nbytes if optimizer in ("adamw", "adam", "sgd", "sgd_momentum") else 4 * n)


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _empty(shape: Sequence[int], dtype: torch.dtype, trained: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)


def _slots(work: works.Work, autocast: bool, trained: bool) -> list[Tensor]:
    dtype = work.kept_dtype()
    if autocast and dtype in inject.NARROW:
        dtype = torch.float32
    return [_empty(slot.shape, dtype, trained and slot.trainable) for slot in work.adapter.slots.values()]


def _shape(kind: LayerKind, layer: nn.Module) -> tuple[int, ...]:
    experts = kind.experts(layer)
    return ((experts,) if experts > 1 else ()) + kind.shape(layer)


def _work_row(work: works.Work, config: AdapterConfig) -> Row:
    name, pattern, reason, shape = work.path, "", "", _shape(work.kind, work.layer)
    if work.source is not None:
        reason = f"tied to {work.source!r}, whose tensors it uses"
    elif isinstance(work, works.TokenWork):
        reason = f"{len(work.adapter.token_indices)} tokens in trainable_token_indices"
    elif work.target is not None:
        name, pattern, reason = work.target.name, work.target.pattern, work.target.reason
        if work.nested:
            name, reason = f"{name}.{work.attribute}", "part of the attention around it, which is a target"
    if isinstance(work, works.TokenWork):
        return Row(name, "tokens", work.kind.name, shape, reason)
    values = {key: getattr(work.adapter, key) for key in type(config).patterned}
    return Row(name, "adapter", work.kind.name, shape, reason, pattern, values)


def _saved_row(names: tuple[str, ...], module: nn.Module, pattern: str, source: str | None) -> Row:
    kind = kind_of(module)
    name, shape = (type(module).__name__, ()) if kind is None else (kind.name, _shape(kind, module))
    reason = f"tied to {source!r}" if source else why(names, pattern, "modules_to_save")
    return Row(names[0], "saved", name, shape, f"trained whole: {reason}", pattern)


def _biases(prepared: works.Prepared) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own biases that will be trained; `walk.biases` says the same of an adapted model."""
    rule, modules = prepared.config.bias, prepared.survey.modules
    if rule == "none":
        return
    adapted = {id(work.layer) for work in prepared.works}
    seen = {id(p) for path in prepared.saved for p in modules[path].parameters()}
    for name, module in walk.own_modules(prepared.survey.model):
        bias = module._parameters.get("bias")
        if bias is not None and id(bias) not in seen and (rule == "all" or id(module) in adapted):
            seen.add(id(bias))
            yield f"{name}.bias", bias


def _sums(
    prepared: works.Prepared, rows: Sequence[Row], optimizer: str, kept: int | None, added: int | None
) -> Totals:
    model = prepared.survey.model
    old: list[nn.Parameter] = []
    if prepared.survey.router is not None:  # adapters of before stay trained; a model without any is frozen
        changed = {id(bias) for _, bias in _biases(prepared)}
        old = [p for p in model.parameters() if p.requires_grad and id(p) not in changed]
    return Totals(
        trainable=sum(row.parameters for row in rows) + _numel(old),
        parameters=sum(row.added for row in rows) + sum(storage.numel(p) for p, storage in stored_parameters(model)),
        frozen_bytes=sum(storage.nbytes(p) for p, storage in stored_parameters(model)) + _nbytes(model.buffers()),
        adapter_bytes=sum(row.nbytes for row in rows),
        gradient_bytes=sum(row.gradient_bytes for row in rows) + _nbytes(old),
        optimizer_bytes=sum(row.optimizer_bytes for row in rows) + sum(_states(optimizer, p) for p in old),
        file_bytes=sum(row.file_bytes for row in rows),
        activation_bytes=kept,
        added_activation_bytes=added,
    )


# ---------------------------------------------------------------------- activations


def _call(model: nn.Module, batch: int | None, tokens: int | None, example: Any) -> _Call | None:
    """What to call the model with: the example, or what the first layer and the model's config say that it reads."""
    if example is not None:
        return _from_example(example)
    if batch is None:
        return None
    layer = next((m for m in map(walk.unwrapped, model.modules()) if kind_of(m) is not None), model)
    kind = kind_of(layer)
    if getattr(model, "main_input_name", None) == "input_ids" or (kind is not None and kind.indexed):
        if tokens is None:
            raise ConfigError("the model reads tokens: give tokens= too.")
        ids_BT = torch.empty(batch, tokens, dtype=torch.long, device="meta")
        decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return (ids_BT,), {"decoder_input_ids": ids_BT} if decoder else {}
    if kind is None or kind.name != "Linear":
        raise ConfigError("batch= does not tell what the model reads, which is no tokens: give example= instead.")
    rows = (batch,) if tokens is None else (batch, tokens)
    return (_empty((*rows, kind.shape(layer)[1]), storage_of(layer).facts(layer)[0], False),), {}


def _from_example(example: Any) -> _Call:
    example = tree_map(lambda t: t.detach().to("meta") if isinstance(t, Tensor) else t, example)
    match example:
        case Tensor():
            return (example,), {}
        case Mapping():
            return (), dict(example)
        case (list() | tuple() as args, Mapping() as kwargs):
            return tuple(args), dict(kwargs)
        case list() | tuple():
            return tuple(example), {}
    raise ConfigError(f"example must be a tensor, a tuple, a dict or (tuple, dict), got {type(example).__name__}.")


def _activations(prepared: works.Prepared, config: AnyConfig, call: _Call | None, autocast: bool, cpu: bool) -> _Kept:
    if call is None:
        return None, None, ()
    model = prepared.survey.model
    notes = []
    if any(module.__dict__.get("gradient_checkpointing") for module in model.modules()):
        notes.append("gradient checkpointing is on, and activations are told without it")
    if "labels" not in call[1]:
        notes.append("activations are those of the forward, without a loss")
    try:
        return *_traced(model, config, call, autocast, cpu), tuple(notes)
    except Exception as error:  # whatever someone's forward does on the meta device
        return None, None, (f"activations are not known: {type(error).__name__} in a forward without data: {error}",)


def _traced(model: nn.Module, config: AnyConfig, call: _Call, autocast: bool, cpu: bool) -> tuple[int, int]:
    mode = _OnMeta(cpu)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad(), works.collector_paused():
        warnings.simplefilter("ignore")
        bare, adapted = _copy_on_meta(model).requires_grad_(False), _copy_on_meta(model)
        prepared = _prepared(adapted, config)
        called = _with_prompt(adapted, config) if isinstance(config, PromptLearningConfig) else adapted
        inject.apply(prepared, "explained", autocast=autocast, trainable=not config.inference_mode)
        kept = _kept_by(called, call, mode)
        # The frozen model keeps nothing by itself: to compare, gradients flow into the inputs of both.
        for t in tree_leaves(call):
            if isinstance(t, Tensor) and t.is_floating_point():
                t.requires_grad_()
        for name, table in list(bare.named_modules()):
            if isinstance(walk.unwrapped(table), nn.Embedding):
                table.register_forward_hook(_require_grad)
                adapted.get_submodule(name).register_forward_hook(_require_grad)
        return kept, _kept_by(called, call, mode) - _kept_by(bare, call, mode)


def _with_prompt(model: nn.Module, config: PromptLearningConfig) -> PeftModel:
    """A handle whose prompt has shapes and no start."""
    handle = PeftModel._around(model)
    prompts = handle.base_model.prompts = Prompts(model)
    handle.prompt_encoder = prompts.encoders
    prompt = PROMPTS[config.method].encoder(config.fitted(prompts.host), prompts.host)
    prompts.add("explained", prompt, active=True, trained=not config.inference_mode)
    return handle


def _require_grad(table: nn.Module, args: Any, out: Tensor) -> None:
    out.requires_grad_()


def _copy_on_meta(model: nn.Module) -> nn.Module:
    """A copy in training mode, without checkpointing, that shares nothing with ``model`` and holds no numbers."""

    def without_numbers(t: Tensor) -> Tensor:
        empty = torch.empty_like(t, device="meta", requires_grad=False)
        return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty

    memo: dict[int, Any] = {}
    for module in model.modules():
        storage = storage_of(module)
        if not storage.in_place:
            # What unpacks a weight has to see its numbers: an ordinary layer of the same shape stands in for it.
            memo[id(module)] = _ordinary(module, storage.facts(module)[0])
        for t in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = without_numbers(t)
    copied = copy.deepcopy(model, memo).train()
    for module in copied.modules():
        if "gradient_checkpointing" in module.__dict__:
            module.__dict__["gradient_checkpointing"] = False
    return copied


def _ordinary(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    kind = kind_of(layer)
    assert kind is not None, "packed layers are of a known kind"
    has_bias = layer._parameters.get(kind.bias_name) is not None
    return nn.Linear(*kind.features(layer), bias=has_bias, device="meta", dtype=dtype)


def _kept_by(model: nn.Module, call: _Call, mode: _OnMeta) -> int:
    """Bytes of the distinct storages that one forward keeps for backward, the model's own left out."""
    held: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # what autograd lets go of leaves it

    def pack(t: Tensor) -> Tensor:
        alias = t.detach()
        held[id(alias)] = alias
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda alias: alias), mode:
        out = model(*call[0], **call[1])
    sizes = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in held.values())}
    for t in (*model.parameters(), *model.buffers()):
        sizes.pop(t.untyped_storage()._cdata, None)
    del out  # alive until here, and the graph with it
    return sum(sizes.values())


class _OnMeta(TorchFunctionMode):
    """What a forward has to meet on the meta device for the same to be kept as on the model's own.

    Attention has no fused kernel there and would keep its probabilities. And some forwards ask for values (is there
    padding?), of which there are none: the answer is no.
    """

    def __init__(self, cpu: bool) -> None:
        super().__init__()
        self.cpu = cpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.__bool__, Tensor.__contains__):
            return False
        if func is F.scaled_dot_product_attention:
            func = self._attention
        if func.__name__ == "_grouped_mm":
            return args[0] @ args[1][0]  # on the meta device that of experts is for bf16 only
        return func(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        masked = attn_mask is not None and attn_mask.requires_grad
        if query.dim() != 4 or masked or (self.cpu and dropout_p):  # no fused kernel takes these
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if attn_mask is not None:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=options.get("scale"))[0]
        return out
