"""The parts of `bench.gpu` that time single steps: ceilings, BDH, transformers, formats, tokens."""

from __future__ import annotations

import math
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
from bench.gpu_report import CEILING, Row
from bench.precision_modes import (
    ADAMW_4BIT,
    ADAMW_8BIT,
    BF16,
    ENGINE_CURRENT,
    ENGINE_DELAYED,
    FP8_CURRENT,
    FP8_DELAYED,
    Mode,
    Sections,
    Trainer,
    late,
)
from engine.hardware.cuda_graph import record_graph
from engine.hardware.distributed import World
from engine.loss import inputs_and_targets
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


# Ceilings


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device reaches; bench/gpu_model.py assumes these rates."""
    size = 1 << (20 if bench.tiny else 30)
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    for row in bench.compare([Work("copy", lambda: partial(source.clone().copy_, source))]):
        yield replace(row, unit="TB/s", values=[2 * size / ms / 1e9 for ms in row.values])
    for what, sizes in products(bench).items():
        flops, calls = 2.0 * math.prod(sizes), 1 if bench.tiny else 20
        work = Work(what, partial(product, bench, sizes, what, calls), calls=calls)
        for row in bench.compare([work]):
            yield replace(row, unit="TFLOP/s", values=[flops / ms / 1e9 for ms in row.values])
    yield from launches(bench)


def products(bench: Bench) -> dict[str, tuple[int, int, int, int]]:
    """Returns matmuls by name: heads, and (a x b) @ (b x c). BDH's are those of 32 x 512 tokens."""
    M, D, N, C = (64, 16, 32, 16) if bench.tiny else (16384, 256, 8192, 512)
    large = 128 if bench.tiny else 8192
    return {
        CEILING: (1, large, large, large),
        "fp8 of that size": (1, large, large, large),
        "BDH u, v, dz: 256 terms": (4, M, D, N),
        "BDH scores": (4 * M // C, C, N, C),
        "BDH y, da, dx: 8,192 terms": (4, M, N, D),
        "BDH gradient of a weight, float32 result": (4, D, M, N),
        "BDH dr": (4 * M // C, C, C, N),
    }


def repeated(once: Callable[[], object], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            once()

    return run


def product(
    bench: Bench, sizes: tuple[int, int, int, int], what: str, calls: int
) -> Callable[[], None]:
    """Returns what makes the product `calls` times."""
    batch, a, b, c = sizes
    left = torch.randn(batch, a, b, device=bench.device, dtype=torch.bfloat16)
    right = torch.randn(batch, b, c, device=bench.device, dtype=torch.bfloat16)
    if what.startswith("fp8"):
        one = torch.ones((), device=bench.device)
        eight = left[0].to(torch.float8_e4m3fn), right[0].mT.contiguous().to(torch.float8_e4m3fn).mT
        once = partial(torch._scaled_mm, *eight, one, one, out_dtype=torch.bfloat16)
        return repeated(once, calls)
    if what.endswith("float32 result") and bench.cuda:
        return repeated(partial(torch.bmm, left, right, out_dtype=torch.float32), calls)
    return repeated(partial(torch.bmm, left, right, out=left.new_empty(batch, a, c)), calls)


def launches(bench: Bench) -> Iterator[Row]:
    """What the host takes to queue a kernel: the work itself is next to nothing."""
    x, calls = torch.zeros(128, device=bench.device), 10 if bench.tiny else 1000
    ways = {"an eager kernel": lambda: x.add_(1)}
    if not bench.tiny:
        ways["a compiled function"] = torch.compile(lambda: x.add_(1).mul_(0.5))
    works = [Work(what, partial(repeated, once, calls), calls=calls) for what, once in ways.items()]
    for row in bench.compare(works):
        yield replace(row, unit="us", values=[1e3 * ms for ms in row.values])


# BDH


def bdh(bench: Bench) -> Iterator[Row]:
    reference = load(bench.reference) if bench.reference else None
    torch.manual_seed(1)
    batch = inputs_and_targets(random_rows(bench, "bdh-25m", (2, 128)), bench.device)[:2]
    found = rounding(SMALL, rivals(bench, reference), reference, bench.device, batch)
    for name, logits, loss, gradient in found:
        note = f"relative to float64; of the loss {loss:.0e}, the worst gradient {gradient:.0e}"
        yield Row(f"error of logits: {name}", [logits], "relative", note=note)
    for shape, dropout in (((32, 512), 0.1), ((32, 512), 0.0), ((8, 512), 0.0)):
        yield from bdh_steps(bench, shape_for(bench, shape), dropout)
        if bench.tiny:
            return


def long(bench: Bench) -> Iterator[Row]:
    for shape in ((1, 8192), (8, 8192)):
        yield from bdh_steps(bench, (1, 64) if bench.tiny else shape, 0.0)
        if bench.tiny:
            return


def bdh_steps(bench: Bench, shape: Shape, dropout: float) -> Iterator[Row]:
    """Forward and backward, without an optimizer."""
    config = BF16.config(sections(bench, "bdh-25m", shape)).to_bdh_config()
    config = replace(config, dropout=dropout)
    reference = load(bench.reference) if bench.reference else None
    torch.manual_seed(1)
    weights = BDH(config).to(bench.device)
    batch = inputs_and_targets(random_rows(bench, "bdh-25m", shape), bench.device)[:2]
    free = torch.cuda.mem_get_info()[0] if bench.cuda else 0
    works = []
    for kind in rivals(bench, reference):
        needed = 0 if kind.ours else step_bytes(kind, config, *shape)
        if kind.dtype is torch.float32 or (bench.cuda and needed > 0.9 * free):
            continue
        works.append(
            Work(
                f"{shape[0]} x {shape[1]}, dropout {dropout}: {kind.title}",
                partial(rival_step, kind, weights, reference, batch),
                tokens=shape[0] * shape[1],
                flops=float(weights.flops_per_token(shape[1]) * shape[0] * shape[1]),
                predicted=prediction(bench, "bdh-25m", "torch", shape) if kind.ours else None,
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
    if mode in (BF16, FP8_CURRENT):
        dtype: Format = "fp8" if mode is FP8_CURRENT else "bf16"
        predicted = prediction(bench, name, "torch", shape, dtype)
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
    """Steps of BDH by how much is computed at once, and where their time goes."""
    shape = shape_for(bench, (32, 512))
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
    yield from profile(bench, step)


def with_sizes(step: Callable[[], object], buffers: int, strip: int) -> None:
    """Makes a step with other constants of model/bdh/tiling.py."""
    before = tiling._GPU_BUFFERS, tiling._GPU_STRIP
    tiling._GPU_BUFFERS, tiling._GPU_STRIP = buffers, strip
    step()
    tiling._GPU_BUFFERS, tiling._GPU_STRIP = before


def profile(bench: Bench, step: Callable[[], object]) -> Iterator[Row]:
    """The kernels that take the most time of a step; the whole table goes to the log."""
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
        yield Row(f"of a step: {event.key[:60]}", [ms], note=f"{event.count} calls")


def transformers(bench: Bench) -> Iterator[Row]:
    for shape in ((12, 1024), (48, 1024)):
        shape = shape_for(bench, shape)
        works = [step_work(bench, "gpt2-124m", shape)]
        if bench.nanogpt is not None:
            works.insert(0, nanogpt_work(bench, bench.nanogpt, shape))
        yield from bench.compare(works)
        if bench.tiny:
            return
    yield from bench.compare([step_work(bench, "llama-1b", (4, 2048))])


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
    """Ratios are to bf16."""
    modes = [BF16, FP8_CURRENT, FP8_DELAYED, ENGINE_CURRENT, ENGINE_DELAYED]
    modes += [ADAMW_8BIT, ADAMW_4BIT, late("nf4", 0.0)]
    cases: list[tuple[ModelName, Shape]] = [("bdh-25m", (32, 512)), ("gpt2-124m", (12, 1024))]
    for name, shape in cases:
        shape = shape_for(bench, shape)
        yield from bench.compare([step_work(bench, name, shape, mode) for mode in modes])
    if not bench.tiny:
        yield from bench.compare(
            [step_work(bench, "llama-1b", (4, 2048), mode) for mode in (BF16, FP8_CURRENT)]
        )


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
    trainer = compiled_trainer(bench, name, shape, mode)
    rows = random_rows(bench, name, shape)
    for _ in range(2):  # the first step compiles and makes the optimizer's state
        reset_peak(bench.device)
        trainer.step(rows)
    peak = held(bench.device, peak=True)
    world = World(0, 1, bench.device)
    estimator = MemoryEstimator(
        trainer.config, trainer.model, trainer.precision, world, compiled=bench.cuda
    )
    title = f"{name}, {shape[0]} x {shape[1]}: {mode.title}"
    return Row(title, [peak / GB], "GB", predicted=estimator.memory().peak / GB)


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
            room = position + tokens * (WARM_UP + TURNS)
            decoder = RecordedDecoder(model, 1, room, bench.device, record_graph)
        token = decoder.prefill(torch.randint(256, (1, position))).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def run() -> None:
        nonlocal token
        for _ in range(tokens):
            token = decoder.decode(token).argmax(-1, keepdim=True)

    return run


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "ceilings": ceilings,
    "bdh": bdh,
    "kernels": kernels,
    "transformers": transformers,
    "precision": precision,
    "memory": memory,
    "long": long,
    "generate": generate,
}
