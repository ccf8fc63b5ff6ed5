"""Models that accelerate keeps in memory or on the disk while they do not run: the numbers of where they stand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import bits, close, disturb, same_bits, same_state
from own_nets import CELLS, NETS, config_of
from torch import Tensor, nn

import inlay
from inlay import functional
from inlay.errors import NotMergeableError
from inlay.storage.placement import onload_layer
from inlay.walk import wrappers

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
WAYS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), CPU),
    # A part stays where it is and is hooked all the same, as on several GPUs.
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, {"lin0": "cpu", "lin1": "disk", "head": "cpu"}, offload_dir=str(folder)
    ),
}
CONFIGS: dict[str, Callable[[], Any]] = {
    method: lambda method=method: config_of(method, "mlp") for method, net in CELLS if net == "mlp"
}
CONFIGS["dora"] = lambda: inlay.LoraConfig(r=2, use_dora=True, target_modules=["lin0", "lin1"])
CONFIGS["a head, too"] = lambda: inlay.LoraConfig(r=2, target_modules=["lin1"], modules_to_save=["head"])


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return NETS["mlp"][0]().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 10)


def adapted(base: nn.Module, config: Any) -> inlay.PeftModel:
    model = inlay.get_peft_model(copy.deepcopy(base), config).eval()
    disturb(model)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(sorted(inlay.get_peft_model_state_dict(model).items()))


def offloaded(base: nn.Module, config: str, way: str, when: str, folder: Path) -> tuple[Any, Any]:
    """An adapted model, and the same offloaded before or after it has its adapter."""
    plain = adapted(base, CONFIGS[config]())
    plain.save_pretrained(folder / "saved")
    model: Any = copy.deepcopy(base)
    if when == "after":
        model = inlay.PeftModel.from_pretrained(model, folder / "saved")
        WAYS[way](model.get_base_model(), folder / "offload")
    else:
        WAYS[way](model, folder / "offload")
        if when == "loaded":
            model = inlay.PeftModel.from_pretrained(model, folder / "saved")
        else:
            model = adapted(model, CONFIGS[config]())
            assert not any(t.is_meta for t in tensors(model).values())
            inlay.set_peft_model_state_dict(model, tensors(plain))
    assert any(p.is_meta for p in model.parameters())
    return plain, model.eval()


# Every way for the ways in which tensors are kept, and one for the mathematics of the rest.
EVERY = [
    (config, way, when)
    for config in CONFIGS
    for way in WAYS
    for when in ("fresh", "loaded", "after")
    if config in ("LORA", "LOHA", "dora", "a head, too") or (way, when) == ("disk_offload", "loaded")
]


@pytest.mark.parametrize(("config", "way", "when"), EVERY)
@torch.no_grad()
def test_offloaded_runs_saves_and_loads(
    base: nn.Module, x: Tensor, tmp_path: Path, config: str, way: str, when: str
) -> None:
    plain, model = offloaded(base, config, way, when, tmp_path)
    wanted = plain(x)
    assert float((wanted - base(x)).abs().max()) > 1e-3, "the adapter does nothing"
    for _ in range(2):
        close(model(x), wanted)
    with model.disable_adapter():
        close(model(x), base(x))
    same_state(tensors(model), tensors(plain))
    model.save_pretrained(tmp_path / "again")
    close(inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")(x), wanted)

    # Other values, and another adapter beside it.
    halved = {key: 0.5 * t for key, t in tensors(plain).items()}
    inlay.set_peft_model_state_dict(plain, halved)
    inlay.set_peft_model_state_dict(model, halved)
    model.load_adapter(tmp_path / "saved", "whole")
    model.set_adapter("whole")
    close(model(x), wanted)
    model.set_adapter("default")
    close(model(x), plain(x))
    same_state(tensors(model), tensors(plain))


@pytest.mark.parametrize(("config", "way", "when"), EVERY)
@torch.no_grad()
def test_offloaded_merges_and_unmerges(
    base: nn.Module, x: Tensor, tmp_path: Path, config: str, way: str, when: str
) -> None:
    plain, model = offloaded(base, config, way, when, tmp_path)
    wanted, frozen = plain(x), _base_of(model, x)
    files = {path: path.read_bytes() for path in (tmp_path / "offload").glob("*")}
    for _ in range(2):
        model.merge_adapter()
        close(model(x), wanted)
        with model.disable_adapter():
            close(model(x), frozen)
        model.unmerge_adapter()
        same_bits(_base_of(model, x), frozen)
    close(model(x), wanted)
    close(model.merge_and_unload()(x), wanted)
    assert {path: path.read_bytes() for path in (tmp_path / "offload").glob("*")} == files  # another run may use them


def _base_of(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return model(x)


@pytest.mark.parametrize("config", ["LORA", "LOHA", "a head, too"])
@pytest.mark.parametrize("way", WAYS)
def test_adapter_of_an_offloaded_base_is_trained(
    base: nn.Module, x: Tensor, tmp_path: Path, config: str, way: str
) -> None:
    plain, model = offloaded(base, config, way, "fresh", tmp_path)
    for each in (plain, model):
        each.set_requires_grad("default")
        each(x).square().mean().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert list(found) == list(wanted)
    for name, gradient in found.items():
        close(gradient, wanted[name])


@pytest.mark.parametrize("way", WAYS)
def test_a_head_that_is_trained_has_no_copy_of_the_model_in_its_hooks(
    base: nn.Module, tmp_path: Path, way: str
) -> None:
    WAYS[way](base, tmp_path)
    model = inlay.get_peft_model(base, CONFIGS["a head, too"]())
    head = model.get_base_model().head
    copied = head.modules_to_save["default"]
    assert not any(p.is_meta for p in copied.parameters())
    assert way == "dispatch_model" or "_hf_hook" not in copied.__dict__


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
@torch.no_grad()
def test_offloaded_twice_and_brought_back(base: nn.Module, x: Tensor, tmp_path: Path, way: str) -> None:
    plain, model = offloaded(base, "LORA", way, "loaded", tmp_path)
    wanted = plain(x)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any("_hf_hook" in m.__dict__ for m in model.modules())
    close(model(x), wanted)
    WAYS[way](model, tmp_path / "again")
    close(model(x), wanted)
    with model.disable_adapter():
        close(model(x), base(x))


@pytest.mark.parametrize("when", ["loaded", "after"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_base_of_an_offloaded_model_is_read_and_written(
    base: nn.Module, x: Tensor, tmp_path: Path, way: str, when: str
) -> None:
    plain, model = offloaded(base, "a head, too", way, when, tmp_path)
    same_state(functional.get_base_model_state_dict(model), base.state_dict())
    other = {name: 0.5 * t + 0.1 for name, t in base.state_dict().items()}
    for each in (plain, model):
        functional.set_base_model_state_dict(each, other)
    same_state(functional.get_base_model_state_dict(model), other)
    close(model(x), plain(x))
    close(_base_of(model, x), _base_of(plain, x))


def test_tied_weight_that_is_offloaded_does_not_merge(tiny: Callable[[str], nn.Module], tokens_BT: Tensor) -> None:
    model: Any = tiny("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model = adapted(model, inlay.LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        wanted = model(tokens_BT).logits
        accelerate.cpu_offload(model.get_base_model(), CPU)
        with pytest.raises(NotMergeableError, match="offloaded"):
            model.merge_adapter()
        assert not any(layer.merged for _, layer in wrappers(model.get_base_model()))
        close(model(tokens_BT).logits, wanted)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.4}], ids=str)
@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
@torch.no_grad()
def test_language_model_runs_as_before(
    tiny: Callable[[str], nn.Module], tokens_BT: Tensor, tmp_path: Path, fields: dict[str, Any], where: str
) -> None:
    model = adapted(tiny("llama"), inlay.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **fields))
    torch.manual_seed(0)
    trained = model.train()(tokens_BT).logits
    wanted = model.eval()(tokens_BT).logits
    state = bits(model)
    WAYS[where](model.get_base_model(), tmp_path)
    close(model(tokens_BT).logits, wanted)
    torch.manual_seed(0)
    close(model.train()(tokens_BT).logits, trained)
    model.eval().merge_adapter()
    close(model(tokens_BT).logits, wanted)
    model.unmerge_adapter()
    accelerate.hooks.remove_hook_from_submodules(model)
    if where == "cpu_offload":
        same_state(bits(model), state)


@pytest.mark.parametrize("whole", [False, True], ids=["a layer", "the model"])
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
@torch.no_grad()
def test_an_offloaded_layer_is_at_hand_and_keeps_what_is_written(
    base: nn.Module, x: Tensor, tmp_path: Path, way: str, whole: bool
) -> None:
    model = adapted(base, CONFIGS["LORA"]())
    layer: Any = model.base_model.model.lin1
    weights = layer.base_layer.weight.clone(), layer.lora_A["default"].weight.clone()
    layer.base_layer.weight.mul_(2)
    wanted = model(x)
    layer.base_layer.weight.copy_(weights[0])
    WAYS[way](model.get_base_model(), tmp_path)
    assert layer.base_layer.weight.is_meta
    with onload_layer(model if whole else layer):
        same_bits(layer.base_layer.weight, weights[0])
        same_bits(layer.lora_A["default"].weight, weights[1])
        layer.base_layer.weight.mul_(2)
    assert layer.base_layer.weight.is_meta
    assert layer.lora_A["default"].weight.is_meta
    with onload_layer(layer):
        same_bits(layer.base_layer.weight, weights[0] * 2)
    close(model(x), wanted)


def test_what_is_not_offloaded_stays(base: nn.Module) -> None:
    before = bits(base)
    with onload_layer(base):
        same_state(bits(base), before)
    same_state(bits(base), before)
