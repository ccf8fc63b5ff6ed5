"""Starting values that are drawn: the weight has no part in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DRAWN = ("true", "false", "gaussian", "orthogonal")


def kaiming_(W: Tensor) -> None:
    """torch's own start of a linear layer: uniform within 1/sqrt(fan in)."""
    with torch.no_grad():
        nn.init.kaiming_uniform_(W, a=5**0.5)


def draw_(down: Tensor, up: Tensor, init: bool | str, r: int, indexed: bool = False) -> None:
    """Fills fresh factors, in whatever shape a layer has them.

    Args:
        down (`Tensor`), up (`Tensor`): The factors; filled in place.
        init (`bool` or `str`): ``False`` draws both; ``"gaussian"`` draws down from N(0, 1/r); ``"orthogonal"`` draws
            both so that their product is zero; anything else draws down as torch draws a linear layer, and up is zero.
        r (`int`): The rank.
        indexed (`bool`, *optional*, defaults to `False`): The layer is a table: up is drawn, and down is zero.
    """
    with torch.no_grad():
        if indexed:
            up.normal_()
            down.normal_() if init is False else down.zero_()
        elif str(init).lower() == "orthogonal":
            _orthogonal_(down, up, r)
        else:
            down.normal_(std=1 / r) if str(init).lower() == "gaussian" else kaiming_(down)
            kaiming_(up) if init is False else up.zero_()


def _orthogonal_(down: Tensor, up: Tensor, r: int) -> None:
    """The halves of a random rotation, each mixed at random: every row of one is orthogonal to all of the other."""
    rotation_RR = torch.linalg.qr(torch.randn(r, r, device=down.device))[0]
    mix_OH = torch.randn(up.shape[0], r // 2, device=down.device) / 10
    mix_HI = torch.randn(r // 2, down[0].numel(), device=down.device) / 10
    up.copy_((mix_OH @ rotation_RR[0::2]).reshape(up.shape))
    down.copy_((rotation_RR[1::2].t() @ mix_HI).reshape(down.shape))
