"""THE wrapper: a frozen layer and its named adapters.

forward, rows, merge, unmerge, dtype and device exist here and nowhere else; a method brings mathematics only. Tensors
stand where files and other libraries expect them (``layer.lora_A.default.weight``), so the wrapper gathers an
adapter's tensors from its children at every call: nothing then can hold a stale one, whoever replaces, moves or
shards them.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _has_any_global_hook

from inlay.activation import Tokens
from inlay.config import AdapterConfig
from inlay.errors import (
    BaseGoneError,
    ConfigError,
    MergeError,
    NonFiniteMergeError,
    NotMergeableError,
    PeftWarning,
    RoutingError,
    RowsUnreachableError,
    UnknownAdapterError,
    UnsupportedLayerError,
)
from inlay.hooked import Hooked, has_hooks
from inlay.inits.draw import DRAWN
from inlay.layers import LayerKind, kind_of
from inlay.leaves import BARE, Group, Leaf, Light, Numbers, Rate
from inlay.memo import Memo, Stack
from inlay.methods import adapter_alone
from inlay.methods._abstract import AbstractAdapter, Slot, as_dtype
from inlay.ops.dora import square_norm
from inlay.ops.rows import rows as rows_product
from inlay.routing import HasDefault, Router, Rows
from inlay.storage import Rounding, Storage, facts, packing_of, storage_of
from inlay.storage.placement import HOOK_NAMES, at_hand, brought, distributed, held, hooked, without_hooks

Make = Callable[[Tensor], Tensor]  # of a parameter: room for it, or what is to stand in its place
_TORCH_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Adapted(Light, HasDefault):
    """A frozen layer with adapters.

    A forward asks the router which adapters run here, gathers their tensors (`params`), lets those that change the
    input do so (`AbstractAdapter.into`), calls the frozen layer once, and has each adapter make of its output what it
    makes (`AbstractAdapter.out`). Where that is not possible, the layer's operation runs with the weight that the
    adapters make of its own (`effective`). With adapters by row all rows still share the one call.

    Args:
        base_layer (`nn.Module`): The layer, left as it is.
        kind (`LayerKind`): Its row in `inlay.layers.KINDS`.
        router (`Router`): The routing of the model it stands in.
        path (`str`): Its name in the model, for messages.
        tied (`bool`, *optional*, defaults to `False`): Another module owns the same weight: merging must not write it.
    """

    base_layer: nn.Module
    kind: LayerKind
    router: Router
    path: str
    tied: bool
    methods: dict[str, AbstractAdapter]
    _places: dict[str, tuple[tuple[str, str, str], ...]]  # of each tensor: the method's name for it, slot, leaf
    _trained: tuple[str, ...]  # adapters that were set to be trained: of hundreds, those that may have to be frozen
    _enabled: bool
    _run: tuple[str, ...]  # what runs where the router says nothing
    _merged: tuple[str, ...]  # what stands in the weight
    _kept: dict[str, Tensor]  # pristine parameters, put aside while others stand in their place
    _added: list[tuple[Tensor, Tensor, Any]]  # products that were added to a weight of which nothing is kept
    _written: dict[str, AbstractAdapter]  # what is merged, as it was then
    rounding: Rounding | None
    _memo: Memo
    _stacks: dict[tuple[tuple[str, ...], bool], Stack]

    def __init__(self, base_layer: nn.Module, kind: LayerKind, router: Router, path: str, tied: bool = False) -> None:
        super().__init__(base_layer.training)
        self._modules["base_layer"] = base_layer
        # Past nn.Module.__setattr__, which looks for parameters and modules in each of these.
        self.__dict__.update(
            kind=kind, router=router, path=path, tied=tied, methods={}, _places={}, _active=(), _trained=(), _run=(),
            _enabled=True, _merged=(), _kept={}, _added=[], _written={}, rounding=None, _memo=Memo(), _stacks={},
        )  # fmt: skip

    @classmethod
    def around(
        cls, base_layer: nn.Module, adapter_name: str, config: AdapterConfig, *values: Any, **numbers: Any
    ) -> Adapted:
        """A layer with an active adapter that stands in no model, for modules that make their own layers.

        Args:
            base_layer (`nn.Module`): The layer; whether it is trained is its owner's choice.
            adapter_name (`str`): The adapter's name.
            config (`AdapterConfig`): The method's config.
            values, numbers: See `update_layer`.

        Raises:
            UnsupportedLayerError: The method is not defined on such a layer.

        Example:
            >>> from inlay import LoraConfig
            >>> Adapted.around(nn.Linear(3, 2), "default", LoraConfig(), 4, 8).scaling
            {'default': 2.0}
        """
        kind, name = kind_of(base_layer), type(base_layer).__name__
        if kind is None:
            raise UnsupportedLayerError(f"A {name} alone cannot be adapted.")
        layer = Adapted(base_layer, kind, Router(), name)
        layer.update_layer(adapter_name, *values, config=config, **numbers)
        layer.set_adapter(adapter_name, inference_mode=config.inference_mode)
        return layer

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.router.route()
        if route is None:
            run = self._run
        elif route.rows is not None:
            return self._forward_rows(route.rows, route.tokens, *args, **kwargs)
        else:
            run = route.run(self, self._run, self.methods)
        base: Any = self._modules["base_layer"]
        if run == self._merged:  # idle, or merged with just what is asked for
            return base(*args, **kwargs)
        if self.kind.by_weight:
            return self.kind.call(base, *self.effective(run), _resolve, args, kwargs)
        if self.kind.composite:
            return self.kind.around(base, self.part, args, kwargs, partial(self._forward_several, run))
        if self._merged:
            base = self._frozen()
        x = args[0] if args else kwargs.pop(_input_of(self.get_base_layer(), kwargs))
        tokens = None if route is None else route.tokens
        if len(run) != 1 or tokens is not None:
            return self._forward_several(run, base, x, *args[1:], tokens=tokens, **kwargs)
        method, p = self.methods[run[0]], self.params(run[0])
        if method.activated:
            self._check_called(run[0])
        if method.through_weight:
            return self._through_weight(run, x)
        z = method.into(p, x, self) if method.changes_input else x
        # Nobody else can hold what a plain linear layer returns, so it may be written to.
        own = type(base) is nn.Linear and "forward" not in base.__dict__
        fresh = own and not base._forward_hooks and not _global_forward_hooks
        if fresh and x.requires_grad and torch.is_grad_enabled() and self._takes_in(method, p, x, base):
            with torch.no_grad():
                h = base(z, *args[1:], **kwargs)
            return method.taken_in(p, x, h, base.weight, self)
        return method.out(p, x, base(z, *args[1:], **kwargs), self, fresh)

    def _forward_several(
        self, run: tuple[str, ...], base: Any, x: Tensor, *args: Any, tokens: Tokens | None = None, **kwargs: Any
    ) -> Tensor:
        parts = [(self.methods[name], self.params(name)) for name in run]
        if any(method.through_weight for method, _ in parts):
            return self._through_weight(run, x)
        z = x
        for method, p in parts:
            z = method.into(p, z, self) if method.changes_input else z
        h0: Tensor = base(z, *args, **kwargs)
        h = h0
        for name, (method, p) in zip(run, parts, strict=True):
            before = h
            if method.from_base and (h is not h0 or z is not x):
                frozen = h0 if z is x else base(x, *args, **kwargs)
                h = h + (method.out(p, x, frozen, self) - frozen)
            else:
                h = method.out(p, x, h, self)
            if tokens is not None:
                h = tokens.applied(name, h, before, self.path)
            elif method.activated:
                self._check_called(name)
        return h

    def _takes_in(self, method: AbstractAdapter, p: Mapping[str, Tensor], x: Tensor, base: nn.Linear) -> bool:
        """Whether the method does the backward pass of a plain linear layer too, which nobody else watches."""
        if not method.takes_in(p, x, base.weight, base.bias, self) or _has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        return not (base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)

    def _check_called(self, name: str) -> None:
        """Raises `RoutingError` where an adapter acts on all tokens because nobody has asked where it begins."""
        if not self.router.inside:
            raise RoutingError(
                f"{self.path} was called past the PeftModel, and {name!r} acts from its invocation on: call the "
                "PeftModel, which finds it."
            )

    def _through_weight(self, run: tuple[str, ...], x: Tensor) -> Tensor:
        """The layer's operation with the weight and bias that ``run`` makes of its own."""
        W_OI, b_O = self._combined(run, self.methods)
        h = self.operate(x, as_dtype(W_OI, x))
        return h if b_O is None else h + self.kind.channels(as_dtype(b_O, h))

    def params(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors, by the method's own names for them."""
        p: dict[str, Tensor] = {}
        modules = self._modules
        for key, slot, leaf in self._places[name]:
            owner: Any = modules[slot]
            if leaf:
                owner = owner._modules[name]
            t = owner._parameters.get(leaf or name)
            if t is None or t.is_meta:
                t = getattr(owner, leaf or name) if t is None else brought(owner, leaf or name)
            if leaf == "weight" and len(owner.__dict__) > BARE and has_hooks(owner):
                t = Hooked.make(t, owner)
            p[key] = t
        return p

    def _frozen(self) -> nn.Module:
        """The layer with its pristine weight, while another stands in its place."""
        self._stored(self.kind.weight_name)
        storage = self.storage
        if hooked(self.base_layer):
            other = copy.copy(self.base_layer)
            other.__dict__ = without_hooks(self.base_layer, self._kept)
            return other
        return replica(self.base_layer, self._kept, None if storage.in_place else storage.settle)

    def part(self, name: str) -> nn.Module:
        """A module inside the frozen layer, without adapters of its own."""
        module: nn.Module = getattr(self.get_base_layer(), name)
        while isinstance(module, Adapted):
            module = module._frozen() if module._merged else module.base_layer
        return module

    def operate(self, x: Tensor, W_OI: Tensor) -> Tensor:
        """The layer's operation, without bias, with the matrix ``W_OI``."""
        return self.kind.apply(self.base_layer, x, W_OI)

    # ------------------------------------------------------------------ rows

    def _forward_rows(self, rows: Rows, tokens: Tokens | None, *args: Any, **kwargs: Any) -> Any:
        if self.kind.by_weight:
            if self._merged or any(n in self.methods for n in rows.names):
                raise RowsUnreachableError(
                    f"{self.path} ({self.kind.name}) uses its weight whole: adapter_names cannot reach its rows."
                )
            return self.base_layer(*args, **kwargs)
        base: Any = self._frozen() if self._merged else self._modules["base_layer"]
        if self.kind.composite:
            return self.kind.around(base, self.part, args, kwargs, partial(self._rows_of, rows))
        x = args[0] if args else kwargs.pop(_input_of(self.get_base_layer(), kwargs))
        return self._rows_of(rows, base, x, *args[1:], tokens=tokens, **kwargs)

    def _rows_of(
        self, rows: Rows, base: Any, x: Tensor, *args: Any, tokens: Tokens | None = None, **kwargs: Any
    ) -> Tensor:
        rows = rows.fitted(x.shape[self.kind.row_dim], x.device, self.path)
        stack = self._stack(rows.names)
        z = x
        for name in stack.apart:
            method, at = self.methods[name], rows.of_adapter(name)
            if method.changes_input and not method.through_weight:
                z = z.index_copy(0, at, method.into(self.params(name), z[at], self))
        h0: Tensor = base(z, *args, **kwargs)
        h = h0
        if stack.order:
            own = type(base) is nn.Linear and "forward" not in base.__dict__
            alone = tokens is None and not stack.apart  # nothing below asks for h0
            fresh = alone and own and not base._forward_hooks and not _global_forward_hooks
            h = rows_product(x, h, *stack.factors, rows.index_of(stack.order), h_is_fresh=fresh)
        for name in stack.apart:
            method, at = self.methods[name], rows.of_adapter(name)
            if method.through_weight:
                mine = self._through_weight((name,), x[at])
            else:
                mine = method.out(self.params(name), x[at], h0[at], self)
            h = h.index_copy(0, at, mine.to(h.dtype))
        return h if tokens is None else tokens.applied("", h, h0, self.path)

    def _stack(self, names: tuple[str, ...]) -> Stack:
        """The factors of those of ``names`` that can be stacked, made anew only where one of them has changed."""
        stack = None if torch.compiler.is_compiling() else self._stacks.get((names, self.training))
        if stack is None or not stack.current():
            parts: dict[str, Any] = {}
            for name in [n for n in names if n in self.methods]:
                method, p = self.methods[name], self.params(name)
                drops = self.training and method.drops()
                if self.kind.matrix and not drops and method.factors(p) is not None:
                    parts[name] = method, p, [(o._parameters, key) for _, o, key in self.tensors(name)]
            stack = Stack(parts, tuple(n for n in names if n in self.methods and n not in parts))
            if stack.lasts:
                self._stacks[names, self.training] = stack
        return stack

    # ------------------------------------------------------------------ what methods ask of a layer

    @property
    def storage(self) -> Storage:
        """How the frozen weight is kept."""
        return self._storage(self.kind.weight_name)

    def _storage(self, parameter: str) -> Storage:
        return storage_of(self.base_layer, parameter)

    def matrix(self) -> Tensor:
        """The pristine weight W_OI, dense."""
        return self.kind.to_matrix(self.base_layer, self._pristine(self.kind.weight_name))

    def offset(self) -> Tensor | None:
        """The pristine bias."""
        has_bias = getattr(self.base_layer, self.kind.bias_name, None) is not None
        return self._pristine(self.kind.bias_name) if has_bias else None

    def _pristine(self, parameter: str) -> Tensor:
        """A pristine parameter, dense, where the adapters' tensors are."""
        W = self._storage(parameter).dense(self.base_layer, self._stored(parameter))
        if not W.is_meta and not self._kept and type(W) in (Tensor, nn.Parameter):
            return W
        return at_hand(W, self.get_base_layer(), parameter, self._beside(W))

    def _beside(self, W: Tensor) -> Tensor:
        """A tensor of an adapter; ``W`` where there is none."""
        return next((owner.get_parameter(key) for n in self.methods for _, owner, key in self.tensors(n)), W)

    def _stored(self, parameter: str) -> Tensor:
        """A pristine parameter as it is stored."""
        if self.kind.composite:
            raise NotMergeableError(f"{self.path} ({self.kind.name}) is made of other layers: it has no weight.")
        if self._merged:
            if not self._kept:
                raise BaseGoneError(
                    f"{self.path} was merged with keep_base=False, and the frozen layer is needed now: load the model "
                    "anew, or merge with keep_base=True."
                )
            if parameter in self._kept:
                return self._kept[parameter]
        return self._storage(parameter).stored(self.base_layer, parameter)

    def _parts(self) -> tuple[Tensor, ...]:
        """What the pristine weight consists of: it has changed where one of these has."""
        return self.storage.parts(self._stored(self.kind.weight_name))

    def remember(self, key: Hashable, owners: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or its last result where neither an owner nor the pristine weight has changed since."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in owners)):
            return make()
        if (parts := self._parts())[0].is_meta:  # offloaded: nothing tells whether it has changed
            return make()
        owners = tuple(t.of if isinstance(t, Hooked) else t for t in owners)
        return self._memo.get(key, (*owners, *parts), make)

    def row_squares(self) -> Tensor:
        """Squared norm of each row of the pristine weight, O."""
        parts = () if torch.compiler.is_compiling() else self._parts()
        # Of a small weight they are computed sooner than it is known to be the same.
        if not parts or parts[0].is_meta or parts[0].numel() <= Memo.small:
            return square_norm(self.matrix())
        return self._memo.get("row squares", parts, lambda: square_norm(self.matrix()))

    def effective(self, run: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """Weight (in the layer's layout) and bias of the one layer that does what ``run`` does."""
        W, b = self._combined(run, self.methods)
        return self.kind.from_matrix(self.base_layer, W), b

    def _merged_with(self, new: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """The same of what is merged, scaled as it was then, and ``new``."""
        W, b = self._combined(self._merged + new, {**self.methods, **self._written})
        return self.kind.from_matrix(self.base_layer, W), b

    def _combined(self, run: tuple[str, ...], methods: Mapping[str, AbstractAdapter]) -> tuple[Tensor, Tensor | None]:
        W0, b0 = self.matrix(), self.offset()
        W, b = W0, b0
        # What changes the input last stands nearest to the weight.
        inner = [n for n in reversed(run) if methods[n].changes_input]
        for name in (*inner, *(n for n in run if n not in inner)):
            method, p = methods[name], self.params(name)
            if method.from_base and W is not W0:
                dW, db = method.weight(p, W0, b0)
                W, b = W + (dW - W0), (b if db is None or b is None or b0 is None else b + (db - b0))
            else:
                W, b = method.weight(p, W, b)
        return W.to(W0.dtype), b

    # ------------------------------------------------------------------ adapters

    def add(
        self,
        name: str,
        method: AbstractAdapter,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        active: bool = False,
        trained: bool = False,
    ) -> None:
        """Makes room for an adapter: its tensors, unfilled.

        Args:
            name (`str`): The adapter's name.
            method (`AbstractAdapter`): Its mathematics.
            device (`torch.device` or `str`): Where; ``"meta"`` where tensors are to be assigned.
            dtype (`torch.dtype`, *optional*): The frozen weight's if not given.
            active (`bool`, *optional*, defaults to `False`): Make it the layer's only default.
            trained (`bool`, *optional*, defaults to `False`): Whether its tensors are trained.
        """
        if dtype is None:
            dtype = self.facts()[0]
        mode = self.training or trained  # the mode of a new module in torch; what runs is this layer, in its own mode
        if method.dropout or method.dropout_name in self._modules:
            self._show_rates({**self.methods, name: method}, mode)
        for slot in method.slots.values():
            group = self._modules.get(slot.name)
            if group is None:
                group = self._modules[slot.name] = Group(mode)
            owner = group
            if slot.leaf:
                leaf = group._modules.get(name)
                if leaf is None:
                    leaf = group._modules[name] = Leaf(mode)
                owner = leaf
            t = torch.empty(slot.shape, device=device, dtype=dtype)
            owner._parameters[slot.leaf or name] = nn.Parameter(t, requires_grad=trained and slot.trainable)
        self._places[name] = tuple((key, s.name, s.leaf) for key, s in method.slots.items())
        self.methods[name] = method
        self.__dict__["_trained"] += (name,) if trained else ()
        self._stacks.clear()
        if active:
            self.__dict__["_active"] = (name,)
        self._refresh()

    def _show_rates(self, methods: Mapping[str, AbstractAdapter], mode: bool) -> None:
        """Makes modules of the layer of dropouts: of all, as soon as one of them drops something."""
        for slot in {m.dropout_name for m in methods.values()} - {""}:
            self._modules[slot] = self._rates(slot, methods, mode)

    @staticmethod
    def _rates(slot: str, methods: Mapping[str, AbstractAdapter], mode: bool) -> Group:
        rates = Group(mode)
        rates._modules.update({n: Rate(m, mode) for n, m in methods.items() if m.dropout_name == slot})
        return rates

    def tensors(self, name: str) -> Iterator[tuple[Slot, nn.Module, str]]:
        """(slot, owning module, attribute) of each of an adapter's tensors."""
        for slot in self.methods[name].slots.values():
            owner: Any = self._modules[slot.name]
            if slot.leaf:
                owner = owner._modules[name]
            yield slot, owner, slot.leaf or name

    def facts(self) -> tuple[torch.dtype, torch.device]:
        """dtype and device of the frozen weight."""
        return facts(*self.kind.keeper(self.get_base_layer()))

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Trains or freezes adapters, active or not; what is not here, or only keeps a place, is passed over."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.methods and not self.methods[name].vacant:
                for slot, owner, attribute in self.tensors(name):
                    owner.get_parameter(attribute).requires_grad_(requires_grad and slot.trainable)
                others = tuple(n for n in self._trained if n != name)
                self.__dict__["_trained"] = (*others, name) if requires_grad else others

    def note_trained(self) -> None:
        """Takes notice of adapters whose tensors somebody has set to be trained one by one."""
        trained = [n for n in self.methods if any(o.get_parameter(a).requires_grad for _, o, a in self.tensors(n))]
        self.__dict__["_trained"] = tuple(trained)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters this layer's default for all threads; trains these and freezes the others."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.set_requires_grad([n for n in {*self._active, *self._trained} if n not in names], False)
        self.set_requires_grad(names, not inference_mode)
        self._active = names
        self._refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Switches all adapters on or off for all threads."""
        self._enabled = enabled
        self.set_requires_grad(self._active if enabled else list(self.methods), enabled)
        self._refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; one that is not here is passed over, and what is merged stays in the weight."""
        self._stacks.clear()
        if adapter_name not in self.methods:
            return
        self.router.changing(self, self._run, [adapter_name])
        if adapter_name in self._merged:
            self._settle(adapter_name)
        self._take_out(adapter_name)
        self.__dict__["_last"] = self.methods.pop(adapter_name).numbers
        del self._places[adapter_name]
        if self.methods:
            self.drop_empty()
        self._memo.clear()
        if adapter_name in self._active:
            self._active = tuple(n for n in self._active if n != adapter_name)
            if not self._active and self.methods:
                self._active = (next(iter(self.methods)),)
                text = f"Adapter {adapter_name} was active and is deleted: {self._active[0]} is active now."
                warnings.warn(text, PeftWarning, stacklevel=2)
        self._refresh()

    def _take_out(self, name: str) -> None:
        """Removes an adapter's tensors and dropout."""
        method = self.methods[name]
        for slot in {method.dropout_name, *(s.name for s in method.slots.values())}:
            if (group := self._modules.get(slot)) is not None:  # else a dropout that nobody has
                group._modules.pop(name, None)
                group._parameters.pop(name, None)

    def renumber(self, name: str, other: AbstractAdapter) -> None:
        """Gives an adapter the numbers of another one of its method; a scale that is a tensor keeps its place."""
        mine = self.methods[name]
        scaling = mine.scaling
        self._stacks.clear()
        if self._memo._known:
            self._memo.forget(self.params(name).values())
        self.router.changing(self, self._run, [name])
        mine.__dict__ = vars(other).copy()
        if isinstance(scaling, Tensor):
            mine.scaling = scaling
            mine.put("scaling", other.scaling)
        if mine.dropout and mine.dropout_name not in self._modules:
            self._show_rates(self.methods, self.training)

    def drop_empty(self) -> None:
        """Removes slots that no adapter has."""
        for slot, group in list(self._modules.items()):
            if isinstance(group, Group) and not len(group):
                del self._modules[slot]

    def _here(self) -> tuple[str, ...]:
        """The default adapters of all layers that this one has."""
        return tuple([n for n in self._active if n in self.methods])

    def _refresh(self) -> None:
        run = (self._merged or self._here()) if self._enabled else ()
        if run != self._run:
            self.router.changing(self, self._run)
        self.__dict__["_run"] = run

    # ------------------------------------------------------------------ merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep_base: bool = True) -> None:
        """Writes adapters into the frozen weight.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Check for NaN and infinity before writing.
            adapter_names (`list[str]`, *optional*): Which; the active ones if not given.
            keep_base (`bool`, *optional*, defaults to `True`): Keep the pristine weight, so that `unmerge` is exact.

        Raises:
            TypeError: ``adapter_names`` is a `str`.
            NotMergeableError: One of them has no merged weight on this layer.
            NonFiniteMergeError: ``safe_merge`` found NaN or infinity; nothing was written.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list, got the str {adapter_names!r}: write [{adapter_names!r}].")
        wanted = self._active if adapter_names is None else adapter_names
        if any(n in self._merged for n in wanted):
            # The path stays out of it: a thousand layers that are called in turn warn once.
            warnings.warn(merged_already(wanted, self._merged), PeftWarning, stacklevel=2)
        self.write(self.check_merge(wanted, safe_merge), keep_base)

    def check_merge(self, adapter_names: Iterable[str] | None, safe_merge: bool = False) -> tuple[str, ...]:
        """The adapters that merging would write, after checking that it can; nothing is written."""
        wanted = self._active if adapter_names is None else adapter_names
        new = tuple([n for n in wanted if n in self.methods and n not in self._merged])
        base: Any = self._modules["base_layer"]
        for name in new:
            self.methods[name].check_mergeable(self.kind, base)
        if new and (why := self._unmergeable(new, base)):
            raise NotMergeableError(f"{self.path}: {why}")
        if new and safe_merge:
            with torch.no_grad():
                finite = [bool(t.isfinite().all()) for t in self._merged_with(new) if t is not None]
            if not all(finite):
                what = "weights" if not finite[0] else "bias"
                raise NonFiniteMergeError(
                    f"NaNs detected in the merged {what}. The adapter {', '.join(new)} seems to be broken: NaN or "
                    f"infinity would stand in {self.path}; nothing was written."
                )
        return new

    def _unmergeable(self, new: tuple[str, ...], base: nn.Module) -> str | None:
        """Why this layer's weight, as it stands, cannot take these adapters, or None."""
        if late := [n for n in new if self.methods[n].activated]:
            told = f"{late[0]!r} acts from its invocation on, and a merged weight would on every token"
            return f"{told}: leave it unmerged."
        if why := self.kind.unmergeable(base):
            return why
        owner, parameter = self.kind.keeper(self.get_base_layer())
        if owner._parameters.get(parameter) is None:
            told = "its weight is computed from others by now, so nothing can be written into it"
            return f"{told}: remove that parametrization first."
        W: Tensor = getattr(base, self.kind.weight_name)
        if W.is_meta and self.tied:
            return "its weight is offloaded, and another layer's too: bring it back first."
        if W.is_meta and held(self.get_base_layer(), self.kind.weight_name) is None:
            return "its weight is on the meta device: bring it back first."
        if not distributed(W):
            return None
        if not distributed(self._beside(W)):
            return "its weight is a DTensor, and the adapter's tensors are none: merge, then distribute."
        if whole := [n for n in new if not self.methods[n].merges_parts]:
            return f"its weight is a DTensor, and {whole[0]!r} turns it as a whole: merge, then distribute."
        return None

    def write(self, new: tuple[str, ...], keep_base: bool = True, room: Make = torch.empty_like) -> None:
        """`merge` of what `check_merge` has returned."""
        if not new:
            return
        self.router.changing(self, self._run, new)
        # What is written is used where gradients are, wherever it was written.
        with torch.inference_mode(self.weight.is_inference()), torch.no_grad():
            if not self._add_products(new, keep_base, room):
                b0 = self.offset()
                W, b = self._merged_with(new)
                self._replace(self.kind.weight_name, W, keep_base, room)
                if b is not None and b is not b0:
                    self._replace(self.kind.bias_name, b, keep_base, room)
        self.__dict__["_merged"] += new
        for name in new:
            self._written[name] = snapshot = copy.copy(self.methods[name])
            if isinstance(snapshot.scaling, Tensor):
                snapshot.scaling = snapshot.scaling.clone()
        self._refresh()

    def _add_products(self, new: tuple[str, ...], keep_base: bool, room: Make) -> bool:
        """Adds products to the weight, one by one; False, and nothing done, where merging is more than that."""
        storage, name, W = self.storage, self.kind.weight_name, self.weight
        stacked = self.kind.by_weight and W.dim() > 2  # of one expert perhaps
        if self.tied or stacked or not storage.in_place or W.is_meta or (self._merged and self._kept):
            return False
        factors = [f for n in new if (f := self.methods[n].factors(self.params(n))) is not None]
        if len(factors) < len(new):
            return False
        first = 0
        if keep_base and not self._merged:
            # The first product goes with the weight into new memory: one pass where a copy and a sum would be two.
            sum_of = partial(self._add_product, *factors[0], sign=1)
            first = int(self._keep(self.get_base_layer(), storage, name, room, lambda W: sum_of(W=W, out=room(W))))
        for down, up, scale in factors[first:]:
            self._add_product(down, up, scale, sign=1)
            if not keep_base:  # the adapter may change while it is merged: what was added is what is subtracted
                self._added.append((down.detach().clone(), up.detach().clone(), scale * 1))
        return True

    def _keep(self, base: nn.Module, storage: Storage, parameter: str, room: Make, make: Make) -> bool:
        """Puts a pristine parameter aside; True where what ``make`` makes of it stands in its place by then."""
        kept = storage.stored(base, parameter) if self.tied else storage.exchange(base, parameter, make)
        self._kept[parameter] = storage.keep(base, parameter, room) if kept is None else kept
        return not self.tied and kept is not None

    def _replace(self, parameter: str, value: Tensor, keep_base: bool, room: Make) -> None:
        base, storage = self.get_base_layer(), self._storage(parameter)
        wanted = keep_base and parameter not in self._kept
        # Filled before it is the weight's: an interrupt finds the one or the other.
        if wanted and self._keep(base, storage, parameter, room, lambda W: room(W).copy_(value)):
            return
        if self.tied:
            self._put(parameter, storage.keep(base, parameter, torch.empty_like))
        storage.write(base, value, parameter)
        if not storage.in_place:
            with storage.reading(base, parameter) as W:
                self.rounding = Rounding.of(value, W)

    def _put(self, parameter: str, W: Tensor) -> None:
        """Has the layer use another parameter in place of its own."""
        W = W if isinstance(W, nn.Parameter) else nn.Parameter(W.detach(), requires_grad=False)
        self.base_layer._parameters[parameter] = W
        self._storage(parameter).settle(self.base_layer)

    def _add_product(
        self, down: Tensor, up: Tensor, scale: Any, sign: int, W: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Writes the sum of the weight, or ``W``, and a product where it stands, or into ``out``; returns where."""
        kind, base = self.kind, self.base_layer
        W = getattr(base, kind.weight_name) if W is None else W
        out = W if out is None else out
        W_OI, down, up = kind.to_matrix(base, W), down.flatten(1), up.flatten(1)
        whole = out.dim() == 2 or out.is_contiguous()  # else, as in channels_last, its matrix is a copy
        if whole and W_OI.dtype == down.dtype and isinstance(scale, int | float):
            torch.addmm(W_OI, up, down, alpha=sign * scale, out=kind.to_matrix(base, out))
        else:  # one rounding, at the end
            out.copy_(kind.from_matrix(base, torch.addmm(W_OI.to(down.dtype), up * scale, down, alpha=sign)))
        return out

    def unmerge(self) -> None:
        """Takes the merged adapters out again: the frozen weight's bits come back.

        Raises:
            BaseGoneError: They were merged with ``keep_base=False`` and cannot be subtracted.
        """
        if not self._merged:
            warnings.warn("Already unmerged. Nothing to do.", PeftWarning, stacklevel=2)
            return
        factors = self.check_unmerge()
        self.router.changing(self, self._run, self._merged)
        with torch.inference_mode(self.weight.is_inference()), torch.no_grad():
            for f in factors:
                self._add_product(*f, sign=-1)
            for parameter, kept in self._kept.items():
                if self.tied:
                    self._put(parameter, kept)
                else:
                    self._storage(parameter).restore(self.get_base_layer(), kept, parameter)
        self.forget()

    def check_unmerge(self) -> list[tuple[Tensor, Tensor, Any]]:
        """What must be subtracted to unmerge, where the pristine weight was given away; nothing is written."""
        if not self._merged or self._kept:
            return []
        factors = self._added
        if len(factors) < len(self._merged):
            raise BaseGoneError(
                f"{self.path} was merged with keep_base=False, and {list(self._merged)} cannot be subtracted: load "
                "the model anew."
            )
        return factors

    def _settle(self, adapter_name: str) -> None:
        """Makes one of the merged adapters a part of the pristine weight."""
        rest, methods = tuple(n for n in self._merged if n != adapter_name), dict(self.methods)
        if rest:
            self.methods.update(self._written)
            self.unmerge()
            self.write((adapter_name,))
        self.forget()
        self.write(rest)
        self.methods.update(methods)

    def forget(self) -> None:
        """Takes the weight as it stands for the pristine one."""
        self.__dict__.update(_merged=(), _kept={}, _added=[], _written={}, rounding=None)
        self._refresh()

    # ------------------------------------------------------------------ what users of PEFT read and call

    @property
    def disable_adapters(self) -> bool:
        """Whether all adapters are off, by `enable_adapters` or, for the caller alone, by ``disable_adapter``."""
        return not self._enabled or self.router.off

    _active_adapter = HasDefault.active_adapters
    _disable_adapters = disable_adapters

    def _all_available_adapter_names(self) -> list[str]:
        return list(self.methods)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self._merged)

    @property
    def merged_adapters(self) -> list[str]:
        """The merged adapters, in order."""
        return list(self._merged)

    @merged_adapters.setter
    def merged_adapters(self, names: list[str]) -> None:
        self._merged = tuple(names)
        if not names:
            self.__dict__.update(_kept={}, _written={})
        self._refresh()

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight as it stands."""
        W: Tensor = getattr(self.base_layer, self.kind.weight_name)
        return W

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's bias as it stands."""
        b: Tensor | None = getattr(self.base_layer, self.kind.bias_name, None)
        return b

    @property
    def in_features(self) -> int:
        """Features, channels or rows that the layer reads."""
        return self.kind.features(self.get_base_layer())[0]

    @property
    def out_features(self) -> int:
        """Features or channels that it writes."""
        return self.kind.features(self.get_base_layer())[1]

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the slots."""
        rates = {method.dropout_name for method in self.methods.values()}
        return tuple(k for k in self._modules if k != "base_layer" and k not in rates)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The numbers that adapters have here, such as ``scaling``: attributes that read like dicts."""
        fields = [(*m.numbers, m.dropout_name) for m in self.methods.values()]
        return tuple(dict.fromkeys(name for names in fields for name in names if name))

    @property
    def parameter_name(self) -> str:
        """The name of the adapted parameter in its module."""
        return self.kind.weight_name

    def get_base_layer(self) -> nn.Module:
        """The frozen layer, through nested wrappers."""
        base: Any = self._modules["base_layer"]
        return base.get_base_layer() if isinstance(base, Adapted) else base

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging ``adapter`` adds to the frozen weight, in the layer's layout."""
        if adapter not in self.methods:
            raise UnknownAdapterError(f"{self.path} has no adapter {adapter!r}; it has {list(self.methods)}.")
        W, _ = self.methods[adapter].weight(self.params(adapter), self.matrix(), self.offset())
        return self.kind.from_matrix(self.base_layer, W - self.matrix())

    def get_base_weight(self) -> Tensor:
        """The frozen weight as it stands, dense, in the layer's layout."""
        with torch.no_grad():
            base, name = self.get_base_layer(), self.kind.weight_name
            return self.storage.dense(base, self.storage.stored(base, name)).detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Gives the frozen weight other values, in place; packed ones are packed anew.

        Raises:
            MergeError: An adapter is merged: unmerging would bring the old values back.
        """
        self._check_unmerged()
        self.router.changing(self, self._run)
        self.storage.write(self.get_base_layer(), weight_data, self.kind.weight_name)

    def _check_unmerged(self) -> None:
        if self._merged:
            raise MergeError(f"{list(self._merged)} are merged into {self.path}: unmerge them first.")

    @property
    def quantization_backend(self) -> Storage | None:
        """How the frozen weight is packed; None where it is not."""
        return packing_of(self.base_layer)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the frozen weight has its inputs first."""
        return self.kind.fan_in_fan_out

    is_target_conv_1d_layer = fan_in_fan_out

    @property
    def is_feedforward(self) -> bool:
        """Whether an adapter acts on what goes into the layer, as (IA)³ does on feedforward layers."""
        return any(method.changes_input for method in self.methods.values())

    def update_layer(
        self, adapter_name: str, *values: Any, config: AdapterConfig, inference_mode: bool = False, **numbers: Any
    ) -> None:
        """Gives this layer alone an adapter, which the model's handle does not know; one of that name starts anew.

        Args:
            adapter_name (`str`): The adapter.
            values: The rank and what else may vary by layer, in the order of the config's fields, as LoRA's ``r`` and
                ``lora_alpha``.
            config (`AdapterConfig`): The method's config, for the rest.
            inference_mode (`bool`, *optional*, defaults to `False`): Leave the layer's active adapters frozen.
            numbers: These and other fields of the config by name.

        Raises:
            ConfigError: A value is out of range, or a name no field's.
            UnsupportedLayerError: The method is not defined on this layer, or the adapter would have parts elsewhere.
            MergeError: An adapter is merged.
        """
        self._check_unmerged()
        own = replace(config, **dict(zip(dict.fromkeys(("r", *config.patterned)), values, strict=False)), **numbers)
        method = adapter_alone(own, self.kind, self.get_base_layer(), self.path)
        if method.unpacked_only is not None and not self.storage.in_place:
            raise UnsupportedLayerError(f"{self.path} is packed already: {method.unpacked_only}.")
        active = self.active_adapters
        self.router.changing(self, self._run, [adapter_name])
        if adapter_name in self.methods:
            self._take_out(adapter_name)
        self.add(adapter_name, method, self.facts()[1])
        self.drop_empty()
        method.initialise(self.params(adapter_name), self)
        self.set_adapter(active, inference_mode)

    def reset_parameters(self, adapter_name: str, init: Any = True) -> None:
        """Fills an adapter's tensors with fresh starting values; one that is not here is passed over.

        Args:
            adapter_name (`str`): The adapter.
            init (`bool` or `str`, *optional*, defaults to `True`): As the config's field; ``False`` leaves them.

        Raises:
            ConfigError: There are no such values, or they are a part of the weight, to which a new adapter is needed.
        """
        if adapter_name not in self.methods or init is False:
            return
        method = copy.copy(self.methods[adapter_name])
        known = list(dict.fromkeys((True, method.init, *(DRAWN if method.dropout_name else ()))))
        if init not in known or (init != method.init and not all(slot.filed for slot in method.slots.values())):
            raise ConfigError(f"Unknown initialization {init!r} of an adapter that is there; there are {known}.")
        method.init = init
        method.initialise(self.params(adapter_name), self)

    # As PEFT's layers of each method have it.
    reset_ia3_parameters = reset_oft_parameters = reset_adapter_parameters = reset_parameters

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """`reset_parameters`."""
        self.reset_parameters(adapter_name, init_lora_weights)

    def _get_available_adapters(self) -> set[str]:
        return set(self.methods)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self.facts()[1]
        for _, owner, attribute in self.tensors(adapter_name):
            parameter = owner.get_parameter(attribute)
            parameter.data = parameter.data.to(device)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scales an adapter relative to its config; one that is not here is passed over."""
        self._stacks.clear()
        if adapter in self.methods:
            self.methods[adapter].rescale(scale, absolute=True)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        self._stacks.clear()
        if scale != 1:
            for name in self._here():
                self.methods[name].rescale(scale, absolute=False)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides it, or gives the config's scale back."""
        self._stacks.clear()
        for name in self._here():
            if scale is None:
                self.methods[name].rescale(1.0, absolute=True)
            elif scale != 1:
                self.methods[name].rescale(1.0 / scale, absolute=False)

    # ------------------------------------------------------------------ nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            methods = self.__dict__.get("methods", {})
            # The numbers of the last one stay, as its slots do, when it is deleted: `len(layer.r)` is 0 then.
            last = () if methods else self.__dict__.get("_last", ())
            if name in last or any(name in m.numbers for m in methods.values()):
                return Numbers(methods, name, self._stacks.clear)
            if any(name == m.dropout_name for m in methods.values()):
                return self._rates(name, methods, self.training)
            if any(name in m.slots_elsewhere for m in methods.values()):
                return Group(self.training)
            if (holder := next((m for m in methods.values() if name in m.read_as), None)) is not None:
                return getattr(holder, holder.read_as[name])
            if name in HOOK_NAMES or name == "base_layer" or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": Memo(), "_stacks": {}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Adapted:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._memo.clear()
        self._stacks.clear()
        for method in self.methods.values():
            if isinstance(scaling := method.scaling, Tensor):  # it moves, and keeps its dtype and value
                device = fn(scaling.new_empty(0)).device
                method.scaling = scaling if device.type == "meta" else scaling.to(device)
        if not self.tied:
            self._kept = {k: self._storage(k).moved(v, fn) for k, v in self._kept.items()}
        self.storage.settle(self.base_layer)
        return self

    def _get_name(self) -> str:
        """What it is printed as: the first adapter's method and the kind of layer, as in ``lora.Linear``."""
        method = next((m.method.lower() for m in self.methods.values()), "")
        return f"{method}.{self.kind.printed or self.kind.name}" if method else type(self).__name__

    def extra_repr(self) -> str:
        bare = f"parameter_name={self.kind.weight_name!r}, " if self.kind.name == "Parameter" else ""
        merged = f", merged={list(self._merged)}" if self._merged else ""
        return f"{bare}adapters={list(self.methods)}, active={list(self._active)}{merged}"


def merged_already(wanted: Iterable[str], merged: Iterable[str]) -> str:
    """What to warn of when adapters that are merged are to be merged again."""
    standing = f"merged are {sorted(merged)}."
    return standing if set(wanted) - set(merged) else f"All adapters are already merged: {standing}"


def _input_of(layer: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """The keyword that carries the layer's input: the first parameter of its forward, or the first tensor."""
    first = "input" if type(layer) in _TORCH_LAYERS else next(iter(inspect.signature(layer.forward).parameters), "")
    return first if first in kwargs else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), first)


def replica(
    module: nn.Module, tensors: Mapping[str, Tensor], settle: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """A module that shares everything with ``module`` but some of its own parameters; ``module`` is only read.

    ``settle`` is what has the rest of such a layer follow them, where it must (`Storage.settle`).
    """
    if settle is None and torch.compiler.is_compiling():
        return _Substituted(module, tensors)
    other = copy.copy(module)
    other.__dict__["_parameters"] = {**module._parameters, **tensors}
    if settle is not None:
        settle(other)
    return other


class _Substituted(nn.Module):
    """The same where it must be traced."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.substituted = (module, dict(tensors))  # in a tuple: no child of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(*self.substituted, args, kwargs)


def _resolve(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a module brings to a call which uses them directly."""
    if not isinstance(module, Adapted):
        return module.get_parameter("weight"), module._parameters.get("bias")
    route = module.router.route()
    if route is not None and route.rows is not None:
        raise RowsUnreachableError(f"{module.path}'s weight is used whole: adapter_names cannot reach its rows.")
    run = module._run if route is None else route.run(module, module._run, module.methods)
    if run == module._merged:
        return module.base_layer.get_parameter("weight"), module.base_layer._parameters.get("bias")
    return module.effective(run)
