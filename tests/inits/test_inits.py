"""Starting values: what they are, what the layer does with them, and what becomes of them in files."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from laws import bits, close, same_bits, same_state
from safetensors.torch import save_file
from torch import Tensor, nn

import inlay
from inlay import inits, storage
from inlay.errors import (
    ConfigError,
    CorruptFileError,
    DuplicateAdapterError,
    LoadError,
    MissingFileError,
    UnsupportedLayerError,
)
from inlay.inits.loftq import codebook, loftq_init, quantise
from inlay.storage.plain import Plain

LOFTQ = {"init_lora_weights": "loftq", "loftq_config": inlay.LoftQConfig(loftq_bits=4, loftq_iter=2)}
COMPUTED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_6": {"init_lora_weights": "pissa_niter_6"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": LOFTQ,
}
CONVERTED = {name: fields for name, fields in COMPUTED.items() if name != "loftq"}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"1": 3}, "alpha_pattern": {"0": 5}, "use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "more rank than there is": {"r": 16},
    "negative": {"lora_alpha": -3},
}


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 6)).eval().requires_grad_(False)


def inputs() -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return torch.randn(5, 12)


def config(**fields: Any) -> inlay.LoraConfig:
    return inlay.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0", "1"], **fields})


def fresh(base: nn.Module | None = None, **fields: Any) -> inlay.PeftModel:
    return inlay.get_peft_model(net() if base is None else base, config(**fields))


def train(model: nn.Module) -> None:
    """Moves what is trained, and nothing else."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.2)


# ---------------------------------------------------------------- the functions


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(20, 12)


@pytest.mark.parametrize("scale", [1.0, 2.5, -0.5])
def test_pissa_is_the_best_approximation(weight: Tensor, scale: float) -> None:
    start = inits.pissa(weight, 4, scale)
    U, S, V = torch.linalg.svd(weight)
    close(scale * start.up_OR @ start.down_RI, U[:, :4] @ torch.diag(S[:4]) @ V[:4])
    close((start.down_RI @ start.down_RI.t()).diagonal() * abs(scale), S[:4])
    close((start.up_OR.t() @ start.up_OR).diagonal() * abs(scale), S[:4])
    assert start.offset_OI is None


def test_fast_pissa_comes_close() -> None:
    torch.manual_seed(0)
    W = torch.randn(60, 8) @ torch.randn(8, 40) + 0.01 * torch.randn(60, 40)
    exact, fast = inits.pissa(W, 8, 1.0), inits.pissa(W, 8, 1.0, rounds=4)
    close(fast.up_OR @ fast.down_RI, exact.up_OR @ exact.down_RI, 1e-3)
    assert float((fast.up_OR @ fast.down_RI - exact.up_OR @ exact.down_RI).abs().max()) > 0


def test_olora_is_a_part_of_qr(weight: Tensor) -> None:
    start = inits.olora(weight, 5, 2.0)
    close(start.up_OR.t() @ start.up_OR, torch.eye(5))
    Q, R = torch.linalg.qr(weight)
    close(start.up_OR @ start.down_RI, Q[:, :5] @ R[:5])


def test_rank_beyond_the_weights_is_filled(weight: Tensor) -> None:
    for start in (inits.pissa(weight, 15, 1.0), inits.olora(weight, 15, 1.0), inits.loftq(weight, 15, 1.0)):
        assert start.down_RI.shape == (15, 12)
        assert start.up_OR.shape == (20, 15)
        assert not start.up_OR[:, 12:].any()
        assert start.down_RI[12:].abs().min() > 0  # can be trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_decompositions_are_wide(weight: Tensor, dtype: torch.dtype) -> None:
    for start in (inits.pissa(weight.to(dtype), 3, 1.0), inits.loftq(weight.to(dtype), 3, 1.0)):
        assert start.down_RI.dtype == (dtype if dtype == torch.float64 else torch.float32)


# Of the paper: the quantiles of the normal distribution that 4 bits tell apart.
_NF4 = [-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0,
        0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0]  # fmt: skip


