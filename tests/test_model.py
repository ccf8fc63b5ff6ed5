"""The handle at its edges: what other code does around, before and after it, and what it must refuse by name."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from laws import adapter_tensors, bits, close, disturb, same_bits, same_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from inlay.adapted import Adapted
from inlay.errors import (
    AdapterNameError,
    ConfigError,
    LoadError,
    MergeError,
    NonFiniteError,
    PlanError,
    UnknownArchitectureError,
    UnsupportedLayerError,
    UnwritableError,
)
from inlay.formats.files import reseal
from inlay.trained import ModulesToSaveWrapper
from inlay.walk import wrappers

Tiny = Callable[[str], nn.Module]


def config(*targets: str, **fields: Any) -> inlay.LoraConfig:
    return inlay.LoraConfig(target_modules=list(targets), r=fields.pop("r", 2), **fields)


def spread(model: nn.Module, adapter_name: str, seed: int) -> None:
    """Moves one adapter to values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapter_tensors(model).items():
            if f".{adapter_name}." in f"{name}.":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def two(base: nn.Module, *targets: str, b: tuple[str, ...] | None = None) -> inlay.PeftModel:
    """A handle with the adapters "a" and "b", in eval mode."""
    model = inlay.get_peft_model(base, config(*targets), adapter_name="a")
    model.add_adapter("b", config(*(b or targets)))
    spread(model, "a", 1)
    spread(model, "b", 2)
    return model.eval()


def apart(a: Tensor, b: Tensor) -> None:
    assert float((a - b).detach().abs().max()) > 1e-2, "nothing has changed"


@contextmanager
def raises_and_leaves(model: nn.Module, error: type[BaseException], match: str | None = None) -> Iterator[None]:
    tree = [(name, type(m)) for name, m in model.named_modules()]
    trained = [p.requires_grad for p in model.parameters()]
    state = bits(model)
    with pytest.raises(error, match=match):
        yield
    assert [(name, type(m)) for name, m in model.named_modules()] == tree
    assert [p.requires_grad for p in model.parameters()] == trained
    same_state(bits(model), state)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 10, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------- calls


def in_fresh_thread(work: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_rows_in_one_graph(mlp: nn.Module, x: Tensor, fields: dict[str, Any]) -> None:
    """Other rows of the same adapters take no other graph, and gradients pass."""
    model = inlay.get_peft_model(mlp, config("lin0", "lin1", **fields), adapter_name="a").eval()
    model.add_adapter("b", config("lin0", **fields))
    for seed, name in enumerate("ab"):
        spread(model, name, seed)
    model.set_requires_grad(["a", "b"])
    names = [["a", "b", "__base__"] * len(x), ["a", "__base__", "b"] * len(x)]
    factor = model.base_model.model.lin0.lora_B.b.weight

    def results() -> list[Tensor]:
        found = []
        for chosen in names:
            out = model(x, adapter_names=chosen[: len(x)])
            found += [out, *torch.autograd.grad(out.square().sum(), [factor])]
        return found

    wanted, counter = results(), torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    model.get_base_model().compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(results(), wanted)
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.parametrize("inner", [False, True], ids=["handle", "inner"])
def test_compiled_first_in_a_fresh_thread(mlp: nn.Module, x: Tensor, inner: bool) -> None:
    model = two(mlp, "lin0", "lin1")
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model if inner else model, backend="eager", fullgraph=True)
    wanted: dict[str, Tensor] = {}
    got: dict[str, Tensor] = {}

    def work() -> None:
        with torch.no_grad():
            got["a"] = compiled(x)
            with model.use_adapter("b"):
                got["b"], wanted["b"] = compiled(x), model(x)
            with model.disable_adapter():
                got["base"], wanted["base"] = compiled(x), model(x)
            got["again"] = compiled(x)
            wanted["a"] = wanted["again"] = model(x)

    in_fresh_thread(work)
    torch._dynamo.reset()
    apart(wanted["a"], wanted["b"])
    apart(wanted["a"], wanted["base"])
    for key in ("a", "b", "base", "again"):
        close(got[key], wanted[key])


