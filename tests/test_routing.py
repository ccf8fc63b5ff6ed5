"""Which adapter serves which thread, task and row, and what is computed again in backward."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import close, close_all, differs, disturb, gradients, same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import inlay
from inlay import routing
from inlay.errors import BusyError, LostRoutingError, RowsError, UnknownAdapterError

NAMES = ("a", "b", "c")
TARGETS = {"mlp": ["lin0", "lin1"], "llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "v", "wo"]}

Tiny = Callable[[str], nn.Module]


def adapted(model: nn.Module, names: Sequence[str] = NAMES, **fields: Any) -> inlay.PeftModel:
    """A handle with adapters of different ranks that do something; the last one is a DoRA."""
    handle: inlay.PeftModel | None = None
    for i, name in enumerate(names):
        config = inlay.LoraConfig(**{"r": 2 + i, "use_dora": i == 2, **fields})
        if handle is None:
            handle = inlay.get_peft_model(model, config, adapter_name=name)
        else:
            handle.add_adapter(name, config)
    assert handle is not None
    disturb(handle)
    return handle


@pytest.fixture
def model(mlp: nn.Module) -> inlay.PeftModel:
    return adapted(mlp, target_modules=TARGETS["mlp"]).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 10)


def choice(model: inlay.PeftModel, name: str | None) -> AbstractContextManager[None]:
    return model.disable_adapter() if name is None else model.use_adapter(name)


@torch.no_grad()
def outputs(model: inlay.PeftModel, x: Tensor) -> dict[str | None, Tensor]:
    """What each choice gives, all different."""
    out: dict[str | None, Tensor] = {}
    for name in (None, *NAMES):
        with choice(model, name):
            out[name] = model(x)
    values = list(out.values())
    assert all(float((a - b).abs().max()) > 1e-2 for i, a in enumerate(values) for b in values[:i])
    return out


def is_close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- threads


class Crowd:
    """Threads that stop at the first exception, which is raised at the end."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.errors: list[BaseException] = []

    def loop(self, work: Callable[[int], None], times: int) -> Callable[[], None]:
        def run() -> None:
            try:
                for i in range(times):
                    if self.errors:
                        return
                    work(i)
            except BaseException as error:
                self.errors.append(error)

        return run

    def run(self, workers: Sequence[Callable[[], None]], beside: Sequence[Callable[[], None]] = ()) -> None:
        """Runs ``beside`` again and again until all ``workers`` are done."""

        def again(work: Callable[[], None]) -> None:
            try:
                while not self.stop.is_set() and not self.errors:
                    work()
            except BaseException as error:
                self.errors.append(error)

        background = [threading.Thread(target=again, args=(work,)) for work in beside]
        threads = [threading.Thread(target=work) for work in workers]
        for thread in (*background, *threads):
            thread.start()
        for thread in threads:
            thread.join(120)
        self.stop.set()
        for thread in background:
            thread.join(120)
        if self.errors:
            raise self.errors[0]
        assert not any(thread.is_alive() for thread in (*background, *threads)), "a thread hangs"


def _eight_threads(model: inlay.PeftModel, x: Tensor, times: int, folder: Path) -> tuple[int, int]:
    """(wrong outputs, forwards)."""
    expected = outputs(model, x)
    row_names = ("a", "__base__", "c", "b")
    expected_rows = torch.stack([expected[None if n == "__base__" else n][i] for i, n in enumerate(row_names)])
    model.save_pretrained(str(folder), selected_adapters=["b"])
    wrong: list[int] = []
    done: list[int] = []
    crowd = Crowd()

    def check(out: Tensor, wanted: Tensor) -> None:
        done.append(1)
        if not is_close(out, wanted):
            wrong.append(1)

    def with_choice(name: str | None) -> Callable[[int], None]:
        @torch.no_grad()
        def work(i: int) -> None:
            with choice(model, name):
                check(model(x), expected[name])

        return work

    @torch.no_grad()
    def with_rows(i: int) -> None:
        check(model(x, adapter_names=list(row_names)), expected_rows)

    @torch.no_grad()
    def with_default(i: int) -> None:
        check(model(x), expected["a"])

    serial = iter(range(10**9))

    def load_and_delete() -> None:
        name = f"extra{next(serial)}"
        model.load_adapter(str(folder / "b"), name)
        with torch.no_grad(), model.use_adapter(name):
            check(model(x), expected["b"])
        model.delete_adapter(name)
        time.sleep(0.002)

    def merge_and_unmerge() -> None:
        model.merge_adapter(["a"])
        with torch.no_grad():
            check(model(x), expected["a"])
        model.unmerge_adapter()
        time.sleep(0.002)

    workers = [with_choice("a"), with_choice("b"), with_choice("c"), with_choice(None), with_choice("b"),
               with_rows, with_rows, with_default]  # fmt: skip
    crowd.run([crowd.loop(work, times) for work in workers], beside=[load_and_delete, merge_and_unmerge])
    return len(wrong), len(done)


