"""AdaLoRA beyond the laws: its budget, its loss and its files, held against the incumbent's; its config."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import ConfigError, LoadError, NoGradientError, PeftWarning, UnsupportedFieldError
from inlay.ops import low_rank

TARGETS = ["q_proj", "v_proj"]
INPUT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SCHEDULE: dict[str, Any] = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 8, "lora_alpha": 30}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.c(self.b(self.a(x)))
        return h


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=2))


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def adapted(library: ModuleType, base: nn.Module, **fields: Any) -> Any:
    """An adapter that does something, the same from either library; nearly nothing in the first layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = library.get_peft_model(base, library.AdaLoraConfig(**fields))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(factors(model).items()):
            p.copy_(torch.randn(p.shape, generator=draw) * (0.003 if "layers.0.self_attn.q_proj" in name else 0.3))
    return model.train()


def causal(library: ModuleType, **fields: Any) -> Any:
    return adapted(library, llama(), target_modules=TARGETS, task_type="CAUSAL_LM", **{**SCHEDULE, **fields})


def train(model: Any, steps: range) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in steps:
        optimiser.zero_grad()
        model(input_ids=INPUT, labels=INPUT).loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=INPUT).logits
    return out


# ---------------------------------------------------------------- the budget


@pytest.mark.parametrize(
    "fields",
    [
        {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12},
        {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 3, "total_step": 14},
        {"init_r": 6, "target_r": 1, "deltaT": 2, "total_step": 9, "beta1": 0.7, "beta2": 0.9},
        {"init_r": 5, "target_r": 0, "tfinal": 2, "total_step": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(2))
def test_masks_are_the_incumbents_step_by_step(fields: dict[str, Any], seed: int) -> None:
    models = [adapted(library, net(), target_modules=["a", "b", "c"], **fields) for library in (peft, inlay)]
    theirs, ours = (factors(model) for model in models)
    assert theirs.keys() == ours.keys()
    draw = torch.Generator().manual_seed(seed)
    masked = 0
    for step in range(fields["total_step"] + 3):
        for name, p in theirs.items():
            grad, move = torch.randn(p.shape, generator=draw), torch.randn(p.shape, generator=draw)
            for one in (p, ours[name]):
                one.grad = grad.clone()
                one.data += 0.1 * move
        for model in models:
            model.base_model.update_and_allocate(step)
        for name, p in theirs.items():
            assert torch.equal(p, ours[name]), (step, name)
        masked += sum(int((p == 0).sum()) for name, p in ours.items() if "lora_E" in name)
    assert masked
    expected = {k.removesuffix(".default"): v for k, v in models[0].peft_config["default"].rank_pattern.items()}
    assert models[1].peft_config["default"].rank_pattern == expected
    assert sum(map(sum, expected.values())) == 3 * fields["target_r"]


def test_a_target_that_is_no_lower_masks_nothing() -> None:
    with pytest.warns(PeftWarning, match="ranks will not fall"):
        model = adapted(inlay, net(), target_modules=["a", "b"], init_r=2, target_r=3, total_step=3)
    for step in range(1, 4):
        model(torch.randn(3, 5)).sum().backward()
        model.update_and_allocate(step)
    assert all((p != 0).all() for p in factors(model).values())


def test_a_step_without_gradients_is_named() -> None:
    model = adapted(inlay, net(), target_modules=["a"], init_r=2, target_r=1, total_step=5)
    with pytest.raises(NoGradientError, match="before zero_grad"):
        model.update_and_allocate(1)
    model(torch.randn(3, 5)).sum().backward()
    model.update_and_allocate(1)


def test_the_length_of_a_training_is_filled_in_where_it_is_taken_out_again(tmp_path: Path) -> None:
    adapted(inlay, net(), target_modules=["a"], total_step=5).save_pretrained(tmp_path)
    model = inlay.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    model.base_model.begin_training(7)
    assert model.peft_config["default"].total_step == 5
    model.peft_config["default"].total_step = None
    for steps in (7, 9):
        model.base_model.begin_training(steps)
        assert model.peft_config["default"].total_step == steps


def test_a_step_without_total_step_is_named() -> None:
    model = adapted(inlay, net(), target_modules=["a"], init_r=2, target_r=1)
    with pytest.raises(ConfigError, match="total_step"):
        model.update_and_allocate(1)


def test_a_frozen_adapter_has_no_budget() -> None:
    model = adapted(inlay, net(), target_modules=["a"], init_r=2, target_r=1, total_step=5)
    model.set_requires_grad("default", False)
    model.update_and_allocate(5)
    assert model.peft_config["default"].rank_pattern is None


def test_several_adapters_have_budgets_of_their_own() -> None:
    model = adapted(inlay, net(), target_modules=["a", "b"], init_r=4, target_r=1, total_step=1)
    model.add_adapter("other", inlay.AdaLoraConfig(target_modules=["a"], init_r=3, target_r=2, total_step=9))
    model.set_requires_grad("other")
    model(torch.randn(2, 5), adapter_names=["default", "other"]).sum().backward()
    model.update_and_allocate(1)
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2
    assert model.peft_config["other"].rank_pattern is None


# ---------------------------------------------------------------- the loss


def test_loss_and_gradients_are_the_incumbents() -> None:
    theirs, ours = causal(peft), causal(inlay)
    losses = [model(input_ids=INPUT, labels=INPUT).loss for model in (theirs, ours)]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-6)
    with torch.no_grad():
        assert float(losses[1].detach()) > float(ours(input_ids=INPUT, labels=INPUT).loss) + 0.1
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in factors(theirs).items()}
    for name, p in factors(ours).items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_training_is_the_incumbents() -> None:
    theirs, ours = causal(peft), causal(inlay)
    for model in (theirs, ours):
        train(model, range(1, 9))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- files


