"""LLaMA-Adapter: a learnt prompt that attention looks at beside its own input (https://arxiv.org/abs/2303.16199).

    h = attention(x) + W_o (g softmax(q (W_k P)^T / sqrt(K)) W_v P)

P is the prompt, q the attention's own queries with their positions, K the width of a head, all W are the frozen
projections. The gate g starts at zero, so a fresh adapter changes nothing. On GPT-2 there is no W_o: adapters in files
are trained that way.

Shapes: B batch, H heads of the queries, G of the keys, L tokens, P prompt, K width of a head, D width of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn

from inlay.config import RANKS, WHEN_SET, AdapterConfig, within
from inlay.errors import FieldTypeError, NotMergeableError
from inlay.layers import Attention, LayerKind
from inlay.methods._abstract import AbstractAdapter, Layer, Params, Slot, as_dtype

TARGETS: dict[str, list[str] | str] = {"llama": ["self_attn"], "mistral": ["self_attn"], "gpt2": ["attn"]}


@dataclass
class AdaptionPromptConfig(AdapterConfig):
    """Config of LLaMA-Adapter's adaption prompt.

    Args:
        target_modules (`str` or `list[str]`, *optional*): Names of attention modules; a `str` of other characters than
            a name's is a regex for the whole name. `None` is the architecture's default: Llama, Mistral, GPT-2.
        adapter_len (`int`): Tokens of the prompt.
        adapter_layers (`int`): How many attention modules have one: the last ones.

    The remaining fields are `inlay.config.AdapterConfig`'s.

    Raises:
        ConfigError: ``adapter_len`` or ``adapter_layers`` is below 1; when it is applied, if one is `None`.

    Example:
        >>> AdaptionPromptConfig(adapter_len=10, adapter_layers=30).is_adaption_prompt
        True
    """

    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata=WHEN_SET)
    modules_to_save: list[str] | set[str] | None = field(default=None, metadata=WHEN_SET)
    adapter_len: int | None = field(default=None, metadata=within(RANKS))
    adapter_layers: int | None = field(default=None, metadata=within(RANKS))

    method: ClassVar[str] = "ADAPTION_PROMPT"
    example: ClassVar[dict[str, Any]] = {"adapter_len": 10, "adapter_layers": 1}
    is_adaption_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str) and re.fullmatch(r"[\w.]+", self.target_modules):
            self.target_modules = {self.target_modules}
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if isinstance(names := values["target_modules"], set) and len(names) == 1:
            (values["target_modules"],) = names  # PEFT knows a single name only
        return values

    def topmost(self) -> int | None:
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                raise FieldTypeError(f"AdaptionPromptConfig.{name} must be an int when it is applied, got None.")
        return self.adapter_layers


def is_adaption_prompt_trainable(params: str) -> bool:
    """Whether a parameter's name is of an adaption prompt.

    Example:
        >>> is_adaption_prompt_trainable("layers.0.self_attn.adaption_gate.default")
        True
    """
    return any(part.startswith("adaption_") for part in params.split("."))


class AdaptionPromptAdapter(AbstractAdapter):
    """The adaption prompt on one attention; see the module's text for the mathematics."""

    def __init__(
        self, config: AdaptionPromptConfig, kind: LayerKind, base: nn.Module, values: Mapping[str, Any]
    ) -> None:
        width = kind.shape(base)[1]
        self.slots = {
            "prompt": Slot((1, cast(int, config.adapter_len), width), "adaption_prompt"),
            "gate": Slot((1,), "adaption_gate"),
        }

    def initialise(self, p: Params, layer: Layer) -> None:
        with torch.no_grad():
            p["prompt"].normal_()
            p["gate"].zero_()

    def out(self, p: Params, x: Tensor, h: Tensor, layer: Layer, fresh: bool = False) -> Tensor:
        q_BHLK, kind = as_dtype(x, h), cast(Attention, layer.kind)
        P_1PD = as_dtype(p["prompt"], h)
        k_1GPK, v_1GPK = (kind.project(layer.base_layer, layer.part, P_1PD, which) for which in (1, 2))
        shared = q_BHLK.shape[1] // k_1GPK.shape[1]
        k_1HPK, v_1HPK = (t.repeat_interleave(shared, 1) for t in (k_1GPK, v_1GPK))
        scores_BHLP = q_BHLK @ k_1HPK.transpose(-1, -2) / q_BHLK.shape[-1] ** 0.5
        weights_BHLP = as_dtype(p["gate"], h) * scores_BHLP.softmax(-1)
        h_BLD = (weights_BHLP @ v_1HPK).transpose(1, 2).flatten(2)
        return h + as_dtype(h_BLD if kind.packed(layer.base_layer) else layer.part("o_proj")(h_BLD), h)

    def weight(self, p: Params, W_OI: Tensor, b_O: Tensor | None) -> NoReturn:
        raise NotMergeableError("an adaption prompt adds to a layer's output what no weight of the layer would.")

    def check_mergeable(self, kind: LayerKind, base: nn.Module) -> None:
        raise NotMergeableError(
            "An adaption prompt is looked at anew for every input, so no weight does the same: leave it unmerged, or "
            "take it out with unload()."
        )
