"""Every option of a run: sections as frozen dataclasses, their defaults, limits and rules.

YAML files and command-line overrides become one checked `Config`; nothing else in the project
reads settings from anywhere. Run `python train.py --help` for all options; `config.yaml` holds them
at their defaults. No torch here: a mistake in a config is answered before torch is imported.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

from settings.command_line import COMMAND_LINE, Arguments, parse_arguments
from settings.constraints import FP8_MULTIPLE as FP8_MULTIPLE
from settings.constraints import GPT2_NAMES as GPT2_NAMES
from settings.constraints import derived_values, micro_step_tokens
from settings.constraints import holds_out as holds_out
from settings.constraints import token_paths as token_paths
from settings.constraints import warmup_steps as warmup_steps
from settings.entries import entries_of, nested_options
from settings.errors import STOP_EXIT_CODES as STOP_EXIT_CODES
from settings.errors import CheckpointError as CheckpointError
from settings.errors import ConfigError as ConfigError
from settings.errors import DataError as DataError
from settings.errors import MemoryShortError as MemoryShortError
from settings.errors import NonFiniteError as NonFiniteError
from settings.errors import Origin, Problem, raise_problems
from settings.errors import UserError as UserError
from settings.errors import WriteError as WriteError
from settings.merge import Merged, merge, read_layer
from settings.mixture import source_datasets as source_datasets
from settings.names import EXTRA_OPTIONS, WORDS, resolve
from settings.render import dump, help_text
from settings.rules import RULES, Rule, check_rules, model_option_rules, nearest_multiples
from settings.rules import setting as setting
from settings.sbatch import batch_script, submit
from settings.schema import REQUIRED, Form, Schema, Section, entry_values, option, schema_of
from settings.sources import read_layers
from settings.superseded import drop_superseded
from settings.terminal import printable
from settings.torchrun import let_rank_0_print as let_rank_0_print
from settings.torchrun import report_to_torchrun as report_to_torchrun
from settings.torchrun import started_by_launch as started_by_launch
from settings.torchrun import started_by_torchrun as started_by_torchrun
from settings.values import RefusedError, check_value
from settings.yaml_reader import Entry

DEFAULT_FILE = "config.yaml"
DEFAULT_FILE_HEADER = (
    "The reference run: every option at its default, with its meaning, type, range and unit.",
    "Write only what differs into a file of your own: python train.py my.yaml",
    "A test keeps this file equal to config.py. To write it anew: python config.py > config.yaml",
)
MOST_MICRO_STEPS = 10**6  # per optimizer step and process
PLAIN_WORD = Form("a word of letters, digits and _ . -", r"[A-Za-z0-9_.-]+")
DEVICE = Form("auto | cpu | cuda | cuda:N | mps", r"auto|cpu|cuda(:[0-9]{1,4})?|mps")


def _has_learned_positions(saved: Config) -> bool:
    return saved.model.name == "gpt"


def _trains_adapters(saved: Config) -> bool:
    return saved.low_precision.lora_rank is not None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, section="model", on_resume="fixed", effect="results"):
    """The network."""

    name: Literal["bdh", "gpt", "llama"] = option("bdh", "architecture")
    n_layer: int = option(6, "number of layers", ge=1)
    n_embd: int = option(256, "width of the residual stream", ge=1)
    n_head: int = option(4, "attention heads per layer; must divide n_embd", ge=1)
    dropout: float = option(0.1, "dropout probability", on_resume="explicit", ge=0, lt=1)
    vocab_size: int | None = option(None, "vocabulary size; null: from the tokenizer", ge=1)
    mask: Literal["causal", "causal_document"] = option(
        "causal", "causal_document: own document only", on_resume="explicit"
    )
    mlp_internal_dim_multiplier: int = option(
        128, "bdh: number of neurons = this * n_embd", models=("bdh",), ge=1
    )
    bias: bool = option(False, "gpt: biases in linear layers and LayerNorms", models=("gpt",))
    mlp_bias: bool | None = option(None, "gpt: biases of the MLP; null: as bias", models=("gpt",))
    attn_bias: bool | None = option(
        None, "gpt: biases of q, k and v; null: as bias", models=("gpt",)
    )
    proj_bias: bool | None = option(
        None, "gpt: bias of attention's output; null: as bias", models=("gpt",)
    )
    ln_bias: bool | None = option(None, "gpt: biases of LayerNorms; null: as bias", models=("gpt",))
    cls_head_bias: bool = option(False, "gpt: bias of the output head", models=("gpt",))
    activation: Literal["gelu", "gelu_tanh", "relu"] = option(
        "gelu", "gpt: in the MLP; GPT-2 has gelu_tanh", models=("gpt",)
    )
    mlp_scale_factor: int = option(4, "gpt: MLP width = this * n_embd", models=("gpt",), ge=1)
    tie_embeddings: bool = option(
        True, "gpt: output head shares the embedding's weights", models=("gpt",)
    )
    d_ff: int | None = option(
        None, "llama: MLP width; null: about 8/3 * n_embd", models=("llama",), ge=1
    )
    rope_theta: float = option(
        10000.0, "llama: base of the rotary embedding (RoPE)", models=("llama",), gt=0
    )
    n_kv_head: int | None = option(
        None, "llama: key/value heads; null: n_head", models=("llama",), ge=1
    )
    attention: Literal["auto", "flash", "flex", "math"] = option(
        "auto", "gpt, llama: attention kernel", models=("gpt", "llama"), on_resume="free"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section, section="training", on_resume="free", effect="results"):
    """The run: sizes, length, evaluation and checkpoints."""

    block_size: int = option(
        512,
        "context length in training",
        on_resume="explicit",
        fixed_if=_has_learned_positions,
        effect="eval_rows",
        ge=1,
        unit="tokens",
    )
    batch_size: int | Literal["auto"] = option(
        8, "sequences per process and micro-step", on_resume="split", effect="eval_rows", ge=1
    )
    gradient_accumulation_steps: int = option(
        1, "micro-steps per step, on each process", on_resume="split", ge=1, le=MOST_MICRO_STEPS
    )
    tokens_per_step: int | None = option(
        None, "size of a step over all processes", on_resume="split", ge=1, unit="tokens"
    )
    max_iters: int = option(3000, "length of the run", ge=1, unit="optimizer steps")
    epochs: int | None = option(None, "stop after this many passes over the data", ge=1)
    learning_rate: float = option(
        1e-3, "peak learning rate, reached after warm-up", on_resume="explicit", gt=0
    )
    weight_decay: float = option(0.1, "weight decay, of matrices only", on_resume="explicit", ge=0)
    log_freq: int = option(100, "logging interval", ge=1, unit="steps", effect="none")
    test_freq: int | None = option(500, "evaluation interval; null: never", ge=1, unit="steps")
    eval_iters: int = option(50, "batches per evaluation and split", effect="eval_rows", ge=1)
    eval_batch_size: int | None = option(
        None, "evaluation batch size; null: batch_size", effect="eval_rows", ge=1
    )
    eval_only: bool = option(False, "evaluate once and exit, without training")
    checkpoint_freq: int | None = option(
        500, "save interval; null: only at the end", ge=1, unit="steps", effect="none"
    )
    save_every: float | None = option(
        None, "also save after this much time", gt=0, unit="seconds", effect="none"
    )
    always_save_checkpoint: bool = option(
        True, "false: save only at a new best loss and at the end", effect="none"
    )
    save_model: bool = option(
        True, "false: write no checkpoints and no run directory", effect="none"
    )
    keep_last: int | None = option(
        None, "checkpoints to keep, the newest; null: all", ge=1, effect="none"
    )
    checkpoint_dir: str = option("checkpoints", "folder for run directories", effect="none")
    resume_from_checkpoint: str | None = option(
        None, "auto, a run directory or a checkpoint", effect="none"
    )
    fork_from_checkpoint: str | None = option(
        None, "a run or checkpoint that a new run goes on from", on_resume="explicit"
    )
    init_from: str = option("scratch", "initial weights: scratch, resume, gpt2, a path")
    seed: int = option(1337, "seed of weights, data order and dropout", on_resume="fixed", ge=0)
    recompute: Literal["none", "layer", "auto"] = option("none", "recompute layers in backward")
    sample_prompt: str | None = option(
        None, "prompt to sample from at evaluations; null: off", effect="none"
    )
    sample_tokens: int = option(
        100, "length of that sample", ge=1, le=10**6, unit="tokens", effect="none"
    )
    use_oracle: bool = option(
        False, "debugging: repeat one batch; loss should reach 0", on_resume="explicit"
    )
    debug: bool = option(False, "show Python tracebacks of errors", effect="none")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section, section="optimizer", on_resume="explicit", effect="results"):
    """The optimizer; learning_rate and weight_decay are set under training."""

    name: Literal["adamw", "adamw_8bit", "muon"] = option(
        "adamw", "muon: hidden matrices, rest AdamW", on_resume="fixed"
    )
    beta1: float = option(0.9, "decay rate of the first moment", ge=0, lt=1)
    beta2: float = option(0.95, "decay rate of the second moment", ge=0, lt=1)
    eps: float = option(1e-8, "added to AdamW's denominator", gt=0)
    grad_clip: float = option(1.0, "maximum norm of the gradients; 0: no clipping", ge=0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section, section="schedule", on_resume="explicit", effect="results"):
    """The learning rate over the run."""

    decay_lr: bool = option(True, "false: constant after warm-up")
    name: Literal["cosine", "linear", "wsd", "constant"] = option("cosine", "shape of the decay")
    warmup_iters: int | None = option(None, "warm-up; null: 3 % of the run", ge=0, unit="steps")
    lr_decay_iters: int | None = option(
        None, "end of decay; null: end of the run", ge=1, unit="steps"
    )
    min_lr: float | None = option(None, "final rate; null: learning_rate / 10", ge=0)
    wsd_decay_fraction: float = option(0.2, "wsd: fraction of steps in the final decay", gt=0, le=1)


@dataclass(frozen=True, kw_only=True)
class DataLoaderConfig(Section, section="dataloader", on_resume="free", effect="none"):
    """How batches are prepared; only shuffle changes what is in them."""

    num_workers: int = option(0, "worker processes; 0: a thread", ge=0, le=1024)
    pin_memory: bool = option(True, "pinned (page-locked) host memory on CUDA")
    prefetch_factor: int = option(2, "batches prepared ahead, per worker", ge=1, le=4096)
    shuffle: bool = option(
        True, "another order of documents in each epoch", on_resume="fixed", effect="results"
    )


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section, section="dataset.mixture", on_resume="explicit", effect="text"):
    """One text of dataset.mixture; null: as in section dataset."""

    name: str = option(REQUIRED, "what metrics call this source", form=PLAIN_WORD)
    weight: float = option(REQUIRED, "share of the tokens, relative", effect="results", ge=0)
    parquet_dir: str | None = option(None, "folder of parquet files")
    train_data_path: str | None = option(None, "or a token file")
    val_data_path: str | None = option(None, "held-out token file; null: test_fraction")
    token_dtype: Literal["auto", "uint8", "uint16", "uint32", "int32", "int64"] | None = option(
        None, "of .bin, .ids", effect="eval_rows"
    )
    text_column: str | None = option(None, "parquet column with the documents")
    test_fraction: float | None = option(None, "fraction held out", ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Section, section="dataset", on_resume="explicit", effect="text"):
    """The text to train on."""

    parquet_dir: str = option("data/python-stdlib", "folder of parquet files, nested or not")
    train_data_path: str | None = option(None, "a token file instead (.bin, .ids, .npy)")
    val_data_path: str | None = option(None, "held-out token file; null: test_fraction")
    name: str | None = option(None, "token files data/NAME/train.bin and val.bin")
    token_dtype: Literal["auto", "uint8", "uint16", "uint32", "int32", "int64"] = option(
        "auto", "of .bin, .ids", effect="eval_rows"
    )
    max_cached_files: int = option(
        5, "open files, per worker", on_resume="free", effect="none", ge=1
    )
    text_column: str = option("auto", "parquet column of the text; auto: a usual name")
    test_fraction: float = option(0.05, "fraction held out for evaluation", ge=0, lt=1)
    on_bad_shard: Literal["error", "skip"] = option(
        "error", "unreadable file: stop or leave it out", effect="results"
    )
    cache_bytes: int = option(
        1 << 32,
        "kept of remote parquet; as much of token files",
        on_resume="free",
        effect="none",
        ge=0,
    )
    retry_seconds: float = option(
        120.0, "remote reads are tried again", on_resume="free", effect="none", ge=0, le=240
    )
    mixture: tuple[SourceConfig, ...] = option((), "several texts, by weight")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section, section="tokenizer", on_resume="explicit", effect="results"):
    """From text to tokens."""

    name: str = option("auto", "auto, bytes, char, gpt2, a file, a Hub name", effect="eval_rows")
    vocab_multiple: int = option(1, "vocab_size: null is rounded up to a multiple", ge=1)


@dataclass(frozen=True, kw_only=True)
class LowPrecisionConfig(Section, section="low_precision", on_resume="explicit", effect="results"):
    """Number formats of matrix products, weights and optimizer state."""

    use_fp8: bool = option(False, "8-bit matrix products (Ada, Hopper or newer GPU)")
    use_4bit: bool | Literal["auto"] = option("auto", "train for 4-bit weights; auto: bdh and LoRA")
    use_4bit_optimizer: bool = option(False, "AdamW with moments in 4 bits", on_resume="fixed")
    quantization_type: Literal["nf4", "fp4"] = option(
        "nf4", "4-bit weights: the 16 levels", fixed_if=_trains_adapters
    )
    use_double_quant: bool = option(
        True, "4-bit weights: their scales in 8 bits", fixed_if=_trains_adapters
    )
    quantize_embedding: bool = option(False, "4-bit weights: the embedding too")
    quantize_head: bool = option(False, "4-bit weights: the output head too")
    quantize_after: float = option(0.8, "4-bit weights: after this part of the run", ge=0, lt=1)
    lora_rank: int | None = option(
        None, "LoRA rank; base weights frozen in 4 bits", on_resume="fixed", ge=1
    )
    lora_alpha: float = option(
        16.0, "LoRA: output scaled by alpha / rank", fixed_if=_trains_adapters, gt=0
    )
    compute_dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "dtype of matrix products"
    )
    residual_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "gpt, llama: dtype of the residual stream", models=("gpt", "llama")
    )


@dataclass(frozen=True, kw_only=True)
class Fp8Config(Section, section="fp8", on_resume="explicit", effect="results"):
    """How low_precision.use_fp8 computes."""

    backend: Literal["auto", "transformer_engine", "native"] = option(
        "auto", "native: plain PyTorch"
    )
    recipe: Literal["auto", "current", "delayed", "block", "mxfp8"] = option(
        "auto", "scaling of operands"
    )
    format: Literal["auto", "hybrid", "e4m3"] = option("auto", "hybrid: gradients in e5m2")
    amax_history_len: int = option(1024, "delayed: length of the amax history", ge=1, le=10**6)
    amax_compute_algo: Literal["max", "most_recent"] = option(
        "max", "delayed: which amax of the history"
    )


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(Section, section="distributed", on_resume="free", effect="results"):
    """Several processes, started by torchrun."""

    backend: Literal["auto", "nccl", "gloo"] = option("auto", "auto: nccl on CUDA, else gloo")
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = option(
        "auto", "fsdp: sharded; hsdp: in each node"
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section, section="logging", on_resume="free", effect="none"):
    """Trackers beside metrics.jsonl."""

    wandb_log: bool = option(False, "send metrics to Weights & Biases")
    wandb_project: str = option("hatchery", "project in Weights & Biases")
    wandb_run_name: str | None = option(None, "name of the run there; null: its directory's")
    tensorboard: bool = option(False, "TensorBoard event files in the run directory")


@dataclass(frozen=True, kw_only=True)
class SystemConfig(Section, section="system", on_resume="free", effect="results"):
    """The machine."""

    device: str = option("auto", "auto: the fastest available", form=DEVICE)
    compile: bool | Literal["auto", "graphs"] = option(
        "auto", "torch.compile; graphs: CUDA graphs too"
    )
    kernels: Literal["auto", "torch", "triton"] = option(
        "auto", "bdh on CUDA; auto: triton where timed"
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, checked: every value in its range, every rule kept, derived values filled in."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    dataloader: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    low_precision: LowPrecisionConfig = field(default_factory=LowPrecisionConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        # A config made in Python, or by `replace`, is checked like one from a file.
        raise_problems(_wrong_values(self))
        complete = _with_derived(vars(self))
        for name in SECTIONS:  # a frozen dataclass allows no other way
            object.__setattr__(self, name, getattr(complete, name))
        raise_problems(check_rules(rules(), self))

    @staticmethod
    def from_yaml(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
        """Reads a file, then overrides as on the command line; raises ConfigError.

        Notes on aliases and ignored names go to standard error.
        """
        arguments = parse_arguments(overrides, schema())
        flags = {
            "--dry-run": arguments.dry_run,
            "--show-config": arguments.show_config,
            "--help": arguments.help,
            "--slurm": arguments.slurm is not None,
            "--reproduce": arguments.reproduce is not None,
        }
        others = [*arguments.files, *(flag for flag, given in flags.items() if given)]
        arguments.problems += [f"{word}: not an override" for word in others]
        arguments.files = [os.fspath(path)]
        request = _load(arguments)
        for note in request.notes:
            print(f"note: {printable(note)}", file=sys.stderr)
        return request.config

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str = "") -> Config:
        """Rebuilds a config from `to_dict`; `source` names its file in a ConfigError."""
        entries = entries_of(values, Origin(1, source=source))
        return _build(merge([read_layer(schema(), 1, source, entries)]))

    @staticmethod
    def from_flat(options: Mapping[str, Any], source: str = "") -> Config:
        """Rebuilds a config from `flat_options` of its `to_dict`."""
        lists = [key for key, option in schema().options.items() if option.entry_options]
        return Config.from_dict(nested_options(options, lists), source)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the sections as plain values."""
        # Not `asdict`: it copies each value by itself, and a sweep reads a thousand configs.
        values = {name: dict(vars(getattr(self, name))) for name in SECTIONS}
        values["dataset"]["mixture"] = [entry_values(source) for source in self.dataset.mixture]
        return values

    def to_yaml(self, header: Sequence[str] = ()) -> str:
        """Returns every option with its meaning, below `header` lines; it reads back equal."""
        return dump(schema(), self.to_dict(), header)

    def to_bdh_config(self) -> BDHConfig:
        """Returns the shape of the model; ConfigError while the vocabulary depends on the text."""
        if self.model.vocab_size is None:
            raise ConfigError(
                f"model.vocab_size=null takes the number of tokens of "
                f"{setting(self, 'tokenizer.name')}, which is known once the text is opened; set "
                "it to get a model's shape without a text."
            )
        return BDHConfig(**{f.name: getattr(self.model, f.name) for f in fields(BDHConfig)})


