"""Figures of merit, each a few lines over numpy arrays. ``IGNORED`` marks positions that do not count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
Ids = NDArray[np.integer[Any]]


def accuracy(predicted: Ids, labels: Ids) -> float:
    """The share of counted positions where both agree; NaN where nothing counts.

    Example:
        >>> accuracy(np.array([1, 2, 3]), np.array([1, 0, -100]))
        0.5
    """
    counted = labels != IGNORED
    return float((predicted[counted] == labels[counted]).mean()) if counted.any() else math.nan


def rows_exact(predicted: Ids, labels: Ids) -> NDArray[np.bool_]:
    """Per row of two (B, T) arrays, whether every counted position agrees."""
    exact: NDArray[np.bool_] = ((predicted == labels) | (labels == IGNORED)).all(axis=1)
    return exact


def perplexity(mean_loss: float) -> float:
    """``exp`` of a mean negative log-likelihood, infinite where it would overflow.

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, inf)
    """
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def exact_match(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of answers that are the wanted text, blanks at the ends aside.

    Example:
        >>> exact_match(["yes ", "no"], ["yes", "maybe"])
        0.5
    """
    return sum(a.strip() == b.strip() for a, b in zip(predicted, wanted, strict=True)) / max(1, len(wanted))
