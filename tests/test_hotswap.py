"""Swapping: what stands in a loaded adapter's place afterwards is what a fresh load would have given."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from laws import STORAGE, Case, bits, cases, close, differs, disturb, same_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from inlay import hotswap
from inlay.adapted import Adapted
from inlay.config import AdapterConfig
from inlay.errors import (
    BaseGoneError,
    BusyError,
    ConfigError,
    CorruptFileError,
    FileError,
    HotswapError,
    LoadError,
    LostRoutingError,
    MissingFileError,
    MoreLayersError,
    NonFiniteError,
    PeftWarning,
    PlanError,
    UnknownAdapterError,
    UnknownArgumentError,
)
from inlay.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_model,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from inlay.walk import wrappers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dropout has no effect there"),
    pytest.mark.filterwarnings("ignore:.* does not divide a layer's width"),
    pytest.mark.filterwarnings("ignore:Merged into 1 packed weights"),
]

RANKS, ALPHAS, MOST = (2, 8, 13, 16), (1, 16, 32), 16
LAYERS = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.q(h) * self.v(h))


class Net(nn.Module):
    """An embedding, two layers of two linears each, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        for layer in self.layers:
            h = layer(h)
        out: Tensor = self.head(h)
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def ids() -> Tensor:
    return torch.arange(10).reshape(2, 5)


def lora(r: int = 4, alpha: float = 8, targets: Any = ("q", "v"), **fields: Any) -> inlay.LoraConfig:
    return inlay.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=fields.pop("init", False), **fields
    )


