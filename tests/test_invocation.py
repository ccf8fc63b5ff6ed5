"""Activated LoRA in models: training, generation, rows, caches, threads and copies, and where it is refused."""

from __future__ import annotations

import copy
import gc
import linecache
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from by_hand import CRITIC, JUDGE, NAMES, TARGETS, ByHand, frozen, greedy, weighted
from laws import bits, close, close_all, disturb, same_bits, same_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import inlay
from inlay.errors import (
    ConfigError,
    FieldTypeError,
    LostRoutingError,
    NotMergeableError,
    PeftWarning,
    RoutingError,
    RowsError,
    UnsupportedLayerError,
)

each_model = pytest.mark.parametrize("name", NAMES)
NONE = "have no invocation"


def judge(model: nn.Module, targets: Any = None, name: str = "judge", **fields: Any) -> inlay.PeftModel:
    """A handle with one activated adapter that does something."""
    config = {"target_modules": targets, "r": 3, "alora_invocation_tokens": JUDGE, "task_type": "CAUSAL_LM", **fields}
    handle = inlay.get_peft_model(model, inlay.LoraConfig(**config), name)
    disturb(handle)
    return handle.eval()


def court(model: nn.Module, targets: Any, **fields: Any) -> inlay.PeftModel:
    """Two activated adapters with invocations of their own, the first one active, and an ordinary one."""
    handle = judge(model, targets, **fields)
    handle.add_adapter("critic", inlay.LoraConfig(r=2, target_modules=targets, alora_invocation_tokens=CRITIC))
    handle.add_adapter("plain", inlay.LoraConfig(r=2, target_modules=targets))
    disturb(handle)
    return handle


def prompts(*rows: str | Sequence[int], length: int = 12) -> Tensor:
    """Rows of random tokens from 20 on, with invocations and other given tokens at given places.

    A row is "3" (JUDGE at 3), "c3" (CRITIC at 3), "" (none); several with spaces.
    """
    ids = torch.randint(20, 64, (len(rows), length), generator=torch.Generator().manual_seed(5))
    for i, row in enumerate(rows):
        for word in row.split() if isinstance(row, str) else ():
            tokens = CRITIC if word[0] == "c" else JUDGE
            at = int(word.lstrip("c"))
            ids[i, at : at + len(tokens)] = torch.tensor(tokens)
    return ids


def padded(ids: Tensor, sizes: Sequence[int], left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask): of each row as many tokens are padding."""
    mask = torch.ones_like(ids)
    for i, n in enumerate(sizes):
        if n:
            at = slice(0, n) if left else slice(ids.shape[1] - n, None)
            ids[i, at], mask[i, at] = 0, 0
    return ids, mask


WRITE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def write(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    """What a model writes, and the scores that it writes by."""
    how = {**WRITE, "return_dict_in_generate": True, "output_logits": True, **kwargs}
    if "attention_mask" not in how and "inputs_embeds" not in how:
        how["attention_mask"] = torch.ones_like(ids)
    return model.generate(ids, **how)


def same_writing(a: Any, b: Any, tolerance: float = 1e-4) -> None:
    assert a.sequences.tolist() == b.sequences.tolist()
    close(torch.stack(a.logits), torch.stack(b.logits), tolerance)


def keys_and_values(cache: Any) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.fixture(autouse=True)
def _no_gradients_unless_asked() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---------------------------------------------------------------- outputs

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"q_proj|c_attn": 5}, "alpha_pattern": {"v_proj|c_fc": 3}},
}


@each_model
@pytest.mark.parametrize("option", OPTIONS)
def test_a_forward_is_the_one_by_hand(name: str, option: str) -> None:
    base = frozen(name)
    handle = judge(frozen(name), TARGETS[name], **OPTIONS[option])
    ids = prompts("3", "8", "1 6", "0", "")
    with pytest.warns(PeftWarning, match=f"1 rows {NONE} of the adapter 'judge'"):
        out = handle(input_ids=ids).logits
    by_hand = ByHand(base, handle, "judge")
    for i, start in enumerate([3, 8, 6, 0, None]):
        close(out[i : i + 1], by_hand.logits(ids[i : i + 1], start))
        assert start is None or float((out[i] - base(ids).logits[i]).abs().max()) > 1e-2
    same_bits(out[4], base(ids).logits[4])
    for i, start in enumerate([3, 8, 6]):
        same_bits(out[i, :start], base(ids).logits[i, :start])


@each_model
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_no_part_of_an_invocation(name: str, left: bool) -> None:
    base = frozen(name)
    handle = judge(frozen(name), TARGETS[name])
    ids, mask = padded(prompts("4", "5", "6 8"), (0, 3, 3), left)
    if left:
        ids[1, 1:3] = torch.tensor(JUDGE)  # in the padding
    else:
        ids[1, 10:12] = torch.tensor(JUDGE)
    by_hand = ByHand(base, handle, "judge")
    out = handle(input_ids=ids, attention_mask=mask).logits
    close(out, by_hand.logits(ids, 4, 5, 8 if left else 6, attention_mask=mask))
    by_position = {"gpt2": (None,)}.get(name, ())  # GPT-2 takes the cache before the mask
    same_bits(handle(ids, *by_position, mask).logits, out)


def test_one_warning_for_a_call() -> None:
    handle = court(frozen("llama", layers=5), TARGETS["llama"])
    handle.set_adapter(["judge", "critic"])
    ids = prompts("3", "c3", "")
    for call in (lambda: handle(ids), lambda: handle.generate(ids, **WRITE)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call()
        assert [w.category for w in told] == [PeftWarning]
        assert "handle" in linecache.getline(told[0].filename, told[0].lineno)  # where the call stands
        text = str(told[0].message)
        assert "2 rows have no invocation of the adapter 'judge'" in text
        assert "2 rows have no invocation of the adapter 'critic'" in text


def test_no_warning_where_no_activated_adapter_runs() -> None:
    handle = court(frozen("llama"), TARGETS["llama"])
    base = frozen("llama")
    ids = prompts("", "c3")
    with handle.use_adapter("plain"):
        handle(ids)
    with handle.disable_adapter():
        same_bits(handle(ids).logits, base(ids).logits)
    handle(ids, adapter_names=["plain", "critic"])
    handle.base_model.disable_adapter_layers()
    same_bits(handle(ids).logits, base(ids).logits)
    write(handle, ids)
    handle.base_model.enable_adapter_layers()
    with pytest.warns(PeftWarning, match=f"2 rows {NONE} of the adapter 'judge'"):
        handle(ids)


# ---------------------------------------------------------------- training


@each_model
@pytest.mark.parametrize("option", [*OPTIONS, "dropout", "dora with dropout"])
@torch.enable_grad()
def test_gradients_are_those_by_hand(name: str, option: str) -> None:
    fields = {**OPTIONS.get(option, {}), **({"lora_dropout": 0.4} if "dropout" in option else {})}
    fields |= {"use_dora": True} if option.startswith("dora") else {}
    handle = judge(frozen(name), TARGETS[name], **fields).train()
    by_hand = ByHand(frozen(name).train(), handle, "judge")
    ids, mask = padded(prompts("3", "8", "1 6"), (0, 2, 0), left=True)
    torch.manual_seed(3)
    out = handle(input_ids=ids, attention_mask=mask).logits
    torch.manual_seed(3)
    wanted = by_hand.logits(ids, 3, 8, 6, attention_mask=mask)
    close(out * mask[..., None], wanted * mask[..., None], 1e-4)
    found = torch.autograd.grad(weighted(out, mask), [p for _, p in trained(handle)])
    close_all(
        dict(zip([n for n, _ in trained(handle)], found, strict=True)),
        by_hand.gradients(weighted(wanted, mask)),
        1e-3,
    )
    assert min(float(g.abs().max()) for g in found) > 0


def trained(handle: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters by the names they have in the model."""
    found = [(n, p) for n, p in handle.named_parameters() if p.requires_grad]
    return [(n.removeprefix("base_model.model."), p) for n, p in found]


