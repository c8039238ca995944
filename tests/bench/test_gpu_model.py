"""The predictions for a GPU that nobody has measured."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from bench.gpu_model import BATCHES, PATHS, PEAK, ModelName, page, predict


@pytest.mark.parametrize("name", BATCHES)
def test_larger_batches_take_no_less_time_and_hardly_lose_speed(
    name: ModelName,
) -> None:
    for path, dtype in PATHS[name]:
        found = [predict(name, path, batch, 1024, dtype) for batch in (1, 4, 16, 64)]
        for smaller, larger in pairwise(found):
            assert 0 < smaller.ms <= larger.ms  # the host may be the slower one
            assert smaller.bytes < larger.bytes
            # The Triton path of BDH keeps fewer layers' tensors then, and computes them again.
            assert smaller.tokens_per_s < 1.05 * larger.tokens_per_s
        for batch, each in zip((1, 4, 16, 64), found, strict=True):
            assert math.isclose(each.tokens_per_s * each.ms, batch * 1024 * 1e3)
            assert 0 < each.share < 0.8  # of PEAK; the measured ceiling of bf16 is 0.79
    assert PEAK == 989e12


def test_the_page_is_what_the_model_prints() -> None:
    """If not: python -m bench.gpu_model > docs/gpu-predictions.md"""
    written = Path(__file__).parents[2] / "docs" / "gpu-predictions.md"
    assert written.read_text(encoding="utf-8") == page()
