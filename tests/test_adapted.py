"""The wrapper: exact merging, tied weights, several adapters, scales, and what it looks like from outside."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from laws import bits, close, differs, disturb, same_bits, same_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook

import inlay
from inlay import functional
from inlay.adapted import Adapted
from inlay.errors import (
    AdapterNameError,
    BaseGoneError,
    ConfigError,
    MergeError,
    NonFiniteMergeError,
    NotMergeableError,
    PeftWarning,
    PlanError,
    UnknownAdapterError,
    UnsupportedLayerError,
)
from inlay.methods import _low_rank
from inlay.ops import low_rank
from inlay.storage.plain import Plain
from inlay.tuner import Tuner
from inlay.walk import wrappers

Tiny = Callable[[str], nn.Module]


def handle(base: nn.Module, **fields: Any) -> inlay.PeftModel:
    config = inlay.LoraConfig(**{"r": 4, "target_modules": ["lin0", "lin1"], **fields})
    model = inlay.get_peft_model(base, config, adapter_name="a")
    disturb(model)
    return model.eval()


@pytest.fixture
def model(mlp: nn.Module) -> inlay.PeftModel:
    return handle(mlp)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 10)


@contextmanager
def raises_and_leaves(model: nn.Module, error: type[BaseException], match: str | None = None) -> Iterator[None]:
    """The error, and every bit and module as before."""
    before, modules = bits(model), [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(error, match=match):
        yield
    same_state(bits(model), before)
    assert [(name, type(m)) for name, m in model.named_modules()] == modules


# ---------------------------------------------------------------- merging is exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cycles", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_and_unmerging_again_and_again(mlp: nn.Module, dtype: torch.dtype, cycles: int, dora: bool) -> None:
    model = handle(mlp.to(dtype), use_dora=dora)
    before = bits(model)
    for _ in range(cycles):
        model.merge_adapter()
        model.unmerge_adapter()
    same_state(bits(model), before)
    model.merge_adapter()
    assert not torch.equal(
        model.base_model.model.lin0.base_layer.weight, before["base_model.model.lin0.base_layer.weight"]
    )


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_unmerged_weights_stand_where_they_stood(mlp: nn.Module, fields: dict[str, Any]) -> None:
    model = handle(mlp, **fields)
    identities = {name: id(p) for name, p in model.named_parameters()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    model.unmerge_adapter()
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("keep_base", [True, False])
def test_merging_keeps_pointers_that_are_seen(mlp: nn.Module, fields: dict[str, Any], keep_base: bool) -> None:
    model = handle(mlp, **fields)
    seen = {name: p.detach()[:1] for name, p in model.named_parameters()}
    before = bits(model)
    for _ in range(2 if keep_base else 1):
        model.merge_adapter(keep_base=keep_base)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == {
            n: v.data_ptr() for n, v in seen.items()
        }
        assert not torch.equal(
            seen["base_model.model.lin0.base_layer.weight"], before["base_model.model.lin0.base_layer.weight"][:1]
        )
        if keep_base:
            model.unmerge_adapter()
            assert all(torch.equal(v, before[n][:1]) for n, v in seen.items())


def test_what_is_seen_while_merged_is_unmerged_too(mlp: nn.Module) -> None:
    model = handle(mlp)
    before = bits(model)
    model.merge_adapter()
    rows, array = mlp.get_parameter("lin0.base_layer.weight")[:2], mlp.get_parameter("lin1.base_layer.weight").numpy()
    model.unmerge_adapter()
    same_state(bits(model), before)
    assert torch.equal(rows, before["base_model.model.lin0.base_layer.weight"][:2])
    assert torch.equal(torch.from_numpy(array), before["base_model.model.lin1.base_layer.weight"])


@pytest.mark.parametrize("saved", ["a view of the weight", "the weight itself"])
def test_merging_after_a_forward_is_noticed_by_its_backward(mlp: nn.Module, x: Tensor, saved: str) -> None:
    model = handle(mlp)
    if saved == "a view of the weight":
        loss = model(x.requires_grad_()).sum()
    else:
        loss = (mlp.get_parameter("lin0.base_layer.weight") * torch.ones((), requires_grad=True)).sum()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_merged_weights_are_saved_as_tensors_of_their_own(
    monkeypatch: pytest.MonkeyPatch, mlp: nn.Module, tmp_path: Path
) -> None:
    monkeypatch.setattr("inlay.storage.arena._WORTHWHILE", 1)
    model = handle(mlp)
    model.merge_adapter()
    merged = {name: mlp.get_parameter(f"{name}.base_layer.weight") for name in ("lin0", "lin1")}
    save_file({name: W.detach() for name, W in merged.items()}, tmp_path / "merged.safetensors")
    same_state(load_file(tmp_path / "merged.safetensors"), {name: W.detach() for name, W in merged.items()})


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_merged_weight_is_whole_as_soon_as_it_is_there(
    monkeypatch: pytest.MonkeyPatch, mlp: nn.Module, fields: dict[str, Any]
) -> None:
    handle(mlp, **fields)
    exchange, seen = Plain.exchange, {}

    def watched(self: Plain, layer: nn.Module, parameter: str, make: Callable[[Tensor], Tensor]) -> Tensor | None:
        kept = exchange(self, layer, parameter, make)
        seen[parameter] = layer.get_parameter(parameter).clone()
        return kept

    monkeypatch.setattr(Plain, "exchange", watched)
    layer: Any = mlp.get_submodule("lin0")
    layer.write(layer.check_merge(None), room=lambda W: torch.full_like(W, torch.nan))
    assert seen.keys() == {"weight", *(["bias"] if fields.get("lora_bias") else [])}
    same_state(seen, {name: layer.base_layer.get_parameter(name) for name in seen})


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_in_channels_last_merge(dtype: torch.dtype, keep_base: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).to(dtype, memory_format=torch.channels_last)
    model = handle(net, target_modules=["0"])
    images = torch.randn(2, 3, 5, 5, dtype=dtype)
    weight = net.get_parameter("0.base_layer.weight")
    before, strides, wanted = weight.clone(), weight.stride(), model(images)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    model.merge_adapter(keep_base=keep_base)
    close(model(images), wanted, tolerance)
    model.unmerge_adapter()
    assert weight.stride() == strides
    close(weight, before, 0 if keep_base else tolerance)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("unmerging", [False, True])
def test_what_is_merged_in_inference_mode_is_used_with_gradients(
    mlp: nn.Module, x: Tensor, fields: dict[str, Any], unmerging: bool
) -> None:
    model = handle(mlp, **fields)
    before = bits(model)
    with torch.inference_mode():
        model.merge_adapter()
        if unmerging:
            model.unmerge_adapter()
    with model.disable_adapter():
        model(x.requires_grad_()).sum().backward()
    mlp.get_parameter("lin0.base_layer.weight").requires_grad_(True)
    model(x).sum().backward()
    if not unmerging:
        model.unmerge_adapter()
    same_state(bits(model), before)


def test_a_weight_that_was_made_in_inference_mode_is_merged_outside(mlp: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model = handle(copy.deepcopy(mlp))
    before = bits(model)
    with torch.no_grad():
        wanted = model(x)
        model.merge_adapter()
        close(model(x), wanted)
        model.unmerge_adapter()
    same_state(bits(model), before)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, None], ids=str)
def test_what_was_made_in_inference_mode_runs_and_is_seen_to_change(
    mlp: nn.Module, x: Tensor, fields: dict[str, Any] | None
) -> None:
    cls: Any = inlay.OFTConfig if fields is None else inlay.LoraConfig
    config = cls(target_modules=["lin0"], **{"oft_block_size": 2} if fields is None else fields)
    with torch.inference_mode():
        model = inlay.get_peft_model(copy.deepcopy(mlp), config, "a").eval()
        model.add_adapter("b", config)
        for _ in range(2):
            disturb(model)
            apart = [model.forward(x, adapter_names=[name] * len(x)) for name in ("a", "b")]
            for name, rows in zip(("a", "b"), apart, strict=True):
                with model.use_adapter(name):
                    close(model(x), rows)
            assert not torch.equal(*apart)


@pytest.mark.parametrize("cls", [inlay.LoraConfig, inlay.OFTConfig])
def test_what_is_remembered_of_adapters_that_are_trained_carries_no_graph(mlp: nn.Module, x: Tensor, cls: Any) -> None:
    config = cls(target_modules=["lin0"], **{"oft_block_size": 2} if cls is inlay.OFTConfig else {})
    model = inlay.get_peft_model(mlp, config, "a").eval()
    with torch.inference_mode():
        model(x, adapter_names=["a"] * len(x))
    model.requires_grad_(False)
    for _ in range(2):
        model(x.requires_grad_(), adapter_names=["a"] * len(x)).sum().backward()


def test_a_weight_that_is_computed_by_now_does_not_merge(model: inlay.PeftModel, mlp: nn.Module) -> None:
    layer = mlp.get_submodule("lin1.base_layer")
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    with raises_and_leaves(model, NotMergeableError, "lin1: its weight is computed"):
        model.merge_adapter()
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    model.merge_adapter()


def test_a_stack_of_one_expert_merges() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(1, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up[0].T

    model = handle(nn.Sequential(Experts()), target_modules=[], target_parameters=["0.up"])
    x = torch.randn(2, 3)
    before, wanted = bits(model), model(x)
    model.merge_adapter()
    close(model(x), wanted)
    model.unmerge_adapter()
    same_state(bits(model), before)


def test_merging_twice_and_unmerging_twice(model: inlay.PeftModel, x: Tensor) -> None:
    before = bits(model)
    with pytest.warns(PeftWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    merged = bits(model)
    with pytest.warns(PeftWarning, match="already merged"):
        model.merge_adapter()
    same_state(bits(model), merged)
    model.unmerge_adapter()
    same_state(bits(model), before)


def test_merging_by_name(model: inlay.PeftModel, x: Tensor) -> None:
    model.add_adapter("b", inlay.LoraConfig(r=2, target_modules=["lin1", "head"], init_lora_weights=False))
    with torch.no_grad(), model.use_adapter("b"):
        expected = model(x)
    with raises_and_leaves(model, UnknownAdapterError, "nope"):
        model.merge_adapter(["a", "nope"])
    with raises_and_leaves(model, TypeError, r"\['b'\]"):
        model.merge_adapter("b")  # type: ignore[arg-type]
    model.merge_adapter(["b"])
    with torch.no_grad(), model.use_adapter("b"):
        close(model(x), expected)
    close(model.merge_and_unload(adapter_names=["b"])(x), expected)


def test_disabled_while_merged_is_the_base(model: inlay.PeftModel, mlp: nn.Module, x: Tensor, tiny: Tiny) -> None:
    expected = tiny("mlp")(x)
    model.merge_adapter()
    merged = bits(model)
    with model.disable_adapter():
        same_bits(model(x), expected)
        same_state(bits(model), merged)
        assert model.base_model.model.lin0.merged
    differs(model, x, expected)


class Scaled(nn.Linear):
    """As Gemma's embedding or a head with logit scaling: a layer of a known kind that does something more."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


