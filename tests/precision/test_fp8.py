"""FP8 in plain torch: real 8-bit products on the CPU, against those of the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from config import ConfigError, Fp8Config, LowPrecisionConfig
from engine.hardware.device import supports_fast_bfloat16
from engine.precision import fp8_native
from engine.precision.fp8 import check_device
from engine.precision.fp8_native import (
    E4M3,
    E5M2,
    DelayedScales,
    Fp8Operand,
    NativeBackend,
    NativeMatmul,
    cast_with_own_amax,
    cast_with_scale,
    largest,
    multiply,
    scaled_matmul,
)
from engine.precision.precision import Precision
from model import LanguageModel
from model.bdh import tiling
from model.matmul import Accumulator, OperandId, PlainMatmul
from tests.precision.conftest import NAMES, build, gradients_of, loss_of, saved_and_loaded

CPU, BF16 = torch.device("cpu"), torch.bfloat16
FAST = BF16 if supports_fast_bfloat16(CPU) else torch.float32  # of what is not in 8 bits
ERROR = {E4M3: 2**-4, E5M2: 2**-3}  # half a step between neighbours, relative
X, W, DY = (OperandId(name, 0) for name in ("x", "w", "dy"))
TOKENS = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1))
each_model = pytest.mark.parametrize("name", NAMES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values_of(operand: Fp8Operand) -> Tensor:
    """The numbers that the bits stand for."""
    return operand.rows.double() * operand.scale.view(-1, 1, 1).double()


def attached(model: LanguageModel, **fp8: Any) -> NativeBackend:
    resolved = {"recipe": "current", "format": "hybrid", **fp8}  # as a Config does
    return NativeBackend(Fp8Config(**resolved), model, CPU, FAST)


def train_once(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one pass."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=BF16, enabled=FAST is BF16):
        loss = loss_of(model, TOKENS)
    torch.autograd.backward(loss)
    return loss.item(), gradients_of(model)


def evaluate(model: nn.Module) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16, enabled=FAST is BF16):
        model.eval()(TOKENS[:, :-1])


def near(found: Tensor, expected: Tensor, error: float) -> bool:
    return bool((found.double() - expected).norm() <= error * expected.norm())


def alone(values: Tensor) -> Tensor:
    """The maximum over one process."""
    return values


# ---- casts


@given(
    scale=st.floats(1e-20, 1e20),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([E4M3, E5M2]),
    spread=st.floats(0, 4),
)
@settings(max_examples=25, deadline=None)
def test_a_cast_errs_by_half_a_step_at_most(
    scale: float, seed: int, dtype: torch.dtype, spread: float
) -> None:
    x = draw(2, 16, 48, seed=seed) * draw(2, 16, 48, seed=seed + 100).exp() ** spread * scale
    rows, inverse, amax = cast_with_own_amax(x, dtype)
    assert torch.equal(amax, x.abs().amax((1, 2)))
    error = (rows.float() * inverse.view(-1, 1, 1) - x).abs()
    smallest = torch.finfo(dtype).smallest_normal * ERROR[dtype] * inverse.view(-1, 1, 1)
    assert (error <= x.abs() * ERROR[dtype] * 1.001 + smallest).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_casts_use_the_whole_range_clip_beyond_a_given_scale_and_keep_zeros(
    dtype: torch.dtype,
) -> None:
    x = torch.stack((torch.linspace(-3, 2, 32).view(4, 8), torch.zeros(4, 8)))
    rows, inverse, _ = cast_with_own_amax(x, dtype)
    assert rows[0].float().abs().max() == largest(dtype)
    assert rows[1].float().count_nonzero() == 0 and inverse.isfinite().all()
    rows, amax = cast_with_scale(torch.tensor([[[1e6, -1e6, 1.0]]]), torch.tensor(1.0), dtype)
    assert rows.float().tolist() == [[[largest(dtype), -largest(dtype), 1.0]]] and amax == 1e6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = torch.ones(1, 2, 16)
    x[0, 0, 3] = bad
    rows, inverse, _ = cast_with_own_amax(x, E4M3)
    assert not (rows.float() * inverse).isfinite().all()
    scales = scales_of()  # nor by clipping it to an old scale
    scales.end_step(alone)
    assert not values_of(NativeMatmul(E4M3, E5M2, BF16, scales).activation(x, X)).isfinite().all()


# ---- products


@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    heads=st.sampled_from([(1, 1), (1, 3), (3, 3)]),
    fmt=st.sampled_from(["hybrid", "e4m3"]),
    dtype=st.sampled_from([BF16, torch.float32]),
    delayed=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_all_three_products_are_those_of_what_the_bits_stand_for(
    sizes: tuple[int, int, int], heads: tuple[int, int], fmt: str, dtype: torch.dtype, delayed: bool
) -> None:
    (M, K, N), (few, g) = (16 * size for size in sizes), heads
    gradient_dtype = E5M2 if fmt == "hybrid" else E4M3
    scales = scales_of(gradient_dtype=gradient_dtype) if delayed else None
    backend = NativeMatmul(E4M3, gradient_dtype, dtype, scales)
    backend.recording = True
    x, w, dy = draw(few, M, K), draw(g, N, K, seed=1).mT, draw(g, M, N, seed=2) * 1e-6
    for _ in range(1 + delayed):  # the second time by the amax of the first, which is the same
        x8, w8, dy8 = backend.activation(x, X), backend.weight(w, "w"), backend.gradient(dy, DY)
        if backend.scales is not None:
            backend.scales.end_step(alone)
    assert near(values_of(x8), x, 0.05) and near(values_of(dy8), dy, 0.1)
    pairs = [
        (backend.forward(x8, w8), values_of(x8) @ values_of(w8)),
        (backend.grad_input(dy8, w8), values_of(dy8) @ values_of(w8).mT),
        (backend.grad_weight(x8, dy8), values_of(x8).mT @ values_of(dy8)),
    ]
    assert int(backend.count) == 3 * g
    for product, exact in pairs:
        assert product.shape == exact.shape
        assert near(product, exact, 5e-3 if product.dtype is BF16 else 1e-5)
    assert pairs[2][0].dtype is torch.float32  # gradients of weights are not rounded again


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
def test_a_cpu_multiplies_8_bit_operands_as_scaled_mm_does(
    formats: tuple[torch.dtype, torch.dtype], dtype: torch.dtype
) -> None:
    """On a shape so small that torch's own product on a CPU with AMX takes a millisecond."""
    left, right = (draw(16, 32, seed=i).mul(99).to(kind) for i, kind in enumerate(formats))
    scales = torch.tensor(0.0123), torch.tensor(3.7e-9)
    expected = torch._scaled_mm(left, right.mT, *scales, out_dtype=dtype)
    out = torch.full((16, 16), torch.nan, dtype=dtype)
    assert multiply(left, right, scales, False, out) is out
    # Both round once to `dtype`; before that, sums of terms up to `size` in float32.
    size = (left.float().abs() @ right.float().abs().mT) * scales[0] * scales[1]
    limit = 1e-6 * size + (2**-8 * expected.float().abs() if dtype is BF16 else 0)
    assert ((out.float() - expected.float()).abs() <= limit).all()
    infinite = multiply(left, right, (scales[0], torch.tensor(torch.nan)), False, out)
    assert infinite.isnan().all()


