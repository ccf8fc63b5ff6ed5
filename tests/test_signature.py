"""The handle's forward shows the parameters of the model inside, and stays a method in every other respect."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import FunctionType, MethodType

import pytest
import torch
from torch import Tensor, nn

import inlay


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor, /, scale: float = 1.0, *, shift: float = 0.0, **rest: float) -> Tensor:
        out: Tensor = self.body(x) * scale + shift
        return out


@pytest.fixture
def model() -> inlay.PeftModel:
    return inlay.get_peft_model(Inside(), inlay.LoraConfig(target_modules=["body"], init_lora_weights=False))


def shown(of: object) -> list[str]:
    return list(inspect.signature(of).parameters)  # type: ignore[arg-type]


def test_a_handle_shows_its_model(model: inlay.PeftModel) -> None:
    signature = inspect.signature(model.forward)
    assert [n for n in signature.parameters if n != "alora_offsets"] == [
        "x",
        "scale",
        "adapter_names",
        "shift",
        "rest",
    ]
    assert [signature.parameters[n].kind.name for n in ("x", "adapter_names")] == ["POSITIONAL_ONLY", "KEYWORD_ONLY"]
    other = inlay.get_peft_model(nn.Sequential(nn.Linear(3, 3)), inlay.LoraConfig(target_modules=["0"]))
    assert shown(other.forward)[:2] == ["input", "adapter_names"]
    assert shown(model.forward)[0] == "x"


def test_a_class_shows_its_labels() -> None:
    assert {"labels", "adapter_names"} <= set(shown(inlay.PeftModelForCausalLM.forward))
    assert {"start_positions", "end_positions"} <= set(shown(inlay.PeftModelForQuestionAnswering.forward))
    assert "labels" not in shown(inlay.PeftModelForQuestionAnswering.forward)


def test_it_is_a_method_of_whoever_has_it(model: inlay.PeftModel) -> None:
    x = torch.randn(2, 3)
    others = [copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))]
    for one in (model, *others):
        assert isinstance(one.forward, MethodType)
        assert one.forward.__self__ is one
        assert isinstance(one.forward.__func__, FunctionType)
        assert torch.equal(one(x, 2.0, shift=1.0), model.get_base_model()(x, 2.0, shift=1.0))
        assert torch.equal(one(x, adapter_names=["__base__"] * 2), others[0].get_base_model().body.base_layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(model.forward))(x), model(x))


@torch.no_grad()
def test_compiled_with_hooks_and_without(model: inlay.PeftModel) -> None:
    x = torch.randn(2, 3)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    model.register_forward_hook(lambda _module, _args, out: out + 1)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected + 1)
    assert shown(model.forward)[0] == "x"


def test_a_model_whose_forward_cannot_be_inspected() -> None:
    class Odd(nn.Sequential):
        forward = 3  # type: ignore[assignment]

    odd = inlay.get_peft_model(Odd(nn.Linear(3, 3)), inlay.LoraConfig(target_modules=["0"]))
    assert "adapter_names" in shown(odd.forward)