@pytest.mark.parametrize("names", [["a", "b"], ["b", "__base__"]], ids=str)
def test_rows_after_a_name_was_used_again(mlp: nn.Module, x: Tensor, names: list[str]) -> None:
    model = two(mlp, "lin0", "lin1", b=("lin0",))
    at = names.index("b")
    with torch.no_grad():
        model(x[:2], adapter_names=names)
        model.delete_adapter("b")
        model.add_adapter("b", config("lin0", "lin1", "head"))
        spread(model, "b", 5)
        got = model(x[:2], adapter_names=names)
        with model.use_adapter("b"):
            close(got[at], model(x[:2])[at])
        apart(got[at], model(x[:2])[at])


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "__base__"]], ids=str)
def test_rows_of_inference_mode_then_with_a_gradient(mlp: nn.Module, x: Tensor, names: list[str]) -> None:
    model = two(mlp, "lin0", "lin1")
    model.set_requires_grad(["a", "b"], False)
    x = x[: len(names)]
    with torch.inference_mode():
        wanted = model(x, adapter_names=names).clone()
    x = x.clone().requires_grad_()
    got = model(x, adapter_names=names)
    got.square().sum().backward()
    close(got.detach(), wanted.clone())
    assert x.grad is not None
    assert bool(x.grad.any())


def test_naming_an_adapter_twice_runs_it_once(mlp: nn.Module, x: Tensor) -> None:
    model = two(mlp, "lin0", "lin1")
    with model.use_adapter("a"):
        wanted = model(x)
    with model.use_adapter(["a", "a"]):
        same_bits(model(x), wanted)
    model.set_adapter(["a", "a"])
    assert model.active_adapters == ["a"]
    same_bits(model(x), wanted)


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
def test_a_global_hook_keeps_the_frozen_layers_output(mlp: nn.Module, x: Tensor, rows: bool) -> None:
    wanted = mlp.lin0(x).detach().clone()
    model = two(mlp, "lin0")
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if module is model.base_model.model.lin0.base_layer:
            kept.append(out)

    hook = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        with torch.no_grad():
            model(x, **({"adapter_names": ["a", "b", "a"]} if rows else {}))
    finally:
        hook.remove()
    assert len(kept) == 1
    same_bits(kept[0], wanted)


class Scaled(nn.Linear):
    """A linear layer with a second argument."""

    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        return super().forward(x) * scale


