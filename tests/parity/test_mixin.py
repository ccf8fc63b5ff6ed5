"""`inlay.AdapterMixin` beside PEFT, by files in both directions, and beside transformers' own mixin on PEFT."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import BUILDERS
from laws import close, disturb
from own_nets import CELLS, NETS, config_of
from parity.helpers import peft_may_warn, random_like
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.integrations import PeftAdapterMixin

import inlay

# PEFT's adaption prompt wants a whole Llama, and most of its methods no embedding and no attention of torch's.
SHARED = [(method, net) for method, net in CELLS if net in ("mlp", "conv net") or (method, net) == ("LORA", "block")]


def config(method: str, net: str, library: Any) -> Any:
    with peft_may_warn():
        made = config_of(method, net, library, **({"total_step": 10} if method == "ADALORA" else {}))
    return made


def output(theirs: Any, method: str, net: str, x: Tensor) -> Tensor:
    if (method, net) == ("OFT", "conv net"):  # what runs there is not what PEFT merges: see docs/differences.md
        theirs.merge_adapter()
    return theirs(x)


def plain_and_own(net: str) -> tuple[nn.Module, Any, Tensor]:
    build, make_input, *_ = NETS[net]
    torch.manual_seed(0)
    own = build().eval()
    plain = copy.deepcopy(own)
    plain.__class__ = type(plain.__class__.__name__, (nn.Module,), {"forward": build.forward})
    return plain, own, make_input()


@pytest.mark.parametrize(("method", "net"), SHARED)
def test_what_peft_has_saved_is_loaded(method: str, net: str, tmp_path: Path) -> None:
    plain, own, x = plain_and_own(net)
    with peft_may_warn(), torch.no_grad():
        theirs = peft.get_peft_model(plain, config(method, net, peft)).eval()
        values = random_like(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
        peft.set_peft_model_state_dict(theirs, values)
        theirs.save_pretrained(tmp_path)
        wanted = output(theirs, method, net, x)
    with torch.no_grad():
        assert own.load_adapter(tmp_path).ok
        close(own(x), wanted)


@pytest.mark.parametrize(("method", "net"), SHARED)
def test_what_is_saved_is_loaded_by_peft(method: str, net: str, tmp_path: Path) -> None:
    plain, own, x = plain_and_own(net)
    own.add_adapter(config(method, net, inlay), "style")
    disturb(own)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        own.save_adapter(tmp_path)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()  # it would warn of what is missing
        close(output(theirs, method, net, x), own(x))


# ---------------------------------------------------------------- beside transformers' mixin


class OwnLlama(inlay.AdapterMixin, LlamaForCausalLM):
    pass


class Both:
    """One base twice: with transformers' mixin on PEFT, and with inlay's."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.theirs = BUILDERS["llama"]().train()
        self.ours = copy.deepcopy(self.theirs)
        self.ours.__class__ = OwnLlama

    def each(self, act: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
        """``act(model, library)`` on both: what each returns or raises."""
        return self._done(act, self.theirs, peft), self._done(act, self.ours, inlay)

    @staticmethod
    def _done(act: Callable[[Any, Any], Any], model: Any, library: Any) -> Any:
        with peft_may_warn():
            try:
                return act(model, library)
            except Exception as error:
                return error

    def assert_alike(self, ids_BT: Tensor) -> None:
        """What users see of both: names, what is trained, tensors, outputs."""
        theirs, ours = self.theirs, self.ours
        assert ours._hf_peft_config_loaded == theirs._hf_peft_config_loaded
        assert list(ours.__dict__.get("peft_config", {})) == list(theirs.__dict__.get("peft_config", {}))
        if ours._hf_peft_config_loaded:
            assert ours.active_adapters() == theirs.active_adapters()
            assert _shapes(dict(ours.named_parameters())) == _shapes(dict(theirs.named_parameters()))
            for name in ours.peft_config:
                assert _shapes(ours.get_adapter_state_dict(name)) == _shapes(theirs.get_adapter_state_dict(name))
        assert ours.training == theirs.training
        assert _trained(ours) == _trained(theirs)
        with torch.no_grad():
            close(ours(ids_BT).logits, theirs(ids_BT).logits)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: t.shape for key, t in tensors.items()}


