"""Losses: of a training batch, and of a fixed list of held-out rows."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.hardware.distributed import World

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
def batch_losses(
    model: nn.Module,
    batches: tuple[Tensor, ...],
    loss: Callable[[Tensor], Tensor],
    stopped: Callable[[], bool],
    world: World,
) -> list[float] | None:
    """The `loss` of each of the batches (B, T+1), with dropout off.

    The processes share the batches. None when `stopped()`, asked by all of them together, became
    true on the way. Draws nothing from any random generator.
    """
    losses = torch.zeros(len(batches), dtype=torch.float64)
    with evaluating(model):
        for first in range(0, len(batches), world.size):
            if stopped():
                return None
            if (mine := first + world.rank) < len(batches):
                losses[mine] = loss(batches[mine]).item()
    values: list[float] = world.all_reduce_sum(losses).tolist()
    return values


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def fingerprint(batches: tuple[Tensor, ...], documents: DocumentIds | None) -> str:
    """Twelve hex digits that only equal rows, counted alike, have: losses on them compare."""
    digest = hashlib.sha256(b"apart" if documents else b"whole")
    for rows in batches:
        digest.update(str(tuple(rows.shape)).encode())
        digest.update(rows.long().numpy().tobytes())
    return digest.hexdigest()[:12]


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The loss in a unit that does not depend on the tokenizer."""
    return nats_per_token / (math.log(2) * bytes_per_token)
