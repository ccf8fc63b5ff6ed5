"""transformers' own Trainer: what its checkpoints hold, and how it resumes and goes back to the best of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from dropin import tiny_transformers as tiny

#: what each is tried with; the others run with the slow tests
ADAPTERS: list[Any] = ["lora", "head", "tokens", "adalora"]
ADAPTERS += [pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "ia3", "loha", "oft")]
STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        tokens = torch.randint(4, 50, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def handle(adapter: str) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.build("llama"), tiny.config("llama", adapter))


def injected(adapter: str) -> Any:
    torch.manual_seed(0)
    made = tiny.build("llama")
    made.add_adapter(tiny.config("llama", adapter))
    return made


def trainer(model: nn.Module, folder: Path, **arguments: Any) -> transformers.Trainer:
    settings = {"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 4, **arguments}
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", **settings
    )
    made = transformers.Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows())
    made.remove_callback(transformers.PrinterCallback)
    return made


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.detach().clone() for key, t in model.state_dict().items()}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("make", [handle, injected])
def test_a_checkpoint_holds_the_adapter_alone(make: Any, adapter: str, tmp_path: Path) -> None:
    model = make(adapter)
    trainer(model, tmp_path, max_steps=2, save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    found = set(os.listdir(folder)) - {"README.md", "generation_config.json"}
    assert found == {"adapter_config.json", "adapter_model.safetensors", *STATE}
    base = tiny.build("llama").state_dict().keys()
    keys = {key.removeprefix("base_model.model.") for key in load_file(folder / "adapter_model.safetensors")}
    assert not keys & (base - ({"lm_head.weight"} if adapter == "head" else set()))
    again = tiny.build("llama")
    again.load_adapter(str(folder))
    torch.testing.assert_close(tiny.output(again, "llama"), tiny.output(model.eval(), "llama"))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_resumed_run_ends_where_one_that_went_on_does(adapter: str, tmp_path: Path) -> None:
    whole = handle(adapter)
    trainer(whole, tmp_path, save_steps=2).train()
    resumed = handle(adapter)
    trainer(resumed, tmp_path / "second", save_strategy="no").train(str(tmp_path / "checkpoint-2"))
    expected = values(whole)
    assert any(not torch.equal(t, expected[key]) for key, t in values(handle(adapter)).items())
    for key, t in values(resumed).items():
        torch.testing.assert_close(t, expected[key], msg=key)


@pytest.mark.parametrize("adapter", ["lora", "head", "oft", "prefix"])
def test_the_best_checkpoint_comes_back(adapter: str, tmp_path: Path) -> None:
    prompt = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True)
    model = peft.get_peft_model(tiny.build("llama"), prompt) if adapter == "prefix" else handle(adapter)
    scores = iter([3.0, 1.0, 2.0, 4.0])

    def score(_: Any) -> dict[str, float]:
        return {"score": next(scores)}

    found = trainer(
        model,
        tmp_path,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
    )
    found.compute_metrics = score
    found.train()
    best = str(tmp_path / "checkpoint-2")
    assert found.state.best_model_checkpoint == best
    again = peft.PeftModel.from_pretrained(tiny.build("llama"), best)
    torch.testing.assert_close(tiny.output(model.eval(), "llama"), tiny.output(again, "llama"))
    last = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "checkpoint-4"))
    assert not torch.equal(tiny.output(last, "llama"), tiny.output(again, "llama"))


def test_only_handles_can_be_resumed(tmp_path: Path) -> None:
    """transformers looks for the whole model's weights where it finds no handle, with PEFT's own package too."""
    trainer(injected("lora"), tmp_path, max_steps=2, save_steps=2).train()
    with pytest.raises(ValueError, match="checkpoint index"):
        trainer(injected("lora"), tmp_path / "second").train(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [handle, injected])
def test_recomputed_activations_train_the_same(make: Any, reentrant: bool, tmp_path: Path) -> None:
    found = []
    settings: list[dict[str, Any]] = [{}, {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}]
    for options in settings:
        model = make("lora")
        recompute = bool(options)
        trainer(
            model, tmp_path, max_steps=2, save_strategy="no", activation_checkpointing=recompute, **options
        ).train()
        found.append(values(model))
    for key, t in found[0].items():
        torch.testing.assert_close(found[1][key], t, msg=key)


def test_several_adapters_are_saved_in_folders_and_the_active_one_is_resumed(tmp_path: Path) -> None:
    def two() -> Any:
        model = handle("lora")
        model.add_adapter("other", tiny.config("llama", "lora"))
        return model

    whole = two()
    trainer(whole, tmp_path, save_steps=2).train()
    found = set(os.listdir(tmp_path / "checkpoint-2")) - {"README.md"}
    assert found == {"adapter_config.json", "adapter_model.safetensors", "other", *STATE}
    resumed = two()
    trainer(resumed, tmp_path / "second", save_strategy="no").train(str(tmp_path / "checkpoint-2"))
    for key, t in values(resumed).items():
        torch.testing.assert_close(t, values(whole)[key], msg=key)
    assert resumed.active_adapters == ["default"]


@pytest.mark.parametrize("option", [{"neftune_noise_alpha": 5.0}, {"label_smoothing_factor": 0.1}, {"bf16": True}])
def test_options_that_look_inside_the_handle(option: dict[str, Any], tmp_path: Path) -> None:
    model = handle("lora")
    before = values(model)
    trainer(model, tmp_path, max_steps=2, save_strategy="no", **option).train()
    changed = {key for key, t in values(model).items() if not torch.equal(t, before[key])}
    assert changed
    assert all(".lora_" in key for key in changed)


def test_a_handle_is_named_as_trackers_look_for_it() -> None:
    model = handle("lora")
    assert type(model).__name__ == "PeftModel"
    assert transformers.trainer_utils._is_peft_model(model)
    assert not transformers.trainer_utils._is_peft_model(injected("lora"))
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
