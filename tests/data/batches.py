"""Reading batches in tests: steps of G rows of T tokens, and the data state after them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

import data
from config import DataLoaderConfig

T, G = 16, 16


def spec(**options: Any) -> data.BatchSpec:
    options = {"micro_batches": 1, "seed": 1337, **options}
    return data.BatchSpec(block_size=T, sequences_per_step=G, **options)


def read(
    dataset: data.Dataset,
    steps: int,
    spec: data.BatchSpec,
    data_state: dict[str, Any] | None = None,
    workers: int = 0,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows (steps, rows of this process, T + 1) and the data state after them."""
    config = DataLoaderConfig(num_workers=workers)
    with data.TrainLoader(dataset, spec, config, data_state) as batches:
        taken = list(itertools.islice(batches, steps))
        rows = [torch.cat(batch.micro_batches) for batch in taken]
        return torch.stack(rows), json.loads(json.dumps(taken[-1].data_state()))
