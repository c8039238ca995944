"""Speed and memory of the low-precision modes on a GPU; part of `bench.precision`.

Several of these models do not fit into memory together, so a mode is built anew for its turn in
each round, warmed up, timed over some steps and let go. Without CUDA the same code runs on the CPU
at tiny shapes (--gpu --quick), which tries the code and measures nothing.
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
ENOUGH = 1 << 20  # steps; 4-bit weights are at work in all of them


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
        training = {"batch_size": self.batch[0], "block_size": self.batch[1], "max_iters": ENOUGH}
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
class Taken:
    """What a mode took, a round each; or why it took nothing."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    products: float = 0.0
    parameters: int = 0
    compiled: str = ""
    skipped: str = ""


def gpu(options: argparse.Namespace) -> Iterator[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds, steps = (2, 2) if options.quick else (min(options.rounds, 3), 10)
    if device.type == "cpu":
        yield "**Tried on a CPU: these are no measurements.**"
    yield f"Training steps with the optimizer, {rounds} rounds of {steps} steps; a mode is built"
    yield "anew for each round. Peak memory is that of a step, with weights, gradients and the"
    yield "optimizer's state. 4-bit weights are at work in every step. Of Transformer Engine the"
    yield "calls of its modules are counted, each a product forward and two backward."
    wanted = tuple((options.shapes or "").split(","))
    for shape in QUICK if options.quick else SHAPES:
        if shape.title.startswith(wanted):
            yield from ["", *measure(shape, device, rounds, steps)]


def measure(shape: Shape, device: torch.device, rounds: int, steps: int) -> Iterator[str]:
    """The table of one shape."""
    taken = {mode.title: Taken() for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            one_turn(shape, mode, (device, steps), taken[mode.title])
    count = max(each.parameters for each in taken.values())
    yield f"### {shape.title}: {count:,} parameters, {shape.batch[0]} x {shape.batch[1]} tokens"
    yield ""
    base = taken[BF16.title]
    lines = [row(name, each, base, shape.tokens) for name, each in taken.items()]
    columns = "ms per step", "tokens/s", "x bf16's speed", "peak GB", "8-bit products a step"
    yield from table(("mode", *columns, "compiler"), lines)


def one_turn(shape: Shape, mode: Mode, where: tuple[torch.device, int], taken: Taken) -> None:
    """Adds a round to what the mode took, unless it was found not to run here."""
    if taken.skipped:
        return
    device, steps = where
    try:
        run(shape, mode, where, taken)
    except ConfigError as error:  # a library or a GPU that is not there
        taken.skipped = str(error).strip().splitlines()[-1]
    except torch.OutOfMemoryError:
        taken.skipped = "out of memory"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(shape: Shape, mode: Mode, where: tuple[torch.device, int], taken: Taken) -> None:
    device, steps = where
    torch.compiler.reset()  # else turns would use up the recompiles that a function may have
    before = held(device)
    trainer = Trainer(shape.sections(), mode, device)
    rows = batch(shape, device)
    taken.compiled = trainer.compile(rows) if device.type == "cuda" else "not compiled"
    for _ in range(3):
        trainer.step(rows)
    trainer.products_per_step()
    reset_peak(device)

    def work() -> None:
        for _ in range(steps):
            trainer.step(rows)

    taken.seconds.append(seconds(work, device) / steps)
    taken.peak = max(taken.peak, held(device, peak=True) - before)
    taken.products, taken.parameters = trainer.products_per_step(), trainer.parameters


def batch(shape: Shape, device: torch.device) -> Tensor:
    """Rows (B, T+1)."""
    size = (shape.batch[0], shape.batch[1] + 1)
    return torch.randint(shape.model.get("vocab_size", 256), size, device=device)


def row(name: str, taken: Taken, base: Taken, tokens: int) -> list[str]:
    if taken.skipped:
        return [name, *["-"] * 5, f"skipped: {taken.skipped}"]
    each = statistics.median(taken.seconds)
    speed = "-"
    if not base.skipped:
        pairs = zip(base.seconds, taken.seconds, strict=True)
        speed = f"{statistics.median(theirs / own for theirs, own in pairs):.2f}"
    products = f"{taken.products:.0f}" if taken.products else ""
    line = [name, f"{each * 1000:.1f}", f"{tokens / each:,.0f}", speed, f"{taken.peak / GB:.2f}"]
    return [*line, products, taken.compiled]
