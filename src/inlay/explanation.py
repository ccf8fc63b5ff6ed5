"""What a config would do to a model, told before anything is touched: `explain`.

The plan and every shape come from `inlay.inject.prepare`, which `get_peft_model` applies, so what is told is what is
done. Activations are measured rather than guessed: a copy of the model on the meta device, which holds no numbers,
is adapted and called, and what autograd keeps for backward is counted by storage.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from inlay.config import AdapterConfig, TaskType
from inlay.errors import ConfigError, PeftError, PlanError, nearest
from inlay.inject import (
    _NARROW,
    Prepared,
    TokenWork,
    Work,
    _unwrapped,
    apply,
    collector_paused,
    copy_config,
    prepare,
)
from inlay.layers import LayerKind, kind_of
from inlay.match import ParameterTarget, Skip
from inlay.model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from inlay.state import EMBEDDING_NAMES, embedding_weights
from inlay.storage import storage_of

Role = Literal["adapter", "saved", "tokens", "bias"]
Method = Literal["traced", "estimated"]
Moved = TypeVar("Moved", bound=nn.Module)

_TRACED_NAME = "explained"
_SHOWN = 5


class _Spec(NamedTuple):
    """One tensor that training adds to or changes in a model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def _two_states(t: _Spec) -> int:
    return 2 * t.nbytes


def _no_state(t: _Spec) -> int:
    return 0