def _pruned() -> Any:
    model = causal(inlay)
    train(model, range(1, 9))
    ranks = [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]
    assert sum(ranks) == 4
    assert 0 in ranks  # a layer that has lost every row
    return model


def _untrained() -> Any:
    return causal(inlay)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # the incumbent of its own files
@pytest.mark.filterwarnings("ignore:.*have invalid shape:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("make", [_pruned, _untrained])
def test_files_go_both_ways(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    expected = logits(model)
    model.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(there), expected, rtol=1e-5, atol=1e-5)
    there.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = inlay.PeftModel.from_pretrained(llama(), tmp_path / folder)
        assert again.load_report.ok
        torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"] == model.peft_config["default"].rank_pattern


def test_rows_that_were_dropped_are_not_saved_and_the_scale_stays(tmp_path: Path) -> None:
    model = _pruned()
    model.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(llama(), tmp_path, adapter_name="other")
    pattern = again.peft_config["other"].rank_pattern
    for path, kept in pattern.items():
        layer = again.get_base_model().get_submodule(path.removesuffix(".lora_E"))
        assert layer.r["other"] == sum(kept) == layer.lora_E["other"].shape[0]
        assert layer.lora_B["other"].shape == (16, sum(kept))
        assert (layer.ranknum["other"], layer.scaling["other"]) == (4, 30)
    again.save_pretrained(tmp_path / "again", selected_adapters=["other"])
    assert json.loads((tmp_path / "again/other/adapter_config.json").read_text())["rank_pattern"] == pattern


@pytest.mark.parametrize("given", [False, True])
def test_what_was_saved_fits_the_live_adapter(given: bool) -> None:
    model = _pruned()
    expected = logits(model)
    saved = inlay.get_peft_model_state_dict(model, state_dict=model.state_dict() if given else None)
    before = {name: p.detach().clone() for name, p in factors(model).items()}
    with torch.no_grad():
        for name, p in factors(model).items():
            p.add_(1.0 if "lora_E" in name else 0.0)
    assert inlay.set_peft_model_state_dict(model, saved).ok
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(p, before[name]) for name, p in factors(model).items())
    with pytest.raises(LoadError):
        inlay.set_peft_model_state_dict(causal(inlay), saved)


