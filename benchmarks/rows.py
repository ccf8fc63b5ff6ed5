"""Inference: sixteen adapters in one batch, and one adapter for all of it, at one token and more."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.floors import LoraFloor, StackedFloor, swap
from benchmarks.library import Library, Setting
from benchmarks.models import embeds, fill, llama, lora_fields
from benchmarks.report import Figure, Goal, figure
from benchmarks.timing import Builder, Contestant, Race

NAMES = [f"a{index}" for index in range(16)]


def measure(setting: Setting) -> Iterator[Figure]:
    layers = setting.pick(8, 2)
    for tokens in (1, 32):
        outcomes = Race(mixed(setting, layers, tokens), alike=["incumbent", "floor", "candidate"]).run(
            seconds=setting.pick(8, 1), least=5
        )
        name = f"16 adapters in a batch of 16, {tokens} token{'s' if tokens > 1 else ''}, over the base"
        yield figure(name, outcomes, Goal(1.10, "floor"), base="base", floor="floor")
    outcomes = Race(single(setting, layers), alike=["incumbent", "floor", "candidate"]).run(
        seconds=setting.pick(8, 1), least=5
    )
    name = "one adapter, 16 rows of 1 token, over the base"
    yield figure(name, outcomes, Goal(1.05, "floor"), base="base", floor="floor")


def mixed(setting: Setting, layers: int, tokens: int) -> dict[str, Builder]:
    """Every row has its own adapter."""

    def build(library: Library) -> Contestant:
        handle = library.adapt(llama(layers), library.lora(**lora_fields()), NAMES[0])
        for name in NAMES[1:]:
            handle.add_adapter(name, library.lora(**lora_fields()))
        fill(handle)
        return infer(handle, tokens, adapter_names=NAMES)

    return {
        "base": lambda: infer(llama(layers), tokens),
        "floor": lambda: infer(swap(llama(layers), lambda path, layer: StackedFloor(path, layer, NAMES)), tokens),
        **setting.both(build),
    }


def single(setting: Setting, layers: int) -> dict[str, Builder]:
    """All rows have the same adapter, and there is no other."""

    def build(library: Library) -> Contestant:
        handle = library.adapt(llama(layers), library.lora(**lora_fields()))
        fill(handle)
        return infer(handle, tokens=1)

    return {
        "base": lambda: infer(llama(layers), tokens=1),
        "floor": lambda: infer(swap(llama(layers), LoraFloor), tokens=1),
        **setting.both(build),
    }


def infer(model: nn.Module, tokens: int, **extra: list[str]) -> Contestant:
    """A forward of 16 rows without gradients."""
    model.eval()
    x_BTI = embeds(len(NAMES), tokens)

    def run() -> Tensor:
        with torch.no_grad():
            hidden: Tensor = model(inputs_embeds=x_BTI, **extra).last_hidden_state
        return hidden

    return Contestant(run)
