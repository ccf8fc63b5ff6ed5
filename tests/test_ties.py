"""Layers that share a weight: what keeps the tie, what breaks it, and what is said of it."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import close, disturb, same_state
from sizes import TINY
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import inlay
from inlay.errors import UnsupportedLayerError

LLAMA = LlamaConfig(**(TINY | {"vocab_size": 40}), tie_word_embeddings=True)
T5 = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0)
#: by model, the layers that share the table, and one that does not
TIED = {"llama": ("embed_tokens", "lm_head", "q_proj"), "t5": ("embed_tokens", "lm_head", "q")}
TABLES = ("model.embed_tokens", "lm_head", "shared", "encoder.embed_tokens", "decoder.embed_tokens")


def build(name: str, tie: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(LLAMA if name == "llama" else T5)
    config.tie_word_embeddings = tie
    model = (LlamaForCausalLM if name == "llama" else T5ForConditionalGeneration)(config)
    return model.eval()


def run(model: nn.Module, ids_BT: Tensor) -> Tensor:
    more = {} if "llama" in model.config.model_type else {"decoder_input_ids": ids_BT[:, :3]}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids_BT, **more).logits
    return logits


def tables(model: nn.Module) -> list[Tensor]:
    modules = dict(model.named_modules())
    return [modules[name].weight for name in TABLES if name in modules]


@pytest.fixture
def ids_BT() -> Tensor:
    return torch.arange(3, 13).reshape(2, 5)


def changed(model: inlay.PeftModel) -> inlay.PeftModel:
    """With all that it trains away from where it started."""
    disturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.ones(()))
    return model.eval()


def kept(name: str, **fields: Any) -> tuple[nn.Module, inlay.PeftModel]:
    base = build(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = inlay.get_peft_model(base, inlay.LoraConfig(r=2, ensure_weight_tying=True, **fields))
    assert [w for w in told if "ti" in str(w.message)] == []
    return base, changed(model)


#: what keeps the tie, by what it asks for: names of the table, the head and another layer
KEPT: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "the table is adapted": lambda table, head, other: {"target_modules": [table, other]},
    "the head is adapted": lambda table, head, other: {"target_modules": [head, other]},
    "both are adapted": lambda table, head, other: {"target_modules": [table, head, other]},
    "the table is trained whole": lambda table, head, other: {"target_modules": [other], "modules_to_save": [table]},
    "the head is trained whole": lambda table, head, other: {"target_modules": [other], "modules_to_save": [head]},
    "tokens": lambda table, head, other: {"target_modules": [other], "trainable_token_indices": [4, 7]},
}
keeps = pytest.mark.parametrize("fields", KEPT.values(), ids=KEPT)
models = pytest.mark.parametrize("name", TIED)


@keeps
@models
def test_a_tie_that_is_kept_is_there_after_merging(name: str, fields: Any, ids_BT: Tensor) -> None:
    base, model = kept(name, **fields(*TIED[name]))
    plain = tables(build(name))[0]
    expected = run(model, ids_BT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    close(run(merged, ids_BT), expected)
    assert merged is base
    assert merged.config.tie_word_embeddings is True
    assert len({id(W_VD) for W_VD in tables(merged)}) == 1
    assert not torch.equal(tables(merged)[0], plain)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@keeps
@models
def test_a_tie_that_is_kept_is_saved_and_loaded(name: str, fields: Any, ids_BT: Tensor, tmp_path: Path) -> None:
    _, model = kept(name, **fields(*TIED[name]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    again = inlay.PeftModel.from_pretrained(build(name), tmp_path)
    close(run(again, ids_BT), run(model, ids_BT))
    assert again.get_nb_trainable_parameters()[1] == model.get_nb_trainable_parameters()[1]


@models
def test_all_that_are_tied_have_one_set_of_parameters(name: str) -> None:
    table, head, _ = TIED[name]
    for targets in ([table], [head], [table, head]):
        _, model = kept(name, target_modules=targets)
        assert model.get_nb_trainable_parameters()[0] == 2 * (16 + 40)


@models
def test_tables_that_follow_a_table_see_its_factors_as_they_are(name: str, ids_BT: Tensor) -> None:
    _, model = kept(name, target_modules=[TIED[name][0]])
    inner = model.base_model.model
    layers = {path: module for path, module in inner.named_modules() if path in TABLES}
    expected = next(layer for path, layer in layers.items() if path.endswith("embed_tokens"))(ids_BT)
    for layer in layers.values():
        if isinstance(layer.get_base_layer(), nn.Embedding):
            close(layer(ids_BT), expected)


#: what breaks it
BROKEN: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    name: KEPT[name] for name in KEPT if name not in ("tokens", "both are adapted")
}


@pytest.mark.parametrize("fields", BROKEN.values(), ids=BROKEN)
@models
def test_a_tie_that_is_broken_is_told_of_when_made_and_when_merged(name: str, fields: Any, ids_BT: Tensor) -> None:
    with pytest.warns(inlay.PeftWarning, match="has `tie_word_embeddings=True`, and '[a-z._]*' is adapted apart"):
        model = inlay.get_peft_model(build(name), inlay.LoraConfig(r=2, **fields(*TIED[name])))
    expected = run(changed(model), ids_BT)
    with pytest.warns(inlay.PeftWarning, match="config.tie_word_embeddings is False now"):
        merged = model.merge_and_unload()
    close(run(merged, ids_BT), expected)
    assert merged.config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("tie", "more", "told"),
    [
        (False, {}, "no tied modules are in the model"),
        (True, {}, "no tied modules are in modules_to_save or target_modules"),
        (True, {"modules_to_save": ["norm"]}, "no tied modules are in modules_to_save or target_modules"),
    ],
)
def test_a_tie_to_be_kept_that_is_not_there(tie: bool, more: dict[str, Any], told: str) -> None:
    config = inlay.LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True, **more)
    with pytest.warns(inlay.PeftWarning, match=told):
        inlay.get_peft_model(build("llama", tie), config)


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
def test_tokens_of_what_is_trained_whole_are_refused(whole: str) -> None:
    config = inlay.LoraConfig(
        target_modules=["q_proj"], modules_to_save=[whole], trainable_token_indices=[3], ensure_weight_tying=True
    )
    base = build("llama")
    with pytest.raises(inlay.PeftError, match="trained whole, and has trained tokens"):
        inlay.get_peft_model(base, config)
    assert type(base.lm_head) is nn.Linear


@pytest.mark.parametrize("kept", [False, True])
def test_replicated_layers_are_not_tied(kept: bool) -> None:
    base = build("llama")
    targets = ["q_proj", "embed_tokens"] if kept else ["q_proj"]
    config = inlay.LoraConfig(
        r=2, target_modules=targets, layer_replication=[(0, 2), (1, 2)], ensure_weight_tying=kept
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inlay.get_peft_model(base, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "q_proj.lora_A" in name]
    assert len(trained) == 3


def test_other_tokens_in_the_head_than_in_the_table_it_is_to_be_tied_to_are_refused() -> None:
    tokens = {"trainable_token_indices": {"lm_head": [1, 2], "embed_tokens": [3]}, "target_modules": ["q_proj"]}
    with pytest.raises(inlay.PeftError, match=r"other tokens for model\.embed_tokens than for lm_head"):
        inlay.get_peft_model(build("llama"), inlay.LoraConfig(ensure_weight_tying=True, **tokens))
    inlay.get_peft_model(build("llama"), inlay.LoraConfig(**tokens))
    with pytest.warns(inlay.PeftWarning, match="no tied modules"):
        inlay.get_peft_model(build("llama", tie=False), inlay.LoraConfig(ensure_weight_tying=True, **tokens))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_magnitudes_cannot_be_tied(target: str) -> None:
    config = inlay.LoraConfig(target_modules=[target], use_dora=True, ensure_weight_tying=True)
    with pytest.raises(inlay.PeftError, match="magnitudes of their own"):
        inlay.get_peft_model(build("llama"), config)


@pytest.mark.parametrize("first", [False, True])
def test_a_layer_follows_for_all_of_its_adapters_or_for_none(first: bool, ids_BT: Tensor) -> None:
    def config(tied: bool, r: int = 2) -> inlay.LoraConfig:
        return inlay.LoraConfig(r=r, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=tied)

    model = inlay.get_peft_model(build("llama"), config(first))
    before = sorted(model.state_dict())
    with pytest.raises(inlay.PeftError, match="for all of its adapters, or for none"):
        model.add_adapter("other", config(not first))
    assert sorted(model.state_dict()) == before
    model.add_adapter("other", config(first, r=3))
    model.set_adapter("other")
    disturb(model)
    expected = run(model.eval(), ids_BT)
    model.delete_adapter("default")
    close(run(model, ids_BT), expected)


#: the ways in which an adapter can train a table or the head that is tied to it
WAYS: dict[str, dict[str, Any]] = {
    "adapted": {"target_modules": ["embed_tokens"]},
    "by parameter": {"target_modules": [], "target_parameters": ["embed_tokens.weight"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head adapted": {"target_modules": ["lm_head"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
# Where the two are different layers, each of which can be trained by itself.
APART = [
    *({table, head} for table in ("adapted", "by parameter", "whole") for head in ("head adapted", "head whole")),
    *({table, "tokens of the head"} for table in ("adapted", "by parameter", "whole")),
]


@pytest.mark.filterwarnings("ignore:Model has:UserWarning")
@pytest.mark.parametrize("pair", list(itertools.permutations(WAYS, 2)), ids="+".join)
def test_a_layer_is_trained_in_one_way_by_all_adapters(pair: tuple[str, str], ids_BT: Tensor) -> None:
    base = build("llama")
    wanted, weights = run(base, ids_BT), {name: t.clone() for name, t in base.state_dict().items()}
    first, second = (inlay.LoraConfig(r=2, **WAYS[way]) for way in pair)
    model = inlay.get_peft_model(base, first, "first")
    if set(pair) not in APART:
        names = set(model.state_dict())
        with pytest.raises(UnsupportedLayerError):
            model.add_adapter("second", second)
        assert set(model.state_dict()) == names
        return
    model.add_adapter("second", second)
    disturb(model)
    for name in ("first", "second"):
        model.set_adapter(name)
        before = run(model, ids_BT)
        model.merge_adapter()
        close(run(model, ids_BT), before)
        with model.disable_adapter():
            close(run(model, ids_BT), wanted)
        model.unmerge_adapter()
    same_state(model.unload().state_dict(), weights)
