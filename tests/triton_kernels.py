"""Runs tests of Triton kernels on machines without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest

from tests.conftest import ROOT

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: make kernels installs it"
)
needs_interpreter = pytest.mark.skipif(
    # It makes scalars of arrays, which numpy refuses from 2.4 on.
    find_spec("triton") is None or tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4),
    reason="needs Triton and numpy below 2.4: make kernels installs them",
)


def run_interpreted(tests: str) -> str:
    """Runs a file of tests/gpu on a CPU, in Triton's interpreter; returns what pytest printed.

    In a process of its own: Triton's functions are made for the interpreter when it is imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", tests, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "GPU_TESTS_DEVICE": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiled_resources(module: str, capability: int) -> list[dict[str, Any]]:
    """Returns what a module of tests prints of its kernels, compiled for a GPU that is not there.

    In a process of its own: functions that were made for the interpreter cannot be compiled.
    """
    command = [sys.executable, "-m", module, str(capability)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    return kernels
