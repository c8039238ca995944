"""BDH's Triton kernels against the definition: values, gradients, dropout, documents, chunks.

tests/model/test_bdh_triton.py runs this file in Triton's interpreter, on a CPU. There it is float32
only: the interpreter multiplies the bits of bfloat16 as if they were integers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from model.bdh.elementwise import EAGER
from model.bdh.fused_layers import fused_layers
from model.bdh.tiling import Tiling, rope_frequencies, rotation
from model.bdh.triton import shapes
from model.bdh.workspace import LayerStackArgs
from model.memory import StepShape, activation_bytes
from tests.engine.allocations import peak_bytes
from tests.gpu.devices import DEVICE, ON_CUDA, cuda_only, gpu_tests
from tests.model.bdh_reference import Inputs, documents_of, error, reference, small_bdh

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    *gpu_tests,
    pytest.mark.skipif(not (ON_CUDA or INTERPRETED), reason="needs CUDA or Triton's interpreter"),
]
pytest.importorskip("triton")

NAMES = ("output", "x", "encoder", "encoder_v", "decoder")  # gradients but for the first


@dataclass(frozen=True)
class Case:
    """B sequences of T tokens, D, H, N; a chunk of 48 tokens is 3 blocks of 16."""

    shape: tuple[int, int, int, int, int] = (2, 48, 32, 2, 64)
    chunk: int = 48
    n_layer: int = 2
    documents: Tensor | None = None
    dropout: float = 0.0
    sequences: int | None = None
    kept_layers: int = 3
    recompute: bool = False


SHORT = documents_of([10, 22, 16], [48])
LONG = documents_of([10, 60], [32, 1, 22, 15])  # borders within chunks and at their ends
LONG_SHAPE = (2, 70, 16, 2, 64)  # three chunks of 32, the last one padded
CASES = {
    "one chunk": Case(),
    "one head, three layers": Case((2, 32, 32, 1, 128), 32, n_layer=3),
    "documents": Case(documents=SHORT),
    "dropout": Case(dropout=0.25),
    "padded blocks": Case((2, 41, 32, 2, 64), documents=SHORT[:, :41], dropout=0.25),
    "chunks": Case(LONG_SHAPE, 32),
    "chunks, documents, dropout": Case(LONG_SHAPE, 32, documents=LONG, dropout=0.25),
    "s and r computed again": Case(LONG_SHAPE, 32, documents=LONG, dropout=0.25, kept_layers=1),
    "sequences one by one": Case(LONG_SHAPE, 32, documents=LONG, dropout=0.25, sequences=1),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
BORDERS = CASES["chunks, documents, dropout"]


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(case: Case, dtype: torch.dtype) -> Inputs:
    B, T, D, H, N = case.shape
    draw = torch.Generator().manual_seed(1)
    sizes = ((B, T, D), (H, D, N), (H, D, N), (H * N, D))
    x, *weights = (torch.randn(size, generator=draw) for size in sizes)
    rounded = [t.bfloat16().to(DEVICE, dtype) for t in (x, *(0.3 * w for w in weights))]
    return rounded[0], rounded[1], rounded[2], rounded[3]


def outcome(function: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients, of a fixed random direction of the output."""
    variables = tuple(t.clone().requires_grad_() for t in inputs)
    output = function(variables)  # type: ignore[arg-type]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(output, variables, direction.to(output))
    return dict(zip(NAMES, (output.detach(), *gradients), strict=True))


