"""``inlay explain``: what would be adapted, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.options import ConfigFile, Data, Method, Model, Settings, read_config
from inlay.errors import ConfigError
from inlay.integrations.train_config import TrainConfig

Task = Annotated[str | None, typer.Option(help="task, such as sequence-classification.")]


def explain(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    settings: Settings = None,
    task: Task = None,
) -> None:
    """Show what a config would adapt, and what it would cost; reads the model's config, not its weights."""
    plan = read_config(config, model, data, method, [*([f"task={task}"] if task else []), *(settings or [])])
    if not plan.model.name:
        raise ConfigError("model.name: missing; give a config or --model")
    import inlay
    from inlay.cli.show import console, quiet_libraries
    from inlay.integrations.models import empty_base
    from inlay.integrations.train import adapter_config

    with quiet_libraries():
        empty = empty_base(plan.model, plan.task, _labels(plan))
        found = inlay.explain(empty, adapter_config(plan), batch=plan.training.batch_size, tokens=plan.data.max_length)
    console().print(str(found), markup=False)


def _labels(plan: TrainConfig) -> list[str]:
    """The classes in the data, which decide the size of the head; without data the model's own head is shown."""
    from inlay.integrations.data import load_examples

    return load_examples(plan).labels if plan.data.path and Path(plan.data.path).is_file() else []
