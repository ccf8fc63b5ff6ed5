"""Configs, statuses and functions on models that someone else owns: results, warnings and errors as scripts know."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import functional, mapping
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from dropin import tiny_transformers as tiny

Q = "layers.0.self_attn.q_proj"


def config(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **fields})


def llama() -> nn.Module:
    return tiny.build("llama")


def trained(model: nn.Module) -> set[str]:
    return {name.rpartition(".lora_")[2].split(".")[1] for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------------ configs


def test_a_config_keeps_its_sets() -> None:
    assert config().to_dict()["target_modules"] == {"q_proj", "v_proj"}


def test_a_run_of_layers_and_tuples_are_lists() -> None:
    made = config(layers_to_transform=range(2), modules_to_save=("head",), trainable_token_indices=(1, 2))
    assert (made.layers_to_transform, made.modules_to_save, made.trainable_token_indices) == ([0, 1], ["head"], [1, 2])


def saved(tmp_path: Path, made: peft.PeftConfig, **further: Any) -> Path:
    made.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **further}))
    return tmp_path


def test_a_files_runtime_is_ignored_with_a_warning(tmp_path: Path) -> None:
    saved(tmp_path, config(), runtime_config={"ephemeral_gpu_offload": True})
    with pytest.warns(UserWarning, match="contains a `runtime_config` key"):
        assert not peft.LoraConfig.from_pretrained(tmp_path).runtime_config.ephemeral_gpu_offload


def test_a_file_gives_the_config_that_it_names(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoHaConfig())
    assert type(peft.LoraConfig.from_pretrained(tmp_path)) is peft.LoHaConfig
    assert type(peft.LoraConfig.from_peft_type(peft_type="IA3")) is peft.IA3Config


def test_an_empty_pattern_of_an_old_file_is_none(tmp_path: Path) -> None:
    saved(tmp_path, config(target_modules=["q_proj"]), layers_pattern="", layers_to_transform=[1])
    model = peft.get_peft_model(llama(), peft.PeftConfig.from_pretrained(tmp_path))
    assert model.base_model.targeted_module_names == ["model.layers.1.self_attn.q_proj"]


def test_get_peft_config_takes_fields_alone() -> None:
    assert peft.get_peft_config({"peft_type": "OFT", "r": 4, "oft_block_size": 0}).r == 4
    with pytest.raises(TypeError, match="nonsense"):
        peft.get_peft_config({"peft_type": "LORA", "nonsense": 1})


def test_files_of_other_ofts_are_told(tmp_path: Path) -> None:
    assert peft.LoraConfig.check_kwargs(r=3) == {"r": 3}
    saved(tmp_path, peft.OFTConfig(), peft_version="0.17.1")
    with pytest.warns(UserWarning, match="cayley-neumann"):
        assert peft.PeftConfig.from_pretrained(tmp_path).oft_block_size == 32
    saved(tmp_path, peft.OFTConfig(), peft_version="0.18.0")
    peft.PeftConfig.from_pretrained(tmp_path)


def test_a_table_lacks_what_is_not_there() -> None:
    table = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    assert table.get("NONE") is None
    assert "NONE" not in table
    assert table["LORA"] is peft.LoraConfig
    with pytest.raises(KeyError):
        table["NONE"]


def test_an_activated_adapter_of_another_task_warns() -> None:
    with pytest.warns(UserWarning, match="aLoRA is for task_type='CAUSAL_LM'"):
        config(alora_invocation_tokens=[1], task_type="SEQ_CLS")


# ----------------------------------------------------------------------------------------- who is active, and trained


@pytest.mark.parametrize("inference", [False, True])
def test_the_adapter_that_is_set_is_the_only_one_trained(inference: bool) -> None:
    model = functional.inject_adapter_in_model(config(), llama())
    functional.inject_adapter_in_model(config(), model, adapter_name="other")
    assert trained(model) == {"default", "other"}
    functional.set_adapter(model, "other", inference_mode=inference)
    assert trained(model) == (set() if inference else {"other"})


def test_a_second_adapter_of_transformers_is_trained_alone() -> None:
    model = llama()
    model.add_adapter(config(), "a")
    model.add_adapter(config(), "b")
    assert trained(model) == {"b"}


def test_what_was_set_to_train_rests_when_another_is_set() -> None:
    model = peft.get_peft_model(llama(), config())
    model.add_adapter("b", config())
    model.set_requires_grad("b")
    assert trained(model) == {"default", "b"}
    model.set_adapter("default")
    assert trained(model) == {"default"}


def test_a_status_names_the_class_of_a_model_with_adapters_inside() -> None:
    status = peft.get_model_status(functional.inject_adapter_in_model(config(), llama()))
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "None")


def test_a_layer_tells_its_adapters_and_tokens() -> None:
    model = peft.get_peft_model(llama(), config(trainable_token_indices=[3, 1], modules_to_save=["lm_head"]))
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    assert layer._get_available_adapters() == {"default"}
    assert model.base_model.model.lm_head.active_adapter == "default"
    assert model.base_model.model.model.embed_tokens.token_adapter.token_indices["default"] == [3, 1]


# ------------------------------------------------------------------------------------------------------------- tensors


def test_a_strange_key_is_reported() -> None:
    model = peft.get_peft_model(llama(), config())
    tensors = {**peft.get_peft_model_state_dict(model), "foo.bar": torch.ones(1)}
    assert peft.set_peft_model_state_dict(model, tensors).unexpected_keys == ["foo.bar"]


def test_a_tensor_of_another_shape_is_left_out_with_a_warning() -> None:
    model = peft.get_peft_model(llama(), config())
    key = f"base_model.model.model.{Q}.lora_A.weight"
    tensors = {**peft.get_peft_model_state_dict(model), key: torch.ones(3, 3)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(model, tensors)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes leaves out"):
        report = peft.set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert report.missing_keys == [key.replace("lora_A", "lora_A.default")]


# ------------------------------------------------------------------------------------------------------------- targets


def test_all_linear_stands_for_whole_names() -> None:
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    found = _maybe_include_all_linear_layers(config(target_modules="all-linear"), llama()).target_modules
    assert f"model.{Q}" in found
    assert len(found) == 14


def test_a_whole_name_needs_no_layer() -> None:
    made = config(target_modules=["foo"], layers_to_transform=[1])
    assert check_target_module_exists(made, "foo")
    assert not check_target_module_exists(made, "a.foo")


def fails(**fields: Any) -> Callable[[], Any]:
    return lambda: peft.get_peft_model(llama(), config(**fields))


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (fails(target_modules=["foo"]), ValueError, r"Target modules \{'foo'\} not found in the base model"),
        (fails(target_modules="fo+"), ValueError, r"Target modules fo\+ not found in the base model"),
        (fails(layers_to_transform=[7]), ValueError, r"not found in the base model.*'layers_to_transform': \[7\]"),
        (fails(target_modules=[]), ValueError, "Neither `target_modules` nor `target_parameters`"),
        (fails(exclude_modules=["q_proj", "v_proj"]), ValueError, "All modules were excluded"),
        (fails(target_modules=["norm"]), ValueError, "Target module .* is not supported"),
        (fails(init_lora_weights="nonsense"), ValueError, "Unknown initialization init_lora_weights='nonsense'"),
        (
            lambda: peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig()),
            ValueError,
            "Please specify `target_modules`",
        ),
        (
            lambda: peft.get_peft_model(llama(), config()).add_adapter("b", peft.IA3Config()),
            ValueError,
            "Cannot combine adapters with different peft types",
        ),
        (
            lambda: peft.get_peft_model(llama(), config()).save_pretrained("x", selected_adapters=["b"]),
            ValueError,
            "You passed an invalid `selected_adapters` argument",
        ),
        (lambda: peft.get_peft_model(llama(), config()).set_adapter("b"), ValueError, "Adapter b not found"),
        (lambda: peft.LoraConfig(nonsense=1), TypeError, "got an unexpected keyword argument 'nonsense'"),
        (lambda: peft.AutoPeftModelForCausalLM(), OSError, "is designed to be instantiated using the"),
        (
            lambda: peft.get_peft_model(llama(), config()).save_pretrained(__file__),
            ValueError,
            "should be a directory, not a file",
        ),
    ],
)
def test_errors_have_the_words_that_are_looked_for(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def test_auto_classes_say_what_they_do_not_load(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "net")
    saved(tmp_path / "net", peft.PeftConfig.from_pretrained(tmp_path / "net"), auto_mapping={"parent_library": "mine"})
    with pytest.raises(ValueError, match=r"auto mapping wants to import .* not in the import allowlist"):
        peft.AutoPeftModel.from_pretrained(tmp_path / "net")
    peft.get_peft_model(llama(), config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="Expected target PEFT class"):
        peft.AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "llama")


def test_warnings_have_the_words_that_are_looked_for() -> None:
    base = llama()
    with pytest.warns(UserWarning, match="You have passed exclude_modules={'foo'} but no modules were excluded"):
        model = peft.get_peft_model(base, config(exclude_modules=["foo"], bias="all"))
    with pytest.warns(UserWarning, match="Careful, disabling adapter layers with bias"), model.disable_adapter():
        pass
    model.add_adapter("b", config())
    with pytest.warns(UserWarning, match="was active and is deleted: b is active"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="with PEFT for a second time"):
        peft.get_peft_model(base, config(), "c")
    with pytest.warns(RuntimeWarning, match="rank_pattern.* keys did not match any targeted module"):
        peft.get_peft_model(llama(), config(rank_pattern={"foo": 3}))
    with pytest.warns(UserWarning, match=r"Invalid `oft_block_size` \(5\)! Adjusted `oft_block_size` to"):
        peft.get_peft_model(nn.Sequential(nn.Linear(6, 2)), peft.OFTConfig(target_modules=["0"], oft_block_size=5))


# ---------------------------------------------------------------------------------------------------------------- ties

PARTED = "Model has `tie_word_embeddings=True`"
ALONE = "`ensure_weight_tying` is set, but no tied modules are in"


@pytest.mark.parametrize(
    ("tied", "fields", "message"),
    [
        (True, {"target_modules": ["embed_tokens"]}, PARTED),
        (True, {"modules_to_save": ["lm_head"]}, PARTED),
        (True, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, None),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None),
        (True, {"ensure_weight_tying": True}, f"{ALONE} modules_to_save"),
        (True, {}, None),
        (False, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, f"{ALONE} the model"),
        (False, {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, None),
    ],
)
def test_ties_are_told_of(tied: bool, fields: dict[str, Any], message: str | None) -> None:
    made = transformers.LlamaConfig(**tiny.DECODER, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(made)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.get_peft_model(model, config(**fields))
    assert [str(w.message).startswith(message or "") for w in caught] == [True] * (message is not None)


# ------------------------------------------------------------------------------------------------------------- saving


def test_shards_that_nobody_gathered_are_told_of() -> None:
    model = peft.get_peft_model(llama(), config())
    given = {k: t.flatten()[:5] if f"{Q}.lora_A" in k else t for k, t in model.state_dict().items()}
    with pytest.warns(peft.PeftWarning, match="Adapter 'default': 1 tensors have an invalid shape"):
        peft.get_peft_model_state_dict(model, state_dict=given)


def test_a_card_has_the_models_own_tags(tmp_path: Path) -> None:
    base = llama()
    base.add_model_tags(["mine"])
    peft.get_peft_model(base, config()).save_pretrained(tmp_path)
    assert "- mine" in (tmp_path / "README.md").read_text()


def test_a_model_that_says_that_it_is_packed_is_checkpointed() -> None:
    base = llama()
    base.is_loaded_in_4bit = True
    assert peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False}) is base
    assert base.is_gradient_checkpointing


# --------------------------------------------------------------------------------------------------- what layers tell


def test_numbers_are_dicts_that_stay_as_they_were_read() -> None:
    model = peft.get_peft_model(llama(), config(lora_alpha=4))
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    before = layer.scaling
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        assert (before, layer.scaling.copy()) == ({"default": 2.0}, {"default": 1.0})
    assert isinstance(before, dict)
    assert type(copy.deepcopy(before)) is type(pickle.loads(pickle.dumps(before))) is dict
    layer.scaling.update(default=7.0)
    assert layer.scaling == {"default": 7.0}
    with pytest.raises(TypeError, match="delete the adapter"):
        del layer.scaling["default"]


def test_a_dropouts_mode_is_its_layers() -> None:
    model = peft.get_peft_model(llama(), config(lora_dropout=0.5)).train()
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    assert layer.lora_dropout["default"].training
    model.eval()
    assert not layer.lora_dropout["default"].training


def test_a_layer_tells_whether_it_is_feedforward() -> None:
    fields = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    layer = peft.get_peft_model(llama(), fields).base_model.model.model.layers[0]
    assert (layer.self_attn.k_proj.is_feedforward, layer.mlp.down_proj.is_feedforward) == (False, True)
