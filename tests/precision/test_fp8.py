"""FP8 in plain torch: real 8-bit products on the CPU, against those of what the bits stand for."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from config import Config, ConfigError, Fp8Config, LowPrecisionConfig
from engine.hardware.device import supports_fast_bfloat16
from engine.precision import fp8_native as native
from engine.precision.fp8 import NativeBackend, check_device
from engine.precision.fp8_native import (
    E4M3,
    E5M2,
    Cast,
    DelayedScales,
    Made,
    NativeMatmul,
    cast_by,
    cast_by_own,
    largest,
    multiply,
    scaled_product,
)
from engine.precision.precision import Precision
from model import LanguageModel, build_model
from model.bdh import tiling as bdh_tiles
from model.matmul import Accumulator, OperandId, PlainMatmul

CPU, BF16 = torch.device("cpu"), torch.bfloat16
FAST = BF16 if supports_fast_bfloat16(CPU) else torch.float32  # of what is not in 8 bits
ERROR = {E4M3: 2**-4, E5M2: 2**-3}  # half a step between neighbours, relative
NAMES = ("bdh", "gpt", "llama")


def model_of(name: str, **options: Any) -> LanguageModel:
    model = {"name": name, "n_layer": 2, "n_embd": 64, "n_head": 4, "dropout": 0.0, **options}
    if name == "bdh":
        model.setdefault("mlp_internal_dim_multiplier", 16)
    torch.manual_seed(0)
    return build_model(Config.from_dict({"model": model, "training": {"block_size": 64}}))


def bound(model: LanguageModel, **fp8: Any) -> NativeBackend:
    resolved = {"recipe": "current", "format": "hybrid", **fp8}  # as a Config does
    return NativeBackend(Fp8Config(**resolved), model, CPU, FAST)


def train_once(model: nn.Module, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one pass."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=BF16, enabled=FAST is BF16):
        logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


TOKENS = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1))


# ---- casts


@given(
    scale=st.floats(1e-20, 1e20),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([E4M3, E5M2]),
    spread=st.floats(0, 4),
)
@settings(max_examples=50, deadline=None)
def test_a_cast_errs_by_half_a_step_at_most(
    scale: float, seed: int, dtype: torch.dtype, spread: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(2, 16, 48, generator=draw)
        * torch.randn(2, 16, 48, generator=draw).exp() ** spread
    )
    x *= scale
    rows, inverse, most = cast_by_own(x, dtype)
    assert torch.equal(most, x.abs().amax((1, 2)))
    error = (rows.float() * inverse.view(-1, 1, 1) - x).abs()
    smallest = torch.finfo(dtype).smallest_normal * ERROR[dtype] * inverse.view(-1, 1, 1)
    assert (error <= x.abs() * ERROR[dtype] * 1.001 + smallest).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_largest_number_takes_the_whole_range_and_zeros_stay_zeros(dtype: torch.dtype) -> None:
    x = torch.stack((torch.linspace(-3, 2, 32).view(4, 8), torch.zeros(4, 8)))
    rows, inverse, _ = cast_by_own(x, dtype)
    assert rows[0].float().abs().max() == largest(dtype)
    assert rows[1].float().count_nonzero() == 0 and inverse.isfinite().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_numbers_beyond_a_given_scale_are_clipped_not_infinite(dtype: torch.dtype) -> None:
    rows, most = cast_by(torch.tensor([[[1e6, -1e6, 1.0]]]), torch.tensor(1.0), dtype)
    assert rows.float().tolist() == [[[largest(dtype), -largest(dtype), 1.0]]] and most == 1e6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = torch.ones(1, 2, 16)
    x[0, 0, 3] = bad
    rows, inverse, _ = cast_by_own(x, E4M3)
    assert not (rows.float() * inverse).isfinite().all()
    scales = scales_of()  # nor by clipping it to an old scale
    scales.advance(lambda values: values)
    delayed = NativeMatmul((E4M3, E5M2, BF16), scales)
    assert not values_of(delayed.activation(x, OperandId("x", 0))).isfinite().all()


# ---- products


def products_of(fmt: str, dtype: torch.dtype = BF16) -> NativeMatmul:
    return NativeMatmul((E4M3, E5M2 if fmt == "hybrid" else E4M3, dtype), None)


def values_of(cast: Cast) -> Tensor:
    """The numbers that the bits stand for."""
    return cast.rows.double() * cast.scale.view(-1, 1, 1).double()


@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    heads=st.sampled_from([(1, 1), (1, 3), (3, 3)]),
    fmt=st.sampled_from(["hybrid", "e4m3"]),
    dtype=st.sampled_from([BF16, torch.float32]),
)
@settings(max_examples=40, deadline=None)
def test_all_three_products_are_those_of_what_the_bits_stand_for(
    sizes: tuple[int, int, int], heads: tuple[int, int], fmt: str, dtype: torch.dtype
) -> None:
    M, K, N = (16 * size for size in sizes)
    few, g = heads
    draw = torch.Generator().manual_seed(M + K + N)
    products = products_of(fmt, dtype)
    x = products.activation(torch.randn(few, M, K, generator=draw), OperandId("x", 0))
    w = products.weight(torch.randn(g, N, K, generator=draw).mT, "w")
    dy = products.gradient(torch.randn(g, M, N, generator=draw) * 1e-6, OperandId("dy", 0))
    made = Made.count
    pairs = [
        (products.forward(x, w), values_of(x) @ values_of(w)),
        (products.grad_input(dy, w), values_of(dy) @ values_of(w).mT),
        (products.grad_weight(x, dy), values_of(x).mT @ values_of(dy)),
    ]
    assert Made.count - made == 3 * g
    for product, exact in pairs:
        assert product.shape == exact.shape
        limit = 5e-3 if product.dtype is BF16 else 1e-5
        assert (product.double() - exact).norm() <= limit * exact.norm()
    assert pairs[2][0].dtype is torch.float32  # gradients of weights are not rounded again


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
def test_a_cpu_multiplies_8_bit_operands_as_scaled_mm_does(
    formats: tuple[torch.dtype, torch.dtype], dtype: torch.dtype
) -> None:
    """On a shape so small that torch's own product on a CPU with AMX takes a millisecond."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(16, 32, generator=draw).mul(99).to(kind) for kind in formats)
    scales = torch.tensor(0.0123), torch.tensor(3.7e-9)
    expected = torch._scaled_mm(left, right.mT, *scales, out_dtype=dtype)
    out = torch.full((16, 16), torch.nan, dtype=dtype)
    assert multiply(left, right, scales, False, out) is out
    # Both round once to `dtype`; before that, sums of terms up to `size` in float32.
    size = (left.float().abs() @ right.float().abs().mT) * scales[0] * scales[1]
    near = 1e-6 * size + (2**-8 * expected.float().abs() if dtype is BF16 else 0)
    assert ((out.float() - expected.float()).abs() <= near).all()
    infinite = multiply(left, right, (scales[0], torch.tensor(torch.nan)), False, out)
    assert infinite.isnan().all()


