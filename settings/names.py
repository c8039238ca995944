"""Which option a name means: the names that options have besides their own, and how one is found.

The other names are those of nanoGPT, of CS336's training script, of TMRC and fivezeroes/bdh, and
what people type. A name without a dot may stand at the top level, on the command line, and in the
section of the option it stands for; a name with a dot is exactly that key of that section.
`mlp_internal_dim_multiplier`, `mlp_scale_factor` and `d_ff` are three different things: no aliases.
Values that need more than another name are translated in `settings.foreign`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from settings.schema import Option, Schema, extra_option
from settings.values import RefusedError, shown

# option -> its other names
ALIASES: dict[str, tuple[str, ...]] = {
    "model.name": ("model", "model_type", "arch"),
    "model.n_layer": ("num_layers", "n_layers", "layers", "num_hidden_layers"),
    "model.n_embd": ("d_model", "hidden_size", "n_embed", "embed_dim"),
    "model.n_head": ("num_heads", "n_heads", "heads", "num_attention_heads"),
    "model.dropout": ("dropout_p",),
    "model.vocab_size": ("tokenizer.vocab_size",),
    "training.block_size": (
        *("context_length", "model.context_length", "model.block_size", "context_len"),
        *("seq_len", "seq_length", "max_seq_len", "ctx_len"),
    ),
    "training.batch_size": ("bs", "per_device_train_batch_size"),
    "training.gradient_accumulation_steps": ("grad_accum", "grad_accum_steps"),
    "training.max_iters": (
        "train_steps",
        "steps",
        "max_steps",
        "num_steps",
        "total_steps",
        "iters",
    ),
    "training.epochs": ("num_epochs", "num_train_epochs"),
    "training.learning_rate": ("lr", "optimizer.lr"),
    "training.weight_decay": ("optimizer.weight_decay", "wd"),
    "training.log_freq": ("log_interval", "log_every", "logging_steps"),
    "training.test_freq": (
        "eval_interval",
        "val_interval",
        "eval_every",
        "eval_freq",
        "eval_steps",
    ),
    "training.eval_iters": ("dataset.val_batches",),
    "training.checkpoint_freq": ("checkpoint_interval", "save_interval", "save_steps"),
    "training.checkpoint_dir": ("out_dir", "artifacts_path", "runs_dir", "output_dir", "save_dir"),
    "training.resume_from_checkpoint": ("resume_from", "resume"),
    "training.fork_from_checkpoint": ("fork_from", "fork"),
    "optimizer.name": ("optimizer",),
    "optimizer.grad_clip": ("max_grad_norm", "clip_grad"),
    "schedule.name": ("schedule", "lr_scheduler", "lr_scheduler_type"),
    "schedule.warmup_iters": ("warmup", "warmup_steps", "num_warmup_steps"),
    "dataloader.shuffle": ("training.shuffle",),
    "dataset.parquet_dir": ("dataset.path",),
    "dataset.test_fraction": ("val_split",),
    "dataset.name": ("dataset",),
    "tokenizer.name": ("tokenizer",),
    "low_precision.compute_dtype": ("dtype", "autocast_precision", "model.autocast_precision"),
    "distributed.backend": ("backend",),
    "logging.wandb_log": ("use_wandb", "wandb_log", "wandb"),
    "logging.wandb_run_name": ("wandb_log.name",),
    "logging.tensorboard": ("tensorboard.enabled",),
    "system.compile": ("training.compile_model",),
}

# option -> words that people type, in lower case -> the value they mean
WORDS: dict[str, dict[str, str]] = {
    "system.device": {"gpu": "cuda", "gpu:0": "cuda:0"},
    "low_precision.compute_dtype": {
        **dict.fromkeys(("bf16",), "bfloat16"),
        **dict.fromkeys(("fp16", "half"), "float16"),
        **dict.fromkeys(("fp32", "float"), "float32"),
    },
    "optimizer.name": {"adam": "adamw", "adamw8bit": "adamw_8bit"},
    "training.resume_from_checkpoint": {"true": "auto", "false": "null"},
}

# words that name no single option -> what to write instead
HINTS: dict[str, str] = {
    **dict.fromkeys(("gpu", "cuda", "use_gpu"), "Write device=cuda"),
    "cpu": "Write device=cpu",
    **dict.fromkeys(("gpus", "num_gpus", "devices"), "Start it with torchrun --nproc_per_node=N"),
    **dict.fromkeys(
        ("nodes", "time", "partition", "account", "qos", "constraint", "mem", "cpus"),
        "Keys of --slurm stand directly behind it",
    ),
    **dict.fromkeys(("bf16", "bfloat16"), "Write dtype=bfloat16"),
    **dict.fromkeys(("fp16", "float16"), "Write dtype=float16"),
    **dict.fromkeys(("fp32", "float32"), "Write dtype=float32"),
    **dict.fromkeys(
        ("data", "data_dir", "data_path"),
        "Write parquet_dir=FOLDER for text, train_data_path=FILE for tokens",
    ),
}

# a list that gives several options
LISTS: dict[str, tuple[str, ...]] = {
    "optimizer.betas": ("optimizer.beta1", "optimizer.beta2"),
    "betas": ("optimizer.beta1", "optimizer.beta2"),
}

# another name of a section -> the section
SECTION_ALIASES: dict[str, str] = {"datasets": "dataset"}

# names without a meaning here -> why; the user is told
IGNORED: dict[str, str] = {
    "HydraConf": "there is no Hydra here",
    "defaults": "there is no Hydra here; name several files on the command line",
    "model.compile_flex": "attention with FlexAttention is always compiled",
}

# options that this version does not have -> the only values that may be given, without an effect
UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "optimizer.precision": ("float32",),
}

TARGETS: dict[str, str] = {alias: key for key, names in ALIASES.items() for alias in names}
_ALIAS_SECTIONS = {alias.partition(".")[0] for alias in TARGETS if "." in alias}

# options of TMRC that `settings.foreign.tmrc` turns into options of ours
EXTRA_OPTIONS: dict[str, Option] = {
    "model.flash": extra_option("model.flash", bool),
    "model.flex": extra_option("model.flex", bool),
    "dataset.tokenizer_used": extra_option("dataset.tokenizer_used", str | None),
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a name stands for. Several keys: a list gives one value to each."""

    keys: tuple[str, ...] = ()
    ignored: str = ""  # the reason why the name has no effect
    is_alias: bool = False


