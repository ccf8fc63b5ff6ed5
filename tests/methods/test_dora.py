"""DoRA where an output sees a part of the input alone: a convolution with groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import close
from torch import Tensor, nn

import inlay
from inlay.errors import PeftWarning

GROUPS, INS, OUTS, R = 3, 6, 9, 6
KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Conv1d": (nn.Conv1d, (7,)),
    "Conv2d": (nn.Conv2d, (5, 4)),
    "Conv3d": (nn.Conv3d, (4, 3, 3)),
}


def whole(t: Tensor, groups: int) -> Tensor:
    """A grouped filter or factor as one over all channels: zero beyond its group."""
    rows, columns = t.shape[0] // groups, t.shape[1]
    out = torch.zeros(t.shape[0], columns * groups, *t.shape[2:], dtype=t.dtype)
    for g in range(groups):
        at = slice(g * rows, (g + 1) * rows)
        out[at, g * columns : (g + 1) * columns] = t[at]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("offsets", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=["plain", "rslora"])
def test_groups_are_a_filter_that_is_zero_elsewhere(kind: str, training: bool, offsets: dict[str, Any]) -> None:
    make, size = KINDS[kind]
    grouped, dense = make(INS, OUTS, 3, padding=1, groups=GROUPS), make(INS, OUTS, 3, padding=1)
    dense.weight.data.copy_(whole(grouped.weight.data, GROUPS))
    dense.bias.data.copy_(grouped.bias.data)
    config = {"r": R, "target_modules": ["0"], "use_dora": True, **offsets}
    layers = []
    for layer in (grouped, dense):
        model = inlay.get_peft_model(nn.Sequential(layer.double()), inlay.LoraConfig(**config)).train(training)
        layers.append(model.base_model.model[0])
    ours, same = layers
    for slot in ("lora_A", "lora_B", "lora_magnitude_vector"):
        t = getattr(ours, slot)["default"].weight
        t.data.add_(torch.randn_like(t))
        other = t if slot != "lora_B" else whole(t.detach(), GROUPS)
        getattr(same, slot)["default"].weight.data.copy_(other)
    x = torch.randn(2, INS, *size, dtype=torch.float64)
    outputs = [layer(x) for layer in layers]
    close(outputs[0], outputs[1])
    direction = torch.randn_like(outputs[0])
    for slot in ("lora_A", "lora_B", "lora_magnitude_vector"):
        tensors = [getattr(layer, slot)["default"].weight for layer in layers]
        found, wanted = (
            torch.autograd.grad(out, t, direction, retain_graph=True)[0]
            for out, t in zip(outputs, tensors, strict=True)
        )
        if slot == "lora_B":
            wanted = wanted * whole(torch.ones_like(found), GROUPS)
            found = whole(found, GROUPS)
        close(found, wanted)


def test_a_low_rank_adapter_on_groups_says_that_it_cannot_merge() -> None:
    with pytest.warns(PeftWarning, match="Merging is not supported"):
        inlay.get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), inlay.LoraConfig(r=2, target_modules=["0"]))
