"""Trains a language model from one YAML file.

    python train.py                                             # config.yaml
    python train.py --config my_experiment.yaml max_iters=1000
    torchrun --standalone --nproc_per_node=8 train.py my_experiment.yaml
    python train.py --help

Reads the config, builds the run in one written order (`build`), then runs `train`, the loop. The
run directory appears with the first checkpoint; `resume_from_checkpoint` continues it exactly.
Under torchrun every process runs all of it; the main one speaks and writes.
"""

from __future__ import annotations

import signal
import sys

from config import (
    Config,
    DataError,
    NonFiniteError,
    Request,
    UserError,
    command_line,
)

if __name__ == "__main__":  # --help and config errors are answered before torch is imported
    REQUEST = command_line(sys.argv[1:])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of the imports below

import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from data import Dataset, TrainLoader, corpus, open_dataset
from data.text import Replayed, Text, embedded_is_missing
from engine.checkpoint import Resume, load_checkpoint, resolve_resume
from engine.compile import compile_model, compile_wanted
from engine.evaluate import next_token_loss
from engine.metrics import RULE, say, warn
from engine.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    load_optimizer,
    set_learning_rate,
)
from engine.parallel import parallelize, whole
from engine.plan import (
    length_lines,
    model_lines,
    origin_lines,
    planned_steps,
    settle,
    tokens_line,
    tokens_per_step,
    training_flops,
)
from engine.precision import Precision, affordable
from engine.resume import (
    PRETRAINED,
    check_resumable,
    experiment_differences,
    on_processes,
    resume_from_folder,
)
from engine.run import RunDirectory, directory_lines
from engine.schedule import learning_rate
from engine.session import Batch, Session
from engine.signals import StopRequest
from engine.state import TrainState, due, restore_rng, seed_apart, seed_generators
from engine.trackers import Tracker
from engine.world import World, end_process, enter_world, is_main_process, lost_peer
from model import LanguageModel, build_model, pretrained


def train(run: Session, stop: StopRequest) -> None:
    """The loop: batch, forward and backward, checks, step; then log, evaluate, save when due."""
    config, state = run.config, run.state
    if run.evaluation_missing:
        run.evaluate(stop)  # a stop had cut it short
    while not run.stopping(stop) and not run.finished:
        began = time.monotonic()
        batch = next(run.batches)
        loss = torch.zeros((), device=run.world.device)
        with run.precision.training(state.step + 1):
            for share in run.micro_losses(batch):
                run.precision.backward(whole(share, run.world))
                loss += share.detach()
        run.precision.unscale(run.optimizer)
        norm = gradient_norm(run.model)
        loss_value, grad_norm = torch.stack((run.world.sum(loss), norm)).tolist()
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


@dataclass
class Beginning:
    """What is known before a model is built: the text, where the run begins, the whole config."""

    request: Request
    """As given, with the model's shape and vocabulary: what the run directory keeps."""
    config: Config
    """The same, with the micro-steps of this many processes."""
    data: Dataset
    weights: pretrained.Pretrained | None
    resume: Resume | None
    saved: dict[str, Any]
    """The checkpoint's content; empty where none is resumed."""


def begin(request: Request, world: World) -> Beginning:
    """Opens text, checkpoint or pretrained weights, and settles the config; says what it found."""
    say(*origin_lines(request))
    asked = resume_from_folder(request.config)
    with world.main_first():
        data = open_data(asked)
    say(*data.lines())
    resume = world.broadcast(find_resume(asked) if world.is_main else None)
    saved = {} if resume is None else load_checkpoint(resume.path)
    if saved and request.config.training.init_from == "resume":  # what it began with, it keeps
        origin = saved["config"]["training"]["init_from"]
        asked = replace(asked, training=replace(asked.training, init_from=origin))
    weights, shape = None, dict[str, Any]()
    if asked.training.init_from != "scratch" and saved:
        shape = {key: saved["config"]["model"][key] for key in PRETRAINED}
    elif asked.training.init_from != "scratch":
        say(f"Reading the weights of {asked.training.init_from}...")
        with world.main_first():
            weights = pretrained.read(asked.training.init_from)
        say(weights.source)
        shape = weights.options
    settled, lines = settle(asked, data.vocab_size, data.tokenizer.name, shape)
    config = settled
    if resume is not None:
        then, before = Config.from_dict(saved["config"]), len(saved["rng"])
        config, more = on_processes(settled, then, before, world.size)
        fits = check_fits(saved, resume, data, config, world.size)
        lines += [f"Resumed from {resume.path.name}: {resume.step} steps done", *more, *fits]
    say(*lines)
    return Beginning(replace(request, config=settled), config, data, weights, resume, saved)


