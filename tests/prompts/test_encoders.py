"""Encoders: where prompts start, what is trained in them, what files hold of them, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

import inlay
from inlay.errors import (
    ConfigError,
    CorruptFileError,
    MissingFileError,
    PromptError,
    RowsError,
    TaskIndexError,
    TokenIndexError,
    UnknownAdapterError,
)
from inlay.prompts import PROMPTS
from inlay.prompts.cpt import groups_after

Tiny = Callable[[str], nn.Module]

CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
CONTEXT = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [5, 6, 7, 8, 9, 10],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 8],
}
# name -> (config, fields)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", CAUSAL),
    "p-mlp": ("PromptEncoderConfig", CAUSAL),
    "p-lstm": (
        "PromptEncoderConfig",
        {**CAUSAL, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6},
    ),
    "multitask": ("MultitaskPromptTuningConfig", {**CAUSAL, "num_tasks": 3, "num_ranks": 2}),
    "cpt": ("CPTConfig", CONTEXT),
    "prefix": ("PrefixTuningConfig", CAUSAL),
    "prefix-projected": ("PrefixTuningConfig", {**CAUSAL, "prefix_projection": True, "encoder_hidden_size": 6}),
    "cartridge": ("CartridgeConfig", {**CAUSAL, "num_frozen_tokens": 2}),
    "cartridge-free": ("CartridgeConfig", {**CAUSAL, "num_frozen_tokens": 0}),
    "cartridge-frozen": ("CartridgeConfig", {**CAUSAL, "num_frozen_tokens": 5}),
}
RESUMABLE = {"prompt", "multitask", "prefix", "cartridge", "cartridge-free", "cartridge-frozen"}


def make(model: nn.Module, name: str, **more: Any) -> Any:
    """A handle with the prompt of a case."""
    config, fields = CASES[name]
    return inlay.get_peft_model(model, getattr(inlay, config)(**{**fields, **more}))


def encoder(model: Any, name: str = "default") -> Any:
    return model.prompt_encoder[name]


def given(name: str, B: int = 3) -> dict[str, Tensor]:
    """What calls of a case take beside the input."""
    return {"task_ids": torch.tensor([2, 0, 1])[:B]} if name == "multitask" else {}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """``w5 w6`` -> 5, 6."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    made.save_pretrained(tmp_path / "tokenizer")
    made.path = str(tmp_path / "tokenizer")
    return made


# ---------------------------------------------------------------- laws, for every encoder


def test_every_method_has_a_case() -> None:
    assert {getattr(inlay, config) for config, _ in CASES.values()} == {row.config for row in PROMPTS.values()}


@pytest.mark.parametrize("name", CASES)
def test_files_hold_what_the_shapes_say(name: str, llama: nn.Module) -> None:
    prompt = encoder(make(llama, name))
    with torch.no_grad():
        assert prompt.filed_shapes() == {key: tuple(t.shape) for key, t in prompt.filed().items()}


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_not_frozen_gets_gradients(name: str, llama: nn.Module, tokens_BT: Tensor) -> None:
    model = make(llama, name)
    model(input_ids=tokens_BT, labels=tokens_BT, **given(name)).loss.backward()
    prompt = encoder(model)
    for key, parameter in prompt.named_parameters():
        assert parameter.requires_grad == (key not in prompt.frozen), key
        moved = parameter.grad is not None and (parameter.grad != 0).any()
        assert moved == (key not in prompt.frozen and parameter.numel() > 0), key
    assert all(p.grad is None for p in llama.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_file_brings_the_prompt_back(name: str, tiny: Tiny, tokens_BT: Tensor, tmp_path: Path) -> None:
    model = make(tiny("llama"), name)
    with torch.no_grad():
        for parameter in encoder(model).parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        wanted = model(tokens_BT, **given(name)).logits
        filed = encoder(model).filed()
    model.save_pretrained(tmp_path)
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        k: tuple(t.shape) for k, t in filed.items()
    }
    loaded = inlay.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert not any(p.requires_grad for p in encoder(loaded).parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens_BT, **given(name)).logits, wanted)
        for key, t in encoder(loaded).filed().items():
            assert torch.equal(t, filed[key])


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_where_the_file_has_all_of_it(name: str, tiny: Tiny, tmp_path: Path) -> None:
    make(tiny("llama"), name).save_pretrained(tmp_path)
    if name in RESUMABLE:
        loaded = inlay.PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
        prompt = encoder(loaded)
        assert all(p.requires_grad == (k not in prompt.frozen) for k, p in prompt.named_parameters())
    else:
        with pytest.raises(PromptError, match="cannot be trained on"):
            inlay.PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)


