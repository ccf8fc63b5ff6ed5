"""Which object of inlay's a name of PEFT's is."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import inlay
from peft import _classes, _pending, _tables
from peft._surface import LOOKED_UP, SURFACE

#: name -> the module of inlay's that has it, where it is not in ``inlay`` itself
HOMES = {
    # layers and what stands beside them
    "AuxiliaryTrainingWrapper": "trained",
    "BaseTuner": "model",
    "BaseTunerLayer": "adapted",
    "ModulesToSaveWrapper": "trained",
    "TrainableTokensLayer": "trained",
    "TrainableTokensWrapper": "trained",
    "RankAllocator": "methods._budget",
    "factorization": "methods.lokr",
    "BasePromptEncoder": "prompts._abstract",
    # configs
    "LycorisConfig": "methods._lycoris",
    "PeftConfigMixin": "config",
    "PromptLearningConfig": "prompts._abstract",
    # functions on models that someone else owns
    "cast_adapter_dtype": "functional",
    "check_target_module_exists": "functional",
    "delete_adapter": "functional",
    "get_base_model_state_dict": "functional",
    "inspect_matched_modules": "functional",
    "set_adapter": "functional",
    "set_base_model_state_dict": "functional",
    "set_requires_grad": "functional",
    "check_adapters_to_merge": "functional",
    "set_additional_trainable_modules": "functional",
    "_is_valid_match": "functional",
    "_set_adapter": "functional",
    "_set_trainable": "functional",
    # what a model says of itself
    "find_parameter_name_by_module": "lookup",
    "get_device_map": "lookup",
    "get_layer_device_map": "lookup",
    "map_cache_to_layer_device_map": "lookup",
    "_get_input_embeddings_name": "lookup",
    "_get_module_names_tied_with_embedding": "lookup",
    "_get_no_split_modules": "lookup",
    # weights
    "clone_module": "replicate",
    "dequantize_bnb_weight": "storage.bnb",
    "dequantize_module_weight": "helpers",
    "get_bnb_param_type": "storage.bnb",
    "init_empty_weights": "integrations.empty",
    "loftq_init": "inits.loftq",
    "make_kron": "methods.lokr",
    "onload_layer": "storage.placement",
    "replicate_layers": "replicate",
    "Bnb4bitBackend": "storage.bnb",
    "Bnb8bitBackend": "storage.bnb",
    "QuantizationBackend": "storage",
    "resolve_quantization_backend": "storage",
    "skip_init_on_device": "integrations.empty",
    # helpers
    "check_deepspeed_zero3_enabled": "integrations.environment",
    "check_import_allowlist": "auto",
    "get_default_import_allowlist": "auto",
    "calculate_alora_offsets": "invocation",
    "get_quantization_config": "lookup",
    "is_adaption_prompt_trainable": "methods.adaption_prompt",
    "_get_batch_size": "helpers",
    "DoraCaching": "helpers",
    "check_if_peft_model": "helpers",
    "disable_input_dtype_casting": "helpers",
    "rescale_adapter_scale": "helpers",
    "update_forward_signature": "helpers",
    "update_generate_signature": "helpers",
    "update_signature": "helpers",
    "FlattenDims": "integrations.conversion",
    "PeftConcatenate": "integrations.conversion",
    "PermuteDims": "integrations.conversion",
    "_block_diag_3d": "integrations.conversion",
    "_convert_peft_config_moe": "integrations.conversion",
    "build_peft_weight_mapping": "integrations.conversion",
    "convert_peft_adapter_state_dict_for_transformers": "integrations.conversion",
    "convert_peft_config_for_transformers": "integrations.conversion",
    "get_model_conversion_mapping": "integrations.conversion",
    "fsdp_auto_wrap_policy": "integrations.fsdp",
    "cast_mixed_precision_params": "helpers",
    "id_tensor_storage": "helpers",
    "infer_device": "integrations.environment",
    "bloom_model_postprocess_past_key_value": "prompts.legacy",
    "starcoder_model_postprocess_past_key_value": "prompts.legacy",
    "shift_tokens_right": "prompts._placed",
    "transpose": "helpers",
    "_find_minimal_target_modules": "functional",
    "_freeze_adapter": "functional",
    "_get_submodules": "functional",
    "_maybe_include_all_linear_layers": "functional",
    "get_pattern_key": "functional",
}
#: where inlay's own name is another one
OTHER_NAMES = {
    "Bnb4bitBackend": "Bnb4",
    "Bnb8bitBackend": "Bnb8",
    "QuantizationBackend": "Storage",
    "RankAllocator": "RankBudget",
    "resolve_quantization_backend": "packing_of",
    "BasePromptEncoder": "AbstractPrompt",
    "BaseTuner": "Tuner",
    "BaseTunerLayer": "Adapted",
    "PeftConfigMixin": "PeftConfig",
    "_block_diag_3d": "block_diag_3d",
    "_convert_peft_config_moe": "convert_peft_config_for_transformers",
    "_find_minimal_target_modules": "find_minimal_target_modules",
    "_freeze_adapter": "freeze_adapter",
    "_get_batch_size": "get_batch_size",
    "_get_input_embeddings_name": "get_input_embeddings_name",
    "_get_module_names_tied_with_embedding": "get_module_names_tied_with_embedding",
    "_get_no_split_modules": "get_no_split_modules",
    "_get_submodules": "get_submodules",
    "_is_valid_match": "is_valid_match",
    "_maybe_include_all_linear_layers": "spell_out_all_linear",
    "_set_adapter": "set_beside",
    "_set_trainable": "set_trainable",
    "factorization": "split",
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
        place = f"{HOMES[name]}.{OTHER_NAMES.get(name, name)}"
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
