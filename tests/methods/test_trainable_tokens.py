"""Trained rows have the gradient that they have as rows of the table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inlay


class Scaled(nn.Embedding):
    """An embedding as Gemma has it."""

    embed_scale = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


#: class of the table, its padding; the rows that are trained are 5, 1 and 7
TABLES = [(nn.Embedding, None), (nn.Embedding, 0), (nn.Embedding, 1), (nn.Embedding, 2), (Scaled, 0)]


@pytest.mark.parametrize(("table", "padding"), TABLES)
def test_every_row_learns_but_that_of_the_padding(table: type, padding: int | None) -> None:
    base = table(8, 4, padding_idx=padding)
    config = inlay.LoraConfig(target_modules=[], trainable_token_indices={"0": [5, 1, 7]})
    model = inlay.get_peft_model(nn.Sequential(base), config)
    rows = next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    x, weights = torch.tensor([[5, 1, 0, 7], [2, 5, 5, 3]]), torch.randn(2, 4, 4)
    (model(x) * weights).sum().backward()

    whole = base.weight.detach().clone().requires_grad_()
    scale = 3.0 if table is Scaled else 1.0
    (F.embedding(x, whole, padding_idx=padding) * scale * weights).sum().backward()
    torch.testing.assert_close(rows.grad, whole.grad[[5, 1, 7]])
