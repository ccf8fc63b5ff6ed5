"""What a handle does for its activated adapters: finds where each begins, once per call, and remembers it by cache."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from inlay.activation import NEVER, Tokens, last_occurrence
from inlay.errors import ConfigError, PeftWarning, RowsError
from inlay.routing import Following, Route, Router, Rows


def check_invocation(tokens: Sequence[int], model: nn.Module) -> None:
    """Raises `ConfigError` where a model cannot have an activated adapter with this invocation."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    text = get() if callable(get) else config
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is not None and max(tokens) >= vocabulary:
        raise ConfigError(
            f"alora_invocation_tokens has the token {max(tokens)}, the model's vocabulary has {vocabulary}."
        )
    can_generate: Any = getattr(model, "can_generate", None)
    if getattr(text, "is_encoder_decoder", False) or (callable(can_generate) and not can_generate()):
        raise ConfigError(
            f"alora_invocation_tokens is for causal language models: {type(model).__name__} is none. Leave it out."
        )


def no_invocation(name: str, rows: int) -> str:
    """The warning for rows without an adapter's invocation."""
    return (
        f"{rows} rows have no invocation of the adapter {name!r}: there the base model runs. It begins at the tokens "
        "of alora_invocation_tokens; alora_offsets says where, if the call has no ids."
    )


class _Step:
    """A hook before the model's forward, which tells the running call's `Tokens` which tokens are coming."""

    def __init__(self, router: Router) -> None:
        self.router = router

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        route = self.router.route()
        if route is not None and route.tokens is not None:
            x = _main(args, kwargs)
            assert x is not None, "the model has an input"
            route.tokens.step(_length(kwargs.get("past_key_values")), x.shape[1])


def _main(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("inputs"), *args[:1])
    return next((t for t in given if isinstance(t, Tensor)), None)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


class Invocations:
    """The activated adapters of one model.

    Args:
        model (`nn.Module`): The user's model.
        router (`Router`): Its routing.
    """

    def __init__(self, model: nn.Module, router: Router) -> None:
        self.tokens: dict[str, list[int]] = {}
        self._hook = model.register_forward_pre_hook(_Step(router), with_kwargs=True)
        # What earlier calls found, by the cache that they filled.
        self._found: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Invocations:
        copied = object.__new__(Invocations)
        copied.tokens, copied._hook, copied._found = dict(self.tokens), self._hook, WeakKeyDictionary()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": WeakKeyDictionary()}

    def remove(self, name: str) -> None:
        """Forgets an adapter; without any left the model is as it was."""
        self.tokens.pop(name, None)
        if not self.tokens:
            self._hook.remove()

    def route(
        self,
        route: Route | None,
        active: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        offsets: Sequence[int | None] | None,
        whole: bool,
        prompt: int = 0,
    ) -> Route | None:
        """The routing of a call in which activated adapters act on their tokens only.

        Args:
            route (`Route`, *optional*): What was chosen; None for the default.
            active (`tuple[str, ...]`): The default.
            args, kwargs: The call's.
            offsets (`Sequence[int]`, *optional*): The caller's ``alora_offsets``.
            whole (`bool`): Whether ids are the whole sequence, as in ``generate``, or what comes behind the cache.
            prompt (`int`, *optional*, defaults to 0): Virtual tokens that stand before the input.

        Raises:
            RowsError: ``alora_offsets`` does not fit the batch.
        """
        rows = None if route is None else route.rows
        names = rows.names if rows is not None else active if route is None else route.names
        mine = [n for n in names if n in self.tokens]
        if not mine:
            return route
        call = _Call(args, kwargs, offsets, whole, prompt)
        earlier = self._found.get(kwargs.get("past_key_values"), {}) if call.past else {}
        starts = {n: earlier[n] if n in earlier else call.starts(self.tokens[n]) for n in mine}
        self._warn({n: s for n, s in starts.items() if n not in earlier}, rows)
        if rows is not None:
            starts = {"": _by_row(rows, starts)}
        if route is None:
            return Following(active, None, Tokens(starts))
        return Route(route.names, rows, Tokens(starts))

    def remember(self, route: Route | None, *caches: Any) -> None:
        """Keeps what a call has found, for calls that go on from its cache."""
        if route is not None and route.tokens is not None and route.rows is None:
            for cache in caches:
                if cache is not None:
                    self._found[cache] = route.tokens.starts

    @staticmethod
    def _warn(starts: Mapping[str, Tensor], rows: Rows | None) -> None:
        for name, starts_B in starts.items():
            silent = starts_B == NEVER
            if rows is not None:
                silent = silent[rows.members[rows.names.index(name)].to(silent.device)]
            if n := int(silent.sum()):
                warnings.warn(no_invocation(name, n), PeftWarning, stacklevel=6)


class _Call:
    """What one call says of where its adapters begin."""

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        offsets: Sequence[int | None] | None,
        whole: bool,
        prompt: int,
    ) -> None:
        x = _main(args, kwargs)
        if x is None:
            raise RowsError("An activated adapter needs the call's input: give input_ids or inputs_embeds.")
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self.ids_BL: Tensor | None = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
        self.mask = kwargs.get("attention_mask")
        self.B, self.L = x.shape[:2]
        self.past = _length(kwargs.get("past_key_values"))
        self.offsets, self.prompt = offsets, prompt
        # Tokens of the sequence before the ids: in `generate` a longer mask says that ids are only what is new.
        covered = self.mask.shape[1] if isinstance(self.mask, Tensor) and self.mask.dim() == 2 else self.L
        self.before = max(covered - self.L, 0) if whole else max(self.past - prompt, 0)
        if offsets is not None and len(offsets) != self.B:
            raise RowsError(
                f"alora_offsets has {len(offsets)} entries for a batch of {self.B} rows: give one per row."
            )

    def starts(self, tokens: Sequence[int]) -> Tensor:
        """(B,): the index in the sequence, prompt included, of the first token on which an adapter acts."""
        if self.offsets is not None:
            found = [NEVER if n is None or n <= 0 else self.L - n for n in self.offsets]
            found_B = torch.tensor(found)
        elif self.ids_BL is None:
            return torch.full((self.B,), NEVER)
        else:
            mask = self.mask if isinstance(self.mask, Tensor) and self.mask.dim() == 2 else None
            found_B = last_occurrence(self.ids_BL, tokens, None if mask is None else mask[:, -self.L :])
        return torch.where(found_B == NEVER, NEVER, found_B + self.before + self.prompt)


def _by_row(rows: Rows, starts: Mapping[str, Tensor]) -> Tensor:
    """Each row's own: where its activated adapter begins, or 0."""
    own_B = torch.zeros(len(rows.ids_B), dtype=torch.long)
    for name, at in zip(rows.names, rows.members, strict=True):
        if name in starts:
            own_B[at] = starts[name].to(own_B.device)[at]
    return own_B
