"""The handle: what is active and trained after each verb, statuses, counts, and the errors of misuse."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity.cases import BOTH, CASES, QV, B, pair_of
from parity.helpers import Pair, adapted_names, assert_equal_tensors, base, make_pair, peft, peft_may_warn, tree
from safetensors import SafetensorError
from torch import nn

import inlay

LIN0 = {**B, "target_modules": ["lin0"]}
SAVED = {"modules_to_save": ["head"]}


def state(model: Any) -> dict[str, Any]:
    """All that a caller can ask about which adapter is active and trained."""
    layer = model.base_model.model.lin0
    out: dict[str, Any] = {
        # With several active, PEFT's handle goes on naming the one that was set before them.
        "active_adapter": model.active_adapter if len(model.active_adapters) == 1 else None,
        "active_adapters": model.active_adapters,
        "tuner.active_adapters": model.base_model.active_adapters,
        "configs": list(model.peft_config),
        "inference": {n: c.inference_mode for n, c in model.peft_config.items()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules() if n.endswith(("base_layer", "norm"))},
        "modules_to_save": model.modules_to_save,
        "peft_type": str(model.peft_type),
        "disabled": layer.disable_adapters if hasattr(layer, "disable_adapters") else None,
    }
    if hasattr(layer, "active_adapters"):
        out["layer"] = (
            layer.active_adapter,
            layer.active_adapters,
            layer.merged,
            layer.merged_adapters,
            dict(layer.r),
            dict(layer.lora_alpha),
            dict(layer.scaling),
            sorted(layer.lora_A.keys()),
            layer.in_features,
            layer.out_features,
        )
    return out


def differences(ours: Any, theirs: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """{place: (ours, theirs)} wherever two nests of dicts differ."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return {} if ours == theirs else {at: (ours, theirs)}
    out: dict[str, tuple[Any, Any]] = {}
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        out |= differences(ours.get(key, "absent"), theirs.get(key, "absent"), f"{at}/{key}")
    return out


Step = Callable[[Any, ModuleType], Any]

SCRIPTS: dict[str, list[Step]] = {
    "fresh": [lambda m, lib: None],
    "add": [lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0))],
    "add one with biases": [lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0, bias="lora_only"))],
    "add frozen": [lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0, inference_mode=True))],
    "add saved": [lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0, **SAVED))],
    "add, set": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.set_adapter("other"),
        lambda m, lib: m.set_adapter("default"),
    ],
    "add, set frozen": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.set_adapter("other", inference_mode=True),
    ],
    "add saved, set": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0, **SAVED)),
        lambda m, lib: m.set_adapter("other"),
    ],
    "set two": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.base_model.set_adapter(["default", "other"]),
        lambda m, lib: m.base_model.set_adapter(["other", "default"]),
        lambda m, lib: m.set_adapter("other"),
    ],
    "delete the idle one": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.delete_adapter("other"),
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
    ],
    "delete the active one": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.add_adapter("third", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.delete_adapter("default"),
        lambda m, lib: m.set_adapter("third"),
        lambda m, lib: m.delete_adapter("third"),
    ],
    "freeze and thaw": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.set_requires_grad("default", False),
        lambda m, lib: m.set_requires_grad(["default", "other"], True),
        lambda m, lib: m.set_requires_grad("other", requires_grad=False),
    ],
    "switch layers off and on": [
        lambda m, lib: m.base_model.disable_adapter_layers(),
        lambda m, lib: m.base_model.enable_adapter_layers(),
    ],
    "merge and unmerge": [lambda m, lib: m.merge_adapter(), lambda m, lib: m.unmerge_adapter()],
    "merge one of two": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.merge_adapter(["other"]),
        lambda m, lib: m.merge_adapter(["default"]),
    ],
    "set while merged": [
        lambda m, lib: m.add_adapter("other", lib.LoraConfig(**LIN0)),
        lambda m, lib: m.merge_adapter(),
        lambda m, lib: m.set_adapter("other"),
    ],
    "modes": [lambda m, lib: m.train(), lambda m, lib: m.eval(), lambda m, lib: m.train()],
    "scale": [
        lambda m, lib: m.base_model.model.lin0.set_scale("default", 2),
        lambda m, lib: m.base_model.model.lin0.scale_layer(3),
        lambda m, lib: m.base_model.model.lin0.unscale_layer(3),
        lambda m, lib: m.base_model.model.lin0.unscale_layer(),
        lambda m, lib: m.base_model.model.lin0.set_scale("nobody", 2),
    ],
}


