"""Builds a run: text, model, formats, optimizer, saved state, run directory, in one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from config import Config, DataError, Request, micro_batch
from data.run_data import RepeatFirstBatch, RunData, document_id_function
from data.tokenizers.base import Tokenizer
from engine.checkpoint.contents import fitting
from engine.checkpoint.save_load import Resume
from engine.compile import compile_model, compile_wanted
from engine.evaluation import DocumentIds, evaluating, next_token_loss
from engine.hardware.distributed import World, is_main_process, wrap_ddp
from engine.hardware.memory import allocated_bytes
from engine.interfaces import Batch, Tracker
from engine.monitor import console
from engine.monitor.trackers import TensorBoard, Wandb
from engine.optim.build import build_optimizer, check_optimizer, load_optimizer
from engine.planning.memory import (
    Needs,
    Room,
    confirmed,
    explained_memory,
    largest_batch,
    refuse_impossible,
    with_batch,
)
from engine.planning.summary import (
    cost_lines,
    length_lines,
    origin_lines,
    parameter_counts,
    planned_steps,
    planned_tokens,
    ratio_line,
    tokens_per_step,
    training_flops,
)
from engine.precision.precision import Precision, apply_lora
from engine.run_directory.directory import RunDirectory, directory_lines
from engine.setup.begin import Beginning, begin, done_steps
from engine.train_state import TrainState, restore_rng, seed_apart, seed_generators
from engine.trainer import Session
from model import LanguageModel, build_model, pretrained
from model.generate import Sampling, generate

SAMPLE_TEMPERATURE = 0.8


def build(request: Request, world: World, stack: ExitStack) -> Session:
    """Builds a run. The order matters: weights are drawn right after seeding; number formats take
    charge of them on their device, then the optimizer; saved state goes into all before anything is
    compiled or shared between processes; and the run directory is opened last, so that an error
    before it leaves nothing.
    """
    room, base = Room.of(world), allocated_bytes(world.device)
    open_precision(request.config, world)  # what it refuses, before the text is read
    start = begin(request, world)
    precision = open_precision(start.config, world)
    data, epoch_tokens = start.data, start.epoch_tokens
    before = done_steps(start.saved)
    steps = planned_steps(start.config, world.size, epoch_tokens, before)
    refuse_impossible(start.config, precision, world, build_model)
    model = first_model(start, world)
    covered = precision.prepare(model, steps, init=not start.saved)
    optimizer = new_optimizer(model, start.config)
    wanted = wants_compiler(start.config, start.saved, model, steps, world) and precision.compiles
    needs = Needs(start.config, model, precision, world, wanted, base)
    needs = settle_batch(start, needs, room, precision)
    stack.enter_context(explained_memory(needs, room))
    config = start.config
    console.info(*cost_lines(needs, room, optimizer), *covered)
    seed_apart(config.training.seed, 0, world.rank)
    state, data_state = TrainState(), None
    if start.saved:
        state, data_state = restore(start, model, optimizer, precision, world)
    text, sample = RunData(data, config), sampler(model, config, precision, data.tokenizer)
    trial = partial(try_model, model, precision, config, text.document_ids)
    compile_s, compiled = compile_model(model, wanted, world.device, trial)
    state.compiled = compile_s is not None
    console.info(*precision.verify_fp8_used(trial))
    training = state.has_work(config.training)
    batches = open_batches(text, config, data_state, world, stack) if training else iter(())
    known = facts(start, world, model, precision, steps)
    directory = open_directory(start, start.resume if training else None, known, stack)
    console.info(*directory_lines(directory, start.resume))
    console.info(
        f"Starting training from iteration {state.step}..." if training else "Nothing to train."
    )
    console.info(f"Device: {world.device_name} | {precision.name} | {compiled}")
    console.info(*filter(None, [precision.note]), *model.notes(world.on_cpu))
    console.info(*length_lines(config, world.size, epoch_tokens, data.stats.error, before))
    console.info(ratio_line(planned_tokens(config, world.size, steps, before), model))
    console.info(f"Seed: {config.training.seed}", console.RULE)
    return Session(
        config=config,
        world=world,
        precision=precision,
        model=model,
        trained=wrap_ddp(model, world),
        flops_per_token=training_flops(model, config),
        optimizer=optimizer,
        batches=batches,
        text=text,
        activation_sparsity=model.activation_sparsity,
        directory=directory,
        state=state,
        data_state=lambda: data_state or {},
        planned_steps=steps,
        trackers=open_trackers(config, directory, state, stack) if world.is_main else (),
        sample=sample,
        compile_s=compile_s,
        saved_step=state.step,
        saved_evaluation=state.evaluated_step,
    )


def facts(
    start: Beginning, world: World, model: LanguageModel, precision: Precision, steps: int
) -> dict[str, Any]:
    """What environment.json tells of a run in numbers, so that a list of runs need not count."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    config, data = start.config, start.data
    return {
        "device": world.device_name,
        "run": {
            "parameters": sum(parameter_counts(model)),
            "trainable_parameters": sum(trained),
            "tokens_per_step": tokens_per_step(config, world.size),
            "planned_steps": steps,
            "flops_per_token": training_flops(model, config),
            "processes": world.size,
            "precision": precision.matmul_format,
        },
        "data": {"fingerprint": data.source.fingerprint, "lines": data.lines()},
    }


