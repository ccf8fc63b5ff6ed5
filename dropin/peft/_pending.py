"""Names of methods and variants that inlay does not have yet: to be imported and compared, an error once used.

Configs can be made, for tables that have one of each method in them; putting one into a model is the error.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from inlay.adapted import Adapted
from inlay.config import AdapterConfig
from inlay.errors import NotBuiltError
from inlay.tuner import Tuner

#: what a name ends with -> what its class is one of
KINDS: dict[str, type] = {"Config": AdapterConfig, "Model": Tuner, "Layer": Adapted}

#: a config that is only kept is compared and printed as any object, not by fields
PLAIN = {name: getattr(object, name) for name in ("__repr__", "__eq__", "__hash__")}


def keep(self: Any, *args: Any, **kwargs: Any) -> None:
    """What stands for a config's ``__init__``."""
    self.__dict__.update(kwargs)


def make(module: str, name: str) -> Any:
    """A class, a function or an empty table under this name."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotBuiltError(
            f"{module}.{name} is not in inlay yet, and nothing here could stand for it. `inlay methods` lists what "
            "there is."
        )

    if re.fullmatch(r"[A-Z0-9_]+", name):
        return {}
    if name.lstrip("_")[0].islower():
        refuse.__name__ = refuse.__qualname__ = name
        refuse.__module__ = module
        return refuse
    if name.endswith("Config"):
        kept = {"__new__": lambda cls, *args, **kwargs: object.__new__(cls), "__init__": keep, "__module__": module}
        return type(name, (AdapterConfig,), {**kept, **PLAIN, "peft_type": property(refuse)})
    ending = next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), object)
    return type(name, (ending,), {"__new__": refuse, "__module__": module})