@pytest.mark.parametrize("steps", SCRIPTS.values(), ids=SCRIPTS.keys())
@pytest.mark.parametrize("first", [BOTH, {**BOTH, **SAVED}], ids=["plain", "with a head"])
def test_states_after_each_verb(steps: list[Step], first: dict[str, Any]) -> None:
    pair = make_pair("linears", first)
    for number, step in enumerate(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(pair.theirs, peft)
            step(pair.ours, inlay)
        assert not differences(state(pair.ours), state(pair.theirs)), number


def test_inside_disable_adapter() -> None:
    pair = pair_of(CASES["linear-modules-to-save"])
    with peft_may_warn(), pair.theirs.disable_adapter(), pair.ours.disable_adapter():
        pair.assert_equal_outputs()
    assert not differences(state(pair.ours), state(pair.theirs))


def test_loading_makes_the_same_states(tmp_path: Path) -> None:
    pair = make_pair("linears", {**BOTH, **SAVED}, more={"other": LIN0})
    pair.theirs.save_pretrained(tmp_path)
    for trainable in (False, True):
        with peft_may_warn():
            theirs = peft.PeftModel.from_pretrained(base("linears"), tmp_path, is_trainable=trainable)
        ours = inlay.PeftModel.from_pretrained(base("linears"), tmp_path, is_trainable=trainable)
        loaded = Pair(theirs, ours, pair.args)
        assert not differences(state(ours), state(theirs))
        loaded.each(lambda m: m.load_adapter(tmp_path / "other", "other"))
        assert not differences(state(ours), state(theirs))
        loaded.each(lambda m: m.load_adapter(tmp_path / "other", "third", is_trainable=True))
        assert not differences(state(ours), state(theirs))
        loaded.each(lambda m: m.set_adapter("third"))
        assert not differences(state(ours), state(theirs))


def test_one_config_for_two_adapters() -> None:
    models = []
    for library in (peft, inlay):
        shared = library.LoraConfig(**BOTH)
        model = library.get_peft_model(base("linears"), shared)
        model.add_adapter("ref", shared)
        models.append(model)
    assert not differences(state(models[1]), state(models[0]))
    assert models[1].peft_config["ref"] is models[1].peft_config["default"]


# ---------------------------------------------------------------- counts and statuses

COUNTED = ("linear", "linear-dora", "linear-modules-to-save", "conv2d", "embedding", "parameter-3d", "llama", "bert")


@pytest.mark.parametrize("name", [*COUNTED, "attention", "llama-tokens", "gpt2-tied-tokens"])
def test_counts(name: str) -> None:
    pair = pair_of(CASES[name])
    theirs, ours = pair.each(lambda m: m.get_nb_trainable_parameters())
    assert ours == theirs
    lines = []
    for model in pair.both():
        with redirect_stdout(io.StringIO()) as out:
            model.print_trainable_parameters()
        lines.append(out.getvalue())
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", COUNTED)
def test_statuses(name: str) -> None:
    pair = pair_of(CASES[name])
    for act in (lambda m: None, lambda m: m.merge_adapter(), lambda m: m.base_model.disable_adapter_layers()):
        pair.each(act)
        theirs = {s.name: dataclasses.asdict(s) for s in peft.get_layer_status(pair.theirs)}
        ours = {s.name: dataclasses.asdict(s) for s in inlay.get_layer_status(pair.ours)}
        assert not differences(ours, theirs)
        assert not differences(
            dataclasses.asdict(inlay.get_model_status(pair.ours)),
            dataclasses.asdict(peft.get_model_status(pair.theirs)),
        )


@pytest.mark.parametrize(
    "name", [*COUNTED, "attention", "llama-tokens", "parameters-two", "parameters-three-and-module"]
)
def test_names_of_targets(name: str) -> None:
    pair = pair_of(CASES[name])
    theirs, ours = pair.each(lambda m: (m.targeted_module_names, m.targeted_parameter_names))
    assert ours == theirs


def test_off_for_the_caller() -> None:
    pair = pair_of(CASES["linear-modules-to-save"])

    def off(model: Any) -> list[Any]:
        seen = []
        layers = [m for m in model.modules() if hasattr(m, "disable_adapters")]
        with model.disable_adapter():
            seen.append([m.disable_adapters for m in layers])
            with model.disable_adapter():
                seen.append(model.has_active_enabled_adapter)
            seen.append([m.disable_adapters for m in layers])
        return [*seen, [m.disable_adapters for m in layers], model.has_active_enabled_adapter]

    theirs, ours = pair.each(off)
    assert ours == theirs


@pytest.mark.parametrize("trained", [False, True])
def test_a_loaded_adapter_that_is_not_trained_is_in_eval(tmp_path: Path, trained: bool) -> None:
    for library in (peft, inlay):
        saved = library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), library.LoraConfig(target_modules=["0"]))
        saved.save_pretrained(tmp_path)
        loaded = library.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path, is_trainable=trained)
        assert loaded.training is loaded.base_model.model[0].training is trained


