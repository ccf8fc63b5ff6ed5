"""Adapters in a model that two processes share by FSDP2, on the CPU: `sharded.py` has the cases, which they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed.fsdp")

from integrations import sharded

SCRIPT = Path(__file__).with_name("sharded.py")
SOURCES = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """For each of the two processes, what went wrong by case."""
    folder = tmp_path_factory.mktemp("sharded")
    env = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), folder], env=env, stderr=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize("case", sharded.NAMES)
def test_two_processes(wrong: list[dict[str, str]], case: str) -> None:
    for rank, cases in enumerate(wrong):
        assert not cases[case], f"process {rank}: {cases[case]}"
