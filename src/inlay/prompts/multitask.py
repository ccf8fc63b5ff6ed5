"""Multitask prompt tuning, Wang et al. 2023 (https://arxiv.org/abs/2303.02861).

One prompt P (T, D) is shared by K tasks, and each has a matrix of low rank that scales it entry by entry:

    P_k = P * (C_k R_k),   C_k: T x R,  R_k: R x D

A prompt for a new task may start where the tasks of another one ended.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.config import RANKS, within
from inlay.errors import PromptError, TaskIndexError
from inlay.formats import files
from inlay.prompts._abstract import EMBEDDINGS, AbstractPrompt, Host, put, table
from inlay.prompts.prompt_tuning import PromptTuningConfig, start_at_tokens

_COLS, _ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(str, enum.Enum):
    """Where the prompt starts: as in prompt tuning, or at a file of source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"  # their prompt, the mean of their factors
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"  # their prompt, the factors of one of them
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"  # their prompt, new factors


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Config of multitask prompt tuning; calls take ``task_ids``, one for each row.

    Args:
        prompt_tuning_init (`MultitaskPromptTuningInit` or `str`, *optional*, defaults to ``"RANDOM"``): ``"RANDOM"``,
            ``"TEXT"``, ``"AVERAGE_SOURCE_TASKS"``, ``"EXACT_SOURCE_TASK"`` or ``"ONLY_SOURCE_SHARED"``.
        prompt_tuning_init_state_dict_path (`str`, *optional*): The weights file of the source tasks, safetensors or
            a pickle of tensors.
        prompt_tuning_init_task (`int`, *optional*, defaults to 0): Which of them ``"EXACT_SOURCE_TASK"`` takes.
        num_ranks (`int`, *optional*, defaults to 1): R, the rank of a task's matrix.
        num_tasks (`int`, *optional*, defaults to 1): K, the number of tasks.

    Example:
        >>> MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, num_tasks=3).num_ranks
        1
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM.value
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = field(default=0, metadata=within("[0, 2147483647]"))
    num_ranks: int = field(default=1, metadata=within(RANKS))
    num_tasks: int = field(default=1, metadata=within(RANKS))

    method = "MULTITASK_PROMPT_TUNING"
    example = {"num_virtual_tokens": 8, "num_tasks": 2}
    starts = tuple(kind.value for kind in MultitaskPromptTuningInit)


class MultitaskPromptEmbedding(AbstractPrompt):
    """A shared table of embeddings and each task's two factors."""

    def __init__(self, config: MultitaskPromptTuningConfig, host: Host) -> None:
        super().__init__(config, host)
        self.alone = config.num_transformer_submodules == 2  # it stands before the decoder too
        T, D = config.shape
        self.embedding = table(T, D)
        self.prefix_task_cols = nn.Parameter(0.02 * torch.randn(config.num_tasks, T, config.num_ranks))
        self.prefix_task_rows = nn.Parameter(0.02 * torch.randn(config.num_tasks, config.num_ranks, D))

    def start(self, host: Host) -> None:
        kind = MultitaskPromptTuningInit(self.config.prompt_tuning_init)
        if kind in ("RANDOM", "TEXT"):
            start_at_tokens(self.config, host, self.embedding.weight)
            return
        names = [EMBEDDINGS] if kind == "ONLY_SOURCE_SHARED" else [EMBEDDINGS, _COLS, _ROWS]
        found = self._source(names)
        if kind == "EXACT_SOURCE_TASK":
            task, K = self.config.prompt_tuning_init_task, min(len(found[_COLS]), len(found[_ROWS]))
            if task >= K:
                raise TaskIndexError(f"prompt_tuning_init_task is {task}, the file has the tasks 0 to {K - 1}.")
            found = {n: t if n == EMBEDDINGS else t[task] for n, t in found.items()}
        elif kind == "AVERAGE_SOURCE_TASKS":
            found = {n: t if n == EMBEDDINGS else t.mean(0) for n, t in found.items()}
        for name, value in found.items():  # each of the new tasks starts at the same factors
            put(self.filed()[name], value)

    def _source(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors of the file of source tasks."""
        path = self.config.prompt_tuning_init_state_dict_path
        if path is None:
            raise PromptError(
                "A start at source tasks needs prompt_tuning_init_state_dict_path, their weights file: give it, or "
                "choose another prompt_tuning_init."
            )
        with files.Weights(Path(path)) as weights:
            shapes = {name: info.shape for name, info in weights.header.items()}
            for name in names:
                wanted = self.filed_shapes()[name]
                found = shapes.get(name)
                if found is None or found[name != EMBEDDINGS :] != wanted[name != EMBEDDINGS :]:
                    raise PromptError(
                        f"{path} has {'no' if found is None else f'a {tuple(found)}'} {name}, the prompt takes one of "
                        f"shape {wanted}: num_virtual_tokens, num_ranks and the model have to be those of the source."
                    )
            tensors = {name: t for name, t in weights.each() if name in names}
        if not all(t.isfinite().all() for t in tensors.values()):
            raise PromptError(f"{path} has NaN or infinity in it: the source tasks were not trained well.")
        return tensors

    def forward(self, task_ids_B: Tensor | None = None) -> Tensor:
        if task_ids_B is None:
            raise PromptError(
                "task_ids cannot be None, as it is one of several tasks' prompts: give task_ids of the rows."
            )
        K = len(self.prefix_task_cols)
        low, high = (0, 0) if task_ids_B.is_meta else (int(v) for v in task_ids_B.aminmax())
        if low < 0 or high >= K:
            raise TaskIndexError(f"task_ids has {low if low < 0 else high}, the prompt has the tasks 0 to {K - 1}.")
        C_BTR, R_BRD = self.prefix_task_cols[task_ids_B], self.prefix_task_rows[task_ids_B]
        return self.embedding.weight * (C_BTR @ R_BRD)

    def filed(self) -> dict[str, Tensor]:
        return {EMBEDDINGS: self.embedding.weight, _COLS: self.prefix_task_cols, _ROWS: self.prefix_task_rows}

    def filed_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self.filed().items()}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        for name, t in self.filed().items():
            if name in tensors:
                put(t, tensors[name])
