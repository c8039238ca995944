"""Held-out losses of the low-precision modes; part of `bench.precision`.

Modes of a seed share first weights and batches, so gaps are taken seed by seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.bdh_measure import table
from bench.precision_modes import (
    ADAMW_4BIT,
    ADAMW_8BIT,
    BF16,
    CPU,
    FLOAT32,
    FP8_CURRENT,
    FP8_DELAYED,
    HISTORY,
    KINDS,
    Bytes,
    Mode,
    Sections,
    Trainer,
    bdh,
    gpt,
    late,
    low_precision,
    read_text,
    shape_of,
    torchao_mode,
)
from engine.checkpoint.export import WEIGHTS, read_weights, write_export
from engine.hardware.device import supports_fast_bfloat16
from engine.precision.weights_4bit import QuantizedWeights

COLUMNS = "mode", "held-out loss", "against", "gap", "gap of each seed", "limit", "verdict"
EVALUATION = (24, (16, 64))  # batches, and their shape
LONG = 900  # steps
FOIL = "AdamW 4-bit of torchao"
AFTERWARDS = ", rounded afterwards to "
IN_FILE = ": its file in 4 bits"
BOTH = replace(
    FP8_CURRENT,
    title="fp8 and 4-bit weights, nf4",
    low={**FP8_CURRENT.low, **late("nf4").low},
)


@dataclass(frozen=True)
class Row:
    """A row of the table: a loss, what it is compared with, and the limit of their gap."""

    of: str
    against: str
    limit: float | None = None
    both_ways: bool = False

    def cells(self, losses: dict[str, list[float]]) -> list[str]:
        values = losses[self.of]
        spread = f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
        if self.against == self.of:
            return [self.of, spread, "", "", "", "", ""]
        gaps = [a - b for a, b in zip(values, losses[self.against], strict=True)]
        mean, each = statistics.fmean(gaps), ", ".join(f"{gap:+.4f}" for gap in gaps)
        line = [self.of, spread, self.against, f"{mean:+.4f}", each]
        if self.limit is None:
            return [*line, "", ""]
        reach = abs(mean) if self.both_ways else mean
        sign = "within " if self.both_ways else "<= +"
        verdict = "pass" if reach <= self.limit else "**FAIL**"
        return [*line, f"{sign}{self.limit:.2f}", verdict]


@dataclass(frozen=True)
class Model:
    """A model to train, and the limit of the gap of AdamW in 4 bits."""

    title: str
    shape: dict[str, Any]
    rate: float
    limit: float


MODELS = {
    "bdh": Model("BDH, 2 layers, D 64, multiplier 16, lr 3e-3", bdh(64, 16), 3e-3, 0.03),
    "gpt": Model("GPT, 3 layers of 128, lr 1e-3", gpt(128, 3), 1e-3, 0.02),
}


@dataclass(frozen=True)
class Setting:
    """Model, text and seed, which all modes share."""

    shape: Sections
    text: Bytes
    seed: int
    emulated: bool

    def trainer(self, mode: Mode) -> Trainer:
        return Trainer(self.shape, mode, CPU, self.seed, self.emulated)

    def train(self, mode: Mode) -> Trainer:
        trainer = self.trainer(mode)
        steps = trainer.config.training.max_iters
        for batch in islice(self.text.batches(self.seed, (8, 64)), steps):
            trainer.step(batch)
        return trainer

    @property
    def held_out(self) -> list[Tensor]:
        count, shape = EVALUATION
        return list(islice(self.text.batches(0, shape, held_out=True), count))


def losses_of(setting: Setting, mode: Mode, notes: dict[str, str]) -> Iterator[tuple[str, float]]:
    """Trains; yields name and held-out loss of the weights as trained, rounded and exported."""
    trainer, batches = setting.train(mode), setting.held_out
    plain, quantized = trainer.loss(batches), trainer.precision.quantized
    if trainer.precision.fp8 is not None:
        made = trainer.precision.metrics()
        share = made.get("train/fp8_clipped")
        extra = "" if share is None else f", {share:.0%} of operands clipped (history {HISTORY})"
        notes[mode.title] = f"{made['train/fp8_products']:.0f} FP8 matmuls per step{extra}"
    if quantized is not None:
        low = trainer.loss(batches, quantized.applied())
        exported = loss_of_file(setting, mode, quantized)
        assert low == exported, f"{mode.title}: {low} in 4 bits, but {exported} of the file"
        yield f"{mode.title}: as trained", plain
        yield f"{mode.title}{IN_FILE}", exported
        return
    yield mode.title, plain
    for kind in KINDS if mode.title == FLOAT32.title else ():
        rounded = QuantizedWeights(trainer.model, low_precision(kind))
        yield f"{mode.title}{AFTERWARDS}{kind}", trainer.loss(batches, rounded.applied())


def loss_of_file(setting: Setting, mode: Mode, quantized: QuantizedWeights) -> float:
    """Returns the held-out loss of a fresh model with the exported weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_export(Path(folder) / "out", quantized.packed_tensors(), {})
        reader = setting.trainer(mode)
        read_weights(Path(folder) / "out" / WEIGHTS, reader.model)
    return reader.loss(setting.held_out)


