"""How the project calls Transformer Engine, against a stub with its names and rules.

These are tests of wiring only: Transformer Engine needs a GPU, and only the test at the end runs on
one.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from config import ConfigError, Fp8Config, LowPrecisionConfig
from engine.precision.fp8_te import INSTALL, TransformerEngineBackend
from engine.precision.precision import Precision
from model import LanguageModel
from tests.precision import te_stub
from tests.precision.conftest import (
    NAMES,
    build,
    gradients_of,
    loss_of,
    saved_and_loaded,
    weights_of,
)

CUDA = torch.device("cuda", 0)  # by name only
TOKENS = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(1))
EXPECTED = {  # modules and weights, and how often a forward pass of two layers uses each
    "bdh": {("Linear", (1024, 64)): 2, ("GroupedLinear", (256, 64)): 8, ("Linear", (64, 1024)): 2},
    "gpt": {
        ("Linear", (192, 64)): 2,
        ("Linear", (64, 64)): 2,
        ("Linear", (256, 64)): 2,
        ("Linear", (64, 256)): 2,
    },
    "llama": {
        ("Linear", (128, 64)): 2,
        ("Linear", (64, 64)): 2,
        ("Linear", (352, 64)): 2,
        ("Linear", (64, 176)): 2,
    },
}
each_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> te_stub.Stub:
    return te_stub.install(monkeypatch)


def small(name: str, **options: Any) -> LanguageModel:
    extra = {"n_kv_head": 2, "d_ff": 176} if name == "llama" else {}
    return build(name, **{**extra, **options})


def attached(model: LanguageModel, **fp8: Any) -> TransformerEngineBackend:
    resolved = Fp8Config(**{"recipe": "current", "format": "hybrid", **fp8})  # as a Config does
    return TransformerEngineBackend(resolved, CUDA, model)


def step(
    model: LanguageModel, backend: TransformerEngineBackend | None, tokens: Tensor = TOKENS
) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    if backend is None:
        loss = loss_of(model, tokens)
    else:
        with backend.autocast():
            loss = loss_of(model, tokens)
    torch.autograd.backward(loss)
    return {"loss": loss.detach(), **gradients_of(model)}


@each_model
def test_values_and_gradients_are_the_plain_models_and_each_weight_is_used_once_per_layer(
    name: str, stub: te_stub.Stub
) -> None:
    options: dict[str, Any] = {"bias": True, "tie_embeddings": True} if name == "gpt" else {}
    for recipe in ("current", "delayed"):
        model = small(name, **options).double()
        for own, parameter in model.named_parameters():
            if own.endswith("bias"):
                torch.nn.init.normal_(parameter)
        before, expected = dict(model.state_dict()), step(model, None)
        stub.calls.clear()
        backend = attached(model, recipe=recipe)
        found = step(model, backend)
        assert found.keys() == expected.keys() == {"loss", *dict(model.named_parameters())}
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9, msg=key)
        hidden = {id(weight) for weight, _ in model.hidden_weights()}
        names = {own for own, parameter in model.named_parameters() if id(parameter) in hidden}
        assert set(backend.covered) == names and len(backend.covered) == len(names)
        assert Counter(stub.calls) == {(*k, True): count for k, count in EXPECTED[name].items()}
        assert backend.matmul_count == (6 if name == "bdh" else 8)
        # The model's state does not change, and the modules take no memory.
        assert model.state_dict().keys() == before.keys()
        assert all(p.is_meta for module in backend.modules.values() for p in module.parameters())


@each_model
def test_under_autocast_products_are_bfloat16_and_gradients_float32(
    name: str, stub: te_stub.Stub
) -> None:
    model = small(name)
    expected = step(model, None)
    backend = attached(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(model, backend)
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        assert (found[key] - value).norm() < 0.08 * value.norm().clamp(min=1e-12), key


def test_outside_its_autocast_any_shape_will_do_and_nothing_counts_as_fp8(
    stub: te_stub.Stub,
) -> None:
    for name in NAMES:
        model, tokens = small(name), TOKENS[:1, :6]
        expected = step(model, None, tokens)
        backend = attached(model)
        found = step(model, None, tokens)
        assert backend.matmul_count == 0 and not any(fp8 for _, _, fp8 in stub.calls)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
def test_recipes_are_made_of_the_options(form: str, stub: te_stub.Stub) -> None:
    kind = te_stub.Format.HYBRID if form == "hybrid" else te_stub.Format.E4M3
    for recipe, name in zip(("current", "delayed", "block", "mxfp8"), te_stub.RECIPES, strict=True):
        options: dict[str, Any] = {"amax_history_len": 16, "amax_compute_algo": "most_recent"}
        backend = attached(small("gpt"), recipe=recipe, format=form, **options)
        taken = options if recipe == "delayed" else {}
        with backend.autocast():
            assert stub.recipe == te_stub.Recipe(name, kind, **taken)
        assert backend.summary.startswith(f"transformer_engine, {recipe}")
        if recipe != "delayed":  # the others keep no state
            assert backend.state_dict() == backend.metrics() == {}
            assert backend.load_state_dict({}) and backend.load_state_dict({"x": torch.ones(1)})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, which it hides
def test_a_compiled_model_calls_the_same_modules(stub: te_stub.Stub) -> None:
    """Traced, but not turned into machine code."""
    model = small("gpt")
    expected = step(model, None)
    backend = attached(model)
    model.compile(backend="eager")
    for _ in range(3):
        found = step(model, backend)
    assert backend.matmul_count == 24 and len(stub.calls) == 24
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


# ---- delayed scaling


def precision_of(model: LanguageModel, **fp8: Any) -> Precision:
    """A run's precision with the stub's modules, computing on a CPU in float32."""
    low = LowPrecisionConfig(use_4bit=False, compute_dtype="float32")
    precision = Precision(low, torch.device("cpu"))
    precision.fp8 = attached(model, recipe="delayed", amax_history_len=4, **fp8)
    return precision


def pass_of(model: LanguageModel, precision: Precision, tokens: Tensor) -> None:
    with precision.autocast():
        loss = loss_of(model, tokens)
    precision.backward(loss)


def trained(precision: Precision, model: LanguageModel, seeds: range) -> dict[str, Tensor]:
    """The weights after a step of SGD for each seed."""
    for seed in seeds:
        tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        with precision.training(seed + 1):
            pass_of(model, precision, tokens)
        precision.step(torch.optim.SGD(model.parameters(), lr=0.5), lambda values: values)
    return weights_of(model)


@each_model
def test_scales_resume_bit_for_bit(name: str, stub: te_stub.Stub) -> None:
    stub.rounding = True
    model = small(name)
    precision = precision_of(model)
    trained(precision, model, range(3))
    state, weights = saved_and_loaded(precision.state_dict()), saved_and_loaded(model.state_dict())
    assert len(state["fp8"]) == 4 * (6 if name == "bdh" else 8)
    assert all((value != 1).any() for key, value in state["fp8"].items() if key.endswith("scale"))
    expected, same = trained(precision, model, range(3, 6)), {}
    for restored in (True, False):
        model = small(name)
        model.load_state_dict(weights)
        precision = precision_of(model)
        if restored:
            assert precision.load_state_dict(state) == []
            again = precision.state_dict()["fp8"]
            assert all(torch.equal(again[key], value) for key, value in state["fp8"].items())
        found = trained(precision, model, range(3, 6))
        same[restored] = all(torch.equal(found[key], value) for key, value in expected.items())
    assert same == {True: True, False: False}


@pytest.mark.parametrize("kind", ["trial", "no_grad", "inference"])
@each_model
def test_only_training_leaves_a_trace_in_scales(name: str, kind: str, stub: te_stub.Stub) -> None:
    """Neither a trial step nor an evaluation does, also before the first step."""
    states: list[dict[str, Tensor]] = []
    for disturbed in (False, True):
        model = small(name)
        precision = precision_of(model)
        for seed in range(2):
            if disturbed and kind == "trial":
                pass_of(model, precision, torch.ones_like(TOKENS))
            elif disturbed:
                context = torch.no_grad() if kind == "no_grad" else torch.inference_mode()
                with context, precision.autocast():
                    loss_of(model, torch.ones_like(TOKENS))
            states.append(precision.state_dict()["fp8"])
            trained(precision, model, range(seed, seed + 1))
        states.append(precision.state_dict()["fp8"])
    for undisturbed, other in zip(states[:3], states[3:], strict=True):
        assert undisturbed.keys() == other.keys()
        assert all(torch.equal(other[key], value) for key, value in undisturbed.items())
    assert any(not torch.equal(states[2][key], value) for key, value in states[1].items())


def test_the_stub_refuses_a_module_that_is_called_twice(stub: te_stub.Stub) -> None:
    model = small("bdh")
    backend = attached(model, recipe="delayed")
    for weight in ("encoder", "encoder_v", "decoder"):
        backend.modules[f"{weight}.1"] = backend.modules[f"{weight}.0"]
    with pytest.raises(RuntimeError, match="twice in one autocast"):
        step(model, backend)


def test_scales_of_another_run_are_not_taken_over(stub: te_stub.Stub) -> None:
    backend = attached(small("bdh"), recipe="delayed", amax_history_len=4)
    own = backend.state_dict()
    others: list[dict[str, Any]] = [{}, {"history": 4, "scale": torch.ones(3)}]
    for name, length in (("bdh", 8), ("gpt", 4)):
        others.append(attached(small(name), recipe="delayed", amax_history_len=length).state_dict())
    assert not any(backend.load_state_dict(other) for other in others)
    assert all(torch.equal(backend.state_dict()[key], value) for key, value in own.items())


# ---- what it refuses


def test_without_a_gpu_or_the_library_what_helps_is_named(
    stub: te_stub.Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = Fp8Config(recipe="current", format="hybrid")
    with pytest.raises(ConfigError, match="runs on CUDA only, and the device is cpu.*native"):
        TransformerEngineBackend(current, torch.device("cpu"), small("gpt"))
    monkeypatch.delattr(sys.modules["transformer_engine.pytorch"], "autocast")  # an old version
    for _ in range(2):
        with pytest.raises(ConfigError) as refusal:
            attached(small("gpt"))
        assert INSTALL in str(refusal.value) and "fp8.backend: native" in str(refusal.value)
        monkeypatch.setitem(sys.modules, "transformer_engine", None)


@pytest.mark.parametrize(
    ("recipe", "function"),
    [
        ("current", "is_fp8_available"),
        ("delayed", "is_fp8_available"),
        ("block", "is_fp8_block_scaling_available"),
        ("mxfp8", "is_mxfp8_available"),
    ],
)
def test_a_gpu_that_cannot_is_named_with_the_reason(
    recipe: str, function: str, stub: te_stub.Stub
) -> None:
    stub.unavailable[function] = "Device compute capability 8.9 or higher required."
    with pytest.raises(ConfigError) as refusal:
        attached(small("gpt"), recipe=recipe)
    text = str(refusal.value)
    assert f"low_precision.use_fp8 with fp8.recipe={recipe}" in text
    assert "NVIDIA Stub 100, of compute capability 9.0: Device compute capability 8.9" in text
    assert "low_precision.use_fp8: false" in text
    assert ("fp8.recipe: current" in text) == (recipe in ("block", "mxfp8"))


def test_weights_and_tokens_that_do_not_fit_are_named(stub: te_stub.Stub) -> None:
    with pytest.raises(ConfigError, match=r"w13.weight is 80 x 64.*mxfp8 take multiples of 32"):
        attached(build("llama", d_ff=40, n_kv_head=2), recipe="mxfp8")
    for name in NAMES:
        for recipe, tokens, multiple in (("current", 24, 16), ("mxfp8", 48, 32)):
            model = build(name)
            backend = attached(model, recipe=recipe)
            with backend.autocast(), pytest.raises(ConfigError) as refusal:
                model(torch.randint(256, (2, tokens // 2)))
            assert f"multiples of {multiple} tokens, which {tokens} is not" in str(refusal.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Transformer Engine runs on CUDA only")
@pytest.mark.parametrize("recipe", ["current", "delayed", "block", "mxfp8"])
@each_model
def test_on_a_gpu_fp8_errs_by_its_rounding(name: str, recipe: str) -> None:
    sizes = {"n_embd": 128, "n_kv_head": 2} if name == "llama" else {"n_embd": 128}
    model, tokens = small(name, **sizes).to(CUDA), torch.randint(256, (4, 65)).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = step(model, None, tokens)
        try:
            backend = attached(model, recipe=recipe)
        except ConfigError as refusal:
            pytest.skip(str(refusal))
        with backend.training():
            found = step(model, backend, tokens)
    assert backend.matmul_count == (6 if name == "bdh" else 8)
    for key, value in expected.items():
        error = (found[key].float() - value.float()).norm() / value.float().norm()
        assert (0 < error < 0.3) if key != "loss" else error < 0.05, key
