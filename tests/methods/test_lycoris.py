"""LoHa and LoKr beyond the grid: shapes by rank and kernel, starts, dropout of the whole update, ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import Net
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError
from inlay.layers import kind_of
from inlay.methods.lokr import split


def adapted(config: Any, layer: nn.Module) -> inlay.PeftModel:
    return inlay.get_peft_model(Net(layer), config)


def shapes(config: Any, layer: nn.Module) -> dict[str, tuple[int, ...]]:
    state = inlay.get_peft_model_state_dict(adapted(config, layer))
    return {key.rsplit(".", 1)[1]: tuple(t.shape) for key, t in state.items()}


@pytest.mark.parametrize(
    ("n", "factor", "expected"),
    [
        (20, -1, (4, 5)),
        (127, -1, (1, 127)),
        (24, 6, (6, 4)),
        (24, 24, (24, 1)),
        (24, 5, (4, 6)),
        (24, 64, (4, 6)),
        (24, 0, (1, 24)),
        (24, -5, (1, 24)),
    ],
)
def test_split(n: int, factor: int, expected: tuple[int, int]) -> None:
    assert split(n, factor) == expected


CONV1, CONV2 = nn.Conv1d(64, 96, 3), nn.Conv2d(64, 96, (3, 2))


@pytest.mark.parametrize(
    ("layer", "fields", "expected"),
    [
        (nn.Linear(12, 20), {"r": 4}, {"w1": (4, 3), "w2": (5, 4)}),
        (nn.Linear(12, 20), {"r": 2}, {"w1": (4, 3), "w2_a": (5, 2), "w2_b": (2, 4)}),
        (CONV2, {"r": 6}, {"w1": (8, 8), "w2": (12, 8, 3, 2)}),
        (CONV2, {"r": 2}, {"w1": (8, 8), "w2_a": (12, 2), "w2_b": (2, 48)}),
        (
            CONV1,
            {"r": 2, "use_effective_conv2d": True, "decompose_both": True},
            {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (2, 12), "w2_b": (2, 8), "t2": (2, 2, 3, 1)},
        ),
        (
            nn.Conv2d(64, 96, 1),
            {"r": 2, "use_effective_conv2d": True},
            {"w1": (8, 8), "w2_a": (12, 2), "w2_b": (2, 8)},
        ),
        (nn.Conv2d(64, 96, 3, groups=4), {"r": 2}, {"w1": (8, 4), "w2_a": (12, 2), "w2_b": (2, 36)}),
    ],
)
def test_shapes_of_lokr(layer: nn.Module, fields: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    found = shapes(inlay.LoKrConfig(target_modules=["m"], **fields), layer)
    assert found == {f"lokr_{key}": shape for key, shape in expected.items()}


@pytest.mark.parametrize(
    ("layer", "a", "b", "core"),
    [
        (CONV1, (2, 96), (2, 64), (2, 2, 3, 1)),
        (CONV2, (2, 96), (2, 64), (2, 2, 3, 2)),
        (nn.Conv2d(64, 96, 1), (96, 2), (2, 64), None),
        (nn.Linear(64, 96), (96, 2), (2, 64), None),
    ],
)
def test_shapes_of_effective_loha(layer: nn.Module, a: Any, b: Any, core: Any) -> None:
    expected = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    expected |= {"hada_t1": core, "hada_t2": core} if core else {}
    assert shapes(inlay.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["m"]), layer) == expected


@pytest.mark.parametrize(
    ("config", "zero"),
    [
        (inlay.LoHaConfig(target_modules=["m"]), {"hada_w2_b"}),
        (inlay.LoHaConfig(init_weights=False, target_modules=["m"]), set()),
        (inlay.LoKrConfig(r=2, target_modules=["m"]), {"lokr_w1"}),
        (inlay.LoKrConfig(r=2, decompose_both=True, target_modules=["m"]), {"lokr_w1_a"}),
        (inlay.LoKrConfig(r=2, init_weights="lycoris", target_modules=["m"]), {"lokr_w2_b"}),
        (inlay.LoKrConfig(r=99, init_weights="lycoris", target_modules=["m"]), {"lokr_w2"}),
        (inlay.LoKrConfig(r=2, init_weights=False, target_modules=["m"]), set()),
    ],
)
def test_what_starts_at_zero(config: Any, zero: set[str]) -> None:
    state = inlay.get_peft_model_state_dict(adapted(config, nn.Linear(64, 96)))
    assert {key.rsplit(".", 1)[1] for key, t in state.items() if not t.any()} == zero


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 20), (2, 3, 12)),
        (nn.Linear(12, 20), (12,)),
        (nn.Linear(12, 20), (0, 12)),
        (nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 5, 4)),
        (nn.Conv2d(12, 20, 3, padding=1, padding_mode="circular"), (12, 5, 4)),
        (nn.Conv1d(12, 20, 1), (0, 12, 4)),
        (nn.Conv2d(24, 20, 3, groups=2), (2, 24, 5, 4)),
        (nn.Embedding(12, 20), None),
        (nn.Embedding(12, 20, scale_grad_by_freq=True), None),
    ],
)
@pytest.mark.parametrize("low", [False, True])
def test_apply_kron_is_apply_of_the_product(layer: nn.Module, shape: tuple[int, ...] | None, low: bool) -> None:
    kind = kind_of(layer)
    assert kind is not None
    _, ins = kind.shape(layer)
    w1, right = torch.randn(4, 3), torch.randn(2 if low else 5, ins // 3)
    left = torch.randn(5, 2) if low else None
    x = torch.tensor([[0, 3, 11], [4, 4, 7]]) if shape is None else torch.randn(shape)
    expected = kind.apply(layer, x, torch.kron(w1, right if left is None else left @ right))
    torch.testing.assert_close(kind.apply_kron(layer, x, w1, right, left), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [inlay.LoHaConfig, inlay.LoKrConfig])
def test_module_dropout_leaves_out_the_whole_update(config: Any) -> None:
    torch.manual_seed(0)
    model = adapted(config(r=2, init_weights=False, module_dropout=0.5, target_modules=["m"]), nn.Linear(8, 9))
    x, base = torch.randn(3, 8), model.base_model.model.m.base_layer
    whole = model.eval()(x)
    model.train()
    outs = [model(x) for _ in range(20)]
    dropped = [torch.equal(out, base(x)) for out in outs]
    assert 0 < sum(dropped) < 20
    for out, left_out in zip(outs, dropped, strict=True):
        if not left_out:
            torch.testing.assert_close(out, whole)


@pytest.mark.parametrize("config", [inlay.LoHaConfig, inlay.LoKrConfig])
@pytest.mark.parametrize("layer", [nn.Linear(8, 9), nn.Conv2d(8, 9, 3)], ids=str)
def test_a_step_in_which_all_is_left_out_has_a_gradient_of_zero(config: Any, layer: nn.Module) -> None:
    model = adapted(config(r=2, init_weights=False, module_dropout=1.0, target_modules=["m"]), layer).train()
    x = torch.randn(3, 8, *(4, 4) * isinstance(layer, nn.Conv2d))
    out = model(x)
    assert torch.equal(out, model.base_model.model.m.base_layer(x))
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [inlay.LoHaConfig, inlay.LoKrConfig])
def test_a_tied_layer_follows(config: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 20)
            self.head = nn.Linear(20, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.head(self.embed(x))
            return h

    fields = {"r": 2, "init_weights": False, "target_modules": ["embed"], "ensure_weight_tying": True}
    model = inlay.get_peft_model(Tied(), config(**fields))
    x = torch.tensor([[1, 5, 11]])
    with torch.no_grad():
        table = model.base_model.model.embed.base_layer.weight
        W = table + model.base_model.model.embed.get_delta_weight("default")
        torch.testing.assert_close(model(x), nn.functional.embedding(x, W) @ W.t())


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"r": 2**63},
        {"rank_pattern": {"m": -1}},
        {"rank_pattern": {"m": 10**400}},
        {"alpha": 1e308},
        {"alpha_pattern": {"m": -1e308}},
        {"rank_dropout": 1.5},
        {"module_dropout": -0.1},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("config", [inlay.LoHaConfig, inlay.LoKrConfig])
def test_impossible_values(config: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config(**fields)


@pytest.mark.parametrize("factor", [0, -2])
def test_a_factor_that_divides_nothing_is_refused(factor: int) -> None:
    with pytest.raises(ConfigError, match="decompose_factor"):
        inlay.LoKrConfig(decompose_factor=factor)
