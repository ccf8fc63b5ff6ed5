"""Configs: equal fields, defaults and dicts; each library reads what the other writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from parity.helpers import ident, peft, peft_may_warn

import inlay

THEIRS = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}
OURS = {f.name: f for f in dataclasses.fields(inlay.LoraConfig)}

# Values that survive a round trip, field by field; every field of PEFT's config is here or in WAITING.
VALUES: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": {"base_model_class": "X", "parent_library": "transformers"},
    "peft_version": "0.17.1",
    "base_model_name_or_path": "some/base",
    "revision": "main",
    "inference_mode": True,
    "r": 5,
    "target_modules": ["q", "v"],
    "exclude_modules": ["k"],
    "lora_alpha": 7,
    "lora_dropout": 0.25,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [1, 2],
    "layers_pattern": "layers",
    "rank_pattern": {"q": 2},
    "alpha_pattern": {"v": 3},
    "megatron_core": "elsewhere",
    "trainable_token_indices": {"embed": [1, 2]},
    "use_dora": True,
    "layer_replication": [(0, 2), (1, 2)],
    "lora_bias": True,
    "target_parameters": ["experts.up"],
    "ensure_weight_tying": True,
    "qalora_group_size": 8,
}
WAITING = {
    "megatron_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "runtime_config",
}
WITH = {"layers_pattern": {"layers_to_transform": [1], "target_modules": ["q"]}}


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _comparable(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return getattr(value, "value", value)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What JSON makes of a dict, lists of strings sorted."""
    read = json.loads(json.dumps(values, default=sorted))
    return {k: sorted(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for k, v in read.items()}


def test_every_field_exists_and_no_other() -> None:
    assert set(OURS) == set(THEIRS) == set(VALUES) | WAITING


@pytest.mark.parametrize("name", THEIRS)
def test_equal_defaults(name: str) -> None:
    assert _comparable(_default(OURS[name])) == _comparable(_default(THEIRS[name]))
    assert _comparable(getattr(inlay.LoraConfig(), name)) == _comparable(getattr(peft.LoraConfig(), name))


def test_equal_order_of_positional_arguments() -> None:
    """`LoraConfig("CAUSAL_LM")` and the like."""
    init = [f.name for f in dataclasses.fields(peft.LoraConfig) if f.init]
    assert init[:1] == [f.name for f in dataclasses.fields(inlay.LoraConfig) if f.init][:1]


def test_equal_dicts() -> None:
    theirs, ours = peft.LoraConfig().to_dict(), inlay.LoraConfig().to_dict()
    assert ours.keys() == theirs.keys()
    assert _plain(ours) == _plain(theirs)


@pytest.mark.parametrize("name", VALUES)
def test_equal_dicts_with_a_value(name: str) -> None:
    fields = {name: VALUES[name], **WITH.get(name, {})}
    with peft_may_warn():
        theirs = peft.LoraConfig(**fields).to_dict()
    assert _plain(inlay.LoraConfig(**fields).to_dict()) == _plain(theirs)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "target_parameters", "modules_to_save"])
@pytest.mark.parametrize("value", [["a", "b"], {"a", "b"}, "a"], ids=ident)
def test_equal_containers(name: str, value: Any) -> None:
    if name in ("target_parameters", "modules_to_save") and value != ["a", "b"]:
        pytest.skip("only lists are defined for it")
    theirs, ours = (getattr(library.LoraConfig(**{name: value}), name) for library in (peft, inlay))
    assert ours == theirs
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("name", VALUES)
def test_round_trips_through_a_file_of_the_other(name: str, tmp_path: Path) -> None:
    fields = {name: VALUES[name], **WITH.get(name, {})}
    with peft_may_warn():
        peft.LoraConfig(**fields).save_pretrained(tmp_path / "theirs")
    inlay.LoraConfig(**fields).save_pretrained(tmp_path / "ours")
    with peft_may_warn():
        theirs = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    ours = inlay.PeftConfig.from_pretrained(tmp_path / "theirs")
    assert type(theirs) is peft.LoraConfig
    assert type(ours) is inlay.LoraConfig
    assert _plain(ours.to_dict()) == _plain(theirs.to_dict())
    assert _comparable(getattr(ours, name)) == _comparable(getattr(inlay.LoraConfig(**fields), name))


