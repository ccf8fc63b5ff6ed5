"""What a prompt cannot do is a named error, and the model, the handle and the config are as they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts.batches import DECODERS, LAYERS, POSITIONS, D, V, base, batch, handle
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from inlay import PrefixTuningConfig, PromptTuningConfig
from inlay.errors import (
    ConfigError,
    CorruptFileError,
    FieldTypeError,
    LoadError,
    MissingFileError,
    NonFiniteError,
    PeftError,
    PromptError,
    TaskIndexError,
    WrongMethodError,
)
from inlay.prompts import PROMPTS

KINDS = {"embeddings": PromptTuningConfig, "cache": PrefixTuningConfig}
kinds = pytest.mark.parametrize("kind", KINDS)


# ---------------------------------------------------------------- nothing is changed


def picture(model: nn.Module) -> dict[str, Any]:
    """All that an error must leave alone: which modules and tensors there are, which are trained, who is active."""
    seen: dict[str, Any] = {name: type(module) for name, module in model.named_modules()}
    seen |= {f"p {k}": (id(p), p._version, p.requires_grad) for k, p in model.named_parameters()}
    if isinstance(model, inlay.PeftModel):
        seen["adapters"] = {n: c.to_dict() for n, c in model.peft_config.items()}
        seen["active"] = model.active_adapters
        seen["prompts"] = None if model.base_model.prompts is None else model.base_model.prompts._active
    return seen


@contextmanager
def refused(error: type[Exception], match: str, *unchanged: nn.Module) -> Iterator[None]:
    before = [picture(model) for model in unchanged]
    with pytest.raises(error, match=match) as caught:
        yield
    assert isinstance(caught.value, PeftError)
    assert isinstance(caught.value, ValueError | RuntimeError)
    assert [picture(model) for model in unchanged] == before


def cannot_stand(model: nn.Module, made: Any, error: type[Exception], match: str) -> None:
    """Refused by `get_peft_model`, and by `add_adapter` beside a LoRA where the model takes one."""
    fields = made.to_dict()
    with refused(error, match, model):
        inlay.get_peft_model(model, made)
    assert made.to_dict() == fields
    target = next((n for n, m in model.named_modules() if type(m) is nn.Linear), None)
    if target is not None:
        beside = inlay.get_peft_model(
            model, inlay.LoraConfig(target_modules=[target], task_type=made.task_type), "lora"
        )
        with refused(error, match, beside):
            beside.add_adapter("prompt", made)
        assert made.to_dict() == fields
        out = beside.unload()
        assert out is model


# ---------------------------------------------------------------- configs


@kinds
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ConfigError),
        (-3, ConfigError),
        (2**31, ConfigError),
        ("8", FieldTypeError),
        (8.0, FieldTypeError),
        (True, FieldTypeError),
    ],
)
def test_a_length_that_is_none(kind: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="num_virtual_tokens"):
        KINDS[kind](num_virtual_tokens=value)


@kinds
def test_a_length_has_to_be_said(kind: str) -> None:
    cannot_stand(base("llama", "SEQ_CLS"), KINDS[kind](task_type="SEQ_CLS"), ConfigError, "num_virtual_tokens")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@kinds
@pytest.mark.parametrize("length", [POSITIONS, 10**9])
def test_longer_than_the_positions(kind: str, length: int) -> None:
    made = KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=length)
    cannot_stand(
        base("gpt2", "CAUSAL_LM"), made, PromptError, f"{length} tokens leaves nothing of the model's {POSITIONS}"
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("kind", "arch", "fields", "match"),
    [
        ("embeddings", "llama", {"token_dim": D + 1}, f"token_dim={D + 1}, and this model has {D}"),
        ("cache", "llama", {"token_dim": D}, f"token_dim={D}, and a key of this model has {D // 2}"),
        ("cache", "llama", {"token_dim": 2**31 - 1}, "token_dim=2147483647"),
        ("cache", "llama", {"num_layers": LAYERS + 1}, f"num_layers={LAYERS + 1}, and this model has {LAYERS}"),
        ("cache", "llama", {"num_layers": 1}, "num_layers=1"),
        ("cache", "gpt2", {"num_layers": 2**31 - 1}, "num_layers=2147483647"),
        ("cache", "llama", {"num_attention_heads": 3}, "num_attention_heads=3, and a key of this model has 2"),
        ("cache", "gpt2", {"num_attention_heads": 64}, "num_attention_heads=64"),
        ("cache", "t5", {"num_attention_heads": 3}, "num_attention_heads=3"),
    ],
)
def test_numbers_of_another_model(kind: str, arch: str, fields: dict[str, int], match: str) -> None:
    task = "CAUSAL_LM" if arch in DECODERS else "SEQ_2_SEQ_LM"
    cannot_stand(base(arch, task), KINDS[kind](task_type=task, num_virtual_tokens=3, **fields), PromptError, match)


@torch.no_grad()
def test_the_models_own_numbers_may_be_said() -> None:
    for fields in ({"num_attention_heads": 4}, {"num_attention_heads": 2, "token_dim": D // 2, "num_layers": LAYERS}):
        made = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **fields)
        model = inlay.get_peft_model(base("llama", "CAUSAL_LM"), made)
        assert (made.token_dim, made.num_attention_heads, made.num_layers) == (D // 2, 2, LAYERS)
        model(**batch("llama", "CAUSAL_LM", 2).inputs)


@pytest.mark.parametrize(
    ("arch", "fields", "numbers"),
    [
        ("bart", {"encoder_layers": 4, "decoder_layers": 2}, (D, 4, 4)),
        ("bart", {"encoder_layers": 2, "decoder_layers": 3}, (D, 4, 3)),
        ("t5", {"num_layers": 4, "num_decoder_layers": 2}, (D, 4, 4)),
        ("t5", {"d_kv": 6}, (24, 4, LAYERS)),
    ],
)
@torch.no_grad()
def test_uneven_models_have_a_prompt_that_acts(arch: str, fields: dict[str, int], numbers: tuple[int, ...]) -> None:
    from transformers import AutoModelForSeq2SeqLM

    shape = base(arch, "SEQ_2_SEQ_LM").config.to_dict() | fields
    model = AutoModelForSeq2SeqLM.from_config(type(base(arch, "SEQ_2_SEQ_LM").config).from_dict(shape))
    made = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    tuned = inlay.get_peft_model(model, made).eval()
    assert (made.token_dim, made.num_attention_heads, made.num_layers) == numbers
    rows = batch(arch, "SEQ_2_SEQ_LM", 2).inputs
    out = tuned(**rows).logits
    with tuned.disable_adapter():
        assert not torch.allclose(out, tuned(**rows).logits)
    tuned.generate(input_ids=rows["input_ids"], max_new_tokens=3)


class Bare(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x)
        return h


def _vision() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
        )
    )


@kinds
@pytest.mark.parametrize("model", [Bare, _vision], ids=["bare", "vision"])
def test_a_model_without_tokens(kind: str, model: Callable[[], nn.Module]) -> None:
    cannot_stand(model(), KINDS[kind](num_virtual_tokens=3), PromptError, "embeddings")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable`:FutureWarning")
def test_a_cache_that_checkpointing_leaves_out() -> None:
    model = base("llama", "CAUSAL_LM")
    model.gradient_checkpointing_enable()
    made = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with refused(PromptError, "gradient checkpointing", model):
        inlay.get_peft_model(model, made)
    model.gradient_checkpointing_disable()
    tuned = inlay.get_peft_model(model, made).train()
    model.gradient_checkpointing_enable()
    rows = batch("llama", "CAUSAL_LM", 2).inputs
    with refused(PromptError, "gradient checkpointing", tuned):
        tuned(**rows)
    with torch.no_grad(), refused(PromptError, "gradient checkpointing", tuned):
        tuned(**rows)
    tuned.eval()
    tuned(**rows)


def test_prompts_stand_before_handles_alone() -> None:
    model = base("llama", "CAUSAL_LM")
    with refused(ConfigError, "PromptTuningConfig", model):
        inlay.inject_adapter_in_model(PromptTuningConfig(num_virtual_tokens=3), model)


# ---------------------------------------------------------------- starting at a text


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """Words "a" to "j" are the tokens 3 to 12, and "far" is behind the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate("abcdefghij")}, "far": V + 5}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def text(length: int, words: str, tokenizer: str | None) -> PromptTuningConfig:
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=words,
        tokenizer_name_or_path=tokenizer,
    )


