"""The verbs of a handle as functions, for models that someone else owns.

What `inject_adapter_in_model` has put into a model is listed in no handle: these act on the wrappers that stand in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.adapted import Adapted, merged_already
from inlay.config import AdapterConfig
from inlay.errors import ConfigError, FieldTypeError, LoadError, NoMatchingPeftModuleError, PeftWarning
from inlay.inject import NARROW, apply, unmerge_first
from inlay.match import SHORTHAND, names_module, shortest
from inlay.model import inject_adapter_in_model as inject_adapter_in_model
from inlay.model import train_again
from inlay.patterns import KeyTable
from inlay.state import get_peft_model_state_dict as get_peft_model_state_dict
from inlay.state import root_of
from inlay.state import set_peft_model_state_dict as set_peft_model_state_dict
from inlay.storage.placement import held, replace
from inlay.trained import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TiedTokensLayer,
    TrainableTokensLayer,
    TrainableTokensWrapper,
)
from inlay.tuner import Tuner
from inlay.walk import adapted_layers, own_modules, wrappers
from inlay.works import Prepared, prepare, prepare_saved


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: type = Adapted
) -> None:
    """Makes adapters the active ones of every layer: trains these, freezes the others, unmerges first.

    Args:
        model (`nn.Module`): A model with adapters inside.
        adapter_name (`str` or `list[str]`): The adapters; a layer that lacks one does without it.
        inference_mode (`bool`, *optional*, defaults to `False`): Leave them frozen.
        layer_cls (`type`, *optional*): Only on layers of this class.

    Example:
        >>> import torch, inlay
        >>> from inlay import functional
        >>> model = inlay.inject_adapter_in_model(
        ...     inlay.LoraConfig(target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(4, 3)), "a"
        ... )
        >>> functional.set_adapter(model, [])
        >>> model[0].active_adapters
        []
    """
    unmerge_first(model, stacklevel=2)
    for _, wrapper in wrappers(model):
        if not isinstance(wrapper, Adapted) or isinstance(wrapper, layer_cls):
            wrapper.set_adapter(adapter_name, inference_mode=inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type = Adapted
) -> list[str] | None:
    """Removes an adapter from every layer; the layers' wrappers stay.

    Args:
        model (`nn.Module`): A model with adapters inside; its ``peft_config`` is left to its owner.
        adapter_name (`str`): The adapter; one that is nowhere is passed over.
        prefix (`str`, *optional*): Accepted for PEFT's sake: a layer knows the tensors of its adapters.
        layer_cls (`type`, *optional*): Only on layers of this class.

    Returns:
        `list[str]` or None: The adapters that are active in the first layer afterwards; None without a layer.
    """
    active = None
    for _, wrapper in list(wrappers(model)):
        if not isinstance(wrapper, Adapted):
            wrapper.delete_adapter(adapter_name, active)
        elif isinstance(wrapper, layer_cls):
            wrapper.delete_adapter(adapter_name)
            active = wrapper.active_adapters if active is None else active
    return active


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Trains or freezes adapters, active or not.

    Args:
        model (`nn.Module`): A model with adapters inside.
        adapter_names (`str` or `Sequence[str]`): The adapters.
        requires_grad (`bool`, *optional*, defaults to `True`): Which of both.
    """
    for _, wrapper in wrappers(model):
        wrapper.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turns an adapter's 16-bit and 8-bit floats into 32-bit ones, as `get_peft_model` does by itself.

    Args:
        model (`nn.Module`): A model with adapters inside.
        adapter_name (`str`): The adapter.
        autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): Do it; else nothing.
    """
    if autocast_adapter_dtype:
        for _, layer in adapted_layers(model, adapter_name):
            for _, owner, attribute in layer.tensors(adapter_name):
                tensor = owner.get_parameter(attribute)
                if tensor.dtype in NARROW:
                    tensor.data = tensor.data.to(torch.float32)


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without its adapters, under the names that it had before them.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside.

    Example:
        >>> import torch, inlay
        >>> from inlay import functional
        >>> model = inlay.get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 3)), inlay.LoraConfig(target_modules=["0"])
        ... )
        >>> list(functional.get_base_model_state_dict(model))
        ['0.weight', '0.bias']
    """
    out = {}
    for name, (tensor, owner, attribute) in _base_places(root_of(model)[0]).items():
        kept = held(owner, attribute) if tensor.is_meta else None
        out[name] = (tensor if kept is None else kept).detach()
    return out


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Loads what `get_base_model_state_dict` gave, or what a model without adapters did.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside.
        state_dict (`Mapping[str, Tensor]`): Values by the names without adapters.
        strict (`bool`, *optional*, defaults to `True`): Raise unless the names are just these.

    Returns:
        Torch's pair of missing and unexpected keys.

    Raises:
        LoadError: A name is missing or unknown and ``strict`` is set, or a shape is another one. Nothing is changed.
    """
    live = _base_places(root_of(model)[0])
    missing, unexpected = [n for n in live if n not in state_dict], [k for k in state_dict if k not in live]
    wrong = [n for n, (t, _, _) in live.items() if n in state_dict and t.shape != state_dict[n].shape]
    if wrong or (strict and (missing or unexpected)):
        raise LoadError(
            f"This is no state dict of the base model. Missing keys: {missing}; unexpected keys: {unexpected}; of "
            f"another shape: {wrong}."
        )
    with torch.no_grad():
        for name, (tensor, owner, attribute) in live.items():
            if name in state_dict and tensor.is_meta and held(owner, attribute) is not None:
                replace(owner, attribute, state_dict[name].to(tensor.dtype))
            elif name in state_dict:
                tensor.copy_(state_dict[name])
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def _base_places(module: nn.Module, prefix: str = "") -> dict[str, tuple[Tensor, nn.Module, str]]:
    """Name without adapters -> the tensor, the module that has it, and its name there."""
    while isinstance(module, Adapted | AuxiliaryTrainingWrapper):
        module = module.base_layer if isinstance(module, Adapted) else module.original_module
    tensors: dict[str, Any] = {}
    module._save_to_state_dict(tensors, prefix, True)
    places = {name: (t, module, name.removeprefix(prefix)) for name, t in tensors.items()}
    for name, child in module._modules.items():
        if child is not None:
            places |= _base_places(child, f"{prefix}{name}.")
    return places


def check_target_module_exists(config: AdapterConfig, key: str) -> bool:
    """Whether a config's targets name the module ``key``; `inlay.explain` says it for a whole model, with reasons.

    Args:
        config (`AdapterConfig`): Its ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and
            ``layers_pattern`` count.
        key (`str`): A module's dotted name.
    """
    if not config.target_modules:
        return False
    fields = config.exclude_modules, config.layers_to_transform, config.layers_pattern
    return names_module(key, config.target_modules, *fields)


def inspect_matched_modules(tuner: Tuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """The modules that an adapter stands in, and the rest: ``{"matched": [...], "unmatched": [...]}``.

    Args:
        tuner (`Tuner`): ``handle.base_model``.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.

    Raises:
        UnknownAdapterError: There is no adapter of this name.
    """
    tuner.check_known([adapter_name])
    matched = [name for name, layer in tuner.layers() if adapter_name in layer.methods]
    rest = [name for name, _ in own_modules(tuner.model) if name and name not in set(matched)]
    return {"matched": matched, "unmatched": rest}


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first of several patterns that names a module, as in ``rank_pattern``; the name itself where none does.

    Args:
        pattern_keys (`Sequence[str]`): Names' ends, or regular expressions for them.
        key_to_match (`str`): A module's dotted name.

    Raises:
        PatternError: A pattern is invalid, or takes too long to match.

    Example:
        >>> get_pattern_key(["q_proj", "layers.0.*"], "model.layers.0.mlp")
        'layers.0.*'
    """
    found = KeyTable(dict.fromkeys(pattern_keys)).find(key_to_match)
    return found[0] if found else key_to_match


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """`set_requires_grad` with ``requires_grad=False``."""
    set_requires_grad(model, adapter_name, False)


