"""The parts of `bench.gpu` that time training steps and single tokens of whole models."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.bdh import SMALL
from bench.bdh_measure import GB, held, reset_peak
from bench.bdh_reference import Kind, Rival, kinds, load, rounding, step_bytes
from bench.gpt import load_nanogpt
from bench.gpu_model import SIZES, Format, ModelName, Prediction, predict
from bench.gpu_model import Path as KernelPath
from bench.gpu_parts import TURNS, WARM_UP, Bench, Work, failed
from bench.gpu_report import Row
from bench.precision_modes import (
    ADAMW_4BIT,
    ADAMW_8BIT,
    BF16,
    ENGINE_CURRENT,
    FP8_CURRENT,
    FP8_DELAYED,
    RESIDUAL_BF16,
    TRITON,
    Mode,
    Sections,
    Trainer,
    late,
)
from engine.hardware.cuda_graph import record_graph
from engine.hardware.distributed import World
from engine.planning.memory import MemoryEstimator
from model import build_model
from model.bdh import BDH, tiling
from model.generate import Decoder, RecordedDecoder

Shape = tuple[int, int]
"""B sequences of T tokens."""

TINY: dict[str, dict[str, Any]] = {
    "bdh-25m": {"name": "bdh", "n_layer": 1, "n_embd": 32, "mlp_internal_dim_multiplier": 8},
    "gpt2-124m": {"name": "gpt", "n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 256},
    "llama-1b": {"name": "llama", "n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 256},
}


def shape_for(bench: Bench, shape: Shape) -> Shape:
    return (2, 16) if bench.tiny else shape


def model_sizes(bench: Bench, name: ModelName) -> dict[str, Any]:
    sizes = TINY[name] if bench.tiny else SIZES[name]
    return {"n_head": 4, "vocab_size": 256, "dropout": 0.0, **sizes}


def prediction(
    bench: Bench, name: ModelName, path: KernelPath, shape: Shape, dtype: Format = "bf16"
) -> Prediction | None:
    return None if bench.tiny else predict(name, path, *shape, dtype)


# BDH


def bdh(bench: Bench) -> Iterator[Row]:
    """Ours is shown to be right before it is timed; the reference's rounding can wait."""
    reference = load(bench.reference) if bench.reference else None
    some = rivals(bench, reference)
    yield from rounding_errors(bench, [kind for kind in some if kind.ours], reference)
    for shape, dropout in (((32, 512), 0.1), ((32, 512), 0.0), ((8, 512), 0.0)):
        yield from bdh_steps(bench, shape_for(bench, shape), dropout)
        if bench.tiny:
            break
    yield from rounding_errors(bench, [kind for kind in some if not kind.ours], reference)


def rounding_errors(bench: Bench, some: list[Kind], reference: ModuleType | None) -> Iterator[Row]:
    torch.manual_seed(1)
    batch = bdh_batch(bench, (2, 128))
    for kind in some:
        what = f"error of logits: {kind.title}"
        try:
            (found,) = rounding(SMALL, [kind], reference, bench.device, batch)
        except Exception as error:
            yield failed(what, error)
            continue
        note = f"relative to float64; of the loss {found[2]:.0e}, the worst gradient {found[3]:.0e}"
        yield Row(what, [found[1]], "relative", note=note)


def long(bench: Bench) -> Iterator[Row]:
    for shape in ((1, 8192), (8, 8192)):
        yield from bdh_steps(bench, (1, 64) if bench.tiny else shape, 0.0)
        if bench.tiny:
            return


def bdh_batch(bench: Bench, shape: Shape) -> tuple[Tensor, Tensor]:
    rows = random_rows(bench, "bdh-25m", shape)
    return rows[:, :-1], rows[:, 1:].contiguous()  # the reference views its targets


