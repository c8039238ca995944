"""Where a run begins: new weights, weights of another model, or a checkpoint to continue."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from config import Config, ConfigError, Request, setting
from data.tokenizers.base import Tokenizer
from data.tokenizers.build import tokenizer_from_dict
from engine.checkpoint.find import resolve_fork, resolve_resume
from engine.checkpoint.load import checked_config, load_checkpoint
from engine.checkpoint.resume_rules import experiment_differences, resume_from_folder
from engine.hardware.distributed import World
from engine.monitor import console
from engine.run_directory.find_checkpoint import Resume
from engine.run_directory.fork import OPTION as FORK_FROM
from engine.run_directory.fork import means_parent
from engine.run_directory.manifest import CONFIG
from engine.run_directory.saved_config import check_config
from engine.setup.initial_weights import (
    keep_decided_options,
    read_weights,
    tokenizer_of_weights,
    with_shape_of,
)
from model.pretrained import Pretrained


@dataclass(frozen=True)
class StartingPoint:
    """Where a run begins, and what that decides of its config."""

    config: Config
    """As asked for, with the model's shape where weights decide it."""
    resume: Resume | None = None
    """The checkpoint whose state the run goes on from."""
    is_fork: bool = False
    """Whether it does so as a new run, in a directory of its own."""
    saved: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's content; empty where none is resumed. Emptied once it is loaded."""
    saved_config: Config | None = None
    weights: Pretrained | None = None
    """What a new run begins with in place of random numbers; None for a resumed one."""
    tokenizer: Tokenizer | None = None
    """The one the weights were trained with; None where the config's own counts."""
    lines: tuple[str, ...] = ()
    """What the weights changed in the config."""

    @property
    def continued(self) -> Resume | None:
        """The checkpoint in whose run directory the run goes on; None for a new run."""
        return None if self.is_fork else self.resume


def find_starting_point(request: Request, world: World) -> StartingPoint:
    """Reads the checkpoint or the weights that the config names; raises CheckpointError."""
    config = resume_from_folder(request.config)
    # The main process chooses: others might see a checkpoint that was written a moment later.
    resume = world.broadcast(find_resume(config, request) if world.is_main else None)
    if resume is not None:
        return _from_checkpoint(config, request, resume, is_fork=False)
    if config.training.fork_from_checkpoint is not None:
        return _from_checkpoint(config, request, world.on_main(partial(find_parent, config)), True)
    if config.training.init_from != "scratch":
        return _from_weights(config, request, world)
    return StartingPoint(config)


def _from_checkpoint(
    config: Config, request: Request, checkpoint: Resume, is_fork: bool
) -> StartingPoint:
    saved = load_checkpoint(checkpoint.path, mmap=True)
    saved_config = checked_config(checkpoint.path, saved)
    before, init_from = saved_config.training, config.training.init_from
    if is_fork and init_from not in ("scratch", before.init_from):
        raise ConfigError(
            f"{setting(config, 'training.init_from')}, but {setting(config, FORK_FROM)} is a run "
            f"that began with {before.init_from}; leave init_from out."
        )
    # What a run began with, it keeps.
    if is_fork or request.config.training.init_from == "resume":
        init_from = before.init_from
    parent = os.path.abspath(checkpoint.path) if is_fork else before.fork_from_checkpoint
    config = _begun_with(config, init_from, parent)
    tokenizer = None
    if init_from != "scratch":
        config = keep_decided_options(config, request, saved_config)
        if config.tokenizer.name == saved_config.tokenizer.name:
            tokenizer = tokenizer_from_dict(saved["tokenizer"])
    return StartingPoint(config, checkpoint, is_fork, saved, saved_config, tokenizer=tokenizer)


def _begun_with(config: Config, init_from: str, parent: str | None) -> Config:
    training = replace(config.training, init_from=init_from, fork_from_checkpoint=parent)
    return replace(config, training=training)


def _from_weights(config: Config, request: Request, world: World) -> StartingPoint:
    console.info(f"Reading the weights of {config.training.init_from}...")
    with world.main_first():  # one process downloads, the others find the file
        weights = read_weights(config, request)
    console.info(weights.source)
    tokenizer = tokenizer_of_weights(config, request, weights.tokenizer)
    config, lines = with_shape_of(config, request, weights, tokenizer)
    return StartingPoint(config, weights=weights, tokenizer=tokenizer, lines=tuple(lines))


def find_resume(config: Config, request: Request) -> Resume | None:
    """Returns the checkpoint that `resume_from_checkpoint` means; prints what was rejected."""
    wanted = config.training.resume_from_checkpoint
    if wanted is None:
        return None

    folder, word = Path(config.training.checkpoint_dir), config.training.fork_from_checkpoint

    def differing(saved: Config) -> list[str]:
        present, parent = config, saved.training.fork_from_checkpoint
        if means_parent(word, parent, folder):
            present = _begun_with(config, config.training.init_from, parent)
        return experiment_differences(saved, keep_decided_options(present, request, saved))

    resume, notes = resolve_resume(wanted, folder, differing)
    console.info(*notes)
    return resume


def find_parent(config: Config) -> Resume:
    """Returns the checkpoint that `fork_from_checkpoint` means; prints what was rejected."""
    word = config.training.fork_from_checkpoint
    assert word is not None
    checkpoint, notes = resolve_fork(word, Path(config.training.checkpoint_dir))
    console.info(*notes)
    return checkpoint


def check_own_config(files: Sequence[str], resume: Resume) -> None:
    """Raises CheckpointError where one of `files` is the config.yaml of the resumed run and was
    changed since the run saved it: an edit there would pass for what the run was."""
    own = resume.run_dir / CONFIG
    known = [file for file in files if os.path.exists(file)] if own.exists() else []
    if any(os.path.samefile(file, own) for file in known):
        check_config(resume.run_dir)
