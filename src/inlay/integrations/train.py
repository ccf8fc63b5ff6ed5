"""Training an adapter on a file of examples: the work behind ``inlay train`` and ``inlay predict``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

import inlay
from inlay.errors import ConfigError, PeftError, UnknownMethodError, nearest
from inlay.integrations.data import Examples, load_examples, load_inputs
from inlay.integrations.models import load_base, load_tokenizer, save_with
from inlay.integrations.run_folder import RunFolder, step_of, write_lines
from inlay.integrations.tasks import TASKS, AbstractTask, examples_to_features
from inlay.integrations.train_config import TrainConfig, raise_all
from inlay.integrations.trainer import build_trainer
from inlay.methods import METHODS
from inlay.prompts import PROMPTS

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainReport:
    """What came out of a run; every figure was measured by it."""

    metric: str  # the name of the figure that the task is judged by
    before: dict[str, float]  # scores on the held-out part with the fresh adapter, which is the frozen base
    after: dict[str, float]  # the same with the trained adapter
    train_rows: int  # rows trained on
    held_out_rows: int  # rows judged on
    repeated_rows: int  # held-out rows whose input also stands in the training part
    trainable: int  # trained parameters
    parameters: int  # all parameters, the adapter's included
    adapter_bytes: int  # size of the adapter's weights on disk
    base_bytes: int  # size of the base model's weights in memory
    steps: int  # optimiser steps in all
    resumed_at: int  # the step that this process began at
    seconds: float  # time spent training, in this process
    output: str  # the folder with everything


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: the report, and the live pieces for those who go on working with them."""

    report: TrainReport
    model: Any
    predictions: list[dict[str, Any]]


def is_main_process() -> bool:
    """Whether this is the process that writes and prints; ``torchrun`` and ``accelerate launch`` set RANK."""
    return os.environ.get("RANK", "0") == "0"


def adapter_config(config: TrainConfig) -> Any:
    """The method's own config from the ``adapter`` section, or a `ConfigError`."""
    name = config.adapter.method
    table: dict[str, Any] = {**METHODS, **PROMPTS}
    method = table.get(name.upper())
    if method is None:
        known = [one.lower() for one in table]
        raise UnknownMethodError(f"no method {name!r}{nearest(name.lower(), known)}; known: {', '.join(known)}")
    options = config.adapter.options
    if "task_type" in options:
        raise ConfigError("task_type follows from task; leave it out")
    return method.config(task_type=TASKS[config.task].task_type, **options)


def prepare(config: TrainConfig) -> tuple[Examples, Any]:
    """The examples and the method's config, no model loaded, or a `ConfigError` with every complaint at once."""
    complaints = []
    if not config.model.name:
        complaints.append("model.name: missing; expected a local folder or the id of a model on the hub")
    if not config.data.path:
        complaints.append("data.path: missing; expected a .jsonl, .csv, .tsv or .parquet file")
    examples = adapter = None
    try:
        adapter = adapter_config(config)
    except PeftError as error:
        complaints.append(f"adapter: {error}")
    if config.data.path:
        try:
            examples = load_examples(config)
        except PeftError as error:
            complaints.append(str(error))
    raise_all(complaints)
    assert examples is not None
    return examples, adapter


