"""From a config to the works on a model's layers, down to shapes: every complaint comes before anything is touched.

prepare(model, config) -> `Prepared`: which layer gets an adapter and of what shape, what is trained whole or by tokens
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from inlay import experts, match
from inlay.adapted import Adapted
from inlay.config import AdapterConfig, PeftType, TaskType
from inlay.errors import ConfigError, DuplicateAdapterError, PlanError, UnsupportedLayerError
from inlay.formats.peft import check_adapter_name
from inlay.layers import LayerKind, embeddings_of, kind_of
from inlay.leaves import Group
from inlay.methods import METHODS, Method
from inlay.methods._abstract import AbstractAdapter
from inlay.methods.trainable_tokens import TrainableTokensAdapter
from inlay.parametrized import ParameterKind
from inlay.storage import facts, placement, storage_of
from inlay.trained import ModulesToSaveWrapper, Tied, TrainableTokensWrapper, trainable_kind
from inlay.walk import Survey, chain, model_config, survey, unwrapped

# An adapter's name becomes an attribute of every slot, so it may not be one already.
FORBIDDEN_NAMES = frozenset(dir(Group())) | frozenset(dir(nn.ModuleDict())) | {"base_layer", "__base__"}
_BY_TOKEN = {"Linear", "Conv1D", "Embedding"}  # kinds whose input has a token in each place
Tokens = list[int] | dict[str, list[int]] | None


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside: it would walk the growing model again and again (three times the time)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            if not gc.get_freeze_count():
                # What was just made is here to stay: into the oldest generation with it, unvisited.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


@dataclass
class Work:
    """One layer that is to get an adapter."""

    path: str  # its name in the model once adapted, as keys have it
    parent: nn.Module
    attribute: str
    kind: LayerKind
    adapter: AbstractAdapter
    source: str | None = None  # the adapted layer that it is tied to, whose tensors it uses
    target: match.Target | None = None  # why, for reports
    nested: bool = False  # it stands inside another layer of the plan

    def kept_dtype(self) -> torch.dtype:
        """dtype of the frozen weight, as a float."""
        return facts(*self.kind.keeper(self.layer))[0]

    @property
    def layer(self) -> nn.Module:
        """The frozen layer, under whatever wrapper stands there now."""
        return unwrapped(self.base)

    @property
    def base(self) -> nn.Module:
        """The layer as it stands now."""
        module: nn.Module = getattr(self.parent, self.attribute)
        return module


class TokenWork(Work):
    """One embedding or tied head whose tokens are to be trained."""

    adapter: TrainableTokensAdapter


@dataclass
class Prepared:
    """What a config would put into a model, with every shape; nothing has been touched."""

    config: AdapterConfig
    survey: Survey
    plan: match.Plan
    works: list[Work]
    saved: dict[str, str | None]  # what is trained whole -> the one of them whose weight it follows
    tokens: list[TokenWork]
    replaces: bool = False  # an adapter of the same name is to go


def method_of(config: AdapterConfig) -> Method:
    """The row of `METHODS` for a config."""
    if not isinstance(config, AdapterConfig) or config.peft_type is None:
        raise ConfigError(f"{type(config).__name__} names no method: use a method's own config, such as LoraConfig.")
    return METHODS[PeftType(config.peft_type).value]


@collector_paused()
def prepare(
    model: nn.Module,
    config: AdapterConfig,
    only: Iterable[str] | None = None,
    adapter_name: str | None = None,
    replacing: bool = False,
) -> Prepared:
    """Plans ``config`` on ``model`` down to shapes.

    Args:
        model (`nn.Module`): The model, on the meta device or any other; it is only read.
        config (`AdapterConfig`): What to do.
        only (`Iterable[str]`, *optional*): Names of modules to adapt instead of the config's targets.
        adapter_name (`str`, *optional*): Checked to be possible and free.
        replacing (`bool`, *optional*, defaults to `False`): It need not be free: `apply` takes the other one out.

    Raises:
        PlanError: Nothing matches, a pattern or a layer is not possible.
        AdapterNameError: The name cannot be used, or is in use.
    """
    method = method_of(config)
    found = survey(model, _head(model, config))
    config = config if only is not None else with_experts(found, config)
    if adapter_name is not None:
        check_adapter_name(adapter_name, FORBIDDEN_NAMES)
        if adapter_name in found.adapters and not replacing:
            raise DuplicateAdapterError(
                f"Adapter {adapter_name!r} is already in the model: choose another name, or delete it first."
            )
    prepared = _prepared(found, config, _plan(found, config, method, only))
    prepared.replaces = adapter_name in found.adapters
    prepared.plan = replace(prepared.plan, warnings=(*prepared.plan.warnings, *_told_of_ties(prepared)))
    return prepared


def prepare_saved(model: nn.Module, names: Iterable[str], tokens: Tokens = None) -> Prepared:
    """Plans to train modules whole beside an adapter that stands in no layer.

    Args:
        model (`nn.Module`): The model; it is only read.
        names (`Iterable[str]`): As in ``modules_to_save``.
        tokens (`list[int]` or `dict[str, list[int]]`, *optional*): As in ``trainable_token_indices``.

    Raises:
        UnsupportedLayerError: One of them cannot be copied.
    """
    config = AdapterConfig(target_modules=[], modules_to_save=sorted(names), trainable_token_indices=tokens)
    found = survey(model)
    targeting = match.Targeting(
        target_modules=[], modules_to_save=config.modules_to_save, supported=frozenset(), optional=True
    )
    return _prepared(found, config, match.plan(found.facts, (), targeting))


def _prepared(found: Survey, config: AdapterConfig, plan: match.Plan) -> Prepared:
    prepared = Prepared(config, found, plan, [], dict.fromkeys(path for path, _ in plan.saved), [])
    for target in plan.targets:
        prepared.works += _works_for(found, config, target)
    for _, group in groupby(plan.parameters, lambda target: target.module):
        prepared.works += _parameter_works(found, config, list(group))
    if config.ensure_weight_tying:
        _follow_ties(prepared)
    _check_ties(prepared)
    for path in prepared.saved:
        module = found.modules[path]
        own = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        ModulesToSaveWrapper.check(own, path)
    prepared.tokens = _token_works(found, config)
    _check_apart(prepared)
    return prepared


def check_at_hand(prepared: Prepared) -> None:
    """Raises `PlanError` where transformers' loader would put tensors to where a layer is kept, and lose them."""
    found = prepared.survey
    paths = [*(work.path for work in prepared.works), *(work.path for work in prepared.tokens), *prepared.saved]
    layers = {path: unwrapped(found.modules[path]) for path in paths if path in found.modules}
    if "hf_device_map" not in found.model.__dict__:  # it asks where the first parameter is, whatever the layer
        layers |= dict(found.model.named_modules())
    away = [path for path, layer in layers.items() if placement.runs_on(layer) is not None]
    if away:
        raise PlanError(
            f"{away[0]!r} is offloaded, and transformers' load_adapter would write its adapter's tensors where it is "
            "kept and not where it runs. Load the adapter first and offload the model then, take "
            "PeftModel.from_pretrained, or add_adapter and set_peft_model_state_dict."
        )


