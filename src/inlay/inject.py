"""Applies a Plan to a model and undoes it: the only place that sets attributes on users' modules.

survey(model) -> what is there      prepare(model, config) -> what would be put where, with every shape
apply(prepared) -> wrappers in place, or the model as it was      remove(model) -> the model without them
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import nn

from inlay import experts, match
from inlay.adapted import Adapted
from inlay.config import AdapterConfig, PeftType, TaskType
from inlay.errors import ConfigError, DuplicateAdapterError, PeftWarning, PlanError, UnsupportedLayerError
from inlay.formats.peft import check_adapter_name
from inlay.layers import LayerKind, embeddings_of, kind_of
from inlay.leaves import Group
from inlay.methods import METHODS, Method
from inlay.methods._abstract import AbstractAdapter
from inlay.methods.trainable_tokens import TrainableTokensAdapter
from inlay.parametrized import ParameterKind
from inlay.prompts import AnyConfig
from inlay.routing import Router
from inlay.storage import facts, placement, storage_of
from inlay.trained import (
    ModulesToSaveWrapper,
    Tied,
    TiedTokensLayer,
    TrainableTokensLayer,
    TrainableTokensWrapper,
    trainable_kind,
)

# An adapter's name becomes an attribute of every slot, so it may not be one already.
FORBIDDEN_NAMES = frozenset(dir(Group())) | frozenset(dir(nn.ModuleDict())) | {"base_layer", "__base__"}
_WRAPPERS = (Adapted, ModulesToSaveWrapper, TrainableTokensWrapper)
_FUSING = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
_BY_TOKEN = {"Linear", "Conv1D", "Embedding"}  # kinds whose input has a token in each place
Tokens = list[int] | dict[str, list[int]] | None
NARROW = {torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}


@dataclass
class Survey:
    """What a model holds, from one walk."""

    model: nn.Module
    modules: dict[str, nn.Module] = field(default_factory=dict)
    facts: list[match.Module] = field(default_factory=list)
    owners: dict[int, list[str]] = field(default_factory=dict)
    router: Router | None = None
    adapters: set[str] = field(default_factory=set)
    # A module that stands at several places is seen once; these are the others.
    elsewhere: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict)

    @cached_property
    def model_type(self) -> str | None:
        """The model's architecture, where it names one."""
        return model_config(self.model).get("model_type")

    @cached_property
    def parameters(self) -> list[tuple[str, str]]:
        """(module, parameter) of all parameters, in the order of the model."""
        layers = {"": self.model, **self.modules}
        return [(n, key) for n, m in layers.items() for key, W in _unwrapped(m)._parameters.items() if W is not None]

    def parent(self, path: str) -> tuple[nn.Module, str]:
        """The module that holds ``path`` and the attribute it stands at."""
        above, _, attribute = path.rpartition(".")
        return (_unwrapped(self.modules[above]) if above else self.model), attribute

    def tied(self, module: nn.Module, parameter: str) -> bool:
        """Whether another module owns the same parameter."""
        W = module._parameters.get(parameter)
        return W is not None and len(self.owners.get(id(W), ())) > 1

    def tied_to(self, path: str) -> list[str]:
        """The other modules that own the weight of this one."""
        W = _unwrapped(self.modules[path])._parameters.get("weight")
        return [name for name in self.owners.get(id(W), ()) if name != path]

    def is_table(self, path: str) -> bool:
        """Whether it is an embedding: replicated layers share weights too, and each has an adapter of its own."""
        return isinstance(_unwrapped(self.modules[path]) if path else self.model, nn.Embedding)


