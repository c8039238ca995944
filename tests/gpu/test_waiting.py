"""Between two log lines nothing makes the host wait for its GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.trainer import Trainer
from tests.gpu.devices import DEVICE, cuda_only, gpu_tests
from tests.runs import run_here

pytestmark = gpu_tests


@cuda_only
@pytest.mark.slow
@pytest.mark.parametrize("model", ["bdh", "gpt", "llama"])
@pytest.mark.parametrize("mask", ["causal", "causal_document"])
def test_steps_between_log_lines_do_not_wait_for_the_gpu(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, model: str, mask: str
) -> None:
    """CUDA raises in every call that waits, except where a log line, the loop's end or the event of
    the step before is waited for."""
    next_step, log = Trainer.next_step, Trainer.log

    def strictly(trainer: Trainer, stop: Any) -> Any:
        assert trainer.reads_late
        step = next_step(trainer, stop)
        # The first steps choose kernels and allocate.
        watched = step is not None and step.number > 3
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        return step

    def at_ease(trainer: Trainer, rate: float) -> None:
        torch.cuda.set_sync_debug_mode("default")
        log(trainer, rate)

    monkeypatch.setattr(Trainer, "next_step", strictly)
    monkeypatch.setattr(Trainer, "log", at_ease)
    words = [f"model.name={model}", f"model.mask={mask}", "n_embd=64", "n_head=4", "max_iters=12"]
    words += ["log_freq=12", "test_freq=null", "save_model=false", "compile=false"]
    try:
        assert run_here([*tiny, *words, f"device={DEVICE}"]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