def _follow_ties(prepared: Prepared) -> None:
    """Has layers that share a weight with an adapted or saved one follow it: of adapted ones, the first table."""
    found, config = prepared.survey, prepared.config
    for path in [*prepared.saved]:
        for other in found.tied_to(path):
            if prepared.saved[path] is None and prepared.saved.get(other) is None:
                prepared.saved[other] = path
    following: set[str] = set()
    for work in sorted(prepared.works, key=lambda work: not work.kind.indexed):
        if work.target is None or work.target.parameter or work.nested or work.path in following:
            continue
        others = found.tied_to(work.path)
        for other in others if any(map(found.is_table, (work.path, *others))) else ():
            following.add(other)
            layer = unwrapped(found.modules[other])
            kind = trainable_kind(layer, other)
            values = {**work.target.overrides, "tied": True}
            adapter = adapter_for(found, config, kind, layer, other, values, key=work.path)
            prepared.works = [own for own in prepared.works if own.path != other]
            prepared.works.append(Work(other, *found.parent(other), kind, adapter, work.path))


def _check_ties(prepared: Prepared) -> None:
    """Raises `UnsupportedLayerError` where one adapter of a layer would follow another layer's, and another not."""
    for work in prepared.works:
        there = prepared.survey.modules.get(work.path)
        if isinstance(there, Adapted) and isinstance(there, Tied) != (work.source is not None):
            raise UnsupportedLayerError(
                f"{work.path} has adapters {sorted(there.methods)} already, and ensure_weight_tying is not the same "
                "for them and the new one: the layer follows another one for all of its adapters, or for none."
            )