@pytest.mark.parametrize("use", ["embedding", "convolution", "subclass"])
def test_disabled_while_merged_is_the_base_of_other_kinds(use: str) -> None:
    layers = {"embedding": nn.Embedding(9, 6), "convolution": nn.Conv2d(3, 4, 3), "subclass": Scaled(6, 4)}
    layer = layers[use]
    x = torch.randint(0, 9, (2, 5)) if use == "embedding" else torch.randn(2, 3, 6, 6)
    base = nn.Sequential(layer)
    expected = base(x).detach()
    model = handle(base, target_modules=["0"])
    model.merge_adapter()
    with model.disable_adapter():
        same_bits(model(x), expected)
    differs(model, x, expected)


def test_another_adapter_runs_while_one_is_merged(model: inlay.PeftModel, x: Tensor) -> None:
    model.add_adapter("b", inlay.LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False))
    with torch.no_grad():
        expected = {}
        for names in (("a",), ("b",), ("a", "b")):
            with model.use_adapter(names):
                expected[names] = model(x)
        model.merge_adapter()
        for names, out in expected.items():
            with model.use_adapter(names):
                close(model(x), out)


def test_without_the_base(model: inlay.PeftModel, x: Tensor, tiny: Tiny) -> None:
    expected = model(x)
    before = bits(model)
    model.merge_adapter(keep_base=False)
    close(model(x), expected)
    with pytest.raises(BaseGoneError, match="keep_base"), model.disable_adapter():
        model(x)
    close(model(x), expected)
    model.unmerge_adapter()
    for key, t in bits(model).items():
        close(t, before[key])
    close(model(x), expected)
    with model.disable_adapter():
        close(model(x), tiny("mlp")(x))


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_cannot_be_subtracted_says_so(mlp: nn.Module, x: Tensor, fields: dict[str, Any]) -> None:
    model = handle(mlp, **fields)
    model.merge_adapter(keep_base=False)
    for verb in (model.unmerge_adapter, model.unload):
        with raises_and_leaves(model, BaseGoneError, "keep_base"):
            verb()
    assert all(w.merged for _, w in wrappers(model))


