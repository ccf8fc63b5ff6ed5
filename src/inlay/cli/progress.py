"""A progress bar for transformers' Trainer; where output is piped, a line from time to time instead."""

from __future__ import annotations

from typing import Any, Self

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    """Shows steps and loss on a console while training, and batches while predicting; use it as a context."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = console.is_terminal and not console.quiet
        note = TextColumn("{task.fields[note]}")
        self.live = Progress(*columns, note, console=console, transient=True, disable=not self.bar)
        self.training = self.live.add_task("training", visible=False, note="")
        self.predicting = self.live.add_task("predicting", visible=False, note="")

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """One line about what happens next."""
        self.console.print(text, style="dim")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.reset(self.training, total=state.max_steps, completed=state.global_step, visible=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.update(self.training, completed=state.global_step, total=state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.update(self.training, visible=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        note = "  ".join(f"{key} {logs[key]:.4g}" for key in ("loss", "eval_loss") if key in logs) if logs else ""
        if not note or not state.global_step:  # the base is evaluated before the first step
            return
        self.live.update(self.training, note=note)
        if not self.bar:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {note}")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self.live.update(self.predicting, total=len(eval_dataloader), advance=1, visible=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.live.reset(self.predicting, visible=False)

    on_predict = on_evaluate
