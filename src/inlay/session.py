"""A session: base and adapters take turns on one growing sequence of tokens, and reuse what is in its cache.

Before its invocation an activated adapter (https://arxiv.org/abs/2504.12397) is the base bit for bit. What its turn
computes there is the base's, and what the base has computed there is never computed again. `inlay.streams` says whose
entries are whose.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay.activation import NEVER, Tokens, last_occurrence
from inlay.errors import BusyError, CacheError, PeftWarning, TokenIndexError
from inlay.invocation import no_invocation
from inlay.prompts import PromptLearningConfig
from inlay.routing import Route
from inlay.streams import Names, Owner, State, Stream, check_same, entries_of, joined, weights_of

if TYPE_CHECKING:
    from inlay.model import PeftModel

Adapter = str | Sequence[str] | None


class Turn(NamedTuple):
    """What one turn had to compute.

    Args:
        adapters (`tuple[str, ...]`): Who had it; nobody is the base.
        prefilled (`int`): Tokens of the sequence whose entries were computed.
        reused (`int`): Tokens of the sequence whose entries were in the cache.
    """

    adapters: Names
    prefilled: int
    reused: int


class Session:
    """One growing sequence of tokens on which a model and its adapters take turns.

    Each turn prefills only what the cache lacks for whoever has it. An activated adapter shares what the base has
    computed before its invocation, which is its last occurrence when its turn begins; any other adapter reuses what
    it computed itself. The sequence is one row.

    Args:
        model (`PeftModel`): A causal language model of transformers with adapters, in eval mode.
        ids (`Sequence[int]` or `Tensor`, *optional*): The first tokens.
        past_key_values (`Cache`, *optional*): The base's cache of ``ids``, or of their beginning. It is copied. Its
            first and last entries are computed anew to compare; those between are believed.
        cache (`str`, *optional*, defaults to `"dynamic"`): ``"dynamic"`` or ``"static"``: what turns run on.
        max_length (`int`, *optional*): How many tokens a static cache holds.

    Attributes:
        turns (`list[Turn]`): What each turn computed and reused.

    Raises:
        CacheError: The model's cache cannot be shared, or ``past_key_values`` is not the base's of these tokens.
        TokenIndexError: A token is not in the vocabulary.

    Example:
        >>> import inlay, transformers
        >>> base = transformers.LlamaForCausalLM(
        ...     transformers.LlamaConfig(
        ...         vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ...     )
        ... )
        >>> judge = inlay.LoraConfig(alora_invocation_tokens=[7, 8], target_modules=["q_proj"])
        >>> session = inlay.get_peft_model(base, judge, "judge").eval().session(range(10, 30))
        >>> answer = session.generate(max_new_tokens=4, min_new_tokens=4, do_sample=False)  # the base's turn
        >>> session.extend([7, 8])
        >>> logits = session.logits("judge")
        >>> for turn in session.turns:  # all entries are shared; the last token that was written had none yet
        ...     print(turn)
        Turn(adapters=(), prefilled=20, reused=0)
        Turn(adapters=('judge',), prefilled=3, reused=23)
    """

    def __init__(
        self,
        model: PeftModel,
        ids: Sequence[int] | Tensor = (),
        past_key_values: Any = None,
        *,
        cache: str = "dynamic",
        max_length: int | None = None,
    ) -> None:
        if cache not in ("dynamic", "static") or (cache == "static") != (max_length is not None):
            raise CacheError(f"cache is 'dynamic', or 'static' with a max_length; got {cache!r} and {max_length}.")
        self.model = model
        self.turns: list[Turn] = []
        self._base: Any = model.get_base_model()
        self._text = _text_config(self._base)
        self._max_length = max_length
        self._static: Any = None  # one for all turns: each fills it anew
        self._lock = threading.Lock()
        none = torch.empty(0, dtype=torch.long, device=next(self._base.parameters()).device)
        self._state = State(none, {(): Stream()}, {"": []})
        self.extend(ids)
        if past_key_values is not None:
            self._adopt(past_key_values)

    # ------------------------------------------------------------------ the sequence

    @property
    def ids(self) -> Tensor:
        """The tokens (L,)."""
        return self._state.ids_L

    def __len__(self) -> int:
        return len(self._state.ids_L)

    def extend(self, ids: Sequence[int] | Tensor) -> None:
        """Appends tokens; they are computed when a turn needs them.

        Args:
            ids (`Sequence[int]` or `Tensor`): One row of them.

        Raises:
            TokenIndexError: One is not in the vocabulary, or no integer.
            BusyError: The session is in a turn.
        """
        row = ids if isinstance(ids, Tensor) else torch.tensor([*ids]) if len(ids) else self.ids[:0]
        row = row[0] if row.dim() == 2 and len(row) == 1 else row
        if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise TokenIndexError(f"A session takes one row of integer tokens, got {row.dtype} {list(row.shape)}.")
        if len(row) and not 0 <= int(row.min()) <= int(row.max()) < self._text.vocab_size:
            raise TokenIndexError(
                f"Tokens from {int(row.min())} to {int(row.max())} are not all in the vocabulary, which has "
                f"{self._text.vocab_size}."
            )
        with self._alone():
            self._state = replace(self._state, ids_L=torch.cat([self.ids, row.to(self.ids)]))

    def rewind(self, n: int) -> None:
        """Takes the last ``n`` tokens back, and their entries.

        Raises:
            CacheError: The sequence has fewer, or ``n`` is negative.
            BusyError: The session is in a turn.
        """
        with self._alone():
            if not 0 <= n <= len(self):
                raise CacheError(f"A sequence of {len(self)} tokens cannot be rewound by {n}.")
            self._state = self._state.rewound(n)

    def fork(self) -> Session:
        """A second session with the same sequence, on the same entries; from here on they go apart.

        What is computed after a fork is not shared: where several branches read one context, call `prefill` before.
        A fork counts turns of its own. It may be made at any time, and used in another thread.
        """
        branch = object.__new__(Session)
        branch.__dict__.update(self.__dict__, turns=[], _static=None, _lock=threading.Lock())
        return branch

    # ------------------------------------------------------------------ turns

    @property
    def prefilled(self) -> int:
        """Tokens of the sequence that turns had to compute."""
        return sum(turn.prefilled for turn in self.turns)

    @property
    def reused(self) -> int:
        """Tokens of the sequence that turns found in the cache."""
        return sum(turn.reused for turn in self.turns)

    def generate(self, adapter: Adapter = None, max_new_tokens: int = 20, **sampling: Any) -> Tensor:
        """Lets the base or adapters go on, and appends what they write.

        Args:
            adapter (`str` or `Sequence[str]`, *optional*): Who has the turn; the base if not given.
            max_new_tokens (`int`, *optional*, defaults to 20): How many tokens to write at most.
            sampling: More of the arguments of the model's ``generate``, but for beams and for the input.

        Returns:
            `Tensor`: The new tokens (n,).

        Raises:
            UnknownAdapterError: There is no such adapter.
            CacheError: There is no token yet, ``max_length`` does not suffice, or the call cannot run on one row.
            BusyError: The session is in a turn.
        """
        outputs, before = self._turn(adapter, max_new_tokens, sampling, write=True)
        new: Tensor = outputs.sequences[0, before:]
        return new

    def logits(self, adapter: Adapter = None) -> Tensor:
        """What the base or adapters expect as the next token: (vocabulary,), in fp32. Nothing is written.

        Args:
            adapter (`str` or `Sequence[str]`, *optional*): Who has the turn; the base if not given.

        Raises:
            UnknownAdapterError, CacheError, BusyError: As in `generate`.
        """
        outputs, _ = self._turn(adapter, 1, {"do_sample": False, "output_logits": True})
        logits_V: Tensor = outputs.logits[0][0]
        return logits_V

    def prefill(self, adapter: Adapter = None) -> None:
        """Computes what the cache lacks of the sequence now, so that branches find it.

        Args:
            adapter (`str` or `Sequence[str]`, *optional*): For whom; the base if not given.

        Raises:
            UnknownAdapterError, CacheError, BusyError: As in `generate`.
        """
        self._turn(adapter, 1, {"do_sample": False})

    def _turn(self, adapter: Adapter, new: int, how: dict[str, Any], write: bool = False) -> tuple[Any, int]:
        """What the model's ``generate`` returned, and the length of the sequence before."""
        with self._alone(), self._serving():
            state, L = self._state.current(weights_of(self._base)), len(self)
            owner = self._owner(adapter)
            if not L:
                raise CacheError("The session has no token yet: extend it first.")
            base, own = state.prefix(owner, L - 1)  # the last token runs in any case: it tells what comes next
            have = own.end if base.end == owner.begin else base.end
            outputs, cache = self._run(state.ids_L, base, own, new, how)
            end = outputs.sequences.shape[1] - 1  # what was written last has not run
            streams = dict(state.streams)
            if have < owner.begin:
                streams[()] = base.plus(entries_of(cache, have, min(owner.begin, end)))
            if owner.begin < end:
                streams[owner.names] = own.plus(entries_of(cache, max(have, owner.begin), end))
            self._state = replace(state, ids_L=outputs.sequences[0] if write else state.ids_L, streams=streams)
            self.turns.append(Turn(owner.names, L - have, have))
            return outputs, L

    def _owner(self, adapter: Adapter) -> Owner:
        names = () if adapter is None else (adapter,) if isinstance(adapter, str) else tuple(dict.fromkeys(adapter))
        tuner = self.model.base_model
        tuner.check_known(names)
        invocations = {} if tuner.invocations is None else tuner.invocations.tokens
        starts = {}
        for name in names:
            config = tuner.peft_config[name]
            if isinstance(config, PromptLearningConfig):
                raise CacheError(f"{name!r} is a prompt before the input: a session has the sequence's tokens only.")
            at = int(last_occurrence(self.ids[None], invocations[name])) if name in invocations else 0
            if at == NEVER:
                warnings.warn(no_invocation(name, 1), PeftWarning, stacklevel=4)
            else:
                starts[name] = at
        return Owner(tuple(starts), tuple(starts.values()), min(starts.values(), default=NEVER))

    def _run(self, ids_L: Tensor, base: Stream, own: Stream, new: int, how: dict[str, Any]) -> tuple[Any, Any]:
        """The model's ``generate`` over given entries: its outputs, and the cache that it has filled."""
        beams, need = {"num_beams": 1, "num_return_sequences": 1}, len(ids_L) + new - 1
        if any(how.get(k, 1) != 1 for k in beams):
            raise CacheError("A session's cache has one row: generate without num_beams and num_return_sequences.")
        if self._max_length is not None and need > self._max_length:
            raise CacheError(
                f"{new} more tokens need a cache of {need}; this session's max_length is {self._max_length}."
            )
        later = {n: at for n, at in zip(own.owner.names, own.owner.starts, strict=True) if at}  # the others act anyway
        tokens = Tokens({n: torch.tensor([at], device=ids_L.device) for n, at in later.items()}) if later else None
        cache = self._filled(joined(base, own))
        with self.model.base_model.router.call(Route(own.owner.names, tokens=tokens)):
            outputs = self._base.generate(
                ids_L[None],
                attention_mask=torch.ones_like(ids_L)[None],
                past_key_values=cache,
                max_new_tokens=new,
                use_cache=True,
                return_dict_in_generate=True,
                disable_compile=True,  # each forward is told on which tokens adapters act
                **{**how, **beams},
            )
        return outputs, cache

    def _filled(self, layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """A cache for one turn."""
        from transformers import DynamicCache, StaticCache
        from transformers.cache_utils import DynamicLayer, StaticLayer

        if self._max_length is None:
            cache = DynamicCache()  # made without a config it drops nothing that has left a sliding window
            for K, V in layers:
                layer = DynamicLayer()
                layer.lazy_initialization(K, V)
                layer.keys, layer.values = K, V  # it grows by copying, so it may begin with what others hold too
                cache.layers.append(layer)
            return cache
        if self._static is None:
            self._static = StaticCache(self._text, self._max_length)
            self._static.layers = [StaticLayer(self._max_length) for _ in self._static.layers]  # nor does this
        self._static.reset()
        for index, (K, V) in enumerate(layers):
            self._static.update(K, V, index)
        return self._static

    def _adopt(self, cache: Any) -> None:
        """Takes over the base's entries, once the first and the last of them have been computed anew."""
        from transformers import DynamicCache, StaticCache

        if not isinstance(cache, (DynamicCache, StaticCache)):
            raise CacheError(f"past_key_values must be a DynamicCache or a StaticCache, got {type(cache).__name__}.")
        n = int(cache.get_seq_length())
        if not 0 < n <= len(self):
            raise CacheError(f"past_key_values holds {n} tokens, ids are {len(self)}: give all that it was made of.")
        given = Stream(parts=(entries_of(cache, 0, n),))
        with self._alone(), self._serving():
            for at in (0, n - 1):
                _, again = self._run(self.ids[: at + 1], given.cut(at), Stream(), 1, {"do_sample": False})
                check_same(entries_of(again, at, at + 1), entries_of(cache, at, at + 1))
            self._state = State(self.ids, {(): given}, weights_of(self._base))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise BusyError("The session is in a turn: wait for its end, or give each thread a fork() of its own.")
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Adapters do not change meanwhile, and no graph is made."""
        if self.model.training:
            raise CacheError("The model is in training mode, where dropout makes entries random: call its eval().")
        with self.model.base_model.router.call(), torch.inference_mode(False), torch.no_grad():
            yield


def _text_config(model: nn.Module) -> Any:
    """The config of a language model whose cache can be shared.

    Raises:
        CacheError: It cannot.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    name, config = type(model).__name__, getattr(model, "config", None)
    can_generate: Any = getattr(model, "can_generate", None)
    if config is None or not callable(can_generate) or not can_generate() or config.is_encoder_decoder:
        raise CacheError(f"A session needs a causal language model of transformers; {name} is none.")
    text = config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=text).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds or "past_key_values" not in inspect.signature(model.forward).parameters:
        state = ", ".join(sorted(kind.__name__ for kind in kinds)) or "its state"
        raise CacheError(f"The cache of {name} cannot be shared: {state} does not keep an entry for each token.")
    return text
