"""A text becomes an invocation only if prompts that hold the text hold its tokens."""

from __future__ import annotations

from typing import Any

import pytest

import inlay
from inlay.errors import ConfigError, InvocationError

CORPUS = [
    "judge the text. Some text. Yes",
    "the judge judges, Yes",
    "<judge> Yes\n<judge>\nNo",
    "Some text.\njudge",
] * 4


def tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "byte level":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()  # a space before the text itself
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<|judge|>"]))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_a_special_token_is_itself_everywhere(kind: str) -> None:
    words = tokenizer(kind)
    tokens = inlay.invocation_tokens(words, "<|judge|>")
    assert tokens == [words.convert_tokens_to_ids("<|judge|>")]
    config = inlay.LoraConfig(alora_invocation_tokens=tokens, task_type="CAUSAL_LM")
    assert config.alora_invocation_tokens == tokens


def test_a_word_that_has_other_tokens_inside_a_prompt_is_reported_with_both() -> None:
    words = tokenizer("metaspace")
    alone = words("judge")["input_ids"]
    inside = words("Some text.judge")["input_ids"][len(words("Some text.")["input_ids"]) :]
    assert alone != inside
    with pytest.raises(InvocationError, match="Some text") as error:
        inlay.invocation_tokens(words, "judge")
    assert isinstance(error.value, ConfigError)
    for found in (alone, inside):
        assert str(found) in str(error.value)


def test_the_end_of_a_text_counts_too() -> None:
    words = tokenizer("byte level")
    assert inlay.invocation_tokens(words, "<judge>\n") == words("<judge>\n")["input_ids"]
    with pytest.raises(InvocationError, match=r"the\{\}s"):
        inlay.invocation_tokens(words, " judge", probes=["the{}s"])


def test_ones_own_prompts_are_tried_instead() -> None:
    words = tokenizer("metaspace")
    assert inlay.invocation_tokens(words, "judge", probes=["the {} Yes"]) == words("judge")["input_ids"]


def test_what_a_probe_says_besides_does_not_count() -> None:
    words = tokenizer("metaspace")
    with pytest.raises(InvocationError):
        inlay.invocation_tokens(words, "judge", probes=["judge the text.{}"])


@pytest.mark.parametrize("text", ["", "judge ☃"])
def test_a_text_without_tokens_of_its_own(text: str) -> None:
    with pytest.raises(InvocationError, match="unknown"):
        inlay.invocation_tokens(tokenizer("metaspace"), text)