def _factored_state(t: _Spec) -> int:
    if len(t.shape) < 2:
        return t.nbytes
    return (t.numel // t.shape[-1] + t.numel // t.shape[-2]) * t.dtype.itemsize


# Bytes that an optimiser keeps for one trained tensor.
OPTIMIZERS: dict[str, Callable[[_Spec], int]] = {
    "adamw": _two_states,
    "adam": _two_states,
    "sgd": _no_state,
    "adafactor": _factored_state,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is trained.

    Args:
        name (`str`): The module (or parameter) in the model as it is now.
        role (`str`): ``"adapter"``, ``"saved"`` (trained whole), ``"tokens"`` or ``"bias"``.
        kind (`str`): The kind of layer.
        shape (`tuple[int, ...]`): The adapted weight's (out, in), with experts first; the tensor's own for a bias.
        pattern (`str`): The entry of the config that named it; "" where none did.
        reason (`str`): Why it is here.
        values (`dict`): What the config gives it after patterns: ``{"r": 16, "lora_alpha": 32}``.
        parameters (`int`): Trainable parameters.
        nbytes (`int`): Bytes that it adds to the model.
    """

    name: str
    role: Role
    kind: str
    shape: tuple[int, ...]
    pattern: str
    reason: str
    values: Mapping[str, Any]
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the model; bytes unless said otherwise.

    Args:
        trainable (`int`): Trainable parameters, as `PeftModel.get_nb_trainable_parameters` will count them.
        parameters (`int`): All parameters, likewise.
        frozen_bytes (`int`): The model as it is, buffers included.
        adapter_bytes (`int`): What is added to it: adapters, copies of modules, rows of tokens.
        gradient_bytes (`int`): Gradients of what is trained.
        optimizer_bytes (`int`): The optimiser's states.
        file_bytes (`int`): Tensors in ``adapter_model.safetensors``; the file's header comes on top.
        activation_bytes (`int`, *optional*): What one forward keeps for backward, the loss not included.
        added_activation_bytes (`int`, *optional*): What the adapted model keeps above the frozen one where gradients
            pass through both, which in training is everywhere behind the first adapted layer.
    """

    trainable: int = 0
    parameters: int = 0
    frozen_bytes: int = 0
    adapter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    file_bytes: int = 0
    activation_bytes: int | None = None
    added_activation_bytes: int | None = None

    @property
    def training_bytes(self) -> int:
        """All memory of a training step that is known: everything but the file."""
        known = (self.frozen_bytes, self.adapter_bytes, self.gradient_bytes, self.optimizer_bytes)
        return sum(known) + (self.activation_bytes or self.added_activation_bytes or 0)


@dataclass(frozen=True)
class Explanation:
    """A plan, readable with ``print``.

    Args:
        title (`str`): Method and model.
        error (`PeftError`, *optional*): What `get_peft_model` would raise; then nothing else is known.
        rows (`tuple[Row, ...]`): Everything that is trained, in the order of the model.
        modules (`int`): How many modules the model has.
        patterns (`dict[str, int]`): How many modules or parameters each entry of the config names, before any is left
            out.
        unmatched (`tuple[tuple[str, str], ...]`): Entries that name nothing, each with a hint such as
            ``"; closest: q_proj"``.
        skipped (`tuple[Skip, ...]`): What an entry names and the plan leaves alone: ``name`` and ``reason``.
        warnings (`tuple[str, ...]`): What looks like a mistake.
        totals (`Totals`): Parameters and bytes.
        optimizer (`str`): Whose states `totals` counts.
        activations_method (`str`, *optional*): ``"traced"`` (counted in a forward on the meta device), ``"estimated"``
            (from the layers' shapes) or `None` (not known).
        notes (`tuple[str, ...]`): How the activations were come by.
    """

    title: str
    error: PeftError | None = None
    rows: tuple[Row, ...] = ()
    modules: int = 0
    patterns: Mapping[str, int] = field(default_factory=dict)
    unmatched: tuple[tuple[str, str], ...] = ()
    skipped: tuple[Skip, ...] = ()
    warnings: tuple[str, ...] = ()
    totals: Totals = field(default_factory=Totals)
    optimizer: str = "adamw"
    activations_method: Method | None = None
    notes: tuple[str, ...] = ()

    def table(self) -> list[dict[str, Any]]:
        """One plain dict for each of ``rows``."""
        return [{**dataclasses.asdict(row), "shape": list(row.shape)} for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Everything as values that JSON can hold; the error as its name and message."""
        error = None if self.error is None else {"type": type(self.error).__name__, "message": str(self.error)}
        return {
            "title": self.title,
            "error": error,
            "rows": self.table(),
            "modules": self.modules,
            "patterns": dict(self.patterns),
            "unmatched": [{"pattern": pattern, "hint": hint} for pattern, hint in self.unmatched],
            "skipped": [{"name": skip.name, "reason": skip.reason} for skip in self.skipped],
            "warnings": list(self.warnings),
            "totals": dataclasses.asdict(self.totals),
            "optimizer": self.optimizer,
            "activations_method": self.activations_method,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.title}: not possible\n  {type(self.error).__name__}: {self.error}"
        lines = [f"{self.title}: {self.modules:,} modules"]
        lines += _groups(self.rows)
        lines += _bulleted("warning", self.warnings)
        lines += _bulleted("left out", _skips(self.skipped))
        lines += _totals(self)
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


# ---------------------------------------------------------------------- as text


def _groups(rows: Iterable[Row]) -> list[str]:
    """One line for all rows that differ in nothing but where they stand."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.role, _leaf(row.name), row.kind, row.shape, row.reason, tuple(row.values.items()))
        grouped.setdefault(key, []).append(row)
    cells = [
        (
            f"{len(same):,} x",
            same[0].name if len(same) == 1 else leaf,
            kind + ("" if not shape else " " + "x".join(map(str, shape))),
            " ".join(f"{k.removeprefix('lora_')}={v}" for k, v in values),
            f"{sum(row.parameters for row in same):,}",
            reason,
        )
        for (_, leaf, kind, shape, reason, values), same in grouped.items()
    ]
    widths = [max((len(cell[i]) for cell in cells), default=0) for i in range(5)]
    right = (0, 4)
    return [
        "  "
        + "  ".join(
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(cell, widths, strict=False))
            if width
        )
        + f"  {cell[5]}"
        for cell in cells
    ]


def _leaf(name: str) -> str:
    """The end of a name from its last part that is no number.

    Example:
        >>> _leaf("layers.0.q_proj"), _leaf("layers.0.mlp.2")
        ('q_proj', 'mlp.2')
    """
    parts = name.split(".")
    start = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdecimal()), 0)
    return ".".join(parts[start:])


