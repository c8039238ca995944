"""Losses: of a training batch, and of a fixed list of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DocumentIds = Callable[[Tensor], Tensor]
"""Rows of tokens (B, T) to the number of each token's document, (B, T)."""

IGNORED = -100  # a target that does not count


def next_token_loss(
    model: nn.Module, rows: Tensor, device: torch.device, documents: DocumentIds | None = None
) -> Tensor:
    """Mean cross-entropy in nats per token of rows (B, T+1): each token predicts the next.

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
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


@torch.inference_mode()
def mean_loss(
    model: nn.Module,
    batches: tuple[Tensor, ...],
    loss: Callable[[Tensor], Tensor],
    stopped: Callable[[], bool],
) -> float | None:
    """Mean of `loss` over all rows of the batches (B, T+1), with dropout off.

    None when `stopped()` became true on the way. Draws nothing from any random generator.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for batch in batches:
            if stopped():
                return None
            total += loss(batch).item() * len(batch)
    finally:
        model.train(was_training)
    return total / sum(len(batch) for batch in batches)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The loss in a unit that does not depend on the tokenizer."""
    return nats_per_token / (math.log(2) * bytes_per_token)
