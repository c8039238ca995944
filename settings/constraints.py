"""What holds between the options of config.py, and what several of them amount to together.

Sections are read by their options' names; their classes are config.py's, which is why no type here
names them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from settings.rules import Rule, default_of, nearest_multiples
from settings.schema import LARGEST_INT

FP8_MULTIPLE = 16  # what both sides of an 8-bit product are a multiple of
TOKENIZER_SIZES = {"bytes": 256, "gpt2": 50257}  # of those that need no file
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def warmup_steps(config: Any, total: int | None = None) -> int:
    """Return the steps of warm-up, 3 % of the run where none are set.

    `total` is the length of a run that `epochs` ends before max_iters.
    """
    given = config.schedule.warmup_iters
    planned = config.training.max_iters if total is None else total
    return int(planned * 3 // 100 if given is None else given)


def micro_step_tokens(config: Any, world_size: int) -> int:
    """Return the tokens that all processes together take in one micro-step, at the least where
    `batch_size` is still to be found."""
    size = config.training.batch_size
    return int(config.training.block_size * (1 if size == "auto" else size) * world_size)


def _only_where(keys: tuple[str, str], holds: Callable[[Any], bool], text: str) -> Rule[Any]:
    """The first key keeps its default except where the second one gives it a meaning."""
    section, option_name = keys[0].split(".")

    def kept(c: Any) -> bool:
        own = getattr(c, section)
        return getattr(own, option_name) == default_of(own, option_name) or holds(c)

    return Rule(keys, kept, text, yields=keys[:1])


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


def derived(c: Any) -> dict[str, dict[str, Any]]:
    """Return, by section, the options that were left open and the value that follows from others.

    Open are null and `auto`; and the name of the model where GPT-2's weights bring theirs, which no
    other model takes. What the text has to say first, such as a vocabulary, stays open.
    """
    model, low, fp8, start = c.model, c.low_precision, c.fp8, c.training.init_from
    published = start in GPT2_NAMES
    name = "gpt" if published and model.name == default_of(model, "name") else model.name
    tokenizer, size = c.tokenizer.name, model.vocab_size
    if tokenizer == "auto" and token_paths(c.dataset) is None:
        tokenizer = "gpt2" if published else "bytes"
    if size is None and tokenizer == "bytes" and start in ("scratch", "resume"):
        multiple = c.tokenizer.vocab_multiple
        size = math.ceil(TOKENIZER_SIZES[tokenizer] / multiple) * multiple
    four_bit, recipe, form = low.use_4bit, fp8.recipe, fp8.format
    if four_bit == "auto":
        four_bit = name == "bdh" or low.lora_rank is not None
    if recipe == "auto":
        options = ("amax_history_len", "amax_compute_algo")  # which no other recipe has
        looks_back = any(getattr(fp8, o) != default_of(fp8, o) for o in options)
        recipe = "delayed" if looks_back else "current"
    if form == "auto":
        form = "e4m3" if recipe in ("block", "mxfp8") else "hybrid"  # what these are made for
    return {
        "model": {"name": name, "vocab_size": size},
        "tokenizer": {"name": tokenizer},
        "low_precision": {"use_4bit": four_bit},
        "fp8": {"recipe": recipe, "format": form},
    }


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
        lambda c: c.training.init_from not in GPT2_NAMES or c.model.name == "gpt",
        "{0} is a GPT-2, and {1}; set model.name to gpt",
    ),
    Rule(
        ("training.init_from", "training.resume_from_checkpoint"),
        lambda c: c.training.init_from != "resume" or c.training.resume_from_checkpoint is None,
        "{0} and {1} exclude each other; set one",
        yields=("training.init_from", "training.resume_from_checkpoint"),
    ),
    Rule(
        ("dataset.name", "dataset.train_data_path"),
        lambda c: c.dataset.name is None or c.dataset.train_data_path is None,
        "{0} and {1} name two texts; set one",
        yields=("dataset.name", "dataset.train_data_path"),
    ),
    Rule(
        ("dataset.val_data_path", "dataset.train_data_path"),
        lambda c: c.dataset.val_data_path is None or c.dataset.train_data_path is not None,
        "{0} needs {1}",
        yields=("dataset.val_data_path",),
    ),
    Rule(
        ("model.vocab_size", "tokenizer.name"),
        lambda c: (c.model.vocab_size or LARGEST_INT) >= TOKENIZER_SIZES.get(c.tokenizer.name, 0),
        "{0} is too small for {1}",
        lambda c: f"it has {TOKENIZER_SIZES[c.tokenizer.name]} tokens; null takes their number",
        yields=("model.vocab_size",),
    ),
    Rule(
        ("schedule.min_lr", "training.learning_rate"),
        lambda c: (c.schedule.min_lr or 0) <= c.training.learning_rate,
        "{0} is above {1}; null means a tenth of it",
        yields=("schedule.min_lr",),
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
        yields=("schedule.lr_decay_iters",),
    ),
    Rule(
        ("training.tokens_per_step", "training.gradient_accumulation_steps"),
        lambda c: c.training.tokens_per_step is None or c.training.gradient_accumulation_steps == 1,
        "{0} and {1} exclude each other; set one",
        yields=("training.tokens_per_step", "training.gradient_accumulation_steps"),
    ),
    Rule(
        ("training.batch_size", "training.tokens_per_step"),
        lambda c: c.training.batch_size != "auto" or c.training.tokens_per_step is not None,
        "{0} needs the size of a step, and {1}; set training.tokens_per_step",
    ),
    Rule(
        ("logging.tensorboard", "training.save_model"),
        lambda c: not c.logging.tensorboard or c.training.save_model,
        "{0} writes into the run directory, which there is none of with {1}",
        yields=("logging.tensorboard",),
    ),
    _only_where(
        ("training.sample_tokens", "training.sample_prompt"),
        lambda c: c.training.sample_prompt is not None,
        "{0} is the length of a sample, which there is none of with {1}",
    ),
    Rule(
        ("training.sample_prompt", "training.test_freq"),
        lambda c: (
            c.training.sample_prompt is None
            or c.training.test_freq is not None
            or c.training.eval_only
        ),
        "{0} is for evaluations, which there are none of with {1}",
        yields=("training.sample_prompt",),
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
    Rule(
        ("low_precision.use_fp8", "low_precision.compute_dtype"),
        lambda c: not c.low_precision.use_fp8 or c.low_precision.compute_dtype == "bfloat16",
        "{0} leaves all but its products in bfloat16, and {1}",
    ),
    Rule(
        ("low_precision.use_fp8", "training.batch_size", "training.block_size"),
        lambda c: (
            not c.low_precision.use_fp8
            or c.training.batch_size == "auto"
            or micro_step_tokens(c, 1) % FP8_MULTIPLE == 0
        ),
        f"{{0}} takes multiples of {FP8_MULTIPLE} tokens, which {{1}} * {{2}} is not",
        lambda c: "batch_size " + nearest_multiples(c.training.batch_size, FP8_MULTIPLE),
    ),
    Rule(
        ("fp8.recipe", "fp8.backend"),
        lambda c: c.fp8.recipe in ("current", "delayed") or c.fp8.backend != "native",
        "{0} is one of Transformer Engine's, and {1}",
    ),
    *(
        _only_where(
            (f"fp8.{name}", "fp8.recipe"),
            lambda c: c.fp8.recipe == "delayed",
            "{0} is for delayed scaling, and {1}; set fp8.recipe to delayed",
        )
        for name in ("amax_history_len", "amax_compute_algo")
    ),
    Rule(
        ("system.compile", "fp8.recipe", "model.name"),
        lambda c: (
            c.system.compile is not True
            or not c.low_precision.use_fp8
            or c.fp8.recipe != "delayed"
            or c.fp8.backend == "transformer_engine"
            or c.model.name == "bdh"
        ),
        "{0} with {1} works for model.name=bdh only, and {2}; set system.compile to auto",
    ),
    Rule(
        ("low_precision.use_4bit_optimizer", "optimizer.name"),
        lambda c: not c.low_precision.use_4bit_optimizer or c.optimizer.name == "adamw",
        "{0} is AdamW with 4-bit moments, and {1}; set one of them",
    ),
    Rule(
        (
            "low_precision.quantize_embedding",
            "low_precision.quantize_head",
            "model.tie_embeddings",
        ),
        lambda c: (
            not (c.model.name == "gpt" and c.model.tie_embeddings)
            or c.low_precision.quantize_embedding == c.low_precision.quantize_head
        ),
        "{0} and {1} differ, but with {2} they are one matrix",
    ),
    _only_where(
        ("low_precision.quantize_after", "low_precision.lora_rank"),
        lambda c: c.low_precision.lora_rank is None,
        "{0} is for training all weights, and {1}",
    ),
    Rule(
        ("low_precision.lora_rank", "low_precision.use_4bit"),
        lambda c: c.low_precision.lora_rank is None or c.low_precision.use_4bit,
        "{0} adds adapters to 4-bit weights, and {1}",
    ),
    Rule(
        ("low_precision.lora_rank", "training.init_from"),
        lambda c: c.low_precision.lora_rank is None or c.training.init_from != "scratch",
        "{0} freezes the weights it begins with, and {1} draws them at random",
    ),
    *(
        Rule(
            ("low_precision.lora_rank", key),
            lambda c, kept=kept: c.low_precision.lora_rank is None or kept(c),  # type: ignore[misc]
            text,
        )
        for key, kept, text in (
            (
                "low_precision.use_fp8",
                lambda c: not c.low_precision.use_fp8,
                "{0} computes with 4-bit weights in bfloat16, and {1}",
            ),
            (
                "optimizer.name",
                lambda c: c.optimizer.name != "muon",
                "{0} trains adapters, and {1} is for whole matrices",
            ),
            *(
                (
                    f"low_precision.{name}",
                    lambda c, name=name: not getattr(c.low_precision, name),
                    "{0} freezes hidden matrices in 4 bits, and {1} is for training all weights",
                )
                for name in ("quantize_embedding", "quantize_head")
            ),
        )
    ),
)
