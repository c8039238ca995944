"""The other names by which options are known: one table, read by files and command line alike.

The names come from nanoGPT-style flat files, from flag-driven scripts and from sectioned YAML of
other trainers. A flat alias may stand at the top level, on the command line, and in the section of
the option it stands for; a dotted one is exactly that key of that section. Files that need more
than other names are translated in `settings.foreign`.
`mlp_internal_dim_multiplier`, `mlp_scale_factor` and `d_ff` are three different things: no aliases.
"""

from __future__ import annotations

from settings.schema import Foreign

# option -> its other names
ALIASES: dict[str, tuple[str, ...]] = {
    "model.n_layer": ("num_layers",),
    "model.n_embd": ("d_model",),
    "model.n_head": ("num_heads",),
    "model.dropout": ("dropout_p",),
    "model.vocab_size": ("tokenizer.vocab_size",),
    "training.block_size": ("context_length", "model.context_length", "model.block_size"),
    "training.max_iters": ("train_steps",),
    "training.learning_rate": ("lr", "optimizer.lr"),
    "training.weight_decay": ("optimizer.weight_decay",),
    "training.log_freq": ("log_interval",),
    "training.test_freq": ("eval_interval", "val_interval"),
    "training.eval_iters": ("dataset.val_batches",),
    "training.checkpoint_freq": ("checkpoint_interval",),
    "training.checkpoint_dir": ("out_dir", "artifacts_path", "runs_dir"),
    "training.resume_from_checkpoint": ("resume_from",),
    "dataloader.shuffle": ("training.shuffle",),
    "dataset.parquet_dir": ("dataset.path",),
    "dataset.test_fraction": ("val_split",),
    "dataset.name": ("dataset",),
    "low_precision.compute_dtype": ("dtype", "autocast_precision", "model.autocast_precision"),
    "distributed.backend": ("backend",),
    "logging.wandb_log": ("use_wandb", "wandb_log"),
    "logging.wandb_run_name": ("wandb_log.name",),
    "logging.tensorboard": ("tensorboard.enabled",),
    "system.compile": ("training.compile_model",),
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
