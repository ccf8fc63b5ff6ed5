"""Real sentences with real classes that every Python carries: the docstrings of its standard library, by package."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# In the order of how much they write; those at the end stand in where a Python comes without one of the others.
CANDIDATES = (
    *("tkinter", "idlelib", "asyncio", "distutils", "email", "importlib", "lib2to3", "logging", "xml", "unittest"),
    *("multiprocessing", "http", "encodings", "urllib", "collections", "wsgiref", "xmlrpc", "concurrent", "ctypes"),
    *("pathlib", "json", "re", "turtledemo", "venv", "html", "curses", "zoneinfo", "dbm", "tomllib", "sqlite3"),
)
NOT_LIBRARY = frozenset({"test", "tests", "idle_test"})
LEAST_WORDS = 4
COMPARED = 40  # so many words at the beginning are compared: about what the model is shown
SAME = 0.8  # texts that share so much of their words count as one


@dataclass(frozen=True)
class Docstring:
    """A docstring and the top-level package that it stands in."""

    text: str
    package: str


def read_docstrings(root: Path, packages: Iterable[str] = CANDIDATES) -> list[Docstring]:
    """Every docstring of at least a few words in those of the packages that are found under ``root``, by parsing."""
    return [Docstring(text, package) for package in packages for text in _texts(root / package)]


def standard_library() -> Path:
    """Where the Python that runs this keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if not NOT_LIBRARY.isdisjoint(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # lib2to3 ships files in the grammar of Python 2
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text.split()) >= LEAST_WORDS:
                    yield text


def largest(found: Sequence[Docstring], n: int) -> list[Docstring]:
    """Those of the ``n`` packages with the most docstrings, in their order."""
    chosen = {package for package, _ in Counter(one.package for one in found).most_common(n)}
    return [one for one in found if one.package in chosen]


def distinct(found: Sequence[Docstring]) -> list[Docstring]:
    """Without texts that nearly repeat an earlier one, in any package.

    Two texts are the same where the words they share are at least `SAME` of the words of both; otherwise a model
    that remembers one would know the class of the other.

    Example:
        >>> texts = ["Return the first item.", "return the FIRST item", "Close the file and its buffers."]
        >>> [one.text for one in distinct([Docstring(text, "io") for text in texts])]
        ['Return the first item.', 'Close the file and its buffers.']
    """
    if not found:
        return []
    bags = [set(re.findall(r"[a-z]+", one.text.lower())[:COMPARED]) for one in found]
    counts = Counter(word for bag in bags for word in bag)
    # A word that only one text has is shared by no pair.
    vocabulary = {word: i for i, word in enumerate(word for word, count in counts.items() if count > 1)}
    has_NV = torch.zeros(len(found), len(vocabulary))
    for row, bag in enumerate(bags):
        has_NV[row, [vocabulary[word] for word in bag if word in vocabulary]] = 1.0
    shared_NN = has_NV @ has_NV.T
    size_N = torch.tensor([float(len(bag)) for bag in bags])
    both_NN = size_N[:, None] + size_N[None, :] - shared_NN
    repeats_N = (shared_NN >= SAME * both_NN).tril(diagonal=-1).any(dim=1)
    return [one for one, repeats in zip(found, repeats_N.tolist(), strict=True) if not repeats]


def sample(found: Sequence[Docstring], n: int, seed: int) -> list[Docstring]:
    """At most ``n`` of them, drawn at random, in a random order."""
    return random.Random(seed).sample(list(found), min(n, len(found)))
