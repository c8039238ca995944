"""BDH as a recurrent network equals BDH in parallel, at any position and in any pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.bdh import BDH
from tests.model.bdh_reference import small_bdh

# What `SPARSE_FRACTION` is set to, so that a layer gathers the rows of active neurons or does not.
ALWAYS, NEVER = 1.1, 0.0


def logits_after(model: BDH, tokens: Tensor, pieces: list[int]) -> Tensor:
    """Logits after the last of some pieces of tokens (B, T)."""
    cache = model.init_cache(len(tokens))
    for piece in torch.split(tokens[:, : sum(pieces)], pieces, dim=1):
        logits = model.prefill_or_decode(piece, cache)
    assert cache.position == sum(pieces)
    return logits


def parallel(model: BDH, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)[:, -1]  # type: ignore[no-any-return]


@pytest.fixture(params=[ALWAYS, NEVER], ids=["active rows", "whole matrices"])
def fraction(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr("model.bdh.recurrent.SPARSE_FRACTION", request.param)
    return float(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [ALWAYS, NEVER], ids=["active rows", "whole matrices"])
@pytest.mark.parametrize("batch, heads", [(1, 2), (3, 1), (2, 4)])
@settings(deadline=None, max_examples=15)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 999))
def test_any_pieces_give_the_logits_of_the_whole(
    batch: int, heads: int, sparse: float, pieces: list[int], seed: int
) -> None:
    model = small_bdh(std=0.3, n_head=heads, dropout=0.1).eval()
    torch.manual_seed(seed)
    tokens = torch.randint(64, (batch, sum(pieces)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.bdh.recurrent.SPARSE_FRACTION", sparse)
        logits = logits_after(model, tokens, pieces)
    assert torch.allclose(logits, parallel(model, tokens), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [512, 513, 1100])
def test_prompts_longer_than_a_chunk_are_continued_exactly(fraction: float, length: int) -> None:
    model = small_bdh(std=0.3).eval()
    tokens = torch.randint(64, (2, length + 6))
    logits = logits_after(model, tokens, [length, 1, 1, 3, 1])
    assert torch.allclose(logits, parallel(model, tokens), atol=5e-5, rtol=1e-3)


def test_rows_are_gathered_only_if_few_neurons_are_active(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    original = F.embedding_bag

    def watched(rows: Tensor, *args: object, **options: object) -> Tensor:
        gathered.append(len(rows))
        return original(rows, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "embedding_bag", watched)
    model, token = small_bdh(std=0.3).eval(), torch.zeros(1, 1, dtype=torch.long)
    logits_after(model, token, [1])
    assert gathered == [], "half of all neurons are active in a random model"
    with torch.no_grad():
        model.encoder.zero_()
    logits_after(model, token, [1])
    assert gathered == [0] * 6, "twice per layer, of no neuron at all"
    tokens = torch.randint(64, (2, 4))
    expected = parallel(model, tokens)
    assert torch.allclose(logits_after(model, tokens, [1, 1, 1, 1]), expected, atol=1e-6)


def test_a_state_is_as_large_at_any_position_and_precise_at_a_million() -> None:
    model = small_bdh(std=0.3).double().eval()
    tokens = torch.randint(64, (1, 5)).unbind(1)
    near, far = model.init_cache(1), model.init_cache(1)
    size = near.sums.numel()
    far.position = 1_000_000
    far.rotated_to.fill_(far.position)
    first = [model.prefill_or_decode(token[None], near) for token in tokens]
    far.rotated_to.fill_(0)  # the same empty sums, met a million tokens from their frame
    second = [model.prefill_or_decode(token[None], far) for token in tokens]
    assert near.sums.numel() == far.sums.numel() == size
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cast", [True, False], ids=["bfloat16 weights", "autocast"])
def test_states_work_in_bfloat16_and_stay_float32(fraction: float, cast: bool) -> None:
    model = small_bdh(std=0.3).eval()
    tokens = torch.randint(64, (2, 9))
    expected = logits_after(model, tokens, [5, 1, 1, 2])
    model = model.bfloat16() if cast else model
    with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
        logits = logits_after(model, tokens, [5, 1, 1, 2]).float()
    assert model.init_cache(1).sums.dtype == torch.float32
    assert (logits - expected).norm() < 0.1 * expected.norm()


def test_generation_keeps_no_gradient_and_draws_nothing() -> None:
    model = small_bdh(dropout=0.1).train()
    before = torch.get_rng_state()
    tokens = torch.randint(64, (1, 4), generator=torch.Generator())
    logits = logits_after(model, tokens, [2, 1, 1])
    assert not logits.requires_grad
    assert torch.equal(before, torch.get_rng_state())
