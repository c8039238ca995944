"""The loss that a model returns where targets are given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from config import Config
from model import build_model
from model.loss import IGNORED

ALL_MODELS = pytest.mark.parametrize("name", ["bdh", "gpt", "llama"])
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 256, "dropout": 0.0}
BDH = {"mlp_internal_dim_multiplier": 4}


@ALL_MODELS
def test_the_loss_of_a_model_is_the_summed_cross_entropy_of_its_logits(name: str) -> None:
    torch.manual_seed(0)
    own = BDH if name == "bdh" else {}
    model = build_model(Config.from_dict({"model": {"name": name, **SMALL, **own}}))
    tokens, targets = torch.randint(256, (2, 3, 8))
    documents = (tokens % 5 == 0).cumsum(1)
    targets[:, 3] = IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens, documents)
        loss = model(tokens, documents, targets)
    expected = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
