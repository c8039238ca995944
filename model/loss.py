"""The training loss: cross-entropy of the next token, as a sum over tokens.

B samples, T tokens, V vocabulary
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that adds nothing to the loss


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross-entropy in nats of logits (B, T, V), computed in float32."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
