"""Modules that exist as a line of `peft._surface`: imported like any other, filled name by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from peft._surface import SURFACE


class Finder:
    """Finds the modules of the table, and makes them; without `importlib.abc`, which costs more than all the rest."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in SURFACE:
            return None
        package = any(other.startswith(f"{name}.") for other in SURFACE)
        return ModuleSpec(name, self, is_package=package)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        names = f"The names of ``{module.__name__}`` in PEFT 0.21.2."
        module.__dict__.update(zip(("__getattr__", "__dir__", "__all__"), contents(module.__name__), strict=True))
        module.__doc__ = names


def contents(module: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a module of the table has instead of code: ``__getattr__``, ``__dir__`` and ``__all__``."""
    public = sorted(name for name in SURFACE[module].split() if not name.startswith("_"))
    below = [other.removeprefix(f"{module}.") for other in SURFACE if other.rpartition(".")[0] == module]

    def get(name: str) -> Any:
        if name in SURFACE[module].split():
            from peft._resolve import resolve

            value = resolve(module, name)
        elif f"{module}.{name}" in SURFACE:
            value = importlib.import_module(f"{module}.{name}")
        else:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        setattr(sys.modules[module], name, value)
        return value

    return get, lambda: sorted({*public, *below, *vars(sys.modules[module])}), public


def open_package(module: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes the table's modules importable; returns the contents of the package itself."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
    return contents(module)
