"""Small names of PEFT's modules that scripts and tests use: each was run beside PEFT's."""

from __future__ import annotations

import inspect
import subprocess
import sys

import peft
import pytest
import torch
from peft import import_utils
from peft.auto import check_import_allowlist, get_default_import_allowlist
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lokr.layer import factorization, make_kron
from peft.tuners.tuners_utils import (
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    clone_module,
    find_parameter_name_by_module,
    get_device_map,
    onload_layer,
    replicate_layers,
)
from peft.utils import (
    _get_batch_size,
    _is_valid_match,
    _set_adapter,
    _set_trainable,
    infer_device,
    resolve_quantization_backend,
    shift_tokens_right,
    transpose,
)
from peft.utils.integrations import (
    check_deepspeed_zero3_enabled,
    dequantize_bnb_weight,
    dequantize_module_weight,
    get_bnb_param_type,
    init_empty_weights,
)
from peft.utils.loftq_utils import loftq_init
from peft.utils.other import (
    TrainableTokensWrapper,
    _freeze_adapter,
    _get_input_embeddings_name,
    cast_mixed_precision_params,
    id_tensor_storage,
)
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend, QuantizationBackend
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


def test_packed_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    W = torch.randn(64, 64)
    plain = nn.Linear(64, 64, bias=False)
    four = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
    eight = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    for layer in (plain, four, eight):
        layer.load_state_dict({"weight": W})
        layer.to("cpu")
    assert [get_bnb_param_type(layer.weight) for layer in (plain, four, eight)] == [False, "4bit", "8bit"]
    backends = [resolve_quantization_backend(layer) for layer in (plain, four, eight)]
    assert backends[0] is None
    assert isinstance(backends[1], Bnb4bitBackend)
    assert isinstance(backends[2], Bnb8bitBackend)
    assert all(isinstance(backend, QuantizationBackend) for backend in backends[1:])
    assert dequantize_module_weight(plain) is plain.weight
    for layer, state in ((four, None), (eight, eight.state)):
        dense = dequantize_module_weight(layer)
        assert (dense.shape, dense.dtype) == ((64, 64), torch.float32)
        assert torch.equal(dequantize_bnb_weight(layer.weight, state), dense)
        assert float((dense - W).norm() / W.norm()) < 0.15
    with pytest.raises(ValueError, match="No `state` was passed"):
        dequantize_bnb_weight(plain.weight)


def test_modules_that_are_trained_whole() -> None:
    model = Net()
    _set_trainable(model, "a", ["second"], inference_mode=False)
    _set_trainable(model, "b", ["second"], inference_mode=False, activate_adapter=False)
    assert model.second.active_adapters == ["a"]
    _set_adapter(model, "b")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "second" in name}
    assert trained == {"second.modules_to_save.b.weight", "second.modules_to_save.b.bias"}
    assert model.first.weight.requires_grad
    with pytest.raises(ValueError, match="not found in the base model"):
        _set_trainable(model, "a", ["nothing"], inference_mode=False, strict_module_check=True)
    table = nn.Sequential(nn.Embedding(4, 2))
    _set_trainable(table, "a", ["0"], inference_mode=False, wrapper_cls=TrainableTokensWrapper, token_indices=[1])
    assert isinstance(table[0], TrainableTokensWrapper)


def test_names_and_numbers() -> None:
    pairs = [("a.b.c", "c"), ("a.b.c", "b.c"), ("abc", "c"), ("a", "a"), ("a.b", "a"), ("c", "a.c")]
    assert [_is_valid_match(*pair) for pair in pairs] == [True, True, False, True, False, False]
    assert _get_batch_size(torch.ones(2, 3), None) == 2
    assert _get_batch_size(None, torch.ones(5, 3, 4)) == 5
    with pytest.raises(ValueError, match="Neither input_ids nor inputs_embeds"):
        _get_batch_size(None, None)
    assert factorization(dimension=12, factor=-1) == (3, 4)
    assert list(inspect.signature(factorization).parameters) == ["dimension", "factor"]
    w1, w2 = torch.randn(2, 2), torch.randn(3, 4, 3, 3)
    assert torch.equal(make_kron(w1, w2, 2.0), torch.kron(w1[:, :, None, None], w2) * 2)
    assert torch.equal(make_kron(w1, w1), torch.kron(w1, w1))
    Q, A, B = loftq_init(torch.randn(64, 32), num_bits=4, reduced_rank=4, num_iter=2)
    assert (Q.shape, A.shape, B.shape) == ((64, 32), (4, 32), (64, 4))


def test_models_and_layers() -> None:
    model = adapted()
    layer = model.base_model.model.first
    assert check_adapters_to_merge(layer) == ["default"]
    with onload_layer(layer):
        assert layer.weight.device.type == "cpu"
    assert find_parameter_name_by_module(model, layer) == "base_model.model.first"
    assert get_device_map(model) == {"": torch.device("cpu")}
    assert _get_input_embeddings_name(model) is None
    assert check_deepspeed_zero3_enabled() is False
    assert clone_module(layer.base_layer, share_weights=True).weight is layer.base_layer.weight
    stack = nn.Sequential()
    stack.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    replicate_layers(stack, [(0, 2), (1, 3)])
    assert len(stack.layers) == 4
    with init_empty_weights():
        assert nn.Linear(2, 2).weight.is_meta


def test_what_a_file_may_name() -> None:
    assert "transformers" in get_default_import_allowlist()
    allowed = get_default_import_allowlist()
    for name, may in (("transformers.models", True), ("os", False), ("transformersx", False)):
        assert check_import_allowlist(allowed, name) is may


def test_one_layer_alone() -> None:
    layer = adapted().base_model.model.first
    assert (layer.fan_in_fan_out, layer.quantization_backend) == (False, None)
    assert torch.equal(layer.get_base_weight(), layer.base_layer.weight)
    layer.update_layer("new", 4, 16, config=peft.LoraConfig())
    assert (layer.r, layer.scaling["new"]) == ({"default": 8, "new": 4}, 4.0)
    assert layer.active_adapters == ["default"]
    with pytest.raises(ValueError, match="r must be"):
        layer.update_layer("zero", 0, 16, config=peft.LoraConfig())
    nn.init.ones_(layer.lora_B["new"].weight)
    layer.reset_lora_parameters("new", init_lora_weights=True)
    assert layer.lora_B["new"].weight.sum() == 0
