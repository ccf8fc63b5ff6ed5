"""Modules that are made without memory."""

from __future__ import annotations

import threading

import pytest
from torch import nn

from inlay.integrations.empty import init_empty_weights, skip_init_on_device


def devices(module: nn.Module) -> list[str]:
    return [t.device.type for t in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize(("buffers", "statistics"), [(None, "cpu"), (False, "cpu"), (True, "meta")])
def test_parameters_are_on_the_meta_device(buffers: bool | None, statistics: str) -> None:
    with init_empty_weights(include_buffers=buffers):
        norm = nn.BatchNorm1d(3)
    assert devices(norm) == ["meta"] * 2 + [statistics] * 3
    assert norm.weight.requires_grad
    assert devices(nn.BatchNorm1d(3)) == ["cpu"] * 5


def test_a_function_may_be_left_out() -> None:
    @skip_init_on_device
    def made(width: int) -> nn.Module:
        """Makes one."""
        return nn.Linear(width, width)

    with init_empty_weights():
        assert devices(made(2)) == ["cpu"] * 2
        assert devices(nn.Linear(2, 2)) == ["meta"] * 2
    assert made.__doc__ == "Makes one."
    assert devices(made(2)) == ["cpu"] * 2


def test_other_threads_and_an_error_inside_are_left_alone() -> None:
    found: list[str] = []

    def run() -> None:
        with init_empty_weights():
            thread = threading.Thread(target=lambda: found.extend(devices(nn.Linear(2, 2))))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert found == ["cpu"] * 2
    assert devices(nn.Linear(2, 2)) == ["cpu"] * 2
