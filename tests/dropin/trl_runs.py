"""Two steps of TRL's trainers on tiny models, written as a user of PEFT would; nothing here knows of inlay.

`python tests/dropin/trl_runs.py FILE`, where PEFT itself is installed, writes the numbers that `test_trl.py` compares.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    set_seed,
)
from trl.experimental import orpo, sdft

SENTENCES = ["the cat sits on the mat", "a dog runs under the tree", "who is good ? the dog", "why is the cat bad ?"]
PAIRS = [("who sits ?", "the cat", "a tree"), ("what runs ?", "a dog and a cat", "no")] * 2


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [*SENTENCES, *(text for pair in PAIRS for text in pair), "user assistant"]
    known = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(word for text in texts for word in text.split())]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> nn.Module:
    set_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen() -> nn.Module:
    """With its embeddings and its head tied."""
    set_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))


def experts() -> nn.Module:
    """With experts, whose weights are parameters of three dimensions."""
    set_seed(1)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))


def scorer() -> nn.Module:
    set_seed(1)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))


TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Callable[..., PeftConfig]] = {
    "lora": partial(LoraConfig, r=4, target_modules=TARGETS),
    "dora": partial(LoraConfig, r=4, target_modules=TARGETS, use_dora=True),
    "embedding": partial(LoraConfig, r=4, target_modules=["embed_tokens", "q_proj"]),
    "tokens": partial(LoraConfig, r=4, target_modules=TARGETS, trainable_token_indices=[0, 5, 6]),
    "saved": partial(LoraConfig, r=4, target_modules=TARGETS, modules_to_save=["lm_head", "embed_tokens"]),
    "parameters": partial(LoraConfig, r=4, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]),
    "prompt": partial(PromptTuningConfig, num_virtual_tokens=3),
    "prefix": partial(PrefixTuningConfig, num_virtual_tokens=3),
}


def different_words(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


@dataclass(frozen=True)
class Kind:
    """A trainer, its config, its data and what else it takes."""

    trainer: type
    config: type
    rows: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    base: Callable[[], nn.Module] = llama
    task: str = "CAUSAL_LM"


TEXTS = [{"text": text} for text in SENTENCES]
PROMPTS = [{"prompt": p} for p, _, _ in PAIRS]
COMPLETIONS = [{"prompt": p, "completion": c} for p, c, _ in PAIRS]
CHATS = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c, _ in PAIRS]
CHOICES = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
JUDGED = [{"prompt": p, "completion": x, "label": x is c} for p, c, r in PAIRS for x in (c, r)]
ANSWERS = [{"chosen": f"{p} the {c.split()[-1]}", "rejected": f"{p} a tree"} for p, c, _ in PAIRS]
GENERATED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
REWARDED = {"reward_funcs": different_words}

KINDS = {
    "sft": Kind(trl.SFTTrainer, trl.SFTConfig, TEXTS),
    "sft-tied": Kind(trl.SFTTrainer, trl.SFTConfig, TEXTS, base=qwen),
    "sft-chat": Kind(trl.SFTTrainer, trl.SFTConfig, CHATS),
    "sft-experts": Kind(trl.SFTTrainer, trl.SFTConfig, TEXTS, base=experts),
    "dpo": Kind(trl.DPOTrainer, trl.DPOConfig, CHOICES),
    "dpo-experts": Kind(trl.DPOTrainer, trl.DPOConfig, CHOICES, base=experts),
    "kto": Kind(trl.KTOTrainer, trl.KTOConfig, JUDGED),
    "grpo": Kind(trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, GENERATED, REWARDED),
    "rloo": Kind(trl.RLOOTrainer, trl.RLOOConfig, PROMPTS, GENERATED, REWARDED),
    # rows of one length: beside padding PEFT's scorer reads the wrong token, see docs/differences.md
    "reward": Kind(trl.RewardTrainer, trl.RewardConfig, ANSWERS, base=scorer, task="SEQ_CLS"),
    "orpo": Kind(orpo.ORPOTrainer, orpo.ORPOConfig, CHOICES),
    "sdft": Kind(
        sdft.SDFTTrainer,
        sdft.SDFTConfig,
        [{"prompt": p, "privileged_context": c} for p, c, _ in PAIRS],
        {"num_generations": 2, "max_completion_length": 6, "distillation_topk": 8, "teacher_model_kind": "ema"},
    ),
    "distillation": Kind(
        trl.DistillationTrainer,
        trl.DistillationConfig,
        COMPLETIONS,
        {"max_completion_length": 6, "gradient_accumulation_steps": 1},
        {"teacher_model": qwen()},
    ),
}


class Seed(TrainerCallback):
    """What is sampled does not depend on what was drawn before."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(8)


