"""The folder that one training run writes, and what may be continued in it.

config.yaml         the config as it was run        checkpoints/     what a killed run continues from
labels.json         the classes, in the head's order  adapter/         the trained adapter, with its tokenizer
before.json         scores of the frozen base       predictions.jsonl, report.json
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml

from inlay.errors import ConfigError, MissingFileError
from inlay.formats import files
from inlay.integrations.train_config import TrainConfig, differences, parse, read_tree

# What may change between a run and its continuation: how far, how often, where; nothing that the weights depend on.
FREE = frozenset(
    {"output"}
    | {f"training.{key}" for key in ("epochs", "max_steps", "held_out_batch_size", "save_steps", "log_steps")}
    | {f"training.{key}" for key in ("keep_checkpoints", "evaluate_steps")}
)


class RunFolder:
    """The files of one run, by name; the folder need not exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"

    def begin(self, config: TrainConfig, labels: list[str], *, start_over: bool) -> None:
        """Write down what is about to run; with ``start_over`` earlier checkpoints and results go."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if start_over:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                for name in ("before.json", "report.json", "predictions.jsonl"):
                    (self.path / name).unlink(missing_ok=True)
            text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
            (self.path / "config.yaml").write_text(text, encoding="utf-8")
            self.write("labels", labels)
        except OSError as error:
            raise ConfigError(f"output {self.path} cannot be written: {error}") from error

    def config(self) -> TrainConfig:
        """The config that was run here."""
        path = self.path / "config.yaml"
        if not path.is_file():
            raise MissingFileError(f"no {path}; expected the output folder of `inlay train`")
        return parse(read_tree(path))

    def write(self, name: str, value: Any) -> None:
        """``value`` as ``name``.json, which appears whole or not at all."""
        files.save_text(self.path / f"{name}.json", json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read(self, name: str) -> Any:
        """What `write` wrote, or None where there is nothing."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def last_checkpoint(self, config: TrainConfig, resume: bool | None) -> Path | None:
        """The checkpoint to continue from, or None for a run from the start.

        ``resume`` insists on one where True, wants none where False, and takes what is there where None. A
        `ConfigError` says that none is there that should be, or that the folder holds those of another run.
        """
        if resume is False:
            return None
        found = [path for path in self.checkpoints.glob("checkpoint-*") if is_complete(path)]
        if not found:
            if resume:
                raise ConfigError(f"nothing to resume: no complete checkpoint in {self.checkpoints}")
            return None
        changed = [key for key in differences(self.config().to_dict(), config.to_dict()) if key not in FREE]
        if changed:
            raise ConfigError(
                f"{self.path} holds checkpoints of another run; different here: {', '.join(changed)}."
                " Choose another output, or start over with --restart"
            )
        return max(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step of a checkpoint's folder.

    Example:
        >>> step_of(Path("runs/checkpoint-120"))
        120
    """
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: a kill in the middle of one leaves a part of its files."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # torch.save writes a zip file, whose table of contents comes last.
    whole = all(zipfile.is_zipfile(checkpoint / name) for name in ("optimizer.pt", "scheduler.pt"))
    return whole and (checkpoint / "adapter_model.safetensors").is_file()


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote."""
    return [cast(dict[str, Any], json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