def args_of(case: Case, products: torch.dtype, triton: bool) -> LayerStackArgs:
    H, N = case.shape[3:]
    tiling = Tiling(case.chunk, H, N // 2, True, case.sequences, kept_layers=case.kept_layers)
    return LayerStackArgs(
        n_layer=case.n_layer,
        dropout=case.dropout,
        rotation=rotation(rope_frequencies(N), case.chunk, products, DEVICE),
        tiling=tiling,
        ops=EAGER,
        documents=None if case.documents is None else case.documents.to(DEVICE),
        recompute=case.recompute,
        triton=triton,
    )


def by_torch(case: Case, products: torch.dtype) -> dict[str, Tensor]:
    args = args_of(case, products, triton=False)
    inputs = inputs_of(case, torch.promote_types(products, torch.float32))
    torch.manual_seed(3)
    return outcome(lambda i: fused_layers(i[0], i[1:], args), inputs)


def by_kernels(case: Case, products: torch.dtype = torch.float32) -> dict[str, Tensor]:
    args = args_of(case, products, triton=True)
    torch.manual_seed(3)
    return outcome(lambda i: fused_layers(i[0], i[1:], args), inputs_of(case, torch.float32))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    errors = {name: error(found[name], expected[name]) for name in NAMES}
    assert {name: e for name, e in errors.items() if not e < limit} == {}


@each_case
def test_values_and_gradients_equal_autograd_of_the_definition(case: Case) -> None:
    case = replace(case, dropout=0.0)
    inputs = inputs_of(case, torch.float64)
    cpu = tuple(t.cpu() for t in inputs)
    expected = outcome(lambda i: reference(i, case.n_layer, case.documents), cpu)  # type: ignore[arg-type]
    found = {name: value.cpu() for name, value in by_kernels(case).items()}
    assert_close(found, expected, 1e-6)


@each_case
def test_dropout_keeps_what_it_keeps_in_the_other_path(case: Case) -> None:
    if not case.dropout:
        pytest.skip("without dropout")
    # Another mask would be wrong by as much as the values themselves.
    expected = by_torch(case, torch.float64)
    assert error(expected["output"], by_torch(replace(case, dropout=0.0), torch.float64)["output"])
    assert_close(by_kernels(case), expected, 1e-6)


def test_two_runs_are_equal_bit_for_bit() -> None:
    one, other = (by_kernels(BORDERS) for _ in range(2))
    assert [name for name in NAMES if not torch.equal(one[name], other[name])] == []


def test_memory_that_is_kept_or_shared_changes_no_bit_of_a_sequence() -> None:
    """Only sums over sequences, the gradients of weights, are added in another order."""
    expected = by_kernels(BORDERS)
    for other in (replace(BORDERS, kept_layers=1), replace(BORDERS, recompute=True)):
        recomputed = by_kernels(other)
        assert [name for name in NAMES if not torch.equal(recomputed[name], expected[name])] == []
    cut = by_kernels(replace(BORDERS, sequences=1))
    for name in ("output", "x"):
        assert torch.equal(cut[name], expected[name])


def test_a_retained_graph_goes_backward_twice_alike() -> None:
    case = CASES["chunks"]
    variables = tuple(t.requires_grad_() for t in inputs_of(case, torch.float32))
    args = args_of(case, torch.float32, triton=True)
    total = fused_layers(variables[0], variables[1:], args).square().sum()
    first = torch.autograd.grad(total, variables, retain_graph=True)
    second = torch.autograd.grad(total, variables)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.inference_mode():
        found = fused_layers(variables[0], variables[1:], args).square().sum()
    assert torch.equal(found, total)


def test_a_model_trains_alike_by_both() -> None:
    model = small_bdh(std=0.1, n_embd=64, mlp_internal_dim_multiplier=8, dropout=0.2).to(DEVICE)
    tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    found = []
    for triton in (False, True):
        model.triton = triton
        torch.manual_seed(5)
        loss = model(tokens, targets=tokens.roll(-1, 1))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 1e-5


@pytest.mark.skipif(ON_CUDA, reason="measured by the allocator's record of a CPU")
@pytest.mark.parametrize("kept, wide", [(2**33, 2**34), (0, 2**34), (0, 0)])
@pytest.mark.parametrize("shape", [(2, 512), (1, 2048)])
def test_predicted_activations_are_near_the_measured(
    shape: tuple[int, int], kept: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "WIDE_BYTES", wide)
    monkeypatch.setattr(shapes, "KEPT_BYTES", kept)
    monkeypatch.setattr("model.bdh.triton.launch.launch", lambda *args, **constants: None)
    model = small_bdh(n_embd=128, mlp_internal_dim_multiplier=32, dropout=0.1)
    model.use_triton()
    tokens = torch.zeros(shape, dtype=torch.long)

    def step() -> None:
        torch.autograd.backward(model(tokens, targets=tokens))
        model.zero_grad()

    predicted = activation_bytes(model, StepShape(*shape, torch.float32, on_cpu=False))
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    assert predicted is not None
    assert 0.87 < predicted / (peak_bytes(step) - gradients) < 1.2


@cuda_only
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *CASES.values(),
        Case((4, 512, 256, 4, 1024), 512, documents=documents_of(*4 * [[100, 412]]), dropout=0.1),
        Case((2, 1536, 128, 4, 512), 512, dropout=0.1),
    ],
    ids=str,
)
def test_16_bits_err_no_more_than_the_other_path(case: Case, products: torch.dtype) -> None:
    expected, other = by_torch(case, torch.float64), by_torch(case, products)
    found = by_kernels(case, products)
    for name in NAMES:
        limit = 1.2 * error(other[name], expected[name]) + 1e-3
        assert error(found[name], expected[name]) < limit, name
