"""The two ways in: embeddings in front of the input's, and keys and values in the cache; once for all task classes.

A call's arguments are lengthened at the handle's edge and nothing is set on the model: threads cannot meet, and the
inner model, called by itself, knows of no prompt. Positions count from each row's own first token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import PromptError, RowsError
from inlay.prompts._abstract import AbstractPrompt, Host
from inlay.prompts._placed import Choice, Placed, continued, embedded, fill, shift_tokens_right
from inlay.prompts.generation import Generation
from inlay.routing import Defaults, Following, Route

_LENGTHENED = {"attention_mask": 1, "token_type_ids": 0}
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
        outputs = self.host.model(**entry.given)
        return entry.left(outputs)

    def generate(self, choice: Choice, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's ``generate``, with the chosen prompts before its input."""
        if not callable(getattr(self.host.model, "generate", None)) or not self.host.model.can_generate():
            raise PromptError(
                f"{type(self.host.model).__name__} cannot generate: load the model with a language modelling head."
            )
        names = inspect.signature(type(self.host.model).generate).parameters
        given = {**dict(zip(list(names)[1:], args, strict=False)), **kwargs}
        return self.host.model.generate(**Generation(self.host, choice, given).arguments())


class Entry:
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
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.given: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self.host, self.choice = host, choice
        main = self.given.get("input_ids", self.given.get("inputs_embeds"))
        if not isinstance(main, Tensor):
            raise PromptError("A prompt needs the input it stands before: give input_ids or inputs_embeds.")
        self.B, self.L = main.shape[:2]
        self.tasks_B = self.given.pop("task_ids", None)
        self.only = choice.only()
        self.own = {k: self.given.pop(k) for p in choice.prompts.values() for k in p.arguments if k in self.given}
        self.prefix: Any = None
        self.past = 0
        self._labels: Tensor | None = None

    def enter(self) -> None:
        """Puts the prompts before the input."""
        cache = self.given.get("past_key_values")
        cached = self.choice.placed(True, self.B, self.tasks_B)
        front = self.choice.placed(False, self.B, self.tasks_B)
        self._check(front)
        if cache is not None and cache.get_seq_length():  # a call before this one brought the prompts in
            self.past = continued(cache, [p for p in (cached, front) if p])
            for placed in (front, cached):
                if placed is not None:
                    self._shift(placed, "attention_mask")
            return
        if front is not None:
            self._stand_in_front(front)
        if cached is not None:
            self._stand_in_cache(cached, cache)

    def left(self, outputs: Any) -> Any:
        """What the handle gives back of the model's outputs."""
        if self.prefix is not None and self.prefix[0].get_seq_length() == self.prefix[1]:
            raise PromptError(
                f"{type(self.host.model).__name__} does not use the cache that it is given, where the prompt stands: "
                "use a prompt of embeddings, such as PromptTuningConfig."
            )
        if self.only is None or self._labels is None:
            return outputs
        by_name = isinstance(outputs, Mapping)
        loss = self.only.loss(outputs["logits"] if by_name else outputs[1], self._labels, self.own)
        if loss is not None and not by_name:
            return (loss, *outputs[1:])
        if loss is not None:
            outputs["loss"] = loss
        return outputs

    def _check(self, front: Placed | None) -> None:
        alone = [n for n, p in self.choice.prompts.items() if p.alone]
        if alone and self.only is None and "labels" in self.given:
            raise RowsError(
                f"{alone[0]!r} has a loss or a prompt in the decoder of its own: train it alone, on a whole batch."
            )
        mask = self.given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise PromptError("A prompt lengthens the attention mask: give one of shape (batch, tokens).")
        if front is None:
            return
        if self.host.positions is not None and front.length + self.L > self.host.positions:
            raise PromptError(
                f"A prompt of {front.length} tokens and an input of {self.L} exceed the model's {self.host.positions} "
                "positions: shorten one of them."
            )
        for name, value in self.given.items():
            known = name in ("input_ids", "inputs_embeds", "position_ids", *_LENGTHENED) or name.startswith(_ELSEWHERE)
            if not known and isinstance(value, Tensor) and value.shape[:2] == (self.B, self.L):
                raise PromptError(f"{name} has an entry for each token, and a prompt has none for it: leave it out.")

    def _stand_in_front(self, front: Placed) -> None:
        given = self.given
        x_BLD = embedded(self.host, given.pop("input_ids", None), given.pop("inputs_embeds", None))
        given["inputs_embeds"] = torch.cat([front.values.to(x_BLD), x_BLD], 1)
        for name, filling in _LENGTHENED.items():
            self._lengthen(front, name, filling)
        if self.host.seq2seq:
            self._stand_before_decoder()
        else:
            self._labels = self._lengthened_labels(front)
            self._number(front)
        own = front.own()
        for name in ("start_positions", "end_positions"):
            if name in given:
                given[name] = given[name] + (own if isinstance(own, int) else own.flatten())
        if front.mask_BT is not None and (self.host.bidirectional or self.host.seq2seq):
            self._turn(front)

    def _lengthened_labels(self, front: Placed) -> Tensor | None:
        labels = self.given.get("labels")
        if labels is None or labels.shape != (self.B, self.L) or labels.is_floating_point():
            return None
        if self.only is not None:
            self.given["labels"] = self.only.labels(labels, self.own)
        else:
            self.given["labels"] = torch.cat([labels.new_full((self.B, front.length), -100), labels], 1)
        return self.given["labels"]  # type: ignore[no-any-return]

    def _lengthen(self, placed: Placed, name: str, fill: int) -> None:
        """Puts a prompt's part before the input's; a mask that was not given is made where rows differ."""
        value = self.given.get(name)
        if value is None and name == "attention_mask" and placed.mask_BT is not None:
            value = torch.ones(self.B, self.past + self.L, dtype=torch.long, device=placed.values.device)
        if value is not None:
            before = placed.ones(value) if fill else value.new_zeros(len(value), placed.length)
            self.given[name] = torch.cat([before, value], 1)

    def _number(self, front: Placed) -> None:
        """Positions of the prompt and the input, where they were given, or rows differ."""
        given, own = self.given.get("position_ids"), front.own()
        if given is None and (front.mask_BT is None or self.host.relative or self.host.bidirectional):
            return
        L = torch.arange(self.L, device=front.values.device).expand(self.B, -1) if given is None else given
        if L.dim() != 2 or not self.host.takes("position_ids"):
            raise (
                self._unnumbered()
                if given is None
                else PromptError(
                    f"A prompt comes before position_ids of shape (batch, tokens), these have shape {tuple(L.shape)}."
                )
            )
        T = torch.arange(front.length, device=L.device) - front.length + own
        self.given["position_ids"] = torch.cat([T.expand(self.B, -1).clamp(min=0), L.expand(self.B, -1) + own], 1)

    def _unnumbered(self) -> RowsError:
        return RowsError(
            f"The rows of this batch have prompts of different lengths, and {type(self.host.model).__name__} takes no "
            "position_ids: use prompts of one length there, or a batch for each."
        )

    def _turn(self, front: Placed) -> None:
        """Moves the padding of each row behind its tokens: there the first token has to be the row's own."""
        size = front.length + self.L
        at_BL = (torch.arange(size, device=front.values.device) + front.length - front.own()) % size
        for name in ("inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "labels"):
            value = self.given.get(name)
            if isinstance(value, Tensor) and value.shape[:2] == (self.B, size):
                at = at_BL[..., None].expand_as(value) if value.dim() == 3 else at_BL
                self.given[name] = value.gather(1, at.to(value.device))

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
        x_BLD = embedded(self.host, ids, x_BLD)
        placed = self.choice.placed(False, self.B, self.tasks_B, decoder=True)
        assert placed is not None, "the choice has this prompt"
        given["decoder_inputs_embeds"] = torch.cat([placed.values.to(x_BLD), x_BLD], 1)
        if "labels" in given:
            given["labels"] = prompt.labels(given["labels"], self.own)
        self._lengthen(placed, "decoder_attention_mask", 1)

    def _stand_in_cache(self, cached: Placed, cache: Any) -> None:
        model = self.host.model
        if model.training and torch.is_grad_enabled() and self.host.checkpointing:
            raise PromptError(
                "A prompt in the cache cannot be trained under gradient checkpointing, which keeps no cache: call "
                "gradient_checkpointing_disable(), or use a prompt of embeddings."
            )
        filled = fill(self.host, cached, cache)
        self.prefix = (filled, cached.length)
        self.given["past_key_values"] = filled
        name = "decoder_attention_mask" if self.host.seq2seq else "attention_mask"
        if self.host.seq2seq and cached.mask_BT is not None and name not in self.given:
            labels = self.given.get("decoder_input_ids", self.given.get("labels"))
            if labels is not None:
                self.given[name] = torch.ones_like(labels)
        self._shift(cached, name)

    def _shift(self, placed: Placed, mask: str) -> None:
        """Has the input stand behind a prompt that is in the cache."""
        self._lengthen(placed, mask, 1)
        given = self.given.get("position_ids")
        if given is not None:
            self.given["position_ids"] = given + placed.own()
        elif placed.mask_BT is not None and not self.host.relative:
            if self.host.seq2seq or not self.host.takes("position_ids"):
                raise self._unnumbered()
            width = self.given["inputs_embeds"].shape[1] if "inputs_embeds" in self.given else self.L
            L = torch.arange(width, device=placed.values.device).expand(self.B, -1)
            self.given["position_ids"] = L + self.past + placed.own()
