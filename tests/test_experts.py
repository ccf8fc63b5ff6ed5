"""Configs and files that name experts as they were before they were fused into two parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sizes import TINY
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import inlay
from inlay.errors import LoadError, PlanError
from inlay.experts import FORMER, fused_tensors

QWEN = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
#: model type -> (the model, its experts' hidden size)
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "mixtral": (lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=3)), 24),
    "qwen3_moe": (lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, **QWEN)), 8),
}
each_model = pytest.mark.parametrize("model", MODELS)
DOUBLED = {r".*\.gate_up_proj": 8}


def build(model: str) -> Any:
    torch.manual_seed(0)
    return MODELS[model][0]().eval()


def factors(model: str, targets: str, r: int = 2) -> dict[str, Tensor]:
    """The tensors of an adapter that was made when each expert was a module; targets by initial: gate, up, down."""
    generator = torch.Generator().manual_seed(1)
    names, inner = FORMER[model], MODELS[model][1]
    former = {"g": (names.gate, inner, 16), "u": (names.up, inner, 16), "d": (names.down, 16, inner)}
    out = {}
    for layer in range(2):
        for expert in range(3):
            for name, rows, columns in (former[t] for t in targets):
                path = f"base_model.model.model.layers.{layer}.{names.block}.experts.{expert}.{name}"
                out[f"{path}.lora_A.weight"] = torch.randn(r, columns, generator=generator)
                out[f"{path}.lora_B.weight"] = torch.randn(rows, r, generator=generator)
    return out


def config(model: str, targets: str, **fields: Any) -> inlay.LoraConfig:
    names = FORMER[model]
    former = {"g": names.gate, "u": names.up, "d": names.down}
    return inlay.LoraConfig(target_modules=[former[t] for t in targets], **{"r": 2, "lora_alpha": 6, **fields})


def folder(tmp_path: Path, tensors: dict[str, Tensor], config: inlay.LoraConfig) -> Path:
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    return tmp_path


def by_hand(model: str, tensors: dict[str, Tensor], scale: float) -> Any:
    """The model with every expert's product added to its weight."""
    made, names = build(model), FORMER[model]
    with torch.no_grad():
        for key, A in tensors.items():
            path, _, end = key.partition(".lora_")
            if end != "A.weight":
                continue
            parts, delta = path.split("."), scale * tensors[f"{path}.lora_B.weight"] @ A
            experts = made.model.layers[int(parts[4])].mlp.experts
            rows = experts.gate_up_proj.shape[1] // 2
            place = {
                names.gate: experts.gate_up_proj[:, :rows],
                names.up: experts.gate_up_proj[:, rows:],
                names.down: experts.down_proj,
            }[parts[-1]]
            place[int(parts[-2])].add_(delta)
    return made


@each_model
@pytest.mark.parametrize("targets", ["gud", "gu", "d"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_single_experts_gives_what_they_gave(model: str, targets: str, rslora: bool, tmp_path: Path) -> None:
    tensors = factors(model, targets)
    given = folder(tmp_path, tensors, config(model, targets, use_rslora=rslora))
    handle = inlay.PeftModel.from_pretrained(build(model), given, strict=True)
    ids = torch.arange(10).reshape(2, 5)
    wanted = by_hand(model, tensors, 6 / 2**0.5 if rslora else 3)(ids).logits
    torch.testing.assert_close(handle(ids).logits, wanted)
    handle.save_pretrained(tmp_path / "again")
    again = inlay.PeftModel.from_pretrained(build(model), tmp_path / "again", strict=True)
    torch.testing.assert_close(again(ids).logits, wanted)
    inlay.set_peft_model_state_dict(again, {key: t * 0 for key, t in tensors.items()})
    torch.testing.assert_close(again(ids).logits, build(model)(ids).logits)


#: targets -> (what is left of them, parameters, layers in which parameters are adapted)
TARGETS = {
    "list": (["q_proj", "w1", "w2", "w3"], {"q_proj"}, ["down_proj", "gate_up_proj"], 2),
    "paths": (["model.layers.0.block_sparse_moe.experts.0.w2"], set(), ["down_proj"], 2),
    "router": (["gate"], set(), ["gate.weight"], 2),
    "regex": (r".*\.experts\.\d\.(w1|w3)", set(), ["gate_up_proj"], 2),
    "former-block": (r".*block_sparse_moe.*w2", set(), ["down_proj"], 2),
    "one-layer": (r"model\.layers\.1\..*(q_proj|w2)", r"model\.layers\.1\..*(q_proj|w2)", None, 1),
    "no-expert": (["q_proj"], {"q_proj"}, None, 0),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_are_parameters_now_become_parameters(case: str) -> None:
    targets, left, parameters, layers = TARGETS[case]
    handle = inlay.get_peft_model(build("mixtral"), inlay.LoraConfig(target_modules=targets, r=4))
    made = handle.peft_config["default"]
    assert made.target_modules == left
    if parameters is not None:
        assert made.target_parameters == parameters
    assert made.rank_pattern == (DOUBLED if "gate_up_proj" in (parameters or ()) else {})
    adapted = {name for name, layer in handle.base_model.layers() if layer.kind.name == "Parameter"}
    assert len({name.split(".")[2] for name in adapted}) == layers


def test_all_linear_reaches_the_experts_and_the_router() -> None:
    handle = inlay.get_peft_model(build("mixtral"), inlay.LoraConfig(target_modules="all-linear", r=4))
    assert handle.peft_config["default"].target_parameters == ["down_proj", "gate.weight", "gate_up_proj"]
    shapes = {key: tuple(p.shape) for key, p in handle.named_parameters() if "layers.0.mlp" in key and "lora" in key}
    assert [shape for key, shape in shapes.items() if "experts.base_layer.lora_A" in key] == [(3 * 8, 16)]


def test_half_of_a_fused_parameter_is_refused() -> None:
    model = build("mixtral")
    with pytest.raises(PlanError, match="w1 without also targeting w3"):
        inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["w1"]))
    assert not any("lora" in key for key in model.state_dict())


def test_other_models_and_methods_are_left_alone() -> None:
    assert "qwen2_moe" not in FORMER  # PEFT converts nothing there, and its files say so
    with pytest.raises(inlay.NoMatchingPeftModuleError):
        inlay.get_peft_model(build("mixtral"), inlay.LoHaConfig(target_modules=["w1", "w3"]))


def test_incomplete_experts_are_reported_by_their_keys(tmp_path: Path) -> None:
    tensors = factors("mixtral", "gud")
    gone = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1.lora_A.weight"
    given = folder(tmp_path, {k: t for k, t in tensors.items() if k != gone}, config("mixtral", "gud"))
    with pytest.raises(LoadError) as error:
        inlay.PeftModel.from_pretrained(build("mixtral"), given, strict=True)
    assert "model.layers.0.mlp.experts.base_layer.lora_A.weight" in error.value.report.missing
    assert "model.layers.0.mlp.experts.1.w1.lora_B.weight" in error.value.report.unexpected
    assert not any("layers.1" in key for key in error.value.report.unexpected)


def test_a_crafted_file_of_experts_stays_small() -> None:
    tensors = {f"experts.{10**12}.w2.lora_{f}.weight": torch.zeros(2, 2) for f in "AB"}
    assert fused_tensors(tensors, FORMER["mixtral"]).keys() == tensors.keys()
    odd = {f"experts.0.w2.lora_{f}.weight": torch.zeros(()) for f in "AB"}
    assert fused_tensors(odd, FORMER["mixtral"]).keys() == odd.keys()
