"""Laws that hold for every method on every kind of layer, and the tables they are run over.

A law takes a `Case` and asserts by itself. A case makes its models anew for every question, so laws cannot meet.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.adapted import Adapted
from inlay.config import AdapterConfig
from inlay.errors import NotMergeableError, PeftError, RowsError, UnsupportedLayerError
from inlay.methods import METHODS
from inlay.walk import wrappers

# ---------------------------------------------------------------- the layers


class Net(nn.Module):
    """The layer under test, at ``m``."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.m(x)
        return h


class SelfAttention(Net):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.m(x, x * 0.5, x + 1, need_weights=False)[0]
        return h


class Decoder(Net):
    """Calls attention as transformers does, with positions where it wants them."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1]).outer(torch.tensor([1.0, 0.1])).repeat(1, 2).to(x.dtype)
        positions = (angles.cos()[None], angles.sin()[None])
        named = {} if "c_attn" in dict(self.m.named_modules()) else {"position_embeddings": positions}
        h: Tensor = self.m(hidden_states=x, attention_mask=None, **named)[0]
        return h


class Fused(nn.Module):
    """A weight without a layer of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * 0.5)
        self.gate = nn.Parameter(torch.randn(shape[-2]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("...i,eoi->...o", x, self.weight if self.weight.dim() == 3 else self.weight[None])
        return h * self.gate


class Turned(Fused):
    """The same of experts whose matrices have their input first, as transformers' modules tell."""

    is_transposed = True

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.gate = nn.Parameter(torch.randn(shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = torch.einsum("...i,eio->...o", x, self.weight) * self.gate
        return h


def _conv1d_of_gpt2() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 5)
    nn.init.normal_(layer.bias)
    return layer


def _attention() -> nn.Module:
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    for vector in (layer.in_proj_bias, layer.out_proj.bias):
        nn.init.normal_(vector)
    return layer


def _attention_of_llama() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig

    config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    config._attn_implementation = "sdpa"
    layer = LlamaAttention(config, layer_idx=0)
    nn.init.normal_(layer.v_proj.weight)
    return layer


def _attention_of_gpt2() -> nn.Module:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Config

    config = GPT2Config(n_embd=8, n_head=2, n_positions=8, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "sdpa"
    layer = GPT2Attention(config, layer_idx=0)
    nn.init.normal_(layer.c_attn.weight)
    return layer


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape)


def _indices(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(0, 11, (batch, *shape))


@dataclass(frozen=True)
class Kind:
    """One way a layer can be.

    Args:
        row (`str`): The kind's name in `inlay.layers.KINDS`, or "Parameter".
        layer: Makes the layer.
        inputs: batch -> input.
        net (`type[Net]`): The model around it.
        rows (`bool`): Whether ``adapter_names`` can reach its rows.
    """

    row: str
    layer: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    net: type[Net] = Net
    rows: bool = True

    @property
    def target(self) -> dict[str, Any]:
        return {"target_parameters": ["m.weight"]} if self.row == "Parameter" else {"target_modules": ["m"]}


KINDS: dict[str, Kind] = {
    "Linear": Kind("Linear", lambda: nn.Linear(5, 6), _floats(5)),
    "Linear without bias": Kind("Linear", lambda: nn.Linear(5, 6, bias=False), _floats(3, 5)),
    "Conv1D": Kind("Conv1D", _conv1d_of_gpt2, _floats(3, 5)),
    "Conv1d": Kind("Conv1d", lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), _floats(3, 7)),
    "Conv2d": Kind("Conv2d", lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1), _floats(2, 5, 4)),
    "Conv2d dilated": Kind(
        "Conv2d", lambda: nn.Conv2d(2, 4, 2, padding="same", dilation=2, bias=False), _floats(2, 4, 4)
    ),
    "Conv2d reflecting": Kind(
        "Conv2d", lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), _floats(2, 4, 4)
    ),
    "Conv2d grouped": Kind("Conv2d", lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), _floats(4, 3, 3)),
    "Conv3d": Kind("Conv3d", lambda: nn.Conv3d(2, 3, 2, padding=1), _floats(2, 3, 2, 2)),
    "Embedding": Kind("Embedding", lambda: nn.Embedding(11, 6), _indices(4)),
    "Embedding with padding": Kind("Embedding", lambda: nn.Embedding(11, 6, padding_idx=0), _indices(4)),
    "MultiheadAttention": Kind("MultiheadAttention", _attention, _floats(3, 6), net=SelfAttention, rows=False),
    "MultiheadAttention without bias": Kind(
        "MultiheadAttention", lambda: nn.MultiheadAttention(6, 2, bias=False), _floats(6), SelfAttention, rows=False
    ),
    "Attention": Kind("Attention", _attention_of_llama, _floats(3, 8), net=Decoder),
    "Attention of GPT-2": Kind("Attention", _attention_of_gpt2, _floats(3, 8), net=Decoder),
    "Parameter": Kind("Parameter", lambda: Fused(6, 5), _floats(5), rows=False),
    "Parameter of experts": Kind("Parameter", lambda: Fused(3, 6, 5), _floats(5), rows=False),
    "Parameter of turned experts": Kind("Parameter", lambda: Turned(3, 5, 6), _floats(5), rows=False),
}
EXPERTS = ("Parameter of experts", "Parameter of turned experts")


