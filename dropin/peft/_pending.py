"""Names of methods and variants that inlay does not have yet: to be imported and compared, an error once used."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from inlay.adapted import Adapted
from inlay.config import AdapterConfig
from inlay.errors import NotBuiltError
from inlay.model import Tuner

#: what a name ends with -> what its class is one of
KINDS: dict[str, type] = {"Config": AdapterConfig, "Model": Tuner, "Layer": Adapted}


def make(module: str, name: str) -> Any:
    """A class, a function or an empty table under this name."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotBuiltError(
            f"{module}.{name} is not in inlay yet, and nothing here could stand for it. `inlay methods` lists what "
            "there is."
        )

    if re.fullmatch(r"[A-Z0-9_]+", name):
        return {}
    if name[0].islower() or name[0] == "_":
        refuse.__name__, refuse.__module__ = name, module
        return refuse
    ending = next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), object)
    return type(name, (ending,), {"__new__": refuse, "__module__": module})
