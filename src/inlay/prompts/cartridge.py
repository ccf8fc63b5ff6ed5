"""Cartridges, Eyuboglu et al. 2025 (https://arxiv.org/abs/2506.06266).

The prompt stands in the cache, as in prefix tuning, and its first rows are never trained: where it starts at the keys
and values of a text (`inlay.initialize_kv_prefix_from_text`), they keep the tokens that all others look to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inlay.config import within
from inlay.errors import ConfigError
from inlay.prompts._abstract import EMBEDDINGS, AbstractPrompt, Host, PromptLearningConfig, put


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Config of a cartridge.

    Args:
        num_frozen_tokens (`int`, *optional*, defaults to 1): How many of the first tokens stay as they start.

    Raises:
        ConfigError: That is more than the prompt has.

    Example:
        >>> CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=8).num_frozen_tokens
        1
    """

    num_frozen_tokens: int = field(default=1, metadata=within("[0, 2147483647]"))

    method = "CARTRIDGE"
    in_cache = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens is {self.num_frozen_tokens}, the prompt has {self.num_virtual_tokens} tokens: "
                "make num_frozen_tokens smaller, or num_virtual_tokens larger."
            )


class CartridgeEncoder(AbstractPrompt):
    """A table of keys and values in two parts."""

    frozen = frozenset({"frozen_embedding"})
    frozen_embedding: nn.Parameter | None
    trainable_embedding: nn.Parameter

    def __init__(self, config: CartridgeConfig, host: Host) -> None:
        super().__init__(config, host)
        length, width = config.shape
        at = config.num_frozen_tokens
        self.frozen_embedding = nn.Parameter(torch.randn(at, width), requires_grad=False) if at else None
        self.trainable_embedding = nn.Parameter(torch.randn(length - at, width))

    def forward(self, task_ids_B: Tensor | None = None) -> Tensor:
        frozen = self.frozen_embedding
        return self.trainable_embedding if frozen is None else torch.cat([frozen, self.trainable_embedding])

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        if EMBEDDINGS in tensors:
            at = self.config.num_frozen_tokens
            if self.frozen_embedding is not None:
                put(self.frozen_embedding, tensors[EMBEDDINGS][:at])
            put(self.trainable_embedding, tensors[EMBEDDINGS][at:])
