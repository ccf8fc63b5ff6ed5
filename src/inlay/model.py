"""The user's handle on an adapted model: add, set, use, delete, merge, save, load.

A `PeftModel` stands around a `Tuner`, which stands around the user's model; that is how live names come to begin with
``base_model.model.``. Attributes that the handle does not have are the tuner's, then the model's.
"""

from __future__ import annotations

import math
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from inlay import card, slots, sources, state, status
from inlay.config import AdapterConfig, PeftConfig
from inlay.errors import (
    AdapterNameError,
    ConfigError,
    DuplicateAdapterError,
    FieldTypeError,
    HotswapError,
    MissingFileError,
    PeftWarning,
    PlanError,
    PromptError,
    RoutingError,
    RowsError,
    UnknownAdapterError,
    UnwritableError,
    WrongMethodError,
)
from inlay.formats import files
from inlay.formats.peft import DEFAULT_ADAPTER, adapter_dir, check_adapter_name
from inlay.inject import apply, unmerge_first
from inlay.invocation import check_invocation
from inlay.prompts import EMBEDDINGS, AnyConfig, PromptLearningConfig, encoder_for, outline_for
from inlay.prompts.attach import Prompts
from inlay.replicate import replicated
from inlay.report import BASE_KEY, LoadReport
from inlay.routing import BASE, Bound, Route, Router, Rows
from inlay.session import Session
from inlay.signature import PassesOn
from inlay.storage import stored_parameters
from inlay.storage.placement import HOOK_NAMES
from inlay.tuner import Tuner, as_names
from inlay.walk import adapted_layers, own_modules, wrappers
from inlay.works import (
    FORBIDDEN_NAMES,
    check_at_hand,
    layers_in,
    method_of,
    prepare,
    prepare_saved,
    told_by_config,
    with_targets,
)


