"""Memory of a GPU: the batch size that fits, and what is said when it runs out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.devices import DEVICE, cuda_only, gpu_tests
from tests.gpu.test_training import Runs, runs

__all__ = ["runs"]
pytestmark = [*gpu_tests, pytest.mark.slow]


@pytest.fixture
def little_memory() -> Iterator[None]:
    """1 GB of the device: more is refused by torch, not by the device, and at once."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(1e9 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


LARGE = ["n_embd=512", "block_size=512", "n_layer=4"]


def test_an_automatic_batch_size_fits(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["batch_size=auto", "tokens_per_step=4096", "block_size=64", "compile=false"]
    assert runs.train("gpt", *options) == 0
    assert "Batch size: 64 of 64 sequences" in capsys.readouterr().out


@cuda_only
def test_an_automatic_batch_size_is_tried_and_lowered(
    runs: Runs, little_memory: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # The prediction knows of the whole device, so that the trials alone find what fits.
    options = [*LARGE, "batch_size=auto", "tokens_per_step=131072", "compile=false", "max_iters=2"]
    assert runs.train("gpt", *options) == 0
    said = capsys.readouterr().out
    assert "after a trial" in said and "of 256 sequences" in said


@cuda_only
@pytest.mark.parametrize("compiled", ["false", "true"], ids=["eager", "compiled"])
def test_memory_that_runs_out_ends_the_run_with_what_would_fit(
    runs: Runs, compiled: str, little_memory: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train("gpt", *LARGE, "batch_size=256", f"compile={compiled}") == 1
    said = capsys.readouterr()
    assert "Out of memory" in said.err and "training.batch_size" in said.err
    assert "failed (OutOfMemoryError" not in said.out and "Traceback" not in said.err
