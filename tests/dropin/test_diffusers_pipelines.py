"""diffusers' pipelines, unmodified, from tiny components: SD, SDXL, SD3 and Flux, their text encoders adapted too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dropin.tiny_diffusers import (
    ATTENTION,
    ENCODER,
    PIPELINES,
    Tensors,
    components,
    denoiser,
    image,
    pipeline,
    pipeline_file,
    pipeline_written,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.diffusers
kinds = pytest.mark.parametrize("kind", list(PIPELINES))
FILE = "pytorch_lora_weights.safetensors"

Make = Callable[[], Any]


@pytest.fixture
def make(kind: str, tmp_path: Path) -> Make:
    """The same pipeline without adapters, as often as asked for."""
    return lambda: pipeline(kind, tmp_path)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=5e-5 * float(b.abs().max()), rtol=1e-3)


def expected(make: Make, *parts: tuple[Tensors, Any]) -> Tensor:
    """What a plain pipeline gives with the sum of these files, each scaled, in its weights."""
    pipe = make()
    for file, scale in parts:
        pipeline_written(pipe, file, scale)
    return image(pipe)


def two(make: Make) -> tuple[Any, Tensors, Tensors]:
    """A pipeline with adapters a and b, both active, and their files."""
    pipe = make()
    a, b = pipeline_file(pipe, 5), pipeline_file(pipe, 8, r=2)
    pipe.load_lora_weights(dict(a), adapter_name="a")
    pipe.load_lora_weights(dict(b), adapter_name="b")
    pipe.set_adapters(["a", "b"])
    return pipe, a, b


def listed(pipe: Any) -> list[list[str]]:
    return list(pipe.get_list_adapters().values())


# ---------------------------------------------------------------------- files


@kinds
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_file_is_saved_with_its_configs_and_loaded(make: Make, dora: bool, tmp_path: Path) -> None:
    pipe = make()
    plain, file = image(pipe), pipeline_file(pipe, 5, dora=dora)
    parts, saved = components(pipe), {}
    for name, model in parts.items():
        targets = ATTENTION if model is denoiser(pipe) else ENCODER
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), use_dora=dora)
        model.add_adapter(config, "n")
        own = {k.removeprefix(f"{name}."): t for k, t in file.items() if k.startswith(f"{name}.")}
        assert not peft.set_peft_model_state_dict(model, own, "n").unexpected_keys
        saved[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(model, adapter_name="n")
        saved[f"{name}_lora_adapter_metadata"] = model.peft_config["n"].to_dict()
    wanted = expected(make, (file, 2.0))
    close(image(pipe), wanted)
    before = {name: model.peft_config["n"].to_dict() for name, model in parts.items()}
    type(pipe).save_lora_weights(tmp_path / "saved", **saved)
    stored = load_file(tmp_path / "saved" / FILE)
    assert stored.keys() == file.keys()
    assert all(torch.equal(stored[key], file[key]) for key in file)

    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), plain)
    assert pipe.get_list_adapters() == {}
    assert not any(isinstance(m, BaseTunerLayer) for model in parts.values() for m in model.modules())
    pipe.load_lora_weights(tmp_path / "saved" / FILE)
    close(image(pipe), wanted)
    assert pipe.get_list_adapters() == {name: ["default_0"] for name in parts}
    for name, model in parts.items():
        found = model.peft_config["default_0"].to_dict()
        differ = {key for key in found if found[key] != before[name][key]}
        assert differ <= {"base_model_name_or_path", "inference_mode"}  # which transformers sets in its own


@kinds
def test_several_files_are_weighted_part_by_part(make: Make) -> None:
    pipe, a, b = two(make)
    assert pipe.get_active_adapters() == ["a", "b"]
    assert all(names == ["a", "b"] for names in listed(pipe))
    close(image(pipe), expected(make, (a, 1.0), (b, 1.0)))
    pipe.set_adapters(["a", "b"], [0.3, 0.8])
    weighted = expected(make, (a, 0.3), (b, 0.8))
    close(image(pipe), weighted)
    by_call = {"cross_attention_kwargs" if hasattr(pipe, "unet") else "joint_attention_kwargs": {"scale": 0.5}}
    close(image(pipe, **by_call), expected(make, (a, 0.15), (b, 0.4)))
    close(image(pipe), weighted)
    pipe.disable_lora()
    assert torch.equal(image(pipe), image(make()))
    pipe.enable_lora()
    close(image(pipe), weighted)

    one = next(name for name, model in components(pipe).items() if model is denoiser(pipe))
    pipe.set_adapters("a", {one: 0.4})
    close(image(pipe), expected(make, (a, lambda path: 0.4 if path.startswith(one) else 1.0)))
    for names, weights, text in ((["zz"], [1.0], "zz"), (["a"], [1.0, 2.0], "ength")):
        with pytest.raises(ValueError, match=text):
            pipe.set_adapters(names, weights)
    assert pipe.get_active_adapters() == ["a"]


BLOCKS: dict[str, tuple[Any, Callable[[str], float]]] = {
    "parts": (
        {"down": 0.3, "mid": 0.5, "up": 0.9},
        lambda path: 0.3 if ".down_blocks" in path else 0.5 if ".mid_block" in path else 0.9,
    ),
    "one part": ({"down": 0.3}, lambda path: 0.3 if ".down_blocks" in path else 1.0),
    "blocks": (
        {"down": {"block_0": [0.2]}, "up": {"block_1": [0.1, 0.6]}},
        lambda path: (
            0.2
            if ".down_blocks.0" in path
            else 0.1
            if ".up_blocks.1.attentions.0" in path
            else 0.6
            if ".up_blocks.1.attentions.1" in path
            else 1.0
        ),
    ),
}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("blocks", list(BLOCKS))
def test_the_blocks_of_a_unet_have_weights_of_their_own(make: Make, blocks: str) -> None:
    pipe, a, b = two(make)
    weights, scale = BLOCKS[blocks]
    pipe.set_adapters(["a", "b"], [{"unet": weights, "text_encoder": 0.7}, 0.5])

    def of_a(path: str) -> float:
        part = path.partition(".")[0]
        return scale(path) if part == "unet" else 0.7 if part == "text_encoder" else 1.0

    close(image(pipe), expected(make, (a, of_a), (b, 0.5)))


@kinds
def test_fused_files_come_out_again(make: Make) -> None:
    pipe, a, b = two(make)
    parts = list(components(pipe))
    pipe.fuse_lora(components=parts)
    close(image(pipe), expected(make, (a, 1.0), (b, 1.0)))
    assert (pipe.num_fused_loras, set(pipe.fused_loras)) == (2, {"a", "b"})
    pipe.unfuse_lora(components=parts)
    assert pipe.num_fused_loras == 0
    pipe.fuse_lora(components=parts, adapter_names=["a"], lora_scale=0.5, safe_fusing=True)
    close(image(pipe), expected(make, (a, 0.5)))
    assert set(pipe.fused_loras) == {"a"}
    pipe.unfuse_lora(components=parts)
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), image(make()))
    for wrong, text in (([], "components"), (["nothing"], "nothing")):
        with pytest.raises(ValueError, match=text):
            pipe.fuse_lora(components=wrong)


@kinds
def test_fusing_safely_refuses_what_is_not_finite(make: Make) -> None:
    pipe, _, _ = two(make)
    layer = next(m for m in denoiser(pipe).modules() if isinstance(m, BaseTunerLayer))
    with torch.no_grad():
        layer.lora_A["a"].weight += float("inf")
    with pytest.raises(ValueError, match="NaN"):
        pipe.fuse_lora(components=list(components(pipe)), safe_fusing=True)


@kinds
def test_files_are_deleted_and_moved_one_by_one(make: Make) -> None:
    pipe, _, b = two(make)
    pipe.set_lora_device(["a"], "meta")
    moved = {n.split(".")[-2] for m in components(pipe).values() for n, p in m.named_parameters() if p.is_meta}
    assert moved == {"a"}
    pipe.set_adapters("b")
    close(image(pipe), expected(make, (b, 1.0)))
    pipe.delete_adapters("a")
    close(image(pipe), expected(make, (b, 1.0)))
    assert all(names == ["b"] for names in listed(pipe))
    pipe.delete_adapters(["b"])
    assert torch.equal(image(pipe), image(make()))
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(dict(b))
    close(image(pipe), expected(make, (b, 1.0)))


def test_magnitudes_move_too(tmp_path: Path) -> None:
    pipe = pipeline("flux", tmp_path)
    file = pipeline_file(pipe, 5, encoders=False, dora=True)
    pipe.load_lora_weights(dict(file), adapter_name="a")
    pipe.set_lora_device(["a"], "meta")
    assert all(p.is_meta == ("lora_" in name) for name, p in pipe.transformer.named_parameters())


@kinds
@pytest.mark.parametrize("wrong", ["a shape", "another model", "no file of LoRA"])
def test_a_failed_load_leaves_no_adapter_behind(make: Make, wrong: str) -> None:
    pipe = make()
    b = pipeline_file(pipe, 8, r=2)
    pipe.load_lora_weights(dict(b), adapter_name="b")
    good, before = pipeline_file(make(), 5), image(pipe)
    name = next(name for name, model in components(pipe).items() if model is denoiser(pipe))
    first = next(key for key in good if key.startswith(f"{name}."))
    if wrong == "a shape":
        with pytest.warns(UserWarning, match="new"), pytest.raises(RuntimeError):
            pipe.load_lora_weights(good | {first: torch.randn(3, 3)}, adapter_name="new")
    else:
        bad = {f"{name}.nowhere.{key}": t for key, t in good.items()} if wrong == "another model" else {"x": b[first]}
        with pytest.raises(ValueError):
            pipe.load_lora_weights(bad, adapter_name="new")
    assert all(names == ["b"] for names in listed(pipe))
    assert not [n for m in components(pipe).values() for n, _ in m.named_parameters() if ".new" in n]
    assert torch.equal(image(pipe), before)


# ---------------------------------------------------------------------- hot-swap


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "flux"])
def test_files_are_swapped_under_compiled_code(make: Make) -> None:
    pipe = make()
    first, second = (pipeline_file(make(), seed, r, encoders=False) for seed, r in ((5, 4), (6, 7)))
    with pytest.raises(ValueError, match="there is no existing adapter by that name"):
        pipe.load_lora_weights(dict(first), adapter_name="h", hotswap=True)
    pipe.enable_lora_hotswap(target_rank=7)
    pipe.load_lora_weights(dict(first), adapter_name="h")
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    torch.compiler.reset()
    setattr(pipe, name, torch.compile(denoiser(pipe), backend="eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(image(pipe), expected(make, (first, 1.0)))
        pipe.load_lora_weights(dict(second), adapter_name="h", hotswap=True)
        swapped = image(pipe)
        close(swapped, expected(make, (second, 1.0)))
        _refused(pipe, make, first)
        assert torch.equal(image(pipe), swapped)
    assert list(denoiser(pipe).peft_config) == ["h"]


def _refused(pipe: Any, make: Make, file: Tensors) -> None:
    """Every call that diffusers refuses."""
    for adapter_name in ("other", None):
        with pytest.raises(ValueError, match="there is no existing adapter by that name"):
            pipe.load_lora_weights(dict(file), adapter_name=adapter_name, hotswap=True)
    encoders = {key: t for key, t in pipeline_file(make(), 9).items() if key.startswith("text_encoder")}
    if encoders:  # Stable Diffusion 3 and Flux adapt them as well
        with pytest.raises(ValueError, match="hotswapping is not supported for text encoders"):
            pipe.load_lora_weights(encoders, adapter_name="h", hotswap=True)
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        pipe.enable_lora_hotswap(target_rank=9)
    with pytest.raises(ValueError, match="check_compile"):
        pipe.enable_lora_hotswap(target_rank=9, check_compiled="else")
