"""Folders that transformers writes with PEFT are read with the drop-in, and the other way round: two environments."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import peft
import pytest

from dropin import exchange

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-dropin" / "bin" / "python"
CLOSE = 1e-5

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT's own, of which there are many
    pytest.mark.skipif(not PYTHON.exists(), reason="`make env` makes the environment of the drop-in"),
]


@pytest.fixture(scope="module")
def distances(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[float, float]]]:
    """Reader -> case -> how far its outputs are from the writer's."""
    folder = tmp_path_factory.mktemp("exchange")
    exchange.write(folder / "theirs")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    command = [
        str(PYTHON),
        str(ROOT / "tests" / "dropin" / "exchange.py"),
        str(folder / "theirs"),
        str(folder / "ours"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return {"drop-in": json.loads(done.stdout), "peft": exchange.read(folder / "ours")}


def test_this_is_the_incumbent() -> None:
    assert not hasattr(peft, "_surface")


@pytest.mark.parametrize("case", [f"{model}-{adapter}" for model, adapter in exchange.CASES])
def test_outputs_are_the_writers(distances: dict[str, dict[str, tuple[float, float]]], case: str) -> None:
    mixin, handle = distances["drop-in"][case]
    assert max(mixin, handle) < CLOSE
    mixin, handle = distances["peft"][case]
    assert handle < CLOSE
    if case.endswith("dora"):
        assert mixin > CLOSE  # PEFT's mapping does not name the magnitudes: no file loads there
    else:
        assert mixin < CLOSE
