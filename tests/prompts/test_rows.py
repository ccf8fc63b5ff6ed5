"""Several prompts in one model, chosen for a call, a thread, a task, and for every row of a batch."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import pytest
import torch
from prompts.batches import CELLS, DECODERS, LABELS, LENGTHS, Batch, base, batch, config, disturb, handle, windowed
from torch import Tensor

import inlay
from inlay.errors import RowsError, UnknownAdapterError
from inlay.prompts import PROMPTS

NAMES = (*LENGTHS, "lora")
BASE = "__base__"
MIXES: dict[str, tuple[str, ...]] = {
    "embeddings of one length": ("p3", "q3", "p3", "q3"),
    "embeddings": ("p3", "p5", BASE, "q3"),
    "cache of one length": ("k4", "j4", "k4"),
    "cache": ("k2", "k4", BASE, "j4"),
    "all": ("p3", "k4", BASE, "lora", "p5", "k2"),
}
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
}

cells = pytest.mark.parametrize(("arch", "task"), CELLS, ids=[f"{arch}-{task}" for arch, task in CELLS])
mixes = pytest.mark.parametrize("names", MIXES.values(), ids=MIXES)


@cache
def shared(arch: str, task: str) -> inlay.PeftModel:
    """A handle with all adapters, all trained, which no test changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = handle(arch, task, *NAMES)
    model.set_requires_grad(NAMES)
    return model


def choice(model: inlay.PeftModel, name: str) -> AbstractContextManager[None]:
    return model.disable_adapter() if name == BASE else model.use_adapter(name)


def front(name: str) -> int:
    """How many embeddings stand before a row."""
    return LENGTHS[name] if name[0] in "pq" else 0


def own(arch: str, name: str, t: Tensor, kept_L: Tensor) -> Tensor:
    """What of an output by token is the row's own: causal at the end, bidirectional behind the row's own prompt."""
    L = len(kept_L)
    t = t[:, -L:] if arch in DECODERS else t[:, front(name) : front(name) + L]
    return t[:, kept_L]


def results(out: Any, arch: str, task: str, name: str, kept_L: Tensor) -> dict[str, Tensor]:
    """What one row's call gives the row."""
    found = {key: out[key] for key in OUTPUTS if out.get(key) is not None}
    assert found
    whole = arch in ("t5", "bart") or task == "SEQ_CLS"
    return {k: t if whole or k == "pooler_output" else own(arch, name, t, kept_L) for k, t in found.items()}


def unreachable(arch: str, names: Sequence[str]) -> bool:
    """Whether rows have prompts of different lengths before a decoder that has learned positions and takes none."""
    return arch == "bart" and len({LENGTHS[n] if n[0] in "kj" else 0 for n in names}) > 1


def equal(a: Tensor, b: Tensor) -> None:
    tolerance = 1e-6 if a.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def paddings(arch: str) -> tuple[str, ...]:
    return ("right",) if arch in ("bert", "bart") else ("right", "left")


@cells
@mixes
@torch.no_grad()
def test_every_row_is_as_if_run_alone(arch: str, task: str, names: tuple[str, ...]) -> None:
    model = shared(arch, task)
    for padding in paddings(arch):
        rows = batch(arch, task, len(names), padding)
        if unreachable(arch, names):
            with pytest.raises(RowsError, match="position_ids"):
                model(**rows.inputs, adapter_names=names)
            continue
        out = model(**rows.inputs, adapter_names=names)
        for i, name in enumerate(names):
            with choice(model, name):
                alone = results(model(**rows.row(i)), arch, task, name, rows.kept_BL[i])
            row = {k: t[i : i + 1] for k, t in out.items() if k in OUTPUTS}
            for key, t in results(row, arch, task, name, rows.kept_BL[i]).items():
                equal(t, alone[key])


@cells
@torch.no_grad()
def test_padding_changes_nothing(arch: str, task: str) -> None:
    model, names = shared(arch, task), ("p3", "k4", BASE, "lora", "p5")
    for padding in ("right", "left") if arch in DECODERS else ("right",):
        rows = batch(arch, task, len(names), padding)
        for i, name in enumerate(names):
            kept = rows.kept_BL[i]
            with choice(model, name):
                padded = results(model(**rows.row(i)), arch, task, name, kept)
                bare = results(model(**rows.bare(i)), arch, task, name, kept[kept])
            for key, t in padded.items():
                equal(t, bare[key])


