"""Drawing tokens: the limits of temperature, top-k and top-p, and reproducibility."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import LanguageModel
from model.generate import Sampling, draw, generate


class NextLetter(LanguageModel):
    """Predicts the successor of the last token, and remembers the pieces it was fed."""

    def __init__(self, sharpness: float = 50.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.fed: list[tuple[int, ...]] = []

    def init_cache(self, batch_size: int, max_length: int | None = None) -> None:
        self.fed.append((batch_size,))

    def prefill_or_decode(self, tokens: Tensor, cache: None) -> Tensor:
        self.fed.append(tuple(tokens.shape))
        return F.one_hot((tokens[:, -1] + 1) % 10, 10).float() * self.sharpness


def letters(model: NextLetter, count: int, *seeds: int) -> list[list[int]]:
    """Tokens of each step, for samples drawn with these seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompt = torch.tensor([[1, 2, 3]])
    tokens = generate(model, prompt, Sampling(), generators)
    return [step.tolist() for step in islice(tokens, count)]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [9.0, 1.0, 1.0]])
    assert draw(logits, Sampling(temperature=0.0)).tolist() == [1, 0]


@settings(deadline=None, max_examples=50)
@given(k=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_top_k_never_draws_outside_the_k_likeliest(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 12, generator=generator)
    allowed = logits.topk(min(k, 12)).indices
    for row, token in enumerate(draw(logits, Sampling(top_k=k), generator).tolist()):
        assert token in allowed[row].tolist()


@settings(deadline=None, max_examples=50)
@given(p=st.floats(0.0, 1.0), seed=st.integers(0, 2**31))
def test_top_p_draws_from_the_smallest_set_that_reaches_p(p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 12, generator=generator) * 3
    order = logits.softmax(-1).sort(descending=True)
    reached = (order.values.cumsum(-1) - order.values < p).sum().clamp(min=1)
    allowed = order.indices[0, :reached].tolist()
    assert draw(logits, Sampling(top_p=p), generator).item() in allowed


def test_low_temperature_sharpens() -> None:
    logits = torch.tensor([[1.0, 0.0]]).expand(2000, 2)
    hot, cold = (
        draw(logits, Sampling(temperature=t), torch.Generator().manual_seed(0)).float().mean()
        for t in (10.0, 0.2)
    )
    assert cold < 0.02 and hot > 0.4


def test_generation_feeds_the_prompt_once_and_then_each_token_alone() -> None:
    model = NextLetter()
    assert letters(model, 25, 0, 1) == [[(4 + i) % 10] * 2 for i in range(25)]
    assert model.fed == [(2,), (2, 3), *[(2, 1)] * 24]


def test_with_a_context_it_starts_anew_from_the_last_half() -> None:
    model = NextLetter()
    prompt = torch.tensor([[9, 9, 1, 2, 3]])
    tokens = generate(model, prompt, Sampling(), context=4)
    assert [step.item() for step in islice(tokens, 9)] == [(4 + i) % 10 for i in range(9)]
    assert model.fed[:6] == [(1,), (1, 4), (1,), (1, 2), (1, 1), (1, 1)]
    assert max(shape[1] for shape in model.fed if len(shape) == 2) == 4


@pytest.mark.parametrize("context", [None, 3, 4, 5])
def test_a_model_is_fed_no_more_than_it_can_take(context: int | None) -> None:
    model = NextLetter()
    model.max_context = 4
    prompt = torch.tensor([[9, 9, 1, 2, 3]])
    tokens = generate(model, prompt, Sampling(), context=context)
    assert [step.item() for step in islice(tokens, 9)] == [(4 + i) % 10 for i in range(9)]
    pieces = [shape[1] for shape in model.fed if len(shape) == 2]
    assert pieces[0] == min(context or 4, 4)
    taken = 0
    for shape in model.fed:
        taken = 0 if len(shape) == 1 else taken + shape[1]
        assert taken <= 4


def test_equal_seeds_give_equal_text_whatever_is_drawn_beside_it() -> None:
    alone = [step[0] for step in letters(NextLetter(2.0), 30, 7)]
    together = letters(NextLetter(2.0), 30, 3, 7)
    assert [step[1] for step in together] == alone
    assert [step[0] for step in together] != alone
