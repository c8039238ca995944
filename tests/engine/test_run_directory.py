"""Run directories: created late and exclusively, locked, continued without mixing two courses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from compare.reading.run import read_run
from config import CheckpointError, Config, ConfigError, DataError, NonFiniteError, WriteError
from engine.checkpoint.find import resolve_resume
from engine.checkpoint.load import load_checkpoint
from engine.checkpoint.save import save_checkpoint
from engine.run_directory.directory import RunDirectory
from engine.run_directory.environment import describe_session
from engine.run_directory.find_checkpoint import newest_valid
from engine.run_directory.manifest import data_path, steps_in, verify
from engine.run_directory.metrics_file import is_protected, read_lines
from engine.run_directory.saved_config import NOT_SAVED, check_config, read_config
from engine.setup.starting_point import check_own_config
from tests.engine.faults import die, failing, stand_in
from tests.engine.forks import in_child
from tests.engine.states import finished_run, make_config, make_state, new_run, reopen, save_steps
from tests.runs import only_run, run_here


def records(folder: Path) -> list[dict[str, Any]]:
    lines, damage = read_lines((folder / "metrics.jsonl").read_bytes())
    assert not damage
    return [line.record for line in lines if line.record is not None]


# ---- creation


def test_nothing_exists_before_the_first_checkpoint_and_nothing_stays_without(
    tmp_path: Path,
) -> None:
    with RunDirectory.start(make_config(tmp_path / "short")) as run:
        run.prepare()
    assert os.listdir(tmp_path / "short" / "checkpoints") == []
    (tmp_path / "short" / "checkpoints").rmdir()
    (tmp_path / "short").rmdir()
    with RunDirectory.start(make_config(tmp_path)) as run:
        run.append_metrics({"step": 1, "train/loss": 2.0})
        assert os.listdir(tmp_path) == []
        folder = run.prepare()
        assert records(folder) == [{"step": 1, "train/loss": 2.0}]
        save_steps(run, 10)
    assert sorted(os.listdir(folder)) == [
        ".lock",
        "checkpoint_10.json",
        "checkpoint_10.pt",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
    ]


def test_a_run_that_trained_for_a_minute_stays_and_shows_how_it_is(tmp_path: Path) -> None:
    with RunDirectory.start(make_config(tmp_path)) as run:
        run.append_metrics({"step": 1, "train/loss": 2.0})
        run.count_step(7, 70, 59)
        assert os.listdir(tmp_path) == []
        run.count_step(7, 70, 61)
        folder = run.future_path
        run.append_metrics({"step": 9, "train/loss": 1.5})
        assert [record["step"] for record in records(folder)] == [1, 9]
        # In a child: who looks at a lock file of its own gives up the lock.
        assert in_child(lambda: read_run(folder).state)[1] == "running"
    left = read_run(folder)
    assert (left.state, left.step, left.problems) == ("crashed", 9, ())
    nothing = (
        f"{folder}: no valid checkpoint in it. It ended before its first one.* --config {folder}"
    )
    with pytest.raises(CheckpointError, match=nothing):
        reopen(folder, tmp_path)


def test_a_run_says_how_far_it_got_however_it_ends(tmp_path: Path) -> None:
    for number, error in enumerate((None, NonFiniteError("loss nan"))):
        with (
            contextlib.suppress(NonFiniteError),
            RunDirectory.start(make_config(tmp_path / str(number))) as run,
        ):
            run.count_step(34, 512, 61.25)
            run.end("stopped", "SIGINT")
            if error:
                raise error
        assert run.path is not None
        ended = told_of(run.path)["ended"]
        assert (ended["step"], ended["tokens"], ended["elapsed_s"]) == (34, 512, 61.25)
        assert ended["state"] == ("failed" if error else "stopped")


def test_a_name_that_another_run_of_the_same_second_took_is_told_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (RunDirectory.start(make_config(tmp_path)) for _ in range(2))
    second._started = first._started
    promised = first.future_path
    assert second.future_path == promised  # neither is made yet
    first.prepare()
    assert capsys.readouterr().out == ""
    folder = second.prepare()
    assert folder.name == f"{promised.name}_01"
    told = f"Run directory: {folder}, because another run took {promised.name}\n"
    assert capsys.readouterr().out == told
    first.close()
    second.close()


@pytest.mark.slow
def test_the_closing_line_has_the_time_of_a_run_that_saves_and_logs_nothing(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.reporting.format_duration", lambda seconds: f"{seconds:.6f}")
    monkeypatch.setattr("engine.monitor.progress.format_duration", lambda seconds: f"{seconds:.6f}")
    words = ["save_model=false", "log_freq=1000", "test_freq=null", "max_iters=5"]
    assert run_here([*tiny, *words]) == 0
    told = capsys.readouterr().out
    took, steps = (
        float(re.findall(pattern, told)[0])
        for pattern in (r"tokens in ([\d.]+)", r"steps ([\d.]+)")
    )
    assert took >= steps > 0


def test_a_failed_creation_after_a_minute_is_told_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunDirectory.start(make_config(tmp_path)) as run:
        with failing(1):
            run.count_step(7, 70, 61)
        run.count_step(7, 70, 62)
        assert capsys.readouterr().out.count("Training goes on; metrics wait in memory.") == 1
        assert run.path is None
        run.count_step(7, 70, 122)
        assert run.path is not None


@pytest.mark.parametrize("error", [NonFiniteError("loss nan"), WriteError("disk full")])
def test_a_run_that_ends_by_a_loss_or_a_disk_keeps_what_is_known(
    tmp_path: Path, error: Exception
) -> None:
    for save_model in (True, False):
        with (
            pytest.raises(type(error)),
            RunDirectory.start(make_config(tmp_path, save_model=save_model)) as run,
        ):
            if save_model:
                run.append_metrics({"step": 1, "train/loss": 9.0})
            raise error
        assert (run.path is not None) is save_model
        (folder,) = (tmp_path / "checkpoints").iterdir()
    left = read_run(folder)
    assert (left.state, left.step, left.problems) == ("crashed", 1, ())
    assert left.end_reason == f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_a_run_that_fails_unexpectedly_keeps_its_metrics_only_if_it_trained_long(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("unexpected")

    def attempt(folder: Path) -> list[int]:
        with pytest.raises(RuntimeError, match="unexpected"):
            run_here([*tiny, f"checkpoint_dir={folder}", "checkpoint_freq=null"])
        return [r["step"] for run in folder.glob("run_*") for r in records(run)]

    monkeypatch.setattr("engine.trainer.Trainer.evaluate", broken)  # at step 10
    assert attempt(tmp_path / "short") == []
    monkeypatch.setattr("engine.run_directory.directory.KEEP_AFTER_S", 0.0)
    assert attempt(tmp_path / "long") == [1, 5, 10]


@pytest.mark.slow
def test_a_failed_creation_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    for at in range(1, 100):
        with RunDirectory.start(make_config(tmp_path)) as run, failing(at) as faults:
            try:
                run.prepare()
            except WriteError:
                assert not list(tmp_path.glob("checkpoints/*"))
        if not faults.reached:
            assert at > 10
            return
    pytest.fail("the sweep did not end")


def test_the_saved_config_starts_the_same_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, resume_from_checkpoint="auto", seed=7)
    with RunDirectory.start(config, ["configs/tiny.yaml", "seed=7"]) as run:
        folder = run.prepare()
        assert Config.from_yaml(folder / "config.yaml") == make_config(tmp_path, seed=7)
        text = (folder / "config.yaml").read_text()
        assert text.startswith("# configs/tiny.yaml\n# seed=7\n")


def test_the_environment_is_told_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    replaced = "parquet_dir=s3://a:hf_secret@b"
    monkeypatch.setattr(sys, "argv", ["train.py", replaced, "parquet_dir=x"])
    with RunDirectory.start(make_config(tmp_path), facts={"device": "cpu"}) as run:
        text = (run.prepare() / "environment.json").read_text()
    told = json.loads(text)
    assert told["torch"] == version("torch")  # where +cu130 may be missing
    assert (told["device"], told["resumed"]) == ("cpu", [])
    assert told["command"] == ["train.py", "parquet_dir=(an address)", "parquet_dir=x"]
    assert "hf_secret" not in text


def told_of(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return read


@pytest.mark.slow
def test_a_list_of_runs_finds_config_sizes_data_and_end_in_the_environment(
    tiny: list[str], tmp_path: Path
) -> None:
    assert run_here([*tiny, f"checkpoint_dir={tmp_path / 'runs'}"]) == 0
    run = only_run(tmp_path / "runs")
    told, config = told_of(run), Config.from_yaml(run / "config.yaml")
    assert told["config"]["values"] == config.to_dict()
    saved = hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert told["config"]["sha256"] == saved
    assert told["run"] == {
        "parameters": 11264,
        "trainable_parameters": 11264,
        "tokens_per_step": 128,
        "planned_steps": 30,
        "flops_per_token": told["run"]["flops_per_token"],
        "processes": 1,
        "precision": told["run"]["precision"],
    }
    manifest = json.loads((run / "checkpoint_30.json").read_text())
    assert told["data"]["fingerprint"] == manifest["fingerprint"]
    assert told["data"]["lines"][0].startswith("Data: ")
    assert (told["ended"]["state"], told["ended"]["reason"]) == ("done", "")
    resuming = [f"resume_from_checkpoint={run}", "max_iters=40", "learning_rate=1e-3"]
    assert run_here([*tiny, f"checkpoint_dir={tmp_path / 'runs'}", *resuming]) == 0
    told, config = told_of(run), Config.from_yaml(run / "config.yaml")
    assert told["config"]["values"] == config.to_dict()
    assert told["run"]["planned_steps"] == 40 and told["ended"]["state"] == "done"


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (DataError("part_2.parquet: cut\nmore"), "failed", "DataError: part_2.parquet: cut"),
        (None, None, None),
    ],
)
def test_the_end_of_a_session_is_noted_and_a_new_one_takes_it_back(
    tmp_path: Path, error: Exception | None, state: str | None, reason: str | None
) -> None:
    with contextlib.suppress(DataError), RunDirectory.start(make_config(tmp_path)) as run:
        save_steps(run, 1)
        if error is not None:
            raise error
    assert run.path is not None
    ended = told_of(run.path).get("ended", {})
    assert (ended.get("state"), ended.get("reason")) == (state, reason)
    with reopen(run.path, tmp_path) as again:
        assert again.path is not None and "ended" not in told_of(again.path)


def test_the_revision_is_null_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert describe_session("cpu")["git"] is None


@pytest.mark.slow
def test_eight_processes_of_one_second_get_eight_directories(tmp_path: Path) -> None:
    run = RunDirectory.start(make_config(tmp_path))  # the children inherit its start time
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            run.prepare()
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    stem = names[0]
    assert names == [stem, *(f"{stem}_{number:02d}" for number in range(1, 8))]
    for name in names:
        Config.from_yaml(tmp_path / "checkpoints" / name / "config.yaml")


def test_a_checkpoint_dir_that_is_a_file_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(WriteError, match="is a file") as caught:
        RunDirectory.start(make_config(tmp_path))
    assert caught.value.exit_code == 5


# ---- the lock


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        run = reopen(folder, tmp_path)
        if os.fork() == 0:  # a data worker that outlives its killed parent
            os.close(writing)
            time.sleep(2)
            os._exit(0)
        os.write(writing, b"locked")
        time.sleep(60)
        run.close()
    assert os.read(reading, 6) == b"locked"
    with pytest.raises(CheckpointError) as caught:
        reopen(folder, tmp_path)
    assert f"{folder.name} is in use by host " in str(caught.value)
    assert f" pid {child} since " in str(caught.value)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reopen(folder, tmp_path).close()


def test_a_new_run_is_locked_too(tmp_path: Path) -> None:
    with new_run(tmp_path, 10) as run:
        status, text = in_child(lambda: reopen(run.prepare(), tmp_path))
        assert status == 0
        assert "is in use by host" in text
    reopen(run.prepare(), tmp_path).close()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    folder = finished_run(tmp_path, 10)
    monkeypatch.setattr("fcntl.lockf", no_locks)
    with reopen(folder, tmp_path) as run:
        assert "cannot be locked (No locks available): make sure" in run.notes[0]


def test_a_checkpoint_saved_between_finding_and_locking_is_noticed(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10)
    resume, _ = newest_valid(folder)
    assert resume is not None
    with reopen(folder, tmp_path) as run:
        save_steps(run, 20)
    with pytest.raises(CheckpointError, match=r"changed while it was opened.*Run the command"):
        RunDirectory.reopen(resume, make_config(tmp_path))
    reopen(folder, tmp_path).close()  # the refused attempt left no lock


# ---- metrics


def test_metrics_are_lines_of_valid_json(tmp_path: Path) -> None:
    with new_run(tmp_path, 10) as run:
        run.append_metrics({"step": 11, "a": float("nan"), "b": float("-inf"), "c": None})
        assert records(run.prepare())[-1] == {"step": 11, "a": None, "b": None, "c": None}


def test_metrics_after_the_checkpoint_and_broken_lines_go_at_resume(tmp_path: Path) -> None:
    with new_run(tmp_path, 10, 20) as run:
        folder = run.prepare()
        kept = (folder / "metrics.jsonl").read_bytes()
        run.append_metrics({"step": 20, "final/val_loss": 1.0})
        run.append_metrics({"step": 25, "train/loss": 1.0})
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"no": "step"}\n{"step": 15, "train/lo')
    with reopen(folder, tmp_path):
        assert (folder / "metrics.jsonl").read_bytes() == kept


def test_a_full_disk_delays_metrics_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with new_run(tmp_path, 10) as run:
        before = records(run.prepare())
        for step in (11, 12):
            with failing(2):  # the write; the open succeeds
                run.append_metrics({"step": step})
        assert records(run.prepare())[len(before) :] == [{"step": 11}, {"step": 12}]
    assert capsys.readouterr().out.count("cannot append to ") == 1


def test_a_partly_written_line_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_run(tmp_path, 10) as run:
        folder, write = run.prepare(), os.write
        whole = (folder / "metrics.jsonl").read_bytes()
        sizes = iter([4, -1])

        def partial(descriptor: int, data: memoryview) -> int:
            size = next(sizes)
            if size < 0:
                raise OSError(28, "No space left on device")
            return write(descriptor, data[:size])

        monkeypatch.setattr(os, "write", partial)
        run.append_metrics({"step": 11})
        monkeypatch.undo()
        assert (folder / "metrics.jsonl").read_bytes() == whole


def block_metrics(run: RunDirectory) -> None:
    metrics = run.prepare() / "metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()
    run.append_metrics({"step": 11})


def test_metrics_that_cannot_be_written_at_the_end_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="cannot append to "), new_run(tmp_path / "a", 10) as run:
        block_metrics(run)
    # An earlier error is not hidden by it.
    with pytest.raises(ValueError, match="first"), new_run(tmp_path / "b", 10) as run:
        block_metrics(run)
        raise ValueError("first")


# ---- continuing


def test_a_run_goes_on_in_its_directory(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20)
    (folder / ".tmp-1-checkpoint_30.pt").write_text("half")
    data_path(folder, 30).write_text("renamed, but its manifest was never written")
    with reopen("auto", tmp_path) as run:
        assert run.notes == ["removed checkpoint_30.pt, which was not completed"]
        assert (run.path, run.resumed_step) == (folder, 20)
        assert run.last_checkpoint == data_path(folder, 20)
        save_steps(run, 30, 40, 50, keep_last=1)
    assert steps_in(folder) == steps_in(folder, "pt") == [20, 50]
    assert not list(folder.glob(".tmp-*"))
    (entry,) = json.loads((folder / "environment.json").read_text())["resumed"]
    assert (entry["step"], entry["command"]) == (20, sys.argv)
    assert [record["step"] for record in records(folder)] == [10, 20, 30, 40, 50]


def test_a_run_is_not_continued_through_what_is_no_file(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10)
    for name in (".lock", "metrics.jsonl", "config.yaml"):
        (folder / name).rename(tmp_path / "kept")
        for kind in ("fifo", "/dev/zero", "folder"):
            stand_in(folder / name, kind)
            message = f"cannot continue in .*{name}: .*in its place"
            with pytest.raises(WriteError, match=message):
                reopen(folder, tmp_path)
            assert steps_in(folder) == [10]
        (folder / name).rmdir()
        (tmp_path / "kept").rename(folder / name)


def test_the_target_of_a_lock_that_is_a_link_is_not_written(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10)
    (tmp_path / "mine").write_text("mine")
    stand_in(folder / ".lock", "../../mine")
    with pytest.raises(WriteError, match="symbolic link"):
        reopen(folder, tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_linked_folders_and_checkpoints_go_on_working(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to("disk")
    folder = finished_run(tmp_path, 10)
    moved = folder.resolve().rename(tmp_path / "moved")
    folder.symlink_to(moved)
    data_path(moved, 10).rename(tmp_path / "large.pt")
    data_path(moved, 10).symlink_to(tmp_path / "large.pt")
    with reopen("auto", tmp_path) as run:
        assert (run.path, run.resumed_step) == (folder, 10)
        save_steps(run, 20, keep_last=1)
    assert steps_in(moved) == [10, 20]


def test_the_config_of_before_is_kept_when_it_differs(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10)
    first = (folder / "config.yaml").read_text()
    reopen(folder, tmp_path).close()
    assert (folder / "config.yaml").read_text() == first
    with reopen(folder, tmp_path, max_iters=9999) as run:
        assert run.notes == ["the config differs from before; the old one is config.before_10.yaml"]
    assert (folder / "config.before_10.yaml").read_text() == first
    assert Config.from_yaml(folder / "config.yaml") == make_config(tmp_path, max_iters=9999)
    reopen(folder, tmp_path, max_iters=8888).close()
    assert (folder / "config.before_10.yaml").read_text() == first
    assert (folder / "config.before_10_01.yaml").exists()


def other_run(tmp_path: Path) -> Path:
    """A run whose config is not the default."""
    config = make_config(tmp_path, seed=7, keep_last=9)
    with RunDirectory.start(config) as run:
        save_steps(run, 10)
        return run.prepare()


def test_a_config_cut_short_does_not_stand_for_its_run(tmp_path: Path) -> None:
    folder = other_run(tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text[: text.index("  keep_last")])
    Config.from_yaml(folder / "config.yaml")  # a valid one, but another
    resume, _ = newest_valid(folder)
    assert resume is not None
    check_own_config([f"{tmp_path}/mine.yaml"], resume)
    with pytest.raises(
        CheckpointError, match=r"It differs in .*keep_last \(saved 9, now"
    ) as caught:
        check_own_config([f"{tmp_path}/mine.yaml", f"{folder}/config.yaml"], resume)
    assert "training.seed (saved 7, now 1337)" in str(caught.value)
    assert read_config(folder)[0].training.seed == 7
    _, notes = resolve_resume("auto", folder.parent, lambda _: [])
    assert notes == [f"{folder.name}: config.yaml: {NOT_SAVED}"]


@pytest.mark.slow
def test_no_damage_of_a_config_is_taken_for_what_the_run_saved(tmp_path: Path) -> None:
    folder, draw = other_run(tmp_path), random.Random(1)
    place = folder / "config.yaml"
    data, saved = place.read_bytes(), Config.from_yaml(place)
    for number in range(50):
        at = draw.randrange(len(data))
        changed = bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        place.write_bytes(data[:at] + (changed if number % 2 else b""))
        assert read_config(folder)[0] == saved
        try:
            check_config(folder)
        except (CheckpointError, ConfigError):
            continue
        assert Config.from_yaml(place) == saved  # in a comment


def test_a_config_of_a_resume_that_was_cut_off_is_no_damage(tmp_path: Path) -> None:
    folder = other_run(tmp_path)
    before = (folder / "config.yaml").read_bytes()
    reopen(folder, tmp_path, max_iters=9).close()
    (folder / "config.yaml").write_bytes(before)  # environment.json is written first
    check_config(folder)
    assert read_run(folder).problems == ()


def test_damage_of_metrics_and_environment_is_told_at_resume(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20, 30)
    (folder / "environment.json").write_text((folder / "environment.json").read_text()[:-9])
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.05", b"0.04")
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    with reopen(folder, tmp_path) as run:
        assert run.notes == [
            "environment.json: damaged, not a JSON object; a new one is begun, "
            "it is environment.damaged.json now",
            "metrics.jsonl: left out 1 damaged line (2)",
        ]
        assert [record["step"] for record in records(folder)] == [10, 30]
    (folder / "metrics.jsonl").write_bytes(lines[0])
    with reopen(folder, tmp_path) as run:
        assert run.notes[0].startswith("metrics.jsonl: cut short: ")
    assert read_run(folder).problems == ()


def test_lines_of_an_earlier_version_get_their_checksums_at_resume(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20)
    (folder / "metrics.jsonl").write_text('{"step": 10, "a": 1e999}\n{"step": 20}\n')
    with reopen(folder, tmp_path):
        texts = (folder / "metrics.jsonl").read_bytes().splitlines()
    assert [is_protected(text) for text in texts] == [True, True]
    assert [record["step"] for record in records(folder)] == [10, 20]


def test_later_checkpoints_are_set_aside_when_an_older_one_is_continued(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20, 30)
    with reopen(data_path(folder, 10), tmp_path) as run:
        aside = folder / "abandoned_after_10"
        assert run.notes == [
            f"moved checkpoint_20.pt, checkpoint_30.pt to {aside}: this run goes on from step 10"
        ]
        assert steps_in(folder) == steps_in(folder, "pt") == [10]
        assert [record["step"] for record in records(folder)] == [10]
        save_steps(run, 20)
    # What was set aside is a run directory of its own.
    resume, _ = resolve_resume(str(aside), tmp_path, lambda _: [])
    assert resume is not None
    assert resume.step == 30
    assert [record["step"] for record in records(aside)] == [10, 20, 30]
    reopen(data_path(folder, 10), tmp_path).close()
    assert steps_in(folder / "abandoned_after_10_01") == [20]


def test_a_damaged_newest_checkpoint_is_not_in_the_way(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20)
    data_path(folder, 20).write_text("damaged")
    with reopen("auto", tmp_path) as run:
        assert run.resumed_step == 10
        save_steps(run, 20)
        verify(data_path(folder, 20))


def whole_copies(folder: Path, step: int) -> int:
    """How many valid checkpoints of `step` lie in the run or in what was set aside."""
    count = 0
    for place in (folder, *folder.glob("abandoned_after_*")):
        try:
            verify(data_path(place, step))
            count += 1
        except CheckpointError:
            pass
    return count


@pytest.mark.slow
@pytest.mark.parametrize("deadly", [False, True])
def test_a_fault_at_any_call_of_a_resume_loses_nothing(tmp_path: Path, deadly: bool) -> None:
    for at in range(1, 200):
        base = tmp_path / str(at)
        folder = finished_run(base, 10, 20, 30)
        older = data_path(folder, 10)

        def attempt(base: Path = base, older: Path = older, at: int = at) -> str:
            with failing(at, die if deadly else None) as faults:
                try:
                    reopen(older, base, max_iters=9).close()
                except WriteError:
                    return "refused"
            return "refused" if faults.reached else "done"

        _, outcome = in_child(attempt) if deadly else (0, attempt())
        resume, _ = newest_valid(folder)
        assert resume is not None
        load_checkpoint(resume.path)
        with reopen(older, base, max_iters=9) as run:
            assert steps_in(folder) == steps_in(folder, "pt") == [10]
            assert [record["step"] for record in records(folder)] == [10]
            save_steps(run, 20)
        assert whole_copies(folder, 10) == 1
        assert (whole_copies(folder, 20), whole_copies(folder, 30)) == (2, 1)
        assert not list(folder.glob(".tmp-*"))
        if outcome == "done":
            assert at > 20
            return
    pytest.fail("the sweep did not end")


def test_a_manifest_follows_its_data_after_a_crash_between_them(tmp_path: Path) -> None:
    folder = finished_run(tmp_path, 10, 20)
    aside = folder / "abandoned_after_10"
    aside.mkdir()
    data_path(folder, 20).rename(data_path(aside, 20))
    with reopen("auto", tmp_path):
        assert steps_in(folder) == [10]
        verify(data_path(aside, 20))


def train(directory: RunDirectory, weights: torch.Tensor, first: int, stop: int) -> None:
    """A stand-in for the loop: each step changes the weights; a checkpoint every fifth."""
    for step in range(first, stop + 1):
        weights.mul_(0.9).add_(step)
        directory.append_metrics({"step": step, "train/loss": float(weights[0])})
        if step % 5 == 0:
            state = make_state(step)
            state["model"]["w"] = weights
            save_checkpoint(directory, state, 2)


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_like_one_never_killed(tmp_path: Path) -> None:
    with RunDirectory.start(make_config(tmp_path / "whole")) as run:
        train(run, torch.ones(8), 1, 20)
        whole = run.prepare()

    def session(at: int) -> Callable[[], str]:
        def work() -> str:
            config = make_config(tmp_path / "killed")
            resume, _ = resolve_resume("auto", tmp_path / "killed" / "checkpoints", lambda _: [])
            with failing(at, die):
                if resume is None:
                    run, weights, first = RunDirectory.start(config), torch.ones(8), 1
                else:
                    run = RunDirectory.reopen(resume, config)
                    weights = load_checkpoint(resume.path)["model"]["w"]
                    first = resume.step + 1
                train(run, weights, first, 20)
                run.close()
            return "done"

        return work

    sessions = 0
    while in_child(session(100 + 25 * sessions))[1] != "done":
        sessions += 1
        assert sessions < 50
    assert sessions > 1
    killed, notes = newest_valid(max((tmp_path / "killed" / "checkpoints").iterdir()))
    assert killed is not None
    assert notes == []
    assert (killed.run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    expected = load_checkpoint(data_path(whole, 20))["model"]["w"]
    assert torch.equal(load_checkpoint(killed.path)["model"]["w"], expected)
