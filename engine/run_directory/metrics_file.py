"""metrics.jsonl: one record per line, written so that a reader notices damage.

Each line ends with the CRC-32 of its bytes before it, `"crc": "89abcdef"`, so a line stands by
itself: a flipped bit or two merged lines cost those lines and no others. Lines of earlier versions
have no checksum and are read as they are. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from config import WriteError
from engine.monitor import console
from engine.run_directory.manifest import METRICS
from files.atomic import write_all
from files.regular import open_regular
from files.write_errors import as_write_error
from settings.formatting import format_plural

_CRC = b', "crc": "%08x"}'
_CRC_BYTES = len(_CRC % 0)
_MAX_SHOWN = 5  # line numbers in a message


class MetricsFile:
    """Appends records; they wait in memory until there is a folder, and while its disk is full."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes of the file, as far as this process knows them on the disk."""
        self.error: WriteError | None = None
        """Why lines are waiting, if a write failed."""
        self._waiting: list[bytes] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a record to those that wait; NaN and infinity become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._waiting.append(metrics_line(finite))

    def copy(self, lines: bytes) -> None:
        """Adds lines of another file to those that wait."""
        self._waiting.append(lines)

    def write(self, folder: Path, durable: bool = False) -> None:
        """Appends what waits; a failure is reported once and retried at the next call.

        durable: waits until all lines so far are on the disk.
        """
        if not (self._waiting or durable):
            return
        data = b"".join(self._waiting)
        try:
            with as_write_error(f"append to {folder / METRICS}", folder):
                _append(folder / METRICS, data, durable)
        except WriteError as error:
            if self.error is None:
                console.info(f"{error} Metrics wait in memory; every log line tries again.")
            self.error = error
            return
        self.size += len(data)
        self._waiting.clear()
        self.error = None


def _append(path: Path, data: bytes, durable: bool) -> None:
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        try:
            write_all(descriptor, data)
            if durable:
                os.fsync(descriptor)
        except BaseException:
            # All of `data` will be written again, so a part of it must not stay.
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def metrics_line(record: Mapping[str, Any]) -> bytes:
    """Returns a record of at least one key as a line with its checksum."""
    return protected(json.dumps(record, allow_nan=False).encode())


def protected(line: bytes) -> bytes:
    """Returns the line of a record with its checksum and line end."""
    body = line.rstrip()[:-1]
    return line + b"\n" if is_protected(line) else body + _CRC % zlib.crc32(body) + b"\n"


def is_protected(line: bytes) -> bool:
    """Returns whether a line, without its line end, carries its own checksum."""
    return line.endswith(_CRC % zlib.crc32(line[:-_CRC_BYTES]))


def parse_line(line: bytes, intact: bool) -> dict[str, Any] | None:
    """Returns the record in a line, without its checksum; None if it holds no record.

    intact: what `is_protected` returns for the line.
    """
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or (record.pop("crc", None) is not None and not intact):
        return None
    step = record.get("step")
    return record if type(step) is int and 0 <= step < 2**63 else None


class MetricsLine(NamedTuple):
    """A line of metrics.jsonl; `record` is None if it is damaged."""

    number: int
    text: bytes
    record: dict[str, Any] | None


def read_lines(content: bytes) -> tuple[list[MetricsLine], str]:
    """Returns all lines of metrics.jsonl, and one sentence on damaged ones, if any."""
    texts = content.split(b"\n")
    intact = [is_protected(text) for text in texts]
    # If one line has a checksum, all have: a resume adds it to lines of an earlier version.
    checked = any(intact)
    lines = [
        MetricsLine(number, text, parse_line(text, whole) if whole or not checked else None)
        for number, (text, whole) in enumerate(zip(texts, intact, strict=True), 1)
    ]
    # A last line without a line end is being written, or was when the run crashed: no damage.
    if lines[-1].record is None:
        lines.pop()
    damaged = [str(line.number) for line in lines if line.record is None]
    if not damaged:
        return lines, ""
    shown = ", ".join(damaged[:_MAX_SHOWN]) + (", ..." if len(damaged) > _MAX_SHOWN else "")
    return lines, f"left out {format_plural(len(damaged), 'damaged line')} ({shown})"


def missing_bytes(written: Any, size: int) -> str:
    """Returns a sentence if metrics.jsonl has fewer bytes than environment.json says, else ''.

    Complete lines that are cut off at the end leave no other trace.
    """
    if type(written) is not int or size >= written:
        return ""
    return f"cut short: {size:,} bytes, {written:,} were written; its last records are lost"