def gradients(handle: nn.Module, out: Tensor) -> dict[str, Tensor]:
    handle.zero_grad(set_to_none=True)
    weighted(out).backward()
    return {n: p.grad for n, p in handle.named_parameters() if p.grad is not None}


@torch.enable_grad()
def test_a_row_without_invocation_has_no_part_in_gradients() -> None:
    handle = judge(frozen("llama"), TARGETS["llama"]).train()
    ids = prompts("3", "")
    with pytest.warns(PeftWarning, match=NONE):
        out = handle(ids).logits
    alone = handle(ids[:1]).logits
    close_all(
        gradients(handle, torch.stack([alone[0], torch.zeros_like(alone[0])])),
        gradients(handle, out * torch.tensor([1.0, 0])[:, None, None]),
    )
    with pytest.warns(PeftWarning, match=NONE):
        out = handle(ids[1:]).logits
    assert all(float(g.abs().max()) == 0 for g in gradients(handle, out).values())


def checkpointed(handle: Any, reentrant: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that every version of transformers has
        handle.gradient_checkpointing_enable({"use_reentrant": reentrant})
    handle.enable_input_require_grads()
    return handle.train()


both_kinds = pytest.mark.parametrize("reentrant", [True, False], ids=["with re-entry", "without re-entry"])


@both_kinds
@each_model
@torch.enable_grad()
def test_checkpointing_gives_the_stored_runs_gradients(name: str, reentrant: bool) -> None:
    handle = court(frozen(name), TARGETS[name], lora_dropout=0.3).train()
    handle.set_adapter(["judge", "critic", "plain"])
    ids = prompts("3 c6", "8 c2")

    def run(choice: Callable[[], Any], after: Callable[[Tensor], Any], **kwargs: Any) -> Any:
        torch.manual_seed(7)
        with choice():
            out = handle(ids, use_cache=False, **kwargs).logits
        return after(out)

    def in_thread(out: Tensor) -> dict[str, Tensor]:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(gradients, handle, out).result()

    choices: list[tuple[Any, dict[str, Any]]] = [
        (nullcontext, {}),
        (lambda: handle.use_adapter("critic"), {}),
        (nullcontext, {"adapter_names": ["critic", "judge"]}),
        (nullcontext, {"alora_offsets": [2, 5]}),
    ]
    stored = [run(choice, lambda out: gradients(handle, out), **kwargs) for choice, kwargs in choices]
    checkpointed(handle, reentrant)
    for (choice, kwargs), wanted in zip(choices, stored, strict=True):
        assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3
        for after in (lambda out: gradients(handle, out), in_thread):
            close_all(run(choice, after, **kwargs), wanted, 1e-4)


@both_kinds
@torch.enable_grad()
def test_a_default_set_after_the_forward_does_not_disturb_its_backward(reentrant: bool) -> None:
    handle = court(frozen("llama"), TARGETS["llama"]).train()
    handle.set_requires_grad(["judge", "critic"])
    ids = prompts("3 c6", "8 c2")
    wanted = gradients(handle, handle(ids, use_cache=False).logits)
    checkpointed(handle, reentrant)
    out = handle(ids, use_cache=False).logits
    handle.set_adapter("critic")
    handle.set_requires_grad(["judge", "critic"])
    close_all(gradients(handle, out), wanted)
    # A call in between has masks of its own.
    handle.set_adapter("judge")
    out = handle(ids, use_cache=False).logits
    handle(prompts("1", "2", length=9), use_cache=False)
    close_all(gradients(handle, out), wanted)


@both_kinds
@torch.enable_grad()
def test_a_whole_forward_is_checkpointed_through_bind(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    handle = court(frozen("llama"), TARGETS["llama"]).train()
    handle.set_requires_grad(["judge", "critic"])
    ids = prompts("3 c6", "8 c2")
    wanted = gradients(handle, handle(ids).logits)
    x = handle.get_input_embeddings()(ids).requires_grad_()

    def run(x: Tensor) -> Tensor:
        logits: Tensor = handle(inputs_embeds=x, alora_offsets=[9, 4]).logits
        return logits

    out = checkpoint(handle.bind(run), x, use_reentrant=reentrant)
    handle.set_adapter("critic")
    handle.set_requires_grad(["judge", "critic"])
    close_all(gradients(handle, out), wanted)
    with handle.use_adapter("judge"):
        out = checkpoint(run, x, use_reentrant=reentrant)
    with pytest.raises(LostRoutingError, match="bind"):
        gradients(handle, out)


# ---------------------------------------------------------------- one cache serves base and adapters


@each_model
def test_keys_and_values_before_the_invocation_are_the_bases(name: str) -> None:
    base = frozen(name)
    handle = judge(frozen(name), TARGETS[name])
    ids, mask = padded(prompts("3", "8", ""), (0, 3, 0), left=True)
    with pytest.warns(PeftWarning, match=NONE):
        mine = keys_and_values(handle(ids, attention_mask=mask).past_key_values)
    theirs = keys_and_values(base(ids, attention_mask=mask).past_key_values)
    assert len(mine) == len(theirs) == 4
    for a, b in zip(mine, theirs, strict=True):
        same_bits(a[0, :, :3], b[0, :, :3])
        same_bits(a[1, :, :8], b[1, :, :8])
        same_bits(a[2], b[2])
        assert not torch.equal(a[0, :, 3:], b[0, :, 3:])


def base_cache(handle: Any, ids: Tensor, kind: str = "dynamic", **kwargs: Any) -> Any:
    """The base's cache of ``ids``."""
    import transformers

    if (mask := kwargs.get("attention_mask")) is not None:
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if kind == "static":
        kwargs["past_key_values"] = transformers.StaticCache(config=handle.config, max_cache_len=40)
    with handle.disable_adapter():
        return handle(ids, **kwargs).past_key_values


@each_model
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate_goes_on_from_the_bases_cache(name: str, kind: str) -> None:
    handle = judge(frozen(name), TARGETS[name])
    by_hand = ByHand(frozen(name), handle, "judge")
    ids, mask = padded(prompts("6", "9"), (0, 2), left=True)
    with by_hand.beginning(6, 9) as model:
        wanted = write(model, ids, attention_mask=mask, use_cache=False)
    same_writing(write(handle, ids, attention_mask=mask), wanted)
    cache = base_cache(handle, ids[:, :6], kind, attention_mask=mask[:, :6])
    same_writing(write(handle, ids, attention_mask=mask, past_key_values=cache), wanted)
    # Only what is new, as transformers has it: the mask covers everything.
    cache = base_cache(handle, ids[:, :6], kind, attention_mask=mask[:, :6])
    out = write(handle, ids[:, 6:], attention_mask=mask, past_key_values=cache)
    assert out.sequences[:, 6:].tolist() == wanted.sequences[:, 12:].tolist()


@each_model
def test_a_forward_goes_on_from_the_bases_cache(name: str) -> None:
    handle = judge(frozen(name), TARGETS[name])
    by_hand = ByHand(frozen(name), handle, "judge")
    ids = prompts("6", "9")
    wanted = by_hand.logits(ids, 6, 9)
    for kind in ("dynamic", "static"):
        cache = base_cache(handle, ids[:, :5], kind)
        close(handle(ids[:, 5:], past_key_values=cache).logits, wanted[:, 5:])
    cache = base_cache(handle, ids[:, :5])
    positions = [None] * 2 if name != "gpt2" else []
    close(handle(ids[:, 5:], *positions, cache).logits, wanted[:, 5:])  # the cache as a positional argument


def steps(handle: Any, ids: Tensor, cuts: Sequence[int], cache: Any = None, **first: Any) -> Tensor:
    """The logits of forwards over pieces of ``ids``."""
    out = []
    for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)):
        outputs = handle(ids[:, a:b], past_key_values=cache, use_cache=True, **(first if not i else {}))
        logits, cache = (outputs.logits, outputs.past_key_values) if hasattr(outputs, "logits") else outputs[:2]
        out.append(logits)
    return torch.cat(out, 1)


