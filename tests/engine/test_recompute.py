"""`training.recompute: layer` trains the same numbers, bit for bit, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config import Fp8Config
from engine.checkpoint.load import load_checkpoint
from engine.loss import next_token_loss
from engine.optim.build import build_optimizer
from engine.precision import fp8
from engine.precision.precision import Precision
from model import LanguageModel, build_model
from tests.engine.allocations import peak_bytes
from tests.engine.planned_runs import CPU, configured
from tests.runs import assert_equal, metrics, only_run, run_here

Sections = dict[str, dict[str, Any]]
FLOAT32 = {"compute_dtype": "float32"}
ROUNDED = {**FLOAT32, "use_4bit": True, "quantize_after": 0.0}
DELAYED: Sections = {
    "low_precision": {"use_fp8": True},
    "fp8": {"recipe": "delayed", "format": "hybrid", "backend": "native", "amax_history_len": 2},
}
DROPPED = {"dropout": 0.2, "mask": "causal_document"}
RUNS: dict[str, Sections] = {
    "gpt, dropout, documents": {"model": {"name": "gpt", **DROPPED}, "low_precision": FLOAT32},
    "gpt, bfloat16, flash": {"model": {"name": "gpt", "attention": "flash", "bias": True}},
    "gpt, delayed fp8": {"model": {"name": "gpt", "dropout": 0.1}, **DELAYED},
    "gpt, 4-bit weights": {"model": {"name": "gpt"}, "low_precision": ROUNDED},
    "llama, bfloat16, dropout": {
        "model": {"name": "llama", "n_kv_head": 2, "attention": "math", **DROPPED},
        "low_precision": {"residual_dtype": "bfloat16"},
    },
    "llama, adapters": {
        "model": {"name": "llama", "vocab_size": 256},
        "low_precision": {"lora_rank": 4, "use_4bit": True, "compute_dtype": "float32"},
        "training": {"init_from": "weights"},
    },
    "bdh, dropout, documents": {"model": DROPPED, "low_precision": FLOAT32},
    "bdh, bfloat16": {"model": {"n_head": 2, "dropout": 0.1}},
    "bdh, delayed fp8": {"model": {"dropout": 0.1}, **DELAYED},
    "bdh, 4-bit weights": {"low_precision": ROUNDED},
}


def built(sections: Sections, recompute: str) -> tuple[LanguageModel, Precision]:
    training = {"block_size": 32, **sections.get("training", {}), "recompute": recompute}
    config = configured(**{**sections, "training": training})
    torch.manual_seed(0)
    model = build_model(config)
    precision = Precision(config.low_precision, CPU.device, config.fp8)
    precision.prepare(model, 3)
    return model, precision


def trained(sections: Sections, recompute: str) -> dict[str, Any]:
    """Three steps of two micro-batches; what they leave behind."""
    model, precision = built(sections, recompute)
    config = configured(**sections)
    optimizer = build_optimizer(model, config.optimizer, 0.1)
    documents = "mask" in sections.get("model", {})
    draw, losses = torch.Generator().manual_seed(1), list[float]()
    for step in (1, 2, 3):
        with precision.training(step):
            for _ in range(2):
                rows = torch.randint(256, (2, 33), generator=draw, dtype=torch.uint8)
                numbers = (lambda rows: (rows % 7 == 0).cumsum(1)) if documents else None
                with precision.autocast():
                    loss = next_token_loss(model, rows, CPU.device, numbers) / 64
                precision.backward(loss)
                losses.append(loss.item())
        precision.step(optimizer, CPU.all_reduce_max)
        optimizer.zero_grad(set_to_none=True)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    formats, drawn = precision.state_dict(), torch.get_rng_state()
    return {"losses": losses, "weights": weights, "formats": formats, "generator": drawn}


@pytest.mark.parametrize("sections", RUNS.values(), ids=list(RUNS))
def test_weights_scales_and_generators_are_those_of_a_run_that_keeps_all(
    sections: Sections,
) -> None:
    if sections.get("low_precision", {}).get("use_4bit"):
        pytest.importorskip("bitsandbytes")
    assert_equal(trained(sections, "layer"), trained(sections, "none"), "run")


def test_casts_of_weights_are_not_kept_until_the_loss() -> None:
    model, _ = built({"model": {"name": "gpt", "n_layer": 6}}, "layer")
    rows = torch.randint(256, (1, 17))

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            next_token_loss(model, rows, CPU.device)

    casts = 2 * sum(weight.numel() for weight, _ in model.hidden_weights())
    assert peak_bytes(forward) < casts / 2


@pytest.mark.slow
def test_a_compiled_model_recomputes_too_in_less_memory() -> None:
    sections: Sections = {"model": {"name": "gpt", "n_layer": 4}, "low_precision": FLOAT32}
    rows = torch.randint(256, (4, 33), dtype=torch.uint8)

    def outcome(recompute: str) -> tuple[int, dict[str, Tensor | None]]:
        torch._dynamo.reset()
        model = built(sections, recompute)[0]
        model.compile(backend="aot_eager")  # keeps what inductor would

        def step() -> None:
            model.zero_grad()
            torch.autograd.backward(next_token_loss(model, rows, CPU.device) / 128)

        peak = peak_bytes(step)
        return peak, {name: p.grad for name, p in model.named_parameters()}

    (less, found), (more, expected) = outcome("layer"), outcome("none")
    assert less < 0.6 * more
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt", "bdh"])
def test_evaluation_and_generation_go_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.transformer.checkpoint", None)  # a call would be an error
    tokens = torch.randint(256, (2, 8))
    found = []
    for recompute in ("layer", "none"):
        model = built({"model": {"name": name}}, recompute)[0].eval()
        with torch.no_grad():
            cache = model.init_cache(2)
            found.append((model(tokens), model.prefill_or_decode(tokens, cache)))
    assert_equal(found[0], found[1], "logits")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bdh", "llama"])
def test_a_run_says_and_saves_what_it_would_without(
    name: str, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, f"model.name={name}", "max_iters=4", "test_freq=2", "log_freq=1"]
    words += ["checkpoint_freq=4", "sample_prompt=the", "sample_tokens=5", "compile=false"]
    words += ["batch_size=2", "gradient_accumulation_steps=2"]
    for recompute in ("none", "layer"):
        folder = tmp_path / recompute
        assert run_here([*words, f"recompute={recompute}", f"checkpoint_dir={folder}"]) == 0
    runs = [only_run(tmp_path / recompute) for recompute in ("none", "layer")]
    assert metrics(runs[0]) == metrics(runs[1])
    first, second = (load_checkpoint(run / "checkpoint_4.pt") for run in runs)
    for part in ("model", "optimizer", "rng", "cursor"):
        assert_equal(first[part], second[part], part)


def test_fp8_is_native_where_layers_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "find_spec", lambda name: object())  # as if it were installed
    for name in ("TransformerEngineBackend", "NativeBackend"):
        monkeypatch.setattr(fp8, name, lambda *rest, name=name: name)

    def backend(recompute: str) -> object:
        model, _ = built({"model": {"name": "gpt"}}, recompute)
        chosen = Fp8Config(recipe="current", format="hybrid")
        return fp8.attach_fp8(chosen, model, torch.device("cuda"), torch.bfloat16)

    assert backend("none") == "TransformerEngineBackend"
    assert backend("layer") == "NativeBackend"
