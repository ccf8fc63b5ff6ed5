"""PEFT's constants and tables, from inlay's."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from inlay.config import CONFIG_NAME, PeftType
from inlay.formats import files
from inlay.integrations.environment import has_device, installed, is_version
from inlay.methods import METHODS
from inlay.methods._targets import IA3_FEEDFORWARD
from inlay.prompts import PROMPTS
from inlay.state import EMBEDDING_NAMES
from peft import _classes


class Rows(Mapping[Any, Any]):
    """A column of inlay's tables of methods, methods that are registered later among them."""

    def __init__(self, column: Callable[[str, Any], Any], *tables: Mapping[str, Any]) -> None:
        self._column, self._tables = column, tables

    def _rows(self) -> dict[PeftType, Any]:
        return {PeftType(key): self._column(key, row) for table in self._tables for key, row in table.items()}

    def __getitem__(self, key: Any) -> Any:
        return self._rows()[key]

    def __repr__(self) -> str:
        return repr(self._rows())

    def __iter__(self) -> Iterator[PeftType]:
        return iter(self._rows())

    def __len__(self) -> int:
        return len(self._rows())


#: methods that PEFT has and inlay has not, yet: the row goes when the method comes
LATER = (
    "ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA LILY LN_TUNING MISS OSF PEANUT POLY PSOFT "
    "PVERA RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT XLORA"
)
MIXABLE = ("LORA", "LOHA", "LOKR", "ADALORA", "OFT")

for _name in LATER.split():
    PeftType.open(_name)  # so that `PeftType.VERA` can be compared with

CONFIGS = Rows(lambda key, row: row.config, METHODS, PROMPTS)
PREFIXES = Rows(lambda key, row: getattr(row, "prefix", f"{key.lower()}_"), METHODS, PROMPTS)
TUNERS = Rows(lambda key, row: getattr(row, "encoder", None) or _classes.tuner(key), METHODS, PROMPTS)
MIXED = Rows(lambda key, row: _classes.tuner(key), METHODS)

#: what ``is_<name>_available`` asks for, where it is not a library of this name
LIBRARIES = {
    "bnb": "bitsandbytes",
    "bnb_4bit": "bitsandbytes",
    "inc": "neural_compressor",
    "te": "transformer_engine",
    "te_pytorch": "transformer_engine",
}


def asking(name: str, ask: Callable[..., bool]) -> Callable[..., bool]:
    """A function of ``peft.import_utils``, which answers once."""
    ask.__name__ = ask.__qualname__ = name
    ask.__module__ = "peft.import_utils"
    return cache(ask)


NAMES: dict[str, Any] = {
    "ABC": ABC,
    "ALL_LAYERNORM_LAYERS": [torch.nn.LayerNorm],
    "ALLOWED_COMPUTE_DTYPES": (torch.float16, torch.bfloat16, torch.float32),
    "COMPATIBLE_TUNER_TYPES": tuple(PeftType(key) for key in MIXABLE),
    "CONFIG_KEYS_TO_CHECK": {PeftType.LORA: ["use_dora"]},  # what else may differ: docs/hotswap.md
    "CONFIG_NAME": CONFIG_NAME,
    "DUMMY_MODEL_CONFIG": {"model_type": "custom"},
    "DUMMY_TARGET_MODULES": "dummy-target-modules",
    "EMBEDDING_LAYER_NAMES": sorted(EMBEDDING_NAMES),
    "ENABLE_DORA_CACHING": False,  # what `DoraCaching` keeps is kept elsewhere
    "F": F,
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": "all-linear",
    "MIN_EXPECTED_CONFIG_KEYS": {"peft_type"},
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION": 20,
    "PEFT_TYPE_TO_CONFIG_MAPPING": CONFIGS,
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": MIXED,
    "PEFT_TYPE_TO_PREFIX_MAPPING": PREFIXES,
    "PEFT_TYPE_TO_TUNER_MAPPING": TUNERS,
    "PREFIXES": [METHODS[key].prefix for key in MIXABLE],
    "PeftType": PeftType,
    "SAFETENSORS_WEIGHTS_NAME": files.SAFETENSORS_NAME,
    "SEQ_CLS_HEAD_NAMES": ["score", "classifier"],
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": IA3_FEEDFORWARD,
    "TOKENIZER_CONFIG_NAME": "tokenizer_config.json",
    "TYPE_CHECKING": False,
    "UPCAST_DTYPES": ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "is_torch_tpu_available": asking("is_torch_tpu_available", lambda check_device=True: installed("torch_xla")),
    "is_torchao_ge_v0_18_0": asking("is_torchao_ge_v0_18_0", lambda: is_version("torchao", "0.18.0")),
    "is_xpu_available": asking("is_xpu_available", lambda check_device=False: has_device("xpu")),
    "torch_load": torch.load,
    "VARIANT_KWARG_KEYS": [],  # an activated adapter's offsets do not travel through the layers' arguments
    "WEIGHTS_NAME": files.PICKLE_NAME,
}


def find(name: str) -> Any:
    """The constant or table of this name, or None."""
    if name in NAMES:
        return NAMES[name]
    if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
        key = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_TARGET_MODULES_MAPPING")
        return METHODS[key].default_targets if key in METHODS else None
    if found := re.fullmatch(r"is_(\w+)_available", name):
        library = LIBRARIES.get(found[1], found[1])
        return asking(name, lambda: installed(library))
    if found := re.fullmatch(r"is_transformers_(ge|le)_v?(\w+)", name):
        version = found[2].replace("_", ".")
        return is_version("transformers", **{"at_least" if found[1] == "ge" else "at_most": version})
    return None