@each_model
def test_steps_keep_what_earlier_calls_found(name: str) -> None:
    handle = court(frozen(name), TARGETS[name])
    ids = prompts("3", "6")
    wanted = ByHand(frozen(name), handle, "judge").logits(ids, 3, 6)
    close(steps(handle, ids, [8, 9, 11]), wanted)
    with handle.use_adapter("judge"):
        close(steps(handle, ids, [8, 9, 11]), wanted)
    first, *others = range(8, 12)

    def tuples(*args: Any, **kwargs: Any) -> Any:
        return handle(*args, return_dict=False, **kwargs)

    close(steps(tuples, ids, [first, *others]), wanted)

    def rows(*args: Any, **kwargs: Any) -> Any:
        return handle(*args, adapter_names=["judge", "judge"], **kwargs)

    close(steps(rows, ids, [8, 9, 11]), wanted)
    close(steps(handle, ids, [8, 9], alora_offsets=[5, 2]), wanted)


def test_steps_with_several_adapters_keep_what_each_has_found() -> None:
    handle = court(frozen("llama"), TARGETS["llama"])
    ids = prompts("3", "6 c0")

    def call(*args: Any, **kwargs: Any) -> Any:
        return handle(*args, adapter_names=["judge", "critic"], **kwargs)

    wanted = call(ids).logits
    close(steps(call, ids, [8, 9]), wanted)
    # Adapters take turns on one cache, and the first one goes on.
    cache = handle(ids[:, :8]).past_key_values
    with handle.use_adapter("critic"), pytest.warns(PeftWarning, match=NONE):
        handle(ids[:, 8:9], past_key_values=cache)
    out = handle(ids[:, 9:], past_key_values=cache)
    assert cache.get_seq_length() == 12
    by_hand = ByHand(frozen("llama"), handle, "judge", "critic")
    cache = None
    with by_hand.beginning(judge=(3, 6), critic=(None, None)) as model:
        cache = model(ids[:, :8]).past_key_values
    with by_hand.beginning(judge=(None, None), critic=(None, None)) as model:
        model(ids[:, 8:9], past_key_values=cache)
    with by_hand.beginning(judge=(3, 6), critic=(None, None)) as model:
        close(out.logits, model(ids[:, 9:], past_key_values=cache).logits)


def test_an_invocation_in_a_later_piece_is_found() -> None:
    handle = judge(frozen("llama"), TARGETS["llama"])
    by_hand = ByHand(frozen("llama"), handle, "judge")
    ids = prompts("3", "7")
    with pytest.warns(PeftWarning, match=f"1 rows {NONE}"):
        out = steps(handle, ids, [5, 10])
    close(out, by_hand.logits(ids, 3, 7))


def test_tokens_fed_one_by_one_are_written_ones() -> None:
    """They end, or are, an invocation, and do not activate."""
    handle = judge(frozen("llama"), TARGETS["llama"])
    handle.add_adapter("one", inlay.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[7]))
    disturb(handle)
    ids = prompts("6")
    wanted = frozen("llama")(ids).logits
    for name in ("judge", "one"):
        with handle.use_adapter(name), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            close(steps(handle, ids, range(4, 12)), wanted)
        assert len(told) == 1


def test_a_cache_that_was_cut_back_forgets_what_is_gone() -> None:
    handle = judge(frozen("llama"), TARGETS["llama"])
    by_hand = ByHand(frozen("llama"), handle, "judge")
    cache = base_cache(handle, prompts("")[:, :6])
    for at in ("7", "9", "6"):  # one judgement after the other on one context
        ids = prompts(at)
        ids[:, :6] = prompts("")[:, :6]
        close(handle(ids[:, 6:], past_key_values=cache).logits, by_hand.logits(ids, int(at))[:, 6:])
        cache.crop(-6)
        same_writing(write(handle, ids, past_key_values=cache), write(handle, ids))
        cache.crop(-(cache.get_seq_length() - 6))
    # The base goes on instead, and then the adapter.
    handle(prompts("7")[:, 6:], past_key_values=cache)
    cache.crop(-6)
    ids = torch.cat([prompts(""), prompts("3")], 1)
    with handle.disable_adapter():
        handle(ids[:, 6:12], past_key_values=cache)
    close(handle(ids[:, 12:], past_key_values=cache).logits, by_hand.logits(ids, 15)[:, 12:])
    cache.reset()
    close(handle(prompts("4"), past_key_values=cache).logits, by_hand.logits(prompts("4"), 4))


def test_the_next_turn_of_generate_begins_at_the_last_invocation() -> None:
    handle = judge(frozen("llama"), TARGETS["llama"])
    cache = base_cache(handle, prompts("8")[:, :8])
    first = write(handle, prompts("8"), past_key_values=cache)
    ids = torch.cat([first.sequences, prompts("3", length=8)], 1)
    have = cache.get_seq_length()
    second = write(handle, ids, past_key_values=cache)
    by_hand = ByHand(frozen("llama"), handle, "judge")
    with by_hand.beginning(8) as model:
        cache = model(ids[:, :have]).past_key_values
    with by_hand.beginning(first.sequences.shape[1] + 3) as model:
        same_writing(second, write(model, ids, past_key_values=cache))


def test_a_continued_generate_does_not_begin_at_what_it_wrote() -> None:
    """The prompt's last occurrence is one that `generate` wrote, and the cache tells."""
    handle = judge(frozen("llama"), TARGETS["llama"])
    ids = prompts("8")
    first = write(handle, ids, logits_processor=[Forced({0: 7, 1: 8})])
    assert first.sequences[0, 12:14].tolist() == JUDGE
    on = write(handle, first.sequences, past_key_values=first.past_key_values)
    with ByHand(frozen("llama"), handle, "judge").beginning(8) as model:
        same_writing(on, write(model, first.sequences))


def test_a_cache_with_more_rows() -> None:
    """Beams, or copies of each row, go on from what was found for the row."""
    handle = judge(frozen("llama"), TARGETS["llama"])
    ids = prompts("3", "7")
    cache = handle(ids[:, :10]).past_key_values
    cache.batch_repeat_interleave(3)
    wanted = ByHand(frozen("llama"), handle, "judge").logits(ids, 3, 7)[:, 10:].repeat_interleave(3, 0)
    close(handle(ids[:, 10:].repeat_interleave(3, 0), past_key_values=cache).logits, wanted)
    cache = handle(ids[:, :10]).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.warns(PeftWarning, match=NONE):  # which row is left is not known
        handle(ids[1:, 10:], past_key_values=cache)


def test_caches_are_not_kept() -> None:
    handle = judge(frozen("llama"), TARGETS["llama"])
    cache = handle(prompts("3")).past_key_values
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- generate


class Forced:
    """A logits processor that makes the model write given tokens at given steps."""

    def __init__(self, tokens: dict[int, int]) -> None:
        self.tokens, self.step = tokens, -1

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.step in self.tokens:
            scores = torch.full_like(scores, -1e9)
            scores[:, self.tokens[self.step]] = 0
        return scores


@each_model
def test_greedy_generate_is_whole_forwards_by_hand(name: str) -> None:
    """All new tokens are activated, from each row's own start."""
    handle = judge(frozen(name), TARGETS[name])
    ids = prompts("3", "10", "")
    with pytest.warns(PeftWarning, match=f"1 rows {NONE}"):
        out = write(handle, ids)
    with ByHand(frozen(name), handle, "judge").beginning(3, 10, None) as model:
        sequences, logits = greedy(model, ids, 5)
    assert out.sequences.tolist() == sequences.tolist()
    close(torch.stack(out.logits), logits.float(), 1e-4)
    base = write(frozen(name), ids)
    assert out.sequences[2].tolist() == base.sequences[2].tolist()
    assert float((torch.stack(out.logits) - torch.stack(base.logits))[:, :2].abs().max()) > 1e-2
    with pytest.warns(PeftWarning, match=NONE):
        tokens = handle.generate(inputs=ids, **WRITE)
    assert tokens.tolist() == sequences.tolist()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "three samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 4, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "pieces": {"prefill_chunk_size": 5},
    "static": {"cache_implementation": "static"},
    "static pieces": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "all logits": {"logits_to_keep": 0},
}


