"""What `explain` tells beforehand is what injection, saving and a forward then show."""

from __future__ import annotations

import copy
import doctest
import json
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from inlay.errors import ConfigError, NoMatchingPeftModuleError, PlanError, UnsupportedLayerError
from inlay.explanation import OPTIMIZERS, Explanation, explain
from inlay.prompts import PROMPTS

DOCS = Path(__file__).parents[1] / "docs"

Tiny = Callable[[str], nn.Module]


class Experts(nn.Module):
    """Two experts stacked in one parameter, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stack_EOI = nn.Parameter(torch.randn(2, 8, 8))
        self.gate_OI = nn.Parameter(torch.randn(8, 8))

    def forward(self, x_BI: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x_BI @ self.gate_OI.T, self.stack_EOI)


class Mixed(nn.Module):
    """What the language models do not have: experts, attention as torch has it, a normalisation with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x_BI: Tensor) -> Tensor:
        h_BI = self.norm(self.experts(x_BI))
        h_B1I = h_BI[:, None]
        return self.head(self.attention(h_B1I, h_B1I, h_B1I)[0][:, 0])


def build(tiny: Tiny, name: str) -> nn.Module:
    from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    if name == "mixed":
        return Mixed()
    if name not in ("tied", "experts"):
        return tiny(name)
    config = tiny("llama").config.to_dict()
    config.pop("model_type")
    if name == "experts":
        return MixtralForCausalLM(MixtralConfig(**{**config, "num_local_experts": 4}))
    return LlamaForCausalLM(LlamaForCausalLM.config_class(**{**config, "tie_word_embeddings": True}))


# model, fields of the config
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"target_modules": "all-linear", "r": 4}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 3}}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 9]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": r".*\.[01]\..*(up|gate)_proj"}),
    ("llama", {"target_modules": ["q_proj"], "inference_mode": True}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    ),
    ("llama", {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)], "modules_to_save": ["norm"]}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all"}),
    ("gpt2", {"target_modules": ["wte"]}),
    ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [0, 3]}}),
    ("bert", {}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all"}),
    ("bert", {"task_type": "SEQ_CLS", "target_modules": "all-linear", "use_dora": True, "bias": "lora_only"}),
    ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
    ("mlp", {"target_modules": ["lin0", "head"], "r": 3}),
    ("convnet", {"target_modules": ["conv0", "conv1"], "use_dora": True}),
    ("convnet", {"target_modules": ["conv0"], "modules_to_save": ["head"], "bias": "lora_only"}),
    ("mixed", {"target_modules": ["attention"]}),
    ("mixed", {"target_modules": ["head"], "target_parameters": ["experts.stack_EOI", "gate_OI"]}),
    ("mixed", {"target_modules": ["head"], "modules_to_save": ["norm"]}),
]
TIES = ("ignore:Model has `tie_word_embeddings=True`", "ignore:You have requested `ensure_weight_tying`")
DTYPES = [torch.float32, torch.bfloat16]


