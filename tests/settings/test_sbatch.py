"""`--slurm`: what it reads, the batch script it prints, and that bash and shellcheck agree."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.settings.conftest import ROOT, Ask, Complain

Printed = Callable[[str], str]

VARIANTS = (
    "--slurm nodes=2 gpus=8 time=24:00 lr=3e-4",
    "--slurm gpus=0 time=1-00:00 device=cpu",
    "--slurm time=0:30:00 partition=a100 account=x qos=long 'constraint=a100&ib' mem=200G cpus=16",
    """--slurm nodes=2 time=9:00 "sample_prompt=it's \\$HOME \\`x\\` *" resume=auto""",
    "--slurm nodes=2 time=9:00 resume_from_checkpoint=null",
)


@pytest.fixture
def printed(ask: Ask, capsys: pytest.CaptureFixture[str]) -> Printed:
    """Returns what a command line prints that leaves with 0."""

    def ask_line(line: str) -> str:
        with pytest.raises(SystemExit) as caught:
            ask(line)
        assert caught.value.code == 0
        return capsys.readouterr().out

    return ask_line


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if "#SBATCH" in line]


def arguments(script: str) -> list[str]:
    """The words that train.py gets, as bash splits them."""
    command = script.split("srun ")[1].split("\ncode=")[0].replace("\\\n", " ")
    words = shlex.split(command)
    place = words.index(os.fspath(ROOT / "train.py"))
    assert words[place - 2 : place] == [sys.executable, "-u"]
    return words[place + 1 :]


def test_two_nodes_of_eight_gpus(printed: Printed) -> None:
    script = printed("--slurm nodes=2 gpus=8 time=24:00 partition=a100 config.yaml lr=3e-4")
    assert directives(script) == [
        "job-name=config",
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=4",
        "time=24:00:00",
        "partition=a100",
        "signal=USR2@120",
        "requeue",
        "open-mode=append",
        "output=slurm-%j.out",
    ]
    assert arguments(script) == ["config.yaml", "lr=3e-4", "resume_from_checkpoint=auto"]
    assert f"\ncd {os.getcwd()} || exit 2\nMASTER_ADDR=" in script


def test_a_job_on_cpus_asks_for_no_gpus(printed: Printed) -> None:
    script = printed("device=cpu --slurm time=1:00")
    assert "gpus" not in "".join(directives(script)) and "ntasks-per-node=1" in script
    assert "MASTER_ADDR" not in script  # one process meets none
    assert "# One process per node." in script and "LOCAL_RANK" not in script


def test_a_time_is_hours_and_minutes(printed: Printed) -> None:
    times = {"24:00": "24:00:00", "2-01:30": "49:30:00", "0:10:59": "0:10:59"}
    for text, written in times.items():
        assert f"time={written}" in directives(printed(f"--slurm time={text}"))


def test_the_users_word_on_resuming_wins(printed: Printed) -> None:
    for word in ("resume_from_checkpoint=runs/a", "--resume", "resume=null", "init_from=resume"):
        assert arguments(printed(f"--slurm time=1:00 {word}")) == [word]


def test_notes_go_to_standard_error(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ask("--slurm time=24:00 lr=3e-4")
    told = capsys.readouterr().err
    for note in ("24 h 00 min", "not given: nodes=1 gpus=1 cpus=4", "lr is read as training"):
        assert note in told


MISTAKES = {
    "--slurm gpu=8 time=1:00": "--slurm gpu: unknown key. Did you mean gpus?",
    "--slurm nodes=2": "--slurm time: missing. Write time=HOURS:MINUTES",
    "--slurm time=24": "--slurm time: expected hours:minutes, hours:minutes:seconds or days-",
    "--slurm time=1:60": "--slurm time: expected hours:minutes",
    "--slurm time=0:09": "--slurm time: at least 10 minutes; got 0:09, which is hours:minutes.",
    "--slurm time=1:00 nodes=0": "--slurm nodes: expected a whole number, at least 1; got 0.",
    "--slurm time=1:00 time=2:00": "--slurm time: given twice.",
    "--slurm time=1:00 'name=a b'": "--slurm name: expected text without blanks; got 'a b'.",
    "--slurm time=1:00 $'name=a\\n#SBATCH'": "--slurm name: expected text without blanks",
    "--slurm time=1:00 lr=1 nodes=2": "nodes: unknown option. Keys of --slurm stand directly",
    "--slurm time=1:00 lr=1 gpus=2": "gpus: unknown option. Keys of --slurm stand directly",
    "--gpus 2 --slurm time=1:00": "--gpus: unknown option. Keys of --slurm stand directly",
    "gpus=2": "gpus: unknown option. Start it with torchrun",
    "--slurm=nodes=2 time=1:00": "--slurm=nodes=2: write --slurm nodes=2.",
    "--slurm= time=1:00": "--slurm=: write --slurm.",
    "--slurm time=1:00 mem=64": "--slurm mem: expected memory of each node with its unit, such as "
    "200G; got 64.",
    "--slurm time=1:00 batch_sise=8": "batch_sise: unknown option. Did you mean training.batch",
    "--slurm time=1:00 --dry-run": "--slurm excludes --dry-run, --check-resume and --show-config",
    "--submit": "--submit needs --slurm.",
}


def test_each_mistake_has_its_message(complaint: Complain) -> None:
    for line, message in MISTAKES.items():
        assert complaint(line.replace("$'", "'").replace("\\n", "\n")).startswith(
            f"command line: {message}"
        )


def test_it_is_refused_in_one_of_several_processes(
    complaint: Complain, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"TORCHELASTIC_ERROR_FILE": "", "WORLD_SIZE": "2"}.items():
        with monkeypatch.context() as started:
            started.setenv(name, text)
            refused = complaint("--slurm time=1:00 --submit")
        assert refused.startswith("--slurm: run it with python, without torchrun or srun")


def test_what_is_wrong_for_this_job_only_is_found_now(complaint: Complain) -> None:
    assert "system.device=cuda" in complaint("--slurm gpus=0 time=1:00 device=cuda")
    assert "system.device=cpu" in complaint("--slurm gpus=8 time=1:00 device=cpu")
    uneven = complaint("--slurm nodes=3 gpus=1 time=1:00 tokens_per_step=8192")
    assert uneven.startswith("training.tokens_per_step=8192 is not a multiple of")


def test_shellcheck_finds_nothing(printed: Printed) -> None:
    places = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    shellcheck = shutil.which("shellcheck", path=places)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install -r requirements-dev.txt")
    for line in VARIANTS:
        done = subprocess.run(
            [shellcheck, "--exclude=SC2016", "-"],  # the user's own $ is in single quotes
            input=printed(line),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def executable(folder: Path, name: str, lines: str) -> None:
    """A stand-in for a program of SLURM."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
    (folder / name).chmod(0o755)