def test_products_go_into_buffers_and_sums() -> None:
    products, draw = products_of("hybrid"), torch.Generator().manual_seed(0)
    x = products.activation(torch.randn(2, 32, 16, generator=draw), OperandId("x", 0))
    w = products.weight(torch.randn(2, 16, 48, generator=draw), "w")
    buffer = torch.empty(2, 32, 48, dtype=BF16)
    assert products.forward(x, w, buffer) is buffer
    assert torch.equal(buffer, products.forward(x, w))
    total = Accumulator(torch.empty(2, 32, 48), Tensor.add_)
    for _ in range(3):
        products.forward(x, w, total)
    torch.testing.assert_close(total.total, 3 * buffer.float(), rtol=2**-7, atol=1e-3)


def test_weights_are_cast_by_head_and_taken_by_heads() -> None:
    products, plain = products_of("hybrid"), PlainMatmul()
    value = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0))
    value[2] *= 1000
    whole = products.weight(value, "w")
    assert len(whole) == len(plain.weight(value, "w")) == 4
    part = whole[1:3]
    assert torch.equal(values_of(part), values_of(whole)[1:3])
    assert torch.equal(part.columns.float(), part.rows.float().mT)
    assert (values_of(whole)[0] - value[0]).abs().max() < 0.1 * value[0].abs().max()


# ---- models


