"""The processes of a sweep: each is train.py for one cell, in a session of its own.

The log file of a cell is locked while its run lives. The run inherits the lock with its output, so
a run that outlives a sweep.py that was killed still holds it, and no two sweep.py start one cell.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
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
_TAIL_BYTES = 1 << 14
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LOG_LINE = re.compile(r"Iter +(\d+) \| Loss: +(\S+) .*\| ETA: +(\S+)")


@dataclass(frozen=True)
class Progress:
    """What the last log line of a run said."""

    step: int
    loss: str
    left: str
    """Time left: `4m03s`."""


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    pid: int
    returncode: int | Any

    def poll(self) -> int | None: ...


@dataclass
class Job:
    """A run that was started here."""

    cell: Cell
    process: Process
    log: Path
    slot: int
    """Which of the `--jobs` places it takes."""
    began_s: float
    began_at: int
    """Bytes that the log held before."""
    why_stopped: str = ""
    """Why it was told to stop for good."""

    def progress(self) -> Progress | None:
        """Returns how far it is; None before its first log line."""
        for line in reversed(last_lines(self.log, self.began_at)):
            if found := _LOG_LINE.match(line):
                return Progress(int(found[1]), found[2], found[3])
        return None


Start = Callable[[Sequence[str], int, Mapping[str, str]], Process]
"""Starts train.py with these words after its name, its output into a descriptor."""


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
        preexec_fn=partial(end_with, os.getpid(), linux_prctl()),
    )


def linux_prctl() -> Callable[..., int] | None:
    """Returns Linux's prctl; None elsewhere."""
    return ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def end_with(parent: int, prctl: Callable[..., int] | None) -> None:
    """Asks for SIGTERM when the parent dies, also by kill -9. Without prctl the run goes on then,
    and its locked log keeps others from starting it a second time."""
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it died before
        os._exit(1)


def start_job(
    cell: Cell, words: Sequence[str], log: Path, slot: tuple[int, Mapping[str, str]], start: Start
) -> Job | None:
    """Starts a cell's run; returns None if another process has started it already.

    words: after those of the cell. slot: its number and the environment variables that it sets.
    Raises WriteError.
    """
    descriptor = lock_log(log)
    if descriptor is None:
        return None
    try:
        began_at = os.lseek(descriptor, 0, os.SEEK_END)
        words = [*cell.words, *words]
        head = f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} train.py {' '.join(words)}\n"
        with as_write_error(f"write {log}", log.parent):
            os.write(descriptor, printable(head).encode())
        # -u is not needed: train.py flushes its lines.
        process = start(words, descriptor, {**os.environ, **slot[1]})
    finally:
        os.close(descriptor)  # the run has its own, and the lock with it
    return Job(cell, process, log, slot[0], time.monotonic(), began_at)


def lock_log(log: Path) -> int | None:
    """Returns a descriptor of the log that holds its lock; None while another process holds it."""
    with as_write_error(f"write {log}", log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks
    return descriptor


def last_lines(log: Path, began_at: int = 0) -> list[str]:
    """Returns the last lines of a log, none from before `began_at`."""
    try:
        with open(log, "rb", opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(began_at, size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def send(job: Job, number: int) -> None:
    """Sends a signal to the process of a job; SIGKILL to all that it started, too."""
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(job.process.pid, number)
        else:
            os.kill(job.process.pid, number)


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
    found = list[dict[str, str]]()
    for number in range(count):
        own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        if count > 1 and "OMP_NUM_THREADS" not in os.environ:
            own["OMP_NUM_THREADS"] = str(max(1, _cores() // count))
        found.append(own)
    return found


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
