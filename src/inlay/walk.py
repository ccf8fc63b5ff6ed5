"""What stands in a model, its adapters included, seen in one walk; nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from inlay import match
from inlay.adapted import Adapted
from inlay.layers import kind_of
from inlay.prompts import AnyConfig
from inlay.routing import Router
from inlay.trained import ModulesToSaveWrapper, TrainableTokensWrapper

WRAPPERS = (Adapted, ModulesToSaveWrapper, TrainableTokensWrapper)


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
        return [(n, key) for n, m in layers.items() for key, W in unwrapped(m)._parameters.items() if W is not None]

    def parent(self, path: str) -> tuple[nn.Module, str]:
        """The module that holds ``path`` and the attribute it stands at."""
        above, _, attribute = path.rpartition(".")
        return (unwrapped(self.modules[above]) if above else self.model), attribute

    def tied(self, module: nn.Module, parameter: str) -> bool:
        """Whether another module owns the same parameter."""
        W = module._parameters.get(parameter)
        return W is not None and len(self.owners.get(id(W), ())) > 1

    def tied_to(self, path: str) -> list[str]:
        """The other modules that own the weight of this one."""
        W = unwrapped(self.modules[path])._parameters.get("weight")
        return [name for name in self.owners.get(id(W), ()) if name != path]

    def is_table(self, path: str) -> bool:
        """Whether it is an embedding: replicated layers share weights too, and each has an adapter of its own."""
        return isinstance(unwrapped(self.modules[path]) if path else self.model, nn.Embedding)


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
        if isinstance(module, WRAPPERS):
            layer = unwrapped(module)
            for wrapper in chain(module):
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


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module under whatever wrappers stand there."""
    if isinstance(module, Adapted):
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper | TrainableTokensWrapper):
        return unwrapped(module.original_module)
    return module


def chain(module: nn.Module) -> Iterator[Adapted | ModulesToSaveWrapper]:
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


def shared_weights(model: nn.Module) -> list[list[str]]:
    """The names of modules that share a parameter, by parameter."""
    return [names for names in survey(model).owners.values() if len(names) > 1]
