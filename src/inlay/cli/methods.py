"""``inlay methods``: the table of methods, as the code has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from inlay.catalogue import Capability

_SHORT = {"MultiheadAttention": "Attention", "Embedding": "Embed."}


def methods(
    outs: Annotated[
        int, typer.Option(help="Outputs of the linear layer that trained parameters are counted on.")
    ] = 1024,
    ins: Annotated[int, typer.Option(help="Its inputs.")] = 1024,
    why: Annotated[bool, typer.Option(help="Also say why a method cannot be on a kind of layer.")] = False,
) -> None:
    """List the methods: trained parameters of one layer, kinds of layers, merging, rows; defaults of each config."""
    from inlay import catalogue
    from inlay.cli.show import console, grid

    found = catalogue.methods(outs, ins)
    table = grid(header=True)
    table.add_column("method")
    table.add_column("acts on")
    table.add_column("trained", justify="right")
    for kind in found[0].kinds:
        table.add_column(_SHORT.get(kind.kind, kind.kind))
    for row in found:
        table.add_row(row.name, row.acts_on, f"{row.trained:,}", *map(_cell, row.kinds))
    screen = console()
    screen.print(table)
    screen.print(
        f"\ntrained: parameters on one linear layer of {outs} x {ins}, with the defaults of the config. "
        "m: merges. Rows of a batch with adapters of their own: R in one product, r adapter by adapter."
    )
    for row in found if why else ():
        for kind in row.kinds:
            if kind.why_not is not None:
                screen.print(f"{row.name} on {kind.kind}: {kind.why_not}")
    for row in found:
        screen.print(f"{row.name}: {row.config}, {row.paper}")


def _cell(kind: Capability) -> str:
    if kind.why_not is not None:
        return "-"
    return ("m" if kind.merges else "") + {"stacked": "R", "sliced": "r", "no": ""}[kind.rows] or "yes"
