"""An adapter's tensors out of a live model and into it: ``dict[str, Tensor]`` under the names that files have.

Which tensors are an adapter's is read off the wrappers, never guessed from names. Keys carry no adapter name; with a
handle (`inlay.PeftModel`) they begin with ``base_model.model.``, with a bare model they do not.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay import experts, inits, settings, sources
from inlay.adapted import Adapted
from inlay.config import AdapterConfig, PeftConfig
from inlay.errors import DuplicateAdapterError, LoadError, MergeError, PeftWarning, UnknownAdapterError
from inlay.formats import files
from inlay.formats.peft import PREFIX, apply_key_mapping, strip_prefix
from inlay.inject import apply
from inlay.layers import embeddings_of
from inlay.methods._abstract import AbstractAdapter, Params
from inlay.prompts import AbstractPrompt, AnyConfig
from inlay.report import BASE_KEY, LoadReport, base_fingerprint
from inlay.routing import Router
from inlay.storage.placement import as_parted, held, replace
from inlay.trained import ModulesToSaveWrapper, Tied, TrainableTokensWrapper
from inlay.walk import adapted_layers, biases, model_config, own_modules, wrappers
from inlay.works import Prepared, Work, prepare

PROMPT_PREFIX = "base_model."  # what the keys of heads beside a prompt begin with
EMBEDDING_NAMES = frozenset({"embed_tokens", "lm_head"})
# Components that other wrappers put into module paths and that files do not have.
_FOREIGN = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Place(NamedTuple):
    """Where one tensor of an adapter lives."""

    key: str
    owner: nn.Module
    attribute: str
    live: str
    device: torch.device
    filed: bool = True


Placed = tuple[AbstractAdapter | None, dict[str, Place]]


def root_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The user's model inside a handle, and what its keys begin with; a bare model is its own root."""
    base = model._modules.get("base_model")
    inner = base._modules.get("model") if base is not None and "peft_config" in base.__dict__ else None
    return (model, "") if inner is None else (inner, PREFIX)


def config_of(model: nn.Module, adapter_name: str) -> AnyConfig:
    """The config of an adapter in a handle or a bare model.

    Raises:
        UnknownAdapterError: No such adapter.
    """
    configs: dict[str, AnyConfig] = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise UnknownAdapterError(f"The model has no adapter {adapter_name!r}; it has {list(configs)}.")
    return configs[adapter_name]


def places(root: nn.Module, adapter_name: str, config: AnyConfig) -> dict[str, Place]:
    """Key -> every tensor of an adapter in the user's model."""
    return {place.key: place for _, here in _placed(root, adapter_name, config) for place in here.values()}


def _placed(root: nn.Module, adapter_name: str, config: AnyConfig) -> Iterator[Placed]:
    """(method, its places) of every layer with the adapter; without a method, copies of modules and trained biases."""
    for path, wrapper in wrappers(root):
        method = wrapper.methods.get(adapter_name) if isinstance(wrapper, Adapted) else None
        yield method, _places_of(path, wrapper, adapter_name)
    for name, bias in biases(root, config, adapter_name):
        above, _, attribute = name.rpartition(".")
        place = Place(without_foreign(name), root.get_submodule(above), attribute, name, bias.device)
        yield None, {name: place}


