"""Every method on one linear: forward and backward of eight rows, over the incumbent's same method."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.library import Library, Setting
from benchmarks.models import embeds, factor
from benchmarks.report import Figure, Goal, figure
from benchmarks.timing import Contestant, Race
from inlay.methods import METHODS

WIDTH = 2048
ROWS = 8


def measure(setting: Setting) -> Iterator[Figure]:
    for name, method in METHODS.items():
        if "Linear" not in method.kinds:
            continue
        build = partial(one_linear, config=method.config.__name__, fields=method.config.example)
        race = Race(setting.both(build), alike=["incumbent", "candidate"])
        outcomes = race.run(seconds=setting.pick(4, 0.5), least=5)
        yield figure(f"{name}, one linear d={WIDTH}, {ROWS} rows", outcomes, Goal(1.05), base="incumbent")


def one_linear(library: Library, *, config: str, fields: dict[str, object]) -> Contestant:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    model = library.insert(base, library.config(config, target_modules=["0"], **fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(factor(name, "", "", parameter.shape))
    model.train()
    x_BI = embeds(ROWS, 1, width=WIDTH)[:, 0].requires_grad_()

    def run() -> Tensor:
        x_BI.grad = None
        out: Tensor = model(x_BI)
        out.sum().backward()
        assert x_BI.grad is not None
        return x_BI.grad

    return Contestant(run)
