"""Adapters' files and configs on models whose parameters transformers renames, fuses or splits while it loads them.

transformers' own ``load_adapter`` writes an adapter's tensors with the machinery that reads a checkpoint: it takes the
conversions of the model, and what these functions make of them for an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
)

from inlay import experts
from inlay.config import AdapterConfig
from inlay.errors import PlanError
from inlay.formats.peft import PREFIX, strip_prefix
from inlay.methods import METHODS
from inlay.walk import survey
from inlay.works import with_experts

Conversion: TypeAlias = WeightConverter | WeightRenaming


class FlattenDims(ConversionOps):  # type: ignore[misc]  # untyped
    """Makes one dimension of several.

    Args:
        dims (`int` or `tuple[int, ...]`): The first and the last of them; one alone means it and all behind.
    """

    def __init__(self, dims: int | tuple[int, ...]) -> None:
        self.dims = (dims,) if isinstance(dims, int) else dims

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: t.flatten(*self.dims) for key, t in input_dict.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dims={self.dims})"


class PermuteDims(ConversionOps):  # type: ignore[misc]  # untyped
    """Puts dimensions into another order.

    Args:
        dims (`tuple[int, ...]`): Which one comes first, second, ...
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = dims

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: t.permute(*self.dims) for key, t in input_dict.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dims={self.dims})"


def block_diag_3d(tensors: Sequence[Tensor]) -> Tensor:
    """Block-diagonal matrices, one for each expert: (E, sum of O, sum of r) of several (E, O, r).

    Raises:
        PlanError: There are fewer than two, or they are not of this form.
    """
    if len(tensors) < 2 or any(t.dim() != 3 or len(t) != len(tensors[0]) for t in tensors):
        raise PlanError(
            "What is put together block by block must be two or more tensors (experts, rows, rank) with as many "
            f"experts each, got {[tuple(t.shape) for t in tensors]}."
        )
    return torch.stack([torch.block_diag(*each) for each in zip(*tensors, strict=True)])  # type: ignore[no-untyped-call]


