"""BDH's tiled kernels against whole-tensor formulas: values, gradients, dropout, memory.

B batch, T tokens, D width, H heads, N neurons per head; weights in the project's own layout.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import BDHConfig
from engine.hardware.device import compiler_for
from model.bdh.elementwise import EAGER, Keep, Passes, compiled
from model.bdh.fused_layers import Call, Weights, bdh_layers
from model.bdh.model import BDH
from model.bdh.tiling import Tiling, rope_frequencies, rotation, tile_borders

CPU = torch.device("cpu")
NAMES = ("output", "x", "encoder", "encoder_v", "decoder")  # gradients but for the first
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""x (B, T, D), encoder (H, D, N), encoder_v (H, D, N), decoder (H * N, D)."""


def reference(
    inputs: Inputs,
    n_layer: int,
    documents: Tensor | None = None,
    kept: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The definition on whole tensors; kept (n_layer, H, B, T, N) is dropout's mask.

    Under autocast it rounds where the public reference does.
    """
    x, encoder, encoder_v, decoder = inputs
    (B, T, D), (H, _, N) = x.shape, encoder.shape
    phases = torch.outer(torch.arange(T).double(), rope_frequencies(N).double()) % 1
    cos, sin = (2 * math.pi * phases).cos().to(x.dtype), (2 * math.pi * phases).sin().to(x.dtype)
    cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    seen = torch.ones(T, T, dtype=torch.bool).tril(-1)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    for number in range(n_layer):
        s = (x @ encoder[:, None]).relu()  # (H, B, T, N)
        first, second = s.chunk(2, -1)
        r = (s * cos).to(s.dtype) + (torch.cat((-second, first), -1) * sin).to(s.dtype)
        a = F.layer_norm(((r @ r.mT) * seen) @ x, (D,))
        z = s * (a @ encoder_v[:, None]).relu()
        if kept is not None:
            z = z * kept[number] / (1 - dropout)
        y = z.permute(1, 2, 0, 3).reshape(B, T, H * N) @ decoder
        x = F.layer_norm(x + F.layer_norm(y, (D,)), (D,))
    return x


def problem(shape: Sequence[int] = (2, 12, 6, 4, 20), seed: int = 0, std: float = 0.4) -> Inputs:
    """Float64 inputs of B, T, D, H, N."""
    B, T, D, H, N = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = ((B, T, D), (H, D, N), (H, D, N), (H * N, D))
    x, *weights = (torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)
    return x, std * weights[0], std * weights[1], std * weights[2]


def call_for(inputs: Inputs, tiling: Tiling, dtype: torch.dtype | None = None, **rest: Any) -> Call:
    frequencies = rope_frequencies(inputs[1].shape[2])
    angles = rotation(frequencies, tiling.chunk, dtype or inputs[0].dtype, CPU)
    defaults: dict[str, Any] = {"n_layer": 2, "dropout": 0.0, "passes": EAGER}
    return Call(rotation=angles, tiling=tiling, **{**defaults, **rest})


def tiled(inputs: Inputs, tiling: Tiling, seed: int = 0, **rest: Any) -> Tensor:
    """The kernels, drawing dropout from this seed."""
    torch.manual_seed(seed)
    weights: Weights = inputs[1:]
    result: Tensor = bdh_layers(inputs[0], weights, call_for(inputs, tiling, **rest))
    return result


def outcome(layers: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients, of a fixed random direction of the output."""
    x, encoder, encoder_v, decoder = (t.detach().clone().requires_grad_() for t in inputs)
    output = layers((x, encoder, encoder_v, decoder))
    draw = torch.Generator().manual_seed(99)
    direction = torch.randn(output.shape, generator=draw, dtype=torch.float64).to(output.dtype)
    gradients = torch.autograd.grad(output, (x, encoder, encoder_v, decoder), direction)
    return dict(zip(NAMES, (output.detach(), *gradients), strict=True))


def run(inputs: Inputs, tiling: Tiling, seed: int = 0, **rest: Any) -> dict[str, Tensor]:
    return outcome(lambda i: tiled(i, tiling, seed, **rest), inputs)


def truth(inputs: Inputs, n_layer: int = 2, **rest: Any) -> dict[str, Tensor]:
    return outcome(lambda i: reference(i, n_layer, **rest), inputs)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, floor: float = 0.0
) -> None:
    """By relative norm; norms count as `floor` at least."""
    for name, value in expected.items():
        difference = float((found[name].double() - value.double()).norm())
        assert difference <= tolerance * max(float(value.double().norm()), floor), name


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    x, encoder, encoder_v, decoder = (t.to(dtype) for t in inputs)
    return x, encoder, encoder_v, decoder


