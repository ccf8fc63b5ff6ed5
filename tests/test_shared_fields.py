"""The fields that every method's config shares work for every method, also where PEFT's config of it lacks them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from laws import OPTIONS
from torch import Tensor, nn

import inlay
from inlay.adapted import Adapted
from inlay.config import AdapterConfig
from inlay.errors import PeftWarning
from inlay.methods import METHODS
from inlay.walk import wrappers

pytestmark = pytest.mark.filterwarnings("ignore:.* does not divide a layer's width")

each = pytest.mark.parametrize("method", [method for method in OPTIONS if "Linear" in METHODS[method].kinds])
every = pytest.mark.parametrize("method", OPTIONS)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(12, 12)
        self.value = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.value(torch.tanh(self.query(x)))
        return h


class Tower(nn.Module):
    """Three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.others = nn.ModuleList([Block()])
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.layers, *self.others):
            x = x + block(x)
        h: Tensor = self.head(x)
        return h


def config(method: str, **fields: Any) -> AdapterConfig:
    row = METHODS[method]
    return row.config(**{"target_modules": ["query", "value"], **row.config.example, **fields})  # type: ignore[arg-type]


def adapted(method: str, **fields: Any) -> tuple[inlay.PeftModel, list[str]]:
    """The model, and the layers that have an adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = inlay.get_peft_model(Tower(), config(method, **fields))
    root = model.get_base_model()
    return model, [path for path, w in wrappers(root) if isinstance(w, Adapted)]


def returns(model: inlay.PeftModel, folder: Path) -> inlay.PeftModel:
    """Saves what has been trained a little, loads it again, and holds both against each other."""
    laws.disturb(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.requires_grad * 0.1)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(6))
    model.save_pretrained(folder)
    again = inlay.PeftModel.from_pretrained(Tower(), folder)
    laws.close(again(x), model.eval()(x))
    return again


def layers(*indices: int, inside: str = "layers", of: Sequence[str] = ("query", "value")) -> list[str]:
    return [f"{inside}.{i}.{name}" for i in indices for name in of]


@each
def test_exclude_modules(method: str, tmp_path: Path) -> None:
    model, found = adapted(method, exclude_modules=["layers.1.query", "others.0.value"])
    assert found == [
        p for p in [*layers(0, 1, 2), *layers(0, inside="others")] if p not in ("layers.1.query", "others.0.value")
    ]
    returns(model, tmp_path)


@each
def test_layers_to_transform(method: str, tmp_path: Path) -> None:
    model, found = adapted(method, layers_to_transform=[0, 2], layers_pattern="layers")
    assert found == layers(0, 2)
    assert returns(model, tmp_path).peft_config["default"].layers_to_transform == [0, 2]


@each
def test_modules_to_save(method: str, tmp_path: Path) -> None:
    model, _ = adapted(method, modules_to_save=["head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if ".head." in n} == {
        f"base_model.model.head.modules_to_save.default.{n}" for n in ("weight", "bias")
    }
    assert trained - set(laws.adapter_tensors(model)) == {n for n in trained if ".head." in n}
    returns(model, tmp_path)


@each
@pytest.mark.parametrize("which", ["all", "only"])
def test_bias(method: str, which: str, tmp_path: Path) -> None:
    bias = "all" if which == "all" else METHODS[method].config.bias_only
    model, found = adapted(method, bias=bias)
    trained = {name for name, p in model.named_parameters() if p.requires_grad} - set(laws.adapter_tensors(model))
    wanted = {f"base_model.model.{path}.base_layer.bias" for path in found}
    assert trained == (wanted | {"base_model.model.head.bias"} if which == "all" else wanted)
    kept = {name: model.get_parameter(name).detach().clone() for name in trained}
    with pytest.warns(PeftWarning, match="stay in place"), model.disable_adapter():
        assert all(torch.equal(model.get_parameter(name), t) for name, t in kept.items())
    returns(model, tmp_path)


@each
def test_patterns(method: str, tmp_path: Path) -> None:
    """A value of every table reaches the layers that it names, and no others."""
    for field, table in METHODS[method].config.patterned.items():
        other = 3 if field != "oft_block_size" else 4
        model, _ = adapted(method, **{table: {"layers.1.value": other, r".*\.2\.query": other}})
        shown = {
            p: getattr(w, field)["default"] for p, w in wrappers(model.get_base_model()) if isinstance(w, Adapted)
        }
        named = {p for p, value in shown.items() if value == other}
        assert named == {"layers.1.value", "layers.2.query"}, (field, shown)
        returns(model, tmp_path / table)


@each
def test_regex_and_all_linear(method: str) -> None:
    _, found = adapted(method, target_modules=r".*layers\.[12]\.query")
    assert found == ["layers.1.query", "layers.2.query"]
    _, found = adapted(method, target_modules="all-linear")
    assert len(found) == 9


@every
def test_files_have_only_what_peft_knows(method: str) -> None:
    """Fields that PEFT's config of the method lacks are written when they are set, and only then."""
    import peft

    row = METHODS[method]
    theirs = getattr(peft, row.config.__name__)
    written = config(method, **({"total_step": 10} if method == "ADALORA" else {})).to_dict()
    assert set(written) <= set(theirs.__dataclass_fields__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs.from_peft_type(**written)


@every
def test_a_config_says_which_field_is_wrong(method: str) -> None:
    with pytest.raises(TypeError, match=r"target_module.*target_modules"):
        config(method, target_module=["query"])
    with pytest.raises(ValueError, match="bias"):
        config(method, bias="some")
    with pytest.raises(ValueError, match="layers_pattern"):
        config(method, layers_pattern="layers")


@each
def test_what_matches_nothing_is_said(method: str) -> None:
    with pytest.warns(PeftWarning, match=r"'valu' in target_modules matched 0 of .* modules; closest: value"):
        adapted(method, target_modules=["query", "valu"])
