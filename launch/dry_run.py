"""`--dry-run`: everything is checked, the plan is printed, and its parts are timed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from config import Request, micro_batch
from data.text import Text, embedded_is_missing
from engine.compile import compile_model
from engine.evaluate import DocumentIds
from engine.forecast import forecast, measure, scaled, trial_config
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
from launch.begin import begin
from launch.build import new_optimizer, open_precision, try_model, wants_compiler
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
        config = with_batch(config, sizes[0])
        needs, lines = replace(needs, config=config), [line]
    tokens = tokens_line(config, world.size)
    documents = None if start is None else Text(start.data, config).documents
    if start is None:
        folder = config.dataset.parquet_dir
        say(*origin_lines(request))
        say(f"Data: {folder} is missing; the run will build it from the Python standard library")
    say("", config.to_yaml(), *lines, *cost_lines(needs, room, optimizer), *covered)
    say(*length_lines(config, world.size, start.epoch_tokens) if start else [tokens])
    say(ratio_line(config, world, steps, model), *learning_rate_plot(config, steps))
    say(*time_lines(needs, room, steps, documents))
    directory = RunDirectory.start(config)
    say(*directory_lines(directory, start.resume if start else None))
    say("Dry run: nothing was trained or created.")


def time_lines(
    needs: Needs, room: Room, steps: int, documents: DocumentIds | None
) -> Iterator[str]:
    """How long the run will take, by some of its own steps on weights that are thrown away."""
    config, world = needs.config, needs.world
    trial = trial_config(needs, room)
    if trial is None:
        yield "Time: unknown: not even one sequence at a time fits, so that none can be timed"
        return
    precision = open_precision(config, world)
    model = build_model(config).to(world.device)
    precision.prepare(model, steps)
    attempt = partial(try_model, model, precision, trial, documents)
    compile_s, said = compile_model(model, needs.compiled, world.device, attempt)
    rates = measure(model, new_optimizer(model, config), precision, trial, documents)
    rates = scaled(rates, micro_batch(config) / micro_batch(trial))
    found = forecast(config, rates, model, steps, world.size)
    yield replace(found, compile_s=compile_s or 0.0).line(world.size)
    yield f"Timed on {world.device_name} | {precision.name} | {said}"
