"""The memory that a training step, and a run, are predicted to need is what they take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from config import Config, LowPrecisionConfig
from engine.hardware.device import supports_fast_bfloat16
from engine.hardware.distributed import World, no_sync_until_last, wrap_ddp
from engine.hardware.sharding import shard_mesh, shard_model
from engine.loss import DocumentIds, next_token_loss
from engine.optim.build import build_optimizer, clip_gradients, gradient_norm
from engine.planning.memory import Memory, MemoryEstimator, optimizer_state_bytes
from engine.precision.lora import apply_lora
from engine.precision.precision import Precision
from model import LanguageModel
from model.bdh.tiling import Tiling
from model.memory import StepShape, activation_bytes
from tests.conftest import ROOT, TEXT
from tests.engine.allocations import peak_bytes
from tests.engine.planned_runs import CPU, configured, estimator_of
from tests.engine.test_sharding import on_processes
from tests.model.test_bdh_dense import PlainProjections
from tests.runs import run_here


def micro_step(estimator: MemoryEstimator, documents: DocumentIds | None = None) -> None:
    config, precision = estimator.config, estimator.precision
    assert isinstance(config.training.batch_size, int)
    shape = (config.training.batch_size, config.training.block_size + 1)
    rows = torch.randint(256, shape, dtype=torch.uint8)
    with precision.autocast():
        loss = next_token_loss(estimator.model, rows, CPU.device, documents)
    precision.backward(loss)


def measurable(config: Config) -> MemoryEstimator:
    """Returns the estimator of a run whose model is on this CPU."""
    if not supports_fast_bfloat16(CPU.device):  # in 16 bits such a CPU would take minutes
        if config.low_precision.use_fp8 or config.low_precision.residual_dtype == "bfloat16":
            pytest.skip("computes in bfloat16, which takes minutes on this CPU")
        low = replace(config.low_precision, compute_dtype="float32")
        config = replace(config, low_precision=low)
    return estimator_of(config, "cpu")


def activation_ratio(estimator: MemoryEstimator, documents: DocumentIds | None = None) -> float:
    """Returns predicted by measured peak of forward and backward, without gradients."""

    def step() -> None:
        micro_step(estimator, documents)
        estimator.model.zero_grad()

    predicted = estimator.memory()
    return predicted.activations / (peak_bytes(step) - predicted.gradients)


def bdh(batch: int, block: int, **model: Any) -> dict[str, dict[str, Any]]:
    return {"model": model, "training": {"batch_size": batch, "block_size": block}}


def transformer(name: str, batch: int, block: int, **model: Any) -> dict[str, dict[str, Any]]:
    return bdh(batch, block, name=name, n_head=4, **model)


def recomputed(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {**sections, "training": {**sections["training"], "recompute": "layer"}}


FLOAT32 = {"low_precision": {"compute_dtype": "float32"}}
FP8 = {"low_precision": {"use_fp8": True}}
NARROW = {"low_precision": {"residual_dtype": "bfloat16"}}
slow = pytest.mark.slow
STEPS: list[Any] = [
    bdh(2, 256, n_layer=3, n_embd=128),
    bdh(8, 128, n_layer=1, n_embd=128) | FLOAT32,
    pytest.param(bdh(4, 256, n_head=1, vocab_size=8192), marks=slow),  # most of it are logits
    pytest.param(bdh(2, 256, n_layer=3, n_embd=128, dropout=0.1), marks=slow),
    pytest.param(bdh(1, 300, n_layer=6, n_head=1, mlp_internal_dim_multiplier=32), marks=slow),
    pytest.param(bdh(2, 512, n_embd=128, mlp_internal_dim_multiplier=128), marks=slow),
    pytest.param(
        bdh(1, 2048, n_embd=128, n_head=2, mlp_internal_dim_multiplier=32, dropout=0.1), marks=slow
    ),
    pytest.param(
        bdh(1, 4096, n_layer=1, n_head=4, mlp_internal_dim_multiplier=64) | FLOAT32, marks=slow
    ),
    transformer("gpt", 12, 64, n_layer=4, n_embd=128, bias=True),
    transformer("gpt", 12, 64, n_layer=4, n_embd=128, dropout=0.1) | FLOAT32,
    transformer("gpt", 1, 1024, activation="relu", mlp_scale_factor=2),
    transformer("gpt", 1, 1024, activation="relu", mlp_scale_factor=2, dropout=0.1),
    transformer("gpt", 8, 128, n_layer=3, mask="causal_document"),
    transformer("gpt", 4, 128, n_layer=3, n_embd=128, attention="math"),
    transformer("gpt", 2, 64, n_embd=256, vocab_size=8192),  # most: gradients of the tied embedding
    transformer("gpt", 2, 64, n_embd=256, vocab_size=8192, dropout=0.1) | FLOAT32,
    pytest.param(transformer("gpt", 4, 256, vocab_size=8192, tie_embeddings=False), marks=slow),
    transformer("llama", 12, 64, n_layer=4, n_embd=128, d_ff=512),
    transformer("llama", 12, 64, n_layer=4, n_embd=128, d_ff=512, dropout=0.1) | FLOAT32,
    transformer("llama", 4, 256, n_embd=128, n_kv_head=2, mask="causal_document"),
    transformer("gpt", 4, 256, n_layer=3, n_embd=128) | NARROW,
    transformer("llama", 4, 256, n_layer=3, n_embd=128, dropout=0.1) | NARROW,
    pytest.param(transformer("llama", 1, 1024, n_kv_head=1, vocab_size=8192) | FLOAT32, marks=slow),
    recomputed(transformer("gpt", 12, 64, n_layer=4, n_embd=128, bias=True)),
    recomputed(transformer("gpt", 1, 1024, n_layer=6, dropout=0.1)),
    recomputed(transformer("gpt", 2, 64, n_layer=6, n_embd=256, vocab_size=8192)),
    recomputed(transformer("llama", 12, 64, n_layer=8, n_embd=128, dropout=0.1) | FLOAT32),
    recomputed(transformer("llama", 4, 256, n_layer=6, n_embd=128) | NARROW),
    recomputed(bdh(2, 256, n_layer=6, n_embd=128, dropout=0.1)),
    pytest.param(
        recomputed(bdh(1, 2048, n_embd=128, n_head=2, mlp_internal_dim_multiplier=32)), marks=slow
    ),
    pytest.param(bdh(2, 256, n_layer=3, n_embd=128) | FP8, marks=slow),
    pytest.param(
        bdh(1, 1024, n_embd=128, n_head=2, mlp_internal_dim_multiplier=32)
        | FP8
        | {"fp8": {"recipe": "delayed", "format": "hybrid", "backend": "native"}},
        marks=slow,
    ),
]


@pytest.mark.parametrize("sections", STEPS, ids=str)
def test_predicted_activations_are_within_a_seventh_of_the_measured(
    sections: dict[str, dict[str, Any]],
) -> None:
    masked = "mask" in sections["model"]
    estimator = measurable(configured(**sections))
    ratio = activation_ratio(
        estimator, (lambda rows: (rows % 7 == 0).cumsum(1)) if masked else None
    )
    fp8 = estimator.config.low_precision.use_fp8
    assert (0.8 < ratio < 1.2) if fp8 else (0.87 < ratio < 1.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections, sequences",
    [
        (bdh(2, 256, n_layer=3, n_embd=128), 2),
        (bdh(4, 256, n_layer=2, n_embd=128, mlp_internal_dim_multiplier=64), 2),
        (bdh(1, 2048, n_embd=128, n_head=2, mlp_internal_dim_multiplier=32), 1),
        (recomputed(bdh(4, 256, n_layer=4, n_embd=128, mlp_internal_dim_multiplier=64)), 2),
    ],
    ids=["whole", "groups", "chunks", "recomputed"],
)
def test_so_are_those_of_the_plan_for_a_gpu(
    sections: dict[str, dict[str, Any]], sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Tiling.of

    def planned(tokens: Any, shape: Any, dtype: torch.dtype, _on_cpu: bool) -> Tiling:
        return replace(of(tokens, shape, dtype, on_cpu=False), sequences=sequences)

    monkeypatch.setattr(Tiling, "of", staticmethod(planned))
    assert 0.87 < activation_ratio(measurable(configured(**sections))) < 1.2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_so_are_those_of_frozen_weights_with_adapters(name: str, dtype: str) -> None:
    pytest.importorskip("bitsandbytes")
    sections = transformer(name, 4, 256, n_layer=3, n_embd=256)
    low = {"use_4bit": False, "compute_dtype": dtype}
    estimator = measurable(configured(**sections, low_precision=low))
    apply_lora(estimator.model, LowPrecisionConfig(lora_rank=4))
    assert 0.87 < activation_ratio(estimator) < 1.2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_for_dense_layers_the_prediction_is_enough_and_not_twice_too_much(dtype: str) -> None:
    model = {"n_layer": 3, "n_head": 4, "mlp_internal_dim_multiplier": 32, "dropout": 0.1}
    training = {"batch_size": 2}
    low = {"use_4bit": False, "compute_dtype": dtype}
    estimator = estimator_of(configured(model=model, training=training, low_precision=low), "cpu")
    estimator.model.projections = PlainProjections
    assert 1 <= activation_ratio(estimator) <= 2


def test_on_cuda_shared_heads_of_keys_hold_all_scores_where_no_kernel_takes_them() -> None:
    def quadratic(dtype: torch.dtype, **model: Any) -> bool:
        sections = transformer("llama", 1, 2048, **model)
        llama = estimator_of(configured(**sections)).model
        few, many = (
            activation_bytes(llama, StepShape(1, block, dtype, on_cpu=False))
            for block in (1024, 2048)
        )
        assert few is not None and many is not None
        return many > 3 * few

    shared, masked = {"n_kv_head": 2}, {"mask": "causal_document"}
    assert quadratic(torch.float32, **shared)
    assert quadratic(torch.bfloat16, **shared, **masked, dropout=0.1)
    assert not quadratic(torch.bfloat16, **shared, dropout=0.1)
    assert not quadratic(torch.bfloat16, **shared, **masked)
    assert not quadratic(torch.float32)


def test_on_cuda_workspaces_and_matrices_that_muon_updates_together_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = configured(model={"name": "gpt", "n_layer": 8}, optimizer={"name": "muon"})
    on_cpu = estimator_of(config)
    cuda = torch.device("cuda", 0)
    precision = Precision(config.low_precision, cuda)
    on_cuda = replace(on_cpu, world=World(0, 1, cuda), precision=precision).memory()
    assert on_cuda.workspaces == 64 << 20 and on_cuda.peak - on_cuda.step == on_cuda.workspaces
    assert on_cuda.parts().endswith("67.1 MB workspaces of cuBLAS")
    assert on_cuda.update > 4 * on_cpu.memory().update


CHUNKED: list[Any] = [
    bdh(4, 256, n_layer=1, n_head=1, vocab_size=8192),
    transformer("gpt", 4, 256, n_layer=1, n_embd=64, vocab_size=8192),
    transformer("gpt", 4, 256, n_layer=1, n_embd=256, vocab_size=8192, tie_embeddings=False),
    transformer("llama", 4, 256, n_layer=1, n_embd=128, vocab_size=8192) | FLOAT32,
]


@pytest.mark.slow
@pytest.mark.parametrize("sections", CHUNKED, ids=str)
def test_so_are_those_of_a_loss_in_chunks(
    sections: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.loss.CHUNK_LOGITS", 1 << 21)  # of 2 ** 23
    assert 0.87 < activation_ratio(measurable(configured(**sections))) < 1.15


def test_activations_of_an_unknown_architecture_are_left_out_aloud() -> None:
    estimator = replace(estimator_of(configured()), model=LanguageModel())
    shape = StepShape(1, 8, torch.float32, on_cpu=True)
    assert activation_bytes(estimator.model, shape) is None
    assert estimator.memory().parts().endswith("activations not predicted")


def optimizer_of(estimator: MemoryEstimator) -> torch.optim.Optimizer:
    config = estimator.config
    four_bit = config.low_precision.use_4bit_optimizer
    return build_optimizer(estimator.model, config.optimizer, 0.1, four_bit)


def tensors_of(optimizer: torch.optim.Optimizer) -> int:
    """Returns the memory of the state, without counters and tables that all parameters share."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step" and not name.startswith("qmap")
    )