def train(
    config: TrainConfig,
    *,
    say: Say = lambda text: None,
    callbacks: Iterable[transformers.TrainerCallback] = (),
    resume: bool | None = None,
    start: Callable[[Any], None] = lambda base: None,
) -> TrainResult:
    """Adapt a model to a file of examples.

    Everything that can be wrong with the config or the data is raised before the model is loaded. Under ``torchrun``
    or ``accelerate launch`` every process calls this; only the main one writes.

    Args:
        config (`TrainConfig`): The whole plan.
        say (`Callable[[str], None]`, *optional*): Told in one line what happens next.
        callbacks (`Iterable[TrainerCallback]`, *optional*): For the Trainer, such as a progress bar.
        resume (`bool`, *optional*): None continues from the last complete checkpoint in ``config.output``, if
            there is one; True insists on one; False starts over.
        start (`Callable[[nn.Module], None]`, *optional*): Called with the loaded base before it is adapted, as to
            give a new head its starting values.

    Returns:
        `TrainResult`: The report, the live model and its predictions on the held-out part.

    Raises:
        ConfigError: With everything that is wrong with the config, the data, or the folder to continue in.
    """
    examples, adapter = prepare(config)
    folder = RunFolder(config.output)
    checkpoint = folder.last_checkpoint(config, resume)
    if is_main_process():
        folder.begin(config, examples.labels, start_over=resume is False)
    say(f"loading {config.model.name}")
    transformers.set_seed(config.training.seed)
    tokenizer = load_tokenizer(config.model)
    base = load_base(config.model, config.task, examples.labels, tokenizer.pad_token_id)
    base_bytes = sum(p.nbytes for p in base.model.parameters())
    save_with(adapter, base.new)
    start(base.model)
    model = inlay.get_peft_model(base.model, adapter)
    task = TASKS[config.task](config.data, tokenizer, examples.labels)
    features = examples_to_features(task, examples.held_out)
    train_features = examples_to_features(task, examples.train)
    trainer = build_trainer(model, task, config, folder.checkpoints, train_features, features, callbacks)

    before = (folder.read("before") if checkpoint else None) or _base_scores(trainer, features, folder, say)
    say(f"training on {len(train_features)} rows{f', from {checkpoint.name}' if checkpoint else ''}")
    clock = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - clock
    say(f"predicting {len(features)} held-out rows")
    lines, after = trainer.describe(examples.held_out, features)
    trainer.save_model(str(folder.adapter))
    trainer.accelerator.wait_for_everyone()
    report = TrainReport(
        **_facts(task, examples, model, folder),
        before=before,
        after=after,
        base_bytes=base_bytes,
        steps=trainer.state.global_step,
        resumed_at=step_of(checkpoint) if checkpoint else 0,
        seconds=seconds,
    )
    if is_main_process():
        tokenizer.save_pretrained(folder.adapter)
        write_lines(folder.path / "predictions.jsonl", lines)
        folder.write("report", asdict(report))
    return TrainResult(report, model, lines)


def _base_scores(trainer: Any, features: Any, folder: RunFolder, say: Say) -> dict[str, float]:
    """The scores of the frozen base, which a run that continues has from its beginning."""
    say(f"evaluating the base on {len(features)} held-out rows")
    scores: dict[str, float] = trainer.score(features)
    if is_main_process():
        folder.write("before", scores)
    return scores


def _facts(task: AbstractTask, examples: Examples, model: Any, folder: RunFolder) -> dict[str, Any]:
    """What a report says of the task, the rows, the model and the files."""
    trainable, parameters = model.get_nb_trainable_parameters()
    weights = folder.adapter / "adapter_model.safetensors"
    return {
        "metric": task.metric,
        "train_rows": len(examples.train),
        "held_out_rows": len(examples.held_out),
        "repeated_rows": examples.repeated,
        "trainable": trainable,
        "parameters": parameters,
        # A machine that shares no disk with the main process has no file to measure.
        "adapter_bytes": weights.stat().st_size if weights.is_file() else 0,
        "output": str(folder.path),
    }


def predict(
    run: str | Path,
    data: str | Path | None = None,
    *,
    merge: bool = False,
    say: Say = lambda text: None,
    callbacks: Iterable[transformers.TrainerCallback] = (),
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Predict with the adapter that a run left.

    Args:
        run (`str` or `Path`): The output folder of `train`.
        data (`str` or `Path`, *optional*): A file like the one trained on, answers optional; by default the
            held-out part.
        merge (`bool`, *optional*, defaults to False): Merge the adapter into the base first.
        say (`Callable[[str], None]`, *optional*): Told in one line what happens next.
        callbacks (`Iterable[TrainerCallback]`, *optional*): For the Trainer, such as a progress bar.

    Returns:
        `tuple[list[dict[str, Any]], dict[str, float]]`: One line per row, and the scores where all rows have answers.

    Raises:
        MissingFileError: No run was made there, or there is no such data.
        ConfigError: A column is missing.
    """
    folder = RunFolder(run)
    config = folder.config()
    labels = folder.read("labels") or []
    rows = load_examples(config).held_out if data is None else load_inputs(config.task, config.data, data)
    say(f"loading {config.model.name} and {folder.adapter}")
    tokenizer = load_tokenizer(config.model)
    base = load_base(config.model, config.task, labels, tokenizer.pad_token_id)
    model = inlay.PeftModel.from_pretrained(base.model, str(folder.adapter))
    if merge:
        model = model.merge_and_unload()
    task = TASKS[config.task](config.data, tokenizer, labels)
    trainer = build_trainer(model, task, config, folder.checkpoints, [], [], callbacks)
    say(f"predicting {len(rows)} rows")
    return trainer.describe(rows, examples_to_features(task, rows))