class PeftModel(nn.Module):
    """A model with adapters.

    Args:
        model (`nn.Module`): The model to adapt; it is changed in place.
        peft_config (`AdapterConfig` or `PromptLearningConfig`): What to put into it, or before it.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter's name.
        autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): Keep the adapter in fp32 where the model is in
            16 bits or fewer.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Make the adapter on the meta device, to be loaded.

    Raises:
        PlanError: The config does not fit the model, which is as it was.
        AdapterNameError: The name cannot be used.

    Example:
        >>> import torch, inlay
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = inlay.PeftModel(mlp, inlay.LoraConfig(r=2, target_modules=["0", "2"]))
        >>> model.get_nb_trainable_parameters()
        (44, 102)
    """

    # Whether adapters of several methods may stand in the model.
    mixed: ClassVar[bool] = False
    # Heads that stay random after loading a base for this task, and are therefore trained beside the adapter.
    heads: ClassVar[tuple[str, ...]] = ()
    # What a model for this task calls its labels; and that a packed base may be trained, for the adapters in it: both
    # are what transformers' Trainer looks for.
    labels: ClassVar[tuple[str, ...]] = ("labels",)
    _hf_peft_config_loaded: ClassVar[bool] = True
    special_peft_forward_args: ClassVar[frozenset[str]] = frozenset({"adapter_names", "alora_offsets"})

    base_model: Tuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: AnyConfig,
        adapter_name: str = DEFAULT_ADAPTER,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self._surround(model)
        self._inject(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage, activate=True)
        self._prepare_checkpointing()

    def _surround(self, model: nn.Module) -> None:
        if isinstance(model, PeftModel):
            raise PlanError("The model is a PeftModel already: call its add_adapter, or give its get_base_model().")
        tell_adapted(model, stacklevel=5)
        self.base_model = Tuner(model)
        self.training = model.training

    @classmethod
    def _around(cls, model: nn.Module) -> Self:
        """A handle without any adapter yet."""
        handle = cls.__new__(cls)
        nn.Module.__init__(handle)
        handle._surround(model)
        return handle

    def _inject(self, name: str, config: AnyConfig, autocast: bool, meta: bool, activate: bool) -> None:
        check_adapter_name(name, FORBIDDEN_NAMES)
        self._check_beside(name, config)
        tuner, trained = self.base_model, not config.inference_mode
        if isinstance(config, PromptLearningConfig):
            self._put_before(name, config, activate, trained)
            return
        with self._with_heads(config), replicated(tuner.model, ranges_left(self.peft_config, config)):
            prepared = prepare(tuner.model, config, adapter_name=name, replacing=not self.peft_config)
            for text in prepared.plan.warnings:
                warnings.warn(text, PeftWarning, stacklevel=5)
            apply(
                prepared, name, meta=meta, autocast=autocast, activate=activate, trainable=trained, router=tuner.router
            )
        tuner.add(name, config, prepared, activate)

    def _put_before(
        self,
        name: str,
        config: PromptLearningConfig,
        activate: bool,
        trained: bool,
        source: state.Source | None = None,
        strict: bool | None = None,
    ) -> LoadReport:
        """Puts a prompt before the model, fresh or as a file has it; on any error the model is as it was."""
        tuner, report = self.base_model, LoadReport()
        prompts = tuner.prompts or Prompts(tuner.model)
        with self._with_heads(config):
            fitted = config.fitted(prompts.host)
            prompt = (encoder_for if source is None else outline_for)(fitted, prompts.host)
            prompts.check(prompt, trained)
            prepared = prepare_saved(tuner.model, fitted.modules_to_save or ())
            tensors: Mapping[str, Tensor] = {}
            if source is not None:
                prompts.check_resumable(prompt, trained)
                base = tuner.model.__dict__.get("name_or_path")
                report, tensors = state.load_prompt(tuner.model, source, name, prompt, prepared, strict, base)
                prompt = encoder_for(fitted, prompts.host, fresh=False)
            if prepared.saved or not self.peft_config:
                apply(prepared, name, activate=activate, trainable=trained, router=tuner.router)
        with tuner.router.writing():
            state.take_prompt(tuner.model, name, prompt, tensors)
            config.spell_out(fitted)
            tuner.peft_config[name] = config
            tuner.prompts, self.prompt_encoder = prompts, prompts.encoders
            prompts.add(name, prompt, activate, trained)
            tuner._active = (name,) if activate else tuner._active
        return report

    @contextmanager
    def _with_heads(self, config: AnyConfig) -> Iterator[None]:
        """Adds the task's heads to what ``config`` trains whole; a failure inside takes them out again."""
        asked = config.modules_to_save
        listed = list(asked or ())
        if new := [n for n in self.heads if n not in listed]:
            config.modules_to_save = listed + new
        try:
            yield
        except BaseException:
            config.modules_to_save = asked
            raise

    def _check_beside(self, name: str, config: AnyConfig) -> None:
        """Raises `ConfigError` where the adapter cannot stand beside the model's others; a prompt can beside any."""
        if isinstance(config, PromptLearningConfig):
            return
        method = method_of(config)
        if config.invocation is not None:
            check_invocation(config.invocation, self.base_model.model)
        for one, standing in [] if self.mixed else [*self.peft_config.items()]:
            if not isinstance(standing, PromptLearningConfig) and method_of(standing) is not method:
                raise ConfigError(
                    "Cannot combine adapters with different peft types in a PeftModel: "
                    f"{name!r} is of {config.method} and {one!r} of {standing.method}. "
                    "Make the model with get_peft_model(..., mixed=True), or load it by PeftMixedModel."
                )
        check_biases({n: c for n, c in [*self.peft_config.items()] if n != name}, config)

    def _prepare_checkpointing(self) -> None:
        model = self.base_model.model
        # transformers' later name first: where both are there, the earlier one warns
        checkpointing = getattr(model, "is_activation_checkpointing", None)
        if checkpointing is None:
            checkpointing = getattr(model, "is_gradient_checkpointing", False)
        if checkpointing and not getattr(model, "is_loaded_in_8bit", False):
            self.prepare_model_for_gradient_checkpointing(model)

    @staticmethod
    def prepare_model_for_gradient_checkpointing(model: nn.Module) -> nn.Module:
        """Has the embeddings' output want a gradient, without which reentrant checkpoints pass none on.

        Args:
            model (`nn.Module`): A transformers model or a handle around one; any other stays as it is.
        """
        enable = getattr(model, "enable_input_require_grads", None)
        if callable(enable):
            enable()
        return model

    # ------------------------------------------------------------------ calls

    @PassesOn
    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model.

        Args:
            args, kwargs: The model's own.
            adapter_names (`Sequence[str]`, *optional*): One adapter for each row of the batch; ``"__base__"`` runs the
                frozen model.
            alora_offsets (`Sequence[int]`, *optional*): On how many of its last tokens an activated adapter acts in
                each row (None: on none), instead of seeking its invocation.

        Raises:
            UnknownAdapterError: A name that is no adapter.
            RowsError: Not one name or offset per row, or a module's rows are not the batch's.
        """
        compiled = adapter_names is None and torch.compiler.is_compiling()
        if compiled and self.base_model.invocations is not None:
            raise RoutingError(
                "A handle with activated adapters cannot be compiled: call get_base_model().compile(), and the handle "
                "as before."
            )
        with nullcontext() if compiled else self._call(adapter_names, args, kwargs, (), alora_offsets):
            return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Mapping[str, Any], generating: bool = False) -> Any:
        tuner = self.base_model
        prompts, model, route = tuner.prompts, tuner.model, None
        if prompts is not None or tuner.invocations is not None:  # they are at the model's edge
            route = tuner.router.route()
        choice = None if prompts is None else prompts.choice(route)
        if prompts is None or choice is None:
            outputs = (model.generate if generating else model)(*args, **kwargs)  # type: ignore[operator]
        else:
            outputs = (prompts.generate if generating else prompts.forward)(choice, args, kwargs)
        outputs = outputs if generating else tuner.with_loss(outputs)
        if tuner.invocations is not None:
            tuner.invocations.remember(route, args, kwargs, generating, outputs)
        return outputs

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own ``generate``; ``adapter_names`` and ``alora_offsets`` have an entry for each prompt."""
        configs = (kwargs.get("generation_config"), getattr(self.base_model.model, "generation_config", None))
        names = ("num_beams", "num_return_sequences")
        repeats = [kwargs.get(k) or next((n for c in configs if (n := getattr(c, k, None))), 1) for k in names]
        with self._call(adapter_names, args, kwargs, repeats, alora_offsets):
            return self._run(args, kwargs, generating=True)

    def session(self, ids: Sequence[int] | Tensor = (), past_key_values: Any = None, **kwargs: Any) -> Session:
        """A conversation in which the base and its adapters share one cache: see `inlay.Session`."""
        return Session(self, ids, past_key_values, **kwargs)

    @contextmanager
    def _call(
        self,
        names: Sequence[str] | None,
        args: Any,
        kwargs: Mapping[str, Any],
        repeats: Sequence[int],
        offsets: Sequence[int | None] | None,
    ) -> Iterator[None]:
        tuner, router = self.base_model, self.base_model.router
        with router.call(None if names is None else Route(rows=self._rows(names, args, kwargs, repeats))):
            chosen = router.route()
            if chosen is not None:
                tuner.check_known(chosen.names)
            if self.training and torch.is_grad_enabled():
                self._bind_checkpoints(router)
            if tuner.invocations is None:
                yield
                return
            choice = None if tuner.prompts is None else tuner.prompts.choice(chosen)
            prompt = 0 if choice is None else choice.length
            active = tuner._active if tuner.enabled else ()
            with router.call(tuner.invocations.route(chosen, active, args, kwargs, offsets, bool(repeats), prompt)):
                yield

    def _rows(self, names: Sequence[str], args: Any, kwargs: Mapping[str, Any], repeats: Sequence[int]) -> Rows:
        if isinstance(names, str):
            raise RowsError(
                f"adapter_names must hold one name per row, got the str {names!r}: write [{names!r}] * batch."
            )
        if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
            raise RowsError(f"adapter_names must hold one name per row, got {names!r}.")
        if unknown := sorted({n for n in names if n != BASE and n not in self.peft_config}):
            raise UnknownAdapterError(
                f"adapter_names has non-existing adapter(s): {', '.join(unknown)}; there are {list(self.peft_config)}."
            )
        batch = next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        if batch is not None and batch != len(names):
            raise RowsError(
                "Length of `adapter_names` should be that of the batch, a name for each row: got "
                f"{len(names)} names for a batch of {batch} rows."
            )
        return Rows.of(tuple(names), tuple({1, math.prod(repeats), *repeats}))

    def _bind_checkpoints(self, router: Router) -> None:
        for _, module in own_modules(self.base_model.model):
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Bound):
                setattr(module, "_gradient_checkpointing_func", Bound(function, router))  # noqa: B010  (no module)

    def bind(self, function: Any) -> Any:
        """``function`` with the adapters chosen now, wherever it runs: for ``checkpoint(model.bind(f), x)``."""
        return self.base_model.router.bind(function)

    @contextmanager
    def use_adapter(self, adapter_name: str | Sequence[str]) -> Iterator[None]:
        """Runs with these adapters inside the ``with``, in the calling thread and task only.

        Args:
            adapter_name (`str` or `Sequence[str]`): Which.

        Raises:
            UnknownAdapterError: One of them does not exist.
        """
        names = as_names(adapter_name)
        self.base_model.check_known(names)
        with self.base_model.router.choose(Route(names)):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Runs the frozen model inside the ``with``, in the calling thread and task only; merged stays merged.

        Biases that an adapter trains (``bias``) stay as they are, with a warning: all adapters share them.
        """
        self.base_model.tell_biases(stacklevel=4)
        with self.base_model.router.choose(Route(())):
            yield

    # ------------------------------------------------------------------ adapters

    @property
    def peft_config(self) -> dict[str, AnyConfig]:
        """Configs by adapter name."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that run by default."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The first of them."""
        return next(iter(self.base_model._active), DEFAULT_ADAPTER)

    @property
    def active_peft_config(self) -> AnyConfig:
        """Its config."""
        self.base_model.check_known([self.active_adapter])
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a forward would use an adapter."""
        route = self.base_model.router.route()
        if route is not None and route.rows is not None:
            route = Route(route.rows.names)
        if self.base_model.prompts is not None and self.base_model.prompts.choice(route) is not None:
            return True
        return any(
            layer._run if route is None else route.run(layer, layer._run, layer.methods)
            for _, layer in self.base_model.layers()
        )

    @property
    def peft_type(self) -> Any:
        """The method of the active adapter."""
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that are trained whole."""
        return {n for config in [*self.peft_config.values()] for n in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The model's own dtype."""
        return getattr(self.base_model.model, "dtype", None)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AnyConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a fresh adapter, which `set_adapter` then activates.

        Args:
            adapter_name (`str`): Its name.
            peft_config (`AdapterConfig`): What to put in.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Leave it on the meta device, to be loaded.
            autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): Keep it in fp32 on a 16-bit model.

        Raises:
            DuplicateAdapterError: The name is in use.
            ConfigError: The config is of another method than the model's adapters.
            PlanError: The config does not fit the model.
        """
        if adapter_name in self.peft_config:
            raise DuplicateAdapterError(
                f"Adapter with name {adapter_name!r} already exists: choose another name, or delete it."
            )
        self._inject(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage, not self.peft_config)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter the default for all threads; see `Tuner.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; see `Tuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains or freezes adapters, active or not.

        Raises:
            WrongMethodError: All adapters are prompts, which are trained while they are active.
        """
        if self.base_model.only_prompts:
            raise WrongMethodError(
                "Setting `requires_grad` is not supported for prompts: set_adapter trains the one that it activates."
            )
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def hotswap_slots(self, max_rank: int | None = None, targets: Any = None, adapter_name: str | None = None) -> None:
        """Makes room for adapters that are not known yet, to be swapped in by `inlay.hotswap` under compiled code.

        Call it before compiling; outputs stay as they are.

        Args:
            max_rank (`int`, *optional*): Rank of the largest of them; the ranks stay as they are if not given.
            targets (`list[str]` or `str`, *optional*): Layers that any of them adapts, as ``target_modules`` names
                them; those that are adapted already if not given.
            adapter_name (`str`, *optional*): The adapter whose place they will take; all if not given.

        Raises:
            UnknownAdapterError: There is no such adapter.
            HotswapError: The model is compiled, or an adapter's rank is above ``max_rank``. Nothing was changed.
            PlanError: ``targets`` does not fit the model.
        """
        names = list(self.peft_config) if adapter_name is None else [adapter_name]
        self.base_model.check_known(names)
        if found := slots.compiled(self):
            raise HotswapError(f"{found} is compiled already: make room first, then compile it.")
        configs = {n: c for n in names if isinstance(c := self.peft_config[n], AdapterConfig)}
        slots.prepare(self.base_model.model, max_rank, configs, targets)

    def get_base_model(self) -> nn.Module:
        """The user's model, with the wrappers inside."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters; a packed parameter counts the weights it stands for."""
        trainable = total = 0
        for parameter, storage in stored_parameters(self):
            n = storage.numel(parameter) or int(getattr(parameter, "ds_numel", 0))
            total += n
            trainable += n if parameter.requires_grad else 0
        return trainable, total

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The status of every adapted layer."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The status of the model as a whole."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = DEFAULT_ADAPTER) -> bool:
        """Whether an adapter can be turned into a LoRA: none can, yet."""
        return False

    def print_trainable_parameters(self) -> None:
        """Prints them."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # ------------------------------------------------------------------ prompts

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The active prompt as it stands before a batch.

        Args:
            batch_size (`int`): B.
            task_ids (`Tensor`, *optional*): (B,), for prompts that depend on the task.
            max_cache_len (`int`, *optional*): For a prompt in the cache: give a cache of this fixed length.

        Returns:
            `Tensor` or a cache: Embeddings (B, T, D); or keys and values in a cache of transformers.

        Raises:
            PromptError: The active adapter is no prompt.
        """
        prompt, prompts = state.prompt_of(self, self.active_adapter), self.base_model.prompts
        if prompt is None or prompts is None:
            raise PromptError(f"The active adapter {self.active_adapter!r} is no prompt: set one that is.")
        return prompts.standing(prompt, batch_size, task_ids, max_cache_len)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What files hold of a prompt: its embeddings, or its keys and values, flat.

        Raises:
            UnknownAdapterError: There is no such prompt.
        """
        prompt = state.prompt_of(self, adapter_name)
        if prompt is None:
            raise UnknownAdapterError(f"There is no prompt {adapter_name!r}; there are {list(self.prompt_tokens)}.")
        return prompt.filed()[EMBEDDINGS].detach().cpu()

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """The numbers of the virtual tokens of each prompt."""
        configs = self.peft_config.items()
        return {name: torch.arange(c.tokens) for name, c in configs if isinstance(c, PromptLearningConfig)}

    @property
    def word_embeddings(self) -> nn.Module:
        """The model's input embeddings."""
        found: nn.Module = self.base_model.model.get_input_embeddings()  # type: ignore[operator]
        return found

    # ------------------------------------------------------------------ files

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves adapters: ``"default"`` into the directory itself, any other into a folder of its name.

        Args:
            save_directory (`str` or `Path`): Where; made if absent.
            safe_serialization (`bool`, *optional*, defaults to `True`): safetensors; a pickle otherwise.
            selected_adapters (`list[str]`, *optional*): Which; all if not given.
            save_embedding_layers (`bool` or `str`, *optional*, defaults to `"auto"`): See `get_peft_model_state_dict`.
            is_main_process (`bool`, *optional*, defaults to `True`): Only the main process writes.
            path_initial_model_for_weight_conversion (`str`, *optional*): Folder of the adapter that training began
                with, where it has been taken out of the base by other means than ``init_lora_weights``: what is saved
                is the difference. Adapters that record their start are saved so without being asked. Of LoftQ it
                is what training has changed of the original model: its quantised base is no LoRA.
            state_dict (`Mapping[str, Tensor]`, *optional*): Take tensors from here, by live name.
            kwargs: What callers of other models give (``max_shard_size``, ``save_function``, ...) is accepted.

        Raises:
            UnknownArgumentError: A keyword is none of these.
            UnwritableError, MissingFileError: The directory is a file or cannot be written, or its name is empty.
            UnknownAdapterError: A selected adapter does not exist.
            ConfigError: ``path_initial_model_for_weight_conversion`` is given, and the method knows no such start.
            LoadError, FileError: The folder does not hold the same adapter.
        """
        sources.check_arguments(self.save_pretrained, kwargs, sources.SAVING)
        names = self._selected(selected_adapters)
        initial = path_initial_model_for_weight_conversion
        directory = folder_to_write(save_directory)
        if not is_main_process:
            return
        text = card.text(directory, self.peft_config[names[0]], self.base_model.model) if names else None
        start = None if initial is None else state.load_peft_weights(initial)
        for name in names:
            tensors = state.get_peft_model_state_dict(
                self, state_dict, name, save_embedding_layers=save_embedding_layers, initial=start
            )
            config = state.saved_config(self, name, converted=start is not None)
            model = self.base_model.model
            write_adapter(adapter_dir(directory, name), model, name, config, tensors, safe_serialization)
        if text is not None:
            files.save_text(directory / card.NAME, text)

    def _selected(self, adapters: Iterable[str] | None) -> list[str]:
        if isinstance(adapters, str):
            raise AdapterNameError(f"selected_adapters must be a list: write [{adapters!r}].")
        names = list(self.peft_config if adapters is None else adapters)
        if strange := [name for name in names if name not in self.peft_config]:
            raise UnknownAdapterError(
                f"You passed an invalid `selected_adapters` argument: there are {list(self.peft_config)}, and not "
                f"{strange}."
            )
        return names

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Writes ``README.md`` with the metadata that the hub reads, or updates the one that is there."""
        name = next(iter(self.peft_config), None)
        if name is not None:
            text = card.text(Path(output_dir), self.peft_config[name], self.base_model.model)
            files.save_text(Path(output_dir) / card.NAME, text)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Saves all adapters to a repository on the hub.

        Args:
            repo_id (`str`): ``user/name``.
            kwargs: ``commit_message``, ``private``, ``token``, ``revision``, ``create_pr`` for the hub;
                ``safe_serialization`` for `save_pretrained`.

        Returns:
            The hub client's description of the commit.
        """
        from inlay.integrations import hub

        safe = bool(kwargs.pop("safe_serialization", True))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe)
            return hub.push(Path(folder), repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Loads a saved adapter onto ``model``.

        Args:
            model (`nn.Module`): The base model; it is changed in place.
            model_id (`str` or `Path`): A directory, or an id on the hub.
            adapter_name (`str`, *optional*, defaults to `"default"`): What to call it here.
            is_trainable (`bool`, *optional*, defaults to `False`): Whether to train it on.
            config (`PeftConfig`, *optional*): Stands in for the file's.
            autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): Keep it in fp32 on a 16-bit model.
            ephemeral_gpu_offload, low_cpu_mem_usage (`bool`): Accepted; the fast path is the only one.
            key_mapping (`Mapping[str, str]`, *optional*): Regex -> replacement, for keys of another naming.
            strict (`bool`, *optional*): Raise for what would silently change results; `inlay.settings` if not given.
            kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ...

        Returns:
            `PeftModel`: Of the class that the config's task type names; the report is its ``load_report``.

        Raises:
            UnknownArgumentError: A keyword is neither the loader's nor the hub's.
            LoadError, FileError, PlanError, ConfigError: It cannot be used; the model is as it was.
        """
        if config is not None and not isinstance(config, AnyConfig):
            raise ConfigError(f"config must be an adapter's config, got {type(config).__name__}.")
        sources.check_arguments(cls.from_pretrained, kwargs, sources.LOADING)
        source = _open(model_id, config, kwargs)
        with source.weights:
            handle = (handle_class(source.config) if cls is PeftModel else cls)._around(model)
            handle._load(
                source, adapter_name, is_trainable, autocast_adapter_dtype, key_mapping, strict, True, **kwargs
            )
        handle._prepare_checkpointing()
        if not is_trainable:
            handle.eval()
        return handle

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Loads another saved adapter, which `set_adapter` then activates.

        An adapter of the same name and config is given the file's values in place, and is trained on if it was before.

        Args:
            model_id (`str` or `Path`): A directory, or an id on the hub.
            adapter_name (`str`): What to call it here.
            is_trainable (`bool`, *optional*, defaults to `False`): Whether to train it on.
            torch_device (`str`, *optional*): Accepted; an adapter lives where its layer does.
            autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): Keep it in fp32 on a 16-bit model.
            ephemeral_gpu_offload, low_cpu_mem_usage (`bool`): Accepted; the fast path is the only one.
            key_mapping (`Mapping[str, str]`, *optional*): Regex -> replacement, for keys of another naming.
            strict (`bool`, *optional*): Raise for what would silently change results; `inlay.settings` if not given.
            kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ...; ``ignore_mismatched_sizes``.

        Returns:
            `LoadReport`: What file and model disagree on.

        Raises:
            UnknownArgumentError: A keyword is neither the loader's nor the hub's.
            LoadError, FileError, PlanError, ConfigError, DuplicateAdapterError: The model is as it was.
        """
        sources.check_arguments(self.load_adapter, kwargs, sources.LOADING)
        source = _open(model_id, None, kwargs)
        with source.weights:
            report = self._load(
                source, adapter_name, is_trainable, autocast_adapter_dtype, key_mapping, strict, False, **kwargs
            )
        if not is_trainable:
            self.eval()
        return report

    def _load(
        self,
        source: state.Source,
        name: str,
        trainable: bool,
        autocast: bool,
        key_mapping: Mapping[str, str] | None,
        strict: bool | None,
        activate: bool,
        **kwargs: Any,
    ) -> LoadReport:
        config, model = source.config, self.base_model.model
        if not isinstance(config, AnyConfig):
            raise ConfigError(f"{source.directory} holds a {type(config).__name__}, which adapts no layer.")
        check_adapter_name(name, FORBIDDEN_NAMES)
        config = config.as_loaded()
        config.inference_mode = not trainable
        if name in self.peft_config:
            return self._reload(source, name, config, trainable, key_mapping, strict)
        self._check_beside(name, config)
        if isinstance(config, PromptLearningConfig):
            report = self._put_before(name, config, activate, trainable, source, strict)
        else:
            with self._with_heads(config), replicated(model, ranges_left(self.peft_config, config)):
                report, prepared = state.load_into(
                    model,
                    source,
                    name,
                    config=config,
                    strict=strict,
                    trainable=trainable,
                    autocast=autocast,
                    activate=activate,
                    key_mapping=key_mapping or getattr(model, "_checkpoint_conversion_mapping", None),
                    ignore_mismatched_sizes=bool(kwargs.get("ignore_mismatched_sizes", False)),
                    base_name=model.__dict__.get("name_or_path"),
                    router=self.base_model.router,
                    present=partial(_present_names, model),
                    replacing=not self.peft_config,
                )
            self.base_model.add(name, config, prepared, activate)
            state.name_live(report, self, name, source.weights.header)
        if trainable:
            self.base_model.set_requires_grad(name)
        self.__dict__["load_report"] = report
        return report

    def _reload(
        self,
        source: state.Source,
        name: str,
        config: AnyConfig,
        trainable: bool,
        key_mapping: Mapping[str, str] | None,
        strict: bool | None,
    ) -> LoadReport:
        state.check_same(self, config, name)
        if (prompt := state.prompt_of(self, name)) is not None:
            Prompts.check_resumable(prompt, trainable)
        with self.base_model.router.writing():
            report = state.reload(self, source, name, key_mapping, strict)
        if trainable and name in self.active_adapters:
            self.base_model.set_requires_grad(name)
        state.name_live(report, self, name, source.weights.header)
        return report

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in HOOK_NAMES or name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)


def _present_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """What transformers calls the modules that keys name by now, where it has moved them."""
    if "transformers.conversion_mapping" not in sys.modules:  # there since its version 5, and with every model of it
        return {}
    from inlay.integrations import conversion

    return conversion.present_names(model, keys)


def _open(model_id: str | Path, config: PeftConfig | None, kwargs: dict[str, Any]) -> state.Source:
    hub, _ = sources.split_hub_arguments(kwargs)
    directory = sources.locate(model_id, subfolder=kwargs.get("subfolder"), **hub)
    return state.open_source(directory, config)


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head is trained and saved with them."""

    heads = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; its head is trained and saved with them."""

    heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """A span predictor with adapters; its head is trained and saved with them."""

    heads = ("qa_outputs",)
    labels = ("start_positions", "end_positions")


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder with adapters."""