@pytest.mark.parametrize("times", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_eight_threads(model: inlay.PeftModel, x: Tensor, tmp_path: Path, times: int) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong, done = _eight_threads(model, x, times, tmp_path)
    assert wrong == 0, f"{wrong} of {done} outputs are another adapter's"
    assert done >= 8 * times
    assert list(model.peft_config) == list(NAMES)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_eight_threads_can_fail(
    model: inlay.PeftModel, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one choice for all threads, as the incumbent has it, outputs are wrong."""

    class Shared:
        value: Any = None

        def get(self, default: Any = None) -> Any:
            return default if self.value is None else self.value

        def set(self, value: Any) -> None:
            self.value = value

        def reset(self, token: Any) -> None:
            self.value = None

    router = model.base_model.router
    real = router.choose

    @contextmanager
    def choose(route: Any) -> Iterator[None]:
        with real(route):
            time.sleep(0.0005)
            yield

    monkeypatch.setattr(routing, "_CHOSEN", Shared())
    monkeypatch.setattr(router, "choose", choose)
    expected = outputs(model, x)
    wrong: list[int] = []
    crowd = Crowd()

    def work(name: str) -> Callable[[int], None]:
        @torch.no_grad()
        def run(i: int) -> None:
            with model.use_adapter(name):
                if not is_close(model(x), expected[name]):
                    wrong.append(1)

        return run

    crowd.run([crowd.loop(work(name), 50) for name in NAMES])
    assert wrong


def test_a_change_of_the_default_is_seen_whole(model: inlay.PeftModel, x: Tensor) -> None:
    """A running forward sees the default from before `set_adapter` or from after it, never a mixture."""
    expected = outputs(model, x)
    switched = threading.Event()
    inside = threading.Event()
    second = model.base_model.model.lin1

    def pause(*args: Any) -> None:
        inside.set()
        switched.wait(1)

    hook = second.register_forward_pre_hook(pause)
    result: list[Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            result.append(model(x))

    def switch() -> None:
        model.set_adapter("b")
        switched.set()

    model.set_adapter("a")
    threads = [threading.Thread(target=forward), threading.Thread(target=switch)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    hook.remove()
    assert is_close(result[0], expected["a"]) or is_close(result[0], expected["b"])
    with torch.no_grad():
        close(model(x), expected["b"])


def test_a_thread_starts_with_the_default(model: inlay.PeftModel, x: Tensor) -> None:
    expected = outputs(model, x)
    with ThreadPoolExecutor(1) as pool, torch.no_grad(), model.use_adapter("b"):
        close(pool.submit(torch.no_grad()(model), x).result(), expected["a"])
        close(model(x), expected["b"])


def test_the_choice_holds_in_backward_of_another_thread(model: inlay.PeftModel, x: Tensor) -> None:
    model.train()
    model.set_requires_grad(list(NAMES))
    with model.use_adapter("b"):
        expected = gradients(model, model(x))
        out = model(x)
    model.zero_grad(set_to_none=True)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(gradients, model, out).result()
    close_all(found, expected)
    assert all(".b" in name for name in found)


# ---------------------------------------------------------------- tasks


def _tasks(model: inlay.PeftModel, x: Tensor, call: Callable[[Tensor], Tensor]) -> int:
    expected = outputs(model, x)
    wrong = 0

    async def task(name: str | None) -> None:
        nonlocal wrong
        for _ in range(20):
            with choice(model, name):
                await asyncio.sleep(0)
                with torch.no_grad():
                    wrong += not is_close(call(x), expected[name])
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(task(name) for name in (None, *NAMES, "b", "a")))

    asyncio.run(main())
    return wrong


@pytest.mark.parametrize("inner", [False, True], ids=["through the handle", "of the model inside"])
def test_tasks(model: inlay.PeftModel, x: Tensor, inner: bool) -> None:
    assert _tasks(model, x, model.base_model.model if inner else model) == 0


def test_tasks_of_a_loop_that_runs_inside_a_choice(model: inlay.PeftModel, x: Tensor) -> None:
    with model.use_adapter("c"):
        assert _tasks(model, x, model) == 0


def test_a_task_inherits_the_choice_it_was_started_under(model: inlay.PeftModel, x: Tensor) -> None:
    expected = outputs(model, x)

    @torch.no_grad()
    async def child() -> Tensor:
        await asyncio.sleep(0)
        out: Tensor = model(x)
        return out

    async def main() -> tuple[Tensor, Tensor]:
        with model.use_adapter("b"):
            task = asyncio.create_task(child())
            thread = asyncio.create_task(asyncio.to_thread(torch.no_grad()(model), x))
        return await task, await thread

    for out in asyncio.run(main()):
        close(out, expected["b"])


# ---------------------------------------------------------------- choices


def test_choices_nest(model: inlay.PeftModel, x: Tensor) -> None:
    expected = outputs(model, x)
    with torch.no_grad():
        with model.use_adapter("b"):
            close(model(x), expected["b"])
            with model.disable_adapter():
                close(model(x), expected[None])
                with model.use_adapter("c"):
                    close(model(x), expected["c"])
                close(model(x), expected[None])
            close(model(x), expected["b"])
        close(model(x), expected["a"])


def test_direct_calls_of_the_model_inside_follow_the_choice(model: inlay.PeftModel, x: Tensor) -> None:
    expected = outputs(model, x)
    inner = model.get_base_model()
    with torch.no_grad():
        for name in (None, *NAMES):
            with choice(model, name):
                close(inner(x), expected[name])
        close(inner(x), expected["a"])


def test_set_adapter_is_for_all_threads(model: inlay.PeftModel, x: Tensor) -> None:
    expected = outputs(model, x)
    with ThreadPoolExecutor(1) as pool:
        forward = torch.no_grad()(model)
        close(pool.submit(forward, x).result(), expected["a"])
        model.set_adapter("b")
        close(pool.submit(forward, x).result(), expected["b"])
        pool.submit(model.set_adapter, "c").result()
    close(forward(x), expected["c"])


def test_two_models_in_one_thread(model: inlay.PeftModel, mlp: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(model)
    expected = outputs(model, x)
    with torch.no_grad(), model.use_adapter("b"):
        close(other(x), expected["a"])
        with other.use_adapter("c"):
            close(model(x), expected["b"])
            close(other(x), expected["c"])
            with model.disable_adapter():
                close(other(x), expected["c"])
        close(other(x), expected["a"])
        close(other(x, adapter_names=["c"] * 4), expected["c"])
        close(model(x), expected["b"])


def test_a_model_inside_a_model(model: inlay.PeftModel, x: Tensor) -> None:
    """One adapted model calls another in its forward: each follows its own choice."""
    inner = copy.deepcopy(model)
    expected = outputs(model, x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = inner(x)
            return out

    outer = adapted(Outer(), target_modules=["first"])
    with torch.no_grad(), outer.use_adapter("b"):
        close(outer(x), expected["a"])
        with inner.use_adapter("c"):
            close(outer(x), expected["c"])


def test_unknown_names(model: inlay.PeftModel, x: Tensor) -> None:
    for enter in (lambda: model.use_adapter("nope"), lambda: model.use_adapter(["a", "nope"])):
        with pytest.raises(UnknownAdapterError, match="nope"), enter():
            pass
    with pytest.raises(UnknownAdapterError, match="nope"):
        model(x, adapter_names=["a", "nope", "a", "a"])
    with pytest.raises(UnknownAdapterError, match="nope"):
        model.set_adapter("nope")
    for none in (3, [["a"]] * 4, [None] * 4):
        with pytest.raises(RowsError, match="one name per row"):
            model(x, adapter_names=none)


def test_a_chosen_adapter_that_is_deleted_is_not_the_base(model: inlay.PeftModel, x: Tensor) -> None:
    with model.use_adapter("b"):
        model.delete_adapter("b")
        with pytest.raises(UnknownAdapterError, match="Adapter b does not exist"):
            model(x)


def _raise(*args: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("how", ["default", "chosen", "rows", "checkpointed"])
def test_an_exception_in_a_forward_leaves_no_trace(model: inlay.PeftModel, x: Tensor, how: str) -> None:
    expected = outputs(model, x)
    hook = model.base_model.model.lin1.register_forward_pre_hook(_raise)
    calls: dict[str, Callable[[], Any]] = {
        "default": lambda: model(x),
        "rows": lambda: model(x, adapter_names=["b"] * 4),
        "checkpointed": lambda: checkpoint(model.bind(model), x, use_reentrant=False),
    }

    def chosen() -> None:
        with model.use_adapter("b"):
            model(x)

    with pytest.raises(ZeroDivisionError):
        calls.get(how, chosen)()
    hook.remove()
    with torch.no_grad():
        close(model(x), expected["a"])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model.merge_adapter).result(timeout=10)
        pool.submit(model.unmerge_adapter).result(timeout=10)
        pool.submit(model.delete_adapter, "b").result(timeout=10)
    with torch.no_grad():
        close(model(x), expected["a"])


def test_an_exception_in_a_task_leaves_no_trace(model: inlay.PeftModel, x: Tensor) -> None:
    async def main() -> None:
        with model.use_adapter("b"):
            await asyncio.sleep(0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    with torch.no_grad():
        close(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("write", ["merge_adapter", "unmerge_adapter", "unload", "delete", "load"])
def test_writes_from_inside_a_forward_are_refused(
    model: inlay.PeftModel, x: Tensor, write: str, tmp_path: Path
) -> None:
    model.save_pretrained(str(tmp_path))
    if write == "unmerge_adapter":
        model.merge_adapter()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verbs: dict[str, Callable[[], Any]] = {
        "delete": lambda: model.delete_adapter("b"),
        "load": lambda: model.load_adapter(str(tmp_path / "b"), "new"),
    }
    verb = verbs.get(write, lambda: getattr(model, write)())

    def hook(*args: Any) -> None:
        verb()

    handle = model.base_model.model.lin1.register_forward_pre_hook(hook)
    with torch.no_grad(), pytest.raises(BusyError):
        model(x)
    handle.remove()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    verb()


def test_a_writer_waits_and_is_not_starved(model: inlay.PeftModel, x: Tensor) -> None:
    crowd = Crowd()
    merged = threading.Event()

    @torch.no_grad()
    def forward() -> None:
        model(x)

    def merge() -> None:
        model.merge_adapter()
        merged.set()

    crowd.run([merge], beside=[forward] * 4)
    assert merged.is_set()


def _slow(model: inlay.PeftModel, seconds: float) -> None:
    model.base_model.model.lin1.register_forward_pre_hook(lambda *args: time.sleep(seconds))


def test_a_writer_is_not_starved_by_calls_longer_than_its_head_start(model: inlay.PeftModel, x: Tensor) -> None:
    length = 4 * routing.PATIENCE
    _slow(model, length)
    crowd = Crowd()
    waited: list[float] = []

    @torch.no_grad()
    def forward() -> None:
        model(x)

    def merge() -> None:
        time.sleep(length)
        for write in (model.merge_adapter, model.unmerge_adapter):
            began = time.monotonic()
            write()
            waited.append(time.monotonic() - began)

    def stagger(i: int) -> Callable[[], None]:
        first = iter([i * length / 6])

        def work() -> None:
            time.sleep(next(first, 0.0))
            forward()

        return work

    crowd.run([merge], beside=[stagger(i) for i in range(6)])
    assert max(waited) < 6 * length  # four times, and a loaded machine


@pytest.mark.parametrize("calls", [1, 8])
def test_a_forward_that_waits_for_another_threads_while_a_write_waits(
    model: inlay.PeftModel, x: Tensor, calls: int
) -> None:
    """A pipeline: neither the calls nor the write wait for ever."""
    expected = outputs(model, x)
    found: list[Tensor] = []
    inside, writing = threading.Event(), threading.Event()
    me = threading.get_ident()

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as writer:

        def wait_for_others(*args: Any) -> None:
            if threading.get_ident() == me:
                inside.set()
                writing.wait(5)
                time.sleep(0.05)
                for _ in range(calls):
                    found.append(pool.submit(torch.no_grad()(model), x).result(timeout=20))

        hook = model.base_model.model.lin1.register_forward_pre_hook(wait_for_others)

        def merge() -> None:
            inside.wait(5)
            writing.set()
            model.merge_adapter(["b"])

        done = writer.submit(merge)
        with torch.no_grad():
            found.append(model(x))
        done.result(timeout=20)
        hook.remove()
    assert len(found) == calls + 1
    assert all(is_close(out, expected["a"]) for out in found)
    with torch.no_grad():
        close(model(x), expected["b"])


# ---------------------------------------------------------------- rows


def test_rows_train_only_their_own(model: inlay.PeftModel, x: Tensor) -> None:
    model.train()
    model.set_requires_grad(list(NAMES))
    found = gradients(model, model(x, adapter_names=["b", "b", "__base__", "b"]))
    assert found
    assert all(".b" in name for name in found)
    found = gradients(model, model(x, adapter_names=["b", "c", "__base__", "a"]))
    assert {n for n in NAMES for key in found if f".{n}." in key} == set(NAMES)


def test_rows_of_one_adapter_are_that_adapter(model: inlay.PeftModel, x: Tensor) -> None:
    expected = outputs(model, x)
    with torch.no_grad():
        for name in NAMES:
            close(model(x, adapter_names=[name] * 4), expected[name])
        close(model(x, adapter_names=["__base__"] * 4), expected[None])
        with model.use_adapter("b"):  # the call's own choice wins, for this call
            close(model(x, adapter_names=["c"] * 4), expected["c"])
            close(model(x), expected["b"])
        with model.disable_adapter():
            close(model(x, adapter_names=["c"] * 4), expected["c"])
        close(model(x), expected["a"])


def test_rows_after_an_adapter_changed(model: inlay.PeftModel, x: Tensor) -> None:
    """Stacked factors are remembered between calls; no change of an adapter may be missed."""
    names = ["a", "b", "a", "b"]

    @torch.no_grad()
    def check() -> None:
        with model.use_adapter("a"):
            one = model(x)
        with model.use_adapter("b"):
            other = model(x)
        close(model(x, adapter_names=names), torch.stack([one[0], other[1], one[2], other[3]]))

    layer = model.base_model.model.lin0
    check()
    with torch.no_grad():
        layer.lora_A.a.weight.mul_(2)
    check()
    with torch.no_grad():
        layer.lora_B.b.weight.copy_(torch.randn(20, 3))
    check()
    layer.set_scale("a", 3.0)
    check()
    layer.scaling["b"] = 0.25
    check()
    layer.scale_layer(2.0)
    check()
    layer.unscale_layer()
    check()
    layer.lora_B.b.weight = nn.Parameter(torch.randn(20, 3))
    check()
    model.delete_adapter("b")
    model.add_adapter("b", inlay.LoraConfig(r=5, target_modules=["lin0", "lin1"], init_lora_weights=False))
    check()
    model.double().float()
    check()


def test_what_inference_mode_remembers_serves_training_too(model: inlay.PeftModel, x: Tensor) -> None:
    model.set_requires_grad(list(NAMES), False)
    names = ["a", "b", "c", "b"]
    with torch.inference_mode():
        expected = model(x, adapter_names=names).clone()
    x.requires_grad_()
    out = model(x, adapter_names=names)
    close(out, expected)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("names", [[], ["a"], ["a"] * 3, ["a"] * 5, "aaaa"], ids=str)
def test_rows_of_the_wrong_number(model: inlay.PeftModel, x: Tensor, names: Any) -> None:
    with pytest.raises(RowsError, match="adapter_names"):
        model(x, adapter_names=names)
    with pytest.raises(RowsError, match="adapter_names"):
        model.generate(x, adapter_names=names)


class Folds(nn.Module):
    """As OPT has it: batch and tokens are folded before the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.folded = nn.Linear(6, 6)

    def forward(self, x_BTI: Tensor) -> Tensor:
        h = self.first(x_BTI)
        out: Tensor = self.folded(h.reshape(-1, 6)).view(h.shape)
        return out


def test_a_module_that_folds_the_batch_is_named() -> None:
    model = adapted(Folds(), target_modules=["first", "folded"])
    x = torch.randn(3, 4, 6)
    with pytest.raises(RowsError, match="folded"):
        model(x, adapter_names=["a", "b", "c"])
    with model.use_adapter("b"):
        differs(model, x, Folds()(x))
    unfolded = adapted(Folds(), target_modules=["first"])
    with unfolded.use_adapter("b"):
        expected = unfolded(x)
    close(unfolded(x, adapter_names=["b", "a", "a"])[:1], expected[:1])


def test_rows_reach_modules_to_save_and_tokens(tiny: Tiny, tokens_BT: Tensor) -> None:
    base = tiny("bert")
    with torch.no_grad():
        frozen = base(tokens_BT).logits
    token = int(tokens_BT[0, 0])
    fields = {"target_modules": ["query"], "modules_to_save": ["classifier"], "use_dora": False}
    model = adapted(base, ("a", "b"), **fields)
    model.add_adapter("t", inlay.LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[token]))
    disturb(model)
    model.eval()
    with torch.no_grad():
        for name in ("a", "b"):
            for p in model.base_model.model.classifier.modules_to_save[name].parameters():
                p.add_(torch.randn(p.shape))
        names = ["t", "b", "__base__"]
        expected = []
        for i, name in enumerate(names):
            with choice(model, None if name == "__base__" else name):
                expected.append(model(tokens_BT[i : i + 1]).logits)
        found = model(tokens_BT, adapter_names=names).logits
        close(found, torch.cat(expected))
        close(found[2:], frozen[2:])
        assert float((found[:2] - frozen[:2]).abs().amin()) > 1e-4
        with model.use_adapter("b"):
            close(model(tokens_BT, adapter_names=["a"] * 3).logits, model(tokens_BT, adapter_names=["a"] * 3).logits)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.filterwarnings("ignore:.*generation flags.*")
def test_generate_with_rows(tiny: Tiny, tokens_BT: Tensor, name: str, beams: int) -> None:
    model = adapted(tiny(name), target_modules=TARGETS[name]).eval()
    with torch.no_grad():
        for p in (p for n, p in model.named_parameters() if "lora_B" in n):
            p.mul_(4)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    names = ["b", "__base__", "c"]
    expected = []
    for i, each in enumerate(names):
        with choice(model, None if each == "__base__" else each):
            row = tokens_BT[i : i + 1]
            expected.append(model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings))
    found = model.generate(
        input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), adapter_names=names, **settings
    )
    same_bits(found, torch.cat(expected))
    same = model.generate(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), **settings)
    assert not torch.equal(same, found)


