"""``inlay train``: adapt a model to a file of examples."""

from __future__ import annotations

from typing import Annotated

import typer

from inlay.cli.options import ConfigFile, Data, Method, Model, Settings, read_config

Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--restart",
        help="Insist on a checkpoint, or start over; by default the last one is taken if there is one.",
        show_default=False,
    ),
]


def train(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    settings: Settings = None,
    resume: Resume = None,
) -> None:
    """Adapt a model to a local file of examples, and report what it brought."""
    plan = read_config(config, model, data, method, settings)
    from inlay.cli.progress import ProgressBar
    from inlay.cli.show import console, quiet_libraries, train_table
    from inlay.integrations.train import train as run

    screen = console()
    with quiet_libraries(), ProgressBar(screen) as bar:
        result = run(plan, say=bar.say, callbacks=[bar], resume=resume)
    screen.print()
    screen.print(train_table(result.report))
