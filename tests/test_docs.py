"""The pages: their Python runs, in order, page by page; their links lead somewhere; the site lists them all."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
# A block that needs a hub or a long run says so in its title, where readers see it too.
NOT_RUN = 'title="not run"'
# Pages whose Python is not run here: why.
ELSEWHERE = {
    "add-a-method.md": "its code is examples/ssf.py, which test_add_a_method.py runs",
    "explain.md": "its doctests are run by test_explanation.py",
    "train.md": "its Python trains on a model from the hub",
}
_FENCE = re.compile(r"^(?P<fence>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


class Block(NamedTuple):
    """One fenced block: its language and attributes, its text, and the line where the text begins."""

    language: str
    attributes: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(page):
        language, _, attributes = match["info"].strip().partition(" ")
        found.append(Block(language, attributes, match["body"], page.count("\n", 0, match.start("body")) + 1))
    return found


def python_of(path: Path) -> list[Block]:
    return [b for b in blocks(path.read_text()) if b.language == "python"]


def run_block(block: Block, path: Path, names: dict[str, object]) -> None:
    """Runs a script or, where it begins with a prompt, a doctest; errors point at the line of the page."""
    if block.text.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.text, names, path.name, str(path), block.line - 1)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.DocTestRunner(optionflags=flags).run(test, clear_globs=False).failed == 0
        names.update(test.globs)
        return
    exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), names)


def anchors(path: Path) -> set[str]:
    """Ids of a page's headings, as both mkdocs and code hosts make them of plain words."""
    text = _FENCE.sub("", path.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


RUN = [p for p in PAGES if p.name not in ELSEWHERE]


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.bnb if p.name == "quantised.md" else (), id=p.name) for p in RUN],
)
def test_python_of_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in python_of(path):
        if NOT_RUN not in block.attributes:
            run_block(block, path, names)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_python_of_page_compiles(path: Path) -> None:
    for block in python_of(path):
        if not block.text.lstrip().startswith(">>>"):
            compile("\n" * (block.line - 1) + block.text, str(path), "exec")


@pytest.mark.parametrize(
    "name", ["README.md", *(f"docs/{p}.md" for p in ("index", "lora", "adapters", "merging", "files"))]
)
def test_guide_has_python_that_runs(name: str) -> None:
    assert any(NOT_RUN not in b.attributes for b in python_of(ROOT / name))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in (match["target"] for match in _LINK.finditer(_FENCE.sub("", path.read_text()))):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        assert to.is_file(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(to), f"{path.name} links to {target}: no such heading"


def test_site_lists_every_page() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        assert not isinstance(children, (int, float, type(None)))
        return [page for child in children for page in pages(child)]  # type: ignore[attr-defined]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(nav)) == sorted(p.name for p in DOCS.glob("*.md"))


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("```python\na = 1\n```\n", [("python", "", "a = 1\n", 2)]),
        ('x\n\n```python title="not run"\nb\n```\ny\n', [("python", NOT_RUN, "b\n", 4)]),
        ("```sh\nmake\n```\n```\nplain\n```\n", [("sh", "", "make\n", 2), ("", "", "plain\n", 5)]),
        ("    ```python\n", []),
    ],
)
def test_blocks_are_found(page: str, expected: list[tuple[str, str, str, int]]) -> None:
    assert [tuple(b) for b in blocks(page)] == expected


@pytest.mark.parametrize("text", ["raise ValueError\n", ">>> 1 + 1\n3\n"])
def test_failing_block_fails(text: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, AssertionError)):
        run_block(Block("python", "", text, 1), tmp_path / "page.md", {})