_VARIANTS = frozenset(
    {
        "Linear without bias",
        "Conv1d",
        "Conv2d dilated",
        "Conv2d reflecting",
        "Conv3d",
        "Embedding with padding",
        "MultiheadAttention without bias",
        *EXPERTS,
    }
)


@dataclass(frozen=True)
class Packing:
    """One way a layer's frozen weight can be kept.

    Args:
        pack: Makes such a layer of an ordinary one.
        rows (`tuple[str, ...]`, *optional*): The rows of kinds that can be kept so; all if not given.
        marks: Of the tests that need it.
        rounds (`float`): What packing may make a weight differ by, on average and relative to its mean size.
        rounds_input (`bool`): Whether the layer rounds what it reads too, in eval.
    """

    pack: Callable[[nn.Module], nn.Module]
    rows: tuple[str, ...] | None = None
    marks: tuple[pytest.MarkDecorator, ...] = ()
    rounds: float = 0.0
    rounds_input: bool = False


def pack4(layer: nn.Module, **options: Any) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    has_bias = layer.bias is not None
    packed = Linear4bit(layer.in_features, layer.out_features, has_bias, **{"quant_type": "nf4", **options})
    packed.load_state_dict(layer.state_dict())
    # On processors that have the instructions, a forward in eval repacks the weight with coarser statistics, and only
    # for some shapes.
    packed.support_avx512bf16_for_cpu = False
    return packed.to(torch.get_default_device())


