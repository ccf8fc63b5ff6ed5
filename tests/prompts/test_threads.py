"""Prompts of one handle, used, set, loaded and deleted by many threads, and recomputed in backward."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts.batches import batch, config, handle
from torch import Tensor

import inlay
from inlay.errors import UnknownAdapterError

ARCH, TASK = "llama", "CAUSAL_LM"
BASE = "__base__"
NAMES = ("p3", "p5", "k4", "lora")
CHOICES: tuple[tuple[str, ...], ...] = ((), *((n,) for n in NAMES), ("lora", "p3"), ("k4", "p5"))
THREADS = 8


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def model() -> inlay.PeftModel:
    """A handle whose prompts and layers let other threads go first, wherever they run."""
    made = handle(ARCH, TASK, *NAMES)
    for module in (*made.prompt_encoder.values(), *made.get_base_model().modules()):
        module.register_forward_pre_hook(lambda *_: time.sleep(0))
    return made


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 64, (2, 5))


def chosen(model: inlay.PeftModel, names: Sequence[str]) -> AbstractContextManager[None]:
    return model.use_adapter(names) if names else model.disable_adapter()


def tokens(model: inlay.PeftModel, ids: Tensor, **how: Any) -> Tensor:
    found: Tensor = model.generate(input_ids=ids, max_new_tokens=3, eos_token_id=63, **how)
    return found


@torch.no_grad()
def expected(model: inlay.PeftModel, ids: Tensor) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
    """What every choice gives: logits, and tokens."""
    logits, generated = {}, {}
    for names in CHOICES:
        with chosen(model, names):
            logits[names], generated[names] = model(input_ids=ids).logits, tokens(model, ids)
    values = list(logits.values())
    assert all(a.shape != b.shape or not torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])
    return logits, generated


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def in_threads(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


def test_no_thread_gets_anothers_prompt(model: inlay.PeftModel, ids: Tensor) -> None:
    logits, generated = expected(model, ids)

    @torch.no_grad()
    def work(thread: int) -> int:
        draw, wrong = random.Random(thread), 0
        for i in range(40):
            names = draw.choice(CHOICES)
            with chosen(model, names):
                wrong += not same(model(input_ids=ids).logits, logits[names])
                if i % 5 == 0:
                    wrong += not torch.equal(tokens(model, ids), generated[names])
            one, two = draw.choice((BASE, *NAMES)), draw.choice((BASE, *NAMES))
            rows = model(input_ids=ids, adapter_names=[one, two]).logits[:, -5:]
            for at, name in enumerate((one, two)):
                wrong += not same(rows[at], logits[() if name == BASE else (name,)][at, -5:])
        return wrong

    assert in_threads(work) == [0] * THREADS


def test_what_one_thread_sets_the_others_see_whole(model: inlay.PeftModel, ids: Tensor) -> None:
    logits, _ = expected(model, ids)
    settings = (("lora", "p3"), ("k4", "p5"), ("p3",), ("lora",))
    model.set_adapter(list(settings[0]))
    done, ran = threading.Event(), threading.Semaphore(0)

    @torch.no_grad()
    def work(thread: int) -> set[Any]:
        if thread == 0:
            for i in range(60):
                model.set_adapter(list(settings[i % len(settings)]))
                if i % 15 == 0:  # a call that began before may end after: one of four has begun since
                    while ran.acquire(blocking=False):
                        pass
                    assert all(ran.acquire(timeout=60) for _ in range(4))
            done.set()
            return set()
        seen = set()
        while not done.is_set():
            out = model(input_ids=ids).logits
            ran.release()
            seen.add(next((names for names in settings if same(out, logits[names])), "none of them"))
            with model.use_adapter("p5"):
                assert same(model(input_ids=ids).logits, logits[("p5",)])
        return seen

    seen = set.union(*in_threads(work, 4))
    assert seen <= set(settings)
    assert len(seen) > 1


def test_loading_and_deleting_beside_running_calls(model: inlay.PeftModel, ids: Tensor, tmp_path: Path) -> None:
    logits, generated = expected(model, ids)
    other = handle(ARCH, TASK, "p3", "k4")
    other.save_pretrained(tmp_path)
    new = {}
    for name in ("p3", "k4"):
        with torch.no_grad(), other.use_adapter(name):
            new[name] = other(input_ids=ids).logits
    done, used = threading.Event(), []

    def write() -> None:
        try:
            for _ in range(8):
                for name in ("p3", "k4"):
                    model.load_adapter(tmp_path / name, "new")
                    model.delete_adapter("new")
                    model.add_adapter("fresh", config(ARCH, TASK, name))
                    model.delete_adapter("fresh")
        finally:
            done.set()

    @torch.no_grad()
    def work(thread: int) -> int:
        if thread == 0:
            write()
            return 0
        draw, wrong = random.Random(thread), 0
        while not done.is_set():
            names = draw.choice(CHOICES)
            with chosen(model, names):
                wrong += not same(model(input_ids=ids).logits, logits[names])
                if draw.random() < 0.1:
                    wrong += not torch.equal(tokens(model, ids), generated[names])
            try:
                with model.use_adapter("new"):
                    out = model(input_ids=ids).logits
                used.append(
                    any(torch.allclose(out, t, rtol=1e-4, atol=1e-4) for t in new.values() if t.shape == out.shape)
                )
            except UnknownAdapterError:
                pass
        return wrong

    assert sum(in_threads(work, 5)) == 0
    assert all(used)
    assert list(model.peft_config) == list(NAMES)
    with torch.no_grad():
        assert same(model(input_ids=ids).logits, logits[("p3",)])


def test_a_call_that_waited_sees_the_prompt_that_came(ids: Tensor) -> None:
    """A model without any prompt is given its first one while a call waits to begin."""
    model = handle(ARCH, TASK, "lora")
    found: list[Tensor] = []

    @torch.no_grad()
    def run() -> None:
        found.append(model(input_ids=ids).logits)

    waiting = threading.Thread(target=run)
    with model.base_model.router.writing():
        waiting.start()
        waiting.join(0.2)
        assert not found
        model.add_adapter("p3", config(ARCH, TASK, "p3"))
        model.set_adapter("p3")
    waiting.join()
    run()
    assert same(found[0], found[1])
    assert found[0].shape[1] == 3 + 5


def test_choices_are_made_beside_changes(model: inlay.PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice is no call, so that none waits for the other."""
    done = threading.Event()

    def bias(_: Any) -> str:  # whoever looks through the configs lets others change them meanwhile
        time.sleep(0)
        return "none"

    monkeypatch.setattr(inlay.PromptLearningConfig, "bias", property(bias))

    def work(thread: int) -> None:
        if thread == 0:
            try:
                for _ in range(40):
                    model.add_adapter("new", config(ARCH, TASK, "p3"))
                    model.delete_adapter("new")
            finally:
                done.set()
        while not done.is_set():
            for names in ((), ("p3",), ("lora", "k4")):
                with chosen(model, names):
                    assert model.has_active_enabled_adapter == bool(names)

    in_threads(work, 4)


