"""Several methods in one model: any beside any, switched, merged, deleted, saved and loaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from laws import KINDS, OPTIONS, UNMERGEABLE, UNSUPPORTED, Case
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError, MissingFileError, UnknownAdapterError
from inlay.walk import wrappers

pytestmark = pytest.mark.filterwarnings("ignore:.* does not divide a layer's width")

_KINDS = ("Linear", "Conv2d", "Embedding", "MultiheadAttention")


def _first(method: str) -> str:
    return next(iter(OPTIONS[method]))


PAIRS = [
    (Case(one, _first(one), kind), Case(two, _first(two), kind))
    for one, two in itertools.combinations_with_replacement(OPTIONS, 2)
    for kind in _KINDS
    if all((m, _first(m), kind) not in {*UNSUPPORTED, *UNMERGEABLE} for m in (one, two))
]
pairs = pytest.mark.parametrize(
    ("one", "two"), PAIRS, ids=[f"{one.method}-{two.method}-{one.kind}" for one, two in PAIRS]
)


def mixed(one: Case, two: Case) -> inlay.PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(15)
        model = inlay.get_peft_model(one.base(), one.config(), adapter_name="a", mixed=True)
        model.add_adapter("b", two.config())
    laws.disturb(model)
    return model.eval()


def run(model: inlay.PeftModel, x: Tensor, names: Sequence[str]) -> Tensor:
    with model.use_adapter(names):
        h: Tensor = model(x)
    return h


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")], ids=" then ".join)
@pairs
def test_merged_equals_forward(one: Case, two: Case, order: tuple[str, str]) -> None:
    x, model = one.inputs(), mixed(one, two)
    assert isinstance(model, inlay.PeftMixedModel)
    before, expected = laws.bits(model), run(model, x, order)
    for name in order:
        assert float((run(model, x, [name]) - expected).detach().abs().max()) > 1e-3
    model.set_adapter(list(order))
    laws.close(model(x), expected)
    model.merge_adapter()
    laws.close(model(x), expected)
    with model.disable_adapter():
        laws.close(model(x), one.base()(x))
    model.unmerge_adapter()
    laws.same_state(laws.bits(model), before)
    plain = model.merge_and_unload()
    assert not list(wrappers(plain))
    laws.close(plain(x), expected)


@pairs
def test_rows(one: Case, two: Case) -> None:
    if not one.row.rows:
        pytest.skip("its rows cannot be reached, with one method or several")
    names = ("a", "b", "__base__", "b", "a")
    x, model = one.inputs(len(names)), mixed(one, two)
    expected = [
        one.base()(x[i : i + 1]) if n == "__base__" else run(model, x[i : i + 1], [n]) for i, n in enumerate(names)
    ]
    laws.close(model(x, adapter_names=list(names)), torch.cat(expected))


@pairs
def test_saved_in_a_folder_each_and_loaded(one: Case, two: Case, tmp_path: Path) -> None:
    x, model = one.inputs(), mixed(one, two)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["a", "b"]
    with pytest.raises(MissingFileError, match=r"Folders in it have one: a, b\."):
        inlay.PeftMixedModel.from_pretrained(one.base(), tmp_path)
    again = inlay.PeftMixedModel.from_pretrained(one.base(), tmp_path / "a", adapter_name="a")
    again.load_adapter(tmp_path / "b", adapter_name="b")
    assert isinstance(again, inlay.PeftMixedModel)
    for names in (["a"], ["b"], ["a", "b"]):
        laws.close(run(again, x, names), run(model, x, names))
    single = inlay.PeftModel.from_pretrained(two.base(), tmp_path / "b")
    laws.close(single(x), run(model, x, ["b"]))


@pairs
def test_one_is_deleted_and_the_other_stays(one: Case, two: Case) -> None:
    x, model = one.inputs(), mixed(one, two)
    expected = run(model, x, ["b"])
    model.set_adapter(["a", "b"])
    model.delete_adapter("a")
    laws.close(model(x), expected)
    assert model.active_adapters == ["b"]
    assert list(model.peft_config) == ["b"]
    assert all("a" not in w.methods for _, w in wrappers(model) if isinstance(w, inlay.adapted.Adapted))
    laws.same_bits(model.unload()(x), one.base().requires_grad_(False)(x))


@pytest.mark.parametrize("names", [["a", "b"], ("b",), "a"], ids=str)
def test_several_are_deleted_at_once(names: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    model = inlay.get_peft_model(net, inlay.LoraConfig(target_modules=["0"]), "a", mixed=True)
    model.add_adapter("b", inlay.LoHaConfig(target_modules=["0"]))
    model.add_adapter("c", inlay.IA3Config(target_modules=["0"], feedforward_modules=[]))
    model.set_adapter("c")
    with pytest.raises(UnknownAdapterError, match="nobody"):
        model.delete_adapter(["a", "nobody"])
    assert list(model.peft_config) == ["a", "b", "c"]
    model.delete_adapter(names)
    assert list(model.peft_config) == [n for n in "abc" if n not in names]


@pairs
def test_both_train(one: Case, two: Case) -> None:
    model = mixed(one, two).train()
    model.set_adapter(["a", "b"])
    wanted = set(laws.adapter_tensors(model, trained=True))
    assert set(laws.gradients(model, model(one.inputs()))) == wanted


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")], ids=" then ".join)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
def test_a_change_taken_from_the_frozen_layer_beside_a_changed_input(
    kind: str, training: bool, order: tuple[str, str]
) -> None:
    """DoRA rescales what the frozen layer makes of its own input, not of the rotated one."""
    one, two = Case("LORA", "dora", kind), Case("OFT", "plain", kind)
    x, model = one.inputs(), mixed(one, two).train(training)
    model.set_adapter(list(order))
    expected = model(x)
    for name in order:
        assert float((run(model, x, [name]) - expected).detach().abs().max()) > 1e-3
    model.merge_adapter()
    laws.close(model(x), expected)


def _other_methods() -> list[str]:
    return [method for method in OPTIONS if method != "LORA"]


@pytest.mark.parametrize("method", _other_methods())
def test_a_plain_handle_holds_one_method(method: str, tmp_path: Path) -> None:
    lora, other = Case("LORA", "plain", "Linear"), laws.home(method)
    other.adapted().save_pretrained(tmp_path)
    model = lora.adapted()
    before = laws.bits(model)
    with pytest.raises(ConfigError, match="mixed=True"):
        model.add_adapter("b", other.config())
    with pytest.raises(ConfigError, match="mixed=True"):
        model.load_adapter(tmp_path / "a", adapter_name="b")
    laws.same_state(laws.bits(model), before)
    assert list(model.peft_config) == ["a"]


def test_kinds_are_those_of_the_laws() -> None:
    assert set(_KINDS) <= set(KINDS)
