import re
import time
import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from inlay import patterns
from inlay.errors import PatternError
from inlay.patterns import Budget, KeyTable, compile_pattern

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(300)]


def by_relation(pattern: str) -> patterns.Pattern:
    """The pattern with the backtracking engine taken away."""
    compiled = compile_pattern(pattern)
    compiled._ways = patterns._ENDLESS
    return compiled


# ----------------------------------------------------------------------------------------------- the same as `re`

ATOMS = [
    "a",
    "b",
    "ab",
    ".",
    r"\.",
    "[ab]",
    "[^a]",
    r"\w",
    r"\d",
    "1",
    r"\b",
    r"\B",
    "^",
    "$",
    r"\A",
    r"\Z",
    "",
    "(?!)",
]
QUANTIFIERS = ["*", "+", "?", "*?", "+?", "??", "{0,2}", "{2}", "{1,3}?", "{2,}", "{0,9}"]
GROUPS = ["(", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?i:", "(?s:", "(?-i:"]


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: f"(?:{'|'.join(options)})"),
        st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.tuples(st.sampled_from(GROUPS), inner).map(lambda pair: f"{pair[0]}{pair[1]})"),
    )


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.recursive(st.sampled_from(ATOMS), grow, max_leaves=8),
    st.lists(st.text(alphabet="aAb.1\n", max_size=8), min_size=4, max_size=8),
)
@example("(?:a|ab)(?:c|bcd)*d?", ["abcd", "ac", "abcbcd"])
@example("(a?){3}(?:|b)+", ["aab", "", "bbb", "aaaa"])
@example("(?i)[a-c]+(?-i:X)", ["aBCX", "abx"])
@example("(?m:^b)|a$|(?s:.)+", ["a\n", "a", "\nb", ""])
@example("(?<!a)b(?=a)a|(?<=^)ab", ["ba", "ab", "b"])
@example(".*a.*a", ["aaaaaaaa", "aba.1a"])
@example(r"(?a:\w(?u:\w))+", ["aé", "éa", "aa"])
@example("(?=(?<=a)(?!ab)b*a)b+a", ["aba", "ba", "bba"])
def test_agrees_with_re(pattern: str, texts: list[str]) -> None:
    try:
        regex = re.compile(pattern)
    except re.error:
        return
    fast, slow = compile_pattern(pattern), by_relation(pattern)
    for text in texts:
        expected = regex.fullmatch(text) is not None
        assert fast.fullmatch(text) == expected, text
        assert slow.fullmatch(text) == expected, text


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (r".*\.(q|v)_proj", "model.layers.0.self_attn.q_proj", True),
        (r".*\.(q|v)_proj", "model.layers.0.self_attn.k_proj", False),
        (r"model\.layers\.(1[0-9]|2)\..*proj", "model.layers.17.mlp.up_proj", True),
        (r"model\.layers\.(1[0-9]|2)\..*proj", "model.layers.7.mlp.up_proj", False),
        (r"(?!.*vision).*q_proj", "model.vision.q_proj", False),
        (r"(?!.*vision).*q_proj", "model.text.q_proj", True),
        (r"(?i)MODEL\..*", "model.x", True),
        (r"(?:model\.)*(?:layers\.)+\d+", "model.model.layers.3", True),
    ],
)
def test_names(pattern: str, name: str, expected: bool) -> None:
    assert compile_pattern(pattern).fullmatch(name) is expected
    assert by_relation(pattern).fullmatch(name) is expected


# ------------------------------------------------------------------------------------------------------- no hanging


