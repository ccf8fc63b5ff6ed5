"""The commands, as a user types them; in this process, where that is the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from integrations.tiny_runs import TASKS, model_folder, sentences, tree, write_rows

import inlay
from inlay import cli
from inlay.methods import METHODS
from inlay.prompts import PROMPTS

SRC = Path(__file__).parents[2] / "src"
Result = tuple[int, str, str]
Inlay = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Inlay:
    """``run("merge", "a", "--out", "b")`` -> exit code, standard output, standard error."""
    monkeypatch.delenv("COLUMNS", raising=False)  # the runner's terminal is not ours

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["inlay", *map(str, arguments)])
        capsys.readouterr()  # what fixtures printed
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return int(code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree("sequence-classification", tmp_path, max_steps=4)))
    return file


@pytest.fixture
def trained(run: Inlay, config: Path, tmp_path: Path) -> Path:
    assert run("train", config)[0] == 0
    return tmp_path / "run"


# ---------------------------------------------------------------- methods


def test_methods_lists_the_table(run: Inlay) -> None:
    code, out, err = run("methods", "--outs", "16", "--ins", "32", "--why")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert all(sum(line.startswith(f"{name} ") for line in lines) >= 2 for name in METHODS)  # whole, in both tables
    lora = next(line for line in lines if line.startswith("LORA "))
    assert lora.split()[:5] == ["LORA", "output", str(8 * (16 + 32)), "mR", "mr"]
    prompt = next(line for line in lines if line.startswith("PREFIX_TUNING "))
    assert prompt.split() == ["PREFIX_TUNING", "cache", "8", f"{8 * 24 * 2 * 16:,}"]
    assert all(sum(line.startswith(f"{name} ") for line in lines) == 2 for name in PROMPTS)
    assert max(map(len, lines)) <= 100


def test_methods_fit_into_80_columns(run: Inlay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("methods")[1].splitlines()
    assert all(sum(line.startswith(f"{name} ") for line in lines) >= 2 for name in METHODS)


# ---------------------------------------------------------------- train and predict


def test_train_prints_the_report_that_it_writes(run: Inlay, config: Path, tmp_path: Path) -> None:
    code, out, err = run("train", config)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    before, after = (f"{report[when]['accuracy']:.1%}".replace("%", " %") for when in ("before", "after"))
    assert f"{before} -> {after}" in out
    assert f"{report['trainable']:,} of {report['parameters']:,}" in out
    assert "step 2/4" in out


def test_options_are_laid_over_the_file_and_set_comes_last(run: Inlay, config: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "other.jsonl", sentences(20, seed=5))
    changes = ("--set", "training.max_steps=1", "--set", "adapter.r=2", "--set", "adapter.target_modules=[query]")
    code, _, err = run("train", config, "--model", model_folder("bert"), "--data", data, "--method", "LoRA", *changes)
    assert code == 0, err
    ran = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert ran["data"]["path"] == str(data)
    assert ran["training"]["max_steps"] == 1
    assert (ran["adapter"]["r"], ran["adapter"]["target_modules"]) == (2, ["query"])


def test_train_needs_no_config_file(run: Inlay, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sentences(20))
    settings = {"output": tmp_path / "run", "training.max_steps": 1, "data.max_length": 16, "adapter.r": 2}
    extra = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    code, _, err = run("train", "--model", model_folder("llama"), "--data", data, *extra)
    assert code == 0, err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_predict_writes_one_line_per_row(run: Inlay, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.jsonl"
    code, text, err = run("predict", trained, "--out", out, "--merge")
    assert code == 0, err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    first = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert [line["predicted"] for line in lines] == [line["predicted"] for line in first]
    assert "12 rows, loss" in text


# ---------------------------------------------------------------- merge


@pytest.mark.parametrize("given", [False, True])
def test_merge_gives_a_plain_model_with_the_same_outputs(
    given: bool, run: Inlay, trained: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "merged"
    code, _, err = run(
        "merge", trained / "adapter", "--out", out, *(["--base", model_folder("bert")] if given else [])
    )
    assert code == 0, err
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert merged.config.id2label == {0: "blue", 1: "green", 2: "red"}
    row = json.loads((trained / "predictions.jsonl").read_text().splitlines()[0])
    with torch.no_grad():
        inputs = AutoTokenizer.from_pretrained(out)(row["text"], return_tensors="pt")
        probabilities = merged(**inputs).logits.softmax(-1)[0]
    assert merged.config.id2label[int(probabilities.argmax())] == row["predicted"]
    assert float(probabilities.max()) == pytest.approx(row["probability"], abs=1e-5)


def test_merge_finds_the_size_of_a_head_without_the_run_around_it(run: Inlay, trained: Path, tmp_path: Path) -> None:
    (trained / "adapter").rename(tmp_path / "moved")
    code, _, err = run("merge", tmp_path / "moved", "--out", tmp_path / "merged")
    assert code == 0, err
    assert len(json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]) == 3


def test_merge_does_not_write_into_a_full_folder(run: Inlay, trained: Path) -> None:
    before = sorted(trained.iterdir())
    code, _, err = run("merge", trained / "adapter", "--out", trained)
    assert code == 1
    assert "not an empty folder" in err
    assert sorted(trained.iterdir()) == before


# ---------------------------------------------------------------- inspect and explain


def test_inspect_shows_every_layer_and_draws(run: Inlay, trained: Path, tmp_path: Path) -> None:
    png = tmp_path / "layers.png"
    code, out, err = run("inspect", trained / "adapter", "--png", png)
    assert code == 0, err
    assert all(f"layer.{i}.attention.self.{name}" in out for i in (0, 1) for name in ("query", "value"))
    assert "classifier.weight" in out
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("task", TASKS)
def test_explain_counts_what_training_then_trains(task: str, run: Inlay, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree(task, tmp_path, max_steps=1)))
    code, out, err = run("explain", file)
    assert code == 0, err
    assert run("train", file)[0] == 0
    trainable = json.loads((tmp_path / "run" / "report.json").read_text())["trainable"]
    assert f"{trainable:,}" in out


def test_explain_counts_what_the_checkpoint_lacks(run: Inlay, tmp_path: Path) -> None:
    """A checkpoint without the pooler that a classifier reads: training trains it whole, in the dtype asked for."""
    from transformers import BertConfig, BertForMaskedLM

    plan = tree("sequence-classification", tmp_path, max_steps=1)
    base, file = tmp_path / "masked", tmp_path / "config.yaml"
    BertForMaskedLM(BertConfig.from_pretrained(plan["model"]["name"])).save_pretrained(base)
    plan["model"] |= {"name": str(base), "tokenizer": plan["model"]["name"], "dtype": "bfloat16"}
    plan["adapter"]["target_modules"] = "all-linear"
    file.write_text(yaml.safe_dump(plan))
    code, out, err = run("explain", file)
    assert code == 0, err
    assert "checkpoint" not in out
    assert run("train", file)[0] == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert f"{report['trainable']:,}" in out
    (told,) = re.findall(r"^  frozen model +([\d.]+) kB", out, re.MULTILINE)
    buffers = 2 * 8 * 64  # Bert's positions and token types
    assert float(told) * 1000 == pytest.approx(report["base_bytes"] + buffers, rel=0.01)

    (base / "model.safetensors").unlink()
    assert "note: the checkpoint is not on this machine" in run("explain", file)[1]


def test_explain_needs_a_model_only(run: Inlay) -> None:
    code, out, err = run("explain", "--model", model_folder("llama"), "--set", "adapter.target_modules=[q_proj]")
    assert code == 0, err
    assert "q_proj" in out


# ---------------------------------------------------------------- errors and the way in


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "training.epoch=3"], "ConfigError: training.epoch: no such key; closest: epochs"),
        (["train", "--set", "epochs"], "expected key=value"),
        (["train", "--set", "data=3", "--set", "data.path=x"], "cannot set data.path"),
        (["train"], "model.name: missing"),
        (["train", "nowhere.yaml"], "MissingFileError: no config file nowhere.yaml"),
        (["explain"], "model.name: missing"),
        (["inspect", "nowhere"], "MissingFileError"),
        (["merge", "nowhere", "--out", "nowhere-merged"], "MissingFileError"),
        (["predict", "nowhere"], "expected the output folder of `inlay train`"),
    ],
)
def test_a_named_error_is_one_message_and_exit_code_1(arguments: list[str], message: str, run: Inlay) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["inlay", "train", "--debug"])
    with pytest.raises(inlay.PeftError, match=r"model\.name"):
        cli.main()


def test_python_m_inlay_is_the_command_and_help_is_light() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "inlay", "--help"],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("train", "predict", "explain", "inspect", "merge", "demo"))
    assert not {"transformers", "accelerate", "pandas", "torch"} & {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines()
    }


def _settings(tree: dict[str, Any], prefix: str = "") -> set[str]:
    return {
        key
        for name, value in tree.items()
        for key in (_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"})
    }


def test_the_example_config_is_one() -> None:
    from inlay.integrations.train import adapter_config
    from inlay.integrations.train_config import TrainConfig, parse, read_tree

    example = read_tree(Path(__file__).parents[2] / "examples" / "train.yaml")
    adapter_config(parse(example))
    # It shows every key there is, and nothing else but the method's own.
    known = _settings(TrainConfig().to_dict())
    assert known <= _settings(example)
    assert all(key.startswith("adapter.") for key in _settings(example) - known)
