"""LoHa, LoKr, OFT, (IA)^3 and AdaLoRA beside PEFT's, cell by cell: method x option x layer that PEFT has too."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity.cases import Case, pair_of
from parity.helpers import (
    Pair,
    adapted_names,
    assert_equal_tensors,
    base,
    config_of,
    flat,
    gradients,
    make_pair,
    peft,
    peft_may_warn,
    prototype,
    run,
    tree,
)
from parity.method_cases import ADALORA, CELLS, EFFECTIVE, FAN, IA3, LINEARS, LOHA, LOKR, LORA, OFT, M
from parity.test_files import config, saved, tensors
from torch import Tensor, nn

import inlay

# Both say so where a size does not divide; each cell with "no-divisor" is about what they then take.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(oft_block_size|r)=7 does not divide", "ignore:Invalid `?(oft_block_size|r)"
)

each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())


def derivatives(model: nn.Module, pair: Pair) -> dict[str, Tensor]:
    """Gradients of what is trained, by live name, and of the input."""
    args = tuple(a.clone().requires_grad_(a.is_floating_point()) for a in pair.args)
    found = gradients(model, replace(pair, args=args))
    return {**found, **{f"input {i}": a.grad for i, a in enumerate(args) if a.grad is not None}}


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if ".base_layer." in n}


def layers(model: nn.Module) -> dict[str, Any]:
    return {n: model.get_submodule(n) for n in sorted(adapted_names(model))}


def live(model: nn.Module) -> dict[str, Any]:
    """What is known of each live tensor; AdaLoRA's ranknum, which is a number here, is a frozen tensor there."""
    state = {f"state {n}": tuple(t.shape) for n, t in model.state_dict().items() if ".ranknum." not in n}
    named = {n: p for n, p in model.named_parameters() if ".ranknum." not in n}
    return {**state, **{n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in named.items()}}


def assert_merged_alike(pair: Pair) -> None:
    """Ends the pair."""
    pair.theirs, pair.ours = pair.each(lambda m: m.merge_and_unload())
    assert_equal_tensors(pair.ours.state_dict(), pair.theirs.state_dict(), relative=1e-5)
    assert tree(pair.ours) == tree(pair.theirs)


@each_cell
def test_live_names_outputs_and_gradients(cell: Case) -> None:
    pair = pair_of(cell)
    theirs, ours = pair.each(live)
    assert ours == theirs
    with torch.no_grad():
        frozen = flat(prototype(cell.base)[0](*pair.args))
        assert float((frozen - flat(run(pair.ours, pair))).abs().max()) > 1e-3, "the adapter does nothing"
    for training in (False, True):
        for model in pair.both():
            model.train(training)
        pair.assert_equal_outputs()
        theirs, ours = pair.each(lambda m: derivatives(m, pair))
        assert ours.keys() == theirs.keys()
        assert {n for n, p in pair.ours.named_parameters() if p.requires_grad} <= ours.keys()
        right = {n for n in ours if not any(f".{wrong}." in n for wrong in cell.wrong)}
        assert_equal_tensors({n: ours[n] for n in right}, {n: theirs[n] for n in right}, relative=1e-5)


@each_cell
def test_files_go_both_ways(cell: Case, tmp_path: Path) -> None:
    pair = pair_of(cell)
    theirs, ours = saved(pair, tmp_path)
    assert config(ours) == config(theirs)
    assert_equal_tensors(tensors(ours), tensors(theirs))
    read = [peft.PeftConfig.from_pretrained(d).to_dict() for d in (ours, theirs)]  # a warning would be an error
    assert read[0] == read[1]
    there = peft.PeftModel.from_pretrained(base(cell.base), ours).eval()
    here = inlay.PeftModel.from_pretrained(base(cell.base), theirs).eval()
    assert here.load_report.ok
    again = Pair(there, here, pair.args)
    for one in (Pair(pair.theirs, here, pair.args), Pair(there, pair.ours, pair.args), again):
        one.assert_equal_outputs()
    assert_merged_alike(again)


@each_cell
def test_merging(cell: Case) -> None:
    pair = pair_of(cell)
    if cell.config["peft_type"] not in ("IA3", "OFT"):  # one has none there, the other the rotation
        theirs, ours = pair.each(lambda m: {n: layer.get_delta_weight("default") for n, layer in layers(m).items()})
        assert_equal_tensors(ours, theirs, relative=1e-5)
    before = frozen_weights(pair.ours)
    pair.each(lambda m: m.merge_adapter(safe_merge=True))
    theirs, ours = pair.each(frozen_weights)
    assert_equal_tensors(ours, theirs, relative=1e-5)
    assert any(not torch.equal(t, before[n]) for n, t in ours.items())
    pair.assert_equal_outputs()
    pair.each(lambda m: m.unmerge_adapter())
    assert_equal_tensors(frozen_weights(pair.ours), before)
    pair.assert_equal_outputs(1e-4)
    assert_merged_alike(pair)


