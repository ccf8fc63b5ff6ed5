"""A stock transformers Trainer, told nothing, on the handle: columns, labels, what its loss is given, packed bases."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integrations.tiny_runs import model_folder
from torch import nn

import inlay


def trainer(folder: Path, model: nn.Module, rows: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True
    )
    assert arguments.remove_unused_columns
    assert arguments.label_names is None
    made = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    made.remove_callback(transformers.PrinterCallback)
    return made


def rows_of(**labels: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    ids = torch.randint(3, 18, (8, 6))
    return [
        {"input_ids": row, "token_type_ids": torch.ones_like(row), "text": "a column that no model takes", **labels}
        for row in ids
    ]


HEADS = {
    "SEQ_CLS": (transformers.BertForSequenceClassification, {"labels": 1}),
    "TOKEN_CLS": (transformers.BertForTokenClassification, {"labels": torch.arange(6) % 2}),
    "QUESTION_ANS": (transformers.BertForQuestionAnswering, {"start_positions": 1, "end_positions": 2}),
    None: (transformers.BertForSequenceClassification, {"labels": 0}),
}


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("task", HEADS)
def test_two_steps_and_an_evaluation(tmp_path: Path, task: str | None) -> None:
    head, labels = HEADS[task]
    base = head.from_pretrained(model_folder("bert"))
    model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=["query"], task_type=task)).train()
    seen: list[set[str]] = []
    base.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    before = model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_B["default"].weight.clone()
    made = trainer(tmp_path, model, rows_of(**labels))
    made.train()
    assert not torch.equal(made.model.bert.encoder.layer[0].attention.self.query.lora_B["default"].weight, before)
    assert made.evaluate()["eval_loss"] > 0
    wanted = {"input_ids", "token_type_ids", *labels}
    assert all(keywords - {"num_items_in_batch"} == wanted for keywords in seen), seen
    # What the Trainer hands to a loss is handed on where the model takes it, and only there.
    assert made.model_accepts_loss_kwargs == any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values()
    )


class Narrow(nn.Module):
    """A model that takes nothing but what it names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.body(input_ids.float())
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_a_model_without_keywords_of_its_own(tmp_path: Path) -> None:
    model = inlay.get_peft_model(Narrow(), inlay.LoraConfig(target_modules=["body"])).train()
    made = trainer(tmp_path, model, rows_of(labels=1))
    made.train()
    assert not made.model_accepts_loss_kwargs


@pytest.mark.bnb
def test_a_packed_base_may_be_trained(tmp_path: Path) -> None:
    options: Any = {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"), **options)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(tmp_path, base, [])
    model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer(tmp_path, model, [])
