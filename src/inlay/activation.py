"""Activated LoRA (https://arxiv.org/abs/2504.12397): adapters that act from their invocation on, and not before.

What stands before the invocation is the base model's bit for bit, keys and values too, so that one cache serves the
base and its adapters. Where each row's adapter begins is found once per call, on tensors; layers are handed a mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.errors import ConfigError, InvocationError, PeftWarning, RowsError

NEVER = torch.iinfo(torch.int64).max  # where a row has no invocation


def last_occurrence(ids_BL: Tensor, tokens: Sequence[int], mask_BL: Tensor | None = None) -> Tensor:
    """For each row where the last occurrence of ``tokens`` begins, or `NEVER`.

    Args:
        ids_BL (`Tensor`): Rows of tokens.
        tokens (`Sequence[int]`): The sequence sought.
        mask_BL (`Tensor`, *optional*): 0 for padding, which is no part of an occurrence.

    Example:
        >>> last_occurrence(torch.tensor([[7, 8, 1, 7, 8], [1, 2, 3, 4, 7]]), [7, 8]).tolist()[0]
        3
    """
    B, L = ids_BL.shape
    n = len(tokens)
    if n > L:
        return torch.full((B,), NEVER, device=ids_BL.device)
    found = (ids_BL.unfold(1, n, 1) == torch.tensor(tokens, device=ids_BL.device)).all(2)
    if mask_BL is not None and mask_BL.shape == ids_BL.shape:
        found = found & (mask_BL.unfold(1, n, 1) != 0).all(2)
    at_B = torch.where(found, torch.arange(L - n + 1, device=ids_BL.device), -1).amax(1)
    return torch.where(at_B < 0, NEVER, at_B)


def check_invocation(tokens: Sequence[int], task_type: str | None) -> None:
    """Raises `ConfigError` where no call could hold these tokens."""
    if not tokens or min(tokens) < 0:
        raise ConfigError(f"alora_invocation_tokens must be one or more tokens, got {tokens}.")
    if task_type not in (None, "CAUSAL_LM"):
        text = f"aLoRA is for task_type='CAUSAL_LM', got {task_type!r}."
        warnings.warn(text, PeftWarning, stacklevel=5)


PROBES = ("Some text.{}", "Some text. {}", "Some text.\n{}", "{}Yes", "{} Yes", "{}\nYes")


def invocation_tokens(tokenizer: Any, invocation_string: str, probes: Sequence[str] = PROBES) -> list[int]:
    """The tokens of a text, for ``alora_invocation_tokens``, if a prompt that holds the text holds them too.

    Tokenizers join characters across a boundary, so that a text may have other tokens inside a prompt than alone; the
    adapter would then never find its invocation. Special tokens and line breaks are safe to begin and end with.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        invocation_string (`str`): The text.
        probes (`Sequence[str]`, *optional*): Prompts to try, with ``{}`` where the text stands. By default typical
            ones: after and before a word, a space, a line break.

    Raises:
        InvocationError: The text is tokenized differently in a probe, or has a token that stands for what is unknown.

    Example:
        >>> def characters(text, add_special_tokens):
        ...     return {"input_ids": [ord(c) for c in text]}
        >>> characters.unk_token_id = None
        >>> invocation_tokens(characters, "<judge>")
        [60, 106, 117, 100, 103, 101, 62]
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    tokens = ids(invocation_string)
    if not tokens or tokenizer.unk_token_id in tokens:
        raise InvocationError(f"{invocation_string!r} has the tokens {tokens}: none, or one for what is unknown.")
    for probe in probes:
        before, _, after = probe.partition("{}")
        first, inside, last = ids(before), ids(before + invocation_string + after), ids(after)
        if _times(tokens, inside) <= _times(tokens, first) + _times(tokens, last):
            head, tail = _shared(inside, first), _shared(inside[::-1], last[::-1])
            raise InvocationError(
                f"{invocation_string!r} has the tokens {tokens}, but in {probe!r} it has "
                f"{inside[head : len(inside) - tail]}: there an adapter would not find it. Begin and end it with a "
                "special token or a line break, or give as probes the prompts in which it will stand."
            )
    return tokens


def _times(sought: list[int], ids: list[int]) -> int:
    return sum(ids[i : i + len(sought)] == sought for i in range(len(ids)))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Tokens:
    """From which token on adapters act, for each row of one call.

    Args:
        starts (`Mapping[str, Tensor]`): By adapter, for each of B rows the index in the sequence, what is in the cache
            included, of the first token on which it acts. Where rows have adapters of their own, all are under ``""``.
    """

    def __init__(self, starts: Mapping[str, Tensor]) -> None:
        self.starts = dict(starts)
        self.step(0, 0, 0)

    def step(self, past: int, rows: int, length: int, kept: int | Tensor | None = None) -> None:
        """One forward of the model begins.

        Args:
            past (`int`): How many tokens are in the cache.
            rows (`int`): How many rows come; each of the call's may stand several times, as beams do.
            length (`int`): How many tokens.
            kept (`int` or `Tensor`, *optional*): The tokens that the model's head sees, as ``logits_to_keep`` says.
        """
        self._past, self._rows, self._length, self._kept = past, rows, length, kept
        self._masks: dict[Any, Tensor] = {}

    def applied(self, name: str, new: Tensor, old: Tensor, module: str) -> Tensor:
        """``new`` on the tokens on which an adapter acts, ``old`` bit for bit on the others.

        Args:
            name (`str`): The adapter, or ``""``.
            new, old (`Tensor`): (B, L, ...), the layer's output with the adapter and without.
            module (`str`): The layer, for messages.

        Raises:
            RowsError: The output has not the forward's rows and tokens.
        """
        starts_B = self.starts.get(name)
        if starts_B is None:
            return new
        B, L = old.shape[:2] if old.dim() > 2 else (0, 0)
        mask_BL = self._masks.get((name, L, old.device))
        if mask_BL is None:
            at_L = self._places(L, old.device)
            times, rest = divmod(self._rows, len(starts_B))
            if at_L is not None and not rest:
                mask_BL = at_L >= starts_B.to(old.device).repeat_interleave(times)[:, None]
                self._masks[name, L, old.device] = mask_BL
        if mask_BL is None or len(mask_BL) != B:
            raise RowsError(
                f"{module} gave an output of shape {list(old.shape)} in a forward of {self._rows} rows and "
                f"{self._length} tokens, of a call of {len(starts_B)} rows: an activated adapter needs rows and "
                "tokens as its first two dimensions. Leave this layer out."
            )
        return torch.where(mask_BL.view(B, L, *[1] * (old.dim() - 2)), new, old)

    def _places(self, L: int, device: torch.device) -> Tensor | None:
        """The indices in the sequence of the L tokens that a layer sees; None where these are not known."""
        at_L = torch.arange(self._past, self._past + self._length, device=device)
        if self._length != L and self._kept is not None:
            at_L = at_L[self._kept.to(device)] if isinstance(self._kept, Tensor) else at_L[-self._kept :]
        return at_L if len(at_L) == L else None
