"""Context-aware prompt tuning, Blau et al. 2024 (https://arxiv.org/abs/2410.17222).

The prompt begins as a context of solved examples, and moves only a little: P = E + delta, where E (T, D) are the
frozen embeddings of the context's tokens and row t of delta stays within a ball of L2 norm epsilon_t sqrt(D / 2048).
The type of a token, counted on by 4 from each example to the next, says what it is (type % 4): 1 and 3 belong to the
format, 2 to the input, and 0 to a label, whose row does not move. The labels of the context are learned from too,
each group of them weighing less the farther it stands from the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.config import TaskType, within
from inlay.errors import ConfigError, PromptError, TokenIndexError
from inlay.prompts._abstract import EMBEDDINGS, AbstractPrompt, Host, PromptLearningConfig, put, table
from inlay.prompts.prompt_tuning import rows


@dataclass
class CPTConfig(PromptLearningConfig):
    """Config of context-aware prompt tuning; calls that train take ``input_type_mask`` (B, L) beside ``labels``.

    That holds the types of the input's tokens, 0 for padding; without it, all labels of the input are one group.

    Args:
        cpt_token_ids (`list[int]`, *optional*): The tokens of the context.
        cpt_mask (`list[int]`, *optional*): 1 for each of them; kept for files, all tokens are seen.
        cpt_tokens_type_mask (`list[int]`, *optional*): Their types; all belong to the format if not given.
        opt_weighted_loss_type (`str`, *optional*, defaults to ``"none"``): ``"decay"`` weighs groups of labels.
        opt_loss_decay_factor (`float`, *optional*, defaults to 1.0): Weight of a group over that of the next one.
        opt_projection_epsilon (`float`, *optional*, defaults to 0.1): How far tokens of inputs may move.
        opt_projection_format_epsilon (`float`, *optional*, defaults to 0.1): How far tokens of the format may move.
        tokenizer_name_or_path (`str`, *optional*): Where the tokens are from; kept for files.

    Raises:
        ConfigError: The task is not ``"CAUSAL_LM"``, or the three lists do not belong together.

    Example:
        >>> CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 4]).num_virtual_tokens
        2
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: float = field(default=1.0, metadata=within("[0, inf)"))
    opt_projection_epsilon: float = field(default=0.1, metadata=within("[0, inf)"))
    opt_projection_format_epsilon: float = field(default=0.1, metadata=within("[0, inf)"))
    tokenizer_name_or_path: str | None = None

    method = "CPT"
    example = {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2, 3, 4], "cpt_tokens_type_mask": [1, 2, 3, 4]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(f"CPTConfig only supports task_type = CAUSAL_LM. It is {self.task_type!r}.")
        ids = self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        mask = self.cpt_mask = [1] * len(ids) if self.cpt_mask is None else self.cpt_mask
        types = self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * len(ids)
        too_large = any(abs(n) >= 2**31 for n in (*ids, *types))
        if not ids or len(mask) != len(ids) or len(types) != len(ids) or min(types) < 0 or too_large:
            raise ConfigError(
                "cpt_token_ids, cpt_mask and cpt_tokens_type_mask need a number for every token of the context, below "
                f"2147483648, types of 0 or more: they have {len(ids)}, {len(mask)} and {len(types)}, "
                f"types {types[:8]}."
            )
        self.num_virtual_tokens, self.num_transformer_submodules = len(ids), 1


