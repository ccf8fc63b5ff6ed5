"""Outputs, gradients, live names and what is trained: equal to PEFT's, layer kind by layer kind, option by option."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from parity.cases import BOTH, CASES, QV, B, Case, pair_of
from parity.helpers import (
    assert_equal_tensors,
    base,
    flat,
    gradients,
    make_pair,
    peft,
    peft_may_warn,
    prototype,
    run,
    trained,
    tree,
    without_dropout,
)

import inlay

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dropout has no effect there", "ignore:Model has `tie_word_embeddings=True`"
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_case
def test_live_names_and_what_is_trained(case: Case) -> None:
    theirs, ours = pair_of(case).each(
        lambda m: {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in m.named_parameters()}
    )
    assert ours == case.ours(theirs)


@each_case
def test_state_dict_keys(case: Case) -> None:
    theirs, ours = pair_of(case).each(lambda m: {n: tuple(t.shape) for n, t in m.state_dict().items()})
    assert ours == case.ours(theirs)


def derivatives(case: Case, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The incumbent adds attention's out-projection twice, and its gradient once."""
    twice = ".out_proj." if "attention" in case.base else "no key"
    return {k: 2 * g if twice in k else g for k, g in theirs.items()}


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients(case: Case, training: bool) -> None:
    pair = pair_of(case)
    for model in pair.both():
        model.train(training)
        without_dropout(model)
    pair.assert_equal_outputs()
    if not case.config.get("inference_mode"):
        theirs, ours = pair.each(lambda m: gradients(m, pair))
        assert ours, "nothing was trained"
        if case.base == "attention" and case.config.get("lora_bias"):
            biases = {k for k in ours if k.endswith(".bias")}
            assert len(biases) == 2
            assert ours.keys() - biases == theirs.keys()
            ours = {k: ours[k] for k in theirs}
        theirs = derivatives(case, theirs)
        if case.follows_a_tie:
            return  # there the head's factors are parameters of their own, each with half of the gradient
        assert_equal_tensors(ours, theirs, relative=1e-5)


@each_case
def test_the_adapter_changes_the_output(case: Case) -> None:
    """Else the comparisons above would compare two frozen models."""
    pair = pair_of(case)
    frozen = prototype(case.base)[0]
    if "layer_replication" not in case.config:
        with torch.no_grad():
            assert not torch.allclose(flat(frozen(*pair.args, **pair.kwargs)), flat(run(pair.ours, pair)), atol=1e-4)


# ---------------------------------------------------------------- starting values


@pytest.mark.parametrize(
    "case",
    [
        CASES[k]
        for k in ("linear", "gpt2-conv1d", "conv2d", "conv2d-grouped", "embedding", "attention", "parameters-two")
    ],
    ids=lambda c: c.base,
)
def test_a_fresh_adapter_is_the_identity_in_both(case: Case) -> None:
    _, args, _ = prototype(case.base)
    pair = make_pair(case.base, case.config)
    fresh = inlay.get_peft_model(base(case.base), inlay.LoraConfig(**case.config))
    with torch.no_grad():
        torch.testing.assert_close(flat(fresh(*args)), flat(prototype(case.base)[0](*args)))
        with peft_may_warn(), pair.theirs.disable_adapter():
            torch.testing.assert_close(flat(fresh(*args)), flat(pair.theirs(*args)))


TARGETS: dict[str, dict[str, Any]] = {
    "linears": {"target_modules": ["lin0"]},
    "embedding": {"target_modules": ["m"]},
    "conv2d": {"target_modules": ["m"]},
    "attention": {"target_modules": ["m"]},
    "gpt2-conv1d": {"target_modules": ["m"], "fan_in_fan_out": True},
    "fused": {"target_modules": [], "target_parameters": ["experts.flat"]},
}


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("name", TARGETS)
def test_starting_values_have_the_same_spread(name: str, init: bool | str) -> None:
    """The draws differ, their distribution does not: equal standard deviation over a large rank."""
    fields = {**TARGETS[name], "r": 400, "init_lora_weights": init}
    with peft_may_warn():
        theirs = peft.get_peft_model_state_dict(peft.get_peft_model(base(name), peft.LoraConfig(**fields)))
    ours = inlay.get_peft_model_state_dict(inlay.get_peft_model(base(name), inlay.LoraConfig(**fields)))
    assert ours.keys() == theirs.keys()
    for key, t in theirs.items():
        assert ours[key].std().item() == pytest.approx(t.std().item(), rel=0.1, abs=1e-9), key
        assert ours[key].abs().max().item() == pytest.approx(t.abs().max().item(), rel=0.3, abs=1e-9), key


# ---------------------------------------------------------------- several adapters, switched, disabled, merged

