"""How things look on a terminal, and in a file that a terminal's output is piped to."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from inlay.explanation import size
from inlay.integrations.train import TrainReport, is_main_process

if TYPE_CHECKING:
    from inlay.catalogue import Capability, MethodRow, PromptRow
    from inlay.inspect import AdapterReport
    from inlay.integrations.demo import DemoReport

PIPED_WIDTH = 100


def console() -> Console:
    """For standard output; silent in all but the main process of a distributed run."""
    made = Console(quiet=not is_main_process(), highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPED_WIDTH
    return made


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Leave the screen to us: transformers and its helpers report nothing but errors while this lasts."""
    import transformers

    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|torch|accelerate|huggingface_hub)\b")
            yield
    finally:
        log.set_verbosity(before)
        log.enable_progress_bar()


def duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> duration(8.25), duration(135.0), duration(7260)
        ('8.2 s', '2 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def score(name: str, value: float) -> str:
    """A figure of merit: shares as per cent, anything else with four digits.

    Example:
        >>> score("accuracy", 0.6597), score("perplexity", 31.4159)
        ('66.0 %', '31.42')
    """
    shares = ("accuracy", "exact_match", "token_accuracy")
    return f"{value:.1%}".replace("%", " %") if name in shares else f"{value:.4g}"


def grid(rows: Iterable[Sequence[str]], *names: str, right: bool = False) -> Table:
    """A table without lines, which reads the same in a file; ``right`` has all but the first column end together."""
    table = Table(box=None, show_header=bool(names), pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if right and i else "left", overflow="fold", no_wrap=right and i > 0)
    for row in rows:
        table.add_row(*row)
    return table


def train_table(report: TrainReport) -> Table:
    """The short report at the end of a training run."""
    rows = {}
    for name in dict.fromkeys([report.metric, *report.after]):
        before = f"{score(name, report.before[name])} -> " if name in report.before else ""
        rows[name.replace("_", " ")] = f"{before}{score(name, report.after[name])}"
    share = report.trainable / report.parameters
    rows["trained"] = f"{report.trainable:,} of {report.parameters:,} parameters ({share:.2%})"
    ratio = report.adapter_bytes / report.base_bytes
    rows["size"] = f"adapter {size(report.adapter_bytes)}, base {size(report.base_bytes)} ({ratio:.2%})"
    resumed = f", resumed at step {report.resumed_at}" if report.resumed_at else ""
    rows["time"] = f"{duration(report.seconds)}, {report.steps} steps{resumed}"
    rows["rows"] = f"{report.train_rows:,} trained on, {report.held_out_rows:,} held out"
    if report.repeated_rows:
        rows["note"] = f"{report.repeated_rows} held-out inputs also stand in the training rows"
    rows["written to"] = report.output
    return grid((f"[bold]{name}[/]", text) for name, text in rows.items())


def print_adapter(screen: Console, report: AdapterReport) -> None:
    """An adapter's config and its layers."""
    shown = {k: str(v) for k, v in report.config.items() if v not in (None, False, [], {}, "")}
    layers = (
        (
            *(row.module, _shape(row.shape), str(row.rank), f"{row.scaling:.3g}"),
            *(f"{row.norm:.4g}", f"{row.largest:.4g}", f"{row.effective_rank:.2f}"),
        )
        for row in report.rows
    )
    tables = [
        grid(shown.items()),
        grid(layers, "layer", "shape", "r", "scaling", "norm", "largest", "eff. rank", right=True),
    ]
    if report.whole:
        whole = ((one.name, _shape(one.shape), f"{one.norm:.4g}") for one in report.whole)
        tables.append(grid(whole, "held whole", "shape", "norm", right=True))
    for table in tables:
        screen.print(table)
        screen.print()
    screen.print(f"{report.parameters:,} parameters, {size(report.file_bytes)}")


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def print_demo(screen: Console, report: DemoReport) -> None:
    """Everything that the demonstration measured."""
    classes = ((name, str(n), f"{right} ({right / n:.0%})") for name, (n, right) in report.classes.items())
    accuracies = {
        "always the commonest package": report.majority,
        "frozen encoder, trained head on its pooled vector": report.frozen_pooled,
        "frozen encoder, trained head on the mean of its tokens": report.frozen_mean,
        "adapted encoder (LoRA on query and value, and a head)": report.train.after["accuracy"],
    }
    others = {"adapter loaded in a fresh process": report.reloaded, "adapter merged in a fresh process": report.merged}
    agreements = (
        (name, f"{one.equal} of {one.rows}", f"{one.difference:.1e}", score("accuracy", one.accuracy))
        for name, one in others.items()
    )
    packages = f"{len(report.classes)} packages of this Python's library"
    screen.print(f"\n[bold]Which package is a docstring from?[/] {packages},")
    used = f"{report.rows:,} of {report.found:,} distinct docstrings"
    screen.print(f"{used}, gone over {report.passes:.1f} times in training\n")
    screen.print(grid(classes, "package", "held out", "told rightly", right=True))
    screen.print("\n[bold]Accuracy on held-out docstrings[/]")
    screen.print(grid((name, score("accuracy", value)) for name, value in accuracies.items()))
    screen.print("\n[bold]The run[/]")
    screen.print(train_table(report.train))
    screen.print("\n[bold]The same predictions from[/]")
    screen.print(grid(agreements, "model", "equal to the live one", "largest difference of a probability", "accuracy"))
    total = score("accuracy", report.train.after["accuracy"])
    screen.print(f"\n{total} in {duration(report.seconds)}, everything included")


_SHORT = {"MultiheadAttention": "MHA", "Attention": "Attn.", "Embedding": "Emb.", "Parameter": "Param."}


def print_methods(screen: Console, found: Sequence[MethodRow], why: bool) -> None:
    """The table of methods, and where ``why`` asks for it the reasons for its gaps."""
    kinds = [_SHORT.get(kind.kind, kind.kind.replace("Conv", "Conv\n")) for kind in found[0].kinds]
    rows = ((row.name, row.acts_on, f"{row.trained:,}", *map(_capability, row.kinds)) for row in found)
    table = grid(rows, "method", "acts\non", "trained", *kinds)
    table.padding = (0, 1, 0, 0)  # fits into 80 columns
    screen.print(table)
    screen.print("\nm: merges. Rows of a batch with adapters of their own: R in one product, r adapter by adapter.\n")
    screen.print(grid((row.name, row.config, row.paper) for row in found))
    gaps = [(f"{row.name} on {k.kind}", k.why_not) for row in found for k in row.kinds if k.why_not is not None]
    if why and gaps:
        screen.print()
        screen.print(grid(gaps))


def print_prompts(screen: Console, found: Sequence[PromptRow]) -> None:
    """The table of prompt methods."""
    screen.print()
    rows = ((row.name, row.comes_in, str(row.tokens), f"{row.trained:,}") for row in found)
    screen.print(grid(rows, "prompt method", "comes in as", "tokens", "trained"))
    screen.print()
    screen.print(grid((row.name, row.config, row.paper) for row in found))


def _capability(kind: Capability) -> str:
    if kind.why_not is not None:
        return "-"
    return ("m" if kind.merges else "") + {"stacked": "R", "sliced": "r", "no": ""}[kind.rows] or "yes"
