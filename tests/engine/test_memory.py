"""The memory that a training step, and a run, are said to need is what they take."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from config import BDHConfig, Config, ConfigError, Fp8Config, LowPrecisionConfig, ModelConfig
from engine.hardware.device import supports_fast_bfloat16
from engine.hardware.distributed import World
from engine.hardware.memory import (
    allocated_bytes,
    cgroup_free_bytes,
    free_bytes,
)
from engine.loss import DocumentIds, next_token_loss
from engine.optim.build import build_optimizer, clip_gradients, gradient_norm
from engine.planning.memory import (
    Memory,
    Needs,
    Room,
    batch_sizes,
    confirmed,
    fitting,
    largest_batch,
    memory_lines,
    out_of_memory_lines,
    state_bytes,
    with_batch,
)
from engine.precision.fp8_native import NativeBackend
from engine.precision.lora import apply_lora
from engine.precision.precision import Precision
from model import LanguageModel, build_model
from model.bdh import BDH
from model.gpt import GPT
from model.llama import Llama
from tests.conftest import ROOT, TEXT
from tests.runs import run_here

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
    return most_allocated(lambda: step(model, rows, dtype, documents))


def most_allocated(work: Callable[[], object]) -> int:
    work()  # some things are kept from the first call on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def ratio(
    model: LanguageModel,
    rows: torch.Tensor,
    dtype: torch.dtype,
    documents: DocumentIds | None = None,
) -> float:
    """Predicted by measured, weights and gradients aside."""
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    measured = peak_bytes(model, rows, dtype, documents) - gradients
    shape = (rows.shape[0], rows.shape[1] - 1)
    return model.activation_bytes(shape, dtype, on_cpu=True) / measured


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
    if dtype is BF16 and not supports_fast_bfloat16(torch.device("cpu")):
        pytest.skip("no such CPU trains in 16 bits")
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
    apply_lora(model, LowPrecisionConfig(lora_rank=4))
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
    NativeBackend(Fp8Config(recipe=recipe, format="hybrid"), model, torch.device("cpu"), dtype)
    assert 0.8 < ratio(model, torch.randint(V, (B, T + 1)), dtype) < 1.2


CPU = World(0, 1, torch.device("cpu"))


def configured(**sections: dict[str, Any]) -> Config:
    """A small run without 4-bit weights, except as said."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"n_layer": 2, "n_embd": 64, "mlp_internal_dim_multiplier": 16, "dropout": 0.0},
        "training": {"block_size": 128, "batch_size": 4},
        "low_precision": {"use_4bit": False},
        "system": {"device": "cpu"},
    }
    if sections.get("model", {}).get("name", "bdh") != "bdh":
        del defaults["model"]["mlp_internal_dim_multiplier"]
    names = defaults.keys() | sections.keys()
    return Config.from_dict({n: defaults.get(n, {}) | sections.get(n, {}) for n in names})


def needs_of(config: Config, device: str = "meta") -> Needs:
    with torch.device(device):
        model = build_model(config)
    precision = Precision(config.low_precision, CPU.device, config.fp8)
    precision.prepare(model, 10, init=device != "meta")
    return Needs(config, model, precision, CPU)


def optimizer_of(needs: Needs) -> torch.optim.Optimizer:
    config = needs.config
    four_bit = config.low_precision.use_4bit_optimizer
    return build_optimizer(needs.model, config.optimizer, 0.1, four_bit)


def tensors_of(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the state, without counters and tables that all share."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step" and not name.startswith("qmap")
    )


def train_step(needs: Needs, optimizer: torch.optim.Optimizer) -> None:
    """What the loop does in a step."""
    config, model, precision = needs.config, needs.model, cast(Precision, needs.precision)
    shape = (cast(int, config.training.batch_size), config.training.block_size + 1)
    with precision.training(10):
        for _ in range(config.training.gradient_accumulation_steps):
            rows = torch.randint(256, shape, dtype=torch.uint8)
            with precision.autocast():
                loss = next_token_loss(model, rows, CPU.device)
            precision.backward(loss)
    clip_gradients(model, gradient_norm(model), 1.0)
    precision.step(optimizer, CPU.all_reduce_max)
    optimizer.zero_grad(set_to_none=True)


