"""``generate`` with a prompt before the input: whatever holds the tokens' keys and values, the same text comes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prompts.models import ARCHITECTURES, inputs_of, model_of
from torch import Tensor

import inlay
from inlay.errors import PeftError, PromptError
from inlay.prompts import PROMPTS

T, L = 4, 7
WAYS = {"front": "PROMPT_TUNING", "cache": "PREFIX_TUNING"}
DECODERS = [name for name, a in ARCHITECTURES.items() if "CAUSAL_LM" in a.tasks]
SEQ2SEQ = [name for name, a in ARCHITECTURES.items() if "SEQ_2_SEQ_LM" in a.tasks]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [0, 2]}


def task_of(name: str, seq2seq: bool) -> str:
    return "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"


def handle_of(way: str, name: str, seq2seq: bool = False) -> Any:
    torch.manual_seed(0)
    task = task_of(name, seq2seq)
    config: Any = PROMPTS[WAYS[way]].config
    return inlay.get_peft_model(model_of(name, task), config(task_type=task, num_virtual_tokens=T)).eval()


def batch(name: str = "llama") -> tuple[Tensor, Tensor, Tensor]:
    """(ids, the same with padding in front, its mask)."""
    ids_BL = inputs_of(name, "CAUSAL_LM", padded=False)["input_ids"]
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :3], mask_BL[2, :1] = 0, 0
    return ids_BL, ids_BL.masked_fill(mask_BL == 0, 0), mask_BL


ways = pytest.mark.parametrize("way", WAYS)
decoders = pytest.mark.parametrize("name", DECODERS)
both = pytest.mark.parametrize(("name", "seq2seq"), [(n, False) for n in DECODERS] + [(n, True) for n in SEQ2SEQ])


#: where padding in front of a row is not as if it were not there
SEEN = {
    "bart": "its positions count padding, in the bare model too",
    **dict.fromkeys(("mistral", "gemma2", "gemma3"), "a sliding window counts it, and the prompt leaves it sooner"),
}


@ways
@pytest.mark.parametrize("name", [n for n in DECODERS if n not in SEEN])
def test_rows_padded_in_front_are_as_one_by_one(way: str, name: str) -> None:
    handle = handle_of(way, name)
    _, padded_BL, mask_BL = batch(name)
    given = [{"attention_mask": mask_BL}, {}] if name != "bloom" else [{"attention_mask": mask_BL}]
    for more in given:  # without a mask, padding is what the ids say
        together = handle.generate(input_ids=padded_BL, **more, **GREEDY)
        for row in range(3):
            single = handle.generate(input_ids=padded_BL[row : row + 1, mask_BL[row] == 1], **GREEDY)
            assert torch.equal(together[row, L:], single[0, -5:]), row


@pytest.mark.parametrize(("way", "name"), [("front", "t5"), ("front", "bart"), ("cache", "t5")])
def test_rows_of_an_encoder_padded_in_front_are_as_one_by_one(way: str, name: str) -> None:
    handle = handle_of(way, name, seq2seq=True)
    _, padded_BL, mask_BL = batch(name)
    together = handle.generate(input_ids=padded_BL, attention_mask=mask_BL, **GREEDY)
    for row in range(3):
        single = handle.generate(input_ids=padded_BL[row : row + 1, mask_BL[row] == 1], **GREEDY)
        assert torch.equal(together[row], single[0]), row


#: name -> arguments that give what nothing gives
SAME: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
}


@ways
@both
@pytest.mark.parametrize("same", SAME)
def test_the_kind_of_cache_is_of_no_matter(way: str, name: str, seq2seq: bool, same: str) -> None:
    handle = handle_of(way, name, seq2seq)
    ids_BL, padded_BL, mask_BL = batch(name)
    for given in ({"input_ids": ids_BL}, {"input_ids": padded_BL, "attention_mask": mask_BL, "num_beams": 2}):
        if same == "static" and given.get("num_beams") and seq2seq and way == "front":
            continue  # as transformers has it
        assert torch.equal(handle.generate(**given, **SAME[same], **GREEDY), handle.generate(**given, **GREEDY))


@ways
@both
def test_embeddings_for_ids(way: str, name: str, seq2seq: bool) -> None:
    handle = handle_of(way, name, seq2seq)
    ids_BL, _, _ = batch(name)
    x_BLD = handle.get_input_embeddings()(ids_BL).detach()
    found = handle.generate(inputs_embeds=x_BLD, **GREEDY)
    assert torch.equal(found[:, -5:], handle.generate(input_ids=ids_BL, **GREEDY)[:, -5:])


@ways
@decoders
def test_without_an_input_it_begins_as_the_bare_model_does(way: str, name: str) -> None:
    handle = handle_of(way, name)
    for begin in (3, 5):
        found = handle.generate(bos_token_id=begin, **GREEDY)
        assert torch.equal(found, handle.generate(input_ids=torch.tensor([[begin]]), **GREEDY))


def empty(kind: str, handle: Any, size: int) -> Any:
    from transformers import DynamicCache, StaticCache

    config = handle.config.get_text_config(decoder=True)
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=size)


@ways
@decoders
def test_an_empty_cache_of_the_callers(way: str, name: str) -> None:
    handle, (ids_BL, _, _) = handle_of(way, name), batch(name)
    wanted = handle.generate(input_ids=ids_BL, **GREEDY)
    for kind in ("dynamic", "static"):
        cache = empty(kind, handle, T + L + 4)
        assert torch.equal(handle.generate(input_ids=ids_BL, past_key_values=cache, **GREEDY), wanted), kind


@ways
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("size", [T - 1, T + L - 1, T + L + 3])
def test_a_cache_too_short_is_refused(way: str, name: str, size: int) -> None:
    handle, (ids_BL, _, _) = handle_of(way, name), batch(name)
    cache = empty("static", handle, size)
    with pytest.raises(PromptError, match=f"room for {size} tokens"):
        handle.generate(input_ids=ids_BL, past_key_values=cache, **GREEDY)
    if size < T + L:
        with pytest.raises(PromptError, match=f"room for {size} tokens"):
            handle(input_ids=ids_BL, past_key_values=empty("static", handle, size))


@ways
@decoders
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_second_call_goes_on_where_the_first_ended(way: str, name: str, padded: bool) -> None:
    handle, (ids_BL, padded_BL, mask_BL) = handle_of(way, name), batch(name)
    given = {"input_ids": padded_BL, "attention_mask": mask_BL} if padded else {"input_ids": ids_BL}
    wanted = handle.generate(**given, **{**GREEDY, "max_new_tokens": 6})
    first = handle.generate(**given, **{**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True})
    more = {"attention_mask": torch.cat([mask_BL, mask_BL.new_ones(3, 3)], 1)} if padded else {}
    second = handle.generate(
        input_ids=first.sequences, past_key_values=first.past_key_values, **more, **{**GREEDY, "max_new_tokens": 3}
    )
    assert torch.equal(second, wanted)


@ways
@decoders
def test_a_conversation(way: str, name: str) -> None:
    """What was generated, and what is said to it: only the latter is read."""
    handle, (ids_BL, _, _) = handle_of(way, name), batch(name)
    first = handle.generate(input_ids=ids_BL, **GREEDY, return_dict_in_generate=True)
    both_BL = torch.cat([first.sequences, ids_BL[:, :3]], 1)
    found = handle.generate(input_ids=both_BL, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(found, handle.generate(input_ids=both_BL, **GREEDY))


@ways
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@decoders
def test_token_by_token(way: str, name: str, padded: bool) -> None:
    handle, (ids_BL, padded_BL, mask_BL) = handle_of(way, name), batch(name)
    if padded:
        ids_BL = padded_BL
    else:
        mask_BL = torch.ones_like(mask_BL)
    with torch.no_grad():
        wanted = handle(input_ids=ids_BL, attention_mask=mask_BL).logits[:, -3:]
        out = handle(input_ids=ids_BL[:, :4], attention_mask=mask_BL[:, :4], use_cache=True)
        found = []
        for at in range(4, L):
            out = handle(
                input_ids=ids_BL[:, at : at + 1],
                attention_mask=mask_BL[:, : at + 1],
                past_key_values=out.past_key_values,
            )
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-5)


@ways
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_token_by_token_of_a_decoder(way: str, name: str) -> None:
    handle, (_, padded_BL, mask_BL) = handle_of(way, name, seq2seq=True), batch(name)
    given, wanted_BL = {"input_ids": padded_BL, "attention_mask": mask_BL}, torch.tensor([[0, 5, 6, 7]]).expand(3, -1)
    with torch.no_grad():
        wanted = handle(**given, decoder_input_ids=wanted_BL).logits
        out = handle(**given, decoder_input_ids=wanted_BL[:, :1], use_cache=True)
        found = [out.logits]
        for at in range(1, 4):
            out = handle(**given, decoder_input_ids=wanted_BL[:, at : at + 1], past_key_values=out.past_key_values)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-5)


@ways
@both
def test_guessed_tokens_are_checked(way: str, name: str, seq2seq: bool) -> None:
    """Assisted decoding: by a model that knows of no prompt, and by what the input has."""
    handle, ids = handle_of(way, name, seq2seq), torch.tensor([[5, 6, 7, 8, 5, 6]])
    options = {**GREEDY, "max_new_tokens": 8}
    wanted = handle.generate(input_ids=ids, **options)
    assistant = model_of(name, task_of(name, seq2seq))
    found = handle.generate(input_ids=ids, prompt_lookup_num_tokens=2, **options)
    assert torch.equal(found, wanted)
    if seq2seq and way == "front":
        with pytest.raises(PromptError, match="assistant"):
            handle.generate(input_ids=ids, assistant_model=assistant, **options)
    else:
        assert torch.equal(handle.generate(input_ids=ids, assistant_model=assistant, **options), wanted)


def test_guessing_cannot_go_on() -> None:
    handle, ids = handle_of("front", "llama"), torch.tensor([[5, 6, 7, 8, 5, 6]])
    first = handle.generate(input_ids=ids, **GREEDY, return_dict_in_generate=True)
    with pytest.raises(PromptError, match="Assisted"):
        handle.generate(
            input_ids=first.sequences, past_key_values=first.past_key_values, prompt_lookup_num_tokens=2, **GREEDY
        )


#: what is asked for -> how, in a call and in the model's own generation config
LENGTHS = {
    "max_length": {"max_length": 12},
    "min_length": {"max_length": 14, "min_length": 13, "eos_token_id": list(range(3, 40))},
    "beams": {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2},
    "static": {"max_new_tokens": 5, "cache_implementation": "static"},
    "max_length, static": {"max_length": 12, "cache_implementation": "static"},
}


@ways
@pytest.mark.parametrize(("name", "seq2seq"), [("llama", False), ("gpt2", False), ("t5", True)])
@pytest.mark.parametrize("asked", LENGTHS)
def test_what_is_asked_in_a_config(way: str, name: str, seq2seq: bool, asked: str) -> None:
    from transformers import GenerationConfig

    handle, (ids_BL, _, _) = handle_of(way, name, seq2seq), batch(name)
    wanted = handle.generate(input_ids=ids_BL, **LENGTHS[asked])
    if "max_length" in LENGTHS[asked]:
        assert wanted.shape[1] <= LENGTHS[asked]["max_length"]
    config = GenerationConfig(**LENGTHS[asked])
    before = copy.deepcopy(config)
    assert torch.equal(handle.generate(input_ids=ids_BL, generation_config=config), wanted)
    assert config == before
    own = handle.base_model.model.generation_config
    own.update(**LENGTHS[asked])
    before = copy.deepcopy(own)
    assert torch.equal(handle.generate(input_ids=ids_BL), wanted)
    assert own == before


@pytest.mark.parametrize(
    ("way", "name", "task", "given", "match"),
    [
        ("front", "bert", "SEQ_CLS", {}, "cannot generate"),
        ("front", "llama", "CAUSAL_LM", {"position_ids": torch.arange(L)[None]}, "position_ids"),
        ("cache", "llama", "CAUSAL_LM", {"cache_implementation": "quantized"}, "quantized"),
        ("cache", "t5", "SEQ_2_SEQ_LM", {"cache_implementation": "offloaded"}, "offloaded"),
        ("front", "t5", "SEQ_2_SEQ_LM", {"encoder_outputs": (torch.zeros(3, L, 16),)}, "encoder_outputs"),
        ("front", "gpt2", "CAUSAL_LM", {"input_ids": torch.full((1, 46), 5)}, "48 positions"),
        ("cache", "gpt2", "CAUSAL_LM", {"input_ids": torch.full((1, 46), 5)}, "48 positions"),
    ],
)
def test_what_cannot_be_is_refused_by_name(way: str, name: str, task: str, given: dict[str, Any], match: str) -> None:
    config: Any = PROMPTS[WAYS[way]].config
    model = model_of(name, task)
    handle = inlay.get_peft_model(model, config(task_type=task, num_virtual_tokens=T)).eval()
    with pytest.raises(PromptError, match=match) as caught:
        handle.generate(**{"input_ids": batch()[0], **given})
    assert isinstance(caught.value, PeftError)


@ways
def test_generating_leaves_no_trace(way: str) -> None:
    handle, (ids_BL, _, _) = handle_of(way, "llama"), batch()
    before: Callable[[], Any] = lambda: (  # noqa: E731
        dict(handle.base_model.model.__dict__),
        copy.deepcopy(handle.base_model.model.generation_config),
    )
    attributes, config = before()
    handle.generate(input_ids=ids_BL, **GREEDY)
    after, found = before()
    assert attributes.keys() == after.keys()
    assert config == found
    with handle.disable_adapter():
        assert torch.equal(
            handle.generate(input_ids=ids_BL, **GREEDY), model_of("llama", "CAUSAL_LM").generate(ids_BL, **GREEDY)
        )
