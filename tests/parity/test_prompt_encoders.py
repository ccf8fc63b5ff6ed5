"""Prompts: equal configs, live names, encoder outputs, losses and training, and starts in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.helpers import assert_equal_tensors, base, ident, peft, peft_may_warn
from safetensors.torch import load_file, save_file
from torch import Tensor

import inlay

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
CONTEXT: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [5, 6, 7, 8, 9, 10, 11],
    "cpt_mask": [1] * 7,
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 8, 8],
}
# (config, fields)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "prompt-sampled": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p-mlp": ("PromptEncoderConfig", {}),
    "p-mlp-narrow": ("PromptEncoderConfig", {"encoder_hidden_size": 6, "encoder_dropout": 0.3}),
    "p-lstm": (
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6, "encoder_num_layers": 3},
    ),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "cpt": (
        "CPTConfig",
        {**CONTEXT, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.6, "opt_projection_epsilon": 0.2},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-zero": ("PrefixTuningConfig", {"init_weights": "zero"}),
    "prefix-projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 6}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
    "cartridge-free": ("CartridgeConfig", {"num_frozen_tokens": 0}),
    "cartridge-frozen": ("CartridgeConfig", {"num_frozen_tokens": 5}),
}
MODELS = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TASKS = torch.tensor([2, 0, 1])


def configs(name: str, **more: Any) -> tuple[Any, Any]:
    config, fields = CASES[name]
    values = {**CAUSAL, **fields, **more}
    with peft_may_warn():
        return getattr(peft, config)(**values), getattr(inlay, config)(**values)


def handles(name: str, model: str = "llama", **more: Any) -> tuple[Any, Any]:
    """Both libraries' handles on equal bases, with equal random parameters in the encoder."""
    theirs, ours = configs(name, task_type=MODELS[model], **more)
    with peft_may_warn():
        pair = peft.get_peft_model(base(model), theirs), inlay.get_peft_model(base(model), ours)
    state = {k: t + 0.01 * torch.randn_like(t) for k, t in pair[0].prompt_encoder.state_dict().items()}
    for handle in pair:
        handle.prompt_encoder.load_state_dict(state)
        handle.eval()
    return pair


def both(name: str) -> list[str]:
    return [m for m in MODELS if m == "llama" or name != "cpt"]


GRID = [(name, model) for name in CASES for model in both(name)]


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("name", CASES)
def test_equal_dicts(name: str) -> None:
    theirs, ours = configs(name)
    assert json.loads(json.dumps(ours.to_dict())) == json.loads(json.dumps(theirs.to_dict()))


@pytest.mark.parametrize(
    "config",
    [
        "PromptTuningConfig",
        "PromptEncoderConfig",
        "MultitaskPromptTuningConfig",
        "PrefixTuningConfig",
        "CartridgeConfig",
    ],
)
def test_equal_defaults(config: str) -> None:
    theirs, ours = getattr(peft, config)().to_dict(), getattr(inlay, config)().to_dict()
    assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))


def test_equal_defaults_of_contexts() -> None:
    for fields in ({}, {"cpt_token_ids": [3, 4]}, {"cpt_token_ids": [3, 4], "num_virtual_tokens": 7}):
        theirs, ours = (library.CPTConfig(task_type="CAUSAL_LM", **fields) for library in (peft, inlay))
        assert json.loads(json.dumps(ours.to_dict())) == json.loads(json.dumps(theirs.to_dict()))


@pytest.mark.parametrize(("name", "model"), GRID)
def test_each_library_reads_the_others_files(name: str, model: str, tmp_path: Path) -> None:
    theirs, ours = handles(name, model)
    with peft_may_warn():
        theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    values = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "ours")]
    assert values[1] == values[0]
    tensors = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours")]
    assert_equal_tensors(tensors[1], tensors[0], 1e-6)
    with peft_may_warn():
        read = peft.PeftModel.from_pretrained(base(model), tmp_path / "ours")
        there = peft.get_peft_model_state_dict(read)
    here = inlay.get_peft_model_state_dict(inlay.PeftModel.from_pretrained(base(model), tmp_path / "theirs"))
    assert_equal_tensors(there, tensors[0], 1e-6)
    assert_equal_tensors(here, tensors[0])


@pytest.mark.parametrize(
    "name", ["PromptTuningInit", "MultitaskPromptTuningInit", "PromptEncoderReparameterizationType"]
)
def test_equal_enums(name: str) -> None:
    theirs, ours = ({kind.name: kind.value for kind in getattr(library, name)} for library in (peft, inlay))
    assert ours == theirs


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize(("name", "model"), GRID)
def test_equal_live_parameters(name: str, model: str) -> None:
    listed = [
        {
            k: (tuple(p.shape), p.dtype, p.requires_grad)
            for k, p in h.named_parameters()
            if k.startswith("prompt_encoder")
        }
        for h in handles(name, model)
    ]
    assert listed[1] == listed[0]


