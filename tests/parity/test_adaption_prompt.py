"""The adaption prompt beside PEFT's: outputs, loss, gradients, generated tokens, files, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUILDERS
from parity.helpers import (
    CONFIGS,
    Pair,
    assert_equal_tensors,
    config_of,
    equalise,
    flat,
    peft,
    peft_may_warn,
    without_dropout,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay

FIELDS = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 5, "adapter_layers": 2, "task_type": "CAUSAL_LM"}


def build(name: str) -> nn.Module:
    """Three layers; of "llama" two heads share each key, and "llama-biased" has biases on all projections."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(11)
    config = BUILDERS["gpt2" if name == "gpt2" else "llama"]().config
    config.num_hidden_layers = 3
    if name == "gpt2":
        config.scale_attn_by_inverse_layer_idx = True  # which the prompt does not follow, there and here
    if name == "mistral":
        known = {k: v for k, v in config.to_dict().items() if k in MistralConfig().to_dict()}
        known.pop("model_type")
        model: nn.Module = MistralForCausalLM(MistralConfig(**{**known, "sliding_window": 4}))
    else:
        config.attention_bias = name == "llama-biased"
        model = type(BUILDERS["gpt2" if name == "gpt2" else "llama"]())(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(".bias"):
                p.normal_()
    return model.eval()


def ids() -> dict[str, Tensor]:
    """Two of three rows are padded on the left."""
    tokens = torch.randint(3, 64, (3, 8), generator=torch.Generator().manual_seed(12))
    mask = torch.ones_like(tokens)
    mask[1, :2] = mask[2, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def made(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Pair:
    config = {**FIELDS, **fields}
    with peft_may_warn():
        theirs = peft.get_peft_model(build(name).to(dtype), config_of(peft, config))
    ours = inlay.get_peft_model(build(name).to(dtype), config_of(inlay, config), autocast_adapter_dtype=False)
    pair = Pair(theirs.eval(), ours.eval(), (), ids())
    equalise(pair)
    with torch.no_grad():
        for p in (p for m in pair.both() for n, p in m.named_parameters() if "adaption_gate" in n):
            p.mul_(4)
    return pair


def trained(model: nn.Module) -> dict[str, Tensor | None]:
    return {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}


def losses(pair: Pair) -> tuple[Tensor, Tensor]:
    theirs, ours = pair.each(lambda m: m(**pair.kwargs, labels=pair.kwargs["input_ids"]).loss)
    return theirs, ours


NAMES = ("llama", "llama-biased", "mistral", "gpt2")
each = pytest.mark.parametrize("name", NAMES)


@each
def test_outputs_loss_and_gradients(name: str) -> None:
    pair = made(name)
    assert type(pair.ours).__name__ == type(pair.theirs).__name__ == "PeftModelForCausalLM"
    pair.assert_equal_outputs()
    with pair.ours.disable_adapter():
        frozen = flat(pair.ours(**pair.kwargs))
    torch.testing.assert_close(frozen, flat(build(name)(**pair.kwargs)))
    assert float((frozen - pair.outputs()[1]).detach().abs().max()) > 0.05
    theirs, ours = losses(pair)
    torch.testing.assert_close(ours, theirs)
    for loss in (theirs, ours):
        loss.backward()
    theirs, ours = pair.each(trained)
    assert len(ours) == 4
    assert all(grad.abs().sum() > 0 for grad in ours.values())
    assert_equal_tensors(ours, theirs, relative=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@each
def test_generated_tokens(name: str, options: dict[str, Any]) -> None:
    pair = made(name)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **pair.kwargs, **options}
    theirs, ours = pair.each(lambda m: m.generate(**how))
    assert torch.equal(ours, theirs)
    with pair.ours.disable_adapter():
        frozen = pair.ours.generate(**how)
    assert not torch.equal(frozen, ours)


@pytest.mark.parametrize("reentrant", [True, False])
@each
def test_checkpointing(name: str, reentrant: bool) -> None:
    pair = made(name)
    for loss in losses(pair):
        loss.backward()
    stored = {n: grad.clone() for n, grad in trained(pair.theirs).items() if grad is not None}
    model = pair.ours.get_base_model()
    without_dropout(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    pair.ours.zero_grad()
    pair.ours.train()(**pair.kwargs, labels=pair.kwargs["input_ids"], use_cache=False).loss.backward()
    assert_equal_tensors({n: g for n, g in trained(pair.ours).items() if g is not None}, stored, relative=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_16_bits(name: str) -> None:
    pair = made(name, torch.bfloat16)
    theirs, ours = pair.outputs()
    assert torch.equal(ours, theirs)
    wide = inlay.get_peft_model(build(name).bfloat16(), config_of(inlay, FIELDS)).eval()
    inlay.set_peft_model_state_dict(wide, inlay.get_peft_model_state_dict(pair.ours))
    assert {p.dtype for p in wide.parameters() if p.requires_grad} == {torch.float32}
    assert float((flat(wide(**pair.kwargs)) - theirs).detach().abs().max() / theirs.detach().abs().max()) < 0.03


@each
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    pair = made(name)
    folders = {"peft": tmp_path / "theirs", "inlay": tmp_path / "ours"}
    pair.each(lambda m: m.save_pretrained(folders[type(m).__module__.partition(".")[0]]))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in reversed(folders.values()))
    assert_equal_tensors(ours, theirs)
    assert {k.rpartition(".")[2] for k in ours} == {"adaption_prompt", "adaption_gate"}
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in reversed(folders.values()))
    assert ours == theirs
    there = peft.PeftModel.from_pretrained(build(name), folders["inlay"]).eval()
    here = inlay.PeftModel.from_pretrained(build(name), folders["peft"])
    assert here.load_report.ok
    for one in (Pair(pair.theirs, here, (), ids()), Pair(there, pair.ours, (), ids())):
        one.assert_equal_outputs(1e-6)


def test_a_second_adapter() -> None:
    pair, outs = made("llama"), []
    fields = {**FIELDS, "adapter_len": 3, "adapter_layers": 1}
    for library, model in zip((peft, inlay), pair.both(), strict=True):
        model.add_adapter("other", config_of(library, fields))
        model.set_adapter("other")  # there tensors have no adapter's name, and are given to the active one
    equalise(pair, "other")
    for name in ("other", "default", "other"):
        pair.each(lambda m, name=name: m.set_adapter(name))
        pair.assert_equal_outputs()
        outs.append(pair.outputs()[1])
    assert float((outs[0] - outs[1]).detach().abs().max()) > 0.01
    assert torch.equal(outs[0], outs[2])


def test_fresh_adapters_are_alike() -> None:
    for library in (peft, inlay):
        torch.manual_seed(3)
        model = library.get_peft_model(build("llama"), config_of(library, {**FIELDS, "adapter_len": 200}))
        start = library.get_peft_model_state_dict(model)
        for key, t in start.items():
            if key.endswith("gate"):
                assert t.tolist() == [0]
            else:
                assert (abs(float(t.std()) - 1), abs(float(t.mean()))) < (0.05, 0.05)
        with peft_may_warn():
            torch.testing.assert_close(flat(model.eval()(**ids())), flat(build("llama")(**ids())))


def test_fields() -> None:
    assert CONFIGS["ADAPTION_PROMPT"] == "AdaptionPromptConfig"
    theirs, ours = (config_of(library, FIELDS) for library in (peft, inlay))
    assert ours.to_dict() == {**theirs.to_dict(), "peft_type": "ADAPTION_PROMPT", "task_type": "CAUSAL_LM"}
    for config in (theirs, ours):
        assert config.is_adaption_prompt
        assert not config.is_prompt_learning


REFUSED: dict[str, tuple[dict[str, Any], Callable[[], nn.Module]]] = {
    "too many layers": ({"adapter_layers": 4}, lambda: build("llama")),
    "no such module": ({"target_modules": "attn"}, lambda: build("llama")),
    "another architecture": ({}, lambda: BUILDERS["bert"]()),
    "no length": ({"adapter_len": None}, lambda: build("gpt2")),
    "no number of layers": ({"adapter_layers": None}, lambda: build("llama")),
}


@pytest.mark.parametrize(("fields", "model"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_there_is_caught_as_there(fields: dict[str, Any], model: Callable[[], nn.Module]) -> None:
    config = {**FIELDS, **fields}
    with peft_may_warn(), pytest.raises((ValueError, TypeError)) as theirs:
        peft.get_peft_model(model(), config_of(peft, config))
    base = model()
    before = {k: t.clone() for k, t in base.state_dict().items()}
    with pytest.raises(theirs.type) as ours:
        inlay.get_peft_model(base, config_of(inlay, config))
    assert isinstance(ours.value, inlay.PeftError)
    assert_equal_tensors(base.state_dict(), before)


def test_what_fails_there_alone() -> None:
    """Heads of another width than the model's divided by their number."""

    def wide() -> nn.Module:
        config = build("mistral").config
        config.head_dim = 16
        return type(build("mistral"))(config).eval()

    with peft_may_warn():
        theirs = peft.get_peft_model(wide(), config_of(peft, FIELDS))
    with pytest.raises(RuntimeError, match="invalid for input"):
        theirs(**ids())
    torch.manual_seed(4)
    base = wide()
    expected = flat(base(**ids()))
    ours = inlay.get_peft_model(base, config_of(inlay, FIELDS)).eval()
    torch.testing.assert_close(flat(ours(**ids())), expected)
