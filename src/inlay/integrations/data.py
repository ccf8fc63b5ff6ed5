"""Examples from a local file: reading, checking, and holding a part of them out."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from inlay.errors import ConfigError, MissingFileError, nearest
from inlay.integrations.train_config import DataSection, TrainConfig, raise_all

SHOWN = 3  # so many offending rows are named in one complaint


@dataclass(frozen=True)
class Example:
    """One row of a file; ``index`` counts from 0 and stays what it was through the split."""

    index: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """What there is to learn from and to be judged on."""

    train: list[Example]
    held_out: list[Example]  # the part that is never trained on
    labels: list[str]  # all classes, sorted; empty for language modelling
    repeated: int  # held-out rows whose input also stands in the training part (0 for a split made here)


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where}: not valid JSON ({error.msg}); expected one object a line") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: found a {type(row).__name__}; expected an object like {{...}}")
            rows.append(row)
    return rows


def _read_table(path: Path) -> list[dict[str, Any]]:
    import pandas

    # Everything stays text: a class called "NA" or "007" must not become a missing value or a 7.
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    frame = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    return cast(list[dict[str, Any]], frame.to_dict(orient="records"))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    # Not by way of pandas: there lists become arrays, and whole numbers beside an empty cell floats.
    return cast(list[dict[str, Any]], pyarrow.parquet.read_table(path).to_pylist())


READERS = {".jsonl": _read_json_lines, ".csv": _read_table, ".tsv": _read_table, ".parquet": _read_parquet}


def read_examples(path: str | Path) -> list[Example]:
    """All rows of a .jsonl, .csv, .tsv or .parquet file; a `ConfigError` where it is not what its ending says."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no data file {path}; expected a local file ({', '.join(READERS)})")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"cannot read {path}: its ending is none of {', '.join(READERS)}")
    try:
        rows = reader(path)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:  # what the parsers of pandas and pyarrow raise
        raise ConfigError(f"cannot read {path} as {path.suffix}: {' '.join(str(error).split())}") from error
    return [Example(index, row) for index, row in enumerate(rows)]


def columns(task: str, data: DataSection) -> dict[str, str]:
    """The columns that a task reads: key of the config -> name in the file."""
    keys = {
        "causal-lm": ["text", *(["target"] if data.target else [])],
        "seq2seq": ["text", "target"],
        "sequence-classification": ["text", *(["text_pair"] if data.text_pair else []), "label"],
        "token-classification": ["tokens", "tags"],
    }[task]
    return {key: getattr(data, key) or "" for key in keys}


INPUTS = ("text", "text_pair", "tokens")  # the others are answers


def words(value: Any) -> list[str]:
    """A cell with several words or tags: a list, a JSON list as text, or words between blanks.

    Example:
        >>> words('["New", "York"]'), words("B I"), words([3, 1])
        (['New', 'York'], ['B', 'I'], ['3', '1'])
    """
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            with contextlib.suppress(json.JSONDecodeError):
                return [str(one) for one in json.loads(value)]
        return value.split()
    return [str(one) for one in value]


def load_examples(config: TrainConfig) -> Examples:
    """Read, check and split what ``config.data`` names; a `ConfigError` has every complaint about rows at once."""
    data, task = config.data, config.task
    rows = read_examples(data.path)
    others = read_examples(data.held_out_path) if data.held_out_path else []
    wanted = columns(task, data)
    complaints = [
        f"data.{key}: missing; {task} needs the name of a column" for key, name in wanted.items() if not name
    ]
    for path, part in ((data.path, rows), (data.held_out_path, others)):
        if path:
            complaints += _complaints({key: name for key, name in wanted.items() if name}, path, part)
    raise_all(complaints)
    if data.max_rows is not None and data.max_rows < len(rows):
        rows = sorted(random.Random(config.training.seed).sample(rows, data.max_rows), key=lambda row: row.index)
    labels = _labels(task, data, [*rows, *others])
    if data.held_out_path:
        seen = {_input(task, data, row) for row in rows}
        repeated = sum(_input(task, data, row) in seen for row in others)
        return Examples(rows, others, labels, repeated)
    train, held_out = split(rows, lambda row: _input(task, data, row), data.held_out_fraction, config.training.seed)
    if not train or not held_out:
        raise ConfigError(
            f"{data.path}: {len(rows)} rows cannot be split by held_out_fraction {data.held_out_fraction} into two"
            " parts with different inputs; give more rows or a file as data.held_out_path"
        )
    return Examples(train, held_out, labels, repeated=0)


