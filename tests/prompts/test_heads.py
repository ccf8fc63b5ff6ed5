"""Heads of prompts and of weight methods: each has its own, and the first one named runs and is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts.batches import base, batch, disturb, handle
from torch import Tensor, nn

import inlay
from inlay.errors import AdapterNameError, NotMergeableError, UnknownAdapterError
from inlay.walk import wrappers

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
PROMPTS = ("p3", "k4")  # embeddings, and keys and values in the cache
HEADS = {
    ("bert", "SEQ_CLS"): "classifier",
    ("bert", "TOKEN_CLS"): "classifier",
    ("llama", "SEQ_CLS"): "score",
    ("llama", "TOKEN_CLS"): "score",
    ("bert", "QUESTION_ANS"): "qa_outputs",
    ("llama", "QUESTION_ANS"): "qa_outputs",
}
CELLS = [(arch, task, *names) for arch, task in HEADS for p in PROMPTS for names in (("lora", p), (p, "lora"))]
cells = pytest.mark.parametrize(("arch", "task", "first", "second"), CELLS)
bert = pytest.mark.parametrize(("arch", "task", "first", "second"), [c for c in CELLS if c[:2] == ("bert", "SEQ_CLS")])


def rows(arch: str, task: str, n: int = 3) -> dict[str, Tensor]:
    return batch(arch, task, n).inputs


def numbers(model: nn.Module, inputs: dict[str, Tensor], names: str | Sequence[str] | None = None) -> Tensor:
    """What the model says; the start and the end of an answer as one tensor."""
    with torch.no_grad():
        if isinstance(model, inlay.PeftModel) and names is not None:
            with model.use_adapter(names):
                return numbers(model, inputs)
        out = model(**inputs)
        return torch.stack([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits  # type: ignore[no-any-return]


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def differ(a: Tensor, b: Tensor) -> None:
    assert a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def two(arch: str, task: str, *names: str) -> inlay.PeftModel:
    """These adapters in one model, whatever runs together added in the order of the alphabet."""
    return handle(arch, task, *sorted(names))


def head_of(model: inlay.PeftModel) -> Any:
    (found,) = (w for path, w in wrappers(model.get_base_model()) if path in HEADS.values())
    return found


def with_head(model: inlay.PeftModel, prompt: str, head: str) -> inlay.PeftModel:
    """The same prompt, with this adapter's head, before a model into whose weights the LoRA is merged."""
    state = head_of(model).modules_to_save[head].state_dict()
    inner = copy.deepcopy(model).merge_and_unload(adapter_names=["lora"])
    alone = inlay.get_peft_model(inner, copy.deepcopy(model.peft_config[prompt]), prompt).double().eval()
    alone.prompt_encoder.load_state_dict({k: t for k, t in model.prompt_encoder.state_dict().items() if prompt in k})
    head_of(alone).modules_to_save[prompt].load_state_dict(state)
    return alone


def flags(model: nn.Module) -> dict[str, bool]:
    return {k: p.requires_grad for k, p in model.named_parameters()}


# ---------------------------------------------------------------- one at a time


@pytest.mark.parametrize(("arch", "head"), [("llama", "score"), ("bert", "classifier")])
@pytest.mark.parametrize("names", [("p3", "p5"), ("k4", "k2"), ("p3", "k4"), ("p3", "lora"), ("lora", "k4")])
def test_each_has_a_head_of_its_own(arch: str, head: str, names: tuple[str, str]) -> None:
    model, inputs, plain = handle(arch, "SEQ_CLS", *names), rows(arch, "SEQ_CLS"), base(arch, "SEQ_CLS")
    heads = getattr(model.get_base_model(), head)
    assert set(heads.modules_to_save) == set(names)
    original = numbers(plain, inputs)
    with model.disable_adapter():
        equal(numbers(model, inputs), original)
    for name in names:
        model.set_adapter(name)
        expected = numbers(model, inputs)
        assert all(p.requires_grad == (n == name) for n in names for p in heads.modules_to_save[n].parameters())
        with torch.no_grad():
            for n in names:
                if n != name:
                    heads.modules_to_save[n].weight.add_(1)
            equal(numbers(model, inputs), expected)
            heads.modules_to_save[name].weight.add_(1)
            differ(numbers(model, inputs), expected)
        model(**inputs).loss.backward()
        assert all((p.grad is not None) == (n == name) for n in names for p in heads.modules_to_save[n].parameters())
        model.zero_grad()
    with model.disable_adapter():
        equal(numbers(model, inputs), original)


