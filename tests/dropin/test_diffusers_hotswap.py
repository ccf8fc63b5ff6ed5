"""diffusers swaps files into a compiled UNet or transformer on the drop-in, and nothing is compiled again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dropin.tiny_diffusers import ATTENTION, MODELS, Tensors, lora, made, output, written
from torch import Tensor

pytestmark = pytest.mark.diffusers
kinds = pytest.mark.parametrize("kind", list(MODELS))


@pytest.fixture(autouse=True)
def strictly_compiled() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def close(a: Tensor, b: Tensor, error: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=error * float(b.abs().max()), rtol=1e-4)


def expected(kind: str, file: Tensors, scale: float = 1.0) -> Tensor:
    return output(kind, written(made(kind), file, scale))


def prepared(kind: str, file: Tensors, rank: int) -> Any:
    model = made(kind)
    model.enable_lora_hotswap(target_rank=rank)
    model.load_lora_adapter(dict(file), prefix=None, adapter_name="a")
    return model


def swap(model: Any, file: Tensors, name: str | None = "a", **kwargs: Any) -> None:
    model.load_lora_adapter(dict(file), prefix=None, adapter_name=name, hotswap=True, **kwargs)


CASES = [*((kind, ATTENTION) for kind in MODELS), ("unet", ("conv", "conv1", "conv2")), ("unet", ("to_q", "conv"))]
RANKS = [(7, 13), (13, 7), (11, 11)]
FAST = {(*CASES[1], RANKS[0]), (*CASES[2], RANKS[2]), (*CASES[3], RANKS[1]), (*CASES[5], RANKS[1])}


@pytest.mark.parametrize(
    ("kind", "targets", "ranks"),
    [
        pytest.param(*case, ranks, marks=() if (*case, ranks) in FAST else pytest.mark.slow)
        for case in CASES
        for ranks in RANKS
    ],
)
def test_another_file_takes_the_place_of_the_first(
    kind: str, targets: tuple[str, ...], ranks: tuple[int, int]
) -> None:
    first, second = (lora(made(kind), seed, r, targets) for seed, r in zip((5, 6), ranks, strict=True))
    model = prepared(kind, first, max(ranks))
    compiled = torch.compile(model, backend="eager")
    close(output(kind, compiled), expected(kind, first))
    swap(compiled, second)
    close(output(kind, compiled), expected(kind, second))
    config = {"r": ranks[1], "lora_alpha": 3 * ranks[1], "target_modules": list(targets)}
    swap(compiled, second, metadata=config)  # another alpha, by what a file says of itself
    close(output(kind, compiled), expected(kind, second, 3.0), 2e-4)
    fewer = {key: t for key, t in first.items() if f".{targets[0]}." not in key}
    swap(compiled, fewer)
    close(output(kind, compiled), expected(kind, fewer))
    model.set_adapters("a", 0.5)
    close(output(kind, compiled), expected(kind, fewer, 0.5))
    assert list(model.peft_config) == ["a"]


def test_inductor_compiles_once_too() -> None:
    kind = "sd3"
    first, second = (lora(made(kind), seed, r) for seed, r in ((5, 3), (6, 5)))
    compiled = torch.compile(prepared(kind, first, 5))
    close(output(kind, compiled), expected(kind, first))
    swap(compiled, second)
    close(output(kind, compiled), expected(kind, second))


@kinds
def test_files_of_one_rank_need_no_room(kind: str) -> None:
    model, first, second = made(kind), lora(made(kind), 5), lora(made(kind), 6)
    model.load_lora_adapter(dict(first), prefix=None, adapter_name="a")
    swap(model, second)
    close(output(kind, model), expected(kind, second))


def test_other_adapters_stay_as_they_are() -> None:
    model, files = made("flux"), [lora(made("flux"), seed) for seed in (5, 6, 7)]
    for name, file in zip("ab", files, strict=False):
        model.load_lora_adapter(dict(file), prefix=None, adapter_name=name)
    model.set_adapters(["a", "b"])
    swap(model, files[2], "b")
    both = written(written(made("flux"), files[0]), files[2])
    close(output("flux", model), output("flux", both))
    assert model.active_adapters() == ["a", "b"]


@pytest.mark.parametrize("name", ["nobody", None])
def test_a_name_without_an_adapter_changes_nothing(name: str | None) -> None:
    kind = "flux"
    first, second = lora(made(kind), 5), lora(made(kind), 6)
    model = prepared(kind, first, 8)
    compiled = torch.compile(model, backend="eager")
    before = output(kind, compiled)
    with pytest.raises(ValueError, match="there is no existing adapter by that name"):
        swap(compiled, second, name)
    assert torch.equal(output(kind, compiled), before)
    with pytest.raises(ValueError, match="there is no existing adapter by that name"):
        swap(made(kind), second)


@pytest.mark.parametrize(
    ("check", "error"), [("error", RuntimeError), ("warn", None), ("ignore", None), ("else", ValueError)]
)
def test_making_room_too_late_changes_nothing(
    check: str, error: type[Exception] | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    kind = "flux"
    model = prepared(kind, lora(made(kind), 5), 8)
    before = output(kind, model)
    caplog.clear()
    if error is None:
        model.enable_lora_hotswap(target_rank=32, check_compiled=check)
    else:
        with pytest.raises(error, match="the first adapter" if check == "error" else "check_compile"):
            model.enable_lora_hotswap(target_rank=32, check_compiled=check)
    assert bool(caplog.records) == (check == "warn")
    assert torch.equal(output(kind, model), before)


@pytest.mark.parametrize("late", ["compiled", "too small"])
def test_room_that_cannot_be_made_leaves_no_adapter(late: str) -> None:
    model = made("flux")
    before = output("flux", model)
    model.enable_lora_hotswap(target_rank=8 if late == "compiled" else 2)
    if late == "compiled":
        model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled already" if late == "compiled" else "above the rank 2"):
        model.load_lora_adapter(lora(made("flux"), 5), prefix=None, adapter_name="a")
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    assert torch.equal(output("flux", model), before)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: lora(made("sd3"), 6, 4, (*ATTENTION, "ff.net.2")), RuntimeError),
        (lambda: lora(made("sd3"), 6, 9), ValueError),
        (lambda: lora(made("sd3"), 6, dora=True), ValueError),
    ],
    ids=["more layers", "a larger rank", "another method"],
)
def test_diffusers_drops_an_adapter_whose_swap_failed(
    wrong: Any, error: type[Exception], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of itself: the library has left it whole."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    model = prepared("sd3", lora(made("sd3"), 5), 4)
    with pytest.raises(error):
        swap(model, wrong())
    assert any("was unsuccessful" in record.getMessage() for record in caplog.records)
    assert torch.equal(output("sd3", model), output("sd3", made("sd3")))
