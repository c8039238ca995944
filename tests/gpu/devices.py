"""Where the tests of this folder run.

    python -m pytest -m gpu tests/gpu -o filterwarnings=default
    GPU_TESTS_DEVICE=cpu python -m pytest tests/gpu      # tries the tests themselves

Without CUDA they are skipped. Their bodies name no device but this one, so that a change of theirs
can be tried on a machine without a GPU; what only CUDA has is skipped there with the reason.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"

gpu_tests = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON_CUDA and not torch.cuda.is_available(), reason="no CUDA device on this machine"
    ),
    # Warnings become errors in the other tests. Here compilers warn too (of TF32 that is off, for
    # one), and would fail in the middle of their work.
    pytest.mark.filterwarnings("default"),
]
"""`pytestmark` of every file of this folder."""

cuda_only = pytest.mark.skipif(not ON_CUDA, reason="only CUDA has it")
