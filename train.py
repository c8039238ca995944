"""Trains a language model from one YAML file.

    python train.py                                             # config.yaml
    python train.py --config my_experiment.yaml max_iters=1000
    python train.py --help

Reads the config, builds the run in one written order (`build`), then runs `train`, the loop. The
run directory appears with the first checkpoint; `resume_from_checkpoint` continues it exactly.
"""

from __future__ import annotations

import signal
import sys

from config import (
    Config,
    DataError,
    Request,
    UserError,
    accumulation_steps,
    command_line,
    sequences_per_step,
)

if __name__ == "__main__":  # --help and config errors are answered before torch is imported
    REQUEST = command_line(sys.argv[1:])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of the imports below

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from data import (
    BatchSpec,
    Dataset,
    StepBatch,
    TrainLoader,
    corpus,
    document_ids,
    evaluation_rows,
    open_dataset,
)
from data.tokenizer import build_tokenizer
from engine.checkpoint import Resume, load_checkpoint, resolve_resume
from engine.compile import compile_model, compile_wanted
from engine.evaluate import DocumentIds, next_token_loss
from engine.metrics import RULE, say, short, warn
from engine.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    load_optimizer,
    set_learning_rate,
)
from engine.plan import cost_lines, parameter_lines, tokens_line, tokens_per_step
from engine.precision import Precision
from engine.resume import check_resumable, experiment_differences
from engine.run import RunDirectory
from engine.schedule import learning_rate
from engine.session import Batch, Session
from engine.signals import StopRequest
from engine.state import TrainState, due, restore_rng, seed_generators
from engine.world import World, enter_world
from model import LanguageModel, build_model


def train(run: Session, stop: StopRequest) -> None:
    """The loop: batch, forward and backward, checks, step; then log, evaluate, save when due."""
    config, state = run.config, run.state
    if run.evaluation_missing:
        run.evaluate(stop)  # a stop had cut it short
    while not stop and not run.finished:
        began = time.monotonic()
        batch = next(run.batches)
        loss = torch.zeros((), device=run.world.device)
        targets = max(1, sum(run.targets(rows) for rows in batch.micro_batches))
        for rows in batch.micro_batches:
            share = run.loss(rows) / targets
            run.precision.backward(share)
            loss += share.detach()
        run.precision.unscale(run.optimizer)
        norm = gradient_norm(run.model)
        loss_value, grad_norm = torch.stack((loss, norm)).tolist()
        run.check_finite(batch, loss_value, grad_norm)
        if 0.0 < config.optimizer.grad_clip < grad_norm:
            clip_gradients(run.model, norm, config.optimizer.grad_clip)
        rate = learning_rate(state.step + 1, config, run.planned_steps)
        set_learning_rate(run.optimizer, rate)
        run.precision.step(run.optimizer)
        run.optimizer.zero_grad(set_to_none=True)
        run.advance(batch, loss_value, time.monotonic() - began)

        if state.step == 1 or due(state.step, config.training.log_freq):
            run.log(rate, grad_norm)
        if run.evaluation_missing:
            run.evaluate(stop)
        if run.checkpoint_due and not stop:
            run.save()


def build(request: Request, stack: ExitStack) -> Session:
    """Builds a run. The order matters: weights are drawn right after seeding; the optimizer sees
    them on their device; saved state goes into both before anything is compiled; and the run
    directory is opened last, so that an error before it leaves nothing behind.
    """
    config = request.config
    world = enter_world(config.system)
    resume = find_resume(config)
    data = open_data(config)
    steps = planned_steps(data, config, world.size)
    seed_generators(config.training.seed)
    model = build_model(config).to(world.device)
    precision = Precision(config.low_precision, world.device)
    optimizer = build_optimizer(model, config.optimizer, config.training.weight_decay)
    state, cursor, changes = TrainState(), None, list[str]()
    if resume is not None:
        saved = load_checkpoint(resume.path)
        changes = check_fits(saved, resume, data, config, world.size)
        model.load_state_dict(saved["model"])
        load_optimizer(optimizer, saved["optimizer"])
        precision.load_state_dict(saved["scaler"])
        state, cursor = TrainState(**saved["train"]), saved["cursor"]
        restore_rng(saved["rng"], world.device)
        del saved
    evaluation = evaluation_batches(data, config)
    documents = document_reader(config)
    trial = partial(try_model, model, precision, config, documents)
    run_flops = training_flops(model, config) * tokens_per_step(config, world.size) * steps
    wanted = compile_wanted(config.system, world.device, run_flops, state.compiled)
    state.compiled, compiled = compile_model(model, wanted, world.device, trial)
    training = not config.training.eval_only and (
        not state.finished(config.training) or state.evaluation_missing(config.training)
    )
    batches: Iterator[StepBatch] = iter(())
    if training:
        spec = batch_spec(config, world)
        batches = stack.enter_context(TrainLoader(data, spec, config.dataloader, cursor))
    directory = stack.enter_context(open_directory(request, world, resume if training else None))
    say(*origin_lines(request), *directory_lines(directory, config, resume), *changes)
    say(f"Device: {world.device_name} | {precision.name} | {compiled}")
    say(*filter(None, [precision.note]), *plan_lines(data, config, world))
    say(*model_lines(model, config, world), f"Seed: {config.training.seed}", RULE)
    return Session(
        config=config,
        world=world,
        precision=precision,
        model=model,
        flops_per_token=training_flops(model, config),
        optimizer=optimizer,
        batches=batches,
        documents=documents,
        activity=cast(LanguageModel, model).activity,
        evaluation=evaluation,
        data=data.summary(),
        directory=directory,
        state=state,
        cursor=lambda: cursor or {},
        planned_steps=steps,
        saved_step=state.step,
    )


