"""Nothing that this library says is the incumbent's sentence, in errors, warnings, docstrings or comments."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = 8  # words in a row that two people do not write by chance


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string and comment; words on both sides of a value in braces are no row."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [
                "\0" if isinstance(part, ast.FormattedValue) else str(ast.literal_eval(part)) for part in node.values
            ]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, re.sub(r"(?m)^ *(>>>|\.\.\.).*", "", node.value)  # examples are code
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def runs(text: str) -> Iterator[tuple[str, ...]]:
    for part in text.lower().split("\0"):
        words = re.findall(r"[a-z_]+", part)
        yield from zip(*(words[i:] for i in range(RUN)), strict=False)


def test_no_sentence_is_the_incumbents() -> None:
    spec = find_spec("peft")
    if spec is None or spec.origin is None or ROOT in Path(spec.origin).parents:
        pytest.skip("the incumbent is not installed")
    theirs = {run for path in Path(spec.origin).parent.rglob("*.py") for _, text in texts(path) for run in runs(text)}
    assert len(theirs) > 10_000
    ours = [p for room in ("src", "dropin") for p in (ROOT / room).rglob("*.py")]
    shared = {
        f"{path.relative_to(ROOT)}:{line}: {' '.join(run)}"
        for path in ours
        for line, text in texts(path)
        for run in runs(text)
        if run in theirs
    }
    assert not shared, "\n".join(sorted(shared))