def test_unmerging_is_all_or_nothing() -> None:
    """One layer can be subtracted and a later one cannot: neither is touched."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eoi->bo", x, self.weight)

    base = nn.Sequential(nn.Linear(4, 4), Experts())
    model = handle(base, target_modules=["0"], target_parameters=["1.weight"])
    model.merge_adapter(keep_base=False)
    for verb in (model.unmerge_adapter, model.unload):
        with raises_and_leaves(model, BaseGoneError):
            verb()
        assert all(w.merged for _, w in wrappers(model))


def test_merge_is_all_or_nothing() -> None:
    base = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2))
    model = handle(base, target_modules=["0", "1"])
    for verb in (model.merge_adapter, model.merge_and_unload):
        with raises_and_leaves(model, NotMergeableError, "group"):
            verb()
        assert not any(w.merged for _, w in wrappers(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_checks_everything_first(model: inlay.PeftModel, bad: float) -> None:
    with torch.no_grad():
        model.base_model.model.lin1.lora_B.a.weight[3, 1] = bad
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NonFiniteMergeError, match="lin1"):
            verb(safe_merge=True)
        for name, p in model.named_parameters():
            assert torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
        assert not any(w.merged for _, w in wrappers(model))
    model.merge_adapter()
    assert not model.base_model.model.lin1.base_layer.weight.isfinite().all()
    model.unmerge_adapter()
    assert model.base_model.model.lin1.base_layer.weight.isfinite().all()


def test_overflow_in_the_weights_dtype_is_not_finite(mlp: nn.Module) -> None:
    model = handle(mlp.half())
    with torch.no_grad():
        model.base_model.model.lin1.lora_B.a.weight.fill_(1e6)
    with raises_and_leaves(model, NonFiniteMergeError, "lin1"):
        model.merge_adapter(safe_merge=True)


# ---------------------------------------------------------------- tied weights


def _tied(tiny: Tiny) -> nn.Module:
    base = tiny("llama")
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    return base


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_one_of_two_tied_layers(tiny: Tiny, tokens_BT: Tensor, target: str) -> None:
    base = _tied(tiny)
    shared = base.lm_head.weight
    pristine = shared.detach().clone()
    model = handle(base, target_modules=[target])
    inner = model.base_model.model
    layers = {"lm_head": inner.lm_head, "embed_tokens": inner.model.embed_tokens}
    adapted, partner = layers.pop(target), layers.popitem()[1]
    with torch.no_grad():
        expected = model(tokens_BT).logits
        model.merge_adapter()
        assert partner.weight is shared
        assert torch.equal(shared, pristine)
        assert not torch.equal(adapted.base_layer.weight, pristine)
        close(model(tokens_BT).logits, expected)
        model.unmerge_adapter()
    assert adapted.base_layer.weight is shared
    assert partner.weight is shared
    assert torch.equal(shared, pristine)
    with pytest.warns(PeftWarning, match="tie_word_embeddings"):
        plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    with torch.no_grad():
        close(plain(tokens_BT).logits, expected)
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_merged_tied_layers_move_and_are_copied(tiny: Tiny) -> None:
    model = handle(_tied(tiny), target_modules=["lm_head"])
    before = bits(model)
    model.merge_adapter()
    other = copy.deepcopy(model)
    model.double().float()
    for each in (model, other):
        each.unmerge_adapter()
        same_state(bits(each), before)
        inner = each.base_model.model
        assert inner.lm_head.base_layer.weight is inner.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_both_tied_layers_adapted(tiny: Tiny, tokens_BT: Tensor) -> None:
    model = handle(_tied(tiny), target_modules=["lm_head", "embed_tokens"])
    before = bits(model)
    with torch.no_grad():
        expected = model(tokens_BT).logits
        model.merge_adapter()
        close(model(tokens_BT).logits, expected)
    model.unmerge_adapter()
    same_state(bits(model), before)
    inner = model.base_model.model
    assert inner.lm_head.base_layer.weight is inner.model.embed_tokens.base_layer.weight


# ---------------------------------------------------------------- several adapters


def test_dora_beside_lora_is_their_sum_in_any_order(model: inlay.PeftModel, x: Tensor) -> None:
    base = nn.Sequential(nn.Linear(10, 6))
    two = handle(base, target_modules=["0"])
    two.add_adapter("dora", inlay.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    disturb(two)
    for training in (False, True):
        two.train(training)
        with two.disable_adapter():
            expected = two(x)
            frozen = expected
        for name in ("a", "dora"):
            with two.use_adapter(name):
                expected = expected + two(x) - frozen
        for order in (["a", "dora"], ["dora", "a"]):
            two.set_adapter(order)
            close(two(x), expected)


def test_who_is_trained(model: inlay.PeftModel) -> None:
    def trained() -> set[str]:
        return {n for name, p in model.named_parameters() if p.requires_grad for n in ("a", "b") if f".{n}." in name}

    config = inlay.LoraConfig(r=2, target_modules=["lin0"])
    assert trained() == {"a"}
    model.add_adapter("b", config)
    assert trained() == {"a"}
    model.set_adapter("b")
    assert trained() == {"b"}
    with model.use_adapter("a"), model.disable_adapter():
        assert trained() == {"b"}
    assert trained() == {"b"}
    model.set_adapter(["a", "b"])
    assert trained() == {"a", "b"}
    model.set_requires_grad("a", False)
    assert trained() == {"b"}
    model.set_adapter("a", inference_mode=True)
    assert trained() == set()
    model.set_adapter("a")
    assert trained() == {"a"}
    model.base_model.disable_adapter_layers()
    assert trained() == set()
    model.base_model.enable_adapter_layers()
    assert trained() == {"a"}
    with pytest.warns(PeftWarning, match="is deleted: b is active"):
        model.delete_adapter("a")
    assert trained() == {"b"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name or "head" in name)


def test_deleting(model: inlay.PeftModel, x: Tensor, tiny: Tiny) -> None:
    modules = {name for name, _ in model.named_modules()}
    model.add_adapter("b", inlay.LoraConfig(r=2, target_modules=["lin0", "head"], use_dora=True))
    model.merge_adapter(["b"])
    with raises_and_leaves(model, PlanError, "merged"):
        model.delete_adapter("b")
    model.unmerge_adapter()
    expected = model(x)
    model.delete_adapter("b")
    assert not [name for name in model.state_dict() if ".b." in name]
    assert list(model.peft_config) == ["a"]
    same_bits(model(x), expected)
    assert {name for name, _ in model.named_modules() if ".lin0" in name} == {n for n in modules if ".lin0" in n}
    with raises_and_leaves(model, UnknownAdapterError, "Adapter b does not exist"):
        model.delete_adapter("b")
    model.delete_adapter("a")
    assert not model.peft_config
    assert not model.active_adapters
    close(model(x), tiny("mlp")(x))


def test_deleting_the_active_one_falls_back(model: inlay.PeftModel, x: Tensor) -> None:
    model.add_adapter("b", inlay.LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False))
    with model.use_adapter("b"):
        expected = model(x)
    with pytest.warns(PeftWarning, match="Adapter a was active") as warned:
        model.delete_adapter("a")
    assert len(warned) == 1
    assert model.active_adapters == ["b"]
    close(model(x), expected)


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_scales(mlp: nn.Module, x: Tensor, dora: bool, training: bool) -> None:
    """A scale times s is a B times s, whatever was computed before."""
    model = handle(mlp, use_dora=dora, lora_alpha=6).train(training)
    layers = [w for _, w in wrappers(model) if isinstance(w, Adapted)]

    @torch.no_grad()
    def check(factor: float) -> None:
        other = handle(copy.deepcopy(model).unload(), use_dora=dora, lora_alpha=6).train(training)
        other.load_state_dict(model.state_dict())
        for w in (w for _, w in wrappers(other) if isinstance(w, Adapted)):
            w.lora_B.a.weight.mul_(factor)
        close(model(x), other(x))
        assert all(w.scaling["a"] == pytest.approx(1.5 * factor) for w in layers)

    check(1.0)
    for w in layers:
        w.scale_layer(2.0)
    check(2.0)
    for w in layers:
        w.scale_layer(0.25)
    check(0.5)
    for w in layers:
        w.unscale_layer(0.25)
    check(2.0)
    for w in layers:
        w.set_scale("a", 3.0)
    check(3.0)
    for w in layers:
        w.unscale_layer()
    check(1.0)
    for w in layers:
        w.scaling["a"] = 6.0
    check(4.0)
    for w in layers:
        w.set_scale("nobody", 3.0)
    check(4.0)


# ---------------------------------------------------------------- layer by layer, as diffusers calls them


@pytest.fixture
def owned(mlp: nn.Module) -> Any:
    """A model without a handle, with two adapters, both active."""
    for name in "ab":
        config = inlay.LoraConfig(r=4, target_modules=["lin0", "lin1"], init_lora_weights=False)
        inlay.inject_adapter_in_model(config, mlp, name)
    functional.set_adapter(mlp, ["a", "b"])
    return mlp.eval()


def layers_of(model: nn.Module) -> list[Adapted]:
    return [w for _, w in wrappers(model) if isinstance(w, Adapted)]


def scaled(model: Any, x: Tensor, **scales: float) -> Tensor:
    """The output with these scales and no adapter else."""
    model = copy.deepcopy(model)
    for layer in layers_of(model):
        layer.set_adapter(list(scales))
        for name, scale in scales.items():
            layer.set_scale(name, scale)
    out: Tensor = model(x)
    return out


@torch.no_grad()
def test_what_is_merged_keeps_the_scale_that_it_had(owned: Any, x: Tensor) -> None:
    plain, expected = scaled(owned, x), scaled(owned, x, a=0.5, b=0.25)
    for name in "ab":
        for layer in layers_of(owned):
            layer.scale_layer(0.5)  # of both: which adapters are merged makes no difference to it
            layer.merge(adapter_names=[name])
    close(owned(x), expected)
    for layer in layers_of(owned):
        layer.set_scale("a", 3.0)
        layer.unmerge()
    functional.set_adapter(owned, [])
    same_bits(owned(x), plain)


@torch.no_grad()
@pytest.mark.parametrize("merged", [["a"], ["a", "b"]], ids=str)
def test_a_merged_adapter_that_a_layer_deletes_stays_in_its_weight(owned: Any, x: Tensor, merged: list[str]) -> None:
    a, both = scaled(owned, x, a=0.5), scaled(owned, x, a=0.5, b=0.5)
    for layer in layers_of(owned):
        layer.scale_layer(0.5)
        layer.merge(adapter_names=merged)
        layer.scale_layer(2.0)
        layer.delete_adapter("a")
        if merged == ["a"]:
            layer.set_scale("b", 0.5)
        assert layer.merged_adapters == merged[1:]
    close(owned(x), both)
    for layer in layers_of(owned):
        if layer.merged:
            layer.unmerge()
    functional.set_adapter(owned, [])
    close(owned(x), a)


@torch.no_grad()
@pytest.mark.parametrize("verb", ["set_adapter", "inject"])
def test_other_adapters_are_set_after_unmerging(owned: Any, x: Tensor, verb: str) -> None:
    plain = scaled(owned, x)
    for layer in layers_of(owned):
        layer.merge()
    verbs: dict[str, Callable[[], Any]] = {
        "set_adapter": lambda: functional.set_adapter(owned, []),
        "inject": lambda: inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["head"]), owned, "c"),
    }
    with pytest.warns(PeftWarning, match="they are unmerged first"):
        verbs[verb]()
    assert not any(layer.merged for layer in layers_of(owned))
    same_bits(owned(x), plain)


def test_layers_without_adapters_tell_what_there_was(owned: Any) -> None:
    layer = owned.lin0
    for name in "ab":
        layer.delete_adapter(name)
    assert (len(layer.r), len(layer.scaling), len(layer.lora_A)) == (0, 0, 0)
    with pytest.raises(AttributeError):
        _ = layer.hada_w1_a
    assert not hasattr(nn.Linear(1, 1), "r")


def test_an_owner_may_take_out_what_never_came_in(owned: Any) -> None:
    with pytest.raises(PlanError):
        inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["nothing"]), owned, "c")
    owned.peft_config.pop("c")
    assert list(owned.peft_config) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nothing_is_computed_in_eight_bits(mlp: nn.Module, dtype: torch.dtype) -> None:
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["lin0", "lin1"]), mlp.to(dtype))
    assert {p.dtype for n, p in mlp.named_parameters() if "lora_" in n} == {torch.float32}


# ---------------------------------------------------------------- from outside


_BAD_NAMES = [
    "",
    " ",
    "a.b",
    "a/b",
    "../x",
    "base_layer",
    "forward",
    "keys",
    "to",
    "type",
    "training",
    "__base__",
    "__class__",
]


@pytest.mark.parametrize("name", _BAD_NAMES)
def test_names_that_cannot_be(mlp: nn.Module, name: str, tmp_path: Path) -> None:
    config = inlay.LoraConfig(target_modules=["lin0"])
    with raises_and_leaves(mlp, AdapterNameError):
        inlay.get_peft_model(mlp, config, adapter_name=name)
    with raises_and_leaves(mlp, AdapterNameError):
        inlay.inject_adapter_in_model(config, mlp, adapter_name=name)
    assert all(p.requires_grad for p in mlp.parameters())
    model = handle(mlp)
    model.save_pretrained(str(tmp_path))
    with raises_and_leaves(model, AdapterNameError):
        model.add_adapter(name, config)
    with raises_and_leaves(model, AdapterNameError):
        model.load_adapter(str(tmp_path / "a"), name)
    fresh = nn.Sequential(nn.Linear(3, 3))
    with raises_and_leaves(fresh, AdapterNameError):
        inlay.PeftModel.from_pretrained(fresh, str(tmp_path / "a"), adapter_name=name)
    assert list(model.peft_config) == ["a"]


@pytest.mark.parametrize("name", ["pop", "clear", "update"])
def test_names_beside_modules_to_save(mlp: nn.Module, name: str) -> None:
    """An attribute of the container of copies is no name either, or works: never another error, never half."""
    before = bits(mlp)
    config = inlay.LoraConfig(target_modules=["lin0"], modules_to_save=["head"])
    try:
        model = inlay.get_peft_model(mlp, config, adapter_name=name)
    except AdapterNameError:
        same_state(bits(mlp), before)
    else:
        model(torch.randn(2, 10))


def test_the_wrapper_reads_like_its_layer(model: inlay.PeftModel) -> None:
    layer = model.base_model.model.lin0
    base = layer.base_layer
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (10, 20)
    assert layer.active_adapters == ["a"]
    assert layer.merged_adapters == []
    assert not layer.merged
    assert layer.r["a"] == 4
    assert layer.scaling["a"] == 2.0
    assert dict(layer.use_dora) == {"a": False}
    assert layer.lora_A["a"] is layer.lora_A.a
    assert "a" in layer.lora_A
    assert list(layer.lora_A.keys()) == ["a"]
    delta = layer.get_delta_weight("a")
    close(delta, layer.lora_B.a.weight @ layer.lora_A.a.weight * layer.scaling["a"])
    with pytest.raises(AttributeError):
        _ = layer.nothing_of_this_name


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_layers_may_be_called_by_keyword(kind: str) -> None:
    layers = {"linear": nn.Linear(6, 5), "conv": nn.Conv1d(6, 5, 2), "embedding": nn.Embedding(7, 6)}

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = layers[kind]

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.m(input=x)
            return h

    model = handle(Calls(), target_modules=["m"])
    x = torch.randint(0, 7, (2, 3)) if kind == "embedding" else torch.randn(2, 6, 6)
    close(model(x), model.base_model.model.m(x))
    model(x, adapter_names=["a", "__base__"])


def test_torchs_fused_encoder_does_not_pass_adapters_by() -> None:
    """In eval `TransformerEncoderLayer` hands its children's weights to one fused call."""
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        frozen = base(x)
    for targets in (["linear1", "linear2"], ["self_attn"], ["self_attn", "linear1", "linear2"]):
        model = handle(copy.deepcopy(base), target_modules=targets)
        expected = model.train().requires_grad_(False)
        for module in expected.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        with torch.no_grad():
            wanted = expected(x)
            found = model.eval()(x)
        assert float((wanted - frozen).abs().max()) > 1e-2
        close(found, wanted)
        model.merge_adapter()
        with torch.no_grad():
            close(model(x), wanted)