def _told_of_ties(prepared: Prepared) -> Iterator[str]:
    """What to warn of where a tie is broken that could be kept, or kept where there is none."""
    found, config = prepared.survey, prepared.config
    groups = (names for names in found.owners.values() if len(names) > 1 and any(map(found.is_table, names)))
    shared = {name for names in groups for name in names}
    paths = [*(work.path for work in prepared.works), *prepared.saved]
    tied = next((path for path in paths if path in shared), None)
    if config.ensure_weight_tying and not shared:
        yield "`ensure_weight_tying` is set, but no tied modules are in the model."
    elif config.ensure_weight_tying and not (tied or any(work.source for work in prepared.tokens)):
        yield "`ensure_weight_tying` is set, but no tied modules are in modules_to_save or target_modules."
    elif tied and not config.ensure_weight_tying and model_config(found.model).get("tie_word_embeddings"):
        yield (
            f"Model has `tie_word_embeddings=True`, and {tied!r} is adapted apart from what it is tied to. Set "
            "ensure_weight_tying=True to keep the tie."
        )


def _head(model: nn.Module, config: AdapterConfig) -> nn.Module | None:
    head = embeddings_of(model, "output")
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((m for k in ("classifier", "score") if (m := model._modules.get(k)) is not None), None)
    return None if head is None else unwrapped(head)


def with_experts(found: Survey, config: AdapterConfig) -> AdapterConfig:
    """The config with parameters as targets, where it names experts that are no modules of their own any more."""
    former = experts.FORMER.get(str(found.model_type)) if config.peft_type == PeftType.LORA else None
    if former is None:
        return config
    holders = [name for name, module in found.modules.items() if experts.GATE_UP in unwrapped(module)._parameters]
    return experts.fused_config(config, former, found.modules, holders)


def _plan(found: Survey, config: AdapterConfig, method: Method, only: Iterable[str] | None) -> match.Plan:
    targets: Any = config.target_modules
    if only is not None:
        targets = sorted(only)
    elif targets is None and not config.target_parameters:
        targets = _defaults(found, method)
    targeting = match.Targeting(
        target_modules=targets,
        exclude_modules=config.exclude_modules if only is None else None,
        layers_to_transform=config.layers_to_transform if only is None else None,
        layers_pattern=config.layers_pattern if only is None else None,
        modules_to_save=config.modules_to_save,
        target_parameters=config.target_parameters,
        patterns=config.patterns(),
        tables=config.patterned,
        supported=method.kinds,
        adapter_layers=config.topmost() if only is None else None,
        optional=config.trainable_token_indices is not None,
        method=PeftType(config.peft_type).value,
    )
    return match.plan(found.facts, found.parameters if config.target_parameters else (), targeting)


def layers_in(state_dict: Iterable[str], config: AdapterConfig) -> set[str]:
    """Names of the layers whose tensors a state dict has.

    Raises:
        ConfigError: The config names parameters, which its keys do not.
    """
    if config.target_parameters:
        raise ConfigError("state_dict cannot be given with target_parameters: its keys do not name parameters.")
    prefix = method_of(config).prefix
    return {key.split(f".{prefix}")[0] for key in state_dict if f".{prefix}" in key}


def told_by_config(prepared: Prepared) -> Iterator[str]:
    """What to warn of where other layers were asked for than the config names."""
    try:
        plan = _plan(prepared.survey, prepared.config, method_of(prepared.config), None)
    except PlanError:
        return
    asked, named = {t.name for t in prepared.plan.targets}, {t.name for t in plan.targets}
    for what, names in (("PEFT config", named - asked), ("state_dict", asked - named)):
        if names:
            yield (
                f"The config and the state_dict name different layers, and those of the state_dict are adapted. The "
                f"{what} contained these additional target modules: {sorted(names)}. "
            )


def _defaults(found: Survey, method: Method) -> Any:
    return match.default_targets(found.model_type, method.default_targets, found.facts, method.kinds)


