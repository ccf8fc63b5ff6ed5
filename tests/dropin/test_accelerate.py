"""accelerate, unmodified: prepare, checkpoints, FSDP (`accelerate_runs.py` has the cases), offloaded models."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
import two_processes
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel, is_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn

from dropin import accelerate_runs
from dropin import tiny_transformers as tiny

CPU = torch.device("cpu")


# ---------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """For each of the two processes, what went wrong by case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return two_processes.run(accelerate_runs.__file__, tmp_path_factory.mktemp("two"), port)


@pytest.mark.parametrize("case", accelerate_runs.NAMES)
def test_two_processes(wrong: list[dict[str, str]], case: str) -> None:
    for rank, cases in enumerate(wrong):
        assert not cases[case], f"process {rank}: {cases[case]}"


def units(model: nn.Module) -> set[str]:
    policy = fsdp_auto_wrap_policy(model)
    assert all(policy(m, recurse=True, nonwrapped_numel=1) for m in model.modules())
    return {name for name, m in model.named_modules() if policy(m, recurse=False, nonwrapped_numel=1)}


def test_policy_takes_layers_and_trained_modules_for_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    model = accelerate_runs.handle("head")
    layers = {f"base_model.model.model.layers.{i}" for i in range(2)}
    head = {"base_model.model.lm_head.modules_to_save.default"}
    assert units(model) == layers | head
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    assert units(model) == {f"{layer}.mlp" for layer in layers} | head
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    assert units(model) == head
    assert units(accelerate_runs.handle("prompt")) == set()
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,Nope")
    with pytest.raises(TypeError, match="Could not find the layer class to wrap: no module is 'Nope'"):
        fsdp_auto_wrap_policy(model)


# ---------------------------------------------------------------------- one process


@pytest.mark.parametrize("config", ["lora", "loha", "head", "prompt"])
def test_prepare_and_state(config: str, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    made = accelerate.Accelerator(cpu=True)
    whole, model = accelerate_runs.handle(config), accelerate_runs.handle(config)
    model, optimizer = made.prepare(model, accelerate_runs.trained(model.parameters()))
    accelerate_runs.step(model, optimizer, made.backward)
    accelerate_runs.step(whole, accelerate_runs.trained(whole.parameters()), lambda loss: loss.backward())
    accelerate_runs.same(model, whole)
    assert is_peft_model(model)
    assert extract_model_from_parallel(model) is model is made.unwrap_model(model)
    assert not is_peft_model(model.get_base_model())

    made.save_state(str(tmp_path / "state"))
    accelerate_runs.zero(model)
    assert not torch.equal(tiny.output(model, "llama"), tiny.output(whole, "llama"))
    made.load_state(str(tmp_path / "state"))
    accelerate_runs.same(model, whole)
    model.save_pretrained(tmp_path / "saved", state_dict=made.get_state_dict(model))
    accelerate_runs.same(peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "saved"), whole)


# ---------------------------------------------------------------------- offloaded models

MAP = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
MAP |= {"model.norm": "cpu", "lm_head": "disk"}
WAYS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), CPU),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(model, MAP, offload_dir=str(folder)),
}
METHODS = ["lora", "loha", "dora", "head", "tokens"]
over_ways = pytest.mark.parametrize("way", WAYS)


def plain(config: str) -> Any:
    model = tiny.build("llama")
    model.add_adapter(tiny.config("llama", config))
    tiny.stir(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@over_ways
@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_mixin_on_an_offloaded_model(config: str, way: str, when: str, tmp_path: Path) -> None:
    wanted = plain(config)
    wanted.save_pretrained(tmp_path / "saved")
    model = tiny.build("llama")
    if when == "after":
        model.load_adapter(str(tmp_path / "saved"))
        WAYS[way](model, tmp_path / "offload")
    else:
        WAYS[way](model, tmp_path / "offload")
        model.add_adapter(tiny.config("llama", config))
        accelerate_runs.same(model.eval(), tiny.build("llama"))
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path / "saved"))
    for _ in range(2):
        accelerate_runs.same(model, wanted)
    accelerate_runs.differ(model, tiny.build("llama"))
    model.disable_adapters()
    accelerate_runs.same(model, tiny.build("llama"))
    model.enable_adapters()
    model.save_pretrained(tmp_path / "again")
    again = tiny.build("llama")
    again.load_adapter(str(tmp_path / "again"))
    accelerate_runs.same(again, wanted)


@over_ways
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("config", ["lora", "loha", "head", "tokens"])
def test_mixin_does_not_load_onto_offloaded_layers(config: str, trainable: bool, way: str, tmp_path: Path) -> None:
    wanted = plain(config)
    wanted.save_pretrained(tmp_path / "saved")
    model = tiny.build("llama")
    WAYS[way](model, tmp_path / "offload")
    given = {"peft_config": tiny.config("llama", config), "adapter_state_dict": wanted.get_adapter_state_dict()}
    for source in ({"peft_model_id": str(tmp_path / "saved")}, given):
        with pytest.raises(ValueError, match="is offloaded, and transformers' load_adapter"):
            model.load_adapter(**source, is_trainable=trainable)
        accelerate_runs.same(model, tiny.build("llama"))
    model.add_adapter(given["peft_config"])  # the config is none that a loader waits for
    handle = peft.PeftModel.from_pretrained(offloaded(way, tmp_path), tmp_path / "saved")
    accelerate_runs.same(handle, wanted)


def offloaded(way: str, folder: Path) -> Any:
    model = tiny.build("llama")
    WAYS[way](model, folder / "another")
    return model


def test_mixin_loads_where_other_layers_are_offloaded(tmp_path: Path) -> None:
    wanted = tiny.build("llama")
    wanted.add_adapter(peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], r=4))
    tiny.stir(wanted)
    wanted.save_pretrained(tmp_path / "saved")
    tiny.build("llama").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=MAP, offload_folder=tmp_path / "offload"
    )
    model.load_adapter(str(tmp_path / "saved"))
    accelerate_runs.same(model, wanted.eval())


@pytest.mark.parametrize(
    ("on_disk", "fields"),
    [("lm_head", {"modules_to_save": ["lm_head"]}), ("model.embed_tokens", {"trainable_token_indices": [3]})],
)
def test_mixin_does_not_load_what_stands_beside_layers_onto_the_disk(
    on_disk: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    wanted = tiny.build("llama")
    wanted.add_adapter(peft.LoraConfig(target_modules=["q_proj"], **fields))
    wanted.save_pretrained(tmp_path / "saved")
    model = tiny.build("llama")
    accelerate.dispatch_model(model, {**dict.fromkeys(MAP, "cpu"), on_disk: "disk"}, offload_dir=str(tmp_path / "off"))
    with pytest.raises(ValueError, match=f"'{on_disk}' is offloaded"):
        model.load_adapter(str(tmp_path / "saved"))


def test_mixin_does_not_load_where_the_first_parameter_is_offloaded(tmp_path: Path) -> None:
    plain("lora").save_pretrained(tmp_path / "saved")
    model = tiny.build("llama")
    accelerate.cpu_offload(model.model.embed_tokens, CPU)  # transformers takes it for where all of the model is
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' is offloaded"):
        model.load_adapter(str(tmp_path / "saved"))
