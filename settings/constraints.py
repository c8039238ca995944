"""What holds between the options of config.py, and what several of them amount to together.

Sections are read by their options' names; their classes are config.py's, which is why no type here
names them.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from settings.rules import Rule, nearest_multiples
from settings.schema import LARGEST_INT

TOKENIZER_SIZES = {"bytes": 256, "gpt2": 50257}  # of those that need no file
# Which models have an option; one that is not here belongs to all.
MODEL_OPTIONS: dict[str, tuple[str, ...]] = {
    "mlp_internal_dim_multiplier": ("bdh",),
    "bias": ("gpt",),
    "mlp_bias": ("gpt",),
    "attn_bias": ("gpt",),
    "proj_bias": ("gpt",),
    "ln_bias": ("gpt",),
    "cls_head_bias": ("gpt",),
    "activation": ("gpt",),
    "mlp_scale_factor": ("gpt",),
    "tie_embeddings": ("gpt",),
    "d_ff": ("llama",),
    "rope_theta": ("llama",),
    "n_kv_head": ("llama",),
    "attention": ("gpt", "llama"),
}


def warmup_steps(config: Any, total: int | None = None) -> int:
    """Return the steps of warm-up, 3 % of the run where none are set.

    `total` is the length of a run that `epochs` ends before max_iters.
    """
    given = config.schedule.warmup_iters
    planned = config.training.max_iters if total is None else total
    return int(planned * 3 // 100 if given is None else given)


def micro_step_tokens(config: Any, world_size: int) -> int:
    """Return the tokens that all processes together take in one micro-step."""
    return int(config.training.block_size * config.training.batch_size * world_size)


def _owned_by(option_name: str, models: tuple[str, ...]) -> Rule[Any]:
    """An option of other models keeps its default."""
    return Rule(
        (f"model.{option_name}", "model.name"),
        lambda c: (
            c.model.name in models
            or getattr(c.model, option_name) == _default(c.model, option_name)
        ),
        f"{{0}} is an option of {' and '.join(models)}, and {{1}}",
    )


def _default(section: Any, option_name: str) -> Any:
    return next(f.default for f in fields(section) if f.name == option_name)


def token_paths(dataset: Any) -> tuple[str, str | None] | None:
    """Return the token files of training and held-out text; None where the text is parquet.

    Without a second one part of the first is held out.
    """
    if dataset.name is not None:
        folder = os.path.join("data", dataset.name)
        return os.path.join(folder, "train.bin"), os.path.join(folder, "val.bin")
    if dataset.train_data_path is not None:
        return dataset.train_data_path, dataset.val_data_path
    return None


def holds_out(dataset: Any) -> bool:
    """Return whether there is text to evaluate on."""
    paths = token_paths(dataset)
    return dataset.test_fraction > 0 or (paths is not None and paths[1] is not None)


# What must hold between options; {0}, {1}, ... stand for the keys with their values.
RULES: tuple[Rule[Any], ...] = (
    Rule(
        ("model.n_embd", "model.n_head"),
        lambda c: c.model.n_embd % c.model.n_head == 0,
        "{0} is not divisible by {1}",
        lambda c: nearest_multiples(c.model.n_embd, c.model.n_head),
    ),
    Rule(
        ("model.mlp_internal_dim_multiplier", "model.n_embd", "model.n_head"),
        lambda c: (
            c.model.name != "bdh"
            or c.model.n_embd % c.model.n_head != 0  # said above
            or c.model.mlp_internal_dim_multiplier * c.model.n_embd // c.model.n_head % 2 == 0
        ),
        "{0} * {1} / {2} is an odd number of neurons per head, and they rotate in pairs",
        lambda c: "n_embd " + nearest_multiples(c.model.n_embd, 2 * c.model.n_head),
    ),
    *(_owned_by(option, models) for option, models in MODEL_OPTIONS.items()),
    Rule(
        ("model.n_head", "model.n_kv_head"),
        lambda c: c.model.n_head % (c.model.n_kv_head or 1) == 0,
        "{0} is not divisible by {1}",
    ),
    Rule(
        ("model.n_embd", "model.n_head", "model.name"),
        lambda c: c.model.name != "llama" or c.model.n_embd // c.model.n_head % 2 == 0,
        "{0} / {1} is an odd width of a head, and {2} rotates in pairs",
        lambda c: "n_embd " + nearest_multiples(c.model.n_embd, 2 * c.model.n_head),
    ),
    Rule(
        ("model.attention", "model.mask"),
        lambda c: c.model.attention != "flash" or c.model.mask == "causal",
        "{0} sees no documents, which {1} asks for; set model.attention to auto",
    ),
    Rule(
        ("training.init_from", "model.name"),
        lambda c: c.training.init_from in ("scratch", "resume") or c.model.name == "gpt",
        "{0} is a GPT-2, and {1}; set model.name to gpt",
    ),
    Rule(
        ("training.init_from", "training.resume_from_checkpoint"),
        lambda c: c.training.init_from != "resume" or c.training.resume_from_checkpoint is None,
        "{0} and {1} exclude each other; set one",
    ),
    Rule(
        ("dataset.name", "dataset.train_data_path"),
        lambda c: c.dataset.name is None or c.dataset.train_data_path is None,
        "{0} and {1} name two texts; set one",
    ),
    Rule(
        ("dataset.val_data_path", "dataset.train_data_path"),
        lambda c: c.dataset.val_data_path is None or c.dataset.train_data_path is not None,
        "{0} needs {1}",
    ),
    Rule(
        ("model.vocab_size", "tokenizer.name"),
        lambda c: (c.model.vocab_size or LARGEST_INT) >= TOKENIZER_SIZES.get(c.tokenizer.name, 0),
        "{0} is too small for {1}",
        lambda c: f"it has {TOKENIZER_SIZES[c.tokenizer.name]} tokens; null takes their number",
    ),
    Rule(
        ("schedule.min_lr", "training.learning_rate"),
        lambda c: (c.schedule.min_lr or 0) <= c.training.learning_rate,
        "{0} is above {1}; null means a tenth of it",
    ),
    Rule(
        ("schedule.warmup_iters", "training.max_iters"),
        lambda c: (c.schedule.warmup_iters or 0) <= c.training.max_iters,
        "{0} is above {1}; null means 3 % of it",
    ),
    Rule(
        ("schedule.lr_decay_iters", "schedule.warmup_iters", "training.max_iters"),
        lambda c: c.schedule.lr_decay_iters is None or c.schedule.lr_decay_iters >= warmup_steps(c),
        "{0} is below {1} with {2}",
        lambda c: f"warm-up takes {warmup_steps(c)} steps",
    ),
    Rule(
        ("training.tokens_per_step", "training.gradient_accumulation_steps"),
        lambda c: c.training.tokens_per_step is None or c.training.gradient_accumulation_steps == 1,
        "{0} and {1} exclude each other; set one",
    ),
    Rule(
        ("training.tokens_per_step", "training.block_size", "training.batch_size"),
        lambda c: (c.training.tokens_per_step or 0) % micro_step_tokens(c, 1) == 0,
        "{0} is not a multiple of {1} * {2}",
        lambda c: nearest_multiples(c.training.tokens_per_step or 0, micro_step_tokens(c, 1)),
    ),
    Rule(
        ("training.test_freq", "dataset.test_fraction"),
        lambda c: c.training.test_freq is None or holds_out(c.dataset),
        "{0} evaluates on held-out text and {1} holds none out; set training.test_freq to null",
    ),
    Rule(
        ("training.eval_only", "dataset.test_fraction"),
        lambda c: not c.training.eval_only or holds_out(c.dataset),
        "{0} evaluates on held-out text and {1} holds none out",
    ),
)
