"""Errors a user can act on.

Each has the exit code of the process and a message that names value, limit, place and remedy.
`train.py` prints the message without a traceback unless `training.debug` is true.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass

from settings.addresses import shareable
from settings.terminal import printable

MAX_PROBLEMS = 100  # shown

STOP_EXIT_CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: 143,
    signal.SIGUSR2: 143,  # submitit's default before a job's time is over
    signal.SIGHUP: 143,
}
"""Signals that save and end a run, and the exit code of each."""


class UserError(Exception):
    """A message for the user, safe to print; programmer mistakes are assertions instead."""

    exit_code = 1
    on_all_ranks = False
    """Whether every rank raises it, so that one of them prints it."""

    def __init__(self, text: str = "") -> None:
        super().__init__(printable(shareable(text)))


class ConfigError(UserError):
    """The config or the command line is wrong; the text lists every problem, one per line."""

    exit_code = 2


class DataError(UserError):
    """Training data cannot be read or is not what it was."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint or run directory cannot be read or does not fit this run."""

    exit_code = 3


class NonFiniteError(UserError):
    """The loss or the gradients are not finite."""

    exit_code = 4


class MemoryShortError(UserError):
    """Memory ran out."""

    exit_code = 1


class WriteError(UserError):
    """A file cannot be written: disk full, no permission, read-only."""

    exit_code = 5


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a value was given. Layer 0 holds defaults; a later layer wins over an earlier one."""

    layer: int = 0
    line: int = 0  # 0: no line to name
    column: int = 0  # 0: the line is enough
    source: str = ""  # a file's name or 'command line'

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.source, self.line, self.column) if part)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake of the user. `text` begins with the option's name if it is about one option."""

    origin: Origin
    text: str

    def __str__(self) -> str:
        place = f"{self.origin}: " if self.origin.source else ""
        text = self.text.rstrip()
        return place + text + ("" if text[-1] in ".?^]" else ".")


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raises one ConfigError that lists all problems by file and line; does nothing without any."""
    ordered = sorted(problems, key=lambda problem: problem.origin)
    if ordered:
        lines = list(dict.fromkeys(str(problem) for problem in ordered))
        more = len(lines) - MAX_PROBLEMS
        rest = [f"... and {more} more problems"] if more > 0 else []
        raise ConfigError("\n".join(lines[:MAX_PROBLEMS] + rest))