def survey(model: nn.Module, head: nn.Module | None = None) -> Survey:
    """Walks ``model`` once; adapted layers are seen as the layers they wrap, and their slots are not walked."""
    model = model._modules.get("_orig_mod") or model
    found = Survey(model)
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module, str | None, nn.Module]] = [("", model, None, model)]
    while stack:
        name, module, inside, parent = stack.pop()
        if id(module) in seen:
            found.elsewhere.setdefault(id(module), []).append((parent, name.rpartition(".")[2]))
            continue
        seen.add(id(module))
        if "_orig_mod" in module._modules:  # what torch.compile puts around a module has no name of its own
            stack.append((name, module._modules["_orig_mod"], inside, parent))  # type: ignore[arg-type]
            continue
        layer = module
        if isinstance(module, _WRAPPERS):
            layer = _unwrapped(module)
            for wrapper in _chain(module):
                found.router = wrapper.router
                found.adapters.update(wrapper.methods if isinstance(wrapper, Adapted) else wrapper.modules_to_save)
        kind = kind_of(layer)
        if name:
            found.modules[name] = module
            found.facts.append(match.Module(name, kind.name if kind else None, layer is head, inside))
        for parameter in layer._parameters.values():
            if parameter is not None:
                found.owners.setdefault(id(parameter), []).append(name)
        if isinstance(module, ModulesToSaveWrapper):
            continue
        within = name if kind is not None and kind.by_weight else inside
        prefix = f"{name}." if name else ""
        stack.extend((prefix + k, m, within, layer) for k, m in reversed(layer._modules.items()) if m is not None)
    if found.elsewhere:
        others = _other_names(found)
        found.facts = [fact._replace(also=tuple(others.get(fact.name, ()))) for fact in found.facts]
    return found


def _other_names(found: Survey) -> dict[str, list[str]]:
    """The further names of modules that stand at several places, and of what is inside these."""
    first = {id(module): name for name, module in found.modules.items()}
    others: dict[str, list[str]] = {}
    for name, module in found.model.named_modules(remove_duplicate=False):
        name, known = name.replace(".base_layer", ""), first.get(id(module))
        if known not in (None, name):
            others.setdefault(known, []).append(name)
    return others


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, Adapted):
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper | TrainableTokensWrapper):
        return _unwrapped(module.original_module)
    return module


def _chain(module: nn.Module) -> Iterator[Adapted | ModulesToSaveWrapper]:
    """The wrappers at one place, outermost first."""
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    while isinstance(module, Adapted):
        yield module
        module = module.base_layer
    if isinstance(module, ModulesToSaveWrapper):
        yield module


def wrappers(model: nn.Module) -> Iterator[tuple[str, Adapted | ModulesToSaveWrapper]]:
    """(name, wrapper) of every place where an adapter stands, outer before inner; slots are not walked."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, (Adapted, ModulesToSaveWrapper)):
            yield name, module
            if isinstance(module, Adapted):
                stack.append((within(name, module), module._modules["base_layer"]))  # type: ignore[arg-type]
            continue
        prefix = f"{name}." if name else ""
        # What has no children is no wrapper, and most of what a model has is that.
        stack.extend([(prefix + k, m) for k, m in reversed(module._modules.items()) if m is not None and m._modules])


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, Adapted]]:
    """(name, wrapper) of the layers that are adapted, or that have this adapter."""
    for name, wrapper in wrappers(model):
        if isinstance(wrapper, Adapted) and (adapter_name is None or adapter_name in wrapper.methods):
            yield name, wrapper


def within(path: str, wrapper: Adapted) -> str:
    """How the names of what is inside an adapted layer begin in files: composite layers keep their own name there."""
    return path if wrapper.kind.composite else f"{path}.base_layer" if path else "base_layer"


# ---------------------------------------------------------------------- prepare


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
        return _unwrapped(self.base)

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
    saved: dict[str, str | None]  # what is trained whole -> what is also, and has the weight that this one follows
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
    layers = {path: _unwrapped(found.modules[path]) for path in paths if path in found.modules}
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
            layer = _unwrapped(found.modules[other])
            kind = trainable_kind(layer, other)
            values = {**work.target.overrides, "tied": True}
            adapter = _adapter(found, config, kind, layer, other, values, key=work.path)
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
    return None if head is None else _unwrapped(head)


def with_experts(found: Survey, config: AdapterConfig) -> AdapterConfig:
    """The config with parameters as targets, where it names experts that are no modules of their own any more."""
    former = experts.FORMER.get(str(found.model_type)) if config.peft_type == PeftType.LORA else None
    if former is None:
        return config
    holders = [name for name, module in found.modules.items() if experts.GATE_UP in _unwrapped(module)._parameters]
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


def model_config(model: nn.Module) -> dict[str, Any]:
    """The model's own config as a dict; empty where it has none."""
    config = getattr(model, "config", None)
    if config is None:
        return {"model_type": "custom"}
    if isinstance(config, dict):
        return config
    to_dict = getattr(config, "to_dict", None)
    values: dict[str, Any] = to_dict() if callable(to_dict) else dict(getattr(config, "__dict__", {}))
    return values


