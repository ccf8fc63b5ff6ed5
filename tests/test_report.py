"""The report of a load: what it calls a problem, what it raises, and what it prints."""

from __future__ import annotations

import pytest
import torch

from inlay.errors import IncompatibleBaseError, LoadError, NonFiniteError
from inlay.report import LoadReport, base_fingerprint

ONE_OF_EACH = {
    "missing": ["m"],
    "unexpected": ["u"],
    "shape": [("s", (2, 3), (4, 3))],
    "non_finite": ["n"],
    "config": ["r is 8 in the config and 4 in 'q.lora_A.weight'"],
    "base": ["the layers have another fingerprint"],
}
REMARKS = {"dtype": [("d", torch.float16, torch.float32)], "notes": ["saved from another path."]}


def report(*kinds: str) -> LoadReport:
    return LoadReport(**{kind: list({**ONE_OF_EACH, **REMARKS}[kind]) for kind in kinds})  # type: ignore[arg-type]


def test_all_well() -> None:
    assert LoadReport().ok
    assert LoadReport().summary() == "The file and the adapter agree."
    LoadReport().raise_for_problems()


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_each_is_a_problem(kind: str) -> None:
    assert not report(kind).ok


def test_remarks_are_none() -> None:
    remarks = report(*REMARKS)
    assert remarks.ok
    remarks.raise_for_problems()
    assert remarks.summary() == (
        "note: 1 tensor converted: 'd' from torch.float16 to torch.float32.\nnote: saved from another path."
    )


@pytest.mark.parametrize(
    ("kinds", "error"),
    [
        (["base"], IncompatibleBaseError),
        (["base", "missing", "non_finite"], IncompatibleBaseError),
        (["non_finite"], NonFiniteError),
        (["non_finite", "dtype"], NonFiniteError),
        (["non_finite", "missing"], LoadError),
        (["missing"], LoadError),
        (["unexpected"], LoadError),
        (["shape"], LoadError),
        (["config"], LoadError),
    ],
)
def test_the_error_that_fits(kinds: list[str], error: type[LoadError]) -> None:
    given = report(*kinds)
    with pytest.raises(LoadError) as caught:
        given.raise_for_problems()
    assert type(caught.value) is error
    assert caught.value.report is given
    assert given.summary() in str(caught.value)
    assert isinstance(caught.value, RuntimeError)  # as load_state_dict raises


def test_it_stands_in_for_torchs() -> None:
    given = report("missing", "unexpected")
    missing, unexpected = given
    theirs = torch.nn.Linear(1, 1).load_state_dict({"u": torch.ones(1)}, strict=False)
    assert (missing, unexpected) == (["m"], ["u"]) == (given.missing_keys, given.unexpected_keys)
    assert all(name in dir(given) for name in theirs._fields)


def test_summary_names_everything_and_stays_short() -> None:
    text = report(*ONE_OF_EACH, *REMARKS).summary()
    for word in (
        "'m'",
        "'u'",
        "'s' is [2, 3] in the file, [4, 3] in the model",
        "'n'",
        "r is 8",
        "fingerprint",
        "'d'",
    ):
        assert word in text
    many = LoadReport(missing=[f"layer.{i}" for i in range(10_000)])
    assert "10000 tensors missing" in many.summary()
    assert "'layer.2'; and 9997 more." in many.summary()
    assert len(many.summary()) < 400


@pytest.mark.parametrize(
    ("kind", "cure"), [("base", "base model it was"), ("missing", "Check"), ("non_finite", "earlier")]
)
def test_summary_says_what_to_do(kind: str, cure: str) -> None:
    assert cure in report(kind).summary().splitlines()[-1]
    assert str(report(kind)) == report(kind).summary()


def test_fields_are_filled_and_not_replaced() -> None:
    given = LoadReport()
    given.missing.append("a")
    assert LoadReport().missing == []
    with pytest.raises(AttributeError):
        given.missing = []  # type: ignore[misc]


def test_fingerprint() -> None:
    layers = [("q", (2, 3)), ("k", (2, 3)), ("c", (4, 1, 3))]
    print_ = base_fingerprint(layers)
    assert print_ == base_fingerprint(reversed(layers))
    assert print_ == base_fingerprint((name, torch.empty(shape).shape) for name, shape in layers)
    assert print_.startswith("v1:")
    others = [
        layers[:2],
        [("q", (3, 2)), *layers[1:]],
        [("p", (2, 3)), *layers[1:]],
        [("q", (23,)), *layers[1:]],
        [("q", (2, 3)), ("k", (4, 1, 3)), ("c", (2, 3))],
        [],
    ]
    prints = {base_fingerprint(other) for other in others}
    assert len(prints) == len(others)
    assert print_ not in prints


def test_fingerprint_is_pinned() -> None:
    """It stands in files: another value for the same layers would refuse every adapter saved before."""
    assert base_fingerprint([("b", (2, 3)), ("a", (4,))]) == (
        "v1:2975247bbf4d403b92b652ce87a56bec6e92d07bc2e86bbb0ba5636c46102899"
    )