def test_a_text_is_repeated_and_never_cut(tokenizer: str) -> None:
    model = base("llama", "CAUSAL_LM")
    table = model.get_input_embeddings().weight
    prompt = inlay.get_peft_model(model, text(5, "a b", tokenizer)).prompt_encoder["default"]
    torch.testing.assert_close(prompt.embedding.weight.double(), table[[3, 4, 3, 4, 3]], rtol=1e-6, atol=1e-6)
    cannot_stand(
        base("llama", "CAUSAL_LM"), text(2, "a b c", tokenizer), PromptError, "has 3 tokens, the prompt has 2"
    )


def test_a_tokenizer_that_does_not_fit(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer_name_or_path"):
        text(5, "a b", None)
    with pytest.raises(ConfigError, match="prompt_tuning_init_text"):
        text(5, "", tokenizer)
    with pytest.raises(ConfigError, match="prompt_tuning_init must be one of"):
        PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="NONSENSE")
    model = base("llama", "CAUSAL_LM")
    cannot_stand(model, text(5, "a b", str(tmp_path / "nowhere")), PromptError, "nowhere")
    cannot_stand(model, text(5, "a far", tokenizer), PromptError, "vocabulary has 64")
    cannot_stand(model, text(5, "   ", tokenizer), PromptError, "has 0 tokens")