def test_hooks_on_the_frozen_layer_run(model: inlay.PeftModel, x: Tensor) -> None:
    seen: list[str] = []
    layer = model.base_model.model.lin0
    layer.base_layer.register_forward_hook(lambda *args: seen.append("base"))
    layer.register_forward_hook(lambda *args: seen.append("wrapper"))
    model(x)
    assert seen == ["base", "wrapper"]


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_hooks_on_a_slots_module_run(
    request: pytest.FixtureRequest, net: str, fields: dict[str, Any], training: bool
) -> None:
    base = request.getfixturevalue(net)
    targets = ["lin0"] if net == "mlp" else [next(n for n, m in base.named_modules() if isinstance(m, nn.Conv2d))]
    model = handle(base, target_modules=targets, **fields).train(training)
    layer = next(m for m in model.modules() if isinstance(m, Adapted))
    x = torch.randn(4, 10) if net == "mlp" else torch.randn(2, 3, 8, 8)
    seen: list[tuple[str, Any]] = []
    down, up = layer.lora_A.a, layer.lora_B.a

    def run() -> Tensor:
        torch.manual_seed(0)
        seen.clear()
        return layer(x)

    expected = run()
    hooks = [
        down.register_forward_pre_hook(lambda module, args: seen.append(("A reads", args[0].shape))),
        down.register_forward_hook(lambda module, args, out: seen.append(("A gives", out.shape[1]))),
        up.register_forward_hook(lambda module, args, out: seen.append(("B gives", out.shape))),
        up.register_full_backward_hook(lambda module, into, of: seen.append(("backward", of[0].shape))),
    ]
    out = run()
    if not fields.get("lora_dropout") or not training:  # plain torch draws its own zeros
        close(out, expected)
    forward = [("A reads", x.shape), ("A gives", 4), ("B gives", expected.shape)]
    assert seen == forward
    out.sum().backward()
    assert seen == [*forward, ("backward", expected.shape)]

    hooks.append(up.register_forward_hook(lambda module, args, out: out * 0))
    if fields in ({}, {"lora_dropout": 0.5}):  # what a hook gives is what is added
        close(run(), layer.base_layer(x))
    for hook in hooks:
        hook.remove()
    assert torch.equal(run(), expected)
    assert not seen


