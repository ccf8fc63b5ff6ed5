"""diffusers' models, unmodified, with adapters by the drop-in: UNet, Flux, SD3 and Wan from tiny configs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dropin.tiny_diffusers import (
    ATTENTION,
    MODELS,
    Tensors,
    changed,
    filled,
    layers,
    lokr,
    lora,
    made,
    output,
    written,
)
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor

pytestmark = pytest.mark.diffusers
kinds = pytest.mark.parametrize("kind", list(MODELS))
FILE = "pytorch_lora_weights.safetensors"


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5 * float(b.detach().abs().max()), rtol=1e-4)


def adapted(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def configured(r: int = 4, alpha: int = 4, **kwargs: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": r, "lora_alpha": alpha, "target_modules": list(ATTENTION), **kwargs})


def two(kind: str) -> tuple[Any, Tensors, Tensors]:
    """A model with adapters a and b, both active, and their files."""
    model = made(kind)
    a, b = lora(model, 5), lora(model, 6, 2, ATTENTION[:2])
    model.load_lora_adapter(dict(a), prefix=None, adapter_name="a")
    model.load_lora_adapter(dict(b), prefix=None, adapter_name="b")
    model.set_adapters(["a", "b"])
    return model, a, b


def expected(kind: str, *parts: tuple[Tensors, Any]) -> Tensor:
    """What a plain model gives with the sum of these files, each scaled, in its weights."""
    model = made(kind)
    for file, scale in parts:
        written(model, file, scale)
    return output(kind, model)


# ---------------------------------------------------------------------- adding, saving, loading


@kinds
def test_an_adapter_is_added_saved_unloaded_and_loaded(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    base, file = output(kind, model), lora(made(kind), 5)
    model.add_adapter(configured(alpha=8))
    assert not peft.set_peft_model_state_dict(model, file, "default").unexpected_keys
    wanted = expected(kind, (file, 2.0))
    close(output(kind, model), wanted)
    assert model.active_adapters() == ["default"]
    before = model.peft_config["default"].to_dict()

    model.save_lora_adapter(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as saved:
        assert set(saved.keys()) == set(file)
        assert all(torch.equal(saved.get_tensor(key), file[key]) for key in file)
        stored = json.loads(saved.metadata()["lora_adapter_metadata"])
    assert peft.LoraConfig(**stored).to_dict() == before

    model.unload_lora()
    assert not adapted(model)
    assert not hasattr(model, "peft_config")
    assert torch.equal(output(kind, model), base)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in made(kind).named_modules()]

    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    close(output(kind, model), wanted)
    assert model.peft_config["default_0"].to_dict() == before
    with pytest.raises(ValueError, match="Adapter name foo not found"):
        model.save_lora_adapter(tmp_path, adapter_name="foo")


@kinds
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tensors_alone_are_a_file(kind: str, low_cpu_mem_usage: bool) -> None:
    model, file = made(kind), lora(made(kind), 5)
    file |= lora(model, 6, 2, ("to_q",))  # two ranks, of which diffusers makes patterns
    model.load_lora_adapter(dict(file), prefix=None, low_cpu_mem_usage=low_cpu_mem_usage)
    close(output(kind, model), expected(kind, (file, 1.0)))
    assert not any(p.is_meta for p in model.parameters())


def test_metadata_that_is_no_config_is_refused_before_anything_is_changed() -> None:
    model, file = made("flux"), lora(made("flux"), 5)
    with pytest.raises(TypeError, match="could not be instantiated"):
        model.load_lora_adapter(dict(file), prefix=None, metadata={**configured().to_dict(), "foo": 1})
    assert not adapted(model)


@kinds
def test_half_a_model_keeps_its_dtype_in_adapters(kind: str) -> None:
    model, file = made(kind).to(torch.bfloat16), lora(made(kind), 5)
    model.load_lora_adapter(dict(file), prefix=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------- several adapters


@kinds
def test_several_adapters_are_weighted_switched_and_scaled_by_a_call(kind: str) -> None:
    model, a, b = two(kind)
    close(output(kind, model), expected(kind, (a, 1.0), (b, 1.0)))
    for _ in range(2):  # weights are set, not multiplied
        model.set_adapters(["a", "b"], [0.5, 0.7])
        weighted = expected(kind, (a, 0.5), (b, 0.7))
        close(output(kind, model), weighted)
    by_call = {MODELS[kind].scale: {"scale": 0.3}}
    close(output(kind, model, **by_call), expected(kind, (a, 0.15), (b, 0.21)))
    close(output(kind, model), weighted)
    model.disable_lora()
    assert torch.equal(output(kind, model), output(kind, made(kind)))
    model.enable_lora()
    close(output(kind, model), weighted)
    model.set_adapters("b")
    close(output(kind, model), expected(kind, (b, 1.0)))
    assert model.active_adapters() == ["b"]
    by_call = {MODELS[kind].scale: {"scale": 0.0}}
    assert torch.equal(output(kind, model, **by_call), output(kind, made(kind)))
    close(output(kind, model), expected(kind, (b, 1.0)))


@kinds
def test_deleted_adapters_leave_room_for_others(kind: str) -> None:
    model, _, b = two(kind)
    model.delete_adapters("a")
    close(output(kind, model), expected(kind, (b, 1.0)))
    assert (model.active_adapters(), list(model.peft_config)) == (["b"], ["b"])
    model.delete_adapters(["b", "nobody"])
    assert torch.equal(output(kind, model), output(kind, made(kind)))
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.active_adapters()
    model.load_lora_adapter(dict(b), prefix=None)  # its name is counted from what layers have
    close(output(kind, model), expected(kind, (b, 1.0)))
    assert list(model.peft_config) == ["default_0"]
    with pytest.raises(ValueError, match="already in use"):
        model.load_lora_adapter(dict(b), prefix=None, adapter_name="default_0")
    model.load_lora_adapter(dict(b), prefix=None)
    assert list(model.peft_config) == ["default_0", "default_1"]


# ---------------------------------------------------------------------- fusing


@kinds
def test_fused_equals_active_and_unfusing_gives_every_bit_back(kind: str) -> None:
    model, a, b = two(kind)
    model.fuse_lora()
    close(output(kind, model), expected(kind, (a, 1.0), (b, 1.0)))
    assert all(layer.merged_adapters for layer in adapted(model))
    model.unfuse_lora()
    assert not any(layer.merged_adapters for layer in adapted(model))
    model.disable_lora()
    assert torch.equal(output(kind, model), output(kind, made(kind)))


@kinds
def test_what_is_fused_keeps_the_scale_it_was_fused_with(kind: str) -> None:
    model, a, b = two(kind)
    model.fuse_lora(lora_scale=0.5, adapter_names=["a"])
    close(output(kind, model), expected(kind, (a, 0.5)))
    model.fuse_lora(lora_scale=0.7, adapter_names=["b"])  # which scales all that are active
    fused = expected(kind, (a, 0.5), (b, 0.35))
    close(output(kind, model), fused)
    model.unload_lora()
    close(output(kind, model), fused)


@kinds
def test_a_fused_adapter_that_is_deleted_stays_in_the_weights(kind: str) -> None:
    model, a, b = two(kind)
    model.fuse_lora()
    model.delete_adapters("a")
    close(output(kind, model), expected(kind, (a, 1.0), (b, 1.0)))
    with pytest.warns(UserWarning, match="Already unmerged"):  # of layers that had a alone
        model.unfuse_lora()
    model.disable_lora()
    close(output(kind, model), expected(kind, (a, 1.0)))


@kinds
def test_loading_beside_fused_adapters_unfuses_them(kind: str) -> None:
    model, _, _ = two(kind)
    c = lora(made(kind), 9)
    model.fuse_lora()
    with pytest.warns(UserWarning, match="they are unmerged first"):
        model.load_lora_adapter(dict(c), prefix=None, adapter_name="c")
    close(output(kind, model), expected(kind, (c, 1.0)))


@kinds
def test_fusing_safely_refuses_what_is_not_finite(kind: str) -> None:
    model, _, _ = two(kind)
    layer = adapted(model)[1]
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_A["b"].weight += float("inf")
    with pytest.raises(ValueError, match="NaN"):
        model.fuse_lora(safe_fusing=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged_adapters
    model.unload_lora()

    model, _, _ = two(kind)
    with torch.no_grad():
        adapted(model)[1].lora_A["b"].weight += float("inf")
    model.fuse_lora(safe_fusing=False)
    assert output(kind, model).isnan().all()


# ---------------------------------------------------------------------- methods

METHODS: dict[str, tuple[Callable[..., Any], float, type]] = {
    "dora": (lambda **k: configured(alpha=8, use_dora=True, **k), 2.0, LoraLayer),
    "rslora": (lambda **k: configured(alpha=8, use_rslora=True, **k), 4.0, LoraLayer),
    "loha": (lambda **k: peft.LoHaConfig(r=2, alpha=4, **{"target_modules": list(ATTENTION), **k}), 2.0, LoHaLayer),
    "lokr": (lambda **k: peft.LoKrConfig(r=2, alpha=4, **{"target_modules": list(ATTENTION), **k}), 2.0, LoKrLayer),
    "lokr, both factors in two": (
        lambda **k: peft.LoKrConfig(
            r=1, alpha=2, decompose_both=True, decompose_factor=4, **{"target_modules": list(ATTENTION), **k}
        ),
        2.0,
        LoKrLayer,
    ),
    "convolutions": (lambda: configured(alpha=8, target_modules=["conv1", "conv2", "to_q"]), 2.0, LoraLayer),
    "convolutions, dora": (
        lambda: configured(alpha=8, use_dora=True, target_modules=["conv1", "conv2", "to_q"]),
        2.0,
        LoraLayer,
    ),
    "convolutions, loha": (lambda: METHODS["loha"][0](target_modules=["conv1", "conv2"]), 2.0, LoHaLayer),
    "a patch embedding": (lambda: configured(alpha=8, target_modules=["patch_embedding", "to_q"]), 2.0, LoraLayer),
}
ONLY = {"convolutions": "unet", "convolutions, dora": "unet", "convolutions, loha": "unet", "a patch embedding": "wan"}


@pytest.mark.parametrize(
    ("kind", "method"), [(k, m) for m in METHODS for k in MODELS if ONLY.get(m, k) == k], ids=lambda v: v
)
def test_every_method_of_diffusers(kind: str, method: str, tmp_path: Path) -> None:
    configure, scale, layer_type = METHODS[method]
    model = made(kind)
    model.add_adapter(configure(), "n")
    assert all(isinstance(layer, layer_type) for layer in adapted(model))
    file = filled(peft.get_peft_model_state_dict(model, adapter_name="n"), 7)
    peft.set_peft_model_state_dict(model, file, "n")
    wanted = expected(kind, (file, scale))
    close(output(kind, model), wanted)
    assert (wanted - output(kind, made(kind))).abs().max() > 1e-3
    model.set_adapters("n", 0.5)
    halved = expected(kind, (file, scale / 2))
    close(output(kind, model), halved)
    model.fuse_lora(safe_fusing=True)
    close(output(kind, model), halved)
    model.unfuse_lora()
    close(output(kind, model), halved)
    model.save_lora_adapter(tmp_path, adapter_name="n")
    model.unload_lora()
    assert torch.equal(output(kind, model), output(kind, made(kind)))
    if layer_type is not LoHaLayer:  # which diffusers saves and does not load
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        close(output(kind, model), wanted)
        assert {type(c) for c in model.peft_config.values()} == {type(configure())}


@kinds
@pytest.mark.parametrize("rank", [None, 1])
def test_lokr_from_tensors_alone(kind: str, rank: int | None) -> None:
    model, file = made(kind), lokr(made(kind), 3, rank)
    model.load_lora_adapter(dict(file), prefix=None, adapter_name="k")
    close(output(kind, model), expected(kind, (file, 1.0)))
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoKrLayer)}
    plain = made(kind)
    for name, layer in layers(plain, ("to_q", "to_v")):
        own = {k.removeprefix(f"{name}."): t for k, t in file.items() if k.startswith(f"{name}.")}
        close(found.pop(name).get_delta_weight("k"), changed(layer, own, 1.0) - layer.weight)
    assert not found
    with pytest.raises(ValueError, match="Hotswapping LoKr adapters is not supported"):
        model.load_lora_adapter(dict(file), prefix=None, adapter_name="k", hotswap=True)
    model.unload_lora()
    assert not any(isinstance(m, LoKrLayer) for m in model.modules())


def test_methods_stand_beside_each_other() -> None:
    model, a, k = made("flux"), lora(made("flux"), 5), lokr(made("flux"), 3, None)
    model.load_lora_adapter(dict(a), prefix=None, adapter_name="a")
    model.load_lora_adapter(dict(k), prefix=None, adapter_name="k")
    model.set_adapters(["a", "k"], [0.5, 0.6])
    close(output("flux", model), expected("flux", (a, 0.5), (k, 0.6)))


# ---------------------------------------------------------------------- training, casting, offloading


@kinds
def test_only_the_active_adapter_is_trained_under_checkpointing_too(kind: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model, _, _ = two(kind)
        model.set_adapter("b")
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        model(**MODELS[kind].inputs(), return_dict=False)[0].pow(2).mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    stored, recomputed = grads
    assert stored
    assert all(".b." in name for name in stored)
    assert stored.keys() == recomputed.keys()
    for name, grad in stored.items():
        torch.testing.assert_close(recomputed[name], grad)


@kinds
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", ["adapter", "casting"])
def test_weights_are_stored_in_eight_bits_and_adapters_are_not(kind: str, compute: torch.dtype, first: str) -> None:
    """Also where the adapter comes last, where its layer's dtype is one in which nothing can be computed."""
    model, file = made(kind).to(compute), lora(made(kind), 5, size=0.05)
    steps = [
        lambda: model.load_lora_adapter(dict(file), prefix=None, adapter_name="a"),
        lambda: model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute),
    ]
    for step in steps if first == "adapter" else steps[::-1]:
        step()
    cast = [layer for layer in adapted(model) if layer.base_layer.weight.dtype == torch.float8_e4m3fn]
    assert cast
    assert all(p.dtype != torch.float8_e4m3fn for n, p in model.named_parameters() if "lora_" in n)

    rounded = made(kind).to(compute)
    rounded.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    base, here = output(kind, rounded, compute), output(kind, model, compute)
    there = expected(kind, (file, 1.0))
    error, moved = (here.float() - there).abs().mean(), (here - base).float().abs().mean()
    assert error < 0.2 * there.abs().mean()
    assert moved > 0
    model.set_adapters("a", 0.0)
    assert torch.equal(output(kind, model, compute), base)
    model.unload_lora()
    assert torch.equal(output(kind, model, compute), base)


