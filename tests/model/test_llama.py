"""Llama against its definition; what it shares with GPT is tested with it."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config, ModelConfig
from model import build_model
from model.llama import Llama, RMSNorm, apply_rope, mlp_width, rope_angles
from tests.model.transformers import check_parity, slow_attention, small, some_documents


def llama(**options: Any) -> Llama:
    return cast(Llama, small("llama", **options))


def slow_logits(model: Any, tokens: Tensor, documents: Tensor | None) -> Tensor:
    """The definition, one position and pair at a time."""
    weights = dict(model.named_parameters())
    H, d = model.config.n_head, model.config.n_embd // model.config.n_head
    K = model.config.n_kv_head or H

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y: Tensor = scaled * weights[f"{name}.weight"]
        return y

    def rope(x: Tensor) -> Tensor:  # (T, heads, d)
        rows = []
        for t, row in enumerate(x):
            first, second = [], []
            for i in range(d // 2):
                angle = t * model.config.rope_theta ** (-2 * i / d)
                a, b = row[:, i], row[:, i + d // 2]
                first.append(a * math.cos(angle) - b * math.sin(angle))
                second.append(b * math.cos(angle) + a * math.sin(angle))
            rows.append(torch.stack(first + second, -1))
        return torch.stack(rows)

    logits = []
    for b, row in enumerate(tokens):
        x = weights["embedding.weight"][row]
        for layer in range(model.config.n_layer):
            name = f"layers.{layer}"
            parts = norm(x, f"{name}.attn_norm") @ weights[f"{name}.attn.wqkv.weight"].T
            q, k, v = parts.split([H * d, K * d, K * d], -1)
            q, k, v = (each.reshape(len(row), -1, d) for each in (q, k, v))
            numbers = None if documents is None else documents[b]
            y = slow_attention(rope(q), rope(k), v, numbers)
            x = x + y @ weights[f"{name}.attn.wo.weight"].T
            y = norm(x, f"{name}.mlp_norm")
            w1, w3 = weights[f"{name}.mlp.w13.weight"].chunk(2)
            gate = y @ w1.T
            y = gate / (1 + (-gate).exp()) * (y @ w3.T)
            x = x + y @ weights[f"{name}.mlp.w2.weight"].T
        logits.append(norm(x, "norm") @ weights["lm_head.weight"].T)
    return torch.stack(logits)


@pytest.mark.parametrize("attention", ["auto", "math"])
@pytest.mark.parametrize("heads", [None, 2, 1])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
def test_logits_and_gradients_equal_the_definition(
    attention: str, heads: int | None, documents: bool
) -> None:
    torch.manual_seed(0)
    numbers = some_documents(2, 11) if documents else None
    model = llama(attention=attention, n_kv_head=heads, rope_theta=100.0)
    check_parity(model, slow_logits, numbers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_and_its_gradients_are_torchs_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0)
    x, gradient = torch.randn(2, 7, 16, dtype=dtype).unbind(0)
    x.requires_grad_()
    exact = [x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()]
    torch.autograd.backward(norm(x), gradient)
    expected = F.rms_norm(exact[0], (16,), exact[1], 1e-5)
    torch.autograd.backward(expected, gradient.double())
    for found, wanted in (
        (norm(x), expected),
        (x.grad, exact[0].grad),
        (norm.weight.grad, exact[1].grad),
    ):
        assert found is not None and found.dtype is dtype and wanted is not None
        tolerance = 50 * torch.finfo(dtype).eps if dtype is not torch.bfloat16 else 0.02
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_the_norm_of_a_narrow_stream_takes_torchs_kernel() -> None:
    """It is for one dtype. Torch warns of two, and warnings are errors here."""
    stream = torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
    assert RMSNorm(8).to("meta")(stream).dtype == torch.bfloat16


def test_the_angles_are_exact_under_autocast_and_at_a_million() -> None:
    torch.manual_seed(0)
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model.rope_table(0, 20, model.embed(torch.zeros(1, 20, dtype=torch.long), 0))
    assert lowered.dtype is torch.float32
    x = torch.randn(1, 1, 2, 8, dtype=torch.float64)
    table = rope_angles(1_000_000, 1_000_001, 8, 10_000.0).unsqueeze(2)
    angle = 1_000_000 * 10_000.0 ** (-2 / 8)
    expected = x[..., 1] * math.cos(angle) - x[..., 5] * math.sin(angle)
    torch.testing.assert_close(apply_rope(x, table)[..., 1], expected, rtol=1e-9, atol=1e-9)
    lowered = apply_rope(x.bfloat16(), table.float())
    assert lowered.dtype is torch.bfloat16
    torch.testing.assert_close(lowered.double(), apply_rope(x, table), rtol=0.02, atol=0.02)


def test_scores_depend_on_distances_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for begin in (0, 5, 1000):
        q, k = (
            apply_rope(each, rope_angles(begin + shift, begin + shift + 1, 8, 100.0).unsqueeze(2))
            for each, shift in zip(x, (3, 0), strict=True)
        )
        scores.append((q * k).sum())
    torch.testing.assert_close(scores[1:], scores[:1] * 2)


def test_tables_grow_as_needed_and_stay_out_of_the_state_dict() -> None:
    model = llama()
    tokens = torch.randint(256, (1, 70))
    with torch.inference_mode():
        model(tokens[:, :8])
    assert not any("rope" in name for name in model.state_dict())
    logits = model(tokens)
    torch.autograd.backward(logits.sum())  # tables made under inference are for training too
    torch.testing.assert_close(llama_of(model)(tokens), logits)
    assert model.double()(tokens).dtype is torch.float64


def llama_of(model: Llama) -> Llama:
    other = Llama(model.config)
    other.load_state_dict(model.state_dict())
    return other


def test_names_shapes_and_no_biases() -> None:
    model = llama(n_kv_head=2, d_ff=48)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layer = {
        "attn_norm.weight": (32,),
        "attn.wqkv.weight": (64, 32),
        "attn.wo.weight": (32, 32),
        "mlp_norm.weight": (32,),
        "mlp.w13.weight": (96, 32),
        "mlp.w2.weight": (32, 48),
    }
    ends = {"embedding.weight": (256, 32), "norm.weight": (32,), "lm_head.weight": (256, 32)}
    assert shapes == ends | {f"layers.{n}.{k}": v for n in range(2) for k, v in layer.items()}


@pytest.mark.parametrize("width, expected", [(24, 64), (128, 384), (256, 704), (768, 2048)])
def test_the_mlp_is_eight_thirds_as_wide_rounded_up_to_64(width: int, expected: int) -> None:
    assert mlp_width(ModelConfig(name="llama", n_embd=width)) == expected


def test_weights_are_drawn_by_their_shape() -> None:
    torch.manual_seed(0)
    sizes = ModelConfig(name="llama", n_layer=2, n_embd=128, n_kv_head=2, d_ff=320, vocab_size=256)
    model = Llama(sizes)
    deviations = {
        "embedding": 1.0,
        "lm_head": math.sqrt(2 / (256 + 128)),
        "wqkv": math.sqrt(2 / (64 + 128)),
        "wo": math.sqrt(2 / (128 + 128)),
        "w13": math.sqrt(2 / (320 + 128)),
        "w2": math.sqrt(2 / (128 + 320)),
    }
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and p.requires_grad
        if p.dim() == 1:
            assert torch.equal(p.detach(), torch.ones_like(p))
            continue
        std = deviations[name.split(".")[-2]]
        assert abs(p.mean().item()) < 0.05 * std and 0.93 < p.std().item() / std < 1.01, name
        assert p.abs().max() <= 3 * std


@pytest.mark.parametrize("heads, count", [(None, 3), (2, 4), (1, 6)])
def test_matrices_are_stacked_as_equals(heads: int | None, count: int) -> None:
    model = llama(n_kv_head=heads)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: stacked for parameter, stacked in model.hidden_weights()}
    parts = {"attn.wqkv": count, "attn.wo": 1, "mlp.w13": 2, "mlp.w2": 1}
    assert found == {f"layers.{n}.{k}.weight": v for n in range(2) for k, v in parts.items()}
    assert all(parameter.shape[0] % stacked == 0 for parameter, stacked in model.hidden_weights())


def test_bdh_tells_its_matrices_too() -> None:
    model: Any = build_model(Config())
    assert [(len(parameter), count) for parameter, count in model.hidden_weights()] == [
        (4, 4),
        (4, 4),
        (32768, 4),
    ]
    assert model.max_context is None and model.notes(True) == []
