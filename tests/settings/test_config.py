"""The config as Python sees it: defaults, rules, round trips, the reference file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import config as module
from config import (
    SECTIONS,
    Config,
    ConfigError,
    DatasetConfig,
    ModelConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainingConfig,
    accumulation_steps,
    holds_out,
    schema,
    sequences_per_step,
    token_paths,
    warmup_steps,
)
from settings.schema import Effect, OnResume, Option, Section
from settings.values import check_value, to_text
from tests.settings.conftest import ROOT, Ask, Complain, check, table

OPTIONS = list(schema().options.values())
OWNED = {option.name: option.models for option in schema().in_section("model") if option.models}


def test_the_reference_file_is_the_defaults_word_for_word() -> None:
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    assert text == module.reference(), "python config.py > config.yaml"
    assert max(map(len, text.splitlines())) <= 100
    assert Config.from_yaml(ROOT / "config.yaml") == Config()


def test_every_option_has_a_meaning_a_default_in_range_a_resume_rule_and_an_effect() -> None:
    for option in OPTIONS:
        assert option.doc and option.doc.isascii()
        assert check_value(option, option.default) == option.default
        assert option.on_resume in get_args(OnResume) and option.effect in get_args(Effect)
    known = schema().options["model.name"].choices
    assert all(set(option.models) <= set(known) for option in OPTIONS)
    with pytest.raises(TypeError, match="on_resume"):
        type("Forgotten", (Section,), {}, section="forgotten", effect="results")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 3  # type: ignore[misc]


CHANGED = {  # a value that is not the default
    "mlp_internal_dim_multiplier": 64,
    **dict.fromkeys(("bias", "mlp_bias", "attn_bias", "proj_bias", "ln_bias"), True),
    "cls_head_bias": True,
    "activation": "relu",
    "mlp_scale_factor": 2,
    "tie_embeddings": False,
    "d_ff": 64,
    "rope_theta": 5e5,
    "n_kv_head": 2,
    "attention": "flex",
}
# the values that break a rule, and its message
RULES = table("""
training.batch_size=auto
    training.batch_size=auto needs the size of a step, but training.tokens_per_step=null; set
    training.tokens_per_step.
logging.tensorboard=true training.save_model=false
    logging.tensorboard=true needs a run directory, but training.save_model=false creates none.
training.sample_tokens=50
    training.sample_tokens=50 is the length of a sample, but training.sample_prompt=null draws
    none.
training.sample_prompt=the training.test_freq=null
    training.sample_prompt=the is used at evaluations, but training.test_freq=null means there
    are none.
model.n_embd=250
    model.n_embd=250 is not divisible by model.n_head=4; nearest: 248, 252.
model.n_embd=3
    model.n_embd=3 is not divisible by model.n_head=4; nearest: 4.
model.n_embd=252 model.mlp_internal_dim_multiplier=3
    model.mlp_internal_dim_multiplier=3 * model.n_embd=252 / model.n_head=4 neurons per head
    must be even: RoPE rotates pairs; n_embd nearest: 248, 256.
model.vocab_size=200
    model.vocab_size=200 is too small for tokenizer.name=bytes, which has 256 tokens; set
    model.vocab_size to null.
schedule.min_lr=0.1
    schedule.min_lr=0.1 is above training.learning_rate=1e-3; null means a tenth of it.
schedule.warmup_iters=3001
    schedule.warmup_iters=3001 is above training.max_iters=3000; null means 3 % of it.
schedule.lr_decay_iters=89
    schedule.lr_decay_iters=89 is below schedule.warmup_iters=null with training.max_iters=3000;
    warm-up takes 90 steps.
training.tokens_per_step=4096 training.gradient_accumulation_steps=2
    training.tokens_per_step=4096 and training.gradient_accumulation_steps=2 exclude each other;
    set one.
training.tokens_per_step=5000
    training.tokens_per_step=5000 is not a multiple of training.block_size=512 *
    training.batch_size=8; nearest: 4096, 8192.
dataset.test_fraction=0.0
    training.test_freq=500 evaluates on held-out text, but dataset.test_fraction=0.0 holds none
    out; set training.test_freq to null.
dataset.test_fraction=0.0 training.test_freq=null training.eval_only=true
    training.eval_only=true evaluates on held-out text, but dataset.test_fraction=0.0 holds none
    out.