# ---------------------------------------------------------------- a second adapter

#: cell -> what the second adapter has otherwise
SECOND: dict[str, dict[str, Any]] = {
    "loha-linear": {"r": 2, "target_modules": ["lin1"]},
    "loha-conv1d": {"r": 2},
    "loha-conv2d": {"alpha": 1},
    "lokr-linear": {"r": 8},
    "lokr-conv1d": {"r": 8},
    "lokr-conv2d": EFFECTIVE,
    "oft-linear": {"oft_block_size": 2},
    "oft-embedding": {"oft_block_size": 0, "r": 2},
    "oft-conv2d-point": {"use_cayley_neumann": False},
    "ia3-linear": {"target_modules": ["lin0"]},
    "ia3-gpt2-conv1d-into": {},
    "ia3-conv2d": {},
    "ia3-conv3d-into": {},
    "adalora-linear": {"inference_mode": True, "init_r": 3},
    "adalora-gpt2-conv1d": {"inference_mode": True},
    "adalora-conv2d": {"inference_mode": True, "init_lora_weights": False},
}


@pytest.mark.parametrize("name", SECOND)
def test_a_second_adapter(name: str) -> None:
    cell = CELLS[name]
    pair = pair_of(cell, more={"other": {**cell.config, **SECOND[name]}})

    def assert_alike() -> None:
        theirs, ours = pair.each(live)
        assert ours == theirs
        pair.assert_equal_outputs()

    assert_alike()
    for names in (["other"], ["default", "other"], ["default"]):
        pair.each(lambda m, names=names: m.base_model.set_adapter(names))
        assert_alike()
        theirs, ours = pair.each(lambda m: derivatives(m, pair))
        assert_equal_tensors(ours, theirs, relative=1e-5)
        if len(names) == 2 and name in ("oft-linear", "oft-conv2d-point"):  # merged in the other order there
            pair.ours.merge_adapter()
            pair.assert_equal_outputs()
            pair.ours.unmerge_adapter()
        else:
            pair.each(lambda m: m.merge_adapter())
            theirs, ours = pair.each(frozen_weights)
            assert_equal_tensors(ours, theirs, relative=1e-5)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", inlay.PeftWarning)  # both name layers without this adapter
                pair.each(lambda m: m.unmerge_adapter())
    pair.each(lambda m: m.set_adapter("other"))
    pair.each(lambda m: m.delete_adapter("default"))
    assert_alike()


def test_a_second_ia3_of_another_form() -> None:
    """There the first adapter's choice is the layer's."""
    fields = {**IA3, **LINEARS}
    model = inlay.get_peft_model(base("linears"), config_of(inlay, fields))
    model.add_adapter("other", config_of(inlay, {**fields, "feedforward_modules": ["lin0"]}))
    assert model.base_model.model.lin0.ia3_l["other"].shape == (1, 12)


# ---------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "loha-linear",
        "lokr-linear",
        "lokr-conv2d-full",
        "oft-linear",
        "oft-linear-exact",
        "oft-embedding",
        "ia3-linear",
        "ia3-conv2d-into",
        "adalora-linear",
        "adalora-conv2d",
    ],
)
def test_16_bits(name: str, autocast: bool) -> None:
    pair = pair_of(CELLS[name], dtype=torch.bfloat16, autocast_adapter_dtype=autocast)
    theirs, ours = pair.each(live)
    assert ours == theirs
    theirs, ours = pair.each(lambda m: m(*pair.args).detach())
    assert ours.dtype == theirs.dtype
    assert float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()) < 0.03


# ---------------------------------------------------------------- scale


@pytest.mark.parametrize("name", ["loha-linear", "loha-conv2d", "lokr-linear", "lokr-conv2d", "adalora-linear"])
def test_scale(name: str) -> None:
    pair = pair_of(CELLS[name])
    acts: list[Any] = [lambda layer: layer.scale_layer(0.5), lambda layer: layer.unscale_layer(2)]
    if not name.startswith("adalora"):  # there these two give it LoRA's scale
        acts += [lambda layer: layer.set_scale("default", 2.5), lambda layer: layer.unscale_layer()]
    for act in acts:
        pair.each(lambda m, act=act: [act(layer) for layer in layers(m).values()])
        pair.assert_equal_outputs()
        theirs, ours = pair.each(lambda m: [layer.scaling["default"] for layer in layers(m).values()])
        assert ours == pytest.approx(theirs)


