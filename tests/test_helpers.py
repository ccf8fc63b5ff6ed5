"""The signature of a handle's ``forward`` and ``generate``. PEFT's helpers were run; they change its class for all."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.errors import ConfigError, MissingMethodError
from inlay.helpers import rescale_adapter_scale, update_forward_signature, update_generate_signature, update_signature


def handle_of(model: nn.Module, target: str) -> Any:
    return inlay.get_peft_model(model, inlay.LoraConfig(target_modules=[target])).eval()


@pytest.mark.parametrize(
    ("update", "changed"),
    [
        (update_forward_signature, ["forward"]),
        (update_generate_signature, ["generate"]),
        (update_signature, ["forward", "generate"]),
        (lambda model: update_signature(model, "forward"), ["forward"]),
        (lambda model: update_signature(model, "generate"), ["generate"]),
    ],
)
def test_signatures(llama: nn.Module, update: Callable[[Any], None], changed: list[str]) -> None:
    bare, handle = copy.deepcopy(llama), handle_of(llama, "q_proj")
    ids_BL = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before, text = handle(ids_BL).logits, handle.generate(ids_BL, max_new_tokens=3)
    update(handle)
    for name in ("forward", "generate"):
        found, other = getattr(handle, name), getattr(bare, name)
        assert (inspect.signature(found) == inspect.signature(other)) == (name in changed)
        assert (inspect.getdoc(found) == inspect.getdoc(other)) == (name in changed)
    for same in (handle, copy.deepcopy(handle)):
        with torch.no_grad():
            assert torch.equal(same(ids_BL).logits, before)
            assert torch.equal(same.generate(ids_BL, max_new_tokens=3), text)
            assert torch.equal(same(ids_BL, adapter_names=["__base__"]).logits, bare(ids_BL).logits)
    assert "adapter_names" in inspect.signature(type(handle).forward).parameters


def test_a_copy_calls_itself(llama: nn.Module) -> None:
    handle = handle_of(llama, "q_proj")
    update_signature(handle)
    copied = copy.deepcopy(handle)
    assert copied.forward.__self__ is copied


def test_what_cannot_be_is_refused() -> None:
    handle = handle_of(nn.Sequential(nn.Linear(3, 3)), "0")
    for update in (update_generate_signature, update_signature):
        with pytest.raises(MissingMethodError, match="Sequential"):
            update(handle)
    with pytest.raises(AttributeError):
        update_generate_signature(handle)
    with pytest.raises(ConfigError, match="method other is not supported"):
        update_signature(handle, "other")
    update_forward_signature(handle)
    assert list(inspect.signature(handle.forward).parameters) == ["input"]


def test_scales_that_were_read_stay_as_they_were(llama: nn.Module) -> None:
    handle = handle_of(llama, "q_proj")
    layer = next(m for m in handle.modules() if "q_proj" in getattr(m, "path", ""))
    before = layer.scaling
    with rescale_adapter_scale(handle, 0.5):
        assert before != layer.scaling == {"default": 0.5}
    assert before == layer.scaling == {"default": 1.0}
    before["default"] = 3.0
    assert layer.scaling == {"default": 3.0}
