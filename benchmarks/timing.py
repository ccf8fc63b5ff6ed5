"""Taking turns: every contestant runs once per round, and the quickest of its runs counts.

The clock is the processor time of this process, all its threads together. With one thread and a warm disk cache it
shows what a wall clock shows on an idle machine, and on a busy one it leaves out the time that others were given.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measured:
    """What one contestant took: seconds, bytes, or tokens; ``cut`` where time ran out before it had all its runs."""

    samples: tuple[float, ...]
    cut: bool = False

    @property
    def best(self) -> float:
        return min(self.samples)


@dataclass(frozen=True)
class Missing:
    """Why there is no number."""

    error: str

    @classmethod
    def because(cls, error: Exception) -> Missing:
        lines = str(error).strip().splitlines() or [""]
        return cls(f"{type(error).__name__}: {lines[0]}")


Outcome = Measured | Missing
PATIENCE = 180.0  # seconds that a race goes on for the sake of its least number of rounds


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contestant:
    """One thing to time.

    Args:
        run: What is timed. Where results are compared it returns a tensor.
        before, after: What is done around every run, not timed.
        at_most (`int`, defaults to 10,000): Rounds it takes part in; for what is too slow to repeat.
    """

    run: Callable[[], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing
    at_most: int = 10_000

    def once(self) -> tuple[float, object]:
        """Seconds of one run, and what it returned."""
        self.before()
        start = time.process_time()
        result = self.run()
        seconds = time.process_time() - start
        self.after()
        return seconds, result


Builder = Callable[[], Contestant]


class Race:
    """Builds the contestants, warms them up, and lets them take turns. One that raises drops out; the others go on.

    Args:
        builders: Column name -> what builds the contestant.
        warm (`bool`, defaults to `True`): Whether each runs once before the clock counts.
        alike: Columns whose results must agree before any is timed: a wrong result has no speed.
        tolerance (`float`, defaults to 1e-4): How far they may differ, relative to the first one's norm.
    """

    def __init__(
        self,
        builders: Mapping[str, Builder],
        *,
        warm: bool = True,
        alike: Sequence[str] = (),
        tolerance: float = 1e-4,
    ) -> None:
        self.failed: dict[str, Missing] = {}
        self.samples: dict[str, list[float]] = {name: [] for name in builders}
        self.contestants: dict[str, Contestant] = {}
        results: dict[str, object] = {}
        for name, build in builders.items():
            with self._dropping(name):
                self.contestants[name] = build()
                if warm:
                    results[name] = self.contestants[name].once()[1]
        self._compare([(name, results[name]) for name in alike if name in results], tolerance)

    def run(
        self, *, seconds: float, least: int = 3, pays_gc: bool = False, limit: float = PATIENCE
    ) -> dict[str, Outcome]:
        """Rounds until `seconds` are over, and `least` of them at the least.

        After `limit` seconds no round but the first begins, however few there were: the table says where that was.

        With `pays_gc` the garbage collector runs as it does for a user, for what creates objects by the thousand;
        otherwise it is off while the clock runs.
        """
        start, done = time.perf_counter(), 0
        with _as_for_users() if pays_gc else _quiet():
            while (passed := time.perf_counter() - start) < seconds or done < least:
                if (done and passed > limit) or not self._round(done, collect=pays_gc):
                    break
                done += 1
        return {name: self._outcome(name, least) for name in self.samples}

    def _round(self, number: int, *, collect: bool) -> bool:
        """Everyone once, in turning order; whether anybody was left to run."""
        names = [name for name, one in self.contestants.items() if number < one.at_most]
        for name in names if number % 2 == 0 else reversed(names):
            if collect:
                gc.collect()
            with self._dropping(name):
                self.samples[name].append(self.contestants[name].once()[0])
        return bool(names)

    def _outcome(self, name: str, least: int) -> Outcome:
        if name in self.failed:
            return self.failed[name]
        samples = tuple(self.samples[name])
        return Measured(samples, cut=len(samples) < min(least, self.contestants[name].at_most))

    @contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library raises: its figure says so and the run goes on
            self.failed[name] = Missing.because(error)
            self.contestants.pop(name, None)

    def _compare(self, results: Sequence[tuple[str, object]], tolerance: float) -> None:
        if not results:
            return
        (judge, reference), *others = results
        for name, result in others:
            difference = relative_difference(result, reference)
            if not difference <= tolerance:  # written so that NaN is caught
                self.failed[name] = Missing(f"wrong result: {difference:.1e} away from the {judge}'s")
                self.contestants.pop(name, None)


def relative_difference(result: object, reference: object) -> float:
    """Norm of the difference of two tensors over the norm of the second: one element says little in bf16."""
    if not (isinstance(result, torch.Tensor) and isinstance(reference, torch.Tensor)):
        raise TypeError(f"results to compare are tensors, got {type(result).__name__} and {type(reference).__name__}")
    return float((result.double() - reference.double()).norm() / reference.double().norm())


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection inside, and none of what was alive before is looked at again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def _as_for_users() -> Iterator[None]:
    gc.collect()
    yield
