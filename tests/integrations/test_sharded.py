"""Adapters in a model that two processes share by FSDP2, on the CPU: `sharded.py` has the cases, which they run."""

from __future__ import annotations

import pytest
import two_processes

pytest.importorskip("torch.distributed.fsdp")

from integrations import sharded


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """For each of the two processes, what went wrong by case."""
    return two_processes.run(sharded.__file__, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("case", sharded.NAMES)
def test_two_processes(wrong: list[dict[str, str]], case: str) -> None:
    for rank, cases in enumerate(wrong):
        assert not cases[case], f"process {rank}: {cases[case]}"
