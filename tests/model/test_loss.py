"""The loss that a model returns where targets are given, whole and in chunks of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from model import LanguageModel, build_model
from model.loss import IGNORED, cross_entropy_sum, head_loss

ALL_MODELS = pytest.mark.parametrize("name", ["bdh", "gpt", "llama"])
V = 256


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes chunks of a few rows."""
    monkeypatch.setattr("model.loss.CHUNK_LOGITS", 5 * V)


def small(name: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": V, "dropout": 0.0}
    own = {"mlp_internal_dim_multiplier": 4} if name == "bdh" else options
    return build_model(Config.from_dict({"model": {"name": name, **shape, **own}}))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, documents and targets, (3, 8)."""
    tokens, targets = torch.randint(V, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    targets[:, 3] = IGNORED
    return tokens, (tokens % 5 == 0).cumsum(1), targets


def loss_and_gradients(
    model: LanguageModel, autocast: bool = False, from_logits: bool = False
) -> list[Tensor]:
    tokens, documents, targets = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if from_logits:
            logits = model(tokens, documents).flatten(0, 1).float()
            loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        else:
            loss = model(tokens, documents, targets)
    model.zero_grad()
    torch.autograd.backward(loss / 7)
    assert loss.dtype == torch.float32
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("autocast", [False, True])
@ALL_MODELS
def test_a_whole_loss_is_the_cross_entropy_of_the_logits_bit_for_bit(
    name: str, autocast: bool
) -> None:
    model = small(name)
    found, expected = (loss_and_gradients(model, autocast, kind) for kind in (False, True))
    assert all(map(torch.equal, found, expected))


OPTIONS: list[Any] = [
    ("bdh", {}),
    ("gpt", {"tie_embeddings": True}),
    ("gpt", {"tie_embeddings": False, "bias": True, "cls_head_bias": True}),
    ("llama", {}),
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name, options", OPTIONS)
def test_a_loss_in_chunks_is_that_of_all_rows(
    name: str, options: dict[str, Any], autocast: bool, chunks: None
) -> None:
    model = small(name, **options)
    found, expected = (loss_and_gradients(model, autocast, kind) for kind in (False, True))
    for one, other in zip(found, expected, strict=True):
        error = (one - other).abs().max() / other.abs().max()
        assert error < (2e-2 if autocast else 2e-6)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tokens, documents, targets = batch()
        assert torch.allclose(model(tokens, documents, targets), found[0], rtol=1e-6)


def test_gradients_of_chunks_are_right_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.loss.CHUNK_LOGITS", 22)
    torch.manual_seed(0)
    shapes = ((7, 5), (11, 5), (11,))
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    targets = torch.tensor([3, 0, IGNORED, 10, 7, IGNORED, 1])
    assert torch.autograd.gradcheck(lambda x, w, b: head_loss(x, w, b, targets), operands)


def test_a_frozen_head_gets_no_gradient_and_passes_one_on(chunks: None) -> None:
    model = small("llama")
    model.embedding_and_head()[1].requires_grad_(False)
    found, expected = (loss_and_gradients(model, from_logits=kind) for kind in (False, True))
    assert len(found) == len(list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert model.embedding_and_head()[1].grad is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_compile_into_one_graph_with_the_same_gradients(
    autocast: bool, chunks: None
) -> None:
    def step(function: Any) -> list[Tensor]:
        torch.manual_seed(0)
        x, w = torch.randn(24, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = function(x, w, None, batch()[2].flatten())
        gradients: tuple[Tensor, ...] = torch.autograd.grad(loss, (x, w))
        return [loss.detach(), *gradients]

    def whole(x: Tensor, w: Tensor, bias: None, targets: Tensor) -> Tensor:
        return cross_entropy_sum(x @ w.T, targets)

    torch._dynamo.reset()
    # What inductor does with the graph is torch's to test.
    compiled = step(torch.compile(head_loss, fullgraph=True, backend="aot_eager"))
    for one, other in zip(compiled, step(whole), strict=True):
        assert (one - other).abs().max() / other.abs().max() < (2e-2 if autocast else 2e-6)
