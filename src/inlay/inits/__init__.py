"""Starting values of a low-rank update ``W + scale * up @ down``, for any method that has one.

Some are drawn and need no weight: `draw_` fills the factors in place. The others are computed from it, by a pure
function ``(W_OI, r, scale) -> Start`` that `computed` picks by name. They stand for a part of the weight, so what the
layer does is kept by an offset that stays frozen beside them: the weight itself is never written.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from inlay.errors import ConfigError, PeftWarning, UnsupportedFieldError
from inlay.inits.decompose import Start, olora, pissa
from inlay.inits.draw import DRAWN, draw_, kaiming_
from inlay.inits.loftq import LoftQConfig, loftq

_ITERATED = re.compile(r"pissa_niter_(\d{1,2})")  # a file may ask for any number


def name_of(init: bool | str) -> str:
    """The kind of starting values that a config asks for (``"pissa_niter_4"`` -> ``"pissa"``); "" if unknown."""
    text = str(init).lower()
    if _ITERATED.fullmatch(text):
        return "pissa"
    return text if text in (*DRAWN, "pissa", "olora", "loftq") else ""


def checked(init: bool | str, loftq_config: LoftQConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """A config's ``loftq_config`` as plain values, empty where ``init`` is not LoftQ.

    Raises:
        UnsupportedFieldError: ``init`` is unknown.
        ConfigError: LoftQ lacks its config, or a value is out of range.
    """
    if not (name := name_of(init)):
        raise UnsupportedFieldError(
            f"Unknown initialization init_lora_weights={init!r}: there are True, False, 'gaussian', 'orthogonal', "
            "'pissa', 'pissa_niter_[n]' (n below 100), 'olora' and 'loftq'."
        )
    given = asdict(loftq_config) if isinstance(loftq_config, LoftQConfig) else dict(loftq_config or {})
    if name != "loftq":
        if given:
            warnings.warn(f"loftq_config has no effect with init_lora_weights={init!r}.", PeftWarning, stacklevel=5)
        return {}
    if not given or given.keys() - asdict(LoftQConfig()).keys():
        raise ConfigError(f"init_lora_weights='loftq' needs loftq_config=LoftQConfig(loftq_bits=4), got {given}.")
    plain = asdict(LoftQConfig(**given))
    return plain if plain["quant_type"] != "nf4" else {k: plain[k] for k in ("loftq_bits", "loftq_iter")}  # PEFT's


def computed(
    init: bool | str, loftq_config: Mapping[str, Any] | None = None
) -> Callable[[Tensor, int, float], Start] | None:
    """The function that computes ``init`` from a weight; None where it is drawn.

    Example:
        >>> import torch
        >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> start = computed("pissa")(W, 1, 1.0)
        >>> (W - start.up_OR @ start.down_RI).diagonal()
        tensor([0., 2., 1.])
    """
    name = name_of(init)
    if name == "pissa":
        found = _ITERATED.fullmatch(str(init).lower())
        return partial(pissa, rounds=int(found[1])) if found else pissa
    if name == "loftq":
        wanted = LoftQConfig(**(loftq_config or {}))
        return partial(loftq, bits=wanted.loftq_bits, rounds=wanted.loftq_iter, name=wanted.quant_type[:2])
    return olora if name == "olora" else None


__all__ = ["LoftQConfig", "Start", "checked", "computed", "draw_", "kaiming_", "name_of", "pissa"]
