import itertools
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.errors import (
    ConfigError,
    NoMatchingPeftModuleError,
    PatternError,
    PlanError,
    UnknownArchitectureError,
    UnsupportedLayerError,
)
from inlay.match import Module, Plan, Skip, Targeting, default_targets, plan, shrink

SUPPORTED = frozenset({"Linear", "Conv1D", "Embedding", "MultiheadAttention", "Parameter"})


def llama(layers: int = 3, prefix: str = "model.") -> list[Module]:
    """A decoder's modules as `named_modules` lists them, containers included."""
    found = [Module("model", None)] if prefix else []
    found += [Module(f"{prefix}embed_tokens", "Embedding"), Module(f"{prefix}layers", None)]
    for i in range(layers):
        layer = f"{prefix}layers.{i}"
        found += [Module(layer, None), Module(f"{layer}.self_attn", None)]
        found += [Module(f"{layer}.self_attn.{x}_proj", "Linear") for x in "qkvo"]
        found += [Module(f"{layer}.mlp", None)]
        found += [Module(f"{layer}.mlp.{x}_proj", "Linear") for x in ("gate", "up", "down")]
        found += [Module(f"{layer}.norm", None)]
    return [*found, Module("lm_head", "Linear", output_head=True)]


def made(modules: list[Module] | None = None, parameters: Any = (), **fields: Any) -> Plan:
    return plan(llama() if modules is None else modules, parameters, Targeting(**{"supported": SUPPORTED, **fields}))


def names(result: Plan) -> list[str]:
    return [target.name for target in result.targets]


def per_layer(*ends: str, layers: Any = range(3)) -> list[str]:
    return [f"model.layers.{i}.{end}" for i in layers for end in ends]


# ------------------------------------------------------------------------------------------------------ what matches

LINEAR = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], per_layer("self_attn.q_proj")),
        ({"q_proj", "up_proj"}, per_layer("self_attn.q_proj", "mlp.up_proj")),
        (["self_attn.q_proj"], per_layer("self_attn.q_proj")),
        (["model.layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["lm_head"], ["lm_head"]),
        (r".*\.(q|v)_proj", per_layer("self_attn.q_proj", "self_attn.v_proj")),
        (r"model\.layers\.[02]\.mlp\.up_proj", per_layer("mlp.up_proj", layers=(0, 2))),
        ("all-linear", per_layer(*LINEAR)),
        ("ALL-Linear", per_layer(*LINEAR)),
    ],
)
def test_targets(targets: Any, expected: list[str]) -> None:
    result = made(target_modules=targets)
    assert names(result) == expected
    assert result.warnings == ()
    assert result.unmatched == ()


@pytest.mark.parametrize("targets", [["proj"], ["q_pro"], ["_proj"], "q_proj", ["all-linear"], [".*q_proj"]])
def test_what_is_no_target(targets: Any) -> None:
    with pytest.raises(NoMatchingPeftModuleError):
        made(target_modules=targets)


def test_all_linear_takes_only_what_the_method_adapts() -> None:
    modules = [Module("a", "Linear"), Module("b", "Conv1D"), Module("c", "Conv2d"), Module("d", "Embedding")]
    assert names(made(modules, target_modules="all-linear")) == ["a", "b"]
    assert names(made(modules, target_modules="all-linear", supported=frozenset({"Linear", "Conv2d"}))) == ["a"]


def test_reasons_and_counts() -> None:
    result = made(target_modules=["q_proj", "model.layers.0.self_attn.q_proj"])
    assert [target.pattern for target in result.targets] == ["model.layers.0.self_attn.q_proj", "q_proj", "q_proj"]
    assert [target.reason for target in result.targets] == [
        "named in target_modules",
        "ends with 'q_proj' in target_modules",
        "ends with 'q_proj' in target_modules",
    ]
    assert result.matched == {"q_proj": 3, "model.layers.0.self_attn.q_proj": 1}
    assert {t.reason for t in made(target_modules=".*q_proj").targets} == {
        "its name matches the regular expression in target_modules"
    }
    assert {t.reason for t in made(target_modules="all-linear").targets} == {
        "Linear layer, and target_modules is 'all-linear'"
    }


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "ab", "0"]), min_size=1, max_size=4).map(".".join), unique=True),
    st.lists(st.lists(st.sampled_from(["a", "b", "ab", "0"]), min_size=1, max_size=3).map(".".join), max_size=4),
)
def test_a_list_is_the_suffix_rule(all_names: list[str], entries: list[str]) -> None:
    expected = {n for n in all_names if any(n == e or n.endswith(f".{e}") for e in entries)}
    modules = [Module(name, "Linear") for name in all_names]
    result = made(modules, target_modules=entries, optional=True)
    inner = {n for n in expected if any(n.startswith(f"{other}.") for other in expected)}
    assert set(names(result)) == expected - inner
    assert {skip.name for skip in result.skipped} == inner


