"""The same base twice, adapted by PEFT and by inlay, with the same weights: what every parity test begins with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import inlay

Config = Mapping[str, Any]


@contextmanager
def peft_may_warn() -> Iterator[None]:
    """Nothing that PEFT warns of fails a test; only calls of PEFT belong inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


with peft_may_warn():
    import peft


# ---------------------------------------------------------------- bases: name -> (model, inputs)


class One(nn.Module):
    """Linear -> the layer under test, at ``m``."""

    def __init__(self, m: nn.Module, width: int | None = None) -> None:
        super().__init__()
        self.m = m
        self.head = nn.Linear(width, 3) if width else nn.Identity()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        h = self.m(*args, **kwargs)
        return self.head(h)


class Attention(nn.Module):
    """Self-attention, with whatever the call is given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(12, 3, **kwargs)
        nn.init.normal_(self.m.out_proj.weight)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        out, weights = self.m(x, x * 0.5, x + 1, **kwargs)
        return (out,) if weights is None else (out, weights)


class Fused(nn.Module):
    """Bare parameters: a (2-D), two stacks of experts (3-D)."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(8, 12))
        self.up = nn.Parameter(torch.randn(3, 8, 10))
        self.down = nn.Parameter(torch.randn(3, 10, 6))

    def forward(self, x_BI: Tensor) -> Tensor:
        h_BD = x_BI @ self.flat.t()
        h_EBF = torch.relu(torch.einsum("bd,edf->ebf", h_BD, self.up))
        return torch.einsum("ebf,efo->bo", h_EBF, self.down)


class WithFused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 12)
        self.experts = Fused()

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.experts(torch.relu(self.lin(x_BI)))


def turned() -> nn.Module:
    """Its experts say that their matrices have the input first."""
    model = WithFused()
    model.experts.is_transposed = True
    return model


class TwoLinears(nn.Module):
    """One with a bias, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.lin1 = nn.Linear(20, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.head(torch.relu(self.lin1(self.norm(torch.relu(self.lin0(x_BI))))))


class Layers(nn.Module):
    """Six layers in a list, two linears in each, for layer indices and patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)}) for _ in range(6)
        )

    def forward(self, x_BI: Tensor) -> Tensor:
        for layer in self.layers:
            x_BI = torch.tanh(layer["q_proj"](x_BI) + layer["v_proj"](x_BI))
        return x_BI


