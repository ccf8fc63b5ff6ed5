"""Tiny models of transformers' and adapters for them: rows for tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import tokenizers
import torch
import transformers
from sizes import TINY
from torch import Tensor, nn
from transformers.utils import logging

logging.disable_progress_bar()  # type: ignore[no-untyped-call]

DECODER = TINY | {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 50, "pad_token_id": 0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 64, "bos_token_id": 1}
BERT = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}


class Tiny(NamedTuple):
    """A model: its class, its config, two of its linears, and its head."""

    auto: Any
    config: Callable[[], Any]
    targets: tuple[str, ...]
    head: str
    feedforward: tuple[str, ...] = ()


MODELS = {
    "llama": Tiny(
        transformers.AutoModelForCausalLM,
        lambda: transformers.LlamaConfig(**DECODER),
        ("q_proj", "down_proj"),
        "lm_head",
        ("down_proj",),
    ),
    "bert": Tiny(
        transformers.AutoModelForSequenceClassification,
        lambda: transformers.BertConfig(**BERT, num_labels=3),
        ("query", "output.dense"),
        "classifier",
        ("output.dense",),
    ),
    "gpt2": Tiny(
        transformers.AutoModelForCausalLM,
        lambda: transformers.GPT2Config(**GPT2, eos_token_id=2),
        ("c_attn", "mlp.c_proj"),
        "lm_head",
        ("mlp.c_proj",),
    ),
    "t5": Tiny(
        transformers.AutoModelForSeq2SeqLM,
        lambda: transformers.T5Config(**T5),
        ("q", "wo"),
        "lm_head",
        ("wo",),
    ),
    "mixtral": Tiny(
        transformers.AutoModelForCausalLM,
        lambda: transformers.MixtralConfig(**DECODER, num_local_experts=3),
        ("q_proj", "v_proj"),
        "lm_head",
    ),
}


def lora(tiny: Tiny, **fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=list(tiny.targets), r=4, **fields)


#: name -> the config for a model
ADAPTERS: dict[str, Callable[[Tiny], peft.PeftConfig]] = {
    "lora": lora,
    "rslora": lambda tiny: lora(tiny, use_rslora=True, rank_pattern={tiny.targets[0]: 2}),
    "dora": lambda tiny: lora(tiny, use_dora=True),
    "head": lambda tiny: lora(tiny, modules_to_save=[tiny.head]),
    "adalora": lambda tiny: peft.AdaLoraConfig(target_modules=list(tiny.targets), init_r=4, target_r=2, total_step=9),
    "ia3": lambda tiny: peft.IA3Config(
        target_modules=list(tiny.targets), feedforward_modules=list(tiny.feedforward) or []
    ),
    "loha": lambda tiny: peft.LoHaConfig(target_modules=list(tiny.targets), r=2),
    "lokr": lambda tiny: peft.LoKrConfig(target_modules=list(tiny.targets), r=2),
    "oft": lambda tiny: peft.OFTConfig(target_modules=list(tiny.targets), oft_block_size=4, r=0),
}
#: only where the model has what they name
SPECIAL: dict[tuple[str, str], Callable[[Tiny], peft.PeftConfig]] = {
    ("llama", "tokens"): lambda tiny: lora(tiny, trainable_token_indices=[3, 5]),
    ("llama", "embedding"): lambda tiny: peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=4),
    ("bert", "bias"): lambda tiny: lora(tiny, bias="lora_only"),
    ("mixtral", "parameters"): lambda tiny: peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=4
    ),
    ("mixtral", "experts"): lambda tiny: peft.LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"], r=4),
}
CASES = [(model, adapter) for model in MODELS for adapter in ADAPTERS] + list(SPECIAL)


def config(model: str, adapter: str) -> Any:
    """A new config of a row of `CASES`."""
    make = SPECIAL.get((model, adapter)) or ADAPTERS[adapter]
    return make(MODELS[model])


@functools.cache
def _weights(model: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = MODELS[model].auto.from_config(MODELS[model].config())
    return {key: t.clone() for key, t in made.state_dict().items()}


def build(model: str) -> Any:
    """The model with the same weights at every call, in eval."""
    made = MODELS[model].auto.from_config(MODELS[model].config())
    made.load_state_dict(_weights(model))
    return made.eval()


def saved(model: str, folder: Path) -> str:
    """The folder of the base model below ``folder``, written once."""
    path = folder / model
    if not path.exists():
        build(model).save_pretrained(path)
    return str(path)


def batch(model: str) -> dict[str, Tensor]:
    """What the model is called with."""
    tokens = torch.tensor([[5, 3, 9, 11, 7], [8, 5, 4, 10, 3]])
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if model == "t5" else {})}


def output(made: nn.Module, model: str) -> Tensor:
    """Its logits on `batch`."""
    with torch.no_grad():
        logits: Tensor = made(**batch(model)).logits
    return logits


def stir(made: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Gives every tensor of an adapter other values, by its name, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in sorted(made.named_parameters()):
            # PEFT's AdaLoRA has its rank as a parameter, which no file holds.
            if f".{name}." in f"{key}." and parameter.is_floating_point() and "ranknum" not in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Word "w7" is token 7."""
    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, **{f"w{i}": i for i in range(4, 50)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