def bdh_steps(bench: Bench, shape: Shape, dropout: float) -> Iterator[Row]:
    """Forward and backward, without an optimizer."""
    config = BF16.config(sections(bench, "bdh-25m", shape)).to_bdh_config()
    config = replace(config, dropout=dropout)
    reference = load(bench.reference) if bench.reference else None
    torch.manual_seed(1)
    weights = BDH(config).to(bench.device)
    batch = bdh_batch(bench, shape)
    free = torch.cuda.mem_get_info()[0] if bench.cuda else 0
    works = []
    for kind in rivals(bench, reference):
        needed = 0 if kind.ours else step_bytes(kind, config, *shape)
        in_float32 = kind.ours and kind.dtype is torch.float32
        if in_float32 or (bench.cuda and needed > 0.9 * free):
            continue
        path: KernelPath = "triton" if kind.triton else "torch"
        foreseen = kind.ours and kind.compiled and not dropout
        works.append(
            Work(
                f"{shape[0]} x {shape[1]}, dropout {dropout}: {kind.title}",
                partial(rival_step, kind, weights, reference, batch),
                tokens=shape[0] * shape[1],
                flops=float(weights.flops_per_token(shape[1]) * shape[0] * shape[1]),
                predicted=prediction(bench, "bdh-25m", path, shape) if foreseen else None,
            )
        )
    yield from bench.compare(works)


def rivals(bench: Bench, reference: ModuleType | None) -> list[Kind]:
    """Returns the ways to make a step, the reference as its authors train it first. It is compiled
    then, and not compared otherwise; tiny: nothing is compiled."""
    found = kinds(bench.device, reference)
    return [k for k in found if k.name != "reference-bf16" and not (bench.tiny and k.compiled)]


