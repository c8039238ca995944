"""`runs.py tree` and `runs.py diff` of forks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import runs
from compare.labels import labels
from compare.reading.run import Run, read_run
from compare.tables.tree import family, trees
from engine.run_directory.environment_file import environment_text
from tests.compare.run_directories import change_environment, make

Captured = pytest.CaptureFixture[str]


def fork_of(parent: Run, name: str, step: int, *options: str, **changed: list[Any]) -> Run:
    """A run that was forked from `parent` at a step."""
    path = parent.path.resolve()
    facts = {"run": parent.name, "path": str(path), "step": step, "sha256": "f00d"}
    changes = {f"training.{key}": pair for key, pair in changed.items()}
    environment = {"parent": facts | {"changed": changes, "changed_without_effect": {}}}
    words = (*options, f"fork_from_checkpoint={path / f'checkpoint_{step}.pt'}")
    return make(name, *words, environment=environment, losses=(3.0, 2.0))


def make_family() -> tuple[Run, Run, Run]:
    trunk = make("run_a", losses=(4.0, 3.0, 2.5, 2.25))
    fork = fork_of(trunk, "run_b", 100, learning_rate=[1e-3, 3e-4], max_iters=[400, 200])
    return trunk, fork, fork_of(fork, "run_c", 150)


def test_forks_stand_below_their_parents_with_what_they_changed(capsys: Captured) -> None:
    make_family()
    make("run_d", losses=(5.0,))
    assert runs.main(["tree"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run          state    steps    loss  changed",
        "run_a        done     0-400  2.2500",
        "└─ run_b     done   100-200  2.0000  learning_rate 1e-3 -> 3e-4, max_iters 400 -> 200",
        "   └─ run_c  done   150-200  2.0000",
        "run_d        done     0-100  5.0000",
    ]


@pytest.mark.parametrize("named", ["run_a", "run_b", "run_c"])
def test_a_named_run_shows_its_whole_family_and_no_other(capsys: Captured, named: str) -> None:
    make_family()
    make("run_d")
    assert runs.main(["tree", named, "--json"]) == 0
    root, *forks = json.loads(capsys.readouterr().out)
    assert (root["name"], root["depth"], root["parent"]) == ("run_a", 0, None)
    assert [(each["name"], each["depth"]) for each in forks] == [("run_b", 1), ("run_c", 2)]
    assert (forks[0]["parent"]["step"], forks[0]["best_loss"]) == (100, 2.0)


def test_a_parent_that_is_gone_is_shown_and_its_forks_stay_together(capsys: Captured) -> None:
    trunk, fork, _ = make_family()
    fork_of(trunk, "run_e", 200)
    shutil.rmtree(trunk.path)
    shutil.rmtree(fork.path)
    assert runs.main(["tree"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [[word for word in line if word.startswith(("run_", "gone"))] for line in lines] == [
        ["run_b", "gone"],
        ["run_c"],
        ["run_a", "gone"],
        ["run_e"],
    ]


def test_a_family_is_found_in_other_folders_and_after_it_was_moved() -> None:
    trunk, _, last = make_family()
    shutil.move(last.path, "elsewhere")
    moved = read_run(Path("elsewhere"))
    found = family([moved])
    assert [run.path.name for run in found] == ["run_a", "run_b", "elsewhere"]
    nodes = trees(found, [moved])
    assert [node.name for node in nodes] == [trunk.name, "run_b", "elsewhere"]
    shutil.move("checkpoints", "archive")
    root, fork = trees(family([read_run(Path("archive/run_b"))]))
    assert root.run is not None and fork.name == "run_b"


def test_a_parent_in_another_folder_and_of_any_name_is_found(capsys: Captured) -> None:
    trunk = make("two  spaces", folder=Path("elsewhere"))
    fork_of(trunk, "run_b", 100)
    assert runs.main(["tree"]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("two  spaces  done") and second.startswith("└─ run_b")


def test_no_run_is_lost_in_a_circle_and_none_is_its_own_parent(capsys: Captured) -> None:
    first = make("run_a")
    second = fork_of(first, "run_b", 100)
    change_environment(first.path, parent={"run": "run_b", "path": str(second.path.resolve())})
    shutil.move(fork_of(make("run_c"), "run_d", 100).path, "moved")
    shutil.rmtree("checkpoints/run_c")
    shutil.move("moved", "checkpoints/run_c")
    assert runs.main(["tree"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["run_c", "done"], ["run_a", "done"], ["└─", "run_b"]]
    assert runs.main(["diff", "run_c"]) == 2
    assert "diff compares two runs or more, got run_c." in capsys.readouterr().err


def test_a_thousand_forks_of_forks_are_drawn(capsys: Captured) -> None:
    for number in range(1100):
        path = Path(f"checkpoints/run_{number:04}")
        path.mkdir(parents=True)
        parent = {"run": f"run_{number - 1:04}", "path": "/" + "y" * 5000, "step": 1}
        text = environment_text({"parent": parent} if number else {})
        (path / "environment.json").write_text(text)
    assert runs.main(["tree"]) == 0
    assert "   └─ run_1099" in capsys.readouterr().out
    assert runs.main(["tree", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["depth"] == 1099
    shutil.rmtree("checkpoints/run_0003")
    assert runs.main(["diff", "run_0004"]) == 3
    assert "yyy: no such run" in capsys.readouterr().err


def test_a_fork_alone_is_compared_with_its_parent(capsys: Captured) -> None:
    make_family()
    assert runs.main(["diff", "run_b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["run_a", "run_b"]
    shutil.rmtree("checkpoints/run_a")
    assert runs.main(["diff", "run_b"]) == 3
    assert "run_a: no such run" in capsys.readouterr().err


def test_forks_are_labelled_by_the_step_at_which_they_begin() -> None:
    trunk = make("run_a", losses=(3.0, 2.0))
    forks = [fork_of(trunk, f"run_{step}", step) for step in (100, 200)]
    assert labels([trunk, *forks]) == ["no fork", "fork at 100", "fork at 200"]
