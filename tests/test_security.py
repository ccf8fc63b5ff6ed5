"""A directory from someone else, through the public functions; what one file can hold is in formats/test_files.py."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import bits, disturb, same_state
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.errors import FileError, PeftError, PeftWarning


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    model = inlay.get_peft_model(tiny("mlp"), inlay.LoraConfig(r=4, target_modules=["lin0", "lin1"]))
    disturb(model)
    model.save_pretrained(str(tmp_path / "saved"))
    return tmp_path / "saved"


def with_values(directory: Path, **values: Any) -> Path:
    """The adapter with other values in its config, as if another program had written it."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    weights = directory / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    "values",
    [{"r": 2_000_000}, {"rank_pattern": {"lin0": 2_000_000}}, {"r": 2**62}, {"r": 10**30}],
    ids=str,
)
def test_a_huge_rank_costs_nothing(saved: Path, mlp: nn.Module, values: dict[str, Any]) -> None:
    with_values(saved, **values)
    before = bits(mlp)
    tracemalloc.start()
    resident = _resident()
    started = time.perf_counter()
    try:
        with pytest.raises(PeftError):
            inlay.PeftModel.from_pretrained(mlp, saved)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 2
    assert peak < 8e6
    assert _resident() - resident < 64e6
    same_state(bits(mlp), before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


BOMBS = [
    r"(a+)+$",
    r"((a|a)*)*b",
    r"(.*)*(.*)*(.*)*x",
    r"^(\w+\s?)*$",
    "a" * 100_000,
    "(" * 5_000 + ")" * 5_000,
    r"(?:a{1,1000}){1,1000}",
    r".*" * 60 + "x",
]


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_patterns_from_a_file_do_not_hang(saved: Path, bomb: str, field: str) -> None:
    values: dict[str, Any] = {field: bomb}
    if field.endswith("_pattern") and field != "layers_pattern":
        values = {field: {bomb: 3}}
    if field == "layers_pattern":
        values = {field: bomb, "layers_to_transform": [0]}
    with_values(saved, **values)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 20)
            for i in range(4):
                setattr(self, "a" * 28 + str(i), nn.Linear(2, 2))

    started = time.perf_counter()
    with contextlib.suppress(PeftError, PeftWarning):
        inlay.PeftModel.from_pretrained(Named(), saved, strict=False)
    assert time.perf_counter() - started < 1


def test_no_module_that_a_file_names_is_imported(saved: Path, mlp: nn.Module, tmp_path: Path) -> None:
    trap = tmp_path / "trap_of_the_test.py"
    trap.write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        mapping = {"base_model_class": "Model", "parent_library": "trap_of_the_test"}
        base = {"base_model_name_or_path": str(tmp_path), "task_type": None}
        with_values(saved, auto_mapping=mapping, megatron_core="trap_of_the_test", **base)
        model = inlay.PeftModel.from_pretrained(mlp, saved)
        assert model.peft_config["default"].auto_mapping == mapping
        inlay.PeftConfig.from_pretrained(saved)
        with pytest.raises(PeftError, match="trap_of_the_test"):
            inlay.AutoPeftModel.from_pretrained(saved)
    finally:
        sys.path.remove(str(tmp_path))
    assert "trap_of_the_test" not in sys.modules


def test_unknown_fields_are_dropped_with_one_warning(saved: Path, mlp: nn.Module) -> None:
    with_values(saved, from_the_future=1, use_warp={"speed": 9})
    with pytest.warns(PeftWarning, match=r"from_the_future.*use_warp") as warned:
        model = inlay.PeftModel.from_pretrained(mlp, saved)
    assert len(warned) == 1
    assert not hasattr(model.peft_config["default"], "from_the_future")


@pytest.mark.parametrize(
    "values",
    [
        {"r": True},
        {"r": -3},
        {"r": 4.5},
        {"r": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_dropout": 2.0},
        {"lora_dropout": "0.1"},
        {"target_modules": 3},
        {"target_modules": {"a": 1}},
        {"target_modules": [1, 2]},
        {"target_modules": []},
        {"modules_to_save": "lin0\0"},
        {"modules_to_save": ["lin0"]},
        {"rank_pattern": ["lin0"]},
        {"rank_pattern": {"lin0": 0}},
        {"rank_pattern": {"lin0": "8"}},
        {"layers_to_transform": "all"},
        {"layer_replication": [[0, 10**9]]},
        {"layer_replication": [["a", "b"]]},
        {"layer_replication": [[0]]},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": {"lin0": [0]}},
        {"target_parameters": ["lin0.weight"]},
        {"task_type": "__class__"},
        {"task_type": ["CAUSAL_LM"]},
        {"peft_type": ["LORA"]},
        {"peft_type": None},
        {"bias": "everything"},
        {"init_lora_weights": 7},
        {"init_lora_weights": "pizza"},
        {"init_lora_weights": "pissa_niter_1000000"},
        {"init_lora_weights": "pissa", "lora_alpha": 0},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 5}},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 1000000}},
        {"init_lora_weights": "loftq", "loftq_config": {"bits": 4}},
        {"base_model_name_or_path": 3},
    ],
    ids=str,
)
def test_values_of_a_config_are_checked(saved: Path, mlp: nn.Module, values: dict[str, Any]) -> None:
    with_values(saved, **values)
    before, modules = bits(mlp), [(n, type(m)) for n, m in mlp.named_modules()]
    with pytest.raises(PeftError):
        inlay.PeftModel.from_pretrained(mlp, saved)
    same_state(bits(mlp), before)
    assert [(n, type(m)) for n, m in mlp.named_modules()] == modules
    assert all(p.requires_grad for p in mlp.parameters())


def test_a_pickle_runs_nothing(saved: Path, mlp: nn.Module, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "run"),)

    (saved / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.lin0.lora_A.weight": Payload()}, saved / "adapter_model.bin")
    for load in (
        lambda: inlay.PeftModel.from_pretrained(mlp, saved),
        lambda: inlay.load_peft_weights(saved),
    ):
        with pytest.raises(FileError):
            load()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_fifo_does_not_hang(saved: Path, mlp: nn.Module, name: str) -> None:
    (saved / name).unlink()
    os.mkfifo(saved / name)
    started = time.perf_counter()
    with pytest.raises(FileError):
        inlay.PeftModel.from_pretrained(mlp, saved)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("subfolder", ["../../etc", "/etc", ".."])
def test_a_subfolder_does_not_lead_out(saved: Path, mlp: nn.Module, subfolder: str) -> None:
    with pytest.raises(PeftError):
        inlay.PeftModel.from_pretrained(mlp, saved, subfolder=subfolder)


def test_keys_of_a_file_do_not_become_attributes(saved: Path, mlp: nn.Module) -> None:
    """A key that names something of the model which is no part of the adapter is refused, and written nowhere."""
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in ("head.weight", "lin0.base_layer.weight", "lin0.__class__", "lin0.lora_A.__dict__.weight"):
        save_file({**tensors, f"base_model.model.{key}": torch.zeros(2, 20)}, path, metadata={"format": "pt"})
        before = bits(mlp)
        with pytest.raises(PeftError):
            inlay.PeftModel.from_pretrained(mlp, saved)
        same_state(bits(mlp), before)


def test_a_directory_named_as_a_hub_id_is_read_offline(tmp_path: Path) -> None:
    """Nothing that does not exist here is looked for anywhere else when the hub is off."""
    started = time.perf_counter()
    with pytest.raises(PeftError):
        inlay.PeftConfig.from_pretrained("someone/no-such-adapter-of-the-tests")
    assert time.perf_counter() - started < 10