def check_fits(
    saved: dict[str, Any], resume: Resume, data: Dataset, config: Config, world_size: int
) -> list[str]:
    """Lines that tell what differs from the checkpoint; raises CheckpointError and DataError."""
    then = Config.from_dict(saved["config"])
    lines = check_resumable(then, config, str(resume.path))
    data.check_unchanged(saved["data"])
    steps = [planned_steps(data, each, world_size) for each in (then, config)]
    before = learning_rate(resume.step, then, steps[0])
    after = learning_rate(resume.step + 1, config, steps[1])
    return [*lines, f"Learning rate: {before:.2e} before, {after:.2e} from here"]


def try_model(
    model: nn.Module, precision: Precision, config: Config, documents: DocumentIds | None
) -> None:
    """One forward and backward pass over a batch of ones; leaves no gradients."""
    shape = (config.training.batch_size, config.training.block_size + 1)
    with precision.autocast():
        rows = torch.ones(shape, dtype=torch.uint8)
        loss = next_token_loss(model, rows, precision.device, documents)
    precision.backward(loss)
    model.zero_grad(set_to_none=True)


def training_flops(model: nn.Module, config: Config) -> int:
    """FLOPs per token of a training step, by the model's own count."""
    return cast(LanguageModel, model).flops_per_token(config.training.block_size)


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
    folder = Path(config.dataset.parquet_dir)
    if corpus.is_embedded(folder) and not folder.exists():
        say(f"{folder} is missing: building it from the Python standard library...")
        built = corpus.build(folder)
        say(f"{built.documents} files of source, {built.bytes / 1e6:.1f} MB, {built.seconds:.1f}s")
    return open_dataset(config.dataset, config.tokenizer)


def evaluation_batches(data: Dataset, config: Config) -> tuple[tuple[Tensor, ...], ...]:
    """The fixed rows (n, T+1) of the training and the held-out text, in batches.

    They are read before training, so that text too short for them is not found out in the middle.
    """
    training = config.training
    if training.test_freq is None and not training.eval_only:
        return ()
    count = training.eval_iters * training.batch_size
    rows = (evaluation_rows(data, split, training.block_size, count) for split in ("train", "test"))
    return tuple(torch.split(each, training.batch_size) for each in rows)


def document_reader(config: Config) -> DocumentIds | None:
    """What tells documents apart in rows of tokens, where tokens may see only their own."""
    if config.model.mask == "causal":
        return None
    return partial(document_ids, separator=build_tokenizer(config.tokenizer).separator)


def batch_spec(config: Config, world: World) -> BatchSpec:
    """What the loader delivers for each optimizer step."""
    return BatchSpec(
        block_size=config.training.block_size,
        sequences_per_step=sequences_per_step(config, world.size),
        micro_batches=accumulation_steps(config, world.size),
        seed=config.training.seed,
        rank=world.rank,
        world_size=world.size,
        pin=world.device.type == "cuda",
    )


def open_directory(request: Request, world: World, resume: Resume | None) -> RunDirectory:
    """The run directory: continued at resume, else promised and made at the first save."""
    origin = origin_lines(request)
    if resume is None:
        return RunDirectory.start(request.config, origin, world.device_name)
    return RunDirectory.reopen(resume, request.config, origin, world.device_name)


