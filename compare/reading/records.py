"""Reads metrics.jsonl whole, or only its end. Imports no torch.

A list of runs needs the newest log line and the newest evaluation. Both stand near the end, so the
file is read backwards until they are found: 10,000 records cost as much as 100.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.reading.json_values import as_count, as_float
from engine.run_directory.manifest import MAX_BYTES, METRICS, steps_in
from engine.run_directory.metrics_file import is_protected, missing_bytes, parse_line, read_lines
from files.regular import open_regular, read_regular

_BLOCK = 1 << 16
# Searched as bytes in raw lines, before any JSON is parsed.
_KINDS = _ANY, _LOG_LINE, _EVALUATION = b'"step"', b'"train/loss"', b'"eval/val_loss"'
_LOSS = re.compile(_EVALUATION + rb":\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Tail:
    """What the end of metrics.jsonl tells."""

    newest: Mapping[str, Any]
    """The newest value of each metric."""
    best_loss: float | None
    best_step: int | None
    modified_s: float
    """When the file was last written, in seconds since 1970; 0 if it cannot be read."""


def os_error_text(error: OSError) -> str:
    """Returns why a file cannot be read."""
    return "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"


def read_records(path: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Returns all intact records of a run directory in order, and one line about the others."""
    try:
        lines, damage = read_lines(read_regular(path / METRICS, MAX_BYTES))
    except OSError as error:
        return [], (f"{METRICS}: {os_error_text(error)}",)
    problems = (f"{METRICS}: {damage}",) if damage else ()
    return [line.record for line in lines if line.record is not None], problems


def read_tail(path: Path, written: Any, problems: list[str]) -> Tail:
    """Reads the end of a run directory's metrics.jsonl; adds a line to `problems` for damage.

    written: the number of bytes that the run recorded as written, None if it did not.
    """
    newest, modified_s = dict[str, Any](), 0.0
    best: tuple[float | None, int | None] = (None, None)
    try:
        with open(path / METRICS, "rb", opener=open_regular) as file:
            status = os.fstat(file.fileno())
            modified_s = status.st_mtime
            by_kind, damaged = _newest_records(_last_lines(file.fileno(), status.st_size))
            best = _best_evaluation(by_kind.get(_EVALUATION, {}), file.fileno(), status.st_size)
        for record in sorted(by_kind.values(), key=lambda record: record["step"]):
            newest |= record
        if damaged:
            problems += read_records(path)[1]  # which counts the damaged lines of the whole file
        if lost := missing_bytes(written, status.st_size):
            problems.append(f"{METRICS}: {lost}")
        elif not newest and (status.st_size or written != 0):
            problems.append(f"{METRICS}: holds no whole record")
    except OSError as error:
        problems.append(f"{METRICS}: {os_error_text(error)}")
    return Tail(newest or {"step": max(steps_in(path), default=0)}, *best, modified_s)


def _last_lines(descriptor: int, size: int) -> list[bytes]:
    """Returns the last lines of the file, as many as it takes to hold a log line and an evaluation.

    Reads a block that is eight times larger each time: few runs have neither in their last 64 KB.
    """
    block = _BLOCK
    while True:
        lines = os.pread(descriptor, block, max(0, size - block)).split(b"\n")
        if block >= size:
            return lines
        del lines[0]  # its beginning may stand before the block
        if all(any(kind in line for line in lines) for kind in (_LOG_LINE, _EVALUATION)):
            return lines
        block *= 8


def _newest_records(lines: list[bytes]) -> tuple[dict[bytes, dict[str, Any]], bool]:
    """Returns the newest record of each kind, and whether a damaged line was met on the way."""
    # A file has checksums on all lines or, from an older version, on none: one line that has one
    # makes a line without one damaged.
    checksums = any(map(is_protected, reversed(lines)))
    newest: dict[bytes, dict[str, Any]] = {}
    damaged = False
    for place, line in enumerate(reversed(lines)):
        intact = is_protected(line)
        kinds = [kind for kind in _KINDS if kind not in newest and kind in line]
        # JSON is parsed only for the few lines that are needed: it would take most of the time.
        record = parse_line(line, intact) if kinds and (intact or not checksums) else None
        if record is not None:
            newest |= dict.fromkeys(kinds, record)
        elif kinds or (checksums and not intact):
            damaged = damaged or place > 0  # the last line may be half written at this moment
        if len(newest) == len(_KINDS):
            break
    return newest, damaged


def _best_evaluation(
    newest: Mapping[str, Any], descriptor: int, size: int
) -> tuple[float | None, int | None]:
    """Returns the lowest held-out loss and its step.

    Each evaluation carries the best one so far. Older runs did not write it: then the whole file is
    searched.
    """
    best = as_float(newest.get("eval/best_loss"))
    if best is not None or not newest:
        return best, as_count(newest.get("eval/best_step"))
    data = os.pread(descriptor, size, 0)
    losses = sorted((float(found[1]), found.start()) for found in _LOSS.finditer(data))
    # Parsing every evaluation as JSON would take ten times as long as this search, and the first
    # record is good unless its line is damaged.
    for _, place in losses:
        end = data.find(b"\n", place)
        line = data[data.rfind(b"\n", 0, place) + 1 : end if end >= 0 else size]
        record = parse_line(line, is_protected(line)) or {}
        loss = as_float(record.get("eval/val_loss"))
        if loss is not None:
            return loss, record["step"]
    return None, None
