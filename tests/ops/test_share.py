"""share: the input's gradient is the same sum, in one buffer, where nobody sees its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import disturb
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_full_backward_hook
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.ops import low_rank as module
from inlay.ops.dropout import draw_mask
from inlay.ops.low_rank import low_rank, share

INS, OUTS, R = 12, 10, 3


@pytest.fixture(autouse=True)
def _all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEW", 0)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that were shared."""
    shapes: list[torch.Size] = []

    def counting(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        shapes.append(x.shape)
        return share(x, *args)

    monkeypatch.setattr("inlay.methods._low_rank.share", counting)
    return shapes


def operands(leading: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(*leading, INS), (OUTS, INS), (R, INS), (OUTS, R)]
    return [torch.randn(shape, dtype=dtype, requires_grad=i != 1) for i, shape in enumerate(shapes)]


def layer(sharing: bool, mask: Tensor | None = None) -> Callable[..., Tensor]:
    def run(x: Tensor, W: Tensor, down: Tensor, up: Tensor) -> Tensor:
        middle = None
        if sharing:
            x, middle = share(x, down, mask)
        h = F.linear(x, W)
        return low_rank(x, h, down, up, 2.0, 0.25 if mask is not None else 0.0, mask=mask, middle=middle)

    return run


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], order: int = 1) -> list[Tensor]:
    wanted = [t for t in tensors if t.requires_grad]
    out = function(*tensors)
    found = torch.autograd.grad(out.square().sum(), wanted, create_graph=order > 1)
    if order > 1:
        found = torch.autograd.grad(sum(t.square().sum() for t in found), wanted)
    return [out, *found]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 2, 2)], ids=str)
def test_the_gradients_are_the_same(leading: tuple[int, ...], dropped: bool, order: int) -> None:
    tensors = operands(leading)
    mask = draw_mask(tensors[0].shape, 0.25) if dropped else None
    apart, together = (gradients(layer(sharing, mask), tensors, order) for sharing in (False, True))
    for expected, found in zip(apart, together, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("run", ["autocast", "checkpoint", "a gradient that is no block", "a bf16 base"])
def test_the_gradients_are_the_same_in(run: str) -> None:
    dtype = torch.bfloat16 if run == "a bf16 base" else torch.float32
    tensors = operands((2, 6), dtype)
    tensors[2:] = [t.detach().float().requires_grad_() for t in tensors[2:]]

    def way(sharing: bool) -> Callable[..., Tensor]:
        function = layer(sharing)
        if run == "checkpoint":
            return lambda *args: checkpoint(function, *args, use_reentrant=False)
        if run == "a gradient that is no block":
            return lambda *args: function(*args).transpose(0, 1)[::2]
        return function

    with torch.autocast("cpu", torch.bfloat16, enabled=run == "autocast"):
        apart, together = (gradients(way(sharing), tensors) for sharing in (False, True))
    tolerance = 1e-6 if run in ("checkpoint", "a gradient that is no block") else 2e-2
    for expected, found in zip(apart, together, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_what_nothing_comes_back_to_is_none() -> None:
    x, _, down, _ = operands()
    x2, _ = share(x, down)
    (g,) = torch.autograd.grad(x2.sum(), x)
    assert torch.equal(g, torch.ones_like(x))


CONFIGS = {
    "LoRA": inlay.LoraConfig(r=R, target_modules=["0"], init_lora_weights=False),
    "dropout": inlay.LoraConfig(r=R, target_modules=["0"], init_lora_weights=False, lora_dropout=0.25),
    "DoRA": inlay.LoraConfig(r=R, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "AdaLoRA": inlay.AdaLoraConfig(init_r=R, target_r=R, target_modules=["0"], total_step=10),
}


def adapted(name: str) -> inlay.PeftModel:
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(INS, OUTS)), CONFIGS[name])
    disturb(model)
    return model.train()


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_share(name: str, shared: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(name), torch.randn(2, 5, INS, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = []
    for few in (0, 1 << 17):
        monkeypatch.setattr(module, "_FEW", few)
        torch.manual_seed(0)
        found.append(torch.autograd.grad(model(x).square().sum(), wanted, allow_unused=True))
    assert shared == [x.shape]
    if name != "dropout":  # of a few elements, torch draws which to drop
        for together, apart in zip(*found, strict=True):
            torch.testing.assert_close(together, apart)


def test_no_gradient_is_wanted_of_the_first_input(shared: list[torch.Size]) -> None:
    adapted("LoRA")(torch.randn(2, 5, INS)).sum().backward()
    assert not shared


@pytest.mark.parametrize("hook", ["pre", "full backward", "every module's"])
def test_who_sees_the_layers_own_gradient_sees_it_unchanged(hook: str, shared: list[torch.Size]) -> None:
    model, x = adapted("LoRA"), torch.randn(2, 5, INS, requires_grad=True)
    base = model.base_model.model[0].base_layer
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if module is base:
            seen.append(inputs[0])

    def watch(module: nn.Module, inputs: Any) -> None:
        inputs[0].register_hook(seen.append)

    if hook == "pre":
        handle = base.register_forward_pre_hook(watch)
        x = x * 1  # so that the hook's tensor is one of the graph
    elif hook == "full backward":
        handle = base.register_full_backward_hook(keep)
    else:
        handle = register_module_full_backward_hook(keep)
    try:
        model(x).sum().backward()
    finally:
        handle.remove()
    assert not shared
    if hook != "pre":
        torch.testing.assert_close(seen[0], torch.ones(2, 5, OUTS) @ base.weight)
