"""Base models and tokenizers of transformers for a task, with weights or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from inlay.errors import ConfigError
from inlay.integrations.tasks import TASKS
from inlay.integrations.train_config import ModelSection

HEADS = ("classifier", "score")  # a classifying handle brings these along by itself


def load_tokenizer(model: ModelSection) -> Any:
    """The tokenizer of a model, with a padding token, or a `ConfigError`."""
    name = model.tokenizer or model.name
    with _told(f"no tokenizer at {name!r}", "; set model.tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=model.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"the tokenizer at {name!r} has neither a padding token nor an end-of-text token; add one to it"
        )
    return tokenizer


def load_model_config(model: ModelSection, labels: Sequence[str] = ()) -> Any:
    """The transformers config of a model, with the names of the classes where there are any, or a `ConfigError`."""
    options: dict[str, Any] = {}
    if labels:
        options = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with _told(f"no model at {model.name!r} (model.name)"):
        return transformers.AutoConfig.from_pretrained(model.name, revision=model.revision, **options)


@dataclass(frozen=True)
class Base:
    """A pretrained model, and what of it is not pretrained."""

    model: Any  # on the CPU or the meta device, in evaluation mode
    # Modules that the checkpoint has no weights for, such as a new head: they start at random, and an adapter that
    # does not bring them along is worthless.
    new: list[str]
    seen: bool = True  # whether there was a checkpoint to tell them by


def load_base(
    model: ModelSection, task: str | None, labels: Sequence[str] = (), pad_token_id: int | None = None
) -> Base:
    """A pretrained model for a task of `tasks.TASKS`; without one, of the class that it was saved as.

    The classes decide the head's size. A padding token is set where the model has none: batches of unequal rows need
    one. A `ConfigError` says that there is no such model, or no head for this task.
    """
    config = load_model_config(model, labels)
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    with _told(f"model {model.name!r} cannot be loaded for {task}"):
        return _pretrained(model, task, config)


def _pretrained(model: ModelSection, task: str | None, config: Any, **options: Any) -> Base:
    auto = _auto_class(task, config)
    options |= {"config": config, "revision": model.revision, "dtype": _dtype(model)}
    loaded, info = auto.from_pretrained(model.name, output_loading_info=True, **options)
    return Base(loaded, sorted({key.rpartition(".")[0] for key in info["missing_keys"]} - {""}))


def _dtype(model: ModelSection) -> Any:
    return model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)


def save_with(config: Any, new: Sequence[str]) -> None:
    """Have an adapter bring along the new modules too: those its config does not name go into ``modules_to_save``."""
    named = list(config.modules_to_save or [])
    covered = {*named, *HEADS}
    more = [name for name in new if covered.isdisjoint(name.split(".")) and name not in covered]
    if more:
        config.modules_to_save = [*named, *more]


def empty_base(model: ModelSection, task: str | None, labels: Sequence[str] = ()) -> Base:
    """The same model on the meta device: every shape, no weights, no memory.

    Of a checkpoint on this machine the names of its tensors are read, for what it lacks; none is fetched.
    """
    config = load_model_config(model, labels)
    with suppress(OSError, ValueError):
        return _pretrained(model, task, config, device_map="meta", local_files_only=True)
    auto = _auto_class(task, config)
    build = auto.from_config if auto.__name__.startswith("Auto") else auto._from_config
    dtype = config.dtype if model.dtype == "auto" else _dtype(model)
    with _told(f"model {model.name!r} cannot be built for {task}"), torch.device("meta"):
        return Base(build(config, dtype=dtype or torch.float32), [], seen=False)


def _auto_class(task: str | None, config: Any) -> Any:
    if task is not None:
        return getattr(transformers, TASKS[task].auto_class)
    return getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)


@contextmanager
def _told(what: str, cure: str = "") -> Iterator[None]:
    """Makes a `ConfigError` of what transformers raises inside, and of the first line that it says."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{what}: {why}{cure}") from error
