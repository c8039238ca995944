"""The processes of a sweep: each is train.py for one cell, in a session of its own.

The log file of a cell is locked while its run lives. The run inherits the lock with its output, so
a run that outlives a sweep.py that was killed still holds it, and no two sweep.py start one cell.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from files.regular import open_regular
from files.write_errors import as_write_error
from settings.terminal import printable
from sweeps.cells import Cell

LOGS = "sweeps"
"""Folder in checkpoint_dir with the logs of all cells and the reports."""
TRAIN = Path(__file__).resolve().parent.parent / "train.py"
_HEAD = "---- "  # begins the line above the output of each run in the log of a cell
_TAIL_BYTES = 1 << 14
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    pid: int
    returncode: int | Any

    def poll(self) -> int | None: ...


Start = Callable[[Sequence[str], int, Mapping[str, str]], Process]
"""Starts train.py with these words after its name, its output into a descriptor."""


@dataclass
class CellJob:
    """A run that was started here."""

    cell: Cell
    process: Process
    share: Mapping[str, str]
    """Which of the `shares` it takes."""
    began_s: float
    why_stopped: str = ""
    """Why it was told to stop for good."""

    def send(self, number: int) -> None:
        """Sends a signal, if the process lives."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def start_process(
    words: Sequence[str], output: int, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Starts `python train.py WORDS`. It saves and ends when this process dies."""
    return subprocess.Popen(
        [sys.executable, os.fspath(TRAIN), *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environment,
        start_new_session=True,  # Ctrl-C on the terminal reaches sweep.py alone
        preexec_fn=partial(end_with, os.getpid()),
    )


def end_with(parent: int) -> None:
    """Asks for SIGTERM when the parent dies, also by kill -9. Elsewhere than on Linux the run goes
    on then, and its locked log keeps others from starting it a second time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died before
            os._exit(1)


def start_job(
    cell: Cell, resume: Sequence[str], share: Mapping[str, str], start: Start
) -> CellJob | None:
    """Starts a cell's run with the words of the cell and of `resume`; returns None if another
    process has started it already. Raises WriteError."""
    log, words = log_path(cell), [*cell.words, *resume]
    with as_write_error(f"write {log}", log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
        head = f"{_HEAD}{time.strftime('%Y-%m-%d %H:%M:%S')} train.py {' '.join(words)}\n"
        with as_write_error(f"write {log}", log.parent):
            os.write(descriptor, printable(head).encode())
        process = start(words, descriptor, {**os.environ, **share})
    finally:
        os.close(descriptor)  # the run has its own, and the lock with it
    return CellJob(cell, process, share, time.monotonic())


def log_path(cell: Cell) -> Path:
    """Returns where the output of a cell's runs is kept; of equal cells of two sweeps, one file."""
    return Path(cell.config.training.checkpoint_dir) / LOGS / f"{cell.id}.log"


def last_lines(log: Path) -> list[str]:
    """Returns the last lines of the newest run in a log."""
    try:
        with open(log, "rb", opener=open_regular) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    heads = [place for place, line in enumerate(lines) if line.startswith(_HEAD)]
    return lines[heads[-1] + 1 :] if heads else lines


# ---- what each of several runs at once gets of the machine


def visible_gpus() -> list[str]:
    """Returns the GPUs as CUDA_VISIBLE_DEVICES names them, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.replace(" ", "").split(",") if name not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def shares(jobs: int | None, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Returns the environment variables of each of so many runs at once: a GPU for each, or an
    equal part of the cores. jobs: None for one per GPU, or one."""
    count = jobs or len(gpus) or 1
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    split = count > 1 and "OMP_NUM_THREADS" not in os.environ
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count))} if split else {}
    own = [{"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if gpus else {} for n in range(count)]
    return [each | threads for each in own]
