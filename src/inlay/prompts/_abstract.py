"""What every prompt shares: the fields of its config, what it has to know of its model, and the encoder's contract.

A prompt is T virtual tokens before a model's input. An encoder makes them out of its parameters: as embeddings (T, D)
that stand in front of the input's, or as keys and values (T, layers * 2 * D) that stand in the cache. How they come
in is `inlay.prompts.attach`'s business, once for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.config import RANKS, PeftConfig, TaskType, within
from inlay.errors import ConfigError, PromptError
from inlay.layers import embeddings_of

EMBEDDINGS = "prompt_embeddings"  # the name that files have for what an encoder gives


@dataclass
class PromptLearningConfig(PeftConfig):
    """How long a prompt is and what model it stands before; what is not given is the model's.

    Args:
        num_virtual_tokens (`int`): T, how many tokens the prompt has.
        token_dim (`int`, *optional*): Width of an embedding; of all key heads together for prompts in the cache.
        num_transformer_submodules (`int`, *optional*): How many prompts there are: 2 for an encoder-decoder (one for
            its decoder), else 1.
        num_attention_heads (`int`, *optional*): Number of attention heads; of key heads for prompts in the cache.
        num_layers (`int`, *optional*): Number of layers.
        modules_to_save (`list[str]`, *optional*): Modules that are copied, trained whole and saved.
    """

    num_virtual_tokens: int | None = field(default=None, metadata=within(RANKS))
    token_dim: int | None = field(default=None, metadata=within(RANKS))
    num_transformer_submodules: int | None = field(default=None, metadata=within("[1, 2]"))
    num_attention_heads: int | None = field(default=None, metadata=within(RANKS))
    num_layers: int | None = field(default=None, metadata=within(RANKS))
    modules_to_save: list[str] | set[str] | None = None

    is_prompt_learning: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"num_virtual_tokens": 8}
    # Whether the prompt stands in the cache, and the fields above are those of keys.
    in_cache: ClassVar[bool] = False
    # What a layer method's config has and a prompt's has not, at the value that means nothing.
    bias: ClassVar[str] = "none"
    layer_replication: ClassVar[None] = None
    trainable_token_indices: ClassVar[None] = None

    def fitted(self, host: Host) -> Self:
        """The same config with what was left to the model filled in.

        Raises:
            ConfigError: The number of tokens is missing, or the model does not say what is left to it.
            PromptError: The prompt takes all of the model's positions, or cannot come into it in this way.
        """
        if self.num_virtual_tokens is None:
            raise ConfigError(f"{type(self).__name__} needs num_virtual_tokens: say how long the prompt is.")
        host.check_way(self.in_cache, self.method)
        heads, width = host.keys if self.in_cache else (host.heads, host.table.shape[1])
        width = self._agreed("token_dim", width, width)
        layers = self._agreed("num_layers", host.layers, host.layers)
        heads = self._agreed("num_attention_heads", heads, heads, host.heads)
        submodules = self.num_transformer_submodules or (2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1)
        if host.positions is not None and self.num_virtual_tokens >= host.positions:
            raise PromptError(
                f"A prompt of {self.num_virtual_tokens} tokens leaves nothing of the model's {host.positions} "
                "positions: make num_virtual_tokens smaller."
            )
        return replace(
            self, token_dim=width, num_attention_heads=heads, num_layers=layers, num_transformer_submodules=submodules
        )

    def _agreed(self, name: str, found: int | None, *valid: int | None) -> int:
        """What the model says, where it does, or else the field; that of a prompt in the cache must be ``valid``."""
        given, counts = getattr(self, name), self.in_cache or name == "token_dim"
        if found is None and given is None:
            raise ConfigError(f"The model's config does not say {name}: give it in the prompt's config.")
        if found is not None and given is not None and given not in valid and counts:
            raise PromptError(
                f"{name}={given}, and {'a key of ' if self.in_cache and name != 'num_layers' else ''}this model has "
                f"{found}: the prompt was made for another model. If it was not, leave {name} out."
            )
        return given if found is None or not (given is None or counts) else found

    @property
    def tokens(self) -> int:
        """Rows of the table of embeddings: the prompts of all submodules."""
        return (self.num_virtual_tokens or 0) * (self.num_transformer_submodules or 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Of what files hold: tokens, and the width of an embedding or of the keys and values of all layers."""
        T, width = self.num_virtual_tokens or 0, self.token_dim or 0
        return (T, (self.num_layers or 0) * 2 * width) if self.in_cache else (self.tokens, width)

    def spell_out(self, fitted: PromptLearningConfig) -> None:
        """Takes up what `fitted` has filled in, for files."""
        self.__dict__.update(fitted.__dict__)


