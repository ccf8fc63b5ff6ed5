"""transformers' Trainer for a model with an adapter."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_callback import PrinterCallback

import inlay
from inlay.integrations.data import Example
from inlay.integrations.hooks import TrainingHooksCallback, load_training_state, save_training_state
from inlay.integrations.tasks import AbstractTask, Features
from inlay.integrations.train_config import TrainConfig

NOISE = ("runtime", "per_second", "preparation_time", "epoch")
BATCHES_SORTED = 8  # so many batches are sorted by length among themselves


class SimilarLengths(Sampler[int]):
    """A random order in which the rows of a batch have similar lengths; the same for the same seed and epoch.

    Rows are drawn at random, sorted by length some batches at a time, cut into batches, and the batches shuffled: what
    correlates with length must not correlate with time. A run that continues in the middle of an epoch sees exactly
    the rows that are left of it.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch by accelerate's data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        chunk = self.batch_size * BATCHES_SORTED
        for start in range(0, len(order), chunk):
            order[start : start + chunk] = sorted(order[start : start + chunk], key=lambda i: self.lengths[i])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        # The last one may be short, and a short one in the middle would shift the borders of all behind it.
        last = batches.pop() if batches and len(batches[-1]) < self.batch_size else []
        draw.shuffle(batches)
        for batch in [*batches, last]:
            yield from batch


class AdapterTrainer(transformers.Seq2SeqTrainer):  # type: ignore[misc]  # untyped
    """transformers' Trainer, taught that a checkpoint of an adapted model is an adapter.

    The greedy decoding it inherits is used by tasks that generate and dormant for the others.
    """

    adapter_task: AbstractTask
    lengths: list[int] | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = self.accelerator.unwrap_model(model or self.model)
        load_training_state(adapted, Path(resume_from_checkpoint))
        inlay.set_peft_model_state_dict(adapted, inlay.load_peft_weights(resume_from_checkpoint, device="cpu"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_training_state(self.accelerator.unwrap_model(self.model), Path(output_dir))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return SimilarLengths(self.lengths, batch, self.args.seed)

    def score(self, features: list[Features]) -> dict[str, float]:
        """The task's scores on ``features``, and the mean loss."""
        return _plain(self.evaluate(cast(Any, features)))

    def describe(
        self, rows: Sequence[Example], features: list[Features]
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """One line per row as the task describes it, and the scores where the rows have answers."""
        output = self.predict(cast(Any, features))
        kept, labels = output.predictions, cast(Any, output.label_ids)
        lines = []
        for i, row in enumerate(rows):
            mine = tuple(part[i] for part in kept) if isinstance(kept, tuple) else kept[i]
            described = self.adapter_task.describe(row.values, mine, None if labels is None else labels[i])
            lines.append({"row": row.index, **described})
        return lines, _plain(output.metrics or {})


def _plain(metrics: dict[str, float]) -> dict[str, float]:
    """The Trainer's metrics without its prefixes and timings."""
    ours = {key.removeprefix("eval_").removeprefix("test_"): value for key, value in metrics.items()}
    return {key: float(value) for key, value in ours.items() if not any(word in key for word in NOISE)}


def build_trainer(
    model: Any,
    task: AbstractTask,
    config: TrainConfig,
    folder: Path,
    train: list[Features],
    held_out: list[Features],
    callbacks: Iterable[transformers.TrainerCallback] = (),
) -> AdapterTrainer:
    """A silent trainer for an adapted model, or for a plain one to predict with; then both lists are empty."""
    if config.training.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = AdapterTrainer(
        model=model,
        args=_arguments(config, task, folder),
        data_collator=task.collate,
        train_dataset=cast(Any, train),
        eval_dataset=cast(Any, held_out),
        callbacks=list(callbacks),
        compute_metrics=lambda output: task.scores(output.predictions, output.label_ids),
        preprocess_logits_for_metrics=None if task.generates else cast(Any, task.reduce),
    )
    trainer.remove_callback(PrinterCallback)
    if isinstance(model, inlay.PeftModel):
        trainer.add_callback(TrainingHooksCallback())
    trainer.adapter_task = task
    if config.training.group_by_length:
        trainer.lengths = [len(row["input_ids"]) for row in train]
    return trainer


def _arguments(config: TrainConfig, task: AbstractTask, folder: Path) -> transformers.Seq2SeqTrainingArguments:
    training, cpu = config.training, not torch.accelerator.is_available()
    return transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder),
        use_cpu=cpu,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.held_out_batch_size,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip,
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        **(_checkpointing() if training.gradient_checkpointing else {}),
        seed=training.seed,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=training.keep_checkpoints,
        logging_steps=training.log_steps,
        eval_strategy="no" if training.evaluate_steps is None else "steps",
        eval_steps=training.evaluate_steps,
        predict_with_generate=task.generates,
        generation_max_length=config.data.max_target_length,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        report_to=[],
        disable_tqdm=True,
    )


def _checkpointing() -> dict[str, Any]:
    """The settings for recomputing activations, by the name that this version of transformers has for them."""
    known = transformers.Seq2SeqTrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
