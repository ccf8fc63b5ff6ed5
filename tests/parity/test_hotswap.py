"""Hot-swapping beside PEFT: the same calls give the same outputs, and what it refuses or gets wrong is listed here."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity.helpers import Pair, base, config_of, make_pair, peft, peft_may_warn, random_like
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from inlay import hotswap

with peft_may_warn():
    from peft.utils import hotswap as incumbent

B: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["lin0", "lin1"], "init_lora_weights": False}
ONE = {**B, "target_modules": ["m"]}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def saved(folder: Path, name: str, fields: Mapping[str, Any], seed: int = 7) -> Path:
    """A folder with an adapter that PEFT has saved."""
    with peft_may_warn():
        model = peft.get_peft_model(base(name), config_of(peft, fields))
        values = random_like(peft.get_peft_model_state_dict(model), seed)
        peft.set_peft_model_state_dict(model, values)
        model.save_pretrained(folder)
    return folder


def swap(pair: Pair, folder: Path, adapter: str = "default") -> None:
    with peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), adapter)
    hotswap.hotswap_adapter(pair.ours, str(folder), adapter)


def prepare(pair: Pair, **kwargs: Any) -> None:
    with peft_may_warn():
        incumbent.prepare_model_for_compiled_hotswap(pair.theirs, **kwargs)
    hotswap.prepare_model_for_compiled_hotswap(pair.ours, **kwargs)


def same_adapters(pair: Pair) -> None:
    """Equal live tensors, padded ones too."""
    theirs = {n: p for n, p in pair.theirs.named_parameters() if "lora_" in n}
    ours = {n: p for n, p in pair.ours.named_parameters() if "lora_" in n}
    assert theirs.keys() == ours.keys()
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "name",
    [
        "check_hotswap_configs_compatible",
        "hotswap_adapter",
        "hotswap_adapter_from_state_dict",
        "prepare_model_for_compiled_hotswap",
    ],
)
def test_signatures(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(library, name)).parameters for library in (incumbent, hotswap))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(
    ("first", "second", "rank"),
    [
        ({}, {}, None),
        ({}, {"lora_alpha": 32}, None),
        ({"r": 8}, {"r": 2, "lora_alpha": 1}, None),
        ({"r": 2}, {"r": 8}, None),
        ({}, {"target_modules": ["lin0"]}, None),
        ({"lora_bias": True}, {"lora_bias": True, "lora_alpha": 5}, None),
        ({}, {"r": 13, "lora_alpha": 1}, 16),
        ({"r": 2}, {"r": 16, "lora_alpha": 32, "target_modules": ["lin1"]}, 16),
        ({}, {"lora_alpha": 3}, -1),  # prepared without a rank
    ],
)
def test_swaps(first: dict[str, Any], second: dict[str, Any], rank: int | None, tmp_path: Path) -> None:
    pair = make_pair("linears", {**B, **first})
    if rank is not None:
        prepare(pair, target_rank=None if rank < 0 else rank)
        pair.assert_equal_outputs()
        same_adapters(pair)
    swap(pair, saved(tmp_path, "linears", {**B, **second}))
    pair.assert_equal_outputs()
    same_adapters(pair)
    scales = [
        {
            str(path): float(module.scaling["default"])
            for path, module in model.named_modules()
            if hasattr(module, "scaling")
        }
        for model in pair.both()
    ]
    assert scales[0] == {k: v for k, v in scales[1].items() if k in scales[0]}


@pytest.mark.parametrize("name", ["conv2d", "conv2d-oblong", "conv2d-point", "gpt2-conv1d"])
def test_swaps_of_other_layers(name: str, tmp_path: Path) -> None:
    pair, folder = make_pair(name, ONE), saved(tmp_path, name, {**ONE, "r": 3, "lora_alpha": 5})
    if name.startswith("conv2d"):
        prepare(pair, target_rank=8)
    swap(pair, folder)
    pair.assert_equal_outputs()
    same_adapters(pair)


# ---------------------------------------------------------------- as diffusers drives it


def diffusers_model() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, sample_size=4, in_channels=2, out_channels=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=8, attention_head_dim=4,
    ).eval()  # fmt: skip


def lora_of(model: nn.Module, rank: int, seed: int, uneven: int = 0) -> dict[str, Tensor]:
    """A LoRA in the keys that diffusers hands on."""
    torch.manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("to_q", "to_v", "conv1")):
            r = rank + uneven if "to_v" in name else rank
            W = module.weight
            tensors[f"{name}.lora_A.weight"] = torch.randn(r, *W.shape[1:]) * 0.3
            tensors[f"{name}.lora_B.weight"] = torch.randn(W.shape[0], r, *(1,) * (W.dim() - 2)) * 0.3
    return tensors


def config_for(library: ModuleType, tensors: Mapping[str, Tensor], alpha: float) -> Any:
    """As diffusers makes it of the tensors: modules by full name, ranks by anchored pattern."""
    ranks = {key.removesuffix(".lora_B.weight"): t.shape[1] for key, t in tensors.items() if "lora_B" in key}
    r = max(ranks.values(), key=list(ranks.values()).count)
    return library.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=list(ranks),
        rank_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != r},
    )  # fmt: skip


def with_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{key.removesuffix('.weight')}.style.weight": t for key, t in tensors.items()}


@pytest.mark.diffusers
@pytest.mark.parametrize("prepared", [True, False])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_the_calls_of_diffusers(prepared: bool) -> None:
    base = diffusers_model()
    inputs = {"sample": torch.randn(1, 2, 4, 4), "timestep": 3, "encoder_hidden_states": torch.randn(1, 3, 8)}
    outputs: dict[str, list[Tensor]] = {}
    for library, module in ((peft, incumbent), (inlay, hotswap)):
        torch._dynamo.reset()
        model, found = diffusers_model(), outputs.setdefault(library.__name__, [])
        with peft_may_warn() if library is peft else contextlib.nullcontext():
            first = lora_of(base, 2, 1)
            config = config_for(library, first, 4)
            library.inject_adapter_in_model(config, model, adapter_name="style", state_dict=first)
            library.set_peft_model_state_dict(model, first, "style", low_cpu_mem_usage=False)
            if prepared:
                module.prepare_model_for_compiled_hotswap(model, config=config, target_rank=8, check_compiled="error")
                model.compile(backend="eager")
            found.append(model(**inputs).sample)
            for rank, alpha in ((5, 1), (3, 32), (7, 16)):
                tensors = lora_of(base, rank, rank)
                config = config_for(library, tensors, alpha)
                module.check_hotswap_configs_compatible(model.peft_config["style"], config)
                module.hotswap_adapter_from_state_dict(
                    model=model, state_dict=with_name(tensors), adapter_name="style", config=config
                )
                found.append(model(**inputs).sample)
    assert len(outputs["peft"]) == 4
    for theirs, ours in zip(outputs["peft"], outputs["inlay"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # Ranks that differ by layer are scaled wrongly by PEFT's swap.
    tensors = lora_of(base, 3, 9, uneven=2)
    config, loaded = config_for(inlay, tensors, 5), diffusers_model()
    assert config.rank_pattern
    hotswap.hotswap_adapter_from_state_dict(model, with_name(tensors), "style", config)
    inlay.inject_adapter_in_model(config_for(inlay, tensors, 5), loaded, "style", state_dict=tensors)
    inlay.set_peft_model_state_dict(loaded, tensors, "style")
    torch.testing.assert_close(model(**inputs).sample, loaded(**inputs).sample, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        ({"target_modules": ["lin0"]}, {}, RuntimeError),
        ({"use_dora": True}, {}, ValueError),
        ({}, {"use_dora": True}, ValueError),
        ({}, {"peft_type": "IA3"}, ValueError),
    ],
)
def test_errors_of_a_swap(
    first: dict[str, Any], second: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    pair = make_pair("linears", {**B, **first})
    fields = {**B, **second}
    if fields.get("peft_type") == "IA3":
        fields = {"peft_type": "IA3", "target_modules": ["lin0"], "feedforward_modules": []}
    folder = saved(tmp_path, "linears", fields)
    with pytest.raises(error), peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")
    with pytest.raises(error):
        hotswap.hotswap_adapter(pair.ours, str(folder), "default")
    pair.assert_equal_outputs()


def test_errors_of_preparing() -> None:
    for kwargs in ({"target_rank": 2}, {"target_rank": 0}):
        pair = make_pair("linears", B)
        with pytest.raises(ValueError):
            incumbent.prepare_model_for_compiled_hotswap(pair.theirs, **kwargs)
        with pytest.raises(ValueError):
            hotswap.prepare_model_for_compiled_hotswap(pair.ours, **kwargs)
    for library in (incumbent, hotswap):
        with pytest.raises(ValueError):
            library.prepare_model_for_compiled_hotswap(base("linears"), target_rank=8)
    pair = make_pair("linears", B)
    for library, model in ((incumbent, pair.theirs), (hotswap, pair.ours)):
        compiled = torch.compile(model)
        with pytest.raises(ValueError):
            library.prepare_model_for_compiled_hotswap(compiled, target_rank=8)
        with pytest.raises(ValueError):
            library.prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="other")
        with pytest.warns(UserWarning, match="compil"):
            library.prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")


# ---------------------------------------------------------------- where the two differ (docs/differences.md)


def fresh(folder: Path, name: str = "linears") -> nn.Module:
    return inlay.PeftModel.from_pretrained(base(name), folder).eval()


def right(model: nn.Module, folder: Path, pair: Pair) -> bool:
    """Whether it gives what a fresh load does."""
    return torch.allclose(model(*pair.args), fresh(folder)(*pair.args), atol=1e-5)


@pytest.mark.parametrize("field", [{"use_rslora": True}, {"lora_dropout": 0.5}, {"alpha_pattern": {"lin0": 3}}])
def test_what_peft_refuses(field: dict[str, Any], tmp_path: Path) -> None:
    pair, folder = make_pair("linears", B), saved(tmp_path, "linears", {**B, **field})
    with pytest.raises(ValueError), peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")
    hotswap.hotswap_adapter(pair.ours, folder, "default")
    assert right(pair.ours, folder, pair)


@pytest.mark.parametrize("name", ["conv1d", "conv3d", "embedding"])
def test_layers_that_peft_does_not_swap(name: str, tmp_path: Path) -> None:
    pair, folder = make_pair(name, ONE), saved(tmp_path, name, {**ONE, "r": 3, "lora_alpha": 5})
    with pytest.raises((NotImplementedError, AttributeError)), peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")
    hotswap.hotswap_adapter(pair.ours, folder, "default")
    assert torch.allclose(pair.ours(*pair.args), fresh(folder, name)(*pair.args), atol=1e-5)


def test_a_rank_pattern_has_scales_of_its_own(tmp_path: Path) -> None:
    pair, folder = make_pair("linears", B), saved(tmp_path, "linears", {**B, "rank_pattern": {"lin0": 2}})
    swap(pair, folder)
    assert not right(pair.theirs, folder, pair)
    assert right(pair.ours, folder, pair)


@pytest.mark.parametrize(
    "field", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lin1"], "target_modules": ["lin0"]}], ids=str
)
def test_what_stands_beside_the_factors(field: dict[str, Any], tmp_path: Path) -> None:
    fields = {**B, **field}
    pair, folder = make_pair("linears", fields), saved(tmp_path, "linears", fields)
    with pytest.raises(KeyError), peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")
    assert pair.theirs(*pair.args).isfinite().all()
    assert not right(pair.theirs, folder, pair)
    hotswap.hotswap_adapter(pair.ours, folder, "default")
    assert right(pair.ours, folder, pair)


@pytest.mark.parametrize("spoilt", ["shape", "missing", "NaN"])
def test_files_that_peft_accepts(spoilt: str, tmp_path: Path) -> None:
    pair, folder = make_pair("linears", B), saved(tmp_path, "linears", B)
    file, key = folder / "adapter_model.safetensors", "base_model.model.lin1.lora_B.weight"
    tensors = load_file(file)
    B_OR = tensors.pop(key)
    if spoilt != "missing":
        tensors[key] = torch.ones(B_OR.shape[0] + 1, B_OR.shape[1]) if spoilt == "shape" else B_OR * torch.nan
    save_file(tensors, file)
    before = pair.ours(*pair.args)
    with peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")
    if spoilt == "shape":
        with pytest.raises(RuntimeError):
            pair.theirs(*pair.args)
    else:
        assert pair.theirs(*pair.args).isnan().any() == (spoilt == "NaN")
        assert pair.theirs.base_model.model.lin1.lora_B["default"].weight.any() == (spoilt == "NaN")
    with pytest.raises(RuntimeError):
        hotswap.hotswap_adapter(pair.ours, folder, "default")
    torch.testing.assert_close(pair.ours(*pair.args), before, rtol=0, atol=0)


def test_an_activated_adapter(tmp_path: Path) -> None:
    pair, folder = make_pair("linears", B), saved(tmp_path, "linears", B)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alora_invocation_tokens": [1]}))
    before = pair.ours(*pair.args)
    with peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")
    assert not torch.allclose(pair.theirs(*pair.args), before)
    with pytest.raises(ValueError, match="from its invocation on"):
        hotswap.hotswap_adapter(pair.ours, folder, "default")


def test_an_adapter_that_is_not_active(tmp_path: Path) -> None:
    """PEFT compares the new config with that of the active one."""
    pair, folder = make_pair("linears", {**B, "use_rslora": True}), saved(tmp_path, "linears", B)
    for model, library in ((pair.theirs, peft), (pair.ours, inlay)):
        model.add_adapter("other", config_of(library, B))
    with pytest.raises(ValueError), peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "other")
    hotswap.hotswap_adapter(pair.ours, folder, "other")
    pair.ours.set_adapter("other")
    assert right(pair.ours, folder, pair)


def test_other_methods_and_merged_adapters(tmp_path: Path) -> None:
    ia3 = {"peft_type": "IA3", "target_modules": ["lin0"], "feedforward_modules": []}
    pair, folder = make_pair("linears", ia3), saved(tmp_path / "ia3", "linears", ia3)
    with pytest.raises(ValueError), peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")
    hotswap.hotswap_adapter(pair.ours, folder, "default")
    assert right(pair.ours, folder, pair)
    pair, folder = make_pair("linears", B), saved(tmp_path / "lora", "linears", B)
    pair.each(lambda model: model.merge_adapter())
    with pytest.raises(ValueError), peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")
    hotswap.hotswap_adapter(pair.ours, folder, "default")
    assert right(pair.ours, folder, pair)


def test_what_is_read_of_a_swapped_in_adapter(tmp_path: Path) -> None:
    """PEFT's config, ranks and files stay at the first adapter's numbers, or at the padded ones."""
    pair, folder = make_pair("linears", B), saved(tmp_path / "second", "linears", {**B, "r": 2, "lora_alpha": 5})
    prepare(pair, target_rank=16)
    swap(pair, folder)
    layers = pair.theirs.base_model.model.lin0, pair.ours.base_model.model.lin0
    assert [layer.r["default"] for layer in layers] == [4, 2]
    assert [model.peft_config["default"].lora_alpha for model in pair.both()] == [8, 5]
    for model, side in zip(pair.both(), ("theirs", "ours"), strict=True):
        with peft_may_warn():
            model.save_pretrained(tmp_path / side)
    shapes = [
        {tuple(t.shape) for t in load_file(tmp_path / side / "adapter_model.safetensors").values()}
        for side in ("theirs", "ours", "second")
    ]
    ranks = [json.loads((tmp_path / s / "adapter_config.json").read_text())["r"] for s in ("theirs", "ours", "second")]
    assert shapes[0] == {(16, 12), (20, 16), (16, 20), (6, 16)}
    assert ranks[0] == 4  # a file that nobody can load
    assert (shapes[1], ranks[1]) == (shapes[2], ranks[2])


def test_scales_set_by_hand() -> None:
    """They stay tensors, which compiled code has no need to see anew."""
    pair = make_pair("linears", B)
    prepare(pair, target_rank=8)
    for model in pair.both():
        model.base_model.model.lin0.set_scale("default", 0.5)
    kinds = [type(model.base_model.model.lin0.scaling["default"]) for model in pair.both()]
    assert kinds == [float, Tensor]
    pair.assert_equal_outputs()


def test_a_rank_above_the_prepared_one(tmp_path: Path) -> None:
    pair, folder = make_pair("linears", B), saved(tmp_path, "linears", {**B, "r": 9})
    prepare(pair, target_rank=8)
    with peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")  # other tensors: compiled anew
    with pytest.raises(ValueError):
        hotswap.hotswap_adapter(pair.ours, folder, "default")


def test_a_bias_in_one_of_the_two_and_an_unknown_name(tmp_path: Path) -> None:
    pair = make_pair("linears", {**B, "lora_bias": True})
    folder = saved(tmp_path, "linears", B)
    with peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "default")  # the old one's is zeroed
    with pytest.raises(ValueError):
        hotswap.hotswap_adapter(pair.ours, folder, "default")
    with pytest.raises(RuntimeError), peft_may_warn():
        incumbent.hotswap_adapter(pair.theirs, str(folder), "other")
    with pytest.raises(ValueError):
        hotswap.hotswap_adapter(pair.ours, folder, "other")


def test_the_config_that_preparing_is_given() -> None:
    pair = make_pair("linears", B)
    configs = [config_of(library, B) for library in (peft, inlay)]
    with peft_may_warn():
        incumbent.prepare_model_for_compiled_hotswap(pair.theirs, target_rank=16, config=configs[0])
    hotswap.prepare_model_for_compiled_hotswap(pair.ours, target_rank=16, config=configs[1])
    assert [config.r for config in configs] == [16, 4]


@pytest.mark.parametrize("how", ["around", "in place"])
def test_a_compiled_part(how: str) -> None:
    pair = make_pair("linears", B)
    for model in pair.both():
        inner = model.base_model.model
        if how == "around":
            inner.lin0 = torch.compile(inner.lin0)
        else:
            inner.lin0.compile()
    with peft_may_warn():
        incumbent.prepare_model_for_compiled_hotswap(pair.theirs, target_rank=8)
    with pytest.raises(ValueError):
        hotswap.prepare_model_for_compiled_hotswap(pair.ours, target_rank=8)
