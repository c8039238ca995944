"""Losses: of a training batch, and of a fixed list of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.world import World

DocumentIds = Callable[[Tensor], Tensor]
"""Rows of tokens (B, T) to the number of each token's document, (B, T)."""

IGNORED = -100  # a target that does not count


def next_token_loss(
    model: nn.Module, rows: Tensor, device: torch.device, documents: DocumentIds | None = None
) -> Tensor:
    """Sum of the cross-entropies, in nats, of rows (B, T+1): each token predicts the next.

    With `documents` tokens see their own document only, and none predicts the next one's first.
    """
    rows = rows.to(device, non_blocking=True).long()
    targets = rows[:, 1:]
    if documents is None:
        logits = model(rows[:, :-1])
    else:
        ids = documents(rows)
        logits = model(rows[:, :-1], ids[:, :-1])
        targets = targets.masked_fill(ids[:, 1:] != ids[:, :-1], IGNORED)
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def count_targets(rows: Tensor, documents: DocumentIds | None = None) -> int:
    """How many tokens of rows (B, T+1) `next_token_loss` sums over."""
    if documents is None:
        return rows[:, 1:].numel()
    ids = documents(rows)
    return int((ids[:, 1:] == ids[:, :-1]).sum())


@torch.inference_mode()
def total_loss(
    model: nn.Module,
    batches: tuple[Tensor, ...],
    loss: Callable[[Tensor], Tensor],
    stopped: Callable[[], bool],
    world: World,
) -> float | None:
    """Sum of `loss` over all batches (B, T+1), with dropout off.

    The processes share the batches. None when `stopped()`, asked by all of them together, became
    true on the way. Draws nothing from any random generator.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    mine = batches[world.rank :: world.size]
    try:
        for turn in range(math.ceil(len(batches) / world.size)):
            if stopped():
                return None
            total += loss(mine[turn]).item() if turn < len(mine) else 0.0
    finally:
        model.train(was_training)
    return world.sum_number(total)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The loss in a unit that does not depend on the tokenizer."""
    return nats_per_token / (math.log(2) * bytes_per_token)
