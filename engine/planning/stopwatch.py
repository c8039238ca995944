"""Times work on a device as if no other program used it.

Other programs slow a parallel matrix product on a CPU down many times over, because each of torch's
threads waits for the slowest one. So as many threads are used as there are idle cores, and the time
is scaled to all of them; with one idle core, CPU seconds are counted instead of elapsed ones. Of
several trials the fastest one counts: other programs only make them slower.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ENOUGH_S = 1.2  # of timing one thing, after a warm-up
_MATMUL_S = 0.3
_SAMPLE_S = 0.2  # of watching the use of the cores
_IDLE_FIELDS = slice(3, 5)  # idle and waiting for disks, in a line of /proc/stat


@dataclass(frozen=True)
class Stopwatch:
    """Times work on a device; made by `stopwatch`."""

    device: torch.device
    until: float = math.inf
    """No further trial begins after this, by `time.perf_counter`."""
    clock: Callable[[], float] = time.perf_counter
    scale: float = 1.0
    """Seconds that all of torch's threads take per second of the threads used here."""
    busy: float = 0.0
    """Cores that other programs use."""

    def once(self, trial: Callable[[], object]) -> float:
        """Returns the seconds of one trial, scaled to all threads."""
        began = self.clock()
        trial()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return (self.clock() - began) * self.scale

    @property
    def is_over(self) -> bool:
        """Whether no further trial shall begin."""
        return time.perf_counter() >= self.until

    def fastest(
        self, trial: Callable[[], object], enough_s: float = ENOUGH_S, warm_up: bool = True
    ) -> float:
        """Returns the fastest of several times of `trial`.

        warm_up: run it once before, for kernels to be chosen and caches to be filled.
        """
        if warm_up:
            self.once(trial)
        best, began = math.inf, time.perf_counter()
        for _ in range(100):
            best = min(best, self.once(trial))
            if time.perf_counter() - began >= enough_s or self.is_over:
                break
        return best

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Returns the FLOP/s of products of square matrices."""
        size, began = 256, time.perf_counter()
        # Small products are slower per FLOP, so sizes are doubled until one takes 0.02 s.
        while True:
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
            self.once(multiply)
            took = self.once(multiply)
            if took > 0.02 or size == 8192 or time.perf_counter() - began > _MATMUL_S / 3:
                break
            size *= 2
        while time.perf_counter() - began < _MATMUL_S:
            took = min(took, self.once(multiply))
        return float(2 * size**3 / took)


@contextmanager
def stopwatch(device: torch.device, budget_s: float) -> Iterator[Stopwatch]:
    """Gives a stopwatch for about `budget_s` that uses the cores that other programs leave."""
    until = time.perf_counter() + budget_s
    if device.type != "cpu":
        yield Stopwatch(device, until)
        return
    busy, threads = busy_cores(), torch.get_num_threads()
    left = round((os.cpu_count() or threads) - busy)
    idle = max(1, min(threads, left))
    if left >= threads:
        yield Stopwatch(device, until, busy=busy)
        return
    torch.set_num_threads(idle)
    clock = time.thread_time if idle == 1 else time.perf_counter
    try:
        yield Stopwatch(device, until, clock, idle / threads, busy)
    finally:
        torch.set_num_threads(threads)


def busy_cores(stat: Path = Path("/proc/stat")) -> float:
    """Returns how many cores are in use now; 0 where the system does not tell."""
    try:
        before = _jiffies(stat)
        time.sleep(_SAMPLE_S)
        after = _jiffies(stat)
    except (OSError, ValueError, IndexError):
        return 0.0
    total, idle = (now - then for now, then in zip(after, before, strict=True))
    return (os.cpu_count() or 1) * (1 - idle / total) if total > 0 else 0.0


def _jiffies(stat: Path) -> tuple[int, int]:
    """Returns the clock ticks of all cores since the system started: all, and the idle ones."""
    ticks = [int(word) for word in stat.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    return sum(ticks), sum(ticks[_IDLE_FIELDS])