class PeftMixedModel(PeftModel):
    """A model with adapters of several methods: any layer method beside any other, on the same layers too.

    Active adapters run in the order of `set_adapter`: what changes a layer's input (OFT) first, then the layer, then
    what changes its output. Merging gives the same function.
    """

    mixed = True

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Removes an adapter or several; see `Tuner.delete_adapter`."""
        names = as_names(adapter_name)
        self.base_model.check_deletable(names)
        for name in names:
            self.base_model.delete_adapter(name)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def handle_class(config: PeftConfig) -> type[PeftModel]:
    """The class of the handle for a config's task."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(getattr(config.task_type, "value", config.task_type)), PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: AnyConfig,
    adapter_name: str = DEFAULT_ADAPTER,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Puts a fresh adapter into ``model``.

    Args:
        model (`nn.Module`): The model; it is changed in place, and every parameter but the adapter's is frozen.
        peft_config (`AdapterConfig` or `PromptLearningConfig`): The adapter's config, such as `LoraConfig`.
        adapter_name (`str`, *optional*, defaults to `"default"`): Its name.
        mixed (`bool`, *optional*, defaults to `False`): Give a `PeftMixedModel`, which may hold several methods.
        autocast_adapter_dtype (`bool`, *optional*, defaults to `True`): Keep it in fp32 on a 16-bit model.
        revision (`str`, *optional*): Revision of the base model, for the config.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Leave it on the meta device, to be loaded.

    Returns:
        `PeftModel`: Of the class that ``peft_config.task_type`` names.

    Raises:
        PlanError: The config does not fit the model, which is as it was.
        AdapterNameError: The name cannot be used, or is in use.

    Example:
        >>> import torch, inlay
        >>> model = inlay.get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 3)), inlay.LoraConfig(target_modules=["0"])
        ... )
        >>> model.active_adapter
        'default'
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(peft_config, AnyConfig):
        raise ConfigError(
            f"peft_config must be a method's config, such as LoraConfig, got {type(peft_config).__name__}."
        )
    name = model.__dict__.get("name_or_path") or None
    for text in _used_before(model, name, peft_config, revision):
        warnings.warn(text, PeftWarning, stacklevel=2)
    peft_config.revision = peft_config.revision if revision is None else revision
    cls = PeftMixedModel if mixed else handle_class(peft_config)
    handle = cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    peft_config.base_model_name_or_path = name
    return handle


