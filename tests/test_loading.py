"""Loading: what does not fit is an error by name that changes nothing; `strict=False` warns once and loads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import bits, close, disturb, same_bits, same_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from inlay.errors import (
    ConfigError,
    DuplicateAdapterError,
    FileError,
    IncompatibleBaseError,
    LoadError,
    MissingFileError,
    NonFiniteError,
    PeftError,
    PeftWarning,
    PlanError,
    TornPairError,
    UnknownArgumentError,
    UnwritableError,
    WrongMethodError,
)
from inlay.methods.lora import LoraAdapter

Change = Callable[[dict[str, Any], dict[str, Tensor]], None]

Q = "base_model.model.lin0.lora_A.weight"


def config(**fields: Any) -> inlay.LoraConfig:
    return inlay.LoraConfig(**{"r": 4, "target_modules": ["lin0", "lin1"], **fields})


@pytest.fixture
def model(mlp: nn.Module) -> inlay.PeftModel:
    model = inlay.get_peft_model(mlp, config())
    disturb(model)
    return model.eval()


@pytest.fixture
def saved(model: inlay.PeftModel, tmp_path: Path) -> Path:
    model.save_pretrained(str(tmp_path / "saved"))
    return tmp_path / "saved"


def rewrite(directory: Path, change: Change, keep_base: bool = False) -> Path:
    """An adapter as another program would have left it: no hash of the config, no fingerprint."""
    path = directory / "adapter_config.json"
    values, tensors = json.loads(path.read_text()), load_file(directory / "adapter_model.safetensors")
    change(values, tensors)
    path.write_text(json.dumps(values))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    configs = {name: c.to_dict() for name, c in getattr(model, "peft_config", {}).items()}
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    own = sorted(k for k in model.__dict__ if k != "_modules")
    return configs, modules, grads, identities, own


@contextmanager
def raises_and_leaves(model: nn.Module, error: type[BaseException], match: str | None = None) -> Iterator[Any]:
    before, state = snapshot(model), bits(model)
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert snapshot(model) == before
    same_state(bits(model), state)


# ---------------------------------------------------------------- what does not fit


def _missing(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[Q]


def _extra(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[Q.replace("lin0", "lin7")] = torch.zeros(4, 10)


def _shape(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[Q] = torch.zeros(4, 11)


def _nan(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[Q][1, 2] = float("nan")


def _infinite(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[Q][1, 2] = -float("inf")


def _rank(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["r"] = 8


def _huge_rank(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["r"] = 2_000_000


def _dora(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["use_dora"] = True


def _fewer_targets(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["target_modules"] = ["lin0"]


def _more_targets(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["target_modules"] = ["lin0", "lin1", "head"]


def _no_targets(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["target_modules"] = ["q_proj"]


def _no_rank(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["r"] = 0


def _text_rank(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["r"] = "eight"


def _other_method(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    values["peft_type"] = "NO_SUCH_METHOD"


def _no_method(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del values["peft_type"]


def _nothing(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors.clear()


#: what is wrong -> (how the file is changed, the error, what its report has, what strict=False still raises)
FAULTS: dict[str, tuple[Change, type[PeftError], str, type[PeftError] | None]] = {
    "a tensor is missing": (_missing, LoadError, "missing", None),
    "all tensors are missing": (_nothing, LoadError, "missing", None),
    "a tensor too many": (_extra, LoadError, "unexpected", None),
    "another shape": (_shape, LoadError, "shape", LoadError),
    "NaN": (_nan, NonFiniteError, "non_finite", None),
    "infinity": (_infinite, NonFiniteError, "non_finite", None),
    "another rank in the config": (_rank, LoadError, "shape", LoadError),
    "a huge rank in the config": (_huge_rank, LoadError, "shape", LoadError),
    "a DoRA without magnitudes": (_dora, LoadError, "missing", None),
    "fewer targets than tensors": (_fewer_targets, LoadError, "unexpected", None),
    "more targets than tensors": (_more_targets, LoadError, "missing", None),
    "targets that are not there": (_no_targets, PlanError, "", PlanError),
    "rank 0": (_no_rank, ConfigError, "", ConfigError),
    "a rank that is text": (_text_rank, ConfigError, "", ConfigError),
    "a method that does not exist": (_other_method, ConfigError, "", ConfigError),
    "no method": (_no_method, WrongMethodError, "", WrongMethodError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_changes_nothing(saved: Path, model: inlay.PeftModel, tiny: Any, fault: str) -> None:
    change, error, finding, _ = FAULTS[fault]
    rewrite(saved, change)
    with raises_and_leaves(model, error) as caught:
        model.load_adapter(saved, "other")
    if finding:
        assert getattr(caught.value.report, finding)
        assert not caught.value.report.ok
    with raises_and_leaves(model, (error, DuplicateAdapterError)):  # the same name: its tensors in place
        model.load_adapter(saved, "default")
    base = tiny("mlp")
    with raises_and_leaves(base, error):
        inlay.PeftModel.from_pretrained(base, saved)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("fault", FAULTS)
def test_not_strict_warns_once(saved: Path, model: inlay.PeftModel, fault: str) -> None:
    change, _, finding, still = FAULTS[fault]
    rewrite(saved, change)
    if still is not None:
        with raises_and_leaves(model, still):
            model.load_adapter(saved, "other", strict=False)
        return
    with pytest.warns(PeftWarning) as warned:
        report = model.load_adapter(saved, "other", strict=False)
    assert len(warned) == 1
    assert getattr(report, finding)
    assert not report.ok
    assert "other" in model.peft_config
    with model.use_adapter("other"):
        model(torch.randn(2, 10))
    assert not any(p.is_meta for p in model.parameters())


def test_another_shape_can_be_left_out(saved: Path, model: inlay.PeftModel) -> None:
    rewrite(saved, _shape)
    with pytest.warns(PeftWarning, match="another shape"):
        report = model.load_adapter(saved, "other", strict=False, ignore_mismatched_sizes=True)
    assert [key for key, *_ in report.shape] == [Q.removeprefix("base_model.model.")]
    layers = model.base_model.model
    same_bits(layers.lin1.lora_A.other.weight, layers.lin1.lora_A.default.weight)
    assert not torch.equal(layers.lin0.lora_A.other.weight, layers.lin0.lora_A.default.weight)


def test_the_setting_holds_the_default(saved: Path, model: inlay.PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(saved, _missing)
    monkeypatch.setattr(inlay.settings, "strict_load", False)
    with pytest.warns(PeftWarning, match="missing"):
        model.load_adapter(saved, "other")
    with raises_and_leaves(model, LoadError):
        model.load_adapter(saved, "third", strict=True)


class Wider(nn.Module):
    def __init__(self, names: tuple[str, ...] = ("lin0", "lin1", "head"), inner: int = 24) -> None:
        super().__init__()
        sizes = [10, inner, inner, 2]
        for i, name in enumerate(names):
            setattr(self, name, nn.Linear(sizes[i], sizes[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("base", "error"),
    [(lambda: Wider(), LoadError), (lambda: Wider(("lin0", "other", "head"), 20), PeftError),
     (lambda: nn.Sequential(nn.Linear(10, 20)), PlanError)],
    ids=["another width", "a layer less", "other names"],
)  # fmt: skip
def test_another_base(saved: Path, base: Callable[[], nn.Module], error: type[PeftError]) -> None:
    other = base()
    with raises_and_leaves(other, error):
        inlay.PeftModel.from_pretrained(other, saved)


def test_a_fingerprint_tells_what_shapes_of_factors_do_not(tmp_path: Path) -> None:
    """On an embedding and a linear layer of one name, or any two bases that the tensors' shapes cannot tell."""
    model = inlay.get_peft_model(nn.Sequential(nn.Conv2d(2, 4, (1, 2)), nn.Identity()), config(target_modules=["0"]))
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["inlay_base"].startswith("v1:")
    save_file(load_file(path), path, metadata={**metadata, "inlay_base": "v1:" + "0" * 64})
    base = nn.Sequential(nn.Conv2d(2, 4, (1, 2)), nn.Identity())
    with raises_and_leaves(base, IncompatibleBaseError, "names or shapes"):
        inlay.PeftModel.from_pretrained(base, tmp_path)
    with pytest.warns(PeftWarning, match="another base model"):
        inlay.PeftModel.from_pretrained(base, tmp_path, strict=False)


