"""The protocol of training hooks, on a method made for the test: what is called, when, and with what."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.hooks import Served, TrainingHooks
from inlay.methods import METHODS, Method
from inlay.methods.lora import LoraAdapter, LoraConfig


class Model(nn.Module):
    """A model that returns its loss in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: bool = True) -> Any:
        h = self.b(self.a(x))
        return {"loss": (h**2).mean()} if labels else (h,)


@dataclass
class HookedConfig(LoraConfig):
    method: ClassVar[str] = "IA3"  # a name that is a PeftType


class Hooks(TrainingHooks):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.steps: list[tuple[int, list[str]]] = []
        self.total = 0

    def begin(self, total_steps: int) -> None:
        self.total = total_steps

    def loss(self, layers: Sequence[Served]) -> Tensor | None:
        return torch.stack([p["down"].norm() for _, _, p in layers]).sum() * self.config.r

    def step(self, layers: Sequence[Served], global_step: int) -> None:
        assert all(t.grad is not None for _, _, p in layers for t in p.values())
        self.steps.append((global_step, [path for path, _, _ in layers]))

    def state(self, layers: Sequence[Served]) -> dict[str, Tensor]:
        return {"seen": torch.tensor(len(self.steps))}

    def load_state(self, layers: Sequence[Served], tensors: Mapping[str, Tensor]) -> None:
        self.total = int(tensors["seen"])


@pytest.fixture(autouse=True)
def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method(HookedConfig, LoraAdapter, "lora_", frozenset({"Linear"}), {}, Hooks)
    monkeypatch.setitem(METHODS, "IA3", row)


def make() -> inlay.PeftModel:
    torch.manual_seed(0)
    model = inlay.get_peft_model(Model(), HookedConfig(r=2, target_modules=["a", "b"]), adapter_name="one")
    model.add_adapter("two", HookedConfig(r=3, target_modules=["b"]))
    return model.train()


X = torch.ones(4, 3)


def extra(model: inlay.PeftModel, **kwargs: Any) -> float:
    """How much the loss of a call is above the model's own."""
    loss = model(X, **kwargs)["loss"]
    with torch.no_grad():
        return float(loss.detach() - model(X, **kwargs)["loss"])


def _norms(model: inlay.PeftModel, name: str) -> float:
    return sum(float(p.detach().norm()) for n, p in model.named_parameters() if f"lora_A.{name}." in n)


def test_the_loss_has_the_terms_of_the_adapters_that_run() -> None:
    model = make()
    assert extra(model) == pytest.approx(2 * _norms(model, "one"), rel=1e-5)
    model.set_requires_grad(["one", "two"])
    with model.use_adapter("two"):
        assert extra(model) == pytest.approx(3 * _norms(model, "two"), rel=1e-5)
    both = 2 * _norms(model, "one") + 3 * _norms(model, "two")
    assert extra(model, adapter_names=["one", "__base__", "two", "one"]) == pytest.approx(both, rel=1e-5)
    model.set_adapter(["one", "two"])
    assert extra(model) == pytest.approx(both, rel=1e-5)
    assert torch.equal(model.base_model(X)["loss"], model(X)["loss"])


def test_nothing_is_added_where_nothing_is_trained() -> None:
    model = make()
    with model.disable_adapter():
        assert extra(model, adapter_names=None) == 0
    assert extra(model.eval()) == 0
    model.train()
    assert isinstance(model(X, labels=False), tuple)
    model.set_requires_grad("one", False)
    model.get_base_model().a.base_layer.weight.requires_grad_(True)  # the loss has a gradient all the same
    assert extra(model) == 0


def test_steps_reach_the_layers_of_every_trained_adapter() -> None:
    model = make()
    model(X)["loss"].backward()
    model.update_and_allocate(1)
    hooks: Any = model.base_model.hooks
    assert hooks["one"].steps == [(1, ["a", "b"])]
    assert hooks["two"].steps == []
    model.set_requires_grad(["one", "two"])
    model(X, adapter_names=["one", "one", "two", "two"])["loss"].backward()
    model.base_model.update_and_allocate(2)
    assert hooks["one"].steps[1:] == [(2, ["a", "b"])]
    assert hooks["two"].steps == [(2, ["b"])]


def test_state_goes_to_the_adapter_it_came_from() -> None:
    model, other = make(), make()
    model(X)["loss"].backward()
    model.update_and_allocate(1)
    state = model.base_model.training_state()
    assert {key: int(t) for key, t in state.items()} == {"one.seen": 1}
    other.base_model.load_training_state(state)
    assert other.base_model.hooks["one"].total == 1  # type: ignore[attr-defined]
    other.base_model.begin_training(7)
    assert [hooks.total for hooks in other.base_model.hooks.values()] == [7, 7]  # type: ignore[attr-defined]


def test_hooks_come_and_go_with_the_adapter() -> None:
    model = make()
    model(X)["loss"].backward()
    model.update_and_allocate(1)
    twin = copy.deepcopy(model)
    model.set_adapter("two")
    model.delete_adapter("one")
    assert list(model.base_model.hooks) == ["two"]
    model.add_adapter("one", HookedConfig(r=2, target_modules=["a"]))
    model.set_adapter("one")
    model(X)["loss"].backward()
    model.update_and_allocate(5)
    assert model.base_model.hooks["one"].steps == [(5, ["a"])]  # type: ignore[attr-defined]
    twin(X)["loss"].backward()
    twin.update_and_allocate(2)
    assert twin.base_model.hooks["one"].steps == [(1, ["a", "b"]), (2, ["a", "b"])]  # type: ignore[attr-defined]
    model.unload()
    assert not model.base_model.hooks


def test_compiled_calls_add_the_term_too() -> None:
    model = make()
    expected = float(model(X)["loss"].detach())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert float(compiled(X)["loss"].detach()) == pytest.approx(expected, rel=1e-5)
