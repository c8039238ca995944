"""CUDA graphs: what is recorded computes what the same functions compute when they are called."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from config import LowPrecisionConfig
from data.loading.packing import document_ids
from engine import graphed_step
from engine.graphed_step import GraphedStep
from engine.hardware.cuda_graph import record_graph
from engine.loss import next_token_loss
from engine.precision.precision import Precision, round_linear_weights
from model import LanguageModel, build_model
from model.generate import RecordedDecoder, Sampling, generate
from tests.gpu.devices import DEVICE, ON_CUDA, gpu_tests
from tests.model.transformers import config
from tests.recorded import record_operators

pytestmark = gpu_tests
TOKENS = 48
each_model = pytest.mark.parametrize("name", ["bdh", "gpt", "llama"])
documents = partial(document_ids, separator=0)


record = record_graph if ON_CUDA else record_operators


def model_of(name: str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    values: dict[str, Any] = {"n_embd": 64, "n_head": 4, **options}
    if name == "bdh":
        values["mlp_internal_dim_multiplier"] = 16
    run = config(name, **values)
    object.__setattr__(run.training, "block_size", 128)
    return build_model(run).to(DEVICE)


def low_precision(dtype: str) -> LowPrecisionConfig:
    options: Any = {"compute_dtype": dtype, "use_4bit": False}
    return LowPrecisionConfig(**options)


def steps_of(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, dtype: str) -> GraphedStep:
    monkeypatch.setattr(graphed_step, "record_graph", record)
    return GraphedStep(model, Precision(low_precision(dtype), DEVICE), (2, TOKENS + 1), documents)


def gradients(model: LanguageModel) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)  # as the optimizer does after each step
    return found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@each_model
def test_recorded_steps_add_up_the_gradients_of_others(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled and not ON_CUDA:
        pytest.skip("compiles for a GPU")
    model = model_of(name)
    rows = torch.randint(256, (3, 2, TOKENS + 1), dtype=torch.uint8)
    expected = []
    for pair in (rows[:2], rows[1:]):
        for each in pair:
            (next_token_loss(model, each, DEVICE, documents) / 90).backward()  # type: ignore[no-untyped-call]  # torch
        expected.append(gradients(model))
    if compiled:
        model.compile()
    step = steps_of(model, monkeypatch, "float32")
    assert all(p.grad is None for p in model.parameters())
    for pair, wanted in zip((rows[:2], rows[1:]), expected, strict=True):
        for number, each in enumerate(pair):
            step(each, 90, first=number == 0)
        torch.testing.assert_close(gradients(model), wanted, rtol=1e-3, atol=1e-5)


@each_model
def test_each_replay_drops_others_and_equal_generators_drop_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, dropout=0.3)
    rows = torch.randint(256, (2, TOKENS + 1), dtype=torch.uint8)
    step, found = steps_of(model, monkeypatch, "bfloat16"), []
    for _ in range(2):
        torch.manual_seed(7)
        found.append([step(rows, 90, first=True).item() for _ in range(3)])
    assert found[0] == found[1] and len(set(found[0])) == 3


@each_model
def test_what_a_recorded_step_reads_stays_when_other_lengths_come(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    rows = torch.randint(256, (2, TOKENS + 1), dtype=torch.uint8)
    step = steps_of(model, monkeypatch, "float32")
    loss = step(rows, 90, first=True).item()
    for tokens in range(40, 128, 8):  # tables of rope come and go
        with torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.long, device=DEVICE))
    held = [torch.full((2**18,), torch.nan, device=DEVICE) for _ in range(64)]  # in freed memory
    assert step(rows, 90, first=True).item() == loss
    del held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_model
def test_a_recorded_decoder_writes_what_others_write(name: str, dtype: str) -> None:
    model, prompt = model_of(name).eval(), torch.randint(256, (1, 20)).to(DEVICE)
    greedy, written = Sampling(temperature=0.0), []
    with round_linear_weights(model, low_precision(dtype), DEVICE):
        for decoder in (None, RecordedDecoder(model, 2, 32, DEVICE, record)):
            tokens = generate(model, prompt, greedy, (None, None), context=32, decoder=decoder)
            written.append(torch.stack(list(islice(tokens, 60))))
    # A tie of two tokens may fall either way by rounding, and all that follows with it.
    same = (written[0] == written[1]).all(1).long().cumprod(0).sum()
    assert same >= 20
