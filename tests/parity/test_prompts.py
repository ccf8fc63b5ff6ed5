"""Prompts beside the incumbent's: the same weights, the same numbers, the same text, and files both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.helpers import assert_equal_tensors, peft, peft_may_warn
from prompts.cells import FIVE, METHODS, WAYS, Cell, T, cells, supported, tensors
from prompts.models import inputs_of, model_of
from safetensors.torch import load_file
from torch import Tensor

import inlay
from inlay.errors import PromptError, UnknownAdapterError, UnsupportedLayerError
from inlay.prompts import PROMPTS
from inlay.prompts._placed import shift_tokens_right
from inlay.prompts.legacy import bloom_model_postprocess_past_key_value, starcoder_model_postprocess_past_key_value


def theirs_of(cell: Cell) -> Any:
    """PEFT's handle before the same model; it has to be told where a width is not the model's."""
    more: dict[str, Any] = {}
    if cell.architecture == "distilbert":
        more = {"token_dim": 16, "num_attention_heads": 4, "num_layers": 2}
    elif cell.way == "front" and cell.architecture in ("electra", "opt"):
        more = {"token_dim": 8}
    config = getattr(peft, PROMPTS[cell.method].config.__name__)
    with peft_may_warn():
        model = model_of(cell.architecture, cell.task)
        return peft.get_peft_model(model, config(task_type=cell.task, **cell.row.config, **more)).eval()


def pair_of(cell: Cell) -> tuple[Any, Any]:
    """(ours, theirs), of the same weights."""
    ours, theirs = cell.handle(), theirs_of(cell)
    theirs.prompt_encoder.load_state_dict(ours.prompt_encoder.state_dict())
    return ours, theirs


def in_peft(given: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """The same call for PEFT, which leaves to the caller what of the labels has to make way for a prompt."""
    given = dict(given)
    if cell.way == "front" and cell.task == "TOKEN_CLS":
        given["labels"] = torch.cat([torch.full((len(given["labels"]), T), -100), given["labels"]], 1)
    if cell.way == "front" and cell.task == "QUESTION_ANS":
        given.update({k: given[k] + T for k in ("start_positions", "end_positions")})
    return given


def called(handle: Any, given: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(outputs and loss, gradients)."""
    handle.zero_grad()
    with peft_may_warn():
        outputs = handle(**given)
    out = tensors(outputs)
    if outputs.get("loss") is None:
        sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in out.values()).backward()
    else:
        out["loss"] = outputs["loss"]
        out["loss"].backward()
    return out, {n: p.grad for n, p in handle.named_parameters() if p.grad is not None}


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def live(name: str) -> str:
    """A live name of PEFT's: there no tuner stands between the handle and the model."""
    return name if name.startswith("prompt_encoder.") else name.replace("base_model.", "base_model.model.", 1)


FLOOR = [
    pytest.param(*param.values, id=param.id, marks=[] if param.values[0].architecture in FIVE else pytest.mark.slow)
    for param in supported(METHODS, unless=lambda cell: cell.fails_in_peft)
]


@pytest.mark.parametrize("cell", FLOOR)
def test_numbers_and_gradients(cell: Cell) -> None:
    ours, theirs = pair_of(cell)
    # A classifier that reads the last token reads padding there: see `test_padding_behind_a_row_that_is_classified`.
    padded = cell.front() > 0 or cell.way == "cache" or cell.task != "SEQ_CLS" or cell.architecture == "bert"
    given = cell.inputs(padded=padded)
    (out, gradients), (out_there, gradients_there) = called(ours, given), called(theirs, in_peft(given, cell))
    close(out, out_there)
    # There "classifier" names whatever ends so.
    close(gradients, {live(n): g for n, g in gradients_there.items() if ".pre_classifier." not in n})


