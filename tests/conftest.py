"""What every test may ask for: a seed, one thread, and tiny models that no other test has touched."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache

# Before transformers and tokenizers are imported, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from torch import nn

settings.register_profile("inlay", deadline=None, derandomize=True, database=None)
settings.load_profile("inlay")


# tests/dropin runs where the drop-in stands for PEFT, every other test where PEFT itself is: `make env` makes both.
DROPIN = importlib.util.find_spec("peft._surface") is not None
collect_ignore = [] if DROPIN else ["dropin"]


# ---------------------------------------------------------------- markers


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _missing_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


#: marker -> why its tests cannot run here, or None where they can
MISSING: dict[str, Callable[[], str | None]] = {
    "gpu": _missing_gpu,
    "bnb": lambda: _missing("bitsandbytes"),
    "diffusers": lambda: _missing("diffusers"),
    "trl": lambda: _missing("trl"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, missing in MISSING.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


# ---------------------------------------------------------------- the same numbers in every run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Every test starts from the same seed, and leaves torch's defaults as it found them."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.manual_seed(0)
    yield 0
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


# ---------------------------------------------------------------- tiny models, built once per process


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=3,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


class MLP(nn.Module):
    """10 -> 20 -> 20 -> 2, in logits."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 20)
        self.head = nn.Linear(20, 2)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x_BI)))))


class ConvNet(nn.Module):
    """Images (B, 3, 8, 8) -> two convolutions -> 2 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(12, 2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = torch.relu(self.conv1(torch.relu(self.conv0(x_BCHW))))
        return self.head(h_BCHW.mean((2, 3)))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "mlp": MLP,
    "convnet": ConvNet,
}


@cache
def _prototype(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return BUILDERS[name]().eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], nn.Module]:
    """``tiny("llama")``: a model of the test's own, in eval mode, with the same weights every time.

    One of "llama", "gpt2", "bert" (3 labels), "t5", "mlp", "convnet". Vocabulary 64, width 32, 2 layers.
    """
    return lambda name: copy.deepcopy(_prototype(name))


@pytest.fixture
def llama(tiny: Callable[[str], nn.Module]) -> nn.Module:
    return tiny("llama")


@pytest.fixture
def gpt2(tiny: Callable[[str], nn.Module]) -> nn.Module:
    return tiny("gpt2")


@pytest.fixture
def bert(tiny: Callable[[str], nn.Module]) -> nn.Module:
    return tiny("bert")


@pytest.fixture
def t5(tiny: Callable[[str], nn.Module]) -> nn.Module:
    return tiny("t5")


@pytest.fixture
def mlp(tiny: Callable[[str], nn.Module]) -> nn.Module:
    return tiny("mlp")


@pytest.fixture
def convnet(tiny: Callable[[str], nn.Module]) -> nn.Module:
    return tiny("convnet")


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    """Token ids (3, 7) for the tiny language models; none of them is a special one."""
    return torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(2))
