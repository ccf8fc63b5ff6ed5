"""``inlay inspect``: what an adapter does, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from inlay.inspect import AdapterReport


def inspect(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter.")],
    png: Annotated[Path | None, typer.Option(help="Also draw the figures over the layers into this file.")] = None,
) -> None:
    """Show an adapter's config, and how far and in how many directions it moves each layer."""
    from inlay.cli.show import console, grid, size
    from inlay.inspect import inspect_adapter, plot

    report = inspect_adapter(adapter)
    screen = console()
    settings = grid()
    for key, value in report.config.items():
        if value not in (None, False, [], {}, ""):
            settings.add_row(key, str(value))
    screen.print(settings)
    screen.print()
    screen.print(_layers(report))
    if report.whole:
        screen.print()
        screen.print(_whole(report))
    screen.print(f"\n{report.parameters:,} parameters, {size(report.file_bytes)}")
    if png is not None:
        screen.print(f"drawn into {plot(report, png)}")


def _layers(report: AdapterReport) -> Table:
    from inlay.cli.show import grid

    table = grid(header=True)
    table.add_column("layer", overflow="fold")
    for name in ("shape", "r", "scaling", "norm", "largest", "eff. rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        shape = "x".join(map(str, row.shape))
        figures = (f"{row.scaling:.3g}", f"{row.norm:.4g}", f"{row.largest:.4g}", f"{row.effective_rank:.2f}")
        table.add_row(row.module, shape, str(row.rank), *figures)
    return table


def _whole(report: AdapterReport) -> Table:
    from inlay.cli.show import grid

    table = grid(header=True)
    table.add_column("held whole", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("norm", justify="right")
    for one in report.whole:
        table.add_row(one.name, "x".join(map(str, one.shape)), f"{one.norm:.4g}")
    return table
