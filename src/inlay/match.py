"""From names to a plan: strings in, a `Plan` out. No torch here, and every complaint about targets is raised here.

A plan says of every module that a config's patterns name what happens to it and why: adapted, trained whole, or left
out for a reason. It is made before anything is touched, so that a config that does not fit leaves the model as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from inlay.errors import (
    ConfigError,
    NoMatchingPeftModuleError,
    PlanError,
    UnknownArchitectureError,
    UnsupportedLayerError,
    nearest,
)
from inlay.patterns import KeyTable, compile_pattern, suffixes

# How many unmatched entries are compared with the model's names, and with how many of them: comparing is slow.
_MAX_HINTS = 5
_MAX_CANDIDATES = 1_000
# How many of the names that were asked for an error repeats.
_MAX_SHOWN = 20
# Lists at least this long are written to files as the shortest suffixes that say the same.
_SHRINK_FROM = 20
# The value of target_modules that stands for every linear layer but the output head.
SHORTHAND = "all-linear"
# Heads that a task's handle asks to save on the chance that the model has them.
_USUAL_HEADS = frozenset({"classifier", "score", "qa_outputs"})
Names = Iterable[str] | str  # names and dotted suffixes, or one regular expression
_REGEX_CHARACTERS = re.compile(r"[\\*+?()\[\]|^$]")


class Module(NamedTuple):
    """One module of the model."""

    name: str  # its dotted name
    kind: str | None  # name of its row in the table of layer kinds; `None` for anything else
    output_head: bool = False  # whether "all-linear" leaves it out as the output head
    # The module around it that reads its weight without calling it: an adapter on it would have no effect.
    inside: str | None = None
    also: tuple[str, ...] = ()  # its further names, where it stands at several places of the model

    @property
    def names(self) -> tuple[str, ...]:
        """All its names, the first one first."""
        return (self.name, *self.also)


class Target(NamedTuple):
    """A module, or one bare parameter of it, that gets an adapter."""

    name: str  # of the module, or of the parameter: ``<module>.<parameter>``
    pattern: str  # the entry of the config that named it; the longest, where several do
    overrides: Mapping[str, object]  # field and value, where a table such as ``rank_pattern`` has one for it
    reason: str  # why it is a target, for people
    parameter: str = ""  # the bare parameter's own name

    @property
    def module(self) -> str:
        """The name of the module that has the parameter."""
        return self.name.removesuffix(f".{self.parameter}")


@dataclass(frozen=True, slots=True)
class Skip:
    """A module (or parameter) that a pattern named and that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a config does to a model."""

    targets: tuple[Target, ...]  # modules that get an adapter, in the order of the model
    parameters: tuple[Target, ...]  # bare parameters that get one, by module, then by name
    saved: tuple[tuple[str, str], ...]  # modules trained whole, each with its entry of ``modules_to_save``
    matched: Mapping[str, int]  # how many modules or parameters each pattern named, before any was left out
    # Patterns that named nothing, each with a hint such as ``"; closest: q_proj"`` or ``""``.
    unmatched: tuple[tuple[str, str], ...]
    skipped: tuple[Skip, ...]  # what a pattern named and the plan leaves alone
    warnings: tuple[str, ...]  # what looks like a mistake and is none for certain


@dataclass(frozen=True, slots=True, kw_only=True)
class Targeting:
    """What a config says about where its method goes: the fields of the config, and of the method."""

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | set[str] | None = None
    target_parameters: list[str] | set[str] | None = None
    adapter_layers: int | None = None  # only so many of the modules that target_modules names, the last ones
    # For every field that varies by layer its table: ``{"r": rank_pattern}``.
    patterns: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)  # key of `patterns` -> the config's field
    supported: frozenset[str]  # kinds of layer that the method adapts
    method: str = "LoRA"  # the method, for messages
    optional: bool = False  # whether a plan without any target is fine, because something else is trained


def plan(modules: Sequence[Module], parameters: Sequence[tuple[str, str]], targeting: Targeting) -> Plan:
    """Decides what happens to every module and parameter that a config names, all given in the order of the model.

    Raises:
        ConfigError: ``layers_to_transform`` with a regular expression, or ``layers_pattern`` alone.
        NoMatchingPeftModuleError: Nothing is left to adapt; the message says which rules took the targets.
        UnsupportedLayerError: A target is of a kind that the method does not adapt.
        PatternError: A pattern is malformed, or takes too long to match.
        PlanError: A parameter or a module to save cannot be had beside a target.

    Example:
        >>> modules = [Module("layers.0", None), Module("layers.0.q_proj", "Linear"), Module("layers.0.fc", "Linear")]
        >>> made = plan(modules, [], Targeting(target_modules=["q_proj", "fd"], supported=frozenset({"Linear"})))
        >>> [target.name for target in made.targets]
        ['layers.0.q_proj']
        >>> made.warnings
        ("'fd' in target_modules matched 0 of 3 modules.",)
    """
    check_layers(targeting.target_modules, targeting.layers_to_transform, targeting.layers_pattern)
    if not targeting.target_modules and not targeting.target_parameters and not targeting.optional:
        raise NoMatchingPeftModuleError(
            "Neither `target_modules` nor `target_parameters` is given: there is nothing to adapt. Name the layers, "
            "as in target_modules=['q_proj', 'v_proj'], or pass target_modules='all-linear'."
        )
    planner = _Planner(modules, parameters, targeting)
    planner.choose_saved()
    planner.choose_targets()
    planner.choose_parameters()
    return planner.finish()


def check_layers(targets: Names | None, layers: object, pattern: object) -> None:
    """Raises `ConfigError` where ``layers_to_transform`` and ``layers_pattern`` contradict the rest, or each other."""
    if isinstance(targets, str) and not _is_all_linear(targets):
        for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
            if value is not None:
                raise ConfigError(
                    f"`{name}` cannot be used when `target_modules` is one pattern: put the layer indices into the "
                    f"pattern, {targets!r}, instead."
                )
    if pattern and layers is None:
        raise ConfigError(
            "`layers_pattern` needs `layers_to_transform`: it says where in a name the layer's number stands."
        )


# ------------------------------------------------------------------------------------------------- matching one name


def _is_all_linear(entries: Names | None) -> bool:
    return isinstance(entries, str) and entries.lower() == SHORTHAND


def _ancestors(name: str) -> Iterator[str]:
    """The names of the modules around ``name``, innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def _first_in(known: Container[str], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in known), None)