def weight(task: str, name: str, inputs: dict[str, Tensor]) -> int:
    """Over how many labels a row's loss is a mean."""
    if task in ("SEQ_CLS", "QUESTION_ANS"):
        return 1
    labels = inputs["labels"]
    first = 1 if task == "CAUSAL_LM" and not front(name) else 0  # nothing stands before it that could predict it
    return int((labels[:, first:] != -100).sum())


def gradients(model: inlay.PeftModel, loss: Tensor) -> dict[str, Tensor]:
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(trained.items(), found, strict=True)}


@pytest.mark.parametrize(
    ("arch", "task"),
    [c for c in CELLS if c[1] != "FEATURE_EXTRACTION" and c[0] not in ("mistral", "bloom", "opt")],
    ids=lambda part: part,
)
@mixes
def test_loss_and_gradients_are_sums_over_rows(arch: str, task: str, names: tuple[str, ...]) -> None:
    model = shared(arch, task)
    if unreachable(arch, names):
        return
    for padding in paddings(arch):
        rows = batch(arch, task, len(names), padding)
        loss = model(**rows.inputs, adapter_names=names)["loss"]
        weights = [weight(task, name, rows.row(i)) for i, name in enumerate(names)]
        alone = torch.zeros((), dtype=torch.float64)
        for i, name in enumerate(names):
            with choice(model, name):
                alone = alone + model(**rows.row(i))["loss"] * weights[i] / sum(weights)
        torch.testing.assert_close(loss.double(), alone, rtol=1e-5, atol=1e-5)  # transformers' loss is in fp32
        mine, expected = gradients(model, loss), gradients(model, alone)
        for key, gradient in mine.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
        used = {n for n in names if n not in (BASE, "lora")}
        assert all(mine[f"prompt_encoder.{n}.embedding.weight"].any() for n in used)


EVERY = {
    "prompt": inlay.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "tasks": inlay.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=3),
    "p": inlay.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "context": inlay.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 4]),
    "prefix": inlay.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True),
    "cartridge": inlay.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "lora": inlay.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
}


def every_method() -> inlay.PeftModel:
    made: inlay.PeftModel | None = None
    for name, one in EVERY.items():
        if made is None:
            made = inlay.get_peft_model(base("llama", "CAUSAL_LM"), copy.deepcopy(one), name)
        else:
            made.add_adapter(name, copy.deepcopy(one))
    assert made is not None
    disturb(made.double())
    return made.eval()


def test_rows_of_every_method() -> None:
    assert {one.method for one in EVERY.values()} == {"LORA", *PROMPTS}
    model, names = every_method(), (BASE, *EVERY)
    rows = prompts_of(batch("llama", "CAUSAL_LM", len(names), "left", labels=False))
    tasks = torch.arange(len(names)) % 3
    options = {"max_new_tokens": 4, "eos_token_id": 63}
    with torch.no_grad():
        out = model(**rows.inputs, adapter_names=names, task_ids=tasks).logits
        found = model.generate(**rows.inputs, adapter_names=names, task_ids=tasks, **options)
        for i, name in enumerate(names):
            given = {**rows.row(i), **({"task_ids": tasks[i : i + 1]} if name == "tasks" else {})}
            with choice(model, name):
                equal(out[i : i + 1, -6:][:, rows.kept_BL[i]], model(**given).logits[:, -6:][:, rows.kept_BL[i]])
                alone = model.generate(**given, **options)
            assert torch.equal(found[i : i + 1, : alone.shape[1]], alone)
    with pytest.raises(RowsError, match="'context' has a loss"):
        model(**rows.inputs, labels=rows.inputs["input_ids"], adapter_names=names, task_ids=tasks)
    model.set_requires_grad(EVERY)
    others = [name if name != "context" else BASE for name in names]
    model(**rows.inputs, labels=rows.inputs["input_ids"], adapter_names=others, task_ids=tasks).loss.backward()
    trained = {n for n in EVERY for k, p in model.named_parameters() if f".{n}." in k and p.grad is not None}
    assert trained == set(EVERY) - {"context"}