def test_modules_of_ours_are_modules_like_any_other(model: inlay.PeftModel) -> None:
    """They leave out nn.Module's containers until these are asked for."""
    layer = model.base_model.model.lin0
    leaf = layer.lora_A.a
    for module in (layer, layer.lora_A, leaf):
        assert set(vars(nn.Module())) <= set(dir(module))
    seen: list[str] = []
    leaf.register_forward_hook(lambda *args: seen.append("leaf"))
    leaf.register_buffer("extra", torch.zeros(1), persistent=False)
    copied = copy.deepcopy(leaf)
    for each in (leaf, copied):
        each(torch.zeros(1, leaf.weight.shape[1]))
        assert list(each.state_dict()) == ["weight"]
    assert seen == ["leaf", "leaf"]


def test_names_that_are_none(model: inlay.PeftModel, tmp_path: Path) -> None:
    for name in (None, 3):
        with raises_and_leaves(model, AdapterNameError, match=repr(name)):
            model.set_adapter(name)
        with raises_and_leaves(model, AdapterNameError, match=repr(name)), model.use_adapter(name):
            pass
    with raises_and_leaves(model, AdapterNameError, match=r"write \['a'\]"):
        model.save_pretrained(tmp_path / "new", selected_adapters="a")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_a_layers_output_is_not_written_to_where_somebody_may_hold_it(
    mlp: nn.Module, x: Tensor, fields: dict[str, Any], record: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inlay.ops.low_rank._FEW", 0)
    layer = handle(mlp, **fields).train().base_model.model.lin0
    base, forward = layer.base_layer, layer.base_layer.forward
    held: list[Tensor] = []

    def keeping(x: Tensor) -> Tensor:
        held.append(forward(x))
        return held[-1]

    def check() -> None:
        with torch.set_grad_enabled(record):
            layer(x.detach().requires_grad_(record))
        assert held
        assert torch.equal(held.pop(), forward(x))

    base.forward = keeping
    check()
    del base.forward
    hook = base.register_forward_hook(lambda module, args, out: held.append(out))
    check()
    hook.remove()
    if record:
        hook = base.register_full_backward_hook(lambda *args: None)
        layer(x.detach().requires_grad_()).sum().backward()
        hook.remove()


def _watch(kind: str, base: nn.Linear) -> Callable[[], None]:
    """Has somebody look at a frozen layer's call or at its gradients; what is returned ends it."""
    if kind == "forward":
        base.forward = partial(nn.Linear.forward, base)
        return lambda: base.__dict__.pop("forward")
    if kind == "trained":
        base.weight.requires_grad_()
        return lambda: base.weight.requires_grad_(False)
    hook = {
        "pre-hook": lambda: base.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        "hook": lambda: base.register_forward_hook(lambda module, args, out: out * 2),
        "backward-hook": lambda: base.register_full_backward_hook(lambda module, given, got: (given[0] * 2,)),
        "backward-pre-hook": lambda: base.register_full_backward_pre_hook(lambda module, got: (got[0] * 2,)),
        "global-hook": lambda: register_module_full_backward_hook(lambda module, given, got: None),
    }[kind]()
    return hook.remove


@pytest.mark.parametrize(
    ("fields", "can"),
    [
        ({}, True),
        ({"lora_dropout": 0.5}, True),
        ({"use_dora": True}, True),
        ({"lora_bias": True}, True),
        ({"use_dora": True, "lora_dropout": 0.5}, False),  # the layer runs for the dropped input too
        ({"init_lora_weights": "pissa"}, False),  # its offset comes between
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "kind", ["", "pre-hook", "hook", "backward-hook", "backward-pre-hook", "global-hook", "forward", "trained"]
)
def test_the_backward_pass_of_an_unwatched_layer_is_taken_in(monkeypatch, kind, fields, can):
    monkeypatch.setattr(low_rank, "_FEW", 0)
    layer = Adapted.around(nn.Linear(6, 5).requires_grad_(False), "a", inlay.LoraConfig(**fields), 3, 4)
    trained = [p for p in layer.params("a").values() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p)
    x = torch.randn(4, 6, requires_grad=True)
    end = _watch(kind, layer.base_layer) if kind else lambda: None

    def run() -> tuple[set[str], list[Tensor]]:
        torch.manual_seed(0)
        out = layer(x)
        found, names = [out.grad_fn], set()
        for node in found:
            names.add(type(node).__name__)
            found += [n for n, _ in node.next_functions if n is not None]
        return names, [out, *torch.autograd.grad(out.sum(), [x, *trained])]

    names, results = run()
    assert ("AddmmBackward0" in names) == (bool(kind) or not can)
    monkeypatch.setattr(_low_rank, "takes_in", lambda *args: False)
    names, expected = run()
    end()
    assert "AddmmBackward0" in names
    for found, right in zip(results, expected, strict=True):
        torch.testing.assert_close(found, right)


def test_few_frames_per_layer(model: inlay.PeftModel, x: Tensor) -> None:
    """What the wrapper costs at one token is Python frames: at most 8 of ours."""
    layer = model.base_model.model.lin0
    home = str(Path(inlay.__file__).parent)
    entered: list[str] = []

    def profile(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(home):
            entered.append(frame.f_code.co_name)

    with torch.no_grad():
        layer(x)
        sys.setprofile(profile)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
    assert 1 <= len(entered) <= 8, entered
    idle: list[str] = []
    entered, before = idle, entered
    layer.enable_adapters(False)
    with torch.no_grad():
        sys.setprofile(profile)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
    assert 1 <= len(idle) <= 3 < len(before), idle


def test_nothing_is_kept_of_what_is_deleted(model: inlay.PeftModel, x: Tensor) -> None:
    """What is remembered for batches of many adapters does not grow with the batches seen."""
    layer = model.base_model.model.lin0
    for i in range(6):
        model.add_adapter(f"n{i}", inlay.LoraConfig(r=2, target_modules=["lin0"]))
    with torch.no_grad():
        for i in range(200):
            names = [f"n{(i * k) % 6}" for k in (1, 2, 3)] + ["a"]
            model(x, adapter_names=names)
            layer.lora_A.a.weight = nn.Parameter(layer.lora_A.a.weight.detach().clone())
    assert len(layer._memo._known) <= 64


def test_warnings_are_said_once(model: inlay.PeftModel) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.unmerge_adapter()
        model.merge_adapter()
        model.merge_adapter()
    assert len(caught) == 2, [str(w.message) for w in caught]


@pytest.mark.parametrize("config", [inlay.LoraConfig, inlay.AdaLoraConfig])
def test_the_dropout_is_a_module_whose_rate_counts(mlp: nn.Module, x: Tensor, config: Any) -> None:
    more = {"total_step": 9} if config is inlay.AdaLoraConfig else {}
    model = inlay.get_peft_model(mlp, config(target_modules=["lin0", "lin1"], lora_dropout=0.5, **more)).train()
    disturb(model)
    layer = model.base_model.model.lin0
    assert not torch.equal(model(x), model(x))
    other = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    same_bits(model(x), model(x))
    assert not torch.equal(other(x), other(x))
    assert other.base_model.model.lin0.lora_dropout["default"].p == 0.5
    layer.lora_dropout["default"].p = 0.9
    assert layer.lora_dropout["default"](torch.ones(100)).eq(0).any()
    assert layer.lora_dropout["default"].eval()(torch.ones(100)).eq(1).all()
    assert "lora_dropout" in layer.other_param_names
    assert "lora_dropout" not in layer.adapter_layer_names
    assert not [key for key in model.state_dict() if "dropout" in key]
    model.add_adapter("b", config(target_modules=["lin0"], **{**more, **({"inference_mode": True} if more else {})}))
    assert {name: rate.p for name, rate in layer.lora_dropout.items()} == {"default": 0.9, "b": 0.0}
    model.delete_adapter("b")
    assert list(layer.lora_dropout.keys()) == ["default"]


def test_slots_that_an_adapter_has_elsewhere_read_as_empty() -> None:
    model = handle(nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)), target_modules=["0", "1"], use_dora=False)
    linear, table = model.base_model.model
    for layer, names in ((linear, ["lora_embedding_A", "lora_magnitude_vector"]), (table, ["lora_A", "lora_B"])):
        for name in names:
            assert len(getattr(layer, name)) == 0
            assert "a" not in getattr(layer, name)
            assert name not in layer.adapter_layer_names
    assert "a" in linear.lora_A
    assert "a" in table.lora_embedding_A
    with pytest.raises(AttributeError):
        linear.hada_w1_a  # noqa: B018


def test_a_dropout_that_a_swap_brings_is_a_module_too(mlp: nn.Module, x: Tensor) -> None:
    other = inlay.get_peft_model(copy.deepcopy(mlp), inlay.LoraConfig(target_modules=["lin0"], lora_dropout=0.5))
    model = inlay.get_peft_model(mlp, inlay.LoraConfig(target_modules=["lin0"])).train()
    assert not [m for m in model.base_model.model.lin0.modules() if isinstance(m, nn.Dropout)]
    disturb(other)
    inlay.hotswap_adapter_from_model(model, other, "default")
    assert not torch.equal(model(x), model(x))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    same_bits(model(x), model(x))


# ---------------------------------------------------------------------- one layer alone


def layer_of(model: inlay.PeftModel, name: str = "lin0") -> Any:
    return getattr(model.base_model.model, name)


@pytest.mark.parametrize("values", [((3, 6), {}), ((), {"r": 3, "lora_alpha": 6}), ((3,), {"lora_alpha": 6})])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_layer_alone_gets_an_adapter_or_starts_one_anew(
    model: inlay.PeftModel, x: Tensor, name: str, values: tuple[Any, Any]
) -> None:
    before, layer = model(x), layer_of(model)
    config = inlay.LoraConfig(use_dora=True, target_modules=["lin0"])
    layer.update_layer(name, *values[0], config=config, **values[1])
    assert layer.r[name] == 3
    assert layer.scaling[name] == 2.0
    assert layer.lora_A[name].weight.shape[0] == 3
    assert layer.active_adapters == ["a"]
    assert layer.lora_A["a"].weight.requires_grad
    assert layer.lora_A[name].weight.requires_grad == (name == "a")
    same_bits(layer.base_layer(torch.ones(1, 10)), layer_of(model).base_layer(torch.ones(1, 10)))
    assert torch.equal(model(x), before) == (name == "b")
    if name == "a":  # and without what only the old one had
        layer.update_layer("a", 3, 6, config=inlay.LoraConfig(target_modules=["lin0"]))
        assert "lora_magnitude_vector" not in layer.adapter_layer_names
        close(layer(torch.ones(1, 10)), layer.base_layer(torch.ones(1, 10)))


def test_a_layer_keeps_what_it_has_where_another_cannot_be(model: inlay.PeftModel) -> None:
    layer, config = layer_of(model), inlay.LoraConfig(target_modules=["lin0"])
    with raises_and_leaves(model, ConfigError, "r must be in"):
        layer.update_layer("b", 0, 6, config=config)
    with raises_and_leaves(model, UnsupportedLayerError, "even"):
        layer.update_layer("b", 3, config=inlay.LoraConfig(init_lora_weights="orthogonal"))
    with raises_and_leaves(model, ConfigError, "unexpected keyword argument 'lora_alpah'"):
        layer.update_layer("b", 2, lora_alpah=6, config=config)
    layer.merge()
    with raises_and_leaves(model, MergeError, "unmerge"):
        layer.update_layer("b", 2, 6, config=config)
    with raises_and_leaves(model, MergeError, "unmerge"):
        layer.set_base_weight(torch.ones(20, 10))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_an_adapter_starts_anew(model: inlay.PeftModel, x: Tensor, init: Any) -> None:
    layer = layer_of(model)
    down = layer.lora_A["a"].weight
    before = down.detach().clone()
    layer.reset_lora_parameters("a", False)
    layer.reset_lora_parameters("nobody", True)
    same_bits(down, before)
    base = nn.Linear(10, 20)
    torch.manual_seed(3)
    fresh = Adapted.around(base, "a", inlay.LoraConfig(init_lora_weights=init), 4)
    torch.manual_seed(3)
    layer.reset_lora_parameters("a", init_lora_weights=init)
    assert layer.lora_A["a"].weight is down
    same_bits(down, fresh.lora_A["a"].weight)
    assert not torch.equal(down, before)
    close(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("init", ["bogus", None, "pissa"])
def test_no_start_is_no_start(model: inlay.PeftModel, init: Any) -> None:
    with raises_and_leaves(model, ConfigError, "Unknown initialization"):
        layer_of(model).reset_lora_parameters("a", init)


def test_an_adapter_with_an_offset_starts_anew_as_it_did(mlp: nn.Module, x: Tensor) -> None:
    layer = layer_of(handle(mlp, init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match="Unknown"):
        layer.reset_lora_parameters("a", True)
    layer.reset_lora_parameters("a", "pissa")
    close(layer(x), layer.base_layer(x))


def test_the_frozen_weight_is_read_and_written(model: inlay.PeftModel) -> None:
    layer = layer_of(model)
    weight = layer.base_layer.weight
    assert layer.get_base_weight().requires_grad is False
    same_bits(layer.get_base_weight(), weight)
    layer.set_base_weight(torch.ones_like(weight))
    assert layer.base_layer.weight is weight
    assert weight.sum() == weight.numel()
    assert layer.quantization_backend is None


def test_small_things_that_users_of_peft_read(mlp: nn.Module, tiny: Tiny) -> None:
    layer = layer_of(inlay.get_peft_model(mlp, inlay.LoraConfig(target_modules=["lin0"])))
    assert layer._get_available_adapters() == {"default"}
    assert layer._active_adapter == ["default"]
    assert layer._disable_adapters is False
    assert (layer.fan_in_fan_out, layer.is_target_conv_1d_layer, layer.is_feedforward) == (False, False, False)
    layer._move_adapter_to_device_of_base_layer("default")
    gpt2 = tiny("gpt2")
    inlay.get_peft_model(gpt2, inlay.IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]))
    found = {type(w.base_layer).__name__: w for _, w in wrappers(gpt2)}
    assert found["Conv1D"].fan_in_fan_out
    assert {w.is_feedforward for _, w in wrappers(gpt2)} == {True, False}


# ---------------------------------------------------------------------- the tuner alone


@pytest.mark.parametrize("keys", [None, ["lin1.lora_A.weight"]])
def test_a_tuner_puts_in_what_has_a_config(mlp: nn.Module, keys: list[str] | None) -> None:
    tuner = Tuner(mlp)
    with pytest.raises(UnknownAdapterError):
        tuner.inject_adapter(mlp, "a")
    for name in ("a", "b"):
        tuner.peft_config[name] = inlay.LoraConfig(r=2, target_modules=["lin0"])
    state = None if keys is None else dict.fromkeys(keys, torch.zeros(1))
    with nullcontext() if keys is None else pytest.warns(PeftWarning, match="name different layers"):
        tuner.inject_adapter(mlp, "a", state_dict=state)
    assert tuner.targeted_module_names == (["lin0"] if keys is None else ["lin1"])
    tuner.inject_adapter(mlp, "b")
    assert tuner.active_adapters == ["a"]
    assert {n.split(".")[2] for n, p in mlp.named_parameters() if p.requires_grad} == {"a"}
    assert tuner.tuner_layer_cls is Adapted
    assert tuner.target_module_mapping["llama"] == ["q_proj", "v_proj"]
    with pytest.raises(AttributeError):
        tuner.rankallocator  # noqa: B018


@pytest.mark.parametrize("active", [["a"], ["b"], ["a", "b"]])
def test_a_tuner_puts_an_adapter_in_the_place_of_its_name(mlp: nn.Module, active: list[str]) -> None:
    tuner = inlay.PeftMixedModel(mlp, inlay.AdaLoraConfig(target_modules=["lin0"], total_step=9), "a").base_model
    tuner.peft_config["b"] = inlay.LoraConfig(target_modules=["lin0"])
    tuner.inject_adapter(mlp, "b")
    tuner.set_adapter(active)
    tuner.peft_config["a"] = inlay.LoraConfig(r=3, target_modules=["lin0", "lin1"])
    tuner.inject_adapter(mlp, "a")
    assert dict(mlp.get_submodule("lin0").r) == {"a": 3, "b": 8}
    assert tuner.active_adapters == active
    assert mlp.get_submodule("lin0").active_adapters == active
    assert {n.split(".")[2] for n, p in mlp.named_parameters() if p.requires_grad} == set(active)
    assert not list(tuner.trained())


@pytest.mark.parametrize(
    "config", [inlay.LoraConfig(), inlay.IA3Config(feedforward_modules=[]), inlay.LoHaConfig(), inlay.LoKrConfig()]
)
def test_a_layer_in_no_model(config: Any, x: Tensor) -> None:
    base = nn.Linear(10, 6)
    layer = Adapted.around(base, "a", config)
    assert layer.active_adapters == ["a"]
    assert all(p.requires_grad for p in layer.parameters())
    close(layer(x), base(x))
    disturb(layer)
    after = layer(x)
    assert not torch.equal(after, base(x))
    layer.merge()
    close(base(x), after)
    layer.unmerge()
    assert inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"]), nn.Sequential(layer), "b")[0] is layer


@pytest.mark.parametrize("base", [nn.ReLU(), nn.MultiheadAttention(4, 2)])
def test_no_layer_to_be_put_around(base: nn.Module) -> None:
    with pytest.raises(UnsupportedLayerError, match="alone cannot be adapted"):
        Adapted.around(base, "a", inlay.LoraConfig())


def test_a_tuner_of_prompts_has_no_targets(llama: nn.Module) -> None:
    config = inlay.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuner = inlay.get_peft_model(llama, config).base_model
    with pytest.raises(AttributeError):
        tuner.target_module_mapping  # noqa: B018
    tuner.peft_config["b"] = config
    with pytest.raises(ConfigError):
        tuner.inject_adapter(tuner.model, "b")


def test_a_slots_module_tells_what_a_linear_layer_there_would(mlp: nn.Module) -> None:
    model = inlay.get_peft_model(mlp, inlay.LoraConfig(r=3, target_modules=["lin0"], lora_bias=True))
    layer = model.base_model.model.lin0
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    assert (down.in_features, down.out_features) == (layer.in_features, 3)
    assert (up.in_features, up.out_features) == (3, layer.out_features)
    assert down.bias is None
    assert up.bias.shape == (layer.out_features,)
    assert [n for n, _ in down.named_parameters()] == ["weight"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = down.nothing
    convolution = inlay.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3)), inlay.LoraConfig(target_modules=["0"]))
    assert not hasattr(convolution.base_model.model[0].lora_A["default"], "in_features")


@pytest.mark.parametrize("how", ["set_requires_grad", "injected", "loaded"])
def test_setting_an_adapter_freezes_whatever_was_trained(mlp: nn.Module, tmp_path: Path, how: str) -> None:
    config = inlay.LoraConfig(r=2, target_modules=["lin0"])
    if how == "injected":
        for name in ("a", "b"):
            inlay.inject_adapter_in_model(config, mlp, name)
        verbs: Any = functional
        args: tuple[Any, ...] = (mlp,)
    else:
        verbs, args = inlay.get_peft_model(mlp, config, "a"), ()
        verbs.save_pretrained(tmp_path)
        if how == "loaded":
            verbs.load_adapter(tmp_path / "a", "b", is_trainable=True)
        else:
            verbs.add_adapter("b", config)
            verbs.set_requires_grad("b")

    def trained() -> set[str]:
        return {name.split(".")[-2] for name, p in mlp.named_parameters() if p.requires_grad}

    assert trained() == {"a", "b"}
    for name in ("a", "b", "a"):
        verbs.set_adapter(*args, name)
        assert trained() == {name}
