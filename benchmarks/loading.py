"""Loading an adapter, and what each verb costs when many are loaded."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.library import Library, Setting
from benchmarks.models import lora_fields, narrow_llama
from benchmarks.report import Entry, Figure, Goal, figure
from benchmarks.timing import Contestant, Race

MANY = 33


def measure(setting: Setting) -> Iterator[Figure]:
    layers = setting.pick(32, 8)
    with tempfile.TemporaryDirectory() as folder:
        setting.incumbent.adapt(narrow_llama(layers), setting.incumbent.lora(**lora_fields())).save_pretrained(folder)
        # Loading 33 into the incumbent takes most of a minute: the same handle serves all figures.
        full = functools.cache(lambda library: holding(library, layers, folder, MANY))
        yield from load_figures(setting, layers, folder, full)
        yield from verb_figures(setting, folder, full)
        yield from swap_figures(setting, layers, folder)


def holding(library: Library, layers: int, folder: str, adapters: int) -> Any:
    """A handle with `adapters` adapters, "a0" and so on, all but the first read from `folder`."""
    handle = library.adapt(narrow_llama(layers), library.lora(**lora_fields()), "a0")
    for index in range(1, adapters):
        handle.load_adapter(folder, adapter_name=f"a{index}")
    return handle


def load_figures(setting: Setting, layers: int, folder: str, full: Any) -> Iterator[Figure]:
    def second(library: Library) -> Contestant:
        handle = holding(library, layers, folder, 1)
        return Contestant(
            lambda: handle.load_adapter(folder, adapter_name="a1"), after=lambda: handle.delete_adapter("a1")
        )

    def last(library: Library) -> Contestant:
        handle, name = full(library), f"a{MANY - 1}"
        return Contestant(
            lambda: handle.load_adapter(folder, adapter_name=name), before=lambda: handle.delete_adapter(name)
        )

    builders = {"read": lambda: Contestant(lambda: read(Path(folder)))}
    builders |= setting.both(second)
    builders |= {f"{side} last": build for side, build in setting.both(last).items()}
    outcomes = Race(builders).run(seconds=setting.pick(15, 3), pays_gc=True)
    yield figure(f"load_adapter, {7 * layers} linears, over reading the file", outcomes, Goal(5), base="read")
    yield Figure(
        f"the same as the {MANY}rd adapter, over the 2nd",
        incumbent=Entry(outcomes["incumbent last"], outcomes["incumbent"]),
        candidate=Entry(outcomes["candidate last"], outcomes["candidate"]),
        goal=Goal(1.2),
    )


def swap_figures(setting: Setting, layers: int, folder: str) -> Iterator[Figure]:
    def swap(library: Library) -> Contestant:
        handle = holding(library, layers, folder, 1)
        return Contestant(lambda: library.hotswap(handle, folder, "a0"))

    builders = {"read": lambda: Contestant(lambda: read(Path(folder))), **setting.both(swap)}
    outcomes = Race(builders).run(seconds=setting.pick(8, 2), pays_gc=True)
    yield figure(
        f"hotswap of {7 * layers} linears, over reading and cloning the file", outcomes, Goal(1.5), base="read"
    )


def read(folder: Path) -> object:
    """The least that loading has to do: read the file and take the tensors out of it."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


def verb_figures(setting: Setting, folder: str, full: Any) -> Iterator[Figure]:
    def set_adapter(library: Library) -> Contestant:
        handle = full(library)
        return Contestant(lambda: handle.set_adapter("a1"), before=lambda: handle.set_adapter("a0"))

    def disable_adapter(library: Library) -> Contestant:
        handle = full(library)
        return Contestant(lambda: enter_and_leave(handle))

    def delete_adapter(library: Library) -> Contestant:
        handle, name = full(library), f"a{MANY - 1}"
        return Contestant(
            lambda: handle.delete_adapter(name), after=lambda: handle.load_adapter(folder, adapter_name=name)
        )

    for verb in (set_adapter, disable_adapter, delete_adapter):
        outcomes = Race(setting.both(verb)).run(seconds=setting.pick(3, 1), pays_gc=True)
        yield figure(f"{verb.__name__} with {MANY} loaded", outcomes, Goal(10, "incumbent"))


def enter_and_leave(handle: Any) -> None:
    with handle.disable_adapter():
        pass