@each_model
@pytest.mark.parametrize("mode", MODES)
def test_ways_to_generate(name: str, mode: str) -> None:
    handle = judge(frozen(name), TARGETS[name])
    ids, mask = padded(prompts("3", "8", "1 6"), (0, 3, 1), left=True)
    how = {"attention_mask": mask, **MODES[mode]}
    with ByHand(frozen(name), handle, "judge").beginning(3, 8, 6) as model:
        torch.manual_seed(4)
        wanted = write(model, ids, **copy.deepcopy(how))
    torch.manual_seed(4)
    same_writing(write(handle, ids, **copy.deepcopy(how)), wanted)
    torch.manual_seed(4)
    offsets = write(handle, torch.where(ids == 7, 20, ids), alora_offsets=[9, 4, 6], **copy.deepcopy(how))
    if not how.get("do_sample"):
        assert offsets.sequences.shape == wanted.sequences.shape


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", "assistant"),
        ("gpt2", "assistant"),
        ("llama", "lookup"),
        ("gpt2", "lookup"),
        ("llama", "itself"),  # GPT-2 has its number of layers under another name
    ],
)
def test_assisted_generate(name: str, how: str) -> None:
    handle = judge(frozen(name), TARGETS[name])
    ids = prompts("3")
    wanted = write(handle, ids, max_new_tokens=12, min_new_tokens=12)
    helped: dict[str, Any] = {
        "assistant": {"assistant_model": frozen(name, layers=1)},
        "itself": {"assistant_early_exit": 1},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[how]
    out = write(handle, ids, max_new_tokens=12, min_new_tokens=12, **helped)
    assert out.sequences.tolist() == wanted.sequences.tolist()


@pytest.mark.parametrize("kind", [None, "static"])
def test_a_sliding_window(kind: str | None) -> None:
    handle = judge(frozen("sliding"), TARGETS["mistral"])
    ids, mask = padded(prompts("3", "8"), (0, 2), left=True)
    with ByHand(frozen("sliding"), handle, "judge").beginning(3, 8) as model:
        wanted = write(model, ids, attention_mask=mask, use_cache=False)
    same_writing(write(handle, ids, attention_mask=mask, cache_implementation=kind), wanted)


@each_model
def test_what_is_only_written_does_not_activate(name: str) -> None:
    handle = judge(frozen(name), TARGETS[name])
    force = {1: 7, 2: 8}
    silent, begun = prompts(""), prompts("9")
    with pytest.warns(PeftWarning, match=NONE):
        out = write(handle, silent, logits_processor=[Forced(force)], max_new_tokens=8)
    assert out.sequences[0, 13:15].tolist() == JUDGE
    same_writing(out, write(frozen(name), silent, logits_processor=[Forced(force)], max_new_tokens=8))
    # Nor does it move a start; and a beginning that is completed by what is written is none.
    with ByHand(frozen(name), handle, "judge").beginning(9) as model:
        wanted = write(model, begun, logits_processor=[Forced(force)], max_new_tokens=8)
    same_writing(write(handle, begun, logits_processor=[Forced(force)], max_new_tokens=8), wanted)
    half = prompts("11", length=13)[:, :12]
    assert half[0, -1] == 7
    with pytest.warns(PeftWarning, match=NONE):
        out = write(handle, half, logits_processor=[Forced({0: 8})])
    same_writing(out, write(frozen(name), half, logits_processor=[Forced({0: 8})]))


# ---------------------------------------------------------------- offsets, and input without tokens


@each_model
def test_offsets_replace_the_search(name: str) -> None:
    handle = judge(frozen(name), TARGETS[name])
    base, by_hand = frozen(name), ByHand(frozen(name), handle, "judge")
    ids = prompts("3", "3", "3", "3")
    offsets = [4, None, 12, 1]
    starts = (8, None, 0, 11)
    out = handle(ids, alora_offsets=offsets).logits  # no warning: it is what was asked for
    close(out, by_hand.logits(ids, *starts))
    same_bits(out[1], base(ids).logits[1])
    same_bits(handle(ids, alora_offsets=torch.tensor([4, 0, 12, 1])).logits, out)
    with by_hand.beginning(*starts) as model:
        same_writing(write(handle, ids, alora_offsets=offsets), write(model, ids))
        same_writing(write(handle, ids, alora_offsets=offsets, num_beams=2), write(model, ids, num_beams=2))
    cache = base_cache(handle, ids[:, :5])
    with by_hand.beginning(8, None, 5, 11) as model:
        mine = handle(ids[:, 5:], alora_offsets=[4, None, 7, 1], past_key_values=cache).logits
        close(mine, model(ids).logits[:, 5:])


@each_model
def test_embeddings_alone_need_offsets(name: str) -> None:
    handle = judge(frozen(name), TARGETS[name])
    base, by_hand = frozen(name), ByHand(frozen(name), handle, "judge")
    ids = prompts("3", "8")
    x = base.get_input_embeddings()(ids)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        same_bits(handle(inputs_embeds=x).logits, base(inputs_embeds=x).logits)
    assert [w.category for w in told] == [PeftWarning]
    assert "alora_offsets" in str(told[0].message)
    close(handle(inputs_embeds=x, alora_offsets=[9, 4]).logits, by_hand.logits(ids, 3, 8))
    with by_hand.beginning(3, 8) as model:
        wanted = write(model, ids).logits
    out = write(handle, None, inputs_embeds=x, alora_offsets=[9, 4])  # type: ignore[arg-type]
    close(torch.stack(out.logits), torch.stack(wanted), 1e-4)
    with pytest.warns(PeftWarning, match=NONE):
        out = write(handle, None, inputs_embeds=x)  # type: ignore[arg-type]
    close(torch.stack(out.logits), torch.stack(write(base, ids).logits), 1e-4)


def test_embeddings_beside_the_tokens_that_they_are_of() -> None:
    handle = judge(frozen("llama"), TARGETS["llama"])
    ids = prompts("3", "8")
    x = torch.cat([torch.randn(2, 3, 32), handle.get_input_embeddings()(ids)], 1)  # a prompt of someone else's
    out = handle.generate(ids, inputs_embeds=x, attention_mask=torch.ones(2, 15), **WRITE)
    with ByHand(frozen("llama"), handle, "judge").beginning(6, 11) as model:
        assert out.tolist() == model.generate(ids, inputs_embeds=x, attention_mask=torch.ones(2, 15), **WRITE).tolist()


# ---------------------------------------------------------------- rows, and several at once


@each_model
def test_rows_mix_base_lora_and_activated_adapters(name: str) -> None:
    handle = court(frozen(name), TARGETS[name])
    ids, mask = padded(prompts("3", "8 c3", "3 c8", "9", "5", ""), (0, 2, 0, 3, 1, 0), left=True)
    names = ["judge", "critic", "judge", "__base__", "plain", "critic"]

    def alone(call: Callable[..., Any]) -> list[Any]:
        out = []
        for i, one in enumerate(names):
            context = handle.disable_adapter() if one == "__base__" else handle.use_adapter(one)
            with context, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out.append(call(ids[i : i + 1], attention_mask=mask[i : i + 1]))
        return out

    with pytest.warns(PeftWarning, match=f"^1 rows {NONE} of the adapter 'critic'"):
        out = handle(ids, attention_mask=mask, adapter_names=names).logits
    close(out, torch.cat([o.logits for o in alone(handle)]))
    same_bits(out[[3, 5]], frozen(name)(ids, attention_mask=mask).logits[[3, 5]])
    for mode in ("greedy", "beams", "pieces", "static"):

        def call(*args: Any, how: Any = MODES[mode], **kwargs: Any) -> Any:
            return handle.generate(*args, **WRITE, **how, **kwargs)

        with pytest.warns(PeftWarning, match=NONE):
            together = call(ids, attention_mask=mask, adapter_names=names)
        assert together.tolist() == torch.cat(alone(call)).tolist(), mode
    offsets = [3, 4, None, 5, 6, 7]
    out = handle(ids, attention_mask=mask, adapter_names=names, alora_offsets=offsets).logits
    with handle.use_adapter("judge"):
        close(out[0], handle(ids[:1], attention_mask=mask[:1], alora_offsets=[3]).logits[0])
    same_bits(out[[2, 3]], frozen(name)(ids, attention_mask=mask).logits[[2, 3]])


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
@torch.enable_grad()
def test_rows_train_as_one_by_one(fields: dict[str, Any]) -> None:
    handle = court(frozen("llama"), TARGETS["llama"], **fields).train()
    handle.set_requires_grad(["judge", "critic", "plain"])
    ids = prompts("3", "8 c3", "5")
    names = ["judge", "critic", "plain"]
    alone = []
    for i, one in enumerate(names):
        with handle.use_adapter(one):
            alone.append(handle(ids[i : i + 1]).logits)
    wanted = gradients(handle, torch.cat(alone))
    close_all(gradients(handle, handle(ids, adapter_names=names).logits), wanted, 1e-4)


@each_model
def test_two_act_together_each_from_its_own_start(name: str) -> None:
    handle = court(frozen(name), TARGETS[name], use_dora=name == "qwen2")
    ids = prompts("2 c6", "8 c3", "4")
    by_hand = ByHand(frozen(name), handle, "plain", "critic", "judge")
    for order in (["judge", "critic"], ["critic", "judge"], ["judge", "plain"], ["plain", "critic", "judge"]):
        handle.set_adapter(order)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = handle(ids).logits
            written = write(handle, ids)
        none = (None, None, None)
        starts = {
            "judge": (2, 8, 4) if "judge" in order else none,
            "critic": (6, 3, None) if "critic" in order else none,
            "plain": (0, 0, 0) if "plain" in order else none,
        }
        if handle.peft_config["judge"].use_dora:  # DoRA's change is that of the frozen layer, whoever is beside it
            assert out.isfinite().all()
            same_bits(out[0, :2], frozen(name)(ids).logits[0, :2]) if "plain" not in order else None
            continue
        with by_hand.beginning(**starts) as model:
            close(out, model(ids).logits, 1e-4)
            same_writing(written, write(model, ids))


# ---------------------------------------------------------------- beside prompts


def with_prompt(name: str, kind: str, **fields: Any) -> inlay.PeftModel:
    """A prompt of 3 tokens and activated adapters on one model."""
    config = {"tuning": inlay.PromptTuningConfig, "prefix": inlay.PrefixTuningConfig}[kind]
    handle = inlay.get_peft_model(frozen(name), config(task_type="CAUSAL_LM", num_virtual_tokens=3), "prompt")
    lora = {"r": 3, "alora_invocation_tokens": JUDGE, "target_modules": TARGETS[name], **fields}
    handle.add_adapter("judge", inlay.LoraConfig(**lora))
    disturb(handle)
    with torch.no_grad():
        for p in handle.prompt_encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return handle.eval()


def prompted_by_hand(handle: Any, kind: str, model: Any, ids: Tensor) -> dict[str, Any]:
    """What to call a model with, so that the prompt stands before ``ids``."""
    from transformers import DynamicCache

    P_TD = next(handle.prompt_encoder["prompt"].parameters()).detach()
    B = len(ids)
    mask = torch.ones(B, 3 + ids.shape[1], dtype=torch.long)
    if kind == "tuning":
        x = torch.cat([P_TD.expand(B, -1, -1), model.get_input_embeddings()(ids)], 1)
        return {"inputs_embeds": x, "attention_mask": mask}
    heads = handle.peft_config["prompt"].num_attention_heads
    layers = P_TD.view(3, 4, heads, -1).transpose(0, 1).transpose(1, 2)  # keys, values, keys, values
    cache = DynamicCache(config=model.config)
    for i in range(2):
        cache.update(layers[2 * i].expand(B, -1, -1, -1), layers[2 * i + 1].expand(B, -1, -1, -1), i)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["tuning", "prefix"])
