"""BDH on a GPU against float64 on a CPU: logits and gradients of all ways to compute a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.bdh import BDH, tiling
from model.bdh.tiling import Tiling
from model.generate import Sampling, generate
from tests.gpu.devices import DEVICE, gpu_tests
from tests.model.bdh_reference import documents_of, error, small_bdh

pytestmark = gpu_tests
# Relative errors of logits and gradients: twice those of a CPU, and more in float32, where a neuron
# within a rounding error of zero may be active on one device and not on the other.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.13}


class Case(NamedTuple):
    """A batch of tokens (B, T)."""

    shape: tuple[int, int]
    dropout: float = 0.0
    documents: Tensor | None = None


CASES = {
    "one chunk": Case((2, 64)),
    "dropout": Case((3, 64), dropout=0.25),
    "documents": Case((2, 64), 0.25, documents_of([40, 24], [1, 63])),
    "chunks": Case((2, 600), 0.25, documents_of([250, 50, 299, 1], [600])),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.fixture(autouse=True)
def draws_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the seed of dropout on the CPU: a GPU's generator has other numbers."""
    draw = torch.randint

    def randint(*args: Any, device: torch.device | None = None, **options: Any) -> Tensor:
        return draw(*args, **options).to(device or "cpu")

    monkeypatch.setattr(torch, "randint", randint)


def model_of(case: Case) -> BDH:
    return small_bdh(std=0.15, n_embd=64, n_head=4, mlp_internal_dim_multiplier=16, **drop(case))


def drop(case: Case) -> dict[str, float]:
    return {"dropout": case.dropout}


def outcome(model: BDH, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits and gradients by name; the same dropout on every device and in every format."""
    device, low = model.lm_head.device, dtype is torch.bfloat16
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(64, case.shape, generator=draw).to(device)
    targets = torch.randint(64, case.shape, generator=draw).to(device)
    documents = None if case.documents is None else case.documents.to(device)
    torch.manual_seed(3)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
        logits = model(tokens, documents)
    wide = logits.float() if low else logits
    torch.autograd.backward(F.cross_entropy(wide.flatten(0, 1), targets.flatten()))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == expected.keys()
    errors = {name: error(found[name].cpu(), expected[name]) for name in expected}
    assert {name: e for name, e in errors.items() if not e < limit} == {}


@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16"])
@each_case
def test_eager_steps_equal_those_of_a_cpu_in_float64(case: Case, dtype: torch.dtype) -> None:
    expected = outcome(model_of(case).double(), case, torch.float64)
    found = outcome(model_of(case).to(DEVICE), case, dtype)
    assert_close(found, expected, LIMITS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16"])
@each_case
def test_compiled_steps_equal_those_of_a_cpu_in_float64(case: Case, dtype: torch.dtype) -> None:
    expected = outcome(model_of(case).double(), case, torch.float64)
    model = model_of(case).to(DEVICE)
    model.compile()
    assert_close(outcome(model, case, dtype), expected, LIMITS[dtype])


@pytest.mark.parametrize("buffers", [2**20, 2**19], ids=["sequences", "sequences and heads"])
@each_case
def test_steps_in_groups_equal_those_of_a_cpu_in_float64(
    case: Case, buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence of 64 tokens at a time, and two of its four heads."""
    expected = outcome(model_of(case).double(), case, torch.float64)
    of = Tiling.of
    monkeypatch.setattr(tiling, "_GPU_BUFFERS", buffers)
    monkeypatch.setattr(
        Tiling, "of", lambda tokens, shape, dtype, on_cpu: of(tokens, shape, dtype, False)
    )
    found = outcome(model_of(case).to(DEVICE), case, torch.float32)
    assert_close(found, expected, LIMITS[torch.float32])


@each_case
def test_two_steps_are_equal_bit_for_bit(case: Case) -> None:
    one, other = (outcome(model_of(case).to(DEVICE), case, torch.bfloat16) for _ in range(2))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_generation_continues_as_the_whole_text_would() -> None:
    model = model_of(CASES["one chunk"]).to(DEVICE).eval()
    text = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    drawn = generate(model, text, Sampling(temperature=0.0), (None,))
    for _ in range(8):
        token = next(drawn)
        with torch.inference_mode():
            assert token.item() == model(text)[0, -1].argmax().item()
        text = torch.cat((text, token[:, None].to(DEVICE)), 1)
