"""Compares the time that a dry run forecasts with the time that the run takes.

    python -m bench.forecast [--steps 40]       # target: within a factor of 1.5, each model

Each model is timed as a dry run does it, then trained in a process of its own, with evaluations and
a checkpoint. The time of the run is that of its last record, which excludes start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from config import command_line
from engine.hardware.distributed import enter_world
from engine.optim.build import build_optimizer
from engine.planning.forecast import BUDGET_S, Forecast, choose_trial, forecast, measure
from engine.planning.memory import MemoryBudget, MemoryEstimator
from engine.planning.stopwatch import stopwatch
from engine.precision.precision import Precision
from model import build_model

ROOT = Path(__file__).resolve().parent.parent
TARGET = 1.5
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. "
RUNS = {
    "bdh": ["n_layer=3", "n_embd=128", "mlp_internal_dim_multiplier=64", "block_size=256"],
    "bdh, 4-bit weights": [
        "n_layer=2",
        "n_embd=128",
        "block_size=128",
        "low_precision.use_4bit=on",
    ],
    "gpt": ["model.name=gpt", "n_layer=4", "n_embd=256", "block_size=256"],
    "gpt, small": ["model.name=gpt", "n_layer=2", "n_embd=64", "max_iters=600", "block_size=64"],
    "llama": ["model.name=llama", "n_layer=4", "n_embd=256", "block_size=256"],
    "llama, 2 micro-steps": ["model.name=llama", "n_layer=3", "gradient_accumulation_steps=2"],
}


def arguments(name: str, folder: Path, steps: int) -> list[str]:
    """Returns the command line of a run: its own options, and common ones that it does not set."""
    own = RUNS[name]
    common = ["low_precision.use_4bit=false", "system.compile=false", "system.device=cpu"]
    common += [f"train_data_path={folder / 'text.bin'}", "token_dtype=uint8", "vocab_size=256"]
    common += ["tokenizer.name=bytes", f"max_iters={steps}", f"test_freq={steps // 2}"]
    common += ["eval_iters=5", f"checkpoint_dir={folder / 'runs'}", "log_freq=10"]
    given = {word.split("=")[0] for word in own}
    return [str(ROOT / "config.yaml"), *own, *(w for w in common if w.split("=")[0] not in given)]


def predicted(words: list[str]) -> Forecast:
    """Returns the forecast of a dry run."""
    config = command_line(words).config
    steps = config.training.max_iters
    with enter_world(config.system, config.distributed) as world:
        torch.manual_seed(config.training.seed)
        model = build_model(config)
        precision = Precision(config.low_precision, world.device, config.fp8)
        precision.prepare(model, steps)
        optimizer = build_optimizer(model, config.optimizer, config.training.weight_decay)
        with stopwatch(world.device, BUDGET_S) as watch:
            trial = choose_trial(
                MemoryEstimator(config, model, precision, world),
                MemoryBudget.of(world),
                build_model,
            )
            times = measure(model, optimizer, precision, trial, watch)
        return forecast(config, times, model, range(steps), world.size)


def taken(words: list[str], folder: Path) -> float:
    """Returns the seconds that the run takes."""
    subprocess.run(
        [sys.executable, os.fspath(ROOT / "train.py"), *words],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (metrics,) = (folder / "runs").glob("run_*/metrics.jsonl")
    return float(json.loads(metrics.read_text().splitlines()[-1])["time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    print(f"{'run':<22} {'forecast':>9} {'taken':>9} {'ratio':>6} {'FLOP/s':>9} {'share':>6}")
    worst = 1.0
    for name in RUNS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            (folder / "text.bin").write_bytes(TEXT.encode() * 5000)
            words = arguments(name, folder, steps)
            estimate, real = predicted(words), taken(words, folder)
        ratio = estimate.total / real
        worst = max(worst, ratio, 1 / ratio)
        print(
            f"{name:<22} {estimate.total:>8.1f}s {real:>8.1f}s {ratio:>6.2f} "
            f"{estimate.flops / 1e9:>8.0f}G {estimate.share:>6.0%}",
            flush=True,
        )
    print(f"worst factor {worst:.2f}: {'within' if worst <= TARGET else 'NOT within'} {TARGET}")


if __name__ == "__main__":
    main()
