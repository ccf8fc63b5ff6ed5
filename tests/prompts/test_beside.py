"""Prompts beside weight methods, and beside each other, in one model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts.batches import LENGTHS, D, base, batch, config, disturb, handle
from torch import Tensor, nn

import inlay
from inlay.errors import NotMergeableError, PeftWarning
from inlay.walk import wrappers

ARCH, TASK = "llama", "CAUSAL_LM"
PROMPTS = ("p3", "k4")
prompts = pytest.mark.parametrize("prompt", PROMPTS)
orders = pytest.mark.parametrize("lora_first", [True, False], ids=["lora first", "prompt first"])


def both(prompt: str, lora_first: bool = True, arch: str = ARCH, task: str = TASK) -> inlay.PeftModel:
    names = ("lora", prompt) if lora_first else (prompt, "lora")
    return handle(arch, task, *names)


def rows(task: str = TASK, arch: str = ARCH, n: int = 3) -> dict[str, Tensor]:
    return batch(arch, task, n).inputs


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def differ(a: Tensor, b: Tensor) -> None:
    assert a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def logits(model: nn.Module, names: Any = None, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        if names is None:
            out: Tensor = model(**inputs).logits
            return out
        with model.use_adapter(names):
            return logits(model, **inputs)


def on_the_merged(model: inlay.PeftModel, prompt: str) -> inlay.PeftModel:
    """The same prompt before a model into whose weights the LoRA is merged."""
    merged = copy.deepcopy(model)
    inner = merged.merge_and_unload(adapter_names=["lora"])
    alone = inlay.get_peft_model(inner, config(ARCH, TASK, prompt), prompt).double().eval()
    alone.prompt_encoder.load_state_dict({k: t for k, t in model.prompt_encoder.state_dict().items() if prompt in k})
    return alone


# ---------------------------------------------------------------- a prompt and a LoRA


@prompts
@orders
def test_both_run_and_both_are_trained(prompt: str, lora_first: bool) -> None:
    model, inputs = both(prompt, lora_first), rows()
    expected = logits(on_the_merged(model, prompt), **inputs)
    for order in (["lora", prompt], [prompt, "lora"]):
        for verb in (model.set_adapter, model.base_model.set_adapter):
            model.set_adapter(prompt)
            differ(logits(model, **inputs), expected)
            verb(order)
            assert model.active_adapters == order
            equal(logits(model, **inputs), expected)
            equal(logits(model, order, **inputs), expected)
    model(**inputs).loss.backward()
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == {k for k in dict(model.named_parameters()) if "lora_" in k or "prompt_encoder" in k}
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@prompts
def test_only_what_is_set_is_trained(prompt: str) -> None:
    model = both(prompt)

    def trained() -> set[str]:
        return {
            n for n in ("lora", prompt) for k, p in model.named_parameters() if p.requires_grad and f".{n}." in f"{k}."
        }

    assert trained() == {"lora"}
    for names in ([prompt], ["lora"], ["lora", prompt]):
        model.set_adapter(names)
        assert trained() == set(names)
    model.set_adapter(["lora", prompt], inference_mode=True)
    assert trained() == set()
    model.set_requires_grad(prompt)
    assert trained() == {prompt}
    model.set_adapter(["lora", prompt])
    with model.disable_adapter():
        assert trained() == {"lora", prompt}
    model.base_model.disable_adapter_layers()
    assert trained() == set()
    model.base_model.enable_adapter_layers()
    assert trained() == {"lora", prompt}


def test_their_numbers_are_counted() -> None:
    model = both("p3")
    lora, whole = model.get_nb_trainable_parameters()
    model.set_adapter("p3")
    assert model.get_nb_trainable_parameters() == (3 * D, whole)
    model.set_adapter(["lora", "p3"])
    assert model.get_nb_trainable_parameters() == (lora + 3 * D, whole)
    assert whole == sum(p.numel() for p in base(ARCH, TASK).parameters()) + lora + 3 * D


@prompts
@pytest.mark.parametrize("how", ["handle", "mixed"])
def test_generate(prompt: str, how: str) -> None:
    model = both(prompt)
    if how == "mixed":
        model = inlay.get_peft_model(base(ARCH, TASK), config(ARCH, TASK, "lora"), "lora", mixed=True)
        model.add_adapter("loha", inlay.LoHaConfig(target_modules=["v_proj"], r=2, init_weights=False))
        model.add_adapter(prompt, config(ARCH, TASK, prompt))
        disturb(model.double())
        model.eval()
        assert isinstance(model, inlay.PeftMixedModel)
    ids = rows()["input_ids"][:1]
    reference = copy.deepcopy(model)
    layers = [n for n in model.peft_config if n != prompt]
    inner = reference.merge_and_unload(adapter_names=layers)
    alone = inlay.get_peft_model(inner, config(ARCH, TASK, prompt), prompt).double().eval()
    alone.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    model.set_adapter([*layers, prompt])
    equal(logits(model, input_ids=ids), logits(alone, input_ids=ids))
    options = {"max_new_tokens": 5, "eos_token_id": 63}
    assert torch.equal(model.generate(input_ids=ids, **options), alone.generate(input_ids=ids, **options))


# ---------------------------------------------------------------- several prompts at once


@pytest.mark.parametrize("names", [("p3", "p5"), ("p5", "p3"), ("k2", "k4"), ("k4", "k2")])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_two_prompts_stand_one_after_the_other(names: tuple[str, ...], arch: str) -> None:
    model, inputs = handle(arch, TASK, *sorted(names)), rows(arch=arch)
    one = config(arch, TASK, names[0])
    one.num_virtual_tokens = sum(LENGTHS[n] for n in names)
    whole = inlay.get_peft_model(base(arch, TASK), one).double().eval()
    with torch.no_grad():
        parts = [model.prompt_encoder[n].embedding.weight for n in names]
        whole.prompt_encoder["default"].embedding.weight.copy_(torch.cat(parts))
    model.set_adapter(list(names))
    equal(logits(model, **inputs), logits(whole, **inputs))
    ids = {k: t[:1] for k, t in inputs.items() if k == "input_ids"}
    assert torch.equal(model.generate(**ids, max_new_tokens=5), whole.generate(**ids, max_new_tokens=5))
    model(**inputs).loss.backward()
    assert all(model.prompt_encoder[n].embedding.weight.grad.any() for n in names)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_a_prefix_and_embeddings(arch: str) -> None:
    task = "SEQ_2_SEQ_LM" if arch == "t5" else TASK
    model, inputs = handle(arch, task, "k4", "p3"), rows(task, arch)
    labels = inputs.pop("labels")
    inputs |= {"decoder_input_ids": labels.clamp(min=0)} if arch == "t5" else {}
    x_BLD = model.get_input_embeddings()(inputs["input_ids"])
    P_BTD = model.prompt_encoder["p3"].embedding.weight[:3].detach().expand(len(x_BLD), -1, -1)
    mask = torch.cat([torch.ones(len(x_BLD), 3, dtype=torch.long), inputs["attention_mask"]], 1)
    reference = {k: t for k, t in inputs.items() if k != "input_ids"}
    reference |= {"attention_mask": mask, "inputs_embeds": torch.cat([P_BTD, x_BLD], 1)}
    for order in (["k4", "p3"], ["p3", "k4"]):
        model.set_adapter(order)
        equal(logits(model, **inputs), logits(model, "k4", **reference))
    model(**inputs, labels=labels).loss.backward()
    assert all(model.prompt_encoder[n].embedding.weight.grad.any() for n in ("k4", "p3"))


# ---------------------------------------------------------------- files


@prompts
@orders
def test_they_are_two_folders(prompt: str, lora_first: bool, tmp_path: Path) -> None:
    model, inputs = both(prompt, lora_first), rows()
    model.save_pretrained(tmp_path)
    assert sorted(p.parent.name for p in tmp_path.glob("*/adapter_config.json")) == sorted(["lora", prompt])
    names = ("lora", prompt) if lora_first else (prompt, "lora")
    loaded = inlay.PeftModel.from_pretrained(base(ARCH, TASK), tmp_path / names[0], adapter_name=names[0])
    loaded.load_adapter(tmp_path / names[1], names[1])
    assert loaded.active_adapters == [names[0]]
    for choice in (["lora"], [prompt], ["lora", prompt]):
        torch.testing.assert_close(
            logits(loaded, choice, **inputs), logits(model, choice, **inputs), rtol=1e-4, atol=1e-4
        )
    loaded.set_adapter(["lora", prompt])
    assert loaded.active_adapters == ["lora", prompt]
    again = inlay.PeftModel.from_pretrained(base(ARCH, TASK), tmp_path / prompt, prompt, is_trainable=True)
    again.load_adapter(tmp_path / "lora", "lora", is_trainable=True)
    again.set_adapter(["lora", prompt])
    again(**inputs).loss.backward()
    assert all(p.grad is not None for k, p in again.named_parameters() if "lora_" in k or "prompt_encoder" in k)


@pytest.mark.parametrize("task", [TASK, "SEQ_CLS"])
@pytest.mark.filterwarnings("ignore")  # PEFT's own
@prompts
def test_peft_loads_each_alone(prompt: str, task: str, tmp_path: Path) -> None:
    import peft

    model, inputs = both(prompt, task=task), {k: t[:1] for k, t in rows(task).items()}
    model.save_pretrained(tmp_path)
    for name in ("lora", prompt):
        theirs = peft.PeftModel.from_pretrained(base(ARCH, task), tmp_path / name).double().eval()
        torch.testing.assert_close(logits(theirs, **inputs), logits(model, name, **inputs), rtol=1e-5, atol=1e-5)


def test_a_state_dict_has_them_by_name() -> None:
    model, inputs = handle(ARCH, TASK, "lora", "p3", "k4"), rows()
    state = model.state_dict()
    added = {k for k in state if k.startswith("prompt_encoder.")}
    assert added == {"prompt_encoder.p3.embedding.weight", "prompt_encoder.k4.embedding.weight"}
    assert set(state) - added == {f"base_model.{k}" for k in model.base_model.state_dict()}
    other = handle(ARCH, TASK, "lora", "p3", "k4")
    names = ["lora", "k4", "p3"]
    differ(logits(other, names, **inputs), logits(model, names, **inputs))
    other.load_state_dict(state)
    equal(logits(other, names, **inputs), logits(model, names, **inputs))
    other = handle(ARCH, TASK, "lora", "p3", "k4")
    other.load_state_dict({k: t.clone() for k, t in state.items()}, assign=True)
    equal(logits(other, names, **inputs), logits(model, names, **inputs))
    for name, keys in (("p3", {"prompt_embeddings"}), ("k4", {"prompt_embeddings"})):
        tensors = inlay.get_peft_model_state_dict(model, adapter_name=name)
        assert set(tensors) == keys
        with torch.no_grad():
            other.prompt_encoder[name].embedding.weight.zero_()
        inlay.set_peft_model_state_dict(other, tensors, adapter_name=name)
    equal(logits(other, names, **inputs), logits(model, names, **inputs))


# ---------------------------------------------------------------- merging and taking out


@prompts
def test_merging_merges_the_lora_alone(prompt: str) -> None:
    model, inputs = both(prompt), rows()
    bits = {k: t.clone() for k, t in model.state_dict().items()}
    model.set_adapter(["lora", prompt])
    expected = logits(model, **inputs)
    model.merge_adapter()
    assert all(w.merged_adapters == ["lora"] for _, w in wrappers(model.get_base_model()))
    equal(logits(model, **inputs), expected)
    with pytest.raises(NotMergeableError, match=f"'{prompt}' is a prompt"):
        model.merge_adapter([prompt])
    model.unmerge_adapter()
    equal(logits(model, **inputs), expected)
    assert all(torch.equal(t, bits[k]) for k, t in model.state_dict().items())


@prompts
@pytest.mark.parametrize("active", [["lora", "prompt"], ["prompt"]], ids="+".join)
def test_an_active_prompt_cannot_be_merged_and_unloaded(prompt: str, active: list[str]) -> None:
    model, inputs = both(prompt), rows()
    names = [prompt if n == "prompt" else n for n in active]
    model.set_adapter(names)
    before, tree = logits(model, **inputs), {k: type(m) for k, m in model.named_modules()}
    for asked in (None, [prompt], ["lora", prompt]):
        with pytest.raises(NotMergeableError, match=f"'{prompt}' is a prompt before the input"):
            model.merge_and_unload(adapter_names=asked)
    assert {k: type(m) for k, m in model.named_modules()} == tree
    assert model.active_adapters == names
    assert list(model.peft_config) == ["lora", prompt]
    assert torch.equal(logits(model, **inputs), before)


@prompts
@orders
def test_what_is_given_back(prompt: str, lora_first: bool) -> None:
    plain, inputs = base(ARCH, TASK), rows()
    model = both(prompt, lora_first)
    lora = logits(model, "lora", **inputs)
    merged = copy.deepcopy(model)
    inner = merged.merge_and_unload(adapter_names=["lora"])
    equal(logits(inner, **inputs), lora)
    assert type(inner) is type(plain)
    assert {k: type(m) for k, m in inner.named_modules()} == {k: type(m) for k, m in plain.named_modules()}
    model.set_adapter(["lora", prompt])
    bare = model.unload()
    assert all(torch.equal(t, plain.state_dict()[k]) for k, t in bare.state_dict().items())
    assert list(bare.state_dict()) == list(plain.state_dict())
    for handle_ in (model, merged):
        assert handle_.peft_config == {}
        assert not any("prompt_encoder" in k for k in handle_.state_dict())
    equal(logits(model, **inputs), logits(plain, **inputs))
    model.add_adapter("new", config(ARCH, TASK, prompt))
    assert model.active_adapters == ["new"]
    differ(logits(model, **inputs), logits(plain, **inputs))


@prompts
def test_deleting(prompt: str) -> None:
    model, inputs = handle(ARCH, TASK, prompt, "lora", "q3"), rows()
    expected = {n: logits(model, n, **inputs) for n in ("lora", "q3")}
    with pytest.warns(PeftWarning, match=f"{prompt} was active and is deleted: lora is active"):
        model.delete_adapter(prompt)
    equal(logits(model, **inputs), expected["lora"])
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        k for k in dict(model.named_parameters()) if "lora" in k
    }
    assert list(model.prompt_encoder) == ["q3"]
    model.set_adapter(["lora", "q3"])
    model.delete_adapter("lora")
    assert model.active_adapters == ["q3"]
    equal(logits(model, **inputs), expected["q3"])
    model.delete_adapter("q3")
    assert not list(model.prompt_encoder)
    equal(logits(model, **inputs), logits(base(ARCH, TASK), **inputs))


# ---------------------------------------------------------------- copies, compiled


def _saved(model: inlay.PeftModel) -> inlay.PeftModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: inlay.PeftModel = torch.load(buffer, weights_only=False)
    return loaded


@prompts
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved], ids=["deepcopy", "pickle", "save"]
)
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "run"])
def test_copies_are_equal_and_apart(prompt: str, copied: Callable[[Any], Any], ran: bool) -> None:
    model, inputs = both(prompt), rows()
    model.set_adapter(["lora", prompt])
    if ran:
        model(**inputs)
        model.generate(input_ids=inputs["input_ids"][:1], max_new_tokens=2)
    other = copied(model)
    expected = logits(model, **inputs)
    equal(logits(other, **inputs), expected)
    with torch.no_grad():
        other.prompt_encoder[prompt].embedding.weight.add_(1)
    differ(logits(other, **inputs), expected)
    equal(logits(model, **inputs), expected)
    other.set_adapter("lora")
    assert model.active_adapters == ["lora", prompt]
    with model.use_adapter(prompt):
        equal(logits(other, **inputs), logits(model, "lora", **inputs))


@pytest.mark.parametrize(
    "choices",
    [
        pytest.param([["lora", "p3"]], id="embeddings"),
        pytest.param([["lora", "k4"]], id="cache"),
        pytest.param([["k4", "p3"], ["lora"], ["p3"]], id="switched", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(choices: list[list[str]]) -> None:
    torch._dynamo.reset()
    model, inputs = handle(ARCH, TASK, "lora", "p3", "k4"), rows()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for names in choices:
            model.set_adapter(names)
            equal(compiled(**inputs).logits, logits(model, **inputs))
        if len(choices) > 1:
            with model.disable_adapter():
                equal(compiled(**inputs).logits, logits(base(ARCH, TASK), **inputs))
    torch._dynamo.reset()


# ---------------------------------------------------------------- what the handle says


def test_what_the_handle_says() -> None:
    model = both("p3")
    assert model.has_active_enabled_adapter
    model.set_adapter("p3")
    assert model.has_active_enabled_adapter
    assert model.peft_type == "PROMPT_TUNING"
    assert model.active_peft_config is model.peft_config["p3"]
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    model.base_model.disable_adapter_layers()
    assert not model.has_active_enabled_adapter
    model.base_model.enable_adapter_layers()