def split(
    rows: list[Example], key: Callable[[Example], str], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out about ``fraction`` of the rows; those with equal keys fall on one side, both in the file's order.

    Example:
        >>> rows = [Example(i, {"text": t}) for i, t in enumerate("aabbccdd")]
        >>> train, held_out = split(rows, lambda row: row.values["text"], 0.25, seed=0)
        >>> [row.index for row in held_out]
        [4, 5]
    """
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    wanted = max(1, round(fraction * len(rows)))
    held_out: set[int] = set()
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out.update(row.index for row in group)
    return [r for r in rows if r.index not in held_out], [r for r in rows if r.index in held_out]


def _labels(task: str, data: DataSection, rows: Iterable[Example]) -> list[str]:
    """The classes that the rows name; none for language modelling."""
    found: set[str] = set()
    if task == "sequence-classification":
        found = {str(row.values[data.label]) for row in rows}
    elif task == "token-classification":
        found = {tag for row in rows for tag in words(row.values[data.tags])}
    # Classes that are numbers keep their order: 2 before 10.
    return sorted(found, key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label))


def _input(task: str, data: DataSection, row: Example) -> str:
    """What the model is shown, apart from its spelling: the same input must not be on both sides of a split."""
    keys = [key for key in columns(task, data) if key in INPUTS]
    return "\n".join(" ".join(words(row.values[getattr(data, key)])).lower() for key in keys)


def load_inputs(task: str, data: DataSection, path: str | Path) -> list[Example]:
    """The rows of another file, to predict on; its answers may be there or not. Complaints as in `load_examples`."""
    rows = read_examples(path)
    wanted = {key: name for key, name in columns(task, data).items() if key in INPUTS}
    raise_all(list(_complaints(wanted, str(path), rows)))
    return rows


def _complaints(wanted: dict[str, str], path: str, rows: list[Example]) -> Iterator[str]:
    """What is wrong with the rows of one file, in words; ``wanted`` as `columns` gives it."""
    if not rows:
        yield f"{path}: no rows"
        return
    names = list(dict.fromkeys(name for row in rows[:100] for name in row.values))
    absent = {key: name for key, name in wanted.items() if name not in names}
    for key, name in absent.items():
        yield f"{path}: no column {name!r} (data.{key}){nearest(name, names)}; the file has {', '.join(names)}"
    if absent:
        return
    for key, name in wanted.items():
        if bad := [row for row in rows if not _filled(key, row.values.get(name))]:
            yield f"{path}: {_named(bad)} without a usable {name!r} (data.{key})"
    if "tokens" in wanted and "tags" in wanted:
        tokens, tags = wanted["tokens"], wanted["tags"]
        if uneven := [row for row in rows if not _even(row.values.get(tokens), row.values.get(tags))]:
            yield f"{path}: {_named(uneven)} with another number of {tags!r} than of {tokens!r}"


def _filled(key: str, value: Any) -> bool:
    if key in ("tokens", "tags"):
        return value is not None and not isinstance(value, (int, float)) and len(words(value)) > 0
    if key == "label":
        # A float class is a regression target or a number that a missing value turned into one.
        return isinstance(value, (str, int)) and str(value).strip() != ""
    return isinstance(value, str) and value.strip() != ""


def _even(tokens: Any, tags: Any) -> bool:
    return not _filled("tokens", tokens) or not _filled("tags", tags) or len(words(tokens)) == len(words(tags))


def _named(rows: list[Example]) -> str:
    shown = ", ".join(str(row.index) for row in rows[:SHOWN])
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more} (counted from 0)"