@pytest.mark.parametrize("fmt", ["hybrid", "e4m3"])
def test_products_by_delayed_scales_are_those_of_what_the_bits_stand_for(fmt: str) -> None:
    draw = torch.Generator().manual_seed(0)
    backward = E5M2 if fmt == "hybrid" else E4M3
    slots = {OperandId("x", 0): E4M3, OperandId("w", 0): E4M3, OperandId("dy", 0): backward}
    scales = DelayedScales(Fp8Config(recipe="delayed"), slots, CPU)
    products = NativeMatmul((E4M3, backward, torch.float32), scales)
    products.recording = True
    x, w = torch.randn(1, 64, 32, generator=draw), torch.randn(3, 32, 48, generator=draw)
    dy = torch.randn(3, 64, 48, generator=draw) * 1e-6
    for _ in range(2):
        ready = (
            products.activation(x, OperandId("x", 0)),
            products.weight(w, "w"),
            products.gradient(dy, OperandId("dy", 0)),
        )
        scales.advance(lambda values: values)
    a, b, g = ready  # by the maxima of the first step, which are the same
    assert (values_of(a) - x).norm() < 0.05 * x.norm()
    assert (values_of(g) - dy).norm() < 0.1 * dy.norm()
    for product, exact in (
        (products.forward(a, b), values_of(a) @ values_of(b)),
        (products.grad_input(g, b), values_of(g) @ values_of(b).mT),
        (products.grad_weight(a, g), values_of(a).mT @ values_of(g)),
    ):
        assert (product.double() - exact).norm() < 1e-5 * exact.norm()


def launched(model: nn.Module, name: str, training: bool) -> int:
    """The 8-bit products of one pass, by the definition of the model."""
    if name == "bdh":  # every head: s, v, y forward; s, v, dz, dF, dG, da, dE, dx backward
        return 2 * 4 * (11 if training else 3)
    return (3 if training else 1) * 2 * 4


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_product_with_a_hidden_weight_is_made_in_8_bits_and_counted(
    name: str, recipe: str
) -> None:
    model = model_of(name)
    backend = bound(model, recipe=recipe)
    hidden = {id(weight) for weight, _ in model.hidden_weights()}
    names = {n for n, p in model.named_parameters() if id(p) in hidden}
    assert set(backend.covered) == names and not any("head" in n or "emb" in n for n in names)
    train_once(model, TOKENS)
    assert backend.calls == launched(model, name, training=True)
    before = backend.calls
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16, enabled=FAST is BF16):
        model.eval()(TOKENS[:, :-1])
    assert backend.calls - before == launched(model, name, training=False)


