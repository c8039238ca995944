"""BDH's fused layers against whole-tensor formulas: values, gradients, dropout, states, memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.hardware.device import compiler_for
from model.bdh import BDH
from model.bdh.elementwise import EAGER, ElementwiseOps, compiled_ops
from model.bdh.fused_layers import Weights, fused_layers
from model.bdh.masks import DropoutMask
from model.bdh.tiling import Tiling, rope_frequencies, rotation, tile_pairs
from model.bdh.workspace import LayerStackArgs
from tests.model.bdh_reference import Inputs, documents_of, error, reference, small_bdh

CPU = torch.device("cpu")
NAMES = ("output", "x", "encoder", "encoder_v", "decoder")  # gradients but for the first
WHOLE = Tiling(12, 4, 10, True)  # of `problem()`: one chunk, one tile
CUT = Tiling(5, 2, 3, False)
# As on a GPU: all neurons in one tile, sequences in groups, scores in strips, one scan over chunks.
ON_GPU = Tiling(5, 4, 10, True, sequences=2, strip=2, scan=4, gradients_in_products=True)


def problem(shape: Sequence[int] = (2, 12, 6, 4, 20), seed: int = 0, std: float = 0.4) -> Inputs:
    """Float64 inputs of B, T, D, H, N."""
    B, T, D, H, N = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = ((B, T, D), (H, D, N), (H, D, N), (H * N, D))
    x, *weights = (torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)
    return x, std * weights[0], std * weights[1], std * weights[2]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    x, encoder, encoder_v, decoder = (t.to(dtype) for t in inputs)
    return x, encoder, encoder_v, decoder


def fused(
    inputs: Inputs, tiling: Tiling, seed: int = 0, dtype: torch.dtype | None = None, **rest: Any
) -> Tensor:
    """The fused layers, drawing dropout from this seed; dtype: of products."""
    frequencies = rope_frequencies(inputs[1].shape[2])
    angles = rotation(frequencies, tiling.chunk, dtype or inputs[0].dtype, CPU)
    defaults: dict[str, Any] = {"n_layer": 2, "dropout": 0.0, "ops": EAGER}
    args = LayerStackArgs(rotation=angles, tiling=tiling, **{**defaults, **rest})
    torch.manual_seed(seed)
    weights: Weights = inputs[1:]
    result: Tensor = fused_layers(inputs[0], weights, args)
    return result


def direction_of(output: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(99)
    return torch.randn(output.shape, generator=draw, dtype=torch.float64).to(output.dtype)


def outcome(layers: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients, of a fixed random direction of the output."""
    x, encoder, encoder_v, decoder = (t.detach().clone().requires_grad_() for t in inputs)
    output = layers((x, encoder, encoder_v, decoder))
    variables = (x, encoder, encoder_v, decoder)
    gradients = torch.autograd.grad(output, variables, direction_of(output))
    return dict(zip(NAMES, (output.detach(), *gradients), strict=True))


def run(inputs: Inputs, tiling: Tiling, seed: int = 0, **rest: Any) -> dict[str, Tensor]:
    return outcome(lambda i: fused(i, tiling, seed, **rest), inputs)


def truth(inputs: Inputs, n_layer: int = 2, **rest: Any) -> dict[str, Tensor]:
    return outcome(lambda i: reference(i, n_layer, **rest), inputs)


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, floor: float = 0.0
) -> None:
    """By relative norm; norms count as `floor` at least."""
    for name, value in expected.items():
        difference = float((found[name].double() - value.double()).norm())
        assert difference <= tolerance * max(float(value.double().norm()), floor), name


def spying(masks: list[Tensor]) -> ElementwiseOps:
    """Operations that note, at each call of `gate`, which elements dropout keeps."""

    def gate(u: Tensor, v: Tensor, mask: DropoutMask | None) -> None:
        kept = torch.ones_like(v)
        EAGER.gate(torch.ones_like(u), kept, mask)
        masks.append(kept)
        EAGER.gate(u, v, mask)

    return EAGER._replace(gate=gate)


