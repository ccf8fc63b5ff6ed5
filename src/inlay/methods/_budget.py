"""AdaLoRA's budget (https://arxiv.org/abs/2303.10512): which triplets (row of A, entry of E, column of B) stay.

    I(p) = |p dL/dp|,  I' = EMA of I,  U' = EMA of |I - I'|,  score = I' U'
    score of triplet i = score(E_i) + mean of score(A_i,:) + mean of score(B_:,i)

After a step of the optimiser the lowest are masked (E_i = 0) until as many are left as the schedule allows. It falls
with the cube of the time, from all of them at ``tinit`` to ``target_r`` a layer at ``total_step - tfinal``, where the
choice becomes final. Before that, masked triplets may grow back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from inlay.errors import ConfigError, NoGradientError
from inlay.hooks import Served, TrainingHooks
from inlay.methods.adalora import AdaLoraAdapter
from inlay.ops.low_rank import no_autocast


class RankBudget(TrainingHooks):
    """AdaLoRA's regularisation and schedule for one adapter."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.fills = config.total_step is None
        # One of each for A, B and E of every layer, in this order.
        self.importance: list[Tensor] = []
        self.uncertainty: list[Tensor] = []

    def begin(self, total_steps: int) -> None:
        if self.fills:
            self.config.total_step = total_steps
            self.config.check_schedule()

    # ------------------------------------------------------------------ the loss

    def loss(self, layers: Sequence[Served]) -> Tensor | None:
        """``orth_reg_weight`` times the mean of |A A^T - 1| and |B^T B - 1| (Frobenius) over all layers."""
        if not self.config.orth_reg_weight or not layers:
            return None
        grams: dict[int, list[Tensor]] = {}
        with no_autocast(layers[0].p["A"]):
            for _, _, p in layers:
                A, B = _wide(p["A"]), _wide(p["B"])
                grams.setdefault(A.shape[0], []).extend((A @ A.t(), B.t() @ B))
            norms = []
            for r, of_rank in grams.items():
                eye = torch.eye(r, dtype=of_rank[0].dtype, device=of_rank[0].device)
                norms.append(torch.linalg.matrix_norm(torch.stack([g.to(eye) for g in of_rank]) - eye).sum())
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
        if global_step < final or not self.importance:  # the last choice is made by what was seen before it
            self._observe([each.p[key] for each in layers for key in "ABE"])
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

    def _observe(self, params: list[Tensor]) -> None:
        if all(t.grad is None for t in params):
            raise NoGradientError(
                "No tensor of the adapter has a gradient: call update_and_allocate after the optimiser's step and "
                "before zero_grad."
            )
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in params]
        seen = [_wide(t) for t in torch._foreach_mul(params, grads)]
        torch._foreach_abs_(seen)
        if not self.importance:
            self.importance = [torch.zeros_like(t) for t in seen]
            self.uncertainty = [torch.zeros_like(t) for t in seen]
        beta1, beta2 = self.config.beta1, self.config.beta2
        torch._foreach_mul_(self.importance, beta1)
        torch._foreach_add_(self.importance, seen, alpha=1 - beta1)
        torch._foreach_sub_(seen, self.importance)
        torch._foreach_abs_(seen)
        torch._foreach_mul_(self.uncertainty, beta2)
        torch._foreach_add_(self.uncertainty, seen, alpha=1 - beta2)

    def _mask(self, layers: Sequence[Served], budget: int) -> list[Tensor]:
        """Masks all but the ``budget`` best; which these are, for each layer."""
        scores = torch._foreach_mul(self.importance, self.uncertainty)
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
            _of(each).kept = None if kept is None else kept.tolist()
            if (pattern := _of(each).saved_pattern()) is not None:
                patterns[f"{each.path}.lora_E"] = pattern
        self.config.rank_pattern = patterns or None

    # ------------------------------------------------------------------ interrupted training

    def state(self, layers: Sequence[Served]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for i, tensors in enumerate(zip(self.importance, self.uncertainty, strict=True)):
            out.update({f"{what}.{i}": t for what, t in zip(("importance", "uncertainty"), tensors, strict=True)})
        for i, each in enumerate(layers):
            if (kept := _of(each).kept) is not None:  # files then lack the other rows, which still take part in `loss`
                out[f"kept.{i}"] = torch.tensor(kept, dtype=torch.bool)
                out.update({f"{key}.{i}": t.detach() for key, t in each.p.items()})
        return out

    @torch.no_grad()
    def load_state(self, layers: Sequence[Served], tensors: Mapping[str, Tensor]) -> None:
        params = [each.p[key] for each in layers for key in "ABE"]
        if "importance.0" in tensors:
            self.importance = [tensors[f"importance.{i}"].to(t.device) for i, t in enumerate(params)]
            self.uncertainty = [tensors[f"uncertainty.{i}"].to(t.device) for i, t in enumerate(params)]
        if "kept.0" in tensors:
            self._decide(layers, [tensors[f"kept.{i}"] for i in range(len(layers))])
            for i, (_, _, p) in enumerate(layers):
                for key, t in p.items():
                    t.copy_(tensors[f"{key}.{i}"])


def _of(layer: Served) -> AdaLoraAdapter:
    return cast(AdaLoraAdapter, layer.adapter)


def _wide(t: Tensor) -> Tensor:
    return t if t.itemsize >= 4 else t.float()