def label(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(f"{k}" for k in value) or "defaults"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", *TIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize(("name", "fields"), PLANS, ids=label)
def test_counts_and_bytes_are_those_of_the_real_thing(
    tiny: Tiny, name: str, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = build(tiny, name).to(dtype)
    told = explain(model, LoraConfig(**fields))
    assert told.error is None
    before = bytes_of(model)
    adapted = get_peft_model(model, LoraConfig(**fields))
    assert (told.totals.trainable, told.totals.parameters) == adapted.get_nb_trainable_parameters()
    assert sum(row.parameters for row in told.rows) == told.totals.trainable
    assert told.totals.frozen_bytes == before
    assert told.totals.adapter_bytes == bytes_of(adapted) - before
    assert sum(row.nbytes for row in told.rows) == told.totals.adapter_bytes
    assert told.totals.gradient_bytes == sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    assert told.totals.file_bytes == sum(t.nbytes for t in get_peft_model_state_dict(adapted).values())


def bytes_of(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.filterwarnings(*TIES)
@pytest.mark.parametrize(("name", "fields"), PLANS, ids=label)
def test_layers_are_those_that_are_adapted(tiny: Tiny, name: str, fields: dict[str, Any]) -> None:
    model = build(tiny, name)
    told = explain(model, LoraConfig(**fields))
    adapted = get_peft_model(model, LoraConfig(**fields))
    found = {path.replace("base_layer.", "") for path, _ in adapted.base_model.layers() if "token_adapter" not in path}
    named = {row.name.rpartition(".")[0] if row.kind == "Parameter" else row.name for row in told.rows}
    assert {path.removesuffix(".base_layer") for path in found} <= named
    live = {
        n.split(".modules_to_save.")[0] for n, _ in adapted.base_model.model.named_parameters(remove_duplicate=False)
    }
    assert {row.name for row in told.rows if row.role == "saved"} == {
        path for path in live if path + ".modules_to_save" in dict(adapted.base_model.model.named_modules())
    }


def test_file_on_disk_is_the_tensors_and_a_header(llama: nn.Module, tmp_path: Path) -> None:
    told = explain(llama, LoraConfig(r=64))
    get_peft_model(llama, LoraConfig(r=64)).save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert told.totals.file_bytes < size < told.totals.file_bytes + 2_000


@pytest.mark.parametrize(("name", "fields"), PLANS, ids=label)
def test_model_is_left_alone(tiny: Tiny, name: str, fields: dict[str, Any]) -> None:
    model, config = build(tiny, name), LoraConfig(**fields)
    asked, size = copy.deepcopy(config), inputs_for(name, torch.float32)[2]
    structure, state = repr(model), {k: (t.data_ptr(), t._version) for k, t in model.state_dict().items()}
    facts = [(p.requires_grad, p.device) for p in model.parameters()]
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    random = torch.get_rng_state()
    explain(model, config, **size)
    assert repr(model) == structure
    assert {k: (t.data_ptr(), t._version) for k, t in model.state_dict().items()} == state
    assert [(p.requires_grad, p.device) for p in model.parameters()] == facts
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert config == asked
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mlp"])
def test_meta_model_is_told_as_a_real_one(tiny: Tiny, name: str) -> None:
    config = LoraConfig(target_modules="all-linear", use_dora=True)
    size = {"batch": 2} if name == "mlp" else {"batch": 2, "tokens": 6}
    real = tiny(name)
    if name in ("gpt2", "bert"):  # attention with dropout is fused everywhere but on the CPU
        size = {}
    with torch.device("meta"):
        empty = type(real)(real.config) if name != "mlp" else type(real)()
    assert explain(empty, config, **size).to_dict() == explain(real, config, **size).to_dict()


def test_second_adapter_in_a_users_own_model(tiny: Tiny) -> None:
    model = tiny("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "k_proj"]), model, "first")
    second = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    told = explain(model, second, batch=1, tokens=4)
    assert told.activations_method == "traced"
    inject_adapter_in_model(second, model, "second")
    assert told.totals.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told.totals.parameters == sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- activations


class Held:
    """Stands for a saved tensor for as long as autograd keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], tables: tuple[str, ...] = ()) -> int:
    """Bytes that a forward keeps for backward; gradients flow into what the ``tables`` give."""
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(t: Tensor) -> Held:
        one = Held(t)
        held.add(one)
        return one

    def lead_on(module: nn.Module, inputs: Any, out: Tensor) -> None:
        if not out.requires_grad:
            out.requires_grad_()

    hooks = [model.get_submodule(table).register_forward_hook(lead_on) for table in tables]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        out = model(*args, **kwargs)
    sizes = {s.data_ptr(): s.nbytes() for s in (one.tensor.untyped_storage() for one in held)}
    del out
    for t in (*model.parameters(), *model.buffers()):
        sizes.pop(t.untyped_storage().data_ptr(), None)
    for hook in hooks:
        hook.remove()
    return sum(sizes.values())


TABLES = {
    "llama": ("model.embed_tokens",),
    "tied": ("model.embed_tokens",),
    "experts": ("model.embed_tokens",),
    "gpt2": ("transformer.wte",),
    "bert": ("bert.embeddings.word_embeddings",),
    "t5": ("encoder.embed_tokens", "decoder.embed_tokens"),
}
TARGETS: dict[str, Any] = {
    "mlp": ["lin0", "lin1"],
    "convnet": ["conv0", "conv1"],
    "mixed": ["head"],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lora_dropout": 0.1},
    {"use_dora": True},
    {"use_dora": True, "lora_dropout": 0.1},
]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (0, 2)]}),
    ("experts", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5], "modules_to_save": ["lm_head"]}),
    ("bert", {"task_type": "SEQ_CLS", "bias": "all"}),
    ("gpt2", {"target_modules": "all-linear", "lora_bias": True}),
    ("mixed", {"target_modules": ["attention"]}),
    ("mixed", {"target_modules": ["head"], "target_parameters": ["stack_EOI", "gate_OI"]}),
]
CASES = [
    *(
        (name, TARGETS.get(name, "all-linear"), option)
        for name in ("llama", "bert", "mlp", "convnet")
        for option in OPTIONS
    ),
    *((name, "all-linear", OPTIONS[1]) for name in ("gpt2", "t5")),
]
ALL_CASES = [*((name, {"target_modules": targets, **option}) for name, targets, option in CASES), *MORE]


def inputs_for(name: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor], dict[str, Any]]:
    """(args, kwargs) of a real call, and how `explain` is told of it."""
    if name in TABLES:
        ids_BT = torch.full((3, 24), 5)
        extra = {"decoder_input_ids": ids_BT} if name == "t5" else {}
        return (), {"input_ids": ids_BT, **extra}, {"batch": 3, "tokens": 24}
    x = torch.randn(*{"mlp": (3, 10), "convnet": (3, 3, 8, 8), "mixed": (3, 8)}[name], dtype=dtype)
    return (x,), {}, {"batch": 3} if name == "mlp" else {"example": x}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", *TIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize(("name", "fields"), ALL_CASES, ids=label)
def test_activations_are_what_a_run_keeps(tiny: Tiny, name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(tiny, name).to(dtype).train()
    args, kwargs, size = inputs_for(name, dtype)
    told = explain(model, LoraConfig(**fields), **size)
    assert told.activations_method == "traced", told.notes
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**fields)).base_model.model
    assert told.totals.activation_bytes == pytest.approx(kept(adapted, args, kwargs), rel=0.02, abs=32)
    leading = tuple(t.clone().requires_grad_() for t in args)
    tables = TABLES.get(name, ())
    if "layer_replication" in fields:
        model = get_peft_model(model, LoraConfig(**fields)).unload().train()
    above = kept(adapted, leading, kwargs, tables) - kept(model.requires_grad_(False), leading, kwargs, tables)
    assert told.totals.added_activation_bytes == pytest.approx(above, rel=0.02)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_a_meta_model_is_told_for_the_device_that_is_named(tiny: Tiny, name: str) -> None:
    model = build(tiny, name).train()
    config = LoraConfig(target_modules="all-linear", lora_dropout=0.1)
    args, kwargs, size = inputs_for(name, torch.float32)
    measured = kept(get_peft_model(copy.deepcopy(model), config).base_model.model, args, kwargs)
    empty = model.to("meta")
    here = explain(empty, config, device="cpu", **size).totals
    elsewhere = explain(empty, config, device=torch.device("cuda"), **size).totals
    assert here.activation_bytes == pytest.approx(measured, rel=0.02)
    assert explain(empty, config, **size).totals == elsewhere
    assert (elsewhere.activation_bytes or 0) < 0.95 * measured  # no probabilities of attention
    with pytest.raises(ConfigError, match="'cqu'"):
        explain(empty, config, device="cqu")


class Drawing(nn.Module):
    """Its forward draws a number, as models that drop whole layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.fc(x_BI) * torch.rand(1).item()


def test_generator_is_left_alone() -> None:
    model, random = Drawing(), torch.get_rng_state()
    assert explain(model, LoraConfig(target_modules=["fc"]), batch=2).activations_method == "traced"
    assert torch.equal(torch.get_rng_state(), random)


def test_longer_rows_keep_more(llama: nn.Module) -> None:
    short, long = (explain(llama, LoraConfig(), batch=2, tokens=n).totals for n in (8, 16))
    assert short.added_activation_bytes is not None
    assert long.added_activation_bytes == 2 * short.added_activation_bytes


def test_loss_is_counted_where_labels_are_given(llama: nn.Module, tokens_BT: Tensor) -> None:
    without = explain(llama, LoraConfig(), example={"input_ids": tokens_BT})
    with_loss = explain(llama, LoraConfig(), example={"input_ids": tokens_BT, "labels": tokens_BT})
    assert without.activations_method == with_loss.activations_method == "traced"
    assert without.notes == ("activations are those of the forward, without a loss",)
    assert with_loss.notes == ()
    assert (with_loss.totals.activation_bytes or 0) > (without.totals.activation_bytes or 0)
    assert with_loss.totals.added_activation_bytes == without.totals.added_activation_bytes


@pytest.mark.parametrize(
    "example",
    [torch.ones(2, 10), (torch.ones(2, 10),), {"x_BI": torch.ones(2, 10)}, ((torch.ones(2, 10),), {})],
    ids=["tensor", "tuple", "dict", "both"],
)
def test_example_in_every_form(mlp: nn.Module, example: Any) -> None:
    told = explain(mlp, LoraConfig(target_modules=["lin1"]), example=example)
    assert told.totals == explain(mlp, LoraConfig(target_modules=["lin1"]), batch=2).totals


class Peeking(nn.Module):
    """Its forward asks for a number, which a meta tensor does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.k_proj = nn.Linear(16, 24)

    def forward(self, x_BTI: Tensor) -> tuple[Tensor, Tensor]:
        x_BTI = x_BTI * x_BTI.abs().max().item()
        return self.q_proj(x_BTI), self.k_proj(x_BTI)


@pytest.mark.parametrize(
    ("model", "targets", "size", "reason"),
    [
        (Peeking(), "all-linear", {"batch": 4, "tokens": 32}, "cannot be called on meta tensors"),
        (nn.Sequential(nn.Linear(10, 20)), ["0"], {"example": torch.ones(2, 3)}, "reduction dim"),
    ],
)
def test_why_activations_are_not_known(model: nn.Module, targets: Any, size: dict[str, Any], reason: str) -> None:
    told = explain(model, LoraConfig(target_modules=targets), **size)
    assert told.activations_method is None
    assert (told.totals.activation_bytes, told.totals.added_activation_bytes) == (None, None)
    assert reason in told.notes[0]
    assert reason in str(told)


@pytest.mark.parametrize(("name", "words"), [("convnet", "give example="), ("llama", "give tokens= too")])
def test_what_a_model_reads_has_to_be_told(tiny: Tiny, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        explain(tiny(name), LoraConfig(target_modules=TARGETS.get(name)), batch=2)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointing_is_mentioned(llama: nn.Module) -> None:
    plain = explain(llama, LoraConfig(), batch=1, tokens=8)
    llama.gradient_checkpointing_enable()
    told = explain(llama, LoraConfig(), batch=1, tokens=8)
    assert told.activations_method == "traced"
    assert told.totals.added_activation_bytes == plain.totals.added_activation_bytes
    assert told.notes[0].startswith("gradient checkpointing is on")
    assert llama.model.gradient_checkpointing


def test_without_sizes_nothing_is_traced(llama: nn.Module) -> None:
    told = explain(llama, LoraConfig())
    assert (told.activations_method, told.totals.activation_bytes, told.totals.added_activation_bytes) == (None,) * 3


# ---------------------------------------------------------------- optimisers


# explain's name -> the Trainer's
TRAINERS = {"adamw": "adamw_torch", "adam": "adamw_torch", "sgd_momentum": "sgd", "lion": "lion_32bit"}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", *TIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.bnb if "lion" in n or "8bit" in n else ()) for n in OPTIMIZERS]
)
def test_states_are_what_a_step_of_the_trainer_makes(llama: nn.Module, name: str, dtype: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = llama.to(dtype)
    fields = {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 100},  # 6,400 numbers, enough for 8 bits
        "modules_to_save": ["norm", "embed_tokens"],
    }
    told = explain(model, LoraConfig(**fields), optimizer=name, autocast_adapter_dtype=False)
    adapted = get_peft_model(model, LoraConfig(**fields), autocast_adapter_dtype=False)
    args = TrainingArguments(tmp_path, optim=TRAINERS.get(name, name), use_cpu=True, report_to=[])
    optimizer = Trainer(adapted, args).create_optimizer()
    if name == "sgd_momentum":
        for group in optimizer.param_groups:
            group["momentum"] = 0.9
    for p in adapted.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    tensors = [t for s in optimizer.state.values() for k, t in s.items() if isinstance(t, Tensor) and "qmap" not in k]
    assert told.totals.optimizer_bytes == sum(t.nbytes for t in tensors if t.dim())


def test_states_of_adapters_of_before(mlp: nn.Module) -> None:
    fields = {"target_modules": ["lin0", "lin1"]}
    alone = explain(mlp, LoraConfig(**fields), optimizer="adafactor").totals.optimizer_bytes
    inject_adapter_in_model(LoraConfig(**fields), mlp, "first")
    assert explain(mlp, LoraConfig(**fields), optimizer="adafactor").totals.optimizer_bytes == 2 * alone


# ---------------------------------------------------------------- what it says


def test_entries_that_match_nothing_are_named(llama: nn.Module) -> None:
    told = explain(llama, LoraConfig(target_modules=["q_prj", "v_proj"]))
    assert told.patterns == {"q_prj": 0, "v_proj": 2}
    assert [entry for entry, _ in told.unmatched] == ["q_prj"]
    assert told.unmatched[0][1].startswith("; closest: q_proj")
    sentence = f"'q_prj' in target_modules matched 0 of {told.modules} modules; closest: q_proj"
    assert told.warnings[0].startswith(sentence)
    assert sentence in str(told)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"target_modules": ["q_prj"]}, NoMatchingPeftModuleError, "closest: q_proj"),
        ({"target_modules": ["layers"]}, UnsupportedLayerError, "'layers'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["layers"]}, PlanError, "modules_to_save"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embd": [1]}}, PlanError, "'embd'"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [999]}, ConfigError, "999"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": []}, ConfigError, "some, different"),
    ],
)
def test_what_injection_would_raise_is_shown(
    llama: nn.Module, fields: dict[str, Any], kind: type[Exception], words: str
) -> None:
    told = explain(llama, LoraConfig(**fields), batch=1, tokens=4)
    assert isinstance(told.error, kind)
    assert words in str(told.error)
    assert str(told.error) in str(told)
    assert type(told.error).__name__ in str(told)
    assert told.rows == ()
    with pytest.raises(kind) as raised:
        get_peft_model(llama, LoraConfig(**fields))
    assert str(raised.value) == str(told.error)


def test_adapted_model_is_refused_as_injection_refuses_it(mlp: nn.Module) -> None:
    config = LoraConfig(target_modules=["lin0"])
    told = explain(PeftModel(mlp, config), config)
    assert isinstance(told.error, PlanError)
    assert "get_base_model" in str(told)


@pytest.mark.parametrize(
    ("model", "config", "others", "words"),
    [
        ("mlp", LoraConfig(), {}, "torch.nn.Module"),
        (nn.Linear(2, 2), {"r": 8}, {}, "LoraConfig"),
        (nn.Linear(2, 2), LoraConfig(), {"batch": 0}, "batch"),
        (nn.Linear(2, 2), LoraConfig(), {"batch": 2, "tokens": 1.5}, "tokens"),
        (nn.Linear(2, 2), LoraConfig(), {"tokens": 4}, "batch="),
        (nn.Linear(2, 2), LoraConfig(), {"optimizer": "adamv"}, "adamw, adam, sgd"),
        (nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), {"example": 3}, "example"),
    ],
)
def test_wrong_arguments_are_raised(model: Any, config: Any, others: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        explain(model, config, **others)


def test_why_each_layer(llama: nn.Module) -> None:
    told = explain(
        llama,
        LoraConfig(
            r=4,
            target_modules=["q_proj", "model.layers.0.mlp.up_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"up_proj": 5},
            modules_to_save=["lm_head"],
        ),
    )
    by_name = {row.name: row for row in told.rows}
    assert by_name["model.layers.0.self_attn.q_proj"].reason == "ends with 'q_proj' in target_modules"
    assert by_name["model.layers.0.self_attn.q_proj"].shape == (32, 32)
    assert by_name["model.layers.0.self_attn.q_proj"].values == {"r": 4, "lora_alpha": 8}
    assert by_name["model.layers.1.self_attn.q_proj"].values["r"] == 2
    assert by_name["model.layers.0.mlp.up_proj"].reason == "named in target_modules"
    assert by_name["model.layers.0.mlp.up_proj"].values["lora_alpha"] == 5
    assert by_name["lm_head"].role == "saved"
    assert by_name["lm_head"].parameters == 64 * 32


def test_why_by_another_name() -> None:
    model = nn.Sequential()
    model.first = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model.layers = nn.ModuleList([model.first])
    fields = {"target_modules": ["0.fc"], "modules_to_save": ["layers.0.norm"]}
    by_name = {row.name: row.reason for row in explain(model, LoraConfig(**fields)).rows}
    assert by_name["first.fc"] == "ends with '0.fc' in target_modules, as 'layers.0.fc'"
    assert by_name["first.norm"] == "trained whole: named in modules_to_save, as 'layers.0.norm'"


def test_why_each_parameter_and_part() -> None:
    told = explain(Mixed(), LoraConfig(target_modules=["attention"], target_parameters=["stack_EOI", "gate_OI"]))
    by_name = {row.name: row for row in told.rows}
    assert sorted(by_name) == ["attention", "attention.out_proj", "experts.gate_OI", "experts.stack_EOI"]
    assert by_name["experts.stack_EOI"].shape == (2, 8, 8)
    assert by_name["experts.stack_EOI"].reason == "ends with 'stack_EOI' in target_parameters"
    assert "attention" in by_name["attention.out_proj"].reason


def test_what_is_left_out_and_why(llama: nn.Module) -> None:
    told = explain(llama, LoraConfig(target_modules="all-linear", exclude_modules=["q_proj"]))
    reasons = {skip.name: skip.reason for skip in told.skipped}
    assert "output head" in reasons["lm_head"]
    assert reasons["model.layers.0.self_attn.q_proj"] == "'q_proj' in exclude_modules"
    assert "left out: 2 x q_proj: 'q_proj' in exclude_modules" in str(told)
    assert "left out: lm_head: the output head" in str(told)


def test_as_plain_values(llama: nn.Module) -> None:
    told = explain(llama, LoraConfig(target_modules="all-linear"), batch=1, tokens=4)
    values = json.loads(json.dumps(told.to_dict()))
    assert values["totals"]["trainable"] == told.totals.trainable
    assert values["rows"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert values["rows"][0]["shape"] == [32, 32]
    assert values["error"] is None
    assert len(values["rows"]) == 14
    failed = explain(llama, LoraConfig(target_modules=["nope"])).to_dict()
    assert json.loads(json.dumps(failed))["error"]["type"] == "NoMatchingPeftModuleError"


def test_text_groups_equal_layers(llama: nn.Module) -> None:
    told = explain(llama, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.*v_proj": 2}))
    lines = str(told).splitlines()
    assert lines[0] == f"LORA on LlamaForCausalLM: {told.modules} modules"
    assert lines[1].split()[:6] == ["2", "x", "q_proj", "Linear", "32x32", "r=16"]
    assert "model.layers.0.self_attn.v_proj" in lines[2]
    assert "r=2" in lines[3]


class Chain(nn.Module):
    """Never run: n linears on the meta device."""

    def __init__(self, n: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(4, 4)}) for _ in range(n))


def calls(function: Callable[[], object]) -> int:
    """How many Python functions run inside."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_work_grows_as_the_number_of_layers() -> None:
    explain(Chain(1), LoraConfig(target_modules=["up_proj"]))
    config = LoraConfig(target_modules=["up_proj"])
    few, many = (calls(partial(explain, Chain(n), config)) for n in (100, 400))
    assert many < 4.1 * few


@pytest.mark.parametrize("method", sorted(PROMPTS))
def test_prompts_are_told_as_they_will_be(llama: nn.Module, tokens_BT: Tensor, method: str) -> None:
    cls = PROMPTS[method].config
    config = cls(**{"task_type": "CAUSAL_LM", **cls.example})
    inputs = {
        "input_ids": tokens_BT,
        **({"task_ids": tokens_BT.new_zeros(len(tokens_BT))} if "MULTI" in method else {}),
    }
    told = explain(llama, config, example=inputs)
    handle = get_peft_model(llama, config).train()
    assert (told.totals.trainable, told.totals.parameters) == handle.get_nb_trainable_parameters()
    filed = get_peft_model_state_dict(handle)
    assert told.totals.file_bytes == sum(t.nbytes for t in filed.values())
    measured = kept(handle, (), inputs)
    assert told.totals.activation_bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("page", ["explain.md"])
def test_page_shows_what_is_printed(page: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        failed, tried = doctest.testfile(
            str(DOCS / page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        )
    assert tried > 3
    assert failed == 0


def test_is_an_explanation(mlp: nn.Module) -> None:
    assert isinstance(explain(mlp, LoraConfig(target_modules=["lin0"])), Explanation)
