"""Prefix tuning, Li and Liang 2021 (https://arxiv.org/abs/2101.00190).

The prompt stands in the cache: a table (T, layers * 2 * D) holds for every layer T keys and T values. While training
it may come from a smaller table through an MLP, of which files keep only what it gave.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from inlay.config import RANKS, within
from inlay.prompts._abstract import AbstractPrompt, Host, PromptLearningConfig, table


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Config of prefix tuning.

    Args:
        init_weights (`str`, *optional*): ``"zero"`` starts at zeros; random numbers if not given.
        encoder_hidden_size (`int`, *optional*): Width inside the MLP; ``token_dim`` if not given.
        prefix_projection (`bool`, *optional*, defaults to `False`): Train through an MLP.

    Example:
        >>> PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8).prefix_projection
        False
    """

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = field(default=None, metadata=within(RANKS))
    prefix_projection: bool = False

    method = "PREFIX_TUNING"
    in_cache = True

    def fitted(self, host: Host) -> PrefixTuningConfig:
        full = super().fitted(host)
        full.encoder_hidden_size = self.encoder_hidden_size or full.token_dim
        return full


class PrefixEncoder(AbstractPrompt):
    """A table of keys and values, or a narrower one and an MLP."""

    def __init__(self, config: PrefixTuningConfig, host: Host) -> None:
        super().__init__(config, host)
        width, hidden = config.token_dim or 0, config.encoder_hidden_size or 0
        length, full = config.shape
        projected = config.prefix_projection and not self.fixed
        self.resumable = not config.prefix_projection
        self.embedding = table(length, width if projected else full)
        if projected:
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, full))
        if config.init_weights == "zero":  # what comes out is
            for parameter in (self.transform[2] if projected else self.embedding).parameters():
                nn.init.zeros_(parameter)

    def forward(self, task_ids_B: Tensor | None = None) -> Tensor:
        P_TD = self.embedding.weight
        return P_TD if self.fixed or "transform" not in self._modules else self.transform(P_TD)