class Stack(nn.Module):
    """The same at ``model.layers``, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Layers()
        self.score = nn.Linear(8, 2)

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.score(self.model(x_BI))


def _gpt2_linear() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(20, 12)
    nn.init.normal_(layer.bias)
    return One(layer, 20)


def _scaled_embedding() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    layer = Gemma3TextScaledWordEmbedding(16, 12, padding_idx=0, embed_scale=3.5)
    nn.init.normal_(layer.weight)
    return One(layer, 12)


def _floats(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(shape),)


def _ids(vocabulary: int = 16) -> tuple[Tensor, ...]:
    return (torch.randint(0, vocabulary, (3, 7)),)


BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "linears": (TwoLinears, partial(_floats, 5, 12)),
    "linears-3d": (TwoLinears, partial(_floats, 2, 5, 12)),
    "stack": (Stack, partial(_floats, 5, 8)),
    "gpt2-conv1d": (_gpt2_linear, partial(_floats, 2, 5, 12)),
    "conv1d": (lambda: One(nn.Conv1d(4, 8, 3, stride=2, padding=1)), partial(_floats, 2, 4, 11)),
    "conv2d": (lambda: One(nn.Conv2d(4, 8, 3, stride=2, padding=1)), partial(_floats, 2, 4, 9, 7)),
    "conv2d-oblong": (
        lambda: One(nn.Conv2d(4, 8, (3, 2), stride=(1, 2), padding=(0, 1), bias=False)),
        partial(_floats, 2, 4, 9, 7),
    ),
    "conv2d-same": (lambda: One(nn.Conv2d(4, 8, 3, padding="same")), partial(_floats, 2, 4, 9, 7)),
    "conv2d-dilated": (lambda: One(nn.Conv2d(4, 8, 3, padding=2, dilation=2)), partial(_floats, 2, 4, 9, 7)),
    "conv2d-point": (lambda: One(nn.Conv2d(8, 6, 1, stride=2)), partial(_floats, 2, 8, 5, 7)),
    "conv2d-grouped": (lambda: One(nn.Conv2d(4, 8, 3, padding=1, groups=2)), partial(_floats, 2, 4, 9, 7)),
    "conv3d": (lambda: One(nn.Conv3d(4, 8, 3, stride=2, padding=1)), partial(_floats, 2, 4, 5, 6, 7)),
    "embedding": (lambda: One(nn.Embedding(16, 12), 12), _ids),
    "embedding-padding": (lambda: One(nn.Embedding(16, 12, padding_idx=0), 12), _ids),
    "embedding-scaled": (_scaled_embedding, _ids),
    "attention": (Attention, partial(_floats, 5, 2, 12)),
    "attention-batch-first": (partial(Attention, batch_first=True), partial(_floats, 2, 5, 12)),
    "attention-unbatched": (Attention, partial(_floats, 5, 12)),
    "attention-no-bias": (partial(Attention, bias=False), partial(_floats, 5, 2, 12)),
    "fused": (WithFused, partial(_floats, 5, 12)),
    "fused-turned": (turned, partial(_floats, 5, 12)),
}


def _transformer(name: str) -> nn.Module:
    from conftest import BUILDERS

    if name == "bert-spans":
        from transformers import BertForQuestionAnswering

        config = BUILDERS["bert"]().config
        config.num_labels = 2
        return BertForQuestionAnswering(config)
    if name != "tied-llama":
        return BUILDERS[name]()
    model = BUILDERS["llama"]()
    model.config.tie_word_embeddings = True
    model = type(model)(model.config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@cache
def prototype(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The base ``name`` and what to call it with; to be copied, never changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        if name in BASES:
            build, inputs = BASES[name]
            return build().eval(), inputs(), {}
        model = _transformer(name).eval()
        ids = torch.randint(3, 64, (3, 7))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if name == "t5":
            kwargs["decoder_input_ids"] = torch.randint(3, 64, (3, 4))
        return model, (), kwargs


def base(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A fresh copy of a base."""
    model = copy.deepcopy(prototype(name)[0])
    return model if dtype is None else model.to(dtype)


# ---------------------------------------------------------------- a pair

CONFIGS = {
    "LORA": "LoraConfig",
    "ADALORA": "AdaLoraConfig",
    "IA3": "IA3Config",
    "LOHA": "LoHaConfig",
    "LOKR": "LoKrConfig",
    "OFT": "OFTConfig",
    "ADAPTION_PROMPT": "AdaptionPromptConfig",
}


def config_of(library: ModuleType, fields: Config) -> Any:
    """A config object of either library; ``peft_type`` names the method, which is LoRA if it is not given."""
    own = copy.deepcopy(dict(fields))
    return getattr(library, CONFIGS[own.pop("peft_type", "LORA")])(**own)


@dataclass
class Pair:
    """The incumbent's model and ours, on equal bases, and what to call both with."""

    theirs: Any
    ours: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def both(self) -> tuple[Any, Any]:
        return self.theirs, self.ours

    def each(self, act: Callable[[Any], Any]) -> tuple[Any, Any]:
        """``act`` done to both."""
        with peft_may_warn():
            theirs = act(self.theirs)
        return theirs, act(self.ours)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """What both give, as one flat tensor each."""
        return flat(run(self.theirs, self)), flat(run(self.ours, self))

    def assert_equal_outputs(self, tolerance: float = 1e-5) -> None:
        theirs, ours = self.outputs()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    def add(self, name: str, **config: Any) -> None:
        """Adds an adapter to both, with equal random weights."""
        with peft_may_warn():
            self.theirs.add_adapter(name, config_of(peft, config))
        self.ours.add_adapter(name, config_of(inlay, config))
        equalise(self, name)


def run(model: nn.Module, pair: Pair) -> Any:
    with peft_may_warn() if isinstance(model, peft.PeftModel) else _nothing():
        return model(*pair.args, **pair.kwargs)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def flat(out: Any) -> Tensor:
    """All float results of a forward, end to end."""
    if isinstance(out, Tensor):
        return out.flatten()
    values = out.values() if isinstance(out, Mapping) else out
    return torch.cat([flat(v).to(torch.float32) for v in values if isinstance(v, Tensor) and v.is_floating_point()])


