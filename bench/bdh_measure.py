"""What `bench.bdh` measures with: clocks, memory, the rate of plain matrix products, tables."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GB = 1e9


@dataclass
class Timing:
    """Of each round: seconds, and on a GPU the bytes allocated beyond those held before."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def ratio(self, other: Timing | None) -> str:
        """How many times as long the other takes."""
        if other is None:
            return "-"
        pairs = zip(other.seconds, self.seconds, strict=True)
        return f"{statistics.median(theirs / own for theirs, own in pairs):.2f}"


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def timed(work: Callable[[], object], device: torch.device, timing: Timing) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    timing.seconds.append(seconds(work, device))
    if device.type == "cuda":
        timing.peak = max(timing.peak, torch.cuda.max_memory_allocated() - held)


def ceiling(device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, ...]]) -> float:
    """FLOP/s of the best of these (a x b) @ (b x c), each the median of 20."""
    calls = 20 if device.type == "cuda" else 1  # launches are not to count
    best = 0.0
    for a, b, c in sizes:
        left, right = (torch.randn(s, device=device).to(dtype) for s in ((a, b), (b, c)))
        out = torch.empty(a, c, device=device, dtype=dtype)

        def work(
            left: Tensor = left, right: Tensor = right, out: Tensor = out, calls: int = calls
        ) -> None:
            for _ in range(calls):
                torch.mm(left, right, out=out)

        work()
        median = statistics.median(seconds(work, device) for _ in range(20))
        best = max(best, 2 * a * b * c * calls / median)
    return best


def held(device: torch.device, peak: bool = False) -> int:
    """Bytes of this process now, or at most; getrusage would count its parent's too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def memory_size(device: torch.device) -> int:
    """Bytes of the device, or of the machine, or what this container may use of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(size, int(text)) if text.isdigit() else size


def table(columns: Sequence[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Lines of markdown, each as soon as its row is there."""
    for line in itertools.chain([list(columns), ["---"] * len(columns)], rows):
        yield f"| {' | '.join(line)} |"


def says(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")


def listed(sizes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(" x ".join(map(str, size)) for size in sizes)


def gigabytes(size: int) -> str:
    return f"{size / GB:.2f}" if size else "-"


def times(above: float, below: float) -> str:
    return f"{above / below:.2f}" if above and below else "-"


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    amx = " with AMX" if "amx_bf16" in facts.get("flags", "") else ""
    size = f"{memory_size(device) / GB:.0f} GB"
    return f"{os.cpu_count()} cores of {facts.get('model name', '?').strip()}{amx}, {size}"


def short_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return torch.cuda.get_device_name(device).lower().removeprefix("nvidia ").replace(" ", "-")
