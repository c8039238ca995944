"""One record per log line: the same values on the console and in `metrics.jsonl`.

Training prints through `say` and `warn` alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from settings.terminal import printable

RULE = "-" * 80

LOCAL = ("eval/val_losses", "eval/rows")
"""Keys of records that stay in metrics.jsonl: no curve can be drawn of them."""

_PLAIN: Callable[[str], None] = partial(print, flush=True)
_line = _PLAIN


def say(*lines: str) -> None:
    """Prints plain lines at once, also when piped; control characters in them are escaped.

    Raises BrokenPipeError, once, when the reader has gone; after that it prints to nowhere.
    """
    try:
        for line in lines:
            _line(printable(line))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def warn(text: str) -> None:
    """Prints to standard error, at once, with control characters escaped."""
    text = printable(text)
    if sys.stderr.isatty() and _line is not _PLAIN:  # both share one terminal
        _line(text)
    else:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def printing(line: Callable[[str], None]) -> Iterator[None]:
    """Has `say` print its lines by this function, for a terminal that shows more than lines."""
    global _line
    before, _line = _line, line
    try:
        yield
    finally:
        _line = before


def iteration_line(record: dict[str, Any], eta_s: float) -> str:
    """The console form of a training record."""
    return " | ".join(
        (
            f"Iter {record['step']:>6}",
            f"Loss: {record['train/loss']:.4f}",
            f"LR: {record['train/learning_rate']:.2e}",
            f"Grad: {record['train/grad_norm']:.2f}",
            f"Time: {record['train/iter_time_ms']:.1f}ms",
            f"Tokens/sec: {record['train/tokens_per_sec']:.0f}",
            f"Mem: {record['train/memory_bytes'] / 1e9:.1f}GB",
            f"ETA: {duration(eta_s)}",
        )
    )


def duration(seconds: float) -> str:
    """`45s`, `4m03s`, `2h05m`, `3d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def size(number: float) -> str:
    """`950 B`, `25.3 MB`, `1.24 GB`."""
    return short(number).replace(" B", " G") + ("B" if number >= 1000 else " B")


def short(number: float) -> str:
    """`950`, `12.3 k`, `25.3 M`, `1.24 B`: three digits and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
