"""Running `train.py` in a test, and comparing two runs bit for bit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import train
from config import command_line
from engine.checkpoint.load import load_checkpoint
from tests.conftest import ROOT

TIMED = {
    "crc",
    "time",
    "train/tokens_per_sec",
    "train/iter_time_ms",
    "train/mfu",
    "train/memory_bytes",
    "train/data_wait",
    "train/compile_s",
    "eval/seconds",
}


def run_here(arguments: Iterable[str]) -> int:
    """The exit code of `python train.py ARGUMENTS`, run in this process."""
    return train.main(command_line(list(arguments)))


def run_main(main: Callable[[], int], *words: str) -> subprocess.CompletedProcess[str]:
    """What `main` of a script gives and writes with `words` after the script's name.

    In this process, which spares the import of torch; an unexpected exception is raised.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *words])
        try:
            code = main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


class Child:
    """`python train.py ARGUMENTS` in a process of its own, with the names of `subprocess.Popen`.

    It is forked, which spares it the import of torch: half of what a short run takes.
    """

    def __init__(
        self, arguments: list[str], preexec_fn: Callable[[], object], start_new_session: bool
    ) -> None:
        reading, writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            if start_new_session:
                os.setsid()
            become_script(writing, arguments, preexec_fn)
        os.close(writing)
        self.stdout = open(reading, encoding="utf-8")  # noqa: SIM115  # closed by its reader

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """The exit code, once it has ended; minus the signal where one killed it."""
        code = self._reap(0)
        assert code is not None
        return code

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, None]:
        """The rest of what it writes, errors included; waits for its end."""
        with self.stdout:
            rest = self.stdout.read()
        self.wait()
        return rest, None


def become_script(out: int, arguments: list[str], preexec_fn: Callable[[], object]) -> NoReturn:
    """Goes on as `train.py`, which writes to the file `out`; never comes back."""
    code = 1
    try:
        for number in (1, 2):
            os.dup2(out, number)
        os.close(out)
        sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.argv = [os.fspath(ROOT / "train.py"), *arguments]
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # pytest's handler is not the child's
        preexec_fn()
        code = run_here(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def start(
    arguments: Iterable[str],
    preexec_fn: Callable[[], object] = lambda: None,
    start_new_session: bool = False,
) -> Child:
    """`python train.py ARGUMENTS` as a child whose output can be read line by line."""
    return Child(list(arguments), preexec_fn, start_new_session)


def start_ranks(count: int, arguments: Iterable[str]) -> list[Child]:
    """`count` children that train together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(count):
        place = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(start(arguments, partial(os.environ.update, place)))
    return children


def wait_for(child: Child | subprocess.Popen[str], text: str) -> list[str]:
    """Reads the child's lines up to the first that contains `text`."""
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


def only_run(folder: Path) -> Path:
    """The one run directory in a folder."""
    (run,) = folder.glob("run_*")
    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    """All records, without what depends on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMED} for record in records]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Weights, optimizer, generators, data state and metrics are equal, bit for bit."""
    first, second = (load_checkpoint(run / f"checkpoint_{step}.pt") for run in (one, other))
    for state in (first, second):
        state["train"].pop("elapsed_s")
        state["config"]["training"].pop("checkpoint_dir")
        state["config"]["training"].pop("resume_from_checkpoint")
        state["config"]["training"].pop("fork_from_checkpoint", None)
    assert_equal(first, second, "checkpoint")
    assert metrics(one) == metrics(other)


def assert_equal(one: Any, other: Any, place: str) -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{place}[{number}]")
    else:
        assert one == other, place