def test_generate_returns_several_sequences_by_row(tiny: Tiny, tokens_BT: Tensor) -> None:
    model = adapted(tiny("llama"), target_modules=TARGETS["llama"]).eval()
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 4, "num_return_sequences": 2}
    both = model.generate(
        input_ids=tokens_BT[:2], attention_mask=torch.ones(2, 7), adapter_names=["b", "c"], **settings
    )
    with model.use_adapter("c"):
        one = model.generate(input_ids=tokens_BT[1:2], attention_mask=torch.ones(1, 7), **settings)
    same_bits(both[2:], one)


# ---------------------------------------------------------------- computed again in backward


def recompute(model: inlay.PeftModel, reentrant: bool) -> None:
    """transformers' own gradient checkpointing, under its old name, which every version has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


def _loss(model: Any, tokens_BT: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens_BT, labels=tokens_BT).loss
    return loss


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("how", ["used", "rows", "default", "disabled for others"])
def test_checkpointing_of_transformers(tiny: Tiny, tokens_BT: Tensor, reentrant: bool, how: str) -> None:
    def make() -> inlay.PeftModel:
        torch.manual_seed(5)
        model = adapted(tiny("llama"), target_modules=TARGETS["llama"]).train()
        model.set_requires_grad(list(NAMES))
        return model

    def run(model: inlay.PeftModel) -> dict[str, Tensor]:
        if how == "used":
            with model.use_adapter("b"):
                loss = _loss(model, tokens_BT)
        elif how == "rows":
            loss = model(input_ids=tokens_BT, labels=tokens_BT, adapter_names=["c", "__base__", "b"]).loss
        else:
            if how == "disabled for others":  # something else was chosen with gradients before
                with model.use_adapter("c"):
                    _loss(model, tokens_BT)
            loss = _loss(model, tokens_BT)
            with model.use_adapter("b"):
                loss.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stored = run(make())
    recomputing = make()
    recompute(recomputing, reentrant)
    close_all(run(recomputing), stored)
    wanted = {"used": {"b"}, "rows": {"b", "c"}}.get(how, {"a"})
    assert {n for n in NAMES for key in stored if f".{n}." in key} == wanted


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_bind_carries_the_choice(model: inlay.PeftModel, x: Tensor, reentrant: bool) -> None:
    model.train()
    model.set_requires_grad(list(NAMES))
    x.requires_grad_()
    inner = model.base_model.model
    for function in (model, inner):
        with model.use_adapter("b"):
            expected = gradients(model, function(x))
            out = checkpoint(model.bind(function), x, use_reentrant=reentrant)
        with model.use_adapter("c"):
            close_all(gradients(model, out), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("handle", [True, False], ids=["the handle", "the model inside"])
def test_bind_carries_the_default(model: inlay.PeftModel, x: Tensor, reentrant: bool, handle: bool) -> None:
    """With no choice made, what is computed again in backward is the default too, whatever is chosen there."""
    model.train()
    model.set_requires_grad(list(NAMES))
    x.requires_grad_()
    function = model if handle else model.base_model.model
    with model.use_adapter("b"):
        model(x)  # from now on, routing may be lost
    expected = gradients(model, model(x))
    out = checkpoint(model.bind(function), x, use_reentrant=reentrant)
    close_all(gradients(model, out), expected)
    out = checkpoint(model.bind(function), x, use_reentrant=reentrant)
    with model.use_adapter("c"):
        close_all(gradients(model, out), expected)


def test_lost_routing_is_an_error(model: inlay.PeftModel, x: Tensor) -> None:
    model.train()
    model.set_requires_grad(list(NAMES))
    x.requires_grad_()
    with model.use_adapter("b"):
        out = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(LostRoutingError, match="bind"):
        out.sum().backward()
    with model.use_adapter("b"):
        out = checkpoint(model, x, use_reentrant=True)
        out.sum().backward()


Change = Callable[[inlay.PeftModel], Any]

CHANGES: dict[str, Change] = {  # of the default, after a forward
    "another": lambda m: m.set_adapter("b"),
    "several": lambda m: m.set_adapter(["b", "a"]),
    "of the tuner": lambda m: m.base_model.set_adapter("c"),
    "of a layer": lambda m: next(layer for _, layer in m.base_model.layers()).set_adapter("b"),
    "off": lambda m: m.base_model.disable_adapter_layers(),
    "twice": lambda m: (m.set_adapter("b"), m.bind(m), m.base_model.disable_adapter_layers(), m.set_adapter("c")),
    "there and back": lambda m: (m.set_adapter("b"), m.set_adapter("a")),
    "more adapters": lambda m: (
        m.add_adapter("d", inlay.LoraConfig(r=1, target_modules=".*(lin|_proj).*")),
        m.set_adapter("d"),
    ),
}


def _gradients_after(model: inlay.PeftModel, out: Tensor, change: Change) -> dict[str, Tensor]:
    """As `gradients`, with the default changed between forward and backward, and all adapters trained."""
    change(model)
    model.set_requires_grad(list(model.peft_config))
    return gradients(model, out)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("how", CHANGES)
def test_recomputation_follows_the_default_of_its_forward(
    mlp: nn.Module, x: Tensor, reentrant: bool, how: str
) -> None:
    first = adapted(mlp, target_modules=TARGETS["mlp"]).train()
    first.set_requires_grad(list(NAMES))
    first.base_model.model.lin1.set_adapter("c")  # a layer with a default of its own
    first.set_requires_grad(list(NAMES))
    x.requires_grad_()
    for handle in (True, False):
        stored, again = copy.deepcopy(first), copy.deepcopy(first)
        functions = [m if handle else m.base_model.model for m in (stored, again)]
        expected = _gradients_after(stored, functions[0](x), CHANGES[how])
        out = checkpoint(again.bind(functions[1]), x, use_reentrant=reentrant)
        close_all(_gradients_after(again, out, CHANGES[how]), expected)
        assert any(".a." in key for key in expected)
        assert any("lin1" in key and ".c." in key for key in expected)
        with torch.no_grad():
            close(again(x), stored(x))  # and what comes after follows the new one


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("how", CHANGES)
def test_transformers_recompute_the_default_of_the_forward(
    tiny: Tiny, tokens_BT: Tensor, reentrant: bool, how: str
) -> None:
    def run(recomputing: bool) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model = adapted(tiny("llama"), target_modules=TARGETS["llama"]).train()
        model.set_requires_grad(list(NAMES))
        if recomputing:
            recompute(model, reentrant)
        return _gradients_after(model, _loss(model, tokens_BT), CHANGES[how])

    expected = run(False)
    close_all(run(True), expected)
    assert {n for n in "abcd" for key in expected if f".{n}." in key} == {"a"}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputation_follows_the_default_copy(mlp: nn.Module, x: Tensor, reentrant: bool) -> None:
    """Of a module that is trained whole."""
    fields = {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "use_dora": False}
    again = adapted(mlp, ("a", "b"), **fields).train()
    stored = copy.deepcopy(again)
    x.requires_grad_()
    for change in (CHANGES["another"], CHANGES["off"]):
        out = checkpoint(again.bind(again), x, use_reentrant=reentrant)
        expected = _gradients_after(stored, stored(x), change)
        close_all(_gradients_after(again, out, change), expected)
        assert any("lin1" in key for key in expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("chosen", [False, True], ids=["default", "chosen"])
@pytest.mark.parametrize("write", ["delete", "delete and add", "merge", "unmerge"])
def test_what_cannot_be_computed_again_is_an_error(
    model: inlay.PeftModel, x: Tensor, reentrant: bool, chosen: bool, write: str
) -> None:
    """The adapter of the forward is deleted, merged or unmerged before backward."""
    model.train()
    x.requires_grad_()
    model.set_adapter("b")
    if write == "unmerge":
        model.merge_adapter(["b"])
    with model.use_adapter("b") if chosen else nullcontext():
        out = checkpoint(model.bind(model), x, use_reentrant=reentrant)
        bound = model.bind(model)
    model.set_adapter("a") if write.startswith("delete") else None
    if write == "merge":
        model.merge_adapter(["b"])
    elif write == "unmerge":
        model.unmerge_adapter()
    else:
        model.delete_adapter("b")
        if write == "delete and add":
            model.add_adapter("b", inlay.LoraConfig(r=3, target_modules=TARGETS["mlp"]))
    with pytest.raises(LostRoutingError, match="'b'"):
        out.sum().backward()
    if "merge" in write:  # only what is in backward must be as it was
        with torch.no_grad():
            close(bound(x), model(x) if not chosen else bound(x))


def test_moments_of_the_default_are_forgotten(model: inlay.PeftModel, x: Tensor) -> None:
    model.train()
    x.requires_grad_()
    router = model.base_model.router
    for name in ("a", "b", "a", "b"):
        model.set_adapter(name)
        checkpoint(model.bind(model), x, use_reentrant=False).sum().backward()
    gc.collect()
    assert router._moment is None or router._moment() is None


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_routing_is_lost_only_where_it_was(model: inlay.PeftModel, x: Tensor, reentrant: bool) -> None:
    """Beside routed graphs and after them, plain checkpoints need no binding; routed ones do, whenever they run."""
    model.train()
    model.set_requires_grad(list(NAMES))
    x.requires_grad_()
    inner = model.base_model.model
    expected = gradients(model, inner(x))

    def plain(function: Any = model) -> Tensor:
        out: Tensor = checkpoint(function, x, use_reentrant=reentrant)
        return out

    with model.use_adapter("b"):
        gradients(model, model(x))
    close_all(gradients(model, plain()), expected)
    with model.use_adapter("b"), torch.no_grad():
        model(x)
    close_all(gradients(model, plain(inner)), expected)
    with model.use_adapter("b"):
        stored, bound, lost = model(x), plain(model.bind(inner)), plain(inner)
    before = plain()
    with model.disable_adapter():
        also_lost = plain()
    rows = model(x, adapter_names=["b", "c", "b", "__base__"])
    close_all(gradients(model, plain(inner)), expected)
    close_all(gradients(model, before), expected)
    for out in (lost, also_lost):
        with pytest.raises(LostRoutingError, match="bind"):
            out.sum().backward()
    close_all(gradients(model, stored), gradients(model, bound))
    gradients(model, rows)
    close_all(gradients(model, plain()), expected)


def test_many_routed_forwards_do_not_hide_a_lost_one(model: inlay.PeftModel, x: Tensor) -> None:
    model.train()
    x.requires_grad_()
    with model.use_adapter("b"):
        lost = checkpoint(model, x, use_reentrant=True)
    for _ in range(600):
        with model.use_adapter("b"):
            model(x)
    assert len(model.base_model.router._routed._closed) < 600
    with pytest.raises(LostRoutingError, match="bind"):
        lost.sum().backward()
    checkpoint(model, x, use_reentrant=True).sum().backward()


@pytest.mark.parametrize("handle", [True, False], ids=["the handle", "the model inside"])
def test_a_choice_carried_to_another_thread_can_be_lost(model: inlay.PeftModel, x: Tensor, handle: bool) -> None:
    """The times of a thread are not known that did not make the choice."""
    model.train()
    x.requires_grad_()

    def run() -> Tensor:
        function = model if handle else model.base_model.model
        out: Tensor = checkpoint(function, x, use_reentrant=True)
        return out

    async def main() -> Tensor:
        with model.use_adapter("b"):
            return await asyncio.to_thread(run)

    out = asyncio.run(main())
    with pytest.raises(LostRoutingError, match="bind"):
        out.sum().backward()


def test_a_backward_in_another_thread_while_the_choice_holds(model: inlay.PeftModel, x: Tensor) -> None:
    """As on a GPU, whose backward runs in a thread of its own."""
    model.train()
    x.requires_grad_()
    with model.use_adapter("b"), ThreadPoolExecutor(1) as pool:
        out = checkpoint(model, x, use_reentrant=True)
        with pytest.raises(LostRoutingError, match="bind"):
            pool.submit(out.sum().backward).result()


def test_without_any_choice_checkpointing_needs_no_binding(model: inlay.PeftModel, x: Tensor) -> None:
    model.train()
    x.requires_grad_()
    expected = gradients(model, model(x))
    for reentrant in (True, False):
        close_all(gradients(model, checkpoint(model, x, use_reentrant=reentrant)), expected)


def test_a_choice_made_after_the_forward_does_not_disturb_its_backward(tiny: Tiny, tokens_BT: Tensor) -> None:
    """Thread A trains the default with checkpointing while thread B chooses for the first time."""
    model = adapted(tiny("llama"), target_modules=TARGETS["llama"]).train()
    expected = gradients(model, model(tokens_BT).logits)
    recompute(model, reentrant=False)
    out = model(tokens_BT).logits
    with model.use_adapter("b"):
        model(tokens_BT)
    close_all(gradients(model, out), expected)


# ---------------------------------------------------------------- compiled


def test_choices_hold_in_compiled_models(model: inlay.PeftModel, x: Tensor) -> None:
    torch._dynamo.reset()
    expected = outputs(model, x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled_inner = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name in (*NAMES, None):
            with choice(model, name):
                close(compiled(x), expected[name])
                close(compiled_inner(x), expected[name])
        close(compiled(x), expected["a"])


def test_a_bound_default_holds_in_compiled_models(model: inlay.PeftModel, x: Tensor) -> None:
    torch._dynamo.reset()
    expected = outputs(model, x)
    counter = CompileCounter()
    compiled = torch.compile(model.base_model.model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(10):
            bound = model.bind(compiled)
            close(bound(x), expected["a"])
        graphs = counter.frame_count
        assert graphs == 1
        model.set_adapter("b")
        close(compiled(x), expected["b"])
        close(bound(x), expected["a"])
        close(compiled(x), expected["b"])
