"""Run directories as they are read: values, states, damage, other versions."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compare.differences import differing_data, differing_environment, differing_options
from compare.labels import names
from compare.reading.run import Run, find_runs, read_run, restart_command
from compare.statistics.comparison import Comparison
from compare.statistics.paired import compare_runs
from compare.tables.table import list_lines
from config import Config, DataError
from engine.run_directory.metrics_file import protected
from settings.entries import flat_options
from tests.compare.run_directories import (
    TOKENS_PER_STEP,
    append,
    change_environment,
    locked_by_another_process,
    make,
    make_run,
    stamp,
)
from tests.conftest import ROOT
from tests.engine.faults import stand_in

READ = ("environment.json", "config.yaml", "metrics.jsonl")
FILES = (*READ, ".lock", "checkpoint_300.json")


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


# ---- values


def test_a_run_is_read_from_its_files() -> None:
    run = make("run_a", "learning_rate=3e-4", losses=(4.0, 2.5, 3.0))
    assert (run.name, run.state, run.problems) == ("run_a", "done", ())
    assert (run.step, run.planned_steps, run.tokens) == (300, 300, 300 * TOKENS_PER_STEP)
    assert (run.best_loss, run.best_step, run.last_loss) == (2.5, 200, 3.0)
    assert (run.model, run.parameters, run.precision) == ("bdh", 25_300_000, "bf16, nf4 weights")
    assert run.bits_per_byte == pytest.approx(3.0 / 0.6931)
    assert run.tokens_per_sec == pytest.approx(81920, rel=0.1)
    assert (run.seconds, run.config["training.learning_rate"]) == (15.0, 3e-4)


@pytest.mark.parametrize("old", [False, True])
def test_the_config_is_that_of_the_reader_whether_it_is_read_from_its_copy_or_not(
    old: bool,
) -> None:
    run = make("run_a", "n_layer=3", "optimizer.name=muon", old=old)
    config = Config.from_yaml(run.path / "config.yaml").to_dict()
    assert run.config == flat_options(config)


def test_a_config_that_was_edited_yields_to_the_copy_of_what_the_run_saved() -> None:
    path = make_run()
    change(path / "config.yaml", "n_layer: 6", "n_layer: 7")
    run = read_run(path)
    assert run.config["model.n_layer"] == 6
    assert run.problems == (
        "config.yaml: not what the run saved; its copy in environment.json is used",
    )


def test_the_best_loss_of_an_older_run_is_found_in_all_of_its_file() -> None:
    losses = [3.0 + (number - 7) ** 2 / 1e3 for number in range(400)]
    run = make(losses=losses, old=True, every=10)
    assert (run.path / "metrics.jsonl").stat().st_size > 5 * 65536
    assert (run.best_loss, run.best_step) == (3.0, 80)


@pytest.mark.parametrize("lines", [10, 5000])
def test_an_evaluation_far_from_the_end_is_found(lines: int) -> None:
    path = make_run(losses=(4.0, 2.5), state=None)
    append(path, *(stamp(200 + n) | {"train/loss": n, "train/mfu": 0.5} for n in range(lines)))
    run = read_run(path)
    assert (run.last_loss, run.best_loss, run.step) == (2.5, 2.5, 199 + lines)
    assert (run.newest["train/loss"], run.newest["train/mfu"]) == (lines - 1, 0.5)


def test_the_newest_values_are_those_of_all_records() -> None:
    run = make(losses=[4 - n / 50 for n in range(100)])
    newest = {key: value for record in run.records for key, value in record.items()}
    newest.pop("train/compile_s")  # only the first record has it
    assert run.newest == newest


def test_a_loss_that_is_null_is_not_the_best() -> None:
    run = make(losses=(4.0, None), state="failed")
    assert (run.best_loss, run.best_step, run.last_loss) == (4.0, 100, None)


def test_planned_steps_of_older_runs_are_those_of_the_config() -> None:
    assert make("run_a", "max_iters=700", old=True).planned_steps == 700
    assert make("run_b", "epochs=2", old=True).planned_steps is None


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
def test_progress_is_what_the_run_wrote_at_its_end_or_else_its_newest_checkpoint_or_record(
    ended: dict[str, Any] | None, saved: int, step: int, tokens: int, seconds: float
) -> None:
    path = make_run(losses=(3.0,), every=20, state=None)
    change_environment(path, ended=ended)
    for suffix in ("json", "pt"):
        (path / f"checkpoint_20.{suffix}").rename(path / f"checkpoint_{saved}.{suffix}")
    run = read_run(path)
    assert (run.step, run.tokens, run.seconds) == (step, tokens, seconds)
    assert list_lines([run])[1].split()[5].startswith(f"{step}/")


def test_precision_is_named_after_formats_of_computation_weights_and_optimizer() -> None:
    cases = {
        "use_4bit=false": "bf16",
        "use_4bit=false use_fp8=true": "fp8",
        "compute_dtype=float32 use_4bit_optimizer=true": "float32, nf4 weights, 4-bit AdamW",
        "use_4bit=false optimizer.name=adamw_8bit": "bf16, 8-bit AdamW",
        "init_from=gpt2 use_4bit=true quantization_type=fp4 lora_rank=8": "bf16, fp4 weights with "
        "LoRA",
    }
    for number, (options, precision) in enumerate(cases.items()):
        assert make(f"run_{number}", *options.split()).precision == precision
    computed = {"run": {"precision": "float32"}}  # on a device without bfloat16
    assert make("run_a", "use_4bit=false", environment=computed).precision == "float32"


# ---- states


@pytest.mark.parametrize(
    ("state", "shown", "reason"),
    [
        ("done", "done", ""),
        ("stopped", "stopped", "SIGINT"),
        ("failed", "crashed", "NonFiniteError: the loss is NaN"),
    ],
)
def test_a_run_is_in_the_state_that_it_wrote_unless_it_is_locked(
    state: str, shown: str, reason: str
) -> None:
    run = make(state=state)
    assert (run.state, run.end_reason) == (shown, reason)
    with locked_by_another_process(run.path / ".lock"):
        assert read_run(run.path).state == "running"
        descriptor = os.open(run.path / ".lock", os.O_RDWR)
        with pytest.raises(OSError):  # looking at the lock did not take it
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    assert read_run(run.path).state == shown


def test_the_state_of_older_runs_is_guessed_from_records_and_checkpoints() -> None:
    assert make("run_a", old=True).state == "done"  # by its final record
    assert make("run_b", "checkpoint_freq=500", old=True, state=None).state == "stopped"
    assert make("run_c", "checkpoint_freq=100", old=True, state=None).state == "crashed"
    path = make_run("run_d", state=None)
    append(path, stamp(310) | {"train/loss": 2.0})  # after the newest checkpoint
    assert read_run(path).state == "crashed"


def test_a_recent_record_means_running_unless_the_process_was_on_this_machine() -> None:
    path = make_run(state=None)
    os.utime(path / "metrics.jsonl")
    assert read_run(path).state == "stopped"  # else its lock would be held
    (path / ".lock").write_text("host elsewhere pid 12 since 14:30 (2025-11-08)\n")
    os.utime(path / "metrics.jsonl", (time.time() - 10,) * 2)
    assert read_run(path).state == "running"
    os.utime(path / "metrics.jsonl", (1.7e9, 1.7e9))
    assert read_run(path).state == "stopped"


# ---- damage and other versions


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def replace_by(kind: str) -> Callable[[Path], None]:
    return lambda file: stand_in(file, kind)


CUT = "cut short: 0 bytes, 5,398 were written; its last records are lost"
USED = "; its copy in environment.json is used"
NO_OBJECT = "damaged, not a JSON object"


@pytest.mark.parametrize(
    ("damage", "old", "environment", "config", "metrics"),
    [
        (remove, False, "missing", f"missing{USED}", "missing"),
        (remove, True, "missing", "missing", "missing"),
        (empty, False, NO_OBJECT, f"not what the run saved{USED}", CUT),
        (empty, True, NO_OBJECT, "empty", "holds no whole record"),
        *(
            (replace_by(kind), False, problem, problem + USED, problem)
            for kind, problem in (
                ("folder", "Is a directory"),
                ("fifo", "is not a regular file"),
                ("/dev/zero", "is not a regular file"),
            )
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_read(
    damage: Callable[[Path], None], old: bool, environment: str, config: str, metrics: str
) -> None:
    for name, problem in zip(READ, (environment, config, metrics), strict=True):
        path = make_run(f"run_{name}", old=old)
        damage(path / name)
        run = read_run(path)
        assert [re.sub(r" \d,\d+ ", " 5,398 ", found) for found in run.problems] == [
            f"{name}: {problem}"
        ]
        assert run.step == 300


def test_a_lock_that_is_no_file_is_not_waited_for() -> None:
    path = make_run()
    stand_in(path / ".lock", "fifo")
    assert read_run(path).state == "done"


def test_a_last_line_that_is_half_written_is_no_damage() -> None:
    path = make_run(state=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "train/lo')
    run = read_run(path)
    assert (run.step, run.problems, len(run.records)) == (300, (), 15)
    assert run.record_problems == ()


def test_damaged_lines_are_named_and_those_after_them_are_read() -> None:
    path = make_run()
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    added = [b"\x00\xff\n", b"[1]\n", b'{"step": "4"}\n', b"[" * 100_000 + b"\n"]
    (path / "metrics.jsonl").write_bytes(b"".join([*lines[:2], *added, *lines[2:]]))
    run = read_run(path)
    assert len(run.records) == 16
    assert run.record_problems == ("metrics.jsonl: left out 4 damaged lines (3, 4, 5, 6)",)
    lines[3] = lines[3].replace(b'"step"', b'"stop"')
    lines[-2:] = [lines[-2].replace(b"\n", b" ") + lines[-1]]  # without the line end in between
    (path / "metrics.jsonl").write_bytes(b"".join(lines))
    run = read_run(path)
    assert run.problems == ("metrics.jsonl: left out 2 damaged lines (4, 15)",)
    assert len(run.records) == 13 and run.step == 300 and run.best_loss == 3.0


def test_values_that_no_run_writes_are_unknown() -> None:
    path = make_run(losses=(), environment={"ended": {"state": "failed", "reason": "a\n b\n"}})
    (path / "metrics.jsonl").write_text('{"step": 5, "train/loss": NaN, "eval/val_loss": 1e999}\n')
    run = read_run(path)
    assert (run.state, run.end_reason) == ("crashed", "a b")
    assert (run.newest["train/loss"], run.last_loss, run.best_loss) == (None, None, None)
    (path / "metrics.jsonl").write_bytes(b"")
    append(path, {"step": 7, "loss": 2.0})
    assert (read_run(path).step, read_run(path).newest["loss"]) == (7, 2.0)


def test_records_without_checksums_are_read_as_they_are() -> None:
    new, old = make("run_a"), make("run_b", old=True)
    assert "crc" in json.loads((new.path / "metrics.jsonl").read_text().splitlines()[0])
    assert [record["step"] for record in new.records] == [record["step"] for record in old.records]
    for run in (new, old):
        assert not run.problems and not run.record_problems
        assert not any("crc" in record for record in (*run.records, run.newest))


def test_options_and_values_of_other_versions_are_kept_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_run("run_a", "n_layer=3", old=True)
    change(path / "config.yaml", "\nmodel:\n", "\nmodel:\n  warp: 9\n")
    run = read_run(path)
    assert (run.config["model.n_layer"], run.config["model.warp"]) == (3, "9")
    assert re.match(
        r"config.yaml: taken option by option, because .*model.warp: unknown option",
        run.problems[0],
    )
    assert run.problems[1] == "config.yaml: options unknown to this version: model.warp"
    path = make_run("run_b", old=True)
    change(path / "config.yaml", "name: adamw ", "name: lion ")
    run = read_run(path)
    assert run.config["optimizer.name"] == "lion"
    assert "expected one of adamw" in run.problems[0]
    (path / "config.yaml").write_text("model: {n_layer: 2}\ntraining: {lr: 3e-4}\n")
    run = read_run(path)  # without options that came later, which have their defaults
    assert (run.config["training.learning_rate"], run.config["optimizer.beta2"]) == (3e-4, 0.95)
    assert run.problems == ()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_no_damage_changes_what_is_known_of_a_run_in_silence(name: str) -> None:
    path, draw = make_run(sample="once"), random.Random(name)
    whole, data = known_of(path), (path / name).read_bytes()
    silent = 0
    for number in range(100):
        at = draw.randrange(len(data))
        flipped = bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        (path / name).write_bytes(data[:at] + (flipped if number % 2 else b""))
        run = read_run(path)
        if not (run.problems or run.record_problems):
            assert known_of(path) == whole, data[max(0, at - 20) : at + 20]
            silent += 1
    assert silent <= 16  # spaces between words, and the last line end


def known_of(path: Path) -> tuple[Any, ...]:
    run = read_run(path)
    results = run.state, run.newest, run.best_loss, run.best_step, run.step
    return *results, run.config, run.environment, run.records


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
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
    path = make_run(folder=folder, old=bool(seed % 2), state=None if seed > 1 else "done")
    data = (path / name).read_bytes()
    at = int(cut * len(data))
    (path / name).write_bytes(data[:at] + junk + (data[at:] if rest else b""))
    assert_readable(path, make_run("run_b", folder=folder))
    shutil.rmtree(folder)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_value_of_another_type_makes_a_run_unreadable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    path = make_run(folder=folder)
    values = json.loads((path / "environment.json").read_text())
    del values["checksum"]
    key = data.draw(st.sampled_from([*values, "data"]))
    inside = isinstance(values[key], dict) and data.draw(st.booleans())
    changed = values[key] if inside else values
    changed[data.draw(st.sampled_from([*changed])) if inside else key] = data.draw(VALUES)
    (path / "environment.json").write_text(json.dumps(values))
    lines = (path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-2])
    record[data.draw(st.sampled_from([*record]))] = data.draw(VALUES)
    added = protected(json.dumps(record).encode()).decode()
    (path / "metrics.jsonl").write_text("\n".join([*lines, added]))
    assert_readable(path, make_run("run_b", folder=folder))
    shutil.rmtree(folder)


def assert_readable(path: Path, whole: Path) -> None:
    run, other = read_run(path), read_run(whole)
    for value in (run.step, run.planned_steps, run.tokens, run.last_loss, run.parameters):
        assert value is None or math.isfinite(value)
    assert run.state in ("done", "stopped", "crashed", "running")
    assert all(isinstance(word, str) for word in (run.model, run.precision, run.end_reason))
    assert all("\n" not in problem for problem in (*run.problems, *run.record_problems))
    assert restart_command(run).startswith("python ") or "torchrun" in restart_command(run)
    assert isinstance(run.records, list)
    for pair in ((run, other), (other, run)):
        assert isinstance(compare_runs(*pair), (Comparison, str))
        for table in (differing_options, differing_environment, differing_data):
            assert all(len(row) == 2 for row in table(pair).values())


# ---- which runs, and the command that repeats one


def test_a_folder_stands_for_the_runs_in_it_and_its_folders(here: Path) -> None:
    paths = [make_run("run_b", folder=here), make_run("run_c", folder=here)]
    inner = make_run("run_a", folder=here / "another")
    make_run("run_x", folder=here / ".hidden")
    abandoned = make_run("abandoned_after_100", folder=paths[0])
    assert find_runs([here]) == [inner, *paths]
    assert find_runs([abandoned]) == [abandoned]
    assert find_runs([paths[0] / "checkpoint_300.pt", *paths, here]) == [*paths, inner]


def test_what_is_no_run_is_refused(here: Path) -> None:
    assert find_runs([make_run().parent]) == find_runs() == [Path("checkpoints/run_a")]
    (here / "notes.txt").write_text("")
    (here / "empty").mkdir()
    for name, message in (
        ("notes.txt", "no such run"),
        ("nowhere", "no such run"),
        ("empty", "holds no runs"),
    ):
        with pytest.raises(DataError, match=message):
            find_runs([here / name])
    with pytest.raises(DataError, match="is not a run directory: it holds no metrics.jsonl"):
        read_run(here / "empty")


def test_runs_of_one_name_are_named_by_their_paths() -> None:
    places = (("a", "a"), ("b", "a"), ("a", "b"))
    runs = [make(name, folder=Path(folder)) for folder, name in places]
    assert names(runs) == ["a/a", "b/a", "b"]


def test_the_restart_command_is_the_first_one_quoted() -> None:
    command = "train.py --config 'my experiment.yaml' learning_rate=1e-3"
    assert restart_command(make("run_a")) == f"python {command}"
    several = make("run_b", environment={"run": {"processes": 4}})
    assert restart_command(several) == f"torchrun --standalone --nproc_per_node=4 {command}"


@pytest.mark.parametrize("command", [None, [], ["-c"], [1], "train.py"])
def test_a_run_whose_command_is_unknown_is_repeated_from_its_config(command: Any) -> None:
    run: Run = make(folder=Path("my runs"), environment={"command": command})
    assert restart_command(run) == "python train.py --config 'my runs/run_a/config.yaml'"


@pytest.mark.slow
def test_runs_py_imports_nothing_slow() -> None:
    slow = "{'torch', 'numpy', 'pyarrow', 'plotly', 'matplotlib', 'importlib.metadata'}"
    code = f"import sys, runs; sys.exit(' '.join({slow} & {{*sys.modules}}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stderr.strip(), done.returncode) == ("", 0)