def test_adaloras_scale_is_its_own() -> None:
    pair = pair_of(CELLS["adalora-linear"])
    before = flat(run(pair.ours, pair))
    for model, scale in zip(pair.both(), (6 / 4, 6), strict=True):
        layer = model.base_model.model.lin0
        layer.set_scale("default", 2)
        assert layer.scaling["default"] == 2 * scale
        layer.unscale_layer()
        assert layer.scaling["default"] == scale
    torch.testing.assert_close(flat(run(pair.ours, pair)), before)


# ---------------------------------------------------------------- AdaLoRA, once ranks have fallen


@pytest.mark.parametrize("name", ["adalora-linear", "adalora-gpt2-conv1d", "adalora-conv2d"])
def test_adalora_after_pruning(name: str, tmp_path: Path) -> None:
    cell = CELLS[name]
    pair = pair_of(cell)
    for step in range(1, 11):
        pair.each(lambda m: gradients(m, pair))
        pair.each(lambda m, step=step: m.base_model.update_and_allocate(step))
    pattern = pair.ours.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    pair.assert_equal_outputs()
    folders = saved(pair, tmp_path)
    assert_equal_tensors(*map(tensors, reversed(folders)))
    with peft_may_warn():  # of the pattern's keys, in its own files too
        there = peft.PeftModel.from_pretrained(base(cell.base), folders[1]).eval()
    here = inlay.PeftModel.from_pretrained(base(cell.base), folders[0]).eval()
    for one in (Pair(pair.theirs, here, pair.args), Pair(there, pair.ours, pair.args)):
        one.assert_equal_outputs()
    assert_merged_alike(pair)


# ---------------------------------------------------------------- default targets


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        *(("llama", fields) for fields in (LOHA, LOKR, OFT, ADALORA, {"peft_type": "IA3"})),
        *(("bert", fields) for fields in (LOKR, {"peft_type": "IA3"})),
        *(("t5", fields) for fields in (OFT, ADALORA, {"peft_type": "IA3"})),
        *(("gpt2", {**fields, **FAN}) for fields in (ADALORA, {"peft_type": "IA3"})),
    ],
    ids=lambda value: value if isinstance(value, str) else value["peft_type"],
)
def test_default_targets(model: str, fields: dict[str, Any]) -> None:
    pair = make_pair(model, fields)
    theirs, ours = pair.each(adapted_names)
    assert ours == theirs
    for name in ("target_modules", "feedforward_modules"):
        theirs, ours = pair.each(lambda m, name=name: getattr(m.peft_config["default"], name, None))
        assert ours == theirs
    pair.assert_equal_outputs()


# ---------------------------------------------------------------- errors

REFUSED: dict[str, dict[str, Any]] = {
    "oft r and size": {**OFT, **LINEARS, "r": 4},
    "oft neither": {**OFT, **LINEARS, "oft_block_size": 0},
    "oft bias": {**OFT, **LINEARS, "bias": "all of them"},
    "ia3 feedforward": {**IA3, "target_modules": ["lin0"], "feedforward_modules": ["lin1"]},
    "ia3 no feedforward": {"peft_type": "IA3", "target_modules": ["lin0"]},
    "adalora total_step": {**ADALORA, **LINEARS, "total_step": 0},
    "adalora no time": {**ADALORA, **LINEARS, "tinit": 6, "tfinal": 5},
    "adalora dora": {**ADALORA, **LINEARS, "use_dora": True},
    "adalora loftq": {**ADALORA, **LINEARS, "init_lora_weights": "loftq"},
    "adalora layers": {**ADALORA, "target_modules": "lin0", "layers_to_transform": [0]},
    "loha pattern": {**LOHA, **LINEARS, "layers_pattern": "layers"},
    "loha field": {**LOHA, **LINEARS, "lora_alpha": 3},
    **{f"{f['peft_type']} rank": {**f, **LINEARS, "r": 0} for f in (LOHA, LOKR)},
    **{f"{f['peft_type']} layer": {**f, "target_modules": ["norm"]} for f in (LOHA, LOKR, OFT, IA3, ADALORA)},
    **{f"{f['peft_type']} nothing": {**f, "target_modules": ["none"]} for f in (LOHA, LOKR, OFT, IA3, ADALORA)},
    **{f"{f['peft_type']} no default": f for f in (LOHA, LOKR, OFT, IA3, ADALORA)},
}
REFUSED_HERE: dict[str, dict[str, Any]] = {
    "oft terms": {**OFT, **LINEARS, "num_cayley_neumann_terms": 1},
    "lokr init": {**LOKR, **LINEARS, "init_weights": "other"},
    **{f"{f['peft_type']} layers": {**f, "target_modules": "lin0", "layers_to_transform": [0]} for f in (LOHA, OFT)},
}


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_there_is_caught_as_there(fields: dict[str, Any]) -> None:
    with peft_may_warn(), pytest.raises(Exception) as theirs:
        peft.get_peft_model(base("linears"), config_of(peft, fields))
    expected = next(c for c in type(theirs.value).__mro__ if c.__module__ == "builtins")
    assert expected is not Exception
    with pytest.raises(expected) as ours:
        inlay.get_peft_model(base("linears"), config_of(inlay, fields))
    assert isinstance(ours.value, inlay.errors.PeftError)