def mask_of(inputs: Inputs, seed: int, dropout: float, n_layer: int = 2) -> Tensor:
    """Dropout's mask, (n_layer, H, B, T, N), observed in a run of one tile and one chunk."""
    masks: list[Tensor] = []
    T, H, N = inputs[0].shape[1], inputs[1].shape[0], inputs[1].shape[2]
    whole = Tiling(T, H, N // 2, True)
    fused(inputs, whole, seed, n_layer=n_layer, dropout=dropout, ops=spying(masks))
    return torch.stack(masks)


# Values and gradients


@pytest.mark.parametrize(
    "tiling", [Tiling(4, 1, 3, True), Tiling(4, 4, 1, False), ON_GPU], ids=["cached", "cut", "gpu"]
)
def test_values_and_gradients_equal_the_definition_at_every_chunk_border(tiling: Tiling) -> None:
    for length in (1, 3, 4, 5, 8, 9, 12):
        inputs = problem((3, length, 6, 4, 20))
        assert_equal(run(inputs, tiling), truth(inputs), 1e-10)


def test_float32_stays_within_its_rounding() -> None:
    inputs = problem((2, 33, 24, 3, 64))
    for n_layer in (1, 3):
        expected = truth(inputs, n_layer)
        gpu = Tiling(8, 3, 32, True, sequences=1, strip=3, scan=9, gradients_in_products=True)
        for tiling in (Tiling(8, 1, 5, False), Tiling(17, 3, 32, True), gpu):
            found = run(cast(inputs, torch.float32), tiling, n_layer=n_layer)
            assert found["output"].dtype == torch.float32
            assert_equal(found, expected, 1e-5)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Inputs, Tiling, dict[str, Any], int]:
    """Inputs, tiling, the other arguments, and a seed."""
    B, T, D, H = (draw(st.integers(*r)) for r in ((1, 3), (1, 14), (3, 7), (1, 4)))
    N = 2 * draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**32))
    tiling = Tiling(
        chunk=draw(st.integers(1, T + 2)),
        group=draw(st.sampled_from([g for g in range(1, H + 1) if H % g == 0])),
        pairs=draw(st.integers(1, N)),
        cache_tiles=draw(st.booleans()),
        sequences=draw(st.none() | st.integers(1, 3)),
        strip=draw(st.none() | st.integers(1, 6)),
        scan=draw(st.integers(1, 9)),
        gradients_in_products=draw(st.booleans()),
    )
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(seed))
    share = draw(st.sampled_from([None, 0.1, 0.5, 1.0]))
    rest = {
        "n_layer": draw(st.integers(1, 3)),
        "documents": None if share is None else (begins < share).cumsum(1),
        "dropout": draw(st.sampled_from([0.0, 0.375])),
    }
    return problem((B, T, D, H, N), seed), tiling, rest, seed


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_any_shape_tiling_documents_and_dropout_equal_the_definition(
    case: tuple[Inputs, Tiling, dict[str, Any], int],
) -> None:
    inputs, tiling, rest, seed = case
    mask = mask_of(inputs, seed, rest["dropout"], rest["n_layer"])
    expected = truth(inputs, mask=mask, **rest)
    # Where one neuron alone is active its gradients cancel to nothing, up to the rounding of 1.
    assert_equal(run(inputs, tiling, seed, **rest), expected, 1e-9, 1.0)


@pytest.mark.parametrize("documents", [None, documents_of([3, 2])])
@pytest.mark.parametrize("chunk, cached", [(5, True), (2, False)])
def test_gradients_are_those_of_finite_differences(
    chunk: int, cached: bool, documents: Tensor | None
) -> None:
    inputs = problem((1, 5, 3, 2, 4), seed=3)
    for tensor in inputs:
        tensor.requires_grad_()
    rest: dict[str, Any] = {"documents": documents, "dropout": 0.5}
    assert torch.autograd.gradcheck(
        lambda *i: fused(i, Tiling(chunk, 1, 1, cached), 5, **rest), inputs, fast_mode=True
    )


def test_the_whole_model_cuts_long_sequences_and_equals_the_definition() -> None:
    model = small_bdh(n_layer=2, n_embd=8).double()
    tokens, T = torch.randint(64, (1, 600)), 600
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


@pytest.mark.parametrize(
    "tiling",
    [Tiling(128, 1, 256, True), Tiling(128, 4, 100, False), Tiling(32, 1, 128, False)],
    ids=str,
)
@pytest.mark.slow
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
        a = under_autocast(lambda i: fused(i, tiling, dtype=torch.bfloat16), inputs)
        b = under_autocast(lambda i: reference(i, 2), inputs)
        for name in NAMES:
            own[name] += error(a[name], exact[name]) / 3
            plain[name] += error(b[name], exact[name]) / 3
    assert {name: own[name] for name in NAMES if own[name] > 1.2 * plain[name]} == {}, plain


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import
def test_compiled_operations_equal_the_eager_ones() -> None:
    """One sequence and two: their views of chunks are laid out in different ways."""
    if compiler_for(CPU) is None:
        pytest.skip("no C++ compiler")
    documents = documents_of([4, 5, 3], [2, 9, 1])
    for batch, dtype, tolerance in ((1, torch.float32, 1e-5), (2, torch.bfloat16, 5e-2)):
        tiling = Tiling(4, 1, 8, False, scan=3 if batch == 1 else 1)
        inputs = cast(problem((batch, 12, 16, 2, 32)), torch.float32)
        rest = {"dtype": dtype, "documents": documents[:batch], "dropout": 0.3}
        expected = run(inputs, tiling, 3, **rest)
        assert_equal(run(inputs, tiling, 3, ops=compiled_ops(), **rest), expected, tolerance)


