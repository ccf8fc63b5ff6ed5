"""Every way to learn a prompt x task class x architecture, by laws.

What a method is (its encoder, its files) and how its prompt comes in are two things: the laws of the first run for all
methods, those of the second for one method of each way in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts.cells import FAIL_IN_PEFT, FIVE, METHODS, UNSUPPORTED, WAYS, Cell, cells, supported, tensors
from prompts.models import inputs_of, model_of
from torch import Tensor

import inlay
from inlay.errors import PeftError, PromptError
from inlay.prompts import PROMPTS


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], why: str = "") -> None:
    assert a.keys() == b.keys(), why
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{why} {n}: {m}")


def differ(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return any(a[n].shape != b[n].shape or not torch.allclose(a[n], b[n], atol=1e-4) for n in a)


def run(handle: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors(handle(**given))


# ---------------------------------------------------------------- laws of every method


def test_every_method_is_in_the_grid() -> None:
    assert METHODS.keys() == PROMPTS.keys()
    assert {("cache" if PROMPTS[m].config.in_cache else "front") for m in METHODS} == WAYS.keys()


@pytest.mark.parametrize("way", WAYS)
def test_what_peft_supports_is_the_floor(way: str) -> None:
    assert UNSUPPORTED[way].keys() <= FAIL_IN_PEFT[way]


@pytest.mark.parametrize("cell", supported(METHODS))
def test_it_trains_alone_and_is_saved(cell: Cell, tmp_path: Path) -> None:
    handle, given = cell.handle(), cell.inputs()
    outputs = handle(**given)
    out = tensors(outputs)

    # finite numbers, of the right shapes
    bare = run(model_of(cell.architecture, cell.task), inputs_of(cell.architecture, cell.task))
    assert out.keys() == bare.keys()
    for name, t in out.items():
        assert t.isfinite().all(), name
        longer = list(bare[name].shape)
        longer[1] += cell.front() if name != "pooler_output" else 0
        assert list(t.shape) == longer, name
    assert differ({n: t[:, -bare[n].shape[1] :] for n, t in out.items()}, bare), "the prompt has no effect"

    # gradients of the prompt and the heads, and of nothing else
    loss = outputs["loss"] if "loss" in outputs else sum(t.sum() for t in out.values())
    assert loss.isfinite()
    loss.backward()
    with_gradient = {n for n, p in handle.named_parameters() if p.grad is not None}
    trained = {n for n, p in handle.named_parameters() if p.requires_grad}
    assert with_gradient == trained
    assert all(".modules_to_save." in n or n.startswith("prompt_encoder.") for n in trained)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in handle.prompt_encoder.parameters())

    # switched off, it is the bare model; switched on again, the same as before
    with handle.disable_adapter():
        close(run(handle, inputs_of(cell.architecture, cell.task)), bare, "disabled")
    again = run(handle, given)
    assert all(torch.equal(t, again[n]) for n, t in out.items()), "not the same twice"

    # a file has it all
    for p in handle.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    wanted = run(handle, given)
    assert differ(wanted, again)
    handle.save_pretrained(tmp_path)
    loaded = inlay.PeftModel.from_pretrained(model_of(cell.architecture, cell.task), tmp_path).eval()
    assert type(loaded) is type(handle)
    close(run(loaded, given), wanted, "loaded")


@pytest.mark.parametrize(
    "cell", [pytest.param(c, id=f"{c.method}-{c.architecture}-{c.task}") for c in cells(METHODS) if c.reason]
)
def test_what_cannot_be_is_refused_by_name(cell: Cell) -> None:
    model = model_of(cell.architecture, cell.task)
    before, names = copy.deepcopy(model.state_dict()), list(dict(model.named_modules()))
    with pytest.raises(PromptError, match=cell.reason):
        inlay.get_peft_model(model, cell.config())
    assert list(dict(model.named_modules())) == names
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- laws of each way in

ways = pytest.mark.parametrize("cell", supported(WAYS.values()))


def without(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k not in names}


def alone(given: Mapping[str, Any], row: int, at: slice) -> dict[str, Any]:
    """One row of a batch, of these of its tokens."""
    L = given["input_ids"].shape[1]
    cut = {}
    for name, value in given.items():
        value = value[row : row + 1]
        of_tokens = value.dim() == 2 and value.shape[1] == L and not name.startswith("decoder")
        cut[name] = value[:, at] if of_tokens else value
    return cut


def own(cell: Cell, out: Mapping[str, Tensor], row: int, at: slice) -> dict[str, Tensor]:
    """What a model gave for one row, at these tokens where it gives something for each."""
    tokenwise = cell.task in ("CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS") or "last_hidden_state" in out
    tokenwise = tokenwise and not (cell.seq2seq and cell.task == "FEATURE_EXTRACTION")
    return {
        k: t[row : row + 1, at] if tokenwise and k != "pooler_output" else t[row : row + 1] for k, t in out.items()
    }


@ways
def test_padding_changes_nothing(cell: Cell) -> None:
    handle, given = cell.handle(), cell.inputs()
    batch, mask = run(handle, given), given["attention_mask"]
    for row in range(3):
        n = int(mask[row].sum())
        single = run(handle, without(alone(given, row, slice(n)), "attention_mask"))
        close(own(cell, batch, row, slice(cell.front() + n)), single, f"row {row}")


#: where padding in front of a row is not as if it were not there
SEEN = {
    **dict.fromkeys(("bert", "electra", "distilbert"), "it has positions, in the bare model too"),
    **dict.fromkeys(("mistral", "gemma2", "gemma3"), "a sliding window counts it, and the prompt leaves it sooner"),
}


def seen_in_front(cell: Cell) -> str | None:
    """Why padding in front of a row is not as if it were not there."""
    if cell.architecture in ("mistral", "gemma2", "gemma3") and cell.task == "SEQ_CLS" and cell.way == "front":
        return None  # there it goes before the prompt
    if cell.architecture == "bart" and (cell.task == "CAUSAL_LM" or cell.way == "cache"):
        return SEEN["bert"]
    if cell.task in ("SEQ_CLS", "QUESTION_ANS") and cell.seq2seq:
        return "it stands before the decoder's input too"
    if cell.architecture == "roberta" and cell.way == "cache" and cell.task in ("SEQ_CLS", "FEATURE_EXTRACTION"):
        return "it is the first token, which is pooled, in the bare model too"
    if (cell.architecture, cell.task) == ("t5", "TOKEN_CLS"):
        return "the distance to the prompt counts it"
    return SEEN.get(cell.architecture)


@pytest.mark.parametrize("cell", supported(WAYS.values(), unless=seen_in_front))
def test_padding_in_front_changes_nothing(cell: Cell) -> None:
    handle, given = cell.handle(), cell.inputs(padded=False)
    L, mask = 7, torch.ones_like(given["input_ids"])
    mask[1, :3], mask[2, :1] = 0, 0
    given = {**given, "input_ids": given["input_ids"].masked_fill(mask == 0, 0), "attention_mask": mask}
    given = without(given, "start_positions", "end_positions")
    batch = run(handle, given)
    for row in range(3):
        n = int(mask[row].sum())
        single = run(handle, without(alone(given, row, slice(L - n, L)), "attention_mask"))
        close(own(cell, batch, row, slice(-n, None)), own(cell, single, 0, slice(-n, None)), f"row {row}")


@ways
def test_what_is_left_out_is_what_is_meant(cell: Cell) -> None:
    handle, given = cell.handle(), cell.inputs(padded=False)
    wanted = run(handle, given)
    close(run(handle, without(given, "attention_mask")), wanted, "no mask")
    close(run(handle, {**given, "use_cache": False}), wanted, "no cache")
    L = torch.arange(7).expand(3, -1)
    if cell.numbered:
        first = 1 if cell.architecture == "roberta" else 0
        close(run(handle, {**given, "position_ids": L + first}), wanted, "positions")
        moved = run(handle, {**given, "position_ids": L.flip(1) + first})
        assert differ(moved, wanted), "position_ids have no effect"
    elif not cell.seq2seq and cell.architecture != "bart":
        with pytest.raises((PromptError, TypeError), match="position_ids"):
            handle(**given, position_ids=L)


TYPED = ("bert", "bert-decoder", "roberta", "electra", "gpt2", "gpt_bigcode")


@pytest.mark.parametrize("cell", supported(WAYS.values(), unless=lambda cell: cell.architecture not in TYPED))
def test_types_of_tokens_count(cell: Cell) -> None:
    handle, given = cell.handle(), cell.inputs()
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(3, -1)
    zeros = run(handle, {**given, "token_type_ids": types * 0})
    if cell.architecture == "roberta":  # there is one type
        close(zeros, run(handle, given))
        return
    assert differ(run(handle, {**given, "token_type_ids": types}), zeros)
    if "gpt" not in cell.architecture:  # where a type is a token, and none is not the first
        close(zeros, run(handle, given))


def feeds_decoder(cell: Cell) -> bool:
    """Whether the model makes its decoder's input of the ids."""
    return cell.seq2seq and cell.task in ("SEQ_CLS", "QUESTION_ANS")


