"""Regular expressions that may come from anyone's file, and so must not hang.

`re` is exact and fast, and on some patterns takes longer than the universe lasts: ``(([a-z])+)+X``. Here a pattern is
read first. Where the number of ways that `re` could try is provably small for the name at hand, `re` answers.
Otherwise the parsed pattern is evaluated as a relation between positions: a set of positions is the bits of one
integer, and every node maps the set where it may begin to the set where it may end, so that no position is ever tried
twice. A budget bounds what is left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from re import _compiler, _parser  # type: ignore[attr-defined]  # the parser that `re` itself uses; untyped
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from inlay.errors import PatternError

V = TypeVar("V")

# A pattern longer than this comes from no one who means well.
MAX_LENGTH = 10_000
_MAX_DEPTH = 50
# `re` may try this many ways on one name: a millisecond at the very worst.
_MAX_WAYS = 20_000
# Code points under (?i) that `re` would fold one by one while it compiles.
_MAX_FOLDED = 100_000

_WIDTHS = {
    _parser.LITERAL: 1,
    _parser.NOT_LITERAL: 1,
    _parser.ANY: 1,
    _parser.IN: 1,
    _parser.AT: 0,
    _parser.FAILURE: 0,
}
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT)
_LOOKS = (_parser.ASSERT, _parser.ASSERT_NOT)
_REFUSED = {
    _parser.GROUPREF: "a backreference",
    _parser.GROUPREF_EXISTS: "a conditional",
    _parser.ATOMIC_GROUP: "an atomic group",
    _parser.POSSESSIVE_REPEAT: "a possessive quantifier",
}

_Items = Sequence[tuple[Any, Any]]


@dataclass
class Budget:
    """What matching may cost in all, in steps of about a microsecond; may be shared by several patterns.

    Args:
        left (`int`, *optional*, defaults to 5,000,000): Steps that are left.
    """

    left: int = 5_000_000

    def spend(self, steps: int, pattern: str) -> None:
        """Takes ``steps`` away.

        Raises:
            PatternError: Nothing is left.
        """
        self.left -= steps
        if self.left < 0:
            raise PatternError(
                f"the pattern {_shown(pattern)} takes too long to match; avoid quantifiers inside quantifiers, "
                "such as (a+)+, and leave out what need not be checked."
            )


class Pattern:
    """A compiled pattern; made by `compile_pattern`.

    Args:
        source (`str`): The pattern.
        regex (`re.Pattern[str]`): The same, compiled by `re`.
        items (`Sequence`): The same, parsed.
        ways (`_Ways`): In how many ways `re` may try.
        budget (`Budget`): What matching may cost.
    """

    def __init__(self, source: str, regex: re.Pattern[str], items: _Items, ways: _Ways, budget: Budget) -> None:
        self.source = source
        self._regex = regex
        self._items = items
        self._ways = ways
        self._budget = budget
        self._text = _longest_text(items, regex.flags)
        self._root: _Node | None = None

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of ``name`` matches, as `re.fullmatch` has it.

        Raises:
            PatternError: The budget is spent.
        """
        if self._text not in name:
            return False
        ways = self._ways.on(name)
        if ways <= _MAX_WAYS:
            self._budget.spend(1 + ways // 100, self.source)
            return self._regex.fullmatch(name) is not None
        if self._root is None:
            self._root = _build(self._items, self._regex.flags)
        run = _Run(name, self.source, self._budget)
        return bool(self._root.move(run, 1, True) >> len(name) & 1)

    def __repr__(self) -> str:
        return f"Pattern({self.source!r})"


def compile_pattern(pattern: str, budget: Budget | None = None) -> Pattern:
    """Compiles a regular expression whose matching ends in reasonable time, whatever it is.

    Args:
        pattern (`str`): A regular expression as `re` has it, without backreferences, conditionals, atomic groups and
            possessive quantifiers.
        budget (`Budget`, *optional*): What matching may cost; an own one by default.

    Returns:
        `Pattern`: its ``fullmatch(name)`` is that of `re`.

    Raises:
        PatternError: The pattern is malformed, too long, nested too deeply, or holds what is not supported.

    Example:
        >>> bomb = compile_pattern(r"(([a-z_.0-9])+)+X")
        >>> bomb.fullmatch("a" * 60), bomb.fullmatch("a" * 60 + "X")
        (False, True)
    """
    if len(pattern) > MAX_LENGTH:
        raise PatternError(
            f"the pattern {_shown(pattern)} has {len(pattern):,} characters, at most {MAX_LENGTH:,} are taken; "
            "pass a list of names instead."
        )
    budget = budget or Budget()
    budget.spend(100 + 5 * len(pattern), pattern)
    try:
        parsed = _parser.parse(pattern, 0)
        ways = _Reader(pattern).sequence(parsed, parsed.state.flags, 0)
        regex: re.Pattern[str] = _compiler.compile(parsed, parsed.state.flags)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        raise PatternError(f"the pattern {_shown(pattern)} is malformed{where}: {error.msg}.") from error
    except OverflowError as error:
        raise PatternError(f"the pattern {_shown(pattern)} is malformed: {error}.") from error
    except RecursionError as error:
        raise _too_deep(pattern) from error
    return Pattern(pattern, regex, parsed, ways, budget)


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")


def _too_deep(pattern: str) -> PatternError:
    return PatternError(f"the pattern {_shown(pattern)} is nested too deeply; at most {_MAX_DEPTH} levels are taken.")


# ---------------------------------------------------------------------------- reading: how long could `re` take?


class _Ways(NamedTuple):
    """A bound on how many ways backtracking can try on a name of n characters.

    It is ``factor * (n + 1) ** power``, times the number of places of every text in ``after``: a ``.*`` that plain
    text follows goes on from there only.
    """

    factor: int = 1
    power: int = 0
    after: tuple[str, ...] = ()

    def times(self, other: _Ways) -> _Ways:
        return _Ways(min(self.factor * other.factor, 10**12), self.power + other.power, self.after + other.after)

    def plus(self, other: _Ways) -> _Ways:
        return _Ways(self.factor + other.factor, max(self.power, other.power), self.after + other.after)

    def on(self, name: str) -> int:
        size = len(name) + 1
        ways = int(self.factor * size ** min(self.power, 99))
        if self.after and ways <= _MAX_WAYS:
            ways *= 1 + size // 8  # looking for the text
            for text in self.after:
                ways *= max(1, _count(name, text))
        return ways


def _count(name: str, text: str) -> int:
    """In how many places ``text`` stands in ``name``, overlapping ones too."""
    count, at = 0, name.find(text)
    while at >= 0:
        count, at = count + 1, name.find(text, at + 1)
    return count


_ONE = _Ways()
_STAR = _Ways(1, 1)
_ENDLESS = _Ways(10**12)
_MAX_TEXTS = 10


class _Reader:
    """Walks a parsed pattern once: bounds the ways, refuses what cannot be supported or costs too much to compile."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.folded = 0

    def sequence(self, items: _Items, flags: int, depth: int) -> _Ways:
        if depth > _MAX_DEPTH:
            raise _too_deep(self.pattern)
        ways = _ONE
        for place, (op, av) in enumerate(items):
            once = self.item(op, av, flags, depth + 1)
            if once is _STAR and (text := _text(items, place + 1, flags)) and len(ways.after) < _MAX_TEXTS:
                once = _Ways(after=(text,))
            ways = ways.times(once)
        return ways

    def item(self, op: Any, av: Any, flags: int, depth: int) -> _Ways:
        if op in _REFUSED:
            raise PatternError(
                f"the pattern {_shown(self.pattern)} holds {_REFUSED[op]}, which is not supported; "
                "write out the cases."
            )
        if op is _parser.SUBPATTERN:
            return self.sequence(av[3], _scoped(flags, av[1], av[2]), depth)
        if op is _parser.BRANCH:
            ways = _Ways(0)
            for option in av[1]:
                ways = ways.plus(self.sequence(option, flags, depth))
            return ways
        if op in _LOOKS:
            return self.sequence(av[1], flags, depth)
        if op in _REPEATS:
            return self.repeat(int(av[0]), int(av[1]), av[2], flags, depth)
        if op is _parser.IN and flags & re.IGNORECASE:
            self.fold(av)
        return _ONE

    def repeat(self, least: int, most: int, body: _Items, flags: int, depth: int) -> _Ways:
        once = self.sequence(body, flags, depth)
        if _is_single(body):
            return _Ways(most - least + 1) if most - least <= 8 else _STAR
        if most > 4 or (most > 1 and (once.power or once.after)):
            return _ENDLESS
        ways, total = _ONE, _Ways(0)
        for count in range(most + 1):
            total = total.plus(ways) if count >= least else total
            ways = ways.times(once)
        return total

    def fold(self, members: _Items) -> None:
        self.folded += sum(av[1] - av[0] for op, av in members if op is _parser.RANGE)
        if self.folded > _MAX_FOLDED:
            raise PatternError(f"the pattern {_shown(self.pattern)} has too wide character ranges for (?i).")


def _scoped(flags: int, add: int, remove: int) -> int:
    """The flags inside ``(?add-remove:...)``."""
    kinds = re.ASCII | re.UNICODE | re.LOCALE
    if add & kinds:
        flags &= ~kinds
    return (flags | add) & ~remove


def _text(items: _Items, begin: int, flags: int) -> str:
    """The plain text that ``items`` have from ``begin`` on, or "" where case is ignored."""
    if flags & re.IGNORECASE:
        return ""
    literals = takewhile(lambda item: item[0] is _parser.LITERAL, islice(items, begin, None))
    return "".join(chr(av) for _, av in literals)


def _longest_text(items: _Items, flags: int) -> str:
    """A plain text that every match holds, or ""."""
    after = [0, *(place + 1 for place, (op, _) in enumerate(items) if op is not _parser.LITERAL)]
    return max((_text(items, place, flags) for place in after), key=len)


def _is_single(items: _Items) -> bool:
    """Whether ``items`` match exactly one character, in one way."""
    if len(items) != 1:
        return False
    op, av = items[0]
    return _is_single(av[3]) if op is _parser.SUBPATTERN else _WIDTHS.get(op) == 1


# -------------------------------------------------------------------------- matching as a relation between positions


class _Run:
    """One name under one pattern: what is known so far."""

    def __init__(self, name: str, pattern: str, budget: Budget) -> None:
        self.name = name
        self.everywhere = (1 << (len(name) + 1)) - 1
        self.known: dict[tuple[int, int, bool], int] = {}
        self.starts: dict[str, int] = {}
        self._pattern = pattern
        self._budget = budget

    def spend(self, steps: int) -> None:
        self._budget.spend(steps, self._pattern)


class _Node(Protocol):
    def move(self, run: _Run, at: int, ahead: bool) -> int:
        """The positions where the node may end if it begins in ``at``; where it may begin if not ``ahead``."""


class _Block:
    """Characters and anchors in a row: there is one way at each position, and `re` finds them all at once."""

    def __init__(self, items: list[tuple[Any, Any]], flags: int) -> None:
        state = _parser.State()
        state.flags = flags
        look = (_parser.ASSERT, (1, _parser.SubPattern(state, items)))
        # Equal blocks, such as the dot of every ".*", are looked for once per name.
        self._key = f"{flags} {items}"
        self.width = sum(_WIDTHS[op] for op, _ in items)
        self._regex: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [look]), flags)

    def starts(self, run: _Run) -> int:
        if self._key not in run.starts:
            run.spend(4)
            run.starts[self._key] = sum(1 << found.start() for found in self._regex.finditer(run.name))
        return run.starts[self._key]

    def move(self, run: _Run, at: int, ahead: bool) -> int:
        starts = self.starts(run)
        return (at & starts) << self.width if ahead else (at >> self.width) & starts


class _Sequence:
    def __init__(self, items: Sequence[_Node]) -> None:
        self.items = tuple(items)
        self.reverse = self.items[::-1]

    def move(self, run: _Run, at: int, ahead: bool) -> int:
        run.spend(1 + len(self.items))
        for item in self.items if ahead else self.reverse:
            at = item.move(run, at, ahead)
            if not at:
                break
        return at


class _Either:
    def __init__(self, options: Sequence[_Node]) -> None:
        self.options = tuple(options)

    def move(self, run: _Run, at: int, ahead: bool) -> int:
        run.spend(1 + len(self.options))
        reached = 0
        for option in self.options:
            reached |= option.move(run, at, ahead)
        return reached


class _Repeat:
    """``body`` from ``least`` to ``most`` times. A name of n characters needs at most 2n + 2 rounds."""

    def __init__(self, body: _Node, least: int, most: int) -> None:
        self.body = body
        self.least = least
        self.most = most
        self.star = body if isinstance(body, _Block) and body.width == 1 and most == _parser.MAXREPEAT else None

    def move(self, run: _Run, at: int, ahead: bool) -> int:
        key = (id(self), at, ahead)
        if key not in run.known:
            run.known[key] = self._optional(run, self._required(run, at, ahead), ahead)
        return run.known[key]

    def _required(self, run: _Run, at: int, ahead: bool) -> int:
        for _ in range(self.least):
            run.spend(1)
            before, at = at, self.body.move(run, at, ahead)
            if at == before:  # from here on every round gives the same
                break
        return at

    def _optional(self, run: _Run, at: int, ahead: bool) -> int:
        if self.star is not None and ahead:
            # Adding a position to the runs of fitting characters carries through to the end of its run.
            fits = self.star.starts(run)
            return (((at & fits) + fits) ^ fits) | at
        reached = frontier = at
        for _ in range(self.most - self.least):
            run.spend(1)
            frontier = self.body.move(run, frontier, ahead) & ~reached
            if not frontier:
                break
            reached |= frontier
        return reached


class _Look:
    """Lookahead and lookbehind: keeps the positions where ``body`` begins (ends), or those where it does not."""

    def __init__(self, body: _Node, behind: bool, negative: bool) -> None:
        self.body = body
        self.behind = behind
        self.negative = negative

    def move(self, run: _Run, at: int, ahead: bool) -> int:
        key = (id(self), 0, True)
        if key not in run.known:
            holds = self.body.move(run, run.everywhere, self.behind)
            run.known[key] = run.everywhere & ~holds if self.negative else holds
        return at & run.known[key]


def _build(items: _Items, flags: int) -> _Node:
    nodes: list[_Node] = []
    row: list[tuple[Any, Any]] = []
    for op, av in items:
        if op in _WIDTHS:
            row.append((op, av))
            continue
        if row:
            nodes.append(_Block(row, flags))
            row = []
        nodes.append(_build_one(op, av, flags))
    if row:
        nodes.append(_Block(row, flags))
    return nodes[0] if len(nodes) == 1 else _Sequence(nodes)


def _build_one(op: Any, av: Any, flags: int) -> _Node:
    if op is _parser.SUBPATTERN:
        return _build(av[3], _scoped(flags, av[1], av[2]))
    if op is _parser.BRANCH:
        return _Either([_build(option, flags) for option in av[1]])
    if op in _REPEATS:
        return _Repeat(_build(av[2], flags), int(av[0]), int(av[1]))
    return _Look(_build(av[1], flags), behind=av[0] < 0, negative=op is _parser.ASSERT_NOT)


# --------------------------------------------------------------------------------------- tables of values by pattern

_NAME = re.compile(r"(\^?)([\w-]+(?:\\?\.[\w-]+)*)\$?", re.ASCII)
_LEADING_FLAGS = re.compile(r"\(\?[aimsux]+\)")


class KeyTable(Generic[V]):
    r"""Values by pattern, as in ``rank_pattern``: the first key in the table's order that fits a module's name wins.

    A key fits what ``(.*\.)?(KEY)$`` matches from the name's beginning: the whole name, or its end after a dot; a key
    that begins with ``^`` fits the whole name only. Keys that are plain names cost one look-up per component of the
    name, however many there are; their dots, escaped or not, stand for dots.

    Args:
        table (`Mapping[str, V]`): Value by pattern.

    Raises:
        PatternError: A key is no valid pattern.

    Example:
        >>> ranks = KeyTable({"layers.0.q_proj": 4, "q_proj": 8, r"^head\d": 2})
        >>> ranks.find("model.layers.0.q_proj"), ranks.find("model.layers.10.q_proj")
        (('layers.0.q_proj', 4), ('q_proj', 8))
        >>> ranks.unused()
        ('^head\\d',)
    """

    def __init__(self, table: Mapping[str, V]) -> None:
        self._rows = list(table.items())
        self._used: set[int] = set()
        self._ends: dict[str, int] = {}
        self._wholes: dict[str, int] = {}
        self._regexes: list[tuple[int, Pattern]] = []
        budget = Budget()
        for row, key in enumerate(table):
            if plain := _NAME.fullmatch(key):
                names = self._wholes if plain[1] else self._ends
                names.setdefault(plain[2].replace("\\", ""), row)
            else:
                self._regexes.append((row, _compile_key(key, budget)))

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, name: str) -> tuple[str, V] | None:
        """The key that serves ``name`` and its value, or `None`; the key counts as used from now on.

        Raises:
            PatternError: The keys take too long to match.
        """
        last = len(self._rows)
        best = min(self._wholes.get(name, last), self._ends.get(name, last))
        dot = name.find(".")
        while dot >= 0:
            best = min(best, self._ends.get(name[dot + 1 :], last))
            dot = name.find(".", dot + 1)
        for row, pattern in self._regexes:
            if row > best:
                break
            if pattern.fullmatch(name):
                best = row
        if best == last:
            return None
        self._used.add(best)
        return self._rows[best]

    def unused(self) -> tuple[str, ...]:
        """The keys that served no name so far, in the table's order."""
        return tuple(key for row, (key, _) in enumerate(self._rows) if row not in self._used)


def _compile_key(key: str, budget: Budget) -> Pattern:
    try:
        return compile_pattern(_at_an_end(key), budget)
    except PatternError:
        compile_pattern(key)  # complains in terms of the key alone, if it is to blame
        raise


def _at_an_end(key: str) -> str:
    flags = _LEADING_FLAGS.match(key)
    lead = flags[0] if flags else ""
    key = key[len(lead) :]
    if key.startswith(".*") and "|" not in key:
        return f"{lead}{key}"  # swallows what stands before it anyway
    return rf"{lead}(?:.*\.)?(?:{key})$"
