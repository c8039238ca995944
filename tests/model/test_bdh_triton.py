"""BDH's Triton kernels without a GPU: in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.bdh.triton.shapes import triton_tiling
from model.generate import Sampling, generate
from tests.model.bdh_reference import small_bdh
from tests.triton_kernels import (
    compiled_resources,
    needs_interpreter,
    needs_triton,
    run_interpreted,
)


@given(
    length=st.integers(1, 20_000),
    width=st.sampled_from([64, 128, 256, 512]),
    batch=st.integers(1, 300),
)
def test_chunks_are_whole_blocks_and_wide_tensors_fit_their_budget(
    length: int, width: int, batch: int
) -> None:
    tiling = triton_tiling((batch, length), (4, width, 8192), torch.bfloat16)
    assert tiling.chunk % (64 if length > 32 else 16) == 0
    assert tiling.chunk <= 2 * max(2 * width, 256)
    padding = tiling.padded(length) - length
    assert padding < 64 * max(1, 4 * length // width)  # less than two blocks in each chunk
    wide = tiling.padded(length) * 4 * 8192 * 2
    groups = tiling.sequence_groups(batch)
    assert groups[0].stop == 1 or 5 * groups[0].stop * wide <= 2**34
    assert 2 * tiling.kept_layers * batch * wide <= 2**33
    assert not (len(groups) > 1 and tiling.kept_layers)


def test_what_is_not_training_needs_no_triton() -> None:
    model = small_bdh(n_embd=64, mlp_internal_dim_multiplier=8, std=0.1).eval()
    text = torch.randint(64, (1, 20))

    def outcome() -> tuple[dict[str, list[float]], list[int]]:
        drawn = generate(model, text, Sampling(temperature=0.0), (None,))
        return model.active_fraction(text), [int(token) for token in islice(drawn, 4)]

    expected = outcome()
    assert model.use_triton() is None
    assert outcome() == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_interpreter
def test_the_kernels_in_tritons_interpreter() -> None:
    run_interpreted("tests/gpu/test_bdh_triton.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
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
