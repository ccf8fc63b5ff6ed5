"""Training from a config: what it learns, writes, continues, and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from integrations.tiny_runs import TASKS, sentences, tokenizer, tree, write_rows
from safetensors.torch import load_file

from inlay.errors import ConfigError, MissingFileError
from inlay.integrations.data import load_examples, read_examples, split
from inlay.integrations.run_folder import RunFolder, is_complete, read_lines
from inlay.integrations.train import predict, prepare, train
from inlay.integrations.train_config import TrainConfig, parse
from inlay.integrations.trainer import SimilarLengths

SRC = Path(__file__).parents[2] / "src"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def edited(base: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """``base`` with one dotted key set."""
    head, _, rest = key.partition(".")
    return {**base, head: edited(base.get(head, {}), rest, value) if rest else value}


# ---------------------------------------------------------------- what it learns and writes


@pytest.mark.parametrize("task", TASKS)
def test_every_task_learns_and_writes_what_it_promises(task: str, tmp_path: Path) -> None:
    report = train(parse(tree(task, tmp_path))).report
    assert report.after["loss"] < report.before["loss"]
    assert report.metric in report.after
    assert report.metric in report.before
    assert (report.train_rows, report.held_out_rows) == (48, 12)
    assert report.steps == 12
    folder = Path(report.output)
    tensors = weights(folder)
    assert 0 < report.trainable < report.parameters
    assert report.trainable == sum(tensor.numel() for tensor in tensors.values())
    assert report.adapter_bytes == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert json.loads((folder / "report.json").read_text())["after"] == report.after
    lines = read_lines(folder / "predictions.jsonl")
    rows = sentences(60)
    assert len(lines) == 12
    key = "tokens" if task == "token-classification" else "text"
    assert all(line[key] == rows[line["row"]][key] for line in lines)


def test_the_reported_accuracy_is_that_of_the_predictions(tmp_path: Path) -> None:
    result = train(parse(tree("sequence-classification", tmp_path)))
    right = sum(line["predicted"] == line["label"] for line in result.predictions)
    assert result.report.after["accuracy"] == pytest.approx(right / len(result.predictions))


def test_a_run_learns_the_task(tmp_path: Path) -> None:
    config = parse(tree("token-classification", tmp_path, rows=200, epochs=4))
    report = train(config).report
    assert report.before["accuracy"] < 0.9 < report.after["accuracy"]


def test_it_evaluates_while_it_trains(tmp_path: Path) -> None:
    losses: list[float] = []

    class Note(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            losses.append(metrics["eval_loss"])

    train(parse(tree("sequence-classification", tmp_path, max_steps=4, evaluate_steps=2)), callbacks=[Note()])
    assert len(losses) == 3  # the base, and twice on the way
    assert predict(tmp_path / "run")[1]["loss"] == losses[-1]


def test_causal_perplexity_is_exp_of_the_mean_cost_of_a_token(tmp_path: Path) -> None:
    config = parse(edited(tree("causal-lm", tmp_path), "data.target", None))
    result = train(config)
    # Every sentence has as many tokens, so the mean over batches that the Trainer takes is the mean over tokens.
    assert torch.tensor(result.report.after["perplexity"]).log() == pytest.approx(
        result.report.after["loss"], rel=1e-4
    )


# ---------------------------------------------------------------- loading again


def test_predictions_of_the_adapter_loaded_again_and_merged_are_the_live_ones(tmp_path: Path) -> None:
    result = train(parse(tree("sequence-classification", tmp_path)))
    for merge in (False, True):
        lines, scores = predict(tmp_path / "run", merge=merge)
        assert [line["predicted"] for line in lines] == [line["predicted"] for line in result.predictions]
        given = [line["probability"] for line in lines]
        assert given == pytest.approx([line["probability"] for line in result.predictions], abs=1e-5)
        assert scores["accuracy"] == result.report.after["accuracy"]


def test_everything_that_started_at_random_comes_with_the_adapter(tmp_path: Path) -> None:
    # DistilBERT's head has two layers, neither of them in a pretrained encoder's checkpoint.
    import transformers

    folder = tmp_path / "distilbert"
    settings = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2, "vocab_size": len(tokenizer())}
    transformers.DistilBertModel(transformers.DistilBertConfig(**settings)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = edited(tree("sequence-classification", tmp_path, max_steps=2), "model.name", str(folder))
    result = train(parse(edited(config, "adapter.target_modules", ["q_lin"])))
    torch.manual_seed(99)
    lines, _ = predict(tmp_path / "run")
    given = [line["probability"] for line in lines]
    assert given == pytest.approx([line["probability"] for line in result.predictions], abs=1e-6)


def test_predict_needs_no_answers(tmp_path: Path) -> None:
    train(parse(tree("sequence-classification", tmp_path, max_steps=2)))
    rows = [{"text": row["text"]} for row in sentences(5, seed=1)]
    lines, scores = predict(tmp_path / "run", write_rows(tmp_path / "new.jsonl", rows))
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(line["predicted"] in ("blue", "green", "red") and line["label"] is None for line in lines)
    assert "accuracy" not in scores


# ---------------------------------------------------------------- killed and continued


def _killed_after_first_checkpoint(config: dict[str, Any], folder: Path) -> Path:
    """Run ``inlay train`` in a process of its own and kill it as soon as a checkpoint is complete."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "inlay", "train", str(file)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    checkpoints = Path(config["output"]) / "checkpoints"
    deadline = time.monotonic() + 240
    while not any(map(is_complete, checkpoints.glob("checkpoint-*"))):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "no checkpoint in four minutes"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return Path(config["output"])


