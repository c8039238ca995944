"""A fork is the run that a resume with the same changes would have been, kept by itself."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import export
import runs
import sample
from engine.run_directory.fork import means_parent
from tests.conftest import TINY
from tests.engine.test_trackers import fake
from tests.runs import assert_same_run, metrics, only_run, run_here, run_main, start, wait_for

WSD = "schedule: {name: wsd, warmup_iters: 3}\n"
CHANGES = ["learning_rate=1e-3", "max_iters=18", "test_freq=6", "dropout=0.3"]
AUTO = "resume_from_checkpoint=auto"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny config whose learning rate is constant until the last fifth of the run."""
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    text = TINY.replace("checkpoint_freq: 10", "checkpoint_freq: 8")
    config.write_text(f"{text}{WSD}dataset:\n  parquet_dir: {corpus_dir}\n")
    return [os.fspath(config)]


@pytest.fixture(scope="module")
def trained(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    assert run_here([*words, into(folder)]) == 0
    return only_run(folder)


@pytest.fixture
def trunk(trained: Path, tmp_path: Path) -> Path:
    """A run of 30 steps with checkpoints at 8, 16, 24 and 30, in the folder `runs`."""
    copy = tmp_path / "runs" / "run_20251108_143022"
    shutil.copytree(trained, copy)
    return copy


def into(folder: Path) -> str:
    return f"checkpoint_dir={folder}"


def fork_from(path: Path | str) -> str:
    return f"fork_from_checkpoint={path}"


def environment(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return found


def test_a_fork_is_the_resumed_run_with_the_same_changes_and_leaves_its_parent_as_it_is(
    words: list[str], tmp_path: Path, trunk: Path
) -> None:
    resumed = tmp_path / "copy" / trunk.name
    shutil.copytree(trunk, resumed)
    before = {path.name: path.read_bytes() for path in trunk.iterdir()}
    at_8 = fork_from(trunk / "checkpoint_8.pt")
    assert run_here([*words, into(tmp_path / "fork"), at_8, *CHANGES]) == 0
    assert {path.name: path.read_bytes() for path in trunk.iterdir()} == before
    resume = f"resume_from_checkpoint={resumed / 'checkpoint_8.pt'}"
    assert run_here([*words, into(tmp_path), resume, *CHANGES]) == 0
    fork = only_run(tmp_path / "fork")
    assert_same_run(fork, resumed, step=18)
    assert sorted(path.name for path in fork.glob("*.pt")) == [
        "checkpoint_16.pt",
        "checkpoint_18.pt",
    ]
    parent = environment(fork)["parent"]
    manifest = json.loads((trunk / "checkpoint_8.json").read_text())
    assert (parent["run"], parent["path"]) == (trunk.name, str(trunk))
    assert (parent["step"], parent["sha256"]) == (8, manifest["sha256"])
    assert parent["changed"] == {
        "model.dropout": [0.1, 0.3],
        "training.max_iters": [30, 18],
        "training.learning_rate": [3e-3, 1e-3],
        "training.test_freq": [10, 6],
    }
    assert list(parent["changed_without_effect"]) == ["training.checkpoint_dir"]


def test_a_branch_of_a_trunk_is_the_run_of_that_length(
    words: list[str], tmp_path: Path, trunk: Path
) -> None:
    words = [*words, "max_iters=20"]
    # The decay takes the last fifth of 20 steps: it begins at 16.
    assert run_here([*words, into(tmp_path / "branch"), fork_from(trunk / "checkpoint_16.pt")]) == 0
    assert run_here([*words, into(tmp_path / "straight")]) == 0
    straight = only_run(tmp_path / "straight")
    rates = {row["train/learning_rate"] for row in metrics(straight) if "train/loss" in row}
    assert len(rates) > 2
    assert_same_run(only_run(tmp_path / "branch"), straight, step=20)


def test_a_fork_of_a_fork_is_whole_without_them(
    words: list[str],
    tmp_path: Path,
    trunk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracked = fake(monkeypatch)
    words = [*words, "wandb_log=true"]
    straight = [row["step"] for row in metrics(trunk)]
    at_8 = fork_from(trunk / "checkpoint_8.pt")
    assert run_here([*words, into(tmp_path / "first"), at_8, "max_iters=16"]) == 0
    shutil.rmtree(trunk)
    first = only_run(tmp_path / "first").rename(tmp_path / "first" / "run_first")
    second = [*words, into(tmp_path / "second"), AUTO, fork_from("run_first")]
    monkeypatch.chdir(tmp_path)
    assert run_here([*second, "max_iters=20"]) == 0
    shutil.rmtree(first)
    assert run_here([*second, "max_iters=30"]) == 0  # goes on, by the name of a run that is gone
    run = only_run(tmp_path / "second")
    parent = environment(run)["parent"]
    assert parent["run"] == first.name
    assert parent["ancestors"] == [{"step": 8, "changed": {"training.max_iters": [30, 16]}}]
    assert {row["step"] for row in metrics(run)} == {*straight, 16}  # where `first` ended
    ids = [run.options["id"] for run in tracked.runs]
    assert len(ids) == 3 and ids[0] != ids[1] == ids[2]
    for command in ("list", "tree", f"report -o {tmp_path}/a.html", f"plot -o {tmp_path}/a.png"):
        name, *more = command.split()
        done = run_main(partial(runs.main, [name, str(run), *more]))
        assert (done.returncode, done.stderr) == (0, "")
    sample.write_samples(sample.read_arguments([str(run), "--max-new-tokens=3"]))
    assert export.main([str(run), str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    assert run_here([str(run / "config.yaml"), "wandb_log=false"]) == 3
    assert f"{first}/checkpoint_16.pt: not found" in capsys.readouterr().err


def test_killed_before_its_first_checkpoint_a_fork_begins_again_and_later_it_goes_on(
    words: list[str], tmp_path: Path, trunk: Path
) -> None:
    words = [*words, "log_freq=1", fork_from("143022/checkpoint_8.pt")]
    shutil.copytree(trunk.parent, tmp_path / "other")
    assert run_here([*words, into(tmp_path / "other")]) == 0
    (straight,) = set((tmp_path / "other").iterdir()) - {tmp_path / "other" / trunk.name}
    for moment in ("Iter     12", "checkpoint_16.pt"):
        child = start([*words, into(trunk.parent), AUTO])
        lines = wait_for(child, moment)
        assert any("Forked from" in line and "8 steps done" in line for line in lines)
        child.kill()
        child.communicate()
    assert run_here([*words, into(trunk.parent), AUTO]) == 0
    (fork,) = set(trunk.parent.iterdir()) - {trunk}
    assert_same_run(fork, straight, step=30)


def test_auto_tells_a_fork_from_its_parent(words: list[str], trunk: Path) -> None:
    words = [*words, into(trunk.parent), AUTO]
    assert run_here([*words, "max_iters=32", fork_from(trunk)]) == 0
    (fork,) = set(trunk.parent.iterdir()) - {trunk}
    assert run_here([*words, "max_iters=34"]) == 0
    assert run_here([*words, "max_iters=33", fork_from(trunk)]) == 0  # whose newest is another now
    steps = [max(row["step"] for row in metrics(run)) for run in (trunk, fork)]
    assert steps == [34, 33] and len([*trunk.parent.iterdir()]) == 2


REFUSED = [
    ("n_layer=3", 3, "model.n_layer was 2, is 3"),
    ("init_from=weights.pt", 2, "began with scratch; leave init_from out."),
    ("fork_from_checkpoint=143023", 3, "143023: not found"),
]


@pytest.mark.parametrize(("word", "code", "message"), REFUSED)
def test_what_a_resume_may_not_change_a_fork_may_not_either(
    words: list[str],
    trunk: Path,
    capsys: pytest.CaptureFixture[str],
    word: str,
    code: int,
    message: str,
) -> None:
    words = [*words, into(trunk.parent), fork_from(trunk), "max_iters=31", word]
    assert run_here(words) == code
    assert message in capsys.readouterr().err
    assert [*trunk.parent.iterdir()] == [trunk]


def test_a_dry_run_of_a_fork_tells_of_it_and_creates_nothing(
    words: list[str], trunk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, into(trunk.parent), fork_from(trunk / "checkpoint_24.pt"), "max_iters=40"]
    assert run_here([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"Forked from {trunk / 'checkpoint_24.pt'}: 24 steps done\n" in told
    assert "  training.max_iters: 30 -> 40\n" in told and " | from step 24" in told
    assert "made with the first checkpoint" in told
    assert [*trunk.parent.iterdir()] == [trunk]


def test_a_fork_goes_on_without_its_parents_config_and_tells_of_records_that_are_lost(
    words: list[str], trunk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, into(trunk.parent), fork_from(trunk / "checkpoint_24.pt"), "max_iters=25"]
    records = trunk / "metrics.jsonl"
    (trunk / "config.yaml").unlink()
    first, damaged, *rest = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join([first, damaged[:-9] + b"\n", *rest]))
    assert run_here(words) == 0
    (fork,) = set(trunk.parent.iterdir()) - {trunk}
    assert len(metrics(fork)) > 1
    assert f"{trunk}: metrics.jsonl: left out 1 damaged line (2)" in capsys.readouterr().out
    records.unlink()
    records.mkdir()
    assert run_here(words) == 3
    assert f"{records} cannot be read: Is a directory." in capsys.readouterr().err


def test_a_word_means_the_parent_that_a_fork_saved(tmp_path: Path, trunk: Path) -> None:
    folder, saved = trunk.parent, str(trunk / "checkpoint_8.pt")
    for word in (saved, str(trunk), str(folder), "143022", "143022/checkpoint_8.pt"):
        assert means_parent(word, saved, folder), word
    for word in (str(trunk / "checkpoint_16.pt"), str(tmp_path), "143022/checkpoint_16.pt"):
        assert not means_parent(word, saved, folder), word
    shutil.rmtree(trunk)
    for word in (saved, str(trunk), "143022", "143022/checkpoint_8.pt"):
        assert means_parent(word, saved, folder), word
    assert not means_parent("143022/checkpoint_16.pt", saved, folder)
    assert not means_parent("143022", None, folder) and not means_parent(None, saved, folder)
    assert means_parent(None, None, folder)
