"""What a run is made of, said before it starts: parameters, memory, work, tokens per step."""

from __future__ import annotations

from torch import nn

from config import Config
from engine.metrics import short


def parameter_lines(model: nn.Module) -> list[str]:
    """Total and trainable parameters, and the part of each top-level weight or module."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    listed = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    return [f"Total parameters: {total:,} ({listed})", f"Trainable parameters: {trainable:,}"]


def tokens_line(config: Config, accumulation: int, world_size: int) -> str:
    """Tokens per optimizer step, with the formula."""
    training = config.training
    count = training.batch_size * training.block_size * accumulation * world_size
    plural = "process" if world_size == 1 else "processes"
    return (
        f"Tokens per step: {training.batch_size} sequences x {training.block_size} tokens x "
        f"{accumulation} accumulation x {world_size} {plural} = {count:,}"
    )


def cost_line(model: nn.Module, flops_per_token: int, tokens_per_step: int) -> str:
    """What a step takes: memory that does not depend on the batch, and work."""
    moments = 4  # weights, gradients and AdamW's two moments
    held = sum(moments * p.numel() * p.element_size() for p in model.parameters())
    return (
        f"Memory: {short(held)}B for weights, gradients and optimizer, and activations | "
        f"Work: {short(flops_per_token)} FLOP per token, "
        f"{short(flops_per_token * tokens_per_step)} per step"
    )