def train_step(estimator: MemoryEstimator, optimizer: torch.optim.Optimizer) -> None:
    """Does what the loop does in a step."""
    model, precision = estimator.model, estimator.precision
    with precision.training(10):
        for _ in range(estimator.config.training.gradient_accumulation_steps):
            micro_step(estimator)
    clip_gradients(model, gradient_norm(model), 1.0)
    precision.step(optimizer, CPU.all_reduce_max)
    optimizer.zero_grad(set_to_none=True)


WIDE = {"n_embd": 256, "n_layer": 3}
GPT = {"name": "gpt", **WIDE}
LLAMA = {"name": "llama", **WIDE}
WHOLE_STEPS: list[dict[str, dict[str, Any]]] = [
    {},
    {"training": {"gradient_accumulation_steps": 2}},
    {"model": {"n_embd": 128}, "optimizer": {"name": "muon"}, "training": {"batch_size": 1}},
    {"low_precision": {"use_4bit_optimizer": True, "compute_dtype": "float32"}},
    {
        "model": {"n_embd": 128, "n_layer": 1},
        "training": {"batch_size": 1},
        "low_precision": {"use_4bit": True, "compute_dtype": "float32"},
    },
    {"model": GPT, "training": {"gradient_accumulation_steps": 3}},
    {"model": {**GPT, "dropout": 0.1}, "low_precision": {"compute_dtype": "float32"}},
    {"model": {**GPT, "bias": True}, "optimizer": {"name": "muon"}},
    {"model": GPT, "low_precision": {"use_4bit_optimizer": True}},
    {"model": GPT, "optimizer": {"name": "adamw_8bit"}, "training": {"batch_size": 1}},
    {"model": LLAMA, "training": {"block_size": 512, "batch_size": 2}},
    {"model": {**LLAMA, "n_kv_head": 2}, "training": {"gradient_accumulation_steps": 2}},
    {"model": GPT, "training": {"gradient_accumulation_steps": 2, "recompute": "layer"}},
    {"model": LLAMA, "optimizer": {"name": "muon"}, "training": {"batch_size": 1}},
]


