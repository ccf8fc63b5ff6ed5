"""Where an adapter comes from: a local directory, or the hub, whose client is imported only then."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inlay.errors import CorruptFileError, UnknownArgumentError, nearest
from inlay.formats import files

# Arguments of earlier clients that callers still pass; they change nothing about which files are read.
_IGNORED = frozenset({"use_auth_token", "resume_download", "proxies", "_commit_hash", "commit_hash"})
HUB_ARGUMENTS = _IGNORED | {
    *("revision", "token", "cache_dir", "force_download", "local_files_only", "endpoint"),
    *("etag_timeout", "user_agent", "repo_type"),
}
# What callers give to loading and saving in general, and what has no meaning for an adapter: accepted, as PEFT does.
LOADING = HUB_ARGUMENTS | {
    *("subfolder", "torch_device", "ignore_mismatched_sizes", "device_map", "max_memory", "offload_folder"),
    *("offload_dir", "offload_index", "offload_buffers", "offload_state_dict", "torch_dtype", "dtype"),
    *("trust_remote_code", "use_safetensors", "weights_only", "quantization_config", "attn_implementation"),
    *("library_name", "library_version", "local_dir", "local_dir_use_symlinks", "headers", "tqdm_class", "dry_run"),
}
SAVING = frozenset(
    {
        *("max_shard_size", "save_function", "variant", "save_peft_format", "token", "use_auth_token", "push_to_hub"),
        *("repo_id", "private", "create_pr", "revision", "commit_message", "commit_description", "tags"),
    }
)


def check_arguments(function: Callable[..., Any], kwargs: Mapping[str, Any], accepted: frozenset[str]) -> None:
    """Raises `UnknownArgumentError` for what an open keyword of ``function`` would have swallowed.

    Example:
        >>> def load(path, strict=None, **kwargs):
        ...     check_arguments(load, kwargs, LOADING)
        >>> load("adapter", strikt=False)
        Traceback (most recent call last):
        ...
        inlay.errors.UnknownArgumentError: load has no argument 'strikt'; closest: strict. Nothing was read or written.
    """
    for name in kwargs:
        if name not in accepted:
            hint = nearest(name, [*inspect.signature(function).parameters, *accepted])
            raise UnknownArgumentError(
                f"{function.__qualname__} has no argument {name!r}{hint}. Nothing was read or written."
            )


def split_hub_arguments(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keywords into those for the hub's client and all others.

    Example:
        >>> split_hub_arguments({"revision": "main", "r": 8})
        ({'revision': 'main'}, {'r': 8})
    """
    hub = {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS and k not in _IGNORED}
    if kwargs.get("use_auth_token") is not None:
        hub.setdefault("token", kwargs["use_auth_token"])
    return hub, {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS}


def locate(model_id: str | Path, *, subfolder: str | None = None, weights: bool = True, **hub: Any) -> Path:
    """The local directory with the adapter's files, downloaded from the hub where ``model_id`` is no directory.

    Args:
        model_id (`str` or `Path`): A directory or an id on the hub.
        subfolder (`str`, *optional*): Folder inside it.
        weights (`bool`, *optional*, defaults to `True`): Download the weights too, not the config alone.
        hub: Arguments of the hub's client (``revision``, ``token``, ``cache_dir``, ...).

    Raises:
        MissingFileError: The hub has no such adapter, or cannot be reached.
        CorruptFileError: ``subfolder`` leads out of the directory.
    """
    root = Path(model_id)
    if root.is_dir():
        inside = root / (subfolder or "")
        if not inside.resolve().is_relative_to(root.resolve()):
            raise CorruptFileError(f"subfolder {subfolder!r} leads out of {root}; name a folder inside it.")
        return inside
    from inlay.integrations import hub as client

    return client.fetch(str(model_id), subfolder=subfolder, weights=weights, **hub)


def base_vocabulary(model_id: str | None) -> int | None:
    """``vocab_size`` in the base model's own config, from a local directory or the hub's cache; never downloaded."""
    path = base_file(model_id, "config.json") if model_id else None
    size = None if path is None else files.read_json(path).get("vocab_size")
    return size if isinstance(size, int) else None


def base_file(model_id: str, name: str) -> Path | None:
    """A file of the base model, from a local directory or the hub's cache; never downloaded."""
    path = Path(model_id) / name
    if path.is_file():
        return path
    from inlay.integrations import hub as client

    return client.cached(model_id, name)
