"""Imports point one way, and `import inlay` is light.

The table below is the architecture: a room may import itself, rooms of a lower rank, and rooms of its own rank as long
as that makes no circle. What stands under ``if TYPE_CHECKING:`` does not run and does not count; an import inside a
function does.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

#: room (a module or a package directly in inlay) -> its rank
RANKS = {
    # nothing of ours
    "errors": 0,
    "report": 0,
    "settings": 0,
    "signature": 0,
    # pure functions over strings and tensors
    "patterns": 1,
    "sources": 1,
    "combine": 1,
    "formats": 1,
    "inits": 1,
    "ops": 1,
    # what is wanted, and where
    "config": 2,
    "match": 2,
    # the three axes, and who is served
    "hooked": 3,
    "hooks": 3,
    "activation": 3,
    "layers": 3,
    "routing": 3,
    "storage": 3,
    "methods": 4,
    "prompts": 4,
    "invocation": 4,
    # wrapping
    "replicate": 3,
    "adapted": 5,
    "experts": 5,
    "leaves": 5,
    "memo": 5,
    "parametrized": 5,
    "trained": 5,
    "walk": 6,
    "works": 6,
    "inject": 6,
    "explanation": 8,
    "prepare": 6,
    "state": 7,
    "card": 7,
    "catalogue": 6,
    "inspect": 7,
    "lookup": 8,
    "hotswap": 8,
    "slots": 7,
    "refit": 8,
    "streams": 7,
    "session": 7,
    "status": 7,
    # the handle
    "auto": 8,
    "functional": 8,
    "helpers": 8,
    "mixin": 8,
    "model": 8,
    "tuner": 8,
    # the public names, resolved lazily; no room below goes through them
    "__init__": 9,
    # the edge
    "integrations": 10,
    "cli": 11,
    "__main__": 12,
}

#: rooms that import nothing of ours but these (and themselves)
LEAVES = {room: {"errors", "report"} for room in ("combine", "formats", "inits", "ops")}

#: rooms that nobody but these (and themselves) imports
EDGES = {"integrations": {"cli", "__main__"}, "cli": {"__main__"}}

#: (importing module, imported room) that is excused from the rules above; each needs its reason beside it
EXCUSED: set[tuple[str, str]] = {
    ("inlay.config", "prompts"),  # the same
    ("inlay.config", "methods"),  # inside `from_dict`: the file's peft_type picks the config's class
    ("inlay.sources", "integrations"),  # inside `locate`, `base_file`: the hub's client, where the id is no directory
    ("inlay.model", "integrations"),  # inside `push_to_hub` and `_present_names`
    ("inlay.mixin", "integrations"),  # inside `load_adapter`, where it is given a device map
}

#: modules that work on strings alone
WITHOUT_TORCH = ["match", "patterns"]

#: what `import inlay` must not load
HEAVY = ["transformers", "accelerate", "typer", "rich", "peft", "diffusers", "pandas", "huggingface_hub"]


# ---------------------------------------------------------------- reading the sources


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below ``node`` that can run."""
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            continue
        yield child
        yield from _running(child)


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of ours that ``source``, a module in ``package``, imports."""
    for node in _running(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "inlay")


def room_of(name: str) -> str:
    """The room a dotted name lies in: "inlay.ops.low_rank.apply" -> "ops"; the package's own names -> "__init__"."""
    first = name.split(".")[1] if "." in name else "__init__"
    return first if first in ROOMS | RANKS.keys() else "__init__"


PATHS = sorted((SRC / "inlay").rglob("*.py"))
ROOMS = {path.relative_to(SRC / "inlay").parts[0].removesuffix(".py") for path in PATHS}


@dataclass(frozen=True)
class Module:
    """A file of the package and the lines on which it imports others."""

    name: str
    room: str
    imports: list[tuple[int, str]]

    @classmethod
    def read(cls, path: Path) -> Module:
        parts = path.relative_to(SRC).with_suffix("").parts
        return cls(".".join(parts), parts[1], list(imported(path.read_text(), ".".join(parts[:-1]))))


MODULES = [Module.read(path) for path in PATHS]


