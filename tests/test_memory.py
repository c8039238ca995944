"""The memory that a training step is said to need is what it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from config import BDHConfig
from model.bdh import BDH

BF16, FLOAT32 = torch.bfloat16, torch.float32
Case = tuple[int, int, int, int, int, int, int, torch.dtype]
GRID: list[Case] = [  # batch, length, layers, width, heads, multiplier, vocabulary, dtype
    (2, 256, 3, 128, 4, 16, 256, BF16),
    (8, 128, 1, 128, 4, 16, 256, FLOAT32),
    (1, 300, 6, 64, 1, 32, 256, BF16),
    (2, 512, 2, 128, 4, 128, 256, BF16),
    (1, 2048, 2, 128, 2, 32, 256, BF16),
    (1, 4096, 1, 64, 4, 64, 256, FLOAT32),
    (4, 256, 2, 64, 1, 16, 8192, BF16),
]


def step(model: BDH, tokens: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not FLOAT32):
        logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    model.zero_grad()


def peak_bytes(model: BDH, tokens: torch.Tensor, dtype: torch.dtype) -> int:
    """The most that the allocator had given out at any moment of a step, by its own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(model, tokens, dtype)
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_predicted_activations_are_within_a_seventh_of_the_measured(
    case: Case, dropout: float
) -> None:
    B, T, layers, D, H, multiplier, V, dtype = case
    config = BDHConfig(
        n_layer=layers,
        n_embd=D,
        dropout=dropout,
        n_head=H,
        mlp_internal_dim_multiplier=multiplier,
        vocab_size=V,
    )
    model = BDH(config)
    tokens = torch.randint(V, (B, T + 1))
    step(model, tokens, dtype)  # angles are kept from the first call on
    gradients = sum(4 * p.numel() for p in model.parameters())
    measured = peak_bytes(model, tokens, dtype) - gradients
    predicted = model.activation_bytes((B, T), dtype, on_cpu=True)
    assert 0.87 < predicted / measured < 1.15