def spell_out_all_linear(peft_config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """Names the layers that ``target_modules="all-linear"`` stands for in a model; other targets stay as they are.

    Args:
        peft_config (`AdapterConfig`): The config; it is changed in place, and returned.
        model (`nn.Module`): The model, which is only read.
    """
    targets = peft_config.target_modules
    if isinstance(targets, str) and targets.lower() == SHORTHAND:
        peft_config.target_modules = {target.name for target in prepare(model, peft_config).plan.targets}
    return peft_config


def find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """The shortest suffixes that select some names and none of some others.

    Args:
        target_modules (`Collection[str]`): Names of modules to be adapted.
        other_module_names (`Collection[str]`): Those of all others.

    Raises:
        ConfigError: There are no targets, one is empty, or one is among the others.

    Example:
        >>> find_minimal_target_modules(["0.q", "1.q", "1.k"], ["0.k", "1"]) == {"q", "1.k"}
        True
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError(f"target_modules should be a list of names, or a set, not empty; got {target_modules!r}.")
    if "" in target_modules:
        raise ConfigError("target_modules should not contain an empty string, which is the model itself.")
    if both := sorted(set(target_modules) & set(other_module_names)):
        raise ConfigError(f"target_modules and other_module_names contain common elements: {both}.")
    return set(shortest(target_modules, other_module_names))


def check_adapters_to_merge(module: Adapted, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Those of some adapters that are not merged into a layer yet, with a warning where one is.

    Args:
        module (`Adapted`): The layer.
        adapter_names (`Sequence[str]`, *optional*): Which; the active ones if not given.

    Raises:
        FieldTypeError: ``adapter_names`` is a `str`.
    """
    if isinstance(adapter_names, str):
        raise FieldTypeError(f"adapter_names should be a list of names, got {adapter_names!r}.")
    wanted, merged = module.active_adapters if adapter_names is None else adapter_names, module.merged_adapters
    if merged:
        warnings.warn(merged_already(wanted, merged), PeftWarning, stacklevel=2)
    return [name for name in wanted if name not in merged]


def set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Collection[str] | None,
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] = ModulesToSaveWrapper,
    activate_adapter: bool = True,
    token_indices: list[int] | None = None,
) -> list[nn.Module]:
    """Has an adapter train modules whole, or tokens of an embedding, as ``modules_to_save`` of a config does.

    Args:
        model (`nn.Module`): The model; it is changed in place.
        adapter_name (`str`): The adapter, which need not stand in any layer.
        module_names (`Collection[str]`): Names or dotted suffixes of modules.
        inference_mode (`bool`): Leave them frozen.
        strict_module_check (`bool`, *optional*, defaults to `False`): Raise where a name is no module's.
        wrapper_cls (`type`, *optional*): `TrainableTokensWrapper` to train tokens.
        activate_adapter (`bool`, *optional*, defaults to `True`): Have them run and be trained.
        token_indices (`list[int]`, *optional*): The tokens.

    Returns:
        `list[nn.Module]`: What stands in the modules' place.

    Raises:
        NoMatchingPeftModuleError: There is no such module, and ``strict_module_check`` is set.
        UnsupportedLayerError: One of them cannot be copied.
    """
    names = list(module_names or ())
    tokens = dict.fromkeys(names, token_indices or []) if issubclass(wrapper_cls, TrainableTokensWrapper) else None
    prepared = prepare_saved(model, () if tokens else names, tokens)
    found = [*prepared.saved, *(work.path for work in prepared.tokens)]
    if strict_module_check and (missing := [n for n in names if not any(is_valid_match(path, n) for path in found)]):
        raise NoMatchingPeftModuleError(f"Target modules {missing} not found in the base model.")
    return _put_beside(prepared, adapter_name, activate_adapter, not inference_mode)


