"""AdaLoRA begins where LoRA can: its singular values are then a part of the weight's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from laws import Net, bits, close, disturb, pack4, same_bits, same_state
from safetensors.torch import save_file
from torch import nn

import inlay
from inlay.errors import UnsupportedLayerError

STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_8": {"init_lora_weights": "pissa_niter_8"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": inlay.LoftQConfig(loftq_bits=4, loftq_iter=2)},
}
started = pytest.mark.parametrize("start", STARTS.values(), ids=list(STARTS))


def two_layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 6)).eval()


def begun(start: dict[str, Any], base: nn.Module | None = None, **fields: Any) -> inlay.PeftModel:
    own = {"init_r": 4, "target_r": 2, "lora_alpha": 3, "total_step": 9, "target_modules": ["0", "1"]}
    config = inlay.AdaLoraConfig(**{**own, **fields, **start})
    return inlay.get_peft_model(two_layers() if base is None else base, config)


def fitted(model: inlay.PeftModel, steps: int = 9) -> inlay.PeftModel:
    """Trained through its whole schedule."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        (model(X_BI) - 1).square().mean().backward()
        optimiser.step()
        model.update_and_allocate(step)
    return model.eval()


X_BI = torch.randn(5, 12, generator=torch.Generator().manual_seed(7))


@started
@torch.no_grad()
def test_a_start_is_the_identity_and_the_base_stays(start: dict[str, Any]) -> None:
    base = two_layers()
    before, expected = bits(base), base(X_BI)
    model = begun(start, base)
    close(model(X_BI), expected, 0.2 if "loftq" in start.values() else 1e-5)
    layer = model.base_model.model[0]
    assert layer.lora_E["default"].abs().min() > 0
    for rows in (layer.lora_A["default"], layer.lora_B["default"].t()):
        close(rows.norm(dim=1), torch.ones(4))
    if start["init_lora_weights"] == "pissa":  # the largest singular values, whatever the scale
        close(layer.lora_E["default"][:, 0] * 3 / (4 + 1e-5), torch.linalg.svdvals(layer.base_layer.weight)[:4])
    with model.disable_adapter():
        same_bits(model(X_BI), expected)
    with torch.enable_grad():
        fitted(model, 3)
    trained = model(X_BI)
    assert float((trained - expected).abs().max()) > 1e-3
    model.merge_adapter()
    close(model(X_BI), trained, 1e-5)
    model.unmerge_adapter()
    same_state(bits(model.unload()), before)


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match")
@started
@pytest.mark.parametrize("steps", [3, 9], ids=["while ranks fall", "once they are final"])
def test_a_start_is_saved_as_an_adapter_of_the_original_base(
    tmp_path: Path, start: dict[str, Any], steps: int
) -> None:
    alphas = {"alpha_pattern": {"1": 2}} if steps == 3 else {}  # has no effect in PEFT
    model = fitted(begun(start, **alphas), steps)
    trained = model(X_BI)
    model.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(two_layers(), tmp_path)
    close(again(X_BI), trained, 1e-5)
    converts = start["init_lora_weights"] not in ("loftq", "orthogonal")
    written = again.peft_config["default"]
    assert isinstance(written, inlay.AdaLoraConfig)
    assert written.init_r == (8 if converts else 4)
    assert (written.rank_pattern is None) == (steps == 3)
    if steps == 9:
        kept = model.peft_config["default"].rank_pattern
        assert sum(map(sum, kept.values())) == 4  # type: ignore[attr-defined]
        assert sum(map(sum, written.rank_pattern.values())) == (4 + 8 if converts else 4)  # type: ignore[union-attr]
    before = bits(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    same_state(bits(model), before)
    if "loftq" not in start.values() and not alphas:
        theirs = peft.PeftModel.from_pretrained(two_layers(), str(tmp_path))
        close(theirs(X_BI), trained, 1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora", "orthogonal", "Gaussian"])
def test_a_name_in_a_file_of_peft_had_no_effect_there(tmp_path: Path, name: str) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["0"], init_lora_weights=name)
    theirs = peft.get_peft_model(two_layers(), config).eval()
    disturb(theirs)
    theirs.save_pretrained(str(tmp_path))
    for given in (None, inlay.PeftConfig.from_pretrained(tmp_path)):
        model = inlay.PeftModel.from_pretrained(two_layers(), tmp_path, config=given)
        close(model(X_BI), theirs(X_BI))


def test_a_rank_beyond_the_weights_can_be_trained() -> None:
    layer = begun({"init_lora_weights": "pissa"}, init_r=15).base_model.model[0]
    assert not layer.lora_E["default"][12:].any()
    assert layer.lora_B["default"][:, 12:].abs().min() > 0


def test_rows_that_are_cut_have_no_start() -> None:
    with pytest.raises(UnsupportedLayerError, match="rank_pattern"):
        begun({"init_lora_weights": "pissa"}, rank_pattern={"0.lora_E": [True, False, True, True]})


@pytest.mark.bnb
def test_what_packing_lost_is_a_start_too(tmp_path: Path) -> None:
    torch.manual_seed(3)
    original = nn.Linear(64, 32)
    save_file({"m.weight": original.weight.detach().clone()}, tmp_path / "original.safetensors")
    model = inlay.get_peft_model(
        Net(pack4(original)), inlay.AdaLoraConfig(init_r=8, target_r=4, total_step=9, target_modules=["m"])
    )
    layer = model.base_model.model.m
    lost = layer.matrix().float() - original.weight
    inlay.replace_lora_weights_loftq(model, tmp_path / "original.safetensors")
    assert (lost + layer.get_delta_weight("default").float()).norm() < 0.8 * lost.norm()
