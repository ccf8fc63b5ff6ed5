"""``python -m benchmarks.gpu``: training steps and forwards on a GPU, beside the incumbent: time and peak memory.

Not part of ``make bench``, which needs no GPU. Times are the median of rounds in which the contestants take turns, by
CUDA's own clock.
"""

from __future__ import annotations

import gc
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.library import PeftLike, version_of
from benchmarks.models import lora_fields

LAYERS, WIDTH, ROWS, TOKENS, ROUNDS = 16, 2048, 4, 1024, 15
VARIANTS: dict[str, dict[str, Any]] = {"LoRA": {}, "dropout 0.1": {"lora_dropout": 0.1}, "DoRA": {"use_dora": True}}
LIBRARIES = [PeftLike("peft"), PeftLike("inlay")]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 5632, "num_hidden_layers": LAYERS, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=8, use_cache=False, **sizes)
    with torch.device("cuda"):
        return LlamaModel(config).to(torch.bfloat16).requires_grad_(False)


def embeds(rows: int, tokens: int) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)


def step(model: nn.Module) -> Callable[[], None]:
    x = embeds(ROWS, TOKENS).requires_grad_()

    def run() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(inputs_embeds=x).last_hidden_state.sum().backward()

    model.train()
    return run


def forward(model: nn.Module, rows: int, tokens: int, **kwargs: Any) -> Callable[[], None]:
    x = embeds(rows, tokens)

    def run() -> None:
        with torch.no_grad():
            model(inputs_embeds=x, **kwargs)

    model.eval()
    return run


def timed(run: Callable[[], None]) -> float:
    """Milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak(run: Callable[[], None]) -> float:
    """MiB that are allocated at most, beyond what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@contextmanager
def fresh() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def race(contestants: dict[str, Callable[[], None]]) -> Iterator[tuple[str, float, float]]:
    """(name, median milliseconds, MiB) of each; they take turns."""
    for run in contestants.values():
        for _ in range(3):
            run()
    memory = {name: peak(run) for name, run in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            times[name].append(timed(run))
    return ((name, statistics.median(times[name]), memory[name]) for name in contestants)


def adapted(library: PeftLike, names: int = 1, **fields: Any) -> nn.Module:
    handle = library.adapt(llama(), library.lora(**lora_fields(init_lora_weights=False, **fields)), "a0")
    for n in range(1, names):
        handle.add_adapter(f"a{n}", library.lora(**lora_fields(init_lora_weights=False, **fields)))
    return handle


def show(what: str, contestants: dict[str, Callable[[], None]]) -> None:
    rows = list(race(contestants))
    _, base, least = rows[0]
    for name, milliseconds, memory in rows:
        print(
            f"{what:34} {name:8} {milliseconds:9.2f} ms {milliseconds / base:6.2f}x {memory:9.0f} MiB "
            f"{memory / max(least, 1):6.2f}x",
            flush=True,
        )


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("No CUDA device is here; `make bench` needs none.")
    warnings.simplefilter("ignore")
    stack = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "transformers", "peft"))
    print(
        f"{torch.cuda.get_device_name()}; {stack}; Llama of {LAYERS} layers, width {WIDTH}, bf16, r=16 on all linears"
    )
    for variant, fields in VARIANTS.items():
        with fresh():
            models = {lib.name: step(adapted(lib, **fields)) for lib in LIBRARIES}
            show(f"step of {ROWS}x{TOKENS} tokens, {variant}", {"base": step(llama()), **models})
    for tokens in (1, 512):
        with fresh():
            models = {lib.name: forward(adapted(lib), 16, tokens) for lib in LIBRARIES}
            show(f"forward of 16x{tokens}, one adapter", {"base": forward(llama(), 16, tokens), **models})
        with fresh():
            models = {lib.name: forward(adapted(lib, use_dora=True), 16, tokens) for lib in LIBRARIES}
            show(f"forward of 16x{tokens}, DoRA", {"base": forward(llama(), 16, tokens), **models})
        with fresh():
            rows = {"adapter_names": [f"a{n}" for n in range(16)]}
            models = {lib.name: forward(adapted(lib, 16), 16, tokens, **rows) for lib in LIBRARIES}
            show(f"forward of 16x{tokens}, 16 adapters", {"base": forward(llama(), 16, tokens), **models})


if __name__ == "__main__":
    main()
