"""The plan of a run, printed before it starts: vocabulary, parameters, memory, work, length, and a
plot of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from config import (
    Config,
    ConfigError,
    Request,
    accumulation_steps,
    sequences_per_step,
    warmup_steps,
)
from data import Dataset
from data.sources.dataset import Source
from data.sources.parquet.text_column import AUTO
from engine.optim.build import optimizer_lines
from engine.planning.advice import memory_lines
from engine.planning.memory import MemoryBudget, MemoryEstimator
from engine.schedule import learning_rate
from model.interface import LanguageModel
from settings.addresses import shareable
from settings.formatting import format_count

MOST_EPOCHS = 4  # of one text that are worth about as much as new text: arXiv 2305.16264
BARS = " ▁▂▃▄▅▆▇█"  # eighths of a line


def resolve_vocab_size(config: Config, vocab_size: int, tokenizer: str) -> tuple[Config, list[str]]:
    """Returns the config with `model.vocab_size` as a number, and lines that tell of it.

    vocab_size: of the tokenizer of that name. Raises ConfigError for a model whose vocabulary is
    smaller.
    """
    model, lines = config.model, list[str]()
    from_weights = config.training.init_from != "scratch"
    if model.vocab_size is None:
        multiple = config.tokenizer.vocab_multiple
        model = replace(model, vocab_size=math.ceil(vocab_size / multiple) * multiple)
        lines.append(f"Vocabulary: {model.vocab_size} ({_used(vocab_size, model.vocab_size)})")
    elif model.vocab_size < vocab_size:
        named = f"model.vocab_size={model.vocab_size}"
        source = config.training.init_from if from_weights else named
        remedy = "Use its own tokenizer." if from_weights else "null takes its size."
        raise ConfigError(
            f"{source}: {model.vocab_size} tokens, but the text has {vocab_size} (tokenizer "
            f"{tokenizer}). {remedy}"
        )
    elif model.vocab_size > vocab_size:
        lines.append(f"Vocabulary: {model.vocab_size} ({_used(vocab_size, model.vocab_size)})")
    return replace(config, model=model), lines


def resolve_text_column(config: Config, dataset: Dataset) -> tuple[Config, list[str]]:
    """Returns the config with `dataset.text_column: auto` as the name of the column, and lines that
    tell of it. It stays `auto` where not all text has one: token files and mixtures."""
    if config.dataset.text_column != AUTO:
        return config, []
    columns = {each.name: each.dataset.details().get("text_column") for each in dataset.sources}
    found = {f" of {name}" if name else "": column for name, column in columns.items() if column}
    if "" in found:
        config = replace(config, dataset=replace(config.dataset, text_column=found[""]))
    return config, [f"Text column{source}: {column}" for source, column in found.items()]


def _used(used: int, size: int | None) -> str:
    return "the tokenizer's" if used == size else f"of which the tokenizer uses {used}"


def origin_lines(request: Request) -> list[str]:
    """Returns the files and overrides that the config was read from."""
    files = f"Config: {', '.join(request.files)}"
    return [files, *(f"Override: {shareable(text)}" for text in request.overrides), *request.notes]


def planned_steps(
    config: Config, world_size: int, epoch_tokens: int, done: tuple[int, int] = (0, 0)
) -> int:
    """Returns the optimizer steps of the whole run: `max_iters`, or fewer where `epochs` ends it.

    done: steps and tokens before a resume, whose steps may have had another size.
    """
    training = config.training
    if training.epochs is None or training.use_oracle:  # the first batch never ends an epoch
        return training.max_iters
    left = max(0, training.epochs * epoch_tokens - done[1])
    steps = done[0] + -(-left // tokens_per_step(config, world_size))
    return min(training.max_iters, max(1, steps))


def length_lines(
    config: Config,
    world_size: int,
    epoch_tokens: int,
    error: float = 0.0,
    done: tuple[int, int] = (0, 0),
) -> list[str]:
    """Returns the tokens per step, and the length of the run in steps, tokens and epochs.

    epoch_tokens: 0 where there is no one epoch.
    error: the share by which `epoch_tokens` may be off where they are estimated; 0 where counted.
    done: steps and tokens before a resume, whose steps may have had another size.
    """
    steps = planned_steps(config, world_size, epoch_tokens, done)
    planned = planned_tokens(config, world_size, steps, done)
    ends = steps < config.training.max_iters and error > 0
    about, within = ("about ", f" (to within {error:.1%}: the data ends it)") if ends else ("", "")
    return [
        tokens_line(config, world_size),
        f"Max iterations: {about}{steps}{within} = {format_count(planned)} tokens"
        + (f", {_format_epochs(planned / epoch_tokens)}" if epoch_tokens else ""),
    ]


def source_lines(
    sources: Sequence[Source], block_size: int, left: int, before: Mapping[str, int]
) -> list[str]:
    """Returns for each source of a mixture its share, its tokens of this run and how often its text
    is read, with a warning about those that are read too often.

    left: tokens that the run is still to read. before: what it has read of each source.
    """
    lines, often = list[str](), list[str]()
    whole = sum(source.weight for source in sources)
    for source in sources:
        share = source.weight / whole
        tokens = before.get(source.name, 0) + share * left
        epochs = tokens / max(1, source.dataset.epoch_tokens(block_size))
        read = f"{format_count(tokens)} tokens, {_format_epochs(epochs)}"
        shown = f"{share:.1%} of the tokens{' from here on' if before else ''}"
        lines.append(f"Source {source.name}: {shown}; in the whole run {read}")
        often += [source.name] if epochs > MOST_EPOCHS else []
    if often:
        lines.append(
            f"Warning: more than {MOST_EPOCHS} epochs of {', '.join(often)}: text that is read "
            "again teaches ever less from there on (Muennighoff et al., 2023)"
        )
    return lines


def _format_epochs(epochs: float) -> str:
    return f"about {epochs:.2f} epochs" if epochs >= 0.005 else "under 0.01 epochs"


def planned_tokens(
    config: Config, world_size: int, steps: int, done: tuple[int, int] = (0, 0)
) -> int:
    """Returns the tokens of a run of so many steps, of which the first ones are `done`."""
    return done[1] + max(0, steps - done[0]) * tokens_per_step(config, world_size)


def parameter_lines(model: LanguageModel) -> list[str]:
    """Returns total and trainable parameters, with the part of each top-level module."""
    total, frozen = parameter_counts(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    named = dict(model.named_parameters())
    # A single top-level module, such as `transformer`, says nothing: its children are listed.
    level = 0 if len({name.split(".")[0] for name in named}) > 1 else 1
    parts: dict[str, int] = {}
    for name, parameter in named.items():
        part = name.split(".")[level]
        parts[part] = parts.get(part, 0) + parameter.numel()
    if frozen:
        parts["frozen matrices"] = frozen
    listed = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    return [
        f"Total parameters: {total + frozen:,} ({listed})",
        f"Trainable parameters: {trainable:,}",
    ]


def parameter_counts(model: LanguageModel) -> tuple[int, int]:
    """Returns the number of parameters, and that of the weights that adapters have replaced, which
    are no parameters to torch."""
    hidden = [weight for weight, _ in model.hidden_weights()]
    frozen = sum(weight.numel() for weight in hidden if not isinstance(weight, nn.Parameter))
    return sum(p.numel() for p in model.parameters()), frozen


def tokens_per_step(config: Config, world_size: int) -> int:
    """Returns the tokens of one optimizer step over all processes."""
    return sequences_per_step(config, world_size) * config.training.block_size


def tokens_line(config: Config, world_size: int) -> str:
    """Returns the tokens per optimizer step and how they are made up."""
    training, count = config.training, tokens_per_step(config, world_size)
    accumulation = accumulation_steps(config, world_size)
    plural = "process" if world_size == 1 else "processes"
    return (
        f"Tokens per step: {training.batch_size} sequences x {training.block_size} tokens x "
        f"{accumulation} accumulation x {world_size} {plural} = {count:,}"
    )


def training_flops(model: LanguageModel, config: Config) -> int:
    """Returns the FLOPs per token of a training step, as the model counts them."""
    return model.flops_per_token(config.training.block_size)


def cost_lines(
    estimator: MemoryEstimator, budget: MemoryBudget, optimizer: torch.optim.Optimizer
) -> list[str]:
    """Returns parameters, the size of low-bit moments, the peak memory of a step, and its FLOPs."""
    flops = training_flops(estimator.model, estimator.config)
    return [
        *parameter_lines(estimator.model),
        *optimizer_lines(optimizer),
        *memory_lines(estimator, budget),
        f"Work: {format_count(flops)} FLOP per token, "
        f"{format_count(flops * tokens_per_step(estimator.config, estimator.world.size))} per step",
    ]


def ratio_line(tokens: int, model: LanguageModel) -> str:
    """Returns the tokens of a run per parameter; frozen parameters are counted."""
    count = sum(parameter_counts(model))
    return (
        f"Tokens per parameter: {tokens / count:.3g} ({format_count(tokens)} tokens, "
        f"{format_count(count)} parameters)"
    )


def learning_rate_plot(config: Config, steps: int, width: int = 60, height: int = 6) -> list[str]:
    """Returns a bar chart of the learning rate over a run, with a line of its values above."""
    columns = [1 + (steps - 1) * place // max(1, width - 1) for place in range(width)]
    rates = [learning_rate(step, config, steps) for step in columns]
    warmup, final = warmup_steps(config, steps), learning_rate(steps, config, steps)
    peak = max(*rates, learning_rate(max(1, min(warmup, steps)), config, steps))
    # Each column is one bar; a character has eight levels of height.
    eighths = [round(rate / peak * 8 * height) for rate in rates]
    lines = [
        f"Learning rate: {peak:.2e} at its peak, {final:.2e} at the end"
        + (f", warm-up over {warmup:,} steps" if warmup else ", no warm-up")
    ]
    for row in reversed(range(height)):
        label = f"{peak:.1e}" if row == height - 1 else ""
        bars = "".join(BARS[min(8, max(0, value - 8 * row))] for value in eighths)
        lines.append(f"{label:>8} │{bars}".rstrip())
    ends = [place for place, step in enumerate(columns) if step >= warmup > 0]
    axis = ["─"] * width
    if ends:
        axis[ends[0]] = "┴"
    first, last = "1", f"{steps:,} steps"
    lines.append(f"{'0':>8} └{''.join(axis)}")
    return [*lines, f"{'':>10}{first}{last:>{width - len(first)}}"]
