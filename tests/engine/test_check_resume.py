"""`--check-resume` tells whether an interrupted run is the same run, and where it is not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.precision.precision import Precision
from engine.setup.check_resume import deterministic_algorithms, first_difference
from tests.runs import only_run, run_here, start, wait_for


def changed(config: Path, folder: Path) -> Path:
    """The tiny run, which says nothing of 4-bit weights."""
    text = config.read_text().replace("low_precision: {use_4bit: false}\n", "")
    assert text != config.read_text()
    place = folder / "changed.yaml"
    place.write_text(text)
    return place


def test_on_cuda_the_check_uses_deterministic_algorithms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "The check uses deterministic algorithms. Runs do not" in capsys.readouterr().out


def test_a_run_that_resumes_exactly_is_called_the_same_and_leaves_nothing(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "a" / "runs"
    assert run_here([*tiny, f"checkpoint_dir={place}", "--check-resume=6", "dropout=0.2"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("The same: 6 steps straight, and 6 interrupted after 3, agree in all ")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_folder_of_runs_that_was_there_stays_as_it_was(tiny: list[str], tmp_path: Path) -> None:
    place = f"checkpoint_dir={tmp_path / 'runs'}"
    assert run_here([*tiny, place]) == 0
    run = only_run(tmp_path / "runs")
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    resuming = [f"resume_from_checkpoint={run}", "max_iters=60"]
    assert run_here([*tiny, place, *resuming, "--check-resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert list((tmp_path / "runs").iterdir()) == [run]


@pytest.mark.slow
def test_what_a_checkpoint_forgets_is_named(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The moments of the optimizer start anew at resume."""
    monkeypatch.setattr("engine.setup.build.load_optimizer", lambda optimizer, state: None)
    assert run_here([*tiny, f"checkpoint_dir={tmp_path / 'runs'}", "--check-resume=6"]) == 1
    told = capsys.readouterr().out
    assert "Not the same after 6 steps: model.encoder differs in " in told
    assert "Two uninterrupted runs match, so the checkpoint is missing some state." in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_device_that_computes_differently_each_time_is_told_from_that(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    noise = iter(range(1, 10**6))

    @contextlib.contextmanager
    def training(self: Precision, step: int) -> Iterator[None]:
        yield
        # Later additions arrive in another order: the last bits differ.

    def step(self: Precision, optimizer: torch.optim.Optimizer, maximum: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.add_(next(noise) * 1e-6)
        optimizer.step()

    monkeypatch.setattr(Precision, "training", training)
    monkeypatch.setattr(Precision, "step", step)
    assert run_here([*tiny, f"checkpoint_dir={tmp_path / 'runs'}", "--check-resume=4"]) == 1
    assert "Two uninterrupted runs differ as well (model." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--check-resume=1", "--check-resume=1: a number of steps, at least 2"),
        ("--check-resume=soon", "--check-resume=soon: a number of steps, at least 2"),
    ],
)
def test_a_wrong_number_of_steps_is_a_mistake_of_the_command_line(
    tiny: list[str], word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_here([*tiny, word])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_of_one_step_cannot_be_interrupted(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"checkpoint_dir={tmp_path / 'runs'}", "max_iters=1", "warmup_iters=0"]
    assert run_here([*tiny, *options, "--check-resume"]) == 2
    assert "nothing to interrupt in a run of 1 (training.max_iters)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_its_data_ends_is_checked_to_its_end(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["epochs=1", "batch_size=64", "block_size=64", "max_iters=1000"]
    options = [*sizes, f"checkpoint_dir={tmp_path / 'runs'}", "--check-resume", "500"]
    assert run_here([*tiny, *options]) == 0
    told = capsys.readouterr().out
    made = re.search(r"The same: (\d+) steps straight", told)
    assert made is not None and 2 <= int(made[1]) < 500


@pytest.mark.slow
def test_4_bit_weights_set_in_and_an_evaluation_falls_due_within_the_check(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["use_4bit=true", "max_iters=3000", f"checkpoint_dir={tmp_path / 'runs'}"]
    tiny = [str(changed(Path(tiny[0]), tmp_path))]
    assert run_here([*tiny, *options, "--check-resume=8"]) == 0
    told = capsys.readouterr().out
    assert "from step 3)" in told and "Evaluating at iteration 4..." in told
    assert "The same: 8 steps straight" in told


@pytest.mark.slow
def test_what_a_killed_check_left_behind_is_removed_by_the_next(
    tiny: list[str], tmp_path: Path
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / "runs" / f".check_{socket.gethostname()}_{ended.pid}_abc"
    other = tmp_path / "runs" / ".check_elsewhere_1_abc"
    for folder in (left, other):
        (folder / "straight").mkdir(parents=True)
    assert run_here([*tiny, f"checkpoint_dir={tmp_path / 'runs'}", "--check-resume=2"]) == 0
    assert not left.exists() and other.exists()


@pytest.mark.slow
def test_the_micro_batch_is_settled_once_for_all_runs_of_a_check(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter(([6, 3], [3], [2]))
    monkeypatch.setattr(
        "engine.setup.build.predict_batch_sizes", lambda estimator, budget: (next(sizes), "found")
    )
    options = ["batch_size=auto", "tokens_per_step=192", f"checkpoint_dir={tmp_path / 'runs'}"]
    assert run_here([*tiny, *options, "--check-resume=4"]) == 0
    assert next(sizes) == [3]  # asked once


@pytest.mark.slow
def test_ctrl_c_ends_the_check_and_leaves_nothing(tiny: list[str], tmp_path: Path) -> None:
    options = [f"checkpoint_dir={tmp_path / 'runs'}", "max_iters=100000", "log_freq=1"]
    child = start([*tiny, *options, "--check-resume=90000"])
    wait_for(child, "Iter      3")
    os.kill(child.pid, signal.SIGINT)
    output, _ = child.communicate()
    assert child.returncode == 130 and "Traceback" not in output
    assert "The check was stopped: nothing is known of resuming." in output
    assert not (tmp_path / "runs").exists()


def test_comparing_tells_negative_zero_from_zero_and_nan_equals_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def content(value: float) -> dict[str, Any]:
        weight = nn.Parameter(torch.tensor([1.0, value])).data
        plain: dict[str, Any] = {key: {} for key in ("optimizer", "precision", "cursor", "rng")}
        return {"model": {"weight": weight}, "train": {"elapsed_s": value}, **plain}

    values = {"nan": torch.nan, "zero": 0.0, "minus": -0.0}
    monkeypatch.setattr(
        "engine.setup.check_resume.load_checkpoint", lambda path: content(values[path.name])
    )
    assert first_difference(Path("nan"), Path("nan"))[1] is None
    assert first_difference(Path("zero"), Path("zero")) == (2, None)
    difference = first_difference(Path("zero"), Path("minus"))[1]
    assert difference is not None and difference.startswith("model.weight differs in 1 of 2 number")
