"""`train.py` as a user meets it: what it prints, what it leaves on disk, how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import sample
from config import Config, ConfigError, DataError
from data import StepBatch, TrainLoader
from engine.checkpoint.trained_model import load_model
from tests.conftest import ROOT, TINY, write_corpus
from tests.runs import assert_same_run, metrics, only_run, run_here, run_main, start

pytestmark = pytest.mark.slow


class Tiny:
    """Trains the tiny config in one folder."""

    def __init__(self, config: str, folder: Path) -> None:
        self.config, self.runs = config, folder / "runs"

    def words(self, *words: str) -> list[str]:
        """The arguments of `train.py`."""
        return [self.config, f"checkpoint_dir={self.runs}", *words]

    def train(self, *words: str) -> int:
        """The exit code."""
        return run_here(self.words(*words))

    @property
    def run(self) -> Path:
        """The one run directory there is."""
        return only_run(self.runs)

    def steps(self) -> set[int]:
        """Those of the checkpoints."""
        return {int(path.stem.split("_")[1]) for path in self.run.glob("*.pt")}


@pytest.fixture
def here(tiny: list[str], tmp_path: Path) -> Tiny:
    return Tiny(tiny[0], tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, str]:
    """A run of 30 steps, which tests only read, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.yaml"
    config.write_text(f"{TINY}dataset:\n  parquet_dir: {write_corpus(folder / 'text')}\n")
    tiny, out = Tiny(os.fspath(config), folder), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert tiny.train() == 0
    return tiny, out.getvalue()


def test_a_run_leaves_config_checkpoints_metrics_and_environment(
    finished: tuple[Tiny, str],
) -> None:
    run, output = finished[0].run, finished[1]
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        *(f"checkpoint_{step}.{suffix}" for step in (10, 20, 30) for suffix in ("pt", "json")),
    }
    for line in (
        f"Run directory: {run} (made with the first checkpoint, or after a minute)",
        "Trainable parameters: 11,264",
        "Tokens per step: 4 sequences x 32 tokens x 1 accumulation x 1 process = 128",
        "Iter      1 | Loss: ",
        "Iter     30 | Loss: ",
        "Evaluating at iteration 10...",
        "Train loss: ",
        f"Saved checkpoint to {run / 'checkpoint_10.pt'}",
        "Finished: 30 steps, 3.84 k tokens in ",
        f"python sample.py {run}",
    ):
        assert line in output, line


