"""Micro-steps of `system.compile: graphs`. A CPU has no CUDA graph: recorded operators stand in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import graphed_step
from engine.checkpoint.load import load_checkpoint
from tests.recorded import record_operators
from tests.runs import assert_equal, metrics, only_run, run_here

STEPS = ["compute_dtype=float32", "max_iters=4", "test_freq=2", "log_freq=1", "checkpoint_freq=2"]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_step, "record_graph", record_operators)
    monkeypatch.setattr("engine.setup.build.check_graphs", lambda config, world: None)
    monkeypatch.setattr("engine.compile.compiler_for", lambda device: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bdh", "gpt"])
def test_recorded_steps_train_as_others_do(
    name: str, tiny: list[str], tmp_path: Path, on_cpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, *STEPS, f"model.name={name}", "dropout=0.2", "mask=causal_document"]
    words += ["batch_size=2", "gradient_accumulation_steps=2"]
    plain, graphs, resumed = (tmp_path / name for name in ("plain", "graphs", "resumed"))
    assert run_here([*words, f"checkpoint_dir={plain}", "compile=false"]) == 0
    words += ["compile=graphs"]
    assert run_here([*words, f"checkpoint_dir={graphs}"]) == 0
    assert "one CUDA graph per micro-step" in capsys.readouterr().out
    shutil.copytree(plain, resumed)
    before = only_run(resumed) / "checkpoint_2.pt"
    assert run_here([*words, f"checkpoint_dir={resumed}", f"resume_from_checkpoint={before}"]) == 0
    expected = load_checkpoint(only_run(plain) / "checkpoint_4.pt")
    for folder in (graphs, resumed):
        found = load_checkpoint(only_run(folder) / "checkpoint_4.pt")
        for part in ("model", "optimizer", "rng"):
            assert_equal(found[part], expected[part], part)
        assert metrics(only_run(folder)) == metrics(only_run(plain))


@pytest.mark.slow
def test_what_cannot_be_recorded_runs_without_a_graph(
    tiny: list[str],
    tmp_path: Path,
    on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def record(function: Callable[[], Tensor], device: torch.device) -> None:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphed_step, "record_graph", record)
    words = [*tiny, f"checkpoint_dir={tmp_path}", "compile=graphs", "max_iters=2", "test_freq=null"]
    assert run_here(words) == 0
    assert "no CUDA graph (RuntimeError: operation not permitted" in capsys.readouterr().out


def test_graphs_on_a_cpu_are_refused_before_data_is_read(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--dry-run"]):
        assert run_here([*tiny, "compile=graphs", "dataset.parquet_dir=nowhere", *more]) == 2
        told = capsys.readouterr().err
        assert "system.compile=graphs records CUDA graphs, but this run computes on cpu" in told
        assert "Set system.compile: true or auto." in told
