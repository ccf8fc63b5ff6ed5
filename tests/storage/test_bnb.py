"""Packed linear layers beyond the laws: what is written where, what is told, what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import Net, bits, close, disturb, pack4, pack8, same_bits, same_state
from safetensors.torch import save_file
from torch import Tensor, nn

import inlay
from inlay.errors import BaseGoneError, ConfigError, PeftWarning, UnsupportedLayerError
from inlay.helpers import dequantize_module_weight
from inlay.storage import packing_of, storage_of
from inlay.storage.bnb import dequantize_bnb_weight, get_bnb_param_type
from inlay.walk import wrappers

pytestmark = [pytest.mark.bnb, pytest.mark.filterwarnings("ignore:Merged into")]

Pack = Callable[[nn.Module], nn.Module]

PACKINGS: dict[str, Pack] = {
    "nf4": pack4,
    "fp4": lambda layer: pack4(layer, quant_type="fp4", compress_statistics=False),
    "stored as bf16": lambda layer: pack4(layer, quant_storage=torch.bfloat16),
    "computed in bf16": lambda layer: pack4(layer, compute_dtype=torch.bfloat16),
    "int8": pack8,
}

each = pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS.keys())
x_BI = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))


def base(pack: Pack) -> nn.Module:
    torch.manual_seed(3)
    return Net(pack(nn.Linear(64, 32))).eval()


def adapted(pack: Pack, **fields: Any) -> inlay.PeftModel:
    model = inlay.get_peft_model(base(pack), inlay.LoraConfig(r=4, target_modules=["m"], **fields))
    disturb(model)
    return model


def raw(model: nn.Module) -> dict[str, Tensor]:
    """The state's bytes: packed ones may read as numbers that are not equal to themselves."""
    return {k: t.reshape(-1).view(torch.uint8) for k, t in bits(model).items()}


def wrapper(model: inlay.PeftModel) -> Any:
    return model.base_model.model.m


@each
def test_reading_gives_what_the_layer_computes_with(pack: Pack) -> None:
    layer = pack(nn.Linear(64, 32)).train()  # in eval 8-bit layers round what they read
    with storage_of(layer).reading(layer) as W:
        assert W.shape == (32, 64)
        close(layer(x_BI), nn.functional.linear(x_BI.to(W.dtype), W, layer.bias.to(W.dtype)).float(), 1e-5)


@each
def test_merging_keeps_the_pointer_and_tells_the_rounding(pack: Pack) -> None:
    model = adapted(pack)
    layer, before = wrapper(model), raw(model)
    pointer, wanted = layer.weight.data_ptr(), layer.effective(("default",))[0].float()
    with pytest.warns(PeftWarning, match=rf"Merged into 1 packed weights \({layer.storage.name}\).*\(m\)"):
        model.merge_adapter()
    assert layer.weight.data_ptr() == pointer
    with layer.storage.reading(layer.base_layer) as W:
        off = (W.float() - wanted).abs()
    wanted, off = wanted.detach(), off.detach()
    assert layer.rounding.mean == pytest.approx(float(off.mean() / wanted.abs().mean()))
    assert layer.rounding.largest == pytest.approx(float(off.max() / wanted.abs().max()))
    assert 0 < layer.rounding.mean < 0.15
    model.unmerge_adapter()
    assert layer.rounding is None
    assert layer.weight.data_ptr() == pointer
    same_state(raw(model), before)


@each
def test_disabled_while_merged_is_the_pristine_layer_bit_by_bit(pack: Pack) -> None:
    model = adapted(pack)
    with model.disable_adapter():
        expected = model(x_BI)
    model.merge_adapter()
    merged = model(x_BI)
    for _ in range(2):
        with model.disable_adapter():
            same_bits(model(x_BI), expected)
        same_bits(model(x_BI), merged)


@each
def test_without_the_base_there_is_no_way_back(pack: Pack) -> None:
    model = adapted(pack)
    model.merge_adapter(keep_base=False)
    merged = model(x_BI)
    with pytest.raises(BaseGoneError, match="keep_base=False"):
        model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(BaseGoneError):
        model(x_BI)
    same_bits(model(x_BI), merged)
    same_bits(model.merge_and_unload()(x_BI), merged)


@each
def test_threads(pack: Pack) -> None:
    """The first forward of an 8-bit layer moves its weight; here it has been moved before two threads can meet."""
    for _ in range(5):
        model = adapted(pack)
        expected = copy.deepcopy(model)(x_BI)
        with copy.deepcopy(model).disable_adapter():
            plain = base(pack)(x_BI)
        found: dict[int, Tensor] = {}
        start = threading.Barrier(4)

        def run(i: int, model: Any = model, found: Any = found, start: Any = start) -> None:
            start.wait()
            if i % 2:
                found[i] = model(x_BI)
            else:
                with model.disable_adapter():
                    found[i] = model(x_BI)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, out in found.items():
            same_bits(out, expected if i % 2 else plain)
        assert len(found) == 4