def test_codebooks() -> None:
    close(codebook("nf"), torch.tensor(_NF4), 1e-5)
    for bits_ in (2, 4, 8):
        values = codebook("nf", bits_)
        assert values.shape == (2**bits_,)
        assert bool((values.diff() > 0).all())
        assert values[2 ** (bits_ - 1) - 1] == 0
    assert codebook("fp").shape == (15,)  # zero has two signs


@pytest.mark.parametrize(("bits_", "name"), [(2, "nf"), (4, "nf"), (4, "fp"), (8, "nf")])
def test_quantising_is_nearest(bits_: int, name: str) -> None:
    torch.manual_seed(0)
    W = torch.randn(7, 30)  # no multiple of a block
    W[0] = 0.0
    Q = quantise(W, bits_, name)
    assert Q.shape == W.shape
    assert not Q[0].any()
    close(quantise(Q, bits_, name), Q, 1e-2 if bits_ == 8 else 1e-6)  # what can be held is held
    if bits_ == 8:
        top = W.abs().amax(1, keepdim=True)
        assert bool(((Q - W).abs() <= 0.502 * top / 127 + 1e-3 * W.abs()).all())
        return
    flat = torch.cat([W.flatten(), torch.zeros(-W.numel() % 64)]).view(-1, 64)
    top = flat.abs().amax(1, keepdim=True)
    nearest = codebook(name, bits_)[(flat / top)[..., None].sub(codebook(name, bits_)).abs().argmin(-1)] * top
    close(Q, nearest.flatten()[: W.numel()].view(W.shape))


@pytest.mark.bnb
@pytest.mark.parametrize("name", ["nf", "fp"])
def test_quantising_is_that_of_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    W = torch.randn(37, 50)
    packed, state = functional.quantize_4bit(W, quant_type=f"{name}4", blocksize=64)
    close(quantise(W, 4, name), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("bits_", [2, 4, 8])
def test_loftq_makes_up_for_what_is_lost(weight: Tensor, bits_: int) -> None:
    weight = torch.randn(64, 96)
    lost = quantise(weight, bits_) - weight
    before = lost.norm()
    for rounds in (1, 4):
        start = inits.loftq(weight, 8, 0.5, bits_, rounds)
        assert start.offset_OI is not None
        left = (start.offset_OI + 0.5 * start.up_OR @ start.down_RI).norm()
        assert left < before
        before = left
    close(quantise(weight + start.offset_OI, bits_), weight + start.offset_OI, 1e-2)


# ---------------------------------------------------------------- in a layer


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("start", CONVERTED.values(), ids=list(CONVERTED))
def test_fresh_is_the_identity_and_the_base_is_untouched(start: dict[str, Any], settings: dict[str, Any]) -> None:
    base = net()
    before, expected = bits(base), base(inputs())
    model = fresh(base, **start, **settings)
    close(model(inputs()), expected)
    train(model)
    trained = model(inputs())
    assert float((trained - expected).detach().abs().max()) > 0.1
    with model.disable_adapter():
        same_bits(model(inputs()), expected)
    model.merge_adapter()
    close(model(inputs()), trained, 1e-4)
    model.unmerge_adapter()
    plain = model.unload()
    same_state(bits(plain), before)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_loftq_is_close_to_the_original(settings: dict[str, Any]) -> None:
    base = net()
    before, expected = bits(base), base(inputs())
    model = fresh(base, **LOFTQ, **settings)
    layer = model.base_model.model[0]
    W = layer.base_layer.weight
    assert float((model(inputs()) - expected).detach().abs().max()) < 0.2
    with torch.no_grad():
        without = (layer.lora_offset_W["default"]).norm()
        assert layer.get_delta_weight("default").norm() < without
    held = W + layer.lora_offset_W["default"]
    close(quantise(held), held)
    train(model)
    trained = model(inputs())
    model.merge_adapter()
    close(model(inputs()), trained, 1e-4)
    model.unmerge_adapter()
    same_state(bits(model.unload()), before)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_type_says_how_it_quantises(name: str) -> None:
    layer = fresh(**LOFTQ | {"loftq_config": inlay.LoftQConfig(quant_type=name)}).base_model.model[0]
    held = layer.base_layer.weight + layer.lora_offset_W["default"]
    close(held, quantise(layer.base_layer.weight, 4, name[:2]))


def test_orthogonal_starts_at_zero_with_both_factors() -> None:
    expected = net()(inputs())
    model = fresh(init_lora_weights="orthogonal")
    close(model(inputs()), expected)
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].weight.norm() > 0.1
    assert layer.lora_B["default"].weight.norm() > 0.1
    with pytest.raises(UnsupportedLayerError, match="an even rank"):
        fresh(init_lora_weights="orthogonal", r=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("start", CONVERTED.values(), ids=list(CONVERTED))
def test_narrow_bases(start: dict[str, Any], dtype: torch.dtype, autocast: bool) -> None:
    base = net().to(dtype)
    x = inputs().to(dtype)
    expected = base(x)
    model = inlay.get_peft_model(base, config(**start), autocast_adapter_dtype=autocast)
    close(model(x).float(), expected.float(), 0.02)
    layer = model.base_model.model[0]
    assert layer.lora_offset_A["default"].dtype == (torch.float32 if autocast else dtype)
    assert torch.equal(layer.lora_offset_A["default"], layer.lora_A["default"].weight)


def test_the_offset_is_frozen_and_moves_with_the_model() -> None:
    model = fresh(**COMPUTED["pissa"])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"base_model.model.{i}.lora_{m}.default.weight" for i in (0, 1) for m in "AB"}
    model.set_adapter("default")
    model.set_requires_grad("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert model.get_layer_status()[0].requires_grad == {"default": True}
    assert "base_model.model.0.lora_offset_A.default" in dict(copy.deepcopy(model).double().named_parameters())


def test_dropout_is_not_for_the_offset() -> None:
    model = fresh(**COMPUTED["pissa"], lora_dropout=0.5, target_modules=["0"]).train()
    torch.manual_seed(0)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        first, second = layer(inputs()), layer(inputs())
        residual = layer.base_layer.weight - layer.scaling["default"] * (
            layer.lora_offset_B["default"] @ layer.lora_offset_A["default"]
        )
    same_bits(first, second)
    close(first, inputs() @ residual.t() + layer.base_layer.bias)


@pytest.mark.parametrize("start", [*COMPUTED, "orthogonal"])
def test_where_it_is_not_defined(start: str) -> None:
    fields = COMPUTED.get(start, {"init_lora_weights": start})
    with pytest.raises(UnsupportedLayerError, match="one matrix"):
        fresh(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), **fields, target_modules=["0"])


