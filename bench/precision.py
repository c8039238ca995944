"""Low precision: the loss, the memory and the time of each mode.

    python -m bench.precision [--seeds 3] [--steps 300] [--text FILE] [--output]
    python -m bench.precision --only loss --models bdh  # loss, longer, emulated, size, time

Loss: small models trained from the same weights on the same batches, once per mode and seed; gaps
are taken seed by seed to the mode compared with, and their mean is held against a limit. Times: the
modes take turns, once per round; ratios are the median of the rounds' ratios. On a GPU,
bench/gpu.py measures speed and memory. --output writes bench/results/precision-cpu.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.bdh_measure import hardware, seconds, table
from bench.precision_loss import emulated, longer, loss
from bench.precision_modes import (
    ADAMW_4BIT,
    ADAMW_8BIT,
    BF16,
    CPU,
    FLOAT32,
    FP8_CURRENT,
    FP8_DELAYED,
    KINDS,
    Mode,
    Sections,
    Trainer,
    bdh,
    gpt,
    late,
    low_precision,
    shape_of,
)
from engine.checkpoint.export import write_export
from engine.hardware.device import supports_fast_bfloat16
from engine.optim.build import low_bit_state_size
from engine.precision.weights_4bit import QuantizedWeights, unique_tensors
from model import build_model

RESULTS = Path(__file__).resolve().parent / "results"


def size(options: argparse.Namespace) -> Iterator[str]:
    models = {
        "BDH, D 64, multiplier 128": bdh(64, 128),
        "BDH, D 256, multiplier 128": bdh(256, 128),
        "GPT, 6 layers of 384": gpt(384, 6),
    }
    if options.quick:
        models = {"BDH, D 64, multiplier 16": bdh(64, 16)}
    state, weights = [], []
    for title, model in models.items():
        shape = shape_of(model, 1e-3, 10)
        state += [[title, *state_row(shape, mode)] for mode in (BF16, ADAMW_8BIT, ADAMW_4BIT)]
        weights += [[title, *weights_row(shape, kind)] for kind in KINDS]
    yield "State of the optimizer after a step, counted from storages."
    yield ""
    columns = "in few bits", "bytes of each in few bits", "bytes per parameter, all"
    yield from table(("model", "optimizer", "parameters", *columns), state)
    yield ""
    yield "Weights in 4 bits with 8-bit scales, embedding and head left out; files by the export."
    yield ""
    columns = "bytes of each in 4 bits", "file, MB", "float32 file, MB"
    yield from table(("model", "kind", "in 4 bits", *columns, "share"), weights)


def state_row(shape: Sections, mode: Mode) -> list[str]:
    trainer = Trainer(shape, mode, CPU)
    fill_gradients(trainer)
    trainer.optimizer.step()
    found = {
        storage._cdata: storage.nbytes()
        for state in trainer.optimizer.state.values()
        for storage in (v.untyped_storage() for v in state.values() if isinstance(v, Tensor))
    }
    low, covered, _ = low_bit_state_size(trainer.optimizer)
    title = "AdamW" if mode is BF16 else mode.title
    share = [f"{covered:,}", f"{low / covered:.4f}"] if covered else ["-", "-"]
    each = sum(found.values()) / trainer.parameters
    return [title, f"{trainer.parameters:,}", *share, f"{each:.4f}"]


def fill_gradients(trainer: Trainer) -> None:
    for parameter in trainer.model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3


def weights_row(shape: Sections, kind: str) -> list[str]:
    model = build_model(BF16.config(shape))
    quantized, own = QuantizedWeights(model, low_precision(kind)), unique_tensors(model)
    parts = quantized.packed_tensors()
    packed = {name for name in own if f"{name}.absmax" in parts}
    rest = sum(value.nbytes for name, value in own.items() if name not in packed)
    taken = sum(part.nbytes for part in parts.values()) - rest
    count = sum(own[name].numel() for name in packed)
    with tempfile.TemporaryDirectory() as folder:
        small = write_export(Path(folder) / "low", parts, {})
        large = write_export(Path(folder) / "whole", own, {})
    sizes = [f"{small / 1e6:.3f}", f"{large / 1e6:.3f}", f"{small / large:.1%}"]
    return [kind, f"{count:,}", f"{taken / count:.4f}", *sizes]


def take_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each in every round, after one more round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work, CPU)
            taken[name] += [spent] if turn else []
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def time(options: argparse.Namespace) -> Iterator[str]:
    rounds = 2 if options.quick else options.rounds
    base = BF16 if supports_fast_bfloat16(CPU) else FLOAT32
    if base is FLOAT32:
        yield "This CPU has no bf16 matmuls: the trainer uses float32 for what is not fp8."
    yield f"Training steps, {rounds} rounds, not compiled. 4-bit weights are used in the steps"
    yield "measured, and in the last fifth of a run: the last column is the ratio over a whole run."
    yield ""
    cases = [("BDH, 2 layers, D 64, multiplier 16, 8 x 64", bdh(64, 16), (8, 64), 10)]
    if not options.quick:
        cases.append(("BDH, 2 layers, D 256, multiplier 128, 2 x 128", bdh(256, 128), (2, 128), 1))
        cases.append(("GPT, 3 layers of 128, 8 x 64", gpt(128, 3), (8, 64), 10))
    lines: list[list[str]] = []
    for title, model, batch, steps in cases:
        taken = step_times(model, batch, steps, rounds)
        lines += [[title, *cells] for cells in step_rows(taken, base, steps)]
    columns = "model", "mode", "ms", f"x {base.title}", "over a run"
    yield from table(columns, lines)
    yield ""
    large = bdh(64, 16) if options.quick else bdh(256, 128)
    yield from optimizer_times(shape_of(large, 1e-3, 10), rounds)


def step_times(
    model: dict[str, Any], batch: tuple[int, int], steps: int, rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds of `steps` steps of each mode, in every round."""
    shape, fast = shape_of(model, 1e-3, 10_000), supports_fast_bfloat16(CPU)
    weights = [late(kind, 0.0) for kind in KINDS]
    modes = [FLOAT32, *([BF16] if fast else []), *weights]
    modes += [ADAMW_8BIT, ADAMW_4BIT, FP8_CURRENT, FP8_DELAYED]
    data = torch.randint(256, (batch[0], batch[1] + 1))

    def run(trainer: Trainer) -> None:
        for _ in range(steps):
            trainer.step(data)

    trainers = {mode.title: Trainer(shape, mode, CPU) for mode in modes}
    taken = take_turns({name: partial(run, each) for name, each in trainers.items()}, rounds)
    for trainer in trainers.values():
        trainer.fp8_matmuls_per_step()
    return taken


