"""What importing the library costs, over importing torch: each import in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.library import Setting
from benchmarks.report import Figure, Goal, figure
from benchmarks.timing import Measured, Missing, Outcome

CLOCK = """
import time
start = time.process_time()
{first}
middle = time.process_time()
{then}
print(middle - start, time.process_time() - start)
"""


def measure(setting: Setting) -> Iterator[Figure]:
    programs = {"torch": CLOCK.format(first="import torch", then="")}
    for side, library in setting.sides():
        then = f"import torch; from {library.name} import LoraConfig, get_peft_model"
        programs[side] = CLOCK.format(first=f"import {library.name}", then=then)
    outcomes = alternate(programs, rounds=setting.pick(3, 1))
    yield figure("import", outcomes, Goal(1.1), base="torch")
    # Names that are resolved late make the import look like nothing: what a script needs of it has the same goal.
    yield figure("import, and LoraConfig and get_peft_model", outcomes, Goal(1.1), base="torch", suffix=" in use")


def alternate(programs: dict[str, str], rounds: int) -> dict[str, Outcome]:
    """Every program once per round; what it took is under its name, and all of it under the name with " in use".

    One round before these does not count: it leaves the bytecode that an installed package comes with.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    failed: dict[str, Missing] = {}
    for number in range(1 + rounds):
        for name, program in programs.items():
            if name in failed:
                continue
            try:
                pair = in_fresh_process(program)
            except RuntimeError as error:
                failed[name] = Missing(str(error))
            else:
                samples[name] += [pair] if number else []
    outcomes: dict[str, Outcome] = {}
    for name, pairs in samples.items():
        outcomes[name] = failed.get(name) or Measured(tuple(first for first, _ in pairs))
        outcomes[f"{name} in use"] = failed.get(name) or Measured(tuple(both for _, both in pairs))
    return outcomes


def in_fresh_process(program: str) -> tuple[float, float]:
    """The two numbers that the program prints, from a new interpreter, whose own start is not counted.

    Raises:
        RuntimeError: If it fails there; the message is the last line of what it wrote.
    """
    # A library in a tree of sources must be compiled no more often than one that pip has put in place.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    first, both = done.stdout.split()[-2:]
    return float(first), float(both)
