"""A job of SLURM: which run it continues, and its way through signal, requeue and resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config import ConfigError, DistributedConfig, SystemConfig
from engine.checkpoint.find import resolve_resume
from engine.hardware.distributed import enter_world
from engine.run_directory.environment_file import read_environment, sessions_of
from engine.run_directory.manifest import data_path
from settings.slurm import adopt_srun_ranks
from tests.conftest import ROOT
from tests.engine.states import finished_run, reopen
from tests.engine.test_distributed import processes
from tests.runs import assert_same_run, only_run, wait_for


def resumed(value: Path | str, folder: Path) -> tuple[Path | None, str]:
    """The checkpoint that a value means, and the last line about it."""
    resume, lines = resolve_resume(str(value), folder / "checkpoints", lambda _: [])
    return resume.path if resume else None, lines[-1] if lines else ""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run of job 7, as which this process has come back, and a newer one of job 8."""
    found = []
    for job in "78":
        monkeypatch.setenv("SLURM_JOB_ID", job)
        found.append(finished_run(tmp_path, 10, 20))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    return found[0], found[1]


def test_auto_continues_the_run_of_this_job(runs: tuple[Path, Path], tmp_path: Path) -> None:
    own, _ = runs
    told = f"{own} is the run of this SLURM job (7): continuing it"
    assert resumed("auto", tmp_path) == (data_path(own, 20), told)


def test_a_run_that_this_job_resumed_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, _ = (finished_run(tmp_path, 10) for _ in range(2))
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    reopen(older, tmp_path).close()
    assert resumed("auto", tmp_path)[0] != data_path(older, 10)  # not requeued: by its config
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resumed("auto", tmp_path)[0] == data_path(older, 10)


def test_another_command_line_of_the_job_is_another_run(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, "lr=3e-4"])
    assert resumed("auto", tmp_path)[0] == data_path(runs[1], 20)  # by its config


def test_a_job_whose_run_has_no_checkpoint_begins_a_new_one(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in runs[0].glob("checkpoint_*"):
        path.unlink()
    resume, told = resumed("auto", tmp_path)
    assert resume is None and "(7), without a checkpoint yet: starting a new one" in told


def test_a_requeued_job_does_not_begin_at_the_named_checkpoint_again(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    own, other = runs
    first = data_path(own, 10)
    first.unlink()  # as `keep_last` would
    for value in (first, own, own.parent):
        assert resumed(value, tmp_path)[0] == data_path(own, 20)
    assert resumed(data_path(other, 10), tmp_path)[0] == data_path(other, 10)


def test_srun_without_a_rendezvous_is_told_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    adopt_srun_ranks(environ)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=r"(?s)not get MASTER_ADDR, MASTER_PORT\..*hostnames"):
        enter_world(SystemConfig(device="cpu"), DistributedConfig()).__enter__()


# Tasks are forked, which spares them the import of torch, and killed once one of them has failed.
SRUN = f"""
import os, runpy, signal, sys, time
sys.path.insert(0, {os.fspath(ROOT)!r})
import train
from data.loading import load_plan
load_plan.CHUNK_BYTES = 1 << 13  # see tests/conftest.py
from engine.run_directory.directory import RunDirectory
close = RunDirectory.close
RunDirectory.close = lambda self: (time.sleep(0.5), close(self))  # a slow disk
sys.argv = [word for word in sys.argv[1:] if not word.startswith("--")][2:]
tasks, worst = [], 0
for rank in range(2):
    tasks.append(os.fork())
    if tasks[-1] == 0:
        step = dict(SLURM_PROCID=str(rank), SLURM_NODEID=str(rank), SLURM_LOCALID="0")
        os.environ.update(step, SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)")
        runpy.run_path(sys.argv[0], run_name="__main__")
signal.signal(signal.SIGUSR2, lambda number, _: [os.kill(task, number) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
while tasks:
    task, status = os.wait()
    tasks.remove(task)
    code = os.waitstatus_to_exitcode(status)
    worst = max(worst, code if code >= 0 else 128 - code)
    if code:
        [os.kill(other, signal.SIGKILL) for other in tasks]
sys.exit(worst)
"""
PROGRAMS = {
    "srun": f"#!{sys.executable}\n{SRUN}",
    "sbatch": "#!/bin/bash\ncat > job.sh; echo Submitted batch job 4242\n",
    "scontrol": "#!/bin/bash\n[ $1 = show ] && echo 127.0.0.1 || echo back in the queue: $2\n",
}


def job(folder: Path, **variables: str) -> subprocess.Popen[str]:
    """The script that sbatch got, run as SLURM would, an hour after the job began."""
    known = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_PROCID": "0"}
    return subprocess.Popen(
        ["bash", "-c", "SECONDS=3600; . ./job.sh"],
        cwd=folder,
        env={**os.environ, **known, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_job_saves_is_requeued_and_goes_on_with_its_run(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    own, other = tmp_path / "runs", tmp_path / "other"
    words = [*tiny, "max_iters=15", "log_freq=1", "dropout=0.1", "test_freq=null"]
    words += ["distributed.strategy=fsdp", "training.recompute=layer"]
    script = [sys.executable, os.fspath(ROOT / "train.py"), *words, f"checkpoint_dir={own}"]
    slurm = ["--slurm", "nodes=2", "gpus=0", "time=1:03", "--submit"]
    asked = subprocess.run([*script, *slurm], cwd=tmp_path, capture_output=True, text=True)
    assert asked.stdout == "Submitted batch job 4242\n", asked.stderr

    first = job(tmp_path)
    wait_for(first, "Iter      3")
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR2)
    output, _ = first.communicate()
    assert first.returncode == 143 and output.endswith("back in the queue: 4242\n"), output
    assert "SIGUSR2: finishing the step and saving" in output
    run = only_run(own)
    # No process ended while the main one still wrote: it would have been killed.
    assert read_environment(run)["ended"]["reason"] == "SIGUSR2"

    # An uninterrupted run with the same config, newer than the job's: `auto` must not take it.
    processes(2, [*words, f"checkpoint_dir={other}"])
    newer = only_run(other).rename(own / f"run_2999{run.name[8:]}")

    second = job(tmp_path, SLURM_RESTART_COUNT="1")
    output, _ = second.communicate()
    assert second.returncode == 0 and "back in the queue" not in output, output
    assert f"{run} is the run of this SLURM job (4242): continuing it" in output
    jobs = [session["slurm_job"] for session in sessions_of(read_environment(run))]
    assert jobs == ["4242", "4242"]
    assert_same_run(run, newer, 15)