def test_another_name_of_the_base_is_a_note(saved: Path, tiny: Any) -> None:
    rewrite(saved, lambda values, tensors: values.update(base_model_name_or_path="someone/else"))
    base = tiny("mlp")
    base.name_or_path = "here"
    report = inlay.PeftModel.from_pretrained(base, saved).load_report
    assert report.ok
    assert any("someone/else" in note for note in report.notes)


def test_a_torn_pair(saved: Path, model: inlay.PeftModel) -> None:
    path = saved / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    for strict in (True, False):
        with raises_and_leaves(model, TornPairError):
            model.load_adapter(saved, "other", strict=strict)


def test_a_torn_pair_where_problems_warn(saved: Path, model: inlay.PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    monkeypatch.setattr(inlay.settings, "strict_load", False)
    with pytest.warns(PeftWarning, match="not of one save") as caught:
        model.load_adapter(saved, "other")
    assert caught[0].filename == __file__
    assert model.base_model.model.lin0.scaling == {"default": 2.0, "other": 4.0}


@pytest.mark.parametrize("init", [False, "gaussian"])
def test_how_values_were_drawn_makes_no_other_adapter(saved: Path, model: inlay.PeftModel, init: Any) -> None:
    state = bits(model)
    disturb(model)
    rewrite(saved, lambda values, tensors: values.update(init_lora_weights=init))
    assert model.load_adapter(saved, "default").ok
    same_state(bits(model), state)
    rewrite(saved, lambda values, tensors: values.update(init_lora_weights="olora"))
    with raises_and_leaves(model, DuplicateAdapterError, "init_lora_weights"):
        model.load_adapter(saved, "default")


def test_another_config_under_a_name_in_use_where_problems_warn(
    saved: Path, model: inlay.PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = bits(model)
    disturb(model)
    rewrite(saved, lambda values, tensors: values.update(lora_alpha=99))
    monkeypatch.setattr(inlay.settings, "strict_load", False)
    with pytest.warns(PeftWarning, match="lora_alpha.*keeps its own config") as caught:
        model.load_adapter(saved, "default")
    assert caught[0].filename == __file__
    same_state(bits(model), state)
    assert model.peft_config["default"].lora_alpha == 8
    rewrite(saved, lambda values, tensors: values.update(peft_type="IA3"))
    with pytest.warns(PeftWarning, match="Unexpected"), raises_and_leaves(model, DuplicateAdapterError, "peft_type"):
        model.load_adapter(saved, "default")


def test_a_torn_pair_with_a_config_of_the_callers(saved: Path, tiny: Any) -> None:
    """A config given by the caller stands in for the file's on purpose."""
    given = config(lora_alpha=16)
    model = inlay.PeftModel.from_pretrained(tiny("mlp"), saved, config=given)
    assert model.base_model.model.lin0.scaling["default"] == 4.0


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_is_missing(saved: Path, model: inlay.PeftModel, name: str) -> None:
    (saved / name).unlink()
    with raises_and_leaves(model, MissingFileError, name.split(".")[0]):
        model.load_adapter(saved, "other")


def test_a_truncated_file(saved: Path, model: inlay.PeftModel) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with raises_and_leaves(model, FileError):
        model.load_adapter(saved, "other")


def test_dtypes_are_converted_and_noted(saved: Path, model: inlay.PeftModel) -> None:
    def half(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[Q] = tensors[Q].half()

    rewrite(saved, half)
    report = model.load_adapter(saved, "other")
    assert model.base_model.model.lin0.lora_A.other.weight.dtype == torch.float32
    assert report.ok
    assert [(key, str(a), str(b)) for key, a, b in report.dtype] == [
        (Q.removeprefix("base_model.model."), "torch.float16", "torch.float32")
    ]


# ---------------------------------------------------------------- what does fit


def test_a_report_comes_back(saved: Path, model: inlay.PeftModel, tiny: Any) -> None:
    report = model.load_adapter(saved, "other")
    assert isinstance(report, inlay.LoadReport)
    assert report.ok
    assert not report.notes
    missing, unexpected = report
    assert missing == unexpected == report.missing_keys == []
    fresh = inlay.PeftModel.from_pretrained(tiny("mlp"), saved)
    assert fresh.load_report.ok
    x = torch.randn(3, 10)
    with torch.no_grad(), model.use_adapter("other"):
        same_bits(fresh(x), model(x))


def test_what_is_missing_has_the_name_that_it_has_in_the_model(model: inlay.PeftModel) -> None:
    tensors = inlay.get_peft_model_state_dict(model)
    key = next(iter(tensors))
    del tensors[key]
    live = key.replace(".weight", ".default.weight")
    assert live in dict(model.named_parameters())
    missing, unexpected = report = inlay.set_peft_model_state_dict(model, tensors)
    assert (missing, unexpected, report.missing_keys) == ([live], [], [live])
    assert report.missing == [key.removeprefix("base_model.model.")]


def test_tensors_of_the_frozen_model_are_left_out_unless_loading_is_lenient(
    model: inlay.PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {**inlay.get_peft_model_state_dict(model), "base_model.model.head.bias": torch.ones(2)}
    before = bits(model)
    assert inlay.set_peft_model_state_dict(model, tensors).unexpected == ["head.bias"]
    same_state(bits(model), before)
    monkeypatch.setattr(inlay.settings, "strict_load", False)
    assert not inlay.set_peft_model_state_dict(model, tensors).unexpected
    assert torch.equal(model.base_model.model.head.bias, torch.ones(2))


def test_loading_activates_and_freezes_as_asked(saved: Path, model: inlay.PeftModel, tiny: Any) -> None:
    model.load_adapter(saved, "other")
    assert model.active_adapters == ["default"]
    assert not model.training
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    frozen = inlay.PeftModel.from_pretrained(tiny("mlp"), saved)
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = inlay.PeftModel.from_pretrained(tiny("mlp"), saved, is_trainable=True)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
        n for n, _ in trained.named_parameters() if "lora_" in n
    }


def test_loading_the_same_name_again(saved: Path, model: inlay.PeftModel) -> None:
    state, pointers = bits(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    disturb(model)
    assert model.load_adapter(saved, "default").ok
    same_state(bits(model), state)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
    rewrite(saved, lambda values, tensors: values.update(lora_alpha=99))
    with raises_and_leaves(model, DuplicateAdapterError, "lora_alpha"):
        model.load_adapter(saved, "default")


def test_a_second_handle_on_one_model_loads_in_the_place_of_the_name(saved: Path, model: inlay.PeftModel) -> None:
    inner, state = model.get_base_model(), bits(model)
    disturb(model)
    before = bits(model)
    rewrite(saved, lambda values, tensors: tensors.pop(Q))
    with pytest.warns(PeftWarning), raises_and_leaves(model, LoadError, "missing"):
        inlay.PeftModel.from_pretrained(inner, saved)
    same_state(bits(model), before)
    model.save_pretrained(saved)
    disturb(model)
    with pytest.warns(PeftWarning, match="Already found"):
        loaded = inlay.PeftModel.from_pretrained(inner, saved)
    same_state(bits(loaded), before)
    assert state.keys() == before.keys()


def test_a_name_used_twice(model: inlay.PeftModel, mlp: nn.Module) -> None:
    with raises_and_leaves(model, DuplicateAdapterError, "default"):
        model.add_adapter("default", config())
    with raises_and_leaves(model, PlanError, "add_adapter"):
        inlay.inject_adapter_in_model(config(), model, "other")
    inner = model.get_base_model()
    for put in (inlay.get_peft_model, lambda net, config: inlay.inject_adapter_in_model(config, net)):
        with pytest.warns(PeftWarning), raises_and_leaves(inner, PlanError, "nothing"):
            put(inner, config(target_modules=["nothing"]))  # type: ignore[operator]  # what does not fit replaces nothing


def test_saving_where_it_cannot_be(model: inlay.PeftModel, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("something")
    for target in (file, file / "below"):
        with raises_and_leaves(model, UnwritableError):
            model.save_pretrained(target)
    assert file.read_text() == "something"


def test_one_of_several_folders_cannot_be_written(model: inlay.PeftModel, tmp_path: Path) -> None:
    model.add_adapter("b", config())
    (tmp_path / "b").write_text("in the way")
    with raises_and_leaves(model, UnwritableError, "b"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "b").read_text() == "in the way"


# ---------------------------------------------------------------- a failure in the middle


class Broken(Exception):
    pass


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("verb", ["get_peft_model", "inject", "add", "load"])
def test_a_failure_in_the_middle_of_injection(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, verb: str, nth: int, tmp_path: Path
) -> None:
    fields = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"], "trainable_token_indices": [3, 4]}
    base = tiny("llama")
    base.model.layers[0].mlp.requires_grad_(False)
    subject: nn.Module = base
    if verb in ("add", "load"):
        subject = inlay.get_peft_model(base, config(target_modules=["q_proj"]), adapter_name="first")
        if verb == "load":
            donor = inlay.get_peft_model(tiny("llama"), config(**fields))
            donor.save_pretrained(str(tmp_path))
            rewrite(tmp_path, lambda values, tensors: tensors.pop(next(k for k in tensors if "v_proj" in k)))
    calls = 0
    original = LoraAdapter.initialise

    def initialise(self: LoraAdapter, p: Any, layer: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Broken
        original(self, p, layer)

    monkeypatch.setattr(LoraAdapter, "initialise", initialise)
    verbs: dict[str, Callable[[], Any]] = {
        "get_peft_model": lambda: inlay.get_peft_model(base, config(use_dora=True, **fields)),
        "inject": lambda: inlay.inject_adapter_in_model(config(use_dora=True, **fields), base),
        "add": lambda: subject.add_adapter("second", config(use_dora=True, **fields)),
        "load": lambda: subject.load_adapter(tmp_path, "second", strict=False),
    }
    with raises_and_leaves(subject, Broken), warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        verbs[verb]()
    monkeypatch.setattr(LoraAdapter, "initialise", original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        verbs[verb]()


def test_a_keyword_that_nothing_knows(saved: Path, model: inlay.PeftModel, tiny: Any, tmp_path: Path) -> None:
    with raises_and_leaves(model, UnknownArgumentError, match="'is_trainabel'; closest: is_trainable"):
        model.load_adapter(str(saved), "again", is_trainabel=True)
    base = tiny("mlp")
    with raises_and_leaves(base, UnknownArgumentError, match="'subfoler'; closest: subfolder"):
        inlay.PeftModel.from_pretrained(base, str(saved), subfoler="x")
    with pytest.raises(TypeError, match="'safe_serialisation'; closest: safe_serialization"):
        model.save_pretrained(tmp_path / "new", safe_serialisation=False)
    assert not (tmp_path / "new").exists()


def test_keywords_that_callers_give_are_taken(saved: Path, model: inlay.PeftModel, tiny: Any, tmp_path: Path) -> None:
    hub = {"revision": None, "token": None, "cache_dir": None, "local_files_only": True, "use_auth_token": None}
    others = {"device_map": "auto", "max_memory": {}, "offload_folder": "x", "torch_dtype": None, "subfolder": None}
    model.load_adapter(str(saved), "again", torch_device="cpu", ignore_mismatched_sizes=False, **hub, **others)
    inlay.PeftModel.from_pretrained(tiny("mlp"), str(saved), torch_device="cpu", **hub, **others)
    model.save_pretrained(tmp_path / "new", max_shard_size="1GB", save_function=torch.save, state_dict=None)
    assert (tmp_path / "new").exists()


def test_what_lets_it_through_is_told_where_that_would_help(saved: Path, model: inlay.PeftModel) -> None:
    hint = "strict=False loads it as it is, with a warning"
    rewrite(saved, _missing)
    with pytest.raises(LoadError, match=f"{hint}, and what is missing stays as the model has it."):
        model.load_adapter(saved, "other")
    with pytest.warns(PeftWarning, match="missing from the file") as given:
        report = model.load_adapter(saved, "other", strict=False)
    assert not any("strict=False" in text for text in (str(report), *(str(w.message) for w in given)))
    rewrite(saved, _shape)
    for options in ({"strict": True}, {"strict": False}, {}):
        with pytest.raises(LoadError, match="size mismatch") as refused:
            model.load_adapter(saved, "third", **options)
        assert hint not in str(refused.value)
    with pytest.raises(LoadError, match=hint):
        model.load_adapter(saved, "third", ignore_mismatched_sizes=True)


def test_a_failing_plan_leaves_the_config(mlp: nn.Module) -> None:
    """The caller's own config object is not half rewritten."""
    mine = config(target_modules=["nothing"], task_type="SEQ_CLS")
    mlp.classifier = nn.Linear(2, 2)
    before = mine.to_dict()
    with raises_and_leaves(mlp, PlanError):
        inlay.get_peft_model(mlp, mine)
    assert mine.to_dict() == before


def test_set_state_dict_checks_before_it_writes(model: inlay.PeftModel) -> None:
    tensors = {k: t.clone() + 1 for k, t in inlay.get_peft_model_state_dict(model).items()}
    tensors[Q] = torch.zeros(4, 11)
    with raises_and_leaves(model, LoadError, "lin0"):
        inlay.set_peft_model_state_dict(model, tensors)
    with pytest.warns(inlay.PeftWarning, match="ignore_mismatched_sizes leaves out:\n1 tensor of another shape"):
        report = inlay.set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert len(report.shape) == 1
    assert report.missing_keys == [Q.replace("lora_A", "lora_A.default")]
    close(model.base_model.model.lin1.lora_A.default.weight, tensors[Q.replace("lin0", "lin1")])


def test_what_is_missing_and_unexpected_is_named_as_the_model_names_it(model: inlay.PeftModel, saved: Path) -> None:
    def change(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[Q]
        tensors["base_model.model.lin0.lora_C.weight"] = torch.zeros(2)

    rewrite(saved, change)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name in ("default", "new"):
        with pytest.warns(PeftWarning, match="missing from the file"):
            report = model.load_adapter(saved, name, strict=False)
        assert report.missing_keys == [Q.replace("lora_A", f"lora_A.{name}")]
        assert report.unexpected_keys == ["base_model.model.lin0.lora_C.weight"] == list(report)[1]
    # What is given new values in place is trained on as it was.
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_key_of_another_naming_is_one_that_nothing_takes(
    model: inlay.PeftModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(saved, lambda values, tensors: tensors.update(odd=torch.zeros(2)))
    with raises_and_leaves(model, LoadError, "mixes two ways"):
        model.load_adapter(saved, "new")
    monkeypatch.setattr(inlay.settings, "strict_load", False)
    with pytest.warns(PeftWarning, match="1 tensor in the file that nothing takes: 'odd'"):
        report = model.load_adapter(saved, "new")
    assert report.missing_keys == []
    assert report.unexpected_keys == ["odd"]