def test_a_killed_run_continues_and_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    settings = {"epochs": 10, "save_steps": 5, "group_by_length": True}
    killed = tree("sequence-classification", tmp_path, **settings)
    killed["adapter"]["lora_dropout"] = 0.1
    output = _killed_after_first_checkpoint(killed, tmp_path)
    assert not (output / "report.json").exists()
    # What the kill may have left half written, as the latest checkpoint.
    whole_one = next(filter(is_complete, (output / "checkpoints").glob("checkpoint-*")))
    half = shutil.copytree(whole_one, output / "checkpoints" / "checkpoint-999")
    (half / "optimizer.pt").write_bytes((half / "optimizer.pt").read_bytes()[:-50])
    report = train(parse(killed)).report
    assert 5 <= report.resumed_at < report.steps == 60

    whole = train(parse({**killed, "output": str(tmp_path / "whole")})).report
    assert whole.resumed_at == 0
    assert report.before == whole.before
    assert report.after == whole.after
    ours, theirs = weights(output), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_is_not_trained_again_and_can_be_started_over(tmp_path: Path) -> None:
    config = parse(tree("sequence-classification", tmp_path))
    first = train(config)
    again = train(config)
    assert again.report.resumed_at == again.report.steps == first.report.steps
    assert again.predictions == first.predictions
    over = train(config, resume=False)
    assert over.report.resumed_at == 0
    assert over.predictions == first.predictions


def test_resume_insists_on_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(parse(tree("sequence-classification", tmp_path)), resume=True)


def test_another_config_does_not_continue_in_the_same_folder(tmp_path: Path) -> None:
    config = tree("sequence-classification", tmp_path, max_steps=4)
    train(parse(config))
    with pytest.raises(ConfigError, match=r"adapter\.r, training\.learning_rate"):
        train(parse(edited(edited(config, "adapter.r", 2), "training.learning_rate", 0.5)))
    assert train(parse(edited(config, "training.max_steps", 6))).report.resumed_at == 4


