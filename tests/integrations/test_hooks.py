"""AdaLoRA's budget under transformers' Trainer, with the callback by hand and from ``inlay train``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integrations.tiny_runs import model_folder, tree
from safetensors.torch import load_file

import inlay
from inlay.errors import ConfigError
from inlay.integrations.hooks import STATE_NAME, TrainingHooksCallback
from inlay.integrations.train import predict, train
from inlay.integrations.train_config import parse

TARGETS = ["query", "value"]


def trainer(folder: Path, steps: int = 6, **fields: Any) -> tuple[transformers.Trainer, inlay.PeftModel]:
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=2)
    fields = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "SEQ_CLS", **fields}
    model = inlay.get_peft_model(base, inlay.AdaLoraConfig(**fields)).train()
    rows: Any = [{"input_ids": torch.randint(3, 18, (6,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    made = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[TrainingHooksCallback()])
    made.remove_callback(transformers.PrinterCallback)
    return made, model


def kept(model: inlay.PeftModel) -> int:
    return sum(map(sum, (model.peft_config["default"].rank_pattern or {}).values()))


def test_the_callback_drives_the_budget_and_fills_in_the_steps(tmp_path: Path) -> None:
    made, model = trainer(tmp_path, tinit=1, tfinal=1)
    made.train()
    config = model.peft_config["default"]
    assert config.total_step == 6
    assert kept(model) == 2 * 4  # target_r times the layers
    E = {name: p for name, p in model.named_parameters() if "lora_E" in name}
    assert sum(int((p != 0).sum()) for p in E.values()) == 8


def test_a_total_step_that_was_given_stays(tmp_path: Path) -> None:
    made, model = trainer(tmp_path, steps=4, total_step=100)
    made.train()
    assert (model.peft_config["default"].total_step, kept(model)) == (100, 0)


def test_too_short_a_training_is_refused_before_it_begins(tmp_path: Path) -> None:
    made, model = trainer(tmp_path, tinit=5, tfinal=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="tinit=5"):
        made.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_other_methods_train_with_the_callback_as_without(tmp_path: Path) -> None:
    made, model = trainer(tmp_path, steps=2)
    made.model = inlay.get_peft_model(model.unload(), inlay.LoraConfig(target_modules=TARGETS))
    made.train()
    assert not list(tmp_path.glob(f"**/{STATE_NAME}"))


def _config(folder: Path, **adapter: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    config = tree("sequence-classification", folder, keep_checkpoints=5)
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 5, "deltaT": 2}
    config["adapter"] = {"method": "adalora", "lora_alpha": 8, "target_modules": TARGETS, **schedule, **adapter}
    return config


def test_inlay_train_takes_adalora(tmp_path: Path) -> None:
    result = train(parse(_config(tmp_path)))
    assert result.report.after["loss"] < result.report.before["loss"]
    written = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert written["total_step"] == result.report.steps == 12
    assert sum(map(sum, written["rank_pattern"].values())) == 2 * 4
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert sum(t.shape[0] for key, t in tensors.items() if key.endswith("lora_E")) == 2 * 4
    assert not (tmp_path / "run/adapter" / STATE_NAME).exists()
    lines, _ = predict(tmp_path / "run")
    expected = [line["probability"] for line in result.predictions]
    assert [line["probability"] for line in lines] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("step", [4, 8], ids=["while ranks fall", "once they are final"])
def test_a_run_that_is_continued_ends_as_if_it_had_not_stopped(step: int, tmp_path: Path) -> None:
    whole = _config(tmp_path / "whole")
    train(parse(whole))
    stopped = _config(tmp_path / "stopped")
    train(parse(stopped))
    run = Path(stopped["output"])
    shutil.rmtree(run / "adapter")
    for later in (run / "checkpoints").glob("checkpoint-*"):
        if int(later.name.rpartition("-")[2]) > step:
            shutil.rmtree(later)
    again = train(parse(stopped)).report
    assert (again.resumed_at, again.steps) == (step, 12)
    ours, theirs = (load_file(run / "adapter/adapter_model.safetensors") for run in (run, Path(whole["output"])))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())