def documents_of(*rows: Sequence[int]) -> Tensor:
    """(B, T) document numbers from the documents' lengths."""
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    return torch.stack(numbers)


def spying(masks: list[Tensor]) -> Passes:
    """Passes that note, at each call of `gate`, which elements it keeps."""

    def gate(u: Tensor, v: Tensor, keep: Keep | None) -> None:
        mask = torch.ones_like(v)
        EAGER.gate(torch.ones_like(u), mask, keep)
        masks.append(mask)
        EAGER.gate(u, v, keep)

    return EAGER._replace(gate=gate)


def kept_by(inputs: Inputs, seed: int, dropout: float, n_layer: int = 2) -> Tensor:
    """Dropout's mask, (n_layer, H, B, T, N), observed in a run of one tile and one chunk."""
    masks: list[Tensor] = []
    T, H, N = inputs[0].shape[1], inputs[1].shape[0], inputs[1].shape[2]
    whole = Tiling(T, H, N // 2, True)
    tiled(inputs, whole, seed, n_layer=n_layer, dropout=dropout, passes=spying(masks))
    return torch.stack(masks)


# Parity


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("group, pairs", [(1, 3), (2, 10), (4, 4), (4, 1)])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12])
def test_values_and_gradients_equal_the_definition_at_every_chunk_border(
    length: int, group: int, pairs: int, keep: bool
) -> None:
    inputs = problem((2, length, 6, 4, 20))
    found = run(inputs, Tiling(4, group, pairs, keep))
    assert_equal(found, truth(inputs), 1e-10)


@pytest.mark.parametrize("n_layer", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 3, 1, 2), (1, 7, 5, 1, 14), (3, 9, 7, 3, 6)])
def test_values_and_gradients_of_one_chunk_equal_the_definition(
    shape: tuple[int, ...], n_layer: int
) -> None:
    inputs = problem(shape)
    tiling = Tiling(shape[1], 1, 2, False)
    found = run(inputs, tiling, n_layer=n_layer)
    assert_equal(found, truth(inputs, n_layer), 1e-10)