@pytest.mark.parametrize("fmt", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_near_those_of_bfloat16(name: str, recipe: str, fmt: str) -> None:
    loss, grads = train_once(model_of(name), TOKENS)
    model = model_of(name)
    backend = bound(model, recipe=recipe, format=fmt)
    if recipe == "delayed":  # the second step is the first one with scales of the past
        with backend.training():
            train_once(model, TOKENS)
        backend.end_step(lambda values: values)
        assert backend.scales is not None and backend.scales.steps == 1
    loss8, grads8 = train_once(model, TOKENS)
    assert abs(loss8 - loss) < 0.01 and loss8 != loss
    for parameter, grad in grads.items():
        cosine = nn.functional.cosine_similarity(grad.flatten(), grads8[parameter].flatten(), 0)
        assert cosine > 0.95, parameter


def test_several_tiles_chunks_and_documents_train_in_8_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bdh_tiles, "_CPU_TILE", 1)  # so the narrowest tiles: 1024 neurons
    shape = {"n_layer": 1, "mlp_internal_dim_multiplier": 80, "mask": "causal_document"}
    model, plain = model_of("bdh", **shape), model_of("bdh", **shape)
    backend = bound(model)
    tokens = torch.randint(256, (1, 544), generator=torch.Generator().manual_seed(2))
    documents = (torch.arange(544) // 200).expand(1, -1)
    grads = []
    for each in (plain, model):
        with torch.autocast("cpu", dtype=BF16, enabled=FAST is BF16):
            logits = each(tokens, documents)
        logits.float().square().mean().backward()
        (grad,) = (p.grad for n, p in each.named_parameters() if n == "encoder")
        assert grad is not None
        grads.append(grad.flatten())
    assert nn.functional.cosine_similarity(grads[0], grads[1], 0) > 0.95
    assert backend.calls == 2 * 4 * 11  # two tiles of each of four heads


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_layers_make_the_same_products_and_are_counted() -> None:
    model = model_of("gpt", n_layer=1, bias=True)
    backend = bound(model)
    loss, _ = train_once(model, TOKENS)
    made = backend.calls
    model.compile(backend="aot_eager")  # traced as for inductor, whose code is not the subject
    compiled, _ = train_once(model, TOKENS)
    assert backend.calls == 2 * made
    assert abs(compiled - loss) < 0.01


def test_a_linear_layer_keeps_its_bias_and_its_shape() -> None:
    model, plain = model_of("gpt", bias=True), model_of("gpt", bias=True)
    bound(model)
    layer, other = (
        model.get_submodule("transformer.h.0.mlp.c_fc"),
        plain.get_submodule("transformer.h.0.mlp.c_fc"),
    )
    with torch.no_grad():
        for each in (layer, other):
            each.get_parameter("bias").fill_(3.0)
    x = torch.randn(2, 16, 64)
    y, exact = layer(x), other(x)
    assert y.shape == exact.shape
    assert (y - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bdh", {"n_embd": 72}, "encoder is 72 x 288, and 8-bit products take multiples of 16"),
        ("gpt", {"n_embd": 72}, "transformer.h.0.attn.c_attn.weight is 216 x 72"),
        ("llama", {"d_ff": 100}, "layers.0.mlp.w13.weight is 200 x 64"),
    ],
)
def test_a_side_that_8_bit_products_cannot_take_is_named(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        bound(model_of(name, **options))
    assert message in str(caught.value) and "low_precision.use_fp8: false" in str(caught.value)


def test_cuda_would_take_the_shapes_and_layouts_of_all_products() -> None:
    """torch's own checks for CUDA, on tensors without memory: stricter than those of a CPU."""
    with FakeTensorMode():
        for M, K, N in ((16, 32, 48), (64, 16, 16)):
            left = torch.empty(M, K, dtype=E4M3, device="cuda")
            one = torch.ones((), device="cuda")
            right = torch.empty(N, K, dtype=E5M2, device="cuda")
            y = torch._scaled_mm(left, right.mT, one, one, out_dtype=BF16)
            assert y.shape == (M, N)
            with pytest.raises(RuntimeError, match="col_major"):
                wrong = torch.empty(K, N, dtype=E5M2, device="cuda")
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
        patch.setattr(native, "multiply", checked)
        for name in NAMES:
            model = model_of(name)
            bound(model)
            train_once(model, TOKENS)
    assert made == 88 + 24 + 24


# ---- delayed scaling


def scales_of(algo: str = "max", length: int = 3) -> DelayedScales:
    fp8 = Fp8Config(recipe="delayed", amax_history_len=length, amax_compute_algo=algo)  # type: ignore[arg-type]
    return DelayedScales(fp8, {OperandId("x", 0): E4M3, OperandId("dy", 0): E5M2}, CPU)


@given(
    maxima=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    length=st.integers(1, 5),
    algo=st.sampled_from(["max", "most_recent"]),
)
@settings(max_examples=60, deadline=None)
def test_a_scale_follows_from_the_steps_before(maxima: list[float], length: int, algo: str) -> None:
    scales, seen, expected = scales_of(algo, length), list[float](), 1.0
    assert scales.known(OperandId("x", 0)) is None
    for most in maxima:
        scales.note(OperandId("x", 0), torch.tensor([most / 2, most]))
        scales.note(OperandId("x", 0), torch.tensor([most / 3]))
        scales.advance(lambda values: values)
        seen.append(float(torch.tensor(most)))
        past = max(seen[-length:]) if algo == "max" else seen[-1]
        expected = largest(E4M3) / max(past, 2.0**-100) if past > 0 else expected
        known = scales.known(OperandId("x", 0))
        assert known is not None and known.item() == pytest.approx(expected, rel=1e-6)


def test_clipped_operands_are_counted() -> None:
    scales = scales_of()
    for most in (1.0, 1.0, 2.0, 1.5):  # the third is above all before it
        scales.note(OperandId("x", 0), torch.tensor(most))
        scales.advance(lambda values: values)
    assert scales.take_clipped() == pytest.approx(1 / 6)  # two operands, three steps with a scale
    assert scales.take_clipped() is None


def test_maxima_are_those_of_all_processes() -> None:
    scales = scales_of()
    scales.note(OperandId("x", 0), torch.tensor(1.0))
    scales.advance(lambda values: values.mul_(4))
    known = scales.known(OperandId("x", 0))
    assert known is not None and known.item() == largest(E4M3) / 4


def test_only_the_passes_of_a_step_count_for_later_scales() -> None:
    model = model_of("gpt")
    backend = bound(model, recipe="delayed")
    train_once(model, TOKENS)  # a trial
    assert backend.scales is not None and backend.scales.present.count_nonzero() == 0
    with backend.training():
        train_once(model, TOKENS)
    assert backend.scales.present.count_nonzero() == len(backend.scales.present)
    backend.end_step(lambda values: values)
    history = backend.scales.history.clone()
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16, enabled=FAST is BF16):
        model.eval()(TOKENS[:, :-1])
    assert torch.equal(backend.scales.history, history)
    assert backend.scales.present.count_nonzero() == 0


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_delayed_scales_come_back_bit_for_bit(name: str) -> None:
    def steps(model: nn.Module, backend: NativeBackend, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            with backend.training():
                losses.append(train_once(model, TOKENS)[0])
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.1)
            backend.end_step(lambda values: values)
        return losses

    model = model_of(name)
    backend = bound(model, recipe="delayed", amax_history_len=4)
    steps(model, backend, 3)
    state, weights = saved_and_loaded(backend.state_dict()), saved_and_loaded(model.state_dict())
    on = steps(model, backend, 4)
    other = model_of(name)
    resumed = bound(other, recipe="delayed", amax_history_len=4)
    other.load_state_dict(weights)
    assert resumed.load_state_dict(state)
    assert steps(other, resumed, 4) == on
    others = [
        bound(model_of(name, n_layer=1), recipe="delayed", amax_history_len=4),
        bound(model_of(name), recipe="delayed", amax_history_len=5),
        bound(model_of(name), recipe="delayed", amax_history_len=4, format="e4m3"),
    ]
    for afresh in others:
        assert not afresh.load_state_dict(state)
        assert not afresh.load_state_dict({"encoder.0": {}})  # of another backend
        assert afresh.scales is not None and afresh.scales.steps == 0


