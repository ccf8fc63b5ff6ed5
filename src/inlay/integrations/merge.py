"""Merging an adapter on disk into its base, as a plain model of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import inlay
from inlay.errors import ConfigError
from inlay.formats import files
from inlay.integrations.models import HEADS, load_base
from inlay.integrations.run_folder import RunFolder
from inlay.integrations.tasks import TASKS
from inlay.integrations.train_config import ModelSection

HEADED = ("SEQ_CLS", "TOKEN_CLS")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "chat_template*")


def merge(adapter: Path, out: Path, base: str | None = None) -> Path:
    """Write ``base`` with the adapter merged into it.

    Args:
        adapter (`Path`): The adapter's folder.
        out (`Path`): A folder that is empty or not there yet; it is returned.
        base (`str`, *optional*): The base's folder or id; by default the one that the adapter names.

    Raises:
        ConfigError: ``out`` is not empty, or the adapter names no base and none was given.
        PeftError: The adapter cannot be read, or does not fit the base.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another --out")
    config = files.read_config(adapter)
    name = base or str(config.get("base_model_name_or_path") or "")
    revision = str(config.get("revision") or "") or None
    if not name:
        raise ConfigError(f"{adapter} names no base model; give it as --base")
    task = next((key for key, one in TASKS.items() if one.task_type == config.get("task_type")), None)
    section = ModelSection(name=name, revision=revision if base is None else None, dtype="auto")
    labels = _labels(adapter, config) if config.get("task_type") in HEADED else []
    loaded = load_base(section, task, labels)
    merged = inlay.PeftModel.from_pretrained(loaded.model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(out))
    _copy_tokenizer([adapter, Path(name)], out)
    return out


def _labels(adapter: Path, config: Mapping[str, object]) -> list[str]:
    """The classes of a head that the adapter brings: by name where the run left them, else as many as it has rows."""
    named = RunFolder(adapter.parent).read("labels")
    if named:
        return [str(one) for one in named]
    saved = config.get("modules_to_save")
    heads = set(saved) if isinstance(saved, list) else set(HEADS)
    with files.open_weights(adapter) as weights:
        shapes = [
            info.shape
            for key, info in weights.header.items()
            if key.endswith(".weight") and len(info.shape) == 2 and not heads.isdisjoint(key.split("."))
        ]
    return [f"LABEL_{i}" for i in range(shapes[-1][0])] if shapes else []


def _copy_tokenizer(folders: list[Path], out: Path) -> None:
    """From the first of ``folders`` that has one."""
    found = ([p for pattern in TOKENIZER_FILES for p in folder.glob(pattern) if p.is_file()] for folder in folders)
    for path in next(filter(None, found), []):
        shutil.copy2(path, out / path.name)
