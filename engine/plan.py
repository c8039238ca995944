"""What a run is made of, said before it starts: vocabulary, parameters, memory, work, steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from config import Config, ConfigError, Request, accumulation_steps, sequences_per_step
from engine.metrics import short, size


def settle(
    config: Config, vocab_size: int, tokenizer: str, pretrained: Mapping[str, Any]
) -> tuple[Config, list[str]]:
    """The config with the model's shape and vocabulary as numbers, and lines that tell of them.

    vocab_size: tokens of the text, made by `tokenizer`. pretrained: options of the model whose
    weights the run begins with. Raises ConfigError for a vocabulary that is too small.
    """
    model, lines = replace(config.model, **pretrained), list[str]()
    if model.vocab_size is None:
        multiple = config.tokenizer.vocab_multiple
        model = replace(model, vocab_size=math.ceil(vocab_size / multiple) * multiple)
        lines.append(f"Vocabulary: {model.vocab_size} ({_used(vocab_size, model.vocab_size)})")
    elif model.vocab_size < vocab_size:
        source = config.training.init_from if pretrained else f"model.vocab_size={model.vocab_size}"
        raise ConfigError(
            f"{source}: {model.vocab_size} tokens, but the text has {vocab_size} (tokenizer "
            f"{tokenizer}). " + ("Use its own tokenizer." if pretrained else "null takes its size.")
        )
    elif model.vocab_size > vocab_size:
        lines.append(f"Vocabulary: {model.vocab_size} ({_used(vocab_size, model.vocab_size)})")
    return replace(config, model=model), lines


def _used(used: int, size: int | None) -> str:
    return "the tokenizer's" if used == size else f"of which the tokenizer uses {used}"


def origin_lines(request: Request) -> list[str]:
    """The files and overrides this config came from."""
    files = f"Config: {', '.join(request.files)}"
    return [files, *(f"Override: {text}" for text in request.overrides), *request.notes]


def planned_steps(config: Config, world_size: int, epoch_tokens: int) -> int:
    """Optimizer steps until `max_iters` or, by the tokens of each, the end of `epochs`."""
    training = config.training
    if training.epochs is None or training.use_oracle:  # the first batch never ends an epoch
        return training.max_iters
    steps = training.epochs * epoch_tokens / tokens_per_step(config, world_size)
    return min(training.max_iters, max(1, math.ceil(steps)))


def length_lines(config: Config, world_size: int, epoch_tokens: int) -> list[str]:
    """Tokens per step, and how long the run is in steps, tokens and passes over the data."""
    steps = planned_steps(config, world_size, epoch_tokens)
    planned = steps * tokens_per_step(config, world_size)
    about = "about " if steps < config.training.max_iters else ""
    return [
        tokens_line(config, world_size),
        f"Max iterations: {about}{steps} = {short(planned)} tokens, "
        f"about {planned / max(1, epoch_tokens):.2f} epochs",
    ]


def parameter_lines(model: nn.Module) -> list[str]:
    """Total and trainable parameters, and the part of each weight or module at the top, or below
    it where all of them lie in one."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    named = dict(model.named_parameters())
    level = 0 if len({name.split(".")[0] for name in named}) > 1 else 1
    parts: dict[str, int] = {}
    for name, parameter in named.items():
        part = name.split(".")[level]
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
