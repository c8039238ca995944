"""One run directory as it lies on disk, whatever its age and whatever is missing. Imports no torch.

The one idea: a thousand runs are listed in a second, because of `metrics.jsonl` only the end is
read, and YAML only where `environment.json` does not hold the same values already. What cannot be
read becomes a line in `problems`, never an exception. Nothing is written, no lock is taken.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shlex
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compare.records import mapping, number, read_records, read_tail, reason, text, whole
from config import Config, ConfigError, DataError, schema
from engine.run_directory.find_runs import FOLDER, is_run, runs_in
from engine.run_directory.manifest import CONFIG, ENVIRONMENT, LOCK, MAX_BYTES, METRICS, steps_in
from engine.run_directory.run_files import METRICS_BYTES, NOT_SAVED, read_environment
from files.regular import open_regular, read_regular
from settings.names import resolve
from settings.reader import Group, read_file
from settings.values import RefusedError, Scalar, read_scalar

_FRESH_S = 120  # a run elsewhere, whose lock cannot be seen, logs more often than this
_SHORT = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, eq=False)
class Run:
    """What is known of a run without reading its curves."""

    path: Path
    name: str
    config: Mapping[str, Any]
    """Flat (`training.learning_rate`), defaults filled in; empty if it cannot be read."""
    environment: Mapping[str, Any]
    state: str
    """done, stopped, crashed or running."""
    last: Mapping[str, Any]
    """The newest value of each metric at the end of metrics.jsonl."""
    best_loss: float | None
    """The lowest held-out loss of any evaluation."""
    best_step: int | None
    problems: tuple[str, ...]
    """What could not be read, one line each."""

    @property
    def step(self) -> int:
        """Optimizer steps done: as it said at its end, else by the newest record or checkpoint."""
        return self._progress[0]

    @property
    def planned_steps(self) -> int | None:
        """Length of the whole run; None where only its epochs are known."""
        known = whole(self.facts.get("planned_steps"))
        if known is None and self.config.get("training.epochs") is None:
            known = whole(self.config.get("training.max_iters"))
        return known

    @property
    def tokens(self) -> int | None:
        """Tokens trained on, over all processes."""
        return self._progress[1]

    @property
    def last_loss(self) -> float | None:
        """The newest held-out loss."""
        value = number(self.last.get("eval/val_loss"))
        return number(self.last.get("final/val_loss")) if value is None else value

    @property
    def bits_per_byte(self) -> float | None:
        """Of the newest evaluation: comparable over tokenizers."""
        return number(self.last.get("eval/bits_per_byte"))

    @property
    def tokens_per_sec(self) -> float | None:
        """Of the newest log line."""
        return number(self.last.get("train/tokens_per_sec"))

    @property
    def seconds(self) -> float | None:
        """How long it has trained, all sessions together."""
        times = number(self._ended.get("elapsed_s")), number(self.last.get("time"))
        return max((time for time in times if time is not None), default=None)

    @property
    def _ended(self) -> Mapping[str, Any]:
        return mapping(self.environment.get("ended"))

    @cached_property
    def _progress(self) -> tuple[int, int | None]:
        """Steps and tokens. The newest record may be of an earlier step than the end."""
        ended, logged = whole(self._ended.get("step")), whole(self.last.get("step")) or 0
        step = max([logged, *(steps_in(self.path) if ended is None else [ended])])
        tokens, per_step = whole(self.last.get("tokens")), whole(self.facts.get("tokens_per_step"))
        said = whole(self._ended.get("tokens"))
        if step == ended and said is not None:
            tokens = said
        elif per_step is not None and (tokens is None or step > logged):
            tokens = step * per_step if tokens is None else tokens + (step - logged) * per_step
        return step, tokens

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the run wrote down of its size at its start; empty for older runs."""
        return mapping(self.environment.get("run"))

    @property
    def parameters(self) -> int | None:
        return whole(self.facts.get("parameters"))

    @property
    def model(self) -> str:
        """`bdh`, `gpt`, ...; empty if unknown."""
        return text(self.config.get("model.name"))

    @property
    def precision(self) -> str:
        """What it computes and keeps in: `bf16, nf4 weights`; empty if unknown."""
        low = {k.partition(".")[2]: v for k, v in self.config.items() if k.startswith("low_")}
        computed = text(self.facts.get("precision")) or text(low.get("compute_dtype"))
        parts = ["fp8" if low.get("use_fp8") is True else _SHORT.get(computed, computed)]
        if low.get("use_4bit") is True:
            adapters = " with LoRA" if low.get("lora_rank") is not None else ""
            parts.append(f"{text(low.get('quantization_type'))} weights{adapters}")
        if low.get("use_4bit_optimizer") is True:
            parts.append("4-bit AdamW")
        elif self.config.get("optimizer.name") == "adamw_8bit":
            parts.append("8-bit AdamW")
        return ", ".join(part for part in parts if part)

    @property
    def reason(self) -> str:
        """Why it ended: `SIGINT`, an error; empty if it says nothing of that."""
        return text(self._ended.get("reason"))

    def records(self) -> list[dict[str, Any]]:
        """All of metrics.jsonl in order, read once; broken lines are left out."""
        return self._read[0]

    @property
    def problems_of_records(self) -> tuple[str, ...]:
        """What `records` left out, one line."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        return read_records(self.path)


def read_run(path: Path) -> Run:
    """Reads what there is; DataError if `path` is no run directory.

    Not for the process that writes the run: looking at a POSIX lock file gives up one's own lock.
    """
    if not is_run(path):
        raise DataError(f"{path} is not a run directory: it holds no {METRICS} and no checkpoint.")
    problems: list[str] = []
    environment = _read_environment(path, problems)
    config = _read_config(path, environment, problems)
    written = environment.pop(METRICS_BYTES, None)
    last, best, changed = read_tail(path, written, problems)
    name = os.path.basename(os.path.abspath(path))
    run = Run(path, name, config, environment, "", last, *best, tuple(problems))
    return replace(run, state=_state(run, changed))


def find_runs(paths: Sequence[Path] = ()) -> list[Path]:
    """Each path is a run, a file in one or a folder of them (checkpoints); raises DataError."""
    found: dict[Path, Path] = {}
    for path in paths or [FOLDER]:
        runs = runs_in(path.parent, depth=0) if path.is_file() else runs_in(path)
        if not runs:
            raise DataError(f"{path}: {'holds no runs' if path.is_dir() else 'no such run'}.")
        found |= {run.resolve(): run for run in runs}
    return list(found.values())


def restart_command(run: Run) -> str:
    """What to type to make the run again: its own first command, where it was given; its saved
    config where that is unknown, or a later session changed it."""
    command, processes = run.environment.get("command"), whole(run.environment.get("processes"))
    words = command if isinstance(command, list) else []
    known = words and all(isinstance(word, str) for word in words) and words[0].endswith(".py")
    if not known or any(run.path.glob("config.before_*")):
        words, processes = ["train.py", "--config", os.fspath(run.path / CONFIG)], None
    count = processes or whole(run.facts.get("processes")) or 1
    several = f"torchrun --standalone --nproc_per_node={count}"
    folder = text(run.environment.get("folder"))
    there = f"cd {shlex.quote(folder)} && " if folder and folder != os.getcwd() else ""
    return f"{there}{several if count > 1 else 'python'} {shlex.join(words)}"


# ---- environment.json and config.yaml


def _read_environment(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_environment(path)
    except OSError as error:
        problems.append(f"{ENVIRONMENT}: {reason(error)}")
    except ValueError as error:
        problems.append(f"{ENVIRONMENT}: {error}")
    return {}


def _read_config(
    path: Path, environment: Mapping[str, Any], problems: list[str]
) -> Mapping[str, Any]:
    copy = mapping(environment.get("config"))
    values = _flat(mapping(copy.get("values")))
    try:
        data = read_regular(path / CONFIG, MAX_BYTES)
    except OSError as error:
        used = f"; its copy in {ENVIRONMENT} is used" if values else ""
        problems.append(f"{CONFIG}: {reason(error)}{used}")
    else:
        sha256 = hashlib.sha256(data).hexdigest()
        if not values or sha256 == copy.get("replaces"):
            values = _read_yaml(path / CONFIG, data, problems)
        elif sha256 != copy.get("sha256"):
            problems.append(f"{CONFIG}: {NOT_SAVED}")
    if not values:
        return {}
    known = schema().options
    unknown = [key for key in values if key not in known]
    if unknown:
        problems.append(f"{CONFIG}: options unknown to this version: {', '.join(unknown)}")
    return {key: option.default for key, option in known.items()} | values


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, options in values.items()
        for name, value in mapping(options).items()
    }


def _read_yaml(path: Path, data: bytes, problems: list[str]) -> dict[str, Any]:
    """By the reader of `train.py`; where it refuses the file, each option by itself."""
    if not data.strip():  # an empty file means the defaults to it, and damage here
        problems.append(f"{CONFIG}: empty")
        return {}
    try:
        with redirect_stderr(io.StringIO()):  # the notes on aliases
            return _flat(Config.from_yaml(path).to_dict())
    except ConfigError as error:
        refused = str(error).removeprefix(f"{path}:").splitlines()
    entries, _ = read_file(path, 1)
    values: dict[str, Any] = {}
    for section in entries:
        if isinstance(section.value, Group):
            for entry in section.value.entries:
                if isinstance(entry.value, Scalar):
                    _take(values, f"{section.key}.{entry.key}", entry.value)
    more = f" (and {len(refused) - 1} more lines)" if len(refused) > 1 else ""
    what = "taken option by option, because" if values else "cannot be read:"
    problems.append(f"{CONFIG}: {what} {refused[0]}{more}")
    return values


def _take(values: dict[str, Any], key: str, value: Scalar) -> None:
    """Keeps one option under its name of today; as the text that it is where nothing takes it."""
    try:
        for target in resolve(schema(), key).keys:
            values[target] = read_scalar(schema().options[target], value)
    except (RefusedError, KeyError):
        values[key] = value.text


# ---- state


def _state(run: Run, changed: float) -> str:
    lock = _lock(run.path / LOCK)
    if lock == "held":
        return "running"
    ended = mapping(run.environment.get("ended")).get("state")
    if ended in ("done", "stopped", "failed"):
        return "crashed" if ended == "failed" else str(ended)
    if any(key.startswith("final/") for key in run.last):
        return "done"
    if lock == "unseen" and abs(time.time() - changed) < _FRESH_S:
        return "running"
    # Before runs wrote down how they ended: a save at an odd step is what a stop leaves behind.
    saved, every = max(steps_in(run.path), default=-1), run.config.get("training.checkpoint_freq")
    return "stopped" if saved >= run.step and saved % (whole(every) or saved + 1) else "crashed"


def _lock(path: Path) -> str:
    """held, free (by a process of this machine), or unseen: of another machine, or not there."""
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
    """Whether another process holds the whole file: asks (F_GETLK), takes nothing."""
    layout, at = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi0q", 0)
    request = [fcntl.F_WRLCK if field == at else 0 for field in range(5)]  # 0: from the start on
    answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *request))
    return bool(struct.unpack(layout, answer)[at] != fcntl.F_UNLCK)