def _works_for(found: Survey, config: AdapterConfig, target: match.Target) -> list[Work]:
    parent, attribute = found.parent(target.name)
    module = found.modules[target.name]
    if isinstance(module, TrainableTokensWrapper | ModulesToSaveWrapper):
        raise UnsupportedLayerError(
            f"{target.name} is trained whole or by tokens already (modules_to_save, trainable_token_indices): take it "
            "out of target_modules."
        )
    layer = _unwrapped(module)
    kind = module.kind if isinstance(module, Adapted) else kind_of(layer)
    assert kind is not None, "the plan holds supported kinds only"
    keeper, parameter = kind.keeper(layer)
    storage = storage_of(keeper, parameter)
    why = kind.unadaptable(layer) or storage.unreadable(keeper, parameter)
    if why is not None:
        raise UnsupportedLayerError(f"{target.name} ({type(layer).__name__}) cannot be adapted: {why}.")
    if isinstance(kind, ParameterKind):
        raise UnsupportedLayerError(f"{target.name} is adapted through target_parameters already: it cannot be both.")
    adapter = _adapter(found, config, kind, layer, target.name, target.overrides)
    if adapter.unpacked_only is not None and not storage.in_place:
        raise UnsupportedLayerError(f"{target.name} is packed already ({storage.name}): {adapter.unpacked_only}.")
    work = Work(target.name, parent, attribute, kind, adapter, target=target)
    if not isinstance(layer, nn.MultiheadAttention):
        return [work]
    inner_kind = kind_of(_unwrapped(layer.out_proj))
    assert inner_kind is not None
    path = f"{target.name}.base_layer.out_proj"
    # PEFT adds the out-projection's delta twice, in forward and merge alike; adapters in files are trained that way.
    values = {**target.overrides, "gain": 2.0}
    inner = _adapter(found, config, inner_kind, _unwrapped(layer.out_proj), path, values)
    return [work, Work(path, layer, "out_proj", inner_kind, inner, target=target, nested=True)]


