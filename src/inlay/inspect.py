"""What an adapter on disk does, layer by layer, read from its two files alone: no model, no dense product.

For a low-rank change ``dW = s B A`` the singular values are those of ``s R_B R_A^T``, an r x r matrix, where ``R_A``
and ``R_B`` come from the QR decompositions of ``A^T`` and ``B``. Two figures of each layer are read off them:

- the Frobenius norm, how far the weight moves: ``sqrt(sum sigma^2)``;
- the effective rank (Roy and Vetterli, 2007), in how many directions: ``exp(-sum p log p)`` with
  ``p = sigma / sum sigma``, between 1 and r. Far below r, a smaller r would have done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.formats import files
from inlay.formats.peft import PREFIX
from inlay.patterns import KeyTable

# slot of A in the file -> slot of B
FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
OTHER_SLOTS = (".lora_B.bias", ".lora_magnitude_vector")


@dataclass(frozen=True)
class LayerRow:
    """One layer of an adapter."""

    module: str  # its name in the base model
    shape: tuple[int, ...]  # (out, in) of the change, kernels folded into "in"; stacked experts in front
    rank: int  # rows of A, per expert
    scaling: float  # what the product is multiplied by
    norm: float  # Frobenius norm of the change
    effective_rank: float  # in how many directions it goes, the mean over experts; 0 where the change is zero
    largest: float  # the largest singular value, how much an input can be moved
    parameters: int  # trained numbers, magnitudes and biases included


@dataclass(frozen=True)
class WholeRow:
    """A tensor that the adapter holds whole, such as a trained head."""

    name: str  # its name in the base model
    shape: tuple[int, ...]
    norm: float  # its Frobenius norm: of the tensor, not of a change, which needs the base


@dataclass(frozen=True)
class AdapterReport:
    """What `inspect_adapter` found."""

    path: Path  # the adapter's folder
    config: dict[str, Any]  # ``adapter_config.json`` as it stands
    rows: list[LayerRow]  # one per adapted layer, in the file's order
    whole: list[WholeRow]  # tensors held whole
    file_bytes: int  # size of all tensors in the file

    @property
    def parameters(self) -> int:
        """All numbers in the file."""
        return sum(row.parameters for row in self.rows) + sum(math.prod(one.shape) for one in self.whole)


def inspect_adapter(path: str | Path) -> AdapterReport:
    """Read an adapter's files and measure what each layer's change amounts to.

    Low-rank factors give rows, tensors of other kinds are listed whole. Raises the `FileError` of what is wrong with
    the files.
    """
    path = Path(path)
    config, weights = files.read_pair(path)
    with weights:
        tensors = weights.read()
    scaling = _Scaling(config)
    rows, used = [], set[str]()
    for key, down in tensors.items():
        slot = next((slot for slot in FACTORS if key.endswith(slot)), "")
        stem = key.removesuffix(slot)
        if not slot or (up := tensors.get(stem + FACTORS[slot])) is None:
            continue
        mine = {key, *(stem + other for other in (FACTORS[slot], *OTHER_SLOTS))} & tensors.keys()
        used |= mine
        rows.append(_layer(stem.removeprefix(PREFIX), down, up, scaling, sum(tensors[name].numel() for name in mine)))
    whole = [
        WholeRow(key.removeprefix(PREFIX), tuple(tensor.shape), float(tensor.double().norm()))
        for key, tensor in tensors.items()
        if key not in used
    ]
    return AdapterReport(path, config, rows, whole, sum(tensor.nbytes for tensor in tensors.values()))


class _Scaling:
    """Rank and scaling of each module as the config says, patterns first."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.defaults = {"r": 8.0, "lora_alpha": 8.0, **_positive(config)}
        self.ranks = KeyTable(_positive(config.get("rank_pattern")))
        self.alphas = KeyTable(_positive(config.get("alpha_pattern")))
        self.root = bool(config.get("use_rslora"))

    def __call__(self, module: str) -> tuple[int, float]:
        rank = (self.ranks.find(module) or ("", self.defaults["r"]))[1]
        alpha = (self.alphas.find(module) or ("", self.defaults["lora_alpha"]))[1]
        return int(rank), alpha / (math.sqrt(rank) if self.root else rank)