class Calls(nn.Module):
    """Calls its layer as the function says."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


TWO = torch.tensor(2.0)
CALLS: dict[str, tuple[type[nn.Linear], tuple[float, ...], Callable[[Any, Tensor], Tensor]]] = {
    "input": (nn.Linear, (), lambda layer, x: layer(input=x)),
    "x": (Scaled, (), lambda layer, x: layer(x=x)),
    "x_scale": (Scaled, (2.0,), lambda layer, x: layer(x=x, scale=2.0)),
    "scale_x": (Scaled, (2.0,), lambda layer, x: layer(scale=2.0, x=x)),
    "positional": (Scaled, (2.0,), lambda layer, x: layer(x, scale=2.0)),
    "x_tensor": (Scaled, (2.0,), lambda layer, x: layer(x=x, scale=TWO)),
    "tensor_x": (Scaled, (2.0,), lambda layer, x: layer(scale=TWO, x=x)),
}


@pytest.mark.parametrize("rows", [False, True], ids=["whole", "rows"])
@pytest.mark.parametrize("how", list(CALLS))
def test_layers_called_by_keyword(how: str, rows: bool) -> None:
    """The result is that of the same call by position."""
    cls, more, call = CALLS[how]
    base = Calls(cls(4, 4), lambda layer, x: layer(x, *more))
    model = two(base, "layer")
    x = torch.randn(2, 4)
    fields = {"adapter_names": ["a", "b"]} if rows else {}
    with torch.no_grad():
        wanted = model(x, **fields)
        base.call = call
        close(model(x, **fields), wanted)
        with model.disable_adapter():
            apart(model(x), wanted)


# ---------------------------------------------------------------- merged


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Path:
    model = inlay.get_peft_model(tiny("mlp"), config("lin0", "lin1"))
    spread(model, "default", 9)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("keep_base", [True, False], ids=["kept", "gone"])
def test_a_merged_adapter_is_not_loaded_over(mlp: nn.Module, x: Tensor, saved: Path, keep_base: bool) -> None:
    model = inlay.get_peft_model(mlp, config("lin0", "lin1")).eval()
    spread(model, "default", 4)
    unmerged = model(x)
    tensors = load_file(saved / "adapter_model.safetensors")
    model.merge_adapter(keep_base=keep_base)
    with raises_and_leaves(model, MergeError, "merged"):
        model.load_adapter(saved, "default")
    with raises_and_leaves(model, MergeError, "merged"):
        inlay.set_peft_model_state_dict(model, tensors)
    model.unmerge_adapter()
    close(model(x), unmerged)
    model.load_adapter(saved, "default")
    apart(model(x), unmerged)


@pytest.mark.parametrize("change", ["scale", "weight", "data"])
def test_what_was_merged_is_what_is_subtracted(mlp: nn.Module, change: str) -> None:
    before = {name: getattr(mlp, name).weight.detach().clone() for name in ("lin0", "lin1")}
    model = inlay.get_peft_model(mlp, config("lin0", "lin1"))
    disturb(model)
    model.merge_adapter(keep_base=False)
    for _, layer in model.base_model.layers():
        up = layer.lora_B["default"].weight
        if change == "scale":
            layer.set_scale("default", 3.0)
        elif change == "weight":
            with torch.no_grad():
                up.add_(1)
        else:
            up.data.mul_(5)
    model.unmerge_adapter()
    for name, W in before.items():
        close(getattr(mlp, name).base_layer.weight, W, 1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_of_bart_merged_and_saved(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    base = BartForConditionalGeneration(
        BartConfig(vocab_size=50, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **shape)
    ).eval()
    batch = {"input_ids": torch.randint(3, 50, (2, 6)), "decoder_input_ids": torch.randint(3, 50, (2, 4))}
    with torch.no_grad():
        plain = base(**batch).logits
        model = inlay.get_peft_model(base, config("lm_head"))
        disturb(model)
        model.eval()
        wanted = model(**batch).logits
        apart(wanted, plain)
        with pytest.warns(inlay.PeftWarning, match="tie_word_embeddings"):
            merged: Any = model.merge_and_unload()
        close(merged(**batch).logits, wanted)
        merged.save_pretrained(tmp_path)
        again = BartForConditionalGeneration.from_pretrained(tmp_path).eval()
        close(again(**batch).logits, wanted)


# ---------------------------------------------------------------- models of other shapes


class Attends(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(8, 2, batch_first=True, **fields)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.att(x, x, x)[0]
        return h


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("how", list(COPIES))
def test_a_copied_attention_takes_another_adapter(how: str) -> None:
    model = inlay.get_peft_model(Attends(), config("att"), adapter_name="a")
    spread(model, "a", 1)
    model.eval()
    x = torch.randn(2, 3, 8)
    wanted = model(x)
    other = COPIES[how](model)
    same_bits(other(x), wanted)
    other.add_adapter("b", config("att"))
    spread(other, "b", 2)
    close(other(x), wanted)
    with other.use_adapter("b"):
        apart(other(x), wanted)
    outs = [name for name, w in wrappers(other) if isinstance(w, Adapted) and "out_proj" in name]
    assert len(outs) == 1
    assert not any(name.count("base_layer") > 2 for name, _ in other.named_parameters())
    assert sorted(inlay.get_peft_model_state_dict(other, adapter_name="a")) == sorted(
        inlay.get_peft_model_state_dict(model, adapter_name="a")
    )
    same_bits(model(x), wanted)


class Positions(nn.Embedding):
    """Looks up positions, not what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(2, 2 + x.shape[-1]).expand(x.shape))


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def test_a_lazy_layer_is_refused_as_a_target_and_left_alone_elsewhere() -> None:
    base = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(UnsupportedLayerError, match=r"\b0\b.*no shape"):
        inlay.get_peft_model(base, inlay.LoraConfig(target_modules=["0"]))
    assert [type(m) for m in base] == [nn.LazyLinear, nn.Linear]
    assert all(p.requires_grad for p in base.parameters())
    model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=["1"]))
    model(torch.ones(2, 3)).sum().backward()
    assert not any(p.requires_grad for p in base[0].parameters())


