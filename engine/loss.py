"""What a model reads and predicts, and its loss: a sum over tokens.

Sums, not means: `train.py` divides by the tokens of the whole optimizer step, so a gradient does
not depend on how the step is cut into micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.loss import IGNORED

DocumentIds = Callable[[Tensor], Tensor]
"""Maps tokens (B, T) to the number of each token's document (B, T)."""


def inputs_and_targets(
    rows: Tensor, device: torch.device, document_ids: DocumentIds | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns what the model reads (B, T), what it shall predict (B, T), and the document of each
    token read (B, T), from rows of T + 1 tokens.

    With `document_ids`, the last token of a document has no target: it would be the first token of
    another document. Without, tokens see all tokens before them, and the third value is None.
    """
    # Rows travel to the device in the smallest type that holds the vocabulary.
    rows = rows.to(device, non_blocking=True).long()
    inputs, targets = rows[:, :-1], rows[:, 1:]
    if document_ids is None:
        return inputs, targets, None
    ids = document_ids(rows)
    return inputs, targets.masked_fill(ids[:, 1:] != ids[:, :-1], IGNORED), ids[:, :-1]


def next_token_loss(
    model: nn.Module, rows: Tensor, device: torch.device, document_ids: DocumentIds | None = None
) -> Tensor:
    """Returns the summed cross-entropy in nats of `model` on rows (B, T+1)."""
    inputs, targets, ids = inputs_and_targets(rows, device, document_ids)
    loss_sum: Tensor = model(inputs, ids, targets)
    return loss_sum


def count_targets(rows: Tensor, document_ids: DocumentIds | None = None) -> int:
    """Returns how many tokens of rows (B, T+1) `next_token_loss` sums over."""
    if document_ids is None:
        return rows[:, 1:].numel()
    ids = document_ids(rows)
    return int((ids[:, 1:] == ids[:, :-1]).sum())
