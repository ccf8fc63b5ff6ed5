"""Which adapter serves which thread, task or row: the per-call context.

A choice is made in a context variable (so threads and asyncio tasks are kept apart) and copied, for the duration of
one call through the handle, into a thread-local that compiled code can read: a context variable cannot be traced. With
no choice made, a layer follows its own default and pays one attribute read.

A forward that is computed again in backward (activation checkpointing) must see the routing of its first run, which
is gone by then: `bind` carries it along (a choice, or the defaults as they stood), the handle binds the checkpointing
functions of models it knows, and a layer that finds itself recomputed without the choice that its forward saw raises
instead of training another adapter.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from inlay.activation import Tokens
from inlay.errors import BusyError, LostRoutingError, RowsError

P = ParamSpec("P")
T = TypeVar("T")

BASE = "__base__"  # in adapter_names: this row runs the frozen model
PATIENCE = 0.05  # seconds that a call lets a waiting write go first, at least


class HasDefault:
    """A layer, or a model, with adapters of which some run by default."""

    _active: tuple[str, ...]

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that run by default."""
        return list(self._active)

    active_adapter = active_adapters  # under its older name


@dataclass(frozen=True, eq=False)
class Rows:
    """Adapters by row of a batch.

    Args:
        names (`tuple[str, ...]`): The adapters in use, each once.
        ids_B (`Tensor`): For each row the index in ``names``, or ``len(names)`` for the frozen model.
        members (`tuple[Tensor, ...]`): For each adapter the positions of its rows.
        repeats (`tuple[int, ...]`): How often a row may stand in a module's batch (beams), always with 1.
    """

    names: tuple[str, ...]
    ids_B: Tensor
    members: tuple[Tensor, ...]
    repeats: tuple[int, ...] = (1,)
    _moved: dict[tuple[torch.device, int], Rows] = field(default_factory=dict, repr=False)
    _orders: dict[tuple[str, ...], Tensor | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, adapter_names: Sequence[str], repeats: tuple[int, ...] = (1,)) -> Rows:
        """Rows from one name per sample."""
        names = tuple(dict.fromkeys(n for n in adapter_names if n != BASE))
        index = {name: i for i, name in enumerate(names)} | {BASE: len(names)}
        return cls._from_ids(names, torch.tensor([index[n] for n in adapter_names]), repeats)

    @classmethod
    def _from_ids(cls, names: tuple[str, ...], ids_B: Tensor, repeats: tuple[int, ...]) -> Rows:
        return cls(names, ids_B, tuple((ids_B == i).nonzero().flatten() for i in range(len(names))), repeats)

    def of_adapter(self, name: str) -> Tensor:
        """The positions of an adapter's rows."""
        return self.members[self.names.index(name)]

    def fitted(self, size: int, device: torch.device, module: str) -> Rows:
        """These rows for a module whose batch is ``size``, on its device.

        Raises:
            RowsError: ``size`` is neither the number of rows nor that times a known number of beams.
        """
        B = self.ids_B.shape[0]
        if size == B and device == self.ids_B.device:
            return self
        times = size // B if B else 1
        if times not in self.repeats or times * B != size:
            raise RowsError(
                f"adapter_names has {B} rows and {module} got a batch of {size}: its rows are not the batch's (some "
                "models fold tokens or windows into the first dimension). Use one adapter for the whole batch there."
            )
        key = (device, times)
        if key not in self._moved:
            self._moved[key] = Rows._from_ids(self.names, self.ids_B.to(device).repeat_interleave(times), (1,))
        return self._moved[key]

    def index_of(self, order: tuple[str, ...]) -> Tensor | None:
        """For each row its index in ``order``, or ``len(order)``; None where that is 0, 1, 2, ..."""
        if order not in self._orders:
            position = {name: i for i, name in enumerate(order)}
            table = torch.tensor([position.get(n, len(order)) for n in (*self.names, BASE)], device=self.ids_B.device)
            ids_B = table[self.ids_B]
            if torch.compiler.is_compiling():
                return ids_B
            counted = ids_B.numel() == len(order) and torch.equal(ids_B, torch.arange(len(order), device=ids_B.device))
            self._orders[order] = None if counted else ids_B
        return self._orders[order]


@dataclass(frozen=True, eq=False)
class Route:
    """One call's choice: adapters for the whole batch (none for the frozen model), or by row; and on which tokens."""

    names: tuple[str, ...] = ()
    rows: Rows | None = None
    tokens: Tokens | None = None

    def run(self, layer: object, default: tuple[str, ...], known: Container[str]) -> tuple[str, ...]:
        """The adapters that ``layer`` runs, of those it has; ``default`` is its own."""
        return tuple(n for n in self.names if n in known)