# ---- devices, proof


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], torch.device]:
    def pretend(capability: tuple[int, int]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
        return torch.device("cuda", 0)

    return pretend


def test_a_gpu_without_8_bit_products_is_named(
    gpu: Callable[[tuple[int, int]], torch.device],
) -> None:
    with pytest.raises(ConfigError) as caught:
        Precision(LowPrecisionConfig(use_fp8=True), gpu((8, 0)), Fp8Config())
    assert str(caught.value) == (
        "low_precision.use_fp8=true: needs compute capability 8.9 or newer (Ada, Hopper, "
        "Blackwell); cuda:0 (NVIDIA A100) has 8.0. Set low_precision.use_fp8: false."
    )
    check_device(Fp8Config(), gpu((9, 0)))
    check_device(Fp8Config(), CPU)
    with pytest.raises(ConfigError, match="mps has no products of 8-bit floats"):
        check_device(Fp8Config(), torch.device("mps"))


def test_a_run_whose_8_bit_products_are_none_stops() -> None:
    fp8 = Fp8Config(recipe="current", format="hybrid")
    precision = Precision(LowPrecisionConfig(use_fp8=True, use_4bit=False), CPU, fp8)
    model = model_of("gpt")
    (line,) = precision.prepare(model, 10)
    assert line.startswith("fp8: 8 of 9 matmuls, native, current scaling; lm_head ")
    with pytest.raises(RuntimeError, match="no 8-bit product is made"):
        precision.verify_fp8_used(lambda: None)
    (told,) = precision.verify_fp8_used(lambda: train_once(model, TOKENS))
    assert told == "fp8: 24 products in a trial step"
    assert precision.metrics() == {}
    with precision.training(1):
        train_once(model, TOKENS)
    train_once(model, TOKENS)  # an evaluation: not of a step
    assert precision.metrics() == {"train/fp8_products": 24}
    with precision.training(2):
        pass
    with pytest.raises(RuntimeError, match="no 8-bit product is made"):
        precision.metrics()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU with 8-bit products")
@pytest.mark.parametrize("fmt", ["hybrid", "e4m3"])
def test_a_gpu_makes_the_products_that_a_cpu_makes(fmt: str) -> None:
    draw, both = torch.Generator().manual_seed(0), []
    x, w, dy = (torch.randn(2, *s, generator=draw) for s in ((64, 32), (32, 48), (64, 48)))
    for device in ("cpu", "cuda"):
        products = products_of(fmt)
        a, b = (
            products.activation(x.to(device), OperandId("x", 0)),
            products.weight(w.to(device), "w"),
        )
        g = products.gradient(dy.to(device), OperandId("dy", 0))
        made = products.forward(a, b), products.grad_input(g, b), products.grad_weight(a, g)
        both.append([each.float().cpu() for each in made])
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_the_operator_tells_compilers_its_shape() -> None:
    x, _, _ = cast_by_own(torch.randn(1, 32, 16), E4M3)
    one = torch.ones(())
    checks = ("test_faketensor",)  # the others multiply 8-bit tensors, which torch cannot
    torch.library.opcheck(scaled_product, (x[0], x[0], [one, one], True, BF16), test_utils=checks)