WIDE = {"n_embd": 256, "n_layer": 3}
WHOLE_STEPS: list[dict[str, dict[str, Any]]] = [
    {"model": {}},
    {"model": {"n_embd": 128, "n_layer": 3}, "training": {"batch_size": 1}},
    {"training": {"gradient_accumulation_steps": 2}},
    {"model": {"n_embd": 128}, "optimizer": {"name": "muon"}, "training": {"batch_size": 1}},
    {"low_precision": {"use_4bit_optimizer": True, "compute_dtype": "float32"}},
    {"model": {"name": "gpt", **WIDE}, "training": {"batch_size": 1}},
    {"model": {"name": "gpt", **WIDE}, "training": {"gradient_accumulation_steps": 3}},
    {
        "model": {"name": "gpt", **WIDE, "dropout": 0.1},
        "low_precision": {"compute_dtype": "float32"},
    },
    {"model": {"name": "gpt", **WIDE}, "optimizer": {"name": "muon"}},
    {"model": {"name": "gpt", **WIDE}, "low_precision": {"use_4bit_optimizer": True}},
    {"model": {"name": "llama", **WIDE}, "training": {"block_size": 512, "batch_size": 2}},
    {"model": {"name": "llama", **WIDE}, "training": {"gradient_accumulation_steps": 2}},
    {
        "model": {"name": "llama", **WIDE, "n_kv_head": 2},
        "low_precision": {"compute_dtype": "float32"},
    },
    {
        "model": {"name": "llama", **WIDE},
        "optimizer": {"name": "muon"},
        "training": {"batch_size": 1, "block_size": 64},
    },
]


@pytest.mark.parametrize("sections", WHOLE_STEPS, ids=str)
def test_a_whole_step_with_its_optimizer_takes_what_was_predicted(
    sections: dict[str, dict[str, Any]],
) -> None:
    config = configured(**sections)
    if not supports_fast_bfloat16(CPU.device):
        low = replace(config.low_precision, compute_dtype="float32")
        config = replace(config, low_precision=low)
    needs = needs_of(config, "cpu")
    predicted = needs.memory()
    optimizer = optimizer_of(needs)
    peak = most_allocated(lambda: train_step(needs, optimizer))
    held = predicted.weights + tensors_of(optimizer) + predicted.cached
    assert 0.87 < predicted.step / (held + peak) < 1.15


def test_copies_of_rounded_weights_count_in_a_whole_step() -> None:
    pytest.importorskip("bitsandbytes")
    config = configured(
        model={"n_embd": 128, "n_layer": 1},
        training={"batch_size": 1},
        low_precision={"use_4bit": True, "compute_dtype": "float32"},
    )
    needs = needs_of(config, "cpu")
    predicted, optimizer = needs.memory(), optimizer_of(needs)
    peak = most_allocated(lambda: train_step(needs, optimizer))
    held = predicted.weights + tensors_of(optimizer) + predicted.cached
    assert predicted.copies > 0
    assert 0.87 < predicted.step / (held + peak) < 1.15


@pytest.mark.parametrize(
    "sections",
    [
        {"model": WIDE},
        {"model": {"name": "gpt", **WIDE, "bias": True}},
        {"low_precision": {"use_4bit_optimizer": True}},
        {"model": {"name": "llama", **WIDE}, "low_precision": {"use_4bit_optimizer": True}},
        {"model": {"name": "gpt", **WIDE, "bias": True}, "optimizer": {"name": "muon"}},
        {"model": {"name": "gpt", **WIDE}, "optimizer": {"name": "adamw_8bit"}},
    ],
    ids=str,
)
def test_the_state_of_an_optimizer_is_counted_before_it_exists(
    sections: dict[str, dict[str, Any]],
) -> None:
    config = configured(**sections)
    if config.optimizer.name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    predicted = state_bytes(needs_of(config).model, config)
    needs = needs_of(config, "cpu")
    optimizer = optimizer_of(needs)
    train_step(needs, optimizer)
    assert predicted == pytest.approx(tensors_of(optimizer), rel=0.001)


RUNS: list[list[str]] = [
    ["model.n_layer=2", "mlp_internal_dim_multiplier=64", "training.batch_size=2"],
    ["model.name=gpt", "model.n_embd=512", "model.n_layer=5", "model.n_head=8"],
    ["model.name=llama", "model.n_embd=384", "model.n_head=6", "optimizer.name=muon"],
    ["model.name=gpt", "model.n_embd=768", "training.batch_size=2", "use_4bit_optimizer=true"],
]


