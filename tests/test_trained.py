"""Modules trained whole by several adapters at once: the first one named runs and is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from by_hand import CRITIC, JUDGE, frozen
from laws import close, disturb, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inlay

BODY, HEAD = {"target_modules": ["body"]}, {"modules_to_save": ["head"]}
#: adapters of one model by name, in the order in which they are added
MODELS: dict[str, dict[str, Any]] = {
    "two LoRAs": {"a": inlay.LoraConfig(r=2, **BODY, **HEAD), "b": inlay.LoraConfig(r=3, **BODY, **HEAD)},
    "two methods": {"a": inlay.LoraConfig(r=2, **BODY, **HEAD), "b": inlay.LoHaConfig(r=2, **BODY, **HEAD)},
    "one without": {
        "c": inlay.LoraConfig(r=2, **BODY),
        "a": inlay.LoraConfig(r=2, **BODY, **HEAD),
        "b": inlay.LoraConfig(r=2, **BODY, **HEAD),
    },
}
CHOICES = (["a", "b"], ["b", "a"], ["c", "b", "a"], ["a", "c", "b"], ["b", "a", "c"], ["c", "b"], ["c"])
CASES = [(m, c) for m, adapters in MODELS.items() for c in CHOICES if set(c) <= set(adapters)]
cases = pytest.mark.parametrize(("adapters", "names"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.head(torch.tanh(self.body(x)))
        return h


def made(adapters: str) -> inlay.PeftModel:
    """Adapters that do something, copies of the head too; the first is active."""
    handle: Any = None
    for name, config in MODELS[adapters].items():
        if handle is None:
            handle = inlay.get_peft_model(Net(), copy.deepcopy(config), name, mixed=True)
        else:
            handle.add_adapter(name, copy.deepcopy(config))
    disturb(handle)
    with torch.no_grad():
        for copied in handle.base_model.model.head.modules_to_save.values():
            copied.weight.normal_()
    return handle.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def by_hand(model: inlay.PeftModel, names: Sequence[str], x: Tensor) -> Tensor:
    body, head = model.base_model.model.body, model.base_model.model.head
    W = body.base_layer.weight + sum(body.get_delta_weight(n) for n in names)
    copies = [head.modules_to_save[n] for n in names if n in ("a", "b")]
    last = copies[0] if copies else head.original_module
    h: Tensor = last(torch.tanh(nn.functional.linear(x, W, body.base_layer.bias)))
    return h


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6)


@cases
def test_the_first_runs(adapters: str, names: list[str], x: Tensor) -> None:
    model = made(adapters)
    expected = by_hand(model, names, x)
    with model.use_adapter(names):
        close(model(x), expected)
    model.set_adapter(names)
    close(model(x), expected)
    model.merge_adapter()
    close(model(x), expected)
    model.unmerge_adapter()
    close(copy.deepcopy(model).merge_and_unload()(x), expected)
    model.set_adapter(names[::-1])
    close(copy.deepcopy(model).merge_and_unload(adapter_names=names)(x), expected)


@cases
def test_the_first_is_trained(adapters: str, names: list[str], x: Tensor) -> None:
    model = made(adapters)
    head: Any = model.base_model.model.head
    first = next((n for n in names if n in "ab"), None)
    for before in ([*"ab"], [*"ba"], ["a"], ["b"]):
        model.set_adapter(before)
        model.set_adapter(names)
        model.zero_grad()
        model(x).square().sum().backward()
        trained = {k for k, p in model.named_parameters() if p.requires_grad}
        assert trained == {k for k, p in model.named_parameters() if p.grad is not None}
        heads = {n for n in head.modules_to_save if any(f".head.modules_to_save.{n}." in k for k in trained)}
        assert heads == {first} - {None}
        assert {n for n in model.peft_config if any(n in k.split(".") and ".body." in k for k in trained)} == set(
            names
        )
        assert not any("original_module" in k for k in trained)


def test_what_was_asked_to_be_trained_is_not_once_it_is_set_behind_another() -> None:
    model = made("two LoRAs")
    second: Any = model.base_model.model.head.modules_to_save["b"]  # type: ignore[union-attr, index]
    for ends in (lambda: model.set_adapter(["a", "b"]), model.base_model.disable_adapter_layers):
        model.set_requires_grad("b")
        assert second.weight.requires_grad
        ends()
        assert not second.weight.requires_grad


def test_attributes_are_the_firsts(x: Tensor) -> None:
    model = made("two LoRAs")
    head: Any = model.base_model.model.head
    for names in (["a", "b"], ["b", "a"]):
        model.set_adapter(names)
        assert head.weight is head.modules_to_save[names[0]].weight
        with model.use_adapter(names[::-1]):
            assert head.weight is head.modules_to_save[names[1]].weight
        with model.disable_adapter():
            assert head.weight is head.original_module.weight


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputed_in_the_order_that_it_was(reentrant: bool, x: Tensor) -> None:
    model = made("two LoRAs").train()
    x.requires_grad_()

    def gradients(recomputed: bool) -> dict[str, Tensor]:
        model.zero_grad()
        model.set_adapter(["a", "b"])
        model.set_requires_grad(["a", "b"])
        bound = model.bind(model)
        out = checkpoint(bound, x, use_reentrant=reentrant) if recomputed else model(x)
        model.set_adapter(["b", "a"])
        model.set_requires_grad(["a", "b"])
        out.square().sum().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    assert any(".head.modules_to_save.a." in k for k in found)
    assert not any(".head.modules_to_save.b." in k for k in found)
    for key in found:
        close(found[key], expected[key])


def test_compiled(x: Tensor) -> None:
    torch._dynamo.reset()
    model = made("one without")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for names in (["b", "a"], ["c", "a", "b"]):
            model.set_adapter(names)
            close(compiled(x), by_hand(model, names, x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "names", [["judge", "critic", "plain"], ["critic", "judge"], ["judge", "plain"]], ids="+".join
)
def test_activated_copies_serve_from_their_invocation_on(names: list[str]) -> None:
    """And before it the next one's."""
    tokens = {"judge": JUDGE, "critic": CRITIC, "plain": None}
    model: Any = None
    for name, invocation in tokens.items():
        config = inlay.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], alora_invocation_tokens=invocation
        )
        if model is None:
            model = inlay.get_peft_model(frozen("llama"), config, name)
        else:
            model.add_adapter(name, config)
    head = model.base_model.model.lm_head
    for i, copied in enumerate(head.modules_to_save.values()):  # LoRA's deltas are zero: the body is the base's
        nn.init.constant_(copied.weight, float(i + 1))
    ids = torch.randint(20, 64, (1, 14))
    starts = {"judge": 8, "critic": 4, "plain": 0}
    ids[0, 8 : 8 + len(JUDGE)], ids[0, 4 : 4 + len(CRITIC)] = torch.tensor(JUDGE), torch.tensor(CRITIC)
    base = frozen("llama")
    with torch.no_grad(), model.use_adapter(names):
        found = model.eval()(ids).logits[0]
        hidden = base.model(ids).last_hidden_state[0]
        for at in range(14):
            serving = next((n for n in names if at >= starts[n]), None)
            layer = base.lm_head if serving is None else head.modules_to_save[serving]
            close(found[at], layer(hidden[at]))
        if "plain" not in names:
            same_bits(found[:4], base(ids).logits[0, :4])


