"""Sessions: what is reused changes no number, and nothing is computed twice that need not be."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import inlay
from inlay.errors import BusyError, CacheError, PeftWarning, TokenIndexError, UnknownAdapterError

VOCABULARY, WINDOW, ROOM = 16, 7, 128
INVOCATIONS = {"a": [13, 14], "b": [15]}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": ROOM,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": {"intermediate_size": 24, "num_key_value_heads": 1},
    "mistral": {"intermediate_size": 24, "num_key_value_heads": 1, "sliding_window": None},
    "sliding": {"intermediate_size": 24, "num_key_value_heads": 1, "sliding_window": WINDOW},
    "qwen2": {"intermediate_size": 24, "num_key_value_heads": 1},
    "gpt2": {},
}
CACHES: dict[str, dict[str, Any]] = {"dynamic": {}, "static": {"cache": "static", "max_length": ROOM}}


def causal(architecture: str = "llama", **sizes: Any) -> Any:
    import transformers

    kind = "mistral" if architecture == "sliding" else architecture
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **ARCHITECTURES[architecture], **sizes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def lora(architecture: str = "llama", **fields: Any) -> inlay.LoraConfig:
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    return inlay.LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **fields
    )


def handle(architecture: str = "llama", **sizes: Any) -> Any:
    """A model with two activated adapters, ``a`` and ``b``, and a plain one, ``p``."""
    configs = {name: lora(architecture, alora_invocation_tokens=tokens) for name, tokens in INVOCATIONS.items()}
    model = inlay.get_peft_model(causal(architecture, **sizes), configs["a"], "a")
    model.add_adapter("b", configs["b"])
    model.add_adapter("p", lora(architecture))
    return model.eval()


@pytest.fixture(scope="module")
def adapted() -> Callable[[str], Any]:
    made: dict[str, Any] = {}
    return lambda architecture: made.setdefault(architecture, handle(architecture))


def anew(model: Any, ids: Tensor, adapter: str | None) -> Tensor:
    """The next token's logits, all computed at once."""
    with torch.no_grad(), warnings.catch_warnings(), chosen(model, adapter):
        warnings.simplefilter("ignore", PeftWarning)
        return model(ids[None]).logits[0, -1]


def written_anew(model: Any, ids: Tensor, adapter: str | None, n: int) -> list[int]:
    with warnings.catch_warnings(), chosen(model, adapter):
        warnings.simplefilter("ignore", PeftWarning)
        mask = torch.ones_like(ids)[None]
        return model.generate(ids[None], attention_mask=mask, max_new_tokens=n, do_sample=False)[
            0, len(ids) :
        ].tolist()


def chosen(model: Any, adapter: str | None) -> Any:
    return model.disable_adapter() if adapter is None else model.use_adapter(adapter)


# ---------------------------------------------------------------------- the law


