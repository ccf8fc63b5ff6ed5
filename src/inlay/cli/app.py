"""The commands: arguments in, public functions called, results shown.

What is slow to import is imported by the command that needs it, so that ``inlay --help`` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inlay.errors import ConfigError
from inlay.integrations.train_config import TrainConfig, parse, parse_setting, read_tree, with_settings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Adapt large pretrained models by training a few parameters set into them.",
    epilog="Every command takes --debug, which shows the traceback of an error.",
)

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="A config; see examples/train.yaml.")]
Model = Annotated[str | None, typer.Option(help="model.name: a local folder or the id of a model on the hub.")]
Data = Annotated[str | None, typer.Option(help="data.path: a .jsonl, .csv, .tsv or .parquet file.")]
Method = Annotated[str | None, typer.Option(help="adapter.method, such as lora.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the config, such as adapter.r=16.")
]
Adapter = Annotated[Path, typer.Argument(help="The folder of an adapter.")]


def run(arguments: list[str], begun: float) -> None:
    """Parse ``arguments`` and run a command; ``begun`` is when the process started to load."""
    app(arguments, prog_name="inlay", obj=begun)


def _read_config(file: Path | None, options: dict[str, str | None], settings: list[str] | None) -> TrainConfig:
    """The config in ``file``, or an empty one, with the options laid over it: ``--set`` last."""
    given = [(key, value) for key, value in options.items() if value is not None]
    tree = {} if file is None else read_tree(file)
    return parse(with_settings(tree, [*given, *map(parse_setting, settings or [])]))


@app.command()
def train(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    settings: Settings = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--restart",
            help="Insist on a checkpoint, or start over; by default the last one is taken if there is one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Adapt a model to a local file of examples, and report what it brought."""
    plan = _read_config(config, {"model.name": model, "data.path": data, "adapter.method": method}, settings)
    from inlay.cli.progress import ProgressBar
    from inlay.cli.show import console, quiet_libraries, train_table
    from inlay.integrations import train as work

    screen = console()
    with quiet_libraries(), ProgressBar(screen) as bar:
        result = work.train(plan, say=bar.say, callbacks=[bar], resume=resume)
    screen.print()
    screen.print(train_table(result.report))


@app.command()
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
    from inlay.integrations import train as work
    from inlay.integrations.run_folder import write_lines

    screen = console()
    with quiet_libraries(), ProgressBar(screen) as bar:
        lines, scores = work.predict(run, data, merge=merge, say=bar.say, callbacks=[bar])
    file = out or run / "predictions.jsonl"
    if work.is_main_process():
        write_lines(file, lines)
    figures = "".join(f", {name.replace('_', ' ')} {score(name, value)}" for name, value in scores.items())
    screen.print(f"{len(lines)} rows{figures}, written to {file}")


@app.command()
def explain(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    settings: Settings = None,
    task: Annotated[str | None, typer.Option(help="task, such as sequence-classification.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to train, such as cpu; a GPU if not given.")] = None,
) -> None:
    """Show what a config would adapt, and what it would cost; reads the model's config, not its weights."""
    options = {"model.name": model, "data.path": data, "adapter.method": method, "task": task}
    plan = _read_config(config, options, settings)
    if not plan.model.name:
        raise ConfigError("model.name: missing; give a config or --model")
    import inlay
    from inlay.cli.show import console, quiet_libraries
    from inlay.integrations.data import load_examples
    from inlay.integrations.models import empty_base, save_with
    from inlay.integrations.train import adapter_config

    # The classes in the data decide the size of the head; without data the model's own head is shown.
    labels = load_examples(plan).labels if plan.data.path and Path(plan.data.path).is_file() else []
    with quiet_libraries():
        empty, adapter = empty_base(plan.model, plan.task, labels), adapter_config(plan)
        save_with(adapter, empty.new)
        found = inlay.explain(
            empty.model, adapter, batch=plan.training.batch_size, tokens=plan.data.max_length, device=device
        )
    console().print(str(found), markup=False)
    if not empty.seen:
        console().print(
            "  note: the checkpoint is not on this machine; what it lacks, as a head, is trained whole too"
        )


@app.command()
def methods(
    outs: Annotated[int, typer.Option(help="Outputs of the linear layer that parameters are counted on.")] = 1024,
    ins: Annotated[int, typer.Option(help="Its inputs.")] = 1024,
    why: Annotated[bool, typer.Option("--why", help="Say why a method cannot be on a kind of layer.")] = False,
) -> None:
    """List the methods: what each trains, on which kinds of layers, and whether it merges and serves rows."""
    from inlay import catalogue
    from inlay.cli.show import console, print_methods, print_prompts

    screen = console()
    print_methods(screen, catalogue.methods(outs, ins), why=why)
    print_prompts(screen, catalogue.prompts(outs))
    layer = f"one linear layer of {outs} x {ins}, or of one attention made of such"
    screen.print(
        f"\nParameters are those of {layer}, with the defaults of each config; a prompt's those before a model of 24 "
        f"layers, {outs} wide."
    )


@app.command()
def inspect(
    adapter: Adapter,
    png: Annotated[Path | None, typer.Option(help="Also draw the figures over the layers into this file.")] = None,
) -> None:
    """Show an adapter's config, and how far and in how many directions it moves each layer."""
    from inlay.cli.show import console, print_adapter
    from inlay.inspect import inspect_adapter, plot

    report, screen = inspect_adapter(adapter), console()
    print_adapter(screen, report)
    if png is not None:
        screen.print(f"drawn into {plot(report, png)}")


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="The folder to write; empty or not there yet.")],
    base: Annotated[str | None, typer.Option(help="The base; by default the one that the adapter names.")] = None,
) -> None:
    """Merge an adapter into its base and save the result with its tokenizer."""
    from inlay.cli.show import console, quiet_libraries
    from inlay.explanation import size
    from inlay.integrations import merge as work

    with quiet_libraries():
        work.merge(adapter, out, base)
    total = sum(path.stat().st_size for path in out.iterdir())
    console().print(f"merged model written to {out} ({size(total)})")


@app.command()
def demo(
    context: typer.Context,
    seconds: Annotated[
        float, typer.Option(min=1, help="About how long it may take; it takes more or fewer rows.")
    ] = 140.0,
    out: Annotated[
        Path, typer.Option(help="The folder that receives the docstrings, the adapter and the predictions.")
    ] = Path("runs/demo"),
) -> None:
    """Teach a MiniLM encoder which standard-library package a docstring comes from; needs no network."""
    from inlay.cli.progress import ProgressBar
    from inlay.cli.show import console, print_demo, quiet_libraries
    from inlay.integrations.demo import run_demo

    screen = console()
    with quiet_libraries(), ProgressBar(screen) as bar:
        report = run_demo(out, seconds, begun=float(context.obj), say=bar.say, callbacks=[bar])
    print_demo(screen, report)
