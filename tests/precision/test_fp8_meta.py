"""FP8 as a GPU would see it: on torch's "meta" device, whose tensors cannot be read, and on a fake
CUDA device, for which torch checks shapes and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from config import Fp8Config
from engine.precision.fp8_native import E4M3, E5M2, NativeBackend, multiply
from tests.precision.conftest import NAMES, build

META = torch.device("meta")


REAL = torch._scaled_mm


def scaled_mm(*operands: Any, out: Tensor, **options: Any) -> Tensor:
    """torch has no meta kernel of a product with `out`."""
    return REAL(*operands, **options)


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_8_bits_waits_for_nothing_on_its_device(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    fp8 = Fp8Config(recipe=recipe, format="hybrid", amax_history_len=4, amax_compute_algo="max")  # type: ignore[arg-type]
    model = build(name).to(META)
    backend = NativeBackend(fp8, model, META, torch.bfloat16)
    tokens = torch.zeros(2, 64, dtype=torch.long, device=META)
    for _ in range(2):  # the second one by the scales of the first
        with backend.training():
            torch.autograd.backward(model(tokens).float().square().mean())
        backend.end_step(lambda values: values)
    for parameter, _ in model.hidden_weights():
        assert parameter.grad is not None and parameter.grad.is_meta


def test_sums_over_any_number_of_tokens_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch is a multiple of 16 tokens; a group of its sequences need not be."""
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    with FakeTensorMode():
        for tokens in (1004, 1008):
            left, right, one, other, out = (
                torch.empty(shape, dtype=dtype, device="cuda")
                for shape, dtype in (
                    ((32, tokens), E4M3),
                    ((48, tokens), E5M2),
                    *2 * [((), torch.float32)],
                    ((32, 48), torch.float32),
                )
            )
            assert multiply(left, right, (one, other), False, out).shape == (32, 48)
