"""Which checkpoint a user means: by a file, a run, a folder of runs, or `auto`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from config import CheckpointError, Config, ConfigError
from engine.checkpoint.load import check_format
from engine.checkpoint.resume_rules import fixed_options
from engine.run_directory.environment import command_words
from engine.run_directory.environment_file import read_environment, sessions_of
from engine.run_directory.find_checkpoint import (
    Resume,
    newest_run,
    newest_valid,
    open_checkpoint,
    resolve_foreign_name,
)
from engine.run_directory.find_runs import find_by_name
from engine.run_directory.manifest import (
    CONFIG,
    ENVIRONMENT,
    best_step,
    complete_checkpoints,
    data_path,
    manifest_path,
    verify,
)
from engine.run_directory.saved_config import read_config
from model.torch_file import load_torch_file
from settings.slurm import slurm_job, was_requeued


def resolve_resume(
    value: str, checkpoint_dir: Path, differing: Callable[[Config], list[str]]
) -> tuple[Resume | None, list[str]]:
    """Returns the checkpoint meant by `training.resume_from_checkpoint`, and lines for the user.

    The checkpoint is None for a fresh start: if `auto` finds no run to go on with.

    A job that SLURM put back into the queue continues the run that it wrote before, and not where
    `value` let that begin.

    Args:
        value: a checkpoint; a run directory or part of its name, for its newest valid checkpoint;
            a folder of runs, for that of its newest run; or `auto`, for that of the newest run
            whose saved config has nothing `differing`.
        checkpoint_dir: where `auto` and names of runs are looked for.
        differing: returns the options that make a saved config another experiment.

    Raises CheckpointError.
    """
    path = None if value == "auto" else find_by_name(value, checkpoint_dir)
    near = (path, path.parent) if path else ()
    own = _run_of_this_job([*near, *(path or checkpoint_dir).glob("run_*")])
    if own is not None:
        newest, rejects = newest_valid(own)
        lines = [f"not used: {line}" for line in rejects]
        why = f"{own} is the run of this SLURM job ({slurm_job()})"
        if newest is not None:
            return newest, [*lines, f"{why}: continuing it"]
        if path is None:
            return None, [*lines, f"{why}, without a checkpoint yet: starting a new one"]
    if path is None:
        return _newest_of_experiment(checkpoint_dir, differing)
    resume, lines = _find(path)
    if not (resume.run_dir / CONFIG).exists():
        raise CheckpointError(
            f"{resume.path}: no {CONFIG} beside it. Resuming continues in the run directory; "
            "give the checkpoint inside it."
        )
    return resume, lines


def resolve_fork(value: str, checkpoint_dir: Path) -> tuple[Resume, list[str]]:
    """Returns the checkpoint meant by `training.fork_from_checkpoint`, and lines for the user.

    value: a checkpoint; a run directory or part of its name, for its newest valid checkpoint; a
    folder of runs, for that of its newest run. Raises CheckpointError.
    """
    return _find(find_by_name(value, checkpoint_dir))


def _run_of_this_job(runs: Iterable[Path]) -> Path | None:
    """Returns the newest run that this SLURM job wrote, with this command line, before a requeue.

    A job may train several runs, one after the other: the command line tells them apart. It names
    the config's file and not its content, so an edit of the file does not hide the run.
    """
    own = slurm_job(), command_words()
    for run in sorted(runs, reverse=True) if was_requeued() else ():
        with contextlib.suppress(OSError, ValueError):
            for session in sessions_of(read_environment(run)):
                if (session.get("slurm_job"), session.get("command")) == own:
                    return run
    return None


def find_model(path: Path) -> tuple[Path, list[str]]:
    """Returns the checkpoint to read a model from, and lines for the user.

    A file is that one. A run directory means its last checkpoint; or its best, that of lowest
    held-out loss, if `training.always_save_checkpoint` is false, which asks for the best.
    """
    lines: list[str] = []
    if path.is_dir():
        folder = newest_run(path)
        complete = complete_checkpoints(folder)
        best, last = best_step(complete), max(complete, default=None)
        if best is not None and best != last and not _saves_always(folder):
            checkpoint, loss = data_path(folder, best), complete[best].val_loss
            try:
                verify(checkpoint)
            except CheckpointError as error:
                lines.append(f"not used: {error}")
            else:
                text = f"{checkpoint} is the best of its run (held-out loss {loss:.4f})."
                return checkpoint, [f"{text} The last one is checkpoint_{last}.pt."]
    resume, found_lines = _find(path)
    return resume.path, [*lines, *found_lines]


def _find(path: Path) -> tuple[Resume, list[str]]:
    """Returns the checkpoint meant by a file, a run directory or a folder of runs, and a line for
    each newer one that is damaged."""
    if path.is_dir():
        return _newest_in(newest_run(path))
    path = resolve_foreign_name(path)
    try:
        if path.is_file() and not manifest_path(path).exists():
            # For its error only: "not a checkpoint of this trainer" helps more than "no manifest".
            check_format(path, load_torch_file(path, mmap=True))
        return open_checkpoint(path), []
    except CheckpointError as error:
        newest, _ = newest_valid(path.parent)
        if newest is None:
            raise
        raise CheckpointError(f"{error} Newest valid: {newest.path.name}.") from None


def _newest_in(run: Path) -> tuple[Resume, list[str]]:
    newest, rejects = newest_valid(run)
    if newest is not None:
        return newest, [f"not used: {line}" for line in rejects]
    reasons = "".join(f"\n  {line}" for line in rejects)
    if (run / "ckpt.pt").exists():
        reasons += (
            " It holds ckpt.pt of nanoGPT, whose batches cannot be drawn again: "
            f"training.init_from={run / 'ckpt.pt'} starts a new run with its weights, from step 0 "
            "and without its optimizer moments."
        )
    if not rejects and (run / ENVIRONMENT).exists():
        reasons += (
            " It ended before its first one, so there is nothing to resume. To train it "
            f"again: python train.py --config {run / CONFIG}"
        )
    raise CheckpointError(f"{run}: no valid checkpoint in it.{reasons}")


def _newest_of_experiment(
    checkpoint_dir: Path, differing: Callable[[Config], list[str]]
) -> tuple[Resume | None, list[str]]:
    lines: list[str] = []
    nearest: tuple[list[str], Path, Config] | None = None
    runs = (path for path in checkpoint_dir.glob("run_*") if path.is_dir())
    for run in sorted(runs, reverse=True):
        try:
            config, problem = read_config(run)
            lines += [f"{run.name}: {CONFIG}: {problem}"] if problem else []
            keys = differing(config)
            if not keys:
                resume, found_lines = _newest_in(run)
                return resume, [*lines, *found_lines]
        except (CheckpointError, ConfigError, OSError) as error:
            lines.append(f"skipped {run.name}: {error}")
            continue
        if nearest is None or len(keys) < len(nearest[0]):
            nearest = keys, run, config
    if nearest is None:
        lines.append(f"auto: no run to resume in {checkpoint_dir}; starting a new one")
    else:
        keys, run, config = nearest
        first = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        lines.append(
            f"auto: no run in {checkpoint_dir} has this config (nearest: {run.name}, which "
            f"differs in {first}); starting a new one"
        )
        if not fixed_options(config).intersection(keys):
            lines[-1] += f"; to go on with it: resume_from_checkpoint={run}"
    return None, lines


def _saves_always(run: Path) -> bool:
    try:
        return Config.from_yaml(run / CONFIG).training.always_save_checkpoint
    except (ConfigError, OSError):
        return True