def _used_before(model: nn.Module, name: str | None, config: AnyConfig, revision: str | None) -> Iterator[str]:
    """What to warn of where a config or a model comes from another adapter."""
    old = config.base_model_name_or_path
    if old not in (None, name):
        yield f"The config names its base model {old!r}; it is {name!r} now."
    if any(True for _ in wrappers(model)):
        yield (
            "The model is modified with PEFT for a second time. To have this adapter alone, call unload() on the "
            "first handle before; to have it beside others, its add_adapter: a new handle does not list them."
        )
    if None not in (revision, config.revision) and config.revision != revision:
        yield f"revision {config.revision!r} becomes {revision!r}."


class _Configs(dict[str, Any]):
    """``peft_config`` of a model that someone else owns.

    diffusers takes an adapter out of it after a load that failed, whether or not it had come in: that may not hide
    why the load failed.
    """

    def pop(self, name: str, default: Any = None) -> Any:
        return super().pop(name, default)


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = DEFAULT_ADAPTER,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Puts an adapter into a model that someone else owns, without a handle around it.

    Args:
        peft_config (`AdapterConfig`): The adapter's config.
        model (`nn.Module`): The model; it is changed in place and gets ``peft_config``.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter's name, active afterwards.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Leave it on the meta device, to be loaded.
        state_dict (`Mapping[str, Tensor]`, *optional*): Adapt the layers that its keys name, not the config's.

    Returns:
        `nn.Module`: ``model``.

    Raises:
        ConfigError: It is of a prompt, or an activated adapter's: these need a handle.
        PlanError: The config does not fit the model, which is as it was; or it is a `PeftModel`, which adds its own.
        AdapterNameError: The name cannot be used.
    """
    if isinstance(model, PeftModel):
        raise PlanError("The model is a PeftModel: call its add_adapter, so that it knows of the adapter.")
    tell_adapted(model)
    return put_into(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)


def put_into(
    model: nn.Module, config: AdapterConfig, name: str, meta: bool = False, state_dict: Iterable[str] | None = None
) -> nn.Module:
    """`inject_adapter_in_model` for who knows that the model has others."""
    check_adapter_name(name, FORBIDDEN_NAMES)
    check_injectable(config)
    to_be_read, config.read_by_transformers = config.read_by_transformers, False
    only = None if state_dict is None else layers_in(state_dict, config)
    configs: dict[str, AdapterConfig] = model.__dict__.get("peft_config") or _Configs()
    with replicated(model, ranges_left(configs, config)):
        prepared = prepare(model, config, only=only, adapter_name=name, replacing=True)
        if to_be_read:
            check_at_hand(prepared)
        disagreement = () if only is None else told_by_config(prepared)
        for text in (*prepared.plan.warnings, *disagreement):
            warnings.warn(text, PeftWarning, stacklevel=3)
        trainable = not config.inference_mode
        trained = [(p, True) for _, w in wrappers(model) for p in w.parameters() if p.requires_grad]
        apply(prepared, name, meta=meta, autocast=False, trainable=trainable)
        unmerge_first(model, stacklevel=3)
        for _, wrapper in wrappers(model):
            wrapper.set_adapter(name, inference_mode=not trainable)
        train_again(model, trained)
    with_targets(config, prepared)
    configs[name] = config
    model.peft_config = configs  # type: ignore[assignment]
    return model


def train_again(model: nn.Module, trained: Iterable[tuple[nn.Parameter, bool]]) -> None:
    """Has parameters be trained or frozen as they were before an adapter came: their owner decides."""
    for parameter, was in trained:
        parameter.requires_grad_(was)
    for _, layer in adapted_layers(model):
        layer.note_trained()


def tell_adapted(model: nn.Module, stacklevel: int = 3) -> None:
    """Warns where an adapter is put into a model that has some, outside of the handle that may know of these."""
    if any(True for _ in wrappers(model)):
        text = (
            "Already found a `peft_config`, or adapters in the layers of the model: the new one stands beside them, "
            "or takes the place of one of its name."
        )
        warnings.warn(text, PeftWarning, stacklevel)


def check_injectable(config: object) -> AdapterConfig:
    """The config; raises `ConfigError` for what is none of layers, or of an adapter that only a handle can run."""
    if isinstance(config, PromptLearningConfig):
        raise ConfigError(
            f"{type(config).__name__}: a model without a handle does not support prompt learning, whose prompts stand "
            f"before the model and in no layer. Use get_peft_model for {config.method}."
        )
    if not isinstance(config, AdapterConfig):
        raise FieldTypeError(f"A method's config is needed, such as LoraConfig; got {type(config).__name__}.")
    method_of(config)
    if config.invocation is not None:
        raise ConfigError("An activated adapter needs a handle, which finds its invocation: use get_peft_model.")
    return config


def ranges_left(others: Mapping[str, AnyConfig], config: AnyConfig) -> list[tuple[int, int]] | None:
    """The layers still to be replicated: the first adapter that asks for it does it for all."""
    done = any(other.layer_replication for other in [*others.values()])
    return None if done else config.layer_replication


def check_biases(others: Mapping[str, AnyConfig], config: AnyConfig) -> None:
    """Raises `ConfigError` where an adapter would train biases that one of the ``others`` trains."""
    found = [name for name, other in others.items() if other.bias != "none"]
    if config.bias != "none" and found:
        raise ConfigError(
            f"bias={config.bias!r} trains the model's own biases, which adapters share: one adapter may, and "
            f"{found[0]!r} does."
        )


def folder_to_write(directory: str | Path) -> Path:
    """A directory to save into; raises `MissingFileError` or `UnwritableError` for what can be none."""
    if not str(directory):  # a Path of it would be the working directory
        raise MissingFileError("The directory's name is empty: name a directory to save into.")
    if Path(directory).is_file():
        raise UnwritableError(f"{directory} should be a directory, not a file: name another place to save in.")
    return Path(directory)


def write_adapter(
    directory: Path, model: nn.Module, name: str, config: AnyConfig, tensors: Mapping[str, Tensor], safe: bool = True
) -> None:
    """Writes the two files of an adapter that stands in ``model``."""
    values = {**config.to_dict(), "inference_mode": True}
    if values["task_type"] is None:
        values["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    metadata = {BASE_KEY: state.live_fingerprint(model, name)}
    files.write_pair(directory, values, tensors, metadata, safe_serialization=safe)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that ``config_dict["peft_type"]`` names, made of the rest.

    Raises:
        WrongMethodError, UnknownMethodError: There is no method of this name.
        UnknownFieldError: A key is no field of its config.

    Example:
        >>> get_peft_config({"peft_type": "LORA", "r": 4}).r
        4
    """
    cls = PeftConfig.named_in(config_dict)
    return cls(**{name: value for name, value in config_dict.items() if name != "peft_type"})
