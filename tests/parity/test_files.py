"""Adapters on disk, in both directions: equal keys, shapes, bits and configs, and neither library complains."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.cases import BOTH, CASES, QV, B, Case, pair_of
from parity.helpers import Pair, assert_equal_tensors, base, make_pair, peft, peft_may_warn, random_like
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dropout has no effect there", "ignore:Model has `tie_word_embeddings=True`"
)

_ATTENTION = ("attention-rslora", "attention-bias-of-b")
FILE_CASES = {k: c for k, c in CASES.items() if not k.startswith("attention-") or k in _ATTENTION}
each_case = pytest.mark.parametrize("case", FILE_CASES.values(), ids=FILE_CASES.keys())

# What PEFT writes beside a module's trained copy under bias="all": the frozen module's bias, and the copy's once more.
REPEATED = (".original_module.", ".modules_to_save.")


def quietly(model: Any, directory: Path, **kwargs: Any) -> None:
    """Saves; both libraries warn when they put embeddings into the file too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory, **kwargs)


def saved(pair: Pair, tmp_path: Path, **kwargs: Any) -> tuple[Path, Path]:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    quietly(pair.theirs, theirs, **kwargs)
    quietly(pair.ours, ours, **kwargs)
    return theirs, ours


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def config(directory: Path) -> dict[str, Any]:
    """A config file, with lists that stand for sets sorted."""
    values = json.loads((directory / "adapter_config.json").read_text())
    sets = {k for k, v in values.items() if isinstance(v, list) and all(isinstance(x, str) for x in v)}
    return {k: sorted(v) if k in sets else v for k, v in values.items()}


