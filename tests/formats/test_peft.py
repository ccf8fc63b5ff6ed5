"""Names in memory and names on disk, and which names an adapter may have."""

from __future__ import annotations

import re

import pytest

from inlay.errors import AdapterNameError, LoadError
from inlay.formats.peft import adapter_dir, apply_key_mapping, check_adapter_name, from_disk, strip_prefix, to_disk

LORA = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
SLOTS = LORA | {"trainable_tokens_delta", "hada_w1_a", "osf_svd_params", "adamss_A"}
P = "base_model.model."

# live name, adapter, key on disk; both ways
NAMES = [
    (P + "q.lora_A.default.weight", "default", P + "q.lora_A.weight"),
    (P + "q.lora_B.default.bias", "default", P + "q.lora_B.bias"),
    (P + "q.lora_magnitude_vector.default.weight", "default", P + "q.lora_magnitude_vector"),
    (P + "wte.lora_embedding_A.default", "default", P + "wte.lora_embedding_A"),
    (P + "wte.token_adapter.trainable_tokens_delta.a", "a", P + "wte.token_adapter.trainable_tokens_delta"),
    (P + "mha.base_layer.out_proj.lora_A.x.weight", "x", P + "mha.base_layer.out_proj.lora_A.weight"),
    (P + "q.hada_w1_a.default", "default", P + "q.hada_w1_a"),
    (P + "q.osf_svd_params.default.U_low", "default", P + "q.osf_svd_params.U_low"),
    (P + "q.adamss_A.default.0", "default", P + "q.adamss_A.0"),
    ("q.lora_A.default.weight", "default", "q.lora_A.weight"),
    # an adapter named as something else in the path is
    (P + "layers.0.q.lora_A.0.weight", "0", P + "layers.0.q.lora_A.weight"),
    (P + "q.lora_A.weight.weight", "weight", P + "q.lora_A.weight"),
    (P + "layers.0.bias", "0", P + "layers.0.bias"),
    (P + "layers.0.base_layer.bias", "base_layer", P + "layers.0.base_layer.bias"),
]


@pytest.mark.parametrize(("live", "adapter", "disk"), NAMES)
def test_names_both_ways(live: str, adapter: str, disk: str) -> None:
    assert to_disk(live, adapter, SLOTS) == disk
    assert from_disk(disk, adapter, SLOTS) == live


@pytest.mark.parametrize(
    ("live", "disk"),
    [
        ("score.modules_to_save.default.weight", "score.weight"),
        ("score.modules_to_save.default.dense.bias", "score.dense.bias"),
        ("a.default.b.modules_to_save.default.default.weight", "a.default.b.default.weight"),
    ],
)
def test_whole_modules(live: str, disk: str) -> None:
    assert to_disk(P + live, "default", LORA) == P + disk


def test_another_adapters_name_stays() -> None:
    assert to_disk("q.lora_A.other.weight", "default", LORA) == "q.lora_A.other.weight"


def test_old_files_hold_the_magnitude_with_its_weight() -> None:
    assert from_disk("q.lora_magnitude_vector.weight", "a", LORA) == "q.lora_magnitude_vector.a.weight"


def test_strip_prefix() -> None:
    assert strip_prefix({P + "a": 1, P + "b": 2}) == {"a": 1, "b": 2}
    assert strip_prefix({"a": 1, "base_model.x": 2}) == {"a": 1, "base_model.x": 2}
    assert strip_prefix({P + P + "a": 1}) == {P + "a": 1}
    assert strip_prefix({}) == {}
    vera = {"base_model.vera_A": 1, "base_model.vera_B": 2, P + "q.vera_lambda_b": 3}
    assert strip_prefix(vera, {"vera_A", "vera_B"}) == {
        "base_model.vera_A": 1,
        "base_model.vera_B": 2,
        "q.vera_lambda_b": 3,
    }


@pytest.mark.parametrize(
    ("keys", "bad"),
    [
        ([P + "a", "b"], ["b"]),
        ([P + "a", "base_model.classifier.weight"], ["base_model.classifier.weight"]),
        (["module." + P + "a"], ["module." + P + "a"]),
        (["_orig_mod.module." + P + "a", P + "b"], ["_orig_mod.module." + P + "a"]),
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
