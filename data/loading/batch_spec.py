"""What the config says of a batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSpec:
    """The batch of a step and the part that one process has in it."""

    block_size: int
    """T: rows have T + 1 tokens."""
    sequences_per_step: int
    """The rows of all processes in one step."""
    micro_batches: int
    """Equal tensors that this process gets its rows in."""
    seed: int
    rank: int = 0
    world_size: int = 1
    lanes: int | None = None
    """Of all sources together, about; None: as many as fit."""
    pin: bool = False
    """Whether batches go to a GPU, so that dataloader.pin_memory applies."""
