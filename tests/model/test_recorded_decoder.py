"""Generation by a recorded step equals generation by a cache that grows."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from model import LanguageModel, build_model
from model.generate import Decoder, RecordedDecoder, Sampling, generate
from tests.model.transformers import BLOCK, config
from tests.recorded import record_operators

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "bdh": {"mlp_internal_dim_multiplier": 8},
    "gpt": {"attention": "flash"},
    "gpt by formula": {"attention": "math"},
    "llama": {"n_kv_head": 2},
}
EACH = pytest.mark.parametrize("variant", VARIANTS)


def small(variant: str) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(config(variant.split()[0], **VARIANTS[variant])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def recorded(model: LanguageModel, samples: int, max_length: int) -> RecordedDecoder:
    return RecordedDecoder(model, samples, max_length, CPU, record_operators)


@EACH
def test_logits_are_those_of_a_growing_cache(variant: str) -> None:
    model, tokens = small(variant), torch.randint(256, (2, BLOCK))
    fixed, growing = recorded(model, 2, BLOCK), Decoder(model, 2)
    with torch.inference_mode():
        for prompt in (9, 4):  # the second prompt finds what the first text has left
            found, expected = fixed.prefill(tokens[:, :prompt]), growing.prefill(tokens[:, :prompt])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            for token in torch.split(tokens[:, prompt:], 1, dim=1):
                found, expected = fixed.decode(token), growing.decode(token)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@EACH
def test_it_draws_the_same_tokens_beyond_the_context(variant: str) -> None:
    model, prompt = small(variant), torch.randint(256, (1, 5))
    drawn = []
    for decoder in (None, recorded(model, 2, 12)):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        tokens = generate(model, prompt, Sampling(), generators, context=12, decoder=decoder)
        drawn.append(torch.stack(list(islice(tokens, 30))))
    assert torch.equal(*drawn)