@pytest.mark.parametrize("name", CASES)
def test_values_set_into_a_live_prompt_are_the_prompt(name: str, tiny: Tiny, tokens_BT: Tensor) -> None:
    source, target = make(tiny("llama"), name), make(tiny("llama"), name)
    with torch.no_grad():
        for parameter in encoder(target).parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    inlay.set_peft_model_state_dict(target, inlay.get_peft_model_state_dict(source))
    with torch.no_grad():
        torch.testing.assert_close(
            target(tokens_BT, **given(name)).logits, source(tokens_BT, **given(name)).logits, rtol=1e-4, atol=1e-5
        )


# ---------------------------------------------------------------- starts


def test_a_text_is_repeated_up_to_the_length(llama: nn.Module, tokenizer: Any) -> None:
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w5 w6", "tokenizer_name_or_path": tokenizer.path}
    for name in ("prompt", "multitask"):
        table = encoder(make(llama, name, **text)).embedding.weight
        assert torch.equal(table, llama.get_input_embeddings().weight[[5, 6, 5, 6, 5]])


def test_rows_of_the_vocabulary(llama: nn.Module) -> None:
    table = encoder(make(llama, "prompt", prompt_tuning_init="SAMPLE_VOCAB")).embedding.weight
    vocabulary = llama.get_input_embeddings().weight
    assert all((vocabulary == row).all(1).any() for row in table)