def test_a_config_file_of_any_name_trains_and_its_copy_is_read_back(
    here: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "caf\udce9\x1b[31m.yaml"
    Path(here.config).rename(named)
    here.config = os.fspath(named)
    assert here.train("max_iters=2") == 0
    assert f"Config: {tmp_path}/caf\\xE9\\x1B[31m.yaml\n" in capsys.readouterr().out
    saved = Config.from_yaml(here.run / "config.yaml")
    assert saved.training.max_iters == 2


def test_a_config_can_be_a_pipe_that_the_shell_names(here: Tiny, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="fifo: cannot be read: is not a regular file"):
        Config.from_yaml(tmp_path / "fifo")
    reading, writing = os.pipe()
    os.write(writing, Path(here.config).read_bytes())
    os.close(writing)
    assert Config.from_yaml(f"/dev/fd/{reading}").training.max_iters == 30
    os.close(reading)


def test_metrics_have_the_names_of_the_contract(finished: tuple[Tiny, str]) -> None:
    lines = (finished[0].run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    common = {"step", "time", "tokens", "crc"}
    training = {"loss", "learning_rate", "grad_norm", "tokens_per_sec", "iter_time_ms"}
    training |= {"mfu", "memory_bytes", "data_wait", "batch_hash", "weights_hash", "first_losses"}
    evaluation = {"train_loss", "val_loss", "bits_per_byte", "active_s", "active_z", "seconds"}
    evaluation |= {"best_loss", "best_step", "val_losses", "rows"}
    kinds = {frozenset(record) for record in records}
    assert kinds == {
        frozenset(common | {f"train/{name}" for name in training}),
        frozenset(common | {f"eval/{name}" for name in evaluation}),
        frozenset(common | {"final/train_loss", "final/val_loss"}),
    }
    assert [r["step"] for r in records if "train/loss" in r] == [1, 5, 10, 15, 20, 25, 30]
    for shares in zip(*(r[f"eval/active_{k}"] for k in "sz" for r in records[-2:-1]), strict=True):
        assert 0 < shares[1] < shares[0] < 1  # z needs s and y
    assert [r["time"] for r in records] == sorted(r["time"] for r in records)


def test_training_learns(here: Tiny) -> None:
    assert here.train("max_iters=150", "test_freq=50") == 0
    losses = [r["eval/val_loss"] for r in metrics(here.run) if "eval/val_loss" in r]
    assert losses[-1] < losses[0] - 0.3 and losses[-1] < 2.9


def test_an_aborted_run_leaves_nothing(here: Tiny) -> None:
    child = start(here.words("checkpoint_freq=1000", "max_iters=100000"))
    assert child.stdout is not None
    next(line for line in child.stdout if line.startswith("Iter     10"))
    child.kill()
    child.communicate()
    assert not here.runs.exists()


def test_gradient_accumulation_gives_the_same_losses(here: Tiny, tmp_path: Path) -> None:
    variants = (
        ["batch_size=4"],
        ["batch_size=2", "gradient_accumulation_steps=2"],
        ["batch_size=1", "tokens_per_step=128"],
    )
    curves = []
    for number, variant in enumerate(variants):
        common = [
            f"checkpoint_dir={tmp_path / str(number)}",
            "compute_dtype=float32",
            "dropout=0",
            "test_freq=null",
        ]
        assert here.train(*common, *variant) == 0
        records = metrics(only_run(tmp_path / str(number)))
        curves.append([r["train/loss"] for r in records if "train/loss" in r])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_compute_dtype_trains(
    here: Tiny, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here.train(f"compute_dtype={dtype}") == 0
    output = capsys.readouterr().out
    assert f"| {dtype} |" in output or "is used instead" in output


def test_without_a_compiler_the_run_goes_on_and_says_so(
    here: Tiny,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.compile.compiler_for", lambda device: None)
    assert here.train("compile=true") == 0
    assert "not compiled: no compiler for cpu on this machine" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_before_the_step(
    here: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["learning_rate=1e30", "grad_clip=0", "warmup_iters=0", "checkpoint_freq=1"]
    assert here.train(*wild) == 4
    error = capsys.readouterr().err
    assert "not finite. The step was not taken; last checkpoint: " in error
    assert "row group" in error and "part_" in error and "Traceback" not in error
    last = max(here.runs.glob("run_*/checkpoint_*.pt"), default=None)
    if last is not None:
        model, _ = load_model(last)
        assert all(p.isfinite().all() for p in model.parameters())


def test_eval_only_evaluates_once_and_creates_nothing(
    finished: tuple[Tiny, str], capsys: pytest.CaptureFixture[str]
) -> None:
    here, run = finished[0], finished[0].run
    trained = metrics(run)[-1]["final/val_loss"]
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert here.train("eval_only=true") == 0
    assert "Val loss: 5." in capsys.readouterr().out  # fresh weights
    for name, loss in ((run, f"{trained:.4f}"), (run / "checkpoint_10.pt", "4.9")):
        arguments = ["eval_only=true", f"resume_from_checkpoint={name}"]
        assert here.train(*arguments) == 0
        assert f"Val loss: {loss}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert len(list(here.runs.iterdir())) == 1


def test_epochs_end_the_run_when_all_documents_were_seen(here: Tiny) -> None:
    words = ["epochs=1", "max_iters=100000", "test_freq=null", "checkpoint_freq=null"]
    assert here.train(*words, "log_freq=1") == 0
    last = metrics(here.run)[-1]
    text = 0.95 * sum(len(t.encode()) + 1 for t in _texts(here))  # the rest is held out
    assert 0.98 * text < last["tokens"] < 1.2 * text  # until the longest of four lanes has ended


def _texts(here: Tiny) -> list[str]:
    import pyarrow.parquet as pq

    folder = Config.from_yaml(here.config).dataset.parquet_dir
    return [t for t in pq.read_table(folder)["text"].to_pylist() if t]


def test_without_always_save_an_evaluation_saves_when_it_is_the_best(
    here: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = ["always_save_checkpoint=false", "learning_rate=1e-30", "max_iters=40"]
    assert here.train(*frozen, "checkpoint_freq=7") == 0
    steps = here.steps()
    assert steps == {10, 40}  # the first evaluation, and the end
    best = f"Best checkpoint: {here.run / 'checkpoint_10.pt'} (to sample.py"
    assert best in capsys.readouterr().out


def test_save_every_saves_by_the_clock(here: Tiny) -> None:
    clock = ["checkpoint_freq=null", "save_every=0.000001", "max_iters=5"]
    assert here.train(*clock) == 0
    assert here.steps() == {1, 2, 3, 4, 5}


def test_the_last_step_is_evaluated_before_it_is_saved(here: Tiny) -> None:
    odd = ["max_iters=20", "test_freq=15", "checkpoint_freq=20"]
    assert here.train(*odd) == 0
    run = here.run
    manifest = json.loads((run / "checkpoint_20.json").read_text())
    assert manifest["val_loss"] == metrics(run)[-1]["final/val_loss"]


def test_an_error_in_an_evaluation_does_not_cost_the_steps_done(
    here: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def out_of_memory(*arguments: object) -> None:
        raise MemoryError("evaluation needs more than there is")

    monkeypatch.setattr("engine.evaluation.batch_losses", out_of_memory)
    arguments = ["test_freq=30", "checkpoint_freq=null"]
    assert here.train(*arguments) == 1
    assert "Lower training.batch_size" in capsys.readouterr().err
    monkeypatch.undo()
    run = here.run
    assert (run / "checkpoint_30.json").exists()
    assert here.train(f"resume_from_checkpoint={run}") == 0
    assert "final/val_loss" in metrics(run)[-1]


def test_all_checkpoints_are_kept_by_default_and_a_run_goes_on_from_the_first(here: Tiny) -> None:
    words = ["checkpoint_freq=1", "test_freq=null"]
    assert here.train(*words, "max_iters=5") == 0
    assert here.steps() == {1, 2, 3, 4, 5}
    resume = f"resume_from_checkpoint={here.run / 'checkpoint_1.pt'}"
    assert here.train(*words, resume, "max_iters=6") == 0
    assert 6 in here.steps()


def test_old_checkpoints_are_removed_but_the_best_and_the_newest(here: Tiny) -> None:
    assert here.train("checkpoint_freq=2", "keep_last=2") == 0
    steps = here.steps()
    assert {28, 30} <= steps and len(steps) <= 3


def test_a_dry_run_prints_the_plan_and_creates_nothing(
    here: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here.train("--dry-run") == 0
    output = capsys.readouterr().out
    assert "n_layer: 2" not in output
    assert output.index("Timing some steps on cpu") > output.index("Run directory: ")
    assert "Total parameters: 11,264" in output
    assert "Tokens per step: 4 sequences x 32 tokens" in output
    assert "FLOP per token" in output and "Data: " in output
    assert "Tokens per parameter: 0.341 " in output
    assert "Learning rate: 2.99e-03 at its peak" in output and "█" in output
    assert re.search(
        r"^Time: about \d+s on this device: 30 steps of .* 3 evaluations of", output, re.M
    )
    assert not here.runs.exists()


def test_the_config_is_shown_where_it_is_asked_for(
    here: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        here.train("lr=2e-4", "--show-config")
    assert end.value.code == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert Config.from_yaml(shown) == Config.from_yaml(here.config, here.words("lr=2e-4")[1:])


def test_a_dry_run_plans_while_the_embedded_text_is_not_yet_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["n_layer=1", "n_embd=16", "n_head=2", "mlp_internal_dim_multiplier=4"]
    words = ["block_size=32", "eval_iters=2", "use_4bit=false", "max_iters=40", *sizes]
    assert run_here([str(ROOT / "config.yaml"), *words, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "Data: data/python-stdlib is missing; the run will build it" in output
    assert "Memory of a step: " in output and "Time: about " in output
    assert list(tmp_path.iterdir()) == []


def test_the_largest_batch_is_found_and_kept_for_repeats_and_resuming(
    here: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["batch_size=auto", "tokens_per_step=192"]
    assert here.train(*words) == 0
    output = capsys.readouterr().out
    assert "Batch size: 6 of 6 sequences" in output and "(a whole step at once)" in output
    run = here.run
    assert Config.from_yaml(run / "config.yaml").training.batch_size == 6
    six = Tiny(here.config, tmp_path / "six")
    assert six.train("batch_size=6", "eval_batch_size=8") == 0
    assert metrics(run) == metrics(six.run)
    assert here.train(*words, f"resume_from_checkpoint={run / 'checkpoint_20.pt'}") == 0
    assert metrics(run) == metrics(six.run)


def test_the_rows_that_are_evaluated_do_not_depend_on_the_micro_batch(
    here: Tiny, tmp_path: Path
) -> None:
    found = []
    for batch in (2, 8):
        one = Tiny(here.config, tmp_path / str(batch))
        assert one.train(f"batch_size={batch}", "eval_batch_size=4", "max_iters=10") == 0
        found += [r for r in metrics(one.run) if "eval/rows" in r]
    assert found[0]["eval/rows"] == found[1]["eval/rows"]
    assert [len(each["eval/val_losses"]) for each in found] == [2, 2]


def test_memory_that_runs_out_with_an_automatic_batch_is_explained_too(
    here: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("model.loss.F.cross_entropy", out_of_memory)
    assert here.train("batch_size=auto", "tokens_per_step=256") == 1
    assert "Out of memory: no more\nA step needs " in capsys.readouterr().err


def test_a_dry_run_of_a_resumed_run_times_what_is_left(
    finished: tuple[Tiny, str], capsys: pytest.CaptureFixture[str]
) -> None:
    here = finished[0]
    resume = f"resume_from_checkpoint={here.run / 'checkpoint_20.pt'}"
    assert here.train(resume, "--dry-run") == 0
    told = capsys.readouterr().out
    assert re.search(r"^Time: about \d+s on this device: 10 steps .* 1 evaluation of", told, re.M)
    assert " | from step 20" in told


def test_a_dry_run_of_an_evaluation_makes_no_steps_and_no_directory(
    here: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval_only=true", "sample_prompt=the", "--dry-run"]
    assert here.train(*words) == 0
    told = capsys.readouterr().out
    assert re.search(r"^Time: about \d+s on this device: 1 evaluation of", told, re.M)
    assert "Run directory: none (nothing will be saved)" in told


def test_where_memory_runs_out_it_says_what_used_it_and_what_would_fit(
    here: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB")

    monkeypatch.setattr("model.loss.F.cross_entropy", out_of_memory)
    assert here.train("batch_size=64", "block_size=256") == 1
    told = capsys.readouterr().err
    assert told.startswith("Out of memory: DefaultCPUAllocator")
    assert re.search(r"A step needs .* activations", told)
    assert "training.batch_size" in told and "Traceback" not in told


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["n_layer=six"], 2, "model.n_layer: expected a whole number, got 'six'"),
        (["device=cuda:7"], 2, "system.device: cuda:7 was asked for"),
        (["parquet_dir=nowhere"], 3, "dataset.parquet_dir 'nowhere': not found"),
        (["resume_from_checkpoint=nowhere"], 3, "nowhere"),
    ],
)
def test_mistakes_get_one_message_their_exit_code_and_no_traceback(
    here: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_main(lambda: here.train(*arguments))
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not here.runs.exists()


def test_an_impossible_checkpoint_dir_is_told_before_training(
    here: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert Tiny(here.config, tmp_path / "file").train() == 5
    captured = capsys.readouterr()
    assert str(tmp_path / "file") in captured.err and "Iter" not in captured.out


def test_debug_shows_the_traceback(here: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert here.train("parquet_dir=nowhere", "debug=true") == 3
    assert "Traceback" in capsys.readouterr().err


def test_help_and_config_errors_import_no_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', sys.argv[1]]\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    slow = {'torch', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "    print(end.code, sorted(slow))\n"
    )
    for argument, expected in (("--help", "0 []"), ("n_layer=six", "2 []")):
        result = subprocess.run(
            [sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True
        )
        assert result.stdout.splitlines()[-1] == expected, result.stderr


def test_a_full_disk_keeps_the_last_checkpoint_and_exits_5(here: Tiny) -> None:
    def limit() -> None:  # no file may grow beyond 100 kB, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert here.train("max_iters=10") == 0
    run = here.run
    words = [f"resume_from_checkpoint={run}", "lr_decay_iters=10", "max_iters=90"]
    child = start(here.words(*words), preexec_fn=limit)
    output, _ = child.communicate()
    assert child.returncode == 5, output
    assert output.count("Training goes on; the next checkpoint will try again.") == 2
    assert "Traceback" not in output
    assert {p.name for p in run.glob("checkpoint_*")} == {"checkpoint_10.pt", "checkpoint_10.json"}
    assert list(run.glob(".tmp-*")) == []
    assert load_model(run)[1].training.max_iters in (10, 90)


def test_sampling_is_reproducible_and_takes_run_and_checkpoint(
    finished: tuple[Tiny, str], tmp_path: Path
) -> None:
    run = finished[0].run
    options = ["--prompt", "the ", "--max-new-tokens", "20", "--num-samples", "2", "--seed", "3"]
    first = run_main(sample.main, str(run), *options)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("--- sample 1 of 2\nthe ")
    again = run_main(sample.main, str(run / "checkpoint_30.pt"), *options)
    assert again.stdout == first.stdout
    for arguments, code, message in (
        ([str(run), "--temperature", "-1"], 2, "must be >= 0, got -1"),
        ([str(run), "--top-p", "2"], 2, "must be in [0, 1], got 2"),
        ([str(tmp_path / "nowhere")], 3, "nowhere"),
    ):
        result = run_main(sample.main, *arguments)
        assert result.returncode == code and message in result.stderr
        assert "Traceback" not in result.stderr


def test_a_data_error_in_the_middle_saves_the_steps_done(
    here: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, served = TrainLoader.__next__, iter(range(17))

    def breaking(loader: TrainLoader) -> StepBatch:
        if next(served, None) is None:
            raise DataError("the disk went away")
        return real(loader)

    monkeypatch.setattr(TrainLoader, "__next__", breaking)
    broken, straight = (Tiny(here.config, tmp_path / name) for name in ("broken", "straight"))
    assert broken.train() == 3
    monkeypatch.undo()
    assert "the disk went away" in capsys.readouterr().err
    run = broken.run
    assert (run / "checkpoint_17.json").exists()
    assert broken.train(f"resume_from_checkpoint={run}") == 0
    assert straight.train() == 0
    assert_same_run(run, straight.run, step=30)


def test_held_out_text_shorter_than_a_row_is_told_at_the_start(
    here: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--dry-run"]):
        assert here.train("block_size=8192", *extra) == 3
        captured = capsys.readouterr()
        assert "the test text" in captured.err and "Iter" not in captured.out


def test_float16_gradients_that_never_become_finite_stop_the_run(
    here: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.gradient_norm", lambda model: torch.tensor(torch.nan))
    half = ["compute_dtype=float16", "max_iters=100", "test_freq=null"]
    assert here.train(*half) == 4


def test_a_reader_that_leaves_does_not_cost_the_steps_done(here: Tiny) -> None:
    child = start(here.words("max_iters=100000", "log_freq=1"))
    assert child.stdout is not None
    next(line for line in child.stdout if line.startswith("Iter     12"))
    child.stdout.close()  # as `| head` does; stderr shares the pipe
    assert child.wait() == 1
    assert list(here.run.glob("checkpoint_*.json"))


def test_no_thread_or_process_outlives_a_run(here: Tiny) -> None:
    before = threading.active_count()
    assert here.train("num_workers=2") == 0
    assert multiprocessing.active_children() == []
    deadline = time.monotonic() + 5  # a queue's own thread takes a moment to see its end
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before, threading.enumerate()
