"""What stands between a handle and the user's model: the verbs that act on all of its layers at once.

A handle keeps one as ``base_model``; a model that someone else owns gets one for the time of a call (`Tuner.inside`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay import inject, state, walk, works
from inlay.adapted import Adapted, merged_already
from inlay.config import AdapterConfig
from inlay.errors import (
    AdapterNameError,
    MissingMethodError,
    NotMergeableError,
    PeftWarning,
    PlanError,
    UnknownAdapterError,
    UnsupportedLayerError,
)
from inlay.hooks import Served, TrainingHooks
from inlay.invocation import Invocations
from inlay.methods._budget import RankBudget
from inlay.prompts import AnyConfig, PromptLearningConfig
from inlay.prompts.attach import Prompts
from inlay.routing import HasDefault, Router
from inlay.storage.arena import Arena, bytes_of
from inlay.storage.placement import HOOK_NAMES
from inlay.trained import Tied


class Tuner(nn.Module, HasDefault):
    """The user's model with adapters inside, and the verbs that act on all of its layers.

    Args:
        model (`nn.Module`): The user's model; it is changed in place.
    """

    # Whether adapters have tensors that all layers share and no layer holds.
    uses_shared_state: ClassVar[bool] = False
    tuner_layer_cls: ClassVar[type] = Adapted

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.peft_config: dict[str, AnyConfig] = {}
        self.hooks: dict[str, TrainingHooks] = {}
        self._hooked: dict[str, list[tuple[str, Adapted]]] = {}
        self._active: tuple[str, ...] = ()
        self.prompts: Prompts | None = None
        self._own_router: Router | None = None  # where no wrapper stood when it was first asked for
        self.invocations: Invocations | None = None
        self._arena = Arena()
        self.enabled = True

    @classmethod
    def inside(cls, model: nn.Module) -> Tuner:
        """The verbs for a model with adapters inside and no handle around it, which keeps its own configs."""
        tuner = cls(model)
        tuner.peft_config = model.__dict__.get("peft_config") or {}
        for _, wrapper in walk.wrappers(model):
            tuner._active, tuner.enabled = tuple(wrapper.active_adapters), not wrapper.disable_adapters
            break
        return tuner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.with_loss(self.model(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in HOOK_NAMES or name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    @property
    def router(self) -> Router:
        """The routing that all wrappers of this model share."""
        if self._own_router is None:
            for _, wrapper in walk.wrappers(self.model):
                return wrapper.router
            self._own_router = Router()
        return self._own_router

    @property
    def prefix(self) -> str:
        """What the names of the method's slots begin with."""
        config = next(iter(self.peft_config.values()), None)
        if isinstance(config, PromptLearningConfig):
            return f"{config.method.lower()}_"
        return "" if config is None else works.method_of(config).prefix

    def layers(self) -> Iterator[tuple[str, Adapted]]:
        """(name, wrapper) of every adapted layer."""
        return walk.adapted_layers(self.model)

    def _standing(self) -> list[Any]:
        """Everything with adapters of its own: wrappers, and the prompts before the model."""
        return [*(w for _, w in walk.wrappers(self.model)), *([self.prompts] if self.prompts is not None else [])]

    def add(self, adapter_name: str, config: AdapterConfig, prepared: works.Prepared, active: bool) -> None:
        """Registers an adapter that stands in the layers."""
        works.with_targets(config, prepared)
        self.register(adapter_name, config)
        if active:
            self._active = (adapter_name,)

    def register(self, adapter_name: str, config: AdapterConfig) -> None:
        """Makes ``config`` an adapter's, in place of the one it may have."""
        self.peft_config[adapter_name] = config
        self._forget(adapter_name)
        if config.invocation is not None:
            self.invocations = self.invocations or Invocations(self.model, self.router)
            self.invocations.tokens[adapter_name] = config.invocation
        if (hooks := works.method_of(config).hooks) is not None:
            self.hooks[adapter_name] = hooks(config)

    def check_known(self, names: Sequence[str], missing: str = "does not exist") -> None:
        """Raises `UnknownAdapterError` for a name that is no adapter."""
        for name in names:
            if name not in self.peft_config:
                raise UnknownAdapterError(f"Adapter {name} {missing}: there are {list(self.peft_config)}.")

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes adapters the default for all threads.

        Args:
            adapter_name (`str` or `list[str]`): Which; several run together, in this order. Of those with a copy of
                one module, such as a head, the first one's runs and is trained; the others stay as they are.
            inference_mode (`bool`, *optional*, defaults to `False`): Keep them frozen.

        Raises:
            UnknownAdapterError: One of them does not exist.
        """
        names = as_names(adapter_name)
        self.check_known(names, "not found")
        if any(layer.merged for _, layer in self.layers()):
            with self.router.writing():
                inject.unmerge_first(self.model, stacklevel=3)
        with self._changing():
            for wrapper in self._standing():
                wrapper.set_adapter(list(names), inference_mode=inference_mode)
            self._active = names
            for name, config in self.peft_config.items():
                for _, parameter in walk.biases(self.model, config, name):
                    parameter.requires_grad_(name in names and not inference_mode)

    def _changing(self) -> AbstractContextManager[None]:
        """Forwards of other threads see a change whole; a model that changes its own default does so at once."""
        router = self.router
        return nullcontext() if router.inside else router.writing()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains or freezes adapters, active or not."""
        for wrapper in self._standing():
            wrapper.set_requires_grad(adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switches all adapters on, for all threads."""
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        with self._changing():
            self.enabled = enabled
            for wrapper in self._standing():
                wrapper.enable_adapters(enabled)

    def disable_adapter_layers(self) -> None:
        """Switches all adapters off, for all threads; `PeftModel.disable_adapter` does for one thread."""
        self.tell_biases()
        self._enable(False)

    def tell_biases(self, stacklevel: int = 3) -> None:
        """Warns where switching adapters off does not give the base model back."""
        if any(config.bias != "none" for config in [*self.peft_config.values()]):
            warnings.warn(
                "Careful, disabling adapter layers with bias trained does not give the base model back: biases are "
                "the model's own and stay in place.",
                PeftWarning,
                stacklevel,
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter.

        Raises:
            UnknownAdapterError: No such adapter.
            PlanError: It is merged.
        """
        self.check_deletable([adapter_name])
        found = self._standing()
        left = tuple(n for n in self._active if n != adapter_name)
        others = [n for n in [*self.peft_config] if n != adapter_name]
        if not left and others:
            left = (others[0],)
            told = f"Adapter {adapter_name} was active and is deleted: {left[0]} is active now."
            warnings.warn(told, PeftWarning, stacklevel=3)
        with self.router.writing(), warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftWarning)  # said once, above
            for wrapper in found:
                wrapper.delete_adapter(adapter_name)
            del self.peft_config[adapter_name]
            self._forget(adapter_name)
            if left != self._active:
                for wrapper in found if others else ():  # what is left may be another handle's, which has its choice
                    wrapper.set_adapter(list(left))
                self._active = left

    def check_deletable(self, names: Sequence[str]) -> None:
        """Raises what `delete_adapter` would raise for one of them."""
        self.check_known(names)
        merged = {n for _, layer in self.layers() for n in layer.merged_adapters}
        if found := [n for n in names if n in merged]:
            raise PlanError(f"Cannot delete adapter(s) {found} while they are merged: call unmerge_adapter() before.")

    def _forget(self, *names: str) -> None:
        """Drops what is kept of adapters beside their configs."""
        for name in names:
            self.hooks.pop(name, None)
            self._hooked.pop(name, None)
            if self.invocations is not None:
                self.invocations.remove(name)
                self.invocations = self.invocations if self.invocations.tokens else None

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Puts an adapter whose config is in `peft_config` already into the model; the first one is active then.

        One of its name goes, and the new one is active if that was.

        Args:
            model (`nn.Module`): The user's model.
            adapter_name (`str`): The adapter.
            autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): Keep the adapter in fp32.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Leave it on the meta device, to be loaded.
            state_dict (`Mapping[str, Tensor]`, *optional*): Adapt the layers that its keys name, not the config's.

        Raises:
            UnknownAdapterError: It has no config.
            ConfigError: Its config is a prompt's.
            PlanError: The config does not fit the model, which is as it was.
        """
        self.check_known([adapter_name])
        config: Any = self.peft_config[adapter_name]
        only = None if state_dict is None else works.layers_in(state_dict, config)
        prepared, active = works.prepare(model, config, only, adapter_name, replacing=True), self._active
        trainable = not config.inference_mode
        for text in (*prepared.plan.warnings, *(works.told_by_config(prepared) if only is not None else ())):
            warnings.warn(text, PeftWarning, stacklevel=2)
        inject.apply(
            prepared, adapter_name, meta=low_cpu_mem_usage, autocast=autocast_adapter_dtype, activate=not active,
            trainable=trainable, router=self.router,
        )  # fmt: skip
        self.add(adapter_name, config, prepared, not active)
        if adapter_name in active:
            self.set_adapter(active, inference_mode=not trainable)

    @property
    def target_module_mapping(self) -> Mapping[str, list[str] | str]:
        """The method's targets by model type, where a config names none."""
        config = next(iter(self.peft_config.values()), None)
        if not isinstance(config, AdapterConfig):
            raise AttributeError("No adapter stands in layers.")
        return works.method_of(config).default_targets

    @property
    def rankallocator(self) -> RankBudget:
        """What chooses AdaLoRA's ranks, of the adapter that is trained; no attribute of other models."""
        for _, hooks, _ in self.trained():
            if isinstance(hooks, RankBudget):
                return hooks
        raise AttributeError("No adapter that is trained has a budget of ranks.")

    # ------------------------------------------------------------------ training

    def trained(self) -> Iterator[tuple[str, TrainingHooks, list[Served]]]:
        """(name, hooks, layers) of every adapter that is trained and whose method asks something of training."""
        for name, hooks in self.hooks.items():
            if name not in self._hooked:
                adapter = works.method_of(self.peft_config[name]).adapter  # type: ignore[arg-type]  # it has hooks
                found = [(state.without_foreign(path), w) for path, w in self.layers() if not isinstance(w, Tied)]
                self._hooked[name] = [(path, w) for path, w in found if isinstance(w.methods.get(name), adapter)]
            layers = [Served(path, w.methods[name], w.params(name)) for path, w in self._hooked[name]]
            if any(t.requires_grad for _, _, p in layers for t in p.values()):
                yield name, hooks, layers

    def with_loss(self, outputs: Any) -> Any:
        """What the model returned, in training with what the methods of the running adapters add to its loss."""
        if not (self.hooks and self.training and torch.is_grad_enabled() and isinstance(outputs, Mapping)):
            return outputs
        loss = outputs.get("loss")
        if isinstance(loss, Tensor) and loss.requires_grad:
            route = self.router.route()
            names = self._active if route is None else route.names or (() if route.rows is None else route.rows.names)
            for name, hooks, layers in self.trained():
                if name in names and (extra := hooks.loss(layers)) is not None:
                    loss = loss + extra.to(loss)
            outputs["loss"] = loss  # type: ignore[index]  # a dict, or transformers' own kind of it
        return outputs

    def begin_training(self, total_steps: int) -> None:
        """Tells the methods that ask how many steps the optimiser will make."""
        for hooks in self.hooks.values():
            hooks.begin(total_steps)

    def update_and_allocate(self, global_step: int) -> None:
        """What methods do after each step of the optimiser, as AdaLoRA's choice of ranks; before ``zero_grad``.

        Args:
            global_step (`int`): How many steps the optimiser has made.
        """
        for _, hooks, layers in self.trained():
            hooks.step(layers, global_step)

    def training_state(self) -> dict[str, Tensor]:
        """What `update_and_allocate` remembers, for a checkpoint."""
        return {f"{n}.{k}": t for n, hooks, layers in self.trained() for k, t in hooks.state(layers).items()}

    def load_training_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `training_state` gave."""
        for name, hooks, layers in self.trained():
            mine = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            hooks.load_state(layers, mine)

    # ------------------------------------------------------------------ merging

    @property
    def only_prompts(self) -> bool:
        """Whether there are adapters, and none is in a layer."""
        configs = [*self.peft_config.values()]
        return bool(configs) and all(isinstance(config, PromptLearningConfig) for config in configs)

    def _check_in_layers(self, verb: str) -> None:
        if self.only_prompts:
            raise MissingMethodError(
                f"Prompts have no {verb}, for they are in no layer and no weight: get_base_model() is the model that "
                "they stand before, and delete_adapter removes one."
            )

    def _check_mergeable(self, verb: str, names: Sequence[str]) -> None:
        self._check_in_layers(verb)
        if isinstance(names, str):
            raise TypeError(f"adapter_names must be a list, got a str: write [{names!r}].")
        self.check_known(names)
        if prompts := [n for n in names if isinstance(self.peft_config[n], PromptLearningConfig)]:
            raise NotMergeableError(f"{prompts[0]!r} is a prompt before the input: no weight can hold it.")

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, keep_base: bool = True
    ) -> None:
        """Writes adapters into the frozen weights, in place; `unmerge_adapter` gives every bit back.

        Args:
            adapter_names (`list[str]`, *optional*): Which; the active ones if not given.
            safe_merge (`bool`, *optional*, defaults to `False`): Check for NaN and infinity before writing anything.
            keep_base (`bool`, *optional*, defaults to `True`): Keep the pristine weights aside. Without them there is
                no second copy in memory, `unmerge_adapter` is as exact as the dtype allows, and `disable_adapter`
                raises.

        Raises:
            UnknownAdapterError: One of them does not exist.
            NotMergeableError, NonFiniteMergeError: They cannot be merged; nothing was written.
            MissingMethodError: All adapters are prompts.
        """
        self._check_mergeable("merge_adapter", adapter_names or ())
        with self.router.writing():
            layers = [layer for _, layer in self.layers()]
            changing = [(layer, new) for layer in layers if (new := layer.check_merge(adapter_names, safe_merge))]
            merged = {n for layer in layers for n in layer._merged}
            if not changing or not merged.isdisjoint(adapter_names or self._active):
                warnings.warn(merged_already(adapter_names or self._active, merged), PeftWarning, stacklevel=2)
            copied = [layer for layer, _ in changing if keep_base and not layer._merged and not layer.tied]
            room = self._arena.room(sum(bytes_of(layer.weight) for layer in copied))
            for layer, new in changing:
                layer.write(new, keep_base, room)
        inject.tell_rounding(layer for layer, _ in changing)

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the weights again.

        Raises:
            MissingMethodError: All adapters are prompts.
        """
        self._check_in_layers("unmerge_adapter")
        with self.router.writing():
            merged = [layer for _, layer in self.layers() if layer.merged]
            if not merged:
                warnings.warn("Already unmerged. Nothing to do.", PeftWarning, stacklevel=2)
            inject.unmerge(merged)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Writes adapters into the weights and gives the model back without any wrapper.

        Args:
            progressbar (`bool`, *optional*, defaults to `False`): Accepted; merging is over before a bar is drawn.
            safe_merge (`bool`, *optional*, defaults to `False`): Check for NaN and infinity before writing anything.
            adapter_names (`list[str]`, *optional*): Which; the active ones if not given.

        Returns:
            `nn.Module`: The user's model.

        Raises:
            NotMergeableError, NonFiniteMergeError: They cannot be merged; nothing was written.
            MissingMethodError: All adapters are prompts.
        """
        self._check_mergeable("merge_and_unload", adapter_names or self._active)
        if any(config.layer_replication for config in self.peft_config.values()):
            raise UnsupportedLayerError(
                "Replicated layers share one weight and have an adapter each: they cannot merge."
            )
        with self.router.writing():
            shared = walk.shared_weights(self.model)
            inject.remove(self.model, merge=True, safe_merge=safe_merge, adapter_names=adapter_names)
        self._untie(shared)
        return self._released()

    def _untie(self, shared: list[list[str]]) -> None:
        owned = [[set(map(id, self.model.get_submodule(n)._parameters.values())) for n in names] for names in shared]
        if all(set.intersection(*group) for group in owned):
            return
        config = getattr(self.model, "config", None)
        if config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            seen: set[int] = set()
            for module in self.model.modules():  # a file of untied weights has each of them, so each is its own
                for key, W in module._parameters.items():
                    if W is not None and id(W) in seen:
                        module._parameters[key] = nn.Parameter(W.detach().clone(), requires_grad=W.requires_grad)
                    seen.add(id(W))
            warnings.warn(
                "Of tied layers not all were adapted alike, so after merging they differ: config.tie_word_embeddings "
                "is False now.",
                PeftWarning,
                stacklevel=4,
            )

    def unload(self) -> nn.Module:
        """Gives the model back as it was before any adapter.

        Raises:
            MissingMethodError: All adapters are prompts: `PeftModel.get_base_model` gives the model.
        """
        self._check_in_layers("unload")
        with self.router.writing():
            inject.remove(self.model, merge=False)
        return self._released()

    def _released(self) -> nn.Module:
        self._forget(*self.peft_config)
        self.peft_config = {}
        self._active = ()
        if self.prompts is not None:
            self.prompts.encoders.clear()
            self.prompts.set_adapter([])
        self.model.__dict__.pop("peft_config", None)
        return self.model

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the adapted layers, bare parameters' modules aside."""
        found = [(n.replace(".base_layer", ""), w) for n, w in self.layers() if type(w) is Adapted]
        attentions = {n for n, w in found if w.kind.name == "MultiheadAttention"}
        return [n for n, w in found if w.kind.name != "Parameter" and n.rpartition(".")[0] not in attentions]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of the adapted bare parameters."""
        names: dict[str, list[str]] = {}
        for name, layer in self.layers():
            if layer.kind.name == "Parameter":  # of one module the last stands outside
                names.setdefault(name.replace(".base_layer", ""), []).insert(0, layer.kind.weight_name)
        return [f"{name}.{parameter}" for name, parameters in names.items() for parameter in parameters]

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's own config as a dict."""
        return walk.model_config(model)


def as_names(given: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, each once."""
    if isinstance(given, str):
        return (given,)
    names = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(name, str) for name in names):
        raise AdapterNameError(f"an adapter's name or several must be given, got {given!r}.")
    return tuple(dict.fromkeys(names))