def make_pair(
    name: str,
    config: Config,
    more: Mapping[str, Config] | None = None,
    dtype: torch.dtype | None = None,
    call: Config | None = None,
    adapter_name: str = "default",
    **kwargs: Any,
) -> Pair:
    """Both libraries' models on equal bases, with equal random adapter weights.

    Args:
        name: Key of a base.
        config: Fields of the config, and ``peft_type`` where it is not LoRA's.
        more: Further adapters by name.
        dtype: Of the base; fp32 if not given.
        call: Keyword arguments of the forward beside the base's own.
        adapter_name: Of the first adapter.
        kwargs: For both `get_peft_model`.
    """
    _, args, own = prototype(name)
    args = tuple(a.to(dtype) if dtype is not None and a.is_floating_point() else a for a in args)
    with peft_may_warn():
        theirs = peft.get_peft_model(base(name, dtype), config_of(peft, config), adapter_name, **kwargs)
    ours = inlay.get_peft_model(base(name, dtype), config_of(inlay, config), adapter_name, **kwargs)
    pair = Pair(theirs.eval(), ours.eval(), args, {**own, **(call or {})})
    equalise(pair, adapter_name)
    for other, fields in (more or {}).items():
        pair.add(other, **fields)
    return pair


def random_like(tensors: Mapping[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    """Random values near the given ones, so that nothing starts as zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: (t + 0.3 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t
        for k, t in tensors.items()
    }


def equalise(pair: Pair, adapter_name: str = "default") -> dict[str, Tensor]:
    """Gives both the same random adapter weights, by the names that files have."""
    with peft_may_warn():
        start = peft.get_peft_model_state_dict(pair.theirs, adapter_name=adapter_name, save_embedding_layers=False)
        values = random_like({k: t.clone() for k, t in start.items()}, seed=len(adapter_name))
        if any(".out_proj." in k for k in values):  # PEFT does not train these two biases and leaves the first out
            values = {k: t.zero_() if k.endswith(".m.lora_B.bias") else t for k, t in values.items()}
        peft.set_peft_model_state_dict(pair.theirs, values, adapter_name=adapter_name)
        # Tied tensors are written twice there, so that the last value is both's.
        start = peft.get_peft_model_state_dict(pair.theirs, adapter_name=adapter_name, save_embedding_layers=False)
        values = {k: t.clone() for k, t in start.items()}
    report = inlay.set_peft_model_state_dict(pair.ours, values, adapter_name=adapter_name)
    assert not report.missing_keys
    assert not report.unexpected_keys
    return values


def without_dropout(model: nn.Module) -> None:
    """Sets every rate of dropout in the base to zero, wherever transformers reads it from."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("dropout", "attention_dropout"):
            if isinstance(module.__dict__.get(rate), float):
                setattr(module, rate, 0.0)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, pair: Pair) -> dict[str, Tensor]:
    """Gradients by live name of a loss that weighs every output differently."""
    model.zero_grad()
    out = flat(run(model, pair))
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype)
    (out * weights).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_tensors(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], relative: float | None = None
) -> None:
    """Equal keys, shapes and dtypes; equal bits, or a largest difference relative to the largest value."""
    assert set(ours) == set(theirs)
    for key, t in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (t.shape, t.dtype), key
        if relative is None:
            assert torch.equal(ours[key], t), key
        elif t.numel():
            difference = (ours[key] - t).abs().max()
            assert difference <= relative * t.abs().max() + 1e-7, f"{key}: {difference} beside {t.abs().max()}"


def ident(value: Any) -> str:
    """A test's name for a value; sets in order, for every worker must make the same names."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {ident(v)}" for k, v in value.items()) + "}"
    return "{" + ", ".join(sorted(value)) + "}" if isinstance(value, set) else str(value)


def tree(model: nn.Module) -> list[tuple[str, str]]:
    """(name, class) of all modules."""
    return [(n, f"{type(m).__module__}.{type(m).__qualname__}") for n, m in model.named_modules()]


def adapted_names(model: nn.Module) -> set[str]:
    """Names of the modules that stand around a frozen layer, read off live parameters."""
    return {n.split(".base_layer.")[0] for n, _ in model.named_parameters() if ".base_layer." in n}