# ---------------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, per_layer("self_attn.q_proj", layers=(0, 2))),
        ({"exclude_modules": r".*\.[01]\..*"}, per_layer("self_attn.q_proj", layers=(2,))),
        ({"layers_to_transform": 1}, per_layer("self_attn.q_proj", layers=(1,))),
        ({"layers_to_transform": [0, 2]}, per_layer("self_attn.q_proj", layers=(0, 2))),
        ({"layers_to_transform": []}, per_layer("self_attn.q_proj")),
        ({"layers_to_transform": [2], "layers_pattern": "layers"}, per_layer("self_attn.q_proj", layers=(2,))),
        ({"layers_to_transform": [2], "layers_pattern": ["h", "layers"]}, per_layer("self_attn.q_proj", layers=(2,))),
        ({"modules_to_save": ["layers.1"]}, per_layer("self_attn.q_proj", layers=(0, 2))),
    ],
)
def test_left_out(fields: dict[str, Any], expected: list[str]) -> None:
    result = made(target_modules=["q_proj"], **fields)
    assert names(result) == expected
    assert {*names(result), *(skip.name for skip in result.skipped)} == set(per_layer("self_attn.q_proj"))
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("model.h.2.fc", None, 2),
        ("h.2.fc", None, 2),
        ("model.h.0.experts.2.fc", None, 0),
        ("model.h.0.experts.2.fc", "experts", 2),
        ("model.h.0.experts.2.fc", "h", 0),
        ("h.2.fc", "h", 2),
        ("model.xh.2.fc", "h", None),
        ("model.text.h.2.fc", "text.h", 2),
        ("model.h.2", None, None),
        ("model.head.fc", None, None),
        ("0.1.fc", None, None),
        ("net.0.1.fc", None, 0),
    ],
)
def test_layer_index(name: str, pattern: str | None, index: int | None) -> None:
    for wanted in (0, 1, 2):
        result = made(
            [Module(name, "Linear")],
            target_modules=[name.rsplit(".", 1)[-1]],
            layers_to_transform=[wanted],
            layers_pattern=pattern,
            optional=True,
        )
        assert bool(result.targets) == (wanted == index)


def test_a_full_name_is_exempt_from_layers() -> None:
    result = made(target_modules=["q_proj", "lm_head", "model.layers.0.mlp.up_proj"], layers_to_transform=1)
    assert names(result) == ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"]


def test_all_linear_leaves_out_the_head_but_a_name_does_not() -> None:
    result = made(target_modules="all-linear")
    assert result.skipped == (Skip("lm_head", "the output head, which 'all-linear' leaves out; name it to adapt it"),)
    assert "lm_head" in names(made(target_modules=["q_proj", "lm_head"]))


def test_a_target_inside_a_target_is_left_out() -> None:
    modules = [
        Module("attn", "MultiheadAttention"),
        Module("attn.out_proj", "Linear", inside="attn"),
        Module("attn.extra", "Linear"),
        Module("fc", "Linear"),
    ]
    result = made(modules, target_modules=["attn", "extra", "fc"])
    assert names(result) == ["attn", "fc"]
    assert result.skipped == (Skip("attn.extra", "inside 'attn', which is a target itself"),)


def test_a_layer_that_is_not_called_is_left_out() -> None:
    modules = [Module("attn", "MultiheadAttention"), Module("attn.out_proj", "Linear", inside="attn")]
    modules.append(Module("fc", "Linear"))
    reason = "'attn' reads its weight without calling it; target 'attn'"
    result = made(modules, target_modules=["out_proj", "fc"])
    assert names(result) == ["fc"]
    assert result.skipped == (Skip("attn.out_proj", reason),)
    assert result.warnings == (f"1 named modules are left out. First: 'attn.out_proj': {reason}.",)
    assert made(modules, target_modules="all-linear").warnings == ()
    with pytest.raises(NoMatchingPeftModuleError, match="left out are 1 by the rule for layers that are not called"):
        made(modules, target_modules=["out_proj"])