def test_tokens_start_as_the_model_sees_them(llama: nn.Module) -> None:
    """With the scale that some embeddings have."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    scaled = Gemma3TextScaledWordEmbedding(64, 32, padding_idx=0, embed_scale=3.5)
    llama.set_input_embeddings(scaled)
    assert torch.equal(encoder(make(llama, "cpt")).embedding.weight, 3.5 * scaled.weight[5:11])


@pytest.mark.parametrize(
    ("text", "path", "match"),
    [
        ("w5 w6 w7 w8 w9 w10", None, "has 6 tokens, the prompt has 5"),
        ("", None, "needs prompt_tuning_init_text"),
        (" ", None, "has 0 tokens"),
        ("w5 w69", None, "vocabulary has 64"),
        ("w5", "/nowhere/at/all", "cannot be had"),
    ],
)
def test_texts_that_are_no_start(text: str, path: str | None, match: str, llama: nn.Module, tokenizer: Any) -> None:
    before = [name for name, _ in llama.named_modules()]
    with pytest.raises((PromptError, ConfigError), match=match):
        make(
            llama,
            "prompt",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=path or tokenizer.path,
        )
    assert [name for name, _ in llama.named_modules()] == before


def test_a_text_fits_the_prompt_before_the_encoder(t5: nn.Module, tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="has 6 tokens, the prompt has 5"):
        make(
            t5,
            "prompt",
            task_type="SEQ_2_SEQ_LM",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="w5 w6 w7 w8 w9 w10",
            tokenizer_name_or_path=tokenizer.path,
        )


@pytest.mark.parametrize("name", ["prompt", "multitask"])
def test_a_file_is_loaded_without_what_its_config_names(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """A config from others may name any path."""
    make(tiny("llama"), name).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    if name == "prompt":
        values |= {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "x",
            "tokenizer_name_or_path": "/nowhere/at/all",
        }
    else:
        values |= {
            "prompt_tuning_init": "EXACT_SOURCE_TASK",
            "prompt_tuning_init_state_dict_path": "/nowhere/at/all",
        }
    path.write_text(json.dumps(values))
    inlay.formats.files.reseal(tmp_path)
    for trainable in (False, True):
        inlay.PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=trainable)


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_of_zeros(projected: bool, llama: nn.Module) -> None:
    prompt = encoder(make(llama, "prefix-projected" if projected else "prefix", init_weights="zero"))
    assert not prompt().any()
    assert prompt.embedding.weight.any() == projected  # it has to get a gradient


# ---------------------------------------------------------------- p-tuning


def test_layers_of_an_mlp_are_not_chosen(llama: nn.Module) -> None:
    with pytest.warns(inlay.PeftWarning, match="encoder_num_layers=3 is not used"):
        make(llama, "p-mlp", encoder_num_layers=3)


def test_an_unknown_network() -> None:
    with pytest.raises(ConfigError, match="MLP, LSTM"):
        inlay.PromptEncoderConfig(encoder_reparameterization_type="GRU")


def test_a_loaded_network_is_gone(tiny: Tiny, tmp_path: Path) -> None:
    make(tiny("llama"), "p-lstm").save_pretrained(tmp_path)
    prompt = encoder(inlay.PeftModel.from_pretrained(tiny("llama"), tmp_path))
    assert [key for key, _ in prompt.named_parameters()] == ["embedding.weight"]


# ---------------------------------------------------------------- multitask


def source(tmp_path: Path, name: str = "source.safetensors", **change: Tensor) -> tuple[str, dict[str, Tensor]]:
    """A file of three source tasks."""
    tensors = {
        "prompt_embeddings": torch.randn(5, 32),
        "prefix_task_cols": torch.randn(3, 5, 2),
        "prefix_task_rows": torch.randn(3, 2, 32),
        **change,
    }
    path = tmp_path / name
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return str(path), tensors


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_starts_at_source_tasks(kind: str, suffix: str, llama: nn.Module, tmp_path: Path) -> None:
    path, tensors = source(tmp_path, f"source.{suffix}")
    start = {"prompt_tuning_init": kind, "prompt_tuning_init_state_dict_path": path, "prompt_tuning_init_task": 1}
    prompt = encoder(make(llama, "multitask", **start))
    assert torch.equal(prompt.embedding.weight, tensors["prompt_embeddings"])
    for name in ("prefix_task_cols", "prefix_task_rows"):
        own = getattr(prompt, name)
        if kind == "ONLY_SOURCE_SHARED":
            assert 0.01 < own.std() < 0.03
        else:
            wanted = tensors[name][1] if kind == "EXACT_SOURCE_TASK" else tensors[name].mean(0)
            assert torch.equal(own, wanted.expand(3, -1, -1))


@pytest.mark.parametrize(
    ("change", "start", "error", "match"),
    [
        ({}, {"prompt_tuning_init_task": 3}, TaskIndexError, "tasks 0 to 2"),
        ({}, {"prompt_tuning_init_state_dict_path": None}, PromptError, "needs prompt_tuning_init_state_dict_path"),
        ({}, {"prompt_tuning_init_state_dict_path": "/nowhere/at/all"}, MissingFileError, "nowhere"),
        ({}, {"num_ranks": 1}, PromptError, "prefix_task_cols"),
        ({"prompt_embeddings": torch.zeros(4, 32)}, {}, PromptError, "prompt_embeddings"),
        ({"prompt_embeddings": torch.full((5, 32), torch.nan)}, {}, PromptError, "NaN"),
    ],
)
def test_source_tasks_that_do_not_fit(
    change: dict[str, Tensor],
    start: dict[str, Any],
    error: type[Exception],
    match: str,
    llama: nn.Module,
    tmp_path: Path,
) -> None:
    path, _ = source(tmp_path, **change)
    fields = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": path, **start}
    with pytest.raises(error, match=match):
        make(llama, "multitask", **fields)


def test_source_tasks_in_a_pickle_of_more_than_tensors(llama: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "source.bin"
    torch.save({"prompt_embeddings": tmp_path}, path)
    with pytest.raises(CorruptFileError, match="only a dictionary of tensors"):
        make(
            llama,
            "multitask",
            prompt_tuning_init="ONLY_SOURCE_SHARED",
            prompt_tuning_init_state_dict_path=str(path),
        )


@pytest.mark.parametrize(
    ("task_ids", "error", "match"),
    [
        (None, PromptError, "give task_ids"),
        ([0, 1, 3], TaskIndexError, "has 3, the prompt has the tasks 0 to 2"),
        ([0, 1, -1], IndexError, "has -1"),
        ([0, 1], PromptError, "each of the 3 rows"),
        ([[0], [1], [2]], PromptError, "each of the 3 rows"),
        ([0.0, 1.0, 2.0], PromptError, "torch.float32"),
    ],
)
def test_tasks_that_there_are_not(
    task_ids: Any, error: type[Exception], match: str, llama: nn.Module, tokens_BT: Tensor
) -> None:
    model = make(llama, "multitask")
    for call in (model, model.generate):
        with pytest.raises(error, match=match):
            call(input_ids=tokens_BT, task_ids=None if task_ids is None else torch.tensor(task_ids))


def test_tasks_of_a_causal_model_train_beside_others(llama: nn.Module, tokens_BT: Tensor) -> None:
    model = make(llama, "multitask")
    model.add_adapter("plain", inlay.PromptTuningConfig(**CAUSAL))
    names = ["default", "plain", "default"]
    out = model(input_ids=tokens_BT, labels=tokens_BT, task_ids=torch.tensor([2, 0, 1]), adapter_names=names)
    out.loss.backward()
    touched = encoder(model).prefix_task_cols.grad.flatten(1).any(1)
    assert touched.tolist() == [False, True, True]


# ---------------------------------------------------------------- CPT


def test_tokens_of_labels_stay(llama: nn.Module, tokens_BT: Tensor) -> None:
    model = make(llama, "cpt")
    model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
    moves = encoder(model).delta_embedding.weight.grad.any(1)
    assert moves.tolist() == [True, True, True, False, True, False]


def test_rows_stay_within_their_balls(llama: nn.Module, tokens_BT: Tensor) -> None:
    model = make(llama, "cpt", opt_projection_epsilon=0.3, opt_projection_format_epsilon=0.7)
    prompt = encoder(model)
    far = torch.randn_like(prompt.delta_embedding.weight)
    far[0] *= 1e-3
    with torch.no_grad():
        prompt.delta_embedding.weight.copy_(far)
        moved = prompt() - prompt.embedding.weight
        assert torch.equal(prompt.delta_embedding.weight, far)  # nothing is written where nothing is trained
    size = moved.norm(dim=1) / (32 / 2048) ** 0.5
    torch.testing.assert_close(size[1:], torch.tensor([0.3, 0.7, 0.0, 0.7, 0.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved[0], far[0], rtol=1e-3, atol=1e-6)
    model(input_ids=tokens_BT, labels=tokens_BT)
    torch.testing.assert_close(prompt.delta_embedding.weight.detach(), moved, rtol=1e-3, atol=1e-6)


def test_groups_of_labels() -> None:
    types = torch.tensor([[8, 1, 4, 4, 12, 0], [4, 2, 3, 1, 0, 20], [1, 1, 1, 1, 1, 1]])
    assert groups_after(types).tolist() == [[1, 0, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]


def test_inputs_count_on_from_the_next_example(llama: nn.Module) -> None:
    """Also where the context's last token is no label."""
    prompt = encoder(make(llama, "cpt", cpt_tokens_type_mask=[1, 2, 3, 4, 5, 6]))
    labels = torch.tensor([[11, 12, 13, 14]])
    own = {"input_type_mask": torch.tensor([[1, 4, 4, 0]])}
    assert prompt.labels(labels, own)[0].tolist() == [-100, -100, -100, 8, -100, -100, -100, 12, 13, -100]
    assert prompt.labels(labels, {})[0, -4:].tolist() == [11, 12, 13, 14]


