"""The names of PEFT's files, where they differ from the model's: prefixes, renamings, and what adapters may be called.

An adapter's name is in no file: it is a directory, unless it is "default".
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

# Wrappers put a prefix before every name of the model they hold; files saved through one of them carry it.
_WRAPPED = re.compile(r"((module|_orig_mod|_forward_module|_fsdp_wrapped_module)\.)+base_model\.model\.")

T = TypeVar("T")


def strip_prefix(tensors: Mapping[str, T], strict: bool = True) -> dict[str, T]:
    """The entries under names that start at the user's model, with or without ``base_model.model.`` in the file.

    Args:
        tensors (`dict[str, T]`): By key.
        strict (`bool`, *optional*, defaults to `True`): Refuse a file that names its tensors in both ways.

    Raises:
        LoadError: Some keys have the prefix and others have not, and ``strict``; or another one is before it.
            ``report.unexpected`` has them.

    Example:
        >>> strip_prefix({"base_model.model.fc.lora_A.weight": 1})
        {'fc.lora_A.weight': 1}
        >>> strip_prefix({"fc.lora_A.weight": 1})
        {'fc.lora_A.weight': 1}
    """
    bare = [key for key in tensors if not key.startswith(PREFIX)]
    if wrapped := [key for key in bare if _WRAPPED.match(key)]:
        raise LoadError(
            f"{len(wrapped)} keys, as {wrapped[0]!r}, begin with a wrapper's prefix and not with {PREFIX!r}: the "
            "adapter was saved through DistributedDataParallel, torch.compile or the like. Save it from the model "
            "inside, or pass key_mapping.",
            LoadReport(unexpected=wrapped),
        )
    if strict and bare and len(bare) != len(tensors):
        raise LoadError(
            f"{len(tensors) - len(bare)} of {len(tensors)} keys begin with {PREFIX!r} and {len(bare)} do not, as "
            f"{bare[0]!r}: the file mixes two ways of naming. Save the adapter again, or pass key_mapping.",
            LoadReport(unexpected=bare),
        )
    return {key.removeprefix(PREFIX): value for key, value in tensors.items()}


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
    if not mapping:
        return {key: key for key in keys}
    patterns = [(re.compile(pattern), new) for pattern, new in mapping.items()]
    renamed: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in keys:
        results = (pattern.subn(replacement, key) for pattern, replacement in patterns)
        new = next((name for name, count in results if count), key)
        if new in taken:
            raise LoadError(
                f"key_mapping gives {taken[new]!r} and {key!r} one name, {new!r}; make its patterns more specific.",
                LoadReport(unexpected=[key]),
            )
        renamed[key], taken[new] = new, key
    return renamed


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
    if not isinstance(name, str):
        why = f"is a {type(name).__name__}, not a string"
    elif not name:
        why = "is empty"
    elif name != name.strip():
        why = "begins or ends with a space"
    elif found := next((char for char in "./\\" if char in name), None):
        why = f"contains {found!r}"
    elif not name.isprintable():
        why = "contains a character that cannot be printed"
    elif (length := len(name.encode())) > 255:
        why = f"takes {length} bytes, more than the 255 that a file system allows"
    elif name in forbidden:
        why = "means something else on a module"
    else:
        return name
    raise AdapterNameError(
        f"adapter name {name!r} {why}; it becomes a directory and a part of parameter names. Choose one like "
        "'default' or 'my_adapter'."
    )