model.name=llama model.n_kv_head=3
    model.n_head=4 is not divisible by model.n_kv_head=3.
model.name=llama model.n_embd=252 model.n_head=4
    model.n_embd=252 / model.n_head=4 must be even with model.name=llama: RoPE rotates pairs;
    n_embd nearest: 248, 256.
model.name=gpt model.attention=flash model.mask=causal_document
    model.attention=flash cannot keep documents apart, as model.mask=causal_document asks for;
    set model.attention to auto.
training.init_from=gpt2 model.name=llama model.vocab_size=null
    training.init_from=gpt2 loads GPT-2 weights, but model.name=llama; set model.name to gpt.
training.init_from=resume training.resume_from_checkpoint=auto
    training.init_from=resume and training.resume_from_checkpoint=auto exclude each other; set
    one.
training.init_from=resume training.fork_from_checkpoint=run_a
    training.init_from=resume and training.fork_from_checkpoint=run_a exclude each other; set one.
dataset.name=owt dataset.train_data_path=a.bin
    dataset.name=owt and dataset.train_data_path=a.bin name two texts; set one.
dataset.parquet_dir=s3://KEY:SECRET@bucket/text
    dataset.parquet_dir has a user name or password before the host, which would be kept in the
    run's files; credentials belong in the environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS,
    HF_TOKEN).
dataset.train_data_path=https://host/train.bin?Signature=SECRET
    dataset.train_data_path has a query string (?...), which would be kept in the run's files;
    credentials belong in the environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN).
dataset.parquet_dir=s3://KEY:SEC/RET@bucket/text
    dataset.parquet_dir has a user name or password before the host, which would be kept in the
    run's files; credentials belong in the environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS,
    HF_TOKEN).
dataset.parquet_dir=https://user:p/w@host/text
    dataset.parquet_dir is no address: what follows the host's ':' is no port, or a bracket is open.
dataset.parquet_dir=http://[::1/text
    dataset.parquet_dir is no address: what follows the host's ':' is no port, or a bracket is open.
dataset.parquet_dir=https:/user:pw@host/text
    dataset.parquet_dir has one slash after its scheme; did you mean https://...?
dataset.parquet_dir=https://host/a#b.parquet
    dataset.parquet_dir holds a '#', which ends a web address; write %23 for one in a name.
dataset.parquet_dir=ftp://host/text
    dataset.parquet_dir is neither a folder nor one of s3://, gs://, https://,
    hf://datasets/OWNER/NAME@REV.
dataset.parquet_dir=hf://OWNER/NAME
    dataset.parquet_dir is not hf://datasets/OWNER/NAME, hf://datasets/OWNER/NAME@REVISION or below
    it.
dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"s3:///x"}]
    dataset.mixture: a path of source a names no bucket or host.
dataset.val_data_path=a.bin
    dataset.val_data_path=a.bin needs a token file to train on, but
    dataset.train_data_path=null.
dataset.mixture=[{"name":"a","weight":1}]
    dataset.mixture: source a names no text; set parquet_dir or train_data_path.
dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"x","train_data_path":"y"}]
    dataset.mixture: source a names two texts, parquet_dir and train_data_path; set one.
dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"x","val_data_path":"y"}]
    dataset.mixture: source a has val_data_path, which goes with train_data_path; set both.
dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"x"},{"name":"a","weight":1,"parquet_dir":"y"}]
    dataset.mixture: two entries have the name a.
dataset.mixture=[{"name":"a","weight":0,"parquet_dir":"x"}]
    dataset.mixture: all weights are 0; one must be larger.
dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"x"}] dataset.parquet_dir=z
    dataset.parquet_dir=z is a text beside those of dataset.mixture; make it a source, or set one.
dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"x"}] dataset.train_data_path=z
    dataset.train_data_path=z is a text beside those of dataset.mixture; make it a source, or set
    one.
dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"x"}] dataset.name=z
    dataset.name=z is a text beside those of dataset.mixture; make it a source, or set one.
dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"x"}] training.epochs=2
    training.epochs=2 counts passes over one text, and dataset.mixture has several; set max_iters.
low_precision.residual_dtype=bfloat16
    low_precision.residual_dtype=bfloat16 is an option of gpt and llama, but model.name=bdh.
low_precision.residual_dtype=bfloat16 low_precision.compute_dtype=float32 model.name=gpt
    low_precision.residual_dtype=bfloat16 needs matrix products in bfloat16, but
    low_precision.compute_dtype=float32.
