"""How much parts of parameters matter to the loss, as a training goes on (AdaLoRA, https://arxiv.org/abs/2303.10512).

I(p) = |p dL/dp|,  I' = EMA of I,  U' = EMA of |I - I'|,  score = I' U'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inlay.errors import NoGradientError


class Importance:
    """Both averages for each of a list of tensors.

    Example:
        >>> p = torch.ones(2, requires_grad=True)
        >>> (p * torch.tensor([1.0, 3.0])).sum().backward()
        >>> seen = Importance()
        >>> seen.observe([p], 0.5, 0.5)
        >>> seen.scores()[0]
        tensor([0.1250, 1.1250])
    """

    def __init__(self) -> None:
        self.averages: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def observe(self, params: Sequence[Tensor], beta1: float, beta2: float) -> None:
        """Takes in the gradients as they stand; those that are not there are zero.

        Raises:
            NoGradientError: There are none at all.
        """
        if all(t.grad is None for t in params):
            raise NoGradientError(
                "No tensor of the adapter has a gradient: call update_and_allocate after the optimiser's step and "
                "before zero_grad."
            )
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in params]
        seen = [t if t.itemsize >= 4 else t.float() for t in torch._foreach_mul(list(params), grads)]
        torch._foreach_abs_(seen)
        for name, beta in (("importance", beta1), ("uncertainty", beta2)):
            average = self.averages.setdefault(name, [torch.zeros_like(t) for t in seen])
            torch._foreach_lerp_(average, seen, 1 - beta)
            torch._foreach_sub_(seen, average)
            torch._foreach_abs_(seen)

    def scores(self) -> list[Tensor]:
        """The product of both, of each tensor."""
        return list(torch._foreach_mul(self.averages["importance"], self.averages["uncertainty"]))

    def state(self) -> dict[str, Tensor]:
        """What has been seen, by name."""
        return {f"{name}.{i}": t for name, average in self.averages.items() for i, t in enumerate(average)}

    def load(self, tensors: Mapping[str, Tensor], params: Sequence[Tensor]) -> None:
        """Takes up what `state` gave."""
        names = [name for name in ("importance", "uncertainty") if f"{name}.0" in tensors]
        self.averages = {n: [tensors[f"{n}.{i}"].to(t.device) for i, t in enumerate(params)] for n in names}