def test_a_pruned_adapter_is_trained_on(tmp_path: Path) -> None:
    _pruned().save_pretrained(tmp_path / "first")
    model = inlay.PeftModel.from_pretrained(llama(), tmp_path / "first", is_trainable=True).train()
    config = model.peft_config["default"]
    first, config.target_r = dict(config.rank_pattern), 0
    train(model, range(1, 6))
    assert config.rank_pattern == first
    train(model, range(6, 9))
    assert not any(map(any, config.rank_pattern.values()))
    assert config.rank_pattern.keys() == first.keys()
    model.save_pretrained(tmp_path / "second")
    again = inlay.PeftModel.from_pretrained(llama(), tmp_path / "second")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(3, 4, 3)], ids=["linear", "convolution"])
def test_a_layer_of_which_all_is_cut_is_the_frozen_one(monkeypatch: pytest.MonkeyPatch, layer: nn.Module) -> None:
    config = inlay.AdaLoraConfig(
        **SCHEDULE, target_modules=["0"], rank_pattern={"0.lora_E": [False] * SCHEDULE["init_r"]}
    )
    x = torch.randn((2, 3) if isinstance(layer, nn.Linear) else (2, 3, 5, 5), requires_grad=True)
    expected = layer(x)
    model = inlay.get_peft_model(nn.Sequential(layer), config)
    for few in (1 << 17, 0):  # the layer's own backward pass, and the adapter's for both
        monkeypatch.setattr(low_rank, "_FEW", few)
        found = model(x)
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (found, expected)]
        assert torch.equal(*gradients)


def test_tokens_are_trained_beside(tmp_path: Path) -> None:
    model = causal(inlay, trainable_token_indices=[1, 2])
    train(model, range(1, 9))
    model.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


def test_a_tied_head_follows_with_the_rows_that_are_left(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.head(self.table(x))
            return h

    fields = {"target_modules": ["table"], "ensure_weight_tying": True, "lora_alpha": 30}
    model = adapted(inlay, Tied(), init_r=4, target_r=2, total_step=1, **fields)
    x = torch.arange(6).reshape(2, 3)
    model(x).sum().backward()
    model.update_and_allocate(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # the embedding's own weights come along
        model.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(Tied(), tmp_path)
    assert torch.allclose(again(x), model.eval()(x), atol=1e-5)


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(
    "fields",
    [
        {"total_step": 0},
        {"total_step": 10, "tinit": 6, "tfinal": 4},
        {"orth_reg_weight": -1},
        {"beta1": 1.0},
        {"beta2": 0.0},
        {"deltaT": 0},
        {"tinit": -1},
        {"init_r": 0},
        {"target_r": -1},
        {"target_r": 2**31},
        {"lora_alpha": 0},
        {"alpha_pattern": {"q": -1}},
        {"rank_pattern": {"q": 2}},
        {"rank_pattern": {"q.lora_E": [True]}},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        inlay.AdaLoraConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True},
        {"init_lora_weights": "eva"},
        {"use_qalora": True},
    ],
    ids=str,
)
def test_options_of_lora_without_a_meaning_here_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFieldError, match=next(iter(fields))):
        inlay.AdaLoraConfig(total_step=10, **fields)


def test_r_is_not_used_and_says_so() -> None:
    with pytest.warns(PeftWarning, match="`r` is not used"):
        model = adapted(inlay, net(), target_modules=["a"], r=3, init_r=9)
    assert model.get_base_model().a.r["default"] == 9


def test_default_targets_are_adaloras_own() -> None:
    import transformers

    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)
    model = inlay.get_peft_model(transformers.T5Model(config), inlay.AdaLoraConfig(total_step=10))
    assert model.peft_config["default"].target_modules == {"k", "o", "q", "v", "wi", "wo"}


def test_a_loop_of_ones_own_sets_the_steps() -> None:
    model = adapted(inlay, net(), target_modules=["a"], init_r=2, target_r=1, tinit=2, tfinal=1, total_step=9)
    budget = model.base_model.rankallocator
    assert model.rankallocator is budget
    budget.set_total_step(20)
    assert model.peft_config["default"].total_step == 20
    with pytest.raises(ConfigError, match="budgeting phase"):
        budget.set_total_step(3)
    assert model.peft_config["default"].total_step == 20
    model.set_requires_grad("default", False)
    with pytest.raises(AttributeError):
        model.rankallocator  # noqa: B018
