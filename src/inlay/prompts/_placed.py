"""Prompts as they stand before the rows of one batch, what a call with them is checked for, and the cache they fill.

Rows may have prompts of different lengths, or none: shorter ones are padded on the left and masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.errors import PromptError, RowsError
from inlay.prompts._abstract import AbstractPrompt, Host, PromptLearningConfig
from inlay.routing import Rows


class Placed(NamedTuple):
    """Prompts as they stand before the rows of one batch.

    Args:
        values (`Tensor`): (B, T, width), shorter prompts padded on the left.
        mask_BT (`Tensor`, *optional*): 1 for a token and 0 for padding; `None` where nothing is padded.
        config (`PromptLearningConfig`): That of one of them.
    """

    values: Tensor
    mask_BT: Tensor | None
    config: PromptLearningConfig

    @property
    def length(self) -> int:
        """T."""
        return self.values.shape[1]

    def own(self) -> Tensor | int:
        """How many tokens each row's prompt has: (B, 1), or the same for all."""
        return self.length if self.mask_BT is None else self.mask_BT.sum(1, keepdim=True)

    def ones(self, like: Tensor) -> Tensor:
        """The mask, in the dtype of the input's."""
        if self.mask_BT is None:
            return like.new_ones(len(like), self.length)
        return self.mask_BT.to(like)

    def fill(self, host: Host, cache: Any = None) -> Any:
        """An empty cache, a new one if none is given, with the prompt's keys and values in it."""
        cache = host.empty_cache() if cache is None else cache
        own = cache.self_attention_cache if host.seq2seq else cache
        for i, (k, v) in enumerate(self._keys_and_values(host)):
            own.update(k, v, i)
        return cache

    def _keys_and_values(self, host: Host) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of every layer, each (B, heads, T, head width), of what stands flat in an encoder's table."""
        layers, heads = self.config.num_layers or 0, self.config.num_attention_heads or 0
        B, T, _ = self.values.shape
        flat = self.values.to(host.model.dtype).view(B, T, layers * 2, heads, -1).permute(2, 0, 3, 1, 4)
        pairs = list(zip(flat[0::2], flat[1::2], strict=True))
        if (
            host.seq2seq
        ):  # the order that files are trained in: PEFT lays the table out twice and deals it out by fours
            return [pairs[(2 * i) % layers] for i in range(host.decoder_layers or layers)]
        return pairs[: layers - (host.config.get("num_kv_shared_layers") or 0)]  # the last ones read the others' cache


class Choice(NamedTuple):
    """The prompts of one call: some before all rows, in this order, or one before each row."""

    prompts: dict[str, AbstractPrompt]
    rows: Rows | None = None

    def only(self) -> AbstractPrompt | None:
        """The prompt of all rows, where there is one."""
        return next(iter(self.prompts.values())) if self.rows is None and len(self.prompts) == 1 else None

    @property
    def length(self) -> int:
        """How many tokens they put before the input, padding of shorter ones included."""
        ways = [[p.length for p in self.prompts.values() if p.config.in_cache == way] for way in (False, True)]
        return sum(sum(T) if self.rows is None else max(T, default=0) for T in ways)

    def placed(self, in_cache: bool, B: int, tasks_B: Tensor | None, decoder: bool = False) -> Placed | None:
        """Those that come in one way, before a batch of B rows."""
        mine = {n: p for n, p in self.prompts.items() if p.config.in_cache == in_cache}
        if not mine:
            return None
        config = next(iter(mine.values())).config
        tasks_B = None if tasks_B is None else _tasks(tasks_B, B)
        if self.rows is None:
            parts = [_part(p, tasks_B, decoder).expand(B, -1, -1) for p in mine.values()]
            return Placed(torch.cat(parts, 1), None, config)
        T = max(p.length for p in mine.values())
        device = next(next(p.parameters()).device for p in mine.values())
        rows = self.rows.fitted(B, device, "the prompt")
        values: Tensor | None = None
        lengths_B1 = torch.zeros(B, 1, dtype=torch.long, device=device)
        for name, at in zip(rows.names, rows.members, strict=True):
            if name in mine and len(at):
                own = _part(mine[name], None if tasks_B is None else tasks_B[at], decoder).expand(len(at), -1, -1)
                padded = F.pad(own, (0, 0, T - own.shape[1], 0))
                values = padded.new_zeros(B, *padded.shape[1:]) if values is None else values
                values = values.index_copy(0, at, padded)
                lengths_B1[at] = own.shape[1]
        if values is None:
            return None
        mask_BT = (torch.arange(T, device=device) >= T - lengths_B1).long()
        return Placed(values, None if bool(mask_BT.all()) else mask_BT, config)


