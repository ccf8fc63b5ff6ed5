"""``inlay demo``: a real pretrained encoder, adapted and checked in two to three minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from inlay.integrations.demo import DemoReport

SECONDS = 140.0


def demo(
    context: typer.Context,
    seconds: Annotated[
        float, typer.Option(min=1, help="About how long it may take; it takes more or fewer rows.")
    ] = SECONDS,
    out: Annotated[
        Path, typer.Option(help="The folder that receives the docstrings, the adapter and the predictions.")
    ] = Path("runs/demo"),
) -> None:
    """Teach a MiniLM encoder which standard-library package a docstring comes from; needs no network."""
    from inlay.cli.progress import ProgressBar
    from inlay.cli.show import console, quiet_libraries
    from inlay.integrations.demo import run_demo

    screen = console()
    with quiet_libraries(), ProgressBar(screen) as bar:
        report = run_demo(out, seconds, begun=float(context.obj), say=bar.say, callbacks=[bar])
    _print(screen, report)


def _print(screen: Console, report: DemoReport) -> None:
    from inlay.cli.show import duration, score, train_table

    screen.print(
        f"\n[bold]Which package is a docstring from?[/] {len(report.classes)} packages of this Python's library,"
    )
    used = f"{report.rows:,} of {report.found:,} distinct docstrings"
    screen.print(f"{used}, gone over {report.passes:.1f} times in training\n")
    screen.print(_classes(report))
    screen.print("\n[bold]Accuracy on held-out docstrings[/]")
    screen.print(_accuracies(report))
    screen.print("\n[bold]The run[/]")
    screen.print(train_table(report.train))
    screen.print("\n[bold]The same predictions from[/]")
    screen.print(_agreements(report))
    total = score("accuracy", report.train.after["accuracy"])
    screen.print(f"\n{total} in {duration(report.seconds)}, everything included")


def _classes(report: DemoReport) -> Table:
    from inlay.cli.show import grid

    table = grid(header=True)
    table.add_column("package")
    table.add_column("held out", justify="right")
    table.add_column("told rightly", justify="right")
    for label, (rows, right) in report.classes.items():
        table.add_row(label, str(rows), f"{right} ({right / rows:.0%})")
    return table


def _accuracies(report: DemoReport) -> Table:
    from inlay.cli.show import grid, score

    table = grid()
    for name, value in (
        ("always the commonest package", report.majority),
        ("frozen encoder, trained head on its pooled vector", report.frozen_pooled),
        ("frozen encoder, trained head on the mean of its tokens", report.frozen_mean),
        ("adapted encoder (LoRA on query and value, and a head)", report.train.after["accuracy"]),
    ):
        table.add_row(name, score("accuracy", value))
    return table


def _agreements(report: DemoReport) -> Table:
    from inlay.cli.show import grid, score

    table = grid(header=True)
    for name in ("model", "equal to the live one", "largest difference of a probability", "accuracy"):
        table.add_column(name)
    for name, other in (
        ("adapter loaded in a fresh process", report.reloaded),
        ("adapter merged in a fresh process", report.merged),
    ):
        accuracy = score("accuracy", other.accuracy)
        table.add_row(name, f"{other.equal} of {other.rows}", f"{other.difference:.1e}", accuracy)
    return table
