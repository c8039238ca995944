"""BDH against a naive float64 implementation; causality, precision of rope, counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import BDHConfig, Config
from model.bdh import BDH, to_upstream
from model.bdh.tiling import rope_frequencies, rotation
from tests.model.bdh_reference import error, small_bdh


def naive_logits(state: dict[str, Tensor], tokens: Tensor, config: BDHConfig) -> Tensor:
    """The definition, one head, position and pair at a time, in the upstream layout."""
    D, H = config.n_embd, config.n_head
    N = config.mlp_internal_dim_multiplier * D // H

    def norm(x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def rope(s: Tensor) -> Tensor:  # (T, N)
        result = torch.empty_like(s)
        for t in range(s.shape[0]):
            for i in range(N // 2):
                angle = t * (2.0**16) ** (-2 * i / N)
                cos, sin = math.cos(angle), math.sin(angle)
                first, second = s[t, 2 * i], s[t, 2 * i + 1]
                result[t, 2 * i] = first * cos - second * sin
                result[t, 2 * i + 1] = second * cos + first * sin
        return result

    rows = []
    for row in tokens:
        x = norm(state["embed.weight"][row])  # (T, D)
        for _ in range(config.n_layer):
            y = torch.zeros_like(x)
            for h in range(H):
                s = F.relu(x @ state["encoder"][h])
                r = rope(s)
                a = torch.stack(
                    [sum(((r[t] @ r[u]) * x[u] for u in range(t)), 0 * x[0]) for t in range(len(x))]
                )
                z = s * F.relu(norm(a) @ state["encoder_v"][h])
                y = y + z @ state["decoder"][h * N : (h + 1) * N]
            x = norm(x + norm(y))
        rows.append(x @ state["lm_head"])
    return torch.stack(rows)


@pytest.mark.parametrize("heads, length", [(1, 1), (2, 7), (4, 9)])
def test_logits_loss_and_gradients_equal_the_naive_float64_definition(
    heads: int, length: int
) -> None:
    model = small_bdh(std=0.3, n_head=heads)
    tokens = torch.randint(64, (2, length + 1))
    state = {
        name: value.double().requires_grad_()
        for name, value in to_upstream(model).items()
        if name != "attn.freqs"
    }
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    expected = naive_logits(state, tokens[:, :-1], model.config)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(expected_loss)

    assert error(logits, expected) < 1e-5
    assert error(loss, expected_loss) < 1e-5
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # gradients in the upstream layout, by the same exporter
    for name, gradient in to_upstream(model).items():
        if name == "attn.freqs":
            continue
        correct = state[name].grad
        if length == 1 and (correct is None or correct.norm() == 0):
            continue  # one token attends to nothing
        assert correct is not None
        assert error(gradient, correct) < 1e-5, name


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(1, 11), seed=st.integers(0, 1000))
def test_later_tokens_never_change_earlier_logits(cut: int, seed: int) -> None:
    model = small_bdh().double()
    torch.manual_seed(seed)
    tokens = torch.randint(64, (1, 12))
    other = tokens.clone()
    other[:, cut:] = torch.randint(64, (1, 12 - cut))
    assert torch.allclose(model(tokens)[:, :cut], model(other)[:, :cut], atol=1e-12)


def test_rotation_keeps_its_precision_at_large_positions() -> None:
    angles = rotation(rope_frequencies(64), 100_000, torch.float32, torch.device("cpu"))
    exact = 2 * math.pi * ((100_000 * rope_frequencies(64)) % 1.0)
    assert (angles.chunk_cos.double() - exact.cos()).abs().max() < 1e-6
    assert (angles.cos.square() + angles.sin.square() - 1).abs().max() < 1e-5


def test_parameters_and_flops_are_those_of_the_published_size_and_of_the_formulas() -> None:
    with torch.device("meta"):
        published = BDH(Config().to_bdh_config())
    assert sum(p.numel() for p in published.parameters()) == 25_296_896
    D, H, N, T, V = 16, 2, 32, 10, 64
    forward = 3 * (6 * D * H * N + T * H * (N + D)) + 2 * D * V  # the causal half of attention
    assert small_bdh().flops_per_token(T) == 3 * forward


def test_dropout_acts_in_training_only() -> None:
    model = small_bdh(dropout=0.5)
    tokens = torch.randint(64, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