# ---------------------------------------------------------------- calls


def call(model: inlay.PeftModel, how: str, **inputs: Any) -> Any:
    return model(**inputs) if how == "forward" else model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("name", ["p5", "k4"])
def test_an_input_too_long_beside_the_prompt(name: str, how: str) -> None:
    model = handle("gpt2", "CAUSAL_LM", name)
    length = model.peft_config[name].num_virtual_tokens
    fits, too_long = POSITIONS - length - 2, POSITIONS - length + 1
    call(model, how, input_ids=torch.full((1, fits), 5))
    with refused(
        PromptError, f"prompt of {length} tokens and an input of {too_long} exceed the model's {POSITIONS}", model
    ):
        call(model, how, input_ids=torch.full((1, too_long), 5))
    with model.disable_adapter():
        call(model, how, input_ids=torch.full((1, POSITIONS - 2), 5))


def test_a_decoder_too_long_behind_its_prompt() -> None:
    model = handle("bart", "SEQ_2_SEQ_LM", "k4")
    ids = torch.full((1, 5), 5)
    model(input_ids=ids, labels=torch.full((1, POSITIONS - 4), 5))
    with refused(PromptError, "exceed the model's 64 positions", model):
        model(input_ids=ids, labels=torch.full((1, POSITIONS - 3), 5))


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("name", ["p5", "k4"])
def test_masks_that_cannot_be_lengthened(name: str, how: str) -> None:
    model, ids = handle("llama", "CAUSAL_LM", name), torch.full((2, 6), 5)
    with refused(PromptError, r"lengthens attention_mask.*\(2, 1, 6, 6\)", model):
        call(model, how, input_ids=ids, attention_mask=torch.ones(2, 1, 6, 6))
    for shape in ((2, 11), (2, 5), (1, 6)):
        with refused(PromptError, rf"attention_mask has shape \({shape[0]}, {shape[1]}\).*2 rows of 6 tokens", model):
            call(model, how, input_ids=ids, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("name", ["p5", "k4"])
def test_no_input_at_all(name: str) -> None:
    model = handle("llama", "CAUSAL_LM", name)
    for given in ({}, {"input_ids": None}, {"attention_mask": torch.ones(2, 6)}):
        with refused(PromptError, "give input_ids or inputs_embeds", model):
            call(model, "forward", **given)
    with refused(PromptError, r"attention_mask has shape \(2, 6\).*1 rows of 1 tokens", model):
        call(model, "generate", attention_mask=torch.ones(2, 6))  # it begins with one token
    model.base_model.model.generation_config.bos_token_id = None
    with refused(PromptError, "give input_ids or inputs_embeds", model):
        call(model, "generate")


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("name", ["p5", "k4"])
def test_an_input_that_is_none(name: str, how: str) -> None:
    model, ids = handle("llama", "CAUSAL_LM", name), torch.full((2, 6), 5)
    with refused(PromptError, r"input_ids of shape \(batch, tokens\), these have shape \(6,\)", model):
        call(model, how, input_ids=ids[0])
    with refused(PromptError, r"inputs_embeds of shape \(batch, tokens, width\), these have shape \(2, 6\)", model):
        call(model, how, inputs_embeds=ids.double())
    with refused(PromptError, "given twice", model):
        model(input_ids=ids, inputs_embeds=torch.zeros(2, 6, D).double())


@pytest.mark.parametrize("name", ["p5", "k4"])
def test_positions_of_another_shape(name: str) -> None:
    model, ids = handle("llama", "CAUSAL_LM", name), torch.full((2, 6), 5)
    for shape in ((1, 5), (2, 5), (2, 11), (3, 6)):
        with refused(PromptError, rf"position_ids has shape \({shape[0]}, {shape[1]}\).*2 rows of 6 tokens", model):
            model(input_ids=ids, position_ids=torch.zeros(shape, dtype=torch.long))
    at = torch.arange(6)[None]
    torch.testing.assert_close(
        model(input_ids=ids, position_ids=at).logits, model(input_ids=ids, position_ids=at.expand(2, -1)).logits
    )


@pytest.mark.parametrize(("arch", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "TOKEN_CLS"), ("bert", "TOKEN_CLS")])
@pytest.mark.parametrize("name", ["p5", "k4"])
def test_labels_of_another_length(arch: str, task: str, name: str) -> None:
    model, ids = handle(arch, task, name), torch.full((2, 6), 5)
    for shape in ((2, 12), (2, 5), (3, 6), *([(2, 11)] if name == "k4" or task == "CAUSAL_LM" else [])):
        with refused(PromptError, rf"labels has shape \({shape[0]}, {shape[1]}\).*2 rows of 6 tokens", model):
            model(input_ids=ids, labels=torch.ones(shape, dtype=torch.long))
    model(input_ids=ids, labels=torch.ones(2, 6, dtype=torch.long))


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize(
    ("tasks", "error", "match"),
    [
        ([0, 2], TaskIndexError, "task_ids has 2, the prompt has the tasks 0 to 1"),
        ([-1, 0], TaskIndexError, "task_ids has -1, the prompt has the tasks 0 to 1"),
        ([0, 1, 1], PromptError, "a task for each of the 2 rows"),
        ([0.0, 1.0], PromptError, "a task for each of the 2 rows"),
        ([True, False], PromptError, "a task for each of the 2 rows"),
        ("both", PromptError, "a task for each of the 2 rows, got 'both'"),
        (None, PromptError, "give task_ids"),
    ],
)
def test_tasks_that_there_are_not(how: str, tasks: Any, error: type[Exception], match: str) -> None:
    made = inlay.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
    model, ids = inlay.get_peft_model(base("llama", "CAUSAL_LM"), made).eval(), torch.full((2, 6), 5)
    with refused(error, match, model):
        call(model, how, input_ids=ids, task_ids=torch.tensor(tasks) if isinstance(tasks, list) else tasks)
    call(model, how, input_ids=ids, task_ids=torch.tensor([1, 0]))
    call(model, how, input_ids=ids, task_ids=torch.tensor([1, 0], dtype=torch.uint8))


