"""``inlay merge``: an adapter and its base as one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter.")],
    out: Annotated[Path, typer.Option(help="The folder to write; empty or not there yet.")],
    base: Annotated[str | None, typer.Option(help="The base; by default the one that the adapter names.")] = None,
) -> None:
    """Merge an adapter into its base and save the result with its tokenizer."""
    from inlay.cli.show import console, quiet_libraries, size
    from inlay.integrations.merge import merge as work

    with quiet_libraries():
        work(adapter, out, base)
    total = sum(path.stat().st_size for path in out.iterdir())
    console().print(f"merged model written to {out} ({size(total)})")