def rival_step(
    kind: Kind, weights: BDH, reference: Any, batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    rival = Rival(kind, weights, reference)
    return partial(rival.step, *batch)


# Training steps of all models


def sections(bench: Bench, name: ModelName, shape: Shape) -> Sections:
    training = {"batch_size": shape[0], "block_size": shape[1], "max_iters": 1 << 20}
    return {"model": model_sizes(bench, name), "training": training}


def random_rows(bench: Bench, name: ModelName, shape: Shape) -> Tensor:
    vocabulary = model_sizes(bench, name)["vocab_size"]
    return torch.randint(vocabulary, (shape[0], shape[1] + 1), device=bench.device)


def compiled_trainer(bench: Bench, name: ModelName, shape: Shape, mode: Mode) -> Trainer:
    trainer = Trainer(sections(bench, name, shape), mode, bench.device)
    if bench.cuda:
        said = trainer.compile(random_rows(bench, name, shape))
        assert said.startswith("compiled"), said
    return trainer


def step_work(bench: Bench, name: ModelName, shape: Shape, mode: Mode = BF16) -> Work:
    """A training step of ours with its optimizer, compiled."""

    def build() -> Callable[[], object]:
        trainer = compiled_trainer(bench, name, shape, mode)
        return partial(trainer.step, random_rows(bench, name, shape))

    predicted = None
    if mode in (BF16, TRITON, FP8_CURRENT):
        dtype: Format = "fp8" if mode is FP8_CURRENT else "bf16"
        path: KernelPath = "triton" if mode is TRITON else "torch"
        predicted = prediction(bench, name, path, shape, dtype)
    return Work(
        f"{name}, {shape[0]} x {shape[1]}: {mode.title}",
        build,
        tokens=shape[0] * shape[1],
        flops=step_flops(bench, name, shape),
        predicted=predicted,
    )


def step_flops(bench: Bench, name: ModelName, shape: Shape) -> float:
    with torch.device("meta"):
        model = build_model(BF16.config(sections(bench, name, shape)))
    return float(model.flops_per_token(shape[1]) * shape[0] * shape[1])


def kernels(bench: Bench) -> Iterator[Row]:
    """Training steps of BDH by either kind of kernels, where their time goes, and those of torch by
    how much is computed at once."""
    shape = shape_for(bench, (32, 512))
    modes = (BF16, TRITON) if bench.cuda else (BF16,)
    yield from bench.compare([step_work(bench, "bdh-25m", shape, mode) for mode in modes])
    for mode in modes:
        yield from profile(bench, mode.title, step_work(bench, "bdh-25m", shape, mode).build())
    step = step_work(bench, "bdh-25m", shape).build()
    sizes = ((4, 128), (1, 128), (2, 128), (8, 128), (4, 256), (4, 512))
    works = [
        Work(
            f"{shape[0]} x {shape[1]}: buffers of {gigabytes} GB, strips of {strip}",
            partial(partial, with_sizes, step, gigabytes << 30, strip),
            tokens=shape[0] * shape[1],
        )
        for gigabytes, strip in (sizes[:1] if bench.tiny else sizes)
    ]
    yield from bench.compare(works)


def with_sizes(step: Callable[[], object], buffers: int, strip: int) -> None:
    """Makes a step with other constants of model/bdh/tiling.py."""
    before = tiling._GPU_BUFFERS, tiling._GPU_STRIP
    tiling._GPU_BUFFERS, tiling._GPU_STRIP = buffers, strip
    step()
    tiling._GPU_BUFFERS, tiling._GPU_STRIP = before


def profile(bench: Bench, title: str, step: Callable[[], object]) -> Iterator[Row]:
    """The kernels that take the most time of a step; the whole table goes to the log."""
    for _ in range(WARM_UP):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        step()
        if bench.cuda:
            torch.cuda.synchronize()
    order = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    events = found.key_averages()
    print(events.table(sort_by=order, row_limit=40), file=sys.stderr)
    for event in sorted(events, key=lambda event: -getattr(event, order))[:10]:
        ms = getattr(event, order) / 1e3
        yield Row(f"{title}: {event.key[:60]}", [ms], note=f"{event.count} calls")


def transformers(bench: Bench) -> Iterator[Row]:
    for shape in ((12, 1024), (48, 1024)):
        shape = shape_for(bench, shape)
        works = [step_work(bench, "gpt2-124m", shape, mode) for mode in (BF16, RESIDUAL_BF16)]
        if bench.nanogpt is not None:
            works.insert(0, nanogpt_work(bench, bench.nanogpt, shape))
        yield from bench.compare(works)
        if bench.tiny:
            return
    modes = (BF16, RESIDUAL_BF16)
    yield from bench.compare([step_work(bench, "llama-1b", (4, 2048), mode) for mode in modes])


def nanogpt_work(bench: Bench, directory: Path, shape: Shape) -> Work:
    """A training step of nanoGPT as its train.py makes it."""

    def build() -> Callable[[], object]:
        sizes = model_sizes(bench, "gpt2-124m")
        sizes.pop("name")
        module = load_nanogpt(directory)
        config = module.GPTConfig(block_size=shape[1], bias=False, **sizes)
        model = module.GPT(config).to(bench.device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), bench.device.type)
        forward = torch.compile(model) if bench.cuda else model
        rows = random_rows(bench, "gpt2-124m", shape)

        def step() -> None:
            with torch.autocast(bench.device.type, dtype=torch.bfloat16):
                loss = forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())[1]
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    flops = step_flops(bench, "gpt2-124m", shape)
    title = f"nanoGPT, {shape[0]} x {shape[1]}: compiled"
    return Work(title, build, tokens=shape[0] * shape[1], flops=flops)


