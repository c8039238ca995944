"""BDH as a recurrent network equals BDH in parallel, at any position and in any pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import BDHConfig
from model.bdh.model import BDH


def small(heads: int = 2) -> BDH:
    """Weights larger than at the start, so that nothing is near zero; a little dropout."""
    config = BDHConfig(
        n_layer=3,
        n_embd=16,
        dropout=0.1,
        n_head=heads,
        mlp_internal_dim_multiplier=4,
        vocab_size=64,
    )
    model = BDH(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def fed(model: BDH, tokens: Tensor, pieces: list[int], picked: bool = True) -> Tensor:
    """Logits after the last of some pieces of tokens (B, T)."""
    state = model.init_cache(len(tokens))
    if not picked:
        state.rows_v = None
    for piece in torch.split(tokens[:, : sum(pieces)], pieces, dim=1):
        logits = model.prefill_or_decode(piece, state)
    assert state.position == sum(pieces)
    return logits


def whole(model: BDH, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)[:, -1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("picked", [True, False], ids=["active rows", "whole matrices"])
@pytest.mark.parametrize("batch, heads", [(1, 2), (3, 1), (2, 4)])
@settings(deadline=None, max_examples=15)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 999))
def test_any_pieces_give_the_logits_of_the_whole(
    batch: int, heads: int, picked: bool, pieces: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    model = small(heads)
    tokens = torch.randint(64, (batch, sum(pieces)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.bdh.recurrent._FEW", 1.1)
        logits = fed(model, tokens, pieces, picked)
    assert torch.allclose(logits, whole(model, tokens), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [512, 513, 700, 1100])
def test_prompts_longer_than_a_chunk_are_continued_exactly(length: int) -> None:
    torch.manual_seed(length)
    model = small()
    tokens = torch.randint(64, (2, length + 6))
    logits = fed(model, tokens, [length, 1, 1, 3, 1])
    assert torch.allclose(logits, whole(model, tokens), atol=5e-5, rtol=1e-3)


def test_few_active_neurons_are_picked_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    picks: list[int] = []

    def active(x: Tensor, *_: object) -> Tensor:
        picks.append(1)
        return torch.zeros_like(x)

    monkeypatch.setattr("model.bdh.recurrent._active", active)
    model = small()
    fed(model, torch.zeros(1, 1, dtype=torch.long), [1])
    assert picks == []  # half of all neurons are active in a random model
    with torch.no_grad():
        model.encoder.zero_()
    fed(model, torch.zeros(1, 1, dtype=torch.long), [1])
    assert len(picks) == 3


def test_without_any_active_neuron_nothing_is_attended_to() -> None:
    model = small()
    with torch.no_grad():
        model.encoder.zero_()
    tokens = torch.randint(64, (2, 4))
    assert torch.allclose(fed(model, tokens, [1, 1, 1, 1]), whole(model, tokens), atol=1e-6)


def test_a_state_is_as_large_at_any_position_and_precise_at_a_million() -> None:
    torch.manual_seed(1)
    model = small().double()
    tokens = torch.randint(64, (1, 5))
    near, far = model.init_cache(1), model.init_cache(1)
    size = near.sums.numel()
    far.position = far.frame = 1_000_000
    first = [model.prefill_or_decode(token, near) for token in torch.split(tokens, 1, dim=1)]
    far.frame = 0  # the same sums of nothing, met a million tokens from their frame
    second = [model.prefill_or_decode(token, far) for token in torch.split(tokens, 1, dim=1)]
    assert near.sums.numel() == far.sums.numel() == size
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("few", [0.0, 1.1], ids=["whole matrices", "active rows"])
@pytest.mark.parametrize("lowered", [True, False], ids=["bfloat16 weights", "autocast"])
def test_states_work_in_bfloat16(
    lowered: bool, few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.bdh.recurrent._FEW", few)
    torch.manual_seed(0)
    model = small()
    tokens = torch.randint(64, (2, 9))
    expected = fed(model, tokens, [5, 1, 1, 2])
    model = model.bfloat16() if lowered else model
    with torch.autocast("cpu", torch.bfloat16, enabled=not lowered):
        logits = fed(model, tokens, [5, 1, 1, 2]).float()
    assert model.init_cache(1).sums.dtype == torch.float32
    assert (logits - expected).norm() < 0.1 * expected.norm()


def test_states_keep_no_gradient_and_draw_nothing() -> None:
    model = small().train()
    before = torch.get_rng_state()
    logits = fed(model, torch.randint(64, (1, 4), generator=torch.Generator()), [2, 1, 1])
    assert not logits.requires_grad
    assert torch.equal(before, torch.get_rng_state())
