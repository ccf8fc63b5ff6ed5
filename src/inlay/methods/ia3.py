"""(IA)^3: learnt vectors that scale activations (https://arxiv.org/abs/2205.05638).

    h = l * (W x + b)         keys, values and other layers: the output, bias included
    h = W (l * x) + b         feed-forward layers: the input

``l`` starts at one, so a fresh adapter changes nothing. Several adapters multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.config import AdapterConfig
from inlay.errors import ConfigError, UnknownArchitectureError, UnsupportedLayerError
from inlay.layers import LayerKind
from inlay.match import matcher
from inlay.methods._abstract import AbstractAdapter, Layer, Params, Slot, as_dtype
from inlay.methods._targets import IA3_FEEDFORWARD


@dataclass
class IA3Config(AdapterConfig):
    """Config of (IA)^3.

    Args:
        feedforward_modules (`list[str]` or `str`, *optional*): The targets whose input is scaled instead of their
            output: names or dotted suffixes out of ``target_modules``, or a regex for the whole name. `None` is the
            architecture's default; a model without one needs a list, which may be empty.
        init_ia3_weights (`bool`, *optional*, defaults to `True`): ``True`` starts at one, ``False`` at random.

    The remaining fields are `inlay.config.AdapterConfig`'s.

    Example:
        >>> IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]).init_ia3_weights
        True
    """

    feedforward_modules: list[str] | set[str] | str | None = None
    init_ia3_weights: bool = True

    method: ClassVar[str] = "IA3"
    example: ClassVar[dict[str, Any]] = {"feedforward_modules": []}
    bias_only: ClassVar[str] = "ia3_only"
    always_written: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, list):
            self.feedforward_modules = set(self.feedforward_modules)
        chosen = self.feedforward_modules if isinstance(self.feedforward_modules, set) else ()
        if strange := sorted(name for name in chosen if not self._may_name(name)):
            raise ConfigError(
                f"feedforward_modules must name some of the targets, and {strange} are not in target_modules: add "
                "them there, or leave them out here."
            )

    def _may_name(self, name: str) -> bool:
        """Whether ``name`` is a target, as far as lists tell: one of them, a suffix of one, or a more exact one."""
        if isinstance(self.target_modules, str) or (self.target_modules is None and not self.target_parameters):
            return True
        known = (*(self.target_modules or ()), *(self.target_parameters or ()))
        return any(f".{name}".endswith(f".{t}") or f".{t}".endswith(f".{name}") for t in known)

    def layer_values(self, path: str, model_type: str | None) -> dict[str, Any]:
        chosen = self._feedforward(model_type)
        if chosen is None:
            raise UnknownArchitectureError(
                f"there is no default for feedforward_modules on the architecture {model_type!r}: name the layers "
                "whose input is to be scaled, or pass [] for none."
            )
        known = self.__dict__.get("_chooser")
        if known is None or known[0] != chosen:  # compiled once for all layers of a plan
            known = self.__dict__["_chooser"] = (chosen, matcher(chosen))
        # What is adapted inside another layer (attention's out-projection) follows it.
        return {"feedforward": known[1](path.partition(".base_layer")[0])}

    def _feedforward(self, model_type: str | None) -> list[str] | set[str] | str | None:
        return IA3_FEEDFORWARD.get(model_type or "") if self.feedforward_modules is None else self.feedforward_modules

    def spell_out(self, model_type: str | None) -> None:
        if self.feedforward_modules is None:
            self.feedforward_modules = {n for n in self._feedforward(model_type) or () if self._may_name(n)}
        self.__dict__.pop("_chooser", None)


class IA3Adapter(AbstractAdapter):
    """(IA)^3 on one layer; see the module's text for the mathematics."""

    stacks = True  # all experts share the vector
    read_as: ClassVar[dict[str, str]] = {"is_feedforward": "changes_input"}

    def __init__(self, config: IA3Config, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        self.changes_input: bool = values["feedforward"]
        self.init = config.init_ia3_weights
        if self.changes_input and kind.indexed:
            raise UnsupportedLayerError("an embedding's input is indices, which cannot be scaled: leave it out.")
        ins, (outs, inner) = kind.features(base)[0], kind.shape(base)
        self.groups = kind.groups(base)
        self.taps = inner * self.groups // ins  # weights of one output that see the same input channel
        size = ins if self.changes_input else outs
        like = kind.channel_shape(base)
        if len(like) > 1:
            shape = (1, size, *like[2:])
        else:
            shape = (1, size) if self.changes_input else (size, 1)
        self.slots = {"l": Slot(shape, "ia3_l")}

    def initialise(self, p: Params, layer: Layer) -> None:
        with torch.no_grad():
            p["l"].fill_(1.0) if self.init else p["l"].normal_()

    def into(self, p: Params, x: Tensor, layer: Layer) -> Tensor:
        return as_dtype(x * layer.kind.channels(p["l"].flatten()), x) if self.changes_input else x

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        return h if self.changes_input else as_dtype(h * layer.kind.channels(p["l"].flatten()), h)

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.changes_input:
            return W_OI * p["l"].reshape(-1, 1), None if b_O is None else b_O * p["l"].flatten()
        l_GI = p["l"].reshape(self.groups, -1).repeat_interleave(self.taps, 1)
        # The outputs of one group see the inputs of that group.
        l_OI = l_GI if self.groups == 1 else l_GI.repeat_interleave(W_OI.shape[-2] // self.groups, 0)
        return W_OI * l_OI, b_O