@pytest.mark.parametrize("chunk", [8, 17, 33])
@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("group, pairs, keep", [(1, 5, False), (3, 32, True)])
def test_float32_stays_within_its_rounding(
    n_layer: int, chunk: int, group: int, pairs: int, keep: bool
) -> None:
    inputs = problem((2, 33, 24, 3, 64))
    expected = truth(inputs, n_layer)
    layers = Tiling(chunk, group, pairs, keep)
    found = run(cast(inputs, torch.float32), layers, n_layer=n_layer)
    assert found["output"].dtype == torch.float32
    assert_equal(found, expected, 1e-5)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Inputs, Tiling, dict[str, Any], int]:
    """Inputs, tiling, the rest of a call, and a seed."""
    B, T, D, H = (draw(st.integers(*r)) for r in ((1, 3), (1, 14), (3, 7), (1, 4)))
    N = 2 * draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**32))
    tiling = Tiling(
        chunk=draw(st.integers(1, T + 2)),
        group=draw(st.sampled_from([g for g in range(1, H + 1) if H % g == 0])),
        pairs=draw(st.integers(1, N)),
        keep=draw(st.booleans()),
    )
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(seed))
    share = draw(st.sampled_from([None, 0.1, 0.5, 1.0]))
    rest = {
        "n_layer": draw(st.integers(1, 3)),
        "documents": None if share is None else (begins < share).cumsum(1),
        "dropout": draw(st.sampled_from([0.0, 0.375])),
    }
    return problem((B, T, D, H, N), seed), tiling, rest, seed


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_any_shape_tiling_documents_and_dropout_equal_the_definition(
    case: tuple[Inputs, Tiling, dict[str, Any], int],
) -> None:
    inputs, tiling, rest, seed = case
    kept = kept_by(inputs, seed, rest["dropout"], rest["n_layer"])
    expected = truth(inputs, kept=kept, **rest)
    # Where one neuron alone is active its gradients cancel to nothing, up to the rounding of 1.
    assert_equal(run(inputs, tiling, seed, **rest), expected, 1e-9, 1.0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("documents", [None, documents_of([3, 2])])
@pytest.mark.parametrize("chunk, keep", [(5, True), (2, False)])
def test_gradients_are_those_of_finite_differences(
    chunk: int, keep: bool, documents: Tensor | None, dropout: float
) -> None:
    inputs = problem((1, 5, 3, 2, 4), seed=3)
    for tensor in inputs:
        tensor.requires_grad_()
    rest = {"documents": documents, "dropout": dropout}
    assert torch.autograd.gradcheck(
        lambda *i: tiled(i, Tiling(chunk, 1, 1, keep), 5, **rest), inputs, fast_mode=True
    )


def test_the_whole_model_cuts_long_sequences_and_equals_the_definition() -> None:
    torch.manual_seed(0)
    model = BDH(small_config()).double()
    tokens, T = torch.randint(32, (1, 600)), 600
    documents = documents_of([250, 50, 299, 1])
    assert Tiling.of((1, T), (2, 8, 16), torch.float64, on_cpu=True).chunk < T
    inputs = (model.embed.weight, model.encoder, model.encoder_v, model.decoder)

    def definition(weights: Inputs) -> Tensor:
        x = F.layer_norm(F.embedding(tokens, weights[0]), (8,))
        return reference((x, *weights[1:]), 2, documents) @ model.lm_head

    def own(weights: Inputs) -> Tensor:
        names = ("embed.weight", "encoder", "encoder_v", "decoder")
        state = dict(zip(names, weights, strict=True))
        result: Tensor = torch.func.functional_call(model, state, (tokens, documents))
        return result

    assert_equal(outcome(own, inputs), outcome(definition, inputs), 1e-10)


def small_config(**changes: Any) -> BDHConfig:
    values: dict[str, Any] = {
        "n_layer": 2,
        "n_embd": 8,
        "n_head": 2,
        "dropout": 0.0,
        "mlp_internal_dim_multiplier": 4,
        "vocab_size": 32,
    }
    return BDHConfig(**{**values, **changes})


# Documents


@pytest.mark.parametrize("chunk", [14, 4])
@pytest.mark.parametrize(
    "lengths",
    [[4, 4, 4, 2], [8, 6], [14], [1] * 14, [3, 10, 1], [5, 1, 1, 1, 6], [2, 2, 1, 3, 4, 2]],
    ids=str,
)
def test_documents_equal_the_definition_with_their_mask(lengths: list[int], chunk: int) -> None:
    inputs = problem((2, 14, 6, 2, 12))
    documents = documents_of(lengths, lengths[::-1])  # borders of a row of its own
    expected = truth(inputs, documents=documents)
    found = run(inputs, Tiling(chunk, 1, 4, False), documents=documents)
    assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize("chunk", [14, 4])
def test_tokens_of_other_documents_change_nothing(chunk: int) -> None:
    inputs = problem((1, 14, 6, 2, 12))
    documents = documents_of([5, 6, 3])
    changed = inputs[0].clone()
    changed[:, :5] = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    changed[:, 11:] *= -1
    tiling = Tiling(chunk, 2, 3, True)
    before, after = (
        tiled((x, *inputs[1:]), tiling, documents=documents) for x in (inputs[0], changed)
    )
    assert torch.allclose(before[:, 5:11], after[:, 5:11], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, :5], after[:, :5], rtol=0, atol=1e-2)


