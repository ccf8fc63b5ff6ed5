"""TRL's trainers, unmodified: two steps have PEFT's numbers, and what is saved gives the same outputs again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
import trl
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

from dropin import trl_runs as runs

GOLDEN = json.loads(Path(__file__).with_name("trl_golden.json").read_text())
pytestmark = [
    pytest.mark.trl,
    # transformers, of TRL 1.16
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


def outputs(model: nn.Module, training: bool = False) -> Tensor:
    ids = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 11, 12]])
    with torch.no_grad():
        return model.train(training)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def handle(**fields: Any) -> PeftModel:
    """An adapter that changes what the model gives."""
    config = LoraConfig(**{"r": 4, "target_modules": runs.TARGETS, "task_type": "CAUSAL_LM", **fields})
    model = get_peft_model(runs.llama(), config)
    runs.fill(model, "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    return model


def base_of(name: str) -> nn.Module:
    model = runs.KINDS[name.split()[0]].base()
    if name == "sft-chat new":
        model.resize_token_embeddings(64)
    return model


@pytest.mark.parametrize("name", runs.RUNS)
def test_two_steps_and_reload(name: str, tmp_path: Path) -> None:
    trainer = runs.RUNS[name](tmp_path)
    trainer.train()
    expected = GOLDEN[name]
    assert runs.losses(trainer) == pytest.approx(expected["losses"], rel=1e-4, abs=1e-6)
    assert runs.digest(runs.trained(trainer.model)) == pytest.approx(expected["digest"], rel=1e-4)

    adapted = pytest.warns(UserWarning, match="save_embedding_layers") if name == "sft embedding" else nullcontext()
    with adapted:
        trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base_of(name), tmp_path / "saved")
    assert not runs.trained(loaded)
    torch.testing.assert_close(outputs(loaded), outputs(trainer.model))


def test_a_reference_adapter_stays_where_training_began(tmp_path: Path) -> None:
    trainer = runs.continued("dpo", tmp_path)
    start = {n: p.clone() for n, p in trainer.model.named_parameters() if ".default." in n}
    before = outputs(trainer.model)
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    for name, value in start.items():
        assert torch.equal(parameters[name.replace(".default.", ".ref.")], value)
        assert not torch.equal(parameters[name], value)
    assert trainer.model.active_adapter == "default"
    with use_adapter(trainer.model, "ref"):
        assert torch.equal(outputs(trainer.model), before)

    trainer.save_model(str(tmp_path / "saved"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "saved/ref").iterdir()}
    loaded = PeftModel.from_pretrained(runs.llama(), tmp_path / "saved/ref", adapter_name="ref")
    assert torch.equal(outputs(loaded), before)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = runs.build("sft", tmp_path, runs.config("sft", "lora"), save_strategy="steps", save_steps=1)
    whole.train()
    again = runs.build("sft", tmp_path, runs.config("sft", "lora"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in runs.trained(whole.model).items():
        assert torch.equal(runs.trained(again.model)[name], value)


def test_the_base_is_found_from_the_adapter(tmp_path: Path) -> None:
    runs.llama().save_pretrained(tmp_path / "base")
    trainer = runs.build("sft", tmp_path, runs.config("sft", "lora"), model=str(tmp_path / "base"))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert torch.equal(outputs(loaded), outputs(trainer.model))
    assert "library_name: peft" in (tmp_path / "saved/README.md").read_text()


# ---------------------------------------------------------------- new tokens

NEW = list(range(len(runs.tokenizer()), 64))
#: fields of the config -> what TRL makes of trainable_token_indices and modules_to_save
TOKENS: list[tuple[dict[str, Any], dict[str, list[int]], list[str]]] = [
    ({}, {"embed_tokens": NEW}, ["lm_head"]),
    ({"modules_to_save": ["norm"]}, {"embed_tokens": NEW}, ["norm", "lm_head"]),
    ({"trainable_token_indices": {"embed_tokens": [5]}}, {"embed_tokens": [5, *NEW]}, ["lm_head"]),
]


@pytest.mark.parametrize(("fields", "tokens", "saved"), TOKENS)
def test_new_tokens_are_trained(fields: Any, tokens: Any, saved: list[str], tmp_path: Path) -> None:
    config = runs.config("sft", "lora", **fields)
    trainer = runs.with_new_tokens(tmp_path, config)
    assert (config.trainable_token_indices, config.modules_to_save) == (tokens, saved)
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    before = runs.trained(trainer.model)[f"{rows}.default"].clone()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    tensors = load_file(tmp_path / "saved/adapter_model.safetensors")
    turn = tokens["embed_tokens"].index(NEW[0])
    assert (tensors[rows][turn : turn + 2] != before[turn : turn + 2]).any(1).all()
    assert tensors["base_model.model.lm_head.weight"].shape == (64, 32)


# ---------------------------------------------------------------- what TRL refuses, which it asks the config and model

Build = Callable[[Path], Any]
HEAD = {"r": 4, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
REFUSED: dict[str, tuple[Build, type[Exception], str]] = {
    f"head in {kind}": (lambda at, kind=kind: runs.build(kind, at, LoraConfig(**HEAD)), ValueError, "lm_head")
    for kind in ("sft", "dpo", "kto", "grpo", "rloo", "distillation")
}
REFUSED |= {
    "a handle and a config": (
        lambda at: runs.build("sft", at, runs.config("sft", "lora"), handle()),
        ValueError,
        "You passed a `PeftModel` instance",
    ),
    "a dict": (lambda at: runs.build("sft", at, {"r": 3}), TypeError, "must be a `peft.PeftConfig` instance"),
    "a prompt under distillation": (
        lambda at: runs.build("distillation", at, runs.config("sft", "prompt")),
        ValueError,
        "Prompt-learning PEFT methods",
    ),
    "a prefix under checkpointing": (
        lambda at: runs.build("sft", at, runs.config("sft", "prefix")).train(),
        ValueError,
        "gradient_checkpointing_disable",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    build, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        build(tmp_path)


def test_configs_from_the_command_line() -> None:
    given = trl.ModelConfig(use_peft=True, lora_r=3, lora_target_modules=["q_proj", "v_proj"], use_rslora=True)
    made = trl.get_peft_config(given)
    assert isinstance(made, LoraConfig)
    assert (made.r, made.target_modules, made.use_rslora, made.bias) == (3, {"q_proj", "v_proj"}, True, "none")
    assert trl.get_peft_config(trl.ModelConfig()) is None


def test_another_adapter_for_a_while() -> None:
    model, base = handle(), outputs(runs.llama())
    model.add_adapter("ref", model.peft_config["default"])
    mine = outputs(model)
    with use_adapter(model, "ref"):
        assert model.active_adapter == "ref"
        assert torch.equal(outputs(model), base)
    with use_adapter(model, None):
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), mine)
    assert model.active_adapter == "default"
    assert not [n for n in runs.trained(model) if ".ref." in n]


# ---------------------------------------------------------------- weights for vLLM

MERGED: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_weights_have_the_names_of_the_base(name: str) -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    model = handle(**MERGED[name])
    runs.fill(model, "lm_head.modules_to_save")
    before = {n: p.clone() for n, p in model.named_parameters()}
    sync: Any = object.__new__(VLLMGeneration)
    sync.model, sync._dist = model, SimpleNamespace(gather_params=lambda _: nullcontext(), is_fsdp=False)
    sent = {n: p.clone() for n, p in sync._iter_named_params()}

    base = runs.llama()
    expected = outputs(model)
    assert set(sent) == {n for n, _ in base.named_parameters()}
    base.load_state_dict(sent)
    torch.testing.assert_close(outputs(base), expected)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n])


def test_one_adapter_for_vllm(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from trl.experimental.async_grpo.async_grpo_trainer import save_lora_adapter, validate_lora_for_vllm_sync

    model = handle()
    model.add_adapter("other", model.peft_config["default"])
    for name in ("default", "other"):
        model.set_adapter(name)
        assert validate_lora_for_vllm_sync(model) is model.peft_config[name]
        save_lora_adapter(model, Accelerator(cpu=True), name, str(tmp_path / name))
        loaded = PeftModel.from_pretrained(runs.llama(), tmp_path / name)
        assert torch.equal(outputs(loaded), outputs(model))
    for fields in ({"use_dora": True}, {"bias": "all"}, MERGED["embedding"], MERGED["saved"]):
        with pytest.raises(ValueError, match=r"vLLM|LoRA adapter"):
            validate_lora_for_vllm_sync(handle(**fields))


# ---------------------------------------------------------------- teachers and packed bases


@pytest.mark.parametrize("trainer", ["sdft", "sdpo"])
def test_a_teacher_that_follows(trainer: str) -> None:
    teacher_sync = pytest.importorskip(f"trl.experimental.{trainer}.teacher_sync")
    model = handle()
    callback = teacher_sync.PEFTAdapterEMACallback(model, update_rate=0.5)
    callback.on_train_begin(None, None, None)
    callback.on_step_end(None, SimpleNamespace(global_step=1), None)
    values = dict(model.named_parameters())
    for name, value in values.items():
        if ".default." in name:
            torch.testing.assert_close(values[name.replace(".default.", ".teacher.")], value / 2)
    assert model.active_adapter == "default"
    assert all(".default." in name for name in runs.trained(model))


def test_models_are_prepared_as_experimental_trainers_do() -> None:
    from trl.experimental.utils import prepare_peft_model

    args: Any = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs={}, bf16=False)
    model = runs.llama().bfloat16()
    model.is_loaded_in_8bit = True
    prepared = prepare_peft_model(model, runs.config("sft", "lora"), args)
    assert not args.gradient_checkpointing
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in runs.trained(prepared).items())
    args.gradient_checkpointing = True
    assert prepare_peft_model(prepared, None, args) is prepared


#: what is run -> which slots stay in fp32; ORPO calls prepare_model_for_kbit_training, the others go to 16 bits
PACKED = [("sft lora", set()), ("sft dora", {"lora_magnitude_vector"}), ("orpo lora", {"lora_A", "lora_B"})]


@pytest.mark.bnb
@pytest.mark.parametrize(("name", "wide"), PACKED)
def test_a_packed_base(name: str, wide: set[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    runs.llama().save_pretrained(tmp_path / "base")
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def packed() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=packing, device_map="cpu")

    kind, method = name.split()
    trainer = runs.build(kind, tmp_path, runs.config(kind, method), packed())
    trainer.train()
    first, second = runs.losses(trainer)
    assert second < first
    kept = {n.split(".")[-3] for n, p in runs.trained(trainer.model).items() if p.dtype == torch.float32}
    assert kept == wide
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(packed(), tmp_path / "saved")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as they are loaded
    # bitsandbytes 0.50 fails on the CPU in eval where a layer is narrower than a block
    torch.testing.assert_close(outputs(loaded, training=True), outputs(trainer.model, training=True))