@pytest.mark.parametrize(("active", "bias"), [("one", 1.0), ("two", 2.0)])
def test_of_several_copies_the_active_one_stays(active: str, bias: float) -> None:
    for library in (peft, inlay):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        config = {"target_modules": ["0"], "modules_to_save": ["1"]}
        model = library.get_peft_model(base, library.LoraConfig(**config), "one")
        model.add_adapter("two", library.LoraConfig(**config))
        for name, value in (("one", 1.0), ("two", 2.0)):
            base[1].modules_to_save[name].bias.data.fill_(value)
        model.set_adapter(active)
        assert model.merge_and_unload(adapter_names=["one", "two"])[1].bias[0] == bias


def test_the_base_is_the_model_that_is_given() -> None:
    for library in (peft, inlay):
        config = library.LoraConfig(target_modules=["0"], base_model_name_or_path="some/other")
        with pytest.warns(UserWarning, match="some/other"):
            library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
        assert config.base_model_name_or_path is None


@pytest.mark.parametrize("fields", [{"modules_to_save": ["1"]}, {"trainable_token_indices": {"0": [0, 2]}}], ids=str)
def test_wrappers_name_the_active_adapters_that_they_have(fields: dict[str, Any]) -> None:
    for library in (peft, inlay):
        base = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["2"]))
        model.add_adapter("other", library.LoraConfig(target_modules=["2"], **fields))
        wrapper = base[1 if "modules_to_save" in fields else 0]
        assert wrapper.active_adapters == []
        model.set_adapter("other")
        assert wrapper.active_adapters == ["other"]
        assert wrapper._adapters == {"other"}
        model.set_adapter("default")
        assert wrapper.active_adapters == []


def test_a_bias_that_has_no_place() -> None:
    for library in (peft, inlay):
        config = library.LoraConfig(target_modules=["0"], lora_bias=True)
        with pytest.warns(library.PeftWarning, match="lora_bias=True.* Linear has no bias"):
            model = library.get_peft_model(nn.Sequential(nn.Linear(4, 4, bias=False)), config)
        with pytest.raises(RuntimeError):
            model.merge_adapter()