def broken_rule(importer: str, target: str) -> str | None:
    """Why room ``importer`` may not import room ``target``, or None where it may."""
    if importer == target:
        return None
    if target in EDGES and importer not in EDGES[target]:
        return f"nothing but {sorted(EDGES[target])} imports {target}"
    if importer in LEAVES and target not in LEAVES[importer]:
        return f"{importer} imports nothing of ours but {sorted(LEAVES[importer])}"
    if {importer, target} <= RANKS.keys() and RANKS[target] > RANKS[importer]:
        return f"{importer} has rank {RANKS[importer]}, below {target} with {RANKS[target]}"
    return None


# ---------------------------------------------------------------- the rules hold


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_every_room_has_a_rank(room: str) -> None:
    assert room in RANKS, f"give {room} a row in RANKS: what does it stand on, and who stands on it?"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_imports_point_one_way(module: Module) -> None:
    breaches = [
        f"{module.name}, line {line}: imports {name}, but {why}"
        for line, name in module.imports
        if (module.name, room_of(name)) not in EXCUSED and (why := broken_rule(module.room, room_of(name)))
    ]
    assert not breaches, "\n".join(breaches)


def test_no_circle_among_rooms() -> None:
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        targets = {room_of(name) for _, name in module.imports}
        excused = {target for importer, target in EXCUSED if importer == module.name}
        graph.setdefault(module.room, set()).update(targets - {module.room} - excused)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


def test_no_excuse_is_stale() -> None:
    assert {(module.name, room_of(name)) for module in MODULES for _, name in module.imports} >= EXCUSED


# ---------------------------------------------------------------- the rules can be broken


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import inlay.model", {"model"}),
        ("from inlay.ops.low_rank import apply", {"ops"}),
        ("from inlay import routing", {"routing"}),
        ("from inlay import PeftModel", {"__init__"}),
        ("from . import layers", {"methods"}),
        ("from ..adapted import Adapted", {"adapted"}),
        ("from .. import config", {"config"}),
        ("def f():\n    from inlay.cli import main", {"cli"}),
        ("import importlib\nimportlib.import_module('inlay.integrations.hub')", {"integrations"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from inlay.model import PeftModel", set()),
        ("import torch\nfrom transformers import Trainer", set()),
    ],
)
def test_reader_sees_what_a_method_file_imports(source: str, rooms: set[str]) -> None:
    assert {room_of(name) for _, name in imported(source, "inlay.methods")} == rooms


@pytest.mark.parametrize(
    ("importer", "target", "why"),
    [
        ("inject", "model", "rank"),
        ("methods", "adapted", "rank"),
        ("model", "integrations", "nothing but"),
        ("integrations", "cli", "nothing but"),
        ("ops", "layers", "nothing of ours"),
        ("formats", "ops", "nothing of ours"),
        ("model", "__init__", "rank"),
    ],
)
def test_breach_is_named(importer: str, target: str, why: str) -> None:
    assert why in (broken_rule(importer, target) or "")


@pytest.mark.parametrize(
    ("importer", "target"),
    [("model", "inject"), ("inject", "match"), ("ops", "errors"), ("cli", "integrations"), ("cli", "__init__")],
)
def test_what_points_down_is_fine(importer: str, target: str) -> None:
    assert broken_rule(importer, target) is None


# ---------------------------------------------------------------- light at run time


def _loaded_after(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after ``code``."""
    show = "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code + show], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_inlay_is_light() -> None:
    loaded = _loaded_after("import inlay")
    assert "inlay" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_string_modules_load_no_torch(module: str) -> None:
    # The package's own __init__ may load torch, so the module is imported under an empty one.
    package = str(SRC / "inlay")
    code = f"import sys, types; p = types.ModuleType('inlay'); p.__path__ = [{package!r}]; sys.modules['inlay'] = p"
    loaded = _loaded_after(f"{code}\nimport inlay.{module}")
    assert "torch" not in loaded


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_there_to_be_loaded(package: str) -> None:
    # Otherwise the test above would pass by their absence.
    assert importlib.util.find_spec(package)