class _Matcher:
    """One field of patterns: a list of names and dotted suffixes, a regular expression, or "all-linear".

    A list costs one look-up per component of a name, however long it is.
    """

    def __init__(self, name: str, entries: Names | None, linear: frozenset[str] = frozenset()) -> None:
        self.field = name
        self.linear = linear if _is_all_linear(entries) else frozenset()
        self.regex = compile_pattern(entries) if isinstance(entries, str) and not self.linear else None
        self.entries = (entries,) if isinstance(entries, str) else tuple(dict.fromkeys(entries or ()))
        if isinstance(entries, set | frozenset):
            self.entries = tuple(sorted(self.entries))
        self.names = frozenset() if isinstance(entries, str) else frozenset(self.entries)
        self.counts: Counter[str] = Counter()

    def hits(self, names: Iterable[str], kind: str | None = None) -> tuple[str, ...]:
        """The entries that name a module of these names, longest first for each of them."""
        if self.names:
            found = tuple([end for name in names for end in suffixes(name) if end in self.names])
        elif self.linear:
            found = self.entries if kind in self.linear else ()
        else:
            found = self.entries if self.regex is not None and any(map(self.regex.fullmatch, names)) else ()
        if found:
            found = tuple(dict.fromkeys(found))
            self.counts.update(found)
        return found

    def unmatched(self) -> list[str]:
        return [entry for entry in self.entries if not self.counts[entry]]


