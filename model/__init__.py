"""Models: tensors in, tensors out. They know nothing of data, devices, ranks or precision.

A new model is one file here and one entry in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from config import Config
from model import pretrained as pretrained
from model.bdh.model import BDH
from model.gpt import GPT
from model.llama import Llama


class LanguageModel(Protocol):
    """What the trainer asks of a model, besides being an `nn.Module`."""

    max_context: int | None
    """The longest context the model can take; None: any."""

    def __call__(self, tokens: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) of the next token at each position, from token ids (B, T).

        documents (B, T) number the documents, where tokens may see only their own.
        """

    def activity(
        self, tokens: torch.Tensor, documents: torch.Tensor | None = None
    ) -> dict[str, list[float]]:
        """The share of active neurons on tokens (B, T), by kind and layer; empty where all are."""

    def init_weights(self) -> None:
        """Draws every weight anew from torch's global generator."""

    def matrices(self) -> list[tuple[nn.Parameter, int]]:
        """The hidden weight matrices, for optimizers that treat matrices as such, each with the
        number of equal matrices stacked in it along its first dimension (3-D: one per entry): fused
        query, key and value are 3. Neither embeddings nor the head.
        """

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameters of the embedding and of the head: one where they are tied."""

    def notes(self, on_cpu: bool) -> list[str]:
        """Lines for the start of a run: where the model computes otherwise than the config asks."""

    def state_bytes(self, length: int) -> int:
        """Memory of the state of one sample of so many tokens."""

    def start(self, batch: int) -> Any:
        """The state of so many samples before their first token; for `extend` only."""

    def extend(self, tokens: torch.Tensor, state: Any) -> torch.Tensor:
        """Feeds tokens (B, T) to the state: the logits after them (B, V), without gradients."""

    def activation_bytes(
        self, tokens: tuple[int, int], dtype: torch.dtype, on_cpu: bool, adding: bool = False
    ) -> int:
        """Peak memory of a training step on tokens (B, T), weights and their gradients aside.

        adding: to the gradients of micro-steps before.
        """

    def cached_bytes(self, tokens: tuple[int, int], dtype: torch.dtype, on_cpu: bool) -> int:
        """Memory of what stays between steps, such as angles of positions."""

    def flops_per_token(self, block_size: int) -> int:
        """FLOPs of forward and backward per token at this context length, as the model counts."""


MODELS: dict[str, Callable[[Config], nn.Module]] = {
    "bdh": lambda config: BDH(config.to_bdh_config()),
    "gpt": lambda config: GPT(config.model, config.training.block_size),
    "llama": lambda config: Llama(config.model),
}


def build_model(config: Config) -> nn.Module:
    """The model that `config.model` describes, with freshly drawn weights, on the CPU."""
    return MODELS[config.model.name](config)
