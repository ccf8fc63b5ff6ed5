"""The M axis: one row per kind of layer, so that a method never names a layer.

Every kind shows its weight as a matrix W_OI (out x in) and can run its own operation with another matrix. A low-rank
method then is ``mix(apply(x, down_RI), up_OR)`` on a linear layer, a convolution and an embedding alike.

Shapes: O out, I in (a convolution's I is channels x kernel), R rank, B batch, V vocabulary, D embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import UnsupportedLayerError

L = TypeVar("L", bound=nn.Module)
Resolve = Callable[[nn.Module], tuple[Tensor, Tensor | None]]
Part = Callable[[str], nn.Module]


class AbstractKind(ABC, Generic[L]):
    """How one kind of layer, of the class L, is seen by methods. Stateless: a row of `KINDS`."""

    name: ClassVar[str]
    # The class that layers of this kind have, or one above it.
    cls: type[nn.Module]
    # What PEFT calls its classes of this kind, where that is something else.
    printed: ClassVar[str] = ""
    row_dim: ClassVar[int] = 0
    # A plain matrix product on the last dimension: fused paths and stacked rows apply.
    matrix: ClassVar[bool] = False
    # The layer's result is not linear in the weight: adapters act on the weight, never beside the call.
    by_weight: ClassVar[bool] = False
    # The layer is made of others that have the weights, and its call is more than a tensor in and a tensor out.
    composite: ClassVar[bool] = False
    # Files of PEFT ask for dropout here, which it leaves out.
    ignores_dropout: ClassVar[bool] = False
    # Part of slot names ("lora_embedding_A") and whether tensors stand bare in their slot, as files have it.
    infix: ClassVar[str] = ""
    bare: ClassVar[bool] = False
    # The layer's weight has its inputs first.
    fan_in_fan_out: ClassVar[bool] = False
    # The layer reads indices: nothing can be done to its input.
    indexed: ClassVar[bool] = False
    weight_name: str = "weight"
    bias_name: str = "bias"

    def owns(self, layer: nn.Module) -> bool:
        """Whether this row describes ``layer``."""
        return isinstance(layer, self.cls)

    @abstractmethod
    def shape(self, layer: L) -> tuple[int, int]:
        """(O, I) of the matrix view."""

    def features(self, layer: L) -> tuple[int, int]:
        """(in, out) as users of the layer count them."""
        out, inner = self.shape(layer)
        return inner, out

    def apply(self, layer: L, x: Tensor, W_OI: Tensor) -> Tensor:
        """The layer's operation, without bias, with the matrix ``W_OI`` in place of its weight; O is free."""
        if not self.matrix:
            raise UnsupportedLayerError(f"{self.name} has no call that would take another weight.")
        return F.linear(x, W_OI)

    def apply_kron(self, layer: L, x: Tensor, W_AC: Tensor, right_RD: Tensor, left_BR: Tensor | None) -> Tensor:
        """`apply` with the matrix ``kron(W, left @ right)``, which is built only where there is no way around it."""
        if not self.matrix:
            return self.apply(layer, x, torch.kron(W_AC, right_RD if left_BR is None else left_BR @ right_RD))
        z = W_AC @ F.linear(x.reshape(*x.shape[:-1], W_AC.shape[1], right_RD.shape[1]), right_RD)
        return (z if left_BR is None else F.linear(z, left_BR)).flatten(-2)

    def looked_up(self, layer: L, x: Tensor, h: Tensor) -> Tensor:
        """What a table gives for the tokens ``x`` whose rows are ``h``; the padding's row learns nothing."""
        return h

    def mix(self, layer: L, h: Tensor, W_OR: Tensor) -> Tensor:
        """Mixes the output channels of ``h``."""
        return F.linear(h, W_OR)

    def spread(self, layer: L, down_RI: Tensor) -> Tensor:
        """A down factor for `apply`: where the layer is grouped, each group sees its own input through it."""
        return down_RI

    def to_matrix(self, layer: L, W: Tensor) -> Tensor:
        """The layer's weight as W_OI; a view where possible."""
        return W

    def from_matrix(self, layer: L, W_OI: Tensor, /) -> Tensor:
        """A matrix of the view's shape in the layer's own layout."""
        return W_OI

    def down_shape(self, layer: L, r: int) -> tuple[int, ...]:
        """Shape of a down factor as it stands in files."""
        return (r, self.shape(layer)[1])

    def up_shape(self, layer: L, r: int) -> tuple[int, ...]:
        """Shape of an up factor as it stands in files."""
        return (self.shape(layer)[0], r)

    def channels(self, v_O: Tensor) -> Tensor:
        """A vector over output channels, shaped to multiply the layer's output."""
        return v_O

    def channel_shape(self, layer: L) -> tuple[int, ...]:
        """Shape of a vector over output channels as it stands in files."""
        return (self.shape(layer)[0],)

    def groups(self, layer: L) -> int:
        """In how many groups the output channels see the input."""
        return 1

    def experts(self, layer: L) -> int:
        """How many matrices of one shape the weight stacks."""
        return 1

    def keeper(self, layer: L) -> tuple[nn.Module, str]:
        """The module and its parameter that tell dtype and device of the layer."""
        return layer, self.weight_name

    def unadaptable(self, layer: L) -> str | None:
        """Why this one layer of the kind cannot be adapted, or None."""
        known = layer._parameters.get(self.weight_name) is not None
        return None if known else "its weight is computed from others (weight norm or another parametrization)"

    def unmergeable(self, layer: L) -> str | None:
        """Why no adapter can be written into this layer's weight, or None."""
        return None

    def call(self, layer: L, W: Tensor, b: Tensor | None, resolve: Resolve, args: Any, kwargs: Any) -> Any:
        """Runs a layer that is adapted by weight; ``resolve`` gives the weights of modules inside it."""
        raise UnsupportedLayerError(f"{self.name} is adapted beside its call, not through its weight.")

    def around(self, layer: L, part: Part, args: Any, kwargs: Any, adapted: Callable[..., Tensor]) -> Any:
        """Runs a composite layer; ``adapted(call, x)`` is what adapters make of ``call(x)``.

        ``part`` gives a module inside the layer by name, without adapters of its own.
        """
        raise UnsupportedLayerError(f"{self.name} is called with a tensor and gives one.")


