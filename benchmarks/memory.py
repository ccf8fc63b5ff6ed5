"""Bytes that a forward keeps for backward, above what the frozen base keeps by itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.library import Library, Setting
from benchmarks.models import TOKENS, embeds, llama, lora_fields
from benchmarks.report import Entry, Figure, Goal
from benchmarks.timing import Measured, Missing, Outcome

CASES: list[tuple[str, torch.dtype, dict[str, Any], float]] = [
    ("fp32", torch.float32, {}, 90e6),
    ("dropout 0.1", torch.float32, {"lora_dropout": 0.1}, 95e6),
    ("bf16 base, fp32 adapters", torch.bfloat16, {}, 50e6),
    ("DoRA", torch.float32, {"use_dora": True}, 290e6),
]


def measure(setting: Setting) -> Iterator[Figure]:
    bases = {dtype: kept_by(llama(dtype=dtype), dtype) for dtype in (torch.float32, torch.bfloat16)}
    for name, dtype, fields, limit in CASES:
        base = bases[dtype]
        found = {side: above(build, base, dtype) for side, build in setting.both(adapted(dtype, fields)).items()}
        frozen = Measured((float(base),))
        yield Figure(
            f"kept for backward above the base: {name}",
            incumbent=Entry(found["incumbent"], frozen),
            candidate=Entry(found["candidate"], frozen),
            goal=Goal(limit, "value"),
            unit="B",
        )


def adapted(dtype: torch.dtype, fields: dict[str, Any]) -> Callable[[Library], nn.Module]:
    def build(library: Library) -> nn.Module:
        model: nn.Module = library.adapt(llama(dtype=dtype), library.lora(**lora_fields(**fields)))
        return model.train()

    return build


def above(build: Callable[[], nn.Module], base: int, dtype: torch.dtype) -> Outcome:
    gc.collect()  # the model before this one, for adapted models may sit in cycles
    try:
        return Measured((float(kept_by(build(), dtype) - base),))
    except Exception as error:  # whatever a library raises: its figure says so and the run goes on
        return Missing.because(error)


class Held:
    """What autograd holds in place of a saved tensor; gone when autograd lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_by(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages alive for backward when a forward is over, the model's own tensors left out."""
    x_BTI = embeds(1, TOKENS, dtype, grad=True)
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        one = Held(tensor)
        held.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        out = model(inputs_embeds=x_BTI).last_hidden_state
    storages = dict(sizes([one.tensor for one in held] + hidden_tensors(out)))
    for pointer, _ in sizes([*model.parameters(), *model.buffers()]):
        storages.pop(pointer, None)
    return sum(storages.values())


def sizes(tensors: list[Tensor]) -> Iterator[tuple[int, int]]:
    """Address and bytes of each tensor's whole storage: a view keeps all of it alive."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def hidden_tensors(out: Tensor) -> list[Tensor]:
    """Tensors that a Python-written autograd function keeps as plain attributes, past the hooks."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        found += [value for value in getattr(node, "__dict__", {}).values() if isinstance(value, Tensor)]
    return found