# ---------------------------------------------------------------------------------------------- trained whole, tables


def test_modules_to_save() -> None:
    modules = [*llama(1), Module("score", "Linear"), Module("xscore", "Linear"), Module("score.inner", "Linear")]
    result = made(modules, target_modules="all-linear", modules_to_save=["score", "inner", "embed_tokens"])
    assert result.saved == (("model.embed_tokens", "embed_tokens"), ("score", "score"))
    assert "xscore" in names(result)
    assert not {"score", "score.inner"} & set(names(result))
    assert Skip("score.inner", "inside 'score', which modules_to_save trains whole") in result.skipped
    assert Skip("score", "'score' in modules_to_save trains it whole") in result.skipped
    assert result.matched["score"] == 1


def test_modules_to_save_inside_a_target() -> None:
    modules = [Module("attn", "MultiheadAttention"), Module("attn.out_proj", "Linear", inside="attn")]
    with pytest.raises(PlanError, match=r"'out_proj' in modules_to_save names 'attn.out_proj', .* the target 'attn'"):
        made(modules, target_modules=["attn"], modules_to_save=["out_proj"])


def test_unmatched_modules_to_save() -> None:
    modules = [*llama(1), Module("classifier", "Linear")]
    result = made(modules, target_modules=["q_proj"], modules_to_save=["classifer"])
    assert result.warnings == (
        f"'classifer' in modules_to_save matched 0 of {len(modules)} modules; closest: classifier.",
    )
    # A task's handle asks for every usual name of a head; one of them is enough.
    assert made(modules, target_modules=["q_proj"], modules_to_save=["classifier", "score"]).warnings == ()
    assert len(made(llama(1), target_modules=["q_proj"], modules_to_save=["classifier", "score"]).warnings) == 2


def test_overrides() -> None:
    result = made(
        target_modules=["q_proj", "up_proj"],
        patterns={
            "r": {r"layers\.0\..*": 4, "q_proj": 16, "^model.layers.2.mlp.up_proj": 2},
            "lora_alpha": {"up_proj": 7},
        },
    )
    assert [dict(target.overrides) for target in result.targets] == [
        {"r": 4},
        {"r": 4, "lora_alpha": 7},
        {"r": 16},
        {"lora_alpha": 7},
        {"r": 16},
        {"r": 2, "lora_alpha": 7},
    ]
    assert result.warnings == ()


def test_overrides_that_serve_nothing() -> None:
    result = made(
        target_modules=["q_proj", "k_proj"], patterns={"r": {"q_prj": 4, "q_proj": 8, "0.self_attn.q_proj": 1}}
    )
    assert result.warnings == (
        "r: these keys did not match any targeted module, because none fits or an earlier pattern does: 'q_prj'; "
        "closest: q_proj, k_proj, '0.self_attn.q_proj'.",
    )


def test_a_bad_override_pattern() -> None:
    with pytest.raises(PatternError, match=r"'q_\(proj' is malformed"):
        made(target_modules=["q_proj"], patterns={"r": {"q_(proj": 4}})


# -------------------------------------------------------------------------------------------------------- parameters

EXPERTS = [Module("layers", None), *(Module(f"layers.{i}.{m}", None) for i in (0, 1) for m in ("experts", "router"))]
EXPERT_PARAMETERS = [
    ("", "scale"),
    *((f"layers.{i}.experts", p) for i in (0, 1) for p in ("up", "down")),
    *((f"layers.{i}.router", "weight") for i in (0, 1)),
]


def test_parameters() -> None:
    result = made(
        EXPERTS,
        EXPERT_PARAMETERS,
        target_parameters=["experts.up", "layers.0.experts.down"],
        patterns={"r": {"experts.up": 4}},
    )
    assert [(p.module, p.parameter, p.pattern, dict(p.overrides)) for p in result.parameters] == [
        ("layers.0.experts", "down", "layers.0.experts.down", {}),
        ("layers.0.experts", "up", "experts.up", {"r": 4}),
        ("layers.1.experts", "up", "experts.up", {"r": 4}),
    ]
    assert result.targets == ()
    assert result.warnings == ()
    assert result.matched == {"experts.up": 2, "layers.0.experts.down": 1}


def test_a_parameter_that_matches_nothing() -> None:
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"'experts.upp' in target_parameters matched 0 of 7 parameters"
    ):
        made(EXPERTS, EXPERT_PARAMETERS, target_parameters=["experts.upp"])
    result = made(EXPERTS, EXPERT_PARAMETERS, target_parameters=["experts.up", "zz"])
    assert result.warnings == ("'zz' in target_parameters matched 0 of 7 parameters.",)


