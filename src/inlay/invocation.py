"""What a handle does for its activated adapters: finds where each begins, once per call, and remembers it by cache."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from inlay.activation import NEVER, Tokens, last_occurrence
from inlay.errors import ConfigError, PeftWarning, RowsError
from inlay.routing import Defaults, Following, Route, Router, Rows


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
    takes = inspect.signature(model.forward).parameters
    if "use_cache" in takes and "past_key_values" not in takes:
        raise ConfigError(
            "alora_invocation_tokens needs a cache that tells how many tokens it holds: that of "
            f"{type(model).__name__} does not. Leave it out."
        )


def calculate_alora_offsets(
    peft_config: Mapping[str, Any], active_adapter: str, input_ids: Tensor, adapter_names: Sequence[str] | None = None
) -> list[int | None]:
    """On how many of its last tokens an activated adapter acts in each row, as ``alora_offsets`` takes it.

    Args:
        peft_config (`Mapping[str, AdapterConfig]`): Configs by adapter name.
        active_adapter (`str`): The adapter of all rows.
        input_ids (`Tensor`): The rows' tokens.
        adapter_names (`Sequence[str]`, *optional*): Or one for each row.

    Returns:
        `list[int]`: None for a row that has no invocation, or another kind of adapter.

    Example:
        >>> from inlay import LoraConfig
        >>> config = LoraConfig(alora_invocation_tokens=[7, 8])
        >>> calculate_alora_offsets({"a": config}, "a", torch.tensor([[7, 8, 1, 7, 8, 2], [1, 2, 3, 4, 5, 7]]))
        [3, None]
    """
    offsets: list[int | None] = []
    for row, name in enumerate(adapter_names or [active_adapter] * len(input_ids)):
        tokens = peft_config[name].invocation if name in peft_config else None
        at = NEVER if tokens is None else int(last_occurrence(input_ids[row : row + 1], tokens))
        offsets.append(None if at == NEVER else input_ids.shape[1] - at)
    return offsets


def no_invocation(name: str, rows: int) -> str:
    """The warning for rows without an adapter's invocation."""
    return (
        f"{rows} rows have no invocation of the adapter {name!r}: there the base model runs. It begins at the tokens "
        "of alora_invocation_tokens; alora_offsets says where, if the call has no ids."
    )


