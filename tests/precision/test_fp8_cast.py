"""The kernel that casts to 8 bits, on a machine without a GPU."""

from __future__ import annotations

import pytest

from tests.triton_kernels import needs_interpreter, run_interpreted


@pytest.mark.slow
@needs_interpreter
def test_the_kernel_in_tritons_interpreter() -> None:
    assert "skipped" not in run_interpreted("tests/gpu/test_fp8_cast.py")
