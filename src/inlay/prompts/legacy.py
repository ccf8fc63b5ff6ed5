"""Prompts in the layouts of caches that transformers no longer has, for callers that still build them.

Both take what `(layers * 2, B, heads, T, head width)` splits into by twos, and nothing here calls them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bloom_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Bloom's old cache: (keys (B * heads, width, T), values (B * heads, T, width)) of every layer.

    Keys are the first half of the table and values the second, and within a row of keys T and heads change places:
    files were trained so.
    """
    table = torch.cat(tuple(past_key_values))
    layers, B, heads, T, width = len(table) // 2, *table.shape[1:]
    keys = table[:layers].transpose(2, 3).reshape(layers, B * heads, width, T)
    values = table[layers:].reshape(layers, B * heads, T, width)
    return tuple(zip(keys, values, strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """GPTBigCode's old cache: (B, T, keys and values) of every layer, of its one key head."""
    return tuple(torch.cat([k[:, 0], v[:, 0]], -1) for k, v in past_key_values)