SEVERAL: dict[str, tuple[Case, dict[str, Any]]] = {
    "linear": (CASES["linear"], {**B, "target_modules": ["lin1"]}),
    "linear-rslora": (CASES["linear-rslora"], {**B, "target_modules": ["lin0", "lin1"]}),
    # A DoRA after another adapter is left out: PEFT scales what the first one added too, in eval alone; see the docs.
    "linear-dora": (CASES["linear-dora"], {**B, "target_modules": ["lin0", "lin1"]}),
    "linear-saved": (CASES["linear-modules-to-save"], {**B, "target_modules": ["lin0"], "modules_to_save": ["head"]}),
    "linear-bias-of-b": (
        Case("linears", {"r": 4, "lora_bias": True, "target_modules": ["lin0"]}),
        {**B, "target_modules": ["lin0"]},
    ),
    "gpt2-conv1d": (CASES["gpt2-conv1d"], {**B, "target_modules": ["m"], "fan_in_fan_out": True}),
    "conv1d": (CASES["conv1d"], {**B, "target_modules": ["m"]}),
    "conv2d": (CASES["conv2d"], {**B, "target_modules": ["m"]}),
    "conv2d-dora": (CASES["conv2d-dora"], {**B, "target_modules": ["m"]}),
    "conv3d": (CASES["conv3d"], {**B, "target_modules": ["m"]}),
    "embedding": (CASES["embedding"], {**B, "target_modules": ["m"]}),
    "embedding-dora": (CASES["embedding-dora"], {**B, "target_modules": ["m"]}),
    "attention": (CASES["attention"], {**B, "target_modules": ["m"]}),
    "attention-bias-of-b": (CASES["attention-bias-of-b"], {**B, "target_modules": ["m"]}),
    "parameters": (
        CASES["parameters-two"],
        {**B, "target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
    ),
    "llama": (CASES["llama"], {**B, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}),
    "bert": (CASES["bert"], {**B, "target_modules": ["dense"], "task_type": "SEQ_CLS"}),
}
each_several = pytest.mark.parametrize(("case", "second"), SEVERAL.values(), ids=SEVERAL.keys())


@each_several
def test_switching_and_disabling(case: Case, second: dict[str, Any]) -> None:
    pair = pair_of(case, more={"other": second})
    pair.assert_equal_outputs()
    for name in ("other", "default"):
        pair.each(lambda m, name=name: m.set_adapter(name))
        pair.assert_equal_outputs()
        theirs, ours = pair.each(lambda m: set(trained(m)))
        assert ours == theirs
    with peft_may_warn(), pair.theirs.disable_adapter(), pair.ours.disable_adapter():
        pair.assert_equal_outputs()
    pair.assert_equal_outputs()


@each_several
def test_two_active_adapters(case: Case, second: dict[str, Any]) -> None:
    if "modules_to_save" in second or case.base == "bert":
        pytest.skip("refused by PEFT: each has a copy of a module")
    pair = pair_of(case, more={"other": second})
    pair.each(lambda m: m.base_model.set_adapter(["default", "other"]))
    pair.assert_equal_outputs()
    theirs, ours = pair.each(lambda m: gradients(m, pair))
    if case.base == "attention":
        # There only the last of several active adapters gets a gradient.
        ours = {k: ours[k] for k in theirs}
    assert_equal_tensors(ours, derivatives(case, theirs), relative=1e-5)


def _frozen_weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in model.state_dict().items() if ".base_layer." in n and ".lora_" not in n}


@each_several
def test_merging(case: Case, second: dict[str, Any]) -> None:
    pair = pair_of(case, more={"other": second})
    with torch.no_grad():
        for name in ("default", "other"):
            pair.each(lambda m, name=name: m.set_adapter(name))
            before, frozen = flat(run(pair.ours, pair)), _frozen_weights(pair.ours)
            pair.each(lambda m: m.merge_adapter())
            pair.assert_equal_outputs(1e-4)
            theirs, ours = pair.each(_frozen_weights)
            assert_equal_tensors(ours, theirs, relative=1e-5)
            with warnings.catch_warnings():
                # both warn of layers that this adapter does not have
                warnings.simplefilter("ignore", inlay.PeftWarning)
                pair.each(lambda m: m.unmerge_adapter())
            pair.assert_equal_outputs(1e-4)
            assert torch.equal(before, flat(run(pair.ours, pair)))
            assert_equal_tensors(_frozen_weights(pair.ours), frozen)


@pytest.mark.parametrize("names", [["other"], ["default", "other"]], ids=str)
def test_what_is_merged_runs_whatever_is_active(names: list[str]) -> None:
    pair = pair_of(CASES["linear"], more={"other": {**B, "target_modules": ["lin0", "lin1"]}})
    pair.each(lambda m: m.merge_adapter(adapter_names=names))
    pair.assert_equal_outputs()


