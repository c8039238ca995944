"""What must hold between the options of config.py, and values that follow from several of them.

`c` is a Config, or its sections side by side before they are checked with each other. No type here
names their classes: they are config.py's, which imports this file.
"""

from __future__ import annotations

import math
import os
from typing import Any

from settings.addresses import address_fault
from settings.mixture import source_datasets
from settings.rules import is_default, nearest_multiples, only_with, rule

FP8_MULTIPLE = 16  # both sides of an 8-bit matrix product are multiples of it
TOKENIZER_SIZES = {"bytes": 256, "gpt2": 50257}  # of tokenizers that need no file
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def warmup_steps(c: Any, total: int | None = None) -> int:
    """Returns the steps of warm-up: 3 % of the run if none are set.

    total: the length of a run that `epochs` ends before max_iters.
    """
    given = c.schedule.warmup_iters
    planned = c.training.max_iters if total is None else total
    return int(planned * 3 // 100 if given is None else given)


def micro_step_tokens(c: Any, world_size: int) -> int:
    """Returns the tokens of one micro-step over all processes; with batch_size=auto, the fewest."""
    size = c.training.batch_size
    return int(c.training.block_size * (1 if size == "auto" else size) * world_size)


def token_paths(dataset: Any) -> tuple[str, str | None] | None:
    """Returns the token files of training and held-out text; None if the text is parquet.

    Without a second file, a part of the first is held out. dataset: of one source.
    """
    if dataset.name is not None:
        folder = os.path.join("data", dataset.name)
        return os.path.join(folder, "train.bin"), os.path.join(folder, "val.bin")
    if dataset.train_data_path is not None:
        return dataset.train_data_path, dataset.val_data_path
    return None


def holds_out(dataset: Any) -> bool:
    """Returns whether there is text to evaluate on; of a mixture, in every source."""
    return not _holding_none_out(dataset)


def _holding_none_out(dataset: Any) -> list[str]:
    """Returns the sources without text to evaluate on."""
    sources = source_datasets(dataset).items()
    return [
        name
        for name, source in sources
        if source.test_fraction == 0 and (token_paths(source) or ("", None))[1] is None
    ]


def derived_values(c: Any) -> dict[str, dict[str, Any]]:
    """Returns, by section, the values of options that were left open (null or `auto`) and follow
    from other options. Options that depend on the text, such as a vocabulary, stay open.
    """
    name, tokenizer = _derive_model_name(c), _derive_tokenizer(c)
    low, fp8 = c.low_precision, c.fp8
    four_bit, recipe, form = low.use_4bit, fp8.recipe, fp8.format
    if four_bit == "auto":
        four_bit = name == "bdh" or low.lora_rank is not None
    if recipe == "auto":
        # Asking for a history is asking for delayed scaling, the only recipe that has one.
        own = ("fp8.amax_history_len", "fp8.amax_compute_algo")
        no_history = all(is_default(c, key) for key in own)
        recipe = "current" if no_history else "delayed"
    if form == "auto":
        form = "e4m3" if recipe in ("block", "mxfp8") else "hybrid"  # what these are made for
    return {
        "model": {"name": name, "vocab_size": _derive_vocab_size(c, tokenizer)},
        "tokenizer": {"name": tokenizer},
        "low_precision": {"use_4bit": four_bit},
        "fp8": {"recipe": recipe, "format": form},
    }


def _derive_model_name(c: Any) -> str:
    """GPT-2's published weights are a GPT; no other model takes them."""
    published = c.training.init_from in GPT2_NAMES
    return "gpt" if published and is_default(c, "model.name") else str(c.model.name)


def _derive_tokenizer(c: Any) -> str:
    """Token files tell their tokenizer, and that of other sources; text alone needs one."""
    tokens = any(map(token_paths, source_datasets(c.dataset).values()))
    if c.tokenizer.name != "auto" or tokens:
        return str(c.tokenizer.name)
    return "gpt2" if c.training.init_from in GPT2_NAMES else "bytes"


def _derive_vocab_size(c: Any, tokenizer: str) -> int | None:
    # Other weights than fresh ones bring their own vocabulary; other tokenizers have to be opened.
    size: int | None = c.model.vocab_size
    if size is None and tokenizer == "bytes" and c.training.init_from in ("scratch", "resume"):
        multiple = c.tokenizer.vocab_multiple
        return int(math.ceil(TOKENIZER_SIZES[tokenizer] / multiple) * multiple)
    return size


@rule("model.n_embd", "model.n_head")
def _heads_divide_the_width(c: Any) -> str | None:
    if c.model.n_embd % c.model.n_head == 0:
        return None
    return "{0} is not divisible by {1}; " + nearest_multiples(c.model.n_embd, c.model.n_head)


@rule("model.mlp_internal_dim_multiplier", "model.n_embd", "model.n_head")
def _bdh_rotates_pairs_of_neurons(c: Any) -> str | None:
    width, heads = c.model.n_embd, c.model.n_head
    if c.model.name != "bdh" or width % heads != 0:  # another rule refuses that
        return None
    if c.model.mlp_internal_dim_multiplier * width // heads % 2 == 0:
        return None
    nearest = nearest_multiples(width, 2 * heads)
    return (
        f"{{0}} * {{1}} / {{2}} neurons per head must be even: RoPE rotates pairs; n_embd {nearest}"
    )


@rule("model.n_head", "model.n_kv_head")
def _key_heads_divide_heads(c: Any) -> str | None:
    divides = c.model.n_head % (c.model.n_kv_head or 1) == 0
    return None if divides else "{0} is not divisible by {1}"


@rule("model.n_embd", "model.n_head", "model.name")
def _llama_rotates_pairs(c: Any) -> str | None:
    if c.model.name != "llama" or c.model.n_embd // c.model.n_head % 2 == 0:
        return None
    nearest = nearest_multiples(c.model.n_embd, 2 * c.model.n_head)
    return f"{{0}} / {{1}} must be even with {{2}}: RoPE rotates pairs; n_embd {nearest}"


@rule("model.attention", "model.mask")
def _flash_attention_has_no_document_mask(c: Any) -> str | None:
    if c.model.attention != "flash" or c.model.mask == "causal":
        return None
    return "{0} cannot keep documents apart, as {1} asks for; set model.attention to auto"


@rule("training.init_from", "model.name")
def _gpt2_weights_are_of_a_gpt(c: Any) -> str | None:
    if c.training.init_from not in GPT2_NAMES or c.model.name == "gpt":
        return None
    return "{0} loads GPT-2 weights, but {1}; set model.name to gpt"


def _excludes_init_from_resume(key: str) -> None:
    @rule("training.init_from", key, gives_way=("training.init_from", key))
    def complain(c: Any) -> str | None:
        if c.training.init_from != "resume" or getattr(c.training, key.split(".")[1]) is None:
            return None
        return "{0} and {1} exclude each other; set one"


for _key in ("training.resume_from_checkpoint", "training.fork_from_checkpoint"):
    _excludes_init_from_resume(_key)


def _is_a_good_address(key: str) -> None:
    @rule(key)
    def complain(c: Any) -> str | None:
        # The value is not shown: its faulty part may be a password.
        fault = address_fault(getattr(c.dataset, key.split(".")[1]) or "")
        return f"{key} {fault}" if fault else None


for _key in ("dataset.parquet_dir", "dataset.train_data_path", "dataset.val_data_path"):
    _is_a_good_address(_key)


@rule("dataset.mixture")
def _sources_have_good_addresses(c: Any) -> str | None:
    for source in c.dataset.mixture:
        for path in (source.parquet_dir, source.train_data_path, source.val_data_path):
            if fault := address_fault(path or ""):
                return f"dataset.mixture: a path of source {source.name} {fault}"
    return None


@rule(
    *("dataset.name", "dataset.train_data_path"),
    gives_way=("dataset.name", "dataset.train_data_path"),
)
def _one_text_to_train_on(c: Any) -> str | None:
    if c.dataset.name is None or c.dataset.train_data_path is None:
        return None
    return "{0} and {1} name two texts; set one"


@rule("dataset.val_data_path", "dataset.train_data_path", gives_way=("dataset.val_data_path",))
def _held_out_tokens_need_training_tokens(c: Any) -> str | None:
    if c.dataset.val_data_path is None or c.dataset.train_data_path is not None:
        return None
    return "{0} needs a token file to train on, but {1}"


@rule("model.vocab_size", "tokenizer.name", gives_way=("model.vocab_size",))
def _vocabulary_holds_the_tokens(c: Any) -> str | None:
    size, tokens = c.model.vocab_size, TOKENIZER_SIZES.get(c.tokenizer.name, 0)
    if size is None or size >= tokens:
        return None
    return f"{{0}} is too small for {{1}}, which has {tokens} tokens; set model.vocab_size to null"


@rule("schedule.min_lr", "training.learning_rate", gives_way=("schedule.min_lr",))
def _final_rate_below_peak(c: Any) -> str | None:
    if (c.schedule.min_lr or 0) <= c.training.learning_rate:
        return None
    return "{0} is above {1}; null means a tenth of it"


@rule("schedule.warmup_iters", "training.max_iters")
def _warmup_within_the_run(c: Any) -> str | None:
    if (c.schedule.warmup_iters or 0) <= c.training.max_iters:
        return None
    return "{0} is above {1}; null means 3 % of it"


@rule(
    *("schedule.lr_decay_iters", "schedule.warmup_iters", "training.max_iters"),
    gives_way=("schedule.lr_decay_iters",),
)
def _decay_ends_after_warmup(c: Any) -> str | None:
    end, warmup = c.schedule.lr_decay_iters, warmup_steps(c)
    if end is None or end >= warmup:
        return None
    return f"{{0}} is below {{1}} with {{2}}; warm-up takes {warmup} steps"


@rule(
    *("training.tokens_per_step", "training.gradient_accumulation_steps"),
    gives_way=("training.tokens_per_step", "training.gradient_accumulation_steps"),
)
def _one_size_of_a_step(c: Any) -> str | None:
    if c.training.tokens_per_step is None or c.training.gradient_accumulation_steps == 1:
        return None
    return "{0} and {1} exclude each other; set one"


@rule("training.batch_size", "training.tokens_per_step")
def _automatic_batch_needs_a_step(c: Any) -> str | None:
    if c.training.batch_size != "auto" or c.training.tokens_per_step is not None:
        return None
    return "{0} needs the size of a step, but {1}; set training.tokens_per_step"


@rule("logging.tensorboard", "training.save_model", gives_way=("logging.tensorboard",))
def _tensorboard_needs_a_run_directory(c: Any) -> str | None:
    if not c.logging.tensorboard or c.training.save_model:
        return None
    return "{0} needs a run directory, but {1} creates none"


@only_with(
    *("training.sample_tokens", "training.sample_prompt"),
    "{0} is the length of a sample, but {1} draws none",
)
def _draws_samples(c: Any) -> bool:
    return c.training.sample_prompt is not None


@rule("training.sample_prompt", "training.test_freq", gives_way=("training.sample_prompt",))
def _samples_are_drawn_at_evaluations(c: Any) -> str | None:
    training = c.training
    evaluates = training.test_freq is not None or training.eval_only
    if training.sample_prompt is None or evaluates:
        return None
    return "{0} is used at evaluations, but {1} means there are none"


@rule("training.tokens_per_step", "training.block_size", "training.batch_size")
def _step_is_whole_micro_steps(c: Any) -> str | None:
    tokens, micro_step = c.training.tokens_per_step or 0, micro_step_tokens(c, 1)
    if tokens % micro_step == 0:
        return None
    return "{0} is not a multiple of {1} * {2}; " + nearest_multiples(tokens, micro_step)


def _no_held_out(c: Any) -> str:
    if not c.dataset.mixture:
        return "{1} holds none out"
    names = ", ".join(_holding_none_out(c.dataset))
    return f"of dataset.mixture {names} holds none out (test_fraction: 0)"


# Two rules for one need: their remedies differ.
@rule("training.test_freq", "dataset.test_fraction")
def _evaluations_need_held_out_text(c: Any) -> str | None:
    if c.training.test_freq is None or holds_out(c.dataset):
        return None
    return (
        f"{{0}} evaluates on held-out text, but {_no_held_out(c)}; set training.test_freq to null"
    )


@rule("training.eval_only", "dataset.test_fraction")
def _evaluating_once_needs_held_out_text(c: Any) -> str | None:
    if not c.training.eval_only or holds_out(c.dataset):
        return None
    return f"{{0}} evaluates on held-out text, but {_no_held_out(c)}"


@rule("low_precision.residual_dtype", "low_precision.compute_dtype")
def _a_stream_in_bfloat16_goes_with_products_in_it(c: Any) -> str | None:
    low = c.low_precision
    if low.residual_dtype == "float32" or low.compute_dtype == "bfloat16":
        return None
    return "{0} needs matrix products in bfloat16, but {1}"


@rule("low_precision.use_fp8", "low_precision.compute_dtype")
def _fp8_is_used_beside_bfloat16(c: Any) -> str | None:
    if not c.low_precision.use_fp8 or c.low_precision.compute_dtype == "bfloat16":
        return None
    return "{0} computes everything else in bfloat16, but {1}"


@rule("low_precision.use_fp8", "training.batch_size", "training.block_size")
def _fp8_needs_multiples_of_16_tokens(c: Any) -> str | None:
    batch = c.training.batch_size
    if not c.low_precision.use_fp8 or batch == "auto":
        return None
    if micro_step_tokens(c, 1) % FP8_MULTIPLE == 0:
        return None
    nearest = nearest_multiples(batch, FP8_MULTIPLE)
    fault = f"{{0}} needs a multiple of {FP8_MULTIPLE} tokens, but {{1}} * {{2}} is none"
    return f"{fault}; batch_size {nearest}"


@rule("fp8.recipe", "fp8.backend")
def _native_fp8_has_two_recipes(c: Any) -> str | None:
    if c.fp8.recipe in ("current", "delayed") or c.fp8.backend != "native":
        return None
    return "{0} is a recipe of Transformer Engine, but {1}"


@only_with(
    *("fp8.amax_history_len", "fp8.recipe"),
    "{0} is for delayed scaling, but {1}; set fp8.recipe to delayed",
)
@only_with(
    *("fp8.amax_compute_algo", "fp8.recipe"),
    "{0} is for delayed scaling, but {1}; set fp8.recipe to delayed",
)
def _has_an_amax_history(c: Any) -> bool:
    return bool(c.fp8.recipe == "delayed")


@rule("system.compile", "fp8.recipe", "model.name")
def _native_delayed_scaling_compiles_for_bdh_only(c: Any) -> str | None:
    native_delayed = (
        c.low_precision.use_fp8
        and c.fp8.recipe == "delayed"
        and c.fp8.backend != "transformer_engine"
    )
    if c.system.compile is not True or not native_delayed or c.model.name == "bdh":
        return None
    return "{0} with {1} works for model.name=bdh only, but {2}; set system.compile to auto"


@rule("system.compile", "low_precision.use_fp8")
def _graphs_hold_no_8_bit_products(c: Any) -> str | None:
    # Counts and scales of theirs are kept in Python.
    if c.system.compile != "graphs" or not c.low_precision.use_fp8:
        return None
    return "{0} does not record 8-bit matmuls, but {1}; set system.compile to true"


@rule("system.compile", "low_precision.lora_rank")
def _graphs_hold_no_4_bit_products(c: Any) -> str | None:
    # bitsandbytes launches its kernels outside of the stream that is recorded: a replay would
    # leave them out, without an error.
    if c.system.compile != "graphs" or c.low_precision.lora_rank is None:
        return None
    return "{0} does not record 4-bit weights, but {1}; set system.compile to true"


@rule("training.recompute", "low_precision.use_fp8", "fp8.backend", "fp8.recipe")
def _transformer_engine_computes_nothing_again(c: Any) -> str | None:
    # Its autocast is left by the time backward computes a layer again.
    native = c.fp8.backend != "transformer_engine" and c.fp8.recipe in ("current", "delayed")
    if c.training.recompute != "layer" or not c.low_precision.use_fp8 or native:
        return None
    return (
        "{0} with {1} is for plain torch, but {2} and {3}; set backend to native, recipe to current"
    )


@rule("training.recompute", "system.compile", "model.dropout")
def _graphs_put_no_generators_back(c: Any) -> str | None:
    # Recomputed dropout needs the generator's state of the first time, which a recording cannot
    # read; BDH's masks are hashes.
    draws = c.model.dropout > 0 and c.model.name != "bdh"
    if c.training.recompute != "layer" or c.system.compile != "graphs" or not draws:
        return None
    return "{0} with {1} has no dropout, but {2}; set system.compile to true"


@rule("system.kernels", "model.name")
def _kernels_are_those_of_bdh(c: Any) -> str | None:
    if c.system.kernels != "triton" or c.model.name == "bdh":
        return None
    return "{0} is for model.name=bdh, but {1}; set system.kernels to auto"


@rule("system.kernels", "low_precision.use_fp8")
def _kernels_multiply_no_8_bit_operands(c: Any) -> str | None:
    if c.system.kernels != "triton" or not c.low_precision.use_fp8:
        return None
    return "{0} does not compute 8-bit matmuls, but {1}; set system.kernels to auto"


@rule("low_precision.use_4bit_optimizer", "optimizer.name")
def _four_bit_optimizer_is_adamw(c: Any) -> str | None:
    if not c.low_precision.use_4bit_optimizer or c.optimizer.name == "adamw":
        return None
    return "{0} is AdamW with 4-bit moments, but {1}; set one of them"


@rule(
    *("low_precision.quantize_embedding", "low_precision.quantize_head", "model.tie_embeddings"),
)
def _tied_embedding_and_head_are_quantized_together(c: Any) -> str | None:
    low, tied = c.low_precision, c.model.name == "gpt" and c.model.tie_embeddings
    if not tied or low.quantize_embedding == low.quantize_head:
        return None
    return "{0} and {1} differ, but with {2} they are one matrix"


@only_with(
    *("low_precision.quantize_after", "low_precision.lora_rank"),
    "{0} is for training all weights, but {1} trains adapters",
)
def _trains_all_weights(c: Any) -> bool:
    return c.low_precision.lora_rank is None


@rule("low_precision.lora_rank", "low_precision.use_4bit")
def _adapters_are_added_to_4_bit_weights(c: Any) -> str | None:
    if c.low_precision.lora_rank is None or c.low_precision.use_4bit:
        return None
    return "{0} adds adapters to 4-bit weights, but {1}"


@rule("low_precision.lora_rank", "training.init_from")
def _adapters_need_trained_weights(c: Any) -> str | None:
    if c.low_precision.lora_rank is None or c.training.init_from != "scratch":
        return None
    return "{0} freezes the weights it starts from, but {1} draws them at random"


@rule("low_precision.lora_rank", "low_precision.use_fp8")
def _adapters_compute_in_bfloat16(c: Any) -> str | None:
    if c.low_precision.lora_rank is None or not c.low_precision.use_fp8:
        return None
    return "{0} computes with 4-bit weights in bfloat16, but {1}"


@rule("low_precision.lora_rank", "optimizer.name")
def _muon_is_for_whole_matrices(c: Any) -> str | None:
    if c.low_precision.lora_rank is None or c.optimizer.name != "muon":
        return None
    return "{0} trains adapters, but {1} is for whole matrices"


@rule("low_precision.lora_rank", "low_precision.quantize_embedding", "low_precision.quantize_head")
def _adapters_leave_embedding_and_head(c: Any) -> str | None:
    low = c.low_precision
    if low.lora_rank is None or not (low.quantize_embedding or low.quantize_head):
        return None
    return "{0} freezes hidden matrices only, but {1} and {2}; set both to false"


def _is_sharded(c: Any) -> bool:
    return c.distributed.strategy in ("fsdp", "hsdp")


@rule("distributed.strategy", "low_precision.use_4bit_optimizer")
def _four_bit_moments_are_not_sharded(c: Any) -> str | None:
    if not _is_sharded(c) or not c.low_precision.use_4bit_optimizer:
        return None
    return "{0} cannot shard 4-bit moments yet, but {1}; set one of them to its default"


@rule("distributed.strategy", "optimizer.name")
def _eight_bit_moments_are_not_sharded(c: Any) -> str | None:
    if not _is_sharded(c) or c.optimizer.name != "adamw_8bit":
        return None
    return "{0} cannot shard 8-bit moments yet, but {1}; set optimizer.name to adamw"


@rule("distributed.strategy", "fp8.backend", "fp8.recipe")
def _transformer_engine_is_not_sharded(c: Any) -> str | None:
    te = c.fp8.backend == "transformer_engine" or c.fp8.recipe in ("block", "mxfp8")
    if not _is_sharded(c) or not c.low_precision.use_fp8 or not te:
        return None
    return "{0} cannot shard Transformer Engine yet, as {1} with {2} needs it; use native or ddp"


@rule("distributed.strategy", "low_precision.use_fp8", "training.sample_prompt")
def _samples_without_fp8_need_the_whole_model(c: Any) -> str | None:
    if not _is_sharded(c) or not c.low_precision.use_fp8 or c.training.sample_prompt is None:
        return None
    return "{0} with {1} cannot draw samples, which need the whole model, but {2}; set it to null"


@rule("distributed.strategy", "low_precision.lora_rank")
def _adapters_are_not_sharded(c: Any) -> str | None:
    if not _is_sharded(c) or c.low_precision.lora_rank is None:
        return None
    return "{0} cannot shard adapters and their 4-bit weights yet, but {1}; use ddp"
