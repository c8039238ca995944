"""BDH's Triton kernels without a GPU: in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.triton_kernels import needs_interpreter, needs_triton, run_interpreted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@needs_interpreter
def test_the_kernels_in_tritons_interpreter() -> None:
    run_interpreted("tests/gpu/test_bdh_triton.py")


@needs_triton
@pytest.mark.parametrize(
    "capability, shared_kb", [(90, 227), (80, 163), (89, 99)], ids=["H100", "A100", "RTX 4090"]
)
def test_kernels_spill_nothing_use_tensor_cores_and_fit(capability: int, shared_kb: int) -> None:
    command = [sys.executable, "-m", "tests.model.bdh_kernel_resources", str(capability)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    kernels = json.loads(found.stdout)
    assert len({kernel["kernel"] for kernel in kernels}) == 8
    for kernel in kernels:
        print(kernel)
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= shared_kb * 1024, kernel
        if kernel["kernel"] != "scan_states":
            assert kernel["tensor_core_instructions"] > 0, kernel
