"""PEFT's class structure over the one wrapper: classes whose ``isinstance`` answers by what a layer holds.

In inlay every adapted layer is an `inlay.adapted.Adapted`, whatever the method, the kind of layer and the way its
weight is stored. ``isinstance(layer, peft.tuners.lora.Linear4bit)`` asks the wrapper for those three.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from inlay.adapted import Adapted
from inlay.leaves import Group
from inlay.methods import METHODS
from inlay.model import tell_adapted
from inlay.tuner import Tuner


class Family(NamedTuple):
    """One method's classes: the method, what holds its layers, what they all are, and the slots they may have."""

    method: str
    model: str
    layer: str
    slots: str


#: package under ``peft.tuners`` -> its family
FAMILIES = {
    "lora": Family(
        "LORA", "LoraModel", "LoraLayer", "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector"
    ),
    "adalora": Family(
        "ADALORA", "AdaLoraModel", "AdaLoraLayer", "lora_A lora_B lora_E lora_embedding_A lora_embedding_B"
    ),
    "ia3": Family("IA3", "IA3Model", "IA3Layer", "ia3_l"),
    "loha": Family("LOHA", "LoHaModel", "LoHaLayer", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
    "lokr": Family(
        "LOKR", "LoKrModel", "LoKrLayer", "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"
    ),
    "oft": Family("OFT", "OFTModel", "OFTLayer", "oft_R oft_embedding_R"),
    "adaption_prompt": Family(
        "ADAPTION_PROMPT", "AdaptionPromptModel", "AdaptedAttention", "adaption_prompt adaption_gate"
    ),
}
#: class of one kind of layer -> the kinds of the wrapper's that it stands for, and the storage, if it names one
LAYERS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "Linear": (("Linear", "Conv1D"), "plain"),
    "Linear4bit": (("Linear",), "bnb4"),
    "Linear8bitLt": (("Linear",), "bnb8"),
    "SVDLinear": (("Linear", "Conv1D"), "plain"),
    "SVDLinear4bit": (("Linear",), "bnb4"),
    "SVDLinear8bitLt": (("Linear",), "bnb8"),
    # ways of packing that no storage reads yet: no layer is one of these
    "AqlmLoraLinear": (("Linear",), "aqlm"),
    "AwqLoraLinear": (("Linear",), "awq"),
    "GPTQLoraLinear": (("Linear",), "gptq"),
    "LoraParallelLinear": (("Linear",), "megatron"),
    "SVDQuantLinear": (("Linear",), "gptq"),
    "TeLinear": (("Linear",), "te"),
    "TorchaoLoraLinear": (("Linear",), "torchao"),
    "Conv1d": (("Conv1d",), None),
    "Conv2d": (("Conv2d",), None),
    "SVDConv2d": (("Conv2d",), None),
    "Conv3d": (("Conv3d",), None),
    "Embedding": (("Embedding",), None),
    "MultiheadAttention": (("MultiheadAttention",), None),
    "ParamWrapper": (("Parameter",), None),
}
MODELS = {family.model: package for package, family in FAMILIES.items()}
BASES = {family.layer: package for package, family in FAMILIES.items()}


class Described(type):
    """The type of a class that nothing is made of: ``describes`` says what counts as one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.of) and cls.describes(instance)  # type: ignore[attr-defined]


def find(module: str, name: str) -> type | None:
    """The class ``name`` of PEFT's ``module``, if it is one of these."""
    package = module.split(".")[2] if module.startswith("peft.tuners.") else ""
    if name in MODELS:
        return model(MODELS[name])
    if name in BASES:
        return layer(BASES[name], name)
    if name == "BufferDict":
        return described(name, Group, lambda group: True)
    if name == "LycorisLayer":
        return described(name, Adapted, lambda w: holds(w, "LOHA", "LOKR"))
    if name == "MixedModel":
        return described(name, Tuner, lambda t: len({c.method for c in t.peft_config.values()}) > 1)
    if name == "LycorisTuner":
        return described(name, Tuner, lambda t: any(c.method in ("LOHA", "LOKR") for c in t.peft_config.values()))
    if package in FAMILIES and name in LAYERS:
        return layer(package, name)
    return None


def holds(wrapper: Adapted, *methods: str) -> bool:
    """Whether a layer has an adapter of one of these methods."""
    wanted = {METHODS[method].adapter for method in methods}
    return any(type(adapter) in wanted for adapter in wrapper.methods.values())


def tuner(method: str) -> type:
    """The class of ``handle.base_model`` with this method; `Tuner` itself for one that came from outside."""
    return next((model(package) for package, family in FAMILIES.items() if family.method == method), Tuner)


def described(name: str, of: type, describes: Any, base: type | None = None, **attributes: Any) -> type:
    """A class under this name, whose instances are those of ``of`` that ``describes`` accepts."""
    below = {"of": of, "describes": staticmethod(describes), "__slots__": (), **attributes}
    return Described(name, (base or of,), below)


@cache
def layer(package: str, name: str) -> type:
    """The class of a method's layers, of one kind if ``name`` is a kind's."""
    family = FAMILIES[package]
    kinds, storage = LAYERS.get(name, ((), None))
    counted = (family.method, *(("ADALORA",) if name == "LoraLayer" else ()))  # as AdaLoraLayer is a LoraLayer there

    def describes(wrapper: Adapted) -> bool:
        if not holds(wrapper, *counted) or (kinds and wrapper.kind.name not in kinds):
            return False
        return storage is None or wrapper.storage.name == storage

    def new(cls: type, base_layer: Any, adapter_name: str, config: Any, *values: Any, **numbers: Any) -> Adapted:
        return Adapted.around(base_layer, adapter_name, config, *values, **numbers)

    base = None if name == family.layer else layer(package, family.layer)
    base = layer("lora", "LoraLayer") if name == "AdaLoraLayer" else base  # as it is in PEFT
    return described(name, Adapted, describes, base, adapter_layer_names=tuple(family.slots.split()), __new__=new)


@cache
def model(package: str) -> type:
    """The class of what holds a method's layers: ``handle.base_model``."""
    family = FAMILIES[package]
    counted = {family.method, *(("ADALORA",) if package == "lora" else ())}  # as for its layers

    def describes(tuner: Tuner) -> bool:
        return not counted.isdisjoint(config.method for config in tuner.peft_config.values())

    # AdaLoraModel has it as `config`
    def new(
        cls: type,
        model: Any,
        peft_config: Any = None,
        adapter_name: str = "default",
        *,
        config: Any = None,
        **how: Any,
    ) -> Tuner:
        tell_adapted(model)
        tuner, given = Tuner(model), config if peft_config is None else peft_config
        tuner.peft_config = dict(given) if isinstance(given, dict) else {adapter_name: given}
        tuner.inject_adapter(model, adapter_name, **how)
        return tuner

    base = model("lora") if package == "adalora" else None  # as it is in PEFT
    return described(family.model, Tuner, describes, base, __new__=new, __module__=f"peft.tuners.{package}.model")
