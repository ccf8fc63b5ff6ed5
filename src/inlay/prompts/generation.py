"""``generate`` with a prompt before its input, by what transformers documents; no step of its loop is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.errors import PromptError, RowsError
from inlay.prompts._abstract import Host
from inlay.prompts._placed import Call, Choice, Placed, leading, ordered, padding_behind

# What has transformers guess tokens and check several at once.
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class Generation(Call):
    """One ``generate`` call's arguments on their way in.

    A prompt of embeddings is given to ``generate`` as ``inputs_embeds`` beside the input's ids; one in the cache as a
    cache that is not empty, beside a mask that covers it.

    Args:
        host (`Host`): The model.
        choice (`Choice`): The prompts.
        given (`dict`): What ``generate`` was called with, by name.
    """

    def __init__(self, host: Host, choice: Choice, given: Mapping[str, Any]) -> None:
        super().__init__(host, choice, given)
        self.ids_BL = self.given.pop("input_ids", self.given.pop("inputs", None))
        self.x_BLD = self.given.pop("inputs_embeds", None)
        self.config = self.given.get("generation_config")
        if self.ids_BL is None and self.x_BLD is None and not host.seq2seq:
            begin = self._asked("bos_token_id")  # as transformers begins where it is given no input
            self.ids_BL = None if begin is None else torch.tensor([[begin]], device=host.table.device)
        self._place(self.ids_BL, self.x_BLD)
        for name in ("encoder_outputs", "past_key_values"):
            if host.seq2seq and name in self.given:
                raise PromptError(f"generate() makes {name} itself, with the prompt in it: leave it out.")
        if host.seq2seq and self.front is not None and "assistant_model" in self.given:
            raise PromptError(
                "The assistant's encoder reads ids, in which there is no prompt: use a prompt in the cache."
            )

    def arguments(self) -> dict[str, Any]:
        """The arguments with the prompts in them."""
        self._check_input()
        return self._of_seq2seq() if self.host.seq2seq else self._of_decoder()

    def _longest(self) -> int:
        return self.L + (self.front.length if self.front is not None else 0)

    def _asked(self, name: str) -> Any:
        """An argument, or the value in the generation config, the call's or else the model's."""
        if name in self.given:
            return self.given[name]
        found = (getattr(c, name, None) for c in (self.config, self.host.model.generation_config))
        return next((value for value in found if value is not None), None)

    def _of_seq2seq(self) -> dict[str, Any]:
        given = self.given
        if self.front is not None:
            x_BLD = self._embedded(self.ids_BL, self.x_BLD)
            given["inputs_embeds"] = torch.cat([self.front.values.to(x_BLD), x_BLD], 1)
            if (mask := self._lengthen(self.front, "attention_mask", self.L)) is not None:
                at_BL = padding_behind(mask)
                given["attention_mask"] = mask.gather(1, at_BL)
                given["inputs_embeds"] = ordered(given["inputs_embeds"], at_BL)
        else:
            name, x = ("input_ids", self.ids_BL) if self.x_BLD is None else ("inputs_embeds", self.x_BLD)
            given[name] = x
        if self.cached is not None:
            self._lengthen_decoded(self.cached)
            started = given.get("decoder_input_ids")
            self._fill(1 if started is None else started.shape[1], self._asked("max_length") or 20)
        return given

    def _lengthen_decoded(self, cached: Placed) -> None:
        """Puts a prompt's part before the mask of what the decoder begins with."""
        begun = "decoder_input_ids" in self.given
        if cached.mask_BT is not None and (begun or not self.host.relative):
            raise RowsError(
                "Prompts in a decoder's cache have to be of one length, where it has a table of positions or is given "
                "decoder_input_ids: generate a batch for each."
            )
        self._lengthen(cached, "decoder_attention_mask", 1)

    def _of_decoder(self) -> dict[str, Any]:
        given, going_on = self.given, self.going_on
        if going_on:
            self._continued(self.parts)
        self._lengths()
        self._check_gap(self.L + self._new(20))
        mask = self._mask()
        self._pass_over(leading(mask))
        given["attention_mask"] = torch.cat([*(p.ones(mask) for p in self.parts), mask], 1)
        if "position_ids" in given:
            raise PromptError("generate() counts positions itself, with the prompt in them: leave position_ids out.")
        if self.cached is not None and not going_on:
            self._fill(self._longest(), 20)
        self._check_room(given.get("past_key_values"), given["attention_mask"].shape[1] + self._new(20) - 1)
        if self.ids_BL is not None:
            given["input_ids"] = self.ids_BL
        front, assisted = self.front, any(self._asked(name) for name in _ASSISTED)
        if front is not None and assisted and not going_on:
            self._read(front)
            front = None
        if front is not None or self.x_BLD is not None or going_on:
            if assisted:  # transformers would leave out the first tokens that are guessed, and take others for checked
                raise PromptError("Assisted decoding neither goes on from a cache nor from inputs_embeds.")
            x_BLD = self._embedded(self.ids_BL, self.x_BLD)
            # What the cache has is cut off again; only its length counts.
            before = [] if self.cached is None else [x_BLD.new_zeros(self.B, self.cached.length, x_BLD.shape[2])]
            before += [] if front is None else [front.values.to(x_BLD)]
            given["inputs_embeds"] = torch.cat([*before, x_BLD], 1)
        return given

    def _read(self, front: Placed) -> None:
        """Has the model read a prompt of embeddings into the cache, for what has to begin with ids."""
        cache = self.given.get("past_key_values")
        cache = self.host.empty_cache() if cache is None else cache
        x_BTD = front.values.to(self.host.table.dtype)
        mask = self.given["attention_mask"][:, : cache.get_seq_length() + front.length]
        with torch.no_grad():
            self.host.model(inputs_embeds=x_BTD, attention_mask=mask, past_key_values=cache, use_cache=True)
        self.given["past_key_values"] = cache

    def _new(self, default: int) -> int:
        """How many tokens may be generated."""
        return self._asked("max_new_tokens") or default

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
        pad, end = self._asked("pad_token_id"), self._asked("eos_token_id")
        ends = end if isinstance(end, list) else [end]
        if pad is None or pad in ends:
            return torch.ones_like(self.ids_BL)
        kept: Tensor = self.ids_BL != pad
        return kept.long()

    def _pass_over(self, padding_B1: Tensor) -> None:
        """Has the penalty for repeated tokens pass over padding: transformers expects it where the prompt is."""
        penalty = self._asked("repetition_penalty") or 1.0
        if penalty == 1.0 or self.ids_BL is None or not bool(padding_B1.any()):
            return
        from transformers import RepetitionPenaltyLogitsProcessor

        own: Any = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding_B1.flatten())
        self.given.update(repetition_penalty=1.0, logits_processor=[own, *self.given.get("logits_processor", ())])

    def _lengths(self) -> None:
        """Says lengths as numbers of new tokens: transformers counts embeddings into the others, prompts too."""
        for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            asked = self._asked(whole)
            if asked and self._asked(new) is None:
                self.given.update({whole: None, new: max(asked - self.L, 0)})

    def _fill(self, before: int, default: int) -> None:
        """Puts the prompt into the cache: that of the call, or of the kind it asks for.

        Args:
            before (`int`): Tokens of the input that the cache will have.
            default (`int`): How many are generated where the call does not say.
        """
        assert self.cached is not None, "asked by whoever calls"
        cache, kind = self.given.get("past_key_values"), self._asked("cache_implementation")
        if kind not in (None, "dynamic", "static", "hybrid"):  # the last, a default of files, is passed over
            raise PromptError(
                f"A prompt in the cache needs one that can be filled beforehand, 'dynamic' or 'static', not {kind!r}."
            )
        if cache is None and kind == "static":
            cache = self.host.empty_cache(self.cached.length + before + self._new(default), self._longest())
        self._check_room(cache, self.cached.length)
        filled = self._expanded(self.cached).fill(self.host, cache)
        self.given.update(past_key_values=filled, use_cache=True, cache_implementation=None)
