"""Where a frozen weight is while its layer does not run: off the device with accelerate, in parts with DTensor.

Neither library is imported from here: a weight of theirs has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def distributed(t: Tensor) -> bool:
    """Whether ``t`` is a `torch.distributed.tensor.DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def at_hand(W: Tensor, layer: nn.Module, parameter: str, beside: Tensor) -> Tensor:
    """``layer``'s ``parameter`` as it can be computed with together with ``beside``; ``W`` is how it stands there."""
    if W.is_meta:
        W = _offloaded(layer, parameter, W)
    if distributed(W) and not distributed(beside):
        whole: Any = W
        W = whole.full_tensor()
    return W


def _offloaded(layer: nn.Module, parameter: str, W: Tensor) -> Tensor:
    module = sys.modules.get("accelerate.hooks")
    hook: Any = layer.__dict__.get("_hf_hook")
    if module is None or hook is None:
        return W
    for each in hook.hooks if isinstance(hook, module.SequentialHook) else (hook,):
        if isinstance(each, module.AlignDevicesHook) and each.offload:
            kept: Tensor = each.weights_map[parameter]
            return kept if each.execution_device is None else kept.to(each.execution_device)
    return W
