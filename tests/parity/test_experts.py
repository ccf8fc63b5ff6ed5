"""Adapters of fused experts beside PEFT's: what configs become, what the loader is told, and files both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import transformers_weight_conversion as theirs
from test_experts import MODELS, build, config, factors, folder
from torch import nn
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

import inlay
from inlay.experts import FORMER
from inlay.integrations import conversion as ours

# PEFT warns that the patterns it has just written match nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern")
FIELDS = ("target_parameters", "rank_pattern", "alpha_pattern")
IDS = torch.arange(10).reshape(2, 5)
TARGETS: list[tuple[str, Any]] = [
    ("mixtral", ["q_proj", "w1", "w2", "w3"]),
    ("mixtral", ["w2"]),
    ("mixtral", ["gate", "v_proj"]),
    ("mixtral", ["block_sparse_moe.experts.0.w2"]),
    ("mixtral", r".*\.(w1|w2|w3)$"),
    ("mixtral", "all-linear"),
    ("qwen3_moe", ["gate_proj", "up_proj", "down_proj", "o_proj"]),
    ("qwen3_moe", ["gate"]),
]


def test_the_same_models_are_converted() -> None:
    known = {name: line for name, line in _MODEL_TO_CONVERSION_PATTERN.items() if line in ("mixtral", "qwen2_moe")}
    lines = {"mixtral": FORMER["mixtral"], "qwen2_moe": FORMER["qwen3_moe"]}
    types = {name: lines[line] for name, line in known.items() if name == name.lower()}  # the rest are classes
    assert {**types, "mixtral": FORMER["mixtral"]} == FORMER


@pytest.mark.parametrize(("model", "targets"), TARGETS, ids=[f"{m}-{t}" for m, t in TARGETS])
def test_a_config_becomes_the_same(model: str, targets: Any) -> None:
    found = {}
    for library in (peft, inlay):
        made = library.LoraConfig(target_modules=copy.copy(targets), r=4, lora_alpha=6)
        handle = library.get_peft_model(build(model), made)
        values = {name: getattr(made, name) for name in FIELDS}
        shapes = {key: p.shape for key, p in handle.named_parameters() if "lora_" in key}
        found[library.__name__] = {**values, "target_parameters": set(values["target_parameters"])}, shapes
    assert found["peft"] == found["inlay"]


def described(mapping: list[Any]) -> list[Any]:
    out = []
    for entry in mapping:
        steps = [(type(op).__name__, vars(op)) for op in getattr(entry, "operations", [])]
        out.append((type(entry).__name__, entry.source_patterns, entry.target_patterns, steps))
    return out


@pytest.mark.parametrize("model", MODELS)
def test_the_loader_is_told_the_same(model: str) -> None:
    mapping = get_model_conversion_mapping(build(model))
    assert ours.build_peft_weight_mapping(None, "a") == theirs.build_peft_weight_mapping(None, "a") == []
    for entry in mapping:
        entry.distributed_operation = "told"
    for made in (config(model, "gud"), inlay.LoHaConfig(), inlay.IA3Config(), inlay.AdaLoraConfig(total_step=9)):
        arguments = mapping, "a", made
        mine, other = ours.build_peft_weight_mapping(*arguments), theirs.build_peft_weight_mapping(*arguments)
        extra = [entry for entry in mine if "lora_magnitude_vector" in entry.source_patterns[0]]
        assert described([entry for entry in mine if entry not in extra]) == described(other)
        converters = [entry for entry in mine if isinstance(entry, WeightConverter)]
        assert {entry.distributed_operation for entry in converters} == {"told"}


@pytest.mark.parametrize("targets", ["gud", "d"])
@pytest.mark.parametrize("model", MODELS)
def test_single_experts_are_put_together_as_there(model: str, targets: str) -> None:
    tensors, made = factors(model, targets), config(model, targets)
    their_config = peft.LoraConfig(target_modules=set(made.target_modules or ()), r=2)
    other = theirs.convert_peft_adapter_state_dict_for_transformers(build(model), their_config, dict(tensors))
    mine = ours.convert_peft_adapter_state_dict_for_transformers(build(model), made, tensors)
    assert mine.keys() == other.keys()
    assert all(torch.equal(t, other[key]) for key, t in mine.items())


@pytest.mark.parametrize("model", MODELS)
def test_old_files_load_alike_and_new_ones_go_both_ways(model: str, tmp_path: Path) -> None:
    old = folder(tmp_path, factors(model, "gud"), config(model, "gud"))
    libraries: list[Any] = [peft, inlay]
    wanted: torch.Tensor | None = None
    for writer in libraries:
        handle: nn.Module = writer.PeftModel.from_pretrained(build(model), old)
        logits = handle(IDS).logits
        wanted = logits if wanted is None else wanted
        torch.testing.assert_close(logits, wanted)
        new = tmp_path / writer.__name__
        handle.save_pretrained(new)
        for reader in libraries:
            again = reader.PeftModel.from_pretrained(build(model), new)
            torch.testing.assert_close(again(IDS).logits, wanted)
        mixin = build(model)
        report = mixin.load_adapter(str(new))
        assert not report.missing_keys
        assert not report.unexpected_keys
        torch.testing.assert_close(mixin(IDS).logits, wanted)