def test_a_weight_on_meta_is_refused() -> None:
    base = net().to("meta")
    with pytest.raises(UnsupportedLayerError, match="meta"):
        fresh(base, **COMPUTED["pissa"])
    assert type(base[0]) is nn.Linear  # type: ignore[index]


def test_low_memory_loading_has_its_offset() -> None:
    model = inlay.get_peft_model(net(), config(**COMPUTED["pissa"]), low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())


def test_a_table_starts_as_ever() -> None:
    model = fresh(nn.Sequential(nn.Embedding(11, 6)), **COMPUTED["pissa"], target_modules=["0"])
    layer = model.base_model.model[0]
    assert layer.adapter_layer_names == ("lora_embedding_A", "lora_embedding_B")
    assert not layer.lora_embedding_A["default"].any()


def test_a_tied_layer_follows() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.head(self.embed(x))
            return h

    fields = {**COMPUTED["pissa"], "target_modules": ["embed"], "ensure_weight_tying": True}
    model = fresh(Tied(), **fields)
    train(model)
    x = torch.arange(11)
    out = model(x)
    tensors = inlay.get_peft_model_state_dict(model)
    assert tensors["base_model.model.head.lora_A.weight"].shape == (8, 6)
    again = inlay.get_peft_model(copy.deepcopy(model).unload(), model.peft_config["default"].as_saved())
    inlay.set_peft_model_state_dict(again, tensors)
    close(again(x), out)


def _frames(run: Callable[[], object]) -> int:
    ours = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal ours
        ours += event == "call" and "src/inlay/" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return ours