@kinds
@pytest.mark.parametrize("how", ["block_level", "leaf_level"])
def test_group_offloading_goes_round_adapters(kind: str, how: str) -> None:
    model, a, b = made(kind), lora(made(kind), 5), lora(made(kind), 6)
    model.load_lora_adapter(dict(a), prefix=None, adapter_name="a")
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=how, num_blocks_per_group=1)
    close(output(kind, model), expected(kind, (a, 1.0)))
    model.load_lora_adapter(dict(b), prefix=None, adapter_name="b")
    close(output(kind, model), expected(kind, (b, 1.0)))
    model.set_adapters("a")
    model.delete_adapters("b")
    close(output(kind, model), expected(kind, (a, 1.0)))
    model.unload_lora()
    assert torch.equal(output(kind, model), output(kind, made(kind)))


# ---------------------------------------------------------------------- files that do not fit


def _first(file: Tensors, part: str = "lora_A") -> str:
    return next(key for key in file if part in key)


#: what is wrong -> the file, made of a good one, and the error
BAD: dict[str, tuple[Callable[[Tensors], Tensors], type[Exception]]] = {
    "a shape": (lambda f: f | {_first(f): torch.randn(4, 3)}, RuntimeError),
    "a rank": (lambda f: f | {_first(f): f[_first(f)][:2]}, RuntimeError),
    "every layer": (lambda f: {f"nowhere.{key}": t for key, t in f.items()}, ValueError),
    "a layer that is none": (
        lambda f: f | {"time_proj.lora_A.weight": torch.randn(4, 4), "time_proj.lora_B.weight": torch.randn(4, 4)},
        ValueError,
    ),
    "a magnitude": (
        lambda f: f | {_first(f).replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)},
        RuntimeError,
    ),
}