def test_each_is_saved_and_loaded(tmp_path: Path) -> None:
    model, inputs = handle("bert", "SEQ_CLS", "p3", "k4"), rows("bert", "SEQ_CLS")
    model.save_pretrained(tmp_path)
    loaded = inlay.PeftModel.from_pretrained(base("bert", "SEQ_CLS"), tmp_path / "p3", "p3")
    loaded.load_adapter(tmp_path / "k4", "k4")
    for name in ("p3", "k4"):
        torch.testing.assert_close(numbers(loaded, inputs, name), numbers(model, inputs, name), rtol=1e-4, atol=1e-4)
    with loaded.disable_adapter():
        equal(numbers(loaded, inputs), numbers(base("bert", "SEQ_CLS"), inputs))


# ---------------------------------------------------------------- a prompt and a LoRA together


@cells
def test_the_first_one_named_runs(arch: str, task: str, first: str, second: str) -> None:
    model, inputs, names = two(arch, task, first, second), rows(arch, task), [first, second]
    prompt = first if second == "lora" else second
    expected = numbers(with_head(model, prompt, first), inputs)
    differ(numbers(with_head(model, prompt, second), inputs), expected)
    for alone in names:
        model.set_adapter(alone)
        differ(numbers(model, inputs), expected)
        equal(numbers(model, inputs, names), expected)
        for verb in (model.set_adapter, model.base_model.set_adapter):
            verb(names)
            assert model.active_adapters == names
            equal(numbers(model, inputs), expected)
    model.set_adapter([second, first])
    equal(numbers(model, inputs), numbers(with_head(model, prompt, second), inputs))
    equal(numbers(model, inputs, names), expected)


@cells
def test_a_step_changes_both_and_the_first_ones_head(arch: str, task: str, first: str, second: str) -> None:
    model, inputs, names = two(arch, task, first, second), rows(arch, task), [first, second]
    original = base(arch, task).state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # with decay: a gradient of zero would do
    # What was trained before is not any more; the second one's head was, first alone and then together.
    for before in (second, first, [second, first]):
        model.set_adapter(before)
        model.set_adapter(names)
        state = {k: t.clone() for k, t in model.state_dict().items()}
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        changed = {k for k, t in model.state_dict().items() if not torch.equal(t, state[k])}
        own = {k for k in state if "lora_" in k or "prompt_encoder" in k or f".modules_to_save.{first}." in k}
        assert changed == own == {k for k, trained in flags(model).items() if trained}
    bare = copy.deepcopy(model).unload().state_dict()
    assert all(torch.equal(t, original[k]) for k, t in bare.items())


@cells
def test_each_alone_is_what_it_was(arch: str, task: str, first: str, second: str) -> None:
    model, inputs, names = two(arch, task, first, second), rows(arch, task), [first, second]
    expected = {n: numbers(model, inputs, n) for n in names}
    plain = numbers(base(arch, task), inputs)
    model.set_adapter(names)
    both = numbers(model, inputs)
    for name in names:
        equal(numbers(model, inputs, name), expected[name])
    with model.disable_adapter():
        equal(numbers(model, inputs), plain)
    equal(numbers(model, inputs), both)
    model.base_model.disable_adapter_layers()
    equal(numbers(model, inputs), plain)
    assert not any(flags(model).values())
    model.base_model.enable_adapter_layers()
    equal(numbers(model, inputs), both)
    heads = head_of(model).modules_to_save
    assert [all(p.requires_grad for p in heads[n].parameters()) for n in names] == [True, False]
    model.set_adapter(names, inference_mode=True)
    assert not any(flags(model).values())
    model.set_requires_grad(second)
    assert [any(p.requires_grad for p in heads[n].parameters()) for n in names] == [False, True]
    for name in names:
        model.set_adapter(name)
        equal(numbers(model, inputs), expected[name])
        assert [all(p.requires_grad for p in heads[n].parameters()) for n in names] == [n == name for n in names]


