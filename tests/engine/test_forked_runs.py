"""A fork is the run that a resume with the same changes would have been, kept by itself."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import runs
from tests.engine.test_resume_rules import AUTO, into
from tests.runs import assert_same_run, metrics, only_run, run_here, run_main, start, wait_for

CHANGES = ["learning_rate=1e-3", "max_iters=18", "test_freq=6", "dropout=0.3"]

pytestmark = pytest.mark.slow


@pytest.fixture
def trunk(tiny: list[str], tmp_path: Path) -> Path:
    """A run of 20 steps with checkpoints at 10 and 20."""
    assert run_here([*tiny, into(tmp_path / "trunk"), "max_iters=20"]) == 0
    return only_run(tmp_path / "trunk")


def forked(tiny: list[str], folder: Path, parent: Path | str, *words: str) -> Path:
    """The run directory of a new fork."""
    assert run_here([*tiny, into(folder), f"fork_from_checkpoint={parent}", *words]) == 0
    return only_run(folder)


def environment(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return found


def test_a_fork_is_the_resumed_run_with_the_same_changes_and_leaves_its_parent_as_it_is(
    tiny: list[str], tmp_path: Path, trunk: Path
) -> None:
    shutil.copytree(trunk, tmp_path / "copy" / trunk.name)
    before = {path.name: path.read_bytes() for path in trunk.iterdir()}
    fork = forked(tiny, tmp_path / "fork", trunk / "checkpoint_10.pt", *CHANGES)
    assert {path.name: path.read_bytes() for path in trunk.iterdir()} == before
    resumed = tmp_path / "copy" / trunk.name
    resume = f"resume_from_checkpoint={resumed / 'checkpoint_10.pt'}"
    assert run_here([*tiny, into(tmp_path), resume, *CHANGES]) == 0
    assert_same_run(fork, resumed, step=18)
    assert sorted(path.name for path in fork.glob("*.pt")) == ["checkpoint_18.pt"]
    parent = environment(fork)["parent"]
    manifest = json.loads((trunk / "checkpoint_10.json").read_text())
    assert (parent["run"], parent["path"]) == (trunk.name, str(trunk))
    assert (parent["step"], parent["sha256"]) == (10, manifest["sha256"])
    assert parent["changed"] == {
        "model.dropout": [0.1, 0.3],
        "training.max_iters": [20, 18],
        "training.learning_rate": [3e-3, 1e-3],
        "training.test_freq": [10, 6],
    }
    assert list(parent["changed_without_effect"]) == ["training.checkpoint_dir"]


def test_a_fork_of_a_fork_is_whole_without_them(
    tiny: list[str], tmp_path: Path, trunk: Path
) -> None:
    first = forked(tiny, tmp_path / "first", trunk / "checkpoint_10.pt", "max_iters=20")
    second = forked(tiny, tmp_path / "second", first, "max_iters=30")
    assert run_here([*tiny, into(tmp_path / "straight")]) == 0
    shutil.rmtree(trunk)
    shutil.rmtree(first)
    assert environment(second)["parent"]["run"] == first.name
    steps = [record["step"] for record in metrics(second)]
    straight = [record["step"] for record in metrics(only_run(tmp_path / "straight"))]
    assert steps == straight
    words = [*tiny, into(tmp_path / "second"), f"fork_from_checkpoint={first}", "max_iters=35"]
    assert run_here([*words, AUTO]) == 0
    assert only_run(tmp_path / "second") == second
    assert metrics(second)[-1]["step"] == 35
    for command in ("list", "tree", f"report -o {tmp_path}/a.html", f"plot -o {tmp_path}/a.png"):
        name, *more = command.split()
        done = run_main(partial(runs.main, [name, str(second), *more]))
        assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_killed_before_its_first_checkpoint_begins_again_and_later_goes_on(
    tiny: list[str], tmp_path: Path, trunk: Path
) -> None:
    words = [*tiny, "log_freq=1", f"fork_from_checkpoint={trunk / 'checkpoint_10.pt'}"]
    straight = tmp_path / "straight"
    assert run_here([*words, into(straight)]) == 0
    words += [into(tmp_path / "killed"), AUTO]
    for moment in ("Iter     14", "checkpoint_20.pt"):
        child = start(words)
        lines = wait_for(child, moment)
        assert any("Forked from" in line and "10 steps done" in line for line in lines)
        child.kill()
        child.communicate()
    assert run_here(words) == 0
    assert_same_run(only_run(tmp_path / "killed"), only_run(straight), step=30)
