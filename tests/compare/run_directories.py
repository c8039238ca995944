"""Writes run directories of this version and of older ones, without training anything."""

from __future__ import annotations

import fcntl
import json
import os
import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compare.reading.run import Run, read_run
from config import Config
from engine.run_directory.environment_file import config_copy, environment_text, read_environment
from engine.run_directory.metrics_file import metrics_line, protected

ROWS = "0123456789ab"
TOKENS_PER_STEP = 4096
SESSION: dict[str, Any] = {
    "time": "2025-11-08T14:30:22+01:00",
    "command": ["train.py", "--config", "my experiment.yaml", "learning_rate=1e-3"],
    "python": "3.11.4",
    "torch": "2.6.0",
    "git": "0123456789abcdef",
    "host": "here",
    "cpu": "a processor",
    "device": "cpu",
}
NEW_KEYS = {"train/data_wait", "train/compile_s", "eval/best_loss", "eval/best_step"}
NEW_KEYS |= {"eval/val_losses", "eval/rows", "eval/seconds", "eval/sample"}


def make(name: str = "run_a", *options: str, **more: Any) -> Run:
    """Writes a run into checkpoints and reads it; arguments as of `make_run`."""
    return read_run(make_run(name, *options, **more))


def make_run(
    name: str = "run_a",
    *options: str,
    folder: Path = Path("checkpoints"),
    losses: Sequence[float | None] = (4.0, 3.0, 2.5),
    every: int = 100,
    state: str | None = "done",
    old: bool = False,
    batches: int = 8,
    rows: str = ROWS,
    sample: str | None = None,
    environment: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a run with one evaluation per loss, each after `every` steps and four log lines.

    options: overrides of the default config. state: how it ended (done, stopped, failed; None: not
    written). old: without what later versions write. environment: overrides of environment.json.
    seed: of the noise in its losses.
    """
    path = folder / name
    path.mkdir(parents=True)
    steps = every * len(losses)
    (path / "config.yaml").write_text(f"training: {{max_iters: {max(1, steps)}}}\n")
    config = Config.from_yaml(path / "config.yaml", options)
    (path / "config.yaml").write_text(config.to_yaml())
    lines = list(records(losses, every, batches, rows, sample, seed))
    if state == "done" and losses:
        final = {"final/train_loss": losses[-1], "final/val_loss": losses[-1]}
        lines.append(stamp(steps) | final)
    if old:
        lines = [{k: v for k, v in line.items() if k not in NEW_KEYS} for line in lines]
    write_records(path, lines, old)
    values = SESSION | {"resumed": []}
    if not old:
        values |= facts(path, config) | ({"ended": ended(state, steps)} if state else {})
        values |= {"metrics_bytes": (path / "metrics.jsonl").stat().st_size}
    values |= environment or {}
    text = json.dumps(values) if old else environment_text(values)
    (path / "environment.json").write_text(text)
    (path / ".lock").write_text(f"host {socket.gethostname()} pid 1 since 14:30 (2025-11-08)\n")
    add_checkpoint(path, steps)
    os.utime(path / "metrics.jsonl", (1.7e9, 1.7e9))
    return path


def stamp(step: int) -> dict[str, Any]:
    return {"step": step, "time": step * 0.05, "tokens": step * TOKENS_PER_STEP}


def records(
    losses: Sequence[float | None],
    every: int,
    batches: int,
    rows: str,
    sample: str | None,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """What a run appends to metrics.jsonl, in order."""
    draw, best, best_step = random.Random(seed), None, None
    hard = [random.Random(7).gauss(0, 0.3) for _ in range(batches)]  # the same text for all runs
    for number, loss in enumerate(losses):
        for part in range(1, 5):
            step = number * every + part * every // 4
            mean = 5.0 if loss is None else loss
            yield stamp(step) | {
                "train/loss": mean + draw.gauss(0, 0.05),
                "train/learning_rate": 1e-3 * (1 - step / (every * len(losses) + 1)),
                "train/grad_norm": 1 + draw.random(),
                "train/tokens_per_sec": 81920 + draw.gauss(0, 500),
                "train/iter_time_ms": 50.0,
                "train/mfu": None,
                "train/memory_bytes": 1_900_000_000,
                "train/data_wait": 0.01,
                **({"train/compile_s": None} if step <= every // 4 else {}),
            }
        if loss is not None and (best is None or loss < best):
            best, best_step = loss, step
        noise = [spread + draw.gauss(0, 0.01) for spread in hard]
        middle = sum(noise) / max(1, len(noise))
        yield stamp(step) | {
            "eval/train_loss": None if loss is None else loss - 0.1,
            "eval/val_loss": loss,
            "eval/bits_per_byte": None if loss is None else loss / 0.6931,
            "eval/best_loss": best,
            "eval/best_step": best_step,
            "eval/val_losses": [None if loss is None else loss + n - middle for n in noise],
            "eval/rows": rows,
            "eval/seconds": 1.5,
            **({} if sample is None else {"eval/sample": f"{sample} at step {step}"}),
        }


def write_records(path: Path, lines: Sequence[dict[str, Any]], old: bool = False) -> None:
    plain = (json.dumps(line, allow_nan=False).encode() for line in lines)
    text = b"".join(line + b"\n" if old else protected(line) for line in plain)
    (path / "metrics.jsonl").write_bytes(text)


def append(path: Path, *lines: dict[str, Any]) -> None:
    """Appends records to metrics.jsonl, whose time of change stays long ago."""
    with (path / "metrics.jsonl").open("ab") as file:
        file.writelines(map(metrics_line, lines))
    os.utime(path / "metrics.jsonl", (1.7e9, 1.7e9))


def evaluation(step: int, losses: list[Any], rows: str = "r") -> dict[str, Any]:
    return stamp(step) | {"eval/val_loss": 2.0, "eval/val_losses": losses, "eval/rows": rows}


def change_environment(path: Path, **values: Any) -> None:
    """Writes other values into environment.json, with a valid checksum."""
    (path / "environment.json").write_text(environment_text(read_environment(path) | values))


def facts(path: Path, config: Config) -> dict[str, Any]:
    """What this version adds to environment.json."""
    return {
        "run": {
            "parameters": 25_300_000,
            "trainable_parameters": 25_300_000,
            "tokens_per_step": TOKENS_PER_STEP,
            "planned_steps": config.training.max_iters,
            "flops_per_token": 150_000_000,
            "processes": 1,
            "precision": config.low_precision.compute_dtype,
        },
        "config": config_copy(config, (path / "config.yaml").read_text(), None),
        "data": {"fingerprint": "f00d", "lines": ["Data: 3 files, 240 documents"]},
    }


def ended(state: str, step: int) -> dict[str, Any]:
    reasons = {"stopped": "SIGINT", "failed": "NonFiniteError: the loss is NaN"}
    reason, when = reasons.get(state, ""), "2025-11-08T15:00:00+01:00"
    return {"state": state, "reason": reason, "step": step, "time": when}


def add_checkpoint(path: Path, step: int) -> None:
    """Creates the two files of a checkpoint, without content."""
    (path / f"checkpoint_{step}.json").write_text("{}")
    (path / f"checkpoint_{step}.pt").write_bytes(b"")


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    ready, begin = os.pipe()
    done, end = os.pipe()
    child = os.fork()
    if child == 0:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        os.write(begin, b"1")
        os.close(end)
        os.read(done, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield
    finally:
        os.close(end)
        os.waitpid(child, 0)
        for descriptor in (ready, begin, done):
            os.close(descriptor)
