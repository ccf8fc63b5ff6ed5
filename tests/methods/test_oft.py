"""What OFT and (IA)^3 do beyond the laws."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.errors import ConfigError, NotMergeableError, PeftError, PeftWarning, UnsupportedLayerError


def adapted(layer: nn.Module, **fields: Any) -> inlay.PeftModel:
    net = nn.Sequential(layer)
    model = inlay.get_peft_model(net, inlay.OFTConfig(target_modules=["0"], init_weights=False, **fields))
    return model.eval()


@pytest.mark.parametrize(
    "fields",
    [{"r": 4}, {"oft_block_size": 0}, {"num_cayley_neumann_terms": 1}, {"num_cayley_neumann_terms": 10**9}],
    ids=str,
)
def test_contradictions_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        inlay.OFTConfig(**fields)


@pytest.mark.parametrize(("wanted", "used"), [(5, 4), (9, 6), (10, 12), (1000, 12)])
def test_a_block_size_that_does_not_divide_becomes_the_nearest(wanted: int, used: int) -> None:
    with pytest.warns(PeftWarning, match=rf"Adjusted `oft_block_size` to \({used}\)"):
        model = adapted(nn.Linear(12, 3), oft_block_size=wanted)
    assert dict(model.base_model.model[0].oft_block_size) == {"default": used}


@pytest.mark.parametrize("fields", [{}, {"r": 37, "oft_block_size": 0}, {"oft_block_size": 1}], ids=str)
def test_blocks_of_one_channel_are_told_to_do_nothing(fields: dict[str, int]) -> None:
    with pytest.warns(PeftWarning, match="rotates nothing"):
        adapted(nn.Linear(97 if not fields else 37, 3), **fields)


def test_patterns_choose_by_layer() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = inlay.OFTConfig(target_modules=["0", "1"], oft_block_size=4, rank_pattern={"1": 4})
    model = inlay.get_peft_model(net, config)
    assert [tuple(p.shape) for n, p in model.named_parameters() if "oft_R" in n] == [(2, 6), (4, 1)]
    config = inlay.OFTConfig(target_modules=["0"], rank_pattern={"0": 4}, block_size_pattern={"0": 2})
    with pytest.raises(UnsupportedLayerError, match="both"):
        inlay.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)


def test_coft_projects_without_touching_the_parameter() -> None:
    model, x = adapted(nn.Linear(8, 3), oft_block_size=4, coft=True, eps=0.1), torch.randn(5, 8)
    packed = model.base_model.model[0].oft_R["default"].weight
    before, expected = packed.detach().clone(), model(x)
    assert torch.equal(packed, before)
    with torch.no_grad():  # on the ball's surface: |Q| = eps / sqrt(2 blocks), and |Q| is sqrt(2) |triangle|
        packed.mul_(0.1 / 2 / packed.norm(dim=1, keepdim=True))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 1, padding=1), nn.Conv2d(4, 6, 1, groups=2)], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_channels_are_rotated_where_the_kernel_is_one(layer: nn.Conv2d, size: int) -> None:
    model, x = adapted(layer, oft_block_size=size), torch.randn(2, 4, 3, 3)
    expected = model(x)
    assert not model.base_model.model[0].methods["default"].through_weight
    torch.testing.assert_close(model(x[0]), expected[0])
    if layer.groups > 1 and size > 2:
        with pytest.raises(NotMergeableError, match="groups"):
            model.merge_adapter()
        return
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_dropout_leaves_whole_blocks_out() -> None:
    model = adapted(nn.Linear(40, 40, bias=False), oft_block_size=4, module_dropout=0.5).train()
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.copy_(torch.eye(40))
        R = model(torch.eye(40))
    kept = [bool((R[i : i + 4, i : i + 4] - torch.eye(4)).abs().max() > 1e-6) for i in range(0, 40, 4)]
    assert 0 < sum(kept) < 10


def test_feedforward_modules_must_be_targets() -> None:
    with pytest.raises(ConfigError, match="fd"):
        inlay.IA3Config(target_modules=["fc"], feedforward_modules=["fd"])
    with pytest.raises(PeftError, match="feedforward_modules"):
        inlay.get_peft_model(nn.Sequential(nn.Linear(2, 3)), inlay.IA3Config(target_modules=["0"]))


def test_a_hostile_feedforward_pattern_ends() -> None:
    config = inlay.IA3Config(target_modules=["0"], feedforward_modules=r"(([0-9])+)+X")
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(2, 3)), config)
    assert model.base_model.model[0].ia3_l["default"].shape == (3, 1)


@pytest.mark.parametrize(
    ("version", "series", "told"),
    [
        (None, True, True),
        ("0.17.1", True, True),
        ("0.17.1", False, False),
        ("0.18.0", True, False),
        ("1" * 9999, True, False),
    ],
    ids=lambda v: str(v)[:9],
)
def test_files_of_before_the_series_changed_are_told_of(
    tmp_path: Path, version: str | None, series: bool, told: bool
) -> None:
    inlay.OFTConfig(use_cayley_neumann=series).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | {"peft_version": version}
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "peft_version" or version}))
    with pytest.warns(PeftWarning, match="parameterization has been slightly changed") if told else nullcontext():
        inlay.OFTConfig.from_pretrained(tmp_path)
    assert inlay.get_peft_config({"peft_type": "OFT", "use_cayley_neumann": True}).use_cayley_neumann
    assert inlay.OFTConfig.check_kwargs(r=3, peft_version="0.1") == {"r": 3, "peft_version": "0.1"}