def test_in_a_model_of_someone_elses(x: Tensor) -> None:
    net: Any = Net()
    for name in ("a", "b"):
        inlay.inject_adapter_in_model(MODELS["two LoRAs"][name], net, name)
    for copied, value in zip(net.head.modules_to_save.values(), (1.0, 2.0), strict=True):
        nn.init.constant_(copied.bias, value)
        nn.init.zeros_(copied.weight)
    for names, value in ((["a", "b"], 1.0), (["b", "a"], 2.0)):
        for module in (net.body, net.head):
            module.set_adapter(names)
        assert torch.equal(net(x), torch.full((4, 3), value))
        assert [p.requires_grad for p in net.head.modules_to_save.parameters()] == [value == 1.0] * 2 + [
            value == 2.0
        ] * 2
    net.head.delete_adapter("b", new_active_adapters=["a"])
    assert torch.equal(net(x), torch.ones(4, 3))
    net.head.add("c")
    net.head.delete_adapter("a", new_active_adapters=["nobody", "c"])
    assert torch.equal(net(x), net.head.original_module(torch.tanh(net.body(x))))
    assert all(p.requires_grad for p in net.head.modules_to_save["c"].parameters())


def test_what_is_trained_beside_layers_names_its_adapter_as_in_peft(mlp: Any) -> None:
    fields = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    model = inlay.get_peft_model(mlp, inlay.LoraConfig(**fields), "a")
    model.add_adapter("b", inlay.LoraConfig(**fields))
    wrapper = model.base_model.model.lin1
    for names, told in (("a", "a"), (["a", "b"], ["a", "b"]), ([], [])):
        model.base_model.set_adapter(names)
        assert wrapper.active_adapter == wrapper._active_adapter == told
    assert (wrapper.adapter_layer_names, wrapper.other_param_names) == (("modules_to_save",), ())


def test_an_embedding_tells_which_tokens_are_trained() -> None:
    table = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    tokens = {"trainable_token_indices": {"0": [3, 1]}, "target_modules": ["1"]}
    wrapper = inlay.get_peft_model(table, inlay.LoraConfig(r=2, **tokens), "a").base_model.model[0]
    assert (wrapper.active_adapter, wrapper.active_adapters) == ("a", ["a"])
    assert wrapper.token_adapter.token_indices == {"a": [3, 1]}
    assert wrapper.adapter_layer_names == ("token_adapter.trainable_tokens_delta",)