def _skips(skipped: Iterable[Skip]) -> list[str]:
    grouped: dict[tuple[str, str], list[str]] = {}
    for skip in skipped:
        grouped.setdefault((_leaf(skip.name), skip.reason), []).append(skip.name)
    return [f"{n[0] if len(n) == 1 else f'{len(n):,} x {leaf}'}: {why}" for (leaf, why), n in grouped.items()]


def _bulleted(head: str, texts: Iterable[str]) -> list[str]:
    texts = list(texts)
    more = [f"  {head}: {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return [f"  {head}: {text}" for text in texts[:_SHOWN]] + more


def _totals(explanation: Explanation) -> list[str]:
    t = explanation.totals
    share = 100 * t.trainable / t.parameters if t.parameters else 0.0
    rows = [
        ("frozen model", t.frozen_bytes),
        ("adapter", t.adapter_bytes),
        ("gradients", t.gradient_bytes),
        (f"optimiser ({explanation.optimizer})", t.optimizer_bytes),
    ]
    if t.activation_bytes is not None and t.added_activation_bytes is not None:
        rows.append(("activations, frozen model", max(0, t.activation_bytes - t.added_activation_bytes)))
    if t.added_activation_bytes is not None:
        rows.append(("activations, adapter", min(t.added_activation_bytes, t.activation_bytes or sys.maxsize)))
    rows += [("in training", t.training_bytes), ("file", t.file_bytes)]
    width = max(len(label) for label, _ in rows)
    return [
        f"  trainable: {t.trainable:,} of {t.parameters:,} parameters ({share:.4g} %)",
        *(f"  {label.ljust(width)}  {_size(n):>8}" for label, n in rows),
    ]


def _size(n: int) -> str:
    """Bytes with three digits and a decimal unit.

    Example:
        >>> _size(512), _size(16_777_216)
        ('512 B', '16.8 MB')
    """
    size, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{n} B" if unit == "B" else f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f} {unit}"


# ---------------------------------------------------------------------- explain


def explain(
    model: nn.Module,
    config: AdapterConfig,
    *,
    batch: int | None = None,
    tokens: int | None = None,
    optimizer: str = "adamw",
    example: Any = None,
    autocast_adapter_dtype: bool = True,
) -> Explanation:
    """Tells what ``get_peft_model(model, config)`` would do, and changes nothing.

    Args:
        model (`nn.Module`): The model, on any device; on the meta device it needs no memory.
        config (`AdapterConfig`): What to put into it, such as a `LoraConfig`.
        batch (`int`, *optional*): Rows of a training batch: with it, activations are told too.
        tokens (`int`, *optional*): Length of each row, for models that read sequences.
        optimizer (`str`, *optional*, defaults to `"adamw"`): ``"adamw"``, ``"adam"``, ``"sgd"`` (without momentum) or
            ``"adafactor"``.
        example (`Any`, *optional*): An input instead of ``batch`` and ``tokens``, where these do not tell what the
            model reads: a tensor, a tuple of positional arguments, a dict of keywords, or ``(tuple, dict)``. Only
            shapes and dtypes count. With labels in it, the loss is counted too.
        autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): As for `get_peft_model`.

    Returns:
        `Explanation`: ``print`` it. What `get_peft_model` would raise about the plan is its ``error``.

    Raises:
        ConfigError: An argument is of the wrong type or out of range.

    Example:
        >>> from inlay import LoraConfig
        >>> with torch.device("meta"):
        ...     mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> told = explain(mlp, LoraConfig(target_modules=["0", "2"]), batch=32)
        >>> told.totals.trainable, told.totals.added_activation_bytes
        (1616, 8192)
    """
    _check(model, config, batch, tokens, optimizer)
    _split(() if example is None else example)
    title = f"{getattr(config.peft_type, 'value', config.peft_type)} on {type(model).__name__}"
    config = copy_config(config)
    try:
        if isinstance(model, PeftModel):
            raise PlanError("The model is a PeftModel already: explain what its get_base_model() gives.")
        _add_heads(model, config)
        with collector_paused():
            prepared = prepare(model, config)
            rows, tensors = _rows(prepared, autocast_adapter_dtype)
    except (PlanError, ConfigError) as error:
        return Explanation(title, error.with_traceback(None), optimizer=optimizer)
    plan = prepared.plan
    kept = _activations(model, config, prepared, batch, tokens, example, autocast_adapter_dtype)
    return Explanation(
        title=title,
        rows=tuple(rows),
        modules=len(prepared.survey.facts),
        patterns=plan.matched,
        unmatched=plan.unmatched,
        skipped=plan.skipped,
        warnings=plan.warnings,
        totals=_sums(prepared, tensors, optimizer, kept),
        optimizer=optimizer,
        activations_method=kept.method,
        notes=kept.notes,
    )


def _check(model: Any, config: Any, batch: Any, tokens: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"config must be a method's config, such as LoraConfig, got {type(config).__name__}.")
    for name, value in (("batch", batch), ("tokens", tokens)):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} must be a positive int, got {value!r}.")
    if tokens is not None and batch is None:
        raise ConfigError(f"tokens={tokens} is the length of each row and needs batch=, the number of rows.")
    if optimizer not in OPTIMIZERS:
        hint = nearest(optimizer, OPTIMIZERS) if isinstance(optimizer, str) else ""
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}{hint}.")


