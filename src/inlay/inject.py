"""Applies what was prepared to a model and undoes it: the only place that sets attributes on users' modules.

apply(prepared) -> wrappers in place, or the model as it was      remove(model) -> the model without them
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from inlay.adapted import Adapted
from inlay.errors import PeftWarning, UnsupportedLayerError
from inlay.methods._abstract import AbstractAdapter
from inlay.parametrized import ParameterKind
from inlay.routing import Router
from inlay.storage import storage_of
from inlay.trained import ModulesToSaveWrapper, Tied, TiedTokensLayer, TrainableTokensLayer, TrainableTokensWrapper
from inlay.walk import WRAPPERS, Survey, adapted_layers, biases, chain, own_modules, unwrapped, wrappers
from inlay.works import Prepared, TokenWork, Work, collector_paused

NARROW = {torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
_FUSING = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


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
    for wrapper in chain(base):
        if isinstance(wrapper, Adapted) and (wrapper.kind.name, wrapper.kind.weight_name) == wanted:
            return wrapper
    return None


def _check_order(work: Work) -> None:
    order = list(work.layer._parameters)
    later = [w for w in chain(work.base) if isinstance(w, Adapted) and isinstance(w.kind, ParameterKind)]
    if any(order.index(w.kind.weight_name) > order.index(work.kind.weight_name) for w in later):
        raise UnsupportedLayerError(
            f"{work.path}: wrappers of one module's parameters nest in the order of the parameters, and "
            f"{work.kind.weight_name!r} comes before one that is wrapped: name it in the first adapter too."
        )


def _in_the_way(module: nn.Module, args: Any) -> None:
    return None


def remove(model: nn.Module, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Takes all wrappers out of ``model``, writing adapters into the weights first where ``merge`` says so."""
    layers = [w for _, w in adapted_layers(model)]
    if merge:
        _merge_for_good(layers, safe_merge, adapter_names)
    else:
        unmerge([layer for layer in layers if layer.merged])
    for _, parent in list(own_modules(model)):
        for attribute, module in parent._modules.items():
            if isinstance(module, WRAPPERS) and not isinstance(parent, TrainableTokensWrapper):
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


def _replacement(module: nn.Module, merge: bool, adapter_names: list[str] | None) -> nn.Module:
    if isinstance(module, ModulesToSaveWrapper):
        names = adapter_names or module._active
        # Of several copies that are asked for, an active one: only one can stand in the module's place.
        return module.copy_for([n for n in names if n in module._active] or names) if merge else module.original_module
    return unwrapped(module)


def unmerge(layers: Sequence[Adapted]) -> None:
    """Unmerges all of some merged layers, or none."""
    for layer in layers:
        layer.check_unmerge()
    for layer in layers:
        layer.unmerge()


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