def _positive(values: object) -> dict[str, float]:
    """The positive numbers in a JSON object; in anything else there are none."""
    pairs = values.items() if isinstance(values, Mapping) else ()
    return {key: float(value) for key, value in pairs if isinstance(value, int | float) and value > 0}


def _layer(module: str, down: Tensor, up: Tensor, scaling: _Scaling, parameters: int) -> LayerRow:
    rank, s = scaling(module)
    down_RI, up_OR = down.double().flatten(1), up.double().flatten(1)
    # Stacked experts keep all their A's as rows of one matrix, and their B's as interleaved columns of another.
    experts = down_RI.shape[0] // rank if rank and down_RI.shape[0] % rank == 0 else 1
    down_ERI = down_RI.reshape(experts, -1, down_RI.shape[1])
    up_EOR = up_OR.reshape(up_OR.shape[0], -1, experts).permute(2, 0, 1)
    sigma_ER = s * singular_values(down_ERI, up_EOR)
    shape = (up_OR.shape[0], down_RI.shape[1])
    return LayerRow(
        module=module,
        shape=shape if experts == 1 else (experts, *shape),
        rank=down_ERI.shape[1],
        scaling=s,
        norm=float(sigma_ER.norm()),
        effective_rank=sum(map(effective_rank, sigma_ER)) / experts,
        largest=float(sigma_ER.max()),
        parameters=parameters,
    )


def singular_values(down_RI: Tensor, up_OR: Tensor) -> Tensor:
    """The singular values of ``up_OR @ down_RI`` (batched in front), at the cost of factors, not of the product.

    Example:
        >>> down, up = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)
        >>> singular_values(down, up)
        tensor([3., 1.])
    """
    r_down = torch.linalg.qr(down_RI.mT, mode="r").R
    r_up = torch.linalg.qr(up_OR, mode="r").R
    sigma_R: Tensor = torch.linalg.svdvals(r_up @ r_down.mT)
    return sigma_R


def effective_rank(sigma_R: Tensor) -> float:
    """``exp`` of the entropy of the normalised singular values; 0 where all are zero.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
        2.0
    """
    total = sigma_R.sum()
    if total == 0:
        return 0.0
    p_R = sigma_R / total
    return float(torch.special.entr(p_R).sum().exp())


def plot(report: AdapterReport, file: str | Path) -> Path:
    """Draw norms and effective ranks over the depth of the model into a PNG, one line per kind of projection."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for label, points in _series(report.rows).items():
        depth = [x for x, _ in points]
        upper.plot(depth, [row.norm for _, row in points], marker="o", markersize=3, label=label)
        lower.plot(depth, [row.effective_rank for _, row in points], marker="o", markersize=3, label=label)
    title = f"{report.path.name}: {len(report.rows)} adapted layers"
    upper.set(title=title, ylabel="Frobenius norm of the change")
    lower.set(xlabel="layer", ylabel="effective rank")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if report.rows:
        upper.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)
    figure.savefig(str(file), dpi=120)
    return Path(file)


def _series(rows: Iterable[LayerRow]) -> dict[str, list[tuple[int, LayerRow]]]:
    """Layers by their names without numbers, each with its depth: the first number in its name, else its place.

    A label is as much of the end of such a name as tells it from the others.
    """
    kinds: dict[str, list[tuple[int, LayerRow]]] = {}
    for place, row in enumerate(rows):
        parts = row.module.split(".")
        depth = next((int(part) for part in parts if part.isdecimal()), place)
        kind = ".".join(part for part in parts if not part.isdecimal()) or row.module
        kinds.setdefault(kind, []).append((depth, row))
    return {_label(kind, kinds): sorted(points, key=lambda point: point[0]) for kind, points in kinds.items()}


def _label(kind: str, kinds: Iterable[str]) -> str:
    parts = kind.split(".")
    ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1), kind)