@torch.no_grad()
def test_a_classifier_with_a_decoder_has_rows_too() -> None:
    model = handle("t5", "SEQ_CLS", "k2", "k4")
    names, rows = ("k2", "k4", BASE, "k2"), prompts_of(batch("t5", "CAUSAL_LM", 4, labels=False))
    rows.inputs["input_ids"][:, 2] = 2  # it classifies by the end of the text
    rows.inputs["input_ids"][:, 3:] = 0
    out = model(**rows.inputs, adapter_names=names).logits
    for i, name in enumerate(names):
        with choice(model, name):
            equal(out[i : i + 1], model(**rows.row(i)).logits)


@pytest.mark.parametrize("how", GENERATE)
@mixes
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "t5", "bart"])
@torch.no_grad()
def test_every_row_generates_as_if_alone(arch: str, names: tuple[str, ...], how: str) -> None:
    task = "CAUSAL_LM" if arch in DECODERS else "SEQ_2_SEQ_LM"
    model, options = shared(arch, task), {**GENERATE[how], "max_new_tokens": 6, "eos_token_id": 63}
    times = options.get("num_return_sequences", 1)
    rows = prompts_of(batch(arch, task, len(names), "left" if arch in DECODERS else "right", labels=False))
    if unreachable(arch, names):
        with pytest.raises(RowsError, match="of one length"):
            model.generate(**rows.inputs, adapter_names=names, **options)
        return
    found = model.generate(**rows.inputs, adapter_names=names, **options)
    for i, name in enumerate(names):
        with choice(model, name):
            alone, bare = (model.generate(**one, **options) for one in (rows.row(i), rows.bare(i)))
        mine = found[i * times : (i + 1) * times]
        assert torch.equal(mine[:, : alone.shape[1]], alone)
        assert torch.equal(alone[:, -6:], bare[:, -6:])


def prompts_of(rows: Batch) -> Batch:
    return Batch({k: rows.inputs[k] for k in ("input_ids", "attention_mask")}, rows.kept_BL)


