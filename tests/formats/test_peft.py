"""Names in memory and names on disk, and which names an adapter may have."""

from __future__ import annotations

import re

import pytest

from inlay.errors import AdapterNameError, LoadError
from inlay.formats.peft import PREFIX, adapter_dir, apply_key_mapping, check_adapter_name, strip_prefix


def test_strip_prefix() -> None:
    assert strip_prefix({PREFIX + "a": 1, PREFIX + "b": 2}) == {"a": 1, "b": 2}
    assert strip_prefix({"a": 1, "base_model.x": 2}) == {"a": 1, "base_model.x": 2}
    assert strip_prefix({PREFIX + PREFIX + "a": 1}) == {PREFIX + "a": 1}
    assert strip_prefix({}) == {}


@pytest.mark.parametrize(
    ("keys", "bad"),
    [
        ([PREFIX + "a", "b"], ["b"]),
        ([PREFIX + "a", "base_model.classifier.weight"], ["base_model.classifier.weight"]),
        (["module." + PREFIX + "a"], ["module." + PREFIX + "a"]),
        (["_orig_mod.module." + PREFIX + "a", PREFIX + "b"], ["_orig_mod.module." + PREFIX + "a"]),
    ],
)
def test_strip_prefix_refuses(keys: list[str], bad: list[str]) -> None:
    with pytest.raises(LoadError, match="key_mapping") as caught:
        strip_prefix(dict.fromkeys(keys, 0))
    assert caught.value.report is not None
    assert caught.value.report.unexpected == bad


def test_key_mapping() -> None:
    keys = ["model.layers.0.q", "lm_head", "visual.x"]
    mapping = {r"^model\.": "language_model.", r"layers": "never", r"^visual\.(\w)": r"vision.\1\1"}
    assert apply_key_mapping(keys, mapping) == {
        "model.layers.0.q": "language_model.layers.0.q",  # by the first that matches, and by that one alone
        "lm_head": "lm_head",
        "visual.x": "vision.xx",
    }
    assert apply_key_mapping(keys, None) == {key: key for key in keys}


def test_key_mapping_refuses() -> None:
    with pytest.raises(LoadError, match="one name, 'c'"):
        apply_key_mapping(["a", "b"], {"[ab]": "c"})
    with pytest.raises(re.error):
        apply_key_mapping(["a"], {"(": ""})


def test_adapter_dir() -> None:
    assert adapter_dir("out", "default").parts == ("out",)
    assert adapter_dir("out", "b").parts == ("out", "b")


@pytest.mark.parametrize("name", ["default", "a", "a b", "a-b_c", "0", "ä", "x" * 255, "layer0"])
def test_good_adapter_names(name: str) -> None:
    assert check_adapter_name(name) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        (None, "NoneType"),
        (3, "int"),
        (b"a", "bytes"),
        ("a/b", "'/'"),
        ("a\\b", r"'\\\\'"),
        ("a.b", r"'\.'"),
        (".", r"'\.'"),
        ("..", r"'\.'"),
        ("../x", "contains"),
        ("/etc", "'/'"),
        ("a\0", "printed"),
        ("a\nb", "printed"),
        ("\x1b[2J", "printed"),
        ("\ud800", "printed"),
        (" a", "space"),
        ("a ", "space"),
        ("a\n", "space"),
        ("x" * 256, "256 bytes"),
        ("ä" * 128, "256 bytes"),
        ("base_layer", "module"),
        ("forward", "module"),
    ],
)
def test_bad_adapter_names(name: object, why: str) -> None:
    with pytest.raises(AdapterNameError, match=why) as caught:
        check_adapter_name(name, frozenset({"base_layer", "forward"}))
    assert repr(name) in str(caught.value)