def test_classes_may_stand_in_a_column() -> None:
    model, ids = handle("llama", "SEQ_CLS", "p5"), torch.full((2, 6), 5)
    one = model(input_ids=ids, labels=torch.tensor([1, 2])).loss
    torch.testing.assert_close(model(input_ids=ids, labels=torch.tensor([[1], [2]])).loss, one)


def test_what_is_said_of_each_token_is_lengthened_or_refused() -> None:
    model, ids = handle("bert", "TOKEN_CLS", "p3"), torch.full((2, 6), 5)
    with refused(PromptError, "token_type_ids has shape", model):
        model(input_ids=ids, token_type_ids=torch.zeros(2, 9, dtype=torch.long))
    with refused(PromptError, "word_importance has an entry for each token", model):
        model(input_ids=ids, word_importance=torch.zeros(2, 6))
    with refused(PromptError, "position_ids of shape", model):
        model(input_ids=ids, position_ids=torch.zeros(3, 2, 6, dtype=torch.long))


def test_an_encoder_does_not_generate() -> None:
    for name in ("p3", "k4"):
        model = handle("bert", "SEQ_CLS", name)
        with refused(PromptError, "BertForSequenceClassification cannot generate", model):
            model.generate(input_ids=torch.full((2, 6), 5))


def test_a_cache_that_does_not_hold_the_prompt() -> None:
    from transformers import DynamicCache

    model, ids = handle("llama", "CAUSAL_LM", "p5"), torch.full((1, 3), 5)
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True, past_key_values=DynamicCache()).past_key_values
    with refused(PromptError, "holds 3 tokens, the prompt has 5", model):
        model(input_ids=ids, past_key_values=cache)