# Documents


@pytest.mark.parametrize("chunk", [14, 4])
def test_documents_equal_the_definition_with_their_mask(chunk: int) -> None:
    inputs = problem((2, 14, 6, 2, 12))
    for lengths in ([8, 6], [14], [1] * 14, [5, 1, 1, 1, 6], [2, 2, 1, 3, 4, 2]):
        documents = documents_of(lengths, lengths[::-1])  # each row has borders of its own
        for tiling in (Tiling(chunk, 1, 4, False), replace(ON_GPU, chunk=chunk, group=2)):
            found = run(inputs, tiling, documents=documents)
            assert_equal(found, truth(inputs, documents=documents), 1e-10)


@pytest.mark.parametrize("chunk", [14, 4])
def test_a_document_is_computed_as_if_it_stood_alone(chunk: int) -> None:
    inputs = problem((1, 14, 6, 2, 12))
    packed = fused(inputs, Tiling(chunk, 1, 6, True), documents=documents_of([3, 9, 2]))
    alone = fused((inputs[0][:, 3:12], *inputs[1:]), Tiling(9, 1, 6, True))
    assert torch.allclose(packed[:, 3:12], alone, rtol=0, atol=1e-10)


# Dropout


@pytest.mark.parametrize("dropout", [0.125, 0.875])  # exact shares of 2**32
def test_dropout_has_the_same_mask_in_any_tiling(dropout: float) -> None:
    inputs = problem()
    # A small decoder, for which the norms do not hide a wrong scale.
    small = (*inputs[:3], 1e-5 * inputs[3])
    expected = truth(small, mask=mask_of(small, 7, dropout), dropout=dropout)
    alone = replace(ON_GPU, sequences=1)
    for tiling in (WHOLE, CUT, Tiling(12, 1, 3, False), Tiling(1, 4, 1, False), alone):
        assert_equal(run(small, tiling, 7, dropout=dropout), expected, 1e-10)


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
    mask = mask_of(problem((2, 128, 4, 2, 256)), seed, dropout)
    return (mask - (1 - dropout)) / math.sqrt(dropout * (1 - dropout))


@pytest.mark.parametrize("dropout, seed", [(0.1, 0), (0.5, 1), (0.9, 2)])
def test_dropout_keeps_its_share_without_correlations(dropout: float, seed: int) -> None:
    mask = standard_mask(dropout, seed)  # (layer, head, sequence, token, neuron)
    assert abs(float(mask.mean())) < 5 / math.sqrt(mask.numel())
    assert_chance(mask.permute(0, 2, 3, 1, 4).flatten(0, 2).flatten(1))  # tokens of all layers
    assert_chance(mask.permute(1, 4, 0, 2, 3).flatten(0, 1).flatten(1))  # neurons of all heads
    pairs = [mask.unbind(dim) for dim in (0, 1, 2)] + [(mask, standard_mask(dropout, seed + 1))]
    for first, second in pairs:  # by layer, head, sequence and seed
        assert abs(float((first * second).mean())) < 5 / math.sqrt(first.numel())


@pytest.mark.parametrize(
    "dropout, training, drawn", [(0.2, True, 1), (0.2, False, 0), (0, True, 0)]
)
def test_only_training_with_dropout_draws_and_only_one_number(
    dropout: float, training: bool, drawn: int
) -> None:
    model = small_bdh(dropout=dropout).train(training)
    torch.manual_seed(4)
    for _ in range(drawn):
        torch.randint(2**62, ())
    expected = torch.get_rng_state()
    torch.manual_seed(4)
    torch.autograd.backward(model(torch.zeros(2, 9, dtype=torch.long)).sum())
    assert torch.equal(torch.get_rng_state(), expected)


# Autograd