def matcher(entries: Names) -> Callable[[str], bool]:
    """Whether a name is among ``entries``, names and dotted suffixes or one regular expression, compiled once.

    Example:
        >>> matcher(["mlp.fc"])("layers.0.mlp.fc")
        True
    """
    made = _Matcher("", entries)
    return lambda name: bool(made.hits((name,)))


class _Layers:
    """``layers_to_transform`` and ``layers_pattern``."""

    def __init__(self, indices: list[int] | int | None, patterns: list[str] | str | None) -> None:
        self.wanted = frozenset([indices] if isinstance(indices, int) else indices or ())
        given = [patterns] if isinstance(patterns, str) and patterns else patterns or ()
        # The integer after one of the given names, or the first one after any word; it is never the name's last part.
        before = [re.escape(name) for name in given] or [r"(?!\d+\.)[^.]+"]
        self.places = [re.compile(rf"\.{word}\.(\d+)\.") for word in before]
        self.seen: set[int] = set()

    def reject(self, name: str) -> str:
        """Why the layers leave ``name`` out, or ""."""
        if not self.wanted:
            return ""
        found = next(filter(None, (place.search(f".{name}") for place in self.places)), None)
        if found is None:
            return "no layer index in its name, and layers_to_transform is set"
        index = int(found[1])
        self.seen.add(index)
        return "" if index in self.wanted else f"layer {index} is not in layers_to_transform"

    def never_seen(self) -> list[str]:
        """A sentence about the indices that no target has, if there are any."""
        if not (never := sorted(self.wanted - self.seen)):
            return []
        seen = f"they lie in layers {min(self.seen)}-{max(self.seen)}" if self.seen else "none has a layer's index"
        return [f"layers_to_transform={never} are indices of no target module; {seen}."]


def names_module(
    name: str, targets: Names, exclude: Names | None, layers: list[int] | int | None, pattern: list[str] | str | None
) -> bool:
    """Whether a config's fields name one module, as `plan` reads them for all.

    Example:
        >>> names_module("layers.1.mlp.fc", ["fc"], None, [0], None)
        False
    """
    if exclude and matcher(exclude)(name):
        return False
    alone = not isinstance(targets, str) and name in targets
    return matcher(targets)(name) and (alone or not _Layers(layers, pattern).reject(name))