def test_similar_lengths_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    lengths = [7, 1, 5, 3] * 100
    sampler = SimilarLengths(lengths, batch_size=4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(400))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(SimilarLengths(lengths, batch_size=4, seed=4)) != first


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_train_one_adapter(tmp_path: Path) -> None:
    config = tree("sequence-classification", tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "inlay", "train", str(tmp_path / "config.yaml")],
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1  # only the main process prints
    report = RunFolder(config["output"]).read("report")
    assert report["steps"] == 6  # half the steps: each sees twice the rows
    assert len(read_lines(Path(config["output"]) / "predictions.jsonl")) == report["held_out_rows"] == 12
    assert report["after"]["loss"] < report["before"]["loss"]


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("trainin", {}, "trainin: no such key; closest: training"),
        ("training.batch_sise", 4, "training.batch_sise: no such key; closest: batch_size"),
        ("training.epochs", "many", "training.epochs: expected float, found 'many'"),
        ("training.epochs", True, "training.epochs: expected float, found True"),
        ("training.learning_rate", 0, "training.learning_rate: 0.0 is out of range; expected > 0"),
        ("training.learning_rate", float("nan"), "training.learning_rate: nan is out of range"),
        ("training.max_steps", 1.5, "training.max_steps: expected int or nothing, found 1.5"),
        ("data.held_out_fraction", 1.0, "expected > 0 and < 1"),
        ("task", "causal", "task: 'causal' is none of causal-lm"),
        ("model", "bert", "model: expected a section"),
    ],
)
def test_a_wrong_key_or_value_is_named(key: str, value: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(edited(tree("causal-lm", tmp_path), key, value))
    assert complaint in str(caught.value)


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(ConfigError, match="3 things to put right") as caught:
        parse({"task": "x", "training": {"epochs": -1, "stpes": 3}})
    assert all(part in str(caught.value) for part in ("task: 'x'", "epochs: -1.0", "stpes: no such key"))


def test_a_config_survives_its_own_file(tmp_path: Path) -> None:
    config = parse(tree("seq2seq", tmp_path))
    assert parse(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert parse(TrainConfig().to_dict()) == TrainConfig()


def test_complaints_about_data_adapter_and_model_come_before_any_model(tmp_path: Path) -> None:
    config = edited(tree("sequence-classification", tmp_path), "adapter.rr", 3)
    config = edited(edited(config, "data.label", "lable"), "model.name", "")
    with pytest.raises(ConfigError, match="3 things to put right") as caught:
        prepare(parse(config))
    text = str(caught.value)
    assert "model.name: missing" in text
    assert "rr" in text
    assert "no column 'lable' (data.label); closest: label" in text


def test_an_unknown_method_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lorra"):
        prepare(parse(edited(tree("causal-lm", tmp_path), "adapter.method", "lorra")))


def test_a_model_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    config = edited(tree("causal-lm", tmp_path), "model.name", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="nothing"):
        train(parse(config))


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    import pandas

    rows = [{"text": f"a, b {i}", "label": label} for i, label in enumerate(["NA", "007", "x"])]
    frame, path = pandas.DataFrame(rows), tmp_path / f"rows{ending}"
    match ending:
        case ".jsonl":
            write_rows(path, rows)
        case ".parquet":
            frame.to_parquet(path)
        case _:
            frame.to_csv(path, sep="," if ending == ".csv" else "\t", index=False)
    assert [row.values for row in read_examples(path)] == rows


def test_parquet_gives_lists_and_numbers_as_json_does(tmp_path: Path) -> None:
    import pandas

    rows = [{"tokens": ["a", "b"], "tags": [3, 1], "label": 7}, {"tokens": ["c"], "tags": [1], "label": None}]
    path = tmp_path / "rows.parquet"
    pandas.DataFrame(rows).astype({"label": "Int64"}).to_parquet(path)
    found = [row.values for row in read_examples(path)]
    assert found == rows
    assert isinstance(found[0]["tags"], list)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("[1]\n", "line 1: found a list"),
        ("", "no rows"),
        (
            '{"text": "a", "label": "x"}\n{"text": "", "label": "x"}\n',
            "row 1 (counted from 0) without a usable 'text'",
        ),
        ('{"text": "a", "label": 0.5}\n', "row 0 (counted from 0) without a usable 'label'"),
        ('{"text": "a", "label": "x"}\n{"text": "A", "label": "y"}\n', "cannot be split"),
    ],
)
def test_unusable_data_is_a_config_error(content: str, complaint: str, tmp_path: Path) -> None:
    config = tree("sequence-classification", tmp_path)
    Path(config["data"]["path"]).write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_examples(parse(config))
    assert complaint in str(caught.value)


def test_a_data_file_that_is_not_there_has_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no data file"):
        read_examples(tmp_path / "rows.jsonl")


def test_equal_inputs_never_stand_on_both_sides(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"t{i % 20}"} for i in range(100)])
    train_rows, held_out = split(read_examples(path), lambda row: str(row.values["text"]), 0.2, seed=1)
    assert len(held_out) == 20
    assert len(train_rows) == 80
    assert {row.values["text"] for row in held_out}.isdisjoint(row.values["text"] for row in train_rows)


def test_a_second_file_is_held_out_whole_and_repeats_are_counted(tmp_path: Path) -> None:
    config = tree("sequence-classification", tmp_path)
    other = [*sentences(60)[:3], *sentences(4, seed=9)]
    config["data"]["held_out_path"] = str(write_rows(tmp_path / "other.jsonl", other))
    examples = load_examples(parse(config))
    assert (len(examples.train), len(examples.held_out), examples.repeated) == (60, 7, 3)


def test_numbered_classes_keep_their_order(tmp_path: Path) -> None:
    config = tree("sequence-classification", tmp_path)
    write_rows(Path(config["data"]["path"]), [{"text": f"t{i}", "label": i % 11} for i in range(40)])
    assert load_examples(parse(config)).labels == [str(i) for i in range(11)]
