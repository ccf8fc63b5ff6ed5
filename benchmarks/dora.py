"""DoRA on one linear at one token, over LoRA on the same linear in the same library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.library import Library, Setting
from benchmarks.models import ALPHA, RANK, embeds, fill
from benchmarks.report import Entry, Figure, Goal
from benchmarks.timing import Builder, Contestant, Race

WIDTH = 2048


def measure(setting: Setting) -> Iterator[Figure]:
    builders: dict[str, Builder] = {}
    for side, library in setting.sides():
        builders[f"{side} lora"] = partial(one_linear, library, use_dora=False)
        builders[f"{side} dora"] = partial(one_linear, library, use_dora=True)
    race = Race(builders, alike=["incumbent dora", "candidate dora"])
    outcomes = race.run(seconds=setting.pick(6, 1), least=5)
    yield Figure(
        f"DoRA, one token, one linear d={WIDTH}, over LoRA",
        incumbent=Entry(outcomes["incumbent dora"], outcomes["incumbent lora"]),
        candidate=Entry(outcomes["candidate dora"], outcomes["candidate lora"]),
        goal=Goal(2),
    )


def one_linear(library: Library, *, use_dora: bool) -> Contestant:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    config = library.lora(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=use_dora)
    model = library.insert(base, config)
    fill(model)
    model.eval()
    x_BI = embeds(1, 1, width=WIDTH)[0]

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(x_BI)
        return out

    return Contestant(run)
