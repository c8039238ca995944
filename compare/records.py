"""What metrics.jsonl holds: all of it, or only its end. Imports no torch.

The one idea: a long file is read backwards until the newest log line and the newest evaluation are
found, which say all that a list of runs needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from engine.run_directory.manifest import MAX_BYTES, METRICS, steps_in
from engine.run_directory.run_files import is_protected, missing_bytes, parse_line, read_lines
from files.regular import open_regular, read_regular

_BLOCK = 1 << 16
_Best: TypeAlias = "tuple[float | None, int | None]"
_KINDS = _ANY, _TRAIN, _EVAL = b'"step"', b'"train/loss"', b'"eval/val_loss"'


def number(value: Any) -> float | None:
    """A finite number out of JSON or YAML, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e300 else None  # false for NaN


def whole(value: Any) -> int | None:
    """A count out of JSON or YAML, else None."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def text(value: Any) -> str:
    """One printable line out of JSON or YAML, else ''."""
    line = " ".join(value.split()) if isinstance(value, str) else ""
    return line if line.isprintable() else ""


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping out of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}


def reason(error: OSError) -> str:
    """Why a file cannot be read."""
    return "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"


def read_records(path: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """All whole records of a run directory in order, and one line on what was left out."""
    try:
        lines, damage = read_lines(read_regular(path / METRICS, MAX_BYTES))
    except OSError as error:
        return [], (f"{METRICS}: {reason(error)}",)
    problems = (f"{METRICS}: {damage}",) if damage else ()
    return [line.record for line in lines if line.record is not None], problems


def read_tail(path: Path, written: Any, problems: list[str]) -> tuple[dict[str, Any], _Best, float]:
    """The newest values, the best evaluation, and when something was last written (0: unknown).

    written: how many bytes the run says that it wrote, None where it does not.
    """
    best: _Best = (None, None)
    last, changed = dict[str, Any](), 0.0
    try:
        with open(path / METRICS, "rb", opener=open_regular) as file:
            status = os.fstat(file.fileno())
            changed = status.st_mtime
            last, best, damaged = _newest(file.fileno(), status.st_size)
        if damaged:
            problems += read_records(path)[1]
        lost = missing_bytes(written, status.st_size)
        if lost:
            problems.append(f"{METRICS}: {lost}")
        elif not last and (status.st_size or written != 0):
            problems.append(f"{METRICS}: holds no whole record")
    except OSError as error:
        problems.append(f"{METRICS}: {reason(error)}")
    return last or {"step": max(steps_in(path), default=0)}, best, changed


def _newest(descriptor: int, size: int) -> tuple[dict[str, Any], _Best, bool]:
    """The newest values, the best evaluation, and whether a line on the way was damaged. Reads
    backwards until both a log line and an evaluation are found."""
    block = _BLOCK
    while True:
        data = os.pread(descriptor, block, max(0, size - block))
        lines = data.split(b"\n")[block < size :]  # the first may lack its beginning
        text = b"\n".join(lines)
        if block >= size or (_TRAIN in text and _EVAL in text):
            break
        block *= 8
    some, damaged = any(map(is_protected, reversed(lines))), False
    newest: dict[bytes, dict[str, Any]] = {}
    for number, line in enumerate(reversed(lines)):
        intact = is_protected(line)
        kinds = [kind for kind in _KINDS if kind not in newest and kind in line]
        record: dict[str, Any] | None = {}
        if some and not intact:
            record = None
        elif kinds:
            record = parse_line(line, intact)
        if record is None:
            damaged = damaged or number > 0  # the last one may be under way
            continue
        newest |= dict.fromkeys(kinds, record)
        if len(newest) == len(_KINDS):
            break
    records = sorted(newest.values(), key=lambda record: record.get("step", -1))
    last = {key: value for record in records for key, value in record.items()}
    return last, _best(newest.get(_EVAL, {}), descriptor, size), damaged


def _lines_with(kind: bytes, data: bytes) -> Iterator[bytes]:
    """The lines that contain `kind`, the last first."""
    end = len(data)
    while (found := data.rfind(kind, 0, end)) >= 0:
        start = data.rfind(b"\n", 0, found) + 1
        stop = data.find(b"\n", found)
        yield data[start : stop if stop >= 0 else len(data)]
        end = start


def _best(newest: Mapping[str, Any], descriptor: int, size: int) -> _Best:
    """The lowest held-out loss and its step; runs that did not keep it are read whole."""
    best = number(newest.get("eval/best_loss"))
    if best is not None or not newest:
        return best, whole(newest.get("eval/best_step"))
    lines = _lines_with(_EVAL, os.pread(descriptor, size, 0))
    records = (parse_line(line, is_protected(line)) for line in lines)
    losses = ((number(r.get("eval/val_loss")), r["step"]) for r in records if r is not None)
    return min(((loss, step) for loss, step in losses if loss is not None), default=(None, None))
