"""The memory that a training step is said to need is what it takes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from config import BDHConfig, Fp8Config, LowPrecisionConfig, ModelConfig
from engine.evaluate import DocumentIds, next_token_loss
from engine.precision.fp8 import NativeBackend
from engine.precision.lora import add_adapters
from engine.world import supports_fast_bfloat16
from model import LanguageModel
from model.bdh import BDH
from model.gpt import GPT
from model.llama import Llama

BF16, FLOAT32 = torch.bfloat16, torch.float32
Case = tuple[int, int, int, int, int, int, int, torch.dtype]
GRID: list[Case] = [  # batch, length, layers, width, heads, multiplier, vocabulary, dtype
    (2, 256, 3, 128, 4, 16, 256, BF16),
    (8, 128, 1, 128, 4, 16, 256, FLOAT32),
    (1, 300, 6, 64, 1, 32, 256, BF16),
    (2, 512, 2, 128, 4, 128, 256, BF16),
    (1, 2048, 2, 128, 2, 32, 256, BF16),
    (1, 4096, 1, 64, 4, 64, 256, FLOAT32),
    (4, 256, 2, 64, 1, 16, 8192, BF16),
]


def step(
    model: nn.Module, rows: torch.Tensor, dtype: torch.dtype, documents: DocumentIds | None = None
) -> None:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not FLOAT32):
        loss = next_token_loss(model, rows, torch.device("cpu"), documents)
    torch.autograd.backward(loss)
    model.zero_grad()


def peak_bytes(
    model: nn.Module, rows: torch.Tensor, dtype: torch.dtype, documents: DocumentIds | None = None
) -> int:
    """The most that the allocator had given out at any moment of a step, by its own record."""
    step(model, rows, dtype, documents)  # some things are kept from the first call on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(model, rows, dtype, documents)
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def ratio(
    model: nn.Module, rows: torch.Tensor, dtype: torch.dtype, documents: DocumentIds | None = None
) -> float:
    """Predicted by measured, weights and gradients aside."""
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    measured = peak_bytes(model, rows, dtype, documents) - gradients
    shape = (rows.shape[0], rows.shape[1] - 1)
    return cast(LanguageModel, model).activation_bytes(shape, dtype, on_cpu=True) / measured


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_predicted_activations_are_within_a_seventh_of_the_measured(
    case: Case, dropout: float
) -> None:
    B, T, layers, D, H, multiplier, V, dtype = case
    if dtype is BF16 and not supports_fast_bfloat16(torch.device("cpu")):
        dtype = FLOAT32  # as the trainer does; in 16 bits such a CPU takes minutes
    config = BDHConfig(
        n_layer=layers,
        n_embd=D,
        dropout=dropout,
        n_head=H,
        mlp_internal_dim_multiplier=multiplier,
        vocab_size=V,
    )
    rows = torch.randint(V, (B, T + 1))
    assert 0.87 < ratio(BDH(config), rows, dtype) < 1.15


Shape = tuple[int, int, int, int, int, int]
TRANSFORMERS: list[tuple[str, Shape, dict[str, Any]]] = [
    # name; batch, length, layers, width, heads, vocabulary; options
    ("gpt", (12, 64, 4, 128, 4, 65), {"bias": True}),
    ("gpt", (1, 1024, 2, 64, 2, 256), {"activation": "relu", "mlp_scale_factor": 2}),
    ("gpt", (8, 128, 3, 64, 2, 256), {"mask": "causal_document"}),
    ("gpt", (4, 128, 3, 128, 4, 256), {"attention": "math"}),
    ("gpt", (2, 64, 2, 256, 4, 8192), {}),  # most of it are gradients of the tied embedding
    ("gpt", (4, 256, 2, 64, 2, 8192), {"tie_embeddings": False}),
    ("llama", (12, 64, 4, 128, 4, 65), {"d_ff": 512}),
    ("llama", (4, 256, 2, 128, 4, 256), {"n_kv_head": 2, "mask": "causal_document"}),
    ("llama", (1, 1024, 2, 64, 2, 8192), {"n_kv_head": 1}),
]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, shape, options", TRANSFORMERS, ids=str)
def test_so_are_those_of_transformers(
    name: str, shape: Shape, options: dict[str, Any], dtype: torch.dtype, dropout: float
) -> None:
    B, T, layers, D, H, V = shape
    config = ModelConfig(
        name=cast(Any, name),
        n_layer=layers,
        n_embd=D,
        n_head=H,
        vocab_size=V,
        dropout=dropout,
        **options,
    )
    model = GPT(config, T) if name == "gpt" else Llama(config)
    rows = torch.randint(V, (B, T + 1))
    documents = (lambda rows: (rows % 7 == 0).cumsum(1)) if "mask" in options else None
    assert 0.87 < ratio(model, rows, dtype, documents) < 1.15


@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 256, 3, 256, 4, 256), (8, 128, 2, 256, 4, 256)], ids=str)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_so_are_those_of_frozen_weights_with_adapters(
    name: str, shape: Shape, dtype: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes")
    if dtype is BF16 and not supports_fast_bfloat16(torch.device("cpu")):
        pytest.skip("takes a minute on a CPU without products in 16 bits")
    B, T, layers, D, H, V = shape
    config = ModelConfig(
        name=cast(Any, name), n_layer=layers, n_embd=D, n_head=H, vocab_size=V, dropout=0.0
    )
    model = GPT(config, T) if name == "gpt" else Llama(config)
    add_adapters(model, LowPrecisionConfig(lora_rank=4))
    assert 0.87 < ratio(model, torch.randint(V, (B, T + 1)), dtype) < 1.2


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize(
    "case", [case for case in GRID if case[0] * case[1] % 16 == 0 and case[5] < 128], ids=str
)
def test_so_are_those_of_8_bit_products(case: Case, recipe: Any) -> None:
    B, T, layers, D, H, multiplier, V, dtype = case
    if not supports_fast_bfloat16(torch.device("cpu")):
        dtype = FLOAT32  # what the trainer takes there for all that is not in 8 bits
    shape = BDHConfig(
        n_layer=layers,
        n_embd=D,
        dropout=0.0,
        n_head=H,
        mlp_internal_dim_multiplier=multiplier,
        vocab_size=V,
    )
    model = BDH(shape)
    NativeBackend(Fp8Config(recipe=recipe), model, torch.device("cpu"), dtype)
    assert 0.8 < ratio(model, torch.randint(V, (B, T + 1)), dtype) < 1.2