def test_text_of_files(tmp_path: Path) -> None:
    peft.LoraConfig(target_modules=["q"]).save_pretrained(tmp_path / "theirs")
    inlay.LoraConfig(target_modules=["q"]).save_pretrained(tmp_path / "ours")
    theirs, ours = ((tmp_path / d / "adapter_config.json").read_text() for d in ("theirs", "ours"))
    assert ours == theirs


def test_an_unknown_field_is_an_error_in_both() -> None:
    for library in (peft, inlay):
        with pytest.raises(TypeError, match="lora_alfa"):
            library.LoraConfig(lora_alfa=3)


def test_a_newer_file_is_a_warning_in_both(tmp_path: Path) -> None:
    values = {**peft.LoraConfig(r=3).to_dict(), "from_the_future": 1, "target_modules": ["q"]}
    values.pop("runtime_config", None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    for library in (peft, inlay):
        with pytest.warns(UserWarning, match="from_the_future"):
            assert library.LoraConfig.from_pretrained(tmp_path).r == 3


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"r": 4}, id="no method"),
        pytest.param({"peft_type": "NOT_A_METHOD"}, id="unknown method"),
        pytest.param({"peft_type": "LORA", "task_type": "NOT_A_TASK"}, id="unknown task"),
        pytest.param(None, id="no file"),
    ],
)
def test_errors_of_files_are_theirs(values: dict[str, Any] | None, tmp_path: Path) -> None:
    if values is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with peft_may_warn(), pytest.raises(Exception) as theirs:
        peft.PeftConfig.from_pretrained(str(tmp_path))
    with pytest.raises(theirs.type):
        inlay.PeftConfig.from_pretrained(str(tmp_path))


def test_another_class_gives_the_files_class(tmp_path: Path) -> None:
    peft.LoraConfig(r=3).save_pretrained(tmp_path)
    for library in (peft, inlay):
        assert type(library.PeftConfig.from_pretrained(tmp_path)) is library.LoraConfig
        assert library.PeftConfig.from_pretrained(tmp_path, r=9).r == library.LoraConfig(r=9).r or library is peft


def test_from_dicts() -> None:
    values = {"peft_type": "LORA", "r": 4, "task_type": "SEQ_CLS"}
    theirs, ours = peft.get_peft_config(dict(values)), inlay.get_peft_config(dict(values))
    assert _plain(ours.to_dict()) == _plain(theirs.to_dict())
    theirs, ours = (library.PeftConfig.from_peft_type(**values) for library in (peft, inlay))
    assert _plain(ours.to_dict()) == _plain(theirs.to_dict())


def test_enums() -> None:
    for name in ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"):
        theirs, ours = peft.TaskType[name], inlay.TaskType[name]
        assert (ours.value, str(ours), repr(ours), json.dumps(ours)) == (
            theirs.value,
            str(theirs),
            repr(theirs),
            json.dumps(theirs),
        )
        assert inlay.LoraConfig(task_type=name).task_type == peft.LoraConfig(task_type=name).task_type == name
    assert str(inlay.LoraConfig().peft_type) == str(peft.LoraConfig().peft_type)
    assert len(inlay.TaskType) == len(peft.TaskType)


@pytest.mark.parametrize("name", ["is_prompt_learning", "is_adaption_prompt"])
def test_what_callers_ask_a_config(name: str) -> None:
    assert getattr(inlay.LoraConfig(), name) == getattr(peft.LoraConfig(), name)


def test_files_that_are_no_config_and_what_is_not_read_of_one(tmp_path: Path) -> None:
    for library in (peft, inlay):
        (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
        with pytest.raises(TypeError, match="peft_type"):
            library.LoraConfig.from_pretrained(tmp_path)
        (tmp_path / "adapter_config.json").write_text('{"r": 4, "runtime_config": {}}')
        with pytest.warns(UserWarning, match="`runtime_config`"):
            assert library.LoraConfig.from_json_file(tmp_path / "adapter_config.json") == {"r": 4}


def test_without_a_type_it_is_the_classes_own() -> None:
    for library in (peft, inlay):
        assert type(library.LoraConfig.from_peft_type(r=4)) is library.LoraConfig
        assert type(library.LoraConfig.from_peft_type(peft_type="IA3")) is library.IA3Config


def test_a_file_where_a_directory_is_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for library in (peft, inlay):
        with pytest.raises(AssertionError):
            library.LoraConfig().save_pretrained(tmp_path / "file")