def test_a_parameter_of_the_model_itself() -> None:
    with pytest.raises(
        PlanError, match=r"'scale' in target_parameters names 'scale', a parameter of the model itself"
    ):
        made(EXPERTS, EXPERT_PARAMETERS, target_parameters=["scale"])


def test_a_parameter_of_a_target() -> None:
    modules = [Module("fc", "Linear")]
    with pytest.raises(PlanError, match=r"names 'fc.weight', and target_modules names 'fc'; .* one way only"):
        made(modules, [("fc", "weight")], target_modules=["fc"], target_parameters=["fc.weight"])


def test_a_parameter_of_a_saved_module() -> None:
    modules = [Module("fc", "Linear"), Module("head", "Linear")]
    result = made(
        modules,
        [("fc", "weight"), ("head", "weight")],
        target_parameters=["fc.weight", "head.weight"],
        modules_to_save=["head"],
    )
    assert [p.module for p in result.parameters] == ["fc"]
    assert result.skipped[-1] == Skip("head.weight", "modules_to_save trains its module whole")


# -------------------------------------------------------------------------------------------------- nothing to adapt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Neither `target_modules` nor `target_parameters`"),
        ({"target_modules": []}, "Neither `target_modules` nor `target_parameters`"),
        (
            {"target_modules": ["q_prj"]},
            "there is nothing to adapt: 'q_prj' in target_modules matched 0 of 37 modules; closest: q_proj, v_proj",
        ),
        (
            {"target_modules": ["self_attn.q_prj"]},
            "'self_attn.q_prj' in target_modules matched 0 of 37 modules; closest: self_attn.q_proj, self_attn.v_proj",
        ),
        (
            {"target_modules": "q_proj"},
            "a string is a regular expression for the whole name, pass the list ['q_proj']",
        ),
        ({"target_modules": ".*q_prj"}, "'.*q_prj' in target_modules matched 0 of 37 modules; closest: q_proj"),
        ({"target_modules": [r".*\.q_proj"]}, "entries of a list are names, pass a regular expression as one string"),
        ({"target_modules": ["All-Linear"]}, "for every linear layer pass the string 'all-linear', not a list"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            "3 modules or parameters are named as targets and none is left: left out are 3 by exclude_modules. "
            "First: 'model.layers.0.self_attn.q_proj': 'q_proj' in exclude_modules.",
        ),
        (
            {"target_modules": ["q_proj", "zz"], "modules_to_save": ["self_attn"]},
            "left out are 3 by modules_to_save. First: 'model.layers.0.self_attn.q_proj': 'self_attn' in "
            "modules_to_save trains it whole. 'zz' in target_modules matched 0 of 37 modules.",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [7, 9]},
            "layers_to_transform=[7, 9] are indices of no target module; they lie in layers 0-2.",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
            "layers_to_transform=[1] are indices of no target module; none has a layer's index.",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "exclude_modules": ["layers.1.self_attn.q_proj"]},
            "none is left: left out are 2 by layers_to_transform, 1 by exclude_modules. First:",
        ),
    ],
)
def test_nothing_to_adapt(fields: dict[str, Any], message: str) -> None:
    modules = llama()
    assert len(modules) == 37
    with pytest.raises(NoMatchingPeftModuleError, match=re.escape(message)):
        made(modules, **fields)
    assert issubclass(NoMatchingPeftModuleError, ValueError)


def test_nothing_to_adapt_may_be_fine() -> None:
    result = made(target_modules=["zz"], optional=True)
    assert result.targets == ()
    assert result.warnings == ("'zz' in target_modules matched 0 of 37 modules.",)
    assert made(optional=True).targets == ()


# ---------------------------------------------------------------------------------------------------------- warnings


def test_an_entry_that_matches_nothing_beside_others() -> None:
    result = made(target_modules=["v_proj", "q_prj"])
    assert result.warnings == ("'q_prj' in target_modules matched 0 of 37 modules; closest: q_proj, v_proj, o_proj.",)
    assert result.unmatched == (("q_prj", "; closest: q_proj, v_proj, o_proj"),)
    assert result.matched == {"v_proj": 3, "q_prj": 0}