def test_a_prompt_beside(name: str, kind: str) -> None:
    handle = with_prompt(name, kind)
    handle.set_adapter(["prompt", "judge"])
    ids = prompts("3", "8")
    by_hand = ByHand(frozen(name), handle, "judge")
    with by_hand.beginning(6, 11) as model:
        wanted = model(**prompted_by_hand(handle, kind, model, ids)).logits
        close(handle(ids).logits, wanted, 1e-4)
        close(
            handle(torch.where(ids == 7, 20, ids), alora_offsets=[9, 4]).logits[1, -5],
            _other(handle, kind, model, torch.where(ids == 7, 20, ids))[1, -5],
            1e-4,
        )
        sequences = ids
        for _ in range(5):  # whole forwards
            last = model(**prompted_by_hand(handle, kind, model, sequences)).logits[:, -1]
            sequences = torch.cat([sequences, last.argmax(-1, keepdim=True)], 1)
    assert write(handle, ids).sequences[:, -5:].tolist() == sequences[:, -5:].tolist()
    beams = write(handle, ids, num_beams=3).sequences[:, -5:]
    alone = torch.cat([write(handle, ids[i : i + 1], num_beams=3).sequences[:, -5:] for i in range(2)])
    assert beams.tolist() == alone.tolist()
    # On from the cache, which holds the prompt too.
    cache = handle(ids[:, :10]).past_key_values
    close(handle(ids[:, 10:], past_key_values=cache).logits, wanted[:, -2:], 1e-4)


