"""transformers' own adapter mixin: ``add_adapter`` to ``from_pretrained`` of an adapter's folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import test_experts as old
import torch
import transformers
from dropin.tiny_transformers import CASES, MODELS
from safetensors.torch import load_file
from torch import nn

from dropin import tiny_transformers as tiny

#: what each behaviour is tried on, where the way through a folder is tried on all
FEW = [("llama", adapter) for adapter in tiny.ADAPTERS] + [*tiny.SPECIAL, ("gpt2", "lora"), ("t5", "oft")]
# PEFT says so too.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


def over(cases: list[tuple[str, str]]) -> Any:
    return pytest.mark.parametrize(("model", "adapter"), cases, ids=[f"{model}-{adapter}" for model, adapter in cases])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def with_adapter(model: str, adapter: str, name: str = "default") -> Any:
    """The model with one adapter that does something."""
    made = tiny.build(model)
    torch.manual_seed(0)
    made.add_adapter(tiny.config(model, adapter), name)
    tiny.stir(made, name)
    return made.eval()


def own(made: nn.Module, name: str = "default") -> set[str]:
    """Names of an adapter's parameters."""
    return {key for key, _ in made.named_parameters() if f".{name}." in f"{key}."}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@over(CASES)
def test_an_adapter_goes_through_a_folder(model: str, adapter: str, tmp_path: Path, bases: Path) -> None:
    base = tiny.saved(model, bases)
    made = MODELS[model].auto.from_pretrained(base)
    made.add_adapter(tiny.config(model, adapter))
    torch.testing.assert_close(tiny.output(made.eval(), model), tiny.output(tiny.build(model), model))
    tiny.stir(made)
    expected = tiny.output(made, model)
    assert not torch.equal(expected, tiny.output(tiny.build(model), model))
    made.save_pretrained(tmp_path)
    found = set(os.listdir(tmp_path)) - {"README.md", "generation_config.json"}
    assert found == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(key.startswith("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == base

    again = MODELS[model].auto.from_pretrained(tmp_path)
    torch.testing.assert_close(tiny.output(again, model), expected)
    fresh = tiny.build(model)
    report = fresh.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    torch.testing.assert_close(tiny.output(fresh, model), expected)
    assert not fresh.training
    assert not any(p.requires_grad for key, p in fresh.named_parameters() if "modules_to_save" not in key)
    handle = peft.PeftModel.from_pretrained(tiny.build(model), tmp_path)
    torch.testing.assert_close(tiny.output(handle, model), expected)


@over(FEW)
def test_a_handles_folder_is_loaded_by_the_mixin(model: str, adapter: str, tmp_path: Path) -> None:
    handle = peft.get_peft_model(tiny.build(model), tiny.config(model, adapter))
    tiny.stir(handle)
    expected = tiny.output(handle.eval(), model)
    handle.save_pretrained(tmp_path)
    made = tiny.build(model)
    report = made.load_adapter(str(tmp_path), "other")
    assert not report.missing_keys
    assert not report.unexpected_keys
    torch.testing.assert_close(tiny.output(made, model), expected)


@over(FEW)
def test_a_state_dict_and_a_config_load_without_a_folder(model: str, adapter: str) -> None:
    made = with_adapter(model, adapter)
    tensors = made.get_adapter_state_dict()
    assert tensors
    assert not any(".default" in key or key.startswith("base_model.") for key in tensors)
    for low_cpu_mem_usage in (False, True):
        fresh = tiny.build(model)
        report = fresh.load_adapter(
            adapter_state_dict=dict(tensors),
            peft_config=tiny.config(model, adapter),
            adapter_name="other",
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        assert not report.missing_keys
        assert not report.unexpected_keys
        assert not any(p.is_meta for p in fresh.parameters())
        torch.testing.assert_close(tiny.output(fresh, model), tiny.output(made, model))


@over(FEW)
def test_gradients_reach_the_adapter_alone(model: str, adapter: str) -> None:
    made = with_adapter(model, adapter).train()
    trained = {key for key, p in made.named_parameters() if p.requires_grad}
    labels = torch.tensor([0, 2]) if model == "bert" else tiny.batch(model)["input_ids"]
    made(**tiny.batch(model), labels=labels).loss.backward()
    assert {key for key, p in made.named_parameters() if p.grad is not None} <= trained
    biases = {key for key in trained if key.endswith("base_layer.bias")} if adapter == "bias" else set()
    assert trained - biases <= own(made)
    assert trained


@over(FEW)
def test_disabled_and_enabled(model: str, adapter: str) -> None:
    made = with_adapter(model, adapter)
    active = tiny.output(made, model)
    made.disable_adapters()
    torch.testing.assert_close(tiny.output(made, model), tiny.output(tiny.build(model), model))
    made.enable_adapters()
    if adapter != "head":  # enable_adapters of transformers leaves the heads as they are
        torch.testing.assert_close(tiny.output(made, model), active)
    made.set_adapter("default")
    assert made.active_adapters() == ["default"]


@over(FEW)
def test_deleting_the_last_adapter_leaves_the_base(model: str, adapter: str) -> None:
    made = with_adapter(model, adapter, "one")
    made.delete_adapter("one")
    assert not made._hf_peft_config_loaded
    assert not hasattr(made, "peft_config")
    assert not own(made, "one")
    torch.testing.assert_close(tiny.output(made, model), tiny.output(tiny.build(model), model))
    made.add_adapter(tiny.config(model, adapter), "one")
    assert own(made, "one")


# ---------------------------------------------------------------- several adapters


def two() -> Any:
    made = tiny.build("llama")
    for name, seed in (("a", 1), ("b", 2)):
        made.add_adapter(tiny.config("llama", "lora"), name)
        tiny.stir(made, name, seed)
    return made.eval()


def test_several_adapters_are_chosen_alone_and_together() -> None:
    made = two()
    assert made.active_adapters() == ["b"]
    found = {}
    for choice in ("a", "b", ["a", "b"], ["b", "a"]):
        made.set_adapter(choice)
        names = [choice] if isinstance(choice, str) else choice
        assert made.active_adapters() == names
        trained = {key for key, p in made.named_parameters() if p.requires_grad}
        assert trained == set().union(*(own(made, name) for name in names))
        found[str(choice)] = tiny.output(made, "llama")
    torch.testing.assert_close(found["['a', 'b']"], found["['b', 'a']"])
    assert not any(torch.allclose(found["['a', 'b']"], found[name]) for name in "ab")
    made.set_adapter("a")
    torch.testing.assert_close(tiny.output(made, "llama"), found["a"])


def test_only_one_active_adapter_is_saved(tmp_path: Path) -> None:
    made = two()
    made.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="Multiple active adapters"):
        made.save_pretrained(tmp_path)
    made.set_adapter("a")
    made.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    for key, t in made.get_adapter_state_dict("a").items():
        assert torch.equal(written[f"base_model.model.{key}"], t)


def test_the_state_dict_of_an_adapter_comes_from_the_one_given() -> None:
    made = two()
    tensors = {key: torch.zeros_like(t) for key, t in made.state_dict().items()}
    assert made.get_adapter_state_dict("b").keys() == made.get_adapter_state_dict("a", tensors).keys()
    assert not any(t.any() for t in made.get_adapter_state_dict("a", tensors).values())


def test_adapters_are_deleted_one_by_one_and_together() -> None:
    made = two()
    with pytest.warns(UserWarning, match="was active"):
        made.delete_adapter("b")
    assert list(made.peft_config) == ["a"]
    assert made.active_adapters() == ["a"]
    for names in ("b", ["a", "b"]):
        with pytest.raises(ValueError, match="not present"):
            made.delete_adapter(names)
    made.add_adapter(tiny.config("llama", "lora"), "b")
    made.delete_adapter([])
    made.delete_adapter(["a", "b"])
    assert not made._hf_peft_config_loaded
    torch.testing.assert_close(tiny.output(made, "llama"), tiny.output(tiny.build("llama"), "llama"))


def test_adapters_of_different_methods_stand_in_one_model() -> None:
    made = tiny.build("llama")
    deltas = []
    for name in ("lora", "loha"):
        made.add_adapter(tiny.config("llama", name), name)
        tiny.stir(made, name)
    for choice in ("lora", "loha", ["lora", "loha"]):
        made.set_adapter(choice)
        deltas.append(tiny.output(made, "llama"))
    assert not torch.allclose(deltas[0], deltas[1])
    assert not torch.allclose(deltas[1], deltas[2])


# ---------------------------------------------------------------- what is refused, and what is told


@pytest.mark.parametrize("make", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
def test_prompts_are_refused_by_name(make: Any) -> None:
    config = make(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made = tiny.build("llama")
    with pytest.raises(ValueError, match=f"{make.__name__}.*does not support prompt learning"):
        made.add_adapter(config)
    with pytest.raises(ValueError, match=f"{make.__name__}.*does not support prompt learning"):
        tiny.build("llama").load_adapter(adapter_state_dict={}, peft_config=config)
    torch.testing.assert_close(tiny.output(made, "llama"), tiny.output(tiny.build("llama"), "llama"))


def test_what_cannot_be_is_an_error() -> None:
    made = tiny.build("llama")
    for verb in (lambda: made.set_adapter("a"), made.disable_adapters, made.active_adapters):
        with pytest.raises(ValueError, match="No adapter loaded"):
            verb()
    with pytest.raises(TypeError, match="PeftConfig"):
        made.add_adapter("lora")
    with pytest.raises(ValueError, match="nope"):
        tiny.build("llama").add_adapter(peft.LoraConfig(target_modules=["nope"]))
    made = two()
    with pytest.raises(ValueError, match="already exists"):
        made.add_adapter(tiny.config("llama", "lora"), "a")
    for choice in ("c", ["a", "c"]):
        with pytest.raises(ValueError, match="found"):
            made.set_adapter(choice)
    with pytest.raises(ValueError, match="peft_model_id"):
        made.load_adapter()


def test_missing_unexpected_and_misshapen_tensors_are_reported() -> None:
    tensors = with_adapter("llama", "lora").get_adapter_state_dict()
    gone = "model.layers.0.self_attn.q_proj.lora_A.weight"
    bad = {**{key: t for key, t in tensors.items() if key != gone}, "foobar": tensors[gone]}
    arguments = {"peft_config": tiny.config("llama", "lora"), "adapter_name": "other"}
    report = tiny.build("llama").load_adapter(adapter_state_dict=bad, **arguments)
    assert report.missing_keys == {"model.layers.0.self_attn.q_proj.lora_A.other.weight"}
    assert report.unexpected_keys == {"foobar"}
    wrong = {**tensors, gone: torch.zeros(7, 16)}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tiny.build("llama").load_adapter(adapter_state_dict=wrong, **arguments)
    report = tiny.build("llama").load_adapter(adapter_state_dict=wrong, ignore_mismatched_sizes=True, **arguments)
    assert [key for key, *_ in report.mismatched_keys] == ["model.layers.0.self_attn.q_proj.lora_A.other.weight"]


# ---------------------------------------------------------------- training


def test_a_loaded_adapter_is_frozen_or_trained(tmp_path: Path) -> None:
    with_adapter("llama", "lora").save_pretrained(tmp_path)
    frozen, trained = tiny.build("llama"), tiny.build("llama")
    frozen.load_adapter(str(tmp_path))
    trained.load_adapter(str(tmp_path), is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(module.training for module in frozen.modules())
    assert frozen.peft_config["default"].inference_mode
    assert not trained.peft_config["default"].inference_mode
    for name, module in trained.named_modules():
        if not list(module.children()):  # transformers' own tests ask this of leaves
            assert module.training is ("lora_" in name)
            assert all(p.requires_grad is ("lora_" in name) for p in module.parameters())


@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3", "oft"])
def test_recomputed_activations_give_the_same_gradients(adapter: str, reentrant: bool | None) -> None:
    found = []
    for recompute in (False, True):
        made = with_adapter("llama", adapter).train()
        if recompute:
            made.activation_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
            assert made.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad
        made(**tiny.batch("llama"), labels=tiny.batch("llama")["input_ids"]).loss.backward()
        found.append({key: p.grad for key, p in made.named_parameters() if p.requires_grad})
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad)


def test_a_16_bit_base_keeps_its_dtype_in_the_adapter() -> None:
    made = tiny.build("llama").bfloat16()
    made.add_adapter(tiny.config("llama", "lora"))
    made.load_adapter(
        adapter_state_dict=with_adapter("llama", "lora").get_adapter_state_dict(),
        peft_config=tiny.config("llama", "lora"),
        adapter_name="other",
    )
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- folders and pipelines


def test_folders_are_found_as_transformers_finds_them(tmp_path: Path) -> None:
    base = tiny.build("llama")
    base.save_pretrained(tmp_path / "base")
    made = MODELS["llama"].auto.from_pretrained(tmp_path / "base")
    made.add_adapter(tiny.config("llama", "lora"))
    tiny.stir(made)
    expected = tiny.output(made.eval(), "llama")
    made.save_pretrained(tmp_path / "outer" / "inner")
    auto = MODELS["llama"].auto
    below = auto.from_pretrained(tmp_path / "outer", adapter_kwargs={"subfolder": "inner"})
    named = auto.from_pretrained(tmp_path / "outer" / "inner", adapter_name="style")
    assert named.active_adapters() == ["style"]
    shutil.copytree(tmp_path / "base", tmp_path / "both")
    shutil.copytree(tmp_path / "outer" / "inner", tmp_path / "both", dirs_exist_ok=True)
    together = auto.from_pretrained(tmp_path / "both")
    made.save_pretrained(tmp_path / "bare", save_peft_format=False)
    assert not any(key.startswith("base_model.") for key in load_file(tmp_path / "bare" / "adapter_model.safetensors"))
    bare = tiny.build("llama")
    bare.load_adapter(str(tmp_path / "bare"))
    for loaded in (below, named, together, bare):
        torch.testing.assert_close(tiny.output(loaded, "llama"), expected)


def test_a_pipeline_takes_a_folder_a_handle_and_a_model(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "base")
    made = MODELS["llama"].auto.from_pretrained(tmp_path / "base")
    made.add_adapter(tiny.config("llama", "lora"))
    tiny.stir(made)
    made.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    handle = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "adapter")
    said = [
        transformers.pipeline("text-generation", model, tokenizer=tiny.tokenizer())(
            "w5 w6", max_new_tokens=4, do_sample=False
        )
        for model in (str(tmp_path / "adapter"), handle, made.eval(), tiny.build("llama"))
    ]
    assert said[0] == said[1] == said[2] != said[3]


def test_hotswap_of_transformers_writes_in_place() -> None:
    made = tiny.build("llama")
    made.enable_peft_hotswap(target_rank=4)
    arguments = {"peft_config": tiny.config("llama", "lora"), "adapter_name": "a"}
    made.load_adapter(adapter_state_dict=with_adapter("llama", "lora").get_adapter_state_dict(), **arguments)
    before = {key: p.data_ptr() for key, p in made.named_parameters()}
    other = with_adapter("llama", "lora")
    tiny.stir(other, seed=3)
    made.load_adapter(adapter_state_dict=other.get_adapter_state_dict(), **arguments)
    torch.testing.assert_close(tiny.output(made, "llama"), tiny.output(other, "llama"))
    assert before.keys() == dict(made.named_parameters()).keys()


# ---------------------------------------------------------------- experts that were modules once


@pytest.mark.parametrize("targets", ["gud", "gu", "d"])
@pytest.mark.parametrize("model", old.MODELS)
def test_files_of_single_experts_load_through_the_mixin(model: str, targets: str, tmp_path: Path) -> None:
    tensors = old.factors(model, targets)
    given = old.folder(tmp_path, tensors, old.config(model, targets))
    made = old.build(model)
    report = made.load_adapter(str(given), "style")
    assert not report.missing_keys
    assert not report.unexpected_keys
    ids = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(made(ids).logits, old.by_hand(model, tensors, 3)(ids).logits)
    from_memory = old.build(model)
    from_memory.load_adapter(adapter_state_dict=tensors, peft_config=old.config(model, targets))
    torch.testing.assert_close(from_memory(ids).logits, made(ids).logits)


@pytest.mark.bnb
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_is_adapted_saved_and_loaded(bits: int, tmp_path: Path) -> None:
    wide = {**tiny.DECODER, "hidden_size": 64, "intermediate_size": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide)).save_pretrained(tmp_path / "base")
    packing = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def load(path: Path) -> Any:
        return MODELS["llama"].auto.from_pretrained(path, quantization_config=packing, device_map="cpu")

    made = load(tmp_path / "base")
    made.add_adapter(tiny.config("llama", "lora"))
    tiny.stir(made)
    layer = made.model.layers[0].self_attn.q_proj
    assert isinstance(layer, peft.tuners.lora.Linear4bit if bits == 4 else peft.tuners.lora.Linear8bitLt)
    assert not isinstance(layer, peft.tuners.lora.Linear)
    expected = tiny.output(made.eval(), "llama")
    made.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert again.model.layers[0].self_attn.q_proj.base_layer.weight.dtype in (torch.uint8, torch.int8)
    torch.testing.assert_close(tiny.output(again, "llama"), expected)