# ---------------------------------------------------------------- files

ARCH, TASK = "llama", "SEQ_CLS"
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def saved(directory: Path, kind: str) -> Path:
    model = handle(ARCH, TASK, {"embeddings": "p3", "cache": "k4"}[kind])
    model.save_pretrained(directory)
    return next(directory.glob("*/adapter_config.json")).parent


def rewritten(directory: Path, change: Change) -> None:
    """Changes a saved prompt behind the library's back."""
    values, tensors = (
        json.loads((directory / "adapter_config.json").read_text()),
        load_file(directory / "adapter_model.safetensors"),
    )
    change(values, tensors)
    (directory / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, directory / "adapter_model.safetensors")


def _set(**fields: Any) -> Change:
    return lambda values, tensors: values.update(fields)


def _put(**found: Any) -> Change:
    return lambda values, tensors: tensors.update({k: f(tensors) for k, f in found.items()})


def _drop(key: str) -> Change:
    return lambda values, tensors: [tensors.pop(k) for k in list(tensors) if key in k] and None


FILES: dict[str, tuple[Change, type[Exception], str]] = {
    "no prompt": (_drop("prompt_embeddings"), LoadError, "prompt_embeddings"),
    "no head": (_drop("score"), LoadError, "score"),
    "another length": (
        _put(prompt_embeddings=lambda t: t["prompt_embeddings"][1:].clone()),
        LoadError,
        "prompt_embeddings",
    ),
    "another width": (
        _put(prompt_embeddings=lambda t: t["prompt_embeddings"][:, 1:].clone()),
        LoadError,
        "prompt_embeddings",
    ),
    "flat": (_put(prompt_embeddings=lambda t: t["prompt_embeddings"].flatten()), LoadError, "prompt_embeddings"),
    "empty": (_put(prompt_embeddings=lambda t: torch.zeros(0)), LoadError, "prompt_embeddings"),
    "NaN": (
        _put(prompt_embeddings=lambda t: t["prompt_embeddings"] * float("nan")),
        NonFiniteError,
        "prompt_embeddings",
    ),
    "infinity": (_put(prompt_embeddings=lambda t: t["prompt_embeddings"] / 0), NonFiniteError, "prompt_embeddings"),
    "integers": (_put(prompt_embeddings=lambda t: t["prompt_embeddings"].long()), LoadError, "float"),
    "another tensor": (_put(lora_A=lambda t: torch.zeros(2)), LoadError, "lora_A"),
    "of a longer one": (_set(num_virtual_tokens=7), LoadError, "prompt_embeddings"),
    "of a huge one": (_set(num_virtual_tokens=2_000_000_000), LoadError, "prompt_embeddings"),
    "no length": (_set(num_virtual_tokens=None), ConfigError, "num_virtual_tokens"),
    "length 0": (_set(num_virtual_tokens=0), ConfigError, "num_virtual_tokens"),
    "a length in words": (_set(num_virtual_tokens="three"), FieldTypeError, "num_virtual_tokens"),
    "a length beyond every int": (_set(num_virtual_tokens=10**30), ConfigError, "num_virtual_tokens"),
    "a list": (_set(num_layers=[2]), FieldTypeError, "num_layers"),
    "of a wider base": (_set(token_dim=4096), PromptError, "token_dim=4096"),
    "of three submodules": (_set(num_transformer_submodules=3), ConfigError, "num_transformer_submodules"),
    "modules in words": (_set(modules_to_save="score"), FieldTypeError, "modules_to_save"),
    "of no task": (_set(task_type="NONSENSE"), ConfigError, "task type"),
}


