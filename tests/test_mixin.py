"""The verbs on a class of the user's own: every method, saving and loading, what is refused, what a model keeps."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import bits, close, disturb, same_bits, same_state
from own_nets import CELLS, NETS, Perceptron, config_of
from torch import Tensor, nn

import inlay
from inlay.errors import (
    AdapterNameError,
    BaseGoneError,
    ConfigError,
    DuplicateAdapterError,
    FieldTypeError,
    FileError,
    LoadError,
    MissingFileError,
    NonFiniteError,
    PlanError,
    UnknownAdapterError,
    UnknownArgumentError,
    UnwritableError,
)
from inlay.walk import wrappers
from inlay.works import prepare


def lora(*targets: str, **fields: Any) -> inlay.LoraConfig:
    fields = {"r": 2, "target_modules": list(targets or ("lin0", "lin1")), "init_lora_weights": False, **fields}
    return inlay.LoraConfig(**fields)


@pytest.fixture
def net() -> Perceptron:
    torch.manual_seed(0)
    return Perceptron().train()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 10)


def trained(model: nn.Module) -> set[str]:
    """The adapters whose tensors are trained, and the base's own parameters that are."""
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    return {n.split(".")[2] if "lora_" in n or "modules_to_save" in n else n for n in names}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    configs = {name: c.to_dict() for name, c in model.__dict__.get("peft_config", {}).items()}
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    parameters = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    kept = {k: v for k, v in model.__dict__.items() if k not in ("_modules", "peft_config")}
    active = [list(m.active_adapters) for m in model.modules() if hasattr(m, "base_layer")]
    return configs, modules, parameters, kept, active


@contextmanager
def raises_and_leaves(model: nn.Module, error: type[BaseException], match: str = "") -> Iterator[None]:
    before, state = snapshot(model), bits(model)
    with pytest.raises(error, match=match):
        yield
    assert snapshot(model) == before
    same_state(bits(model), state)


# ---------------------------------------------------------------- every method, on every net it has layers in


