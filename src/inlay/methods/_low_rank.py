"""What low-rank methods share: products that are never built, starts that are a part of the weight, and DoRA.

    W' = W + s up down
    W' = W - s up0 down0 + s up down   or   W' = W + W0 + s up down,  W0 = quantised W - W     (`inlay.inits`)
    W' = m / |W + s up down|_row * (W + s up down), the norm outside the gradient   (https://arxiv.org/abs/2402.09353)

The offset's tensors stand beside the trained ones, frozen; the weight itself is never written. Files hold the first as
a plain update of twice the rank, [down; down0] and [up, -up0], and of the second the factors alone: it is computed
anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from inlay import inits
from inlay.errors import ConfigError, LoadError, NotMergeableError, PeftWarning, UnsupportedLayerError
from inlay.layers import LayerKind
from inlay.methods._abstract import AbstractDelta, Layer, Params, Slot, as_dtype
from inlay.ops.dora import dora, grouped_norm, weight_norm
from inlay.ops.dropout import drop
from inlay.ops.low_rank import low_rank, takes_in
from inlay.report import LoadReport

_PACKED = "start by True, then call replace_lora_weights_loftq with the weights that it was packed from"


@dataclass
class LoraRuntimeConfig:
    """Settings of one run, never saved.

    Args:
        ephemeral_gpu_offload (`bool`, *optional*, defaults to `False`): Accepted; DoRA's norm needs no offload here.
    """

    ephemeral_gpu_offload: bool = False


class AbstractLowRank(AbstractDelta):
    """``delta = up @ down``, never built: fused products, stacked rows and merging in place come with it.

    A method that names its factors in `rank_dims` may begin at a part of the weight: it calls `prepare_start` when its
    slots are there. One with a slot ``magnitude`` may set `use_dora`. A ``bias`` is added to what ``up`` gives.
    """

    # The rank is so high that the product is cheaper than its factors: everything goes by `delta`.
    dense: bool = False
    # How many matrices the factors stack.
    experts: int = 1
    use_dora: bool = False
    gain: float = 1.0  # of the product, not of the bias
    # Which rows of the rank a file has, where training has cut the others.
    kept: list[bool] | None = None
    # What computes the start, of which rank where that is not r, and the names in p of the offset that it leaves.
    start: Callable[[Tensor, int, float], inits.Start] | None = None
    start_rank: int | None = None
    offset: tuple[str, ...] = ()

    # ------------------------------------------------------------------ the product

    def pair(self, p: Params) -> tuple[Tensor, Tensor]:
        """The factors down (R x I) and up (O x R). Differentiable in ``p``."""
        down, up = p["down"], p["up"]
        return (down, up) if down.dim() == 2 else (down.flatten(1), up.flatten(1))

    def whole(self, p: Params) -> tuple[Tensor, Tensor]:
        """The factors of the update and of its offset in one pair."""
        if not self.offset or "W0" in p:
            return self.pair(p)
        (down, up), (down0, up0) = self.pair(p), self.pair(self._begun(p))
        return torch.cat([down, down0]), torch.cat([up, -up0], 1)

    def factors(self, p: Params) -> tuple[Tensor, Tensor, float | Tensor] | None:
        alone = not (self.dense or self.use_dora or self.experts > 1 or "bias" in p or "W0" in p)
        return (*self.whole(p), self.scaling) if alone else None

    def delta(self, p: Params) -> Tensor:
        return product(*self.whole(p), self.experts)

    def change(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        if self.dense:
            return super().change(p, x, layer)
        down_RI, up_OR = self.pair(p)
        z = layer.operate(as_dtype(x, down_RI), layer.kind.spread(layer.base_layer, down_RI))
        change = layer.kind.mix(layer.base_layer, z, up_OR)
        return change + layer.kind.channels(p["bias"]) if "bias" in p else change

    def out(
        self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False, W_OI: Tensor | None = None
    ) -> Tensor:
        h = self.shifted(p, x, h, layer, fresh) if self.offset else h
        if self.use_dora:
            return self._dora(p, x, h, layer, fresh, W_OI)
        if self.dense or not layer.kind.matrix:
            return super().out(p, x, h, layer, fresh)
        (down_RI, up_OR), dropout = self.pair(p), 0.0
        if layer.training:
            dropout = self.dropout
            if self.rank_dropout or self.module_dropout:
                up_OR = up_OR * self.mask(p, layer)[:, None]
        return low_rank(x, h, down_RI, up_OR, self.scaling, dropout, p.get("bias"), h_is_fresh=fresh, W_OI=W_OI)

    def takes_in(self, p: Params, x: Tensor, W_OI: Tensor, b_O: Tensor | None, layer: Layer) -> bool:
        twice = self.use_dora and self.dropout and layer.training  # the layer runs for the dropped input too
        return not (self.dense or self.offset or twice) and takes_in(x, W_OI, b_O, *p.values())

    def taken_in(self, p: Params, x: Tensor, h: Tensor, W_OI: Tensor, layer: Layer) -> Tensor:
        return self.out(p, x, h, layer, True, W_OI)

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        W = self.base(p, W_OI) + self.scaling * self.delta(p)
        if self.use_dora:
            W = W * (p["magnitude"].flatten() / W.detach().norm(dim=1))[:, None]
        return W, b_O if b_O is None or "bias" not in p else b_O + self.scaling / self.gain * p["bias"]

    def tied(self, p: Params) -> Params:
        if not self.rank_dims:
            return super().tied(p)
        # The tied layer's matrix is the transpose: the first factor and the last change places.
        down, *_, up = self.rank_dims
        return {**{key: p[key] for key in self.rank_dims}, down: p[up].t(), up: p[down].t()}

    def check(self, kind: LayerKind, base: nn.Module) -> None:
        if self.use_dora and kind.by_weight:
            raise UnsupportedLayerError(
                f"This {kind.name} is adapted through its weight, and does not work with use_dora=True."
            )
        if "bias" in self.slots and kind.indexed:
            raise UnsupportedLayerError("lora_bias=True is not supported for Embedding.")
        if "bias" in self.slots and getattr(base, kind.bias_name, None) is None:
            if kind.by_weight:
                told = "and does not work with lora_bias=True: it has no bias to add to"
                raise UnsupportedLayerError(f"This {kind.name} is adapted through its weight, {told}.")
            told = f"`lora_bias=True`, but a layer of type {type(base).__name__} has no bias to merge it into."
            warnings.warn(told, PeftWarning, stacklevel=2)
        if self._beyond_groups(kind, base):
            told = "A low-rank adapter on a convolution with groups > 1: Merging is not supported."
            warnings.warn(told, PeftWarning, stacklevel=2)
        super().check(kind, base)

    def _beyond_groups(self, kind: LayerKind, base: nn.Module) -> bool:
        """Whether the factors see more of the input than an output of the layer does."""
        first = next(iter(self.rank_dims), None)
        return first is not None and prod(self.slots[first].shape[1:]) > kind.shape(base)[1]

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        if "bias" in self.slots and getattr(base, kind.bias_name, None) is None:
            told = "Impossible to merge LoRA with `lora_bias=True` here: the layer has no bias to merge into."
            raise NotMergeableError(f"{told} Leave it unmerged.")
        if self._beyond_groups(kind, base):
            raise NotMergeableError(
                "its factors see all channels of a grouped convolution, which a grouped weight cannot: leave it "
                "unmerged."
            )

    # ------------------------------------------------------------------ where it begins

    def prepare_start(self, config: Any, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        """Adds the offset's slots. A layer tied to another uses that one's tensors, and has none of its own."""
        if self.use_dora and "tied" in values:
            raise UnsupportedLayerError(
                "with use_dora, layers that share a weight would each have magnitudes of their own, and no tie is "
                "left: set ensure_weight_tying=False."
            )
        name = inits.name_of(self.init)
        if name not in ("true", "false", "gaussian") and not kind.experts(base) == kind.groups(base) == 1:
            raise UnsupportedLayerError(
                f"init_lora_weights={self.init!r} is defined on one matrix: neither on grouped convolutions nor on "
                "stacks of experts."
            )
        if name == "orthogonal" and (self.start_rank or self.r) % 2:
            told = f"Orthogonal initialization requires an even rank, got {self.r}."
            raise UnsupportedLayerError(told)
        self.converts = name in ("pissa", "olora")
        # PEFT starts a table as ever, whatever is asked for.
        if kind.indexed or "tied" in values or (start := inits.computed(self.init, config.loftq_config)) is None:
            return
        if not self.scaling:
            raise ConfigError("lora_alpha must not be 0: starting values of the weight are divided by the scale.")
        self.start, self.unpacked_only = start, None if self.converts else _PACKED
        head = next(iter(self.slots.values())).name.partition("_")[0]
        shapes = {f"{key}0": (self.slots[key].shape, self.slots[key].name.partition("_")[2]) for key in self.rank_dims}
        for key, (shape, tail) in (shapes if self.converts else {"W0": (kind.shape(base), "W")}).items():
            self.slots[key] = Slot(shape, f"{head}_offset_{tail}", trainable=False, filed=False)
            self.offset += (key,)

    def initialise(self, p: Params, layer: Layer) -> None:
        with torch.no_grad():
            if self.start is None:
                self.draw(p, layer)
            else:
                start = self.start(layer.matrix(), self.start_rank or self.r, self.natural_scaling())
                self.begin(p, start.down_RI, start.up_OR)
                for key in self.offset:
                    p[key].copy_(p[key[:-1]] if start.offset_OI is None else start.offset_OI)
            if "bias" in p:
                p["bias"].zero_()
            if self.use_dora:
                p["magnitude"].copy_(self._norm(p, layer).reshape(p["magnitude"].shape))

    def draw(self, p: Params, layer: Layer) -> None:
        """Fills the factors with what needs no weight; not recorded."""
        inits.draw_(p["down"], p["up"], self.init, self.r, layer.kind.indexed)

    def begin(self, p: Params, down_RI: Tensor, up_OR: Tensor) -> None:
        """Has ``up @ down`` be this product; not recorded."""
        p["down"].copy_(down_RI.reshape(p["down"].shape))
        p["up"].copy_(up_OR.reshape(p["up"].shape))

    def _begun(self, p: Params) -> Params:
        """The factors that the offset takes out."""
        return dict(zip(self.rank_dims, map(p.__getitem__, self.offset), strict=True))

    def shifted(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        """``h`` of the frozen layer, as if the offset stood in its weight."""
        if (W_OI := p.get("W0")) is not None:
            return h + as_dtype(layer.operate(as_dtype(x, W_OI), W_OI), h)
        begun = self._begun(p)
        if layer.kind.matrix:
            return low_rank(x, h, *self.pair(begun), -self.scaling, h_is_fresh=fresh)
        return h - as_dtype(self.change(begun, x, layer) * self.scaling, h)

    def base(self, p: Params, W_OI: Tensor) -> Tensor:
        """The frozen weight, with an offset that is no product."""
        return W_OI + p["W0"] if "W0" in p else W_OI

    # ------------------------------------------------------------------ files

    def saved(self, p: Params) -> Params:
        dims = self.rank_dims
        out = {key: t for key, t in p.items() if key[:-1] not in dims}
        for key, dim in dims.items() if self.kept is not None else ():
            if key in out:
                out[key] = out[key].index_select(dim, self._rows(out[key]))
        if dims.keys() <= p.keys() and (self.converts or any(f"{key}0" in p for key in dims)):
            for key, dim in dims.items():
                t0 = p.get(f"{key}0", torch.zeros_like(p[key]))  # a table has none, and all of a file has one rank
                out[key] = torch.cat([out[key], -t0 if dim else t0], dim)
        return out

    def restored(self, saved: Params, p: Params) -> Params:
        dims, n = self.rank_dims, self.r if self.kept is None else sum(self.kept)
        out, found = dict(saved), [saved[key].shape[dim] for key, dim in dims.items() if key in saved]
        if self.converts and found == [n + self.r] * len(dims):
            parts = {key: torch.split(saved[key], [n, self.r], dim) for key, dim in dims.items()}
            out.update({key: t for key, (t, _) in parts.items()})
            out.update({f"{key}0": -t0 if dims[key] else t0 for key, (_, t0) in parts.items() if self.offset})
            if not self.offset and all(t0.any() for _, t0 in parts.values()):
                raise LoadError(
                    f"A part of the update in the file is an offset, and init_lora_weights={self.init!r} has none on "
                    "a table: load it under another name.",
                    LoadReport(),
                )
        for key, dim in dims.items() if self.kept is not None and len(found) == len(dims) else ():
            if (t := out[key]).shape[dim] == n:  # another choice of rows is named by the comparison of shapes
                out[key] = p[key].detach().to(t, copy=True).index_copy_(dim, self._rows(t), t)
        return out

    def _rows(self, like: Tensor) -> Tensor:
        return torch.tensor(self.kept, device=like.device).nonzero()[:, 0]

    def begun_at(self, p: Params, initial: Params) -> Params:
        if not self.rank_dims:
            return super().begun_at(p, initial)
        return {**p, **{f"{key}0": initial[key] for key in self.rank_dims}}

    # ------------------------------------------------------------------ DoRA

    def _norm(self, p: Params, layer: Layer) -> Tensor:
        squares = None if "W0" in p else layer.row_squares()
        W_OI, (down, up) = self.base(p, layer.matrix()), self.whole(p)
        if down.shape[1] > W_OI.shape[1]:
            return grouped_norm(W_OI, down, up, self.scaling, layer.kind.groups(layer.base_layer), squares)
        return weight_norm(W_OI, down, up, self.scaling, squares)

    def _dora(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool, W_OI: Tensor | None = None) -> Tensor:
        bias, kind, (down, up) = layer.offset(), layer.kind, self.pair(p)
        dropout = self.dropout if layer.training and not kind.indexed else 0.0
        if layer.training:
            norm_O = self._norm(p, layer)
        else:
            owners = tuple(t for key, t in p.items() if key != "magnitude")
            if isinstance(self.scaling, Tensor):
                owners = (*owners, self.scaling)
            norm_O = layer.remember(("norm", self.scaling), owners, lambda: self._norm(p, layer))
        mask = dropped = None
        if dropout:
            # Only the update sees dropout: (gain - 1) W drop(x) stands beside the frozen layer's W x.
            seen, mask = drop(x, dropout)
            dropped = layer.operate(seen, as_dtype(layer.matrix(), x))
            dropped = self.shifted(p, seen, dropped, layer) if self.offset else dropped
            if mask is None or not kind.matrix:
                x, dropout = seen, 0.0
        if kind.matrix:
            dropped = dropped if dropped is None or bias is None else dropped + bias
            return dora(
                x, h, down, up, self.scaling, p["magnitude"], norm_O, bias, dropout,
                mask=mask, h_dropped_BO=dropped, h_is_fresh=fresh, W_OI=W_OI,
            )  # fmt: skip
        gain = kind.channels(p["magnitude"].flatten() / norm_O)
        frozen = dropped if dropped is not None else h if bias is None else h - kind.channels(bias)
        return h + as_dtype((gain - 1) * frozen + gain * self.scaling * self.change(p, x, layer), h)


def product(down_RI: Tensor, up_OR: Tensor, experts: int = 1) -> Tensor:
    """``up @ down``; for stacked experts ``up`` is (O, R E), ``down`` (E R, I) and the result E x O x I.

    The expert index varies fastest in ``up`` and slowest in ``down``: that is how files have it.
    """
    if experts == 1:
        return up_OR @ down_RI
    up_EOR = up_OR.reshape(up_OR.shape[0], -1, experts).permute(2, 0, 1)
    return up_EOR @ down_RI.reshape(experts, -1, down_RI.shape[1])