def test_the_loss_is_also_in_tuples(llama: nn.Module, tokens_BT: Tensor) -> None:
    model = make(llama, "cpt", opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    fields = {"input_ids": tokens_BT, "labels": tokens_BT}
    assert torch.equal(model(**fields, return_dict=False)[0], model(**fields).loss)


def test_a_model_whose_outputs_have_no_logits_has_its_own_loss(llama: nn.Module, tokens_BT: Tensor) -> None:
    model, forward = make(llama, "prompt"), llama.forward
    llama.forward = lambda **given: ModelOutput(loss=forward(**given).loss)
    call = {"input_ids": tokens_BT, "labels": tokens_BT}
    loss = model(**call).loss
    model.add_adapter("cpt", inlay.CPTConfig(**CONTEXT))
    model.set_adapter("cpt")
    with pytest.raises(PromptError, match="CPT computes its loss from logits"):
        model(**call)
    llama.forward = forward
    model.set_adapter("default")
    assert torch.equal(model(**call).loss, loss)


def test_a_context_is_trained_on_whole_batches(llama: nn.Module, tokens_BT: Tensor) -> None:
    model = make(llama, "cpt")
    call = {"input_ids": tokens_BT, "adapter_names": ["default", "__base__", "default"]}
    model(**call)
    with pytest.raises(RowsError, match="train it alone"):
        model(**call, labels=tokens_BT)


def test_each_adapter_has_its_own_loss(llama: nn.Module, tokens_BT: Tensor) -> None:
    model = make(llama, "cpt")
    fields = {**CONTEXT, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
    model.add_adapter("decaying", inlay.CPTConfig(**fields))
    call = {"input_ids": tokens_BT, "labels": tokens_BT}
    even = model(**call).loss
    model.set_adapter("decaying")
    assert model(**call).loss < even


@pytest.mark.parametrize("mask", [torch.ones(3, 6, dtype=torch.long), [[1] * 7] * 3])
def test_types_of_another_shape(mask: Any, llama: nn.Module, tokens_BT: Tensor) -> None:
    with pytest.raises(PromptError, match="input_type_mask"):
        make(llama, "cpt")(input_ids=tokens_BT, labels=tokens_BT, input_type_mask=mask)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"task_type": "SEQ_2_SEQ_LM"}, "only"),
        ({"task_type": None}, "only"),
        ({"cpt_mask": [1, 1]}, "6, 2 and 6"),
        ({"cpt_tokens_type_mask": [1]}, "6, 6 and 1"),
        ({"cpt_tokens_type_mask": [1, 2, 3, 4, 5, -1]}, "0 or more"),
        ({"cpt_token_ids": [], "cpt_tokens_type_mask": []}, "every token"),
        ({"opt_weighted_loss_type": "linear"}, "opt_weighted_loss_type"),
        ({"opt_projection_epsilon": -0.1}, "opt_projection_epsilon"),
    ],
)
def test_contexts_that_are_none(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        inlay.CPTConfig(**{**CONTEXT, **fields})


@pytest.mark.parametrize("token", [64, -1])
def test_a_token_outside_the_vocabulary(token: int, llama: nn.Module) -> None:
    with pytest.raises(TokenIndexError, match=f"has {token}, the vocabulary has 64"):
        make(llama, "cpt", cpt_token_ids=[5, token, 7, 8, 9, 10])


# ---------------------------------------------------------------- cartridges


@pytest.mark.parametrize("frozen", [-1, 6])
def test_more_frozen_tokens_than_tokens(frozen: int) -> None:
    with pytest.raises(ConfigError, match="num_frozen_tokens"):
        inlay.CartridgeConfig(**CAUSAL, num_frozen_tokens=frozen)


@pytest.mark.parametrize("name", ["cartridge", "prefix"])
def test_a_prompt_that_starts_at_a_text_stands_for_it(
    name: str, llama: nn.Module, tokenizer: Any, tokens_BT: Tensor
) -> None:
    text = "w5 w9 w7 w30 w11"
    before = torch.tensor([[5, 9, 7, 30, 11]]).expand(3, -1)
    wanted = llama(torch.cat([before, tokens_BT], 1)).logits[:, 5:]
    model = make(llama, name).train()
    made = inlay.initialize_kv_prefix_from_text(model, tokenizer, text=text)
    assert torch.equal(encoder(model)(), made)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.eval()(tokens_BT).logits, wanted)
    longer = inlay.initialize_kv_prefix_from_text(model, tokenizer, text=f"{text} w40 w41", max_length=6)
    torch.testing.assert_close(longer, made)