def build(kind: str, folder: Path, config: PeftConfig | None, model: nn.Module | None = None, **options: Any) -> Any:
    """The trainer before its first step, with values for the factors that do not depend on how they were drawn."""
    row = KINDS[kind]
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "seed": 3,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    trainer = row.trainer(
        model=row.base() if model is None else model,
        args=row.config(**{**settings, **row.options, **options}),
        train_dataset=Dataset.from_list(row.rows),
        processing_class=copy.deepcopy(tokenizer()),
        peft_config=config,
        **row.others,
    )
    trainer.add_callback(Seed())
    if config is not None:
        fill(trainer.model, "lora_A", "lora_embedding_B")
    return trainer


def config(kind: str, method: str, **fields: Any) -> PeftConfig:
    return METHODS[method](task_type=KINDS[kind].task, **fields)


def fill(model: nn.Module, *slots: str) -> None:
    """Random values for these slots, in the order of their names."""
    seeded = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if any(slot in name for slot in slots):
            parameter.data.copy_(torch.randn(parameter.shape, generator=seeded) / 4)


def fresh(kind: str, method: str, folder: Path, **fields: Any) -> Any:
    """An adapter that the trainer makes; prefixes are in a cache, which TRL's default of checkpointing leaves out."""
    options = {"gradient_checkpointing": False} if method == "prefix" else {}
    return build(kind, folder, config(kind, method, **fields), **options)


def continued(kind: str, folder: Path, method: str = "lora") -> Any:
    """An adapter that is there already, of which the trainer makes a copy to refer to."""
    handle = get_peft_model(KINDS[kind].base(), config(kind, method))
    fill(handle, "lora_A", "lora_B")
    return build(kind, folder, None, handle)


def with_new_tokens(folder: Path, config: PeftConfig) -> Any:
    """The tokenizer takes over a chat template whose tokens the model does not have."""
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["<|turn|>", "<|end|>"], special_tokens=True)
    other.chat_template = "{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    other.save_pretrained(folder / "template")
    return build("sft-chat", folder, config, chat_template_path=str(folder / "template"))


#: what is run -> the trainer of it
RUNS: dict[str, Callable[[Path], Any]] = {
    f"{kind} {method}": partial(fresh, kind, method)
    for kind in ("sft", "dpo", "kto", "grpo", "reward")
    for method in ("lora", "dora", "prompt", "prefix")
}
RUNS |= {f"{kind} lora": partial(fresh, kind, "lora") for kind in ("rloo", "distillation", "orpo", "sdft")}
RUNS |= {f"{kind} ref": partial(continued, kind) for kind in ("dpo", "kto", "grpo", "rloo")}
RUNS |= {f"sft {method}": partial(fresh, "sft", method) for method in ("embedding", "tokens", "saved")}
RUNS |= {
    "sft-tied lora": partial(fresh, "sft-tied", "lora"),
    "sft-tied saved": partial(fresh, "sft-tied", "saved", ensure_weight_tying=True),
    "sft-experts parameters": partial(fresh, "sft-experts", "parameters"),
    "dpo-experts ref": partial(continued, "dpo-experts", method="parameters"),
    "sft-chat new": lambda folder: with_new_tokens(folder, config("sft", "lora")),
}


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in sorted(model.named_parameters()) if p.requires_grad}


def digest(tensors: Mapping[str, Tensor]) -> list[float]:
    """The norm of all values, and their product with a fixed wave."""
    values = torch.cat([t.double().flatten() for t in tensors.values()])
    return [values.norm().item(), (values @ torch.arange(len(values)).double().cos()).item()]


if __name__ == "__main__":
    import json
    import sys
    import tempfile

    found = {}
    for name, make in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(Path(folder))
            trainer.train()
            found[name] = {"losses": losses(trainer), "digest": digest(trained(trainer.model))}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