@pytest.mark.parametrize("name", [n for n, (_, f) in CASES.items() if f.get("prompt_tuning_init") != "SAMPLE_VOCAB"])
def test_equal_starts(name: str) -> None:
    """Up to what is drawn: the same mean and spread of each parameter."""
    theirs, ours = configs(name, **({} if name == "cpt" else {"num_virtual_tokens": 60}))
    with peft_may_warn():
        there = peft.get_peft_model(base("llama"), theirs).prompt_encoder["default"]
    here = inlay.get_peft_model(base("llama"), ours).prompt_encoder["default"]
    wanted = dict(there.named_parameters())
    for key, parameter in here.named_parameters():
        for measure in (lambda t: t.mean(), lambda t: t.std(correction=0)):
            if parameter.numel():
                own, other = measure(parameter.detach()), measure(wanted[key].detach())
                size = wanted[key].detach().abs().max() / max(1, parameter.numel()) ** 0.5
                assert abs(own - other) <= 3 * size, key


@pytest.mark.parametrize(("name", "model"), GRID)
def test_equal_prompts(name: str, model: str) -> None:
    theirs, ours = handles(name, model)
    with peft_may_warn(), torch.no_grad():
        wanted = theirs.get_prompt_embedding_to_save("default")
    filed = inlay.get_peft_model_state_dict(ours)["prompt_embeddings"]
    torch.testing.assert_close(filed, wanted.detach(), rtol=1e-6, atol=1e-6)


