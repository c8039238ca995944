"""How the project calls Transformer Engine, against a stub with its signatures and rules.

These are tests of wiring only: Transformer Engine needs a GPU, and nothing here has run on one but
the tests at the end, which say so where they are skipped.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from config import BDHConfig, ConfigError, Fp8Config, ModelConfig
from engine.precision.fp8_te import INSTALL, TransformerEngineBackend
from model import LanguageModel
from model.bdh import BDH
from model.gpt import GPT
from model.llama import Llama
from tests.precision import te_stub

CUDA = torch.device("cuda", 0)  # by name only
ROWS = (2, 32)
EXPECTED = {  # modules, weights and how often each is used by one forward pass of two layers
    "bdh": {("Linear", (64, 16)): 2, ("GroupedLinear", (32, 16)): 4, ("Linear", (16, 64)): 2},
    "gpt": {
        ("Linear", (96, 32)): 2,
        ("Linear", (32, 32)): 2,
        ("Linear", (128, 32)): 2,
        ("Linear", (32, 128)): 2,
    },
    "llama": {
        ("Linear", (64, 32)): 2,
        ("Linear", (32, 32)): 2,
        ("Linear", (192, 32)): 2,
        ("Linear", (32, 96)): 2,
    },
}
COVERED = {
    "bdh": {"encoder", "encoder_v", "decoder"},
    "gpt": {
        f"transformer.h.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
    "llama": {
        f"layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("attn.wqkv", "attn.wo", "mlp.w13", "mlp.w2")
    },
}
NAMES = tuple(EXPECTED)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> te_stub.Stub:
    return te_stub.install(monkeypatch)


def small(name: str, **changes: Any) -> Any:
    """A model of two layers, the same each time."""
    torch.manual_seed(0)
    if name == "bdh":
        return BDH(
            BDHConfig(
                **{
                    "n_layer": 2,
                    "n_embd": 16,
                    "n_head": 2,
                    "dropout": 0.0,
                    "mlp_internal_dim_multiplier": 4,
                    "vocab_size": 256,
                    **changes,
                }
            )
        )
    options = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 256, "dropout": 0.0}
    if name == "gpt":
        return GPT(ModelConfig(**{**options, "name": "gpt", **changes}), 64)
    options |= {"n_kv_head": 1, "d_ff": 96}
    return Llama(ModelConfig(**{**options, "name": "llama", **changes}))


def resolved(**fp8: Any) -> Fp8Config:
    """The options as a Config gives them, without `auto`."""
    return Fp8Config(**{"recipe": "current", "format": "hybrid", **fp8})


def attached(model: LanguageModel, **fp8: Any) -> TransformerEngineBackend:
    return TransformerEngineBackend(resolved(**fp8), CUDA, model)


def step(
    model: nn.Module, tokens: Tensor, engine: TransformerEngineBackend | None
) -> dict[str, Tensor]:
    """Logits and the gradient of every parameter."""
    model.zero_grad()
    if engine is None:
        logits = model(tokens)
    else:
        with engine.autocast():
            logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_the_plain_models(
    name: str, recipe: str, stub: te_stub.Stub
) -> None:
    model, tokens = small(name).double(), torch.randint(256, ROWS)
    expected = step(model, tokens, None)
    found = step(model, tokens, attached(model, recipe=recipe))
    assert found.keys() == expected.keys() == {"logits", *dict(model.named_parameters())}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_each_weight_is_multiplied_in_fp8_once_per_layer(name: str, stub: te_stub.Stub) -> None:
    model, tokens = small(name), torch.randint(256, ROWS)
    engine = attached(model)
    assert set(engine.covered) == COVERED[name] and len(engine.covered) == len(COVERED[name])
    step(model, tokens, engine)
    assert Counter(stub.calls) == {(*key, True): count for key, count in EXPECTED[name].items()}
    assert engine.calls == (6 if name == "bdh" else 8)
    assert {id(p) for p in model.embedding_and_head()}.isdisjoint(
        {id(dict(model.named_parameters())[key]) for key in engine.covered}
    )


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_products_are_bfloat16_and_gradients_float32(
    name: str, stub: te_stub.Stub
) -> None:
    model, tokens = small(name), torch.randint(256, ROWS)
    expected = step(model, tokens, None)
    engine = attached(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(model, tokens, engine)
    assert all(found[key].dtype == torch.float32 for key in dict(model.named_parameters()))
    for key, value in expected.items():
        error = (found[key].float() - value).norm() / value.norm().clamp(min=1e-12)
        assert error < 0.05, key


def test_biases_and_tied_embeddings_are_those_of_the_model(stub: te_stub.Stub) -> None:
    model = small("gpt", bias=True, tie_embeddings=True).double()
    tokens = torch.randint(256, ROWS)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    expected = step(model, tokens, None)
    found = step(model, tokens, attached(model))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_the_models_state_does_not_change(name: str, stub: te_stub.Stub) -> None:
    model = small(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = attached(model)
    assert [key for key, _ in model.named_parameters()] == [
        key for key, _ in small(name).named_parameters()
    ]
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    own = [p for module in engine.modules.values() for p in module.parameters()]
    assert own and all(p.is_meta for p in own)  # no memory


@pytest.mark.parametrize("name", NAMES)
def test_outside_its_autocast_nothing_counts_as_fp8(name: str, stub: te_stub.Stub) -> None:
    model, tokens = small(name), torch.randint(256, (1, 5))  # any shape will do
    expected = step(model, tokens, None)
    engine = attached(model)
    found = step(model, tokens, None)
    assert engine.calls == 0 and not any(fp8 for _, _, fp8 in stub.calls)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["current", "delayed", "block", "mxfp8"])
@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
def test_recipes_are_made_of_the_options(recipe: str, form: str, stub: te_stub.Stub) -> None:
    fp8 = {"amax_history_len": 16, "amax_compute_algo": "most_recent"}
    engine = TransformerEngineBackend(
        Fp8Config(recipe=cast(Any, recipe), format=cast(Any, form), **cast(Any, fp8)),
        CUDA,
        small("gpt"),
    )
    kind = te_stub.Format.HYBRID if form == "hybrid" else te_stub.Format.E4M3
    expected = {
        "current": te_stub.Float8CurrentScaling(fp8_format=kind),
        "delayed": te_stub.DelayedScaling(fp8_format=kind, **cast(Any, fp8)),
        "block": te_stub.Float8BlockScaling(fp8_format=kind),
        "mxfp8": te_stub.MXFP8BlockScaling(fp8_format=kind),
    }[recipe]
    assert engine.recipe == expected and type(engine.recipe) is type(expected)
    with engine.autocast():
        assert stub.enabled and stub.recipe == expected
    assert not stub.enabled
    assert engine.summary.startswith(f"transformer_engine, {recipe}")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, which it hides
def test_a_compiled_model_calls_the_same_modules(stub: te_stub.Stub) -> None:
    """Traced, but not turned into machine code."""
    model, tokens = small("gpt"), torch.randint(256, ROWS)
    expected = step(model, tokens, None)
    engine = attached(model)
    model.compile(backend="eager")
    for _ in range(3):
        found = step(model, tokens, engine)
    assert engine.calls == 24 and len(stub.calls) == 24
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


# Delayed scaling


def trained(engine: TransformerEngineBackend, model: nn.Module, seeds: range) -> dict[str, Tensor]:
    """The weights after one step of SGD for each seed."""
    for seed in seeds:
        tokens = torch.randint(256, ROWS, generator=torch.Generator().manual_seed(seed))
        with engine.training():
            step(model, tokens, engine)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        engine.end_step(lambda values: values)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def saved(value: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_scales_resume_bit_for_bit(name: str, stub: te_stub.Stub) -> None:
    stub.rounding = True
    options: dict[str, Any] = {"recipe": "delayed", "amax_history_len": 4}
    model = small(name)
    engine = attached(model, **options)
    trained(engine, model, range(3))
    state, weights = saved(engine.state_dict()), saved(model.state_dict())
    assert len(state) == 4 * len(engine.modules)
    assert all(bool((value != 1).any()) for key, value in state.items() if key.endswith("scale"))
    expected = trained(engine, model, range(3, 6))

    resumed, others = small(name), {}
    for kind in ("with", "without"):
        resumed.load_state_dict(weights)
        engine = attached(resumed, **options)
        if kind == "with":
            assert engine.load_state_dict(state)
            again = engine.state_dict()
            assert again.keys() == state.keys()
            assert all(torch.equal(again[key], value) for key, value in state.items())
        others[kind] = trained(engine, resumed, range(3, 6))
    assert all(torch.equal(others["with"][key], value) for key, value in expected.items())
    assert not all(torch.equal(others["without"][key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", ["trial", "no_grad", "inference"])
@pytest.mark.parametrize("name", NAMES)
def test_only_training_leaves_a_trace_in_scales(name: str, kind: str, stub: te_stub.Stub) -> None:
    """Neither a trial step nor an evaluation does, also before the first step."""
    states, ones = [], torch.ones(ROWS, dtype=torch.long)
    for disturbed in (False, True):
        model = small(name)
        engine = attached(model, recipe="delayed", amax_history_len=4)
        for seed in range(2):
            if disturbed and kind == "trial":
                step(model, ones, engine)
            elif disturbed:
                context = torch.no_grad() if kind == "no_grad" else torch.inference_mode()
                with context, engine.autocast():
                    model(ones)
            states.append(engine.state_dict())
            trained(engine, model, range(seed, seed + 1))
        states.append(engine.state_dict())
    for undisturbed, other in zip(states[:3], states[3:], strict=True):
        assert undisturbed.keys() == other.keys()
        assert all(torch.equal(other[key], value) for key, value in undisturbed.items())
    assert any(not torch.equal(states[2][key], value) for key, value in states[1].items())


def test_a_state_loaded_after_an_evaluation_stays(stub: te_stub.Stub) -> None:
    model = small("bdh")
    engine = attached(model, recipe="delayed", amax_history_len=4)
    trained(engine, model, range(2))
    before = engine.state_dict()
    trained(engine, model, range(2, 4))
    with torch.inference_mode(), engine.autocast():
        model(torch.zeros(ROWS, dtype=torch.long))
    assert engine.load_state_dict(before)
    with engine.training():
        now = engine.state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.items())


def test_the_stub_refuses_a_module_that_is_called_twice(stub: te_stub.Stub) -> None:
    model = small("bdh")
    engine = attached(model, recipe="delayed")
    for layer in (0, 1):
        for weight in ("encoder", "encoder_v", "decoder"):
            engine.modules[f"{weight}.{layer}"] = engine.modules[f"{weight}.0"]
    with pytest.raises(RuntimeError, match="twice in one autocast"):
        step(model, torch.randint(256, ROWS), engine)


@pytest.mark.parametrize("recipe", ["current", "block", "mxfp8"])
def test_other_recipes_have_no_state(recipe: str, stub: te_stub.Stub) -> None:
    engine = attached(small("llama"), recipe=recipe)
    assert engine.state_dict() == engine.metrics() == {}
    assert engine.load_state_dict({}) and engine.load_state_dict({"delayed": torch.ones(1)})


def test_scales_of_another_run_are_not_taken_over(stub: te_stub.Stub) -> None:
    engine = attached(small("bdh"), recipe="delayed", amax_history_len=4)
    own = engine.state_dict()
    others: list[dict[str, Any]] = [{}, {"history": 4, "scale": torch.ones(3)}]
    for name, length in (("bdh", 8), ("gpt", 4)):
        others.append(attached(small(name), recipe="delayed", amax_history_len=length).state_dict())
    assert not any(engine.load_state_dict(other) for other in others)
    assert all(torch.equal(engine.state_dict()[key], value) for key, value in own.items())


# What it refuses


def test_a_cpu_is_refused_with_what_runs_there(stub: te_stub.Stub) -> None:
    with pytest.raises(ConfigError, match="runs on CUDA only, and the device is cpu.*native"):
        TransformerEngineBackend(resolved(), torch.device("cpu"), small("gpt"))


@pytest.mark.parametrize("broken", ["missing", "old"])
def test_without_the_library_the_command_that_installs_it_is_named(
    broken: str, stub: te_stub.Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "transformer_engine", None)
    else:
        monkeypatch.delattr(sys.modules["transformer_engine.pytorch"], "autocast")
    with pytest.raises(ConfigError) as refusal:
        TransformerEngineBackend(resolved(), CUDA, small("gpt"))
    assert INSTALL in str(refusal.value) and "fp8.backend: native" in str(refusal.value)


@pytest.mark.parametrize(
    "recipe, function",
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
        TransformerEngineBackend(resolved(recipe=recipe), CUDA, small("gpt"))
    text = str(refusal.value)
    assert f"low_precision.use_fp8 with fp8.recipe={recipe}" in text
    assert "NVIDIA Stub 100, of compute capability 8.0: Device compute capability 8.9" in text
    assert "low_precision.use_fp8: false" in text
    assert ("fp8.recipe: current" in text) == (recipe in ("block", "mxfp8"))


def test_weights_that_do_not_fit_are_named(stub: te_stub.Stub) -> None:
    with pytest.raises(ConfigError, match=r"encoder is \(2, 24, 48\).*multiples of 16"):
        attached(small("bdh", n_embd=24))
    with pytest.raises(ConfigError, match=r"mlp.w13.weight is \(80, 32\).*multiples of 32"):
        attached(small("llama", d_ff=40), recipe="mxfp8")
    attached(small("llama", d_ff=48))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe, tokens, multiple", [("current", 24, 16), ("mxfp8", 48, 32)])
def test_tokens_that_do_not_fit_are_counted(
    name: str, recipe: str, tokens: int, multiple: int, stub: te_stub.Stub
) -> None:
    changes = {"n_embd": 32} if name == "bdh" else {}
    model = small(name, **changes)
    engine = attached(model, recipe=recipe)
    with engine.autocast(), pytest.raises(ConfigError) as refusal:
        model(torch.randint(256, (2, tokens // 2)))
    assert f"multiples of {multiple} tokens, which {tokens} is not" in str(refusal.value)


# The real one


def real_step(name: str, recipe: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """A step in bfloat16, the same in FP8, and the calls that the second counted."""
    sizes = {"n_embd": 128, "n_head": 4}
    device, tokens = torch.device("cuda", 0), torch.randint(256, (4, 64)).cuda()
    model = small(name, **(sizes if name != "llama" else {**sizes, "n_kv_head": 2})).to(device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = step(model, tokens, None)
        engine = TransformerEngineBackend(resolved(recipe=recipe), device, model)
        with engine.training():
            found = step(model, tokens, engine)
    return expected, found, engine.calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Transformer Engine runs on CUDA only")
@pytest.mark.parametrize("recipe", ["current", "delayed", "block", "mxfp8"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_fp8_errs_by_its_rounding(name: str, recipe: str) -> None:
    try:
        expected, found, calls = real_step(name, recipe)
    except ConfigError as refusal:
        pytest.skip(str(refusal))
    assert calls == (6 if name == "bdh" else 8)
    for key, value in expected.items():
        error = (found[key].float() - value.float()).norm() / value.float().norm()
        assert 0 < error < 0.3, key