GENERATED: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 6},
    "beams": {"max_new_tokens": 6, "num_beams": 3},
    "several beams": {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
    "sampled": {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5},
    "several samples": {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
    "max_length": {"max_length": 12},
    "min_length": {"max_length": 14, "min_length": 13, "eos_token_id": list(range(3, 40))},
    "min_new_tokens": {"max_new_tokens": 8, "min_new_tokens": 5, "eos_token_id": list(range(3, 40))},
    "eos": {"max_new_tokens": 8, "eos_token_id": list(range(3, 20))},
    "penalties": {"max_new_tokens": 8, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "scores": {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}
GENERATING = [c for c in cells(METHODS) if c.architecture in FIVE and c.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")]


def generated(handle: Any, given: Mapping[str, Any]) -> Any:
    torch.manual_seed(3)
    with peft_may_warn():
        return handle.generate(**given)


@pytest.mark.parametrize("cell", GENERATING, ids=lambda c: f"{c.method}-{c.architecture}")
def test_the_same_text(cell: Cell) -> None:
    ours, theirs = pair_of(cell)
    ids_BL = cell.inputs(padded=False)["input_ids"]
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :2] = 0
    given: dict[str, Any] = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL), **cell.row.call(3)}
    if cell.way == "cache":  # else see `test_padding_in_front_of_a_prompt`
        given.update(input_ids=ids_BL.masked_fill(mask_BL == 0, 0), attention_mask=mask_BL)
    assert torch.equal(*(generated(h, {"input_ids": ids_BL, **cell.row.call(3)}) for h in (ours, theirs)))
    for name in GENERATED if cell.method in WAYS.values() else ("greedy", "several beams"):
        a, b = (generated(handle, {**given, **GENERATED[name]}) for handle in (ours, theirs))
        if not isinstance(a, Tensor):
            assert a.keys() == b.keys()
            assert len(a.scores) == len(b.scores)
            for field in ("scores", "logits"):
                for x, y in zip(a[field], b[field], strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
            a, b = a.sequences, b.sequences
        assert torch.equal(a, b), name


TASKS = {
    **dict.fromkeys(("t5", "bart"), ("SEQ_2_SEQ_LM",)),
    **dict.fromkeys(("llama", "gpt2"), ("CAUSAL_LM",)),
    "bert": ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
}
FILED = [c for c in cells(METHODS) if c.task in TASKS.get(c.architecture, ()) and not c.fails_in_peft]


def config_in(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "adapter_config.json").read_text())
    found.pop("peft_version", None)
    if found.get("modules_to_save"):  # PEFT writes each head twice
        found["modules_to_save"] = sorted(set(found["modules_to_save"]))
    return found


@pytest.mark.parametrize("cell", FILED, ids=lambda c: f"{c.method}-{c.architecture}-{c.task}")
def test_files_both_ways(cell: Cell, tmp_path: Path) -> None:
    ours, theirs = pair_of(cell)
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    there = {live(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert trained.keys() == there.keys()
    for name, p in trained.items():
        p.data.add_(torch.randn_like(p))
        there[name].data.copy_(p.data)
    with peft_may_warn():
        theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert_equal_tensors(*files)
    assert config_in(tmp_path / "ours") == config_in(tmp_path / "theirs")

    given = cell.inputs()
    wanted = called(ours, given)[0]
    loaded = inlay.PeftModel.from_pretrained(model_of(cell.architecture, cell.task), tmp_path / "theirs").eval()
    with torch.no_grad():
        found = loaded(**given)
    close({n: found[n] for n in wanted}, wanted)
    with peft_may_warn(), torch.no_grad():
        model = model_of(cell.architecture, cell.task)
        read = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
        found = read(**in_peft(given, cell))
    assert type(read).__name__ == type(loaded).__name__
    if cell.task != "SEQ_CLS" or cell.architecture == "bert":
        close({n: found[n] for n in wanted}, wanted)


@pytest.mark.parametrize("cell", FILED, ids=lambda c: f"{c.method}-{c.architecture}-{c.task}")
def test_the_handle(cell: Cell) -> None:
    ours, theirs = pair_of(cell)
    more = cell.row.call(3)
    a, b = ours.get_prompt(3, **more), theirs.get_prompt(3, **more)
    if cell.way == "front":
        assert torch.equal(a, b)
    else:
        assert type(a) is type(b)
        assert a.get_seq_length() == b.get_seq_length() == T
        one, other = (getattr(cache, "self_attention_cache", cache).layers for cache in (a, b))
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x.keys, y.keys)
            assert torch.equal(x.values, y.values)
        long = ours.get_prompt(3, **more, max_cache_len=9)
        layers = getattr(long, "self_attention_cache", long).layers
        for x, y in zip(layers, other, strict=True):
            assert x.max_cache_len == 9
            assert torch.equal(x.keys[:, :, :T], y.keys)
    saved, saved_there = (handle.get_prompt_embedding_to_save("default") for handle in (ours, theirs))
    assert torch.equal(saved, saved_there)
    assert saved.requires_grad == saved_there.requires_grad
    assert {n: t.tolist() for n, t in ours.prompt_tokens.items()} == {
        n: t.tolist() for n, t in theirs.prompt_tokens.items()
    }
    assert torch.equal(ours.word_embeddings.weight, theirs.word_embeddings.weight)
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.peft_type == theirs.peft_type
    assert ours.active_adapters == theirs.active_adapters
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


def test_what_a_handle_refuses() -> None:
    cell = Cell("PROMPT_TUNING", "llama", "CAUSAL_LM", METHODS["PROMPT_TUNING"])
    ours, theirs = pair_of(cell)
    for handle in (ours, theirs):
        with pytest.raises(KeyError):
            handle.get_prompt_embedding_to_save("other")
        for ask in (handle.get_layer_status, handle.get_model_status):
            with pytest.raises(TypeError):
                ask()
    with pytest.raises(UnknownAdapterError, match="other"):
        ours.get_prompt_embedding_to_save("other")
    with pytest.raises(UnsupportedLayerError, match="prompt"):
        ours.get_layer_status()
    lora = inlay.get_peft_model(model_of("llama", "CAUSAL_LM"), inlay.LoraConfig(target_modules=["q_proj"]))
    assert lora.prompt_tokens == {}
    with pytest.raises(PromptError, match="no prompt"):
        lora.get_prompt(2)


# ---------------------------------------------------------------- where PEFT does something else, and what is right


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_in_front_of_a_prompt(name: str) -> None:
    """PEFT's rows have other positions there, and other text than one by one."""
    ours, theirs = pair_of(Cell("PROMPT_TUNING", name, "CAUSAL_LM", METHODS["PROMPT_TUNING"]))
    ids_BL = inputs_of(name, "CAUSAL_LM", padded=False)["input_ids"]
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :3], mask_BL[2, :1] = 0, 0
    given = {"input_ids": ids_BL.masked_fill(mask_BL == 0, 0), "attention_mask": mask_BL, "max_new_tokens": 6}
    rows = {side: generated(handle, given)[:, 7:] for side, handle in (("ours", ours), ("theirs", theirs))}
    single = [
        generated(theirs, {"input_ids": ids_BL[i : i + 1, mask_BL[i] == 1], "max_new_tokens": 6})[0, -6:]
        for i in range(3)
    ]
    assert torch.equal(rows["ours"], torch.stack(single))
    assert not torch.equal(rows["theirs"], torch.stack(single))


def test_padding_behind_a_row_that_is_classified() -> None:
    """PEFT's classifier reads the padding's token for the last."""
    ours, theirs = pair_of(Cell("PROMPT_TUNING", "llama", "SEQ_CLS", METHODS["PROMPT_TUNING"]))
    given = inputs_of("llama", "SEQ_CLS")
    n = int(given["attention_mask"][1].sum())
    with torch.no_grad(), peft_may_warn():
        single = theirs(input_ids=given["input_ids"][1:2, :n]).logits[0]
        torch.testing.assert_close(ours(**given).logits[1], single, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(theirs(**given).logits[1], single, atol=1e-2)


def test_spans_move_with_the_prompt() -> None:
    """PEFT leaves start_positions and end_positions where they were: they point before the span."""
    ours, theirs = pair_of(Cell("PROMPT_TUNING", "bert", "QUESTION_ANS", METHODS["PROMPT_TUNING"]))
    given = inputs_of("bert", "QUESTION_ANS")
    moved = {**given, **{k: given[k] + T for k in ("start_positions", "end_positions")}}
    with torch.no_grad(), peft_may_warn():
        torch.testing.assert_close(ours(**given).loss, theirs(**moved).loss, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(theirs(**given).loss, theirs(**moved).loss)


def test_labels_of_tokens_move_with_the_prompt() -> None:
    """PEFT's loss fails on labels of the input's length; labels that have the prompt's too are taken as they are."""
    ours, theirs = pair_of(Cell("PROMPT_TUNING", "bert", "TOKEN_CLS", METHODS["PROMPT_TUNING"]))
    given = inputs_of("bert", "TOKEN_CLS")
    whole = {**given, "labels": torch.cat([torch.full((3, T), -100), given["labels"]], 1)}
    with torch.no_grad(), peft_may_warn():
        assert torch.equal(ours(**given).loss, ours(**whole).loss)
        with pytest.raises(ValueError, match="batch_size"):
            theirs(**given)


@pytest.mark.parametrize("cell", [c for c in GENERATING if c.architecture == "gpt2"], ids=lambda c: c.method)
def test_positions_are_kept(cell: Cell) -> None:
    """PEFT drops position_ids before a prompt of embeddings, with a warning."""
    ours, theirs = pair_of(cell)
    given = cell.inputs(padded=False)
    ids_BL = given["input_ids"]
    at_BL = torch.arange(7).flip(0).expand(3, -1)
    with torch.no_grad(), peft_may_warn():
        found = ours(input_ids=ids_BL, position_ids=at_BL, **cell.row.call(3)).logits
        there = theirs(input_ids=ids_BL, position_ids=at_BL, **cell.row.call(3)).logits
        without = theirs(input_ids=ids_BL, **cell.row.call(3)).logits
    if cell.way == "cache":
        torch.testing.assert_close(found, there, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(there, without)
        assert not torch.allclose(found, without, atol=1e-3)


# ---------------------------------------------------------------- functions


@pytest.mark.parametrize("ids", [[[5, 6, -100]], [[5, 6, 7], [-100, 3, 0]]])
def test_shift_tokens_right(ids: list[list[int]]) -> None:
    from peft.utils import shift_tokens_right as theirs

    labels = torch.tensor(ids)
    before = labels.clone()
    assert torch.equal(shift_tokens_right(labels, 0, 1), theirs(labels, 0, 1))
    assert torch.equal(labels, before)
    for shift in (shift_tokens_right, theirs):
        with pytest.raises(ValueError):
            shift(labels, None, 1)


def test_old_layouts_of_caches() -> None:
    from peft.utils import constants

    table = torch.randn(6, 2, 4, 5, 3)
    theirs = constants.bloom_model_postprocess_past_key_value(table.split(2))
    ours = bloom_model_postprocess_past_key_value(table.split(2))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for heads in (1, 4):
        theirs = constants.starcoder_model_postprocess_past_key_value(table[:, :, :heads].split(2))
        ours = starcoder_model_postprocess_past_key_value(table[:, :, :heads].split(2))
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