def step_rows(taken: dict[str, list[float]], base: Mode, steps: int) -> Iterator[list[str]]:
    late_ones = {late(kind).title for kind in KINDS}
    for name, spent in taken.items():
        against = ratio(spent, taken[base.title])
        of_run = f"{0.8 + 0.2 * against:.2f}" if name in late_ones else ""
        yield [name, f"{statistics.median(spent) / steps * 1000:.1f}", f"{against:.2f}", of_run]


def optimizer_times(shape: Sections, rounds: int) -> Iterator[str]:
    trainers = {}
    for name, mode in {"AdamW": BF16, "8-bit": ADAMW_8BIT, "4-bit": ADAMW_4BIT}.items():
        trainers[name] = Trainer(shape, mode, CPU)
        fill_gradients(trainers[name])
    works: dict[str, Callable[[], object]] = {n: t.optimizer.step for n, t in trainers.items()}
    model = trainers["AdamW"].model
    for kind in KINDS:
        works[f"rounding to {kind}"] = partial(
            round_once, QuantizedWeights(model, low_precision(kind))
        )
    taken = take_turns(works, rounds)
    count = trainers["AdamW"].parameters
    yield f"Optimizer steps, and rounding weights once and back, with {count:,} parameters."
    yield ""
    lines = []
    for name, spent in taken.items():
        each, best = (f(spent) / count * 1e9 for f in (statistics.median, min))
        against = ratio(spent, taken["AdamW"])
        lines.append([name, f"{each:.2f}", f"{best:.2f}", f"{against:.1f}"])
    yield from table(("work", "ns per parameter, median", "minimum", "x AdamW"), lines)


def round_once(quantized: QuantizedWeights) -> None:
    with quantized.applied():
        pass


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[str]]]] = {
    "loss": ("Loss", loss),
    "longer": ("Loss of 4-bit weights in longer runs", longer),
    "emulated": ("Loss of fp8 against bf16", emulated),
    "size": ("Size", size),
    "time": ("Time on a CPU", time),
}


def versions() -> str:
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("bitsandbytes", "torchao", "transformer_engine"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def report(options: argparse.Namespace) -> None:
    """Prints and writes each part when it is done."""
    whole: list[str] = []

    def say(lines: Iterator[str] | Sequence[str]) -> None:
        for line in lines:
            print(line, flush=True)
            whole.append(line)

    say(["# Low precision on a CPU", ""])
    say([f"{datetime.date.today()}. {hardware(CPU)}; {versions()},"])
    count = torch.get_num_threads()
    say([f"{count} thread{'s' * (count > 1)}. Written by `python -m bench.precision`.", ""])
    for name in options.only.split(","):
        title, part = PARTS[name]
        say([f"## {title} (load {os.getloadavg()[0]:.1f} before)", ""])
        say(part(options))
        say([""])
        if options.output:
            text = "\n".join(whole).rstrip() + "\n"
            (RESULTS / "precision-cpu.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of each run that measures a loss")
    parser.add_argument(
        "--emulated", type=int, default=60, help="steps of the runs with emulated bf16"
    )
    parser.add_argument("--models", default="bdh,gpt", help="models whose losses are measured")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this text")
    parser.add_argument("--only", default=",".join(PARTS), help="parts of the measurement")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the bench itself")
    parser.add_argument("--output", action="store_true", help="write bench/results/precision-*.md")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - PARTS.keys()
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    report(options)


if __name__ == "__main__":
    main()
