"""What is told while a run goes on: its pace, the time left, the live line of a terminal."""

from __future__ import annotations

import os
import pty
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sample
from engine.monitor import console
from engine.monitor.progress import Pace
from engine.train_state import due, times_due
from settings.terminal import printable
from tests.runs import become_script, metrics, only_run, run_here, run_main


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20))
def test_what_is_due_later_is_counted_with_the_end(step: int, end: int, every: int) -> None:
    later = [s for s in range(step + 1, end + 1) if due(s, every) or s == end]
    assert times_due(step, end, every) == len(later)
    assert times_due(step, end, None) == 0


def test_a_log_line_has_the_mean_of_its_own_steps() -> None:
    pace = Pace()
    pace.step(3.0, 1.5)
    assert pace.take() == (3.0, 0.5)
    pace.step(1.0, 0.0)
    pace.step(2.0, 0.6)
    assert pace.take() == pytest.approx((1.5, 0.2))


def test_the_time_left_counts_evaluations_and_saves_and_not_the_first_step() -> None:
    pace = Pace()
    pace.step(30.0, 0.0)  # starts up
    assert pace.left(10, 0, 0, 0.0) == 300.0
    pace.step(1.0, 0.0)
    pace.step(2.0, 0.0)
    assert pace.left(10, 0, 0, 0.0) == 15.0
    assert pace.left(10, 2, 0, evaluation_steps=4.0) == 15.0 + 2 * 4 * 1.5  # not yet measured
    pace.evaluations.add(7.0)
    pace.saves.add(0.5)
    assert pace.left(10, 2, 4, evaluation_steps=4.0) == 15.0 + 14.0 + 2.0


def test_lines_go_where_the_terminal_wants_them_and_back_to_plain(
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept: list[str] = []
    with console.redirected(kept.append):
        console.info("one", "two")
        console.warning("to standard error, which is no terminal here")
    console.info("three")
    assert kept == ["one", "two"]
    told = capsys.readouterr()
    assert (told.out, told.err) == ("three\n", "to standard error, which is no terminal here\n")


def test_the_time_of_a_run_is_told_once_after_some_seconds_of_steps() -> None:
    pace = Pace()
    told = []
    for seconds in (60.0, 2.0, 2.0, 2.0, 2.0):  # the first step starts caches and threads
        pace.step(seconds, 0.0)
        told.append(pace.has_become_known())
    assert told == [False, False, False, True, False]


def on_a_terminal(arguments: list[str], kind: str = "xterm") -> str:
    """What `train.py` writes to a terminal."""
    ours, theirs = pty.openpty()
    child = os.fork()
    if child == 0:
        os.close(ours)
        become_script(theirs, arguments, lambda: os.environ.update(TERM=kind, COLUMNS="120"))
    os.close(theirs)
    written = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the child has gone
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return written.decode()


@pytest.mark.slow
def test_a_terminal_shows_a_live_line_below_the_same_plain_lines(
    tiny: list[str], tmp_path: Path
) -> None:
    words = ["max_iters=150", "test_freq=null", "checkpoint_freq=null", "log_freq=50"]
    arguments = [*tiny, f"checkpoint_dir={tmp_path / 'runs'}", *words]
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_a_terminal(arguments))
    assert re.search(r"\d+/150 .* left  loss \d\.\d{4}  [\d,]+ tokens/s", shown)
    lines = shown.replace("\r", "\n").split("\n")
    steps = [line.split("|")[0].strip() for line in lines if line.startswith("Iter ")]
    assert steps == [f"Iter {step:>6}" for step in (1, *range(50, 151, 50))]
    assert not [line for line in lines if line.startswith("Iter ") and "ETA" not in line]


@pytest.mark.slow
def test_a_terminal_that_cannot_redraw_gets_plain_lines_alone(
    tiny: list[str], tmp_path: Path
) -> None:
    shown = on_a_terminal([*tiny, f"checkpoint_dir={tmp_path / 'runs'}"], kind="dumb")
    assert "\x1b" not in shown and "left" not in shown and "Iter     30" in shown


@pytest.mark.slow
def test_a_pipe_gets_no_live_line(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here([*tiny, f"checkpoint_dir={tmp_path / 'runs'}"]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and "\r" not in told and "tokens/s " not in told


@pytest.mark.slow
def test_a_sample_at_each_evaluation_is_recorded_and_changes_no_step(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("with", ["sample_prompt=the ", "sample_tokens=12"]), ("without", [])):
        assert run_here([*tiny, f"checkpoint_dir={tmp_path / name}", *options]) == 0
    told = capsys.readouterr().out
    one, other = (metrics(only_run(tmp_path / name)) for name in ("with", "without"))
    samples = [record.pop("eval/sample") for record in one if "eval/val_loss" in record]
    assert one == other
    assert len(samples) == 3 and all(text.startswith("the ") for text in samples)
    assert len(samples[-1].encode()) <= len("the ") + 3 * 12  # a byte that is no character: U+FFFD
    assert f"Sample:\n  {printable(samples[0].splitlines()[0])}" in told


@pytest.mark.slow
def test_the_sample_is_what_sample_py_writes(tiny: list[str], tmp_path: Path) -> None:
    options = ["sample_prompt=dragon", "sample_tokens=20", "seed=5"]
    assert run_here([*tiny, f"checkpoint_dir={tmp_path / 'runs'}", *options]) == 0
    run = only_run(tmp_path / "runs")
    (last,) = (r["eval/sample"] for r in metrics(run) if r["step"] == 30 and "eval/sample" in r)
    words = ["--prompt", "dragon", "--max-new-tokens", "20", "--temperature", "0.8", "--seed", "5"]
    assert run_main(sample.main, os.fspath(run), *words).stdout == f"{last}\n"


@pytest.mark.slow
def test_a_run_in_8_bits_writes_samples_too(tiny: list[str], tmp_path: Path) -> None:
    sizes = ["n_embd=32", "mlp_internal_dim_multiplier=16", "use_fp8=true", "max_iters=10"]
    options = ["sample_prompt=the", "sample_tokens=5", f"checkpoint_dir={tmp_path / 'runs'}"]
    assert run_here([*tiny, *sizes, *options]) == 0
    (record,) = (r for r in metrics(only_run(tmp_path / "runs")) if "eval/sample" in r)
    assert record["eval/sample"].startswith("the")


def test_a_prompt_that_has_no_tokens_is_refused_at_the_start(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["tokenizer.name=char", "sample_prompt=§", f"checkpoint_dir={tmp_path / 'runs'}"]
    assert run_here([*tiny, *options]) == 3
    assert capsys.readouterr().err.startswith("training.sample_prompt: ")
    assert not (tmp_path / "runs").exists()