@pytest.mark.parametrize(
    ("given", "named", "found"),
    [(["0"], ["0", "1"], r"PEFT config contained .*\['1'\]"), (["0", "1"], ["0"], r"state_dict contained .*\['1'\]")],
)
def test_a_state_dict_that_names_other_layers_than_the_config(given: list[str], named: list[str], found: str) -> None:
    for library in (peft, inlay):

        def injected(targets: list[str], library: Any = library, **kwargs: Any) -> nn.Module:
            config = library.LoraConfig(target_modules=targets)
            return library.inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), **kwargs)

        tensors = library.get_peft_model_state_dict(injected(given))
        with pytest.warns(RuntimeWarning, match=found):
            model = injected(named, state_dict=tensors)
        assert library.get_peft_model_state_dict(model).keys() == tensors.keys()
        injected(given, state_dict=tensors)  # says nothing


def test_gradients_for_reentrant_checkpoints() -> None:
    for library in (peft, inlay):
        handle = library.get_peft_model(base("llama"), library.LoraConfig(target_modules=["q_proj"]))
        embedding, ids_BL = handle.get_input_embeddings(), torch.tensor([[1, 2]])
        assert not embedding(ids_BL).requires_grad
        handle.prepare_model_for_gradient_checkpointing(handle)
        assert embedding(ids_BL).requires_grad


def test_statuses_are_methods_too() -> None:
    pair = pair_of(CASES["linear"])
    theirs, ours = pair.each(lambda m: m.get_model_status())
    assert ours == inlay.get_model_status(pair.ours)
    assert ours.adapter_model_type == theirs.adapter_model_type
    assert pair.ours.get_layer_status() == inlay.get_layer_status(pair.ours)


def test_the_status_of_a_model_inside_a_handle() -> None:
    pair = pair_of(CASES["linear"])
    inside = pair.theirs.get_base_model(), pair.ours.get_base_model()
    theirs, ours = (lib.get_model_status(model) for lib, model in zip((peft, inlay), inside, strict=True))
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)


def test_embeddings_asked_for_in_a_model_that_tells_of_none() -> None:
    pair = pair_of(CASES["linear"])
    for lib, handle in ((peft, pair.theirs), (inlay, pair.ours)):
        with pytest.warns(UserWarning, match="embedding"):
            lib.get_peft_model_state_dict(handle, save_embedding_layers=True)


def test_fields_of_statuses() -> None:
    for name in ("TunerLayerStatus", "TunerModelStatus"):
        theirs = getattr(peft.peft_model, name)
        assert {f.name for f in dataclasses.fields(getattr(inlay, name))} == {
            f.name for f in dataclasses.fields(theirs)
        }


def test_a_status_that_layers_do_not_share() -> None:
    pair = make_pair("linears", BOTH, more={"other": LIN0})
    pair.each(lambda m: m.base_model.model.lin0.set_adapter("other"))
    pair.each(lambda m: m.base_model.model.lin1.enable_adapters(False))
    theirs, ours = (
        dataclasses.asdict(peft.get_model_status(pair.theirs)),
        dataclasses.asdict(inlay.get_model_status(pair.ours)),
    )
    assert not differences(ours, theirs)
    assert ours["enabled"] == "irregular"


# ---------------------------------------------------------------- tasks

TASKS = {
    "SEQ_CLS": "bert",
    "TOKEN_CLS": "bert",
    "QUESTION_ANS": "bert-spans",
    "FEATURE_EXTRACTION": "bert",
    "CAUSAL_LM": "llama",
    "SEQ_2_SEQ_LM": "t5",
}


@pytest.mark.parametrize(("task", "name"), TASKS.items(), ids=TASKS.keys())
def test_task_classes(task: str, name: str) -> None:
    targets = {"bert": ["query"], "bert-spans": ["query"], "llama": ["q_proj"], "t5": ["q"]}[name]
    pair = make_pair(name, {"target_modules": targets, "task_type": task})
    assert type(pair.ours).__name__ == type(pair.theirs).__name__
    theirs, ours = pair.each(lambda m: {n: p.requires_grad for n, p in m.named_parameters()})
    assert ours == theirs
    with peft_may_warn():
        saved = peft.get_peft_model_state_dict(pair.theirs)
    assert_equal_tensors(inlay.get_peft_model_state_dict(pair.ours), saved)
    theirs, ours = pair.each(lambda m: m.modules_to_save)
    assert ours == theirs
    pair.assert_equal_outputs()