def gradients_of(model: BDH, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Logits and the gradient of every parameter."""
    logits = forward(torch.arange(18).view(2, 9))
    model.zero_grad()
    torch.autograd.backward(logits.square().mean())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # inside torch.compile
def test_a_model_compiled_by_its_user_computes_the_same() -> None:
    model = small_bdh()
    expected = gradients_of(model, model)
    found = gradients_of(model, torch.compile(model, backend="eager"))
    torch.compiler.reset()
    assert len(found) == 6
    assert_equal(found, expected, 1e-6)


def test_two_backward_passes_add_up() -> None:
    model = small_bdh().double()
    halves = torch.randint(64, (2, 2, 9))
    loss = model(halves.flatten(0, 1)).square().sum()
    expected = torch.autograd.grad(loss, [*model.parameters()])
    for half in halves:
        torch.autograd.backward(model(half).square().sum())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert error(parameter.grad, gradient) < 1e-12


@pytest.mark.parametrize(
    "tiling",
    [Tiling(5, 2, 3, True), Tiling(5, 2, 3, False), ON_GPU],
    ids=["cached", "cut", "gpu"],
)
def test_a_retained_graph_goes_backward_twice_alike_and_then_no_more(tiling: Tiling) -> None:
    inputs = problem()
    for tensor in inputs:
        tensor.requires_grad_()
    output = fused(inputs, tiling, dropout=0.5).square().sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    second = torch.autograd.grad(output, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(output)


@pytest.mark.parametrize(
    "tiling",
    [Tiling(5, 2, 3, True), Tiling(5, 2, 3, False), ON_GPU],
    ids=["cached", "cut", "gpu"],
)
def test_recomputed_layers_give_the_same_gradients_bit_for_bit(tiling: Tiling) -> None:
    def found(recompute: bool) -> dict[str, Tensor]:
        documents = documents_of([7, 5], [12], [1, 11])
        inputs = problem((3, 12, 6, 4, 20))
        return run(inputs, tiling, dropout=0.3, documents=documents, recompute=recompute)

    assert_equal(found(True), found(False), 0)


def test_two_graphs_at_once_do_not_disturb_each_other() -> None:
    """Each pass has buffers of its own, though arguments and weights are shared."""
    inputs = problem()
    tiling = Tiling(5, 2, 3, True)
    expected = run(inputs, tiling)

    def beside_another(i: Inputs) -> Tensor:
        output = fused(i, tiling)
        torch.autograd.backward(fused((i[0].flip(1), *i[1:]), tiling).sum())
        return output

    assert_equal(outcome(beside_another, inputs), expected, 0)


def test_without_gradients_the_output_is_the_same_and_inputs_are_left_alone() -> None:
    inputs = problem()
    before = [t.clone() for t in inputs]
    for tensor in inputs:
        tensor.requires_grad_()
    expected = fused(inputs, CUT)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = fused(inputs, CUT)
        assert expected.requires_grad and not found.requires_grad
        assert torch.equal(found, expected)
    torch.autograd.backward(expected.sum())
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("wanted", range(4), ids=NAMES[1:])
def test_one_input_alone_may_need_a_gradient(wanted: int) -> None:
    inputs = problem()
    expected = truth(inputs)
    inputs[wanted].requires_grad_()
    output = fused(inputs, CUT)
    torch.autograd.backward(output, direction_of(output))
    for name, tensor in zip(NAMES[1:], inputs, strict=True):
        assert (tensor.grad is None) == (name != NAMES[1 + wanted])
    found = inputs[wanted].grad
    assert found is not None
    assert error(found, expected[NAMES[1 + wanted]]) < 1e-10


# States


@pytest.mark.parametrize(
    "tilings, lengths, documents",
    [
        ([Tiling(4, 1, 10, False)] * 2, [4, 8], None),
        ([Tiling(3, 2, 3, True)] * 3, [3, 3, 6], None),
        ([Tiling(1, 4, 10, False)] * 12, [1] * 12, None),
        ([Tiling(5, 1, 3, False)] * 2, [10, 2], None),
        ([Tiling(8, 4, 10, True), *[Tiling(1, 1, 4, False)] * 4], [8, 1, 1, 1, 1], None),
        ([Tiling(4, 1, 3, False)] * 2, [4, 8], documents_of([6, 6], [3, 9])),
        ([replace(ON_GPU, chunk=2, sequences=1)] * 2, [4, 8], documents_of([6, 6], [3, 9])),
    ],
    ids=["4 + 8", "3 + 3 + 6", "ones", "10 + 2", "8 and ones", "a document goes on", "gpu"],
)
def test_a_sequence_in_parts_equals_the_whole(
    tilings: list[Tiling], lengths: list[int], documents: Tensor | None
) -> None:
    """All parts but the last are whole chunks; the document at a border goes on after it."""
    inputs = problem()
    states = torch.zeros(2, 4, 2, 2, 10, 6, dtype=torch.float64)
    parts = torch.split(inputs[0], lengths, 1)
    numbers = [None] * len(parts) if documents is None else torch.split(documents, lengths, 1)
    found = [
        fused((part, *inputs[1:]), tiling, states=states, documents=of_part)
        for part, tiling, of_part in zip(parts, tilings, numbers, strict=True)
    ]
    assert error(torch.cat(found, 1), reference(inputs, 2, documents)) < 1e-10


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


def step_of(length: int) -> dict[str, Tensor]:
    model = small_bdh(n_layer=1, n_head=1, mlp_internal_dim_multiplier=2)
    tokens = torch.randint(64, (1, length + 1))
    loss = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
    torch.autograd.backward(loss)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_a_step_over_65536_tokens_has_finite_gradients() -> None:
    gradients = step_of(65_536)
    assert len(gradients) == 5
    assert all(g.isfinite().all() and g.any() for g in gradients.values())


@pytest.mark.slow
def test_memory_grows_linearly_with_the_length() -> None:
    peaks = []
    for length in (8192, 16_384):
        with Memory() as memory:
            step_of(length)
        peaks.append(memory.peak)
    assert 1.8 < peaks[1] / peaks[0] < 2.2


@pytest.mark.slow
def test_long_sequences_in_chunks_equal_one_square() -> None:
    inputs, tilings = problem((1, 2048, 16, 1, 32)), [Tiling(c, 1, 16, True) for c in (256, 2048)]
    assert_equal(run(inputs, tilings[0]), run(inputs, tilings[1]), 1e-10)
    # In float32 the output alone: gradients jump at the edge of a neuron's being active.
    chunks, square = (fused(cast(inputs, torch.float32), tiling) for tiling in tilings)
    assert error(chunks, square) < 1e-4


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
            fused(inputs, Tiling(128, 1, 8, False), n_layer=n_layer)
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
    groups = tiling.sequence_groups(batch)
    assert [row for group in groups for row in range(batch)[group]] == [*range(batch)]
    assert tiling.sequences is None or len(range(batch)[groups[0]]) <= tiling.sequences
    if not on_cpu:  # four buffers, of one sequence, one head and 1024 neurons at least
        rows = len(range(batch)[groups[0]]) * chunks * tiling.chunk
        buffers = 4 * rows * tiling.group * 2 * tiling.pairs * dtype.itemsize
        assert buffers <= 2**32 or tiling.pairs <= 512


@pytest.mark.parametrize("documents", [None, documents_of([4, 1, 7], [12], [2, 8, 2])])
def test_a_scan_over_chunks_equals_one_after_another_bit_for_bit(documents: Tensor | None) -> None:
    inputs = cast(problem((3, 12, 6, 2, 20)), torch.bfloat16)
    whole, single = Tiling(2, 2, 10, True, scan=6), Tiling(2, 2, 10, True)
    rest: dict[str, Any] = {"documents": documents, "dtype": torch.bfloat16}
    assert_equal(run(inputs, whole, **rest), run(inputs, single, **rest), 0)


def test_on_a_gpu_sequences_are_cut_first_then_heads_then_neurons() -> None:
    shape = (4, 256, 8192)

    def plan(batch: int, length: int) -> tuple[int, int, int]:
        tiling = Tiling.of((batch, length), shape, torch.bfloat16, on_cpu=False)
        assert tiling.cache_tiles == (tiling.pairs == 4096)
        return len(tiling.sequence_groups(batch)), tiling.group, tiling.pairs

    assert plan(32, 512) == (1, 4, 4096)
    assert plan(33, 512) == (2, 4, 4096)
    assert plan(8, 8192) == (4, 4, 4096)
    assert plan(2, 32_768) == (2, 2, 4096)
    assert plan(1, 131_072) == (1, 1, 2048)


@given(half=st.integers(1, 500), pairs=st.integers(1, 600))
def test_tiles_cover_every_pair_once(half: int, pairs: int) -> None:
    tiles = tile_pairs(2 * half, pairs)
    assert [pair for tile in tiles for pair in range(half)[tile]] == [*range(half)]
    assert all(1 <= tile.stop - tile.start <= pairs for tile in tiles)