def _adapter(
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
    standing = [w.kind for w in _chain(found.modules[path])]
    if any(not isinstance(k, ParameterKind) for k in standing):
        raise UnsupportedLayerError(f"{path} is adapted through target_modules already: it cannot be both.")
    layer = _unwrapped(found.modules[path])
    for target in targets:
        _check_bare(path, layer, target.parameter)
    wrapped = {k.weight_name for k in standing} | {t.parameter for t in targets}
    order = [name for name in layer._parameters if name in wrapped]
    works = []
    for target in sorted(targets, key=lambda t: order.index(t.parameter)):
        kind = next((k for k in standing if k.weight_name == target.parameter), ParameterKind(target.parameter))
        key_path = path + ".base_layer" * (len(order) - 1 - order.index(target.parameter))
        adapter = _adapter(found, config, kind, layer, target.name, target.overrides, key_path)
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
        if module is embedding or _unwrapped(module) is embedding:
            return name
    raise PlanError(
        "trainable_token_indices is a list, and the model does not say which its embedding is: use a dict."
    )


def _token_work(found: Survey, config: AdapterConfig, path: str, asked: dict[str, list[int]]) -> list[TokenWork]:
    """The work on one layer, and, where it is an embedding, on those tied to it that ask for no other tokens."""
    tokens = asked[path]

    def work(at: str, source: str | None = None) -> TokenWork:
        layer = _unwrapped(found.modules[at])
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


# ---------------------------------------------------------------------- apply


@dataclass
class _Applying:
    """An adapter on its way into a model: what it is to be, and the steps that undo what has been done so far."""

    found: Survey
    router: Router
    name: str
    meta: bool
    autocast: bool
    active: bool
    trained: bool
    undoing: list[tuple[Callable[..., object], tuple[object, ...]]] = field(default_factory=list)

    def place(self, work: Work) -> None:
        """Puts a layer's adapter into the wrapper that stands there, or into a new one."""
        base, kind = work.base, work.kind
        layer = _existing(work, base)
        if layer is None:
            if isinstance(kind, ParameterKind):
                _check_order(work)
            frozen = work.layer
            if work.source is not None:
                layer = Tied(base, kind, self.router, work.path, getattr(*self.found.parent(work.source)))
            else:
                layer = Adapted(base, kind, self.router, work.path, self.found.tied(frozen, kind.weight_name))
            if isinstance(work.parent, _FUSING):
                # In eval torch's encoder layer hands its layers' weights to one fused call, past every adapter, unless
                # a hook stands in the way.
                layer.register_forward_pre_hook(_in_the_way)
            storage_of(frozen, kind.weight_name).settle(frozen)
            self._replace_everywhere(work.parent, work.attribute, layer)
            self._bar_nesting(work)
        self._add(layer, work.adapter)

    def place_saved(self, path: str, source: str | None) -> None:
        """Copies a module for the adapter; a copy that follows another one has that one's weight."""
        parent, attribute = self.found.parent(path)
        module = getattr(parent, attribute)
        if not isinstance(module, ModulesToSaveWrapper):
            module = ModulesToSaveWrapper(module, self.router, path)
            self._replace_everywhere(parent, attribute, module)
        frozen = not any(p.requires_grad for p in module.modules_to_save.parameters())
        self.undoing += [(module.set_adapter, (module._active, frozen)), (module.delete_adapter, (self.name,))]
        module.add(self.name)
        if self.active:
            module.set_adapter(self.name, inference_mode=not self.trained)
        if source is not None:
            other: Any = getattr(*self.found.parent(source))
            module.modules_to_save[self.name].weight = other.modules_to_save[self.name].weight

    def place_tokens(self, work: TokenWork) -> None:
        """Puts in what trains tokens of an embedding, or of a head that is tied to one."""
        module = work.base
        if isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
        else:
            if work.source is None:
                layer = TrainableTokensLayer(module, work.kind, self.router, work.path, tied=True)
            else:
                source: Any = getattr(*self.found.parent(work.source))
                layer = TiedTokensLayer(module, work.kind, self.router, work.path, source.token_adapter)
            self._replace_everywhere(work.parent, work.attribute, TrainableTokensWrapper(layer))
        self._add(layer, work.adapter)

    def _add(self, layer: Adapted, adapter: AbstractAdapter) -> None:
        self.undoing += [
            (layer.set_requires_grad, (layer._trained,)),
            (layer.drop_empty, ()),
            (layer.delete_adapter, (self.name,)),
            (setattr, (layer, "_active", layer._active)),  # first of all: what is not active is deleted in silence
        ]
        if isinstance(layer, Tied):
            layer.add(self.name, adapter, "meta", active=self.active)
            return
        dtype, device = layer.facts()
        if dtype in NARROW and (self.autocast or dtype.itemsize == 1):  # nothing can be computed in 8 bits
            dtype = torch.float32
        if self.active:
            layer.set_requires_grad(layer._active, False)
        meta = self.meta
        if any(not slot.filed for slot in adapter.slots.values()):
            if device.type == "meta":
                raise UnsupportedLayerError(
                    f"{layer.path} is on the meta device, and its adapter starts from its weight."
                )
            meta = False
        layer.add(self.name, adapter, "meta" if meta else device, dtype, self.active, self.trained)
        if not meta and device.type != "meta":
            adapter.initialise(layer.params(self.name), layer)

    def _replace(self, parent: nn.Module, attribute: str, value: nn.Module | None) -> None:
        self.undoing.append((setattr, (parent, attribute, getattr(parent, attribute))))
        setattr(parent, attribute, value)

    def _replace_everywhere(self, parent: nn.Module, attribute: str, wrapper: nn.Module) -> None:
        """Replaces the module there, and wherever else it stands."""
        others = self.found.elsewhere.get(id(getattr(parent, attribute)), [])
        for where, at in [(parent, attribute), *others]:
            self._replace(where, at, wrapper)
        if others:
            self.found.elsewhere[id(wrapper)] = others  # there it stands now: a further one may come around it

    def _bar_nesting(self, work: Work) -> None:
        """Has torch's encoder pack no ragged batches, which only its fused layers can read."""
        path = work.path
        while path and isinstance(work.parent, _FUSING):
            path = path.rpartition(".")[0]
            encoder = self.found.modules.get(path, None if path else self.found.model)
            if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor:
                # None is as good as False to torch, and tells `remove` that it was True.
                self._replace(encoder, "use_nested_tensor", None)  # undone like a wrapper


def apply(
    prepared: Prepared,
    name: str,
    *,
    meta: bool = False,
    autocast: bool = True,
    activate: bool = True,
    trainable: bool = True,
    router: Router | None = None,
) -> None:
    """Puts a prepared adapter into its model; on any error the model is as it was, without one that is replaced.

    Args:
        prepared (`Prepared`): From `prepare`.
        name (`str`): The adapter's name.
        meta (`bool`, *optional*, defaults to `False`): Leave tensors on the meta device: they will be assigned.
        autocast (`bool`, *optional*, defaults to `True`): Keep tensors in fp32 where the layer is in 16 bits or fewer.
        activate (`bool`, *optional*, defaults to `True`): Make it the default.
        trainable (`bool`, *optional*, defaults to `True`): Whether it is trained when active.
        router (`Router`, *optional*): The routing of a model without wrappers yet.
    """
    found = prepared.survey
    modules = (found.model, *found.modules.values()) if found.router is None else ()
    grads = [p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad]
    router = found.router or router or Router()
    applying = _Applying(found, router, name, meta, autocast, activate, activate and trainable)
    try:
        with collector_paused(), router.writing():
            if prepared.replaces:
                _take_out(found, name)
            for parameter in grads:
                parameter.requires_grad = False  # requires_grad_() is not to be had of a lazy layer's
            for work in prepared.works:
                applying.place(work)
            for path, source in prepared.saved.items():
                applying.place_saved(path, source)
            for tokens in prepared.tokens:
                applying.place_tokens(tokens)
            for _, parameter in biases(found.model, prepared.config, name) if activate else ():
                parameter.requires_grad_(trainable)
    except BaseException:
        for step, args in reversed(applying.undoing):
            step(*args)
        for parameter in grads:
            parameter.requires_grad = True
        raise


def _existing(work: Work, base: nn.Module) -> Adapted | None:
    wanted = (work.kind.name, work.kind.weight_name)
    for wrapper in _chain(base):
        if isinstance(wrapper, Adapted) and (wrapper.kind.name, wrapper.kind.weight_name) == wanted:
            return wrapper
    return None


def _check_order(work: Work) -> None:
    order = list(work.layer._parameters)
    later = [w for w in _chain(work.base) if isinstance(w, Adapted) and isinstance(w.kind, ParameterKind)]
    if any(order.index(w.kind.weight_name) > order.index(work.kind.weight_name) for w in later):
        raise UnsupportedLayerError(
            f"{work.path}: wrappers of one module's parameters nest in the order of the parameters, and "
            f"{work.kind.weight_name!r} comes before one that is wrapped: name it in the first adapter too."
        )


def _in_the_way(module: nn.Module, args: Any) -> None:
    return None


def biases(model: nn.Module, config: AnyConfig, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the model's own biases that an adapter trains which stands in it."""
    if config.bias == "none":
        return
    only = None if config.bias == "all" else {f"{p}.base_layer.bias" for p, _ in adapted_layers(model, adapter_name)}
    for name, module in own_modules(model):
        bias = module._parameters.get("bias")
        full = f"{name}.bias" if name else "bias"
        if bias is not None and (only is None or full in only):
            yield full, bias


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the user's own modules that run: neither slots nor what an adapter trains whole."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if isinstance(module, ModulesToSaveWrapper):
            continue
        if isinstance(module, Adapted):
            stack.append((within(name, module), module.base_layer))
            continue
        yield name, module
        prefix = f"{name}." if name else ""
        stack.extend((prefix + k, m) for k, m in reversed(module._modules.items()) if m is not None)


# ---------------------------------------------------------------------- remove


def remove(model: nn.Module, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Takes all wrappers out of ``model``, writing adapters into the weights first where ``merge`` says so."""
    layers = [w for _, w in adapted_layers(model)]
    if merge:
        _merge_for_good(layers, safe_merge, adapter_names)
    else:
        unmerge([layer for layer in layers if layer.merged])
    for _, parent in list(own_modules(model)):
        for attribute, module in parent._modules.items():
            if isinstance(module, _WRAPPERS) and not isinstance(parent, TrainableTokensWrapper):
                setattr(parent, attribute, _replacement(module, merge, adapter_names))
        if isinstance(parent, nn.TransformerEncoder) and parent.__dict__.get("use_nested_tensor", False) is None:
            parent.use_nested_tensor = True


def _merge_for_good(layers: list[Adapted], safe_merge: bool, adapter_names: list[str] | None) -> None:
    for layer in layers:
        layer.check_merge(adapter_names, safe_merge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # what was merged before is merged
        for layer in layers:
            layer.merge(adapter_names=adapter_names, keep_base=layer.merged)
    tell_rounding(layers)
    for layer in layers:
        if isinstance(layer, Tied):
            layer.share()
    for layer in layers:
        layer.forget()


def unmerge(layers: Sequence[Adapted]) -> None:
    """Unmerges all of some merged layers, or none."""
    for layer in layers:
        layer.check_unmerge()
    for layer in layers:
        layer.unmerge()


def shared_weights(model: nn.Module) -> list[list[str]]:
    """The names of modules that share a parameter, by parameter."""
    return [names for names in survey(model).owners.values() if len(names) > 1]


def unmerge_first(model: nn.Module, stacklevel: int) -> None:
    """Unmerges what is merged, with a warning, before other adapters are made the active ones."""
    merged = [w for _, w in adapted_layers(model) if w.merged]
    if merged:
        text = "Adapters are merged: they are unmerged first, then others are set."
        warnings.warn(text, PeftWarning, stacklevel=stacklevel + 1)
    unmerge(merged)


def _take_out(found: Survey, adapter_name: str) -> None:
    """Takes out an adapter that another one of its name is to replace."""
    unmerge_first(found.model, stacklevel=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # another one is active for a moment
        for _, wrapper in list(wrappers(found.model)):
            wrapper.delete_adapter(adapter_name)


def tell_rounding(layers: Iterable[Adapted]) -> None:
    """Warns of what merging into packed weights has rounded; each layer has its own figures as ``rounding``."""
    rounded = [(layer.rounding, layer) for layer in layers if layer.rounding is not None]
    if rounded:
        mean = sum(figures.mean for figures, _ in rounded) / len(rounded)
        worst, where = max(rounded, key=lambda pair: pair[0].largest)
        packings = ", ".join(sorted({layer.storage.name for _, layer in rounded}))
        warnings.warn(
            f"Merged into {len(rounded)} packed weights ({packings}), which are rounded: by {mean:.2%} of the mean "
            f"weight on average, by {worst.largest:.2%} of the largest at most ({where.path}). Unmerging is exact.",
            PeftWarning,
            stacklevel=4,
        )


def _replacement(module: nn.Module, merge: bool, adapter_names: list[str] | None) -> nn.Module:
    if isinstance(module, ModulesToSaveWrapper):
        names = adapter_names or module._active
        # Of several copies that are asked for, an active one: only one can stand in the module's place.
        return module.copy_for([n for n in names if n in module._active] or names) if merge else module.original_module
    return _unwrapped(module)


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
