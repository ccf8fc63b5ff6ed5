"""Starting values that PEFT takes out of the base, and inlay keeps beside it: equal functions, and files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.cases import BOTH, QV, M
from parity.helpers import Pair, base, make_pair, peft, peft_may_warn, prototype
from torch import Tensor, nn

import inlay

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 5}},
    "dora": {"use_dora": True},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{start}-{name}": ("linears", {**BOTH, "init_lora_weights": start, **fields})
        for start in ("pissa", "olora", "orthogonal")
        for name, fields in SETTINGS.items()
        if (start, name) != ("orthogonal", "patterns")  # which needs even ranks
    },
    "pissa-gpt2": ("gpt2-conv1d", {**M, "init_lora_weights": "pissa", "fan_in_fan_out": True}),
    "pissa-embedding": ("embedding", {**M, "init_lora_weights": "pissa"}),
    "pissa-llama": ("llama", {**QV, "init_lora_weights": "pissa", "task_type": "CAUSAL_LM"}),
}
each_case = pytest.mark.parametrize(("name", "fields"), CASES.values(), ids=list(CASES))


@each_case
def test_outputs_and_gradients(name: str, fields: dict[str, Any]) -> None:
    pair = make_pair(name, fields)
    pair.assert_equal_outputs(1e-4)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        out = model(*pair.args, **pair.kwargs)
        (out if isinstance(out, Tensor) else out.logits).square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    theirs, ours = pair.each(gradients)
    assert theirs
    assert sorted(ours) == sorted(theirs)
    for key, grad in theirs.items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-3, atol=1e-5)


@each_case
def test_files_both_ways(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    pair = make_pair(name, fields)
    with peft_may_warn():
        pair.theirs.save_pretrained(tmp_path / "theirs")  # not converted: the start is computed again
    again = inlay.PeftModel.from_pretrained(base(name), tmp_path / "theirs").eval()
    assert again.load_report.ok
    assert not any(p.is_meta for p in again.parameters())
    Pair(pair.theirs, again, pair.args, pair.kwargs).assert_equal_outputs(1e-4)
    pair.ours.save_pretrained(tmp_path / "ours")
    with peft_may_warn():
        read = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours").eval()
    Pair(read, pair.ours, pair.args, pair.kwargs).assert_equal_outputs(1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("settings", ["plain", "rslora", "patterns"])
def test_converted_alike(start: str, settings: str, tmp_path: Path) -> None:
    fields = {**BOTH, "init_lora_weights": start, **SETTINGS[settings]}
    with peft_may_warn():
        theirs = peft.get_peft_model(base("linears"), peft.LoraConfig(**fields)).eval()
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = start
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1 * parameter.requires_grad)
        theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = inlay.get_peft_model(base("linears"), inlay.LoraConfig(**fields)).eval()
    # Their converted file is the one that ours is: it can be trained on here.
    assert ours.load_adapter(tmp_path / "theirs", "default").ok
    Pair(theirs, ours, prototype("linears")[1]).assert_equal_outputs(1e-4)
    ours.save_pretrained(tmp_path / "ours")
    read = [inlay.load_peft_weights(tmp_path / who) for who in ("theirs", "ours")]
    assert sorted(read[0]) == sorted(read[1])
    for key, t in read[0].items():
        torch.testing.assert_close(read[1][key], t)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert configs[1][field] == configs[0][field]


@pytest.fixture
def nothing_goes_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ sends what it works on to CUDA, and has no other way: here it stays."""
    to = torch.Tensor.to

    def here(value: Any) -> Any:
        return "cpu" if isinstance(value, str | torch.device) and "cuda" in str(value) else value

    def stay(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *map(here, args), **{k: here(v) for k, v in kwargs.items()})

    monkeypatch.setattr(torch.Tensor, "to", stay)


@pytest.mark.bnb
@pytest.mark.usefixtures("nothing_goes_to_cuda")
@pytest.mark.parametrize(("bits", "rounds"), [(4, 1), (4, 3), (8, 2)])
def test_loftq(bits: int, rounds: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = {"loftq_bits": bits, "loftq_iter": rounds}
    fields = {**BOTH, "lora_alpha": 8, "init_lora_weights": "loftq", "loftq_config": config}
    with peft_may_warn():
        theirs = peft.get_peft_model(base("linears"), peft.LoraConfig(**fields)).eval()
    ours = inlay.get_peft_model(base("linears"), inlay.LoraConfig(**fields)).eval()
    for name in ("lin0", "lin1"):
        layer, quantised = getattr(ours.base_model.model, name), getattr(theirs.base_model.model, name).base_layer
        held = layer.base_layer.weight + layer.lora_offset_W["default"]
        torch.testing.assert_close(held, quantised.weight, rtol=1e-4, atol=1e-5)
        # PEFT leaves the scale out, which is 2 here.
        own = getattr(theirs.base_model.model, name)
        product = own.lora_B["default"].weight @ own.lora_A["default"].weight
        torch.testing.assert_close(layer.get_delta_weight("default") - layer.lora_offset_W["default"], product)
    with torch.no_grad(), peft_may_warn():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
        theirs.save_pretrained(tmp_path / "theirs")
    again = inlay.PeftModel.from_pretrained(base("linears"), tmp_path / "theirs").eval()
    pair = Pair(theirs, again, prototype("linears")[1])
    pair.assert_equal_outputs(1e-4)
    again.save_pretrained(tmp_path / "ours")
    with peft_may_warn():
        pair.theirs = peft.PeftModel.from_pretrained(base("linears"), tmp_path / "ours").eval()
    pair.assert_equal_outputs(1e-4)