def _tasks(tasks_B: object, B: int) -> Tensor:
    """A task for each row, in a call that names tasks."""
    try:
        tasks = torch.as_tensor(tasks_B)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"task_ids takes a task for each of the {B} rows, got {tasks_B!r}.") from error
    if tasks.shape not in ((B,), (1,)) or tasks.is_floating_point() or tasks.dtype == torch.bool:
        raise PromptError(
            f"task_ids takes a task for each of the {B} rows, this has shape {tuple(tasks.shape)} and {tasks.dtype}."
        )
    return tasks.expand(B).long()  # bytes would be taken for a mask


def _part(prompt: AbstractPrompt, tasks_B: Tensor | None, decoder: bool) -> Tensor:
    """(1 or B, T, width): the encoder's prompt, or the decoder's where there are two."""
    P: Tensor = prompt(tasks_B)
    P = P if P.dim() == 3 else P[None]
    return P[:, prompt.length :] if decoder else P[:, : prompt.length]


class Call:
    """One call's arguments on their way in: what a forward and a ``generate`` have in common.

    Args:
        host (`Host`): The model.
        choice (`Choice`): The prompts.
        given (`Mapping`): What the handle was called with, by name.
    """

    front: Placed | None  # prompts of embeddings
    cached: Placed | None  # prompts in the cache
    parts: list[Placed]  # both, in order
    going_on: bool  # from a call that brought the prompts in
    B: int
    L: int

    def __init__(self, host: Host, choice: Choice, given: Mapping[str, Any]) -> None:
        self.host, self.choice = host, choice
        self.given: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self.tasks_B = self.given.pop("task_ids", None)

    def _place(self, ids_BL: Tensor | None, x_BLD: Tensor | None) -> None:
        """Takes the size of the input, and the prompts for it; raises `PromptError` where there is none."""
        main, dims = (ids_BL, 2) if x_BLD is None else (x_BLD, 3)
        if not isinstance(main, Tensor):
            raise PromptError("A prompt needs the input it stands before: give input_ids or inputs_embeds.")
        if main.dim() != dims:
            name = ("input_ids of shape (batch, tokens)", "inputs_embeds of shape (batch, tokens, width)")[dims - 2]
            raise PromptError(f"A prompt stands before {name}, these have shape {tuple(main.shape)}.")
        self.B, self.L = main.shape[:2]
        self.front, self.cached = (self.choice.placed(way, self.B, self.tasks_B) for way in (False, True))
        self.parts = [p for p in (self.cached, self.front) if p is not None]
        self.going_on = seen(self.given.get("past_key_values")) > 0

    def _embedded(self, ids_BL: Tensor | None, x_BLD: Tensor | None) -> Tensor:
        """The input as embeddings."""
        return self.host.embeddings(ids_BL) if x_BLD is None else x_BLD

    def _check_input(self) -> None:
        """Raises `PromptError` for a mask that cannot be lengthened, or more tokens than the model can number."""
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = self.given.get(name)
            if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
                raise PromptError(
                    f"A prompt lengthens {name}: give one of shape (batch, tokens), not "
                    f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}."
                )
        if not self.going_on and "attention_mask" in self.given:
            self._check_shape("attention_mask")
        self._check_positions([p for p in self.parts if p is self.front or not self.host.seq2seq], self.L)

    def _lengthen(self, placed: Placed, name: str, width: int | None = None) -> Tensor | None:
        """Puts a prompt's part before a mask; one of ``width`` tokens is made if none was given and rows differ."""
        mask: Tensor | None = self.given.get(name)
        if mask is None and width is not None and placed.mask_BT is not None:
            mask = torch.ones(self.B, width, dtype=torch.long, device=placed.values.device)
        if mask is not None:
            self.given[name] = mask = torch.cat([placed.ones(mask), mask], 1)
        return mask

    def _continued(self, placed: Iterable[Placed]) -> int:
        """How many tokens of the input the cache has beside these prompts; raises `PromptError` if it lacks them."""
        T, found = sum(p.length for p in placed), seen(self.given["past_key_values"])
        if found < T:
            raise PromptError(
                f"The cache holds {found} tokens, the prompt has {T}: it was not filled by a call with this prompt. "
                "Give an empty cache, or none."
            )
        return found - T

    def _check_shape(self, name: str) -> None:
        """Raises `PromptError` where what is said of each token is not of the input's shape."""
        if (value := self.given[name]).shape[:2] != (self.B, self.L):
            raise PromptError(
                f"{name} has shape {tuple(value.shape)}, and the input is of {self.B} rows of {self.L} tokens: give "
                "an entry for each of these; those of the prompt are added here."
            )

    def _check_gap(self, L: int) -> None:
        """Raises `RowsError` where padding between a prompt in the cache and L tokens would count as distance."""
        host, front, cached = self.host, self.front, self.cached
        if host.seq2seq or cached is None or front is None or front.mask_BT is None or host.window is None:
            return
        if cached.length + front.length + L > host.window:
            raise RowsError(
                f"Rows with prompts in the cache and rows with prompts of embeddings are in one batch, and "
                f"{type(host.model).__name__} counts the padding between them: have a batch for each."
            )

    def _check_positions(self, placed: Iterable[Placed], L: int) -> None:
        """Raises `PromptError` where these prompts and an input of L tokens have not enough positions."""
        T = sum(p.length for p in placed)
        if T and self.host.positions is not None and self.host.positions < T + L:
            raise PromptError(
                f"A prompt of {T} tokens and an input of {L} exceed the model's {self.host.positions} positions: "
                "shorten one of them."
            )

    def _check_room(self, cache: Any, needed: int) -> None:
        """Raises `PromptError` where a cache of fixed length has no room for so many tokens."""
        from transformers.cache_utils import StaticLayer

        for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
            if isinstance(layer, StaticLayer):
                window = (self.host.config.get("sliding_window") or needed) if layer.is_sliding else needed
                if layer.max_cache_len < min(window, needed):
                    raise PromptError(
                        f"The cache has room for {layer.max_cache_len} tokens; the prompt, the input and what follows "
                        f"are {needed}: make it as long."
                    )