def test_a_text_is_the_systems_message(llama: nn.Module, tokenizer: Any) -> None:
    model = make(llama, "cartridge")
    plain = inlay.initialize_kv_prefix_from_text(model, tokenizer, text="w9 w5 w6 w7 w8")
    tokenizer.chat_template = "{% for m in messages %}{{ 'w9 ' if m.role == 'system' }}{{ m.content }}{% endfor %}"
    made = inlay.initialize_kv_prefix_from_text(model, tokenizer, text="w5 w6 w7 w8")
    assert torch.equal(made, plain)
    for more, found in (({"use_chat_template": False}, 4), ({"max_length": 3}, 3)):
        with pytest.raises(PromptError, match=f"has {found} tokens"):
            inlay.initialize_kv_prefix_from_text(model, tokenizer, text="w5 w6 w7 w8", **more)


def test_texts_that_leave_nothing_in_a_cache(llama: nn.Module, tokenizer: Any) -> None:
    model = make(llama, "cartridge")
    before = encoder(model)().detach().clone()

    def beyond(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5, 6, 7, 8, len(llama.get_input_embeddings().weight)]}  # type: ignore[operator, arg-type]

    for reader, text, match in (
        (tokenizer, "", "has 0 tokens, the prompt 5"),
        (None, "w5 w6 w7 w8 w9", "needs the model's tokenizer, got None"),
        (beyond, "w5", "the model's vocabulary has"),
    ):
        with pytest.raises(PromptError, match=match):
            inlay.initialize_kv_prefix_from_text(model, reader, text=text)
    assert torch.equal(encoder(model)(), before)


