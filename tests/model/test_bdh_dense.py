"""BDH's dense layers equal the fused ones, in values, gradients and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from config import BDHConfig
from engine.hardware.device import compiler_for
from model.bdh import BDH
from tests.model.bdh_reference import documents_of, error, small_bdh

Outcome = dict[str, Tensor]


class PlainProjections:
    """Projections that are nothing but products."""

    def __init__(self, weights: tuple[Tensor, Tensor, Tensor]) -> None:
        self.encoder, self.encoder_v, self.decoder = weights

    def encode(self, x: Tensor, layer: int) -> Tensor:
        return x.unsqueeze(1) @ self.encoder

    def encode_v(self, a: Tensor, layer: int) -> Tensor:
        return a @ self.encoder_v

    def decode(self, z: Tensor, layer: int) -> Tensor:
        return z.transpose(1, 2).flatten(2) @ self.decoder


def outcome(model: BDH, tokens: Tensor, documents: Tensor | None = None) -> Outcome:
    """Logits and the gradient of every parameter."""
    model.zero_grad()
    logits = model(tokens, documents)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def both(model: BDH, tokens: Tensor, documents: Tensor | None = None) -> tuple[Outcome, Outcome]:
    """By the fused layers, and by the dense ones."""
    fused = outcome(model, tokens, documents)
    model.projections = PlainProjections
    dense = outcome(model, tokens, documents)
    model.projections = None
    assert fused.keys() == dense.keys() and len(fused) == 6
    return fused, dense


# 550 and 600 tokens are cut into chunks by the fused layers.
@pytest.mark.parametrize(
    "heads, documents",
    [
        (1, documents_of([1])),
        (2, documents_of([7], [7])),
        (4, documents_of([33])),
        (2, documents_of([550])),
        (2, documents_of([9, 1, 14], [24])),
        (2, documents_of([225, 25, 350], [600])),
    ],
)
def test_values_and_gradients_equal_the_fused_layers(heads: int, documents: Tensor) -> None:
    model = small_bdh(n_head=heads).double()
    several = documents if documents.any() else None
    fused, dense = both(model, torch.randint(64, documents.shape), several)
    for name, value in fused.items():
        if documents.numel() == 1 and name != "logits":  # most gradients are zero
            torch.testing.assert_close(dense[name], value, rtol=1e-9, atol=1e-12)
        else:
            assert error(dense[name], value) < 1e-9, name


def test_under_autocast_they_differ_by_rounding() -> None:
    model = small_bdh(n_embd=64, mlp_internal_dim_multiplier=16)
    tokens = torch.randint(64, (2, 64))
    exact = outcome(model.double(), tokens)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, dense = both(model, tokens)
    for name, value in exact.items():
        assert error(dense[name], value) < 1.2 * error(fused[name], value) + 1e-3, name
    assert dense["logits"].dtype == fused["logits"].dtype


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    seen: list[Tensor] = []

    class Watching(PlainProjections):
        def decode(self, z: Tensor, layer: int) -> Tensor:
            seen.append(z.detach())
            return super().decode(z, layer)

    model, tokens = small_bdh(n_layer=1), torch.randint(64, (8, 64))
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, which it hides
def test_compiled_they_are_the_same() -> None:
    if compiler_for(torch.device("cpu")) is None:
        pytest.skip("no C++ compiler")
    model, tokens = small_bdh(), torch.randint(64, (2, 12))
    model.projections = PlainProjections
    eager = outcome(model, tokens)
    model.compile()
    for name, value in outcome(model, tokens).items():
        assert error(value, eager[name]) < 1e-5, name


def test_generation_and_sparsity_use_the_fused_layers() -> None:
    def refused(weights: object) -> PlainProjections:
        raise AssertionError("projections are asked for")

    factory: Callable[[tuple[Tensor, Tensor, Tensor]], PlainProjections] = refused
    model, tokens = small_bdh().eval(), torch.randint(64, (1, 12))
    model.projections = factory
    assert len(model.active_fraction(tokens)["s"]) == 3
    assert model.prefill_or_decode(tokens, model.init_cache(1)).shape == (1, 64)
