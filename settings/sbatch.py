"""`train.py my.yaml --slurm nodes=2 gpus=8 time=24:00 [--submit]`: a batch script for SLURM.

The script starts one process per GPU with srun and without torchrun, so that signals reach train.py
and its exit code leaves it (settings/slurm.py gives the processes their ranks). Before the time
limit SLURM sends USR2; train.py saves and ends with 143, and the script puts its job back into the
queue, where `resume_from_checkpoint: auto` finds the job's run again.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from settings.errors import ConfigError
from settings.names import resolve
from settings.schema import Schema
from settings.slurm import RENDEZVOUS
from settings.values import RefusedError, shown

LEAD_S = 120
"""How long before the time limit SLURM sends USR2: longer than a step and a save take."""
EARLY_S = 90
"""SLURM may send it a minute earlier than asked for; half a minute more is for clocks."""
SHORTEST_S = 600
CPUS = 4  # of each process, where the user gives no number: data, compilation, saving

PER_GPU = """\
# One process per GPU. Each has to see all GPUs of its node, since it takes cuda:LOCAL_RANK: so no
# --gpus-per-task."""

_TEXT = r"[\w.,:;&|*@+()\[\]=/-]+", "text without blanks"
_TIME = r"(?:(\d{1,3})-)?(\d{1,4}):([0-5]\d)(?::([0-5]\d))?"
KEYS: dict[str, tuple[str, str]] = {
    "nodes": (r"[1-9]\d{0,4}", "a whole number, at least 1"),
    "gpus": (r"\d{1,3}", "a whole number: GPUs of each node, 0 for a job on CPUs"),
    "time": (_TIME, "hours:minutes, hours:minutes:seconds or days-hours:minutes"),
    "cpus": (r"[1-9]\d{0,3}", "a whole number, at least 1: CPUs of each process"),
    # A number alone would be megabytes to SLURM; 0 is all that the node has.
    "mem": (r"0|\d{1,9}[KMGT]", "memory of each node with its unit, such as 200G"),
    **dict.fromkeys(("partition", "account", "qos", "constraint", "name"), _TEXT),
}
"""The keys of --slurm: the pattern of a value, and what it is in words."""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A job as the command line asks for it."""

    keys: dict[str, str] = field(default_factory=dict)
    """Of `KEYS`, as typed."""
    words: tuple[str, ...] = ()
    """What is left of the command line, for train.py."""
    submit: bool = False

    @property
    def gpus(self) -> int:
        """GPUs of each node."""
        return int(self.keys["gpus"])

    @property
    def processes(self) -> int:
        """Processes of the run: one per GPU, or one per node without GPUs."""
        return int(self.keys["nodes"]) * max(1, self.gpus)

    @property
    def limit_s(self) -> int:
        """Time limit in seconds."""
        found = re.fullmatch(_TIME, self.keys["time"])
        assert found is not None  # checked when it was taken
        days, hours, minutes, seconds = map(int, found.groups(default="0"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    def with_defaults(self, device: str, name: str) -> tuple[SlurmJob, list[str]]:
        """Returns the job with the keys that were not given, and notes on them for the user."""
        defaults = {"nodes": "1", "gpus": "0" if device == "cpu" else "1", "cpus": str(CPUS)}
        assumed = [f"{key}={text}" for key, text in defaults.items() if key not in self.keys]
        job = replace(self, keys={**defaults, "name": name, **self.keys})
        hours, minutes = divmod(job.limit_s // 60, 60)
        note = f"time={self.keys['time']} is {hours} h {minutes:02} min"
        return job, [note, *([f"not given: {' '.join(assumed)}"] if assumed else [])]

    def directives(self) -> list[str]:
        """Returns the options of sbatch."""
        minutes, seconds = divmod(self.limit_s, 60)
        passed = ("partition", "account", "qos", "constraint", "mem")
        return [
            f"job-name={self.keys['name']}",
            f"nodes={self.keys['nodes']}",
            f"ntasks-per-node={max(1, self.gpus)}",
            *([f"gpus-per-node={self.gpus}"] if self.gpus else []),
            f"cpus-per-task={self.keys['cpus']}",
            # In full: SLURM would read 24:00 as 24 minutes.
            f"time={minutes // 60}:{minutes % 60:02}:{seconds:02}",
            *(f"{key}={self.keys[key]}" for key in passed if key in self.keys),
            f"signal=USR2@{LEAD_S}",
            "requeue",
            "open-mode=append",
            "output=slurm-%j.out",
        ]


def take_slurm_words(
    argv: Sequence[str], schema: Schema
) -> tuple[list[str], SlurmJob | None, list[str]]:
    """Takes `--slurm`, its keys behind it, and `--submit` out of a command line.

    Returns the words left, the job (None without --slurm), and problems. The keys end with the
    first word that is another option or no `key=value`.
    """
    words, rest, keys = list(argv), list[str](), dict[str, str]()
    problems, asked = list[str](), False
    while words:
        word = words.pop(0)
        if word.startswith("--slurm="):
            joined = word.partition("=")[2]
            problems.append(f"{word}: write --slurm {joined}".rstrip())
            words[:0] = ["--slurm", joined] if joined else ["--slurm"]
        elif word == "--slurm":
            asked = True
            while words and (key := _slurm_key(words[0], schema)):
                text = words.pop(0).partition("=")[2]
                problem = "given twice" if key in keys else _refused(key, text)
                problems += [f"--slurm {key}: {problem}"] if problem else []
                keys[key] = text
        elif word != "--submit":
            rest.append(word)
    submitted = "--submit" in argv
    if not asked:
        return rest, None, ["--submit needs --slurm"] if submitted else []
    if "time" not in keys:
        problems.append("--slurm time: missing. Write time=HOURS:MINUTES, the limit of the job")
    return rest, SlurmJob(keys, tuple(rest), submitted), problems


def _slurm_key(word: str, schema: Schema) -> str | None:
    """Returns the key of `key=value` if it is one of --slurm, or is like one and no option."""
    assignment = re.fullmatch(r"(?:--)?([A-Za-z_-]+)=.*", word, re.DOTALL)
    if assignment is None or assignment[1] in KEYS:
        return assignment and assignment[1]
    try:
        resolve(schema, assignment[1].replace("-", "_"))
    except RefusedError:
        return assignment[1] if _nearest(assignment[1]) else None
    return None


def _nearest(key: str) -> list[str]:
    return difflib.get_close_matches(key, KEYS, 1)


def _refused(key: str, text: str) -> str:
    """Returns why --slurm does not take `key=text`; empty if it does."""
    if key not in KEYS:
        return f"unknown key. Did you mean {_nearest(key)[0]}?"
    pattern, meaning = KEYS[key]
    if not re.fullmatch(pattern, text, re.ASCII):
        return f"expected {meaning}; got {shown(text)}"
    if key == "time" and SlurmJob({key: text}).limit_s < SHORTEST_S:
        return f"at least {SHORTEST_S // 60} minutes; got {text}, which is hours:minutes"
    return ""


def batch_script(job: SlurmJob, words: Sequence[str]) -> str:
    """Returns the script for sbatch; `words` are the arguments of train.py."""
    script = Path(__file__).absolute().parents[1] / "train.py"
    command = shlex.join([sys.executable, "-u", os.fspath(script), *words])
    directives = "\n".join(f"#SBATCH --{line}" for line in job.directives())
    rendezvous = f"{RENDEZVOUS}\n" if job.processes > 1 else ""
    nearly_over = job.limit_s - LEAD_S - EARLY_S
    processes = PER_GPU if job.gpus else "# One process per node."
    return f"""\
