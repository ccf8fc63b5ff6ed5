"""The two ways in: embeddings in front of the input's, and keys and values in the cache; once for all task classes.

A call's arguments are lengthened at the handle's edge and nothing is set on the model: threads cannot meet, and the
inner model, called by itself, knows of no prompt. Positions count from each row's own first token.

With a prompt of T embeddings, outputs have T + L places for an input of L tokens, the prompt's own first; a prompt in
the cache has none, and the decoder of an encoder-decoder has its own L only. Where rows have prompts of different
lengths, T is the longest: a causal model's shorter rows are padded on the left, so that the last L places are the
input's in every row. In an encoder, where the first token may stand for the whole, padding is at the end: the input
begins at the length of the row's own prompt.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import PromptError, RowsError
from inlay.prompts._abstract import AbstractPrompt, Host
from inlay.prompts._placed import Call, Choice, Placed, leading, ordered, padding_behind, shift_tokens_right
from inlay.prompts.generation import Generation
from inlay.routing import Defaults, Following, Route

_BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
_ELSEWHERE = ("decoder_", "encoder_", "past_key_values", "labels", "start_positions", "end_positions")


class Prompts:
    """The prompts of one handle, with the verbs that wrappers have too.

    Args:
        model (`nn.Module`): The user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.host = Host(model)
        self.encoders = nn.ModuleDict()  # the handle's ``prompt_encoder``
        self._active: tuple[str, ...] = ()
        self._enabled = True

    # -- verbs

    def add(self, name: str, prompt: AbstractPrompt, active: bool, trained: bool) -> None:
        """Takes up a prompt."""
        self.encoders[name] = prompt.to(self.host.table.device)
        self.set_requires_grad(name, active and trained)
        if active:
            self._active = (name,)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes prompts the default for all threads."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._active = tuple(n for n in names if n in self.encoders)
        for name in self.encoders:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Trains or freezes prompts."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.encoders:
                prompt: Any = self.encoders[name]
                for key, parameter in prompt.named_parameters():
                    parameter.requires_grad_(requires_grad and key not in prompt.frozen)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches prompts off or on, for all threads."""
        self._enabled = enabled
        self.set_requires_grad(self._active, enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes a prompt; one that is not here is passed over."""
        if adapter_name in self.encoders:
            del self.encoders[adapter_name]
            self._active = tuple(n for n in self._active if n != adapter_name)

    def check(self, prompt: AbstractPrompt, trained: bool) -> None:
        """Raises `PromptError` for a prompt that cannot be trained here."""
        if trained and prompt.config.in_cache and self.host.checkpointing:
            raise PromptError(
                f"{prompt.config.method} does not work with gradient checkpointing, which keeps no cache: call "
                "gradient_checkpointing_disable() first, or use a prompt of embeddings."
            )

    @staticmethod
    def check_resumable(prompt: AbstractPrompt, trained: bool) -> None:
        """Raises `PromptError` where training is to go on from a file that has not all of what was trained."""
        if trained and not prompt.resumable:
            raise PromptError(
                f"A file of {prompt.config.method} holds the prompt that its encoder gave, and not the encoder: it "
                "cannot be trained on. Load it with is_trainable=False."
            )

    # -- calls

    def standing(self, prompt: AbstractPrompt, B: int, tasks_B: Tensor | None, length: int | None) -> Any:
        """A prompt as it stands before B rows: embeddings, the decoder's behind the encoder's, or a cache."""
        P: Tensor = prompt(tasks_B)
        values = P.expand(B, -1, -1)
        if not prompt.config.in_cache:
            return values
        return Placed(values, None, prompt.config).fill(self.host, self.host.empty_cache(length))

    def choice(self, route: Route | None) -> Choice | None:
        """The prompts that a call with this routing has; None where it has none."""
        if route is None or isinstance(route, (Defaults, Following)):
            names, rows = (self._active if self._enabled else ()), None
        elif route.rows is None:
            names, rows = route.names, None
        else:
            names, rows = route.rows.names, route.rows
        chosen: dict[str, Any] = {n: self.encoders[n] for n in names if n in self.encoders}
        return Choice(chosen, rows) if chosen else None

    def forward(self, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs the model with the chosen prompts before its input."""
        entry = Entry(self.host, choice, args, kwargs)
        entry.enter()
        return entry.left(_run(self.host, entry.given))

    def generate(self, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's ``generate``, with the chosen prompts before its input."""
        if not callable(getattr(self.host.model, "generate", None)) or not self.host.model.can_generate():
            raise PromptError(
                f"{type(self.host.model).__name__} cannot generate: load the model with a language modelling head."
            )
        names = inspect.signature(type(self.host.model).generate).parameters
        given = {**dict(zip(list(names)[1:], args, strict=False)), **kwargs}
        return self.host.model.generate(**Generation(self.host, choice, given).arguments())


class _Given(nn.Module):
    """A module that is given a cache, whoever calls it."""

    def __init__(self, inner: nn.Module, cache: Any) -> None:
        super().__init__()
        self.inner, self.cache = inner, cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **{**kwargs, "past_key_values": self.cache})


