"""What a model says of itself: names, ties, devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay import lookup
from inlay.replicate import clone_module


def tied(llama: Any) -> Any:
    llama.lm_head.weight = llama.model.embed_tokens.weight
    return llama


def test_names_of_modules_and_embeddings(llama: Any, mlp: nn.Module) -> None:
    assert lookup.get_input_embeddings_name(llama) == "model.embed_tokens"
    assert lookup.get_input_embeddings_name(mlp) is None
    assert lookup.get_input_embeddings_name(mlp, "other") == "other"
    assert lookup.find_parameter_name_by_module(llama, llama.lm_head) == "lm_head"
    assert lookup.find_parameter_name_by_module(llama, nn.Linear(2, 2)) == ""
    assert lookup.get_no_split_modules(llama) == {"LlamaDecoderLayer"}
    assert lookup.get_no_split_modules(mlp) == set()


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"], ["lm_head"]])
def test_ties_are_those_of_the_base_model(llama: Any, mlp: nn.Module, targets: list[str]) -> None:
    assert lookup.get_module_names_tied_with_embedding(llama) == []
    handle = inlay.get_peft_model(tied(llama), inlay.LoraConfig(target_modules=targets))
    assert lookup.get_module_names_tied_with_embedding(handle) == ["lm_head"]
    assert lookup.get_module_names_tied_with_embedding(llama) == ["lm_head"]
    assert lookup.get_module_names_tied_with_embedding(mlp) == []


@pytest.mark.parametrize(
    ("placed", "runs"),
    [
        ({"embed": 0, "layers.0": "cpu", "layers.1": 1, "head": 0}, {0: 0, 1: 1}),
        ({"h.0.mlp": "disk", "h.1": 2}, {0: 2, 1: 2}),
        ({"layers.0": "cpu", "layers.1": "disk"}, {0: "cpu", 1: "cpu"}),
        ({"a": 0, "b": 1}, None),
        ({"": "cpu"}, None),
        (None, None),
    ],
)
def test_devices_of_layers(mlp: Any, placed: dict[str, Any] | None, runs: dict[int, Any] | None) -> None:
    assert lookup.get_device_map(mlp) == {"": torch.device("cpu")}
    if placed is not None:
        mlp.hf_device_map = placed
        assert lookup.get_device_map(mlp) == placed
    assert lookup.get_layer_device_map(mlp) == runs


def test_a_cache_moves_to_where_its_layers_run(mlp: Any) -> None:
    layers = [SimpleNamespace(keys=torch.ones(1), values=torch.ones(1)) for _ in range(2)]
    lookup.map_cache_to_layer_device_map(mlp, SimpleNamespace(layers=layers))
    assert layers[1].keys.device.type == "cpu"
    mlp.hf_device_map = {"layers.0": "cpu", "layers.1": "meta"}
    lookup.map_cache_to_layer_device_map(mlp, SimpleNamespace(layers=layers))
    assert [t.device.type for layer in layers for t in (layer.keys, layer.values)] == ["meta"] * 4


def test_how_transformers_packed_a_model(mlp: Any) -> None:
    assert lookup.get_quantization_config(mlp, "gptq") is None
    found = SimpleNamespace(quant_method="gptq")
    mlp.config = SimpleNamespace(quantization_config=found)
    assert lookup.get_quantization_config(mlp, "gptq") is found
    assert lookup.get_quantization_config(mlp, "awq") is None


def test_copies_of_modules() -> None:
    layer = nn.Linear(3, 2)
    shared, own = clone_module(layer, share_weights=True), clone_module(layer)
    assert shared is not layer
    assert shared.weight is layer.weight
    assert own.weight is not layer.weight
    assert torch.equal(own.get_parameter("weight"), layer.weight)
