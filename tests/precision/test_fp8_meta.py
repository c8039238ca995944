"""What a GPU would see of a step in FP8, on torch's "meta" device: its tensors cannot be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from config import Fp8Config
from engine.precision.fp8_native import NativeBackend
from tests.precision.conftest import NAMES, build

META = torch.device("meta")


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_8_bits_waits_for_nothing_on_its_device(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch._scaled_mm

    def scaled_mm(*operands: Any, out: Tensor, **options: Any) -> Tensor:
        return out.copy_(real(*operands, **options))  # torch has no meta kernel of one with `out`

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
