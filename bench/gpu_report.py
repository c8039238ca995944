"""The rows that `bench.gpu` measures, and the files they go to as soon as each is there."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

CEILING = "bf16 8192 x 8192 x 8192"  # the row whose rate the shares of all others are of
COLUMNS = (
    "what",
    "measured",
    "range",
    "tokens/s",
    "speed x base",
    "TFLOP/s",
    "of measured matmul",
    "of data sheet",
    "peak GB",
    "predicted",
    "note",
)


@dataclass(frozen=True)
class Row:
    """A measurement. Rounds without values: it was not made, for the reason in `note`."""

    what: str
    values: list[float] = field(default_factory=list)
    """One of each round, in `unit`."""
    unit: str = "ms"
    tokens: int = 0
    """Computed in a value of ms."""
    flops: float = 0.0
    """The model's own, in a value of ms."""
    ratio: float | None = None
    """How many times as fast as the first row of its comparison: the median over the rounds."""
    peak_gb: float | None = None
    predicted: float | None = None
    """In `unit`, by bench/gpu_model.py."""
    note: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.values)


def cells(row: Row, measured: float | None, data_sheet: float | None) -> list[str]:
    """Returns the columns of a row; empty where there is nothing to say.

    measured, data_sheet: the bf16 rates of the device in TFLOP/s.
    """
    if not row.values:
        return [row.what, *[""] * 8, _number(row.predicted), row.note]
    per_s = 1e3 / row.value if row.unit == "ms" else 0.0
    tflops = row.value if row.unit == "TFLOP/s" else row.flops * per_s / 1e12
    return [
        row.what,
        f"{_number(row.value)} {row.unit}",
        f"{_number(min(row.values))} to {_number(max(row.values))}",
        f"{row.tokens * per_s:,.0f}" if row.tokens else "",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        _number(tflops or None),
        _share(tflops, measured),
        _share(tflops, data_sheet),
        _number(row.peak_gb),
        "" if row.predicted is None else f"{_number(row.predicted)} {row.unit}",
        row.note,
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(rate: float, ceiling: float | None) -> str:
    return f"{rate / ceiling:.0%}" if rate and ceiling else ""


class Report:
    """gpu-<device>.md with the tables, .jsonl with the rows, .log with the output of all parts.

    Everything is on disk when a call returns, so that what ends this process loses no row.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"gpu-{name}.md"
        self.page = self._open(".md")
        self.rows = self._open(".jsonl")
        self.log = self._open(".log")
        self.measured: float | None = None
        self.data_sheet: float | None = None

    def _open(self, ending: str) -> TextIO:
        return open(self.path.with_suffix(ending), "w", encoding="utf-8")

    def head(self, facts: dict[str, Any], options: str) -> None:
        """Writes the head of the page when the first part tells what it runs on."""
        if self.page.tell():
            return
        self.data_sheet, device = facts.pop("data_sheet_tflops"), facts.pop("device")
        versions = ", ".join(f"{key} {value}" for key, value in facts.items() if value)
        self.write(
            f"# GPU measurements: {device}",
            "",
            f"{datetime.datetime.now():%Y-%m-%d %H:%M}. {versions}.",
            f"Written by `bash bench/gpu.sh{options}`.",
            "",
            "Medians. Rows that are compared take turns; their base is the one at 1.00. TFLOP/s",
            "count the model's own FLOPs, without products that are computed again. Peak GB is",
            "beyond what was held before the step. Predicted: by bench/gpu_model.py, beforehand.",
        )
        if "--tiny" in options:
            self.write("", "Tiny sizes, to try the bench itself: no measurement.")
        if self.path.parent.name != "results":
            self.write("", f"To keep it: `cp {self.path.name} bench/results/`")

    def part(self, name: str, title: str, before: str) -> None:
        self.write("", f"## {name}: {title}", "", f"Before: {before}.", "")
        self.write(_line(COLUMNS), _line(["---"] * len(COLUMNS)))

    def row(self, part: str, row: Row) -> None:
        if row.what == CEILING and row.values:
            self.measured = row.value
        self.write(_line(cells(row, self.measured, self.data_sheet)))
        _flushed(self.rows, json.dumps({"part": part, **asdict(row)}))

    def close(self) -> None:
        for file in (self.page, self.rows, self.log):
            file.close()

    def write(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        _flushed(self.page, *lines)


def _flushed(file: TextIO, *lines: str) -> None:
    file.write("".join(f"{line}\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(word.replace('|', '/') for word in words)} |"


def nvidia_smi(*fields: str) -> list[str]:
    """Returns what the driver says of the first GPU; empty without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [word.strip() for word in done.stdout.splitlines()[0].split(",")]


def device_state() -> str:
    """Returns clocks, temperature and power now, and the load of the host."""
    load = f"load {os.getloadavg()[0]:.1f}"
    found = nvidia_smi(
        "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw", "memory.used"
    )
    if not found:
        return f"no GPU, {load}"
    sm, most, memory, celsius, power, used = found
    return f"{sm} of {most}, memory {memory}, {celsius} C, {power}, {used} in use, {load}"
