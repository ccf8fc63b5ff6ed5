"""Bases x LoRA options that the parity tests run over."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from parity.helpers import Pair, make_pair


class Case(NamedTuple):
    """A base, a config, keyword arguments of the forward, and the tensors of which PEFT's own gradients are wrong."""

    base: str
    config: dict[str, Any]
    call: dict[str, Any] = {}
    wrong: tuple[str, ...] = ()

    @property
    def follows_a_tie(self) -> bool:
        """The head shares the adapted embedding's weight and follows it."""
        return bool(self.config.get("ensure_weight_tying") and self.config.get("target_modules") == ["embed_tokens"])

    def ours(self, theirs: dict[str, Any]) -> dict[str, Any]:
        """Entries by live name without the head's factors, which here are the embedding's, transposed."""
        return {k: v for k, v in theirs.items() if not (self.follows_a_tie and "lm_head.lora_" in k)}


M = {"r": 4, "lora_alpha": 6, "target_modules": ["m"]}
BOTH = {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"]}
QV = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
CAUSAL_MASK = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

CASES: dict[str, Case] = {
    # ---- layer kinds
    "linear": Case("linears", BOTH),
    "linear-3d": Case("linears-3d", BOTH),
    "gpt2-conv1d": Case("gpt2-conv1d", {**M, "fan_in_fan_out": True}),
    "conv1d": Case("conv1d", M),
    "conv2d": Case("conv2d", M),
    "conv2d-oblong": Case("conv2d-oblong", M),
    "conv2d-same": Case("conv2d-same", M),
    "conv2d-grouped": Case("conv2d-grouped", M),
    "conv3d": Case("conv3d", M),
    "embedding": Case("embedding", M),
    "embedding-padding": Case("embedding-padding", M),
    "embedding-scaled": Case("embedding-scaled", M),
    "attention": Case("attention", M),
    "attention-without-weights": Case("attention", M, {"need_weights": False}),
    "attention-all-weights": Case("attention", M, {"average_attn_weights": False}),
    "attention-causal": Case("attention", M, {"attn_mask": CAUSAL_MASK, "need_weights": False}),
    "attention-is-causal": Case("attention", M, {"attn_mask": CAUSAL_MASK, "is_causal": True, "need_weights": False}),
    "attention-padded": Case("attention", M, {"key_padding_mask": PADDED}),
    "attention-batch-first": Case("attention-batch-first", M),
    "attention-batch-first-padded": Case("attention-batch-first", M, {"key_padding_mask": PADDED}),
    "attention-unbatched": Case("attention-unbatched", M),
    "attention-no-bias": Case("attention-no-bias", M),
    "attention-dropout": Case("attention", {**M, "lora_dropout": 0.1}),
    "attention-bias-of-b": Case("attention", {**M, "lora_bias": True}),
    "attention-rslora": Case("attention", {**M, "use_rslora": True}),
    "parameter-2d": Case("fused", {"r": 4, "target_modules": [], "target_parameters": ["experts.flat"]}),
    "parameter-3d": Case("fused", {"r": 4, "target_modules": [], "target_parameters": ["experts.up"]}),
    "parameters-two": Case(
        "fused", {"r": 4, "target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
    ),
    "parameters-turned": Case(
        "fused-turned", {"r": 4, "target_modules": [], "target_parameters": ["experts.up", "experts.flat"]}
    ),
    "parameters-three-and-module": Case(
        "fused",
        {"r": 4, "target_modules": ["lin"], "target_parameters": ["experts.up", "experts.down", "experts.flat"]},
    ),
    "parameter-rslora": Case(
        "fused", {"r": 4, "target_modules": [], "target_parameters": ["experts.up"], "use_rslora": True}
    ),
    # ---- options
    "linear-rslora": Case("linears", {**BOTH, "use_rslora": True}),
    "linear-dora": Case("linears", {**BOTH, "use_dora": True}),
    "linear-dora-3d": Case("linears-3d", {**BOTH, "use_dora": True}),
    "linear-dora-rslora": Case("linears", {**BOTH, "use_dora": True, "use_rslora": True}),
    "linear-bias-of-b": Case("linears", {**BOTH, "lora_bias": True}),
    "linear-gaussian": Case("linears", {**BOTH, "init_lora_weights": "gaussian"}),
    "linear-not-identity": Case("linears", {**BOTH, "init_lora_weights": False}),
    "linear-rank-pattern": Case("linears", {**BOTH, "rank_pattern": {"lin0": 2, "^lin1$": 7}}),
    "linear-alpha-pattern": Case("linears", {**BOTH, "alpha_pattern": {"lin[1-9]": 32}}),
    "linear-bias-all": Case("linears", {**BOTH, "bias": "all"}),
    "linear-bias-lora-only": Case("linears", {**BOTH, "bias": "lora_only"}),
    "linear-modules-to-save": Case("linears", {**BOTH, "modules_to_save": ["head", "norm"]}),
    "linear-bias-all-and-saved": Case("linears", {**BOTH, "bias": "all", "modules_to_save": ["head"]}),
    "linear-inference": Case("linears", {**BOTH, "inference_mode": True}),
    "gpt2-conv1d-dora": Case("gpt2-conv1d", {**M, "use_dora": True, "fan_in_fan_out": True}),
    "gpt2-conv1d-bias-of-b": Case("gpt2-conv1d", {**M, "lora_bias": True, "fan_in_fan_out": True}),
    "conv1d-dora": Case("conv1d", {**M, "use_dora": True}),
    "conv2d-dora": Case("conv2d", {**M, "use_dora": True}),
    "conv2d-bias-of-b": Case("conv2d", {**M, "lora_bias": True}),
    "conv2d-rslora": Case("conv2d", {**M, "use_rslora": True}),
    "conv3d-dora": Case("conv3d", {**M, "use_dora": True}),
    "embedding-dora": Case("embedding", {**M, "use_dora": True}),
    "embedding-rslora": Case("embedding", {**M, "use_rslora": True}),
    "stack-some-layers": Case("stack", {**QV, "layers_to_transform": [1, 4]}),
    "stack-one-layer": Case("stack", {**QV, "layers_to_transform": 2, "layers_pattern": "layers"}),
    "stack-exclude": Case("stack", {**QV, "exclude_modules": ["layers.0.q_proj", "v_proj"]}),
    "stack-exclude-regex": Case("stack", {**QV, "exclude_modules": r".*\.[0-3]\.v_proj"}),
    "stack-patterns": Case(
        "stack", {**QV, "rank_pattern": {"layers.1.q_proj": 3, r"[45]\.v_proj": 5}, "alpha_pattern": {"v_proj": 1}}
    ),
    # ---- transformers
    "llama": Case("llama", {**QV, "task_type": "CAUSAL_LM"}),
    "llama-all-linear": Case("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama-dora": Case("llama", {**QV, "use_dora": True}),
    "llama-embedding-and-head": Case("llama", {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    "llama-embedding": Case("llama", {"target_modules": ["embed_tokens"], "r": 4}),
    "llama-tokens": Case("llama", {**QV, "trainable_token_indices": [3, 9, 40]}),
    "llama-tokens-by-name": Case("llama", {**QV, "trainable_token_indices": {"embed_tokens": [5, 6]}}),
    "llama-modules-to-save": Case("llama", {**QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "llama-tied-tokens-kept": Case(
        "tied-llama", {**QV, "trainable_token_indices": [3, 9], "ensure_weight_tying": True}
    ),
    "llama-tied-tokens-of-both": Case(
        "tied-llama", {**QV, "trainable_token_indices": {"lm_head": [3, 9], "embed_tokens": [3, 9]}}
    ),
    "llama-tied-tokens-of-each": Case(
        "tied-llama", {**QV, "trainable_token_indices": {"lm_head": [3, 9], "embed_tokens": [4]}}
    ),
    "llama-tied-tokens-of-the-head": Case("tied-llama", {**QV, "trainable_token_indices": {"lm_head": [3, 9]}}),
    "llama-tied-saved": Case("tied-llama", {**QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "llama-tied-both-saved": Case(
        "tied-llama", {**QV, "modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}
    ),
    "llama-tied-adapted": Case("tied-llama", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "llama-tied-not-kept": Case("tied-llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama-bias-all": Case("llama", {**QV, "bias": "all"}),
    "llama-replicated": Case("llama", {**QV, "layer_replication": [(0, 2), (1, 2)]}, {"use_cache": False}),
    "gpt2": Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-all-linear": Case("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2-tied-tokens": Case(
        "gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [3, 9, 40], "fan_in_fan_out": True}
    ),
    "bert": Case("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert-all-linear": Case("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert-bias": Case("bert", {"target_modules": ["query"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "t5": Case("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5-tied-tokens": Case("t5", {"target_modules": ["q"], "trainable_token_indices": {"shared": [4, 7]}}),
}

# A second adapter's numbers.
B = {"r": 2, "lora_alpha": 3}


def pair_of(case: Case, **kwargs: Any) -> Pair:
    """The case's pair; ``kwargs`` go to `make_pair`."""
    return make_pair(case.base, case.config, call=case.call, **kwargs)
