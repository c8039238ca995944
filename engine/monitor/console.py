"""What a run prints: plain lines, warnings, and the console form of a metrics record.

Code of a run prints through `info` and `warning` alone, so that lines stand above the live line of
a terminal and are never written over it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from settings.formatting import format_duration
from settings.terminal import printable

RULE = "-" * 80

NOT_PLOTTED = (
    "eval/val_losses",
    "eval/rows",
    "train/batch_hash",
    "train/weights_hash",
    "train/first_losses",
)
"""Keys of records that stay in metrics.jsonl: trackers cannot draw a curve of them."""

_PLAIN: Callable[[str], None] = partial(print, flush=True)
_print_line = _PLAIN


def info(*lines: str) -> None:
    """Prints plain lines at once, also when piped; control characters in them are escaped.

    Raises BrokenPipeError, once, when the reader has gone; after that it prints to nowhere.
    """
    try:
        for line in lines:
            _print_line(printable(line))
    except BrokenPipeError:
        # What is still buffered would raise again when Python flushes stdout at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def warning(text: str) -> None:
    """Prints to standard error, at once, with control characters escaped."""
    text = printable(text)
    if sys.stderr.isatty() and _print_line is not _PLAIN:
        # A redraw of the live line would overwrite text that went past it to the same terminal.
        _print_line(text)
    else:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def redirected(print_line: Callable[[str], None]) -> Iterator[None]:
    """Makes `info` print its lines by this function, for a terminal that shows a live line."""
    global _print_line
    before, _print_line = _print_line, print_line
    try:
        yield
    finally:
        _print_line = before


def iteration_line(record: dict[str, Any], eta_s: float) -> str:
    """Returns the console form of a training record."""
    return " | ".join(
        (
            f"Iter {record['step']:>6}",
            f"Loss: {record['train/loss']:.4f}",
            f"LR: {record['train/learning_rate']:.2e}",
            f"Grad: {record['train/grad_norm']:.2f}",
            f"Time: {record['train/iter_time_ms']:.1f}ms",
            f"Tokens/sec: {record['train/tokens_per_sec']:.0f}",
            f"Mem: {record['train/memory_bytes'] / 1e9:.1f}GB",
            f"ETA: {format_duration(eta_s)}",
        )
    )