def first_model(start: Beginning, world: World) -> LanguageModel:
    """The model with fresh or pretrained weights, on its device."""
    config = start.config
    console.info("Initializing model...")
    seed_generators(config.training.seed)
    model = build_model(config)
    if start.weights is not None:
        pretrained.load_into(model, start.weights, config.training.block_size)
        start.weights = None  # it keeps the file mapped
    return model.to(world.device)


def new_optimizer(model: LanguageModel, config: Config) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained."""
    four_bit = config.low_precision.use_4bit_optimizer
    return build_optimizer(model, config.optimizer, config.training.weight_decay, four_bit)


def restore(
    start: Beginning,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    world: World,
) -> tuple[TrainState, dict[str, Any]]:
    """Puts a checkpoint back, and lets its content go; the state and the data state. Raises
    CheckpointError."""
    assert start.resume is not None
    saved = start.saved
    state, data_state, generators = TrainState(**saved["train"]), saved["cursor"], saved["rng"]
    if saved["config"]["training"]["block_size"] != start.config.training.block_size:
        state.best_val_loss = state.best_step = None  # longer rows have another loss
    with fitting(start.resume.path):
        skipped = bool(saved["precision"]["scaler"])
        check_optimizer(optimizer, saved["optimizer"], state.step, skipped)
        console.info(*precision.load_state_dict(saved["precision"]))
        if len(generators) == world.size or world.is_main:
            restore_rng(generators[world.rank], world.device)
        else:  # as many processes as never before: only dropout draws from these
            seed_apart(saved["config"]["training"]["seed"], state.step, world.rank)
    model.load_state_dict(saved["model"])
    load_optimizer(optimizer, saved["optimizer"])
    saved.clear()
    return state, data_state


def open_precision(config: Config, world: World) -> Precision:
    """Checks that this device computes in the formats asked for; raises ConfigError."""
    return Precision(config.low_precision, world.device, config.fp8)


def wants_compiler(
    config: Config, saved: dict[str, Any], model: LanguageModel, steps: int, world: World
) -> bool:
    """Whether `system.compile` asks to compile a run of so many steps, resumed from `saved`."""
    run_flops = training_flops(model, config) * tokens_per_step(config, world.size) * steps
    before = saved["train"]["compiled"] if saved else None
    return compile_wanted(config.system, world.device, run_flops, before)


def settle_batch(start: Beginning, needs: Needs, room: Room, precision: Precision) -> Needs:
    """Makes a number of `training.batch_size: auto` in `start`: the largest that fits, by the
    prediction, and on a GPU by trial. Raises ConfigError where none does."""
    if start.config.training.batch_size != "auto":
        return needs
    world, model = needs.world, needs.model
    sizes, line = largest_batch(needs, room)
    most = world.all_reduce_min(sizes[0])
    sizes = [each for each in sizes if each <= most]
    batch = sizes[0]
    if not world.on_cpu:
        documents = document_id_function(start.data, start.config)

        def attempt(each: int) -> None:
            try_model(model, precision, with_batch(start.config, each), documents)

        batch = confirmed(sizes, attempt, world)
    console.info(
        line, *([f"Batch size: {batch}, after a trial on all processes"] if batch < most else [])
    )
    start.take_batch(batch)
    return replace(needs, config=start.config)


def try_model(
    model: LanguageModel, precision: Precision, config: Config, documents: DocumentIds | None
) -> None:
    """One forward and backward pass over a batch of ones; leaves no gradients."""
    shape = (micro_batch(config), config.training.block_size + 1)
    with precision.autocast():
        rows = torch.ones(shape, dtype=torch.uint8)
        loss = next_token_loss(model, rows, precision.device, documents)
    precision.backward(loss)
    model.zero_grad(set_to_none=True)


def open_batches(
    text: RunData, config: Config, data_state: dict[str, Any] | None, world: World, stack: ExitStack
) -> Iterator[Batch]:
    """The training batches of this process; with `use_oracle` the first one for ever."""
    loader = text.batches(data_state, world.rank, world.size, pin=world.device.type == "cuda")
    stack.enter_context(loader)
    return RepeatFirstBatch.for_ever(loader) if config.training.use_oracle else loader


def open_directory(
    start: Beginning, resume: Resume | None, known: dict[str, Any], stack: ExitStack
) -> RunDirectory:
    """The run directory: continued at resume, else promised and made at the first save."""
    config, origin = start.request.config, origin_lines(start.request)
    if not is_main_process():  # it names the run there, and is never written
        return RunDirectory(config, origin)
    if resume is None:
        return stack.enter_context(RunDirectory.start(config, origin, known))
    return stack.enter_context(RunDirectory.reopen(resume, config, origin, known))


def open_trackers(
    config: Config, directory: RunDirectory, state: TrainState, stack: ExitStack
) -> list[Tracker]:
    """What records are sent to besides metrics.jsonl, under the run's name there."""
    folder = Path(config.training.checkpoint_dir)
    wandb = Wandb.start(config, directory.name, state.tracker_run, folder)
    board = TensorBoard.start(config, lambda: directory.path, state.step + 1)
    if wandb is not None:
        state.tracker_run = wandb.run_id
        if directory.saves:
            stack.callback(wandb.tell_files, unless=lambda: directory.stays)
    trackers = [tracker for tracker in (wandb, board) if tracker is not None]
    for tracker in trackers:
        stack.push(lambda kind, *_, tracker=tracker: tracker.close(0 if kind is None else 1))
    return list(trackers)