@each
def test_dora_remembers_its_norm_and_sees_a_merge(pack: Pack) -> None:
    model = adapted(pack, use_dora=True)
    layer = wrapper(model)
    with torch.no_grad():
        expected = model(x_BI)
        known = len(layer._memo._known)
        for _ in range(3):
            same_bits(model(x_BI), expected)
        assert len(layer._memo._known) == known  # and not one more for each call
        with layer.storage.reading(layer.base_layer) as W:
            layer.storage.write(layer.base_layer, W * 0.5)
        assert float((model(x_BI) - expected).abs().max()) > 1e-2
        other = copy.deepcopy(model)
        close(model(x_BI), other(x_BI))


@each
def test_two_places_with_one_weight(pack: Pack) -> None:
    """Replicated layers share a packed weight: merging gives each its own, unmerging the shared one back."""
    first = pack(nn.Linear(64, 64))
    second = copy.deepcopy(first)
    second._parameters["weight"] = first._parameters["weight"]
    model = inlay.get_peft_model(nn.Sequential(first, second).eval(), inlay.LoraConfig(r=2, target_modules=["0"]))
    disturb(model)
    with torch.no_grad():
        expected, other = model(x_BI), second(x_BI)
        model.merge_adapter()
        same_bits(second(x_BI), other)
        tolerance = 0.2 if pack is not pack8 else 0.05
        assert float((model(x_BI) - expected).norm() / expected.norm()) < tolerance
        model.unmerge_adapter()
        same_bits(model(x_BI), expected)
    assert first.weight is second.weight


@each
def test_counts_are_of_the_weights_that_are_meant(pack: Pack) -> None:
    model = adapted(pack)
    assert model.get_nb_trainable_parameters() == (4 * 96, 32 * 64 + 32 + 4 * 96)
    status = model.get_model_status()
    assert status.total_params == 32 * 64 + 32 + 4 * 96
    assert status.quantization_backend == wrapper(model).storage.name


@each
def test_explain(pack: Pack) -> None:
    model = base(pack)
    before = raw(model)
    told = inlay.explain(model, inlay.LoraConfig(r=4, target_modules=["m"]), batch=4)
    same_state(raw(model), before)
    kept = {k: t for k, t in before.items() if not k.endswith(("weight_format", "nf4", "fp4"))}
    assert told.totals.parameters == 32 * 64 + 32 + 4 * 96
    assert told.totals.frozen_bytes == sum(t.nbytes for t in kept.values())
    assert told.totals.frozen_bytes < 32 * 64 * 2
    assert told.activations_method == "traced"
    assert told.totals.added_activation_bytes > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each
def test_half_precision_models(pack: Pack, dtype: torch.dtype) -> None:
    if pack is PACKINGS["stored as bf16"] and dtype == torch.float16:
        return  # bitsandbytes itself casts the packed bytes then, as if they were numbers
    model = adapted(pack).to(dtype)
    expected = model(x_BI.to(dtype))
    assert expected.dtype == dtype
    model.merge_adapter()
    off, expected = (model(x_BI.to(dtype)) - expected).float().detach(), expected.detach()
    assert float(off.norm() / expected.float().norm()) < 0.2
    with model.disable_adapter():
        close(model(x_BI.to(dtype)).float(), base(pack)(x_BI).float(), 0.1)


def test_packed_for_the_processor() -> None:
    """What a forward on a processor with AVX512-BF16 leaves of a 4-bit layer; the conversion runs on any."""
    from bitsandbytes import functional

    layer = pack4(nn.Linear(64, 32))
    with storage_of(layer).reading(layer) as W:
        expected = W
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert layer.weight.quant_state.packing_format_for_cpu
    packed = layer.weight.data.clone()
    with storage_of(layer).reading(layer) as W:
        close(W.float(), expected, 1e-2)
    same_bits(layer.weight.data, packed)
    model = inlay.get_peft_model(Net(layer), inlay.LoraConfig(r=2, target_modules=["m"], init_lora_weights=False))
    model.merge_adapter()
    model.unmerge_adapter()
    with storage_of(layer).reading(layer) as W:
        close(W.float(), expected, 1e-2)


def test_packing_may_come_after_adapting() -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for layer in (Linear4bit(64, 32, quant_type="nf4"), Linear8bitLt(64, 32, has_fp16_weights=False)):
        model = inlay.get_peft_model(Net(layer).eval(), inlay.LoraConfig(r=2, target_modules=["m"]))
        disturb(model)
        assert wrapper(model).storage.name == "plain"
        model.to("cpu")  # which is when bitsandbytes packs
        assert wrapper(model).storage.name in ("bnb4", "bnb8")
        layer.support_avx512bf16_for_cpu = False
        expected = model(x_BI)
        before = raw(model)
        model.merge_adapter()
        assert float((model(x_BI) - expected).detach().norm() / expected.detach().norm()) < 0.2
        model.unmerge_adapter()
        same_state(raw(model), before)