def test_generate_and_attributes_fall_through() -> None:
    pair = make_pair("llama", {**QV, "task_type": "CAUSAL_LM"})
    theirs, ours = pair.each(lambda m: m.generate(**pair.kwargs, max_new_tokens=5, do_sample=False))
    assert torch.equal(ours, theirs)
    for name in ("config", "generation_config", "device", "dtype"):
        theirs, ours = pair.each(lambda m, name=name: str(getattr(m, name)))
        assert ours == theirs
    assert pair.ours.get_base_model() is pair.ours.base_model.model
    assert pair.ours.get_input_embeddings() is pair.ours.base_model.model.model.embed_tokens
    assert pair.ours.base_model_torch_dtype == pair.theirs.base_model_torch_dtype
    for model in pair.both():
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = model.no_such_thing


@pytest.mark.parametrize(
    "name", ["linear", "gpt2-conv1d", "conv2d", "embedding", "attention", "parameter-2d", "linear-modules-to-save"]
)
def test_what_models_read_of_a_wrapped_layer(name: str) -> None:
    pair = pair_of(CASES[name])
    paths = adapted_names(pair.theirs)
    assert paths == adapted_names(pair.ours)
    for path in paths:
        theirs, ours = (m.get_submodule(path) for m in pair.both())
        for attribute in ("weight", "bias", "in_features", "out_features", "num_embeddings", "embedding_dim", "nf"):
            value = getattr(theirs, attribute, None)
            if isinstance(value, torch.Tensor):
                assert isinstance(getattr(ours, attribute), torch.Tensor), attribute
                assert torch.equal(getattr(ours, attribute), value), attribute
            elif value is not None:
                assert getattr(ours, attribute) == value, attribute
        assert type(ours.get_base_layer()) is type(theirs.get_base_layer())
        for layer_attribute in ("adapter_layer_names", "active_adapters", "merged", "disable_adapters"):
            assert hasattr(ours, layer_attribute)


