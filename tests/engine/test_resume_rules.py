"""An interrupted run equals the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config import CheckpointError, Config
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.resume_rules import (
    check_resumable,
    differences,
    experiment_differences,
)
from engine.hardware.device import compiler_for
from tests.conftest import ROOT, write_corpus
from tests.runs import assert_equal, assert_same_run, metrics, only_run, run_here, start, wait_for

AUTO = "resume_from_checkpoint=auto"


def into(folder: Path) -> str:
    return f"checkpoint_dir={folder}"


@pytest.mark.slow
def test_killed_five_times_and_resumed_it_is_the_same_run(tiny: list[str], tmp_path: Path) -> None:
    tiny = [*tiny, "log_freq=1"]
    assert run_here([*tiny, into(tmp_path / "straight")]) == 0
    arguments = [*tiny, into(tmp_path / "killed"), AUTO]
    for moment in ("Iter      5", "Evaluating", "checkpoint_10.pt", "Iter     17", "Iter     28"):
        child = start(arguments)
        wait_for(child, moment)
        child.kill()
        child.communicate()
    child = start(arguments)
    output, _ = child.communicate()
    assert child.returncode == 0, output
    run = only_run(tmp_path / "killed")
    assert list(run.glob(".tmp-*")) == []
    assert_same_run(run, only_run(tmp_path / "straight"), step=30)


@pytest.mark.slow
def test_an_evaluation_made_up_after_the_end_is_kept(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, into(tmp_path / "runs"), "max_iters=10"]
    words = [word for word in words if not word.startswith("test_freq")]
    assert run_here([*words, "test_freq=null"]) == 0
    run = only_run(tmp_path / "runs")
    for _ in range(2):
        assert run_here([*words, f"resume_from={run}"]) == 0
    evaluations = [record for record in metrics(run) if "eval/val_loss" in record]
    assert len(evaluations) == 1
    assert json.loads((run / "checkpoint_10.json").read_text())["val_loss"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_to_the_whole_group_saves_that_step_and_resumes_equal(
    tiny: list[str], tmp_path: Path, workers: int
) -> None:
    tiny = [*tiny, "max_iters=80", "log_freq=1", f"num_workers={workers}"]
    assert run_here([*tiny, into(tmp_path / "straight")]) == 0
    arguments = [*tiny, into(tmp_path / "stopped")]
    child = start(arguments, start_new_session=True)
    wait_for(child, "Iter     12")
    os.killpg(child.pid, signal.SIGTERM)
    output, _ = child.communicate()
    assert child.returncode == 143, output
    run = only_run(tmp_path / "stopped")
    step = metrics(run)[-1]["step"]
    assert (run / f"checkpoint_{step}.json").exists()
    assert f"Stopped by SIGTERM at step {step}. To go on:" in output
    assert run_here([*arguments, f"resume_from_checkpoint={run}"]) == 0
    assert_same_run(run, only_run(tmp_path / "straight"), step=80)


@pytest.mark.slow
@pytest.mark.skipif(compiler_for(torch.device("cpu")) is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it loads its compiler
def test_a_compiled_run_with_dropout_and_documents_resumes_equal(
    tiny: list[str], tmp_path: Path
) -> None:
    tiny = [*tiny, "compile=true", "dropout=0.2", "mask=causal_document", "test_freq=4"]
    tiny += ["gradient_accumulation_steps=2", "log_freq=1"]
    tiny += ["checkpoint_freq=3", "max_iters=8"]
    assert run_here([*tiny, into(tmp_path / "straight")]) == 0
    arguments = [*tiny, into(tmp_path / "parts")]
    child = start(arguments)
    wait_for(child, "checkpoint_3.pt")
    child.kill()
    child.communicate()
    assert run_here([*arguments, AUTO]) == 0
    assert_same_run(only_run(tmp_path / "parts"), only_run(tmp_path / "straight"), step=8)


@pytest.mark.slow
def test_ctrl_c_exits_130_and_the_printed_command_goes_on(tiny: list[str], tmp_path: Path) -> None:
    child = start([*tiny, into(tmp_path / "runs"), "max_iters=100000"])
    wait_for(child, "Iter     15")
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate()
    assert child.returncode == 130, output
    command = output.strip().splitlines()[-1].split()
    assert command[:2] == ["python", os.fspath(ROOT / "train.py")]
    step = max(int(p.stem.split("_")[1]) for p in only_run(tmp_path / "runs").glob("*.pt"))
    assert run_here([*command[2:], f"max_iters={step + 5}"]) == 0
    assert (only_run(tmp_path / "runs") / f"checkpoint_{step + 5}.pt").exists()


@pytest.mark.slow
def test_a_stop_during_evaluation_is_made_up_at_resume(tiny: list[str], tmp_path: Path) -> None:
    tiny = [*tiny, "eval_iters=20", "batch_size=1"]
    assert run_here([*tiny, into(tmp_path / "straight")]) == 0
    arguments = [*tiny, into(tmp_path / "stopped")]
    child = start(arguments)
    wait_for(child, "Evaluating at iteration 10")
    child.send_signal(signal.SIGUSR1)
    output, _ = child.communicate()
    assert child.returncode == 143, output
    run = only_run(tmp_path / "stopped")
    assert run_here([*arguments, f"resume_from_checkpoint={run}"]) == 0
    assert_same_run(run, only_run(tmp_path / "straight"), step=30)


@pytest.mark.slow
def test_resuming_twice_in_a_row_and_over_an_epoch_end_is_the_same_run(
    tiny: list[str], tmp_path: Path
) -> None:
    tiny = [*tiny, "checkpoint_freq=50", "test_freq=100", "block_size=64", "lr_decay_iters=200"]
    tiny = [*tiny, "warmup_iters=6"]
    assert run_here([*tiny, into(tmp_path / "straight"), "max_iters=200"]) == 0
    parts = [*tiny, into(tmp_path / "parts"), AUTO]
    for end in (30, 110, 200):
        assert run_here([*parts, f"max_iters={end}"]) == 0
    straight, resumed = (
        load_checkpoint(only_run(tmp_path / name) / "checkpoint_200.pt")
        for name in ("straight", "parts")
    )
    assert straight["train"]["epoch"] == 1
    for part in ("model", "optimizer", "cursor", "rng"):
        assert_equal(straight[part], resumed[part], part)


@pytest.mark.slow
def test_workers_accumulation_and_other_frequencies_do_not_change_the_run(
    tiny: list[str], tmp_path: Path
) -> None:
    assert run_here([*tiny, into(tmp_path / "a")]) == 0
    changes = ["num_workers=2", "prefetch_factor=1", "max_cached_files=1", "test_freq=15"]
    assert run_here([*tiny, into(tmp_path / "b"), *changes]) == 0
    records = [
        [r["train/loss"] for r in metrics(only_run(tmp_path / name)) if "train/loss" in r]
        for name in "ab"
    ]
    assert records[0] == records[1]


@pytest.mark.slow
def test_the_saved_config_starts_the_same_run(tiny: list[str], tmp_path: Path) -> None:
    assert run_here([*tiny, into(tmp_path / "a")]) == 0
    saved = only_run(tmp_path / "a") / "config.yaml"
    assert run_here([str(saved), into(tmp_path / "b")]) == 0
    assert_same_run(only_run(tmp_path / "a"), only_run(tmp_path / "b"), step=30)


def test_what_may_not_differ_is_refused_and_what_may_is_printed(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny, into(tmp_path / "runs")]
    assert run_here(arguments) == 0
    resume = f"resume_from_checkpoint={only_run(tmp_path / 'runs')}"
    capsys.readouterr()
    assert run_here([*arguments, resume, "n_layer=3", "seed=1"]) == 3
    error = capsys.readouterr().err
    assert "model.n_layer was 2, is 3; training.seed was 1337, is 1" in error
    assert "Traceback" not in error
    assert run_here([*arguments, resume, "learning_rate=1e-4", "max_iters=35"]) == 0
    output = capsys.readouterr().out
    assert "training.learning_rate: 0.003 -> 0.0001" in output
    assert "Resumed from checkpoint_30.pt: 30 steps done" in output


@pytest.mark.slow
def test_a_run_that_named_its_text_column_goes_on_with_a_config_that_does_not(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny, into(tmp_path / "runs"), "max_iters=4", "test_freq=null"]
    assert run_here([*arguments, "text_column=text"]) == 0
    assert "Text column" not in capsys.readouterr().out
    saved = only_run(tmp_path / "runs") / "config.yaml"
    before = saved.read_text()
    assert run_here([*arguments, AUTO, "max_iters=6"]) == 0
    output = capsys.readouterr().out
    assert "Text column: text\n" in output and "dataset.text_column" not in output
    assert only_run(tmp_path / "runs") and "text_column: text" in before
    assert "text_column: text" in saved.read_text()


@pytest.mark.slow
def test_auto_takes_another_learning_rate_for_another_experiment(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny, into(tmp_path / "runs"), AUTO]
    assert run_here(arguments) == 0
    assert run_here([*arguments, "learning_rate=1e-4"]) == 0
    assert "which differs in training.learning_rate); starting a new one" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("run_*"))) == 2
    assert run_here(arguments) == 0
    assert "Already finished at step 30: nothing to do." in capsys.readouterr().out


@pytest.mark.slow
def test_changed_data_is_refused_by_name(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_corpus(tmp_path / "text")
    arguments = [*tiny, into(tmp_path / "runs"), f"parquet_dir={folder}"]
    assert run_here(arguments) == 0
    (folder / "part_1.parquet").unlink()
    assert run_here([*arguments, AUTO]) == 3
    assert "part_1.parquet is gone" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_in_an_evaluation_and_a_kill_after_it_give_one_record_each(
    tiny: list[str], tmp_path: Path
) -> None:
    tiny = [*tiny, "eval_iters=20", "batch_size=1", "log_freq=1"]
    assert run_here([*tiny, into(tmp_path / "straight")]) == 0
    arguments = [*tiny, into(tmp_path / "stopped"), AUTO]
    for moment, number in (("Evaluating", signal.SIGTERM), ("Iter     15", signal.SIGKILL)):
        child = start(arguments)
        wait_for(child, moment)
        child.send_signal(number)
        child.communicate()
    assert run_here(arguments) == 0
    assert_same_run(only_run(tmp_path / "stopped"), only_run(tmp_path / "straight"), step=30)


@pytest.mark.slow
def test_running_a_finished_run_again_changes_nothing(tiny: list[str], tmp_path: Path) -> None:
    arguments = [*tiny, into(tmp_path / "runs"), AUTO]
    assert run_here(arguments) == 0
    run = only_run(tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert run_here(arguments) == 0
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.slow
def test_another_step_size_is_another_experiment_that_can_be_asked_for(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny, into(tmp_path / "runs"), AUTO]
    assert run_here([*arguments, "max_iters=10"]) == 0
    assert run_here([*arguments, "batch_size=8"]) == 0
    assert "which differs in sequences per step); starting a new one" in capsys.readouterr().out
    split = ["batch_size=2", "gradient_accumulation_steps=2", "max_iters=12"]
    assert run_here([*arguments, *split]) == 0
    assert "Resumed from checkpoint_10.pt" in capsys.readouterr().out
    (run,) = (r for r in (tmp_path / "runs").glob("run_*") if (r / "checkpoint_12.pt").exists())
    resume = [*tiny, into(tmp_path / "runs"), f"resume_from_checkpoint={run}"]
    assert run_here([*resume, "batch_size=6"]) == 3
    assert "processes a multiple of 4, or start a new run" in capsys.readouterr().err
    assert run_here([*resume, "batch_size=8", "block_size=16", "epochs=1", "max_iters=13"]) == 0
    output = capsys.readouterr().out
    assert "sequences per step: 4 -> 8" in output
    assert "Evaluation keeps its batches of 4 sequences" in output
    assert run_here([*resume, "batch_size=8", "max_iters=14"]) == 0
    output = capsys.readouterr().out
    assert "training.block_size: 16 -> 32" in output
    assert "tokens per step: 128 -> 256, from the next token of the text on" in output
    content = load_checkpoint(run / "checkpoint_14.pt")
    assert content["train"]["tokens"] == 12 * 128 + 128 + 256


def test_other_positions_of_a_gpt_are_another_model() -> None:
    then = Config.from_dict({"model": {"name": "gpt"}})
    now = replace(then, training=replace(then.training, block_size=16))
    with pytest.raises(CheckpointError, match=r"block_size was 512, is 16\. .*init_from"):
        check_resumable(then, now, "checkpoint_1.pt", 1, 1)
    bdh = replace(then, model=Config().model), replace(now, model=Config().model)
    assert "  training.block_size: 512 -> 16" in check_resumable(*bdh, "checkpoint_1.pt", 1, 1)


def test_another_weight_of_a_source_is_another_experiment_that_is_named() -> None:
    source = {"name": "web", "weight": 0.7, "parquet_dir": "w"}
    then, now = (
        Config.from_dict({"dataset": {"mixture": [source | changes]}})
        for changes in ({}, {"weight": 0.5, "text_column": "body"})
    )
    assert differences(then, now) == {
        "dataset.mixture.web.weight": (0.7, 0.5),
        "dataset.mixture.web.text_column": (None, "body"),
    }
    assert "dataset.mixture.web.weight" in experiment_differences(then, now)
    assert "  dataset.mixture.web.weight: 0.7 -> 0.5" in check_resumable(then, now, "c", 1, 1)
