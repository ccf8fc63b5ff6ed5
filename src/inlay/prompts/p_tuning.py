"""P-tuning, Liu et al. 2021 (https://arxiv.org/abs/2103.10385).

The prompt is what a small network gives for a table of embeddings E (T, D), so that its tokens are trained together:

    MLP:   P = W2 relu(W1 relu(W0 E))            LSTM:  P = W1 relu(W0 lstm(E)), the LSTM in both directions

Files keep only P, and the network is gone once it is loaded.
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass, field

from torch import Tensor, nn

from inlay.config import RANKS, within
from inlay.errors import ConfigError, PeftWarning
from inlay.prompts._abstract import AbstractPrompt, Host, PromptLearningConfig, table


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that a prompt is trained through."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Config of p-tuning.

    Args:
        encoder_reparameterization_type (`PromptEncoderReparameterizationType` or `str`, *optional*, defaults to
            ``"MLP"``): ``"MLP"`` or ``"LSTM"``.
        encoder_hidden_size (`int`, *optional*): Width inside the network; ``token_dim`` if not given.
        encoder_num_layers (`int`, *optional*, defaults to 2): Layers of the LSTM; the MLP has its three linears.
        encoder_dropout (`float`, *optional*, defaults to 0.0): Dropout between the layers of the LSTM.

    Raises:
        ConfigError: There is no such network.

    Example:
        >>> PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=8).encoder_num_layers
        2
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = (
        PromptEncoderReparameterizationType.MLP.value
    )
    encoder_hidden_size: int | None = field(default=None, metadata=within(RANKS))
    encoder_num_layers: int = field(default=2, metadata=within(RANKS))
    encoder_dropout: float = field(default=0.0, metadata=within("[0, 1]"))

    method = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [kind.value for kind in PromptEncoderReparameterizationType]
        if self.encoder_reparameterization_type not in kinds:
            raise ConfigError(
                f"encoder_reparameterization_type must be one of {', '.join(kinds)}, "
                f"got {self.encoder_reparameterization_type!r}."
            )

    def fitted(self, host: Host) -> PromptEncoderConfig:
        full = super().fitted(host)
        full.encoder_hidden_size = self.encoder_hidden_size or full.token_dim
        return full


class PromptEncoder(AbstractPrompt):
    """A table of embeddings and a network; the table alone once it holds what the network gave."""

    resumable = False

    def __init__(self, config: PromptEncoderConfig, host: Host) -> None:
        super().__init__(config, host)
        width, hidden = config.token_dim or 0, config.encoder_hidden_size or 0
        self.embedding = table(*config.shape)
        if self.fixed:
            return
        if config.encoder_reparameterization_type == "LSTM":
            layers, p = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=p, batch_first=True, bidirectional=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
            return
        if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
            warnings.warn(
                f"encoder_num_layers={config.encoder_num_layers} is not used: the MLP has three linears. Leave it "
                'out, or set encoder_reparameterization_type="LSTM".',
                PeftWarning,
                stacklevel=2,
            )
        middle = (nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.mlp_head = nn.Sequential(nn.Linear(width, hidden), *middle, nn.Linear(hidden, width))

    def forward(self, task_ids_B: Tensor | None = None) -> Tensor:
        E_TD = self.embedding.weight
        if self.fixed:
            return E_TD
        if "lstm_head" in self._modules:
            return self.mlp_head(self.lstm_head(E_TD[None])[0])[0]  # type: ignore[no-any-return]
        return self.mlp_head(E_TD)  # type: ignore[no-any-return]
