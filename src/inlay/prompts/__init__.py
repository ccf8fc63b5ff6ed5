"""The table of prompt learning. To add one: a file beside this one, and a row here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from inlay.config import AdapterConfig
from inlay.errors import PromptError
from inlay.prompts._abstract import EMBEDDINGS, AbstractPrompt, Host, PromptLearningConfig
from inlay.prompts.cartridge import CartridgeConfig, CartridgeEncoder
from inlay.prompts.cpt import CPTConfig, CPTEmbedding
from inlay.prompts.multitask import MultitaskPromptEmbedding, MultitaskPromptTuningConfig
from inlay.prompts.p_tuning import PromptEncoder, PromptEncoderConfig
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
    "MULTITASK_PROMPT_TUNING": PromptMethod(MultitaskPromptTuningConfig, MultitaskPromptEmbedding),
    "P_TUNING": PromptMethod(PromptEncoderConfig, PromptEncoder),
    "CPT": PromptMethod(CPTConfig, CPTEmbedding),
    "PREFIX_TUNING": PromptMethod(PrefixTuningConfig, PrefixEncoder),
    "CARTRIDGE": PromptMethod(CartridgeConfig, CartridgeEncoder),
}


def encoder_for(config: PromptLearningConfig, host: Host, fresh: bool = True) -> AbstractPrompt:
    """An encoder; ``config`` is `PromptLearningConfig.fitted` to the model.

    One that is not ``fresh`` waits for a file's values: the texts and paths that its config names are not looked at.

    Raises:
        PromptError: The prompt cannot start as it should.
    """
    prompt = PROMPTS[config.method].encoder(config, host)
    if fresh:
        prompt.start(host)
    return prompt


def outline_for(config: PromptLearningConfig, host: Host) -> AbstractPrompt:
    """The same without memory, and without what trains it: what a file's claims cost until they are compared.

    Raises:
        PromptError: No prompt can be as large as the config says.
    """
    try:
        with torch.device("meta"):
            return encoder_for(replace(config, inference_mode=True), host, fresh=False)
    except RuntimeError as error:  # more elements than can be counted
        raise PromptError(f"No prompt can have the numbers of this {type(config).__name__}: {error}.") from error


__all__ = [
    "EMBEDDINGS",
    "PROMPTS",
    "AbstractPrompt",
    "AnyConfig",
    "Host",
    "PromptLearningConfig",
    "PromptMethod",
    "encoder_for",
    "outline_for",
]
