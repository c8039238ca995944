"""What may differ between a checkpoint's config and the config it is resumed with.

`FIXED` options would make it another run or another model; they are refused. `FREE` options change
nothing that is learned per step, or only how long the run goes on. Anything else (learning rate,
weight decay, dropout, ...) may be changed on purpose by naming the checkpoint or the run; `auto`
takes such a config for a different experiment.
"""

from __future__ import annotations

from typing import Any

from config import CheckpointError, Config, sequences_per_step

FIXED = {
    "model.name",
    "model.n_layer",
    "model.n_embd",
    "model.n_head",
    "model.vocab_size",
    "model.mlp_internal_dim_multiplier",
    "training.block_size",
    "training.seed",
    "optimizer.name",
    "dataloader.shuffle",
    "tokenizer.name",
}
FREE = {
    "training.max_iters",
    "training.epochs",
    "training.log_freq",
    "training.test_freq",
    "training.eval_iters",
    "training.eval_only",
    "training.checkpoint_freq",
    "training.save_every",
    "training.always_save_checkpoint",
    "training.keep_last",
    "training.checkpoint_dir",
    "training.resume_from_checkpoint",
    "training.debug",
    "dataloader.num_workers",
    "dataloader.pin_memory",
    "dataloader.prefetch_factor",
    "dataset.max_cached_files",
    "system.device",
    "system.compile",
}
# How a step's sequences are split over micro-batches; only their number, STEP, counts.
STEP = "sequences per step"
SPLIT = {
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.tokens_per_step",
}


def differences(saved: Config, present: Config) -> dict[str, tuple[Any, Any]]:
    """`section.option` -> (then, now) of every option that differs, and of STEP."""
    now = present.to_dict()
    changed: dict[str, tuple[Any, Any]] = {
        f"{section}.{option}": (then, now[section][option])
        for section, options in saved.to_dict().items()
        for option, then in options.items()
        if then != now[section][option]
    }
    steps = sequences_per_step(saved, 1), sequences_per_step(present, 1)
    return changed | ({STEP: steps} if steps[0] != steps[1] else {})


def experiment_differences(saved: Config, present: Config) -> list[str]:
    """Options that make it another experiment; empty means that `auto` may continue it."""
    return sorted(set(differences(saved, present)) - FREE - SPLIT)


def check_resumable(saved: Config, present: Config, checkpoint: str) -> list[str]:
    """Lines that tell what differs from the checkpoint's config; raises CheckpointError."""
    changed = differences(saved, present)
    changed.pop("training.resume_from_checkpoint", None)
    refused = sorted(set(changed) & (FIXED | {STEP}))
    if refused:
        listed = "; ".join(f"{key} was {changed[key][0]}, is {changed[key][1]}" for key in refused)
        raise CheckpointError(
            f"{checkpoint}: does not fit this config: {listed}. "
            "Put the old values back, or start a new run without resume_from_checkpoint."
        )
    return [f"  {key}: {then} -> {now}" for key, (then, now) in sorted(changed.items())]
