"""What number formats ask of a model: which of its weights are hidden, and which are its ends."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class HasWeights(Protocol):
    """Besides being an `nn.Module`."""

    def matrices(self) -> list[tuple[nn.Parameter, int]]:
        """The hidden weight matrices, each with the number stacked in it."""

    def ends(self) -> tuple[Tensor, Tensor]:
        """The parameters of the embedding and of the head: one where they are tied."""