@pytest.mark.slow
@pytest.mark.parametrize("sections", WHOLE_STEPS, ids=str)
def test_a_whole_step_with_its_optimizer_takes_what_was_predicted(
    sections: dict[str, dict[str, Any]],
) -> None:
    config = configured(**sections)
    if config.low_precision.use_4bit or config.optimizer.name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    estimator = measurable(config)
    predicted = estimator.memory()
    optimizer = optimizer_of(estimator)
    peak = peak_bytes(lambda: train_step(estimator, optimizer))
    assert predicted.optimizer == pytest.approx(tensors_of(optimizer), rel=0.001)
    assert predicted.optimizer == optimizer_state_bytes(estimator_of(config).model, config)
    assert (predicted.copies > 0) == config.low_precision.use_4bit
    if config.optimizer.name == "adamw_8bit":
        return  # on a CPU bitsandbytes' step has temporaries that are not predicted
    kept = predicted.weights + tensors_of(optimizer) + predicted.cached
    assert 0.87 < predicted.step / (kept + peak) < 1.15


RUNS: list[list[str]] = [
    ["model.n_layer=2", "mlp_internal_dim_multiplier=64", "training.batch_size=2"],
    ["model.name=gpt", "model.n_embd=512", "training.batch_size=2", "use_4bit_optimizer=true"],
    ["model.name=llama", "model.n_embd=384", "model.n_head=6", "optimizer.name=muon"],
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_a_run_holds_the_memory_that_it_says_at_its_start(
    overrides: list[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.bin"
    text.write_bytes(TEXT.encode() * 1000)
    given = ["model.dropout=0", "training.block_size=256", "training.batch_size=4"]
    given = [each for each in given if each.split("=")[0] not in " ".join(overrides)]
    given += [f"train_data_path={text}", "token_dtype=uint8", "tokenizer.name=bytes"]
    given += ["vocab_size=256", "max_iters=3", "log_freq=1", "test_freq=null", "checkpoint_freq=2"]
    given += ["low_precision.use_4bit=false", "system.compile=false", "system.device=cpu"]
    done = subprocess.run(
        [sys.executable, os.fspath(ROOT / "train.py"), *overrides, *given]
        + [f"training.checkpoint_dir={tmp_path}/runs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"Memory of a step: .*", done.stdout)
    said = re.search(r": ([\d.]+) ([MG])B .*; ([\d.]+) ([MG])B more for a copy while saving", line)
    assert said is not None, line
    scale = {"M": 1e6, "G": 1e9}
    step, copy = float(said[1]) * scale[said[2]], float(said[3]) * scale[said[4]]
    (metrics,) = tmp_path.glob("runs/run_*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    measured = [r["train/memory_bytes"] for r in records if "train/memory_bytes" in r]
    # Within 15 % where it was measured; kernels and libraries of other machines hold other amounts.
    before_save, after_save = measured[1], measured[-1]  # the first save is that of step 2
    assert 0.8 < step / before_save < 1.25
    assert 0.8 < (step + copy) / after_save < 1.25 and copy > 0.5 * (after_save - before_save)


def test_a_peak_is_the_sum_of_its_parts_or_of_the_update_where_that_is_more() -> None:
    memory = Memory(1000, 1000, 2000, 0, 500, 700, 10, 5000)
    assert memory.step == 4710 and memory.peak == 9710
    assert memory.parts() == (
        "1 kB weights, 1 kB gradients, 2 kB optimizer, 500 B activations, 200 B more in the "
        "optimizer's step, 10 B cached tables, 5 kB the process itself"
    )


@pytest.mark.parametrize(
    "words",
    [
        "model.n_layer=1000000000",
        "model.name=gpt model.n_layer=4611686018427387904",
        "model.n_embd=1000000000",
        "model.n_embd=9223372036854775804",
        "model.vocab_size=9223372036854775807",
        "tokenizer.vocab_multiple=1000000000 model.vocab_size=null",
        "model.mlp_internal_dim_multiplier=9223372036854775807",
        "model.name=llama model.d_ff=4611686018427387904",
        "training.block_size=1000000000",
        "training.batch_size=1000000000 --dry-run",
    ],
)
def test_sizes_that_no_machine_holds_are_refused_before_anything_is_allocated(
    words: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words.split()
    assert run_here([*tiny, *given, f"checkpoint_dir={tmp_path / 'runs'}"]) == 2
    (told,) = capsys.readouterr().err.splitlines()[-1:]
    largest = max((word for word in given if word[-1].isdigit()), key=len)
    assert largest.replace("tokenizer.vocab_multiple", "model.vocab_size") in told
    assert "no machine holds" in told or "a step takes about" in told
    assert not (tmp_path / "runs").exists()


ON_TWO_PROCESSES: list[tuple[Any, dict[str, Any]]] = [
    ("fsdp", {"model": GPT, "training": {"gradient_accumulation_steps": 2}}),
    ("ddp", {"model": GPT, "training": {"gradient_accumulation_steps": 2}} | FLOAT32),
    ("fsdp", {"model": LLAMA, "optimizer": {"name": "muon"}} | FLOAT32),
    ("fsdp", {"model": {"n_embd": 128}, "training": {"recompute": "layer"}} | FLOAT32),
]


def measured_on(world: World, strategy: Any, sections: dict[str, Any]) -> float:
    """Returns predicted by measured peak of a step of this process, one of several."""
    alone = measurable(configured(**sections))
    distributed = replace(alone.config.distributed, strategy=strategy)
    config = replace(alone.config, distributed=distributed)
    estimator = replace(alone, config=config, world=world)
    predicted, model = estimator.memory(), estimator.model
    mesh = shard_mesh(strategy, world)
    if mesh is not None:
        shard_model(model, mesh, estimator.precision.weight_dtype)
    shared = wrap_ddp(model, world) if mesh is None else model
    optimizer = optimizer_of(estimator)
    rows = torch.randint(256, (4, 129), dtype=torch.uint8)
    micro_steps = config.training.gradient_accumulation_steps

    def step() -> None:
        for number in range(1, micro_steps + 1):
            with no_sync_until_last(shared, number == micro_steps):
                with estimator.precision.autocast():
                    loss = next_token_loss(shared, rows, CPU.device)
                estimator.precision.backward(loss / 1000)
        clip_gradients(model, gradient_norm(model), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    kept = predicted.weights
    if mesh is None:
        step()  # DDP makes its buckets anew after the first step; they stay between steps
        kept += predicted.weights
    peak = peak_bytes(step)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    kept += sum(m.to_local().nbytes if isinstance(m, DTensor) else m.nbytes for m in moments)
    return predicted.step / (kept + peak)


@pytest.mark.slow
def test_a_process_of_several_takes_what_was_predicted() -> None:
    def body(world: World) -> None:
        found = [measured_on(world, *case) for case in ON_TWO_PROCESSES]
        print(world.rank, [round(ratio, 3) for ratio in found], file=sys.stderr)
        assert all(0.87 < ratio < 1.15 for ratio in found)

    on_processes(2, body)
