"""Small names of PEFT's modules that scripts and tests use: each was run beside PEFT's."""

from __future__ import annotations

import subprocess
import sys

import peft
import pytest
import torch
from peft import import_utils
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _find_minimal_target_modules, _maybe_include_all_linear_layers
from peft.utils import infer_device, shift_tokens_right, transpose
from peft.utils.other import _freeze_adapter, cast_mixed_precision_params, id_tensor_storage
from peft.utils.save_and_load import torch_load
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)


def adapted() -> nn.Module:
    return peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["first"], modules_to_save=["second"]))


def test_what_is_installed() -> None:
    assert import_utils.is_diffusers_available()
    assert import_utils.is_bnb_available()
    assert import_utils.is_bnb_4bit_available()
    assert not import_utils.is_aqlm_available()
    assert not import_utils.is_torchao_available()
    assert not import_utils.is_torchao_ge_v0_18_0()
    assert import_utils.is_transformers_ge_v5 is True
    assert import_utils.is_transformers_le_4_53 is False


def test_asking_imports_nothing() -> None:
    code = "from peft.import_utils import *; is_bnb_available(); import sys; print('bitsandbytes' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_devices() -> None:
    assert infer_device() == "cpu"
    assert not import_utils.is_xpu_available(check_device=True)


def test_tensors() -> None:
    W = torch.randn(3, 4)
    assert transpose(W, False) is W
    assert torch.equal(transpose(W, True), W.T)
    assert isinstance(transpose(nn.Parameter(W), True), nn.Parameter)
    assert id_tensor_storage(W[1:]) == id_tensor_storage(W) == (W.device, W.data_ptr(), 48)
    assert shift_tokens_right(torch.tensor([[5, 6, -100]]), 0, 1).tolist() == [[1, 5, 6]]


def test_loading_takes_tensors_only(tmp_path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    torch.save(Net(), tmp_path / "b.pt")
    assert torch_load(tmp_path / "a.pt")["a"].sum() == 2
    with pytest.raises(Exception, match=r"[Ww]eights"):
        torch_load(tmp_path / "b.pt")


def test_freezing_and_casting() -> None:
    model = adapted()
    cast_mixed_precision_params(model, torch.bfloat16)
    found = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert found == {(True, torch.float32), (False, torch.bfloat16)}
    _freeze_adapter(model, "default")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("targets", [["first"], None, "fi.*"])
def test_targets_that_are_named_stay(targets) -> None:
    config = peft.LoraConfig(target_modules=targets)
    assert _maybe_include_all_linear_layers(config, Net()) is config
    assert config.target_modules == (set(targets) if isinstance(targets, list) else targets)


def test_all_linear_is_spelt_out() -> None:
    config = _maybe_include_all_linear_layers(peft.LoraConfig(target_modules="ALL-linear"), Net())
    assert config.target_modules == {"first", "second"}


@pytest.mark.parametrize(
    ("names", "others", "found"),
    [
        (["a.b.c", "x.b.c"], ["a.b.d"], {"c"}),
        (["a.q", "b.q", "c.k"], {"d.k", "a.z"}, {"q", "c.k"}),
        ({"1.foo", "2.foo"}, ["3.foo"], {"1.foo", "2.foo"}),
        (["foo.1.bar"], ["foo.2.bar"], {"1.bar"}),
        (["time_emb_proj", "0.proj"], ["time_proj"], {"time_emb_proj", "proj"}),
    ],
)
def test_the_shortest_suffixes(names, others, found) -> None:
    assert _find_minimal_target_modules(names, others) == found


@pytest.mark.parametrize("names", [[], "a", ["a", ""], ["a", "b"]])
def test_suffixes_of_what_cannot_be(names) -> None:
    with pytest.raises(ValueError, match="target_modules"):
        _find_minimal_target_modules(names, ["b"])


def test_what_holds_adapters_by_name() -> None:
    model = adapted()
    held = [m for m in model.modules() if isinstance(m, nn.ModuleDict | nn.ParameterDict | BufferDict)]
    assert len(held) == 3
    assert all("default" in m for m in held)
