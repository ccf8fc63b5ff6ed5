"""The commands, each in a file of its own, and what they share."""

from __future__ import annotations

import typer

from inlay.cli import demo, explain, inspect, merge, methods, predict, train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Adapt large pretrained models by training a few parameters set into them.",
    epilog="Every command takes --debug, which shows the traceback of an error.",
)
app.command("train")(train.train)
app.command("predict")(predict.predict)
app.command("explain")(explain.explain)
app.command("methods")(methods.methods)
app.command("inspect")(inspect.inspect)
app.command("merge")(merge.merge)
app.command("demo")(demo.demo)


def run(arguments: list[str], begun: float) -> None:
    """Parse ``arguments`` and run a command; ``begun`` is when the process started to load."""
    app(arguments, prog_name="inlay", obj=begun)
