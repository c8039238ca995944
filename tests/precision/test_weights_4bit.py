"""Training for 4 bits: what the parameters hold inside `applied`, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from config import LowPrecisionConfig
from engine.precision import weights_4bit
from engine.precision.tensor_4bit import quantize
from engine.precision.weights_4bit import QuantizedWeights, unique_tensors
from model import LanguageModel
from tests.precision.conftest import NAMES, build, gradients_of, loss_of, weights_of

TOKENS = torch.arange(48).view(2, 24) * 7 % 256
LOW = LowPrecisionConfig()
# Rows of 96, 48 and 20 numbers: no multiples of a block of 64.
ODD: dict[str, dict[str, Any]] = {
    "bdh": {"n_embd": 24, "n_head": 2, "mlp_internal_dim_multiplier": 8},
    "gpt": {"n_embd": 48, "n_head": 2},
    "llama": {"n_embd": 20, "n_head": 2, "d_ff": 50},
}
each_model = pytest.mark.parametrize("name", NAMES)


def odd(name: str) -> LanguageModel:
    return build(name, **ODD[name])


def backward(model: LanguageModel, passes: int = 1) -> dict[str, Tensor]:
    """The gradients, added up over passes."""
    for _ in range(passes):
        torch.autograd.backward(loss_of(model, TOKENS))
    return gradients_of(model)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def rounded(weights: dict[str, Tensor], model: LanguageModel) -> dict[str, Tensor]:
    """The weights, hidden ones rounded one by one."""
    hidden = {id(weight) for weight, _ in model.hidden_weights()}
    return {
        name: quantize(weights[name], "nf4", double=True).dequantize(value.dtype)
        if id(value) in hidden
        else weights[name]
        for name, value in model.named_parameters()
    }


@each_model
def test_inside_hidden_weights_are_rounded_in_place_and_gradients_are_those_at_them(
    name: str,
) -> None:
    model, other = odd(name), odd(name)
    before, places = weights_of(model), {p.data_ptr() for p in model.parameters()}
    other.load_state_dict(rounded(before, model), strict=False)
    expected = backward(other, passes=2)
    quantized = QuantizedWeights(model, LOW)
    with quantized.applied():
        assert_same(weights_of(model), rounded(before, model))
        assert {p.data_ptr() for p in model.parameters()} == places
        assert_same(backward(model, passes=2), expected)  # micro-steps add up
    assert_same(weights_of(model), before)
    torch.optim.SGD(model.parameters(), lr=0.5).step()  # moves the masters
    moved = {own: value.add(expected[own], alpha=-0.5) for own, value in before.items()}
    assert_same(weights_of(model), moved)
    with quantized.applied():
        assert_same(weights_of(model), rounded(moved, model))


def test_the_masters_are_back_after_any_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd("bdh")
    before, weights = weights_of(model), QuantizedWeights(model, LOW)
    with pytest.raises(KeyError, match="inside"), weights.applied():
        raise KeyError("inside")
    assert_same(weights_of(model), before)
    with weights.applied():
        with pytest.raises(AssertionError, match="already"), weights.applied():
            pass
        with pytest.raises(AssertionError, match="packed from masters"):
            weights.packed_tensors()
        assert not torch.equal(model.get_parameter("encoder"), before["encoder"])
    assert_same(weights_of(model), before)
    results = iter([quantize(before["encoder"], "nf4", double=True)])  # then rounding fails
    monkeypatch.setattr(weights_4bit, "quantize", lambda *_: next(results))
    with pytest.raises((StopIteration, RuntimeError)), weights.applied():
        raise AssertionError("never here")
    assert_same(weights_of(model), before)


def test_a_backward_pass_after_it_is_refused() -> None:
    model = odd("gpt")
    with QuantizedWeights(model, LOW).applied():
        loss = loss_of(model, TOKENS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_evaluation_in_inference_mode_leaves_parameters_that_train() -> None:
    model = odd("bdh")
    before, weights = weights_of(model), QuantizedWeights(model, LOW)
    with torch.inference_mode(), weights.applied():
        loss = loss_of(model, TOKENS)
    with weights.applied():
        assert torch.equal(loss_of(model, TOKENS), loss)
        backward(model)
    assert_same(weights_of(model), before)


def test_parameters_in_bfloat16_stay_so() -> None:
    model = odd("gpt").to(torch.bfloat16)
    before = weights_of(model)
    with QuantizedWeights(model, LOW).applied():
        assert_same(weights_of(model), rounded(before, model))
    assert_same(weights_of(model), before)


@pytest.mark.parametrize(
    ("name", "embedding", "head", "expected"),
    [
        ("bdh", True, False, {"embed.weight"}),
        ("bdh", False, True, {"lm_head"}),
        ("llama", True, True, {"embedding.weight", "lm_head.weight"}),
        ("gpt", True, True, {"transformer.wte.weight"}),  # tied: one tensor
    ],
)
def test_options_add_the_embedding_and_the_head(
    name: str, embedding: bool, head: bool, expected: set[str]
) -> None:
    model = odd(name)
    hidden = rounded(weights_of(model), model)
    low = LowPrecisionConfig(quantize_embedding=embedding, quantize_head=head)
    with QuantizedWeights(model, low).applied():
        found = weights_of(model)
    assert {own for own, value in found.items() if not torch.equal(value, hidden[own])} == expected


def test_the_description_counts_what_is_covered() -> None:
    model, both = odd("bdh"), LowPrecisionConfig(quantize_embedding=True, quantize_head=True)
    assert QuantizedWeights(model, LOW).nbytes == 4 * 13_824
    assert QuantizedWeights(model, LOW).description(2400) == (
        "4-bit weights: 3 of 5 tensors, 13,824 of 26,112 parameters "
        "(nf4, double quantization, from step 2400); embedding and head left out"
    )
    plain = LowPrecisionConfig(
        quantization_type="fp4", use_double_quant=False, quantize_embedding=True, quantize_head=True
    )
    assert QuantizedWeights(model, plain).description() == (
        "4-bit weights: 5 of 5 tensors, 26,112 of 26,112 parameters (fp4)"
    )
    low = LowPrecisionConfig(quantize_head=True)
    assert QuantizedWeights(model, low).description().endswith("; embedding left out")
    tied = odd("gpt")
    assert "9 of 15 tensors" in QuantizedWeights(tied, both).description()
    assert list(unique_tensors(tied)) == [name for name, _ in tied.named_parameters()]


@pytest.mark.slow
def test_a_compiled_model_sees_the_rounded_weights_and_is_not_compiled_again() -> None:
    model = odd("gpt")
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


@pytest.mark.slow
def test_gradients_through_ddp_are_the_same(tmp_path: Path) -> None:
    model, other = odd("bdh"), odd("bdh")
    with QuantizedWeights(other, LOW).applied():
        expected = backward(other)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'x'}", rank=0, world_size=1)
    try:
        shared, weights = DistributedDataParallel(model), QuantizedWeights(model, LOW)
        for _ in range(2):
            model.zero_grad()
            with weights.applied():
                torch.autograd.backward(loss_of(shared, TOKENS))
        assert_same(gradients_of(model), expected)
    finally:
        dist.destroy_process_group()
