"""The four tasks: how a row becomes tensors, and tensors become figures and predictions.

To add one: a class here, a row in ``TASKS``, its columns in `data.columns`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from inlay.integrations.data import Example, words
from inlay.integrations.train_config import DataSection

Features = dict[str, Any]
Ids = NDArray[np.integer[Any]]
IGNORED = -100  # a position that does not count
PADDING = {"attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}


def accuracy(predicted: Ids, labels: Ids) -> float:
    """The share of counted positions where both agree; NaN where nothing counts.

    Example:
        >>> accuracy(np.array([1, 2, 3]), np.array([1, 0, -100]))
        0.5
    """
    counted = labels != IGNORED
    return float((predicted[counted] == labels[counted]).mean()) if counted.any() else math.nan


def rows_exact(predicted_BT: Ids, labels_BT: Ids) -> float:
    """The share of rows in which every counted position agrees."""
    return float(((predicted_BT == labels_BT) | (labels_BT == IGNORED)).all(axis=1).mean())


def perplexity(cost: NDArray[np.floating[Any]]) -> float:
    """``exp`` of a mean negative log-likelihood, infinite where it would overflow."""
    mean = float(cost.astype(np.float64).mean())
    return math.exp(mean) if mean < 700 else math.inf


def _logits(output: Any) -> Tensor:
    """The logits of one batch; encoder-decoders return more beside them."""
    logits: Tensor = output[0] if isinstance(output, tuple) else output
    return logits


class AbstractTask(abc.ABC):
    """What differs between tasks.

    Args:
        data (`DataSection`): Names of columns and lengths.
        tokenizer: The model's tokenizer.
        labels (`list[str]`): All classes; empty for language modelling.
    """

    auto_class: ClassVar[str]
    task_type: ClassVar[str]
    metric: ClassVar[str]  # the figure that the task is judged by: its key among the scores
    generates: ClassVar[bool] = False

    def __init__(self, data: DataSection, tokenizer: Any, labels: list[str]) -> None:
        self.data, self.tokenizer, self.labels = data, tokenizer, labels
        self.ids = {label: i for i, label in enumerate(labels)}

    @abc.abstractmethod
    def encode(self, row: dict[str, Any]) -> Features:
        """The tensors of one row, unpadded; ``labels`` only where the row has its answer."""

    def reduce(self, logits: Any, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What is kept of one batch's logits: the likeliest; run on the device, before anything is gathered."""
        return _logits(logits).argmax(-1)

    @abc.abstractmethod
    def scores(self, kept: Any, labels_BT: Any) -> dict[str, float]:
        """The figures over a whole held-out part, ``metric`` among them."""

    @abc.abstractmethod
    def describe(self, row: dict[str, Any], kept: Any, labels_T: Any) -> dict[str, Any]:
        """One row's line in the file of predictions; ``kept`` is the row's part of what `reduce` kept."""

    def collate(self, rows: list[Features]) -> dict[str, Tensor]:
        """One batch, padded on the right to its longest row."""
        padding = {"input_ids": self.tokenizer.pad_token_id, **PADDING}
        batch = {}
        for key in rows[0]:
            values = [torch.tensor(row[key], dtype=torch.long) for row in rows]
            single = values[0].dim() == 0
            batch[key] = torch.stack(values) if single else pad_sequence(values, True, padding[key])
        return batch

    def tokenized(self, *texts: Any, max_length: int, **options: Any) -> Any:
        """The tokenizer's output for a text or a pair, cut to ``max_length``."""
        return self.tokenizer(*texts, truncation=True, max_length=max_length, **options)


