"""``generate`` with a prompt before its input, by what transformers documents; no step of its loop is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.errors import PromptError, RowsError
from inlay.prompts._abstract import Host
from inlay.prompts._placed import Choice, Placed, check_positions, continued, embedded, fill, ordered, padding_behind


class Generation:
    """One ``generate`` call's arguments on their way in.

    A prompt of embeddings is given to ``generate`` as ``inputs_embeds`` beside the input's ids; one in the cache as a
    cache that is not empty, beside a mask that covers it.

    Args:
        host (`Host`): The model.
        choice (`Choice`): The prompts.
        given (`dict`): What ``generate`` was called with, by name.
    """

    def __init__(self, host: Host, choice: Choice, given: Mapping[str, Any]) -> None:
        self.given: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self.host = host
        self.ids_BL = self.given.pop("input_ids", self.given.pop("inputs", None))
        self.x_BLD = self.given.pop("inputs_embeds", None)
        main = self.ids_BL if self.x_BLD is None else self.x_BLD
        if not isinstance(main, Tensor):
            raise PromptError("A prompt needs the input it stands before: give input_ids or inputs_embeds.")
        self.B, self.L = main.shape[:2]
        tasks_B = self.given.pop("task_ids", None)
        self.front = choice.placed(False, self.B, tasks_B)
        self.cached = choice.placed(True, self.B, tasks_B)
        self.config = self.given.get("generation_config")
        for name in ("encoder_outputs", "past_key_values"):
            if host.seq2seq and name in self.given:
                raise PromptError(f"generate() makes {name} itself, with the prompt in it: leave it out.")

    def arguments(self) -> dict[str, Any]:
        """The arguments with the prompts in them."""
        check_positions(self.host, self.front, self.cached, self.L)
        return self._of_seq2seq() if self.host.seq2seq else self._of_decoder()

    def _longest(self) -> int:
        return self.L + (self.front.length if self.front is not None else 0)

    def _asked(self, name: str) -> Any:
        """An argument, or the value in the generation config."""
        return self.given.get(name, getattr(self.config, name, None))

    def _of_seq2seq(self) -> dict[str, Any]:
        given = self.given
        if self.front is not None:
            x_BLD = embedded(self.host, self.ids_BL, self.x_BLD)
            given["inputs_embeds"] = torch.cat([self.front.values.to(x_BLD), x_BLD], 1)
            mask = self._mask()
            mask = torch.cat([self.front.ones(mask), mask], 1)
            at_BL = padding_behind(mask)
            given["attention_mask"] = mask.gather(1, at_BL)
            given["inputs_embeds"] = ordered(given["inputs_embeds"], at_BL)
        else:
            given["input_ids" if self.x_BLD is None else "inputs_embeds"] = (
                self.ids_BL if self.x_BLD is None else self.x_BLD
            )
        if self.cached is not None:
            if self.cached.mask_BT is not None:
                raise RowsError("Prompts in a decoder's cache have to be of one length: generate a batch for each.")
            given["past_key_values"] = fill(self.host, self._expanded(self.cached))
        return given

    def _of_decoder(self) -> dict[str, Any]:
        given, cache = self.given, self.given.get("past_key_values")
        going_on = cache is not None and cache.get_seq_length() > 0
        placed = [p for p in (self.cached, self.front) if p is not None]
        if going_on:
            continued(cache, placed)
        self._lengths()
        mask = self._mask()
        given["attention_mask"] = torch.cat([*(p.ones(mask) for p in placed), mask], 1)
        if "position_ids" in given:
            raise PromptError("generate() counts positions itself, with the prompt in them: leave position_ids out.")
        if self.cached is not None and not going_on:
            given["past_key_values"] = fill(self.host, self._expanded(self.cached), cache or self._static())
            given.pop("use_cache", None)
        if self.ids_BL is not None:
            given["input_ids"] = self.ids_BL
        if self.front is not None or self.x_BLD is not None or going_on:
            x_BLD = embedded(self.host, self.ids_BL, self.x_BLD)
            # What the cache has is cut off again; only its length counts.
            before = [] if self.cached is None else [x_BLD.new_zeros(self.B, self.cached.length, x_BLD.shape[2])]
            before += [] if self.front is None else [self.front.values.to(x_BLD)]
            given["inputs_embeds"] = torch.cat([*before, x_BLD], 1)
        if self.front is not None and not going_on:  # padding goes in front of the prompt, where no distance counts it
            start = 0 if self.cached is None else self.cached.length
            at_BL = padding_behind(given["attention_mask"][:, start:] == 0)
            for name in ("inputs_embeds", "attention_mask"):
                given[name] = torch.cat([given[name][:, :start], ordered(given[name][:, start:], at_BL)], 1)
        return given

    def _expanded(self, placed: Placed) -> Placed:
        """A row for each beam or sample: transformers repeats what is given by row, and no cache."""
        times = max(self._asked("num_beams") or 1, self._asked("num_return_sequences") or 1)
        return placed._replace(values=placed.values.repeat_interleave(times, 0))

    def _mask(self) -> Tensor:
        """The mask, or the one that ``generate`` would infer from padding in the ids."""
        if "attention_mask" in self.given:
            return self.given["attention_mask"]  # type: ignore[no-any-return]
        if self.ids_BL is None:
            return torch.ones(self.B, self.L, dtype=torch.long, device=self.x_BLD.device)
        defaults = self.host.model.generation_config
        pad, end = (
            self._asked(name) if self._asked(name) is not None else getattr(defaults, name)
            for name in ("pad_token_id", "eos_token_id")
        )
        ends = end if isinstance(end, list) else [end]
        if pad is None or pad in ends:
            return torch.ones_like(self.ids_BL)
        kept: Tensor = self.ids_BL != pad
        return kept.long()

    def _lengths(self) -> None:
        """Says lengths as numbers of new tokens: transformers counts embeddings into the others, prompts too."""
        for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            asked = self._asked(whole)
            if asked and self._asked(new) is None:
                self.given.pop(whole, None)
                self.given[new] = max(asked - self.L, 0)
                if self.config is not None:
                    self.given["generation_config"] = self.config = copy.deepcopy(self.config)
                    setattr(self.config, whole, None)

    def _static(self) -> Any:
        """The cache that ``cache_implementation`` asks for, with room for the prompt; None for the usual one."""
        kind = self._asked("cache_implementation")
        if kind is None or self.cached is None:
            return None
        from transformers import StaticCache

        self.given.pop("cache_implementation", None)
        if self.config is not None and getattr(self.config, "cache_implementation", None) is not None:
            self.given["generation_config"] = self.config = copy.deepcopy(self.config)
            self.config.cache_implementation = None
        if kind == "dynamic":
            return None
        if kind != "static":
            raise PromptError(
                f"A prompt in the cache needs one that can be filled beforehand, 'dynamic' or 'static', not {kind!r}."
            )
        new = self._asked("max_new_tokens") or self.host.model.generation_config.max_new_tokens or 20
        return StaticCache(config=self.host.text, max_cache_len=self._longest() + self.cached.length + new)
