"""Cases that two processes go through together: `run` starts them, and each of them calls `go_through`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

TESTS = Path(__file__).parent


def run(script: str, folder: Path, *args: str) -> list[dict[str, str]]:
    """For each of the processes, what went wrong by case; the script is given its rank, the folder and ``args``."""
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent / "src")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, script, str(rank), folder, *args], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in both]
    finally:
        for process in both:  # one that waits for the other, which has died
            process.kill()
    for process, error in zip(both, errors, strict=True):
        assert process.returncode == 0, error
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def go_through(rank: int, folder: Path, cases: Iterable[tuple[str, Callable[[], None]]]) -> None:
    """Calls (name, case) after (name, case), once the processes know each other, and writes what went wrong."""
    import torch.distributed as dist

    wrong = {}
    for name, case in cases:
        wrong[name] = ""
        try:
            case()
        except Exception:
            wrong[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()
