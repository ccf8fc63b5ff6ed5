"""``inlay predict``: use what ``inlay train`` left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    run: Annotated[Path, typer.Argument(help="The output folder of inlay train.")],
    data: Annotated[
        Path | None, typer.Option(help="A file with the same columns; by default the held-out rows.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The JSONL file to write; by default RUN/predictions.jsonl.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base first.")] = False,
) -> None:
    """Predict with a trained adapter, one JSON line per row."""
    from inlay.cli.progress import ProgressBar
    from inlay.cli.show import console, quiet_libraries, score
    from inlay.integrations.run_folder import write_lines
    from inlay.integrations.train import is_main_process
    from inlay.integrations.train import predict as work

    screen = console()
    with quiet_libraries(), ProgressBar(screen) as bar:
        lines, scores = work(run, data, merge=merge, say=bar.say, callbacks=[bar])
    file = out or run / "predictions.jsonl"
    if is_main_process():
        write_lines(file, lines)
    figures = "".join(f", {name.replace('_', ' ')} {score(name, value)}" for name, value in scores.items())
    screen.print(f"{len(lines)} rows{figures}, written to {file}")