class _Hints:
    """What the user may have meant by an entry that matched nothing."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.left = _MAX_HINTS

    def __call__(self, entry: str, whole_regex: bool = False) -> str:
        """The end of a sentence, such as "; closest: q_proj", or ""."""
        self.left -= 1
        if self.left < 0:
            return ""
        if whole_regex:
            if any(entry in suffixes(name) for name in self.names):
                return f"; a string is a regular expression for the whole name, pass the list [{entry!r}]"
            words = re.findall(r"\w+", entry)
            return self._closest(words[-1]) if words else ""
        if _is_all_linear(entry):
            return "; for every linear layer pass the string 'all-linear', not a list"
        if _REGEX_CHARACTERS.search(entry):
            return "; entries of a list are names, pass a regular expression as one string"
        return self._closest(entry)

    def _closest(self, entry: str) -> str:
        """Among the distinct ends of names that have as many components, else among the last components."""
        for size in sorted({entry.count(".") + 1, 1}, reverse=True):
            ends = dict.fromkeys(".".join(name.rsplit(".", size)[-size:]) for name in self.names)
            if entry in ends:
                return ""
            if hint := nearest(entry, islice(ends, _MAX_CANDIDATES)):
                return hint
        return ""


# --------------------------------------------------------------------------------------------------------- the plan

_NOT_CALLED = "the rule for layers that are not called"


class _Planner:
    """The steps of `plan`, in order; each adds to what the next one reads."""

    def __init__(self, modules: Sequence[Module], parameters: Sequence[tuple[str, str]], targeting: Targeting) -> None:
        self.modules = modules
        self.given = parameters
        self.asked = targeting
        linear = frozenset({"Linear", "Conv1D"}) & targeting.supported
        self.targets = _Matcher("target_modules", targeting.target_modules, linear)
        self.excluded = _Matcher("exclude_modules", targeting.exclude_modules)
        self.saves = _Matcher("modules_to_save", targeting.modules_to_save)
        self.parameters = _Matcher("target_parameters", targeting.target_parameters)
        self.layers = _Layers(targeting.layers_to_transform, targeting.layers_pattern)
        self.overrides = {name: KeyTable(table) for name, table in targeting.patterns.items() if table}
        # Layers that the method adapts come first.
        likely = sorted(modules, key=lambda m: m.kind not in targeting.supported)
        self.hints = _Hints(name for m in likely for name in m.names)
        self.saved: dict[str, str] = {}
        self.chosen: dict[str, tuple[Module, str]] = {}
        self.chosen_parameters: list[Target] = []
        self.skipped: list[Skip] = []
        self.left_out: dict[str, list[Skip]] = {}
        self.unmatched: list[tuple[str, str]] = []
        self.warnings: list[str] = []

    def choose_saved(self) -> None:
        named = {m.name: hits[0] for m in self.modules if (hits := self.saves.hits(m.names))}
        for name, entry in named.items():
            if outer := _first_in(named, _ancestors(name)):
                self.skipped.append(Skip(name, f"inside {outer!r}, which modules_to_save trains whole"))
            else:
                self.saved[name] = entry

    def choose_targets(self) -> None:
        for module in self.modules:
            if hits := self.targets.hits(module.names, module.kind):
                rule, reason = self._rejected(module)
                if rule:
                    self._leave_out(module.name, rule, reason)
                else:
                    self.chosen[module.name] = (module, hits[0])
        inner = {name: outer for name in self.chosen if (outer := _first_in(self.chosen, _ancestors(name)))}
        for name, outer in inner.items():
            rule = "the rule for targets inside targets"
            self._leave_out(name, rule, f"inside {outer!r}, which is a target itself")
        self._refuse_unsupported()
        self._keep_topmost()
        for name, entry in self.saved.items():
            if outer := _first_in(self.chosen, _ancestors(name)):
                raise PlanError(
                    f"{entry!r} in modules_to_save names {name!r}, which is inside the target {outer!r}; a part of an "
                    "adapted layer cannot be trained whole. Leave out one of the two."
                )

    def _rejected(self, module: Module) -> tuple[str, str]:
        """Which rule leaves out a module that ``target_modules`` names, and in words."""
        name = module.name
        if hits := self.excluded.hits(module.names):
            return "exclude_modules", f"{hits[0]!r} in exclude_modules"
        if self.saved and (outer := _first_in(self.saved, (name, *_ancestors(name)))):
            return "modules_to_save", f"{self.saved[outer]!r} in modules_to_save trains it whole"
        if self.targets.linear and module.output_head:
            return "the rule for output heads", "the output head, which 'all-linear' leaves out; name it to adapt it"
        reasons = [self.layers.reject(n) for n in module.names]
        if all(reasons) and self.targets.names.isdisjoint(module.names):
            return "layers_to_transform", reasons[0]
        if module.inside is not None:
            return _NOT_CALLED, f"{module.inside!r} reads its weight without calling it; target {module.inside!r}"
        return "", ""

    def _leave_out(self, name: str, rule: str, reason: str) -> None:
        self.chosen.pop(name, None)
        self.skipped.append(Skip(name, reason))
        self.left_out.setdefault(rule, []).append(self.skipped[-1])

    def _refuse_unsupported(self) -> None:
        bad = [(m, entry) for m, entry in self.chosen.values() if m.kind not in self.asked.supported]
        if not bad:
            return
        module, entry = bad[0]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        kind = "a container or a layer of another kind"
        if module.kind is not None:
            kind = f"{'an' if module.kind[0] in 'AE' else 'a'} {module.kind}"
        raise UnsupportedLayerError(
            f"Target module {module.name!r}{more} is not supported: {entry!r} in target_modules names it, which is "
            f"{kind}; {self.asked.method} adapts {', '.join(sorted(self.asked.supported))}. Name the layers inside "
            "it, or put it into exclude_modules."
        )

    def _keep_topmost(self) -> None:
        wanted = self.asked.adapter_layers
        if wanted is None or not self.chosen:
            return
        if wanted > len(self.chosen):
            raise PlanError(
                f"adapter_layers={wanted}, and the model has {len(self.chosen)} modules that target_modules names: "
                "ask for as many at most."
            )
        for name in list(self.chosen)[:-wanted]:
            self._leave_out(name, "adapter_layers", f"below the last {wanted}, which adapter_layers asks for")

    def choose_parameters(self) -> None:
        order = {module: i for i, (module, _) in enumerate(self.given)}
        several = {m.name: m.names for m in self.modules if m.also}
        for module, parameter in sorted(self.given, key=lambda p: (order[p[0]], p[1])):
            names = [f"{m}.{parameter}" if m else parameter for m in several.get(module, (module,))]
            full = names[0]
            hits = self.parameters.hits(names)
            if not hits:
                continue
            if _first_in(self.saved, _ancestors(full)):
                self._leave_out(full, "modules_to_save", "modules_to_save trains its module whole")
                continue
            self._refuse_parameter(full, module, hits[0])
            reason = why(names, hits[0], "target_parameters")
            self.chosen_parameters.append(Target(full, hits[0], self._overrides(names), reason, parameter))

    def _refuse_parameter(self, full: str, module: str, entry: str) -> None:
        if "Parameter" not in self.asked.supported:
            raise UnsupportedLayerError(
                f"{entry!r} in target_parameters names {full!r}, and {self.asked.method} adapts no bare parameters."
            )
        if not module:
            raise PlanError(
                f"{entry!r} in target_parameters names {full!r}, a parameter of the model itself; only parameters of "
                "its modules can be adapted."
            )
        if outer := _first_in(self.chosen, _ancestors(full)):
            raise PlanError(
                f"{entry!r} in target_parameters names {full!r}, and target_modules names {outer!r}; a layer is "
                "adapted in one way only. Leave out one of the two, as with target_modules=[]."
            )

    def _overrides(self, names: Sequence[str]) -> dict[str, object]:
        rows = ((label, table.find(n)) for label, table in self.overrides.items() for n in reversed(names))
        return {label: row[1] for label, row in rows if row is not None}

    def finish(self) -> Plan:
        """The plan, or the complaint that there is nothing to adapt."""
        missing = self._unmatched(self.targets, f"of {len(self.modules)} modules")
        missing += self._unmatched(self.parameters, f"of {len(self.given)} parameters")
        if not self.chosen and not self.chosen_parameters and not self.asked.optional:
            raise NoMatchingPeftModuleError(" ".join([self._lead(missing), self._why_nothing(), *missing]))
        targets = tuple(
            Target(name, entry, self._overrides(module.names), self._reason(module, entry))
            for name, (module, entry) in self.chosen.items()
        )
        self.warnings += missing
        self._warn()
        return Plan(
            targets=targets,
            parameters=tuple(self.chosen_parameters),
            saved=tuple(self.saved.items()),
            matched={e: made.counts[e] for made in (self.targets, self.parameters, self.saves) for e in made.entries},
            unmatched=tuple(self.unmatched),
            skipped=tuple(self.skipped),
            warnings=tuple(self.warnings),
        )

    def _reason(self, module: Module, entry: str) -> str:
        if self.targets.linear:
            return f"{module.kind} layer, and target_modules is 'all-linear'"
        if self.targets.regex is not None:
            return "its name matches the regular expression in target_modules"
        return why(module.names, entry, "target_modules")

    # -- complaints

    def _unmatched(self, matcher: _Matcher, of: str, quiet: frozenset[str] = frozenset()) -> list[str]:
        """One sentence for each of the first entries that matched nothing, and one for the rest."""
        entries = matcher.unmatched()
        rows = [(e, self.hints(e, matcher.regex is not None)) for e in entries if e not in quiet]
        self.unmatched += rows + [(e, "") for e in entries if e in quiet]
        texts = [f"{e!r} in {matcher.field} matched 0 {of}{hint}." for e, hint in rows[:_MAX_HINTS]]
        if rest := rows[_MAX_HINTS:]:
            named = ", ".join(repr(e) for e, _ in rest[:10]) + (", ..." if len(rest) > 10 else "")
            texts.append(f"{len(rest)} more entries of {matcher.field} matched nothing: {named}.")
        return texts

    def _lead(self, missing: list[str]) -> str:
        """How PEFT's complaint begins, which callers look for."""
        if not self.asked.target_modules:
            return "`target_modules` is not given, and none of `target_parameters` was found in the model:"
        if not self.left_out:
            return f"Target modules {self._asked_for()} not found in the base model:"
        if [*self.left_out] == ["layers_to_transform"]:
            layers = f"You specified 'layers_to_transform': {sorted(self.layers.wanted)}."
            return f"Target modules {self._asked_for()} not found in the base model. {layers}"
        only_excluded = [*self.left_out] == ["exclude_modules"] and not missing
        return "All modules were excluded:" if only_excluded else "No modules were targeted for adaptation:"

    def _asked_for(self) -> str:
        targets = self.asked.target_modules
        if isinstance(targets, str):
            return targets
        names = [repr(entry) for entry in self.targets.entries]
        more = "" if len(names) <= _MAX_SHOWN else ", ..."
        return f"{{{', '.join(names[:_MAX_SHOWN])}{more}}}"

    def _why_nothing(self) -> str:
        if not self.left_out:
            return "there is nothing to adapt:"
        rules = sorted(self.left_out.items(), key=lambda row: -len(row[1]))
        first = rules[0][1][0]
        left = ", ".join(f"{len(skips)} by {rule}" for rule, skips in rules)
        named = f"{sum(map(len, self.left_out.values()))} modules or parameters are named as targets"
        text = f"{named} and none is left: left out are {left}. First: {first.name!r}: {first.reason}."
        return " ".join([text, *self.layers.never_seen()])

    def _warn(self) -> None:
        if self.left_out and not self.chosen:
            self.warnings.append(f"target_modules adapts nothing: {self._why_nothing()}")
        else:
            self.warnings += self.layers.never_seen()
        quiet = _USUAL_HEADS if self.saved else frozenset()
        self.warnings += self._unmatched(self.saves, f"of {len(self.modules)} modules", quiet)
        self._warn_exclusions()
        if (idle := self.left_out.get(_NOT_CALLED)) and not self.targets.linear:
            first = f"{idle[0].name!r}: {idle[0].reason}"
            self.warnings.append(f"{len(idle)} named modules are left out. First: {first}.")
        self._warn_overrides()

    def _warn_exclusions(self) -> None:
        idle = self.excluded.unmatched()
        for entry in idle[:_MAX_HINTS]:
            alone = _Matcher("", entry if self.excluded.regex else [entry])
            known = {m.name for m in self.modules if alone.hits(m.names)}
            if any(_first_in(known, _ancestors(name)) for name in self.chosen):
                whole = rf"(.*\.)?{re.escape(entry)}\..*"
                text = (
                    "names a module and not the targets inside it, which are adapted; to exclude these pass a "
                    f"regular expression: exclude_modules={whole!r}."
                )
            elif known:
                text = "names no target and so excludes nothing."
            else:
                hint = self.hints(entry, self.excluded.regex is not None)
                self.unmatched.append((entry, hint))
                text = f"matched 0 of {len(self.modules)} modules{hint}."
            passed = f"You have passed exclude_modules={self.asked.exclude_modules} but no modules were excluded: "
            none = passed if len(idle) == len(self.excluded.entries) else ""
            self.warnings.append(f"{none}{entry!r} in exclude_modules {text}")
        if len(idle) > _MAX_HINTS:
            self.warnings.append(f"{len(idle) - _MAX_HINTS} more entries of exclude_modules exclude nothing.")

    def _warn_overrides(self) -> None:
        names = [*self.chosen, *(target.name for target in self.chosen_parameters)]
        hints = _Hints(names)
        for label, table in self.overrides.items():
            if unused := table.unused():
                named = ", ".join(f"{key!r}{hints(key)}" for key in unused[:_MAX_HINTS])
                more = f" (and {len(unused) - _MAX_HINTS} more)" if len(unused) > _MAX_HINTS else ""
                self.warnings.append(
                    f"{self.asked.tables.get(label, label)}: these keys did not match any targeted module, because "
                    f"none fits or an earlier pattern does: {named}{more}."
                )


