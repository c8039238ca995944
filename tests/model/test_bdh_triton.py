"""BDH's Triton kernels without a GPU: in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import pytest

from tests.triton_kernels import (
    compiled_resources,
    needs_interpreter,
    needs_triton,
    run_interpreted,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@needs_interpreter
def test_the_kernels_in_tritons_interpreter() -> None:
    run_interpreted("tests/gpu/test_bdh_triton.py")


@needs_triton
@pytest.mark.parametrize(
    "capability, shared_kb", [(90, 227), (80, 163), (89, 99)], ids=["H100", "A100", "RTX 4090"]
)
def test_kernels_spill_nothing_use_tensor_cores_and_fit(capability: int, shared_kb: int) -> None:
    kernels = compiled_resources("tests.model.bdh_kernel_resources", capability)
    assert len({kernel["kernel"] for kernel in kernels}) == 8
    for kernel in kernels:
        print(kernel)
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= shared_kb * 1024, kernel
        if kernel["kernel"] != "scan_states":
            assert kernel["tensor_core_instructions"] > 0, kernel
