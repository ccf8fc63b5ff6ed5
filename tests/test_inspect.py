"""The report on an adapter's files, against the dense product it avoids."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import MissingFileError
from inlay.inspect import AdapterReport, effective_rank, inspect_adapter, plot, singular_values


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20)
        self.wide = nn.Linear(20, 8, bias=False)
        self.conv = nn.Conv2d(4, 8, 3)
        self.table = nn.Embedding(16, 12)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


def saved(folder: Path, **options: object) -> tuple[AdapterReport, dict[str, Tensor]]:
    """The report on a random adapter, and its dense changes from the model itself."""
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["linear", "wide", "conv", "table"],
        "init_lora_weights": False,
    }
    model = inlay.get_peft_model(Layers(), inlay.LoraConfig(**{**fields, **options}))
    model.save_pretrained(str(folder))
    before = {name: p.detach().clone() for name, p in Layers().named_parameters()}
    base = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    merged = dict(model.merge_and_unload().named_parameters())
    changes = {name: (merged[name] - base[name]).detach().double() for name in before if name in base}
    return inspect_adapter(folder), changes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"wide": 2}, "alpha_pattern": {"linear": 16}},
        {"modules_to_save": ["head"]},
    ],
)
def test_norms_and_ranks_are_those_of_the_dense_change(options: dict[str, object], tmp_path: Path) -> None:
    report, changes = saved(tmp_path, **options)
    assert {row.module for row in report.rows} == {"linear", "wide", "conv", "table"}
    for row in report.rows:
        dense = changes[f"{row.module}.weight"].flatten(1)
        sigma = torch.linalg.svdvals(dense)
        assert row.norm == pytest.approx(float(dense.norm()), rel=1e-4)
        assert row.largest == pytest.approx(float(sigma[0]), rel=1e-4)
        kept = sigma[: row.rank]  # what lies behind is rounding
        assert row.effective_rank == pytest.approx(effective_rank(kept), rel=1e-3)
        assert 1 <= row.effective_rank <= row.rank


def test_every_number_in_the_file_is_counted_once(tmp_path: Path) -> None:
    report, _ = saved(tmp_path, modules_to_save=["head"], target_modules=["linear", "wide"], use_dora=True)
    r = 4
    linear, wide = r * (12 + 20) + 20, r * (20 + 8) + 8
    assert {row.module: row.parameters for row in report.rows} == {"linear": linear, "wide": wide}
    assert {one.name: one.shape for one in report.whole} == {"head.weight": (2, 8), "head.bias": (2,)}
    assert report.parameters == linear + wide + 18
    assert report.file_bytes == 4 * report.parameters


def test_an_untrained_adapter_changes_nothing(tmp_path: Path) -> None:
    report, _ = saved(tmp_path, init_lora_weights=True, target_modules=["linear"])
    (row,) = report.rows
    assert (row.norm, row.largest, row.effective_rank) == (0.0, 0.0, 0.0)


def test_stacked_experts_are_measured_one_by_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    experts, r, n_in, n_out = 3, 2, 5, 7
    down, up = torch.randn(r * experts, n_in), torch.randn(n_out, r * experts)
    name = "base_model.model.moe.lora_{}.weight"
    save_file({name.format("A"): down, name.format("B"): up}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": 4}))
    (row,) = inspect_adapter(tmp_path).rows
    # On disk the expert's index varies slowest in A and fastest in B.
    dense = 2 * up.reshape(n_out, r, experts).permute(2, 0, 1) @ down.reshape(experts, r, n_in)
    assert row.shape == (experts, n_out, n_in)
    assert row.rank == r
    assert row.norm == pytest.approx(float(dense.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [([3.0, 0.0, 0.0], 1.0), ([2.0, 2.0, 2.0], 3.0), ([0.0, 0.0], 0.0), ([1.0, 1.0, 0.0], 2.0)],
)
def test_effective_rank_counts_equal_directions(sigma: list[float], expected: float) -> None:
    assert effective_rank(torch.tensor(sigma)) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(3, 12, 20), (8, 4, 6), (1, 5, 5)])
def test_singular_values_without_the_product(shape: tuple[int, int, int]) -> None:
    r, n_in, n_out = shape
    down, up = torch.randn(r, n_in, dtype=torch.double), torch.randn(n_out, r, dtype=torch.double)
    ours, dense = singular_values(down, up), torch.linalg.svdvals(up @ down)
    n = min(len(ours), len(dense))
    assert torch.allclose(ours[:n], dense[:n])
    assert all(math.isclose(float(rest), 0, abs_tol=1e-10) for rest in [*ours[n:], *dense[n:]])


def test_plot_draws_any_report(tmp_path: Path) -> None:
    report, _ = saved(tmp_path)
    for one in (report, dataclasses.replace(report, rows=[])):
        assert plot(one, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_layers_of_one_last_name_are_drawn_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    report, _ = saved(tmp_path)
    names = ["attention.output.dense", "attention.query", "output.dense"]
    rows = [dataclasses.replace(report.rows[0], module=f"h.{i}.{name}") for i in range(3) for name in names]
    drawn: list[tuple[str, list[int]]] = []
    plain = Axes.plot

    def noted(self: Axes, depth: list[int], values: list[float], **options: object) -> object:
        drawn.append((str(options["label"]), depth))
        return plain(self, depth, values, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    plot(dataclasses.replace(report, rows=rows), tmp_path / "layers.png")
    once_each = [(label, [0, 1, 2]) for label in ("attention.output.dense", "query", "h.output.dense")]
    assert sorted(drawn) == sorted([*once_each, *once_each])  # norms, and effective ranks


@pytest.mark.parametrize("remove", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_refused(remove: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / remove).unlink()
    with pytest.raises(MissingFileError, match=remove):
        inspect_adapter(tmp_path)
