"""`--dry-run`: everything is checked and the plan is printed."""

from __future__ import annotations

import torch

from config import Request
from data.text import Text, embedded_is_missing
from engine.metrics import say
from engine.plan import length_lines, model_lines, origin_lines, planned_steps, tokens_line
from engine.run import RunDirectory, directory_lines
from engine.world import World
from launch.begin import begin
from launch.build import new_optimizer, open_precision
from model import build_model


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
