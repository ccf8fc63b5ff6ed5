"""The models that are adapted, and the numbers in their adapters."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

RANK = 16
ALPHA = 32  # a scaling of 2, so that leaving it out shows
SCALE = ALPHA / RANK
WIDTH = 512
TOKENS = 1024
EXPERTS_PER_LAYER = 128
LINEARS_PER_EXPERT_LAYER = 3 * EXPERTS_PER_LAYER


def llama(layers: int = 8, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen Llama of width 512: seven linears per layer, 8 heads, feed-forward width 1,536."""
    return _llama(dtype, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=layers)


def narrow_llama(layers: int = 32) -> nn.Module:
    """Llama-7B's 224 linears, each so small that what is done per module is all there is to time."""
    return _llama(torch.float32, hidden_size=32, intermediate_size=64, num_hidden_layers=layers)


def causal_llama(layers: int = 8) -> nn.Module:
    """The first of these with a head that predicts tokens."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "max_position_embeddings": 8192}
    return _llama(torch.float32, causal=True, num_hidden_layers=layers, **sizes)


def _llama(dtype: torch.dtype, *, causal: bool = False, **sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_attention_heads=8, num_key_value_heads=8, use_cache=causal, **sizes)
    model: nn.Module = (LlamaForCausalLM if causal else LlamaModel)(config).to(dtype)
    return model.requires_grad_(False)


class Expert(nn.Module):
    """One feed-forward expert: three linears."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(64, 32, bias=False)
        self.up_proj = nn.Linear(64, 32, bias=False)
        self.down_proj = nn.Linear(32, 64, bias=False)


class Experts(nn.Module):
    """A mixture-of-experts skeleton on the meta device; 48 layers of 128 experts are 18,432 linears. Never run."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(Expert() for _ in range(EXPERTS_PER_LAYER))})
                for _ in range(layers)
            )


def embeds(
    rows: int, tokens: int, dtype: torch.dtype = torch.float32, *, width: int = WIDTH, grad: bool = False
) -> Tensor:
    """Input embeddings (rows, tokens, width), the same ones at every call."""
    source = torch.Generator().manual_seed(1)
    return torch.randn(rows, tokens, width, generator=source).to(dtype).requires_grad_(grad)


def lora_fields(**fields: Any) -> dict[str, Any]:
    """The LoRA that most figures use: every linear, r=16."""
    return {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **fields}


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Path and layer of every linear of a model that is not adapted."""
    return ((path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear))


def factor(path: str, slot: str, adapter: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The numbers of one LoRA factor, the same ones wherever it is needed."""
    source = torch.Generator().manual_seed(zlib.crc32(f"{path}.{slot}.{adapter}".encode()))
    return torch.randn(shape, generator=source) * 0.02


def fill(model: nn.Module) -> None:
    """Writes `factor`s into every LoRA factor of an adapted model, so that all sides compute the same.

    Raises:
        RuntimeError: If no factor goes by the name that the file format and the incumbent give it.
    """
    filled = 0
    for name, parameter in model.named_parameters():
        path, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        if path and rest[0] in "AB":
            adapter = rest.split(".")[1]
            parameter.data.copy_(factor(path, f"lora_{rest[0]}", adapter, parameter.shape))
            filled += 1
    if not filled:
        raise RuntimeError("no parameter named <path>.lora_A.<adapter>.weight in the adapted model")