LayerKind = AbstractKind[Any]  # a row, whatever its class of layers


class _Linear(AbstractKind[nn.Linear]):
    name = "Linear"
    cls = nn.Linear
    matrix = True

    def shape(self, layer: nn.Linear) -> tuple[int, int]:
        return layer.out_features, layer.in_features


class _Conv1D(LayerKind):
    """GPT-2's linear layer, its weight stored in x out. Known by its class name: transformers stays unimported."""

    name = "Conv1D"
    printed = "Linear"
    matrix = True
    fan_in_fan_out = True

    def owns(self, layer: nn.Module) -> bool:
        return any(
            c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(layer).__mro__
        )

    def shape(self, layer: Any) -> tuple[int, int]:
        n_in, n_out = layer.weight.shape
        return n_out, n_in

    def to_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        return W.t()

    from_matrix = to_matrix


class _Conv(AbstractKind[nn.Conv2d]):
    def __init__(self, dims: int) -> None:
        self.dims = dims
        self.cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        self.name = self.cls.__name__  # type: ignore[misc]  # one row per number of dimensions

    def shape(self, layer: nn.Conv2d) -> tuple[int, int]:
        return layer.out_channels, layer.weight[0].numel()

    def features(self, layer: nn.Conv2d) -> tuple[int, int]:
        return layer.in_channels, layer.out_channels

    def groups(self, layer: nn.Conv2d) -> int:
        return layer.groups

    def apply(self, layer: nn.Conv2d, x: Tensor, W_OI: Tensor) -> Tensor:
        W = W_OI.reshape(W_OI.shape[0], -1, *layer.kernel_size)
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        # A factor may see all input channels though the base is grouped (that is how files have it).
        groups = x.shape[-self.dims - 1] // W.shape[1]
        return cast(Tensor, self.conv(x, W, None, layer.stride, padding, layer.dilation, groups))

    def apply_kron(
        self, layer: nn.Conv2d, x: Tensor, W_AC: Tensor, right_RD: Tensor, left_BR: Tensor | None
    ) -> Tensor:
        if self.groups(layer) > 1:
            return super().apply_kron(layer, x, W_AC, right_RD, left_BR)
        C = W_AC.shape[1]
        lead, (channels, *space) = x.shape[: -self.dims - 1], x.shape[-self.dims - 1 :]
        # Each of the C blocks of channels is an image of its own.
        h = self.apply(layer, x.reshape(-1, channels // C, *space), right_RD)
        z = (W_AC @ h.reshape(-1, C, prod(h.shape[1:]))).reshape(-1, *h.shape[1:])
        z = z if left_BR is None else self.mix(layer, z, left_BR)
        return z.reshape(*lead, W_AC.shape[0] * z.shape[1], *h.shape[2:])

    def spread(self, layer: nn.Conv2d, down_RI: Tensor) -> Tensor:
        groups = self.groups(layer)
        grouped = groups > 1 and down_RI.shape[1] == self.shape(layer)[1]  # else the factor sees all channels itself
        return down_RI.repeat(groups, 1) if grouped else down_RI

    def mix(self, layer: nn.Conv2d, h: Tensor, W_OR: Tensor) -> Tensor:
        W = W_OR.reshape(*W_OR.shape[:2], *(1,) * self.dims)
        return cast(Tensor, self.conv(h, W, groups=h.shape[-self.dims - 1] // W.shape[1]))

    def to_matrix(self, layer: nn.Conv2d, W: Tensor) -> Tensor:
        return W.flatten(1)

    def from_matrix(self, layer: nn.Conv2d, W_OI: Tensor) -> Tensor:
        return W_OI.reshape(W_OI.shape[0], -1, *layer.kernel_size)

    def down_shape(self, layer: nn.Conv2d, r: int) -> tuple[int, ...]:
        return (r, layer.in_channels, *layer.kernel_size)

    def up_shape(self, layer: nn.Conv2d, r: int) -> tuple[int, ...]:
        if r % layer.groups:
            raise UnsupportedLayerError(f"r={r} must be a multiple of the convolution's {layer.groups} groups.")
        return (layer.out_channels, r // layer.groups, *(1,) * self.dims)

    def channels(self, v_O: Tensor) -> Tensor:
        return v_O.reshape(-1, *(1,) * self.dims)

    def channel_shape(self, layer: nn.Conv2d) -> tuple[int, ...]:
        return (1, layer.out_channels, *(1,) * self.dims)


class _Embedding(AbstractKind[nn.Embedding]):
    """The matrix view is the transposed table W_DV: an index is a one-hot input."""

    name = "Embedding"
    cls = nn.Embedding
    infix = "embedding_"
    bare = True
    indexed = True

    def shape(self, layer: nn.Embedding) -> tuple[int, int]:
        return layer.embedding_dim, layer.num_embeddings

    def apply(self, layer: nn.Embedding, x: Tensor, W_OI: Tensor) -> Tensor:
        h = F.embedding(x, W_OI.t(), padding_idx=layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
        return self._scaled(layer, h)

    def apply_kron(
        self, layer: nn.Embedding, x: Tensor, W_AC: Tensor, right_RD: Tensor, left_BR: Tensor | None
    ) -> Tensor:
        if layer.scale_grad_by_freq:  # counts tokens, not the blocks that they are in
            return super().apply_kron(layer, x, W_AC, right_RD, left_BR)
        D = right_RD.shape[1]
        w1, w2 = F.embedding(x // D, W_AC.t()), F.embedding(x % D, right_RD.t())
        w2 = w2 if left_BR is None else F.linear(w2, left_BR)
        h = (w1[..., :, None] * w2[..., None, :]).flatten(-2)
        return self.looked_up(layer, x, h)

    def looked_up(self, layer: nn.Embedding, x: Tensor, h: Tensor) -> Tensor:
        if layer.padding_idx is not None:
            h = torch.where((x == layer.padding_idx)[..., None], h.detach(), h)
        return self._scaled(layer, h)

    def _scaled(self, layer: nn.Embedding, h: Tensor) -> Tensor:
        # Some embeddings (Gemma's) multiply their output; the factor belongs to the layer, not to the table.
        scale = getattr(layer, "embed_scale", None)
        return h if scale is None else h * (scale.to(h.dtype) if isinstance(scale, Tensor) else scale)

    def unadaptable(self, layer: nn.Embedding) -> str | None:
        if type(layer).forward is not nn.Embedding.forward and getattr(layer, "embed_scale", None) is None:
            return "its forward is its own, so what it looks up in the table is not known"
        return super().unadaptable(layer)

    def unmergeable(self, layer: nn.Embedding) -> str | None:
        limited = layer.max_norm is not None
        return "an embedding with max_norm rewrites its rows when it runs: leave it unmerged." if limited else None

    def to_matrix(self, layer: nn.Embedding, W: Tensor) -> Tensor:
        return W.t()

    from_matrix = to_matrix


class _MultiheadAttention(AbstractKind[nn.MultiheadAttention]):
    """torch's attention hands its weights to one fused call, so adapters act on the packed in-projection W_(3n)n."""

    name = "MultiheadAttention"
    cls = nn.MultiheadAttention
    by_weight = True
    ignores_dropout = True
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def unadaptable(self, layer: nn.MultiheadAttention) -> str | None:
        same = layer._qkv_same_embed_dim
        return None if same else "its query, key and value have different widths, so there is no packed projection"

    def shape(self, layer: nn.MultiheadAttention) -> tuple[int, int]:
        return 3 * layer.embed_dim, layer.embed_dim

    def call(
        self, layer: nn.MultiheadAttention, W: Tensor, b: Tensor | None, resolve: Resolve, args: Any, kwargs: Any
    ) -> Any:
        return _attention(layer, (W, b), resolve(layer.out_proj), *args, **kwargs)


class Attention(LayerKind):
    """An attention module of transformers, which is known by its class name: transformers stays unimported.

    What adapters read of a call are its queries by heads, B x H x L x K, with their positions; what they change is the
    first of its results, B x L x D.
    """

    name = "Attention"
    composite = True
    classes: ClassVar[frozenset[str]] = frozenset({"LlamaAttention", "MistralAttention", "GPT2Attention"})

    def owns(self, layer: nn.Module) -> bool:
        return any(
            c.__name__ in self.classes and c.__module__.startswith("transformers.models.") for c in type(layer).__mro__
        )

    def packed(self, layer: nn.Module) -> bool:
        """Whether one projection gives queries, keys and values, and positions are not told to the layer."""
        return "c_attn" in layer._modules

    def keeper(self, layer: nn.Module) -> tuple[nn.Module, str]:
        return innermost(layer.get_submodule("c_attn" if self.packed(layer) else "q_proj")), "weight"

    def unadaptable(self, layer: nn.Module) -> str | None:
        if "q_attn" in layer._modules:
            return "it attends to what an encoder gives, not to its own input"
        return None if kind_of(self.keeper(layer)[0]) else "its projections are no linear layers that are known"

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        projection = self.keeper(layer)[0]
        kind = kind_of(projection)
        assert kind is not None, "looked at in unadaptable"
        return kind.shape(projection)

    def project(self, layer: nn.Module, part: Part, x: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) of ``x``, by heads."""
        if self.packed(layer):
            h = part("c_attn")(x).chunk(3, -1)[which]
        else:
            h = part(("q_proj", "k_proj", "v_proj")[which])(x)
        heads: Tensor = h.unflatten(-1, (-1, cast(int, layer.head_dim))).transpose(1, 2)
        return heads

    def around(self, layer: nn.Module, part: Part, args: Any, kwargs: Any, adapted: Callable[..., Tensor]) -> Any:
        out = layer(*args, **kwargs)
        q = self.project(layer, part, args[0] if args else kwargs["hidden_states"], 0)
        if not self.packed(layer):
            cos, sin = (t.unsqueeze(1) for t in (args[1] if len(args) > 1 else kwargs["position_embeddings"]))
            a, b = q.chunk(2, -1)
            q = q * cos + torch.cat((-b, a), -1) * sin
        return adapted(lambda q: out[0], q), *out[1:]


def innermost(module: nn.Module) -> nn.Module:
    """The layer under whatever wrappers stand around it."""
    while (inner := module._modules.get("base_layer")) is not None:
        module = inner
    return module


KINDS: tuple[LayerKind, ...] = (
    _Linear(),
    _Embedding(),
    _Conv(2),
    _Conv1D(),
    _Conv(1),
    _Conv(3),
    _MultiheadAttention(),
    Attention(),
)


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The row of `KINDS` that describes ``layer``, or None.

    Example:
        >>> kind_of(nn.Linear(2, 3)).name
        'Linear'
    """
    for kind in KINDS:
        if kind.owns(layer):
            return kind
    return None


_OPTIONS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


def _attention(
    layer: nn.MultiheadAttention,
    inner: tuple[Tensor, Tensor | None],
    outer: tuple[Tensor, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *options: Any,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.MultiheadAttention`'s forward as a function of its projections' (W, b); ``layer`` is only read."""
    named |= zip(_OPTIONS[: len(options)], options, strict=True)
    turned = layer.batch_first and query.dim() == 3
    if turned:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    extra = (layer.bias_k, layer.bias_v, layer.add_zero_attn, layer.dropout)
    own: Any = (layer.embed_dim, layer.num_heads, *inner, *extra, *outer, layer.training)
    out, weights = F.multi_head_attention_forward(query, key, value, *own, **named)
    return (out.transpose(0, 1) if turned else out), weights


def embeddings_of(model: nn.Module, which: str = "input") -> nn.Module | None:
    """The module that a model's ``get_input_embeddings`` or ``get_output_embeddings`` gives, where it gives one."""
    get = getattr(model, f"get_{which}_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:  # transformers' way to say that it has none
        return None
    return found if isinstance(found, nn.Module) else None