def test_what_cannot_be_is_refused_by_name() -> None:
    from bitsandbytes.nn import Linear8bitLt

    lora = inlay.LoraConfig(target_modules=["m"])
    with pytest.raises(UnsupportedLayerError, match="has_fp16_weights=False"):
        inlay.get_peft_model(Net(Linear8bitLt(64, 32)), lora)
    with pytest.raises(UnsupportedLayerError, match=r"m\.weight.*packed \(bnb4\)"):
        inlay.get_peft_model(base(pack4), inlay.LoraConfig(target_parameters=["m.weight"]))
    model = nn.Sequential(pack8(nn.Linear(64, 64)), pack8(nn.Linear(64, 32)))
    with pytest.raises(UnsupportedLayerError, match=r"modules_to_save cannot hold 1: .*bnb8"):
        inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match=r"packed as torch\.int8"):
        inlay.get_peft_model(Net(layer), lora)


def test_bitsandbytes_is_not_imported() -> None:
    code = (
        "import sys, torch, inlay\n"
        "net = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "m = inlay.get_peft_model(net, inlay.LoraConfig(target_modules=['0']))\n"
        "m.merge_adapter()\n"
        "assert not [n for n in sys.modules if n.startswith('bitsandbytes')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- starting values


@each
def test_loftq_after_the_fact(pack: Pack, tmp_path: Path) -> None:
    torch.manual_seed(3)
    original = nn.Linear(64, 32)
    save_file({"m.weight": original.weight.detach().clone()}, tmp_path / "original.safetensors")
    model = inlay.get_peft_model(base(pack), inlay.LoraConfig(r=8, target_modules=["m"]))
    packed, lost = raw(model.base_model.model.m.base_layer), wrapper(model).matrix().float() - original.weight
    inlay.replace_lora_weights_loftq(model, tmp_path / "original.safetensors")
    assert (lost + wrapper(model).get_delta_weight("default").float()).norm() < 0.8 * lost.norm()
    for key, t in raw(model.base_model.model.m.base_layer).items():
        assert torch.equal(t, packed[key])


@each
def test_loftq_beforehand_is_refused(pack: Pack) -> None:
    model = base(pack)
    config = inlay.LoraConfig(
        r=8, target_modules=["m"], init_lora_weights="loftq", loftq_config=inlay.LoftQConfig(loftq_bits=4)
    )
    with pytest.raises(UnsupportedLayerError, match="replace_lora_weights_loftq"):
        inlay.get_peft_model(model, config)
    assert not list(wrappers(model))


@each
def test_a_start_from_the_weight(pack: Pack) -> None:
    expected = base(pack)(x_BI)
    model = inlay.get_peft_model(base(pack), inlay.LoraConfig(r=8, target_modules=["m"], init_lora_weights="pissa"))
    assert wrapper(model).params("default")["up"].norm() > 0
    close(model(x_BI), expected, 1e-3)
    with model.disable_adapter():
        same_bits(model(x_BI), expected)


@each
def test_a_packed_weight_is_read_as_its_layer_computes_with_it(pack: Pack) -> None:
    layer: Any = pack(nn.Linear(64, 32))
    bits_of = "8bit" if storage_of(layer).name == "bnb8" else "4bit"
    for _ in range(2):  # the first forward moves statistics about
        W = dequantize_module_weight(layer)
        close(nn.functional.linear(x_BI.to(W), W, layer.bias.to(W)).float(), layer(x_BI).float(), tolerance=2e-2)
        close(dequantize_bnb_weight(layer.weight, layer.state if bits_of == "8bit" else None).to(W), W)
        assert get_bnb_param_type(layer.weight) == bits_of
        assert packing_of(layer) is storage_of(layer)
    model = inlay.get_peft_model(Net(layer), inlay.LoraConfig(target_modules=["m"]))
    assert wrapper(model).quantization_backend is storage_of(layer)
    same_bits(wrapper(model).get_base_weight(), W)
    same_bits(dequantize_module_weight(wrapper(model)), W)
    wrapper(model).set_base_weight(W * 2)
    close(wrapper(model).get_base_weight(), W * 2, tolerance=2e-2)


@each
def test_a_packed_layer_alone_gets_no_adapter_that_reads_what_was_packed(pack: Pack) -> None:
    model = adapted(pack)
    wrapper(model).update_layer("b", 2, config=inlay.LoraConfig())
    config = inlay.LoraConfig(init_lora_weights="loftq", loftq_config=inlay.LoftQConfig())
    with pytest.raises(UnsupportedLayerError, match="packed already"):
        wrapper(model).update_layer("c", 2, config=config)
    assert list(wrapper(model).r) == ["default", "b"]


def test_what_is_not_packed_is_not_read_so() -> None:
    layer: Any = pack8(nn.Linear(64, 32))
    layer(x_BI)
    layer.weight.SCB = None  # all is in the state
    for weight in (layer.weight, nn.Linear(2, 2).weight):
        with pytest.raises(ConfigError, match="statistics"):
            dequantize_bnb_weight(weight)
    assert dequantize_bnb_weight(layer.weight, layer.state).shape == (32, 64)
    plain = nn.Linear(2, 2)
    assert dequantize_module_weight(plain) is plain.weight
    assert packing_of(plain) is None
    assert get_bnb_param_type(plain.weight) is False
