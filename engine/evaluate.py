"""Losses: of a training batch, and of a fixed list of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def next_token_loss(model: nn.Module, rows: Tensor, device: torch.device) -> Tensor:
    """Mean cross-entropy in nats per token of rows (B, T+1): each token predicts the next."""
    rows = rows.to(device, non_blocking=True).long()
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


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
