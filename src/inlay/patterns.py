"""Regular expressions that may come from anyone's file, and so must not hang.

`re` is exact and fast, and on some patterns takes longer than the universe lasts: ``(([a-z])+)+X``. Here a pattern is
read first. Where the number of ways that `re` could try is provably small, `re` answers. Otherwise the parsed pattern
is evaluated as a relation between positions: a set of positions is the bits of one integer, and every node maps the
set where it may begin to the set where it may end, so that no position is ever tried twice. A budget bounds what is
left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from re import _compiler, _parser  # type: ignore[attr-defined]  # the parser that `re` itself uses; untyped
from typing import Any, Generic, NamedTuple, TypeVar

from inlay.errors import PatternError

V = TypeVar("V")

# A pattern longer than this comes from no one who means well.
MAX_LENGTH = 10_000
_MAX_DEPTH = 50
# `re` may try this many ways on one name: a millisecond at the very worst.
_MAX_WAYS = 20_000
_ENDLESS = 10**12
# Ways are counted for names of this length; in `_MAX_WAYS` there is room for two quantifiers without a bound.
_LENGTH = 64
# Code points under (?i) that `re` would fold one by one while it compiles.
_MAX_FOLDED = 100_000

_CHARACTERS = (_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN)
_ANCHORS = (_parser.AT, _parser.FAILURE)
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT)
_LOOKS = (_parser.ASSERT, _parser.ASSERT_NOT)
_REFUSED = {
    _parser.GROUPREF: "a backreference",
    _parser.GROUPREF_EXISTS: "a conditional",
    _parser.ATOMIC_GROUP: "an atomic group",
    _parser.POSSESSIVE_REPEAT: "a possessive quantifier",
}

_Items = Sequence[tuple[Any, Any]]


def suffixes(name: str) -> Iterator[str]:
    """The name and every end of it after a dot, longest first."""
    while name:
        yield name
        name = name.partition(".")[2]


def _fault(pattern: str, what: str) -> PatternError:
    return PatternError(f"the pattern {pattern if len(pattern) <= 80 else f'{pattern[:77]}...'!r} {what}.")


@dataclass
class Budget:
    """What matching may cost in all, in steps of about a microsecond; may be shared by several patterns."""

    left: int = 5_000_000

    def spend(self, steps: int, pattern: str) -> None:
        """Takes ``steps`` away; a `PatternError` where nothing is left."""
        self.left -= steps
        if self.left < 0:
            advice = "avoid quantifiers inside quantifiers, such as (a+)+, and leave out what need not be checked"
            raise _fault(pattern, f"takes too long to match; {advice}")


@dataclass(eq=False, repr=False)
class Pattern:
    """A pattern that `compile_pattern` made of its ``source``."""

    source: str
    _regex: re.Pattern[str]
    _items: _Items
    _ways: int
    _budget: Budget

    @cached_property
    def _texts(self) -> list[str]:
        """Plain texts that every match holds."""
        if self._regex.flags & re.IGNORECASE:
            return []
        groups = groupby(self._items, lambda item: item[0] is _parser.LITERAL)
        return ["".join(chr(av) for _, av in group) for is_text, group in groups if is_text]

    @cached_property
    def _root(self) -> _Node:
        return _build(self._items, self._regex.flags)

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of ``name`` matches, as `re.fullmatch` has it; a `PatternError` where the budget ends."""
        if not all(text in name for text in self._texts):
            return False
        ways = self._ways * (1 + len(name) // _LENGTH) ** 2
        if ways <= _MAX_WAYS:
            self._budget.spend(1 + ways // 250, self.source)
            return self._regex.fullmatch(name) is not None
        run = _Run(name, lambda steps: self._budget.spend(steps, self.source), {})
        return bool(self._root(run, 1) >> len(name) & 1)


def compile_pattern(pattern: str, budget: Budget | None = None) -> Pattern:
    """Compiles a regular expression whose matching ends in reasonable time, whatever it is.

    It is as `re` has it, without backreferences, conditionals, atomic groups and possessive quantifiers; by default it
    has a budget of its own.

    Raises:
        PatternError: The pattern is malformed, too long, nested too deeply, or holds what is not supported.

    Example:
        >>> bomb = compile_pattern(r"(([a-z_.0-9])+)+X")
        >>> bomb.fullmatch("a" * 60), bomb.fullmatch("a" * 60 + "X")
        (False, True)
    """
    if len(pattern) > MAX_LENGTH:
        what = f"has {len(pattern):,} characters, at most {MAX_LENGTH:,} are taken; pass a list of names instead"
        raise _fault(pattern, what)
    budget = budget or Budget()
    budget.spend(100 + 5 * len(pattern), pattern)
    try:
        parsed = _parser.parse(pattern, 0)
        ways = _Reader(pattern).ways(parsed, parsed.state.flags)
        regex: re.Pattern[str] = _compiler.compile(parsed, parsed.state.flags)
    except re.error as error:
        where = "" if error.pos is None else f" at position {error.pos}"
        raise _fault(pattern, f"is malformed{where}: {error.msg}") from error
    except OverflowError as error:
        raise _fault(pattern, f"is malformed: {error}") from error
    except RecursionError as error:
        raise _fault(pattern, _TOO_DEEP) from error
    return Pattern(pattern, regex, parsed, ways, budget)


_TOO_DEEP = f"is nested too deeply; at most {_MAX_DEPTH} levels are taken"


# ---------------------------------------------------------------------------- reading: how long could `re` take?


class _Reader:
    """Walks a parsed pattern once: bounds the ways, refuses what cannot be supported or costs too much to compile."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.folded = 0

    def ways(self, items: _Items, flags: int, depth: int = 0) -> int:
        """In how many ways backtracking can try ``items`` from one position of a name of `_LENGTH` characters."""
        if depth > _MAX_DEPTH:
            raise _fault(self.pattern, _TOO_DEEP)
        ways = 1
        for op, av in items:
            ways = min(ways * self.once(op, av, flags, depth + 1), _ENDLESS)
        return ways

    def once(self, op: Any, av: Any, flags: int, depth: int) -> int:
        if op in _REFUSED:
            raise _fault(self.pattern, f"holds {_REFUSED[op]}, which is not supported; write out the cases")
        if op is _parser.SUBPATTERN:
            return self.ways(av[3], _scoped(flags, av[1], av[2]), depth)
        if op is _parser.BRANCH:
            return sum(self.ways(option, flags, depth) for option in av[1])
        if op in _LOOKS:
            return self.ways(av[1], flags, depth)
        if op in _REPEATS:
            least, most, ways = int(av[0]), int(av[1]), self.ways(av[2], flags, depth)
            if ways == 1:
                return 1 + min(most - least, _LENGTH)
            return sum(ways**count for count in range(least, most + 1)) if most <= 10 else _ENDLESS
        if op is _parser.IN and flags & re.IGNORECASE:
            self.folded += sum(ends[1] - ends[0] for kind, ends in av if kind is _parser.RANGE)
            if self.folded > _MAX_FOLDED:
                raise _fault(self.pattern, "has too wide character ranges for (?i)")
        return 1


def _scoped(flags: int, add: int, remove: int) -> int:
    """The flags inside ``(?add-remove:...)``."""
    kinds = re.ASCII | re.UNICODE
    if add & kinds:
        flags &= ~kinds
    return (flags | add) & ~remove


# -------------------------------------------------------------------------- matching as a relation between positions


class _Run(NamedTuple):
    """One name under one pattern."""

    name: str
    spend: Callable[[int], None]
    known: dict[object, int]  # what was found so far


# From the positions where it may begin to those where it may end; a node built with ahead=False, the other way round.
_Node = Callable[[_Run, int], int]


class _Block:
    """Characters and anchors in a row: there is one way at each position, and `re` finds them all at once."""

    def __init__(self, items: list[tuple[Any, Any]], flags: int, ahead: bool) -> None:
        state = _parser.State()
        state.flags = flags
        look = (_parser.ASSERT, (1, _parser.SubPattern(state, items)))
        # Equal blocks, such as the dot of every ".*", are looked for once per name.
        self._key = f"{flags} {items}"
        self.ahead = ahead
        self.width = sum(op in _CHARACTERS for op, _ in items)
        self._regex: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [look]), flags)

    def starts(self, run: _Run) -> int:
        if self._key not in run.known:
            run.spend(4)
            run.known[self._key] = sum(1 << found.start() for found in self._regex.finditer(run.name))
        return run.known[self._key]

    def __call__(self, run: _Run, at: int) -> int:
        starts = self.starts(run)
        return (at & starts) << self.width if self.ahead else (at >> self.width) & starts


def _sequence(nodes: Sequence[_Node]) -> _Node:
    def move(run: _Run, at: int) -> int:
        run.spend(1 + len(nodes))
        for node in nodes:
            at = node(run, at)
        return at

    return move


def _either(options: Sequence[_Node]) -> _Node:
    def move(run: _Run, at: int) -> int:
        run.spend(1 + len(options))
        reached = 0
        for option in options:
            reached |= option(run, at)
        return reached

    return move


def _repeat(body: _Node, least: int, most: int) -> _Node:
    """``body`` from ``least`` to ``most`` times. A name of n characters needs at most 2n + 2 rounds."""
    star = body if isinstance(body, _Block) and body.width == 1 and body.ahead and most == _parser.MAXREPEAT else None

    def move(run: _Run, at: int) -> int:
        for _ in range(least):
            run.spend(1)
            before, at = at, body(run, at)
            if at == before:  # from here on every round gives the same
                break
        if star is not None:
            # Adding a position to the runs of fitting characters carries through to the end of its run.
            fits = star.starts(run)
            return (((at & fits) + fits) ^ fits) | at
        reached = frontier = at
        for _ in range(most - least):
            run.spend(1)
            frontier = body(run, frontier) & ~reached
            if not frontier:
                break
            reached |= frontier
        return reached

    return _remembered(move)


def _look(body: _Node, negative: bool) -> _Node:
    """Keeps the positions that ``body`` leads to from anywhere, or those that it does not."""
    body = _remembered(body)

    def move(run: _Run, at: int) -> int:
        holds = body(run, (2 << len(run.name)) - 1)
        return at & ~holds if negative else at & holds

    return move


def _remembered(node: _Node) -> _Node:
    def move(run: _Run, at: int) -> int:
        key = (node, at)
        if key not in run.known:
            run.known[key] = node(run, at)
        return run.known[key]

    return move


def _build(items: _Items, flags: int, ahead: bool = True) -> _Node:
    nodes: list[_Node] = []
    for in_a_row, group in groupby(items, lambda item: item[0] in _CHARACTERS + _ANCHORS):
        if in_a_row:
            nodes.append(_Block(list(group), flags, ahead))
        else:
            nodes.extend(_build_one(op, av, flags, ahead) for op, av in group)
    return nodes[0] if len(nodes) == 1 else _sequence(nodes if ahead else nodes[::-1])


def _build_one(op: Any, av: Any, flags: int, ahead: bool) -> _Node:
    if op is _parser.SUBPATTERN:
        return _build(av[3], _scoped(flags, av[1], av[2]), ahead)
    if op is _parser.BRANCH:
        return _either([_build(option, flags, ahead) for option in av[1]])
    if op in _REPEATS:
        return _repeat(_build(av[2], flags, ahead), int(av[0]), int(av[1]))
    # A lookahead holds where its body may begin, a lookbehind where it may end.
    return _look(_build(av[1], flags, ahead=av[0] < 0), negative=op is _parser.ASSERT_NOT)


# --------------------------------------------------------------------------------------- tables of values by pattern

_NAME = re.compile(r"(\^?)([\w-]+(?:\\?\.[\w-]+)*)\$?", re.ASCII)
_LEADING_FLAGS = re.compile(r"\A\(\?[aimsux]+\)")


class KeyTable(Generic[V]):
    r"""Values by pattern, as in ``rank_pattern``: the first key in the table's order that fits a module's name wins.

    A key fits what ``(.*\.)?(KEY)$`` matches from the name's beginning: the whole name, or its end after a dot; a key
    that begins with ``^`` fits the whole name only. Keys that are plain names cost one look-up per component of the
    name, however many there are; their dots, escaped or not, stand for dots. A `PatternError` says that a key is no
    valid pattern, or that the keys take too long to match.

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

    def find(self, name: str) -> tuple[str, V] | None:
        """The key that serves ``name`` and its value, or `None`; the key counts as used from now on."""
        last = len(self._rows)
        best = min(self._wholes.get(name, last), *(self._ends.get(end, last) for end in suffixes(name)))
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
    rest = _LEADING_FLAGS.sub("", key, count=1)
    if rest.startswith(".*") and "|" not in rest:
        return key  # swallows what stands before it anyway
    return rf"{key.removesuffix(rest)}(?:.*\.)?(?:{rest})$"
