"""How things look on a terminal, and in a file that a terminal's output is piped to."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from inlay.integrations.train import TrainReport, is_main_process

PIPED_WIDTH = 100


def console() -> Console:
    """For standard output; silent in all but the main process of a distributed run."""
    plain = Console(quiet=not is_main_process(), highlight=False, soft_wrap=False)
    if not plain.is_terminal and "COLUMNS" not in os.environ:
        return Console(quiet=plain.quiet, highlight=False, width=PIPED_WIDTH)
    return plain


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


def size(n: float) -> str:
    """Bytes for people.

    Example:
        >>> size(316_920), size(90_871_344), size(12)
        ('317 kB', '90.9 MB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            return f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


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
    return (
        f"{value:.1%}".replace("%", " %") if name in ("accuracy", "exact_match", "token_accuracy") else f"{value:.4g}"
    )


def grid(*, header: bool = False) -> Table:
    """A table without lines, which reads the same in a file."""
    return Table(box=None, show_header=header, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")


def train_table(report: TrainReport) -> Table:
    """The short report at the end of a training run."""
    table = grid()
    table.add_column(style="bold")
    table.add_column()
    names = [report.metric, *(name for name in report.after if name != report.metric)]
    for name in names:
        before = f"{score(name, report.before[name])} -> " if name in report.before else ""
        table.add_row(name.replace("_", " "), f"{before}{score(name, report.after[name])}")
    share = report.trainable / report.parameters
    table.add_row("trained", f"{report.trainable:,} of {report.parameters:,} parameters ({share:.2%})")
    ratio = report.adapter_bytes / report.base_bytes
    table.add_row("size", f"adapter {size(report.adapter_bytes)}, base {size(report.base_bytes)} ({ratio:.2%})")
    resumed = f", resumed at step {report.resumed_at}" if report.resumed_at else ""
    table.add_row("time", f"{duration(report.seconds)}, {report.steps} steps{resumed}")
    table.add_row("rows", f"{report.train_rows:,} trained on, {report.held_out_rows:,} held out")
    if report.repeated_rows:
        table.add_row("note", f"{report.repeated_rows} held-out inputs also stand in the training rows")
    table.add_row("written to", report.output)
    return table
