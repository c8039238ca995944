"""Whole runs of train.py on a GPU: they learn, save, resume, and stop before what is not finite."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.trained_model import load_model
from tests.gpu.devices import DEVICE, ON_CUDA, cuda_only, gpu_tests
from tests.runs import only_run, run_here

pytestmark = gpu_tests
MODELS = {
    "bdh": "name: bdh, mlp_internal_dim_multiplier: 8",
    "gpt": "name: gpt",
    "llama": "name: llama",
    "gpt, documents": "name: gpt, mask: causal_document",
    "llama, documents": "name: llama, mask: causal_document",
    "bdh, documents": "name: bdh, mlp_internal_dim_multiplier: 8, mask: causal_document",
}
TINY = """
{model}
training:
  {{block_size: 32, batch_size: 4, max_iters: 6, learning_rate: 3e-3, log_freq: 1, test_freq: 6,
    eval_iters: 2, checkpoint_freq: 3}}
schedule: {{warmup_iters: 0}}
low_precision: {{use_4bit: false}}
system: {{device: "{device}"}}
dataset: {{parquet_dir: "{corpus}"}}
"""
each_model = pytest.mark.parametrize("name", MODELS)


class Runs:
    """A folder for runs of small models."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus

    def train(self, name: str, *options: str) -> int:
        """Returns the exit code."""
        model = f"model: {{{MODELS[name]}, n_layer: 2, n_embd: 64, n_head: 4}}"
        config = self.folder / "tiny.yaml"
        config.write_text(TINY.format(model=model, device=DEVICE, corpus=self.corpus))
        return run_here([os.fspath(config), f"checkpoint_dir={self.folder / 'runs'}", *options])

    @property
    def run(self) -> Path:
        return only_run(self.folder / "runs")

    def records(self) -> list[dict[str, Any]]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> list[float]:
        return [record["train/loss"] for record in self.records() if "train/loss" in record]


@pytest.fixture
def runs(tmp_path: Path, corpus_dir: Path) -> Runs:
    return Runs(tmp_path, corpus_dir)


@pytest.mark.parametrize("compiled", ["false", "true"], ids=["eager", "compiled"])
@pytest.mark.slow
@each_model
def test_a_run_learns_and_resumes_where_it_was(
    runs: Runs, name: str, compiled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(name, f"compile={compiled}") == 0
    said = capsys.readouterr().out
    assert ("compiled with" in said) == (compiled == "true"), said
    losses = runs.losses()
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert all(r["train/memory_bytes"] > 0 for r in runs.records() if "train/memory_bytes" in r)

    middle = runs.run / "checkpoint_3.pt"
    assert runs.train(name, f"compile={compiled}", f"resume_from_checkpoint={middle}") == 0
    # Attention's backward pass and the embedding's add atomically on a GPU; BDH has neither.
    tolerance = 2e-3 if ON_CUDA and not name.startswith("bdh") else 0.0
    assert runs.losses() == pytest.approx(losses, rel=tolerance, abs=0.0)


@cuda_only
@pytest.mark.slow
def test_a_run_changes_to_triton_kernels_and_back(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    name, found = "bdh, documents", []
    for kernels in ("torch", "triton"):
        shutil.rmtree(runs.folder / "runs", ignore_errors=True)
        assert runs.train(name, "dropout=0.1", "compile=false", f"kernels={kernels}") == 0
        found.append(runs.losses())
    assert "Kernels: Triton" in capsys.readouterr().out
    assert found[0] == pytest.approx(found[1], rel=0.02)
    middle = f"resume_from_checkpoint={runs.run / 'checkpoint_3.pt'}"
    assert runs.train(name, "dropout=0.1", "compile=false", "kernels=torch", middle) == 0
    assert runs.losses() == pytest.approx(found[0], rel=0.02)


@cuda_only
@pytest.mark.slow
@each_model
def test_recorded_steps_train_as_compiled_ones_do(
    runs: Runs, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for kind in ("true", "graphs"):
        assert runs.train(name, f"compile={kind}", "dropout=0.0") == 0
        found.append(runs.losses())
        shutil.rmtree(runs.folder / "runs")
    assert "one CUDA graph per micro-step" in capsys.readouterr().out
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.slow
@each_model
def test_a_checkpoint_is_loaded_on_both_devices(runs: Runs, name: str) -> None:
    assert runs.train(name, "compile=false") == 0
    tokens = torch.arange(32).view(1, 32)
    with torch.inference_mode():
        here = load_model(runs.run, "cpu")[0](tokens)
        there = load_model(runs.run, DEVICE)[0](tokens.to(DEVICE)).cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bdh", "gpt"])
def test_a_step_that_is_not_finite_is_never_taken_and_names_its_batch(
    runs: Runs, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["learning_rate=1e30", "grad_clip=0", "checkpoint_freq=1", "compile=false"]
    assert runs.train(name, *wild) == 4
    error = capsys.readouterr().err
    assert "not finite. The step was not taken; last checkpoint: " in error
    assert "row group" in error and "Traceback" not in error
    for checkpoint in sorted((runs.folder / "runs").glob("run_*/checkpoint_*.pt")):
        model, _ = load_model(checkpoint)
        assert all(p.isfinite().all() for p in model.parameters())
    shutil.rmtree(runs.folder / "runs", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama, documents"])
@pytest.mark.parametrize(
    "option", ["compute_dtype=float32", "compute_dtype=float16", "residual_dtype=bfloat16"]
)
def test_runs_in_other_formats_learn(runs: Runs, name: str, option: str) -> None:
    assert runs.train(name, option, "compile=false") == 0
    assert runs.losses()[-1] < runs.losses()[0]


@pytest.mark.slow
def test_a_run_in_fp8_learns_and_counts_its_matmuls(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    if ON_CUDA and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 matmuls need compute capability 8.9")
    for name in ("bdh", "gpt"):
        assert runs.train(name, "use_fp8=true", "fp8.backend=native") == 0
        assert "fp8: " in capsys.readouterr().out
        losses, records = runs.losses(), runs.records()
        assert losses[-1] < losses[0]
        assert all(r["train/fp8_products"] > 0 for r in records if "train/fp8_products" in r)
        assert any("train/fp8_products" in record for record in records)
        shutil.rmtree(runs.folder / "runs")
