"""Trains a language model from one YAML file.

    python train.py                                             # config.yaml
    python train.py --config my_experiment.yaml max_iters=1000
    torchrun --standalone --nproc_per_node=8 train.py my_experiment.yaml
    python train.py my_experiment.yaml --dry-run                # memory, time, data: no training
    python train.py my_experiment.yaml --check-resume           # is a resumed run the same run?
    python train.py --reproduce checkpoints/run_20251108_143022     # the same losses, here?
    python train.py my_experiment.yaml --slurm nodes=2 gpus=8 time=24:00    # a batch script
    python train.py --help

Reads the config, builds a trainer (engine/setup/build.py), then runs `train`, the loop. The run
directory appears with the first checkpoint; `resume_from_checkpoint` continues it exactly. Under
torchrun or srun every process runs all of it; only rank 0 logs and writes files.
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
    let_rank_0_print,
    report_to_torchrun,
)
from settings.slurm import adopt_srun_ranks

if __name__ == "__main__":  # --help and config errors are answered before torch is imported
    adopt_srun_ranks()  # first, because messages ask for the rank
    REQUEST = command_line(sys.argv[1:])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of the imports below

import traceback
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from data import StepBatch, TrainLoader
from engine.hardware.distributed import (
    end_process,
    enter_world,
    is_lost_peer,
    is_main_process,
    no_sync_until_last,
    scale_loss_for_averaging,
    wait_for_all,
)
from engine.hardware.memory import ran_out
from engine.loss import inputs_and_targets
from engine.monitor import console
from engine.optim.build import clip_gradients, gradient_norm, set_learning_rate
from engine.planning.advice import out_of_memory_lines
from engine.precision.precision import disable_unavailable_4bit
from engine.replay.reproduce import reproduce
from engine.schedule import learning_rate
from engine.setup.build import build
from engine.setup.check_resume import check_resume
from engine.setup.dry_run import dry_run
from engine.signals import StopRequest
from engine.train_state import due
from engine.trainer import Trainer


def train(trainer: Trainer, stop: StopRequest) -> None:
    """The loop: batch, forward, loss, backward, clip, step; then log, evaluate, save when due."""
    config, state, world = trainer.config, trainer.state, trainer.world
    precision, optimizer, training = trainer.precision, trainer.optimizer, trainer.config.training
    model, document_ids = trainer.parallel_model, trainer.data.document_ids
    max_norm = config.optimizer.grad_clip
    if state.evaluation_due(training):
        trainer.evaluate(stop)  # a resumed run: its stop had cut this evaluation short
    while not state.finished(training) and (step := trainer.next_step(stop)) is not None:
        step_loss = torch.zeros((), device=world.device)
        with precision.training(step.number):
            for number, rows in enumerate(step.micro_batches, 1):
                if trainer.graphed_step is not None:  # the lines below as one CUDA graph
                    step_loss += trainer.graphed_step(rows, step.targets, first=number == 1)
                    continue
                # Gradients add up over micro-batches; the backward pass of the last one also
                # exchanges them between ranks.
                with no_sync_until_last(model, last=number == len(step.micro_batches)):
                    with precision.autocast():
                        inputs, targets, ids = inputs_and_targets(rows, world.device, document_ids)
                        loss_sum = model(inputs, ids, targets)
                    # Divided by the tokens of the whole step on all processes, so that the
                    # gradient does not depend on how the step is cut.
                    loss = loss_sum / step.targets
                    precision.backward(scale_loss_for_averaging(loss, world))
                step_loss += loss.detach()

        # Gradients are averages over all ranks, so their norm is equal on all. On a GPU, waiting
        # for it would leave the device idle: where the optimizer can skip a step that is not
        # finite, loss and norm are read during the next step.
        precision.unscale(optimizer)
        norm = gradient_norm(trainer.model)
        trainer.check_finite(step, world.all_reduce_sum(step_loss), norm)
        # Where the norm is read late, clipping always runs: it multiplies small gradients by 1.
        if max_norm > 0.0 and (trainer.reads_late or step.grad_norm > max_norm):
            clip_gradients(trainer.model, norm, max_norm)
        rate = learning_rate(step.number, config, trainer.size.steps)
        set_learning_rate(optimizer, rate)
        trainer.optimizer_step()
        trainer.count_step(step)

        if state.step == 1 or due(state.step, training.log_freq):
            trainer.log(rate)
        if state.evaluation_due(training):
            trainer.evaluate(stop)
        if trainer.saver.due(state, step.save_time_over):
            trainer.save()


def run_to_the_end(request: Request, stop: StopRequest) -> int:
    """Builds, trains, finishes; returns the exit code."""
    if request.reproduce is not None:
        return reproduce(request.reproduce, stop, train)
    request = disable_unavailable_4bit(request)
    training = request.config.training
    with ExitStack() as stack:
        system, distributed = request.config.system, request.config.distributed
        world = stack.enter_context(enter_world(system, distributed))
        stop.quiet = not world.is_main
        if request.dry_run:
            dry_run(request, world)
            return 0
        if request.check_resume is not None:
            stop.training_started = True
            return check_resume(request, world, stop, train)
        trainer = build(request, world, stack)
        stop.training_started = True
        if training.eval_only:
            trainer.evaluate(stop)
            return stop.exit_code
        # Not `finished`: after the last step, its evaluation may still be missing.
        if not trainer.state.has_work(trainer.config.training):
            console.info(
                f"Already finished at step {trainer.state.step}: nothing to do. "
                "Raise training.max_iters or training.epochs to go on."
            )
            return 0
        try:
            with trainer.reporter.live:
                train(trainer, stop)
        except Exception as error:
            if isinstance(error, (DataError, OSError)) or ran_out(error):
                trainer.save_on_error()  # errors of an evaluation do so themselves
            raise
        console.info(*skipped_lines(trainer.batches))
        if not trainer.state.has_work(trainer.config.training):
            trainer.finish()
            return 0
        trainer.finish_interrupted(stop)
        return stop.exit_code


def skipped_lines(batches: Iterator[StepBatch]) -> list[str]:
    """Returns lines that tell what the loader skipped or replaced in the text."""
    counts = batches.skipped_counts if isinstance(batches, TrainLoader) else {}
    return [f"In the text: {count:,} {what}" for what, count in counts.items() if count]


def main(request: Request) -> int:
    """Returns the exit code; an error a user can act on becomes one message, no traceback."""
    try:
        with StopRequest() as stop:
            code = run_to_the_end(request, stop)
            wait_for_all()
            return code
    except UserError as error:
        if request.config.training.debug:
            traceback.print_exc()
        report_to_torchrun(str(error))
        # Errors raised on every rank are printed by rank 0, rank-local ones by the rank they hit.
        local = isinstance(error, DataError | MemoryShortError | NonFiniteError)
        if is_main_process() or (local and not error.on_all_ranks):
            console.warning(str(error))
        else:
            let_rank_0_print()
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