@pytest.mark.parametrize("name", ["linear", "linear-dora", "gpt2-conv1d", "conv2d", "embedding", "attention"])
def test_delta_weights(name: str) -> None:
    pair = pair_of(CASES[name])
    if name == "linear-dora":
        pytest.skip("PEFT gives the low-rank product without the magnitude")
    path = sorted(adapted_names(pair.theirs))[0]
    with torch.no_grad():
        theirs, ours = pair.each(lambda m: m.get_submodule(path).get_delta_weight("default"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- bare models


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injecting_what_a_state_dict_names(low_cpu_mem_usage: bool) -> None:
    fields = {"r": 4, "target_modules": ["lin0", "lin1"]}
    partial = {"lin1.lora_A.weight": torch.randn(4, 20), "lin1.lora_B.weight": torch.randn(6, 4)}
    models = []
    for library in (peft, inlay):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.inject_adapter_in_model(
                library.LoraConfig(**fields),
                base("linears"),
                state_dict=dict(partial),
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            library.set_peft_model_state_dict(model, dict(partial), low_cpu_mem_usage=low_cpu_mem_usage)
        models.append(model.eval())
    theirs, ours = models
    assert adapted_names(ours) == adapted_names(theirs) == {"lin1"}
    assert [(n, str(p.device)) for n, p in ours.named_parameters()] == [
        (n, str(p.device)) for n, p in theirs.named_parameters()
    ]
    Pair(theirs, ours, make_pair("linears", BOTH).args).assert_equal_outputs()


def test_injecting_a_second_one() -> None:
    models = []
    for library in (peft, inlay):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.inject_adapter_in_model(library.LoraConfig(**BOTH), base("linears"))
            model = library.inject_adapter_in_model(library.LoraConfig(**LIN0), model, "other")
        models.append(model)
    theirs, ours = models
    assert list(ours.peft_config) == list(theirs.peft_config)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert ours.lin0.active_adapters == theirs.lin0.active_adapters
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }


ALREADY = "Already found a `peft_config`"
SECOND = "with PEFT for a second time"


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_second_handle_on_one_model_warns(name: str) -> None:
    for library in (peft, inlay):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        library.get_peft_model(net, library.LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
        config = library.LoraConfig(target_modules=["0", "1"], r=2)
        with pytest.warns(UserWarning, match=ALREADY), pytest.warns(UserWarning, match=SECOND):
            model = library.get_peft_model(net, config, name)
        assert dict(net[0].r) == ({"default": 2} if name == "default" else {"default": 3, "other": 2})
        assert not net[0].lora_B[name].weight.any()
        assert model.active_adapters == net[0].active_adapters == net[1].active_adapters == [name]
        model.unload()
        library.get_peft_model(net, config)  # says nothing: the model is bare


def test_a_second_handle_that_deletes_its_last_adapter_leaves_the_first_ones() -> None:
    x = torch.randn(2, 4)
    for library in (peft, inlay):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = library.LoraConfig(target_modules=["0"], init_lora_weights=False)
        first = library.get_peft_model(net, config, "one")
        wanted = first(x)
        with peft_may_warn(), pytest.warns(UserWarning, match=SECOND):
            second = library.get_peft_model(net, config, "two")
        with peft_may_warn():
            second.delete_adapter("two")
        assert net[0].active_adapters == ["one"]
        torch.testing.assert_close(first(x), wanted)


def test_a_second_injection_warns_and_one_of_the_same_name_replaces() -> None:
    for library in (peft, inlay):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        saved = {"modules_to_save": ["1"]}
        library.inject_adapter_in_model(library.LoraConfig(target_modules=["0"], r=3, **saved), net)
        net[1].modules_to_save["default"].weight.data.zero_()
        with pytest.warns(UserWarning, match=ALREADY):
            library.inject_adapter_in_model(library.LoraConfig(target_modules=["0"], r=2, **saved), net)
        assert dict(net[0].r) == {"default": 2}
        assert net.peft_config["default"].r == 2
        assert [n for n, p in net.named_parameters() if p.requires_grad] == [
            "0.lora_A.default.weight",
            "0.lora_B.default.weight",
            "1.modules_to_save.default.weight",
            "1.modules_to_save.default.bias",
        ]


def test_a_saved_adapter_beside_others_warns(tmp_path: Path) -> None:
    for library in (peft, inlay):
        model = library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), library.LoraConfig(target_modules=["0"]))
        model.save_pretrained(tmp_path)
        net = model.get_base_model()
        with peft_may_warn(), pytest.warns(UserWarning, match=ALREADY):
            library.PeftModel.from_pretrained(net, tmp_path, "other")


VERBS: dict[str, Callable[[Any], Any]] = {
    "merge_adapter": lambda m: m.merge_adapter(),
    "merge_adapter of one": lambda m: m.merge_adapter(["default"]),
    "unmerge_adapter": lambda m: m.unmerge_adapter(),
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "unload": lambda m: m.unload(),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_verbs_that_prompts_lack(method: str, verb: Callable[[Any], Any]) -> None:
    for library in (peft, inlay):
        config = getattr(library, method)(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = library.get_peft_model(base("llama"), config)
        with pytest.raises(AttributeError):
            verb(model)
        with pytest.raises(TypeError, match="requires_grad"):
            model.set_requires_grad("default", False)
        assert list(model.peft_config) == ["default"]
        assert any(p.requires_grad for p in model.parameters())
        model.delete_adapter("default")
        assert not model.peft_config


def test_16_bits_stay_where_no_handle_is() -> None:
    theirs, ours = (
        library.inject_adapter_in_model(library.LoraConfig(**BOTH), base("linears", torch.bfloat16))
        for library in (peft, inlay)
    )
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d-dora", "attention", "llama-modules-to-save"])
def test_low_cpu_mem_usage(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pair = pair_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.theirs.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(base(case.base), tmp_path, low_cpu_mem_usage=True)
        ours = inlay.PeftModel.from_pretrained(base(case.base), tmp_path, low_cpu_mem_usage=True)
        # PEFT leaves the copies in modules_to_save and the rest of the adapter on the model's device
        assert {n: p.device.type for n, p in ours.named_parameters()} == {
            n: p.device.type for n, p in theirs.named_parameters()
        }
    Pair(theirs.eval(), ours.eval(), pair.args, pair.kwargs).assert_equal_outputs()
    fresh = inlay.get_peft_model(base(case.base), inlay.LoraConfig(**case.config), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in fresh.parameters())


# ---------------------------------------------------------------- misuse


def plain(lib: ModuleType, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lib.get_peft_model(base("linears"), lib.LoraConfig(**{**BOTH, **fields}))


X = torch.zeros(2, 12)

MISUSE: dict[str, Callable[[ModuleType, Path], Any]] = {
    "set an unknown adapter": lambda lib, d: plain(lib).set_adapter("nobody"),
    "delete an unknown adapter": lambda lib, d: plain(lib).delete_adapter("nobody"),
    "add a name twice": lambda lib, d: plain(lib).add_adapter("default", lib.LoraConfig(**BOTH)),
    "add what matches nothing": lambda lib, d: plain(lib).add_adapter("x", lib.LoraConfig(target_modules=["nothing"])),
    "add a second one with biases": lambda lib, d: plain(lib, bias="all").add_adapter(
        "x", lib.LoraConfig(**BOTH, bias="all")
    ),
    "no match": lambda lib, d: plain(lib, target_modules=["nothing"]),
    "unknown task type": lambda lib, d: plain(lib, task_type="NOT_A_TASK"),
    "unknown field": lambda lib, d: plain(lib, lora_alfa=3),
    "r is zero": lambda lib, d: plain(lib, r=0),
    "r is negative": lambda lib, d: plain(lib, r=-1),
    "r of a pattern is zero": lambda lib, d: plain(lib, rank_pattern={"lin0": 0}),
    "unknown bias": lambda lib, d: plain(lib, bias="some"),
    "unknown start": lambda lib, d: plain(lib, init_lora_weights="nonsense"),
    "lora_bias with dora": lambda lib, d: plain(lib, lora_bias=True, use_dora=True),
    "layers of a regex": lambda lib, d: plain(lib, target_modules=r".*lin0", layers_to_transform=[1]),
    "layers_pattern of a regex": lambda lib, d: plain(lib, target_modules=r".*lin0", layers_pattern="layers"),
    "layers_pattern alone": lambda lib, d: plain(lib, layers_pattern="layers"),
    "save a list of modules whole": lambda lib, d: lib.get_peft_model(
        base("stack"), lib.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers"])
    ),
    "save into a file": lambda lib, d: plain(lib).save_pretrained(d / "file"),
    "save below a file": lambda lib, d: plain(lib).save_pretrained(d / "file" / "below"),
    "save into a directory without a name": lambda lib, d: plain(lib).save_pretrained(""),
    "save an unknown adapter": lambda lib, d: plain(lib).save_pretrained(d / "new", selected_adapters=["nobody"]),
    "load from nowhere": lambda lib, d: lib.PeftModel.from_pretrained(base("linears"), str(d / "nowhere")),
    "load an adapter from nowhere": lambda lib, d: plain(lib).load_adapter(str(d / "nowhere"), "x"),
    "load with no config": lambda lib, d: lib.PeftModel.from_pretrained(base("linears"), d, config={"r": 4}),
    "load truncated weights": lambda lib, d: _load_truncated(lib, d),
    "load another shape": lambda lib, d: _load_another_rank(lib, d),
    "weights from nowhere": lambda lib, d: lib.load_peft_weights(str(d / "nowhere")),
    "merge with a str": lambda lib, d: plain(lib).merge_adapter(adapter_names="default"),
    "merge and unload with a str": lambda lib, d: plain(lib).merge_and_unload(adapter_names="default"),
    "merge NaN safely": lambda lib, d: _with_nan(lib).merge_adapter(safe_merge=True),
    "merge and unload NaN safely": lambda lib, d: _with_nan(lib).merge_and_unload(safe_merge=True),
    "merge a grouped convolution": lambda lib, d: _grouped(lib).merge_adapter(),
    "merge a bias without a bias": lambda lib, d: plain(lib, lora_bias=True).merge_adapter(),
    "too few rows": lambda lib, d: plain(lib).eval()(X, adapter_names=["default"]),
    "rows of an unknown adapter": lambda lib, d: plain(lib).eval()(X, adapter_names=["nobody", "default"]),
    "rows of attention": lambda lib, d: lib.get_peft_model(
        base("attention-batch-first"), lib.LoraConfig(r=4, target_modules=["m"])
    ).eval()(torch.zeros(2, 5, 12), adapter_names=["default", "__base__"]),
    "state dict of an unknown adapter": lambda lib, d: lib.get_peft_model_state_dict(plain(lib), adapter_name="no"),
    "status of a bare model": lambda lib, d: lib.get_layer_status(base("linears")),
    "model status of a bare model": lambda lib, d: lib.get_model_status(base("linears")),
    "state dict for parameters": lambda lib, d: lib.inject_adapter_in_model(
        lib.LoraConfig(target_parameters=["experts.up"]), base("fused"), state_dict={"experts.lora_A.weight": X}
    ),
    "a config for a class that cannot be made": lambda lib, d: lib.AutoPeftModelForCausalLM(),
    "an auto model without a task": lambda lib, d: _auto_of_another_task(lib, d),
    "an unknown peft_type": lambda lib, d: lib.get_peft_config({"peft_type": "NOPE"}),
    "no peft_type": lambda lib, d: lib.get_peft_config({"r": 3}),
    "generate without a generate": lambda lib, d: plain(lib).generate(X),
    "replication of no decoder": lambda lib, d: plain(lib, layer_replication=[(0, 1)]),
    "tokens out of the vocabulary": lambda lib, d: lib.get_peft_model(
        base("llama"), lib.LoraConfig(**QV, trainable_token_indices=[64])
    ),
}


def _load_another_rank(lib: ModuleType, directory: Path) -> Any:
    weights = plain(peft, r=3)
    weights.save_pretrained(directory)
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 3', '"r": 5'))
    return lib.PeftModel.from_pretrained(base("linears"), directory)


def _load_truncated(lib: ModuleType, directory: Path) -> Any:
    plain(peft).save_pretrained(directory)
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    return lib.PeftModel.from_pretrained(base("linears"), directory)


def _with_nan(lib: ModuleType) -> Any:
    model = plain(lib)
    with torch.no_grad():
        model.base_model.model.lin0.lora_A["default"].weight.fill_(float("nan"))
    return model


def _grouped(lib: ModuleType) -> Any:
    return lib.get_peft_model(base("conv2d-grouped"), lib.LoraConfig(r=4, target_modules=["m"]))


def _auto_of_another_task(lib: ModuleType, directory: Path) -> Any:
    peft.get_peft_model(base("bert"), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(
        directory
    )
    return lib.AutoPeftModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("misuse", MISUSE.values(), ids=MISUSE.keys())
def test_misuse_raises_what_they_raise(
    misuse: Callable[[ModuleType, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ``except`` written for PEFT still catches it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with peft_may_warn(), pytest.raises(Exception) as theirs:
        misuse(peft, tmp_path)
    # what PEFT defines itself is caught by its own name, which the drop-in maps; here the base it is made of counts
    wanted = next(c for c in theirs.type.__mro__ if c.__module__ in ("builtins", SafetensorError.__module__))
    with pytest.raises(wanted) as ours:
        misuse(inlay, tmp_path)
    assert str(ours.value)


def test_trees_after_unloading_a_bare_tuner() -> None:
    pair = make_pair("llama", {**QV, "modules_to_save": ["lm_head"]})
    theirs, ours = pair.each(lambda m: m.base_model.merge_and_unload())
    assert tree(ours) == tree(theirs) == tree(base("llama"))
    assert isinstance(ours, nn.Module)
    assert not hasattr(ours, "peft_config") or not ours.peft_config