low_precision.use_fp8=true low_precision.compute_dtype=float16
    low_precision.use_fp8=true computes everything else in bfloat16, but
    low_precision.compute_dtype=float16.
low_precision.use_fp8=true training.batch_size=3 training.block_size=100
    low_precision.use_fp8=true needs a multiple of 16 tokens, but training.batch_size=3 *
    training.block_size=100 is none; batch_size nearest: 16.
fp8.recipe=mxfp8 fp8.backend=native
    fp8.recipe=mxfp8 is a recipe of Transformer Engine, but fp8.backend=native.
fp8.amax_history_len=16 fp8.recipe=current
    fp8.amax_history_len=16 is for delayed scaling, but fp8.recipe=current; set fp8.recipe to
    delayed.
fp8.amax_compute_algo=most_recent fp8.recipe=current
    fp8.amax_compute_algo=most_recent is for delayed scaling, but fp8.recipe=current; set
    fp8.recipe to delayed.
system.compile=true fp8.recipe=delayed low_precision.use_fp8=true model.name=gpt
    system.compile=true with fp8.recipe=delayed works for model.name=bdh only, but
    model.name=gpt; set system.compile to auto.
system.compile=graphs low_precision.use_fp8=true
    system.compile=graphs does not record 8-bit matmuls, but low_precision.use_fp8=true; set
    system.compile to true.
system.compile=graphs low_precision.lora_rank=4 training.init_from=a model.name=gpt
    system.compile=graphs does not record 4-bit weights, but low_precision.lora_rank=4; set
    system.compile to true.
training.recompute=layer low_precision.use_fp8=true fp8.backend=transformer_engine
    training.recompute=layer with low_precision.use_fp8=true is for plain torch, but
    fp8.backend=transformer_engine and fp8.recipe=current; set backend to native, recipe to
    current.
training.recompute=layer system.compile=graphs model.dropout=0.1 model.name=gpt
    training.recompute=layer with system.compile=graphs has no dropout, but model.dropout=0.1;
    set system.compile to true.
system.kernels=triton model.name=gpt
    system.kernels=triton is for model.name=bdh, but model.name=gpt; set system.kernels to auto.
system.kernels=triton low_precision.use_fp8=true
    system.kernels=triton does not compute 8-bit matmuls, but low_precision.use_fp8=true; set
    system.kernels to auto.
low_precision.use_4bit_optimizer=true optimizer.name=muon
    low_precision.use_4bit_optimizer=true is AdamW with 4-bit moments, but optimizer.name=muon;
    set one of them.
low_precision.quantize_head=true model.name=gpt
    low_precision.quantize_embedding=false and low_precision.quantize_head=true differ, but with
    model.tie_embeddings=true they are one matrix.
low_precision.lora_rank=4 low_precision.quantize_after=0.5 training.init_from=gpt2
    low_precision.quantize_after=0.5 is for training all weights, but low_precision.lora_rank=4
    trains adapters.
low_precision.lora_rank=4 low_precision.use_4bit=false training.init_from=gpt2
    low_precision.lora_rank=4 adds adapters to 4-bit weights, but low_precision.use_4bit=false.
low_precision.lora_rank=4 model.name=gpt
    low_precision.lora_rank=4 freezes the weights it starts from, but training.init_from=scratch
    draws them at random.
low_precision.lora_rank=4 low_precision.use_fp8=true training.init_from=gpt2
    low_precision.lora_rank=4 computes with 4-bit weights in bfloat16, but
    low_precision.use_fp8=true.
low_precision.lora_rank=4 optimizer.name=muon training.init_from=gpt2
    low_precision.lora_rank=4 trains adapters, but optimizer.name=muon is for whole matrices.
distributed.strategy=fsdp low_precision.use_4bit_optimizer=true
    distributed.strategy=fsdp cannot shard 4-bit moments yet, but
    low_precision.use_4bit_optimizer=true; set one of them to its default.
distributed.strategy=hsdp optimizer.name=adamw_8bit
    distributed.strategy=hsdp cannot shard 8-bit moments yet, but optimizer.name=adamw_8bit; set
    optimizer.name to adamw.
distributed.strategy=fsdp low_precision.lora_rank=4 training.init_from=gpt2
    distributed.strategy=fsdp cannot shard adapters and their 4-bit weights yet, but
    low_precision.lora_rank=4; use ddp.
