"""Head and loss in chunks on a GPU, a residual stream in bfloat16, and who computes attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from config import LowPrecisionConfig
from engine.hardware.device import prepare_device
from engine.precision.precision import Precision
from model.loss import IGNORED, cross_entropy_sum, head_loss
from tests.gpu.devices import DEVICE, cuda_only, gpu_tests
from tests.precision.conftest import build

pytestmark = gpu_tests
R, D, V = 512, 64, 4096


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x (R, D), weight (V, D) and targets (R,)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (R, V))
    targets = torch.randint(V, (R,), generator=generator)
    targets[::7] = IGNORED
    x, weight = x.to(DEVICE, dtype).requires_grad_(), (weight / 8).to(DEVICE, dtype)
    return x, weight.requires_grad_(), targets.to(DEVICE)


def chunked(
    compiled: bool, autocast: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Returns loss and gradients."""
    x, weight, targets = operands(dtype)
    function: Any = torch.compile(head_loss, fullgraph=True) if compiled else head_loss
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
        loss = function(x, weight, None, targets)
    return loss, *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_loss_in_chunks_is_that_of_float64(
    compiled: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.loss.CHUNK_LOGITS", V * R // 3)
    x, weight, targets = operands(torch.float64)
    loss = cross_entropy_sum(x @ weight.T, targets)
    expected = (loss, *torch.autograd.grad(loss, (x, weight)))
    for one, other in zip(chunked(compiled, autocast), expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() / other.norm() < (1e-2 if autocast else 1e-5)


@cuda_only
def test_the_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.loss.CHUNK_LOGITS", V * R // 16)
    chunked(False, True)  # workspaces
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    chunked(False, True)
    taken = torch.cuda.max_memory_allocated(DEVICE) - before
    assert taken < 2 * R * V + 16 * V * D  # whole logits in bfloat16, weights and their gradients


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_residual_stream_in_bfloat16_gives_nearly_the_same_loss(
    name: str, compiled: bool
) -> None:
    losses = []
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for kind in ("float32", "bfloat16"):
        model = build(name).to(DEVICE)
        low = LowPrecisionConfig(use_4bit=False, residual_dtype=kind)
        precision = Precision(low, DEVICE)
        precision.prepare(model, 10)
        if compiled:
            model.compile()
        with precision.autocast():
            loss = model(tokens[:, :-1], None, tokens[:, 1:])
        precision.backward(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=3e-3)


@cuda_only
def test_on_hopper_attention_is_computed_by_cudnn() -> None:
    if torch.cuda.get_device_capability(DEVICE) < (9, 0):
        pytest.skip("FlashAttention is as fast before Hopper")
    q = torch.randn(2, 4, 256, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    with sdpa_kernel(_cur_sdpa_kernel_backends(with_priority=True), set_priority=True):
        prepare_device(torch.device("cuda", torch.cuda.current_device()))
        chosen = torch._fused_sdp_choice(q, q, q, is_causal=True)
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert chosen == SDPBackend.CUDNN_ATTENTION.value
    assert "Cudnn" in type(y.grad_fn).__name__
