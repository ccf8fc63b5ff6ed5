"""Prompts as they stand before the rows of one batch, and the cache that keys and values of prompts stand in.

Rows may have prompts of different lengths, or none: shorter ones are padded on the left and masked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.errors import PromptError
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
    tasks = torch.as_tensor(tasks_B)
    if tasks.shape not in ((B,), (1,)) or tasks.is_floating_point():
        raise PromptError(
            f"task_ids takes a task for each of the {B} rows, this has shape {tuple(tasks.shape)} and {tasks.dtype}."
        )
    return tasks.expand(B)


def _part(prompt: AbstractPrompt, tasks_B: Tensor | None, decoder: bool) -> Tensor:
    """(1 or B, T, width): the encoder's prompt, or the decoder's where there are two."""
    P: Tensor = prompt(tasks_B)
    P = P if P.dim() == 3 else P[None]
    return P[:, prompt.length :] if decoder else P[:, : prompt.length]


def embedded(host: Host, ids_BL: Tensor | None, x_BLD: Tensor | None) -> Tensor:
    """The input as embeddings."""
    if x_BLD is None:
        x_BLD = host.embeddings(ids_BL)
    return x_BLD


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


# ---------------------------------------------------------------------- the cache


def fill(host: Host, placed: Placed, cache: Any = None) -> Any:
    """An empty cache, a new one if none is given, with a prompt's keys and values in it."""
    from transformers import DynamicCache, EncoderDecoderCache

    if cache is None:
        cache = DynamicCache(config=host.text)
        cache = EncoderDecoderCache(cache, DynamicCache(config=host.text)) if host.seq2seq else cache
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for i, (k, v) in enumerate(_keys_and_values(host, placed)):
        own.update(k, v, i)
    return cache


def _keys_and_values(host: Host, placed: Placed) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of every layer, each (B, heads, T, head width), of what stands flat in an encoder's table."""
    layers, heads = placed.config.num_layers or 0, placed.config.num_attention_heads or 0
    B, T, _ = placed.values.shape
    flat = placed.values.to(host.model.dtype).view(B, T, layers * 2, heads, -1).permute(2, 0, 3, 1, 4)
    pairs = list(zip(flat[0::2], flat[1::2], strict=True))
    if host.seq2seq:  # the order that files are trained in: PEFT lays the table out twice and deals it out by fours
        return [pairs[(2 * i) % layers] for i in range(layers)]
    return pairs[: layers - (host.config.get("num_kv_shared_layers") or 0)]  # the last ones read the others' cache


def continued(cache: Any, placed: Iterable[Placed]) -> int:
    """How many tokens of the input a cache that holds something has, beside these prompts.

    Raises:
        PromptError: It cannot hold the prompts.
    """
    T, found = sum(p.length for p in placed), cache.get_seq_length()
    if found < T:
        raise PromptError(
            f"The cache holds {found} tokens, the prompt has {T}: it was not filled by a call with this prompt. Give "
            "an empty cache, or none."
        )
    return int(found - T)
