"""A training step, forward and backward, over the frozen base's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floors import DoraFloor, DropoutFloor, LoraFloor, swap
from benchmarks.library import Library, Setting
from benchmarks.models import TOKENS, embeds, fill, llama, lora_fields
from benchmarks.report import Figure, Goal, figure
from benchmarks.timing import Builder, Contestant, Outcome, Race

DROPOUT = {"lora_dropout": 0.1}
DORA = {"use_dora": True}
FLOORS = {"": LoraFloor, " dropout": DropoutFloor, " dora": DoraFloor}


BUDGET = (
    240.0  # seconds for a warm-up and three rounds of one dtype; where they take longer, the model has fewer layers
)


def measure(setting: Setting) -> Iterator[Figure]:
    fp32, less = steps(setting, torch.float32, {"": {}, " dropout": DROPOUT, " dora": DORA})
    bf16, lesser = steps(setting, torch.bfloat16, {"": {}, " dropout": DROPOUT})
    yield figure(f"step over the base: fp32{less}", fp32, Goal(1.03, "floor"), base="base", floor="floor")
    yield figure(f"step over the base: bf16{lesser}", bf16, Goal(1.20), base="base", floor="floor")
    yield figure(
        f"step over the base: DoRA fp32{less}", fp32, Goal(1.22), base="base", floor="floor dora", suffix=" dora"
    )
    yield figure(
        f"step over the base: dropout 0.1, fp32{less}",
        fp32,
        Goal(1.20),
        base="base",
        floor="floor dropout",
        suffix=" dropout",
    )
    yield figure(
        f"step over the base: dropout 0.1, bf16{lesser}",
        bf16,
        Goal(1.35),
        base="base",
        floor="floor dropout",
        suffix=" dropout",
    )


def steps(setting: Setting, dtype: torch.dtype, variants: dict[str, dict[str, Any]]) -> tuple[dict[str, Outcome], str]:
    """Base, floor and every variant of both libraries, taking turns; and what to say of a smaller model."""
    wanted = setting.pick(8, 2)
    layers = fitting(wanted, dtype, contestants=1 + 3 * len(variants))
    builders: dict[str, Builder] = {"base": lambda: step(llama(layers, dtype), dtype)}
    for suffix, fields in variants.items():
        builders["floor" + suffix] = lambda layer=FLOORS[suffix]: step(swap(llama(layers, dtype), layer), dtype)  # type: ignore[misc]
        for side, build in setting.both(adapted(layers, dtype, fields)).items():
            builders[side + suffix] = build
    # Dropout draws its own zeros and DoRA is another function: only plain LoRA has one right answer here.
    alike = [name for name in ("incumbent", "floor", "candidate") if name in builders]
    race = Race(builders, alike=alike, tolerance=1e-4 if dtype is torch.float32 else 3e-2)
    return race.run(seconds=setting.pick(45, 5), least=3), "" if layers == wanted else f", {layers} of {wanted} layers"


def fitting(layers: int, dtype: torch.dtype, contestants: int) -> int:
    """As many of ``layers`` as the budget lasts for, going by one layer's step: processors without bf16 emulate it."""
    one = step(llama(1, dtype), dtype)
    seconds = min(one.once()[0] for _ in range(2)) * contestants * 1.5 * 4
    while layers > 1 and seconds * layers > BUDGET:
        layers //= 2
    return layers


def adapted(layers: int, dtype: torch.dtype, fields: dict[str, Any]) -> Callable[[Library], Contestant]:
    def build(library: Library) -> Contestant:
        handle = library.adapt(llama(layers, dtype), library.lora(**lora_fields(**fields)))
        fill(handle)
        return step(handle, dtype)

    return build


def step(model: nn.Module, dtype: torch.dtype) -> Contestant:
    """Forward and backward over 1,024 tokens, with gradients to the input and to what is trainable."""
    model.train()
    x_BTI = embeds(1, TOKENS, dtype, grad=True)
    gradient = embeds(1, TOKENS, dtype)
    trained = [x_BTI, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def clear() -> None:
        for tensor in trained:
            tensor.grad = None

    def run() -> Tensor | None:
        model(inputs_embeds=x_BTI).last_hidden_state.backward(gradient)
        return x_BTI.grad

    return Contestant(run, before=clear)