def set_additional_trainable_modules(
    model: nn.Module, peft_config: AdapterConfig, model_config: Any, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Has an adapter train what its config names in ``modules_to_save`` and ``trainable_token_indices``.

    Args:
        model (`nn.Module`): The model; it is changed in place.
        peft_config (`AdapterConfig`): The config.
        model_config (`dict`): Accepted for PEFT's sake: the model is asked.
        adapter_name (`str`): The adapter.
        activate_adapter (`bool`, *optional*, defaults to `True`): Have them run and be trained.
    """
    prepared = prepare_saved(model, peft_config.modules_to_save or (), peft_config.trainable_token_indices)
    _put_beside(prepared, adapter_name, activate_adapter, not peft_config.inference_mode)


def _put_beside(prepared: Prepared, name: str, active: bool, trained: bool) -> list[nn.Module]:
    model, paths = prepared.survey.model, [*prepared.saved, *(work.path for work in prepared.tokens)]
    own = {p for path in paths for p in model.get_submodule(path).parameters()}
    others = [(p, True) for p in model.parameters() if p.requires_grad and p not in own]
    apply(prepared, name, activate=active, trainable=trained)
    train_again(model, others)  # the first adapter freezes a model; whoever calls this has done so, or not
    return [model.get_submodule(path) for path in paths]


def set_beside(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """`set_adapter` of what is trained beside the layers alone: whole modules, and tokens."""
    for _, wrapper in wrappers(model):
        if isinstance(wrapper, ModulesToSaveWrapper | TrainableTokensLayer | TiedTokensLayer):
            wrapper.set_adapter(adapter_name, inference_mode=inference_mode)


def is_valid_match(key: str, target_key: str) -> bool:
    """Whether a module's name is another one, or ends with it after a dot.

    Example:
        >>> is_valid_match("layers.0.fc", "fc"), is_valid_match("layers.0.fc", "c")
        (True, False)
    """
    return names_module(key, [target_key], None, None, None)


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, last part of the name) of the module ``key``.

    Args:
        model (`nn.Module`): The model.
        key (`str`): A dotted name in it.

    Raises:
        AttributeError: There is none of this name.
    """
    above, _, name = key.rpartition(".")
    parent = model.get_submodule(above)
    return parent, parent.get_submodule(name), name
