"""The kernel that casts to 8 bits, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


def numpy_is_too_new() -> bool:
    """Triton 3.6's interpreter makes scalars of arrays, which numpy 2.4 refuses."""
    try:
        return tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4)
    except PackageNotFoundError:
        return True


@pytest.mark.skipif(numpy_is_too_new(), reason="Triton's interpreter needs numpy below 2.4")
def test_the_kernel_in_tritons_interpreter() -> None:
    tests = "tests/gpu/test_fp8_cast.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", tests, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "GPU_TESTS_DEVICE": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
