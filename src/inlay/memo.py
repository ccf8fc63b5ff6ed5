"""What a layer keeps from one call to the next, and how it is seen that it no longer holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.methods._abstract import AbstractAdapter, Params


class Memo:
    """Values that depend on tensors which seldom change, computed again when one of them has."""

    # Writes through `.data` leave no trace in a tensor's version; up to this many elements a copy is compared as well.
    small = 1 << 18

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[tuple[weakref.ref[Tensor], int, int, Tensor | None]], Tensor]] = {}

    def get(self, key: Hashable, owners: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        at = (key, *map(id, owners))
        known = self._known.get(at)
        if known is not None and all(map(self._unchanged, owners, known[0])):
            return known[1]
        lasts = not any(t.is_inference() for t in owners)  # of these nothing tells that they were written to
        # What is kept must serve later calls with gradients too, and carry none itself.
        with torch.inference_mode(torch.is_inference_mode_enabled() and not lasts), torch.no_grad():
            value = make()
        if lasts:
            self._known[at] = ([self._mark(t) for t in owners], value)
        return value

    def _mark(self, t: Tensor) -> tuple[weakref.ref[Tensor], int, int, Tensor | None]:
        return weakref.ref(t), t._version, t.data_ptr(), t.detach().clone() if t.numel() <= self.small else None

    @staticmethod
    def _unchanged(t: Tensor, mark: tuple[weakref.ref[Tensor], int, int, Tensor | None]) -> bool:
        ref, version, pointer, copy = mark
        same = ref() is t and t._version == version and t.data_ptr() == pointer
        return same and (copy is None or torch.equal(copy, t))

    def forget(self, owners: Iterable[Tensor]) -> None:
        """Drops what depends on any of these."""
        gone = set(map(id, owners))
        self._known = {at: value for at, value in self._known.items() if gone.isdisjoint(at[1:])}

    def clear(self) -> None:
        self._known.clear()


class Stack:
    """The factors of several adapters, each kind in one tensor, and the marks by which a change of any is seen.

    Scales have no marks: the layer, through which they are changed, drops its stacks then.

    Args:
        parts (`dict`): For each adapter its method, its tensors, and where these are kept.
        apart (`tuple[str, ...]`): Adapters that must run by themselves.
    """

    def __init__(self, parts: dict[str, tuple[AbstractAdapter, Params, list[Any]]], apart: tuple[str, ...]) -> None:
        self.order, self.apart = tuple(parts), apart
        if torch.compiler.is_compiling():  # stacked anew in each call: traced code can neither keep nor compare
            self.lasts = False
            if parts:
                self.factors = self._stacked(self._found(parts))
            return
        tensors = [(d, k, d[k]) for _, _, owners in parts.values() for d, k in owners if d.get(k) is not None]
        trained = torch.is_grad_enabled() and any(t.requires_grad for _, p, _ in parts.values() for t in p.values())
        # Whether a change of any would be seen, and no backward asks for a stack of its own.
        self.lasts = not trained and not any(t.is_inference() for _, _, t in tensors)
        self._marks = [(d, k, t, t._version, t.data_ptr()) for d, k, t in tensors] if self.lasts else []
        if parts:
            inference = torch.is_inference_mode_enabled() and not self.lasts
            with torch.inference_mode(inference), torch.set_grad_enabled(trained):
                self.factors = self._stacked(self._found(parts))

    @staticmethod
    def _found(parts: dict[str, tuple[AbstractAdapter, Params, list[Any]]]) -> list[tuple[Tensor, Tensor, Any]]:
        factors = [m.factors(p) for m, p, _ in parts.values()]
        return [f for f in factors if f is not None]

    @staticmethod
    def _stacked(factors: list[tuple[Tensor, Tensor, Any]]) -> tuple[Tensor, Tensor]:
        R = max(down.shape[0] for down, _, _ in factors)
        downs = [F.pad(down, (0, 0, 0, R - down.shape[0])) for down, _, _ in factors]
        ups_RO = [F.pad((up * scale).t(), (0, 0, 0, R - up.shape[1])) for _, up, scale in factors]
        # Up factors lie transposed in memory: that is how a product with few rows reads them.
        return torch.stack(downs), torch.stack(ups_RO).transpose(1, 2)

    def current(self) -> bool:
        """Whether nothing has changed since, and no gradient is asked for that the stack could not carry."""
        wanted = torch.is_grad_enabled()
        for d, k, t, version, pointer in self._marks:
            if d.get(k) is not t or t._version != version or t.data_ptr() != pointer or (wanted and t.requires_grad):
                return False
        return True
