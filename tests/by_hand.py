"""Activated LoRA as it would be written by hand, over a frozen model: what tests of it compare with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay.ops.dropout import draw_mask
from inlay.ops.dropout import reference as dropped_by

NAMES = ("llama", "mistral", "qwen2", "gpt2")
TARGETS = {
    name: ["c_attn", "c_proj", "c_fc"]
    if name == "gpt2"
    else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    for name in NAMES
}
JUDGE, CRITIC = [7, 8], [9, 7, 10]  # invocations


@cache
def _prototype(name: str, layers: int) -> nn.Module:
    import transformers as t

    shape = {"vocab_size": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    if name == "gpt2":
        own = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 96}
        own |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config: Any = t.GPT2Config(**shape, **own)
    else:
        llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
        llama |= {"num_key_value_heads": 2, "max_position_embeddings": 96}
        if name == "mistral":
            llama |= {"sliding_window": None}
        if name == "sliding":
            llama |= {"sliding_window": 6}
        kind = {"llama": t.LlamaConfig, "qwen2": t.Qwen2Config}.get(name, t.MistralConfig)
        config = kind(**shape, **llama)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = t.AutoModelForCausalLM.from_config(config).eval().double()
        for key, p in model.named_parameters():  # biases too say something
            if key.endswith("bias"):
                nn.init.normal_(p, std=0.2)
    return model


def frozen(name: str, layers: int = 2) -> Any:
    """A tiny causal language model of the test's own, in fp64 and eval mode, with the same weights every time."""
    return copy.deepcopy(_prototype(name, layers)).requires_grad_(False)


@dataclass(frozen=True)
class Update:
    """One layer's adapter, in its own numbers."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float
    bias_O: Tensor | None
    magnitude_O: Tensor | None
    dropout: float

    def __call__(self, x: Tensor, h: Tensor, W_OI: Tensor, bias_O: Tensor | None, training: bool) -> Tensor:
        """The layer's output on every token; ``h`` is the frozen one's."""
        seen, W_x = x, h if bias_O is None else h - bias_O
        if self.dropout and training:
            seen = dropped_by(x, draw_mask(x.shape, self.dropout), self.dropout)
            W_x = seen @ W_OI.T
        change = seen @ self.A_RI.T @ self.B_OR.T
        change = self.scale * (change if self.bias_O is None else change + self.bias_O)
        if self.magnitude_O is None:
            return h + change
        norm_O = (W_OI + self.scale * self.B_OR @ self.A_RI).detach().norm(dim=1)
        gain_O = self.magnitude_O / norm_O
        return h + (gain_O - 1) * W_x + gain_O * change


class ByHand:
    """A frozen model whose layers give their own output before a row's start, and the adapted one from it on.

    Args:
        model (`nn.Module`): The frozen model, which is copied.
        handle (`PeftModel`): Where the adapters' numbers are copied from.
        names (`Sequence[str]`): The adapters that run; each row has one if there is a list of them for each row.
    """

    def __init__(self, model: nn.Module, handle: inlay.PeftModel, *names: str) -> None:
        self.model: Any = copy.deepcopy(model)
        self.names = names
        self.leaves: dict[str, Tensor] = {}
        self.updates = {
            name: {path: self._update(name, path, wrapper) for path, wrapper in handle.base_model.layers()
                   if name in wrapper.methods} for name in names
        }  # fmt: skip
        self.starts: Mapping[str, Sequence[int | None]] = {}
        self._past = 0
        self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for path in {path for updates in self.updates.values() for path in updates}:
            self.model.get_submodule(path).register_forward_hook(self._hook(path))

    def _update(self, name: str, path: str, wrapper: Any) -> Update:
        method = wrapper.methods[name]

        def leaf(slot: str, attribute: str = "weight") -> Tensor | None:
            owner = getattr(wrapper, slot, {})
            if name not in owner:
                return None
            tensor = owner[name] if isinstance(owner[name], Tensor) else getattr(owner[name], attribute, None)
            if tensor is None:
                return None
            key = next(k for k, p in handle_names(wrapper) if p is tensor)
            own = tensor.detach().clone().requires_grad_()
            self.leaves[f"{path}.{key}"] = own
            return own

        indexed = len(wrapper.lora_embedding_A) > 0  # empty on other layers, as in PEFT
        A, B = leaf(f"lora_{'embedding_' * indexed}A"), leaf(f"lora_{'embedding_' * indexed}B")
        assert A is not None
        assert B is not None
        # The same numbers as its config, computed anew.
        scale = method.lora_alpha / (method.r**0.5 if method.use_rslora else method.r)
        return Update(
            A, B, scale, leaf("lora_B", "bias"), leaf("lora_magnitude_vector"), 0.0 if indexed else method.dropout
        )

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        self._past = 0 if cache is None else int(cache.get_seq_length())
        x = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        x = args[0] if x is None else x
        self._length = x.shape[1]

    def _hook(self, path: str) -> Any:
        def hook(layer: Any, args: Any, h: Tensor) -> Tensor:
            x = args[0]
            end = self._past + self._length
            at_L = torch.arange(end - h.shape[1], end)
            for name in self.names:
                if path not in self.updates[name]:
                    continue
                starts = [10**9 if s is None else s for s in self.starts[name]]
                acts_BL = at_L >= torch.tensor(starts).repeat_interleave(len(h) // len(starts))[:, None]
                update = self.updates[name][path]
                if isinstance(layer, nn.Embedding):
                    new = h + F.embedding(x, update.A_RI.T) @ update.B_OR.T * update.scale
                else:
                    W_OI = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
                    new = update(x, h, W_OI, layer.bias, self.model.training)
                h = torch.where(acts_BL[..., None], new, h)
            return h

        return hook

    @contextmanager
    def beginning(self, *starts: int | None, **by_name: Sequence[int | None]) -> Iterator[Any]:
        """The model, with its adapters from these tokens on: one adapter's by row, or each adapter's."""
        self.starts = by_name or dict.fromkeys(self.names, starts)
        yield self.model

    def logits(self, ids: Tensor, *starts: int | None, **kwargs: Any) -> Tensor:
        """What one forward over ``ids`` gives."""
        with self.beginning(*starts) as model:
            out: Tensor = model(ids, **kwargs).logits
        return out

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """By the adapters' live names."""
        found = torch.autograd.grad(loss, [*self.leaves.values()], allow_unused=True)
        return {k: g for k, g in zip(self.leaves, found, strict=True) if g is not None}


def handle_names(wrapper: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A wrapper's own parameters by name."""
    return ((k, p) for k, p in wrapper.named_parameters() if not k.startswith("base_layer."))


def weighted(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """A loss in which every logit has its own weight."""
    loss = logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)
    return (loss if mask is None else loss * mask[..., None]).sum()


def greedy(model: Any, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(tokens, logits of each step) by whole forwards without a cache."""
    logits = []
    for _ in range(steps):
        logits.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(logits)