def build(request: Request, world: World, stack: ExitStack) -> Session:
    """Builds a run. The order matters: weights are drawn right after seeding; number formats take
    charge of them on their device, then the optimizer; saved state goes into all before anything is
    compiled or shared between processes; and the run directory is opened last, so that an error
    before it leaves nothing.
    """
    precision = open_precision(request.config, world)
    start = begin(request, world)
    config, data = start.config, start.data
    epoch_tokens = data.epoch_tokens(config.training.block_size)
    steps = planned_steps(config, world.size, epoch_tokens)
    model = first_model(start, world)
    covered = precision.prepare(model, steps, fill=not start.saved)
    optimizer = new_optimizer(model, config)
    say(*model_lines(config, world, model, optimizer, precision), *covered)
    seed_apart(config.training.seed, 0, world.rank)
    state, cursor = TrainState(), None
    if start.saved:
        state, cursor = restore(start.saved, model, optimizer, precision, world)
    text = Text(data, config)
    trial = partial(try_model, model, precision, config, text)
    run_flops = training_flops(model, config) * tokens_per_step(config, world.size) * steps
    wanted = compile_wanted(config.system, world.device, run_flops, state.compiled)
    wanted = wanted and precision.compiles
    state.compiled, compiled = compile_model(model, wanted, world.device, trial)
    say(*precision.prove(trial))
    training = state.has_work(config.training)
    batches = open_batches(text, config, cursor, world, stack) if training else iter(())
    directory = open_directory(start, start.resume if training else None, world, stack)
    say(*directory_lines(directory, start.resume))
    say(f"Starting training from iteration {state.step}..." if training else "Nothing to train.")
    say(f"Device: {world.device_name} | {precision.name} | {compiled}")
    say(*filter(None, [precision.note]), *cast(LanguageModel, model).notes(world.on_cpu))
    say(*length_lines(config, world.size, epoch_tokens))
    say(f"Seed: {config.training.seed}", RULE)
    return Session(
        config=config,
        world=world,
        precision=precision,
        model=model,
        trained=parallelize(model, world),
        flops_per_token=training_flops(model, config),
        optimizer=optimizer,
        batches=batches,
        text=text,
        activity=cast(LanguageModel, model).activity,
        directory=directory,
        state=state,
        cursor=lambda: cursor or {},
        planned_steps=steps,
        tracker=open_tracker(config, directory, state, world, stack),
        saved_step=state.step,
        saved_evaluation=state.evaluated_step,
    )


def first_model(start: Beginning, world: World) -> nn.Module:
    """The model with fresh or pretrained weights, on its device."""
    config = start.config
    say("Initializing model...")
    seed_generators(config.training.seed)
    model = build_model(config)
    if start.weights is not None:
        pretrained.load_into(model, start.weights, config.training.block_size)
        start.weights = None  # it keeps the file mapped
    return model.to(world.device)


