"""Every exception and warning that inlay raises by name.

Each says what was found, what was expected and what to do, and is raised before anything is changed. Each is also a
subclass of what the PEFT library raises in the same place, so an existing ``except`` still catches it.

    PeftError
    ├── ConfigError (ValueError)
    │   ├── UnknownFieldError (TypeError)         a constructor got a field that does not exist
    │   ├── FieldTypeError (TypeError)            a field has a value of the wrong type
    │   ├── UnsupportedFieldError (NotImplementedError)  the field exists, what it asks for is not built yet
    │   ├── UnknownMethodError (KeyError)         peft_type names no method of this library
    │   ├── TokenIndexError (IndexError)          a token outside the vocabulary
    │   ├── InvocationError                       a text that has other tokens inside a prompt than alone
    │   └── WrongMethodError (TypeError, KeyError)  a config of another method than was asked for
    ├── PlanError (ValueError)
    │   ├── NoMatchingPeftModuleError             nothing in the model matches
    │   ├── UnknownArchitectureError              no default targets for this model type
    │   ├── UnsupportedLayerError (TypeError)     a target that the method cannot adapt
    │   ├── PatternError (re.error)               a pattern that does not compile or may not come from a file
    │   └── PromptError                           a prompt cannot act in this call, or on this model
    │       └── TaskIndexError (IndexError)       a task that a prompt of several tasks does not have
    ├── AdapterNameError (ValueError, KeyError)
    │   ├── DuplicateAdapterError
    │   └── UnknownAdapterError
    ├── RoutingError
    │   ├── RowsError (ValueError)                adapter_names does not fit the batch or a module
    │   │   └── RowsUnreachableError (TypeError)  a module uses its weight whole
    │   ├── LostRoutingError (RuntimeError)       recomputed in backward without the routing of its forward
    │   └── BusyError (RuntimeError)              a write from inside a forward of the same model; a session in a turn
    ├── CacheError (ValueError)                   a session cannot share this model's cache, or go on from this one
    ├── MergeError (ValueError)
    │   ├── NotMergeableError (NotImplementedError)
    │   ├── NonFiniteMergeError                   safe_merge found NaN or infinity
    │   └── BaseGoneError (RuntimeError)          keep_base=False gave the pristine weight away
    ├── FileError (ValueError)
    │   ├── MissingFileError (FileNotFoundError)
    │   ├── UnreadableError (PermissionError)     it is there, and the system does not give it
    │   ├── CorruptFileError (SafetensorError)    truncated, malformed, over a limit, of an unsafe kind
    │   ├── TornPairError                         config and weights are not of one save
    │   └── UnwritableError (PermissionError, NotADirectoryError)
    ├── LoadError (RuntimeError)                  the file does not fit; `.report` says where
    │   ├── IncompatibleBaseError                 made for another base model
    │   └── NonFiniteError                        NaN or infinity in the file's tensors
    ├── HotswapError (ValueError)                 an adapter cannot take a loaded one's place, which is as it was
    │   └── MoreLayersError                       a LoadError too: it adapts layers that the loaded one does not
    ├── UnknownArgumentError (TypeError)          a keyword that the function does not know, and would have swallowed
    ├── NoGradientError (TypeError)               a step of training was to be followed up before it was made
    ├── NotBuiltError (NotImplementedError)       a name of PEFT's for which there is nothing here yet
    └── MissingMethodError (AttributeError)       the model has no method of this name
    PeftWarning (UserWarning, RuntimeWarning)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from inlay.report import LoadReport


class PeftError(Exception):
    """Base of every error of this library."""

    def __str__(self) -> str:
        # KeyError prints the repr of its message; several errors here are KeyErrors for callers' sake only.
        return str(self.args[0]) if self.args else ""


class PeftWarning(UserWarning, RuntimeWarning):
    """Base of every warning of this library; PEFT gives some as the one and some as the other."""


class ConfigError(PeftError, ValueError):
    """A config holds a value of the wrong type, out of range, or at odds with another one."""


class UnknownFieldError(ConfigError, TypeError):
    """A config's constructor got a field that does not exist."""


class FieldTypeError(ConfigError, TypeError):
    """A field's value is of another type than the field."""


class UnsupportedFieldError(ConfigError, NotImplementedError):
    """The field exists, and what it asks for is not built yet."""


class UnknownMethodError(ConfigError, KeyError):
    """``peft_type`` names no method of this library."""


class TokenIndexError(ConfigError, IndexError):
    """A token that is not in the vocabulary, or is named twice."""


class InvocationError(ConfigError):
    """A text has other tokens inside a prompt than alone: an adapter would not find it."""


