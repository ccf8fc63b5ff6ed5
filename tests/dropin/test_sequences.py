"""What lm-eval, verl, LLaMA-Factory and accelerate call on PEFT, one call after the other as they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, PeftType, TaskType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tiny = Callable[[str], nn.Module]
IDS = torch.tensor([[1, 5, 6, 7], [1, 9, 10, 11]])
FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": TaskType.CAUSAL_LM}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def filled(model: nn.Module) -> Any:
    """The model, with values in every tensor that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 4)
    return model


def adapted(model: nn.Module, **fields: Any) -> Any:
    return filled(get_peft_model(model, LoraConfig(**{**FIELDS, **fields})))


# ---------------------------------------------------------------- lm-eval 0.4.13


def test_lm_eval(llama: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    trained = adapted(llama)
    trained.save_pretrained(tmp_path)
    assert Version(peft.__version__) >= Version("0.4.0")
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, revision="main")
    model.eval()
    model.tie_weights()
    assert torch.equal(outputs(model), outputs(trained))
    assert model.config.vocab_size == 64
    assert model.device.type == "cpu"
    assert model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape == (2, 6)


# ---------------------------------------------------------------- verl 0.9.1


def test_verl_trains_on_from_a_folder(llama: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    llama.enable_input_require_grads()
    trained = adapted(llama, target_parameters=None, exclude_modules=None, bias="none")
    trained.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    config = model.peft_config["default"]
    assert config.peft_type == PeftType.LORA
    assert isinstance(config.task_type, str)
    config.task_type = TaskType.CAUSAL_LM
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_verl_collects_part_by_part(llama: nn.Module) -> None:
    model = adapted(llama)
    whole = get_peft_model_state_dict(model)
    collected: dict[str, Tensor] = {}
    for i in range(2):
        layer = {n: p for n, p in model.state_dict().items() if f".layers.{i}." in n}
        collected |= get_peft_model_state_dict(model, state_dict=layer)
    assert collected.keys() == whole.keys()
    assert all(torch.equal(collected[name], whole[name]) for name in whole)
    # names that begin at a layer are none of the model's: PEFT 0.21.2 finds nothing either
    assert get_peft_model_state_dict(model, state_dict=model.base_model.model.model.layers[0].state_dict()) == {}
    named = {n.replace(".default.weight", ".weight"): p for n, p in model.named_parameters() if "lora_" in n}
    assert named.keys() == whole.keys()


def test_verl_writes_weights_back_that_it_has_kept(llama: nn.Module) -> None:
    model = adapted(llama)
    before = outputs(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 4
    kept = {n: m.get_base_layer().weight.data.clone() for n, m in layers.items()}
    for layer in layers.values():
        assert not layer.merged
        layer.merge()
        assert layer.merged
    torch.testing.assert_close(outputs(model), before)
    for name, layer in layers.items():
        layer.get_base_layer().weight.data.copy_(kept[name])
        layer.merged_adapters = []
    assert torch.equal(outputs(model), before)
    for layer in layers.values():
        layer.merge()
        layer.unmerge()
        assert not layer.merged
    torch.testing.assert_close(outputs(model), before)


def test_verl_writes_files_of_its_own(llama: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(llama)
    fields = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).to_dict()
    for key in ("task_type", "peft_type"):
        fields[key] = fields[key].value if fields[key] else None
    fields["target_modules"] = list(fields["target_modules"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields, indent=4))
    tensors = {n.replace(".default.weight", ".weight"): p for n, p in model.named_parameters() if "lora_" in n}
    save_file(tensors, tmp_path / SAFETENSORS_WEIGHTS_NAME)
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny("llama"), tmp_path)), outputs(model))


# ---------------------------------------------------------------- LLaMA-Factory 0.9.5


def test_llamafactory_merges_and_trains_on(llama: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    assert (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) == ("adapter_model.safetensors", "adapter_model.bin")
    trained = adapted(llama)
    trained.save_pretrained(tmp_path / "nested" / "first")
    kwargs = {"subfolder": "first", "offload_folder": "offload", "cache_dir": None, "revision": "main", "token": None}
    model = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "nested"), **kwargs).merge_and_unload()
    torch.testing.assert_close(outputs(model), outputs(trained))
    assert not isinstance(model, PeftModel)
    again = adapted(model)
    again.save_pretrained(tmp_path / "second")
    merged = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "nested"), **kwargs).merge_and_unload()
    resumed = PeftModel.from_pretrained(merged, str(tmp_path / "second"), is_trainable=True)
    torch.testing.assert_close(outputs(resumed), outputs(again))
    assert isinstance(resumed.base_model, peft.LoraModel)
    assert any(p.requires_grad for p in resumed.parameters())


def test_llamafactory_converts_pissa(llama: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    model = get_peft_model(llama, LoraConfig(**FIELDS, init_lora_weights="pissa"))
    config = model.peft_config["default"]

    def save(folder: str) -> None:
        start, config.init_lora_weights = config.init_lora_weights, True
        model.save_pretrained(tmp_path / folder, safe_serialization=True)
        config.init_lora_weights = start

    save("initial")
    expected = outputs(filled(model))
    save("backup")
    model.save_pretrained(
        tmp_path / "converted",
        safe_serialization=True,
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    model.load_adapter(str(tmp_path / "backup"), "default", is_trainable=True)
    model.set_adapter("default")
    torch.testing.assert_close(outputs(model), expected)
    converted = PeftModel.from_pretrained(tiny("llama"), tmp_path / "converted")
    torch.testing.assert_close(outputs(converted), expected, rtol=1e-4, atol=1e-4)


def test_llamafactory_sets_a_state(llama: nn.Module, tiny: Tiny) -> None:
    trained, model = adapted(llama), get_peft_model(tiny("llama"), LoraConfig(**FIELDS))
    set_peft_model_state_dict(model, get_peft_model_state_dict(trained))
    assert torch.equal(outputs(model), outputs(trained))
    assert sum(isinstance(m, LoraLayer) for m in model.modules()) == 4


# ---------------------------------------------------------------- accelerate 1.15


def test_accelerate_knows_a_handle(llama: nn.Module) -> None:
    from accelerate.utils import is_peft_model

    assert not is_peft_model(llama)
    model = adapted(llama)
    assert is_peft_model(model)


@pytest.mark.parametrize("full", [False, True])
def test_accelerate_takes_the_adapter_alone(full: bool, llama: nn.Module, tiny: Tiny) -> None:
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(full_state_dict=True) if full else None
    trained, model = adapted(llama), get_peft_model(tiny("llama"), LoraConfig(**FIELDS))
    state = _get_model_state_dict(trained, adapter_only=True, sd_options=options)
    assert len(state) == 8
    assert all((".default." in name) is full for name in state)
    _set_model_state_dict(model, state, adapter_only=True, sd_options=options)
    assert torch.equal(outputs(model), outputs(trained))


def test_accelerate_saves_and_loads_a_state(llama: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = adapted(llama)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained))
    expected = outputs(model)
    accelerator.save_state(tmp_path)
    outputs(filled(model))
    accelerator.load_state(tmp_path)
    assert torch.equal(outputs(model), expected)
    assert accelerator.unwrap_model(model).active_adapter == "default"
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