def _trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def lora(library: Any, *targets: str, **fields: Any) -> Any:
    fields = {"r": 2, "target_modules": list(targets or ("q_proj", "v_proj")), **fields}
    return library.LoraConfig(**fields)


Q = "model.layers.{}.self_attn.{}_proj.lora_{}.weight"


def tensors(r: int = 2) -> dict[str, Tensor]:
    shapes = {(i, k, f): (r, 32) if f == "A" else (32, r) for i in (0, 1) for k in "qv" for f in "AB"}
    like = BUILDERS["llama"]().model.layers[0].self_attn.v_proj.weight.shape[0]
    shapes = {key: (like, r) if key[1:] == ("v", "B") else shape for key, shape in shapes.items()}
    torch.manual_seed(r)
    return {Q.format(*key): torch.randn(shape) for key, shape in shapes.items()}


def load(name: str | None = None, r: int = 2, **more: Any) -> Callable[[Any, Any], Any]:
    def act(model: Any, library: Any) -> None:
        config = lora(library, r=r)
        model.load_adapter(adapter_name=name, peft_config=config, adapter_state_dict=tensors(r), **more)

    return act


#: (what is done in order, to both)
STORIES: dict[str, list[Callable[[Any, Any], Any]]] = {
    "nothing": [],
    "added": [lambda m, lib: m.add_adapter(lora(lib))],
    "added, of another kind beside": [
        load("style"),
        lambda m, lib: m.add_adapter(lib.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "tone"),
    ],
    "added with a head": [load("style"), lambda m, lib: m.add_adapter(lora(lib, modules_to_save=["lm_head"]), "tone")],
    "loaded": [load()],
    "loaded to be trained": [load(is_trainable=True)],
    "loaded beside one in training": [load("style", is_trainable=True), load("tone", r=3)],
    "set back": [load("style"), load("tone", r=3), lambda m, lib: m.set_adapter("style")],
    "both": [load("style"), load("tone", r=3), lambda m, lib: m.set_adapter(["tone", "style"])],
    "none": [load("style"), lambda m, lib: m.set_adapter([])],
    "off": [load("style"), lambda m, lib: m.disable_adapters()],
    "off and on": [load("style"), lambda m, lib: m.disable_adapters(), lambda m, lib: m.enable_adapters()],
    "off, another one set": [
        load("style"),
        load("tone", r=3),
        lambda m, lib: m.disable_adapters(),
        lambda m, lib: m.set_adapter("style"),
    ],
    "one deleted": [load("style"), load("tone", r=3), lambda m, lib: m.delete_adapter("style")],
    "the active one deleted": [load("style"), load("tone", r=3), lambda m, lib: m.delete_adapter("tone")],
    "all deleted": [load("style"), load("tone", r=3), lambda m, lib: m.delete_adapter(["style", "tone"])],
    "deleted and loaded again": [load("style"), lambda m, lib: m.delete_adapter("style"), load("style", r=3)],
}


@pytest.mark.parametrize("story", STORIES)
def test_same_story_ends_alike(story: str, tokens_BT: Tensor) -> None:
    both = Both()
    for act in STORIES[story]:
        assert both.each(act) == (None, None)
    both.assert_alike(tokens_BT)


