"""`--check-resume`: trains the user's config on this device with and without an interruption.

One run makes N steps. Another is stopped and saved after N / 2, built anew from its checkpoint and
goes on to N. Their checkpoints must then agree bit for bit: weights, optimizer, random generators,
place in the data. If they differ, a third run tells whether this device computes the same twice at
all: if not, no checkpoint could be at fault. On CUDA all of them use deterministic algorithms: the
usual ones of attention and embedding add gradients in any order.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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

TrainingLoop = Callable[[Trainer, StopRequest], None]

COMPARED = ("model", "optimizer", "precision", "train", "cursor", "rng")
NOT_COMPARED = ("train.elapsed_s",)  # of these values only the presence counts
_PREFIX = ".check_"
_MAX_LIST = 64  # longer lists, such as the state of a generator, are compared as one value


class _StoppedError(Exception):
    """The user stopped the check."""


@dataclass
class CheckRun:
    """Trains variants of one request, each in its own folder below `folder`."""

    request: Request
    world: World
    stop: StopRequest
    loop: TrainingLoop
    folder: Path

    def train(self, name: str, steps: int, checkpoint: Path | None = None) -> tuple[Path, int]:
        """Trains from the beginning or from a checkpoint until `steps` steps are done.

        Returns the checkpoint it saved and the steps done: fewer where the data ended. Raises
        _StoppedError after a signal.
        """
        console.info("", f"Check of resuming: {name}, to step {steps}", console.RULE)
        config = self.request.config
        begins = "scratch" if config.training.init_from == "resume" else config.training.init_from
        training = replace(
            config.training,
            checkpoint_dir=str(self.folder / name),
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
            fork_from_checkpoint=None,
            init_from=begins,
            save_model=True,
            eval_only=False,
        )
        logging = replace(config.logging, wandb_log=False, tensorboard=False)
        variant = replace(config, training=training, logging=logging)
        with ExitStack() as stack:
            trainer = build(replace(self.request, config=variant), self.world, stack)
            # `batch_size: auto` depends on the memory that is free, so that the first run decides
            # for all: another batch size rounds differently.
            batch, eval_batch = micro_batch(trainer.config), trainer.config.training.eval_batch_size
            config = with_batch(config, batch, eval_batch)
            self.request = replace(self.request, config=config)
            trainer.stop_after = steps
            self.loop(trainer, self.stop)
            if self.stop:
                raise _StoppedError
            trainer.save(final=True)
            assert trainer.directory.last_checkpoint is not None
            return trainer.directory.last_checkpoint, trainer.state.step


def check_resume(request: Request, world: World, stop: StopRequest, loop: TrainingLoop) -> int:
    """Trains and compares; returns the exit code, 0 where the runs are the same.

    The runs begin anew, whatever the request resumes from. They leave no files.
    """
    assert request.check_resume is not None
    steps = min(request.check_resume, request.config.training.max_iters)
    _check_length(steps, "training.max_iters")
    request = replace(request, config=_covering(request.config, steps))
    with ExitStack() as stack:
        if world.device.type == "cuda":
            stack.enter_context(deterministic_algorithms())
        folder = stack.enter_context(_folder(request.config)) if world.is_main else ""
        run = CheckRun(request, world, stop, loop, Path(world.broadcast(folder)))
        try:
            straight, made = run.train("straight", steps)
            if made < steps:
                steps = made
                _check_length(steps, "the data ends after it: training.epochs")
            half, _ = run.train("interrupted", steps // 2)
            resumed, _ = run.train("interrupted", steps, half)
            # Only rank 0 reads the checkpoints, and what it finds decides what all do next.
            same = world.broadcast(_report(straight, resumed, steps) if world.is_main else True)
            if not same:
                again, _ = run.train("again", steps)
                if world.is_main:
                    _report_cause(straight, again)
        except _StoppedError:
            console.info("The check was stopped: nothing is known of resuming.")
            return stop.exit_code
    return 0 if same else 1


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Has torch and cuBLAS compute the same twice in this block; torch warns where it cannot.

    Enter it before the first matrix product.
    """
    # cuBLAS reads this when it makes its first handle. Of the two settings that torch accepts, this
    # is the one of Hopper's default size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    console.info(
        "The check uses deterministic algorithms. Runs do not, so that a resumed one may round",
        "differently from an uninterrupted one, as any two runs on a GPU may.",
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _check_length(steps: int, why: str) -> None:
    """Raises ConfigError where there is no step to interrupt after."""
    if steps < 2:
        raise ConfigError(f"--check-resume: nothing to interrupt in a run of {steps} ({why}).")


