"""Runs train.py and sweep.py in forks of the test's process, which spares the import of torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import sweep
from sweeps.processes import end_with
from tests.runs import run_here

MOST_S = 60
"""A process of a test that takes longer is hanging: it is ended by SIGALRM."""


class Fork:
    """A process of its own session with the names of `subprocess.Popen` that a sweep uses."""

    def __init__(self, work: Callable[[], int], output: int) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _become(work, output)

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        code = self._reap(0)
        assert code is not None
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _become(work: Callable[[], int], output: int) -> NoReturn:
    code = 1
    try:
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        signal.alarm(int(os.environ.get("SWEEP_KILLS", "0")) * 100 + MOST_S)
        for number in (signal.SIGINT, signal.SIGTERM):  # pytest's are not the child's
            signal.signal(number, signal.SIG_DFL)
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def start_fork(words: Sequence[str], output: int, environment: Mapping[str, str]) -> Fork:
    """Stands for `sweeps.processes.start_process`: the same program, parent's death included."""
    parent = os.getpid()

    def work() -> int:
        end_with(parent)
        os.environ |= environment
        sys.argv = ["train.py", *words]
        return run_here(words)

    return Fork(work, output)


def start_sweep(file: Path, jobs: int = 2, name: str = "sweep") -> tuple[Fork, Path]:
    """Starts `sweep.py FILE --jobs N`; returns it and where its output goes."""
    log = file.with_name(f"{name}.log")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def work() -> int:
        sys.argv = ["sweep.py", os.fspath(file)]
        return sweep.sweep(file, jobs, start_fork)

    try:
        return Fork(work, descriptor), log
    finally:
        os.close(descriptor)


def run_sweep(file: Path, jobs: int = 2) -> tuple[int, str]:
    """Runs a sweep to its end; returns its exit code and output."""
    process, log = start_sweep(file, jobs)
    return process.wait(), log.read_text()


def children_of(pid: int) -> list[int]:
    """The processes that a process started and that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
            found += [int(path.parent.name)] if int(parent) == pid and state != b"Z" else []
    return found
