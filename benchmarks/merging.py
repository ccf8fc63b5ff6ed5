"""Merging and unmerging a whole model, over the two products that it cannot do without."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.library import Library, Setting
from benchmarks.models import RANK, SCALE, factor, fill, linears, llama, lora_fields
from benchmarks.report import Figure, Goal, figure
from benchmarks.timing import Contestant, Race


def measure(setting: Setting) -> Iterator[Figure]:
    layers = setting.pick(8, 2)

    def build(library: Library) -> Contestant:
        handle = library.adapt(llama(layers), library.lora(**lora_fields()))
        fill(handle)

        def run() -> None:
            handle.merge_adapter()
            handle.unmerge_adapter()

        return Contestant(run)

    race = Race({"bare": lambda: bare(layers), **setting.both(build)})
    outcomes = race.run(seconds=setting.pick(8, 1), least=5)
    yield figure("merge and unmerge, over two bare addmm_ per linear", outcomes, Goal(1.3), base="bare")


def bare(layers: int) -> Contestant:
    """``W += s B A`` and back, in place, for the same shapes."""
    model = llama(layers)
    triples = [
        (
            layer.weight,
            factor(path, "lora_B", "default", (layer.out_features, RANK)),
            factor(path, "lora_A", "default", (RANK, layer.in_features)),
        )
        for path, layer in linears(model)
    ]

    @torch.no_grad()
    def run() -> None:
        for sign in (SCALE, -SCALE):
            for weight_OI, up_OR, down_RI in triples:
                weight_OI.addmm_(up_OR, down_RI, alpha=sign)

    return Contestant(run)
