"""Builds a trainer in five phases, each entered once: settings and text (run_setup.py); model,
number formats and optimizer; saved state; compilation; run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from config import Config, ConfigError, Request, micro_batch
from data import StepBatch
from data.run_data import RepeatFirstBatch, RunData, document_id_function
from engine.checkpoint.contents import as_checkpoint_error
from engine.checkpoint.resume_rules import differences
from engine.compile import compile_model, compile_wanted
from engine.evaluation import Evaluator
from engine.graphed_step import check_graphs, graphed_step
from engine.hardware.device import cuda_versions
from engine.hardware.distributed import World, is_main_process, wrap_ddp
from engine.hardware.memory import allocated_bytes, return_freed_memory
from engine.hardware.sharding import (
    draw_weights,
    is_sharded,
    load_weights,
    shard_mesh,
    shard_model,
    sharding_lines,
)
from engine.kernels import check_kernels, choose_kernels
from engine.loss import DocumentIds, next_token_loss
from engine.monitor import console
from engine.monitor.console import RULE
from engine.monitor.tensorboard_tracker import TensorBoard
from engine.monitor.tracker import Tracker
from engine.monitor.wandb_tracker import Wandb
from engine.optim.build import (
    attach_found_inf,
    build_optimizer,
    check_optimizer,
    load_optimizer,
    takes_found_inf,
)
from engine.planning.advice import explained_memory
from engine.planning.batch_size import (
    find_batch_size_by_trial,
    predict_batch_sizes,
    with_batch,
)
from engine.planning.memory import MemoryBudget, MemoryEstimator, refuse_impossible
from engine.planning.strategy import first_that_fits, strategy_choices
from engine.planning.summary import (
    cost_lines,
    length_lines,
    origin_lines,
    parameter_counts,
    planned_tokens,
    ratio_line,
    tokens_per_step,
    training_flops,
)
from engine.precision.precision import Precision
from engine.reporting import Reporter, RunSize
from engine.run_directory.directory import RunDirectory, directory_lines
from engine.run_directory.fork import read_fork
from engine.saving import CheckpointSaver
from engine.setup.prompt import sample_writer
from engine.setup.run_setup import EVAL_BATCH, RunSetup, prepare_run
from engine.train_state import TrainState, restore_rng, seed_apart, seed_generators
from engine.trainer import Trainer
from model import LanguageModel, build_model, pretrained


@dataclass(frozen=True)
class ModelParts:
    """What computes: the model in its number formats, and its optimizer."""

    model: LanguageModel
    precision: Precision
    optimizer: torch.optim.Optimizer
    compile_wanted: bool
    covered: list[str]
    """What low precision covers, and whose kernels compute, in words."""


def build(request: Request, world: World, stack: ExitStack) -> Trainer:
    """Builds a run; `stack` closes what it opens.

    The order matters. Weights are drawn right after seeding. Number formats take charge of the
    weights on their device, the optimizer then sees the parameters that are left to train. Saved
    state goes into all of them before anything is compiled or shared between processes. The run
    directory comes last, so that an error before it leaves nothing behind.
    """
    budget, base = MemoryBudget.of(world), allocated_bytes(world.device)
    check_graphs(request.config, world)
    check_kernels(request.config, world.device)
    open_precision(request.config, world)  # refuses what this device lacks, before text is read

    setup = prepare_run(request, world)
    steps = setup.planned_steps(world)

    # What `auto` becomes here is not saved: it follows from the memory of this machine.
    resolved = resolve_auto(setup.config, steps, world, budget)
    parts = build_parts(replace(setup, config=resolved), steps, world)
    estimator = MemoryEstimator(
        resolved, parts.model, parts.precision, world, parts.compile_wanted, base
    )
    if resolved.training.batch_size == "auto":
        batch = find_batch_size(setup, parts, estimator, budget)
        setup = setup.with_batch(batch)
        estimator = replace(estimator, config=with_batch(resolved, batch, EVAL_BATCH))
    config = setup.config
    stack.enter_context(explained_memory(estimator, budget))
    console.info(*cost_lines(estimator, budget, parts.optimizer), *parts.covered)

    seed_apart(config.training.seed, 0, world.rank)
    state, data_state = restore(setup, parts, world)

    data = RunData(setup.dataset, config)
    sample = sample_writer(parts.model, config, parts.precision, setup.dataset.tokenizer)
    evaluator = Evaluator(parts.model, data, parts.precision, world, micro_batch(config), sample)
    compile_s, compiled = compile_parts(parts, config, data.document_ids)
    graphed, recorded = graphed_step(parts.model, parts.precision, config, data.document_ids)
    state.compiled = compile_s is not None

    size = run_size(parts.model, config, steps, world, evaluator)
    training = state.has_work(config.training)
    batches = open_batches(data, config, data_state, world, stack) if training else iter(())
    directory = open_directory(setup, state, run_facts(setup, parts, world, size), stack)
    trackers = open_trackers(config, directory, state, stack) if world.is_main else []
    # A fork's own directory holds no checkpoint yet, not even of the step that it begins with.
    saved = (0, 0) if setup.start.is_fork else (state.step, state.evaluated_step)
    saver = CheckpointSaver(config, world, directory, *saved)
    stack.callback(saver.close)  # before the directory is given up
    console.info(*directory_lines(directory, setup.start.continued))
    console.info(*start_lines(setup, parts, world, state, compiled + recorded))
    return Trainer(
        config=config,
        world=world,
        precision=parts.precision,
        model=parts.model,
        parallel_model=wrap_ddp(parts.model, world),
        graphed_step=graphed,
        optimizer=parts.optimizer,
        data=data,
        batches=batches,
        data_state=lambda: data_state or {},
        state=state,
        size=size,
        directory=directory,
        evaluator=evaluator,
        reporter=Reporter(config, world, parts.precision, size, directory, trackers, compile_s),
        saver=saver,
        found_inf=attach_found_inf(parts.optimizer, world.device) if reads_late(parts) else None,
    )


# Phase 2: model, number formats, optimizer


def resolve_auto(config: Config, steps: int, world: World, budget: MemoryBudget) -> Config:
    """Returns the config with values in place of `auto` for `distributed.strategy` and
    `training.recompute`, and says where they are not the fastest.

    A collective. Raises ConfigError for a model that no choice brings near this machine's memory.
    """
    choices = strategy_choices(config, world.size)
    refuse_impossible(choices[-1], open_precision(config, world), world, build_model)
    if len(choices) == 1:
        return choices[0]
    with torch.device("meta"):
        model = build_model(config)
    precision = open_precision(config, world)
    precision.prepare(model, steps, init=False)
    chosen, lines = first_that_fits(
        choices, MemoryEstimator(config, model, precision, world), budget
    )
    console.info(*lines)
    return chosen


def open_precision(config: Config, world: World) -> Precision:
    """Checks that this device computes in the formats asked for; raises ConfigError."""
    return Precision(config.low_precision, world.device, config.fp8)


def build_parts(setup: RunSetup, steps: int, world: World) -> ModelParts:
    """Builds the model with fresh or pretrained weights on its device, in its number formats, and
    its optimizer."""
    config, start = setup.config, setup.start
    precision = open_precision(config, world)
    console.info("Initializing model...")
    seed_generators(config.training.seed)
    model = initial_model(setup, precision, world)
    sharded = sharding_lines(config.distributed.strategy, model, world)
    covered = precision.prepare(model, steps, init=start.resume is None)
    kernels = choose_kernels(model, config, world.device)
    before = start.saved["train"]["compiled"] if start.saved else None
    return ModelParts(
        model=model,
        precision=precision,
        optimizer=new_optimizer(model, config),
        compile_wanted=wants_compiler(config, model, steps, world, before) and precision.compiles,
        covered=[*sharded, *covered, *kernels],
    )


def initial_model(setup: RunSetup, precision: Precision, world: World) -> LanguageModel:
    """Returns the model on its device with fresh or pretrained weights, or before those of a
    checkpoint. A sharded one is never whole: its weights are drawn or read one by one."""
    config, start = setup.config, setup.start
    mesh = shard_mesh(config.distributed.strategy, world)
    if mesh is None:
        model = build_model(config).to(world.device)
    else:
        if world.on_cpu:
            return_freed_memory()
        with torch.device("meta"):
            model = build_model(config)
        shard_model(model, mesh, precision.weight_dtype)
        model.to_empty(device=world.device)
        if start.resume is None:
            draw_weights(model)
    if start.weights is not None:
        block_size = config.training.block_size
        load_weights(model, pretrained.fitting_weights(model, start.weights, block_size))
    return model


def new_optimizer(model: LanguageModel, config: Config) -> torch.optim.Optimizer:
    """Returns the optimizer of the parameters that are trained."""
    four_bit = config.low_precision.use_4bit_optimizer
    return build_optimizer(model, config.optimizer, config.training.weight_decay, four_bit)


def wants_compiler(
    config: Config, model: LanguageModel, steps: int, world: World, before: bool | None
) -> bool:
    """Returns whether `system.compile` asks to compile a run of so many steps. before: whether the
    run that is resumed was compiled."""
    run_flops = training_flops(model, config) * tokens_per_step(config, world.size) * steps
    return compile_wanted(config.system, world.device, run_flops, before)


def find_batch_size(
    setup: RunSetup, parts: ModelParts, estimator: MemoryEstimator, budget: MemoryBudget
) -> int:
    """Returns the largest `training.batch_size` that fits: by the prediction and, on a GPU, by
    trial. Raises ConfigError where none does."""
    world, sizes, line, problem = estimator.world, [0], "", ""
    try:
        sizes, line = predict_batch_sizes(estimator, budget)
    except ConfigError as error:
        problem = str(error)
    # Raised on all: the process that has too little memory may not be the one that prints.
    if problems := list(filter(None, world.broadcast(world.gather(problem)))):
        raise ConfigError(problems[0])
    most = world.all_reduce_min(sizes[0])  # processes may have different amounts of free memory
    sizes = [each for each in sizes if each <= most]
    batch = sizes[0]
    # A sharded model cannot try: the processes would wait for one that has run out of memory.
    if not world.on_cpu and not is_sharded(parts.model):
        document_ids = document_id_function(setup.dataset, setup.config)

        def attempt(each: int) -> None:
            try_model(parts.model, parts.precision, with_batch(setup.config, each), document_ids)

        batch = find_batch_size_by_trial(sizes, attempt, world)
    after = [f"Batch size: {batch}, after a trial on all processes"] if batch < most else []
    console.info(line, *after)
    return batch


# Phase 3: saved state


def restore(
    setup: RunSetup, parts: ModelParts, world: World
) -> tuple[TrainState, dict[str, Any] | None]:
    """Puts a checkpoint back into the parts; returns the run's state and where its data stands.
    Raises CheckpointError. For a new run: a new state, and None for the data's beginning.
    """
    start, saved = setup.start, setup.start.saved
    if start.resume is None:
        return TrainState(), None
    state, data_state, generators = (
        TrainState.from_saved(saved["train"]),
        saved["cursor"],
        saved["rng"],
    )
    if saved["config"]["training"]["block_size"] != setup.config.training.block_size:
        state.best_val_loss = state.best_step = None  # longer rows have another loss
    with as_checkpoint_error(start.resume.path):
        skipped = bool(saved["precision"]["scaler"])
        check_optimizer(parts.optimizer, saved["optimizer"], state.step, skipped)
        console.info(*parts.precision.load_state_dict(saved["precision"]))
        if len(generators) == world.size or world.is_main:
            restore_rng(generators[world.rank], world.device)
        else:  # as many processes as never before: only dropout draws from these
            seed_apart(saved["config"]["training"]["seed"], state.step, world.rank)
    load_weights(parts.model, saved["model"])
    load_optimizer(parts.optimizer, saved["optimizer"])
    if start.is_fork:
        state.tracker_run = None  # a run of its own there, too
    saved.clear()  # the checkpoint's tensors would take the memory of a second model until the end
    return state, data_state


# Phase 4: compilation


def compile_parts(
    parts: ModelParts, config: Config, document_ids: DocumentIds | None
) -> tuple[float | None, str]:
    """Compiles the model where that is wanted, and verifies that FP8 is used; returns the
    seconds that compiling took, None where nothing was compiled, and what was done in words."""
    trial = partial(try_model, parts.model, parts.precision, config, document_ids)
    device = parts.precision.device
    compile_s, words = compile_model(parts.model, parts.compile_wanted, device, trial)
    console.info(*parts.precision.verify_fp8_used(trial))
    return compile_s, words


def try_model(
    model: LanguageModel, precision: Precision, config: Config, document_ids: DocumentIds | None
) -> None:
    """Runs one forward and backward pass over a batch of ones; leaves no gradients."""
    shape = (micro_batch(config), config.training.block_size + 1)
    with precision.autocast():
        rows = torch.ones(shape, dtype=torch.uint8)
        loss = next_token_loss(model, rows, precision.device, document_ids)
    precision.backward(loss)
    model.zero_grad(set_to_none=True)


# Phase 5: data, run directory, trackers


def run_size(
    model: LanguageModel, config: Config, steps: int, world: World, evaluator: Evaluator
) -> RunSize:
    """Returns how much work a run of so many steps is."""
    return RunSize(
        steps=steps,
        tokens_per_step=tokens_per_step(config, world.size),
        flops_per_token=training_flops(model, config),
        evaluated_tokens=evaluator.evaluated_tokens,
    )


def reads_late(parts: ModelParts) -> bool:
    """Returns whether loss and gradient norm are read one step late (`Trainer.found_inf`).

    On a CPU there is nothing to wait for. Muon and the low-bit optimizers would take a step that is
    not finite, and float16's loss scaler has a `found_inf` of its own: there the host looks first.
    """
    skips = takes_found_inf(parts.optimizer) and not parts.precision.tolerates_overflow
    return skips and parts.precision.device.type == "cuda"


def open_batches(
    data: RunData,
    config: Config,
    data_state: dict[str, Any] | None,
    world: World,
    stack: ExitStack,
) -> Iterator[StepBatch]:
    """Returns the training batches of this process; with `use_oracle` the first one again and
    again."""
    loader = data.batches(data_state, world.rank, world.size, pin=world.device.type == "cuda")
    stack.enter_context(loader)
    return repeat(RepeatFirstBatch(loader)) if config.training.use_oracle else loader


def run_facts(setup: RunSetup, parts: ModelParts, world: World, size: RunSize) -> dict[str, Any]:
    """Returns what environment.json tells of a run in numbers, so that a list of runs need not
    count."""
    trained = [p.numel() for p in parts.model.parameters() if p.requires_grad]
    return {
        "device": world.device_name,
        "cuda": cuda_versions(world.device),
        "threads": torch.get_num_threads(),
        "run": {
            "parameters": sum(parameter_counts(parts.model)),
            "trainable_parameters": sum(trained),
            "tokens_per_step": size.tokens_per_step,
            "planned_steps": size.steps,
            "flops_per_token": size.flops_per_token,
            "processes": world.size,
            "precision": parts.precision.matmul_format,
        },
        "data": {
            "fingerprint": setup.dataset.fingerprint,
            "lines": setup.dataset.lines(),
        },
    }


def open_directory(
    setup: RunSetup, state: TrainState, facts: dict[str, Any], stack: ExitStack
) -> RunDirectory:
    """Returns the run directory: continued at resume, else made at the first save."""
    config, origin, start = setup.request.config, origin_lines(setup.request), setup.start
    if not is_main_process():  # it names the run there, and is never written
        return RunDirectory(config, origin)
    if start.resume is None or not state.has_work(config.training):
        return stack.enter_context(RunDirectory.start(config, origin, facts))
    if not start.is_fork:
        return stack.enter_context(RunDirectory.reopen(start.resume, config, origin, facts))
    assert start.saved_config is not None
    changed = differences(start.saved_config, config)
    fork = read_fork(start.resume, changed, state.elapsed_s)
    return stack.enter_context(RunDirectory.start(config, origin, facts, fork))


def open_trackers(
    config: Config, directory: RunDirectory, state: TrainState, stack: ExitStack
) -> list[Tracker]:
    """Returns what records are sent to besides metrics.jsonl, under the run's name there."""
    folder = Path(config.training.checkpoint_dir)
    wandb = Wandb.start(config, directory.name, state.tracker_run, folder)
    board = TensorBoard.start(config, lambda: directory.path, state.step + 1)
    if wandb is not None:
        state.tracker_run = wandb.run_id
        if directory.will_save:
            stack.callback(wandb.report_files, unless=lambda: directory.is_kept)
    trackers: list[Tracker] = [tracker for tracker in (wandb, board) if tracker is not None]
    for tracker in trackers:
        stack.push(lambda kind, *_, tracker=tracker: tracker.close(0 if kind is None else 1))
    return trackers


def start_lines(
    setup: RunSetup, parts: ModelParts, world: World, state: TrainState, compiled: str
) -> list[str]:
    """Returns the last lines before training: device, formats, length of the run, seed."""
    config, precision = setup.config, parts.precision
    steps = setup.planned_steps(world)
    work = state.has_work(config.training)
    tokens = planned_tokens(config, world.size, steps, setup.done)
    error = setup.dataset.stats.error
    return [
        f"Starting training from iteration {state.step}..." if work else "Nothing to train.",
        f"Device: {world.device_name} | {precision.name} | {compiled}",
        *filter(None, [precision.note]),
        *parts.model.notes(world.on_cpu),
        *length_lines(config, world.size, setup.epoch_tokens, error, setup.done),
        *setup.source_lines(world),
        ratio_line(tokens, parts.model),
        f"Seed: {config.training.seed}",
        RULE,
    ]
