"""A model of odd shapes, and steps of an optimizer on gradients drawn from seeds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from config import OptimizerConfig
from engine.optim.build import build_optimizer, set_learning_rate
from model import HiddenWeight, LanguageModel

OPTIMIZERS = ("adamw", "adamw_4bit", "adamw_8bit", "muon")


class Toy(LanguageModel):
    """Parameters of every kind: with moments in few bits, one of them with a partial last block; in
    float32 since they are small or vectors; and stacked matrices for Muon."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw).to(dtype))

        self.matrix, self.stack = weights(64, 128), weights(3, 67, 41)
        self.fused, self.small = weights(24, 8), weights(8, 40)
        self.embedding, self.vector = weights(11, 8), weights(5000)

    def hidden_weights(self) -> list[HiddenWeight]:
        found = [(self.matrix, 2), (self.stack, 3), (self.fused, 3), (self.small, 1)]
        return [HiddenWeight(*each) for each in found]


def optimizer_of(
    name: str, model: nn.Module, weight_decay: float = 0.1, lr: float = 1e-3
) -> torch.optim.Optimizer:
    four_bit = name == "adamw_4bit"
    config = OptimizerConfig(name="adamw" if four_bit else name)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config, weight_decay, four_bit)
    set_learning_rate(optimizer, lr)
    return optimizer


def gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Gradients around 0.01, most of them zero."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for name, parameter in model.named_parameters():
        sparse = torch.rand(parameter.shape, generator=draw) < 0.3
        values = torch.randn(parameter.shape, generator=draw) * 0.01
        found[name] = (values * sparse).to(parameter.dtype)
    return found


def set_gradients(model: nn.Module, seed: int) -> None:
    for name, gradient in gradients(model, seed).items():
        model.get_parameter(name).grad = gradient


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step()


def changed(one: nn.Module, other: nn.Module) -> set[str]:
    """Names of the parameters that differ."""
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return {name for (name, mine), theirs in pairs if not torch.equal(mine, theirs)}