def test_products_go_into_buffers_and_accumulators_and_weights_are_taken_by_heads() -> None:
    backend = NativeMatmul(E4M3, E5M2, BF16)
    value = draw(4, 16, 48)
    value[2] *= 1000
    x, whole = backend.activation(draw(2, 32, 16), X), backend.weight(value, "w")
    assert len(whole) == len(PlainMatmul().weight(value, "w")) == 4
    assert (values_of(whole)[0] - value[0]).abs().max() < 0.1 * value[0].abs().max()
    part = whole[1:3]
    assert torch.equal(values_of(part), values_of(whole)[1:3])
    assert torch.equal(part.columns.float(), part.rows.float().mT)
    buffer = torch.empty(2, 32, 48, dtype=BF16)
    assert backend.forward(x, part, buffer) is buffer
    assert torch.equal(buffer, backend.forward(x, part))
    total = Accumulator(torch.empty(2, 32, 48), Tensor.add_)
    for _ in range(3):
        backend.forward(x, part, total)
    torch.testing.assert_close(total.total, 3 * buffer.float(), rtol=2**-7, atol=1)


# ---- models


def matmuls_of(name: str, training: bool) -> int:
    """The FP8 matmuls of one pass, by the definition of the model."""
    if name == "bdh":  # every head: s, v, y forward; s, v, dz, dF, dG, da, dE, dx backward
        return 2 * 4 * (11 if training else 3)
    return (3 if training else 1) * 2 * 4


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@each_model
def test_hidden_products_are_in_8_bits_counted_and_near_those_of_bfloat16(
    name: str, recipe: str
) -> None:
    expected_loss, expected = train_once(build(name))
    for fmt in ("hybrid", "e4m3"):
        model = build(name)
        backend = attached(model, recipe=recipe, format=fmt)
        hidden = {id(weight) for weight, _ in model.hidden_weights()}
        names = {n for n, p in model.named_parameters() if id(p) in hidden}
        assert set(backend.covered) == names and not any("head" in n or "emb" in n for n in names)
        if backend.scales is not None:  # the second step is the first one with scales of the past
            with backend.training():
                train_once(model)
            backend.end_step(alone)
            assert backend.scales.steps == 1
        before = backend.matmul_count
        loss, gradients = train_once(model)
        assert backend.matmul_count - before == matmuls_of(name, training=True)
        assert abs(loss - expected_loss) < 0.01 and loss != expected_loss
        for own, gradient in expected.items():
            cosine = nn.functional.cosine_similarity(
                gradient.flatten(), gradients[own].flatten(), 0
            )
            assert cosine > 0.95, own
        before = backend.matmul_count
        evaluate(model)
        assert backend.matmul_count - before == matmuls_of(name, training=False)


