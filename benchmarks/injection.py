"""Injecting LoRA into very many linears on the meta device, and whether the time grows as their number does."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from benchmarks.library import Library, Setting
from benchmarks.models import LINEARS_PER_EXPERT_LAYER, Experts
from benchmarks.report import Entry, Figure, Goal, figure
from benchmarks.timing import Contestant, Measured, Missing, Outcome, Race

TARGETS = ["gate_proj", "up_proj", "down_proj"]


class Injection:
    """Adapts a fresh model at every run; building it and throwing it away are not timed."""

    def __init__(self, library: Library, layers: int) -> None:
        self.library = library
        self.layers = layers
        self.alive: list[nn.Module] = []
        library.adapt(Experts(layers=1), library.lora(target_modules=TARGETS))  # whatever is done the first time only

    def build(self) -> None:
        self.alive = [Experts(self.layers)]

    def run(self) -> None:
        self.alive.append(self.library.adapt(self.alive[0], self.library.lora(target_modules=TARGETS)))

    def drop(self) -> None:
        self.alive.clear()

    def contestant(self, at_most: int) -> Contestant:
        return Contestant(self.run, before=self.build, after=self.drop, at_most=at_most)


def measure(setting: Setting) -> Iterator[Figure]:
    largest = setting.pick(48, 8)
    outcomes = {layers: inject(setting, layers) for layers in (largest, largest // 2, largest // 4)}
    for layers, race in outcomes.items():
        goal = Goal(10, "incumbent") if layers == largest else None
        yield figure(f"inject LoRA into {count(layers)} linears on meta", race, goal)
    few, many = outcomes[largest // 4], outcomes[largest]
    yield Figure(
        f"the same, {count(largest)} over 4 x {count(largest // 4)}",
        incumbent=Entry(many["incumbent"], times(4, few["incumbent"])),
        candidate=Entry(many["candidate"], times(4, few["candidate"])),
        goal=Goal(1.25),
    )
    race = Race({"candidate": lambda: explaining(setting.candidate, largest)}, warm=False)
    yield Figure(
        f"explain {count(largest)} linears on meta",
        incumbent=Entry(Missing("the incumbent has no such function")),
        candidate=Entry(race.run(seconds=0, least=3, pays_gc=True)["candidate"]),
        goal=Goal(2, "value"),
    )


def explaining(library: Library, layers: int) -> Contestant:
    model = Experts(layers)
    return Contestant(lambda: library.explain(model, library.lora(target_modules=TARGETS)), at_most=3)


def inject(setting: Setting, layers: int) -> dict[str, Outcome]:
    """Both libraries at one size; the incumbent once, for it takes a millisecond per linear."""
    race = Race(
        {
            "incumbent": lambda: Injection(setting.incumbent, layers).contestant(at_most=1),
            "candidate": lambda: Injection(setting.candidate, layers).contestant(at_most=3),
        },
        warm=False,
    )
    return race.run(seconds=0, least=3, pays_gc=True)


def count(layers: int) -> str:
    return f"{layers * LINEARS_PER_EXPERT_LAYER:,}"


def times(factor: int, outcome: Outcome) -> Outcome:
    if isinstance(outcome, Measured):
        return Measured(tuple(factor * sample for sample in outcome.samples))
    return outcome