def _covering(config: Config, steps: int) -> Config:
    """Returns the config with a short evaluation at the interruption and 4-bit weights before it,
    so that a check of few steps covers both."""
    training, low = config.training, config.low_precision
    if training.test_freq is not None:
        few = min(2, training.eval_iters)
        training = replace(training, test_freq=max(1, steps // 2), eval_iters=few)
    if low.use_4bit:
        early = min(low.quantize_after, (steps // 4) / training.max_iters)
        low = replace(low, quantize_after=early)
    return replace(config, training=training, low_precision=low)


def _folder(config: Config) -> tempfile.TemporaryDirectory[str]:
    """Makes a folder where `training.checkpoint_dir` is or will be: there is space for checkpoints.

    Raises WriteError.
    """
    wanted = Path(config.training.checkpoint_dir)
    check_writable(wanted)
    parent = next(folder for folder in (wanted, *wanted.parents) if folder.is_dir())
    # The name tells who uses a folder: what a killed check left behind can be removed.
    mine = f"{_PREFIX}{socket.gethostname()}_{os.getpid()}_"
    try:
        _remove_left_behind(parent)
        return tempfile.TemporaryDirectory(dir=parent, prefix=mine)
    except OSError as error:
        raise WriteError(f"{parent}: no folder can be made in it: {error.strerror}.") from error


def _remove_left_behind(parent: Path) -> None:
    """Removes the folders of checks on this machine whose process has ended."""
    for folder in parent.glob(f"{_PREFIX}{socket.gethostname()}_*"):
        owner = folder.name.split("_")[-2]
        if owner.isdecimal() and not Path("/proc", owner).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _report(straight: Path, resumed: Path, steps: int) -> bool:
    """Prints whether the two checkpoints are the same, else where they differ first."""
    count, difference = first_difference(straight, resumed)
    console.info("", console.RULE)
    if difference is not None:
        console.info(f"Not the same after {steps} steps: {difference}")
        return False
    console.info(
        f"The same: {steps} steps straight, and {steps} interrupted after {steps // 2}, agree in "
        f"all {count} values, bit for bit."
    )
    return True


def _report_cause(straight: Path, again: Path) -> None:
    """Prints whether the checkpoint or the device is at fault."""
    difference = first_difference(straight, again)[1]
    if difference is None:
        console.info("Two uninterrupted runs match, so the checkpoint is missing some state.")
    else:
        console.info(
            f"Two uninterrupted runs differ as well ({difference}): this device or its compiler",
            "does not compute the same twice, so a resumed run cannot be told from another one.",
        )


def first_difference(one: Path, other: Path) -> tuple[int, str | None]:
    """Returns how many values of two checkpoints were compared, and the first difference in words,
    None where there is none."""
    return state_difference(load_checkpoint(one), load_checkpoint(other), COMPARED)


def state_difference(
    first: Mapping[str, Any], second: Mapping[str, Any], keys: Iterable[str]
) -> tuple[int, str | None]:
    """Returns how many values below `keys` of two states were compared, and the first difference in
    words, None where there is none."""
    keys = list(keys)
    mine = {name: v for key in keys for name, v in _leaves(first[key], key)}
    yours = {name: v for key in keys for name, v in _leaves(second[key], key)}
    for name in sorted(mine.keys() ^ yours.keys()):
        return 0, f"{name} is in one of them only"
    for count, name in enumerate(mine, 1):
        difference = _difference(mine[name], yours[name])
        if difference and name not in NOT_COMPARED:
            return count, f"{name} {difference}"
    return len(mine), None


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields every tensor and plain value of nested dictionaries and lists, with its name."""
    if isinstance(value, dict):
        for key in value:
            yield from _leaves(value[key], f"{name}.{key}")
    elif isinstance(value, (list, tuple)) and len(value) <= _MAX_LIST:
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}[{number}]")
    else:
        yield name, value


def _difference(one: Any, other: Any) -> str:
    """Returns how two values differ, empty where they are the same bit for bit."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        same = type(one) is type(other) and one == other
        return "" if same else f"is {repr(one)[:60]} and {repr(other)[:60]}"
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"is {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    unequal = int((_bits(one) != _bits(other)).sum())
    if not unequal:
        return ""
    apart = (one.double() - other.double()).abs().max()
    return (
        f"differs in {unequal:,} of {one.numel():,} numbers, by at most {apart:.3g} where the "
        f"largest is {one.double().abs().max():.3g}"
    )


def _bits(tensor: Tensor) -> Tensor:
    """Returns the tensor as integers: -0.0 is not 0.0, and NaN equals itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])
