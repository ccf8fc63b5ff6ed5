"""``python -m benchmarks [--only NAME] [--quick] [--json FILE]``: measures, and prints one table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import dora, imports, injection, loading, memory, merging, methods, rows, session, steps
from benchmarks.library import PeftLike, Setting, version_of
from benchmarks.report import Figure, record, table

GROUPS: dict[str, Callable[[Setting], Iterable[Figure]]] = {
    "imports": imports.measure,
    "injection": injection.measure,
    "loading": loading.measure,
    "memory": memory.measure,
    "steps": steps.measure,
    "rows": rows.measure,
    "session": session.measure,
    "dora": dora.measure,
    "merging": merging.measure,
    "methods": methods.measure,
}
VERSIONS = ("torch", "transformers", "safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of two libraries at once; the tests are where warnings are errors
    setting = Setting(PeftLike(options.incumbent), PeftLike(options.candidate), options.quick)
    found = run(options.only or list(GROUPS), setting)
    print(heading(setting))
    figures = [one for group in found.values() for one in group]
    print(table(figures, incumbent=setting.incumbent.name, candidate=setting.candidate.name))
    if options.json:
        options.json.write_text(json.dumps(raw(found, setting), indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="inlay beside the incumbent, in one run")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="this group of figures; may be repeated")
    parser.add_argument(
        "--quick", action="store_true", help="smaller and shorter: shows that all runs, proves no goal"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers here")
    parser.add_argument("--candidate", default="inlay", help="module to measure (default: inlay)")
    parser.add_argument("--incumbent", default="peft", help="module to measure it beside (default: peft)")
    return parser.parse_args(arguments)


def run(names: Sequence[str], setting: Setting) -> dict[str, list[Figure]]:
    """The groups one after another, each on a clean heap."""
    found = {}
    for name in names:
        start = time.perf_counter()
        print(f"{name} ...", end=" ", flush=True, file=sys.stderr)
        found[name] = list(GROUPS[name](setting))
        gc.collect()
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return found


def versions(setting: Setting) -> dict[str, str]:
    names = [*VERSIONS, setting.incumbent.name, setting.candidate.name]
    return {"python": platform.python_version(), **{name: version_of(name) for name in names}}


def heading(setting: Setting) -> str:
    stack = ", ".join(f"{name} {version}" for name, version in versions(setting).items())
    kind = "quick run, sizes reduced: proves no goal" if setting.quick else "full run"
    return f"{stack}; one thread; {kind}\n"


def raw(found: dict[str, list[Figure]], setting: Setting) -> dict[str, object]:
    return {
        "versions": versions(setting),
        "machine": {"processor": platform.processor(), "system": platform.platform(), "threads": 1},
        "quick": setting.quick,
        "figures": [record(group, one) for group, figures in found.items() for one in figures],
    }


if __name__ == "__main__":
    main()
