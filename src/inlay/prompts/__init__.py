"""The table of prompt learning. To add one: a file beside this one, and a row here."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.config import AdapterConfig
from inlay.prompts._abstract import AbstractPrompt, Host, PromptLearningConfig
from inlay.prompts.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from inlay.prompts.prompt_tuning import PromptEmbedding, PromptTuningConfig

AnyConfig = AdapterConfig | PromptLearningConfig  # of what a handle may hold


@dataclass(frozen=True)
class PromptMethod:
    """One way to learn a prompt: its config, and the encoder that makes it."""

    config: type[PromptLearningConfig]
    encoder: type[AbstractPrompt]


PROMPTS: dict[str, PromptMethod] = {
    "PROMPT_TUNING": PromptMethod(PromptTuningConfig, PromptEmbedding),
    "PREFIX_TUNING": PromptMethod(PrefixTuningConfig, PrefixEncoder),
}


def encoder_for(config: PromptLearningConfig, host: Host) -> AbstractPrompt:
    """A fresh encoder; ``config`` is `PromptLearningConfig.fitted` to the model.

    Raises:
        PromptError: The prompt cannot start as it should.
    """
    return PROMPTS[config.method].encoder(config, host)


__all__ = ["PROMPTS", "AbstractPrompt", "AnyConfig", "Host", "PromptLearningConfig", "PromptMethod", "encoder_for"]
