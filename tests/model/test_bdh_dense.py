"""BDH's layers by the plain formulas equal the tiled kernels, in values, gradients and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from config import BDHConfig
from engine.hardware.device import compiler_for
from model.bdh.model import BDH
from tests.engine.test_memory import peak_bytes

Outcome = dict[str, Tensor]


class Plain:
    """Projections that are nothing but products."""

    def __init__(self, weights: tuple[Tensor, Tensor, Tensor]) -> None:
        self.encoder, self.encoder_v, self.decoder = weights

    def encode(self, x: Tensor, layer: int) -> Tensor:
        return x.unsqueeze(1) @ self.encoder

    def encode_v(self, a: Tensor, layer: int) -> Tensor:
        return a @ self.encoder_v

    def decode(self, z: Tensor, layer: int) -> Tensor:
        return z.transpose(1, 2).flatten(2) @ self.decoder


def small(**changes: Any) -> BDH:
    values: dict[str, Any] = {
        "n_layer": 3,
        "n_embd": 16,
        "n_head": 2,
        "dropout": 0.0,
        "mlp_internal_dim_multiplier": 4,
        "vocab_size": 256,
    }
    torch.manual_seed(0)
    return BDH(BDHConfig(**{**values, **changes}))


def outcome(model: BDH, tokens: Tensor, documents: Tensor | None = None) -> Outcome:
    """Logits and the gradient of every parameter."""
    model.zero_grad()
    logits = model(tokens, documents)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def both(model: BDH, tokens: Tensor, documents: Tensor | None = None) -> tuple[Outcome, Outcome]:
    """By the kernels, and written out."""
    tiled = outcome(model, tokens, documents)
    model.projections = Plain
    written = outcome(model, tokens, documents)
    model.projections = None
    return tiled, written


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def documents_of(*rows: Sequence[int]) -> Tensor:
    """Numbers of documents of these lengths."""
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    )


@pytest.mark.parametrize("heads, length", [(1, 1), (2, 7), (4, 33), (2, 550)])
def test_values_and_gradients_equal_the_kernels(heads: int, length: int) -> None:
    """550 tokens are cut into chunks by the kernels."""
    model = small(n_head=heads).double()
    tiled, written = both(model, torch.randint(256, (2, length)))
    assert tiled.keys() == written.keys() and len(tiled) == 6
    for name, value in tiled.items():
        if length == 1 and name != "logits":  # most of them are zero
            torch.testing.assert_close(written[name], value, rtol=1e-9, atol=1e-12)
        else:
            assert error(written[name], value) < 1e-9, name


@pytest.mark.parametrize("scale", [1, 25])
def test_documents_hide_what_they_hide_from_the_kernels(scale: int) -> None:
    lengths = ([9 * scale, 1 * scale, 14 * scale], [24 * scale])
    model, documents = small().double(), documents_of(*lengths)
    tiled, written = both(model, torch.randint(256, documents.shape), documents)
    for name, value in tiled.items():
        assert error(written[name], value) < 1e-9, name


def test_under_autocast_they_differ_by_rounding() -> None:
    model = small(n_embd=64, mlp_internal_dim_multiplier=16)
    tokens = torch.randint(256, (2, 64))
    exact = outcome(model.double(), tokens)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiled, written = both(model, tokens)
    for name, value in exact.items():
        assert error(written[name], value) < 1.2 * error(tiled[name], value) + 1e-3, name
    assert written["logits"].dtype == tiled["logits"].dtype


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    seen: list[Tensor] = []

    class Watching(Plain):
        def decode(self, z: Tensor, layer: int) -> Tensor:
            seen.append(z.detach())
            return super().decode(z, layer)

    model, tokens = small(n_layer=1), torch.randint(256, (8, 64))
    model.projections = Watching
    model(tokens)
    model.config = BDHConfig(**{**vars(model.config), "dropout": 0.25})
    model(tokens)
    model.eval()
    model(tokens)
    whole, dropped, evaluated = seen
    active = whole > 0
    assert abs(float((dropped[active] == 0).double().mean()) - 0.25) < 0.01
    kept = active & (dropped > 0)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)
    assert torch.equal(evaluated, whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, which it hides
def test_compiled_they_are_the_same() -> None:
    if compiler_for(torch.device("cpu")) is None:
        pytest.skip("no C++ compiler")
    model, tokens = small(), torch.randint(256, (2, 12))
    model.projections = Plain
    eager = outcome(model, tokens)
    model.compile()
    for name, value in outcome(model, tokens).items():
        assert error(value, eager[name]) < 1e-5, name


def test_what_is_observed_goes_by_the_kernels() -> None:
    def refused(weights: object) -> Plain:
        raise AssertionError("projections are asked for")

    model, tokens = small(), torch.randint(256, (1, 12))
    model.projections = refused
    model.eval()
    assert len(model.activation_sparsity(tokens)["s"]) == 3
    assert model.prefill_or_decode(tokens, model.init_cache(1)).shape == (1, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_predicted_memory_is_enough_and_not_twice_too_much(dtype: torch.dtype) -> None:
    model = small(n_embd=64, n_head=4, mlp_internal_dim_multiplier=32, dropout=0.1)
    model.projections = Plain
    rows = torch.randint(256, (2, 129))
    measured = peak_bytes(model, rows, dtype) - sum(4 * p.numel() for p in model.parameters())
    predicted = model.activation_bytes((2, 128), dtype, on_cpu=True)
    assert measured <= predicted <= 2 * measured