def pack8(layer: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    packed = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    return packed.to(torch.get_default_device())


STORAGE: dict[str, Packing] = {
    "plain": Packing(lambda layer: layer),
    "bnb4": Packing(pack4, ("Linear",), (pytest.mark.bnb,), rounds=0.2),
    "bnb8": Packing(pack8, ("Linear",), (pytest.mark.bnb,), rounds=0.02, rounds_input=True),
}

# ---------------------------------------------------------------- the methods and what they cannot do


@dataclass(frozen=True)
class Option:
    """One way to configure a method.

    Args:
        fields: Of its config.
        other: Of a second adapter beside it, where it is to differ.
        identity (`bool`): Whether a fresh adapter changes nothing.
        constant (`tuple[str, ...]`): Slots whose gradient leaves something out by definition.
        additive (`bool`): Whether the effects of several adapters add up, whatever their order.
        narrow (`float`): How far bfloat16 may move a gradient. One that is a sum over all blocks of a layer cancels.
        converts (`bool`): Whether files hold another adapter, which does the same.
    """

    fields: Mapping[str, Any]
    other: Mapping[str, Any] = field(default_factory=dict)
    identity: bool = True
    constant: tuple[str, ...] = ()
    additive: bool = True
    narrow: float = 0.05
    converts: bool = False

    @property
    def drops(self) -> bool:
        return any(self.fields.get(f"{what}_dropout") for what in ("lora", "rank", "module"))


_DORA_CONSTANT = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")  # the norm is outside the gradient

_EVERY = r"m(\.weight)?"  # the layer under test, or its parameter

OPTIONS: dict[str, dict[str, Option]] = {
    "LORA": {
        "plain": Option({"r": 2, "lora_alpha": 3}, {"r": 4}),
        "rslora": Option({"r": 4, "lora_alpha": 3, "use_rslora": True}, {"r": 2}),
        "random": Option({"r": 2, "init_lora_weights": False}, {"r": 4}, identity=False),
        "dora": Option({"r": 2, "use_dora": True}, {"r": 4, "use_dora": False}, constant=_DORA_CONSTANT),
        "bias": Option({"r": 2, "lora_bias": True}, {"r": 4, "lora_bias": False}),
        "dropout": Option({"r": 2, "lora_dropout": 0.3}, {"r": 4}),
        "pissa": Option({"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"}, {"r": 4}, converts=True),
        "dora with dropout": Option({"r": 2, "use_dora": True, "lora_dropout": 0.3}, constant=_DORA_CONSTANT),
    },
    "ADALORA": {
        "plain": Option({"init_r": 3, "target_r": 2, "lora_alpha": 40}, {"init_r": 2}),
        "random": Option(
            {"init_r": 4, "target_r": 1, "lora_alpha": 1, "init_lora_weights": False}, {"init_r": 3}, identity=False
        ),
        "pruned": Option(
            {
                "init_r": 4,
                "target_r": 2,
                "lora_alpha": 20,
                "rank_pattern": {"m.lora_E": [True, False, True, True]},
            },
            {"rank_pattern": None},
        ),
        "dropout": Option({"init_r": 3, "target_r": 2, "lora_alpha": 40, "lora_dropout": 0.3}, {"init_r": 2}),
        "pissa": Option(
            {"init_r": 2, "target_r": 1, "init_lora_weights": "pissa"}, {"init_r": 3}, narrow=0.1, converts=True
        ),
    },
    "IA3": {
        "plain": Option({"feedforward_modules": []}, additive=False),
        "feed-forward": Option({"feedforward_modules": _EVERY}, {"feedforward_modules": []}, additive=False),
        "random": Option({"feedforward_modules": [], "init_ia3_weights": False}, identity=False, additive=False),
    },
    "OFT": {
        "plain": Option({"oft_block_size": 6}, {"oft_block_size": 0, "r": 1}, additive=False),
        "exact": Option(
            {"oft_block_size": 4, "use_cayley_neumann": False}, {"use_cayley_neumann": True}, additive=False
        ),
        "shared": Option({"oft_block_size": 4, "block_share": True}, {"block_share": False}, additive=False),
        "dropout": Option({"oft_block_size": 4, "module_dropout": 0.1}, {"module_dropout": 0.0}, additive=False),
    },
    "LOHA": {
        "plain": Option({"r": 1, "alpha": 3}, {"r": 3, "use_effective_conv2d": True}),
        "dense": Option({"r": 3, "init_weights": False}, {"r": 1}, identity=False),
        "effective": Option({"r": 1, "use_effective_conv2d": True}, {"r": 3}, narrow=0.1),
        "dropout": Option({"r": 1, "rank_dropout": 0.3}),
    },
    "LOKR": {
        "plain": Option({"r": 4, "alpha": 3}, {"r": 1}, narrow=0.1),
        "low": Option({"r": 1, "decompose_both": True}, {"init_weights": "lycoris"}, narrow=0.1),
        "effective": Option({"r": 1, "use_effective_conv2d": True, "decompose_factor": 1}, {"r": 4}, narrow=0.1),
        "random": Option({"r": 1, "init_weights": False}, {"r": 4}, identity=False, narrow=0.1),
        "dropout": Option({"r": 1, "rank_dropout": 0.3, "rank_dropout_scale": True}, narrow=0.1),
    },
    "ADAPTION_PROMPT": {"plain": Option({"adapter_len": 3, "adapter_layers": 1}, {"adapter_len": 2})},
}

_ATTENTION_ONLY_WEIGHT = (UnsupportedLayerError, "its weight is handed to one call: nothing stands beside it")
_PARAMETER_ONLY_WEIGHT = (UnsupportedLayerError, "a bare weight has no input and no output of its own")

_CALL_ONLY = (UnsupportedLayerError, "it is looked at by attention, and by nothing else")
_WEIGHT_ONLY = (UnsupportedLayerError, "it changes a weight, and attention has none but its projections'")

_ONE_MATRIX = (UnsupportedLayerError, "it is defined on one matrix, and files have no shape for several")

#: (method, option, kind) -> the error that planning raises, and why
UNSUPPORTED: dict[tuple[str, str, str], tuple[type[PeftError], str]] = {
    ("LORA", "pissa", "Conv2d grouped"): (UnsupportedLayerError, "B A is not a grouped weight, nor a part of one"),
    **{("LORA", "pissa", kind): (UnsupportedLayerError, "the start is a part of one matrix") for kind in EXPERTS},
    ("ADALORA", "pissa", "Conv2d grouped"): (UnsupportedLayerError, "as LoRA"),
    ("LORA", "bias", "Embedding"): (UnsupportedLayerError, "an embedding has no bias"),
    ("LORA", "bias", "Embedding with padding"): (UnsupportedLayerError, "an embedding has no bias"),
    ("LORA", "bias", "MultiheadAttention without bias"): (UnsupportedLayerError, "there is no bias to add to"),
    **{
        ("LORA", option, kind): _ATTENTION_ONLY_WEIGHT
        for option in ("dora", "dora with dropout")
        for kind in ("MultiheadAttention", "MultiheadAttention without bias")
    },
    **{
        ("ADALORA", option, kind): (UnsupportedLayerError, "one E weighs rows of one matrix")
        for option in ("plain", "random", "pruned", "dropout", "pissa")
        for kind in EXPERTS
    },
    ("ADALORA", "dropout", "Parameter"): _PARAMETER_ONLY_WEIGHT,
    **{
        ("LORA", option, kind): _PARAMETER_ONLY_WEIGHT
        for option in ("dora", "bias", "dropout", "dora with dropout")
        for kind in ("Parameter", *EXPERTS)
    },
    **{
        ("IA3", option, kind): (UnsupportedLayerError, "indices cannot be scaled")
        for option in ("feed-forward",)
        for kind in ("Embedding", "Embedding with padding")
    },
    ("OFT", "dropout", "MultiheadAttention"): _ATTENTION_ONLY_WEIGHT,
    ("OFT", "dropout", "MultiheadAttention without bias"): _ATTENTION_ONLY_WEIGHT,
    ("OFT", "dropout", "Parameter"): _PARAMETER_ONLY_WEIGHT,
    **{("OFT", "dropout", kind): _PARAMETER_ONLY_WEIGHT for kind in EXPERTS},
    **{
        ("OFT", "dropout", kind): (UnsupportedLayerError, "a larger kernel is rotated through its weight")
        for kind in KINDS
        if kind.startswith("Conv") and kind != "Conv1D"
    },
    **{
        (method, option, kind): _ONE_MATRIX
        for method in ("LOHA", "LOKR")
        for option in OPTIONS[method]
        for kind in EXPERTS
    },
    **{
        (method, "dropout", kind): why
        for method in ("LOHA", "LOKR")
        for kind, why in (
            ("MultiheadAttention", _ATTENTION_ONLY_WEIGHT),
            ("MultiheadAttention without bias", _ATTENTION_ONLY_WEIGHT),
            ("Parameter", _PARAMETER_ONLY_WEIGHT),
        )
    },
    **{
        (method, option, kind): _CALL_ONLY if method == "ADAPTION_PROMPT" else _WEIGHT_ONLY
        for method, ways in OPTIONS.items()
        for option in ways
        for kind, way in KINDS.items()
        if (method == "ADAPTION_PROMPT") != (way.row == "Attention")
    },
}

#: (method, option, kind) -> the error that merging raises, and why
UNMERGEABLE: dict[tuple[str, str, str], tuple[type[PeftError], str]] = {
    **{
        ("LORA", option, "Conv2d grouped"): (
            NotMergeableError,
            "the factors see what a grouped weight does not",
        )
        for option in ("plain", "rslora", "random", "bias", "dropout", "dora", "dora with dropout")
    },
    ("LORA", "bias", "Linear without bias"): (NotMergeableError, "there is no bias to write to"),
    ("LORA", "bias", "Conv2d dilated"): (NotMergeableError, "there is no bias to write to"),
    **{
        ("ADAPTION_PROMPT", "plain", kind): (NotMergeableError, "what attention sees depends on the input")
        for kind in ("Attention", "Attention of GPT-2")
    },
}


def home(method: str) -> Case:
    """A cell of the method that is possible."""
    option = next(iter(OPTIONS[method]))
    return next(Case(method, option, kind) for kind in KINDS if (method, option, kind) not in UNSUPPORTED)


@dataclass(frozen=True)
class Case:
    """One cell of the grid, and the models that a law asks for."""

    method: str
    option: str
    kind: str
    storage: str = "plain"
    # What a test that breaks a law on purpose does to every adapted model.
    spoil: Callable[[inlay.PeftModel], None] | None = None

    @property
    def id(self) -> str:
        return f"{self.method}-{self.option}-{self.kind}-{self.storage}"

    @property
    def marks(self) -> list[Any]:
        """Its storage's, and `slow` where an option repeats on a variant of a layer what it shows on the layer."""
        repeats = self.kind in _VARIANTS and self.option != next(iter(OPTIONS.get(self.method, [self.option])))
        return [*STORAGE[self.storage].marks, *([pytest.mark.slow] if repeats else [])]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.method, self.option, self.kind

    @property
    def row(self) -> Kind:
        return KINDS[self.kind]

    @property
    def way(self) -> Option:
        return OPTIONS[self.method][self.option]

    @property
    def merges(self) -> bool:
        return self.key not in UNMERGEABLE

    @property
    def packed(self) -> bool:
        return self.storage != "plain"

    def merged_close(self, model: inlay.PeftModel, x: Tensor, out: Tensor, expected: Tensor) -> None:
        """``out`` of the merged model is what was expected, up to what packing was told to round."""
        if not self.packed:
            close(out, expected)
            return
        layer = model.base_model.model.m
        assert 0 < layer.rounding.mean < STORAGE[self.storage].rounds
        with layer.storage.reading(layer.base_layer) as W_OI:
            # The figure is relative to the largest weight that was wanted, and this is the one that stands.
            bound = layer.rounding.largest * float(W_OI.abs().max()) * 1.5
            bound_B = x.abs().sum(-1, keepdim=True) * bound
            if STORAGE[self.storage].rounds_input:  # once merged and once not, to a part in 127, half of it at most
                bound_B = bound_B + 2 * x.abs().amax(-1, keepdim=True) / 254 * W_OI.abs().sum(1).max() * 1.5
        assert ((out - expected).abs() <= bound_B + 1e-5).all()

    def base(self) -> nn.Module:
        """The same model every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return self.row.net(STORAGE[self.storage].pack(self.row.layer())).eval()

    def inputs(self, batch: int = 3) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12)
            return self.row.inputs(batch)

    def config(self, **other: Any) -> AdapterConfig:
        return METHODS[self.method].config(**{**self.way.fields, **self.row.target, **other})  # type: ignore[arg-type]

    def fresh(self) -> inlay.PeftModel:
        """With the adapter "a", as it starts."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(15)
            model = inlay.get_peft_model(self.base(), self.config(), adapter_name="a")
        if self.spoil is not None:
            self.spoil(model)
        return model

    def adapted(self, names: Sequence[str] = ("a",)) -> inlay.PeftModel:
        """With adapters that do something; all after the first are configured otherwise."""
        model = self.fresh()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(16)
            for name in names[1:]:
                model.add_adapter(name, self.config(**self.way.other))
        disturb(model)
        return model


def cases(*, kinds: Sequence[str] = tuple(KINDS), options: Sequence[str] | None = None) -> list[Case]:
    """The cells that are possible."""
    return [
        Case(method, option, kind, storage)
        for method, ways in OPTIONS.items()
        for option in ways
        for kind in kinds
        for storage, packing in STORAGE.items()
        if packing.rows is None or KINDS[kind].row in packing.rows
        if (method, option, kind) not in UNSUPPORTED and (options is None or option in options)
    ]


# ---------------------------------------------------------------- helpers


def adapter_tensors(model: nn.Module, trained: bool = False) -> dict[str, nn.Parameter]:
    """Every adapter's parameters by live name, or those only that a method trains."""
    layers = [w for _, w in wrappers(model) if isinstance(w, Adapted)]
    places = {
        id(owner._parameters[at])
        for w in layers
        for name in w.methods
        for slot, owner, at in w.tensors(name)
        if slot.trainable or not trained
    }
    return {name: p for name, p in model.named_parameters() if id(p) in places}


def disturb(model: nn.Module) -> None:
    """Moves adapters off their starting values."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        for p in adapter_tensors(model).values():
            p.add_(torch.randn(p.shape) * 0.3)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a, b), (
        f"{int((a != b).sum())} of {a.numel()} differ, by at most {float((a - b).detach().abs().max())}"
    )


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key, t in a.items():
        assert t.dtype == b[key].dtype, key
        assert torch.equal(t, b[key]), key


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that every output takes part in differently."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
    (out.double() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close_all(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert sorted(a) == sorted(b)
    for name, t in a.items():
        torch.testing.assert_close(t, b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def differs(model: inlay.PeftModel, x: Tensor, base: Tensor) -> None:
    """A law about an adapter that does nothing says nothing."""
    assert float((model(x) - base).detach().abs().max()) > 1e-2, "the adapter does nothing"


# ---------------------------------------------------------------- the laws


def fresh_is_identity(case: Case) -> None:
    x, base = case.inputs(), case.base()
    if case.way.identity:
        close(case.fresh()(x), base(x))
    else:
        differs(case.fresh(), x, base(x))


def merged_equals_forward(case: Case) -> None:
    x, model = case.inputs(), case.adapted()
    differs(model, x, case.base()(x))
    expected = model(x)
    model.merge_adapter()
    merged = model(x)
    case.merged_close(model, x, merged, expected)
    plain = model.merge_and_unload()
    assert not list(wrappers(plain))
    assert type(plain) is case.row.net
    same_bits(plain(x), merged)
    again = case.adapted().merge_and_unload()
    close(again(x), merged)


def safe_merge_equals_merge(case: Case) -> None:
    x, model = case.inputs(), case.adapted()
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    case.merged_close(model, x, model(x), expected)


def merging_is_refused(case: Case) -> None:
    model = case.adapted()
    before = bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UNMERGEABLE[case.key][0]):
            merge()
    same_state(bits(model), before)
    assert list(wrappers(model))


def unmerge_restores_the_bits(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = case.adapted(("a", "b")).to(dtype)
        before = bits(model)
        for _ in range(3):
            model.merge_adapter(["a"])
            model.merge_adapter(["b"])
            assert any(not torch.equal(t, before[k]) for k, t in bits(model).items())
            model.unmerge_adapter()
            same_state(bits(model), before)


def saved_and_loaded_is_the_same(case: Case) -> None:
    x, model = case.inputs(), case.adapted()
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
            model.save_pretrained(folder, selected_adapters=["a"])
        again = inlay.PeftModel.from_pretrained(case.base(), f"{folder}/a", adapter_name="a")
    assert again.load_report.ok
    assert not again.load_report.notes
    config = model.peft_config["a"]
    if case.way.converts:
        close(again(x), model(x))
        config = config.as_saved()
        assert config != model.peft_config["a"]
    else:
        same_state(bits(again), bits(model))
        with torch.no_grad():  # with gradients to keep, the same sum is rounded in another order
            same_bits(again(x), model(x))
    ignored = {"inference_mode": True, "auto_mapping": None}
    assert {**again.peft_config["a"].to_dict(), **ignored} == {**config.to_dict(), **ignored}
    assert not any(p.requires_grad for p in again.parameters())


def only_adapters_get_gradients(case: Case) -> None:
    model = case.adapted(("a", "b")).train()
    expected = {n for n in adapter_tensors(model, trained=True) if ".a." in f"{n}."}
    assert expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    found = gradients(model, model(case.inputs()))
    assert set(found) == expected
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name


def disabled_equals_base(case: Case) -> None:
    x, model = case.inputs(), case.adapted()
    expected = case.base().requires_grad_(False)(x)  # attention takes another path where weights are trained
    differs(model, x, expected)
    with model.disable_adapter():
        same_bits(model(x), expected)
    differs(model, x, expected)
    model.base_model.disable_adapter_layers()
    same_bits(model(x), expected)
    model.base_model.enable_adapter_layers()
    differs(model, x, expected)
    if case.merges:
        model.merge_adapter()
        with model.disable_adapter():
            close(model(x), expected)
            assert all(w.merged for _, w in wrappers(model))
    same_bits(model.unload()(x), expected)


_NAMES = ("a", "b", "__base__", "a", "b")


def _one_by_one(model: inlay.PeftModel, x: Tensor, names: Sequence[str]) -> Tensor:
    out = []
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else model.use_adapter(name):
            out.append(model(x[i : i + 1]))
    return torch.cat(out)


def rows_equal_one_by_one(case: Case) -> None:
    x, model = case.inputs(len(_NAMES)), case.adapted(("a", "b"))
    if not case.row.rows:
        with pytest.raises(RowsError, match=r"\bm\b"):
            model(x, adapter_names=list(_NAMES))
        return
    expected = _one_by_one(model, x, _NAMES)
    close(model(x, adapter_names=list(_NAMES)), expected)
    with torch.no_grad():  # stacked factors are remembered here
        for _ in range(2):
            close(model(x, adapter_names=list(_NAMES)), expected.detach())
        close(model(x, adapter_names=list(_NAMES[::-1])), _one_by_one(model, x, _NAMES[::-1]))
    close(model(x[:2], adapter_names=["__base__"] * 2), case.base()(x[:2]))
    if case.merges:
        model.merge_adapter(["a"])
        close(model(x, adapter_names=list(_NAMES)), expected)
        model.unmerge_adapter()
    close(model(x, adapter_names=list(_NAMES)), expected)


def rows_train_as_one_by_one(case: Case) -> None:
    if not case.row.rows or case.way.drops:  # other rows, other draws
        return
    x, model = case.inputs(len(_NAMES)), case.adapted(("a", "b")).train()
    model.set_requires_grad(["a", "b"])
    expected = gradients(model, _one_by_one(model, x, _NAMES))
    assert any(".b" in name for name in expected)
    assert any(".a" in name for name in expected)
    close_all(gradients(model, model(x, adapter_names=list(_NAMES))), expected)


def _together(model: inlay.PeftModel, x: Tensor, order: Sequence[str]) -> Tensor:
    with model.use_adapter(order):
        h: Tensor = model(x)
    return h


def several_act_together(case: Case) -> None:
    """Additive adapters: the sum of what each does to the frozen layer, in any order. All: merged as unmerged."""
    x, model = case.inputs(), case.adapted(("a", "b"))
    base, forth, back = case.base()(x), _together(model, x, ["a", "b"]), _together(model, x, ["b", "a"])
    for name in ("a", "b"):
        assert float((_together(model, x, [name]) - forth).detach().abs().max()) > 1e-3
    if case.way.additive:
        close(back, forth)
    if case.way.additive and case.row.row != "MultiheadAttention":  # which is not linear in its weight
        close(forth, base + sum(_together(model, x, [name]) - base for name in ("a", "b")))
    for order, expected in ((["a", "b"], forth), (["b", "a"], back)) if case.merges else ():
        model.set_adapter(order)
        close(model(x), expected)
        model.merge_adapter()
        case.merged_close(model, x, model(x), expected)
        with model.use_adapter("b"):
            one = model(x)
        model.unmerge_adapter()
        with model.use_adapter("b"):
            close(one, model(x))


def compiled_equals_eager(case: Case, backend: str = "aot_eager") -> None:
    torch._dynamo.reset()
    x, model = case.inputs(), case.adapted()
    if not case.way.drops:
        model.train()
    out = model(x)
    expected = gradients(model, out)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    again = compiled(x)
    close(again, out)
    close_all(gradients(model, again), expected)


def recomputed_equals_stored(case: Case) -> None:
    x, model = case.inputs(), case.adapted(("a", "b")).train()
    model.set_requires_grad(["a", "b"])
    one = torch.zeros((), requires_grad=True)

    def run(x: Tensor, one: Tensor) -> Tensor:
        h: Tensor = model(x)
        return h + one

    torch.manual_seed(14)
    with model.use_adapter("b"):
        expected = gradients(model, run(x, one))
    assert expected
    assert all(".b" in name for name in expected)
    for reentrant in (True, False):
        torch.manual_seed(14)
        with model.use_adapter("b"):
            out = checkpoint(model.bind(run), x, one, use_reentrant=reentrant)
        close_all(gradients(model, out), expected)


def copies_are_equal_and_apart(case: Case) -> None:
    x, model = case.inputs(), case.adapted(("a", "b"))
    expected, before = model(x), bits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same_state(bits(other), before)
        same_bits(other(x), expected)
        with other.use_adapter("b"), model.use_adapter("a"):
            same_bits(model(x), expected)
            differs(other, x, expected)
        other.set_adapter("b")
        other.add_adapter("c", case.config())
        other.delete_adapter("a")
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0 if p.is_floating_point() else 1)
        same_bits(model(x), expected)
        same_state(bits(model), before)
    if case.merges:
        model.merge_adapter()
        merged = copy.deepcopy(model)
        model.unmerge_adapter()
        same_bits(merged(x), copy.deepcopy(merged)(x))
        merged.unmerge_adapter()
        same_state(bits(merged), before)


def casting_keeps_the_function(case: Case) -> None:
    x, model = case.inputs(), case.adapted()
    expected = model(x)
    if not case.packed:  # which cannot compute in 64 bits
        wide = copy.deepcopy(model).double()
        assert {p.dtype for p in wide.parameters()} == {torch.float64}
        close(wide(x.double() if x.is_floating_point() else x).float(), expected)
    if case.merges:
        model.merge_adapter()
        model.double().unmerge_adapter()
        same_state(bits(model.float()), bits(case.adapted()))
    narrow = case.adapted().to(torch.bfloat16)
    out = narrow(x.bfloat16() if x.is_floating_point() else x)
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, 0.1)


def tensors_may_be_replaced(case: Case) -> None:
    """functional_call, load_state_dict(assign=True) and plain assignment: no stale tensor is held anywhere."""
    x, model, wanted = case.inputs(), case.adapted(), case.adapted()
    model(x)
    with torch.no_grad():
        for p in adapter_tensors(wanted).values():
            p.mul_(1.5)
    expected = wanted(x)
    assert float((model(x) - expected).detach().abs().max()) > 1e-3
    close(torch.func.functional_call(model, dict(wanted.named_parameters()), (x,)), expected)
    detached = {n: p.detach() for n, p in wanted.named_parameters()}  # as torch.func's own examples have them
    close(torch.func.functional_call(model, detached, (x,)), expected)
    assert float((model(x) - expected).detach().abs().max()) > 1e-3
    assigned = case.adapted()
    assigned(x)
    assigned.load_state_dict(bits(wanted), assign=True)
    same_bits(assigned(x), expected)
    values = adapter_tensors(wanted)
    new = {id(p): nn.Parameter(values[n].detach(), p.requires_grad) for n, p in adapter_tensors(model).items()}
    for module in list(model.modules()):
        for name, p in list(module._parameters.items()):
            if id(p) in new:
                setattr(module, name, new[id(p)])
    same_bits(model(x), expected)


def base_may_change(case: Case) -> None:
    """Nothing derived from the frozen weight or from a scale outlives a change of it."""
    x, model, other = case.inputs(), case.adapted(), case.adapted()
    with torch.no_grad():
        model(x)
        for each in (model, other):
            layer = each.base_model.model.m
            module, name = layer.kind.keeper(layer.get_base_layer())
            module.get_parameter(name).mul_(0.5)
        close(model(x), other(x))
        other = case.adapted()
        other.load_state_dict(bits(model))
        for each in (model, other):
            for _, wrapper in wrappers(each):
                if all("scaling" in method.numbers for method in wrapper.methods.values()):
                    wrapper.scale_layer(3.0)
        close(model(x), other(x))


def gradients_are_derivatives(case: Case) -> None:
    model = case.adapted().double()
    if not case.way.drops:
        model.train()
    x = case.inputs(2)
    if not x.is_floating_point():
        x = x.clamp(min=1)  # padding has no gradient, by definition
    named = {n: p for n, p in adapter_tensors(model).items() if not any(f".{s}." in n for s in case.way.constant)}
    inputs = [p.detach().clone().requires_grad_() for p in named.values()]
    if x.is_floating_point():
        inputs.append(x.double().requires_grad_())

    def run(*tensors: Tensor) -> Tensor:
        h: Tensor = torch.func.functional_call(
            model, dict(zip(named, tensors, strict=False)), (tensors[-1] if x.is_floating_point() else x,)
        )
        return h

    if inputs:
        assert torch.autograd.gradcheck(run, inputs, raise_exception=False, check_batched_grad=False)


def autocast_is_close(case: Case) -> None:
    x, model = case.inputs(), case.adapted()
    if not case.way.drops:
        model.train()
    out = model(x)
    expected = gradients(model, out)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        narrow = model(x)
        base = case.base().train(model.training)(x)
    assert narrow.dtype == base.dtype
    close(narrow.float(), out, 0.1)
    found = gradients(model, narrow)
    assert sorted(found) == sorted(expected)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        difference = (grad - expected[name]).norm() / expected[name].norm()
        assert difference < case.way.narrow, f"{name}: off by {float(difference):.3f}"


Law = Callable[[Case], None]

#: law -> why it says nothing of packed weights
OF_PLAIN: dict[Callable[[Case], None], str] = {
    gradients_are_derivatives: "they compute in 32 bits or fewer",
    base_may_change: "nobody computes with packed bytes",
    tensors_may_be_replaced: "packed layers take no state dict that a model of theirs gives",
}

#: Laws about merging hold where merging does; the others everywhere.
MERGE_LAWS: tuple[Law, ...] = (merged_equals_forward, safe_merge_equals_merge, unmerge_restores_the_bits)
LAWS: tuple[Law, ...] = (
    fresh_is_identity,
    saved_and_loaded_is_the_same,
    only_adapters_get_gradients,
    disabled_equals_base,
    rows_equal_one_by_one,
    rows_train_as_one_by_one,
    several_act_together,
    recomputed_equals_stored,
    copies_are_equal_and_apart,
    casting_keeps_the_function,
    tensors_may_be_replaced,
    base_may_change,
    gradients_are_derivatives,
    autocast_is_close,
)


def cells(laws: Iterable[Law], cases: Iterable[Case]) -> list[Any]:
    """Every law on every case, as parameters ``law, case`` of a test."""
    return [
        pytest.param(law, case, marks=case.marks, id=f"{case.id}-{law.__name__}")
        for law in laws
        for case in cases
        if not (case.packed and law in OF_PLAIN)
    ]
