"""Errors a user can act on.

Each carries the exit code of the process and a message that names the value, the limit, the place
and the remedy. `train.py` prints the message without a traceback unless `training.debug` is true.
"""

from __future__ import annotations

import signal

from settings.terminal import printable

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

    def __init__(self, text: str = "") -> None:
        super().__init__(printable(text))


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
