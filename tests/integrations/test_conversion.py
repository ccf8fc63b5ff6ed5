"""Keys and factors of adapters on models that transformers has rebuilt since they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import inlay
from inlay.errors import LoadError, PlanError
from inlay.integrations.conversion import FlattenDims, PeftConcatenate, PermuteDims, present_names

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}


def llava() -> Any:
    vision = {key: value for key, value in VISION.items() if key not in ("vocab_size", "num_key_value_heads")}
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**vision),
            image_token_index=3,
        )
    ).eval()


def folder(tmp_path: Path, path: str, **more: torch.Tensor) -> Path:
    """An adapter of one layer, by the name ``path``."""
    factors = {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2), **more}
    tensors = {f"base_model.model.{key}": t for key, t in factors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    inlay.LoraConfig(r=2, target_modules=".*language_model.*q_proj").save_pretrained(tmp_path)
    return tmp_path


FORMER, NOW = "language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("path", [FORMER, NOW])
def test_an_adapter_of_before_a_model_was_rebuilt_loads(path: str, tmp_path: Path) -> None:
    handle = inlay.PeftModel.from_pretrained(llava(), folder(tmp_path, path), strict=True)
    layer = handle.get_base_model().get_submodule(NOW)
    assert layer.lora_A["default"].weight.eq(1).all()
    assert layer.lora_B["default"].weight.eq(1).all()
    again = llava()
    assert not again.load_adapter(str(tmp_path)).missing_keys


def test_what_no_renaming_explains_is_reported(tmp_path: Path) -> None:
    given = folder(tmp_path, FORMER, **{"elsewhere.lora_A.weight": torch.ones(2, 16)})
    with pytest.raises(LoadError) as error:
        inlay.PeftModel.from_pretrained(llava(), given, strict=True)
    assert error.value.report.unexpected == ["elsewhere.lora_A.weight"]
    assert not error.value.report.missing


def test_names_of_other_models_stay() -> None:
    assert present_names(nn.Linear(2, 2), [FORMER]) == {FORMER: FORMER}
    assert present_names(llava(), [FORMER]) == {FORMER: NOW}


def test_operations_on_factors() -> None:
    t = torch.arange(24.0).reshape(2, 3, 4)
    assert FlattenDims((0, 1)).convert({"a": t})["a"].shape == (6, 4)
    assert FlattenDims(0).convert({"a": t})["a"].shape == (24,)
    assert PermuteDims((2, 0, 1)).convert({"a": t})["a"].shape == (4, 2, 3)
    gate, up = torch.randn(3, 5, 2), torch.randn(3, 4, 2)
    fused = PeftConcatenate(1).convert({"up": up, "gate": gate}, ["gate", "up"], ["fused"], full_layer_name="name")
    B = fused["name"].reshape(9, 4, 3)  # rows, rank, expert
    for expert in range(3):
        assert torch.equal(B[..., expert], torch.block_diag(gate[expert], up[expert]))
    with pytest.raises(PlanError, match="two or more"):
        PeftConcatenate(1).convert({"gate": gate}, ["gate", "up"], ["fused"], full_layer_name="name")
