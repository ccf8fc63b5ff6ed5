"""What the adaption prompt does beyond the laws: which layers, in whole models, beside other methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.errors import (
    ConfigError,
    FieldTypeError,
    NoMatchingPeftModuleError,
    NotMergeableError,
    PlanError,
    UnknownArchitectureError,
    UnsupportedLayerError,
)

Make = Callable[[str], nn.Module]


def config(**fields: Any) -> inlay.AdaptionPromptConfig:
    return inlay.AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM", **fields})


def tokens(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (rows, 6), generator=torch.Generator().manual_seed(5))}


def adapted(model: nn.Module, *names: str, **fields: Any) -> inlay.PeftModel:
    """With adapters that do something, each of another length."""
    handle = inlay.get_peft_model(model.eval(), config(**fields), adapter_name=names[0])
    for n, name in enumerate(names[1:], 4):
        handle.add_adapter(name, config(adapter_len=n, **fields))
    laws.disturb(handle)
    return handle.eval()


# ---------------------------------------------------------------- where it goes


@pytest.mark.parametrize("given", ["self_attn", ["self_attn"], r".*\.self_attn", "layers.1.self_attn", None], ids=str)
def test_a_name_is_a_name_and_the_last_layers_have_one(given: Any, tiny: Make) -> None:
    model = inlay.get_peft_model(tiny("llama"), config(target_modules=given))
    assert model.base_model.targeted_module_names == ["model.layers.1.self_attn"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"base_model.model.model.layers.1.self_attn.adaption_{what}.default" for what in ("prompt", "gate")
    ]


def test_files_have_one_name_as_a_string() -> None:
    assert config(target_modules=["self_attn"]).to_dict()["target_modules"] == "self_attn"
    assert config(target_modules=["attn", "self_attn"]).to_dict()["target_modules"] == {"attn", "self_attn"}
    assert config().to_dict()["target_modules"] is None


def test_fields_of_others_work_too(tiny: Make, tmp_path: Path) -> None:
    model = adapted(tiny("llama"), "default", exclude_modules=["layers.1.self_attn"], modules_to_save=["lm_head"])
    assert model.base_model.targeted_module_names == ["model.layers.0.self_attn"]
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = inlay.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    laws.close(again(**tokens(2)).logits, model(**tokens(2)).logits)


def test_explain_says_which_layers_are_left_out(tiny: Make) -> None:
    found = inlay.explain(tiny("llama"), config(adapter_layers=1), batch=2, tokens=5)
    assert [(row.name, row.kind, row.parameters) for row in found.rows] == [
        ("model.layers.1.self_attn", "Attention", 3 * 32 + 1)
    ]
    assert [(skip.name, "adapter_layers" in skip.reason) for skip in found.skipped] == [
        ("model.layers.0.self_attn", True)
    ]
    assert found.totals.added_activation_bytes > 0


@pytest.mark.parametrize(
    ("model", "fields", "error", "told"),
    [
        ("llama", {"adapter_layers": 3}, PlanError, "adapter_layers=3, and the model has 2 modules"),
        ("llama", {"adapter_len": None}, FieldTypeError, "adapter_len must be an int"),
        ("llama", {"adapter_layers": None}, FieldTypeError, "adapter_layers must be an int"),
        ("llama", {"target_modules": "mlp"}, UnsupportedLayerError, "ADAPTION_PROMPT adapts Attention"),
        ("llama", {"target_modules": "q_proj"}, UnsupportedLayerError, "which is a Linear"),
        ("llama", {"target_modules": "self_atn"}, NoMatchingPeftModuleError, "closest: self_attn"),
        ("bert", {}, UnknownArchitectureError, "layers of a kind it adapts: none"),
        ("bert", {"target_modules": "self"}, UnsupportedLayerError, "layer of another kind"),
        ("llama", {"target_modules": None, "target_parameters": ["norm.weight"]}, UnsupportedLayerError, "parameters"),
    ],
    ids=str,
)
def test_what_cannot_be(model: str, fields: dict[str, Any], error: type[Exception], told: str, tiny: Make) -> None:
    base = tiny(model)
    before, modules = laws.bits(base), [type(m) for m in base.modules()]
    with pytest.raises(error, match=told):
        inlay.get_peft_model(base, config(**fields))
    laws.same_state(laws.bits(base), before)
    assert [type(m) for m in base.modules()] == modules
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("fields", [{"adapter_len": 0}, {"adapter_layers": 0}, {"adapter_layers": -1}], ids=str)
def test_no_prompt_at_all_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be in"):
        config(**fields)


def test_attention_to_an_encoder_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, add_cross_attention=True))
    with pytest.raises(UnsupportedLayerError, match=r"crossattention .*encoder"):
        inlay.get_peft_model(base, config(target_modules="crossattention"))


def test_merging_says_why_not(tiny: Make) -> None:
    model = adapted(tiny("llama"), "default")
    before = laws.bits(model)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn")
    for act in (model.merge_adapter, model.merge_and_unload, lambda: layer.get_delta_weight("default")):
        with pytest.raises(NotMergeableError):
            act()
    laws.same_state(laws.bits(model), before)
    x = tokens(2)
    laws.same_bits(model.unload()(**x).logits, tiny("llama").eval().requires_grad_(False)(**x).logits)


@pytest.mark.parametrize("positional", [False, True])
def test_called_either_way(positional: bool) -> None:
    model = laws.Case("ADAPTION_PROMPT", "plain", "Attention").adapted()
    x, angles = torch.randn(2, 3, 8), torch.randn(1, 3, 4)
    positions, layer = (angles.cos(), angles.sin()), model.base_model.model.m
    layer.config._attn_implementation = "eager"
    named = layer(hidden_states=x, position_embeddings=positions, attention_mask=None)
    out = layer(x, positions, None) if positional else layer(x, position_embeddings=positions, attention_mask=None)
    assert isinstance(out, tuple)
    laws.same_bits(out[0], named[0])
    laws.same_bits(out[1], layer.base_layer(x, positions, None)[1])  # whatever else there is stays


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_equal_one_by_one(name: str, tiny: Make) -> None:
    names = ["a", "__base__", "b", "a"]
    model, x = adapted(tiny(name), "a", "b", adapter_layers=2), tokens(4)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    logits, beams, one_logits, one_beams = model(**x, adapter_names=names).logits, [], [], []
    for n in (1, 2):
        beams.append(model.generate(**x, **how, num_beams=n, adapter_names=names))
    for i, one in enumerate(names):
        row = {k: t[i : i + 1] for k, t in x.items()}
        with model.disable_adapter() if one == "__base__" else model.use_adapter(one):
            one_logits.append(model(**row).logits)
            one_beams.append([model.generate(**row, **how, num_beams=n)[0] for n in (1, 2)])
    laws.close(logits, torch.cat(one_logits))
    for n in (0, 1):
        for mine, row in zip(beams[n], one_beams, strict=True):
            ended = row[n].shape[0]
            assert torch.equal(mine[:ended], row[n])
    assert len({tuple(row.flatten().tolist()) for row in logits}) == 4


@pytest.mark.bnb
def test_packed_projections() -> None:
    net = laws.Case("ADAPTION_PROMPT", "plain", "Attention").base()
    for name, layer in list(net.m.named_children()):
        setattr(net.m, name, laws.pack4(layer))
    x = torch.randn(2, 3, 8)
    expected = net(x)
    model = inlay.get_peft_model(net, config(target_modules="m", task_type=None)).eval()
    laws.close(model(x), expected)
    laws.disturb(model)
    with torch.no_grad():
        model.get_parameter("base_model.model.m.adaption_gate.default").fill_(2)
    laws.differs(model, x, expected)
    model.train()(x).sum().backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------- beside LoRA, inside the same attention

LORA = {"r": 2, "target_modules": ["q_proj", "k_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def both(model: nn.Module, first: str) -> inlay.PeftModel:
    configs: dict[str, Any] = {"prompt": config(adapter_layers=2), "lora": inlay.LoraConfig(**LORA)}
    second = "lora" if first == "prompt" else "prompt"
    handle = inlay.get_peft_model(model.eval(), configs[first], adapter_name=first, mixed=True)
    handle.add_adapter(second, configs[second])
    with torch.no_grad():  # by name: the order of the parameters is another one
        for name, p in sorted(
            laws.adapter_tensors(handle).items(), key=lambda item: item[0].replace(".base_layer", "")
        ):
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name.replace(".base_layer", ""))))
            )
    handle.set_adapter(["prompt", "lora"])
    return handle.eval()


@pytest.mark.parametrize("first", ["prompt", "lora"])
def test_beside_lora(first: str, tiny: Make, tmp_path: Path) -> None:
    model, x = both(tiny("llama"), first), tokens(3)
    expected = model(**x).logits
    laws.close(both(tiny("llama"), "prompt")(**x).logits, expected)
    alone = {}
    for name in ("prompt", "lora"):
        with model.use_adapter(name):
            alone[name] = model(**x).logits
    with model.disable_adapter():
        alone["__base__"] = model(**x).logits
    for one, two in itertools.combinations([*alone.values(), expected], 2):
        assert float((one - two).detach().abs().max()) > 1e-2
    rows = model(**x, adapter_names=list(alone)).logits
    laws.close(rows, torch.stack([logits[i] for i, logits in enumerate(alone.values())]))
    model.train()
    wanted = set(laws.adapter_tensors(model))
    assert set(laws.gradients(model, model(**x).logits)) == wanted
    model.eval().save_pretrained(tmp_path)
    keys = {name: sorted(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("prompt", "lora")}
    assert keys["prompt"][0] == "base_model.model.model.layers.0.self_attn.adaption_gate"
    assert not [key for key in keys["lora"] if "base_layer" in key]
    gathered = inlay.get_peft_model_state_dict(model, model.state_dict(), adapter_name="lora")
    assert sorted(gathered) == keys["lora"]
    for order in (["prompt", "lora"], ["lora", "prompt"]):
        again = inlay.PeftMixedModel.from_pretrained(tiny("llama"), tmp_path / order[0], adapter_name=order[0])
        again.load_adapter(tmp_path / order[1], adapter_name=order[1])
        assert again.load_report.ok
        again.set_adapter(["prompt", "lora"])
        laws.close(again(**x).logits, expected)
    model.merge_adapter(["lora"])
    laws.close(model(**x).logits, expected)
    for name in ("prompt", "lora"):
        with model.use_adapter(name):
            laws.close(model(**x).logits, alone[name])
    model.unmerge_adapter()
    plain = model.unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in tiny("llama").modules()]
    laws.close(plain(**x).logits, alone["__base__"])


def test_the_prompt_reads_the_frozen_projections(tiny: Make) -> None:
    """Also while another adapter on them is merged."""
    x, model = torch.randn(2, 4, 32), both(tiny("llama"), "prompt")
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn")
    angles = torch.randn(1, 4, 8)
    call = {"hidden_states": x, "position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}

    def run(*names: str) -> Tensor:
        with model.use_adapter(names):
            h: Tensor = layer(**call)[0]
        return h

    prompt = run("prompt") - run()
    laws.close(run("prompt", "lora") - run("lora"), prompt)
    for name in ("q_proj", "k_proj"):
        getattr(layer.base_layer, name).merge(adapter_names=["lora"])
    laws.close(run("prompt", "lora") - run("lora"), prompt)
    laws.close(run("prompt") - run(), prompt)
