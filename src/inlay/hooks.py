"""What training is asked beyond gradients: a term of the loss, and a step after each of the optimiser's.

A method that wants it names a `TrainingHooks` in its row of `METHODS`. The handle keeps one per adapter, adds `loss`
to what the model returns in training, and `Tuner.update_and_allocate` drives `step`; whoever runs the training loop
calls that between the optimiser's step and ``zero_grad``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from inlay.methods._abstract import AbstractAdapter, Params


class Served(NamedTuple):
    """One layer of an adapter, as it stands now.

    Args:
        path (`str`): The layer's name in the user's model.
        adapter (`AbstractAdapter`): The mathematics on this layer.
        p (`Params`): Its tensors, by the method's own names.
    """

    path: str
    adapter: AbstractAdapter
    p: Params


class TrainingHooks:
    """The hooks of one adapter; each does nothing unless a method says otherwise.

    Args:
        config (`AdapterConfig`): The adapter's config, as it stands in the handle.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def begin(self, total_steps: int) -> None:
        """Training begins and will take so many steps of the optimiser."""

    def loss(self, layers: Sequence[Served]) -> Tensor | None:
        """What is added to the model's loss."""
        return None

    def step(self, layers: Sequence[Served], global_step: int) -> None:
        """The optimiser has made its ``global_step``-th step; gradients are still there."""

    def state(self, layers: Sequence[Served]) -> dict[str, Tensor]:
        """What a training that is interrupted needs to go on as if it had not been."""
        return {}

    def load_state(self, layers: Sequence[Served], tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `state` gave."""
