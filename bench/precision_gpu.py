"""Speed and memory of the low-precision modes on a GPU; part of `bench.precision`.

The models do not fit into memory together, so each round builds a mode, warms it up, times some
steps and frees it. Without CUDA the same code runs on the CPU at tiny shapes (--gpu --quick), which
tests the code and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.bdh_measure import GB, held, reset_peak, seconds, table
from bench.precision_modes import (
    ADAMW_4BIT,
    ADAMW_8BIT,
    BF16,
    ENGINE_CURRENT,
    ENGINE_DELAYED,
    FP8_CURRENT,
    FP8_DELAYED,
    Mode,
    Sections,
    Trainer,
    late,
)
from config import ConfigError

MODES = (
    BF16,
    FP8_CURRENT,
    FP8_DELAYED,
    ENGINE_CURRENT,
    ENGINE_DELAYED,
    late("nf4", 0.0),
    ADAMW_8BIT,
    ADAMW_4BIT,
)
MANY_STEPS = 1 << 20  # of the run that is timed; 4-bit weights are used from the first


@dataclass(frozen=True)
class Shape:
    """A model and its batch (B, T)."""

    title: str
    model: dict[str, Any]
    batch: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.batch[0] * self.batch[1]

    def sections(self) -> Sections:
        training = {
            "batch_size": self.batch[0],
            "block_size": self.batch[1],
            "max_iters": MANY_STEPS,
        }
        return {"model": {"dropout": 0.0, **self.model}, "training": training}


def _bdh(width: int, multiplier: int, layers: int = 6) -> dict[str, Any]:
    sizes = {"n_embd": width, "mlp_internal_dim_multiplier": multiplier, "n_layer": layers}
    return {"name": "bdh", "n_head": 4, **sizes}


def _gpt(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    sizes = {"n_embd": width, "n_layer": layers, "vocab_size": vocabulary}
    return {"name": "gpt", "n_head": max(1, width // 64), **sizes}


SHAPES = (
    Shape("BDH 25M", _bdh(256, 128), (32, 512)),
    Shape("BDH 124M", _bdh(512, 160), (16, 512)),
    Shape("BDH 1B", _bdh(1024, 320), (8, 512)),
    Shape("GPT 124M", _gpt(768, 12, 50304), (12, 1024)),
)
QUICK = (
    Shape("BDH tiny", _bdh(32, 8, layers=1), (2, 16)),
    Shape("GPT tiny", _gpt(64, 1, 256), (2, 16)),
)


@dataclass
class Measurement:
    """Seconds per step of each round, and the rest; or why the mode was skipped."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    fp8_matmuls: float = 0.0
    parameters: int = 0
    compiled: str = ""
    skipped: str = ""


def gpu(options: argparse.Namespace) -> Iterator[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds, steps = (2, 2) if options.quick else (min(options.rounds, 3), 10)
    if device.type == "cpu":
        yield "**Run on a CPU to test the code: not a measurement.**"
    yield f"Training steps with the optimizer, {rounds} rounds of {steps} steps; each round builds"
    yield "the mode anew. Peak memory includes weights, gradients and the optimizer state."
    yield "4-bit weights are used in every step. For Transformer Engine, calls of its modules are"
    yield "counted: each is one matmul forward and two backward."
    wanted = tuple((options.shapes or "").split(","))
    for shape in QUICK if options.quick else SHAPES:
        if shape.title.startswith(wanted):
            yield from ["", *measure(shape, device, rounds, steps)]


def measure(shape: Shape, device: torch.device, rounds: int, steps: int) -> Iterator[str]:
    """The table of one shape."""
    taken = {mode.title: Measurement() for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            measure_round(shape, mode, device, steps, taken[mode.title])
    count = max(each.parameters for each in taken.values())
    yield f"### {shape.title}: {count:,} parameters, {shape.batch[0]} x {shape.batch[1]} tokens"
    yield ""
    base = taken[BF16.title]
    lines = [row(name, each, base, shape.tokens) for name, each in taken.items()]
    columns = "ms per step", "tokens/s", "x bf16's speed", "peak GB", "FP8 matmuls per step"
    yield from table(("mode", *columns, "compiler"), lines)


def measure_round(
    shape: Shape, mode: Mode, device: torch.device, steps: int, taken: Measurement
) -> None:
    """Adds a round to the measurement, unless the mode does not run here."""
    if taken.skipped:
        return
    try:
        run(shape, mode, device, steps, taken)
    except ConfigError as error:  # the GPU or a library is missing
        taken.skipped = str(error).strip().splitlines()[-1]
    except torch.OutOfMemoryError:
        taken.skipped = "out of memory"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(shape: Shape, mode: Mode, device: torch.device, steps: int, taken: Measurement) -> None:
    torch.compiler.reset()  # else the rounds would exceed the recompilations a function may have
    before = held(device)
    trainer = Trainer(shape.sections(), mode, device)
    rows = batch(shape, device)
    taken.compiled = trainer.compile(rows) if device.type == "cuda" else "not compiled"
    for _ in range(3):
        trainer.step(rows)
    trainer.fp8_matmuls_per_step()
    reset_peak(device)

    def work() -> None:
        for _ in range(steps):
            trainer.step(rows)

    taken.seconds.append(seconds(work, device) / steps)
    taken.peak = max(taken.peak, held(device, peak=True) - before)
    taken.fp8_matmuls, taken.parameters = trainer.fp8_matmuls_per_step(), trainer.parameters


def batch(shape: Shape, device: torch.device) -> Tensor:
    """Rows (B, T+1)."""
    size = (shape.batch[0], shape.batch[1] + 1)
    return torch.randint(shape.model.get("vocab_size", 256), size, device=device)


def row(name: str, taken: Measurement, base: Measurement, tokens: int) -> list[str]:
    if taken.skipped:
        return [name, *["-"] * 5, f"skipped: {taken.skipped}"]
    each = statistics.median(taken.seconds)
    speed = "-"
    if not base.skipped:
        pairs = zip(base.seconds, taken.seconds, strict=True)
        speed = f"{statistics.median(theirs / own for theirs, own in pairs):.2f}"
    matmuls = f"{taken.fp8_matmuls:.0f}" if taken.fp8_matmuls else ""
    line = [name, f"{each * 1000:.1f}", f"{tokens / each:,.0f}", speed, f"{taken.peak / GB:.2f}"]
    return [*line, matmuls, taken.compiled]