class PeftConcatenate(Concatenate):  # type: ignore[misc]  # untyped
    """LoRA's B of a fused weight from those of its halves, (E, O, r) each: block-diagonal, as (2O, 2r * E)."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        halves = [input_dict[key] for key in source_patterns if key in input_dict]
        blocks = block_diag_3d([t if t.dim() == 3 else t[None] for t in halves])
        return {full_layer_name: blocks.permute(1, 2, 0).flatten(1)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("A fused factor is not taken apart again.")


def build_peft_weight_mapping(
    weight_conversions: Sequence[Conversion] | None, adapter_name: str, peft_config: AdapterConfig | None = None
) -> list[Conversion]:
    """What transformers' loader is to do with an adapter's keys: the model's conversions, as they apply to it.

    Args:
        weight_conversions (`Sequence[WeightConverter | WeightRenaming]`, *optional*): The model's own.
        adapter_name (`str`): Live names have it behind the slot's.
        peft_config (`AdapterConfig`, *optional*): The adapter's; without it every method's slots are renamed.

    Returns:
        `list`: Renamings from a file's names to live ones, and converters for experts that are fused in the model;
        empty where the model has no conversions.

    Example:
        >>> [c.target_patterns[0] for c in build_peft_weight_mapping([WeightRenaming("gamma", "weight")], "a")][-1]
        'weight'
    """
    if isinstance(peft_config, AdapterConfig):
        peft_config.read_by_transformers = True
    if not weight_conversions:
        return []
    method = METHODS.get(getattr(getattr(peft_config, "peft_type", None), "value", ""))
    prefixes = sorted({row.prefix for row in METHODS.values()}) if method is None else [method.prefix]
    out: list[Conversion] = [WeightRenaming(f"{PREFIX}model.", "model."), WeightRenaming(PREFIX, "")]
    out += [WeightRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}") for prefix in prefixes]
    if getattr(peft_config, "use_dora", True):  # of this slot a file's name lacks the end of the live one
        out.append(WeightRenaming(rf"(lora_magnitude_vector\.{adapter_name})$", r"\1.weight"))
    for conversion in weight_conversions:
        if isinstance(conversion, WeightRenaming):
            out.append(conversion)
        elif conversion.target_patterns[0].endswith((experts.GATE_UP, experts.DOWN)):
            out += _of_factors(conversion, adapter_name, peft_config)
    return out


def _of_factors(base: WeightConverter, adapter_name: str, config: AdapterConfig | None) -> list[WeightConverter]:
    """The converters of LoRA's factors for a weight that is made of the experts' own."""
    path, _, parameter = base.target_patterns[0].rpartition(".")
    # Of two parameters of one module, the first one's wrapper is the inner one.
    nested = parameter == experts.GATE_UP and _has_down(base, config)
    target = f"{path}.base_layer" if nested else path
    merged = [op for op in base.operations if isinstance(op, MergeModulelist)]
    joined = [op for op in base.operations if isinstance(op, Concatenate)]
    operations: dict[str, list[ConversionOps]] = {"lora_A": [*merged, *joined, FlattenDims((0, 1))]}
    if parameter == experts.GATE_UP:
        operations["lora_B"] = [*merged, *(PeftConcatenate(op.dim) for op in joined)]
    else:
        operations["lora_B"] = [*merged, PermuteDims((2, 0, 1)), FlattenDims((0, 1)), Transpose(0, 1)]
    out = []
    for factor, steps in operations.items():
        sources = [f"{source.rpartition('.')[0]}.{factor}.*" for source in base._original_source_patterns]
        made = base.copy(sources, f"{target}.{factor}.{adapter_name}.weight", operations=steps)
        made.distributed_operation = base.distributed_operation
        made.quantization_operation = base.quantization_operation
        out.append(made)
    return out


def _has_down(base: WeightConverter, config: AdapterConfig | None) -> bool:
    """Whether the adapter has factors for the experts' second parameter too; they have as a rule."""
    if config is None:
        return True
    targets = config.target_modules
    if targets is None or isinstance(targets, str):
        return True
    ends = {target.rpartition(".")[2] for target in (*targets, *(config.target_parameters or ()))}
    gates = {source.split(".")[-2] for source in base._original_source_patterns}
    former = {line.down for line in experts.FORMER.values() if line.gate in gates}
    return bool(ends & {experts.DOWN, *former})


def convert_peft_config_for_transformers(
    peft_config: AdapterConfig, model: nn.Module, conversions: Sequence[Any] | None = None
) -> None:
    """Changes a config that names experts as they were before transformers 5; any other stays as it is.

    Args:
        peft_config (`AdapterConfig`): Changed in place: ``target_parameters`` take the place of targets that are no
            modules any more, and the rank of a fused one is doubled.
        model (`nn.Module`): The model that it is for.
        conversions (`Sequence`, *optional*): Accepted: what counts is how the model is made.

    Raises:
        PlanError: It names one half of what is fused.
    """
    experts.take_up(peft_config, with_experts(survey(model), peft_config))


def present_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Key -> what it is called since transformers moved or renamed modules of the model; itself as a rule.

    Args:
        model (`nn.Module`): A model of transformers'; any other has its keys as they are.
        keys (`Iterable[str]`): As files have them, without ``base_model.model.``.
    """
    known = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else ()
    renamings = [conversion for conversion in known if isinstance(conversion, WeightRenaming)]
    return {key: apply_renamings(key, renamings) for key in keys}


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """A file's tensors by the names and in the shapes that the model has in transformers 5.

    Args:
        model (`nn.Module`): A model of transformers', with or without adapters.
        peft_config (`AdapterConfig`): The adapter's; only read.
        adapter_state_dict (`Mapping[str, Tensor]`): As files have it.
        adapter_name (`str`, *optional*): Accepted: no name of a file has it.

    Returns:
        `dict[str, Tensor]`: As files have it, ``base_model.model.`` before every key.
    """
    stripped = strip_prefix(adapter_state_dict)
    names = present_names(model, stripped)
    tensors = {names[key]: t for key, t in stripped.items()}
    former = experts.FORMER.get(str(survey(model).model_type))
    if former is not None:
        tensors = experts.fused_tensors(tensors, former)
    return {f"{PREFIX}{key}": t for key, t in tensors.items()}