@pytest.mark.parametrize(
    "pattern",
    [
        # X-Z, not X: a pattern with a text that the name lacks is answered at once.
        r"(([a-z_.0-9])+)+[X-Z]",
        r"([a-z]+[a-z]+)+[X-Z]",
        r"((((([a-z.]*)*)*)*)*)*[X-Z]",
        r"(?:.|[a-z]|_)*(?:.|[a-z]|_)*[X-Z]",
        r"(?:a|a|ab)" * 30,
        r"(?:m|mo|o|d|.){5,50}" * 5 + "[X-Z]",
        ".*" * 20 + "[X-Z]",
        r"(?:(?:.?){100}){100}[X-Z]",
        r"(?=(.*a)*)" * 20 + ".*[X-Z]",
        r"(?:(?:[a-z.]{1,3}){2,5}){2,5}[X-Z]",
        r".*a.*l.*e.*[X-Z]",
    ],
)
def test_bombs_are_defused(pattern: str) -> None:
    name = "model.layers.10.self_attn.q_projmodel.layers.10.self_attn.q_"
    compiled = compile_pattern(pattern)
    start = time.thread_time()
    assert not compiled.fullmatch(name)
    assert time.thread_time() - start < 0.1


def test_the_bomb_of_the_issue_takes_milliseconds() -> None:
    compiled = compile_pattern(r"(([a-z_.0-9])+)+X")
    compiled.fullmatch("aX")
    start = time.thread_time()
    assert not compiled.fullmatch("a" * 60)
    assert not compiled.fullmatch("a" * 30 + "X" + "a" * 30)
    assert compiled.fullmatch("a" * 60 + "X")
    assert time.thread_time() - start < 0.01


def test_ordinary_patterns_cost_little_of_the_budget() -> None:
    budget = Budget(300 * 10)
    pattern = compile_pattern(r".*layers.*self_attn.*(?:q|k|v|o|gate|up|down)_proj", Budget())
    pattern._budget = budget
    assert all(map(pattern.fullmatch, NAMES[:30]))
    assert budget.left > 0


def test_a_budget_ends_what_would_take_too_long() -> None:
    pattern = compile_pattern("(?:m|mo|o|d|.)*" * 200 + "[X-Z]", Budget(100_000))
    with pytest.raises(PatternError, match=r"takes too long to match; avoid quantifiers inside quantifiers"):
        list(map(pattern.fullmatch, NAMES))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[", r"'\[' is malformed at position 0: unterminated character set"),
        ("a**", r"'a\*\*' is malformed at position 2: multiple repeat"),
        ("a(", r"'a\(' is malformed at position 1: missing \)"),
        ("(?<=a*)b", r"'\(\?<=a\*\)b' is malformed: look-behind requires fixed-width"),
        ("a{99999999999}", r"malformed: the repetition number is too large"),
        (r"(a)\1", "holds a backreference"),
        ("(a)?(?(1)b|c)", "holds a conditional"),
        ("(?>a)", "holds an atomic group"),
        ("(a|b)*+", "holds a possessive quantifier"),
        ("(" * 60 + "a" + ")" * 60, "nested too deeply; at most 50"),
        ("(" * 4000 + "a" + ")" * 4000, "nested too deeply; at most 50"),
        ("a" * 10_001, "has 10,001 characters, at most 10,000"),
        ("(?i)" + "[\0-\uffff]" * 1000, r"too wide character ranges for \(\?i\)"),
    ],
)
def test_refused_patterns(pattern: str, message: str) -> None:
    start = time.thread_time()
    with pytest.raises(PatternError, match=message):
        compile_pattern(pattern)
    assert time.thread_time() - start < 1


# -------------------------------------------------------------------------------------------------------- key tables


