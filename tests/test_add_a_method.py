"""A method in one file outside the package: the page's example, and the laws run over it unasked."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from laws import KINDS, LAWS, MERGE_LAWS, STORAGE, Case, Law, Option, cells

import inlay
from inlay.config import PeftType
from inlay.errors import ConfigError, DuplicateAdapterError, NotMergeableError, PlanError
from inlay.methods import METHODS, AbstractAdapter

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "ssf.py"
_KINDS = [name for name, kind in KINDS.items() if kind.row.startswith(("Linear", "Conv"))]
_REFUSED = {("SSF", "plain", kind) for kind in ("Linear without bias", "Conv2d dilated")}
CASES = [Case("SSF", "plain", kind) for kind in _KINDS]
MERGING = [case for case in CASES if case.key not in _REFUSED]
CASES += [Case("SSF", "plain", "Linear", storage) for storage in STORAGE if storage != "plain"]

pytestmark = pytest.mark.filterwarnings("ignore:Merged into 1 packed weights")


@pytest.fixture(autouse=True)
def ssf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file imported as its user would, and forgotten again."""
    spec = importlib.util.spec_from_file_location("ssf_of_the_page", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    option = Option({}, identity=True, additive=False)
    monkeypatch.setitem(laws.OPTIONS, "SSF", {"plain": option})
    reason = (NotMergeableError, "there is no bias to write to")
    for key in _REFUSED:
        monkeypatch.setitem(laws.UNMERGEABLE, key, reason)
    yield
    METHODS.pop("SSF", None)
    PeftType._member_map_.pop("SSF", None)
    PeftType._value2member_map_.pop("SSF", None)


@pytest.mark.parametrize(("law", "case"), cells(LAWS, CASES))
def test_law(law: Law, case: Case) -> None:
    law(case)


@pytest.mark.parametrize(("law", "case"), cells(MERGE_LAWS, MERGING))
def test_law_of_merging(law: Law, case: Case) -> None:
    law(case)


def test_page_shows_the_file() -> None:
    assert f"```python\n{FILE.read_text()}```\n" in (ROOT / "docs" / "add-a-method.md").read_text()


def test_beside_a_method_of_the_package() -> None:
    config_cls = METHODS["SSF"].config
    net = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval()
    model = inlay.get_peft_model(net, inlay.LoraConfig(r=2, target_modules=["0"]), adapter_name="a", mixed=True)
    model.add_adapter("b", config_cls(target_modules=["0"], init_weights=False))  # type: ignore[call-arg]
    laws.disturb(model)
    model.set_adapter(["a", "b"])
    x = torch.randn(2, 4)
    expected = model(x)
    model.merge_adapter()
    laws.close(model(x), expected)


@pytest.mark.parametrize("name", ["scale", "ssf_a.b", "base_layer", "lora_A"])
def test_names_of_tensors_are_checked(name: str) -> None:
    class Renamed(METHODS["SSF"].adapter):  # type: ignore[name-defined, misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.slots["scale"] = self.slots["scale"]._replace(name=name)

    METHODS["SSF"] = replace(METHODS["SSF"], adapter=Renamed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(ConfigError, match=f"ssf_.*{name}"):
        inlay.get_peft_model(net, METHODS["SSF"].config(target_modules=["0"]))
    assert type(net[0]) is torch.nn.Linear


def test_kinds_are_checked() -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(4, 3))
    with pytest.raises(PlanError, match="Embedding"):
        inlay.get_peft_model(net, METHODS["SSF"].config(target_modules=["0"]))


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"name": "Ssf"}, ConfigError),
        ({"name": "ssf_"}, ConfigError),
        ({"name": "other"}, ConfigError),
        ({"name": "ssf"}, DuplicateAdapterError),
    ],
)
def test_registering_what_cannot_be(other: dict[str, str], error: type[Exception]) -> None:
    row, before = METHODS["SSF"], dict(METHODS)
    with pytest.raises(error):
        inlay.register_peft_method(config_cls=row.config, model_cls=row.adapter, **other)
    assert before == METHODS


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"config_cls": dict}, "config_cls"),
        ({"config_cls": inlay.PeftConfig}, "config_cls"),
        ({"model_cls": torch.nn.Linear}, "model_cls"),
        ({"model_cls": AbstractAdapter}, "initialise"),
        ({"kinds": ["Linear", "Lineer"]}, "Lineer"),
        ({"kinds": "Lineer"}, "kinds"),
        ({"hooks": int}, "hooks"),
    ],
    ids=str,
)
def test_what_is_registered_is_looked_at(wrong: dict[str, Any], told: str) -> None:
    row, before = METHODS["SSF"], dict(METHODS)
    free = type("FreeConfig", (row.config,), {"method": "FREE"})
    try:
        with pytest.raises(ConfigError, match=told):
            inlay.register_peft_method(**{"name": "free", "config_cls": free, "model_cls": row.adapter, **wrong})
        assert before == METHODS
    finally:
        METHODS.pop("FREE", None)