@dataclass(frozen=True, eq=False)
class Defaults(Route):
    """Each layer's default as it stood at one moment: what has changed since, and nothing else.

    What changes after the next such moment stands in ``later``. Only bound functions hold moments, so what none of
    them can ask for is gone.
    """

    before: dict[object, tuple[str, ...]] = field(default_factory=dict, repr=False)
    lost: set[str] = field(default_factory=set)
    later: list[Defaults] = field(default_factory=list, repr=False)

    @property
    def changed(self) -> bool:
        """Whether anything has changed since."""
        return bool(self.before or self.lost or self.later)

    def _since(self) -> list[Defaults]:
        moments = [self]
        while moments[-1].later:
            moments += moments[-1].later
        return moments

    def run(self, layer: object, default: tuple[str, ...], known: Container[str]) -> tuple[str, ...]:
        """The default of ``layer`` at that moment; ``default`` was read before this call: it may be changing."""
        run = next((then.before[layer] for then in self._since() if layer in then.before), default)
        self.check(run, known)
        return run

    def check(self, names: Sequence[str], known: Container[str]) -> None:
        """Raises `LostRoutingError` where ``names`` cannot run as they did at that moment."""
        lost = {n for then in self._since() for n in then.lost} if _in_backward() else set()
        if gone := [n for n in names if n in lost or n not in known]:
            raise LostRoutingError(
                f"A function bound to the adapters {list(names)} is computed again, and meanwhile {gone} were "
                "deleted, merged, unmerged or swapped: do so after the backward."
            )


@dataclass(frozen=True, eq=False)
class Following(Route):
    """Each layer's default as it stood at a moment, on the tokens that the call says."""

    moment: Defaults = field(default_factory=Defaults)

    def run(self, layer: object, default: tuple[str, ...], known: Container[str]) -> tuple[str, ...]:
        return self.moment.run(layer, default, known) if self.moment.changed else default


class _Local(threading.local):
    # Set in every thread, not as defaults of the class: compiled code would not see the first choice come.
    def __init__(self) -> None:
        self.route: Route | None = None
        self.depth = 0
        self.choices = 0


# {router: route}: the choices of the current task. Never changed in place, so tasks cannot see each other's.
_CHOSEN: ContextVar[Mapping[Router, Route]] = ContextVar("inlay_routes")


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Routed:
    """When forwards ran under a choice, in the numbers that autograd gives the nodes of its graphs.

    Every thread counts its nodes from 0, and a node does not tell its thread: the times of all threads are one set.
    """

    def __init__(self) -> None:
        self.any = self._everywhere = False
        self._open: dict[object, int] = {}
        self._closed: deque[tuple[int, int]] = deque()

    @contextmanager
    def time(self) -> Iterator[None]:
        """The body runs under a choice."""
        key, start = object(), torch._C._autograd._get_sequence_nr()
        if torch.is_grad_enabled():
            self._open[key], self.any = start, True
        try:
            yield
        finally:
            self._open.pop(key, None)
            if (end := torch._C._autograd._get_sequence_nr()) > start:  # else no graph was made
                self._closed.append((start, end))
                self.any = True
            if len(self._closed) > 256:  # the oldest two become one, with what lies between them
                (a, b), (c, d) = self._closed.popleft(), self._closed.popleft()
                self._closed.appendleft((min(a, c), max(b, d)))

    def everywhere(self) -> None:
        """A choice runs in a thread that did not make it: its times there are not known."""
        self.any = self._everywhere = True

    def now(self) -> bool:
        """Whether the graph that is in backward now may be of such a time."""
        node = torch._C._current_autograd_node()
        if node is None or self._everywhere:
            return True
        at = node._sequence_nr()
        return any(a <= at for a in [*self._open.values()]) or any(a <= at < b for a, b in [*self._closed])