def names(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


@each_case
def test_equal_files(case: Case, tmp_path: Path) -> None:
    theirs, ours = saved(pair_of(case), tmp_path)
    assert names(ours) == names(theirs)
    known = {"modules_to_save", "target_modules"} if case.config.get("ensure_weight_tying") else set()
    written, expected = config(ours), config(theirs)  # PEFT adds the tied layer's path to what the user asked for
    assert {k: v for k, v in written.items() if k not in known} == {
        k: v for k, v in expected.items() if k not in known
    }
    wanted = {k: t for k, t in tensors(theirs).items() if not any(part in k for part in REPEATED)}
    assert_equal_tensors(tensors(ours), wanted)


@each_case
def test_they_read_ours(case: Case, tmp_path: Path) -> None:
    pair = pair_of(case)
    quietly(pair.ours, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(base(case.base), tmp_path).eval()
        result = loaded.load_adapter(tmp_path, "default")
    assert not [str(w.message) for w in caught if "key" in str(w.message)]
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if "lora" in k]
    assert type(loaded).__name__ == type(pair.ours).__name__
    again = Pair(loaded, pair.ours, pair.args, pair.kwargs)
    again.assert_equal_outputs(1e-5)
    with peft_may_warn():
        read = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    written = inlay.get_peft_model_state_dict(pair.ours, save_embedding_layers=False)
    assert_equal_tensors(written, {k: t for k, t in read.items() if not any(part in k for part in REPEATED)})


@each_case
def test_we_read_theirs(case: Case, tmp_path: Path) -> None:
    pair = pair_of(case)
    quietly(pair.theirs, tmp_path)
    loaded = inlay.PeftModel.from_pretrained(base(case.base), tmp_path).eval()
    assert loaded.load_report.ok
    assert type(loaded).__name__ == type(pair.theirs).__name__
    Pair(pair.theirs, loaded, pair.args, pair.kwargs).assert_equal_outputs(1e-5)
    file = {k: t for k, t in tensors(tmp_path).items() if not any(part in k for part in REPEATED)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal_tensors(inlay.get_peft_model_state_dict(loaded), file)
    # PEFT trains the biases of an adapter that is loaded frozen.
    theirs, ours = Pair(_theirs_from(case, tmp_path), loaded, pair.args).each(
        lambda m: {n: p.requires_grad and not n.endswith(".bias") for n, p in m.named_parameters()}
    )
    assert ours == case.ours(theirs)
    assert not any(p.requires_grad for p in loaded.parameters())


def _theirs_from(case: Case, directory: Path) -> Any:
    with peft_may_warn():
        return peft.PeftModel.from_pretrained(base(case.base), directory)


@pytest.mark.parametrize("name", ["linear", "linear-modules-to-save", "linear-bias-all", "llama-tokens", "bert"])
def test_trained_on_from_theirs(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    quietly(pair_of(case).theirs, tmp_path)
    with peft_may_warn():
        theirs = peft.PeftModel.from_pretrained(base(case.base), tmp_path, is_trainable=True)
    ours = inlay.PeftModel.from_pretrained(base(case.base), tmp_path, is_trainable=True)
    for model in (theirs, ours):
        assert model.peft_config["default"].inference_mode is False
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }


@pytest.mark.parametrize("name", ["linear", "linear-dora", "embedding", "attention", "llama", "bert"])
def test_pickles(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pair = pair_of(case)
    theirs, ours = saved(pair, tmp_path, safe_serialization=False)
    assert names(ours) == names(theirs)
    read = [torch.load(d / "adapter_model.bin", weights_only=True) for d in (theirs, ours)]
    assert_equal_tensors(read[1], read[0])
    with peft_may_warn():
        theirs_model = peft.PeftModel.from_pretrained(base(case.base), ours).eval()
    ours_model = inlay.PeftModel.from_pretrained(base(case.base), theirs).eval()
    assert ours_model.load_report.ok
    Pair(theirs_model, ours_model, pair.args, pair.kwargs).assert_equal_outputs(1e-5)


def test_other_names_go_into_folders(tmp_path: Path) -> None:
    pair = make_pair("linears", BOTH, more={"other": {**B, "target_modules": ["lin0"]}})
    theirs, ours = saved(pair, tmp_path)
    assert names(ours) == names(theirs)
    for folder in ("", "other"):
        assert config(ours / folder) == config(theirs / folder)
        assert_equal_tensors(tensors(ours / folder), tensors(theirs / folder))
    loaded = inlay.PeftModel.from_pretrained(base("linears"), theirs, subfolder="other").eval()
    pair.each(lambda m: m.set_adapter("other"))
    Pair(pair.theirs, loaded, pair.args).assert_equal_outputs()


def test_only_a_named_adapter(tmp_path: Path) -> None:
    pair = make_pair("linears", BOTH, adapter_name="first", more={"other": {**B, "target_modules": ["lin0"]}})
    theirs, ours = saved(pair, tmp_path, selected_adapters=["first"])
    assert names(ours) == names(theirs)
    with peft_may_warn():
        again = peft.PeftModel.from_pretrained(base("linears"), ours / "first", adapter_name="x").eval()
    Pair(again, pair.ours, pair.args).assert_equal_outputs()


def test_several_loaded_from_theirs(tmp_path: Path) -> None:
    pair = make_pair("linears", BOTH, more={"other": {**B, "target_modules": ["lin0"]}})
    quietly(pair.theirs, tmp_path)
    with peft_may_warn():
        theirs = peft.PeftModel.from_pretrained(base("linears"), tmp_path)
        theirs.load_adapter(tmp_path / "other", "other")
    ours = inlay.PeftModel.from_pretrained(base("linears"), tmp_path)
    assert ours.load_adapter(tmp_path / "other", "other").ok
    again = Pair(theirs, ours, pair.args)
    again.assert_equal_outputs()
    again.each(lambda m: m.set_adapter("other"))
    again.assert_equal_outputs()
    states = again.each(lambda m: {n: p.requires_grad for n, p in m.named_parameters()})
    assert states[0] == states[1]


def test_metadata_that_their_reader_wants(tmp_path: Path) -> None:
    theirs, ours = saved(pair_of(CASES["linear"]), tmp_path)
    found = []
    for directory in (theirs, ours):
        with safe_open(directory / "adapter_model.safetensors", "pt") as file:
            found.append(file.metadata())
    assert found[0].items() <= found[1].items()


def test_an_old_file(tmp_path: Path) -> None:
    """No version, an unknown key, no prefix on the keys."""
    pair = pair_of(CASES["linear"])
    quietly(pair.theirs, tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["peft_version"], values["lora_bias"], values["arrow_config"]
    path.write_text(json.dumps({**values, "enable_lora": None}))
    weights = {k.removeprefix("base_model.model."): t for k, t in tensors(tmp_path).items()}
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.warns(inlay.PeftWarning, match="enable_lora"):
        loaded = inlay.PeftModel.from_pretrained(base("linears"), tmp_path).eval()
    Pair(pair.theirs, loaded, pair.args).assert_equal_outputs()


# ---------------------------------------------------------------- embeddings in the file


@pytest.mark.parametrize("embeddings", ["auto", True, False])
@pytest.mark.parametrize("name", ["llama", "llama-embedding-and-head", "llama-tokens", "gpt2", "bert"])
def test_embeddings_are_saved_alike(name: str, embeddings: bool | str) -> None:
    pair = pair_of(CASES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model_state_dict(pair.theirs, save_embedding_layers=embeddings)
        ours = inlay.get_peft_model_state_dict(pair.ours, save_embedding_layers=embeddings)
    assert_equal_tensors(ours, theirs)


def test_resized_embeddings(tmp_path: Path) -> None:
    base("llama").save_pretrained(tmp_path / "base")
    directories = []
    for library in (peft, inlay):
        model = type(base("llama")).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(70)
        torch.manual_seed(3)
        nn.init.normal_(model.model.embed_tokens.weight)
        nn.init.normal_(model.lm_head.weight)
        with peft_may_warn():
            adapted = library.get_peft_model(model, library.LoraConfig(**QV, task_type="CAUSAL_LM"))
        directories.append(tmp_path / library.__name__)
        quietly(adapted, directories[-1])
    theirs, ours = map(tensors, directories)
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}
    assert "base_model.model.model.embed_tokens.weight" in ours
    for key in theirs:
        assert "lora" in key or torch.equal(ours[key], theirs[key])


# ---------------------------------------------------------------- models by name


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[[str, dict[str, Any]], tuple[Path, Pair]]:
    """A base saved to disk, and adapters of it saved by both libraries."""

    def make(name: str, fields: dict[str, Any]) -> tuple[Path, Pair]:
        base(name).save_pretrained(tmp_path / "base")
        pair = make_pair(name, fields)
        for model in pair.both():
            model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        saved(pair, tmp_path)
        return tmp_path, pair

    return make


@pytest.mark.parametrize(
    ("auto", "name", "fields"),
    [
        ("AutoPeftModelForCausalLM", "llama", {**QV, "task_type": "CAUSAL_LM"}),
        ("AutoPeftModelForSequenceClassification", "bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        ("AutoPeftModelForSeq2SeqLM", "t5", {"target_modules": ["q"], "task_type": "SEQ_2_SEQ_LM"}),
        ("AutoPeftModel", "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_auto_models(on_disk: Callable[..., tuple[Path, Pair]], auto: str, name: str, fields: dict[str, Any]) -> None:
    directory, pair = on_disk(name, fields)
    kwargs = {"num_labels": 3} if name == "bert" else {}
    with peft_may_warn():
        theirs = getattr(peft, auto).from_pretrained(directory / "ours", **kwargs).eval()
    ours = getattr(inlay, auto).from_pretrained(directory / "theirs", **kwargs).eval()
    assert type(ours).__name__ == type(theirs).__name__
    Pair(theirs, ours, pair.args, pair.kwargs).assert_equal_outputs()
    Pair(pair.theirs, ours, pair.args, pair.kwargs).assert_equal_outputs()


# ---------------------------------------------------------------- state dicts


@pytest.mark.parametrize("name", ["linear", "linear-modules-to-save", "llama-tokens", "conv2d-dora", "attention"])
def test_state_dicts_of_a_bare_model(name: str) -> None:
    case = CASES[name]
    with peft_may_warn():
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(**case.config), base(case.base))
        wanted = random_like(peft.get_peft_model_state_dict(theirs))
        peft.set_peft_model_state_dict(theirs, wanted)
    ours = inlay.inject_adapter_in_model(inlay.LoraConfig(**case.config), base(case.base))
    report = inlay.set_peft_model_state_dict(ours, wanted)
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert_equal_tensors(inlay.get_peft_model_state_dict(ours), wanted)
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    pair = make_pair(case.base, case.config)
    Pair(theirs.eval(), ours.eval(), pair.args, pair.kwargs).assert_equal_outputs()


def test_a_partial_state_dict() -> None:
    pair = pair_of(CASES["linear-modules-to-save"])
    partial = [
        {k: v for k, v in m.state_dict().items() if "lin0" in k or "head" in k or "norm" in k} for m in pair.both()
    ]
    with peft_may_warn():
        theirs = peft.get_peft_model_state_dict(pair.theirs, state_dict=partial[0])
    ours = inlay.get_peft_model_state_dict(pair.ours, state_dict=partial[1])
    assert_equal_tensors(ours, theirs)
    assert not any("lin1" in k for k in ours)


def test_a_foreign_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    pair = pair_of(CASES["linear"])
    for model, directory in zip(pair.both(), ("theirs", "ours"), strict=True):
        quietly(model, tmp_path / directory, state_dict={k: v * 2 for k, v in model.state_dict().items()})
    assert_equal_tensors(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))


def test_what_setting_reports() -> None:
    pair = pair_of(CASES["linear"])
    values = inlay.get_peft_model_state_dict(pair.ours)
    values.pop("base_model.model.lin0.lora_A.weight")
    values["base_model.model.lin9.lora_A.weight"] = torch.zeros(4, 12)
    with peft_may_warn():
        theirs = peft.set_peft_model_state_dict(pair.theirs, values)
    ours = inlay.set_peft_model_state_dict(pair.ours, values)
    assert len(ours.unexpected_keys) == len(theirs.unexpected_keys) == 1
    assert [k for k in theirs.missing_keys if "lora" in k] == ["base_model.model.lin0.lora_A.default.weight"]
    assert len(ours.missing_keys) == 1


@pytest.mark.parametrize("name", ["linear", "linear-dora", "linear-modules-to-save", "llama-tokens"])
def test_weights_alone(name: str, tmp_path: Path) -> None:
    pair = pair_of(CASES[name])
    theirs, ours = saved(pair, tmp_path)
    with peft_may_warn():
        wanted = peft.load_peft_weights(str(ours), device="cpu")
    assert_equal_tensors(inlay.load_peft_weights(str(theirs), device="cpu"), wanted)


def test_keys_by_another_name(tmp_path: Path) -> None:
    pair = pair_of(CASES["linear"])
    quietly(pair.theirs, tmp_path)
    renamed = {k.replace("lin0", "first"): t for k, t in tensors(tmp_path).items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    mapping = {"first": "lin0"}
    with peft_may_warn():
        theirs = peft.PeftModel.from_pretrained(base("linears"), tmp_path, key_mapping=mapping).eval()
    ours = inlay.PeftModel.from_pretrained(base("linears"), tmp_path, key_mapping=mapping).eval()
    Pair(theirs, ours, pair.args).assert_equal_outputs()
    Pair(pair.theirs, ours, pair.args).assert_equal_outputs()