@pytest.mark.parametrize(("method", "name"), CELLS)
@torch.no_grad()
def test_method_goes_in_comes_back_from_files_and_goes_out(method: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, make_input, *_ = NETS[name]
    base, x = build().eval(), make_input()
    net, plain, state = copy.deepcopy(base), base(x), bits(base)
    net.add_adapter(config_of(method, name), "style")
    disturb(net)
    wanted = net(x)
    assert float((wanted - plain).abs().max()) > 1e-3, "the adapter does nothing"
    net.save_adapter(tmp_path)

    for source in (
        {"peft_model_id": tmp_path},
        {"peft_config": net.peft_config["style"], "adapter_state_dict": net.get_adapter_state_dict()},
    ):
        other = copy.deepcopy(base)
        report = other.load_adapter(adapter_name="again", **source)
        assert report.ok, report
        close(other(x), wanted)
        same_state(other.get_adapter_state_dict(), net.get_adapter_state_dict())
    handle = inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    close(handle(x), wanted)

    net.disable_adapters()
    close(net(x), plain)
    net.enable_adapters()
    same_bits(net(x), wanted)
    net.delete_adapter("style")
    same_bits(net(x), plain)
    same_state(bits(net), state)
    assert not any(hasattr(m, "base_layer") for m in net.modules())
    assert "peft_config" not in net.__dict__
    assert net._hf_peft_config_loaded is False


def test_state_dict_of_the_model_can_be_given(net: Perceptron) -> None:
    net.add_adapter(lora())
    doubled = {key: 2 * t for key, t in net.state_dict().items()}
    wanted = {key: 2 * t for key, t in net.get_adapter_state_dict().items()}
    same_state(net.get_adapter_state_dict(state_dict=doubled), wanted)


def test_what_is_loaded_is_a_copy(net: Perceptron) -> None:
    net.add_adapter(lora())
    config, tensors = net.peft_config["default"], net.get_adapter_state_dict()
    other = Perceptron()
    other.load_adapter(adapter_state_dict=tensors, peft_config=config)
    given = {t.data_ptr() for t in tensors.values()}
    assert given.isdisjoint(t.data_ptr() for t in other.get_adapter_state_dict().values())
    assert other.peft_config["default"] is not config
    assert not config.inference_mode


def test_config_may_be_a_dict_and_stand_in_for_the_files(net: Perceptron, x: Tensor, tmp_path: Path) -> None:
    base = copy.deepcopy(net)
    net.add_adapter(lora(lora_alpha=4))
    net.save_adapter(tmp_path)
    config = {**net.peft_config["default"].to_dict(), "lora_alpha": 8}
    other = copy.deepcopy(base)
    other.load_adapter(tmp_path, peft_config=config)
    close(other(x), _scaled(net, x, 2.0))
    third = copy.deepcopy(base)
    third.load_adapter(tmp_path, adapter_state_dict={k: t * 0 for k, t in net.get_adapter_state_dict().items()})
    same_bits(third(x), base(x))


def _scaled(net: Perceptron, x: Tensor, factor: float) -> Tensor:
    net = copy.deepcopy(net)
    for layer in (net.lin0, net.lin1):
        layer.set_scale("default", factor)
    return net(x)


def test_subfolder_and_the_hubs_arguments_are_passed_on(
    net: Perceptron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.add_adapter(lora())
    net.save_adapter(tmp_path / "last")
    Perceptron().load_adapter(tmp_path, subfolder="last")
    Perceptron().load_adapter(tmp_path, adapter_kwargs={"subfolder": "last"})

    asked: dict[str, Any] = {}

    def fetch(model_id: str, **kwargs: Any) -> Path:
        asked.update(kwargs, model_id=model_id)
        return tmp_path / "last"

    monkeypatch.setattr("inlay.integrations.hub.fetch", fetch)
    Perceptron().load_adapter("owner/name", revision="v2", token="t", cache_dir="c", local_files_only=True)
    wanted = {"model_id": "owner/name", "revision": "v2", "token": "t", "cache_dir": "c", "local_files_only": True}
    assert asked.items() >= wanted.items()


# ---------------------------------------------------------------- what is trained


def test_added_adapter_is_the_one_that_is_active_and_trained(net: Perceptron) -> None:
    net.add_adapter(lora(), "a")
    assert (net.active_adapters(), trained(net)) == (["a"], {"a"})
    net.add_adapter(lora(modules_to_save=["head"]), "b")
    assert (net.active_adapters(), trained(net)) == (["b"], {"b"})
    assert net.training


@pytest.mark.parametrize("source", ["files", "state dict"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapter_is_active_and_trained_only_where_asked(
    net: Perceptron, tmp_path: Path, source: str, is_trainable: bool
) -> None:
    made = copy.deepcopy(net)
    made.add_adapter(lora(modules_to_save=["head"], bias="all"))
    made.save_adapter(tmp_path)
    given: dict[str, Any] = {"peft_model_id": tmp_path}
    if source != "files":
        given = {"peft_config": made.peft_config["default"], "adapter_state_dict": made.get_adapter_state_dict()}
    net.add_adapter(lora(), "a")
    net.load_adapter(adapter_name="b", is_trainable=is_trainable, **given)
    biases = {"lin0.base_layer.bias", "lin1.base_layer.bias"}
    assert net.active_adapters() == ["b"]
    assert trained(net) == ({"b"} | biases if is_trainable else set())
    assert net.training == is_trainable
    assert net.peft_config["b"].inference_mode == (not is_trainable)
    net.set_adapter("a")
    assert trained(net) == {"a"}


def test_adapter_has_its_layers_dtype(net: Perceptron, tmp_path: Path) -> None:
    net.add_adapter(lora())
    net.save_adapter(tmp_path)
    for fresh in (True, False):
        narrow = Perceptron().to(torch.bfloat16)
        narrow.add_adapter(lora()) if fresh else narrow.load_adapter(tmp_path)
        assert {t.dtype for t in narrow.get_adapter_state_dict().values()} == {torch.bfloat16}


# ---------------------------------------------------------------- several


def test_several_run_together_and_each_alone(net: Perceptron, x: Tensor) -> None:
    base = copy.deepcopy(net)
    alone = {}
    for name, config in {"a": lora("lin0"), "b": lora("head", r=3), "c": _ia3()}.items():
        net.add_adapter(config, name)
        alone[name] = net(x)
        single = copy.deepcopy(base)
        single.load_adapter(peft_config=config, adapter_state_dict=net.get_adapter_state_dict(name))
        same_bits(single(x), alone[name])
    net.set_adapter(["a", "b"])
    assert (net.active_adapters(), trained(net)) == (["a", "b"], {"a", "b"})
    together = copy.deepcopy(base)
    together.lin0, together.head = copy.deepcopy(net.lin0), copy.deepcopy(net.head)
    same_bits(net(x), together(x))
    net.set_adapter("c")
    same_bits(net(x), alone["c"])
    net.set_adapter([])
    same_bits(net(x), base(x))
    assert (net.active_adapters(), trained(net)) == ([], set())


@torch.no_grad()
def test_of_several_heads_the_first_one_named_serves(net: Perceptron, x: Tensor) -> None:
    for name in "ab":
        net.add_adapter(lora("lin0", modules_to_save=["head"]), name)
        net.head.modules_to_save[name].bias.fill_(1000.0 if name == "a" else 2000.0)
    net.set_adapter(["b", "a"])
    assert float(net(x).min()) > 1500
    net.set_adapter(["a", "b"])
    assert float(net(x).max()) < 1500


def _ia3() -> inlay.IA3Config:
    return inlay.IA3Config(target_modules=["lin1"], feedforward_modules=[], init_ia3_weights=False)


def test_switched_off_nothing_runs_and_nothing_is_trained(net: Perceptron, x: Tensor) -> None:
    base = net(x)
    net.add_adapter(lora(modules_to_save=["head"]), "a")
    wanted = net(x)
    net.disable_adapters()
    assert (net.active_adapters(), trained(net)) == (["a"], set())
    same_bits(net(x), base)
    net.enable_adapters()
    assert trained(net) == {"a"}
    same_bits(net(x), wanted)


@pytest.mark.parametrize(
    ("active", "deleted", "left", "then"),
    [
        (["a"], "b", ["a", "c"], ["a"]),
        (["a", "c"], ["a"], ["b", "c"], ["c"]),
        (["a"], ["a", "b"], ["c"], ["c"]),
        (["b", "a"], ["b", "a"], ["c"], ["c"]),
    ],
)
def test_deleted_adapters_leave_the_others(
    net: Perceptron, x: Tensor, active: list[str], deleted: Any, left: list[str], then: list[str]
) -> None:
    for name in "abc":
        net.add_adapter(lora(), name)
    net.set_adapter(then)
    wanted = net(x)
    net.set_adapter(active)
    if set(active) <= set(deleted):
        with pytest.warns(inlay.PeftWarning, match=f"is deleted: {then[0]} is active") as caught:
            net.delete_adapter(deleted)
        assert len(caught) == 1
    else:
        net.delete_adapter(deleted)
    assert (list(net.peft_config), net.active_adapters()) == (left, then)
    same_bits(net(x), wanted)
    assert not any(name in key for name in deleted for key in _adapter_names(net))


def _adapter_names(net: nn.Module) -> set[str]:
    return {key.split(".")[2] for key in net.state_dict() if "lora_" in key}


def test_what_an_injection_put_in_can_be_set_and_deleted(net: Perceptron, x: Tensor) -> None:
    base = net(x)
    inlay.inject_adapter_in_model(lora(), net, "a")
    inlay.inject_adapter_in_model(lora(), net, "b")
    net.set_adapter("a")
    assert net.active_adapters() == ["a"]
    net.delete_adapter(["a", "b"])
    same_bits(net(x), base)


# ---------------------------------------------------------------- what is refused, and leaves the model as it was

Act = Callable[[Any], Any]

WITHOUT: dict[str, Act] = {
    "set_adapter": lambda net: net.set_adapter("a"),
    "enable_adapters": lambda net: net.enable_adapters(),
    "disable_adapters": lambda net: net.disable_adapters(),
    "active_adapters": lambda net: net.active_adapters(),
    "get_adapter_state_dict": lambda net: net.get_adapter_state_dict(),
    "save_adapter": lambda net: net.save_adapter("nowhere"),
    "delete_adapter": lambda net: net.delete_adapter("a"),
}


@pytest.mark.parametrize("verb", WITHOUT)
def test_verb_without_any_adapter(net: Perceptron, verb: str) -> None:
    with raises_and_leaves(net, ValueError, "No adapter is loaded"):
        WITHOUT[verb](net)
    net.add_adapter(lora(), "a")
    net.delete_adapter("a")
    with raises_and_leaves(net, UnknownAdapterError, "No adapter is loaded"):
        WITHOUT[verb](net)


def _tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """An adapter of lin0 alone, changed."""
    tensors = {"lin0.lora_A.weight": torch.ones(2, 10), "lin0.lora_B.weight": torch.ones(20, 2)}
    tensors.update({f"lin0.{key}.weight": t for key, t in changes.items()})
    return {key: t for key, t in tensors.items() if t is not None}


def _loads(config: Any = None, **changes: Any) -> Act:
    config = lora("lin0") if config is None else config
    return lambda net: net.load_adapter(peft_config=config, adapter_state_dict=_tensors(**changes))


PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
REFUSED: dict[str, tuple[Act, type[BaseException], str]] = {
    "a dict is no config": (lambda net: net.add_adapter({"r": 2}), TypeError, "got dict"),
    "a prompt": (lambda net: net.add_adapter(inlay.PromptTuningConfig(**PROMPT)), ValueError, "PromptTuningConfig"),
    "a prefix": (lambda net: net.add_adapter(inlay.PrefixTuningConfig(**PROMPT)), ConfigError, "PrefixTuningConfig"),
    "an activated adapter": (
        lambda net: net.add_adapter(lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM")),
        ConfigError,
        "handle",
    ),
    "no such layer": (lambda net: net.add_adapter(lora("lin7")), inlay.NoMatchingPeftModuleError, "lin7"),
    "a dotted name": (lambda net: net.add_adapter(lora(), "a.b"), AdapterNameError, "a.b"),
    "no name": (lambda net: net.add_adapter(lora(), ""), AdapterNameError, "empty"),
    "nothing to load": (lambda net: net.load_adapter(), ValueError, "peft_model_id"),
    "a config alone": (lambda net: net.load_adapter(peft_config=lora()), ConfigError, "adapter_state_dict"),
    "tensors alone": (lambda net: net.load_adapter(adapter_state_dict=_tensors()), ConfigError, "peft_config"),
    "no such directory": (lambda net: net.load_adapter("./nowhere"), OSError, "nowhere"),
    "an empty directory": (lambda net: net.load_adapter("empty"), MissingFileError, "adapter_config.json"),
    "a config without weights": (lambda net: net.load_adapter("half"), MissingFileError, "safetensors"),
    "a misspelt keyword": (lambda net: net.load_adapter("half", is_trainabel=1), UnknownArgumentError, "is_trainable"),
    "one in adapter_kwargs": (
        lambda net: net.load_adapter("half", adapter_kwargs={"subfoldr": "x"}),
        TypeError,
        "subfolder",
    ),
    "a path as config": (lambda net: net.load_adapter("half", peft_config="half"), FieldTypeError, "got str"),
    "a prompt's config": (_loads(inlay.PromptTuningConfig(**PROMPT)), ConfigError, "PromptTuningConfig"),
    "a prompt's files": (lambda net: net.load_adapter("prompt"), ConfigError, "PromptTuningConfig"),
    "a missing tensor": (_loads(lora_A=None), RuntimeError, "missing"),
    "one too many": (_loads(lora_C=torch.ones(2)), LoadError, "nothing takes"),
    "another shape": (_loads(lora_A=torch.ones(3, 10)), LoadError, "another shape"),
    "another layer": (_loads(lora("lin1")), LoadError, "missing"),
    "NaN": (_loads(lora_A=torch.full((2, 10), torch.nan)), NonFiniteError, "NaN"),
    "a tensor on the meta device": (_loads(lora_A=torch.ones(2, 10, device="meta")), LoadError, "meta"),
    "no tensor": (_loads(lora_A=[1.0]), LoadError, "list"),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(net: Perceptron, case: str, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    lora("lin0").save_pretrained("half")
    inlay.PromptTuningConfig(**PROMPT).save_pretrained("prompt")
    torch.save({"prompt_embeddings": torch.ones(2, 4)}, "prompt/adapter_model.bin")
    if beside:
        net.add_adapter(lora("lin0", "lin1", modules_to_save=["head"]), "first")
    act, error, match = REFUSED[case]
    with raises_and_leaves(net, error, match):
        act(net)


REFUSED_BESIDE: dict[str, tuple[Act, type[BaseException], str]] = {
    "the name again": (lambda net: net.add_adapter(lora(), "first"), DuplicateAdapterError, "exists"),
    "loaded again": (lambda net: net.load_adapter("saved", "first"), ValueError, "exists"),
    "biases twice": (lambda net: net.add_adapter(lora(bias="all"), "b"), ConfigError, "biases"),
    "biases twice, loaded": (
        lambda net: net.load_adapter(
            adapter_name="b", peft_config=lora("lin0", bias="all"), adapter_state_dict=_tensors()
        ),
        ConfigError,
        "biases",
    ),
    "an unknown one": (lambda net: net.set_adapter("b"), ValueError, "Adapter b not found"),
    "one of several unknown": (
        lambda net: net.set_adapter(["first", "b"]),
        UnknownAdapterError,
        "Adapter b not found",
    ),
    "no name at all": (lambda net: net.set_adapter(None), AdapterNameError, "None"),
    "deleting no name at all": (lambda net: net.delete_adapter(None), AdapterNameError, "None"),
    "deleting an unknown one": (lambda net: net.delete_adapter("b"), ValueError, "Adapter b does not exist"),
    "deleting one of several": (
        lambda net: net.delete_adapter(["first", "b"]),
        UnknownAdapterError,
        "Adapter b does not exist",
    ),
    "tensors of an unknown one": (lambda net: net.get_adapter_state_dict("b"), KeyError, "Adapter b does not exist"),
    "saving an unknown one": (lambda net: net.save_adapter("x", "b"), UnknownAdapterError, "Adapter b does not exist"),
    "saving nowhere": (lambda net: net.save_adapter(""), FileError, "empty"),
    "saving into a file": (lambda net: net.save_adapter("file"), UnwritableError, "file"),
}


@pytest.mark.parametrize("case", REFUSED_BESIDE)
def test_refused_beside_others(net: Perceptron, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    net.add_adapter(lora(modules_to_save=["head"]), "second")
    net.add_adapter(lora(modules_to_save=["head"], bias="all"), "first")
    net.save_adapter("saved")
    act, error, match = REFUSED_BESIDE[case]
    with raises_and_leaves(net, error, match):
        act(net)


def test_merged_adapters_stay_until_they_can_go(net: Perceptron) -> None:
    net.add_adapter(lora("lin0"), "a")
    net.add_adapter(_ia3(), "b")
    net.lin1.merge(adapter_names=["b"])
    with raises_and_leaves(net, PlanError, "merged"):
        net.delete_adapter(["a", "b"])
    net.lin1.unmerge()
    net.lin1.merge(adapter_names=["b"], keep_base=False)  # for good: activating another one would have to undo it
    with raises_and_leaves(net, BaseGoneError, "keep_base"):
        net.add_adapter(lora(), "c")


@pytest.mark.parametrize("step", ["adapted.Adapted.add", "trained.ModulesToSaveWrapper.add", "inject.biases"])
def test_injection_that_fails_halfway(net: Perceptron, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inlay.inject_adapter_in_model(lora(modules_to_save=["head"]), net, "a")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("halfway")

    monkeypatch.setattr(f"inlay.{step}", fails)
    with raises_and_leaves(net, RuntimeError, "halfway"):
        inlay.inject_adapter_in_model(lora(modules_to_save=["head"]), net, "b")


def test_not_strict_loads_what_fits_and_warns(net: Perceptron) -> None:
    tensors = _tensors(lora_B=None, lora_C=torch.ones(2))
    with pytest.warns(inlay.PeftWarning, match="missing"):
        report = net.load_adapter(peft_config=lora("lin0"), adapter_state_dict=tensors, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["lin0.lora_B.weight"], ["lin0.lora_C.weight"])
    assert torch.equal(net.get_adapter_state_dict()["lin0.lora_A.weight"], torch.ones(2, 10))


def test_no_tensors_are_named_otherwise(net: Perceptron) -> None:
    tensors = {f"base_model.model.net.{key}": t for key, t in _tensors().items()}
    net.load_adapter(peft_config=lora("lin0"), adapter_state_dict=tensors, key_mapping={r"^net\.": ""})
    assert torch.equal(net.get_adapter_state_dict()["lin0.lora_A.weight"], torch.ones(2, 10))


# ---------------------------------------------------------------- what a model keeps; copies and threads


def test_model_keeps_what_transformers_keeps_and_no_more(net: Perceptron) -> None:
    before = set(net.__dict__)
    net.add_adapter(lora())
    net.disable_adapters()
    net.enable_adapters()
    net.set_adapter("default")
    assert set(net.__dict__) - before == {"peft_config", "_hf_peft_config_loaded"}
    assert net._hf_peft_config_loaded is True


def test_base_is_named_in_the_config_where_the_model_knows_its_name(net: Perceptron) -> None:
    net.add_adapter(lora(base_model_name_or_path="owner/base"), "a")
    assert net.peft_config["a"].base_model_name_or_path == "owner/base"
    net.name_or_path = "owner/net"
    net.add_adapter(lora(), "b")
    assert net.peft_config["b"].base_model_name_or_path == "owner/net"


def test_copies_go_their_own_way(net: Perceptron, x: Tensor) -> None:
    net.add_adapter(lora(), "a")
    net.add_adapter(lora(), "b")
    other = copy.deepcopy(net)
    wanted, state = net(x), bits(net)
    other.set_adapter("a")
    disturb(other)
    other.delete_adapter("b")
    other.add_adapter(lora(), "c")
    assert (list(net.peft_config), net.active_adapters()) == (["a", "b"], ["b"])
    same_bits(net(x), wanted)
    same_state(bits(net), state)


def together(*acts: Callable[[], Any]) -> None:
    """Runs each in a thread of its own; what one of them raises is raised."""
    with ThreadPoolExecutor(len(acts)) as pool:
        for done in [pool.submit(act) for act in acts]:
            done.result(60)


def test_first_adapters_of_two_threads_share_one_routing(net: Perceptron, monkeypatch: pytest.MonkeyPatch) -> None:
    both_have_planned = threading.Barrier(2)

    def slowly(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        with suppress(threading.BrokenBarrierError):  # as it must be: the other one waits for this one to end
            both_have_planned.wait(0.3)
        return prepared

    monkeypatch.setattr("inlay.model.prepare", slowly)
    together(lambda: net.add_adapter(lora("lin0"), "a"), lambda: net.add_adapter(lora("lin1"), "b"))
    assert sorted(net.peft_config) == ["a", "b"]
    assert len({wrapper.router for _, wrapper in wrappers(net)}) == 1


@pytest.mark.filterwarnings("ignore:.*was active and is deleted")  # another thread may have chosen what is deleted
def test_threads_load_choose_and_delete(net: Perceptron, x: Tensor) -> None:
    saved: dict[str, tuple[Any, dict[str, Tensor], Tensor]] = {}
    for rank in range(1, 9):
        made = copy.deepcopy(net)
        made.add_adapter(lora(r=rank))
        saved[f"n{rank}"] = (made.peft_config["default"], made.get_adapter_state_dict(), made(x))

    def serve(name: str) -> None:
        config, tensors, _ = saved[name]
        net.load_adapter(adapter_name=name, peft_config=config, adapter_state_dict=tensors)
        net.add_adapter(lora(), f"{name}-brief")
        net.load_adapter(adapter_name=f"{name}-again", peft_config=config, adapter_state_dict=tensors)
        net.set_adapter(name)
        net.delete_adapter(f"{name}-brief")

    together(*(partial(serve, name) for name in saved))
    assert sorted(net.peft_config) == sorted([*saved, *(f"{name}-again" for name in saved)])
    for name, (_, _, wanted) in saved.items():
        for loaded in (name, f"{name}-again"):
            net.set_adapter(loaded)
            close(net(x), wanted)


# ---------------------------------------------------------------- accelerate's layouts

LAYOUTS: dict[str, dict[str, Any]] = {
    "one device": {"device_map": "cpu"},
    "in memory and on the disk": {
        "device_map": {"lin0": "disk", "lin1": "cpu", "head": "disk"},
        "offload_folder": "folder",
    },
    "chosen": {"device_map": "auto", "max_memory": {"cpu": 10**6}},
    "in order": {"device_map": "sequential"},
    "by memory": {"max_memory": {"cpu": 10**6}},
}


@pytest.mark.parametrize("before", [{}, LAYOUTS["in memory and on the disk"]], ids=["plain", "offloaded before"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_loaded_with_a_device_map(
    net: Perceptron, x: Tensor, before: Any, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    base = net(x)
    made = copy.deepcopy(net)
    made.add_adapter(lora(modules_to_save=["head"]))
    disturb(made)
    made.save_adapter("saved")
    wanted = made(x)
    if before:
        accelerate.dispatch_model(net, before["device_map"], offload_dir=before["offload_folder"])
    net.load_adapter("saved", **LAYOUTS[layout])
    close(net(x), wanted)
    on_disk = "disk" in str(LAYOUTS[layout].get("device_map"))
    assert any(p.is_meta for p in net.parameters()) == on_disk
    same_state(net.get_adapter_state_dict(), made.get_adapter_state_dict())
    net.disable_adapters()
    close(net(x), base)
    net.delete_adapter("default")
    close(net(x), base)


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        ({"device_map": "fast"}, "fast"),
        ({"device_map": {"lin0": "cpu"}}, "device_map"),
        ({"device_map": {"": "disk"}}, "offload_folder"),
        ({"device_map": 1.5}, "1.5"),
    ],
)
def test_device_map_that_cannot_be(net: Perceptron, layout: Any, match: str) -> None:
    pytest.importorskip("accelerate")
    with raises_and_leaves(net, ConfigError, match):
        net.load_adapter(peft_config=lora("lin0"), adapter_state_dict=_tensors(), **layout)


def test_adapter_goes_where_its_layout_fails(net: Perceptron, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = pytest.importorskip("inlay.integrations.layout")

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(layout, "dispatch_model", full)
    for name in ("first", "second"):
        with raises_and_leaves(net, torch.OutOfMemoryError, "no room"):
            net.load_adapter(
                adapter_name="b", peft_config=lora("lin0"), adapter_state_dict=_tensors(), device_map="cpu"
            )
        net.add_adapter(lora("lin0"), name)
