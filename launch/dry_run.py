"""`--dry-run`: everything is checked, the plan is printed, and its parts are timed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from config import Request, micro_batch
from data.text import Text, document_reader, embedded_is_missing
from engine.compile import compile_model
from engine.forecast import forecast, measure, scaled, seconds_of, trial_config
from engine.memory import Needs, Room, largest_batch, with_batch
from engine.metrics import say
from engine.plan import (
    cost_lines,
    learning_rate_plot,
    length_lines,
    origin_lines,
    planned_steps,
    ratio_line,
    tokens_line,
)
from engine.run import RunDirectory, directory_lines
from engine.world import World
from launch.begin import EVAL_BATCH, Beginning, begin
from launch.build import new_optimizer, open_precision, sampler, try_model, wants_compiler
from model import build_model


def dry_run(request: Request, world: World) -> None:
    """Prints the resolved config and the plan; trains nothing, creates nothing."""
    room = Room.of(world)
    start = None if embedded_is_missing(request.config) else begin(request, world)
    config = request.config if start is None else start.config
    steps = planned_steps(config, world.size, start.epoch_tokens if start else 0)
    with torch.device("meta"):
        model = build_model(config)
    precision = open_precision(config, world)
    covered = precision.prepare(model, steps, fill=False)
    optimizer = new_optimizer(model, config)
    wanted = wants_compiler(config, start.saved if start else {}, model, steps, world)
    needs = Needs(config, model, precision, world, wanted and precision.compiles)
    lines = []
    if config.training.batch_size == "auto":
        sizes, line = largest_batch(needs, room)
        config = with_batch(config, sizes[0], EVAL_BATCH)
        needs, lines = replace(needs, config=config), [line]
    tokens = tokens_line(config, world.size)
    if start is not None:
        Text(start.data, config)  # whether it is long enough
    else:
        folder = config.dataset.parquet_dir
        say(*origin_lines(request))
        say(f"Data: {folder} is missing; the run will build it from the Python standard library")
    say("", config.to_yaml(), *lines, *cost_lines(needs, room, optimizer), *covered)
    if start is not None:
        tokens_off = start.data.ledger.error
        say(*length_lines(config, world.size, start.epoch_tokens, tokens_off))
    else:
        say(tokens)
    say(ratio_line(config, world, steps, model), *learning_rate_plot(config, steps))
    done = start.resume.step if start and start.resume else 0
    say(*time_lines(needs, room, range(done, max(done, steps)), start))
    directory = RunDirectory.start(config)
    say(*directory_lines(directory, start.resume if start else None))
    say("Dry run: nothing was trained or created.")


def time_lines(needs: Needs, room: Room, span: range, start: Beginning | None) -> Iterator[str]:
    """How long the steps after `span.start` will take, by some of the run's own on weights that are
    thrown away."""
    config, world = needs.config, needs.world
    documents = None if start is None else document_reader(start.data, config)
    trial = trial_config(needs, room)
    if trial is None:
        yield "Time: unknown: not even one sequence at a time fits, so that none can be timed"
        return
    precision = open_precision(config, world)
    model = build_model(config).to(world.device)
    precision.prepare(model, span.stop)
    attempt = partial(try_model, model, precision, trial, documents)
    compile_s, said = compile_model(model, needs.compiled, world.device, attempt)
    rates = measure(model, new_optimizer(model, config), precision, trial, documents)
    rates = scaled(rates, micro_batch(config) / micro_batch(trial))
    write = None if start is None else sampler(model, config, precision, start.data.tokenizer)
    if write is not None:
        rates = replace(rates, sample=seconds_of(write, world.device))
    found = forecast(config, rates, model, span, world.size)
    yield replace(found, compile_s=compile_s or 0.0).line(world.size)
    smaller = "" if trial == config else " | one sequence at a time, which is all that fits"
    rest = f" | from step {span.start}" if span.start else ""
    yield f"Timed on {world.device_name} | {precision.name} | {said}{smaller}{rest}"
