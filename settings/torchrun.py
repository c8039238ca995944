"""Gives torchrun the reason why a process ended, so that its report closes with it.

torchrun prints a traceback of its own and a report of every failed process after the processes have
ended, and exits with 1 whatever their exit codes were. Its report quotes the file that it names in
TORCHELASTIC_ERROR_FILE; without that file the user's last lines are "traceback : To enable
traceback see ...". Format: torch/distributed/elastic/multiprocessing/errors/error_handler.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

LAUNCH = "HATCHERY_LAUNCH"
"""Set by launch.py, whose processes inherit it."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def started_by_torchrun() -> bool:
    """Returns whether torchrun started this process."""
    return _ERROR_FILE in os.environ


def started_by_launch() -> bool:
    """Returns whether launch.py started this process: torchrun, with the exit code of the run."""
    return started_by_torchrun() and LAUNCH in os.environ


def let_rank_0_print() -> None:
    """Waits a moment on a rank that ends with the same error as rank 0, which prints it: launchers
    kill all processes as soon as one has ended, rank 0 perhaps before it has come to print."""
    time.sleep(1.0)


def report_to_torchrun(message: str) -> None:
    """Writes why this process ends where torchrun looks for it; does nothing without torchrun."""
    path = os.environ.get(_ERROR_FILE)
    if not path:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
