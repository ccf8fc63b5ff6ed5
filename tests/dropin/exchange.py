"""Adapters written and read with whatever stands for ``peft`` here; as a script, the drop-in's part of an exchange.

``python exchange.py THEIRS OURS`` reads the folders in THEIRS, prints how far outputs are from those that are noted
there, and writes its own into OURS.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import peft
import torch

from dropin import tiny_transformers as tiny

#: what PEFT can do too: it has no LoHa, LoKr and OFT of GPT-2's layers
CASES = [("llama", adapter) for adapter in tiny.ADAPTERS]
CASES += [*tiny.SPECIAL, ("gpt2", "lora"), ("gpt2", "ia3"), ("bert", "head"), ("t5", "oft")]


def write(folder: Path) -> None:
    """Adds, stirs and saves the adapter of every case by transformers' own calls, and notes the model's output."""
    for model, adapter in CASES:
        made = tiny.build(model)
        made.add_adapter(tiny.config(model, adapter))
        tiny.stir(made)
        made.save_pretrained(folder / f"{model}-{adapter}")
        torch.save(tiny.output(made.eval(), model), folder / f"{model}-{adapter}" / "output.pt")


def read(folder: Path) -> dict[str, tuple[float, float]]:
    """How far off the outputs of every case are, loaded by transformers' calls and by a handle."""
    out = {}
    for model, adapter in CASES:
        path = folder / f"{model}-{adapter}"
        wanted = torch.load(path / "output.pt")
        made = tiny.build(model)
        made.load_adapter(str(path))
        handle = peft.PeftModel.from_pretrained(tiny.build(model), path).eval()
        far = [float((tiny.output(loaded, model) - wanted).abs().max()) for loaded in (made, handle)]
        out[path.name] = (far[0], far[1])
    return out


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = read(Path(sys.argv[1]))
    write(Path(sys.argv[2]))
    print(json.dumps(found))
