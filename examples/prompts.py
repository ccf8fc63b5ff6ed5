"""One encoder, one task, three ways to adapt it: LoRA, prompt tuning, prefix tuning, side by side.

    python examples/prompts.py

The encoder and the docstrings are those of ``make demo``: which package of the standard library is a docstring from?
Every method trains a copy of the same head beside itself, for the same number of steps. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from inlay.integrations import demo
from inlay.integrations.docstrings import distinct, largest, read_docstrings, sample, standard_library
from inlay.integrations.run_folder import write_lines
from inlay.integrations.train import TrainReport, train
from inlay.integrations.train_config import AdapterSection, TrainConfig

# What each method is given: its fields, and the learning rate that suits it.
METHODS = {
    "lora": ({"r": 8, "lora_alpha": 8, "target_modules": ["query", "value"]}, 8e-3),
    "prompt_tuning": ({"num_virtual_tokens": 16, "prompt_tuning_init": "SAMPLE_VOCAB"}, 1e-1),
    "prefix_tuning": ({"num_virtual_tokens": 16}, 3e-2),
}


def run(output: Path, rows: int, epochs: float) -> tuple[float, dict[str, TrainReport]]:
    """The accuracy of a head on the frozen encoder, and the report of each method."""
    found = distinct(largest(read_docstrings(standard_library()), demo.CLASSES))
    plan = demo.demo_config(output)
    write_lines(
        Path(plan.data.path), [{"text": d.text, "label": d.package} for d in sample(found, rows, plan.training.seed)]
    )
    pooled, _ = demo.FrozenEncoder(plan, sample(found, 256, seed=0)).heads(plan)
    reports = {}
    for method, (fields, rate) in METHODS.items():
        config: TrainConfig = dataclasses.replace(
            plan,
            output=str(output / method),
            adapter=AdapterSection(method, fields),
            training=dataclasses.replace(plan.training, epochs=epochs, learning_rate=rate),
        )
        print(f"training: {method}")
        reports[method] = train(config, start=pooled.put).report
    return pooled.accuracy, reports


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1600, help="docstrings, a fifth of them held out")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--output", type=Path, help="where the runs are kept; nowhere if not given")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        frozen, reports = run(given.output or Path(folder), given.rows, given.epochs)
    table = Table("method", "accuracy", "trained", "adapter on disk", "time")
    table.add_row("frozen encoder, trained head", f"{frozen:.1%}", "", "", "")
    for method, report in reports.items():
        size, trained = f"{report.adapter_bytes / 1000:,.0f} KB", f"{report.trainable:,}"
        table.add_row(method, f"{report.after['accuracy']:.1%}", trained, size, f"{report.seconds:.0f} s")
    Console().print(table)


if __name__ == "__main__":
    main()
