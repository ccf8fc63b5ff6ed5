"""Activated LoRA beside PEFT's: configs, keys, numbers, files both ways, outputs, generated tokens and gradients."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.helpers import Pair, assert_equal_tensors, base, equalise, make_pair, peft, peft_may_warn
from safetensors.torch import load_file
from torch import Tensor

import inlay
from inlay.invocation import calculate_alora_offsets

JUDGE, CRITIC = [7, 8], [9, 7, 10]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
WRITE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
#: fields beside the targets and the tokens
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5, "r": 3},
    "patterns": {"rank_pattern": {"q_proj|c_attn": 5}, "alpha_pattern": {"v_proj|c_fc": 3}},
    "bias": {"lora_bias": True},
}

each_model = pytest.mark.parametrize("name", TARGETS)
each_option = pytest.mark.parametrize("option", OPTIONS)


def fields(name: str, tokens: list[int] = JUDGE, **more: Any) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": TARGETS[name],
        "alora_invocation_tokens": tokens,
        "fan_in_fan_out": name == "gpt2",
        **more,
    }


def pair_of(name: str, option: str = "plain", more: dict[str, Any] | None = None) -> Pair:
    return make_pair(name, fields(name, **OPTIONS[option]), more)


def batch(*starts: int | None, length: int = 10) -> dict[str, Tensor]:
    """Rows with invocations at these places, and a mask of ones: PEFT seeks in padding too."""
    ids = torch.randint(20, 64, (len(starts), length), generator=torch.Generator().manual_seed(3))
    for row, start in zip(ids, starts, strict=True):
        if start is not None:
            row[start : start + 2] = torch.tensor(JUDGE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(autouse=True)
def _rows_without_invocation_are_told_of() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have no invocation")
        yield


def logits(model: Any, **call: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**copy.deepcopy(call)).logits
    return out


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


# ---------------------------------------------------------------- what stands in files


@each_model
@each_option
def test_configs_keys_and_numbers(name: str, option: str, tmp_path: Path) -> None:
    pair = pair_of(name, option)
    with peft_may_warn():
        pair.theirs.save_pretrained(tmp_path / "theirs")
    pair.ours.save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    assert theirs["alora_invocation_tokens"] == ours["alora_invocation_tokens"] == JUDGE
    for config in (theirs, ours):
        config["target_modules"] = sorted(config["target_modules"])
        config.pop("peft_version")
    assert ours == theirs
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert_equal_tensors(*files)
    live = [{n: p for n, p in model.named_parameters() if ".lora_" in n} for model in (pair.ours, pair.theirs)]
    assert_equal_tensors(*live)


@each_model
@each_option
def test_files_both_ways(name: str, option: str, tmp_path: Path) -> None:
    pair = pair_of(name, option)
    call = batch(2, 5, None)
    with peft_may_warn():
        pair.theirs.save_pretrained(tmp_path / "theirs")
        wanted = logits(pair.theirs, **call)
    loaded = inlay.PeftModel.from_pretrained(base(name), tmp_path / "theirs").eval()
    assert loaded.peft_config["default"].alora_invocation_tokens == JUDGE
    assert_close(logits(loaded, **call), wanted)
    pair.ours.save_pretrained(tmp_path / "ours")
    with peft_may_warn():
        loaded = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours").eval()
        assert loaded.peft_config["default"].alora_invocation_tokens == JUDGE
        assert_close(logits(loaded, **call), wanted)


# ---------------------------------------------------------------- what comes out


@each_model
@each_option
def test_outputs(name: str, option: str) -> None:
    pair = pair_of(name, option)
    for call in (batch(2, 5, None), batch(0, 8), batch(7), batch(2, None, length=4)):
        theirs, ours = pair.each(lambda m, call=call: logits(m, **call))
        assert_close(ours, theirs)
    frozen = logits(base(name), **batch(2, 5))
    assert float((logits(pair.ours, **batch(2, 5)) - frozen).abs().max()) > 1e-2


@each_model
def test_outputs_with_offsets(name: str) -> None:
    pair = pair_of(name)
    call = batch(2, 5, None)
    for offsets in ([3, 4, 5], [None, 10, 1], [0, 20, None]):
        theirs, ours = pair.each(lambda m, offsets=offsets: logits(m, **call, alora_offsets=offsets))
        assert_close(ours, theirs)
        theirs, ours = pair.each(lambda m, offsets=offsets: m.generate(**call, **WRITE, alora_offsets=offsets))
        assert ours.tolist() == theirs.tolist()


@each_model
def test_outputs_of_embeddings(name: str) -> None:
    pair = pair_of(name)
    x = base(name).get_input_embeddings()(batch(2, 5)["input_ids"]).detach()
    theirs, ours = pair.each(lambda m: logits(m, inputs_embeds=x, alora_offsets=[8, 5]))
    assert_close(ours, theirs)
    theirs, ours = pair.each(lambda m: logits(m, inputs_embeds=x))
    assert_close(ours, theirs)
    assert_close(ours, logits(base(name), inputs_embeds=x))


@each_model
@each_option
def test_greedy_generate(name: str, option: str) -> None:
    pair = pair_of(name, option)
    for call in (batch(2, 5, None), batch(8), batch(0, 0)):
        theirs, ours = pair.each(lambda m, call=call: m.generate(**call, **WRITE))
        assert ours.tolist() == theirs.tolist()
    assert ours.tolist() != base(name).generate(**call, **WRITE).tolist()


@each_model
def test_generate_from_the_bases_cache(name: str) -> None:
    from transformers import DynamicCache

    pair = pair_of(name)
    call = batch(6, 7)

    def go_on(model: Any) -> Any:
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=call["input_ids"][:, :6], past_key_values=cache)
        return model.generate(**call, **WRITE, past_key_values=cache)

    theirs, ours = pair.each(go_on)
    assert ours.tolist() == theirs.tolist() == pair.ours.generate(**call, **WRITE).tolist()


@each_model
def test_rows_of_several_adapters(name: str) -> None:
    plain = {k: v for k, v in fields(name).items() if k != "alora_invocation_tokens"}
    pair = pair_of(name, more={"critic": fields(name, CRITIC), "plain": plain})
    call = batch(2, 3, 5, 4)
    call["input_ids"][1, 4:7] = torch.tensor(CRITIC)
    for names in (["default", "critic", "__base__", "default"], ["critic", "critic", "critic", "critic"]):
        theirs, ours = pair.each(lambda m, names=names: logits(m, **call, adapter_names=names))
        assert_close(ours, theirs)
        theirs, ours = pair.each(lambda m, names=names: m.generate(**call, **WRITE, adapter_names=names))
        assert ours.tolist() == theirs.tolist()
    names = ["plain", "critic", "default", "plain"]
    theirs, ours = pair.each(lambda m: logits(m, **call, adapter_names=names))
    assert_close(ours, theirs)


# ---------------------------------------------------------------- training


@each_model
@each_option
def test_training_gradients(name: str, option: str) -> None:
    pair = pair_of(name, option)
    call = batch(2, 5, None)

    def gradients(model: Any) -> dict[str, Tensor]:
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.zero_grad()
        out = model(**copy.deepcopy(call), labels=call["input_ids"])
        out.loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    theirs, ours = pair.each(gradients)
    assert len(ours) >= 2 * 2 * len(TARGETS[name])
    assert_equal_tensors(ours, theirs, relative=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_gradients_under_checkpointing(reentrant: bool) -> None:
    pair = pair_of("llama")
    call = batch(2, 5)

    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        model(**copy.deepcopy(call), labels=call["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def checkpointed(model: Any) -> dict[str, Tensor]:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return gradients(model)

    stored = gradients(pair.ours.train())
    pair.theirs.train()
    with peft_may_warn():
        theirs, ours = pair.each(checkpointed)
    assert_equal_tensors(ours, stored, relative=1e-4)
    assert_equal_tensors(ours, theirs, relative=1e-4)


def test_equal_weights_were_compared() -> None:
    """Else all of the above compares two random adapters, or two fresh ones."""
    pair = pair_of("llama")
    values = equalise(pair)
    assert all(float(t.abs().max()) > 0.1 for t in values.values())


@pytest.mark.parametrize("names", [None, ["a", "b", "a", "b"]])
@pytest.mark.parametrize("active", ["a", "b"])
def test_offsets_are_told_alike(active: str, names: list[str] | None) -> None:
    from peft.tuners.lora.variants import calculate_alora_offsets as theirs

    ids_BL = torch.tensor([[5, 1, 2, 3], [1, 2, 1, 2], [0, 0, 0, 0], [9, 9, 1, 2]])
    told = []
    for library, calculate in ((peft, theirs), (inlay, calculate_alora_offsets)):
        plain, activated = (
            library.LoraConfig(),
            library.LoraConfig(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
        )
        told.append(calculate({"a": activated, "b": plain}, active, ids_BL, adapter_names=names))
    assert told[0] == told[1]
