"""sentence-transformers' own adapter mixin and trainer, which go through those of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import transformers

from dropin import tiny_transformers as tiny

sentence_transformers = pytest.importorskip("sentence_transformers")
TEXTS = ["w5 w6 w7", "w9 w10"]
PAIRS = [("w5", "w6 w7"), ("w7 w8", "w9")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a plain encoder."""
    path = tmp_path / "base"
    encoder = transformers.BertModel(tiny.MODELS["bert"].config())
    encoder.load_state_dict({k.removeprefix("bert."): t for k, t in tiny.build("bert").state_dict().items()}, False)
    encoder.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def encoder(path: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(path), device="cpu")


def test_an_encoder_with_an_adapter_is_saved_and_loaded(base: Path, tmp_path: Path) -> None:
    model = encoder(base)
    plain = model.encode(TEXTS)
    model.add_adapter(tiny.config("bert", "lora"))
    tiny.stir(model)
    adapted = model.encode(TEXTS)
    assert not np.allclose(adapted, plain)
    model.save_pretrained(str(tmp_path / "saved"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    again = encoder(tmp_path / "saved")
    assert again.active_adapters() == ["default"]
    np.testing.assert_allclose(again.encode(TEXTS), adapted, atol=1e-6)
    other = encoder(base)
    other.load_adapter(str(tmp_path / "saved"), "style")
    np.testing.assert_allclose(other.encode(TEXTS), adapted, atol=1e-6)
    other.disable_adapters()
    np.testing.assert_allclose(other.encode(TEXTS), plain, atol=1e-6)
    other.enable_adapters()
    assert other.get_adapter_state_dict().keys() == model.get_adapter_state_dict().keys()
    other.delete_adapter("style")
    np.testing.assert_allclose(other.encode(TEXTS), plain, atol=1e-6)


def test_a_trained_encoders_checkpoint_is_its_adapter(base: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model = encoder(base)
    model.add_adapter(tiny.config("bert", "lora"))
    words = [f"w{i}" for i in range(5, 13)]
    rows = datasets.Dataset.from_dict({"anchor": [f"{word} w20" for word in words], "positive": words})
    settings = {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4, "logging_strategy": "no"}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    loss = sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    before = model.encode(TEXTS)
    trainer = sentence_transformers.SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss)
    trainer.train()
    assert not np.allclose(model.encode(TEXTS), before)
    found = os.listdir(tmp_path / "run" / "checkpoint-2")
    assert "adapter_model.safetensors" in found
    assert "model.safetensors" not in found
    again = encoder(tmp_path / "run" / "checkpoint-2")
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_a_cross_encoder_keeps_its_head(tmp_path: Path) -> None:
    tiny.build("bert").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model = sentence_transformers.CrossEncoder(str(tmp_path / "base"), device="cpu", num_labels=3)
    model.add_adapter(tiny.config("bert", "head"))
    tiny.stir(model)
    expected = model.predict(PAIRS)
    model.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.CrossEncoder(str(tmp_path / "saved"), device="cpu", num_labels=3)
    np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-6)
    name, head = next((n, m) for n, m in again.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper))
    again.set_keep_in_fp32_modules([name])
    assert type(head.original_module).__name__ == type(head.modules_to_save["default"]).__name__ == "_Float32Linear"
    np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-6)