SECTIONS: dict[str, type[Any]] = get_type_hints(Config)


@cache
def schema() -> Schema:
    """Returns every option with what is declared of it above."""
    return schema_of(SECTIONS, EXTRA_OPTIONS)


@cache
def rules() -> tuple[Rule, ...]:
    """Returns what must hold between options."""
    return (*model_option_rules(schema().options.values()), *RULES)


def micro_batch(config: Config) -> int:
    """Returns the sequences per process and micro-step, once `auto` has become a number."""
    size = config.training.batch_size
    assert isinstance(size, int), "training.batch_size: auto has not been settled"
    return size


def eval_batch(config: Config) -> int:
    """Returns the sequences of an evaluation's batch."""
    return config.training.eval_batch_size or micro_batch(config)


def eval_batches(config: Config) -> int:
    """Returns the batches that an evaluation takes of each source, from each split: equally many,
    so that runs whose weights differ are evaluated on the same rows."""
    return math.ceil(config.training.eval_iters / len(source_datasets(config.dataset)))


def accumulation_steps(config: Config, world_size: int) -> int:
    """Returns the micro-steps of each process per optimizer step; ConfigError if not whole."""
    tokens, micro_step = config.training.tokens_per_step, micro_step_tokens(config, world_size)
    if tokens is None:
        return config.training.gradient_accumulation_steps
    if tokens % micro_step == 0:
        steps = tokens // micro_step
        if steps > MOST_MICRO_STEPS:
            raise ConfigError(
                f"{setting(config, 'training.tokens_per_step')} takes {steps:,} micro-steps of "
                f"{micro_step:,} tokens; at most {MOST_MICRO_STEPS:,} are taken."
            )
        return steps
    raise ConfigError(
        f"{setting(config, 'training.tokens_per_step')} is not a multiple of "
        f"{setting(config, 'training.block_size')} * {setting(config, 'training.batch_size')} "
        f"* {world_size} processes; {nearest_multiples(tokens, micro_step)}."
    )