distributed.strategy=fsdp low_precision.use_fp8=true fp8.backend=transformer_engine
    distributed.strategy=fsdp cannot shard Transformer Engine yet, as fp8.backend=transformer_engine
    with fp8.recipe=current needs it; use native or ddp.
distributed.strategy=fsdp low_precision.use_fp8=true training.sample_prompt=a
    distributed.strategy=fsdp with low_precision.use_fp8=true cannot draw samples, which need the
    whole model, but training.sample_prompt=a; set it to null.
""")
RULES += [
    (
        "low_precision.lora_rank=4 low_precision.quantize_head=true model.tie_embeddings=false "
        "training.init_from=gpt2",
        "low_precision.lora_rank=4 freezes hidden matrices only, but "
        "low_precision.quantize_embedding=false and low_precision.quantize_head=true; set both to "
        "false.",
    ),
    *(
        (
            f"model.name={other} model.{name}={to_text(CHANGED[name])}",
            f"model.{name}={to_text(CHANGED[name])} is an option of {' and '.join(models)}, "
            f"but model.name={other}.",
        )
        for name, models in OWNED.items()
        for other in ("bdh", "gpt")
        if other not in models
    ),
]


def sections(words: str) -> dict[str, dict[str, Any]]:
    """Values such as 'model.n_layer=2 tokenizer.name=gpt2', by section and name."""
    values: dict[str, dict[str, Any]] = {}
    for word in words.split():
        section, name, text = re.split(r"[.=]", word, maxsplit=2)
        values.setdefault(section, {})[name] = yaml.safe_load(text)
    return values


def made(values: dict[str, dict[str, Any]]) -> Config:
    values = {name: dict(options) for name, options in values.items()}
    sources = values.get("dataset", {}).get("mixture", [])
    if sources:
        values["dataset"]["mixture"] = tuple(SourceConfig(**source) for source in sources)
    return Config(**{name: SECTIONS[name](**options) for name, options in values.items()})


def test_no_message_repeats_an_address_that_may_hold_a_password() -> None:
    with pytest.raises(ConfigError) as caught:
        made(sections("dataset.name=owt dataset.train_data_path=s3://a:SECRET@bucket/t.bin"))
    assert '"(an address)" name two texts' in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(("words", "message"), RULES)
def test_a_broken_rule_names_its_keys_and_values(words: str, message: str) -> None:
    values = sections(words)
    with pytest.raises(ConfigError) as direct:
        made(values)
    assert str(direct.value) == message
    with pytest.raises(ConfigError) as from_dict:
        Config.from_dict(values, source="checkpoint_5.json")
    assert str(from_dict.value).startswith(f"checkpoint_5.json: {message.rstrip('.')}")


def test_every_rule_is_tested() -> None:
    for rule in module.rules():
        assert any(all(key in message for key in rule.keys) for _, message in RULES)


def test_an_option_of_a_model_is_taken_by_that_model_and_at_its_default_by_all() -> None:
    for option, models in OWNED.items():
        default = getattr(Config().model, option)
        for name in ("bdh", "gpt", "llama"):
            values = {"name": name, option: CHANGED[option] if name in models else default}
            assert getattr(Config.from_dict({"model": values}).model, option) == values[option]


TEXTS: list[tuple[dict[str, Any], tuple[str, str | None] | None, bool]] = [
    ({}, None, True),
    ({"test_fraction": 0.0}, None, False),
    ({"name": "owt", "test_fraction": 0.0}, ("data/owt/train.bin", "data/owt/val.bin"), True),
    ({"train_data_path": "a.ids", "test_fraction": 0.0}, ("a.ids", None), False),
    ({"train_data_path": "a.ids"}, ("a.ids", None), True),
    ({"train_data_path": "a", "val_data_path": "b", "test_fraction": 0.0}, ("a", "b"), True),
]


def test_the_text_is_token_files_where_they_are_named_and_parquet_otherwise() -> None:
    for values, paths, held_out in TEXTS:
        dataset = DatasetConfig(**values)
        assert (token_paths(dataset), holds_out(dataset)) == (paths, held_out), values


LEFT_OUT = [  # what is said, what follows
    ("", "tokenizer.name=bytes model.vocab_size=256"),
    ("dataset.name=x", "tokenizer.name=auto model.vocab_size=null"),
    ("dataset.train_data_path=x", "tokenizer.name=auto model.vocab_size=null"),
    ("tokenizer.name=gpt2", "model.vocab_size=null"),
    ("tokenizer.name=gpt2 model.vocab_size=50304", "model.vocab_size=50304"),
    (
        'dataset.mixture=[{"name":"a","weight":1,"parquet_dir":"x"}]',
        "tokenizer.name=bytes model.vocab_size=256",
    ),
    (
        'dataset.mixture=[{"name":"a","weight":1,"train_data_path":"x"}]',
        "tokenizer.name=auto model.vocab_size=null",
    ),
    ("training.init_from=gpt2-xl", "model.name=gpt tokenizer.name=gpt2 model.vocab_size=null"),
    (
        "training.init_from=gpt2 dataset.name=x",
        "model.name=gpt tokenizer.name=auto model.vocab_size=null",
    ),
    ("training.init_from=weights.pt model.name=gpt", "model.vocab_size=null tokenizer.name=bytes"),
    ("tokenizer.vocab_multiple=100", "model.vocab_size=300"),
    ("model.name=gpt", "low_precision.use_4bit=false"),
    ("low_precision.lora_rank=4 training.init_from=gpt2", "low_precision.use_4bit=true"),
    ("low_precision.use_4bit=false", "low_precision.use_4bit=false"),
    ("", "low_precision.use_4bit=true fp8.recipe=current fp8.format=hybrid"),
    ("fp8.amax_history_len=16", "fp8.recipe=delayed fp8.format=hybrid"),
    ("fp8.recipe=mxfp8", "fp8.format=e4m3"),
    ("fp8.recipe=mxfp8 fp8.format=hybrid", "fp8.format=hybrid"),
]


@pytest.mark.parametrize(("words", "expected"), LEFT_OUT)
def test_what_is_left_out_follows_from_what_is_said_in_python_as_in_a_file(
    words: str, expected: str, tmp_path: Path
) -> None:
    values = sections(words)
    config = made(values)
    check(config, expected)
    assert Config.from_dict(values) == config
    (tmp_path / "my.yaml").write_text(json.dumps(values))
    assert Config.from_yaml(tmp_path / "my.yaml") == config
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "resolved.yaml") == config


def test_a_broken_rule_says_where_each_value_came_from(ask: Ask, complaint: Complain) -> None:
    file = {"my.yaml": "model:\n  n_embd: 250\n"}
    assert complaint("my.yaml", file) == (
        "my.yaml:2: model.n_embd=250 is not divisible by model.n_head=4; nearest: 248, 252 "
        "[model.n_head: default]"
    )
    found = complaint("my.yaml n_head=3")
    assert found.startswith("command line: model.n_embd=250 is not divisible by")
    assert found.endswith("[model.n_embd: my.yaml:2]")
    check(ask("my.yaml n_head=2").config, "n_embd=250")


WRONG = [  # section, values, message
    ("training", {"batch_size": "8"}, "batch_size: expected a whole number or auto, got 8"),
    ("training", {"batch_size": True}, "expected a whole number or auto, got true"),
    ("training", {"batch_size": 8.0}, "expected a whole number or auto, got 8.0"),
    ("training", {"learning_rate": math.nan}, "must be finite, got nan"),
    ("training", {"learning_rate": 10**400}, "expected a number, got 1000"),
    ("training", {"seed": 2**63}, "must be at most 2**63 - 1, got 9223372036854775808"),
    ("dataset", {"parquet_dir": Path("x")}, "dataset.parquet_dir: expected text, got a Po"),
    ("dataset", {"parquet_dir": None}, "expected text, got null"),
    ("optimizer", {"beta1": 1}, "optimizer.beta1: must be in [0, 1), got 1.0"),
    ("schedule", {"name": "Cosine"}, "got 'Cosine'. Did you mean cosine?"),
    ("model", {"n_layer": 0, "n_head": 0}, "model.n_head: must be >= 1, got 0"),
]


@pytest.mark.parametrize(("section", "values", "message"), WRONG)
def test_values_given_in_python_are_checked_like_those_of_a_file(
    section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{section: SECTIONS[section](**values)})
    assert message in str(caught.value)


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    training = Config.from_dict({"training": {"learning_rate": 1, "save_every": 60}}).training
    assert repr((training.learning_rate, training.save_every)) == "(1.0, 60.0)"


def test_unknown_names_in_a_checkpoint_are_refused() -> None:
    with pytest.raises(ConfigError, match="x.json: training.sede: unknown option. Did you mean se"):
        Config.from_dict({"training": {"sede": 3}}, source="x.json")
    with pytest.raises(ConfigError, match="expected a section"):
        Config.from_dict({"training": 3})
    with pytest.raises(ConfigError, match="optimizer.precision: not available in this version"):
        Config.from_dict({"optimizer": {"precision": "bfloat16"}})


def test_tokens_per_step_fix_the_accumulation() -> None:
    config = Config(training=TrainingConfig(tokens_per_step=12 * 8 * 512))
    for world_size, steps in ((1, 12), (2, 6), (3, 4), (4, 3)):
        assert accumulation_steps(config, world_size) == steps
        assert sequences_per_step(config, world_size) == 96
    without = Config(training=TrainingConfig(gradient_accumulation_steps=5))
    assert (accumulation_steps(without, 4), sequences_per_step(without, 4)) == (5, 5 * 8 * 4)
    config = Config(training=TrainingConfig(tokens_per_step=9 * 512, batch_size=1))
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(config, 4)
    assert str(caught.value) == (
        "training.tokens_per_step=4608 is not a multiple of training.block_size=512 * "
        "training.batch_size=1 * 4 processes; nearest: 4096, 6144."
    )


def test_warm_up_is_3_percent_of_the_steps_that_are_planned() -> None:
    config = Config()
    assert [warmup_steps(config, total) for total in (None, 1000, 0)] == [90, 30, 0]
    given = Config(schedule=ScheduleConfig(warmup_iters=50))
    assert warmup_steps(given) == warmup_steps(given, 1000) == 50


def test_to_bdh_config_gives_the_shape_of_the_model() -> None:
    shape = Config(model=ModelConfig(n_layer=2, n_embd=64)).to_bdh_config()
    assert dataclasses.asdict(shape) == {
        "n_layer": 2,
        "n_embd": 64,
        "dropout": 0.1,
        "n_head": 4,
        "mlp_internal_dim_multiplier": 128,
        "vocab_size": 256,
    }
    text_decides = Config(tokenizer=TokenizerConfig(name="char"))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=null takes .*tokenizer\.name=char"):
        text_decides.to_bdh_config()


def value_of(option: Option) -> st.SearchStrategy[Any]:
    """Draw any value that the option takes on its own."""
    limits = option.limits
    if option.entry_options:
        entry = {own.name: value_of(own) for own in option.entry_options}
        return st.lists(st.fixed_dictionaries(entry), max_size=2)
    kinds: list[st.SearchStrategy[Any]] = []
    if option.kind is int:
        low = int(limits.ge or 0)
        high = int(limits.le) if limits.le is not None else 2**63 - 1
        kinds.append(st.integers(low, high))
    elif option.kind is float:
        largest = limits.le if limits.le is not None else limits.lt
        numbers = st.floats(0, largest, allow_nan=False, allow_infinity=False)
        kinds.append(numbers.filter(limits.allow))
    elif option.kind is bool:
        kinds.append(st.booleans())
    elif option.form is not None:
        kinds.append(st.from_regex(option.form.pattern, fullmatch=True))
    elif option.kind is str:
        words = st.sampled_from(["no", "null", "1e-3", "2026-01-01", "a: b # c", "~", "- x", '"'])
        kinds += [
            st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20),
            words,
        ]
    kinds += [st.sampled_from(option.choices)] if option.choices else []
    kinds += [st.none()] if option.optional else []
    return st.one_of(kinds)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draw configs whose values are extreme; those that break a rule together are left out."""
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for option in OPTIONS:
        values[option.section][option.name] = draw(value_of(option))
    while True:
        try:
            return Config.from_dict(values)
        except ConfigError as error:
            for option in OPTIONS:
                if option.key in str(error) and option.key != "model.name":
                    values[option.section].pop(option.name, None)


@pytest.mark.slow
@given(configs())
@settings(max_examples=25, deadline=None)
def test_what_is_written_reads_back_equal(tmp_path_factory: Any, config: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(config.to_yaml(), "utf-8")
    assert Config.from_yaml(path) == config
    path.write_text(config.to_yaml(["a header\nin two lines", "", "model: {seed: 1}"]), "utf-8")
    assert Config.from_yaml(path) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