class WrongMethodError(ConfigError, TypeError, KeyError):
    """A config of another method than the one asked for."""


class PlanError(PeftError, ValueError):
    """A config cannot be applied to this model; the model is as it was."""


class NoMatchingPeftModuleError(PlanError):
    """Nothing in the model matches the config's targets."""


class UnknownArchitectureError(PlanError):
    """``target_modules`` is None and the model's type is in no default table."""


class UnsupportedLayerError(PlanError, TypeError):
    """A target is a kind of layer that the method cannot adapt."""


class PatternError(PlanError, re.error):
    """A pattern does not compile, or is one that may not come from a file."""

    def __init__(self, message: str) -> None:
        re.error.__init__(self, message)


class PromptError(PlanError):
    """A prompt cannot act in this call, or on this model."""


class TaskIndexError(PromptError, IndexError):
    """A task that a prompt of several tasks does not have."""


class AdapterNameError(PeftError, ValueError, KeyError):
    """An adapter name that cannot be a path component and a module attribute."""


class DuplicateAdapterError(AdapterNameError):
    """The adapter name is in use."""


class UnknownAdapterError(AdapterNameError, RuntimeError):
    """No adapter of this name."""


class RoutingError(PeftError):
    """Which adapter serves which thread or row cannot be told."""


class RowsError(RoutingError, ValueError):
    """``adapter_names`` does not fit the batch, or a module's rows are not the batch's."""


class RowsUnreachableError(RowsError, TypeError):
    """A module uses its weight whole, so that rows cannot have adapters of their own."""


class LostRoutingError(RoutingError, RuntimeError):
    """A layer is recomputed in backward without the routing that its forward saw."""


class BusyError(RoutingError, RuntimeError):
    """A write (merge, delete, load) from inside a forward of the same model, or a use of a session in a turn."""


class CacheError(PeftError, ValueError):
    """A session cannot share this model's cache, go on from the one it was given, or do this on one row."""


class MergeError(PeftError, ValueError):
    """Merging or unmerging is not possible; the weights are as they were."""


class NotMergeableError(MergeError, NotImplementedError):
    """This adapter on this layer has no merged weight."""


class NonFiniteMergeError(MergeError):
    """``safe_merge`` found NaN or infinity in the merged weight."""


class BaseGoneError(MergeError, RuntimeError):
    """The pristine weight was given away by ``keep_base=False`` and is needed now."""


class FileError(PeftError, ValueError):
    """A file of an adapter cannot be used; nothing was loaded."""


class MissingFileError(FileError, FileNotFoundError):
    """A file that must be there is not."""


class UnreadableError(FileError, PermissionError):
    """A file is there, and the system does not give it."""


class CorruptFileError(FileError, SafetensorError):
    """A file is truncated, malformed, over a limit, or not a regular file."""


class TornPairError(FileError):
    """``adapter_config.json`` and the weights were not written by one save."""


class UnwritableError(FileError, PermissionError, NotADirectoryError, AssertionError):
    """The directory cannot be written."""


class UnknownArgumentError(PeftError, TypeError):
    """A keyword that a function with open keywords does not know."""


class NoGradientError(PeftError, TypeError):
    """What follows a step of the optimiser was called where there are no gradients."""


class NotBuiltError(PeftError, NotImplementedError):
    """A name of PEFT's for which there is nothing in this library yet."""


class MissingMethodError(PeftError, AttributeError):
    """The model has no method of this name."""


class LoadError(PeftError, RuntimeError):
    """The file's tensors do not fit the adapter; ``report`` has every place.

    Args:
        message (`str`): What was found, expected, and to do.
        report (`LoadReport`, *optional*): The full comparison of file and model.
    """

    def __init__(self, message: str, report: LoadReport | None = None) -> None:
        super().__init__(message)
        self.report = report


class IncompatibleBaseError(LoadError):
    """The adapter was made for another base model."""


class NonFiniteError(LoadError):
    """The file's tensors hold NaN or infinity."""


class HotswapError(PeftError, ValueError):
    """An adapter cannot take the place of the loaded one, or a model cannot be made ready for it."""


class MoreLayersError(HotswapError, LoadError):
    """The adapter to be swapped in adapts layers that the loaded one does not; the message lists them."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The hint "; closest: a, b" for a misspelt ``word``, or "" where nothing is near.

    Example:
        >>> nearest("q_prj", ["q_proj", "k_proj", "fc1"])
        '; closest: q_proj, k_proj'
    """
    found = difflib.get_close_matches(word, list(dict.fromkeys(choices)))
    return f"; closest: {', '.join(found)}" if found else ""