def sequences_per_step(config: Config, world_size: int) -> int:
    """Returns the sequences of one optimizer step, over all processes."""
    if config.training.batch_size == "auto":
        assert config.training.tokens_per_step is not None  # a rule
        return config.training.tokens_per_step // config.training.block_size
    return accumulation_steps(config, world_size) * micro_batch(config) * world_size


@dataclass(frozen=True)
class BDHConfig:
    """The shape of a BDH, under the names of the public reference implementation."""

    n_layer: int
    n_embd: int
    dropout: float
    n_head: int
    mlp_internal_dim_multiplier: int
    vocab_size: int


def device_option(word: str) -> str:
    """Returns the value of `system.device` that `word` means; raises ConfigError."""
    device = WORDS["system.device"].get(word.lower(), word)
    return Config(system=SystemConfig(device=device)).system.device


@dataclass(frozen=True, slots=True)
class Request:
    """What a command line asks for."""

    config: Config
    files: tuple[str, ...] = ()  # as they were applied, a base first
    overrides: tuple[str, ...] = ()  # key=value, as `Config.from_yaml` takes them
    dry_run: bool = False
    show_config: bool = False
    check_resume: int | None = None  # steps to train straight and interrupted
    reproduce: str | None = None  # a run to repeat, with its config in place of this one
    notes: tuple[str, ...] = ()  # aliases used and names ignored, to be printed
    given: frozenset[str] = frozenset()  # options that would differ had the user left them out


