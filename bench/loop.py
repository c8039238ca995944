"""What the loop itself costs: everything in a step but forward, backward and optimizer.

    python -m bench.loop [CONFIG]       # the quickstart config; target: under 2 % of a step

Timers wrap the forward pass, the backward pass and the optimizer step of a real run; what is left
of the loop's time is its own: waiting for data, clipping, the finite check, counting, logging.
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
    """Seconds per step of the whole loop, and of forward, backward and optimizer in it."""
    request = command_line(
        [config, f"checkpoint_dir={folder}", f"max_iters={STEPS}", "warmup_iters=1"]
        + ["test_freq=null", "checkpoint_freq=null", "log_freq=20"]
    )
    inner = Timed()
    with ExitStack() as stack, StopRequest() as stop:
        world = stack.enter_context(enter_world(request.config.system, request.config.distributed))
        run = build(request, world, stack)
        run.next_batch()  # the first batch opens files; a run pays that once
        run.ddp_model.forward = inner.wrap(run.ddp_model.forward)
        for name in ("backward", "step"):
            setattr(run.precision, name, inner.wrap(getattr(run.precision, name)))
        began = time.perf_counter()
        train.train(run, stop)
        return (time.perf_counter() - began) / STEPS, inner.seconds / STEPS


def main() -> None:
    config = sys.argv[1] if len(sys.argv) > 1 else QUICKSTART
    with tempfile.TemporaryDirectory() as folder:
        whole, inner = measure(config, folder)
    share = (whole - inner) / whole
    print(f"\nstep {whole * 1000:.2f} ms, of it the model and optimizer {inner * 1000:.2f} ms")
    print(f"the loop's own part: {share:.2%} (target: under {TARGET:.0%})")


if __name__ == "__main__":
    main()
