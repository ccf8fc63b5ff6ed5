"""Sessions: how long an adapter's first token takes behind a long context, and how much a pipeline prefills."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.library import Library, Setting
from benchmarks.models import causal_llama, fill, lora_fields
from benchmarks.report import Entry, Figure, Goal, figure
from benchmarks.timing import Contestant, Measured, Missing, Outcome, Race, relative_difference

ASKED = 16  # tokens behind the context, the invocation among them
WRITTEN = 16  # tokens in each turn of the pipeline
INVOCATIONS = {name: [60, 50 + index] for index, name in enumerate("abcd")}
TURNS = (None, *INVOCATIONS, None, *INVOCATIONS)


def measure(setting: Setting) -> Iterator[Figure]:
    context, layers = setting.pick(4096, 256), setting.pick(8, 2)
    race = Race(
        {
            "base": lambda: plain(setting.candidate, context, layers),
            "incumbent": lambda: plain(setting.incumbent, context, layers),
            "candidate": lambda: activated(setting.candidate, context, layers),
        },
        alike=["base", "incumbent"],
    )
    outcomes = race.run(seconds=setting.pick(30, 1))
    name = f"first token of a turn, {ASKED} tokens after {context:,}, over a plain LoRA"
    yield figure(name, outcomes, Goal(0.05), base="base")
    yield pipeline(setting, context)


def tokens(n: int) -> Tensor:
    """Tokens (n,), the same ones at every call; none is of an invocation."""
    return torch.randint(3, 50, (n,), generator=torch.Generator().manual_seed(2))


def asked() -> Tensor:
    """What comes behind the context."""
    return torch.cat([torch.tensor(INVOCATIONS["a"]), tokens(ASKED - 2)])


def plain(library: Library, context: int, layers: int) -> Contestant:
    """A LoRA that needs the whole prompt for itself."""
    handle = library.adapt(causal_llama(layers), library.lora(**lora_fields()))
    fill(handle)
    handle.eval()
    ids_BL = torch.cat([tokens(context), asked()])[None]

    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = handle(input_ids=ids_BL, logits_to_keep=1).logits[0, -1]
        return logits

    return Contestant(run, at_most=3)


def activated(library: Library, context: int, layers: int) -> Contestant:
    """An activated LoRA in a branch of a session whose base has read the context."""
    handle = pipeline_model(library, layers, ["a"])
    session = handle.session(tokens(context))
    session.prefill()

    def run() -> Tensor:
        branch = session.fork()
        branch.extend(asked())
        logits: Tensor = branch.logits("a")
        return logits

    with torch.no_grad():
        anew = handle(input_ids=torch.cat([tokens(context), asked()])[None], logits_to_keep=1).logits[0, -1]
    if not relative_difference(run(), anew) < 1e-4:
        raise ArithmeticError("the session's logits are not those of a full forward")
    return Contestant(run)


def pipeline_model(library: Library, layers: int, names: list[str]) -> Any:
    """A model with activated LoRAs."""
    configs = {name: library.lora(**lora_fields(alora_invocation_tokens=INVOCATIONS[name])) for name in names}
    handle = library.adapt(causal_llama(layers), configs[names[0]], names[0])
    for name in names[1:]:
        handle.add_adapter(name, configs[name])
    fill(handle)
    return handle.eval()


def pipeline(setting: Setting, context: int) -> Figure:
    """Base and four adapters take two turns each on one conversation; naive is every turn with a prompt of its own."""
    naive: Outcome
    found: Outcome
    try:
        session = pipeline_model(setting.candidate, 1, list(INVOCATIONS)).session(tokens(context))
        prompts = 0.0
        for name in TURNS:
            session.extend(tokens(ASKED - 2))
            session.extend(INVOCATIONS[name] if name else tokens(2))
            prompts += len(session)
            session.generate(name, WRITTEN, do_sample=False, eos_token_id=None)
        naive, found = Measured((prompts,)), Measured((float(session.prefilled),))
    except Exception as error:  # as in a race
        naive = found = Missing.because(error)
    return Figure(
        f"prefilled in {len(TURNS)} turns of base and {len(INVOCATIONS)} adapters after {context:,}, over naive",
        incumbent=Entry(Missing("has no session"), naive),
        candidate=Entry(found, naive),
        unit="tokens",
    )