@cells
def test_they_are_saved_and_loaded(arch: str, task: str, first: str, second: str, tmp_path: Path) -> None:
    model, inputs, names = two(arch, task, first, second), rows(arch, task), [first, second]
    model.set_adapter(names)
    model(**inputs).loss.backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    model.save_pretrained(tmp_path)
    choices: tuple[Any, ...] = (first, second, names, [second, first])
    for order in (names, names[::-1]):
        loaded = inlay.PeftModel.from_pretrained(base(arch, task), tmp_path / order[0], order[0])
        loaded.load_adapter(tmp_path / order[1], order[1])
        for choice in choices:
            for found in (numbers(loaded, inputs, choice), _set(loaded, choice, inputs)):
                torch.testing.assert_close(found, numbers(model, inputs, choice), rtol=1e-5, atol=1e-5)
    for name in names:
        alone = inlay.PeftModel.from_pretrained(base(arch, task), tmp_path / name)
        torch.testing.assert_close(numbers(alone, inputs), numbers(model, inputs, name), rtol=1e-5, atol=1e-5)


def _set(model: inlay.PeftModel, names: Any, inputs: dict[str, Tensor]) -> Tensor:
    model.set_adapter(names)
    return numbers(model, inputs)


@bert
def test_rows_have_their_own(arch: str, task: str, first: str, second: str) -> None:
    model, inputs = two(arch, task, first, second), rows(arch, task)
    names = [second, "__base__", first]
    expected = model(**inputs, adapter_names=names).logits
    for i, name in enumerate(names):
        with model.use_adapter(name) if name != "__base__" else model.disable_adapter():
            equal(expected[i : i + 1], model(**{k: t[i : i + 1] for k, t in inputs.items()}).logits)
    model.set_adapter([first, second])
    equal(model(**inputs, adapter_names=names).logits, expected)
    equal(model(**inputs, adapter_names=["__base__"] * 3).logits, base(arch, task)(**inputs).logits)


@bert
def test_no_thread_gets_anothers(arch: str, task: str, first: str, second: str) -> None:
    model, inputs = two(arch, task, first, second), rows(arch, task)
    model.set_adapter([first, second])
    choices: list[tuple[str, ...]] = [(first, second), (second, first), (first,), (second,), ()]

    def chosen(names: tuple[str, ...]) -> AbstractContextManager[None]:
        return model.use_adapter(names) if names else model.disable_adapter()

    expected = []
    for names in choices:
        with chosen(names):
            expected.append(numbers(model, inputs))
    assert all(not torch.allclose(a, b) for i, a in enumerate(expected) for b in expected[:i])

    def work(thread: int) -> int:
        wrong = 0
        for i in range(30):
            at = (thread + i) % len(choices)
            with chosen(choices[at]):
                wrong += not torch.allclose(numbers(model, inputs), expected[at])
            wrong += not torch.allclose(numbers(model, inputs), expected[0])
        return wrong

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(work, range(5))) == [0] * 5


@bert
def test_training_one_while_another_thread_uses_the_other(arch: str, task: str, first: str, second: str) -> None:
    model, inputs = two(arch, task, first, second), rows(arch, task)
    model.set_adapter([first, second])
    reference = copy.deepcopy(model)
    expected = numbers(model, inputs, second)  # its tensors: not changed, as the first alone is trained
    model.set_adapter(first)

    def use(_: int) -> int:
        return sum(not torch.allclose(numbers(model, inputs, second), expected) for _ in range(30))

    def train(trained: inlay.PeftModel) -> None:
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.01)
        for _ in range(15):
            optimizer.zero_grad()
            trained(**inputs).loss.backward()
            optimizer.step()

    with ThreadPoolExecutor(3) as pool:
        counts = pool.map(use, range(2))
        pool.submit(train, model).result()
        assert list(counts) == [0, 0]
    reference.set_adapter(first)
    train(reference)
    equal(numbers(model, inputs, first), numbers(reference, inputs, first))


@bert
def test_deleting_one(arch: str, task: str, first: str, second: str) -> None:
    model, inputs = two(arch, task, first, second), rows(arch, task)
    for deleted, left in ((first, second), (second, first)):
        one = copy.deepcopy(model)
        one.set_adapter([first, second])
        expected = numbers(one, inputs, left)
        one.delete_adapter(deleted)
        assert one.active_adapters == [left]
        equal(numbers(one, inputs), expected)
        assert list(head_of(one).modules_to_save) == [left]
        assert all(p.requires_grad for p in head_of(one).modules_to_save[left].parameters())


