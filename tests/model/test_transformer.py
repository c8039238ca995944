"""What GPT and Llama share: kernels of attention, caches, generation, counts, compilation."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig
from model import attention as layers
from model.attention import capacity
from model.generate import Sampling, generate
from model.gpt import GPT
from tests.model.transformers import (
    BLOCK,
    VOCABULARY,
    fed,
    small,
    some_documents,
    step,
)

BOTH = pytest.mark.parametrize("name", ["gpt", "llama"])


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@BOTH
def test_all_kinds_of_attention_agree(name: str, masked: bool) -> None:
    torch.manual_seed(0)
    tokens, documents = torch.randint(VOCABULARY, (3, BLOCK)), some_documents(3, BLOCK)
    model = small(name)
    found = []
    for kind in ("auto", "flex", "math", *(() if masked else ("flash",))):
        model.config = ModelConfig(**{**asdict(model.config), "attention": kind})
        logits = model(tokens, documents if masked else None)
        found.append((logits, *step(model, logits, tokens).values()))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_blocks_of_flex_attention_hide_what_the_boolean_mask_hides(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its definition, which is slow.
    monkeypatch.setattr(layers, "_compiled", lambda function: function)
    documents = some_documents(2, 160) if masked else None
    q, k, v = torch.randn(4, 160, 8).expand(2, 4, 160, 8), *torch.randn(2, 2, 2, 160, 8)
    blocks = layers._block_mask(documents, (2, 160), q.device)
    flex = layers.attention(q, k, v, layers.AttentionMask("flex", is_causal=False, blocks=blocks))
    bias = layers.training_mask("auto", q, (2, 160), documents, 0.0, 16)
    torch.testing.assert_close(flex, layers.attention(q, k, v, bias), rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("attention", ["auto", "math"])
def test_a_document_sees_nothing_of_its_neighbours(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model = small(name, attention=attention)
    tokens = torch.randint(VOCABULARY, (1, 12))
    documents = torch.tensor([[0] * 5 + [7] * 7])
    other = tokens.clone()
    other[:, :5] = 3
    torch.testing.assert_close(model(tokens, documents)[:, 5:], model(other, documents)[:, 5:])
    assert not torch.allclose(model(tokens)[:, 5:], model(other)[:, 5:])


@BOTH
@settings(deadline=None, max_examples=15)
@given(cut=st.integers(1, 11), seed=st.integers(0, 1000))
def test_later_tokens_never_change_earlier_logits(name: str, cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = small(name)
    tokens = torch.randint(VOCABULARY, (1, 12))
    other = torch.cat((tokens[:, :cut], torch.randint(VOCABULARY, (1, 12 - cut))), 1)
    torch.testing.assert_close(model(tokens)[:, :cut], model(other)[:, :cut])


@pytest.mark.parametrize("attention", ["auto", "math"])
@pytest.mark.parametrize("name, options", [("gpt", {"bias": True}), ("llama", {"n_kv_head": 2})])
@settings(deadline=None, max_examples=15)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=9).filter(lambda p: sum(p) <= BLOCK),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_any_pieces_give_the_logits_of_the_whole(
    name: str, options: dict[str, Any], attention: str, pieces: list[int], batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = small(name, attention=attention, **options)
    tokens = torch.randint(VOCABULARY, (batch, sum(pieces)))
    torch.testing.assert_close(fed(model, tokens, pieces), model(tokens)[:, -1].detach())


@BOTH
def test_cached_generation_equals_the_uncached(name: str) -> None:
    torch.manual_seed(0)
    model = small(name).eval()
    text = torch.randint(VOCABULARY, (1, 5))
    drawn = generate(model, text, Sampling(temperature=0.0), (None, None))
    cached = torch.stack(list(islice(drawn, BLOCK - 5)))
    for following in cached:
        expected = model(text)[:, -1].argmax(-1)
        assert following.tolist() == expected.expand(2).tolist()
        text = torch.cat((text, expected[:, None]), 1)


@BOTH
def test_generation_keeps_no_gradient_and_drops_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = small(name, dropout=0.5).train()
    tokens = torch.randint(VOCABULARY, (2, 9))
    before = torch.get_rng_state()
    trained = fed(model, tokens, [4, 1, 4])
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(trained, model.eval()(tokens)[:, -1].detach())


@pytest.mark.parametrize("lowered", [True, False], ids=["bfloat16 weights", "autocast"])
@BOTH
def test_generation_works_in_bfloat16(name: str, lowered: bool) -> None:
    torch.manual_seed(0)
    model = small(name)
    tokens = torch.randint(VOCABULARY, (2, 9))
    expected = fed(model, tokens, [5, 1, 1, 2])
    model = model.bfloat16() if lowered else model
    with torch.autocast("cpu", torch.bfloat16, enabled=not lowered):
        logits = fed(model, tokens, [5, 1, 1, 2]).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()


@BOTH
def test_caches_take_the_memory_they_say_and_grow_rarely(name: str) -> None:
    model = small(name)
    if isinstance(model, GPT):
        model = GPT(model.config, 300)
    state, rooms = model.init_cache(2), set()
    for length in range(1, 281):
        model.prefill_or_decode(torch.zeros(2, 1, dtype=torch.long), state)
        parts = [each for cache in state for each in (cache.keys, cache.values)]
        taken = sum(part.numel() * part.element_size() for part in parts if part is not None)
        assert taken == 2 * model.cache_bytes(length)
        rooms.add(taken)
    assert len(rooms) == 4  # 64, 128, 256, and 300 or 512


def test_a_cache_has_room_for_no_more_than_there_are_positions() -> None:
    assert [capacity(n, 100) for n in (1, 64, 65, 100)] == [64, 64, 100, 100]
    assert capacity(65, None) == 128


@pytest.mark.parametrize(
    "name, options",
    [
        ("gpt", {"bias": True}),
        ("gpt", {"tie_embeddings": False, "mlp_scale_factor": 3}),
        ("llama", {}),
        ("llama", {"n_kv_head": 1, "d_ff": 40}),
    ],
    ids=str,
)
def test_flops_are_those_that_torch_counts(name: str, options: dict[str, Any]) -> None:
    model = small(name, attention="math", **options)
    tokens = torch.randint(VOCABULARY, (2, BLOCK))
    with FlopCounterMode(display=False) as counter:
        step(model, model(tokens), tokens)
    counted = counter.get_total_flops() / tokens.numel()
    assert model.flops_per_token(BLOCK) == pytest.approx(counted, rel=0.01)


def test_dropped_probabilities_keep_their_mean() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    whole = layers.attention(q, k, v, layers.training_mask("math", q, (1, 6), None, 0.0, 4))
    sight = layers.training_mask("auto", q, (1, 6), None, 0.3, 4)
    mean = sum(layers.attention(q, k, v, sight) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, whole, rtol=0, atol=0.06)


def test_causal_attention_makes_no_mask() -> None:
    x = torch.zeros(1)
    assert layers.training_mask("auto", x, (2, 1 << 20), None, 0.0, 64).bias is None
    assert layers.decoding_mask("auto", x, 1, 1 << 20).bias is None
    assert layers.decoding_mask("auto", x, 1 << 20, 1 << 20).bias is None


def test_a_run_is_told_where_attention_is_not_as_asked() -> None:
    def notes(on_cpu: bool, **options: Any) -> list[str]:
        return small("gpt", **{"n_embd": 64, **options}).notes(on_cpu)

    assert notes(True) == notes(False, attention="flex") == notes(True, dropout=0.1) == []
    assert notes(False, attention="flash", dropout=0.1) == []
    assert notes(True, attention="flex") == [
        "model.attention=flex runs on CUDA only; here masked products take its place"
    ]
    assert notes(False, attention="flex", dropout=0.1) == [
        "model.attention=flex has no dropout; with model.dropout=0.1 masked products take its "
        "place in training"
    ]
    assert notes(False, attention="flex", n_embd=32) == [
        "model.attention=flex takes heads of 16 numbers at least, and these have 8; masked "
        "products take its place"
    ]
    assert "has no dropout on a CPU" in notes(True, attention="flash", dropout=0.1)[0]


@pytest.mark.parametrize("kind", ["flex", "auto"])
def test_heads_too_narrow_for_flex_attention_take_the_mask(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    mask = layers.training_mask(kind, torch.zeros(1), (2, 64), torch.ones(2, 64), 0.0, 8)
    assert mask.kernel == "sdpa" and mask.bias is not None


@BOTH
def test_one_batch_is_learned_by_heart(name: str) -> None:
    torch.manual_seed(0)
    model, tokens = small(name, mask="causal_document"), torch.randint(VOCABULARY, (4, 17))
    documents = some_documents(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(tokens[:, :-1], documents[:, :-1])
        targets = tokens[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2


@BOTH
def test_a_transformer_has_no_silent_neurons_to_tell_of(name: str) -> None:
    assert small(name).active_fraction(torch.zeros(1, 3, dtype=torch.long)) == {}


@pytest.mark.slow
@BOTH
def test_compiled_steps_equal_eager_ones_in_few_graphs(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, documents = small(name), some_documents(5, BLOCK)
    tokens = torch.randint(VOCABULARY, (5, BLOCK))
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for batch in (3, 2, 5, 4):
        for numbers in (None, documents[:batch]):
            model.compile(disable=True)
            expected = model(tokens[:batch], numbers)
            gradients = step(model, expected, tokens[:batch])
            model.compile(backend="aot_eager")  # what inductor does with it is torch's to test
            logits = model(tokens[:batch], numbers)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            found = step(model, logits, tokens[:batch])
            torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)
    assert counted["unique_graphs"] - before <= 4
    assert set(model.state_dict()) == set(small(name).state_dict())
