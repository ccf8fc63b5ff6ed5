"""Another adapter in a loaded one's place: the same tensors and the same graph, with new values.

Compiled code reads an adapter's tensors where they stand, and its scale from a tensor beside them. So a swap copies
into these, and nothing is compiled again. `prepare_model_for_compiled_hotswap`, before compiling, pads every adapter
to one rank with zeros, which change nothing, and makes tensors of the scales. A layer that the new adapter leaves out
has zeros and keeps its place.

Everything is checked before the first byte is copied, and calls through the handle see the old adapter or the new one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay import match, settings, slots, sources, state, walk, works
from inlay.adapted import Adapted
from inlay.config import AdapterConfig, PeftConfig
from inlay.errors import BaseGoneError, HotswapError, MoreLayersError, PeftWarning
from inlay.formats.peft import apply_key_mapping, strip_prefix
from inlay.invocation import check_invocation
from inlay.methods._abstract import AbstractAdapter
from inlay.report import LoadReport
from inlay.trained import ModulesToSaveWrapper, Tied

# Fields that change which tensors an adapter has, or what stands beside them.
_STRUCTURE = ("use_dora", "lora_bias", "bias", "layer_replication")
_APART = "load the new one under a name of its own."


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raises `HotswapError` where an adapter of ``config1`` cannot take the place of one of ``config0``.

    Rank, alpha, their patterns, ``use_rslora`` and dropout may differ. Shapes are looked at when tensors are there.

    Args:
        config0 (`PeftConfig`): The loaded adapter's.
        config1 (`PeftConfig`): The new one's.

    Raises:
        HotswapError: They are of two methods, or of none that adapts layers, or differ in what tensors they have.

    Example:
        >>> from inlay import LoraConfig
        >>> check_hotswap_configs_compatible(LoraConfig(r=4), LoraConfig(r=16, use_rslora=True))
    """
    if not (isinstance(config0, AdapterConfig) and isinstance(config1, AdapterConfig)):
        odd = config1 if isinstance(config0, AdapterConfig) else config0
        raise HotswapError(f"{type(odd).__name__} adapts no layer: only adapters of layers can be swapped.")
    if config0.peft_type != config1.peft_type:
        old, new = type(config0).method, type(config1).method
        raise HotswapError(f"The loaded adapter is of {old} and the new one of {new}: {_APART}")
    if (config0.invocation is None) != (config1.invocation is None):
        raise HotswapError(f"One of the two adapters acts from its invocation on, and one on all tokens: {_APART}")
    for name in _STRUCTURE:
        here, there = getattr(config0, name, None), getattr(config1, name, None)
        if here != there:
            raise HotswapError(
                f"{name} is {here!r} in the loaded adapter and {there!r} in the new one, so their tensors differ: "
                f"{_APART}"
            )


# ---------------------------------------------------------------------- before compiling


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | dict[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Makes all adapters of a model ready to be swapped under compiled code; outputs stay as they are.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside, not yet compiled.
        target_rank (`int`, *optional*): Rank of the largest adapter to come; adapters are padded to it. Without it
            only the scales become tensors: adapters of the same rank can be swapped.
        config (`PeftConfig` or `dict`, *optional*): Accepted; configs keep the adapters' own ranks, which files have.
        check_compiled (`str`, *optional*, defaults to `"error"`): What to do where the model, or a module of it with
            adapters inside, is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises:
        HotswapError: There is no adapter, the model is compiled, or an adapter's rank is above ``target_rank``;
            nothing was changed.

    Example:
        >>> import torch, inlay
        >>> model = inlay.get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 3)), inlay.LoraConfig(r=2, target_modules=["0"])
        ... )
        >>> prepare_model_for_compiled_hotswap(model, target_rank=8)
        >>> model.base_model.model[0].lora_A["default"].weight.shape, model.base_model.model[0].scaling["default"]
        (torch.Size([8, 4]), tensor(4.))
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise HotswapError(f"check_compiled must be 'error', 'warn' or 'ignore', got {check_compiled!r}.")
    if check_compiled != "ignore" and (found := slots.compiled(model)):
        text = f"{found} is compiled already: prepare the model for swapping first, then compile it."
        if check_compiled == "error":
            raise HotswapError(text)
        warnings.warn(f"{text} It will be compiled again.", PeftWarning, stacklevel=2)
    slots.prepare(state.root_of(slots.plain(model))[0], target_rank)