class Oracle:
    """Which entries are there, told token by token: an entry is known by the text up to it and by who computed it."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text = list(text)
        self.there: set[tuple[tuple[int, ...], str, int]] = set()

    def fork(self) -> Oracle:
        other = Oracle(self.text)
        other.there = set(self.there)
        return other

    def rewind(self, n: int) -> None:
        self.text = self.text[: len(self.text) - n]
        self.there = {e for e in self.there if len(e[0]) <= len(self.text)}

    def start(self, adapter: str | None) -> int | None:
        """Where the adapter begins; None where the base runs."""
        if adapter not in INVOCATIONS:
            return None if adapter is None else 0
        sought = INVOCATIONS[adapter]
        found = [i for i in range(len(self.text)) if self.text[i : i + len(sought)] == sought]
        return found[-1] if found else None

    def turn(self, adapter: str | None, written: Sequence[int], write: bool) -> int:
        """How many tokens must be prefilled; takes up what the turn computes."""
        start, L = self.start(adapter), len(self.text)
        if start is not None:  # an adapter has one place at a time
            self.there = {e for e in self.there if e[1] != adapter or e[2] == start}
        text = [*self.text, *written]

        def entry(i: int) -> tuple[tuple[int, ...], str, int]:
            mine = start is not None and i >= start
            return (tuple(text[: i + 1]), adapter if mine else "", start if mine else 0)  # type: ignore[return-value]

        have = next((i for i in range(L - 1) if entry(i) not in self.there), L - 1)
        self.there |= {entry(i) for i in range(have, len(text) - 1)}
        self.text = text if write else self.text
        return L - have


tokens = st.lists(st.sampled_from([*range(3, VOCABULARY), 13, 14, 13, 14, 15]), min_size=2, max_size=6)
edits = st.one_of(
    st.tuples(st.just("extend"), tokens),
    st.tuples(st.just("extend"), st.sampled_from([[13, 14], [15], [13, 14, 15], [15, 5, 13, 14]])),
    st.tuples(st.just("rewind"), st.integers(1, 9)),
    st.tuples(st.just("fork"), st.integers(0, 3)),
)
who = st.sampled_from([None, "a", "b", "p"])
turns = st.one_of(
    st.tuples(st.just("generate"), who, st.integers(1, 4)),
    st.tuples(st.just("logits"), who),
    st.tuples(st.just("prefill"), who),
)
scripts = st.lists(st.tuples(edits, edits, turns), min_size=5, max_size=6).map(
    lambda steps: [a for s in steps for a in s]
)


def play(model: Any, first: list[int], script: list[tuple[Any, ...]], how: dict[str, Any]) -> None:
    """Runs a script on sessions, on an oracle, and on the model itself."""
    branches = [(model.session(first, **how), Oracle(first))]
    for action, *values in script:
        session, oracle = branches[-1]
        if action == "extend":
            session.extend(values[0])
            oracle.text += values[0]
        elif action == "rewind":
            n = min(values[0], len(session) - 1)
            session.rewind(n)
            oracle.rewind(n)
        elif action == "fork":
            branches.append((session.fork(), oracle.fork()))
            branches.append(branches.pop(values[0] % len(branches)))
        else:
            take_turn(model, session, oracle, action, *values)
        assert session.ids.tolist() == oracle.text


def take_turn(model: Any, session: Any, oracle: Oracle, action: str, adapter: str | None, n: int = 1) -> None:
    ids, silent = session.ids, adapter in INVOCATIONS and oracle.start(adapter) is None
    count, totals = len(session.turns), (session.prefilled, session.reused)
    expected = written_anew(model, ids, adapter, n) if action == "generate" else []
    with pytest.warns(PeftWarning, match="no invocation") if silent else warnings.catch_warnings():
        if action == "generate":
            assert session.generate(adapter, n, do_sample=False).tolist() == expected
        elif action == "logits":
            torch.testing.assert_close(session.logits(adapter), anew(model, ids, adapter), rtol=0, atol=1e-5)
        else:
            session.prefill(adapter)
    # Without writing, a turn computes the sequence and no more.
    lacking = oracle.turn(adapter, expected or [0], write=action == "generate")
    turn = session.turns[-1]
    assert len(session.turns) == count + 1
    assert turn == ((() if adapter is None or silent else (adapter,)), lacking, len(ids) - lacking)
    assert (session.prefilled, session.reused) == (totals[0] + turn.prefilled, totals[1] + turn.reused)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_script_gives_what_a_full_recompute_gives(
    architecture: str, cache: str, adapted: Callable[[str], Any]
) -> None:
    model = adapted(architecture)

    @settings(max_examples=20 if cache == "dynamic" else 6)
    @given(tokens, scripts)
    def run(first: list[int], script: list[tuple[Any, ...]]) -> None:
        play(model, first, [*script, *(("logits", name) for name in (None, "a", "b", "p"))], CACHES[cache])

    run()


def test_the_adapters_differ_from_the_base(adapted: Callable[[str], Any]) -> None:
    # Else the scripts above would pass whoever had computed what.
    ids = torch.tensor([5, 13, 14, 15, 6, 7])
    for architecture in ARCHITECTURES:
        base, *others = (anew(adapted(architecture), ids, name) for name in (None, "a", "b", "p"))
        assert all((base - other).abs().max() > 0.05 for other in others)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_entries_before_the_invocation_are_the_bases_bit_for_bit(
    architecture: str, adapted: Callable[[str], Any]
) -> None:
    from transformers import DynamicCache

    model, ids_BL = adapted(architecture), torch.tensor([[5, 6, 7, 8, 9, 13, 14, 3, 4]])
    base, own = DynamicCache(), DynamicCache()
    with torch.no_grad():
        with model.disable_adapter():
            model(ids_BL, past_key_values=base)
        with model.use_adapter("a"):
            model(ids_BL, past_key_values=own)
    for theirs, mine in zip(base.layers, own.layers, strict=True):
        for t, m in ((theirs.keys, mine.keys), (theirs.values, mine.values)):
            assert torch.equal(t[:, :, :5], m[:, :, :5])
    assert not torch.equal(base.layers[1].values[:, :, 5:], own.layers[1].values[:, :, 5:])


@pytest.mark.parametrize("shared", [1, 4, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_on_the_bases_cache_equals_a_full_recompute(
    architecture: str, shared: int, adapted: Callable[[str], Any]
) -> None:
    from transformers import DynamicCache

    model, ids, cache = adapted(architecture), torch.tensor([5, 6, 7, 8, 9, 13, 14, 3, 4]), DynamicCache()
    with torch.no_grad(), model.disable_adapter():
        model(ids[None, :shared], past_key_values=cache)
    with model.use_adapter("a"):
        whole = model.generate(ids[None], past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert whole[0, len(ids) :].tolist() == written_anew(model, ids, "a", 5)


def test_sampling_draws_what_it_draws_without_a_session(adapted: Callable[[str], Any]) -> None:
    model, ids = adapted("llama"), torch.tensor([5, 6, 13, 14, 7])
    session = model.session(ids)
    session.prefill()
    torch.manual_seed(3)
    new = session.generate("a", 8, do_sample=True, temperature=2.0, eos_token_id=None)
    torch.manual_seed(3)
    with model.use_adapter("a"):
        options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "eos_token_id": None}
        expected = model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], **options)
    assert new.tolist() == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("names", [["a", "b"], ["b", "p"], ["p", "a"]])
def test_several_adapters_at_once(names: list[str], adapted: Callable[[str], Any]) -> None:
    model, session = adapted("llama"), adapted("llama").session([5, 6, 13, 14, 7, 8, 15, 9])
    session.prefill()
    for _ in range(2):
        with torch.no_grad(), model.use_adapter(names):
            expected = model(session.ids[None]).logits[0, -1]
        torch.testing.assert_close(session.logits(names), expected, rtol=0, atol=1e-5)
        session.generate(names, 3, do_sample=False, eos_token_id=None)
    # All that the base has is theirs before the first of them begins; what they wrote themselves is.
    begin = 2 if "p" not in names else 0
    assert [turn.reused for turn in session.turns[1:]] == [begin, 7, 10, 10]


def test_a_copied_module_serves_from_the_invocation_on_so_the_bases_entries_are_shared() -> None:
    model = inlay.get_peft_model(
        causal(), lora(alora_invocation_tokens=[13, 14], modules_to_save=["embed_tokens"]), "a"
    ).eval()
    copied = model.get_base_model().model.embed_tokens.modules_to_save["a"]
    copied.weight.data.normal_()
    session = model.session([5, 6, 7, 13, 14])
    session.prefill()
    torch.testing.assert_close(session.logits("a"), anew(model, session.ids, "a"), rtol=0, atol=1e-5)
    assert session.turns[-1].reused == 3


# ---------------------------------------------------------------------- what branches hold


def tensors(session: Any) -> list[Tensor]:
    return [t for s in session._state.streams.values() for part in s.parts for pair in part for t in pair]


def test_branches_hold_the_same_tensors_and_go_apart(adapted: Callable[[str], Any]) -> None:
    session = adapted("llama").session([5, 6, 7, 8])
    session.prefill()
    kept = [t.clone() for t in tensors(session)]
    branches = [session.fork() for _ in range(3)]
    for branch, name in zip(branches, ("a", "b", None), strict=True):
        branch.extend([13, 14, 15])
        branch.generate(name, 3, do_sample=False, eos_token_id=None)
        mine = {t.data_ptr() for t in tensors(branch)}
        assert all(t.data_ptr() in mine for t in tensors(session))
        assert (branch.turns[0].reused, len(branch)) == (4, 10)
    assert (session.ids.tolist(), len(session.turns)) == ([5, 6, 7, 8], 1)
    assert all(torch.equal(t, k) for t, k in zip(tensors(session), kept, strict=True))


def test_entries_take_no_more_memory_than_they_are(adapted: Callable[[str], Any]) -> None:
    session = adapted("llama").session([5, 6, 7, 13, 14, 8])
    session.prefill("a")
    session.extend([9])
    session.generate("a", 3, do_sample=False, eos_token_id=None)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors(session))


@pytest.mark.parametrize("cache", CACHES)
def test_branches_run_in_threads(cache: str, adapted: Callable[[str], Any]) -> None:
    model = adapted("qwen2")
    session = model.session([5, 6, 7, 8, 9, 10], **CACHES[cache])
    session.prefill()
    found: dict[str, list[int]] = {}

    def judge(name: str) -> None:
        branch = session.fork()
        branch.extend([*INVOCATIONS[name], 4])
        found[name] = [int(i) for _ in range(8) for i in branch.generate(name, 2, do_sample=False, eos_token_id=None)]

    threads = [threading.Thread(target=judge, args=(name,)) for name in INVOCATIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, new in found.items():
        branch = model.session([5, 6, 7, 8, 9, 10, *INVOCATIONS[name], 4])
        again = [int(i) for _ in range(8) for i in branch.generate(name, 2, do_sample=False, eos_token_id=None)]
        assert new == again


# ---------------------------------------------------------------------- other weights


def changed(model: Any, adapter: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                parameter.mul_(-3)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (lambda m: changed(m, "a"), {"a"}),
        (lambda m: changed(m, "p"), {"p"}),
        (lambda m: m.get_base_model().model.layers[0].self_attn.q_proj.scaling.update(b=9.0), {"b"}),
        (lambda m: (m.delete_adapter("b"), m.add_adapter("b", lora(alora_invocation_tokens=[15]))), {"b"}),
        (lambda m: m.get_base_model().model.norm.weight.data_ptr(), set()),
        (lambda m: m.set_adapter("p"), set()),
        (lambda m: m.merge_adapter(["p"]), {None, "a", "b", "p"}),
        (lambda m: m.double(), {None, "a", "b", "p"}),
    ],
    ids=["trained a", "trained p", "scale of b", "another b", "nothing", "set", "merged p", "dtype"],
)
def test_what_other_weights_computed_is_computed_again(change: Callable[[Any], Any], stale: set[str | None]) -> None:
    model = handle()
    session = model.session([5, 6, 7, 13, 14, 8, 15, 9])
    for name in (None, "a", "b", "p"):
        session.prefill(name)
    change(model)
    reused = {None: 7, "a": 7, "b": 7, "p": 7}
    behind = {None: 0, "a": 3, "b": 6, "p": 0}  # what is left where the adapter's own entries are gone
    for name in (None, "a", "b", "p"):
        torch.testing.assert_close(session.logits(name), anew(model, session.ids, name).float(), rtol=0, atol=1e-5)
        assert session.turns[-1].reused == (behind if name in stale else reused)[name], name


def test_an_adapter_that_is_gone_is_unknown_and_its_entries_go() -> None:
    model = handle()
    session = model.session([5, 13, 14])
    session.prefill("a")
    model.set_adapter("p")
    model.delete_adapter("a")
    with pytest.raises(UnknownAdapterError):
        session.logits("a")
    session.logits()
    assert list(session._state.streams) == [()]


# ---------------------------------------------------------------------- a cache from elsewhere


def bases_cache(model: Any, ids: list[int], kind: str = "dynamic") -> Any:
    from transformers import DynamicCache, StaticCache

    inner = model.get_base_model()
    cache = DynamicCache(config=inner.config) if kind == "dynamic" else StaticCache(inner.config, max_cache_len=20)
    with torch.no_grad(), model.disable_adapter():
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("kind", CACHES)
def test_goes_on_from_the_bases_cache(kind: str, adapted: Callable[[str], Any]) -> None:
    model, ids = adapted("llama"), [5, 6, 7, 8, 13, 14, 9]
    session = model.session(ids, past_key_values=bases_cache(model, ids[:6], kind))
    torch.testing.assert_close(session.logits("a"), anew(model, session.ids, "a"), rtol=0, atol=1e-5)
    assert session.turns == [(("a",), 3, 4)]


def with_adapter(model: Any, ids: list[int]) -> Any:
    with torch.no_grad(), model.use_adapter("p"):
        return model(torch.tensor([ids]), use_cache=True).past_key_values


IDS = [5, 6, 7, 8]
OTHERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "longer": (lambda m: bases_cache(m, [*IDS, 9]), "holds 5 tokens"),
    "empty": (lambda m: __import__("transformers").DynamicCache(), "holds 0 tokens"),
    "no cache": (lambda m: ((torch.zeros(1),),), "must be a DynamicCache"),
    "two rows": (lambda m: m(torch.tensor([IDS, IDS]), use_cache=True).past_key_values, "one row"),
    "another token": (lambda m: bases_cache(m, [5, 6, 7, 9]), "not what the base model computes"),
    "an adapter's": (lambda m: with_adapter(m, IDS), "not what the base model computes"),
    "other weights": (lambda m: bases_cache(handle("qwen2"), IDS), "not what the base model computes"),
    "more layers": (lambda m: bases_cache(handle(num_hidden_layers=3), IDS), "3 layers"),
    "fewer layers": (lambda m: bases_cache(handle(num_hidden_layers=1), IDS), "1 layers"),
    "other heads": (lambda m: bases_cache(handle(num_key_value_heads=2), IDS), "another model"),
    "other width": (lambda m: bases_cache(handle(head_dim=4), IDS), "another model"),
    "other dtype": (lambda m: bases_cache(handle().double(), IDS), "another model"),
    "slid away": (lambda m: bases_cache(handle("sliding"), [5, 6, 7, 8, 9, 10, 11, 12]), "one row of 8 tokens"),
}


@pytest.mark.parametrize(("other", "found"), OTHERS.values(), ids=OTHERS)
def test_a_cache_of_something_else_is_refused(
    other: Callable[[Any], Any], found: str, adapted: Callable[[str], Any]
) -> None:
    model = adapted("llama")
    ids = IDS if "8 tokens" not in found else [5, 6, 7, 8, 9, 10, 11, 12]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        cache = other(model)
    with pytest.raises(CacheError, match=found):
        model.session(ids, past_key_values=cache)


# ---------------------------------------------------------------------- what cannot be


def snapshot(session: Any) -> tuple[Any, ...]:
    return session._state, list(session.turns), session.ids.tolist()


@pytest.mark.parametrize(
    "ids",
    [[5, VOCABULARY], [-1], [1.0], [True], torch.tensor([0.5]), torch.zeros(2, 3, dtype=torch.long)],
    ids=["beyond", "negative", "float", "bool", "float tensor", "two rows"],
)
def test_tokens_that_are_none(ids: Any, adapted: Callable[[str], Any]) -> None:
    session = adapted("llama").session([5])
    with pytest.raises(TokenIndexError):
        session.extend(ids)
    with pytest.raises(TokenIndexError):
        adapted("llama").session(ids)
    assert session.ids.tolist() == [5]


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda s: s.rewind(4), CacheError),
        (lambda s: s.rewind(-1), CacheError),
        (lambda s: s.generate("nobody"), UnknownAdapterError),
        (lambda s: s.generate(["a", "nobody"]), UnknownAdapterError),
        (lambda s: s.generate("a", num_beams=2), CacheError),
        (lambda s: s.generate("a", do_sample=True, num_return_sequences=2), CacheError),
        (lambda s: s.generate("a", attention_mask=torch.ones(1, 3)), TypeError),
        (lambda s: s.generate("a", max_new_tokens=0), ValueError),
        (lambda s: s.generate("a", no_such_argument=1), ValueError),
    ],
)
def test_bad_calls_leave_the_session_as_it_was(
    act: Callable[[Any], Any], error: type[Exception], adapted: Callable[[str], Any]
) -> None:
    session = adapted("llama").session([5, 13, 14])
    session.logits("a")
    before = snapshot(session)
    with pytest.raises(error):
        act(session)
    assert snapshot(session) == before
    session.generate("a", 2, do_sample=False)


@pytest.mark.parametrize("cache", CACHES)
def test_an_error_in_the_middle_of_a_turn_leaves_the_session_as_it_was(
    cache: str, adapted: Callable[[str], Any]
) -> None:
    from transformers import StoppingCriteria

    class Trip(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> bool:
            if ids.shape[1] == 6:
                raise KeyboardInterrupt
            return torch.zeros(1, dtype=torch.bool)  # type: ignore[return-value]

    model = adapted("llama")
    session = model.session([5, 13, 14, 6], **CACHES[cache])
    session.prefill()
    before = snapshot(session)
    with pytest.raises(KeyboardInterrupt):
        session.generate("a", 5, do_sample=False, eos_token_id=None, stopping_criteria=[Trip()])
    assert snapshot(session) == before
    assert session.generate("a", 5, do_sample=False).tolist() == written_anew(
        model, torch.tensor([5, 13, 14, 6]), "a", 5
    )


def test_a_static_cache_that_is_too_short_is_refused_before_the_turn(adapted: Callable[[str], Any]) -> None:
    session = adapted("llama").session([5, 6, 7], cache="static", max_length=6)
    with pytest.raises(CacheError, match="need a cache of 7"):
        session.generate(max_new_tokens=5)
    assert len(session.generate(max_new_tokens=4, do_sample=False, eos_token_id=None)) == 4
    with pytest.raises(CacheError, match="need a cache of 7"):
        session.logits()
    session.rewind(1)
    session.logits()


def test_a_session_is_one_threads_at_a_time(adapted: Callable[[str], Any]) -> None:
    from transformers import StoppingCriteria

    session = adapted("llama").session([5, 6, 7])
    errors: list[BaseException] = []

    class Meanwhile(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> bool:
            thread = threading.Thread(target=self.intrude)
            thread.start()
            thread.join()
            assert session.fork().ids.tolist() == [5, 6, 7]  # the session before its turn
            return torch.zeros(1, dtype=torch.bool)  # type: ignore[return-value]

        def intrude(self) -> None:
            for act in (session.logits, session.generate, lambda: session.rewind(1), lambda: session.extend([5])):
                try:
                    act()
                except BusyError as error:
                    errors.append(error)

    session.generate(max_new_tokens=1, stopping_criteria=[Meanwhile()])
    assert (len(errors), len(session), len(session.turns)) == (4, 4, 1)


def test_a_write_waits_for_the_turn_and_cannot_come_from_inside(adapted: Callable[[str], Any]) -> None:
    from transformers import StoppingCriteria

    model = handle()
    session = model.session([5, 6, 7])

    class Merge(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> bool:
            model.merge_adapter(["p"])
            return torch.zeros(1, dtype=torch.bool)  # type: ignore[return-value]

    with pytest.raises(BusyError):
        session.generate(max_new_tokens=1, stopping_criteria=[Merge()])


def test_no_write_comes_between_the_look_at_the_weights_and_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = handle()
    session = model.session([5, 6, 7])
    merge = threading.Thread(target=model.merge_adapter, args=(["p"],))
    look = inlay.session.weights_of  # type: ignore[attr-defined]

    def look_and_let_write(inner: Any) -> Any:
        found = look(inner)
        merge.start()
        merge.join(0.1)
        assert merge.is_alive()
        return found

    monkeypatch.setattr("inlay.session.weights_of", look_and_let_write)
    session.logits("p")
    merge.join()
    monkeypatch.undo()
    torch.testing.assert_close(session.logits("p"), anew(model, session.ids, "p"), rtol=0, atol=1e-5)
    assert session.turns[-1].reused == 0


@pytest.mark.parametrize("cache", CACHES)
def test_turns_in_and_out_of_inference_mode(cache: str, adapted: Callable[[str], Any]) -> None:
    model = adapted("llama")
    session = model.session([5, 13, 14, 7], **CACHES[cache])
    with torch.inference_mode():
        session.generate("a", 2, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(session.logits("a"), anew(model, session.ids, "a"), rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(session.logits(), anew(model, session.ids, None), rtol=0, atol=1e-5)


def test_nothing_to_go_on_from(adapted: Callable[[str], Any]) -> None:
    with pytest.raises(CacheError, match="extend"):
        adapted("llama").session().logits()


def test_training_mode_is_refused() -> None:
    model = handle()
    session = model.session([5])
    model.train()
    with pytest.raises(CacheError, match="eval"):
        session.logits()


def test_a_prompt_is_refused() -> None:
    from inlay.prompts.prompt_tuning import PromptTuningConfig

    model = handle()
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    session = model.session([5, 13, 14])
    session.logits("a")
    with pytest.raises(CacheError, match="prompt"):
        session.logits("prompt")


@pytest.mark.parametrize("how", [{"cache": "offloaded"}, {"cache": "static"}, {"max_length": 9}])
def test_other_caches_are_refused(how: dict[str, Any], adapted: Callable[[str], Any]) -> None:
    with pytest.raises(CacheError, match="max_length"):
        adapted("llama").session([5], **how)


def linear_attention() -> Any:
    import transformers

    config = transformers.MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config)


@pytest.mark.parametrize(
    ("model", "targets", "found"),
    [
        (linear_attention, ["in_proj"], "LinearAttentionLayer"),
        ("t5", ["q"], "causal language model"),
        ("bert", ["query"], "causal language model"),
        ("mlp", ["lin0"], "causal language model"),
    ],
    ids=["mamba", "t5", "bert", "mlp"],
)
def test_models_whose_cache_cannot_be_shared(model: Any, targets: list[str], found: str, tiny: Any) -> None:
    base = tiny(model) if isinstance(model, str) else model()
    adapted = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=targets)).eval()
    with pytest.raises(CacheError, match=found):
        inlay.Session(adapted, [5])


def test_the_judges_share_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    source = (Path(__file__).parents[1] / "examples/judges.py").read_text()
    exec(compile(source.replace("2048", "40"), "judges.py", "exec"), {"__name__": "judges"})
    assert capsys.readouterr().out.count("2 tokens computed, 40 shared") == 3
