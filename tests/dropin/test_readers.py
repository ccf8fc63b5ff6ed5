"""Adapters as vLLM and sglang read them: what they serve is what was trained, and what they refuse is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dropin.vllm_reader import Factors, Refused, sglang, vllm
from torch import Tensor, nn

Tiny = Callable[[str], nn.Module]
QV = {"target_modules": ["q_proj", "v_proj"]}


def saved(model: nn.Module, folder: Path, config: peft.PeftConfig, name: str = "default", **options: Any) -> Tensor:
    """What an adapter gives whose every tensor has values, as it is saved."""
    handle = peft.get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for parameter in handle.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 4)
        handle.save_pretrained(folder, **options)
        return handle.eval()(input_ids=IDS).logits.float()


IDS = torch.tensor([[1, 5, 6, 7], [1, 9, 10, 11]])


def served(model: nn.Module, factors: Factors) -> Tensor:
    """What the frozen model gives with what a server has read beside its layers."""
    for module, (A_RI, B_OR, scale) in factors.items():

        def beside(layer: nn.Module, args: tuple[Tensor], h: Tensor, A=A_RI, B=B_OR, scale=scale) -> Tensor:
            down = A.t()[args[0]] if isinstance(layer, nn.Embedding) else args[0].float() @ A.t()
            return h + (scale * (down @ B.t())).to(h.dtype)

        model.get_submodule(module).register_forward_hook(beside)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


#: what is saved -> fields of the config
SERVED: dict[str, dict[str, Any]] = {
    "a list": QV,
    "all-linear": {"target_modules": "all-linear"},
    "scaled": {**QV, "lora_alpha": 3},
    "rslora": {**QV, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj", "v_proj"]},
    "expression": {"target_modules": r".*\.(q_proj|v_proj)$"},
    "pissa": {**QV, "init_lora_weights": "pissa"},
    "no task": {**QV, "task_type": None},
}
#: which of them sglang does not serve as they were trained
NOT_SGLANG = {"rslora", "expression"}
#: options of save_pretrained
WAYS: dict[str, dict[str, Any]] = {"safetensors": {}, "bin": {"safe_serialization": False}, "other": {"name": "other"}}


def config(fields: dict[str, Any]) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **fields})


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_is_what_was_trained(name: str, tiny: Tiny, tmp_path: Path) -> None:
    expected = saved(tiny("llama"), tmp_path, config(SERVED[name]))
    torch.testing.assert_close(served(tiny("llama"), vllm(tmp_path)), expected)
    if name not in NOT_SGLANG:
        torch.testing.assert_close(served(tiny("llama"), sglang(tmp_path)), expected)


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_saved(way: str, tiny: Tiny, tmp_path: Path) -> None:
    expected = saved(tiny("llama"), tmp_path, config(QV), **WAYS[way])
    folder = tmp_path / WAYS[way].get("name", "")
    torch.testing.assert_close(served(tiny("llama"), vllm(folder)), expected)


def test_a_base_of_16_bits(tiny: Tiny, tmp_path: Path) -> None:
    expected = saved(tiny("llama").bfloat16(), tmp_path, config(QV))
    torch.testing.assert_close(served(tiny("llama").bfloat16(), vllm(tmp_path)), expected, rtol=0.1, atol=0.1)


Read = Callable[..., Factors]
LORA = {"r": 4, **QV}
#: server, config, message
REFUSED: list[tuple[Read, peft.PeftConfig, str]] = [
    (vllm, peft.LoraConfig(**LORA, bias="lora_only"), "bias"),
    (vllm, peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), "modules_to_save"),
    (vllm, peft.LoraConfig(**LORA, use_dora=True), "use_dora"),
    (vllm, peft.LoraConfig(**LORA, trainable_token_indices=[5]), "trainable_tokens_delta is unsupported"),
    (vllm, peft.LoraConfig(r=4, target_modules=r".*layers\.1.*q_proj"), "expression"),
    (vllm, peft.LoraConfig(**{**LORA, "r": 65}), "rank 65 where the server has 64"),
    (vllm, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "no \\['r', 'lora_alpha'\\]"),
    (vllm, peft.LoHaConfig(**LORA), "lora_alpha"),
    (sglang, peft.LoraConfig(r=4, target_modules=r".*\.(q_proj|v_proj)$"), "no list"),
    (sglang, peft.LoraConfig(r=4, target_modules=["q_proj"]), "q_proj without v_proj"),
    (sglang, peft.LoraConfig(**{**LORA, "r": 65}), "rank 65"),
]


@pytest.mark.parametrize(("read", "given", "message"), REFUSED)
def test_what_servers_refuse(read: Read, given: peft.PeftConfig, message: str, tiny: Tiny, tmp_path: Path) -> None:
    saved(tiny("llama"), tmp_path, given)
    with pytest.raises(Refused, match=message):
        read(tmp_path)


#: server, fields that PEFT's files may have and the server passes over
MISREAD = [
    (vllm, {"rank_pattern": {"v_proj": 2}}),
    (vllm, {"alpha_pattern": {"v_proj": 2}}),
    (sglang, {"use_rslora": True}),
]


@pytest.mark.parametrize(("read", "fields"), MISREAD)
def test_what_servers_scale_otherwise(read: Read, fields: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    """The files are PEFT's all the same: the server has one scale for all layers."""
    expected = saved(tiny("llama"), tmp_path, config({**QV, **fields}))
    assert not torch.allclose(served(tiny("llama"), read(tmp_path)), expected, atol=1e-3)
