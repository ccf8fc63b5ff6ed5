"""Which modules are adapted: the same set, for lists, regexes, "all-linear", None, exclusions, layers and patterns."""

from __future__ import annotations

from typing import Any

import pytest
from parity.helpers import adapted_names, base, ident, make_pair, peft, peft_may_warn
from torch import nn

import inlay

MODELS = ("llama", "gpt2", "bert", "t5")

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"target_modules": None}) for name in MODELS),
    *((name, {"target_modules": "all-linear"}) for name in MODELS),
    *((name, {"target_modules": "All-Linear", "task_type": "CAUSAL_LM"}) for name in ("llama", "gpt2")),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]}),
    ("bert", {"target_modules": "all-linear", "modules_to_save": ["pooler"]}),
    ("llama", {"target_modules": ["q_proj"]}),
    ("llama", {"target_modules": {"self_attn.q_proj", "up_proj"}}),
    ("llama", {"target_modules": ["model.layers.1.mlp.down_proj"]}),
    ("llama", {"target_modules": ["layers.1.self_attn.q_proj", "k_proj"]}),
    ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.[0]\..*_proj"}),
    ("llama", {"target_modules": r".*self_attn\.(?!o_).*_proj$"}),
    ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"}),
    ("llama", {"target_modules": r".*_proj", "exclude_modules": ["mlp.up_proj", "mlp.gate_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": None, "exclude_modules": ["v_proj"]}),
    ("llama", {"target_modules": None, "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "v_proj"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"]}),
    ("gpt2", {"target_modules": r"transformer\.h\.1\..*c_.*"}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1]}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": ["wte", "wpe"]}),
    ("bert", {"target_modules": ["query", "output.dense"]}),
    ("bert", {"target_modules": ["dense"], "layers_to_transform": [0]}),
    ("bert", {"target_modules": r"bert\.encoder\.layer\.[0-9]+\.attention\.self\.(query|key)"}),
    ("bert", {"target_modules": ["word_embeddings", "classifier"]}),
    ("t5", {"target_modules": ["q", "v"]}),
    ("t5", {"target_modules": r"decoder\..*\.(k|o)"}),
    ("t5", {"target_modules": ["wi", "wo"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"target_modules": ["EncDecAttention.q"]}),
    ("t5", {"target_modules": ["lm_head", "shared"]}),
]


def both(name: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    with peft_may_warn():
        theirs = peft.get_peft_model(base(name), peft.LoraConfig(**fields))
    return theirs, inlay.get_peft_model(base(name), inlay.LoraConfig(**fields))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("name", "fields"), CASES, ids=ident)
def test_the_same_modules(name: str, fields: dict[str, Any]) -> None:
    theirs, ours = both(name, fields)
    assert adapted_names(ours) == adapted_names(theirs) != set()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*q_proj"},
    ],
    ids=ident,
)
def test_what_the_config_says_afterwards(fields: dict[str, Any]) -> None:
    theirs, ours = (m.peft_config["default"].target_modules for m in both("llama", fields))
    assert type(ours) is type(theirs)
    assert ours == theirs


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_all_linear_spelt_out_finds_the_same_again(name: str) -> None:
    theirs, ours = both(name, {"target_modules": "all-linear"})
    again = {**{"target_modules": ours.peft_config["default"].target_modules}}
    assert adapted_names(both(name, again)[0]) == adapted_names(theirs)


def _many() -> nn.Module:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(
        nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "ab": nn.Linear(2, 2)}) for _ in range(25)
    )
    return model


def test_a_long_list_is_shortened_to_the_same_modules() -> None:
    targets = [f"model.layers.{i}.{n}" for i in range(25) for n in ("a", "b")]
    with peft_may_warn():
        theirs = peft.get_peft_model(_many(), peft.LoraConfig(target_modules=targets))
    ours = inlay.get_peft_model(_many(), inlay.LoraConfig(target_modules=targets))
    assert adapted_names(ours) == adapted_names(theirs)
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules


# ---------------------------------------------------------------- patterns

PATTERNS: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 3}},
    {"rank_pattern": {"q_proj": 3, "layers.1.self_attn.q_proj": 2}},
    {"rank_pattern": {r"layers\.[01]\.self_attn\.(q|v)_proj": 5}},
    {"rank_pattern": {r"^model.layers.0.self_attn.v_proj": 6}},
    {"rank_pattern": {"proj": 6}},
    {"rank_pattern": {".*_proj": 6}, "alpha_pattern": {"v_proj": 99}},
    {"alpha_pattern": {"0.self_attn.v_proj": 1, "1.self_attn.q_proj": 2.5}},
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
]


@pytest.mark.parametrize("fields", PATTERNS, ids=ident)
def test_the_same_ranks_and_scales(fields: dict[str, Any]) -> None:
    import warnings

    config = {"r": 7, "lora_alpha": 11, "target_modules": ["q_proj", "v_proj"], **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inlay.PeftWarning)  # "proj" matches nothing, which both say
        pair = make_pair("llama", config)
    values = []
    for model in pair.both():
        layers = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
        values.append({n: (m.r["default"], m.lora_alpha["default"], m.scaling["default"]) for n, m in layers.items()})
    assert values[0] == values[1]
    assert len(values[0]) == 4
    pair.assert_equal_outputs()


# ---------------------------------------------------------------- names

NAMES = ["q", "lora_A_", "x-1", "0", "layers", "A B", "default_2", "ß"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_live_names(name: str) -> None:
    pair = make_pair("llama", {"target_modules": ["q_proj"]}, adapter_name=name)
    theirs, ours = pair.each(lambda m: [(n, p.requires_grad) for n, p in m.named_parameters()])
    assert ours == theirs


# ---------------------------------------------------------------- what cannot be

IMPOSSIBLE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["nothing"]}),
    ("llama", {"target_modules": r"nothing.*"}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [7]}),
    ("llama", {"target_modules": ["mlp"]}),
    ("llama", {"target_modules": ["norm"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.layers"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"nothing": [1]}}),
    ("llama", {"target_modules": [], "target_parameters": ["nothing.weight"]}),
    ("llama", {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}),
    ("linears", {"target_modules": None}),
    ("linears", {"target_modules": ["norm"]}),
    ("conv2d-grouped", {"target_modules": ["m"], "r": 3}),
    ("attention", {"target_modules": ["m"], "use_dora": True}),
    ("embedding", {"target_modules": ["m"], "lora_bias": True}),
    ("fused", {"target_modules": [], "target_parameters": ["experts.up"], "lora_dropout": 0.1}),
    ("fused", {"target_modules": [], "target_parameters": ["experts.up"], "use_dora": True}),
]


@pytest.mark.parametrize(("name", "fields"), IMPOSSIBLE, ids=ident)
def test_the_same_errors(name: str, fields: dict[str, Any]) -> None:
    with peft_may_warn(), pytest.raises(Exception) as theirs:
        peft.get_peft_model(base(name), peft.LoraConfig(**fields))
    wanted = theirs.type if theirs.type.__module__ == "builtins" else ValueError
    model = base(name)
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(wanted) as ours:
        inlay.get_peft_model(model, inlay.LoraConfig(**fields))
    assert isinstance(ours.value, inlay.PeftError)
    if theirs.type is peft.utils.NoMatchingPeftModuleError:
        assert isinstance(ours.value, inlay.NoMatchingPeftModuleError)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before
