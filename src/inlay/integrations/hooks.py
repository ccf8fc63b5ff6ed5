"""transformers' Trainer drives what methods ask of training: `inlay.hooks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file

from inlay.model import PeftModel

STATE_NAME = "training_hooks.safetensors"


class TrainingHooksCallback(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    """Calls `update_and_allocate` after each step of the optimiser, and keeps what it remembers in checkpoints.

    Does nothing for methods that ask nothing of training. What a method wants to know of the length of the training,
    such as AdaLoRA's ``total_step``, is filled in where the config leaves it out.

    Example:
        >>> import transformers
        >>> issubclass(TrainingHooksCallback, transformers.TrainerCallback)
        True
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.begin_training(state.max_steps)
        if state.global_step:
            load_training_state(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        # A step that was left out for gradients beyond fp16 says nothing about importance either.
        if not getattr(optimizer, "step_was_skipped", False):
            model.base_model.update_and_allocate(state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and not (folder / STATE_NAME).exists():
            save_training_state(model, folder)


def save_training_state(model: PeftModel, folder: Path) -> None:
    """Writes what the methods of ``model`` remember of training into a checkpoint; nothing where they do not."""
    tensors = {key: t.contiguous() for key, t in model.base_model.training_state().items()}
    if tensors:
        save_file(tensors, folder / STATE_NAME)


def load_training_state(model: PeftModel, folder: Path) -> None:
    """Takes it up again, where it is there."""
    if (folder / STATE_NAME).is_file():
        model.base_model.load_training_state(load_file(folder / STATE_NAME))