def adapted(config: AdapterConfig | None = None, seed: int = 1, name: str = "default") -> inlay.PeftModel:
    """A net with an adapter that does something."""
    model = inlay.get_peft_model(net(), config or lora(), adapter_name=name).eval()
    with torch.no_grad():
        torch.manual_seed(seed)
        for p in laws.adapter_tensors(model).values():
            p.add_(torch.randn(p.shape) * 0.3)
        for key, p in model.named_parameters():
            if p.requires_grad and "lora" not in key:  # modules trained whole, biases
                p.add_(torch.randn(p.shape) * 0.3)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter of a config; the folder."""

    def save(config: AdapterConfig | None = None, seed: int = 2) -> Path:
        folder = tmp_path / f"saved{len(list(tmp_path.iterdir()))}"
        adapted(config, seed).save_pretrained(folder)
        return folder

    return save


def loaded(folder: Path) -> inlay.PeftModel:
    return inlay.PeftModel.from_pretrained(net(), folder).eval()


def same_files(model: inlay.PeftModel, folder: Path, name: str = "default") -> None:
    """What the model saves of the adapter is what the folder holds."""
    again = folder.with_name(f"{folder.name} again")
    model.save_pretrained(again, selected_adapters=[name])
    again = again if name == "default" else again / name
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes(), file


def pointers(model: nn.Module) -> dict[str, int]:
    """Where every parameter and every scale is."""
    found = {name: p.data_ptr() for name, p in model.named_parameters()}
    for path, w in wrappers(model):
        for name, method in w.methods.items() if isinstance(w, Adapted) else ():
            if isinstance(method.scaling, Tensor):
                found[f"{path} {name}"] = method.scaling.data_ptr()
    return found


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---------------------------------------------------------------- a swap is a load, for every method on every kind


def other_than(case: Case, folder: Path) -> Tensor:
    """Saves an adapter of the same config with other values; what its model gives."""
    model = case.adapted()
    for p in laws.adapter_tensors(model).values():
        p.mul_(1.5)
    model.save_pretrained(folder)
    out: Tensor = model(case.inputs())
    return out


def swapped_equals_loaded(case: Case, folder: Path) -> None:
    x, model = case.inputs(), case.adapted()
    model.save_pretrained(folder / "first")
    base, before = case.base()(x), model(x)
    prepare_model_for_compiled_hotswap(model)
    places = pointers(model)
    close(model(x), before)
    expected = other_than(case, folder / "second")
    hotswap_adapter(model, folder / "second" / "a", "a")
    close(model(x), expected)
    differs(model, x, base)
    assert pointers(model) == places
    same_files(model, folder / "second" / "a", "a")
    if case.merges:
        frozen = {k: t for k, t in bits(model).items() if ".a" not in k}
        model.merge_adapter()
        merged = bits(model)
        hotswap_adapter(model, folder / "first" / "a", "a")
        assert model.base_model.model.m.merged_adapters == ["a"]
        assert any(not torch.equal(t, merged[k]) for k, t in bits(model).items() if ".a" not in k)
        again = case.adapted()
        again.merge_adapter()
        close(model(x), again(x))
        model.unmerge_adapter()
        same_state({k: t for k, t in bits(model).items() if ".a" not in k}, frozen)
    hotswap_adapter(model, folder / "first" / "a", "a")
    close(model(x), before)
    assert pointers(model) == places


def marks(case: Case) -> list[Any]:
    """`slow` for what differs in numbers only from what every method is shown by, or in tensors from DoRA and bias."""
    shows = case.option in (next(iter(laws.OPTIONS[case.method])), "dora", "bias", "effective", "feed-forward")
    return case.marks if shows else [*STORAGE[case.storage].marks, pytest.mark.slow]


SWAPS = [pytest.param(case, marks=marks(case), id=case.id) for case in cases() if not case.way.converts]


@pytest.mark.parametrize("case", SWAPS)
def test_swapped_equals_loaded(case: Case, tmp_path: Path) -> None:
    swapped_equals_loaded(case, tmp_path)


def test_the_law_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = hotswap._Swap.write

    def forgetful(self: hotswap._Swap) -> None:
        self.into.popitem()
        original(self)

    monkeypatch.setattr(hotswap._Swap, "write", forgetful)
    with pytest.raises(AssertionError):
        swapped_equals_loaded(Case("LORA", "plain", "Linear"), tmp_path)


@pytest.mark.parametrize("option", ["plain", "dora", "bias"])
@pytest.mark.parametrize("kind", laws.KINDS)
def test_every_rank_fits_into_padded_slots(kind: str, option: str, tmp_path: Path) -> None:
    """The largest need not come first, and nothing moves."""
    if ("LORA", option, kind) in laws.UNSUPPORTED:
        pytest.skip("not a layer of this method")
    case = Case("LORA", option, kind)
    x, first = case.inputs(), case.adapted()
    before = first(x)
    first.hotswap_slots(MOST)
    close(first(x), before)
    places = pointers(first)
    ranks = [2, 8, 16, 4] if "grouped" in kind else [*RANKS, 3]
    for r, alpha in zip(ranks, (1, 16, 32, 5, 2), strict=False):
        other = inlay.get_peft_model(case.base(), case.config(r=r, lora_alpha=alpha), adapter_name="a")
        disturb(other)
        other.save_pretrained(tmp_path / f"{r}")
        hotswap_adapter(first, tmp_path / f"{r}" / "a", "a")
        close(first(x), other(x))
        assert pointers(first) == places
        same_files(first, tmp_path / f"{r}" / "a", "a")
        layer = first.base_model.model.m
        assert (layer.r["a"], layer.lora_alpha["a"]) == (r, alpha)
    # Padded rows are zeros, whatever stood there before.
    for key, t in layer.params("a").items():
        rest = t.clone()
        layer.methods["a"].room(key, rest).zero_()
        assert not rest.any() or key not in layer.methods["a"].rank_dims, key


# ---------------------------------------------------------------- what may differ


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        lora(alpha=1),
        lora(r=2, alpha=32),
        lora(use_rslora=True),
        lora(lora_dropout=0.5),
        lora(rank_pattern={"layers.1.q": 2}, alpha_pattern={"v": 3}),
        lora(r=3, alpha=5, targets=("layers.1.v",)),
        lora(targets=("q", "v"), layers_to_transform=[1]),
        lora(targets=("q", "v"), exclude_modules=["layers.0.v"]),
        inlay.LoraConfig(r=4, target_modules=r".*\.[qv]", init_lora_weights=False),
    ],
    ids=lambda config: str({k: v for k, v in config.to_dict().items() if v != lora().to_dict().get(k)}),
)
def test_configs_may_differ(config: inlay.LoraConfig, prepared: bool, saved: Callable[..., Path]) -> None:
    model, folder = adapted(), saved(config)
    if prepared:
        model.hotswap_slots(8)
    places = pointers(model)
    hotswap_adapter(model, folder, "default")
    close(model(ids()), loaded(folder)(ids()))
    assert pointers(model) == places
    same_files(model, folder)
    assert {w.scaling["default"].__class__ for _, w in wrappers(model) if isinstance(w, Adapted)} == {
        Tensor if prepared else float
    }
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    hotswap_adapter(model, folder, "default")
    close(torch.rand(3), drawn, 0)  # nobody's random numbers are used up
    back = saved(lora(), 3)  # and all layers again
    hotswap_adapter(model, back, "default")
    close(model(ids()), loaded(back)(ids()))
    assert pointers(model) == places
    same_files(model, back)


def test_a_larger_rank_without_slots_replaces_the_tensors(saved: Callable[..., Path]) -> None:
    model, folder = adapted(), saved(lora(r=8))
    places = pointers(model)
    hotswap_adapter(model, folder, "default")
    close(model(ids()), loaded(folder)(ids()))
    moved = {name for name, at in pointers(model).items() if at != places[name]}
    assert moved == {n for n in places if "lora_" in n}
    same_files(model, folder)


def test_slots_on_layers_that_the_first_adapter_leaves_out(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted(lora(r=2, targets=("layers.0.q",)))
    model.save_pretrained(tmp_path / "small")
    model.add_adapter("beside", lora(r=3, targets=("v",)))
    before = model(ids())
    model.hotswap_slots(MOST, targets=["q", "v", "emb"], adapter_name="default")
    close(model(ids()), before)
    assert model.active_adapters == ["default"]
    same_files(model, tmp_path / "small")  # what only keeps its place is in no file
    assert model.base_model.model.layers[0].v.lora_A["beside"].weight.shape == (3, 8)
    places = pointers(model)
    for config in (lora(r=13, alpha=3), lora(r=1, targets=("emb", "layers.1.v")), lora(r=16, targets=("q", "emb"))):
        folder = saved(config)
        hotswap_adapter(model, folder, "default")
        close(model(ids()), loaded(folder)(ids()))
        same_files(model, folder)
        assert pointers(model) == places
    assert not any(p.requires_grad for n, p in model.named_parameters() if "emb" in n)


def test_vacant_slots(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Layers that only keep a place are in no output, no file and no gradient, and serve when they are taken."""
    model = adapted(lora(r=2, targets=("layers.0.q",), use_dora=True))
    model.save_pretrained(tmp_path / "small")
    frozen, before = bits(net()), model(ids())
    model.hotswap_slots(8, targets=["q", "v", "head"])
    vacant = {path for path, w in wrappers(model) if w.methods["default"].vacant}
    assert vacant == {f"base_model.model.{at}" for at in ("head", *LAYERS) if at != "layers.0.q"}

    def as_before(one: inlay.PeftModel) -> None:
        close(one(ids()), before)
        rows = one(ids(), adapter_names=["default", "__base__"])
        close(rows[0], before[0])
        close(rows[1], net()(ids())[1])
        one.merge_adapter()
        close(one(ids()), before)
        one.unmerge_adapter()
        state = bits(one.get_base_model())
        same_state({k.replace("base_layer.", ""): t for k, t in state.items() if "lora" not in k}, frozen)
        same_files(one, tmp_path / "small")

    as_before(model)
    as_before(copy.deepcopy(model))
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        folder = saved(lora(r=5, alpha=3, targets=("q", "head"), use_dora=True), 4)
        hotswap_adapter(model, folder, "default")
        if merged:
            close(model(ids()), loaded(folder)(ids()))
            model.unmerge_adapter()
        close(model(ids()), loaded(folder)(ids()))
        same_files(model, folder)
        hotswap_adapter(model, tmp_path / "small", "default")
        as_before(model)
    model.add_adapter("b", lora(targets=("v",), use_dora=True))
    model.set_adapter("b")
    model.set_adapter("default")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "layers.0.q.lora" in n}  # what a file would lack
    model.delete_adapter("b")
    as_before(model)
    model.delete_adapter("default")
    close(model(ids()), net()(ids()), 0)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, autocast: bool, merged: bool, saved: Callable[..., Path]) -> None:
    """Of a base in 16 bits the adapters are in 32 unless told otherwise; their dtype, place and scale stay."""

    def load(folder: Path) -> inlay.PeftModel:
        return inlay.PeftModel.from_pretrained(net().to(dtype), folder, autocast_adapter_dtype=autocast).eval()

    first, second = saved(lora(r=4), 3), saved(lora(r=7, alpha=5, targets=("q", "emb")), 4)
    model, other = load(first), load(second)
    before = model(ids())
    model.hotswap_slots(8, targets=["q", "v", "emb"])
    places = pointers(model)
    if merged:
        model.merge_adapter()
        other.merge_adapter()
    hotswap_adapter(model, second, "default")
    out = model(ids())
    assert out.dtype == dtype
    torch.testing.assert_close(out, other(ids()), rtol=0.05, atol=0.05)
    if merged:
        model.unmerge_adapter()
    assert pointers(model) == places
    kept = torch.float32 if autocast else dtype
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {kept}
    for path, w in wrappers(other):
        mine = model.get_submodule(path)
        for key, t in w.params("default").items():
            close(mine.methods["default"].own({key: mine.params("default")[key]})[key], t, 0)
        assert mine.scaling["default"].dtype == torch.float32
    hotswap_adapter(model, first, "default")
    torch.testing.assert_close(model(ids()), before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_in_any_mode_of_autograd(mode: Callable[[], Any], saved: Callable[..., Path]) -> None:
    """A swap makes tensors that any later call can use, also where it replaces some."""
    for slots in (False, True):
        model, first, second = adapted(), saved(lora(r=7)), saved(lora(r=6, alpha=3, targets=("v",)), 3)
        with mode():
            if slots:
                model.hotswap_slots(8)
            hotswap_adapter(model, first, "default")
        assert all(p.is_leaf and not p.is_inference() for p in model.parameters())
        close(model(ids()), loaded(first)(ids()))
        with torch.enable_grad():
            model(ids()).sum().backward()
        with mode():
            hotswap_adapter(model, second, "default")
        hotswap_adapter(model, first, "default")
        close(model(ids()), loaded(first)(ids()))


def test_layers_that_the_config_has_and_the_tensors_have_not(saved: Callable[..., Path], tmp_path: Path) -> None:
    """They are the new adapter's, with zeros: what is saved then has all that its config names."""
    model, config = adapted(), lora(r=6, alpha=3)
    tensors = {k: t for k, t in load_file(saved(config) / "adapter_model.safetensors").items() if "0.q" in k}
    hotswap_adapter_from_state_dict(model, tensors, "default", config)
    close(model(ids()), loaded(saved(lora(r=6, alpha=3, targets=("layers.0.q",))))(ids()))
    model.save_pretrained(tmp_path / "again")
    close(loaded(tmp_path / "again")(ids()), model(ids()))


@pytest.mark.parametrize("method", ["IA3", "LOHA", "ADALORA", "OFT"])
def test_slots_of_other_methods(method: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "IA3": {"feedforward_modules": [], "init_ia3_weights": False},
        "LOHA": {"r": 2, "init_weights": False},
        "ADALORA": {"init_r": 2, "target_r": 1, "init_lora_weights": False},
        "OFT": {"oft_block_size": 4, "init_weights": False},
    }[method]
    make = inlay.methods.METHODS[method].config
    model = adapted(make(target_modules=["layers.0.q"], **fields))
    before = model(ids())
    model.hotswap_slots(targets=["q", "v"])
    close(model(ids()), before)
    adapted(make(target_modules=["q", "v"], **fields), 5).save_pretrained(tmp_path / "other")
    hotswap_adapter(model, tmp_path / "other", "default")
    close(model(ids()), loaded(tmp_path / "other")(ids()))
    same_files(model, tmp_path / "other")


def test_beside_other_adapters(saved: Callable[..., Path]) -> None:
    model, folder = adapted(), saved(lora(r=2, alpha=5))
    model.add_adapter("b", lora(r=3))
    model.hotswap_slots(4, adapter_name="default")
    rows, names = ids(), ["b", "default"]
    with model.use_adapter("b"):
        b = model(rows)
    model(rows, adapter_names=names)  # stacks the factors
    hotswap_adapter(model, folder, "default")
    with model.use_adapter("b"):
        close(model(rows), b, 0)
    close(model(rows, adapter_names=names), torch.stack([b[0], loaded(folder)(rows)[1]]))
    model.set_adapter(["default", "b"])
    other = loaded(folder)
    other.add_adapter("b", lora(r=3))
    hotswap_adapter_from_model(other, model, "b", "b")
    other.set_adapter(["default", "b"])
    close(model(rows), other(rows))


def test_modules_trained_whole_tokens_and_biases(saved: Callable[..., Path]) -> None:
    for fields in (
        {"modules_to_save": ["head"]},
        {"trainable_token_indices": {"emb": [1, 3]}},
        {"bias": "lora_only"},
        {"bias": "all"},
    ):
        config: Callable[[], inlay.LoraConfig] = lambda f=fields: lora(**copy.deepcopy(f))  # noqa: E731
        model, folder = adapted(config()), saved(config())
        places = pointers(model)
        hotswap_adapter(model, folder, "default")
        close(model(ids()), loaded(folder)(ids()))
        assert pointers(model) == places
        same_files(model, folder)


def test_a_tied_head_follows(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 13, bias=False)
            self.head.weight = self.emb.weight

    def make(seed: int, r: int, alpha: int) -> inlay.PeftModel:
        torch.manual_seed(0)
        base, config = Tied().eval(), lora(r=r, alpha=alpha, targets=("emb",), ensure_weight_tying=True)
        model = inlay.get_peft_model(base, config)
        torch.manual_seed(seed)
        for p in laws.adapter_tensors(model).values():
            p.copy_(torch.randn(p.shape))
        return model

    model, other = make(1, 4, 8), make(2, 3, 5)
    other.save_pretrained(tmp_path)
    model.hotswap_slots(8)
    hotswap_adapter(model, tmp_path, "default")
    close(model(ids()), other(ids()))
    assert isinstance(model.base_model.model.head.scaling["default"], Tensor)
    same_state(inlay.get_peft_model_state_dict(model), inlay.get_peft_model_state_dict(other))


def test_embeddings_repeated_in_the_file(tmp_path: Path) -> None:
    class Named(Net):
        def get_input_embeddings(self) -> nn.Module:
            return self.emb

    def make(r: int) -> inlay.PeftModel:
        torch.manual_seed(0)
        return inlay.get_peft_model(Named().eval(), lora(r=r, targets=("emb", "q")))

    model, other = make(4), make(2)
    other.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    assert "base_model.model.emb.base_layer.weight" in load_file(tmp_path / "same" / "adapter_model.safetensors")
    for merge in (False, True):
        if merge:
            model.merge_adapter()
        hotswap_adapter(model, tmp_path / "same", "default")
        close(model(ids()), other(ids()))
    other.base_model.model.emb.base_layer.weight.add_(1)
    other.save_pretrained(tmp_path / "trained", save_embedding_layers=True)
    with pytest.raises(HotswapError, match=r"'emb.base_layer.weight' of the frozen model is another one"):
        hotswap_adapter(model, tmp_path / "trained", "default")


def test_merged_with_another_and_merged_for_good(saved: Callable[..., Path]) -> None:
    model, folder = adapted(), saved(lora(r=2, alpha=3))
    model.add_adapter("b", lora())
    frozen = {k: t for k, t in bits(model).items() if "lora" not in k}
    model.merge_adapter(["default", "b"])
    hotswap_adapter(model, folder, "default")
    assert {tuple(w.merged_adapters) for _, w in wrappers(model) if isinstance(w, Adapted)} == {("default", "b")}
    merged = model(ids())
    model.unmerge_adapter()
    same_state({k: t for k, t in bits(model).items() if "lora" not in k}, frozen)
    model.set_adapter(["default", "b"])
    close(merged, model(ids()))
    model.merge_adapter(keep_base=False)
    before = bits(model)
    with pytest.raises(BaseGoneError, match="unmerge first"):
        hotswap_adapter(model, folder, "default")
    same_state(bits(model), before)


def test_activated_adapters(tmp_path: Path) -> None:
    """Each begins at its own invocation, also when it takes another's place."""

    def causal() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=16, use_cache=False, **sizes)).eval()

    def of(tokens: list[int], r: int) -> inlay.PeftModel:
        config = lora(r, targets=("q_proj", "v_proj"), alora_invocation_tokens=tokens, task_type="CAUSAL_LM")
        return inlay.get_peft_model(causal(), config)

    model, other, rows = of([3, 4], 4), of([6], 2), torch.tensor([[1, 3, 4, 5, 6, 7]])
    other.save_pretrained(tmp_path)
    base, before, wanted = causal()(rows).logits, model(rows).logits, other(rows).logits
    model.hotswap_slots(8)
    config = model.peft_config["default"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    beyond = copy.deepcopy(other.peft_config["default"])
    beyond.alora_invocation_tokens = [16]
    with pytest.raises(ConfigError, match="the model's vocabulary has 16"):
        hotswap_adapter_from_state_dict(model, tensors, "default", beyond)
    assert model.peft_config["default"] is config
    close(model(rows).logits, before)
    hotswap_adapter(model, tmp_path, "default")
    close(model(rows).logits, wanted)
    close(wanted[:, :4], base[:, :4])
    assert float((wanted - base).abs().max()) > 1e-2


# ---------------------------------------------------------------- where it comes from


def test_sources(saved: Callable[..., Path], tmp_path: Path) -> None:
    config = lora(r=3, alpha=5, lora_bias=True)
    first, folder = lora(r=4, lora_bias=True), saved(config)
    expected = loaded(folder)(ids())
    keys = load_file(folder / "adapter_model.safetensors")
    bare = {k.removeprefix("base_model.model."): t for k, t in keys.items()}
    live = {".default.".join(k.rsplit(".", 1)): t for k, t in bare.items()}
    for tensors in (keys, bare, live):
        model = adapted(first)
        hotswap_adapter_from_state_dict(model, tensors, "default", config)
        close(model(ids()), expected)
    model = adapted(first)
    hotswap_adapter_from_model(model, loaded(folder), "default")
    close(model(ids()), expected)
    model = adapted(first)
    model.load_adapter(folder, "other")
    hotswap_adapter_from_model(model, model, "default", "other")
    close(model(ids()), expected)
    same_files(model, folder)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    save_file({k.replace("layers", "blocks"): t for k, t in keys.items()}, renamed / "adapter_model.safetensors")
    (renamed / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    model = adapted(first)
    hotswap_adapter(model, tmp_path, "default", subfolder="renamed", key_mapping={"^blocks": "layers"})
    close(model(ids()), expected)


def test_bare_models_and_compiled_ones_have_the_same_names(saved: Callable[..., Path]) -> None:
    folder = saved(lora(r=2, targets=("q",)))
    expected = loaded(folder)(ids())
    model = inlay.inject_adapter_in_model(lora(), net())
    hotswap_adapter(model, folder, "default")
    close(model(ids()), expected)
    assert model.peft_config["default"].r == 2
    around = torch.compile(adapted(), backend="eager")
    hotswap_adapter(around, folder, "default")
    close(around(ids()), expected)
    inside = adapted()
    blocks = inside.base_model.model.layers
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    hotswap_adapter(inside, folder, "default")
    close(inside(ids()), expected)
    same_files(inside, folder)
    inside.load_adapter(folder, "again")
    inside.set_adapter("again")
    close(inside(ids()), expected)


def test_the_short_way_is_the_long_one(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer's name says all, no plan is made; the numbers are those of the plan."""
    for config in (lora(r=3, alpha=5), inlay.IA3Config(target_modules=["q", "v"], feedforward_modules=["v"])):
        found = []
        for short in (True, False):
            model, folder = adapted(copy.deepcopy(config)), saved(config)
            with monkeypatch.context() as patched:
                if short:
                    patched.setattr(inlay.works, "prepare", None)
                else:
                    patched.setattr(hotswap._Swap, "_is_plain", lambda self: False)
                hotswap_adapter(model, folder, "default")
            layers = {path: w.methods["default"] for path, w in wrappers(model) if isinstance(w, Adapted)}
            found.append(({path: vars(method) for path, method in layers.items()}, bits(model)))
        assert found[0][0] == found[1][0]
        same_state(found[0][1], found[1][1])


# ---------------------------------------------------------------- scales


def test_scales_move_with_the_model_and_are_in_no_state() -> None:
    model = adapted()
    keys = list(model.state_dict())
    prepare_model_for_compiled_hotswap(model)
    assert list(model.state_dict()) == keys
    layer = model.base_model.model.layers[0].q
    scale = layer.scaling["default"]
    model.to(torch.bfloat16)
    assert (layer.scaling["default"].dtype, float(layer.scaling["default"])) == (torch.float32, 2.0)
    model.to(torch.float64)
    assert float(layer.scaling["default"]) == 2.0
    layer._apply(lambda t: t.to("meta"))  # as `to_empty` and a move to the meta device: the value must not be lost
    assert float(layer.scaling["default"]) == 2.0

    class Elsewhere(Tensor):
        """A tensor that says it is on another device."""

        device = torch.device("cpu", 3)

    moved: list[Any] = []
    layer.methods["default"].scaling = scale
    scale_to = Tensor.to
    try:
        Tensor.to = lambda self, *args, **kwargs: moved.append(args) or self  # type: ignore[method-assign]
        nn.Module._apply(nn.Linear(1, 1), lambda t: t)
        Adapted._apply(layer, lambda t: t.as_subclass(Elsewhere))
    finally:
        Tensor.to = scale_to  # type: ignore[method-assign]
    assert (torch.device("cpu", 3),) in moved


def test_scales_keep_their_place_when_set(saved: Callable[..., Path]) -> None:
    model = adapted(lora(use_dora=True))
    plain = adapted(lora(use_dora=True))
    prepare_model_for_compiled_hotswap(model)
    places = pointers(model)
    steps: list[Callable[[Any], object]] = [
        lambda layer: layer.set_scale("default", 0.5),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scaling.__setitem__("default", 7.0),
    ]
    for step in steps:
        for one in (model, plain):
            one(ids())  # DoRA remembers its norm
            for _, w in wrappers(one):
                step(w)
        close(model(ids()), plain(ids()))
        assert pointers(model) == places
    model.add_adapter("b", lora(use_dora=True))
    folder = saved(lora(alpha=3, use_dora=True))
    hotswap_adapter(model, folder, "default")
    close(model(ids()), loaded(folder)(ids()))  # a swapped-in adapter has its own scale


def test_copies_and_pickles(saved: Callable[..., Path]) -> None:
    model, folder = adapted(), saved(lora(r=2))
    model.hotswap_slots(8)
    before = model(ids())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not set(pointers(twin).values()) & set(pointers(model).values())
        hotswap_adapter(twin, folder, "default")
        close(twin(ids()), loaded(folder)(ids()))
    close(model(ids()), before, 0)


def test_what_was_added_is_subtracted() -> None:
    model = adapted()
    prepare_model_for_compiled_hotswap(model)
    before = model(ids())
    model.merge_adapter(keep_base=False)
    for _, w in wrappers(model):
        w.set_scale("default", 5.0)
    model.unmerge_adapter()
    for _, w in wrappers(model):
        w.set_scale("default", 1.0)
    close(model(ids()), before)


def test_a_prepared_adapter_is_saved_and_reloaded_as_itself(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "own")
    model.hotswap_slots(8)
    same_files(model, tmp_path / "own")
    other = saved(lora(), 9)
    model.load_adapter(other, "default")  # the same config: values in place
    close(model(ids()), loaded(other)(ids()))
    inlay.set_peft_model_state_dict(model, inlay.load_peft_weights(tmp_path / "own"))
    close(model(ids()), loaded(tmp_path / "own")(ids()))
    with pytest.raises(LoadError):
        inlay.set_peft_model_state_dict(model, inlay.load_peft_weights(saved(lora(r=3))))


def test_training_goes_on_after_a_swap(saved: Callable[..., Path]) -> None:
    model, folder = adapted(), saved(lora(r=2))
    model.hotswap_slots(8)
    hotswap_adapter(model, folder, "default")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in model.state_dict() if "lora_" in n}
    with torch.enable_grad():
        model(ids()).square().sum().backward()
    layer = model.base_model.model.layers[0].q
    grads = {key: layer.methods["default"].own({key: t.grad})[key] for key, t in layer.params("default").items()}
    fresh = inlay.PeftModel.from_pretrained(net(), folder, is_trainable=True).eval()
    with torch.enable_grad():
        fresh(ids()).square().sum().backward()
    for key, t in fresh.base_model.model.layers[0].q.params("default").items():
        close(grads[key], t.grad)


def test_a_recomputation_after_a_swap_is_not_wrong_in_silence(saved: Callable[..., Path]) -> None:
    model, folder = adapted(), saved()
    block, x = model.base_model.model.layers[0].q, torch.randn(2, 8, requires_grad=True)
    with torch.enable_grad():
        out = torch.utils.checkpoint.checkpoint(model.bind(block), x, use_reentrant=True)
        hotswap_adapter(model, folder, "default")
        with pytest.raises(LostRoutingError, match="swapped"):
            out.sum().backward()


# ---------------------------------------------------------------- bad input: the old adapter is whole


def corrupt(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def rewritten(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return spoil


def configured(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        rewritten(lambda tensors: None)(folder)  # without the config's hash
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return spoil


KEY = "base_model.model.layers.0.q.lora_A.weight"
BAD: dict[str, tuple[AdapterConfig, Callable[[Path], None] | None, type[Exception], type[Exception], str]] = {
    "another method": (
        inlay.IA3Config(target_modules=["q"], feedforward_modules=[]),
        None,
        HotswapError,
        ValueError,
        "LORA.*IA3",
    ),
    "DoRA": (lora(use_dora=True), None, HotswapError, ValueError, "use_dora is False"),
    "a bias": (lora(lora_bias=True), None, HotswapError, ValueError, "lora_bias is False"),
    "trained biases": (lora(bias="all"), None, HotswapError, ValueError, "bias is 'none'"),
    "more layers": (
        lora(targets=("q", "v", "head", "emb")),
        None,
        MoreLayersError,
        RuntimeError,
        r"\['emb', 'head'\]",
    ),
    "a module trained whole": (lora(modules_to_save=["head"]), None, HotswapError, ValueError, "'head'"),
    "trained tokens": (lora(trainable_token_indices={"emb": [1]}), None, LoadError, RuntimeError, "nothing takes"),
    "a rank above the slots": (lora(r=9), None, HotswapError, ValueError, "rank 9, above the 8"),
    "a rank above in one layer": (lora(rank_pattern={"layers.1.v": 9}), None, HotswapError, ValueError, "1.v.*rank 9"),
    "a start": (
        lora(init="pissa", targets=("q", "v")),
        configured(init_lora_weights="pissa"),
        HotswapError,
        ValueError,
        "different kinds of tensors",
    ),
    "truncated": (lora(), corrupt, CorruptFileError, ValueError, "truncated"),
    "no weights": (
        lora(),
        lambda d: (d / "adapter_model.safetensors").unlink(),
        MissingFileError,
        FileNotFoundError,
        "adapter_model",
    ),
    "no config": (
        lora(),
        lambda d: (d / "adapter_config.json").unlink(),
        MissingFileError,
        ValueError,
        "adapter_config",
    ),
    "config edited": (
        lora(),
        lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        FileError,
        ValueError,
        "save",
    ),
    "a tensor missing": (lora(), rewritten(lambda t: t.pop(KEY)), LoadError, RuntimeError, "1 tensor missing"),
    "a layer missing": (
        lora(),
        rewritten(lambda t: [t.pop(k) for k in list(t) if "1.v" in k]),
        LoadError,
        RuntimeError,
        "2 tensors missing",
    ),
    "a tensor too many": (
        lora(),
        rewritten(lambda t: t.update({"base_model.model.x": t[KEY] * 1})),
        LoadError,
        RuntimeError,
        "nothing takes",
    ),
    "a tensor of another shape": (
        lora(),
        rewritten(lambda t: t.update({KEY: torch.ones(4, 9)})),
        LoadError,
        RuntimeError,
        "another shape",
    ),
    "another rank than the config's": (lora(), configured(r=3), LoadError, RuntimeError, "8 tensors of another shape"),
    "targets that leave out a layer in the file": (
        lora(),
        configured(target_modules=["q"], rank_pattern={"q": 4}),
        LoadError,
        RuntimeError,
        "nothing takes",
    ),
    "targets that leave out all layers in the file": (
        lora(),
        configured(target_modules=["q"]),
        LoadError,
        RuntimeError,
        "4 tensors in the file that nothing takes",
    ),
    "no targets": (lora(), configured(target_modules=[]), PlanError, ValueError, "nothing to adapt"),
    "a malformed target": (lora(), configured(target_modules="("), PlanError, ValueError, "malformed"),
    "a slow target": (lora(), configured(target_modules="((q|v|.)*)*!"), PlanError, ValueError, ""),
    "a rank beyond memory": (lora(), configured(r=2**31 - 1), LoadError, RuntimeError, "8 tensors of another shape"),
    "activated": (
        lora(),
        configured(alora_invocation_tokens=[1]),
        HotswapError,
        ValueError,
        "from its invocation on",
    ),
    "integers": (
        lora(),
        rewritten(lambda t: t.update({KEY: torch.ones(4, 8, dtype=torch.int32)})),
        LoadError,
        RuntimeError,
        "floats",
    ),
    "NaN": (
        lora(),
        rewritten(lambda t: t.update({KEY: t[KEY] * torch.nan})),
        NonFiniteError,
        RuntimeError,
        "NaN or infinity",
    ),
    "too large for the dtype here": (
        lora(),
        rewritten(lambda t: t.update({KEY: t[KEY].double() * 1e300})),
        NonFiniteError,
        RuntimeError,
        "infinity",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, saved: Callable[..., Path]) -> None:
    config, spoil, error, incumbent, message = BAD[name]
    folder = saved(copy.deepcopy(config))
    if spoil is not None:
        spoil(folder)
    model = adapted()
    model.hotswap_slots(8)
    untouched_by(model, lambda: hotswap_adapter(model, folder, "default"), error, message)
    assert issubclass(error, incumbent)


def untouched_by(model: inlay.PeftModel, call: Callable[[], object], error: type[Exception], message: str) -> None:
    state, config, places = bits(model), model.peft_config["default"].to_dict(), pointers(model)
    numbers = {path: copy.deepcopy(vars(m)) for path, w in wrappers(model) for m in w.methods.values()}
    before = model(ids())
    for merged in (False, True):
        if merged:
            model.merge_adapter()
            merged_state = bits(model)
        with pytest.raises(error, match=f"(?s){message}"):
            call()
    same_state(bits(model), merged_state)
    model.unmerge_adapter()
    same_state(bits(model), state)
    close(model(ids()), before, 0)
    assert model.peft_config["default"].to_dict() == config
    assert pointers(model) == places
    assert {path: vars(m) for path, w in wrappers(model) for m in w.methods.values()} == numbers


def test_other_bad_calls(saved: Callable[..., Path]) -> None:
    model, folder = adapted(), saved()
    with pytest.raises(UnknownAdapterError, match="other") as told:
        hotswap_adapter(model, folder, "other")
    assert isinstance(told.value, RuntimeError)  # as in PEFT, and a ValueError as from the other verbs
    with pytest.raises(UnknownArgumentError, match="'subfoldr'; closest: subfolder"):
        hotswap_adapter(model, folder, "default", subfoldr="x")
    before = bits(model)
    model.merge_adapter()
    with pytest.raises(MissingFileError):
        hotswap_adapter(model, folder / "nowhere", "default")
    model.unmerge_adapter()
    same_state(bits(model), before)
    with pytest.raises(UnknownAdapterError):
        model.hotswap_slots(8, adapter_name="other")
    with pytest.raises(UnknownAdapterError):
        hotswap_adapter_from_model(model, adapted(), "default", "other")
    with pytest.raises(HotswapError, match="no adapter:"):
        prepare_model_for_compiled_hotswap(net())
    with pytest.raises(HotswapError, match="'error', 'warn' or 'ignore'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="no")  # type: ignore[arg-type]
    with pytest.raises(inlay.NoMatchingPeftModuleError):
        model.hotswap_slots(8, targets=["nothing"])
    with pytest.raises(HotswapError, match="above the rank 3"):
        model.hotswap_slots(3, targets=["head"])
    assert not isinstance(model.base_model.model.head, Adapted)
    assert pointers(model).keys() == {n for n, _ in model.named_parameters()}  # no scale is a tensor yet
    block = model.base_model.model.layers[0].q
    handle = block.register_forward_hook(lambda *_: hotswap_adapter(model, folder, "default"))
    with pytest.raises(BusyError):
        model(ids())
    handle.remove()


def test_ranks_that_cannot_be(saved: Callable[..., Path]) -> None:
    model = adapted(lora(rank_pattern={"layers.1.v": 6}))
    for rank in (5, 0, -1):
        with pytest.raises(HotswapError, match=f"above the rank {rank} asked for"):
            model.hotswap_slots(rank)
        with pytest.raises(HotswapError, match=f"above the rank {rank} asked for"):
            prepare_model_for_compiled_hotswap(model, target_rank=rank)
    grouped = Case("LORA", "plain", "Conv2d grouped").adapted()
    with pytest.raises(HotswapError, match="multiple of the convolution's groups"):
        grouped.hotswap_slots(13)
    ia3 = adapted(inlay.IA3Config(target_modules=["q"], feedforward_modules=[]))
    with pytest.raises(HotswapError, match="no adapter whose tensors can be padded"):
        ia3.hotswap_slots(8)
    started = adapted(lora(init="pissa"))
    with pytest.raises(HotswapError, match="starts at a part of the weight"):
        started.hotswap_slots(8)
    loha = adapted(inlay.LoHaConfig(r=2, target_modules=["q"], init_weights=False))
    other = saved(inlay.LoHaConfig(r=3, target_modules=["q"], init_weights=False))
    untouched_by(loha, lambda: hotswap_adapter(loha, other, "default"), HotswapError, "'layers.0.q.hada_w1_a' is")


def test_layers_are_named_whole_whatever_they_are_called() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"lora_x": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})

    first, second = (inlay.get_peft_model(Odd(), lora(targets=targets)) for targets in (["0"], ["0", "1"]))
    with pytest.raises(MoreLayersError, match=r"1 layers .* \['body.lora_x.1'\]"):
        hotswap_adapter_from_model(first, second, "default")


def test_prompts_are_not_swapped() -> None:
    with pytest.raises(HotswapError, match="PromptTuningConfig adapts no layer"):
        check_hotswap_configs_compatible(inlay.PromptTuningConfig(num_virtual_tokens=2), lora())


def test_lenient_loading(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the drop-in loads: what a file lacks is left out, and NaN is warned of."""
    monkeypatch.setattr(inlay.settings, "strict_load", False)
    folder, model = saved(), adapted()
    rewritten(lambda t: [t.pop(k) for k in list(t) if "1.v" in k])(folder)
    hotswap_adapter(model, folder, "default")
    part = adapted(lora(targets=("q", "layers.0.v")))
    hotswap_adapter_from_state_dict(
        part, load_file(folder / "adapter_model.safetensors"), "default", lora(targets=("q", "layers.0.v"))
    )
    close(model(ids()), part(ids()))
    rewritten(lambda t: t.update({KEY: t[KEY] * torch.nan}))(folder)
    with pytest.warns(PeftWarning, match="NaN"):
        hotswap_adapter(model, folder, "default")
    rewritten(lambda t: t.pop(KEY))(folder)
    with pytest.raises(LoadError, match="1 tensor missing"):
        hotswap_adapter(model, folder, "default")


def test_configs_that_go_together() -> None:
    assert check_hotswap_configs_compatible(
        lora(), lora(r=9, alpha=3, use_rslora=True, lora_dropout=0.3, alpha_pattern={"q": 1}, rank_pattern={"q": 1})
    ) is None  # fmt: skip
    ia3 = inlay.IA3Config(target_modules=["q"], feedforward_modules=[])
    assert check_hotswap_configs_compatible(ia3, inlay.IA3Config(target_modules=["v"], feedforward_modules=[])) is None
    activated = lora(alora_invocation_tokens=[1])
    assert check_hotswap_configs_compatible(activated, lora(alora_invocation_tokens=[2, 3])) is None
    for a, b in ((lora(), ia3), (lora(), lora(use_dora=True)), (lora(lora_bias=True), lora()), (activated, lora())):
        with pytest.raises(ValueError):
            check_hotswap_configs_compatible(a, b)


# ---------------------------------------------------------------- beside forwards


def test_forwards_see_one_adapter_whole(saved: Callable[..., Path]) -> None:
    model = adapted()
    model.hotswap_slots(8)
    folders = [
        saved(lora(r=2, alpha=1), 3),
        saved(lora(r=7, alpha=9, targets=("q",)), 4),
        saved(lora(use_rslora=True), 5),
    ]
    hotswap_adapter(model, folders[0], "default")
    allowed = []
    for folder in folders:
        hotswap_adapter(model, folder, "default")
        allowed.append(model(ids()))
    seen: set[int] = set()
    strange: list[Tensor] = []
    stop = threading.Event()

    @torch.no_grad()
    def run() -> None:
        while not stop.is_set():
            out = model(ids())
            at = [i for i, one in enumerate(allowed) if torch.equal(out, one)]
            seen.update(at)
            strange.extend([] if at else [out])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(60):
            hotswap_adapter(model, folders[i % 3], "default")
            if i == 30:
                model.merge_adapter()
                model.unmerge_adapter()
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    # Merged weights round otherwise.
    assert all(any(torch.allclose(out, one, atol=1e-5) for one in allowed) for out in strange)
    assert len(seen) > 1


@pytest.mark.parametrize("other", ["swap", "delete", "slots"])
def test_what_another_thread_writes_comes_before_or_after(
    other: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a swap's plan and its writing nobody changes what the plan has looked at."""
    model, folders = adapted(), [saved(lora(r=3), 3), saved(lora(r=6, targets=("q",)), 4)]
    model.add_adapter("b", lora())
    planned, written, calls = threading.Event(), threading.Event(), []
    original = hotswap._Swap.plan

    def slow(self: hotswap._Swap, strict: bool) -> None:
        original(self, strict)
        if not planned.is_set():
            planned.set()
            calls.append(written.wait(0.2))

    def write() -> None:
        planned.wait(60)
        if other == "swap":
            hotswap_adapter(model, folders[1], "default")
        elif other == "delete":
            model.delete_adapter("default")
        else:
            model.hotswap_slots(8)
        written.set()

    monkeypatch.setattr(hotswap._Swap, "plan", slow)
    thread = threading.Thread(target=write)
    with pytest.warns(PeftWarning, match="is deleted: b is active") if other == "delete" else nullcontext():
        thread.start()
        hotswap_adapter(model, folders[0], "default")
        thread.join(60)
    assert calls == [False]
    if other == "delete":
        assert list(model.peft_config) == ["b"]
        with pytest.raises(UnknownAdapterError):
            hotswap_adapter(model, folders[0], "default")
    else:
        last = folders[other == "swap"]
        close(model(ids()), loaded(last)(ids()))
        same_files(model, last)


def test_swaps_from_several_threads(saved: Callable[..., Path]) -> None:
    """The ranks grow and shrink without slots, so that tensors are replaced too; the last swap is whole."""
    model = adapted()
    folders = [saved(lora(r=r, alpha=a, targets=t), r) for r, a, t in ((2, 3, "q"), (7, 5, "qv"), (16, 1, "v"))]
    outputs = [loaded(folder)(ids()) for folder in folders]
    errors: list[BaseException] = []

    @torch.no_grad()
    def run(i: int) -> None:
        try:
            for k in range(20):
                hotswap_adapter(model, folders[(i + k) % 3], "default")
                out = model(ids())
                assert any(torch.allclose(out, one, atol=1e-5) for one in outputs)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    at = next(i for i, one in enumerate(outputs) if torch.allclose(model(ids()), one, atol=1e-5))
    same_files(model, folders[at])


def test_a_hundred_swaps_keep_nothing(saved: Callable[..., Path]) -> None:
    model = adapted(lora(use_dora=True))
    folders = [saved(lora(r=r, alpha=alpha, use_dora=True)) for r, alpha in ((2, 1), (4, 3), (3, 5))]

    def swaps(n: int) -> None:
        for i in range(n):
            hotswap_adapter(model, folders[i % 3], "default")
            model(ids())
            model(ids(), adapter_names=["default", "__base__"])
        gc.collect()

    def kept() -> tuple[int, int]:
        objects = gc.get_objects()
        return len(objects), sum(type(t) in (Tensor, nn.Parameter) for t in objects)

    swaps(100)  # fills what the routing remembers, which has a bound
    objects, tensors = kept()
    swaps(100)
    more_objects, more_tensors = kept()
    assert more_tensors <= tensors
    assert more_objects - objects < 50  # less than one in two swaps


# ---------------------------------------------------------------- under compiled code


def llama() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(vocab_size=16, use_cache=False, **sizes)).eval()
    return model, {"input_ids": torch.arange(10).reshape(2, 5)}


def unet() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, sample_size=4, in_channels=2, out_channels=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=8, attention_head_dim=4,
    ).eval()  # fmt: skip
    inputs = {"sample": torch.randn(2, 2, 4, 4), "timestep": torch.tensor(3)}
    return model, {**inputs, "encoder_hidden_states": torch.randn(2, 3, 8)}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 8)}
    inputs |= {"pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([1.0])}
    return model, {**inputs, "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], list[str]]] = {
    "decoder": (llama, ["q_proj", "v_proj", "embed_tokens"]),
    "unet": (unet, ["to_q", "to_v", "conv1", "conv2"]),
    "transformer": (flux, ["to_q", "to_v", "x_embedder"]),
}


def first_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else next(iter(out.values()))


def swaps_without_recompiling(name: str, tmp_path: Path) -> None:
    make, targets = MODELS[name]

    def fresh(r: int, alpha: int, seed: int, **fields: Any) -> inlay.PeftModel:
        model, _ = make()
        torch.manual_seed(seed)
        return inlay.get_peft_model(model, lora(r, alpha, fields.pop("targets", targets), **fields))

    _, inputs = make()
    model = fresh(2, 1, 0)
    before = first_of(model(**inputs))
    model.hotswap_slots(MOST)
    places = pointers(model)
    model.get_base_model().compile(fullgraph=True)
    torch._dynamo.reset()
    close(first_of(model(**inputs)), before)
    seed = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        odd: list[dict[str, Any]] = [{"use_rslora": True}, {"lora_dropout": 0.5}, {"targets": targets[:1]}]
        odd += [{"alpha_pattern": {targets[0]: 5}, "rank_pattern": {targets[1]: 3}}, {}]
        cases = [(r, alpha, {}) for r in RANKS for alpha in ALPHAS] + [(8, 16, fields) for fields in odd]
        for r, alpha, fields in cases:
            seed += 1
            other = fresh(r, alpha, seed, **fields)
            other.save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
            hotswap_adapter(model, tmp_path / str(seed), "default")
            expected = first_of(other(**inputs))
            assert float((expected - before).abs().max()) > 1e-3
            close(first_of(model(**inputs)), expected)
            assert pointers(model) == places
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "decoder",
        pytest.param("unet", marks=[pytest.mark.slow, pytest.mark.diffusers]),
        pytest.param("transformer", marks=[pytest.mark.slow, pytest.mark.diffusers]),
    ],
)
def test_nothing_is_compiled_again(name: str, tmp_path: Path) -> None:
    swaps_without_recompiling(name, tmp_path)


class Compilations:
    """A backend that runs eagerly and counts."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.n += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_graphs_of_all_models_stay(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a compiler behind the graph, which is what takes the time."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: original(self, backend=Compilations(), **kwargs))
    swaps_without_recompiling(name, tmp_path)


COMPILED: dict[str, tuple[int | None, dict[str, Any], dict[str, Any], int]] = {
    "prepared": (8, {"r": 4}, {"r": 8, "alpha": 3}, 0),
    "prepared, DoRA": (8, {"use_dora": True}, {"r": 2, "alpha": 3, "use_dora": True}, 0),
    "not prepared, the same numbers": (None, {"r": 4}, {"r": 4}, 0),
    "not prepared, another alpha": (None, {"r": 4}, {"r": 4, "alpha": 3}, 1),
    "not prepared, a larger rank": (None, {"r": 4}, {"r": 8, "alpha": 16}, 1),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_what_compiles_again_and_what_does_not(name: str, saved: Callable[..., Path]) -> None:
    rank, first, second, again = COMPILED[name]
    model, folder = adapted(lora(**first)), saved(lora(**second))
    if rank is not None:
        model.hotswap_slots(rank)
    count = Compilations()
    torch._dynamo.reset()
    model.get_base_model().compile(backend=count, fullgraph=True, dynamic=False)
    model(ids())
    assert count.n == 1
    hotswap_adapter(model, folder, "default")
    close(model(ids()), loaded(folder)(ids()))
    assert count.n - 1 == again
    if again:
        hotswap_adapter(model, saved(lora(r=3, alpha=32)), "default")
        with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match=r"[Rr]ecompil"):
            model(ids())
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["around", "in place", "a block around", "a block in place"])
def test_preparing_comes_before_compiling(how: str) -> None:
    model = adapted()
    base = model.get_base_model()
    compiled: Any = model
    if how == "around":
        compiled = torch.compile(model)
    elif how == "in place":
        base.compile()
    elif how == "a block around":
        base.layers[0] = torch.compile(base.layers[0])
    else:
        base.layers[0].compile()
    with pytest.raises(HotswapError, match="is compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.raises(HotswapError, match="is compiled already"):
        compiled.hotswap_slots(8) if how != "around" else prepare_model_for_compiled_hotswap(compiled)
    assert not any(isinstance(m.scaling, Tensor) for _, w in wrappers(model) for m in w.methods.values())
    with pytest.warns(PeftWarning, match="compiled again"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=9, config=lora(), check_compiled="ignore")
    assert {m.scaling.__class__ for _, w in wrappers(model) for m in w.methods.values()} == {Tensor}
    assert base.get_submodule("layers.1.q").lora_A["default"].weight.shape == (9, 8)


def test_other_parts_may_be_compiled() -> None:
    model = adapted()
    model.base_model.model.head.compile()
    model.hotswap_slots(8)


def test_configs_stay_as_they_are(saved: Callable[..., Path]) -> None:
    """What is given to a swap belongs to its caller."""
    model, config = adapted(), lora(r=2, alpha=5)
    before: Mapping[str, Any] = config.to_dict()
    tensors = load_file(saved(config) / "adapter_model.safetensors")
    keys = list(tensors)
    hotswap_adapter_from_state_dict(model, tensors, "default", config)
    assert config.to_dict() == before
    assert list(tensors) == keys
    assert model.peft_config["default"] is not config
    assert model.peft_config["default"].r == 2
