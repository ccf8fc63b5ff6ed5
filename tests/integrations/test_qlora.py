"""QLoRA (https://arxiv.org/abs/2305.14314), end to end: loaded packed, trained, saved, loaded, merged, unmerged.

And beside PEFT: the same packed weights, the same outputs, files both ways.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import bits, close, same_bits, same_state
from torch import Tensor, nn

import inlay
from inlay.adapted import Adapted
from inlay.errors import PeftWarning
from inlay.walk import wrappers

pytestmark = [pytest.mark.bnb, pytest.mark.filterwarnings("ignore:Merged into")]

QUANTISED: dict[str, dict[str, Any]] = {
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]

each = pytest.mark.parametrize("how", QUANTISED)
ids_BT = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base of random weights; its sizes are multiples of a 4-bit block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, how: str, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = {**QUANTISED[how], **options}
    if "load_in_4bit" in quantised:
        quantised.setdefault("bnb_4bit_compute_dtype", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**quantised), device_map="cpu", dtype=torch.float32
        )
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":  # else some processors repack it, with coarser statistics
            module.support_avx512bf16_for_cpu = False
    return model


def layers(model: nn.Module) -> list[Adapted]:
    return [w for _, w in wrappers(model) if isinstance(w, Adapted)]


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids_BT).logits
    return out


@each
@pytest.mark.parametrize("reentrant", [None, False])
def test_qlora(folder: Path, tmp_path: Path, how: str, reentrant: bool | None) -> None:
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    model = inlay.prepare_model_for_kbit_training(load(folder, how), gradient_checkpointing_kwargs=kwargs)
    frozen = bits(model)
    config = inlay.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    handle = inlay.get_peft_model(model, config)
    losses = train(handle)
    assert losses[-1] < losses[0]
    trained = logits(handle)

    handle.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(load(folder, how), tmp_path)
    assert again.load_report.ok
    same_bits(logits(again), trained)

    with handle.disable_adapter():
        plain = logits(handle)
    with pytest.warns(PeftWarning, match=r"Merged into 6 packed weights"):
        handle.merge_adapter()
    assert all(0 < layer.rounding.mean < 0.15 and layer.rounding.largest < 0.25 for layer in layers(handle))
    merged = logits(handle)
    # Nearer to what was trained than to the base: rounding has not eaten the adapter.
    assert (merged - trained).norm() < (plain - trained).norm()
    with handle.disable_adapter():
        same_bits(logits(handle), plain)
    handle.unmerge_adapter()
    same_bits(logits(handle), trained)
    same_state({k: t for k, t in bits(again.unload()).items() if k in frozen}, frozen)

    whole = handle.merge_and_unload()
    assert not layers(whole)
    same_bits(logits(whole), merged)


@each
def test_prepared_for_training(folder: Path, how: str) -> None:
    model = load(folder, how)
    for name, module in model.named_modules():
        if "norm" in name or "embed" in name:
            module.bfloat16()
    packed = {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters() if "proj" in n}
    prepared = inlay.prepare_model_for_kbit_training(model)
    assert prepared is model
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for n, p in model.named_parameters() if "proj" not in n} == {torch.float32}
    assert {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters() if "proj" in n} == packed
    assert model.get_input_embeddings()(ids_BT).requires_grad
    off = inlay.prepare_model_for_kbit_training(load(folder, how), use_gradient_checkpointing=False)
    assert not off.get_input_embeddings()(ids_BT).requires_grad


def test_packed_bytes_stored_as_floats_are_not_cast(folder: Path) -> None:
    model = load(folder, "nf4 twice", bnb_4bit_quant_storage=torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.data.view(torch.uint8).clone()
    inlay.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert weight.dtype == torch.bfloat16
    same_bits(weight.data.view(torch.uint8), before)


def test_a_model_that_is_not_packed_keeps_its_activations(llama: nn.Module) -> None:
    prepared = inlay.prepare_model_for_kbit_training(llama.bfloat16())
    assert {(p.dtype, p.requires_grad) for p in prepared.parameters()} == {(torch.float32, False)}
    assert not prepared.is_gradient_checkpointing
    assert not prepared.get_input_embeddings()(ids_BT).requires_grad


# ---------------------------------------------------------------- beside PEFT


def theirs_of(folder: Path, how: str, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", **fields)
        torch.manual_seed(4)
        return peft.get_peft_model(load(folder, how), config).eval()


@each
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_equal_to_peft(folder: Path, tmp_path: Path, how: str, dora: bool) -> None:
    theirs = theirs_of(folder, how, init_lora_weights=False, use_dora=dora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(load(folder, how), tmp_path / "theirs", is_trainable=True)
    assert ours.load_report.ok
    expected = logits(theirs)
    close(logits(ours), expected)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()

    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        back = peft.PeftModel.from_pretrained(load(folder, how), tmp_path / "ours")
        close(logits(back), expected)

    if dora and how == "int8":
        train(ours)  # PEFT loses the layer's statistics here and fails
        return
    for model in (ours, theirs):
        model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert sorted(mine) == sorted(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