# ---------------------------------------------------------------------- the swap


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Puts a saved adapter in the place of a loaded one, which is whole until all has been checked.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside, compiled or not.
        model_name_or_path (`str` or `Path`): A directory, or an id on the hub.
        adapter_name (`str`): The loaded adapter whose place it takes.
        torch_device (`str`, *optional*): Accepted; an adapter lives where its layer does.
        kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ...; ``key_mapping``.

    Raises:
        UnknownAdapterError: There is no such adapter.
        HotswapError: Another method, or other tensors, or a rank above the one prepared for.
        MoreLayersError: It adapts layers that the loaded adapter does not; the message lists them.
        LoadError, FileError: Its files cannot be used.
        BaseGoneError: It was merged with ``keep_base=False``.
        UnknownArgumentError: A keyword is none of the hub's. The loaded adapter is as it was, in every case.
    """
    key_mapping = kwargs.pop("key_mapping", None)
    sources.check_arguments(hotswap_adapter, kwargs, sources.LOADING)
    hub, _ = sources.split_hub_arguments(kwargs)
    source = state.open_source(sources.locate(model_name_or_path, subfolder=kwargs.get("subfolder"), **hub))
    with source.weights:
        tensors = strip_prefix(source.weights.read())
    if key_mapping:
        names = apply_key_mapping(tensors, key_mapping)
        tensors = {names[key]: t for key, t in tensors.items()}
    _swap(model, adapter_name, source.config, tensors, settings.strict_load)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Puts tensors in the place of a loaded adapter's; layers that have none are left out of it.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside, compiled or not.
        state_dict (`Mapping[str, Tensor]`): By the names that files have, or with the adapter's name in them.
        adapter_name (`str`): The loaded adapter whose place they take.
        config (`PeftConfig`): Theirs.
        parameter_prefix (`str`, *optional*, defaults to `"lora_"`): Accepted; the method says what its tensors are
            called.

    Raises:
        UnknownAdapterError, HotswapError, MoreLayersError, LoadError: As in `hotswap_adapter`.
    """
    _swap(model, adapter_name, config, strip_prefix(state_dict), strict=False)


def hotswap_adapter_from_model(
    model: nn.Module, source: nn.Module, adapter_name: str, source_adapter: str = "default"
) -> None:
    """Puts a copy of an adapter that is in memory in the place of a loaded one.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside, compiled or not.
        source (`nn.Module`): The model that has the other adapter: another one, or ``model`` itself.
        adapter_name (`str`): The loaded adapter whose place it takes.
        source_adapter (`str`, *optional*, defaults to `"default"`): The other one's name in ``source``.

    Raises:
        UnknownAdapterError, HotswapError, MoreLayersError, LoadError: As in `hotswap_adapter`.
    """
    source = slots.plain(source)
    tensors = state.get_peft_model_state_dict(source, adapter_name=source_adapter, save_embedding_layers=False)
    _swap(model, adapter_name, state.saved_config(source, source_adapter), strip_prefix(tensors), strict=False)


