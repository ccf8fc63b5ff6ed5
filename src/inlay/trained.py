"""Whole things trained in place, beside the adapters: copies of modules, and single tokens of an embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.activation import Tokens
from inlay.adapted import Adapted
from inlay.errors import RowsError, UnsupportedLayerError
from inlay.layers import LayerKind, kind_of
from inlay.methods._abstract import AbstractAdapter, Params, Slot
from inlay.routing import Route, Router, Rows
from inlay.storage import stored_parameters
from inlay.storage.placement import HOOK_NAMES, copied


class AuxiliaryTrainingWrapper(nn.Module):
    """What is trained beside the layers' adapters."""

    original_module: Any
    active_adapters: Any

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapters, of one the name alone, as PEFT has it here."""
        names: list[str] = self.active_adapters
        return names[0] if len(names) == 1 else names

    _active_adapter = active_adapter

    @property
    def _adapters(self) -> set[str]:
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Rest of a tensor's name in a file -> the rest of its live name, for the adapter's tensors in this module."""
        raise NotImplementedError

    def _running(self) -> nn.Module:
        """The module that has what is asked of the wrapper and not its own."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in HOOK_NAMES or not self.__dict__.get("_modules"):
                raise
            return getattr(self._running(), name)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module and, for each adapter, a copy that is trained in its stead.

    Of several active adapters with a copy, the first one's runs and is trained; the others' stay as they are.

    Args:
        module (`nn.Module`): The module, left as it is.
        router (`Router`): The routing of the model it stands in.
        path (`str`): Its name in the model, for messages.

    Raises:
        UnsupportedLayerError: The module is a container without a forward of its own.
    """

    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()

    def __init__(self, module: nn.Module, router: Router, path: str) -> None:
        super().__init__()
        self.check(module, path)
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.router = router
        self.path = path
        self.training = module.training
        self._active: tuple[str, ...] = ()
        self._enabled = True
        self._run: tuple[str, ...] = ()

    @staticmethod
    def check(module: nn.Module, path: str) -> None:
        """Raises `UnsupportedLayerError` for what cannot be copied and run in another's stead."""
        containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
        if isinstance(module, (*containers, Adapted, TrainableTokensWrapper)):
            raise UnsupportedLayerError(
                f"modules_to_save cannot be applied to modules of type {type(module).__name__}, as {path} is: name "
                "modules that have a forward and no adapter, such as a head."
            )
        packed = [storage.name for _, storage in stored_parameters(module) if not storage.in_place]
        if packed:
            raise UnsupportedLayerError(
                f"modules_to_save cannot hold {path}: its weights are packed ({packed[0]}) and cannot be trained. "
                "Load the model with this module left unpacked, or adapt it as a target."
            )

    def add(self, name: str) -> None:
        """Makes the adapter's copy, equal to the module."""
        own = copied(self.original_module)
        own.requires_grad_(False)
        self.modules_to_save[name] = own
        self._refresh()

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.modules_to_save:
            return {}
        own = self.modules_to_save[adapter_name]
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in own.state_dict()}

    def _serving(self) -> tuple[tuple[str, ...], Route | None]:
        """The adapters with a copy that are active for the whole batch, and the routing."""
        route = self.router.route()
        if route is not None and route.rows is not None:
            return (), route
        return self._run if route is None else route.run(self, self._run, self.modules_to_save._modules), route

    def copy_for(self, names: Iterable[str]) -> nn.Module:
        """The module that runs with these adapters: the copy of the first that has one, or the original."""
        return next((self.modules_to_save[n] for n in self._first(names)), self.original_module)

    def _first(self, names: Iterable[str]) -> list[str]:
        return [n for n in names if n in self.modules_to_save][:1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names, route = self._serving()
        rows, tokens = (None, None) if route is None else (route.rows, route.tokens)
        if rows is not None and any(n in self.modules_to_save for n in rows.names):
            return self._forward_rows(rows, tokens, *args, **kwargs)
        return self._forward_first(names, tokens, *args, **kwargs)

    def _forward_first(self, names: tuple[str, ...], tokens: Tokens | None, *args: Any, **kwargs: Any) -> Any:
        h = self.copy_for(names)(*args, **kwargs)
        if tokens is None or not names or names[0] not in tokens.starts:
            return h
        return tokens.applied(names[0], h, self._forward_first(names[1:], tokens, *args, **kwargs), self.path)

    def _forward_rows(self, rows: Rows, tokens: Tokens | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = rows.fitted(x.shape[0], x.device, self.path)
        h = h0 = self.original_module(x, *args, **kwargs)
        if not isinstance(h, Tensor) or h.shape[0] != x.shape[0]:
            raise RowsError(f"{self.path} does not give one result per row: adapter_names cannot reach its rows.")
        for name, at in zip(rows.names, rows.members, strict=True):
            if name in self.modules_to_save and len(at):
                h = h.index_copy(0, at, self.modules_to_save[name](x[at], *args, **kwargs).to(h.dtype))
        return h if tokens is None else tokens.applied("", h, h0, self.path)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes the first of these adapters' copies the default for all threads and trains it."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        first = self._first(names)
        self.set_requires_grad(set(self.modules_to_save).difference(first), False)
        self.set_requires_grad(first, not inference_mode)
        self._active = names
        self._refresh()

    def _refresh(self) -> None:
        run = tuple(n for n in self._active if n in self.modules_to_save) if self._enabled else ()
        if run != self._run:
            self.router.changing(self, self._run)
        self._run = run

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Trains or freezes copies."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.modules_to_save:
                for parameter in self.modules_to_save[name].parameters():
                    parameter.requires_grad_(requires_grad and parameter.is_floating_point())

    def enable_adapters(self, enabled: bool) -> None:
        """Switches to the original module or back, for all threads."""
        self._enabled = enabled
        self.set_requires_grad(self._first(self._active) if enabled else self._active, enabled)
        self._refresh()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Removes an adapter's copy; one that is not here is passed over."""
        if adapter_name in self.modules_to_save:
            self.router.changing(self, self._run, [adapter_name])
            del self.modules_to_save[adapter_name]
            self._active = tuple(n for n in self._active if n != adapter_name)
            self._refresh()
        if new_active_adapters:
            self.set_adapter(new_active_adapters)

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save)

    @property
    def active_adapters(self) -> list[str]:
        """Those of the default adapters that have a copy."""
        return [name for name in self._active if name in self.modules_to_save]

    @property
    def disable_adapters(self) -> bool:
        """Whether the original module runs, for all threads or the caller."""
        return not self._enabled or self.router.off

    def _running(self) -> nn.Module:
        return self.copy_for(self._serving()[0])


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding some of whose rows are trained; the layer with its adapter is at ``token_adapter``."""

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)

    def __init__(self, token_adapter: TrainableTokensLayer | TiedTokensLayer) -> None:
        super().__init__()
        self.token_adapter = token_adapter
        self.training = token_adapter.training

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.token_adapter(x)
        return h

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.token_adapter.methods:
            return {}
        name = "token_adapter.trainable_tokens_delta"
        return {name: f"{name}.{adapter_name}"}

    @property
    def _adapters(self) -> set[str]:
        return set(self.token_adapter.methods)

    @property
    def active_adapters(self) -> list[str]:
        """Those of the default adapters that train tokens."""
        return [name for name in self.token_adapter.active_adapters if name in self._adapters]

    @property
    def original_module(self) -> nn.Module:
        """The embedding itself."""
        return self.token_adapter.get_base_layer()

    def _running(self) -> nn.Module:
        return self.token_adapter


class TrainableTokensLayer(Adapted):
    """An embedding, and for each adapter the rows that it trains in the place of some of the embedding's."""

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """By adapter, which rows."""
        methods: dict[str, Any] = self.methods
        return {name: list(method.tokens) for name, method in methods.items()}

    @property
    def trainable_tokens_original(self) -> Mapping[str, Tensor]:
        """By adapter, what these rows are without it."""
        methods: dict[str, Any] = self.methods
        return {name: method.rows(self.matrix()) for name, method in methods.items()}


class Tied(Adapted):
    """A layer whose weight is another, adapted layer's too: it uses that one's tensors, seen from its own side."""

    def __init__(self, base_layer: nn.Module, kind: LayerKind, router: Router, path: str, source: Adapted) -> None:
        super().__init__(base_layer, kind, router, path, tied=True)
        self._source = (source,)  # in a tuple: a child here would be listed twice

    def add(
        self,
        name: str,
        method: AbstractAdapter,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        active: bool = False,
        trained: bool = False,
    ) -> None:
        self.methods[name] = method
        self._stacks.clear()
        if method.ties_whole:
            self._modules.update({s.name: self._source[0]._modules[s.name] for s in method.slots.values()})
        self._places[name] = tuple((k, s.name, s.leaf) for k, s in method.slots.items())
        self._active = (name,) if active else self._active
        self._refresh()

    def params(self, name: str) -> dict[str, Tensor]:
        own = self.methods[name].ties_whole
        return super().params(name) if own else self._turned(name, self._source[0].params(name))

    def _turned(self, name: str, p: Params) -> dict[str, Tensor]:
        """The other layer's tensors as this one takes them: a table's head has the transposed weight."""
        alike = self.kind.indexed == self._source[0].kind.indexed
        return dict(p if alike else self.methods[name].tied(p))

    def tensors(self, name: str) -> Iterator[tuple[Slot, nn.Module, str]]:
        return iter(())

    def delete_adapter(self, adapter_name: str) -> None:
        self.methods.pop(adapter_name, None)
        self._places.pop(adapter_name, None)
        self._active = tuple(n for n in self._active if n in self.methods)
        self._refresh()

    def share(self) -> None:
        """Uses the other layer's weight again, where the same adapters are merged into both."""
        source = self._source[0]
        if self._merged == source._merged:
            W = source.get_base_layer()._parameters[source.kind.weight_name]
            assert W is not None, "a merged layer has a weight"
            self._put(self.kind.weight_name, W)

    def computed(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name in files, tensor) of what files repeat for this layer."""
        if name in self.methods and not self.methods[name].ties_whole:
            source = self._source[0]
            p = self._turned(name, source.methods[name].saved(source.methods[name].own(source.params(name))))
            for key, slot in self.methods[name].slots.items():
                yield slot.saved_name(), p[key].detach()


class TiedTokensLayer(Tied):
    """A head that is tied to such an embedding."""

    token_indices = TrainableTokensLayer.token_indices
    trainable_tokens_original = TrainableTokensLayer.trainable_tokens_original


def trainable_kind(module: nn.Module, path: str) -> LayerKind:
    """The kind of an embedding or head whose rows can be trained one by one."""
    kind = kind_of(module)
    if kind is None or kind.name not in ("Embedding", "Linear"):
        raise UnsupportedLayerError(
            f"trainable_token_indices needs an embedding, {path} is a {type(module).__name__}: name the embedding."
        )
    return kind