#: what both refuse, and what they had before
REFUSED: dict[str, tuple[list[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]] = {
    "set_adapter without any": ([], lambda m, lib: m.set_adapter("style")),
    "disable_adapters without any": ([], lambda m, lib: m.disable_adapters()),
    "enable_adapters without any": ([], lambda m, lib: m.enable_adapters()),
    "active_adapters without any": ([], lambda m, lib: m.active_adapters()),
    "get_adapter_state_dict without any": ([], lambda m, lib: m.get_adapter_state_dict()),
    "delete_adapter without any": ([], lambda m, lib: m.delete_adapter("style")),
    "a dict as config": ([], lambda m, lib: m.add_adapter({"r": 2})),
    "a prompt": ([], lambda m, lib: m.add_adapter(lib.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))),
    "no such layer": ([], lambda m, lib: m.add_adapter(lora(lib, "zzz"))),
    "a name in use": ([load("style")], lambda m, lib: m.add_adapter(lora(lib), "style")),
    "a name in use, loaded": ([load("style")], load("style")),
    "an unknown one set": ([load("style")], lambda m, lib: m.set_adapter("tone")),
    "one of two unknown": ([load("style")], lambda m, lib: m.set_adapter(["style", "tone"])),
    "an unknown one deleted": ([load("style")], lambda m, lib: m.delete_adapter(["style", "tone"])),
    "tensors of an unknown one": ([load("style")], lambda m, lib: m.get_adapter_state_dict("tone")),
    "nothing to load": ([], lambda m, lib: m.load_adapter()),
    "tensors without a config": ([], lambda m, lib: m.load_adapter(adapter_state_dict=tensors())),
    "no such directory": ([], lambda m, lib: m.load_adapter("/no/such/directory")),
    "another shape": (
        [],
        lambda m, lib: m.load_adapter(peft_config=lora(lib, r=3), adapter_state_dict=tensors(2)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_same_is_refused_by_an_error_of_the_same_kind(case: str, tokens_BT: Tensor) -> None:
    before, act = REFUSED[case]
    both, untouched = Both(), Both()
    for step in before:
        assert both.each(step) == (None, None)
        untouched.each(step)
    theirs, ours = both.each(act)
    own = [kind for kind in type(theirs).__mro__ if not kind.__module__.startswith(("peft", "huggingface_hub"))]
    assert isinstance(ours, own[0]), (theirs, ours)
    assert isinstance(ours, inlay.PeftError)
    assert _trained(both.ours) == _trained(untouched.ours)
    assert both.ours.__dict__.keys() == untouched.ours.__dict__.keys()


#: transformers' arguments that have no meaning here, or are keywords of the hub's client
ELSEWHERE = {"load_adapter": {"hotswap", "local_files_only", "load_config"}}


@pytest.mark.parametrize("verb", [name for name in vars(PeftAdapterMixin) if not name.startswith("_")])
def test_verbs_have_the_names_and_arguments_of_transformers(verb: str) -> None:
    if verb in ("peft_config", "enable_peft_hotswap"):  # hot-swap is `inlay.hotswap_adapter`
        return
    theirs = inspect.signature(getattr(PeftAdapterMixin, verb)).parameters
    ours = inspect.signature(getattr(inlay.AdapterMixin, verb)).parameters
    assert not theirs.keys() - ours.keys() - ELSEWHERE.get(verb, set())
    for name in theirs.keys() & ours.keys():
        assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize("head", [False, True])
def test_each_loads_what_the_other_has_saved(tokens_BT: Tensor, tmp_path: Path, head: bool) -> None:
    made, here = Both(), Both()
    fields = {"modules_to_save": ["lm_head"]} if head else {}
    for model, library in ((made.theirs, peft), (made.ours, inlay)):
        with peft_may_warn():
            model.add_adapter(lora(library, init_lora_weights=False, **fields))
    with torch.no_grad():
        if head:
            made.theirs.lm_head.modules_to_save["default"].weight.mul_(2)
            made.ours.lm_head.modules_to_save["default"].weight.mul_(2)
        with peft_may_warn():
            made.theirs.save_pretrained(tmp_path / "theirs")
        made.ours.save_adapter(tmp_path / "adapter")
        made.ours.save_pretrained(tmp_path / "pretrained")  # transformers' own verb, on what this mixin keeps
        wanted, own = made.theirs.eval()(tokens_BT).logits, made.ours.eval()(tokens_BT).logits
        assert here.ours.load_adapter(tmp_path / "theirs").ok
        close(here.ours(tokens_BT).logits, wanted)
        for saved in ("adapter", "pretrained"):
            with peft_may_warn():
                there = Both().theirs
                there.load_adapter(str(tmp_path / saved), "style")
            close(there(tokens_BT).logits, own)
            again = Both().ours
            again.load_adapter(tmp_path / saved)
            close(again(tokens_BT).logits, own)