def resolve(schema: Schema, written: str) -> Target:
    """Returns the target of 'name' or 'section.name'; RefusedError with the nearest known name."""
    if written in schema.options:
        return Target((written,))
    listed = schema.list_of(written)
    if listed is not None:
        return Target((f"{listed.section}.{written.removeprefix(f'{listed.section}.')}",))
    head, dot, name = written.partition(".")
    for ignored in (head, written):
        if ignored in IGNORED:
            return Target(ignored=IGNORED[ignored])
    full = f"{SECTION_ALIASES.get(head, head)}.{name}" if dot else written
    if schema.find(full) or full in UNSUPPORTED:
        return Target((full,), is_alias=full != written)
    if full in LISTS:
        return Target(LISTS[full], is_alias=True)
    if full in TARGETS:
        key = TARGETS[full]
        return Target((key,), is_alias=not key.endswith(f".{full}"))
    return _resolve_dotted(schema, full) if dot else _resolve_bare(schema, full)


def is_section(schema: Schema, name: str) -> bool:
    """Returns whether a mapping may stand under this top-level name."""
    name = SECTION_ALIASES.get(name, name)
    homes = (key.split(".")[0] for key in (*schema.extra, *UNSUPPORTED))
    return name in schema.sections or name in _ALIAS_SECTIONS or name in homes


def refuse_unknown_section(schema: Schema, name: str) -> None:
    """Raises RefusedError, with the nearest name, unless `name` is a section."""
    if is_section(schema, name):
        return
    if schema.named(name) or name in TARGETS:
        raise RefusedError(f"{name}: is an option, not a section; got a section")
    near = nearest(name, {section: section for section in schema.sections})
    raise RefusedError(
        f"{_short(name)}: unknown section. {near or 'Sections: ' + ', '.join(schema.sections)}"
    )


def guess(schema: Schema, word: str) -> str:
    """Returns what to write for `word`: 'Did you mean section.option?', or where to look."""
    hint = HINTS.get(word.lower().replace("-", "_"))
    known = {name: key for name, key in TARGETS.items() if key in schema.options}
    known |= {key.split(".")[1]: key for key in (*schema.extra, *schema.options)}
    return hint or nearest(word, known) or "See python train.py --help"


def _resolve_dotted(schema: Schema, full: str) -> Target:
    section, name = full.split(".", 1)
    target = TARGETS.get(name)
    if target is not None and target.startswith(f"{section}."):
        return Target((target,), is_alias=True)
    lists = [option for option in schema.named(section) if option.entry_options]
    if lists:
        raise RefusedError(f"{full}: give a key of it: {full}.{lists[0].entry_options[1].name}=...")
    refuse_unknown_section(schema, section)
    if name in schema.sections:
        raise RefusedError(f"{full}: {name} is a section. Start its line at the first column")
    homes = [option.section for option in schema.named(name)]
    if homes:
        raise RefusedError(f"{full}: unknown option. It belongs in section {' or '.join(homes)}")
    keys = (*schema.options, *schema.extra, *UNSUPPORTED)
    inside = {key.split(".")[1]: key.split(".")[1] for key in keys if key.startswith(f"{section}.")}
    for alias, key in TARGETS.items():
        if key.startswith(f"{section}.") and "." not in alias:
            inside[alias] = key.split(".")[1]
    near = nearest(name, inside) or guess(schema, name)
    raise RefusedError(f"{_short(full)}: unknown option. {near}")


def _resolve_bare(schema: Schema, name: str) -> Target:
    keys = [option.key for option in schema.named(name)]
    keys = keys or [key for key in (*UNSUPPORTED, *schema.extra) if key.split(".")[1] == name]
    if len(keys) == 1:
        return Target((keys[0],))
    if keys:
        raise RefusedError(f"{name}: names several options. Write one of {', '.join(keys)}")
    if is_section(schema, name):
        raise RefusedError(f"{name}: is a section. Write {name}.OPTION=value")
    raise RefusedError(f"{_short(name)}: unknown option. {guess(schema, name)}")


def nearest(name: str, candidates: dict[str, str]) -> str:
    """Returns 'Did you mean x?' for the candidate nearest to `name`, or ''."""
    near = difflib.get_close_matches(name[:100].lower(), candidates, 1)
    return f"Did you mean {candidates[near[0]]}?" if near else ""


def _short(name: str) -> str:
    return name if name.isprintable() and len(name) <= 60 else shown(name)