def test_making_a_model_of_transformers_warns_of_nothing(llama: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inlay.get_peft_model(llama, inlay.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_an_embedding_with_a_forward_of_its_own_is_refused() -> None:
    base = nn.Sequential(Positions(12, 4), nn.Linear(4, 2))
    with raises_and_leaves(base, UnsupportedLayerError, r"\b0\b"):
        inlay.get_peft_model(base, config("0"))


def test_an_embedding_that_scales_is_adapted_with_its_scale() -> None:
    base = nn.Sequential(ScaledEmbedding(12, 4))
    x = torch.tensor([[1, 5, 11]])
    plain = base(x)
    model = inlay.get_peft_model(base, config("0"))
    disturb(model)
    wanted = model(x)
    apart(wanted, plain)
    close(model.merge_and_unload()(x), wanted)


class Shared(nn.Module):
    """One module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.b(self.a(x))
        return h


def test_one_module_in_two_places() -> None:
    base: Any = Shared()
    layer = base.a
    x = torch.randn(2, 4)
    plain = base(x).detach()
    wrapped: Any = inlay.get_peft_model(base, config("a"))
    disturb(wrapped)
    assert isinstance(base.a, Adapted)
    assert base.a is base.b
    wanted = wrapped(x)
    W = base.a.weight + base.a.get_delta_weight("default")
    close(wanted, F.linear(F.linear(x, W, layer.bias), W, layer.bias))
    wrapped.merge_adapter()
    close(wrapped(x), wanted)
    wrapped.unmerge_adapter()
    close(wrapped(x), wanted)
    wrapped.unload()
    assert base.a is layer
    assert base.b is layer
    same_bits(base(x).detach(), plain)


class SharedBlock(nn.Module):
    """One block in two places, with an embedding and a norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"table": nn.Embedding(9, 4), "fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.layers = nn.ModuleList([nn.Identity(), self.first])

    def forward(self, ids: Tensor) -> Tensor:
        h: Tensor = self.first["table"](ids)
        for block in (self.first, self.layers[1]):
            h = block["norm"](block["fc"](h)) + block["table"](ids)
        return h


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["b"]},
        {"target_modules": ["b", "a"]},
        {"target_modules": "b", "rank_pattern": {"b": 3}},
    ],
    ids=str,
)
def test_any_name_of_a_module_in_two_places(fields: dict[str, Any], tmp_path: Path) -> None:
    base: Any = Shared()
    x = torch.randn(2, 4)
    model = inlay.get_peft_model(base, inlay.LoraConfig(**fields))
    disturb(model)
    wanted = model(x)
    assert base.a is base.b
    assert base.a.r["default"] == (3 if "rank_pattern" in fields else 8)
    assert [n for n, _ in model.named_parameters() if "lora_A" in n] == ["base_model.model.a.lora_A.default.weight"]
    model.save_pretrained(tmp_path)
    other = Shared()
    other.load_state_dict(model.unload().state_dict())
    close(inlay.PeftModel.from_pretrained(other, tmp_path)(x).detach(), wanted.detach())


FIELDS_OF_A_BLOCK: list[tuple[dict[str, Any], list[str]]] = [
    ({"target_modules": ["layers.1.fc"]}, ["first.fc"]),
    ({"target_modules": r"layers\..*fc"}, ["first.fc"]),
    ({"target_modules": ["fc"], "layers_to_transform": [1]}, ["first.fc"]),
    ({"target_modules": ["fc", "table"], "exclude_modules": ["layers.1.table"]}, ["first.fc"]),
    ({"target_modules": ["fc"], "modules_to_save": ["layers.1.norm"]}, ["first.fc", "first.norm"]),
    ({"target_modules": [], "target_parameters": ["layers.1.fc.weight"]}, ["first.fc"]),
    ({"target_modules": [], "trainable_token_indices": {"layers.1.table": [2, 5]}}, ["first.table"]),
]


@pytest.mark.parametrize(("fields", "names"), FIELDS_OF_A_BLOCK, ids=str)
def test_any_name_inside_a_module_in_two_places(fields: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    base: Any = SharedBlock()
    layers, ids = dict(base.first.items()), torch.arange(9)
    plain = base(ids).detach()
    told = inlay.explain(base, inlay.LoraConfig(**fields))
    assert {row.name.removesuffix(".weight") for row in told.rows} == set(names)
    assert not told.warnings
    model = inlay.get_peft_model(base, inlay.LoraConfig(**fields))
    assert base.layers[1] is base.first
    disturb(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0)
    wanted = model(ids).detach()
    apart(wanted, plain)
    model.save_pretrained(tmp_path)
    model.unload()
    assert all(base.layers[1][k] is layer is base.first[k] for k, layer in layers.items())
    same_bits(base(ids).detach(), plain)
    close(inlay.PeftModel.from_pretrained(base, tmp_path)(ids).detach(), wanted)


class Stacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up @ self.down


def test_both_parameters_of_a_module_in_two_places() -> None:
    base: Any = Shared()
    base.a = base.b = stacks = Stacks()
    x = torch.randn(2, 4)
    plain = base(x).detach()
    model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=[], target_parameters=["b.up", "a.down"]))
    disturb(model)
    assert base.a is base.b
    wanted = model(x)
    apart(wanted, plain)
    close(model.merge_and_unload()(x), wanted)
    assert base.a is stacks is base.b


