"""Prompt tuning, Lester et al. 2021 (https://arxiv.org/abs/2104.08691).

The prompt is a table of embeddings P (T, D), trained as it stands; the input becomes [P; x].
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.errors import ConfigError, PromptError
from inlay.prompts._abstract import AbstractPrompt, Host, PromptLearningConfig, put, table


class PromptTuningInit(str, enum.Enum):
    """Where a prompt starts: at random numbers, at tokens drawn from the vocabulary, or at those of a text."""

    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    TEXT = "TEXT"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Config of prompt tuning.

    Args:
        prompt_tuning_init (`PromptTuningInit` or `str`, *optional*, defaults to ``"RANDOM"``): ``"RANDOM"``,
            ``"SAMPLE_VOCAB"`` or ``"TEXT"``.
        prompt_tuning_init_text (`str`, *optional*): The text to start at; it is repeated up to the prompt's length.
        tokenizer_name_or_path (`str`, *optional*): The tokenizer of that text.
        tokenizer_kwargs (`dict`, *optional*): For its ``from_pretrained``.

    Raises:
        ConfigError: A text start lacks its text or its tokenizer.

    Example:
        >>> PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8).prompt_tuning_init
        'RANDOM'
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM.value
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    method = "PROMPT_TUNING"
    starts = tuple(kind.value for kind in PromptTuningInit)

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        if kind not in self.starts:
            raise ConfigError(f"prompt_tuning_init must be one of {', '.join(self.starts)}, got {kind!r}.")
        missing = [n for n in ("tokenizer_name_or_path", "prompt_tuning_init_text") if not getattr(self, n)]
        if kind == "TEXT" and missing:
            raise ConfigError(f"prompt_tuning_init='TEXT' needs {' and '.join(missing)}.")
        if self.tokenizer_kwargs and kind != "TEXT":
            raise ConfigError(f"tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'. It is {kind!r}.")


class PromptEmbedding(AbstractPrompt):
    """A table of embeddings."""

    def __init__(self, config: PromptTuningConfig, host: Host) -> None:
        super().__init__(config, host)
        self.embedding = table(*config.shape)

    def start(self, host: Host) -> None:
        start_at_tokens(self.config, host, self.embedding.weight)


def rows(host: Host, tokens: Tensor) -> Tensor:
    """What the model's embeddings give for some tokens: with their scale, and what is adapted in them."""
    with torch.no_grad():
        given: Tensor = host.embeddings(tokens.to(host.table.device))
    return given


def start_at_tokens(config: Any, host: Host, table_TD: Tensor) -> None:
    """Fills a prompt's table with the embeddings of the tokens that its config starts at; random numbers stay."""
    kind = getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init)
    if kind == "SAMPLE_VOCAB":
        put(table_TD, rows(host, torch.randint(0, len(host.table), (config.tokens,))))
    if kind != "TEXT":
        return
    ids = _tokenizer(config)(config.prompt_tuning_init_text)["input_ids"]
    if not ids or len(ids) > config.num_virtual_tokens:
        raise PromptError(
            f"prompt_tuning_init_text has {len(ids)} tokens, the prompt has {config.num_virtual_tokens}: "
            f"{'give a text' if not ids else 'shorten the text, or make num_virtual_tokens larger'}."
        )
    tokens = torch.tensor((ids * config.tokens)[: config.tokens])
    check_vocabulary(host, tokens)
    put(table_TD, rows(host, tokens))


def check_vocabulary(host: Host, ids: Tensor) -> None:
    """Raises `PromptError` for a token that the model does not have."""
    if (last := int(ids.max())) >= len(host.table):
        raise PromptError(
            f"The tokenizer gives the token {last}, the model's vocabulary has {len(host.table)}: they do not belong "
            "together."
        )


def _tokenizer(config: Any) -> Any:
    from transformers import AutoTokenizer

    options = {**(config.tokenizer_kwargs or {}), "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    except (OSError, ValueError) as error:
        raise PromptError(f"The tokenizer {config.tokenizer_name_or_path!r} cannot be had: {error}") from error