def _add_heads(model: nn.Module, config: AdapterConfig) -> None:
    """The handle of a task trains fresh heads beside the adapter: the same rule, on a copy of the config."""
    task = config.task_type
    handle = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task.value if isinstance(task, TaskType) else "", PeftModel)
    listed = list(config.modules_to_save or ())
    if new := [n for n in handle.heads if n in model._modules and n not in listed]:
        config.modules_to_save = listed + new


# ---------------------------------------------------------------------- rows and sums


class _Tensors(NamedTuple):
    """What training deals with, beside the frozen model."""

    added: list[_Spec]  # parameters that come on top of the model's
    changed: list[_Spec]  # the model's own, trained in place
    buffers: int  # bytes of copied buffers
    filed: int  # bytes of tensors in the file


def _rows(prepared: Prepared, autocast: bool) -> tuple[list[Row], _Tensors]:
    trained = not prepared.config.inference_mode
    rows: list[Row] = []
    added: list[_Spec] = []
    changed: list[_Spec] = []
    buffers = filed = 0
    parameters = {(t.module, t.parameter): t for t in prepared.plan.parameters}
    for work in prepared.works:
        specs = _slots(work, autocast, trained)
        rows.append(_adapter_row(work, specs, prepared.config, parameters))
        added += specs
    for tokens in prepared.tokens:
        specs = _slots(tokens, autocast, trained) if tokens.source is None else []
        rows.append(_token_row(tokens, specs))
        added += specs
    filed += _nbytes(added)
    entries = dict(prepared.plan.saved)
    for path in prepared.saved:
        original = _original(prepared, path)
        specs = [_spec(p, trained and p.is_floating_point()) for p in original.parameters()]
        copied = sum(b.nbytes for b in original.buffers())
        rows.append(_saved_row(path, original, specs, copied, entries[path]))
        added += specs
        buffers += copied
        filed += sum(t.nbytes for t in original.state_dict().values() if isinstance(t, Tensor))
    for name, bias in _biases(prepared):
        rows.append(_bias_row(name, bias, prepared.config.bias, trained))
        changed.append(_spec(bias, trained))
        filed += bias.nbytes
    return rows, _Tensors(added, changed, buffers, filed + _filed_embeddings(prepared))


