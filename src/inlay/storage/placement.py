"""Where a tensor is while its layer does not run: off the device with accelerate, in parts with DTensor.

Neither library is imported from here: a tensor of theirs has imported it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def distributed(t: Tensor) -> bool:
    """Whether ``t`` is a `torch.distributed.tensor.DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def as_parted(t: Tensor, other: Any) -> Tensor:
    """``t`` in parts on several processes as ``other`` is, or whole where that is; every process has to ask."""
    if distributed(t) == distributed(other):
        return t
    given: Any = t
    if distributed(t):
        whole: Tensor = given.full_tensor()
        return whole
    module = sys.modules["torch.distributed.tensor"]
    parts: Tensor = module.distribute_tensor(t.to(other.device), other.device_mesh, other.placements)
    return parts


def at_hand(W: Tensor, layer: nn.Module, parameter: str, beside: Tensor) -> Tensor:
    """``layer``'s ``parameter`` as it can be computed with together with ``beside``; ``W`` is how it stands there."""
    if (device := runs_on(layer)) is not None:
        kept = held(layer, parameter) if W.is_meta else W
        W = W if kept is None else kept.to(device)
    if distributed(W) and not distributed(beside):
        whole: Any = W
        W = whole.full_tensor()
    return W


# ---------------------------------------------------------------------- accelerate

# What accelerate keeps on a module that it has hooked: a wrapper around that module does not pass these on.
HOOK_NAMES = frozenset({"_hf_hook", "_old_forward"})


def _offloading(layer: nn.Module) -> Any:
    """accelerate's hook that takes the layer's tensors away after each call; None where there is none."""
    module, hook = sys.modules.get("accelerate.hooks"), layer.__dict__.get("_hf_hook")
    if module is not None and hook is not None:
        for each in hook.hooks if isinstance(hook, module.SequentialHook) else (hook,):
            if isinstance(each, module.AlignDevicesHook) and each.offload:
                return each
    return None


def held(layer: nn.Module, name: str) -> Tensor | None:
    """An offloaded tensor of the layer, from memory or from the disk; None where it is not offloaded."""
    hook = _offloading(layer)
    return None if hook is None else hook.weights_map.get(name)


def runs_on(layer: nn.Module) -> torch.device | None:
    """The device to which an offloaded layer's tensors come for a call; None where it is not offloaded."""
    hook = _offloading(layer)
    if hook is None:
        return None
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def brought(owner: nn.Module, name: str) -> Tensor:
    """A tensor that is on the meta device between calls, where ``owner`` runs."""
    t = held(owner, name)
    # Other libraries hang their hooks on forward: asking by name is how an offloaded tensor comes back.
    found: Tensor = owner(name) if t is None else t.to(runs_on(owner))
    return found


def replace(layer: nn.Module, name: str, value: Tensor) -> None:
    """Gives an offloaded tensor another value. What was on the disk is in memory then: the files are not ours."""
    offload, weights, key = sys.modules["accelerate.utils.offload"], _offloading(layer).weights_map, name
    while isinstance(weights, offload.PrefixedDataset):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    memory = weights.state_dict if isinstance(weights, offload.OffloadedWeightsLoader) else weights
    memory[key] = value.detach().to("cpu", copy=True)


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Has the tensors of an offloaded layer, and of all inside it, at hand inside the ``with``.

    What is written to its parameters there is kept.

    Args:
        layer (`nn.Module`): Any module; nothing happens to one that is not offloaded.
    """
    away = [(module, hook) for module in layer.modules() if (hook := _offloading(module)) is not None]
    try:
        for module, hook in away:
            hook.pre_forward(module)
        yield
    finally:
        for module, hook in away:
            for name, p in module.named_parameters(recurse=hook.place_submodules):
                kept = held(module, name)
                if kept is not None and not p.is_meta and not torch.equal(p.to(kept.device), kept):
                    replace(module, name, p)
            hook.post_forward(module, None)


def hooked(layer: nn.Module) -> bool:
    """Whether accelerate has replaced the layer's forward: a copy's would still be the layer's."""
    return "_hf_hook" in layer.__dict__


def without_hooks(layer: nn.Module, own: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Any]:
    """What a hooked layer's ``__dict__`` is with all its parameters at hand, or on ``device``.

    ``own`` stand in for some of them.
    """
    parameters: dict[str, Tensor | None] = {**layer._parameters, **own}
    device = device or runs_on(layer)
    for key, p in parameters.items():
        kept = held(layer, key) if p is not None and p.is_meta else p
        if kept is not None:
            parameters[key] = kept if device is None else kept.to(device)
    rest = {k: v for k, v in layer.__dict__.items() if k not in HOOK_NAMES and k != "forward"}
    return {**rest, "_parameters": parameters}


def bring_back(module: nn.Module, device: torch.device | None = None) -> None:
    """Gives an offloaded module all its tensors, where it runs or on ``device``, and takes the hooks off."""
    for layer in [m for m in module.modules() if _offloading(m) is not None]:
        trained = {key for key, p in layer._parameters.items() if p is not None and p.requires_grad}
        layer.__dict__ = without_hooks(layer, {}, device)
        for key, p in layer._parameters.items():
            if p is not None:
                layer._parameters[key] = nn.Parameter(p.detach().clone(), key in trained)


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module, that is not offloaded where ``module`` is."""
    # A hook knows the tensors of the whole model, of which no copy is wanted.
    hooks = [m.__dict__["_hf_hook"] for m in module.modules() if _offloading(m) is not None]
    own = copy.deepcopy(module, {id(hook): hook for hook in hooks})
    bring_back(own)
    return own