@pytest.mark.parametrize("chunk", [14, 4])
def test_a_document_is_computed_as_if_it_stood_alone(chunk: int) -> None:
    inputs = problem((1, 14, 6, 2, 12))
    packed = tiled(inputs, Tiling(chunk, 1, 6, True), documents=documents_of([3, 9, 2]))
    alone = tiled((inputs[0][:, 3:12], *inputs[1:]), Tiling(9, 1, 6, True))
    assert torch.allclose(packed[:, 3:12], alone, rtol=0, atol=1e-10)


# Dropout


@pytest.mark.parametrize("dropout", [0.125, 0.5, 0.875])  # a mask has a share of 2**32
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(12, 4, 10, True),
        Tiling(12, 1, 3, False),
        Tiling(5, 2, 4, True),
        Tiling(1, 4, 1, False),
    ],
    ids=str,
)
def test_dropout_equals_the_definition_with_the_mask_of_any_other_tiling(
    tiling: Tiling, dropout: float
) -> None:
    inputs = problem()
    kept = kept_by(inputs, 7, dropout)
    expected = truth(inputs, kept=kept, dropout=dropout)
    found = run(inputs, tiling, 7, dropout=dropout)
    assert_equal(found, expected, 1e-10)


def test_dropout_is_scaled_so_that_outputs_keep_their_mean() -> None:
    """With a decoder so small that norms are linear in it; elsewhere they hide the scale."""
    *some, decoder = problem((2, 12, 6, 2, 128))
    inputs = (some[0], some[1], some[2], 1e-7 * decoder)
    without = tiled((*inputs[:3], 0 * decoder), Tiling(12, 2, 64, True), n_layer=1)
    plain = tiled(inputs, Tiling(12, 2, 64, True), n_layer=1) - without
    mean = torch.stack(
        [
            tiled(inputs, Tiling(12, 2, 64, True), seed, n_layer=1, dropout=0.5) - without
            for seed in range(100)
        ]
    ).mean(0)
    assert float((mean * plain).sum() / plain.square().sum()) == pytest.approx(1, abs=0.02)
    assert error(mean, plain) < 0.2


def test_dropout_with_a_scale_that_norms_do_not_hide_equals_the_definition() -> None:
    x, encoder, encoder_v, decoder = problem()
    inputs = (x, encoder, encoder_v, 1e-5 * decoder)
    kept = kept_by(inputs, 7, 0.5)
    expected = truth(inputs, kept=kept, dropout=0.5)
    found = run(inputs, Tiling(5, 2, 3, False), 7, dropout=0.5)
    assert_equal(found, expected, 1e-10)


