"""Reads one run directory of any age and in any state. Imports no torch.

A thousand runs are listed in half a second, because only the end of `metrics.jsonl` is read, and
YAML only if `environment.json` holds no copy of the config. What cannot be read becomes a line in
`problems`, never an exception. Nothing is written and no lock is taken.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shlex
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compare.reading.json_values import as_count, as_dict, as_float, as_str
from compare.reading.records import Tail, os_error_text, read_records, read_tail
from config import Config, ConfigError, DataError, schema
from engine.run_directory.environment_file import METRICS_BYTES, read_environment
from engine.run_directory.find_runs import FOLDER, find_by_name, is_run, runs_in, shown_names
from engine.run_directory.fork import PARENT
from engine.run_directory.manifest import CONFIG, ENVIRONMENT, LOCK, MAX_BYTES, METRICS, steps_in
from engine.run_directory.saved_config import NOT_SAVED
from files.regular import open_regular, read_regular
from settings.entries import flat_options
from settings.names import resolve
from settings.values import RefusedError, Scalar, read_scalar
from settings.yaml_reader import Group, read_file

STOPPED_EARLY = "stopped_early.json"
"""Written by sweep.py into a run that it stopped for good: `reason`, and `step`, the run's last."""
_RECENT_S = 120  # a run whose lock cannot be seen logs more often than this while it trains
_SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}

# struct flock of <fcntl.h>, whose fields are in another order on macOS. "0q" pads the end to a
# multiple of eight bytes, as a C compiler does.
if sys.platform == "darwin":
    _FLOCK_LAYOUT = "qqihh"
    _FLOCK_FIELDS = ("l_start", "l_len", "l_pid", "l_type", "l_whence")
else:
    _FLOCK_LAYOUT = "hhqqi0q"
    _FLOCK_FIELDS = ("l_type", "l_whence", "l_start", "l_len", "l_pid")


@dataclass(frozen=True, eq=False)
class Run:
    """What is known of a run without reading its curves; None or '' is unknown."""

    path: Path
    name: str
    """The name of its directory."""
    config: Mapping[str, Any]
    """Flat (`training.learning_rate`), with defaults; empty if it cannot be read."""
    environment: Mapping[str, Any]
    """environment.json: the first session, and under `resumed` the later ones."""
    size: Mapping[str, Any]
    """What the run wrote at its start about its size, such as `parameters`; empty for old runs."""
    newest: Mapping[str, Any]
    """The newest value of each metric at the end of metrics.jsonl."""
    problems: tuple[str, ...]
    """What could not be read, one line each."""
    state: str
    """done, stopped, crashed or running."""
    end_reason: str
    """Why it ended: `SIGINT`, what a sweep stopped it for, or an error."""
    stopped_early: bool
    """Whether a sweep stopped it for good."""
    step: int
    """Optimizer steps taken."""
    tokens: int | None
    """Tokens trained on, over all processes."""
    planned_steps: int | None
    """Steps of the whole run; unknown for an old run whose length is given in epochs."""
    seconds: float | None
    """Training time of all sessions together."""
    best_loss: float | None
    """The lowest held-out loss of any evaluation, in nats per token."""
    best_step: int | None
    last_loss: float | None
    """The held-out loss of the newest evaluation."""
    bits_per_byte: float | None
    """Of the newest evaluation; comparable between tokenizers."""
    tokens_per_sec: float | None
    """Of the newest log line."""
    parameters: int | None
    model: str
    """`bdh`, `gpt`, ..."""
    precision: str
    """The formats of computation and weights: `bf16, nf4 weights`."""

    @property
    def parent(self) -> Mapping[str, Any]:
        """The run that a fork goes on from, as `read_fork` wrote it: `run`, `path`, `step`, ...;
        empty for other runs."""
        return as_dict(self.environment.get(PARENT))

    @property
    def step_factor(self) -> int:
        """How many times as long a step is as the config makes it with one process: a config that
        does not set its tokens leaves that to the number of processes."""
        if self.config.get("training.tokens_per_step") is not None:
            return 1
        return as_count(self.size.get("processes")) or 1

    @property
    def records(self) -> list[dict[str, Any]]:
        """All of metrics.jsonl in order, read once, without damaged lines."""
        return self._read_once[0]

    @property
    def record_problems(self) -> tuple[str, ...]:
        """One line about what `records` leaves out, if anything."""
        return self._read_once[1]

    @cached_property
    def _read_once(self) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        return read_records(self.path)


