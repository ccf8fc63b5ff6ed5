"""Prompts in the cache that start at a text: the keys and values that the model gives for it; and several made one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.config import PeftConfig
from inlay.errors import ConfigError, PromptError
from inlay.formats import files
from inlay.prompts._abstract import EMBEDDINGS, AbstractPrompt, Host
from inlay.prompts.cartridge import CartridgeConfig
from inlay.prompts.prompt_tuning import check_vocabulary


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Starts a cartridge, or a prefix without a projection, at what the model has in its cache after a text.

    Args:
        model (`PeftModel`): The handle.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        text (`str`): The text; its first tokens become the prompt.
        adapter_name (`str`, *optional*): Which prompt; the active one if not given.
        num_virtual_tokens (`int`, *optional*): The prompt's length, for those who want it checked.
        use_chat_template (`bool`, *optional*, defaults to `True`): Have the text be the system's message, if the
            tokenizer has a chat template.
        max_length (`int`, *optional*): Tokens of the text that the model is given at most.

    Returns:
        `Tensor`: The new prompt (T, layers * 2 * D).

    Raises:
        PromptError: The text is shorter than the prompt, the tokenizer is missing or another model's, or the prompt is
            of another kind; nothing was changed.

    Example:
        >>> initialize_kv_prefix_from_text(model, tokenizer, text=manual)  # doctest: +SKIP
    """
    prompt = _prompt(model, adapter_name, num_virtual_tokens)
    host: Host = model.base_model.prompts.host
    if host.seq2seq:
        raise PromptError("A text leaves nothing in an encoder-decoder's cache: give past_key_values of its decoder.")
    if not callable(tokenizer):
        raise PromptError(f"The text needs the model's tokenizer, got {tokenizer!r}.")
    ids_BL = _tokens(tokenizer, text, use_chat_template, max_length)[None].to(host.table.device)
    if ids_BL.shape[1] < prompt.length:
        raise PromptError(f"The text has {ids_BL.shape[1]} tokens, the prompt {prompt.length}: give a longer text.")
    check_vocabulary(host, ids_BL)
    with torch.no_grad(), _in_eval(host.model):
        outputs = host.model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=True)
    cache = outputs.past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Starts a cartridge, or a prefix without a projection, at the first tokens of a cache.

    Args:
        model (`PeftModel`): The handle.
        adapter_name (`str`, *optional*): Which prompt; the active one if not given.
        past_key_values (`Cache` or pairs of keys and values): What the model has given for one sequence.
        num_virtual_tokens (`int`, *optional*): The prompt's length, for those who want it checked.

    Returns:
        `Tensor`: The new prompt (T, layers * 2 * D).

    Raises:
        PromptError: The cache does not fit the prompt, or the prompt is of another kind; nothing was changed.
        UnknownAdapterError: No such adapter.
    """
    prompt = _prompt(model, adapter_name, num_virtual_tokens)
    P_TW = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=prompt.length)
    if P_TW.shape != prompt.config.shape:
        raise PromptError(
            f"The cache makes a prompt of shape {tuple(P_TW.shape)}, this one has {prompt.config.shape}: it is of "
            "another model, or some of its layers read the cache of others."
        )
    with model.base_model.router.writing():
        prompt.take({EMBEDDINGS: P_TW})
    return P_TW


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as a prompt's table (T, layers * 2 * D): of each layer the keys, then the values.

    Args:
        past_key_values (`Cache` or pairs of keys and values): Of one sequence; each (1, heads, tokens, head width).
        num_virtual_tokens (`int`): T.

    Raises:
        PromptError: It is of several sequences, has too few tokens, or its layers differ in shape.

    Example:
        >>> pairs = [(torch.zeros(1, 2, 7, 8), torch.ones(1, 2, 7, 8))] * 3
        >>> prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=5).shape
        torch.Size([5, 96])
    """
    parts = _parts(past_key_values)
    if any(t.dim() != 4 or t.shape != parts[0].shape for t in parts) or not parts:
        raise PromptError(
            f"A cache has (keys, values) of one shape in all layers, this one has {[tuple(t.shape) for t in parts]}: "
            "layers that keep a window, or are wider than others, make no prompt."
        )
    B, _, L, _ = parts[0].shape
    if B != 1:
        raise PromptError(f"A prompt starts at one sequence, the cache has {B}: give the model one row.")
    if not 1 <= num_virtual_tokens <= L:
        raise PromptError(f"The cache has {L} tokens, the prompt {num_virtual_tokens}: give a longer text.")
    flat_THW = torch.stack([t[0, :, :num_virtual_tokens] for t in parts]).permute(2, 0, 1, 3)
    return flat_THW.reshape(num_virtual_tokens, -1).detach().clone()


