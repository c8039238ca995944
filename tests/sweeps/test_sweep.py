"""sweep.py: interrupted, killed or repeated, it ends with one whole run for each cell."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from compare.reading.run import Run, find_runs, read_run
from engine.run_directory.environment_file import config_copy
from engine.run_directory.experiment import is_run_of
from sweeps.cells import Cell, make_cells
from sweeps.sweep_file import read_sweep
from tests.compare.run_directories import (
    change_environment,
    make_run,
)
from tests.sweeps.forked import children_of, run_sweep, start_sweep

KILLS = int(os.environ.get("SWEEP_KILLS", "0"))
"""5 for a release: 12 cells are killed so often. 1,000 cells are recognised then, too."""
CHECKPOINTS = Path("checkpoints")


@pytest.fixture
def base(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config file; the working directory is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    return tiny[0]


def write_sweep(base: str, rest: str, folder: Path = CHECKPOINTS, steps: int = 12) -> Path:
    path = Path(f"{folder}.yaml")
    path.write_text(
        f"base: {base}\nset:\n  checkpoint_dir: {folder}\n  max_iters: {steps}\n"
        f"  checkpoint_freq: 4\n  test_freq: 4\n  log_freq: 2\n{rest}"
    )
    return path


def cells_of(path: Path) -> list[Cell]:
    return make_cells(read_sweep(path))


def make_cell_run(
    cell: Cell,
    name: str,
    losses: tuple[float, ...] = (4.0, 3.0),
    every: int = 4,
    folder: Path = CHECKPOINTS,
    state: str = "done",
) -> Path:
    """Writes the directory of a run of a cell, without training."""
    path = make_run(name, folder=folder, losses=losses, every=every, state=state)
    text = cell.config.to_yaml()
    (path / "config.yaml").write_text(text)
    change_environment(path, config=config_copy(cell.config, text, None))
    return path


def wait_until(path: Path, words: str) -> None:
    """Waits for a line of a file."""
    for _ in range(600):
        if path.exists() and words in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{words!r} never came:\n{path.read_text() if path.exists() else ''}")


def one_run(cell: Cell) -> Run:
    """The only run of a cell that is done."""
    runs = [read_run(path) for path in find_runs([Path(cell.config.training.checkpoint_dir)])]
    done = [r for r in runs if r.state == "done" and is_run_of(cell.options, r.config)]
    (run,) = done
    return run


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_with_one_whole_run_for_each_cell(base: str) -> None:
    """SWEEP_KILLS=5 in the environment kills 12 cells so often."""
    rest = "grid:\n  lr: [1e-3, 1e-2]\nzip:\n  model.name: [bdh, gpt]\n  n_layer: [1, 2]\n"
    rest += f"seeds: {3 if KILLS else 1}\n"
    straight = write_sweep(base, rest, Path("straight"))
    began = time.monotonic()
    assert run_sweep(straight)[0] == 0
    took, draw = time.monotonic() - began, random.Random(KILLS)

    path = write_sweep(base, rest)
    for number in range(KILLS or 2):
        sweep, _ = start_sweep(path)
        time.sleep(draw.uniform(0.1, 0.4 if KILLS else 0.6) * took / (KILLS or 2) * 2)
        children = children_of(sweep.pid)
        sweep.kill()
        for child in children if number % 2 else ():  # else they save, since their parent died
            os.kill(child, signal.SIGKILL)
        sweep.wait()
    code, out = run_sweep(path)
    assert code == 0 and "Report: checkpoints/sweeps/checkpoints.html" in out

    for cell, other in zip(cells_of(path), cells_of(straight), strict=True):
        run, whole = one_run(cell), one_run(other)
        for key in ("final/train_loss", "final/val_loss", "eval/best_loss"):
            assert run.newest[key] == whole.newest[key], (cell.name, key)
    began = time.monotonic()
    code, out = run_sweep(path)
    assert time.monotonic() - began < 2
    assert code == 0 and "are done: nothing to do" in out
