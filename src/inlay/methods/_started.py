"""A low-rank update that may start at a part of the weight, with the offset which makes up for that (`inlay.inits`).

    W' = W - s B0 A0 + s B A      or      W' = W + W0 + s B A,  W0 = quantised W - W

The offset's tensors stand beside the trained ones, frozen; the weight itself is never written. Files hold the first as
a plain update of twice the rank, [A; A0] and [B, -B0], and of the second the factors alone: it is computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay import inits
from inlay.errors import LoadError, UnsupportedLayerError
from inlay.layers import LayerKind
from inlay.methods._abstract import AbstractLowRank, Layer, Params, Slot, as_dtype
from inlay.ops.low_rank import low_rank
from inlay.report import LoadReport

_PACKED = "start by True, then call replace_lora_weights_loftq with the weights that it was packed from"
_OFFSETS = {"down0": "A", "up0": "B", "W0": "W"}


class StartedLowRank(AbstractLowRank):
    """``down`` and ``up`` with any starting values of `inlay.inits`; call `prepare_start` when the slots are there."""

    init: bool | str
    r: int
    # Names of the offset's tensors in p.
    offset: tuple[str, ...] = ()

    def prepare_start(
        self, kind: LayerKind, base: nn.Module, loftq_config: Mapping[str, Any] | None, tied: bool
    ) -> None:
        """Adds the offset's slots. A layer tied to another uses that one's tensors, and has none of its own."""
        name = inits.name_of(self.init)
        whole = kind.experts(base) == kind.groups(base) == 1
        if not whole and name not in ("true", "false", "gaussian"):
            raise UnsupportedLayerError(
                f"init_lora_weights={self.init!r} is defined on one matrix: neither on grouped convolutions nor on "
                "stacks of experts."
            )
        if name == "orthogonal" and self.r % 2:
            raise UnsupportedLayerError(f"init_lora_weights='orthogonal' needs an even r, got {self.r}.")
        self.converts = name in ("pissa", "olora")
        # PEFT starts a table as ever, whatever is asked for.
        self.start = None if kind.indexed or tied else inits.computed(self.init, loftq_config)
        if self.start is not None:
            self.offset = ("down0", "up0") if self.converts else ("W0",)
            self.unpacked_only = None if self.converts else _PACKED
        for key in self.offset:
            shape = self.slots[key[:-1]].shape if self.converts else kind.shape(base)
            self.slots[key] = Slot(shape, f"lora_offset_{_OFFSETS[key]}", trainable=False, filed=False)

    def initialise(self, p: Params, layer: Layer) -> None:
        if self.start is None:
            return inits.draw_(p["down"], p["up"], self.init, self.r, layer.kind.indexed)
        with torch.no_grad():
            start = self.start(layer.matrix(), self.r, self.natural_scaling())
            p["down"].copy_(start.down_RI.reshape(p["down"].shape))
            p["up"].copy_(start.up_OR.reshape(p["up"].shape))
            for key in self.offset:
                p[key].copy_(p[key[:-1]] if start.offset_OI is None else start.offset_OI)

    def shifted(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        """``h`` of the frozen layer, as if the offset stood in its weight."""
        if (W_OI := p.get("W0")) is not None:
            return h + as_dtype(layer.operate(as_dtype(x, W_OI), W_OI), h)
        down, up = p["down0"], p["up0"]
        if layer.kind.matrix:
            return low_rank(x, h, down, up, -self.scaling, h_is_fresh=fresh)
        return h - as_dtype(AbstractLowRank.change(self, {"down": down, "up": up}, x, layer) * self.scaling, h)

    def whole(self, p: Params) -> tuple[Tensor, Tensor]:
        """The factors of the update and of its offset in one pair."""
        if "down0" not in p:
            return p["down"], p["up"]
        return torch.cat([p["down"], p["down0"]]), torch.cat([p["up"], -p["up0"]], 1)

    def base(self, p: Params, W_OI: Tensor) -> Tensor:
        """The frozen weight, with an offset that is no product."""
        return W_OI + p["W0"] if "W0" in p else W_OI

    def saved(self, p: Params) -> Params:
        if not ("down" in p and "up" in p and (self.converts or "down0" in p)):
            return p
        rest = {key: t for key, t in p.items() if key not in _OFFSETS}
        if "down0" not in p:  # all of a file has one rank
            p = {**p, "down0": torch.zeros_like(p["down"]), "up0": torch.zeros_like(p["up"])}
        down, up = self.whole(p)
        return {**rest, "down": down, "up": up}

    def restored(self, saved: Params, p: Params) -> Params:
        down, up = saved.get("down"), saved.get("up")
        if not self.converts or down is None or up is None or (len(down), up.shape[1]) != (2 * self.r,) * 2:
            return saved
        (down, down0), (up, up0) = down.chunk(2), up.chunk(2, 1)
        if self.offset:
            return {**saved, "down": down, "up": up, "down0": down0, "up0": -up0}
        if down0.any() and up0.any():
            raise LoadError(
                f"Half of the update in the file is an offset, and init_lora_weights={self.init!r} has none on a "
                "table: load it under another name.",
                LoadReport(),
            )
        return {**saved, "down": down, "up": up}

    def begun_at(self, p: Params, initial: Params) -> Params:
        return {**p, "down0": initial["down"], "up0": initial["up"]}
