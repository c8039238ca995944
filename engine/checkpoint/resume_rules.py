"""What may differ between a checkpoint's config and the config it is resumed with.

config.py declares for each option what a resume allows (settings/schema.py: OnResume). Whether the
text can go on exactly in steps of another size is decided by the data (data/loading/loader.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from config import (
    CheckpointError,
    Config,
    accumulation_steps,
    eval_batch,
    micro_batch,
    schema,
    sequences_per_step,
)
from settings.schema import OnResume

STEP = "sequences per step"
"""How a step is split into micro-batches is free, if this number stays."""


def _keys(rule: OnResume) -> set[str]:
    """Returns the options with this rule."""
    return {key for key, option in schema().options.items() if option.on_resume == rule}


def _fixed(saved: Config) -> set[str]:
    """Returns the options that a run begun with `saved` may not change."""
    options = schema().options.items()
    return _keys("fixed") | {
        k for k, option in options if option.fixed_if and option.fixed_if(saved)
    }


def pretrained_options() -> list[str]:
    """Returns the options of section model that come with pretrained weights, in sorted order."""
    return sorted(key.split(".")[1] for key in _keys("fixed") if key.startswith("model."))


def resume_from_folder(config: Config) -> Config:
    """`init_from: resume` read as what it means: the newest run in `checkpoint_dir` goes on."""
    training = config.training
    if training.init_from != "resume":
        return config
    folder = training.checkpoint_dir
    training = replace(training, init_from="scratch", resume_from_checkpoint=folder)
    return replace(config, training=training)


def on_processes(config: Config, saved: Config, before: int, now: int) -> tuple[Config, list[str]]:
    """The config that goes on on `now` processes what `saved` began on `before`, and what to tell.

    A step keeps its sequences: where the number of micro-steps follows from nothing else, it does
    from that. Raises ConfigError where the sequences cannot be split so.
    """
    training, sequences = config.training, sequences_per_step(saved, before)
    same_step = training.tokens_per_step == sequences * training.block_size
    if same_step and before != now and sequences % now == 0:
        processes = f"{before} processes before, {now} now"
        return _smaller_batches(config, saved, sequences // now, processes)
    if training.tokens_per_step or sequences_per_step(config, now) == sequences:
        return config, []
    per_process = micro_batch(config) * training.gradient_accumulation_steps
    if saved.training.tokens_per_step is None and per_process * before != sequences:
        return config, []  # it was changed on purpose, and will be refused
    tokens = sequences * training.block_size
    kept = replace(training, tokens_per_step=tokens, gradient_accumulation_steps=1)
    config = replace(config, training=kept)
    steps = accumulation_steps(config, now)
    return config, [
        f"{before} processes before, {now} now: a step keeps its {sequences} sequences, in {steps} "
        "micro-steps of each process"
    ]


def _smaller_batches(
    config: Config, saved: Config, sequences: int, processes: str
) -> tuple[Config, list[str]]:
    """Micro-batches that make up the sequences of each process, no larger than before."""
    most = config.training.batch_size
    if most == "auto" or sequences % most == 0:
        return config, []
    batch = max(size for size in range(1, most) if sequences % size == 0)
    evaluated = config.training.eval_batch_size or eval_batch(saved)
    sized = replace(config.training, batch_size=batch, eval_batch_size=evaluated)
    return replace(config, training=sized), [f"{processes}: micro-batches of {batch} sequences"]


def with_evaluation(config: Config, saved: Config) -> tuple[Config, list[str]]:
    """The config with the evaluated rows of the checkpoint, whatever its batches are: else losses
    before and after could not be compared; and what to tell."""
    before = eval_batch(saved)
    if config.training.eval_batch_size is not None or eval_batch(config) == before:
        return config, []
    config = replace(config, training=replace(config.training, eval_batch_size=before))
    return config, [f"Evaluation keeps its batches of {before} sequences, so that losses compare"]


def differences(saved: Config, present: Config) -> dict[str, tuple[Any, Any]]:
    """`section.option` -> (then, now) of every option that differs."""
    now = present.to_dict()
    return {
        f"{section}.{option}": (then, now[section][option])
        for section, options in saved.to_dict().items()
        for option, then in options.items()
        if then != now[section][option]
    }


def experiment_differences(saved: Config, present: Config) -> list[str]:
    """Options that make it another experiment; empty means that `auto` may continue it."""
    sequences = sequences_per_step(saved, 1), sequences_per_step(present, 1)
    others = {STEP} if sequences[0] != sequences[1] else set()
    open_yet = {"model.vocab_size"} if present.model.vocab_size is None else set()
    changed = set(differences(saved, present)) | others
    return sorted(changed - _keys("free") - _keys("split") - open_yet)


def check_resumable(
    saved: Config, present: Config, checkpoint: str, processes: tuple[int, int]
) -> list[str]:
    """Lines that tell what differs from the checkpoint's config; raises CheckpointError.

    processes: how many there were, and how many there are.
    """
    changed = differences(saved, present)
    changed.pop("training.resume_from_checkpoint", None)
    sequences = sequences_per_step(saved, processes[0]), sequences_per_step(present, processes[1])
    if sequences[0] != sequences[1]:
        changed[STEP] = sequences
    refused = sorted(set(changed) & _fixed(saved))
    if refused:
        listed = "; ".join(f"{key} was {changed[key][0]}, is {changed[key][1]}" for key in refused)
        raise CheckpointError(
            f"{checkpoint}: does not fit this config: {listed}. Put the old values back, or start "
            "a new run: training.init_from in place of resume_from_checkpoint takes its weights."
        )
    lengths = saved.training.block_size, present.training.block_size
    tokens = [f"{n * length:,}" for n, length in zip(sequences, lengths, strict=True)]
    if tokens[0] != tokens[1]:
        changed["tokens per step"] = tokens[0], f"{tokens[1]}, from the next token of the text on"
    return [f"  {key}: {then} -> {now}" for key, (then, now) in sorted(changed.items())]
