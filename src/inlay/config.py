"""Configs: the fields every method shares, written once; JSON in and out.

A config is a dataclass of plain values. It is checked when it is made (types, ranges, names of fields), never holds a
tensor or a module, and imports nothing that a file names.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import sys
import types
import warnings
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from inlay import settings, sources
from inlay.errors import (
    ConfigError,
    FieldTypeError,
    PeftWarning,
    UnknownFieldError,
    UnknownMethodError,
    UnsupportedFieldError,
    WrongMethodError,
    nearest,
)
from inlay.formats import files
from inlay.match import check_layers

# The level of PEFT's file format that is written, kept in the key that PEFT itself uses for it.
FORMAT_VERSION = "0.21.2"
CONFIG_NAME = files.CONFIG_NAME
GIVEN = "the given dict"
RANKS, ALPHAS = "[1, 2147483647]", "[-2147483647, 2147483647]"


class TaskType(str, enum.Enum):
    """What the adapted model is for; chooses the handle's class and which heads are trained beside the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """Names of methods as they stand in files: the rows of `inlay.methods.METHODS` and `inlay.prompts.PROMPTS`."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    CPT = "CPT"
    CARTRIDGE = "CARTRIDGE"

    @classmethod
    def open(cls, name: str) -> PeftType:
        """The member ``name``, made where there is none: for `inlay.register_peft_method`."""
        if name not in cls.__members__:
            member = str.__new__(cls, name)
            member._name_, member._value_ = name, name
            cls._member_map_[name] = cls._value2member_map_[name] = member
        return cls[name]


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what the annotation ``hint`` promises: containers are looked into, bool is no int."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin in (list, set):
        return isinstance(value, origin) and all(_fits(item, args[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(_fits, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint is float:  # NaN compares as false, and an int beyond every float is compared without becoming one
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if hint is int:
        return type(value) is int
    return isinstance(value, hint)


def _readable(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return text.replace("typing.", "").replace("inlay.config.", "").replace("inlay.methods.", "")


# Metadata of fields: never written to a file; written where it is not the default, for PEFT's config of most methods
# lacks it; PEFT's and not built yet, so that setting it is an `UnsupportedFieldError`.
RUNTIME_ONLY = {"written": "never"}
WHEN_SET = {"written": "when set"}
LATER = {"later": True}


def within(interval: str) -> dict[str, str]:
    """Metadata of a field whose number, or every number of whose table, lies in an interval such as ``"[0, 1)"``."""
    return {"within": interval}


_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def _outside(value: Any, interval: str) -> Any:
    """The first number in ``value``, of a table perhaps, that is not in the interval; None where all are."""
    found = _INTERVAL.fullmatch(interval)
    assert found is not None, "an interval of this library's own"
    least, most = float(found[2]), float(found[3])
    for number in value.values() if isinstance(value, dict) else (value,):
        above = least <= number if found[1] == "[" else least < number
        if not (above and (number <= most if found[4] == "]" else number < most)):
            return number
    return None


@dataclass
class PeftConfig:
    """What every config has, whatever the method.

    Args:
        task_type (`TaskType` or `str`, *optional*): What the model is for.
        peft_type (`PeftType` or `str`, *optional*): The method; set by the method's own config.
        auto_mapping (`dict`, *optional*): Class and library of the base model, where no task type tells.
        peft_version (`str`, *optional*): Level of the file format.
        base_model_name_or_path (`str`, *optional*): The base model that the adapter was made for.
        revision (`str`, *optional*): Revision of the base model.
        inference_mode (`bool`, *optional*, defaults to `False`): Load the adapter frozen.

    Raises:
        UnknownFieldError: A keyword names no field of this config.
        ConfigError: A value has the wrong type or is out of range.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # The method's name; and what tables and reports give it, where defaults do not do. Its own config sets both.
    method: ClassVar[str] = ""
    example: ClassVar[dict[str, Any]] = {}
    # Fields that PEFT's config of this method has and the shared block would write only when set.
    always_written: ClassVar[frozenset[str]] = frozenset()
    # Fields that it inherits and that say nothing about it: setting one is an error.
    meaningless: ClassVar[frozenset[str]] = frozenset()
    # Fields that did something else in files of before a version of PEFT.
    changed: ClassVar[dict[str, str]] = {}
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Runs before the generated __init__, whose own complaint would name no neighbour.
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise UnknownFieldError(
                    f"{cls.__name__} got an unexpected keyword argument '{name}'{nearest(name, known)}. Its fields: "
                    f"{', '.join(known)}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # PEFT writes a commit behind the version of what is no release.
        self.peft_version = self.peft_version or FORMAT_VERSION + ("@UNKNOWN" if ".dev" in FORMAT_VERSION else "")
        if self.method:
            self.peft_type = PeftType(self.method)
        self._check_types()
        if self.task_type is not None:
            if self.task_type not in TaskType.__members__:
                valid = ", ".join(TaskType.__members__)
                raise ConfigError(f"Invalid task type: {self.task_type!r}. Task types are {valid}.")
            self.task_type = TaskType(self.task_type)
        if self.peft_type is not None:
            if self.peft_type not in PeftType.__members__:
                raise UnknownMethodError(f"peft_type {self.peft_type!r} is no method of this library.")
            self.peft_type = PeftType(self.peft_type)

    def _check_types(self) -> None:
        cls: Any = type(self)
        hints = _hints(cls)
        for f in fields(self):
            value = getattr(self, f.name)
            if not _fits(value, hints[f.name]):
                raise FieldTypeError(
                    f"{type(self).__name__}.{f.name} must be {_readable(hints[f.name])}, got {value!r} "
                    f"({type(value).__name__})."
                )
            if (f.metadata.get("later") or f.name in self.meaningless) and value not in (None, _default(f)):
                why = "has no meaning here" if f.name in self.meaningless else "is not built yet"
                raise UnsupportedFieldError(f"{cls.__name__}.{f.name}={value!r} {why}; leave it at {_default(f)!r}.")
            interval = f.metadata.get("within")
            if interval and value is not None and (found := _outside(value, interval)) is not None:
                raise ConfigError(f"{f.name} must be in {interval}, got {str(found)[:20]}.")

    def to_dict(self) -> dict[str, Any]:
        """The config's values by field, as they are; files have sets in sorted order."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value, written = getattr(self, f.name), f.metadata.get("written")
            unset = value == _default(f) and f.name not in self.always_written
            if written == "never" or (written == "when set" and unset):
                continue
            out[f.name] = _plain(value)
        return out

    def as_loaded(self) -> Self:
        """The config of the adapter that a file with this config holds."""
        return self

    def as_saved(self) -> Self:
        """The config of the file of an adapter that is saved as another one (`AbstractAdapter.converts`)."""
        return self

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields of a file as they are, with a warning where one had another effect when it was written."""
        # Files of before 0.18 have no version.
        written = [int(n) for n in re.findall(r"\d{1,9}", str(kwargs.get("peft_version")))]
        for name, version in cls.changed.items():
            if kwargs.get(name) and written < [int(n) for n in version.split(".")]:
                what = name.removeprefix("use_").replace("_", "-")
                warnings.warn(
                    f"The {what} parameterization has been slightly changed in PEFT {version}, and the file is of an "
                    "earlier one: the adapter computes something else than it did. Train it anew, or go back to that.",
                    PeftWarning,
                    stacklevel=4,
                )
        return kwargs

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = GIVEN) -> PeftConfig:
        """Makes the config that ``values["peft_type"]`` names.

        Fields that the config does not have are dropped with one warning that names them, for a newer library may
        have written them.

        Args:
            values (`dict`): Fields and values, as from a file.
            where (`str`, *optional*): What to call the source in messages.

        Raises:
            WrongMethodError: ``peft_type`` is missing, or is another method's than ``cls``'s and `inlay.settings` asks
                for strict loading.
            UnknownMethodError: ``peft_type`` is no method of this library.
            ConfigError: A value has the wrong type or is out of range.
        """
        config_cls = cls.named_in(values, where)
        known = {f.name: f for f in fields(config_cls)}
        extra = sorted(set(values) - set(known))
        if extra:
            warnings.warn(
                f"Unexpected keyword arguments {extra} for class {config_cls.__name__}, these are ignored. A newer "
                f"library may have written {where}; check that the adapter does not depend on them.",
                PeftWarning,
                stacklevel=3,
            )
        kept = {k: v for k, v in values.items() if k in known and known[k].metadata.get("written") != "never"}
        return config_cls(**kept if where == GIVEN else config_cls.check_kwargs(**kept))

    @classmethod
    def named_in(cls, values: dict[str, Any], where: str = GIVEN) -> type[PeftConfig]:
        """The class of the config that ``values["peft_type"]`` names; raises as `from_dict` does."""
        from inlay.methods import METHODS
        from inlay.prompts import PROMPTS

        table: dict[str, Any] = {**METHODS, **PROMPTS}
        name = values.get("peft_type")
        if name is None and cls is not PeftConfig and values:
            config_cls: type[PeftConfig] = cls
        elif not isinstance(name, str):
            raise WrongMethodError(f"{where} has no 'peft_type': it is not the config of an adapter.")
        elif (key := name.rsplit(".", 1)[-1].upper()) not in table:
            raise UnknownMethodError(
                f"{where} is of the method {name!r}, which this library does not have; it has {', '.join(table)}."
            )
        else:
            config_cls = table[key].config
        if settings.strict_load and not issubclass(config_cls, cls):
            raise WrongMethodError(f"{where} is a {config_cls.__name__}, asked for was a {cls.__name__}.")
        return config_cls

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """Reads a config file as a dict, without making a config of it or taking how it is run from there."""
        return _without_runtime(files.read_json(path_json_file), path_json_file)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Reads the config of a saved adapter.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A directory, or an id on the hub.
            subfolder (`str`, *optional*): Folder inside it.
            kwargs: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only`` for the hub; a
                field's name replaces the file's value; what is meant for a model (``trust_remote_code``) is ignored.

        Raises:
            UnknownArgumentError: A keyword is none of these, and `inlay.settings` asks for strict loading.
            MissingFileError: There is no ``adapter_config.json``.
            CorruptFileError: It is not a JSON object, or not a regular file.
        """
        hub, own = sources.split_hub_arguments(kwargs)
        directory = sources.locate(pretrained_model_name_or_path, subfolder=subfolder, weights=False, **hub)
        values = _without_runtime(files.read_config(directory), directory / CONFIG_NAME)
        where = str(directory / CONFIG_NAME)
        if "peft_type" not in values and (cls is PeftConfig or not {f.name for f in fields(cls)}.issuperset(values)):
            told = f"{where}, to be a {cls.__name__}, is missing required keys: {{'peft_type'}}."
            raise WrongMethodError(f"{told} It is not the config of an adapter.")
        made = cls.from_dict(values, where)
        known = {f.name for f in fields(made)}
        if settings.strict_load:
            sources.check_arguments(cls.from_pretrained, own, sources.LOADING | known)
        replaced = {name: value for name, value in own.items() if name in known}
        return dataclasses.replace(made, **replaced) if replaced else made

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Makes the config that ``peft_type`` names, else one of this class; drops unknown keywords with a warning."""
        return PeftConfig.from_dict({"peft_type": cls.method, **kwargs} if cls.method else kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes ``adapter_config.json``.

        Args:
            save_directory (`str` or `Path`): The directory; made if absent.
            kwargs: ``auto_mapping_dict`` sets `auto_mapping` in the file; others are ignored as PEFT does.

        Raises:
            UnwritableError: The path is a file, or cannot be written.
        """
        values = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        files.write_config(save_directory, values)


def _without_runtime(values: dict[str, Any], where: object) -> dict[str, Any]:
    if values.pop("runtime_config", None) is not None:
        told = f"{where} contains a `runtime_config` key, which is ignored: it is set where an adapter is run."
        warnings.warn(told, PeftWarning, stacklevel=3)
    return values


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _plain(value: Any) -> Any:
    """A copy of lists, dicts and dataclasses, as lists and dicts."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return value


@dataclass
class AdapterConfig(PeftConfig):
    """Where a layer method goes and what is trained beside it: the same fields for every method.

    Args:
        target_modules (`list[str]` or `str`, *optional*): Names or dotted suffixes of modules; a `str` is a regex for
            the whole name; ``"all-linear"`` is every linear layer but the output head; `None` is the architecture's
            default.
        exclude_modules (`list[str]` or `str`, *optional*): Modules to leave out, matched in the same way.
        layers_to_transform (`list[int]` or `int`, *optional*): Only layers with these indices.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the list of layers, where it is not the usual one.
        modules_to_save (`list[str]`, *optional*): Modules that are copied, trained whole and saved.
        bias (`str`, *optional*, defaults to ``"none"``): Which biases are trained: ``"none"``, ``"all"`` or
            ``"<method>_only"``.
        fan_in_fan_out (`bool`, *optional*, defaults to `False`): Accepted; the layer's kind tells the layout.
        target_parameters (`list[str]`, *optional*): Dotted suffixes of bare parameters to adapt.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*): Rows of the embedding to train.
        layer_replication (`list[tuple[int, int]]`, *optional*): Ranges of layers to stack anew, weights shared.
        ensure_weight_tying (`bool`, *optional*, defaults to `False`): Keep tied layers tied in what is trained.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | set[str] | None = None
    layers_to_transform: list[int] | int | None = field(default=None, metadata=WHEN_SET)
    layers_pattern: list[str] | str | None = field(default=None, metadata=WHEN_SET)
    bias: str = field(default="none", metadata=WHEN_SET)
    fan_in_fan_out: bool = field(default=False, metadata=WHEN_SET)
    target_parameters: list[str] | set[str] | None = field(default=None, metadata=WHEN_SET)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None, metadata=WHEN_SET)
    layer_replication: list[tuple[int, int]] | None = field(default=None, metadata=WHEN_SET)
    ensure_weight_tying: bool = field(default=False, metadata=WHEN_SET)

    # Field of the value that varies by layer -> field with the {pattern: value} table.
    patterned: ClassVar[dict[str, str]] = {}
    bias_only: ClassVar[str] = "adapter_only"

    def __post_init__(self) -> None:
        self.read_by_transformers = False  # its loader has asked for this adapter's keys and will write the tensors
        if self.layer_replication is not None:  # JSON has no tuples
            self.layer_replication = [tuple(pair) for pair in self.layer_replication]  # type: ignore[misc]
        for name in ("target_modules", "exclude_modules", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
                setattr(self, name, set(value) if name != "target_parameters" else sorted(value))
        for name in ("modules_to_save", "trainable_token_indices", "layers_to_transform"):
            if isinstance(value := getattr(self, name), tuple | range):
                setattr(self, name, list(value))
        super().__post_init__()
        if self.bias not in ("none", "all", self.bias_only):
            raise UnsupportedFieldError(f"bias must be 'none', 'all' or '{self.bias_only}', got {self.bias!r}.")
        check_layers(self.target_modules, self.layers_to_transform, self.layers_pattern)

    def patterns(self) -> dict[str, dict[str, Any]]:
        """``{"r": rank_pattern, ...}``: for every value that varies by layer, its table."""
        return {value: getattr(self, table) for value, table in self.patterned.items()}

    def topmost(self) -> int | None:
        """How many of the targets are adapted, the last ones of the model; `None` for all."""
        return None

    @property
    def invocation(self) -> list[int] | None:
        """The tokens from whose last occurrence on the adapter acts; None for all tokens."""
        return None

    def layer_values(self, path: str, model_type: str | None) -> dict[str, Any]:
        """What else the method decides by a layer's name; handed to its adapter with the values of `patterns`."""
        return {}

    def spell_out(self, model_type: str | None) -> None:
        """Writes what was left to the architecture's default into the config, for files; targets are spelt already."""