@kinds
@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trained"])
def test_a_file_that_does_not_fit(kind: str, case: str, trainable: bool, tmp_path: Path) -> None:
    change, error, match = FILES[case]
    directory = saved(tmp_path, kind)
    rewritten(directory, change)
    model, beside = base(ARCH, TASK), handle(ARCH, TASK, "p3", "lora")
    with refused(error, match, model):
        inlay.PeftModel.from_pretrained(model, directory, is_trainable=trainable, strict=True)
    with refused(error, match, beside):
        beside.load_adapter(directory, "again", is_trainable=trainable, strict=True)
    if "prompt_embeddings" in match and error is LoadError:  # there is no way to go on
        with refused(error, match, model):
            inlay.PeftModel.from_pretrained(model, directory, is_trainable=trainable, strict=False)


_M = 2**31 - 1
CLAIMS: dict[str, list[tuple[dict[str, Any], type[Exception] | None, type[Exception] | None]]] = {
    # what the config says -> the error where it is loaded frozen, and where it is to be trained on
    "MULTITASK_PROMPT_TUNING": [
        ({"num_tasks": _M}, LoadError, LoadError),
        ({"num_ranks": _M}, LoadError, LoadError),
        ({"num_tasks": _M, "num_ranks": _M, "num_virtual_tokens": _M}, PromptError, PromptError),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "/nowhere"}, None, None),
    ],
    "PROMPT_TUNING": [
        ({"num_virtual_tokens": _M, "num_transformer_submodules": 2}, LoadError, LoadError),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "/no"}, None, None),
    ],
    "P_TUNING": [
        ({"encoder_hidden_size": _M}, None, PromptError),
        ({"encoder_num_layers": _M, "encoder_reparameterization_type": "LSTM"}, None, PromptError),
    ],
    "PREFIX_TUNING": [({"encoder_hidden_size": _M, "prefix_projection": True}, None, PromptError)],
    "CPT": [
        ({"cpt_token_ids": [10**30] * 4}, ConfigError, ConfigError),
        ({"cpt_tokens_type_mask": [10**30] * 4}, ConfigError, ConfigError),
        ({"cpt_token_ids": [1] * 5}, ConfigError, ConfigError),
    ],
    "CARTRIDGE": [
        ({"num_virtual_tokens": _M, "num_frozen_tokens": _M}, LoadError, LoadError),
        ({"num_frozen_tokens": _M}, ConfigError, ConfigError),
    ],
}


_WHY: dict[type[Exception], str] = {
    LoadError: "of another shape",
    PromptError: "cannot be trained on|No prompt can have",
    ConfigError: "cpt_token_ids|num_frozen_tokens",
}