def _other(handle: Any, kind: str, model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(**prompted_by_hand(handle, kind, model, ids)).logits
    return logits


@pytest.mark.parametrize("kind", ["tuning", "prefix"])
def test_rows_with_a_prompt_beside_rows_with_an_invocation(kind: str) -> None:
    """A row without a prompt is padded where the others' stands."""
    handle = with_prompt("llama", kind)
    ids, mask = padded(prompts("3", "8", "1", "5"), (0, 2, 0, 1), left=True)
    names = ["prompt", "judge", "__base__", "judge"]
    out = handle(ids, attention_mask=mask, adapter_names=names).logits[:, -12:]
    written = handle.generate(ids, attention_mask=mask, adapter_names=names, **WRITE)
    for i, one in enumerate(names):
        with handle.disable_adapter() if one == "__base__" else handle.use_adapter(one):
            row = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
            here = mask[i].bool()
            close(out[i][here], handle(**row).logits[0, -12:][here], 1e-4)
            assert written[i, -5:].tolist() == handle.generate(**row, **WRITE)[0, -5:].tolist()


def test_a_prompt_beside_an_adapter_on_the_embeddings() -> None:
    handle = with_prompt("llama", "tuning", target_modules=["embed_tokens", "q_proj"])
    handle.set_adapter(["prompt", "judge"])
    ids = prompts("3", "8")
    # The prompt stands before, so that a forward over embeddings by hand is the model's own from there on.
    x = frozen("llama").get_input_embeddings()(ids)
    new = x.clone()
    layer = handle.base_model.model.model.embed_tokens
    A, B = layer.lora_embedding_A["judge"], layer.lora_embedding_B["judge"]
    change = (A.T[ids] @ B.T) * layer.scaling["judge"]
    for i, start in enumerate((3, 8)):
        new[i, start:] += change[i, start:]
    P = next(handle.prompt_encoder["prompt"].parameters())
    by_hand = ByHand(frozen("llama"), handle, "judge")
    with by_hand.beginning(6, 11) as model:
        wanted = model(inputs_embeds=torch.cat([P.expand(2, -1, -1), new], 1)).logits
    close(handle(ids).logits[:, -12:], wanted[:, -12:], 1e-4)
    out = write(handle, ids)
    close(out.logits[0], wanted[:, -1].float(), 1e-4)


# ---------------------------------------------------------------- targets

PLACES: dict[str, tuple[str, Any]] = {
    "attention": ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "mlp": ("llama", ["gate_proj", "up_proj", "down_proj"]),
    "all of llama": ("llama", "all-linear"),
    "all of gpt2": ("gpt2", "all-linear"),
    "embeddings": ("llama", ["embed_tokens"]),
    "embeddings and more": ("llama", ["embed_tokens", "q_proj", "lm_head"]),
    "embeddings of gpt2": ("gpt2", ["wte", "c_attn"]),
    "head": ("llama", ["lm_head"]),
    "head of qwen2": ("qwen2", ["lm_head", "v_proj"]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore:.*tie")
def test_targets(place: str) -> None:
    name, targets = PLACES[place]
    handle = judge(frozen(name), targets)
    by_hand = ByHand(frozen(name), handle, "judge")
    ids, mask = padded(prompts("3", "8", "11", length=13), (0, 2, 0), left=True)
    wanted = by_hand.logits(ids, 3, 8, 11, attention_mask=mask)
    close(handle(ids, attention_mask=mask).logits, wanted, 1e-4)
    with by_hand.beginning(3, 8, 11) as model:
        same_writing(write(handle, ids, attention_mask=mask), write(model, ids, attention_mask=mask, use_cache=False))
    for kept in (1, 4, torch.tensor([0, 4, 9, 11])):
        at = slice(-kept, None) if isinstance(kept, int) else kept
        close(handle(ids, attention_mask=mask, logits_to_keep=kept).logits, wanted[:, at], 1e-4)


class Odd(nn.Module):
    """A causal model, as far as anybody asks, with layers that do not see tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)
        self.bare = nn.ParameterDict({"weight": nn.Parameter(torch.randn(4, 4))})

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        return h


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Nothing about a model changes inside."""

    def state() -> Any:
        hooks = [(n, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()]
        trained = [(n, p.requires_grad) for n, p in model.named_parameters()]
        return hooks, trained, [(n, type(m)) for n, m in model.named_modules()], sorted(vars(model))

    before, tensors = state(), bits(model)
    yield
    assert state() == before
    same_state(bits(model), tensors)


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        ({"target_modules": ["conv"]}, "Conv1d"),
        ({"target_modules": ["linear", "conv2"]}, "Conv2d"),
        ({"target_modules": ["attention"]}, "MultiheadAttention"),
        ({"target_modules": [], "target_parameters": ["bare.weight"]}, "Parameter"),
    ],
)
def test_kinds_that_have_no_tokens_are_refused_by_name(targets: dict[str, Any], kind: str) -> None:
    model = Odd()
    with unchanged(model), pytest.raises(UnsupportedLayerError, match=f"activated .* {kind} does not"):
        inlay.get_peft_model(model, inlay.LoraConfig(alora_invocation_tokens=JUDGE, **targets))
    handle = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["linear"]), "plain")
    with unchanged(handle), pytest.raises(UnsupportedLayerError, match=kind):
        handle.add_adapter("judge", inlay.LoraConfig(alora_invocation_tokens=JUDGE, **targets))
    assert [*handle.peft_config] == ["plain"]
    assert handle(torch.randn(2, 3, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize(("hidden", "ffn"), [(8, 8), (8, 16), (32, 32)])
def test_a_layer_that_folds_rows_and_tokens_is_named(hidden: int, ffn: int) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=hidden, ffn_dim=ffn, num_hidden_layers=1, num_attention_heads=2,
                  word_embed_proj_dim=hidden, max_position_embeddings=64)
    ).eval()  # fmt: skip
    handle = judge(model, ["q_proj", "fc1", "fc2"])
    for ids in (prompts("3", "8"), prompts("3")):
        with pytest.raises(RowsError, match=r"layers\.0\.fc1 .* rows and tokens"):
            handle(ids)
        with pytest.raises(RowsError, match=r"layers\.0\.fc1"):
            handle.generate(ids, attention_mask=torch.ones_like(ids), **WRITE)
    handle = judge(handle.unload(), ["q_proj", "v_proj"])
    assert handle(prompts("3", "8")).logits.isfinite().all()


# ---------------------------------------------------------------- refusals


def test_merging_is_refused() -> None:
    assert issubclass(NotMergeableError, NotImplementedError)  # as PEFT has it
    handle = court(frozen("llama"), TARGETS["llama"])
    ids = prompts("3 c6", "8 c2")
    before = handle(ids).logits
    layer = handle.base_model.model.model.layers[0].self_attn.q_proj
    calls: list[Callable[[], Any]] = [
        handle.merge_adapter,
        lambda: handle.merge_adapter(["critic"]),
        lambda: handle.merge_adapter(["plain", "critic"]),
        lambda: handle.merge_adapter(safe_merge=True),
        handle.merge_and_unload,
        lambda: handle.merge_and_unload(adapter_names=["plain", "judge"]),
        lambda: handle.merge_and_unload(safe_merge=True),
        layer.merge,
        lambda: layer.merge(adapter_names=["critic"]),
    ]
    for call in calls:
        with unchanged(handle), pytest.raises(NotMergeableError, match="from its invocation on, and a merged weight"):
            call()
    same_bits(handle(ids).logits, before)
    # An ordinary adapter merges beside them, and they act beside it.
    with handle.use_adapter("plain"):
        wanted = handle(ids).logits
    handle.merge_adapter(["plain"])
    with handle.use_adapter("judge"):
        close(handle(ids).logits, before)
    with handle.use_adapter("plain"):
        close(handle(ids).logits, wanted)
    handle.unmerge_adapter()
    same_bits(handle(ids).logits, before)
    model = handle.merge_and_unload(adapter_names=["plain"])
    close(model(ids).logits, wanted)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("tokens", [[], [-1], [7, -1], [64], [7, 10**6]])
def test_invocations_that_cannot_be(tokens: list[int]) -> None:
    model = frozen("llama")
    with unchanged(model), pytest.raises(ConfigError, match=r"alora_invocation_tokens"):
        inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=tokens))
    handle = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"]), "plain")
    with unchanged(handle), pytest.raises(ConfigError, match=r"alora_invocation_tokens"):
        handle.add_adapter("a", inlay.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=tokens))
    assert [*handle.peft_config] == ["plain"]


@pytest.mark.parametrize("tokens", ["text", 7, [7.0], ["7"], [None], [True], [[7, 8]], torch.tensor([7])])
def test_invocations_that_are_no_tokens(tokens: Any) -> None:
    with pytest.raises(FieldTypeError, match="alora_invocation_tokens"):
        inlay.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=tokens)


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_other_tasks_warn(task: str) -> None:
    with pytest.warns(PeftWarning, match=r"is for task_type=.CAUSAL_LM.*" + task):
        inlay.LoraConfig(alora_invocation_tokens=JUDGE, task_type=task)
    inlay.LoraConfig(alora_invocation_tokens=JUDGE, task_type=None)


def test_other_methods_do_not_take_it() -> None:
    with pytest.raises(ConfigError, match="alora_invocation_tokens"):
        inlay.AdaLoraConfig(total_step=10, target_modules=["q_proj"], alora_invocation_tokens=JUDGE)


@pytest.mark.parametrize("name", ["bert", "t5", "body", "classifier"])
def test_other_models_are_refused(tiny: Callable[[str], nn.Module], name: str, tmp_path: Any) -> None:
    from transformers import LlamaForSequenceClassification

    llama = frozen("llama")
    targets = {"bert": ["query"], "t5": ["q"]}.get(name, ["q_proj"])
    model = {"body": lambda: llama.model, "classifier": lambda: LlamaForSequenceClassification(llama.config)}.get(
        name, lambda: tiny(name)
    )()
    config = inlay.LoraConfig(target_modules=targets, alora_invocation_tokens=JUDGE)
    with unchanged(model), pytest.raises(ConfigError, match="causal language models"):
        inlay.get_peft_model(model, config)
    # Nor does a file bring it in.
    judge(frozen("llama"), ["q_proj"]).save_pretrained(tmp_path)
    with unchanged(model), pytest.raises(ConfigError, match="causal language models"):
        inlay.PeftModel.from_pretrained(model, tmp_path / "judge")
    handle = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=targets), "plain")
    with unchanged(handle), pytest.raises(ConfigError, match="causal language models"):
        handle.load_adapter(tmp_path / "judge", "judge")