def read_run(path: Path) -> Run:
    """Reads a run directory; raises DataError if `path` is none.

    Must not be called by the process that writes the run: POSIX drops all of a process's locks on a
    file when it closes any descriptor of that file, so looking at the lock would release it.
    """
    if not is_run(path):
        raise DataError(f"{path} is not a run directory: it holds no {METRICS} and no checkpoint.")
    problems: list[str] = []
    environment = _read_environment(path, problems)
    config = _read_config(path, environment, problems)
    tail = read_tail(path, environment.pop(METRICS_BYTES, None), problems)
    size, ended = as_dict(environment.get("run")), as_dict(environment.get("ended"))
    newest = tail.newest
    step, tokens = _progress(path, newest, ended, as_count(size.get("tokens_per_step")))
    times = [as_float(ended.get("elapsed_s")), as_float(newest.get("time"))]
    losses = [as_float(newest.get(f"{prefix}/val_loss")) for prefix in ("eval", "final")]
    planned = as_count(size.get("planned_steps"))
    if planned is None and config.get("training.epochs") is None:
        planned = as_count(config.get("training.max_iters"))
    state = _known_state(path, ended.get("state"), tail, config)
    state = state or _guessed_state(path, step, config)
    early = _stopped_early(path, step) if state == "stopped" else ""
    return Run(
        path=path,
        name=os.path.basename(os.path.abspath(path)),
        config=config,
        environment=environment,
        size=size,
        newest=newest,
        problems=tuple(problems),
        state=state,
        end_reason=early or as_str(ended.get("reason")),
        stopped_early=bool(early),
        step=step,
        tokens=tokens,
        planned_steps=planned,
        seconds=max((time for time in times if time is not None), default=None),
        best_loss=tail.best_loss,
        best_step=tail.best_step,
        last_loss=next((loss for loss in losses if loss is not None), None),
        bits_per_byte=as_float(newest.get("eval/bits_per_byte")),
        tokens_per_sec=as_float(newest.get("train/tokens_per_sec")),
        parameters=as_count(size.get("parameters")),
        model=as_str(config.get("model.name")),
        precision=_precision(config, as_str(size.get("precision"))),
    )


def find_runs(paths: Sequence[Path] = ()) -> list[Path]:
    """Returns the run directories that the paths mean, each once; raises DataError.

    A path is a run, a file in a run, or a folder of runs; without paths: `checkpoints`.
    """
    found: dict[Path, Path] = {}
    for path in paths or [FOLDER]:
        runs = runs_in(path.parent, depth=0) if path.is_file() else runs_in(path)
        if not runs:
            raise DataError(f"{path}: {'holds no runs' if path.is_dir() else 'no such run'}.")
        found |= {run.resolve(): run for run in runs}
    return list(found.values())


def path_of(word: str) -> Path:
    """Returns the word as a path if it exists, else the run that it names; raises DataError."""
    path = find_by_name(word)
    if os.path.exists(path):
        return path
    runs = runs_in(FOLDER)
    there = f"{FOLDER} holds {shown_names(runs)}" if runs else f"{FOLDER.resolve()} holds no runs"
    raise DataError(f"{word}: no such run, checkpoint or folder; {there}.")


def restart_command(run: Run) -> str:
    """Returns the shell command that repeats the run.

    This is the command that first started it. If that is unknown, or a later session changed the
    config, it is one that reads the saved config.
    """
    command, processes = run.environment.get("command"), run.environment.get("processes")
    words = command if isinstance(command, list) else []
    known = words and all(isinstance(word, str) for word in words) and words[0].endswith(".py")
    # A resume that changed options kept the former config as config.before_<step>.yaml: the first
    # command no longer describes the run.
    if not known or any(run.path.glob("config.before_*")):
        words, processes = ["train.py", "--config", os.fspath(run.path / CONFIG)], None
    # Older versions wrote the number of processes only under `run`.
    count = as_count(processes) or as_count(run.size.get("processes")) or 1
    launcher = f"torchrun --standalone --nproc_per_node={count}" if count > 1 else "python"
    folder = as_str(run.environment.get("folder"))
    change = f"cd {shlex.quote(folder)} && " if folder and folder != os.getcwd() else ""
    return f"{change}{launcher} {shlex.join(words)}"