def new_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained."""
    four_bit = config.low_precision.use_4bit_optimizer
    return build_optimizer(model, config.optimizer, config.training.weight_decay, four_bit)


def restore(
    saved: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    world: World,
) -> tuple[TrainState, dict[str, Any]]:
    """Puts a checkpoint back, and lets its content go; the state and the data's cursor."""
    model.load_state_dict(saved["model"])
    load_optimizer(optimizer, saved["optimizer"])
    say(*precision.load_state_dict(saved["precision"]))
    state, cursor, generators = TrainState(**saved["train"]), saved["cursor"], saved["rng"]
    if len(generators) == world.size or world.is_main:
        restore_rng(generators[world.rank], world.device)
    else:  # as many processes as never before: only dropout draws from these
        seed_apart(saved["config"]["training"]["seed"], state.step, world.rank)
    saved.clear()
    return state, cursor


def open_precision(config: Config, world: World) -> Precision:
    """Checks that this device computes in the formats asked for; raises ConfigError."""
    return Precision(config.low_precision, world.device, config.fp8)


def check_fits(
    saved: dict[str, Any], resume: Resume, data: Dataset, config: Config, world_size: int
) -> list[str]:
    """Lines that tell what differs from the checkpoint; raises CheckpointError and DataError."""
    then = Config.from_dict(saved["config"])
    processes = len(saved["rng"]), world_size
    lines = check_resumable(then, config, str(resume.path), processes)
    data.check_unchanged(saved["data"])
    tokens = data.epoch_tokens(config.training.block_size)
    steps = [
        planned_steps(each, count, tokens)
        for each, count in ((then, len(saved["rng"])), (config, world_size))
    ]
    before = learning_rate(resume.step, then, steps[0])
    after = learning_rate(resume.step + 1, config, steps[1])
    return [*lines, f"Learning rate: {before:.2e} before, {after:.2e} from here"]


def try_model(model: nn.Module, precision: Precision, config: Config, text: Text) -> None:
    """One forward and backward pass over a batch of ones; leaves no gradients."""
    shape = (config.training.batch_size, config.training.block_size + 1)
    with precision.autocast():
        rows = torch.ones(shape, dtype=torch.uint8)
        loss = next_token_loss(model, rows, precision.device, text.documents)
    precision.backward(loss)
    model.zero_grad(set_to_none=True)


def find_resume(config: Config) -> Resume | None:
    """The checkpoint that `resume_from_checkpoint` means; says which were rejected and why."""
    wanted = config.training.resume_from_checkpoint
    if wanted is None:
        return None
    folder = Path(config.training.checkpoint_dir)
    resume, notes = resolve_resume(wanted, folder, partial(experiment_differences, present=config))
    say(*notes)
    return resume


def open_data(config: Config) -> Dataset:
    """The indexed text; the embedded corpus is built where it is missing."""
    if embedded_is_missing(config):
        folder = Path(config.dataset.parquet_dir)
        say(f"{folder} is missing: building it from the Python standard library...")
        built = corpus.build(folder)
        say(f"{built.documents} files of source, {built.bytes / 1e6:.1f} MB, {built.seconds:.1f}s")
    return open_dataset(config.dataset, config.tokenizer, config.model.vocab_size)


def open_batches(
    text: Text, config: Config, cursor: dict[str, Any] | None, world: World, stack: ExitStack
) -> Iterator[Batch]:
    """The training batches of this process; with `use_oracle` the first one for ever."""
    loader = text.batches(cursor, world.rank, world.size, pin=world.device.type == "cuda")
    stack.enter_context(loader)
    return Replayed.for_ever(loader) if config.training.use_oracle else loader


def open_directory(
    start: Beginning, resume: Resume | None, world: World, stack: ExitStack
) -> RunDirectory:
    """The run directory: continued at resume, else promised and made at the first save."""
    config, origin = start.request.config, origin_lines(start.request)
    if not world.is_main:  # it names the run there, and is never written
        return RunDirectory(config, origin, world.device_name)
    if resume is None:
        return stack.enter_context(RunDirectory.start(config, origin, world.device_name))
    return stack.enter_context(RunDirectory.reopen(resume, config, origin, world.device_name))


