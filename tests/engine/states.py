"""Small states, configs and run directories for the tests of checkpoints and runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from config import Config
from engine.checkpoint.find import resolve_resume
from engine.checkpoint.save import save_checkpoint
from engine.run_directory.directory import RunDirectory
from engine.train_state import TrainState, rng_state

CURSOR: dict[str, Any] = {
    "version": 1,
    "lanes": 1,
    "sequences_per_step": 1,
    "block_size": 8,
    "seed": 0,
    "shuffle": True,
    "first_lane": 0,
}


def make_config(folder: Path, **training: Any) -> Config:
    """The defaults, with checkpoints under `folder`."""
    options = {"checkpoint_dir": str(folder / "checkpoints"), **training}
    return replace(Config(), training=replace(Config().training, **options))


def make_state(step: int, val_loss: float | None = None, numbers: int = 600) -> dict[str, Any]:
    """The state of a run at `step`; its weights tell the step."""
    train = TrainState(step=step, tokens=step * 8, evaluated_step=step, val_loss=val_loss)
    config = replace(Config(), model=replace(Config().model, vocab_size=256))
    return {
        "model": {"w": torch.full((numbers,), float(step)), "steps": torch.tensor([step])},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]},
        "precision": {"scaler": {}, "fp8": {}},
        "train": asdict(train),
        "cursor": CURSOR | {"positions": [[0, 0, 0]]},
        "rng": [rng_state(torch.device("cpu"))],
        "config": config.to_dict(),
        "data": {"fingerprint": "f00d"},
        "tokenizer": {"kind": "bytes"},
    }


@contextmanager
def new_run(folder: Path, *steps: int, keep_last: int | None = None) -> Iterator[RunDirectory]:
    """An open run with metrics and checkpoints at `steps`."""
    with RunDirectory.start(make_config(folder)) as run:
        save_steps(run, *steps, keep_last=keep_last)
        yield run


def save_steps(run: RunDirectory, *steps: int, keep_last: int | None = None) -> None:
    for step in steps:
        run.append_metrics({"step": step, "train/loss": 1.0 / step})
        save_checkpoint(run, make_state(step), keep_last)


def finished_run(folder: Path, *steps: int) -> Path:
    """A run directory that no process has open."""
    with new_run(folder, *steps) as run:
        return run.prepare()


def reopen(value: Path | str, folder: Path, **training: Any) -> RunDirectory:
    """Resumes as train.py does."""
    config = make_config(folder, **training)
    resume, _ = resolve_resume(str(value), folder / "checkpoints", lambda _: [])
    assert resume is not None
    return RunDirectory.reopen(resume, config)
