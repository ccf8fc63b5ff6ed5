"""Merging and unmerging, over the two products that it cannot do without: in one layer, and through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.library import Library, Setting
from benchmarks.models import RANK, SCALE, factor, fill, linears, llama, lora_fields
from benchmarks.report import Figure, Goal, figure
from benchmarks.timing import Contestant, Outcome, Race

WIDTH = 1024


def measure(setting: Setting) -> Iterator[Figure]:
    layers = setting.pick(8, 2)
    one = race(setting, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)), ["0"])
    name = f"merge and unmerge one linear d={WIDTH}, over two bare addmm_"
    yield figure(name, one, Goal(1.3), base="bare", floor="floor")
    # Here every weight comes from memory, not from the cache, and that is most of what the products take.
    whole = race(setting, lambda: llama(layers), "all-linear")
    yield figure(f"the same, a Llama of {layers} layers", whole, Goal(1.3), base="bare", floor="floor")


def race(setting: Setting, model: Callable[[], nn.Module], targets: list[str] | str) -> dict[str, Outcome]:
    """The bare products and both libraries on models of the same shapes."""

    def build(library: Library) -> Contestant:
        handle = library.adapt(model(), library.lora(**lora_fields(target_modules=targets)))
        fill(handle)

        def run() -> None:
            handle.merge_adapter()
            handle.unmerge_adapter()

        return Contestant(run)

    contestants = Race({"bare": lambda: bare(model()), "floor": lambda: exact(model()), **setting.both(build)})
    return contestants.run(seconds=setting.pick(6, 1), least=5)


def bare(model: nn.Module) -> Contestant:
    """``W += s B A`` and back, in place, for every linear."""
    found = products(model)

    @torch.no_grad()
    def run() -> None:
        for sign in (SCALE, -SCALE):
            for weight_OI, up_OR, down_RI in found:
                weight_OI.addmm_(up_OR, down_RI, alpha=sign)

    return Contestant(run)


def exact(model: nn.Module) -> Contestant:
    """What gives every bit back: ``W + s B A`` in memory of its own takes the place of each weight, and goes again."""
    found = products(model)
    room = [torch.empty_like(weight_OI) for weight_OI, _, _ in found]

    @torch.no_grad()
    def run() -> None:
        kept = [weight_OI.data for weight_OI, _, _ in found]
        for (weight_OI, up_OR, down_RI), sum_OI in zip(found, room, strict=True):
            weight_OI.data = torch.addmm(weight_OI, up_OR, down_RI, alpha=SCALE, out=sum_OI)
        for (weight_OI, _, _), kept_OI in zip(found, kept, strict=True):
            weight_OI.data = kept_OI

    return Contestant(run)


def products(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(W_OI, up_OR, down_RI) of every linear."""
    return [
        (
            layer.weight,
            factor(path, "lora_B", "default", (layer.out_features, RANK)),
            factor(path, "lora_A", "default", (RANK, layer.in_features)),
        )
        for path, layer in linears(model)
    ]
