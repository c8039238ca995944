"""sweep.py: interrupted, killed or repeated, it ends with one whole run for each cell."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from compare.reading.run import STOPPED_EARLY, Run, find_runs, read_run
from config import Config
from engine.run_directory.environment_file import config_copy
from engine.run_directory.experiment import is_run_of
from sweep import plan_line
from sweeps.cells import Cell, make_cells
from sweeps.costs import cost_lines
from sweeps.processes import last_lines, log_path, start_process
from sweeps.state import RunIndex, State
from sweeps.sweep_file import read_sweep
from tests.compare.run_directories import change_environment, locked_by_another_process, make_run
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
    rest = "grid: {lr: [1e-3, 1e-2], model.name: [bdh, gpt]}\nseeds: 3\n"
    if not KILLS:
        rest = "zip: {lr: [1e-3, 1e-2], model.name: [bdh, gpt]}\n"
    straight = write_sweep(base, rest, Path("straight"))
    began = time.monotonic()
    assert run_sweep(straight)[0] == 0
    took, draw = time.monotonic() - began, random.Random(KILLS)

    path = write_sweep(base, rest)
    for number in range(KILLS or 2):
        sweep, _ = start_sweep(path)
        time.sleep(draw.uniform(0.1, 0.9) * took / (KILLS or 2))
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
    assert not KILLS or time.monotonic() - began < 2
    assert code == 0 and "finished; nothing to do" in out


@pytest.mark.slow
def test_ctrl_c_saves_and_another_sweep_takes_over(base: str) -> None:
    path = write_sweep(base, "grid: {lr: [1e-2]}\n", steps=100_000)
    (cell,) = cells_of(path)
    first, first_log = start_sweep(path)
    wait_until(log_path(cell), "Iter      2")
    # At the same time, a second one does not start the cell again.
    second, second_log = start_sweep(path, name="second")
    wait_until(second_log, "runs already, started elsewhere")
    first.kill(signal.SIGINT)
    assert first.wait() == 130
    said = first_log.read_text()
    assert "Waiting for 1 run to save" in said and "stopped at step " in said
    assert "To go on: python sweep.py checkpoints.yaml" in said
    wait_until(second_log, "goes on from step")
    wait_until(log_path(cell), "Resumed from")
    second.kill(signal.SIGTERM)
    assert second.wait() == 143
    (run,) = map(read_run, find_runs([CHECKPOINTS]))
    assert run.state == "stopped"


@pytest.mark.slow
def test_a_cell_that_fails_twice_is_given_up_and_the_others_go_on(base: str) -> None:
    texts = Config.from_yaml(base).dataset.parquet_dir
    path = write_sweep(base, f"grid:\n  dataset.parquet_dir: [nowhere, {texts}]\n")
    bad, good = cells_of(path)
    code, out = run_sweep(path, jobs=1)
    assert code == 1 and "Failed: 1 cell; run the command again" in out
    first, second = out.index("failed (exit code 3), tries again"), out.index("given up")
    assert first < second and out.count("nowhere") >= 4
    assert one_run(good).step == 12 and "nowhere" in last_lines(log_path(bad))[-1]


@pytest.mark.slow
def test_a_hopeless_run_is_stopped_said_and_recorded(base: str) -> None:
    stop = "stop: {rule: median, after: 1e-4}\n"
    path = write_sweep(base, f"grid: {{lr: [1e-5, 1e-2, 2e-2, 3e-2]}}\n{stop}", steps=4000)
    bad, *others = cells_of(path)
    for cell, loss in zip(others, (1.0, 2.0, 3.0), strict=True):
        make_cell_run(cell, f"run_{cell.number}", (loss,) * 100, every=40)
    code, out = run_sweep(path)
    assert code == 0 and "above 2.0000 of 3 others" in out
    (run,) = (run for run in map(read_run, find_runs([CHECKPOINTS])) if run.stopped_early)
    assert run.state == "stopped" and run.end_reason.startswith("sweep: median at step ")
    assert is_run_of(bad.options, run.config) and (run.path / STOPPED_EARLY).exists()
    assert "nothing to do" in run_sweep(path)[1]
    # Without the rule, the run is one that was interrupted.
    path.write_text(path.read_text().replace(stop, ""))
    index = RunIndex(CHECKPOINTS, cells_of(path), stops=False)
    assert index.state_of(bad) is State.INTERRUPTED
    assert index.checkpoint_of(bad) is not None


@pytest.mark.slow
def test_a_dry_run_predicts_each_shape_once_and_creates_nothing(base: str) -> None:
    path = write_sweep(base, "grid: {n_embd: [32, 512]}\nzip: {lr: [1e-3, 1e-2], wd: [0.1, 0.2]}\n")
    cells = cells_of(path)
    states = [State.FINISHED, State.WAITING, State.INTERRUPTED, State.WAITING]
    heading, *lines, total = cost_lines(cells, states, jobs=2, measuring_s=0.2)
    memory = [line.split()[-2:] for line in lines]
    assert "memory" in heading and memory[0] == memory[1] != memory[2] == memory[3]
    assert total.startswith("3 cells to run, 2 at once: about ")
    assert not CHECKPOINTS.exists()


def test_a_cell_is_a_process_of_train_py_in_a_session_of_its_own(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        process = start_process(["--help"], out.fileno(), dict(os.environ))
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        while process.poll() is None:
            time.sleep(0.01)
    assert process.returncode == 0 and "--dry-run" in (tmp_path / "out").read_text()


def test_a_cell_has_the_runs_of_its_config_wherever_they_are(base: str) -> None:
    path = write_sweep(base, "grid: {lr: [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4]}\n", steps=8)
    cells = cells_of(path)
    finished, stopped, crashed, without, not_finite, running, missing = cells
    make_cell_run(finished, "run_by_hand", folder=CHECKPOINTS / "a" / "b" / "c" / "d")
    make_cell_run(finished, "run_of_before", state="stopped")
    make_cell_run(stopped, "run_stopped", (4.0,), state="stopped")
    make_cell_run(crashed, "run_killed", (4.0,), state="")
    for file in make_cell_run(without, "run_short", (4.0,), state="").glob("checkpoint_*"):
        file.unlink()
    make_cell_run(not_finite, "run_nan", (4.0,), state="failed")
    lock = make_cell_run(running, "run_now", (4.0,), state="") / ".lock"
    make_run("run_other", "learning_rate=0.5")
    larger_steps = make_cell_run(missing, "run_of_two_processes")
    change_environment(larger_steps, run={"processes": 2})
    with locked_by_another_process(lock):
        index = RunIndex(CHECKPOINTS, cells, stops=False)
        assert [index.state_of(cell) for cell in cells] == [
            State.FINISHED,
            State.INTERRUPTED,
            State.INTERRUPTED,
            State.WAITING,
            State.NOT_FINITE,
            State.RUNNING,
            State.WAITING,
        ]
    index.refresh()
    assert index.state_of(running) is State.INTERRUPTED
    assert index.run_of(missing) is None


def test_a_run_without_its_last_checkpoint_is_not_finished(base: str) -> None:
    """It was killed between its final record and its final checkpoint."""
    path = write_sweep(base, "grid: {lr: [1e-4]}\n", steps=8)
    (cell,) = cells_of(path)
    run = make_cell_run(cell, "run_a")
    change_environment(run, ended=None)
    (run / "checkpoint_8.json").rename(run / "checkpoint_4.json")
    assert RunIndex(CHECKPOINTS, [cell], stops=False).state_of(cell) is State.INTERRUPTED


def test_a_cell_has_the_run_whose_shape_the_initial_weights_decided(base: str) -> None:
    path = write_sweep(base, "grid: {lr: [1e-4, 2e-4], dropout: [0, 0.1]}\n", steps=8)
    path.write_text(path.read_text().replace("set:\n", "set:\n  init_from: weights.pt\n"))
    cells = cells_of(path)
    other = ["model=gpt", "mlp_internal_dim_multiplier=128"]
    shape = [*other, "n_layer=3", "n_embd=32", "vocab_size=300", "block_size=16", "activation=relu"]
    saved = Config.from_yaml(base, [*cells[1].words[2:], *shape])
    make_cell_run(replace(cells[1], config=saved), "run_a")
    index = RunIndex(CHECKPOINTS, cells, stops=False)
    assert [index.state_of(cell) is State.FINISHED for cell in cells] == [False, True, False, False]
    # What the sweep itself gives is not left to the weights.
    path.write_text(path.read_text().replace("dropout: [0, 0.1]", "block_size: [16, 32]"))
    assert len({cell.id for cell in cells_of(path)}) == 4


def test_other_seeds_of_a_setting_that_was_stopped_early_are_left_out(base: str) -> None:
    path = write_sweep(base, "grid: {lr: [1e-4, 2e-4]}\nseeds: 2\n", steps=8)
    cells = cells_of(path)
    run = make_cell_run(cells[0], "run_a", (4.0,), state="stopped")
    (run / STOPPED_EARLY).write_text('{"reason": "sweep: median", "step": 4}')
    index = RunIndex(CHECKPOINTS, cells, stops=True)
    assert plan_line(cells, index, path, 1) == (
        "checkpoints.yaml: 4 cells in checkpoints: 1 stopped early, 1 left out, "
        "0 to go on with, 2 to start; 1 at once"
    )


def test_finished_cells_are_recognised_at_once(base: str) -> None:
    """SWEEP_KILLS in the environment: 1,000 of them."""
    count = 1000 if KILLS else 50
    rates = ", ".join(f"{n}e-6" for n in range(1, count + 1))
    path = write_sweep(base, f"grid: {{lr: [{rates}]}}\n", steps=8)
    for cell in cells_of(path):
        make_cell_run(cell, f"run_{cell.number:04}")
    (CHECKPOINTS / "sweeps").mkdir()
    (CHECKPOINTS / "sweeps" / "checkpoints.html").touch()
    began = time.monotonic()
    code, out = run_sweep(path)
    took = time.monotonic() - began
    print(f"{count} cells: {took:.2f} s")
    assert (
        code == 0
        and f"{count:,} cells in checkpoints: {count} finished; nothing to do" in out
        and (took < 2 or not KILLS)
    )