def front(handle: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss or the logits of a call, and the gradients of the encoder's parameters."""
    handle.zero_grad()
    with peft_may_warn():
        out = handle(*args, **kwargs)
    out.loss.backward()
    return out.loss.detach(), {
        k: p.grad for k, p in handle.prompt_encoder.named_parameters() if p.grad is not None and p.numel()
    }


@pytest.mark.parametrize("name", CASES)
def test_equal_losses_and_gradients(name: str, tokens_BT: Tensor) -> None:
    call = {"input_ids": tokens_BT, "labels": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
    if name == "multitask":
        call["task_ids"] = TASKS
    (loss, gradients), (own_loss, own_gradients) = (front(h, **call) for h in handles(name))
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-6)
    gradients = {k: g for k, g in gradients.items() if k in own_gradients or g.any()}
    assert_equal_tensors(own_gradients, gradients, 1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_each_task_has_its_prompt(model: str, tokens_BT: Tensor) -> None:
    theirs, ours = handles("multitask", model)
    for tasks in (TASKS, torch.tensor([1, 1, 1]), torch.tensor([2])):
        call = {"input_ids": tokens_BT, "labels": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
        with peft_may_warn():
            wanted = theirs(**call, task_ids=tasks)
        found = ours(**call, task_ids=tasks)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_equal_starts_at_source_tasks(kind: str, tmp_path: Path) -> None:
    save_file(
        {
            "prompt_embeddings": torch.randn(5, 32),
            "prefix_task_cols": torch.randn(3, 5, 2),
            "prefix_task_rows": torch.randn(3, 2, 32),
        },
        tmp_path / "source.safetensors",
    )
    more = {
        "prompt_tuning_init": kind,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "source.safetensors"),
        "prompt_tuning_init_task": 1,
        "num_tasks": 1,
    }
    theirs, ours = configs("multitask", **more)
    with peft_may_warn():
        there = peft.get_peft_model(base("llama"), theirs).prompt_encoder.state_dict()
    here = inlay.get_peft_model(base("llama"), ours).prompt_encoder.state_dict()
    drawn = {k for k in here if "prefix_task" in k and kind == "ONLY_SOURCE_SHARED"}
    assert_equal_tensors(
        {k: t for k, t in here.items() if k not in drawn}, {k: t for k, t in there.items() if k not in drawn}, 1e-6
    )


# ---------------------------------------------------------------- CPT


TYPES: dict[str, list[list[int]] | None] = {
    "none": None,
    "one group": [[1, 2, 3, 4, 4, 0, 0], [1, 2, 2, 2, 3, 4, 4], [1, 1, 2, 3, 3, 3, 4]],
    "groups": [[1, 2, 3, 4, 5, 8, 0], [4, 4, 8, 16, 2, 4, 12], [1, 2, 3, 1, 2, 3, 1]],
}


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("kind", ["none", "decay"])
@pytest.mark.parametrize("adapter", ["default"])  # PEFT has the loss of no other
def test_training_is_the_same_step_by_step(kind: str, types: str, adapter: str, tokens_BT: Tensor) -> None:
    """The steps are long, so that rows leave their balls."""
    fields = {"opt_weighted_loss_type": kind, "opt_loss_decay_factor": 0.6, "opt_projection_format_epsilon": 0.3}
    theirs, ours = handles("cpt", **fields)
    mask = torch.ones_like(tokens_BT)
    mask[0, 5:] = 0
    call = {"input_ids": tokens_BT, "attention_mask": mask, "labels": tokens_BT.masked_fill(mask == 0, -100)}
    if TYPES[types] is not None:
        call["input_type_mask"] = torch.tensor(TYPES[types])
    steppers = [torch.optim.SGD([p for p in h.parameters() if p.requires_grad], lr=0.1) for h in (theirs, ours)]
    left = False
    for _ in range(5):
        losses = []
        for handle, stepper in zip((theirs, ours), steppers, strict=True):
            losses.append(front(handle, **call)[0])
            stepper.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        there, here = (h.prompt_encoder[adapter].delta_embedding.weight.detach() for h in (theirs, ours))
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)
        left = left or bool((here.norm(dim=1) > 0.3 * (32 / 2048) ** 0.5).any())
    assert left, "the projection was never needed"


# ---------------------------------------------------------------- starts in the cache


@pytest.mark.parametrize("name", ["cartridge", "cartridge-free", "prefix"])
def test_equal_starts_at_a_cache(name: str, tokens_BT: Tensor) -> None:
    with torch.no_grad():
        cache = base("llama")(tokens_BT[:1], use_cache=True).past_key_values
    theirs, ours = handles(name)
    with peft_may_warn():
        wanted = peft.initialize_kv_prefix_from_past_key_values(theirs, past_key_values=cache)
    assert torch.equal(inlay.initialize_kv_prefix_from_past_key_values(ours, past_key_values=cache), wanted)
    there, here = (h.prompt_encoder.state_dict() for h in (theirs, ours))
    assert_equal_tensors(here, there)
    plain = tuple((layer.keys, layer.values) for layer in cache.layers)
    for given in (cache, plain):
        found = inlay.prompt_embeddings_from_past_key_values(given, num_virtual_tokens=3)
        assert torch.equal(found, peft.prompt_embeddings_from_past_key_values(given, num_virtual_tokens=3))


class Tokenizer:
    """Words of numbers, with or without a template that puts a token before them."""

    def __init__(self, chat: bool) -> None:
        self.chat = chat

    def __call__(self, text: str, max_length: int | None = None, **kwargs: Any) -> dict[str, Any]:
        ids = [int(word) for word in text.split()][:max_length]
        tensor = torch.tensor([ids])
        return {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> Tensor:
        if not self.chat:
            raise ValueError("there is no chat_template")
        return torch.tensor([[9, *(int(word) for word in messages[0]["content"].split())]])


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("call", [{}, {"use_chat_template": False}, {"max_length": 6}], ids=ident)
def test_equal_starts_at_a_text(call: dict[str, Any], chat: bool) -> None:
    theirs, ours = handles("cartridge")
    text = "5 6 7 8 9 10 11 12"
    with peft_may_warn():
        wanted = peft.initialize_kv_prefix_from_text(theirs, Tokenizer(chat), text=text, **call)
    found = inlay.initialize_kv_prefix_from_text(ours, Tokenizer(chat), text=text, **call)
    torch.testing.assert_close(found, wanted)


def _composed(library: Any, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    out = tmp_path / library.__name__
    library.compose_cartridge_adapters([str(tmp_path / "a"), str(tmp_path / "b")], output_path=str(out))
    return json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")


def test_equal_compositions(tmp_path: Path) -> None:
    for name, case, tokens in (("a", "cartridge", 5), ("b", "cartridge-free", 3)):
        with peft_may_warn():
            handles(case, num_virtual_tokens=tokens)[0].save_pretrained(tmp_path / name)
    (values, tensors), (own_values, own_tensors) = (_composed(library, tmp_path) for library in (peft, inlay))
    assert own_values == values
    assert_equal_tensors(own_tensors, tensors)


# ---------------------------------------------------------------- errors

BAD: dict[str, Callable[[Any], Any]] = {
    "no context's task": lambda library: library.CPTConfig(task_type="SEQ_CLS", cpt_token_ids=[1]),
    "lists of two lengths": lambda library: library.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1], cpt_mask=[1, 1]
    ),
    "frozen tokens": lambda library: library.CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3),
    "no tokenizer": lambda library: library.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="x"),
    "no text": lambda library: library.PromptTuningConfig(prompt_tuning_init="TEXT", tokenizer_name_or_path="x"),
    "kwargs of no tokenizer": lambda library: library.PromptTuningConfig(tokenizer_kwargs={"a": 1}),
    "one to compose": lambda library: library.compose_cartridge_adapters(["a"], output_path="b"),
    "no cache": lambda library: library.prompt_embeddings_from_past_key_values(
        [(torch.zeros(2, 1, 3, 4),) * 2], num_virtual_tokens=2
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_equal_errors(what: str) -> None:
    with peft_may_warn(), pytest.raises(Exception) as theirs:
        BAD[what](peft)
    with pytest.raises(theirs.type):
        BAD[what](inlay)


@pytest.mark.parametrize("tasks", [None, [0, 3, 1]], ids=ident)
def test_equal_errors_of_tasks(tasks: list[int] | None, tokens_BT: Tensor) -> None:
    theirs, ours = handles("multitask")
    task_ids = None if tasks is None else torch.tensor(tasks)
    with peft_may_warn(), pytest.raises(Exception) as error:
        theirs(input_ids=tokens_BT, task_ids=task_ids)
    with pytest.raises(error.type):
        ours(input_ids=tokens_BT, task_ids=task_ids)