def test_dropout_does_not_get_into_a_start(gpt2: nn.Module, tokenizer: Any) -> None:
    model = make(gpt2, "cartridge").train()
    one, other = (inlay.initialize_kv_prefix_from_text(model, tokenizer, text="w5 w6 w7 w8 w9") for _ in range(2))
    assert torch.equal(one, other)


def test_room_that_is_free_in_a_cache_is_none_of_the_prompt(llama: nn.Module, tokens_BT: Tensor) -> None:
    from transformers import StaticCache

    static = StaticCache(config=llama.config, max_cache_len=20)
    with torch.no_grad():
        llama(tokens_BT[:1], past_key_values=static, use_cache=True)
        dynamic = llama(tokens_BT[:1], use_cache=True).past_key_values
    one, other = (
        inlay.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=5) for cache in (static, dynamic)
    )
    torch.testing.assert_close(one, other)
    with pytest.raises(PromptError, match="has 7 tokens, the prompt 8"):
        inlay.prompt_embeddings_from_past_key_values(static, num_virtual_tokens=8)


def pairs(B: int = 1, L: int = 7, layers: int = 2, width: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(B, 2, L, width), torch.randn(B, 2, L, width)) for _ in range(layers)]


@pytest.mark.parametrize(
    ("cache", "match"),
    [
        (pairs(B=2), "the cache has 2"),
        (pairs(L=4), "has 4 tokens, the prompt 5"),
        (pairs() + pairs(L=6), "one shape in all layers"),
        ([], "one shape in all layers"),
        (None, "pairs of keys and values"),
        (pairs(layers=3), "another model"),
        (pairs(width=4), "another model"),
    ],
)
def test_caches_that_are_no_start(cache: Any, match: str, llama: nn.Module) -> None:
    model = make(llama, "cartridge")
    before = encoder(model)().detach().clone()
    with pytest.raises(PromptError, match=match):
        inlay.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert torch.equal(encoder(model)(), before)


