"""What methods share that turn a layer's input by a square matrix: ``W' = W R^T``, ``W' x = W (R^T x)``.

An embedding's output is turned instead. Of a convolution it is the packed patch that one output sees: with a kernel of
one element that turns the channels, with a larger one there is no way through the input, and the layer runs with the
turned weight. Each group of a grouped one has a matrix of its own.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from inlay.layers import LayerKind
from inlay.methods._abstract import AbstractAdapter, Layer, Params, as_dtype


class AbstractRotation(AbstractAdapter):
    """Give `turn`; call `lay_out` first of all."""

    stacks = True  # all experts see the same turned input
    merges_parts = False  # a block of the matrix lies across them

    def lay_out(self, kind: LayerKind, base: nn.Module) -> int:
        """Sees how the layer is turned, and returns the width of what is: of each group's patch, where that is it."""
        (outs, self.inner), channels = kind.shape(base), kind.features(base)[0]
        self.groups, self.spatial = kind.groups(base), max(len(kind.channel_shape(base)) - 2, 0)
        self.changes_input = not kind.indexed
        self.through_weight = self.spatial > 0 and self.inner * self.groups > channels
        return outs if kind.indexed else self.inner if self.through_weight else channels

    @abstractmethod
    def turn(self, p: Params, x: Tensor, layer: Layer | None = None, back: bool = False) -> Tensor:
        """``x R`` on the last dimension, or ``x R^T``; in a forward of ``layer``, or else for its weight."""

    def into(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        if not self.spatial or not self.changes_input:
            return as_dtype(self.turn(p, x, layer), x) if self.changes_input else x
        at = -self.spatial - 1
        return as_dtype(self.turn(p, x.movedim(at, -1), layer), x).movedim(-1, at)

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        return h if self.changes_input else as_dtype(self.turn(p, h, layer), h)

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.changes_input:  # the table is the transposed matrix
            return self.turn(p, W_OI.t()).t(), b_O
        if self.groups == 1:
            return self.turn(p, W_OI, back=True), b_O
        # Side by side, the groups' filters are as wide as the matrices of all groups.
        side = W_OI.reshape(self.groups, -1, self.inner).transpose(0, 1).flatten(1)
        back = self.turn(p, side, back=True).reshape(-1, self.groups, self.inner).transpose(0, 1)
        return back.reshape(W_OI.shape), b_O
