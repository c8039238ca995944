"""What metrics.jsonl holds: all of it, or only its end. Imports no torch.

The one idea: a long file is read backwards until the newest log line and the newest evaluation are
found, which say all that a list of runs needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from engine.manifest import MAX_BYTES, METRICS, steps_in
from settings.files import open_regular, read_regular

_SHOWN = 5  # names in a message
_BLOCK = 1 << 16
_Best: TypeAlias = "tuple[float | None, int | None]"
_ANY, _TRAIN, _EVAL = b'"step"', b'"train/loss"', b'"eval/val_loss"'


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
        lines = read_regular(path / METRICS, MAX_BYTES).splitlines(keepends=True)
    except OSError as error:
        return [], (f"{METRICS}: {reason(error)}",)
    parsed = [_parse(line) for line in lines]
    broken = [n for n, record in enumerate(parsed, 1) if record is None]
    if broken and not lines[-1].endswith(b"\n") and parsed[-1] is None:
        broken.pop()  # cut off: it is being written, or was when the run crashed
    told = ", ".join(map(str, broken[:_SHOWN])) + (", ..." if len(broken) > _SHOWN else "")
    problems = (f"{METRICS}: left out {len(broken)} broken lines ({told})",) if broken else ()
    return [record for record in parsed if record is not None], problems


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record; None for what is none."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and whole(record.get("step")) is not None else None


def read_tail(path: Path, problems: list[str]) -> tuple[dict[str, Any], _Best, float]:
    """The newest values, the best evaluation, and when something was last written (0: unknown)."""
    best: _Best = (None, None)
    last, changed = dict[str, Any](), 0.0
    try:
        with open(path / METRICS, "rb", opener=open_regular) as file:
            status = os.fstat(file.fileno())
            changed = status.st_mtime
            last, best = _newest(file.fileno(), status.st_size)
        problems += [] if last else [f"{METRICS}: holds no whole record"]
    except OSError as error:
        problems.append(f"{METRICS}: {reason(error)}")
    return last or {"step": max(steps_in(path), default=0)}, best, changed


def _newest(descriptor: int, size: int) -> tuple[dict[str, Any], _Best]:
    """Reads backwards until both a log line and an evaluation are found."""
    block = _BLOCK
    while True:
        data = os.pread(descriptor, block, max(0, size - block))
        whole_lines = data[data.find(b"\n") :]
        if block >= size or (_TRAIN in whole_lines and _EVAL in whole_lines):
            break
        block *= 8
    newest: dict[bytes, dict[str, Any]] = {}
    for kind in (_ANY, _TRAIN, _EVAL):
        parsed = (_parse(line) for line in _lines_with(kind, data))
        newest[kind] = next((record for record in parsed if record is not None), {})
    records = sorted(newest.values(), key=lambda record: record.get("step", -1))
    last = {key: value for record in records for key, value in record.items()}
    return last, _best(newest[_EVAL], descriptor, size)


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
    records = map(_parse, _lines_with(_EVAL, os.pread(descriptor, size, 0)))
    losses = ((number(r.get("eval/val_loss")), r["step"]) for r in records if r is not None)
    return min(((loss, step) for loss, step in losses if loss is not None), default=(None, None))
