"""What the command-line scripts share: number types, messages instead of tracebacks, signals."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable
from types import FrameType

from settings.errors import UserError

LARGEST = 2**63 - 1
"""The largest whole number that an argument may have; torch's seeds end there."""


def number_type(
    kind: type[int] | type[float], least: float, most: float = LARGEST, below: float | None = None
) -> Callable[[str], float]:
    """Returns an argparse type: a number in [least, most], or in [least, below) if that is given.

    argparse reports a value outside as one line with the limits and exit code 2.
    """

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or (below is not None and value >= below):
            if below is not None:
                limit = f">= {least} and < {below}"
            elif most < LARGEST or value > most:
                limit = f"in [{least}, {most}]"
            else:
                limit = f">= {least}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse names it in errors
    return parse


def run_command(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit code; a UserError becomes its message, on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows '?'
    try:
        command()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def exit_on_signals() -> None:
    """Makes SIGINT and SIGTERM leave by SystemExit, through the blocks that remove what is half
    written, and a reader that left (`| head`) end the program quietly."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