def origin_lines(request: Request) -> list[str]:
    """The files and overrides this config came from."""
    files = f"Config: {', '.join(request.files)}"
    return [files, *(f"Override: {text}" for text in request.overrides), *request.notes]


def directory_lines(directory: RunDirectory, config: Config, resume: Resume | None) -> list[str]:
    """Where the run is kept, and where it goes on from."""
    if resume is None:
        folder = Path(config.training.checkpoint_dir) / directory.name
        return [f"Run directory: {folder} (made with the first checkpoint)"]
    lines = [f"Run directory: {resume.run_dir}", *directory.notes]
    return [*lines, f"Resumed from {resume.path.name}: {resume.step} steps done"]


def planned_steps(data: Dataset, config: Config, world_size: int) -> int:
    """Optimizer steps until `max_iters` or, by the data's estimated size, the end of `epochs`."""
    training = config.training
    if training.epochs is None:
        return training.max_iters
    steps = training.epochs * data.ledger.train_tokens / tokens_per_step(config, world_size)
    return min(training.max_iters, max(1, math.ceil(steps)))


def plan_lines(data: Dataset, config: Config, world: World) -> list[str]:
    """What the data amounts to, what a step takes of it and how often the run will see it."""
    ledger, steps = data.ledger, planned_steps(data, config, world.size)
    planned = steps * tokens_per_step(config, world.size)
    about = "about " if steps < config.training.max_iters else ""
    return [
        f"Data: {config.dataset.parquet_dir}: {ledger.files:,} files, {ledger.rows:,} rows, about "
        f"{short(ledger.tokens)} tokens: {short(ledger.train_tokens)} to train on, "
        f"{short(ledger.test_tokens)} held out",
        tokens_line(config, world.size),
        f"Max iterations: {about}{steps:,} = {short(planned)} tokens, "
        f"about {planned / max(1, ledger.train_tokens):.2f} epochs",
    ]


def model_lines(model: nn.Module, config: Config, world: World) -> list[str]:
    """Parameters, memory and work."""
    tokens = (config.training.batch_size, config.training.block_size)
    dtype = Precision(config.low_precision, world.device).dtype
    on_cpu = world.device.type == "cpu"
    activations = cast(LanguageModel, model).activation_bytes(tokens, dtype, on_cpu)
    if accumulation_steps(config, world.size) > 1:  # a second set of gradients
        activations += sum(p.numel() * p.element_size() for p in model.parameters())
    step_tokens = tokens_per_step(config, world.size)
    costs = cost_lines(model, activations, training_flops(model, config), step_tokens)
    return [*parameter_lines(model), *costs]


def dry_run(request: Request) -> None:
    """Prints the resolved config and the plan; trains nothing, creates nothing."""
    config = request.config
    world = enter_world(config.system)
    resume = find_resume(config)
    directory = open_directory(request, world, None)
    with torch.device("meta"):
        model = build_model(config)
    say(*origin_lines(request), "", config.to_yaml(), *model_lines(model, config, world))
    folder = Path(config.dataset.parquet_dir)
    if corpus.is_embedded(folder) and not folder.exists():
        say(f"Data: {folder} is missing; the run will build it from the Python standard library")
        say(tokens_line(config, world.size))
    else:
        data = open_dataset(config.dataset, config.tokenizer)
        evaluation_batches(data, config)
        say(*plan_lines(data, config, world))
        if resume is not None:
            say(*check_fits(load_checkpoint(resume.path), resume, data, config, world.size))
    say(*directory_lines(directory, config, resume))
    say("Dry run: nothing was trained or created.")


def run_to_the_end(request: Request, stop: StopRequest) -> int:
    """Builds, trains, finishes; the exit code."""
    with ExitStack() as stack:
        run = build(request, stack)
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
            if not request.dry_run:
                return run_to_the_end(request, stop)
            dry_run(request)
            return 0
    except UserError as error:
        if request.config.training.debug:
            traceback.print_exc()
        warn(str(error))
        return error.exit_code
    except (MemoryError, torch.OutOfMemoryError) as error:
        warn(
            f"Out of memory: {error}\nLower training.batch_size; gradient_accumulation_steps can "
            "make up for it without more memory."
        )
        return 1
    except BrokenPipeError:
        warn("Standard output was closed; stopped after saving what was done.")
        return 1


if __name__ == "__main__":
    sys.exit(main(REQUEST))