@pytest.mark.parametrize(
    ("mine", "asked"),
    [
        ({"max_length": 12}, {"max_new_tokens": 6}),
        ({"max_new_tokens": 6, "num_beams": 3}, {"max_new_tokens": 6, "num_beams": 3}),
        ({"max_new_tokens": 6, "use_cache": False}, {"max_new_tokens": 6}),
        ({"max_new_tokens": 6, "cache_implementation": "static"}, {"max_new_tokens": 6}),
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("where", ["the model's config", "a config"])
@torch.no_grad()
def test_generation_configs_hold(mine: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Rows of 6 tokens, so that a whole length of 12 leaves 6 new ones however long the prompt is."""
    from transformers import GenerationConfig

    model, names = handle("llama", "CAUSAL_LM", "p3", "k4", "lora"), ("p3", "k4", BASE, "lora")
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    rows = prompts_of(batch("llama", "CAUSAL_LM", len(names), "left", labels=False))
    expected = model.generate(**rows.inputs, adapter_names=names, **asked)
    assert expected.shape == (4, 12)
    options = {}
    if where == "a config":
        options = {"generation_config": GenerationConfig(pad_token_id=0, **mine)}
    else:
        model.generation_config.update(**mine)
    assert torch.equal(model.generate(**rows.inputs, adapter_names=names, **options), expected)
    for i, name in enumerate(names):
        with choice(model, name):
            assert torch.equal(model.generate(**rows.row(i), **options), expected[i : i + 1])


@torch.no_grad()
def test_a_decoder_may_be_given_its_beginning_and_mask() -> None:
    model = shared("t5", "SEQ_2_SEQ_LM")
    rows = prompts_of(batch("t5", "SEQ_2_SEQ_LM", 3, labels=False))
    begun = torch.tensor([[0, 5, 6]] * 3)
    for given in ({"decoder_input_ids": begun}, {"decoder_input_ids": begun, "decoder_attention_mask": begun * 0 + 1}):
        names = ("k4", "j4", "k4")
        found = model.generate(**rows.inputs, **given, adapter_names=names, max_new_tokens=4)
        for i, name in enumerate(names):
            with choice(model, name):
                alone = model.generate(**rows.row(i), **{k: t[:1] for k, t in given.items()}, max_new_tokens=4)
            assert torch.equal(found[i : i + 1, : alone.shape[1]], alone)
    with pytest.raises(RowsError, match="decoder_input_ids"):
        model.generate(**rows.inputs, decoder_input_ids=begun, adapter_names=("k2", "k4", BASE), max_new_tokens=4)


@torch.no_grad()
def test_adapters_generate_different_tokens() -> None:
    """What the tests above compare would say nothing if all adapters gave the same."""
    for arch, task in (("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")):
        model, rows = shared(arch, task), prompts_of(batch(arch, task, 1, labels=False))
        found = set()
        for name in (BASE, *NAMES):
            with choice(model, name):
                found.add(tuple(model.generate(**rows.inputs, max_new_tokens=6).flatten().tolist()))
        assert len(found) >= 6, arch


@pytest.mark.parametrize("arch", DECODERS)
@torch.no_grad()
def test_a_cache_goes_on_with_the_same_rows(arch: str) -> None:
    model, names = shared(arch, "CAUSAL_LM"), MIXES["all"]
    rows = batch(arch, "CAUSAL_LM", len(names), "left", labels=False)
    whole = model(**rows.inputs, adapter_names=names).logits[:, -2:]
    mask = rows.inputs["attention_mask"]
    first, last = ({k: t[:, at] for k, t in rows.inputs.items()} for at in (slice(4), slice(4, None)))
    past = model(**first, adapter_names=names, use_cache=True).past_key_values
    out = model(**{**last, "attention_mask": mask}, past_key_values=past, adapter_names=names)
    equal(out.logits[:, -2:], whole)


# ---------------------------------------------------------------- what rows cannot be


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (("p3", "nobody", BASE), UnknownAdapterError, "nobody"),
        (("p3", "k4"), RowsError, "2 names for a batch of 3"),
        ("p3", RowsError, "got the str"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Sequence[str], error: type[Exception], match: str) -> None:
    model, rows = shared("llama", "CAUSAL_LM"), prompts_of(batch("llama", "CAUSAL_LM", 3, labels=False))
    for call in (model, model.generate):
        with pytest.raises(error, match=match):
            call(**rows.inputs, adapter_names=names)


def without_positions(arch: str) -> inlay.PeftModel:
    """A model of somebody's own whose forward takes no position_ids."""
    inner = type(base(arch, "CAUSAL_LM"))

    class Unnumbered(inner):  # type: ignore[misc, valid-type]
        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            past_key_values: Any = None,
            inputs_embeds: Any = None,
            labels: Any = None,
        ) -> Any:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
            )

    model = base(arch, "CAUSAL_LM")
    model.__class__ = Unnumbered
    made = inlay.get_peft_model(model, config(arch, "CAUSAL_LM", "p3"), "p3")
    for name in ("q3", "p5", "k2", "k4", "j4"):
        made.add_adapter(name, config(arch, "CAUSAL_LM", name))
    return made.double().eval()


@pytest.mark.parametrize("names", [("p3", "p5"), ("k2", "k4"), ("p3", BASE), ("k2", BASE), ("p3", "k4")])
def test_learned_positions_that_cannot_be_given_are_refused(names: tuple[str, ...]) -> None:
    model, rows = without_positions("gpt2"), prompts_of(batch("gpt2", "CAUSAL_LM", 2))
    with pytest.raises(RowsError, match="takes no position_ids"):
        model(**rows.inputs, adapter_names=names)
    for fits in (("p3", "q3"), ("k4", "j4")):
        out = model(**rows.inputs, adapter_names=fits).logits
        with model.use_adapter(fits[1]):
            equal(out[1:, -6:], model(**rows.row(1)).logits[:, -6:])


@torch.no_grad()
def test_rotary_positions_need_not_be_given() -> None:
    model, rows = without_positions("llama"), prompts_of(batch("llama", "CAUSAL_LM", 2))
    for names in (("p3", "p5"), ("p3", BASE)):
        out = model(**rows.inputs, adapter_names=names).logits
        for i, name in enumerate(names):
            with choice(model, name):
                alone = model(**rows.row(i)).logits
            equal(out[i : i + 1, -6:][:, rows.kept_BL[i]], alone[:, -6:][:, rows.kept_BL[i]])
    with pytest.raises(RowsError, match="takes no position_ids"):  # keys of prompts are not turned
        model(**rows.inputs, adapter_names=("k2", "k4"))


@torch.no_grad()
def test_a_window_that_would_count_padding_is_refused() -> None:
    model = handle("mistral", "CAUSAL_LM", "p5", "k4", model=windowed(8))
    rows = prompts_of(batch("mistral", "CAUSAL_LM", 2, "left"))
    for call in (model, model.generate):
        with pytest.raises(RowsError, match="counts the padding between them"):
            call(**rows.inputs, adapter_names=("p5", "k4"))
    out = model(**rows.inputs, adapter_names=("k4", BASE)).logits  # padding in front is none of its tokens' business
    with model.use_adapter("k4"):
        equal(out[:1, -6:], model(**rows.row(0)).logits[:, -6:])


# ---------------------------------------------------------------- for a call, a thread, a task


@torch.no_grad()
def test_a_choice_holds_where_it_was_made() -> None:
    model = handle("llama", "CAUSAL_LM", "p3", "k4", "lora")
    rows = prompts_of(batch("llama", "CAUSAL_LM", 2))
    bare = base("llama", "CAUSAL_LM")(**rows.inputs).logits

    def run() -> Tensor:
        return model(**rows.inputs).logits

    found = {}
    for name in ("p3", "k4", "lora"):
        model.set_adapter(name)
        found[name] = run()
        equal(model(**rows.inputs, adapter_names=[name] * 2).logits, found[name])
        with model.disable_adapter():
            equal(run(), bare)
    assert found["p3"].shape[1] == 6 + 3
    assert found["k4"].shape[1] == found["lora"].shape[1] == 6
    seen: list[Tensor] = []
    with model.use_adapter("p3"):
        equal(run(), found["p3"])
        thread = threading.Thread(target=lambda: seen.append(run()))
        thread.start()
        thread.join()
        with model.use_adapter("k4"):
            equal(run(), found["k4"])
        equal(run(), found["p3"])
    with torch.no_grad():
        equal(seen[0], found["lora"])
        equal(run(), found["lora"])
    for name, out in found.items():
        model.set_adapter(name)
        model.base_model.disable_adapter_layers()
        equal(run(), bare)
        model.base_model.enable_adapter_layers()
        equal(run(), out)


@torch.no_grad()
def test_tasks_of_one_loop_are_kept_apart() -> None:
    model, rows = shared("llama", "CAUSAL_LM"), prompts_of(batch("llama", "CAUSAL_LM", 2))
    expected = {}
    for name in (BASE, *NAMES):
        with choice(model, name):
            expected[name] = model(**rows.inputs).logits

    async def one(name: str) -> None:
        with choice(model, name):
            for _ in range(3):
                await asyncio.sleep(0)
                equal(model(**rows.inputs).logits, expected[name])

    async def all_of_them() -> None:
        await asyncio.gather(*(one(name) for name in expected))

    asyncio.run(all_of_them())


@torch.no_grad()
def test_heads_are_those_of_the_rows() -> None:
    model = handle("bert", "SEQ_CLS", "p3", "lora")
    rows = batch("bert", "SEQ_CLS", 3)
    heads = model.get_base_model().classifier
    with torch.no_grad():
        for name, value in (("p3", 5.0), ("lora", 7.0)):
            heads.modules_to_save[name].weight.zero_()
            heads.modules_to_save[name].bias.fill_(value)
    logits = model(**rows.inputs, adapter_names=["p3", BASE, "lora"]).logits
    equal(logits[0], torch.full((LABELS,), 5.0).double())
    equal(logits[2], torch.full((LABELS,), 7.0).double())
    equal(logits[1:2], base("bert", "SEQ_CLS")(**rows.row(1)).logits)
