"""Which object of inlay's a name of PEFT's is."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import inlay
from peft import _classes, _pending, _tables
from peft._surface import LOOKED_UP, SURFACE

#: module of inlay's -> the names of PEFT's that it has, where they are not in ``inlay`` itself
ROOMS = {
    "adapted": "BaseTunerLayer",
    "auto": "check_import_allowlist get_default_import_allowlist",
    "config": "PeftConfigMixin",
    "functional": (
        "_find_minimal_target_modules _freeze_adapter _get_submodules _is_valid_match "
        "_maybe_include_all_linear_layers _set_adapter _set_trainable cast_adapter_dtype check_adapters_to_merge "
        "check_target_module_exists delete_adapter get_base_model_state_dict get_pattern_key inspect_matched_modules "
        "set_adapter set_additional_trainable_modules set_base_model_state_dict set_requires_grad"
    ),
    "helpers": (
        "DoraCaching _get_batch_size cast_mixed_precision_params check_if_peft_model dequantize_module_weight "
        "disable_input_dtype_casting id_tensor_storage rescale_adapter_scale transpose update_forward_signature "
        "update_generate_signature update_signature"
    ),
    "inits.loftq": "loftq_init",
    "integrations.conversion": (
        "FlattenDims PeftConcatenate PermuteDims _block_diag_3d _convert_peft_config_moe build_peft_weight_mapping "
        "convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers "
        "get_model_conversion_mapping"
    ),
    "integrations.empty": "init_empty_weights skip_init_on_device",
    "integrations.environment": "check_deepspeed_zero3_enabled infer_device",
    "integrations.fsdp": "fsdp_auto_wrap_policy",
    "invocation": "calculate_alora_offsets",
    "lookup": (
        "_get_input_embeddings_name _get_module_names_tied_with_embedding _get_no_split_modules "
        "find_parameter_name_by_module get_device_map get_layer_device_map get_quantization_config "
        "map_cache_to_layer_device_map"
    ),
    "methods._budget": "RankAllocator",
    "methods._lycoris": "LycorisConfig",
    "methods.adaption_prompt": "is_adaption_prompt_trainable",
    "methods.lokr": "factorization make_kron",
    "model": "BaseTuner",
    "prompts._abstract": "BasePromptEncoder PromptLearningConfig",
    "prompts._placed": "shift_tokens_right",
    "prompts.legacy": "bloom_model_postprocess_past_key_value starcoder_model_postprocess_past_key_value",
    "replicate": "clone_module replicate_layers",
    "storage": "QuantizationBackend resolve_quantization_backend",
    "storage.bnb": "Bnb4bitBackend Bnb8bitBackend dequantize_bnb_weight get_bnb_param_type",
    "storage.placement": "onload_layer",
    "trained": "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensLayer TrainableTokensWrapper",
}
HOMES = {name: room for room, names in ROOMS.items() for name in names.split()}
#: where inlay's own name is another one, and not the same without an underscore
OTHER_NAMES = {
    "BasePromptEncoder": "AbstractPrompt",
    "BaseTuner": "Tuner",
    "BaseTunerLayer": "Adapted",
    "Bnb4bitBackend": "Bnb4",
    "Bnb8bitBackend": "Bnb8",
    "PeftConfigMixin": "PeftConfig",
    "QuantizationBackend": "Storage",
    "RankAllocator": "RankBudget",
    "_convert_peft_config_moe": "convert_peft_config_for_transformers",
    "_maybe_include_all_linear_layers": "spell_out_all_linear",
    "_set_adapter": "set_beside",
    "factorization": "split",
    "resolve_quantization_backend": "packing_of",
}

#: (module that defines it, name) -> the object, one by whatever path it is imported
FOUND: dict[tuple[str, str], Any] = {}


def resolve(module: str, name: str) -> Any:
    """The object that stands for ``name`` of PEFT's ``module``."""
    key = home(module, name), name
    return FOUND[key] if key in FOUND else FOUND.setdefault(key, find(*key))


def home(module: str, name: str) -> str:
    """Where PEFT defines what ``module`` has: the deepest module that has it, of the same method if it is one's."""
    top = ".".join(module.split(".")[:3]) if module.startswith("peft.tuners.") else "peft"
    having = [m for m, names in SURFACE.items() if f"{m}.".startswith(f"{top}.") and name in names.split()]
    return max(having, key=lambda m: m.count("."), default=module)


def where(module: str, name: str) -> tuple[ModuleType, str] | None:
    """The module of inlay's that has the object for a name, and its name there; by the module that defines it."""
    place = LOOKED_UP.get(module, {}).get(name)
    if place is None and name in HOMES:
        place = f"{HOMES[name]}.{OTHER_NAMES.get(name, name.removeprefix('_'))}"
    if place is None:
        return None
    room, _, own = place.rpartition(".")
    return importlib.import_module(f"inlay.{room}"), own


def put(module: str, name: str, *value: Any) -> None:
    """Gives a name another object where inlay looks it up, or the one that it had, where ``module`` defines it."""
    own = resolve(module, name)
    if home(module, name) == module and (place := where(module, name)) is not None:
        setattr(*place, *value or (own,))


def find(module: str, name: str) -> Any:
    """The object for a name, by the module that defines it."""
    if (place := where(module, name)) is not None:
        return getattr(*place)
    if name in inlay.__all__:
        return getattr(inlay, name)
    if (value := _tables.find(name)) is not None:
        return value
    if (found := _classes.find(module, name)) is not None:
        found.__module__ = module  # as pickle and help look for it
        return found
    return _pending.make(module, name)
