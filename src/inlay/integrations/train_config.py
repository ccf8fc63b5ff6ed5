"""The typed tree behind ``inlay train CONFIG.yaml``, and the reading of it.

A section is a frozen dataclass, a limit stands beside the field it limits, and every complaint about a config is
collected and raised at once, before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from inlay.errors import ConfigError, MissingFileError, nearest

TaskName = Literal["causal-lm", "seq2seq", "sequence-classification", "token-classification"]
DTypeName = Literal["float32", "bfloat16", "float16"]

SHORT_LIST = 8
_SIGNS = {">": operator.gt, ">=": operator.ge, "<": operator.lt}


def limited(
    default: Any, *, above: float | None = None, at_least: float | None = None, below: float | None = None
) -> Any:
    """A dataclass field whose number must be ``> above``, ``>= at_least`` and ``< below``, where given."""
    limits = {">": above, ">=": at_least, "<": below}
    return field(default=default, metadata={sign: limit for sign, limit in limits.items() if limit is not None})


@dataclass(frozen=True)
class ModelSection:
    """Which model is adapted."""

    name: str = ""  # a local folder or the id of a model on the hub
    tokenizer: str | None = None  # the tokenizer's folder or id, where it is not the model's
    revision: str | None = None  # branch, tag or commit on the hub
    # What the frozen weights become; "auto": as stored.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class DataSection:
    """Where the examples are, and which columns hold what."""

    path: str = ""  # a .jsonl, .csv, .tsv or .parquet file
    held_out_path: str | None = None  # a second file to evaluate on; without it a part of ``path`` is held out
    held_out_fraction: float = limited(0.2, above=0, below=1)  # how large that part is
    text: str = "text"  # column of the input (or of the whole text of a causal LM)
    text_pair: str | None = None  # column of a second input, for classifying pairs
    target: str | None = None  # column of the answer: seq2seq needs one; a causal LM then learns only that
    label: str = "label"  # column of the class, for sequence classification
    tokens: str = "tokens"  # column of the words, for token classification
    tags: str = "tags"  # column of one class per word, for token classification
    max_length: int = limited(256, at_least=4)  # inputs are cut to so many tokens
    max_target_length: int = limited(64, at_least=2)  # answers are cut to so many tokens
    max_rows: int | None = limited(None, at_least=2)  # use only so many rows of ``path``, drawn with ``training.seed``


@dataclass(frozen=True)
class AdapterSection:
    """The method and its own fields, as its config class takes them (``r``, ``target_modules``, ...)."""

    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingSection:
    """How it is trained."""

    epochs: float = limited(3.0, above=0)  # passes over the training rows
    # Stop after so many optimiser steps; takes precedence over ``epochs``.
    max_steps: int | None = limited(None, at_least=1)
    batch_size: int = limited(16, at_least=1)  # rows per device and step
    held_out_batch_size: int = limited(32, at_least=1)  # rows per device when evaluating
    accumulate: int = limited(1, at_least=1)  # batches per optimiser step
    learning_rate: float = limited(2e-4, above=0)  # the peak
    warmup: float = limited(0.06, at_least=0, below=1)  # share of the steps over which the learning rate rises
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # how it falls afterwards
    weight_decay: float = limited(0.0, at_least=0)  # AdamW's
    clip: float = limited(1.0, above=0)  # largest gradient norm
    precision: DTypeName = "float32"  # the dtype of autocast
    gradient_checkpointing: bool = False  # recompute activations to save memory
    group_by_length: bool = False  # draw batches of similar length, to pad less
    seed: int = limited(0, at_least=0, below=2**32)  # split, initial values, order and dropout
    save_steps: int = limited(100, at_least=1)  # a checkpoint every so many steps
    keep_checkpoints: int = limited(2, at_least=1)  # older ones are deleted
    log_steps: int = limited(10, at_least=1)  # report the loss every so many steps
    evaluate_steps: int | None = limited(None, at_least=1)  # evaluate during training every so many steps


@dataclass(frozen=True)
class TrainConfig:
    """Everything ``inlay train`` needs to know."""

    task: TaskName = "causal-lm"
    output: str = "runs/train"  # the folder that receives everything
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    training: TrainingSection = field(default_factory=TrainingSection)

    def to_dict(self) -> dict[str, Any]:
        """The tree as it would stand in a YAML file; `parse` reads it back."""
        tree = dataclasses.asdict(self)
        adapter = tree["adapter"]
        tree["adapter"] = {"method": adapter["method"], **adapter["options"]}
        return tree


class _Loader(yaml.SafeLoader):
    """YAML whose ``2e-4`` is a number: YAML 1.1 asks for ``2.0e-4`` and silently reads anything shorter as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    """``text`` as plain data, or a `ConfigError`.

    Example:
        >>> read_yaml("2e-4", "--set"), read_yaml("[query, value]", "--set")
        (0.0002, ['query', 'value'])
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a `MissingFileError` or `ConfigError` where there is none."""
    if not path.is_file():
        raise MissingFileError(f"no config file {path}; expected a YAML file, see examples/train.yaml")
    tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected `key: value` lines")
    return cast(dict[str, Any], tree)