@each_several
@pytest.mark.parametrize("names", [None, ["other"], ["default", "other"]], ids=str)
def test_merge_and_unload(case: Case, second: dict[str, Any], names: list[str] | None) -> None:
    if names and len(names) > 1 and ("modules_to_save" in second or case.base == "bert"):
        pytest.skip("refused by PEFT: each has a copy of a module")
    pair = pair_of(case, more={"other": second})
    if names == ["other"]:
        # PEFT unloads the active adapter's copies of whole modules, whatever it is told to merge.
        pair.each(lambda m: m.set_adapter("other"))
    pair.theirs, pair.ours = pair.each(lambda m: m.merge_and_unload(adapter_names=names))
    assert_equal_tensors(pair.ours.state_dict(), pair.theirs.state_dict(), relative=1e-5)
    assert tree(pair.ours) == tree(pair.theirs) == tree(prototype(case.base)[0])
    pair.assert_equal_outputs(1e-4)


@each_several
def test_unload(case: Case, second: dict[str, Any]) -> None:
    pair = pair_of(case, more={"other": second})
    pair.theirs, pair.ours = pair.each(lambda m: m.unload())
    assert_equal_tensors(pair.ours.state_dict(), prototype(case.base)[0].state_dict())
    assert tree(pair.ours) == tree(pair.theirs) == tree(prototype(case.base)[0])


@each_several
def test_after_deleting_one(case: Case, second: dict[str, Any]) -> None:
    pair = pair_of(case, more={"other": second})
    pair.each(lambda m: m.set_adapter("other"))
    pair.each(lambda m: m.delete_adapter("default"))
    pair.assert_equal_outputs()
    theirs, ours = pair.each(lambda m: {n: p.requires_grad for n, p in m.named_parameters()})
    assert ours == theirs


# ---------------------------------------------------------------- one adapter per row

ROWS = ["default", "__base__", "other", "default", "other"]


def test_one_adapter_per_row() -> None:
    pair = make_pair("linears", BOTH, more={"other": {**B, "target_modules": ["lin0"]}}, call={"adapter_names": ROWS})
    pair.assert_equal_outputs()


def test_one_adapter_per_row_with_a_trained_head() -> None:
    saved = {"modules_to_save": ["head"]}
    pair = make_pair(
        "linears",
        {**BOTH, **saved},
        more={"other": {**B, **saved, "target_modules": ["lin0"]}},
        call={"adapter_names": ROWS},
    )
    pair.assert_equal_outputs()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_one_adapter_per_prompt(num_beams: int) -> None:
    pair = make_pair("llama", {**QV, "task_type": "CAUSAL_LM"}, more={"other": {**B, "target_modules": ["o_proj"]}})
    arguments = {
        **pair.kwargs,
        "adapter_names": ["other", "__base__", "default"],
        "max_new_tokens": 4,
        "num_beams": num_beams,
        "do_sample": False,
    }
    theirs, ours = pair.each(lambda m: m.generate(**arguments))
    assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- 16 bits


NARROW = (
    "linear",
    "linear-dora",
    "linear-bias-of-b",
    "linear-modules-to-save",
    "gpt2-conv1d",
    "conv2d",
    "embedding",
    "llama",
)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_16_bits(name: str, dtype: torch.dtype, autocast: bool) -> None:
    pair = pair_of(CASES[name], dtype=dtype, autocast_adapter_dtype=autocast)
    theirs, ours = pair.each(lambda m: {n: p.dtype for n, p in m.named_parameters()})
    assert ours == theirs
    with torch.no_grad():
        a, b = pair.outputs()
    assert a.dtype == b.dtype
    scale = a.float().abs().max()
    assert (a.float() - b.float()).abs().max() <= 0.03 * scale
    pair.each(lambda m: gradients(m, pair))
    theirs, ours = pair.each(lambda m: {n: (p.grad is not None, p.dtype) for n, p in trained(m).items()})
    assert ours == theirs


def test_float64_stays() -> None:
    pair = make_pair("linears", BOTH, dtype=torch.float64)
    theirs, ours = pair.each(lambda m: {n: p.dtype for n, p in m.named_parameters()})
    assert ours == theirs
    pair.assert_equal_outputs(1e-12)


def test_dora_of_groups_where_it_begins() -> None:
    """Later its norm is PEFT's of a product with rows and groups mixed up, and here that of the weight that acts."""
    pair = make_pair("conv2d-grouped", {"target_modules": ["m"], "r": 4, "use_dora": True})
    with torch.no_grad():
        for name, parameter in pair.theirs.named_parameters():
            ours = pair.ours.get_parameter(name)
            if "lora_B" in name:
                parameter.zero_(), ours.zero_()
            elif "magnitude" in name:
                norm_O = pair.ours.base_model.model.m.weight.flatten(1).norm(dim=1).reshape(parameter.shape)
                for each in (parameter, ours):
                    each.copy_(norm_O * torch.linspace(0.5, 2, norm_O.numel()).reshape(norm_O.shape))
    pair.assert_equal_outputs()
    theirs, ours = pair.each(lambda m: gradients(m, pair))
    assert_equal_tensors(ours, theirs, relative=1e-5)
