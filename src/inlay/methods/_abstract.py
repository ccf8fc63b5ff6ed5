"""The N axis: what a method is. One file per method gives a Config, an adapter, and a row in `METHODS`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import ConfigError, NotMergeableError, PeftWarning, UnsupportedLayerError
from inlay.inits import kaiming_ as kaiming_
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
    def part(self, name: str) -> nn.Module:
        """A module inside the frozen layer, without adapters of its own."""

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
        filed (`bool`): Whether files have it; what they have not is made anew from the frozen weight.
    """

    shape: tuple[int, ...]
    name: str
    leaf: str = ""
    saved_leaf: str | None = None
    trainable: bool = True
    filed: bool = True

    def saved_name(self) -> str:
        """The name in files, after the layer's path: ``lora_A.weight``."""
        leaf = self.leaf if self.saved_leaf is None else self.saved_leaf
        return f"{self.name}.{leaf}" if leaf else self.name


def bare_slots(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Slots whose tensors stand bare, named ``prefix + key``."""
    return {key: Slot(shape, prefix + key) for key, shape in shapes.items()}


class AbstractAdapter(ABC):
    """One adapter on one layer: numbers and mathematics. It owns no tensor and refers to no layer.

    Args:
        config (`AdapterConfig`): The adapter's config.
        kind (`LayerKind`), base (`nn.Module`): The layer's kind and the frozen layer, read for shapes only.
        values (`dict`): The values that vary by layer (`AdapterConfig.patterned`), resolved for this one.
    """

    # Its row in `METHODS`, which has made it.
    method: str = ""
    # Field names whose values stand as `layer.<name>[adapter]`, as users of PEFT read them.
    numbers: ClassVar[tuple[str, ...]] = ()
    # Attribute of the layer in PEFT, without an adapter's name -> attribute here.
    read_as: ClassVar[dict[str, str]] = {}
    # The name under which the dropout is a module of the layer, as in PEFT; "" for none.
    dropout_name: ClassVar[str] = ""
    # Slots that it has on other kinds of layers or with other fields: they read as empty here, as in PEFT.
    slots_elsewhere: ClassVar[tuple[str, ...]] = ()
    # Whether weights that stack several matrices (experts) have a meaning for the method.
    stacks: ClassVar[bool] = False
    # Whether `into` does anything.
    changes_input: bool = False
    # There is no way beside the layer's own call: the layer runs with what `weight` makes, and `out` is not asked.
    through_weight: bool = False
    # The result is a function of the frozen layer's own output: with several adapters each sees that, and the
    # differences add up, so that order does not matter.
    from_base: bool = False
    # Its merged weight can be computed in parts, as DTensor keeps them.
    merges_parts: bool = True
    # On a layer tied to an adapted one the very same tensors serve.
    ties_whole: bool = False
    # Shares that `out` drops in training: of the input, of output channels, and of the whole change.
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    # What the update is multiplied by, where the method has such a number.
    scaling: float | Tensor = 1.0
    # Along which dimension of a tensor the rank runs: zeros beyond it change nothing.
    rank_dims: ClassVar[Mapping[str, int]] = {}
    r: int
    # How it starts; `True` changes nothing.
    init: Any = True
    # It only keeps its place for another that may be swapped in (`inlay.hotswap`): files leave it out.
    vacant: bool = False
    # `saved` gives another adapter than the config says: the one that the config's `as_saved` describes.
    converts: bool = False
    # It acts on some tokens of a call only (`inlay.activation`), which no weight can.
    activated: bool = False
    # Why it has no start on a weight that is packed already, and what to do; None where it has one.
    unpacked_only: str | None = None

    slots: dict[str, Slot]

    @abstractmethod
    def __init__(self, config: Any, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def initialise(self, p: Params, layer: Layer) -> None:
        """Fills fresh tensors with their starting values."""

    def into(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        """What the frozen layer receives instead of ``x``."""
        return x

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        """What becomes of the frozen layer's output ``h`` at input ``x``; ``fresh`` allows writing to ``h``."""
        return h

    def takes_in(self, p: Params, x: Tensor, W_OI: Tensor, b_O: Tensor | None, layer: Layer) -> bool:
        """Whether `taken_in` can stand for ``out`` beside a frozen ``x @ W.T + b``, and gains by it."""
        return False

    def taken_in(self, p: Params, x: Tensor, h: Tensor, W_OI: Tensor, layer: Layer) -> Tensor:
        """`out` where nothing has recorded how ``h`` came from ``x``: its backward pass is that of ``W`` too."""
        raise NotImplementedError

    @abstractmethod
    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of one layer that does the same: what merging writes. Differentiable in ``p``."""

    def tied(self, p: Params) -> Params:
        """This adapter's tensors for a layer tied to the one that ``p`` belongs to."""
        raise UnsupportedLayerError(
            f"{type(self).__name__} cannot follow a tied weight: set ensure_weight_tying=False."
        )

    def check(self, kind: LayerKind, base: nn.Module) -> None:
        """Raises `UnsupportedLayerError` where the layer runs by its weight alone, and that would not be all."""
        if kind.by_weight:
            try:
                self.check_mergeable(kind, base)
            except NotMergeableError as error:
                raise UnsupportedLayerError(f"{kind.name} is adapted through its weight: {error}") from error
        if (kind.by_weight or self.through_weight) and self.drops():
            told = f"{kind.name} is adapted through its weight, and"
            if not (kind.ignores_dropout and self.dropout):
                raise UnsupportedLayerError(f"{told} does not work with {self.dropout_name or 'dropout'} != 0.")
            warnings.warn(f"{told} dropout has no effect there.", PeftWarning, stacklevel=3)

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        """Raises `NotMergeableError` where no such layer exists."""

    def drops(self) -> bool:
        """Whether a training forward draws random numbers."""
        return max(self.dropout, self.rank_dropout, self.module_dropout) > 0

    def factors(self, p: Params) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """(down, up, scale) where the adapter does ``W + scale * up @ down`` and nothing else; else None."""
        return None

    def natural_scaling(self) -> float:
        """The scale that the config gives."""
        return 1.0

    def saved(self, p: Params) -> Params:
        """The tensors as files hold them, by the same names."""
        return p

    def restored(self, saved: Params, p: Params) -> Params:
        """The tensors as memory holds them: undoes `saved`, of some or all of a file's tensors, beside those here."""
        return saved

    def fits(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape has room for this adapter's: it may be of a higher rank."""
        own, dim = self.slots[key].shape, self.rank_dims.get(key)
        if own == shape or dim is None or len(shape) != len(own):
            return own == shape
        return own[dim] <= shape[dim] and own == (*shape[:dim], own[dim], *shape[dim + 1 :])

    def room(self, key: str, t: Tensor) -> Tensor:
        """The part of a tensor that is this adapter's own, where it is padded with zeros to a higher rank.

        The rows of one expert, or of one of a convolution's groups, stand together; then they have a dimension more.
        """
        if t.shape == (shape := self.slots[key].shape):
            return t
        dim, blocks = self.rank_dims[key], 1
        if not dim:
            narrow = min(self.slots[k].shape[d] for k, d in self.rank_dims.items() if d)
            blocks = (shape[0] // self.r) * (shape[0] // narrow)
        if blocks == 1:
            return t.narrow(dim, 0, shape[dim])
        return t.view(blocks, -1, *t.shape[1:]).narrow(1, 0, shape[0] // blocks)

    def own(self, p: Params) -> dict[str, Tensor]:
        """Tensors without what they are padded with."""
        return {k: self.room(k, t).reshape(self.slots[k].shape) if self.fits(k, t.shape) else t for k, t in p.items()}

    def padded(self, key: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this adapter's rank, with zeros up to ``shape``; one of another shape as it is."""
        if t.shape != self.slots[key].shape or not self.fits(key, shape):
            return t
        out = t.new_zeros(shape)
        room = self.room(key, out)
        room.copy_(t.reshape(room.shape))
        return out

    def begun_at(self, p: Params, initial: Params) -> Params:
        """``p`` with a record of where training began, for `saved`; not asked where `converts`."""
        raise ConfigError(f"{type(self).__name__} starts from nothing that a file could be converted with.")

    def rescale(self, factor: float, absolute: bool) -> None:
        """Multiplies the scale, or the config's own scale where ``absolute``; methods without one warn."""
        if "scaling" not in self.numbers:
            warnings.warn(f"{type(self).__name__} has no scale: nothing was scaled.", PeftWarning, stacklevel=3)
        else:
            self.put("scaling", (self.natural_scaling() if absolute else self.scaling) * factor)

    def put(self, field: str, value: Any) -> None:
        """Sets one of `numbers`; where it is a tensor, which compiled code reads, that stays and gets the value."""
        kept = getattr(self, field)
        if isinstance(kept, Tensor):
            with torch.no_grad():
                kept.fill_(value)
        else:
            setattr(self, field, value)


class AbstractDelta(AbstractAdapter):
    """``W' = W + scaling * delta``, with its three kinds of dropout."""

    # Whether what `rank_dropout` keeps makes up for the rest.
    rank_dropout_scale: bool = False

    @abstractmethod
    def delta(self, p: Params) -> Tensor:
        """The change O x I, before scaling. Differentiable in ``p``."""

    def change(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        """``delta`` applied to ``x``, before scaling; methods with a way that builds no matrix take that."""
        return layer.operate(as_dtype(x, next(iter(p.values()))), self.delta(p))

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        factor: Any = self.scaling
        if layer.training:
            x = F.dropout(x, self.dropout) if self.dropout and not layer.kind.indexed else x
            if self.rank_dropout or self.module_dropout:
                factor = layer.kind.channels(self.mask(p, layer)) * factor
        return h + as_dtype(self.change(p, x, layer) * factor, h)

    def mask(self, p: Params, layer: Layer) -> Tensor:
        """What one forward's dropout multiplies each output channel by."""
        like, outs = next(iter(p.values())), layer.kind.shape(layer.base_layer)[0]
        keep_O = (torch.rand(outs, device=like.device) >= self.rank_dropout).to(like.dtype)
        if self.rank_dropout_scale:
            keep_O = keep_O / keep_O.mean().clamp(min=1 / outs)
        # A change that is left out is one of zero: there is a backward though all of a model's are.
        return keep_O * (torch.rand((), device=like.device) >= self.module_dropout)

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W_OI + self.scaling * self.delta(p), b_O


def as_dtype(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the dtype of ``like`` where both are floats."""
    return t if t.dtype == like.dtype or not t.is_floating_point() else t.to(like.dtype)
