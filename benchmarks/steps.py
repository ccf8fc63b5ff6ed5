"""A training step, forward and backward, over the frozen base's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floors import LoraFloor, swap
from benchmarks.library import Library, Setting
from benchmarks.models import TOKENS, embeds, fill, llama, lora_fields
from benchmarks.report import Figure, Goal, figure
from benchmarks.timing import Builder, Contestant, Outcome, Race

DROPOUT = {"lora_dropout": 0.1}
DORA = {"use_dora": True}


def measure(setting: Setting) -> Iterator[Figure]:
    fp32 = steps(setting, torch.float32, {"": {}, " dropout": DROPOUT, " dora": DORA}, floor=True)
    bf16 = steps(setting, torch.bfloat16, {"": {}, " dropout": DROPOUT}, floor=False)
    yield figure("step over the base: fp32", fp32, Goal(1.03, "floor"), base="base", floor="floor")
    yield figure("step over the base: bf16", bf16, Goal(1.20), base="base")
    yield figure("step over the base: DoRA fp32", fp32, Goal(1.22), base="base", suffix=" dora")
    yield figure("step over the base: dropout 0.1, fp32", fp32, Goal(1.20), base="base", suffix=" dropout")
    yield figure("step over the base: dropout 0.1, bf16", bf16, Goal(1.35), base="base", suffix=" dropout")


def steps(
    setting: Setting, dtype: torch.dtype, variants: dict[str, dict[str, Any]], *, floor: bool
) -> dict[str, Outcome]:
    """Base, floor and every variant of both libraries, taking turns."""
    layers = setting.pick(8, 2)
    builders: dict[str, Builder] = {"base": lambda: step(llama(layers, dtype), dtype)}
    if floor:
        builders["floor"] = lambda: step(swap(llama(layers, dtype), LoraFloor), dtype)
    for suffix, fields in variants.items():
        for side, build in setting.both(adapted(layers, dtype, fields)).items():
            builders[side + suffix] = build
    # Dropout draws its own zeros and DoRA is another function: only plain LoRA has one right answer here.
    alike = [name for name in ("incumbent", "floor", "candidate") if name in builders]
    race = Race(builders, alike=alike, tolerance=1e-4 if dtype is torch.float32 else 3e-2)
    return race.run(seconds=setting.pick(45, 5), least=3)


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