def test_many_entries_that_match_nothing() -> None:
    result = made(target_modules=["v_proj", *(f"nothing{i}" for i in range(30))])
    assert len(result.warnings) == 6
    assert result.warnings[-1].startswith("25 more entries of target_modules matched nothing: 'nothing5', ")
    assert len(result.unmatched) == 30


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["q_prj"], "'q_prj' in exclude_modules matched 0 of 37 modules; closest: q_proj, v_proj, o_proj."),
        (".*q_prj", "'.*q_prj' in exclude_modules matched 0 of 37 modules; closest: q_proj, v_proj, o_proj."),
        (["lm_head"], "'lm_head' in exclude_modules names no target and so excludes nothing."),
        (".*head", "'.*head' in exclude_modules names no target and so excludes nothing."),
        (
            ["self_attn"],
            "'self_attn' in exclude_modules names a module and not the targets inside it, which are adapted; to "
            r"exclude these pass a regular expression: exclude_modules='(.*\\.)?self_attn\\..*'.",
        ),
    ],
)
def test_an_exclusion_that_excludes_nothing(exclude: Any, message: str) -> None:
    result = made(target_modules=["v_proj"], exclude_modules=exclude)
    assert len(result.targets) == 3
    passed = f"You have passed exclude_modules={exclude} but no modules were excluded: "
    assert result.warnings == (passed + message,)


def test_the_advice_on_exclusions_works() -> None:
    result = made(target_modules=["v_proj", "up_proj"], exclude_modules=r"(.*\.)?self_attn\..*")
    assert names(result) == per_layer("mlp.up_proj")


def test_layers_that_do_not_exist() -> None:
    result = made(target_modules=["v_proj"], layers_to_transform=[1, 5, 6])
    assert result.warnings == ("layers_to_transform=[5, 6] are indices of no target module; they lie in layers 0-2.",)


def test_the_last_layers_only() -> None:
    result = made(target_modules=["v_proj", "q_proj"], exclude_modules=["layers.2.self_attn.v_proj"], adapter_layers=3)
    assert names(result) == [f"model.layers.{i}.self_attn.{x}_proj" for i, x in ((1, "q"), (1, "v"), (2, "q"))]
    assert {skip.reason for skip in result.skipped if ".0." in skip.name} == {
        "below the last 3, which adapter_layers asks for"
    }
    with pytest.raises(PlanError, match="adapter_layers=4, and the model has 3 modules"):
        made(target_modules=["v_proj"], adapter_layers=4)
    with pytest.raises(NoMatchingPeftModuleError):
        made(target_modules=["z_proj"], adapter_layers=4)


def test_a_method_without_parameters() -> None:
    with pytest.raises(UnsupportedLayerError, match="LoRA adapts no bare parameters"):
        made(EXPERTS, EXPERT_PARAMETERS, target_parameters=["experts.up"], supported=frozenset({"Linear"}))


def test_targets_that_are_all_left_out_beside_parameters() -> None:
    modules = [*EXPERTS, Module("fc", "Linear")]
    result = made(
        modules, EXPERT_PARAMETERS, target_modules=["fc"], exclude_modules=["fc"], target_parameters=["experts.up"]
    )
    assert len(result.parameters) == 2
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("target_modules adapts nothing: 1 modules or parameters are named")


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["norm"],
            "Target module 'model.layers.0.norm' (and 2 more) is not supported: 'norm' in target_modules names it, "
            "which is a container or a layer",
        ),
        (["self_attn"], "'model.layers.0.self_attn' (and 2 more)"),
        (
            ".*attn.*",
            "'model.layers.0.self_attn' (and 2 more) is not supported: '.*attn.*' in target_modules",
        ),
        (
            ["conv"],
            "'conv' in target_modules names it, which is a Conv2d; LoRA adapts Conv1D, Embedding, Linear, Mu",
        ),
    ],
)
def test_a_kind_that_cannot_be_adapted(targets: Any, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=re.escape(message)):
        made([*llama(), Module("conv", "Conv2d")], target_modules=targets)


def test_a_kind_that_cannot_be_adapted_may_be_excluded() -> None:
    result = made(target_modules=".*attn.*", exclude_modules=r".*attn")
    assert names(result) == per_layer(*(f"self_attn.{x}_proj" for x in "qkvo"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ".*", "layers_to_transform": 1}, "`layers_to_transform` cannot be used when"),
        (
            {"target_modules": ".*", "layers_pattern": "h", "layers_to_transform": None},
            "`layers_pattern` cannot be used when",
        ),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "h"},
            "`layers_pattern` needs `layers_to_transform`",
        ),
    ],
)
def test_contradictions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**fields)