@pytest.mark.parametrize("wrong", list(BAD))
@pytest.mark.parametrize("other", [False, True], ids=["the first adapter", "beside another"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_failed_load_leaves_no_adapter_behind(wrong: str, other: bool, low_cpu_mem_usage: bool) -> None:
    kind = "unet"
    model, good = made(kind), lora(made(kind), 6)
    if other:
        model.load_lora_adapter(lora(made(kind), 5), prefix=None, adapter_name="old")
    before = output(kind, model)
    spoil, error = BAD[wrong]
    fails = pytest.raises(error)
    with fails:
        if other and error is RuntimeError:  # it had come in, was active, and is taken out again
            with pytest.warns(UserWarning, match="old"):
                model.load_lora_adapter(
                    spoil(good), prefix=None, adapter_name="new", low_cpu_mem_usage=low_cpu_mem_usage
                )
        else:
            model.load_lora_adapter(spoil(good), prefix=None, adapter_name="new", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(kind, model), before)
    assert not [name for name, _ in model.named_parameters() if ".new" in name]
    assert list(getattr(model, "peft_config", {})) == ["old"] * other
    model.load_lora_adapter(dict(good), prefix=None, adapter_name="new")
    close(output(kind, model), expected(kind, (good, 1.0)))


@kinds
def test_missing_and_unexpected_keys_are_logged(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    file = lora(made(kind), 5)
    key = _first(file)
    with caplog.at_level(logging.WARNING, "diffusers"):
        made(kind).load_lora_adapter({k: t for k, t in file.items() if k != key}, prefix=None, adapter_name="new")
        made(kind).load_lora_adapter(file | {f"{key}.diff_b": torch.ones(3)}, prefix=None, adapter_name="new")
    missing, unexpected = dict.fromkeys(record.getMessage() for record in caplog.records)
    assert f"missing keys in the model: {key.replace('lora_A', 'lora_A.new')}" in missing
    assert "unexpected keys found in the model" in unexpected
    assert ".diff_b" in unexpected


def test_tensors_of_the_model_itself_are_put_into_it() -> None:
    """SAI's control-LoRAs hold norms, biases and convolutions whole."""
    file, whole = (
        lora(made("unet"), 5),
        {"conv_out.weight": torch.randn(4, 8, 3, 3), "conv_norm_out.bias": torch.ones(8)},
    )
    model, plain = made("unet"), written(made("unet"), file)
    model.load_lora_adapter(file | whole, prefix=None)
    plain.load_state_dict(whole, strict=False)
    close(output("unet", model), output("unet", plain))
    with pytest.warns(UserWarning, match="other"), pytest.raises(RuntimeError):
        model.load_lora_adapter(file | {"conv_out.weight": torch.ones(1)}, prefix=None, adapter_name="other")


def test_a_name_that_is_not_there_is_an_error() -> None:
    model, a, b = two("flux")
    with pytest.raises(ValueError, match="could not be found"):
        model.set_adapter("nobody")
    close(output("flux", model), expected("flux", (a, 1.0), (b, 1.0)))