def test_prompts_that_hold_no_keys(llama: nn.Module) -> None:
    model = make(llama, "prompt")
    model.add_adapter("projected", inlay.PrefixTuningConfig(**CAUSAL, prefix_projection=True))
    model.add_adapter("lora", inlay.LoraConfig(task_type="CAUSAL_LM"))
    model.add_adapter("good", inlay.CartridgeConfig(**CAUSAL))
    start = inlay.initialize_kv_prefix_from_past_key_values
    for name in ("default", "projected", "lora"):
        with pytest.raises(PromptError, match="only a CARTRIDGE"):
            start(model, adapter_name=name, past_key_values=pairs())
    with pytest.raises(UnknownAdapterError):
        start(model, adapter_name="other", past_key_values=pairs())
    with pytest.raises(PromptError, match="num_virtual_tokens says 4"):
        start(model, adapter_name="good", past_key_values=pairs(), num_virtual_tokens=4)
    start(model, adapter_name="good", past_key_values=pairs(), num_virtual_tokens=5)


def test_an_encoder_decoder_has_no_text_in_its_cache(t5: nn.Module, tokenizer: Any) -> None:
    model = make(t5, "cartridge", task_type="SEQ_2_SEQ_LM")
    with pytest.raises(PromptError, match="encoder-decoder"):
        inlay.initialize_kv_prefix_from_text(model, tokenizer, text="w5 w6 w7 w8 w9")


@pytest.mark.parametrize("safe", [True, False])
def test_cartridges_are_composed(safe: bool, tiny: Tiny, tmp_path: Path) -> None:
    tables = []
    for name, length in (("a", 5), ("b", 3)):
        model = make(tiny("llama"), "cartridge", num_virtual_tokens=length)
        model.save_pretrained(tmp_path / name, safe_serialization=safe)
        tables.append(encoder(model)().detach())
    paths = [tmp_path / "a", tmp_path / "b"]
    inlay.compose_cartridge_adapters(paths, output_path=tmp_path / "both", safe_serialization=safe)
    assert (tmp_path / "both" / f"adapter_model.{'safetensors' if safe else 'bin'}").is_file()
    model = inlay.PeftModel.from_pretrained(tiny("llama"), tmp_path / "both")
    assert torch.equal(encoder(model)(), torch.cat(tables))
    assert (model.peft_config["default"].num_virtual_tokens, len(encoder(model).frozen_embedding)) == (8, 2)


def test_what_is_not_composed(tiny: Tiny, tmp_path: Path) -> None:
    make(tiny("llama"), "cartridge").save_pretrained(tmp_path / "llama")
    make(tiny("gpt2"), "cartridge").save_pretrained(tmp_path / "gpt2")
    make(tiny("llama"), "prefix").save_pretrained(tmp_path / "prefix")
    make(tiny("bert"), "cartridge", task_type="SEQ_CLS").save_pretrained(tmp_path / "bert")
    for others, match in (
        ([], "At least 2"),
        (["gpt2"], "differ in token_dim"),
        (["prefix"], "PrefixTuningConfig"),
        (["bert"], "classifier"),
    ):
        with pytest.raises(ConfigError, match=match):
            inlay.compose_cartridge_adapters(
                [tmp_path / name for name in ["llama", *others]], output_path=tmp_path / "out"
            )
    with pytest.raises(MissingFileError):
        inlay.compose_cartridge_adapters([tmp_path / "llama", tmp_path / "no"], output_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()
