"""The two libraries under one set of verbs, so that both are measured by the same code."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol, TypeVar

from torch import nn

T = TypeVar("T")


class Library(Protocol):
    """What a group of figures asks of an adapter library."""

    name: str

    def lora(self, **fields: Any) -> Any:
        """Its LoRA config with these fields."""

    def config(self, name: str, **fields: Any) -> Any:
        """Its config of this name, with these fields."""

    def adapt(self, model: nn.Module, config: Any, adapter: str = "default") -> Any:
        """The handle around `model`, with one adapter in it."""

    def explain(self, model: nn.Module, config: Any) -> Any:
        """What the config would do to `model`."""

    def insert(self, model: nn.Module, config: Any) -> nn.Module:
        """`model` itself with one adapter in it, and no handle around it."""

    def hotswap(self, handle: Any, folder: str, adapter: str) -> None:
        """Puts the adapter saved in `folder` in the place of a loaded one."""


class PeftLike:
    """A library that speaks PEFT's language, known by the name it is imported under.

    It is imported on first use, so that one that cannot be imported costs its own figures and no others.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.name)

    def lora(self, **fields: Any) -> Any:
        return self.config("LoraConfig", **fields)

    def config(self, name: str, **fields: Any) -> Any:
        return getattr(self.module, name)(**fields)

    def adapt(self, model: nn.Module, config: Any, adapter: str = "default") -> Any:
        return self.module.get_peft_model(model, config, adapter_name=adapter)

    def explain(self, model: nn.Module, config: Any) -> Any:
        return self.module.explain(model, config)

    def insert(self, model: nn.Module, config: Any) -> nn.Module:
        adapted: nn.Module = self.module.inject_adapter_in_model(config, model)
        return adapted

    def hotswap(self, handle: Any, folder: str, adapter: str) -> None:
        for name in (f"{self.name}.hotswap", f"{self.name}.utils.hotswap"):
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name).hotswap_adapter(handle, folder, adapter)
                return


def version_of(distribution: str) -> str:
    """The installed version, or what says that there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Setting:
    """What is held against what, and how much time it may take.

    Args:
        incumbent: The library that the figures are read beside.
        candidate: The library whose figures have goals.
        quick (`bool`): Smaller models and fewer repetitions: shows that everything runs, proves no goal.
    """

    incumbent: Library
    candidate: Library
    quick: bool = False

    def sides(self) -> Iterator[tuple[str, Library]]:
        """The two libraries under the names of their columns."""
        yield "incumbent", self.incumbent
        yield "candidate", self.candidate

    def both(self, build: Callable[[Library], T]) -> dict[str, Callable[[], T]]:
        """One builder per column, that `build`s for its library when it is called."""
        return {side: partial(build, library) for side, library in self.sides()}

    def pick(self, full: T, quick: T) -> T:
        """The size that belongs to this run."""
        return quick if self.quick else full