@pytest.mark.parametrize("cell", supported(WAYS.values(), unless=feeds_decoder))
def test_embeddings_for_ids(cell: Cell) -> None:
    handle, given = cell.handle(), cell.inputs(padded=False)
    x_BLD = handle.get_input_embeddings()(given["input_ids"]).detach()
    close(run(handle, {**without(given, "input_ids"), "inputs_embeds": x_BLD}), run(handle, given))


@ways
def test_tuples(cell: Cell) -> None:
    handle, given = cell.handle(), cell.inputs()
    with torch.no_grad():
        wanted = handle(**given).to_tuple()
        found = handle(**given, return_dict=False)
    assert isinstance(found, tuple)
    for a, b in zip(found, wanted, strict=True):
        if isinstance(b, Tensor):
            assert torch.equal(a, b)


def asked_before(cell: Cell) -> bool:
    """Whether a law that does not look at the model has been asked of enough of them."""
    return cell.way == "cache" and cell.architecture not in FIVE


@pytest.mark.parametrize("cell", supported(WAYS.values(), unless=asked_before))
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing(cell: Cell, reentrant: bool) -> None:
    stored, given = cell.handle().train(), cell.inputs()
    recomputed = cell.handle().train()
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed.enable_input_require_grads()
    if cell.way == "cache":
        with pytest.raises(PromptError, match="gradient checkpointing"):
            recomputed(**given)
        model = model_of(cell.architecture, cell.task)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with pytest.raises(PromptError, match="gradient checkpointing"):
            inlay.get_peft_model(model, cell.config())
        recomputed.eval()  # nothing is recomputed
        close(run(recomputed, given), run(stored.eval(), given))
        return
    gradients = []
    for handle in (stored, recomputed):
        outputs = handle(**given)
        loss = outputs["loss"] if "loss" in outputs else outputs[0].square().sum()
        loss.backward()
        gradients.append({n: p.grad for n, p in handle.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(n.startswith("prompt_encoder.") for n in gradients[0])
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", supported(WAYS.values(), unless=lambda cell: cell.architecture not in FIVE))
def test_half_precision(cell: Cell) -> None:
    """The prompt stays in 32 bits, and what the model reads of it is of the model's dtype."""
    torch.manual_seed(0)
    model = model_of(cell.architecture, cell.task).to(torch.bfloat16)
    handle, given = inlay.get_peft_model(model, cell.config()), cell.inputs()
    outputs = handle(**given)
    out, wanted = tensors(outputs), run(cell.handle(), given)
    for name, t in out.items():
        assert t.dtype == torch.bfloat16
        assert (t.float() - wanted[name]).abs().mean() < 0.1 * wanted[name].std(), name
    next(iter(out.values())).float().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in handle.prompt_encoder.parameters())


def _short_cache() -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(3, 2, 2, 4), torch.zeros(3, 2, 2, 4), layer)
    return cache


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no input": ("llama", {"input_ids": None}, "input_ids or inputs_embeds"),
    "a mask of pairs": ("llama", {"attention_mask": torch.ones(3, 1, 7, 7)}, r"\(batch, tokens\)"),
    "positions in three dimensions": ("llama", {"position_ids": torch.zeros(3, 3, 7).long()}, r"\(batch, tokens\)"),
    "a cache without the prompt": ("llama", {"past_key_values": _short_cache}, "holds 2 tokens, the prompt has 4"),
    "what is no cache": ("llama", {"past_key_values": ((), ())}, "got a tuple"),
    "too long": ("gpt2", {"input_ids": torch.full((3, 46), 5)}, "48 positions"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", REFUSED)
def test_calls_that_are_refused_by_name(way: str, what: str) -> None:
    name, given, match = REFUSED[what]
    handle = Cell(WAYS[way], name, "CAUSAL_LM", METHODS[WAYS[way]]).handle()
    given = {"input_ids": torch.full((3, 7), 5), **given}
    given = {k: v() if callable(v) else v for k, v in given.items()}
    with pytest.raises(PromptError, match=match):
        handle(**given)
    assert handle(input_ids=torch.full((3, 7), 5)).logits.isfinite().all()


def test_what_is_said_of_each_token_is_refused_by_name() -> None:
    handle = Cell("PROMPT_TUNING", "llama", "CAUSAL_LM", METHODS["PROMPT_TUNING"]).handle()
    with pytest.raises(PromptError, match="token_weights has an entry for each token"):
        handle(input_ids=torch.full((3, 7), 5), token_weights=torch.ones(3, 7))


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if "num_virtual_tokens" in row.config])
@pytest.mark.parametrize(
    ("more", "match"),
    [({"num_virtual_tokens": 48}, "48 positions"), ({"num_virtual_tokens": None}, "num_virtual_tokens")],
)
def test_configs_that_are_refused_by_name(method: str, more: dict[str, Any], match: str) -> None:
    cell = Cell(method, "gpt2", "CAUSAL_LM", METHODS[method])
    config = PROMPTS[method].config(task_type="CAUSAL_LM", **{**cell.row.config, **more})
    model = model_of("gpt2", "CAUSAL_LM")
    with pytest.raises(PeftError, match=match):
        inlay.get_peft_model(model, config)
    assert all(p.requires_grad for p in model.parameters())
    assert not [m for m in model.modules() if type(m).__module__.startswith("inlay.")]