class Host:
    """What a prompt has to know of the model before which it stands.

    Args:
        model (`nn.Module`): The user's model.

    Raises:
        PromptError: It has no input embeddings, or no config.
    """

    def __init__(self, model: nn.Module) -> None:
        table = getattr(embeddings_of(model), "weight", None)
        if not isinstance(table, Tensor) or table.dim() != 2 or getattr(model, "config", None) is None:
            raise PromptError(
                f"A prompt stands before the embeddings of a transformers model's tokens; {type(model).__name__} has "
                "no config, or its get_input_embeddings() gives no table."
            )
        self.model: Any = model

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}  # signatures, which are kept here too, cannot be copied

    @property
    def embeddings(self) -> Any:
        """Its input embeddings, as they stand now."""
        return self.model.get_input_embeddings()

    @property
    def table(self) -> Tensor:
        """Their weight (V, D)."""
        return self.embeddings.weight  # type: ignore[no-any-return]  # of a wrapper too, which passes the name on

    @cached_property
    def text(self) -> Any:
        """The config of the model, or of its text part."""
        get = getattr(self.model.config, "get_text_config", None)
        return get() if callable(get) else self.model.config

    @property
    def decoder(self) -> Any:
        """The config of what has the cache."""
        get = getattr(self.model.config, "get_text_config", None)
        return get(decoder=True) if callable(get) else self.model.config

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The same as plain values."""
        return self.text.to_dict()  # type: ignore[no-any-return]

    def number(self, *names: str) -> int | None:
        """The first of these that the model's config has; attributes count, for older names are kept as such."""
        found = (self.config.get(name, getattr(self.text, name, None)) for name in names)
        return next((value for value in found if isinstance(value, int)), None)

    @property
    def heads(self) -> int | None:
        """Heads of a layer's queries."""
        return self.number("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")

    @property
    def layers(self) -> int | None:
        """Layers, the encoder's or the decoder's where one of them has more."""
        found = self.number("num_hidden_layers", "num_layers", "n_layer")
        return None if found is None else max(found, self.decoder_layers or 0)

    @property
    def decoder_layers(self) -> int | None:
        """Layers of an encoder-decoder's decoder."""
        return self.number("decoder_layers", "num_decoder_layers") if self.seq2seq else None

    @property
    def keys(self) -> tuple[int | None, int | None]:
        """(number of key heads, their width together): fewer than query heads, and perhaps of another width."""
        heads, width = self.heads, self.number("hidden_size", "n_embd", "d_model")
        if heads is None or width is None:
            return heads, width
        size = self.config.get("head_dim") or self.config.get("d_kv") or width // heads
        groups: int = self.config.get("num_key_value_heads") or heads
        for layer in (self.config.get("per_layer_config") or {}).values():  # the widest: the others leave the rest
            if layer.get("head_dim", size) > size:
                size, groups = layer["head_dim"], layer.get("num_key_value_heads", groups)
        if self.config.get("global_head_dim"):
            size, groups = self.config["global_head_dim"], self.config.get("num_global_key_value_heads") or groups
        return groups, groups * size

    @cached_property
    def positions(self) -> int | None:
        """How many positions the model has, where it has a table of them."""
        if self.relative or self.rotary:
            return None
        found = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        return found - self.first if isinstance(found, int) and found > 0 else None

    @cached_property
    def rotary(self) -> bool:
        """Whether queries and keys are turned by their positions, so that only distances between these count."""
        return any(name in self.config for name in ("rope_parameters", "rope_theta", "rotary_dim"))

    @cached_property
    def window(self) -> int | None:
        """How many places of the cache a token sees; 0 where it counts them, and not positions, as distance."""
        return 0 if self.text.model_type == "mpt" else self.config.get("sliding_window")

    @cached_property
    def relative(self) -> bool:
        """Whether only distances between tokens count, so that masked tokens in front change nothing."""
        return "relative_attention_num_buckets" in self.config or self.text.model_type in ("bloom", "mpt")

    def check_way(self, in_cache: bool, method: str) -> None:
        """Raises `PromptError` where the model does not read what a prompt stands in."""
        name = type(self.model).__name__
        if in_cache and not self.reads_cache:
            raise PromptError(
                f"{method} stands in the cache of keys and values, and {name} reads none: use a prompt of embeddings, "
                "such as PromptTuningConfig."
            )
        if not in_cache and self.seq2seq and self.classifier:
            raise PromptError(
                f"{method} stands before the input's embeddings, and {name} looks for the end of the input in its "
                "ids: use a prompt in the cache, such as PrefixTuningConfig."
            )

    @property
    def inner(self) -> Any:
        """The model that a head stands on; of a bare model, itself."""
        return getattr(self.model, "base_model", self.model)

    @cached_property
    def reads_cache(self) -> bool:
        """Whether it reads a cache of keys and values that it is given."""
        inner = inspect.signature(type(self.inner).forward).parameters
        return "past_key_values" in self.parameters or "past_key_values" in inner

    @cached_property
    def hands_on(self) -> bool:
        """Whether it has no head, or one that hands a cache on; of the heads that do not generate, some do not."""
        return self.inner is self.model or bool(self.model.can_generate())

    def empty_cache(self, length: int | None = None, encoded: int | None = None) -> Any:
        """A cache of the model's kind, or one of fixed length.

        Args:
            length (`int`, *optional*): How many tokens it has room for; any number if not given.
            encoded (`int`, *optional*): The same for what an encoder gives.
        """
        from transformers import DynamicCache, EncoderDecoderCache, StaticCache

        def one(length: int | None) -> Any:
            return DynamicCache(config=self.decoder) if length is None else StaticCache(self.decoder, length)

        return EncoderDecoderCache(one(length), one(encoded)) if self.seq2seq else one(length)

    @cached_property
    def classifier(self) -> bool:
        """Whether it is a classifier of sequences; decoders look for the last token in the input's ids."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as known

        return type(self.model).__name__ in known.values()

    @cached_property
    def seq2seq(self) -> bool:
        """Whether it has an encoder and a decoder."""
        return bool(getattr(self.text, "is_encoder_decoder", False))

    @cached_property
    def bidirectional(self) -> bool:
        """Whether tokens see those behind them, and the first may stand for all."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

        return self.text.model_type in masked and not getattr(self.text, "is_decoder", False)

    @cached_property
    def predicts_next(self) -> bool:
        """Whether labels of tokens are those of the token after."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as heads

        return not (self.bidirectional or self.seq2seq or type(self.model).__name__ in heads.values())

    @property
    def checkpointing(self) -> bool:
        """Whether it computes activations again in backward, as it stands now."""
        # transformers' later name first: where both are there, the earlier one warns
        found = getattr(self.model, "is_activation_checkpointing", None)
        return bool(getattr(self.model, "is_gradient_checkpointing", False) if found is None else found)

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What its forward takes."""
        return inspect.signature(type(self.model).forward).parameters

    @property
    def numbered(self) -> bool:
        """Whether it takes positions; what it does not name it may drop."""
        return "position_ids" in self.parameters

    @cached_property
    def by_mask(self) -> bool:
        """Whether it numbers tokens by the mask itself, or in ways of its own, if at all."""
        own_way = "mrope_section" in (self.config.get("rope_parameters") or {})
        return self.relative or own_way or self.text.model_type in ("opt", "biogpt")

    @cached_property
    def first(self) -> int:
        """The number of a row's first token: RoBERTa's tables begin with that of padding."""
        tables = [m for n, m in self.inner.named_modules() if n.endswith("position_embeddings")]
        padding = getattr(tables[0], "padding_idx", None) if tables else None
        return 0 if padding is None else int(padding) + 1


