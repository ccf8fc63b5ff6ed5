"""A figure, its goal, and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.timing import Measured, Missing, Outcome

Against = Literal["base", "floor", "incumbent", "value"]
Number = float | Missing


@dataclass(frozen=True)
class Goal:
    """What the candidate should reach.

    Args:
        limit: The number.
        against: What it limits: the ratio over the base or over the floor (at most), how many times quicker than the
            incumbent (at least), or the value itself (at most).
    """

    limit: float
    against: Against = "base"

    def text(self, unit: str) -> str:
        if self.against == "incumbent":
            return f">= {self.limit:g}x faster"
        if self.against == "value":
            return f"<= {absolute(self.limit, unit)}"
        return f"<= {self.limit:.2f}x of {self.against}"


@dataclass(frozen=True)
class Entry:
    """One measured thing and, where the figure is a ratio, what it is divided by."""

    value: Outcome
    base: Outcome | None = None

    @property
    def ratio(self) -> Number | None:
        return None if self.base is None else divide(self.value, self.base)


@dataclass(frozen=True)
class Figure:
    """One row. `unit` is "s", "B" or "tokens"; `goal` is None where the figure is only shown."""

    name: str
    incumbent: Entry
    candidate: Entry
    goal: Goal | None = None
    floor: Entry | None = None
    unit: str = "s"

    @property
    def achieved(self) -> Number | None:
        """The candidate's number that the goal speaks of."""
        if self.goal is None:
            return None
        match self.goal.against:
            case "base":
                return self.candidate.ratio
            case "floor":
                return None if self.floor is None else divide(self.candidate.value, self.floor.value)
            case "incumbent":
                return divide(self.incumbent.value, self.candidate.value)
            case "value":
                return number(self.candidate.value)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none. What is missing has not reached it."""
        if self.goal is None:
            return None
        if not isinstance(self.achieved, float):
            return False
        if self.goal.against == "incumbent":
            return self.achieved >= self.goal.limit
        return self.achieved <= self.goal.limit


def figure(
    name: str,
    outcomes: dict[str, Outcome],
    goal: Goal | None = None,
    *,
    base: str | None = None,
    floor: str | None = None,
    suffix: str = "",
    unit: str = "s",
) -> Figure:
    """The row of a race, its columns found by name; `suffix` tells several pairs of one race apart."""
    divisor = None if base is None else outcomes[base]
    return Figure(
        name,
        incumbent=Entry(outcomes["incumbent" + suffix], divisor),
        candidate=Entry(outcomes["candidate" + suffix], divisor),
        floor=None if floor is None else Entry(outcomes[floor], divisor),
        goal=goal,
        unit=unit,
    )


def number(outcome: Outcome) -> Number:
    return outcome.best if isinstance(outcome, Measured) else outcome


def divide(above: Outcome, below: Outcome) -> Number:
    """The quotient of the two bests, or the reason why there is none."""
    if isinstance(above, Missing):
        return above
    if isinstance(below, Missing):
        return below
    return above.best / below.best


def absolute(value: float, unit: str) -> str:
    """A number with its unit: seconds in the size that fits, bytes in MB of a million, tokens by number."""
    if unit == "tokens":
        return f"{value:,.0f} tokens"
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms"


# --- the table ---------------------------------------------------------------------------------------------------


WIDEST_MISSING = 36
HEAD = ("figure", "base", "floor", "{incumbent}", "{candidate}", "goal", "reached", "met?")


def table(figures: Sequence[Figure], *, incumbent: str, candidate: str) -> str:
    """The figures as aligned text, with what is missing and why below it."""
    head = [cell.format(incumbent=incumbent, candidate=candidate) for cell in HEAD]
    rows = [head, *(cells(one) for one in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    judged = [one for one in figures if one.met is not None]
    lines += missing_lines(figures) + cut_lines(figures)
    lines += ["", f"{sum(bool(one.met) for one in judged)} of {len(judged)} goals met"]
    return "\n".join(lines)


def missing_lines(figures: Sequence[Figure]) -> list[str]:
    """Every reason why a number is missing, once and in full."""
    outcomes = [entry.value for one in figures for entry in (one.incumbent, one.candidate, one.floor) if entry]
    reasons = dict.fromkeys(outcome.error for outcome in outcomes if isinstance(outcome, Missing))
    return ["", *(f"missing: {reason}" for reason in reasons)] if reasons else []


def cut_lines(figures: Sequence[Figure]) -> list[str]:
    """Which figures had fewer runs than they should, for want of time."""
    told = []
    for one in figures:
        entries = [entry for entry in (one.incumbent, one.candidate, one.floor) if entry]
        outcomes = [outcome for entry in entries for outcome in (entry.value, entry.base)]
        if runs := [len(outcome.samples) for outcome in outcomes if isinstance(outcome, Measured) and outcome.cut]:
            told.append(f"cut short after {min(runs)} run{'s' if min(runs) > 1 else ''} of each: {one.name}")
    return ["", *told] if told else []


def cells(one: Figure) -> list[str]:
    goal, met = one.goal, one.met
    return [
        one.name,
        _base_cell(one),
        "-" if one.floor is None else _entry_cell(one.floor, one.unit),
        _entry_cell(one.incumbent, one.unit),
        _entry_cell(one.candidate, one.unit),
        "-" if goal is None else goal.text(one.unit),
        _reached_cell(one),
        "-" if met is None else "yes" if met else "NO",
    ]


def _base_cell(one: Figure) -> str:
    first, second = one.incumbent.base, one.candidate.base
    if first is None or second is None:
        return "-"
    if first is second:
        return _number_cell(number(first), one.unit)
    return " / ".join("-" if isinstance(base, Missing) else absolute(base.best, one.unit) for base in (first, second))


def _entry_cell(entry: Entry, unit: str) -> str:
    if entry.ratio is None or unit == "B":
        return _number_cell(number(entry.value), unit)
    return _ratio_cell(entry.ratio)


def _number_cell(value: Number, unit: str) -> str:
    return _missing_cell(value) if isinstance(value, Missing) else absolute(value, unit)


def _ratio_cell(value: Number) -> str:
    return _missing_cell(value) if isinstance(value, Missing) else f"{value:.2f}x"


def _missing_cell(missing: Missing) -> str:
    text = f"missing: {missing.error}"
    return text if len(text) <= WIDEST_MISSING else f"{text[: WIDEST_MISSING - 3]}..."


def _reached_cell(one: Figure) -> str:
    if one.goal is None or not isinstance(one.achieved, float):
        return "-"
    return absolute(one.achieved, one.unit) if one.goal.against == "value" else f"{one.achieved:.2f}x"


# --- raw numbers -------------------------------------------------------------------------------------------------


def record(group: str, one: Figure) -> dict[str, object]:
    """The figure as JSON can hold it: every sample, in seconds, bytes or tokens."""
    return {
        "group": group,
        "name": one.name,
        "unit": one.unit,
        "incumbent": _raw_entry(one.incumbent),
        "candidate": _raw_entry(one.candidate),
        "floor": None if one.floor is None else _raw_entry(one.floor),
        "goal": None if one.goal is None else {"limit": one.goal.limit, "against": one.goal.against},
        "reached": one.achieved if isinstance(one.achieved, float) else None,
        "met": one.met,
    }


def _raw_entry(entry: Entry) -> dict[str, object]:
    return {"value": _raw(entry.value), "base": None if entry.base is None else _raw(entry.base)}


def _raw(outcome: Outcome) -> dict[str, object]:
    if isinstance(outcome, Missing):
        return {"missing": outcome.error}
    return {"best": outcome.best, "samples": list(outcome.samples), "cut": outcome.cut}
