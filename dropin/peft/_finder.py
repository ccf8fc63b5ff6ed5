"""Modules that exist as a line of `peft._surface`: found and imported like any other, filled name by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from peft import _surface
from peft._surface import LOOKED_UP, SURFACE

#: with a package's name behind it, the place on its ``__path__`` where its modules are
PLACE = "peft._surface:"


class Finder:
    """Finds the modules of one package, and makes them; without `importlib.abc`, which costs more than the rest."""

    def __init__(self, place: str) -> None:
        if not place.startswith(PLACE):
            raise ImportError(f"{place!r} is no place of these modules.")
        self.package = place.removeprefix(PLACE)

    def find_spec(self, name: str, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in SURFACE:
            return None
        spec = ModuleSpec(name, self, origin=_surface.__file__)  # type: ignore[arg-type]
        spec.has_location = True
        if below(name):
            spec.submodule_search_locations = [PLACE + name]
        return spec

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """What `pkgutil` asks: (name, whether it is a package) of each module here."""
        return ((prefix + name, bool(below(f"{self.package}.{name}"))) for name in below(self.package))

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(zip(("__getattr__", "__dir__", "__all__"), contents(module.__name__), strict=True))
        module.__doc__ = f"The names of ``{module.__name__}`` in PEFT 0.21.2."
        module.__class__ = Module


class Module(ModuleType):
    """A module of the table: what is set in it, or taken out again, is so where inlay looks it up too."""

    def __setattr__(self, name: str, value: Any) -> None:
        self._elsewhere(name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._elsewhere(name)

    def _elsewhere(self, name: str, *values: Any) -> None:
        if has(self.__name__, name):
            from peft._resolve import put

            put(self.__name__, name, *values)


def has(module: str, name: str) -> bool:
    """Whether PEFT's module has this name."""
    return name in SURFACE[module].split() or name in LOOKED_UP.get(module, ())


def below(package: str) -> list[str]:
    """Names of the modules right below one."""
    return [name.removeprefix(f"{package}.") for name in SURFACE if name.rpartition(".")[0] == package]


def contents(module: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a module of the table has instead of code: ``__getattr__``, ``__dir__`` and ``__all__``."""
    public = sorted(name for name in SURFACE[module].split() if not name.startswith("_"))

    def get(name: str) -> Any:
        if has(module, name):
            from peft._resolve import resolve

            value = resolve(module, name)
        elif f"{module}.{name}" in SURFACE:
            value = importlib.import_module(f"{module}.{name}")
        else:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return vars(sys.modules[module]).setdefault(name, value)

    return get, lambda: sorted({*public, *below(module), *vars(sys.modules[module])}), public


def open_package(module: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes the table's modules importable; returns the contents of the package itself."""
    if Finder not in sys.path_hooks:
        sys.path_hooks.append(Finder)
    package = sys.modules[module]
    package.__path__.append(PLACE + module)
    package.__class__ = Module
    return contents(module)