@dataclass
class _Swap:
    """One swap: what is found and checked before anything is written."""

    root: nn.Module
    name: str
    config: AdapterConfig
    rest: dict[str, Tensor]  # by name in files, what nothing has taken yet
    layers: dict[str, Adapted] = field(default_factory=dict)  # by name in files
    whole: dict[str, ModulesToSaveWrapper] = field(default_factory=dict)
    adapters: dict[str, AbstractAdapter] = field(default_factory=dict)  # the new ones
    report: LoadReport = field(default_factory=LoadReport)
    into: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by name in files: destination and values
    blank: list[Tensor] = field(default_factory=list)  # to be zeroed first
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)

    def plan(self, strict: bool) -> None:
        """Finds out what is to be written, and raises for whatever is in the way."""
        for path, wrapper in walk.wrappers(self.root):
            if isinstance(wrapper, Adapted):
                if self.name in wrapper.methods:
                    self.layers[state.without_foreign(path)] = wrapper
            elif self.name in wrapper.modules_to_save:
                self.whole[state.without_foreign(path)] = wrapper
        found = {path: self._taken(path, layer.methods[self.name]) for path, layer in self.layers.items()}
        self._plan_adapters(all(found.values()))
        for path, layer in self.layers.items():
            self._plan_layer(path, layer, found[path] or self._idle(path, layer, strict))
        if self.rest or self.whole:
            self._plan_whole()
        self._complain()

    def _take(self, name: str, live: str) -> Tensor | None:
        return self.rest.pop(name if name in self.rest else live, None)

    def _taken(self, path: str, method: AbstractAdapter) -> dict[str, tuple[str, Tensor]]:
        """A layer's new tensors with their names in files, by the method's names."""
        out = {}
        for key, slot in method.slots.items():
            name, live = f"{path}.{slot.saved_name()}", f"{path}.{slot.name}.{self.name}"
            if (t := self._take(name, f"{live}.{slot.leaf}" if slot.leaf else live)) is not None:
                out[key] = (name, t)
        return out

    def _plan_adapters(self, all_there: bool) -> None:
        config, root = self.config, self.root
        if all_there and self._is_plain():
            survey, alike = walk.Survey(root), type(config).layer_values is AdapterConfig.layer_values
            made: dict[Any, AbstractAdapter] = {}  # by what an adapter reads of a layer
            for path, layer in self.layers.items():
                base, kind = layer.get_base_layer(), layer.kind
                at = (kind, kind.shape(base), kind.down_shape(base, 1), kind.groups(base)) if alike else path
                if at not in made:
                    made[at] = works.adapter_for(survey, config, kind, base, path, {})
                self.adapters[path] = made[at]
            return
        prepared = works.prepare(root, config)
        self.adapters = {work.path: work.adapter for work in prepared.works}
        self.adapters.update({f"{tokens.path}.token_adapter": tokens.adapter for tokens in prepared.tokens})
        if different := sorted(self.whole.keys() ^ set(prepared.saved)):
            raise HotswapError(f"One of the two adapters only trains {different} whole: {_APART}")
        works.with_targets(config, prepared)

    def _is_plain(self) -> bool:
        """Whether the config and the layers' names say all about their adapters: then no plan has to be made."""
        config = self.config
        special = self.whole or config.bias != "none" or any(getattr(config, name) for name in slots.ELSEWHERE)
        targets = config.target_modules
        if special or targets in (None, "all-linear") or any(config.patterns().values()):
            return False
        named, short = match.matcher(targets), set() if isinstance(targets, str) else set(targets)
        return all(
            type(layer) is Adapted
            and layer.kind.name != "Parameter"
            and not path.endswith((".out_proj", "_adapter"))
            and (path.rpartition(".")[2] in short or named(path))
            for path, layer in self.layers.items()
        )

    def _idle(self, path: str, layer: Adapted, strict: bool) -> dict[str, tuple[str, Tensor]]:
        """Tensors with which a layer that has none in the file, or in the config, does nothing."""
        if (method := self.adapters.get(path)) is None:
            if isinstance(layer, Tied) or path.endswith(".token_adapter"):
                raise HotswapError(f"{path} is tied to another layer, or trains tokens, in one adapter only: {_APART}")
            method = self.adapters[path] = copy.copy(layer.methods[self.name])
            method.vacant = True
        elif strict or isinstance(layer, Tied):
            return {}
        values = slots.idle(layer, self.name, method)
        return {key: (f"{path}.{slot.saved_name()}", values[key]) for key, slot in method.slots.items()}

    def _plan_layer(self, path: str, layer: Adapted, found: dict[str, tuple[str, Tensor]]) -> None:
        old, new = layer.methods[self.name], self.adapters.get(path)
        if new is None:
            self.report.unexpected.extend(name for name, _ in found.values())
            return
        if type(new) is not type(old) or new.slots.keys() != old.slots.keys():
            raise HotswapError(f"{path}: the two adapters have different kinds of tensors: {_APART}")
        # Of a tied layer there are none: it uses another's.
        for (key, slot), (_, owner, attribute) in zip(new.slots.items(), layer.tensors(self.name), strict=False):
            if key not in found:
                self.report.missing.append(f"{path}.{slot.saved_name()}")
                continue
            name, t = found[key]
            live = owner._parameters[attribute]
            if not t.is_floating_point():
                self.report.config.append(f"{name!r} holds {t.dtype}, and an adapter's tensors are floats")
            if t.shape != slot.shape:
                self.report.shape.append((name, tuple(t.shape), slot.shape))
            elif type(live) is not nn.Parameter or live.is_meta:
                raise HotswapError(f"{name!r} is sharded or offloaded here: bring it back first.")
            elif live.shape == slot.shape:
                self.into[name] = (live, t.to(live))
            elif new.fits(key, live.shape):
                room = new.room(key, live.detach())
                self.into[name] = (room, t.to(live).reshape(room.shape))
                if old.r > new.r:
                    self.blank.append(live)
            else:
                self._replace(name, owner, attribute, key, old, new, t)

    def _replace(
        self,
        name: str,
        owner: nn.Module,
        attribute: str,
        key: str,
        old: AbstractAdapter,
        new: AbstractAdapter,
        t: Tensor,
    ) -> None:
        live = owner.get_parameter(attribute)
        if key not in new.rank_dims:
            raise HotswapError(f"{name!r} is {list(t.shape)} in the new adapter and {list(live.shape)} here: {_APART}")
        if isinstance(old.scaling, Tensor):
            most = new.r * live.shape[(dim := new.rank_dims[key])] // t.shape[dim]
            raise HotswapError(
                f"{name!r} has rank {new.r}, above the {most} that the model was prepared for: prepare it for a "
                "higher rank before it is compiled."
            )
        value = nn.Parameter(t.to(live, copy=True), requires_grad=live.requires_grad)
        self.into[name] = (value, value)
        self.replaced.append((owner, attribute, value))

    def _plan_whole(self) -> None:
        """What stands beside the layers' adapters: modules trained whole, biases, and what files repeat."""
        wanted: dict[str, tuple[Tensor, str]] = {}
        for path, wrapper in self.whole.items():
            for name, t in wrapper.modules_to_save[self.name].state_dict().items():
                wanted[f"{path}.{name}"] = (t, f"{path}.modules_to_save.{self.name}.{name}")
        for name, b in walk.biases(self.root, self.config, self.name):
            wanted[state.without_foreign(name)] = (b, name)
        for name, (live, other) in wanted.items():
            if (t := self._take(name, other)) is None:
                self.report.missing.append(name)
            elif t.shape != live.shape:
                self.report.shape.append((name, tuple(t.shape), tuple(live.shape)))
            else:
                self.into[name] = (live, t.to(live))
        for name, W in state.embedding_weights(self.root):
            above, _, last = name.rpartition(".")
            t = self._take(name, f"{above}.base_layer.{last}")
            layer = self.layers.get(above.removesuffix(".base_layer"))
            pristine = W if layer is None else layer.kind.from_matrix(layer.base_layer, layer.matrix())
            if t is not None and not (t.shape == W.shape and torch.equal(t.to(W), pristine)):
                raise HotswapError(f"{name!r} of the frozen model is another one in the new adapter's file: {_APART}")

    def _complain(self) -> None:
        report, start = self.report, f".{works.method_of(self.config).prefix}"
        report.unexpected.extend(self.rest)
        layers = {key.rpartition(start)[0] for key in self.rest if start in key} - self.layers.keys()
        if layers:
            raise MoreLayersError(
                f"The new adapter adapts {len(layers)} layers that {self.name!r} does not: {sorted(layers)}. Make "
                f"room for them by hotswap_slots(..., targets=...), or {_APART}",
                report,
            )
        report.non_finite.extend(state.non_finite({name: t for name, (_, t) in self.into.items()}))
        if report.missing or report.unexpected or report.shape or report.config or settings.strict_load:
            report.raise_for_problems()
        elif report.non_finite:
            warnings.warn(report.summary(), PeftWarning, stacklevel=5)
        for layer in self.layers.values():
            if self.name in layer._merged and layer.check_unmerge():
                raise BaseGoneError(
                    f"{layer.path} was merged with keep_base=False, which cannot be undone exactly: unmerge first."
                )

    def write(self) -> None:
        """Does it."""
        merged = [(w, w.merged_adapters) for w in self.layers.values() if self.name in w._merged]
        for layer, _ in merged:
            layer.unmerge()
        if self.blank:
            torch._foreach_zero_(self.blank)
        if self.into:
            to, values = zip(*self.into.values(), strict=True)
            torch._foreach_copy_(to, values)
        for owner, attribute, value in self.replaced:
            owner._parameters[attribute] = value
        for path, layer in self.layers.items():
            layer.renumber(self.name, self.adapters[path])
        for layer, names in merged:
            layer.merge(adapter_names=names)


def _swap(model: nn.Module, name: str, config: PeftConfig, tensors: dict[str, Tensor], strict: bool) -> None:
    model = slots.plain(model)
    root, prefix = state.root_of(model)
    check_hotswap_configs_compatible(state.config_of(model, name), config)
    assert isinstance(config, AdapterConfig), "checked"
    if config.invocation is not None:
        check_invocation(config.invocation, root)
    config = copy.copy(config)
    handle: Any = model
    # The plan too is made alone with the model: what it has looked at must be there when it is written.
    alone = next(w.router for _, w in walk.wrappers(root)).writing()
    with alone, torch.inference_mode(False), torch.no_grad():
        config.inference_mode = state.config_of(model, name).inference_mode
        swap = _Swap(root, name, config, dict(tensors))
        swap.plan(strict)
        swap.write()
        if prefix:
            handle.base_model.register(name, config)
        else:
            handle.peft_config[name] = config