def _progress(
    path: Path, newest: Mapping[str, Any], ended: Mapping[str, Any], tokens_per_step: int | None
) -> tuple[int, int | None]:
    """Returns the steps taken and the tokens trained on.

    A run that was stopped writes them down. One that was killed got at least as far as its newest
    record or checkpoint.
    """
    end_step, logged = as_count(ended.get("step")), as_count(newest.get("step")) or 0
    step = max([logged, *(steps_in(path) if end_step is None else [end_step])])
    if step == end_step and (end_tokens := as_count(ended.get("tokens"))) is not None:
        return step, end_tokens
    tokens = as_count(newest.get("tokens"))  # at step `logged`
    if tokens_per_step is None:
        return step, tokens
    if tokens is None:
        return step, step * tokens_per_step
    return step, tokens + (step - logged) * tokens_per_step


def _precision(config: Mapping[str, Any], computed: str) -> str:
    """Returns the formats that a run computes and keeps its weights and optimizer in.

    computed: the data type that it wrote down, which is not the one asked for if the device has no
    such type; '' for old runs.
    """
    low = {k.partition(".")[2]: v for k, v in config.items() if k.startswith("low_precision.")}
    computed = computed or as_str(low.get("compute_dtype"))
    parts = ["fp8" if low.get("use_fp8") is True else _SHORT_DTYPES.get(computed, computed)]
    if low.get("residual_dtype") == "bfloat16":
        parts.append("bf16 residual stream")
    if low.get("use_4bit") is True:
        adapters = " with LoRA" if low.get("lora_rank") is not None else ""
        parts.append(f"{as_str(low.get('quantization_type'))} weights{adapters}")
    if low.get("use_4bit_optimizer") is True:
        parts.append("4-bit AdamW")
    elif config.get("optimizer.name") == "adamw_8bit":
        parts.append("8-bit AdamW")
    return ", ".join(part for part in parts if part)


# ---- environment.json and config.yaml