def test_a_model_whose_cache_counts_no_tokens_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with unchanged(model), pytest.raises(ConfigError, match="MambaForCausalLM"):
        inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["in_proj"], alora_invocation_tokens=JUDGE))


def test_a_file_whose_tokens_are_not_in_the_vocabulary(tmp_path: Any) -> None:
    judge(frozen("llama"), ["q_proj"], alora_invocation_tokens=[60, 63]).save_pretrained(tmp_path)
    small = frozen("llama")
    small.resize_token_embeddings(62)
    with unchanged(small), pytest.raises(ConfigError, match="token 63, the model's vocabulary has 62"):
        inlay.PeftModel.from_pretrained(small, tmp_path / "judge")


@pytest.mark.parametrize("offsets", [[], [3], [3, 4, 5]])
def test_offsets_for_another_batch(offsets: list[int]) -> None:
    handle = judge(frozen("llama"), TARGETS["llama"])
    ids = prompts("3", "8")
    with pytest.raises(RowsError, match=f"{len(offsets)} entries for a batch of 2"):
        handle(ids, alora_offsets=offsets)
    with pytest.raises(RowsError, match=f"{len(offsets)} entries for a batch of 2"):
        handle.generate(ids, alora_offsets=offsets, **WRITE)
    handle(ids)


@pytest.mark.parametrize("offsets", [3, "34", [3.5, 4], ["3", "4"], [True, 2]])
def test_offsets_that_are_no_numbers_of_tokens(offsets: Any) -> None:
    handle = judge(frozen("llama"), TARGETS["llama"])
    with pytest.raises(RowsError, match="alora_offsets"):
        handle(prompts("3", "8"), alora_offsets=offsets)


def test_a_model_without_a_handle_is_refused() -> None:
    model = frozen("llama")
    config = inlay.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=JUDGE)
    with unchanged(model), pytest.raises(ConfigError, match="needs a handle"):
        inlay.inject_adapter_in_model(config, model)


def test_a_forward_past_the_handle_is_refused() -> None:
    """There an activated adapter would act on every token, and nobody would notice."""
    handle = court(frozen("llama"), TARGETS["llama"])
    ids, inner = prompts("3 c5"), handle.get_base_model()
    for call in (inner, handle.base_model, inner.model):
        with pytest.raises(RoutingError, match="PeftModel"):
            call(ids)
    with handle.use_adapter("critic"), pytest.raises(RoutingError, match="PeftModel"):
        inner(ids)
    with pytest.raises(RoutingError, match="PeftModel"):
        inner.generate(ids, **WRITE)
    with handle.disable_adapter():
        same_bits(inner(ids).logits, frozen("llama")(ids).logits)
    with handle.use_adapter("plain"):
        wanted = handle(ids).logits
        same_bits(inner(ids).logits, wanted)
    handle.base_model.disable_adapter_layers()
    same_bits(inner(ids).logits, frozen("llama")(ids).logits)


def test_a_module_trained_whole_serves_activated_tokens_only() -> None:
    for whole in ("lm_head", "embed_tokens"):
        handle = court(frozen("llama"), TARGETS["llama"], modules_to_save=[whole])
        with torch.no_grad():
            for n, p in handle.named_parameters():
                if ".modules_to_save." in n:
                    p.add_(torch.randn(p.shape))
        base = frozen("llama")
        ids = prompts("3", "8", "")
        with pytest.warns(PeftWarning, match=NONE):
            out = handle(ids)
        for i, start in enumerate((3, 8, 12)):
            same_bits(out.logits[i, :start], base(ids).logits[i, :start])
            for a, b in zip(*map(keys_and_values, (out.past_key_values, base(ids).past_key_values)), strict=True):
                same_bits(a[i, :, :start], b[i, :, :start])
        assert float((out.logits - base(ids).logits)[0, 3:].abs().max()) > 1
        with pytest.warns(PeftWarning, match=NONE):
            rows = handle(ids, adapter_names=["judge", "__base__", "judge"]).logits
        close(rows[[0, 2]], out.logits[[0, 2]])
        same_bits(rows[1], base(ids).logits[1])
        full = judge(frozen("llama"), TARGETS["llama"], modules_to_save=[whole], alora_invocation_tokens=None)
        full.load_state_dict({k: v for k, v in handle.state_dict().items() if k in full.state_dict()})
        ids = prompts("0", "0")
        close(handle(ids).logits, full(ids).logits)  # from the first token on it is an ordinary one


# ---------------------------------------------------------------- threads, copies, and the end of it


def test_eight_threads_on_one_handle() -> None:
    handle = court(frozen("llama"), TARGETS["llama"])
    calls: list[tuple[str | None, Tensor]] = [
        ("judge", prompts("3", "8")), ("judge", prompts("5", length=14)), ("critic", prompts("c3", "c8")),
        ("critic", prompts("c0", "c2", "c7", length=11)), ("plain", prompts("3", "c8")), (None, prompts("2")),
    ]  # fmt: skip
    rows = prompts("3", "c4", "5", "6")
    names = ["judge", "critic", "__base__", "plain"]

    def call(i: int) -> list[Tensor]:
        with torch.no_grad():
            if i >= len(calls):
                if i % 2:
                    return [handle(rows, adapter_names=names).logits]
                return [handle.generate(rows, attention_mask=torch.ones_like(rows), adapter_names=names, **WRITE)]
            name, ids = calls[i]
            with handle.disable_adapter() if name is None else handle.use_adapter(name):
                written = handle.generate(ids, attention_mask=torch.ones_like(ids), **WRITE)
                return [handle(ids).logits, written]

    wanted = [call(i) for i in range(8)]

    def work(i: int) -> int:
        return sum(
            not torch.allclose(a.float(), b.float(), atol=1e-4)
            for _ in range(12)
            for a, b in zip(call(i), wanted[i], strict=True)
        )

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0


def test_copies_and_pickles_are_apart() -> None:
    handle = court(frozen("llama"), TARGETS["llama"])
    ids = prompts("3 c6", "8 c2")
    wanted = handle(ids).logits
    for copied in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        same_bits(copied(ids).logits, wanted)
        same_bits(copied.generate(ids, **WRITE), handle.generate(ids, **WRITE))
        with copied.use_adapter("critic"):
            critic = copied(ids).logits
        copied.delete_adapter("critic")
        copied.set_adapter("plain")
        copied.delete_adapter("judge")
        assert not copied.get_base_model()._forward_pre_hooks
        assert not copied.get_base_model()._forward_pre_hooks_with_kwargs
        same_bits(handle(ids).logits, wanted)
        with handle.use_adapter("critic"):
            same_bits(handle(ids).logits, critic)
    cache = handle(ids[:, :10]).past_key_values
    same_bits(copy.deepcopy(handle)(ids).logits, wanted)
    close(handle(ids[:, 10:], past_key_values=cache).logits, wanted[:, 10:])


def test_the_hook_goes_with_the_last_activated_adapter() -> None:
    handle = court(frozen("llama"), TARGETS["llama"])
    inner = handle.get_base_model()
    ids = prompts("3 c6", "8 c2")
    assert len(inner._forward_pre_hooks) == 1
    with handle.use_adapter("critic"):
        critic = handle(ids).logits
    with pytest.warns(PeftWarning, match="was active and is deleted"):
        handle.delete_adapter("judge")
    assert len(inner._forward_pre_hooks) == 1
    same_bits(handle(ids).logits, critic)
    handle.set_adapter("plain")
    handle.delete_adapter("critic")
    assert not inner._forward_pre_hooks
    plain = handle(ids).logits
    handle.add_adapter("judge", inlay.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=JUDGE))
    assert len(inner._forward_pre_hooks) == 1
    same_bits(handle(ids).logits, plain)
    model = handle.unload()
    assert model is inner
    assert not inner._forward_pre_hooks
    same_bits(inner(ids).logits, frozen("llama")(ids).logits)


