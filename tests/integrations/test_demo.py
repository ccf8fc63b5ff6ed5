"""The demonstration: what it reads, how it plans, what it compares; and once, slowly, all of it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerControl, TrainerState

from inlay.integrations.demo import (
    FEWEST_ROWS,
    Agreement,
    Deadline,
    affordable,
    by_class,
    compare,
    encoder_folder,
    fit_head,
    run_demo,
)
from inlay.integrations.docstrings import (
    CANDIDATES,
    Docstring,
    distinct,
    largest,
    read_docstrings,
    sample,
    standard_library,
)

SOURCE = '''"""The module speaks of four words."""
class A:
    """Short one."""
    def f(self):
        """A method   that says
        a little more."""
    async def g(self): "An async method with words"
x = """not a docstring, whatever it says"""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for package, files in {"one": ["a.py", "test/b.py", "sub/c.py"], "two": ["bad.py"]}.items():
        for file in files:
            path = tmp_path / package / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("print 'of Python 2'" if file == "bad.py" else SOURCE)
    return tmp_path


def test_docstrings_of_modules_classes_and_functions_are_read_and_tests_left_out(library: Path) -> None:
    found = read_docstrings(library, ["one", "two", "three"])
    texts = ["The module speaks of four words.", "A method that says a little more.", "An async method with words"]
    assert sorted(one.text for one in found) == sorted(texts * 2)
    assert {one.package for one in found} == {"one"}


def test_this_python_has_enough_to_show() -> None:
    found = largest(read_docstrings(standard_library(), [*CANDIDATES[5:]]), 12)
    assert len({one.package for one in found}) == 12
    assert len(found) > 1000


def test_no_two_texts_share_most_of_their_words() -> None:
    words = [
        "Return a copy of the list, sorted",
        "Return a copy of the LIST, sorted.",
        "Return a deep copy of the list, sorted",
        "Close the file and flush its buffers",
        "Return the number of items",
    ]
    kept = distinct([Docstring(text, str(i)) for i, text in enumerate(words)])
    assert [one.package for one in kept] == ["0", "3", "4"]
    assert distinct([]) == []


def test_the_largest_packages_win_and_a_sample_is_repeatable() -> None:
    found = [Docstring(f"{name} {i}", name) for name, n in (("a", 3), ("b", 5), ("c", 1)) for i in range(n)]
    assert {one.package for one in largest(found, 2)} == {"a", "b"}
    assert sample(found, 4, seed=1) == sample(found, 4, seed=1) != sample(found, 4, seed=2)
    assert len(sample(found, 100, seed=1)) == 9


@pytest.mark.parametrize("seconds", [1.0, 10.0, 30.0, 60.0, 100.0, 1000.0])
def test_the_rows_taken_fit_the_time(seconds: float) -> None:
    forward, step = 0.006, 0.02

    def cost(rows: int) -> float:
        # Features once, the held-out fifth four times, and two passes of training.
        return rows * (forward + 0.2 * 4 * forward + 0.8 * 2 * step)

    rows = affordable(3000, seconds, forward, step)
    assert cost(rows) <= seconds or rows == FEWEST_ROWS
    assert cost(rows + 1) > seconds or rows == 3000
    assert affordable(100, seconds, forward, step) == 100


def test_a_head_is_solved_to_its_optimum() -> None:
    x, y = torch.randn(200, 6) * torch.tensor([1, 2, 3, 4, 5, 100.0]) + 7, torch.randint(3, (200,))
    x[:, 0] += 3 * y
    head = fit_head(x, y, 3, decay=1e-2)
    z = (x - x.mean(0)) / x.std(0)
    weight = (head.weight_CD * x.std(0)).requires_grad_()
    bias = (head.bias_C + head.weight_CD @ x.mean(0)).requires_grad_()
    loss = F.cross_entropy(F.linear(z, weight, bias), y) + 1e-2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert all(float(g.abs().max()) < 1e-3 for g in gradients)
    assert math.isnan(head.accuracy)
    assert head.judged(x, y).accuracy > 0.8


def test_a_slow_run_takes_fewer_steps_and_its_learning_rate_still_ends_at_zero() -> None:
    now = 0.0
    deadline = Deadline(at=60.0, clock=lambda: now)
    state, control = TrainerState(max_steps=100), TrainerControl()
    schedule = SimpleNamespace(lr_lambdas=[float, float])  # one for each group of parameters
    args = SimpleNamespace(get_warmup_steps=lambda steps: 6)
    deadline.on_train_begin(args, state, control, lr_scheduler=schedule)
    rates = []
    while not control.should_training_stop:
        rates.append(schedule.lr_lambdas[0](state.global_step))
        now += 1.0 if state.global_step < 30 else 1.5
        state.global_step += 1
        deadline.on_step_end(args, state, control)
    assert len(schedule.lr_lambdas) == 2
    assert 45 <= state.global_step < 60
    assert now <= 60
    assert max(rates) > 0.8
    assert rates[0] == 0
    assert 0 < rates[-1] < 0.05


def test_predictions_are_compared_row_by_row() -> None:
    live = [{"row": i, "label": "a", "predicted": "ab"[i % 2], "probability": 0.5} for i in range(4)]
    other = [{**live[0], "probability": 0.4}, {**live[1], "predicted": "a"}, live[2], live[3]]
    assert compare(live, other) == Agreement(rows=4, equal=3, difference=pytest.approx(0.1), accuracy=0.75)
    assert by_class(live) == {"a": (4, 2)}
    with pytest.raises(ValueError, match="zip"):
        compare(live, other[:3])


@pytest.mark.slow
def test_the_whole_demonstration_in_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))  # for the fresh processes
    if not encoder_folder().is_dir():
        pytest.skip("the demo's encoder is not installed")
    report = run_demo(tmp_path, seconds=20, begun=time.perf_counter())
    assert len(report.classes) == 12
    assert report.rows >= FEWEST_ROWS
    assert report.train.after["accuracy"] > report.majority
    for other in (report.reloaded, report.merged):
        assert other.equal == other.rows == report.train.held_out_rows
        assert other.difference < 1e-4
