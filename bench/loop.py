"""Measures the overhead of the training loop: a step without forward, backward and optimizer.

    python -m bench.loop [CONFIG]       # the quickstart config; target: under 2 % of a step

Timers wrap the forward pass, the backward pass and the optimizer step of a real run. The rest of a
step is overhead: waiting for data, clipping, the check for NaN, counting, logging. Of it, what the
hashes of batches and weights take is told apart, in CPU time (target: under 0.5 % of a step).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import train
from config import command_line
from engine.hardware.distributed import enter_world
from engine.setup.build import build
from engine.signals import StopRequest
from engine.weights_hash import weights_hash

QUICKSTART = "configs/quickstart.yaml"
STEPS = int(os.environ.get("STEPS", "60"))
TARGET = 0.02
HASH_TARGET = 0.005
CALLS = 5


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


class Cost(NamedTuple):
    """Seconds per step."""

    whole: float
    inner: float
    """Of forward, backward and optimizer."""
    batch_hash: float
    """CPU time."""
    weights_hash: float
    """CPU time of one hash, shared among the steps between two log records of the config."""


def cpu_s(function: Callable[[], object]) -> float:
    """Returns the CPU time of a call, the least of several."""
    times = []
    for _ in range(CALLS):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return min(times)


def measure(config: str, folder: str) -> Cost:
    """Trains, and returns what a step costs."""
    log_freq = command_line([config]).config.training.log_freq
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
        whole = (time.perf_counter() - began) / STEPS
        weights = cpu_s(lambda: weights_hash(trainer.model.state_dict(), world))
        batch = cpu_s(next(trainer.batches).rows_hash)
        return Cost(whole, inner.seconds / STEPS, batch, weights / log_freq)


def main() -> None:
    config = sys.argv[1] if len(sys.argv) > 1 else QUICKSTART
    with tempfile.TemporaryDirectory() as folder:
        cost = measure(config, folder)
    whole, inner = cost.whole, cost.inner
    share, hashes = (whole - inner) / whole, (cost.batch_hash + cost.weights_hash) / whole
    print(f"\nstep {whole * 1000:.2f} ms, of which model and optimizer {inner * 1000:.2f} ms")
    print(f"overhead of the loop: {share:.2%} (target: under {TARGET:.0%})")
    print(
        f"hashes: {hashes:.3%} (target: under {HASH_TARGET:.1%}): of the batch "
        f"{cost.batch_hash * 1e6:.0f} us, of the weights {cost.weights_hash * 1e6:.0f} us a step"
    )


if __name__ == "__main__":
    main()
