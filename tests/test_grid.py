"""METHODS x KINDS x STORAGE: every law on every cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import laws
import pytest
import torch
from laws import KINDS, LAWS, MERGE_LAWS, OPTIONS, STORAGE, UNMERGEABLE, UNSUPPORTED, Case, Law, cases, cells
from torch import Tensor

import inlay
from inlay import layers, routing, state
from inlay.adapted import Adapted
from inlay.methods import METHODS
from inlay.methods.lora import LoraAdapter
from inlay.model import PeftModel
from inlay.storage import STORAGES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dropout has no effect there"),
    pytest.mark.filterwarnings("ignore:.* does not divide a layer's width"),
    pytest.mark.filterwarnings("ignore:Merged into 1 packed weights"),
]

by_id = {"ids": lambda case: case.id if isinstance(case, Case) else getattr(case, "__name__", str(case))}


def test_the_grid_is_whole() -> None:
    """A new row of a table of the library is an empty row here, and fails."""
    assert set(OPTIONS) == set(METHODS)
    assert {kind.row for kind in KINDS.values()} == {kind.name for kind in layers.KINDS} | {"Parameter"}
    assert set(STORAGE) == {storage.name for storage in STORAGES}
    for table in (UNSUPPORTED, UNMERGEABLE):
        assert all(option in OPTIONS[method] and kind in KINDS for method, option, kind in table)
    assert not set(UNSUPPORTED) & set(UNMERGEABLE)


def marked(cells: Iterable[Case]) -> list[Any]:
    return [pytest.param(case, marks=case.marks) for case in cells]


@pytest.mark.parametrize(("law", "case"), cells(LAWS, cases()))
def test_law(law: Law, case: Case) -> None:
    law(case)


@pytest.mark.parametrize(("law", "case"), cells(MERGE_LAWS, [case for case in cases() if case.merges]))
def test_law_of_merging(law: Law, case: Case) -> None:
    law(case)


@pytest.mark.parametrize("case", marked(case for case in cases() if not case.merges), **by_id)
def test_merging_is_refused(case: Case) -> None:
    laws.merging_is_refused(case)


@pytest.mark.parametrize("cell", UNSUPPORTED, ids="-".join)
def test_unsupported(cell: tuple[str, str, str]) -> None:
    case = Case(*cell)
    model = case.base()
    before, modules = laws.bits(model), [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(UNSUPPORTED[cell][0], match=r"\bm\b"):
        inlay.get_peft_model(model, case.config())
    laws.same_state(laws.bits(model), before)
    assert [(name, type(m)) for name, m in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())


# torch, of itself, where it traces an autograd function that a layer of bitsandbytes calls
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", marked(cases(options=("plain", "dora", "bias"))), **by_id)
def test_compiled(case: Case) -> None:
    laws.compiled_equals_eager(case, "aot_eager")


INDUCTOR = [
    Case("LORA", "plain", "Linear"),
    Case("LORA", "dora", "Linear"),
    pytest.param(Case("LORA", "plain", "Conv2d"), marks=pytest.mark.slow),
    pytest.param(Case("LORA", "dora", "Conv2d"), marks=pytest.mark.slow),
    pytest.param(Case("LORA", "bias", "Linear"), marks=pytest.mark.slow),
    pytest.param(Case("LORA", "plain", "Conv1D"), marks=pytest.mark.slow),
    pytest.param(Case("LORA", "dora", "Embedding"), marks=pytest.mark.slow),
    pytest.param(Case("LORA", "plain", "MultiheadAttention"), marks=pytest.mark.slow),
    pytest.param(Case("LORA", "plain", "Parameter of experts"), marks=pytest.mark.slow),
    Case("OFT", "plain", "Linear"),
    *(pytest.param(laws.home(method), marks=pytest.mark.slow) for method in OPTIONS if method not in ("LORA", "OFT")),
    pytest.param(Case("OFT", "plain", "Conv2d"), marks=pytest.mark.slow),
    pytest.param(Case("LOKR", "plain", "Conv2d"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", INDUCTOR, **by_id)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_inductor(case: Case) -> None:
    laws.compiled_equals_eager(case, "inductor")


# ---------------------------------------------------------------- every law can fail


def _wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Puts ``change(original, *args)`` in place of a method."""

    def sabotage(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return sabotage


def _starts_elsewhere(original: Any, self: Any, p: Any, layer: Any) -> None:
    original(self, p, layer)
    with torch.no_grad():
        p["up"].add_(0.1)


def _forgets_the_copy(original: Any, self: Adapted) -> None:
    original(self)
    with torch.no_grad():
        self.weight.add_(1e-6)


def _loads_something_else(original: Any, root: Any, targets: Any, tensors: Any) -> Any:
    return original(root, targets, {key: t * 1.0001 for key, t in tensors.items()})


def _runs_half_of_the_rows(original: Any, self: Adapted, rows: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
    h = original(self, rows, tokens, *args, **kwargs)
    return torch.cat([h[:2], self.base_layer(*args, **kwargs)[2:]])


def _off_when(condition: Callable[[], bool]) -> Callable[..., Any]:
    def change(original: Any, *args: Any, **kwargs: Any) -> Any:
        h = original(*args, **kwargs)
        return h * 1.5 if condition() else h

    return change


def _loses_the_adapter(original: Any, self: Adapted, *args: Any, **kwargs: Any) -> Any:
    out = original(self, *args, **kwargs)
    if isinstance(out, Adapted):
        out._run = ()
    return {**out, "_run": ()} if isinstance(out, dict) else out


def _remembers_tensors(original: Any, self: Adapted, name: str) -> dict[str, Tensor]:
    known: dict[str, Tensor] = self.__dict__.setdefault(f"_test_{name}", original(self, name))
    return known


def _cuts_the_graph(original: Any, self: Any, p: Any, x: Tensor, h: Tensor, layer: Any, fresh: bool) -> Tensor:
    out: Tensor = original(self, {key: t.detach() for key, t in p.items()}, x, h, layer, fresh)
    return out + 0.0 * sum(t.sum() for t in p.values())


def _bind_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing.Router, "bind", lambda self, function: function)
    monkeypatch.setattr(routing, "_in_backward", lambda: False)


def _drops_the_scale(original: Any, self: Any, p: Any, W: Tensor, b: Any) -> Any:
    W_new, b_new = original(self, p, W, b)
    return W + 0.9 * (W_new - W), b_new


def _adds_too_little(original: Any, self: Adapted, down: Tensor, up: Tensor, scale: float, **kwargs: Any) -> Tensor:
    W: Tensor = original(self, down, up, 0.9 * scale, **kwargs)
    return W


def _thaw(model: inlay.PeftModel) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _counts_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def scale_layer(self: Adapted, scale: float) -> None:
        calls.append(scale)
        for name in self._run:
            self.methods[name].rescale(scale if len(calls) > 1 else 1.0, absolute=False)

    monkeypatch.setattr(Adapted, "scale_layer", scale_layer)


BREAKS: dict[Law, Callable[[pytest.MonkeyPatch], None]] = {
    laws.fresh_is_identity: _wrapped(LoraAdapter, "initialise", _starts_elsewhere),
    laws.merged_equals_forward: _wrapped(Adapted, "_add_product", _adds_too_little),
    laws.safe_merge_equals_merge: _wrapped(Adapted, "_add_product", _adds_too_little),
    laws.unmerge_restores_the_bits: _wrapped(Adapted, "unmerge", _forgets_the_copy),
    laws.saved_and_loaded_is_the_same: _wrapped(state, "assign", _loads_something_else),
    laws.disabled_equals_base: _wrapped(PeftModel, "disable_adapter", lambda original, self: nullcontext()),
    laws.rows_equal_one_by_one: _wrapped(Adapted, "_forward_rows", _runs_half_of_the_rows),
    laws.rows_train_as_one_by_one: _wrapped(Adapted, "_forward_rows", _runs_half_of_the_rows),
    laws.several_act_together: _wrapped(
        Adapted,
        "_forward_several",
        lambda original, self, run, base, x, *args, **kwargs: original(self, run[:1], base, x, *args, **kwargs),
    ),
    laws.compiled_equals_eager: _wrapped(LoraAdapter, "out", _off_when(torch.compiler.is_compiling)),
    laws.recomputed_equals_stored: _bind_nothing,
    laws.copies_are_equal_and_apart: _wrapped(Adapted, "__getstate__", _loses_the_adapter),
    laws.casting_keeps_the_function: _wrapped(Adapted, "_apply", _loses_the_adapter),
    laws.tensors_may_be_replaced: _wrapped(Adapted, "params", _remembers_tensors),
    laws.base_may_change: _counts_scaling,
    laws.gradients_are_derivatives: _wrapped(LoraAdapter, "out", _cuts_the_graph),
    laws.autocast_is_close: _wrapped(LoraAdapter, "out", _off_when(lambda: torch.is_autocast_enabled("cpu"))),
}


@pytest.mark.parametrize("law", BREAKS, **by_id)
def test_every_law_can_fail(law: Law, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("LORA", "plain", "Linear")
    law(case)
    BREAKS[law](monkeypatch)
    with pytest.raises(AssertionError):
        law(case)


@pytest.mark.bnb
@pytest.mark.parametrize("storage", [storage for storage in STORAGES if not storage.in_place], ids=lambda s: s.name)
def test_the_law_of_packed_merging_can_fail(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by packing what was there already, nor by packing something else, does it pass."""
    case = Case("LORA", "plain", "Linear", storage.name)
    write = type(storage).write
    for share in (0.0, -1.0):

        def part(self: Any, layer: Any, W: Tensor, parameter: str = "weight", share: float = share) -> None:
            with self.reading(layer) as W0:
                write(self, layer, W0 + share * (W - W0), parameter)

        monkeypatch.setattr(type(storage), "write", part)
        with pytest.raises(AssertionError):
            laws.merged_equals_forward(case)


def test_the_law_of_gradients_can_fail() -> None:
    with pytest.raises(AssertionError):
        laws.only_adapters_get_gradients(Case("LORA", "plain", "Linear", spoil=_thaw))


def test_the_law_of_refused_merging_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraAdapter, "check_mergeable", lambda self, kind, base: None)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        laws.merging_is_refused(Case("LORA", "bias", "Linear without bias"))


def test_every_law_is_broken_once() -> None:
    tested = {*BREAKS, laws.only_adapters_get_gradients}
    assert tested == {*LAWS, *MERGE_LAWS, laws.compiled_equals_eager}