def _spec(t: Tensor, trained: bool) -> _Spec:
    return _Spec(tuple(t.shape), t.dtype, trained)


def _slots(work: Work | TokenWork, autocast: bool, trained: bool) -> list[_Spec]:
    layer = _unwrapped(getattr(work.parent, work.attribute))
    dtype, _ = storage_of(layer).facts(layer, work.kind.weight_name)
    if autocast and dtype in _NARROW:
        dtype = torch.float32
    return [_Spec(slot.shape, dtype, trained and slot.trainable) for slot in work.adapter.slots.values()]


def _trainable(specs: Iterable[_Spec]) -> int:
    return sum(spec.numel for spec in specs if spec.trained)


def _matrix_shape(kind: LayerKind, layer: nn.Module) -> tuple[int, ...]:
    experts = kind.experts(layer)
    return ((experts,) if experts > 1 else ()) + kind.shape(layer)


def _adapter_row(
    work: Work,
    specs: list[_Spec],
    config: AdapterConfig,
    parameters: Mapping[tuple[str, str], ParameterTarget],
) -> Row:
    layer = _unwrapped(work.base)
    if work.target is None:
        module, parameter = work.path, work.kind.weight_name
        while (module, parameter) not in parameters:
            module = module.removesuffix(".base_layer")
        name, pattern = f"{module}.{parameter}", parameters[module, parameter].pattern
        reason = f"{'named' if pattern == name else f'ends with {pattern!r}'} in target_parameters"
    else:
        name, pattern, reason = work.target.name, work.target.pattern, work.target.reason
        if work.nested:
            name, reason = f"{name}.{work.attribute}", "part of the attention around it, which is a target"
    values = {key: getattr(work.adapter, key) for key in type(config).patterned}
    shape = _matrix_shape(work.kind, layer)
    return Row(name, "adapter", work.kind.name, shape, pattern, reason, values, _trainable(specs), _nbytes(specs))


def _nbytes(specs: Iterable[_Spec]) -> int:
    return sum(spec.nbytes for spec in specs)


def _token_row(work: TokenWork, specs: list[_Spec]) -> Row:
    layer = _unwrapped(getattr(work.parent, work.attribute))
    count = len(work.adapter.tokens)
    reason = f"{count} tokens in trainable_token_indices"
    if work.source is not None:
        reason = f"tied to {work.source!r}, whose tokens it uses"
    shape = work.kind.shape(layer)
    return Row(work.path, "tokens", work.kind.name, shape, "", reason, {}, _trainable(specs), _nbytes(specs))


def _saved_row(path: str, module: nn.Module, specs: list[_Spec], copied: int, entry: str) -> Row:
    kind = kind_of(module)
    shape = () if kind is None else _matrix_shape(kind, module)
    reason = f"trained whole: {'named' if entry == path else f'ends with {entry!r}'} in modules_to_save"
    name = type(module).__name__ if kind is None else kind.name
    return Row(path, "saved", name, shape, entry, reason, {}, _trainable(specs), _nbytes(specs) + copied)


def _bias_row(name: str, bias: Tensor, rule: str, trained: bool) -> Row:
    count = bias.numel() if trained else 0
    return Row(name, "bias", "Parameter", tuple(bias.shape), "", f"bias={rule!r}", {}, count, 0)


def _original(prepared: Prepared, path: str) -> nn.Module:
    module: nn.Module = prepared.survey.modules[path]
    original = module._modules.get("original_module")
    return module if original is None else original


