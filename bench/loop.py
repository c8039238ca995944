"""Measures the overhead of the training loop: a step without forward, backward and optimizer.

    python -m bench.loop [CONFIG]       # the quickstart config; target: under 2 % of a step

Timers wrap the forward pass, the backward pass and the optimizer step of a real run. The rest of a
step is overhead: waiting for data, clipping, the check for NaN, counting, logging.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import train
from config import command_line
from engine.hardware.distributed import enter_world
from engine.setup.build import build
from engine.signals import StopRequest

QUICKSTART = "configs/quickstart.yaml"
STEPS = 60
TARGET = 0.02


class Timed:
    """Sums the time spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def measure(config: str, folder: str) -> tuple[float, float]:
    """Returns the seconds per step: of the whole loop, and of forward, backward and optimizer."""
    request = command_line(
        [config, f"checkpoint_dir={folder}", f"max_iters={STEPS}", "warmup_iters=1"]
        + ["test_freq=null", "checkpoint_freq=null", "log_freq=20"]
    )
    inner = Timed()
    with ExitStack() as stack, StopRequest() as stop:
        world = stack.enter_context(enter_world(request.config.system, request.config.distributed))
        trainer = build(request, world, stack)
        trainer.next_step(stop)  # the first batch opens files, once per run
        trainer.parallel_model.forward = inner.wrap(trainer.parallel_model.forward)
        for name in ("backward", "step"):
            setattr(trainer.precision, name, inner.wrap(getattr(trainer.precision, name)))
        began = time.perf_counter()
        train.train(trainer, stop)
        return (time.perf_counter() - began) / STEPS, inner.seconds / STEPS


def main() -> None:
    config = sys.argv[1] if len(sys.argv) > 1 else QUICKSTART
    with tempfile.TemporaryDirectory() as folder:
        whole, inner = measure(config, folder)
    share = (whole - inner) / whole
    print(f"\nstep {whole * 1000:.2f} ms, of which model and optimizer {inner * 1000:.2f} ms")
    print(f"overhead of the loop: {share:.2%} (target: under {TARGET:.0%})")


if __name__ == "__main__":
    main()
