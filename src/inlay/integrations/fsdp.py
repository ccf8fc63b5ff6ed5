"""Which modules torch's FSDP takes as units of their own, in a model with adapters."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import nn

from inlay.errors import UnsupportedLayerError
from inlay.leaves import Leaf
from inlay.prompts._abstract import AbstractPrompt

#: names of classes, with commas; accelerate sets it
CHOSEN = "FSDP_TRANSFORMER_CLS_TO_WRAP"


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """An ``auto_wrap_policy`` for FSDP1, with ``use_orig_params=True``.

    A unit is what the environment's ``FSDP_TRANSFORMER_CLS_TO_WRAP`` names, or else the model's ``_no_split_modules``,
    and any other module without children whose weight is trained. An adapter's tensors belong to the unit that its
    layer is in, and a prompt to the whole: both are read by what stands around them, and FSDP1 has a unit's tensors at
    hand only while the unit itself is called.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside.

    Returns:
        `Callable`: Whether FSDP is to wrap a module, as ``policy(module, recurse, nonwrapped_numel)``.

    Raises:
        UnsupportedLayerError: The model has no module of a class that is named.

    Example:
        >>> import inlay
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> policy = fsdp_auto_wrap_policy(inlay.get_peft_model(net, inlay.LoraConfig(target_modules=["0"])))
        >>> policy(net[0].base_layer, recurse=False, nonwrapped_numel=0)
        False
        >>> policy(nn.Linear(4, 3), recurse=False, nonwrapped_numel=0)
        True
    """
    whole = ",".join(getattr(model, "_no_split_modules", None) or ())
    names = {name for name in os.environ.get(CHOSEN, whole).split(",") if name}
    found = {type(module).__name__: type(module) for module in model.modules()}
    if unknown := sorted(names - found.keys()):
        raise UnsupportedLayerError(
            f"Could not find the layer class to wrap: no module is {' or '.join(map(repr, unknown))}, from "
            f"{CHOSEN if CHOSEN in os.environ else '_no_split_modules'}."
        )
    units = tuple(found[name] for name in names)
    read = {m for prompt in model.modules() if isinstance(prompt, AbstractPrompt) for m in prompt.modules()}

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        if recurse or isinstance(module, units):
            return True
        if module._modules or isinstance(module, Leaf) or module in read:
            return False
        weight = module._parameters.get("weight")
        return weight is not None and weight.requires_grad

    return policy