def _works_for(found: Survey, config: AdapterConfig, target: match.Target) -> list[Work]:
    parent, attribute = found.parent(target.name)
    module = found.modules[target.name]
    if isinstance(module, TrainableTokensWrapper | ModulesToSaveWrapper):
        raise UnsupportedLayerError(
            f"{target.name} is trained whole or by tokens already (modules_to_save, trainable_token_indices): take it "
            "out of target_modules."
        )
    layer = unwrapped(module)
    kind = module.kind if isinstance(module, Adapted) else kind_of(layer)
    assert kind is not None, "the plan holds supported kinds only"
    keeper, parameter = kind.keeper(layer)
    storage = storage_of(keeper, parameter)
    why = kind.unadaptable(layer) or storage.unreadable(keeper, parameter)
    if why is not None:
        raise UnsupportedLayerError(f"{target.name} ({type(layer).__name__}) cannot be adapted: {why}.")
    if isinstance(kind, ParameterKind):
        raise UnsupportedLayerError(f"{target.name} is adapted through target_parameters already: it cannot be both.")
    adapter = adapter_for(found, config, kind, layer, target.name, target.overrides)
    if adapter.unpacked_only is not None and not storage.in_place:
        raise UnsupportedLayerError(f"{target.name} is packed already ({storage.name}): {adapter.unpacked_only}.")
    work = Work(target.name, parent, attribute, kind, adapter, target=target)
    if not isinstance(layer, nn.MultiheadAttention):
        return [work]
    inner_kind = kind_of(unwrapped(layer.out_proj))
    assert inner_kind is not None
    path = f"{target.name}.base_layer.out_proj"
    # PEFT adds the out-projection's delta twice, in forward and merge alike; adapters in files are trained that way.
    values = {**target.overrides, "gain": 2.0}
    inner = adapter_for(found, config, inner_kind, unwrapped(layer.out_proj), path, values)
    return [work, Work(path, layer, "out_proj", inner_kind, inner, target=target, nested=True)]


def adapter_for(
    found: Survey,
    config: AdapterConfig,
    kind: LayerKind,
    layer: nn.Module,
    path: str,
    values: Mapping[str, Any],
    key: str | None = None,
) -> AbstractAdapter:
    """The adapter of one layer; ``key`` is the layer's path in files, where it is not ``path``."""
    try:
        values = {**values, **config.layer_values(key or path, found.model_type)}
        made = method_of(config).on(config, kind, layer, values)
        made.activated = config.invocation is not None
        if made.activated and kind.name not in _BY_TOKEN:
            raise UnsupportedLayerError(f"an activated adapter acts on single tokens, which a {kind.name} does not.")
        return made
    except PlanError as error:
        raise type(error)(f"{path}: {error}") from error


def _parameter_works(found: Survey, config: AdapterConfig, targets: list[match.Target]) -> list[Work]:
    """Work on the parameters of one module: wrappers nest in the order of its parameters, the first inmost."""
    path = targets[0].module
    parent, attribute = found.parent(path)
    around = list(chain(found.modules[path]))
    standing = [w.kind for w in around if isinstance(w, Adapted)]
    if len(standing) < len(around) or any(not isinstance(k, ParameterKind) for k in standing):
        raise UnsupportedLayerError(f"{path} is adapted or trained in another way already: it cannot be both.")
    layer = unwrapped(found.modules[path])
    for target in targets:
        _check_bare(path, layer, target.parameter)
    wrapped = {k.weight_name for k in standing} | {t.parameter for t in targets}
    order = [name for name in layer._parameters if name in wrapped]
    works = []
    for target in sorted(targets, key=lambda t: order.index(t.parameter)):
        kind = next((k for k in standing if k.weight_name == target.parameter), ParameterKind(target.parameter))
        key_path = path + ".base_layer" * (len(order) - 1 - order.index(target.parameter))
        adapter = adapter_for(found, config, kind, layer, target.name, target.overrides, key_path)
        works.append(Work(key_path, parent, attribute, kind, adapter, target=target))
    return works


def _check_bare(path: str, layer: nn.Module, parameter: str) -> None:
    storage = storage_of(layer, parameter)
    why = storage.unreadable(layer, parameter) if storage.in_place else f"it is packed ({storage.name})"
    if why is not None:
        raise UnsupportedLayerError(
            f"target_parameters reached {path}.{parameter}: {why}. Where {path} is a linear layer, name it in "
            "target_modules instead."
        )