def test_several_tiles_chunks_and_documents_train_in_8_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiling, "_CPU_TILE", 1)  # so the narrowest tiles: 1024 neurons
    shape = {"n_layer": 1, "mlp_internal_dim_multiplier": 80, "mask": "causal_document"}
    model, plain = build("bdh", **shape), build("bdh", **shape)
    backend = attached(model)
    tokens = torch.randint(256, (1, 544), generator=torch.Generator().manual_seed(2))
    documents = (torch.arange(544) // 200).expand(1, -1)
    for each in (plain, model):
        with torch.autocast("cpu", dtype=BF16, enabled=FAST is BF16):
            logits = each(tokens, documents)
        logits.float().square().mean().backward()
    one, other = (gradients_of(each)["encoder"].flatten() for each in (plain, model))
    assert nn.functional.cosine_similarity(one, other, 0) > 0.95
    assert backend.matmul_count == 2 * 4 * 11  # two tiles of each of four heads


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_layers_make_the_same_products_and_are_counted() -> None:
    model = build("gpt", n_layer=1, bias=True)
    backend = attached(model)
    loss, _ = train_once(model)
    made = backend.matmul_count
    model.compile(backend="aot_eager")  # traced as for inductor, whose code is not the subject
    compiled, _ = train_once(model)
    train_once(model)
    assert backend.matmul_count == 3 * made
    assert abs(compiled - loss) < 0.01


def test_a_linear_layer_keeps_its_bias_and_its_shape() -> None:
    layers = []
    for in_8_bits in (False, True):
        model = build("gpt", bias=True)
        if in_8_bits:
            attached(model)
        layers.append(model.get_submodule("transformer.h.0.mlp.c_fc"))
        nn.init.constant_(layers[-1].get_parameter("bias"), 3.0)
    exact, y = (layer(draw(2, 16, 64)) for layer in layers)
    assert y.shape == exact.shape and near(y, exact, 0.05)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bdh", {"n_embd": 72}, "encoder is 72 x 288, and FP8 matmuls"),
        ("gpt", {"n_embd": 72}, "transformer.h.0.attn.c_attn.weight is 216 x 72"),
        ("llama", {"d_ff": 100}, "layers.0.mlp.w13.weight is 200 x 64"),
    ],
)
def test_a_side_that_fp8_matmuls_cannot_take_is_named(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        attached(build(name, **options))
    text = str(caught.value)
    assert message in text and "multiples of 16" in text and "use_fp8: false" in text


def test_cuda_would_take_the_shapes_and_layouts_of_all_products() -> None:
    """torch's own checks for CUDA, on tensors without memory: stricter than those of a CPU."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match="col_major"):  # they do check
        left, wrong = (torch.empty(32, 32, dtype=E4M3, device="cuda") for _ in range(2))
        one = torch.ones((), device="cuda")
        torch._scaled_mm(left, wrong, one, one, out_dtype=BF16)
    made, real = 0, torch._scaled_mm

    def shape_checked(*operands: Any, out: Tensor, **options: Any) -> Tensor:
        return real(*operands, **options)  # torch has no check of a product with `out`

    def checked(left: Tensor, right: Tensor, scales: Any, fast: bool, out: Tensor) -> Tensor:
        nonlocal made
        made += 1
        with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "_scaled_mm", shape_checked)
            shaped = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                for x in (left, right, *scales, out)
            ]
            product = multiply(shaped[0], shaped[1], shaped[2:4], fast, shaped[4])
            assert (product.shape, product.dtype) == (out.shape, out.dtype)
        return multiply(left, right, scales, fast, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_native, "multiply", checked)
        for name in NAMES:
            model = build(name)
            attached(model)
            train_once(model)
    assert made == 88 + 24 + 24


# ---- delayed scaling


def scales_of(
    algo: str = "max", length: int = 3, gradient_dtype: torch.dtype = E5M2
) -> DelayedScales:
    fp8 = Fp8Config(recipe="delayed", amax_history_len=length, amax_compute_algo=algo)  # type: ignore[arg-type]
    return DelayedScales(fp8, {X: E4M3, W: E4M3, DY: gradient_dtype}, CPU)


@given(
    maxima=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    length=st.integers(1, 5),
    algo=st.sampled_from(["max", "most_recent"]),
    processes=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_a_scale_follows_from_the_steps_before_on_all_processes(
    maxima: list[float], length: int, algo: str, processes: int
) -> None:
    scales, seen, expected = scales_of(algo, length), list[float](), 1.0
    assert scales.scale_of(X) is None
    for amax in maxima:
        scales.record_amax(X, torch.tensor([amax / 2, amax]))
        scales.record_amax(X, torch.tensor([amax / 3]))
        scales.end_step(lambda values: values.mul_(processes))  # another process had more
        seen.append(float(torch.tensor(amax)) * processes)
        past = max(seen[-length:]) if algo == "max" else seen[-1]
        expected = largest(E4M3) / max(past, 2.0**-100) if past > 0 else expected
        found = scales.scale_of(X)
        assert found is not None and found.item() == pytest.approx(expected, rel=1e-6)


def test_clipped_operands_are_counted() -> None:
    scales = scales_of()
    for amax in (1.0, 1.0, 2.0, 1.5):  # the third is above all before it
        scales.record_amax(X, torch.tensor(amax))
        scales.end_step(alone)
    assert scales.take_clipped() == pytest.approx(1 / 9)  # three operands, three steps with a scale
    assert scales.take_clipped() is None


def test_only_the_passes_of_a_step_count_for_later_scales() -> None:
    model = build("gpt")
    backend = attached(model, recipe="delayed")
    assert backend.scales is not None
    train_once(model)  # a trial
    assert backend.scales.amax.count_nonzero() == 0
    with backend.training():
        train_once(model)
    assert backend.scales.amax.count_nonzero() == len(backend.scales.amax)
    backend.end_step(alone)
    history = backend.scales.history.clone()
    evaluate(model)
    assert torch.equal(backend.scales.history, history)
    assert backend.scales.amax.count_nonzero() == 0


@each_model
def test_delayed_scales_come_back_bit_for_bit(name: str) -> None:
    def steps(model: nn.Module, backend: NativeBackend, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            with backend.training():
                losses.append(train_once(model)[0])
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            backend.end_step(alone)
        return losses

    options: dict[str, Any] = {"recipe": "delayed", "amax_history_len": 4}
    model = build(name)
    backend = attached(model, **options)
    steps(model, backend, 3)
    state, weights = saved_and_loaded(backend.state_dict()), saved_and_loaded(model.state_dict())
    expected = steps(model, backend, 4)
    model = build(name)
    backend = attached(model, **options)
    model.load_state_dict(weights)
    assert backend.load_state_dict(state)
    assert steps(model, backend, 4) == expected
    others = [
        attached(build(name, n_layer=1), **options),
        attached(build(name), **{**options, "amax_history_len": 5}),
        attached(build(name), **options, format="e4m3"),
    ]
    for afresh in others:
        assert not afresh.load_state_dict(state)
        assert not afresh.load_state_dict({"encoder.0": {}})  # of another backend
        assert afresh.scales is not None and afresh.scales.steps == 0


# ---- devices, proof


def test_a_device_without_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, capability = torch.device("cuda", 0), [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError) as caught:
        Precision(LowPrecisionConfig(use_fp8=True), cuda, Fp8Config())
    assert str(caught.value) == (
        "low_precision.use_fp8=true: needs compute capability 8.9 or newer (Ada, Hopper, "
        "Blackwell); cuda:0 (NVIDIA A100) has 8.0. Set low_precision.use_fp8: false."
    )
    capability[0] = 9
    for device in (cuda, CPU):
        check_device(Fp8Config(), device)
    with pytest.raises(ConfigError, match="mps has no FP8 matmuls"):
        check_device(Fp8Config(), torch.device("mps"))


def test_a_run_without_any_fp8_matmul_stops() -> None:
    fp8 = Fp8Config(recipe="current", format="hybrid")
    precision = Precision(LowPrecisionConfig(use_fp8=True, use_4bit=False), CPU, fp8)
    model = build("gpt")
    (line,) = precision.prepare(model, 10)
    assert line.startswith("fp8: 8 of 9 matmuls, native, current scaling; lm_head ")
    with pytest.raises(RuntimeError, match="no matmul ran in FP8"):
        precision.verify_fp8_used(lambda: None)
    told = precision.verify_fp8_used(lambda: train_once(model))
    assert told == ["fp8: 24 matmuls in a trial step"]
    assert precision.metrics() == {}
    with precision.training(1):
        train_once(model)
    train_once(model)  # an evaluation: not of a step
    assert precision.metrics() == {"train/fp8_products": 24}
    with precision.training(2):
        pass
    with pytest.raises(RuntimeError, match="no matmul ran in FP8"):
        precision.metrics()


def test_the_operator_tells_compilers_its_shape() -> None:
    x, _, _ = cast_with_own_amax(draw(1, 32, 16), E4M3)
    one, count = torch.ones(()), torch.zeros((), dtype=torch.int64)
    checks = ("test_faketensor",)  # the others multiply 8-bit tensors, which torch cannot
    arguments = (x[0], x[0], [one, one], True, BF16, count)
    torch.library.opcheck(scaled_matmul, arguments, test_utils=checks)