def test_a_forward_without_an_offset_calls_nothing_more() -> None:
    x = inputs()
    plain, started = fresh(), fresh(**COMPUTED["pissa"])
    with torch.no_grad():
        for m in (plain, started):
            m.base_model.model[0](x)  # a module's first call makes what the others find
        few, more = (_frames(partial(m.base_model.model[0], x)) for m in (plain, started))
    assert few <= 8
    assert few < more <= 14


# ---------------------------------------------------------------- configs


def test_loftq_config() -> None:
    made = config(init_lora_weights="loftq", loftq_config={"loftq_bits": 2})
    assert made.loftq_config == {"loftq_bits": 2, "loftq_iter": 1}
    assert json.loads(json.dumps(made.to_dict(), default=sorted))["loftq_config"] == made.loftq_config
    with pytest.warns(inlay.PeftWarning, match="no effect"):
        assert config(loftq_config={"loftq_bits": 4}).loftq_config == {}
    made = config(init_lora_weights="loftq", loftq_config={"quant_type": "fp4"})
    assert made.loftq_config == {"loftq_bits": 4, "loftq_iter": 1, "quant_type": "fp4"}
    for wrong in (
        {"loftq_bits": 5},
        {"loftq_iter": 11},
        {"quant_type": "fp8"},
        {"quant_type": "fp4", "loftq_bits": 2},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            inlay.LoftQConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alpha"):
        fresh(init_lora_weights="olora", alpha_pattern={"0": 0})


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga", "mica", "pissa_niter_100"])
def test_what_is_not_built_is_named(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        config(init_lora_weights=name)


# ---------------------------------------------------------------- files


@pytest.fixture(params=CONVERTED)
def start(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONVERTED[request.param]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_files_hold_a_plain_lora(tmp_path: Path, start: dict[str, Any], settings: dict[str, Any]) -> None:
    model = fresh(**start, **settings)
    train(model)
    out = model(inputs())
    model.save_pretrained(tmp_path)
    same_bits(model(inputs()), out)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert written["r"] == 2 * model.peft_config["default"].r
    again = inlay.PeftModel.from_pretrained(net(), tmp_path)
    close(again(inputs()), out, 1e-4)
    assert again.base_model.model[0].adapter_layer_names[:2] == ("lora_A", "lora_B")
    assert not any("offset" in name for name in inlay.load_peft_weights(tmp_path))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("fields", COMPUTED.values(), ids=list(COMPUTED))
def test_training_resumes(tmp_path: Path, fields: dict[str, Any], settings: dict[str, Any]) -> None:
    model = fresh(**fields, **settings)
    train(model)
    model.save_pretrained(tmp_path)
    resumed = fresh(**fields, **settings)
    assert resumed.load_adapter(tmp_path, "default", is_trainable=True).ok
    same_state(bits(resumed), bits(model))
    assert {n: p.requires_grad for n, p in resumed.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    other = fresh(**fields, **settings)
    report = inlay.set_peft_model_state_dict(other, inlay.get_peft_model_state_dict(model))
    assert report.ok
    same_state(bits(other), bits(model))


def test_a_table_beside_it_has_the_same_rank_in_files(tmp_path: Path, start: dict[str, Any]) -> None:
    def base() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Embedding(11, 12), nn.Linear(12, 6)).eval()

    x = torch.arange(11)
    model = fresh(base(), **start)
    train(model)
    model.save_pretrained(tmp_path)
    out = model(x)
    close(inlay.PeftModel.from_pretrained(base(), tmp_path)(x), out)
    resumed = fresh(base(), **start)
    resumed.load_adapter(tmp_path, "default")
    same_state(bits(resumed), bits(model))
    tensors = inlay.get_peft_model_state_dict(model)
    for name in ("A", "B"):
        tensors[f"base_model.model.0.lora_embedding_{name}"] += 1
    before = bits(resumed)
    with pytest.raises(LoadError, match="offset"):
        inlay.set_peft_model_state_dict(resumed, tensors)
    same_state(bits(resumed), before)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    fresh(r=3).save_pretrained(tmp_path / "other")
    model = fresh(**COMPUTED["pissa"])
    before = bits(model)
    with pytest.raises(DuplicateAdapterError, match="'r'"):
        model.load_adapter(tmp_path / "other", "default")
    own = {k.replace("default", "x"): t for k, t in model.state_dict().items() if "offset" in k}
    tensors = {**inlay.get_peft_model_state_dict(model), "base_model.model.0.lora_offset_A": next(iter(own.values()))}
    assert inlay.set_peft_model_state_dict(model, tensors).unexpected_keys == ["base_model.model.0.lora_offset_A"]
    same_state(bits(model), before)


def test_gathered_tensors_are_converted_too() -> None:
    model = fresh(**COMPUTED["pissa"])
    train(model)
    expected = inlay.get_peft_model_state_dict(model)
    everything = model.state_dict()
    trained = {n: everything[n] for n, p in model.named_parameters() if p.requires_grad}
    for gathered in (everything, trained):
        same_state(inlay.get_peft_model_state_dict(model, state_dict=gathered), expected)


def test_a_given_start_is_taken_out(tmp_path: Path) -> None:
    """As with PEFT: the user has put the residual into the base, and keeps the first adapter in a folder."""
    pissa = fresh(**COMPUTED["pissa"])
    residual, begun = net(), {}
    for i in (0, 1):
        layer = pissa.base_model.model[i]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        begun.update({f"{i}.lora_A.weight": A.detach().clone(), f"{i}.lora_B.weight": B.detach().clone()})
        residual[i].weight -= layer.scaling["default"] * B.detach() @ A.detach()  # type: ignore[index]
    model = fresh(residual)
    inlay.set_peft_model_state_dict(model, begun)
    model.save_pretrained(tmp_path / "start")
    train(model)
    train(pissa)
    close(model(inputs()), pissa(inputs()))
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    close(inlay.PeftModel.from_pretrained(net(), tmp_path / "end")(inputs()), pissa(inputs()))
    # With a record of its own, an adapter needs no folder, whatever is in it.
    pissa.save_pretrained(tmp_path / "own", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    close(inlay.PeftModel.from_pretrained(net(), tmp_path / "own")(inputs()), pissa(inputs()))
    fresh(r=2).save_pretrained(tmp_path / "narrow")
    with pytest.raises(LoadError, match="initial adapter"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "narrow"))
    with pytest.raises(MissingFileError):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("settings", ["plain", "rslora", "bias"])
def test_of_loftq_a_plain_lora_holds_what_training_changed(tmp_path: Path, settings: str) -> None:
    model = fresh(**LOFTQ, **SETTINGS[settings])
    layers = [model.base_model.model[i] for i in (0, 1)]
    begun = [layer.get_delta_weight("default").detach() for layer in layers]
    model.save_pretrained(tmp_path / "start")
    train(model)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    written = json.loads((tmp_path / "end" / "adapter_config.json").read_text())
    assert (written["init_lora_weights"], written["r"], written["loftq_config"]) == (True, 8, {})
    plain = inlay.PeftModel.from_pretrained(net(), tmp_path / "end")
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / "end"))
    for i, (layer, first) in enumerate(zip(layers, begun, strict=True)):
        close(plain.base_model.model[i].get_delta_weight("default"), layer.get_delta_weight("default") - first, 1e-4)
    close(theirs(inputs()), plain(inputs()))
    # By default the quantised weight is computed again, and the function is that which was trained.
    model.save_pretrained(tmp_path / "same")
    again = inlay.PeftModel.from_pretrained(net(), tmp_path / "same")
    close(again(inputs()), model(inputs()))


def test_kept_by_its_name_while_training_and_put_back(tmp_path: Path) -> None:
    """What trainers of PiSSA do: the config says True while a copy is kept, then the copy is loaded back."""
    model = fresh(**COMPUTED["pissa"])
    train(model)
    out = model(inputs())
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.requires_grad * 1.0)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    close(model(inputs()), out)


