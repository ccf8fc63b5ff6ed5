"""Tiny models of eight architectures for every task, and batches for them, padded on either side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay import PrefixTuningConfig, PromptTuningConfig

V, D, LAYERS, HEADS, LABELS, POSITIONS = 64, 32, 2, 4, 3, 64
_TOKENS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": LABELS}
_DECODER = {
    **_TOKENS,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}


def _config(arch: str) -> Any:
    import transformers as tf

    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: tf.LlamaConfig(**_DECODER),
        "mistral": lambda: tf.MistralConfig(**_DECODER),
        "gpt2": lambda: tf.GPT2Config(
            **_TOKENS, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, initializer_range=0.2
        ),
        "bloom": lambda: tf.BloomConfig(**_TOKENS, hidden_size=D, n_layer=LAYERS, n_head=HEADS, initializer_range=0.2),
        "opt": lambda: tf.OPTConfig(
            **_TOKENS,
            hidden_size=D,
            word_embed_proj_dim=D,
            ffn_dim=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            init_std=0.2,
        ),
        "bert": lambda: tf.BertConfig(
            **_TOKENS,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            initializer_range=0.2,
        ),
        "t5": lambda: tf.T5Config(
            **_TOKENS,
            d_model=D,
            d_kv=8,
            d_ff=48,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
            initializer_factor=3.0,
        ),
        "bart": lambda: tf.BartConfig(
            **_TOKENS,
            d_model=D,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=POSITIONS,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            init_std=0.2,
        ),
    }
    return makers[arch]()


CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
DECODERS = ("llama", "mistral", "gpt2", "bloom", "opt")
CELLS = [
    *((arch, task) for arch in ("llama", "gpt2") for task in CLASSES if task != "SEQ_2_SEQ_LM"),
    *((arch, task) for arch in ("mistral", "bloom", "opt") for task in ("CAUSAL_LM", "SEQ_CLS")),
    *(("bert", task) for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")),
    *((arch, task) for arch in ("t5", "bart") for task in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")),
]


@cache
def _prototype(arch: str, task: str) -> nn.Module:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = _config(arch)
        config.num_labels = 2 if task == "QUESTION_ANS" else LABELS
        model: nn.Module = getattr(transformers, CLASSES[task]).from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name.lower():
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def windowed(size: int) -> nn.Module:
    """A Mistral whose tokens see so many places of the cache."""
    config = _config("mistral")
    config.sliding_window = size
    model = type(_prototype("mistral", "CAUSAL_LM"))(config)
    model.load_state_dict(_prototype("mistral", "CAUSAL_LM").state_dict())
    return model.eval().double()


def base(arch: str, task: str) -> nn.Module:
    """A model of the caller's own, in eval mode and in fp64, with the same weights every time."""
    return copy.deepcopy(_prototype(arch, task)).to(dtype(arch))


def dtype(arch: str) -> torch.dtype:
    """fp64, where the model's own attention can be computed in it beside padding."""
    return torch.float32 if arch == "bloom" else torch.float64


@dataclass(frozen=True)
class Batch:
    """Inputs by name, and where each row has its tokens.

    Args:
        inputs (`dict[str, Tensor]`): All by row.
        kept_BL (`Tensor`): True for a token, False for padding.
    """

    inputs: dict[str, Tensor]
    kept_BL: Tensor

    def row(self, i: int) -> dict[str, Tensor]:
        """The inputs of one row, its padding with it."""
        return {k: t[i : i + 1] for k, t in self.inputs.items()}

    def bare(self, i: int) -> dict[str, Tensor]:
        """The same without its padding."""
        kept = self.kept_BL[i]
        return {
            k: t[i : i + 1, kept] if t.shape == self.kept_BL.shape else t[i : i + 1] for k, t in self.inputs.items()
        }


def batch(arch: str, task: str, rows: int, padding: str = "right", labels: bool = True) -> Batch:
    """Rows of 3 to 6 tokens; labels of the task."""
    L = 6
    lengths = torch.tensor([L, 3, 5, 4, 3, 6])[torch.arange(rows) % 6]
    at = torch.arange(L)
    kept = at < lengths[:, None] if padding == "right" else at >= L - lengths[:, None]
    ids = torch.randint(3, V, (rows, L)).masked_fill(~kept, 0)
    inputs = {"input_ids": ids, "attention_mask": kept.long()}
    if padding == "left" and arch in DECODERS and arch != "bloom":
        inputs["position_ids"] = (kept.long().cumsum(1) - 1).clamp(min=0)
    if arch == "bert":
        inputs["token_type_ids"] = (at >= 2).long().expand(rows, -1) * kept
    if arch in ("t5", "bart"):
        answer = torch.randint(3, V, (rows, 4))
        answer[:, 3] = torch.where(torch.arange(rows) % 2 == 0, -100, answer[:, 3])
        inputs["labels" if task == "SEQ_2_SEQ_LM" and labels else "decoder_input_ids"] = answer.clone()
        if "decoder_input_ids" in inputs:
            inputs["decoder_input_ids"] = answer.clamp(min=0)
    elif labels:
        inputs.update(_labels(task, ids, kept, lengths, padding))
    return Batch(inputs, kept)


def _labels(task: str, ids: Tensor, kept: Tensor, lengths: Tensor, padding: str) -> dict[str, Tensor]:
    rows, L = ids.shape
    if task == "CAUSAL_LM":
        return {"labels": ids.masked_fill(~kept, -100)}
    if task == "SEQ_CLS":
        return {"labels": torch.arange(rows) % LABELS}
    if task == "TOKEN_CLS":
        return {"labels": (ids % LABELS).masked_fill(~kept, -100)}
    if task == "QUESTION_ANS":
        first = torch.zeros(rows, dtype=torch.long) if padding == "right" else L - lengths
        return {"start_positions": first, "end_positions": first + 2}
    return {}


LENGTHS = {"p3": 3, "q3": 3, "p5": 5, "k2": 2, "k4": 4, "j4": 4}  # p, q: embeddings; k, j: in the cache
TARGETS = {"llama": ["q_proj", "v_proj"], "mistral": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query"]}
TARGETS |= {"bloom": ["query_key_value"], "opt": ["q_proj", "v_proj"], "t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}


def config(arch: str, task: str, name: str) -> Any:
    """What `handle` adds under this name."""
    if name == "lora":
        return inlay.LoraConfig(task_type=task, r=2, target_modules=TARGETS[arch])
    cls = PromptTuningConfig if name[0] in "pq" else PrefixTuningConfig
    return cls(task_type=task, num_virtual_tokens=LENGTHS[name])


def handle(arch: str, task: str, *names: str, model: nn.Module | None = None) -> inlay.PeftModel:
    """A model with these adapters, each of which does something, heads included; the first one is active."""
    model = inlay.get_peft_model(model or base(arch, task), config(arch, task, names[0]), names[0])
    for name in names[1:]:
        model.add_adapter(name, config(arch, task, name))
    model.to(dtype(arch))
    disturb(model)
    return model.eval()


@torch.no_grad()
def disturb(model: inlay.PeftModel) -> None:
    """Moves every adapter away from where it starts, heads too."""
    for key, parameter in model.named_parameters():
        if "prompt_encoder" in key or "lora_B" in key or "modules_to_save" in key:
            parameter.add_(torch.randn_like(parameter) * 0.3)