def _places_of(path: str, wrapper: Adapted | ModulesToSaveWrapper, adapter_name: str) -> dict[str, Place]:
    """One wrapper's, by the method's own names for them."""
    prefix = f"{path}." if path else ""
    plain = without_foreign(prefix)
    out = {}
    if isinstance(wrapper, Adapted):
        if adapter_name in wrapper.methods and not wrapper.methods[adapter_name].vacant:
            device = wrapper.facts()[1]
            slots = zip(wrapper.methods[adapter_name].slots, wrapper.tensors(adapter_name), strict=False)
            for key, (slot, owner, attribute) in slots:  # of a tied layer there are none
                live = f"{prefix}{slot.name}.{adapter_name}" + (f".{slot.leaf}" if slot.leaf else "")
                out[key] = Place(plain + slot.saved_name(), owner, attribute, live, device, slot.filed)
    elif adapter_name in wrapper.modules_to_save:
        copy = wrapper.modules_to_save[adapter_name]
        for name in copy.state_dict(keep_vars=True):
            above, _, attribute = name.rpartition(".")
            live = f"{prefix}modules_to_save.{adapter_name}.{name}"
            out[name] = Place(plain + name, copy.get_submodule(above), attribute, live, torch.device("meta"))
    return out


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
    initial: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """An adapter's tensors, by the names that files have.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside.
        state_dict (`Mapping[str, Tensor]`, *optional*): Take the tensors from here, by live name, instead of from the
            model (sharded training gathers them so); what is not in it is left out.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter.
        unwrap_compiled (`bool`, *optional*, defaults to `False`): Look inside a compiled model.
        save_embedding_layers (`bool` or `str`, *optional*, defaults to `"auto"`): Include the embeddings' own weights;
            ``"auto"`` does when they are adapted or have been resized.
        initial (`Mapping[str, Tensor]`, *optional*): The tensors that training began with, where starting values have
            been taken out of the base by other means than ``init_lora_weights``; what is given back is the difference.

    Raises:
        UnknownAdapterError: No such adapter.
        LoadError: ``initial`` lacks a tensor, or has one of another shape.

    Example:
        >>> import torch, inlay
        >>> model = inlay.get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 3)), inlay.LoraConfig(target_modules=["0"])
        ... )
        >>> sorted(inlay.get_peft_model_state_dict(model))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    if unwrap_compiled and "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    config = config_of(model, adapter_name)
    root, live = root_of(model)
    prompt = prompt_of(model, adapter_name)
    prefix = live if prompt is None else PROMPT_PREFIX
    state_dict = None if state_dict is None else _past_composites(root, live, state_dict)
    out: dict[str, Tensor] = {}
    for method, here in _placed(root, adapter_name, config):
        values = {k: _value(place, live, state_dict) for k, place in here.items()}
        p: Params = {k: t for k, t in values.items() if t is not None}
        if method is not None:
            p = method.own(p)
            if initial is not None and here and not method.converts:
                p = method.begun_at(p, _initial(initial, here))
            p = {k: t.contiguous() for k, t in method.saved(p).items() if here[k].filed}
        out.update({here[k].key: t for k, t in p.items()})
    for path, layer in adapted_layers(root):
        if isinstance(layer, Tied) and state_dict is None:
            out.update({f"{path}.{key}": t for key, t in layer.computed(adapter_name)})
    for key, t in _embeddings(root, config, adapter_name, save_embedding_layers):
        found = t if state_dict is None else state_dict.get(live + key)
        if found is not None:
            out[key] = found
    out = {without_foreign(prefix + key): t for key, t in out.items()}
    if prompt is not None:
        out.update(_filed_prompt(prompt, adapter_name, state_dict))
    _tell_shards(adapter_name, out)
    return out


def _tell_shards(adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Warns of what ZeRO-3 and FSDP leave of a tensor that nobody gathered: nothing, or a flat piece."""
    matrices = ("lora_A.weight", "lora_B.weight")
    if odd := [k for k, t in tensors.items() if t.dim() < 2 and (not t.numel() or k.endswith(matrices))]:
        told = f"Adapter {adapter_name!r}: {len(odd)} tensors have an invalid shape, as {odd[0]}"
        text = f"{told} of {list(tensors[odd[0]].shape)}: gather their shards first, and save then."
        warnings.warn(text, PeftWarning, stacklevel=3)


def prompt_of(model: nn.Module, adapter_name: str) -> AbstractPrompt | None:
    """The prompt of an adapter in a handle, where it is one."""
    encoders: Any = model._modules.get("prompt_encoder")
    return encoders[adapter_name] if encoders is not None and adapter_name in encoders else None