@pytest.mark.parametrize("verb", ["delete", "add", "load", "set"])
def test_a_change_waits_for_the_call_that_runs(verb: str, ids: Tensor, tmp_path: Path) -> None:
    model = handle(ARCH, TASK, *NAMES)
    logits, _ = expected(model, ids)
    handle(ARCH, TASK, "k4").save_pretrained(tmp_path)
    changes: dict[str, Callable[[], Any]] = {
        "delete": lambda: model.delete_adapter("p5"),
        "add": lambda: model.add_adapter("new", config(ARCH, TASK, "p3")),
        "load": lambda: model.load_adapter(tmp_path / "k4", "new"),
        "set": lambda: model.set_adapter("lora"),
    }

    def state() -> tuple[Any, ...]:
        return sorted(model.peft_config), sorted(model.prompt_encoder), model.active_adapters

    running, go_on, before = threading.Event(), threading.Event(), state()

    def stop(*_: Any) -> None:
        running.set()
        assert go_on.wait(60)

    hook = model.get_base_model().get_input_embeddings().register_forward_pre_hook(stop)
    found: list[Tensor] = []

    @torch.no_grad()
    def run() -> None:
        with model.use_adapter("p5"):
            found.append(model(input_ids=ids).logits)

    call, change = threading.Thread(target=run), threading.Thread(target=changes[verb])
    call.start()
    assert running.wait(60)
    change.start()
    change.join(0.1)
    meanwhile = state()
    go_on.set()
    call.join()
    change.join()
    assert meanwhile == before
    hook.remove()
    assert state() != before
    assert same(found[0], logits[("p5",)])


class Broken(Exception):
    pass


@pytest.mark.parametrize("names", [("p3",), ("k4",), ("lora", "p3"), ("k4", "p5")], ids="+".join)
def test_an_exception_leaves_no_trace(model: inlay.PeftModel, ids: Tensor, names: tuple[str, ...]) -> None:
    logits, generated = expected(model, ids)

    def fail(*_: Any) -> None:
        raise Broken

    last = model.get_base_model().model.layers[-1]
    for how in (lambda: model(input_ids=ids), lambda: tokens(model, ids)):
        broken = last.register_forward_hook(fail)
        with pytest.raises(Broken), model.use_adapter(names):
            how()
        with pytest.raises(Broken):
            model(input_ids=ids, adapter_names=[names[0], BASE])
        broken.remove()
        assert not model.base_model.router.inside
        with torch.no_grad():
            assert same(model(input_ids=ids).logits, logits[("p3",)])
        for other in CHOICES:
            with torch.no_grad(), chosen(model, other):
                assert same(model(input_ids=ids).logits, logits[other])
                assert torch.equal(tokens(model, ids), generated[other])
    model.set_adapter("k4")  # a write is not kept waiting


# ---------------------------------------------------------------- backward


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_backward_trains_what_forward_used(arch: str, reentrant: bool, where: str) -> None:
    task = "SEQ_2_SEQ_LM" if arch == "t5" else TASK
    stored, recomputed = (seeded(arch, task) for _ in range(2))
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = batch(arch, task, 4).inputs
    for names in (["p3"], ["lora", "p3"], None):
        losses = []
        for model in (stored, recomputed):
            model.train()
            model.zero_grad()
            model.set_requires_grad(["p3", "p5", "lora"])
            if names is None:
                losses.append(model(**inputs, adapter_names=["p3", BASE, "lora", "p3"]).loss)
            else:
                with model.use_adapter(names):
                    losses.append(model(**inputs).loss)
        for loss in losses:  # p5 is the default by now
            if where == "here":
                loss.backward()
            else:
                in_threads(lambda _, loss=loss: loss.backward(), 1)
        grads = [dict(model.named_parameters()) for model in (stored, recomputed)]
        for key, one in grads[0].items():
            other = grads[1][key]
            assert (one.grad is None) == (other.grad is None), key
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-8, msg=key)
        trained = {
            n for n in ("p3", "p5", "lora") for k, p in grads[1].items() if f".{n}." in k and p.grad is not None
        }
        assert trained == set(names or ["p3", "lora"])


def seeded(arch: str, task: str) -> inlay.PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = handle(arch, task, "p5", "p3", "lora")
    for module in model.modules():  # dropout would be another one in each of two models
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    return model