def _token_works(found: Survey, config: AdapterConfig) -> list[TokenWork]:
    wanted = config.trainable_token_indices
    if wanted is None:
        return []
    if not isinstance(wanted, dict):
        wanted = {_embedding_path(found): wanted}
    asked: dict[str, list[int]] = {}
    for suffix, tokens in wanted.items():
        paths = [f.name for f in found.facts if any(n == suffix or n.endswith(f".{suffix}") for n in f.names)]
        if not paths:
            raise PlanError(f"trainable_token_indices names {suffix!r}, which is no module of the model.")
        for path in paths:
            if path in (config.modules_to_save or ()):
                raise PlanError(
                    f"{path} is in modules_to_save and in trainable_token_indices: it can be in one of them."
                )
            asked[path] = tokens
    works: dict[str, TokenWork] = {}
    for path in found.modules:
        if path in asked and path not in works:
            works.update((work.path, work) for work in _token_work(found, config, path, asked))
    return list(works.values())


def _check_apart(prepared: Prepared) -> None:
    """Raises `UnsupportedLayerError` where a layer with trained tokens is adapted too, or follows another layer."""
    for tokens in prepared.tokens:
        there = prepared.survey.modules[tokens.path]
        if isinstance(there, Adapted | ModulesToSaveWrapper):
            raise UnsupportedLayerError(
                f"{tokens.path} is adapted or trained whole already: take it, and what it is tied to, out of "
                "trainable_token_indices."
            )
        follows = isinstance(there, TrainableTokensWrapper) and isinstance(there.token_adapter, Tied)
        if isinstance(there, TrainableTokensWrapper) and follows != (tokens.source is not None):
            raise UnsupportedLayerError(
                f"{tokens.path} has trained tokens already, and is tied to the table for only one of the adapters: "
                "name the same layers in trainable_token_indices for each."
            )
    adapted = {work.path for work in prepared.works}
    for path, source in prepared.saved.items():
        adapted |= set() if source is None else {path, source}
    both = [tokens.path for tokens in prepared.tokens if tokens.path in adapted]
    if both:
        raise UnsupportedLayerError(
            f"{both[0]} is adapted or trained whole, and has trained tokens, its own or those of a layer it is tied "
            "to: it can have one."
        )


def _embedding_path(found: Survey) -> str:
    embedding = embeddings_of(found.model)
    for name, module in found.modules.items():
        if module is embedding or unwrapped(module) is embedding:
            return name
    raise PlanError(
        "trainable_token_indices is a list, and the model does not say which its embedding is: use a dict."
    )


def _token_work(found: Survey, config: AdapterConfig, path: str, asked: dict[str, list[int]]) -> list[TokenWork]:
    """The work on one layer, and, where it is an embedding, on those tied to it that ask for no other tokens."""
    tokens = asked[path]

    def work(at: str, source: str | None = None) -> TokenWork:
        layer = unwrapped(found.modules[at])
        kind = trainable_kind(layer, at)
        adapter = TrainableTokensAdapter(config, kind, layer, {"tokens": tokens})
        return TokenWork(at, *found.parent(at), kind, adapter, source)

    works = [work(path)]
    for other in found.tied_to(path) if works[0].kind.indexed else ():
        alike = asked.get(other, tokens) == tokens
        if config.ensure_weight_tying and not alike:
            raise PlanError(
                f"ensure_weight_tying is set, and trainable_token_indices has other tokens for {path} than for "
                f"{other}, which are tied: give both the same, or name one of them."
            )
        if alike:
            works.append(work(other, path))
    return works


def with_targets(config: AdapterConfig, prepared: Prepared) -> None:
    """Spells the targets out in a config that named none or all linear layers, and shortens long lists, for files."""
    experts.take_up(config, prepared.config)
    spelt = config.target_modules
    if spelt is None:
        if prepared.plan.targets:
            defaults = _defaults(prepared.survey, method_of(config))
            config.target_modules = defaults if isinstance(defaults, str) else set(defaults)
    elif not isinstance(spelt, str) or spelt.lower() == "all-linear":
        paths = [t.name for t in prepared.plan.targets] if isinstance(spelt, str) else sorted(spelt)
        # The shortest suffixes are sought among first names: a module with several keeps what was written.
        alone = not prepared.survey.elsewhere
        config.target_modules = set(match.shrink(paths, [m.name for m in prepared.survey.facts]) if alone else paths)
    config.spell_out(prepared.survey.model_type)