# ---------------------------------------------------------------- from a quantised base


class Packed(nn.Linear):
    """Stands for a layer whose weight is held in 4 bits."""


class PackedStorage(Plain):
    name = "packed"
    in_place = False

    def owns(self, layer: nn.Module, *parameter: str) -> bool:
        return isinstance(layer, Packed)


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(storage, "STORAGES", (PackedStorage(), *storage.STORAGES))
    base = net()
    for i, layer in enumerate(base):  # type: ignore[arg-type]
        packed = Packed(layer.in_features, layer.out_features)
        packed.load_state_dict(layer.state_dict())
        with torch.no_grad():
            packed.weight.copy_(quantise(packed.weight, 2))
        base[i] = packed  # type: ignore[index]
    return base


def _originals(folder: Path, shards: bool = False) -> Path:
    tensors = {name: t.contiguous() for name, t in net().state_dict().items()}
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_loftq_after_the_fact(quantised: nn.Module, tmp_path: Path, shards: bool) -> None:
    model = fresh(quantised)
    before = [(w.base_layer.weight - o.weight).norm() for w, o in zip(model.base_model.model, net(), strict=True)]  # type: ignore[arg-type, union-attr]
    seen: list[str] = []

    def keep_the_first(inside: nn.Module, name: str) -> bool:
        assert inside is model
        seen.append(name)
        return len(seen) == 1

    inlay.replace_lora_weights_loftq(model, _originals(tmp_path, shards), callback=keep_the_first)
    assert seen == ["base_model.model.0", "base_model.model.1"]
    for i, (layer, original) in enumerate(zip(model.base_model.model, net(), strict=True)):  # type: ignore[arg-type]
        left = (layer.base_layer.weight + layer.get_delta_weight("default") - original.weight).norm()
        assert left < before[i] if i == 0 else left == before[i]
    if not shards:
        inlay.replace_lora_weights_loftq(model, tmp_path / "model.safetensors")
        assert model.base_model.model[1].get_delta_weight("default").norm() > 0