def fp8_rows(against: str) -> list[Row]:
    return [Row(mode.title, against, 0.02, both_ways=True) for mode in (FP8_CURRENT, FP8_DELAYED)]


def rows(model: Model, base: str, foil: bool) -> list[Row]:
    """Returns the table of one model; base: the mode that FP8 is compared with."""
    exact, fp4 = FLOAT32.title, f"{late('fp4').title}{IN_FILE}"
    found = [Row(exact, exact), *([Row(base, exact)] if base != exact else []), *fp8_rows(base)]
    found += [Row(ADAMW_4BIT.title, exact, model.limit), Row(ADAMW_8BIT.title, exact)]
    found += [Row(FOIL, exact)] if foil else []
    found += [Row(f"{exact}{AFTERWARDS}{kind}", exact) for kind in KINDS]
    for kind, limit in zip(KINDS, (0.02, 0.03), strict=True):
        title = late(kind).title
        found += [Row(f"{title}: as trained", exact), Row(f"{title}{IN_FILE}", exact, limit)]
    found.append(Row(fp4, f"{exact}{AFTERWARDS}fp4", 0.0))
    return [*found, Row(f"{BOTH.title}: as trained", base), Row(f"{BOTH.title}{IN_FILE}", base)]


def measured(
    model: Model, modes: Sequence[Mode], options: argparse.Namespace, emulated: bool = False
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Returns the losses of all seeds by name, and a note for some modes."""
    steps = options.emulated if emulated else options.steps
    shape, text = shape_of(model.shape, model.rate, steps), read_text(options.text)
    losses: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    for seed in range(options.seeds):
        for mode in modes:
            for name, value in losses_of(Setting(shape, text, seed, emulated), mode, notes):
                losses.setdefault(name, []).append(value)
    return losses, notes


def loss(options: argparse.Namespace) -> Iterator[str]:
    """Measures all modes as the trainer computes them here."""
    text, (count, (batch, length)) = read_text(options.text), EVALUATION
    sizes = f"{len(text.train) / 1e6:.1f} MB, and {len(text.held_out) / 1e6:.2f} MB held out"
    yield f"{options.steps} steps of 8 x 64 bytes of {text.title} ({sizes}),"
    yield f"{options.seeds} seeds; loss on {count} fixed batches of {batch} x {length}, in nats per"
    yield "byte. A seed's modes share first weights and batches. 4-bit weights set in for the last"
    yield "fifth; the loss of a file is that of a fresh model that read the export, and is checked"
    yield "to equal the run's own in 4 bits."
    fast = supports_fast_bfloat16(CPU)
    if not fast:
        yield "This CPU has no bf16 matmuls: the trainer uses float32 for what is not fp8."
    foil, base = torchao_mode(), BF16.title if fast else FLOAT32.title
    modes = [FLOAT32, *([BF16] if fast else []), FP8_CURRENT, FP8_DELAYED, BOTH]
    modes += [mode.in_float32() for mode in (ADAMW_4BIT, ADAMW_8BIT, *map(late, KINDS))]
    if isinstance(foil, str):
        yield f"torchao's AdamW4bit: {foil}."
    else:
        modes.append(foil.in_float32())
    for name in options.models.split(","):
        model = MODELS[name]
        losses, notes = measured(model, modes, options)
        yield from ["", f"### {model.title}", ""]
        found = rows(model, base, foil=isinstance(foil, Mode))
        yield from table(COLUMNS, (row.cells(losses) for row in found))
        yield from ["", *(f"{mode}: {note}." for mode, note in notes.items())]


def emulated(options: argparse.Namespace) -> Iterator[str]:
    """Measures FP8 against bf16 if the CPU has no bf16 matmuls."""
    if supports_fast_bfloat16(CPU):
        yield "As above: this CPU computes bf16."
        return
    yield f"As above, {options.emulated} steps; bf16 is computed as such, by software."
    for name in options.models.split(","):
        model = MODELS[name]
        losses, notes = measured(model, [BF16, FP8_CURRENT, FP8_DELAYED], options, emulated=True)
        yield from ["", f"### {model.title}, bf16", ""]
        found = [Row(BF16.title, BF16.title), *fp8_rows(BF16.title)]
        yield from table(COLUMNS, (row.cells(losses) for row in found))
        yield from ["", *(f"{mode}: {note}." for mode, note in notes.items())]


def longer(options: argparse.Namespace) -> Iterator[str]:
    """Measures 4-bit weights in runs long enough for rounding to cost something."""
    yield f"As above, {LONG} steps of BDH in float32; the limits are meant for this length."
    model, options = MODELS["bdh"], argparse.Namespace(**vars(options) | {"steps": LONG})
    losses, _ = measured(model, [FLOAT32, *(late(kind).in_float32() for kind in KINDS)], options)
    found = [row for row in rows(model, FLOAT32.title, foil=False) if row.of in losses]
    yield from ["", *table(COLUMNS, (row.cells(losses) for row in found))]
