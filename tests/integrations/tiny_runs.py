"""Tiny models on disk and small files to train them on, for the tests of training and of the command line."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

COLOURS = ("red", "green", "blue")
THINGS = ("apple", "river", "stone", "cloud", "glass", "paper", "wheel", "candle", "bridge", "letter")
WORDS = (*COLOURS, *THINGS, "the", "is", "a", "?", "what")

# Every run of these tests, unless it says otherwise: seconds on one core.
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 2e-2,
    "save_steps": 4,
    "log_steps": 2,
}


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _model(kind: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    size = len(tokenizer())
    tokens = {"vocab_size": size, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "llama":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return t.LlamaForCausalLM(t.LlamaConfig(**shape, **tokens, num_key_value_heads=2))
    if kind == "t5":
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        return t.T5ForConditionalGeneration(t.T5Config(**shape, **tokens, decoder_start_token_id=0))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.BertModel(t.BertConfig(**shape, **tokens, max_position_embeddings=64))


@cache
def model_folder(kind: str) -> Path:
    """A random model ("llama", "t5" or "bert") with its tokenizer, written once per process."""
    folder = Path(mkdtemp(prefix=f"inlay-{kind}-"))
    _model(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentences(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for every task at once: a sentence, its colour, a question, an answer, and words with tags."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < n:
        colour = draw.choice(COLOURS)
        words = [*draw.sample(THINGS, 4), colour]
        draw.shuffle(words)
        text = " ".join(words)
        if text in seen:
            continue
        seen.add(text)
        tags = ["COLOUR" if word in COLOURS else "O" for word in words]
        rows.append({"text": text, "label": colour, "answer": f"{colour}", "tokens": words, "tags": tags})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


#: task -> (kind of model, data columns, targets)
TASKS: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "causal-lm": ("llama", {"target": "answer"}, ["q_proj", "v_proj"]),
    "seq2seq": ("t5", {"target": "answer"}, ["q", "v"]),
    "sequence-classification": ("bert", {}, ["query", "value"]),
    "token-classification": ("bert", {}, ["query", "value"]),
}


def tree(task: str, folder: Path, rows: int = 60, **training: Any) -> dict[str, Any]:
    """A config for ``task``, with its data written into ``folder``."""
    kind, columns, targets = TASKS[task]
    data = write_rows(folder / "rows.jsonl", sentences(rows))
    return {
        "task": task,
        "output": str(folder / "run"),
        "model": {"name": str(model_folder(kind))},
        "data": {"path": str(data), "max_length": 32, "max_target_length": 4, **columns},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": targets},
        "training": {**SETTINGS, **training},
    }