class CausalLM(AbstractTask):
    """Continue a text; with a target column, only the answer is learned and judged."""

    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"
    metric = "perplexity"

    def encode(self, row: dict[str, Any]) -> Features:
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        room = self.data.max_length - len(end)
        prompt = self.tokenized(row[self.data.text], max_length=room)["input_ids"]
        answer: list[int] = []
        if self.data.target is not None:
            limit = min(self.data.max_target_length, room - 1)
            answer = self.tokenized(row[self.data.target], max_length=limit, add_special_tokens=False)["input_ids"]
            # The end of a prompt says what is asked: where both do not fit, its beginning goes.
            prompt = prompt[-(room - len(answer)) :]
        ids = [*prompt, *answer, *end]
        hidden = len(prompt) if self.data.target is not None else 0
        labels = [IGNORED] * hidden + ids[hidden:]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def reduce(self, logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For logits (B, T, V): the token predicted after each position, and what the true one cost, both (B, T)."""
        logits_BTV = _logits(logits)
        next_BT = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        cost_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), next_BT, reduction="none", ignore_index=IGNORED)
        return logits_BTV.argmax(-1), cost_BT

    def scores(self, kept: Any, labels_BT: Any) -> dict[str, float]:
        predicted_BT, cost_BT = kept[0][:, :-1], kept[1][:, :-1]
        wanted_BT = labels_BT[:, 1:]
        scores = {
            "perplexity": perplexity(cost_BT[wanted_BT != IGNORED]),
            "token_accuracy": accuracy(predicted_BT, wanted_BT),
        }
        if self.data.target is not None:
            # Greedy decoding gives exactly the answer if and only if every token is the likeliest after the true ones.
            scores["exact_match"] = rows_exact(predicted_BT, wanted_BT)
        return scores

    def describe(self, row: dict[str, Any], kept: Any, labels_T: Any) -> dict[str, Any]:
        wanted_T = labels_T[1:]
        counted = wanted_T != IGNORED
        predicted_T, cost_T = kept[0][:-1][counted], kept[1][:-1][counted]
        line = {
            "text": row[self.data.text],
            "next_tokens": self.tokenizer.decode(predicted_T, skip_special_tokens=True),
            "perplexity": perplexity(cost_T),
            "token_accuracy": accuracy(predicted_T, wanted_T[counted]),
        }
        if self.data.target is not None:
            line |= {"target": row[self.data.target], "exact": bool((predicted_T == wanted_T[counted]).all())}
        return line


class Seq2Seq(AbstractTask):
    """Answer a text with a text, by greedy decoding."""

    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"
    metric = "exact_match"
    generates = True

    def encode(self, row: dict[str, Any]) -> Features:
        features = dict(self.tokenized(row[self.data.text], max_length=self.data.max_length))
        target = row.get(self.data.target or "")
        if target is not None:
            answer = self.tokenized(text_target=target, max_length=self.data.max_target_length)
            features["labels"] = answer["input_ids"]
        return features

    def scores(self, kept: Any, labels_BT: Any) -> dict[str, float]:
        equal = [a == b for a, b in zip(self._texts(kept), self._texts(labels_BT), strict=True)]
        return {"exact_match": sum(equal) / max(1, len(equal))}

    def describe(self, row: dict[str, Any], kept: Any, labels_T: Any) -> dict[str, Any]:
        return {
            "text": row[self.data.text],
            "target": row.get(self.data.target or ""),
            "predicted": self._texts(kept[None])[0],
        }

    def _texts(self, ids_BT: Any) -> list[str]:
        ids_BT = np.where(ids_BT == IGNORED, self.tokenizer.pad_token_id, ids_BT)
        return [text.strip() for text in self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]


class SequenceClassification(AbstractTask):
    """One class for a text or a pair of texts."""

    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    metric = "accuracy"

    def encode(self, row: dict[str, Any]) -> Features:
        texts = [row[self.data.text], *([row[self.data.text_pair]] if self.data.text_pair else [])]
        features = dict(self.tokenized(*texts, max_length=self.data.max_length))
        label = self.ids.get(str(row.get(self.data.label)))
        if label is not None:
            features["labels"] = label
        return features

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """The probabilities (B, classes)."""
        return _logits(logits).float().softmax(-1)

    def scores(self, kept: Any, labels_BT: Any) -> dict[str, float]:
        return {"accuracy": accuracy(kept.argmax(-1), labels_BT)}

    def describe(self, row: dict[str, Any], kept: Any, labels_T: Any) -> dict[str, Any]:
        best = int(kept.argmax())
        return {
            "text": row[self.data.text],
            "label": None if row.get(self.data.label) is None else str(row[self.data.label]),
            "predicted": self.labels[best],
            "probability": float(kept[best]),
        }


class TokenClassification(AbstractTask):
    """One class per word; the first piece of a word speaks for it."""

    auto_class = "AutoModelForTokenClassification"
    task_type = "TOKEN_CLS"
    metric = "accuracy"

    def encode(self, row: dict[str, Any]) -> Features:
        encoded = self._pieces(words(row[self.data.tokens]))
        features = dict(encoded)
        tags = [self.ids.get(tag, IGNORED) for tag in words(row.get(self.data.tags) or [])]
        if tags:
            features["labels"] = [IGNORED if w is None else tags[w] for w in first_pieces(encoded.word_ids())]
        return features

    def scores(self, kept: Any, labels_BT: Any) -> dict[str, float]:
        return {"accuracy": accuracy(kept, labels_BT), "exact_match": rows_exact(kept, labels_BT)}

    def describe(self, row: dict[str, Any], kept: Any, labels_T: Any) -> dict[str, Any]:
        tokens = words(row[self.data.tokens])
        pieces = first_pieces(self._pieces(tokens).word_ids())
        found = {w: self.labels[int(kept[i])] for i, w in enumerate(pieces) if w is not None}
        return {
            "tokens": tokens,
            "tags": None if row.get(self.data.tags) is None else words(row[self.data.tags]),
            "predicted": [found.get(i) for i in range(len(tokens))],  # None: cut off by max_length
        }

    def _pieces(self, tokens: list[str]) -> Any:
        return self.tokenized(tokens, max_length=self.data.max_length, is_split_into_words=True)


def first_pieces(word_ids: Iterable[int | None]) -> list[int | None]:
    """``word_ids`` with every piece but a word's first one set to None.

    Example:
        >>> first_pieces([None, 0, 0, 1, None])
        [None, 0, None, 1, None]
    """
    ids = list(word_ids)
    return [None if i and ids[i - 1] == word else word for i, word in enumerate(ids)]


TASKS: dict[str, type[AbstractTask]] = {
    "causal-lm": CausalLM,
    "seq2seq": Seq2Seq,
    "sequence-classification": SequenceClassification,
    "token-classification": TokenClassification,
}


def examples_to_features(task: AbstractTask, rows: Iterable[Example]) -> list[Features]:
    """`AbstractTask.encode` over rows; answers that only some rows have, or of classes never seen, are left out."""
    features = [task.encode(row.values) for row in rows]
    if not all("labels" in row for row in features):
        features = [{key: value for key, value in row.items() if key != "labels"} for row in features]
    return features