def test_two_handles() -> None:
    one, two = judge(frozen("llama"), ["q_proj"]), judge(frozen("llama"), ["v_proj"], alora_invocation_tokens=CRITIC)
    ids = prompts("3 c6")
    wanted = one(ids).logits, two(ids).logits
    assert float((wanted[0] - wanted[1]).abs().max()) > 1e-2
    cache = one(ids[:, :10]).past_key_values
    two(ids)
    close(one(ids[:, 10:], past_key_values=cache).logits, wanted[0][:, 10:])
    one.delete_adapter("judge")
    same_bits(two(ids).logits, wanted[1])


def test_an_inner_call_has_its_own_tokens() -> None:
    """Something in `generate` runs the handle with another adapter; the outer call goes on as it was."""
    handle = court(frozen("llama"), TARGETS["llama"])
    ids = prompts("3 c6", "8 c2")
    wanted = write(handle, ids)

    class Asking:
        def __call__(self, sequence: Tensor, scores: Tensor) -> Tensor:
            with handle.use_adapter("critic"):
                handle(prompts("c1", "c2", "c3", length=7))
            with handle.disable_adapter():
                handle(sequence)
            return scores

    same_writing(write(handle, ids, logits_processor=[Asking()]), wanted)


def test_saved_and_loaded_is_the_same(tmp_path: Any) -> None:
    handle = court(frozen("llama"), TARGETS["llama"])
    handle.save_pretrained(tmp_path)
    ids = prompts("3 c6", "8 c2")
    loaded = inlay.PeftModel.from_pretrained(frozen("llama"), tmp_path / "judge", "judge").eval()
    loaded.load_adapter(tmp_path / "critic", "critic")
    assert loaded.peft_config["critic"].alora_invocation_tokens == CRITIC
    for name in ("judge", "critic"):
        with handle.use_adapter(name), loaded.use_adapter(name):
            same_bits(loaded(ids).logits, handle(ids).logits)
            assert loaded.generate(ids, **WRITE).tolist() == handle.generate(ids, **WRITE).tolist()


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", False])
def test_other_starts(init: Any) -> None:
    """Starts that are a part of the weight come with their offset, and the base stays the base's."""
    base = frozen("llama")
    handle = judge(frozen("llama"), ["q_proj", "v_proj"], init_lora_weights=init)
    ids = prompts("3", "8")
    out = handle(ids).logits
    for i, start in enumerate((3, 8)):
        same_bits(out[i, :start], base(ids).logits[i, :start])
    full = judge(frozen("llama"), ["q_proj", "v_proj"], init_lora_weights=init, alora_invocation_tokens=None)
    full.load_state_dict(handle.state_dict())
    ids = prompts("0", "0")
    close(handle(ids).logits, full(ids).logits)


# ---------------------------------------------------------------- compiled


def compiled(handle: inlay.PeftModel, backend: str) -> inlay.PeftModel:
    """A twin of a handle, with the model inside compiled."""
    torch._dynamo.reset()
    twin = copy.deepcopy(handle)
    twin.get_base_model().compile(backend=backend)
    return twin


def test_a_compiled_model_inside_the_handle() -> None:
    eager = judge(frozen("llama", layers=1), ["q_proj", "down_proj", "lm_head"])
    handle = compiled(eager, "eager")
    ids = prompts("3", "8")
    close(handle(ids).logits, eager(ids).logits)
    close(handle(ids, alora_offsets=[2, 5]).logits, eager(ids, alora_offsets=[2, 5]).logits)
    close(steps(handle, ids, [10, 11]), eager(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_that_a_compiled_model_inside_the_handle_does(name: str, backend: str) -> None:
    eager = court(frozen(name), TARGETS[name])
    handle = compiled(eager, backend)
    ids = prompts("3 c6", "8 c2")
    for length in (12, 10):
        for adapter in ("judge", "critic", "plain"):
            with eager.use_adapter(adapter), handle.use_adapter(adapter):
                close(handle(ids[:, :length]).logits, eager(ids[:, :length]).logits, 1e-4)
    close(steps(handle, ids, [10, 11]), eager(ids).logits, 1e-4)
    assert handle.generate(ids, **WRITE).tolist() == eager.generate(ids, **WRITE).tolist()
    static = {**WRITE, "cache_implementation": "static"}
    assert handle.generate(ids, **static).tolist() == eager.generate(ids, **WRITE).tolist()


@torch.enable_grad()
def test_a_compiled_model_trains() -> None:
    eager = judge(frozen("llama", layers=1), TARGETS["llama"]).train()
    handle = compiled(eager, "aot_eager")
    ids = prompts("3", "8")
    close_all(gradients(handle, handle(ids).logits), gradients(eager, eager(ids).logits), 1e-4)


def test_a_compiled_handle_is_refused_by_name() -> None:
    torch._dynamo.reset()
    handle = judge(frozen("llama", layers=1), TARGETS["llama"])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"RoutingError.*get_base_model\(\)\.compile\(\)"):
        torch.compile(handle, backend="eager", fullgraph=True)(prompts("3"))


@pytest.mark.slow
def test_a_compiled_handle_without_one_graph_runs_as_ever() -> None:
    """torch runs it as it is, and compiles what is inside."""
    torch._dynamo.reset()
    handle = judge(frozen("llama", layers=1), TARGETS["llama"])
    close(torch.compile(handle, backend="eager")(prompts("3")).logits, handle(prompts("3")).logits)
    torch._dynamo.reset()
    with pytest.raises(RoutingError, match="PeftModel"):
        torch.compile(handle.get_base_model(), backend="eager")(prompts("3"))


# ---------------------------------------------------------------- cost


class Syncs(TorchDispatchMode):
    """Counts what waits for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in self.WAITING:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def syncs(layers: int, rows: int, steps: int | None, **kwargs: Any) -> list[str]:
    handle = court(frozen("llama", layers=layers), TARGETS["llama"])
    base = frozen("llama", layers=layers)
    ids = prompts(*["3 c6", "8 c2"] * (rows // 2))
    if "adapter_names" in kwargs:
        kwargs["adapter_names"] = kwargs["adapter_names"] * (rows // 2)
    found = []
    for model, own in ((handle, kwargs), (base, {})):
        with Syncs() as mode:
            if steps is None:
                model(ids, **own)
            else:
                how = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
                model.generate(ids, attention_mask=torch.ones_like(ids), **how, **own)
        found.append(mode.seen)
    for name in found[1]:  # what the base does of itself
        found[0].remove(name)
    return found[0]


@pytest.mark.parametrize("kwargs", [{}, {"adapter_names": ["critic", "judge"]}], ids=["whole", "rows"])
def test_waits_of_a_call_are_few_and_do_not_grow(kwargs: Any) -> None:
    once = syncs(2, 4, None, **kwargs)
    assert len(once) <= (2 if not kwargs else 8)
    assert syncs(6, 4, None, **kwargs) == once  # not by layer
    assert syncs(2, 16, None, **kwargs) == once  # not by row
    assert len(syncs(2, 4, 3, **kwargs)) == len(syncs(2, 4, 9, **kwargs))  # not by step


def test_masks_are_made_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(torch, "arange", lambda *a, _arange=torch.arange, **k: made.append(a) or _arange(*a, **k))
    counts = []
    for layers in (2, 6):
        handle = judge(frozen("llama", layers=layers), TARGETS["llama"])
        ids = prompts("3", "8")
        made.clear()
        handle(ids)
        counts.append(len(made))
    assert counts[0] == counts[1]
