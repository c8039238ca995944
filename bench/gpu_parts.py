"""The parts of `bench.gpu`. Each is a generator of rows, run in a process of its own.

What a table compares takes turns in one process, so that a slow moment of the machine meets all of
it. Building, compiling and a few steps come first and are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch

from bench.bdh_measure import GB, Timing, hardware, timed
from bench.gpu_model import Prediction
from bench.gpu_report import Row
from config import ConfigError
from engine.hardware.device import cuda_versions, peak_flops, prepare_device

TURNS = 5
WARM_UP = 3  # runs of each work before any is timed: they compile, tune and fill the allocator


@dataclass(frozen=True)
class Work:
    """What a row times."""

    what: str
    build: Callable[[], Callable[[], object]]
    """Returns what a round calls."""
    tokens: int = 0
    flops: float = 0.0
    predicted: Prediction | None = None
    note: str = ""
    calls: int = 1
    """That a round makes, of which one is told."""


class Bench:
    """What all parts share: the device, the time there is, and what they are compared with."""

    def __init__(self, options: argparse.Namespace) -> None:
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        prepare_device(self.device)
        self.tiny: bool = options.tiny
        self.reference: Path | None = options.reference
        self.nanogpt: Path | None = options.nanogpt
        self.ends: float = options.started + 0.95 * options.limit

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def facts(self) -> dict[str, str | int | float | None]:
        """Returns what the head of the page tells."""
        peak = peak_flops(self.device, "bfloat16")
        return {
            "device": hardware(self.device),
            "torch": torch.__version__,
            **cuda_versions(self.device),
            "data_sheet_tflops": None if peak is None else peak / 1e12,
        }

    def compare(self, works: Sequence[Work], turns: int = TURNS) -> Iterator[Row]:
        """Yields a row per work; ratios are to the first. A work that fails costs its own row."""
        ready: dict[str, Callable[[], object]] = {}
        torch.compiler.reset()  # or a second batch size would be compiled for any size
        began = now = time.monotonic()
        for work in works:
            began, now = now, time.monotonic()
            try:
                if now + (now - began) > self.ends:  # it may take as long as the one before
                    raise TimeoutError("no time is left")
                ready[work.what] = run = work.build()
                for _ in range(WARM_UP if self.cuda else 1):
                    run()
            except Exception as error:  # a library is missing, memory runs out, a kernel breaks
                ready.pop(work.what, None)
                yield failed(work.what, error)
        timings = self._take_turns(ready, turns)
        base = timings.get(works[0].what) if len(works) > 1 else None
        for work in works:
            if work.what in timings:
                yield self._row(work, timings[work.what], base)

    def _take_turns(self, works: dict[str, Callable[[], object]], turns: int) -> dict[str, Timing]:
        timings = {what: Timing() for what in works}
        for _ in range(turns):
            began = time.monotonic()
            for what, work in works.items():
                timed(work, self.device, timings[what])
            now = time.monotonic()
            if now + (now - began) > self.ends:
                break
        return timings

    def _row(self, work: Work, timing: Timing, base: Timing | None) -> Row:
        ratio = None
        if base is not None:
            pairs = zip(base.seconds, timing.seconds, strict=True)
            ratio = statistics.median(theirs / own for theirs, own in pairs)
        return Row(
            work.what,
            [seconds * 1e3 / work.calls for seconds in timing.seconds],
            tokens=work.tokens,
            flops=work.flops,
            ratio=ratio,
            peak_gb=timing.peak / GB if self.cuda and work.tokens else None,
            predicted=None if work.predicted is None else work.predicted.ms,
            note=work.note,
        )


def failed(what: str, error: BaseException) -> Row:
    """Returns the row of what does not run; its traceback goes to the log."""
    traceback.print_exception(error)
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, ConfigError):  # the device or a library cannot do it
        return Row(what, note=f"skipped: {lines[0][:150]}")
    return Row(what, note=f"failed: {type(error).__name__}: {lines[0][:150]}")


def run_part(name: str, options: argparse.Namespace) -> None:
    """Runs a part; its rows go to standard output, all that anything prints to standard error."""
    from bench import gpu_ceilings, gpu_runs, gpu_steps

    parts = gpu_ceilings.PARTS | gpu_runs.PARTS | gpu_steps.PARTS
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    # Several models of one class are compiled here, and the limit is per function.
    torch._dynamo.config.recompile_limit = 64
    bench = Bench(options)
    _tell(rows, {"facts": bench.facts()})
    for row in parts[name](bench):
        _tell(rows, asdict(row))


def _tell(rows: TextIO, value: dict[str, object]) -> None:
    print(json.dumps(value), file=rows, flush=True)
