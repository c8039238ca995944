"""`--check-resume`: whether a run that is interrupted and resumed is the same run, here.

On the user's own config, data and device: some steps straight; as many with an interruption in the
middle, saved to disk and built anew; then weights, optimizer, random generators and the place in
the data are compared bit for bit. An evaluation falls into the steps, and 4-bit weights set in
before the interruption, so that both are covered. Where the runs differ, two straight ones are
compared as well: a device that never computes the same twice is another matter than a checkpoint
that lacks something.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, ConfigError, Request, WriteError, micro_batch
from engine.checkpoint.load import load_checkpoint
from engine.hardware.distributed import World
from engine.monitor import console
from engine.planning.batch_size import with_batch
from engine.setup.build import build
from engine.signals import StopRequest
from engine.trainer import Trainer
from files.write_errors import check_writable

Loop = Callable[[Trainer, StopRequest], None]

_PREFIX = ".check_"
COMPARED = ("model", "optimizer", "precision", "train", "cursor", "rng")
TIMED = ("train.elapsed_s",)


class StopAfter(StopRequest):
    """Stops a run after so many steps, or when the `other` stop is asked for."""

    def __init__(self, other: StopRequest, run: Trainer, steps: int) -> None:
        super().__init__()
        self.other, self._run, self._steps = other, run, steps

    def __bool__(self) -> bool:
        ended = self._run.state.finished(
            self._run.config.training
        )  # by itself, with its last evaluation
        return bool(self.other) or (self._run.state.step >= self._steps and not ended)

    def join(self) -> None:
        """Another process was asked to stop; at the last step all are there anyway."""
        if self._run.state.step < self._steps:
            self.other.join()


def check_resume(request: Request, world: World, stop: StopRequest, loop: Loop) -> int:
    """Trains and compares; the exit code, 0 where the runs are the same. Leaves no files.

    The run begins anew, whatever it is to resume from: a run directory is not touched.
    """
    assert request.check_resume is not None
    steps = min(request.check_resume, request.config.training.max_iters)
    check_length(steps, "training.max_iters")
    request = replace(request, config=covering(request.config, steps))
    with ExitStack() as stack:
        folder = Path(world.broadcast(_folder(request, stack) if world.is_main else ""))
        trial = Trial(request, world, stop, loop, folder)
        straight = trial.run("straight", steps)
        if not stop and trial.made < steps:  # the data ended first
            steps = trial.made
            check_length(steps, "the data ends after it: training.epochs")
        half = trial.run("interrupted", steps // 2)
        resumed = trial.run("interrupted", steps, resume_from=half)
        if stop:
            console.info("The check was stopped: nothing is known of resuming.")
            return stop.exit_code
        same = world.broadcast(_told(straight, resumed, steps) if world.is_main else True)
        if not same:
            again = trial.run("again", steps)
            if world.is_main and not stop:
                _blame(straight, again)
    return 0 if same else 1


def check_length(steps: int, why: str) -> None:
    """Raises ConfigError where there is no step to interrupt after."""
    if steps < 2:
        raise ConfigError(f"--check-resume: nothing to interrupt in a run of {steps} ({why}).")


def covering(config: Config, steps: int) -> Config:
    """The config with a short evaluation at the interruption, and 4-bit weights before it."""
    training, low = config.training, config.low_precision
    if training.test_freq is not None:
        few = min(2, training.eval_iters)
        training = replace(training, test_freq=max(1, steps // 2), eval_iters=few)
    early = min(low.quantize_after, (steps // 4) / training.max_iters)
    low = replace(low, quantize_after=early) if low.use_4bit else low
    return replace(config, training=training, low_precision=low)


class Trial:
    """Runs of the same request, in folders of their own below `folder`."""

    def __init__(
        self, request: Request, world: World, stop: StopRequest, loop: Loop, folder: Path
    ) -> None:
        self._request, self._world = request, world
        self._stop, self._loop, self._folder = stop, loop, folder
        self.made = 0
        """Steps of the newest run."""

    def run(self, name: str, steps: int, resume_from: Path | None = None) -> Path:
        """Trains until `steps` steps are done, saves, and gives the checkpoint; after a stop,
        nothing that counts."""
        if self._stop:
            return self._folder
        console.info("", f"Check of resuming: {name}, to step {steps}", console.RULE)
        config, fresh = self._request.config, {"resume": "scratch"}
        training = replace(
            config.training,
            checkpoint_dir=str(self._folder / name),
            resume_from_checkpoint=None if resume_from is None else str(resume_from),
            init_from=fresh.get(config.training.init_from, config.training.init_from),
            save_model=True,
            eval_only=False,
        )
        logging = replace(config.logging, wandb_log=False, tensorboard=False)
        config = replace(config, training=training, logging=logging)
        with ExitStack() as stack:
            run = build(replace(self._request, config=config), self._world, stack)
            batch, evaluated = micro_batch(run.config), run.config.training.eval_batch_size
            settled = with_batch(self._request.config, batch, evaluated)  # `auto`, once for all
            self._request = replace(self._request, config=settled)
            self._loop(run, StopAfter(self._stop, run, steps))
            self.made = run.state.step
            if self._stop:
                return self._folder
            run.save(final=True)
            assert run.directory.last_checkpoint is not None
            return run.directory.last_checkpoint


def _folder(request: Request, stack: ExitStack) -> str:
    """A folder for the trials beside the run directories, where there is room for checkpoints."""
    parent = Path(request.config.training.checkpoint_dir)
    check_writable(parent)
    new = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for made in reversed(new):
            stack.callback(_remove_empty, made)
        _remove_left_behind(parent)
        mine = f"{_PREFIX}{socket.gethostname()}_{os.getpid()}_"
        return stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=mine))
    except OSError as error:
        raise WriteError(f"{parent}: no folder can be made in it: {error.strerror}.") from error


def _remove_left_behind(parent: Path) -> None:
    """Removes the folders of checks on this machine that were killed."""
    for folder in parent.glob(f"{_PREFIX}{socket.gethostname()}_*"):
        owner = folder.name.split("_")[-2]
        if owner.isdecimal() and not Path("/proc", owner).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another run has begun to use it
        folder.rmdir()


def _told(straight: Path, resumed: Path, steps: int) -> bool:
    """Says whether the two checkpoints are the same, else where they differ first."""
    count, difference = compared(straight, resumed)
    console.info("", console.RULE)
    if difference is None:
        console.info(
            f"The same: {steps} steps straight, and {steps} interrupted after {steps // 2}, agree "
            f"in all {count} values, bit for bit."
        )
    else:
        console.info(f"Not the same after {steps} steps: {difference}")
    return difference is None


def _blame(straight: Path, again: Path) -> None:
    """Says whether the device computes the same twice at all."""
    difference = compared(straight, again)[1]
    if difference is None:
        console.info(
            "Two straight runs are the same: what a checkpoint holds or puts back is not all."
        )
    else:
        console.info(
            f"Two straight runs differ as well ({difference}): this device or its compiler does"
        )
        console.info("not compute the same twice, so that no resumed run can be told from another.")


def compared(one: Path, other: Path) -> tuple[int, str | None]:
    """How many values of two checkpoints were compared, and the first that differs, in words."""
    count, first, second = 0, load_checkpoint(one), load_checkpoint(other)
    for key in COMPARED:
        for mine, yours in zip_longest(_leaves(first[key], key), _leaves(second[key], key)):
            if mine is None or yours is None or mine[0] != yours[0]:
                here = (mine or yours or ("",))[0]
                return count, f"{here} is in one of them only"
            count += 1
            difference = _difference(mine[1], yours[1])
            if difference and mine[0] not in TIMED:
                return count, f"{mine[0]} {difference}"
    return count, None


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value below, with its name."""
    if isinstance(value, dict):
        for key in value:
            yield from _leaves(value[key], f"{place}.{key}")
    elif isinstance(value, (list, tuple)) and len(value) <= _LONGEST:
        for number, item in enumerate(value):
            yield from _leaves(item, f"{place}[{number}]")
    else:
        yield place, value


_LONGEST = 64
"""Longer lists, such as the state of a generator, are compared as one value."""


def _difference(one: Any, other: Any) -> str:
    """Empty where two values are the same bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"is {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
        if torch.equal(_bits(one), _bits(other)):
            return ""
        apart = (one.double() - other.double()).abs()
        return (
            f"differs in {int((_bits(one) != _bits(other)).sum()):,} of {one.numel():,} numbers, "
            f"by at most {apart.max():.3g} where the largest is {one.double().abs().max():.3g}"
        )
    if type(one) is type(other) and one == other:
        return ""
    return f"is {_short(one)} and {_short(other)}"


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as whole numbers: -0.0 is not 0.0, and NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