class SavedShared(Shared):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(4, 4)
        self.d = self.c

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.d(super().forward(x)) + self.c(x)
        return h


def test_a_module_in_two_places_is_trained_whole_at_both() -> None:
    base: Any = SavedShared()
    x = torch.randn(2, 4)
    model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=["b"], modules_to_save=["d"]))
    assert base.c is base.d
    assert isinstance(base.c, ModulesToSaveWrapper)
    disturb(model)
    with torch.no_grad():
        base.c.modules_to_save["default"].weight.add_(1)
    wanted = model(x)
    merged: Any = model.merge_and_unload()
    assert merged.c is merged.d
    close(merged(x), wanted)


def test_one_module_in_two_places_merged_for_good() -> None:
    base: Any = Shared()
    layer = base.a
    x = torch.randn(2, 4)
    model = inlay.get_peft_model(base, config("a"))
    disturb(model)
    wanted = model(x)
    merged: Any = model.merge_and_unload()
    assert merged.a is layer
    assert merged.b is layer
    close(merged(x), wanted)


def test_a_vision_transformer_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    base = ViTModel(ViTConfig(hidden_size=16, intermediate_size=24, **shape)).eval()
    other = copy.deepcopy(base)
    x = torch.randn(2, 3, 16, 16)
    model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules="all-linear", r=2)).eval()
    with torch.no_grad():
        plain = model(x).last_hidden_state
        disturb(model)
        wanted = model(x).last_hidden_state
        apart(wanted, plain)
        model.save_pretrained(tmp_path)
        loaded = inlay.PeftModel.from_pretrained(other, tmp_path)
        same_bits(loaded(x).last_hidden_state, wanted)


ENCODER_TARGETS: list[list[str] | str] = [
    ["linear1"],
    ["linear1", "linear2"],
    ["self_attn"],
    ["linear1", "self_attn"],
    "all-linear",
]


def _layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
def test_nested_tensors_of_an_encoder(targets: list[str] | str) -> None:
    nested = nn.TransformerEncoder(_layer(), 2).eval()
    plain = nn.TransformerEncoder(_layer(), 2, enable_nested_tensor=False).eval()
    plain.load_state_dict(nested.state_dict())
    assert nested.enable_nested_tensor
    x = torch.randn(3, 4, 8)
    mask = torch.arange(4) >= torch.tensor([[2], [4], [3]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        before = nested(x, src_key_padding_mask=mask)
        outs = []
        for base in (nested, plain):
            model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=targets, r=2)).eval()
            spread(model, "default", 1)
            outs.append(model(x, src_key_padding_mask=mask)[~mask])
            close(model.train()(x, src_key_padding_mask=mask)[~mask], outs[-1])
            model.eval()
            assert not base.use_nested_tensor
            assert model.unload() is base
            assert base.use_nested_tensor is (base is nested)
    apart(outs[0], before[~mask])
    close(*outs)


def test_nested_tensors_of_an_encoder_are_back_after_merging() -> None:
    encoder = nn.Sequential(nn.TransformerEncoder(_layer(), 2))
    model = inlay.get_peft_model(encoder, inlay.LoraConfig(target_modules="all-linear"))
    assert not encoder[0].use_nested_tensor
    model.merge_and_unload()
    assert encoder[0].use_nested_tensor is True


@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
def test_an_encoder_layer_by_itself(targets: list[str] | str) -> None:
    base = _layer().eval()
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        before = base(x)
        model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=targets, r=2)).eval()
        disturb(model)
        got = model(x)
        apart(got, before)
        close(got, model.train()(x))
        model.eval()
        close(model.merge_and_unload().eval()(x), got)


# ---------------------------------------------------------------- layers that are refused


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


def _packed(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm_old": lambda: _old_weight_norm(nn.Linear(4, 4)),
    "weight_norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "packed": lambda: _packed(nn.Linear(4, 4)),
    "kdim": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
}


