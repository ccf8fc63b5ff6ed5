"""What a session's cache holds: keys and values by owner, and what shows that they are still right.

An entry, the keys and values of one token in every layer, depends on all tokens before it and on the weights that saw
them. Entries are therefore kept in streams, each with its owner:

    base        0 ... end        computed by the base, over entries of the base
    adapter     begin ... end    computed by the adapter; an activated one begins at its invocation, over entries of
                                 the base; any other begins at 0

A stream is valid for one place of the invocation: where a newer one moves it, the adapter's old entries go. All is
immutable, and branches hold the same tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay.activation import NEVER
from inlay.adapted import Adapted
from inlay.errors import CacheError
from inlay.walk import wrappers

Names = tuple[str, ...]
Entries = tuple[tuple[Tensor, Tensor], ...]  # for each layer keys and values (1, heads, tokens, width)
Weights = Mapping[str, Sequence[Any]]  # by adapter, and for the base under ""


class Owner(NamedTuple):
    """Whose entries these are: the adapters that act, where each starts, and where entries cease to be the base's."""

    names: Names = ()
    starts: tuple[int, ...] = ()
    begin: int = NEVER


_BASE = Owner()


@dataclass(frozen=True)
class Stream:
    """One owner's entries of the tokens ``begin`` to ``end``."""

    owner: Owner = _BASE
    begin: int = 0
    parts: tuple[Entries, ...] = ()

    @property
    def end(self) -> int:
        return self.begin + sum(part[0][0].shape[2] for part in self.parts)

    def cut(self, end: int) -> Stream:
        """What of it lies before ``end``."""
        parts, at = [], self.begin
        for part in self.parts:
            size = part[0][0].shape[2]
            if at + size <= end:
                parts.append(part)
            elif at < end:
                parts.append(tuple((K[:, :, : end - at], V[:, :, : end - at]) for K, V in part))
            at += size
        return replace(self, parts=tuple(parts))

    def plus(self, part: Entries) -> Stream:
        """With the entries that follow."""
        return replace(self, parts=(*self.parts, part))


@dataclass(frozen=True)
class State:
    """All that a session knows: replaced whole at the end of a turn, so that no error leaves half of one."""

    ids_L: Tensor
    streams: Mapping[Names, Stream]  # the base's is under ()
    weights: Weights

    def current(self, weights: Weights) -> State:
        """Without what other weights than these have computed."""
        kept = self.streams if weights[""] == self.weights[""] else {(): Stream()}
        valid = {k: s for k, s in kept.items() if all(weights.get(n) == self.weights.get(n) for n in k)}
        return replace(self, streams=valid, weights=weights)

    def prefix(self, owner: Owner, most: int) -> tuple[Stream, Stream]:
        """The longest valid entries of an owner for the first ``most`` tokens: the base's, and its own."""
        base, own = self.streams[()].cut(min(owner.begin, most)), self.streams.get(owner.names)
        if own is None or own.owner != owner or base.end < owner.begin:
            own = Stream(owner, owner.begin)
        return base, own.cut(most)

    def rewound(self, n: int) -> State:
        """Without the last ``n`` tokens."""
        L = len(self.ids_L) - n
        return replace(self, ids_L=self.ids_L[:L], streams={k: s.cut(L) for k, s in self.streams.items()})


# ---------------------------------------------------------------------- weights


class _Mark:
    """A tensor as it was: equal to another mark where it is the same one and has not been written to between."""

    def __init__(self, t: Tensor) -> None:
        self._ref = weakref.ref(t)  # an id alone may be another tensor's by now
        self._at = (0 if t.is_inference() else t._version, t.data_ptr())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and self._at == other._at and self._ref() is other._ref() is not None


def weights_of(model: nn.Module) -> Weights:
    """What entries depend on, to be compared with the same of another time."""
    found: dict[str, list[Any]] = {}
    mine: set[int] = set()

    def see(name: str, tensors: Sequence[Tensor]) -> None:
        found.setdefault(name, []).extend(_Mark(t) for t in tensors)
        mine.update(map(id, tensors))

    for _, wrapper in wrappers(model):
        if isinstance(wrapper, Adapted):
            for name, method in wrapper.methods.items():
                see(name, [owner.get_parameter(attribute) for _, owner, attribute in wrapper.tensors(name)])
                found[name] += [getattr(method, number) for number in method.numbers]
        else:
            for name, module in wrapper.modules_to_save.items():
                see(name, list(module.parameters()))
    found[""] = [_Mark(p) for p in model.parameters() if id(p) not in mine]
    return found


# ---------------------------------------------------------------------- a model's cache


def entries_of(cache: Any, start: int, end: int) -> Entries:
    """A copy of one row's entries ``start`` to ``end``.

    Raises:
        CacheError: The cache has not all of them.
    """
    for layer in cache.layers:
        if layer.keys is None or len(layer.keys) != 1 or min(layer.keys.shape[2], layer.get_seq_length()) < end:
            raise CacheError(
                f"The cache was to hold one row of {end} tokens in each layer, and one has "
                f"{None if layer.keys is None else list(layer.keys.shape)}: this cannot be shared."
            )
    return tuple((t.keys[:, :, start:end].clone(), t.values[:, :, start:end].clone()) for t in cache.layers)


def joined(base: Stream, own: Stream) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, one stream behind the other; what is whole already is not copied."""
    layers = []
    for pairs in zip(*base.parts, *own.parts, strict=True):
        Ks, Vs = zip(*pairs, strict=True)
        layers.append(pairs[0] if len(pairs) == 1 else (torch.cat(Ks, 2), torch.cat(Vs, 2)))
    return layers


def check_same(computed: Entries, given: Entries) -> None:
    """Raises `CacheError` where the model computes other entries than were given."""
    if len(computed) != len(given):
        raise CacheError(f"past_key_values has {len(given)} layers, the model {len(computed)}.")
    for pair in zip(computed, given, strict=True):
        for t, g in zip(*pair, strict=True):
            if t.shape != g.shape or t.dtype != g.dtype or t.device != g.device:
                raise CacheError(
                    f"past_key_values is of another model: it has {g.dtype} {list(g.shape)} on {g.device}, where this "
                    f"one has {t.dtype} {list(t.shape)} on {t.device}."
                )
            if float((t - g).abs().max()) > torch.finfo(t.dtype).eps ** 0.5 * float(t.abs().max()):
                raise CacheError("past_key_values is not what the base model computes of these tokens.")
