"""Trainable tokens: new values for single rows of an embedding table, and of a head that is tied to it.

    W'[i] = delta[k] for the k-th trained index i, W' = W elsewhere

The rows start as they are. Files hold the rows; which tokens they belong to stands in the config only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import TokenIndexError
from inlay.layers import LayerKind
from inlay.methods._abstract import AbstractAdapter, Layer, Params, Slot, as_dtype


class TrainableTokensAdapter(AbstractAdapter):
    """Rows of a table: ``values["tokens"]`` says which."""

    ties_whole = True
    numbers = ("token_indices",)

    def __init__(self, config: Any, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        self.token_indices: list[int] = values["tokens"]
        self.indexed = kind.indexed
        out, inner = kind.shape(base)
        vocabulary, width = (inner, out) if kind.indexed else (out, inner)
        bad = [i for i in self.token_indices if not 0 <= i < vocabulary]
        if bad or not self.token_indices or len(set(self.token_indices)) < len(self.token_indices):
            raise TokenIndexError(
                f"trainable_token_indices must be some, different and below the vocabulary of {vocabulary}, got "
                f"{bad or self.token_indices}."
            )
        self.slots = {"delta": Slot((len(self.token_indices), width), "trainable_tokens_delta")}

    def _index(self, like: Tensor) -> Tensor:
        return torch.tensor(self.token_indices, device=like.device)

    def rows(self, W_OI: Tensor) -> Tensor:
        """The trained tokens' rows of a table or head."""
        table_VD = W_OI.t() if self.indexed else W_OI
        return table_VD[self._index(table_VD)]

    def initialise(self, p: Params, layer: Layer) -> None:
        with torch.no_grad():
            p["delta"].copy_(self.rows(layer.matrix()))

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        delta = p["delta"]
        if not layer.kind.indexed:  # the tied head: these tokens' logits
            logits = as_dtype(F.linear(as_dtype(x, delta), delta), h)
            bias = layer.offset()
            index = self._index(h)
            return h.index_copy(-1, index, logits if bias is None else logits + bias[index])
        hit = x[..., None] == self._index(x)
        rows = layer.kind.looked_up(layer.base_layer, x, F.embedding(hit.to(torch.uint8).argmax(-1), delta))
        return torch.where(hit.any(-1, keepdim=True), as_dtype(rows, h), h)

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = as_dtype(p["delta"], W_OI)
        dim, rows = (1, delta.t()) if self.indexed else (0, delta)
        return W_OI.index_copy(dim, self._index(W_OI), rows), b_O