def command_line(argv: Sequence[str]) -> Request:
    """Returns what `argv` asks for; --help, --show-config and --slurm print and leave with 0,
    mistakes leave with 2 and a message.
    """
    arguments = parse_arguments(argv, schema())
    if arguments.help:
        print(help_text(schema()), end="")
        raise SystemExit(0)
    try:
        request = _load(arguments)
        answer = _answer_of_slurm(arguments, request)
    except ConfigError as error:
        report_to_torchrun(str(error))
        if os.environ.get("RANK", "0") == "0":  # all processes read the same config: one prints
            print(error, file=sys.stderr)
        else:
            let_rank_0_print()
        raise SystemExit(error.exit_code) from None
    if request.show_config and not request.dry_run:
        for note in request.notes:
            print(f"note: {note}", file=sys.stderr)
        print(request.config.to_yaml(), end="")
        raise SystemExit(0)
    if answer is not None:
        print(answer, end="")
        raise SystemExit(0)
    return request


def _answer_of_slurm(arguments: Arguments, request: Request) -> str | None:
    """Returns the batch script of --slurm, with --submit sbatch's answer; None without --slurm.

    Notes go to standard error. Raises ConfigError, also for what is only wrong for this job.
    """
    if arguments.slurm is None:
        return None
    if started_by_torchrun() or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(  # each process would submit the job
            "--slurm: run it with python, without torchrun or srun: the script starts the processes"
        )
    config, device = request.config, request.config.system.device
    name = os.path.splitext(os.path.basename(request.files[-1]))[0] if request.files else "train"
    job, notes = arguments.slurm.with_defaults(device, re.sub(r"[^\w.-]", "_", name))
    if job.gpus and device in ("cpu", "mps") or not job.gpus and device.startswith("cuda"):
        raise ConfigError(f"--slurm gpus={job.gpus}, but {setting(config, 'system.device')}.")
    if config.training.batch_size != "auto":
        accumulation_steps(config, job.processes)
    words, training = list(job.words), config.training
    if training.resume_from_checkpoint is None and training.init_from != "resume":
        given = [key for name, _ in arguments.overrides for key in resolve(schema(), name).keys]
        if "training.resume_from_checkpoint" in given or not training.save_model:
            notes.append("a requeued job begins anew")
        else:
            words.append("resume_from_checkpoint=auto")
            notes.append("added: resume_from_checkpoint=auto, so that a requeued job goes on")
    for note in (*request.notes, *notes):
        print(f"note: {printable(note)}", file=sys.stderr)
    script = batch_script(job, words)
    return submit(script) if job.submit else script


