"""What a run is made of, said before it starts: parameters, memory, work, tokens per step."""

from __future__ import annotations

from torch import nn

from config import Config, accumulation_steps, sequences_per_step
from engine.metrics import short, size


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


def tokens_per_step(config: Config, world_size: int) -> int:
    """Tokens of one optimizer step over all processes."""
    return sequences_per_step(config, world_size) * config.training.block_size


def tokens_line(config: Config, world_size: int) -> str:
    """Tokens per optimizer step, with the formula."""
    training, count = config.training, tokens_per_step(config, world_size)
    accumulation = accumulation_steps(config, world_size)
    plural = "process" if world_size == 1 else "processes"
    return (
        f"Tokens per step: {training.batch_size} sequences x {training.block_size} tokens x "
        f"{accumulation} accumulation x {world_size} {plural} = {count:,}"
    )


def cost_lines(
    model: nn.Module, activations: int, flops_per_token: int, step_tokens: int
) -> list[str]:
    """What a step takes: memory at its peak, with `activations` bytes of it, and work."""
    held = 0  # weights; where they are trained also gradients and AdamW's two moments
    for parameter in model.parameters():
        held += parameter.numel() * parameter.element_size() * (4 if parameter.requires_grad else 1)
    return [
        f"Memory of a step: {size(held + activations)} at its peak: {size(held)} weights, "
        f"gradients and optimizer, {size(activations)} activations",
        f"Work: {short(flops_per_token)} FLOP per token, "
        f"{short(flops_per_token * step_tokens)} per step",
    ]
