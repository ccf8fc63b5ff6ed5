"""Values of configs: types and intervals, from a constructor and from a file alike."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest

import inlay
from inlay.config import AdapterConfig, within
from inlay.errors import ConfigError, FieldTypeError, UnknownArgumentError
from inlay.methods import METHODS


@dataclass
class Measured(AdapterConfig):
    share: float = field(default=0.5, metadata=within("[0, 1)"))
    count: int | None = field(default=None, metadata=within("(0, inf)"))
    table: dict[str, int] = field(default_factory=dict, metadata=within("[1, 10]"))

    method: ClassVar[str] = "LORA"


@pytest.mark.parametrize(
    "given",
    [{"share": 0}, {"share": 0.999}, {"count": 1}, {"count": 10**400}, {"count": None}, {"table": {"a": 1, "b": 10}}],
)
def test_inside(given: dict[str, Any]) -> None:
    config = Measured(**given)
    assert all(getattr(config, name) == value for name, value in given.items())


@pytest.mark.parametrize(
    ("given", "interval"),
    [
        ({"share": 1}, r"\[0, 1\)"),
        ({"share": -1e-9}, r"\[0, 1\)"),
        ({"share": float("inf")}, "float"),
        ({"share": float("nan")}, "float"),
        ({"count": 0}, r"\(0, inf\)"),
        ({"table": {"a": 1, "b": 11}}, r"\[1, 10\], got 11"),
        ({"table": {"a": 10**400}}, r"\[1, 10\], got 10{19}\."),
    ],
)
def test_outside(given: dict[str, Any], interval: str) -> None:
    with pytest.raises(ConfigError, match=interval):
        Measured(**given)


@pytest.mark.parametrize("given", [{"share": "0.5"}, {"share": True}, {"count": 1.0}, {"table": [1]}])
def test_another_type(given: dict[str, Any]) -> None:
    with pytest.raises(FieldTypeError, match=next(iter(given))):
        Measured(**given)


@pytest.mark.parametrize("method", METHODS)
def test_every_interval_holds_its_default(method: str) -> None:
    """And a file's value is held against it as a constructor's is."""
    row = METHODS[method]
    bounded = [f.name for f in fields(row.config) if f.metadata.get("within")]
    assert bounded or method == "IA3"
    values = row.config(**row.config.example).to_dict()
    for name in bounded:
        wrong: Any = {"x": -(10**12)} if isinstance(getattr(row.config(), name), dict) else -(10**12)
        with pytest.raises(ConfigError, match=rf"{name} must be in"):
            inlay.PeftConfig.from_dict({**values, name: wrong})


def test_keywords_of_from_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inlay.LoraConfig(r=3, target_modules=["q"]).save_pretrained(tmp_path)
    made = inlay.PeftConfig.from_pretrained(tmp_path, lora_alpha=5, trust_remote_code=True, token=None)
    assert isinstance(made, inlay.LoraConfig)
    assert (made.r, made.lora_alpha) == (3, 5)
    with pytest.raises(UnknownArgumentError, match="closest: lora_alpha"):
        inlay.PeftConfig.from_pretrained(tmp_path, lora_alfa=5)
    monkeypatch.setattr(inlay.settings, "strict_load", False)
    assert inlay.PeftConfig.from_pretrained(tmp_path, num_labels=5) == inlay.LoraConfig(r=3, target_modules=["q"])