def test_loftq_after_the_fact_is_refused(quantised: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayerError, match="No quantised layer"):
        inlay.replace_lora_weights_loftq(fresh(), _originals(tmp_path))
    model = fresh(quantised)
    before = bits(model)
    with pytest.raises(KeyError):
        inlay.replace_lora_weights_loftq(model, tmp_path, "other")
    with pytest.raises(MissingFileError, match="model_path"):
        inlay.replace_lora_weights_loftq(model)
    with pytest.raises(MissingFileError):
        inlay.replace_lora_weights_loftq(model, tmp_path / "nowhere")
    save_file({"0.weight": torch.zeros(20, 12)}, tmp_path / "part.safetensors")
    with pytest.raises(MissingFileError, match=r"1\.weight"):
        inlay.replace_lora_weights_loftq(model, tmp_path / "part.safetensors")
    save_file({"0.weight": torch.zeros(20, 12), "1.weight": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(CorruptFileError, match=r"1\.weight"):
        inlay.replace_lora_weights_loftq(model, tmp_path / "odd.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"0.weight": "../up.safetensors"}}')
    with pytest.raises(CorruptFileError, match="weight_map"):
        inlay.replace_lora_weights_loftq(model, tmp_path)
    same_state(bits(model), before)


@pytest.mark.parametrize("bits_", [2, 4, 8])
def test_loftq_of_a_weight_alone(weight: Tensor, bits_: int) -> None:
    Q_OI, down_RI, up_OR = loftq_init(weight.half(), bits_, 4, num_iter=2)
    assert Q_OI.dtype == torch.float16
    start = inits.loftq(weight.half(), 4, 1.0, bits_, 2)
    same_bits(down_RI, start.down_RI)
    same_bits(up_OR, start.up_OR)
    close(Q_OI.float(), quantise(Q_OI.float(), bits_), tolerance=1e-2)
    assert float((Q_OI + up_OR @ down_RI - weight).norm()) < float((quantise(weight, bits_) - weight).norm())


@pytest.mark.parametrize("wrong", [(3, 4), (4, 4, 0), (4, 4, 11)])
def test_loftq_of_what_it_is_not_made_for(weight: Tensor, wrong: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        loftq_init(weight, *wrong)
    with pytest.raises(ConfigError, match="matrix"):
        loftq_init(weight[None], 4, 4)