def _positional(function: Any) -> tuple[str, ...]:
    """Names of the arguments that a function takes by position."""
    parameters = inspect.signature(function).parameters.values() if callable(function) else ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _named(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


class _Step:
    """A hook before the model's forward, which tells the running call's `Tokens` which tokens are coming."""

    def __init__(self, router: Router, names: Sequence[str]) -> None:
        self.router, self.names = router, names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        route = self.router.route()
        if route is not None and route.tokens is not None:
            given = _named(self.names, args, kwargs)
            x = _main(given)
            assert x is not None, "the model has an input"
            route.tokens.step(_past(given), x.shape[0], x.shape[1], given.get("logits_to_keep"))


def _main(given: Mapping[str, Any]) -> Tensor | None:
    found = (given.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
    return next((t for t in found if isinstance(t, Tensor)), None)


def _past(given: Mapping[str, Any]) -> int:
    cache = given.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


class Invocations:
    """The activated adapters of one model.

    Args:
        model (`nn.Module`): The user's model.
        router (`Router`): Its routing.
    """

    def __init__(self, model: nn.Module, router: Router) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.router = router
        # By whether the call is one of `generate`.
        self._names = {False: _positional(model.forward), True: _positional(getattr(model, "generate", None))}
        self._hook = model.register_forward_pre_hook(_Step(router, self._names[False]), with_kwargs=True)
        # What earlier calls found, by the cache that they filled.
        self._found: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()

    # Copies and pickles know nothing of caches.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_found"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _found=WeakKeyDictionary())

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
        given = _named(self._names[whole], args, kwargs)
        earlier = self._earlier(given)
        rows = None if route is None else route.rows
        names = rows.names if rows is not None else active if route is None else route.names
        if isinstance(route, Defaults):  # of a moment that is over: which were active is for each layer to say
            names = tuple(self.tokens)
        mine = [n for n in names if n in self.tokens]
        if not mine:
            return route
        call = _Call(given, offsets, whole, prompt)
        starts = {n: call.starts(self.tokens[n], earlier.get(n)) for n in mine}
        if offsets is None and not isinstance(route, Defaults):
            # The caller of `generate`, or of the module that calls `forward`.
            self._warn({n: s for n, s in starts.items() if n not in earlier or call.seeks}, rows, 6 if whole else 8)
        tokens = Tokens(starts if rows is None else {**starts, "": _by_row(rows, starts)})
        tokens.step(call.before + prompt, call.B, call.L)  # for embeddings that a prompt stands before
        if route is None or isinstance(route, Defaults):
            return Following(tuple(names), None, tokens, route or self.router.now())
        return Route(route.names, rows, tokens)

    def _earlier(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What earlier calls found in what the cache still holds, by adapter; `NEVER` where that is nothing."""
        cache = given.get("past_key_values")
        known, x, past = self._found.get(cache) if cache is not None else None, _main(given), _past(given)
        if known is None or x is None:
            return {}
        fitted = {}
        for name, starts_B in known.items() if past else ():
            times, rest = divmod(len(x), len(starts_B))
            if times and not rest:  # else rows of the cache were selected, and which is not known
                fitted[name] = torch.where(starts_B < past, starts_B, NEVER).repeat_interleave(times)
        self._found[cache] = fitted
        return fitted

    def remember(
        self, route: Route | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: bool, outputs: Any
    ) -> None:
        """Keeps what a call has found, for calls that go on from its cache."""
        if route is None or route.tokens is None:
            return
        made = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else ()
        for cache in (_named(self._names[whole], args, kwargs).get("past_key_values"), *made):
            if callable(getattr(cache, "get_seq_length", None)):
                self._found[cache] = {**self._found.get(cache, {}), **route.tokens.starts}

    @staticmethod
    def _warn(starts: Mapping[str, Tensor], rows: Rows | None, level: int) -> None:
        told = []
        for name, starts_B in starts.items():
            silent = starts_B == NEVER
            if rows is not None:
                silent = silent[rows.of_adapter(name).to(silent.device)]
            if n := int(silent.sum()):
                told.append(no_invocation(name, n))
        if told:
            warnings.warn("\n".join(told), PeftWarning, stacklevel=level)


class _Call:
    """What one call says of where its adapters begin."""

    def __init__(
        self, given: Mapping[str, Any], offsets: Sequence[int | None] | None, whole: bool, prompt: int
    ) -> None:
        x = _main(given)
        if x is None:
            raise RowsError("An activated adapter needs the call's input: give input_ids or inputs_embeds.")
        ids, mask = given.get("input_ids", given.get("inputs")), given.get("attention_mask")
        self.ids_BL: Tensor | None = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
        self.mask: Tensor | None = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.B, self.L = x.shape[:2]
        self.past = _past(given)
        self.offsets, self.whole, self.prompt = offsets, whole, prompt
        # Tokens of the sequence before the input: in `generate` a longer mask says that it is only what is new.
        covered = self.L if self.mask is None else self.mask.shape[1]
        self.before = max(covered - self.L, 0) if whole else max(self.past - prompt, 0)
        self.seeks = whole or self.L > 1  # one token behind a cache is one that was written
        if offsets is not None:
            self._check(offsets)

    def _check(self, offsets: Any) -> None:
        if isinstance(offsets, Tensor):
            self.offsets = offsets = offsets.tolist()
        if not isinstance(offsets, Sequence) or any(n is not None and type(n) is not int for n in offsets):
            raise RowsError(f"alora_offsets holds a number of tokens or None for each row, got {offsets!r}.")
        if len(offsets) != self.B:
            raise RowsError(
                f"alora_offsets has {len(offsets)} entries for a batch of {self.B} rows: give one per row."
            )

    def starts(self, tokens: Sequence[int], earlier_B: Tensor | None) -> Tensor:
        """(B,): the index in the sequence, prompt included, of the first token on which an adapter acts."""
        if self.offsets is not None:
            found_B = torch.tensor([NEVER if n is None or n <= 0 else self.L - n for n in self.offsets])
        elif self.ids_BL is None:
            found_B = torch.full((self.B,), NEVER)
        else:
            L = self.ids_BL.shape[1]
            found_B = last_occurrence(self.ids_BL, tokens, None if self.mask is None else self.mask[:, -L:])
            found_B = torch.where(found_B == NEVER, NEVER, found_B + (self.L - L))
        found_B = torch.where(found_B == NEVER, NEVER, found_B + self.before + self.prompt)
        if earlier_B is None or self.offsets is not None:
            return found_B
        earlier_B = earlier_B.to(found_B.device)
        # What was found stays; but the whole sequence may have a later invocation, of the next turn.
        later_B = (found_B >= self.past) & (found_B != NEVER) & self.whole
        return torch.where(((earlier_B == NEVER) & self.seeks) | later_B, found_B, earlier_B)


def _by_row(rows: Rows, starts: Mapping[str, Tensor]) -> Tensor:
    """Each row's own: where its activated adapter begins, or 0."""
    own_B = torch.zeros(len(rows.ids_B), dtype=torch.long)
    for name, at in zip(rows.names, rows.members, strict=True):
        if name in starts:
            own_B[at] = starts[name].to(own_B.device)[at]
    return own_B
