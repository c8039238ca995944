"""Training for 4 bits: what the parameters hold inside `applied`, and that nothing else changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from config import Config, LowPrecisionConfig, ModelConfig, TrainingConfig
from engine.precision import weights_4bit as quantized
from engine.precision.tensor_4bit import quantize
from engine.precision.weights_4bit import QuantizedWeights, unique_tensors
from model import LanguageModel, build_model

V = 256
# Shapes with rows of 96 and 48 numbers: no multiples of a block of 64.
MODELS = {
    "bdh": ModelConfig(
        name="bdh", n_layer=2, n_embd=24, n_head=2, mlp_internal_dim_multiplier=8, vocab_size=V
    ),
    "gpt": ModelConfig(name="gpt", n_layer=2, n_embd=48, n_head=2, dropout=0.0, vocab_size=V),
    "llama": ModelConfig(name="llama", n_layer=2, n_embd=20, n_head=2, d_ff=50, vocab_size=V),
}
TOKENS = torch.arange(48).view(2, 24) * 7 % V
LOW = LowPrecisionConfig()


def build(name: str, **options: object) -> LanguageModel:
    torch.manual_seed(0)
    model = replace(MODELS[name], dropout=0.0, **options)  # type: ignore[arg-type]  # any option
    return build_model(Config(model=model, training=TrainingConfig(block_size=32)))


def copies(model: LanguageModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def loss_of(model: nn.Module) -> Tensor:
    logits = model(TOKENS[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())


def hidden(model: LanguageModel) -> set[int]:
    return {id(matrix) for matrix, _ in model.hidden_weights()}


def assert_same(model: LanguageModel, before: dict[str, Tensor]) -> None:
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_inside_the_matrices_and_they_alone_are_rounded(name: str) -> None:
    model = build(name)
    before, places = copies(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    with QuantizedWeights(model, LOW).applied():
        for own, value in model.named_parameters():
            rounded = quantize(before[own], "nf4", double=True).dequantize()
            assert torch.equal(value, rounded if id(value) in hidden(model) else before[own]), own
            assert value.data_ptr() == places[own]


@pytest.mark.parametrize("name", MODELS)
def test_after_it_the_masters_are_back_bit_for_bit(name: str) -> None:
    model = build(name)
    before, weights = copies(model), QuantizedWeights(model, LOW)
    for _ in range(2):
        with weights.applied():
            loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        assert_same(model, before)


def test_an_error_inside_passes_and_the_masters_are_back() -> None:
    model = build("bdh")
    before, weights = copies(model), QuantizedWeights(model, LOW)
    with pytest.raises(KeyError, match="inside"), weights.applied():
        raise KeyError("inside")
    assert_same(model, before)
    with weights.applied():  # and it can be entered again
        pass


def test_where_rounding_fails_half_way_the_masters_are_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("bdh")
    before, weights = copies(model), QuantizedWeights(model, LOW)
    results = iter([quantize(model.get_parameter("encoder"), "nf4", double=True)])
    monkeypatch.setattr(quantized, "quantize", lambda *_: next(results))
    with pytest.raises((StopIteration, RuntimeError)), weights.applied():
        raise AssertionError("never here")
    assert_same(model, before)


def test_entering_twice_is_an_error_that_harms_nothing() -> None:
    model = build("bdh")
    before, weights = copies(model), QuantizedWeights(model, LOW)
    with weights.applied():
        with pytest.raises(AssertionError, match="already"), weights.applied():
            pass
        assert not torch.equal(model.get_parameter("encoder"), before["encoder"])
    assert_same(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_at_the_rounded_weights_and_stay(name: str) -> None:
    model, other = build(name), build(name)
    for value in other.parameters():
        if id(value) in hidden(other):
            value.data = quantize(value.data, "nf4", double=True).dequantize()
    for _ in range(2):  # micro-steps add up
        loss_of(other).backward()  # type: ignore[no-untyped-call]  # torch has no types here
    with QuantizedWeights(model, LOW).applied():
        for _ in range(2):
            loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
    for (own, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad), own


def test_a_backward_pass_after_it_is_refused() -> None:
    model = build("gpt")
    with QuantizedWeights(model, LOW).applied():
        loss = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here


def test_the_optimizer_moves_the_masters() -> None:
    model = build("bdh")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before, weights = copies(model), QuantizedWeights(model, LOW)
    with weights.applied():
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
    optimizer.step()
    for name, value in model.named_parameters():
        assert value.grad is not None
        assert torch.equal(value, before[name].add(value.grad, alpha=-0.5)), name


def test_evaluation_in_inference_mode_leaves_parameters_that_train() -> None:
    model = build("bdh")
    before, weights = copies(model), QuantizedWeights(model, LOW)
    with torch.inference_mode(), weights.applied():
        rounded = loss_of(model)
    with weights.applied():
        assert torch.equal(loss_of(model), rounded)
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
    assert_same(model, before)


def test_parameters_in_bfloat16_stay_so() -> None:
    model = build("gpt").to(torch.bfloat16)
    before = copies(model)
    with QuantizedWeights(model, LOW).applied():
        name = "transformer.h.0.mlp.c_fc.weight"
        expected = quantize(before[name], "nf4", double=True).dequantize(torch.bfloat16)
        assert torch.equal(model.get_parameter(name), expected)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("name", "embedding", "head", "expected"),
    [
        ("bdh", False, False, set()),
        ("bdh", True, False, {"embed.weight"}),
        ("bdh", False, True, {"lm_head"}),
        ("llama", True, True, {"embedding.weight", "lm_head.weight"}),
        ("gpt", True, True, {"transformer.wte.weight"}),
    ],
)
def test_options_add_the_embedding_and_the_head(
    name: str, embedding: bool, head: bool, expected: set[str]
) -> None:
    model = build(name)
    before, rounded = copies(model), set()
    low = LowPrecisionConfig(quantize_embedding=embedding, quantize_head=head)
    with QuantizedWeights(model, low).applied():
        for own, value in model.named_parameters():
            if id(value) not in hidden(model) and not torch.equal(value, before[own]):
                rounded.add(own)
    assert rounded == expected


def test_the_line_counts_what_is_covered() -> None:
    model = build("bdh")
    assert QuantizedWeights(model, LOW).description(2400) == (
        "4-bit weights: 3 of 5 tensors, 13,824 of 26,112 parameters "
        "(nf4, double quantization, from step 2400); embedding and head left out"
    )
    low = LowPrecisionConfig(
        quantization_type="fp4", use_double_quant=False, quantize_embedding=True, quantize_head=True
    )
    assert QuantizedWeights(model, low).description() == (
        "4-bit weights: 5 of 5 tensors, 26,112 of 26,112 parameters (fp4)"
    )
    low = LowPrecisionConfig(quantize_head=True)
    assert QuantizedWeights(model, low).description().endswith("; embedding left out")
    assert QuantizedWeights(model, LOW).nbytes == 4 * 13_824


def test_a_tied_embedding_is_one_tensor() -> None:
    low = LowPrecisionConfig(quantize_embedding=True, quantize_head=True)
    model = build("gpt")
    assert "9 of 15 tensors" in QuantizedWeights(model, low).description()
    assert list(unique_tensors(model)) == [name for name, _ in model.named_parameters()]


def test_masters_alone_are_packed() -> None:
    weights = QuantizedWeights(build("bdh"), LOW)
    with weights.applied(), pytest.raises(AssertionError, match="packed from masters"):
        weights.packed_tensors()


def test_a_compiled_model_sees_the_rounded_weights_and_is_not_compiled_again() -> None:
    model = build("gpt")
    weights, counter = QuantizedWeights(model, LOW), CompileCounter()
    step = torch.compile(model, backend=counter)
    outside = step(TOKENS).detach()
    frames = counter.frame_count
    for _ in range(2):
        with weights.applied():
            assert torch.equal(step(TOKENS), model(TOKENS))
            assert not torch.equal(step(TOKENS), outside)
    assert torch.equal(step(TOKENS), outside)
    assert counter.frame_count == frames > 0
    torch.compiler.reset()


@contextlib.contextmanager
def one_process(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_gradients_through_ddp_are_the_same(tmp_path: Path) -> None:
    model, other = build("bdh"), build("bdh")
    with QuantizedWeights(other, LOW).applied():
        loss_of(other).backward()  # type: ignore[no-untyped-call]  # torch has no types here
    with one_process(tmp_path):
        shared, weights = DistributedDataParallel(model), QuantizedWeights(model, LOW)
        for _ in range(2):
            model.zero_grad()
            with weights.applied():
                loss_of(shared).backward()  # type: ignore[no-untyped-call]  # as above
        for (own, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            assert torch.equal(mine.grad, theirs.grad), own
