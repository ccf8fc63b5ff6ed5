"""Options that several commands take, and the config they make together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inlay.integrations.train_config import TrainConfig, parse, parse_setting, read_tree, with_settings

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="A config; see examples/train.yaml.")]
Model = Annotated[str | None, typer.Option(help="model.name: a local folder or the id of a model on the hub.")]
Data = Annotated[str | None, typer.Option(help="data.path: a .jsonl, .csv, .tsv or .parquet file.")]
Method = Annotated[str | None, typer.Option(help="adapter.method, such as lora.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the config, such as adapter.r=16.")
]


def read_config(
    file: Path | None, model: str | None, data: str | None, method: str | None, settings: list[str] | None
) -> TrainConfig:
    """The config in ``file``, or an empty one, with the options laid over it: ``--set`` last."""
    named = [("model.name", model), ("data.path", data), ("adapter.method", method)]
    given = [(key, value) for key, value in named if value is not None]
    tree = {} if file is None else read_tree(file)
    return parse(with_settings(tree, [*given, *map(parse_setting, settings or [])]))
