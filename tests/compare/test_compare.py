"""Run directories read as they lie: states, damage, other ages; differences and paired losses."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compare.differences import (
    MISSING,
    differing_data,
    differing_environment,
    differing_options,
    differing_without_effect,
    equal_options,
)
from compare.labels import names
from compare.paired import Paired, compare_runs, t_quantile
from compare.read import Run, find_runs, read_run, restart_command
from compare.table import list_lines
from config import Config, DataError
from engine.run_directory.manifest import Manifest, render
from engine.run_directory.run_files import metrics_line, protected
from tests.compare.run_directories import (
    TOKENS_PER_STEP,
    add_checkpoint,
    change_environment,
    make_run,
    stamp,
)
from tests.conftest import ROOT
from tests.engine.faults import stand_in

FILES = ("config.yaml", "environment.json", "metrics.jsonl", ".lock", "checkpoint_300.json")


def read(path: Path, **options: Any) -> Run:
    return read_run(make_run(path, "run_a", **options))


def append(path: Path, *records: dict[str, Any]) -> None:
    with (path / "metrics.jsonl").open("ab") as file:
        file.writelines(map(metrics_line, records))
    os.utime(path / "metrics.jsonl", (1.7e9, 1.7e9))


def evaluation(step: int, losses: list[Any], rows: str = "r") -> dict[str, Any]:
    return stamp(step) | {"eval/val_loss": 2.0, "eval/val_losses": losses, "eval/rows": rows}


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    ready, begin = os.pipe()
    done, end = os.pipe()
    child = os.fork()
    if child == 0:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        os.write(begin, b"1")
        os.close(end)
        os.read(done, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield
    finally:
        os.close(end)
        os.waitpid(child, 0)
        for descriptor in (ready, begin, done):
            os.close(descriptor)


# ---- what is read


def test_a_run_is_read_from_its_files(tmp_path: Path) -> None:
    run = read(tmp_path, losses=(4.0, 2.5, 3.0), options=["learning_rate=3e-4"])
    assert (run.name, run.state, run.problems) == ("run_a", "done", ())
    assert (run.step, run.planned_steps, run.tokens) == (300, 300, 300 * TOKENS_PER_STEP)
    assert (run.best_loss, run.best_step, run.last_loss) == (2.5, 200, 3.0)
    assert (run.model, run.parameters, run.precision) == ("bdh", 25_300_000, "bf16, nf4 weights")
    assert run.bits_per_byte == pytest.approx(3.0 / 0.6931)
    assert run.tokens_per_sec == pytest.approx(81920, rel=0.1)
    assert run.seconds == 15.0
    assert run.config["training.learning_rate"] == 3e-4


@pytest.mark.parametrize("old", [False, True])
def test_the_config_is_that_of_the_reader_by_either_way(tmp_path: Path, old: bool) -> None:
    run = read(tmp_path, old=old, options=["n_layer=3", "optimizer.name=muon"])
    config = Config.from_yaml(run.path / "config.yaml").to_dict()
    assert run.config == {f"{s}.{o}": v for s, values in config.items() for o, v in values.items()}


def test_a_config_that_the_run_did_not_save_yields_to_its_copy(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a")
    place = path / "config.yaml"
    place.write_text(place.read_text().replace("n_layer: 6", "n_layer: 7"))
    run = read_run(path)
    assert run.config["model.n_layer"] == 6
    assert run.problems == (
        "config.yaml: not what the run saved; its copy in environment.json is used",
    )


def test_the_best_loss_of_an_older_run_is_found_in_all_of_its_file(tmp_path: Path) -> None:
    losses = [3.0 + (number - 7) ** 2 / 1e3 for number in range(400)]
    path = make_run(tmp_path, "run_a", losses=losses, old=True, every=10)
    assert (path / "metrics.jsonl").stat().st_size > 5 * 65536
    run = read_run(path)
    assert (run.best_loss, run.best_step) == (3.0, 80)


@pytest.mark.parametrize("lines", [10, 5000])
def test_an_evaluation_far_from_the_end_is_found(tmp_path: Path, lines: int) -> None:
    path = make_run(tmp_path, "run_a", losses=(4.0, 2.5), state=None)
    append(path, *(stamp(200 + n) | {"train/loss": n, "train/mfu": 0.5} for n in range(lines)))
    run = read_run(path)
    assert (run.last_loss, run.best_loss, run.step) == (2.5, 2.5, 199 + lines)
    assert (run.newest["train/loss"], run.newest["train/mfu"]) == (lines - 1, 0.5)


def test_the_newest_values_are_those_of_all_records(tmp_path: Path) -> None:
    run = read(tmp_path, losses=[4 - n / 50 for n in range(100)])
    newest = {key: value for record in run.records for key, value in record.items()}
    newest.pop("train/compile_s")  # only the first record has it
    assert run.newest == newest


def test_losses_that_are_null_are_no_best(tmp_path: Path) -> None:
    run = read(tmp_path, losses=(4.0, None), state="failed")
    assert (run.best_loss, run.best_step, run.last_loss) == (4.0, 100, None)


def test_planned_steps_of_older_runs_are_those_of_the_config(tmp_path: Path) -> None:
    known = read(tmp_path / "a", old=True, options=["max_iters=700"])
    by_epochs = read(tmp_path / "b", old=True, options=["epochs=2"])
    assert (known.planned_steps, by_epochs.planned_steps) == (700, None)


@pytest.mark.parametrize(
    ("ended", "saved", "step", "tokens", "seconds"),
    [
        ({"state": "stopped", "step": 34, "tokens": 512, "elapsed_s": 9.5}, 30, 34, 512, 9.5),
        ({"state": "stopped", "step": 34}, 30, 34, 34 * TOKENS_PER_STEP, 1.0),
        (None, 34, 34, 34 * TOKENS_PER_STEP, 1.0),  # killed after a checkpoint
        (None, 10, 20, 20 * TOKENS_PER_STEP, 1.0),  # killed after a record
        ({"state": "failed", "step": "x", "tokens": -1, "elapsed_s": None}, 34, 34, 34 * 4096, 1.0),
    ],
)
def test_a_run_got_as_far_as_it_says_at_its_end_not_as_its_newest_record(
    tmp_path: Path,
    ended: dict[str, Any] | None,
    saved: int,
    step: int,
    tokens: int,
    seconds: float,
) -> None:
    path = make_run(tmp_path, "run", losses=(3.0,), every=20, state=None)
    change_environment(path, ended=ended)
    for suffix in ("json", "pt"):
        (path / f"checkpoint_20.{suffix}").rename(path / f"checkpoint_{saved}.{suffix}")
    run = read_run(path)
    assert (run.step, run.tokens, run.seconds) == (step, tokens, seconds)
    assert list_lines([run])[1].split()[5].startswith(f"{step}/")


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        (["use_4bit=false"], "bf16"),
        (["use_4bit=false", "use_fp8=true"], "fp8"),
        (["compute_dtype=float32", "use_4bit_optimizer=true"], "float32, nf4 weights, 4-bit AdamW"),
        (["use_4bit=false", "optimizer.name=adamw_8bit"], "bf16, 8-bit AdamW"),
        (
            ["init_from=gpt2", "use_4bit=true", "quantization_type=fp4", "lora_rank=8"],
            "bf16, fp4 weights with LoRA",
        ),
    ],
)
def test_precision_is_told_in_words(tmp_path: Path, options: list[str], precision: str) -> None:
    assert read(tmp_path, options=options).precision == precision


def test_precision_is_what_it_computed_in_not_what_was_asked(tmp_path: Path) -> None:
    facts = {"precision": "float32"}
    run = read(tmp_path, options=["use_4bit=false"], environment={"run": facts})
    assert run.precision == "float32"


# ---- states


@pytest.mark.parametrize(
    ("state", "shown"), [("done", "done"), ("stopped", "stopped"), ("failed", "crashed")]
)
def test_a_run_is_in_the_state_it_wrote_down(tmp_path: Path, state: str, shown: str) -> None:
    run = read(tmp_path, state=state)
    assert run.state == shown
    assert bool(run.end_reason) == (state != "done")


def test_a_locked_run_is_running_whatever_it_says(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a")
    with locked_by_another_process(path / ".lock"):
        assert read_run(path).state == "running"
    assert read_run(path).state == "done"


def test_looking_at_a_lock_does_not_take_it(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a")
    with locked_by_another_process(path / ".lock"):
        read_run(path)
        descriptor = os.open(path / ".lock", os.O_RDWR)
        with pytest.raises(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_without_a_last_word_the_final_record_means_done(tmp_path: Path) -> None:
    assert read(tmp_path, old=True, state="done").state == "done"


def test_without_a_last_word_a_save_at_an_odd_step_means_stopped(tmp_path: Path) -> None:
    run = read(tmp_path, old=True, state=None, options=["checkpoint_freq=500"])
    assert run.state == "stopped"


def test_without_a_last_word_a_save_at_a_due_step_means_crashed(tmp_path: Path) -> None:
    run = read(tmp_path, old=True, state=None, options=["checkpoint_freq=100"])
    assert run.state == "crashed"


def test_records_after_the_newest_save_mean_crashed(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", state=None)
    append(path, stamp(310) | {"train/loss": 2.0})
    assert read_run(path).state == "crashed"


def test_fresh_records_of_another_machine_mean_running(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", state=None)
    (path / ".lock").write_text("host elsewhere pid 12 since 14:30 (2025-11-08)\n")
    assert read_run(path).state == "stopped"
    os.utime(path / "metrics.jsonl", (time.time() - 10,) * 2)
    assert read_run(path).state == "running"


def test_fresh_records_of_a_dead_process_of_this_machine_do_not(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", state=None)
    os.utime(path / "metrics.jsonl")
    assert read_run(path).state == "stopped"


# ---- damage and age


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("config.yaml", "config.yaml: missing; its copy in environment.json is used"),
        ("environment.json", "environment.json: missing"),
        ("metrics.jsonl", "metrics.jsonl: missing"),
    ],
)
def test_a_missing_file_is_named_and_the_rest_is_read(
    tmp_path: Path, missing: str, problem: str
) -> None:
    path = make_run(tmp_path, "run_a")
    (path / missing).unlink()
    run = read_run(path)
    assert run.problems == (problem,)
    assert run.step == 300


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "config.yaml",
            "config.yaml: not what the run saved; its copy in environment.json is used",
        ),
        ("environment.json", "environment.json: damaged, not a JSON object"),
        (
            "metrics.jsonl",
            "metrics.jsonl: cut short: 0 bytes, 5,398 were written; its last records are lost",
        ),
    ],
)
def test_an_empty_file_is_named(tmp_path: Path, name: str, problem: str) -> None:
    path, older = make_run(tmp_path, "run_a"), make_run(tmp_path, "run_b", old=True)
    (path / name).write_bytes(b"")
    (older / name).write_bytes(b"")
    (found,) = read_run(path).problems
    assert re.sub(r" \d,\d+ ", " 5,398 ", found) == problem
    reasons = {"config": "empty", "environment": "damaged, not a JSON object"}
    reason = reasons.get(name.partition(".")[0], "holds no whole record")
    assert read_run(older).problems == (f"{name}: {reason}",)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a")
    for name in FILES[:3]:
        (path / name).unlink()
        (path / name).mkdir()
    assert read_run(path).problems == tuple(
        f"{name}: Is a directory" for name in ("environment.json", "config.yaml", "metrics.jsonl")
    )


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
def test_nothing_waits_for_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = make_run(tmp_path, "run_a")
    for name in (*FILES[:3], ".lock"):
        stand_in(path / name, kind)
    assert read_run(path).problems == tuple(
        f"{name}: is not a regular file"
        for name in ("environment.json", "config.yaml", "metrics.jsonl")
    )


def test_a_last_line_that_is_cut_is_no_damage(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", state=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "train/lo')
    run = read_run(path)
    assert (run.step, run.problems, len(run.records)) == (300, (), 15)
    assert run.record_problems == ()


def test_broken_lines_are_left_out_and_named(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a")
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2:2] = [b"\x00\xff\n", b"[1]\n", b'{"step": "4"}\n', b"[" * 100_000 + b"\n"]
    (path / "metrics.jsonl").write_bytes(b"".join(lines))
    run = read_run(path)
    assert len(run.records) == 16
    assert run.record_problems == ("metrics.jsonl: left out 4 damaged lines (3, 4, 5, 6)",)


def test_nan_in_a_record_is_null(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", losses=())
    (path / "metrics.jsonl").write_text('{"step": 5, "train/loss": NaN, "eval/val_loss": 1e999}\n')
    run = read_run(path)
    assert run.newest["train/loss"] is None
    assert (run.last_loss, run.best_loss) == (None, None)


def test_records_of_other_keys_tell_their_step(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", losses=())
    append(path, {"step": 7, "loss": 2.0})
    run = read_run(path)
    assert (run.step, run.newest["loss"], run.problems) == (7, 2.0, ())


def test_a_reason_of_several_lines_is_one_line(tmp_path: Path) -> None:
    run = read(tmp_path, environment={"ended": {"state": "failed", "reason": "OSError: a\n b\n"}})
    assert (run.state, run.end_reason) == ("crashed", "OSError: a b")


def test_an_option_of_a_later_version_is_kept_and_named(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", options=["n_layer=3"], old=True)
    place = path / "config.yaml"
    place.write_text(place.read_text().replace("\nmodel:\n", "\nmodel:\n  warp: 9\n"))
    run = read_run(path)
    assert (run.config["model.n_layer"], run.config["model.warp"]) == (3, "9")
    first, second = run.problems
    assert first.startswith("config.yaml: taken option by option, because ")
    assert "model.warp: unknown option" in first
    assert second == "config.yaml: options unknown to this version: model.warp"


def test_a_value_of_a_later_version_is_kept_as_text(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", old=True)
    place = path / "config.yaml"
    place.write_text(place.read_text().replace("name: adamw ", "name: lion "))
    run = read_run(path)
    assert run.config["optimizer.name"] == "lion"
    assert "expected one of adamw" in run.problems[0]


def test_options_that_an_older_version_did_not_have_are_at_their_defaults(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a", old=True)
    (path / "config.yaml").write_text("model: {n_layer: 2}\ntraining: {lr: 3e-4}\n")
    run = read_run(path)
    assert run.config["training.learning_rate"] == 3e-4
    assert run.config["optimizer.beta2"] == 0.95
    assert run.problems == ()


def test_reading_says_nothing_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path, "run_a")
    (path / "config.yaml").write_text("training: {lr: 3e-4}\n")
    read_run(path)
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(DataError, match="is not a run directory: it holds no metrics.jsonl"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_no_damage_changes_what_is_known_of_a_run_in_silence(
    tmp_path: Path, name: str, damage: str
) -> None:
    path, draw = make_run(tmp_path, "run_a", sample="once"), random.Random(name + damage)
    whole, data = known_of(path), (path / name).read_bytes()
    silent = 0
    for _ in range(50):
        at = draw.randrange(len(data))
        changed = bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        (path / name).write_bytes(data[:at] + (changed if damage == "flip" else b""))
        run = read_run(path)
        if not (run.problems or run.record_problems):
            assert known_of(path) == whole, data[max(0, at - 20) : at + 20]
            silent += 1
    assert silent <= 8  # spaces between words, and the last line end


def known_of(path: Path) -> tuple[Any, ...]:
    run = read_run(path)
    results = run.state, run.newest, run.best_loss, run.best_step, run.step
    return *results, run.config, run.environment, run.records


def test_damaged_lines_are_named_and_those_after_them_are_read(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a")
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"step"', b'"stop"')
    lines[-2:] = [lines[-2].replace(b"\n", b" ") + lines[-1]]  # a line end is lost: two in one
    (path / "metrics.jsonl").write_bytes(b"".join(lines))
    run = read_run(path)
    assert run.problems == ("metrics.jsonl: left out 2 damaged lines (4, 15)",)
    assert len(run.records) == 13 and run.step == 300 and run.best_loss == 3.0


def test_records_of_earlier_versions_are_read_as_they_are(tmp_path: Path) -> None:
    new, old = make_run(tmp_path, "run_a"), make_run(tmp_path, "run_b", old=True)
    assert "crc" in json.loads((new / "metrics.jsonl").read_text().splitlines()[0])
    runs = read_run(new), read_run(old)
    assert all(not run.problems and not run.record_problems for run in runs)
    assert [r["step"] for r in runs[0].records] == [r["step"] for r in runs[1].records]
    assert not any("crc" in record for run in runs for record in (*run.records, run.newest))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(FILES),
    cut=st.floats(0, 1),
    junk=st.binary(max_size=60)
    | st.sampled_from([b"{}", b"[]", b"null", b'{"step": 1e400}', b"-"]),
    rest=st.booleans(),
    seed=st.integers(0, 3),
)
def test_no_damage_makes_a_run_unreadable(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    cut: float,
    junk: bytes,
    rest: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    path = make_run(folder, "run_a", old=bool(seed % 2), state=None if seed > 1 else "done")
    whole = make_run(folder, "run_b")
    data = (path / name).read_bytes()
    at = int(cut * len(data))
    (path / name).write_bytes(data[:at] + junk + (data[at:] if rest else b""))
    assert_readable(path, whole)
    shutil.rmtree(folder)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_value_of_another_type_makes_a_run_unreadable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    path, whole = make_run(folder, "run_a"), make_run(folder, "run_b")
    told = json.loads((path / "environment.json").read_text())
    key = data.draw(st.sampled_from([*told, "data"]))
    inside = isinstance(told[key], dict) and data.draw(st.booleans())
    place = told[key] if inside else told
    place[data.draw(st.sampled_from([*place])) if inside else key] = data.draw(VALUES)
    told.pop("checksum", None)
    (path / "environment.json").write_text(json.dumps(told))
    lines = (path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-2])
    record[data.draw(st.sampled_from([*record]))] = data.draw(VALUES)
    added = protected(json.dumps(record).encode()).decode()
    (path / "metrics.jsonl").write_text("\n".join([*lines, added]))
    assert_readable(path, whole)
    shutil.rmtree(folder)


def assert_readable(path: Path, whole: Path) -> None:
    run, other = read_run(path), read_run(whole)
    for thing in ("step", "planned_steps", "tokens", "last_loss", "bits_per_byte", "parameters"):
        value = getattr(run, thing)
        assert value is None or math.isfinite(value)
    assert run.state in ("done", "stopped", "crashed", "running")
    assert all(isinstance(word, str) for word in (run.model, run.precision, run.end_reason))
    assert all("\n" not in problem for problem in (*run.problems, *run.record_problems))
    assert restart_command(run).startswith("python ") or "torchrun" in restart_command(run)
    assert isinstance(run.records, list)
    for pair in ((run, other), (other, run)):
        assert isinstance(compare_runs(*pair), (Paired, str))
        for table in (differing_options, differing_environment, differing_data):
            assert all(len(row) == 2 for row in table(pair).values())


# ---- which runs


def test_a_folder_stands_for_the_runs_in_it_and_its_folders(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, "run_b"), make_run(tmp_path, "run_c")]
    inner = make_run(tmp_path / "another", "run_a")
    make_run(tmp_path / ".hidden", "run_x")
    (tmp_path / "notes.txt").write_text("")
    assert find_runs([tmp_path]) == [inner, *paths]


def test_what_a_run_abandoned_is_no_run_of_its_folder(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a")
    inside = make_run(path, "abandoned_after_100")
    assert find_runs([tmp_path]) == [path]
    assert find_runs([inside]) == [inside]


def test_a_run_is_found_once_and_by_a_file_of_it(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_a")
    assert find_runs([path / "checkpoint_300.pt", path, tmp_path]) == [path]


def test_a_file_beside_runs_is_none_of_them(tmp_path: Path) -> None:
    make_run(tmp_path, "run_a")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match="notes.txt: no such run"):
        find_runs([tmp_path / "notes.txt"])


def test_without_paths_the_runs_are_those_in_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "checkpoints", "run_a")
    assert find_runs() == [Path("checkpoints/run_a")]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no runs"):
        find_runs([tmp_path])
    with pytest.raises(DataError, match="nowhere: no such run"):
        find_runs([tmp_path / "nowhere"])


def test_runs_of_one_name_are_labelled_by_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [make_run(tmp_path / folder, name) for folder, name in ("aa", "ba", "ab")]
    assert names([read_run(path) for path in paths]) == ["a/a", "b/a", "b"]


# ---- the command that makes it again


def test_the_restart_command_is_the_first_one_quoted(tmp_path: Path) -> None:
    again = restart_command(read(tmp_path))
    assert again == "python train.py --config 'my experiment.yaml' learning_rate=1e-3"


def test_a_run_of_several_processes_restarts_under_torchrun(tmp_path: Path) -> None:
    run = read(tmp_path, environment={"run": {"processes": 4}})
    assert restart_command(run).startswith("torchrun --standalone --nproc_per_node=4 train.py ")


@pytest.mark.parametrize("command", [None, [], ["-c"], [1], "train.py"])
def test_without_a_command_the_saved_config_starts_it(tmp_path: Path, command: Any) -> None:
    run = read(tmp_path / "my runs", environment={"command": command})
    assert restart_command(run) == f"python train.py --config '{run.path}/config.yaml'"


# ---- differences


def test_only_options_that_differ_are_told(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path, "run_a", options=["n_layer=3"]),
        make_run(tmp_path, "run_b", options=["n_layer=4", "wandb_run_name=x"], old=True),
    ]
    runs = [read_run(path) for path in paths]
    assert differing_options(runs) == {"model.n_layer": [3, 4]}
    assert differing_without_effect(runs) == {"logging.wandb_run_name": [None, "x"]}
    assert equal_options(runs) == len(runs[0].config) - 2


def test_an_option_that_one_version_lacks_is_missing_there(tmp_path: Path) -> None:
    path, other = make_run(tmp_path, "run_a", old=True), make_run(tmp_path, "run_b")
    with (path / "config.yaml").open("a") as file:
        file.write("later:\n  warp: 9\n")
    assert differing_options([read_run(path), read_run(other)]) == {"later.warp": ["9", MISSING]}


def test_a_run_without_a_config_differs_in_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run_c")
    (path / "config.yaml").unlink()
    runs = [read_run(make_run(tmp_path, "run_a")), read_run(path)]
    assert differing_options(runs) == {}
    assert equal_options(runs) == len(runs[0].config)


def test_the_environment_is_that_of_the_newest_session(tmp_path: Path) -> None:
    path, other = make_run(tmp_path, "run_a"), make_run(tmp_path, "run_b")
    change_environment(path, resumed=[{"step": 3, "torch": "3.0", "time": "later"}])
    change_environment(other, command=["train.py"])
    runs = [read_run(path), read_run(other)]
    assert differing_environment(runs) == {"torch": ["3.0", "2.6.0"]}


def test_what_one_environment_does_not_tell_is_no_difference(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, "run_a")), read_run(make_run(tmp_path, "run_b", old=True))]
    assert differing_environment(runs) == {}


def test_other_data_is_told_by_fingerprint_and_ledger(tmp_path: Path) -> None:
    path, other = make_run(tmp_path, "run_a"), make_run(tmp_path, "run_b")
    data = {"fingerprint": "beef", "lines": ["Data: 3 files, 240 documents", "Split: 5 %"]}
    change_environment(other, data=data)
    assert differing_data([read_run(path), read_run(other)]) == {
        "fingerprint": ["f00d", "beef"],
        "ledger": [[], ["Split: 5 %"]],
    }


def test_the_fingerprint_of_an_older_run_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    path, other = make_run(tmp_path, "run_a", old=True), make_run(tmp_path, "run_b")
    manifest = Manifest(
        step=300, tokens=1, loss=None, val_loss=None, fingerprint="cafe", size=0, sha256="", time=""
    )
    (path / "checkpoint_300.json").write_text(render(manifest))
    add_checkpoint(path, 400)  # whose manifest is damaged
    found = differing_data([read_run(path), read_run(other)])
    assert found == {"fingerprint": ["cafe", "f00d"]}


# ---- paired comparison


@pytest.mark.parametrize(
    ("freedom", "confidence", "t"),
    [  # from printed tables
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (4, 0.95, 2.776),
        (5, 0.99, 4.032),
        (9, 0.95, 2.262),
        (10, 0.90, 1.812),
        (30, 0.95, 2.042),
        (49, 0.95, 2.010),
        (100, 0.99, 2.626),
        (100_000, 0.95, 1.960),
    ],
)
def test_the_quantile_is_that_of_the_table(freedom: int, confidence: float, t: float) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(t, abs=6e-4)


def two_runs(tmp_path: Path, losses_a: list[Any], losses_b: list[Any]) -> tuple[Run, Run]:
    runs = []
    for name, losses in (("run_a", losses_a), ("run_b", losses_b)):
        path = make_run(tmp_path, name, losses=())
        append(path, evaluation(100, losses))
        runs.append(read_run(path))
    return runs[0], runs[1]


def test_the_interval_is_that_of_a_textbook(tmp_path: Path) -> None:
    # Differences 1, 2, 3, 4, 5: mean 3, standard error sqrt(2.5 / 5), t(0.975, 4) = 2.7764.
    a, b = two_runs(tmp_path, [0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    pair = compare_runs(a, b)
    assert isinstance(pair, Paired)
    margin = 2.776445 * math.sqrt(0.5)
    expected = (3.0, 3.0 - margin, 3.0 + margin)
    assert (pair.difference, pair.low, pair.high) == pytest.approx(expected, rel=1e-6)
    assert (pair.batches, pair.step_a, pair.step_b, pair.verdict) == (5, 100, 100, "worse")


def test_the_comparison_turns_around_with_the_runs(tmp_path: Path) -> None:
    a = read_run(make_run(tmp_path, "run_a", losses=(4.0, 2.5)))
    b = read_run(make_run(tmp_path, "run_b", losses=(4.0, 2.4), seed=1))
    one, other = compare_runs(a, b), compare_runs(b, a)
    assert isinstance(one, Paired) and isinstance(other, Paired)
    assert (one.difference, one.low) == pytest.approx((-other.difference, -other.high))
    assert (one.verdict, other.verdict) == ("better", "worse")
    assert one.difference == pytest.approx(-0.1)


def test_noise_alone_shows_a_difference_one_time_in_twenty(tmp_path: Path) -> None:
    draw, shown = random.Random(1), 0
    a, b = two_runs(tmp_path, [1.0] * 5, [1.0] * 5)
    for _ in range(1000):
        hard = [draw.gauss(3, 1) for _ in range(8)]
        for run in (a, b):
            run.records[-1]["eval/val_losses"] = [loss + draw.gauss(0, 0.1) for loss in hard]
        pair = compare_runs(a, b)
        assert isinstance(pair, Paired)
        shown += pair.verdict != "no difference shown"
    assert 30 <= shown <= 72


def test_a_run_is_equal_to_itself(tmp_path: Path) -> None:
    run = read(tmp_path)
    pair = compare_runs(run, run)
    assert isinstance(pair, Paired)
    assert asdict(pair) | {"batches": 8} == asdict(Paired(0.0, 0.0, 0.0, 8, 300, 300))
    assert pair.verdict == "equal"


def test_runs_of_other_length_compare_at_the_end_at_a_shared_step_and_at_their_best(
    tmp_path: Path,
) -> None:
    a = read_run(make_run(tmp_path, "run_a", losses=(4.0, 2.0, 3.0)))
    b = read_run(make_run(tmp_path, "run_b", losses=(4.0, 2.5)))
    pairs = [compare_runs(a, b, at) for at in ("newest", "same step", "best")]
    steps = [(pair.step_a, pair.step_b) for pair in pairs if isinstance(pair, Paired)]
    assert steps == [(300, 200), (200, 200), (200, 200)]


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        ({"losses": ()}, {}, "run_a has no evaluation"),
        ({}, {"old": True}, "run_b has no loss of each batch: its version did not store them"),
        ({}, {"losses": (3.0, None)}, "run_b has batches whose loss is not a number (step 200)"),
        ({}, {"batches": 9}, "they were evaluated in 8 and 9 batches"),
        (
            {"batches": 4},
            {"batches": 4},
            "4 held-out batches are too few for an interval: it takes 5",
        ),
        ({}, {"rows": "beef"}, "they were evaluated on different held-out text"),
        (
            {},
            {"rows": "beef", "options": ["block_size=256", "batch_size=16"]},
            "different held-out text: they differ in training.block_size, training.batch_size",
        ),
        (
            {},
            {"rows": "beef", "options": ["tokenizer.name=char"], "losses": (3.0, 2.0)},
            "tokenizer.name. Over tokenizers bits per byte compare: 3.6070 and 2.8856",
        ),
    ],
)
def test_why_runs_cannot_be_paired_is_told(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], reason: str
) -> None:
    a, b = (read_run(make_run(tmp_path, n, **o)) for n, o in (("run_a", one), ("run_b", other)))
    told = compare_runs(a, b)
    assert isinstance(told, str)
    assert reason in told


def test_runs_without_a_shared_step_say_so(tmp_path: Path) -> None:
    a = read_run(make_run(tmp_path, "run_a", every=100))
    b = read_run(make_run(tmp_path, "run_b", every=64))
    assert compare_runs(a, b, "same step") == "there is no step at which both were evaluated"


def test_the_room_imports_no_torch() -> None:
    slow = "{'torch', 'numpy', 'plotly', 'matplotlib'}"
    code = f"import sys, runs; sys.exit(' '.join({slow} & {{*sys.modules}}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stderr.strip(), done.returncode) == ("", 0)
