"""LoftQ after the fact: an adapter on quantised layers starts at what quantising them lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay import inits, sources
from inlay.adapted import Adapted
from inlay.errors import CorruptFileError, MissingFileError, UnsupportedLayerError
from inlay.formats import files
from inlay.formats.peft import PREFIX
from inlay.methods._low_rank import AbstractLowRank
from inlay.state import config_of
from inlay.walk import adapted_layers

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Gives a LoRA adapter on quantised layers LoftQ's starting values, one round of it, from the original weights.

    Args:
        peft_model (`nn.Module`): The handle; its base is quantised, the adapter fresh.
        model_path (`str` or `Path`, *optional*): The original weights: a safetensors file, or a directory with
            ``model.safetensors`` or the shards that its index lists, or an id whose files are in the hub's cache.
            Where the model was loaded from if not given.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter.
        callback (`Callable`, *optional*): Called with the model and the layer's name after each layer; where it gives
            `False`, that layer's old values come back.

    Raises:
        UnknownAdapterError: No such adapter.
        UnsupportedLayerError: No quantised layer has it, or it is not a LoRA that starts as the identity.
        MissingFileError: There are no such weights, or they lack a layer's.
        CorruptFileError: A weight has another shape. Nothing was changed, in every case.
    """
    config_of(peft_model, adapter_name)
    there = [(path, w) for path, w in adapted_layers(peft_model, adapter_name) if w.storage.name != "plain"]
    layers = {f"{path.removeprefix(PREFIX)}.{w.kind.weight_name}": (path, w) for path, w in there}
    if not layers:
        raise UnsupportedLayerError(f"No quantised layer has the adapter {adapter_name!r}: nothing was lost.")
    for path, layer in layers.values():
        method = layer.methods[adapter_name]
        if not isinstance(method, AbstractLowRank) or not method.rank_dims or method.offset or layer.merged:
            raise UnsupportedLayerError(
                f"{path}: {adapter_name!r} must be an unmerged LoRA with init_lora_weights=True to be given a start."
            )
    with ExitStack() as opened, torch.no_grad():
        shards = [opened.enter_context(files.Weights(path)) for path in _weights(peft_model, model_path)]
        _check(shards, {key: w.kind.shape(w.get_base_layer()) for key, (_, w) in layers.items()})
        for key, W in (pair for shard in shards for pair in shard.each()):
            if key in layers:
                path, layer = layers[key]
                p = layer.params(adapter_name)
                before = {key: t.clone() for key, t in p.items()}
                _refit(layer, adapter_name, p, W)
                if callback is not None and not callback(peft_model, path):
                    for key, t in before.items():
                        p[key].copy_(t)


def _weights(model: nn.Module, model_path: str | Path | None) -> list[Path]:
    """The files that hold the original weights."""
    named = model_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not named:
        raise MissingFileError("The model does not say where it was loaded from: give model_path.")
    if Path(named).suffix == ".safetensors":
        return [Path(named)]
    index = sources.base_file(str(named), _INDEX)
    if index is None:
        return [sources.base_file(str(named), _SINGLE) or Path(named) / _SINGLE]
    table = files.read_json(index).get("weight_map")
    names = sorted(set(table.values())) if isinstance(table, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise CorruptFileError(f"'{index}' lists no files beside it as its weight_map.")
    return [index.parent / name for name in names]


def _check(shards: list[files.Weights], wanted: dict[str, tuple[int, ...]]) -> None:
    found = {key: info.shape for shard in shards for key, info in shard.header.items()}
    for key, shape in wanted.items():
        if key not in found:
            raise MissingFileError(f"The original weights have no {key!r}: give those the base was quantised from.")
        if found[key] != shape:
            raise CorruptFileError(f"{key!r} is {list(found[key])} in the original weights, here {list(shape)}.")


def _refit(layer: Adapted, adapter_name: str, p: Mapping[str, Tensor], W_OI: Tensor) -> None:
    method = layer.methods[adapter_name]
    assert isinstance(method, AbstractLowRank)
    lost_OI = W_OI.to(layer.facts()[1], torch.float32) - layer.matrix().float()
    start = inits.pissa(lost_OI, method.r, method.natural_scaling())
    method.begin(p, start.down_RI, start.up_OR)