class AbstractPrompt(nn.Module):
    """Parameters, and how they become virtual tokens; one adapter's, at ``prompt_encoder.<adapter>``.

    Args:
        config (`PromptLearningConfig`): Fitted to the model.
        host (`Host`): The model.
    """

    embedding: nn.Embedding  # the table, where it is one

    # Whether a file holds all that training goes on from; where it holds what the encoder gave, it does not.
    resumable = True
    # Parameters, by name, that are never trained.
    frozen: ClassVar[frozenset[str]] = frozenset()
    # Whether it has a loss or a decoder's prompt of its own, so that it is trained on whole batches only.
    alone = False

    def __init__(self, config: Any, host: Host) -> None:
        super().__init__()
        self.config = config
        self.fixed = config.inference_mode  # what the file holds is the table itself, whatever made it

    @property
    def length(self) -> int:
        """T, tokens before each row."""
        return self.config.num_virtual_tokens  # type: ignore[no-any-return]

    def start(self, host: Host) -> None:
        """Puts a fresh prompt where it starts, if that is not at the numbers that its modules are made with.

        Raises:
            PromptError: It cannot start as its config says.
        """

    def forward(self, task_ids_B: Tensor | None = None) -> Tensor:
        """The prompt: (T * submodules, D), or (B, T * submodules, D) where it depends on the task."""
        return self.embedding.weight

    def filed(self) -> dict[str, Tensor]:
        """The tensors that files hold, by their names there."""
        return {EMBEDDINGS: self()}

    def filed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes; nothing is computed."""
        return {EMBEDDINGS: self.config.shape}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up the tensors of a file, or some of them.

        The prompt becomes the table, which is then the prompt itself where an encoder had made it.
        """
        if (prompt := tensors.get(EMBEDDINGS)) is None:
            return
        W = self.embedding.weight
        self.fixed = self.fixed or not self.resumable
        if W.shape != prompt.shape:
            rows, width = prompt.shape
            self.embedding = table(rows, width, W.requires_grad).to(W)
        put(self.embedding.weight, prompt)

    # -- what a method may do to a call beside putting its tokens in

    def labels(self, labels_BL: Tensor, given: dict[str, Any]) -> Tensor:
        """Labels of the prompt and the input; those of the prompt count for nothing."""
        return torch.cat([labels_BL.new_full((len(labels_BL), self.length), -100), labels_BL], 1)

    def loss(self, outputs: Any, labels_BL: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        """The method's own loss of the model's outputs, for the labels that `labels` gave; None for the model's."""
        return None

    # Names of arguments of a call that are the method's own.
    arguments: ClassVar[tuple[str, ...]] = ()


def put(into: Tensor, values: Tensor) -> None:
    """Writes values into a parameter."""
    with torch.no_grad():
        into.copy_(values)


def table(rows: int, width: int, trained: bool = True) -> nn.Embedding:
    """A table of embeddings, which live names call ``embedding.weight``."""
    made = nn.Embedding(rows, width)
    made.weight.requires_grad_(trained)
    return made
