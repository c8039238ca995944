"""The other names by which options are known: one table, read by files and command line alike.

The names come from nanoGPT-style flat files, from flag-driven scripts, from sectioned YAML of other
trainers and from what people type. A flat alias may stand at the top level, on the command line,
and in the section of the option it stands for; a dotted one is exactly that key of that section.
Files that need more than other names are translated in `settings.foreign`.
`mlp_internal_dim_multiplier`, `mlp_scale_factor` and `d_ff` are three different things: no aliases.
"""

from __future__ import annotations

from settings.schema import Foreign

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

# words that people type for a value -> ours; in lower case
VALUES: dict[str, dict[str, str]] = {
    "system.device": {"gpu": "cuda", "gpu:0": "cuda:0"},
    "low_precision.compute_dtype": {
        **dict.fromkeys(("bf16",), "bfloat16"),
        **dict.fromkeys(("fp16", "half"), "float16"),
        **dict.fromkeys(("fp32", "float"), "float32"),
    },
    "optimizer.name": {"adam": "adamw", "adamw8bit": "adamw_8bit"},
    "training.resume_from_checkpoint": {"true": "auto", "false": "null"},
}

# words that could mean several things -> what to write
HINTS: dict[str, str] = {
    **dict.fromkeys(("gpu", "cuda", "use_gpu"), "Write device=cuda"),
    "cpu": "Write device=cpu",
    **dict.fromkeys(("gpus", "num_gpus", "devices"), "Start it with torchrun --nproc_per_node=N"),
    **dict.fromkeys(("bf16", "bfloat16"), "Write dtype=bfloat16"),
    **dict.fromkeys(("fp16", "float16"), "Write dtype=float16"),
    **dict.fromkeys(("fp32", "float32"), "Write dtype=float32"),
    **dict.fromkeys(
        ("data", "data_dir", "data_path"),
        "Write parquet_dir=FOLDER for text, train_data_path=FILE for tokens",
    ),
}

# a list in place of several options
LISTS: dict[str, tuple[str, ...]] = {
    "optimizer.betas": ("optimizer.beta1", "optimizer.beta2"),
    "betas": ("optimizer.beta1", "optimizer.beta2"),
}

# section -> its name here
SECTIONS: dict[str, str] = {"datasets": "dataset"}

# accepted, without effect, and said so
IGNORED: dict[str, str] = {
    "HydraConf": "there is no Hydra here",
    "defaults": "there is no Hydra here; name several files on the command line",
    "model.compile_flex": "attention with FlexAttention is always compiled",
}

TARGETS: dict[str, str] = {alias: key for key, names in ALIASES.items() for alias in names}

# more than another name: what they mean here is in `translate`
FOREIGN: dict[str, Foreign] = {
    "model.flash": Foreign(bool, False),
    "model.flex": Foreign(bool, False),
    "dataset.tokenizer_used": Foreign(str | None, None),
}

# nanoGPT's presets -> what does the same here
PRESETS: dict[str, str] = {
    "train_gpt2.py": "gpt2-124m.yaml",
    "train_shakespeare_char.py": "shakespeare-char.yaml",
    "finetune_shakespeare.py": "finetune-shakespeare.yaml",
    "eval_gpt2.py": "eval-gpt2.yaml",
    "eval_gpt2_medium.py": "eval-gpt2-medium.yaml",
    "eval_gpt2_large.py": "eval-gpt2-large.yaml",
    "eval_gpt2_xl.py": "eval-gpt2-xl.yaml",
}

# options that come with later versions -> the values that ask for nothing, so that they may stand
LATER: dict[str, tuple[str, ...]] = {
    "optimizer.precision": ("float32",),
    "distributed.strategy": ("auto", "ddp"),
}