@pytest.mark.parametrize("fields", REFUSED_HERE.values(), ids=REFUSED_HERE.keys())
def test_what_is_refused_here_alone(fields: dict[str, Any]) -> None:
    with peft_may_warn():
        peft.get_peft_model(base("linears"), config_of(peft, fields))
    with pytest.raises(inlay.errors.ConfigError):
        config_of(inlay, fields)


def test_what_fails_there_alone() -> None:
    pair = make_pair("conv1d", {**LOKR, **M, **EFFECTIVE})
    for act in (lambda: run(pair.theirs, pair), pair.theirs.merge_adapter):
        with pytest.raises(RuntimeError, match="view size"):
            act()
    before = flat(run(pair.ours, pair))
    pair.ours.merge_adapter()
    torch.testing.assert_close(flat(run(pair.ours, pair)), before)


# ---------------------------------------------------------------- several methods in one model


def mixed(library: ModuleType, name: str, *configs: dict[str, Any]) -> Any:
    """Adapters "a" and "b", with equal weights from either library, whose names differ by the nesting."""
    with peft_may_warn():
        model = library.get_peft_model(base(name), config_of(library, configs[0]), "a", mixed=True)
        model.add_adapter("b", config_of(library, configs[1]))
    own = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if {"a", "b"} & set(n.split("."))}
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for n in sorted(n for n in own if ".ranknum." not in n):
            own[n].copy_(torch.randn(own[n].shape, generator=draw) * 0.3)
    return model.eval()


_ADDED_LAST = [(one, two) for one in (LORA, LOHA, LOKR, ADALORA) for two in (LORA, LOHA, LOKR, ADALORA) if one != two]


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        *(("linears", one, two) for one, two in _ADDED_LAST),
        *(("linears", OFT, two) for two in (LORA, LOHA, LOKR, ADALORA)),
        *(("conv2d-point", OFT, two) for two in (LOHA, LOKR, ADALORA)),
        ("conv2d", LORA, LOHA),
        ("conv2d", LOHA, LOKR),
    ],
    ids=lambda value: value if isinstance(value, str) else value["peft_type"],
)
def test_mixed(name: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    where = LINEARS if name == "linears" else M
    theirs, ours = (mixed(library, name, {**one, **where}, {**two, **where}) for library in (peft, inlay))
    pair = Pair(theirs, ours, prototype(name)[1])
    for names in ("a", "b", ["a", "b"], ["b", "a"]):
        pair.each(lambda m, names=names: m.set_adapter(names))
        pair.assert_equal_outputs()
    pair.theirs, pair.ours = pair.each(lambda m: m.merge_and_unload(adapter_names=["a", "b"]))
    assert_equal_tensors(pair.ours.state_dict(), pair.theirs.state_dict(), relative=1e-5)


def test_a_rotation_that_was_added_last() -> None:
    """There it rotates what the other adapter reads too; here it is as if it had been added first."""
    configs = {**LORA, **LINEARS}, {**OFT, **LINEARS}
    outs = {}
    for library in (peft, inlay):
        for last in ("lora", "oft"):
            model = mixed(library, "linears", *(configs if last == "oft" else configs[::-1]))
            with peft_may_warn():
                model.set_adapter(["a", "b"])
                outs[library.__name__, last] = model(*prototype("linears")[1])
    for other in (("inlay", "oft"), ("peft", "lora")):
        torch.testing.assert_close(outs["inlay", "lora"], outs[other])
    assert float((outs["inlay", "oft"] - outs["peft", "oft"]).detach().abs().max()) > 0.01