@pytest.mark.parametrize(
    ("table", "name", "expected"),
    [
        ({"q_proj": 1}, "model.q_proj", ("q_proj", 1)),
        ({"q_proj": 1}, "q_proj", ("q_proj", 1)),
        ({"q_proj": 1}, "model.xq_proj", None),
        ({"proj": 1}, "model.q_proj", None),
        ({"q_proj": 1, "layers.0.q_proj": 2}, "layers.0.q_proj", ("q_proj", 1)),
        ({"layers.0.q_proj": 2, "q_proj": 1}, "layers.0.q_proj", ("layers.0.q_proj", 2)),
        ({"layers.0.q_proj": 2, "q_proj": 1}, "layers.10.q_proj", ("q_proj", 1)),
        ({r"layers\.0\.q_proj": 2}, "model.layers.0.q_proj", (r"layers\.0\.q_proj", 2)),
        ({"^h.0.attn": 1}, "h.0.attn", ("^h.0.attn", 1)),
        ({"^h.0.attn": 1}, "model.h.0.attn", None),
        ({r"^h\.\d+\.attn": 1}, "h.11.attn", (r"^h\.\d+\.attn", 1)),
        ({r"^h\.\d+\.attn": 1}, "model.h.11.attn", None),
        ({r"h\.\d\.fc": 1, "fc": 2}, "m.h.1.fc", (r"h\.\d\.fc", 1)),
        ({"fc": 2, r"h\.\d\.fc": 1}, "m.h.1.fc", ("fc", 2)),
        ({"head|foo": 4}, "model.head", ("head|foo", 4)),
        ({".*attn.*": 4}, "model.attn.q", (".*attn.*", 4)),
        ({".*attn|fc": 4}, "model.fc", (".*attn|fc", 4)),
        ({"(?i)HEAD": 4}, "model.head", ("(?i)HEAD", 4)),
        ({"q_proj$": 4}, "model.q_proj", ("q_proj$", 4)),
        ({r"a\.b": 1, "a.b": 2}, "x.a.b", (r"a\.b", 1)),
        ({}, "q_proj", None),
        ({"q_proj": None}, "q_proj", ("q_proj", None)),
    ],
)
def test_key_table(table: dict[str, object], name: str, expected: tuple[str, object] | None) -> None:
    assert KeyTable(table).find(name) == expected


KEYS = st.sampled_from(
    ["a", "b", "a.b", r"a\.b", "^a", r"^a\.b", "a|b", r".*\.a", "[ab]", r"b\.\w", r"\w+", "a.1", "^.*b"]
)


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(KEYS, unique=True, max_size=6), st.lists(st.sampled_from(["a", "b", "1"]), min_size=1, max_size=4))
def test_key_table_agrees_with_re(keys: list[str], parts: list[str]) -> None:
    name = ".".join(parts)
    # The one difference by intent: the dots of a plain name are dots.
    plain = {key: re.sub(r"(?<!\\)\.", r"\\.", key) if re.fullmatch(r"\^?[\w.\\]+", key) else key for key in keys}
    first = next((key for key in keys if re.match(rf"(.*\.)?({plain[key]})$", name)), None)
    found = KeyTable(dict.fromkeys(keys, 0)).find(name)
    assert (found[0] if found else None) == first


def test_key_table_knows_what_was_never_used() -> None:
    table = KeyTable({"q_proj": 1, "k_prj": 2, r"layers\.\d\.fc": 3, "layers.0.q_proj": 4})
    assert table.unused() == ("q_proj", "k_prj", r"layers\.\d\.fc", "layers.0.q_proj")
    for name in ("layers.0.q_proj", "layers.0.k_proj", "layers.5.fc"):
        table.find(name)
    assert table.unused() == ("k_prj", "layers.0.q_proj")


def test_key_table_complains_in_terms_of_the_key() -> None:
    with pytest.raises(re.error, match=r"the pattern 'q_\(proj' is malformed at position 2"):
        KeyTable({"q_proj": 1, "q_(proj": 2})


def test_key_table_is_fast() -> None:
    names = [f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(1600)]
    start = time.thread_time()
    table = KeyTable({name: i for i, name in enumerate(names)})
    found = [table.find(name) for name in names]
    assert time.thread_time() - start < 0.05
    assert found == [(name, i) for i, name in enumerate(names)]
    assert table.unused() == ()


def test_no_warning_from_ordinary_patterns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_pattern(r"[a-z_.]+\[0\]").fullmatch("a.b[0]")