def why(names: Sequence[str], entry: str, field_name: str) -> str:
    """In which way an entry of a list names a module of these names, for people."""
    name = next(n for n in names if n == entry or n.endswith(f".{entry}"))
    known = "named" if entry == name else f"ends with {entry!r}"
    return f"{known} in {field_name}{'' if name == names[0] else f', as {name!r}'}"


# ------------------------------------------------------------------------------------------------- lists of targets


def shrink(names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """The shortest list of suffixes that selects the same of ``all_names`` as a list of 20 or more names or suffixes.

    Example:
        >>> names = [f"layers.{i}.{leaf}" for i in range(12) for leaf in ("q_proj", "v_proj")]
        >>> shrink(names, [*names, "layers.0.k_proj"])
        ['q_proj', 'v_proj']
    """
    if len(names) < _SHRINK_FROM:
        return list(names)
    wanted = frozenset(names)
    selected = [name for name in all_names if not wanted.isdisjoint(suffixes(name))]
    return shortest(selected, set(all_names).difference(selected))


def shortest(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest suffixes that select these names and none of the others, of which none ends as a whole name does.

    Example:
        >>> shortest(["0.q", "1.q", "1.k"], ["0.k", "1"])
        ['1.k', 'q']
    """
    taken = {end for name in others for end in suffixes(name)}
    # Every name has a free end, itself if no other. The shortest free ends are needed: none is an end of another
    # one, and a longer one would cover no more.
    return sorted({min((end for end in suffixes(name) if end not in taken), key=len, default=name) for name in names})


def default_targets(
    model_type: str | None,
    table: Mapping[str, Sequence[str] | str],
    modules: Sequence[Module],
    supported: frozenset[str],
) -> list[str] | str:
    """The row of a method's table of default targets for an architecture as transformers names it.

    Raises:
        UnknownArchitectureError: There is no such row; the message lists the layers that could be named, by frequency.
    """
    if model_type is not None and model_type in table:
        row = table[model_type]
        return row if isinstance(row, str) else list(row)
    linear = supported & {"Linear", "Conv1D"}
    leaves = Counter(m.name.rsplit(".", 1)[-1] for m in modules if m.kind in (linear or supported))
    listed = ", ".join(f"{leaf} ({count})" for leaf, count in leaves.most_common(12)) or "none"
    found = "the model names no architecture (it has no config.model_type)"
    if model_type is not None:
        found = f"there are no default target_modules for the architecture {model_type!r}{nearest(model_type, table)}"
    choices, of = ("layers, or 'all-linear'", "linear layers") if linear else ("layers", "layers of a kind it adapts")
    raise UnknownArchitectureError(
        f"Please specify `target_modules`: {found}. Give names of {choices}. The model's {of}: {listed}."
    )
