"""Which adapter serves which thread, task or row: the per-call context.

A choice is made in a context variable (so threads and asyncio tasks are kept apart) and copied, for the duration of
one call through the handle, into a thread-local that compiled code can read: a context variable cannot be traced. With
no choice made, a layer follows its own default and pays one attribute read.

A forward that is computed again in backward (activation checkpointing) must see the routing of its first run, which
is gone by then: `bind` carries it along, the handle binds the checkpointing functions of models it knows, and a layer
that finds itself recomputed without routing, after it has been routed, raises instead of training another adapter.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from inlay.errors import BusyError, LostRoutingError, RowsError

P = ParamSpec("P")
T = TypeVar("T")

BASE = "__base__"  # in adapter_names: this row runs the frozen model


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
            counted = ids_B.numel() == len(order) and torch.equal(ids_B, torch.arange(len(order), device=ids_B.device))
            self._orders[order] = None if counted else ids_B
        return self._orders[order]


@dataclass(frozen=True, eq=False)
class Route:
    """One call's choice: adapters for the whole batch (none for the frozen model), or by row."""

    names: tuple[str, ...] = ()
    rows: Rows | None = None


# "Each layer's default", chosen on purpose: what a recomputation sees whose forward followed no choice.
DEFAULT = Route()


class _Local(threading.local):
    # Set in every thread, not as defaults of the class: compiled code would not see the first choice come.
    def __init__(self) -> None:
        self.route: Route | None = None
        self.depth = 0


# {router: route}: the choices of the current task. Never changed in place, so tasks cannot see each other's.
_CHOSEN: ContextVar[Mapping[Router, Route]] = ContextVar("inlay_routes")


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class Router:
    """The routing shared by all layers of one model, and the lock between its calls and its writes."""

    def __init__(self) -> None:
        self._local = _Local()
        self._changed = threading.Condition()
        self._readers = 0
        self._writer: int | None = None
        self._waiting = 0
        self._trained_routed = False

    # Copies and pickles of a model get a router of their own; its layers share it through the memo.
    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        copied: Router = memo.setdefault(id(self), Router())
        return copied

    def __reduce__(self) -> tuple[type[Router], tuple[()]]:
        return Router, ()

    def route(self) -> Route | None:
        """The choice that holds here, or None for each layer's default."""
        if torch.compiler.is_compiling():
            route = self._local.route
        else:
            chosen = _CHOSEN.get(None)
            route = None if chosen is None else chosen.get(self)
        if route is None and self._trained_routed and not torch.compiler.is_compiling() and _in_backward():
            raise LostRoutingError(
                "A layer is computed again in backward, and which adapter its forward used is not known here. Wrap "
                "what is checkpointed: checkpoint(model.bind(function), ...) instead of checkpoint(function, ...)."
            )
        return None if route is DEFAULT else route

    def _choice(self) -> Route | None:
        if torch.compiler.is_compiling():
            return self._local.route
        chosen = _CHOSEN.get(None)
        return None if chosen is None else chosen.get(self)

    @contextmanager
    def _choosing(self, route: Route | None, traced: bool) -> Iterator[None]:
        """Makes ``route`` the choice of this context and, where ``traced``, of compiled code on this thread."""
        local = self._local
        outer = local.route
        token = _CHOSEN.set({**_CHOSEN.get({}), self: route}) if route is not None else None
        if traced:
            local.route = route
        if route is not None and torch.is_grad_enabled():
            self._trained_routed = True
        try:
            yield
        finally:
            local.route = outer
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
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._writer is None and self._readers == 0)
                finally:
                    self._waiting -= 1
                self._writer = me
        try:
            yield
        finally:
            if not nested:
                with self._changed:
                    self._writer = None
                    self._changed.notify_all()

    def _enter_read(self) -> None:
        me = threading.get_ident()
        with self._changed:
            # Writers come first, else a busy server would never merge; a writer's own forwards pass.
            self._changed.wait_for(lambda: self._writer in (None, me) and (not self._waiting or self._writer == me))
            self._readers += 1

    def _leave_read(self) -> None:
        with self._changed:
            self._readers -= 1
            if not self._readers:
                self._changed.notify_all()

    def bind(self, function: Callable[P, T]) -> Callable[P, T]:
        """``function`` with the routing of this moment, wherever and whenever it runs."""
        route = self._choice() or DEFAULT

        @wraps(function)
        def bound(*args: P.args, **kwargs: P.kwargs) -> T:
            with self._choosing(route, traced=True):
                return function(*args, **kwargs)

        return bound


class Bound:
    """A checkpointing function ``(function, *args, **kwargs)`` that carries the routing into the recomputation."""

    def __init__(self, checkpoint: Callable[..., Any], router: Router) -> None:
        self.checkpoint, self.router = checkpoint, router

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(self.router.bind(function), *args, **kwargs)
