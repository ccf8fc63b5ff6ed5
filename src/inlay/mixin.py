"""The verbs of a handle for a model that someone else owns: its class has them, and its forward stays its own.

They are called what transformers calls them on its models. All that a model keeps of them is what transformers keeps
too: ``peft_config`` and ``_hf_peft_config_loaded``.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from inlay import sources, state
from inlay.config import AdapterConfig, PeftConfig
from inlay.errors import ConfigError, DuplicateAdapterError, PeftWarning, UnknownAdapterError
from inlay.formats import files
from inlay.formats.peft import DEFAULT_ADAPTER, PREFIX
from inlay.model import (
    check_biases,
    check_injectable,
    folder_to_write,
    put_into,
    ranges_left,
    train_again,
    write_adapter,
)
from inlay.replicate import replicated
from inlay.report import LoadReport
from inlay.tuner import Tuner, as_names
from inlay.walk import wrappers
from inlay.works import with_targets

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

# Held while a model gets its first adapter: it has no router yet by which changes take turns.
_FIRST = threading.RLock()


@contextmanager
def _changing(model: nn.Module) -> Iterator[None]:
    """One change of a model at a time, whichever thread makes it."""
    with _FIRST:
        router = next((wrapper.router for _, wrapper in wrappers(model)), None)
        if router is None:
            yield
            return
    with router.writing():
        yield


class AdapterMixin(_Module):
    """Adapters as methods of your own class: ``class Net(inlay.AdapterMixin, nn.Module)``.

    For every method that adapts layers. Prompts and activated adapters need a handle: `inlay.get_peft_model`.

    Example:
        >>> import torch, inlay
        >>> class Net(inlay.AdapterMixin, torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lin = torch.nn.Linear(4, 3)
        ...
        ...     def forward(self, x):
        ...         return self.lin(x)
        >>> net = Net()
        >>> net.add_adapter(inlay.LoraConfig(r=2, target_modules=["lin"]), "style")
        >>> net.active_adapters()
        ['style']
        >>> sorted(net.get_adapter_state_dict())
        ['lin.lora_A.weight', 'lin.lora_B.weight']
    """

    peft_config: dict[str, AdapterConfig]
    _hf_peft_config_loaded: bool = False

    # ------------------------------------------------------------------ in

    def add_adapter(self, adapter_config: AdapterConfig, adapter_name: str | None = None) -> None:
        """Puts in a fresh adapter, which is active and trained from then on; all else is frozen.

        Args:
            adapter_config (`AdapterConfig`): What to put in, such as a `LoraConfig`.
            adapter_name (`str`, *optional*, defaults to `"default"`): Its name.

        Raises:
            FieldTypeError, ConfigError: It is no method's config, or one of a prompt or an activated adapter.
            DuplicateAdapterError: The name is in use.
            PlanError: The config does not fit the model. In all cases the model is as it was.
        """
        name = self._free(adapter_name)
        with _changing(self):
            self._checked(adapter_config)
            put_into(self, adapter_config, name)
            self._take_up(name, adapter_config, trained=True)

    def load_adapter(
        self,
        peft_model_id: str | Path | None = None,
        adapter_name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        device_map: Any = None,
        max_memory: dict[Any, Any] | None = None,
        offload_folder: str | Path | None = None,
        offload_index: Any = None,
        peft_config: PeftConfig | dict[str, Any] | None = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        adapter_kwargs: dict[str, Any] | None = None,
        *,
        strict: bool | None = None,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Loads a saved adapter, which is active from then on.

        Args:
            peft_model_id (`str` or `Path`, *optional*): A directory, or an id on the hub.
            adapter_name (`str`, *optional*, defaults to `"default"`): What to call it here.
            revision, token (`str`, *optional*): As the hub's client takes them.
            device_map, max_memory, offload_folder, offload_index: Have accelerate lay the model out anew afterwards,
                as its ``dispatch_model`` does. Without them an adapter lives where its layer runs.
            peft_config (`PeftConfig` or `dict`, *optional*): Stands in for the config of the files.
            adapter_state_dict (`Mapping[str, Tensor]`, *optional*): Stands in for their tensors; they are copied.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Accepted; the fast path is the only one.
            is_trainable (`bool`, *optional*, defaults to `False`): Whether to train it on. Otherwise every adapter is
                frozen, and the model is set to evaluation mode.
            adapter_kwargs (`dict`, *optional*): What ``kwargs`` are too, in a dictionary.
            strict (`bool`, *optional*): Raise for what would silently change results; `inlay.settings` if not given.
            key_mapping (`Mapping[str, str]`, *optional*): Regex -> replacement, for keys of another naming.
            kwargs: ``subfolder``, ``cache_dir``, ``local_files_only``, ...

        Returns:
            `LoadReport`: What file and model disagree on.

        Raises:
            ConfigError: There is nothing to load, or it needs a handle.
            UnknownArgumentError: A keyword is neither the loader's nor the hub's.
            DuplicateAdapterError: The name is in use.
            LoadError, FileError, PlanError: It cannot be used. In all cases the model is as it was.
        """
        name = self._free(adapter_name)
        given = {"revision": revision, "token": token, **(adapter_kwargs or {}), **kwargs}
        sources.check_arguments(self.load_adapter, given, sources.LOADING)
        layout = (device_map, max_memory, offload_folder, offload_index)
        laid_out = self._laid_out(name, *layout) if any(part is not None for part in layout) else nullcontext()
        source = _source(peft_model_id, peft_config, adapter_state_dict, given)
        with source.weights, _changing(self), laid_out:
            config = self._checked(source.config).as_loaded()
            with replicated(self, ranges_left(self._configs, config)):
                report, prepared = state.load_into(
                    self,
                    source,
                    name,
                    config=config,
                    strict=strict,
                    trainable=is_trainable,
                    autocast=False,
                    activate=True,
                    key_mapping=key_mapping,
                    base_name=self.__dict__.get("name_or_path"),
                )
            with_targets(config, prepared)
            config.inference_mode = not is_trainable
            self._take_up(name, config, is_trainable)
        if not is_trainable:
            self.eval()
        return report

    @contextmanager
    def _laid_out(
        self, name: str, device_map: Any, max_memory: Any, offload_folder: Any, offload_index: Any
    ) -> Iterator[None]:
        """Has accelerate lay the model out as it is after the ``with``; where it cannot, ``name`` goes again."""
        from inlay.integrations import layout

        if device_map is None and max_memory is None:
            device_map = self.__dict__.get("hf_device_map")
        layout.check(self, device_map, offload_folder, offload_index)
        active = Tuner.inside(self).active_adapters
        trained = [(p, p.requires_grad) for p in self.parameters()]
        yield
        try:
            layout.lay_out(self, device_map, max_memory, offload_folder, offload_index)
        except BaseException:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PeftWarning)  # of another one that is active for a moment
                self.delete_adapter(name)
            if active:
                Tuner.inside(self).set_adapter(active)
            train_again(self, trained)
            raise

    def _free(self, adapter_name: str | None) -> str:
        name = DEFAULT_ADAPTER if adapter_name is None else adapter_name
        if name in self._configs:
            raise DuplicateAdapterError(f"Adapter {name!r} exists already: choose another name, or delete it first.")
        return name

    def _checked(self, config: PeftConfig) -> AdapterConfig:
        """The config of one more adapter, if nothing that stands in the model is against it."""
        checked = check_injectable(config)
        check_biases(self._configs, checked)
        for _, layer in Tuner.inside(self).layers():
            layer.check_unmerge()  # as activating another one will
        return checked

    def _take_up(self, name: str, config: AdapterConfig, trained: bool) -> None:
        config.base_model_name_or_path = self.__dict__.get("name_or_path") or config.base_model_name_or_path
        configs = self._configs
        configs[name] = config
        self.peft_config, self._hf_peft_config_loaded = configs, True
        verbs = Tuner.inside(self)
        verbs.set_adapter(name, inference_mode=not trained)
        verbs.set_requires_grad([other for other in configs if other != name], False)

    # ------------------------------------------------------------------ in use

    @property
    def _configs(self) -> dict[str, AdapterConfig]:
        return self.__dict__.get("peft_config") or {}

    def _verbs(self) -> Tuner:
        if not self._configs:
            raise UnknownAdapterError("No adapter is loaded: call add_adapter or load_adapter first.")
        return Tuner.inside(self)

    def _named(self, adapter_name: str | None) -> str:
        names = self.active_adapters() if adapter_name is None else [adapter_name]
        if not names:
            raise UnknownAdapterError(f"No adapter is active: name one of {list(self.peft_config)}.")
        self._verbs().check_known(names)
        return names[0]

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Makes adapters the ones that run and are trained; the others rest, frozen.

        Args:
            adapter_name (`str` or `list[str]`): Which; several run together, in this order. Where several have a copy
                of one module, such as a head, the first one's serves.

        Raises:
            UnknownAdapterError: There is none, or none of this name.
        """
        with _changing(self):
            self._verbs().set_adapter(adapter_name)

    def enable_adapters(self) -> None:
        """Switches the active adapters on again, after `disable_adapters`.

        Raises:
            UnknownAdapterError: There is none.
        """
        self._verbs().enable_adapter_layers()

    def disable_adapters(self) -> None:
        """Switches all adapters off: the model runs as it was, and nothing is trained.

        Biases that an adapter trains (``bias``) stay as they are, with a warning: all adapters share them.

        Raises:
            UnknownAdapterError: There is none.
        """
        self._verbs().disable_adapter_layers()

    def active_adapters(self) -> list[str]:
        """The adapters that run, unless they are switched off.

        Raises:
            UnknownAdapterError: There is none.
        """
        return self._verbs().active_adapters

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors, by the names that files have.

        Args:
            adapter_name (`str`, *optional*): Which; the first active one if not given.
            state_dict (`Mapping[str, Tensor]`, *optional*): Take the tensors from here, by live name, instead of from
                the model.

        Raises:
            UnknownAdapterError: There is none, or none of this name.
        """
        return state.get_peft_model_state_dict(self, state_dict, self._named(adapter_name))

    def save_adapter(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Saves an adapter as PEFT does: `load_adapter`, and any handle's ``from_pretrained``, loads it.

        Args:
            save_directory (`str` or `Path`): Where; made if absent.
            adapter_name (`str`, *optional*): Which; the first active one if not given.

        Raises:
            UnknownAdapterError: There is none, or none of this name.
            UnwritableError, MissingFileError: The directory is a file, has no name, or cannot be written.
        """
        name, directory = self._named(adapter_name), folder_to_write(save_directory)
        tensors = {PREFIX + key: t for key, t in state.get_peft_model_state_dict(self, adapter_name=name).items()}
        write_adapter(directory, self, name, state.saved_config(self, name), tensors)

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Removes adapters; without any left the model has its own layers again.

        Args:
            adapter_names (`str` or `list[str]`): Which. Where none of the active ones is left, another one becomes
                active, with a warning.

        Raises:
            UnknownAdapterError: There is none, or none of this name. Nothing is removed.
            PlanError: One of them is merged. Nothing is removed.
        """
        names = as_names(adapter_names)
        with _changing(self):
            verbs = self._verbs()
            verbs.check_deletable(names)
            resting_first = sorted(names, key=verbs.active_adapters.__contains__)  # none becomes active to be deleted
            for name in resting_first:
                verbs.delete_adapter(name)
            if not self.peft_config:
                verbs.unload()
                self.__dict__.pop("_hf_peft_config_loaded", None)


def _source(
    model_id: str | Path | None,
    config: PeftConfig | dict[str, Any] | None,
    tensors: Mapping[str, Tensor] | None,
    given: dict[str, Any],
) -> state.Source:
    """The adapter that these arguments of `load_adapter` name, opened."""
    if model_id is None and (tensors is None or config is None):
        raise ConfigError("Nothing to load: give peft_model_id, or both peft_config and adapter_state_dict.")
    if isinstance(config, dict):
        config = PeftConfig.from_dict(config, "peft_config")
    if config is not None:
        config = copy.deepcopy(check_injectable(config))
    hub, _ = sources.split_hub_arguments(given)
    directory = Path()
    if model_id is not None:
        directory = sources.locate(model_id, subfolder=given.get("subfolder"), weights=tensors is None, **hub)
    if tensors is None:
        return state.open_source(directory, config)
    config = config or PeftConfig.from_dict(files.read_config(directory), str(directory / files.CONFIG_NAME))
    return state.Source(directory, config, state.Given(tensors))