class Router:
    """The routing shared by all layers of one model, and the lock between its calls and its writes."""

    def __init__(self) -> None:
        self._local = _Local()
        self._changed = threading.Condition()
        self._calls: dict[int, float] = {}  # {thread: when its running call began}, the oldest first
        self._writer: int | None = None
        self._waiting = 0  # writers
        self._since = 0.0  # when the first of them came
        self._opened = 0.0  # calls that came until then may pass them
        self._routed = _Routed()
        self._moment: weakref.ref[Defaults] | None = None

    # Copies and pickles of a model get a router of their own; its layers share it through the memo.
    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        copied: Router = memo.setdefault(id(self), Router())
        return copied

    def __reduce__(self) -> tuple[type[Router], tuple[()]]:
        return Router, ()

    def route(self) -> Route | None:
        """The choice that holds here, or None for each layer's default."""
        if torch.compiler.is_compiling():
            return self._local.route
        chosen = _CHOSEN.get(None)
        route = None if chosen is None else chosen.get(self)
        if route is None:
            if self._routed.any and _in_backward() and self._routed.now():
                raise LostRoutingError(
                    "A layer is computed again in backward, and which adapter its forward used is not known here. "
                    "Wrap what is checkpointed: checkpoint(model.bind(function), ...), not checkpoint(function, ...)."
                )
            return None
        if not self._local.choices:
            self._routed.everywhere()
        return None if isinstance(route, Defaults) and not route.changed else route

    @property
    def off(self) -> bool:
        """Whether the calling thread has chosen to run no adapter."""
        choice = self._choice()
        return type(choice) is Route and choice.rows is None and not choice.names

    def _choice(self) -> Route | None:
        if torch.compiler.is_compiling():
            return self._local.route
        chosen = _CHOSEN.get(None)
        route = None if chosen is None else chosen.get(self)
        if route is not None and not self._local.choices:
            self._routed.everywhere()
        return route

    @contextmanager
    def _choosing(self, route: Route | None, traced: bool) -> Iterator[None]:
        """Makes ``route`` the choice of this context and, where ``traced``, of compiled code on this thread."""
        local = self._local
        outer = local.route
        token = _CHOSEN.set({**_CHOSEN.get({}), self: route}) if route is not None else None
        if traced:
            local.route = None if isinstance(route, Defaults) and not route.changed else route
        local.choices += token is not None
        try:
            with self._routed.time() if token is not None and not isinstance(route, Defaults) else nullcontext():
                yield
        finally:
            local.route = outer
            local.choices -= token is not None
            if token is not None:
                _CHOSEN.reset(token)

    @contextmanager
    def choose(self, route: Route) -> Iterator[None]:
        """Makes ``route`` the choice of the calling thread and task."""
        # Tasks of an event loop take turns on one thread: there only a call through the handle may set the local.
        with self._choosing(route, traced=asyncio._get_running_loop() is None):
            yield

    @contextmanager
    def call(self, route: Route | None = None) -> Iterator[None]:
        """One call through the handle: writes wait for it, and compiled code sees the choice."""
        local = self._local
        if local.depth == 0:
            self._enter_read()
        local.depth += 1
        try:
            with self._choosing(route if route is not None else self._choice(), traced=True):
                yield
        finally:
            local.depth -= 1
            if local.depth == 0:
                self._leave_read()

    @property
    def inside(self) -> bool:
        """Whether the calling thread is inside a call through the handle."""
        return self._local.depth > 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A merge, swap, delete or load: alone with the model.

        It waits for the running calls, and calls that come meanwhile wait for it, but not for ever: the running ones
        may be waiting for them. However many come, it waits no longer than four times the longest call.

        Raises:
            BusyError: The calling thread is inside a forward of this model.
        """
        if self._local.depth:
            raise BusyError(
                "merge, delete and load change the weights that the running forward uses; call them after."
            )
        me = threading.get_ident()
        with self._changed:
            nested = self._writer == me
            if not nested:
                if not self._waiting:
                    self._since = self._opened = time.monotonic()
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._writer is None and not self._calls)
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()  # an interrupt gives the turn back
                self._writer = me
        try:
            yield
        finally:
            if not nested:
                with self._changed:
                    self._writer = None
                    self._since = self._opened = time.monotonic()  # calls that came meanwhile pass the next writer
                    self._changed.notify_all()

    def _enter_read(self) -> None:
        me, came = threading.get_ident(), time.monotonic()
        with self._changed:
            while self._writer not in (None, me) or (self._writer is None and self._waiting and came > self._opened):
                if self._writer is not None or not self._calls:  # it is a writer's turn
                    self._changed.wait()
                elif (left := self._opened + self._patience() - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._opened = time.monotonic()
                    self._changed.notify_all()
            self._calls[me] = time.monotonic()

    def _patience(self) -> float:
        """How long calls let writers go first before they pass them, all that wait at once.

        A running call may itself be waiting for one of these, so none waits for ever. While a call runs that is older
        than the writer, they pass soon. Later, with only calls running that passed the writer, patience grows with its
        age; once it exceeds the longest call, the running ones end before others pass, and it is the writer's turn.
        """
        return max(PATIENCE, next(iter(self._calls.values())) - self._since)

    def _leave_read(self) -> None:
        with self._changed:
            del self._calls[threading.get_ident()]
            if not self._calls:
                self._changed.notify_all()

    def bind(self, function: Callable[P, T]) -> Callable[P, T]:
        """``function`` with the routing of this moment, wherever and whenever it runs."""
        if torch.compiler.is_compiling():  # one graph has both runs
            return function
        moment = self.now()
        route = self._choice() or moment
        names = route.names if route.rows is None else route.rows.names

        @wraps(function)
        def bound(*args: P.args, **kwargs: P.kwargs) -> T:
            moment.check(names, names)
            with self._choosing(route, traced=True):
                return function(*args, **kwargs)

        return bound

    def now(self) -> Defaults:
        """This moment's defaults."""
        with self._changed:
            last = self._moment() if self._moment is not None else None
            if last is not None and not last.changed:
                return last
            now = Defaults()
            if last is not None:
                last.later.append(now)
            self._moment = weakref.ref(now)
            return now

    def changing(self, layer: object, default: tuple[str, ...], lost: Iterable[str] = ()) -> None:
        """A layer's ``default`` is about to be another, and adapters are about to be ``lost`` to what ran before."""
        with self._changed:
            if self._moment is not None and (now := self._moment()) is not None:
                now.before.setdefault(layer, default)
                now.lost.update(lost)


class Bound:
    """A checkpointing function ``(function, *args, **kwargs)`` that carries the routing into the recomputation."""

    def __init__(self, checkpoint: Callable[..., Any], router: Router) -> None:
        self.checkpoint, self.router = checkpoint, router

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(self.router.bind(function), *args, **kwargs)