def _biases(prepared: Prepared) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own biases that will be trained; `inject.biases` says the same of an adapted model."""
    if prepared.config.bias == "none":
        return
    model = prepared.survey.model
    adapted = {id(_unwrapped(work.base)) for work in prepared.works}
    for name, parameter in model.named_parameters():
        if not name.endswith(".bias") or ".lora_B." in name:
            continue
        if prepared.config.bias == "all" or id(model.get_submodule(name.removesuffix(".bias"))) in adapted:
            yield name, parameter


def _filed_embeddings(prepared: Prepared) -> int:
    """Bytes of the embeddings' own weights, which files hold too where an embedding is adapted."""
    if prepared.config.trainable_token_indices is not None:
        return 0
    adapted = tuple(f"{work.path}." for work in prepared.works if work.path.rpartition(".")[2] in EMBEDDING_NAMES)
    weights = embedding_weights(prepared.survey.model)
    return sum(W.nbytes for name, W in weights if name.startswith(adapted)) if adapted else 0


def _sums(prepared: Prepared, tensors: _Tensors, optimizer: str, kept: _Kept) -> Totals:
    model = prepared.survey.model
    own = {id(p): p for p in model.parameters()}
    trained = [spec for spec in (*tensors.added, *tensors.changed) if spec.trained]
    trained += [_spec(p, True) for p in _still_trained(prepared)]
    return Totals(
        trainable=_trainable(trained),
        parameters=sum(map(_count, own.values())) + sum(spec.numel for spec in tensors.added),
        frozen_bytes=sum(p.nbytes for p in own.values()) + sum(b.nbytes for b in model.buffers()),
        adapter_bytes=_nbytes(tensors.added) + tensors.buffers,
        gradient_bytes=_nbytes(trained),
        optimizer_bytes=sum(map(OPTIMIZERS[optimizer], trained)),
        file_bytes=tensors.filed,
        activation_bytes=kept.total,
        added_activation_bytes=kept.added,
    )


def _count(parameter: Tensor) -> int:
    """As `PeftModel.get_nb_trainable_parameters` counts: a packed 4-bit parameter as the weights it stands for."""
    n = parameter.numel() or int(getattr(parameter, "ds_numel", 0))
    return n * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else n


def _still_trained(prepared: Prepared) -> list[nn.Parameter]:
    """What is trained now and will be afterwards; a model without adapters is frozen as a whole."""
    if prepared.survey.router is None:
        return []
    changed = {id(bias) for _, bias in _biases(prepared)}
    return [p for p in prepared.survey.model.parameters() if p.requires_grad and id(p) not in changed]


# ---------------------------------------------------------------------- activations


class _Kept(NamedTuple):
    """Bytes that one forward keeps for backward: all, and those that are there for the adapter."""

    total: int | None = None
    added: int | None = None
    method: Method | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Inputs:
    """What the model is called with, on the meta device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def floats(self) -> list[Tensor]:
        leaves = tree_leaves((self.args, self.kwargs))
        return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


class _NoInputError(Exception):
    """What the model reads cannot be told from it."""


def _activations(
    model: nn.Module,
    config: AdapterConfig,
    prepared: Prepared,
    batch: int | None,
    tokens: int | None,
    example: Any,
    autocast: bool,
) -> _Kept:
    if batch is None and example is None:
        return _Kept()
    try:
        inputs = _inputs(model, batch, tokens, example)
        total, added, notes = _traced(model, config, inputs, autocast)
    except _NoInputError as error:
        return _estimated(prepared, batch, tokens, str(error))
    except Exception as error:  # whatever someone's forward does on the meta device
        return _estimated(prepared, batch, tokens, f"its forward cannot be traced ({type(error).__name__}: {error})")
    return _Kept(total, added, "traced", notes)


def _inputs(model: nn.Module, batch: int | None, tokens: int | None, example: Any) -> _Inputs:
    """The example, or what the first layer and the model's config say."""
    if example is not None:
        args, kwargs = _split(example)
        return _Inputs(*tree_map(lambda t: t.detach().to("meta") if isinstance(t, Tensor) else t, (args, kwargs)))
    assert batch is not None
    first = next(((m, k) for m in model.modules() if (k := kind_of(_unwrapped(m))) is not None), None)
    name = getattr(model, "main_input_name", None)
    settings = getattr(model, "config", None)
    if name == "pixel_values":
        return _Inputs((), {name: _image(model, settings, batch)})
    if name == "input_ids" or (first is not None and first[1].indexed):
        if tokens is None:
            raise _NoInputError("it reads tokens: give tokens= too")
        ids = torch.empty(batch, tokens, dtype=torch.long, device="meta")
        if name is None:
            return _Inputs((ids,), {})
        decoder = {"decoder_input_ids": ids} if getattr(settings, "is_encoder_decoder", False) else {}
        return _Inputs((), {name: ids, **decoder})
    if first is None or first[1].name != "Linear":
        raise _NoInputError("what it reads cannot be told from its layers: give example=")
    layer = _unwrapped(first[0])
    rows = (batch,) if tokens is None else (batch, tokens)
    dtype, _ = storage_of(layer).facts(layer)
    return _Inputs((torch.empty(*rows, first[1].shape(layer)[1], dtype=dtype, device="meta"),), {})


