"""What may differ between a checkpoint's config and the config it is resumed with.

config.py declares one of four rules for each option (settings/schema.py, OnResume):

    fixed      another value is refused: it would be another model or another run
    explicit   may be changed on purpose, by naming the checkpoint or the run; `auto` takes such a
               config for a different experiment (learning rate, weight decay, dropout, ...)
    free       changes nothing that is learned per step, or only how long the run goes on
    split      how a step is split into micro-batches: free while the product, the sequences per
               step, stays the same; another number of sequences per step is treated as `explicit`

Whether the data can go on exactly in steps of another size is decided in data/loading/load_plan.py.
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
from data.sources.parquet.text_column import AUTO
from settings.entries import flat_options
from settings.schema import OnResume

SEQUENCES_PER_STEP = "sequences per step"
"""What options of the rule `split` are compared by, as if it were an option."""


def _keys(rule: OnResume) -> set[str]:
    """Returns the options with this rule."""
    return {key for key, option in schema().options.items() if option.on_resume == rule}


def fixed_options(saved: Config) -> set[str]:
    """Returns the options that a run begun with `saved` may not change."""
    options = schema().options.items()
    return _keys("fixed") | {
        k for k, option in options if option.fixed_if and option.fixed_if(saved)
    }


def pretrained_options() -> list[str]:
    """Returns the options of section model that come with pretrained weights, in sorted order."""
    return sorted(key.split(".")[1] for key in _keys("fixed") if key.startswith("model."))


def resume_from_folder(config: Config) -> Config:
    """Returns the config with `init_from: resume` as what it means: resume the newest run in
    `checkpoint_dir`."""
    training = config.training
    if training.init_from != "resume":
        return config
    folder = training.checkpoint_dir
    training = replace(training, init_from="scratch", resume_from_checkpoint=folder)
    return replace(config, training=training)


def adapt_to_world_size(
    config: Config, saved: Config, before: int, now: int
) -> tuple[Config, list[str]]:
    """Returns the config with which `now` processes continue a run of `before`, and lines about it.

    A step keeps its sequences, since they decide what is learned: the number of micro-steps
    follows, and where it cannot, their size. Raises ConfigError if the sequences of a step cannot
    be split among the processes.
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
        return config, []  # changed on purpose; `check_resumable` or the data will refuse it
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
    """Returns the config with micro-batches that divide the sequences of each process, no larger
    than before."""
    largest = config.training.batch_size
    if largest == "auto" or sequences % largest == 0:
        return config, []
    batch = max(size for size in range(1, largest) if sequences % size == 0)
    evaluated = config.training.eval_batch_size or eval_batch(saved)
    sized = replace(config.training, batch_size=batch, eval_batch_size=evaluated)
    return replace(config, training=sized), [f"{processes}: micro-batches of {batch} sequences"]


def keep_evaluation_batch(config: Config, saved: Config) -> tuple[Config, list[str]]:
    """Returns the config with the evaluated rows of the checkpoint, and lines about it.

    Otherwise another batch size would select other rows, and losses before and after the resume
    could not be compared.
    """
    before = eval_batch(saved)
    if config.training.eval_batch_size is not None or eval_batch(config) == before:
        return config, []
    config = replace(config, training=replace(config.training, eval_batch_size=before))
    return config, [f"Evaluation keeps its batches of {before} sequences, so that losses compare"]


def differences(saved: Config, present: Config) -> dict[str, tuple[Any, Any]]:
    """Returns `section.option` -> (then, now) of every option that differs; None for what a source
    of a mixture leaves out."""
    then, now = flat_options(saved.to_dict()), flat_options(present.to_dict())
    pairs = {key: (then.get(key), now.get(key)) for key in [*then, *(now.keys() - then.keys())]}
    # `auto` is no other column than a named one until the text is opened, which then compares them.
    return {
        key: pair
        for key, pair in pairs.items()
        if pair[0] != pair[1] and not (key.endswith(".text_column") and AUTO in pair)
    }


def experiment_differences(saved: Config, present: Config) -> list[str]:
    """Returns the options that make it another experiment; if none, `auto` may continue it."""
    changed = set(differences(saved, present)) - _keys("free") - _keys("split")
    if sequences_per_step(saved, 1) != sequences_per_step(present, 1):
        changed.add(SEQUENCES_PER_STEP)
    if present.model.vocab_size is None:  # the tokenizer will decide it
        changed.discard("model.vocab_size")
    return sorted(changed)


def check_resumable(
    saved: Config, present: Config, checkpoint: str, before: int, now: int
) -> list[str]:
    """Returns lines that tell what differs from the checkpoint's config; raises CheckpointError.

    Args:
        before: processes of the saved run.
        now: processes of the present one.
    """
    changed = differences(saved, present)
    for key in ("training.resume_from_checkpoint", "training.fork_from_checkpoint"):
        changed.pop(key, None)
    sequences = sequences_per_step(saved, before), sequences_per_step(present, now)
    if sequences[0] != sequences[1]:
        changed[SEQUENCES_PER_STEP] = sequences
    refused = sorted(set(changed) & fixed_options(saved))
    if refused:
        listed = "; ".join(f"{key} was {changed[key][0]}, is {changed[key][1]}" for key in refused)
        raise CheckpointError(
            f"{checkpoint}: does not fit this config: {listed}. Put the old values back, or start "
            "a new run from step 0: training.init_from takes its weights alone."
        )
    lengths = saved.training.block_size, present.training.block_size
    tokens = [f"{n * length:,}" for n, length in zip(sequences, lengths, strict=True)]
    if tokens[0] != tokens[1]:
        changed["tokens per step"] = tokens[0], f"{tokens[1]}, from the next token of the text on"
    return [f"  {key}: {then} -> {now}" for key, (then, now) in sorted(changed.items())]
