"""Room for adapters that will be swapped in (`inlay.hotswap`): ranks padded with zeros, idle layers, scale tensors.

None of it changes an output. Compiled code then finds every tensor of every adapter to come where it stands already.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay import inject, walk, works
from inlay.adapted import Adapted
from inlay.config import AdapterConfig
from inlay.errors import HotswapError
from inlay.methods._abstract import AbstractAdapter

# Fields that say where an adapter goes beside target_modules.
ELSEWHERE = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)


def plain(model: nn.Module) -> nn.Module:
    """What `torch.compile` was put around, if it was."""
    return model._modules.get("_orig_mod") or model


def compiled(model: nn.Module) -> str | None:
    """The first compiled module with adapters inside, in words."""
    for name, module in model.named_modules():
        found = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if found and any(True for _ in walk.wrappers(module)):
            return f"The module {name!r}" if name else "The model"
    return None


def prepare(
    root: nn.Module, rank: int | None, configs: dict[str, AdapterConfig] | None = None, targets: Any = None
) -> None:
    """Makes room in adapters, all or those of ``configs``; on the layers that ``targets`` names too, where given.

    Raises:
        HotswapError: There is no adapter, or one that cannot be made ready.
        PlanError: ``targets`` does not fit the model.
    """
    found = list(_adapters(root, configs))
    if not found or (rank is not None and not any(method.rank_dims for _, _, method in found)):
        what = "no adapter whose tensors can be padded to another rank" if found else "no adapter"
        raise HotswapError(f"The model has {what}: load the first one, then make room.")
    for layer, name, method in found:
        _check(layer.path, method, rank)
        if any(t.is_meta for t in layer.params(name).values()):
            raise HotswapError(f"{layer.path}: {name!r} is on the meta device (offloaded): bring it back first.")
    further = {} if targets is None else {n: _further(root, n, c, targets) for n, c in (configs or {}).items()}
    for prepared in further.values():
        for work in prepared.works:
            _check(work.path, work.adapter, rank)
    for name, prepared in further.items():
        _extend(root, name, prepared)
    found = list(_adapters(root, configs))
    with found[0][0].router.writing(), torch.inference_mode(False), torch.no_grad():
        for layer, name, method in found:
            if rank is not None:
                _pad(layer, name, method, rank)
            if "scaling" in method.numbers and not isinstance(method.scaling, Tensor):
                dtype, device = layer.facts()
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                method.scaling = torch.tensor(method.scaling, dtype=wide, device=device)


def _adapters(root: nn.Module, names: Iterable[str] | None) -> Iterator[tuple[Adapted, str, AbstractAdapter]]:
    """(layer, adapter's name, adapter) of all layers, for all names or these."""
    for _, layer in walk.adapted_layers(root):
        yield from [(layer, n, m) for n, m in layer.methods.items() if names is None or n in names]


def _check(path: str, method: AbstractAdapter, rank: int | None) -> None:
    if any(not slot.filed for slot in method.slots.values()):
        raise HotswapError(
            f"{path}: the adapter starts at a part of the weight and keeps an offset, which has no place in a swap: "
            "save it, and load the file."
        )
    if rank is None or not method.rank_dims:
        return
    if rank < method.r:
        raise HotswapError(f"{path}: the adapter has rank {method.r}, above the rank {rank} asked for.")
    if any(method.slots[key].shape[dim] * rank % max(method.r, 1) for key, dim in method.rank_dims.items()):
        raise HotswapError(f"{path}: rank {rank} must be a multiple of the convolution's groups.")


def _pad(layer: Adapted, name: str, method: AbstractAdapter, rank: int) -> None:
    for key, (slot, owner, attribute) in zip(method.slots, layer.tensors(name), strict=False):  # none of a tied layer
        t, dim = owner.get_parameter(attribute), method.rank_dims.get(key)
        if dim is not None and t.shape[dim] < (wanted := slot.shape[dim] * rank // max(method.r, 1)):
            own = method.own({key: t.detach()})[key]
            value = method.padded(key, own, (*slot.shape[:dim], wanted, *slot.shape[dim + 1 :]))
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=t.requires_grad)


def _further(root: nn.Module, name: str, config: AdapterConfig, targets: Any) -> works.Prepared:
    """The plan to put an adapter on the layers that it is not on yet."""
    nowhere: dict[str, Any] = dict.fromkeys(ELSEWHERE)
    prepared = works.prepare(root, replace(config, target_modules=targets, bias="none", **nowhere))
    standing = {id(layer) for layer, _, _ in _adapters(root, [name])}
    prepared.works = [work for work in prepared.works if id(work.base) not in standing]
    return prepared


def _extend(root: nn.Module, name: str, prepared: works.Prepared) -> None:
    first = next(layer for layer, _, _ in _adapters(root, [name]))
    active, dtype = first.active_adapters, next(iter(first.params(name).values())).dtype
    inject.apply(prepared, name, autocast=dtype == torch.float32, activate=False, trainable=False)
    for work in prepared.works:
        layer: Any = work.base
        if layer.active_adapters != active:
            layer.set_adapter(active, inference_mode=True)
        with torch.no_grad():
            for key, t in idle(layer, name, layer.methods[name]).items():
                layer.params(name)[key].copy_(t)
        layer.methods[name].vacant = True


def idle(layer: Adapted, name: str, method: AbstractAdapter) -> dict[str, Tensor]:
    """Values with which an adapter ``method`` changes nothing, beside those of ``name`` on a layer."""
    like = next(iter(layer.params(name).values())).detach()
    method = copy.copy(method)
    method.init = True
    p = {key: like.new_empty(slot.shape) for key, slot in method.slots.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        method.initialise(p, layer)
        for key in method.rank_dims:
            p[key].zero_()
    return p