def _split(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple | list):
        if len(example) == 2 and isinstance(example[0], tuple | list) and isinstance(example[1], Mapping):
            return tuple(example[0]), dict(example[1])
        return tuple(example), {}
    raise ConfigError(f"example must be a tensor, a tuple, a dict or (tuple, dict), got {type(example).__name__}.")


def _image(model: nn.Module, settings: Any, batch: int) -> Tensor:
    size, channels = getattr(settings, "image_size", None), getattr(settings, "num_channels", None)
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple | list) or not isinstance(channels, int):
        raise _NoInputError("its config does not tell the size of images: give example=")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty(batch, channels, *sides, dtype=dtype, device="meta")


def _traced(
    model: nn.Module, config: AdapterConfig, inputs: _Inputs, autocast: bool
) -> tuple[int, int, tuple[str, ...]]:
    """Bytes kept by the adapted model, bytes of them above the frozen model, and remarks.

    The frozen model keeps nothing by itself. Both are therefore compared with gradients flowing into their inputs.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        bare, adapted = _on_meta(model), _on_meta(model)
        notes = _without_checkpointing(bare, adapted)
        if "labels" not in inputs.kwargs:
            notes += ("activations are those of the forward, without a loss",)
        tables = _tables(bare, inputs)
        bare.requires_grad_(False)
        prepared = prepare(adapted, copy_config(config))
        apply(prepared, _TRACED_NAME, autocast=autocast, trainable=not config.inference_mode)
        device = next((p.device.type for p in model.parameters()), "meta")
        total = _kept_by(adapted, inputs, device)
        grown = _kept_by(adapted, inputs, device, tables) - _kept_by(bare, inputs, device, tables)
    return total, grown, notes


def _on_meta(model: Moved) -> Moved:
    """A copy in training mode that shares nothing with ``model`` and holds no numbers."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(t, Tensor) and id(t) not in memo:
                empty = torch.empty_like(t, device="meta", requires_grad=False)
                memo[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
    with collector_paused():
        return copy.deepcopy(model, memo).train()


def _without_checkpointing(*models: nn.Module) -> tuple[str, ...]:
    on = [m for model in models for m in model.modules() if m.__dict__.get("gradient_checkpointing")]
    for module in on:
        module.__dict__["gradient_checkpointing"] = False
    return ("gradient checkpointing is on, and activations are told without it",) if on else ()


def _tables(model: nn.Module, inputs: _Inputs) -> list[str]:
    """Names of the embeddings that the input enters by, where it enters by no float."""
    if inputs.floats():
        return []
    found = {name: m for name, m in model.named_modules() if isinstance(_unwrapped(m), nn.Embedding)}
    get = getattr(model, "get_input_embeddings", None)
    first = get() if callable(get) else next(iter(found.values()), None)
    if first is None:
        return []
    W = _unwrapped(first)._parameters.get("weight")
    return [name for name, m in found.items() if _unwrapped(m)._parameters.get("weight") is W]


class _Held:
    """What autograd holds in place of a saved tensor; gone when autograd lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _kept_by(model: nn.Module, inputs: _Inputs, device: str, tables: list[str] | None = None) -> int:
    """Bytes of the distinct storages that one forward keeps, the model's own left out.

    Args:
        model (`nn.Module`): On the meta device.
        inputs (`_Inputs`): What to call it with.
        device (`str`): Where the real model runs.
        tables (`list[str]`, *optional*): Let gradients flow into the inputs: into those floats, or the outputs of
            these embeddings.
    """
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        one = _Held(tensor)
        held.add(one)
        return one

    into = tables is not None
    hooks = [model.get_submodule(name).register_forward_hook(_require_grad) for name in tables or ()]
    for t in inputs.floats():
        t.requires_grad_(into)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor), _OnMeta(device):
            out = model(*inputs.args, **inputs.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {s._cdata: s.nbytes() for s in (one.tensor.untyped_storage() for one in held)}
    for t in (*model.parameters(), *model.buffers()):
        sizes.pop(t.untyped_storage()._cdata, None)
    del out  # alive until here, and the graph with it
    return sum(sizes.values())


def _require_grad(module: nn.Module, args: Any, out: Tensor) -> None:
    if not out.requires_grad:
        out.requires_grad_()


class _OnMeta(TorchFunctionMode):
    """What a forward has to meet on the meta device for the same to be kept as on ``device``.

    Attention has no fused kernel there and would keep its probabilities. And some forwards ask for values (is there
    padding?), of which there are none: the answer is no.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.cpu = device == "cpu"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.__bool__, Tensor.__contains__) and args[0].is_meta:
            return False
        if func is F.scaled_dot_product_attention and args and args[0].is_meta:
            return self._attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        masked = attn_mask is not None and attn_mask.requires_grad
        if query.dim() != 4 or masked or (self.cpu and dropout_p):  # no fused kernel takes these
            options = {"scale": scale, "enable_gqa": enable_gqa}
            whole: Tensor = func(query, key, value, attn_mask, dropout_p, is_causal, **options)
            return whole
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out