def leading(mask_BL: Tensor) -> Tensor:
    """How much padding is in front of each row, (B, 1)."""
    return (mask_BL != 0).long().argmax(1, keepdim=True)


def padding_behind(mask_BL: Tensor) -> Tensor:
    """The order (B, L) in which a row's padding stands behind its tokens."""
    return (mask_BL == 0).long().argsort(dim=1, stable=True)


def ordered(value: Tensor, at_BL: Tensor) -> Tensor:
    """What is said of each token, (B, L) or (B, L, D), with the tokens in this order."""
    at = at_BL[..., None].expand_as(value) if value.dim() == 3 else at_BL
    return value.gather(1, at.to(value.device))


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int | None) -> Tensor:
    """What a decoder is given to predict ``input_ids``: the same, one place later.

    Raises:
        PromptError: The model's config lacks one of the two tokens.

    Example:
        >>> shift_tokens_right(torch.tensor([[5, 6, -100]]), 0, 1)
        tensor([[1, 5, 6]])
    """
    if pad_token_id is None or decoder_start_token_id is None:
        raise PromptError("The model's config needs pad_token_id and decoder_start_token_id to shift labels.")
    shifted = F.pad(input_ids[:, :-1], (1, 0), value=decoder_start_token_id)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def seen(cache: Any) -> int:
    """How many tokens a cache holds; of none, 0.

    Raises:
        PromptError: It is no cache of transformers.
    """
    from transformers import Cache

    if cache is not None and not isinstance(cache, Cache):
        raise PromptError(f"past_key_values must be a cache of transformers, got a {type(cache).__name__}.")
    return 0 if cache is None else int(cache.get_seq_length())
