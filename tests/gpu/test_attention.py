"""FlexAttention on a GPU against the boolean mask, and the heads that it does not take."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from config import ModelConfig
from model import attention as layers
from tests.gpu.devices import DEVICE, cuda_only, gpu_tests
from tests.model.transformers import BLOCK, VOCABULARY, small, some_documents, step

pytestmark = gpu_tests
both = pytest.mark.parametrize("name", ["gpt", "llama"])


def outcomes(name: str, n_embd: int, kinds: tuple[str, ...]) -> list[list[Tensor]]:
    """Logits and gradients by each kind of attention, with documents."""
    torch.manual_seed(0)
    model = small(name, n_embd=n_embd).to(DEVICE)
    tokens = torch.randint(VOCABULARY, (3, BLOCK)).to(DEVICE)
    documents = some_documents(3, BLOCK).to(DEVICE)
    found = []
    for kind in kinds:
        model.config = ModelConfig(**{**asdict(model.config), "attention": kind})
        logits = model(tokens, documents)
        found.append([logits, *step(model, logits, tokens).values()])
    return found


@both
def test_flex_attention_on_heads_of_16_equals_the_mask(name: str) -> None:
    flex, auto, mask = outcomes(name, 64, ("flex", "auto", "math"))
    torch.testing.assert_close(flex, mask, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(auto, mask, rtol=1e-3, atol=1e-4)


@both
def test_heads_of_8_which_flex_attention_does_not_take_fall_back_to_the_mask(name: str) -> None:
    flex, auto, mask = outcomes(name, 32, ("flex", "auto", "math"))
    torch.testing.assert_close(flex, mask, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(auto, mask, rtol=1e-3, atol=1e-4)


@cuda_only
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_flex_attention_takes_lengths_that_are_no_multiple_of_its_blocks(masked: bool) -> None:
    torch.manual_seed(0)
    documents = some_documents(2, 160).to(DEVICE) if masked else None
    q, k, v = (torch.randn(2, heads, 160, 16, device=DEVICE) for heads in (4, 2, 2))
    found = [
        layers.attention(q, k, v, layers.training_mask(kind, q, (2, 160), documents, 0.0, 16))
        for kind in ("flex", "math")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
