"""Tiny random models of every architecture that prompts are tested on, and the task classes each has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
DECODER = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
ENCODER = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
BOTH = ("SEQ_2_SEQ_LM", *ENCODER)

_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.5,
}
_BERT = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 48, "initializer_range": 0.5}


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Args:
        type (`str`): transformers' name for it.
        tasks: The task classes that transformers has for it.
        config: Fields of its config.
    """

    type: str
    tasks: tuple[str, ...]
    config: Mapping[str, Any]


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", DECODER, _LLAMA),
    "gpt2": Architecture("gpt2", DECODER, _GPT2),
    "mistral": Architecture("mistral", DECODER, {**_LLAMA, "sliding_window": 6, "head_dim": 4}),
    "gemma2": Architecture(
        "gemma2",
        ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"),
        {**_LLAMA, "head_dim": 8, "sliding_window": 6},
    ),
    "gemma3": Architecture(
        "gemma3_text",
        ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"),
        {**_LLAMA, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2": Architecture("qwen2", DECODER, _LLAMA),
    "bloom": Architecture("bloom", DECODER, {"hidden_size": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}),
    "gpt_bigcode": Architecture(
        "gpt_bigcode", ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"), {**_GPT2, "multi_query": True}
    ),
    "opt": Architecture(
        "opt",
        ("CAUSAL_LM", "SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
        {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 48,
            "word_embed_proj_dim": 8,
            "init_std": 0.5,
        },
    ),
    "t5": Architecture(
        "t5",
        BOTH,
        {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": Architecture(
        "bart",
        ("SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 48,
            "init_std": 0.5,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    "bert": Architecture("bert", ENCODER, _BERT),
    "bert-decoder": Architecture("bert", ("CAUSAL_LM",), {**_BERT, "is_decoder": True}),
    "roberta": Architecture("roberta", ENCODER, _BERT),
    "electra": Architecture("electra", ENCODER, {**_BERT, "embedding_size": 8}),
    "distilbert": Architecture(
        "distilbert",
        ENCODER,
        {
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 48,
            "initializer_range": 0.5,
        },
    ),
}


@cache
def _prototype(name: str, task: str) -> nn.Module:
    import transformers

    row = ARCHITECTURES[name]
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
    if task == "QUESTION_ANS":
        tokens["num_labels"] = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config: Any = transformers.AutoConfig.for_model(row.type, **{**tokens, **row.config})
        for field, value in config.to_dict().items():
            if "drop" in field and isinstance(value, float):
                setattr(config, field, 0.0)
        made: nn.Module = getattr(transformers, AUTO[task]).from_config(config)
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for parameter in made.parameters():  # whatever starts at zero or one is to count too
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


def model_of(name: str, task: str) -> Any:
    """A model of the caller's own, in eval mode, with the same weights every time."""
    return copy.deepcopy(_prototype(name, task))


def inputs_of(name: str, task: str, B: int = 3, L: int = 7, padded: bool = True) -> dict[str, Tensor]:
    """A batch, the second and third row padded on the right, with the labels of the task where it has a loss."""
    draw = torch.Generator().manual_seed(2)
    ids_BL = torch.randint(3, 64, (B, L), generator=draw)
    mask_BL = torch.ones(B, L, dtype=torch.long)
    if padded:
        mask_BL[1, L - 2 :], mask_BL[2, L - 1 :] = 0, 0
    ids_BL = ids_BL.masked_fill(mask_BL == 0, 0)
    if name in ("t5", "bart") and task == "SEQ_CLS":  # it reads the last token, which has to be this one
        ids_BL.scatter_(1, mask_BL.sum(1, keepdim=True) - 1, 2)
    given = {"input_ids": ids_BL, "attention_mask": mask_BL}
    return {**given, **labels_of(name, task, ids_BL, mask_BL)}


def labels_of(name: str, task: str, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
    """The labels of a batch."""
    B = len(ids_BL)
    if task == "CAUSAL_LM":
        return {"labels": ids_BL.masked_fill(mask_BL == 0, -100)}
    if task == "SEQ_2_SEQ_LM":
        return {"labels": ids_BL.flip(1)[:, :5].contiguous()}
    if task == "SEQ_CLS":
        return {"labels": torch.arange(B) % 3}
    if task == "TOKEN_CLS":
        return {"labels": (ids_BL % 3).masked_fill(mask_BL == 0, -100)}
    if task == "QUESTION_ANS":
        return {"start_positions": torch.arange(B) % 3, "end_positions": torch.arange(B) % 3 + 1}
    return {"decoder_input_ids": ids_BL[:, :4]} if name in ("t5", "bart") else {}
