"""Times saving a checkpoint against a plain `torch.save` of the same state, and what a save takes
from training.

    python -m bench.checkpoint [--folder DIR] [--megabytes 240] [--rounds 9]

Ours also hashes, syncs and writes a manifest. The ways are timed in turn, so that a slow moment of
the machine slows all of them down.

What a save takes from training: a GPT of that size makes steps on all threads, in turn without a
save, after one that it waits for, and with one behind them, which takes what these steps need more
than those without: a copy of the state, and CPU time for hashing and writing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from config import Config
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.save import save_checkpoint
from engine.hardware.distributed import World
from engine.run_directory.directory import RunDirectory
from engine.run_directory.manifest import verify
from engine.saving import CheckpointSaver
from engine.train_state import TrainState, rng_state
from model import build_model


def make_state(megabytes: int) -> dict[str, Any]:
    """Returns weights and two AdamW moments in 30 tensors."""
    numbers = megabytes * 1_000_000 // 4 // 30
    moments = {
        index: {"exp_avg": torch.randn(numbers), "exp_avg_sq": torch.randn(numbers)}
        for index in range(10)
    }
    cursor = {"version": 1, "lanes": 1, "sequences_per_step": 1, "block_size": 1, "seed": 0}
    return {
        "model": {f"weight.{index}": torch.randn(numbers) for index in moments},
        "optimizer": {"state": moments, "param_groups": [{"params": list(moments)}]},
        "precision": {"scaler": {}, "fp8": {}},
        "train": asdict(TrainState()),
        "cursor": {**cursor, "shuffle": True, "first_lane": 0, "positions": [[0, 0, 0]]},
        "rng": [rng_state(torch.device("cpu"))],
        "config": replace(Config(), model=replace(Config().model, vocab_size=256)).to_dict(),
        "data": {"fingerprint": ""},
        "tokenizer": {"kind": "bytes"},
    }


def plain(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)


def plain_synced(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Returns the wall and CPU seconds of a call."""
    os.sync()  # the writes of the call before must not slow this one down
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    state = make_state(megabytes)
    config = replace(
        Config(), training=replace(Config().training, checkpoint_dir=str(folder / "checkpoints"))
    )
    seconds: dict[str, list[tuple[float, float]]] = {}
    with RunDirectory.start(config) as run:
        run.prepare()
        for step in range(1, rounds + 2):
            state["train"]["step"] = step
            ways = {
                "torch.save": lambda: plain(state, folder / "plain.pt"),
                "torch.save + fsync": lambda: plain_synced(state, folder / "synced.pt"),
                "hatchery": lambda: save_checkpoint(run, state, None),
            }
            times = {name: timed(work) for name, work in ways.items()}
            path = run.last_checkpoint
            assert path is not None
            times["verify"] = timed(lambda path=path: verify(path))  # type: ignore[misc]
            times["verify and load"] = timed(lambda path=path: load_checkpoint(path))  # type: ignore[misc]
            for leftover in (folder / "plain.pt", folder / "synced.pt", path):
                leftover.unlink()
            if step > 1:  # the first round is a warm-up
                for name, value in times.items():
                    seconds.setdefault(name, []).append(value)
    return seconds


def training_steps(megabytes: int) -> tuple[Callable[[], None], Callable[[], dict[str, Any]]]:
    """Returns a function that makes a training step of a GPT on all threads, and one that returns
    its state: weights and moments of so many megabytes."""
    width = max(64, int((megabytes * 1e6 / 12 / 72) ** 0.5) // 64 * 64)  # 12 * 6 layers * width^2
    shape = replace(Config().model, name="gpt", n_layer=6, n_embd=width, vocab_size=256)
    model = build_model(replace(Config(), model=shape))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(256, (1, 129))

    def step() -> None:
        model(tokens[:, :-1], None, tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict[str, Any]:
        plain = make_state(0)
        return {**plain, "model": model.state_dict(), "optimizer": optimizer.state_dict()}

    return step, state


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_lost(folder: Path, megabytes: int, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds that a save takes from training."""
    step, collect = training_steps(megabytes)
    training = replace(Config().training, checkpoint_dir=str(folder / "lost"), keep_last=1)
    progress, world = TrainState(), World(0, 1, torch.device("cpu"))
    found: dict[str, list[float]] = {}
    with RunDirectory.start(replace(Config(), training=training)) as run:
        saver = CheckpointSaver(replace(Config(), training=training), world, run)

        def save() -> None:
            progress.step += 1
            saver.start(progress, lambda: collect() | {"train": asdict(progress)})

        def save_and_wait() -> None:
            save()
            saver.finish()

        def steps_behind(step_s: float) -> dict[str, float]:
            """Makes steps until a save is written; step_s: the time of one without a save."""
            start, count = time.perf_counter(), 0
            copy = seconds(save)
            while not saver.is_written:
                step()
                count += 1
            took = time.perf_counter() - start
            saver.finish()
            lost = took - count * step_s
            return {"behind training": lost, "the copy": copy, "until it is on the disk": took}

        for number in range(rounds + 1):
            step_s = [seconds(step) for _ in range(5)]
            waited = seconds(save_and_wait)
            step_s += [seconds(step) for _ in range(5)]
            each_s = statistics.median(step_s)
            times = {"waited for": waited, **steps_behind(each_s), "a step": each_s}
            os.sync()
            for name, value in times.items() if number else ():  # the first round is a warm-up
                found.setdefault(name, []).append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--megabytes", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        seconds = measure(folder, options.megabytes, options.rounds)
        lost = measure_lost(folder, options.megabytes, options.rounds)
    finally:
        shutil.rmtree(folder)
    base = statistics.median(wall for wall, _ in seconds["torch.save"])
    print(f"{options.megabytes} MB, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"{'':20}  median s  minimum s     CPU s  x torch.save")
    for name, values in seconds.items():
        median, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:20}  {median:8.3f}  {min(values)[0]:9.3f}  {cpu:8.3f}  {median / base:12.2f}")
    print(f"Seconds that a save takes from training, on {torch.get_num_threads()} threads")
    for name, each in lost.items():
        print(f"{name:24}  median {statistics.median(each):6.3f}  largest {max(each):6.3f}")


if __name__ == "__main__":
    main()
