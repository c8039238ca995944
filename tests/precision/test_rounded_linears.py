"""Generation from weights that are rounded once to the dtype of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from config import LowPrecisionConfig
from engine.precision.precision import Precision, round_linear_weights
from model.generate import Decoder
from tests.model.transformers import small

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_logits_are_those_of_autocast_that_rounds_in_each_product(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.precision.precision.supports_fast_bfloat16", lambda device: True)
    torch.manual_seed(0)
    model, tokens = small(name).eval(), torch.randint(256, (2, 9))
    options: Any = {"compute_dtype": "bfloat16", "use_4bit": False}
    low, decoder = LowPrecisionConfig(**options), Decoder(model, 2)
    with Precision(low, CPU).autocast(), torch.inference_mode():
        expected = [decoder.prefill(tokens), decoder.decode(tokens[:, :1])]
    embedding = model.embedding_and_head()[0].clone()
    with round_linear_weights(model, low, CPU), torch.inference_mode():
        found = [decoder.prefill(tokens), decoder.decode(tokens[:, :1])]
    assert all(linear.weight.dtype == torch.bfloat16 for linear in model.hidden_linears().values())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    assert torch.equal(model.embedding_and_head()[0], embedding), "tied weights are rounded apart"