def test_a_job_is_requeued_only_when_it_saved_at_the_end_of_its_time(
    printed: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "bin", "srun", 'exit "$CODE"')
    executable(tmp_path / "bin", "scontrol", 'echo "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    Path("job.sh").write_text(printed("--slurm time=1:00"))
    over = 3600 - 120 - 90
    for code, seconds in ((143, over - 1), (143, over), (0, over), (3, over), (137, over)):
        clock = ["bash", "-c", f"SECONDS={seconds}; . ./job.sh"]
        environment = {**os.environ, "CODE": str(code), "SLURM_JOB_ID": "7"}
        done = subprocess.run(clock, capture_output=True, text=True, check=False, env=environment)
        requeued = (code, seconds) == (143, over)
        assert (done.returncode, done.stdout) == (code, "requeue 7\n" if requeued else "")


def test_submit_gives_the_script_to_sbatch(
    printed: Printed, complaint: Complain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "--slurm time=1:00 --submit"
    monkeypatch.setenv("PATH", os.fspath(tmp_path / "bin"))
    assert "sbatch cannot be run (No such file or directory): --submit needs" in complaint(line)
    executable(tmp_path / "bin", "sbatch", f"read -r first; echo $first > {tmp_path}/read; echo 42")
    assert printed(line) == "42\n"
    assert (tmp_path / "read").read_text() == "#!/bin/bash\n"
    executable(tmp_path / "bin", "sbatch", "echo no such account >&2; exit 1")
    assert "sbatch refused the job: no such account" in complaint(line)