def precision(bench: Bench) -> Iterator[Row]:
    """Each format beside bf16; FP8 of all models before the rest."""
    bdh_shape, gpt_shape = shape_for(bench, (32, 512)), shape_for(bench, (12, 1024))
    rest = (BF16, FP8_DELAYED, ADAMW_8BIT, ADAMW_4BIT, late("nf4", 0.0), ENGINE_CURRENT)
    cases: list[tuple[ModelName, Shape, tuple[Mode, ...]]] = [
        ("bdh-25m", bdh_shape, (BF16, FP8_CURRENT)),
        ("gpt2-124m", gpt_shape, (BF16, FP8_CURRENT)),
        ("llama-1b", shape_for(bench, (4, 2048)), (BF16, FP8_CURRENT)),
        ("bdh-25m", bdh_shape, rest),
        ("gpt2-124m", gpt_shape, rest),
    ]
    for name, shape, modes in cases[:2] if bench.tiny else cases:
        yield from bench.compare([step_work(bench, name, shape, mode) for mode in modes])


# Memory


def memory(bench: Bench) -> Iterator[Row]:
    cases: list[tuple[ModelName, Shape, Mode]] = [
        ("bdh-25m", (8, 512), BF16),
        ("bdh-25m", (32, 512), BF16),
        ("bdh-25m", (32, 512), FP8_CURRENT),
        ("bdh-25m", (1, 8192), BF16),
        ("gpt2-124m", (12, 1024), BF16),
        ("gpt2-124m", (12, 1024), ADAMW_4BIT),
        ("gpt2-124m", (48, 1024), BF16),
        ("llama-1b", (4, 2048), BF16),
    ]
    for name, shape, mode in cases[:1] if bench.tiny else cases:
        try:
            yield memory_row(bench, name, shape_for(bench, shape), mode)
        except Exception as error:
            yield failed(f"{name}, {mode.title}", error)


def memory_row(bench: Bench, name: ModelName, shape: Shape, mode: Mode) -> Row:
    gc.collect()  # what the models before have left in cycles
    before = held(bench.device) if bench.cuda else 0
    trainer = compiled_trainer(bench, name, shape, mode)
    rows = random_rows(bench, name, shape)
    for _ in range(2):  # the first step compiles and makes the optimizer's state
        reset_peak(bench.device)
        trainer.step(rows)
    peak = held(bench.device, peak=True) - before
    world = World(0, 1, bench.device)
    estimator = MemoryEstimator(
        trainer.config, trainer.model, trainer.precision, world, compiled=bench.cuda
    )
    title = f"{name}, {shape[0]} x {shape[1]}: {mode.title}"
    return Row(title, [peak / GB], "GB", predicted=estimator.memory().required / GB)


# Generation


def generate(bench: Bench) -> Iterator[Row]:
    """Greedy tokens one after another in float32, as sample.py computes."""
    cases: list[tuple[ModelName, int]] = [
        ("bdh-25m", 200),
        ("bdh-25m", 20000),
        ("gpt2-124m", 200),
        ("gpt2-124m", 800),
    ]
    for name, position in cases:
        position, tokens = (10, 2) if bench.tiny else (position, 20)
        works = [
            Work(
                f"{name} after {position:,} tokens, {words}",
                partial(generating, bench, name, position, tokens, recorded),
                calls=tokens,
            )
            for words, recorded in {"launched": False, "one CUDA graph": True}.items()
            if bench.cuda or not recorded
        ]
        yield from bench.compare(works)


def generating(
    bench: Bench, name: ModelName, position: int, tokens: int, recorded: bool
) -> Callable[[], None]:
    """Returns what generates `tokens` more at each call."""
    with bench.device, torch.inference_mode():
        model = build_model(BF16.config(sections(bench, name, (1, 1024)))).eval()
        decoder = Decoder(model, 1)
        if recorded:
            max_length = position + tokens * (WARM_UP + TURNS)
            decoder = RecordedDecoder(model, 1, max_length, bench.device, record_graph)
        token = decoder.prefill(torch.randint(256, (1, position))).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def run() -> None:
        nonlocal token
        for _ in range(tokens):
            token = decoder.decode(token).argmax(-1, keepdim=True)

    return run


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "bdh": bdh,
    "kernels": kernels,
    "transformers": transformers,
    "precision": precision,
    "memory": memory,
    "long": long,
    "generate": generate,
}