def open_tracker(
    config: Config, directory: RunDirectory, state: TrainState, world: World, stack: ExitStack
) -> Tracker | None:
    """What records are sent to besides metrics.jsonl, under the run's name there."""
    if not world.is_main:
        return None
    folder = directory.path or Path(config.training.checkpoint_dir)
    tracker = Tracker.start(config, directory.name, state.tracker_run, folder)
    if tracker is not None:
        stack.push(lambda kind, *_: tracker.close(0 if kind is None else 1))
        state.tracker_run = tracker.run_id
    return tracker


def dry_run(request: Request, world: World) -> None:
    """Prints the resolved config and the plan; trains nothing, creates nothing."""
    if embedded_is_missing(request.config):
        folder, config = request.config.dataset.parquet_dir, request.config
        say(*origin_lines(request))
        say(f"Data: {folder} is missing; the run will build it from the Python standard library")
        length, resume = [tokens_line(config, world.size)], None
        steps = config.training.max_iters
    else:
        start = begin(request, world)
        config, resume = start.config, start.resume
        Text(start.data, config)
        epoch_tokens = start.data.epoch_tokens(config.training.block_size)
        length = length_lines(config, world.size, epoch_tokens)
        steps = planned_steps(config, world.size, epoch_tokens)
    with torch.device("meta"):
        model = build_model(config)
    precision = open_precision(config, world)
    covered = precision.prepare(model, steps, fill=False)
    optimizer = new_optimizer(model, config)
    directory = RunDirectory.start(config)
    lines = model_lines(config, world, model, optimizer, precision)
    say("", config.to_yaml(), *lines, *covered, *length)
    say(*directory_lines(directory, resume))
    say("Dry run: nothing was trained or created.")


def run_to_the_end(request: Request, stop: StopRequest) -> int:
    """Builds, trains, finishes; the exit code."""
    request = affordable(request)
    with ExitStack() as stack:
        system, distributed = request.config.system, request.config.distributed
        world = stack.enter_context(enter_world(system, distributed))
        stop.quiet = not world.is_main
        if request.dry_run:
            dry_run(request, world)
            return 0
        run = build(request, world, stack)
        stop.armed = True
        if request.config.training.eval_only:
            run.evaluate(stop)
            return stop.exit_code
        if run.finished and not run.evaluation_missing:
            say(
                f"Already finished at step {run.state.step}: nothing to do. "
                "Raise training.max_iters or training.epochs to go on."
            )
            return 0
        try:
            train(run, stop)
        except (DataError, OSError, MemoryError, torch.OutOfMemoryError):
            run.rescue()
            raise
        say(*left_out_lines(run.batches))
        if run.finished and not run.evaluation_missing:
            run.finish()
            return 0
        run.leave(stop)
        return stop.exit_code


def left_out_lines(batches: Iterator[Batch]) -> list[str]:
    """What the loader met in the text and left out or replaced."""
    counts = batches.left_out if isinstance(batches, TrainLoader) else {}
    return [f"In the text: {count:,} {what}" for what, count in counts.items() if count]


def main(request: Request) -> int:
    """The exit code; an error a user can act on becomes one message without a traceback."""
    try:
        with StopRequest() as stop:
            return run_to_the_end(request, stop)
    except UserError as error:
        if request.config.training.debug:
            traceback.print_exc()
        # What all processes find out is said once; what one of them read or computed, by itself.
        if is_main_process() or isinstance(error, DataError | NonFiniteError):
            warn(str(error))
        return error.exit_code
    except (MemoryError, torch.OutOfMemoryError) as error:
        warn(
            f"Out of memory: {error}\nLower training.batch_size; gradient_accumulation_steps can "
            "make up for it without more memory."
        )
        return 1
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        warn("Another process of this run has ended, so this one does; checkpoints are whole.")
        return 1
    except BrokenPipeError:
        warn("Standard output was closed; stopped after saving what was done.")
        return 1


if __name__ == "__main__":
    end_process(main(REQUEST))