def _estimated(prepared: Prepared, batch: int | None, tokens: int | None, why: str) -> _Kept:
    """From the shapes of linear layers: an input once for all that stand side by side, dropout's bits, DoRA's sums."""
    first = f"activations are not traced: {why}"
    if batch is None:
        return _Kept(notes=(first,))
    rows = batch * (tokens or 1)
    inputs: dict[tuple[str, int], int] = {}
    own = left_out = 0
    for work in prepared.works:
        if not work.kind.matrix:
            left_out += 1
            continue
        layer = _unwrapped(work.base)
        n_out, n_in = work.kind.shape(layer)
        itemsize = storage_of(layer).facts(layer, work.kind.weight_name)[0].itemsize
        inputs[work.path.rpartition(".")[0], n_in] = rows * n_in * itemsize
        own += 8 * math.ceil(rows * n_in / 64) if work.adapter.dropout else 0
        own += rows * n_out * itemsize if work.adapter.from_base else 0
    if left_out == len(prepared.works):
        return _Kept(notes=(first,))
    rest = [f"{left_out:,} layers that are not linear are left out of the activations"] if left_out else []
    kinds = Counter(work.kind.name for work in prepared.works if work.kind.matrix)
    told = f"the adapter's are estimated from the shapes of {kinds.total():,} linear layers"
    return _Kept(None, sum(inputs.values()) + own, "estimated", (first, told, *rest))
