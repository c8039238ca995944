"""The kernel that casts to 8 bits, on a machine without a GPU."""

from __future__ import annotations

import pytest

from tests.triton_kernels import (
    compiled_resources,
    needs_interpreter,
    needs_triton,
    run_interpreted,
)

pytestmark = pytest.mark.slow


@needs_interpreter
def test_the_kernel_in_tritons_interpreter() -> None:
    assert "skipped" not in run_interpreted("tests/gpu/test_fp8_cast.py")


@needs_triton
@pytest.mark.parametrize("capability", [90, 89], ids=["H100", "RTX 4090"])
def test_the_kernel_spills_nothing_and_leaves_room_for_a_second_block(capability: int) -> None:
    kernels = compiled_resources("tests.precision.fp8_cast_resources", capability)
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= 49 * 1024, kernel
        if capability == 90:  # a multiprocessor has 65,536 registers
            assert 2 * 8 * 32 * kernel["registers"] <= 65536, kernel
