"""The N axis: what a method is. One file per method gives a Config, an adapter, and a row in `METHODS`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from inlay.errors import PeftWarning, UnsupportedLayerError
from inlay.layers import LayerKind

Params = Mapping[str, Tensor]


class Layer(Protocol):
    """What an adapter may ask of the layer it serves, passed into every call."""

    @property
    def kind(self) -> LayerKind: ...
    @property
    def base_layer(self) -> nn.Module: ...
    @property
    def training(self) -> bool: ...
    def operate(self, x: Tensor, W_OI: Tensor) -> Tensor:
        """The layer's operation, without bias, with another matrix."""

    def matrix(self) -> Tensor:
        """The pristine weight W_OI, dense."""

    def offset(self) -> Tensor | None:
        """The pristine bias."""

    def row_squares(self) -> Tensor:
        """Squared norm of each row of the pristine weight, O."""

    def remember(self, key: Hashable, owners: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or its last result where neither an owner nor the pristine weight has changed since."""


class Slot(NamedTuple):
    """One tensor of an adapter: its shape, where it lives and how it starts.

    Args:
        shape (`tuple[int, ...]`): The shape, the same in memory and in files.
        name (`str`): The slot's name, as in ``layer.lora_A``.
        leaf (`str`): What follows the adapter's name in memory: ``"weight"``, ``"bias"``, or ``""`` for a bare tensor.
        saved_leaf (`str`, *optional*): What follows the slot's name in files, where it is not ``leaf``.
        trainable (`bool`): Whether it is trained.
    """

    shape: tuple[int, ...]
    name: str
    leaf: str = ""
    saved_leaf: str | None = None
    trainable: bool = True

    def saved_name(self) -> str:
        """The name in files, after the layer's path: ``lora_A.weight``."""
        leaf = self.leaf if self.saved_leaf is None else self.saved_leaf
        return f"{self.name}.{leaf}" if leaf else self.name


class AbstractAdapter(ABC):
    """One adapter on one layer: numbers and mathematics. It owns no tensor and refers to no layer.

    Args:
        config (`AdapterConfig`): The adapter's config.
        kind (`LayerKind`), base (`nn.Module`): The layer's kind and the frozen layer, read for shapes only.
        values (`dict`): The values that vary by layer (`AdapterConfig.patterned`), resolved for this one.
    """

    # Field names whose values stand as `layer.<name>[adapter]`, as users of PEFT read them.
    numbers: ClassVar[tuple[str, ...]] = ()
    changes_input: ClassVar[bool] = False
    # The result is a function of the frozen layer's own output: with several adapters each sees that, and the
    # differences add up, so that order does not matter.
    from_base: bool = False
    # On a layer tied to an adapted one the very same tensors serve.
    ties_whole: bool = False
    # Share of the input that `out` drops in training.
    dropout: float = 0.0
    # What the update is multiplied by, where the method has such a number.
    scaling: float | Tensor = 1.0

    slots: dict[str, Slot]

    @abstractmethod
    def __init__(self, config: Any, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def initialise(self, p: Params, layer: Layer) -> None:
        """Fills fresh tensors with their starting values."""

    def into(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        """What the frozen layer receives instead of ``x``."""
        return x

    @abstractmethod
    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        """What becomes of the frozen layer's output ``h`` at input ``x``; ``fresh`` allows writing to ``h``."""

    @abstractmethod
    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of one layer that does the same: what merging writes. Differentiable in ``p``."""

    def tied(self, p: Params) -> Params:
        """This adapter's tensors for a layer tied to the one that ``p`` belongs to."""
        raise UnsupportedLayerError(
            f"{type(self).__name__} cannot follow a tied weight: set ensure_weight_tying=False."
        )

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        """Raises `NotMergeableError` where no such layer exists."""

    def factors(self, p: Params) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """(down, up, scale) where the adapter does ``W + scale * up @ down`` and nothing else; else None."""
        return None

    def natural_scaling(self) -> float:
        """The scale that the config gives."""
        return 1.0

    def rescale(self, factor: float, absolute: bool) -> None:
        """Multiplies the scale, or the config's own scale where ``absolute``; methods without one warn."""
        if "scaling" not in self.numbers:
            warnings.warn(f"{type(self).__name__} has no scale: nothing was scaled.", PeftWarning, stacklevel=3)
        else:
            self.scaling = (self.natural_scaling() if absolute else self.scaling) * factor


def as_dtype(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the dtype of ``like`` where both are floats."""
    return t if t.dtype == like.dtype or not t.is_floating_point() else t.to(like.dtype)


def kaiming_(W: Tensor) -> None:
    """torch's own start of a linear layer: uniform within 1/sqrt(fan in)."""
    with torch.no_grad():
        nn.init.kaiming_uniform_(W, a=5**0.5)


def product(up_OR: Tensor, down_RI: Tensor, experts: int = 1) -> Tensor:
    """``up @ down``; for stacked experts ``up`` is (O, R E), ``down`` (E R, I) and the result E x O x I.

    The expert index varies fastest in ``up`` and slowest in ``down``: that is how files have it.
    """
    if experts == 1:
        return up_OR @ down_RI
    up_EOR = up_OR.reshape(up_OR.shape[0], -1, experts).permute(2, 0, 1)
    return up_EOR @ down_RI.reshape(experts, -1, down_RI.shape[1])