def _parts(cache: Any) -> list[Tensor]:
    """Keys, values, keys, values, ... of a cache's layers, without the room that is still free in it."""
    from transformers import Cache, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if isinstance(cache, Cache):
        L = int(cache.get_seq_length())
        return [t[:, :, :L] for layer in cache.layers for t in (layer.keys, layer.values)]
    try:
        return [t for keys, values in cache for t in (keys, values)]
    except (TypeError, ValueError) as error:
        raise PromptError(f"past_key_values must be a Cache or pairs of keys and values: {error}.") from error


def _prompt(model: Any, adapter_name: str | None, length: int | None) -> AbstractPrompt:
    """A prompt whose parameters are the cache's keys and values."""
    name = model.active_adapter if adapter_name is None else adapter_name
    model.base_model.check_known([name])
    config = model.peft_config[name]
    prompt: AbstractPrompt | None = model.prompt_encoder[name] if config.is_prompt_learning else None
    if prompt is None or not config.in_cache or not prompt.resumable:
        raise PromptError(
            f"{name!r} is of {config.method}: only a CARTRIDGE, or a PREFIX_TUNING without prefix_projection, holds "
            "keys and values that can be set."
        )
    if length not in (None, prompt.length):
        raise PromptError(f"{name!r} has {prompt.length} tokens, num_virtual_tokens says {length}: leave it out.")
    return prompt


def _tokens(tokenizer: Any, text: str, chat: bool, max_length: int | None) -> Tensor:
    ids: Any = None
    if chat:
        message = [{"role": "system", "content": text}]
        with suppress(AttributeError, ValueError):  # no chat template: transformers' complaint is a ValueError
            ids = tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=False, return_dict=False)
    if ids is None:
        ids = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
    return torch.as_tensor(ids, dtype=torch.long).flatten()[:max_length]


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module is then again as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Makes one cartridge of several, their tokens one behind the other; the first one's frozen tokens stay frozen.

    Args:
        adapter_paths (`Sequence[str]`): Directories of saved cartridges of one model.
        output_path (`str` or `Path`): Where to.
        safe_serialization (`bool`, *optional*, defaults to `True`): As safetensors.

    Raises:
        ConfigError: They are fewer than two, no cartridges, or of different models.
        FileError: One of them cannot be read; nothing was written.

    Example:
        >>> compose_cartridge_adapters(["manual", "faq"], output_path="both")  # doctest: +SKIP
    """
    if len(adapter_paths) < 2:
        raise ConfigError(f"At least 2 adapters are composed, {len(adapter_paths)} given.")
    configs: list[CartridgeConfig] = []
    tables: list[Tensor] = []
    for path in adapter_paths:
        values, weights = files.read_pair(path)
        with weights:
            tensors = weights.read()
        config = PeftConfig.from_dict(values, where=str(path))
        if not isinstance(config, CartridgeConfig):
            raise ConfigError(f"{path} holds a {type(config).__name__}, composed are cartridges.")
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if found != {EMBEDDINGS: config.shape}:
            raise ConfigError(
                f"{path} has the tensors {found}, expected is {EMBEDDINGS} of shape {config.shape} alone."
            )
        configs.append(config)
        tables.append(tensors[EMBEDDINGS])
    for name in ("task_type", "num_layers", "token_dim", "num_attention_heads", "num_transformer_submodules"):
        if len(differ := {str(getattr(config, name)) for config in configs}) > 1:
            raise ConfigError(f"Cartridges of one model are composed, these differ in {name}: {sorted(differ)}.")
    values = {**configs[0].to_dict(), "num_virtual_tokens": sum(len(t) for t in tables), "inference_mode": True}
    files.write_pair(output_path, values, {EMBEDDINGS: torch.cat(tables)}, safe_serialization=safe_serialization)
