"""The file of a sweep: which cells it makes, and what is said of a wrong one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from config import Config, ConfigError
from sweeps.cells import Cell, make_cells
from sweeps.processes import shares, visible_gpus
from sweeps.sweep_file import read_sweep
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model: {n_layer: 2, n_embd: 64}\ntraining: {max_iters: 100}\n")


def cells(text: str) -> list[Cell]:
    Path("sweep.yaml").write_text(f"base: base.yaml\n{text}")
    return make_cells(read_sweep("sweep.yaml"))


def test_cells_are_the_product_of_grid_zip_random_and_seeds() -> None:
    found = cells(
        "grid: {lr: [1e-3, 1e-2], model: [bdh, gpt]}\n"
        "zip: {n_layer: [1, 2, 3], n_embd: [32, 64, 128]}\n"
        "random: {draws: 2, weight_decay: {low: 0.1, high: 0.2}}\nseeds: 2\n"
    )
    assert len(found) == len({cell.id for cell in found}) == 2 * 2 * 3 * 2 * 2
    shapes = {(c.config.model.n_layer, c.config.model.n_embd) for c in found}
    assert shapes == {(1, 32), (2, 64), (3, 128)}
    # Every setting has its first seed before any has its second.
    assert [c.config.training.seed for c in found] == [1337] * 24 + [1338] * 24
    assert len({cell.group for cell in found}) == len({cell.group_name for cell in found}) == 24


def test_a_cell_is_the_config_that_train_py_reads_with_its_words() -> None:
    text = "set: {max_iters: 50, checkpoint_dir: 'my runs'}\ngrid: {lr: [1e-3, 1e-2]}\nseeds: [7]\n"
    for cell in cells(text):
        flag, base, *overrides = cell.words
        assert (flag, Config.from_yaml(base, overrides)) == ("--config", cell.config)
    assert cell.name == "learning_rate=1e-2" and cell.config.training.seed == 7


def test_a_draw_does_not_depend_on_how_many_there_are_or_on_other_options() -> None:
    one = "random: {draws: %d, seed: 3, learning_rate: {low: 1e-5, high: 1, scale: log}%s}\n"
    few, many = cells(one % (3, "")), cells(one % (40, ", n_layer: {low: 1, high: 3}"))
    rates = [cell.config.training.learning_rate for cell in many]
    assert [cell.config.training.learning_rate for cell in few] == rates[:3]
    assert len(set(rates)) == 40 and all(1e-5 <= rate <= 1 for rate in rates)
    assert sum(rate < 10**-2.5 for rate in rates) in range(10, 31)  # log: half of the factors
    assert {cell.config.model.n_layer for cell in many} == {1, 2, 3}


def test_equal_cells_are_one() -> None:
    assert len(cells("grid: {lr: [1e-3, 0.001, 2e-3]}\n")) == 2
    assert len(cells("")) == 1


WRONG = {  # part of a file: what is said, with the line
    "gird: {lr: [1]}": "sweep.yaml:2: 'gird': unknown part. Did you mean grid?",
    "grid: {learning_rat: [1]}": "sweep.yaml:2: learning_rat: unknown option. Did you mean",
    "grid: {lr: 1}": "grid: lr: expected a list of values, got 1",
    "grid: {log_freq: [1, 2]}": "log_freq: changes no results, so it makes no cells",
    "grid: {lr: [1e-3, -1]}": "Cell learning_rate=-1:\nsweep.yaml:2: training.learning_rate (given",
    "grid: {n_head: [4, 5]}": "sweep.yaml:2: model.n_embd=64 is not divisible by model.n_head=5",
    "set: {lr: 1}\ngrid: {lr: [1, 2]}": "sweep.yaml:3: training.learning_rate: given twice",
    "zip: {lr: [1, 2], n_layer: [1]}": "zip: n_layer has 1 values, and lr 2",
    "random: {draw: 3, lr: {low: 1, high: 2}}": "draw: unknown key. Did you mean draws?",
    "random: {draws: 3, lr: {low: 0, high: 2, scale: log}}": "lr: expected 0 < low < high",
    "random: {draws: 3}": "random: names no option with its low and high",
    "seeds: 0": "sweep.yaml:2: seeds: must be in [1, 10000], got 0",
    "seeds: [1, -1]": "sweep.yaml:2: seeds: must be >= 0, got -1",
    "stop: {rule: medium}": "expected one of median, halving, got 'medium'. Did you mean median?",
    "stop: {after: 0.5}": "stop: rule is missing",
    "set: {save_model: false}": "training.save_model=false: a run of a sweep trains, saves",
    "base: other.yaml": "sweep.yaml:2: base: given twice (first at line 1)",
    "grid: {lr: [1, 2]}\nseeds: 9999": "19,998 cells; at most 10,000",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_refused_with_line_and_remedy(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        cells(text)
    assert WRONG[text] in str(error.value), str(error.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        cells("sets: {}\nseeds: x\nstop: {rule: median, after: 2}\n")
    assert len(str(error.value).splitlines()) == 3


def test_runs_at_once_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    assert visible_gpus() == ["3", "GPU-5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in shares(None, visible_gpus())] == ["3", "GPU-5"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert shares(None, []) == [{}]
    cores = len(os.sched_getaffinity(0))
    assert shares(2, []) == [{"OMP_NUM_THREADS": str(max(1, cores // 2))}] * 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")))
def test_the_example_is_a_sweep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = make_cells(read_sweep(path))
    assert len(found) == 9 and len({cell.group for cell in found}) == 3
    assert max(map(len, path.read_text().splitlines())) <= 100
