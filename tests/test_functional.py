"""What is trained beside the layers of a model that someone else owns; which adapters are to be merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import disturb
from torch import nn

import inlay
from inlay import functional
from inlay.errors import FieldTypeError, NoMatchingPeftModuleError, PeftWarning, PlanError, UnsupportedLayerError
from inlay.trained import ModulesToSaveWrapper, TrainableTokensWrapper


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.first, self.second = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.several = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(self.emb(x)))
        return y


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def own(*parts: str) -> set[str]:
    return {name for name in trained(Net()) if not name.startswith(parts)}


@pytest.mark.parametrize(("inference_mode", "active"), [(False, True), (True, True), (False, False)])
def test_a_module_is_trained_whole(inference_mode: bool, active: bool) -> None:
    model = Net()
    found = functional.set_trainable(model, "a", ["second"], inference_mode, activate_adapter=active)
    assert found == [model.second]
    assert isinstance(model.second, ModulesToSaveWrapper)
    copies = {"second.modules_to_save.a.weight", "second.modules_to_save.a.bias"}
    assert trained(model) == own("second") | (copies if active and not inference_mode else set())
    assert model.second.active_adapters == (["a"] if active else [])


def test_tokens_are_trained() -> None:
    model = Net()
    how: dict[str, Any] = {"wrapper_cls": TrainableTokensWrapper, "token_indices": [1, 2]}
    assert functional.set_trainable(model, "a", ["emb"], False, **how) == [model.emb]
    assert trained(model) == own("emb") | {"emb.token_adapter.trainable_tokens_delta.a"}


def test_what_a_config_names_is_trained_beside_the_layers() -> None:
    model = Net()
    config = inlay.LoraConfig(modules_to_save=["second"], trainable_token_indices={"emb": [1]})
    functional.set_additional_trainable_modules(model, config, {}, "a")
    assert isinstance(model.emb, TrainableTokensWrapper)
    assert isinstance(model.second, ModulesToSaveWrapper)
    assert type(model.first) is nn.Linear
    assert config.target_modules is None


def test_one_of_several_is_chosen() -> None:
    model = inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["first"]), Net(), "a")
    layer = {"first.lora_A.a.weight", "first.lora_B.a.weight"}
    for name in ("a", "b"):
        functional.set_trainable(model, name, ["second"], False, activate_adapter=name == "a")
    functional.set_beside(model, "b")
    assert trained(model) == layer | {"second.modules_to_save.b.weight", "second.modules_to_save.b.bias"}
    functional.set_beside(model, "a", inference_mode=True)
    assert trained(model) == layer


def test_modules_that_are_not_there_or_cannot_be_copied() -> None:
    model = Net()
    assert functional.set_trainable(model, "a", ["nothing"], False) == []
    assert functional.set_trainable(model, "a", None, False) == []
    with pytest.raises(NoMatchingPeftModuleError, match="nothing"):
        functional.set_trainable(model, "a", ["second", "nothing"], False, strict_module_check=True)
    with pytest.raises(UnsupportedLayerError, match="ModuleList"):
        functional.set_trainable(model, "a", ["several"], False)
    with pytest.raises(PlanError, match="no module"):
        functional.set_trainable(model, "a", ["nothing"], False, wrapper_cls=TrainableTokensWrapper, token_indices=[1])
    assert trained(model) == own()
    assert type(model.second) is nn.Linear


def test_adapters_that_are_left_to_be_merged() -> None:
    handle = inlay.get_peft_model(Net(), inlay.LoraConfig(target_modules=["first"]), "a")
    handle.add_adapter("b", inlay.LoraConfig(target_modules=["first"]))
    disturb(handle)
    layer: Any = handle.base_model.model.first
    assert functional.check_adapters_to_merge(layer) == ["a"]
    assert functional.check_adapters_to_merge(layer, ["b", "a"]) == ["b", "a"]
    layer.merge()
    for names, left, told in (
        (None, [], "All adapters are already merged"),
        (["a", "b"], ["b"], "merged are"),
        (["b"], ["b"], "merged"),
    ):
        with pytest.warns(PeftWarning, match=told):
            assert functional.check_adapters_to_merge(layer, names) == left
    with pytest.raises(FieldTypeError, match="list of names"):
        functional.check_adapters_to_merge(layer, "a")