def read_variants(
    files: Sequence[str], variants: Iterable[Sequence[Entry]]
) -> list[Config | ConfigError]:
    """Reads the files once, and for each variant the config that its entries make of them, as if
    they stood on the command line; or what is wrong with it. Raises ConfigError where the files
    themselves are wrong.
    """
    layers = read_layers(schema(), Arguments(files=list(files)), DEFAULT_FILE)
    raise_problems(merge(layers).problems)
    found = list[Config | ConfigError]()
    for entries in variants:
        try:
            last = read_layer(schema(), len(layers) + 1, COMMAND_LINE, entries)
            found.append(_build(merge([*layers, last])))
        except ConfigError as error:
            found.append(error)
    return found


def _load(arguments: Arguments) -> Request:
    """Reads the files in order and the overrides last."""
    if arguments.reproduce is not None and not arguments.problems:
        return _request_to_reproduce(arguments.reproduce)
    layers = read_layers(schema(), arguments, DEFAULT_FILE)
    merged = merge(layers)
    config = _build(merged)
    return Request(
        config=config,
        files=tuple(layer.source for layer in layers if layer.style != "command line"),
        overrides=tuple(f"{key}={text}" for key, text in arguments.overrides),
        dry_run=arguments.dry_run,
        show_config=arguments.show_config,
        check_resume=arguments.check_resume,
        notes=tuple(merged.notes),
        given=_given(merged, config),
    )


