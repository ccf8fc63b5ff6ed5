"""Experts that were modules once: what names them, for models that hold them all in one tensor.

Such models had a Linear for every expert and projection, as ``experts.0.w1``; since transformers 5 one module holds
``gate_up_proj`` (E, 2O, I) and ``down_proj`` (E, O, I). A config that names the former targets, and a file that holds
their factors, still mean something: a fused factor of twice the rank, whose B is block-diagonal.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from inlay.config import AdapterConfig
from inlay.errors import PlanError
from inlay.match import matcher
from inlay.methods.lora import LoraConfig

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PATTERN = rf".*\.{GATE_UP}"  # the key under which PEFT writes the doubled rank


class Former(NamedTuple):
    """What a line of models called an expert's projections, and the block around the experts."""

    gate: str
    up: str
    down: str
    block: str = "mlp"

    @property
    def parameters(self) -> dict[str, str]:
        """Former target -> the parameter that holds it now; the router's weight is a bare one now too."""
        return {self.gate: GATE_UP, self.up: GATE_UP, self.down: DOWN, "gate": "gate.weight"}

    def paths(self, experts: str, target: str) -> list[str]:
        """Names that ``target`` had where the module ``experts`` stands now."""
        above = experts.rpartition(".")[0]
        below = [target] if target == "gate" else [f"experts.{target}", f"experts.0.{target}"]
        blocks = {above, re.sub(r"\bmlp$", self.block, above)}
        return [f"{block}.{end}" for block in blocks for end in below]


_MIXTRAL = Former("w1", "w3", "w2", "block_sparse_moe")
_QWEN = Former("gate_proj", "up_proj", "down_proj")
_LIKE_QWEN = """
    afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
    glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open
"""
#: model type -> the former names; the types that PEFT converts
FORMER = {**dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL), **dict.fromkeys(_LIKE_QWEN.split(), _QWEN)}


def fused_config(config: AdapterConfig, former: Former, modules: Iterable[str], experts: list[str]) -> AdapterConfig:
    """The config with ``target_parameters`` in the place of targets that are parameters now; itself where none is.

    Args:
        config (`AdapterConfig`): Any; only LoRA's has parameters as targets.
        former (`Former`): The names of before.
        modules (`Iterable[str]`): The model's modules.
        experts (`list[str]`): Those that hold experts.

    Raises:
        PlanError: One half of a fused parameter is a target and the other is not.
    """
    targets = config.target_modules
    if type(config) is not LoraConfig or targets is None or not experts:
        return config
    known = former.parameters
    left: set[str] | str
    if isinstance(targets, str) and targets.lower() != "all-linear":
        fits = matcher(targets)
        found = {t: [e for e in experts if any(fits(path) for path in former.paths(e, t))] for t in known}
        left = targets if any(fits(name) for name in modules) else set()
    else:
        ends = known if isinstance(targets, str) else {t.rpartition(".")[2] for t in targets}
        found = {t: experts if t in ends else [] for t in known}
        left = targets if isinstance(targets, str) else {t for t in targets if t.rpartition(".")[2] not in known}
    if not any(found.values()):
        return config
    if found[former.gate] != found[former.up]:
        one, other = (former.gate, former.up) if found[former.gate] else (former.up, former.gate)
        raise PlanError(
            f"Cannot convert PEFT target(s) {one} without also targeting {other} because they are fused into "
            f"{GATE_UP}: name both or none."
        )
    named = {name for target, where in found.items() for name in _named(known[target], where, experts)}
    fused = replace(config, target_modules=left, target_parameters=sorted({*(config.target_parameters or ()), *named}))
    if not found[former.gate]:
        return fused
    alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)  # so that the scale stays what it was
    ranks, alphas = {**config.rank_pattern, PATTERN: 2 * config.r}, {**config.alpha_pattern, PATTERN: alpha}
    return replace(fused, rank_pattern=ranks, alpha_pattern=alphas)


def _named(parameter: str, where: list[str], experts: list[str]) -> list[str]:
    """The parameter's suffix if all experts have it as a target, else one name for each that has."""
    if len(where) in (0, len(experts)):
        return [parameter] if where else []
    above = [e if parameter in (GATE_UP, DOWN) else e.rpartition(".")[0] for e in where]
    return [f"{path}.{parameter}" for path in above]


def take_up(config: AdapterConfig, fused: AdapterConfig) -> None:
    """Gives the user's config what `fused_config` has changed, for files and for who reads it."""
    if config is not fused:
        for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
            setattr(config, name, getattr(fused, name))


def fused_tensors(tensors: Mapping[str, Tensor], former: Former) -> dict[str, Tensor]:
    """A file's tensors with the factors of single experts put together; other keys stay.

    Args:
        tensors (`Mapping[str, Tensor]`): By key, without ``base_model.model.``; on the meta device for shapes alone.
        former (`Former`): The names of before.

    Example:
        >>> old = {f"experts.0.w2.lora_{f}.weight": torch.ones(s) for f, s in (("A", (2, 8)), ("B", (4, 2)))}
        >>> {key: tuple(t.shape) for key, t in fused_tensors(old, FORMER["mixtral"]).items()}
        {'experts.lora_A.weight': (2, 8), 'experts.lora_B.weight': (4, 2)}
    """
    single = re.compile(rf"(.*\bexperts)\.(\d+)\.({former.gate}|{former.up}|{former.down})\.lora_([AB])\.weight")
    out: dict[str, Tensor] = {}
    found: dict[str, dict[tuple[str, str], dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, t in tensors.items():
        key = key.replace(f".{former.block}.", ".mlp.")
        if (split := single.fullmatch(key)) is None:
            out[key] = t
        else:
            path, expert, target, factor = split.groups()
            found[path][target, factor][int(expert)] = t
    for path, factors in found.items():
        try:
            stacked = {which: _stacked(which[1], parts) for which, parts in factors.items()}
            out.update(_fused(path, stacked, former))
        except (KeyError, ValueError, RuntimeError, IndexError):  # incomplete: the keys are reported as they are
            for (target, factor), parts in factors.items():
                out.update({f"{path}.{e}.{target}.lora_{factor}.weight": t for e, t in parts.items()})
    return out


def _stacked(factor: str, parts: Mapping[int, Tensor]) -> Tensor:
    """A as (E, r, I) and B as (O, r, E): in fused factors the expert is A's slowest index and B's fastest one."""
    return torch.stack([parts[e] for e in range(len(parts))], 0 if factor == "A" else -1)


def _fused(path: str, stacked: Mapping[tuple[str, str], Tensor], former: Former) -> dict[str, Tensor]:
    out = {}
    down = any(target == former.down for target, _ in stacked)
    if down:
        out[f"{path}.lora_A.weight"] = stacked[former.down, "A"].flatten(0, 1)
        out[f"{path}.lora_B.weight"] = stacked[former.down, "B"].flatten(1)
    if any(target == former.gate for target, _ in stacked) or not down:
        outer = f"{path}.base_layer" if down else path  # of two parameters, the first one's wrapper is the inner one
        gate, up = stacked[former.gate, "B"], stacked[former.up, "B"]
        (rows, r, _), (rows_up, r_up, experts) = gate.shape, up.shape
        B = gate.new_zeros(rows + rows_up, r + r_up, experts)
        B[:rows, :r], B[rows:, r:] = gate, up
        A = torch.cat([stacked[former.gate, "A"], stacked[former.up, "A"]], 1)
        out[f"{outer}.lora_A.weight"], out[f"{outer}.lora_B.weight"] = A.flatten(0, 1), B.flatten(1)
    return out
