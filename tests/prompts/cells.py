"""The cells of the grid: every way to learn a prompt x task class x architecture, and which of them cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from prompts.models import ARCHITECTURES, inputs_of, model_of
from torch import Tensor

import inlay
from inlay.prompts import PROMPTS

T = 4


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        config: Fields of its config.
        call: Arguments of each call beside the input's, for a batch of B rows.
        tasks: The task classes it is for; all if not given.
    """

    config: Mapping[str, Any]
    call: Callable[[int], dict[str, Any]] = lambda B: {}
    tasks: tuple[str, ...] | None = None


METHODS: dict[str, Method] = {
    "PROMPT_TUNING": Method({"num_virtual_tokens": T}),
    "PREFIX_TUNING": Method({"num_virtual_tokens": T}),
    "P_TUNING": Method({"num_virtual_tokens": T, "encoder_hidden_size": 8}),
    "MULTITASK_PROMPT_TUNING": Method(
        {"num_virtual_tokens": T, "num_tasks": 3, "num_ranks": 2}, call=lambda B: {"task_ids": torch.arange(B) % 3}
    ),
    "CPT": Method({"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]}, tasks=("CAUSAL_LM",)),
    "CARTRIDGE": Method({"num_virtual_tokens": T}),
}
WAYS = {"front": "PROMPT_TUNING", "cache": "PREFIX_TUNING"}

LOOKS_IN_IDS = "looks for the end of the input in its ids"
NO_CACHE = "stands in the cache of keys and values, and .* reads none"
#: way in -> {(architecture, task): why it cannot be}
UNSUPPORTED: dict[str, dict[tuple[str, str], str]] = {
    "front": {("t5", "SEQ_CLS"): LOOKS_IN_IDS, ("bart", "SEQ_CLS"): LOOKS_IN_IDS},
    "cache": {
        ("t5", "TOKEN_CLS"): NO_CACHE,
        ("t5", "QUESTION_ANS"): NO_CACHE,
        **{("distilbert", task): NO_CACHE for task in ARCHITECTURES["distilbert"].tasks},
    },
}
#: way in -> the cells that peft 0.21.2 fails in, of those above; it was run on all
FAIL_IN_PEFT: dict[str, set[tuple[str, str]]] = {
    "front": {(a, t) for a in ("t5", "bart") for t in ("SEQ_CLS", "QUESTION_ANS")},
    "cache": {
        *((a, t) for a in ("t5", "bart") for t in ("SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")),
        ("t5", "TOKEN_CLS"),
        *(("distilbert", t) for t in ARCHITECTURES["distilbert"].tasks),
    },
}
TOKENWISE = ("CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
SEQ2SEQ = ("t5", "bart")
#: the architectures that every method is tested on; the others, by one method of each way in
FIVE = ("llama", "gpt2", "t5", "bart", "bert")


@dataclass(frozen=True)
class Cell:
    """One method before one model."""

    method: str
    architecture: str
    task: str
    row: Method = field(repr=False)

    @property
    def way(self) -> str:
        return "cache" if PROMPTS[self.method].config.in_cache else "front"

    @property
    def reason(self) -> str | None:
        """Why it cannot be."""
        return UNSUPPORTED[self.way].get((self.architecture, self.task))

    @property
    def fails_in_peft(self) -> bool:
        """Whether peft 0.21.2 has no such cell; it was run on all."""
        untold = self.method == "MULTITASK_PROMPT_TUNING" and self.task in ("QUESTION_ANS", "FEATURE_EXTRACTION")
        apart = self.method == "CPT" and self.architecture == "opt"  # embeddings of a width of their own
        return untold or apart or (self.architecture, self.task) in FAIL_IN_PEFT[self.way]

    @property
    def seq2seq(self) -> bool:
        return self.architecture in SEQ2SEQ and self.task not in ("CAUSAL_LM", "TOKEN_CLS")

    @property
    def numbered(self) -> bool:
        """Whether the model takes positions."""
        return not self.seq2seq and self.architecture not in ("bloom", "t5", "bart")

    def config(self) -> Any:
        return PROMPTS[self.method].config(task_type=self.task, **self.row.config)

    def handle(self) -> Any:
        torch.manual_seed(0)
        return inlay.get_peft_model(model_of(self.architecture, self.task), self.config()).eval()

    def inputs(self, B: int = 3, padded: bool = True) -> dict[str, Any]:
        return {**inputs_of(self.architecture, self.task, B, padded=padded), **self.row.call(B)}

    def front(self) -> int:
        """How many tokens the prompt adds to what the model gives for each token."""
        if self.seq2seq:  # there the encoder has it, and by one method the decoder too
            return T if self.method == "MULTITASK_PROMPT_TUNING" and self.task == "SEQ_2_SEQ_LM" else 0
        return T if self.way == "front" and self.task in TOKENWISE else 0


def supported(methods: Iterable[str], unless: Callable[[Cell], object] = lambda cell: None) -> list[Any]:
    """The cells that can be, as parameters of a test; ``unless`` says for which of them a law does not hold."""
    found = (cell for cell in cells(methods) if not cell.reason and not unless(cell))
    return [pytest.param(c, id=f"{c.method}-{c.architecture}-{c.task}", marks=_often(c)) for c in found]


def _often(cell: Cell) -> list[Any]:
    known = cell.method in WAYS.values() or cell.architecture in FIVE
    return [] if known else [pytest.mark.slow]


def cells(methods: Iterable[str]) -> Iterator[Cell]:
    for method in methods:
        row = METHODS[method]
        for name, architecture in ARCHITECTURES.items():
            for task in architecture.tasks:
                if row.tasks is None or task in row.tasks:
                    yield Cell(method, name, task, row)


def tensors(outputs: Any) -> dict[str, Tensor]:
    """The numbers that a model gives, without what it computed on the way."""
    return {
        k: v for k, v in outputs.items() if isinstance(v, Tensor) and k not in ("encoder_last_hidden_state", "loss")
    }
