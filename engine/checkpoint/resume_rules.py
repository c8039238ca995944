"""What may differ between a checkpoint's config and the config it is resumed with.

`FIXED` options would make it another run or another model; they are refused. `FREE` options change
nothing that is learned per step, or only how long the run goes on. Anything else (learning rate,
weight decay, dropout, the sequences of a step, ...) may be changed on purpose by naming the
checkpoint or the run; `auto` takes such a config for a different experiment. Whether the text can
go on exactly in other steps is for the data to say (data/loading/loader.py).
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
    sequences_per_step,
)

FIXED = {
    "model.name",
    "model.n_layer",
    "model.n_embd",
    "model.n_head",
    "model.vocab_size",
    "model.mlp_internal_dim_multiplier",
    "model.bias",
    "model.mlp_bias",
    "model.attn_bias",
    "model.proj_bias",
    "model.ln_bias",
    "model.cls_head_bias",
    "model.activation",
    "model.mlp_scale_factor",
    "model.tie_embeddings",
    "model.d_ff",
    "model.rope_theta",
    "model.n_kv_head",
    "training.seed",
    "optimizer.name",
    "low_precision.use_4bit_optimizer",
    "low_precision.lora_rank",
    "dataloader.shuffle",
}
POSITIONS = {"training.block_size"}
"""What the rows of GPT's position embedding are."""
OF_ADAPTERS = {
    "low_precision.quantization_type",
    "low_precision.use_double_quant",
    "low_precision.lora_alpha",
}
"""What saved 4-bit weights and adapters mean something by."""
PRETRAINED = {key.split(".")[1] for key in FIXED if key.startswith("model.")}
"""Options of the model that come with pretrained weights."""
FREE = {
    "training.max_iters",
    "training.epochs",
    "training.log_freq",
    "training.test_freq",
    "training.eval_iters",
    "training.eval_batch_size",
    "training.eval_only",
    "training.checkpoint_freq",
    "training.save_every",
    "training.always_save_checkpoint",
    "training.keep_last",
    "training.checkpoint_dir",
    "training.resume_from_checkpoint",
    "training.init_from",
    "training.save_model",
    "training.debug",
    "dataloader.num_workers",
    "dataloader.pin_memory",
    "dataloader.prefetch_factor",
    "dataset.max_cached_files",
    "system.device",
    "system.compile",
    "model.attention",
    "distributed.backend",
    "logging.wandb_log",
    "logging.wandb_project",
    "logging.wandb_run_name",
    "logging.tensorboard",
    "training.sample_prompt",
    "training.sample_tokens",
}
# How a step's sequences are split over micro-batches; only their number, STEP, counts.
STEP = "sequences per step"
SPLIT = {
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.tokens_per_step",
}


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
    return sorted((set(differences(saved, present)) | others) - FREE - SPLIT - open_yet)


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
    fixed = FIXED | (POSITIONS if saved.model.name == "gpt" else set())
    fixed |= set() if saved.low_precision.lora_rank is None else OF_ADAPTERS
    refused = sorted(set(changed) & fixed)
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
