"""What a file and a model have to say about each other: the report of a load, and the fingerprint of a base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inlay.errors import IncompatibleBaseError, LoadError, NonFiniteError

if TYPE_CHECKING:
    import torch

BASE_KEY = "inlay_base"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Every place where a file and the adapter it is loaded into disagree.

    It stands in for what ``load_state_dict`` returns: ``missing_keys``, ``unexpected_keys`` and
    ``missing, unexpected = report``.

    Example:
        >>> report = LoadReport(missing=["q.lora_A.weight"])
        >>> report.ok, report.missing_keys
        (False, ['q.lora_A.weight'])
        >>> print(report.summary().splitlines()[0])
        missing adapter keys: 1 tensor missing from the file: 'q.lora_A.weight'.
    """

    missing: list[str] = field(default_factory=list)  # keys that the adapter needs and the file has not
    unexpected: list[str] = field(default_factory=list)  # keys that the file has and nothing takes
    # Key, shape in the file, shape in the model.
    shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    # Key, dtype in the file, dtype in the model. Values are converted: a note, not a problem.
    dtype: list[tuple[str, torch.dtype, torch.dtype]] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)  # keys whose tensor holds NaN or infinity
    config: list[str] = field(default_factory=list)  # sentences on where the config contradicts the weights
    # Sentences on where the base model is not the one that the adapter was made for.
    base: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # sentences that change no result
    live: dict[str, str] = field(default_factory=dict)  # key -> name in the model, where the adapter stands in one

    @property
    def ok(self) -> bool:
        """Whether nothing in it would silently change results."""
        return not (self.missing or self.unexpected or self.shape or self.non_finite or self.config or self.base)

    @property
    def missing_keys(self) -> list[str]:
        """``missing``, and what is of another shape, as torch would name them: with the adapter's name in them."""
        return [self.live.get(key, key) for key in [*self.missing, *(key for key, *_ in self.shape)]]

    @property
    def unexpected_keys(self) -> list[str]:
        """``unexpected``, likewise."""
        return [self.live.get(key, key) for key in self.unexpected]

    def __iter__(self) -> Iterator[list[str]]:
        yield self.missing_keys
        yield self.unexpected_keys

    def summary(self) -> str:
        """One line per kind of finding, with the first few keys, and what to do."""
        shapes = [
            f"{key!r} is {list(file)} in the file, {list(model)} in the model" for key, file, model in self.shape
        ]
        dtypes = [f"{key!r} from {file} to {model}" for key, file, model in self.dtype]
        findings = [
            ("made for another base model", self.base),
            ("config contradicts the weights", self.config),
            (f"{_tensors(shapes)} of another shape (size mismatch)", shapes),
            (f"missing adapter keys: {_tensors(self.missing)} missing from the file", [*map(repr, self.missing)]),
            (f"{_tensors(self.unexpected)} in the file that nothing takes", [*map(repr, self.unexpected)]),
            (f"{_tensors(self.non_finite)} with NaN or infinity", [*map(repr, self.non_finite)]),
            (f"note: {_tensors(dtypes)} converted", dtypes),
        ]
        lines = [f"{what}: {_some(places)}." for what, places in findings if places]
        lines += [f"note: {note.rstrip('.')}." for note in self.notes]
        if not self.ok:
            lines.append(f"{self._verdict()[1]}.")
        return "\n".join(lines) or "The file and the adapter agree."

    __str__ = summary

    def raise_for_problems(self, forgivable: bool = False) -> None:
        """Raises the error that fits, with this report as its ``report``; does nothing if all is well.

        Args:
            forgivable (`bool`, *optional*, defaults to `False`): Say that ``strict=False`` loads it nevertheless.

        Raises:
            IncompatibleBaseError: The adapter was made for another base.
            LoadError: Keys, shapes or the config do not fit.
            NonFiniteError: Everything fits, and some values are NaN or infinite.
        """
        if not self.ok:
            left = ", and what is missing stays as the model has it" if self.missing else ""
            hint = f" strict=False loads it as it is, with a warning{left}." if forgivable else ""
            told = f"The adapter does not fit; nothing was loaded.\n{self.summary()}{hint}"
            raise self._verdict()[0](told, self)

    def _verdict(self) -> tuple[type[LoadError], str]:
        """What the problems amount to, and what to do about them."""
        if self.base:
            return IncompatibleBaseError, "Load it onto the base model it was made for"
        if self.missing or self.unexpected or self.shape or self.config:
            return LoadError, "Check that the adapter belongs to this model and config"
        return NonFiniteError, "Take an earlier checkpoint: training has diverged or the file is damaged"


def _tensors(places: list[str]) -> str:
    return f"{len(places)} tensor{'' if len(places) == 1 else 's'}"


def _some(places: list[str]) -> str:
    more = len(places) - _SHOWN
    return "; ".join(place.rstrip(".") for place in places[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def base_fingerprint(names_and_shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """A fingerprint of the layers that an adapter sits on: their names and the shapes of their weights, in any order.

    It tells another architecture or size from the one that was trained on; it does not look at values, so that a base
    in another dtype, quantised, or on the meta device has the same.

    Args:
        names_and_shapes (`Iterable[tuple[str, tuple[int, ...]]]`): Per target layer.

    Returns:
        `str`: ``"v1:"`` and a SHA-256. It is stored in the weights' metadata as ``inlay_base``.

    Example:
        >>> base_fingerprint([("q", (2, 3)), ("k", (2, 2))]) == base_fingerprint([("k", (2, 2)), ("q", (2, 3))])
        True
    """
    lines = sorted(f"{name}\0{','.join(map(str, map(int, shape)))}\n" for name, shape in names_and_shapes)
    return f"v1:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