@pytest.mark.parametrize("overrides", RUNS, ids=" ".join)
def test_a_run_holds_the_memory_that_it_says_at_its_start(
    overrides: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text.bin").write_bytes(TEXT.encode() * 1000)
    given = ["model.dropout=0", "training.block_size=256", "training.batch_size=4"]
    given = [each for each in given if each.split("=")[0] not in " ".join(overrides)]
    done = subprocess.run(
        [sys.executable, os.fspath(ROOT / "train.py"), *overrides, *given]
        + [
            f"dataset.train_data_path={tmp_path}/text.bin",
            "dataset.token_dtype=uint8",
            "tokenizer.name=bytes",
        ]
        + ["model.vocab_size=256", "training.max_iters=3", "log_freq=1", "training.eval_iters=1"]
        + ["training.test_freq=2", "low_precision.use_4bit=false", "system.compile=false"]
        + [f"training.checkpoint_dir={tmp_path}/runs", "system.device=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = re.search(r"Memory of a step: ([\d.]+) ([MG])B ", done.stdout)
    assert said is not None, done.stdout
    predicted = float(said[1]) * {"M": 1e6, "G": 1e9}[said[2]]
    (metrics,) = tmp_path.glob("runs/run_*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    measured = max(record.get("train/memory_bytes", 0) for record in records)
    # Within 15 % where it was measured; kernels and libraries of other machines hold other amounts.
    assert 0.8 < predicted / measured < 1.25


def short_of(needs: Needs, share: float) -> Room:
    """Room for so much of what a run needs, beside what the process has now."""
    return Room(0, int(share * needs.memory().peak))


def big(**training: Any) -> Needs:
    config = configured(
        model={"n_embd": 512, "n_layer": 6},
        training={"block_size": 512, "batch_size": 8, **training},
    )
    return replace(needs_of(config), base=100 << 20)


def test_what_fits_is_said_without_advice() -> None:
    needs = big()
    (line,) = memory_lines(needs, Room(1 << 30, 50 << 30))
    assert line.startswith("Memory of a step: ")
    assert " of 54.8 GB there are: " in line


def test_where_nobody_tells_what_is_free_nothing_is_said_to_be_short() -> None:
    (line,) = memory_lines(big(), Room(1 << 30, None))
    assert "there are" not in line


@pytest.mark.parametrize("share", [0.95, 0.8, 0.7])
def test_both_options_for_a_run_that_does_not_fit_would_fit_and_keep_its_tokens(
    share: float,
) -> None:
    needs = big(gradient_accumulation_steps=2)
    room = short_of(needs, share)
    said = memory_lines(needs, room)
    assert len(said) == 2 and said[1].startswith("WARNING: it does not fit. What would fit: ")
    options = fitting(needs, room)
    assert len(options) == 2
    for words, memory in options:
        assert words in said[1]
        config = overridden(needs.config, words)
        training = config.training
        tokens = training.block_size * training.gradient_accumulation_steps
        assert tokens * cast(int, training.batch_size) == 512 * 8 * 2
        assert needs.memory(config) == memory and memory.peak <= room.held + cast(int, room.free)


def overridden(config: Config, words: str) -> Config:
    values = config.to_dict()
    for word in words.split():
        key, value = word.split("=")
        section, _, name = key.rpartition(".")
        values[section or "training"][name] = json.loads(value)
    return Config.from_dict(values)


def test_the_micro_batch_offered_is_the_largest_that_fits() -> None:
    needs = big(batch_size=12)
    for batch in (6, 4, 3, 2, 1):
        room = Room(
            0,
            needs.memory(
                overridden(
                    needs.config, f"batch_size={batch} gradient_accumulation_steps={12 // batch}"
                )
            ).peak,
        )
        assert fitting(needs, room)[0][0].split()[0] == f"training.batch_size={batch}"


def test_where_weights_alone_do_not_fit_a_smaller_model_is_what_is_left() -> None:
    needs = big()
    said = memory_lines(needs, Room(0, needs.memory().weights))
    assert said[1].endswith("lower model.n_layer or model.n_embd.")


def test_out_of_memory_names_what_used_it_and_two_options_below_it() -> None:
    needs = big()
    lines = out_of_memory_lines(MemoryError(), needs, Room(0, 1 << 40))  # more than enough, it said
    assert lines[0] == "Out of memory: MemoryError"
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert f"B {part}" in lines[1]
    assert lines[2].startswith("1.1 TB were there when the run began: something else took them")
    assert lines[3].count("training.") + lines[3].count("low_precision.") >= 2


def test_out_of_memory_before_a_model_is_known_names_the_batch_size() -> None:
    lines = out_of_memory_lines(MemoryError("reading"), None, None)
    assert lines[0] == "Out of memory: reading" and "training.batch_size" in lines[1]


def automatic(world_size: int = 1, **training: Any) -> Needs:
    needs = big(batch_size=1, tokens_per_step=24 * 512, **training)
    training_ = replace(needs.config.training, batch_size="auto")
    world = World(0, world_size, CPU.device)
    return replace(needs, config=replace(needs.config, training=training_), world=world)


def test_auto_takes_the_largest_micro_batch_that_fits_and_makes_up_the_step() -> None:
    needs = automatic()
    assert batch_sizes(needs.config, 1) == [24, 12, 8, 6, 4, 3, 2, 1]
    assert batch_sizes(needs.config, 3) == [8, 4, 2, 1]
    peak = {each: needs.memory(with_batch(needs.config, each)).peak for each in (24, 12, 8)}
    sizes, line = largest_batch(needs, Room(0, int(peak[12] / 0.9) + 1))
    assert sizes == [12, 8, 6, 4, 3, 2, 1]
    assert line.startswith("Batch size: 12 of 24 sequences") and "24 would need" in line
    assert largest_batch(needs, Room(0, int(peak[12] / 0.9) - 1))[0][0] == 8
    assert largest_batch(needs, Room(0, 1 << 50))[0][0] == 24


def test_auto_fills_less_where_the_process_holds_memory_that_it_keeps() -> None:
    needs = automatic()
    peak = needs.memory(with_batch(needs.config, 12)).peak
    held = 200 << 20  # counts whole, and nine tenths of the rest
    assert largest_batch(needs, Room(held, int((peak - held) / 0.9) + 1))[0][0] == 12


def test_auto_says_what_one_sequence_needs_where_none_fits() -> None:
    with pytest.raises(ConfigError, match=r"1 at a time need [\d.]+ .B \(.* weights.*90% of the"):
        largest_batch(automatic(), Room(0, 50 << 20))
    with pytest.raises(ConfigError, match="not known here"):
        largest_batch(automatic(), Room(0, None))


def test_auto_refuses_a_step_that_no_batch_makes_up() -> None:
    needs = automatic(world_size=5)
    with pytest.raises(ConfigError, match=r"12288 is not a multiple .*512 \* 5 processes"):
        largest_batch(needs, Room(0, 1 << 50))


def test_auto_takes_only_what_8_bit_products_take() -> None:
    config = configured(
        training={"block_size": 4, "batch_size": 4, "tokens_per_step": 48},
        low_precision={"use_fp8": True},
    )
    assert batch_sizes(config, 1) == [12, 4]


def test_a_trial_that_runs_out_of_memory_is_repeated_with_the_next_size() -> None:
    tried = []

    def attempt(batch: int) -> None:
        tried.append(batch)
        if batch > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert confirmed([12, 8, 6, 4], attempt, CPU) == 6 and tried == [12, 8, 6]
    with pytest.raises(ConfigError, match="even 8 runs out"):
        confirmed([12, 8], attempt, CPU)


def test_a_process_holds_what_it_allocates() -> None:
    before = allocated_bytes(CPU.device)
    with mmap.mmap(-1, 64 << 20) as block:  # fresh from the system
        for page in range(0, len(block), 4096):
            block[page] = 1
        assert allocated_bytes(CPU.device) - before == pytest.approx(len(block), rel=0.1)


def groups(folder: Path, version: int, limits: dict[str, str]) -> tuple[Path, Path]:
    """A process in a control group a/b, and the root of the groups, with a limit on each path."""
    process, root = folder / "self", folder / "cgroup"
    process.mkdir()
    lines = {1: "5:cpu:/\n4:memory:/a/b\n0::/\n", 2: "0::/a/b\n"}
    (process / "cgroup").write_text(lines[version])
    names = [
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ("memory.max", "memory.current", "inactive_file"),
    ][version - 1]
    for path, limit in limits.items():
        own = (root / "memory" if version == 1 else root) / path
        own.mkdir(parents=True, exist_ok=True)
        (own / names[0]).write_text(f"{limit}\n")
        (own / names[1]).write_text("300\n")
        (own / "memory.stat").write_text(f"anon 200\n{names[2]} 50\n")
    return process, root


@pytest.mark.parametrize("version", [1, 2])
def test_what_control_groups_leave_is_the_least_of_all_above(version: int, tmp_path: Path) -> None:
    process, root = groups(tmp_path, version, {"a/b": "5000", "a": "1000", "": "9000"})
    assert sorted(cgroup_free_bytes(process, root)) == [750, 4750, 8750]


def test_a_container_shows_its_own_group_as_the_root(tmp_path: Path) -> None:
    process, root = groups(tmp_path, 2, {"": "1000"})
    assert list(cgroup_free_bytes(process, root)) == [750]


def test_a_group_without_limit_leaves_all(tmp_path: Path) -> None:
    process, root = groups(tmp_path, 2, {"a/b": "max"})
    assert list(cgroup_free_bytes(process, root)) == []
    assert list(cgroup_free_bytes(tmp_path / "none", root)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="nobody tells")
def test_free_memory_is_some_and_less_than_there_is() -> None:
    free = free_bytes(CPU.device)
    assert free is not None
    assert 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free_bytes(torch.device("mps")) is None


def test_processes_on_one_cpu_share_what_is_free() -> None:
    one, four = (Room.of(World(0, size, CPU.device)).free for size in (1, 4))
    assert one is not None and four is not None
    assert four == pytest.approx(one / 4, rel=0.2)


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
        "training.batch_size=1000000000",
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