@pytest.mark.parametrize(
    "fields", [{"target_modules": "q_(proj"}, {"target_modules": ["q_proj"], "exclude_modules": "["}]
)
def test_bad_expressions(fields: dict[str, Any]) -> None:
    with pytest.raises(PatternError, match="is malformed at position"):
        made(**fields)


# -------------------------------------------------------------------------------------------------------------- speed


def _calls(run: Callable[[], object]) -> int:
    """How many functions, of Python and of C, are entered: what grows with the work, on a busy machine too."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_large_models_and_long_lists() -> None:
    def planned(layers: int) -> int:
        modules = llama(layers)
        linear = [m.name for m in modules if m.kind == "Linear"]
        some = linear[: len(linear) // 10]
        patterns = {"r": dict.fromkeys(some, 4)}
        exclude = some[: len(some) // 2]
        fields = {"target_modules": some, "exclude_modules": exclude, "patterns": patterns}
        assert len(made(modules, **fields).targets) == len(some) - len(exclude)
        return _calls(lambda: made(modules, **fields))

    assert planned(400) < 4.4 * planned(100)


def test_a_bomb_from_a_file() -> None:
    start = time.thread_time()
    with pytest.raises(NoMatchingPeftModuleError):
        made(llama(100), target_modules=r"(([a-z_.0-9])+)+X")
    with pytest.raises(NoMatchingPeftModuleError):
        made(llama(100), target_modules=r"(([a-z_.0-9])+)+[X-Z]")
    assert time.thread_time() - start < 1


# ------------------------------------------------------------------------------------------------------ lists of names


def suffix_rule(entries: list[str], all_names: list[str]) -> list[str]:
    return [n for n in all_names if any(n == e or n.endswith(f".{e}") for e in entries)]


POOL = [".".join(parts) for size in (1, 2, 3, 4) for parts in itertools.product("abc01", repeat=size)]


@pytest.mark.parametrize("seed", range(100))
def test_shrink_selects_the_same(seed: int) -> None:
    chance = random.Random(seed)
    all_names = chance.sample(POOL, chance.randint(25, 60))
    chosen = chance.sample(all_names, 20)
    short = shrink(chosen, all_names)
    assert suffix_rule(short, all_names) == suffix_rule(chosen, all_names)
    assert len(short) <= len(chosen)
    for entry in short:  # none can be spared, or be shorter
        assert suffix_rule([e for e in short if e != entry], all_names) != suffix_rule(chosen, all_names)
        if "." in entry:
            cut = entry.split(".", 1)[1]
            assert set(suffix_rule([cut], all_names)) - set(suffix_rule(chosen, all_names))


def test_shrink() -> None:
    all_names = [f"h.{i}.{x}" for i in range(12) for x in "qkv"] + ["q"]
    assert shrink([f"h.{i}.k" for i in range(12)], all_names) == [f"h.{i}.k" for i in range(12)]
    chosen = [f"h.{i}.{x}" for i in range(12) for x in "qk"]
    assert shrink(chosen, all_names) == sorted([*(f"{i}.q" for i in range(12)), "k"])


def test_default_targets() -> None:
    table: dict[str, Any] = {"llama": ["q_proj", "v_proj"], "gemma4": r".*\.(q_proj|v_proj)"}
    assert default_targets("llama", table, llama(), SUPPORTED) == ["q_proj", "v_proj"]
    assert default_targets("gemma4", table, llama(), SUPPORTED) == r".*\.(q_proj|v_proj)"
    default_targets("llama", table, llama(), SUPPORTED).append("x")  # type: ignore[union-attr]
    assert table["llama"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (
            "lama",
            "there are no default target_modules for the architecture 'lama'; closest: llama. Give names of",
        ),
        (None, "the model names no architecture (it has no config.model_type). Give names of"),
        (
            "custom",
            "The model's linear layers: q_proj (3), k_proj (3), v_proj (3), o_proj (3), gate_proj (3), up_proj (3), "
            "down_proj (3), lm_head (1).",
        ),
    ],
)
def test_unknown_architecture(model_type: str | None, message: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=re.escape(message)):
        default_targets(model_type, {"llama": ["q_proj"]}, llama(), SUPPORTED)
    with pytest.raises(UnknownArchitectureError, match="linear layers: none"):
        default_targets(model_type, {"llama": ["q_proj"]}, [], SUPPORTED)