def sampler(
    model: LanguageModel, config: Config, precision: Precision, tokenizer: Tokenizer
) -> Callable[[], str] | None:
    """Writes on from `training.sample_prompt`, each time with the same random numbers, which are
    its own; None where no sample is asked for. Raises DataError for a prompt that has no tokens.
    """
    training = config.training
    if training.sample_prompt is None:
        return None
    try:
        ids = tokenizer.encode(training.sample_prompt).tolist()
    except DataError as error:
        raise DataError(f"training.sample_prompt: {error}") from None
    if not ids:
        raise DataError(f"training.sample_prompt: tokenizer {tokenizer.name} makes no token of it")

    def write() -> str:
        plain = model if precision.fp8 is None else unbound(model, config, precision)
        generator = torch.Generator(precision.device).manual_seed(training.seed)
        prompt = torch.tensor([ids], device=precision.device)
        sampling = Sampling(temperature=SAMPLE_TEMPERATURE)
        with evaluating(plain):
            drawn = generate(plain, prompt, sampling, [generator], training.block_size)
            tokens = [int(token) for token in islice(drawn, training.sample_tokens)]
        return tokenizer.decode(ids + tokens)

    return write


def unbound(model: LanguageModel, config: Config, precision: Precision) -> LanguageModel:
    """A copy whose products are not bound to 8 bits, which take no sizes as odd as one token."""
    with torch.random.fork_rng([precision.device] if precision.device.type == "cuda" else []):
        copy = build_model(config)
    apply_lora(copy, config.low_precision, init=False)
    copy.load_state_dict(model.state_dict())
    return copy.to(precision.device)
