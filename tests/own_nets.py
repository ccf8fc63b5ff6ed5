"""Classes with the verbs of `inlay.AdapterMixin`, and every method on every one that it has layers in."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from conftest import MLP, ConvNet
from laws import OPTIONS
from torch import Tensor, nn

import inlay
from inlay.methods import METHODS


class Perceptron(inlay.AdapterMixin, MLP):
    pass


class Convolutions(inlay.AdapterMixin, ConvNet):
    pass


class Block(inlay.AdapterMixin, nn.Module):
    """Tokens -> one transformer block of torch's own -> 2 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.feed = nn.Linear(8, 2)

    def forward(self, ids_BT: Tensor) -> Tensor:
        h_BTD = self.embed(ids_BT)
        return self.feed(h_BTD + self.attend(h_BTD, h_BTD, h_BTD, need_weights=False)[0])


class Decoder(inlay.AdapterMixin, nn.Module):
    """Attention as transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig

        config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
        config._attn_implementation = "sdpa"
        self.self_attn = LlamaAttention(config, layer_idx=0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        angles_T4 = torch.arange(x_BTD.shape[1]).outer(torch.tensor([1.0, 0.1])).repeat(1, 2)
        positions = (angles_T4.cos()[None], angles_T4.sin()[None])
        return self.self_attn(hidden_states=x_BTD, position_embeddings=positions, attention_mask=None)[0]


#: name -> (class, what it is called with, targets, the kinds of these)
NETS: dict[str, tuple[type[Any], Callable[[], Tensor], list[str], set[str]]] = {
    "mlp": (Perceptron, lambda: torch.randn(4, 10), ["lin0", "lin1"], {"Linear"}),
    "conv net": (Convolutions, lambda: torch.randn(2, 3, 8, 8), ["conv0", "conv1"], {"Conv2d"}),
    "block": (
        Block,
        lambda: torch.randint(0, 11, (3, 5)),
        ["embed", "attend", "feed"],
        {"Embedding", "MultiheadAttention", "Linear"},
    ),
    "decoder": (Decoder, lambda: torch.randn(2, 5, 8), ["self_attn"], {"Attention"}),
}
#: (method, net)
CELLS = [(method, net) for method, row in METHODS.items() for net, (*_, kinds) in NETS.items() if kinds <= row.kinds]


def config_of(method: str, net: str, library: ModuleType = inlay, **more: Any) -> Any:
    """A config of the method, by this library or by PEFT, that fits the net's layers."""
    fields = next(iter(OPTIONS[method].values())).fields
    if method == "OFT":
        fields = {"oft_block_size": {"mlp": 5, "conv net": 9, "block": 4}[net]}
    return getattr(library, METHODS[method].config.__name__)(target_modules=NETS[net][2], **fields, **more)
