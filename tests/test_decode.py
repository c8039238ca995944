"""Drawing tokens: the limits of temperature, top-k and top-p, and reproducibility."""

from __future__ import annotations

from itertools import islice

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.decode import Sampling, draw, generate


class NextLetter(nn.Module):
    """Predicts the successor of the last token, and remembers how much context it saw."""

    longest = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return nn.functional.one_hot((tokens + 1) % 10, 10).float() * 50


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


def test_generation_is_endless_and_sees_only_the_context() -> None:
    model = NextLetter()
    tokens = list(islice(generate(model, torch.tensor([[3]]), Sampling(), context=4), 25))
    assert [token.item() for token in tokens] == [(4 + i) % 10 for i in range(25)]
    assert model.longest == 4


def test_equal_generators_give_equal_text() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 10))
    drawn = [
        torch.stack(
            list(
                islice(
                    generate(
                        model, torch.tensor([[3]]), Sampling(), 4, torch.Generator().manual_seed(7)
                    ),
                    20,
                )
            )
        )
        for _ in range(2)
    ]
    assert torch.equal(drawn[0], drawn[1])