def _run(host: Host, given: dict[str, Any]) -> Any:
    """Runs the model; a head that hands no cache on does so as a copy, which stands on a model that has it."""
    if "past_key_values" not in given or host.hands_on:
        return host.model(**given)
    head = copy.copy(host.model)
    inner = {host.model.base_model_prefix: _Given(host.inner, given.pop("past_key_values"))}
    head.__dict__["_modules"] = {**head._modules, **inner}
    return head(**given)


class Entry(Call):
    """One forward's arguments on their way in.

    Args:
        host (`Host`): The model.
        choice (`Choice`): The prompts.
        args, kwargs: What the handle was called with.

    Raises:
        PromptError: There is no input, or something in the call cannot be lengthened by a prompt.
    """

    def __init__(self, host: Host, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [n for n, p in host.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        super().__init__(host, choice, {**dict(zip(names, args, strict=False)), **kwargs})
        if "input_ids" in self.given and "inputs_embeds" in self.given:
            raise PromptError("The input is given twice, as input_ids and as inputs_embeds: leave one of them out.")
        self._place(self.given.get("input_ids"), self.given.get("inputs_embeds"))
        self.only = choice.only()
        self.own = {k: self.given.pop(k) for p in choice.prompts.values() for k in p.arguments if k in self.given}
        self.prefix: Any = None
        self.past = 0
        self._labels: Tensor | None = None
        self._blank_BL: Tensor | None = None  # padding between prompts of different lengths, where no answer is

    def enter(self) -> None:
        """Puts the prompts before the input."""
        front, cached, cache = self.front, self.cached, self.given.get("past_key_values")
        self._check(front)
        if front is not None and (self.host.seq2seq or not self.going_on):  # an encoder reads its input anew
            self._stand_in_front(front)
        if self.going_on:
            before = [p for p in reversed(self.parts) if p is cached or not self.host.seq2seq]
            self.past = self._continued(before)
            for placed in before:
                self._shift(placed)
        elif cached is not None:
            self._stand_in_cache(cached, cache)

    def left(self, outputs: Any) -> Any:
        """What the handle gives back of the model's outputs."""
        if self.prefix is not None and self.prefix[0].get_seq_length() == self.prefix[1]:
            raise PromptError(
                f"{type(self.host.model).__name__} does not use the cache that it is given, where the prompt stands: "
                "use a prompt of embeddings, such as PromptTuningConfig."
            )
        if self._blank_BL is not None and "start_logits" in outputs:
            self._answered(outputs, self._blank_BL)
        loss = None
        if self.only is not None and self._labels is not None:
            loss = self.only.loss(outputs, self._labels, self.own)
        if loss is None:
            return outputs
        if isinstance(outputs, tuple):
            return (loss, *outputs[1:])
        outputs["loss"] = loss
        return outputs

    def _answered(self, outputs: Any, blank_BL: Tensor) -> None:
        """Takes the padding between prompts of different lengths out of what answers are chosen from."""
        size, losses = blank_BL.shape[1], []
        for logits, positions in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
            outputs[logits] = outputs[logits].masked_fill(blank_BL, torch.finfo(outputs[logits].dtype).min)
            if "loss" in outputs:
                at_B = self.given[positions].clamp(0, size)
                losses.append(F.cross_entropy(outputs[logits], at_B, ignore_index=size))
        if losses:
            outputs["loss"] = sum(losses) / 2

    def _check(self, front: Placed | None) -> None:
        alone = [n for n, p in self.choice.prompts.items() if p.alone]
        if alone and self.only is None and "labels" in self.given:
            raise RowsError(
                f"{alone[0]!r} has a loss or a prompt in the decoder of its own: train it alone, on a whole batch."
            )
        self._check_input()
        positions = self.given.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape != (1, self.L):
            self._check_shape("position_ids")
        self._check_gap(self.L)
        if not self.host.seq2seq:
            mask, T = self.given.get("attention_mask"), sum(p.length for p in self.parts)
            self._check_room(self.given.get("past_key_values"), T + (self.L if mask is None else mask.shape[1]))
        self._check_labels(front)
        if front is None or self.going_on:
            return
        if "token_type_ids" in self.given:
            self._check_shape("token_type_ids")
        for name, value in self.given.items():
            known = name in _BY_TOKEN or name.startswith(_ELSEWHERE)
            if not known and isinstance(value, Tensor) and value.shape[:2] == (self.B, self.L):
                raise PromptError(f"{name} has an entry for each token, and a prompt has none for it: leave it out.")

    def _check_labels(self, front: Placed | None) -> None:
        labels = self.given.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point() or self.host.seq2seq:
            return
        lengths = [self.L, 1]  # a class for each row may stand in a column
        if front is not None and front.mask_BT is None and not self.host.predicts_next:
            lengths.append(front.length + self.L)  # those of PEFT's token classifiers, which lengthens none
        if labels.shape[1] not in lengths or len(labels) != self.B:
            self._check_shape("labels")

    def _stand_in_front(self, front: Placed) -> None:
        given, host, own = self.given, self.host, front.own()
        ids = given.pop("input_ids", None)
        x_BLD = self._embedded(ids, given.pop("inputs_embeds", None))
        given["inputs_embeds"] = torch.cat([front.values.to(x_BLD), x_BLD], 1)
        last = host.classifier and not (host.seq2seq or host.bidirectional)
        if last:
            self._mask_behind(ids)
        if host.seq2seq:
            self._feed_decoder(ids)
        else:
            self._labels = self._lengthened_labels(front)
            self._number(front)
            self._find_answers(front)
        if (kinds_BL := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = F.pad(kinds_BL, (front.length, 0))
        mask = self._lengthen(front, "attention_mask", self.L)
        if host.seq2seq and mask is not None:
            self._order(padding_behind(mask))
        elif host.bidirectional and front.mask_BT is not None:  # there the first token has to be the row's own
            at_L = torch.arange(front.length + self.L, device=x_BLD.device)
            self._order((at_L + front.length - own) % len(at_L))
        elif last and mask is not None:  # its head reads the last token, and has no ids in which to look for it
            self._order(padding_behind(mask == 0))

    def _mask_behind(self, ids_BL: Tensor | None) -> None:
        """Has the mask cover the padding behind each row, as ids tell or else the mask itself."""
        given, pad = self.given, self.host.text.pad_token_id
        x_BLD = given["inputs_embeds"]
        mask = given.get("attention_mask", torch.ones(self.B, self.L, dtype=torch.long, device=x_BLD.device))
        kept_BL = mask != 0 if ids_BL is None or pad is None else ids_BL != pad
        at_L = torch.arange(self.L, device=x_BLD.device)
        behind_BL = at_L > (at_L * kept_BL).argmax(1, keepdim=True)
        given["attention_mask"] = mask.masked_fill(behind_BL, 0)
        if not (self.host.numbered or self.host.by_mask or self.host.rotary) and bool(behind_BL.any()):
            raise PromptError(
                f"{type(self.host.model).__name__} takes no position_ids: give rows of one length, without padding."
            )

    def _order(self, at_BL: Tensor) -> None:
        """Puts the tokens of each row, and what is said of them, in this order."""
        labels = () if self._labels is None else ("labels",)
        for name in ("inputs_embeds", "attention_mask", "token_type_ids", "position_ids", *labels):
            value = self.given.get(name)
            if isinstance(value, Tensor) and value.shape[:2] == at_BL.shape:
                self.given[name] = ordered(value, at_BL)

    def _lengthened_labels(self, front: Placed) -> Tensor | None:
        labels = self.given.get("labels")
        if labels is None or labels.shape != (self.B, self.L) or labels.is_floating_point():
            return None
        if self.only is not None:
            self.given["labels"] = self.only.labels(labels, self.own)
        else:
            if front.mask_BT is not None and self.host.predicts_next:  # padding in front of a row predicts nothing
                first = labels[:, :1].masked_fill(front.mask_BT[:, -1:] == 0, -100)
                labels = torch.cat([first, labels[:, 1:]], 1)
            self.given["labels"] = torch.cat([labels.new_full((self.B, front.length), -100), labels], 1)
        return self.given["labels"]  # type: ignore[no-any-return]

    def _find_answers(self, front: Placed) -> None:
        """Moves the places of answers to where they are now; what was no place of the input stays none."""
        own, size = front.own(), front.length + self.L
        moved = own.flatten() if self.host.bidirectional and isinstance(own, Tensor) else front.length
        for name in ("start_positions", "end_positions"):
            if name in self.given:
                at_B = self.given[name].flatten()
                self.given[name] = torch.where(at_B < self.L, at_B + moved, size)
        if front.mask_BT is not None:
            at = torch.arange(size, device=front.values.device)
            self._blank_BL = at >= own + self.L if self.host.bidirectional else at < front.length - own

    def _number(self, front: Placed) -> None:
        """Positions of the prompt and the input: they count from each row's first token."""
        given, mask, own = self.given.get("position_ids"), self.given.get("attention_mask"), front.own()
        as_it_stands = self.host.bidirectional and not self.host.first  # padding in front has a number there
        if given is not None:
            self._check_numbered(given)
            L = given.expand(self.B, -1)
        elif self.host.by_mask or as_it_stands or (mask is None and front.mask_BT is None):
            return
        elif not self.host.numbered:
            if front.mask_BT is not None and not self.host.rotary:
                raise self._unnumbered()
            return
        else:
            L = self._counted(mask, self.L, front.values.device)
        first = L[:, :1] if mask is None else L.gather(1, leading(mask))
        T = (torch.arange(front.length, device=L.device) - front.length + own).clamp(min=0)
        self.given["position_ids"] = torch.cat([first + T, L + own], 1)

    def _counted(self, mask: Tensor | None, width: int, device: torch.device) -> Tensor:
        """Positions (B, width) from each row's first token."""
        L = torch.arange(self.past, self.past + width, device=device).expand(self.B, -1)
        return self.host.first + (L if mask is None else (L - leading(mask)).clamp(min=0))

    def _check_numbered(self, given: Tensor) -> None:
        if given.dim() != 2:
            raise PromptError(
                f"A prompt comes before position_ids of shape (batch, tokens), these have shape {tuple(given.shape)}."
            )
        if not self.host.numbered:
            raise PromptError(f"{type(self.host.model).__name__} takes no position_ids: leave them out.")

    def _unnumbered(self) -> RowsError:
        return RowsError(
            f"The rows of this batch have prompts of different lengths, and {type(self.host.model).__name__} takes no "
            "position_ids: use prompts of one length there, or a batch for each."
        )

    def _feed_decoder(self, ids: Tensor | None) -> None:
        """What the decoder is given: a prompt of its own, and what the model would make of ids that it has no more."""
        text, known = self.host.text, ("decoder_input_ids", "decoder_inputs_embeds")
        if "start_positions" in self.host.parameters and ids is not None and not any(n in self.given for n in known):
            self.given["decoder_input_ids"] = shift_tokens_right(ids, text.pad_token_id, text.decoder_start_token_id)
        self._stand_before_decoder()

    def _stand_before_decoder(self) -> None:
        """A second prompt before the decoder's input, for the methods that have one there."""
        prompt = self.only
        if prompt is None or not prompt.alone or prompt.config.num_transformer_submodules != 2:
            return
        given = self.given
        ids, x_BLD = given.pop("decoder_input_ids", None), given.pop("decoder_inputs_embeds", None)
        if ids is None and x_BLD is None:
            if "labels" not in given:
                raise PromptError("The decoder has no input: give labels, decoder_input_ids or decoder_inputs_embeds.")
            text = self.host.text
            ids = shift_tokens_right(given["labels"], text.pad_token_id, text.decoder_start_token_id)
        x_BLD = self._embedded(ids, x_BLD)
        placed = self.choice.placed(False, self.B, self.tasks_B, decoder=True)
        assert placed is not None, "the choice has this prompt"
        given["decoder_inputs_embeds"] = torch.cat([placed.values.to(x_BLD), x_BLD], 1)
        if "labels" in given:
            given["labels"] = prompt.labels(given["labels"], self.own)
        self._lengthen(placed, "decoder_attention_mask")

    def _stand_in_cache(self, cached: Placed, cache: Any) -> None:
        model = self.host.model
        if model.training and self.host.checkpointing:
            raise PromptError(
                "A prompt in the cache cannot be trained under gradient checkpointing, which keeps no cache: call "
                "gradient_checkpointing_disable(), or eval(), or use a prompt of embeddings."
            )
        if self.host.seq2seq:
            self._check_positions([cached], self._decoded())
        self.given["past_key_values"] = filled = cached.fill(self.host, cache)
        self.prefix = (filled, cached.length)
        self._shift(cached)

    def _decoded(self) -> int:
        """How many tokens the decoder is given: those of the input where a head makes them of it."""
        known = ("decoder_input_ids", "decoder_inputs_embeds", *(() if self.host.classifier else ("labels",)))
        return next((self.given[name].shape[1] for name in known if name in self.given), self.L)

    def _shift(self, placed: Placed) -> None:
        """Has the input stand behind a prompt that is in the cache."""
        mask = "decoder_attention_mask" if self.host.seq2seq else "attention_mask"
        given, before = self.given.get("position_ids"), self.given.get(mask)
        self._lengthen(placed, mask, self.past + (self._decoded() if self.host.seq2seq else self.L))
        if given is not None:
            self._check_numbered(given)
            self.given["position_ids"] = given + placed.own()
        elif self.host.by_mask or (placed.mask_BT is None and self._numbers_itself(before)):
            return
        elif not self.host.seq2seq and self.host.numbered:
            width = self.given["inputs_embeds"].shape[1] if "inputs_embeds" in self.given else self.L
            self.given["position_ids"] = self._counted(before, width, placed.values.device) + placed.own()
        elif placed.mask_BT is not None:  # keys of prompts are not turned: even rotary models have to be told
            raise self._unnumbered()

    def _numbers_itself(self, mask: Tensor | None) -> bool:
        """Whether the model numbers the input behind a cache as it should be; RoBERTa does by ids alone."""
        if self.host.bidirectional:
            return not (self.host.first and "inputs_embeds" in self.given)
        return mask is None