class CPTEmbedding(AbstractPrompt):
    """The context's embeddings and how far each has moved."""

    resumable = False  # a file holds where the rows have come to, and not what they may move around
    frozen = frozenset({"embedding.weight"})
    alone = True
    arguments = ("input_type_mask",)

    ids_T: Tensor
    types_T: Tensor
    epsilon_T1: Tensor

    def __init__(self, config: CPTConfig, host: Host) -> None:
        super().__init__(config, host)
        self.embedding, self.delta_embedding = table(*config.shape, trained=False), table(*config.shape)
        torch.nn.init.zeros_(self.delta_embedding.weight)
        of_format, of_input = config.opt_projection_format_epsilon, config.opt_projection_epsilon
        types_T = torch.tensor(config.cpt_tokens_type_mask)
        epsilon_T = torch.tensor([0.0, of_format, of_input, of_format])[types_T % 4] * (config.shape[1] / 2048) ** 0.5
        self.register_buffer("ids_T", torch.tensor(config.cpt_token_ids), persistent=False)
        self.register_buffer("types_T", types_T, persistent=False)
        self.register_buffer("epsilon_T1", epsilon_T[:, None], persistent=False)

    def start(self, host: Host) -> None:
        low, high, V = int(self.ids_T.min()), int(self.ids_T.max()), len(host.table)
        if low < 0 or high >= V:
            raise TokenIndexError(f"cpt_token_ids has {low if low < 0 else high}, the vocabulary has {V} tokens.")
        put(self.embedding.weight, rows(host, self.ids_T))

    def forward(self, task_ids_B: Tensor | None = None) -> Tensor:
        delta_TD = self.delta_embedding.weight
        norm_T1 = delta_TD.detach().norm(dim=1, keepdim=True)
        within_TD = torch.where(norm_T1 > self.epsilon_T1, delta_TD.detach() * (self.epsilon_T1 / norm_T1), delta_TD)
        if not (torch.is_grad_enabled() and delta_TD.requires_grad):
            return self.embedding.weight + within_TD
        put(delta_TD, within_TD)  # the last step may have left the ball; the gradient passes as if it had not
        return self.embedding.weight + delta_TD * (self.types_T % 4 != 0)[:, None]

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        super().take(tensors)
        if EMBEDDINGS in tensors:
            torch.nn.init.zeros_(self.delta_embedding.weight)

    def _types(self, labels_BL: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Types (B, T + L) of the prompt and the input, whose own count on from the prompt's last example."""
        types_BL = given.get("input_type_mask", torch.full_like(labels_BL, 4))
        if not isinstance(types_BL, Tensor) or types_BL.shape != labels_BL.shape:
            raise PromptError(f"input_type_mask must be a tensor of the labels' shape {tuple(labels_BL.shape)}.")
        prompt_T, types_BL = self.types_T.to(labels_BL.device), types_BL.to(labels_BL.device)
        last = (prompt_T.max() + 3) // 4 * 4
        return torch.cat([prompt_T.expand(len(labels_BL), -1), (types_BL + last).where(types_BL > 0, 0)], 1)

    def labels(self, labels_BL: Tensor, given: dict[str, Any]) -> Tensor:
        types_BS = self._types(labels_BL, given)
        both_BS = torch.cat([self.ids_T.to(labels_BL).expand(len(labels_BL), -1), labels_BL], 1)
        return both_BS.where((types_BS > 0) & (types_BS % 4 == 0), -100)

    def loss(self, outputs: Any, labels_BS: Tensor, given: Mapping[str, Any]) -> Tensor:
        logits_BSV = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[1]
        if logits_BSV is None:
            raise PromptError(
                f"CPT computes its loss from logits, and this {type(outputs).__name__} has none: use another prompt "
                "or a call that returns logits."
            )
        wanted_BS = labels_BS[:, 1:].to(logits_BSV.device)
        each_BS = F.cross_entropy(logits_BSV[:, :-1].float().transpose(1, 2), wanted_BS, reduction="none")
        if self.config.opt_weighted_loss_type == "decay":
            after_BS = groups_after(self._types(labels_BS[:, self.length :], given))
            each_BS = each_BS * self.config.opt_loss_decay_factor ** after_BS[:, 1:].to(each_BS)
        return each_BS.sum() / (wanted_BS != -100).sum()


def groups_after(types_BS: Tensor) -> Tensor:
    """How many groups of labels of its row come after each label's own; 0 for other tokens.

    Example:
        >>> groups_after(torch.tensor([[1, 4, 4, 5, 8, 1, 16]]))
        tensor([[0, 2, 2, 0, 1, 0, 0]])
    """
    kinds_G = torch.unique(types_BS[(types_BS > 0) & (types_BS % 4 == 0)])
    is_BSG = types_BS[..., None] == kinds_G
    there_BG = is_BSG.any(1).long()
    after_BG = there_BG.flip(1).cumsum(1).flip(1) - there_BG
    after_BS: Tensor = (is_BSG * after_BG[:, None]).sum(2)
    return after_BS
