"""AdaLoRA's budget (https://arxiv.org/abs/2303.10512): which triplets (row of A, entry of E, column of B) stay.

    score of triplet i = score(E_i) + mean of score(A_i,:) + mean of score(B_:,i)       (`inlay.ops.importance`)

After a step of the optimiser the lowest are masked (E_i = 0) until as many are left as the schedule allows. It falls
with the cube of the time, from all of them at ``tinit`` to ``target_r`` a layer at ``total_step - tfinal``, where the
choice becomes final. Before that, masked triplets may grow back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from inlay.errors import ConfigError
from inlay.hooks import Served, TrainingHooks
from inlay.methods.adalora import AdaLoraAdapter
from inlay.ops.importance import Importance
from inlay.ops.low_rank import no_autocast


class RankBudget(TrainingHooks):
    """AdaLoRA's regularisation and schedule for one adapter."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.fills = config.total_step is None
        self.seen = Importance()  # of A, B and E of every layer, in this order

    def begin(self, total_steps: int) -> None:
        self.fills = self.fills or self.config.total_step is None
        if self.fills:
            self.config.total_step = total_steps
            self.config.check_schedule()

    def set_total_step(self, total_step: int) -> None:
        """Sets how many steps the optimiser will make in all, for a training loop of one's own.

        Raises:
            ConfigError: They leave no time for ranks to fall.
        """
        trial = copy.copy(self.config)
        trial.total_step = total_step
        trial.check_schedule()
        self.config.total_step = total_step

    # ------------------------------------------------------------------ the loss

    def loss(self, layers: Sequence[Served]) -> Tensor | None:
        """``orth_reg_weight`` times the mean of |A A^T - 1| and |B^T B - 1| (Frobenius) over all layers."""
        if not self.config.orth_reg_weight or not layers:
            return None
        gaps = []
        with no_autocast(layers[0].p["A"]):
            for _, _, p in layers:
                A, B = (t if t.itemsize >= 4 else t.float() for t in (p["A"], p["B"]))
                eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
                gaps += [A @ A.t() - eye, B.t() @ B - eye]
            norms = torch._foreach_norm(gaps)
            total = torch.stack([n.to(norms[0]) for n in norms]).sum()
        weight: float = self.config.orth_reg_weight / (2 * len(layers))
        return total * weight

    # ------------------------------------------------------------------ the schedule

    @torch.no_grad()
    def step(self, layers: Sequence[Served], global_step: int) -> None:
        config = self.config
        if config.total_step is None:
            raise ConfigError("total_step is not set: it is the number of the optimiser's steps in all. Set it.")
        final, decided = config.total_step - config.tfinal, all(_of(each).kept is not None for each in layers)
        if global_step >= final and decided:
            for each in layers:
                kept = torch.tensor(_of(each).kept, dtype=torch.bool, device=each.p["E"].device)
                each.p["E"].masked_fill_(~kept[:, None], 0.0)
            return
        if decided:  # a new schedule
            self._decide(layers, [None] * len(layers))
        if global_step < final or not self.seen.averages:  # the last choice is made by what was seen before it
            self.seen.observe(_params(layers), config.beta1, config.beta2)
        if global_step >= final:
            self._decide(layers, self._mask(layers, config.target_r * len(layers)))
        elif global_step > config.tinit and global_step % config.deltaT == 0:
            self._mask(layers, self.allowed(layers, global_step))

    def allowed(self, layers: Sequence[Served], global_step: int) -> int:
        """How many triplets may stay."""
        config = self.config
        start, end = sum(each.p["E"].shape[0] for each in layers), config.target_r * len(layers)
        share = 1 - (global_step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((start - end) * share**3 + end)

    def _mask(self, layers: Sequence[Served], budget: int) -> list[Tensor]:
        """Masks all but the ``budget`` best; which these are, for each layer."""
        scores = self.seen.scores()
        triplets = [
            E[:, 0] + A.mean(1) + B.mean(0) for A, B, E in zip(scores[::3], scores[1::3], scores[2::3], strict=True)
        ]
        everywhere = torch.cat([t.to(triplets[0].device) for t in triplets])
        lowest = everywhere.numel() - budget
        if lowest <= 0:
            return [torch.ones_like(t, dtype=torch.bool) for t in triplets]
        threshold = torch.kthvalue(everywhere, lowest).values
        keep = [t > threshold.to(t.device) for t in triplets]
        for each, kept in zip(layers, keep, strict=True):
            each.p["E"].masked_fill_(~kept[:, None], 0.0)
        return keep

    def _decide(self, layers: Sequence[Served], keep: Iterable[Tensor | None]) -> None:
        """Tells the adapters, which then cut what they save, and the config, which says so in files."""
        patterns: dict[str, list[bool]] = {}
        for each, kept in zip(layers, keep, strict=True):
            adapter = _of(each)
            adapter.kept = None if kept is None else kept.tolist()
            rows = iter(adapter.kept or ())
            if adapter.pattern is not None:  # of the first init_r, a file had these
                patterns[f"{each.path}.lora_E"] = [s and (kept is None or next(rows)) for s in adapter.pattern]
            elif adapter.kept is not None:
                patterns[f"{each.path}.lora_E"] = adapter.kept
        self.config.rank_pattern = patterns or None

    # ------------------------------------------------------------------ interrupted training

    def state(self, layers: Sequence[Served]) -> dict[str, Tensor]:
        out = self.seen.state()
        for i, each in enumerate(layers):
            if (kept := _of(each).kept) is not None:  # files then lack the other rows, which still take part in `loss`
                out[f"kept.{i}"] = torch.tensor(kept, dtype=torch.bool)
                out.update({f"{key}.{i}": t.detach() for key, t in each.p.items()})
        return out

    @torch.no_grad()
    def load_state(self, layers: Sequence[Served], tensors: Mapping[str, Tensor]) -> None:
        self.seen.load(tensors, _params(layers))
        if "kept.0" in tensors:
            self._decide(layers, [tensors[f"kept.{i}"] for i in range(len(layers))])
            for i, (_, _, p) in enumerate(layers):
                for key, t in p.items():
                    t.copy_(tensors[f"{key}.{i}"])


def _of(layer: Served) -> AdaLoraAdapter:
    return cast(AdaLoraAdapter, layer.adapter)


def _params(layers: Sequence[Served]) -> list[Tensor]:
    return [each.p[key] for each in layers for key in "ABE"]