@pytest.mark.parametrize(
    ("method", "fields", "errors"),
    [(method, fields, errors) for method, rows in CLAIMS.items() for fields, *errors in rows],
    ids=lambda part: ",".join(part) if isinstance(part, dict) else None,
)
def test_what_a_config_claims_costs_nothing(
    method: str, fields: dict[str, Any], errors: list[type[Exception] | None], tmp_path: Path
) -> None:
    """Neither memory nor time, and nothing that it names is opened."""
    row = PROMPTS[method].config
    inlay.get_peft_model(base("llama", "CAUSAL_LM"), row(**{"task_type": "CAUSAL_LM", **row.example})).save_pretrained(
        tmp_path
    )
    rewritten(tmp_path, _set(**fields))
    for trainable, error in zip((False, True), errors, strict=True):
        model = base("llama", "CAUSAL_LM")
        if error is None:
            inlay.PeftModel.from_pretrained(model, tmp_path, is_trainable=trainable)
        else:
            with refused(error, _WHY[error], model):
                inlay.PeftModel.from_pretrained(model, tmp_path, is_trainable=trainable)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set(num_layers=32), "num_layers=32"),
        (_set(num_attention_heads=32), "num_attention_heads=32"),
        (_set(token_dim=D), f"token_dim={D}"),
    ],
)
def test_a_cache_of_another_base(change: Change, match: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, "cache")
    rewritten(directory, change)
    model = base(ARCH, TASK)
    with refused(PromptError, match, model):
        inlay.PeftModel.from_pretrained(model, directory)


@kinds
def test_a_prompt_of_another_base(kind: str, tmp_path: Path) -> None:
    model = handle("gpt2", "CAUSAL_LM", "p3" if kind == "embeddings" else "k4")
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM, GPT2Config

    other = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=V, n_embd=D // 2, n_layer=LAYERS, n_head=2))
    with refused(PromptError, f"token_dim={D}, and .*this model has {D // 2}", other):
        inlay.PeftModel.from_pretrained(other, next(tmp_path.glob("*/adapter_config.json")).parent)


@kinds
def test_a_header_that_lies(kind: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, kind)
    path = directory / "adapter_model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["prompt_embeddings"]["shape"][0] = 2_000_000_000
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    model = base(ARCH, TASK)
    with refused(CorruptFileError, "prompt_embeddings|bytes", model):
        inlay.PeftModel.from_pretrained(model, directory)
    path.unlink()
    with refused(MissingFileError, "adapter_model", model):
        inlay.PeftModel.from_pretrained(model, directory)


def test_what_was_trained_and_is_not_in_the_file(tmp_path: Path) -> None:
    made = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True)
    inlay.get_peft_model(base("llama", "CAUSAL_LM"), made).save_pretrained(tmp_path)
    model = base("llama", "CAUSAL_LM")
    with refused(PromptError, "cannot be trained on", model):
        inlay.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    loaded = inlay.PeftModel.from_pretrained(model, tmp_path)
    with refused(PromptError, "cannot be trained on", loaded):
        loaded.load_adapter(tmp_path, "default", is_trainable=True)


def test_a_reload_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    directory = saved(tmp_path, "embeddings")
    model = inlay.PeftModel.from_pretrained(base(ARCH, TASK), directory, adapter_name="p3")
    before = {k: t.clone() for k, t in inlay.get_peft_model_state_dict(model, adapter_name="p3").items()}
    rewritten(directory, _put(prompt_embeddings=lambda t: t["prompt_embeddings"] * float("nan")))
    with refused(NonFiniteError, "prompt_embeddings", model):
        model.load_adapter(directory, "p3", strict=True)
    tensors: dict[str, Tensor] = {"prompt_embeddings": torch.zeros(4, D)}
    with refused(LoadError, "prompt_embeddings", model):
        inlay.set_peft_model_state_dict(model, tensors, "p3")
    after: Mapping[str, Tensor] = inlay.get_peft_model_state_dict(model, adapter_name="p3")
    assert all(torch.equal(after[k], t) for k, t in before.items())


def test_a_layers_file_is_no_prompts(tmp_path: Path) -> None:
    directory = saved(tmp_path, "embeddings")
    model = base(ARCH, TASK)
    rewritten(directory, _set(peft_type="LORA", target_modules=["q_proj"]))
    with refused(LoadError, "prompt_embeddings", model), pytest.warns(UserWarning, match="are ignored"):
        inlay.PeftModel.from_pretrained(model, directory, strict=True)
    rewritten(directory, _set(peft_type=None))
    with refused(WrongMethodError, "peft_type", model):
        inlay.PeftModel.from_pretrained(model, directory)