def assert_chance(signs: Tensor) -> None:
    """No two rows of (rows, columns), of zero mean and unit variance, agree beyond chance."""
    products = (signs @ signs.T / math.sqrt(signs.shape[1])).tril(-1)
    scores = products[torch.ones_like(products, dtype=torch.bool).tril(-1)]
    count = len(scores)
    assert abs(float(scores.mean())) < 5 / math.sqrt(count)
    assert abs(float(scores.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert float(scores.abs().max()) < 6.5


def standard_mask(dropout: float, seed: int) -> Tensor:
    """Of 2 layers, 2 heads, 2 sequences, 128 tokens, 256 neurons; of zero mean, unit variance."""
    inputs = problem((2, 128, 4, 2, 256))
    kept = kept_by(inputs, seed, dropout)
    return (kept - (1 - dropout)) / math.sqrt(dropout * (1 - dropout))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_without_correlation_of_tokens_or_neurons(
    dropout: float, seed: int
) -> None:
    mask = standard_mask(dropout, seed)  # (layer, head, sequence, token, neuron)
    assert abs(float(mask.mean())) < 5 / math.sqrt(mask.numel())
    assert_chance(mask.permute(0, 2, 3, 1, 4).flatten(0, 2).flatten(1))  # tokens of all layers
    assert_chance(mask.permute(1, 4, 0, 2, 3).flatten(0, 1).flatten(1))  # neurons of all heads


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["layer", "head", "sequence"])
def test_dropout_differs_by_layer_head_and_sequence(dim: int) -> None:
    first, second = standard_mask(0.5, 0).unbind(dim)
    assert abs(float((first * second).mean())) < 5 / math.sqrt(first.numel())


def test_dropout_differs_by_seed() -> None:
    first, second = standard_mask(0.5, 0), standard_mask(0.5, 1)
    assert abs(float((first * second).mean())) < 5 / math.sqrt(first.numel())


@pytest.mark.parametrize("training, drawn", [(True, 1), (False, 0)])
def test_training_draws_one_number_and_evaluation_none(training: bool, drawn: int) -> None:
    model = BDH(small_config(dropout=0.2)).train(training)
    torch.manual_seed(4)
    for _ in range(drawn):
        torch.randint(2**62, ())
    expected = torch.get_rng_state()
    torch.manual_seed(4)
    torch.autograd.backward(model(torch.zeros(2, 9, dtype=torch.long)).sum())
    assert torch.equal(torch.get_rng_state(), expected)


def test_training_without_dropout_draws_nothing() -> None:
    model = BDH(small_config())
    before = torch.get_rng_state()
    torch.autograd.backward(model(torch.zeros(2, 9, dtype=torch.long)).sum())
    assert torch.equal(torch.get_rng_state(), before)


# bfloat16


@pytest.mark.parametrize(
    "tiling",
    [Tiling(128, 1, 256, True), Tiling(128, 4, 100, False), Tiling(32, 1, 128, False)],
    ids=str,
)
def test_bfloat16_errs_no_more_than_a_plain_implementation(tiling: Tiling) -> None:
    own, plain = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)

    def under_autocast(layers: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
        def rounded(i: Inputs) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return layers(i)

        return outcome(rounded, cast(inputs, torch.float32))

    for seed in range(3):
        inputs = problem((1, 128, 64, 4, 512), seed, std=0.05)
        exact = truth(inputs)
        a = under_autocast(lambda i: tiled(i, tiling, dtype=torch.bfloat16), inputs)
        b = under_autocast(lambda i: reference(i, 2), inputs)
        for name in NAMES:
            own[name] += error(a[name], exact[name]) / 3
            plain[name] += error(b[name], exact[name]) / 3
    assert {name: own[name] for name in NAMES if own[name] > 1.2 * plain[name]} == {}, plain


# Compiled passes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import
def test_compiled_passes_equal_the_eager_ones() -> None:
    """One sequence and two: their views of chunks are laid out in different ways."""
    if compiler_for(CPU) is None:
        pytest.skip("no C++ compiler")
    passes, tiling = compiled(), Tiling(4, 1, 8, False)
    documents = documents_of([4, 5, 3], [2, 9, 1])
    for batch, dtype, tolerance in ((1, torch.float32, 1e-5), (2, torch.bfloat16, 5e-2)):
        inputs = cast(problem((batch, 12, 16, 2, 32)), torch.float32)
        rest = {"dtype": dtype, "documents": documents[:batch], "dropout": 0.3}
        expected = run(inputs, tiling, 3, **rest)
        assert_equal(run(inputs, tiling, 3, passes=passes, **rest), expected, tolerance)


# Autograd's manners


def gradients_of(model: BDH, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Logits and the gradient of every parameter."""
    logits = forward(torch.arange(18).view(2, 9))
    model.zero_grad()
    torch.autograd.backward(logits.square().mean())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # inside torch.compile
def test_a_model_compiled_by_its_user_computes_the_same() -> None:
    torch.manual_seed(0)
    model = BDH(small_config())
    expected = gradients_of(model, model)
    found = gradients_of(model, torch.compile(model, backend="eager"))
    torch.compiler.reset()
    assert len(found) == 6
    assert_equal(found, expected, 1e-6)


def test_two_backward_passes_add_up() -> None:
    torch.manual_seed(0)
    model = BDH(small_config()).double()
    halves = torch.randint(32, (2, 2, 9))
    expected = torch.autograd.grad(
        model(halves.flatten(0, 1)).square().sum(), [*model.parameters()]
    )
    for half in halves:
        torch.autograd.backward(model(half).square().sum())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert error(parameter.grad, gradient) < 1e-12


def test_the_same_graph_goes_backward_once() -> None:
    inputs = problem()
    for tensor in inputs:
        tensor.requires_grad_()
    output = tiled(inputs, Tiling(5, 2, 3, True)).sum()
    torch.autograd.backward(output)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(output)


@pytest.mark.parametrize("keep", [True, False])
def test_a_kept_graph_goes_backward_twice_alike(keep: bool) -> None:
    inputs = problem()
    for tensor in inputs:
        tensor.requires_grad_()
    output = tiled(inputs, Tiling(5, 2, 3, keep), dropout=0.5).square().sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    second = torch.autograd.grad(output, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_graphs_at_once_do_not_disturb_each_other() -> None:
    """Buffers are a run's own, though calls and weights are shared."""
    inputs = problem()
    tiling = Tiling(5, 2, 3, True)
    expected = run(inputs, tiling)

    def beside_another(i: Inputs) -> Tensor:
        output = tiled(i, tiling)
        torch.autograd.backward(tiled((i[0].flip(1), *i[1:]), tiling).sum())
        return output

    assert_equal(outcome(beside_another, inputs), expected, 0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(context: Callable[[], Any]) -> None:
    inputs = problem()
    for tensor in inputs:
        tensor.requires_grad_()
    expected = tiled(inputs, Tiling(5, 2, 3, False))
    with context():
        found = tiled(inputs, Tiling(5, 2, 3, False))
    assert expected.requires_grad and not found.requires_grad
    assert torch.equal(found, expected)


@pytest.mark.parametrize("wanted", range(4), ids=NAMES[1:])
def test_one_input_alone_may_need_a_gradient(wanted: int) -> None:
    inputs = problem()
    expected = truth(inputs)
    inputs[wanted].requires_grad_()
    output = tiled(inputs, Tiling(5, 2, 3, False))
    draw = torch.Generator().manual_seed(99)
    direction = torch.randn(output.shape, generator=draw, dtype=torch.float64)
    torch.autograd.backward(output, direction)
    for name, tensor in zip(NAMES[1:], inputs, strict=True):
        assert (tensor.grad is None) == (name != NAMES[1 + wanted])
    found = inputs[wanted].grad
    assert found is not None
    assert error(found, expected[NAMES[1 + wanted]]) < 1e-10


def test_inputs_are_left_as_they_were() -> None:
    inputs = problem()
    before = [t.clone() for t in inputs]
    run(inputs, Tiling(5, 4, 10, True))
    with torch.no_grad():
        tiled(inputs, Tiling(12, 4, 10, True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


# States


@pytest.mark.parametrize("group, pairs", [(1, 10), (2, 3), (4, 10)])
@pytest.mark.parametrize(
    "chunk, lengths",
    [(4, [4, 8]), (4, [8, 4]), (3, [3, 3, 6]), (1, [1] * 12), (5, [10, 2])],
    ids=str,
)
def test_a_sequence_in_parts_equals_the_whole(
    chunk: int, lengths: list[int], group: int, pairs: int
) -> None:
    """All parts but the last are whole chunks."""
    inputs = problem()
    states = torch.zeros(2, 4, 2, 2, 10, 6, dtype=torch.float64)
    parts = [
        tiled((part, *inputs[1:]), Tiling(chunk, group, pairs, False), states=states)
        for part in torch.split(inputs[0], lengths, 1)
    ]
    assert error(torch.cat(parts, 1), reference(inputs, 2)) < 1e-10


def test_a_document_goes_on_in_the_next_part() -> None:
    inputs = problem()
    documents = documents_of([6, 6], [3, 9])
    states = torch.zeros(2, 4, 2, 2, 10, 6, dtype=torch.float64)
    parts = [
        tiled((part, *inputs[1:]), Tiling(4, 1, 3, False), states=states, documents=numbers)
        for part, numbers in zip(
            torch.split(inputs[0], [4, 8], 1), torch.split(documents, [4, 8], 1), strict=True
        )
    ]
    assert error(torch.cat(parts, 1), reference(inputs, 2, documents)) < 1e-10


def test_chunks_of_another_length_go_on_from_the_same_state() -> None:
    inputs = problem()
    states = torch.zeros(2, 4, 2, 2, 10, 6, dtype=torch.float64)
    prompt = tiled((inputs[0][:, :8], *inputs[1:]), Tiling(8, 4, 10, True), states=states)
    tokens = [
        tiled((token, *inputs[1:]), Tiling(1, 1, 4, False), states=states)
        for token in torch.split(inputs[0][:, 8:], 1, 1)
    ]
    assert error(torch.cat((prompt, *tokens), 1), reference(inputs, 2)) < 1e-10


# Length and memory


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations return, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            self.largest = max(self.largest, size)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


def tiny_step(length: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = small_config(n_layer=1, n_embd=16, n_head=1, mlp_internal_dim_multiplier=2)
    model = BDH(config)
    tokens = torch.randint(32, (1, length + 1))
    loss = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
    torch.autograd.backward(loss)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_over_65536_tokens_has_finite_gradients() -> None:
    gradients = tiny_step(65_536)
    assert len(gradients) == 5
    assert all(g.isfinite().all() and g.any() for g in gradients.values())


def test_memory_grows_linearly_with_the_length() -> None:
    peaks = []
    for length in (8192, 16_384):
        with Memory() as memory:
            tiny_step(length)
        peaks.append(memory.peak)
    assert 1.8 < peaks[1] / peaks[0] < 2.2


def test_long_sequences_in_chunks_equal_one_square() -> None:
    inputs = problem((1, 2048, 16, 1, 32))
    assert_equal(
        run(inputs, Tiling(256, 1, 16, True)), run(inputs, Tiling(2048, 1, 16, True)), 1e-10
    )


def test_long_sequences_in_float32_equal_one_square_within_its_rounding() -> None:
    """The output alone: a neuron at the edge of being active jumps in the gradients."""
    inputs = cast(problem((1, 2048, 16, 1, 32)), torch.float32)
    square = tiled(inputs, Tiling(2048, 1, 16, True))
    assert error(tiled(inputs, Tiling(256, 1, 16, True)), square) < 1e-4


@pytest.mark.parametrize("chunk", [256, 64])
def test_no_tensor_is_as_wide_as_all_neurons(chunk: int) -> None:
    shape = (2, 256, 32, 4, 1024)
    B, T, _, H, N = shape
    inputs = cast(problem(shape), torch.float32)
    with Memory() as memory:
        run(inputs, Tiling(chunk, 1, 128, False), dropout=0.1)
    assert memory.largest < B * T * H * N * 4 / 4  # bytes of float32


def test_without_gradients_layers_leave_nothing_behind() -> None:
    inputs = cast(problem((1, 128, 8, 2, 16)), torch.float32)
    for tensor in inputs:
        tensor.requires_grad_()
    peaks = []
    for n_layer in (1, 8):
        with torch.no_grad(), Memory() as memory:
            tiled(inputs, Tiling(128, 1, 8, False), n_layer=n_layer)
        peaks.append(memory.peak)
    assert peaks[1] < 1.2 * peaks[0]


# Tilings


@settings(deadline=None)
@given(
    batch=st.integers(1, 300),
    length=st.integers(1, 70_000),
    shape=st.tuples(st.integers(1, 8), st.integers(1, 1100), st.integers(1, 20_000)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    on_cpu=st.booleans(),
)
def test_the_tiling_of_any_shape_is_sound(
    batch: int, length: int, shape: tuple[int, int, int], dtype: torch.dtype, on_cpu: bool
) -> None:
    heads, width, half = shape
    tiling = Tiling.of((batch, length), (heads, width, 2 * half), dtype, on_cpu)
    chunks = -(-length // tiling.chunk)
    assert 1 <= tiling.chunk <= max(4 * width, 512)
    assert 0 <= chunks * tiling.chunk - length < 32 * chunks  # padding
    assert 1 <= tiling.pairs <= half
    assert heads % tiling.group == 0
    assert on_cpu or tiling.group == heads


@given(half=st.integers(1, 500), pairs=st.integers(1, 600))
def test_tiles_cover_every_pair_once(half: int, pairs: int) -> None:
    borders = tile_borders(2 * half, pairs)
    assert [pair for start, end in borders for pair in range(start, end)] == [*range(half)]
    assert all(1 <= end - start <= pairs for start, end in borders)