def _filed_prompt(
    prompt: AbstractPrompt, adapter_name: str, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    if state_dict is not None:
        start = f"prompt_encoder.{adapter_name}."
        given = {k.removeprefix(start): t for k, t in state_dict.items() if k.startswith(start)}
        prompt = copy.deepcopy(prompt)
        prompt.load_state_dict({**prompt.state_dict(), **given}, assign=True)
    with torch.no_grad():
        return {key: t.detach() for key, t in prompt.filed().items()}


def _past_composites(root: nn.Module, prefix: str, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Live names as `wrappers` has them, where adapters stand inside an adapted layer that is made of others."""
    around = {f"{prefix}{path}" for path, w in adapted_layers(root) if w.kind.composite}

    def past(key: str) -> str:
        outer, _, inner = key.partition(".base_layer.")
        return f"{outer}.{inner}" if outer in around and inner else key

    return {past(key): t for key, t in state_dict.items()} if around else state_dict


def _initial(initial: Mapping[str, Tensor], here: Mapping[str, Place]) -> dict[str, Tensor]:
    """One layer's tensors of the adapter that training began with."""
    stripped, out = strip_prefix(initial), {}
    for key, place in here.items():
        if place.filed:
            t, wanted = stripped.get(place.key), getattr(place.owner, place.attribute)
            if t is None or t.shape != wanted.shape:
                found = "no such tensor" if t is None else f"one of shape {list(t.shape)}"
                raise LoadError(
                    f"The initial adapter must hold {place.key!r} of shape {list(wanted.shape)}; it has {found}.",
                    LoadReport(),
                )
            out[key] = t.to(wanted)
    return out


def saved_config(model: nn.Module, adapter_name: str, converted: bool = False) -> AnyConfig:
    """The config of an adapter as files hold it, beside `get_peft_model_state_dict`."""
    config, (root, _) = config_of(model, adapter_name), root_of(model)
    found = (layer.methods[adapter_name].converts for _, layer in adapted_layers(root, adapter_name))
    return config.as_saved() if converted or any(found) else config


def without_foreign(key: str) -> str:
    """A name without the components that compiling, sharding and checkpointing wrappers put into it."""
    return _FOREIGN.sub("", key) if "._" in key or key.startswith("_") else key


def _value(place: Place, prefix: str, given: Mapping[str, Tensor] | None) -> Tensor | None:
    """A tensor as it is given, or of the model, without its gradient, from where it is kept if it is offloaded."""
    if given is not None and (place.filed or prefix + place.live in given):  # who gathers leaves out what is frozen
        return given.get(prefix + place.live)
    t: Tensor = getattr(place.owner, place.attribute)
    kept = held(place.owner, place.attribute) if t.is_meta else None
    return (t if kept is None else kept).detach()


def _embeddings(
    root: nn.Module, config: AnyConfig, adapter_name: str, asked: bool | str
) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the model's own embeddings that go into the file too."""
    starts = _changed_embeddings(root, config, adapter_name) if asked == "auto" else ("",) if asked else ()
    tables = dict(embedding_weights(root)) if starts else {}
    if asked is True and not tables:
        told = "Could not identify embedding layer(s): the model's get_input_embeddings() tells of no table."
        warnings.warn(told, PeftWarning, stacklevel=3)
    yield from ((name, W.detach()) for name, W in tables.items() if name.startswith(starts))


def embedding_weights(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, weight) of the model's input and output embeddings."""
    wanted = set()
    for which in ("input", "output"):
        module = embeddings_of(root, which)
        if isinstance(module, TrainableTokensWrapper):
            module = module.original_module
        if isinstance(module, Adapted):
            module = module.get_base_layer()
        if module is not None and (W := module._parameters.get("weight")) is not None:
            wanted.add(id(W))
    for name, module in own_modules(root):
        W = module._parameters.get("weight")
        if W is not None and id(W) in wanted:
            yield f"{name}.weight", W


def _changed_embeddings(root: nn.Module, config: AnyConfig, adapter_name: str) -> tuple[str, ...]:
    """Beginnings of the names of embeddings that go into a file: those that are adapted, or all after a resize."""
    if config.trainable_token_indices is not None:
        return ()
    paths = [path for path, _ in adapted_layers(root, adapter_name)]
    adapted = tuple(f"{path}." for path in paths if path.rpartition(".")[2] in EMBEDDING_NAMES)
    original = sources.base_vocabulary(config.base_model_name_or_path)
    now = getattr(getattr(root, "config", None), "vocab_size", None)
    resized = original is not None and now is not None and original != now
    if adapted or resized:
        grown = f"the embedding layer has been resized from {original} to {now} rows"
        why = grown if resized else "embedding layers found in `target_modules`"
        left_out = "Their own weights are saved too, which save_embedding_layers=False leaves out."
        told = f"Setting `save_embedding_layers` to `True` as {why}. {left_out}"
        warnings.warn(told, PeftWarning, stacklevel=5)
    return ("",) if resized else adapted


# ---------------------------------------------------------------------- into the model


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: Mapping[str, str] | None = None,
) -> LoadReport:
    """Puts tensors into an adapter that the model has already.

    Args:
        model (`nn.Module`): A handle, or a model with adapters inside.
        peft_model_state_dict (`Mapping[str, Tensor]`): By the names that files have. Without
            `inlay.settings.strict_load`, what is named like the frozen model's own tensors is put there.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Leave out tensors of another shape.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Accepted; the fast path is the only one.
        key_mapping (`Mapping[str, str]`, *optional*): Regex -> replacement, for keys of another naming.

    Returns:
        `LoadReport`: With ``missing_keys`` and ``unexpected_keys``.

    Raises:
        UnknownAdapterError: No such adapter.
        LoadError: A tensor has another shape; nothing was changed.
    """
    fit = _Fit(model, adapter_name, peft_model_state_dict, key_mapping, beside=not settings.strict_load)
    report = fit.report
    if report.shape and not ignore_mismatched_sizes:
        raise LoadError(f"Tensors do not fit the adapter {adapter_name!r}; nothing was changed.\n{report}", report)
    for key, *_ in report.shape:
        fit.tensors.pop(key)
    if report.shape:
        warnings.warn(f"ignore_mismatched_sizes leaves out:\n{report}", PeftWarning, stacklevel=2)
    name_live(report, model, adapter_name, peft_model_state_dict)
    fit.take()
    return report


class _Fit:
    """A file's tensors beside an adapter that stands in a model, and what they disagree on; nothing is changed yet.

    With ``beside``, what is named like the frozen model's own tensors is to be put there.
    """

    def __init__(self, model: nn.Module, adapter_name: str, given: Any, key_mapping: Any, beside: bool) -> None:
        self.root, _ = root_of(model)
        placed = list(_placed(self.root, adapter_name, config_of(model, adapter_name)))
        self.targets = {place.key: place for _, here in placed for place in here.values()}
        _check_unmerged(self.root, adapter_name)
        self.prompt = prompt_of(model, adapter_name)
        named = _named(self.root, given, _names(given, key_mapping, self.prompt))
        self.tensors, self.frozen = _restored(placed, named)
        if beside:
            self.targets = {**_frozen(self.root, self.tensors.keys() - self.targets.keys()), **self.targets}
        shapes = {k: tuple(getattr(p.owner, p.attribute).shape) for k, p in self.targets.items() if p.filed}
        shapes.update({} if self.prompt is None else self.prompt.filed_shapes())
        self.report = compare(shapes, self.tensors, _optional(self.root))

    def take(self) -> None:
        """Gives the adapter the tensors."""
        self.report.dtype.extend(assign(self.root, self.targets, {**self.tensors, **self.frozen}))
        if self.prompt is not None:
            self.prompt.take(self.tensors)


def name_live(report: LoadReport, model: nn.Module, adapter_name: str, given: Container[str]) -> None:
    """Has a report give its keys as the model would: beginning as a handle's names, and with the adapter's name.

    What is not expected is named as it was ``given``.
    """
    root, prefix = root_of(model)
    report.live.update({key: key if key in given else prefix + key for key in report.unexpected})
    if report.missing or report.shape:
        standing = places(root, adapter_name, config_of(model, adapter_name))
        report.live.update({key: prefix + place.live for key, place in standing.items()})


def _frozen(root: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """Where the frozen model has tensors of these names: PEFT puts a file's there, as SAI's control-LoRAs want."""
    modules, out = dict(own_modules(root)), dict[str, Place]()
    for name in names:
        above, _, attribute = name.rpartition(".")
        if above in modules and (t := modules[above]._parameters.get(attribute)) is not None:
            out[name] = Place(name, modules[above], attribute, name, t.device)
    return out


def _restored(placed: list[Placed], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors as the adapter has them: those that files name, and those that they do not."""
    out, frozen = dict(tensors), dict[str, Tensor]()
    for method, here in placed:
        if method is None:
            continue
        found = {k: tensors[place.key] for k, place in here.items() if place.filed and place.key in tensors}
        p = {k: getattr(place.owner, place.attribute) for k, place in here.items()}
        for key, t in method.restored(found, method.own(p)).items():
            (out if here[key].filed else frozen)[here[key].key] = method.padded(key, t, p[key].shape)
    return out, frozen


def _refuse(report: LoadReport, strict: bool, hopeless: bool) -> None:
    """Raises for what does not fit, where ``strict`` or where there is no way to go on."""
    if strict or hopeless:
        report.raise_for_problems(forgivable=not hopeless)


def _judge(report: LoadReport, strict: bool, hopeless: bool = False) -> None:
    """`_refuse`, and a warning of what is let through."""
    _refuse(report, strict, hopeless)
    if not report.ok:
        warnings.warn(report.summary(), PeftWarning, stacklevel=5)


# What PEFT writes with bias="all" beside the copy of a module that an adapter trains whole: the bias of the module
# under it, and the copy's own once more.
_REPEATED = (".original_module.bias", ".modules_to_save.bias")


def _names(
    keys: Iterable[str], key_mapping: Mapping[str, str] | None, prompt: AbstractPrompt | None = None
) -> dict[str, str]:
    """Key in a file -> its name from the user's model on, of all that is not there twice."""
    if prompt is None:
        stripped = strip_prefix({key: key for key in keys}, settings.strict_load)
    else:
        stripped = {key.removeprefix(PREFIX).removeprefix(PROMPT_PREFIX): key for key in keys}
    names = apply_key_mapping(stripped, key_mapping)
    return {key: names[bare] for bare, key in stripped.items() if not bare.endswith(_REPEATED)}


def _named(root: nn.Module, given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A file's tensors, or its header, by the model's names, with factors of single experts put together for it."""
    entries = {names[key]: value for key, value in given.items() if key in names}
    if ".experts." not in "\n".join(entries):
        return entries
    former = experts.FORMER.get(str(model_config(root).get("model_type")))
    if former is None:
        return entries
    infos = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
    outlines = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in infos.items()}
    return experts.fused_tensors({**entries, **outlines}, former)


def _check_unmerged(root: nn.Module, adapter_name: str) -> None:
    if any(adapter_name in w.merged_adapters for _, w in adapted_layers(root)):
        raise MergeError(
            f"Adapter {adapter_name!r} is merged: new values would not reach the merged weight. Unmerge it first."
        )


def _optional(root: nn.Module, works: Iterable[Work] = ()) -> dict[str, tuple[int, ...]]:
    """Keys that a file may have beside the adapter's own: the weights of embeddings, adapted or not, and of ties."""
    out: dict[str, tuple[int, ...]] = {}
    for name, parameter in embedding_weights(root):
        above, _, last = name.rpartition(".")
        out[name] = out[f"{above}.base_layer.{last}"] = tuple(parameter.shape)
    for path, layer in adapted_layers(root):
        if isinstance(layer, Tied):
            out.update({f"{path}.{k}": tuple(t.shape) for n in layer.methods for k, t in layer.computed(n)})
    for work in works:
        out.update(_filed(work.path, work.adapter) if work.source is not None else {})
    return out


def compare(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor | files.TensorInfo],
    optional: Mapping[str, tuple[int, ...]],
) -> LoadReport:
    """What a file's tensors, or its header, and an adapter's shapes have to say about each other."""
    report = LoadReport(
        missing=[key for key in expected if key not in found],
        unexpected=[key for key in found if key not in expected and key not in optional],
    )
    for key, t in found.items():
        wanted, shape = expected.get(key, optional.get(key)), tuple(t.shape)
        if wanted is not None and wanted != shape:
            report.shape.append((key, shape, wanted))
    return report


def assign(
    root: nn.Module, targets: Mapping[str, Place], tensors: Mapping[str, Tensor]
) -> list[tuple[str, torch.dtype, torch.dtype]]:
    """Puts tensors in place: they become the parameter where that is on the meta device, and are copied elsewhere.

    Returns:
        (key, dtype given, dtype kept) of those that were converted.
    """
    embeddings = dict(embedding_weights(root)) if tensors.keys() - targets.keys() else {}
    converted = []
    with torch.no_grad():
        for key, t in tensors.items():
            if (place := targets.get(key)) is None:
                if key in embeddings:
                    embeddings[key].copy_(t)
                continue
            owner, attribute = place.owner, place.attribute
            old = owner._parameters.get(attribute)
            if old is not None and old.dtype != t.dtype:
                converted.append((key, t.dtype, old.dtype))
            if old is None or not old.is_meta:
                standing = getattr(owner, attribute)
                standing.copy_(as_parted(t, standing))
            elif held(owner, attribute) is not None:
                replace(owner, attribute, t.to(old.dtype))
            else:
                new = t.to(t.device if place.device.type == "meta" else place.device, old.dtype)
                owner._parameters[attribute] = nn.Parameter(new, requires_grad=old.requires_grad)
    return converted


# ---------------------------------------------------------------------- from a directory


def load_peft_weights(
    model_id: str | Path, device: str | None = None, key_mapping: Mapping[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Reads an adapter's tensors, without a model.

    Args:
        model_id (`str` or `Path`): A directory, or an id on the hub.
        device (`str`, *optional*): Where to put them; the CPU if not given.
        key_mapping (`Mapping[str, str]`, *optional*): Regex -> replacement, for keys of another naming.
        hub: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ...

    Raises:
        MissingFileError, CorruptFileError: There are no weights, or they cannot be used.
    """
    subfolder = hub.pop("subfolder", None)
    directory = sources.locate(model_id, subfolder=subfolder, **sources.split_hub_arguments(hub)[0])
    with files.open_weights(directory) as weights:
        tensors = weights.read(device=device or "cpu")
    if key_mapping:
        names = apply_key_mapping(tensors, key_mapping)
        tensors = {names[key]: t for key, t in tensors.items()}
    return tensors


class Given(AbstractContextManager["Given"]):
    """Tensors that are in memory already, in the place of an open file.

    Args:
        tensors (`Mapping[str, Tensor]`): By the names that files have; they stay the caller's.

    Raises:
        LoadError: It holds something else.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for key, t in tensors.items():
            if not isinstance(t, Tensor) or t.is_meta:
                what = "a tensor on the meta device" if isinstance(t, Tensor) else f"a {type(t).__name__}"
                raise LoadError(f"The state dict must hold tensors with values, and has {what} as {key!r}.")
        self.header = {key: files.TensorInfo(t.dtype, tuple(t.shape)) for key, t in tensors.items()}
        self.metadata: dict[str, str] = {}
        self._tensors = dict(tensors)

    def read(self) -> dict[str, Tensor]:
        """Copies of them: what is loaded is nobody else's parameter."""
        return {key: t.detach().clone() for key, t in self._tensors.items()}

    def __exit__(self, *exc: object) -> None:
        return None


class Source(NamedTuple):
    """An adapter on disk, opened and not yet read; or what was read of one."""

    directory: Path
    config: PeftConfig
    weights: files.Weights | Given


def open_source(directory: Path, config: PeftConfig | None = None) -> Source:
    """Opens the pair in ``directory``; a given config stands in for the file's."""
    if config is not None:
        return Source(directory, config, files.open_weights(directory))
    values, weights = files.read_pair(directory, settings.strict_load)
    return Source(directory, PeftConfig.from_dict(values, str(directory / files.CONFIG_NAME)), weights)


def load_into(
    root: nn.Module,
    source: Source,
    adapter_name: str,
    *,
    config: AdapterConfig,
    strict: bool | None = None,
    trainable: bool = False,
    autocast: bool = True,
    activate: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    base_name: str | None = None,
    router: Router | None = None,
    present: Callable[[Iterable[str]], Mapping[str, str]] | None = None,
    replacing: bool = False,
) -> tuple[LoadReport, Prepared]:
    """Loads an opened adapter into a bare model, everything checked before anything is touched.

    ``present`` is asked what keys that the model does not know are called there by now.

    Returns:
        (`LoadReport`, `Prepared`): What the file and the model disagreed on, and what was put where.

    Raises:
        LoadError: The file does not fit and ``strict``; the model is as it was.
        PlanError: The config does not fit the model.
    """
    strict = settings.strict_load if strict is None else strict
    prepared = prepare(root, config, adapter_name=adapter_name, replacing=replacing)
    optional, wanted = _optional(root, prepared.works), expected(prepared)
    names = _names(source.weights.header, key_mapping)
    if present is not None and not wanted.keys() | optional.keys() >= set(names.values()):
        now = present(names.values())
        if len(set(now.values())) == len(now):
            names = {key: now.get(name, name) for key, name in names.items()}
    header = _named(root, source.weights.header, names)
    report = compare(wanted, header, optional)
    _floats_only(report, "an adapter", () if prepared.saved else header.values())
    if report.shape:
        _config_notes(report, prepared)
    _base_notes(report, prepared, source, base_name)
    _refuse(report, strict, hopeless=bool(report.shape) and not ignore_mismatched_sizes)
    tensors = _named(root, source.weights.read(), names)
    report.non_finite.extend(non_finite(_as_kept(prepared, tensors, autocast)))
    _judge(report, strict)
    for key, *_ in report.shape:
        tensors.pop(key)
    whole = not report.missing and not report.shape
    apply(prepared, adapter_name, meta=whole, autocast=autocast, activate=activate, trainable=trainable, router=router)
    report.dtype.extend(assign(root, places(root, adapter_name, config), tensors))
    return report, prepared


def _as_kept(prepared: Prepared, tensors: dict[str, Tensor], autocast: bool) -> dict[str, Tensor]:
    """The tensors in the dtype they will be kept in, where that is narrower than the file's: values may overflow."""
    kinds = {w.kept_dtype() for w in prepared.works}
    narrow = min(kinds, key=lambda dtype: torch.finfo(dtype).max, default=torch.float32)
    kept = torch.float32 if autocast and narrow.itemsize < 4 else narrow
    return {k: t.to(kept) if t.is_floating_point() and t.itemsize > kept.itemsize else t for k, t in tensors.items()}


def expected(prepared: Prepared) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor that a prepared adapter has in files."""
    out: dict[str, tuple[int, ...]] = {}
    for work in prepared.works:
        if work.source is None:
            out.update(_filed(work.path, work.adapter))
    for tokens in prepared.tokens:
        if tokens.source is None:
            out.update(_filed(f"{tokens.path}.token_adapter", tokens.adapter))
    for path in prepared.saved:
        module = prepared.survey.modules[path]
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        out.update({f"{path}.{k}": tuple(t.shape) for k, t in original.state_dict().items()})
    out.update(_bias_keys(prepared))
    return out


def _filed(path: str, adapter: AbstractAdapter) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{slot.saved_name()}": slot.shape for slot in adapter.slots.values() if slot.filed}


def _bias_keys(prepared: Prepared) -> Iterator[tuple[str, tuple[int, ...]]]:
    if prepared.config.bias == "none":
        return
    adapted = {work.path for work in prepared.works}
    saved = tuple(f"{path}." for path in prepared.saved)
    for path, module in prepared.survey.modules.items():
        layer = module.get_base_layer() if isinstance(module, Adapted) else module
        bias = layer._parameters.get("bias")
        # Inside attention the adapted layer's path in the model is not its path in files.
        nested = re.sub(r"(.*)\.out_proj$", r"\1.base_layer.out_proj", path)
        own = nested if nested in adapted else path
        inside = own in adapted or isinstance(module, Adapted)
        if bias is not None and not f"{path}.".startswith(saved) and (inside or prepared.config.bias == "all"):
            yield f"{own}.base_layer.bias" if inside else f"{path}.bias", tuple(bias.shape)


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of tensors with NaN or infinity: one norm over all, and a closer look only where it is not finite."""
    wide = [t if t.element_size() > 1 else t.float() for t in tensors.values() if t.is_floating_point() and t.numel()]
    norms = list(torch._foreach_norm(wide)) if wide else []
    together = norms if len({n.device for n in norms}) < 2 else [n.cpu() for n in norms]
    if not norms or bool(torch.stack(together).isfinite().all()):
        return []
    return [key for key, t in tensors.items() if t.is_floating_point() and not bool(t.float().isfinite().all())]


def live_fingerprint(root: nn.Module, adapter_name: str) -> str:
    """`base_fingerprint` of the layers that an adapter stands on."""
    return base_fingerprint(
        (without_foreign(path), w.kind.shape(w.get_base_layer()))
        for path, w in adapted_layers(root, adapter_name)
        if not w.methods[adapter_name].vacant and not path.endswith(".token_adapter")
    )


def _drawn_only(key: str, a: Any, b: Any) -> bool:
    """Whether two configs that differ in this field differ in how fresh tensors are drawn, and in nothing else."""
    computed = {"pissa", "olora", "loftq"}
    return key.startswith("init_") and key.endswith("weights") and computed.isdisjoint(map(inits.name_of, (a, b)))


def check_same(model: nn.Module, other: AnyConfig, adapter_name: str) -> None:
    """Raises `DuplicateAdapterError` where a file's config is another adapter's than the one of this name.

    With ``strict_load`` off it warns, where the method is the same: the tensors say then whether they fit.
    """
    ignored = {"inference_mode", "peft_version", "base_model_name_or_path", "auto_mapping", "revision"}
    b = other.to_dict()
    for mine in (saved_config(model, adapter_name), config_of(model, adapter_name)):
        a = mine.to_dict()
        unlike = {k for k in (a.keys() | b.keys()) - ignored if a.get(k) != b.get(k)}
        differ = sorted(k for k in unlike if not _drawn_only(k, a.get(k), b.get(k)))
        if not differ:
            return
    told = f"Adapter {adapter_name!r} exists already and the file's config differs in {differ}"
    if settings.strict_load or "peft_type" in differ:
        raise DuplicateAdapterError(f"{told}: choose another name, or delete it first.")
    warnings.warn(f"{told}: it takes the file's tensors, and keeps its own config.", PeftWarning, stacklevel=5)


def reload(
    model: nn.Module, source: Source, adapter_name: str, key_mapping: Mapping[str, str] | None, strict: bool | None
) -> LoadReport:
    """Gives an adapter that stands in a model the values of a file of the same config, in place.

    Raises:
        LoadError: The file does not fit and ``strict``; the adapter is as it was.
    """
    fit = _Fit(model, adapter_name, source.weights.read(), key_mapping, beside=False)
    fit.report.non_finite.extend(non_finite(fit.tensors))
    _judge(fit.report, settings.strict_load if strict is None else strict, hopeless=bool(fit.report.shape))
    fit.take()
    return fit.report


def load_prompt(
    root: nn.Module,
    source: Source,
    adapter_name: str,
    prompt: AbstractPrompt,
    prepared: Prepared,
    strict: bool | None = None,
    base_name: str | None = None,
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Reads the file of a prompt and of the heads beside it, and compares it with both; nothing is changed.

    Returns:
        (`LoadReport`, `dict[str, Tensor]`): What they disagree on, and what is to be taken up.

    Raises:
        LoadError: The file does not fit, and ``strict`` or there is no way to go on.
    """
    strict = settings.strict_load if strict is None else strict
    names, own = _names(source.weights.header, None, prompt), prompt.filed_shapes()
    header = _named(root, source.weights.header, names)
    report = compare({**expected(prepared), **own}, header, _optional(root))
    _floats_only(report, "a prompt", (header[key] for key in own if key in header))
    _base_notes(report, prepared, source, base_name)
    _refuse(report, strict, bool(report.shape or report.config) or not own.keys().isdisjoint(report.missing))
    tensors = _named(root, source.weights.read(), names)
    report.non_finite.extend(non_finite(tensors))
    _judge(report, strict)
    return report, tensors


def take_prompt(root: nn.Module, adapter_name: str, prompt: AbstractPrompt, tensors: Mapping[str, Tensor]) -> None:
    """Gives a prompt and the heads that stand beside it what `load_prompt` has read."""
    heads = places(root, adapter_name, prompt.config)
    assign(root, heads, {key: t for key, t in tensors.items() if key in heads})
    prompt.take(tensors)


def _floats_only(report: LoadReport, whose: str, infos: Iterable[files.TensorInfo]) -> None:
    if odd := sorted({str(info.dtype) for info in infos if not info.dtype.is_floating_point}):
        report.config.append(f"{whose}'s tensors are floats, the file has {', '.join(odd)}")


def _config_notes(report: LoadReport, prepared: Prepared) -> None:
    """Says where only the rank differs: then it is the config that contradicts the weights, not the base."""
    ranks = {
        f"{work.path}.{slot.saved_name()}": getattr(work.adapter, "r", None)
        for work in prepared.works
        for slot in work.adapter.slots.values()
    }
    seen = set()
    for key, file, model in report.shape:
        r = ranks.get(key)
        differ = [(f, m) for f, m in zip(file, model, strict=False) if f != m]
        if len(file) == len(model) and all(m == r for _, m in differ):
            seen.add((r, differ[0][0]))
    report.config.extend(f"the config says r={r}, the tensors have rank {found}" for r, found in sorted(seen))


def _base_notes(report: LoadReport, prepared: Prepared, source: Source, base_name: str | None) -> None:
    stored = source.weights.metadata.get(BASE_KEY)
    layers = ((work.path, work.kind.shape(work.layer)) for work in prepared.works)
    if stored is not None and stored != base_fingerprint(layers):
        report.base.append("the adapted layers have other names or shapes than where the adapter was trained")
    made_for = source.config.base_model_name_or_path
    if made_for and base_name and made_for != base_name:
        report.notes.append(f"the adapter names its base {made_for!r}, this model calls itself {base_name!r}")
