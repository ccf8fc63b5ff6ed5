"""What methods share serves those that are not there yet: two of them in a few lines, and the laws over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import laws
import pytest
from laws import LAWS, MERGE_LAWS, Case, Law, Option, cells, tensors_may_be_replaced
from torch import Tensor, nn

import inlay
from inlay.config import AdapterConfig, PeftType
from inlay.errors import NotMergeableError, UnsupportedLayerError
from inlay.layers import LayerKind
from inlay.methods import METHODS, Layer, Params, Slot, as_dtype
from inlay.methods._rotation import AbstractRotation
from inlay.methods.loha import LoHaAdapter, LoHaConfig


@dataclass
class HraConfig(AdapterConfig):
    """Reflections (https://arxiv.org/abs/2405.17484): R is a product of I - 2 u u^T."""

    r: int = 2

    method: ClassVar[str] = "HRA"


class HraAdapter(AbstractRotation):
    def __init__(self, config: HraConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        width = self.lay_out(kind, base) * (self.groups if self.through_weight else 1)
        self.slots = {"u": Slot((width, config.r), "hra_u")}

    def initialise(self, p: Params, layer: Layer) -> None:
        nn.init.normal_(p["u"][:, :1])
        p["u"][:, 1:].data.copy_(p["u"][:, :1])  # the two cancel

    def turn(self, p: Params, x: Tensor, layer: Layer | None = None, back: bool = False) -> Tensor:
        x = as_dtype(x, p["u"])
        for u in p["u"].flip(1).t() if back else p["u"].t():
            u = u / u.norm()
            x = x - 2 * (x @ u)[..., None] * u
        return x

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        if self.groups > 1 and not self.through_weight:
            raise NotMergeableError("it mixes the groups")


@dataclass
class WdLoHaConfig(LoHaConfig):
    """LoHa whose rows have learnt lengths, as LyCORIS has it."""

    method: ClassVar[str] = "WDLOHA"


class WdLoHaAdapter(LoHaAdapter):
    use_dora = from_base = True

    def __init__(self, config: LoHaConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]) -> None:
        super().__init__(config, kind, base, values)
        self.slots = {k: slot._replace(name=f"wdloha_{k}") for k, slot in self.slots.items()}
        self.slots["magnitude"] = Slot(kind.channel_shape(base), "wdloha_magnitude")

    def draw(self, p: Params, layer: Layer) -> None:
        super().draw({key: t for key, t in p.items() if key != "magnitude"}, layer)


FACTORS = tuple(f"wdloha_w{i}_{side}" for i in "12" for side in "ab")
OPTIONS = {
    "HRA": Option({}, additive=False),
    "WDLOHA": Option({"r": 1, "alpha": 2}, constant=FACTORS),
}
CASES = [
    Case("HRA", "plain", kind)
    for kind in ("Linear", "Conv1D", "Conv2d", "Conv2d grouped", "Embedding", "MultiheadAttention")
] + [Case("WDLOHA", "plain", kind) for kind in ("Linear", "Conv2d", "Conv2d grouped", "Embedding")]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    inlay.register_peft_method(name="hra", config_cls=HraConfig, model_cls=HraAdapter)
    inlay.register_peft_method(name="wdloha", config_cls=WdLoHaConfig, model_cls=WdLoHaAdapter)
    for name, option in OPTIONS.items():
        monkeypatch.setitem(laws.OPTIONS, name, {"plain": option})
    yield
    for name in OPTIONS:
        METHODS.pop(name, None)
        PeftType._member_map_.pop(name, None)
        PeftType._value2member_map_.pop(name, None)


@pytest.mark.parametrize(("law", "case"), cells((*LAWS, *MERGE_LAWS), CASES))
def test_law(law: Law, case: Case) -> None:
    if law is tensors_may_be_replaced and case.method == "HRA":
        return  # by twice their numbers, which is the same reflection
    law(case)


@pytest.mark.parametrize("kind", ["Parameter", "MultiheadAttention"])
def test_lengths_of_rows_need_a_layer_with_one_matrix(kind: str) -> None:
    with pytest.raises(UnsupportedLayerError, match="does not work with use_dora=True"):
        Case("WDLOHA", "plain", kind).fresh()


def test_what_cannot_be_merged_cannot_stand_in_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: HraAdapter, kind: LayerKind, base: nn.Module) -> None:
        raise NotMergeableError("there is no such weight")

    monkeypatch.setattr(HraAdapter, "check_mergeable", refuse)
    with pytest.raises(UnsupportedLayerError, match=r"^m.*through its weight: there is no such weight"):
        Case("HRA", "plain", "MultiheadAttention").fresh()