def with_settings(tree: Mapping[str, Any], settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """``tree`` with dotted keys set; the given tree stays as it is.

    Example:
        >>> with_settings({"data": {"path": "a"}}, [("data.path", "b"), ("adapter.r", 4)])
        {'data': {'path': 'b'}, 'adapter': {'r': 4}}
    """
    result = dict(tree)
    for key, value in settings:
        head, _, rest = key.partition(".")
        if not rest:
            result[head] = value
            continue
        inner = result.get(head) or {}
        if not isinstance(inner, dict):
            raise ConfigError(f"cannot set {key}: {head} is a {type(inner).__name__}, not a section")
        result[head] = with_settings(inner, [(rest, value)])
    return result


def parse_setting(text: str) -> tuple[str, Any]:
    """One ``--set key=value`` as a dotted key and a YAML value.

    Example:
        >>> parse_setting("adapter.target_modules=[query, value]")
        ('adapter.target_modules', ['query', 'value'])
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"--set {text!r}: expected key=value with a dotted key, as in training.batch_size=8")
    return key.strip(), read_yaml(value, f"--set {key.strip()}")


def parse(tree: Mapping[str, Any]) -> TrainConfig:
    """The typed config for a plain tree.

    Raises:
        ConfigError: With every unknown key, wrong type and number out of range at once.

    Example:
        >>> parse({"training": {"batch_sise": 4}})
        Traceback (most recent call last):
        inlay.errors.ConfigError: training.batch_sise: no such key; closest: batch_size
    """
    complaints: list[str] = []
    config = _section(TrainConfig, _split_adapter(tree), "", complaints)
    raise_all(complaints)
    return cast(TrainConfig, config)


def raise_all(complaints: list[str]) -> None:
    """Raise one ConfigError that lists ``complaints``, if there are any."""
    if len(complaints) == 1:
        raise ConfigError(complaints[0])
    if complaints:
        raise ConfigError(f"{len(complaints)} things to put right:\n" + "\n".join(f"  - {c}" for c in complaints))


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The dotted keys at which two plain trees differ.

    Example:
        >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
        ['b.c']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}".strip("."))]
    return [] if old == new else [where]


def _split_adapter(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``adapter: {method, r, ...}`` as ``{method, options: {r, ...}}``: the options belong to the method's config."""
    adapter = tree.get("adapter")
    if not isinstance(adapter, dict):
        return dict(tree)
    options = {key: value for key, value in adapter.items() if key != "method"}
    return {**tree, "adapter": {"method": adapter.get("method", "lora"), "options": options}}


def _section(cls: type[Any], given: Any, where: str, complaints: list[str]) -> Any:
    if not isinstance(given, dict):
        complaints.append(f"{where}: expected a section of `key: value` lines, found {given!r}")
        return cls()
    hints = typing.get_type_hints(cls)
    limits = {one.name: one.metadata for one in dataclasses.fields(cls)}
    values = {}
    for key, value in given.items():
        path = f"{where}.{key}".lstrip(".")
        if key not in hints:
            known = ", ".join([*hints][:SHORT_LIST]) + (", ..." if len(hints) > SHORT_LIST else "")
            complaints.append(f"{path}: no such key{nearest(str(key), hints) or f'; known: {known}'}")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _section(cast(type[Any], hints[key]), {} if value is None else value, path, complaints)
        else:
            values[key] = float(value) if hints[key] is float and type(value) is int else value
            if fault := _fault(hints[key], limits[key], values[key]):
                complaints.append(f"{path}: {fault}")
    return cls(**values)


def _fault(hint: Any, limits: Mapping[str, Any], value: Any) -> str:
    """Why ``value`` is not of the type ``hint`` and within the limits, or ""."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return "" if value in choices else f"{value!r} is none of {', '.join(choices)}"
    kind: Any = dict if typing.get_origin(hint) is dict else hint
    # bool is an int to Python; `epochs: yes` is a mistake to everyone else.
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("None", "nothing").replace("|", "or")
        return f"expected {wanted}, found {value!r}"
    # NaN compares False with everything and so is out of every range; None is a value of its own.
    within = value is None or all(_SIGNS[sign](value, limit) for sign, limit in limits.items())
    if within and value != math.inf:
        return ""
    return f"{value} is out of range; expected {' and '.join(f'{sign} {limit}' for sign, limit in limits.items())}"
