"""Trains a language model from one YAML file.

    python train.py                                             # config.yaml
    python train.py --config my_experiment.yaml max_iters=1000
    torchrun --standalone --nproc_per_node=8 train.py my_experiment.yaml
    python train.py my_experiment.yaml --dry-run                # memory, time, data: no training
    python train.py my_experiment.yaml --check-resume           # is a resumed run the same run?
    python train.py --help

Reads the config, builds the run in one written order (launch/), then runs `train`, the loop. The
run directory appears with the first checkpoint; `resume_from_checkpoint` continues it exactly.
Under torchrun every process runs all of it; the main one speaks and writes.
"""

from __future__ import annotations

import signal
import sys

from config import (
    DataError,
    MemoryShortError,
    NonFiniteError,
    Request,
    UserError,
    command_line,
    report_to_torchrun,
)

if __name__ == "__main__":  # --help and config errors are answered before torch is imported
    REQUEST = command_line(sys.argv[1:])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of the imports below

import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from data import TrainLoader
from engine.hardware.distributed import (
    end_process,
    enter_world,
    is_lost_peer,
    is_main_process,
    scale_loss_for_ddp,
)
from engine.interfaces import Batch
from engine.monitor import console
from engine.optim.build import clip_gradients, gradient_norm, set_learning_rate
from engine.planning.memory import out_of_memory_lines, ran_out
from engine.precision.precision import disable_unavailable_4bit
from engine.schedule import learning_rate
from engine.setup.build import build
from engine.setup.check_resume import check_resume
from engine.setup.dry_run import dry_run
from engine.signals import StopRequest
from engine.train_state import due
from engine.trainer import Session


def train(run: Session, stop: StopRequest) -> None:
    """The loop: batch, forward and backward, checks, step; then log, evaluate, save when due."""
    config, state = run.config, run.state
    if run.evaluation_missing:
        run.evaluate(stop)  # a stop had cut it short
    while not run.stopping(stop) and not run.finished:
        began = time.monotonic()
        batch = run.next_batch()
        loss = torch.zeros((), device=run.world.device)
        with run.precision.training(state.step + 1):
            for share in run.micro_losses(batch):
                run.precision.backward(scale_loss_for_ddp(share, run.world))
                loss += share.detach()
        run.precision.unscale(run.optimizer)
        norm = gradient_norm(run.model)
        loss_value, grad_norm = torch.stack((run.world.all_reduce_sum(loss), norm)).tolist()
        run.check_finite(batch, loss_value, grad_norm)
        if 0.0 < config.optimizer.grad_clip < grad_norm:
            clip_gradients(run.model, norm, config.optimizer.grad_clip)
        rate = learning_rate(state.step + 1, config, run.planned_steps)
        set_learning_rate(run.optimizer, rate)
        run.step()
        run.advance(batch, loss_value, time.monotonic() - began)

        if state.step == 1 or due(state.step, config.training.log_freq):
            run.log(rate, grad_norm)
        if run.evaluation_missing:
            run.evaluate(stop)
        if run.checkpoint_due:
            run.save()


def run_to_the_end(request: Request, stop: StopRequest) -> int:
    """Builds, trains, finishes; the exit code."""
    request = disable_unavailable_4bit(request)
    with ExitStack() as stack:
        system, distributed = request.config.system, request.config.distributed
        world = stack.enter_context(enter_world(system, distributed))
        stop.quiet = not world.is_main
        if request.dry_run:
            dry_run(request, world)
            return 0
        if request.check_resume is not None:
            stop.armed = True
            return check_resume(request, world, stop, train)
        run = build(request, world, stack)
        stop.armed = True
        if request.config.training.eval_only:
            run.evaluate(stop)
            return stop.exit_code
        if run.finished and not run.evaluation_missing:
            console.info(
                f"Already finished at step {run.state.step}: nothing to do. "
                "Raise training.max_iters or training.epochs to go on."
            )
            return 0
        try:
            with run.live:
                train(run, stop)
        except Exception as error:
            if isinstance(error, (DataError, OSError)) or ran_out(error):
                run.rescue()
            raise
        console.info(*skipped_lines(run.batches))
        if run.finished and not run.evaluation_missing:
            run.finish()
            return 0
        run.leave(stop)
        return stop.exit_code


def skipped_lines(batches: Iterator[Batch]) -> list[str]:
    """What the loader met in the text and left out or replaced."""
    counts = batches.skipped_counts if isinstance(batches, TrainLoader) else {}
    return [f"In the text: {count:,} {what}" for what, count in counts.items() if count]


def main(request: Request) -> int:
    """The exit code; an error a user can act on becomes one message without a traceback."""
    try:
        with StopRequest() as stop:
            return run_to_the_end(request, stop)
    except UserError as error:
        if request.config.training.debug:
            traceback.print_exc()
        report_to_torchrun(str(error))
        # Errors raised on every rank are printed by rank 0, rank-local ones by the rank they hit.
        if is_main_process() or isinstance(error, DataError | MemoryShortError | NonFiniteError):
            console.warning(str(error))
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if ran_out(error):
            message = "\n".join(out_of_memory_lines(error))
        elif is_lost_peer(error):
            message = "Another rank exited; shutting down. Saved checkpoints are intact."
        else:
            raise
        report_to_torchrun(message)
        console.warning(message)
        return 1
    except BrokenPipeError:
        console.warning("Standard output was closed; stopped after saving what was done.")
        return 1


if __name__ == "__main__":
    end_process(main(REQUEST))