def _request_to_reproduce(run: str) -> Request:
    """Returns a request that reads no config: not even config.yaml of the working directory."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "--reproduce repeats a run in one process: start it with python, without torchrun or "
            "srun. The steps have the same rows on any number of processes."
        )
    return Request(Config(), reproduce=run)


def _build(merged: Merged) -> Config:
    """Returns the config of merged values, or raises ConfigError with all that is wrong."""
    # If part of a file could not be read, values are missing and rules would mislead.
    kept = () if merged.incomplete else rules()
    drop_superseded(schema(), merged, kept, _sections)
    sections = _sections(merged)
    broken = check_rules(kept, sections, merged.origins, merged.refused)
    raise_problems([*merged.problems, *broken])
    return Config(**vars(sections))


def _sections(merged: Merged) -> SimpleNamespace:
    """Returns the sections side by side, not yet checked with each other."""
    given = merged.by_section()
    return _with_derived({name: made(**given.get(name, {})) for name, made in SECTIONS.items()})


def _with_derived(sections: Mapping[str, Any]) -> SimpleNamespace:
    """Returns the sections with the values that follow from other options."""
    complete = SimpleNamespace(**sections)
    for name, values in derived_values(complete).items():
        setattr(complete, name, replace(getattr(complete, name), **values))
    return complete


def _wrong_values(config: Config) -> Iterator[Problem]:
    """Yields a problem for each value that its option does not take."""
    for key, declared in schema().options.items():
        try:
            check_value(declared, getattr(getattr(config, declared.section), declared.name))
        except RefusedError as error:
            yield Problem(Origin(), f"{key}: {error}")


def _given(merged: Merged, config: Config) -> frozenset[str]:
    """Returns the options that would have another value if the user had left them out."""
    given = set[str]()
    for key, own in merged.given.items():
        left_out = merged.defaults.get(key, schema().options[key].default)
        if own.origin.layer == 0 or own.value == left_out:
            continue
        section, name = key.split(".")
        without = {section: replace(getattr(config, section), **{name: left_out})}
        if setting(_with_derived(vars(config) | without), key) != setting(config, key):
            given.add(key)
    return frozenset(given)


def reference() -> str:
    """Returns the reference file: every option at its default, those left open as they stand."""
    values = {
        name: {option.name: option.default for option in schema().in_section(name)}
        for name in SECTIONS
    }
    return dump(schema(), values, DEFAULT_FILE_HEADER)


if __name__ == "__main__":
    print(reference(), end="")