#!/bin/bash
{directives}

# {LEAD_S} s before the time limit SLURM sends USR2 to the processes: they end their step, save, and
# exit with 143. A step and a save, or two where one is under way, have to fit into that time. If
# they do not, raise the {LEAD_S} of --signal and lower the {nearly_over} below by as much.

cd {shlex.quote(os.getcwd())} || exit 2
{rendezvous}
{processes}
# Config files are read when the job starts, and again after a requeue.
srun --kill-on-bad-exit=1 --cpus-per-task={job.keys["cpus"]} \\
    {command}
code=$?

# 143 when the time is nearly over: back into the queue. {nearly_over} s are the limit, less
# {LEAD_S} s and {EARLY_S} s, because SLURM may send the signal earlier. A job that was cancelled or
# preempted before that ends with 143, too, and stays out.
if [ "$code" -eq 143 ] && [ "$SECONDS" -ge {nearly_over} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def submit(script: str) -> str:
    """Gives the script to sbatch and returns its answer; raises ConfigError."""
    import subprocess  # not above: every start of train.py would wait for it

    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(
            f"sbatch cannot be run ({error.strerror}): --submit needs a machine from which jobs "
            "are submitted, such as a login node. Without --submit the script is printed."
        ) from None
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {(done.stderr or done.stdout).strip()}")
    return done.stdout
