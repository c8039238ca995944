"""Reading batches in tests: steps of G rows of T tokens, and the data state after them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

import data
from config import DataLoaderConfig
from data.loading.data_state import DataState

T, G = 16, 16

Layout = tuple[int, int, int]
"""(processes, workers of each, micro-batches)"""


def spec(**options: Any) -> data.BatchSpec:
    options = {
        "micro_batches": 1,
        "seed": 1337,
        "block_size": T,
        "sequences_per_step": G,
        **options,
    }
    return data.BatchSpec(**options)


def read(
    dataset: data.Dataset,
    steps: int,
    spec: data.BatchSpec,
    data_state: DataState | None = None,
    workers: int = 0,
) -> tuple[torch.Tensor, DataState]:
    """Rows (steps, rows of this process, T + 1) and the data state after them."""
    config = DataLoaderConfig(num_workers=workers)
    with data.TrainLoader(dataset, spec, config, data_state) as batches:
        taken = list(itertools.islice(batches, steps))
        rows = [torch.cat(batch.micro_batches) for batch in taken]
        return torch.stack(rows), json.loads(json.dumps(taken[-1].data_state()))


def read_all(
    dataset: data.Dataset, steps: int, layout: Layout, data_state: DataState | None, **options: Any
) -> tuple[torch.Tensor, DataState]:
    """The global rows (steps, G, T + 1) of all processes, and their merged data state."""
    world, workers, micro = layout
    specs = [spec(rank=r, world_size=world, micro_batches=micro, **options) for r in range(world)]
    parts = [read(dataset, steps, part, data_state, workers) for part in specs]
    merged = data.merge_data_states([state for _, state in parts])
    return torch.cat([rows for rows, _ in parts], dim=1), merged
