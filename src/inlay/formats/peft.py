"""The names of PEFT's files: which live parameter is which key. Strings in, strings out; no torch, no file is touched.

On disk a general method's key is ``base_model.model.<module path>.<slot>[.<rest>]``. The live name has the adapter's
name behind the slot: ``q_proj.lora_A.default.weight`` is stored as ``q_proj.lora_A.weight``, ``hada_w1_a.default`` as
``hada_w1_a``. The adapter's name is in no file; it is a directory, unless it is "default".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from inlay.errors import AdapterNameError, LoadError
from inlay.report import LoadReport

PREFIX = "base_model.model."
DEFAULT_ADAPTER = "default"

# Prefixes that wrappers put before every name of the model they hold; files saved through one of them carry it.
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.")
# DoRA's magnitude is a module with a weight in memory and a bare tensor on disk.
_BARE_ON_DISK = frozenset({"lora_magnitude_vector"})

T = TypeVar("T")


def to_disk(live_name: str, adapter: str, slots: Collection[str]) -> str:
    """The key under which a live parameter is stored.

    The adapter's name is taken out where it stands behind a slot, or behind ``modules_to_save``, and nowhere else: a
    module may have the same name as an adapter.

    Args:
        live_name (`str`): As in ``named_parameters()``.
        adapter (`str`): The adapter's name.
        slots (`Collection[str]`): Names of the method's slots, such as ``{"lora_A", "lora_B"}``.

    Example:
        >>> to_disk("base_model.model.0.lora_A.0.weight", "0", {"lora_A"})
        'base_model.model.0.lora_A.weight'
        >>> to_disk("base_model.model.score.modules_to_save.default.weight", "default", {"lora_A"})
        'base_model.model.score.weight'
    """
    parts = live_name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if parts[i] != adapter:
            continue
        before, slot, rest = parts[: i - 1], parts[i - 1], parts[i + 1 :]
        if slot == "modules_to_save":
            return ".".join(before + rest)
        if slot in slots:
            return ".".join([*before, slot, *([] if slot in _BARE_ON_DISK else rest)])
    return live_name


def from_disk(key: str, adapter: str, slots: Collection[str]) -> str:
    """The live name of a stored key: :func:`to_disk` turned round, except for whole modules, whose keys name no slot.

    Args:
        key (`str`): As in the file.
        adapter (`str`): The adapter's name.
        slots (`Collection[str]`): Names of the method's slots.

    Example:
        >>> from_disk("m.q.lora_A.weight", "a", {"lora_A"})
        'm.q.lora_A.a.weight'
        >>> from_disk("m.q.lora_magnitude_vector", "a", {"lora_magnitude_vector"})
        'm.q.lora_magnitude_vector.a.weight'
        >>> from_disk("m.q.base_layer.bias", "a", {"lora_A"})
        'm.q.base_layer.bias'
    """
    parts = key.split(".")
    for i in range(len(parts) - 1, -1, -1):
        if parts[i] in slots:
            rest = ["weight"] if parts[i] in _BARE_ON_DISK else parts[i + 1 :]
            return ".".join([*parts[: i + 1], adapter, *rest])
    return key


def strip_prefix(tensors: Mapping[str, T], shared: Collection[str] = ()) -> dict[str, T]:
    """The entries under names that start at the user's model, with or without ``base_model.model.`` in the file.

    Args:
        tensors (`dict[str, T]`): By key.
        shared (`Collection[str]`, *optional*): First components that the method stores directly under ``base_model.``,
            such as ``{"vera_A"}``; these keys stay whole.

    Raises:
        LoadError: Some keys have the prefix and others have not, or another one is before it. ``report.unexpected``
            has them.

    Example:
        >>> strip_prefix({"base_model.model.fc.lora_A.weight": 1})
        {'fc.lora_A.weight': 1}
        >>> strip_prefix({"fc.lora_A.weight": 1})
        {'fc.lora_A.weight': 1}
    """
    heads = tuple(f"base_model.{name}" for name in shared)
    kept = {key for key in tensors if key in heads or key.startswith(tuple(f"{head}." for head in heads))}
    others = [key for key in tensors if key not in kept]
    wrapped = [key for key in others if _is_wrapped(key)]
    if wrapped:
        raise LoadError(
            f"{len(wrapped)} keys, as {wrapped[0]!r}, begin with a wrapper's prefix and not with {PREFIX!r}: the "
            "adapter was saved through DistributedDataParallel, torch.compile or the like. Save it from the model "
            "inside, or pass key_mapping.",
            LoadReport(unexpected=wrapped),
        )
    bare = [key for key in others if not key.startswith(PREFIX)]
    if bare and len(bare) != len(others):
        raise LoadError(
            f"{len(others) - len(bare)} of {len(others)} keys begin with {PREFIX!r} and {len(bare)} do not, as "
            f"{bare[0]!r}: the file mixes two ways of naming. Save the adapter again, or pass key_mapping.",
            LoadReport(unexpected=bare),
        )
    return {key if bare or key in kept else key.removeprefix(PREFIX): value for key, value in tensors.items()}


def _is_wrapped(key: str) -> bool:
    inner = key
    while (head := next((head for head in _WRAPPERS if inner.startswith(head)), None)) is not None:
        inner = inner.removeprefix(head)
    return inner != key and inner.startswith(PREFIX)


def apply_key_mapping(keys: Iterable[str], mapping: Mapping[str, str] | None) -> dict[str, str]:
    """What each key is called after the caller's renaming: by the first pattern that occurs in it, or as before.

    Args:
        keys (`Iterable[str]`): Without ``base_model.model.``, see :func:`strip_prefix`.
        mapping (`dict[str, str]`, *optional*): Regular expression to replacement, in the order to try them. Patterns
            are the caller's, never a file's.

    Raises:
        LoadError: Two keys are given one name.
        re.error: A pattern does not compile.

    Example:
        >>> apply_key_mapping(["model.q", "lm_head"], {r"^model\\.": "model.language_model."})
        {'model.q': 'model.language_model.q', 'lm_head': 'lm_head'}
    """
    patterns = [(re.compile(pattern), new) for pattern, new in (mapping or {}).items()]
    renamed: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in keys:
        new = _renamed(key, patterns)
        if new in taken:
            raise LoadError(
                f"key_mapping gives {taken[new]!r} and {key!r} one name, {new!r}; make its patterns more specific.",
                LoadReport(unexpected=[key]),
            )
        renamed[key], taken[new] = new, key
    return renamed


def _renamed(key: str, patterns: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in patterns:
        new, count = pattern.subn(replacement, key)
        if count:
            return new
    return key


def adapter_dir(directory: str | Path, adapter: str) -> Path:
    """Where an adapter's files are below the directory that was saved to; the name is checked by `check_adapter_name`.

    Example:
        >>> adapter_dir("out", "default").as_posix(), adapter_dir("out", "b").as_posix()
        ('out', 'out/b')
    """
    return Path(directory) if adapter == DEFAULT_ADAPTER else Path(directory) / adapter


def check_adapter_name(name: object, forbidden: Collection[str] = frozenset()) -> str:
    """An adapter name that can be a directory and an attribute of a module; returned as it is.

    Args:
        name (`str`): What the user gave.
        forbidden (`Collection[str]`, *optional*): Names that mean something already, such as attributes of
            ``nn.Module``.

    Raises:
        AdapterNameError: Anything else; the message says why.

    Example:
        >>> check_adapter_name("style 2")
        'style 2'
    """
    why = _name_fault(name, forbidden)
    if why is not None:
        raise AdapterNameError(
            f"adapter name {name!r} {why}; it becomes a directory and a part of parameter names. Choose one like "
            "'default' or 'my_adapter'."
        )
    assert isinstance(name, str)
    return name


def _name_fault(name: object, forbidden: Collection[str]) -> str | None:
    if not isinstance(name, str):
        return f"is a {type(name).__name__}, not a string"
    if not name:
        return "is empty"
    if name != name.strip():
        return "begins or ends with a space"
    if found := next((char for char in "./\\" if char in name), None):
        return f"contains {found!r}"
    if not name.isprintable():
        return "contains a character that cannot be printed"
    if (length := len(name.encode())) > 255:
        return f"takes {length} bytes, more than the 255 that a file system allows"
    return "means something else on a module" if name in forbidden else None
