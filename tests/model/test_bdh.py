"""BDH against a naive float64 implementation, the upstream layout, and its own FLOP count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import BDHConfig, Config
from model.bdh.model import BDH, from_upstream, to_upstream
from model.bdh.tiling import rope_frequencies, rotation


def small_config(**changes: Any) -> BDHConfig:
    values: dict[str, Any] = {
        "n_layer": 3,
        "n_embd": 16,
        "n_head": 2,
        "dropout": 0.0,
        "mlp_internal_dim_multiplier": 4,
        "vocab_size": 256,
    }
    return BDHConfig(**{**values, **changes})


def naive_logits(state: dict[str, Tensor], tokens: Tensor, config: BDHConfig) -> Tensor:
    """The definition, one head, position and pair at a time, in the upstream layout."""
    D, H = config.n_embd, config.n_head
    N = config.mlp_internal_dim_multiplier * D // H

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def turned(s: Tensor) -> Tensor:  # (T, N)
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
                r = turned(s)
                a = torch.stack(
                    [sum(((r[t] @ r[u]) * x[u] for u in range(t)), 0 * x[0]) for t in range(len(x))]
                )
                z = s * F.relu(norm(a) @ state["encoder_v"][h])
                y = y + z @ state["decoder"][h * N : (h + 1) * N]
            x = norm(x + norm(y))
        rows.append(x @ state["lm_head"])
    return torch.stack(rows)


def relative_error(found: Tensor, expected: Tensor) -> float:
    error = (found.detach().double() - expected.detach()).norm() / expected.detach().norm()
    return float(error)


@pytest.mark.parametrize("heads, length", [(1, 1), (1, 7), (2, 12), (4, 9)])
def test_logits_loss_and_gradients_equal_the_naive_float64_definition(
    heads: int, length: int
) -> None:
    torch.manual_seed(0)
    config = small_config(n_head=heads)
    model = BDH(config)
    for parameter in model.parameters():  # larger weights than at the start: nothing is near zero
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(256, (2, length + 1))
    state = {
        name: value.double().requires_grad_()
        for name, value in to_upstream(model).items()
        if name != "attn.freqs"
    }

    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    expected = naive_logits(state, tokens[:, :-1], config)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(expected_loss)

    assert relative_error(logits, expected) < 1e-5
    assert relative_error(loss, expected_loss) < 1e-5
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # gradients in the upstream layout, by the same exporter
    for name, gradient in to_upstream(model).items():
        if name != "attn.freqs":
            reference = state[name].grad
            if length == 1 and (reference is None or reference.norm() == 0):
                continue  # one token attends to nothing
            assert reference is not None
            assert relative_error(gradient, reference) < 1e-5, name


def test_upstream_weights_come_back_unchanged() -> None:
    config = small_config()
    state = to_upstream(BDH(config))
    again = to_upstream(from_upstream(state, config))
    assert set(state) == {
        "encoder",
        "encoder_v",
        "decoder",
        "embed.weight",
        "lm_head",
        "attn.freqs",
    }
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_upstream_shapes_are_those_of_the_reference() -> None:
    shapes = {name: tuple(value.shape) for name, value in to_upstream(BDH(small_config())).items()}
    assert shapes == {
        "encoder": (2, 16, 32),
        "encoder_v": (2, 16, 32),
        "decoder": (64, 16),
        "embed.weight": (256, 16),
        "lm_head": (16, 256),
        "attn.freqs": (1, 1, 1, 32),
    }


def test_upstream_weights_of_another_shape_are_refused_by_name() -> None:
    state = to_upstream(BDH(small_config()))
    with pytest.raises(ValueError, match=r"encoder: expected \(4, 16, 16\), found \(2, 16, 32\)"):
        from_upstream(state, small_config(n_head=4))
    del state["decoder"]
    with pytest.raises(ValueError, match="lack decoder"):
        from_upstream(state, small_config())


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(1, 11), seed=st.integers(0, 1000))
def test_later_tokens_never_change_earlier_logits(cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = BDH(small_config()).double()
    tokens = torch.randint(256, (1, 12))
    other = tokens.clone()
    other[:, cut:] = torch.randint(256, (1, 12 - cut))
    assert torch.allclose(model(tokens)[:, :cut], model(other)[:, :cut], atol=1e-12)


def test_rotation_keeps_its_precision_at_large_positions() -> None:
    angles = rotation(rope_frequencies(64), 100_000, torch.float32, torch.device("cpu"))
    exact = 2 * math.pi * ((100_000 * rope_frequencies(64)) % 1.0)
    assert (angles.chunk_cos.double() - exact.cos()).abs().max() < 1e-6
    assert (angles.cos.square() + angles.sin.square() - 1).abs().max() < 1e-5


def test_default_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = BDH(Config().to_bdh_config())
    assert sum(p.numel() for p in model.parameters()) == 25_296_896


def test_flops_count_the_matmuls_and_the_causal_half_of_attention() -> None:
    config = small_config()
    D, H, N, T, V = 16, 2, 32, 10, 256
    forward = 3 * (6 * D * H * N + T * H * (N + D)) + 2 * D * V
    assert BDH(config).flops_per_token(T) == 3 * forward


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = BDH(small_config(dropout=0.5))
    tokens = torch.randint(256, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
