"""What a part of a run's name means, for every script."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import export
import sample
from config import CheckpointError, DataError
from engine.checkpoint.find import resolve_resume
from engine.run_directory.find_runs import find_by_name
from tests.runs import only_run, run_here

RUNS = ("checkpoints/run_20251108_143022", "out/run_20251108_145754", "out/run_20251109_145755")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in two folders, one of which is the usual one."""
    monkeypatch.chdir(tmp_path)
    for run in RUNS:
        Path(run).mkdir(parents=True)
        Path(run, "config.yaml").touch()
    return tmp_path


FOUND = [
    ("143022", RUNS[0]),
    ("run_20251108_143022", RUNS[0]),
    ("145754", RUNS[1]),
    ("out/145754", RUNS[1]),
    ("20251108", RUNS[0]),  # the usual folder first
    ("145754/checkpoint_500.pt", f"{RUNS[1]}/checkpoint_500.pt"),
    ("out", "out"),
    ("999999", "999999"),
    ("out/checkpoint_5.pt", "out/checkpoint_5.pt"),
]


@pytest.mark.parametrize(("word", "path"), FOUND)
def test_a_word_means_the_run_that_has_it_in_its_name(here: Path, word: str, path: str) -> None:
    assert find_by_name(word) == Path(path)


def test_a_word_of_two_runs_is_refused_and_the_folder_of_a_config_comes_first(here: Path) -> None:
    with pytest.raises(DataError, match=r"14575: could be run_20251108_145754, run_20251109_14"):
        find_by_name("14575")
    assert find_by_name("20251108", Path("out")) == Path(RUNS[1])


@pytest.mark.slow
def test_training_sampling_and_export_take_the_name_of_a_run(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*tiny, "checkpoint_dir=out", "max_iters=2", "test_freq=null"]
    assert run_here(words) == 0
    run = only_run(tmp_path / "out")
    name = run.name.split("_")[-1]
    assert run_here([*words, "max_iters=3", f"resume={name}"]) == 0
    assert (run / "checkpoint_3.pt").exists()
    sample.write_samples(sample.read_arguments([name, "--max-new-tokens=3"]))
    assert export.main([name, "exported"]) == 0
    assert os.path.exists("exported/model.safetensors")
    capsys.readouterr()
    new = ["checkpoint_dir=new", "max_iters=1", "test_freq=null", f"init_from={name}"]
    assert run_here([*tiny, *new]) == 0
    assert f"{name}: bdh, n_layer 2" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="999999: not found"):
        resolve_resume("999999", Path("out"), lambda config: [])
