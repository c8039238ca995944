"""What `training.recompute: layer` costs in time and saves in memory, for each model.

    python -m bench.recompute [--rounds 9] [--output]

Micro-steps with and without it take turns, so that a slow moment of the machine meets both; ratios
are the median of the rounds' ratios. Memory is what torch's allocator has given out at most in a
step, beyond weights and gradients, beside what the start of a run would predict.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.bdh_measure import hardware, seconds, table
from config import Config
from engine.hardware.distributed import World
from engine.loss import next_token_loss
from engine.planning.memory import MemoryEstimator
from engine.precision.precision import Precision
from model import build_model
from tests.engine.allocations import peak_bytes

CPU = World(0, 1, torch.device("cpu"))
RESULTS = Path(__file__).resolve().parent / "results"
WIDE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"name": "gpt", **WIDE, "dropout": 0.1},
    "llama": {"name": "llama", **WIDE, "dropout": 0.0},
    "bdh": {"n_layer": 6, "n_embd": 256, "mlp_internal_dim_multiplier": 8, "vocab_size": 256},
}
COLUMNS = (
    *("model", "none, ms", "layer, ms", "layer / none"),
    *("none, MB (predicted)", "layer, MB (predicted)", "layer / none"),
)


@dataclass
class MicroStep:
    """Forward and backward of a model of its own; the bytes that it takes, and those predicted."""

    work: Callable[[], None]
    taken: int
    predicted: int


def micro_step(model: dict[str, Any], recompute: str, compiled: bool) -> MicroStep:
    """Makes 8 sequences of 256 tokens in bfloat16; the first call has been made."""
    training = {"batch_size": 8, "block_size": 256, "recompute": recompute}
    low = {"use_4bit": False}
    config = Config.from_dict({"model": model, "training": training, "low_precision": low})
    torch.manual_seed(0)
    built = build_model(config)
    precision = Precision(config.low_precision, CPU.device)
    memory = MemoryEstimator(config, built, precision, CPU).memory()
    rows = torch.randint(256, (8, 257))
    if compiled:
        built.compile()

    def work() -> None:
        with precision.autocast():
            loss = next_token_loss(built, rows, CPU.device)
        precision.backward(loss)
        built.zero_grad()

    return MicroStep(work, peak_bytes(work) - memory.gradients, memory.activations)


def row(name: str, compiled: bool, rounds: int) -> list[str]:
    torch.compiler.reset()
    none, layer = (micro_step(MODELS[name], kind, compiled) for kind in ("none", "layer"))
    took = [[seconds(each.work, CPU.device) for each in (none, layer)] for _ in range(rounds)]
    return [
        f"{name}, {'compiled' if compiled else 'eager'}",
        *(f"{statistics.median(times) * 1000:.0f}" for times in zip(*took, strict=True)),
        f"{statistics.median(ours / base for base, ours in took):.2f}",
        *(f"{each.taken / 1e6:.0f} ({each.predicted / 1e6:.0f})" for each in (none, layer)),
        f"{layer.taken / none.taken:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.recompute", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--output", action="store_true", help="write bench/results/recompute-cpu.md"
    )
    options = parser.parse_args()

    def rows() -> Iterator[list[str]]:
        for name in MODELS:
            for compiled in (False, True):
                yield row(name, compiled, options.rounds)

    lines = [
        f"## Recomputation, {datetime.date.today().isoformat()}",
        "",
        f"{hardware(CPU.device)}, torch {torch.__version__}",
        "",
    ]
    print("\n".join(lines))
    for line in table(COLUMNS, rows()):
        lines.append(line)
        print(line, flush=True)
    if options.output:
        (RESULTS / "recompute-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