@bert
def test_merging(arch: str, task: str, first: str, second: str) -> None:
    model, inputs = two(arch, task, first, second), rows(arch, task)
    model.set_adapter([first, second])
    expected, trained = numbers(model, inputs), flags(model)
    model.merge_adapter()
    equal(numbers(model, inputs), expected)
    model.unmerge_adapter()
    for names in (None, [first, second], [second, first]):
        with pytest.raises(NotMergeableError, match="is a prompt before the input"):
            model.merge_and_unload(adapter_names=names)
    assert flags(model) == trained
    equal(numbers(model, inputs), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("names", [["lora", "p3"], ["p3", "lora"]], ids="-".join)
def test_gradient_checkpointing(names: list[str]) -> None:
    model, inputs = two("bert", "SEQ_CLS", *names), rows("bert", "SEQ_CLS")
    model.set_adapter(names)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).loss.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    found = gradients()
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key])


@bert
def test_bad_names_change_nothing(arch: str, task: str, first: str, second: str) -> None:
    model, inputs = two(arch, task, first, second), rows(arch, task)
    model.set_adapter([second, first])
    before, trained = numbers(model, inputs), flags(model)
    wrong: list[tuple[Any, type[Exception]]] = [
        ([first, "nobody"], UnknownAdapterError),
        (["nobody", second], UnknownAdapterError),
        ([first, "__base__"], UnknownAdapterError),
        (3, AdapterNameError),
        ([first, 3], AdapterNameError),
        ([[first, second]], AdapterNameError),
        (None, AdapterNameError),
    ]
    for names, error in wrong:
        for verb in (model.set_adapter, model.base_model.set_adapter, _used(model)):
            with pytest.raises(error):
                verb(names)
            assert model.active_adapters == [second, first]
            assert flags(model) == trained
            assert torch.equal(numbers(model, inputs), before)
    model.set_adapter([first, second, first])
    equal(numbers(model, inputs), numbers(model, inputs, [first, second]))
    assert model.active_adapters == [first, second]


def _used(model: inlay.PeftModel) -> Callable[[Any], None]:
    def use(names: Any) -> None:
        with model.use_adapter(names):
            pass

    return use


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_peft_loads_each_of_what_was_trained_together(prompt: str, task: str, tmp_path: Path) -> None:
    import peft

    model, inputs = two("bert", task, "lora", prompt), rows("bert", task, 1)
    model.set_adapter([prompt, "lora"])
    model(**inputs).loss.backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    model.save_pretrained(tmp_path)
    inputs = {k: t for k, t in inputs.items() if "label" not in k and "positions" not in k and k != "token_type_ids"}
    for name in ("lora", prompt):
        theirs = peft.PeftModel.from_pretrained(base("bert", task), tmp_path / name).double().eval()
        torch.testing.assert_close(numbers(theirs, inputs), numbers(model, inputs, name), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- three


def test_one_without_a_head_leaves_it_to_the_next() -> None:
    head, inputs = {"modules_to_save": ["classifier"]}, rows("bert", "SEQ_CLS")
    model = inlay.get_peft_model(
        base("bert", "SEQ_CLS"), inlay.LoraConfig(r=2, target_modules=["query"], **head), "lora", mixed=True
    )
    model.add_adapter("bare", inlay.LoHaConfig(r=2, target_modules=["value"]))  # a mixed handle adds no heads
    model.add_adapter("p3", inlay.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, **head))
    disturb(model.double())
    model.eval()
    heads = head_of(model).modules_to_save
    for names, serving in (
        (["bare", "p3", "lora"], "p3"),
        (["bare", "lora", "p3"], "lora"),
        (["p3", "bare"], "p3"),
        (["bare", "lora"], "lora"),
        (["bare"], None),
    ):
        model.set_adapter(names)
        trained = [n for n in heads if all(p.requires_grad for p in heads[n].parameters())]
        assert trained == ([] if serving is None else [serving])
        before = numbers(model, inputs)
        for n in heads:
            with torch.no_grad():
                heads[n].bias.add_(1)
            moved = numbers(model, inputs)
            (differ if n == serving else equal)(moved, before)
            before = moved


def test_two_prompts_and_a_lora_and_their_heads_in_turn() -> None:
    model, inputs = two("bert", "SEQ_CLS", "lora", "p3", "k4"), rows("bert", "SEQ_CLS")
    names = ["k4", "lora", "p3"]
    model.set_adapter(names)
    for _ in range(2):
        heads = head_of(model).modules_to_save
        before = numbers(model, inputs)
        with torch.no_grad():
            heads[names[0]].bias.add_(1)
        equal(numbers(model, inputs), before + 1)
        model.delete_adapter(names.pop(0))
    equal(numbers(model, inputs), numbers(model, inputs, "p3"))