def _read_environment(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_environment(path)
    except OSError as error:
        problems.append(f"{ENVIRONMENT}: {os_error_text(error)}")
    except ValueError as error:
        problems.append(f"{ENVIRONMENT}: {error}")
    return {}


def _read_config(
    path: Path, environment: Mapping[str, Any], problems: list[str]
) -> Mapping[str, Any]:
    """Returns the config as the run saved it, flat and with this version's defaults.

    The copy in environment.json is used rather than config.yaml: it is parsed 50 times as fast, and
    users edit config.yaml.
    """
    copy = as_dict(environment.get("config"))
    values = flat_options(as_dict(copy.get("values")))
    try:
        data = read_regular(path / CONFIG, MAX_BYTES)
    except OSError as error:
        used = f"; its copy in {ENVIRONMENT} is used" if values else ""
        problems.append(f"{CONFIG}: {os_error_text(error)}{used}")
    else:
        sha256 = hashlib.sha256(data).hexdigest()
        # environment.json is written before the config.yaml that it describes. After a crash in
        # between, config.yaml is still the one that was to be replaced, and is the valid one.
        if not values or sha256 == copy.get("replaces"):
            values = _read_yaml(path / CONFIG, data, problems)
        elif sha256 != copy.get("sha256"):
            problems.append(f"{CONFIG}: {NOT_SAVED}")
    if not values:
        return {}
    known = {k: o.default for k, o in schema().options.items() if not o.entry_options}
    unknown = [key for key in values if schema().find(key) is None]
    if unknown:
        problems.append(f"{CONFIG}: options unknown to this version: {', '.join(unknown)}")
    return known | values


def _read_yaml(path: Path, data: bytes, problems: list[str]) -> dict[str, Any]:
    """Reads config.yaml as `train.py` does; if that refuses the file, option by option."""
    if not data.strip():  # an empty config is valid for train.py, but no run saves one
        problems.append(f"{CONFIG}: empty")
        return {}
    try:
        with redirect_stderr(io.StringIO()):  # the notes about aliases
            return flat_options(Config.from_yaml(path).to_dict())
    except ConfigError as error:
        refused = str(error).removeprefix(f"{path}:").splitlines()
    entries, _ = read_file(path, 1)
    values = dict[str, Any]()
    for section in entries:
        for entry in section.value.entries if isinstance(section.value, Group) else ():
            if isinstance(entry.value, Scalar):
                values |= _read_option(f"{section.key}.{entry.key}", entry.value)
    more = f" (and {len(refused) - 1} more lines)" if len(refused) > 1 else ""
    what = "taken option by option, because" if values else "cannot be read:"
    problems.append(f"{CONFIG}: {what} {refused[0]}{more}")
    return values


def _read_option(key: str, value: Scalar) -> dict[str, Any]:
    """Returns one option under its present name; as text if this version does not accept it."""
    try:
        options = schema().options
        return {name: read_scalar(options[name], value) for name in resolve(schema(), key).keys}
    except (RefusedError, KeyError):
        return {key: value.text}


# ---- state


def _known_state(path: Path, ended: Any, tail: Tail, config: Mapping[str, Any]) -> str:
    """Returns the state by the run's lock or by what it wrote at its end; '' if neither tells.

    A run that was killed between its final record and its last checkpoint is not done.
    """
    lock = _lock_state(path / LOCK)
    if lock == "held":
        return "running"
    if ended in ("done", "stopped", "failed"):
        return "crashed" if ended == "failed" else str(ended)
    if any(key.startswith("final/") for key in tail.newest) and (
        config.get("training.save_model") is False or tail.newest["step"] in steps_in(path)
    ):
        return "done"
    recent = abs(time.time() - tail.modified_s) < _RECENT_S
    return "running" if lock == "unseen" and recent else ""


def _guessed_state(path: Path, step: int, config: Mapping[str, Any]) -> str:
    """Returns `stopped` for a run whose newest checkpoint was not due at its step, else `crashed`.

    For runs of versions that did not write how they ended: a stop saves at once, whatever the step.
    """
    saved = max(steps_in(path), default=-1)
    every = as_count(config.get("training.checkpoint_freq"))
    return "stopped" if saved >= step and saved % (every or saved + 1) else "crashed"


def _stopped_early(path: Path, step: int) -> str:
    """Returns why a sweep stopped the run at this step; '' if none did, or the run went on since
    then."""
    try:
        record = as_dict(json.loads(read_regular(path / STOPPED_EARLY, MAX_BYTES)))
    except (OSError, ValueError, RecursionError):
        return ""
    return as_str(record.get("reason")) if record.get("step") == step else ""


def _lock_state(path: Path) -> str:
    """Returns `held`, `free` (last held on this machine), or `unseen`: missing, or held elsewhere.

    Locks of other machines on a network file system are not always visible.
    """
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except OSError:
        return "unseen"
    try:
        if _is_locked(descriptor):
            return "held"
        owner = os.read(descriptor, 300).split()
    except OSError:
        return "unseen"
    finally:
        os.close(descriptor)
    return "free" if owner[:2] == [b"host", os.uname().nodename.encode()] else "unseen"


def _is_locked(descriptor: int) -> bool:
    """Returns whether another process holds a lock on the file."""
    # F_GETLK only asks whether this lock (exclusive, whole file) could be taken. Taking it to find
    # out would make a `train.py` that starts or resumes at this moment fail.
    request = dict.fromkeys(_FLOCK_FIELDS, 0) | {"l_type": fcntl.F_WRLCK, "l_whence": os.SEEK_SET}
    packed = struct.pack(_FLOCK_LAYOUT, *request.values())
    answer = struct.unpack(_FLOCK_LAYOUT, fcntl.fcntl(descriptor, fcntl.F_GETLK, packed))
    # The kernel answers with the lock that is in the way, or sets l_type to F_UNLCK.
    return bool(dict(zip(_FLOCK_FIELDS, answer, strict=True))["l_type"] != fcntl.F_UNLCK)