@pytest.mark.parametrize("layer", list(REFUSED))
def test_layers_that_are_refused(layer: str) -> None:
    base = nn.ModuleDict({"fine": nn.Linear(4, 4), "odd": REFUSED[layer]()})
    with raises_and_leaves(base, UnsupportedLayerError, r"\bodd\b"):
        inlay.get_peft_model(base, config("fine", "odd"))


def test_tokens_and_an_adapter_on_two_tied_layers_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, **shape))
    with raises_and_leaves(base, PlanError, "tied"):
        inlay.get_peft_model(base, config("lm_head", trainable_token_indices=[1, 2]))


# ---------------------------------------------------------------- files


def test_values_beyond_the_models_dtype_are_refused(mlp: nn.Module, tiny: Tiny, tmp_path: Path) -> None:
    model = inlay.get_peft_model(mlp, config("lin0"))
    with torch.no_grad():
        for p in adapter_tensors(model).values():
            p.fill_(1e6)
    model.save_pretrained(tmp_path)
    half = tiny("mlp").half()
    with raises_and_leaves(half, NonFiniteError):
        inlay.PeftModel.from_pretrained(half, tmp_path, autocast_adapter_dtype=False)
    loaded = inlay.PeftModel.from_pretrained(half, tmp_path)  # kept in fp32, they fit
    assert all(bool((p == 1e6).all()) for p in adapter_tensors(loaded).values())


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_tensors_that_are_no_real_numbers_are_refused(mlp: nn.Module, saved: Path, dtype: torch.dtype) -> None:
    path = saved / "adapter_model.safetensors"
    tensors = {k: t.to(dtype) for k, t in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)
    with raises_and_leaves(mlp, LoadError):
        inlay.PeftModel.from_pretrained(mlp, saved)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize("by", ["file", "constructor"])
def test_a_number_beyond_all_bounds(mlp: nn.Module, saved: Path, by: str, field: str) -> None:
    if by == "constructor":
        with raises_and_leaves(mlp, ConfigError):
            inlay.get_peft_model(mlp, config("lin0", **{field: 10**400}))
        return
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 10**400}))
    reseal(saved)
    with raises_and_leaves(mlp, ConfigError):
        inlay.PeftModel.from_pretrained(mlp, saved)


@pytest.mark.parametrize("what", ["bytes", "directory"])
def test_a_card_that_cannot_be_updated_stops_the_save_first(mlp: nn.Module, tmp_path: Path, what: str) -> None:
    model = two(mlp, "lin0")
    readme = tmp_path / "README.md"
    if what == "directory":
        readme.mkdir()
    else:
        readme.write_bytes(b"---\n\xff\xfe: [\n---\n")
    with pytest.raises(UnwritableError, match="README"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.rglob("*")) == [readme]


# ---------------------------------------------------------------- arguments


def test_none_is_no_name(mlp: nn.Module, tiny: Tiny, saved: Path) -> None:
    none: Any = None
    with raises_and_leaves(mlp, AdapterNameError):
        inlay.get_peft_model(mlp, config("lin0"), adapter_name=none)
    with raises_and_leaves(mlp, AdapterNameError):
        inlay.inject_adapter_in_model(config("lin0"), mlp, adapter_name=none)
    model = inlay.get_peft_model(tiny("mlp"), config("lin0"))
    with raises_and_leaves(model, AdapterNameError):
        model.add_adapter(none, config("lin0"))
    with raises_and_leaves(model, AdapterNameError):
        model.load_adapter(saved, none)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("wrong", [None, {"r": 3}, "lora"], ids=str)
def test_what_is_no_config(mlp: nn.Module, tiny: Tiny, wrong: Any) -> None:
    with raises_and_leaves(mlp, ConfigError):
        inlay.get_peft_model(mlp, wrong)
    with raises_and_leaves(mlp, ConfigError):
        inlay.PeftModel(mlp, wrong)
    with raises_and_leaves(mlp, ConfigError):
        inlay.inject_adapter_in_model(wrong, mlp)
    model = inlay.get_peft_model(tiny("mlp"), config("lin0"))
    with raises_and_leaves(model, ConfigError):
        model.add_adapter("b", wrong)
    assert list(model.peft_config) == ["default"]


def test_a_model_whose_config_names_no_type(mlp: nn.Module) -> None:
    mlp.config = SimpleNamespace(hidden=3)
    with raises_and_leaves(mlp, UnknownArchitectureError):
        inlay.get_peft_model(mlp, inlay.LoraConfig(r=2))
